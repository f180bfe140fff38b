"""`knet-deploy train`: what it says, on a terminal and elsewhere, and how it is stopped."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from knet_train.config import load_config
from knet_train.data.batches import TrainingSamples
from knet_train.models.backbones import build_backbone

Call = Callable[..., Any]
TINY = (
    "model.channels=32",
    "model.stages=1",
    "model.heads=2",
    "model.update_channels=32",
    "model.ffn_channels=64",
    "loss.stage_weights=[1.0, 1.0]",
    "data.eval_size=[64, 64]",
    "data.crop=[64, 64]",
    "optim.steps=4",
    "optim.batch_size=2",
    "optim.warmup_steps=0",
    "trainer.val_every=4",
    "trainer.workers=0",
    "trainer.precision=32-true",
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("backbone") / "model.safetensors"
    save_file(build_backbone(load_config("knet-edge").model).state_dict(), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "my data"
    rng = np.random.default_rng(0)
    for name in ("train/a", "train/b", "val/c"):
        label = np.zeros((64, 64), np.uint8)
        label[20:] = 1
        for part, pixels in (
            ("images", rng.integers(0, 255, (64, 64, 3), np.uint8)),
            ("labels", label),
        ):
            path = root / part / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    (root / "labels.json").write_text(json.dumps(["background", "crack"]))
    return root


@pytest.fixture
def train(call: Call, data: Path, tmp_path: Path, backbone: Path) -> Call:
    """``knet-deploy train`` with a small network, in the folder "run"."""

    def run(*words: str) -> Any:
        settings = [word for setting in TINY for word in ("--set", setting)]
        words = ("--backbone-weights", str(backbone), *settings, *words)
        return call("train", "--data", data, "--out", tmp_path / "run", *words)

    return run


def test_the_command_of_the_readme_trains_on_other_classes(train: Call) -> None:
    answer = train()
    assert answer.code == 0, answer.err
    (notice,) = answer.err.splitlines()
    assert notice.startswith("knet-deploy: warning: without synthetic streets: they have CamVid's")
    lines = answer.out.splitlines()
    header = dict(line.split(maxsplit=1) for line in lines[:6])
    assert list(header) == ["device", "precision", "images", "classes", "parameters", "memory"]
    assert (header["precision"], header["classes"]) == ("32-true", "2")
    assert header["images"] == "2 to learn from (train), 1 to score (val)"
    assert re.fullmatch(r"\d\.\d\d M", header["parameters"])
    assert re.fullmatch(r"step 1/4 · loss \d+\.\d+ · lr \d\.\de-\d", lines[6])
    speed = r"\d[\d.e+]* img/s · ETA \d:\d\d"
    for number, line in ((2, lines[7]), (3, lines[8]), (4, lines[9])):
        assert re.fullmatch(
            rf"step {number}/4 · loss \d+\.\d+ · lr \d\.\d(e-\d)? · {speed}", line
        ), line
    assert re.fullmatch(r"step 4/4 · mIoU \d+\.\d\d % over 2 of 2 classes", lines[10])
    assert re.fullmatch(r"best .*  mIoU \d+\.\d\d % over 2 of 2 classes on val", lines[11])
    assert Path(lines[13].removeprefix("report ")).is_file()


def test_an_estimate_leaves_the_run_folder_alone(train: Call, tmp_path: Path) -> None:
    answer = train("--estimate")
    assert answer.code == 0, answer.err
    said = dict(line.split(maxsplit=1) for line in answer.out.splitlines())
    facts = ["device", "precision", "images", "classes", "parameters", "memory"]
    assert list(said) == [*facts, "step", "evaluation", "time", "peak", "disk"]
    assert re.fullmatch(r"\S+ s, 1 of them", said["evaluation"])
    assert re.fullmatch(r"\d+:\d\d", said["time"])
    assert re.fullmatch(r"\d+\.\d\d GiB of memory", said["peak"])
    assert re.fullmatch(rf"0\.\d\d GiB, \S+ GiB free at {tmp_path}", said["disk"])
    assert not (tmp_path / "run").exists()


def test_a_perfect_score_says_of_how_many_classes(train: Call, data: Path) -> None:
    for path in data.glob("labels/*/*.png"):
        Image.open(path).point(lambda value: 255 * value).save(path)
    answer = train("--set", "data.synthetic_share=0", "--set", "optim.lr=0.01")
    assert answer.code == 0, answer.err
    assert "no label has a pixel of crack" in answer.err
    assert "value 255 is ignored; these look like 0/255 masks: write 1 instead" in answer.err
    # An untrained network may still see a crack somewhere, for which the mean counts 0 %.
    assert re.search(r"best .* mIoU (100\.00 % over 1|\d+\.\d\d % over 2) of 2 cla", answer.out)


def test_a_broken_labels_json_is_shown_how_one_looks(train: Call, data: Path) -> None:
    (data / "labels.json").write_text('{"class_names": ["background", "crack"], "colors": []}')
    answer = train()
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.splitlines() == [
        f"knet-deploy: error: {data / 'labels.json'}: unknown key 'colors'; did you mean "
        "palette_rgb?",
        '    {"class_names": ["background", "crack"],',
        '     "palette_rgb": [[0, 0, 0], [220, 20, 60]],',
        '     "ignore_index": 255}',
    ]


def test_a_terminal_sees_steps_and_losses(train: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    monkeypatch.setenv("COLUMNS", "100")
    answer = train()
    assert answer.code == 0, answer.err
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", answer.out)
    assert re.search(r"step 4/4 · loss \d+\.\d+ · lr 0\.0 · \S+ img/s · ETA 0:00", text)
    assert re.search(r"ETA 0:00 · evaluating 1/1", text)
    assert re.search(r"step 4/4 · mIoU \d+\.\d\d % over 2 of 2 classes\n", text)
    assert "Epoch" not in text
    assert "v_num" not in text


def test_ctrl_c_says_where_it_stopped_and_the_command_that_continues(
    train: Call, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read = TrainingSamples.__getitem__

    def interrupted(samples: TrainingSamples, index: int) -> Any:
        if index == 4:  # the first of step 3
            os.kill(os.getpid(), signal.SIGINT)
        return read(samples, index)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingSamples, "__getitem__", interrupted)
        answer = train("--set", "trainer.val_every=2")
    assert answer.code == 130
    report = (tmp_path / "run" / "report.html").read_text("utf-8")
    last = answer.err.splitlines()[-1]
    score = re.search(r"^step 2/4 · mIoU (\S+) %", answer.out, re.MULTILINE)
    assert score is not None
    best = f"best mIoU {score[1]} % at step 2"
    said = f"knet-deploy: stopped at step 3 of 4, {best}; resume with: "
    assert last.startswith(said)
    command = shlex.split(last.removeprefix(said))
    assert command[0] == "knet-deploy"
    assert escape(last.removeprefix(said)) in report
    answer = call(*command[1:])
    assert answer.code == 0, answer.err
    # What was best before is still known.
    assert re.search(rf"^step 4/4 · .* · best mIoU {float(score[1]):.1f} @ 2$", answer.out, re.M)
    assert (tmp_path / "run" / "last.safetensors").exists()


def test_a_logger_without_its_extra_and_batch_without_a_gpu_are_refused(
    call: Call, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    answer = call("train", "--data", data, "--out", tmp_path / "run", "--logger", "mlflow")
    assert answer.code == 2
    assert '--logger mlflow needs the mlflow extra: pip install "knet-deploy[mlflow]"' in answer.err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = call("train", "--data", data, "--out", tmp_path / "run", "--batch", "auto")
    assert answer.code == 2
    assert "--batch auto tries what fits into a GPU, and this machine shows none" in answer.err
    assert not (tmp_path / "run").exists()
