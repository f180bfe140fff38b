"""Published K-Nets for instances and panoptic segmentation become checkpoints of ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from narrow_knet import NarrowResNet

from knet_deploy.cli.main import main
from knet_runtime.errors import CheckpointError, OutputError
from knet_runtime.labels import LabelMap, distinct_palette
from knet_train import published
from knet_train.checkpoint import read_checkpoint, read_segment_checkpoint
from knet_train.config import load_config
from knet_train.data.layouts import COCO, COCO_THINGS, load_labels_json
from knet_train.models import build
from knet_train.models.build import build_segment_model
from knet_train.models.segments import SegmentKNet
from knet_train.published import import_published, published_name, read_published

NARROW = (
    *("model.channels=64", "model.update_channels=64", "model.ffn_channels=192"),
    "data.eval_size=[96,128]",
)
State = dict[str, torch.Tensor]


@pytest.mark.parametrize(
    ("preset", "keys", "count"),
    [
        ("knet-r50-fpn-instance", "keys_inst", 37_482_368),
        ("knet-r50-fpn-panoptic", "keys_pan", 37_536_852),
        ("knet-r101-fpn-instance", "keys_r101", 56_474_496),
        ("knet-r101-fpn-panoptic", None, 56_528_980),
        ("knet-swin-l-panoptic", "keys_swin", 208_781_224),
    ],
)
def test_the_presets_have_the_published_weights_and_no_other(
    unified: Path, preset: str, keys: str | None, count: int
) -> None:
    config = load_config(preset).model
    labels = COCO if config.task == "panoptic" else COCO_THINGS
    with torch.device("meta"):
        model = build_segment_model(config, labels)
    assert sum(weight.numel() for weight in model.parameters()) == count
    if keys is None:
        return
    published = {}
    for line in (unified / f"{keys}.txt").read_text().splitlines():
        name, shape, *_ = line.split("\t")
        published[name] = math.prod(int(side) for side in shape.strip("(),").split(",") if side)
    ours = {published_name(name): value.numel() for name, value in model.state_dict().items()}
    follows = {name for name in published if name.endswith("relative_position_index")}
    assert ours == {name: size for name, size in published.items() if name not in follows}


@pytest.fixture
def narrow_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The R-50 presets and their backbone at the widths of the stored networks."""
    load = published.load_config
    monkeypatch.setattr(published, "load_config", lambda name: load(name, NARROW))
    monkeypatch.setattr(build, "build_backbone", lambda _: NarrowResNet())
    monkeypatch.setattr(build, "level_channels", lambda _: [16, 32, 64, 128])


@pytest.fixture
def state(unified: Path) -> State:
    loaded: State = torch.load(unified / "pan" / "checkpoint.pth", weights_only=True)["state_dict"]
    return loaded


@pytest.mark.usefixtures("narrow_presets")
@pytest.mark.parametrize(("task", "name"), [("inst", "instance"), ("pan", "panoptic")])
def test_a_published_file_becomes_a_checkpoint_that_gives_the_same(
    unified: Path,
    narrow: Callable[[str], SegmentKNet],
    tmp_path: Path,
    task: str,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "ours.safetensors"
    source = str(unified / task / "checkpoint.pth")
    assert main(["import-knet", source, "-o", str(output)]) == 0
    out = capsys.readouterr().out
    assert f"preset       knet-r50-fpn-{name}\n" in out
    assert f"task         {name}, 100 objects at once\n" in out
    assert "mapped       502 of 502 keys\n" in out
    found = read_segment_checkpoint(output)
    assert found.labels == (COCO if task == "pan" else COCO_THINGS)
    images = torch.randint(0, 256, (1, 64, 96, 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = found.model(images), narrow(task)(images)
    assert torch.equal(ours.classes, theirs.classes)
    assert torch.equal(ours.masks, theirs.masks)
    with pytest.raises(OutputError, match="--force"):
        import_published(Path(source), output)
    with pytest.raises(CheckpointError, match=f"a network for {name} segmentation"):
        read_checkpoint(output)


@pytest.mark.usefixtures("narrow_presets")
def test_other_classes_are_named_by_the_user(state: State, tmp_path: Path) -> None:
    for name in list(state):
        if "conv_seg" in name or "fc_cls" in name:
            state[name] = state[name][:5].clone()
    file = tmp_path / "mine.pth"
    torch.save(state, file)
    with pytest.raises(CheckpointError, match="5 classes, which are not COCO's 80 or 133"):
        read_published(file)
    names = tmp_path / "labels.json"
    names.write_text('{"class_names": ["car", "man", "sky", "road", "wall"], "things": ["car"]}')
    found = read_published(file, labels=load_labels_json(names))
    assert (found.config.model.task, found.labels.things) == ("panoptic", (0,))
    assert found.model.stuff == (1, 2, 3, 4)
    names.write_text('{"class_names": ["sky", "car", "man", "road", "wall"], "things": ["car"]}')
    with pytest.raises(CheckpointError, match="have them first"):
        read_published(file, labels=load_labels_json(names))
    four = LabelMap(tuple("abcd"), distinct_palette(4), 255, (0,))
    with pytest.raises(CheckpointError, match="5 classes, and the label map 4"):
        read_published(file, labels=four)


@pytest.mark.usefixtures("narrow_presets")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda state: state.pop("rpn_head.init_kernels.weight"),
            "semantic ones go to import-mmseg",
        ),
        (
            lambda state: state.update({"backbone.layer2.0.conv2.conv_offset.weight": state["x"]}),
            "deformable convolutions",
        ),
        (lambda state: state.pop("neck.fpn_convs.2.conv.bias"), "lacks neck.fpn_convs.2.conv.bias"),
        (
            lambda state: state.update({"rpn_head.other": state["x"]}),
            "it has rpn_head.other, which",
        ),
        (
            lambda state: state["roi_head.mask_head.1.fc_cls.bias"].fill_(float("nan")),
            "fc_cls.bias has values that are NaN",
        ),
        (lambda state: state.pop("rpn_head.conv_seg.bias"), "conv_seg.bias is missing"),
    ],
)
def test_what_is_no_such_network_is_named(
    state: State, tmp_path: Path, spoil: Callable[[State], object], message: str
) -> None:
    state["x"] = torch.zeros(1)
    spoil(state)
    state.pop("x")
    file = tmp_path / "spoilt.pth"
    torch.save({"state_dict": state}, file)
    with pytest.raises(CheckpointError, match=message):
        read_published(file)


def test_a_preset_of_the_other_task_is_refused(unified: Path) -> None:
    file = unified / "pan" / "checkpoint.pth"
    with pytest.raises(CheckpointError, match="panoptic segmentation by its classes"):
        read_published(file, preset="knet-r50-fpn-instance")
