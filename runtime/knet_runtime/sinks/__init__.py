"""Where results go: overlays, masks, lines of JSON, frames to label, recordings of ROS.

All have the same two steps. ``write`` takes one frame and its result. ``close`` ends the output:
``complete`` gives it its final name; without it (the source or a stage failed) a name or mark says
so, and an output without frames leaves nothing. Closing twice does nothing.

Neither step waits for ever. A full disk is an OutputError at once. A disk that is slow holds up
``write``, and the pipeline's bounded queue before it makes a file wait and a live feed drop and
count. What another process or machine takes has a patience of its own: see ``RawMasks``,
``OverlayPipe``, ``SharedMasks`` and ``RtspPush``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks.bag import RosBag as RosBag
from knet_runtime.sinks.coco import CocoPanoptic as CocoPanoptic, CocoResults as CocoResults
from knet_runtime.sinks.event_lines import EventLines as EventLines
from knet_runtime.sinks.frame_pipe import MaskPipe as MaskPipe, OverlayPipe as OverlayPipe
from knet_runtime.sinks.json_lines import JsonLines as JsonLines, RleLines as RleLines
from knet_runtime.sinks.look import Look as Look
from knet_runtime.sinks.mask_folder import MaskFolder as MaskFolder
from knet_runtime.sinks.overlay import OverlayImage as OverlayImage, OverlayVideo as OverlayVideo
from knet_runtime.sinks.overlay_folder import OverlayFolder as OverlayFolder
from knet_runtime.sinks.raw_masks import RawMasks as RawMasks
from knet_runtime.sinks.rtsp import RtspPush as RtspPush
from knet_runtime.sinks.shared_memory import SharedMasks as SharedMasks
from knet_runtime.sinks.uncertain import UncertainFrames as UncertainFrames
from knet_runtime.types import Frame


class Sink(Protocol):
    """Takes each frame with its result; both methods raise OutputError.

    OutputClosed, its subclass, says that whoever read the output has had enough: the run ends as
    if it had been stopped.

        >>> from knet_deploy import Feed, Segmenter, open_source, run
        >>> class Largest:  # says which class covers most of each frame
        ...     name, path = "largest class", None
        ...     def write(self, frame, result):
        ...         shares = result.shares()
        ...         print(frame.name, max(shares, key=shares.get))
        ...     def close(self, *, complete=True):
        ...         print("done" if complete else "broke off")
        >>> with open_source("photos") as source, Segmenter() as segment:
        ...     summary = run([Feed(source, [Largest()])], segment)
        a ...
        b ...
        done
    """

    @property
    def name(self) -> str:
        """What it is called in messages; never with a password."""
        ...

    @property
    def path(self) -> Path | None:
        """The file or folder that is written, None if it is neither: two sinks, or a sink and a
        source, never share it. After ``close`` where it is: under a partial name perhaps, and None
        if nothing was written."""
        ...

    def write(self, frame: Frame, result: Segmentation) -> None: ...

    def close(self, *, complete: bool = True) -> None: ...
