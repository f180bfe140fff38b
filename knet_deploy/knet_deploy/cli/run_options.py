"""The options of ``run`` that say where results go and what they look like, and what they open.

The options of ``run`` that put it on a web page, and what they open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knet_deploy.cli.console import needs_extra
from knet_runtime.errors import ConfigError

if TYPE_CHECKING:
    from knet_runtime.labels import LabelMap
    from knet_runtime.pipeline import Feed, RunStats
    from knet_runtime.segmenter import Segmenter
    from knet_runtime.sinks import Sink
    from knet_runtime.sinks.encoder import Codec
    from knet_runtime.smoothing import Smoother
    from knet_runtime.sources.base import SourceInfo
    from knet_runtime.web.auth import Listener


ALPHA = 0.5
_PICTURES = (".png", ".jpg", ".jpeg")
_VIDEOS = (".mp4", ".mkv")
_SHARED = "shm:"

Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Write the overlay: .mp4 or .mkv; for one image also .png or .jpg."
    ),
]
CodecOption = Annotated[
    str | None, typer.Option("--codec", help="Of the video that -o writes: h264 (default) or hevc.")
]
Masks = Annotated[
    Path | None, typer.Option("--masks", help="Write each class map as a PNG into this folder.")
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", help="Write a line of JSON per frame: class shares, times, model; - is stdout."
    ),
]
RleOption = Annotated[
    Path | None,
    typer.Option(
        "--rle", help="Write a line of JSON per frame: each class's mask as COCO RLE; - is stdout."
    ),
]
Raw = Annotated[
    str | None,
    typer.Option(
        "--raw",
        metavar="-|shm:NAME",
        help="Hand the raw class maps to a program: to stdout (-), or in shared memory.",
    ),
]
Push = Annotated[
    str | None,
    typer.Option("--push", metavar="URL", help="Push the overlay to an RTSP server."),
]
Alpha = Annotated[
    float | None,
    typer.Option("--alpha", help=f"Opacity of the overlay's colours, 0 to 1 ({ALPHA})."),
]
Legend = Annotated[
    bool, typer.Option("--legend", help="Add class names and shares below the overlay.")
]
Classes = Annotated[
    str | None,
    typer.Option("--classes", metavar="NAME,...", help="Draw, and write to --rle, only these."),
]
Blur = Annotated[
    str | None,
    typer.Option(
        "--blur",
        metavar="NAME,...",
        help="Privacy: take these classes out of every picture, as far as the model sees them.",
    ),
]
Smooth = Annotated[
    int | None,
    typer.Option(
        "--smooth", metavar="FRAMES", help="Less flicker: classes last so many frames; try 2."
    ),
]


@dataclass(frozen=True)
class Outputs:
    """What one feed writes, as it was asked for. ``check`` first, then ``sinks``."""

    overlay: Path | None = None
    codec: str | None = None
    masks: Path | None = None
    json: Path | None = None
    rle: Path | None = None
    raw: str | None = None
    push: str | None = None
    alpha: float | None = None
    legend: bool = False
    classes: tuple[str, ...] = ()
    blur: tuple[str, ...] = ()
    page: bool = False

    @property
    def takes_stdout(self) -> bool:
        """Whether stdout is for results, and words have to go elsewhere."""
        return bool(self._on_stdout)

    @property
    def _on_stdout(self) -> list[str]:
        places = (("--json", self.json), ("--rle", self.rle), ("--raw", self.raw))
        return [option for option, place in places if str(place) == "-"]

    def check(self) -> None:
        """ConfigError for what can not be, before anything that costs time."""
        suffix = None if self.overlay is None else self.overlay.suffix.lower()
        if suffix is not None and suffix not in (*_VIDEOS, *_PICTURES):
            raise ConfigError(
                f"{self.overlay}: let the overlay's name end in .mp4 or .mkv (or .png or .jpg for "
                "a single image)"
            )
        if self.codec not in (None, "h264", "hevc"):
            raise ConfigError(f"--codec is {self.codec!r}; use h264 or hevc")
        if self.codec is not None and suffix not in _VIDEOS:
            raise ConfigError("--codec is of the video that -o writes: name an .mp4 or .mkv")
        shown = self.overlay is not None or self.push is not None
        for option, given, used in (
            ("--alpha", self.alpha is not None, shown or self.page),
            ("--legend", self.legend, shown),
            ("--classes", bool(self.classes), shown or self.page or self.rle is not None),
            ("--blur", bool(self.blur), shown or self.page),
        ):
            if given and not used:
                raise ConfigError(
                    f"{option} changes the overlay: name it with -o, or leave {option} out"
                )
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ConfigError(f"--alpha is {self.alpha}; opacity lies between 0 and 1")
        if len(self._on_stdout) > 1:
            raise ConfigError(
                f"{' and '.join(self._on_stdout)} would mix on stdout; let one be a file"
            )
        if self.raw is not None and self.raw != "-" and not self.raw.startswith(_SHARED):
            raise ConfigError(f"--raw is {self.raw!r}: write - for stdout, or shm:NAME")

    def of(self, name: str) -> Outputs:
        """The places for the source ``name`` among several: o.NAME.mp4, masks/NAME/, shm:X.NAME,
        rtsp://…/NAME. Raises ConfigError for stdout, which is for one."""
        for option in self._on_stdout:
            mend = "use --raw shm:NAME" if option == "--raw" else "name a file"
            raise ConfigError(f"{option} - is for one source; {mend} with several")
        return replace(
            self,
            overlay=_suffixed(self.overlay, name),
            masks=None if self.masks is None else self.masks / name,
            json=_suffixed(self.json, name),
            rle=_suffixed(self.rle, name),
            raw=None if self.raw is None else f"{self.raw}.{name}",
            push=None if self.push is None else f"{self.push.rstrip('/')}/{name}",
        )

    def check_classes(self, labels: LabelMap) -> None:
        """ConfigError for classes that the model does not have."""
        labels.indices(self.classes)
        labels.indices(self.blur)

    def sinks(self, info: SourceInfo, labels: LabelMap, model: str) -> list[Sink]:
        """Open all of them. Raises ConfigError, and OutputError for what can not be written."""
        from knet_runtime import sinks

        self.check_classes(labels)
        made: list[Sink] = []
        conceal = self.concealed(labels)
        if self.overlay is not None:
            made.append(conceal(self._overlay(self.overlay, info)))
        if self.push is not None:
            alpha = ALPHA if self.alpha is None else self.alpha
            made.append(
                conceal(
                    sinks.RtspPush(
                        self.push, info, alpha=alpha, legend=self.legend, classes=self.classes
                    )
                )
            )
        if self.masks is not None:
            made.append(sinks.MaskFolder(self.masks))
        if self.json is not None:
            made.append(sinks.JsonLines(self.json, model))
        if self.rle is not None:
            made.append(sinks.RleLines(self.rle, model, classes=self.classes))
        if self.raw is not None:
            shared = self.raw.removeprefix(_SHARED)
            made.append(sinks.RawMasks() if self.raw == "-" else sinks.SharedMasks(shared))
        return made

    def concealed(self, labels: LabelMap) -> Callable[[Sink], Sink]:
        """Wraps a sink that shows pictures, so that --blur holds for it; for one feed's sinks."""
        from knet_runtime.privacy import Concealed, Concealer

        if not self.blur:
            return lambda sink: sink
        concealer = Concealer(labels, self.blur)
        return lambda sink: Concealed(sink, concealer)

    def _overlay(self, output: Path, info: SourceInfo) -> Sink:
        from knet_runtime.sinks import OverlayImage, OverlayVideo

        alpha = ALPHA if self.alpha is None else self.alpha
        if output.suffix.lower() not in _PICTURES:
            codec: Codec = "hevc" if self.codec == "hevc" else "h264"
            return OverlayVideo(
                output,
                info,
                alpha=alpha,
                legend=self.legend,
                classes=self.classes,
                codec=codec,
            )
        if info.kind != "image":
            raise ConfigError(
                f"{output}: a picture is written for a single image; let the name end in .mp4"
            )
        return OverlayImage(output, alpha=alpha, legend=self.legend, classes=self.classes)


def _suffixed(place: Path | None, name: str) -> Path | None:
    return None if place is None else place.with_name(f"{place.stem}.{name}{place.suffix}")


def names(option: str | None) -> tuple[str, ...]:
    """The class names of "road,car"."""
    return tuple(name.strip() for name in (option or "").split(",") if name.strip())


def smoother(strength: int | None) -> Smoother | None:
    """What --smooth asks for; one for each feed. Raises ConfigError."""
    from knet_runtime.smoothing import Smoother

    return None if strength is None else Smoother(strength)


Serve = Annotated[
    str | None,
    typer.Option(
        "--serve",
        metavar="HOST:PORT",
        help="Show the run on a web page there, such as 127.0.0.1:8000; with metrics and health.",
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        envvar="KNET_DEPLOY_TOKEN",
        help="What viewers of --serve must know; needed where others than this machine reach it.",
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Let everybody who reaches --serve look, without token.")
]


@contextmanager
def page_listener(
    serve: str | None, token: str | None, insecure: bool
) -> Iterator[Listener | None]:
    """The port of --serve, held before anything that costs time is loaded; None without it.

    Raises ConfigError for an address or a token that will not do, MissingExtra without the extra.
    """
    if serve is None:
        # A token may stand in the environment of all runs.
        if insecure:
            from knet_runtime.errors import ConfigError

            raise ConfigError(
                "--insecure is about the page: add --serve HOST:PORT, or leave it out"
            )
        yield None
        return
    with needs_extra("serve", "--serve"):
        import knet_runtime.web.server  # noqa: F401
    from knet_runtime.web.auth import listen

    listener = listen(serve, token=token, insecure=insecure)
    try:
        yield listener
    finally:
        listener.close()


@contextmanager
def live_page(
    listener: Listener | None,
    segmenter: Segmenter,
    stats: RunStats,
    feeds: Sequence[Feed],
    *,
    alpha: float,
    classes: Sequence[str] = (),
    hide: Callable[[LabelMap], Callable[[Sink], Sink]] | None = None,
) -> Iterator[None]:
    """The page of a run that is yet to begin: it becomes a sink of each feed; nothing without a
    listener. ``hide`` makes what wraps a feed's sink that shows pictures, for privacy."""
    if listener is None:
        yield
        return
    from knet_runtime.web.server import LivePage

    with LivePage(
        listener,
        segmenter.labels,
        stats.snapshot,
        feeds=[feed.name for feed in feeds],
        alpha=alpha,
        classes=classes,
        model=segmenter.model_id,
        engine=segmenter.engine,
    ) as page:
        for feed in feeds:
            sink: Sink = page.sink(feed.name)
            feed.sinks = [*feed.sinks, sink if hide is None else hide(segmenter.labels)(sink)]
        typer.echo(f"knet-deploy: the page is at {page.url}", err=True)
        yield
