"""Write a data folder in a format that other programs read: it appears whole, or not at all."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from knet_runtime.atomic import AtomicFolder, output_error
from knet_runtime.errors import ConfigError, DataError, OutputError
from knet_runtime.types import Task
from knet_train.data.export.coco import CocoWriter
from knet_train.data.export.cvat import CvatWriter
from knet_train.data.export.labelled import LabelledImage, LabelledImages
from knet_train.data.export.shapes import Counts
from knet_train.data.files import place_file

Target = Literal["coco", "cvat"]

_WORKERS = 8  # images in memory at a time
_WRITERS: dict[Target, type[CocoWriter | CvatWriter]] = {"coco": CocoWriter, "cvat": CvatWriter}


class Exported(NamedTuple):
    """What was written, or, where there are ``problems``, was not: a line for each."""

    splits: dict[str, int]
    counts: Counts
    problems: tuple[str, ...]


def check_export(out: Path, target: Target, task: Task, *, polygons: bool) -> None:
    """Refuse beforehand what could not be written. Raises ConfigError and OutputError."""
    if polygons and target == "coco" and task != "instance":
        raise ConfigError(
            f"--polygons: task {task} is written in COCO's panoptic format, which has none: leave "
            "it out, or write --to cvat"
        )
    if os.path.lexists(out):
        raise OutputError(f"{out} is there already: name another folder, or remove it")


def export(
    listed: LabelledImages,
    out: Path,
    target: Target,
    *,
    polygons: bool = False,
    link: bool = False,
    on_image: Callable[[], None] = lambda: None,
) -> Exported:
    """Write ``images/`` and the labels of all ``listed`` images into the new folder ``out``.

    With ``polygons``, labels without holes are outlines, within a pixel, instead of masks, which
    are exact. With ``link``, images are links. Where the labels of an image cannot be used,
    ``problems`` says so and nothing is written. Raises OutputError.
    """
    problems, masks, outlines = [], 0, 0
    try:
        with AtomicFolder(out) as folder, ThreadPoolExecutor(_WORKERS) as pool:
            writer: Any = _WRITERS[target](folder.path, listed, polygons=polygons)

            def draw(job: tuple[int, LabelledImage]) -> tuple[Any, Counts] | str:
                number, image = job
                try:
                    drawn: tuple[Any, Counts] = writer.draw(number, image)
                except DataError as error:
                    return str(error)
                place_file(image.image, folder.path / "images" / image.path, link=link)
                return drawn

            jobs = list(enumerate(listed.images))
            try:
                for (number, image), drawn in zip(jobs, pool.map(draw, jobs), strict=True):
                    on_image()
                    if isinstance(drawn, str):
                        problems.append(drawn)
                        continue
                    content, counts = drawn
                    writer.add(number, image, content)
                    masks, outlines = masks + counts.masks, outlines + counts.polygons
            finally:
                pool.shutdown(cancel_futures=True)  # after Ctrl-C nothing more is read
                writer.close()
            if not problems:
                folder.commit()
    except OSError as error:
        raise output_error(out, error) from error
    splits = Counter(image.split for image in listed.images)
    return Exported(dict(sorted(splits.items())), Counts(masks, outlines), tuple(problems))
