"""The numbers of a run as the page, /metrics and /healthz tell them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import msgspec

from knet_runtime.serve.sensors import Machine, read_machine
from knet_runtime.stats import FeedSnapshot, RunSnapshot, StageSnapshot

if TYPE_CHECKING:
    from collections.abc import Mapping

    from knet_runtime.serve.latest import Latest

State = Literal["waiting", "running", "stale", "disconnected", "ended"]

STALE_SECONDS = 3.0
"""A live feed without a new picture for so long is stale, even if the run itself has not said so:
it may hang."""

_NOTHING = FeedSnapshot(
    frames=0,
    dropped=0,
    stale_frames=0,
    reconnects=0,
    connected=True,
    last_frame_age=None,
    stages={},
)
"""What there is to tell of a feed whose run has not begun."""


class FeedNumbers(msgspec.Struct, frozen=True):
    """One feed: counts since the start, the age of its last new picture in seconds, milliseconds
    by stage."""

    name: str
    state: State
    frames: int
    dropped: int
    stale_frames: int
    reconnects: int
    age: float | None
    stages: dict[str, StageSnapshot]


class Numbers(msgspec.Struct, frozen=True):
    """All feeds at one moment; ``time`` in seconds since the epoch."""

    time: float
    viewers: int
    machine: Machine
    feeds: list[FeedNumbers]

    @property
    def healthy(self) -> bool:
        """Whether every feed gives new pictures, or has ended while others still run."""
        states = {feed.state for feed in self.feeds}
        return "running" in states and states <= {"running", "ended"}


def _state(feed: FeedSnapshot, latest: Latest) -> State:
    """One word for whether the pictures of a feed are now."""
    shot = latest.shot
    if latest.ended:
        return "ended"
    if not feed.connected:
        return "disconnected"
    if shot is None:
        return "waiting"
    live = shot.frame.wall is not None
    hangs = live and feed.last_frame_age is not None and feed.last_frame_age > STALE_SECONDS
    return "stale" if shot.frame.stale or hangs else "running"


def read_numbers(snapshot: RunSnapshot, latest: Mapping[str, Latest], viewers: int) -> Numbers:
    """What there is to tell of the feeds in ``latest``, by name, at this moment."""
    feeds = []
    for name, slot in latest.items():
        feed = snapshot.feeds.get(name, _NOTHING)
        feeds.append(
            FeedNumbers(
                name=name,
                state=_state(feed, slot),
                frames=feed.frames,
                dropped=feed.dropped,
                stale_frames=feed.stale_frames,
                reconnects=feed.reconnects,
                age=feed.last_frame_age,
                stages=feed.stages,
            )
        )
    return Numbers(time.time(), viewers, read_machine(), feeds)
