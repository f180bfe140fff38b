"""K-Net image segmentation from a PyTorch checkpoint to an edge box: the public names.

Importing this costs nothing and needs no torch: each name is loaded when it is first used (PEP
562). What trains, exports and verifies needs an extra, which the error names when it is missing.

    from knet_deploy import Segmenter

    with Segmenter("street.knet") as segment:
        result = segment(image)  # uint8 [H, W, 3] RGB
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knet_export.export import export_bundle as export_bundle
    from knet_export.verify.verify import verify_bundle as verify_bundle
    from knet_runtime.bundle.manifest import SegmentRules as SegmentRules
    from knet_runtime.bundle.store import Bundle as Bundle, open_bundle as open_bundle
    from knet_runtime.counting import ZoneCounter as ZoneCounter
    from knet_runtime.errors import (
        BundleError as BundleError,
        CheckpointError as CheckpointError,
        ConfigError as ConfigError,
        DataError as DataError,
        EngineError as EngineError,
        EngineUnavailable as EngineUnavailable,
        KnetError as KnetError,
        OutputClosed as OutputClosed,
        OutputError as OutputError,
        ParityError as ParityError,
        SourceError as SourceError,
        TrainingError as TrainingError,
    )
    from knet_runtime.labels import LabelMap as LabelMap
    from knet_runtime.pipeline import (
        Feed as Feed,
        Pipeline as Pipeline,
        RunStats as RunStats,
        RunSummary as RunSummary,
        run as run,
    )
    from knet_runtime.privacy import Concealed as Concealed, Concealer as Concealer
    from knet_runtime.segmentation import (
        Instance as Instance,
        Segment as Segment,
        Segmentation as Segmentation,
    )
    from knet_runtime.segmenter import Segmenter as Segmenter
    from knet_runtime.sinks import (
        CocoPanoptic as CocoPanoptic,
        CocoResults as CocoResults,
        EventLines as EventLines,
        JsonLines as JsonLines,
        Look as Look,
        MaskFolder as MaskFolder,
        MaskPipe as MaskPipe,
        OverlayFolder as OverlayFolder,
        OverlayImage as OverlayImage,
        OverlayPipe as OverlayPipe,
        OverlayVideo as OverlayVideo,
        RawMasks as RawMasks,
        RleLines as RleLines,
        RosBag as RosBag,
        RtspPush as RtspPush,
        SharedMasks as SharedMasks,
        Sink as Sink,
        UncertainFrames as UncertainFrames,
    )
    from knet_runtime.sinks.raw_masks import read_masks as read_masks
    from knet_runtime.sinks.shared_memory import SharedMaskReader as SharedMaskReader
    from knet_runtime.smoothing import Smoother as Smoother
    from knet_runtime.sources import open_source as open_source
    from knet_runtime.sources.base import (
        Source as Source,
        SourceInfo as SourceInfo,
        SourceOptions as SourceOptions,
    )
    from knet_runtime.sources.ros_images import read_ros_image as read_ros_image
    from knet_runtime.tracking import Tracker as Tracker
    from knet_runtime.types import Frame as Frame
    from knet_runtime.web.auth import listen as listen
    from knet_runtime.web.server import LivePage as LivePage
    from knet_runtime.zones import (
        Line as Line,
        Zone as Zone,
        Zones as Zones,
        read_zones as read_zones,
    )
    from knet_train.checkpoint import load_checkpoint as load_checkpoint
    from knet_train.models.knet import KNet as KNet

# The same names again, for the run: each is imported when it is first used.
_MODULES = {
    "knet_export.export": "export_bundle",
    "knet_export.verify.verify": "verify_bundle",
    "knet_runtime.bundle.manifest": "SegmentRules",
    "knet_runtime.bundle.store": "Bundle open_bundle",
    "knet_runtime.counting": "ZoneCounter",
    "knet_runtime.errors": (
        "BundleError CheckpointError ConfigError DataError EngineError EngineUnavailable "
        "KnetError OutputClosed OutputError ParityError SourceError TrainingError"
    ),
    "knet_runtime.labels": "LabelMap",
    "knet_runtime.pipeline": "Feed Pipeline RunStats RunSummary run",
    "knet_runtime.privacy": "Concealed Concealer",
    "knet_runtime.segmentation": "Instance Segment Segmentation",
    "knet_runtime.segmenter": "Segmenter",
    "knet_runtime.sinks": (
        "CocoPanoptic CocoResults EventLines JsonLines Look MaskFolder MaskPipe OverlayFolder "
        "OverlayImage OverlayPipe OverlayVideo RawMasks RleLines RosBag RtspPush SharedMasks Sink "
        "UncertainFrames"
    ),
    "knet_runtime.sinks.raw_masks": "read_masks",
    "knet_runtime.sinks.shared_memory": "SharedMaskReader",
    "knet_runtime.smoothing": "Smoother",
    "knet_runtime.sources.base": "Source SourceInfo SourceOptions",
    "knet_runtime.sources": "open_source",
    "knet_runtime.sources.ros_images": "read_ros_image",
    "knet_runtime.tracking": "Tracker",
    "knet_runtime.types": "Frame",
    "knet_runtime.web.auth": "listen",
    "knet_runtime.web.server": "LivePage",
    "knet_runtime.zones": "Line Zone Zones read_zones",
    "knet_train.checkpoint": "load_checkpoint",
    "knet_train.models.knet": "KNet",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_HOME)
_EXTRAS = {"knet_export": "export", "knet_train": "train", "knet_runtime.web": "serve"}


def __getattr__(name: str) -> Any:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        found = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        for start, extra in _EXTRAS.items():
            if module.startswith(start) and not (error.name or "").startswith("knet_"):
                raise ImportError(
                    f'{name} needs {error.name}: pip install "knet-deploy[{extra}]"'
                ) from error
        raise
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
