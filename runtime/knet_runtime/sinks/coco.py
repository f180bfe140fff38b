"""The sinks that write what COCO's tools read: results as JSON, and panoptic PNGs with their JSON.

Both are for instance and panoptic results. An image's id is the number that its name is, as COCO's
are, or else its place in the source. Frames that are shown again are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from knet_runtime.atomic import json_bytes, output_error
from knet_runtime.coco import categories, panoptic_png, segments_info
from knet_runtime.errors import ConfigError, OutputError
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks.json_lines import LineFile
from knet_runtime.sinks.mask_folder import MaskFolder
from knet_runtime.types import Frame


class _Ids:
    """The id of each frame's image: all are numbers by name, or all are counted."""

    def __init__(self) -> None:
        self._named: bool | None = None

    def of(self, frame: Frame, result: Segmentation) -> int:
        if result.task == "semantic":
            raise ConfigError(
                "COCO's outputs are for instance and panoptic results, and this one is semantic: "
                "take the masks or the RLE lines"
            )
        numeric = frame.name.isascii() and frame.name.isdecimal()
        if self._named is None:
            self._named = numeric
        if not self._named:
            return frame.index
        if not numeric:
            raise OutputError(
                f"{frame.name}: the names before it are numbers, which became the images' ids; "
                "rename it, or put it into a folder of its own"
            )
        return int(frame.name)


class _List:
    """A JSON list that grows in a file; ``head`` opens it, and ``tail`` closes what is cut off."""

    def __init__(self, path: Path, head: bytes, tail: bytes) -> None:
        self.file = LineFile(path, tail)
        self._head = head
        self._separator = b""

    def add(self, items: Sequence[dict[str, Any]]) -> None:
        head, self._head = self._head, b""
        if head:
            self.file.send(head)
        for item in items:
            self.file.send(self._separator + json_bytes(item) + b"\n")
            self._separator = b","

    def close(self, tail: bytes, *, complete: bool) -> Path | None:
        if not self._head:
            self.file.send(tail)
        self.file.close(complete=complete)
        return self.file.final


class CocoResults:
    """Writes all segments to ``path`` as COCO's results: a JSON list of objects with ``image_id``,
    ``category_id`` (the class's index), ``segmentation`` (RLE), ``area``, ``bbox`` and ``score``.

    ``classes`` names those that are written (none: all). The file is written and named as that of
    ``JsonLines``, and a partial one is whole JSON too. ``write`` raises OutputError when it cannot
    be written, and ConfigError for a semantic result or classes that the model does not have.

        >>> import json
        >>> import numpy as np
        >>> from knet_deploy import CocoResults, Instance, LabelMap, Segmentation, open_source
        >>> labels = LabelMap(("car",), ((0, 0, 142),), ignore_index=255, things=(0,))
        >>> car = Instance(0, 0.9, left=3, top=1, mask=np.ones((2, 4), np.bool_))
        >>> with open_source("photos") as source:
        ...     sink = CocoResults("coco.json")
        ...     for frame in source:
        ...         sink.write(frame, Segmentation.from_instances([car], (360, 480), labels))
        ...     sink.close()
        >>> with open("coco.json") as file:
        ...     [(one["image_id"], one["bbox"], one["score"]) for one in json.load(file)]
        [(0, [3, 1, 4, 2], 0.9), (1, [3, 1, 4, 2], 0.9)]
    """

    def __init__(self, path: str | Path, *, classes: Sequence[str] = ()) -> None:
        self.path: Path | None = Path(path)
        self.name = str(path)
        self._names = tuple(classes)
        self._ids = _Ids()
        self._results: _List | None = _List(self.path, b"[\n", b"]\n")

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Add one frame's segments. Raises OutputError; those before stay whole."""
        if self._results is None:
            raise ValueError(f"{self.name} is closed")
        image_id = self._ids.of(frame, result)
        if frame.stale:
            return
        wanted = result.labels.indices(self._names or result.labels.names)
        found = result.to_coco(image_id)
        self._results.add([one for one in found if one["category_id"] in wanted])

    def close(self, *, complete: bool = True) -> None:
        """Give the file its name, which ``path`` is then; without frames nothing is left, and
        ``path`` is None. Raises OutputError."""
        results, self._results = self._results, None
        if results is not None:
            self.path = None
            self.path = results.close(b"]\n", complete=complete)


class CocoPanoptic:
    """Writes COCO's panoptic format into a folder: ``FRAME_NAME.png`` with each segment's id as
    red + 256 · green, and ``panoptic.json`` with ``categories``, ``annotations`` (an entry per
    image with its ``segments_info``, and the score of each segment) and ``images``.

    Where masks of an instance result overlap, the higher score lies above, and ``area`` and
    ``bbox`` are those of what is seen. The PNGs are written as by ``MaskFolder``, whose
    ``overwrite`` this is. After an early end the JSON is ``panoptic.partial.json``, and whole; what
    a killed run left lacks ``images``. Raises OutputError, and ``write`` ConfigError for a semantic
    result.

        >>> import json
        >>> import numpy as np
        >>> from knet_deploy import CocoPanoptic, LabelMap, Segmentation, open_source
        >>> labels = LabelMap(("road",), ((128, 64, 128),), ignore_index=255)
        >>> road = np.ones((360, 480), np.uint16)
        >>> with open_source("photos") as source:
        ...     sink = CocoPanoptic("panoptic")
        ...     for frame in source:
        ...         sink.write(frame, Segmentation.from_panoptic(road, [0], [0.9], labels))
        ...     sink.close()
        >>> with open("panoptic/panoptic.json") as file:
        ...     [one["file_name"] for one in json.load(file)["annotations"]]
        ['a.png', 'b.png']
    """

    JSON = "panoptic.json"

    def __init__(self, folder: str | Path, *, overwrite: bool = False) -> None:
        self._pictures = _Pictures(folder, overwrite=overwrite)
        self.path: Path | None = Path(folder)
        self.name = str(folder)
        self._json = self.path / self.JSON
        self._overwrite = overwrite
        self._ids = _Ids()
        self._images: list[dict[str, Any]] = []
        self._entries: _List | None = None
        self._closed = False

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Add one frame. Raises OutputError, naming the file."""
        image_id = self._ids.of(frame, result)
        if frame.stale:
            return
        if result.task == "instance":
            described = [(one.class_id, one.score or 0.0) for one in result.segments]
            classes, scores = zip(*described, strict=True) if described else ((), ())
            result = Segmentation.from_panoptic(result.segment_map, classes, scores, result.labels)
        self._pictures.write(frame, result)
        if self._entries is None:
            self._entries = self._begin(result)
        segments = segments_info(result)
        for said, segment in zip(segments, result.segments, strict=True):
            said["score"] = segment.score
        file_name = f"{frame.name}.png"
        entry = {"image_id": image_id, "file_name": file_name, "segments_info": segments}
        self._entries.add([entry])
        height, width = result.size
        image = {"id": image_id, "file_name": file_name, "height": height, "width": width}
        self._images.append(image)

    def _begin(self, result: Segmentation) -> _List:
        stated = msgspec.json.encode(categories(result.labels))
        head = b'{"categories":' + stated + b',"annotations":[\n'
        try:
            if self._overwrite:  # it is of the masks that are gone
                self._json.unlink(missing_ok=True)
        except OSError as error:
            raise output_error(self._json, error) from error
        return _List(self._json, head, b"]}\n")

    def close(self, *, complete: bool = True) -> None:
        """Wait until all is there; without frames ``path`` is then None. Raises OutputError."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._entries is not None:
                tail = b'],"images":' + json_bytes(self._images) + b"}\n"
                self._entries.close(tail, complete=complete)
        finally:
            self._pictures.close(complete=complete)
            self.path = self._pictures.path


class _Pictures(MaskFolder):
    def pictures(self, target: Path, frame: Frame, result: Segmentation) -> dict[Path, bytes]:
        """The segments' ids as COCO paints them."""
        return {target: panoptic_png(result)}
