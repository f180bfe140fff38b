"""An image, or a folder of them, as a source of frames."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from knet_runtime.errors import SourceError
from knet_runtime.frames import Frame, SourceInfo
from knet_runtime.source.image_file import read_image
from knet_runtime.source.source_options import SourceOptions, SourceStatus

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def list_images(folder: Path) -> list[Path]:
    """The images of a folder by natural order of name ("a2" before "a10").

    An image is a file with one of ``IMAGE_SUFFIXES``, in any case. Other files, hidden files and
    sub-folders are left out. Raises SourceError when the folder can not be read or has no image.
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
        extensions = " ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        raise SourceError(
            f"{folder}: has no images; put files with these extensions directly in it: {extensions}"
        )
    return sorted(found, key=_natural_key)


def _natural_key(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", path.name)  # text at even places, digits at odd ones
    return [int(p) if i % 2 else p.casefold() for i, p in enumerate(parts)], path.name


def frame_names(paths: list[Path]) -> list[str]:
    """A name per image that no other has: its stem, or the whole file name where stems repeat."""
    stems = Counter(path.stem for path in paths)
    names = [path.name if stems[path.stem] > 1 else path.stem for path in paths]
    # a.jpg, a.png and a.png.png: the last one's stem is the second one's file name.
    return names if len(set(names)) == len(names) else [path.name for path in paths]


class ImageSource:
    """Frames from image files; a context manager. They have no time: ``pts`` and ``rate`` are None.

    ``path`` is an image or a folder (see ``list_images``), of which each ``options.every``-th is
    read. Raises SourceError when it can not be read, from the constructor for the first image, else
    while iterating.
    """

    def __init__(self, path: Path, options: SourceOptions | None = None) -> None:
        folder = path.is_dir()
        paths = list_images(path) if folder else [path]
        names = frame_names(paths)
        every = 1 if options is None else options.every
        paths, names = paths[::every], names[::every]
        self._stopped = False
        first = read_image(paths[0])
        height, width = first.shape[:2]
        self._info = SourceInfo(
            kind="images" if folder else "image",
            hw=(height, width),
            rate=None,
            frames=len(paths),
            path=path,
        )
        self._first = Frame(first, 0, None, names[0])
        self._frames = self._read(paths, names)

    @property
    def info(self) -> SourceInfo:
        """What is known beforehand; ``frames`` is the number of images."""
        return self._info

    @property
    def status(self) -> SourceStatus:
        """Always connected."""
        return SourceStatus()

    def _read(self, paths: list[Path], names: list[str]) -> Iterator[Frame]:
        yield self._first
        for index, (path, name) in enumerate(zip(paths, names, strict=True)):
            if self._stopped:
                return
            if index > 0:
                yield Frame(read_image(path), index, None, name)

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def stop(self) -> None:
        """End the iteration, from any thread."""
        self._stopped = True

    def close(self) -> None:
        """End the frames; no file stays open between them anyway."""
        self._frames = iter(())

    def __enter__(self) -> ImageSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
