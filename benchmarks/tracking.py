"""How well --track keeps ids on drawn drives with exact tracks: IDF1, id switches and time.

    python benchmarks/tracking.py --output benchmarks/results/tracking.json
    python benchmarks/tracking.py --bundle street.knet

Segments are the exact masks; the same made harder (each object missed in one frame of ten, moved by
a pixel either way, and now and then merged with a neighbour of its class: both are the larger one
then); or what a bundle finds, each segment being the object that it overlaps with most (IoU of at
least 0.5). IDF1 pairs tracks with objects, one to one, so that most frames are right (Ristani et
al. 2016); a switch is a frame in which an object has another track than when it was seen last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from time import thread_time

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray
from result import parser_of, write_result
from scipy.optimize import linear_sum_assignment

from knet_runtime.segmentation import Segmentation
from knet_runtime.segmenter import Segmenter
from knet_runtime.tracking import Tracker
from knet_runtime.types import Frame, Rgb
from knet_synthetic import CAMVID11, Street
from knet_synthetic.canvas import BICYCLIST, CAR, PEDESTRIAN
from knet_synthetic.street import Objects

LABELS = msgspec.structs.replace(CAMVID11, things=(CAR, PEDESTRIAN, BICYCLIST))
LEAST = 30  # pixels of an object below which it counts as out of sight
MISSED, MERGED = 0.1, 0.03
Ids = NDArray[np.uint16]
Truth = dict[int, tuple[int, ...]]


class Score:
    """Counts of one or more drives; an object or a track of another drive is another one."""

    def __init__(self) -> None:
        self.objects = self.found = self.right = self.switches = self.frames = 0
        self.seconds = 0.0

    def drive(self, frames: Iterator[tuple[Segmentation, Truth, int]]) -> None:
        """Add a drive: each frame's result, its segments' objects, and how many objects it has."""
        track, last = Tracker(), {}
        together: Counter[tuple[tuple[int, ...], int]] = Counter()
        for index, (result, truth, objects) in enumerate(frames):
            frame = Frame(np.zeros((1, 1, 3), np.uint8), index, None, f"{index:06d}")
            began = thread_time()
            tracked = track(frame, result)
            self.seconds += thread_time() - began
            self.frames += 1
            self.objects += objects
            for segment in tracked.segments:
                if segment.track is None:
                    continue
                self.found += 1
                if (key := truth.get(segment.id)) is not None:
                    together[key, segment.track] += 1
                    self.switches += last.get(key, segment.track) != segment.track
                    last[key] = segment.track
        keys = {key: place for place, key in enumerate(dict.fromkeys(key for key, _ in together))}
        ids = {id_: place for place, id_ in enumerate(dict.fromkeys(id_ for _, id_ in together))}
        table = np.zeros((len(keys), len(ids)), np.int64)
        for (key, id_), count in together.items():
            table[keys[key], ids[id_]] = count
        self.right += int(table[linear_sum_assignment(-table)].sum())

    def row(self, what: str) -> dict[str, object]:
        return {
            "segments": what,
            "frames": self.frames,
            "objects_per_frame": round(self.objects / self.frames, 2),
            "idf1": round(2 * self.right / (self.objects + self.found), 4),
            "switches": self.switches,
            "core_ms": round(1000 * self.seconds / self.frames, 2),
        }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=4, help="drives: streets 0, 1, …")
    parser.add_argument("--frames", type=int, default=150, help="of each, 30 a second")
    parser.add_argument("--bundle", help="a panoptic or instance bundle of CamVid's classes")
    parser.add_argument("--engine", default="auto")
    arguments = parser.parse_args()
    drives = [list(drawn(seed, arguments.frames)) for seed in range(arguments.seeds)]
    rows = []
    for what, harder in (("exact", False), ("harder", True)):
        score = Score()
        for seed, drive in enumerate(drives):
            score.drive(exact(drive, np.random.default_rng(seed) if harder else None))
        rows.append(score.row(what))
    if arguments.bundle:
        with Segmenter(arguments.bundle, arguments.engine) as segment:
            score = Score()
            for drive in drives:
                score.drive(found(drive, segment))
            rows.append({**score.row(segment.model_id), "engine": segment.engine})
    report = {
        "what": "tracks of --track on drawn streets with exact tracks",
        "seeds": arguments.seeds,
        "size": [360, 480],
        "least_pixels": LEAST,
        "rows": rows,
    }
    write_result(report, arguments.output)


def drawn(seed: int, frames: int) -> Iterator[tuple[Rgb, Objects]]:
    """Image and objects of each frame, those of fewer than ``LEAST`` pixels left out."""
    street = Street(seed)
    for index in range(frames):
        image, _, objects = street.scene(index)
        counts = np.bincount(objects.ids.ravel(), minlength=len(objects.keys) + 1)[1:]
        kept = np.flatnonzero(counts >= LEAST)
        table = np.zeros(len(counts) + 1, np.uint16)
        table[kept + 1] = np.arange(1, len(kept) + 1)
        classes = tuple(objects.classes[place] for place in kept)
        yield image, Objects(table[objects.ids], classes, tuple(objects.keys[i] for i in kept))


def exact(
    drive: list[tuple[Rgb, Objects]], random: np.random.Generator | None
) -> Iterator[tuple[Segmentation, Truth, int]]:
    for _, objects in drive:
        ids = objects.ids if random is None else _harder(objects, random)
        scores = [0.9] * len(objects.keys)
        result = Segmentation.from_panoptic(ids, objects.classes, scores, LABELS)
        yield result, dict(enumerate(objects.keys, 1)), len(objects.keys)


def _harder(objects: Objects, random: np.random.Generator) -> Ids:
    ids = np.zeros_like(objects.ids)
    for number in random.permutation(len(objects.keys)) + 1:
        y, x = 1 + random.integers(-1, 2, 2)
        if random.random() >= MISSED:
            mask = np.pad(objects.ids == number, 1)
            ids[mask[y : y + ids.shape[0], x : x + ids.shape[1]]] = number
    for number, class_id in enumerate(objects.classes, 1):
        if random.random() < MERGED:
            around = cv2.dilate((ids == number).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
            for other in np.unique(ids[around]):
                if other not in (0, number) and objects.classes[other - 1] == class_id:
                    pair = sorted((number, other), key=lambda one: np.count_nonzero(ids == one))
                    ids[ids == pair[0]] = pair[1]
                    break
    return ids


def found(
    drive: list[tuple[Rgb, Objects]], segment: Segmenter
) -> Iterator[tuple[Segmentation, Truth, int]]:
    for image, objects in drive:
        result = segment(image)
        areas = np.bincount(objects.ids.ravel(), minlength=len(objects.keys) + 1)
        overlaps = []
        for one, mask in result.masks():
            if one.is_thing:
                left, top, right, bottom = one.box
                within = objects.ids[top:bottom, left:right][mask]
                for number, both in enumerate(np.bincount(within, minlength=1)):
                    if number and 2 * both >= (one.area + areas[number] - both):
                        overlaps.append((both / (one.area + areas[number] - both), one.id, number))
        truth: Truth = {}
        for _, id_, number in sorted(overlaps, reverse=True):
            if id_ not in truth and objects.keys[number - 1] not in truth.values():
                truth[id_] = objects.keys[number - 1]
        yield result, truth, len(objects.keys)


if __name__ == "__main__":
    main()
