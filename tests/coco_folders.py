"""Small data folders in COCO's formats, with panoptic PNGs or instances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [
    {"id": 7, "name": "car", "isthing": 1},
    {"id": 3, "name": "person", "isthing": 1},
    {"id": 9, "name": "road", "isthing": 0},
    {"id": 4, "name": "sky", "isthing": 0},
]


def save_image(path: Path, size: tuple[int, int], seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def save_ids(path: Path, ids: Any) -> None:
    """COCO's panoptic PNG of a map of ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.asarray(ids, np.int64)
    planes = np.stack([values & 255, values >> 8 & 255, values >> 16], -1)
    Image.fromarray(planes.astype(np.uint8)).save(path)


def write_panoptic(
    root: Path, split: str = "train", images: int = 2, size: tuple[int, int] = (64, 96)
) -> Path:
    """Sky above road with two cars and a person each, an unlabelled row and a crowd of people; the
    annotations stand in the other order than the images. Gives the JSON's path."""
    entries, annotations = [], []
    height, width = size
    for number in range(images):
        ids = np.full(size, 70_000, np.int64)
        ids[height // 2 :] = 300
        shift = 3 * number
        ids[height // 2 - 6 : height // 2 + 10, 4 + shift : 24 + shift] = 11
        ids[height // 2 : height // 2 + 14, 30 + shift : 50 + shift] = 12
        ids[height // 2 - 10 : height // 2 + 12, 60:66] = 1_000_000
        ids[height // 2 - 8 : height // 2 + 4, 76:92] = 5
        ids[0] = 0
        save_image(root / split / f"p{number}.jpg", size, number)
        save_ids(root / "annotations" / f"panoptic_{split}" / f"p{number}.png", ids)
        entries.append(
            {"id": number + 40, "file_name": f"p{number}.jpg", "height": height, "width": width}
        )
        segments = [(70_000, 4, 0), (300, 9, 0), (11, 7, 0), (12, 7, 0), (1_000_000, 3, 0)]
        infos = [
            {"id": id_, "category_id": category, "iscrowd": crowd, "area": 1}
            for id_, category, crowd in [*segments, (5, 3, 1)]
        ]
        annotations.append(
            {"image_id": number + 40, "file_name": f"p{number}.png", "segments_info": infos}
        )
    path = root / "annotations" / f"panoptic_{split}.json"
    write(path, entries, annotations[::-1])
    return path


def write_instances(
    root: Path, annotations: list[dict[str, Any]], split: str = "train", images: int = 1
) -> Path:
    """Images 1, 2, … of 20×30 (height, width) with these annotations. Gives the JSON's path."""
    for number in range(1, images + 1):
        save_image(root / "images" / f"i{number}.jpg", (20, 30), number)
    entries = [
        {"id": number, "file_name": f"i{number}.jpg", "height": 20, "width": 30}
        for number in range(1, images + 1)
    ]
    path = root / f"instances_{split}.json"
    write(path, entries, annotations)
    return path


def write(path: Path, images: list[Any], annotations: list[Any]) -> None:
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def change(path: Path, **parts: Any) -> None:
    """Put other lists into a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
