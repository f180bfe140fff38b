"""A Triton Inference Server model repository from a bundle: pictures in, class maps out.

The ``classmap`` graph takes uint8 pictures and gives uint8 classes, so it is served as it is, by
Triton's ONNX Runtime backend, which gathers requests into batches. The folder is laid out as the
server's documentation of model repositories and ``model_config.proto`` say.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path

from knet_runtime.atomic import output_error
from knet_runtime.bundle.manifest import Manifest
from knet_runtime.bundle.store import Bundle, exchange_folders
from knet_runtime.errors import BundleError, OutputError

_LABELS = "labels.txt"
_VERSION = "1"


def write_triton(bundle: Bundle, repository: Path, *, replace: bool = False) -> Path:
    """Write the model NAME of ``bundle`` into the folder ``repository``, which may hold others:
    NAME/config.pbtxt, NAME/labels.txt and NAME/1/ with the graph and its weights.

    The model appears whole or not at all; ``replace`` allows it to take the place of one. Returns
    its folder. Raises BundleError for a bundle without a class map graph, OutputError when the
    folder can not be written.
    """
    graph, *weights = bundle.graph("classmap").files
    check_triton(repository, bundle.manifest.name, replace=replace)
    destination = repository.absolute() / bundle.manifest.name
    fresh = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.new")
    if any(Path(path).parent != Path(graph).parent for path in weights):
        raise BundleError(f"{bundle.path}: {graph} does not lie beside its weights: export again")
    try:
        (fresh / _VERSION).mkdir(parents=True)
        _write(fresh / "config.pbtxt", triton_config(bundle.manifest).encode())
        _write(
            fresh / _LABELS, "".join(f"{name}\n" for name in bundle.manifest.labels.names).encode()
        )
        _write(fresh / _VERSION / "model.onnx", bundle.file(graph))
        for path in weights:
            _write(fresh / _VERSION / Path(path).name, bundle.file(path))
        exchange_folders(fresh, destination, fresh.with_suffix(".old"))
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise output_error(destination, error) from error
    except BaseException:  # KeyboardInterrupt as well: no half-written folder is left behind
        shutil.rmtree(fresh, ignore_errors=True)
        raise
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


def triton_config(manifest: Manifest) -> str:
    """The text of ``config.pbtxt``, a ModelConfig of Triton's model_config.proto.

    With batches the sizes do not name the batch, and requests are gathered up to ``max_batch``; a
    graph of one picture has max_batch_size 0, which is Triton's word for a fixed first size.
    """
    spec, output = manifest.input, manifest.graph("classmap").output("class_map")
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
        f"  {{ name: {json.dumps(output.name)} data_type: TYPE_UINT8 dims: {[*first, *sides]}"
        f" label_filename: {json.dumps(_LABELS)} }}",
        "]",
    ]
    if batched:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def _write(path: Path, content: bytes | Path) -> None:
    with path.open("xb") as target:
        if isinstance(content, bytes):
            target.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())
