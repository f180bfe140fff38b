"""`knet-deploy bench`: how fast a bundle runs here, beside its peers and this machine's limit."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from knet_deploy.console import needs_extra, parse_size, track
from knet_deploy.run import check_engine
from knet_runtime.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from knet_runtime.bench.contest import Cost, Entry
    from knet_runtime.bench.report import Report
    from knet_runtime.bundle import Bundle
    from knet_runtime.pending import PendingFile

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
    engine: Annotated[
        list[str] | None,
        typer.Option(help="An engine of doctor's. Repeatable; every one that works by default."),
    ] = None,
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
    from knet_runtime.backends.machine import cpu_budget
    from knet_runtime.bench.contest import Contest
    from knet_runtime.bench.machine import this_machine
    from knet_runtime.bench.report import Report
    from knet_runtime.bench.summary import all_ratios
    from knet_runtime.pending import PendingFile

    for name in engine or []:
        check_engine(name)
        if name == "auto":
            raise ConfigError("--engine auto: bench times engines by name; leave it out for all")
    peers = _peers(compare)
    cores = _threads(threads, cpu_budget())
    opened = _open(bundles)
    trained = _checkpoint(list(opened.values()), bundles is None, checkpoint) if peers else None
    if plot is not None and plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot {plot}: it is a PNG, so let its name end in .png")
    # What can not be written is said before the minutes of measuring, not after them.
    pending = [None if file is None else PendingFile(file.absolute()) for file in (json, plot)]
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
        contest = Contest(
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


def _publish(report: Report, json: PendingFile | None, plot: PendingFile | None) -> None:
    from knet_deploy.bench_table import lines
    from knet_runtime.errors import BackendError

    for line in lines(report):
        typer.echo(line)
    if json is not None:
        json.write(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    if plot is not None:
        from knet_runtime.bench.plot import bars_of

        plot.write(bars_of(report))
    if not any(row.ours for row in report.rows):
        raise BackendError("no engine ran this bundle: the reasons stand above")


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
    from knet_runtime.bundle import default_bundle_path, open_bundle

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
    from knet_runtime.bench.frames import read_frames, street_frames
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
    from knet_runtime.backends import probe_engines

    return [status.name for status in probe_engines() if status.available]


def _ours(bundles: dict[str, Bundle], engines: list[str]) -> list[Entry]:
    from knet_runtime.backends.choose import CPU_ENGINES
    from knet_runtime.bench.contest import Entry
    from knet_runtime.bench.contestant import Engine

    costs = {words: _cost(bundle) for words, bundle in bundles.items()}
    return [
        Entry(
            f"{engine}{words}",
            partial(Engine, bundle.path, engine),
            ours=True,
            gpu=engine not in CPU_ENGINES,
            cost=costs[words],
        )
        for words, bundle in bundles.items()
        for engine in engines
    ]


def _theirs(
    names: list[str], bundle: Bundle, checkpoint: Path, tasks: list[str], folder: Path
) -> list[Entry]:
    from knet_runtime.bench.contest import Entry

    with needs_extra("export", "knet-deploy bench --compare"):
        from knet_export.peers.peers import make_peers
    sizes = [parse_size(task) for task in tasks]
    makers = make_peers(names, bundle, checkpoint, sizes, folder)
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
        return count_cost(bundle.file(bundle.of_kind("logits").path), (spec.height, spec.width))
    except BundleError as error:
        typer.echo(f"note: {error}")
        return None
