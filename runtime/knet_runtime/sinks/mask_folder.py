"""The sink that writes a folder of masks."""

from __future__ import annotations

import zlib
from pathlib import Path

from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks.picture_folder import PictureFolder
from knet_runtime.types import Frame


def _chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data)
    return len(data).to_bytes(4, "big") + kind + data + crc.to_bytes(4, "big")


class MaskFolder(PictureFolder):
    """Writes each class map as ``FRAME_NAME.png`` into a folder: grey, its values class indices.

    8 bits per pixel, or 16 with more than 255 classes; the frame's own size. Beside each class map
    an instance or panoptic result has ``FRAME_NAME.segments.png``: 16 bits, the segments' ids. Each
    file appears whole, within about a second. A stale frame's mask is there already and is not
    written again. A run that ended early leaves its masks, and beside them ``PARTIAL.txt``.

    A folder never mixes two runs: one that holds masks of another is an OutputError, unless
    ``overwrite`` has them removed when the first mask is there. Other files stay, and are never
    written over. Masks are known by a text in them ("Software"). Raises OutputError also when the
    folder cannot be made or written to.

        >>> from knet_deploy import MaskFolder, Segmenter, open_source
        >>> with open_source("drive.mp4") as source, Segmenter() as segment:
        ...     sink = MaskFolder("masks")
        ...     for frame in source:
        ...         sink.write(frame, segment(frame.image))
        ...     sink.close()
        >>> import os
        >>> len(os.listdir("masks"))
        8
    """

    kind = "masks"
    suffix = ".png"
    head = 33  # PNG's signature and first chunk
    sign = _chunk(b"tEXt", b"Software\0knet-deploy masks")

    def pictures(self, target: Path, frame: Frame, result: Segmentation) -> dict[Path, bytes]:
        """The class map, and beside it the segments where there are some."""
        return result.mask_pngs(target)
