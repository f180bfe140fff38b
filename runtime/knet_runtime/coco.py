"""What COCO's panoptic format says of a result; category ids are class indices."""

from __future__ import annotations

from typing import Any

import numpy as np

from knet_runtime.drawing import encode_png
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Segmentation


def categories(labels: LabelMap) -> list[dict[str, Any]]:
    """The classes, in the order of their ids."""
    return [
        {"id": index, "name": name, "color": colour, "isthing": int(index in labels.things)}
        for index, (name, colour) in enumerate(zip(labels.names, labels.palette, strict=True))
    ]


def segments_info(found: Segmentation) -> list[dict[str, Any]]:
    """The segments of one image, by the ids that ``panoptic_png`` has for them."""
    return [
        {
            "id": one.id,
            "category_id": one.class_id,
            "area": one.area,
            "bbox": [one.box[0], one.box[1], one.box[2] - one.box[0], one.box[3] - one.box[1]],
            "iscrowd": 0,
        }
        for one in found.segments
    ]


def panoptic_png(found: Segmentation) -> bytes:
    """The segment map as a PNG: red + 256 · green is the id of a pixel's segment, 0 of none."""
    ids = found.segment_map
    planes = np.zeros((*ids.shape, 3), np.uint8)
    planes[..., 0], planes[..., 1] = ids & 255, ids >> 8
    return encode_png(planes)
