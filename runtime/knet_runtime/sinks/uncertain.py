"""The sink that keeps the frames of which the model was least sure, with its own labels."""

from __future__ import annotations

import heapq
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from knet_runtime.atomic import AtomicFolder, json_bytes, output_error
from knet_runtime.coco import categories, panoptic_png, segments_info
from knet_runtime.drawing import encode_png
from knet_runtime.errors import ConfigError, OutputError
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import Frame, Size, Task

WINDOW = 1
"""Seconds of a video of which one frame at the most is kept."""


@dataclass(order=True)
class _Kept:
    """One frame on the disk; its order is how unsure the model was. ``entries`` are COCO's
    annotations, where objects are told apart."""

    uncertainty: float
    index: int
    name: str = field(compare=False)
    seconds: float | None = field(compare=False)
    size: Size = field(compare=False)
    files: list[Path] = field(compare=False)
    entries: list[dict[str, Any]] = field(compare=False)


class UncertainFrames:
    """Keeps the ``count`` frames with the highest ``Segmentation.uncertainty`` as a data folder
    that ``data check``, ``data export`` and ``train`` read: ``images/`` and, of a semantic model,
    ``labels/`` and ``labels.json``, else COCO's format (``annotations/``). ``uncertainty.json``
    lists them, the least sure first.

    Neighbouring frames are alike, so of each second of a video one is kept at the most. The frames
    are on the disk, beside ``folder``, which appears whole when the sink is closed; one that is
    there already is refused. A run that ended early leaves ``PARTIAL.txt`` in it. Raises
    OutputError, and ``write`` ConfigError for results without uncertainty: see ``Segmenter``.

        >>> from knet_deploy import Segmenter, UncertainFrames, open_source
        >>> with open_source("photos") as source, Segmenter(uncertainty=True) as segment:
        ...     sink = UncertainFrames("unsure", 1)
        ...     for frame in source:
        ...         sink.write(frame, segment(frame.image))
        ...     sink.close()
        >>> import os
        >>> sorted(os.listdir("unsure")), len(os.listdir("unsure/images"))
        (['images', 'labels', 'labels.json', 'uncertainty.json'], 1)
    """

    MARK = "PARTIAL.txt"

    def __init__(self, folder: str | Path, count: int = 50) -> None:
        target = Path(folder)
        self.path: Path | None = target
        self.name = str(folder)
        if os.path.lexists(target):
            raise OutputError(f"{target} is there already: name another folder, or remove it")
        self._count = count
        self._kept: list[_Kept] = []
        self._best: tuple[float, Frame, Segmentation] | None = None  # of the window
        self._window: int | None = None
        self._labels: LabelMap | None = None
        self._task: Task = "semantic"
        self._folder: AtomicFolder | None = AtomicFolder(target)
        try:
            self._folder.__enter__()
        except OSError as error:
            raise output_error(target, error) from error

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Take one frame. Raises OutputError."""
        if self._folder is None:
            raise ValueError(f"{self.name} is closed")
        if frame.stale:
            return
        if result.uncertainty is None:
            raise ConfigError(
                f"{self.name}: nobody asked how sure the model is: open it with "
                "Segmenter(..., uncertainty=True)"
            )
        if result.task == "semantic" and result.class_map.dtype != np.uint8:
            raise ConfigError(
                f"{self.name}: label files have 8 bits, too few for this model's classes"
            )
        window = frame.index if frame.pts is None else int(frame.pts // WINDOW)
        if window != self._window:
            self._settle()
            self._window = window
        if self._best is None or result.uncertainty > self._best[0]:
            self._best = (result.uncertainty, frame, result)

    def close(self, *, complete: bool = True) -> None:
        """Give the folder its name; without frames ``path`` is then None. Raises OutputError."""
        if self._folder is None:
            return
        target, self.path = self.path, None
        try:
            self._settle()
            if self._kept:
                self._finish(self._folder.path, complete=complete)
                self._folder.commit()
                self.path = target
        except OSError as error:
            raise output_error(Path(self.name), error) from error
        finally:
            folder, self._folder = self._folder, None
            folder.__exit__()

    def _settle(self) -> None:
        """Write the best frame of the window that has ended, and remove the surest if there are
        too many."""
        best, self._best = self._best, None
        if best is None:
            return
        uncertainty, frame, result = best
        if len(self._kept) == self._count and uncertainty <= self._kept[0].uncertainty:
            return
        self._labels, self._task = result.labels, result.task
        name = f"{frame.name}.png"
        if Path(name).name != name:
            raise OutputError(f"{frame.name}: a frame's name cannot hold folders; rename it")
        files = {f"images/{name}": encode_png(frame.image)}
        entries: list[dict[str, Any]] = []
        match result.task:
            case "semantic":
                files[f"labels/{name}"] = result.class_png()
            case "panoptic":
                files[f"annotations/panoptic_all/{name}"] = panoptic_png(result)
                entries = [{"file_name": name, "segments_info": segments_info(result)}]
            case "instance":
                entries = [{**one, "iscrowd": 0} for one in result.to_coco()]
        assert self._folder is not None
        paths = {self._folder.path / place: data for place, data in files.items()}
        seconds = None if frame.pts is None else float(frame.pts)
        kept = _Kept(uncertainty, frame.index, name, seconds, result.size, [*paths], entries)
        try:
            for path, data in paths.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            heapq.heappush(self._kept, kept)
            if len(self._kept) > self._count:
                for path in heapq.heappop(self._kept).files:
                    path.unlink()
        except OSError as error:
            raise output_error(Path(self.name), error) from error

    def _finish(self, root: Path, *, complete: bool) -> None:
        """Write what is said of all frames together."""
        assert self._labels is not None
        labels, kept = self._labels, sorted(self._kept, reverse=True)
        if self._task == "semantic":
            names = {"class_names": labels.names, "palette_rgb": labels.palette}
            self._write(root / "labels.json", {**names, "ignore_index": labels.ignore_index})
        else:
            kind = "panoptic" if self._task == "panoptic" else "instances"
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            for number, one in enumerate(kept):
                height, width = one.size
                stated = {"id": number, "file_name": one.name, "height": height, "width": width}
                images.append(stated)
                for entry in one.entries:
                    annotations.append({"id": len(annotations), **entry, "image_id": number})
            content = {"images": images, "annotations": annotations}
            path = root / "annotations" / f"{kind}_all.json"
            path.parent.mkdir(exist_ok=True)
            self._write(path, {**content, "categories": categories(labels)})
        rows = [
            {"image": one.name, "uncertainty": round(one.uncertainty, 6), "seconds": one.seconds}
            for one in kept
        ]
        self._write(root / "uncertainty.json", rows)
        if not complete:
            text = "The run ended early: these are the frames of what it had read.\n"
            (root / self.MARK).write_text(text)

    def _write(self, path: Path, value: Any) -> None:
        path.write_bytes(msgspec.json.format(json_bytes(value), indent=1) + b"\n")
