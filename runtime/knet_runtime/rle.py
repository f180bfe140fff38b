"""Masks as COCO's run-length encoding, compressed to text."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.types import ClassMap, Size

_GROUP, _MORE, _FIRST = 5, 0x20, 48  # bits per character, "another one follows", character of 0


class Rle(msgspec.Struct, frozen=True):
    """A mask as pycocotools takes it: ``size`` (height, width), ``counts`` compressed to ASCII."""

    size: Size
    counts: str


def rles_of(ids: ClassMap, wanted: Iterable[int]) -> dict[int, tuple[Rle, int]]:
    """The mask and the area in pixels of each of ``wanted`` that is in ``ids`` [H, W], in order.

    ``ids`` is a class map or a segment map. Masks run down the columns, and lengths begin with what
    is outside of the mask, as COCO has it (``cocoapi/common/maskApi.c``).
    """
    height, width = ids.shape
    flat = np.ascontiguousarray(ids.T).ravel()
    if not flat.size:
        return {}
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(starts[1:], flat.size)
    values = flat[starts]
    found = {}
    for index in wanted:
        runs = np.flatnonzero(values == index)
        if not runs.size:
            continue
        begin, end = starts[runs], ends[runs]
        bounds = np.empty(2 * runs.size + 1, np.int64)
        bounds[0:-1:2], bounds[1:-1:2], bounds[-1] = begin, end, flat.size
        lengths = np.diff(bounds, prepend=0)
        if not lengths[-1]:  # the mask reaches the last pixel
            lengths = lengths[:-1]
        found[index] = (Rle((height, width), compress(lengths)), int((end - begin).sum()))
    return found


def run_lengths(flat: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The run lengths of a flat mask, not empty; the first is of what is outside of it.

    >>> import numpy as np
    >>> run_lengths(np.array([True, True, False, True])).tolist()
    [0, 2, 1, 1]
    """
    bounds = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], bounds, [flat.size]]))
    return np.append(0, lengths) if flat[0] else lengths


def compress(lengths: NDArray[np.int64]) -> str:
    """Run lengths as COCO's text.

    From the fourth on, each stands as its difference to the one two before. A number is written in
    groups of five bits, lowest first, as many as two's complement takes; a sixth bit says whether
    another group follows; 48 is added to make it a character.
    """
    numbers = lengths.copy()
    numbers[3:] -= lengths[1:-2]
    groups = 1
    while not _fits(numbers, groups).all():
        groups += 1
    shifts = _GROUP * np.arange(groups)
    characters = (numbers[:, None] >> shifts) & (2**_GROUP - 1)
    needed = np.ones(len(numbers), np.int64)
    for count in range(1, groups):
        needed += ~_fits(numbers, count)
    place = np.arange(groups)
    characters += np.where(place + 1 < needed[:, None], _MORE, 0) + _FIRST
    return str(characters[place < needed[:, None]].astype(np.uint8).tobytes(), "ascii")


def _fits(numbers: NDArray[np.int64], groups: int) -> NDArray[np.bool_]:
    half = 1 << (_GROUP * groups - 1)
    return np.asarray((numbers >= -half) & (numbers < half))
