"""A recording of ROS 1 or ROS 2 as a source of frames: the images of one topic.

The package ``rosbags`` (extra ``ros``) reads the containers, compressed or not; no ROS is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knet_runtime.errors import ConfigError, KnetError, SourceError, first_line
from knet_runtime.sources.base import SourceInfo, SourceOptions, SourceStatus
from knet_runtime.sources.files import open_regular
from knet_runtime.sources.images import BAG_SUFFIXES
from knet_runtime.sources.ros_images import read_ros_image
from knet_runtime.types import Closeable, Frame, RosHeader

if TYPE_CHECKING:
    from rosbags.interfaces import TopicInfo
    from rosbags.rosbag1 import Reader as Reader1
    from rosbags.rosbag2 import Reader as Reader2

_log = logging.getLogger(__name__)

ROS1_SUFFIX = ".bag"
METADATA = "metadata.yaml"

SECOND = 10**9
"""In nanoseconds, which ROS counts in."""

_TICK = Fraction(1, SECOND)
_IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
_MOST_TOPICS = 20
# What rosbags says of recordings that were not closed, and what puts them right.
_REPAIRS = {
    "is not indexed": "was not closed when it was recorded; rosbag reindex repairs it",
    "end magic is invalid": "was not closed when it was recorded; mcap recover repairs it",
    "Profile is not ros2": "is no MCAP file of ROS 2; convert it with mcap convert",
}


def is_bag(path: Path) -> bool:
    """Whether this is to be read as a recording: by its suffix, or a folder of ROS 2."""
    if path.suffix.lower() in BAG_SUFFIXES and not path.is_dir():
        return True
    try:
        return "rosbag2_bagfile_information" in (path / METADATA).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def need_rosbags(name: str) -> None:
    """Raise ConfigError unless the package is installed; ``name`` is what it is for."""
    try:
        import rosbags.rosbag2  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'{name}: recordings of ROS need the ros extra: pip install "knet-deploy[ros]"'
        ) from error


class BagSource(Closeable):
    """Frames from the images of one topic of a recording; a context manager.

    ``path`` is a ROS 1 bag, an MCAP or SQLite file of ROS 2, or ROS 2's folder of them.
    ``options.topic`` names the topic; without it there must be one topic of images. They come in
    the order of recording, each with its message's header (``Frame.ros``). ``pts`` counts from the
    first one by the headers' stamps, or by the times of recording where they are zero; where the
    clock goes back by more than a second the times go on, and a warning is logged.

    Raises ConfigError without the extra ``ros``, and SourceError, naming the recording and what to
    do, when it cannot be read or the topic is not clear; while iterating where it is damaged.
    """

    status = SourceStatus()

    def __init__(self, path: Path, options: SourceOptions | None = None) -> None:
        need_rosbags(str(path))
        from rosbags.rosbag1 import Reader as Reader1
        from rosbags.rosbag2 import Reader as Reader2
        from rosbags.typesys import Stores, get_typestore

        self._path = path
        self._options = options or SourceOptions()
        self._stopped = False
        self._ros1 = path.suffix.lower() == ROS1_SUFFIX and not path.is_dir()
        if not path.is_dir():
            open_regular(path, "a recording").close()
        with self._explained():
            # These two types are the same in every release; those of other topics are not needed.
            self._types = get_typestore(Stores.ROS1_NOETIC if self._ros1 else Stores.ROS2_HUMBLE)
            reader: Reader1 | Reader2 = Reader1(path) if self._ros1 else Reader2(path)
            reader.open()
        self._reader: Reader1 | Reader2 | None = reader
        try:
            with self._explained():
                topics = reader.topics
            self._topic = self._chosen(topics)
            self._connections = [
                one for one in topics[self._topic].connections if one.msgtype in _IMAGE_TYPES
            ]
            self._frames: Iterator[Frame] = self._read()
            first = next(self._frames, None)
            if first is None:
                raise SourceError(
                    f"{path}: {self._topic} has no image in this part; choose another start and end"
                )
            self._frames = chain([first], self._frames)
        except BaseException:
            self.close()
            raise
        part = self._options.start is not None or self._options.end is not None
        count = None if part else -(-topics[self._topic].msgcount // self._options.every)
        hw = first.image.shape[:2]
        self.info = SourceInfo("bag", hw, None, count, _TICK, path, topic=self._topic)

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def stop(self) -> None:
        """End the iteration, from any thread."""
        self._stopped = True

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        reader, self._reader = self._reader, None
        self._frames = iter(())
        if reader is not None:
            reader.close()

    def _chosen(self, topics: dict[str, TopicInfo]) -> str:
        """The topic to read. Raises SourceError, with those that there are."""
        wanted = self._options.topic
        images = {
            name: info
            for name, info in topics.items()
            if any(one.msgtype in _IMAGE_TYPES for one in info.connections) and info.msgcount
        }
        if wanted is not None:
            for name in (wanted, f"/{wanted}"):
                if name in images:
                    return name
            if (found := topics.get(wanted)) is not None:
                what = "no messages" if not found.msgcount else f"no images but {found.msgtype}"
                problem = f"{wanted} holds {what}"
            else:
                problem = f"has no topic {wanted}"
        else:
            # A camera's depth is not what is segmented.
            seen = [name for name in images if not name.endswith("/compressedDepth")]
            if len(seen) == 1:
                return seen[0]
            problem = f"has {len(seen) or 'no'} topics of images"
        listed = ", ".join(
            f"{name} ({info.msgtype}, {info.msgcount})"
            for name, info in [*(images or topics).items()][:_MOST_TOPICS]
        )
        fix = "choose one with --topic" if images else "record one of a camera"
        raise SourceError(f"{self._path}: {problem}; {fix}; there are: {listed or 'none'}")

    def _read(self) -> Iterator[Frame]:
        """The frames; what was read before a damage has been handed on."""
        options, clock, number, index = self._options, _Clock(str(self._path)), 0, 0
        messages = self._messages()
        for place, (logged, message) in enumerate(messages):
            stamp = message.header.stamp.sec * SECOND + message.header.stamp.nanosec
            pts = clock.place(stamp or logged)
            if self._stopped or (options.end is not None and float(pts) >= options.end):
                return
            if options.start is not None and float(pts) < options.start:
                continue
            if number % options.every == 0:
                image = read_ros_image(message, f"{self._path}: image {place} of {self._topic}")
                header = RosHeader(stamp, message.header.frame_id, logged)
                yield Frame(image, index, pts, f"{index:06d}", ros=header)
                index += 1
            number += 1

    def _messages(self) -> Iterator[tuple[int, Any]]:
        """When each message was recorded, and what it says."""
        assert self._reader is not None
        types = self._types
        parse = types.deserialize_ros1 if self._ros1 else types.deserialize_cdr
        with self._explained():
            for connection, logged, data in self._reader.messages(self._connections):
                yield logged, parse(data, connection.msgtype)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What a parser of files from anywhere may raise becomes a SourceError."""
        try:
            yield
        except KnetError:
            raise
        except Exception as error:
            text = first_line(error).rstrip(".")
            for said, repair in _REPAIRS.items():
                if said in text:
                    raise SourceError(f"{self._path}: {repair}") from error
            raise SourceError(f"{self._path}: is damaged ({text}); copy it again") from error


class _Clock:
    """Puts stamps (nanoseconds) on one line that rises from 0."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._start: int | None = None
        self._last = -1
        self._step = SECOND // 30

    def place(self, stamp: int) -> Fraction:
        """The time of the next frame in seconds."""
        if self._start is None:
            self._start = stamp
        time = stamp - self._start
        if time <= self._last:
            back = self._last - time
            if back > SECOND:
                _log.warning(
                    "%s: its clock goes back by %.1f s at %.1f s; times go on",
                    *(self._name, back / SECOND, self._last / SECOND),
                )
                time = self._last + self._step
                self._start = stamp - time
            else:
                time = self._last + 1
        elif self._last >= 0:
            self._step = time - self._last
        self._last = time
        return time * _TICK
