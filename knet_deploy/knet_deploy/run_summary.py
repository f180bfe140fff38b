"""What ``run`` says at its end: speed, times, losses and class shares, per source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from knet_deploy.console import say

if TYPE_CHECKING:
    from knet_runtime.frames import Frame
    from knet_runtime.pending import Keep
    from knet_runtime.segmenter import Mask
    from knet_runtime.sinks import Sink
    from knet_runtime.stats import FeedSnapshot, StageSnapshot
    from knet_runtime.stream import RunSummary


class Shares:
    """A sink that counts what the classes cover; it writes nothing."""

    path = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.kept: Keep = "complete"
        self._frames = 0
        self._sums: dict[str, float] = {}

    def write(self, frame: Frame, mask: Mask) -> None:
        """Add a frame; one that is shown again does not count."""
        if frame.stale:
            return
        self._frames += 1
        for label, share in mask.shares().items():
            self._sums[label] = self._sums.get(label, 0.0) + share

    def close(self, keep: Keep = "complete") -> None:
        """Remember how it ended."""
        self.kept = keep

    def say(self) -> None:
        """The classes by what they cover of all frames, most first."""
        ordered = sorted(self._sums.items(), key=lambda item: -item[1])
        for index, (label, total) in enumerate(ordered):
            say("" if index else "shares", f"{100 * total / self._frames:5.1f} %  {label}")


def say_times(summary: RunSummary) -> None:
    """The lines on speed of a run of one source."""
    say("frames", summary.frames)
    say("speed", f"{summary.fps:.1f} frames/s ({summary.seconds:.1f} s)")
    say_stages(summary.stages)


def say_stages(stages: dict[str, StageSnapshot]) -> None:
    """Milliseconds per frame by stage."""
    for index, (stage, time) in enumerate(stages.items()):
        text = f"{stage:<9} {time.p50:8.1f} median {time.p95:8.1f} p95 {time.p99:8.1f} p99"
        say("" if index else "times, ms", text)


def say_losses(feed: FeedSnapshot) -> None:
    """What a live source lost; nothing where nothing was lost."""
    for label, count in (
        ("dropped", feed.dropped),
        ("stale", feed.stale_frames),
        ("reconnects", feed.reconnects),
    ):
        if count:
            say(label, count)


def say_written(sinks: Sequence[Sink], *, partial: bool) -> None:
    """The files and folders that are there now."""
    for sink in sinks:
        if sink.path is None:
            continue
        path = _partial(sink.path) if partial else sink.path
        if path.exists():
            say("written", f"{path}{'/' if path.is_dir() else ''}")


def _partial(path: Path) -> Path:
    """The name that an output gets when its run failed."""
    return path if path.is_dir() else path.with_name(f"{path.stem}.partial{path.suffix}")
