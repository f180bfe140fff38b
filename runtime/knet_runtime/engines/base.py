"""What an engine is: the protocol of one that is loaded, the data that describes one that can be,
and the checks that hold graph, batch and outputs of every engine to the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.bundle.manifest import InputSpec, Kind, Manifest, Precision
from knet_runtime.bundle.store import Bundle
from knet_runtime.errors import EngineError


class Engine(Protocol):
    """A loaded engine. A context manager; ``infer`` may be called from several threads."""

    name: str
    """The name of its ``EngineSpec``."""
    device: str
    """What it runs on, in words that tell two machines apart: the processor's or GPU's name."""
    kind: Kind
    """Which of the bundle's graphs it runs."""

    def infer(self, batch: NDArray[np.uint8]) -> Mapping[str, NDArray[Any]]:
        """uint8 [B, H, W, 3] RGB at the model's size, 1 <= B <= max_batch, to the graph's outputs
        by name: [B, *shape] each, as its ``OutputSpec`` says. Raises EngineError for another batch,
        or when the engine fails."""

    def close(self) -> None:
        """Free the engine; a second call does nothing."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, *_: object) -> None: ...


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that the file which defines an engine (its ``SPECS``) says of it, to those who choose,
    list, measure and test engines. That file is light to import: what an engine runs on is imported
    by ``open`` and ``probe``.
    """

    name: str
    device: Literal["cpu", "gpu"]
    open: Callable[[Bundle, str, Kind], Engine]
    """Loads this graph of a bundle; it is given the engine's name. Raises EngineUnavailable when
    the engine cannot run here, EngineError when the graph is not what the manifest says."""
    probe: Callable[[str], str]
    """Tries the engine on something tiny, given its name, and says what works; EngineUnavailable
    with what to do."""
    libraries: tuple[str, ...]
    """The modules that its results depend on, first the one that it cannot do without."""
    install: str
    """The command that brings them."""
    conflict: Callable[[], str | None] = lambda: None
    """What is wrong between packages that are installed, and the fix."""
    graph: Kind = "logits"
    """What it runs when nobody says, where the bundle has it."""
    refuses: Mapping[Precision, str] = {}
    """Why a bundle of this precision would not run, or be computed in another one."""
    computes: Mapping[Precision, str] = {}
    """What a bundle of this precision is computed in, where that is not its own."""
    rank: int | None = None
    """Its place in the order in which "auto" tries, from the lowest; None: never by itself."""
    verified_by_export: bool = False
    """Every export is compared with PyTorch on this very engine: what passed on one machine holds
    on others, and "auto" asks for no record."""
    runs_plans: bool = False
    """It runs a plan, which ``knet-deploy build`` makes first."""


class Tensor(NamedTuple):
    """An input or output as an engine describes it: a free size of ``shape`` is text or None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


def check_graph(
    path: Path, manifest: Manifest, kind: Kind, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> None:
    """Hold the graph's names, types and static sizes to the manifest; EngineError names both."""
    spec = manifest.input
    if [tensor.name for tensor in inputs] != [spec.name]:
        names = ", ".join(tensor.name for tensor in inputs)
        raise _differs(f"{path}: the graph's inputs are [{names}]", repr(spec.name))
    found = {tensor.name: tensor for tensor in outputs}
    # A batch frozen in tracing must not pass for a free one, nor a size.
    batch = 1 if spec.max_batch == 1 else "any"
    free = (False, False)
    if spec.sizes is not None:
        free = spec.sizes.min[0] < spec.sizes.max[0], spec.sizes.min[1] < spec.sizes.max[1]
    _check_tensor(path, inputs[0], "uint8", [batch, *_freed(spec.size, free), 3])
    for output in manifest.graph(kind).outputs:
        if output.name not in found:
            names = ", ".join(found)
            raise _differs(f"{path}: the graph's outputs are [{names}]", repr(output.name))
        expected: list[int | str] = [batch, *output.shape(spec.size)]
        if output.stride is not None:
            expected[-2:] = _freed(output.shape(spec.size)[-2:], free)
        _check_tensor(path, found[output.name], output.dtype, expected)


def _differs(found: str, stated: object) -> EngineError:
    return EngineError(f"{found}, the manifest says {stated}: export again")


def _freed(sides: Sequence[int], free: Sequence[bool]) -> list[int | str]:
    return ["any" if one else side for side, one in zip(sides, free, strict=True)]


def _check_tensor(path: Path, tensor: Tensor, dtype: str, shape: list[int | str]) -> None:
    if tensor.dtype != dtype:
        raise _differs(f"{path}: {tensor.name} is {tensor.dtype}", dtype)
    # Free sizes may turn out to be anything: that is checked in check_outputs.
    if len(tensor.shape) != len(shape) or any(
        isinstance(actual, int) and actual != stated
        for actual, stated in zip(tensor.shape, shape, strict=True)
    ):
        raise _differs(f"{path}: {tensor.name} is {list(tensor.shape)}", shape)


def check_batch(engine: str, spec: InputSpec, batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The batch, C-contiguous; EngineError unless it is uint8 [B, height, width, 3] with
    1 <= B <= max_batch."""
    expected = (*spec.size, 3)
    if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[1:] != expected:
        raise EngineError(
            f"the batch is {batch.dtype} {batch.shape}; this bundle takes uint8 [B, "
            f"{', '.join(map(str, expected))}]: fit the images with preprocess.fit_to_input"
        )
    if not 1 <= len(batch) <= spec.max_batch:
        raise EngineError(
            f"the batch holds {len(batch)} images; {engine} with this bundle takes 1 to "
            f"{spec.max_batch}: split it, or export with a larger max_batch"
        )
    return np.ascontiguousarray(batch)


def check_outputs(
    engine: str, manifest: Manifest, kind: Kind, batch: int, outputs: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """What the engine gave, each output in its type; EngineError when a shape is not the
    manifest's."""
    checked = {}
    for output in manifest.graph(kind).outputs:
        shape = (batch, *output.shape(manifest.input.size))
        found = outputs[output.name]
        if found.shape != shape:
            raise _differs(f"{engine} gave {output.name} {found.shape}", shape)
        checked[output.name] = np.asarray(found, output.dtype)
    return checked
