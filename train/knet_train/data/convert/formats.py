"""Which formats there are, and which of them a folder is in."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from knet_runtime.errors import DataError
from knet_train.data.convert.cvat import is_cvat, read_cvat
from knet_train.data.convert.known import is_ade20k, is_coco_tree, is_ours, read_coco, read_layout
from knet_train.data.convert.label_studio import is_label_studio, read_label_studio
from knet_train.data.convert.labelme import is_labelme, read_labelme
from knet_train.data.convert.mask_folders import (
    is_camvid,
    is_mask_folders,
    is_roboflow,
    read_mask_folders,
)
from knet_train.data.convert.parquet import is_parquet, read_parquet
from knet_train.data.convert.source import Source
from knet_train.data.convert.streets import (
    is_bdd100k,
    is_cityscapes,
    is_mapillary,
    read_bdd100k,
    read_cityscapes,
    read_mapillary,
)
from knet_train.data.convert.supervisely import is_supervisely, read_supervisely
from knet_train.data.convert.voc import is_voc, read_voc
from knet_train.data.convert.yolo import is_yolo, read_yolo
from knet_train.data.files import entries

_DEEP = 4  # folders that hold nothing but the next one: VOCdevkit/VOC2012/


class Format(NamedTuple):
    """One format: ``recognise`` says cheaply why a folder is in it, or None; ``read`` lists it,
    and may write what it unpacks into its second folder. Both raise DataError."""

    name: str
    title: str
    recognise: Callable[[Path], str | None]
    read: Callable[[Path, Path], Source]


class Match(NamedTuple):
    """A folder, the format that it is in, and why."""

    root: Path
    format: Format
    reason: str


FORMATS = (
    Format("knet-deploy", "this project's own", is_ours, read_layout),
    Format("coco", "COCO", is_coco_tree, read_coco),
    Format("voc", "Pascal VOC", is_voc, read_voc),
    Format("cvat", "CVAT for images", is_cvat, read_cvat),
    Format("labelme", "LabelMe", is_labelme, read_labelme),
    Format("label-studio", "Label Studio", is_label_studio, read_label_studio),
    Format("yolo", "YOLO segmentation", is_yolo, read_yolo),
    Format("roboflow", "Roboflow semantic masks", is_roboflow, read_mask_folders),
    Format("supervisely", "Supervisely", is_supervisely, read_supervisely),
    Format("cityscapes", "Cityscapes", is_cityscapes, read_cityscapes),
    Format("mapillary", "Mapillary Vistas", is_mapillary, read_mapillary),
    Format("bdd100k", "BDD100K", is_bdd100k, read_bdd100k),
    Format("ade20k", "ADE20K", is_ade20k, read_layout),
    Format("camvid", "CamVid", is_camvid, read_mask_folders),
    Format("parquet", "Hugging Face parquet", is_parquet, read_parquet),
)
# Tried where the folder is in no other format: its names are everybody's.
MASKS = Format("masks", "images and label images", is_mask_folders, read_mask_folders)
FORMAT_NAMES = tuple(one.name for one in (*FORMATS, MASKS))


def recognise(root: Path) -> list[Match]:
    """The formats that a folder is in, or, where it holds but one folder, that one; several where
    it cannot be told, none where it is in none. Raises DataError."""
    for _ in range(_DEEP):
        for formats in (FORMATS, (MASKS,)):
            reasons = [(one, one.recognise(root)) for one in formats]
            found = [Match(root, one, why) for one, why in reasons if why is not None]
            if found:
                return found
        folders = [path for path in entries(root) if path.is_dir()]
        if len(folders) != 1:
            break
        root = folders[0]
    return []


def choose(root: Path, name: str | None) -> Match:
    """The one format that a folder is in; ``name`` chooses where there are several. Raises
    DataError that says which there are."""
    found = recognise(root)
    if not found:
        raise DataError(
            f"{root} is in no format that is known ({', '.join(FORMAT_NAMES)}): name the folder "
            "that holds both the images and the labels"
        )
    chosen = [one for one in found if name in (None, one.format.name)]
    if len(chosen) == 1:
        return chosen[0]
    looks = "; ".join(f"--from {one.format.name} ({one.reason})" for one in found)
    if not chosen:
        raise DataError(f"{root} is not in the format {name}: it looks like {looks}")
    raise DataError(f"{root} may be in {len(found)} formats: choose {looks}")


def advice(root: Path) -> str:
    """What a command that cannot use ``root`` as it is ends its error with: the command that
    converts it."""
    name = f"{root.absolute().name.removesuffix('.zip')}-knet"
    words = ["knet-deploy", "data", "convert", str(root), str(root.absolute().with_name(name))]
    if not root.is_absolute():
        words[-1] = str(root.parent / name) if root.name else name
    found = recognise(root) if root.is_dir() else []
    what = f"; it looks like {found[0].format.title} ({found[0].reason}):" if found else ";"
    if len(found) > 1:
        words += ["--from", found[0].format.name]
    return f"{what} convert it with `{shlex.join(words)}`"
