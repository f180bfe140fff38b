"""Recordings of ROS for tests: written with rosbags, in every storage that robots record in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numbered import numbered
from numpy.typing import NDArray
from rosbags import rosbag1, rosbag2
from rosbags.typesys import Stores, get_typestore

Kind = Literal["bag", "mcap", "db3"]
SECOND = 10**9
START = 1_700_000_000 * SECOND
IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"


class BagWriter:
    """A recording at ``path``: a .bag file, or a folder of ROS 2; a context manager.

    ``compression`` is "lz4" or "bz2" of ROS 1, "storage" (zstd) of MCAP, "message" or "file" (zstd)
    of both storages of ROS 2.
    """

    def __init__(self, path: Path, kind: Kind, compression: str | None = None) -> None:
        self._ros1 = kind == "bag"
        self._types = get_typestore(Stores.ROS1_NOETIC if self._ros1 else Stores.ROS2_HUMBLE)
        self._writer: Any
        if self._ros1:
            self._writer = rosbag1.Writer(path)
            if compression is not None:
                formats = rosbag1.Writer.CompressionFormat
                self._writer.set_compression(formats[compression.upper()])
        else:
            plugin = rosbag2.StoragePlugin.MCAP if kind == "mcap" else rosbag2.StoragePlugin.SQLITE3
            self._writer = rosbag2.Writer(path, version=8, storage_plugin=plugin)
            if compression is not None:
                mode = rosbag2.CompressionMode[compression.upper()]
                self._writer.set_compression(mode, rosbag2.CompressionFormat.ZSTD)
        self._writer.open()
        self._topics: dict[str, Any] = {}

    def __enter__(self) -> BagWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, topic: str, kind: str, logged: int, **fields: Any) -> None:
        """A message of these fields."""
        if topic not in self._topics:
            self._topics[topic] = self._writer.add_connection(topic, kind, typestore=self._types)
        message = self._types.types[kind](**fields)
        serialise = self._types.serialize_ros1 if self._ros1 else self._types.serialize_cdr
        self._writer.write(self._topics[topic], logged, serialise(message, kind))

    def header(self, stamp: int, frame_id: str = "camera") -> Any:
        """A message's header with this stamp in nanoseconds."""
        time = self._types.types["builtin_interfaces/msg/Time"](*divmod(stamp, SECOND))
        more = {"seq": 0} if self._ros1 else {}
        return self._types.types["std_msgs/msg/Header"](stamp=time, frame_id=frame_id, **more)

    def image(
        self,
        topic: str,
        stamp: int,
        pixels: NDArray[Any],
        encoding: str = "rgb8",
        *,
        logged: int | None = None,
        padding: int = 0,
        big: bool = False,
    ) -> None:
        """An Image of ``pixels`` [H, W] or [H, W, C], with ``padding`` bytes after each row."""
        order = ">" if big else "<"
        rows = pixels.astype(f"{order}u{pixels.itemsize}").reshape(len(pixels), -1).view(np.uint8)
        rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
        self.write(
            topic,
            IMAGE,
            stamp + 1000 if logged is None else logged,
            header=self.header(stamp),
            height=pixels.shape[0],
            width=pixels.shape[1],
            encoding=encoding,
            is_bigendian=int(big),
            step=rows.shape[1],
            data=np.ascontiguousarray(rows).reshape(-1),
        )

    def compressed(self, topic: str, stamp: int, pixels: NDArray[np.uint8], kind: str) -> None:
        """A CompressedImage of RGB ``pixels``; ``kind`` is "jpeg" or "png"."""
        done, data = cv2.imencode(f".{kind}", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
        assert done
        self.write(
            topic,
            COMPRESSED,
            stamp + 1000,
            header=self.header(stamp),
            format=f"rgb8; {kind} compressed bgr8",
            data=data.reshape(-1),
        )

    def text(self, topic: str, logged: int, text: str) -> None:
        """A String."""
        self.write(topic, "std_msgs/msg/String", logged, data=text)


def record(path: Path, kind: Kind, stamps: Iterable[int], compression: str | None = None) -> None:
    """A recording of numbered images on /camera/image_raw, and of texts beside them."""
    with BagWriter(path, kind, compression) as bag:
        for index, stamp in enumerate(stamps):
            bag.text("/chatter", stamp, f"hello {index}")
            bag.image("/camera/image_raw", stamp, numbered(index))
