"""Trees of labelled images in the shape in which data sets and tools publish and export them.

Every writer takes the same labelled images and gives the root, and what ``data convert`` needs to
be told to make of them the eleven classes in their order.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

NAMES = (
    *("sky", "building", "pole", "road", "sidewalk", "vegetation", "traffic sign", "fence", "car"),
    *("person", "bicycle"),
)
COLOURS = tuple((20 * n, 255 - 11 * n, 7 + n) for n in range(11))
VOID_COLOUR = (0, 0, 0)
ALL = ("--classes", ",".join(NAMES))


class Labelled(NamedTuple):
    """An image uint8 [H, W, 3] and its classes uint8 [H, W], 255 void."""

    name: str
    split: str
    image: np.ndarray
    label: np.ndarray


Tree = tuple[Path, tuple[str, ...]]


def save(path: Path, pixels: Any, palette: Sequence[int] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels))
    if palette is not None:
        image.putpalette(palette)
    image.save(path)
    return path


def save_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def save_json(path: Path, content: Any) -> Path:
    return save_text(path, json.dumps(content))


def painted(label: np.ndarray, void: tuple[int, int, int] = VOID_COLOUR) -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    table[: len(COLOURS)], table[255] = COLOURS, void
    return table[label]


def table(values: dict[int, int], dtype: Any = np.uint8) -> np.ndarray:
    found = np.zeros(256, dtype)
    found[list(values)] = list(values.values())
    return found


def masks(label: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The pixels bool [H, W] of each class that is there."""
    return [(n, label == n) for n in np.unique(label).tolist() if n != 255]


def box(mask: np.ndarray) -> tuple[int, int, np.ndarray]:
    """The left, the top and the pixels of a mask's own rectangle."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    return left, top, mask[top : rows[-1] + 1, left : columns[-1] + 1]


def run_lengths(flat: np.ndarray) -> list[int]:
    """Of a flat mask, the first outside of it."""
    edges = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    lengths = np.diff([0, *edges, flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


def png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def voc(root: Path, samples: Sequence[Labelled]) -> Tree:
    """As CVAT's "Segmentation mask 1.1" writes it."""
    lines = [f"background:0,0,0::\n# label:color_rgb:parts:actions\nvoid:{_rgb((9, 9, 9))}::"]
    lines += [f"{n}:{_rgb(c)}::" for n, c in zip(NAMES, COLOURS, strict=True)]
    save_text(root / "labelmap.txt", "\n".join(lines))
    for one in samples:
        save(root / "JPEGImages" / f"{one.name}.png", one.image)
        colours = painted(one.label, (9, 9, 9))
        save(root / "SegmentationClass" / f"{one.name}.png", colours)
        save(root / "SegmentationObject" / f"{one.name}.png", colours)
    for split in {one.split for one in samples}:
        names = "\n".join(one.name for one in samples if one.split == split)
        save_text(root / "ImageSets" / "Segmentation" / f"{split}.txt", names)
    return root, ALL


def _rgb(colour: Sequence[int]) -> str:
    return ",".join(map(str, colour))


def voc_palette(root: Path, samples: Sequence[Labelled]) -> Tree:
    """As the challenge publishes it: palette PNGs of 21 classes, of which 11 are used."""
    colours = np.random.default_rng(0).integers(0, 255, 768).tolist()
    for one in samples:
        save(root / "VOC2012" / "JPEGImages" / f"{one.name}.jpg", one.image)
        label = np.where(one.label == 255, 255, one.label + 1).astype(np.uint8)
        save(root / "VOC2012" / "SegmentationClass" / f"{one.name}.png", label, colours)
    for split in ("train", "val", "trainval"):
        names = "\n".join(one.name for one in samples if split in (one.split, "trainval"))
        save_text(root / "VOC2012" / "ImageSets" / "Segmentation" / f"{split}.txt", names)
    wanted = "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable"
    return root, ("--classes", wanted)


def cityscapes(root: Path, samples: Sequence[Labelled]) -> Tree:
    """With labelIds and instanceIds, without the ids of training."""
    ids = table(dict(enumerate((23, 11, 17, 7, 8, 21, 20, 13, 26, 24, 33))), np.uint16)
    for one in samples:
        stem = f"city_{one.name}"
        save(root / "leftImg8bit" / one.split / "city" / f"{stem}_leftImg8bit.png", one.image)
        label = ids[one.label]
        numbers = np.where(label >= 24, label * 1000 + 3, label).astype(np.uint16)
        base = root / "gtFine" / one.split / "city"
        save(base / f"{stem}_gtFine_labelIds.png", label.astype(np.uint8))
        save(base / f"{stem}_gtFine_instanceIds.png", numbers)
    return root, ALL


def mapillary(root: Path, samples: Sequence[Labelled]) -> Tree:
    labels = [
        {"readable": name, "color": colour, "instances": name in ("car", "person")}
        for name, colour in zip(("Unlabeled", *NAMES), (VOID_COLOUR, *COLOURS), strict=True)
    ]
    save_json(root / "config_v2.0.json", {"labels": labels, "version": "1.1"})
    values = table({n: n + 1 for n in range(11)}, np.uint16)
    for one in samples:
        base = root / {"train": "training", "val": "validation"}[one.split]
        save(base / "images" / f"{one.name}.jpg", one.image)
        label = values[one.label]
        save(base / "v2.0" / "labels" / f"{one.name}.png", label.astype(np.uint8), [0] * 768)
        save(base / "v2.0" / "instances" / f"{one.name}.png", (label * 256).astype(np.uint16))
    return root, ALL


def bdd100k(root: Path, samples: Sequence[Labelled]) -> Tree:
    values = table({**dict(enumerate((10, 2, 5, 0, 1, 8, 7, 4, 13, 11, 18))), 255: 255})
    for one in samples:
        save(root / "images" / "10k" / one.split / f"{one.name}.jpg", one.image)
        path = root / "labels" / "sem_seg" / "masks" / one.split / f"{one.name}.png"
        save(path, values[one.label])
    return root, ALL


def ade20k(root: Path, samples: Sequence[Labelled]) -> Tree:
    """The first eleven of its 150 classes."""
    values = table({n: n + 1 for n in range(11)})
    for one in samples:
        split = {"train": "training", "val": "validation"}[one.split]
        save(root / "images" / split / f"{one.name}.jpg", one.image)
        save(root / "annotations" / split / f"{one.name}.png", values[one.label])
    first = "wall,building,sky,floor,tree,ceiling,road,bed,windowpane,grass,cabinet"
    return root, ("--classes", first)


def camvid(root: Path, samples: Sequence[Labelled]) -> Tree:
    """As it is published: flat, with ``_L`` and a list of colours."""
    rows = zip((*NAMES, "Void"), (*COLOURS, VOID_COLOUR), strict=True)
    text = "".join(f"{r} {g} {b}\t{name}\n" for name, (r, g, b) in rows)
    save_text(root / "label_colors.txt", text)
    for one in samples:
        save(root / "701_StillsRaw_full" / f"{one.name}.png", one.image)
        save(root / "LabeledApproved_full" / f"{one.name}_L.png", painted(one.label))
    return root, ALL


def kaggle(root: Path, samples: Sequence[Labelled]) -> Tree:
    """CamVid as Kaggle has it, in one folder more."""
    base = root / "CamVid"
    base.mkdir(parents=True)
    with (base / "class_dict.csv").open("w", newline="") as file:
        rows = zip((*NAMES, "Void"), (*COLOURS, VOID_COLOUR), strict=True)
        csv.writer(file).writerows([["name", "r", "g", "b"], *([n, *c] for n, c in rows)])
    for one in samples:
        save(base / one.split / f"{one.name}.png", one.image)
        save(base / f"{one.split}_labels" / f"{one.name}_L.png", painted(one.label))
    return root, ALL


def roboflow(root: Path, samples: Sequence[Labelled]) -> Tree:
    for one in samples:
        folder = root / {"train": "train", "val": "valid"}[one.split]
        rows = "".join(f"{n}, {name}\n" for n, name in enumerate(("background", *NAMES)))
        save_text(folder / "_classes.csv", f"Pixel Value, Class\n{rows}")
        name = f"{one.name}_png.rf.{'ab' * 16}"
        save(folder / f"{name}.jpg", one.image)
        label = np.where(one.label == 255, 0, one.label + 1).astype(np.uint8)
        save(folder / f"{name}_mask.png", label)
    return root, ALL


def index_masks(root: Path, samples: Sequence[Labelled]) -> Tree:
    """``images/`` and ``masks/`` of numbers, with a list of names."""
    save_text(root / "classes.txt", "\n".join(NAMES))
    for one in samples:
        save(root / "images" / one.split / f"{one.name}.jpg", one.image)
        save(root / "masks" / one.split / f"{one.name}.png", one.label)
    return root, ALL


def coco(root: Path, samples: Sequence[Labelled]) -> Tree:
    """Instances with run lengths."""
    categories = [{"id": n + 1, "name": name} for n, name in enumerate(NAMES)]
    for split in {one.split for one in samples}:
        images, annotations = [], []
        for number, one in enumerate(one for one in samples if one.split == split):
            height, width = one.label.shape
            file = f"{one.name}.jpg"
            images.append({"id": number, "file_name": file, "height": height, "width": width})
            save(root / f"{split}2017" / file, one.image)
            for n, mask in masks(one.label):
                counts = run_lengths(mask.ravel("F"))
                rle = {"size": [height, width], "counts": counts}
                here = {"image_id": number, "category_id": n + 1, "iscrowd": 0}
                annotations.append({"id": len(annotations), "segmentation": rle, **here})
        content = {"images": images, "categories": categories, "annotations": annotations}
        save_json(root / "annotations" / f"instances_{split}2017.json", content)
    return root, ALL


def cvat(root: Path, samples: Sequence[Labelled]) -> Tree:
    top = ElementTree.Element("annotations")
    ElementTree.SubElement(top, "version").text = "1.1"
    labels = ElementTree.SubElement(
        ElementTree.SubElement(ElementTree.SubElement(top, "meta"), "job"), "labels"
    )
    for name, colour in zip(NAMES, COLOURS, strict=True):
        label = ElementTree.SubElement(labels, "label")
        ElementTree.SubElement(label, "name").text = name
        ElementTree.SubElement(label, "color").text = "#{:02x}{:02x}{:02x}".format(*colour)
    for number, one in enumerate(samples):
        height, width = one.label.shape
        file = f"{one.name}.png"
        save(root / "images" / file, one.image)
        entry = ElementTree.SubElement(
            top, "image", id=str(number), name=file, width=str(width), height=str(height)
        )
        for n, mask in masks(one.label):
            left, top_, own = box(mask)
            place = {"left": left, "top": top_, "width": own.shape[1], "height": own.shape[0]}
            rle = ", ".join(map(str, run_lengths(own.ravel())))
            texts = {key: str(value) for key, value in place.items()}
            ElementTree.SubElement(
                entry, "mask", label=NAMES[n], source="manual", occluded="0", rle=rle, z_order="0",
                **texts,
            )  # fmt: skip
    save_text(root / "annotations.xml", ElementTree.tostring(top, encoding="unicode"))
    return root, ALL


def labelme(root: Path, samples: Sequence[Labelled]) -> Tree:
    for one in samples:
        save(root / f"{one.name}.png", one.image)
        shapes = []
        for n, mask in masks(one.label):
            left, top, own = box(mask)
            corners = [[left, top], [left + own.shape[1] - 1, top + own.shape[0] - 1]]
            data = base64.b64encode(png(own.astype(np.uint8) * 255)).decode()
            shapes.append(
                {"label": NAMES[n], "points": corners, "shape_type": "mask", "mask": data}
            )
        height, width = one.label.shape
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": f"{one.name}.png",
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        save_json(root / f"{one.name}.json", content)
    return root, ALL


def pack(values: np.ndarray) -> list[int]:
    """Label Studio's run lengths: one run of each value, of lengths in 16 bits."""
    bits = f"{len(values):032b}{7:05b}{15:04b}{15:04b}{15:04b}{15:04b}"
    starts = [0, *(np.flatnonzero(np.diff(values.astype(int))) + 1).tolist(), len(values)]
    for start, end in pairwise(starts):
        for at in range(start, end, 65536):
            bits += f"100{min(end - at, 65536) - 1:016b}{values[start]:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]


def label_studio(root: Path, samples: Sequence[Labelled]) -> Tree:
    tasks = []
    for number, one in enumerate(samples):
        height, width = one.label.shape
        file = f"{one.name}.png"
        save(root / "images" / file, one.image)
        results = [
            {
                "type": "brushlabels",
                "original_width": width,
                "original_height": height,
                "value": {
                    "format": "rle",
                    "rle": pack(np.repeat(mask.ravel().astype(np.uint8) * 255, 4)),
                    "brushlabels": [NAMES[n]],
                },
            }
            for n, mask in masks(one.label)
        ]
        data = {"image": f"/data/upload/1/0a1b2c3d-{file}"}
        tasks.append({"id": number, "data": data, "annotations": [{"result": results}]})
    save_json(root / "project-1-at-2024.json", tasks)
    return root, ALL


def supervisely(root: Path, samples: Sequence[Labelled]) -> Tree:
    classes = [
        {"title": name, "shape": "any", "color": "#{:02X}{:02X}{:02X}".format(*colour)}
        for name, colour in zip(NAMES, COLOURS, strict=True)
    ]
    save_json(root / "meta.json", {"classes": classes, "tags": []})
    for one in samples:
        file = f"{one.name}.png"
        save(root / "ds0" / "img" / file, one.image)
        objects = []
        for n, mask in masks(one.label):
            left, top, own = box(mask)
            rgba = np.zeros((*own.shape, 4), np.uint8)
            rgba[own] = 255
            data = base64.b64encode(zlib.compress(png(rgba))).decode()
            bitmap = {"data": data, "origin": [left, top]}
            objects.append(
                {"classTitle": NAMES[n], "geometryType": "bitmap", "bitmap": bitmap, "tags": []}
            )
        size = {"height": one.label.shape[0], "width": one.label.shape[1]}
        content = {"description": "", "tags": [], "size": size, "objects": objects}
        save_json(root / "ds0" / "ann" / f"{file}.json", content)
    return root, ALL


def parquet(root: Path, samples: Sequence[Labelled]) -> Tree:
    import pyarrow
    from pyarrow import parquet as writer

    save_json(root / "id2label.json", {str(n): name for n, name in enumerate(NAMES)})
    (root / "data").mkdir()
    for split, name in (("train", "train"), ("val", "validation")):
        chosen = [one for one in samples if one.split == split]
        columns = {
            "image": [{"bytes": png(one.image), "path": None} for one in chosen],
            "label": [{"bytes": png(one.label), "path": None} for one in chosen],
        }
        path = root / "data" / f"{name}-00000-of-00001.parquet"
        writer.write_table(pyarrow.table(columns), path)
    return root, ALL


EXACT: dict[str, Callable[[Path, Sequence[Labelled]], Tree]] = {
    "voc": voc,
    "voc, of palette PNGs": voc_palette,
    "cityscapes": cityscapes,
    "mapillary": mapillary,
    "bdd100k": bdd100k,
    "ade20k": ade20k,
    "camvid": camvid,
    "camvid, of Kaggle": kaggle,
    "roboflow": roboflow,
    "masks": index_masks,
    "coco": coco,
    "cvat": cvat,
    "labelme": labelme,
    "label-studio": label_studio,
    "supervisely": supervisely,
    "parquet": parquet,
}
"""The writers by name of format, of formats that keep every pixel."""
