"""Two sides' segments: which match, what the score differs by, and verify's report of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import coco_folders
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from segment_model import LABELS

from knet_deploy.cli.main import main
from knet_export.verify import measure
from knet_export.verify.segments import SegmentMeter
from knet_runtime.bundle.store import Bundle, write_bundle
from knet_runtime.segmentation import Instance, Segmentation
from knet_runtime.segmenter import Segmenter
from knet_train.average_precision import AveragePrecision
from knet_train.data.truth import Truth
from knet_train.segment_pairs import differing, numbered_alike, partners

Make = Callable[[str], Bundle]
ROAD, CAR, PERSON = range(3)
SIZE = (40, 60)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_RESAMPLES", 60)


def panoptic(*parts: tuple[int, slice, slice]) -> Segmentation:
    """(class, rows, columns) of each segment."""
    ids = np.zeros(SIZE, np.uint16)
    for number, (_, rows, columns) in enumerate(parts, 1):
        ids[rows, columns] = number
    classes = [class_id for class_id, _, _ in parts]
    return Segmentation.from_panoptic(ids, classes, [0.9] * len(parts), LABELS)


def objects(*parts: tuple[int, float, int]) -> Segmentation:
    """(class, score, left) of objects of 10 × 10 pixels; those of one place overlap."""
    mask = np.ones((10, 10), np.bool_)
    found = [Instance(class_id, score, left, 5, mask) for class_id, score, left in parts]
    return Segmentation.from_instances(found, SIZE, LABELS)


def truth_of(result: Segmentation) -> Truth:
    classes = tuple(segment.class_id for segment in result.segments)
    ids = result.segment_map[None]
    return Truth(ids, classes, frozenset(), np.zeros(SIZE, np.bool_))


WHOLE = (ROAD, slice(0, 40), slice(0, 60))


def test_segments_match_by_class_and_overlap() -> None:
    one = panoptic(WHOLE, (CAR, slice(0, 20), slice(0, 20)))
    assert len(partners(one, one)) == 2
    nearly = panoptic(WHOLE, (CAR, slice(0, 19), slice(0, 20)))  # IoU 0.95
    assert len(partners(one, nearly)) == 2
    less = panoptic(WHOLE, (CAR, slice(0, 18), slice(0, 20)))
    assert len(partners(one, less)) == 1  # the road
    other = panoptic(WHOLE, (PERSON, slice(0, 20), slice(0, 20)))
    assert len(partners(one, other)) == 1
    assert len(partners(one, panoptic())) == 0


def test_nothing_is_matched_twice_where_masks_overlap() -> None:
    two, one = objects((CAR, 0.9, 3), (CAR, 0.8, 3)), objects((CAR, 0.9, 3))
    assert len(partners(two, one)) == len(partners(one, two)) == 1
    assert len(partners(two, two)) == 2


def test_an_object_that_both_sides_have_has_one_number() -> None:
    before = objects((CAR, 0.9, 3), (PERSON, 0.6, 30), (CAR, 0.5, 45))
    after = objects((PERSON, 0.9, 31), (CAR, 0.8, 20), (CAR, 0.7, 4))
    numbers = {one.id: one.track for one in numbered_alike(before, after).segments}
    assert numbers == {1: 2, 2: 4, 3: 1}  # the car at 20 is new
    assert {one.track for one in numbered_alike(objects(), after).segments} == {1, 2, 3}


def test_what_differs_is_another_class_or_another_object() -> None:
    one = panoptic((CAR, slice(0, 40), slice(0, 20)), (CAR, slice(0, 40), slice(20, 60)))
    swapped = panoptic((CAR, slice(0, 40), slice(20, 60)), (CAR, slice(0, 40), slice(0, 20)))
    assert not differing(one, swapped).any()
    moved = panoptic((CAR, slice(0, 40), slice(0, 25)), (CAR, slice(0, 40), slice(25, 60)))
    assert np.flatnonzero(differing(one, moved).any(0)).tolist() == list(range(20, 25))


def test_the_difference_of_panoptic_quality_and_its_interval() -> None:
    car = (CAR, slice(0, 20), slice(0, 20))
    full, half = panoptic(WHOLE, car), panoptic(WHOLE, (CAR, slice(0, 15), slice(0, 20)))
    meter = SegmentMeter(LABELS, "panoptic")
    for found in (full, half, half, None):
        meter.compare(full, found)
        meter.score(full, found, truth_of(full))
    delta = meter.delta()
    assert delta is not None
    assert delta.reference == 100
    car_pq, road_pq = 100 * (1 + 2 * 0.75) / 3.5, 100 * (1 + 2 * 2000 / 2100) / 3.5
    # The image that is broken has found nothing: one is missed of each class.
    assert [row[1] for row in delta.classes] == [
        pytest.approx(road_pq),
        pytest.approx(car_pq),
        None,
    ]
    assert delta.points == pytest.approx((car_pq + road_pq) / 2 - 100)
    assert delta.worst == CAR
    low, high = delta.interval
    assert low < delta.points < high <= 0
    # Of 16 segments, 2 + 2 with partners; the road of two images differs by less than 0.05.
    assert meter.matched == pytest.approx((4 + 2 * 2) / 14)


def test_the_difference_of_average_precision_and_its_interval() -> None:
    meter = SegmentMeter(LABELS, "instance")
    right, wrong = objects((CAR, 0.9, 3), (PERSON, 0.6, 30)), objects((CAR, 0.9, 3))
    for found in (right, right, wrong):
        meter.compare(right, found)
        meter.score(right, found, truth_of(right))
    delta = meter.delta()
    assert delta is not None
    found = 67 / 101 * 100  # two of three people, on a curve of 101 places
    assert delta.measured == pytest.approx((100 + found) / 2)
    assert delta.worst == PERSON
    assert delta.interval[1] == pytest.approx(0)
    assert delta.interval[0] < delta.points
    assert meter.matched == pytest.approx(10 / 11)


def test_resampled_precision_is_the_official_one_where_nothing_is_resampled() -> None:
    draw, precision = np.random.default_rng(0), AveragePrecision(LABELS)
    twice = AveragePrecision(LABELS)
    for number in range(12):
        true = objects(*((int(c), 0.5, int(x)) for c, x in draw.integers(0, (3, 45), (4, 2))))
        found = objects(
            *(
                (one.class_id, float(draw.random()), max(0, one.box[0] + int(draw.integers(-3, 4))))
                for one in true.segments
                for _ in range(2)
            )
        )
        precision.update(number, found.to_coco(), truth_of(true))
        for copy in range(2):
            twice.update(2 * number + copy, found.to_coco(), truth_of(true))
    score = precision.resampling()
    assert 0.05 < precision.all.ap < 0.95
    assert score(np.ones(12, np.int64)) == pytest.approx(precision.all.ap)
    # Ties of equal scores stand in one order or the other.
    assert score(np.full(12, 2)) == pytest.approx(twice.all.ap, abs=0.01)


@pytest.fixture
def street() -> NDArray[np.uint8]:
    """48 × 64 pixels: a red car and a green person on a blue road."""
    image = np.zeros((48, 64, 3), np.uint8)
    image[..., 2] = 255
    image[8:24, 4:20] = (255, 0, 0)
    image[24:44, 40:48] = (0, 255, 0)
    return image


def without_person(bundle: Bundle, path: Path) -> Bundle:
    """The bundle with a person's score of nearly nothing."""
    model = onnx.load(bundle.file("model.onnx"))
    (logits,) = (one for one in model.graph.initializer if one.name == "logits")
    values = numpy_helper.to_array(logits).copy()
    values[:, 1] = -9
    logits.CopyFrom(numpy_helper.from_array(values, "logits"))
    return write_bundle(path, bundle.manifest, {"model.onnx": model.SerializeToString()})


def as_data(root: Path, bundle: Bundle, image: NDArray[np.uint8]) -> Path:
    """A data set of one picture, whose truth is what the bundle finds."""
    with Segmenter(bundle, "onnxruntime-cpu") as segment:
        result = segment(image)
    (root / "images").mkdir(parents=True)
    Image.fromarray(image).save(root / "images" / "a.png")
    coco_folders.save_ids(root / "panoptic_val" / "a.png", result.segment_map)
    infos = [{"id": one.id, "category_id": one.class_id} for one in result.segments]
    names = enumerate(result.labels.names)
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 48, "width": 64}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": infos}],
        "categories": [
            {"id": index, "name": name, "isthing": int(index in result.labels.things)}
            for index, name in names
        ],
    }
    (root / "panoptic_val.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("task", "metric", "lost", "person"),
    # Of instances the person is still found, but no longer before the car's mask.
    [("panoptic", "PQ", -100 / 3, -100), ("instance", "AP", -25, -50)],
)
def test_verify_reports_the_score_of_the_task(
    make_segment_bundle: Make,
    street: NDArray[np.uint8],
    tmp_path: Path,
    task: str,
    metric: str,
    lost: float,
    person: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = make_segment_bundle(task)
    other = without_person(bundle, tmp_path / "other.knet")
    data = as_data(tmp_path / "data", bundle, street)
    words = ["--data", data, "--engine", "onnxruntime-cpu", "--json", tmp_path / "out.json"]
    words = [*map(str, ["--against", bundle.path, *words])]
    assert main(["verify", str(bundle.path), *words]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["metric"], report["delta_miou"], report["matched"]) == (metric, 0, 1)
    assert report["miou_reference"] == pytest.approx(100)
    assert main(["verify", str(other.path), *words, "--report", str(tmp_path / "page")]) == 1
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["delta_miou"] == pytest.approx(lost, abs=3)
    assert (report["worst_class"], report["matched"]) == ("person", pytest.approx(1, abs=0.4))
    assert report["worst_class_delta_iou"] == pytest.approx(person)
    shown = "".join(capsys.readouterr())
    assert f"Δ{metric} of the worst class" in shown
    header, *rows = (line for line in shown.splitlines() if line.startswith("  "))
    assert header.split() == [metric, "of", "each", "class", "reference", "bundle", "Δ"]
    # Numbers stand below each other, whatever is written before them.
    shares = [row for row in rows if row.startswith("  margin")]
    assert len(shares) > 1
    assert len({row.index("% of ") for row in shares}) == 1
    text = (tmp_path / "page" / "report.html").read_text()
    assert f"Change of {metric} per class" in text
    assert "Matched segments" in text
    assert text.count("<img") == 4
    # Two columns, in which the labels of objects can be read, and what the colours stand for.
    assert text.count("<figure class='objects'>") == 1
    (same,) = re.findall(r"masks equal, ([0-9.]+) % of the image the same segment", text)
    assert 0 < float(same) < 100
    legend = text[text.index('class="legend"') : text.index("<figure")]
    assert "</i>car</li>" in legend
    assert ("</i>road</li>" in legend) == (metric == "PQ")
    assert "ΔmIoU" not in shown + text
