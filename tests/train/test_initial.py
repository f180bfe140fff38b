from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from knet_runtime.errors import CheckpointError, ConfigError
from knet_runtime.labels import LabelMap
from knet_train.checkpoint import load_initial, load_pretrained, save_checkpoint
from knet_train.config import Config
from knet_train.fit import RunResult
from knet_train.models.backbones import build_backbone
from knet_train.models.build import build_model

UPER = (
    "model.backbone=resnet18",
    "model.head=uper",
    "model.auxiliary_channels=16",
    "loss.auxiliary_weight=0.4",
)


@pytest.fixture
def config(tiny_config: Callable[..., Config]) -> Config:
    return tiny_config(*UPER)


@pytest.fixture
def five(config: Config, tmp_path: Path) -> Path:
    """A checkpoint with an auxiliary classifier and five classes."""
    torch.manual_seed(5)
    path = tmp_path / "five.safetensors"
    labels = LabelMap(tuple("abcde"), tuple((i, i, i) for i in range(5)), 255)
    save_checkpoint(path, build_model(config.model, 5), config, labels)
    return path


def change(path: Path, **weights: torch.Tensor | None) -> None:
    """Replace weights in a checkpoint (its dots as __), or take them out."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    for name, value in weights.items():
        key = name.replace("__", ".")
        state.pop(key, None)
        if value is not None:
            state[key] = value
    save_file(state, path, metadata)


def test_everything_but_the_classifiers_is_taken(
    config: Config, five: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(config.model, 3)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        load_initial(model, five)
    stored, after = load_file(five), model.state_dict()
    classifiers = {key for key in after if key.rpartition(".")[0].endswith("conv_seg")}
    assert len(classifiers) == 4
    for key, value in after.items():
        assert torch.equal(value, fresh[key] if key in classifiers else stored[key]), key
    assert "conv_seg.weight" in caplog.text
    assert f"{len(after) - 4} of {len(after)} weights taken" in caplog.text


def test_as_many_classes_keep_their_classifiers(config: Config, five: Path) -> None:
    model = build_model(config.model, 5)
    load_initial(model, five)
    stored = load_file(five)
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())


def test_an_auxiliary_classifier_comes_and_goes(
    config: Config, five: Path, tiny_config: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    without = build_model(tiny_config(*UPER[:2]).model, 5)
    load_initial(without, five)
    absent = {k.replace(".", "__"): None for k in load_file(five) if k.startswith("auxiliary.")}
    change(five, **absent)
    load_initial(build_model(config.model, 5), five)
    assert "auxiliary.conv.0.weight" in caplog.text


def test_what_does_not_fit_is_named(config: Config, five: Path) -> None:
    model = build_model(config.model, 5)
    stored = load_file(five)
    name = "head.fuse.0.weight"
    change(five, head__fuse__0__weight=torch.zeros(1))
    with pytest.raises(CheckpointError, match=rf"five.* has {name} as \[1\]"):
        load_initial(model, five)
    change(five, head__fuse__0__weight=None)
    with pytest.raises(CheckpointError, match=rf"no weight {name}: it is another arch"):
        load_initial(model, five)
    change(five, head__fuse__0__weight=stored[name] * float("nan"))
    with pytest.raises(CheckpointError, match=rf"{name} holds values that are not finite"):
        load_initial(model, five)
    change(five, head__fuse__0__weight=stored[name], extra=torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"the weight extra, which the model has not"):
        load_initial(model, five)


def test_other_files_are_refused(config: Config, tmp_path: Path) -> None:
    model = build_model(config.model, 5)
    plain, text = tmp_path / "plain.safetensors", tmp_path / "text.safetensors"
    save_file({"a": torch.zeros(1)}, plain)
    text.write_text(json.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"plain\.safetensors is no checkpoint of"):
        load_initial(model, plain)
    for path in (text, tmp_path / "absent.safetensors"):
        with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
            load_initial(model, path)


def test_a_run_begins_with_another_ones_weights(
    go: Callable[..., RunResult], five: Path, different: Callable[[Path, Path], list[str]]
) -> None:
    frozen = 'optim.layers=[{pattern="[!a]*", lr_scale=0.0}]'
    settings = (*UPER, frozen, "optim.steps=2")
    result = go("run", *settings, backbone_weights=None, init=five)
    changed = [key for key in different(five, result.last) if "conv_seg" not in key]
    assert all(key.startswith("auxiliary.") for key in changed)


def test_two_sources_of_weights_are_one_too_many(
    go: Callable[..., RunResult], five: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="leave out --backbone-weights"):
        go("run", *UPER, init=five)
    assert not (tmp_path / "run").exists()


def test_a_file_of_weights_is_loaded(
    tiny_config: Callable[..., Config], backbone_file: Path
) -> None:
    backbone = build_backbone(tiny_config().model)
    load_pretrained(backbone, tiny_config().model, backbone_file)
    stored = load_file(backbone_file)
    assert all(torch.equal(value, stored[key]) for key, value in backbone.state_dict().items())


def test_a_whole_classifier_serves_too(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    classifier = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    save_file(classifier.state_dict(), tmp_path / "model.safetensors")
    for stride in (4, 8):
        config = tiny_config(f"model.stride={stride}").model
        backbone = build_backbone(config)
        load_pretrained(backbone, config, tmp_path / "model.safetensors")
        assert torch.equal(backbone.state_dict()["conv_stem.weight"], classifier.conv_stem.weight)


def test_the_real_weights_fit(tiny_config: Callable[..., Config], shared_data: Path) -> None:
    config = tiny_config().model
    file = shared_data / "backbones" / "tf_efficientnet_lite0.safetensors"
    load_pretrained(build_backbone(config), config, file)


def test_missing_and_misshapen_weights_are_named(
    tiny_config: Callable[..., Config], backbone_file: Path, tmp_path: Path
) -> None:
    config = tiny_config().model
    state = load_file(backbone_file)
    path = tmp_path / "odd.safetensors"
    save_file({k: v for k, v in state.items() if k != "bn1.weight"}, path)
    with pytest.raises(CheckpointError, match=r"odd\.safetensors .*1 weights missing.*bn1\.weight"):
        load_pretrained(build_backbone(config), config, path)
    save_file({**state, "bn1.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"1 of another shape.*bn1\.weight.*wants timm/"):
        load_pretrained(build_backbone(config), config, path)


def test_unreadable_weights_are_named(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny_config().model
    (tmp_path / "text.safetensors").write_text("words " * 50)
    for name in ("text.safetensors", "absent.safetensors"):
        with pytest.raises(CheckpointError, match=rf"{name} is not a readable .* pass timm/"):
            load_pretrained(build_backbone(config), config, tmp_path / name)


def test_an_unreachable_hub_names_both_ways_out(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(name: str, **_: object) -> None:
        assert name == "hf_hub:timm/tf_efficientnet_lite0.in1k"
        raise ConnectionError("no route to host")

    backbone = build_backbone(tiny_config().model)
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(
        CheckpointError, match=r"ConnectionError.*connect to the network.*--backbone-weights"
    ):
        load_pretrained(backbone, tiny_config().model, None)


def test_the_hubs_weights_are_loaded(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = build_backbone(tiny_config().model)
    create = timm.create_model
    made = []

    def from_hub(name: str, *, pretrained: bool) -> torch.nn.Module:
        assert pretrained
        made.append(create("tf_efficientnet_lite0", pretrained=False))
        return made[0]

    monkeypatch.setattr(timm, "create_model", from_hub)
    load_pretrained(backbone, tiny_config().model, None)
    assert torch.equal(backbone.state_dict()["conv_stem.weight"], made[0].conv_stem.weight)


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "resnet18"])
def test_a_classifier_of_any_backbone_serves(
    tiny_config: Callable[..., Config], tmp_path: Path, name: str
) -> None:
    config = tiny_config("model.head=uper", f"model.backbone={name}").model
    classifier = timm.create_model(name, pretrained=False)
    save_file(classifier.state_dict(), tmp_path / "model.safetensors")
    backbone = build_backbone(config)
    load_pretrained(backbone, config, tmp_path / "model.safetensors")
    stored = {k.replace(".", "_"): v for k, v in classifier.state_dict().items()}
    loaded = {k.replace(".", "_"): v for k, v in backbone.state_dict().items() if k[:5] != "norms"}
    assert loaded
    assert all(torch.equal(value, stored[key]) for key, value in loaded.items())


@pytest.mark.parametrize("home", ["usable", "none", "a file"])
def test_without_a_home_fetched_weights_are_used_and_not_kept(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    from huggingface_hub import constants

    (tmp_path / "file").write_text("no folder")
    cache = {"usable": f"{tmp_path}/hub", "none": "~nobody-of-that-name/hub"}.get(home)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache or f"{tmp_path}/file/hub")
    classifier = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    kept: list[str | None] = []

    def fetch(name: str, *, pretrained: bool, cache_dir: str | None = None) -> torch.nn.Module:
        assert pretrained
        assert name == "hf_hub:timm/tf_efficientnet_lite0.in1k"
        assert cache_dir is None or not list(Path(cache_dir).iterdir())
        kept.append(cache_dir)
        return classifier

    config = tiny_config().model
    backbone = build_backbone(config)
    monkeypatch.setattr(timm, "create_model", fetch)
    load_pretrained(backbone, config, None)
    assert torch.equal(backbone.state_dict()["conv_stem.weight"], classifier.conv_stem.weight)
    (folder,) = kept
    assert (folder is None) == (home == "usable")
    assert folder is None or not Path(folder).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
