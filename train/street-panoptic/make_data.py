"""Builds the data folder that the packaged panoptic model learns from, in COCO's panoptic format:

    python train/street-panoptic/make_data.py SOURCES OUT

SOURCES holds camvid, coco_panoptic_mini, coco_street_mini and camvid_teacher, each as its own
SOURCE.md describes it. The eleven classes are CamVid's; Car, Pedestrian and Bicyclist are things.

- CamVid's class maps name no objects. A connected region of a thing's class is taken for one object
  where its shape says so, and for a crowd, which is neither learnt nor counted, where it does not.
  Rows of parked cars can have the shape of one: ``cars.json`` names each such region by a point in
  it, found by looking at all 558 regions of the training images of 100 pixels and more. Where the
  cars of a region can be told apart, it has the lines between them, drawn by hand.
- COCO's categories are mapped to the classes (``CATEGORIES``); a rider and what he rides are one
  Bicyclist. What has no class is void.
- coco_street_mini's labels are objects alone: stuff is there where a teacher is sure of it.
- The motorway's cars are outlines in ``cars.json`` (far ones first), drawn by hand; all else there
  is what the teacher is sure of.

Split ``val`` is CamVid's, ``streets`` are synthetic; both are for scores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_synthetic import CAMVID11, Street
from knet_train.data.segments import open_segments
from knet_train.data.truth import Truth

Array = NDArray[Any]

NAMES = CAMVID11.names
CAR, PEDESTRIAN, BICYCLIST = (NAMES.index(n) for n in ("Car", "Pedestrian", "Bicyclist"))
THINGS = (CAR, PEDESTRIAN, BICYCLIST)
VOID = len(NAMES)
CATEGORIES = {
    "Sky": ["sky-other-merged"],
    "Building": ["building-other-merged", "house"],
    "Road": ["road"],
    "Pavement": ["pavement-merged"],
    "Tree": ["tree-merged"],
    "SignSymbol": ["traffic light", "stop sign"],
    "Fence": ["fence-merged"],
    "Car": ["car", "truck", "bus"],
    "Pedestrian": ["person"],
}
RIDDEN = ("bicycle", "motorcycle")
SURE = 0.8  # of the teacher, to be believed
UNSEEN = 2**31  # the first seed of the streets that score
SMALLEST = 40  # pixels at 360 × 480 of an object that a shape can be seen of
TIMES = 4  # that each picture of a motorway is among the training images: there are few
CARS = Path(__file__).with_name("cars.json")
# Of one object: the least share of its convex hull that it fills, and widths by heights.
SHAPES = {CAR: (0.85, 0.5, 3.5), PEDESTRIAN: (0.65, 0.15, 0.9), BICYCLIST: (0.65, 0.25, 1.9)}


@dataclass
class Picture:
    """One picture and its segments: (class, crowd, mask [H, W]); later ones lie on top."""

    name: str
    file: Path
    size: tuple[int, int]
    segments: list[tuple[int, bool, Array]] = field(default_factory=list)


@dataclass
class Row:
    """A region of several cars: a point (x, y) of it, the lines between its cars, each from outside
    to outside, and a point of each part that is still several cars. Without lines it is a crowd."""

    at: tuple[int, int]
    cuts: list[list[tuple[int, int]]] = field(default_factory=list)
    crowds: list[tuple[int, int]] = field(default_factory=list)


def _read(path: Path, flags: int = cv2.IMREAD_COLOR) -> Array:
    pixels = cv2.imread(str(path), flags)
    if pixels is None:
        raise SystemExit(f"{path} cannot be read: fetch it again")
    return pixels


def regions(labels: Array, rows: Sequence[Row] = ()) -> Iterator[tuple[int, bool, Array]]:
    """The segments of a class map [H, W]: stuff, and the regions of things, of which ``rows`` are
    the parts that their lines cut."""
    for value in range(len(NAMES)):
        if value not in THINGS:
            if (labels == value).any():
                yield value, False, labels == value
            continue
        mask = (labels == value).astype(np.uint8)
        scale = labels.shape[0] / 360
        smallest = SMALLEST * scale**2
        reach = 2 * round(2 * scale) + 1
        # What a pole or a sign cuts in two is close to its other half.
        near = cv2.dilate(mask, np.ones((reach, reach), np.uint8))
        count, groups = cv2.connectedComponents(near, connectivity=8)
        for group in range(1, count):
            own = mask * (groups == group)
            row = next((row for row in rows if own[row.at[1], row.at[0]]), None)
            if row is not None:
                for part in _cut(groups == group, row):
                    one = own * part
                    named = any(part[y, x] for x, y in row.crowds) or not row.cuts
                    if one.any():
                        yield value, bool(named or one.sum() < smallest), one.astype(bool)
                continue
            parts, _, stats, _ = cv2.connectedComponentsWithStats(own, connectivity=8)
            areas = stats[1:, cv2.CC_STAT_AREA]
            if parts < 2:
                continue
            whole = areas.max() >= 0.95 * areas.sum()
            yield value, not (whole and _one_object(own, value, smallest)), own.astype(bool)


def _cut(region: Array, row: Row) -> Iterator[Array]:
    """The parts [H, W] of a region between the row's lines, whose pixels are the nearest part's."""
    lines = np.zeros(region.shape, np.uint8)
    cv2.polylines(lines, [np.array(line, np.int32) for line in row.cuts], False, 1)
    count, parts = cv2.connectedComponents((region & (lines == 0)).astype(np.uint8), connectivity=4)
    _, nearest = cv2.distanceTransformWithLabels(
        (parts == 0).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    part_of = np.zeros(nearest.max() + 1, parts.dtype)
    part_of[nearest[parts > 0]] = parts[parts > 0]
    parts = part_of[nearest] * region
    yield from (parts == part for part in range(1, count))


def _one_object(mask: Array, value: int, smallest: float) -> bool:
    area = int(mask.sum())
    if area < smallest:
        return False
    points = np.argwhere(mask)[:, ::-1].astype(np.int32)
    hull = cv2.contourArea(cv2.convexHull(points)) or 1.0
    _, _, width, height = cv2.boundingRect(points)
    solid, narrowest, widest = SHAPES[value]
    cut = points[:, 0].min() == 0 or points[:, 0].max() == mask.shape[1] - 1
    return area / hull >= solid and (cut or narrowest <= width / height <= widest)


def camvid(root: Path, split: str) -> Iterator[Picture]:
    cars = json.loads(CARS.read_text())["camvid"]
    for name in (root / "split" / f"{split}.txt").read_text().split():
        name = Path(name).stem
        file = next((root / "images" / split).glob(f"{name}.*"))
        labels = _read(root / "labels" / split / f"{name}.png", cv2.IMREAD_UNCHANGED)
        size = labels.shape[:2]
        segments = list(regions(labels, [Row(**row) for row in cars.get(name, ())]))
        yield Picture(f"camvid_{name}", file, size, segments)


def extra(root: Path) -> Iterator[Picture]:
    """Motorway pictures: stuff that the teacher is sure of, and cars drawn by hand."""
    all_drawn = json.loads(CARS.read_text())["motorway"]
    for file in sorted((root / "extra").glob("*.jpg")):
        size = _read(file).shape[:2]
        labels, sure = _teacher(file.with_suffix(".png"), (180, 240), size)
        stuff = np.where(sure & ~np.isin(labels, THINGS), labels, VOID)
        drawn = all_drawn[file.stem]
        crowds = [(CAR, True, _filled(outline, size)) for outline in drawn["crowds"]]
        cars = [_filled(outline, size) for outline in drawn["cars"]]
        objects = [(CAR, bool(mask.sum() < SMALLEST), mask) for mask in cars]
        segments = [*regions(stuff), *crowds, *objects]
        for copy in range(TIMES):
            yield Picture(f"extra_{file.stem}_{copy}", file, size, segments)


def _filled(outline: list[tuple[int, int]], size: tuple[int, int]) -> Array:
    """The mask [H, W] of an outline, whose pixels are in it."""
    mask = np.zeros(size, np.uint8)
    cv2.fillPoly(mask, [np.array(outline, np.int32)], 1)
    return mask.astype(bool)


def _teacher(png: Path, shape: tuple[int, int], size: tuple[int, int]) -> tuple[Array, Array]:
    """The teacher's class map at ``size``, and where it is sure."""
    maps = _read(png, cv2.IMREAD_GRAYSCALE).reshape(-1, *shape).astype(np.float32)
    maps = np.stack([cv2.resize(one, size[::-1], interpolation=cv2.INTER_LINEAR) for one in maps])
    return maps.argmax(0), maps.max(0) >= SURE * maps.sum(0)


def _riders(objects: list[tuple[str, bool, Array]]) -> list[tuple[str, bool, Array]]:
    """The objects with every rider and what he rides made one; the latter alone is void."""
    people = [i for i, (name, crowd, _) in enumerate(objects) if name == "person" and not crowd]
    taken: set[int] = set()
    merged = []
    for i, (name, crowd, mask) in enumerate(objects):
        if name not in RIDDEN:
            continue
        taken.add(i)
        near = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
        bottom = np.flatnonzero(mask.any(1)).max()
        shared = {
            p: (near & objects[p][2]).sum() / min(mask.sum(), objects[p][2].sum())
            for p in people
            if p not in taken and np.flatnonzero(objects[p][2].any(1)).max() <= bottom + 5
        }
        rider = max(shared, key=lambda p: shared[p], default=None)
        if crowd or rider is None or shared[rider] < 0.15:
            merged.append((name, crowd, mask))
        else:
            taken.add(rider)
            merged.append(("rider", False, mask | objects[rider][2]))
    return merged + [one for i, one in enumerate(objects) if i not in taken]


def _classes(objects: list[tuple[str, bool, Array]]) -> Iterator[tuple[int, bool, Array]]:
    known = {name: NAMES.index(own) for own, all_ in CATEGORIES.items() for name in all_}
    known["rider"] = BICYCLIST
    stuff: dict[int, Array] = {}
    things = []
    for name, crowd, mask in _riders(objects):
        value = known.get(name, VOID)
        if value in THINGS or value == VOID:
            things.append((value, crowd, mask))
        else:
            stuff[value] = stuff[value] | mask if value in stuff else mask
    yield from ((value, False, mask) for value, mask in stuff.items())
    yield from sorted(things, key=lambda one: -int(one[2].sum()))


def _objects(truth: Truth, names: Sequence[str]) -> list[tuple[str, bool, Array]]:
    """Name, crowd and mask [H, W] of each segment."""
    return [
        (names[value], number in truth.crowds, (truth.ids == number).any(0))
        for number, value in enumerate(truth.classes, 1)
    ]


def coco_panoptic(root: Path) -> Iterator[Picture]:
    for split in ("train2017", "val2017"):
        folder = open_segments(root, split, "panoptic")
        for index, sample in enumerate(folder.samples):
            truth = folder.read_truth(index)
            segments = list(_classes(_objects(truth, folder.labels.names)))
            if any(value in THINGS or value == NAMES.index("Road") for value, _, _ in segments):
                file = sample.image
                yield Picture(f"panoptic_{file.stem}", file, truth.void.shape, segments)


def coco_street(root: Path, teacher: Path) -> Iterator[Picture]:
    seen = set()
    for split in ("train2017", "val2017"):
        folder = open_segments(root, split, "instance")
        for index, sample in enumerate(folder.samples):
            if (file := sample.image) in seen:  # some are in both splits
                continue
            seen.add(file)
            truth = folder.read_truth(index)
            size = truth.void.shape
            segments = list(_classes(_objects(truth, folder.labels.names)))
            png = teacher / "street" / "coco_street_mini" / f"{file.stem}.png"
            if png.exists():
                covered: Array = np.uint8(truth.ids > 0).max(0)
                covered = cv2.dilate(covered, np.ones((9, 9), np.uint8))
                labels, sure = _teacher(png, (90, 120), size)
                stuff = sure & (covered == 0) & ~np.isin(labels, THINGS)
                segments = [*regions(np.where(stuff, labels, VOID)), *segments]
            yield Picture(f"street_{file.stem}", file, size, segments)


def streets(out: Path) -> Iterator[Picture]:
    """Synthetic frames of streets that training does not see: its seeds are far below."""
    for number in range(100):
        image, labels, objects = Street(UNSEEN + number).scene(37 * number)
        file = out / "frames" / f"{number:03}.png"
        cv2.imwrite(str(file), image[..., ::-1])
        stuff = [(v, False, labels == v) for v in np.unique(labels).tolist() if v not in THINGS]
        things = [(v, False, objects.ids == i) for i, v in enumerate(objects.classes, 1)]
        yield Picture(f"street_{number:03}", file, labels.shape, [*stuff, *things])


def write(pictures: Iterator[Picture], split: str, out: Path) -> None:
    """One split: pictures as links, PNGs of ids, and the JSON."""
    folder, pngs = out / split, out / f"panoptic_{split}"
    folder.mkdir(parents=True)
    pngs.mkdir()
    images, annotations = [], []
    for number, picture in enumerate(pictures, 1):
        ids = np.zeros(picture.size, np.uint32)
        for rank, (value, _, mask) in enumerate(picture.segments, 1):
            ids[mask] = 0 if value == VOID else rank
        left = np.unique(ids)
        segments = [
            {"id": rank, "category_id": value + 1, "iscrowd": int(crowd)}
            for rank, (value, crowd, _) in enumerate(picture.segments, 1)
            if rank in left
        ]
        name = picture.name + picture.file.suffix
        (folder / name).symlink_to(picture.file.resolve())
        code = np.stack([ids >> 16, ids >> 8 & 255, ids & 255], -1).astype(np.uint8)
        cv2.imwrite(str(pngs / f"{picture.name}.png"), code)
        height, width = picture.size
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        annotations.append(
            {"image_id": number, "file_name": f"{picture.name}.png", "segments_info": segments}
        )
    categories = [
        {"id": value + 1, "name": name, "isthing": int(value in THINGS), "color": colour}
        for value, (name, colour) in enumerate(zip(NAMES, CAMVID11.palette, strict=True))
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (out / f"panoptic_{split}.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sources", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    root: Path = options.sources
    (options.out / "frames").mkdir(parents=True)

    def train() -> Iterator[Picture]:
        yield from camvid(root / "camvid", "train")
        yield from extra(root / "camvid_teacher")
        yield from coco_panoptic(root / "coco_panoptic_mini")
        yield from coco_street(root / "coco_street_mini", root / "camvid_teacher")

    write(train(), "train", options.out)
    write(camvid(root / "camvid", "val"), "val", options.out)
    write(streets(options.out), "streets", options.out)


if __name__ == "__main__":
    main()
