"""``knet-deploy inspect``: what a bundle says about itself, after every file was checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knet_deploy.cli.console import say

if TYPE_CHECKING:
    from knet_runtime.bundle.manifest import Graph, Parity
    from knet_runtime.bundle.store import Bundle


def inspect(
    bundle: Annotated[
        Path | None,
        typer.Argument(metavar="[NAME.knet]", help="The bundle; the packaged model by default."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Check every file of a bundle and show what it holds.

    Model, input and output, classes and colours, files and hashes, parity with PyTorch by engine,
    engines that were built in it, origin and licences.
    """
    from knet_runtime.bundle.manifest import encode_manifest
    from knet_runtime.bundle.store import default_bundle_path, open_bundle

    opened = open_bundle(bundle or default_bundle_path())
    if json:
        typer.echo(encode_manifest(opened.manifest).decode(), nl=False)
        return
    for label, value in _rows(opened):
        say(label, value)


def _rows(bundle: Bundle) -> Iterator[tuple[str, str]]:
    from knet_runtime.bundle.manifest import CLASSMAP_OUTPUT

    manifest = bundle.manifest
    spec, output = manifest.input, manifest.output
    yield "bundle", str(bundle.path)
    yield "name", manifest.name
    yield "model", bundle.model_id
    yield "schema", str(manifest.schema)
    yield "precision", bundle.artefact.precision
    yield (
        "input",
        f"{spec.name}: {spec.dtype} {spec.colour} {spec.layout}, {spec.height}×{spec.width} "
        f"(height×width), batch 1 to {spec.max_batch}, other sizes: {spec.resize}",
    )
    if spec.sizes is not None:
        least, most = spec.sizes.least, spec.sizes.most
        yield (
            "sizes",
            f"{least[0]}×{least[1]} to {most[0]}×{most[1]} in multiples of {spec.sizes.multiple}: "
            "run --size",
        )
    for artefact in manifest.artefacts:
        if artefact.kind == "logits":
            low = f"{spec.height // output.stride}×{spec.width // output.stride}"
            text = f"{output.name}: float32 logits, {manifest.labels.num_classes} classes, {low}"
        else:
            text = f"{CLASSMAP_OUTPUT}: uint8 classes, {spec.height}×{spec.width}"
        yield "output", text
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
    yield from _engine_rows(bundle)
    origin, licence = manifest.provenance, manifest.licence
    yield "preset", origin.preset
    yield "checkpoint", f"sha256 {origin.checkpoint_sha256[:12]}"
    yield "tools", ", ".join(f"{tool} {version}" for tool, version in sorted(origin.tools.items()))
    yield "licence", f"code {licence.code}; weights {licence.weights}; data {licence.data}"


def _artefact_rows(artefact: Graph) -> Iterator[tuple[str, str]]:
    weights = f", weights in {', '.join(artefact.external_data)}" if artefact.external_data else ""
    yield (
        "artefact",
        f"{artefact.path} ({artefact.kind}, {artefact.format}, {artefact.precision}{weights})",
    )
    limits = artefact.tolerance
    yield (
        "tolerance",
        f"mIoU ±{limits.delta_miou:g} points, worst class ±{limits.worst_class_delta_iou:g} "
        f"points, agreement ≥ {100 * limits.agreement:g} %, logits ±{limits.max_logit_diff:g} of "
        "the largest",
    )
    if not artefact.parity:
        yield "parity", "not measured: knet-deploy verify measures it"
    for parity in artefact.parity:
        yield "parity", _parity_line(parity)


def _engine_rows(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """The engines that were built in the bundle; the manifest does not list them."""
    from knet_runtime.engines.plan_store import FOLDER, read_record
    from knet_runtime.errors import EngineError

    for path in sorted((bundle.path / FOLDER).glob("*.engine")):
        try:
            record = read_record(path)
        except EngineError as error:
            yield "engine", f"{path.name}: {error}"
            continue
        made_for = record.gpu.name if record.gpu else ", ".join(record.targets)
        profile = record.options.profile
        yield (
            "engine",
            f"{path.name}: {record.engine} {record.version}, {record.kind}, {record.precision}, "
            f"for {made_for}, {profile.least} to {profile.most}, {record.bytes:,} bytes",
        )


def _parity_line(parity: Parity) -> str:
    scores = ""
    if parity.miou_reference is not None and parity.miou_artefact is not None:
        scores = f"mIoU {parity.miou_reference:.2f} → {parity.miou_artefact:.2f} %, "
    if parity.worst_class_delta_iou is not None:
        scores += f"worst class {parity.worst_class_delta_iou:+.3f} points, "
    scores += f"agreement {100 * parity.agreement:.4f} %, "
    if parity.max_logit_diff is not None:
        scores += f"logits differ by at most {parity.max_logit_diff:.2g} of the largest, "
    return (
        f"{'passed' if parity.passed else 'FAILED'} on {parity.engine} ({parity.device}): {scores}"
        f"on {parity.images} images of {parity.data}"
    )
