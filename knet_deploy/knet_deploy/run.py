"""``knet-deploy run``: a video, image, folder or camera through a bundle, into files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knet_deploy.console import parse_size, say, track

if TYPE_CHECKING:
    from collections.abc import Sequence

    from knet_runtime.frames import Frame, Source, SourceInfo
    from knet_runtime.segmenter import Mask, Segmenter
    from knet_runtime.sinks import Sink
    from knet_runtime.stream import RunSummary

_log = logging.getLogger(__name__)
_PICTURES = (".png", ".jpg", ".jpeg")
_ALPHA = 0.5


def run(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A video, an image, a folder of images, or a camera (0, /dev/video0).",
        ),
    ],
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", "-b", help="The bundle NAME.knet; the packaged model by default."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write the overlay: an .mp4; for one image also .png or .jpg."
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
    size: Annotated[
        str | None,
        typer.Option("--size", help="HEIGHTxWIDTH that the model sees; for bundles of any size."),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help=f"Opacity of the overlay's colours, 0 to 1 ({_ALPHA})."),
    ] = None,
    legend: Annotated[
        bool, typer.Option("--legend", help="Add class names and shares below the overlay.")
    ] = False,
    max_frames: Annotated[
        int | None, typer.Option("--max-frames", min=1, help="Stop after so many frames.")
    ] = None,
) -> None:
    """Segment a video, image, folder or camera.

    Ends with a summary of frames per second, times per stage and class shares; without -o, --masks
    or --json that summary is all there is. Ctrl-C ends a run early and keeps what is written.
    """
    from knet_runtime.bundle import default_bundle_path, open_bundle
    from knet_runtime.segmenter import Segmenter
    from knet_runtime.video import open_source

    # What costs nothing is checked first, and the engine, which costs most, is loaded last.
    check_engine(engine)
    _check_overlay(output, alpha, legend)
    opened = open_bundle(bundle or default_bundle_path())
    if size is not None:
        opened = opened.at(parse_size(size))
    with open_source(source) as frames:
        sinks: list[Sink] = []
        if output is not None:
            sinks.append(_overlay(output, frames.info, _ALPHA if alpha is None else alpha, legend))
        sinks.extend(_data_sinks(masks, json, opened.model_id))
        with Segmenter(opened, engine) as segmenter:
            _check_proof(segmenter, require_verified)
            _Run(segmenter, sinks).go(frames, source, max_frames)


def check_engine(engine: str) -> None:
    """ConfigError for an engine that does not exist; whether it works here shows when it loads."""
    from knet_runtime.backends import ENGINES
    from knet_runtime.errors import ConfigError

    if engine not in ("auto", *ENGINES):
        raise ConfigError(f"there is no engine {engine!r}: use auto, {', '.join(ENGINES)}")


def say_times(summary: RunSummary) -> None:
    """The summary's lines on speed."""
    say("frames", summary.frames)
    say("speed", f"{summary.fps:.1f} frames/s ({summary.seconds:.1f} s)")
    for index, (stage, time) in enumerate(summary.stages.items()):
        text = f"{stage:<6} {time.median:8.1f} median {time.p95:8.1f} p95"
        say("" if index else "times, ms", text)


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


def _check_overlay(output: Path | None, alpha: float | None, legend: bool) -> None:
    from knet_runtime.errors import ConfigError

    if output is None and (legend or alpha is not None):
        given = "--legend" if legend else "--alpha"
        raise ConfigError(f"{given} changes the overlay: name it with -o, or leave {given} out")
    if output is not None and output.suffix.lower() not in (".mp4", *_PICTURES):
        raise ConfigError(
            f"{output}: let the overlay's name end in .mp4 (or .png or .jpg for a single image)"
        )
    if alpha is not None and not 0 <= alpha <= 1:
        raise ConfigError(f"--alpha is {alpha}; the overlay's opacity lies between 0 and 1")


def _overlay(output: Path, info: SourceInfo, alpha: float, legend: bool) -> Sink:
    from knet_runtime.errors import ConfigError
    from knet_runtime.sinks import OverlayImage, OverlayVideo

    if output.suffix.lower() not in _PICTURES:
        return OverlayVideo(output, info, alpha=alpha, legend=legend)
    if info.kind != "image":
        raise ConfigError(
            f"{output}: a picture is written for a single image; let the name end in .mp4"
        )
    return OverlayImage(output, alpha=alpha, legend=legend)


def _data_sinks(masks: Path | None, json: Path | None, model: str) -> list[Sink]:
    from knet_runtime.sinks import JsonLines, MaskFolder

    sinks: list[Sink] = []
    if masks is not None:
        sinks.append(MaskFolder(masks))
    if json is not None:
        sinks.append(JsonLines(json, model))
    return sinks


class _Run:
    """One run, and what is known of it when it ends, however it ends."""

    def __init__(self, segmenter: Segmenter, sinks: Sequence[Sink]) -> None:
        self._segmenter = segmenter
        self._sinks = sinks
        self._frames = 0
        self._shares: dict[str, float] = {}

    def go(self, frames: Source, name: str, max_frames: int | None) -> None:
        from knet_runtime import stream

        expected = frames.info.frames
        if max_frames is not None:
            expected = min(expected or max_frames, max_frames)
        try:
            with track(Path(name).name or name, expected) as advance:

                def count(frame: Frame, mask: Mask) -> None:
                    self._frames += 1
                    for label, share in mask.shares().items():
                        self._shares[label] = self._shares.get(label, 0.0) + share
                    advance()

                summary = stream.run(
                    frames, self._segmenter, self._sinks, on_frame=count, max_frames=max_frames
                )
        except KeyboardInterrupt:
            self._say_kept("stopped", partial=False)
            raise
        except Exception:
            self._say_kept("failed", partial=True)
            raise
        say_times(summary)
        self._say_rest(partial=False)

    def _say_kept(self, how: str, *, partial: bool) -> None:
        if self._frames:
            say(how, f"after {self._frames} frames; what was written until then is kept")
            self._say_rest(partial=partial)

    def _say_rest(self, *, partial: bool) -> None:
        say("engine", self._segmenter.engine)
        say("model", self._segmenter.model_id)
        for sink in self._sinks:
            path = _partial(sink.path) if partial else sink.path
            if path.exists():
                say("written", f"{path}{'/' if path.is_dir() else ''}")
        shares = {label: share / self._frames for label, share in self._shares.items()}
        ordered = sorted(shares.items(), key=lambda item: -item[1])
        for index, (label, share) in enumerate(ordered):
            say("" if index else "shares", f"{100 * share:5.1f} %  {label}")


def _partial(path: Path) -> Path:
    """The name that an output gets when its run failed."""
    return path if path.is_dir() else path.with_name(f"{path.stem}.partial{path.suffix}")
