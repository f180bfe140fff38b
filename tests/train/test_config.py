from __future__ import annotations

import contextlib
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
        ("optim.lr=fast", r"^optim\.lr is 'fast'; it takes a number above 0 to 1e\+09"),
        ("optim.steps=1.5", r"^optim\.steps is 1\.5; it takes a whole number from 1"),
        ("model.backbone=50", r"^model\.backbone is 50; it takes a text"),
        ("model.head=mlp", r"^model\.head is 'mlp'; it takes one of .*aspp, uper, localisation$"),
        ("model.head=fcn", r"head fcn works .* stride 4 must be output_stride 32"),
        ("model.update_channels=100", "channels 128 must be a multiple of update_channels 100"),
        (
            "model.auxiliary_channels=-1",
            r"auxiliary_channels is -1; it takes a whole number from 0",
        ),
        ("model=3", r"^model: Expected `object`"),
        ("data.crop=[64]", "data.crop"),
        (
            "data.crop=[16, 64]",
            r"^data\.crop is \[16, 64\]; .*list of 2: each a whole number from 32",
        ),
        ("data.scale=[2.0, 1.0]", "smallest, largest"),
        ("data.aspect=0.5", r"^data\.aspect is 0\.5; it takes a number from 1 to 8$"),
        ("data.synthetic_share=1.5", r"synthetic_share is 1\.5; it takes a number from 0 to 1$"),
        ("data.flip=-0.1", r"^data\.flip is -0\.1; it takes a number from 0 to 1$"),
        ("model.heads=3", "channels 128 must be a multiple of heads 3"),
        ("model.heads=0", r"^model\.heads is 0; it takes a whole number from 1"),
        ("model.dropout=1", r"^model\.dropout is 1; it takes a number from 0 to below 1$"),
        ("loss.early_label_stride=0", r"early_label_stride is 0; .* from 1 to 32$"),
        ("loss.stage_weights=[1, 1]", "has 2 entries; model.stages = 3 needs 4"),
        (
            "loss.stage_weights=[1, 1, 1, -1]",
            r"stage_weights is \[1, 1, 1, -1\]; it takes a list, each a number from 0",
        ),
        ("model.stages=-1", r"^model\.stages is -1; it takes a whole number from 0 to 32$"),
        ("model.stages=2", "stage_weights has 4 entries; model.stages = 2 needs 3"),
        ("optim.steps=0", r"^optim\.steps is 0; it takes a whole number from 1"),
        ("optim.lr=nan", r"^optim\.lr is nan; it takes a number above 0"),
        ("optim.ema_decay=1", r"^optim\.ema_decay is 1; .* to below 1$"),
        ("optim.accumulate=3", "batch_size 8 must be a multiple of accumulate 3"),
        ("optim.milestones=[5, 5]", "milestones must rise"),
        (
            'optim.layers=[{pattern="*", lr_scale=-1.0}]',
            r"^optim\.layers is .* lr_scale = a number from 0",
        ),
        ("loss.auxiliary_weight=0.4", "auxiliary_weight needs model.auxiliary_channels"),
        ("loss.mean_over=some", r"^loss\.mean_over is 'some'; it takes one of all, labelled$"),
        (
            "trainer.precision=fp16",
            r"^trainer\.precision is 'fp16'; it takes one of auto, 32-true, 16-mixed, bf16-mixed$",
        ),
        ("model.channels=1000000", r"^model\.channels is 1000000; .* from 1 to 8,192$"),
        ("model.stride=5", r"^model\.stride is 5; it takes one of 4, 8$"),
        ("model.std=[0.0, 1.0, 1.0]", r"^model\.std is .* each a number from 0\.001 to 1,000$"),
        ("model.mean=[nan, 0.0, 0.0]", r"^model\.mean is \[nan"),
        ("loss.class_balance=inf", r"^loss\.class_balance is inf; .* from 0 to 10$"),
        ("optim.power=-1.0", r"^optim\.power is -1\.0; .* from 0 to 10$"),
        ("optim.batch_size=1000000", r"^optim\.batch_size is 1000000; .* to 65,536$"),
        ("optim.decay_vectors=1", r"^optim\.decay_vectors is 1; it takes true or false$"),
        ("optim.milestones=[-5]", r"^optim\.milestones is \[-5\]; it takes a list, each a whole"),
        ("trainer.seed=4294967296", r"^trainer\.seed is 4294967296; .* to 4,294,967,295$"),
        ("trainer.workers=1000000", r"^trainer\.workers is 1000000; .* from 0 to 1,024$"),
        ("loss.stage_weights=[0, 0, 0, 0]", "all 0: nothing would be learnt"),
        ("trainer.val_every=0", r"^trainer\.val_every is 0; it takes a whole number from 1"),
        ("trainer.devices=-1", r"^trainer\.devices is -1; it takes a whole number from 0"),
    ],
)
def test_a_bad_override_is_refused_by_name(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_config("knet-edge", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf", "-inf", "1e300", "1000000000000"])
def test_no_number_of_a_preset_is_without_bounds(value: str) -> None:
    """Absurd values are refused; what is taken is a value that means something."""
    for section, fields in msgspec.to_builtins(load_config("knet-edge")).items():
        if section == "preset":
            continue
        for key, old in fields.items():
            if isinstance(old, bool) or not isinstance(old, int | float):
                continue
            with contextlib.suppress(ConfigError):
                config = load_config("knet-edge", [f"{section}.{key}={value}"])
                assert -1 <= getattr(getattr(config, section), key) <= 1, (section, key)


def test_a_file_with_a_byte_order_mark_is_read(own: Path) -> None:
    own.write_bytes(b"\xef\xbb\xbf" + own.read_bytes())
    assert load_config(str(own)).preset == "knet-edge"


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
    with pytest.raises(ConfigError, match=r"own\.toml: optim: .*clip_nrom"):
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
