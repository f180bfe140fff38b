"""The pictures that verify compares on: a split of a labelled data folder, or a folder of images.

Labels need pillow; PyTorch is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from knet_export.verify.verify import Picture
from knet_runtime.bundle.store import Bundle
from knet_runtime.errors import ConfigError, DataError, SourceError
from knet_runtime.sources.images import frame_names, list_images, read_image

if TYPE_CHECKING:
    from knet_train.data.dataset import LabelledFolder


@dataclass(frozen=True)
class VerifyData:
    """Pictures by name; ``name`` is the whole's."""

    name: str
    names: tuple[str, ...]
    images: tuple[Path, ...]
    folder: LabelledFolder | None

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Picture]:
        """Read one at a time. Raises SourceError or DataError that names a broken file."""
        if self.folder is not None:
            yield from pictures(self.folder)
            return
        for path in self.images:
            yield read_image(path), None


def open_data(path: Path, split: str, bundle: Bundle) -> VerifyData:
    """The ``split`` of a data folder with labels (see ``knet_train.data.layouts``), or else the
    images that lie directly in ``path``. Raises DataError when there are none, or for other
    classes."""
    if not path.is_dir():
        raise DataError(f"--data {path} is not a folder: name one with pictures")
    if any((path / inner).is_dir() for inner in ("images", "leftImg8bit")):
        folder = _open_labelled(path, split)
        check_labels(bundle, folder)
        return VerifyData(
            f"{path.resolve().name}, split {split}",
            tuple(sample.name for sample in folder.samples),
            tuple(sample.image for sample in folder.samples),
            folder,
        )
    if split != "val":
        raise ConfigError(f"--split {split}: {path} is a folder of images, which has no splits")
    try:
        images = list_images(path)
    except SourceError as error:
        raise DataError(f"--data {error}, or name a data set with images/ and labels/") from error
    return VerifyData(path.resolve().name, tuple(frame_names(images)), tuple(images), None)


def _open_labelled(path: Path, split: str) -> LabelledFolder:
    try:
        from knet_train.data.dataset import open_folder
    except ModuleNotFoundError as error:
        if error.name != "PIL":
            raise
        raise DataError(
            f"--data {path} has labels, which need pillow to be read: pip install pillow"
        ) from error
    return open_folder(path, split)


def pictures(folder: LabelledFolder) -> Iterator[Picture]:
    """The labelled pictures of a split, read one at a time."""
    for index in range(len(folder)):
        yield folder.read(index)


def check_labels(bundle: Bundle, folder: LabelledFolder) -> None:
    """Refuse data of another task: DataError unless classes and ignore index are the bundle's."""
    ours = bundle.manifest.labels
    if (ours.names, ours.ignore_index) != (folder.labels.names, folder.labels.ignore_index):
        raise DataError(
            f"{folder.root / 'labels.json'} has other classes than {bundle.path} "
            f"({folder.labels.num_classes} against {ours.num_classes}, or other names): "
            "verify with the data set that the model was trained for"
        )
