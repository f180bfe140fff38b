"""``knet-deploy data convert`` and ``export``, and the commands that say when they are needed."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_trees
import numpy as np
import pytest
from foreign_trees import Labelled

Call = Callable[..., Any]


def labelled() -> list[Labelled]:
    label = (np.arange(96, dtype=np.uint8) % 11).reshape(8, 12).repeat(3, 0).repeat(3, 1)
    image = np.zeros((24, 36, 3), np.uint8)
    return [Labelled(f"s{n}_0001", "val" if n else "train", image, label) for n in range(2)]


def command(text: str) -> list[str]:
    """The words of the command line that an error gives."""
    (line,) = (part for part in text.split("`") if part.startswith("knet-deploy data convert"))
    return shlex.split(line)[1:]


@pytest.mark.parametrize("name", ["voc", "cityscapes", "cvat"])
def test_two_commands_lead_from_a_foreign_tree_to_one_that_is_checked(
    name: str, call: Call, tmp_path: Path
) -> None:
    root, _ = foreign_trees.EXACT[name](tmp_path / "my data", labelled())
    if name == "cvat":
        root = Path(shutil.make_archive(str(tmp_path / "task 3"), "zip", root))
    refused = call("data", "check", root)
    assert refused.code == 2
    converted = call(*command(refused.err))
    assert converted.code == 0, converted.err
    after = dict(line.split(None, 1) for line in converted.out.splitlines() if " " in line)
    assert f"(--from {name})" in after["recognised"]
    assert after["splits"] == "train 1, val 1"
    assert after["then"].startswith("knet-deploy train --data ")
    checked = call(*shlex.split(after["next"])[1:])
    assert checked.code == 0, checked.out
    assert "none in 2 images" in checked.out


def test_training_says_the_same_command_for_every_task(call: Call, tmp_path: Path) -> None:
    root, _ = foreign_trees.labelme(tmp_path / "photos", labelled())
    wanted = ["data", "convert", str(root), f"{root}-knet"]
    for words in (
        ("train", "--data", root, "--out", tmp_path / "run"),
        ("train", "--data", root, "--out", tmp_path / "run", "--preset", "knet-edge-instance"),
    ):
        answer = call(*words)
        assert answer.code == 2
        assert "it looks like LabelMe (" in answer.err
        assert command(answer.err) == wanted


def test_objects_are_counted_and_the_preset_is_named(call: Call, tmp_path: Path) -> None:
    root, _ = foreign_trees.coco(tmp_path / "s", labelled())
    answer = call("data", "convert", root, tmp_path / "out", "--task", "panoptic")
    assert answer.code == 0, answer.err
    (row,) = (line.split() for line in answer.out.splitlines() if line.startswith("sky"))
    assert row[2:] == ["2", "2"]
    assert f"data check {tmp_path / 'out'} --task panoptic" in answer.out
    assert "--preset knet-edge-panoptic" in answer.out
    assert call("data", "check", tmp_path / "out", "--task", "panoptic").code == 0


def test_problems_are_listed_and_nothing_is_written(call: Call, tmp_path: Path) -> None:
    root, _ = foreign_trees.index_masks(tmp_path / "s", labelled())
    for path in sorted((root / "masks").rglob("*.png")):
        path.write_bytes(b"no image")
    answer = call("data", "convert", root, tmp_path / "out")
    assert answer.code == 1
    assert len([line for line in answer.out.splitlines() if line.startswith("problem")]) == 2
    assert "has 2 problems: fix them; nothing was written" in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--from", "vok"), "--from is 'vok'; the formats are knet-deploy, coco, voc"),
        (("--split", "0.8"), "write two or three shares"),
        (("--split", "0.8,0.8"), "write two or three shares"),
        (("--split", "a,b"), "write two or three shares"),
        (("--map", "car"), "write OLD=NEW"),
        (("--classes", "lorry"), "names 'lorry', and the classes are"),
    ],
)
def test_wrong_options_are_said(
    words: tuple[str, str], text: str, call: Call, tmp_path: Path
) -> None:
    root, _ = foreign_trees.index_masks(tmp_path / "s", labelled())
    answer = call("data", "convert", root, tmp_path / "out", *words)
    assert answer.code == 2
    assert text in answer.err


def test_an_export_says_the_command_that_brings_it_back(call: Call, tmp_path: Path) -> None:
    root, _ = foreign_trees.index_masks(tmp_path / "s", labelled())
    assert call("data", "convert", root, tmp_path / "data").code == 0
    answer = call("data", "export", tmp_path / "data", tmp_path / "for cvat", "--to", "cvat")
    assert answer.code == 0, answer.err
    said = dict(line.split("  ", 1) for line in answer.out.splitlines())
    assert said["shapes"].strip() == "22 masks, 0 polygons"
    assert call(*shlex.split(said["and back"])[1:]).code == 0
    for path in (tmp_path / "data" / "labels").rglob("*.png"):
        back = tmp_path / "for cvat-knet" / path.relative_to(tmp_path / "data")
        assert path.read_bytes() == back.read_bytes()
    for words, text in (
        (("coco", "--polygons"), "--polygons: task semantic is written in COCO's panoptic format"),
        (("coco", "--task", "panoptic"), "does not tell objects apart"),
        (("coco", "--split", "night"), "has no split 'night'; it has train, val"),
        (("voc",), "'voc' is not one of 'coco', 'cvat'"),
    ):
        answer = call("data", "export", tmp_path / "data", tmp_path / "no", "--to", *words)
        assert answer.code == 2
        assert text in answer.err
    assert not (tmp_path / "no").exists()
