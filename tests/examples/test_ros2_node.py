"""examples/ros2_node.py against ROS's own definitions of its messages; rclpy itself is not here."""

from __future__ import annotations

import json
import runpy
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rosbags.typesys import Stores, get_typestore

from knet_runtime.bundle.store import Bundle

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ros2_node.py"
STORE = get_typestore(Stores.ROS2_HUMBLE)


def message_type(kind: str) -> type:
    """A class of messages as rclpy has them: fields have defaults, and there are no others."""
    fields = dict.fromkeys(name for name, _ in STORE.fielddefs[kind][1])

    class Message:
        __slots__ = tuple(fields)
        KIND = kind

        def __init__(self, **values: object) -> None:
            for name in fields:
                setattr(self, name, values.pop(name, None))
            assert not values, f"{kind} has no {', '.join(values)}"

    return Message


def round_trip(message: Any) -> Any:
    """The message as another node gets it: serialised as the definition says, and read again."""
    fields = {name: getattr(message, name) for name in message.__slots__}
    if isinstance(fields["data"], array):
        assert fields["data"].typecode == "B"
        fields["data"] = np.frombuffer(fields["data"], np.uint8)
    whole = STORE.types[message.KIND](**fields)
    return STORE.deserialize_cdr(STORE.serialize_cdr(whole, message.KIND), message.KIND)


class FakeNode:
    """What the example uses of rclpy's Node; it keeps what is published."""

    parameters: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, name: str) -> None:
        self.published: dict[str, list[Any]] = {}
        self.qualities: dict[str, Any] = {}
        self.subscribed: dict[str, Callable[[Any], None]] = {}
        self.errors: list[str] = []

    def declare_parameter(self, name: str, default: str) -> SimpleNamespace:
        return SimpleNamespace(value=self.parameters.get(name, default))

    def create_publisher(self, kind: Any, topic: str, quality: Any) -> SimpleNamespace:
        sent = self.published.setdefault(topic, [])
        self.qualities[topic] = quality

        def publish(message: Any) -> None:
            assert isinstance(message, kind)
            sent.append(round_trip(message))

        return SimpleNamespace(publish=publish, get_subscription_count=lambda: 1)

    def create_subscription(
        self, kind: Any, topic: str, callback: Callable[[Any], None], quality: Any
    ) -> None:
        self.subscribed[topic] = callback

    def get_logger(self) -> SimpleNamespace:
        return SimpleNamespace(error=lambda text, **_: self.errors.append(text))


@pytest.fixture
def node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> Iterator[Any]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    image, text = message_type("sensor_msgs/msg/Image"), message_type("std_msgs/msg/String")
    contents: dict[str, dict[str, object]] = {
        "rclpy": {},
        "rclpy.node": {"Node": FakeNode},
        "rclpy.qos": {
            "DurabilityPolicy": SimpleNamespace(TRANSIENT_LOCAL="transient local"),
            "QoSProfile": lambda **words: SimpleNamespace(**words),
            "qos_profile_sensor_data": SimpleNamespace(reliability="best effort"),
        },
        "sensor_msgs": {},
        "sensor_msgs.msg": {"Image": image},
        "std_msgs": {},
        "std_msgs.msg": {"String": text},
    }
    for name, names in contents.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(FakeNode, "parameters", {"bundle": str(make_bundle().path)})
    made = runpy.run_path(str(EXAMPLE))["SegmenterNode"]()
    yield made
    made.segment.close()


def sent(encoding: str, pixels: np.ndarray[Any, Any]) -> SimpleNamespace:
    """A message as rclpy hands it on: its data is an array of bytes."""
    time = STORE.types["builtin_interfaces/msg/Time"](17, 5)
    return SimpleNamespace(
        header=STORE.types["std_msgs/msg/Header"](stamp=time, frame_id="front"),
        height=pixels.shape[0],
        width=pixels.shape[1],
        encoding=encoding,
        is_bigendian=0,
        step=pixels.strides[0],
        data=array("B", pixels.tobytes()),
    )


def test_an_image_gives_a_class_map_and_an_overlay_with_its_header(node: Any) -> None:
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[..., 2] = 255  # blue, in the order of rgb8
    node.subscribed["image"](sent("rgb8", pixels))
    (mask,), (overlay,) = node.published["~/classes"], node.published["~/overlay"]
    for message in (mask, overlay):
        assert (message.header.stamp.sec, message.header.stamp.nanosec) == (17, 5)
        assert (message.header.frame_id, message.height, message.width) == ("front", 32, 48)
        assert len(message.data) == message.step * message.height
    assert (mask.encoding, set(mask.data.tolist())) == ("mono8", {2})
    assert overlay.encoding == "rgb8"
    assert overlay.data.reshape(32, 48, 3)[0, 0].tolist() == [0, 0, 255]


def test_labels_are_latched_and_say_what_the_indices_are(node: Any) -> None:
    (labels,) = node.published["~/labels"]
    assert json.loads(labels.data) == {"0": "red", "1": "green", "2": "blue"}
    assert node.qualities["~/labels"].durability == "transient local"


def test_an_image_that_cannot_be_read_is_logged_and_the_node_goes_on(node: Any) -> None:
    node.subscribed["image"](sent("32FC1", np.zeros((4, 4), np.float32)))
    assert "32FC1" in node.errors[0]
    assert node.published["~/classes"] == []
