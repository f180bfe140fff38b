"""What a run leaves: the outputs that its options ask for, and the summary that it ends with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from knet_deploy.cli.choices import Codec
from knet_deploy.cli.console import say, track
from knet_deploy.cli.ending import bounds_itself
from knet_runtime.drawing import OPACITY
from knet_runtime.errors import ConfigError

if TYPE_CHECKING:
    from knet_runtime.bundle.manifest import SegmentRules
    from knet_runtime.bundle.store import Bundle
    from knet_runtime.counts import Totals
    from knet_runtime.labels import LabelMap
    from knet_runtime.pipeline import Feed, RunStats, RunSummary
    from knet_runtime.pipeline.stats import StageSnapshot
    from knet_runtime.segmentation import Segmentation
    from knet_runtime.segmenter import Segmenter
    from knet_runtime.sinks import Look, Sink
    from knet_runtime.sources.base import SourceInfo
    from knet_runtime.types import Frame, Task

_IMAGES = (".png", ".jpg", ".jpeg")
_VIDEOS = (".mp4", ".mkv")
_BAGS = (".mcap", ".bag")
_SHARED = "shm:"


@dataclass(frozen=True)
class Outputs:
    """What one feed writes, as it was asked for. ``check`` first, then ``sinks``."""

    overlay: Path | None = None
    raw_output: str | None = None
    codec: Codec | None = None
    masks: Path | None = None
    overwrite: bool = False
    json: Path | None = None
    events: Path | None = None
    rle: Path | None = None
    coco: Path | None = None
    coco_panoptic: Path | None = None
    raw: str | None = None
    push: str | None = None
    capture: tuple[str, Path] | None = None
    alpha: float | None = None
    legend: bool | None = None
    names: bool = False
    side_by_side: bool = False
    classes: tuple[str, ...] = ()
    blur: tuple[str, ...] = ()
    page: bool = False

    @property
    def look(self) -> Look:
        """How overlays are drawn. Raises ConfigError for an opacity that cannot be."""
        from knet_runtime.sinks import Look

        return Look(
            alpha=OPACITY if self.alpha is None else self.alpha,
            legend=self.legend is not False,
            names=self.names,
            side_by_side=self.side_by_side,
            classes=self.classes,
        )

    @property
    def overlay_folder(self) -> bool:
        """Whether the overlay is a folder of images: what has no suffix, or is a folder now."""
        if self.overlay is None or str(self.overlay) == "-":
            return False
        return not self.overlay.suffix or self.overlay.is_dir()

    @property
    def is_summary_all(self) -> bool:
        """Whether there is no other output than the summary."""
        places = (
            *(self.overlay, self.masks, self.json, self.events, self.rle, self.coco),
            *(self.coco_panoptic, self.raw, self.push, self.capture),
        )
        return not self.page and all(place is None for place in places)

    @property
    def takes_stdout(self) -> bool:
        """Whether stdout is for results, and words have to go elsewhere."""
        return bool(self._on_stdout)

    @property
    def _on_stdout(self) -> list[str]:
        places = (
            *(("-o", self.overlay), ("--masks", self.masks)),
            *(("--json", self.json), ("--events", self.events)),
            *(("--rle", self.rle), ("--raw", self.raw)),
        )
        return [option for option, place in places if str(place) == "-"]

    def check(self) -> None:
        """ConfigError for what cannot be, before anything that costs time."""
        suffix = None if self.overlay is None else self.overlay.suffix.lower()
        folder = self.overlay_folder
        named = suffix is None or folder or str(self.overlay) == "-"
        if not named and suffix not in (*_VIDEOS, *_IMAGES, *_BAGS):
            raise ConfigError(_unknown(self.overlay))
        if self.raw_output is not None and not {"-o", "--masks"} & {*self._on_stdout}:
            raise ConfigError(
                "--raw-output is about frames on stdout: add -o - or --masks -, or leave it out"
            )
        if self.codec is not None and (folder or suffix not in _VIDEOS):
            raise ConfigError("--codec is of the video that -o writes: name an .mp4 or .mkv")
        masks = self.masks is not None and str(self.masks) != "-"
        if self.overwrite and not (folder or masks) and self.coco_panoptic is None:
            raise ConfigError(
                "--overwrite is about folders: add -o FOLDER, --masks FOLDER or --coco-panoptic "
                "FOLDER, or leave it out"
            )
        shown = self.overlay is not None or self.push is not None
        if self.classes and not (shown or self.page or self.rle or self.coco):
            raise ConfigError(
                "--classes changes the overlay, and what is written to --rle and --coco: name one "
                "of them (the overlay with -o), or leave --classes out"
            )
        for option, given, used in (
            ("--alpha", self.alpha is not None, shown or self.page),
            ("--legend", self.legend is not None, shown),
            ("--names", self.names, shown),
            ("--side-by-side", self.side_by_side, shown),
            ("--blur", bool(self.blur), shown or self.page or self.capture is not None),
        ):
            if given and not used:
                raise ConfigError(
                    f"{option} changes the overlay: name it with -o, or leave {option} out"
                )
        _ = self.look  # refuses an opacity that cannot be
        if len(self._on_stdout) > 1:
            raise ConfigError(
                f"{' and '.join(self._on_stdout)} would mix on stdout; let one be a file"
            )
        if self.raw is not None and self.raw != "-" and not self.raw.startswith(_SHARED):
            raise ConfigError(f"--raw is {self.raw!r}: write - for stdout, or shm:NAME")

        if self.capture is not None and self.captured < 1:
            raise ConfigError(
                f"--capture is {self.capture[0]!r}: write uncertain:N and a folder, such as "
                "--capture uncertain:50 unsure"
            )

    @property
    def captured(self) -> int:
        """How many frames --capture keeps; 0 where it does not say."""
        text = "" if self.capture is None else self.capture[0]
        found = re.fullmatch(r"uncertain:([0-9]{1,6})", text)
        return 0 if found is None else int(found[1])

    def of(self, name: str) -> Outputs:
        """The places for the source ``name`` among several: o.NAME.mp4, masks/NAME/, shm:X.NAME,
        rtsp://…/NAME. Raises ConfigError for stdout, which is for one."""
        for option in self._on_stdout:
            fix = "use --raw shm:NAME" if option == "--raw" else "name a file"
            raise ConfigError(f"{option} - is for one source; {fix} with several")
        return replace(
            self,
            overlay=(
                self.overlay / name
                if self.overlay is not None and self.overlay_folder
                else _suffixed(self.overlay, name)
            ),
            masks=None if self.masks is None else self.masks / name,
            json=_suffixed(self.json, name),
            events=_suffixed(self.events, name),
            rle=_suffixed(self.rle, name),
            coco=_suffixed(self.coco, name),
            coco_panoptic=None if self.coco_panoptic is None else self.coco_panoptic / name,
            raw=None if self.raw is None else f"{self.raw}.{name}",
            push=None if self.push is None else f"{self.push.rstrip('/')}/{name}",
            capture=None if self.capture is None else (self.capture[0], self.capture[1] / name),
        )

    def check_classes(self, labels: LabelMap) -> None:
        """ConfigError for classes that the model does not have."""
        labels.indices(self.classes)
        labels.indices(self.blur)

    def check_task(self, bundle: Bundle) -> None:
        """ConfigError for outputs that hold objects, where the model finds none."""
        for option, place in (("--coco", self.coco), ("--coco-panoptic", self.coco_panoptic)):
            if place is not None:
                needs_segments(option, bundle)

    def sinks(self, info: SourceInfo, labels: LabelMap, model: str) -> list[Sink]:
        """Open all of them. Raises ConfigError, and OutputError for what cannot be written."""
        from knet_runtime import sinks

        self.check_classes(labels)
        made: list[Sink] = []
        conceal = self.concealed(labels)
        if self.overlay is not None:
            made.append(conceal(self._overlay(self.overlay, info, model)))
        if self.push is not None:
            made.append(conceal(sinks.RtspPush(self.push, info, self.look)))
        if str(self.masks) == "-":
            made.append(sinks.MaskPipe(info, form=self.raw_output or "y4m"))
        elif self.masks is not None:
            made.append(sinks.MaskFolder(self.masks, overwrite=self.overwrite))
        if self.json is not None:
            made.append(sinks.JsonLines(self.json, model))
        if self.events is not None:
            made.append(sinks.EventLines(self.events))
        if self.rle is not None:
            made.append(sinks.RleLines(self.rle, model, classes=self.classes))
        if self.coco is not None:
            made.append(sinks.CocoResults(self.coco, classes=self.classes))
        if self.coco_panoptic is not None:
            made.append(sinks.CocoPanoptic(self.coco_panoptic, overwrite=self.overwrite))
        if self.capture is not None:
            made.append(conceal(sinks.UncertainFrames(self.capture[1], self.captured)))
        if self.raw is not None:
            shared = self.raw.removeprefix(_SHARED)
            made.append(sinks.RawMasks() if self.raw == "-" else sinks.SharedMasks(shared))
        return made

    def concealed(self, labels: LabelMap) -> Callable[[Sink], Sink]:
        """Wraps a sink that shows frames, so that --blur holds for it; for one feed's sinks."""
        from knet_runtime.privacy import Concealed, Concealer

        if not self.blur:
            return lambda sink: sink
        concealer = Concealer(labels, self.blur)
        return lambda sink: Concealed(sink, concealer)

    def _overlay(self, output: Path, info: SourceInfo, model: str) -> Sink:
        from knet_runtime.sinks import (
            OverlayFolder,
            OverlayImage,
            OverlayPipe,
            OverlayVideo,
            RosBag,
        )

        look = self.look
        # What programs read has the frame's size, unless a legend is asked for.
        plain = msgspec.structs.replace(look, legend=self.legend is True)
        if str(output) == "-":
            return OverlayPipe(info, plain, form=self.raw_output or "y4m")
        if output.suffix.lower() in _BAGS or (info.kind == "bag" and not output.suffix):
            return RosBag(output, info, model, plain)
        if self.overlay_folder:
            return OverlayFolder(output, look, overwrite=self.overwrite)
        if output.suffix.lower() in _VIDEOS:
            return OverlayVideo(output, info, look, codec=self.codec or "h264")
        if info.kind != "image":
            raise ConfigError(
                f"{output}: an image file is for a single image; let the name end in .mp4, or name "
                f"a folder: {output.stem}/"
            )
        return OverlayImage(output, look)


def needs_segments(
    option: str, bundle: Bundle, tasks: Sequence[Task] = ("panoptic", "instance")
) -> None:
    """ConfigError unless ``bundle`` is of one of these tasks, which ``option`` is for."""
    task = bundle.manifest.task
    if task not in tasks:
        raise ConfigError(
            f"{option} is for bundles of {' and '.join(tasks)} segmentation, and {bundle.path} is "
            f"for {task} segmentation: leave {option} out"
        )


def segment_rules(bundle: Bundle, score: float | None, top_k: int | None) -> SegmentRules | None:
    """What --score and --top-k change of the bundle's rules; None without them. Raises ConfigError
    for a bundle that has no use for them."""
    if score is not None:
        needs_segments("--score", bundle)
    if top_k is not None:
        needs_segments("--top-k", bundle, ("instance",))
    if score is not None and not 0 <= score < 1:
        raise ConfigError(f"--score is {score}; scores lie from 0 to below 1")
    rules = bundle.manifest.segment_rules
    if score is not None:
        rules = msgspec.structs.replace(rules, score=score)
    if top_k is not None:
        rules = msgspec.structs.replace(rules, top_k=top_k)
    return None if score is None and top_k is None else rules


def _unknown(output: Path | None) -> str:
    return (
        f"{output}: let the overlay's name end in .mp4 or .mkv (or .png or .jpg for a single "
        "image, .mcap or .bag for a recording of ROS, or in / for a folder of images)"
    )


def _suffixed(place: Path | None, name: str) -> Path | None:
    return None if place is None else place.with_name(f"{place.stem}.{name}{place.suffix}")


class Shares:
    """A sink that sums what the classes cover, and keeps what was counted; it writes nothing."""

    path = None

    def __init__(self, name: str) -> None:
        self.name = name
        self._frames = 0
        self._sums: dict[str, float] = {}
        self._totals: Totals | None = None

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Add a frame; one that is shown again does not count."""
        if frame.stale:
            return
        self._frames += 1
        self._totals = None if result.counts is None else result.counts.totals
        for label, share in result.shares().items():
            self._sums[label] = self._sums.get(label, 0.0) + share

    def close(self, *, complete: bool = True) -> None:
        """Nothing is left to be done."""

    def say(self) -> None:
        """The classes by what they cover of all frames, most first."""
        ordered = sorted(self._sums.items(), key=lambda item: -item[1])
        for index, (label, total) in enumerate(ordered):
            say("" if index else "shares", f"{100 * total / self._frames:5.1f} %  {label}")
        for index, line in enumerate(_counted(self._totals)):
            say("" if index else "counted", line)


def _counted(totals: Totals | None) -> Iterator[str]:
    """A line for each zone or line and each class that was counted there."""
    for name, zone in ({} if totals is None else totals.zones).items():
        for label, count in zone.items():
            numbers = f"{count.entered} entered, {count.left} left, {count.present} present"
            yield f"{name}: {label} {numbers}"
        if not zone:
            yield f"{name}: none"
    for name, line in ({} if totals is None else totals.lines).items():
        for label, way in line.items():
            yield f"{name}: {label} {way.to_left} to the left, {way.to_right} to the right"
        if not line:
            yield f"{name}: none"


def feed_names(sources: Sequence[str]) -> list[str]:
    """A name per source for numbers and files: of an address its host and path, of a file its stem;
    letters, digits and - only, numbered where two would be the same."""
    from knet_runtime.sources.container import redacted, scheme_of

    names: list[str] = []
    for source in sources:
        if scheme_of(source):
            text = redacted(source).partition("://")[2].partition("?")[0].rpartition("@")[2]
        else:
            text = "stdin" if source == "-" else Path(source).stem or Path(source).resolve().name
        plain = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "source"
        name, count = plain, 1
        while name in names:
            count += 1
            name = f"{plain}-{count}"
        names.append(name)
    return names


def run_and_say(
    feeds: Sequence[Feed], segmenter: Segmenter, stats: RunStats, max_frames: int | None
) -> None:
    """Run to the end, or to ``max_frames`` of each feed, and say what came of it; each feed has a
    sink ``Shares``. Raises what the run raises, after saying what is kept."""
    from knet_runtime.pipeline import run

    title = feeds[0].name if len(feeds) == 1 else f"{len(feeds)} sources"
    try:
        with bounds_itself(), track(title, _expected(feeds, max_frames)) as advance:
            summary = run(
                feeds, segmenter, max_frames=max_frames, on_frame=lambda *_: advance(), stats=stats
            )
    except (Exception, KeyboardInterrupt) as error:
        frames = sum(feed.frames for feed in stats.snapshot().feeds.values())
        if frames:
            how = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            say(how, f"after {frames} frames; what was written until then is kept")
            _say_feeds(feeds, segmenter, stats, times=False)
        raise
    if len(feeds) == 1:
        say_times(summary)
    else:
        say("frames", summary.frames)
        say("speed", f"{summary.fps:.1f} frames/s of all sources ({summary.seconds:.1f} s)")
    _say_feeds(feeds, segmenter, stats, times=len(feeds) > 1)


def _expected(feeds: Sequence[Feed], max_frames: int | None) -> int | None:
    """How many frames there will be, None where a source does not say."""
    total = 0
    for feed in feeds:
        frames = feed.source.info.frames
        if max_frames is not None:
            frames = min(frames or max_frames, max_frames)
        if frames is None:
            return None
        total += frames
    return total


def say_times(summary: RunSummary) -> None:
    """The lines on speed of a run of one source."""
    say("frames", summary.frames)
    say("speed", f"{summary.fps:.1f} frames/s ({summary.seconds:.1f} s)")
    _say_stages(summary.stages)


def _say_feeds(
    feeds: Sequence[Feed], segmenter: Segmenter, stats: RunStats, *, times: bool
) -> None:
    say("engine", segmenter.engine)
    say("model", segmenter.model_id)
    numbers = stats.snapshot().feeds
    for feed in feeds:
        snapshot = numbers[feed.name]
        if len(feeds) > 1:
            say("source", feed.name)
            say("frames", snapshot.frames)
        if times:
            _say_stages(snapshot.stages)
        for label, count in (
            ("dropped", snapshot.dropped),
            ("stale", snapshot.stale_frames),
            ("reconnects", snapshot.reconnects),
        ):
            if count:
                say(label, count)
        _say_written(feed.sinks)
        next(sink for sink in feed.sinks if isinstance(sink, Shares)).say()


def _say_stages(stages: dict[str, StageSnapshot]) -> None:
    """Milliseconds per frame by stage."""
    for index, (stage, time) in enumerate(stages.items()):
        text = f"{stage:<9} {time.p50:8.1f} median {time.p95:8.1f} p95 {time.p99:8.1f} p99"
        say("" if index else "times, ms", text)


def _say_written(sinks: Sequence[Sink]) -> None:
    """The files and folders that are there now."""
    for sink in sinks:
        if sink.path is not None:
            say("written", f"{sink.path}{'/' if sink.path.is_dir() else ''}")
