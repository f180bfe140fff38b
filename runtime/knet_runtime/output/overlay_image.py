"""The sink for the overlay of a single image, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from knet_runtime.errors import ConfigError, OutputError
from knet_runtime.frames import Frame
from knet_runtime.output.painter import Painter
from knet_runtime.pending import Keep, PendingFile

if TYPE_CHECKING:
    from knet_runtime.segmenter import Mask


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
        self._painter = Painter(alpha=alpha, legend=legend, classes=classes)
        self._pending: PendingFile | None = PendingFile(self._path)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return str(self._path)

    @property
    def path(self) -> Path:
        """Where the picture will be."""
        return self._path

    def write(self, frame: Frame, mask: Mask) -> None:
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

    def close(self, keep: Keep = "complete") -> None:
        """Nothing is left to do: the picture is whole, or was never written."""
        self._pending = None
