"""From low-resolution logits to the class map at the frame's own size."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_runtime.preprocess import Geometry
from knet_runtime.types import ClassMap

_CHUNK = 2**17  # numbers: half a megabyte of float32 stays in a core's cache


def class_map(logits: NDArray[np.float32], geometry: Geometry) -> ClassMap:
    """The class map [H, W] at ``geometry.source_hw`` for the model's logits float32 [N, h, w], from
    which the window goes to the source's size in one step. Raises ValueError as ``cut_window``."""
    return upsampled_argmax(cut_window(logits, geometry), geometry.source_hw)


def cut_window(logits: NDArray[np.float32], geometry: Geometry) -> NDArray[np.float32]:
    """The part of float32 [N, h, w] logits that the image fills, a view. It is exact: the window
    lies on multiples of the logits' stride. Raises ValueError for logits that have no whole stride
    in ``geometry.model_hw``, or another one than the window lies on."""
    stride = geometry.model_hw[0] // logits.shape[1] if logits.ndim == 3 and logits.size else 0
    fits = stride and tuple(stride * side for side in logits.shape[1:]) == geometry.model_hw
    if not fits or any(side % stride for side in geometry.window):
        raise ValueError(
            f"logits {logits.shape} do not fit an input of {geometry.model_hw} with the image at "
            f"{geometry.window}"
        )
    top, left, height, width = (side // stride for side in geometry.window)
    return logits[:, top : top + height, left : left + width]


def restore_class_map(classes: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """The class map [H, W] at ``geometry.source_hw`` for a graph's own class map uint8 [h, w] at
    the model's size: the window is cut out, and every pixel takes its nearest one's class.

    Raises ValueError when the map does not fit the geometry.
    """
    if classes.shape != geometry.model_hw:
        raise ValueError(f"the class map is {classes.shape}, expected {geometry.model_hw}")
    top, left, height, width = geometry.window
    window = np.ascontiguousarray(classes[top : top + height, left : left + width])
    if window.shape == geometry.source_hw:
        return window
    size = (geometry.source_hw[1], geometry.source_hw[0])
    resized = cv2.resize(window, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized, np.uint8)


def upsampled_argmax(
    logits: NDArray[np.float32], size: tuple[int, int], via: tuple[int, int] | None = None
) -> ClassMap:
    """The class map [H, W] = ``size`` of float32 [N, h, w] logits: uint8, or uint16 when N > 256.

    It is the map that bilinear resizing (half-pixel centres, two taps per axis, no antialiasing:
    PyTorch's ``interpolate(mode="bilinear", align_corners=False)``) and then argmax gives, without
    ever holding N×H×W numbers. It equals the map computed in exact arithmetic wherever the two
    largest logits differ by more than float32 rounding (about 1e-6 of their size). PyTorch rounds
    its coordinates to float32, so at ratios that are no binary fraction about one pixel in a
    million differs from PyTorch's own map. The lowest class wins a tie; infinity counts as 1e38.

    ``via`` (height, width) is a size that the logits are resized to first, at least their own:
    mmsegmentation goes to the network's input size and from there to the image's.
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
    steps = [size] if via is None or via in (size, logits.shape[1:]) else [via, size]
    reach = 1 + len(steps)
    classes, where = candidates(logits, reach)
    rows = _axis((logits.shape[1], *(step[0] for step in steps)), reach)
    columns = _axis((logits.shape[2], *(step[1] for step in steps)), reach)
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
def _axis(sides: tuple[int, ...], reach: int) -> _Axis:
    """The axis that is resized from ``sides[0]`` logits to each of the other sides in turn; a pixel
    reads T = ``reach`` logits, the last ones beyond the edge if there are fewer."""
    low, high = sides[0], sides[-1]
    shares = np.eye(low, max(low, reach))
    for side in sides[1:]:
        last = len(shares) - 1
        at = np.clip((np.arange(side) + 0.5) * (len(shares) / side) - 0.5, 0, last)
        lower = at.astype(np.intp)
        upper = (at - lower)[:, None]
        shares = shares[lower] * (1 - upper) + shares[np.minimum(lower + 1, last)] * upper
    block = np.minimum((shares > 0).argmax(1), shares.shape[1] - reach)
    longest = -(-high // low)
    opens = (np.arange(high) - np.searchsorted(block, block)) % longest == 0
    first = np.flatnonzero(opens)
    pixel = np.minimum(first + np.arange(longest)[:, None], np.append(first[1:], high) - 1)
    block = block[first]
    share = np.stack([shares[pixel, block + tap] for tap in range(reach)])
    return _Axis(block, np.cumsum(opens) - 1, pixel, share.astype(np.float32))


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
