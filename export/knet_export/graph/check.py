"""The exported graphs, run at once: are they still the function that was trained?

Exports freeze silently: what was free when traced may be a constant in the file. So the graphs are
run at other batches, other contents and, where they are free, other sizes than they were traced
with. Names are looked at first, then shapes, then values.

An ONNX graph in memory, run on the CPU while it is being worked on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from knet_export.fuse.model import reference_logits
from knet_export.graph.classmap import CLASSMAP_OUTPUT
from knet_export.graph.to_onnx import CLASSMAP_NAME, LOGITS_NAME
from knet_runtime.bundle.manifest import InputSpec, OutputSpec, Tolerance
from knet_runtime.engines.hardware import cpu_budget
from knet_runtime.errors import ParityError
from knet_runtime.metrics import agreement
from knet_runtime.postprocess import upsampled_argmax
from knet_runtime.types import Size
from knet_train.models.knet import KNet

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
        where = f"with a batch of {batch} pictures of {size[0]}×{size[1]}"
        got = _run(logits, spec, images, f"{LOGITS_NAME} {where}")
        expected = reference_logits(model, torch.from_numpy(images)).numpy()
        _check_shape(got, expected.shape, f"{LOGITS_NAME} {where}")
        worst = float(np.abs(got - expected).max() / np.abs(expected).max())
        if not worst <= tolerance.max_logit_diff:
            raise ParityError(
                f"{LOGITS_NAME} {where} differs from PyTorch by {worst:.2e} of the largest logit "
                f"(tolerance {tolerance.max_logit_diff:.0e})"
            )
        if classmap is None:
            continue
        classes = _run(classmap, spec, images, f"{CLASSMAP_NAME} {where}")
        _check_shape(classes, (batch, *size), f"{CLASSMAP_NAME} {where}")
        own = np.stack([upsampled_argmax(one, size) for one in got])
        if not agreement(classes, own) >= tolerance.agreement:
            raise ParityError(
                f"{CLASSMAP_NAME} {where} gives other classes than {LOGITS_NAME} in "
                f"{(classes != own).mean():.2%} of the pixels"
            )


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
    size = (spec.height, spec.width)
    shapes = [(min(batch, spec.max_batch), size) for batch in _BATCHES]
    if spec.sizes is not None:
        least, most, step = spec.sizes.min, spec.sizes.max, spec.sizes.multiple
        wide = min(least[1] + _FEW_STEPS * step, most[1])
        high = min(least[0] + _FEW_STEPS * step, most[0])
        shapes += [(shapes[-1][0], (least[0], wide)), (1, (high, least[1]))]
    return list(dict.fromkeys(shapes))


def _open(path: Path, output: str) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = cpu_budget()
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own types derive from nothing common
        raise ParityError(f"{path.name} can not be loaded: {_first_line(error)}") from error
    names = [tensor.name for tensor in session.get_outputs()]
    if names != [output]:
        raise ParityError(f"{path.name} gives {', '.join(names)}, not {output}")
    return session


def _run(session: Any, spec: InputSpec, images: NDArray[np.uint8], what: str) -> NDArray[Any]:
    try:
        (got,) = session.run(None, {spec.name: images})
    except Exception as error:  # as above
        raise ParityError(f"{what} does not run: {_first_line(error)}") from error
    result: NDArray[Any] = got
    return result


def _check_shape(got: NDArray[Any], expected: tuple[int, ...], what: str) -> None:
    if got.shape != expected:
        raise ParityError(f"{what} gives {got.shape}, not {expected}: an axis was frozen")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _textured(rng: np.random.Generator, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Pictures with structure at several scales: plain noise averages out in a network."""
    batch, height, width, _ = shape
    total = np.full(shape, 128.0)
    for cells, amplitude in ((3, 60.0), (12, 35.0), (48, 20.0)):
        coarse = rng.standard_normal((batch, cells, cells, 3)) * amplitude
        rows = np.arange(height) * cells // height
        columns = np.arange(width) * cells // width
        total += coarse[:, rows][:, :, columns]
    return total.clip(0, 255).astype(np.uint8)


def open_session(graph: onnx.ModelProto, folder: Path, taps: Sequence[str] = ()) -> Any:
    """An ONNX Runtime session of ``graph``, whose external data, if any, lies in ``folder``; the
    tensors ``taps`` can be fetched from it besides the graph's outputs."""
    if taps:
        tapped = onnx.ModelProto()
        tapped.CopyFrom(graph)
        known = {output.name for output in graph.graph.output}
        tapped.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in taps if name not in known
        )
        graph = tapped
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = cpu_budget()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    return ort.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
