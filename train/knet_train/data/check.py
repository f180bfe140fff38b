"""The dataset doctor: every fault of a data folder, and what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import msgspec
import numpy as np

from knet_runtime.atomic import json_bytes
from knet_runtime.errors import DataError, SourceError
from knet_runtime.sources.images import read_image
from knet_train.data.census import SHOWN, Census, doubts, pixels_by_class, single_class
from knet_train.data.dataset import LabelledFolder, sizes_differ
from knet_train.data.label_files import (
    LabelCount,
    Palettes,
    allowed_values,
    count_label,
    label_table,
    outside_values,
)
from knet_train.data.layouts import Layout, Listing, Sample, find_layout, list_split, split_names
from knet_train.data.soft_labels import SoftLabels

WORKERS = 8  # images in memory at a time


class Outside(msgspec.Struct, frozen=True):
    """A value of a label file that is neither a class nor ignored."""

    file: str
    value: int
    pixels: int


class ClassCount(msgspec.Struct, frozen=True):
    """How often a class is labelled."""

    name: str
    pixels: int
    images: int
    objects: int | None = None  # of a thing, crowds not counted; None for stuff and class maps


class ImageSize(msgspec.Struct, frozen=True):
    """How many images have this size."""

    height: int
    width: int
    images: int


class ObjectCount(msgspec.Struct, frozen=True):
    """What there is of things. ``vanishing`` objects have no pixel at a quarter of the size that
    the preset ``judged_by`` trains at."""

    objects: int
    crowds: int  # regions of many objects; they count as no object
    most: int  # in one image
    vanishing: int
    judged_by: str


class DataReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a data folder holds; ``problems`` must be fixed, ``warnings`` looked at."""

    root: str
    layout: str
    splits: dict[str, int]
    images: int
    sizes: tuple[ImageSize, ...]  # the most frequent first
    classes: tuple[ClassCount, ...]
    labelled_pixels: int
    ignored_pixels: int
    outside: tuple[Outside, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    objects: ObjectCount | None = None  # of labelled objects; None for class maps
    soft_labels: int | None = None  # files of them, where they were asked for


@dataclass(frozen=True)
class Survey:
    """The pairs of a data folder as it lists them, none of them read yet."""

    layout: Layout
    listings: dict[str, Listing]

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The pairs of all splits, each once."""
        every = (sample for listing in self.listings.values() for sample in listing.samples)
        return tuple(dict.fromkeys(every))

    def folder(self, split: str) -> LabelledFolder:
        """The pairs of a split. Raises DataError when there is no such split."""
        return LabelledFolder(self.layout, split, list_split(self.layout, split).samples)


def survey(root: Path, split: str | None = None) -> Survey:
    """List one split, or all that there are. Raises DataError when nothing can be listed."""
    layout = find_layout(root)
    names = split_names(layout) if split is None else [split]
    listings = {name: list_split(layout, name) for name in names}
    if not any(listing.samples or listing.problems for listing in listings.values()):
        raise DataError(f"{root} has no image in {', '.join(names) or 'any split'}: add some")
    return Survey(layout, listings)


def check(
    found: Survey, on_pair: Callable[[], None] = lambda: None
) -> tuple[DataReport, tuple[Sample, ...]]:
    """Read every pair, several at a time; the report, and the pairs without a fault.

    Nothing is kept of an image but its counts.
    """
    layout, labels = found.layout, found.layout.labels
    table = label_table(labels, void_first=layout.void_first)
    allowed = allowed_values(labels, void_first=layout.void_first)
    listed = (line for listing in found.listings.values() for line in listing.problems)
    problems = list(dict.fromkeys(filter(None, [single_class(layout), *listed])))
    outside, good = [], []
    sizes: Counter[tuple[int, int]] = Counter()
    whole, images = Census(len(found.samples)), np.zeros(labels.num_classes, int)
    splits = {name: Census(len(listing.samples)) for name, listing in found.listings.items()}
    palettes, void = Palettes(layout), []
    members = _members(found)
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            readings = pool.map(_read, found.samples)
            for sample, (size, count, faults) in zip(found.samples, readings, strict=True):
                on_pair()
                if size is not None:
                    sizes[size] += 1
                if count is not None:
                    counted = pixels_by_class(count.pixels, layout)
                    images += counted > 0
                    for census in (whole, *(splits[name] for name in members[sample])):
                        census.add(count.pixels)
                    strange = [
                        Outside(str(sample.label), value, int(count.pixels[value]))
                        for value in outside_values(count.pixels, table)
                    ]
                    outside += strange
                    if strange:
                        faults.append(f"{sample.label} holds {_listed(strange)}; {allowed}")
                    elif not counted.any():
                        void.append(sample.name)
                    faults += filter(None, [palettes.fault(sample.label, count)])
                problems += faults
                if not faults:
                    good.append(sample)
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C nothing more is read
    paths = {path for listing in found.listings.values() for path in listing.unused}
    unused = [path.name for path in sorted(paths)]
    pixels = whole.by_class(layout)
    classes = zip(labels.names, pixels.tolist(), images.tolist(), strict=True)
    report = DataReport(
        root=str(layout.root),
        layout=layout.kind,
        splits={name: len(listing.samples) for name, listing in found.listings.items()},
        images=len(found.samples),
        sizes=tuple(ImageSize(*size, times) for size, times in sizes.most_common()),
        classes=tuple(ClassCount(*row) for row in classes),
        labelled_pixels=int(pixels.sum()),
        ignored_pixels=whole.ignored(layout),
        outside=tuple(outside),
        problems=tuple(problems),
        warnings=(
            *leaks({name: [s.name for s in one.samples] for name, one in found.listings.items()}),
            *some(unused, "labels have no image"),
            *some(void, "images have no labelled pixel"),
            *(doubts(layout, splits) if whole.files else ()),
        ),
    )
    return report, tuple(good)


def with_soft_labels(report: DataReport, soft: SoftLabels) -> DataReport:
    """The report with what ``check_soft_labels`` found."""
    return msgspec.structs.replace(
        report,
        soft_labels=len(soft.files()),
        problems=(*report.problems, *soft.problems),
        warnings=(*report.warnings, *soft.notices),
    )


def encode_report(report: DataReport) -> bytes:
    """The report as JSON."""
    return msgspec.json.format(json_bytes(report)) + b"\n"


def _members(found: Survey) -> dict[Sample, list[str]]:
    """The splits that each pair is in."""
    members: dict[Sample, list[str]] = {}
    for name, listing in found.listings.items():
        for sample in listing.samples:
            members.setdefault(sample, []).append(name)
    return members


def _read(sample: Sample) -> tuple[tuple[int, int] | None, LabelCount | None, list[str]]:
    """The image's (height, width), what the label file holds, and the faults."""
    problems: list[str] = []
    size = count = None
    try:
        image = read_image(sample.image)
        size = image.shape[0], image.shape[1]
    except SourceError as error:
        problems.append(str(error))
    try:
        count = count_label(sample.label)
    except DataError as error:
        problems.append(str(error))
    if size is not None and count is not None and size != count.shape:
        problems.append(sizes_differ(sample, count.shape, size))
    return size, count, problems


def _listed(strange: list[Outside]) -> str:
    shown = ", ".join(f"{one.value} ({one.pixels} pixels)" for one in strange[:SHOWN])
    more = len(strange) - SHOWN
    return f"label {shown}" + (f" and {more} more values" if more > 0 else "")


def leaks(splits: Mapping[str, Sequence[str]]) -> list[str]:
    """Images that are both learnt from and scored on; ``splits`` are their images' names."""
    warnings = []
    for one, other in combinations(sorted(splits), 2):
        learnt = set(splits[one])
        both = [name for name in splits[other] if name in learnt]
        if both and _scores(one, other):
            (shared,) = some(both, "images")
            warnings.append(
                f"{one} and {other} share {shared}: a score on images that were learnt says nothing"
            )
    return warnings


def _scores(one: str, other: str) -> bool:
    """Whether two splits are the two sides of one division: train and val, blocked_train and
    blocked_val, training and validation. Other pairs may well overlap."""
    sides = []
    for name in (one, other):
        kind = next((kind for kind in ("train", "val", "test") if kind in name), "")
        stem = name.replace("training", "").replace("validation", "")
        sides.append((kind, stem.replace(kind, "") if kind else name))
    (kind, rest), (other_kind, other_rest) = sides
    return bool(kind and other_kind) and kind != other_kind and rest == other_rest


def some(names: list[str], what: str) -> list[str]:
    """One text that counts the names and gives the first of them; none for no names."""
    more = ", …" if len(names) > SHOWN else ""
    return [f"{len(names)} {what} ({', '.join(names[:SHOWN])}{more})"] if names else []
