"""Videos, cameras and images through one engine into sinks, all at the same time."""

from knet_runtime.pipeline.feed import Feed, Policy
from knet_runtime.pipeline.pipeline import Pipeline, RunSummary, run, segment
from knet_runtime.pipeline.stats import RunStats
from knet_runtime.pipeline.threads import SegmentCall

__all__ = [
    "Feed",
    "Pipeline",
    "Policy",
    "RunStats",
    "RunSummary",
    "SegmentCall",
    "run",
    "segment",
]
