"""``knet-deploy inspect``: what a bundle says about itself, after every file was checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knet_deploy.console import say

if TYPE_CHECKING:
    from knet_runtime.bundle import Bundle
    from knet_runtime.manifest import Artefact


def inspect(
    bundle: Annotated[
        Path | None,
        typer.Argument(metavar="[NAME.knet]", help="The bundle; the packaged model by default."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Check every file of a bundle and show what it holds.

    Model, input and output, classes and colours, files and hashes, parity with PyTorch, origin and
    licences.
    """
    from knet_runtime.bundle import default_bundle_path, open_bundle
    from knet_runtime.manifest import encode_manifest

    opened = open_bundle(bundle or default_bundle_path())
    if json:
        typer.echo(encode_manifest(opened.manifest).decode(), nl=False)
        return
    for label, value in _rows(opened):
        say(label, value)


def _rows(bundle: Bundle) -> Iterator[tuple[str, str]]:
    manifest = bundle.manifest
    spec, output = manifest.input, manifest.output
    yield "bundle", str(bundle.path)
    yield "name", manifest.name
    yield "model", bundle.model_id
    yield "schema", str(manifest.schema)
    yield (
        "input",
        f"{spec.name}: {spec.dtype} {spec.colour} {spec.layout}, {spec.height}×{spec.width} "
        f"(height×width), batch 1 to {spec.max_batch}, other sizes: {spec.resize}",
    )
    yield (
        "output",
        f"{output.name}: float32 {output.kind}, {manifest.labels.num_classes} classes, "
        f"{spec.height // output.stride}×{spec.width // output.stride}",
    )
    classes = zip(manifest.labels.names, manifest.labels.palette, strict=True)
    for index, (name, (red, green, blue)) in enumerate(classes):
        text = f"{index:>3}  #{red:02x}{green:02x}{blue:02x}  {name}"
        yield "" if index else "classes", text
    yield "ignored", str(manifest.labels.ignore_index)
    for path, record in sorted(manifest.files.items()):
        # open_bundle has read and hashed them all, or there would be nothing to show.
        yield "file", f"{path}  {record.bytes:,} bytes  sha256 {record.sha256[:12]}  ok"
    for artefact in manifest.artefacts:
        yield from _artefact_rows(artefact)
    origin, licence = manifest.provenance, manifest.licence
    yield "preset", origin.preset
    yield "checkpoint", f"sha256 {origin.checkpoint_sha256[:12]}"
    yield "tools", ", ".join(f"{tool} {version}" for tool, version in sorted(origin.tools.items()))
    yield "licence", f"code {licence.code}; weights {licence.weights}; data {licence.data}"


def _artefact_rows(artefact: Artefact) -> Iterator[tuple[str, str]]:
    yield "artefact", f"{artefact.path} ({artefact.format}, {artefact.precision})"
    limits, parity = artefact.tolerance, artefact.parity
    yield (
        "tolerance",
        f"mIoU ±{limits.delta_miou:g} points, worst class ±{limits.worst_class_delta_iou:g} "
        f"points, agreement ≥ {100 * limits.agreement:g} %, logits ±{limits.max_logit_diff:g}",
    )
    if parity is None:
        yield "parity", "not measured: knet-deploy verify measures it"
        return
    scores = ""
    if parity.miou_reference is not None and parity.miou_artefact is not None:
        scores = f"mIoU {parity.miou_reference:.2f} → {parity.miou_artefact:.2f} %, "
    if parity.worst_class_delta_iou is not None:
        scores += f"worst class {parity.worst_class_delta_iou:+.3f} points, "
    yield (
        "parity",
        f"{scores}agreement {100 * parity.agreement:.4f} %, logits differ by at most "
        f"{parity.max_logit_diff:.2g} on {parity.images} images of {parity.data}",
    )
