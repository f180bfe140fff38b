"""The sink for class maps as pictures: a PNG per frame."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from knet_runtime.errors import OutputError
from knet_runtime.frames import Frame
from knet_runtime.pending import (
    Keep,
    check_folder,
    make_folder,
    output_error,
    remove_empty,
    write_whole,
)

if TYPE_CHECKING:
    from knet_runtime.segmenter import Mask


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

    def write(self, frame: Frame, mask: Mask) -> None:
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
