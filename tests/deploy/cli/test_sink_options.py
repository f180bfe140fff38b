"""Options that say where results go: what they open, and what they refuse."""

from __future__ import annotations

import uuid
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from knet_deploy.cli.outputs import Outputs
from knet_deploy.cli.run import names
from knet_runtime.errors import ConfigError
from knet_runtime.segmentation import Segmentation
from knet_runtime.sources.base import SourceInfo
from knet_runtime.types import Frame
from knet_synthetic import CAMVID11

VIDEO = SourceInfo("video", (48, 64), Fraction(25), None, Fraction(1, 1000))
IMAGE = SourceInfo("image", (48, 64), None, 1)


def test_everything_that_is_asked_for_is_written(tmp_path: Path) -> None:
    outputs = Outputs(
        overlay=tmp_path / "o.mkv",
        masks=tmp_path / "masks",
        json=tmp_path / "o.jsonl",
        rle=tmp_path / "rle.jsonl",
        raw=f"shm:knet_test_{uuid.uuid4().hex}",
        classes=("ROAD",),
        blur=("car",),
    )
    outputs.check()
    sinks = outputs.sinks(VIDEO, CAMVID11, "m@1")
    mask = Segmentation(np.full((48, 64), 3, np.uint8), CAMVID11, {})
    for sink in sinks:
        sink.write(Frame(np.zeros((48, 64, 3), np.uint8), 0, None, "000000"), mask)
        sink.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "masks",
        "o.jsonl",
        "o.mkv",
        "rle.jsonl",
    ]
    assert len(sinks) == 5
    assert not outputs.takes_stdout
    assert Outputs().sinks(VIDEO, CAMVID11, "m@1") == []


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (Outputs(overlay=Path("o.avi")), "end in .mp4 or .mkv"),
        (Outputs(overlay=Path("o.png"), codec="hevc"), "name an .mp4 or .mkv"),
        (Outputs(alpha=0.3), "--alpha changes the overlay"),
        (Outputs(legend=True, json=Path("o")), "--legend changes the overlay"),
        (
            Outputs(classes=("road",), masks=Path("m")),
            "--classes changes the overlay, and what is written to --rle and --coco:",
        ),
        (Outputs(overwrite=True), "add -o FOLDER, --masks FOLDER or --coco-panoptic FOLDER"),
        (Outputs(blur=("car",), rle=Path("o")), "--blur changes the overlay"),
        (Outputs(overlay=Path("o.mp4"), alpha=2), "between 0 and 1"),
        (Outputs(raw="out.raw"), "write - for stdout"),
        (Outputs(raw="-", json=Path("-")), "--json and --raw would mix on stdout"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_opened(
    outputs: Outputs, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        outputs.check()


def test_unknown_classes_and_image_files_of_videos_are_refused(tmp_path: Path) -> None:
    for outputs in (
        Outputs(overlay=tmp_path / "o.mp4", classes=("bus",)),
        Outputs(overlay=tmp_path / "o.mp4", blur=("bus",)),
    ):
        with pytest.raises(ConfigError, match="no class 'bus'"):
            outputs.sinks(VIDEO, CAMVID11, "m@1")
    with pytest.raises(ConfigError, match="for a single image"):
        Outputs(overlay=tmp_path / "o.png").sinks(VIDEO, CAMVID11, "m@1")
    (sink,) = Outputs(overlay=tmp_path / "o.png").sinks(IMAGE, CAMVID11, "m@1")
    sink.close()
    assert list(tmp_path.iterdir()) == []


def test_names_are_split_at_commas() -> None:
    assert names(" road, Car ,") == ("road", "Car")
    assert names(None) == ()


def test_several_sources_write_to_places_of_their_own() -> None:
    outputs = Outputs(
        overlay=Path("o.mkv"),
        masks=Path("m"),
        rle=Path("r.jsonl"),
        raw="shm:knet",
        push="rtsp://me:secret@host/live",
        classes=("road",),
    ).of("gate")
    assert (outputs.overlay, outputs.masks) == (Path("o.gate.mkv"), Path("m/gate"))
    assert (outputs.rle, outputs.json) == (Path("r.gate.jsonl"), None)
    assert (outputs.raw, outputs.push) == ("shm:knet.gate", "rtsp://me:secret@host/live/gate")
    assert outputs.classes == ("road",)
    for single in (Outputs(raw="-"), Outputs(json=Path("-")), Outputs(rle=Path("-"))):
        assert single.takes_stdout
        with pytest.raises(ConfigError, match="is for one source"):
            single.of("gate")
