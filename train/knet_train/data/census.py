"""What the labels of a data folder hold as a whole, and what in it looks unlike what their owner
meant: classes without a pixel, masks of 0 and 255, most pixels ignored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from knet_train.data.label_files import label_table
from knet_train.data.layouts import Layout

MUCH = 0.3  # of the pixels ignored is worth a word
SHOWN = 6  # values, or names, in one line


class Census:
    """Pixels of each value in the label files of one split; some of them, where it has many."""

    def __init__(self, total: int) -> None:
        self.pixels: NDArray[np.int64] = np.zeros(256, np.int64)
        self.files, self.total = 0, total

    def add(self, pixels: NDArray[np.int64]) -> None:
        self.pixels += pixels
        self.files += 1

    def by_class(self, layout: Layout) -> NDArray[np.int64]:
        """Labelled pixels of each class, int64 [N]."""
        return pixels_by_class(self.pixels, layout)

    def ignored(self, layout: Layout) -> int:
        """Pixels without a label."""
        table = label_table(layout.labels, void_first=layout.void_first)
        return int(self.pixels[table == layout.labels.ignore_index].sum())


def pixels_by_class(pixels: NDArray[np.int64], layout: Layout) -> NDArray[np.int64]:
    """Pixels of each value [256] -> of each class [N]."""
    first = int(layout.void_first)
    return pixels[first : first + layout.labels.num_classes]


def single_class(layout: Layout) -> str | None:
    """Why nothing can be learnt of a label map with one class; None where it has more."""
    if layout.labels.num_classes > 1:
        return None
    name = layout.labels.names[0]
    return (
        f"{layout.root / 'labels.json'} names one class, so every pixel is {name!r}: name the "
        f'background too, ["background", "{name}"], and label it 0 and {name!r} 1'
    )


def doubts(layout: Layout, splits: Mapping[str, Census]) -> list[str]:
    """What to look at, a line each, in the labels of these splits."""
    labels = layout.labels
    found = {name: census.by_class(layout) > 0 for name, census in splits.items()}
    whole = sum((census.pixels for census in splits.values()), np.zeros(256, np.int64))
    seen = pixels_by_class(whole, layout) > 0
    lines = []
    absent = [name for name, there in zip(labels.names, seen, strict=True) if not there]
    if absent and layout.kind == "ADE20K" and not layout.named:
        present = [name for name, there in zip(labels.names, seen, strict=True) if there]
        held = f"{len(present)} of them ({names(present)})" if present else "none of them"
        lines.append(
            f"there is no labels.json, so the classes are ADE20K's 150, and the labels hold {held}"
            f"{_looked(splits.values())}: if they are your own, name them in a labels.json"
        )
    elif absent:
        lines.append(f"no label has a pixel of {names(absent)}{_looked(splits.values())}")
    if absent:
        lines += _reasons(layout, whole, bool(seen[-1]))
    for name, census in splits.items():
        if not census.files:
            continue
        missing = [
            label
            for label, here, anywhere in zip(labels.names, found[name], seen, strict=True)
            if anywhere and not here
        ]
        if missing:
            lines.append(f"split {name} has no pixel of {names(missing)}{_looked([census])}")
        share = census.ignored(layout) / max(1, int(census.pixels.sum()))
        if share >= MUCH:
            void = 0 if layout.void_first else labels.ignore_index
            lines.append(
                f"split {name}: {100 * share:.1f} % of the pixels are ignored (value {void})"
            )
    return lines


def _reasons(layout: Layout, pixels: NDArray[np.int64], last_seen: bool) -> list[str]:
    """Why a class may have no pixel although its owner drew it."""
    ignored, void_first = layout.labels.ignore_index, layout.void_first
    shifted = "in annotations/ label 0 means void and v means class v - 1: "
    if np.flatnonzero(pixels).tolist() == [0, ignored]:
        masks = f"value {ignored} is ignored; these look like 0/{ignored} masks: "
        if void_first:
            return [f"{masks}{shifted}call the folder labels/, and write 1 instead of {ignored}"]
        return [f"{masks}write 1 instead of {ignored}, or set ignore_index in labels.json"]
    if void_first and layout.named and not last_seen and pixels[0]:
        return [f"{shifted}if 0 is a class here, call the folder labels/"]
    if not void_first and pixels[ignored] >= MUCH * pixels.sum():
        return [f"value {ignored} is ignored: where it stands for a class, write its index"]
    return []


def _looked(splits: Iterable[Census]) -> str:
    counts = [(census.files, census.total) for census in splits]
    files, total = (sum(column) for column in zip(*counts, strict=True))
    return "" if files == total else f" in the {files} of {total} labels that were looked at"


def names(listed: list[str]) -> str:
    """A few of the names, and how many more there are."""
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
