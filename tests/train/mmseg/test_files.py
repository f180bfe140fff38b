"""Files with a K-Net of mmsegmentation, of every layout, and what the command says of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from knet_deploy.cli.main import main
from knet_runtime.errors import OutputError
from knet_runtime.labels import LabelMap, distinct_palette
from knet_train.checkpoint import load_checkpoint
from knet_train.data.layouts import ADE20K
from knet_train.foreign import read_state
from knet_train.mmseg import import_mmseg, read_mmseg

SEVEN = LabelMap(tuple("abcdefg"), distinct_palette(7), 255)
State = dict[str, torch.Tensor]


def save(path: Path, state: State) -> Path:
    torch.save({"state_dict": state}, path)
    return path


def test_the_file_is_written_as_a_checkpoint_of_ours(pth: Path, tmp_path: Path) -> None:
    output = tmp_path / "ckpt.safetensors"
    found = import_mmseg(pth, output, labels=SEVEN)
    assert (found.config.preset, found.guessed, found.auxiliary) == ("r50-fcn", True, True)
    assert not found.dropped
    model = load_checkpoint(output)
    expected = found.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    with pytest.raises(OutputError, match=r"there already: pass --force"):
        import_mmseg(pth, output, labels=SEVEN)
    import_mmseg(pth, output, labels=SEVEN, replace_output=True)


@pytest.mark.parametrize("layout", ["old zip", "legacy", "bare", "module.", "safetensors", "half"])
def test_every_layout_of_a_file_is_read(
    pth: Path, tmp_path: Path, state: State, layout: str
) -> None:
    path = tmp_path / "other.pth"
    meta = {"mmcv_version": "1.3.9", "CLASSES": ["wall"], "PALETTE": [[1, 2, 3]], "iter": 80000}
    match layout:
        case "old zip":
            torch.save({"meta": meta, "state_dict": state}, path)
        case "legacy":  # as mmcv's publish_model.py wrote them
            file = {"meta": meta, "state_dict": state}
            torch.save(file, path, _use_new_zipfile_serialization=False)
        case "bare":
            torch.save(state, path)
        case "module.":
            save(path, {f"module.{key}": value for key, value in state.items()})
        case "safetensors":
            path = path.with_suffix(".safetensors")
            save_file(state, path)
        case "half":
            save(path, {k: v.half() if v.is_floating_point() else v for k, v in state.items()})
    expected = read_mmseg(pth, labels=SEVEN).model.state_dict()
    tolerance = 1e-3 if layout == "half" else 0.0
    for key, value in read_mmseg(path, labels=SEVEN).model.state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=tolerance, rtol=tolerance)


def test_without_an_auxiliary_head_the_checkpoint_has_none(tmp_path: Path, state: State) -> None:
    plain = {key: value for key, value in state.items() if not key.startswith("auxiliary_head.")}
    output = tmp_path / "ckpt.safetensors"
    found = import_mmseg(save(tmp_path / "plain.pth", plain), output, labels=SEVEN)
    assert not found.auxiliary
    assert found.config.model.auxiliary_channels == 0
    assert found.config.loss.auxiliary_weight == 0
    assert load_checkpoint(output).auxiliary is None


def test_batchnorm_counters_may_be_absent(tmp_path: Path, state: State) -> None:
    few = {key: value for key, value in state.items() if not key.endswith("batches_tracked")}
    found = read_mmseg(save(tmp_path / "few.pth", few), labels=SEVEN)
    assert len(found.absent) == len(state) - len(few) > 0
    assert set(found.mapped) == set(few)


def test_dropped_keys_are_listed_and_logged(
    tmp_path: Path, state_of: Callable[[str], State], caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / "swin.pth", state_of("swin_t_upernet"))
    with caplog.at_level(logging.INFO, "knet_train"):
        found = read_mmseg(path, preset="swin-t-upernet", labels=SEVEN)
    key = "backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"
    assert found.dropped[key] == "follows from the window's size"
    assert any(key in message for message in caplog.messages)
    assert len(found.mapped) + len(found.dropped) == len(read_state(path))


def test_150_classes_are_ade20ks(tmp_path: Path, state: State) -> None:
    for name in ("decode_head.kernel_generate_head.conv_seg", "auxiliary_head.conv_seg"):
        for leaf in ("weight", "bias"):
            value = state[f"{name}.{leaf}"]
            state[f"{name}.{leaf}"] = torch.zeros(150, *value.shape[1:])
    assert read_mmseg(save(tmp_path / "ade.pth", state)).labels == ADE20K


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = main(["import-mmseg", *(str(word) for word in words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def labels_json(tmp_path: Path) -> Path:
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"class_names": list("abcdefg")}))
    return path


def test_the_command_says_what_became_of_the_keys(
    tmp_path: Path,
    state_of: Callable[[str], State],
    labels_json: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    swin = state_of("swin_t_upernet")
    plain = {key: value for key, value in swin.items() if not key.startswith("auxiliary_head.")}
    path, output = save(tmp_path / "swin.pth", plain), tmp_path / "out.safetensors"
    words = ("--preset", "swin-t-upernet", "--labels", labels_json, "-o", output)
    code, out, err = run(capsys, path, *words)
    assert (code, err) == (0, "")
    assert "swin-t-upernet, and the keys agree" in out
    assert f"{len(plain) - 8} of {len(plain)} keys" in out
    assert "8 × *.relative_position_index: follows from the window's size" in out
    assert "no auxiliary_head in the file" in out
    assert load_checkpoint(output).conv_seg.out_channels == 7
    code, _, err = run(capsys, path, *words)
    assert code == 2
    assert "pass --force" in err
    assert run(capsys, path, *words, "--force")[0] == 0


def test_the_command_guesses_and_refuses_in_one_line(
    pth: Path, tmp_path: Path, labels_json: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.safetensors"
    code, out, _ = run(capsys, pth, "-o", output, "--labels", labels_json)
    assert code == 0
    assert "r50-fcn, guessed from the keys" in out
    output.unlink()
    code, _, err = run(capsys, pth, "-o", output)
    assert code == 2
    assert err.startswith("knet-deploy: error: ")
    assert len(err.splitlines()) == 1
    assert not output.exists()
