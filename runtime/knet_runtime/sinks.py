"""Where results go: an overlay video or picture, a folder of masks, lines of JSON.

All have the same two steps. ``write`` takes one frame and its mask. ``close`` ends the output:
"complete" gives it its final name, "partial" (the source or a stage failed) a name or mark that
says so, and an output without frames leaves nothing. Closing twice does nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import cv2
import msgspec
import numpy as np

from knet_runtime.errors import OutputError
from knet_runtime.frames import Frame
from knet_runtime.overlay_image import OverlayImage
from knet_runtime.overlay_video import OverlayVideo
from knet_runtime.pending import (
    Keep,
    PendingFile,
    check_folder,
    make_folder,
    output_error,
    remove_empty,
    write_whole,
)

if TYPE_CHECKING:
    from knet_runtime.segmenter import Mask

__all__ = ["JsonLines", "Keep", "MaskFolder", "OverlayImage", "OverlayVideo", "Record", "Sink"]


class Sink(Protocol):
    """Takes each frame with its mask; both methods raise OutputError."""

    @property
    def path(self) -> Path:
        """The file or folder that is written: two sinks, or a sink and a source, never share it."""
        ...

    def write(self, frame: Frame, mask: Mask) -> None: ...

    def close(self, keep: Keep = "complete") -> None: ...


class MaskFolder:
    """Writes each class map as ``FRAME_NAME.png`` into a folder: grey, its values class indices.

    8 bits per pixel, or 16 with more than 255 classes; the frame's own size. Each appears whole and
    replaces one of the same name. A run that ended early leaves its masks, and beside them
    ``PARTIAL.txt``, which the next complete run removes. Raises OutputError when the folder can not
    be made or written to.
    """

    MARK = "PARTIAL.txt"

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._written = 0
        self._closed = False
        self._created: list[Path] = []
        check_folder(self._folder)  # so that an hour of work does not end here

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder

    def write(self, frame: Frame, mask: Mask) -> None:
        """Write one mask. Raises OutputError, naming the file."""
        target = self._folder / f"{frame.name}.png"
        if target.parent != self._folder:
            raise OutputError(f"{frame.name}: a frame's name can not hold folders; rename it")
        deep = mask.labels.num_classes > 255 or mask.class_map.dtype != np.uint8
        pixels = np.asarray(mask.class_map, np.uint16) if deep else mask.class_map
        try:
            encoded, data = cv2.imencode(".png", pixels)
            if not encoded:
                raise OutputError(f"{target}: {pixels.shape} can not be encoded as PNG")
            if not self._written:
                self._created = make_folder(self._folder)
            write_whole(target, data.tobytes())
        except OSError as error:
            raise output_error(target, error) from error
        self._written += 1

    def close(self, keep: Keep = "complete") -> None:
        """Mark an early end, or remove the mark of an earlier one. Raises OutputError."""
        if self._closed:
            return
        self._closed = True
        mark = self._folder / self.MARK
        try:
            if not self._written:
                remove_empty(self._created)
            elif keep == "complete":
                mark.unlink(missing_ok=True)
            else:
                text = f"The run ended early: {self._written} masks were written.\n"
                write_whole(mark, text.encode())
        except OSError as error:
            raise output_error(mark, error) from error


class Record(msgspec.Struct, frozen=True):
    """One line of ``JsonLines``: ``pts`` in seconds, ``size`` (height, width), ``shares`` 0 … 1."""

    frame: int
    name: str
    pts: float | None
    size: tuple[int, int]
    shares: dict[str, float]
    timings_ms: dict[str, float]
    model: str


class JsonLines:
    """Writes one ``Record`` per frame and line to ``path``, in UTF-8.

    ``model`` is the id of the model (``Segmenter.model_id``). Until ``close`` the file has a hidden
    name beside ``path``; a partial one is called ``NAME.partial.SUFFIX``. Raises OutputError when
    it can not be written.
    """

    def __init__(self, path: str | Path, model: str) -> None:
        self._path = Path(path)
        self._model = model
        self._file: FileIO | None = None
        self._bytes = 0
        self._pending: PendingFile | None = PendingFile(self._path)

    @property
    def path(self) -> Path:
        """Where the finished file will be."""
        return self._path

    def write(self, frame: Frame, mask: Mask) -> None:
        """Add one line. Raises OutputError; the lines before stay whole."""
        if self._pending is None:
            raise ValueError(f"{self._path} is closed")
        record = Record(
            frame=frame.index,
            name=frame.name,
            pts=None if frame.pts is None else float(frame.pts),
            size=(frame.image.shape[0], frame.image.shape[1]),
            shares={name: round(share, 6) for name, share in mask.shares().items()},
            timings_ms={stage: round(value, 3) for stage, value in mask.timings.items()},
            model=self._model,
        )
        line = msgspec.json.encode(record) + b"\n"
        try:
            if self._file is None:
                self._pending.start()
                # Unbuffered: a killed run leaves whole lines.
                self._file = self._pending.temporary.open("wb", buffering=0)
            if self._file.write(line) != len(line):
                self._file.truncate(self._bytes)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise output_error(self._path, error) from error
        self._bytes += len(line)

    def close(self, keep: Keep = "complete") -> None:
        """Give the file its name; without frames nothing is left. Raises OutputError."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if self._file is not None:
            with contextlib.suppress(OSError):  # unbuffered: nothing is left to be written
                self._file.close()
        if self._bytes:
            pending.commit(keep)
        else:
            pending.discard()
