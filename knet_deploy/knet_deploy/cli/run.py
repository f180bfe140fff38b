"""``knet-deploy run``: videos, images, cameras and streams through a bundle, into files."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from knet_deploy.cli.choices import EngineOption
from knet_deploy.cli.console import parse_size, say
from knet_deploy.cli.run_options import (
    ALPHA,
    Alpha,
    Blur,
    Classes,
    CodecOption,
    Insecure,
    Json,
    Legend,
    Masks,
    Output,
    Outputs,
    Push,
    Raw,
    RleOption,
    Serve,
    Smooth,
    Token,
    live_page,
    names,
    page_listener,
    smoother,
)
from knet_deploy.cli.run_summary import Shares, feed_names, run_and_say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from knet_runtime.bundle.store import Bundle
    from knet_runtime.golden import SelfTestPolicy
    from knet_runtime.pipeline import Feed, Policy
    from knet_runtime.segmenter import Segmenter
    from knet_runtime.sources.base import SourceOptions, Transport

_log = logging.getLogger(__name__)
_Choice = TypeVar("_Choice", bound=str)
_SELF_TESTS: tuple[SelfTestPolicy, ...] = ("refuse", "warn", "off")
_POLICIES: tuple[Policy, ...] = ("file", "live")
_TRANSPORTS: tuple[Transport, ...] = ("tcp", "udp")

BundleOption = Annotated[
    Path | None,
    typer.Option("--bundle", "-b", help="The bundle NAME.knet; the packaged model by default."),
]
RequireVerified = Annotated[
    bool,
    typer.Option(
        "--require-verified",
        help="Refuse to run what verify has not passed on this engine and device.",
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option("--size", help="HEIGHTxWIDTH that the model sees; for bundles of any size."),
]


def run(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="A video, an image, a folder of images, a camera (0, /dev/video0), or an address "
            "of rtsp:// or http(s)://.",
        ),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            metavar="SOURCE",
            help="The same, and may be repeated for several on one engine. Each then writes to "
            "places with its name: o.NAME.mp4, masks/NAME/.",
        ),
    ] = None,
    bundle: BundleOption = None,
    output: Output = None,
    codec: CodecOption = None,
    masks: Masks = None,
    json: Json = None,
    rle: RleOption = None,
    raw: Raw = None,
    push: Push = None,
    engine: EngineOption = "auto",
    require_verified: RequireVerified = False,
    self_test: Annotated[
        str,
        typer.Option(
            "--self-test",
            help="Replay the bundle's golden tensors at the first start here, and refuse or warn "
            "if the results differ, or off.",
        ),
    ] = "refuse",
    size: SizeOption = None,
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
            help="Give a camera or stream up after so many seconds without a frame; it is tried "
            "for ever by default.",
        ),
    ] = None,
    transport: Annotated[
        str, typer.Option("--transport", help="How RTSP is read: tcp or udp.")
    ] = "tcp",
    hwaccel: Annotated[
        bool, typer.Option("--hwaccel", help="Decode on the GPU where FFmpeg can.")
    ] = False,
    alpha: Alpha = None,
    legend: Legend = False,
    classes: Classes = None,
    blur: Blur = None,
    smooth: Smooth = None,
    max_frames: Annotated[
        int | None, typer.Option("--max-frames", min=1, help="Stop after so many frames.")
    ] = None,
    serve: Serve = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Segment videos, images, cameras and streams.

    Ends with a summary of frames per second, times per stage and class shares; without an output
    that summary is all there is. Ctrl-C and SIGTERM end a run early and keep what is
    written, whole. A source that fails keeps no other from going on.
    """
    from knet_runtime.bundle.store import default_bundle_path, open_bundle
    from knet_runtime.engines import why_auto
    from knet_runtime.errors import ConfigError
    from knet_runtime.pipeline import RunStats
    from knet_runtime.segmenter import Segmenter
    from knet_runtime.sources.base import SourceOptions

    sources = [*([] if source is None else [source]), *(more or [])]
    if not sources:
        raise ConfigError("there is no source: knet-deploy run SOURCE, or --source for several")
    # What costs nothing is checked first, and the engine, which costs most, is loaded last.
    tested = _one_of("--self-test", self_test, _SELF_TESTS)
    chosen = None if policy is None else _one_of("--policy", policy, _POLICIES)
    outputs = Outputs(
        overlay=output,
        codec=codec,
        masks=masks,
        json=json,
        rle=rle,
        raw=raw,
        push=push,
        alpha=alpha,
        legend=legend,
        classes=names(classes),
        blur=names(blur),
        page=serve is not None,
    )
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
        opened = opened.with_input_size(parse_size(size))
    with ExitStack() as stack:
        listener = stack.enter_context(page_listener(serve, token, insecure))
        feeds = _open_feeds(stack, sources, options, chosen, outputs, smooth, opened)
        if outputs.takes_stdout:
            stack.enter_context(redirect_stdout(sys.stderr))  # words must not mix with the masks
        segmenter = stack.enter_context(Segmenter(opened, engine))
        if engine == "auto":
            say("engine", f"{segmenter.engine}: {why_auto(opened, segmenter.engine)}")
        _check_proof(segmenter, require_verified)
        if (result := segmenter.self_test(tested)) is not None:
            _log.info("engine %s: self-test %s", segmenter.engine, result)
        stats = RunStats()
        page = live_page(
            listener,
            segmenter,
            stats,
            feeds,
            alpha=ALPHA if alpha is None else alpha,
            classes=outputs.classes,
            hide=outputs.concealed,
        )
        stack.enter_context(page)
        run_and_say(feeds, segmenter, stats, max_frames)


def _open_feeds(
    stack: ExitStack,
    sources: list[str],
    options: SourceOptions,
    policy: Policy | None,
    outputs: Outputs,
    smooth: int | None,
    bundle: Bundle,
) -> list[Feed]:
    from knet_runtime.pipeline import Feed
    from knet_runtime.sources import open_source

    outputs.check_classes(bundle.manifest.labels)
    feeds = []
    for name, text in zip(feed_names(sources), sources, strict=True):
        transform = smoother(smooth)
        opened = stack.enter_context(open_source(text, options))
        places = outputs if len(sources) == 1 else outputs.of(name)
        sinks = places.sinks(opened.info, bundle.manifest.labels, bundle.model_id)
        feeds.append(Feed(opened, [*sinks, Shares(name)], name, policy, transform))
    return feeds


def _check_proof(segmenter: Segmenter, required: bool) -> None:
    from knet_runtime.errors import ParityError

    unverified_reason = segmenter.unverified_reason
    if unverified_reason is None:
        return
    precision = segmenter.bundle.manifest.precision
    text = (
        f"{segmenter.bundle.path} ({precision}) on {segmenter.engine}: {unverified_reason}; "
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
