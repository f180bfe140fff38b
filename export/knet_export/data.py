"""Images to calibrate and to verify with: a split of a labelled data set, or a folder of images.

Labels need pillow; PyTorch is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knet_runtime.errors import DataError, SourceError
from knet_runtime.labels import LabelMap
from knet_runtime.sources.images import frame_names, list_images, read_image
from knet_runtime.types import Rgb, Task, as_utf8
from knet_train.data.layouts import coco_files

if TYPE_CHECKING:
    from knet_train.data.dataset import LabelledFolder
    from knet_train.data.segment_folder import SegmentFolder

LabelledImage = tuple[Rgb, Any]
"""uint8 [H, W, 3] RGB; its label where it has one, or None. That is uint8 [H, W], classes or the
ignore index; for a network for segments it is a ``Truth``."""


@dataclass(frozen=True)
class ImageSet:
    """Images by name, read one at a time; ``name`` is the whole's, ``folder`` has the labels."""

    name: str
    names: tuple[str, ...]
    images: tuple[Path, ...]
    folder: LabelledFolder | SegmentFolder | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[LabelledImage]:
        return (self.read(index) for index in range(len(self)))

    def read(self, index: int) -> LabelledImage:
        """One image and its label. Raises SourceError or DataError that names a broken file."""
        if self.folder is not None:
            return self.folder.read(index)
        return read_image(self.images[index]), None


def open_images(
    path: Path, split: str, labels: LabelMap, option: str = "--data", *, task: Task = "semantic"
) -> ImageSet:
    """The ``split`` of a data set (see ``knet_train.data.layouts``), or else the images that lie
    directly in ``path``. Raises DataError, which names the ``option``, when there are none, or as
    ``open_labelled``."""
    if not path.is_dir():
        raise DataError(f"{option} {path} is not a folder: name one with images")
    labelled = any((path / inner).is_dir() for inner in ("images", "leftImg8bit"))
    if labelled or (task != "semantic" and coco_files(path)):
        return open_labelled(path, split, labels, option, task=task)
    try:
        images = list_images(path)
    except SourceError as error:
        raise DataError(f"{option} {error}, or name a data set with images/ and labels/") from error
    return ImageSet(as_utf8(path.resolve().name), tuple(frame_names(images)), tuple(images))


def open_labelled(
    path: Path, split: str, labels: LabelMap, option: str = "--data", *, task: Task = "semantic"
) -> ImageSet:
    """The ``split`` of a data set. Raises DataError when it is empty or broken, and unless it is
    labelled with the classes of ``labels``, and with class maps their ignore index."""
    folder: LabelledFolder | SegmentFolder
    try:
        if task == "semantic":
            from knet_train.data.dataset import open_folder

            folder = open_folder(path, split)
        else:
            from knet_train.data.segments import open_segments

            folder = open_segments(path, split, task)
    except ModuleNotFoundError as error:
        package = {"PIL": "pillow", "pycocotools": "pycocotools"}.get(error.name or "")
        if package is None:
            raise
        raise DataError(
            f"{option} {path} has labels, which need {package} to be read: pip install {package}"
        ) from error
    if problem := _difference(folder.labels, labels, task):
        raise DataError(
            f"{path / 'labels.json'} has other classes than the model: {problem}; "
            "use the data set that the model was trained for"
        )
    return ImageSet(
        as_utf8(f"{path.resolve().name}, split {split}"),
        tuple(as_utf8(sample.name) for sample in folder.samples),
        tuple(sample.image for sample in folder.samples),
        folder,
    )


def _difference(found: LabelMap, wanted: LabelMap, task: Task) -> str | None:
    if found.num_classes != wanted.num_classes:
        return f"{found.num_classes} instead of {wanted.num_classes}"
    for name, other in zip(found.names, wanted.names, strict=True):
        if name != other:
            return f"{name!r} instead of {other!r}"
    if task == "semantic" and found.ignore_index != wanted.ignore_index:
        return f"the ignore index {found.ignore_index} instead of {wanted.ignore_index}"
    return None
