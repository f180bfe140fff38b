"""Soft labels: what a teacher, a larger network, makes of images, for a smaller one to learn from
(arXiv 1503.02531).

The probabilities of an image are one 8-bit grey PNG: a map [h, w] for each of C classes, one below
the other, whose values are round(255 p). They may have any size, and are stretched over the image.
A folder of them has the names of the images: ``a/b.png`` is of ``a/b.jpg``, or, where both sides
have its stem once, of ``b.jpg`` wherever it lies. A ``labels.json`` in it names the classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from knet_runtime.errors import DataError, SourceError
from knet_runtime.sources.images import IMAGE_SUFFIXES, read_image
from knet_train.data.census import names
from knet_train.data.dataset import LabelledFolder, shown_size
from knet_train.data.drives import drive
from knet_train.data.label_files import UNREADABLE
from knet_train.data.layouts import file_key, files_by_key, keys_by_stem, load_labels_json, partner

CLASS_NAMES = "labels.json"  # of a folder of soft labels


class Unlabelled(NamedTuple):
    """An image without a label, and its soft labels."""

    image: Path
    soft: Path


@dataclass(frozen=True)
class SoftLabels:
    """Where a run has its soft labels: of its labelled images, in their order, None where there
    are none, and of images without a label. Files are read on demand."""

    classes: int
    labelled: tuple[Path | None, ...]
    unlabelled: tuple[Unlabelled, ...] = ()
    problems: tuple[str, ...] = ()  # a line each
    notices: tuple[str, ...] = ()

    def read(self, path: Path) -> NDArray[np.uint8]:
        """One file's values uint8 [C, h, w]; raises DataError."""
        return read_soft_label(path, self.classes)

    @property
    def counts(self) -> tuple[int, int]:
        """Labelled images with soft labels, and images without a label."""
        return sum(path is not None for path in self.labelled), len(self.unlabelled)

    def files(self) -> list[Path]:
        """All files of soft labels."""
        own = [path for path in self.labelled if path is not None]
        return own + [one.soft for one in self.unlabelled]


def find_soft_labels(
    folder: LabelledFolder,
    roots: Sequence[Path],
    images: Sequence[Path] = (),
    leave_out: Collection[str] = (),
) -> SoftLabels:
    """The soft labels below ``roots`` of the folder's images, and of the images without labels
    below ``images``, but for those of the drives ``leave_out``.

    What is wrong is listed in ``problems``, images without soft labels are in ``notices``.
    Raises DataError where a folder is not readable, or its classes are others.
    """
    problems: list[str] = []
    trees = []
    for root in roots:
        _check_classes(root, folder)
        maps, faults = files_by_key(root, (".png",))
        problems += faults
        trees.append((maps, keys_by_stem(maps)))
    taken: dict[Path, Path] = {}  # the image that a file is of

    def of(keys: dict[str, Path]) -> Iterator[tuple[Path, Path | None]]:
        """Images, and the file of each."""
        stems = keys_by_stem(keys)
        for key, image in keys.items():
            found = [
                maps[own]
                for maps, map_stems in trees
                if (own := partner(key, maps, stems, map_stems)) is not None
            ]
            if len(found) > 1:
                problems.append(f"{image} has soft labels in {found[0]} and {found[1]}: keep one")
            if found and (other := taken.setdefault(found[0], image)) != image:
                problems.append(
                    f"{found[0]} may be of {image} and of {other}: give the file the image's path"
                )
            yield image, found[0] if found else None

    own = {file_key(sample.image, folder.layout.images): sample.image for sample in folder.samples}
    labelled = tuple(path for _, path in of(own))
    unlabelled: list[Unlabelled] = []
    notices: list[str] = []
    soft = {path for maps, _ in trees for path in maps.values()}
    for root in images:
        known, faults = files_by_key(root, IMAGE_SUFFIXES, without=soft)
        problems += faults
        learnt = {key: path for key, path in known.items() if drive(path) not in leave_out}
        pairs = [(image, path) for image, path in of(learnt)]
        unlabelled += [Unlabelled(image, path) for image, path in pairs if path is not None]
        missing = [image.stem for image, path in pairs if path is None]
        if len(missing) == len(pairs):
            problems.append(
                f"{root} has no image with soft labels: write some with soft-labels, or leave out "
                f"--unlabelled {root}"
            )
        elif missing:
            notices.append(
                f"{len(missing)} of {len(pairs)} images of {root} have no soft labels "
                f"({names(missing)}): they are left out"
            )
    if not taken and not problems:
        problems.append(
            f"{', '.join(map(str, roots))} has soft labels of no image: their names are the images'"
        )
    lacking = [
        sample.name for sample, path in zip(folder.samples, labelled, strict=True) if path is None
    ]
    if lacking and len(lacking) < len(labelled):
        notices.append(
            f"{len(lacking)} of {len(labelled)} images of split {folder.split} have no soft labels "
            f"({names(lacking)}): their labels alone are learnt"
        )
    return SoftLabels(
        folder.labels.num_classes, labelled, tuple(unlabelled), tuple(problems), tuple(notices)
    )


def open_soft_labels(
    folder: LabelledFolder,
    roots: Sequence[Path],
    images: Sequence[Path] = (),
    leave_out: Collection[str] = (),
) -> SoftLabels:
    """``find_soft_labels``, whose files' headers fit. Raises DataError with the first problem."""
    found = find_soft_labels(folder, roots, images, leave_out)
    problems = list(found.problems)
    if not problems:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda path: _header(path, found.classes), found.files()))
            list(pool.map(shown_size, (one.image for one in found.unlabelled)))
    else:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}; see `knet-deploy data check --soft-labels`")
    return found


def check_soft_labels(found: SoftLabels, on_file: Callable[[], None] = lambda: None) -> SoftLabels:
    """Read every file, and every image without a label: what is wrong with them as further
    ``problems``, and files with pixels that have no probability in ``notices``."""

    def empty(pair: tuple[Path, Path | None]) -> float | str:
        """The share of pixels that teach nothing, or what is wrong."""
        soft, image = pair
        try:
            if image is not None:
                read_image(image)
            share = float((found.read(soft).max(0) == 0).mean())
        except (DataError, SourceError) as error:
            return str(error)
        return (
            f"{soft} holds nothing but 0: write it anew, or take it away" if share == 1 else share
        )

    pairs: list[tuple[Path, Path | None]] = [
        *((path, None) for path in found.labelled if path is not None),
        *((one.soft, one.image) for one in found.unlabelled),
    ]
    problems, shares, partly = list(found.problems), [], []
    with ThreadPoolExecutor() as pool:
        for (soft, _), share in zip(pairs, pool.map(empty, pairs), strict=True):
            on_file()
            if isinstance(share, str):
                problems.append(share)
            elif share:
                partly.append(soft.stem)
                shares.append(share)
    notices = list(found.notices)
    if partly:
        notices.append(
            f"{len(partly)} soft labels have pixels without a probability, {100 * max(shares):.2g} "
            f"% at most ({names(partly)}): they teach nothing"
        )
    return replace(found, problems=tuple(problems), notices=tuple(notices))


def read_soft_label(path: Path, classes: int) -> NDArray[np.uint8]:
    """A file of soft labels -> its values uint8 [C, h, w]. Raises DataError."""
    try:
        with Image.open(path) as opened:
            _check_shape(path, opened, classes)
            values = np.asarray(opened, np.uint8)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    return values.reshape(classes, -1, values.shape[1])


def _header(path: Path, classes: int) -> None:
    try:
        with Image.open(path) as opened:
            _check_shape(path, opened, classes)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def _check_shape(path: Path, opened: Image.Image, classes: int) -> None:
    if opened.mode != "L":
        raise DataError(f"{path} is no 8-bit grey PNG (mode {opened.mode}): soft labels are")
    if opened.height % classes:
        raise DataError(
            f"{path} has {opened.height} rows, which are not {classes} maps of equal height: soft "
            "labels have one for each class, one below the other"
        )


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"cannot read {path}: {error}; write the file again")


def _check_classes(root: Path, folder: LabelledFolder) -> None:
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: --soft-labels wants one with probability maps")
    stated = root / CLASS_NAMES
    if stated.exists() and (found := load_labels_json(stated).names) != folder.labels.names:
        raise DataError(
            f"{stated} has the classes {', '.join(found)}, and {folder.root} has "
            f"{', '.join(folder.labels.names)}: soft labels have the same, in the same order"
        )
