"""`knet-deploy verify`: the proof that a bundle is the model that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from knet_deploy.cli.choices import BUNDLE, EngineOption
from knet_deploy.cli.console import needs_extra, one_line, parse_size, track
from knet_runtime.atomic import check_folder, write_json
from knet_runtime.bundle.manifest import Kind, Parity
from knet_runtime.bundle.store import Bundle, open_bundle, record_parity
from knet_runtime.engines import Engine, open_engine
from knet_runtime.errors import BundleError, ConfigError, OutputError, ParityError
from knet_runtime.golden import GoldenReport, replay

if TYPE_CHECKING:
    from knet_export.verify.verify import VerifyReport

_GOLDEN = "golden images"


def verify(
    bundle: Annotated[Path, typer.Argument(help=f"The bundle: {BUNDLE}.")],
    against: Annotated[
        Path | None,
        typer.Option(help="The PyTorch checkpoint that it was exported from, or another bundle."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --against: labelled images, or a folder of images.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of --data.")] = "val",
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH to compare a --dynamic bundle at.")
    ] = None,
    graph: Annotated[
        Kind | None, typer.Option(help="What the engine runs by itself if left out.")
    ] = None,
    engine: EngineOption = "auto",
    tolerance: Annotated[
        list[str] | None,
        typer.Option(help="Tighten a limit: delta_miou=0.01. Can be given several times."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write what was measured as JSON.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write report.json and report.html, with images, into this folder."),
    ] = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="On failure, name the first tensor that differs.")
    ] = False,
) -> None:
    """Compare a bundle with its checkpoint, or with another bundle (which needs no torch), on
    images; or, alone, replay its golden tensors.

    The verdict is stored in the bundle, unless it is a packaged one. The exit status is 1 outside
    the tolerance.
    """
    if (against is None) != (data is None):
        raise ConfigError("--against and --data go together: a reference, and images to compare")
    if against is None:
        for option, given in (("--report", report), ("--bisect", bisect), ("--size", size)):
            if given:
                raise ConfigError(f"{option} goes with --against and --data")
    for folder in (report, json.absolute().parent if json else None):
        if folder is not None:
            check_folder(folder)
    opened = open_bundle(bundle)
    if size is not None:
        opened = opened.with_input_size(parse_size(size))
    if tolerance:
        opened = _tightened(opened, tolerance)
    with open_engine(opened, engine, graph) as running:
        if against is None or data is None:
            _golden(opened, running, json)
        else:
            _compare(opened, running, against, data, split, size, json, report, bisect)
    typer.echo("passed")


def _tightened(bundle: Bundle, settings: list[str]) -> Bundle:
    from knet_export.verify.measure import tightened

    graphs = tuple(
        msgspec.structs.replace(graph, tolerance=tightened(graph.tolerance, settings))
        for graph in bundle.manifest.graphs
    )
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, graphs=graphs))


def _golden(bundle: Bundle, running: Engine, json: Path | None) -> None:
    report = replay(bundle, running)
    typer.echo(f"{bundle.model_id} on {running.name}: {report.images} golden images")
    limits = report.tolerance
    typer.echo(f"agreement {100 * report.agreement:.4f} % (at least {100 * limits.agreement:g} %)")
    if report.max_logit_diff is not None:
        typer.echo(
            f"largest logit difference {report.max_logit_diff:.1e} of the largest logit "
            f"(at most {limits.max_logit_diff:g})"
        )
    if json is not None:
        write_json(json, report)
    known = bundle.graph(running.kind).parity_on(running.name, running.device)
    # Two images say less than a split does: they revoke its verdict, but do not replace it.
    if known is None or known.data == _GOLDEN or not report.passed:
        _record(bundle, running.kind, _golden_parity(report, running))
    if not report.passed:
        raise ParityError(
            f"{bundle.path} on {running.name} does not give its golden results: "
            "do not trust its masks; try another --engine, or copy the bundle again"
        )


def _golden_parity(report: GoldenReport, running: Engine) -> Parity:
    difference = report.max_logit_diff
    return Parity(
        engine=running.name,
        device=running.device,
        passed=report.passed,
        miou_reference=None,
        miou_measured=None,
        delta_miou=None,
        worst_class_delta_iou=None,
        agreement=report.agreement,
        max_logit_diff=difference if difference == difference else None,  # JSON has no NaN
        images=report.images,
        data=_GOLDEN,
    )


def _record(bundle: Bundle, kind: Kind, parity: Parity) -> None:
    try:
        record_parity(bundle, kind, parity)
    except (BundleError, OutputError) as error:
        typer.echo(f"note: the verdict is not stored in the bundle: {one_line(str(error))}")


def _compare(
    bundle: Bundle,
    running: Engine,
    against: Path,
    data: Path,
    split: str,
    size: str | None,
    json: Path | None,
    report: Path | None,
    bisect: bool,
) -> None:
    from knet_export.data import open_images
    from knet_export.verify import report as page, verify as parity
    from knet_export.verify.reference import open_reference

    images = open_images(data, split, bundle.manifest.labels, task=bundle.manifest.task)
    if images.folder is None and split != "val":
        raise ConfigError(f"--split {split}: {data} is a folder of images, which has no splits")
    spec, name = bundle.manifest.input, images.name
    if size is not None:
        name += f", at {spec.height}×{spec.width}"
    worst = page.WorstImages(images.names)
    with (
        needs_extra("export", "knet-deploy verify --against CHECKPOINT"),
        open_reference(against, bundle) as reference,
        track("comparing", len(images)) as advance,
    ):

        def on_image(compared: parity.Compared) -> None:
            worst.add(compared)
            advance()

        measured = parity.verify(bundle, running, reference, images, name, on_image=on_image)
    if json is not None:
        write_json(json, measured)
    if report is not None:
        page.write_page(measured, bundle.manifest.labels, worst, report)
    _show(measured)
    if measured.same_checkpoint:
        _record(bundle, running.kind, measured.parity())
    else:
        typer.echo(
            "note: the bundle was not exported from the reference's checkpoint, so the verdict "
            "is not stored in it"
        )
    if report is not None:
        typer.echo(f"report              {report / page.PAGE_NAME}")
    if measured.passed:
        return
    if bisect:
        _bisect(bundle, running, against, images.images[worst.first])
    raise ParityError("; ".join(measured.failures))


def _bisect(bundle: Bundle, running: Engine, against: Path, image: Path) -> None:
    with needs_extra("export", "knet-deploy verify --bisect"):
        from knet_export.verify.bisect import bisect
    found = bisect(bundle, running.kind, against, image, on_step=typer.echo)
    for line in found.lines(running.name):
        typer.echo(line)


def _show(report: VerifyReport) -> None:
    from knet_export.verify.measure import stage_limit

    height, width = report.size
    typer.echo(
        f"{report.model_id} ({report.precision} {report.kind}, {height}×{width}) on "
        f"{report.engine}, {report.device}"
    )
    typer.echo(f"against {report.reference}, {report.images} images of {report.data}")
    of_class = "IoU" if report.metric == "mIoU" else report.metric
    if report.classes:
        typer.echo(f"  {of_class + ' of each class':<20} {'reference':>9} {'bundle':>7} {'Δ':>9}")
    for row in report.classes:
        if row.delta is not None:
            typer.echo(
                f"  {row.name:<20} {row.reference:9.2f} {row.measured:7.2f} {row.delta:+9.4f}"
            )
    limits = report.tolerance
    if report.delta_miou is not None and report.delta_miou_interval is not None:
        low, high = report.delta_miou_interval
        typer.echo(f"{report.metric + ' reference':<20}{report.miou_reference:.3f} %")
        typer.echo(f"{report.metric + ' bundle':<20}{report.miou_measured:.3f} %")
        typer.echo(
            f"{'Δ' + report.metric:<20}{report.delta_miou:+.4f} points "
            f"(95 % {low:+.4f} … {high:+.4f}; at most ±{limits.delta_miou:g})"
        )
        typer.echo(
            f"{'worst class Δ' + of_class:<20}{report.worst_class_delta_iou:+.4f} "
            f"({report.worst_class}; at most ±{limits.worst_class_delta_iou:g})"
        )
    if report.matched is not None:
        typer.echo(f"matched segments    {100 * report.matched:.2f} %")
    if report.stages is not None:
        typer.echo(
            f"stages, same masks  {', '.join(f'{one:.1e}' for one in report.stages)} of the "
            f"largest logit (at most {stage_limit(report.precision):g})"
        )
    typer.echo(
        f"pixel agreement     {100 * report.agreement:.4f} % "
        f"(at least {100 * limits.agreement:g} %)"
    )
    typer.echo(
        f"  where confident   {100 * report.agreement_confident:.4f} % "
        f"(at least {100 * limits.agreement_confident:g} %)"
    )
    for margin in report.margins:
        if margin.agreement is not None:
            upper = "more" if margin.below is None else f"{margin.below:g}"
            typer.echo(
                f"{f'  margin {margin.above:g} … {upper}':<20}{100 * margin.agreement:8.4f} % "
                f"of {100 * margin.share:6.2f} % of the pixels"
            )
    if report.max_logit_diff is not None:
        typer.echo(
            f"logit difference    largest {report.max_logit_diff:.1e} (at most "
            f"{limits.max_logit_diff:g}), mean {report.mean_logit_diff:.1e} (at most "
            f"{limits.mean_logit_diff:g}) of the largest logit"
        )
