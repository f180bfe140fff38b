"""The deploy form as an ONNX graph, and the check that it is still the same function."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from knet_export.deploy import DeployKNet, reference_logits
from knet_runtime.errors import ParityError
from knet_runtime.manifest import InputSpec, OutputSpec
from knet_train.knet import KNet

OPSET = 18
_TRACED_BATCH = 2  # 1 would be taken for a constant


def export_onnx(model: KNet, spec: InputSpec, output: OutputSpec, path: Path) -> None:
    """Write ``model`` (in evaluation mode) to ``path``: static height and width, a batch of
    1 … ``spec.max_batch`` (frozen at 1 when that is 1), weights inside the file."""
    single = spec.max_batch == 1
    image = torch.zeros(1 if single else _TRACED_BATCH, spec.height, spec.width, 3).byte()
    batch = None if single else {0: torch.export.Dim("batch", min=1, max=spec.max_batch)}
    # Evaluated in this thread's default precision: no autocast may leak into the graph.
    with _quiet(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.onnx.export(
            DeployKNet(model).eval(),
            (image,),
            path,
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            input_names=[spec.name],
            output_names=[output.name],
            dynamic_shapes=None if single else (batch,),
            verbose=False,
        )
    graph = onnx.load(path)
    _strip(graph)
    onnx.save(graph, path)
    onnx.checker.check_model(path, full_check=True)


def _strip(model: onnx.ModelProto) -> None:
    """Leave out the exporter's notes, which hold stack traces with the paths of this machine."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]
    for tensor in graph.initializer:
        del tensor.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
    del model.metadata_props[:]


def check_onnx(model: KNet, spec: InputSpec, path: Path, tolerance: float) -> None:
    """Run the file at batches and contents that it was not traced with, against PyTorch.

    Exports freeze silently: what was dynamic when traced may be a constant in the file. So other
    batches are run first, then values are compared. Raises ParityError that names the batch and
    the difference.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for batch in sorted({1, min(3, spec.max_batch), min(5, spec.max_batch)}):
        images = _textured(rng, (batch, spec.height, spec.width, 3))
        try:
            (got,) = session.run(None, {spec.name: images})
        except Exception as error:  # onnxruntime's own types derive from nothing common
            first = str(error).splitlines()[0]
            raise ParityError(
                f"the exported graph does not run with a batch of {batch}: {first}"
            ) from error
        expected = reference_logits(model, torch.from_numpy(images)).numpy()
        if got.shape != expected.shape:
            raise ParityError(
                f"with a batch of {batch} the exported graph gives {got.shape}, "
                f"PyTorch {expected.shape}: an axis was frozen"
            )
        worst = float(np.abs(got - expected).max())
        if not worst <= tolerance:
            raise ParityError(
                f"with a batch of {batch} the exported graph differs from PyTorch by {worst:.2e} "
                f"in a logit (tolerance {tolerance:.0e})"
            )


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


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its own progress and deprecations; none of it is the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
