"""``knet-deploy run``: videos, images, cameras and streams through a bundle, and onto a page."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knet_deploy.cli.choices import (
    BundleOption,
    Codec,
    Policy,
    RequireVerified,
    RunEngine,
    ScoreOption,
    SizeOption,
    TopKOption,
    TrackOption,
    Transport,
    engine_panel,
    segments_panel,
)
from knet_deploy.cli.console import needs_extra, parse_size, say
from knet_deploy.cli.outputs import (
    Outputs,
    Shares,
    feed_names,
    needs_segments,
    run_and_say,
    segment_rules,
)
from knet_deploy.cli.streams import allow_closed_stdout
from knet_runtime.drawing import OPACITY
from knet_runtime.errors import ConfigError, ParityError
from knet_runtime.golden import SelfTestPolicy

if TYPE_CHECKING:
    from knet_runtime.bundle.store import Bundle
    from knet_runtime.pipeline import Feed, RunStats
    from knet_runtime.pipeline.feed import Transform
    from knet_runtime.segmentation import Segmentation
    from knet_runtime.segmenter import Segmenter
    from knet_runtime.sources.base import SourceOptions
    from knet_runtime.types import Frame
    from knet_runtime.web.auth import Listener
    from knet_runtime.zones import Zones

_log = logging.getLogger(__name__)
_input = partial(typer.Option, rich_help_panel="Input")
_outputs = partial(typer.Option, rich_help_panel="Outputs")
_look = partial(typer.Option, rich_help_panel="Look")
_page = partial(typer.Option, rich_help_panel="Live page")


def run(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="A video, an image, a folder of images, a recording of ROS, a camera (0, "
            "/dev/video0), an address of rtsp:// or http(s)://, or - for frames on stdin.",
        ),
    ] = None,
    more: Annotated[
        list[str] | None,
        _input(
            "--source",
            metavar="SOURCE",
            help="The same; repeat it for several sources on one engine. Each then writes to "
            "places with its name: o.NAME.mp4, masks/NAME/.",
        ),
    ] = None,
    start: Annotated[float | None, _input(help="Seconds into the video to begin at.")] = None,
    end: Annotated[float | None, _input(help="Seconds into the video to end before.")] = None,
    every: Annotated[int, _input(min=1, help="Take each n-th frame only.")] = 1,
    every_seconds: Annotated[
        float | None,
        _input(help="Fetch the one image at an HTTP address again each so many seconds."),
    ] = None,
    raw_input: Annotated[
        str | None,
        _input(
            metavar="WxH:FORMAT[@RATE]",
            help="What raw frames come on stdin, such as 1280x720:rgb24@30; y4m says it itself.",
        ),
    ] = None,
    topic: Annotated[
        str | None, _input(help="Of a recording of ROS: the topic whose images are read.")
    ] = None,
    loop: Annotated[
        bool, _input("--loop", help="Play files again and again, until they are stopped.")
    ] = False,
    realtime: Annotated[
        bool,
        _input("--realtime", help="Play videos and recordings no faster than they were recorded."),
    ] = False,
    max_frames: Annotated[int | None, _input(min=1, help="Stop after so many frames.")] = None,
    policy: Annotated[
        Policy | None,
        _input(
            help="file: every frame; live: the newest one, others are dropped and counted. By "
            "default cameras and streams are live."
        ),
    ] = None,
    max_downtime: Annotated[
        float | None,
        _input(
            help="Give up on a camera or stream after so many seconds without a frame; by default "
            "it is tried for ever."
        ),
    ] = None,
    transport: Annotated[Transport, _input(help="How RTSP is read.")] = "tcp",
    hwaccel: Annotated[
        bool, _input("--hwaccel", help="Decode on the GPU where FFmpeg can.")
    ] = False,
    output: Annotated[
        Path | None,
        _outputs(
            "-o",
            "--output",
            help="Write the overlay: .mp4 or .mkv; for one image also .png or .jpg; a folder "
            "(overlays/) for an image per frame; - is stdout. Or a recording of ROS, with masks: "
            ".mcap, .bag; from one also a folder.",
        ),
    ] = None,
    raw_output: Annotated[
        str | None,
        _outputs(
            metavar="y4m|FORMAT",
            help="What -o - and --masks - write: y4m by default, or raw frames, such as rgb24.",
        ),
    ] = None,
    codec: Annotated[
        Codec | None, _outputs(help="Codec of the video that -o writes; h264 by default.")
    ] = None,
    masks: Annotated[
        Path | None,
        _outputs(help="Write each class map as a PNG into this folder; - is stdout, as frames."),
    ] = None,
    overwrite: Annotated[
        bool,
        _outputs(
            "--overwrite",
            help="Remove what another run wrote into the folder of -o, --masks or "
            "--coco-panoptic, which is refused otherwise.",
        ),
    ] = False,
    json: Annotated[
        Path | None,
        _outputs(help="Write a line of JSON per frame: class shares, times, model; - is stdout."),
    ] = None,
    events: Annotated[
        Path | None,
        _outputs(
            help="Write a line of JSON per object that --count counts, and the totals; - is stdout."
        ),
    ] = None,
    rle: Annotated[
        Path | None,
        _outputs(
            help="Write a line of JSON per frame: each class's mask as COCO RLE; - is stdout."
        ),
    ] = None,
    coco: Annotated[
        Path | None,
        _outputs(help="Write the segments of all frames as COCO's results (RLE, score, box)."),
    ] = None,
    coco_panoptic: Annotated[
        Path | None,
        _outputs(help="Write COCO's panoptic PNGs, and panoptic.json, into this folder."),
    ] = None,
    raw: Annotated[
        str | None,
        _outputs(
            metavar="-|shm:NAME",
            help="Hand the raw class maps to a program: to stdout (-), or in shared memory.",
        ),
    ] = None,
    push: Annotated[
        str | None, _outputs(metavar="URL", help="Push the overlay to an RTSP server.")
    ] = None,
    capture: Annotated[
        tuple[str, Path] | None,
        _outputs(
            metavar="uncertain:N DIR",
            help="Keep the N frames of which the model is least sure, at most one of each second, "
            "with its labels, in the new folder DIR: to correct and learn them.",
        ),
    ] = None,
    alpha: Annotated[
        float | None, _look(help=f"Opacity of the overlay's colours, 0 to 1 ({OPACITY}).")
    ] = None,
    palette: Annotated[
        str,
        _look(
            metavar="model|distinct|cityscapes|FILE",
            help="Colours of the classes: the bundle's; generated ones that are easily told apart; "
            "Cityscapes'; or those of a file with a line such as: road #804080.",
        ),
    ] = "model",
    legend: Annotated[
        bool | None,
        _look(
            "--legend/--no-legend",
            help="Name the classes that are seen, and their shares, below the overlay; on by "
            "default.",
        ),
    ] = None,
    name_regions: Annotated[
        bool, _look("--names", help="Write the names of classes into their large regions.")
    ] = False,
    side_by_side: Annotated[
        bool, _look("--side-by-side", help="Put the frame without colours to the left.")
    ] = False,
    classes: Annotated[
        str | None,
        _look(metavar="NAME,...", help="Draw, and write to --rle and --coco, only these."),
    ] = None,
    blur: Annotated[
        str | None,
        _look(
            metavar="NAME,...",
            help="Privacy: take these classes out of every frame, as far as the model sees them.",
        ),
    ] = None,
    smooth: Annotated[
        int | None,
        _look(
            metavar="FRAMES",
            help="Less flicker: classes last so many frames; try 2. Objects are tracked, too.",
        ),
    ] = None,
    score: ScoreOption = None,
    top_k: TopKOption = None,
    follow: TrackOption = False,
    count: Annotated[
        list[Path] | None,
        segments_panel(
            metavar="ZONES.json",
            help="Count the objects that enter and leave these zones and cross these lines; tracks "
            "them, too. With several sources: one for all, or repeat it for each, in their order.",
        ),
    ] = None,
    serve: Annotated[
        str | None,
        _page(
            metavar="HOST:PORT",
            help="Show the run on a web page there, such as 127.0.0.1:8000; with metrics and "
            "health.",
        ),
    ] = None,
    token: Annotated[
        str | None,
        _page(
            envvar="KNET_DEPLOY_TOKEN",
            help="What viewers of --serve must know; needed where others than this machine reach "
            "it.",
        ),
    ] = None,
    insecure: Annotated[
        bool, _page("--insecure", help="Let everybody who reaches --serve look, without token.")
    ] = False,
    bundle: BundleOption = None,
    engine: RunEngine = "auto",
    size: SizeOption = None,
    require_verified: RequireVerified = False,
    self_test: Annotated[
        SelfTestPolicy,
        engine_panel(
            help="Replay the bundle's golden tensors at the first start here; where the results "
            "differ, refuse to run or warn. off: do not replay them."
        ),
    ] = "refuse",
) -> None:
    """Segment videos, images, cameras, streams, pipes and recordings of ROS.

    Ends with a summary of frames per second, times per stage and class shares; without an output
    that summary is all there is. Ctrl-C, SIGTERM and SIGHUP end a run early and keep what is
    written, whole. A source that fails does not stop the others.
    """
    from knet_runtime.bundle.store import open_bundle
    from knet_runtime.engines import waits_for_verify
    from knet_runtime.pipeline import RunStats
    from knet_runtime.segmenter import Segmenter
    from knet_runtime.sources.base import SourceOptions

    if context.args:
        words = " ".join(map(shlex.quote, (str(source), *context.args)))
        raise ConfigError(
            f"one SOURCE goes here: knet-deploy batch {words} --out RESULTS does files one after "
            "the other; --source FILE, repeated, does them at once"
        )
    sources = [*([] if source is None else [source]), *(more or [])]
    if not sources:
        raise ConfigError("there is no source: knet-deploy run SOURCE, or --source for several")
    if sources.count("-") > 1:
        raise ConfigError("stdin (-) is one source: name it once")
    # What costs nothing is checked first, and the engine, which costs most, is loaded last.
    outputs = Outputs(
        overlay=output,
        raw_output=raw_output,
        codec=codec,
        masks=masks,
        overwrite=overwrite,
        json=json,
        events=events,
        rle=rle,
        coco=coco,
        coco_panoptic=coco_panoptic,
        raw=raw,
        push=push,
        capture=capture,
        alpha=alpha,
        legend=legend,
        names=name_regions,
        side_by_side=side_by_side,
        classes=names(classes),
        blur=names(blur),
        page=serve is not None,
    )
    outputs.check()
    if not outputs.is_summary_all:
        allow_closed_stdout()
    options = SourceOptions(
        start=start,
        end=end,
        every=every,
        every_seconds=every_seconds,
        raw_input=raw_input,
        topic=topic,
        loop=loop,
        realtime=realtime,
        transport=transport,
        max_downtime=max_downtime,
        hwaccel=hwaccel,
    )
    opened = open_bundle(bundle).with_palette(palette)
    if size is not None:
        opened = opened.with_input_size(parse_size(size))
    outputs.check_task(opened)
    if follow:
        needs_segments("--track", opened)
    counted = _counted(count or [], len(sources), outputs, opened)
    if smooth is not None and opened.manifest.task != "semantic":
        follow = True  # an object is smoothed as what its track is
    rules = segment_rules(opened, score, top_k)
    with ExitStack() as stack:
        listener = stack.enter_context(page_listener(serve, token, insecure))
        feeds = _open_feeds(stack, sources, options, policy, outputs, opened)
        for feed, zones in zip(feeds, counted, strict=True):
            feed.transform = _transform(feed, zones, follow, smooth)
        if outputs.takes_stdout:
            stack.enter_context(redirect_stdout(sys.stderr))  # words must not mix with the masks
        unsure = capture is not None
        segmenter = stack.enter_context(Segmenter(opened, engine, rules=rules, uncertainty=unsure))
        if engine == "auto":
            other = waits_for_verify(opened, segmenter.engine)
            hint = f" ({other} works here, too, but is not verified: knet-deploy verify)"
            say("engine", segmenter.engine + (hint if other else ""))
        _check_proof(segmenter, require_verified)
        if (result := segmenter.self_test(self_test)) is not None:
            _log.info("engine %s: self-test %s", segmenter.engine, result)
        stats = RunStats()
        stack.enter_context(_live_page(listener, segmenter, stats, feeds, outputs))
        run_and_say(feeds, segmenter, stats, max_frames)


def names(option: str | None) -> tuple[str, ...]:
    """The class names of "road,car"."""
    return tuple(name.strip() for name in (option or "").split(",") if name.strip())


def _counted(
    files: Sequence[Path], sources: int, outputs: Outputs, bundle: Bundle
) -> list[tuple[Path, Zones] | None]:
    """The file of --count for each source, and what is in it. Raises ConfigError."""
    from knet_runtime.zones import read_zones

    if not files:
        if outputs.events is not None:
            raise ConfigError(
                "--events writes what --count counts: add --count ZONES.json, or leave it out"
            )
        return [None] * sources
    needs_segments("--count", bundle)
    if len(files) not in (1, sources):
        raise ConfigError(
            f"--count is given {len(files)} times for {sources} source{'s' * (sources != 1)}: name "
            "one file for all, or one for each"
        )
    found = [(file, read_zones(file)) for file in files]
    for file, zones in found:
        with _naming(file):
            zones.check(bundle.manifest.labels)
    return [found[place % len(found)] for place in range(sources)]


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _transform(
    feed: Feed, counted: tuple[Path, Zones] | None, follow: bool, smooth: int | None
) -> Transform | None:
    """What --track, --smooth and --count ask for, in this order; one for each feed. Raises
    ConfigError."""
    from knet_runtime.counting import ZoneCounter
    from knet_runtime.smoothing import Smoother
    from knet_runtime.tracking import Tracker

    steps: list[Transform] = []
    if follow or counted is not None:
        steps.append(Tracker())
    if smooth is not None:
        steps.append(Smoother(smooth))
    if counted is not None:
        file, zones = counted
        with _naming(file):
            zones.on(feed.source.info.hw)
        steps.append(ZoneCounter(zones))

    def transform(frame: Frame, result: Segmentation) -> Segmentation:
        for step in steps:
            result = step(frame, result)
        return result

    return transform if steps else None


def _open_feeds(
    stack: ExitStack,
    sources: list[str],
    options: SourceOptions,
    policy: Policy | None,
    outputs: Outputs,
    bundle: Bundle,
) -> list[Feed]:
    from knet_runtime.pipeline import Feed
    from knet_runtime.sources import open_source

    outputs.check_classes(bundle.manifest.labels)
    feeds = []
    for name, text in zip(feed_names(sources), sources, strict=True):
        opened = stack.enter_context(open_source(text, options))
        places = outputs if len(sources) == 1 else outputs.of(name)
        sinks = places.sinks(opened.info, bundle.manifest.labels, bundle.model_id)
        feeds.append(Feed(opened, [*sinks, Shares(name)], name, policy))
    return feeds


def _check_proof(segmenter: Segmenter, required: bool) -> None:
    unverified_reason = segmenter.unverified_reason
    if unverified_reason is None:
        return
    precision = segmenter.bundle.manifest.precision
    text = (
        f"{segmenter.bundle.path} ({precision}) on {segmenter.engine}: {unverified_reason}; "
        f"knet-deploy verify {segmenter.bundle.path} --engine {segmenter.engine} measures it"
    )
    if required:
        raise ParityError(text)
    _log.warning("%s", text)


@contextmanager
def page_listener(
    serve: str | None, token: str | None, insecure: bool
) -> Iterator[Listener | None]:
    """The port of --serve, held before anything that costs time is loaded; None without it.

    Raises ConfigError for an address or a token that will not do, MissingExtra without the extra.
    """
    if serve is None:
        if insecure:  # a token is no mistake: it may stand in the environment of all runs
            raise ConfigError(
                "--insecure is about the page: add --serve HOST:PORT, or leave it out"
            )
        yield None
        return
    with needs_extra("serve", "--serve"):
        import knet_runtime.web.server  # noqa: F401
    from knet_runtime.web.auth import listen

    with listen(serve, token=token, insecure=insecure) as listener:
        yield listener


@contextmanager
def _live_page(
    listener: Listener | None,
    segmenter: Segmenter,
    stats: RunStats,
    feeds: Sequence[Feed],
    outputs: Outputs,
) -> Iterator[None]:
    """The page of a run that is yet to begin: it becomes a sink of each feed, with --blur where it
    is asked for; nothing without a listener."""
    if listener is None:
        yield
        return
    from knet_runtime.web.server import LivePage

    with LivePage(
        listener,
        segmenter.labels,
        stats.snapshot,
        feeds=[feed.name for feed in feeds],
        alpha=outputs.look.alpha,
        classes=outputs.classes,
        model=segmenter.model_id,
        engine=segmenter.engine,
    ) as page:
        for feed in feeds:
            conceal = outputs.concealed(segmenter.labels)
            # First, so that it says that a feed has ended before large files are closed.
            feed.sinks = [conceal(page.sink(feed.name)), *feed.sinks]
        typer.echo(f"knet-deploy: the page is at {page.url}", err=True)
        yield
