"""COCO's formats: ``panoptic_SPLIT.json`` beside a folder of PNGs, or ``instances_SPLIT.json``."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from knet_runtime.coco import categories, panoptic_png, segments_info
from knet_runtime.outlines import mask_outlines
from knet_runtime.rle import rles_of
from knet_train.data.export.labelled import LabelledImage, LabelledImages, Labels
from knet_train.data.export.shapes import TOLERANCE, Counts
from knet_train.data.truth import IGNORED

Entries = list[dict[str, Any]]


class CocoWriter:
    """Writes ``annotations/`` below ``root``: instances for task "instance", else panoptic."""

    def __init__(self, root: Path, listed: LabelledImages, *, polygons: bool) -> None:
        self.folder = root / "annotations"
        self.folder.mkdir()
        self.labels, self.polygons = listed.labels, polygons
        self.kind = "instances" if listed.task == "instance" else "panoptic"
        self._images: dict[str, Entries] = {}
        self._annotations: dict[str, Entries] = {}

    def draw(self, number: int, image: LabelledImage) -> tuple[Entries, Counts]:
        """The annotations of one image, and what they count; a PNG of it is written. Raises
        DataError."""
        labels = image.labels()
        if self.kind == "instances":
            return self._instances(number, labels)
        path = Path(image.name).with_suffix(".png")
        target = self.folder / f"panoptic_{image.split}" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(panoptic_png(labels.found))
        segments = segments_info(labels.found)
        for segment in segments:
            segment["iscrowd"] = int(segment["id"] in labels.crowds)
        entry = {"image_id": number, "file_name": path.as_posix(), "segments_info": segments}
        return [entry], Counts(masks=len(segments))

    def add(self, number: int, image: LabelledImage, entries: Entries) -> None:
        """Take what ``draw`` gave, one image after the other."""
        height, width = image.size
        stated = {"id": number, "file_name": image.name, "height": height, "width": width}
        self._images.setdefault(image.split, []).append(stated)
        own = self._annotations.setdefault(image.split, [])
        for entry in entries:
            own.append({"id": len(own) + 1, **entry} if self.kind == "instances" else entry)

    def close(self) -> None:
        """Write the JSON files."""
        classes = categories(self.labels)
        void = {"id": len(classes), "name": IGNORED, "isthing": 1}
        if any(one.get("category_id") == void["id"] for one in chain(*self._annotations.values())):
            classes.append(void)
        for split, images in self._images.items():
            annotations = self._annotations[split]
            content = {"images": images, "annotations": annotations, "categories": classes}
            path = self.folder / f"{self.kind}_{split}.json"
            path.write_bytes(msgspec.json.encode(content) + b"\n")

    def _instances(self, number: int, labels: Labels) -> tuple[Entries, Counts]:
        entries, polygons = [], 0
        found = zip(labels.found.masks(), labels.found.to_coco(number), strict=True)
        for (segment, mask), entry in found:
            del entry["score"]
            entry["iscrowd"] = int(segment.id in labels.crowds)
            if self.polygons and not entry["iscrowd"]:
                outlines = mask_outlines(mask, *segment.box[:2], TOLERANCE)
                if not any(outline.holes for outline in outlines):
                    entry["segmentation"] = [one.points.ravel().tolist() for one in outlines]
                    polygons += 1
            entries.append(entry)
        if labels.void.any():
            rle, area = rles_of(labels.void.view(np.uint8), (1,))[1]
            entry = {"image_id": number, "category_id": self.labels.num_classes, "iscrowd": 1}
            entries.append({**entry, "segmentation": msgspec.to_builtins(rle), "area": area})
        return entries, Counts(len(entries) - polygons, polygons)
