"""A checkpoint becomes a bundle: graphs, check, golden tensors, parity record, model card."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from knet_export.fuse.model import reference_logits
from knet_export.fuse.precision import check_finite
from knet_export.graph.check import check_onnx, check_structure
from knet_export.graph.classmap import add_classmap_head
from knet_export.graph.to_onnx import CLASSMAP_NAME, LOGITS_NAME, WEIGHTS_NAME
from knet_export.int8.calibrate import open_calibration
from knet_export.int8.search import Calibrator
from knet_export.int8.write import QUANTISATION_NAME, Calibration, read_quantisation, write_int8
from knet_export.spec import bundle_graphs, export_spec, model_card, write_logits_graph
from knet_export.verify.data import check_labels, pictures
from knet_export.verify.measure import default_tolerance
from knet_export.verify.reference import TorchReference
from knet_export.verify.verify import Picture, verify
from knet_runtime.atomic import make_folder, output_error, remove_empty
from knet_runtime.bundle.manifest import (
    InputSpec,
    Licence,
    Manifest,
    Precision,
    Provenance,
    SizeRange,
)
from knet_runtime.bundle.store import Bundle, write_bundle
from knet_runtime.engines import open_engine
from knet_runtime.errors import ConfigError, OutputError, ParityError
from knet_runtime.golden import GOLDEN_NAME, save_golden
from knet_runtime.preprocess import fit_to_input
from knet_runtime.types import Size
from knet_synthetic import CAMVID11, Street
from knet_train.checkpoint import Checkpoint, read_checkpoint
from knet_train.data.dataset import LabelledFolder, open_folder

CARD_NAME = "MODEL_CARD.md"
_SCRATCH = ".work"
_GOLDEN_IMAGES = 2
_SYNTHETIC_SCENES = 12
_SCENE_SEED = 900_000  # far from the seeds of training


def export_bundle(
    checkpoint: Path,
    destination: Path,
    *,
    precision: Precision = "fp32",
    size: Size | None = None,
    sizes: SizeRange | None = None,
    max_batch: int = 16,
    calibration: Path | None = None,
    calibrator: Calibrator = "auto",
    keep_fp32: Sequence[str] = (),
    keep_fp16: Sequence[str] = (),
    data: Path | None = None,
    split: str = "val",
    card: Path | None = None,
    licence: Licence | None = None,
    replace: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Export ``checkpoint`` to the folder ``destination`` (NAME.knet) and prove it.

    The graphs take pictures of ``size`` (height, width; the checkpoint's own if None), or of all
    ``sizes``, of which ``size`` is then the usual one, in batches up to ``max_batch``. They are
    run at once at other batches, contents and sizes than they were traced with; then the whole
    bundle is compared with PyTorch on the ``split`` of ``data``, or on synthetic streets without
    ``data``, and the result is recorded in the manifest. bf16 runs on no engine here: its graphs
    are checked for being valid, and parity is left for ``verify`` where they run. Golden inputs
    come from the same pictures, golden logits from the trained model in float32. ``card`` replaces
    the generated MODEL_CARD.md. The destination appears whole or not at all; ``replace`` allows it
    to replace a bundle.

    int8 is calibrated on the pictures of ``calibration``, a folder of images or a data set (its
    split "train"), by ``calibrator``, and leaves what matches ``keep_fp32`` or ``keep_fp16`` in
    that precision (see ``sensitivity``); the bundle then holds ``quantisation.json`` too.

    Raises ParityError when an artefact leaves its tolerance, CheckpointError, DataError,
    OutputError or ConfigError for what is wrong with the arguments.

        >>> from pathlib import Path
        >>> from knet_deploy import export_bundle
        >>> bundle = export_bundle(Path("best.safetensors"), Path("street.knet"))
        >>> bundle.graph("logits").parity[0].passed
        True
    """
    if (precision == "int8") != (calibration is not None):
        raise ConfigError(
            "--precision int8 and --calibration go together: int8 needs pictures to measure on, "
            "such as those the model was trained with"
        )
    if destination.exists() and not replace:
        raise OutputError(f"{destination} exists already: choose another name, or pass --force")
    if card is not None and not card.is_file():
        raise OutputError(f"--card {card} is not a file: name a Markdown file")
    loaded = read_checkpoint(checkpoint)
    check_finite(loaded.model, str(checkpoint))
    folder = None if data is None else open_folder(data, split)
    settings = None
    if calibration is not None:
        found = open_calibration(calibration, loaded.labels)
        settings = Calibration(found, calibrator, tuple(keep_fp32), tuple(keep_fp16))
    spec = export_spec(loaded.config, size, sizes, max_batch)
    manifest = _manifest(loaded, precision, spec, destination, licence)
    if folder is not None:
        check_labels(Bundle(destination, manifest), folder)
    parent = destination.absolute().parent
    created = []
    try:
        created = make_folder(parent)
        # On the destination's own disk, which is the one that has to hold it.
        with _scratch(parent, f".{destination.name}.") as work:
            files = _write_files(loaded, manifest, settings, work, folder, on_step)
            draft = write_bundle(work / "draft.knet", manifest, {**files, CARD_NAME: b""})
            if precision == "bf16":
                on_step("bf16 is not compared with PyTorch: no engine on this machine runs it")
            else:
                on_step("comparing with PyTorch")
                manifest = _with_parity(draft, loaded, folder)
            record = read_quantisation(work) if settings else None
            text = (
                card.read_bytes() if card else model_card(manifest, loaded.config, record).encode()
            )
            on_step("writing the bundle")
            return write_bundle(destination, manifest, {**files, CARD_NAME: text}, replace=replace)
    except OSError as error:
        raise output_error(destination, error) from error
    finally:
        remove_empty(created)  # unless the bundle is there


@contextmanager
def _scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """A hidden folder in ``parent``. Those that killed exports left there are removed: a folder in
    use is locked by its process, whatever ends that."""
    for other in parent.glob(f"{prefix}*{_SCRATCH}"):
        with _locked(other) as orphaned:
            if orphaned:
                shutil.rmtree(other, ignore_errors=True)
    folder = tempfile.TemporaryDirectory(prefix=prefix, suffix=_SCRATCH, dir=parent)
    with folder as work, _locked(Path(work)):
        yield Path(work)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock; False if another process has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(handle)


def _manifest(
    checkpoint: Checkpoint,
    precision: Precision,
    spec: InputSpec,
    destination: Path,
    licence: Licence | None,
) -> Manifest:
    return Manifest(
        name=destination.name.removesuffix(".knet"),
        input=spec,
        labels=checkpoint.labels,
        graphs=bundle_graphs(
            precision, checkpoint.labels.num_classes, checkpoint.config.model.stride
        ),
        provenance=Provenance(checkpoint.sha256, checkpoint.config.preset, _tools()),
        licence=licence or Licence("Apache-2.0", "unstated", "unstated"),
    )


def _write_files(
    checkpoint: Checkpoint,
    manifest: Manifest,
    calibration: Calibration | None,
    work: Path,
    folder: LabelledFolder | None,
    on_step: Callable[[str], None],
) -> dict[str, bytes | Path]:
    """Graphs, weights and golden tensors in ``work``, checked: names within the bundle -> files."""
    spec, artefact = manifest.input, manifest.graph("logits")
    output = artefact.output("semantic_logits")
    on_step("exporting the graph")
    names = [artefact.path for artefact in manifest.graphs]
    others = [WEIGHTS_NAME, GOLDEN_NAME]
    traced = work if calibration is None else work / "fp32"
    traced.mkdir(exist_ok=True)
    write_logits_graph(checkpoint.model, spec, output, artefact.precision, traced)
    if calibration is not None:
        check_onnx(checkpoint.model, spec, output, traced, default_tolerance("fp32"))
        write_int8(traced, work, manifest, calibration, on_step)
        others.append(QUANTISATION_NAME)
    if CLASSMAP_NAME in names:
        add_classmap_head(work / LOGITS_NAME, work / CLASSMAP_NAME, output)
    if artefact.precision == "bf16":
        check_structure(work)
    else:
        on_step("running it at other batches, contents and sizes")
        check_onnx(checkpoint.model, spec, output, work, artefact.tolerance)
    on_step("golden inputs")
    images = islice(_pictures(folder, checkpoint), _GOLDEN_IMAGES)
    _write_golden(work / GOLDEN_NAME, checkpoint, manifest, images)
    return {name: work / name for name in (*names, *others)}


def _with_parity(draft: Bundle, checkpoint: Checkpoint, folder: LabelledFolder | None) -> Manifest:
    name = f"{folder.root.name}, split {folder.split}" if folder else "synthetic streets"
    with open_engine(draft, "onnxruntime-cpu") as backend:
        reference = TorchReference(checkpoint)
        report = verify(draft, backend, reference, _pictures(folder, checkpoint), name)
    if not report.passed:
        raise ParityError(f"nothing was written: {'; '.join(report.failures)} (on {name})")
    proven = msgspec.structs.replace(draft.graph("logits"), parity=(report.parity(),))
    return msgspec.structs.replace(draft.manifest, graphs=(proven, *draft.manifest.graphs[1:]))


def _pictures(folder: LabelledFolder | None, checkpoint: Checkpoint) -> Iterator[Picture]:
    if folder is not None:
        yield from pictures(folder)
        return
    labelled = checkpoint.labels.names == CAMVID11.names
    size = checkpoint.config.data.eval_size
    for scene in range(_SYNTHETIC_SCENES):
        image, label = Street(_SCENE_SEED + scene, size).frame(37 * scene)
        yield image, label if labelled else None


def _write_golden(
    path: Path, checkpoint: Checkpoint, manifest: Manifest, images: Iterable[Picture]
) -> None:
    fitted: NDArray[np.uint8] = np.stack(
        [fit_to_input(image, manifest.input)[0] for image, _ in images]
    )
    logits = reference_logits(checkpoint.model, torch.from_numpy(fitted)).numpy()
    save_golden(path, fitted, logits)


def _tools() -> dict[str, str]:
    return {
        name: metadata.version(name)
        for name in ("knet-deploy", "torch", "timm", "onnx", "onnxscript", "onnxruntime")
    }
