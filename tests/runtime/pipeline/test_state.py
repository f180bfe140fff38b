"""A feed's states: no order of events leads back, leaves a sink open or closes it twice."""

from __future__ import annotations

from itertools import product

import pytest
from fakes import Frames, Recorder, pipeline_threads, segment_one
from hypothesis import given, settings, strategies as st

from knet_runtime.errors import OutputError, SourceError
from knet_runtime.pipeline import Feed, Pipeline
from knet_runtime.pipeline.feed import FeedEvent, FeedState

LEADS_TO = {
    FeedEvent.STOP: FeedState.STOPPING,
    FeedEvent.READER_DONE: FeedState.DRAINING,
    FeedEvent.ENGINE_DONE: FeedState.WRITING,
    FeedEvent.WRITER_DONE: FeedState.CLOSING,
    FeedEvent.SINKS_CLOSED: FeedState.CLOSED,
}


@pytest.mark.parametrize(("state", "event"), list(product(FeedState, FeedEvent)))
def test_every_event_leads_on_or_changes_nothing_or_is_refused(
    state: FeedState, event: FeedEvent
) -> None:
    # Sinks are closed by what comes after the last written frame, and by nothing else.
    if event is FeedEvent.SINKS_CLOSED and state < FeedState.CLOSING:
        with pytest.raises(RuntimeError, match=f"cannot happen to a feed that is {state.name}"):
            state.after(event)
    else:
        assert state.after(event) is max(state, LEADS_TO[event])


@given(st.lists(st.sampled_from(FeedEvent)))
def test_a_feed_never_goes_back_and_ends_closed_when_all_have_said_so(
    events: list[FeedEvent],
) -> None:
    state = FeedState.READING
    for event in [*events, *FeedEvent]:
        if event is not FeedEvent.SINKS_CLOSED or state >= FeedState.CLOSING:
            assert state.after(event) >= state
            state = state.after(event)
    assert state is FeedState.CLOSED


STEPS = st.tuples(
    st.integers(0, 2),  # the feed
    st.integers(0, 6),  # the frame at which it happens
    st.sampled_from([event for event in FeedEvent if event is not FeedEvent.SINKS_CLOSED]),
    st.sampled_from([None, SourceError("damaged"), OutputError("lost"), KeyboardInterrupt()]),
)


@given(
    st.lists(STEPS, max_size=6),
    st.sampled_from(["video", "stream"]),
    st.sampled_from([None, 1, 4]),
    st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_whatever_happens_in_whichever_order_each_sink_is_closed_once(
    steps: list[tuple[int, int, FeedEvent, BaseException | None]],
    kind: str,
    max_frames: int | None,
    close_fails: bool,
) -> None:
    """Events from elsewhere, as when a thread is given up or a run is interrupted, among those of
    the threads themselves."""

    def happens(feed: int, index: int) -> None:
        for which, at, event, error in steps:
            if (which, at) == (feed, index):
                pipeline._queues[feed].advance(event, error)
        if index == 8:
            pipeline.stop()

    def fail() -> None:
        if close_fails:
            raise OSError(28, "No space left")

    sinks = [[Recorder("one", on_close=fail), Recorder("two")] for _ in range(3)]
    sources = [
        Frames(9, lambda index, feed=feed: happens(feed, index), kind)  # type: ignore[misc, arg-type]
        for feed in range(3)
    ]
    feeds = [Feed(source, sinks[i], str(i)) for i, source in enumerate(sources)]
    pipeline = Pipeline(feeds, segment_one, max_frames=max_frames)
    pipeline.start()
    assert pipeline.drain() is None
    assert pipeline_threads() == []
    assert [queue.state for queue in pipeline._queues] == [FeedState.CLOSED] * 3
    for outputs in sinks:
        assert [len(sink.closed) for sink in outputs] == [1, 1]
        assert outputs[0].closed == outputs[1].closed
        assert outputs[0].frames == sorted(set(outputs[0].frames))
        if all(error is None or isinstance(error, KeyboardInterrupt) for *_, error in steps):
            assert outputs[0].closed == [True]
    injected = [error for *_, error in steps]
    assert all(e in injected or "No space left" in str(e) for e in pipeline._errors)
