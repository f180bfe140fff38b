"""eval and data check, by their commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from knet_runtime.labels import LabelMap
from knet_runtime.metrics import ConfusionMatrix
from knet_synthetic import Street
from knet_train import evaluate as scores
from knet_train.checkpoint import load_checkpoint, save_checkpoint
from knet_train.config import load_config
from knet_train.data.layouts import ADE20K
from knet_train.models.build import build_model

Call = Callable[..., Any]
SMALL = (
    "model.channels=32",
    "model.stages=1",
    "model.heads=2",
    "model.update_channels=32",
    "model.ffn_channels=64",
    "loss.stage_weights=[1.0, 1.0]",
    "data.eval_size=[64, 96]",
    "data.eval_scale=[96, 64]",
    "data.crop=[48, 48]",
)
LABELS = LabelMap(("road", "sky", "car"), ((128, 64, 128), (0, 0, 255), (255, 0, 0)), 255)


@pytest.fixture(scope="module")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(labels: LabelMap, *overrides: str) -> Path:
        config = load_config("knet-edge", [*SMALL, *overrides])
        torch.manual_seed(0)
        model = build_model(config.model, labels.num_classes)
        # Untrained features are nearly the same everywhere; around their mean they differ.
        (stage,) = model.stages
        torch.nn.init.normal_(model.conv_seg.weight)
        with torch.no_grad():
            street = torch.from_numpy(Street(0, (64, 96)).frame(0)[0])[None]
            mean = model.eval().head(model.levels(street)).mean((2, 3), keepdim=True)
            torch.nn.init.zeros_(stage.feat_transform.bias)
            stage.feat_transform.bias.copy_(-stage.feat_transform(mean).flatten())
        path = tmp_path_factory.mktemp("checkpoint") / "best.safetensors"
        save_checkpoint(path, model, config, labels)
        return path

    return make


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(LABELS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "streets"
    for index in range(3):
        image, label = Street(index, (75, 111)).frame(0)
        label = np.array([0, 1, 2], np.uint8)[label % 3]
        label[:4] = 255
        for part, pixels in (("images", image), ("labels", label)):
            path = root / part / "val" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    (root / "labels.json").write_text(json.dumps({"class_names": LABELS.names}))
    return root


def test_eval_prints_a_table_and_writes_numbers_and_a_drawing(
    call: Call, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results" / "eval.json"
    drawing = tmp_path / "confusion.png"
    answer = call("eval", checkpoint, "--data", data, "--json", out, "--confusion", drawing)
    assert answer.code == 0, answer.err
    assert "stretch to 96×64" in answer.out
    numbers = json.loads(out.read_text())
    matrix = np.array(numbers["confusion"])
    assert matrix.sum() == 3 * 71 * 111
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    iou = 100 * np.diag(matrix) / union
    assert numbers["mIoU"] == pytest.approx(iou.mean())
    assert numbers["mAcc"] == pytest.approx(100 * np.mean(np.diag(matrix) / matrix.sum(1)))
    assert numbers["aAcc"] == pytest.approx(100 * np.trace(matrix) / matrix.sum())
    assert [row["name"] for row in numbers["classes"]] == list(LABELS.names)
    assert [row["iou"] for row in numbers["classes"]] == pytest.approx(iou.tolist())
    assert f"mIoU         {iou.mean():.2f} % over 3 of 3 classes\n" in answer.out
    assert f"{iou[2]:7.2f}" in next(li for li in answer.out.splitlines() if li.startswith("car"))
    assert cv2.imread(str(drawing)).shape[0] > 3 * 46


def test_eval_says_of_how_many_classes_the_mean_is(
    call: Call, checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = ConfusionMatrix(3, 255)
    counts.matrix[0, 0] = 10
    monkeypatch.setattr(scores, "evaluate", lambda *_, **__: {"": counts})
    answer = call("eval", checkpoint, "--data", data)
    assert answer.code == 0, answer.err
    line = "mIoU         100.00 % over 1 of 3 classes; neither labelled nor predicted: sky, car\n"
    assert line in answer.out


def test_eval_sees_images_as_published_when_told(
    call: Call, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    totals = {}
    for words in ((), ("--slide",), ("--ms-flip",), ("--slide", "--ms-flip")):
        out = tmp_path / "eval.json"
        ratio = ("--set", "data.eval_mode=keep_ratio")
        answer = call("eval", checkpoint, "--data", data, *words, *ratio, "--json", out)
        assert answer.code == 0, answer.err
        numbers = json.loads(out.read_text())
        assert np.sum(numbers["confusion"]) == 3 * 71 * 111
        totals[numbers["mode"]] = numbers["confusion"]
    assert list(totals)[:2] == [
        "keep ratio inside (96, 64), whole",
        "keep ratio inside (96, 64), windows of 48×48",
    ]
    assert len({json.dumps(confusion) for confusion in totals.values()}) == 4


def test_eval_agrees_with_plain_torch_at_a_scale_of_its_own(
    call: Call, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    model = load_checkpoint(checkpoint)
    hits = 0
    for index in range(3):
        image = np.array(Image.open(data / f"images/val/{index}.png"))
        scaled = cv2.resize(image, (118, 80))  # 75×111 inside (200, 80)
        with torch.no_grad():
            planes = model(torch.from_numpy(scaled)[None])
            for size in ((80, 118), (75, 111)):
                planes = F.interpolate(planes, size, mode="bilinear", align_corners=False)
        label = np.array(Image.open(data / f"labels/val/{index}.png"))
        hits += int((planes[0].argmax(0).numpy() == label).sum())
    ratio = ("--set", "data.eval_mode=keep_ratio", "--set", "data.eval_scale=[200, 80]")
    out = tmp_path / "eval.json"
    assert call("eval", checkpoint, "--data", data, *ratio, "--json", out).code == 0
    accuracy = json.loads(out.read_text())["aAcc"]
    assert accuracy == pytest.approx(100 * hits / (3 * 71 * 111), abs=0.02)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--slide",), "--set data.eval_mode=keep_ratio"),
        (("--split", "nonesuch"), "no split 'nonesuch'"),
        (("--set", "model.stages=2"), "data.* only"),
        (("--set", "data.nope=2"), "unknown key 'nope'"),
        (("--confusion", "x.jpg"), "end in .png"),
        (("--json", "/dev/null/x.json"), "x.json"),
    ],
)
def test_eval_says_what_is_wrong_before_any_work(
    call: Call, checkpoint: Path, data: Path, words: tuple[str, ...], text: str
) -> None:
    answer = call("eval", checkpoint, "--data", data, *words)
    assert answer.code == 2
    assert text in answer.err
    assert len(answer.err.splitlines()) == 1


def test_eval_refuses_other_classes(call: Call, checkpoint: Path, data: Path) -> None:
    for names, text in (
        (["road", "sea", "car"], "class 'sea' where the model has 'sky'"),
        (["road", "sky", "car", "dog"], "4 classes, the model 3"),
    ):
        (data / "labels.json").write_text(json.dumps({"class_names": names}))
        answer = call("eval", checkpoint, "--data", data)
        assert answer.code == 2
        assert text in answer.err


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--slide",), ("--ms-flip",)])
def test_ade20ks_own_images_go_through_eval(
    call: Call,
    make_checkpoint: Callable[..., Path],
    shared_data: Path,
    tmp_path: Path,
    words: tuple[str, ...],
) -> None:
    ade = ("data.eval_mode=keep_ratio", "data.eval_scale=[512, 128]", "data.crop=[128, 128]")
    path = make_checkpoint(ADE20K, *ade)
    folder = tmp_path / "ade"
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True)
        files = sorted((shared_data / "ade_samples" / "sampleData" / part).iterdir())
        for file in files[:1] if words == ("--ms-flip",) else files:  # it sees each twelve times
            shutil.copy(file, folder / part)
    out, drawing = tmp_path / "eval.json", tmp_path / "confusion.png"
    answer = call(
        "eval",
        path,
        "--data",
        folder,
        "--split",
        "all",
        *words,
        "--json",
        out,
        "--confusion",
        drawing,
    )
    assert answer.code == 0, answer.err
    numbers = json.loads(out.read_text())
    labels = [np.array(Image.open(path)) for path in (folder / "annotations").iterdir()]
    assert np.sum(numbers["confusion"]) == sum(int((label > 0).sum()) for label in labels)
    assert cv2.imread(str(drawing)).shape[0] > 150 * 14


def test_data_check_of_a_clean_folder(call: Call, data: Path, tmp_path: Path) -> None:
    sheet, out = tmp_path / "sheet.png", tmp_path / "report.json"
    answer = call("data", "check", data, "--sheet", sheet, "--json", out)
    assert answer.code == 0, answer.err
    assert "splits       val 3" in answer.out
    assert "111×75 (3)" in answer.out
    assert "problems     none in 3 images" in answer.out
    assert json.loads(out.read_text())["images"] == 3
    assert cv2.imread(str(sheet)).shape[1] > 3 * 2 * 240


def test_data_check_lists_every_fault_and_ends_with_1(call: Call, data: Path) -> None:
    (data / "labels" / "val" / "0.png").unlink()
    (data / "images" / "val" / "1.png").write_bytes(b"\x89PNG")
    answer = call("data", "check", data)
    assert answer.code == 1
    assert [line.startswith("problem ") for line in answer.out.splitlines()].count(True) == 2
    assert "0.png has no label" in answer.out
    assert "1.png: is " in answer.out
    (error,) = answer.err.splitlines()
    assert error.endswith("has 2 problems: fix the files named above")


@pytest.mark.parametrize(
    "words", [(), ("check",), ("check", "nowhere"), ("check", ".", "--sheet", "x.gif")]
)
def test_data_check_says_what_is_wrong_with_a_call(call: Call, words: tuple[str, ...]) -> None:
    answer = call("data", *words)
    assert answer.code == 2
    assert len(answer.err.splitlines()) == 1


def test_data_check_has_help(call: Call) -> None:
    answer = call("data", "check", "--help")
    assert answer.code == 0
    for option in ("--split", "--sheet", "--json"):
        assert option in answer.out


def test_each_drive_is_scored_too(call: Call, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        for number, name in enumerate(("north_f01", "north_f02", "south_f01")):
            (data / folder / "val" / f"{number}.png").rename(data / folder / "val" / f"{name}.png")
    words = ("eval", checkpoint, "--data", data, "--json", tmp_path / "eval.json")
    assert "north" not in call(*words).out
    answer = call(*words, "--by-drive")
    assert answer.code == 0, answer.err
    report = json.loads((tmp_path / "eval.json").read_text())
    north, south = report["drives"]
    assert (north["name"], north["images"]) == ("north", 2)
    assert (south["name"], south["images"], len(south["iou"])) == ("south", 1, 3)
    assert f"north       2  {north['mIoU']:.2f}" in answer.out
    for name in ("north_f01", "north_f02"):
        (data / "images" / "val" / f"{name}.png").unlink()
    call(*words)
    alone = json.loads((tmp_path / "eval.json").read_text())
    assert alone["mIoU"] == south["mIoU"]
    assert alone["drives"] == []
