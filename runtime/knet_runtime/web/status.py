"""The state of a run as the page, /metrics and /healthz tell it, with the machine's sensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from knet_runtime.counts import Totals
from knet_runtime.pipeline.stats import FeedSnapshot, RunSnapshot, StageSnapshot
from knet_runtime.web.streams import Latest


class Sensors(msgspec.Struct, frozen=True):
    """Degrees Celsius by thermal zone, and the fastest core's clock and its ceiling in Hz.

    What cannot be read is absent: an empty dict, None.
    """

    temperatures: dict[str, float]
    clock: float | None
    clock_limit: float | None


def read_sensors(system: Path = Path("/sys")) -> Sensors:
    """Read the sensors under ``system``; never raises."""
    temperatures: dict[str, float] = {}
    for zone in sorted((system / "class/thermal").glob("thermal_zone*")):
        value = _number(zone / "temp")
        # Zones that are switched off answer with nonsense, such as -256 degrees or 0.
        if value is not None and 0 < value < 200_000:
            name = _text(zone / "type") or zone.name
            if name in temperatures:
                name = f"{name} {zone.name.removeprefix('thermal_zone')}"
            temperatures[name] = value / 1000
    clocks = (_fastest(system, name) for name in ("scaling_cur_freq", "cpuinfo_max_freq"))
    return Sensors(temperatures, *clocks)


def _fastest(system: Path, name: str) -> float | None:
    files = (system / "devices/system/cpu").glob(f"cpu[0-9]*/cpufreq/{name}")
    values = [value for file in files if (value := _number(file)) is not None]
    return 1000 * max(values) if values else None  # from kHz


def _number(file: Path) -> float | None:
    try:
        return float(_text(file))
    except ValueError:
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


State = Literal["waiting", "running", "stale", "disconnected", "ended", "failed"]

STALE_SECONDS = 3.0
"""A live feed without a new frame for so long is stale, even if the run itself has not said so:
it may hang."""

STUCK_SECONDS = 10.0
"""A feed that finished no frame for so long is stale, whatever its source: the decoder, the engine
or an output hangs. Where frames usually take longer, twice what one takes."""

_NOTHING = FeedSnapshot(0, 0, 0, 0, connected=True, last_frame_age=None, stages={})
"""What there is to tell of a feed whose run has not begun."""


class FeedStatus(msgspec.Struct, frozen=True):
    """One feed: counts since the start, the age of its last new frame in seconds, milliseconds
    by stage, and what was counted in its zones (None without any)."""

    name: str
    state: State
    frames: int
    dropped: int
    stale_frames: int
    reconnects: int
    age: float | None
    stages: dict[str, StageSnapshot]
    totals: Totals | None


class RunStatus(msgspec.Struct, frozen=True):
    """All feeds at one moment; ``time`` in seconds since the epoch, ``seconds`` since the page was
    there."""

    time: float
    seconds: float
    viewers: int
    machine: Sensors
    feeds: list[FeedStatus]

    @property
    def healthy(self) -> bool:
        """Whether every feed gives new frames, or has ended while others still run."""
        states = {feed.state for feed in self.feeds}
        return "running" in states and states <= {"running", "ended"}


def _state(feed: FeedSnapshot, latest: Latest) -> State:
    """One word for whether the frames of a feed are now."""
    shot = latest.shot
    if latest.outcome is not None:
        return latest.outcome
    if not feed.connected:
        return "disconnected"
    if shot is None:
        return "waiting"
    live = shot.frame.wall is not None
    patience = max(STALE_SECONDS, 2 * feed.period)
    late = live and feed.last_frame_age is not None and feed.last_frame_age > patience
    since = time.time() - shot.at if feed.since_written is None else feed.since_written
    stuck = since > _stuck_after(feed)  # the first frame may be shown here and not be finished
    return "stale" if shot.frame.stale or late or stuck else "running"


def _stuck_after(feed: FeedSnapshot) -> float:
    usual = sum(feed.stages[stage].p95 for stage in ("read", "latency") if stage in feed.stages)
    return max(STUCK_SECONDS, 2 * usual / 1000, 2 * feed.period)


def read_run_status(
    snapshot: RunSnapshot, latest: Mapping[str, Latest], viewers: int, seconds: float
) -> RunStatus:
    """What there is to tell of the feeds in ``latest``, by name, at this moment."""
    feeds = []
    for name, slot in latest.items():
        feed = snapshot.feeds.get(name, _NOTHING)
        counts = feed.frames, feed.dropped, feed.stale_frames, feed.reconnects
        state = _state(feed, slot)
        counted = None if slot.shot is None else slot.shot.result.counts
        totals = None if counted is None else counted.totals
        feeds.append(FeedStatus(name, state, *counts, feed.last_frame_age, feed.stages, totals))
    return RunStatus(time.time(), seconds, viewers, read_sensors(), feeds)


_COUNTERS = (  # by the name of the count in ``FeedStatus``
    ("frames", "knet_frames", "Frames segmented and written."),
    ("dropped", "knet_frames_dropped", "Frames of a live source that were skipped."),
    ("stale_frames", "knet_frames_stale", "Times an old frame was shown again."),
    ("reconnects", "knet_reconnects", "Times a live source was connected to again."),
)


def registry(read: Callable[[], RunStatus]) -> CollectorRegistry:
    """A registry that reads the numbers each time it is scraped."""
    collected = CollectorRegistry(auto_describe=False)
    collected.register(_Collector(read))
    return collected


@dataclass(frozen=True)
class _Collector:
    read: Callable[[], RunStatus]

    def collect(self) -> Iterator[Metric]:
        numbers = self.read()
        yield from _feeds(numbers.feeds)
        yield from _counted(numbers.feeds)
        yield GaugeMetricFamily("knet_viewers", "Open streams of the page.", numbers.viewers)
        machine = numbers.machine
        if machine.temperatures:
            name, text = "knet_temperature_celsius", "By thermal zone."
            warmth = GaugeMetricFamily(name, text, labels=["zone"])
            for zone, value in machine.temperatures.items():
                warmth.add_metric([zone], value)
            yield warmth
        if machine.clock is not None:
            yield GaugeMetricFamily("knet_clock_hertz", "The fastest core.", machine.clock)


def _feeds(feeds: list[FeedStatus]) -> Iterator[Metric]:
    for count, name, help_text in _COUNTERS:
        counter = CounterMetricFamily(name, help_text, labels=["feed"])
        for feed in feeds:
            counter.add_metric([feed.name], getattr(feed, count))
        yield counter
    state = GaugeMetricFamily("knet_state", "1 for the feed's state.", labels=["feed", "state"])
    age = GaugeMetricFamily("knet_frame_age_seconds", "Since the last new frame.", labels=["feed"])
    stage = GaugeMetricFamily(
        "knet_stage_seconds",
        "Time per frame, over the last 1,000.",
        labels=["feed", "stage", "quantile"],
    )
    for feed in feeds:
        for name in get_args(State):
            state.add_metric([feed.name, name], feed.state == name)
        if feed.age is not None:
            age.add_metric([feed.name], feed.age)
        for name, times in feed.stages.items():
            for quantile, value in (("0.5", times.p50), ("0.95", times.p95), ("0.99", times.p99)):
                stage.add_metric([feed.name, name, quantile], value / 1000)
    yield from (state, age, stage)


def _counted(feeds: list[FeedStatus]) -> Iterator[Metric]:
    """What was counted in zones and at lines, where anything is."""
    totals = [(feed.name, feed.totals) for feed in feeds if feed.totals is not None]
    if not totals:
        return
    zone = ["feed", "zone", "class"]
    present = GaugeMetricFamily("knet_zone_present", "Objects in a zone now.", labels=zone)
    entered = CounterMetricFamily("knet_zone_entered", "Objects that entered it.", labels=zone)
    left = CounterMetricFamily("knet_zone_left", "Objects that left it.", labels=zone)
    crossed = CounterMetricFamily(
        "knet_line_crossed",
        "Crossings of a line to a side of it.",
        labels=["feed", "line", "class", "direction"],
    )
    for feed, counted in totals:
        for name, classes in counted.zones.items():
            for label, count in classes.items():
                present.add_metric([feed, name, label], count.present)
                entered.add_metric([feed, name, label], count.entered)
                left.add_metric([feed, name, label], count.left)
        for name, ways in counted.lines.items():
            for label, way in ways.items():
                crossed.add_metric([feed, name, label, "to_left"], way.to_left)
                crossed.add_metric([feed, name, label, "to_right"], way.to_right)
    yield from (present, entered, left, crossed)
