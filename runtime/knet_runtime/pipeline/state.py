"""A feed's life: its states, what can happen to it, and the one table of what follows.

    READING ──► STOPPING ──► DRAINING ──► WRITING ──► CLOSING ──► CLOSED

A feed only ever goes to the right, and may pass over states: a sink that fails takes it from
READING to CLOSING at once.
"""

from __future__ import annotations

from enum import Enum, IntEnum, auto


class FeedState(IntEnum):
    """Where a feed is; later states are greater."""

    READING = auto()
    """The source is read, and its frames go through the engine to the sinks."""
    STOPPING = auto()
    """No more frames are wanted; the source has not come back from its last read yet."""
    DRAINING = auto()
    """The source is done; the frames that were read go through the engine to the sinks."""
    WRITING = auto()
    """The engine is done; the frames that it gave back go to the sinks."""
    CLOSING = auto()
    """Nothing more is written; the sinks are closed, one after the other."""
    CLOSED = auto()
    """Every sink is closed."""

    def after(self, event: FeedEvent) -> FeedState:
        """The state that follows. Raises RuntimeError where ``event`` cannot happen: a defect."""
        state = TRANSITIONS.get((self, event))
        if state is None:
            raise RuntimeError(f"{event.name} cannot happen to a feed that is {self.name}")
        return state


class FeedEvent(Enum):
    """What happens to a feed. The last four are said by whoever does that part, however it ends."""

    STOP = auto()
    """No more frames are wanted, and those on their way are: the run was stopped."""
    READER_DONE = auto()
    """The source has ended, failed, or was given up."""
    ENGINE_DONE = auto()
    """All frames are segmented, or ``max_frames`` are; or the engine failed or was given up."""
    WRITER_DONE = auto()
    """All frames are written; or a sink failed, was given up, or has had enough; or the run was
    interrupted twice."""
    SINKS_CLOSED = auto()
    """The last sink has been closed, or was given up."""


def _table() -> dict[tuple[FeedState, FeedEvent], FeedState]:
    reading, stopping, draining, writing, closing, closed = FeedState
    rows = {
        # STOP, READER_DONE, ENGINE_DONE, WRITER_DONE, SINKS_CLOSED; None: it cannot happen
        reading: (stopping, draining, writing, closing, None),
        stopping: (stopping, draining, writing, closing, None),
        draining: (draining, draining, writing, closing, None),
        writing: (writing, writing, writing, closing, None),
        closing: (closing, closing, closing, closing, closed),
        closed: (closed, closed, closed, closed, closed),
    }
    return {
        (state, event): follows
        for state, row in rows.items()
        for event, follows in zip(FeedEvent, row, strict=True)
        if follows is not None
    }


TRANSITIONS = _table()
"""The state that follows each event; a pair that is missing cannot happen. What comes late changes
nothing: a source, an engine or a sink may come back when all is closed."""
