"""The run loop around a fake segmenter: order, timing, and how sinks are closed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from fakes import Frames, Recorder, entries, raises, segment_one
from numpy.typing import NDArray
from waiting import wait_until

from knet_runtime.errors import OutputError, SourceError
from knet_runtime.pipeline import Feed, RunSummary, SegmentCall, run as run_feeds
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks import JsonLines, Look, MaskFolder, OverlayVideo, Sink
from knet_runtime.sources import open_source
from knet_runtime.sources.base import Source
from knet_runtime.types import Frame


def run(
    source: Source, segmenter: SegmentCall, sinks: Sequence[Sink], **options: Any
) -> RunSummary:
    return run_feeds([Feed(source, sinks)], segmenter, **options)


def test_a_run_feeds_every_sink_in_order_and_closes_it_once() -> None:
    one, two, seen = Recorder("one"), Recorder("two"), []
    source = Frames(5)
    summary = run(source, segment_one, [one, two], on_frame=lambda f, m: seen.append(f.index))
    assert one.frames == two.frames == seen == [0, 1, 2, 3, 4]
    assert one.closed == two.closed == [True]
    assert source.closed == 0
    assert summary.frames == 5
    assert summary.fps == pytest.approx(5 / summary.seconds)
    stages = ["read", "queue", "preprocess", "infer", "postprocess", "write", "latency"]
    assert list(summary.stages) == stages
    assert (summary.stages["infer"].p50, summary.stages["infer"].p95) == (4.0, 4.0)
    assert summary.stages["read"].p50 >= 0


def test_a_run_stops_after_max_frames_and_reads_no_further() -> None:
    sink = Recorder()
    source = Frames(2, error=SourceError("beyond"))
    assert run(source, segment_one, [sink], max_frames=2).frames == 2
    assert sink.closed == [True]


def test_a_run_without_frames_is_no_error() -> None:
    summary = run(Frames(0), segment_one, [])
    assert (summary.frames, summary.fps, summary.stages) == (0, 0.0, {})


@pytest.mark.parametrize(
    ("error", "complete"),
    [
        (SourceError("cut.mp4: is damaged"), False),
        (RuntimeError("a bug"), False),
        (SystemExit(3), False),
        (KeyboardInterrupt(), True),
    ],
)
def test_sinks_are_closed_and_the_error_goes_on(error: BaseException, complete: bool) -> None:
    one, two = Recorder("one"), Recorder("two")
    with pytest.raises(type(error)) as caught:
        run(Frames(3, error=error), segment_one, [one, two])
    assert caught.value is error
    assert one.frames == [0, 1, 2]
    assert one.closed == two.closed == [complete]


def test_an_error_of_the_segmenter_or_the_callback_closes_as_partial() -> None:
    def broken(image: NDArray[np.uint8]) -> Segmentation:
        raise RuntimeError("engine")

    def callback(frame: Frame, mask: Segmentation) -> None:
        raise RuntimeError("callback")

    for segmenter, on_frame in ((broken, None), (segment_one, callback)):
        sink = Recorder()
        with pytest.raises(RuntimeError, match=r"engine|callback"):
            run(Frames(3), segmenter, [sink], on_frame=on_frame)
        assert sink.closed == [False]


def test_a_sink_that_can_not_write_keeps_no_other_from_being_closed() -> None:
    sinks = [
        Recorder("one"),
        Recorder("two", on_write=raises(OSError(28, "No space left"))),
        Recorder("three"),
    ]
    with pytest.raises(OutputError, match="two: No space left; free some space"):
        run(Frames(3), segment_one, sinks)
    assert [sink.closed for sink in sinks] == [[False]] * 3
    assert [sink.frames for sink in sinks] == [[0], [], []]


@pytest.mark.parametrize("failure", [OSError(28, "No space left"), RuntimeError("odd")])
def test_the_first_sink_that_can_not_close_is_raised_and_the_rest_logged(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = [
        Recorder("one", on_close=raises(failure)),
        Recorder("two", on_close=raises(OutputError("two: lost"))),
        Recorder("three"),
    ]
    with caplog.at_level(logging.ERROR), pytest.raises(OutputError, match="one: "):
        run(Frames(2), segment_one, sinks)
    assert [sink.closed for sink in sinks] == [[True]] * 3
    assert "two: lost" in caplog.text


def test_the_source_error_goes_before_that_of_a_sink(caplog: pytest.LogCaptureFixture) -> None:
    sinks = [Recorder(on_close=raises(OutputError("lost")))]
    with caplog.at_level(logging.ERROR), pytest.raises(SourceError):
        run(Frames(2, error=SourceError("damaged")), segment_one, sinks)
    assert "lost" in caplog.text


def test_a_second_interrupt_while_closing_still_closes_the_others() -> None:
    sinks = [Recorder("one", on_close=raises(KeyboardInterrupt())), Recorder("two")]
    with pytest.raises(KeyboardInterrupt):
        run(Frames(2, error=KeyboardInterrupt()), segment_one, sinks)
    assert [sink.closed for sink in sinks] == [[True]] * 2


def write_images(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for index in range(count):
        assert cv2.imwrite(str(folder / f"im{index}.png"), np.full((10, 14, 3), index, np.uint8))
    return folder


def test_writing_over_the_source_or_twice_into_one_place_is_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for name in (folder, folder / "im0.png"):
        with open_source(name) as source, pytest.raises(OutputError, match="choose another place"):
            run(source, segment_one, [MaskFolder(folder)])
    clip = tmp_path / "clip.mp4"
    with open_source(folder) as source:
        run(source, segment_one, [OverlayVideo(clip, source.info)])
    data = clip.read_bytes()
    with open_source(clip) as source, pytest.raises(OutputError, match=r"clip\.mp4: is read from"):
        run(source, segment_one, [OverlayVideo(tmp_path / "images/../clip.mp4", source.info)])
    same = [JsonLines(tmp_path / "o.jsonl", "m"), JsonLines(tmp_path / "o.jsonl", "m")]
    with open_source(folder) as source, pytest.raises(OutputError, match="another output"):
        run(source, segment_one, same)
    assert clip.read_bytes() == data
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "images"]


@pytest.mark.parametrize("ending", ["end", "damage", "interrupt"])
def test_files_from_end_to_end_leave_no_thread_and_no_file_open(
    tmp_path: Path, ending: str
) -> None:
    place = write_images(tmp_path / "images", 12)
    if ending == "damage":
        (place / "im7.png").write_bytes(b"")
    else:
        with open_source(place) as source:
            run(source, segment_one, [OverlayVideo(tmp_path / "clip.mp4", source.info)])
        place = tmp_path / "clip.mp4"

    def interrupt(frame: Frame, mask: Segmentation) -> None:
        if ending == "interrupt" and frame.index == 5:
            raise KeyboardInterrupt

    threads, files = entries("/proc/self/task"), entries("/proc/self/fd")
    out = tmp_path / "out"
    expected: tuple[type[BaseException], ...] = (SourceError, KeyboardInterrupt)
    try:
        with open_source(place) as source:
            sinks: list[Sink] = [
                OverlayVideo(out / "o.mp4", source.info, Look(legend=True)),
                MaskFolder(out / "masks"),
                JsonLines(out / "o.jsonl", "m@1"),
            ]
            run(source, segment_one, sinks, on_frame=interrupt)
        assert ending == "end"
    except expected:
        assert ending != "end"
    assert entries("/proc/self/fd") == files
    wait_until(lambda: entries("/proc/self/task") <= threads, "all threads to end")
    partial = ".partial" if ending == "damage" else ""
    assert (out / f"o{partial}.mp4").is_file()
    assert (out / "masks/PARTIAL.txt").exists() == (ending == "damage")
    lines = (out / f"o{partial}.jsonl").read_text().splitlines()
    frames = {"end": 12, "interrupt": 6, "damage": 7}[ending]
    assert len(lines) == len(list((out / "masks").glob("*.png"))) == frames
    with open_source(out / f"o{partial}.mp4") as written:
        assert sum(1 for _ in written) == frames
