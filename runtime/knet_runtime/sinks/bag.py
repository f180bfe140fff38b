"""The sink that writes a recording of ROS 1 or ROS 2: class maps, overlays, labels and segments."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from knet_runtime.atomic import (
    AtomicFile,
    AtomicFolder,
    check_folder,
    free_partial_path,
    output_error,
    publish,
    sync,
)
from knet_runtime.drawing import encode_jpeg
from knet_runtime.errors import ConfigError, KnetError, OutputError
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks.json_lines import SegmentRecord, Stamp, segment_record
from knet_runtime.sinks.look import Look, OverlayPainter
from knet_runtime.sources.bag import METADATA, ROS1_SUFFIX, SECOND, need_rosbags
from knet_runtime.sources.base import SourceInfo
from knet_runtime.types import Frame, RosHeader

if TYPE_CHECKING:
    from rosbags import rosbag1, rosbag2
    from rosbags.interfaces import Connection, Qos

_QUALITY = 90  # of the overlay's JPEG
_IMAGE, _COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
_STRING = "std_msgs/msg/String"
_Kind = Literal["ros1", "mcap", "sqlite3"]


class _Class(msgspec.Struct, frozen=True):
    id: int
    name: str
    color: tuple[int, int, int]
    thing: bool


class BagLabels(msgspec.Struct, frozen=True):
    """The JSON of the topic ``labels``: what the values of the class maps mean. ``color`` is RGB;
    pixels of no class hold ``ignore``."""

    task: str
    model: str
    ignore: int
    classes: tuple[_Class, ...]


class BagSegments(msgspec.Struct, frozen=True):
    """The JSON of the topic ``segments``, one for each frame: its ``stamp`` as [seconds,
    nanoseconds], and what ``JsonLines`` writes of each segment."""

    stamp: Stamp
    frame_id: str
    segments: tuple[SegmentRecord, ...]


class RosBag:
    """Writes results as a recording of ROS to ``path``: NAME.mcap (ROS 2), NAME.bag (ROS 1), or
    NAME without a suffix, a folder as ``ros2 bag record`` makes it.

    The topics lie beside the images': of /camera/image_raw they are

        /camera/segmentation/classes             Image, mono8 (mono16 beyond 256 classes)
        /camera/segmentation/overlay/compressed  CompressedImage, JPEG
        /camera/segmentation/labels              String, latched: ``BagLabels``, once
        /camera/segmentation/ids                 Image, mono16: ``Segmentation.segment_map``
        /camera/segmentation/segments            String: ``BagSegments``

    the last two of instance and panoptic results. Each message has the stamp, the ``frame_id`` and
    the time of recording of its frame (``Frame.ros``). For frames of other sources the stamps are
    those of live frames' arrival, or else count from the start of the run by the frames' times; the
    topics are then /segmentation/…. Stale frames are left out.

    ``info`` is the source's, ``model`` the id of the model, ``look`` is the overlay's. An MCAP file
    is compressed by zstd, a ROS 1 bag by LZ4; a folder has its source's storage (SQLite or MCAP),
    MCAP by default.

    The recording has its name when it is closed. Raises ConfigError without the extra ``ros`` and
    for another suffix, OutputError when it cannot be written, or when a folder of that name is no
    recording.

        >>> from knet_deploy import RosBag, Segmenter, open_source
        >>> with open_source("drive.mp4") as source, Segmenter() as segment:
        ...     sink = RosBag("masks.mcap", source.info, segment.model_id)
        ...     for frame in source:
        ...         sink.write(frame, segment(frame.image))
        ...     sink.close()
        >>> from knet_deploy import SourceOptions
        >>> with open_source("masks.mcap", SourceOptions(topic="/segmentation/classes")) as source:
        ...     len(list(source))
        8
    """

    SUFFIXES = (".mcap", ROS1_SUFFIX)

    def __init__(self, path: str | Path, info: SourceInfo, model: str, look: Look = Look()) -> None:
        target = Path(path)
        self.path: Path | None = target
        self.name = str(path)
        if target.suffix.lower() not in (*self.SUFFIXES, ""):
            raise ConfigError(f"{path}: let the recording's name end in .mcap or .bag")
        need_rosbags(self.name)
        self._is_folder = not target.suffix
        if self._is_folder:
            check_folder(target.parent)
            if target.exists() and not (target / METADATA).is_file():
                raise OutputError(f"{path}: is there and is no recording; choose another name")
        else:
            AtomicFile(target)  # tries whether it can be written
        source = info.path
        sqlite = self._is_folder and source is not None and _is_sqlite(source)
        ros1 = target.suffix.lower() == ROS1_SUFFIX
        self._kind: _Kind = "ros1" if ros1 else "sqlite3" if sqlite else "mcap"
        self._topic = info.topic or ""
        self._model = model
        self._painter = OverlayPainter(look, steady=True)
        self._folder: AtomicFolder | None = None
        self._recording: _Recording | None = None
        self._topics: dict[str, Connection] = {}
        self._began: tuple[int, int] | None = None
        self._failed = self._closed = False

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Add one frame's messages. Raises OutputError."""
        if self._closed:
            raise ValueError(f"{self.name} is closed")
        if frame.stale:
            return
        header = frame.ros or self._header(frame)
        try:
            if self._recording is None:
                self._begin(header, result)
            self._add(header, frame, result)
        except KnetError:
            raise
        except ValueError as error:
            raise OutputError(f"{self.name}: {error}; scale the frames down") from error
        except Exception as error:
            self._failed = True
            raise output_error(Path(self.name), error) from error

    def close(self, *, complete: bool = True) -> None:
        """Finish the recording and give it its name, or a partial one unless it is complete;
        ``path`` is then where it is, and None without frames. Raises OutputError."""
        if self._closed:
            return
        self._closed = True
        self.path = None
        recording, folder = self._recording, self._folder
        if folder is None:
            return
        try:
            if recording is not None:
                recording.close(whole=not self._failed)
            if recording is not None and not (self._failed and self._is_folder):
                self.path = self._publish(recording, folder, complete and not self._failed)
        except Exception as error:
            raise output_error(Path(self.name), error) from error
        finally:
            folder.__exit__()

    def _publish(self, recording: _Recording, folder: AtomicFolder, complete: bool) -> Path:
        target = Path(self.name) if complete else free_partial_path(Path(self.name))
        if not self._is_folder:
            sync(recording.file)
            publish(recording.file, target)
            return target
        for file in recording.file.parent.iterdir():
            file.rename(folder.path / file.name)
        recording.file.parent.rmdir()
        folder.target = target.absolute()
        folder.commit()
        return target

    def _header(self, frame: Frame) -> RosHeader:
        """A header for a frame that is out of no recording."""
        if frame.wall is not None:
            stamp = round(frame.wall * SECOND)
        else:
            now = time.time_ns()
            pts = now if frame.pts is None else round(frame.pts * SECOND)
            if self._began is None:
                self._began = now, pts
            stamp = self._began[0] + pts - self._began[1]
        return RosHeader(stamp, "", stamp)

    def _begin(self, header: RosHeader, result: Segmentation) -> None:
        target = Path(self.name)
        self._folder = AtomicFolder(target).__enter__()
        self._recording = _Recording(self._folder.path, target.stem, self._kind)
        image = self._topic.removesuffix("/compressed")
        base = f"{image.rpartition('/')[0]}/segmentation"
        kinds = {"classes": _IMAGE, "overlay/compressed": _COMPRESSED, "labels": _STRING}
        if result.task != "semantic":
            kinds |= {"ids": _IMAGE, "segments": _STRING}
        for name, kind in kinds.items():
            latched = name == "labels"
            self._topics[name] = self._recording.add(f"{base}/{name}", kind, latched=latched)
        labels = BagLabels(
            result.task,
            self._model,
            result.labels.ignore_index,
            tuple(
                _Class(index, name, colour, index in result.labels.things)
                for index, (name, colour) in enumerate(
                    zip(result.labels.names, result.labels.palette, strict=True)
                )
            ),
        )
        self._put("labels", header.logged, data=msgspec.json.encode(labels).decode())

    def _add(self, header: RosHeader, frame: Frame, result: Segmentation) -> None:
        assert self._recording is not None
        overlay = encode_jpeg(self._painter.paint(frame, result), _QUALITY)
        about = self._recording.header(header)
        self._put("classes", header.logged, header=about, **_grey(result.class_map))
        self._put(
            "overlay/compressed",
            header.logged,
            header=about,
            format="rgb8; jpeg compressed bgr8",  # as ROS's own image_transport writes it
            data=np.frombuffer(overlay, np.uint8),
        )
        if result.task != "semantic":
            self._put("ids", header.logged, header=about, **_grey(result.segment_map))
            records = tuple(map(segment_record, result.segments))
            text = msgspec.json.encode(BagSegments(header.parts, header.frame_id, records))
            self._put("segments", header.logged, data=text.decode())

    def _put(self, name: str, logged: int, **fields: Any) -> None:
        assert self._recording is not None
        self._recording.write(self._topics[name], logged, fields)


def _is_sqlite(source: Path) -> bool:
    """Whether a recording of ROS 2 is stored by SQLite."""
    return source.suffix == ".db3" or (source.is_dir() and any(source.glob("*.db3*")))


def _grey(ids: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The fields of an Image of mono8 or mono16."""
    height, width = ids.shape
    depth = ids.itemsize
    little = np.ascontiguousarray(ids, f"<u{depth}")
    return {
        "height": height,
        "width": width,
        "encoding": f"mono{8 * depth}",
        "is_bigendian": 0,
        "step": width * depth,
        "data": little.reshape(-1).view(np.uint8),
    }


class _Recording:
    """A recording in ``folder``, whose messages are named by their fields; ``file`` holds them."""

    def __init__(self, folder: Path, stem: str, kind: _Kind) -> None:
        from rosbags import rosbag1, rosbag2
        from rosbags.typesys import Stores, get_typestore

        self._writer: rosbag1.Writer | rosbag2.Writer
        self.ros1 = kind == "ros1"
        self._types = get_typestore(Stores.ROS1_NOETIC if self.ros1 else Stores.ROS2_HUMBLE)
        if self.ros1:
            self.file = folder / f"{stem}.bag"
            self._writer = rosbag1.Writer(self.file)
            self._writer.set_compression(rosbag1.Writer.CompressionFormat.LZ4)
        else:
            self.file = folder / stem / f"{stem}.{'db3' if kind == 'sqlite3' else kind}"
            plugin = rosbag2.StoragePlugin[kind.upper()]
            # Metadata of version 9 are not read by releases before Jazzy.
            self._writer = rosbag2.Writer(self.file.parent, version=8, storage_plugin=plugin)
            if kind == "mcap":
                mode, form = rosbag2.CompressionMode.STORAGE, rosbag2.CompressionFormat.ZSTD
                self._writer.set_compression(mode, form)
        self._writer.open()

    def add(self, topic: str, kind: str, *, latched: bool) -> Connection:
        """A topic of messages of this kind."""
        from rosbags import rosbag1

        if isinstance(self._writer, rosbag1.Writer):
            return self._writer.add_connection(
                topic, kind, typestore=self._types, latching=int(latched)
            )
        profiles = [_latched()] if latched else []
        return self._writer.add_connection(
            topic, kind, typestore=self._types, offered_qos_profiles=profiles
        )

    def header(self, header: RosHeader) -> object:
        """ROS's own message of it."""
        types: Any = self._types.types
        stamp = types["builtin_interfaces/msg/Time"](*header.parts)
        fields = {"stamp": stamp, "frame_id": header.frame_id} | ({"seq": 0} if self.ros1 else {})
        return types["std_msgs/msg/Header"](**fields)

    def write(self, connection: Connection, logged: int, fields: dict[str, Any]) -> None:
        """Add one message."""
        kind, types = connection.msgtype, self._types
        message = types.types[kind](**fields)
        data = (types.serialize_ros1 if self.ros1 else types.serialize_cdr)(message, kind)
        self._writer.write(connection, logged, data)

    def close(self, *, whole: bool) -> None:
        """Write the index; without it where a write failed: there is no place for one."""
        if whole:
            self._writer.close()
        else:
            with suppress(Exception):
                self._writer.abort()


def _latched() -> Qos:
    """What ROS 2 has in place of latching: whoever comes later gets the last message, too."""
    from rosbags import interfaces

    forever = interfaces.QosTime(0, 0)
    return interfaces.Qos(
        history=interfaces.QosHistory.KEEP_LAST,
        depth=1,
        reliability=interfaces.QosReliability.RELIABLE,
        durability=interfaces.QosDurability.TRANSIENT_LOCAL,
        deadline=forever,
        lifespan=forever,
        liveliness=interfaces.QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=forever,
        avoid_ros_namespace_conventions=False,
    )
