"""Folders of labelled objects, of whatever layout: where training, evaluation and the doctor of
data begin."""

from __future__ import annotations

from pathlib import Path

from knet_runtime.errors import DataError
from knet_runtime.types import Task
from knet_train.data.coco import coco_formats, list_coco
from knet_train.data.layouts import coco_files, find_objects, is_coco, no_folder, split_names
from knet_train.data.object_maps import list_maps
from knet_train.data.segment_folder import SegmentFolder


def open_segments(root: Path, split: str, task: Task) -> SegmentFolder:
    """Find the images and objects of a split for ``task`` "instance" or "panoptic": in COCO's
    formats where there are any, else in PNGs of objects' numbers.

    Raises DataError that says what is missing, or the first thing that is wrong.
    """
    folder = list_segments(root, split, task)
    if folder.problems:
        more = len(folder.problems) - 1
        raise DataError(folder.problems[0] + (f" (and {more} more problems)" if more else ""))
    if not folder.samples:
        raise DataError(f"split {split!r} of {root} is empty: add images and their labels")
    return folder


def list_segments(root: Path, split: str, task: Task) -> SegmentFolder:
    """The same, with what is wrong listed in ``problems`` and left out."""
    return (list_coco if _in_json(root) else list_maps)(root, split, task)


def segment_splits(root: Path, task: Task) -> list[str]:
    """The splits that the folder itself has, by name. Raises DataError."""
    if _in_json(root):
        files = coco_files(root)
        return list(next(files[kind] for kind in coco_formats(task) if kind in files))
    return split_names(find_objects(root)[0])


def usual_task(root: Path) -> Task:
    """What a folder is there for, unless someone says otherwise: "semantic" where there are class
    maps, else "panoptic" where there is stuff too."""
    if is_coco(root):
        return "panoptic" if "panoptic" in coco_files(root) else "instance"
    class_maps = ("labels", "annotations", "leftImg8bit")
    alone = not any((root / name).is_dir() for name in class_maps)
    numbers = any((root / name).is_dir() for name in ("instances", "masks"))
    return "instance" if alone and numbers else "semantic"


def _in_json(root: Path) -> bool:
    if not root.is_dir():
        raise no_folder(root)
    ours = all((root / name).is_dir() for name in ("labels", "instances"))
    return bool(coco_files(root)) and not ours
