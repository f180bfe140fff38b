"""The result of one image or frame, the same type for K-Net's three tasks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.atomic import AtomicFile
from knet_runtime.counts import Counts, draw_counts
from knet_runtime.drawing import OPACITY, colourise, encode_png, legend_strip, resized
from knet_runtime.errors import ConfigError, OutputError
from knet_runtime.labels import LabelMap
from knet_runtime.outlines import mask_outlines
from knet_runtime.painting import Box as Box, NamePlaces, Segment as Segment, paint, paint_classes
from knet_runtime.rle import Rle, rles_of
from knet_runtime.types import ClassMap, Rgb, Size, Task

_NAMED = 3  # classes, in a line
_SCREEN, _LEGEND = 1280, 360  # pixels: the longest side in a notebook; the least width of a legend
_DARK = 32
_EXACT_PIXELS = 1 << 24  # cv2.calcHist counts in float32, which holds every whole number up to it


class Instance(msgspec.Struct, frozen=True):
    """One object as an instance network finds it: ``mask`` bool [h, w] with its first pixel at
    (left, top) of the image. Masks of several instances may overlap.

        >>> import numpy as np
        >>> from knet_deploy import Instance, LabelMap, Segmentation
        >>> labels = LabelMap(("car",), ((0, 0, 142),), ignore_index=255, things=(0,))
        >>> car = Instance(0, 0.9, left=3, top=1, mask=np.ones((2, 4), np.bool_))
        >>> Segmentation.from_instances([car], (5, 8), labels).segments[0].box
        (3, 1, 7, 3)
    """

    class_id: int
    score: float
    left: int
    top: int
    mask: NDArray[np.bool_]
    track: int | None = None


@dataclass(frozen=True, eq=False)
class Segmentation:
    """One image's result: the class of every pixel, and its segments.

        >>> from knet_deploy import Segmenter
        >>> with Segmenter() as segment:
        ...     result = segment("street.png")
        >>> result.class_map.shape, result.shares()["Road"] > 0.1
        ((360, 480), True)
        >>> result.save("classes.png")  # class indices, as training reads them
        >>> result.overlay().shape
        (360, 480, 3)

    ``class_map`` is uint8 [H, W] (uint16 beyond 256 classes) at the image's size; pixels of no
    class hold ``labels.ignore_index``. ``timings`` holds milliseconds per stage: "preprocess" (to
    the model's size), "infer" (the engine; in a batch, an equal share of it) and "postprocess" (to
    the image's size). ``counts`` is what a ``ZoneCounter`` counted up to this frame;
    ``uncertainty`` (0 … 1) is there where the ``Segmenter`` was asked for it. ``image`` is what was
    segmented, uint8 [H, W, 3] RGB: there in what a ``Segmenter`` was called for, None in the
    results of a pipeline, whose frames have it. A semantic result is made by naming these; the
    others by ``from_panoptic`` and ``from_instances``. Nothing in it is to be changed: what is
    computed from it is kept. A notebook shows it as an image.
    """

    class_map: ClassMap
    labels: LabelMap
    timings: Mapping[str, float] = field(default_factory=dict)
    task: Task = "semantic"
    counts: Counts | None = None
    uncertainty: float | None = None
    image: Rgb | None = field(default=None, repr=False)
    _segment_map: NDArray[np.uint16] | None = field(default=None, repr=False)
    _segments: tuple[Segment, ...] | None = field(default=None, repr=False)
    _instances: tuple[Instance, ...] = field(default=(), repr=False)

    @classmethod
    def from_panoptic(
        cls,
        segment_map: NDArray[np.uint16],
        classes: Sequence[int],
        scores: Sequence[float | None],
        labels: LabelMap,
        timings: Mapping[str, float] | None = None,
        tracks: Sequence[int | None] | None = None,
    ) -> Segmentation:
        """A panoptic result: ``segment_map`` uint16 [H, W] holds 1 … S, and 0 where nothing is;
        ``classes``, ``scores`` (None: unknown) and ``tracks`` those of segment 1, 2, …, S. Raises
        ValueError when a pixel names a segment that is not described, or a class does not exist."""
        tracks = tracks or [None] * len(classes)
        table = _class_table(labels, classes)
        if int(segment_map.max(initial=0)) >= len(table):
            raise ValueError(f"the map names segments above the {len(classes)} described")
        boxes = _boxes(segment_map, range(1, len(table)))
        areas = _histogram(segment_map, len(table))
        described = enumerate(zip(classes, scores, tracks, strict=True), 1)
        segments = tuple(
            _segment(labels, id_, class_id, score, int(areas[id_]), boxes[id_], track)
            for id_, (class_id, score, track) in described
            if id_ in boxes
        )
        return cls(
            *(table[segment_map], labels, timings or {}, "panoptic", None, None, None),
            *(segment_map, segments),
        )

    @classmethod
    def from_instances(
        cls,
        instances: Sequence[Instance],
        size: Size,
        labels: LabelMap,
        timings: Mapping[str, float] | None = None,
    ) -> Segmentation:
        """An instance result on an image of ``size`` (height, width). In ``class_map`` and
        ``segment_map`` the higher score lies above; ``segments`` has them in falling order of
        scores, with their whole areas. Raises ValueError for a class that does not exist, a mask
        without a pixel or one that leaves the image."""
        ordered = tuple(sorted(instances, key=lambda instance: -instance.score))
        segment_map = np.zeros(size, np.uint16)
        segments = []
        for id_, one in enumerate(ordered, 1):
            height, width = one.mask.shape
            right, bottom = one.left + width, one.top + height
            if min(one.left, one.top) < 0 or right > size[1] or bottom > size[0]:
                raise ValueError(f"the mask of instance {id_} leaves the image of {size}")
            area = int(np.count_nonzero(one.mask))
            if not area:
                raise ValueError(f"the mask of instance {id_} holds no pixel")
            place = segment_map[one.top : bottom, one.left : right]
            place[one.mask & (place == 0)] = id_
            left, top, wide, tall = cv2.boundingRect(one.mask.view(np.uint8))
            box = (one.left + left, one.top + top, one.left + left + wide, one.top + top + tall)
            segments.append(_segment(labels, id_, one.class_id, one.score, area, box, one.track))
        table = _class_table(labels, [segment.class_id for segment in segments])
        described = tuple(segments)
        return cls(
            *(table[segment_map], labels, timings or {}, "instance", None, None, None),
            *(segment_map, described, ordered),
        )

    def __repr__(self) -> str:
        height, width = self.size
        parts = [f"Segmentation({self.task}, {height}×{width}"]
        if self.task != "semantic":
            parts.append(f"{len(self.segments)} segments")
        shares = sorted(self.shares().items(), key=lambda share: -share[1])
        parts += [f"{name} {100 * share:.0f} %" for name, share in shares[:_NAMED] if share]
        return ", ".join(parts) + ")"

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return self.class_map.shape

    @cached_property
    def _counts(self) -> NDArray[np.int64]:
        return _histogram(self.class_map, self.labels.num_classes)

    @cached_property
    def _shares(self) -> dict[str, float]:
        shares = (self._counts / max(1, self.class_map.size)).tolist()
        return dict(zip(self.labels.names, shares, strict=True))

    def shares(self) -> dict[str, float]:
        """The fraction of the image (0 … 1) that each class covers, by name, in label order."""
        return self._shares

    @cached_property
    def segment_map(self) -> NDArray[np.uint16]:
        """The ``Segment.id`` of each pixel, uint16 [H, W]; 0 where there is none. In a semantic
        result a class's segment has the id class index + 1."""
        if self._segment_map is not None:
            return self._segment_map
        table = np.zeros(max(256, int(self.class_map.max(initial=0)) + 1), np.uint16)
        table[: self.labels.num_classes] = np.arange(1, self.labels.num_classes + 1)
        return table[self.class_map]

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """What is in the image, by id: in a semantic result each class that covers a pixel."""
        if self._segments is not None:
            return self._segments
        boxes = _boxes(self.class_map, np.flatnonzero(self._counts).tolist())
        return tuple(
            _segment(self.labels, index + 1, index, None, int(self._counts[index]), box, None)
            for index, box in boxes.items()
        )

    def masks(self) -> Iterator[tuple[Segment, NDArray[np.bool_]]]:
        """Each segment and its pixels inside ``Segment.box``, bool [bottom - top, right - left]:
        the whole object's in an instance result, where masks may overlap."""
        for segment in self.segments:
            left, top, right, bottom = segment.box
            if self._instances:
                one = self._instances[segment.id - 1]
                rows = slice(top - one.top, bottom - one.top)
                yield segment, one.mask[rows, left - one.left : right - one.left]
            else:
                yield segment, self.segment_map[top:bottom, left:right] == segment.id

    def with_tracks(self, tracks: Mapping[int, int]) -> Segmentation:
        """The same result with these tracks, by ``Segment.id``; the other segments have none."""
        replaced = msgspec.structs.replace
        return replace(
            self,
            _segments=tuple(replaced(one, track=tracks.get(one.id)) for one in self.segments),
            _instances=tuple(
                replaced(one, track=tracks.get(id_)) for id_, one in enumerate(self._instances, 1)
            ),
        )

    def rle(self) -> dict[int, Rle]:
        """Each segment's mask as compressed COCO RLE, by id."""
        if not self._instances:
            found = rles_of(self.segment_map, (segment.id for segment in self.segments))
            return {id_: rle for id_, (rle, _) in found.items()}
        rles = {}
        for segment, mask in self.masks():
            left, top, right, bottom = segment.box
            whole = np.zeros(self.size, np.uint8)
            whole[top:bottom, left:right] = mask
            rles[segment.id] = rles_of(whole, (1,))[1][0]
        return rles

    def polygons(self) -> dict[int, list[NDArray[np.int32]]]:
        """The outer outlines of each segment's regions by id, as int32 [points, 2] of (x, y) along
        the edges of pixels (``mask_outlines``). Filled as COCO's tools do, they are its mask and
        its holes, which polygons of COCO cannot hold."""
        return {
            segment.id: [outline.points for outline in mask_outlines(mask, *segment.box[:2])]
            for segment, mask in self.masks()
        }

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """COCO's results for this image: a dictionary per segment with ``image_id``,
        ``category_id`` (the class's index), ``segmentation`` (RLE), ``area``, ``bbox`` (left, top,
        width, height) and, where there is one, ``score``."""
        rles = self.rle()
        results = []
        for segment in self.segments:
            left, top, right, bottom = segment.box
            result: dict[str, Any] = {
                "image_id": image_id,
                "category_id": segment.class_id,
                "segmentation": msgspec.to_builtins(rles[segment.id]),
                "area": segment.area,
                "bbox": [left, top, right - left, bottom - top],
            }
            if segment.score is not None:
                result["score"] = segment.score
            results.append(result)
        return results

    def to_supervision(self) -> Any:
        """The segments as ``supervision.Detections``, for that library's trackers, annotators and
        metrics: boxes and whole masks bool [S, H, W], ``class_id``, ``data["class_name"]``,
        ``confidence`` unless a score is unknown, and ``tracker_id`` once there are tracks, -1 for
        a segment without one. Raises ImportError where supervision is not installed."""
        try:
            from supervision import Detections
        except ModuleNotFoundError as error:
            raise ImportError(
                f"to_supervision needs {error.name}: pip install supervision"
            ) from error
        segments = self.segments
        masks = np.zeros((len(segments), *self.size), np.bool_)
        for whole, (segment, mask) in zip(masks, self.masks(), strict=True):
            left, top, right, bottom = segment.box
            whole[top:bottom, left:right] = mask
        scores = [one.score for one in segments]
        tracks = [one.track for one in segments]
        return Detections(
            xyxy=np.array([one.box for one in segments], np.float32).reshape(-1, 4),
            mask=masks,
            confidence=None if None in scores else np.array(scores, np.float32),
            class_id=np.array([one.class_id for one in segments], np.int64),
            tracker_id=None
            if all(track is None for track in tracks)
            else np.array([-1 if track is None else track for track in tracks], np.int64),
            data={"class_name": np.array([one.label for one in segments], np.str_)},
        )

    def overlay(
        self,
        image: Rgb | None = None,
        alpha: float = OPACITY,
        classes: Collection[int] | None = None,
        *,
        names: bool | NamePlaces = False,
    ) -> Rgb:
        """``image`` uint8 [H, W, 3] RGB under the classes' colours, with lines between regions,
        things each in a shade of its own with an outline and a label, and the zones of ``counts``.
        ``image`` has the result's size, or is scaled from it; left out, it is the result's own.
        ``alpha`` (0 … 1) is the colours' opacity, ``classes`` are the indices of those drawn (None:
        all), ``names`` writes classes into their large regions, of a video where those of the frame
        before stand (``NamePlaces``). Raises ConfigError for another alpha, ValueError for an image
        of another shape, or none."""
        places = NamePlaces() if names is True else names or None
        image = self.image if image is None else image
        if image is None:
            raise ValueError("this result keeps no image: pass the one that was segmented")
        ids = self.class_map if self.task == "semantic" else self._map_of(classes)
        (height, width), (own_height, own_width) = image.shape[:2], self.size
        if image.shape[:2] != self.size:
            # One side may be rounded; of a long, narrow image that is much of the other.
            if not ids.size or (
                abs(height - own_height * width / own_width) > 1
                and abs(width - own_width * height / own_height) > 1
            ):
                raise ValueError(f"image {image.shape[:2]} and result {self.size} differ in shape")
            ids = resized(ids, (height, width))
        if self.task == "semantic":
            return paint_classes(image, ids, self.labels, alpha, classes, names=places)
        scale = width / own_width
        segments, labels = self.segments, self.labels
        painted = paint(image, ids, segments, labels, alpha, classes, scale, names=places)
        if self.counts is not None and alpha:
            draw_counts(painted, self.counts, scale)
        return painted

    def _map_of(self, classes: Collection[int] | None) -> ClassMap:
        """The segment map of these classes alone: objects of others cover nothing."""
        if classes is None or self.task != "instance":
            return self.segment_map
        ids = np.zeros(self.size, np.uint16)
        for segment, mask in self.masks():
            if segment.class_id in classes:
                left, top, right, bottom = segment.box
                place = ids[top:bottom, left:right]
                place[mask & (place == 0)] = segment.id
        return ids

    def class_png(self) -> bytes:
        """The class map as a grey PNG of class indices: 8 bits per pixel, or 16 with more than 255
        classes. Raises ValueError when PNG cannot hold its size."""
        deep = self.labels.num_classes > 255 or self.class_map.dtype != np.uint8
        return encode_png(np.asarray(self.class_map, np.uint16) if deep else self.class_map)

    def mask_pngs(self, path: Path) -> dict[Path, bytes]:
        """What ``save`` and ``MaskFolder`` write, by file: ``class_png`` as ``path`` and, of an
        instance or panoptic result, the segments' ids as a PNG of 16 bits beside it, "x.png" as
        "x.segments.png". Raises ValueError when PNG cannot hold the size."""
        pngs = {path: self.class_png()}
        if self.task != "semantic":
            pngs[path.with_suffix(".segments.png")] = encode_png(self.segment_map)
        return pngs

    def save(self, path: str | Path) -> None:
        """Write ``mask_pngs``; each file appears whole or not at all. Raises ConfigError for a name
        that does not end in .png, OutputError when it cannot be written."""
        target = Path(path)
        if target.suffix.lower() != ".png":
            raise ConfigError(
                f"{path}: let the name end in .png, which alone keeps class indices exactly; "
                "OverlayImage writes what people look at"
            )
        try:
            pngs = self.mask_pngs(target)
        except ValueError as error:
            raise OutputError(f"{path}: {error}; scale the image down") from error
        for file, data in pngs.items():
            AtomicFile(file).write(data)

    def _repr_png_(self) -> bytes:
        """The overlay, or without an image the classes' colours, no larger than a screen, with the
        colours and names of what is there."""
        height, width = self.size
        scale = min(1.0, _SCREEN / max(height, width, 1))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        if self.image is None:
            shown = colourise(resized(self.class_map, size), self.labels)
        else:
            small = cv2.resize(self.image, size[::-1], interpolation=cv2.INTER_AREA)
            shown = self.overlay(np.asarray(small, np.uint8))
        present = np.flatnonzero(self._counts).tolist()
        legend = legend_strip(self.labels, max(size[1], _LEGEND), self.shares(), present)
        page = np.full((size[0] + len(legend), legend.shape[1], 3), _DARK, np.uint8)
        page[: size[0], : size[1]], page[size[0] :] = shown, legend
        return encode_png(page)


def _segment(
    labels: LabelMap,
    id_: int,
    class_id: int,
    score: float | None,
    area: int,
    box: Box,
    track: int | None,
) -> Segment:
    if not 0 <= class_id < labels.num_classes:
        raise ValueError(f"segment {id_} has class {class_id} of {labels.num_classes}")
    label, is_thing = labels.names[class_id], class_id in labels.things
    return Segment(id_, class_id, label, score, area, box, is_thing, track)


def _class_table(labels: LabelMap, classes: Sequence[int]) -> ClassMap:
    """The class of each segment id, with the ignore index at 0."""
    values = [labels.ignore_index, *classes]
    wide = max(labels.num_classes - 1, labels.ignore_index) > 255
    return np.array(values, np.uint16) if wide else np.array(values, np.uint8)


def _histogram(ids: ClassMap, count: int) -> NDArray[np.int64]:
    """How many pixels of [H, W] hold 0, 1, …, ``count`` - 1."""
    total = np.zeros(count, np.int64)
    flat = np.ascontiguousarray(ids).reshape(1, -1)
    for start in range(0, flat.shape[1], _EXACT_PIXELS):
        part: Any = flat[:, start : start + _EXACT_PIXELS]
        total += cv2.calcHist([part], [0], None, [count], [0, count]).ravel().astype(np.int64)
    return total


def _boxes(ids: ClassMap, wanted: Collection[int]) -> dict[int, Box]:
    """(left, top, right, bottom) of each of ``wanted`` that is in ``ids`` [H, W], in order."""
    boxes = {}
    for value in wanted:
        left, top, width, height = cv2.boundingRect((ids == value).view(np.uint8))
        if width:
            boxes[value] = (left, top, left + width, top + height)
    return boxes
