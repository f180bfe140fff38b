"""`knet-deploy bench`: how fast a bundle runs here, beside its peers and this machine's limit.

What `bench` says: a table for each frame size, and a line for each ratio.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from knet_deploy.cli.choices import EnginesOption
from knet_deploy.cli.console import needs_extra, one_line, parse_size, track
from knet_runtime.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from knet_deploy.bench.benchmark import Entry
    from knet_deploy.bench.report import Ratio, Report, Row
    from knet_export.graph.cost import Cost
    from knet_runtime.atomic import AtomicFile
    from knet_runtime.bundle.store import Bundle


_HEAD = (
    "frames/s",
    "ms",
    "p5",
    "p95",
    "p99",
    "preprocess",
    "infer",
    "postprocess",
    "draw",
    "matmul",
    "copy",
    "J/frame",
    "MiB",
    "start s",
    "equal",
)


def lines(report: Report) -> Iterator[str]:
    """The whole answer, line by line."""
    machine = report.machine
    models = ", ".join(report.models)
    yield f"{models}, {report.source}, {report.rounds} rounds of {report.frames} frames"
    yield (
        f"{machine.processor}, {report.threads} threads: matrix product "
        f"{2 * report.limits.matmul / 1e9:.0f} GFLOP/s float32, copy "
        f"{report.limits.copy / 1e9:.1f} GB/s"
    )
    if machine.load is not None and machine.load > 1:
        yield f"note: the load is {machine.load:.1f}: others compute here too"
    for count in dict.fromkeys(row.multiply_adds for row in report.rows if row.multiply_adds):
        yield f"{count / 1e9:.2f} giga multiply-adds a picture"
    for task in dict.fromkeys(row.task for row in report.rows):
        rows = [row for row in report.rows if row.task == task]
        yield ""
        yield from _table(task, rows)
    yield ""
    yield from _notes(report)
    for row in report.files:
        several = "" if row.sources == 1 else f", {row.sources} files at once"
        yield (
            f"file to file {row.task}: {row.contestant} {row.frames_per_second:.1f} "
            f"frames/s{several}"
        )
    for media in report.media:
        parts = ", ".join(f"{stage} {time.median:.2f}" for stage, time in media.stages.items())
        yield f"file {media.task}, ms a frame: {parts}"
    for ratio in report.ratios:
        if ratio.faster == _winner(report, ratio.task) and ratio.slower != ratio.faster:
            yield _ratio(ratio)


def _table(task: str, rows: list[Row]) -> Iterator[str]:
    cells = [(task, "precision", *_HEAD), *(_cells(row) for row in rows)]
    kept = [column for column in range(len(cells[0])) if any(line[column] for line in cells[1:])]
    widths = {column: max(len(line[column]) for line in cells) for column in kept}
    for line in cells:
        yield "  ".join(
            line[column].ljust(widths[column]) if column < 2 else line[column].rjust(widths[column])
            for column in kept
        ).rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    total = row.stages["total"]
    stages = (
        f"{row.stages[name].median:.2f}" if name in row.stages else ""
        for name in ("preprocess", "infer", "postprocess", "draw")
    )
    mark = "" if row.verified or not row.ours else " *"
    return (
        f"{row.contestant}{mark}",
        row.precision,
        f"{row.frames_per_second:.1f}",
        f"{total.median:.2f}",
        f"{total.p5:.2f}",
        f"{total.p95:.2f}",
        f"{total.p99:.2f}",
        *stages,
        _percent(row.matmul_share, 0),
        _percent(row.copy_share, 0),
        "" if row.joules_per_frame is None else f"{row.joules_per_frame:.2f}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        f"{row.startup_seconds:.1f}",
        _percent(row.agreement, 3),
    )


def _percent(share: float | None, digits: int) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def _notes(report: Report) -> Iterator[str]:
    seen = set()
    for row in report.rows:
        if row.contestant in seen:
            continue
        seen.add(row.contestant)
        if row.ours and row.unverified_reason:
            yield one_line(
                f"* {row.contestant}: {row.unverified_reason}; knet-deploy verify measures it"
            )
        if row.note:
            yield one_line(f"{row.contestant}: {row.note}")
    for failure in report.failures:
        what = "broke off" if failure.contestant in seen else "did not run"
        yield one_line(f"{failure.contestant} {what}: {failure.reason}")


def _winner(report: Report, task: str) -> str | None:
    """The fastest of ours that is verified here; of all of ours, where none is."""
    ours = [row for row in report.rows if row.ours and row.task == task]
    proven = [row for row in ours if row.verified] or ours
    return max(proven, key=lambda row: row.frames_per_second).contestant if proven else None


def _ratio(ratio: Ratio) -> str:
    return (
        f"{ratio.task}: {ratio.faster} is {ratio.median:.2f} times as fast as {ratio.slower} "
        f"({ratio.least:.2f} … {ratio.most:.2f})"
    )


PEERS = (
    "torch",
    "torch-channels-last",
    "torch-compile",
    "ort-naive",
    "openvino",
    "torch-loop",
)
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
        str | None, typer.Option(help=f"Peers, with commas between: {','.join(PEERS)}.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="With --compare: what the bundles were exported from.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all that was measured as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the times into this PNG.")] = None,
) -> None:
    """Time bundles on engines of this machine, beside peers, in rounds that take turns.

    Each engine and peer has a process of its own and the same cores. Times go from the decoded
    frame to the class map at its size. Nothing is refused, but what verify has not passed here is
    marked.
    """
    from knet_deploy.bench.benchmark import Benchmark
    from knet_deploy.bench.machine import this_machine
    from knet_deploy.bench.report import Report, all_ratios
    from knet_runtime.atomic import AtomicFile
    from knet_runtime.engines import engine_specs
    from knet_runtime.engines.hardware import cpu_budget

    for name in engine or []:
        if name == "auto":
            raise ConfigError("--engine auto: bench times engines by name; leave it out for all")
        if name not in engine_specs():
            raise ConfigError(f"there is no engine {name!r}: use {', '.join(engine_specs())}")
    peers = _peers(compare)
    cores = _threads(threads, cpu_budget())
    opened = _open(bundles)
    trained = _checkpoint(list(opened.values()), bundles is None, checkpoint) if peers else None
    if plot is not None and plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot {plot}: it is a PNG, so let its name end in .png")
    # What can not be written is said before the minutes of measuring, not after them.
    pending = [None if file is None else AtomicFile(file.absolute()) for file in (json, plot)]
    tasks = _tasks(source, size, frames)
    entries = _ours(opened, engine or _working())
    turns = (len(tasks) * (2 if sources else 1), len(tasks))
    steps = len(entries) * (1 + rounds * turns[0]) + len(peers) * (1 + rounds * turns[1])
    with (
        tempfile.TemporaryDirectory(prefix="knet-bench-") as folder,
        track("rounds", steps) as advance,
    ):
        if trained is not None:
            first = next(iter(opened.values()))
            entries += _theirs(peers, first, trained, list(tasks), Path(folder))
        contest = Benchmark(
            Path(folder),
            tasks,
            threads=cores,
            sources=sources,
            file_frames=_FILE_LENGTH * frames,
            on_step=advance,
        )
        before = contest.limits()
        contest.run(entries, rounds)
        limits = before.best(contest.limits())
        report = Report(
            models=[bundle.model_id for bundle in opened.values()],
            source=source or "synthetic street",
            frames=frames,
            rounds=rounds,
            threads=cores,
            reference=contest.reference,
            rows=contest.rows(limits),
            failures=contest.failures,
            ratios=all_ratios(contest.laps, list(tasks), contest.ours, contest.theirs),
            files=contest.files(),
            media=contest.media(),
            limits=limits,
            machine=this_machine(cores),
        )
    _publish(report, *pending)


def _publish(report: Report, json: AtomicFile | None, plot: AtomicFile | None) -> None:
    from knet_runtime.errors import EngineError

    for line in lines(report):
        typer.echo(line)
    if json is not None:
        json.write(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    if plot is not None:
        from knet_deploy.bench.plot import bars_of

        plot.write(bars_of(report))
    if not any(row.ours for row in report.rows):
        raise EngineError("no engine ran this bundle: the reasons stand above")


def _peers(text: str | None) -> list[str]:
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"--compare {name}: there is no such peer: use {','.join(PEERS)}")
    if text is not None and not names:
        raise ConfigError(f"--compare names nobody: use {','.join(PEERS)}")
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
    from knet_runtime.bundle.store import default_bundle_path, open_bundle

    paths = paths or [default_bundle_path()]
    if len(paths) == 1:
        return {"": open_bundle(paths[0])}
    found = {f" {path.name.removesuffix('.knet')}": open_bundle(path) for path in paths}
    if len(found) < len(paths):
        raise ConfigError("bundles of one name: their rows could not be told apart; rename one")
    return found


def _checkpoint(bundles: list[Bundle], packaged: bool, given: Path | None) -> Path:
    """The checkpoint of the peers: the one that every bundle was exported from, and no other."""
    import hashlib

    import knet_runtime
    from knet_runtime.errors import CheckpointError

    if given is None:
        checkout = Path(knet_runtime.__file__).parents[2] / _TRAINED
        if not (packaged and checkout.is_file()):
            raise ConfigError("--compare needs --checkpoint: what the bundle was exported from")
        given = checkout
    if not given.is_file():
        raise CheckpointError(f"{given} is no file: pass a checkpoint such as best.safetensors")
    digest = hashlib.sha256(given.read_bytes()).hexdigest()
    for bundle in bundles:
        if bundle.manifest.provenance.checkpoint_sha256 != digest:
            raise CheckpointError(
                f"{bundle.path} was not exported from {given}: pass the one that it was exported "
                "from"
            )
    return given


def _tasks(
    source: str | None, sizes: list[str] | None, count: int
) -> dict[str, list[NDArray[np.uint8]]]:
    """Frames by size, in words."""
    from knet_deploy.bench.media import read_frames, street_frames
    from knet_runtime.preprocess import resize

    wanted = [parse_size(text) for text in sizes or ([] if source else _SIZES)]
    if source is None:
        found = {size: street_frames(size, count) for size in wanted}
    else:
        read = read_frames(source, count)
        wanted = wanted or [(read[0].shape[0], read[0].shape[1])]
        found = {size: [resize(frame, size) for frame in read] for size in wanted}
    return {f"{size[0]}×{size[1]}": frames for size, frames in found.items()}


def _working() -> list[str]:
    from knet_runtime.engines import probe_engines

    return [status.name for status in probe_engines() if status.available]


def _ours(bundles: dict[str, Bundle], engines: list[str]) -> list[Entry]:
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


def _theirs(
    names: list[str], bundle: Bundle, checkpoint: Path, tasks: list[str], folder: Path
) -> list[Entry]:
    from knet_deploy.bench.benchmark import Entry

    with needs_extra("export", "knet-deploy bench --compare"):
        from knet_deploy.bench.baselines import make_baselines
    sizes = [parse_size(task) for task in tasks]
    makers = make_baselines(names, bundle, checkpoint, sizes, folder)
    return [Entry(f"peer {name}", make) for name, make in makers.items()]


def _cost(bundle: Bundle) -> Cost | None:
    """None without the export extra, or where the graph alone does not tell."""
    from knet_runtime.errors import BundleError

    try:
        from knet_export.graph.cost import count_cost
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        typer.echo('note: shares of the limit need pip install "knet-deploy[export]"')
        return None
    spec = bundle.manifest.input
    try:
        return count_cost(bundle.file(bundle.graph("logits").path), (spec.height, spec.width))
    except BundleError as error:
        typer.echo(f"note: {error}")
        return None
