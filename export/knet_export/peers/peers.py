"""Peers by name, ready to be made each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from knet_export.peers.graph_peers import GraphPeer, open_onnxruntime, open_openvino
from knet_export.peers.naive import export_naive
from knet_export.peers.torch_peers import CompiledPeer, LoopPeer, TorchPeer
from knet_runtime.bench.contestant import Contestant
from knet_runtime.bundle import Bundle
from knet_runtime.errors import BackendError
from knet_runtime.manifest import Size
from knet_train.checkpoint import read_checkpoint
from knet_train.knet import KNet

_PLAIN = "the graph of a plain torch.onnx.export, default options"


def make_peers(
    names: Sequence[str], bundle: Bundle, checkpoint: Path, frames: Sequence[Size], folder: Path
) -> dict[str, Callable[[], Contestant]]:
    """What makes each of ``names``, and can be pickled: "torch", "torch-channels-last",
    "torch-compile", "torch-loop", "ort-naive" or "openvino".

    They see pictures of the bundle's size, and give maps at those of ``frames`` (height, width);
    the plain graphs are written into ``folder``. Where PyTorch can not export the network, what
    makes their peers says so when it is called. Raises CheckpointError.
    """
    spec = bundle.manifest.input
    size = (spec.height, spec.width)
    found: dict[str, Callable[[], Contestant]] = {}
    plain: Callable[..., Contestant] | None = None
    for name in names:
        match name:
            case "torch":
                found[name] = partial(TorchPeer, checkpoint, size)
            case "torch-channels-last":
                found[name] = partial(TorchPeer, checkpoint, size, channels_last=True)
            case "torch-compile":
                found[name] = partial(CompiledPeer, checkpoint, size)
            case "torch-loop":
                found[name] = partial(LoopPeer, checkpoint, size)
            case "ort-naive" | "openvino":
                plain = plain or _plain(read_checkpoint(checkpoint).model, size, frames, folder)
                opener = open_onnxruntime if name == "ort-naive" else open_openvino
                found[name] = partial(plain, open_graph=opener)
            case _:
                raise ValueError(f"there is no peer {name!r}")
    return found


def _plain(
    model: KNet, size: Size, frames: Sequence[Size], folder: Path
) -> Callable[..., Contestant]:
    graphs = {}
    for frame in frames:
        graphs[frame] = folder / f"plain-{frame[0]}x{frame[1]}.onnx"
        try:
            export_naive(model, size, frame, graphs[frame])
        except Exception as error:  # whatever the exporter raises: the others can run
            first = (str(error).strip().splitlines() or [""])[0]
            return partial(_refuse, f"torch.onnx.export: {type(error).__name__}: {first}")
    mean, std = (tuple(value.flatten().tolist()) for value in (model.mean, model.std))
    return partial(GraphPeer, graphs, size=size, mean=mean, std=std, note=_PLAIN)


def _refuse(reason: str, open_graph: object) -> Contestant:
    raise BackendError(reason)
