"""eval of panoptic and instance models, and of bundles, by its command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coco_folders
import numpy as np
import pytest
from PIL import Image
from segment_model import LABELS

from knet_runtime.bundle.manifest import SegmentRules
from knet_runtime.bundle.store import Bundle
from knet_runtime.labels import LabelMap
from knet_runtime.segmenter import Segmenter
from knet_synthetic import Street
from knet_train.checkpoint import read_segment_checkpoint
from knet_train.config import override_config
from knet_train.inference import predict_segments

Call = Callable[..., Any]
Make = Callable[[str], Bundle]
ROAD, CAR, PERSON = range(3)
VOID = -1


@pytest.fixture
def street() -> np.ndarray:
    """48 × 64 pixels: a red car and a green person on a blue road."""
    image = np.zeros((48, 64, 3), np.uint8)
    image[..., 2] = 255
    image[8:24, 4:20] = (255, 0, 0)
    image[24:44, 40:48] = (0, 255, 0)
    return image


def write(
    root: Path,
    image: np.ndarray,
    parts: list[tuple[int, np.ndarray]],
    labels: LabelMap = LABELS,
    crowd: int = 0,
) -> Path:
    """The truth of one picture, in COCO's panoptic format: (class or VOID, mask), later ones on
    top; ``crowd`` is the number of the part that is one."""
    ids = np.zeros(image.shape[:2], np.int64)
    infos = []
    for number, (class_id, mask) in enumerate(parts, 1):
        ids[mask] = number if class_id != VOID else 0
        infos.append({"id": number, "category_id": class_id + 1, "iscrowd": int(number == crowd)})
    present = set(np.unique(ids).tolist())
    (root / "images").mkdir(parents=True)
    Image.fromarray(image).save(root / "images" / "a.png")
    coco_folders.save_ids(root / "panoptic_val" / "a.png", ids)
    height, width = ids.shape
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": height, "width": width}],
        "annotations": [
            {
                "image_id": 1,
                "file_name": "a.png",
                "segments_info": [info for info in infos if info["id"] in present],
            }
        ],
        "categories": [
            {"id": index + 1, "name": name, "isthing": int(index in labels.things)}
            for index, name in enumerate(labels.names)
        ],
    }
    (root / "panoptic_val.json").write_text(json.dumps(content))
    return root


def masks_of(bundle: Bundle, image: np.ndarray) -> dict[str, np.ndarray]:
    with Segmenter(bundle, "onnxruntime-cpu") as segment:
        result = segment(image)
    return {one.label: result.segment_map == one.id for one in result.segments}


def share_of(mask: np.ndarray, share: float) -> np.ndarray:
    """The first ``share`` of a mask's pixels."""
    part = np.zeros(mask.size, np.bool_)
    places = np.flatnonzero(mask)
    part[places[: round(share * len(places))]] = True
    return part.reshape(mask.shape)


def numbers(call: Call, *words: object, code: int = 0) -> tuple[Any, str]:
    out = Path(str(words[words.index("--data") + 1])) / "eval.json"
    answer = call("eval", *words, "--json", out)
    assert answer.code == code, answer.err
    return json.loads(out.read_text()), answer.out


def test_panoptic_quality_of_a_bundle_by_class_and_kind(
    call: Call, make_segment_bundle: Make, street: np.ndarray, tmp_path: Path
) -> None:
    bundle = make_segment_bundle("panoptic")
    found = masks_of(bundle, street)
    part = share_of(found["car"], 0.75)
    data = write(tmp_path / "d", street, [(ROAD, ~part), (CAR, part)])
    report, text = numbers(call, bundle.path, "--data", data)
    car, road = part.sum() / found["car"].sum(), found["road"].sum() / (~part).sum()
    rows = {row["name"]: row for row in report["classes"]}
    assert rows["car"]["pq"] == pytest.approx(100 * car)
    assert rows["road"]["pq"] == pytest.approx(100 * road)
    assert [rows["person"][key] for key in ("pq", "tp", "fp", "fn")] == [0, 0, 1, 0]
    half = pytest.approx(50 * car)  # of the person there is nothing
    assert report["things"] == {"pq": half, "sq": half, "rq": 50, "classes": 2}
    assert report["all"]["pq"] == pytest.approx(100 * (car + road) / 3)
    assert report["stuff"]["classes"] == 1
    assert report["engine"] == "onnxruntime-cpu"
    assert f"PQ things    {50 * car:.2f} % " in text
    assert "road (stuff)" in text


def test_what_is_found_in_void_or_in_a_crowd_is_not_wrong(
    call: Call, make_segment_bundle: Make, street: np.ndarray, tmp_path: Path
) -> None:
    bundle = make_segment_bundle("panoptic")
    found = masks_of(bundle, street)
    parts = [(ROAD, found["road"]), (PERSON, found["person"]), (VOID, found["car"])]
    data = write(tmp_path / "d", street, parts, crowd=2)
    report, _ = numbers(call, bundle.path, "--data", data)
    assert report["all"] == {"pq": 100, "sq": 100, "rq": 100, "classes": 1}
    assert [row["fp"] for row in report["classes"]] == [0, 0, 0]


def test_average_precision_of_the_things_of_a_panoptic_model(
    call: Call, make_segment_bundle: Make, street: np.ndarray, tmp_path: Path
) -> None:
    bundle = make_segment_bundle("panoptic")
    found = masks_of(bundle, street)
    part = share_of(found["car"], 0.77)  # above six of the ten thresholds
    parts = [(ROAD, found["road"]), (CAR, part), (PERSON, found["person"])]
    data = write(tmp_path / "d", street, parts)
    report, text = numbers(call, bundle.path, "--data", data, "--task", "instance")
    car, person = report["classes"]
    assert [car["ap"], car["ap50"], car["ap75"]] == pytest.approx([60, 100, 100])
    assert [person["ap"], person["objects"]] == pytest.approx([100, 1])
    assert report["AP"] == pytest.approx(80)
    assert "AP           80.00 % over 2 of 2 classes\n" in text


def test_objects_below_the_score_are_ranked_and_void_is_left_out_of_it(
    call: Call, make_segment_bundle: Make, street: np.ndarray, tmp_path: Path
) -> None:
    bundle = make_segment_bundle("instance")
    found = masks_of(bundle, street)
    shifted = np.roll(found["person"], 20, 0)  # a person that is missed
    parts = [(CAR, found["car"]), (PERSON, shifted), (VOID, found["person"])]
    data = write(tmp_path / "d", street, parts)
    report, _ = numbers(call, bundle.path, "--data", data)
    assert [row["ap50"] for row in report["classes"]] == pytest.approx([100, 0])
    data = write(tmp_path / "e", street, [*parts, (PERSON, share_of(found["person"], 0.9))])
    report, _ = numbers(call, bundle.path, "--data", data)
    # The one of two is found, without a wrong one before it: 51 of 101 places on the curve.
    assert report["classes"][1]["ap50"] == pytest.approx(100 * 51 / 101)


def test_a_checkpoint_is_scored_by_its_task(
    call: Call, segment_checkpoint: Path, tmp_path: Path
) -> None:
    """The truth is what the network itself finds, so it is as good as can be."""
    opened = read_segment_checkpoint(segment_checkpoint)
    labels, task = opened.labels, opened.config.model.task
    config = override_config(opened.config, ["data.eval_mode=fixed"])
    image = Street(1, (40, 90)).frame(0)[0]
    rules = SegmentRules() if task == "panoptic" else SegmentRules(score=0.0)
    result = predict_segments(opened.model, image, config, labels, rules)
    parts = [(one.class_id, result.segment_map == one.id) for one in result.segments]
    data = write(tmp_path / "d", image, [part for part in parts if part[1].any()], labels)
    fixed = ("--set", "data.eval_mode=fixed")
    report, text = numbers(call, segment_checkpoint, "--data", data, *fixed)
    assert "letterbox to 96×64" in text
    assert report["engine"].startswith("pytorch-")
    if task == "panoptic":
        assert report["all"]["pq"] == pytest.approx(100)
        assert report["all"]["classes"] == len({class_id for class_id, _ in parts}) > 0
        assert sum(row["tp"] for row in report["classes"]) == len(parts)
    else:  # of masks that overlap the truth has what is seen of them
        assert sum(row["objects"] for row in report["classes"]) > 1
        assert report["AP50"] > 5


def test_a_semantic_bundle_scores_as_its_checkpoint(
    call: Call, checkpoint: Path, small_bundle: Bundle, streets: Path, tmp_path: Path
) -> None:
    scores = []
    for model in (checkpoint, small_bundle.path):
        out = tmp_path / "eval.json"
        answer = call("eval", model, "--data", streets, "--split", "all", "--json", out)
        assert answer.code == 0, answer.err
        scores.append(json.loads(out.read_text()))
    assert scores[0]["mIoU"] == pytest.approx(scores[1]["mIoU"], abs=0.05)
    assert scores[0]["mode"] == scores[1]["mode"]


def test_a_bundle_is_scored_without_torch(
    call: Call,
    make_segment_bundle: Make,
    street: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = make_segment_bundle("panoptic")
    parts = [(CAR, masks_of(bundle, street)["car"])]
    data = write(tmp_path / "d", street, parts)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torch", "knet_train")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises
    report, _ = numbers(call, bundle.path, "--data", data)
    assert report["things"]["pq"] == 100


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--slide",), "--slide is for checkpoints"),
        (("--set", "data.val_split=x"), "--set is for checkpoints"),
        (("--confusion", "x.png"), "--confusion is for semantic models"),
        (("--split", "test"), "no split 'test'"),
    ],
)
def test_eval_of_a_bundle_says_what_is_wrong(
    call: Call,
    make_segment_bundle: Make,
    street: np.ndarray,
    tmp_path: Path,
    words: tuple[str, ...],
    text: str,
) -> None:
    data = write(tmp_path / "d", street, [(CAR, street[..., 0] > 0)])
    answer = call("eval", make_segment_bundle("panoptic").path, "--data", data, *words)
    assert answer.code == 2
    assert text in answer.err
    assert len(answer.err.splitlines()) == 1


def test_eval_refuses_what_does_not_go_together(
    call: Call,
    checkpoint: Path,
    segment_checkpoint: Path,
    make_segment_bundle: Make,
    street: np.ndarray,
    tmp_path: Path,
) -> None:
    data = write(tmp_path / "d", street, [(CAR, street[..., 0] > 0)])
    for words, text in (
        ((checkpoint, "--task", "instance"), "is semantic"),
        ((checkpoint, "--engine", "onnxruntime-cpu"), "runs bundles"),
        ((segment_checkpoint, "--ms-flip"), "--ms-flip is for semantic networks"),
        ((segment_checkpoint,), "evaluate on data labelled with the model's classes"),
        ((make_segment_bundle("panoptic").path, "--task", "semantic"), "instance"),
    ):
        answer = call("eval", *words, "--data", data)
        assert answer.code == 2
        assert text in answer.err
