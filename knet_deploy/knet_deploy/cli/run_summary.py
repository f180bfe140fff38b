"""One run of ``knet-deploy run``: its progress, and what is said of it however it ends.

What ``run`` says at its end: speed, times, losses and class shares, per source.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from knet_deploy.cli.console import say, track

if TYPE_CHECKING:
    from knet_runtime.pipeline import Feed, RunSummary
    from knet_runtime.pipeline.stats import FeedSnapshot, StageSnapshot
    from knet_runtime.segmentation import Segmentation
    from knet_runtime.segmenter import Segmenter
    from knet_runtime.sinks import Sink
    from knet_runtime.types import Frame


class Shares:
    """A sink that counts what the classes cover; it writes nothing."""

    path = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.complete = True
        self._frames = 0
        self._sums: dict[str, float] = {}

    def write(self, frame: Frame, mask: Segmentation) -> None:
        """Add a frame; one that is shown again does not count."""
        if frame.stale:
            return
        self._frames += 1
        for label, share in mask.shares().items():
            self._sums[label] = self._sums.get(label, 0.0) + share

    def close(self, *, complete: bool = True) -> None:
        """Remember how it ended."""
        self.complete = complete

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


def feed_names(sources: Sequence[str]) -> list[str]:
    """A name per source for numbers and files: of an address its host and path, of a file its stem;
    letters, digits and - only, numbered where two would be the same."""
    from knet_runtime.sources.container import redacted, scheme_of

    names: list[str] = []
    for source in sources:
        if scheme_of(source):
            text = redacted(source).partition("://")[2].partition("?")[0].rpartition("@")[2]
        else:
            text = Path(source).stem or Path(source).resolve().name
        plain = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "source"
        name, count = plain, 1
        while name in names:
            count += 1
            name = f"{plain}-{count}"
        names.append(name)
    return names


class Work:
    """One run, and what is known of it when it ends, however it ends."""

    def __init__(self, segmenter: Segmenter, feeds: list[Feed]) -> None:
        from knet_runtime.pipeline import RunStats

        self._segmenter = segmenter
        self._feeds = feeds
        self.stats = RunStats()

    def go(self, max_frames: int | None) -> None:
        """Run to the end, or to ``max_frames`` of each feed; the summary goes to stdout."""
        from knet_runtime.pipeline import run

        try:
            with track(self._title(), self._expected(max_frames)) as advance:

                def count(frame: Frame, mask: Segmentation) -> None:
                    advance()

                summary = run(
                    self._feeds,
                    self._segmenter,
                    max_frames=max_frames,
                    on_frame=count,
                    stats=self.stats,
                )
        except KeyboardInterrupt:
            self._say_kept("stopped")
            raise
        except Exception:
            self._say_kept("failed")
            raise
        if len(self._feeds) > 1:
            say("frames", summary.frames)
            say("speed", f"{summary.fps:.1f} frames/s of all sources ({summary.seconds:.1f} s)")
        else:
            say_times(summary)
        self._say_rest(times=len(self._feeds) > 1)

    def _title(self) -> str:
        return self._feeds[0].name if len(self._feeds) == 1 else f"{len(self._feeds)} sources"

    def _expected(self, max_frames: int | None) -> int | None:
        total = 0
        for feed in self._feeds:
            frames = feed.source.info.frames
            if max_frames is not None:
                frames = min(frames or max_frames, max_frames)
            if frames is None:
                return None
            total += frames
        return total

    def _say_kept(self, how: str) -> None:
        frames = sum(feed.frames for feed in self.stats.snapshot().feeds.values())
        if frames:
            say(how, f"after {frames} frames; what was written until then is kept")
            self._say_rest(times=False)

    def _say_rest(self, *, times: bool) -> None:
        say("engine", self._segmenter.engine)
        say("model", self._segmenter.model_id)
        numbers = self.stats.snapshot().feeds
        for feed in self._feeds:
            snapshot = numbers[feed.name]
            if len(self._feeds) > 1:
                say("source", feed.name)
                say("frames", snapshot.frames)
            if times:
                say_stages(snapshot.stages)
            say_losses(snapshot)
            shares = next(sink for sink in feed.sinks if isinstance(sink, Shares))
            say_written(feed.sinks, partial=not shares.complete)
            shares.say()
