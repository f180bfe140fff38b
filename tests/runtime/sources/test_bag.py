"""Recordings of ROS as sources: every storage and encoding, topics, times, and broken ones."""

from __future__ import annotations

import logging
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import ros_bags
from numbered import number_of, numbered
from ros_bags import SECOND, START, BagWriter, Kind, record

from knet_runtime.errors import ConfigError, SourceError
from knet_runtime.sources import open_source
from knet_runtime.sources.base import SourceOptions
from knet_runtime.types import Frame, Rgb

STAMPS = [START + index * SECOND // 10 + index for index in range(8)]
STORED: list[tuple[Kind, str | None]] = [
    *(("bag", None), ("bag", "lz4"), ("bag", "bz2")),
    *(("mcap", None), ("mcap", "storage"), ("mcap", "message"), ("mcap", "file")),
    *(("db3", None), ("db3", "message"), ("db3", "file")),
]


def frames_of(path: Path, **options: Any) -> list[Frame]:
    with open_source(path, SourceOptions(**options)) as source:
        return list(source)


def place_of(folder: Path, kind: Kind) -> Path:
    return folder / ("drive.bag" if kind == "bag" else "drive")


@pytest.mark.parametrize(("kind", "compression"), STORED)
def test_every_storage_gives_all_images_with_their_headers(
    tmp_path: Path, kind: Kind, compression: str | None
) -> None:
    path = place_of(tmp_path, kind)
    record(path, kind, STAMPS, compression)
    with open_source(path) as source:
        info = source.info
        assert (info.kind, info.hw, info.frames, info.live) == ("bag", (24, 32), 8, False)
        assert (info.topic, info.path) == ("/camera/image_raw", path)
        frames = list(source)
    assert [number_of(frame.image) for frame in frames] == list(range(8))
    assert [frame.name for frame in frames] == [f"{index:06d}" for index in range(8)]
    assert [frame.pts for frame in frames] == [Fraction(t - START, SECOND) for t in STAMPS]
    headers = [frame.ros for frame in frames]
    assert all(header is not None for header in headers)
    assert [(h.stamp, h.frame_id, h.logged) for h in headers if h] == [
        (stamp, "camera", stamp + 1000) for stamp in STAMPS
    ]
    np.testing.assert_array_equal(frames[3].image, numbered(3))


@pytest.mark.parametrize("kind", ["mcap", "db3"])
def test_a_file_of_a_folder_is_read_alone(tmp_path: Path, kind: Kind) -> None:
    record(tmp_path / "drive", kind, STAMPS)
    (file,) = (tmp_path / "drive").glob(f"*.{kind}")
    assert len(frames_of(file)) == 8
    (tmp_path / "drive" / "metadata.yaml").unlink()  # as of a recording that was killed
    with pytest.raises(SourceError, match=rf"name the recording in it: .*drive\.{kind}"):
        open_source(tmp_path / "drive")


def test_a_part_and_each_nth_image_are_taken(tmp_path: Path) -> None:
    record(tmp_path / "drive", "mcap", [START + index * SECOND // 10 for index in range(30)])
    frames = frames_of(tmp_path / "drive", start=1.0, end=2.0, every=4)
    assert [number_of(frame.image) for frame in frames] == [10, 14, 18]
    assert [frame.pts for frame in frames] == [1, Fraction(7, 5), Fraction(9, 5)]
    assert [frame.index for frame in frames] == [0, 1, 2]
    with pytest.raises(SourceError, match="no image in this part"):
        frames_of(tmp_path / "drive", start=9.0)


# A colour for each pixel of 4×6, so that a swapped channel, row or column shows.
COLOURS = np.random.default_rng(3).integers(0, 256, (4, 6, 3)).astype(np.uint8)
ALPHA = np.full((4, 6, 1), 9, np.uint8)
DEEP = COLOURS.astype(np.uint16) * 257 + np.arange(6, dtype=np.uint16)[None, :, None] - 3
GREY = COLOURS[..., 1]


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize(
    ("encoding", "sent", "expected"),
    [
        ("rgb8", COLOURS, COLOURS),
        ("bgr8", COLOURS[..., ::-1], COLOURS),
        ("rgba8", np.concatenate([COLOURS, ALPHA], 2), COLOURS),
        ("bgra8", np.concatenate([COLOURS[..., ::-1], ALPHA], 2), COLOURS),
        ("mono8", GREY, np.stack([GREY] * 3, 2)),
        ("mono16", DEEP[..., 1], np.round(np.stack([DEEP[..., 1]] * 3, 2) / 257)),
        ("rgb16", DEEP, np.round(DEEP / 257)),
        ("bgr16", DEEP[..., ::-1], np.round(DEEP / 257)),
        ("8UC1", GREY, np.stack([GREY] * 3, 2)),
        ("8UC3", COLOURS[..., ::-1], COLOURS),
    ],
)
def test_encodings_are_exact(
    tmp_path: Path, encoding: str, sent: Any, expected: Any, padding: int, big: bool
) -> None:
    with BagWriter(tmp_path / "drive", "mcap") as bag:
        bag.image("/image", START, np.ascontiguousarray(sent), encoding, padding=padding, big=big)
    (frame,) = frames_of(tmp_path / "drive")
    np.testing.assert_array_equal(frame.image, np.asarray(expected).astype(np.uint8))
    assert frame.image.flags.c_contiguous
    assert frame.image.flags.writeable


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_patterns_have_the_colours_of_their_names(
    tmp_path: Path, pattern: str, deep: bool
) -> None:
    """What a sensor with this pattern sees of one colour is that colour all over."""
    colour = {"r": 200, "g": 120, "b": 30}
    tile = np.array([colour[letter] for letter in pattern], np.uint8).reshape(2, 2)
    mosaic = np.tile(tile, (8, 8)).astype(np.uint16 if deep else np.uint8)
    encoding = f"bayer_{pattern}{16 if deep else 8}"
    with BagWriter(tmp_path / "drive", "mcap") as bag:
        bag.image("/image", START, mosaic * (257 if deep else 1), encoding)
    (frame,) = frames_of(tmp_path / "drive")
    np.testing.assert_array_equal(frame.image[2:-2, 2:-2], np.full((12, 12, 3), [200, 120, 30]))


@pytest.mark.parametrize(
    ("encoding", "order"),
    [("yuv422", "uyvy"), ("uyvy", "uyvy"), ("yuv422_yuy2", "yuyv"), ("yuyv", "yuyv")],
)
def test_yuv_pairs_are_in_the_order_of_their_names(
    tmp_path: Path, encoding: str, order: str
) -> None:
    sent = {"y": 81, "u": 90, "v": 240}  # BT.601's red
    pair = np.array([sent[letter] for letter in order], np.uint8).reshape(1, 2, 2)
    with BagWriter(tmp_path / "drive", "mcap") as bag:
        bag.image("/image", START, np.tile(pair, (4, 3, 1)), encoding, padding=4)
    (frame,) = frames_of(tmp_path / "drive")
    assert frame.image.shape == (4, 6, 3)
    assert np.abs(frame.image.astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_compressed_images_are_decoded(tmp_path: Path, kind: str) -> None:
    smooth: Rgb = np.full((24, 32, 3), (200, 120, 30), np.uint8)
    with BagWriter(tmp_path / "drive.bag", "bag", "lz4") as bag:
        for index in range(3):
            bag.compressed("/camera/image_raw/compressed", STAMPS[index], smooth, kind)
    frames = frames_of(tmp_path / "drive.bag")
    assert [frame.ros.stamp for frame in frames if frame.ros] == STAMPS[:3]
    assert np.abs(frames[0].image.astype(int) - smooth).max() <= (3 if kind == "jpeg" else 0)


def test_the_topic_is_chosen_or_asked_for(tmp_path: Path) -> None:
    with BagWriter(tmp_path / "drive", "mcap") as bag:
        for index, stamp in enumerate(STAMPS[:3]):
            bag.image("/left", stamp, numbered(index))
            bag.image("/right", stamp, numbered(index + 100))
            bag.text("/chatter", stamp, "hello")
    with pytest.raises(SourceError) as caught:
        open_source(tmp_path / "drive")
    assert str(caught.value).endswith(
        "has 2 topics of images; choose one with --topic; there are: "
        "/left (sensor_msgs/msg/Image, 3), /right (sensor_msgs/msg/Image, 3)"
    )
    for topic in ("/right", "right"):
        frames = frames_of(tmp_path / "drive", topic=topic)
        assert [number_of(frame.image) for frame in frames] == [100, 101, 102]
    with pytest.raises(SourceError, match=r"no topic /centre; .* /left .*, /right "):
        open_source(tmp_path / "drive", SourceOptions(topic="/centre"))
    with pytest.raises(SourceError, match="/chatter holds no images but std_msgs/msg/String"):
        open_source(tmp_path / "drive", SourceOptions(topic="/chatter"))


def test_a_recording_without_images_says_what_it_has(tmp_path: Path) -> None:
    with BagWriter(tmp_path / "drive.bag", "bag") as bag:
        bag.text("/chatter", START, "hello")
    with pytest.raises(SourceError, match=r"has no topics of images; .*/chatter \(std_msgs"):
        open_source(tmp_path / "drive.bag")


def test_topics_are_of_recordings_only(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), numbered(0))
    with pytest.raises(ConfigError, match="--topic is of recordings of ROS"):
        open_source(tmp_path / "a.png", SourceOptions(topic="/image"))


def test_stamps_of_zero_are_replaced_by_the_times_of_recording(tmp_path: Path) -> None:
    with BagWriter(tmp_path / "drive", "db3") as bag:
        for index in range(3):
            bag.image("/image", 0, numbered(index), logged=START + index * SECOND)
    frames = frames_of(tmp_path / "drive")
    assert [frame.pts for frame in frames] == [0, 1, 2]
    assert [frame.ros.stamp for frame in frames if frame.ros] == [0, 0, 0]


def test_times_rise_whatever_the_clock_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two images of one moment, two in the wrong order, and a clock that begins anew."""
    seconds = [0, 1, 1, 3, 2.5, 5, 1, 2]
    with BagWriter(tmp_path / "drive", "mcap") as bag:
        for index, second in enumerate(seconds):
            stamp = START + round(second * SECOND)
            bag.image("/image", stamp, numbered(index), logged=START + index * SECOND)
    with caplog.at_level(logging.WARNING):
        frames = frames_of(tmp_path / "drive")
    tick = Fraction(1, SECOND)
    step = 2 - tick
    times = [0, 1, 1 + tick, 3, 3 + tick, 5, 5 + step, 5 + step + 1]
    assert [frame.pts for frame in frames] == times
    assert [frame.ros.stamp for frame in frames if frame.ros] == [
        START + round(second * SECOND) for second in seconds
    ]
    (said,) = [entry.getMessage() for entry in caplog.records]
    assert said.endswith("its clock goes back by 4.0 s at 5.0 s; times go on")


def _cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def test_broken_recordings_are_refused_by_name(tmp_path: Path) -> None:
    record(tmp_path / "drive", "mcap", STAMPS)
    file = tmp_path / "drive" / "drive.mcap"
    _cut(file, 0.7)
    with pytest.raises(SourceError, match=r"drive\.mcap: was not closed .* mcap recover"):
        open_source(file)
    record(tmp_path / "drive.bag", "bag", STAMPS)
    _cut(tmp_path / "drive.bag", 0.7)
    with pytest.raises(SourceError, match=r"drive\.bag: is damaged \(.*\); copy it again"):
        open_source(tmp_path / "drive.bag")
    for name, data in (("a.bag", b"no bag"), ("a.mcap", b"no bag"), ("a.db3", b"no bag" * 200)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SourceError, match=rf"{name}: is damaged"):
            open_source(tmp_path / name)
    (tmp_path / "empty.bag").write_bytes(b"")
    with pytest.raises(SourceError, match=r"empty\.bag: is empty"):
        open_source(tmp_path / "empty.bag")
    with pytest.raises(SourceError, match=r"gone\.mcap: No such file"):
        open_source(tmp_path / "gone.mcap")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "metadata.yaml").write_text("rosbag2_bagfile_information: [1\n")
    with pytest.raises(SourceError, match="folder: is damaged"):
        open_source(tmp_path / "folder")


def test_what_was_read_before_a_damage_stays(tmp_path: Path) -> None:
    """A byte flips in a chunk of bz2, whose checksum does not hold any more."""
    with BagWriter(tmp_path / "drive.bag", "bag", "bz2") as bag:
        for stamp in STAMPS:
            bag.image("/image", stamp, np.full((700, 800, 3), stamp % 251, np.uint8))
    data = bytearray((tmp_path / "drive.bag").read_bytes())
    chunks = [found.start() for found in re.finditer(b"BZh9", data)]
    data[chunks[len(chunks) // 2] + 20] ^= 255
    (tmp_path / "drive.bag").write_bytes(data)
    got: list[Frame] = []
    with (
        open_source(tmp_path / "drive.bag") as source,
        pytest.raises(SourceError, match=r"drive\.bag: is damaged"),
    ):
        got.extend(iter(source))
    assert 1 <= len(got) < 8


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"encoding": "32FC1"}, "has the encoding '32FC1', which is not read"),
        ({"height": 0}, "states a size of 0×32"),
        ({"height": 60_000, "width": 60_000}, "states a size of"),
        ({"step": 8}, "too few for 24×32 rgb8"),
        ({"height": 25}, "too few for 25×32 rgb8"),
        ({"encoding": "yuyv", "width": 31}, "24×31 is no size of yuyv"),
    ],
)
def test_an_image_that_cannot_be_is_refused_by_its_place(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with BagWriter(tmp_path / "drive", "mcap") as bag:
        bag.image("/image", START, numbered(0))
        fields: dict[str, Any] = {
            "header": bag.header(START + SECOND),
            **{"height": 24, "width": 32, "step": 96, "encoding": "rgb8", "is_bigendian": 0},
            "data": numbered(1).reshape(-1),
        }
        bag.write("/image", ros_bags.IMAGE, START + SECOND, **fields | changes)
    with (
        pytest.raises(SourceError, match=f"image 1 of /image: .*{text}"),
        open_source(tmp_path / "drive") as source,
    ):
        list(source)


def test_without_rosbags_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.mcap").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "rosbags.rosbag2", None)
    with pytest.raises(ConfigError, match=r'pip install "knet-deploy\[ros\]"'):
        open_source(tmp_path / "a.mcap")
