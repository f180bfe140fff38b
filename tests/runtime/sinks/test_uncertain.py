"""The frames of which the model was least sure, and what reads them."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from fakes import a_frame

from knet_runtime.errors import ConfigError, OutputError
from knet_runtime.labels import LabelMap
from knet_runtime.postprocess import pixel_uncertainty, segment_uncertainty
from knet_runtime.preprocess import Geometry
from knet_runtime.segmentation import Instance, Segmentation
from knet_runtime.sinks import UncertainFrames
from knet_runtime.sources.images import read_image

LABELS = LabelMap(
    ("road", "car", "person"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)), 255, things=(1, 2)
)
HW = (48, 64)


def write(sink: UncertainFrames, scores: list[float], fps: int | None = 4) -> None:
    for index, score in enumerate(scores):
        pts = None if fps is None else Fraction(index, fps)
        frame, result = a_frame(index, pts, image=np.full((*HW, 3), index % 251, np.uint8))
        sink.write(frame, replace(result, uncertainty=score))


def kept(folder: Path) -> list[str]:
    return [one["image"] for one in json.loads((folder / "uncertainty.json").read_text())]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_least_sure_frames_are_kept_one_of_a_second(tmp_path: Path) -> None:
    sink = UncertainFrames(tmp_path / "out", 2)
    write(sink, [0.1, 0.7, 0.6, 0.2, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.5])
    assert names(tmp_path) == [sink._folder.path.name]  # nothing has its name before the end
    assert len(list((sink._folder.path / "images").iterdir())) == 2
    sink.close()
    sink.close()
    assert names(tmp_path) == ["out"]
    assert kept(tmp_path / "out") == ["000001.png", "000011.png"]
    assert names(tmp_path / "out") == ["images", "labels", "labels.json", "uncertainty.json"]
    for folder in ("images", "labels"):
        assert names(tmp_path / "out" / folder) == ["000001.png", "000011.png"]
    image = read_image(tmp_path / "out" / "images" / "000011.png")
    assert image.shape == (*HW, 3)
    assert (image == 11).all()


def test_every_image_without_a_time_may_be_kept_and_stale_frames_do_not_count(
    tmp_path: Path,
) -> None:
    sink = UncertainFrames(tmp_path / "out", 3)
    write(sink, [0.3, 0.1, 0.4, 0.2], fps=None)
    frame, result = a_frame(9, stale=True)
    sink.write(frame, replace(result, uncertainty=1.0))
    sink.close(complete=False)
    assert kept(tmp_path / "out") == ["000002.png", "000000.png", "000003.png"]
    assert "ended early" in (tmp_path / "out" / "PARTIAL.txt").read_text()


def test_many_frames_leave_as_few_files(tmp_path: Path) -> None:
    sink = UncertainFrames(tmp_path / "out", 4)
    rng = np.random.default_rng(0)
    scores = rng.random(400).tolist()
    write(sink, scores, fps=1)
    sink.close()
    order = np.argsort(scores)[::-1][:4]
    assert kept(tmp_path / "out") == [f"{index:06d}.png" for index in order]
    assert len(names(tmp_path / "out" / "images")) == 4


def panoptic(score: float = 0.8) -> Segmentation:
    ids = np.ones(HW, np.uint16)
    ids[:12], ids[12:24, :32] = 0, 2
    return Segmentation.from_panoptic(ids, [0, 1], [score, 0.5], LABELS)


def instances() -> Segmentation:
    found = [Instance(1, 0.9, 4, 8, np.ones((16, 16), np.bool_))]
    found.append(Instance(2, 0.6, 12, 8, np.ones((9, 20), np.bool_)))
    return Segmentation.from_instances(found, HW, LABELS)


@pytest.mark.parametrize("result", [panoptic(), instances()], ids=lambda one: one.task)
def test_objects_are_kept_in_coco_s_format_which_training_reads(
    result: Segmentation, tmp_path: Path
) -> None:
    segments = pytest.importorskip("knet_train.data.segments", reason="needs the extra train")
    sink = UncertainFrames(tmp_path / "out", 5)
    for index in range(2):
        frame, _ = a_frame(index, Fraction(index))
        sink.write(frame, replace(result, uncertainty=0.5))
    sink.close()
    assert segments.usual_task(tmp_path / "out") == result.task
    folder = segments.open_segments(tmp_path / "out", "all", result.task)
    assert len(folder) == 2
    _, truth = folder.read(0)
    masks = {(one.class_id, one.area) for one in result.segments}
    numbers = range(1, len(truth.classes) + 1)
    areas = [int((truth.ids == number).any(0).sum()) for number in numbers]
    names = [folder.labels.names[index] for index in truth.classes]
    assert {*zip(names, areas, strict=True)} == {(LABELS.names[c], area) for c, area in masks}


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is there already"):
        UncertainFrames(tmp_path)
    sink = UncertainFrames(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"Segmenter\(\.\.\., uncertainty=True\)"):
        sink.write(*a_frame())
    sink.close()
    assert (sink.path, names(tmp_path)) == (None, [])
    sink = UncertainFrames(tmp_path / "out")
    frame, result = a_frame(name="a/b")
    sink.write(frame, replace(result, uncertainty=0.5))
    with pytest.raises(OutputError, match="cannot hold folders"):
        sink.close()
    assert names(tmp_path) == []


def test_how_unsure_logits_are() -> None:
    geometry = Geometry((48, 64), (32, 32), (4, 0, 24, 32))
    logits = np.zeros((3, 8, 8), np.float32)
    assert pixel_uncertainty(logits, geometry) == pytest.approx(1)
    logits[1] = 50
    assert pixel_uncertainty(logits, geometry) == pytest.approx(0)
    logits[:, 0] = 0  # in the letterbox's margin
    assert pixel_uncertainty(logits, geometry) == pytest.approx(0)
    logits[0, 1:4] = 50  # two classes alike in half of the window's rows
    assert pixel_uncertainty(logits, geometry) == pytest.approx(0.5)
    logits[:] = np.log(np.array([0.2, 0.7, 0.1]))[:, None, None]
    assert pixel_uncertainty(logits, geometry) == pytest.approx(1 - (0.7 - 0.2))
    assert pixel_uncertainty(logits[:1], geometry) == 0
    logits[0, 3, 3] = np.nan
    with pytest.raises(ValueError, match="hold NaN"):
        pixel_uncertainty(logits, geometry)


def test_how_unsure_segments_are() -> None:
    # A quarter is nothing (1), an eighth 0.5, the rest 0.2.
    assert segment_uncertainty(panoptic()) == pytest.approx(0.25 + 0.125 * 0.5 + 0.625 * 0.2)
    assert segment_uncertainty(instances()) == pytest.approx(0.25)
    assert segment_uncertainty(Segmentation.from_instances([], HW, LABELS)) == 0
    nothing = np.zeros(HW, np.uint16)
    assert segment_uncertainty(Segmentation.from_panoptic(nothing, [], [], LABELS)) == 1
