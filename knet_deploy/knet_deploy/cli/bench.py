"""`knet-deploy bench`: how fast a bundle runs here, beside baselines and this machine's limit."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
import typer

from knet_deploy.cli.choices import BUNDLE, EnginesOption
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
    from knet_deploy.bench.machine import Limits
    from knet_deploy.bench.report import Report
    from knet_export.graph.cost import Cost
    from knet_runtime.atomic import AtomicFile
    from knet_runtime.bundle.manifest import Manifest
    from knet_runtime.bundle.store import Bundle
    from knet_runtime.types import Rgb

BASELINES = ("torch", "torch-channels-last", "torch-compile", "ort-naive", "openvino", "torch-loop")
_TRAINED = "train/default-model/knet-edge-camvid.safetensors"
_FILE_LENGTH = 3  # a file is the frames, so often: a pipeline needs a few to get going


def bench(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[BUNDLE ...]",
            help=f"Bundles, such as one for each precision: {BUNDLE}; the one called default if "
            "left out.",
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
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Under a minute on most machines: --rounds 3 --frames 5 --sources 0, and one "
            "size, where you name no others.",
        ),
    ] = False,
    sources: Annotated[
        int | None,
        typer.Option(min=0, help="Files that run at once, file to file (1); 0: leave that out."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns that each one gets (7).")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of one turn (20).")] = None,
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
    frame to the class map, or the segments, at its size. Nothing is refused, but what verify has
    not passed here is marked. A first table comes after the first round, and Ctrl-C prints what was
    measured so far.
    """
    from knet_deploy.bench.benchmark import Benchmark
    from knet_deploy.bench.machine import this_machine
    from knet_deploy.bench.report import Report
    from knet_runtime.engines import probe_engines
    from knet_runtime.engines.hardware import cpu_budget

    extent = _QUICK if quick else _THOROUGH
    rounds, frames = rounds or extent.rounds, frames or extent.frames
    sources = extent.sources if sources is None else sources
    baselines = _baselines(compare)
    cores = _threads(threads, cpu_budget())
    opened = _open(bundles)
    trained = _checkpoint(opened, checkpoint) if baselines else None
    files = result_file(json), result_file(plot, ".png")
    images = _images(source, size or ([] if source else extent.sizes), frames)
    engines = [str(one.value) for one in engine or []] or [
        status.name for status in probe_engines() if status.available
    ]
    entries = _bundle_entries(opened, engines)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="knet-bench-")))
        if trained is not None:
            manifest = next(iter(opened.values())).manifest
            entries += _baseline_entries(baselines, trained, manifest, list(images), folder)
        benchmark = Benchmark(
            folder, images, threads=cores, sources=sources, file_frames=_FILE_LENGTH * frames
        )
        before = benchmark.limits()

        def report(done: int, limits: Limits) -> Report:
            return Report(
                models=[bundle.model_id for bundle in opened.values()],
                source=source or "synthetic street",
                frames=frames,
                rounds=done,
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

        try:
            with track("bench", benchmark.steps(entries, rounds)) as advance:
                progress = _Progress(rounds, advance, lambda: report(1, before))
                benchmark.run(entries, rounds, on_step=progress.step, on_round=progress.round)
        except KeyboardInterrupt:
            if begun := len({one.round for one in benchmark.measurements}):
                _publish(report(begun, before), *files)
                typer.echo(f"stopped in round {begun} of {rounds}", err=True)
            raise
        whole = report(rounds, before.best(benchmark.limits()))
    _publish(whole, *files)
    if not any(row.ours for row in whole.rows):
        raise EngineError("no engine ran this bundle: the reasons stand above")


class _Extent(NamedTuple):
    """How much is measured where the user does not say."""

    rounds: int
    frames: int
    sources: int
    sizes: list[str]


_THOROUGH = _Extent(rounds=7, frames=20, sources=1, sizes=["360x480", "720x1280"])
_QUICK = _Extent(rounds=3, frames=5, sources=0, sizes=["360x480"])


class _Progress:
    """Says on stderr how far the rounds are, and shows ``first_table`` after the first one."""

    def __init__(
        self, rounds: int, advance: Callable[..., None], first_table: Callable[[], Report]
    ) -> None:
        self._rounds, self._advance, self._first_table = rounds, advance, first_table
        self._began = monotonic()

    def step(self, number: int, name: str) -> None:
        """A turn begins; opening is round 0."""
        self._advance(f"round {number} of {self._rounds}, {name}" if number else f"opening {name}")
        if not number and not sys.stderr.isatty():
            typer.echo(f"opening {name}", err=True)

    def round(self, done: int) -> None:
        """So many rounds are done."""
        from knet_deploy.bench.report import lines

        if done == 0:
            self._began = monotonic()
            return
        left = (monotonic() - self._began) / done * (self._rounds - done)
        if left and done == 1:
            for line in lines(self._first_table()):
                typer.echo(one_line(line), err=True)
        if left:
            about = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
            typer.echo(f"round {done} of {self._rounds} is done, about {about} to go", err=True)


def _publish(report: Report, json: AtomicFile | None, plot: AtomicFile | None) -> None:
    from knet_deploy.bench.plot import bars_of
    from knet_deploy.bench.report import lines

    for line in lines(report):
        typer.echo(one_line(line))
    if json is not None:
        json.write(msgspec.json.format(json_bytes(report)) + b"\n")
    if plot is not None:
        plot.write(bars_of(report))


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


def _checkpoint(bundles: dict[str, Bundle], given: Path | None) -> Path:
    """The baselines' checkpoint: the one that every bundle was exported from, and no other."""
    import hashlib

    import knet_runtime

    if given is None:
        checkout = Path(knet_runtime.__file__).parents[2] / _TRAINED
        packaged = all(bundle.is_packaged for bundle in bundles.values())
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


def _images(source: str | None, sizes: list[str], count: int) -> dict[str, list[Rgb]]:
    """Frames by the name of their size."""
    from knet_deploy.bench.benchmark import read_frames, street_frames
    from knet_runtime.preprocess import resize

    wanted = [parse_size(text) for text in sizes]
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
    names: list[str], checkpoint: Path, manifest: Manifest, frames: list[str], folder: Path
) -> list[Entry]:
    from knet_deploy.bench.baselines import make_baselines
    from knet_deploy.bench.benchmark import Entry

    with needs_extra("export", "knet-deploy bench --compare"):
        made = make_baselines(
            names, checkpoint, manifest, [parse_size(text) for text in frames], folder
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
