"""What ``knet-deploy run`` says of a run: its progress, and at its end, however it ends, speed,
times, losses, outputs and class shares."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from knet_deploy.cli.console import say, track

if TYPE_CHECKING:
    from knet_runtime.pipeline import Feed, RunStats, RunSummary
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

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Add a frame; one that is shown again does not count."""
        if frame.stale:
            return
        self._frames += 1
        for label, share in result.shares().items():
            self._sums[label] = self._sums.get(label, 0.0) + share

    def close(self, *, complete: bool = True) -> None:
        """Remember how it ended."""
        self.complete = complete

    def say(self) -> None:
        """The classes by what they cover of all frames, most first."""
        ordered = sorted(self._sums.items(), key=lambda item: -item[1])
        for index, (label, total) in enumerate(ordered):
            say("" if index else "shares", f"{100 * total / self._frames:5.1f} %  {label}")


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


def run_and_say(
    feeds: Sequence[Feed], segmenter: Segmenter, stats: RunStats, max_frames: int | None
) -> None:
    """Run to the end, or to ``max_frames`` of each feed, and say what came of it; each feed has a
    sink ``Shares``. Raises what the run raises, after saying what is kept."""
    from knet_runtime.pipeline import run

    title = feeds[0].name if len(feeds) == 1 else f"{len(feeds)} sources"
    try:
        with track(title, _expected(feeds, max_frames)) as advance:
            summary = run(
                feeds,
                segmenter,
                max_frames=max_frames,
                on_frame=lambda *_: advance(),
                stats=stats,
            )
    except (Exception, KeyboardInterrupt) as error:
        frames = sum(feed.frames for feed in stats.snapshot().feeds.values())
        if frames:
            how = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            say(how, f"after {frames} frames; what was written until then is kept")
            _say_feeds(feeds, segmenter, stats, times=False)
        raise
    if len(feeds) == 1:
        say_times(summary)
    else:
        say("frames", summary.frames)
        say("speed", f"{summary.fps:.1f} frames/s of all sources ({summary.seconds:.1f} s)")
    _say_feeds(feeds, segmenter, stats, times=len(feeds) > 1)


def _expected(feeds: Sequence[Feed], max_frames: int | None) -> int | None:
    """How many frames there will be, None where a source does not say."""
    total = 0
    for feed in feeds:
        frames = feed.source.info.frames
        if max_frames is not None:
            frames = min(frames or max_frames, max_frames)
        if frames is None:
            return None
        total += frames
    return total


def say_times(summary: RunSummary) -> None:
    """The lines on speed of a run of one source."""
    say("frames", summary.frames)
    say("speed", f"{summary.fps:.1f} frames/s ({summary.seconds:.1f} s)")
    _say_stages(summary.stages)


def _say_feeds(
    feeds: Sequence[Feed], segmenter: Segmenter, stats: RunStats, *, times: bool
) -> None:
    say("engine", segmenter.engine)
    say("model", segmenter.model_id)
    numbers = stats.snapshot().feeds
    for feed in feeds:
        snapshot = numbers[feed.name]
        if len(feeds) > 1:
            say("source", feed.name)
            say("frames", snapshot.frames)
        if times:
            _say_stages(snapshot.stages)
        _say_losses(snapshot)
        shares = next(sink for sink in feed.sinks if isinstance(sink, Shares))
        _say_written(feed.sinks, partial=not shares.complete)
        shares.say()


def _say_stages(stages: dict[str, StageSnapshot]) -> None:
    """Milliseconds per frame by stage."""
    for index, (stage, time) in enumerate(stages.items()):
        text = f"{stage:<9} {time.p50:8.1f} median {time.p95:8.1f} p95 {time.p99:8.1f} p99"
        say("" if index else "times, ms", text)


def _say_losses(feed: FeedSnapshot) -> None:
    """What a live source lost; nothing where nothing was lost."""
    for label, count in (
        ("dropped", feed.dropped),
        ("stale", feed.stale_frames),
        ("reconnects", feed.reconnects),
    ):
        if count:
            say(label, count)


def _say_written(sinks: Sequence[Sink], *, partial: bool) -> None:
    """The files and folders that are there now."""
    from knet_runtime.atomic import partial_path

    for sink in sinks:
        if sink.path is None:
            continue
        path = partial_path(sink.path) if partial and not sink.path.is_dir() else sink.path
        if path.exists():
            say("written", f"{path}{'/' if path.is_dir() else ''}")
