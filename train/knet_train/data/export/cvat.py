"""CVAT's "for images 1.1": ``annotations.xml``, which CVAT uploads into a task of the same images,
and ``labels.json``, which its editor of raw labels takes."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.rle import run_lengths
from knet_train.data.convert.cvat import CROWD
from knet_train.data.convert.source import BACKGROUND
from knet_train.data.export.labelled import LabelledImage, LabelledImages
from knet_train.data.export.shapes import Counts, Part, parts
from knet_train.data.truth import IGNORED

_IGNORED_COLOUR = (128, 128, 128)
_CROWD = f"""<attributes>
<attribute><name>{CROWD}</name><mutable>False</mutable><input_type>checkbox</input_type>\
<default_value>false</default_value><values>false</values></attribute>
</attributes>"""


class CvatWriter:
    """Writes the two files below ``root``.

    What is ``background`` stays free of shapes, and what is not labelled gets the label
    ``__ignore__``. Labels of things, where objects are told apart, have the attribute ``is_crowd``.
    """

    def __init__(self, root: Path, listed: LabelledImages, *, polygons: bool) -> None:
        self.labels, self.polygons = listed.labels, polygons
        self._raw = root / "labels.json"
        self._things = listed.labels.things if listed.task != "semantic" else ()
        self._file = (root / "annotations.xml").open("wb")
        self._write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>')
        self._write("<version>1.1</version>\n<meta><task><labels>")
        for index, (name, colour) in enumerate(self._names()):
            own = f"<name>{escape(name)}</name><color>{_hex(colour)}</color>"
            attributes = _CROWD if index in self._things else "<attributes/>"
            self._write(f"<label>{own}{attributes}</label>")
        self._write("</labels></task></meta>")

    def draw(self, number: int, image: LabelledImage) -> tuple[str, Counts]:
        """The image's element, and what it counts. Raises DataError."""
        labels = image.labels()
        shapes, polygons = [], 0
        for segment, mask in labels.found.masks():
            is_thing = segment.class_id in self._things
            if segment.label == BACKGROUND and not is_thing:
                continue
            left, top, *_ = segment.box
            crowd = segment.id in labels.crowds
            own = [Part(left, top, mask)]
            if self.polygons and not crowd:
                own = parts(mask, left, top, whole=is_thing)
            polygons += sum(part.points is not None for part in own)
            shapes += [_shape(part, segment.label, crowd=crowd) for part in own]
        if labels.void.any():
            shapes.append(_shape(_box_of(labels.void), IGNORED))
        height, width = image.size
        head = (
            f'<image id="{number}" name={quoteattr(image.path)} width="{width}" height="{height}">'
        )
        return "\n".join([head, *shapes, "</image>"]), Counts(len(shapes) - polygons, polygons)

    def add(self, number: int, image: LabelledImage, element: str) -> None:
        """Take what ``draw`` gave, one image after the other."""
        self._write(element)

    def close(self) -> None:
        """End the files."""
        self._write("</annotations>")
        self._file.close()
        crowd = {
            "name": CROWD,
            "mutable": False,
            "input_type": "checkbox",
            "default_value": "false",
            "values": ["false"],
        }
        raw = []
        for index, (name, colour) in enumerate(self._names()):
            attributes = [crowd] if index in self._things else []
            label = {"name": name, "color": _hex(colour), "type": "any", "attributes": attributes}
            raw.append(label)
        self._raw.write_bytes(msgspec.json.format(msgspec.json.encode(raw)) + b"\n")

    def _names(self) -> list[tuple[str, tuple[int, int, int]]]:
        pairs = zip(self.labels.names, self.labels.palette, strict=True)
        return [*pairs, (IGNORED, _IGNORED_COLOUR)]

    def _write(self, text: str) -> None:
        self._file.write(text.encode() + b"\n")


def _shape(part: Part, label: str, *, crowd: bool = False) -> str:
    shared = f'label={quoteattr(label)} source="file" occluded="0" z_order="0"'
    if part.points is not None:
        points = ";".join(f"{x:.2f},{y:.2f}" for x, y in part.points.tolist())
        tag, own = "polygon", f'points="{points}"'
    else:
        lengths = ", ".join(map(str, run_lengths(part.mask.ravel()).tolist()))
        height, width = part.mask.shape
        place = f'left="{part.left}" top="{part.top}" width="{width}" height="{height}"'
        tag, own = "mask", f'rle="{lengths}" {place}'
    if not crowd:
        return f"<{tag} {shared} {own}/>"
    return f'<{tag} {shared} {own}><attribute name="{CROWD}">true</attribute></{tag}>'


def _box_of(mask: NDArray[np.bool_]) -> Part:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    return Part(left, top, mask[top : rows[-1] + 1, left : columns[-1] + 1])


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
