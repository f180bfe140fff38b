"""The sink that writes a folder of masks."""

from __future__ import annotations

from pathlib import Path

from knet_runtime.atomic import check_folder, make_folder, output_error, remove_empty, write_atomic
from knet_runtime.drawing import encode_png
from knet_runtime.errors import OutputError
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import Frame


class MaskFolder:
    """Writes each class map as ``FRAME_NAME.png`` into a folder: grey, its values class indices.

    8 bits per pixel, or 16 with more than 255 classes; the frame's own size. Beside each class map
    an instance or panoptic result has ``FRAME_NAME.segments.png``: 16 bits, the segments' ids. Each
    file appears whole and replaces one of the same name. A stale frame's mask is there already and
    is not written again. A run that ended early leaves its masks, and beside them ``PARTIAL.txt``,
    which the next complete run removes. Raises OutputError when the folder cannot be made or
    written to.

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

    MARK = "PARTIAL.txt"

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.name = str(folder)
        self._written = 0
        self._closed = False
        self._created: list[Path] = []
        check_folder(self.path)  # so that an hour of work does not end here

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Write one mask. Raises OutputError, naming the file."""
        if frame.stale:
            return
        target = self.path / f"{frame.name}.png"
        if target.parent != self.path:
            raise OutputError(f"{frame.name}: a frame's name cannot hold folders; rename it")
        try:
            files = {target: result.class_png()}
            if result.task != "semantic":
                files[target.with_suffix(".segments.png")] = encode_png(result.segment_map)
            if not self._written:
                self._created = make_folder(self.path)
            for file, data in files.items():
                write_atomic(file, data, durable=False)  # to wait for the disk takes 5 ms a frame
        except ValueError as error:
            raise OutputError(f"{target}: {error}; scale the frames down") from error
        except OSError as error:
            raise output_error(target, error) from error
        self._written += 1

    def close(self, *, complete: bool = True) -> None:
        """Mark an early end, or remove the mark of an earlier one. Raises OutputError."""
        if self._closed:
            return
        self._closed = True
        mark = self.path / self.MARK
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
