"""What every engine holds its graph, a batch and the outputs to: the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from knet_runtime.bundle.manifest import CLASSMAP_OUTPUT, InputSpec, Kind, Manifest
from knet_runtime.errors import EngineError


class Tensor(NamedTuple):
    """An input or output as an engine describes it: a free size of ``shape`` is text or None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


def output_name(manifest: Manifest, kind: Kind) -> str:
    """The name of the output tensor of a graph of this kind."""
    return manifest.output.name if kind == "logits" else CLASSMAP_OUTPUT


def output_shape(manifest: Manifest, kind: Kind) -> tuple[int, ...]:
    """The shape of one picture's output: [N, h, w] logits or [H, W] classes."""
    spec, stride = manifest.input, manifest.output.stride
    if kind == "classmap":
        return spec.height, spec.width
    return manifest.labels.num_classes, spec.height // stride, spec.width // stride


def _freed(sides: Sequence[int | str], free: Sequence[bool]) -> list[int | str]:
    return ["any" if one else side for side, one in zip(sides, free, strict=True)]


def check_graph(
    path: Path,
    manifest: Manifest,
    kind: Kind,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> None:
    """Hold the graph's names, types and static sizes to the manifest; EngineError names both."""
    if [tensor.name for tensor in inputs] != [manifest.input.name]:
        names = ", ".join(tensor.name for tensor in inputs)
        raise EngineError(
            f"{path}: the graph's inputs are [{names}], the manifest says {manifest.input.name!r}: "
            "export again"
        )
    by_name = {tensor.name: tensor for tensor in outputs}
    output = output_name(manifest, kind)
    if output not in by_name:
        raise EngineError(
            f"{path}: the graph's outputs are [{', '.join(by_name)}], the manifest says "
            f"{output!r}: export again"
        )
    # A batch frozen in tracing must not pass for a free one, nor a size.
    batch = 1 if manifest.input.max_batch == 1 else "any"
    picture: tuple[int | str, ...] = (manifest.input.height, manifest.input.width, 3)
    result: tuple[int | str, ...] = output_shape(manifest, kind)
    if sizes := manifest.input.sizes:
        free = [least < most for least, most in zip(sizes.least, sizes.most, strict=True)]
        picture = (*_freed(picture[:2], free), 3)
        result = (*result[:-2], *_freed(result[-2:], free))
    element = "float32" if kind == "logits" else "uint8"
    expected = (
        (inputs[0], "uint8", (batch, *picture)),
        (by_name[output], element, (batch, *result)),
    )
    for tensor, dtype, shape in expected:
        if tensor.dtype != dtype:
            raise EngineError(
                f"{path}: {tensor.name} is {tensor.dtype}, the manifest says {dtype}: export again"
            )
        # Free sizes may turn out to be anything: that is checked in check_output.
        if len(tensor.shape) != len(shape) or any(
            isinstance(actual, int) and actual != stated
            for actual, stated in zip(tensor.shape, shape, strict=True)
        ):
            raise EngineError(
                f"{path}: {tensor.name} is {list(tensor.shape)}, the manifest says {list(shape)}: "
                "export again"
            )


def check_batch(engine: str, spec: InputSpec, batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The batch, C-contiguous; EngineError unless it is uint8 [B, height, width, 3] with
    1 <= B <= max_batch."""
    expected = (spec.height, spec.width, 3)
    if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[1:] != expected:
        raise EngineError(
            f"the batch is {batch.dtype} {batch.shape}; this bundle takes uint8 [B, "
            f"{', '.join(map(str, expected))}]: fit the frames with preprocess.fit"
        )
    if not 1 <= len(batch) <= spec.max_batch:
        raise EngineError(
            f"the batch holds {len(batch)} pictures; {engine} with this bundle takes 1 to "
            f"{spec.max_batch}: split it, or export with a larger max_batch"
        )
    return np.ascontiguousarray(batch)


def check_output(
    engine: str, manifest: Manifest, kind: Kind, batch: int, output: NDArray[Any]
) -> NDArray[np.float32] | NDArray[np.uint8]:
    """The engine's output as float32 logits or uint8 classes; EngineError when its shape is not
    the manifest's."""
    shape = (batch, *output_shape(manifest, kind))
    if output.shape != shape:
        raise EngineError(
            f"{engine} gave {kind} {output.shape}, the manifest says {shape}: export again"
        )
    if kind == "classmap":
        return np.asarray(output, np.uint8)
    return np.asarray(output, np.float32)
