"""Recordings of ROS as outputs: what is in them, when they appear, and what a failure leaves."""

from __future__ import annotations

import errno
import json
import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import psutil
import pytest
from numbered import number_of
from ros_bags import SECOND, START, BagWriter, record
from rosbags.highlevel import AnyReader
from rosbags.interfaces import ConnectionExtRosbag1, ConnectionExtRosbag2, QosDurability

from knet_runtime.errors import ConfigError, OutputError
from knet_runtime.labels import LabelMap
from knet_runtime.pipeline import Feed, run
from knet_runtime.privacy import Concealed, Concealer
from knet_runtime.segmentation import Instance, Segmentation
from knet_runtime.sinks import Look, RosBag
from knet_runtime.sinks.bag import _Recording
from knet_runtime.sources import open_source
from knet_runtime.sources.base import SourceInfo, SourceOptions
from knet_runtime.sources.images import decode_image
from knet_runtime.types import Frame, RosHeader

INFO = SourceInfo("bag", (48, 64), None, None, Fraction(1, SECOND), topic="/front/image_raw")
NAMES = ("o.mcap", "o.bag", "o")
THINGS = LabelMap(("road", "Füßgänger"), ((9, 8, 7), (1, 2, 3)), ignore_index=255, things=(1,))


def a_frame(index: int) -> tuple[Frame, Segmentation]:
    frame, result = fakes.a_frame(index)
    stamp = START + index * SECOND
    header = RosHeader(stamp + 7, "front", stamp + 1000)
    return Frame(frame.image, index, Fraction(index), frame.name, ros=header), result


def messages_of(path: Path) -> dict[str, list[tuple[int, Any]]]:
    """By topic: when each message was recorded, and what it says."""
    found: dict[str, list[tuple[int, Any]]] = {}
    with AnyReader([path]) as reader:
        for connection, logged, data in reader.messages():
            message = reader.deserialize(data, connection.msgtype)
            found.setdefault(connection.topic, []).append((logged, message))
    return found


def stamp_of(message: Any) -> int:
    return int(message.header.stamp.sec * SECOND + message.header.stamp.nanosec)


@pytest.mark.parametrize("name", NAMES)
def test_masks_overlay_and_labels_have_the_stamps_of_their_images(
    tmp_path: Path, name: str
) -> None:
    sink = RosBag(tmp_path / name, INFO, "m@1")
    pairs = [a_frame(index) for index in range(3)]
    for frame, result in pairs:
        sink.write(frame, result)
    sink.close()
    sink.close()
    assert sink.path == tmp_path / name
    assert [path.name for path in tmp_path.iterdir()] == [name]
    found = messages_of(tmp_path / name)
    classes, overlay, labels = (
        found[f"/front/segmentation/{topic}"]
        for topic in ("classes", "overlay/compressed", "labels")
    )
    assert len(found) == 3
    for (frame, result), (logged, mask), (_, painted) in zip(pairs, classes, overlay, strict=True):
        assert frame.ros is not None
        for message in (mask, painted):
            assert stamp_of(message) == frame.ros.stamp
            assert message.header.frame_id == "front"
        assert logged == frame.ros.logged
        assert (mask.encoding, mask.step, mask.is_bigendian) == ("mono8", 64, 0)
        np.testing.assert_array_equal(mask.data.reshape(48, 64), result.class_map)
        image = decode_image(painted.data.tobytes(), "overlay")
        differences = np.abs(image.astype(int) - result.overlay(frame.image))
        assert differences.max() <= 40  # at a line between regions: JPEG's colours are coarse
        assert np.quantile(differences, 0.9) <= 6
    ((logged, text),) = labels
    said = json.loads(text.data)
    assert (logged, said["task"], said["model"]) == (START + 1000, "semantic", "m@1")
    assert said["ignore"] == pairs[0][1].labels.ignore_index
    road = {"id": 3, "name": "Road", "color": [128, 64, 128], "thing": False}
    assert said["classes"][3] == road


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_latched(tmp_path: Path, name: str) -> None:
    sink = RosBag(tmp_path / name, INFO, "m@1")
    sink.write(*a_frame(0))
    sink.close()
    with AnyReader([tmp_path / name]) as reader:
        for connection in reader.connections:
            latched = connection.topic.endswith("/labels")
            if isinstance(connection.ext, ConnectionExtRosbag1):
                assert connection.ext.latching == latched
            else:
                assert isinstance(connection.ext, ConnectionExtRosbag2)
                durabilities = [one.durability for one in connection.ext.offered_qos_profiles]
                assert durabilities == [QosDurability.TRANSIENT_LOCAL] * latched


def test_objects_have_ids_and_lines_of_json(tmp_path: Path) -> None:
    person = Instance(1, 0.75, left=3, top=1, mask=np.ones((2, 4), np.bool_), track=5)
    result = Segmentation.from_instances([person], (48, 64), THINGS)
    sink = RosBag(tmp_path / "o.mcap", INFO, "m@1")
    sink.write(a_frame(0)[0], result)
    sink.write(a_frame(1)[0], Segmentation.from_instances([], (48, 64), THINGS))
    sink.close()
    found = messages_of(tmp_path / "o.mcap")
    (_, first), (_, second) = found["/front/segmentation/ids"]
    assert first.encoding == "mono16"
    np.testing.assert_array_equal(first.data.view("<u2").reshape(48, 64), result.segment_map)
    assert not second.data.any()
    lines = [json.loads(text.data) for _, text in found["/front/segmentation/segments"]]
    about = {"id": 1, "class": "Füßgänger", "score": 0.75, "area": 8, "box": [3, 1, 7, 3]}
    assert lines == [
        {"stamp": [START // SECOND, 7], "frame_id": "front", "segments": [about | {"track": 5}]},
        {"stamp": [START // SECOND + 1, 7], "frame_id": "front", "segments": []},
    ]
    labels = json.loads(found["/front/segmentation/labels"][0][1].data)
    assert [one["thing"] for one in labels["classes"]] == [False, True]


def test_more_than_256_classes_take_16_bits(tmp_path: Path) -> None:
    labels = LabelMap(tuple(f"c{n}" for n in range(300)), ((0, 0, 0),) * 300, ignore_index=65535)
    class_map = np.full((48, 64), 299, np.uint16)
    sink = RosBag(tmp_path / "o.bag", INFO, "m@1")
    sink.write(a_frame(0)[0], Segmentation(class_map, labels))
    sink.close()
    ((_, mask),) = messages_of(tmp_path / "o.bag")["/front/segmentation/classes"]
    assert (mask.encoding, mask.step) == ("mono16", 128)
    np.testing.assert_array_equal(mask.data.view("<u2").reshape(48, 64), class_map)


def test_frames_of_other_sources_get_stamps(tmp_path: Path) -> None:
    still = SourceInfo("video", (48, 64), Fraction(25), None)
    for name, walls in (("live", [START / SECOND, START / SECOND + 0.5]), ("file", [None, None])):
        sink = RosBag(tmp_path / f"{name}.mcap", still, "m@1")
        for index, wall in enumerate(walls):
            sink.write(*fakes.a_frame(index, Fraction(index, 2), wall=wall))
            sink.write(*fakes.a_frame(index, Fraction(index, 2), wall=wall, stale=True))
        sink.close()
        first, second = messages_of(tmp_path / f"{name}.mcap")["/segmentation/classes"]
        assert stamp_of(second[1]) - stamp_of(first[1]) == SECOND // 2
        assert stamp_of(first[1]) == first[0] >= START


def test_a_folder_has_the_storage_of_its_source(tmp_path: Path) -> None:
    record(tmp_path / "in", "db3", [START])
    with open_source(tmp_path / "in") as source:
        sink = RosBag(tmp_path / "out", source.info, "m@1")
        sink.write(*a_frame(0))
        sink.write(*a_frame(1))
        sink.close()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "metadata.yaml",
        "out.db3",
    ]
    assert len(messages_of(tmp_path / "out")["/camera/segmentation/classes"]) == 2
    sink = RosBag(tmp_path / "out", INFO, "m@1")  # one recording replaces another
    sink.write(*a_frame(0))
    assert len(messages_of(tmp_path / "out")["/camera/segmentation/classes"]) == 2
    sink.close()
    assert len(messages_of(tmp_path / "out")["/front/segmentation/classes"]) == 1
    (tmp_path / "photos").mkdir()
    with pytest.raises(OutputError, match="is there and is no recording"):
        RosBag(tmp_path / "photos", INFO, "m@1")


@pytest.mark.parametrize("name", NAMES)
def test_a_recording_that_is_not_complete_has_a_partial_name(tmp_path: Path, name: str) -> None:
    stem, dot, suffix = name.partition(".")
    if suffix:
        (tmp_path / name).write_bytes(b"that of another run, which stays")
    else:
        record(tmp_path / name, "mcap", [START])
    sink = RosBag(tmp_path / name, INFO, "m@1")
    sink.write(*a_frame(0))
    sink.close(complete=False)
    assert sink.path == tmp_path / f"{stem}.partial{dot}{suffix}"
    assert len(messages_of(sink.path)) == 3
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", NAMES)
def test_without_frames_nothing_is_left(tmp_path: Path, name: str) -> None:
    sink = RosBag(tmp_path / "deep" / name, INFO, "m@1")
    sink.close()
    assert sink.path is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_an_error_and_leaves_what_can_be_repaired(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = RosBag(tmp_path / name, INFO, "m@1")
    sink.write(*a_frame(0))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_Recording, "write", full)
    with pytest.raises(OutputError, match=rf"{name}: No space left on device; free some space"):
        sink.write(*a_frame(1))
    sink.close(complete=False)
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ([] if name == "o" else [name.replace(".", ".partial.")])
    assert sink.path == (tmp_path / left[0] if left else None)


@pytest.mark.skipif(os.name != "posix", reason="a folder cannot be locked there")
def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        sink = RosBag(tmp_path / "o.mcap", INFO, "m@1")
        sink.write(*a_frame(0))
        os._exit(9)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".o.mcap.")
    sink = RosBag(tmp_path / "o.mcap", INFO, "m@1")
    sink.write(*a_frame(0))
    sink.close()
    assert [path.name for path in tmp_path.iterdir()] == ["o.mcap"]


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"end in \.mcap or \.bag"):
        RosBag(tmp_path / "o.txt", INFO, "m@1")
    with pytest.raises(OutputError, match="/dev/null/o"):
        RosBag("/dev/null/o.mcap", INFO, "m@1")
    monkeypatch.setitem(sys.modules, "rosbags.rosbag2", None)
    with pytest.raises(ConfigError, match=r'pip install "knet-deploy\[ros\]"'):
        RosBag(tmp_path / "o.mcap", INFO, "m@1")
    assert list(tmp_path.iterdir()) == []


def test_a_recording_that_cannot_begin_leaves_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path / "o", "mcap", [START])
    sink = RosBag(tmp_path / "o", INFO, "m@1")
    failure = OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(_Recording, "write", fakes.raises(failure))
    with pytest.raises(OutputError, match="o: Input/output error"):
        sink.write(*a_frame(0))
    sink.close(complete=False)
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    assert len(messages_of(tmp_path / "o")["/chatter"]) == 1


def test_classes_that_the_model_does_not_have_are_named(tmp_path: Path) -> None:
    sink = RosBag(tmp_path / "o.bag", INFO, "m@1", Look(classes=("bus",)))
    with pytest.raises(ConfigError, match="no class 'bus'"):
        sink.write(*a_frame(0))
    sink.close(complete=False)


def test_a_concealed_recording_shows_nothing_of_what_is_hidden(tmp_path: Path) -> None:
    frame, result = a_frame(0)
    sink = Concealed(
        RosBag(tmp_path / "o.mcap", INFO, "m@1", Look(alpha=0)), Concealer(result.labels, ["Road"])
    )
    image = np.zeros((48, 64, 3), np.uint8)
    image[24:] = 255
    sink.write(Frame(image, 0, Fraction(0), "000000", ros=frame.ros), result)
    sink.close()
    found = messages_of(tmp_path / "o.mcap")
    ((_, painted),) = found["/front/segmentation/overlay/compressed"]
    assert stamp_of(painted) == START + 7
    assert decode_image(painted.data.tobytes(), "overlay").max() < 60


@pytest.mark.parametrize(("kind", "name"), [("bag", "o.mcap"), ("mcap", "o.bag"), ("db3", "o")])
def test_a_thousand_images_go_through_without_loss_or_drift(
    tmp_path: Path, kind: Any, name: str
) -> None:
    stamps = [START + index * SECOND // 30 + index % 7 for index in range(1000)]
    place = tmp_path / ("in.bag" if kind == "bag" else "in")
    record(place, kind, stamps, {"bag": "lz4", "mcap": "storage", "db3": None}[kind])
    with open_source(place) as source:
        sink = RosBag(tmp_path / name, source.info, "m@1", Look(alpha=0))
        summary = run([Feed(source, [sink])], fakes.segment_one)
    assert summary.frames == 1000
    for topic in ("classes", "overlay/compressed"):
        options = SourceOptions(topic=f"/camera/segmentation/{topic}")
        with open_source(tmp_path / name, options) as source:
            frames = list(source)
        assert [frame.ros.stamp for frame in frames if frame.ros] == stamps
        assert [frame.ros.logged for frame in frames if frame.ros] == [t + 1000 for t in stamps]
        if topic != "classes":
            assert [number_of(frame.image) for frame in frames] == list(range(1000))


@pytest.mark.parametrize(("kind", "name"), [("bag", "o.mcap"), ("mcap", "o.bag"), ("db3", "o")])
def test_memory_does_not_grow_with_a_recording(tmp_path: Path, kind: Any, name: str) -> None:
    process, drawn = psutil.Process(), np.random.default_rng(0)
    place = tmp_path / ("in.bag" if kind == "bag" else "in")
    with BagWriter(place, kind, {"bag": "lz4", "mcap": "storage", "db3": None}[kind]) as bag:
        for index in range(240):  # noise is as large packed: 55 MB
            noise = drawn.integers(0, 256, (240, 320, 3), np.uint8)
            bag.image("/camera/image_raw", START + index * SECOND // 30, noise)
    held = []
    with open_source(place) as source:
        sink = RosBag(tmp_path / name, source.info, "m@1")
        for frame in source:
            sink.write(frame, fakes.a_frame(frame.index, frame.pts, image=frame.image)[1])
            held.append(process.memory_info().rss)
        sink.close()
    held.append(process.memory_info().rss)
    assert len(held) == 241
    assert max(held[60:]) - held[60] < 12 << 20
