"""A video file or a camera as a source of frames, through PyAV."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Generator, Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from numpy.typing import NDArray

from knet_runtime.errors import SourceError
from knet_runtime.frames import MAX_PIXELS, Frame, SourceInfo

_log = logging.getLogger(__name__)

# Demuxers that read nothing but the file they are given. Playlists (ffconcat, m3u8, mpd, sdp) and
# numbered image patterns open other files and addresses, and so are not among them.
_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,h264,hevc,av1,obu,ivf,vvc,m4v,"
    "yuv4mpegpipe,nut,gif,mjpeg,mxf,dv,rm,wtv,gxf"
)
_READ_ERRORS = (av.FFmpegError, OSError)


class VideoSource:
    """Frames of a video file or of a camera, upright, with exact times; a context manager.

    Times count from the start of the file (its earliest stream) or from a camera's first frame.
    What can not be decoded inside a damaged file is passed over, and after the last readable frame
    SourceError says where the damage began. Frames that the decoder had to patch up are handed on
    and counted in a logged warning. Pixels are taken as square, mirrored recordings as they are.

    ``path`` is a regular file or, with ``camera``, a v4l2 device. Raises SourceError when it can
    not be opened or holds no video.
    """

    def __init__(self, path: Path, *, camera: bool = False) -> None:
        self._path = path
        self._camera = camera
        self._closed = False
        self._container = _open_camera(path) if camera else _open_file(path)
        try:
            self._stream = self._video_stream()
            self._start = self._start_ticks()
            self._frames = self._read()
            # Only a decoded frame shows the size (after rotation), and that there is any.
            first = next(self._frames, None)
            if first is None:
                raise SourceError(f"{path}: no picture in it can be decoded; export it again")
            self._first: Frame | None = first
            height, width = first.image.shape[:2]
            self._info = SourceInfo(
                kind="camera" if camera else "video",
                hw=(height, width),
                rate=self._rate(),
                frames=None if camera else self._frame_hint(),
                time_base=self._stream.time_base,
                path=path,
            )
        except BaseException:
            _close(self._container)
            raise

    @property
    def info(self) -> SourceInfo:
        """What is known beforehand."""
        return self._info

    def __iter__(self) -> Iterator[Frame]:
        if self._first is not None:
            first, self._first = self._first, None
            yield first
        yield from self._frames

    def close(self) -> None:
        """Let go of the file or device; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._first = None
        self._frames.close()
        _close(self._container)
        del self._container, self._stream  # the decoder's threads live as long as these

    def __enter__(self) -> VideoSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _video_stream(self) -> av.VideoStream:
        stream = self._container.streams.best("video")
        # The cover picture of a sound file is a video stream too.
        cover = stream is not None and stream.disposition & Disposition.attached_pic
        if cover or not isinstance(stream, av.VideoStream):
            raise SourceError(f"{self._path}: has no video in it; name a file that has one")
        context = stream.codec_context
        if context is None:
            raise SourceError(
                f"{self._path}: there is no decoder for its video; convert it to H.264"
            )
        _check_size(self._path, context.height, context.width)
        if not self._camera:
            context.thread_type = "AUTO"  # faster, but frames come out later: not for live
        return stream

    def _start_ticks(self) -> int:
        """The source's start in ticks of the stream, so that times stay exact multiples of them."""
        start, base = self._stream.start_time, self._stream.time_base
        if self._container.start_time is None or base is None:
            return start or 0
        earliest = Fraction(self._container.start_time, 1_000_000)  # rounded to microseconds
        if start is not None and abs(start * base - earliest) <= Fraction(1, 1_000_000):
            return start
        return round(earliest / base)

    def _rate(self) -> Fraction | None:
        for rate in (self._stream.average_rate, self._stream.guessed_rate):
            if rate is not None and 0 < rate <= 1000:
                return Fraction(rate)
        return None

    def _frame_hint(self) -> int | None:
        if 0 < self._stream.frames < 2**31:
            return self._stream.frames
        rate, duration = self._rate(), self._container.duration  # in microseconds
        if rate is None or duration is None or not 0 < duration < 10**13:
            return None
        return max(1, round(rate * duration / 1_000_000))

    def _read(self) -> Generator[Frame, None, None]:
        index, patched = 0, 0
        # In packets, as threads hold some frames back. Counting begins at a key frame: a recording
        # that begins between two of them is not damaged for that.
        good, damaged_at = 0, None
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except _READ_ERRORS as error:
                if self._camera:
                    raise SourceError(
                        f"{self._path}: the camera stopped after {index} frames ({error}); "
                        "check its cable and start again"
                    ) from error
                damaged_at = good if damaged_at is None else damaged_at
                break
            if packet is None:
                break
            pictures = _decode(packet)
            if pictures is None:
                damaged_at = good if good and damaged_at is None else damaged_at
                continue
            good += bool(good or packet.is_keyframe)
            for picture in pictures:
                if self._camera and index == 0:
                    self._start = picture.pts or 0
                patched += picture.is_corrupt
                yield Frame(self._rgb(picture), index, self._time(picture), f"{index:06d}")
                index += 1
        if patched:
            _log.warning("%s: %d damaged frames were patched up to be read", self._path, patched)
        if damaged_at is None and self._is_cut_off():
            damaged_at = index
        # Cameras deliver a broken picture now and then; that is no reason to end.
        if damaged_at is not None and index and not self._camera:
            whole = min(damaged_at, index)
            raise SourceError(
                f"{self._path}: is damaged after {whole} frames ({index} could be read); "
                "copy or export it again"
            )

    def _time(self, picture: av.VideoFrame) -> Fraction | None:
        base = picture.time_base or self._stream.time_base
        if picture.pts is None or base is None:
            return None
        return (picture.pts - self._start) * Fraction(base)

    def _rgb(self, picture: av.VideoFrame) -> NDArray[np.uint8]:
        _check_size(self._path, picture.height, picture.width)
        pixels = picture.to_ndarray(format="rgb24")
        # The display matrix turns anticlockwise, as rot90 does; the copy is because PyAV's array
        # can be a view of memory that the decoder still needs.
        turns = round(picture.rotation / 90) % 4
        return np.array(np.rot90(pixels, turns), np.uint8, order="C")

    def _is_cut_off(self) -> bool:
        """Whether an MP4's boxes end after the file does: its demuxer then just reports the end."""
        if self._camera or "mp4" not in self._container.format.name:
            return False
        length = self._path.stat().st_size
        with self._path.open("rb") as file:
            offset = 0
            while offset + 8 <= length:
                file.seek(offset)
                header = file.read(16)
                size = int.from_bytes(header[:4], "big")
                if size == 1:
                    size = int.from_bytes(header[8:], "big")
                if size == 0:  # up to the end
                    return False
                if size < 8:
                    return True
                offset += size
        return offset > length


def _decode(packet: av.Packet[av.VideoStream]) -> list[av.VideoFrame] | None:
    """The pictures that a packet completes; None when it can not be decoded."""
    if packet.is_corrupt:  # cut short: it could decode to half a picture
        return None
    try:
        return packet.decode()
    except _READ_ERRORS:
        return None


def _check_size(path: Path, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise SourceError(
            f"{path}: {height}×{width} pixels are more than {MAX_PIXELS // 1_000_000} million; "
            "scale the video down"
        )


def _open_file(path: Path) -> InputContainer:
    try:
        if path.is_dir():
            raise SourceError(f"{path}: is a folder, not a video; name a file in it")
        if path.exists() and not path.is_file():
            raise SourceError(f"{path}: is not a regular file; record it to one")
        if path.exists() and path.stat().st_size == 0:
            raise SourceError(f"{path}: is empty; copy or export the video again")
        return av.open(
            f"file:{path}",  # or a colon in the name would be taken for a protocol
            "r",
            options={"protocol_whitelist": "file", "format_whitelist": _FORMATS},
            metadata_errors="ignore",
        )
    except av.InvalidDataError as error:
        raise SourceError(
            f"{path}: is not a video, or is cut off before its index; copy or export it again"
        ) from error
    except _READ_ERRORS as error:
        if error.errno == errno.EINVAL:  # what a format outside the list gives
            raise SourceError(
                f"{path}: is no video file of a supported kind (playlists are not followed); "
                "convert it to MP4"
            ) from error
        reason = error.strerror or "can not be opened"
        raise SourceError(f"{path}: {reason}; check the name and its permissions") from error


def _close(container: InputContainer) -> None:
    for stream in container.streams.video:
        # Without this, closing in mid-decode blocks for ever once the program has set a PyAV log
        # level: the decoder's threads wait for Python's lock, and its holder for them.
        if stream.codec_context is not None and stream.codec_context.is_open:
            stream.codec_context.flush_buffers()
    container.close()


def _open_camera(path: Path) -> InputContainer:
    if not sys.platform.startswith("linux"):
        raise SourceError(f"{path}: cameras can be read on Linux only; record to a file instead")
    if not path.exists():
        raise SourceError(
            f"{path}: there is no such camera; plug it in, or pick one from: ls /dev/video*"
        )
    try:
        return av.open(str(path), "r", format="v4l2")
    except _READ_ERRORS as error:
        reason = error.strerror or "can not be opened"
        raise SourceError(
            f"{path}: {reason}; close other programs that use the camera, and see that you are in "
            "the group video"
        ) from error
