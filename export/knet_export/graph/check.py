"""The exported graphs, run at once: are they still the function that was trained?

Exports freeze silently: what was free when traced may be a constant in the file. So the graphs are
run at other batches, other contents and, where they are free, other sizes than they were traced
with. Names are looked at first, then shapes, then values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from knet_export.graph.classmap import CLASSMAP_OUTPUT
from knet_export.graph.onnx_graph import OnnxGraph
from knet_export.graph.to_onnx import CLASSMAP_NAME, LOGITS_NAME
from knet_runtime.bundle.manifest import Graph, InputSpec, OutputSpec, Tolerance
from knet_runtime.errors import ParityError, first_line
from knet_runtime.metrics import agreement, inside
from knet_runtime.postprocess import upsampled_argmax
from knet_runtime.types import Size
from knet_train.inference import predict_logits, predict_segment_logits
from knet_train.models.knet import KNet
from knet_train.models.segments import SegmentKNet

_BATCHES = (1, 3)  # 2 was traced
_FEW_STEPS = 3  # beyond the smallest size, in multiples


def check_onnx(
    model: KNet, spec: InputSpec, output: OutputSpec, folder: Path, tolerance: Tolerance
) -> None:
    """Hold ``logits.onnx`` in ``folder``, and ``classmap.onnx`` if there is one, to ``model``.

    Raises ParityError that names the graph, the batch, the size and the difference.
    """
    check_structure(folder)
    logits = _open(folder / LOGITS_NAME, output.name)
    classmap = None
    if (folder / CLASSMAP_NAME).exists():
        classmap = _open(folder / CLASSMAP_NAME, CLASSMAP_OUTPUT)
    rng = np.random.default_rng(0)
    for batch, size in _other_shapes(spec):
        images = _textured(rng, (batch, *size, 3))
        where = f"with a batch of {batch} images of {size[0]}×{size[1]}"
        expected = predict_logits(model, images)
        (got,) = _run(logits, spec, images, f"{LOGITS_NAME} {where}", expected.shape)
        worst = float(np.abs(got - expected).max() / np.abs(expected).max())
        if tolerance.failures(max_logit_diff=worst):
            raise ParityError(
                f"{LOGITS_NAME} {where} differs from PyTorch by {worst:.2e} of the largest logit "
                f"(tolerance {tolerance.max_logit_diff:.0e})"
            )
        if classmap is None:
            continue
        (classes,) = _run(classmap, spec, images, f"{CLASSMAP_NAME} {where}", (batch, *size))
        own = np.stack([upsampled_argmax(one, size) for one in got])
        if tolerance.failures(agreement=agreement(classes, own)):
            raise ParityError(
                f"{CLASSMAP_NAME} {where} gives other classes than {LOGITS_NAME} in "
                f"{(classes != own).mean():.2%} of the pixels"
            )


def check_segments(model: SegmentKNet, spec: InputSpec, graph: Graph, folder: Path) -> None:
    """The same of a network for segments: the logits of its classes, the pixels of its masks."""
    check_structure(folder)
    session = _open(folder / LOGITS_NAME, *(output.name for output in graph.outputs))
    rng = np.random.default_rng(0)
    for batch, size in _other_shapes(spec):
        images = _textured(rng, (batch, *size, 3))
        where = f"{LOGITS_NAME} with a batch of {batch} images of {size[0]}×{size[1]}"
        classes, masks = predict_segment_logits(model, images)
        got, got_masks = _run(session, spec, images, where, classes.shape, masks.shape)
        difference = np.abs(got - classes) / np.abs(classes).max()
        failures = graph.tolerance.failures(
            max_logit_diff=float(difference.max()),
            mean_logit_diff=float(difference.mean()),
            agreement=agreement(inside(got_masks), inside(masks)),
        )
        if failures:
            raise ParityError(f"{where} differs from PyTorch: {'; '.join(failures.values())}")


def check_structure(folder: Path) -> None:
    """The graphs in ``folder`` are valid ONNX; read from their paths, as they may hold more than a
    protobuf can. Raises ParityError."""
    for name in (LOGITS_NAME, CLASSMAP_NAME):
        if (folder / name).exists():
            try:
                onnx.checker.check_model(folder / name, full_check=True)
            except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
                raise ParityError(f"{name} is no valid ONNX: {error}") from error


def _other_shapes(spec: InputSpec) -> list[tuple[int, Size]]:
    shapes = [(min(batch, spec.max_batch), spec.size) for batch in _BATCHES]
    if spec.sizes is not None:
        smallest, largest, step = spec.sizes.min, spec.sizes.max, spec.sizes.multiple
        wide = min(smallest[1] + _FEW_STEPS * step, largest[1])
        high = min(smallest[0] + _FEW_STEPS * step, largest[0])
        shapes += [(shapes[-1][0], (smallest[0], wide)), (1, (high, smallest[1]))]
    return list(dict.fromkeys(shapes))


def _open(path: Path, *outputs: str) -> Any:
    try:
        session = OnnxGraph.load(path).session()
    except Exception as error:  # onnxruntime's own types derive from nothing common
        raise ParityError(f"{path.name} cannot be loaded: {first_line(error)}") from error
    names = [tensor.name for tensor in session.get_outputs()]
    if names != list(outputs):
        raise ParityError(f"{path.name} gives {', '.join(names)}, not {', '.join(outputs)}")
    return session


def _run(
    session: Any, spec: InputSpec, images: NDArray[np.uint8], what: str, *shapes: tuple[int, ...]
) -> list[NDArray[Any]]:
    try:
        results: list[NDArray[Any]] = session.run(None, {spec.name: images})
    except Exception as error:  # as above
        raise ParityError(f"{what} does not run: {first_line(error)}") from error
    for result, shape in zip(results, shapes, strict=True):
        if result.shape != shape:
            raise ParityError(f"{what} gives {result.shape}, not {shape}: an axis was frozen")
    return results


def _textured(rng: np.random.Generator, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Images with structure at several scales: plain noise averages out in a network."""
    _, height, width, _ = shape
    total = np.full(shape, 128.0)
    for cells, amplitude in ((3, 60.0), (12, 35.0), (48, 20.0)):
        coarse = rng.standard_normal((shape[0], cells, cells, 3)) * amplitude
        rows = np.arange(height) * cells // height
        columns = np.arange(width) * cells // width
        total += coarse[:, rows][:, :, columns]
    return total.clip(0, 255).astype(np.uint8)
