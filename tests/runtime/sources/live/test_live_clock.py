"""What live sources count with: a line of times, the pace of playlists, waits, shown addresses."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from knet_runtime.errors import ConfigError
from knet_runtime.sources.base import Backoff, SourceOptions
from knet_runtime.sources.container import redacted, scheme_of
from knet_runtime.sources.live import PlaylistClock, Timeline

TICK = Fraction(1, 90_000)


def test_distances_within_a_connection_are_the_streams_own() -> None:
    line = Timeline(TICK)
    times = [Fraction(5 + i, 30) for i in range(4)]
    assert [line.place(t, 100 + 0.01 * i) for i, t in enumerate(times)] == [
        Fraction(i, 30) for i in range(4)
    ]


def test_after_a_reconnect_the_line_goes_on_by_the_time_that_passed() -> None:
    line = Timeline(Fraction(1, 30))
    line.place(Fraction(1000), 50)
    line.reconnected()
    assert line.place(Fraction(3), 57.5) == Fraction(15, 2)
    assert line.place(Fraction(3) + Fraction(1, 30), 57.5) == Fraction(15, 2) + Fraction(1, 30)


@pytest.mark.parametrize("jump", [-100_000, -1, 10, 100_000])
def test_a_clock_of_the_stream_that_jumps_is_not_followed(jump: int) -> None:
    line = Timeline(TICK)
    line.place(Fraction(0), 0)
    line.place(Fraction(1), 1)
    assert line.place(Fraction(2 + jump), 2) == 2
    assert line.place(Fraction(3 + jump), 3) == 3


@given(
    steps=st.lists(
        st.tuples(st.none() | st.fractions(-1000, 1000), st.floats(0, 100), st.booleans()),
        min_size=1,
    ),
    tick=st.sampled_from([TICK, Fraction(1, 1000), Fraction(1, 15), Fraction(1001, 30_000)]),
)
def test_times_always_rise_in_whole_ticks(
    steps: list[tuple[Fraction | None, float, bool]], tick: Fraction
) -> None:
    line = Timeline(tick)
    now, placed = 0.0, []
    for time, passed, reconnected in steps:
        now += passed
        if reconnected:
            line.reconnected()
        placed.append(line.place(time, now))
    assert placed[0] == 0
    assert all((time / tick).denominator == 1 for time in placed)
    assert placed == sorted(set(placed))
    assert placed[-1] <= Fraction(now) + len(steps) * (2 + tick)


def test_a_playlists_frames_are_due_at_their_own_distances() -> None:
    pace = PlaylistClock()
    assert pace.wait(Fraction(10), now=0) == 0
    assert pace.wait(Fraction(21, 2), now=0.1) == pytest.approx(0.4)
    assert pace.wait(Fraction(11), now=7) == 0  # late: the next ones count from it
    assert pace.wait(Fraction(12), now=7.5) == pytest.approx(0.5)
    assert pace.wait(Fraction(500), now=8) == 0  # a gap is not waited for
    assert pace.wait(None, now=8) == 0


def test_waits_double_up_to_five_seconds_and_begin_again_after_a_good_time() -> None:
    backoff = Backoff()
    for longest in (0.25, 0.5, 1, 2, 4, 5, 5, 5):
        assert longest / 2 <= backoff.delay() <= longest
    backoff.lasted(1)
    assert backoff.delay() >= 2.5
    backoff.lasted(6)
    assert backoff.delay() <= 0.25
    assert len({Backoff().delay() for _ in range(10)}) > 1


def test_refused_credentials_are_not_tried_fast() -> None:
    assert Backoff().delay(refused=True) >= 30


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://me:secret@host:554/live", "rtsp://***@host:554/live"),
        ("rtsp://me:sec/r?e#t@@host/live", "rtsp://***@host/live"),
        ("RTSP://host/live", "RTSP://host/live"),
        ("rtsp:/me:secret@host/live", "rtsp:/***@host/live"),
        ("http://host/a.m3u8?token=secret", "http://host/a.m3u8?***"),
        ("https://host/a#secret", "https://host/a?***"),
        ("http://me:secret@host?key=secret", "http://***@host?***"),
        ("/videos/me@home.mp4", "/videos/me@home.mp4"),
        ("C:/videos/a?.mp4", "C:/videos/a?.mp4"),
    ],
)
def test_what_is_secret_in_an_address_is_not_shown(address: str, shown: str) -> None:
    assert redacted(address) == shown
    assert "secret" not in shown


def test_schemes_are_told_from_paths() -> None:
    assert scheme_of("RTSP://host") == "rtsp"
    assert scheme_of("C:/video.mp4") is None
    assert scheme_of("a:b.mp4") is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"every": 0}, "every is 0"),
        ({"start": -1.0}, "start is -1"),
        ({"end": float("nan")}, "end is nan"),
        ({"start": 5.0, "end": 5.0}, r"end \(5 s\) is not after start \(5 s\)"),
        ({"read_timeout": 0.0}, "read_timeout is 0"),
        ({"max_downtime": float("inf")}, "max_downtime is inf"),
        ({"transport": "pigeon"}, "RTSP goes over tcp or udp"),
    ],
)
def test_options_that_can_not_be_are_refused_by_name(
    options: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        SourceOptions(**options)  # type: ignore[arg-type]
