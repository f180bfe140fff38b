"""`knet-deploy bench`: how fast a bundle runs here, beside baselines and this machine's limit."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from knet_deploy.cli.choices import EnginesOption
from knet_deploy.cli.console import (
    MissingExtra,
    needs_extra,
    one_line,
    parse_size,
    result_file,
    track,
)
from knet_runtime.atomic import json_bytes
from knet_runtime.errors import BundleError, CheckpointError, ConfigError, EngineError

if TYPE_CHECKING:
    from knet_deploy.bench.benchmark import Entry
    from knet_deploy.bench.report import Report
    from knet_export.graph.cost import Cost
    from knet_runtime.atomic import AtomicFile
    from knet_runtime.bundle.store import Bundle
    from knet_runtime.types import Rgb, Size

BASELINES = ("torch", "torch-channels-last", "torch-compile", "ort-naive", "openvino", "torch-loop")
_SIZES = ("360x480", "720x1280")
_TRAINED = "train/default-model/knet-edge-camvid.safetensors"
_FILE_LENGTH = 3  # a file is the frames, so often: a pipeline needs a few to get going


def bench(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[NAME.knet ...]",
            help="Bundles, such as one for each precision; the packaged model by default.",
            show_default=False,
        ),
    ] = None,
    engine: EnginesOption = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="HEIGHTxWIDTH of the frames. Repeatable; 360x480 and 720x1280 or, with "
            "--source, its own by default."
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="A video or a folder of images; a synthetic street by default."),
    ] = None,
    sources: Annotated[
        int, typer.Option(min=0, help="Files that run at once, file to file; 0: leave that out.")
    ] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each one gets.")] = 7,
    frames: Annotated[int, typer.Option(min=1, help="Frames of one turn.")] = 20,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Cores for everybody; all that may be used.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help=f"Baselines, with commas between: {','.join(BASELINES)}.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="With --compare: what the bundles were exported from.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all that was measured as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the times into this PNG.")] = None,
) -> None:
    """Time bundles on engines of this machine, beside baselines, in rounds that take turns.

    Each engine and baseline has a process of its own and the same cores. Times go from the decoded
    frame to the class map at its size. Nothing is refused, but what verify has not passed here is
    marked.
    """
    from knet_deploy.bench.benchmark import Benchmark
    from knet_deploy.bench.machine import this_machine
    from knet_deploy.bench.report import Report
    from knet_runtime.engines import probe_engines
    from knet_runtime.engines.hardware import cpu_budget

    baselines = _baselines(compare)
    cores = _threads(threads, cpu_budget())
    opened = _open(bundles)
    trained = _checkpoint(opened, bundles is None, checkpoint) if baselines else None
    files = result_file(json), result_file(plot, ".png")
    images = _images(source, size, frames)
    engines = [str(one.value) for one in engine or []] or [
        status.name for status in probe_engines() if status.available
    ]
    entries = _bundle_entries(opened, engines)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="knet-bench-")))
        if trained is not None:
            spec = next(iter(opened.values())).manifest.input
            entries += _baseline_entries(
                baselines, trained, (spec.height, spec.width), list(images), folder
            )
        benchmark = Benchmark(
            folder, images, threads=cores, sources=sources, file_frames=_FILE_LENGTH * frames
        )
        advance = stack.enter_context(track("rounds", benchmark.steps(entries, rounds)))
        before = benchmark.limits()
        benchmark.run(entries, rounds, on_step=advance)
        limits = before.best(benchmark.limits())
        report = Report(
            models=[bundle.model_id for bundle in opened.values()],
            source=source or "synthetic street",
            frames=frames,
            rounds=rounds,
            threads=cores,
            reference=benchmark.reference,
            rows=benchmark.rows(limits),
            failures=benchmark.failures,
            ratios=benchmark.ratios(),
            files=benchmark.files(),
            media=benchmark.media(),
            limits=limits,
            machine=this_machine(cores),
        )
    _publish(report, *files)


def _publish(report: Report, json: AtomicFile | None, plot: AtomicFile | None) -> None:
    from knet_deploy.bench.plot import bars_of
    from knet_deploy.bench.report import lines

    for line in lines(report):
        typer.echo(one_line(line))
    if json is not None:
        json.write(msgspec.json.format(json_bytes(report)) + b"\n")
    if plot is not None:
        plot.write(bars_of(report))
    if not any(row.ours for row in report.rows):
        raise EngineError("no engine ran this bundle: the reasons stand above")


def _baselines(text: str | None) -> list[str]:
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    known = ",".join(BASELINES)
    for name in names:
        if name not in BASELINES:
            raise ConfigError(f"--compare {name}: there is no such baseline: use {known}")
    if text is not None and not names:
        raise ConfigError(f"--compare names no baseline: use {known}")
    return list(dict.fromkeys(names))


def _threads(asked: int | None, cores: int) -> int:
    import os

    if asked is None or asked == cores:
        return cores
    if asked > cores:
        raise ConfigError(f"--threads {asked}: this process may use {cores} cores")
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("--threads needs Linux, where a process can be held to some cores")
    return asked


def _open(paths: list[Path] | None) -> dict[str, Bundle]:
    """Bundles by the words that tell their rows apart: none, where there is only one."""
    from knet_runtime.bundle.store import open_bundle

    if paths is None or len(paths) == 1:
        return {"": open_bundle(paths[0] if paths else None)}
    found = {f" {path.name.removesuffix('.knet')}": open_bundle(path) for path in paths}
    if len(found) < len(paths):
        raise ConfigError("bundles of one name: their rows could not be told apart; rename one")
    return found


def _checkpoint(bundles: dict[str, Bundle], packaged: bool, given: Path | None) -> Path:
    """The baselines' checkpoint: the one that every bundle was exported from, and no other."""
    import hashlib

    import knet_runtime

    if given is None:
        checkout = Path(knet_runtime.__file__).parents[2] / _TRAINED
        if not (packaged and checkout.is_file()):
            raise ConfigError("--compare needs --checkpoint: what the bundle was exported from")
        given = checkout
    if not given.is_file():
        raise CheckpointError(f"{given} is no file: pass a checkpoint such as best.safetensors")
    digest = hashlib.sha256(given.read_bytes()).hexdigest()
    for bundle in bundles.values():
        if bundle.manifest.provenance.checkpoint_sha256 != digest:
            raise CheckpointError(
                f"{bundle.path} was not exported from {given}: pass the one that it was exported "
                "from"
            )
    return given


def _images(source: str | None, sizes: list[str] | None, count: int) -> dict[str, list[Rgb]]:
    """Frames by the name of their size."""
    from knet_deploy.bench.benchmark import read_frames, street_frames
    from knet_runtime.preprocess import resize

    wanted = [parse_size(text) for text in sizes or ([] if source else _SIZES)]
    if source is None:
        found = {size: street_frames(size, count) for size in wanted}
    else:
        read = read_frames(source, count)
        wanted = wanted or [(read[0].shape[0], read[0].shape[1])]
        found = {size: [resize(frame, size) for frame in read] for size in wanted}
    return {f"{size[0]}×{size[1]}": frames for size, frames in found.items()}


def _bundle_entries(bundles: dict[str, Bundle], engines: list[str]) -> list[Entry]:
    from knet_deploy.bench.benchmark import Entry
    from knet_deploy.bench.target import BundleTarget
    from knet_runtime.engines import engine_spec

    costs = {words: _cost(bundle) for words, bundle in bundles.items()}
    return [
        Entry(
            f"{engine}{words}",
            partial(BundleTarget, bundle.path, engine),
            ours=True,
            gpu=engine_spec(engine).device == "gpu",
            cost=costs[words],
        )
        for words, bundle in bundles.items()
        for engine in engines
    ]


def _baseline_entries(
    names: list[str], checkpoint: Path, size: Size, frames: list[str], folder: Path
) -> list[Entry]:
    from knet_deploy.bench.baselines import make_baselines
    from knet_deploy.bench.benchmark import Entry

    with needs_extra("export", "knet-deploy bench --compare"):
        made = make_baselines(
            names, checkpoint, size, [parse_size(text) for text in frames], folder
        )
    return [Entry(f"baseline {name}", make) for name, make in made.items()]


def _cost(bundle: Bundle) -> Cost | None:
    """None without the export extra, or where the graph alone does not tell."""
    spec = bundle.manifest.input
    try:
        with needs_extra("export", "the share of this machine's limit"):
            from knet_export.graph.cost import count_cost
        return count_cost(bundle.file(bundle.graph("logits").path), (spec.height, spec.width))
    except (MissingExtra, BundleError) as error:
        typer.echo(f"note: {error}")
        return None
