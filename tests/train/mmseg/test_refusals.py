"""Files that are not taken: what is wrong stands in one line, and nothing in them is executed."""

from __future__ import annotations

import os
import pickle
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knet_runtime.errors import CheckpointError
from knet_runtime.labels import LabelMap, distinct_palette
from knet_train.data.layouts import ADE20K
from knet_train.foreign import read_state
from knet_train.mmseg import read_mmseg

SEVEN = LabelMap(tuple("abcdefg"), distinct_palette(7), 255)
State = dict[str, torch.Tensor]
KEY = "decode_head.kernel_update_head.1.kernel_update_conv.input_gate.weight"


def save(path: Path, state: State) -> Path:
    torch.save({"state_dict": state}, path)
    return path


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({KEY: None}, f"it lacks {KEY}"),
        ({"auxiliary_head.conv_seg.bias": None}, r"it lacks auxiliary_head\.conv_seg\.bias"),
        ({KEY: torch.zeros(8, 4)}, rf"{KEY} is torch\.float32 \[8, 4\] and should be .*\[8, 8\]"),
        ({KEY: torch.zeros(8, 8, dtype=torch.int64)}, rf"{KEY} is torch\.int64"),
        ({"decode_head.extra": torch.zeros(1)}, r"it has decode_head\.extra, which nothing"),
        ({KEY: torch.full((8, 8), float("nan"))}, rf"{KEY} has values that are NaN or infinite"),
        ({KEY: torch.full((8, 8), float("inf"))}, rf"{KEY} has values that are NaN or infinite"),
        pytest.param(
            {KEY: torch.zeros(8, 8).to_sparse()},
            f"{KEY} is a sparse or quantised",
            marks=pytest.mark.filterwarnings("ignore:Validating sparse"),
        ),
        ({KEY: "a text"}, f"{KEY}' in its state dict is str"),
        (
            {"decode_head.kernel_generate_head.conv_seg.weight": None},
            r"conv_seg\.weight is missing",
        ),
    ],
)
def test_a_key_that_does_not_fit_is_named(
    tmp_path: Path, state: State, change: dict[str, Any], text: str
) -> None:
    changed = {k: v for k, v in (state | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=text) as caught:
        read_mmseg(save(tmp_path / "odd.pth", changed), labels=SEVEN)
    assert "odd.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_preset_is_refused_with_the_right_one(pth: Path) -> None:
    for preset in ("r50-pspnet", "swin-l-upernet-640", "knet-edge"):
        with pytest.raises(CheckpointError, match=rf"r50-fcn by its keys, not {preset}: pass"):
            read_mmseg(pth, preset=preset, labels=SEVEN)


def test_an_unpublished_combination_needs_a_description(tmp_path: Path, state: State) -> None:
    deeper = state | {"backbone.layer3.6.conv1.weight": torch.zeros(1)}
    path = save(tmp_path / "r101.pth", deeper)
    with pytest.raises(CheckpointError, match=r"another backbone or head.*--preset FILE\.toml"):
        read_mmseg(path, labels=SEVEN)
    with pytest.raises(CheckpointError, match=r"it has backbone\.layer3\.6"):
        read_mmseg(path, preset="r50-fcn", labels=SEVEN)


def test_another_architecture_is_refused(tmp_path: Path, state: State) -> None:
    segformer = {"backbone.layers.0.0.weight": torch.zeros(2), "decode_head.conv_seg.weight": KEY}
    segformer["decode_head.conv_seg.weight"] = torch.zeros(150, 2, 1, 1)
    with pytest.raises(CheckpointError, match=r"holds no K-Net of mmsegmentation"):
        read_mmseg(save(tmp_path / "segformer.pth", segformer))


def test_classes_that_are_not_ade20ks_need_names(pth: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has 7 classes.*--labels labels\.json"):
        read_mmseg(pth)
    with pytest.raises(CheckpointError, match=r"has 7 classes, and the label map 150"):
        read_mmseg(pth, labels=ADE20K)


class Harmful:
    """What unpickling would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_not_executed(
    tmp_path: Path, state: State, legacy: bool
) -> None:
    proof = tmp_path / "executed"
    path = tmp_path / "it's harmful.pth"
    file = {"state_dict": state, "meta": Harmful(proof)}
    torch.save(file, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"would run code from the file, so it was not read"):
        read_mmseg(path, labels=SEVEN)
    assert not proof.exists()
    path.write_bytes(pickle.dumps(Harmful(proof)))
    with pytest.raises(CheckpointError):
        read_mmseg(path, labels=SEVEN)
    assert not proof.exists()


class Shell:
    """What unpickling would give to a shell."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (self.command,))


@pytest.mark.parametrize("legacy", [False, True])
def test_nobody_is_told_how_to_read_a_file_that_calls_a_shell(
    tmp_path: Path, state: State, legacy: bool
) -> None:
    path = tmp_path / "evil.pth"
    file = {"state_dict": state, "meta": Shell(f"touch {tmp_path / 'executed'}")}
    torch.save(file, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"a pickled \w+\.system, which runs code") as caught:
        read_mmseg(path, labels=SEVEN)
    assert "weights_only=False" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("content", ["weights", "numbers", "object"])
def test_torchs_advice_to_read_a_plain_pickle_unsafely_is_not_repeated(
    tmp_path: Path, state: State, protocol: int, content: str, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "raw.pth"
    numbers = {key: value.numpy() for key, value in state.items()}
    file: Any = {"weights": state, "numbers": numbers, "object": Harmful(tmp_path / "executed")}
    path.write_bytes(pickle.dumps({"state_dict": file[content]}, protocol))
    with pytest.raises(CheckpointError, match=r"raw\.pth (is not a readable|holds)") as caught:
        read_state(path)
    said = str(caught.value)
    assert not any(words in said for words in ("Weights only", "weights_only", "Re-running"))
    assert "\n" not in said
    assert not (tmp_path / "executed").exists()
    assert not recwarn.list


def test_the_way_out_of_a_refused_file_works_as_printed(tmp_path: Path, state: State) -> None:
    path = tmp_path / "it's trained here.pth"
    torch.save({"state_dict": state, "message_hub": np.float64(0.3)}, path)
    with pytest.raises(CheckpointError, match=r"a pickled numpy.*Where its origin") as caught:
        read_mmseg(path, labels=SEVEN)
    command = shlex.split(str(caught.value).partition("import those: ")[2])
    assert command[:2] == ["python", "-c"]
    exec(command[2], {})
    found = read_mmseg(tmp_path / "it's trained here-weights.pth", labels=SEVEN)
    assert len(found.mapped) == len(state)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(
    tmp_path: Path, state: State, legacy: bool, keep: float
) -> None:
    path = tmp_path / "cut.pth"
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"cut\.pth is not a readable torch file") as caught:
        read_mmseg(path, labels=SEVEN)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_within_a_name_is_none_of_another_origin(tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    torch.save(
        {"state_dict": {"weight": torch.zeros(3)}}, path, _use_new_zipfile_serialization=False
    )
    data = path.read_bytes()
    for kept in range(len(data)):
        path.write_bytes(data[:kept])
        with pytest.raises(CheckpointError, match=r"cut\.pth is not a readable torch file"):
            read_mmseg(path, labels=SEVEN)


def test_files_that_hold_no_state_dict_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    with pytest.raises(CheckpointError, match="is no file"):
        read_state(path)
    path.write_text("some notes\n" * 100)
    with pytest.raises(CheckpointError, match="is not a readable torch file"):
        read_state(path)
    for content in ([1, 2], {}, {"state_dict": [1]}, torch.zeros(3)):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="holds no state dict"):
            read_state(path)
    path = path.with_suffix(".safetensors")
    path.write_bytes(b"0" * 64)
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        read_state(path)
