"""An image, or a folder of them, as a source of frames; and one image file to RGB pixels.

The container is inspected before OpenCV sees the data: its size (a header may promise more pixels
than memory holds) and, for the formats with a checkable structure, that the file is whole. OpenCV
and the libraries below it would otherwise write their own complaints to stderr. The scans of a JPEG
are read by FFmpeg's decoder first: OpenCV makes grey of what is missing, and says nothing.
"""

from __future__ import annotations

import os
import re
import shlex
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from knet_runtime.bundle.manifest import MANIFEST_NAME
from knet_runtime.errors import SourceError
from knet_runtime.sources.base import SourceInfo, SourceKind, SourceOptions, SourceStatus
from knet_runtime.sources.files import open_regular
from knet_runtime.types import MAX_PIXELS, Closeable, Frame, Size, as_utf8

_LARGEST_FILE = 8 * MAX_PIXELS + (1 << 26)  # four channels of 16 bits, and what else is in it
_TOO_LARGE = f"is larger than {_LARGEST_FILE // 1_000_000:,} MB"
_PNG_KEPT = {b"IHDR", b"PLTE", b"eXIf", b"IDAT", b"IEND"}
_PALETTE = 3  # PNG's colour type
# Tags of TIFF, and the values of ExtraSamples.
_WIDTH, _LENGTH, _BITS, _PLANAR, _EXTRA = 256, 257, 258, 284, 338
_PREMULTIPLIED, _STRAIGHT = 1, 2


class _DamageError(ValueError):
    """The file's structure is broken; the text says how."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read a PNG, JPEG, BMP, TIFF or WebP file as uint8 [H, W, 3] RGB, upright by its EXIF data.

    The content decides, not the name. Grey and palette images become RGB, transparency is dropped
    (the stored colour stays, as in training), 16-bit values v become round(v / 257), and of several
    pages the first is read. Raises SourceError, naming the file, when it is missing, no regular
    file, no image, damaged, of another sample type, or larger than 200 megapixels.
    """
    with open_regular(path, "an image") as file:
        try:
            head = file.read(16)
            if not is_image(head):
                raise SourceError(f"{path}: {_NO_IMAGE}; copy or export the image again")
            if os.fstat(file.fileno()).st_size > _LARGEST_FILE:
                raise SourceError(f"{path}: {_TOO_LARGE}; export the image again")
            data = head + file.read(_LARGEST_FILE)
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror}; copy the image again") from error
    return decode_image(data, str(path))


def is_image(head: bytes) -> bool:
    """Whether a file that begins with these bytes (16 or more) is of a kind that is read."""
    return _inspector(head) is not None


def decode_image(data: bytes, name: str) -> NDArray[np.uint8]:
    """What ``read_image`` does with a file's bytes; ``name`` is how errors call it."""
    try:
        inspect = _inspector(data)
        if inspect is None:
            raise _DamageError(_NO_IMAGE)
        (height, width), data = inspect(data)
    except (_DamageError, struct.error, IndexError) as error:
        reason = str(error) if isinstance(error, _DamageError) else "is cut off"
        raise SourceError(f"{name}: {reason}; copy or export the image again") from error
    if height < 1 or width < 1:
        raise SourceError(f"{name}: states a size of {height}×{width}; export the image again")
    if height * width > MAX_PIXELS:
        raise SourceError(
            f"{name}: {height}×{width} pixels are more than {MAX_PIXELS // 1_000_000} million; "
            "scale the image down or cut it into tiles"
        )
    if data.startswith(b"\xff\xd8") and not _is_whole_jpeg(data):
        raise SourceError(f"{name}: is damaged or cut off; copy or export the image again")
    try:
        with _quiet_opencv():
            flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise SourceError(f"{name}: cannot be decoded; export the image again") from error
    if pixels is None:
        if _is_animated_webp(data):
            raise SourceError(
                f"{name}: is an animated WebP, which OpenCV {cv2.__version__} cannot decode; "
                "export one of its images"
            )
        raise SourceError(f"{name}: cannot be decoded; copy or export the image again")
    if pixels.dtype == np.uint16:
        pixels = eight_bits(pixels.astype(np.uint16))
    elif pixels.dtype != np.uint8:
        raise SourceError(
            f"{name}: has {pixels.dtype} samples; save it with 8 or 16 bits per channel"
        )
    return np.asarray(cv2.cvtColor(pixels.astype(np.uint8), cv2.COLOR_BGR2RGB), np.uint8)


def eight_bits(values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """16-bit values v as round(v / 257): white stays white."""
    # 257 is odd, so v / 257 never ends in one half: this is the rounded quotient.
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


_NO_IMAGE = "is not a PNG, JPEG, BMP, TIFF or WebP image, whatever its name says"
_Inspector = Callable[[bytes], tuple[Size, bytes]]


def _inspector(data: bytes) -> _Inspector | None:
    """What finds the (height, width) that the header states, and the data to decode."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _inspect_png
    if data.startswith(b"\xff\xd8\xff"):
        return _inspect_jpeg
    if data.startswith(b"BM"):
        return _inspect_bmp
    if data[:4] in (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"):
        return _inspect_tiff
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _inspect_webp
    return None


def _inspect_png(data: bytes) -> tuple[Size, bytes]:
    """Walk the chunks, check each CRC, and keep only what the pixels need.

    The rest is colour profiles, text, transparency and palettes that are only suggested, about
    which libpng prints warnings for many good files.
    """
    kept = [data[:8]]
    offset, size, colour = 8, (0, 0), 0
    while True:
        length, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + 12 + length
        if end > len(data):
            raise _DamageError("is cut off")
        body = memoryview(data)[offset + 4 : end - 4]
        if kind in _PNG_KEPT:
            if zlib.crc32(body) != int.from_bytes(data[end - 4 : end], "big"):
                raise _DamageError("is damaged (a checksum does not match)")
            if kind != b"PLTE" or colour == _PALETTE:
                kept.append(data[offset:end])
        if kind == b"IHDR":
            width, height, _, colour = struct.unpack_from(">IIBB", data, offset + 8)
            size = (height, width)
        if kind == b"IEND":
            return size, b"".join(kept)
        offset = end


def _inspect_jpeg(data: bytes) -> tuple[Size, bytes]:
    """Walk the segments to the first scan; after it an end marker must follow."""
    offset, size = 2, (0, 0)
    while True:
        if data[offset] != 0xFF:
            raise _DamageError("is damaged (no JPEG segment where one should begin)")
        marker = data[offset + 1]
        if marker == 0xFF:  # padding
            offset += 1
            continue
        (length,) = struct.unpack_from(">H", data, offset + 2)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            size = struct.unpack_from(">HH", data, offset + 5)
        offset += 2 + length
        if marker == 0xDA:
            # Entropy-coded data never holds 0xFF 0xD9: the encoder stuffs a zero after each 0xFF.
            if data.find(b"\xff\xd9", offset) < 0:
                raise _DamageError("is cut off")
            return size, data


def _is_whole_jpeg(data: bytes) -> bool:
    """Whether FFmpeg's decoder finds all that the scans should hold, at an eighth of the size.

    It gets the first image and no segments of applications, which are often odd in good files.
    What it does not know (arithmetic coding) passes.
    """
    parts, offset = [data[:2]], 2
    while (marker := data[offset + 1]) != 0xDA:
        if marker == 0xFF:  # padding
            offset += 1
            continue
        end = offset + 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            parts.append(data[offset:end])
        offset = end
    parts.append(data[offset : data.find(b"\xff\xd9", offset) + 2])
    decoder = av.CodecContext.create("mjpeg", "r")
    decoder.thread_count = 1
    decoder.options = {"err_detect": "explode", "lowres": "3"}
    try:
        decoder.decode(av.Packet(b"".join(parts)))
        decoder.decode(None)
    except av.InvalidDataError:
        return False
    except (av.FFmpegError, OSError, NotImplementedError):
        return True
    return True


def _inspect_bmp(data: bytes) -> tuple[Size, bytes]:
    (header,) = struct.unpack_from("<I", data, 14)
    form = "<HH" if header == 12 else "<ii"
    width, height = struct.unpack_from(form, data, 18)
    return (abs(height), width), data  # a negative height means rows from the top


def _inspect_tiff(data: bytes) -> tuple[Size, bytes]:
    """Look at the first page's tags; BigTIFF has wider ones.

    Colours beside a straight alpha channel would come out multiplied by it, so it is declared as
    what they were multiplied by already. Raises _DamageError for what OpenCV reads wrongly.
    """
    order = "<" if data.startswith(b"II") else ">"
    big = data[2:4] in (b"+\x00", b"\x00+")
    wide, counting, width = ("Q", "Q", 20) if big else ("I", "H", 12)
    (offset,) = struct.unpack_from(order + wide, data, 8 if big else 4)
    (count,) = struct.unpack_from(order + counting, data, offset)
    first = offset + struct.calcsize(counting)
    found, places = {}, {}
    for entry in range(first, first + width * min(count, 4096), width):
        tag, kind, values = struct.unpack_from(order + "HH" + wide, data, entry)
        place = entry + 4 + struct.calcsize(wide)
        form = "H" if kind == 3 else "I"  # a SHORT or a LONG
        if tag == _BITS and values * 2 > struct.calcsize(wide):
            (place,) = struct.unpack_from(order + wide, data, place)
        if tag in (_WIDTH, _LENGTH, _BITS, _PLANAR, _EXTRA):
            (found[tag],) = struct.unpack_from(order + form, data, place)
            places[tag] = place
    if found.get(_PLANAR) == 2 and found.get(_BITS) == 16:
        raise _DamageError("is a TIFF of 16 bits with its channels apart, which is not read")
    if found.get(_EXTRA) == _STRAIGHT:
        at = places[_EXTRA]
        data = data[:at] + struct.pack(order + "H", _PREMULTIPLIED) + data[at + 2 :]
    return (found.get(_LENGTH, 0), found.get(_WIDTH, 0)), data


def _inspect_webp(data: bytes) -> tuple[Size, bytes]:
    (length,) = struct.unpack_from("<I", data, 4)
    if 8 + length > len(data):
        raise _DamageError("is cut off")
    match data[12:16]:
        case b"VP8X":
            width = int.from_bytes(data[24:27], "little") + 1
            height = int.from_bytes(data[27:30], "little") + 1
        case b"VP8L":
            (bits,) = struct.unpack_from("<I", data, 21)
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
        case _:
            raise _DamageError("is damaged (no WebP image inside)")
    return (height, width), data


def _is_animated_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[12:16] == b"VP8X" and bool(data[20] & 2)


class _Silence:
    """Silences OpenCV's log while a thread is inside it.

    The level belongs to the whole process: the first thread to enter takes it, and the last one to
    leave gives it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._level = 0, 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        log = getattr(cv2.utils, "logging", cv2)  # OpenCV 5, and 4
        with self._lock:
            if self._inside == 0:
                self._level = log.getLogLevel()
                log.setLogLevel(0)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    log.setLogLevel(self._level)


_quiet_opencv = _Silence()


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
BAG_SUFFIXES = (".bag", ".mcap", ".db3")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".ts", ".mts", ".m2ts", ".m4v", ".webm", ".mpg")


def list_images(folder: Path) -> list[Path]:
    """The images of a folder by natural order of name ("a2" before "a10").

    An image is a file with one of ``IMAGE_SUFFIXES``, in any case. Other files, hidden files and
    sub-folders are left out. Raises SourceError when the folder cannot be read or has no image.
    """
    try:
        found = [
            path
            for path in folder.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES
            and not path.name.startswith(".")  # macOS leaves "._photo.jpg" beside "photo.jpg"
            and path.is_file()
        ]
    except OSError as error:
        raise SourceError(
            f"{folder}: {error.strerror}; check the folder and its permissions"
        ) from error
    if not found:
        raise SourceError(f"{folder}: has no images; {_instead(folder)}")
    return sorted(found, key=_natural_key)


def _instead(folder: Path) -> str:
    """What to do with a folder that holds no images."""
    if (folder / MANIFEST_NAME).is_file():
        return f"it is a bundle: name a video or images, and --bundle {folder}"
    bags = sorted(path for path in folder.iterdir() if path.suffix.lower() in BAG_SUFFIXES)
    if bags:  # of ROS 2 without its metadata, or of ROS 1
        return f"name the recording in it: {shlex.quote(str(bags[0]))}"
    videos = [path for path in folder.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES]
    if videos:
        pattern = shlex.quote(f"{folder}/*{min(path.suffix for path in videos)}")
        return f"for its videos: knet-deploy batch {pattern} --out RESULTS"
    extensions = " ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
    return f"put files with these extensions directly in it: {extensions}"


def _natural_key(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", path.name)  # text at even places, digits at odd ones
    return [int(p) if i % 2 else p.casefold() for i, p in enumerate(parts)], path.name


def frame_names(paths: list[Path]) -> list[str]:
    """A name per image that no other has: its stem, or the whole file name where stems repeat; as
    UTF-8 can hold it."""
    stems = Counter(path.stem for path in paths)
    names = [path.name if stems[path.stem] > 1 else path.stem for path in paths]
    # a.jpg, a.png and a.png.png: the last one's stem is the second one's file name.
    if len(set(names)) < len(names):
        names = [path.name for path in paths]
    return [as_utf8(name) for name in names]


class ImageSource(Closeable):
    """Frames from image files; a context manager. They have no time: ``pts`` and ``rate`` are None.

    ``path`` is an image or a folder (see ``list_images``), of which each ``options.every``-th is
    read. Raises SourceError when it cannot be read, from the constructor for the first image, else
    while iterating.
    """

    status = SourceStatus()

    def __init__(self, path: Path, options: SourceOptions | None = None) -> None:
        folder = path.is_dir()
        paths = list_images(path) if folder else [path]
        names = frame_names(paths)
        every = 1 if options is None else options.every
        paths, names = paths[::every], names[::every]
        self._stopped = False
        first = read_image(paths[0])
        kind: SourceKind = "images" if folder else "image"
        self.info = SourceInfo(kind, first.shape[:2], None, len(paths), path=path)
        rest = self._read(paths[1:], names[1:])
        self._frames: Iterator[Frame] = chain([Frame(first, 0, None, names[0])], rest)

    def _read(self, paths: list[Path], names: list[str]) -> Iterator[Frame]:
        for index, (path, name) in enumerate(zip(paths, names, strict=True), 1):
            if self._stopped:
                return
            yield Frame(read_image(path), index, None, name)

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def stop(self) -> None:
        """End the iteration, from any thread."""
        self._stopped = True

    def close(self) -> None:
        """End the frames; no file stays open between them anyway."""
        self._frames = iter(())
