"""A synthetic street: endless, deterministic, labelled to the pixel, and made offline.

`Street(seed).frame(index)` is one frame of a drive and its label map over CamVid's eleven classes.
A frame is drawn back to front at twice the resolution, image and labels by the same calls; the
label of a pixel is the sub-sample at its centre, so labels are exact while edges are antialiased.
`scene` also tells its cars, pedestrians and bicyclists apart.
Two conventions follow CamVid's annotators: railings are labelled as whole panels, grass as Tree.
"""

from knet_synthetic.canvas import CAMVID11
from knet_synthetic.street import Street

__all__ = ["CAMVID11", "Street"]
