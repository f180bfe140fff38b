"""The sink that writes a folder of masks."""

from __future__ import annotations

import zlib
from pathlib import Path

from knet_runtime.atomic import (
    check_folder,
    make_folder,
    output_error,
    remove_empty,
    sync,
    sync_names,
    write_atomic,
)
from knet_runtime.errors import OutputError
from knet_runtime.growing import FileSeries, abandoned
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import Frame


def _chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data)
    return len(data).to_bytes(4, "big") + kind + data + crc.to_bytes(4, "big")


_HEAD = 33  # bytes: PNG's signature and first chunk
_MARK = _chunk(b"tEXt", b"Software\0knet-deploy masks")


class MaskFolder:
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

    MARK = "PARTIAL.txt"

    def __init__(self, folder: str | Path, *, overwrite: bool = False) -> None:
        self._folder = Path(folder)
        self.path: Path | None = self._folder
        self.name = str(folder)
        self._overwrite = overwrite
        self._written = 0
        self._closed = False
        self._created: list[Path] = []
        self._files = FileSeries()
        check_folder(self._folder)  # so that an hour of work does not end here
        if not overwrite and self._is_taken():
            raise OutputError(
                f"{folder}: holds the masks of another run; name another folder, or replace them "
                "with --overwrite (in Python: overwrite=True)"
            )

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Write one mask. Raises OutputError, naming the file."""
        if frame.stale:
            return
        target = self._folder / f"{frame.name}.png"
        if target.parent != self._folder:
            raise OutputError(f"{frame.name}: a frame's name cannot hold folders; rename it")
        try:
            files = self._pictures(target, result)
            if not self._written:
                self._begin()
            for file, data in files.items():
                if file.exists():
                    raise OutputError(
                        f"{file}: is there already and is no mask of an earlier run, so it is not "
                        "written over; remove it, or name another folder"
                    )
                self._files.add(file, data[:_HEAD] + _MARK + data[_HEAD:])
        except ValueError as error:
            raise OutputError(f"{target}: {error}; scale the frames down") from error
        except OSError as error:
            raise output_error(target, error) from error
        self._written += 1

    def close(self, *, complete: bool = True) -> None:
        """Wait until all masks are there, and mark an early end; without masks ``path`` is then
        None. Raises OutputError."""
        if self._closed:
            return
        self._closed = True
        try:
            self._files.close()
        except OutputError:
            complete = False
            raise
        finally:
            if not self._written or not self._folder.is_dir():  # never made, or removed meanwhile
                self.path = None
                remove_empty(self._created)
            elif not complete:
                self._mark()

    def _pictures(self, target: Path, result: Segmentation) -> dict[Path, bytes]:
        """The PNGs of one frame, of which ``target`` is the first."""
        return result.mask_pngs(target)

    def _mark(self) -> None:
        mark = self._folder / self.MARK
        text = f"The run ended early: {self._written} masks were written.\n"
        try:
            write_atomic(mark, text.encode())
        except OSError as error:
            raise output_error(mark, error) from error

    def _is_taken(self) -> bool:
        return (self._folder / self.MARK).exists() or any(map(_is_mask, self._masks()))

    def _masks(self) -> list[Path]:
        return sorted(self._folder.glob("*.png")) if self._folder.is_dir() else []

    def _begin(self) -> None:
        """Make the folder, and remove what another run left in it, before a new mask is there: what
        is killed in between leaves masks of one run."""
        self._created = make_folder(self._folder)
        sync_names(self._created)
        for leftover in abandoned(self._folder, r".+\.png"):
            leftover.unlink()
        if self._overwrite:
            for mask in filter(_is_mask, self._masks()):
                mask.unlink()
            (self._folder / self.MARK).unlink(missing_ok=True)
            sync(self._folder)


def _is_mask(path: Path) -> bool:
    """Whether a run wrote this file as a mask."""
    try:
        with path.open("rb") as file:
            return file.read(_HEAD + len(_MARK))[_HEAD:] == _MARK
    except OSError:
        return False
