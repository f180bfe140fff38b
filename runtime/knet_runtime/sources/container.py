"""Opening files, cameras and network streams with FFmpeg, and nothing else than what was named.

An address is shown without what is secret in it. Hardware decoders are used where FFmpeg offers one
that works on this machine; the authors had none, so tests see only the answer "none".
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections.abc import Callable
from errno import EACCES, EINVAL, EIO, ELOOP, EMFILE, ENAMETOOLONG, ENFILE, ENOENT, ENOTDIR, EPERM
from pathlib import Path
from time import monotonic
from typing import Protocol

import av
from av.codec.hwaccel import HWAccel, hwdevices_available
from av.container import InputContainer

from knet_runtime.errors import SourceError
from knet_runtime.sources.base import SourceLost, SourceOptions
from knet_runtime.sources.decoder import READ_ERRORS
from knet_runtime.sources.files import open_regular
from knet_runtime.sources.images import is_image

_log = logging.getLogger(__name__)

Open = Callable[[HWAccel | None], InputContainer]

SCHEMES = ("rtsp", "rtsps", "http", "https")
"""The schemes that are read."""

# Demuxers that read nothing but the file they are given. Playlists (ffconcat, m3u8, mpd, sdp) and
# numbered image patterns open other files and addresses, and so are not among them.
_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,h264,hevc,av1,obu,ivf,vvc,m4v,"
    "yuv4mpegpipe,nut,gif,mjpeg,mxf,dv,rm,wtv,gxf"
)
# Over the network a playlist is followed, to addresses of the same protocols only; the sound of
# one is opened with it.
_HTTP_FORMATS = f"{_FORMATS},hls,mpjpeg,aac,mp3,ac3,eac3,webvtt"
_HTTP_PROTOCOLS = "http,https,tls,tcp,crypto,httpproxy"
_RTSP_PROTOCOLS = "rtsp,rtsps,rtp,udp,tcp,tls,crypto"
# A playlist brings a segment of 2 to 10 seconds at once, and nothing in between.
_PLAYLIST_PATIENCE = 5
_SILENT = "no answer in time"
# What one image may be, and how many read timeouts it may take.
_LARGEST_IMAGE = 100_000_000
_IMAGE_PATIENCE = 10
# Seconds in which a file must give its next packet: one that was never written to its end may hold
# gigabytes of zeros, through which FFmpeg looks for more.
_FILE_PATIENCE = 20.0
# Errors of the file system; of all others its content is the cause.
_UNREACHABLE = (ENOENT, EACCES, EPERM, ENOTDIR, ELOOP, ENAMETOOLONG, EIO, EMFILE, ENFILE)


def scheme_of(source: str) -> str | None:
    """The scheme of an address, in lower case; None for what is none (a path, "C:/video.mp4")."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", source)
    return scheme[1].lower() if scheme else None


def redacted(source: str) -> str:
    """An address without user, password, query and fragment; other names of sources as they are.

    Everything up to the last "@" goes: a password may hold any character. Queries often carry a
    key. "rtsp://me:secret@host/live?key=1" becomes "rtsp://***@host/live?***".
    """
    if scheme_of(source) is None:
        return source
    body = source.partition(":")[2].lstrip("/")
    scheme = source.removesuffix(body)
    if "@" in body:
        body = "***@" + body.rpartition("@")[2]
    return scheme + re.sub(r"[?#].*", "?***", body, count=1, flags=re.DOTALL)


def on_hardware(
    container: InputContainer, open_with: Open, name: str
) -> tuple[InputContainer, HWAccel | None]:
    """The same input on a hardware decoder, if one can be had for its codec, and which.

    ``open_with`` opens it again. What that raises is raised; not having a decoder is a logged line.
    """
    stream = container.streams.best("video")
    codec = stream.codec_context.codec.name if isinstance(stream, av.VideoStream) else None
    device = None if codec is None else _hardware_device(codec)
    if device is None:
        _log.warning("%s: no hardware decoder for it works here; decoding in software", name)
        return container, None
    container.close()
    _log.info("%s: decoding on %s", name, device)
    hardware = HWAccel(device, allow_software_fallback=True)
    return open_with(hardware), hardware


@functools.cache
def _hardware_device(codec: str) -> str | None:
    """The first of FFmpeg's devices that can be set up on this machine for a codec."""
    for device in hwdevices_available():
        try:
            HWAccel(device).create(av.Codec(codec, "r"))
        except (*READ_ERRORS, NotImplementedError):
            continue
        return device
    return None


class Connector(Protocol):
    """A live source that can be opened again and again.

    ``name`` is what it is called in messages, ``hint`` what to look at when it cannot be opened.
    """

    name: str
    hint: str

    def open(self) -> InputContainer:
        """Connect. Raises SourceLost."""
        ...


def open_file(path: Path, *, hwaccel: bool = False) -> InputContainer:
    """Open a video file. Raises SourceError, naming it and what to do."""

    def open_with(device: HWAccel | None) -> InputContainer:
        return av.open(
            f"file:{path}",  # or a colon in the name would be taken for a protocol
            "r",
            # As "options" they crash PyAV before 17.1 where streams show late (FLV, MPEG-PS).
            container_options={"protocol_whitelist": "file", "format_whitelist": _FORMATS},
            metadata_errors="ignore",
            timeout=_FILE_PATIENCE,
            hwaccel=device,
        )

    open_regular(path, "a video").close()
    try:
        return on_hardware(open_with(None), open_with, str(path))[0] if hwaccel else open_with(None)
    except av.ExitError as error:
        raise SourceError(
            f"{path}: has no video in what {_FILE_PATIENCE:g} s of reading find; copy it again"
        ) from error
    except av.InvalidDataError as error:
        raise SourceError(
            f"{path}: is not a video, or is cut off before its index; copy or export it again"
        ) from error
    except READ_ERRORS as error:
        if error.errno == EINVAL:  # what a format outside the list gives
            raise SourceError(
                f"{path}: is no video file of a supported kind (playlists are not followed); "
                "convert it to MP4"
            ) from error
        reason = error.strerror or "cannot be opened"
        if error.errno in _UNREACHABLE:
            raise SourceError(f"{path}: {reason}; check the name and its permissions") from error
        raise SourceError(
            f"{path}: cannot be read as a video ({reason}); copy or export it again"
        ) from error


class CameraConnector:
    """A v4l2 device. Raises SourceError where there can be none (not on Linux)."""

    hint = (
        "plug it in or pick one from: ls /dev/video*; close other programs that use it, and see "
        "that you are in the group video"
    )

    def __init__(self, path: Path, options: SourceOptions) -> None:
        if not sys.platform.startswith("linux"):
            raise SourceError(
                f"{path}: cameras can be read on Linux only; record to a file instead"
            )
        self._path = path
        self._timeouts = (options.connect_timeout, options.read_timeout)
        self.name = str(path)

    def open(self) -> InputContainer:
        """Open the device. Raises SourceLost."""
        if not self._path.exists():
            raise SourceLost("there is no such camera")
        try:
            return av.open(str(self._path), "r", format="v4l2", timeout=self._timeouts)
        except READ_ERRORS as error:
            raise SourceLost(error.strerror or "cannot be opened") from error


class NetworkConnector:
    """An address of RTSP(S) or HTTP(S), a playlist (HLS) included.

    ``name`` is the address without what is secret in it. The certificates of RTSPS and HTTPS are
    not checked: cameras sign their own.
    """

    hint = "check the address, and that the camera or server is on"

    def __init__(self, address: str, options: SourceOptions) -> None:
        self._address = address
        self._options = options
        self._patience = 1
        self._hardware: HWAccel | None = None
        self._first = True
        self.name = redacted(address)
        self.is_http = scheme_of(address) in ("http", "https")

    def open(self) -> InputContainer:
        """Connect, and find out what the stream holds. Raises SourceLost."""
        lost, began = None, monotonic()
        try:
            container = self._open(self._hardware)
            if container.format.name == "hls" and self._patience == 1:
                self._patience = _PLAYLIST_PATIENCE
                container.close()
                container = self._open(None)
            if self._options.hwaccel and self._first:
                container, self._hardware = on_hardware(container, self._open, self.name)
            self._first = False
            return container
        except READ_ERRORS as error:
            lost = lost_by(error)
            # What timed out inside of TLS comes as a plain input/output error.
            if error.errno == EIO and monotonic() - began >= self._options.connect_timeout:
                lost = SourceLost(_SILENT)
        # Raised outside of the handler, or it would carry FFmpeg's error along, whose text holds
        # the address with its password.
        raise lost

    def fetch(self) -> bytes:
        """The file of the image that is at the address, over HTTP. Raises SourceLost, also for what
        is no image, larger than 100 MB, or takes ten read timeouts."""
        chosen, lost = self._options, None
        began, parts, size = monotonic(), [], 0
        try:
            with av.open(
                self._address,
                "r",
                format="data",
                container_options={"protocol_whitelist": _HTTP_PROTOCOLS, "probesize": "32"},
                metadata_errors="ignore",
                timeout=(chosen.connect_timeout, chosen.read_timeout),
            ) as container:
                for packet in container.demux():
                    if not packet.size:
                        break
                    parts.append(bytes(packet))
                    size += packet.size
                    if size == packet.size and not is_image(parts[0]):
                        lost = SourceLost("what comes is no image", foreign=True)
                    elif size > _LARGEST_IMAGE:
                        lost = SourceLost("more comes than an image can hold")
                    elif monotonic() - began > _IMAGE_PATIENCE * chosen.read_timeout:
                        lost = SourceLost("its image takes too long to arrive")
                    if lost is not None:
                        break
        except READ_ERRORS as error:
            # Without a stated length every end looks broken: whether all came shows in decoding.
            lost = None if error.errno == EIO and parts else lost_by(error)
        if lost is None and not parts:
            lost = SourceLost("nothing comes")
        if lost is not None:
            raise lost  # outside of the handler: FFmpeg's error holds the address
        return b"".join(parts)

    @property
    def stem(self) -> str:
        """What an image at the address is called: "snapshot" for "http://host/snapshot.jpg"."""
        path = re.sub(r"[?#].*", "", self._address, flags=re.DOTALL)
        return Path(path.rpartition("/")[2]).stem or "image"

    def is_finite(self, container: InputContainer) -> bool:
        """Whether what was opened has an end: over HTTP, and stating a duration or a size.

        A playlist that can still grow states no duration; its size is that of its text.
        """
        if not self.is_http:
            return False
        stated = (container.duration or 0) > 0
        return stated or (container.format.name != "hls" and container.size > 0)

    def _open(self, hardware: HWAccel | None) -> InputContainer:
        chosen = self._options
        options = {"format_whitelist": _HTTP_FORMATS, "protocol_whitelist": _HTTP_PROTOCOLS}
        if not self.is_http:
            seconds = max(chosen.connect_timeout, chosen.read_timeout)
            options = {
                "format_whitelist": "rtsp",
                "protocol_whitelist": _RTSP_PROTOCOLS,
                "rtsp_transport": chosen.transport,
                "allowed_media_types": "video",
                "timeout": _microseconds(seconds),
                # By default twenty frames are awaited to guess a rate that the server states.
                "fpsprobesize": "0",
            }
        # Looking into a stream of few frames a second must end before the timeout does.
        options["analyzeduration"] = _microseconds(chosen.connect_timeout / 2)
        return av.open(
            self._address,
            "r",
            container_options=options,
            metadata_errors="ignore",
            timeout=(chosen.connect_timeout, chosen.read_timeout * self._patience),
            hwaccel=hardware,
        )


def close_input(container: InputContainer) -> None:
    """Close it, in the middle of decoding too; from the thread that reads only."""
    for stream in container.streams.video:
        # Without this, closing in mid-decode blocks for ever once the program has set a PyAV log
        # level: the decoder's threads wait for Python's lock, and its holder for them.
        if stream.codec_context is not None and stream.codec_context.is_open:
            stream.codec_context.flush_buffers()
    container.close()


def lost_by(error: av.FFmpegError | OSError) -> SourceLost:
    """What an error of FFmpeg means, in words that hold no address."""
    match error:
        case av.HTTPUnauthorizedError() | av.HTTPForbiddenError():
            return SourceLost("the server refuses the user name or password", refused=True)
        case av.HTTPNotFoundError():
            return SourceLost("the server has nothing at this path")
        case av.ExitError() | TimeoutError():
            return SourceLost(_SILENT)
        case av.InvalidDataError():
            return SourceLost("no answer in time, or what comes is no video", foreign=True)
        case av.ProtocolNotFoundError():
            return SourceLost("it leads to a protocol that is not read")
        case _ if error.errno == EIO:
            return SourceLost("its host cannot be found, or what it sends is no video")
        case _ if error.errno == EINVAL:
            return SourceLost("it is no stream or image of a supported kind", foreign=True)
        case _:
            return SourceLost(error.strerror or "it cannot be read")


def _microseconds(seconds: float) -> str:
    return str(round(seconds * 1_000_000))
