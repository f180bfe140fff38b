"""One run of ``knet-deploy run``: its progress, and what is said of it however it ends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from knet_deploy.console import say, track
from knet_deploy.run_summary import Shares, say_losses, say_stages, say_times, say_written

if TYPE_CHECKING:
    from knet_runtime.frames import Frame
    from knet_runtime.segmenter import Mask, Segmenter
    from knet_runtime.stream import Feed


def feed_names(sources: Sequence[str]) -> list[str]:
    """A name per source for numbers and files: of an address its host and path, of a file its stem;
    letters, digits and - only, numbered where two would be the same."""
    from knet_runtime.source.address import redacted, scheme_of

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
        from knet_runtime.stats import RunStats

        self._segmenter = segmenter
        self._feeds = feeds
        self.stats = RunStats()

    def go(self, max_frames: int | None) -> None:
        """Run to the end, or to ``max_frames`` of each feed; the summary goes to stdout."""
        from knet_runtime import stream

        try:
            with track(self._title(), self._expected(max_frames)) as advance:

                def count(frame: Frame, mask: Mask) -> None:
                    advance()

                summary = stream.run(
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
            say_written(feed.sinks, partial=shares.kept == "partial")
            shares.say()
