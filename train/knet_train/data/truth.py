"""What is in a labelled image, object by object."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from knet_runtime.panoptic_quality import SegmentIds
from knet_train.data.regions import Region

VOID, BACKGROUND = -2, -1
"""In maps of classes: of which nothing is known, and what is known to be no class."""

IGNORED = "__ignore__"
"""The label of objects of which nothing is known, in formats that have only objects."""


class Truth(NamedTuple):
    """The segments of one image: objects of things, and a segment for each class of stuff.

    ``ids`` uint16 [L, H, W] holds 1 … S, and 0 where there is none. What overlaps lies in a layer
    further down, so that a segment is whole in one of them; mostly L is 1. ``classes`` [S] are the
    segments' classes, ``crowds`` the ids of those that are many objects in one. ``void`` bool
    [H, W] are the pixels of which nothing is known: unlabelled, or of what is no class.
    """

    ids: NDArray[np.uint16]
    classes: tuple[int, ...]
    crowds: frozenset[int]
    void: NDArray[np.bool_]

    def flat(self) -> SegmentIds:
        """One layer, as panoptic quality wants it: the first layer lies on top."""
        ids = self.ids[0].copy()
        for layer in self.ids[1:]:
            np.copyto(ids, layer, where=ids == 0)
        return SegmentIds(ids, self.classes, self.crowds)


def layered(
    regions: Iterable[tuple[int, bool, Region]], size: tuple[int, int], void: NDArray[np.bool_]
) -> Truth:
    """The truth of (class, crowd, region), in this order, on an image of ``size``; regions without
    a pixel are left out. One is looked at at a time."""
    layers: list[NDArray[np.uint16]] = [np.zeros(size, np.uint16)]
    classes: list[int] = []
    crowds = set()
    for class_id, crowd, region in regions:
        if not region.mask.any():
            continue
        classes.append(class_id)
        rows, columns = region.place
        for layer in layers:
            if not layer[rows, columns][region.mask].any():
                break
        else:
            layer = np.zeros(size, np.uint16)
            layers.append(layer)
        layer[rows, columns][region.mask] = len(classes)
        if crowd:
            crowds.add(len(classes))
    return Truth(np.stack(layers), tuple(classes), frozenset(crowds), void)


def from_map(
    values: NDArray[np.uint32], segments: Sequence[tuple[int, int | None, bool]]
) -> tuple[Truth, list[int]]:
    """The truth of a map [H, W] of any ids: ``segments`` are (id, class, crowd), where None is no
    class; 0 and such segments are void. Also the ids that no segment has."""
    known = {value: (class_id, crowd) for value, class_id, crowd in segments}
    flat = values.ravel()
    # The first pixels of runs along the rows are few; to sort all pixels takes ten times as long.
    starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1])[: flat.size])
    found, inverse = np.unique(flat[starts], return_inverse=True)
    table = np.zeros(len(found), np.uint16)
    classes: list[int] = []
    crowds, strange = set(), []
    for place, value in enumerate(found.tolist()):
        if value and value not in known:
            strange.append(value)
        class_id, crowd = known.get(value, (None, False))
        if class_id is None:
            continue
        classes.append(class_id)
        table[place] = len(classes)
        if crowd:
            crowds.add(len(classes))
    ids = np.repeat(table[inverse], np.diff(starts, append=flat.size)).reshape(values.shape)
    return Truth(ids[None], tuple(classes), frozenset(crowds), ids == 0), strange


def from_classes(
    classes: NDArray[np.int64], ids: NDArray[np.uint16], things: Collection[int]
) -> Truth:
    """The truth of a map of classes (or VOID, or BACKGROUND) and one of objects' numbers, both
    [H, W]. A class of stuff is one segment, and a thing one for each of its numbers; those of
    number 0 are a crowd."""
    is_thing = np.zeros(int(classes.max(initial=0)) - VOID + 1, np.bool_)
    is_thing[[one - VOID for one in things if one - VOID < len(is_thing)]] = True
    own = np.where(is_thing[classes - VOID], ids, 0)
    numbers = np.flatnonzero(np.bincount(own.ravel(), minlength=1))
    rank = np.zeros(65536, np.int64)
    rank[numbers] = np.arange(len(numbers))
    codes = (classes - VOID) * len(numbers) + rank[own]
    table = np.zeros(len(is_thing) * len(numbers), np.uint16)
    segments: list[int] = []
    crowds = set()
    for code in np.flatnonzero(np.bincount(codes.ravel(), minlength=1)).tolist():
        place, number = divmod(code, len(numbers))
        class_id = place + VOID
        if class_id < 0:
            continue
        segments.append(class_id)
        table[code] = len(segments)
        if class_id in things and numbers[number] == 0:
            crowds.add(len(segments))
    ids = table[codes]
    return Truth(ids[None], tuple(segments), frozenset(crowds), classes == VOID)
