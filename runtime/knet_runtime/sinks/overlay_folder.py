"""The sink that writes a folder of overlays."""

from __future__ import annotations

from pathlib import Path

from knet_runtime.drawing import encode_jpeg
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks.look import Look, OverlayPainter
from knet_runtime.sinks.overlay import JPEG_QUALITY
from knet_runtime.sinks.picture_folder import PictureFolder
from knet_runtime.types import Frame

_TEXT = b"knet-deploy overlays"


class OverlayFolder(PictureFolder):
    """Writes each frame under its colours as ``FRAME_NAME.jpg`` into a folder, at its own size.

    A stale frame is not written again. What is said of ``MaskFolder`` holds here, too: files appear
    whole, an early end is marked by ``PARTIAL.txt``, and overlays of another run are an OutputError
    unless ``overwrite`` has them removed. Raises ConfigError for classes that the model does not
    have.

        >>> from knet_deploy import Look, OverlayFolder, Segmenter, open_source
        >>> with open_source("photos") as source, Segmenter() as segment:
        ...     sink = OverlayFolder("overlays", Look(legend=True))
        ...     for frame in source:
        ...         sink.write(frame, segment(frame.image))
        ...     sink.close()
        >>> import os
        >>> sorted(os.listdir("overlays"))
        ['a.jpg', 'b.jpg']
    """

    kind = "overlays"
    suffix = ".jpg"
    head = 20  # JPEG's marker and JFIF's segment, which is the first one
    sign = b"\xff\xfe" + (2 + len(_TEXT)).to_bytes(2, "big") + _TEXT  # a comment

    def __init__(self, folder: str | Path, look: Look = Look(), *, overwrite: bool = False) -> None:
        self._painter = OverlayPainter(look, steady=False)
        super().__init__(folder, overwrite=overwrite)

    def pictures(self, target: Path, frame: Frame, result: Segmentation) -> dict[Path, bytes]:
        """The overlay."""
        return {target: encode_jpeg(self._painter.paint(frame, result), JPEG_QUALITY)}
