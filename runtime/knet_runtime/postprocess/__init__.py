"""From a network's outputs of low resolution to results at the frame's own size."""

from knet_runtime.postprocess.segments import (
    distinct_kernels as distinct_kernels,
    find_segments as find_segments,
    instances as instances,
    panoptic as panoptic,
)
from knet_runtime.postprocess.semantic import (
    class_map as class_map,
    cut_window as cut_window,
    restore_class_map as restore_class_map,
)
from knet_runtime.postprocess.uncertainty import (
    pixel_uncertainty as pixel_uncertainty,
    segment_uncertainty as segment_uncertainty,
)
from knet_runtime.postprocess.upsample import (
    candidates as candidates,
    upsampled_argmax as upsampled_argmax,
)
