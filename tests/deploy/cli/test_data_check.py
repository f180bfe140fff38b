"""``knet-deploy data check`` of folders of objects."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from coco_folders import write_panoptic
from PIL import Image

Call = Callable[..., Any]


def test_objects_are_counted_and_drawn(call: Call, tmp_path: Path) -> None:
    write_panoptic(tmp_path, "train", images=3)
    sheet, out = tmp_path / "sheet.png", tmp_path / "report.json"
    answer = call("data", "check", tmp_path, "--sheet", sheet, "--json", out)
    assert answer.code == 0, answer.err
    assert "COCO panoptic layout, 4 classes" in answer.out
    assert "labelled     98.4 % of the pixels; the others are void" in answer.out
    assert "objects      9, 3.0 an image, at most 3; 3 crowds" in answer.out
    report = json.loads(out.read_text())
    assert report["objects"] == {
        "objects": 9,
        "crowds": 3,
        "most": 3,
        "vanishing": 0,
        "judged_by": "knet-edge-panoptic",
    }
    assert cv2.imread(str(sheet)).shape[1] > 3 * 2 * 240
    answer = call("data", "check", tmp_path, "--task", "instance")
    assert answer.code == 0, answer.err
    assert "covered      15.0 % of the pixels by objects; 1.6 % are void" in answer.out


def test_objects_are_judged_by_the_preset(call: Call, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    ids = np.zeros((960, 1200), np.uint16)
    ids[100:200, 100:200] = 1
    ids[508:512, 600:604] = 2  # between the pixels that are looked at
    Image.fromarray(np.zeros((960, 1200, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    Image.fromarray(ids).save(tmp_path / "masks" / "a.png")
    (tmp_path / "labels.json").write_text('["cell"]')
    preset = tmp_path / "mine.toml"
    text = (files("knet_train") / "presets" / "knet-edge-instance.toml").read_text()
    preset.write_text(text.replace("kernels = 30", "kernels = 1"))
    answer = call("data", "check", tmp_path)
    assert answer.code == 0, answer.err
    (warning,) = (line for line in answer.out.splitlines() if line.startswith("warning"))
    assert "1 objects (50.0 %) have no pixel at a quarter of the size that" in warning
    answer = call("data", "check", tmp_path, "--preset", preset)
    assert "1 images (a) have more objects, up to 2, than" in answer.out
    large = call("data", "check", tmp_path, "--preset", "knet-r50-fpn-instance")
    assert "warning" not in large.out


def test_options_that_do_not_go_together(call: Call, tmp_path: Path) -> None:
    write_panoptic(tmp_path)
    for words, text in (
        (("--preset", "knet-edge-instance"), "is of task instance, not panoptic"),
        (("--task", "semantic"), "holds single objects, in COCO's formats"),
        (("--task", "semantic", "--preset", "knet-edge"), "it judges objects"),
        (("--split", "test"), "no split 'test'; it has train"),
    ):
        answer = call("data", "check", tmp_path, *words)
        assert answer.code == 2
        (line,) = answer.err.splitlines()
        assert text in line
