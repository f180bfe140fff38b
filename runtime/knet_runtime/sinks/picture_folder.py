"""What sinks have in common that write a folder of pictures: a picture or more per frame."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

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


class PictureFolder(ABC):
    """Writes the pictures of each frame into a folder; see ``MaskFolder``, which is one.

    ``kind`` is what they are called, ``suffix`` the end of their names. ``sign``, put behind their
    first ``head`` bytes, is how the next run knows them.
    """

    kind: ClassVar[str]
    suffix: ClassVar[str]
    head: ClassVar[int]
    sign: ClassVar[bytes]
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
                f"{folder}: holds the {self.kind} of another run; name another folder, or replace "
                "them with --overwrite (in Python: overwrite=True)"
            )

    @abstractmethod
    def pictures(self, target: Path, frame: Frame, result: Segmentation) -> dict[Path, bytes]:
        """The files of one frame, of which ``target`` is the first. Raises ValueError for what its
        format cannot hold."""

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Write one frame's pictures. Raises OutputError, naming the file."""
        if frame.stale:
            return
        target = self._folder / f"{frame.name}{self.suffix}"
        if target.parent != self._folder:
            raise OutputError(f"{frame.name}: a frame's name cannot hold folders; rename it")
        try:
            files = self.pictures(target, frame, result)
            if not self._written:
                self._begin()
            for file, data in files.items():
                if file.exists():
                    raise OutputError(
                        f"{file}: is there already and is not of an earlier run's {self.kind}, so "
                        "it is not written over; remove it, or name another folder"
                    )
                self._files.add(file, data[: self.head] + self.sign + data[self.head :])
        except ValueError as error:
            raise OutputError(f"{target}: {error}; scale the frames down") from error
        except OSError as error:
            raise output_error(target, error) from error
        self._written += 1

    def close(self, *, complete: bool = True) -> None:
        """Wait until all files are there, and mark an early end; without any ``path`` is then
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

    def _mark(self) -> None:
        mark = self._folder / self.MARK
        text = f"The run ended early: {self._written} {self.kind} were written.\n"
        try:
            write_atomic(mark, text.encode())
        except OSError as error:
            raise output_error(mark, error) from error

    def _is_taken(self) -> bool:
        return (self._folder / self.MARK).exists() or bool(self._own())

    def _own(self) -> list[Path]:
        """The files that earlier runs wrote."""
        found = self._folder.glob(f"*{self.suffix}") if self._folder.is_dir() else ()
        return sorted(filter(self._is_own, found))

    def _is_own(self, path: Path) -> bool:
        try:
            with path.open("rb") as file:
                return file.read(self.head + len(self.sign))[self.head :] == self.sign
        except OSError:
            return False

    def _begin(self) -> None:
        """Make the folder, and remove what another run left in it, before a new file is there: what
        is killed in between leaves files of one run."""
        self._created = make_folder(self._folder)
        sync_names(self._created)
        for leftover in abandoned(self._folder, f".+{re.escape(self.suffix)}"):
            leftover.unlink()
        if self._overwrite:
            for picture in self._own():
                picture.unlink()
            (self._folder / self.MARK).unlink(missing_ok=True)
            sync(self._folder)
