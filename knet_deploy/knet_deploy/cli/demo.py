"""``knet-deploy demo``: the packaged model on a real street and on a synthetic drive, with one page
of numbers (``demo.html``) that carries both videos and needs no network and no script."""

from __future__ import annotations

import base64
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated

import typer

from knet_deploy.cli.choices import EngineOption
from knet_deploy.cli.console import package_version, say, track
from knet_deploy.cli.outputs import say_times
from knet_runtime.types import ClassMap, Closeable, Rgb

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from knet_runtime.bundle.store import Bundle
    from knet_runtime.golden import GoldenReport
    from knet_runtime.labels import LabelMap
    from knet_runtime.metrics import ConfusionMatrix
    from knet_runtime.pipeline import RunSummary
    from knet_runtime.segmentation import Segmentation
    from knet_runtime.segmenter import Segmenter
    from knet_runtime.sources.base import Source
    from knet_runtime.types import Frame

_PAGE = Path(__file__).with_name("demo.html")
_STREET = Path(__file__).with_name("street.mp4")  # street.LICENSE.txt says whose it is
_STREET_EXAMPLES = 2
_SIZE = (360, 480)
_RATE = 30
_DRIVE_EXAMPLES = 4
# Training draws its streets from small seeds: none of these has it ever seen.
_FIRST_STREET = 2_000_000_000
_STAGES = {
    "read": "read (here: drawing the street)",
    "preprocess": "fit to the model's size",
    "infer": "network",
    "postprocess": "class map at full size",
    "write": "overlay and H.264",
}


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for street.mp4, synthetic.mp4 and report.html.")
    ] = Path("knet-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Which synthetic street is driven along.")] = 0,
    frames: Annotated[
        int,
        typer.Option(min=1, help="Length of the synthetic drive; the real street has 75 at most."),
    ] = 120,
    engine: EngineOption = "auto",
) -> None:
    """Try the packaged model offline, on a real street and on a synthetic drive.

    Writes both videos with the model's classes over them, and a one-page report with speed, scores
    against the synthetic drive's exact labels, and whether the engine gives the results that
    PyTorch gave. Exit status 1 if it does not.
    """
    from knet_runtime.atomic import check_folder, output_error, write_atomic
    from knet_runtime.bundle.store import open_bundle
    from knet_runtime.engines import open_engine
    from knet_runtime.errors import ParityError
    from knet_runtime.golden import replay
    from knet_runtime.metrics import ConfusionMatrix
    from knet_runtime.segmenter import Segmenter
    from knet_runtime.sources import open_source

    check_folder(out)
    bundle = open_bundle()
    _check_labels(bundle)
    labels, licence = bundle.manifest.labels, bundle.manifest.licence
    with open_engine(bundle, engine) as opened:
        golden = replay(bundle, opened)
    street_video, drive_video = out / "street.mp4", out / "synthetic.mp4"
    page = out / "report.html"
    scores = ConfusionMatrix(labels.num_classes, labels.ignore_index)
    with Segmenter(bundle, engine) as segmenter:
        name, model = segmenter.engine, segmenter.model_id
        with open_source(_STREET) as source:
            count = min(frames, source.info.frames or frames)
            _, street = _film(segmenter, source, count, street_video, _STREET_EXAMPLES)
        with Drive(seed, frames) as drive:

            def score(frame: Frame, result: Segmentation) -> ClassMap:
                truth = drive.labels(frame.index)
                scores.update(result.class_map, truth)
                return truth

            summary, driven = _film(segmenter, drive, frames, drive_video, _DRIVE_EXAMPLES, score)
    text = Template(_PAGE.read_text("utf-8")).substitute(
        _verdict(golden),
        miou=f"{100 * scores.miou:.1f}",
        accuracy=f"{100 * scores.pixel_accuracy:.1f}",
        fps=f"{summary.fps:.1f}",
        frames=summary.frames,
        times=_times(summary),
        classes=_classes(scores, labels),
        street_video=_film_uri(street_video),
        street=_figures(street, labels),
        drive_video=_film_uri(drive_video),
        drive=_figures(driven, labels),
        model=escape(model),
        engine=escape(name),
        machine=escape(_machine()),
        version=escape(package_version()),
        seed=seed,
        weights=escape(licence.weights),
        data=escape(licence.data),
    )
    try:
        write_atomic(page, text.encode())
    except OSError as error:
        raise output_error(page, error) from error
    say_times(summary)
    say("engine", name)
    say("model", model)
    say("mIoU", f"{100 * scores.miou:.1f} % on this synthetic drive, which is no real street")
    say("golden", f"{'passed' if golden.passed else 'FAILED'}: {golden}")
    say("videos", street_video)
    say("", drive_video)
    say("report", page)
    if not golden.passed:
        raise ParityError(
            f"{name} does not give the results that PyTorch gave: do not trust its masks; try "
            "another --engine, or see what knet-deploy doctor says"
        )


@dataclass(frozen=True, eq=False)
class _Example:
    """A frame for the page: image uint8 [H, W, 3] RGB, and its class maps [H, W]; ``truth`` where
    there are labels."""

    index: int
    image: Rgb
    prediction: ClassMap
    truth: ClassMap | None = None


def _film(
    segmenter: Segmenter,
    source: Source,
    count: int,
    video: Path,
    examples: int,
    truth_of: Callable[[Frame, Segmentation], ClassMap | None] = lambda *_: None,
) -> tuple[RunSummary, list[_Example]]:
    """Segment ``count`` frames into ``video``; so many of them, evenly spread, are for the page."""
    from knet_runtime.pipeline import Feed, run
    from knet_runtime.sinks import Look, OverlayVideo

    shown = {round((i + 0.5) * count / examples - 0.5) for i in range(examples)}
    found: list[_Example] = []
    with track(f"{video.stem} video", count) as advance:

        def collect(frame: Frame, result: Segmentation) -> None:
            truth = truth_of(frame, result)
            if frame.index in shown:
                found.append(_Example(frame.index, frame.image, result.class_map, truth))
            advance()

        feed = Feed(source, [OverlayVideo(video, source.info, Look(legend=True, names=True))])
        summary = run([feed], segmenter, max_frames=count, on_frame=collect)
    return summary, found


class Drive(Closeable):
    """A source of ``count`` frames along the street ``seed``; ``labels`` takes a frame's truth."""

    def __init__(self, seed: int, count: int) -> None:
        from knet_runtime.sources.base import SourceInfo, SourceStatus
        from knet_synthetic import Street

        self.info = SourceInfo("video", _SIZE, Fraction(_RATE), count, Fraction(1, _RATE))
        self.status = SourceStatus()
        self._street = Street(_FIRST_STREET + seed, _SIZE)
        self._truth: dict[int, NDArray[np.uint8]] = {}
        self._frames = self._draw(count)

    def _draw(self, count: int) -> Iterator[Frame]:
        from knet_runtime.types import Frame

        for index in range(count):
            image, self._truth[index] = self._street.frame(index)
            yield Frame(image, index, Fraction(index, _RATE), f"{index:06d}")

    def labels(self, index: int) -> NDArray[np.uint8]:
        """The exact class map of a frame that was handed out; once each."""
        return self._truth.pop(index)

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def stop(self) -> None:
        self._frames = iter(())

    def close(self) -> None:
        self.stop()


def _check_labels(bundle: Bundle) -> None:
    from knet_runtime.errors import BundleError
    from knet_synthetic import CAMVID11

    if bundle.manifest.labels.names != CAMVID11.names:
        raise BundleError(
            f"{bundle.path}: the packaged model has other classes than the synthetic street, so "
            "there is nothing to score; use knet-deploy run"
        )


def _machine() -> str:
    from knet_runtime.engines.hardware import cpu_budget

    cores = cpu_budget()
    return (
        f"{platform.system()} {platform.machine()}, {cores} CPU core{'s' if cores > 1 else ''}, "
        f"Python {platform.python_version()}"
    )


def _verdict(golden: GoldenReport) -> dict[str, str]:
    title = "The same results as PyTorch" if golden.passed else "NOT PyTorch's results"
    return {
        "verdict": "pass" if golden.passed else "fail",
        "golden_title": title,
        "golden": escape(str(golden)),
        "limit": f"{golden.tolerance.max_logit_diff:g}",
        "agreement": f"{100 * golden.tolerance.agreement:g}",
    }


def _times(summary: RunSummary) -> str:
    return "\n".join(
        f"<tr><td>{escape(_STAGES.get(stage, stage))}</td>"
        f"<td>{time.p50:.1f}</td><td>{time.p95:.1f}</td></tr>"
        for stage, time in summary.stages.items()
    )


def _classes(scores: ConfusionMatrix, labels: LabelMap) -> str:
    return "\n".join(
        f'<tr><td><i style="background:rgb{colour}"></i>{escape(row.name)}</td>'
        f"<td>{'–' if math.isnan(row.iou) else f'{100 * row.iou:.1f}'}</td>"
        f'<td><b style="width:{0 if math.isnan(row.iou) else 100 * row.iou:.1f}%"></b></td></tr>'
        for row, colour in zip(scores.rows(labels), labels.palette, strict=True)
    )


def _film_uri(video: Path) -> str:
    """A video as an address that holds it. Raises OutputError."""
    from knet_runtime.atomic import output_error

    try:
        data = video.read_bytes()
    except OSError as error:
        raise output_error(video, error) from error
    return f"data:video/mp4;base64,{base64.b64encode(data).decode()}"


def _figures(examples: list[_Example], labels: LabelMap) -> str:
    return "\n".join(_figure(example, labels) for example in examples)


def _figure(example: _Example, labels: LabelMap) -> str:
    from knet_runtime.drawing import colourise, encode_jpeg
    from knet_runtime.segmentation import Segmentation

    drawn = Segmentation(example.prediction, labels).overlay(example.image)
    views = {"frame": example.image, "K-Net": drawn}
    if example.truth is not None:
        views["exact labels"] = colourise(example.truth, labels)
    cells = "".join(
        f'<div><img alt="{name} of frame {example.index}" src="data:image/jpeg;base64,'
        f'{base64.b64encode(encode_jpeg(image, 85)).decode()}"><span>{name}</span></div>'
        for name, image in views.items()
    )
    return f"<figure>{cells}<figcaption>frame {example.index}</figcaption></figure>"
