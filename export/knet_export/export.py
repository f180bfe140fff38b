"""A checkpoint becomes a bundle: read top to bottom, ``export_bundle`` is the whole story."""

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
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_export.data import LabelledImage, open_images, open_labelled
from knet_export.fuse.model import Fused, fuse_for
from knet_export.fuse.precision import check_finite, to_precision
from knet_export.fuse.segments import fuse_segments
from knet_export.graph.check import check_onnx, check_segments, check_structure
from knet_export.graph.classmap import add_classmap_head
from knet_export.graph.onnx_graph import OnnxGraph
from knet_export.graph.to_onnx import CLASSMAP_NAME, LOGITS_NAME, WEIGHTS_NAME, export_onnx
from knet_export.int8 import Calibrator
from knet_export.int8.search import QUANTISATION_NAME, quantise_within
from knet_export.spec import bundle_graphs, export_spec, model_card, segment_graphs
from knet_export.verify.reference import TorchReference
from knet_export.verify.verify import verify
from knet_runtime.atomic import make_folder, output_error, remove_empty
from knet_runtime.bundle.manifest import (
    Graph,
    InputSpec,
    Licence,
    Manifest,
    Precision,
    Provenance,
    SizeRange,
    name_for,
)
from knet_runtime.bundle.store import Bundle, write_bundle
from knet_runtime.engines import open_engine
from knet_runtime.errors import ConfigError, OutputError, ParityError
from knet_runtime.golden import GOLDEN_NAME, save_golden
from knet_runtime.palettes import recoloured
from knet_runtime.preprocess import fit_to_input
from knet_runtime.types import Size
from knet_synthetic import CAMVID11, Street
from knet_train.checkpoint import Checkpoint, SegmentCheckpoint, read_any_checkpoint
from knet_train.inference import predict_logits, predict_segment_logits, segment_rules

AnyCheckpoint = Checkpoint | SegmentCheckpoint
CARD_NAME = "MODEL_CARD.md"
_WORK = ".work"
_GOLDEN_IMAGES = 2
_STREETS, _SCENES = 4, 12
_SCENE_SEED = 900_000  # far from the seeds of training


def export_bundle(
    checkpoint: Path | str,
    destination: Path | str,
    *,
    precision: Precision = "fp32",
    size: Size | None = None,
    sizes: SizeRange | None = None,
    max_batch: int = 16,
    calibration: Path | str | None = None,
    calibrator: Calibrator = "auto",
    keep_fp32: Sequence[str] = (),
    keep_fp16: Sequence[str] = (),
    data: Path | str | None = None,
    split: str = "val",
    card: Path | None = None,
    palette: str | Path = "model",
    licence: Licence | None = None,
    replace: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Export ``checkpoint`` to the folder ``destination`` (NAME.knet) and prove it.

    The graphs take images of ``size`` (height, width; the checkpoint's own if None), or of all
    ``sizes``, of which ``size`` is then the usual one, in batches up to ``max_batch``. They are
    run at once at other batches, contents and sizes than they were traced with; then the bundle is
    compared with PyTorch on the ``split`` of ``data``, or on synthetic streets without ``data``,
    and the result is recorded in the manifest. bf16 runs on no engine here: its graphs are checked
    for being valid, and parity is left for ``verify`` where they run. Golden inputs come from the
    same images, golden logits from the trained model in float32. ``card`` replaces the generated
    MODEL_CARD.md, and ``palette`` (see ``palettes.recoloured``) the checkpoint's colours of the
    classes. The destination appears whole or not at all; ``replace`` allows it to replace a
    bundle.

    A network for instances or panoptic segmentation becomes one graph, of logits; of free sizes it
    takes the multiples of 32.

    int8 is calibrated on the images of ``calibration``, a folder of images or a data set (its split
    "train"), by ``calibrator``, and leaves what matches ``keep_fp32`` or ``keep_fp16`` in that
    precision (see ``int8.search``); the bundle then holds ``quantisation.json`` too.

    Raises ParityError when a graph leaves its tolerance, CheckpointError, DataError, OutputError or
    ConfigError for what is wrong with the arguments.

        >>> from knet_deploy import export_bundle
        >>> bundle = export_bundle("best.safetensors", "street.knet")
        >>> bundle.graph("logits").parity[0].passed
        True
    """
    checkpoint, destination = Path(checkpoint), Path(destination)
    if (precision == "int8") != (calibration is not None):
        raise ConfigError(
            "--precision int8 and --calibration go together: int8 needs images to measure on, "
            "such as those the model was trained with"
        )
    _check_name(destination)
    if destination.exists() and not replace:
        raise OutputError(f"{destination} exists already: choose another name, or pass --force")
    if card is not None and not card.is_file():
        raise OutputError(f"--card {card} is not a file: name a Markdown file")

    loaded = read_any_checkpoint(checkpoint)
    labels = recoloured(loaded.labels, palette)
    spec = export_spec(loaded.config, size, sizes, max_batch)  # refuses before images are read
    check_finite(loaded.model, str(checkpoint))
    int8_images = None
    if calibration is not None:
        int8_images = open_images(Path(calibration), "train", loaded.labels, "--calibration")
    proof = _proof_images(loaded, data, split)

    task = loaded.config.model.task
    manifest = Manifest(
        name=name_for(destination),
        input=spec,
        labels=labels,
        graphs=_graphs(loaded, precision),
        provenance=Provenance(loaded.sha256, loaded.config.preset, _tools()),
        licence=licence or Licence("Apache-2.0", "unstated", "unstated"),
        task=task,
        rules=msgspec.UNSET if task == "semantic" else segment_rules(loaded.config),
    )
    logits = manifest.graph("logits")

    with _work_folder(destination) as work:  # what lies in it becomes the bundle
        on_step("exporting the graph")
        traced = work if int8_images is None else work / "fp32"
        traced.mkdir(exist_ok=True)
        fused = to_precision(_fused(loaded, manifest), precision)
        export_onnx(fused, spec, logits.outputs, traced)

        record = None
        if int8_images is not None:
            _check(loaded, spec, _graphs(loaded, "fp32")[0], traced)
            quantised, record = quantise_within(
                OnnxGraph.load(traced / LOGITS_NAME),
                manifest,
                int8_images,
                logits.tolerance,
                calibrator=calibrator,
                keep_fp32=keep_fp32,
                keep_fp16=keep_fp16,
                on_step=on_step,
            )
            quantised.save(work / LOGITS_NAME, WEIGHTS_NAME)
            text = msgspec.json.format(msgspec.json.encode(record)) + b"\n"
            (work / QUANTISATION_NAME).write_bytes(text)

        if CLASSMAP_NAME in (graph.path for graph in manifest.graphs):
            add_classmap_head(work / LOGITS_NAME, work / CLASSMAP_NAME, logits.outputs[0])
        if precision == "bf16":
            check_structure(work)
        else:
            on_step("running it at other batches, contents and sizes")
            _check(loaded, spec, logits, work)

        on_step("golden inputs")
        _write_golden(work / GOLDEN_NAME, loaded, manifest, proof)
        if precision == "bf16":
            on_step("bf16 is not compared with PyTorch: no engine on this machine runs it")
        else:
            on_step("comparing with PyTorch")
            manifest = _with_parity(Bundle(work, manifest), loaded, proof)

        on_step("writing the bundle")
        text = card.read_bytes() if card else model_card(manifest, loaded.config, record).encode()
        files = {path.name: path for path in work.iterdir() if path.is_file()}
        return write_bundle(destination, manifest, {**files, CARD_NAME: text}, replace=replace)


def _graphs(loaded: AnyCheckpoint, precision: Precision) -> tuple[Graph, ...]:
    if isinstance(loaded, SegmentCheckpoint):
        return segment_graphs(precision, loaded.model)
    return bundle_graphs(precision, loaded.labels.num_classes, loaded.config.model.stride)


def _fused(loaded: AnyCheckpoint, manifest: Manifest) -> Fused:
    spec, precision = manifest.input, manifest.precision
    if isinstance(loaded, SegmentCheckpoint):
        return fuse_segments(loaded.model, spec, precision)
    output = manifest.graph("logits").output("semantic_logits")
    return fuse_for(loaded.model, spec, output, precision)


def _check(loaded: AnyCheckpoint, spec: InputSpec, graph: Graph, folder: Path) -> None:
    if isinstance(loaded, SegmentCheckpoint):
        check_segments(loaded.model, spec, graph, folder)
    else:
        output = graph.output("semantic_logits")
        check_onnx(loaded.model, spec, output, folder, graph.tolerance)


def _check_name(destination: Path) -> None:
    """ConfigError for the name of a file that somebody expects instead of a bundle."""
    bundle = destination.with_suffix(".knet")
    match destination.suffix.lower():
        case ".onnx":
            then = f"its ONNX graph is then {bundle / LOGITS_NAME}"
        case ".engine" | ".plan" | ".trt":
            then = f"knet-deploy build {bundle} then makes the TensorRT engine"
        case ".xml" | ".bin" | ".pt" | ".pth" | ".safetensors" | ".tflite":
            then = "every engine reads that one"
        case _:
            return
    raise ConfigError(f"{destination}: export writes a bundle, a folder: -o {bundle}; {then}")


class _Proof(NamedTuple):
    """What the bundle is compared on, in words and images."""

    name: str
    images: Iterable[LabelledImage]


def _proof_images(checkpoint: AnyCheckpoint, data: Path | str | None, split: str) -> _Proof:
    """The labelled images of ``data``, or synthetic streets, with class maps if the classes are
    theirs."""
    task = checkpoint.config.model.task
    if data is not None:
        found = open_labelled(Path(data), split, checkpoint.labels, task=task)
        return _Proof(found.name, found)
    labelled = task == "semantic" and checkpoint.labels.names == CAMVID11.names
    size = checkpoint.config.data.eval_size
    streets = [Street(_SCENE_SEED + street, size) for street in range(_STREETS)]
    scenes = (streets[scene % _STREETS].frame(37 * scene) for scene in range(_SCENES))
    return _Proof(
        "synthetic streets", [(image, label if labelled else None) for image, label in scenes]
    )


def _tools() -> dict[str, str]:
    return {
        name: metadata.version(name)
        for name in ("knet-deploy", "torch", "timm", "onnx", "onnxscript", "onnxruntime")
    }


@contextmanager
def _work_folder(destination: Path) -> Iterator[Path]:
    """A hidden folder beside ``destination``, on the disk that has to hold it. It is locked by this
    process, whatever ends that; those that killed exports left behind are removed.

    Raises OutputError for an OSError of what is done in it.
    """
    parent, prefix = destination.absolute().parent, f".{destination.name}."
    created: list[Path] = []
    try:
        created = make_folder(parent)
        for other in parent.glob(f"{prefix}*{_WORK}"):
            with _locked(other) as orphaned:
                if orphaned:
                    shutil.rmtree(other, ignore_errors=True)
        folder = tempfile.TemporaryDirectory(prefix=prefix, suffix=_WORK, dir=parent)
        with folder as work, _locked(Path(work)):
            yield Path(work)
    except OSError as error:
        raise output_error(destination, error) from error
    finally:
        remove_empty(created)  # unless the bundle is there


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


def _write_golden(path: Path, checkpoint: AnyCheckpoint, manifest: Manifest, proof: _Proof) -> None:
    """The first images as the graph takes them, and PyTorch's logits for them."""
    images = islice(proof.images, _GOLDEN_IMAGES)
    fitted = np.stack([fit_to_input(image, manifest.input)[0] for image, _ in images])
    if isinstance(checkpoint, SegmentCheckpoint):
        classes, masks = predict_segment_logits(checkpoint.model, fitted)
        save_golden(path, fitted, classes, _coarse(masks))
    else:
        save_golden(path, fitted, predict_logits(checkpoint.model, fitted))


def _coarse(masks: NDArray[np.float32]) -> NDArray[np.float16]:
    """Mask logits [K, N, h, w] with their sign, which is what the self-test compares, and of their
    size the power of two below it: a tenth of the bytes once compressed."""
    exponents = masks.astype(np.float16).view(np.uint16) & 0xFC00
    powers: NDArray[np.float16] = exponents.view(np.float16)
    return powers


def _with_parity(bundle: Bundle, checkpoint: AnyCheckpoint, proof: _Proof) -> Manifest:
    """The manifest with what was measured between the bundle and PyTorch. Raises ParityError."""
    with open_engine(bundle, "onnxruntime-cpu") as engine:
        report = verify(bundle, engine, TorchReference(checkpoint), proof.images, proof.name)
    if not report.passed:
        raise ParityError(f"nothing was written: {'; '.join(report.failures)} (on {proof.name})")
    logits, *others = bundle.manifest.graphs
    proven = msgspec.structs.replace(logits, parity=(report.parity(),))
    return msgspec.structs.replace(bundle.manifest, graphs=(proven, *others))
