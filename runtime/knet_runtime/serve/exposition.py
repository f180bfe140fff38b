"""The numbers as Prometheus asks for them, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from knet_runtime.serve.numbers import FeedNumbers, Numbers

_COUNTERS: tuple[tuple[str, str, Callable[[FeedNumbers], int]], ...] = (
    ("knet_frames", "Frames segmented and written.", lambda feed: feed.frames),
    (
        "knet_frames_dropped",
        "Frames of a live source that were skipped.",
        lambda feed: feed.dropped,
    ),
    ("knet_frames_stale", "Times an old picture was shown again.", lambda feed: feed.stale_frames),
    (
        "knet_reconnects",
        "Times a live source was connected to again.",
        lambda feed: feed.reconnects,
    ),
)
_STATES = ("waiting", "running", "stale", "disconnected", "ended")


def registry(read: Callable[[], Numbers]) -> CollectorRegistry:
    """A registry that reads the numbers each time it is scraped."""
    collected = CollectorRegistry(auto_describe=False)
    collected.register(_Collector(read))
    return collected


class _Collector:
    def __init__(self, read: Callable[[], Numbers]) -> None:
        self._read = read

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        numbers = self._read()
        yield from _feeds(numbers.feeds)
        yield GaugeMetricFamily("knet_viewers", "Open streams of the page.", numbers.viewers)
        machine = numbers.machine
        if machine.temperatures:
            warmth = GaugeMetricFamily(
                "knet_temperature_celsius", "By thermal zone.", labels=["zone"]
            )
            for zone, value in machine.temperatures.items():
                warmth.add_metric([zone], value)
            yield warmth
        if machine.clock is not None:
            yield GaugeMetricFamily("knet_clock_hertz", "The fastest core.", machine.clock)


def _feeds(feeds: list[FeedNumbers]) -> Iterator[Metric]:
    for name, help_text, count in _COUNTERS:
        counter = CounterMetricFamily(name, help_text, labels=["feed"])
        for feed in feeds:
            counter.add_metric([feed.name], count(feed))
        yield counter
    state = GaugeMetricFamily("knet_state", "1 for the feed's state.", labels=["feed", "state"])
    age = GaugeMetricFamily(
        "knet_picture_age_seconds", "Since the last new picture.", labels=["feed"]
    )
    stage = GaugeMetricFamily(
        "knet_stage_seconds",
        "Time per frame, over the last 1,000.",
        labels=["feed", "stage", "quantile"],
    )
    for feed in feeds:
        for name in _STATES:
            state.add_metric([feed.name, name], feed.state == name)
        if feed.age is not None:
            age.add_metric([feed.name], feed.age)
        for name, times in feed.stages.items():
            for quantile, value in (("0.5", times.p50), ("0.95", times.p95), ("0.99", times.p99)):
                stage.add_metric([feed.name, name, quantile], value / 1000)
    yield from (state, age, stage)
