"""The whole road by its commands: train, export, verify, run."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from safetensors.torch import save_file

from knet_deploy.cli.main import main
from knet_synthetic import CAMVID11, Street
from knet_train.config import load_config
from knet_train.models.backbones import build_backbone


@pytest.mark.slow
def test_train_export_verify_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    for part in ("images", "labels"):
        (data / part).mkdir(parents=True)
    for number in range(12):
        image, label = Street(number, (72, 96)).frame(5)
        cv2.imwrite(str(data / f"images/{number:02}.png"), image[..., ::-1])
        cv2.imwrite(str(data / f"labels/{number:02}.png"), label)
    (data / "labels.json").write_text(
        json.dumps({"class_names": CAMVID11.names, "ignore_index": 11})
    )
    config = load_config("knet-edge", ["model.backbone=resnet10t"])
    save_file(build_backbone(config.model).state_dict(), tmp_path / "backbone.safetensors")

    settings = [
        "data.eval_size=[64, 96]",
        "data.crop=[64, 64]",
        "model.backbone=resnet10t",
        "model.stages=1",
        "loss.stage_weights=[1.0, 1.0]",
        "model.channels=32",
        "model.update_channels=32",
        "model.ffn_channels=64",
        "optim.steps=4",
        "optim.batch_size=4",
        "trainer.val_every=2",
        "trainer.workers=0",
    ]
    run, bundle = tmp_path / "run", tmp_path / "small.knet"
    trained = main(
        ["train", "--data", str(data), "--out", str(run)]
        + ["--backbone-weights", str(tmp_path / "backbone.safetensors")]
        + [part for setting in settings for part in ("--set", setting)]
    )
    assert trained == 0, capsys.readouterr().err
    checkpoint = str(run / "last.safetensors")
    served = ["--triton", str(tmp_path / "models")]
    assert main(["export", checkpoint, "-o", str(bundle), "--data", str(data), *served]) == 0
    assert (tmp_path / "models/small/config.pbtxt").is_file()
    assert main(["export", checkpoint, "-o", str(tmp_path / "b/small.knet"), *served]) == 2
    assert "small exists already" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    report = tmp_path / "report.json"
    arguments = ["verify", str(bundle), "--against", checkpoint, "--data", str(data)]
    assert main([*arguments, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["same_checkpoint"]
    assert abs(found["delta_miou"]) <= 0.05
    assert found["agreement"] >= 0.9995
    assert main(["verify", str(bundle)]) == 0
    masks = tmp_path / "masks"
    done = main(["run", str(data / "images"), "--bundle", str(bundle), "--masks", str(masks)])
    assert done == 0, capsys.readouterr().err
    assert len(list(masks.glob("*.png"))) == 12
    assert cv2.imread(str(masks / "00.png"), cv2.IMREAD_UNCHANGED).shape == (72, 96)
    assert np.isin(cv2.imread(str(masks / "00.png"), cv2.IMREAD_UNCHANGED), range(11)).all()
