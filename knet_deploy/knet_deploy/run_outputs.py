"""What ``run`` writes: its options on outputs, checked, and the sinks that they mean per source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from knet_runtime.frames import SourceInfo
    from knet_runtime.sinks import Sink

ALPHA = 0.5
_VIDEOS = (".mp4", ".mkv")
_PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Outputs:
    """Where results go, and how the overlay looks; ``alpha`` None is the usual one."""

    overlay: Path | None = None
    masks: Path | None = None
    json: Path | None = None
    alpha: float | None = None
    legend: bool = False

    def check(self) -> None:
        """ConfigError for what can not be, before anything that takes time."""
        from knet_runtime.errors import ConfigError

        if self.overlay is None and (self.legend or self.alpha is not None):
            given = "--legend" if self.legend else "--alpha"
            raise ConfigError(f"{given} changes the overlay: name it with -o, or leave {given} out")
        if self.overlay is not None and self.overlay.suffix.lower() not in (*_VIDEOS, *_PICTURES):
            raise ConfigError(
                f"{self.overlay}: let the overlay's name end in .mp4 or .mkv (or .png or .jpg for "
                "a single image)"
            )
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ConfigError(
                f"--alpha is {self.alpha}; the overlay's opacity lies between 0 and 1"
            )

    def of(self, name: str) -> Outputs:
        """The places for the source ``name`` among several: o.NAME.mp4, masks/NAME/."""
        return Outputs(
            overlay=_suffixed(self.overlay, name),
            masks=None if self.masks is None else self.masks / name,
            json=_suffixed(self.json, name),
            alpha=self.alpha,
            legend=self.legend,
        )

    def sinks(self, info: SourceInfo, model: str) -> list[Sink]:
        """The sinks for one source, which try whether they can write. Raises OutputError."""
        from knet_runtime.sinks import JsonLines, MaskFolder

        sinks: list[Sink] = []
        if self.overlay is not None:
            sinks.append(self._overlay_sink(self.overlay, info))
        if self.masks is not None:
            sinks.append(MaskFolder(self.masks))
        if self.json is not None:
            sinks.append(JsonLines(self.json, model))
        return sinks

    def _overlay_sink(self, place: Path, info: SourceInfo) -> Sink:
        from knet_runtime.errors import ConfigError
        from knet_runtime.sinks import OverlayImage, OverlayVideo

        alpha = ALPHA if self.alpha is None else self.alpha
        if place.suffix.lower() not in _PICTURES:
            return OverlayVideo(place, info, alpha=alpha, legend=self.legend)
        if info.kind != "image":
            raise ConfigError(
                f"{place}: a picture is written for a single image; let the name end in .mp4"
            )
        return OverlayImage(place, alpha=alpha, legend=self.legend)


def feed_names(sources: Sequence[str]) -> list[str]:
    """A name per source for numbers and files: of an address its host and path, of a file its stem;
    letters, digits and - only, numbered where two would be the same."""
    from knet_runtime.address import redacted, scheme_of

    names: list[str] = []
    for source in sources:
        if scheme_of(source):
            text = redacted(source).partition("://")[2].partition("?")[0].rpartition("@")[2]
        else:
            text = Path(source).stem or Path(source).resolve().name
        plain = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "source"
        name, count = plain, 1
        while name in names:
            count += 1
            name = f"{plain}-{count}"
        names.append(name)
    return names


def _suffixed(place: Path | None, name: str) -> Path | None:
    return None if place is None else place.with_name(f"{place.stem}.{name}{place.suffix}")
