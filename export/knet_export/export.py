"""A checkpoint becomes a bundle: graph, check, golden tensors, parity record, model card."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from knet_export.card import model_card
from knet_export.deploy import reference_logits
from knet_export.to_onnx import check_onnx, export_onnx
from knet_export.verify import Picture, check_labels, pictures, verify
from knet_runtime.backends import open_backend
from knet_runtime.bundle import Bundle, write_bundle
from knet_runtime.errors import OutputError, ParityError
from knet_runtime.golden import GOLDEN_NAME, save_golden
from knet_runtime.labels import CAMVID11
from knet_runtime.manifest import (
    Artefact,
    Licence,
    Manifest,
    OutputSpec,
    Provenance,
    Tolerance,
)
from knet_runtime.preprocess import fit
from knet_runtime.synthetic import Street
from knet_train.checkpoint import Checkpoint, read_checkpoint
from knet_train.dataset import LabelledFolder, open_folder
from knet_train.evaluate import input_spec

CARD_NAME = "MODEL_CARD.md"
GRAPH_NAME = "model.onnx"
FP32 = Tolerance(delta_miou=0.05, worst_class_delta_iou=0.5, agreement=0.9995, max_logit_diff=0.02)
_GOLDEN_IMAGES = 2
_SYNTHETIC_SCENES = 12
_SCENE_SEED = 900_000  # far from the seeds of training


def export_bundle(
    checkpoint: Path,
    destination: Path,
    *,
    data: Path | None = None,
    split: str = "val",
    card: Path | None = None,
    licence: Licence | None = None,
    replace: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Export ``checkpoint`` to the folder ``destination`` (NAME.knet) and prove it.

    The graph is run at once at other batches and contents than it was traced with; then the whole
    bundle is compared with PyTorch on the ``split`` of ``data``, or on synthetic streets without
    ``data``, and the result is recorded in the manifest. Golden inputs come from the same
    pictures. ``card`` replaces the generated MODEL_CARD.md. The destination appears whole or not
    at all; ``replace`` allows it to replace a bundle.

    Raises ParityError when the artefact leaves its tolerance, CheckpointError, DataError,
    OutputError or ConfigError for what is wrong with the arguments.
    """
    if destination.exists() and not replace:
        raise OutputError(f"{destination} exists already: choose another name, or pass --force")
    if card is not None and not card.is_file():
        raise OutputError(f"--card {card} is not a file: name a Markdown file")
    loaded = read_checkpoint(checkpoint)
    folder = None if data is None else open_folder(data, split)
    spec = input_spec(loaded.config)
    output = OutputSpec(name="logits", kind="logits", stride=loaded.config.model.stride)
    manifest = Manifest(
        name=destination.name.removesuffix(".knet"),
        input=spec,
        output=output,
        labels=loaded.labels,
        artefacts=(Artefact(path=GRAPH_NAME, tolerance=FP32),),
        provenance=Provenance(loaded.sha256, loaded.config.preset, _tools()),
        licence=licence or Licence("Apache-2.0", "unstated", "unstated"),
    )
    with tempfile.TemporaryDirectory(prefix="knet-export-") as scratch:
        work = Path(scratch)
        on_step("exporting the graph")
        export_onnx(loaded.model, spec, output, work / GRAPH_NAME)
        on_step("running it at other batches and contents")
        check_onnx(loaded.model, spec, work / GRAPH_NAME, FP32.max_logit_diff)
        on_step("golden inputs")
        _write_golden(work / GOLDEN_NAME, loaded, islice(_pictures(folder, loaded), _GOLDEN_IMAGES))
        files: dict[str, bytes | Path] = {
            GRAPH_NAME: work / GRAPH_NAME,
            GOLDEN_NAME: work / GOLDEN_NAME,
            CARD_NAME: b"",
        }
        draft = write_bundle(work / destination.name, manifest, files)
        on_step("comparing with PyTorch")
        manifest = _with_parity(draft, loaded, folder)
        text = card.read_bytes() if card else model_card(manifest, loaded.config).encode()
        on_step("writing the bundle")
        return write_bundle(destination, manifest, {**files, CARD_NAME: text}, replace=replace)


def _with_parity(draft: Bundle, checkpoint: Checkpoint, folder: LabelledFolder | None) -> Manifest:
    if folder is not None:
        check_labels(draft, folder)
        name = f"{folder.root.name}, split {folder.split}"
    else:
        name = "synthetic streets"
    with open_backend(draft, "onnxruntime-cpu") as backend:
        report = verify(draft, backend, checkpoint, _pictures(folder, checkpoint), name)
    if not report.passed:
        raise ParityError(f"nothing was written: {'; '.join(report.failures)} (on {name})")
    artefact = msgspec.structs.replace(draft.artefact, parity=report.parity())
    return msgspec.structs.replace(draft.manifest, artefacts=(artefact,))


def _pictures(folder: LabelledFolder | None, checkpoint: Checkpoint) -> Iterator[Picture]:
    if folder is not None:
        yield from pictures(folder)
        return
    labelled = checkpoint.labels.names == CAMVID11.names
    size = checkpoint.config.data.eval_size
    for scene in range(_SYNTHETIC_SCENES):
        image, label = Street(_SCENE_SEED + scene, size).frame(37 * scene)
        yield image, label if labelled else None


def _write_golden(path: Path, checkpoint: Checkpoint, images: Iterable[Picture]) -> None:
    spec, stride = input_spec(checkpoint.config), checkpoint.config.model.stride
    fitted: NDArray[np.uint8] = np.stack([fit(image, spec, stride)[0] for image, _ in images])
    logits = reference_logits(checkpoint.model, torch.from_numpy(fitted)).numpy()
    save_golden(path, fitted, logits)


def _tools() -> dict[str, str]:
    return {
        name: metadata.version(name)
        for name in ("knet-deploy", "torch", "timm", "onnx", "onnxscript", "onnxruntime")
    }
