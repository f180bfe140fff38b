"""Where a graph that failed ``verify`` leaves its reference: the first tensor, and why.

Both graphs run in ONNX Runtime on the image that agreed least. The reference's graph is exported
afresh from the checkpoint in fp32 (or is the other bundle's), so that intermediate tensors have the
same names, and a fault of the file, its weights or its structure shows at its own place.

Of a graph of lower precision it is also found how much has to be fp32 for it to be right. The first
part's tensors are taken from the fp32 graph and fed to the rest; a prefix that is long enough
brings the result inside the tolerance, and its length is halved from both sides until the one
tensor is found that makes the difference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_export.graph.onnx_graph import Feed, OnnxGraph
from knet_export.verify.align import Alignment, align, modules_apart, static_differences
from knet_export.verify.measure import tensor_difference
from knet_runtime.bundle.manifest import Kind, Manifest, Precision, Tolerance
from knet_runtime.bundle.store import Bundle, find_bundle, open_bundle
from knet_runtime.errors import ConfigError
from knet_runtime.metrics import agreement, inside
from knet_runtime.preprocess import fit_to_input
from knet_runtime.sources.images import read_image

_AT_ONCE = 32  # pairs of tensors in memory
_NAMED = 4  # of several causes
# What a weight may differ by, as a share of the largest: by its type's last bits.
_ROUNDING: dict[Precision, float] = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 8e-3, "int8": 1e-5}


class Bisection(msgspec.Struct, frozen=True):
    """What was found. ``tensor`` is the first whose ``difference``, as a share of the reference's
    largest value there, leaves the tolerance, and ``module`` where it comes from; None where all
    stay inside, and for a bf16 graph, which ONNX Runtime cannot run on the CPU (``ran``).
    ``causes`` are differences of the graphs themselves up to there, in words; ``kept`` says how
    much of a graph of lower precision has to be fp32."""

    tensor: str | None
    module: str | None
    difference: float | None
    causes: tuple[str, ...]
    kept: str | None
    ran: bool = True

    def lines(self, engine: str) -> Iterator[str]:
        """The finding in words, for a bundle that failed on ``engine``."""
        if not self.ran:
            yield (
                "ONNX Runtime cannot run bf16 on the CPU: only the structure, the attributes and "
                f"the weights were compared{'' if self.causes else ', and they are equal'}"
            )
        elif self.tensor is not None:
            yield (
                f"first tensor outside the tolerance: {self.tensor} (module {self.module}), by "
                f"{self.difference:.2g} of its largest value"
            )
        elif self.causes:
            yield "no single tensor leaves the tolerance, but the graphs differ:"
        else:
            yield (
                "in ONNX Runtime on the CPU every tensor is inside the tolerance"
                + ("" if engine == "onnxruntime-cpu" else f": it is {engine} that computes it so")
            )
        for cause in self.causes[:_NAMED]:
            yield f"  {cause}"
        if len(self.causes) > _NAMED:
            yield f"  (and {len(self.causes) - _NAMED} more differences)"
        if self.kept is not None:
            yield self.kept


def bisect(
    bundle: Bundle,
    kind: Kind,
    against: Path,
    image: Path,
    on_step: Callable[[str], None] = lambda _: None,
) -> Bisection:
    """Find where the ``kind`` graph of ``bundle`` leaves ``against``, a checkpoint or a bundle, on
    the file ``image``.

    Raises ConfigError where one of two bundles is fp16 and the other is not: fp16 rescales its
    sums, so that tensors in between are other numbers by right.
    """
    manifest, graph, against = bundle.manifest, bundle.graph(kind), find_bundle(against)
    ran = graph.precision != "bf16"
    fitted, _ = fit_to_input(read_image(image), manifest.input)
    feed = {manifest.input.name: fitted[None]}
    with tempfile.TemporaryDirectory(prefix="knet-bisect-") as folder:
        if against.is_dir():
            other = open_bundle(against)
            if (graph.precision == "fp16") != (other.manifest.precision == "fp16"):
                raise ConfigError(
                    "fp16 rescales its sums, so its tensors cannot be held to those of "
                    f"{other.manifest.precision}: --bisect it --against the checkpoint"
                )
            expected = OnnxGraph.load(other.file(other.graph(kind).path))
        else:
            on_step("bisect: exporting the checkpoint afresh")
            expected = OnnxGraph.load(_export(against, manifest, kind, Path(folder)))
        found = OnnxGraph.load(bundle.file(graph.path))
        aligned = align(expected, found)
        on_step(f"bisect: comparing {len(aligned.pairs)} tensors on {image.name}")
        first, difference = None, None
        if ran:
            first, difference = _first_outside(expected, found, aligned, feed, graph.tolerance)
        causes = _causes(expected, found, aligned, first, _ROUNDING[graph.precision])
        if first is not None and _agree_if_swapped(expected, found, feed, graph.tolerance):
            causes.insert(0, "with red and blue exchanged the two agree: one of them takes BGR")
        kept = None
        if ran and graph.precision != "fp32":
            kept = _what_must_be_fp32(expected, found, aligned, feed, graph.tolerance, on_step)
    pair = None if first is None else aligned.pairs[first]
    return Bisection(
        tensor=pair.found.output[0] if pair else None,
        module=(pair.module or "unnamed") if pair else None,
        difference=difference,
        causes=tuple(causes),
        kept=kept,
        ran=ran,
    )


def _export(checkpoint: Path, manifest: Manifest, kind: Kind, folder: Path) -> Path:
    from knet_export.fuse.model import fuse_for
    from knet_export.fuse.segments import fuse_segments
    from knet_export.graph.classmap import add_classmap_head
    from knet_export.graph.to_onnx import CLASSMAP_NAME, export_onnx
    from knet_train.checkpoint import SegmentCheckpoint, read_any_checkpoint

    spec, logits = manifest.input, manifest.graph("logits")
    loaded = read_any_checkpoint(checkpoint)
    if isinstance(loaded, SegmentCheckpoint):
        fused = fuse_segments(loaded.model, spec, manifest.precision)
        return export_onnx(fused, spec, logits.outputs, folder)
    output = logits.output("semantic_logits")
    graph = export_onnx(
        fuse_for(loaded.model, spec, output, manifest.precision), spec, (output,), folder
    )
    if kind == "classmap":
        add_classmap_head(graph, folder / CLASSMAP_NAME, output)
        return folder / CLASSMAP_NAME
    return graph


def _first_outside(
    expected: OnnxGraph, found: OnnxGraph, aligned: Alignment, feed: Feed, tolerance: Tolerance
) -> tuple[int | None, float | None]:
    """Index of the first pair outside the tolerance, and by how much it is."""
    for start in range(0, len(aligned.pairs), _AT_ONCE):
        chunk = aligned.pairs[start : start + _AT_ONCE]
        befores = expected.run(feed, [pair.reference.output[0] for pair in chunk])
        afters = found.run(feed, [pair.found.output[0] for pair in chunk])
        for index, (before, after) in enumerate(zip(befores, afters, strict=True)):
            difference = tensor_difference(before, after)
            if tolerance.failures(max_logit_diff=difference):
                return start + index, difference
    return None, None


def _causes(
    expected: OnnxGraph, found: OnnxGraph, aligned: Alignment, first: int | None, rounding: float
) -> list[str]:
    end = len(aligned.pairs) if first is None else first + 1
    # A module that one graph lacks is a fault wherever it stands. A lone node may be another way to
    # write the same: it is none if a tensor after it still agrees.
    causes = modules_apart(
        [parting for parting in aligned.partings if parting.module or parting.before == first]
    )
    for pair in aligned.pairs[:end]:
        for difference in static_differences(pair, expected, found, rounding):
            causes.append(f"{pair.found.name}: {difference}")
    return causes


def _agree_if_swapped(
    expected: OnnxGraph, found: OnnxGraph, feed: Feed, tolerance: Tolerance
) -> bool:
    swapped = {name: np.ascontiguousarray(image[..., ::-1]) for name, image in feed.items()}
    return _compared(_results(expected, feed), _results(found, swapped), tolerance)[0]


def _results(graph: OnnxGraph, feed: Feed) -> list[NDArray[Any]]:
    return graph.run(feed, [output.name for output in graph.model.graph.output])


def _what_must_be_fp32(
    expected: OnnxGraph,
    found: OnnxGraph,
    aligned: Alignment,
    feed: Feed,
    tolerance: Tolerance,
    on_step: Callable[[str], None],
) -> str:
    """The finding in words: the first tensors of ``found`` that must be fp32, so that its results
    on ``feed`` are inside ``tolerance`` of those of ``expected``."""
    pairs = aligned.pairs
    wanted = _results(expected, feed)

    def suffices(count: int) -> bool:
        result = with_prefix(expected, found, aligned, feed, count)
        good, words = _compared(wanted, result, tolerance)
        state = "inside" if good else "outside"
        on_step(f"bisect: first {count} of {len(pairs)} tensors in fp32: {words}, {state}")
        return good

    if suffices(0):
        return "this image alone is inside the tolerance: nothing has to be kept in fp32 for it"
    low, high = 0, len(pairs)  # outside with ``low``, inside with ``high``: that is all of them
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    pair = pairs[high - 1]
    return (
        f"it is inside the tolerance once the first {high} of {len(pairs)} tensors are fp32; the "
        f"last of them is {pair.found.output[0]} (module {pair.module or 'unnamed'})"
    )


def _compared(
    expected: list[NDArray[Any]], found: list[NDArray[Any]], tolerance: Tolerance
) -> tuple[bool, str]:
    """Whether the results are inside the tolerance, and their measures in words: of logits or a
    class map; or of class logits and mask logits, of which the masks are compared."""
    worst, words = None, ""
    before, after = expected[-1], found[-1]
    if np.issubdtype(expected[0].dtype, np.floating):  # not class maps
        worst = tensor_difference(expected[0], found[0])
        words = f"largest logit difference {worst:.1e}, "
        if len(expected) > 1:
            before, after = inside(before), inside(after)
        else:
            before, after = before.argmax(1), after.argmax(1)
    agreed = agreement(before, after)
    good = not tolerance.failures(max_logit_diff=worst, agreement=agreed)
    return good, f"{words}agreement {agreed:.5f}"


def with_prefix(
    expected: OnnxGraph, found: OnnxGraph, aligned: Alignment, feed: Feed, count: int
) -> list[NDArray[Any]]:
    """The results of ``found`` when its first ``count`` paired tensors are those of ``expected``;
    a result that is one of them stays its own."""
    outputs = [output.name for output in found.model.graph.output]
    mates = {
        after: before
        for pair in aligned.pairs[:count]
        for after, before in zip(pair.found.output, pair.reference.output, strict=True)
        if after not in outputs
    }
    names = found.needed(set(mates), outputs)
    types = [value.dtype for value in found.run(feed, names)] if names else []
    values = expected.run(feed, [mates[name] for name in names]) if names else []
    given = {
        name: value.astype(kind) for name, kind, value in zip(names, types, values, strict=True)
    }
    return found.run_given(given, feed, outputs)
