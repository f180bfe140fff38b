"""Which parts of a network can be int8: measured, not guessed.

1. Every calibration method quantises everything; the one whose results are nearest the float
   graph's on held-out images is taken: by mIoU, or by panoptic quality where there are segments.
2. Every block (a stage of the backbone, a part of the head) is quantised alone, and the blocks are
   ranked by how many pixels that changes. A few images do: what one block costs in mIoU drowns in
   chance on them, the changed pixels do not.
3. The worst blocks stay float, as few as possible, until the rest is inside the tolerance, and
   finds ``LEAST_QUALITY`` of the float graph's segments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from knet_export.data import ImageSet
from knet_export.graph.cost import node_costs
from knet_export.graph.onnx_graph import OnnxGraph
from knet_export.int8 import Calibrator, Method
from knet_export.int8.calibrate import Histogram, measure_ranges, split_images
from knet_export.int8.quantise import Weighted, matching, quantisable, quantise, with_halves
from knet_export.int8.score import LEAST_QUALITY, Int8Scorer, Score, new_scorer
from knet_runtime.bundle.manifest import Manifest, Tolerance
from knet_runtime.errors import ConfigError, ParityError

QUANTISATION_NAME = "quantisation.json"
PERCENTILES = (99.9, 99.99, 99.999)
_SWEPT_IMAGES = 8
# The search aims at this share of the tolerance: verify measures on other images.
_AIM = 0.5
# On some dozens of images, smaller differences are no difference.
_CHANCE = 0.1  # points of mIoU
_CHANCE_QUALITY = 1.0  # points of panoptic quality, which jumps where a segment is lost


class Tried(msgspec.Struct, frozen=True):
    """A calibration method, and what the graph with everything in int8 scored by it."""

    method: Method
    percent: float | None  # of "percentile"
    score: Score


class BlockCost(msgspec.Struct, frozen=True):
    """A block, its share of the network's multiply-adds, and the score when it alone is int8."""

    block: str
    nodes: int
    macs: float
    score: Score


class Quantisation(msgspec.Struct, frozen=True, kw_only=True):
    """How an int8 graph came about; a bundle has it as ``quantisation.json``.

    Scores are against the float graph, on ``held_out`` images that the ranges were not measured
    on (unless there was only one). ``blocks`` are ranked by ``swept`` of them, the costliest first.
    Nodes are named as in the graph.
    """

    data: str
    calibrated: int
    held_out: int
    swept: int
    tried: tuple[Tried, ...]
    method: Method
    percent: float | None
    blocks: tuple[BlockCost, ...]
    kept_blocks: tuple[str, ...]  # by the sweep
    kept_patterns: tuple[str, ...]  # by the user
    kept_nodes: tuple[str, ...]  # of both, out of those that could be int8
    fp16_patterns: tuple[str, ...]  # by the user
    fp16_nodes: tuple[str, ...]
    int8_nodes: int
    int8_macs: float  # share of the whole graph's multiply-adds
    score: Score
    aim: Tolerance


def quantise_within(
    graph: OnnxGraph,
    manifest: Manifest,
    images: ImageSet,
    tolerance: Tolerance,
    *,
    calibrator: Calibrator = "auto",
    keep_fp32: Sequence[str] = (),
    keep_fp16: Sequence[str] = (),
    on_step: Callable[[str], None] = lambda _: None,
) -> tuple[OnnxGraph, Quantisation]:
    """Quantise as much of a float ``graph`` as the tolerance allows; nodes that match a pattern of
    ``keep_fp32`` stay float32 in any case, others that match one of ``keep_fp16`` compute in fp16.

    The same images give the same graph. Raises ParityError when no int8 graph is inside the
    tolerance, ConfigError for patterns that match nothing or leave nothing, CheckpointError for
    values that are no numbers, and what reading images raises.
    """
    costs = node_costs(graph, manifest.input.size)
    macs = {name: cost.multiply_adds for name, cost in costs}
    nodes = quantisable(graph, macs)
    fixed = matching(nodes, keep_fp32, "--keep-fp32")
    half = matching(nodes, keep_fp16, "--keep-fp16") - fixed
    free = tuple(node for node in nodes if node.name not in fixed | half)
    if not free:
        raise ConfigError("nothing is left to be int8: keep less in fp32 or fp16")
    ranged, scored = split_images(len(images))
    on_step(f"measuring ranges on {len(ranged)} images")
    histograms = measure_ranges(
        graph,
        list(dict.fromkeys(node.activation for node in free)),
        (images.read(index) for index in ranged),
        manifest.input,
    )
    scorer = new_scorer(graph, manifest, images, scored)
    graph = with_halves(graph, [node for node in nodes if node.name in half])

    tried = []
    for method, percent in _methods(calibrator):
        thresholds = _thresholds(histograms, method, percent)
        score = scorer.score(quantise(graph, free, thresholds))
        on_step(f"int8 by {method_name(method, percent)}: {describe(score)}")
        tried.append(Tried(method, percent, score))
    best = min(tried, key=lambda one: _distance(one.score))
    thresholds = _thresholds(histograms, best.method, best.percent)

    few = scorer.spread(_SWEPT_IMAGES)
    blocks = _rank(graph, free, thresholds, few, sum(macs.values()), on_step)
    aim = msgspec.structs.replace(tolerance, delta_miou=_AIM * tolerance.delta_miou)
    worst = [cost.block for cost in blocks]

    def without(count: int) -> Score:
        if count == 0:
            return best.score
        chosen = [node for node in free if node.block not in worst[:count]]
        score = scorer.score(quantise(graph, chosen, thresholds))
        on_step(f"the {count} costliest of {len(worst)} blocks in fp32: {describe(score)}")
        return score

    count, score = _fewest(without, len(worst) - 1, aim)
    chosen = [node for node in free if node.block not in worst[:count]]
    names = {node.name for node in chosen}
    return quantise(graph, chosen, thresholds), Quantisation(
        data=images.name,
        calibrated=len(ranged),
        held_out=len(scored),
        swept=len(few),
        tried=tuple(tried),
        method=best.method,
        percent=best.percent,
        blocks=blocks,
        kept_blocks=tuple(worst[:count]),
        kept_patterns=tuple(keep_fp32),
        kept_nodes=tuple(node.name for node in nodes if node.name not in names | half),
        fp16_patterns=tuple(keep_fp16),
        fp16_nodes=tuple(node.name for node in nodes if node.name in half),
        int8_nodes=len(chosen),
        int8_macs=sum(node.macs for node in chosen) / sum(macs.values()),
        score=score,
        aim=aim,
    )


def describe(score: Score) -> str:
    """The score in words."""
    delta = "" if score.delta_miou is None else f"ΔmIoU {score.delta_miou:+.2f} points, "
    same = "" if score.quality is None else f"the same segments to PQ {score.quality:.1f}, "
    return f"{delta}{same}agreement {100 * score.agreement:.2f} %"


def method_name(method: Method, percent: float | None) -> str:
    """The method in words."""
    return method if percent is None else f"{method} {percent:g}"


def _rank(
    graph: OnnxGraph,
    nodes: Sequence[Weighted],
    thresholds: Mapping[str, float],
    scorer: Int8Scorer[Any],
    all_macs: int,
    on_step: Callable[[str], None],
) -> tuple[BlockCost, ...]:
    """Every block alone in int8, the costliest first."""
    costs = []
    for block in dict.fromkeys(node.block for node in nodes):
        inside = [node for node in nodes if node.block == block]
        score = scorer.score(quantise(graph, inside, thresholds))
        on_step(f"{block} alone in int8: {describe(score)}")
        share = sum(node.macs for node in inside) / all_macs
        costs.append(BlockCost(block, len(inside), share, score))
    return tuple(sorted(costs, key=lambda cost: cost.score.agreement))


def _fewest(without: Callable[[int], Score], limit: int, aim: Tolerance) -> tuple[int, Score]:
    """How few of the worst blocks have to stay float for ``aim``, by halving, and the score then.

    Raises ParityError when not even ``limit`` are enough.
    """
    score = without(0)
    if score.inside(aim):
        return 0, score
    low, high = 0, limit  # low is outside
    score = without(high)
    if not score.inside(aim):
        raise ParityError(
            f"int8 is not near enough: even with a single block of it {describe(score)}; the aim "
            f"is {_aim_in_words(aim, score)}: calibrate on other images, allow more, or export fp16"
        )
    while high - low > 1:
        middle = (low + high) // 2
        tried = without(middle)
        if tried.inside(aim):
            high, score = middle, tried
        else:
            low = middle
    return high, score


def _aim_in_words(aim: Tolerance, score: Score) -> str:
    share = f"{100 * aim.agreement:g} %"
    if score.quality is not None:
        return f"PQ {LEAST_QUALITY:g} and {share}"
    return f"±{aim.delta_miou:g} points (half the tolerance) and {share}"


def _distance(score: Score) -> tuple[float, float]:
    """The mIoU, or the segments, decide where they differ by more than chance, else the changed
    pixels."""
    delta = 0.0 if score.delta_miou is None else abs(score.delta_miou) / _CHANCE
    lost = 0.0 if score.quality is None else (100 - score.quality) / _CHANCE_QUALITY
    return round(delta + lost), 1 - score.agreement


def _methods(calibrator: Calibrator) -> list[tuple[Method, float | None]]:
    percentiles: list[tuple[Method, float | None]] = [("percentile", p) for p in PERCENTILES]
    match calibrator:
        case "auto":
            return [("minmax", None), *percentiles, ("entropy", None)]
        case "percentile":
            return percentiles
        case method:
            return [(method, None)]


def _thresholds(
    histograms: Mapping[str, Histogram], method: Method, percent: float | None
) -> dict[str, float]:
    return {
        name: histogram.threshold(method, 100.0 if percent is None else percent)
        for name, histogram in histograms.items()
    }
