"""``knet-deploy batch``: an archive of videos through a bundle, in chunks, on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knet_deploy.cli.choices import (
    BundleOption,
    RequireVerified,
    RunEngine,
    ScoreOption,
    SizeOption,
    TopKOption,
    TrackOption,
    segments_panel,
)
from knet_deploy.cli.console import needs_extra, parse_size, say, say_error, track
from knet_deploy.cli.outputs import needs_segments, segment_rules
from knet_deploy.cli.streams import allow_closed_stdout

if TYPE_CHECKING:
    from knet_runtime.batch.records import BatchResults


def batch(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="VIDEOS...", help="Video files and patterns, such as 'archive/**/*.mp4'."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder for a folder per video and results.json.")],
    ray: Annotated[
        str | None,
        typer.Option(help="The cluster: HOST:PORT or auto; without it Ray is started here."),
    ] = None,
    bundle: BundleOption = None,
    engine: RunEngine = "auto",
    require_verified: RequireVerified = False,
    size: SizeOption = None,
    masks: Annotated[
        bool, typer.Option("--masks/--no-masks", help="Write each class map as a PNG.")
    ] = True,
    score: ScoreOption = None,
    top_k: TopKOption = None,
    follow: TrackOption = False,
    coco: Annotated[
        bool, segments_panel("--coco", help="Write the segments as COCO's results, coco.json.")
    ] = False,
    coco_panoptic: Annotated[
        bool,
        segments_panel("--coco-panoptic", help="Write COCO's panoptic PNGs, and panoptic.json."),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Engines at once; by default one per GPU, or per machine."),
    ] = None,
    chunk_seconds: Annotated[
        float, typer.Option(min=0, help="Length of the chunks that videos are cut in.")
    ] = 30.0,
) -> None:
    """Segment many videos, on every core or machine; a batch that was stopped resumes.

    Each video gets a folder in --out with what run's --masks and --json write, byte for byte but
    for the times; results.json has a line for all. Exit status 1 if a video failed. With --track,
    --coco or --coco-panoptic no video is cut: several are done at once, each by one engine.
    """
    from knet_runtime.atomic import check_folder
    from knet_runtime.batch.archive import find_sources, run_batch
    from knet_runtime.batch.records import Settings
    from knet_runtime.batch.worker import settings_bundle
    from knet_runtime.bundle.store import find_bundle, open_bundle

    allow_closed_stdout()
    named = find_sources(sources)
    opened = open_bundle(bundle)
    for option, given in (
        ("--track", follow),
        ("--coco", coco),
        ("--coco-panoptic", coco_panoptic),
    ):
        if given:
            needs_segments(option, opened)
    settings = Settings(
        bundle=str(find_bundle(bundle).absolute()),
        engine=engine,
        size=None if size is None else parse_size(size),
        masks=masks,
        require_verified=require_verified,
        rules=segment_rules(opened, score, top_k),
        track=follow,
        coco=coco,
        coco_panoptic=coco_panoptic,
    )
    model = settings_bundle(settings).model_id
    check_folder(out)
    with needs_extra("ray", "knet-deploy batch"):
        from knet_runtime.batch.ray_pool import RayPool

        pool = RayPool(settings, model, address=ray, workers=workers)
    with pool, track(out.name, None) as advance:
        results = run_batch(named, out, settings, pool, seconds=chunk_seconds, on_progress=advance)
    _say_results(results, out)


def _say_results(results: BatchResults, out: Path) -> None:
    from knet_runtime.batch.records import RESULTS_NAME

    say("videos", len(results.sources))
    say("frames", results.frames)
    say("model", results.model)
    say("engine", ", ".join(results.engines) or "none ran")
    say("written", f"{out / RESULTS_NAME}")
    for failure in results.failures.values():
        say_error(failure)
    if results.failures:
        raise typer.Exit(1)
