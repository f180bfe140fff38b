"""A Triton Inference Server model repository from a bundle: images in, class maps out.

The ``classmap`` graph takes uint8 images and gives uint8 classes, so it is served as it is, by
Triton's ONNX Runtime backend, which gathers requests into batches. A network for instances or
panoptic segmentation has its logits served, of classes and masks. The folder is laid out as the
server's documentation of model repositories and ``model_config.proto`` say.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from knet_runtime.atomic import AtomicFolder, output_error
from knet_runtime.bundle.manifest import InputSpec, Kind, Manifest, OutputSpec
from knet_runtime.bundle.store import Bundle
from knet_runtime.errors import BundleError, OutputError

_LABELS = "labels.txt"
_VERSION = "1"


def write_triton(bundle: Bundle, repository: Path, *, replace: bool = False) -> Path:
    """Write the model NAME of ``bundle`` into the folder ``repository``, which may hold others:
    NAME/config.pbtxt, NAME/labels.txt and NAME/1/ with the graph and its weights.

    The model appears whole or not at all; ``replace`` allows it to take the place of one. Returns
    its folder. Raises BundleError for a bundle without a class map graph, OutputError when the
    folder cannot be written.
    """
    graph, *weights = bundle.graph(_served(bundle.manifest)).files
    check_triton(repository, bundle.manifest.name, replace=replace)
    destination = repository.absolute() / bundle.manifest.name
    if any(Path(path).parent != Path(graph).parent for path in weights):
        raise BundleError(f"{bundle.path}: {graph} does not lie beside its weights: export again")
    labels = "".join(f"{name}\n" for name in bundle.manifest.labels.names)
    try:
        with AtomicFolder(destination) as fresh:
            version = fresh.path / _VERSION
            version.mkdir()
            (fresh.path / "config.pbtxt").write_bytes(triton_config(bundle.manifest).encode())
            (fresh.path / _LABELS).write_bytes(labels.encode())
            shutil.copyfile(bundle.file(graph), version / "model.onnx")
            for path in weights:
                shutil.copyfile(bundle.file(path), version / Path(path).name)
            fresh.commit()
    except OSError as error:
        raise output_error(destination, error) from error
    return destination


def check_triton(repository: Path, name: str, *, replace: bool = False) -> None:
    """Raise OutputError if ``write_triton`` would not write the model ``name`` there."""
    destination = repository / name
    if not os.path.lexists(destination):
        return
    if not replace:
        raise OutputError(f"{destination} exists already: choose another folder, or pass --force")
    if not (destination / "config.pbtxt").is_file():
        raise OutputError(f"{destination} exists and is no Triton model: choose another folder")


def _served(manifest: Manifest) -> Kind:
    return "classmap" if manifest.task == "semantic" else "logits"


def triton_config(manifest: Manifest) -> str:
    """The text of ``config.pbtxt``, a ModelConfig of Triton's model_config.proto.

    With batches the sizes do not name the batch, and requests are gathered up to ``max_batch``; a
    graph of one image has max_batch_size 0, which is Triton's word for a fixed first size.
    """
    spec, given = manifest.input, manifest.graph(_served(manifest)).outputs
    sides = [spec.height, spec.width] if spec.sizes is None else [-1, -1]
    batched = spec.max_batch > 1
    first = [] if batched else [1]
    lines = [
        f"name: {json.dumps(manifest.name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {spec.max_batch if batched else 0}",
        "input [",
        f"  {{ name: {json.dumps(spec.name)} data_type: TYPE_UINT8 dims: {[*first, *sides, 3]} }}",
        "]",
        "output [",
        ",\n".join(f"  {{ {_output(output, spec, first)} }}" for output in given),
        "]",
    ]
    if batched:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def _output(output: OutputSpec, spec: InputSpec, first: list[int]) -> str:
    # Only class maps have free sizes.
    shape = output.shape(spec.size) if spec.sizes is None else (-1, -1)
    sizes = [*first, *shape]
    kind = "TYPE_FP32" if output.dtype == "float32" else "TYPE_UINT8"
    text = f"name: {json.dumps(output.name)} data_type: {kind} dims: {sizes}"
    if output.meaning == "class_map":
        text += f" label_filename: {json.dumps(_LABELS)}"
    return text
