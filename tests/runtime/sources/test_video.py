"""Videos and cameras as sources: timing, rotation, pixel formats, and damage."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from numpy.typing import NDArray

import knet_runtime.sources.container
from knet_runtime.errors import SourceError
from knet_runtime.sources import open_source

CORNERS = np.array([[[230, 20, 20], [20, 230, 20]], [[20, 20, 230], [230, 230, 20]]], np.uint8)


def four_colours(height: int, width: int) -> NDArray[np.uint8]:
    """Red, green / blue, yellow quarters: shows rotation, mirroring and channel order."""
    rows = np.arange(height) * 2 // height
    columns = np.arange(width) * 2 // width
    return np.ascontiguousarray(CORNERS[rows[:, None], columns[None, :]])


def corners(image: NDArray[np.uint8]) -> NDArray[np.int_]:
    """The four colours seen in an image, as [2, 2, 3]."""
    height, width = image.shape[:2]
    rows, columns = [height // 4, 3 * height // 4], [width // 4, 3 * width // 4]
    return image[np.ix_(rows, columns)].astype(np.int_)


def write_video(
    path: Path,
    times: Sequence[int] = range(0, 300, 30),
    size: tuple[int, int] = (48, 64),
    tick: Fraction = Fraction(1, 900),
    pixels: str = "yuv420p",
    codec: str = "libx264",
    format: str | None = None,
    movflags: str = "faststart",
    noise: bool = False,
    title: str = "",
    aspect: Fraction = Fraction(1),
) -> Path:
    """A small video with a frame at each of ``times`` (in ticks)."""
    options = {"movflags": movflags} if path.suffix == ".mp4" else {}
    random = np.random.default_rng(0)
    with av.open(str(path), "w", format=format, options=options) as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=30)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        stream.codec_context.time_base = tick
        stream.codec_context.gop_size = 10
        stream.codec_context.sample_aspect_ratio = aspect
        for time in times:
            image = random.integers(0, 256, (*size, 3), np.uint8) if noise else four_colours(*size)
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = time, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def turn_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Write (a b / c d) into the track header of an MP4, as a phone does for an upright video."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0
    for offset, value in ((0, a), (4, b), (12, c), (16, d)):
        data[at + offset : at + offset + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(data)


def read_until_error(path: Path) -> tuple[int, str]:
    """How many frames come out, and the text of the SourceError after them ("" for none)."""
    count = 0
    try:
        with open_source(path) as source:
            for _ in source:
                count += 1
    except SourceError as error:
        return count, str(error)
    return count, ""


def test_frames_are_rgb_of_their_own_with_names_and_times(tmp_path: Path) -> None:
    with open_source(write_video(tmp_path / "a.mp4")) as source:
        assert source.info.kind == "video"
        assert source.info.hw == (48, 64)
        assert source.info.path == tmp_path / "a.mp4"
        frames = list(source)
    assert [frame.index for frame in frames] == list(range(10))
    assert frames[3].name == "000003"
    assert [frame.pts for frame in frames] == [Fraction(i, 30) for i in range(10)]
    for frame in frames:
        assert frame.image.dtype == np.uint8
        assert frame.image.flags.owndata
        assert frame.image.flags.c_contiguous
        assert np.abs(corners(frame.image) - CORNERS).max() < 25


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
def test_containers_that_state_no_frame_count_are_read_whole(tmp_path: Path, suffix: str) -> None:
    tick = Fraction(1, 30) if suffix == ".avi" else Fraction(1, 900)
    times = range(10) if suffix == ".avi" else range(0, 300, 30)
    assert read_until_error(write_video(tmp_path / f"a{suffix}", times, tick=tick)) == (10, "")


def test_a_variable_rate_is_kept_exactly(tmp_path: Path) -> None:
    times = [0, 1, 7, 8, 200, 201, 1999, 2000]
    path = write_video(tmp_path / "vfr.mp4", times, tick=Fraction(1, 1000))
    with open_source(path) as source:
        base = source.info.time_base
        assert base is not None
        seen = [frame.pts for frame in source]
    assert seen == [Fraction(time, 1000) for time in times]
    assert all(time is not None and (time / base).denominator == 1 for time in seen)


def test_times_count_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "late.ts", range(8_000_000, 8_030_000, 3003), tick=Fraction(1, 90_000)
    )
    with open_source(path) as source:
        seen = [frame.pts for frame in source]
    assert seen == [Fraction(3003 * i, 90_000) for i in range(10)]


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((0, 1, -1, 0), -1), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2), ((1, 0, 0, 1), 0)],
)
def test_rotation_metadata_is_applied(
    tmp_path: Path, matrix: tuple[int, int, int, int], turns: int
) -> None:
    path = write_video(tmp_path / "phone.mp4")
    turn_display_matrix(path, *matrix)
    with open_source(path) as source:
        assert source.info.hw == ((64, 48) if turns % 2 else (48, 64))
        image = next(iter(source)).image
    assert image.shape[:2] == source.info.hw
    assert image.flags.c_contiguous
    # x' = a·x + c·y, y' = b·x + d·y, y down: (0, 1, -1, 0) sends right to down, so clockwise.
    assert np.abs(corners(image) - np.rot90(CORNERS, turns)).max() < 25


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (Fraction(16, 11), Fraction(16, 11)),
        (Fraction(10, 11), Fraction(10, 11)),
        (Fraction(1485, 1357), Fraction(1485, 1357)),
        (Fraction(0), Fraction(1)),
        (Fraction(4000), Fraction(1)),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_the_shape_of_pixels_is_known_and_turns_with_them(
    tmp_path: Path, stated: Fraction, expected: Fraction, suffix: str
) -> None:
    path = write_video(tmp_path / f"a{suffix}", aspect=stated)
    with open_source(path) as source:
        assert source.info.sample_aspect == expected
        assert source.info.hw == (48, 64)
    if suffix == ".mp4":
        turn_display_matrix(path, 0, 1, -1, 0)
        with open_source(path) as source:
            assert source.info.sample_aspect == 1 / expected
            assert source.info.hw == (64, 48)


@pytest.mark.parametrize(
    ("pixels", "codec", "size"),
    [
        ("yuv420p10le", "libx264", (48, 64)),
        ("gray", "libx264", (48, 64)),
        ("yuv444p", "libx264", (35, 51)),
        ("yuvj420p", "mjpeg", (48, 64)),
        ("rgb24", "rawvideo", (17, 33)),
    ],
)
def test_pixel_formats_and_odd_sizes_become_rgb(
    tmp_path: Path, pixels: str, codec: str, size: tuple[int, int]
) -> None:
    path = write_video(tmp_path / "a.nut", size=size, pixels=pixels, codec=codec)
    with open_source(path) as source:
        assert source.info.hw == size
        image = next(iter(source)).image
    assert image.shape == (*size, 3)
    expected = CORNERS.astype(int)
    if pixels == "gray":
        expected = np.repeat((expected @ [0.299, 0.587, 0.114])[..., None], 3, axis=2)
        assert (image == image[..., :1]).all()
    assert np.abs(corners(image) - expected).max() < 25


def test_a_frame_that_changes_size_midway_comes_as_it_is(tmp_path: Path) -> None:
    small = write_video(tmp_path / "a.h264", size=(48, 64), format="h264").read_bytes()
    large = write_video(tmp_path / "b.h264", size=(32, 96), format="h264").read_bytes()
    path = tmp_path / "both.h264"
    path.write_bytes(small + large)
    with open_source(path) as source:
        shapes = [frame.image.shape[:2] for frame in source]
    assert shapes == [(48, 64)] * 10 + [(32, 96)] * 10


def test_foreign_metadata_and_odd_names_are_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "a:b 100%03d ü.mkv"
    data = write_video(tmp_path / "x.mkv", title="xxéyy").read_bytes()
    path.write_bytes(data.replace("xxéyy".encode(), b"xx\xe9zyy"))  # not UTF-8
    assert read_until_error(path) == (10, "")


def test_a_cut_file_yields_what_it_has_and_then_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_video(tmp_path / "cut.mp4", range(0, 1200, 30), noise=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    count, message = read_until_error(path)
    assert 10 < count < 40
    assert f"{path}: is damaged after {count} frames" in message
    assert "copy or export it again" in message
    assert capfd.readouterr() == ("", "")


def test_a_file_cut_between_two_packets_is_noticed_too(tmp_path: Path) -> None:
    path = write_video(tmp_path / "cut.mp4", range(0, 600, 30), noise=True)
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.pos]
    path.write_bytes(path.read_bytes()[: places[12]])
    count, message = read_until_error(path)
    assert 0 < count <= 12
    assert f"is damaged after {count} frames" in message


def test_a_hole_in_the_middle_costs_some_frames_and_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_video(tmp_path / "hole.mp4", range(0, 1200, 30), noise=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20_000] = bytes(20_000)
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        count, message = read_until_error(path)
    assert 25 < count < 40
    assert f"({count} could be read)" in message


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("text.mp4", b"hello world\n" * 50, "is not a video"),
        ("empty.mp4", b"", "is empty"),
        ("list.ffconcat", b"ffconcat version 1.0\nfile real.mp4\n", "playlists are not followed"),
        ("list.mp4", b"ffconcat version 1.0\nfile real.mp4\n", "playlists are not followed"),
        ("list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nreal.mp4\n", "convert it"),
        ("notes.txt", b"some notes\n" * 50, "convert it|is not a video"),
    ],
)
def test_what_is_no_video_is_refused_by_name_in_silence(
    tmp_path: Path, name: str, data: bytes, complaint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "real.mp4")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=f"{name}: .*{complaint}"):
        open_source(tmp_path / name)
    assert capfd.readouterr() == ("", "")


def test_a_recording_that_begins_between_key_frames_is_not_damaged(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.ts", range(0, 900, 30), noise=True)
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 5 // 188 * 188 :])
    count, message = read_until_error(path)
    assert message == ""
    assert 10 <= count < 30


def test_a_file_without_its_index_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "cut.mp4", movflags="0")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(SourceError, match="cut off before its index; copy"):
        open_source(path)


def test_sound_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44_100)
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(SourceError, match=r"sound.mp4: has no video in it; name a file"):
        open_source(path)


def test_a_cover_frame_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "cover.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=30)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuvj420p"
        stream.disposition = Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(four_colours(16, 16), "rgb24")
        container.mux(stream.encode(frame.reformat(format="yuvj420p")))
        container.mux(stream.encode(None))
    with pytest.raises(SourceError, match=r"cover.mp4: has no video in it"):
        open_source(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no.mp4: No such file or directory; check the name"):
        open_source(tmp_path / "no.mp4")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["odd.mp4", "odd.h264", "odd.ts"])
@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("fifo", "is not a regular file"),
        ("device", "is not a regular file"),
        ("loop", "Too many levels of symbolic links"),
        ("zeros", "begins with zeros"),
    ],
)
def test_what_is_no_regular_file_is_refused_at_once(
    tmp_path: Path, name: str, kind: str, complaint: str
) -> None:
    path = tmp_path / name
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
        case "zeros":
            with path.open("wb") as file:
                file.truncate(100 * 10**9)
    with pytest.raises(SourceError, match=rf"{name}: .*{complaint}") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", [".mkv", ".h264", ".avi"])
def test_a_file_that_was_never_written_to_its_end_gives_what_is_there(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knet_runtime.sources.container, "_FILE_PATIENCE", 1.0)
    tick = Fraction(1, 30) if suffix == ".avi" else Fraction(1, 900)
    times = range(20) if suffix == ".avi" else range(0, 600, 30)
    path = write_video(tmp_path / f"a{suffix}", times, tick=tick)
    os.truncate(path, 100 * 10**9)
    count, message = read_until_error(path)
    assert count == 20
    assert f"{path}: is damaged after 20 frames (20 could be read)" in message


def test_a_closed_source_has_no_more_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", range(0, 1800, 30))
    for _ in range(3):
        with open_source(path) as source:
            frames = iter(source)
            assert next(frames).index == 0
            assert next(frames).index == 1
        source.close()
        assert list(source) == []


def test_leaving_early_ends_even_with_a_pyav_log_level(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", range(0, 1800, 30), size=(96, 128), noise=True)
    program = (
        "import av, sys\n"
        "from knet_runtime.sources import open_source\n"
        "av.logging.set_level(av.logging.DEBUG)\n"
        "for round in range(10):\n"
        "    with open_source(sys.argv[1]) as source:\n"
        "        for frame in source:\n"
        "            if frame.index == round: break\n"
        "print('ended')\n"
    )
    import knet_runtime

    room = str(Path(knet_runtime.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env={**os.environ, "PYTHONPATH": room},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "ended\n"


def test_real_videos_are_read_with_rising_times(shared_data: Path) -> None:
    videos = sorted((shared_data / "videos").glob("*.mp4"))
    assert videos
    for path in videos:
        with open_source(path) as source:
            times = [frame.pts for frame, _ in zip(source, range(25), strict=False)]
        assert times == sorted(set(times), key=lambda time: time or Fraction(0))
