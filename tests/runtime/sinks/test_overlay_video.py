"""The overlay video beyond H.264 in MP4: MKV, HEVC, live sources, chosen classes, kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import fakes
import numpy as np
import pytest
from numpy.typing import NDArray

import knet_runtime
from knet_runtime.drawing import legend_strip, text_scale
from knet_runtime.errors import ConfigError, OutputError
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks import Look, MaskFolder, OverlayImage, OverlayVideo
from knet_runtime.sinks.encoder import ENCODERS, Codec, add_stream, video_frame, working_encoder
from knet_runtime.sources.base import SourceInfo
from knet_runtime.types import Frame
from knet_synthetic import CAMVID11

HW = (96, 128)
VIDEO = SourceInfo("video", HW, Fraction(25), None, Fraction(1, 90_000))
LIVE = SourceInfo("stream", HW, Fraction(25), None, Fraction(1, 90_000))
FORMATS: list[tuple[str, Codec]] = [
    ("mp4", "h264"),
    ("mkv", "h264"),
    ("mp4", "hevc"),
    ("mkv", "hevc"),
]


def skip_without(codec: Codec) -> None:
    try:
        working_encoder(ENCODERS[codec], HW)
    except OutputError as error:
        pytest.skip(str(error))


def a_frame(
    index: int, pts: Fraction | None, hw: tuple[int, int] = HW
) -> tuple[Frame, Segmentation]:
    small = np.random.default_rng(index).integers(60, 200, (6, 8, 3), np.uint8)
    image = np.asarray(cv2.resize(small, hw[::-1], interpolation=cv2.INTER_CUBIC), np.uint8)
    return fakes.a_frame(index, pts, image=image)


def read(path: Path) -> tuple[list[float], list[NDArray[np.uint8]]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    images = [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in frames]
    return [frame.time or 0.0 for frame in frames], images


@pytest.mark.parametrize(("suffix", "codec"), FORMATS)
def test_each_format_holds_the_blend_and_the_times(
    tmp_path: Path, suffix: str, codec: Codec
) -> None:
    skip_without(codec)
    path = tmp_path / f"o.{suffix}"
    sink = OverlayVideo(path, VIDEO, codec=codec)
    times = [0.0, 0.04, 0.05, 2.0, 2.04, 7.5]  # gaps stay gaps
    pairs = [a_frame(i, Fraction(round(90_000 * time), 90_000)) for i, time in enumerate(times)]
    for frame, mask in pairs:
        sink.write(frame, mask)
    sink.close()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    seen, images = read(path)
    assert seen == pytest.approx(times, abs=0.0011 if suffix == "mkv" else 1e-6)
    for (frame, mask), image in zip(pairs, images, strict=True):
        expected = mask.overlay(frame.image).astype(int)
        assert np.abs(image - expected).mean() < 4
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == codec
        assert stream.codec_context.max_b_frames == 0
        if (suffix, codec) == ("mp4", "hevc"):
            assert stream.codec_context.codec_tag == "hvc1"


@pytest.mark.parametrize(("suffix", "codec"), FORMATS)
def test_odd_sizes_and_sizes_that_change(tmp_path: Path, suffix: str, codec: Codec) -> None:
    skip_without(codec)
    path = tmp_path / f"o.{suffix}"
    sink = OverlayVideo(path, replace(VIDEO, hw=(95, 127)), Look(legend=True), codec=codec)
    for index, hw in enumerate([(95, 127), (48, 200), (33, 31), (95, 127)]):
        sink.write(*a_frame(index, Fraction(index, 25), hw))
    sink.close()
    height = 95 + legend_strip(CAMVID11, 127, scale=text_scale((95, 127))).shape[0]
    _, images = read(path)
    assert len(images) == 4
    assert {image.shape for image in images} == {(height + height % 2, 128, 3)}
    assert images[1][:25].max() < 24  # black above what is wide


@pytest.mark.parametrize("info", [LIVE, replace(VIDEO, frames=1_000_000)])
def test_an_mp4_without_a_near_end_stays_in_fragments(tmp_path: Path, info: SourceInfo) -> None:
    times = [0.0, 0.04, 2.0, 2.04, 7.5, 7.54]  # gaps stay gaps
    for name, source in (("long.mp4", info), ("short.mp4", VIDEO)):
        sink = OverlayVideo(tmp_path / name, source)
        for index, seconds in enumerate(times):
            sink.write(*a_frame(index, Fraction(round(90_000 * seconds), 90_000)))
        sink.close()
        read_times, images = read(tmp_path / name)
        assert read_times == pytest.approx(times, abs=1 / 90_000)
        assert len(images) == len(times)
    # An ordinary file ends with its index, and an index with the sizes of all frames.
    ends = [(tmp_path / name).read_bytes()[-4096:] for name in ("long.mp4", "short.mp4")]
    assert [b"stsz" in end for end in ends] == [False, True]


def test_mkv_times_closer_than_its_tick_stay_apart(tmp_path: Path) -> None:
    sink = OverlayVideo(tmp_path / "o.mkv", VIDEO)
    for index in range(6):
        sink.write(*a_frame(index, Fraction(index, 5000)))
    sink.close()
    times, _ = read(tmp_path / "o.mkv")
    assert times == sorted(set(times))
    assert len(times) == 6


def test_live_video_comes_out_frame_by_frame_with_a_key_frame_each_second(tmp_path: Path) -> None:
    sink = OverlayVideo(tmp_path / "o.mp4", LIVE)
    for index in range(60):
        sink.write(*a_frame(0, Fraction(index, 25)))
    sink.close()
    with av.open(str(tmp_path / "o.mp4")) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    assert [round(float(p.pts * p.time_base), 3) for p in packets if p.is_keyframe] == [0, 1, 2]
    assert [p.pts for p in packets] == [p.dts for p in packets]


def test_a_stale_frame_is_marked_and_shown_at_its_own_time(tmp_path: Path) -> None:
    sink = OverlayVideo(tmp_path / "o.mp4", LIVE)
    frame, mask = a_frame(0, Fraction(0))
    sink.write(frame, mask)
    for _ in range(2):
        time.sleep(0.15)  # stale frames come by the clock
        sink.write(replace(frame, stale=True), mask)
    sink.write(*a_frame(1, Fraction(2)))
    sink.close()
    times, images = read(tmp_path / "o.mp4")
    assert times[0] == 0
    assert 0.14 < times[1] < times[2] < 2
    assert times[3] == 2
    red = [bool((p[:4, 2:40].mean((0, 1)) @ [1, -1, -1]) > 100) for p in images]
    assert red == [False, True, True, False]
    assert sink.retimed == 0


def test_a_stale_mask_is_not_written_again(tmp_path: Path) -> None:
    sink = MaskFolder(tmp_path / "masks")
    frame, mask = a_frame(0, None)
    sink.write(frame, mask)
    other = Segmentation(np.full(HW, 5, np.uint8), CAMVID11, {})
    sink.write(replace(frame, stale=True), other)
    sink.close()
    written = cv2.imread(str(tmp_path / "masks/000000.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(written, mask.class_map)


def test_only_the_chosen_classes_are_drawn_and_listed(tmp_path: Path) -> None:
    frame, mask = a_frame(0, None)
    sink = OverlayImage(tmp_path / "o.png", Look(classes=("road",), legend=True))
    sink.write(frame, mask)
    sink.close()
    image = cv2.cvtColor(cv2.imread(str(tmp_path / "o.png")), cv2.COLOR_BGR2RGB)
    np.testing.assert_array_equal(image[:48], frame.image[:48])
    # Of the border between the two only what lies in the drawn class.
    np.testing.assert_array_equal(image[:96], mask.overlay(frame.image, classes=[3]))
    assert (image[48:96] != frame.image[48:]).any(2).all()
    strip = legend_strip(CAMVID11, 128, mask.shares(), (3,), text_scale((96, 128)))
    np.testing.assert_array_equal(image[96:], strip)
    assert strip.shape[0] < legend_strip(CAMVID11, 128, scale=text_scale((96, 128))).shape[0]


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"end in \.mp4 or \.mkv"):
        OverlayVideo(tmp_path / "o.avi", VIDEO)
    with pytest.raises(ConfigError, match="use h264 or hevc"):
        OverlayVideo(tmp_path / "o.mp4", VIDEO, codec="av1")  # type: ignore[arg-type]
    sink = OverlayVideo(tmp_path / "o.mp4", VIDEO, Look(classes=("bus",)))
    with pytest.raises(ConfigError, match="no class 'bus'; this model's are Sky"):
        sink.write(*a_frame(0, None))
    sink.close()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from fractions import Fraction
from pathlib import Path
import numpy as np
from knet_runtime.types import Frame
from knet_runtime.sources.base import SourceInfo
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks import OverlayVideo
info = SourceInfo("video", (96, 128), Fraction(5), None, Fraction(1, 5))
mask = Segmentation(np.zeros((96, 128), np.uint8), LabelMap(("Road",), ((9, 9, 9),), 255), {})
random = np.random.default_rng(0)
sink = OverlayVideo(sys.argv[1], info, codec=sys.argv[2])
for i in range(200):
    image = random.integers(0, 256, (96, 128, 3), np.uint8)
    sink.write(Frame(image, i, Fraction(i, 5), str(i)), mask)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("suffix", "codec"), FORMATS[1:])
def test_a_killed_process_leaves_what_plays(tmp_path: Path, suffix: str, codec: Codec) -> None:
    skip_without(codec)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / f"o.{suffix}"), codec],
        env={**os.environ, "PYTHONPATH": str(Path(knet_runtime.__file__).parent.parent)},
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with av.open(f"file:{left}", format="matroska" if suffix == "mkv" else "mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) >= 100


@pytest.mark.parametrize(("suffix", "codec"), FORMATS)
@pytest.mark.parametrize("aspect", [Fraction(16, 11), Fraction(10, 11), Fraction(1)])
def test_pixels_are_shown_as_wide_as_the_sources(
    tmp_path: Path, suffix: str, codec: Codec, aspect: Fraction
) -> None:
    skip_without(codec)
    path = tmp_path / f"o.{suffix}"
    sink = OverlayVideo(path, replace(VIDEO, sample_aspect=aspect), Look(legend=True), codec=codec)
    for index in range(3):
        sink.write(*a_frame(index, Fraction(index, 25)))
    sink.close()
    with av.open(str(path)) as container:
        assert container.streams.video[0].sample_aspect_ratio == aspect
        assert next(container.decode(video=0)).width == HW[1]


def test_a_push_has_the_pixels_of_its_source(tmp_path: Path) -> None:
    path = tmp_path / "pushed.h264"  # a push has no container either
    with av.open(str(path), "w") as container:
        tick, rate = Fraction(1, 90_000), Fraction(25)
        stream = add_stream(
            container, "libx264", HW, tick, rate, live=True, aspect=Fraction(16, 11)
        )
        image = a_frame(0, None)[0].image
        container.mux(stream.encode(video_frame(image, 0, tick)))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(16, 11)
