"""The sink for class maps as pictures: a PNG per frame.

The sink for the overlay of a single image, as a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from knet_runtime.atomic import (
    AtomicFile,
    check_folder,
    make_folder,
    output_error,
    remove_empty,
    write_atomic,
)
from knet_runtime.drawing import OverlayPainter
from knet_runtime.errors import ConfigError, OutputError
from knet_runtime.types import Frame

if TYPE_CHECKING:
    from knet_runtime.segmenter import Segmentation


class MaskFolder:
    """Writes each class map as ``FRAME_NAME.png`` into a folder: grey, its values class indices.

    8 bits per pixel, or 16 with more than 255 classes; the frame's own size. Each appears whole and
    replaces one of the same name. A stale frame's mask is there already and is not written again. A
    run that ended early leaves its masks, and beside them ``PARTIAL.txt``, which the next complete
    run removes. Raises OutputError when the folder can not be made or written to.
    """

    MARK = "PARTIAL.txt"

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._written = 0
        self._closed = False
        self._created: list[Path] = []
        check_folder(self._folder)  # so that an hour of work does not end here

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return str(self._folder)

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder

    def write(self, frame: Frame, mask: Segmentation) -> None:
        """Write one mask. Raises OutputError, naming the file."""
        if frame.stale:
            return
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
            write_atomic(target, data.tobytes())
        except OSError as error:
            raise output_error(target, error) from error
        self._written += 1

    def close(self, *, complete: bool = True) -> None:
        """Mark an early end, or remove the mark of an earlier one. Raises OutputError."""
        if self._closed:
            return
        self._closed = True
        mark = self._folder / self.MARK
        try:
            if not self._written:
                remove_empty(self._created)
            elif complete:
                mark.unlink(missing_ok=True)
            else:
                text = f"The run ended early: {self._written} masks were written.\n"
                write_atomic(mark, text.encode())
        except OSError as error:
            raise output_error(mark, error) from error


class OverlayImage:
    """Writes one frame under its colours to ``path``, a PNG or JPEG by its suffix.

    ``alpha`` is the colours' opacity (0 … 1); ``legend`` adds a strip of class names and shares
    below the picture; ``classes`` names those that are drawn (none: all). The file appears whole at
    the first ``write``; a second one is refused. Raises OutputError when it can not be written,
    ConfigError for another suffix, a wrong alpha or classes that the model does not have.
    """

    SUFFIXES = (".png", ".jpg", ".jpeg")

    def __init__(
        self,
        path: str | Path,
        *,
        alpha: float = 0.5,
        legend: bool = False,
        classes: Sequence[str] = (),
    ) -> None:
        self._path = Path(path)
        if self._path.suffix.lower() not in self.SUFFIXES:
            raise ConfigError(f"{path}: let the picture's name end in {' or '.join(self.SUFFIXES)}")
        self._painter = OverlayPainter(alpha=alpha, legend=legend, classes=classes)
        self._pending: AtomicFile | None = AtomicFile(self._path)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return str(self._path)

    @property
    def path(self) -> Path:
        """Where the picture will be."""
        return self._path

    def write(self, frame: Frame, mask: Segmentation) -> None:
        """Write the picture. Raises OutputError, also for a second one."""
        pending, self._pending = self._pending, None
        if pending is None:
            raise OutputError(f"{self._path}: holds one picture; write several as an MP4")
        picture = self._painter.paint(frame, mask)
        quality = [cv2.IMWRITE_JPEG_QUALITY, 95]
        picture = np.ascontiguousarray(picture[..., ::-1])  # OpenCV writes BGR
        try:
            encoded, data = cv2.imencode(self._path.suffix.lower(), picture, quality)
        except cv2.error:  # a JPEG's sides end at 65,500
            encoded = False
        if not encoded:
            raise OutputError(f"{self._path}: {picture.shape} can not be encoded; write a PNG")
        pending.write(data.tobytes())

    def close(self, *, complete: bool = True) -> None:
        """Nothing is left to do: the picture is whole, or was never written."""
        self._pending = None
