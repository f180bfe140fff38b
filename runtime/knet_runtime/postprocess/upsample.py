"""Planes of low resolution at the frame's size, without ever holding them there: which of them is
the highest at each pixel, and where one of them passes a threshold.

A resized pixel is a convex combination of few neighbouring numbers, so most of a frame is decided
by the least and the largest of those; only what is left is computed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from knet_runtime.types import ClassMap

_CHUNK = 2**17  # numbers: half a megabyte of float32 stays in a core's cache


def upsampled_argmax(
    logits: NDArray[np.float32],
    size: tuple[int, int],
    via: tuple[int, int] | None = None,
    window: tuple[int, int, int, int] | None = None,
) -> ClassMap:
    """The class map [H, W] = ``size`` of float32 [N, h, w] logits: uint8, or uint16 when N > 256.

    It is the map that bilinear resizing (half-pixel centres, two taps per axis, no antialiasing:
    PyTorch's ``interpolate(mode="bilinear", align_corners=False)``) and then argmax gives, without
    ever holding N×H×W numbers. It equals the map computed in exact arithmetic wherever the two
    largest logits differ by more than float32 rounding (about 1e-6 of their size). PyTorch rounds
    its coordinates to float32, so at ratios that are no binary fraction about one pixel in a
    million differs from PyTorch's own map. The lowest class wins a tie; infinity counts as 1e38.

    ``via`` (height, width) is a size that the logits are resized to first, at least their own:
    mmsegmentation goes to the network's input size and from there to the image's. ``window`` (top,
    left, height, width) is the part of that size that the image fills, if not all of it.
    Raises ValueError when they are not float32 [N, h, w] or hold NaN, or when ``size`` is empty.
    """
    if logits.ndim != 3 or logits.dtype != np.float32 or logits.size == 0:
        raise ValueError(f"logits must be float32 [N, h, w], not {logits.dtype} {logits.shape}")
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"a class map of {height}×{width} holds no pixel")
    if via is not None and (via[0] < logits.shape[1] or via[1] < logits.shape[2]):
        raise ValueError(f"logits {logits.shape} cannot go through a smaller size, {via}")
    logits = np.ascontiguousarray(logits)
    low = (logits.shape[1], logits.shape[2])
    via = via or low
    top, left, tall, wide = window or (0, 0, *via)
    reach = 2 if via == low or (via == size == (tall, wide)) else 3
    classes, where = candidates(logits, reach)
    rows = _axis(low[0], via[0], (top, tall), height, reach)
    columns = _axis(low[1], via[1], (left, wide), width, reach)
    blocks = rows.block[:, None] * logits.shape[2] + columns.block
    # Right wherever a block has one candidate, as most have.
    highest = (where * classes[:, None]).max(0)
    winner: ClassMap = highest[blocks].take(columns.patch, 1).take(rows.patch, 0)
    many = where.view(np.uint8).sum(0, dtype=np.uint8 if len(classes) < 256 else np.uint16)
    many = many[blocks.ravel()]
    contested = np.flatnonzero(many > 1)
    # The most candidates first: whichever patches have a third one, say, are then a prefix.
    contested = contested[np.argsort(~many[contested], kind="stable")]
    pixels = len(rows.pixel) * len(columns.pixel)
    while len(contested):
        count = max(1, _CHUNK // max(pixels, int(many[contested[0]])))
        some, contested = contested[:count], contested[count:]
        down, across = np.divmod(some, len(columns.block))
        block = blocks.ravel()[some]
        shares = rows.share.take(down, 2), columns.share.take(across, 2)
        won = _contest(logits, block, classes, where.take(block, 1), *shares)
        at = (rows.pixel.take(down, 1) * width)[:, None] + columns.pixel.take(across, 1)
        winner.reshape(-1)[at.ravel()] = won.ravel()
    return winner


class UpsampledMask(NamedTuple):
    """Where a plane is high: ``mask`` bool [h, w] with its first pixel at (left, top)."""

    left: int
    top: int
    mask: NDArray[np.bool_]


def upsampled_masks(
    planes: NDArray[np.float32],
    threshold: float,
    size: tuple[int, int],
    via: tuple[int, int] | None = None,
    window: tuple[int, int, int, int] | None = None,
) -> list[UpsampledMask | None]:
    """Where each of float32 [N, h, w], resized as ``upsampled_argmax`` resizes, is above
    ``threshold``: in a box around it, or None where it is nowhere. Nothing is held at the frame's
    size but these boxes. Raises ValueError for NaN."""
    low = (planes.shape[1], planes.shape[2])
    via = via or low
    top, left, tall, wide = window or (0, 0, *via)
    reach = 2 if via == low or (via == size == (tall, wide)) else 3
    rows = _axis(low[0], via[0], (top, tall), size[0], reach)
    columns = _axis(low[1], via[1], (left, wide), size[1], reach)
    return [_mask_above(plane, np.float32(threshold), rows, columns, reach) for plane in planes]


def _mask_above(
    plane: NDArray[np.float32], threshold: np.float32, rows: _Axis, columns: _Axis, reach: int
) -> UpsampledMask | None:
    flat = np.ascontiguousarray(plane)[None]
    if np.isnan(flat).any():
        raise ValueError("masks hold NaN: the model or its engine is broken")
    possible = _of_blocks(np.maximum, flat, reach)[rows.block][:, columns.block] > threshold
    if not possible.any():
        return None
    y, x = _extent(possible, 1), _extent(possible, 0)
    block = rows.block[y, None] * plane.shape[1] + columns.block[x]
    certain = _of_blocks(np.minimum, flat, reach).reshape(-1)[block] > threshold
    first = int(rows.pixel[0, y.start]), int(columns.pixel[0, x.start])
    last = int(rows.pixel[-1, y.stop - 1]) + 1, int(columns.pixel[-1, x.stop - 1]) + 1
    down = rows.patch[first[0] : last[0]] - y.start
    across = columns.patch[first[1] : last[1]] - x.start
    mask = certain.take(across, 1).take(down, 0)
    at_row, at_column = np.nonzero(possible[y, x] & ~certain)
    height, width = plane.shape
    taps = np.minimum(np.arange(reach), height - 1)[:, None] * width
    taps = taps + np.minimum(np.arange(reach), width - 1)
    corners = flat.reshape(-1)[taps[..., None] + block[at_row, at_column]]
    lines = _mix(rows.share[..., y].take(at_row, 2), corners)
    values = _mix(columns.share[..., x].take(at_column, 2), lines)
    pixel_rows = rows.pixel[:, y].take(at_row, 1) - first[0]
    pixel_columns = columns.pixel[:, x].take(at_column, 1) - first[1]
    mask[pixel_rows[:, None], pixel_columns] = values > threshold
    return UpsampledMask(first[1], first[0], mask)


def _extent(there: NDArray[np.bool_], axis: int) -> slice:
    """From the first to the last line, across ``axis``, that holds any."""
    lines = np.flatnonzero(there.any(axis))
    return slice(int(lines[0]), int(lines[-1]) + 1)


def _of_blocks(pick: np.ufunc, plane: NDArray[np.float32], reach: int) -> NDArray[np.float32]:
    """``pick`` over each block of ``plane`` [1, h, w], where it begins, as [h, w]; what stands
    where no block begins means nothing."""
    found = np.empty(plane.shape[1:], np.float32)
    over = _over_blocks(pick, plane, reach)[0]
    found.reshape(-1)[: len(over)] = over
    return found


def candidates(logits: NDArray[np.float32], reach: int = 2) -> tuple[ClassMap, NDArray[np.bool_]]:
    """The classes of float32 [N, h, w] that can win anywhere after resizing, and where.

    A resized pixel is a convex combination of the corners of one 2×2 block (``reach`` 3, when it is
    resized twice: of one 3×3 block). So a class wins there only if its largest corner reaches the
    largest of all classes' smallest corners; a class that does so in no block is left out.

    The classes [K] ascend, uint8 or uint16 when N > 256. The map of where is bool [K, blocks]: the
    block whose first corner is y, x stands at y · w + x. What stands where no block begins, at the
    end of a row, means nothing. Raises ValueError for NaN.
    """
    step = max(1, _CHUNK // logits[0].size)
    chunks = [logits[start : start + step] for start in range(0, len(logits), step)]
    floor = _over_blocks(np.minimum, chunks[0], reach).max(0)
    for chunk in chunks[1:]:
        np.maximum(floor, _over_blocks(np.minimum, chunk, reach).max(0), out=floor)
    if np.isnan(floor).any():  # the minimum of anything and NaN is NaN: none can hide from this
        raise ValueError("logits hold NaN: the model or its engine is broken")
    classes, where = [], []
    for start, chunk in zip(range(0, len(logits), step), chunks, strict=True):
        reaches = _over_blocks(np.maximum, chunk, reach) >= floor
        some = np.flatnonzero(reaches.any(1))
        classes.append(start + some)
        where.append(reaches[some])
    found = np.concatenate(classes)
    narrow: ClassMap = found.astype(np.uint8) if len(logits) <= 256 else found.astype(np.uint16)
    return narrow, np.concatenate(where)


def _over_blocks(pick: np.ufunc, planes: NDArray[np.float32], reach: int) -> NDArray[np.float32]:
    """``pick`` (minimum or maximum) over the ``reach`` × ``reach`` block that begins at each number
    of [N, h, w], as [N, blocks]; rows run on into one another, which is twice as fast."""
    height, width = planes.shape[1:]
    flat = planes.reshape(len(planes), -1)
    for side, step in ((height, width), (width, 1)):
        for _ in range(min(reach, side) - 1):
            flat = pick(flat[:, :-step], flat[:, step:])
    return flat


class _Axis(NamedTuple):
    """One axis of an upsampling, cut into patches: up to F neighbouring pixels that read the same
    T neighbouring logits. A patch that has fewer repeats its last pixel."""

    block: NDArray[np.intp]  # [patches]: the first logit of each patch
    patch: NDArray[np.intp]  # [pixels]: the patch of each pixel
    pixel: NDArray[np.intp]  # [F, patches]: the pixels of each patch
    share: NDArray[np.float32]  # [T, F, patches]: how much of each logit is in each pixel


@lru_cache(maxsize=32)
def _axis(low: int, via: int, window: tuple[int, int], high: int, reach: int) -> _Axis:
    """The axis that is resized from ``low`` logits to ``via``, and its ``window`` (start, length)
    to ``high``; a pixel reads T = ``reach`` logits, the last ones beyond the edge if there are
    fewer."""
    shares = np.eye(low, max(low, reach))
    start, length = window
    shares = resizing(shares, via)[start : start + length]
    shares = resizing(shares, high)
    block = np.minimum((shares > 0).argmax(1), shares.shape[1] - reach)
    longest = -(-high // low)
    opens = (np.arange(high) - np.searchsorted(block, block)) % longest == 0
    first = np.flatnonzero(opens)
    pixel = np.minimum(first + np.arange(longest)[:, None], np.append(first[1:], high) - 1)
    block = block[first]
    share = np.stack([shares[pixel, block + tap] for tap in range(reach)])
    return _Axis(block, np.cumsum(opens) - 1, pixel, share.astype(np.float32))


def resizing(rows: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Rows [h, n] to [``side``, n], bilinearly with half-pixel centres."""
    last = len(rows) - 1
    at = np.clip((np.arange(side) + 0.5) * (len(rows) / side) - 0.5, 0, last)
    lower = at.astype(np.intp)
    upper = (at - lower)[:, None]
    mixed: NDArray[np.float64] = (
        rows[lower] * (1 - upper) + rows[np.minimum(lower + 1, last)] * upper
    )
    return mixed


def _contest(
    logits: NDArray[np.float32],
    block: NDArray[np.intp],
    classes: ClassMap,
    where: NDArray[np.bool_],
    tall: NDArray[np.float32],
    wide: NDArray[np.float32],
) -> NDArray[Any]:
    """The classes [F, F', P] that win the pixels of P patches.

    Each patch's logits begin at ``block`` [P] in a plane; ``where`` [K, P] says which of
    ``classes`` [K] are its candidates, no patch having more than the one before; ``tall`` [T, F, P]
    and ``wide`` [T', F', P] are the shares of rows and columns.
    """
    patch, which = np.divmod(np.flatnonzero(where.T), len(classes))
    many = np.bincount(patch)
    # All first candidates, then all second ones, and so on: each a prefix of the patches.
    rank = (np.arange(len(patch)) - (many.cumsum() - many)[patch]).astype(np.uint16)
    order = np.argsort(rank, kind="stable")
    patch, rivals = patch[order], classes[which[order]]
    height, width = logits.shape[1:]
    begin = rivals.astype(np.intp) * (height * width) + block[patch]
    down = np.minimum(np.arange(len(tall)), height - 1) * width
    taps = down[:, None] + np.minimum(np.arange(len(wide)), width - 1)
    # Zero times infinity is NaN: an infinite logit would spoil pixels that do not read it.
    corners = np.clip(logits.reshape(-1)[taps[..., None] + begin], -1e38, 1e38)
    lines = _mix(tall.take(patch, 2), corners)
    best = np.full((tall.shape[1], wide.shape[1], len(block)), -np.inf, np.float32)
    value, term = np.empty_like(best), np.empty_like(best)
    won = np.zeros(best.shape, classes.dtype)
    start = 0
    for count in np.bincount(rank).tolist():
        rival, end = value[..., :count], start + count
        _mix(wide[..., :count], lines[..., start:end], rival, term[..., :count])
        # They come in ascending order, so the highest that took the lead is the last that did.
        leads = (rival > best[..., :count]) * rivals[start:end]
        np.maximum(won[..., :count], leads, out=won[..., :count])
        np.maximum(best[..., :count], rival, out=best[..., :count])
        start = end
    return won


def _mix(
    shares: NDArray[np.float32],
    taps: NDArray[np.float32],
    out: NDArray[np.float32] | None = None,
    term: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The sum over T of ``shares`` [T, F, P] times ``taps`` [T, A, P]: [A, F, P], in ``out``.
    ``term`` is room for what is added."""
    mixed: NDArray[np.float32] = np.multiply(shares[0], taps[0][:, None], out=out)
    for share, tap in zip(shares[1:], taps[1:], strict=True):
        mixed += np.multiply(share, tap[:, None], out=term)
    return mixed
