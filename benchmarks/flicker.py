"""What --smooth does on a labelled drive: flicker, accuracy, and milliseconds per frame.

    python benchmarks/flicker.py --data CAMVID --output benchmarks/results/flicker.json

The clip's class maps come from the packaged bundle once, on one engine; each strength then smooths
the very same maps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import thread_time

import cv2
import numpy as np
from numpy.typing import NDArray
from result import parser_of, write_result

from knet_runtime.metrics import ConfusionMatrix
from knet_runtime.segmentation import Segmentation
from knet_runtime.segmenter import Segmenter
from knet_runtime.smoothing import Smoother
from knet_runtime.sources import open_source
from knet_runtime.types import Frame

CLIP = "val_0016E5_15fps"
Map = NDArray[np.uint8]


@dataclass(frozen=True)
class Drive:
    """Frames, what the model makes of them, and the truth."""

    frames: list[Frame]
    found: list[Segmentation]
    labels: list[Map]
    engine: str
    model: str


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the camvid folder")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--strengths", default="1,2,3,4,8")
    arguments = parser.parse_args()

    drive = read(arguments.data, arguments.engine)
    ignore = drive.found[0].labels.ignore_index
    truth = flicker(drive.labels, drive.labels, ignore)
    rows = [{"strength": 0, **scores(drive, drive.found, truth)}]
    for strength in (int(text) for text in arguments.strengths.split(",")):
        smoothed, milliseconds = smooth(drive, strength)
        measured = scores(drive, smoothed, truth)
        rows.append({"strength": strength, **measured, "core_ms": milliseconds})
    report = {
        "what": "temporal smoothing of the packaged model's class maps",
        "clip": CLIP,
        "frames": len(drive.frames),
        "size": list(drive.labels[0].shape),
        "engine": drive.engine,
        "model": drive.model,
        "labels_flicker": round(truth, 5),
        "rows": rows,
    }
    write_result(report, arguments.output)
    for row in rows:
        print(row)  # noqa: T201


def read(data: Path, engine: str) -> Drive:
    clip = json.loads((data / f"clips/{CLIP}.json").read_text())
    files = [str(data / entry["label"]) for entry in clip["frames"]]
    labels = [np.asarray(cv2.imread(file, cv2.IMREAD_UNCHANGED), np.uint8) for file in files]
    with Segmenter(engine=engine) as segment, open_source(data / f"clips/{CLIP}.mp4") as source:
        frames = list(source)
        found = [segment(frame.image) for frame in frames]
        return Drive(frames, found, labels, segment.engine, segment.model_id)


def smooth(drive: Drive, strength: int) -> tuple[list[Segmentation], float]:
    """The smoothed class maps, and the median milliseconds of one core that a frame took."""
    cv2.setNumThreads(1)
    smoother = Smoother(strength)
    smoothed, times = [], []
    for frame, found in zip(drive.frames, drive.found, strict=True):
        began = thread_time()
        smoothed.append(smoother(frame, found))
        times.append(1000 * (thread_time() - began))
    return smoothed, round(median(times[1:]), 2)


def scores(drive: Drive, found: list[Segmentation], truth: float) -> dict[str, float]:
    names = drive.found[0].labels
    matrix = ConfusionMatrix(names.num_classes, names.ignore_index)
    maps = [one.class_map for one in found]
    for class_map, label in zip(maps, drive.labels, strict=True):
        matrix.update(class_map, label)
    changed = flicker(maps, drive.labels, names.ignore_index)
    return {
        "flicker": round(changed, 5),
        "beyond_labels": round(changed - truth, 5),
        "unwarranted": round(unwarranted(maps, drive.labels, names.ignore_index), 5),
        "miou": round(matrix.miou, 5),
    }


def flicker(maps: list[Map], labels: list[Map], ignore: int) -> float:
    """The mean share of pixels that change from frame to frame, among those labelled in both."""
    shares = []
    for i in range(1, len(maps)):
        known = (labels[i] != ignore) & (labels[i - 1] != ignore)
        shares.append(float((maps[i] != maps[i - 1])[known].mean()))
    return float(np.mean(shares))


def unwarranted(maps: list[Map], labels: list[Map], ignore: int) -> float:
    """The share of pixels that change although their label stays."""
    changed = stayed = 0
    for i in range(1, len(maps)):
        same = (labels[i] == labels[i - 1]) & (labels[i] != ignore)
        stayed += int(same.sum())
        changed += int((maps[i] != maps[i - 1])[same].sum())
    return changed / stayed


if __name__ == "__main__":
    main()
