"""``knet-deploy demo``: the packaged model on a real street and on a synthetic drive, with a page
of numbers."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knet_deploy.cli.choices import EngineOption
from knet_deploy.cli.console import say, track
from knet_deploy.cli.run_summary import say_times
from knet_runtime.types import Closeable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from knet_deploy.cli.demo_page import Example
    from knet_runtime.bundle.store import Bundle
    from knet_runtime.metrics import ConfusionMatrix
    from knet_runtime.pipeline import RunSummary
    from knet_runtime.segmentation import Segmentation
    from knet_runtime.segmenter import Segmenter
    from knet_runtime.types import Frame

_STREET = Path(__file__).with_name("street.mp4")  # street.LICENSE.txt says whose it is
_STREET_EXAMPLES = 2
_SIZE = (360, 480)
_RATE = 30
_DRIVE_EXAMPLES = 4
# Training draws its streets from small seeds: none of these has it ever seen.
_FIRST_STREET = 2_000_000_000


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for street.mp4, synthetic.mp4 and report.html.")
    ] = Path("knet-demo"),
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Which synthetic street is driven along.")
    ] = 0,
    frames: Annotated[
        int,
        typer.Option(
            "--frames", min=1, help="Length of the synthetic drive; the real street has 75 at most."
        ),
    ] = 120,
    engine: EngineOption = "auto",
) -> None:
    """Try the packaged model offline, on a real street and on a synthetic drive.

    Writes both videos with the model's classes over them, and a one-page report with speed, scores
    against the synthetic drive's exact labels, and whether the engine gives the results that
    PyTorch gave. Exit status 1 if it does not.
    """
    from knet_deploy.cli.demo_page import Results, render
    from knet_runtime.atomic import check_folder, output_error, write_atomic
    from knet_runtime.bundle.store import default_bundle_path, open_bundle
    from knet_runtime.engines import open_engine
    from knet_runtime.errors import ParityError
    from knet_runtime.golden import replay
    from knet_runtime.segmenter import Segmenter

    check_folder(out)
    bundle = open_bundle(default_bundle_path())
    _check_labels(bundle)
    with open_engine(bundle, engine) as backend:
        golden = replay(bundle, backend)
    street_video, drive_video = out / "street.mp4", out / "synthetic.mp4"
    page = out / "report.html"
    with Segmenter(bundle, engine) as segmenter:
        street = _street(segmenter, frames, street_video)
        summary, scores, drive = _drive(segmenter, seed, frames, drive_video)
        results = Results(
            model_id=segmenter.model_id,
            engine=segmenter.engine,
            machine=_machine(),
            seed=seed,
            labels=segmenter.labels,
            summary=summary,
            scores=scores,
            golden=golden,
            street=street,
            drive=drive,
            licence=bundle.manifest.licence,
        )
    try:
        write_atomic(page, render(results).encode())
    except OSError as error:
        raise output_error(page, error) from error
    say_times(summary)
    say("engine", results.engine)
    say("model", results.model_id)
    say("mIoU", f"{100 * scores.miou:.1f} % on this synthetic drive, which is no real street")
    say("golden", f"{'passed' if golden.passed else 'FAILED'}: {golden}")
    say("videos", street_video)
    say("", drive_video)
    say("report", page)
    if not golden.passed:
        raise ParityError(
            f"{results.engine} does not give the results that PyTorch gave: do not trust its "
            "masks; try another --engine, or see what knet-deploy doctor says"
        )


def _street(segmenter: Segmenter, most: int, video: Path) -> list[Example]:
    """Segment the packaged clip of a real street into a video; a few frames for the page."""
    from knet_deploy.cli.demo_page import Example
    from knet_runtime.pipeline import Feed, run
    from knet_runtime.sinks import OverlayVideo
    from knet_runtime.sources import open_source

    examples: list[Example] = []
    with open_source(_STREET) as source:
        count = min(most, source.info.frames or most)
        shown = _spread(_STREET_EXAMPLES, count)
        with track("real street", count) as advance:

            def keep(frame: Frame, mask: Segmentation) -> None:
                if frame.index in shown:
                    examples.append(Example(frame.index, frame.image, mask.class_map))
                advance()

            overlay = OverlayVideo(video, source.info, legend=True)
            feed = Feed(source, [overlay])
            run([feed], segmenter, max_frames=count, on_frame=keep)
    return examples


def _spread(examples: int, count: int) -> Collection[int]:
    """The indices of so many examples, evenly among ``count`` frames."""
    return {round((i + 0.5) * count / examples - 0.5) for i in range(examples)}


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


def _drive(
    segmenter: Segmenter, seed: int, count: int, video: Path
) -> tuple[RunSummary, ConfusionMatrix, list[Example]]:
    """Drive, write the video, score every frame, and keep a few of them for the page."""
    from knet_deploy.cli.demo_page import Example
    from knet_runtime.metrics import ConfusionMatrix
    from knet_runtime.pipeline import Feed, run
    from knet_runtime.sinks import OverlayVideo

    labels = segmenter.labels
    scores = ConfusionMatrix(labels.num_classes, labels.ignore_index)
    shown = _spread(_DRIVE_EXAMPLES, count)
    examples: list[Example] = []
    with Drive(seed, count) as drive, track("synthetic drive", count) as advance:

        def score(frame: Frame, mask: Segmentation) -> None:
            truth = drive.labels(frame.index)
            scores.update(mask.class_map, truth)
            if frame.index in shown:
                examples.append(Example(frame.index, frame.image, mask.class_map, truth))
            advance()

        overlay = OverlayVideo(video, drive.info, legend=True)
        summary = run([Feed(drive, [overlay])], segmenter, on_frame=score)
    return summary, scores, examples


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
