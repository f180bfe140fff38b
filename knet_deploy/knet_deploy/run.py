"""``knet-deploy run``: videos, images, cameras and streams through a bundle, into files."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from knet_deploy.console import parse_size, say, track
from knet_deploy.run_outputs import ALPHA, Outputs, feed_names
from knet_deploy.run_summary import Shares, say_losses, say_stages, say_times, say_written
from knet_deploy.serve_options import Insecure, Serve, Token, live_page, page_listener

if TYPE_CHECKING:
    from collections.abc import Sequence

    from knet_runtime.bundle import Bundle
    from knet_runtime.frames import Frame
    from knet_runtime.segmenter import Mask, Segmenter
    from knet_runtime.selftest import SelfTestPolicy
    from knet_runtime.source_options import SourceOptions, Transport
    from knet_runtime.stream import Feed, Policy

_log = logging.getLogger(__name__)
_Choice = TypeVar("_Choice", bound=str)
_SELF_TESTS: tuple[SelfTestPolicy, ...] = ("refuse", "warn", "off")
_POLICIES: tuple[Policy, ...] = ("file", "live")
_TRANSPORTS: tuple[Transport, ...] = ("tcp", "udp")


def run(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A video, an image, a folder of images, a camera (0, /dev/video0), or an address "
            "of rtsp:// or http(s)://.",
        ),
    ],
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            metavar="SOURCE",
            help="One more source, on the same engine; may be repeated. Each then writes to places "
            "with its name: o.NAME.mp4, masks/NAME/.",
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", "-b", help="The bundle NAME.knet; the packaged model by default."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the overlay: an .mp4 or .mkv; for one image also .png or .jpg.",
        ),
    ] = None,
    masks: Annotated[
        Path | None, typer.Option("--masks", help="Write each class map as a PNG into this folder.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", help="Write a line of JSON per frame: class shares, times, model."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine", help="auto, or one that doctor lists; auto takes proven ones only."
        ),
    ] = "auto",
    require_verified: Annotated[
        bool,
        typer.Option(
            "--require-verified",
            help="Refuse to run what verify has not passed on this engine and device.",
        ),
    ] = False,
    self_test: Annotated[
        str,
        typer.Option(
            "--self-test",
            help="Replay the bundle's golden tensors at the first start here, and refuse or warn "
            "if the results differ, or off.",
        ),
    ] = "refuse",
    size: Annotated[
        str | None,
        typer.Option("--size", help="HEIGHTxWIDTH that the model sees; for bundles of any size."),
    ] = None,
    every: Annotated[int, typer.Option("--every", min=1, help="Take each n-th frame only.")] = 1,
    start: Annotated[
        float | None, typer.Option("--start", help="Seconds into the video to begin at.")
    ] = None,
    end: Annotated[
        float | None, typer.Option("--end", help="Seconds into the video to end before.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            help="file: every frame; live: the newest one, others are dropped and counted. By "
            "default cameras and streams are live.",
        ),
    ] = None,
    max_downtime: Annotated[
        float | None,
        typer.Option(
            "--max-downtime",
            help="Give a camera or stream up after so many seconds without a picture; it is tried "
            "for ever by default.",
        ),
    ] = None,
    transport: Annotated[
        str, typer.Option("--transport", help="How RTSP is read: tcp or udp.")
    ] = "tcp",
    hwaccel: Annotated[
        bool, typer.Option("--hwaccel", help="Decode on the GPU where FFmpeg can.")
    ] = False,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help=f"Opacity of the overlay's colours, 0 to 1 ({ALPHA})."),
    ] = None,
    legend: Annotated[
        bool, typer.Option("--legend", help="Add class names and shares below the overlay.")
    ] = False,
    max_frames: Annotated[
        int | None, typer.Option("--max-frames", min=1, help="Stop after so many frames.")
    ] = None,
    serve: Serve = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Segment videos, images, cameras and streams.

    Ends with a summary of frames per second, times per stage and class shares; without -o, --masks
    or --json that summary is all there is. Ctrl-C and SIGTERM end a run early and keep what is
    written, whole. A source that fails keeps no other from going on.
    """
    from knet_runtime.bundle import default_bundle_path, open_bundle
    from knet_runtime.segmenter import Segmenter
    from knet_runtime.source_options import SourceOptions

    # What costs nothing is checked first, and the engine, which costs most, is loaded last.
    check_engine(engine)
    tested = _one_of("--self-test", self_test, _SELF_TESTS)
    chosen = None if policy is None else _one_of("--policy", policy, _POLICIES)
    outputs = Outputs(output, masks, json, alpha, legend)
    outputs.check()
    options = SourceOptions(
        start=start,
        end=end,
        every=every,
        transport=_one_of("--transport", transport, _TRANSPORTS),
        max_downtime=max_downtime,
        hwaccel=hwaccel,
    )
    opened = open_bundle(bundle or default_bundle_path())
    if size is not None:
        opened = opened.at(parse_size(size))
    with ExitStack() as stack:
        listener = stack.enter_context(page_listener(serve, token, insecure))
        feeds = _open_feeds(stack, [source, *(more or [])], options, chosen, outputs, opened)
        segmenter = stack.enter_context(Segmenter(opened, engine))
        _check_proof(segmenter, require_verified)
        if (result := segmenter.self_test(tested)) is not None:
            _log.info("engine %s: self-test %s", segmenter.engine, result)
        work = _Run(segmenter, feeds)
        shown = ALPHA if alpha is None else alpha
        stack.enter_context(live_page(listener, segmenter, work.stats, feeds, alpha=shown))
        work.go(max_frames)


def check_engine(engine: str) -> None:
    """ConfigError for an engine that does not exist; whether it works here shows when it loads."""
    from knet_runtime.backends import ENGINES
    from knet_runtime.errors import ConfigError

    if engine not in ("auto", *ENGINES):
        raise ConfigError(f"there is no engine {engine!r}: use auto, {', '.join(ENGINES)}")


def _open_feeds(
    stack: ExitStack,
    sources: list[str],
    options: SourceOptions,
    policy: Policy | None,
    outputs: Outputs,
    bundle: Bundle,
) -> list[Feed]:
    from knet_runtime.stream import Feed
    from knet_runtime.video import open_source

    names, feeds = feed_names(sources), []
    for name, text in zip(names, sources, strict=True):
        opened = stack.enter_context(open_source(text, options))
        places = outputs if len(sources) == 1 else outputs.of(name)
        sinks = places.sinks(opened.info, bundle.model_id)
        feeds.append(Feed(opened, [*sinks, Shares(name)], name, policy))
    return feeds


def _check_proof(segmenter: Segmenter, required: bool) -> None:
    from knet_runtime.errors import ParityError

    doubt = segmenter.doubt
    if doubt is None:
        return
    precision = segmenter.bundle.artefact.precision
    text = (
        f"{segmenter.bundle.path} ({precision}) on {segmenter.engine}: {doubt}; "
        f"knet-deploy verify --engine {segmenter.engine} measures it"
    )
    if required:
        raise ParityError(text)
    _log.warning("%s", text)


def _one_of(option: str, text: str, choices: Sequence[_Choice]) -> _Choice:
    from knet_runtime.errors import ConfigError

    for choice in choices:
        if choice == text:
            return choice
    raise ConfigError(f"{option} is {text!r}: use {', '.join(choices)}")


class _Run:
    """One run, and what is known of it when it ends, however it ends."""

    def __init__(self, segmenter: Segmenter, feeds: list[Feed]) -> None:
        from knet_runtime.stream import RunStats

        self._segmenter = segmenter
        self._feeds = feeds
        self.stats = RunStats()

    def go(self, max_frames: int | None) -> None:
        from knet_runtime import stream

        try:
            with track(self._title(), self._expected(max_frames)) as advance:

                def count(frame: Frame, mask: Mask) -> None:
                    advance()

                summary = stream.run(
                    self._feeds,
                    self._segmenter,
                    max_frames=max_frames,
                    on_frame=count,
                    stats=self.stats,
                )
        except KeyboardInterrupt:
            self._say_kept("stopped")
            raise
        except Exception:
            self._say_kept("failed")
            raise
        if len(self._feeds) > 1:
            say("frames", summary.frames)
            say("speed", f"{summary.fps:.1f} frames/s of all sources ({summary.seconds:.1f} s)")
        else:
            say_times(summary)
        self._say_rest(times=len(self._feeds) > 1)

    def _title(self) -> str:
        return self._feeds[0].name if len(self._feeds) == 1 else f"{len(self._feeds)} sources"

    def _expected(self, max_frames: int | None) -> int | None:
        total = 0
        for feed in self._feeds:
            frames = feed.source.info.frames
            if max_frames is not None:
                frames = min(frames or max_frames, max_frames)
            if frames is None:
                return None
            total += frames
        return total

    def _say_kept(self, how: str) -> None:
        frames = sum(feed.frames for feed in self.stats.snapshot().feeds.values())
        if frames:
            say(how, f"after {frames} frames; what was written until then is kept")
            self._say_rest(times=False)

    def _say_rest(self, *, times: bool) -> None:
        say("engine", self._segmenter.engine)
        say("model", self._segmenter.model_id)
        numbers = self.stats.snapshot().feeds
        for feed in self._feeds:
            snapshot = numbers[feed.name]
            if len(self._feeds) > 1:
                say("source", feed.name)
                say("frames", snapshot.frames)
            if times:
                say_stages(snapshot.stages)
            say_losses(snapshot)
            shares = next(sink for sink in feed.sinks if isinstance(sink, Shares))
            say_written(feed.sinks, partial=shares.kept == "partial")
            shares.say()
