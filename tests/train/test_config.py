from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from knet_runtime.errors import ConfigError
from knet_train.config import Config, decode_config, load_config, presets


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_carries_its_own_name(name: str) -> None:
    assert load_config(name).preset == name


def test_there_is_an_edge_preset() -> None:
    assert "knet-edge" in presets()


def test_configuration_survives_json() -> None:
    config = load_config("knet-edge")
    assert msgspec.json.decode(msgspec.json.encode(config), type=Config) == config
    assert decode_config(msgspec.json.decode(msgspec.json.encode(config))) == config


def test_overrides_are_toml_values_and_bare_words() -> None:
    config = load_config(
        "knet-edge",
        [
            "optim.lr=1e-4",
            "data.train_split=blocked_train",
            'data.val_split = "blocked val"',
            "data.crop=[128, 256]",
            "trainer.precision=32-true",
            "optim.weight_decay=0",
        ],
    )
    assert config.optim.lr == 1e-4
    assert config.data.train_split == "blocked_train"
    assert config.data.val_split == "blocked val"
    assert config.data.crop == (128, 256)
    assert config.trainer.precision == "32-true"
    assert config.optim.weight_decay == 0


def test_the_last_override_of_a_key_wins() -> None:
    assert load_config("knet-edge", ["optim.steps=5", "optim.steps=7"]).optim.steps == 7


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.learning_rate=1", r"unknown key 'learning_rate'; known here: .*lr"),
        ("optm.lr=1", "no section 'optm'"),
        ("optim.lr.peak=1", "no section 'lr'"),
        ("optim.lr", "section.key=value"),
        ("=1", "section.key=value"),
        ("optim.lr=fast", r"Expected `float`, got `str`.*optim.lr"),
        ("optim.steps=1.5", r"Expected `int`.*optim.steps"),
        ("model.backbone=50", "Expected `str`.*model.backbone"),
        ("model.head=mlp", "mlp.*model.head"),
        ("model.head=fcn", r"head fcn works .* stride 4 must be output_stride 32"),
        ("model.update_channels=100", "channels 128 must be a multiple of update_channels 100"),
        ("model.auxiliary_channels=-1", r"Expected `int` >= 0 .*model\.auxiliary_channels"),
        ("model=3", r"Expected `object`.*model"),
        ("data.crop=[64]", "data.crop"),
        ("data.crop=[16, 64]", r"Expected `int` >= 32 .*data\.crop\[0\]"),
        ("data.scale=[2.0, 1.0]", "smallest, largest"),
        ("data.aspect=0.5", r"Expected `float` >= 1\.0 .*data\.aspect"),
        ("data.synthetic_share=1.5", r"Expected `float` <= 1\.0 .*data\.synthetic_share"),
        ("data.flip=-0.1", r"Expected `float` >= 0\.0 .*data\.flip"),
        ("model.heads=3", "channels 128 must be a multiple of heads 3"),
        ("model.heads=0", r"Expected `int` >= 1 .*model\.heads"),
        ("model.dropout=1", r"Expected `float` < 1\.0 .*model\.dropout"),
        ("loss.early_label_stride=0", r"Expected `int` >= 1 .*loss\.early_label_stride"),
        ("loss.stage_weights=[1, 1]", "has 2 entries; model.stages = 3 needs 4"),
        ("loss.stage_weights=[1, 1, 1, -1]", r"Expected `float` >= 0\.0 .*loss\.stage_weights"),
        ("model.stages=-1", r"Expected `int` >= 0 .*model\.stages"),
        ("model.stages=2", "stage_weights has 4 entries; model.stages = 2 needs 3"),
        ("optim.steps=0", r"Expected `int` >= 1 .*optim\.steps"),
        ("optim.lr=nan", r"Expected `float` > 0\.0 .*optim\.lr"),
        ("optim.ema_decay=1", r"Expected `float` < 1\.0 .*optim\.ema_decay"),
        ("optim.accumulate=3", "batch_size 8 must be a multiple of accumulate 3"),
        ("optim.milestones=[5, 5]", "milestones must rise"),
        ('optim.layers=[{pattern="*", lr_scale=-1.0}]', r"Expected `float` >= 0\.0 .*lr_scale"),
        ("loss.auxiliary_weight=0.4", "auxiliary_weight needs model.auxiliary_channels"),
        ("loss.mean_over=some", "some.*loss.mean_over"),
        ("trainer.val_every=0", r"Expected `int` >= 1 .*trainer\.val_every"),
        ("trainer.devices=-1", r"Expected `int` >= 0 .*trainer\.devices"),
    ],
)
def test_a_bad_override_is_refused_by_name(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config("knet-edge", [override])


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"no preset named 'knet-huge': use one of knet-edge"):
        load_config("knet-huge")


def _toml(value: object) -> str:
    match value:
        case dict():
            return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(_toml(v) for v in value) + "]"
    return msgspec.json.encode(value).decode()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The edge preset as a user's file."""
    raw = msgspec.to_builtins(load_config("knet-edge"))
    path = tmp_path / "own.toml"
    lines = []
    for key, value in raw.items():
        if isinstance(value, dict):
            lines.append(f"[{key}]")
            lines += [f"{k} = {_toml(v)}" for k, v in value.items()]
        else:
            lines.append(f"{key} = {_toml(value)}")
    path.write_text("\n".join(lines))
    return path


def test_a_users_file_is_read_and_overridden(own: Path) -> None:
    config = load_config(str(own), ["optim.steps=9"])
    assert config.model == load_config("knet-edge").model
    assert config.optim.steps == 9


def test_a_misspelt_key_in_a_file_is_refused_by_name(own: Path) -> None:
    own.write_text(own.read_text().replace("clip_norm", "clip_nrom"))
    with pytest.raises(ConfigError, match=r"own\.toml.*clip_nrom.*optim"):
        load_config(str(own))


def test_a_missing_key_and_an_unknown_section_are_refused_by_name(own: Path) -> None:
    text = own.read_text()
    own.write_text(text.replace("flip = 0.5\n", ""))
    with pytest.raises(ConfigError, match="flip"):
        load_config(str(own))
    own.write_text(text + "\n[extra]\nx = 1\n")
    with pytest.raises(ConfigError, match="extra"):
        load_config(str(own))


def test_broken_toml_names_file_and_line(own: Path) -> None:
    own.write_text("preset = = 1")
    with pytest.raises(ConfigError, match=r"own\.toml.*line 1"):
        load_config(str(own))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load_config(str(tmp_path / "absent.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.toml"):
        load_config(str(tmp_path / "folder.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bytes\.toml"):
        load_config(str(tmp_path / "bytes.toml"))
