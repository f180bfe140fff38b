"""Runs of two processes on this machine's CPU, how a step is shared out, and the CPU's memory."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers.norm_act import convert_sync_batchnorm

from knet_runtime.errors import ConfigError
from knet_train.config import Config
from knet_train.data.batches import StepIndices
from knet_train.devices import keep_freed_memory
from knet_train.fit import RunResult
from knet_train.models.build import build_model
from knet_train.models.knet import KNet

Different = Callable[[Path, Path], list[str]]
# Without dropout, which each process draws for itself, and with frozen norms (which are the only
# ones that do not depend on the batch of one process), two processes compute the very sums of one.
SAME_ARITHMETIC = (
    "model.dropout=0",
    'optim.layers=[{pattern="backbone*.bn*", lr_scale=0.0}, {pattern="head.*", lr_scale=0.0}]',
    "optim.batch_size=4",
    "trainer.val_every=3",
    "trainer.save_every=1",
)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_processes_share_every_step_without_gap_or_overlap(ranks: int) -> None:
    shares = [list(StepIndices(3, 6, 8, rank, ranks)) for rank in range(ranks)]
    for place, step in enumerate((3, 4, 5)):
        size = 8 // ranks
        seen = [i for share in shares for i in share[place * size : (place + 1) * size]]
        assert seen == list(range(step * 8, step * 8 + 8))
    assert len(StepIndices(3, 6, 8, 0, ranks)) == 6 * 8 // ranks


@pytest.mark.slow
def test_two_processes_train_to_the_loss_of_one(
    go: Callable[..., RunResult], start: Callable[..., Any], tmp_path: Path
) -> None:
    """The mean is over labelled pixels, of which the two have different numbers. What is left is
    the order of sums, 1e-7 of a gradient; AdamW's first steps magnify it where gradients are 0."""
    both = start("two", *SAME_ARITHMETIC, "trainer.devices=2", ranks=2)
    alone = start("one", *SAME_ARITHMETIC)
    assert [code for code, _ in both.ended()] == [0, 0]
    assert [code for code, _ in alone.ended()] == [0]
    two, one = both.losses(), alone.losses()
    assert sorted(two) == sorted(one) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(two[1], one[1], rtol=1e-5)
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-3)
    names = {p.name for p in (tmp_path / "two").iterdir()}
    assert names == {p.name for p in (tmp_path / "one").iterdir()}


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_then_resumes_exactly(
    start: Callable[..., Any], different: Different, tmp_path: Path
) -> None:
    settings = ("optim.batch_size=4", "trainer.save_every=1", "trainer.devices=2")
    settings += ("trainer.val_every=3",)
    killed = start("parts", *settings, ranks=2, die_at=3, die_rank=1)
    began = time.monotonic()
    (first, text), (second, _) = killed.ended()
    assert second == -9
    assert first > 0, "the other one must not wait for ever"
    assert time.monotonic() - began < 120
    assert "another process of this run has ended" in text
    resumed = start("parts", *settings, ranks=2, resume=True)
    whole = start("whole", *settings, ranks=2)
    assert [code for code, _ in resumed.ended() + whole.ended()] == [0, 0, 0, 0]
    for name in ("last.safetensors", "best.safetensors"):
        assert not different(tmp_path / "whole" / name, tmp_path / "parts" / name)


@pytest.mark.slow
def test_a_run_starts_its_other_process_itself_and_dies_with_it(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    settings = ("optim.batch_size=4", "trainer.save_every=1", "trainer.devices=2")
    killed = start("run", *settings, fresh=True, die_at=3, die_rank=1)
    ((code, text),) = killed.ended()
    assert code != 0
    assert (tmp_path / "run" / "resume.ckpt").exists(), text
    assert not (tmp_path / "run" / "last.safetensors").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("trainer.devices=2", "optim.batch_size=3"), r"batch_size 3 must be a multiple of .*2"),
        (
            ("trainer.devices=2", "trainer.nodes=2", "optim.batch_size=8", "optim.accumulate=4"),
            r"batch_size 8 must be a multiple of .* 2 × 2 × 4",
        ),
        (("trainer.devices=8", "optim.batch_size=8"), r"split all has 6 images for 8 processes"),
        (("trainer.devices=2", "trainer.sync_batchnorm=true"), r"between GPUs only"),
        (("trainer.nodes=2",), r"nodes is 2, but neither torchrun nor SLURM has started"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    go: Callable[..., RunResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=said):
        go("run", *overrides)
    assert not (tmp_path / "run").exists()


def test_more_processes_than_the_configuration_says_are_refused(
    go: Callable[..., RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each would train alone, and all would write the same files."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were started, but .* 1 × 1"):
        go("run", "trainer.devices=1")


@pytest.mark.parametrize("head", ["psp", "aspp", "uper"])
def test_one_image_per_device_is_refused_where_norms_need_two(
    go: Callable[..., RunResult], tmp_path: Path, head: str
) -> None:
    at = (
        f"model.head={head}",
        "optim.batch_size=2",
        "optim.accumulate=2",
        "model.backbone=resnet18",
    )
    stride = () if head == "uper" else ("model.output_stride=8", "model.stride=8")
    with pytest.raises(ConfigError, match=rf"head {head} pools .* at least 2 ×"):
        go("run", *at, *stride)
    assert not (tmp_path / "run").exists()


def test_synchronised_norms_are_the_same_network(tiny_config: Callable[..., Config]) -> None:
    """torch's own conversion would drop the activations inside the backbone's norms."""
    torch.manual_seed(0)
    model: KNet = build_model(tiny_config().model, 3)
    image = torch.randint(0, 255, (2, 64, 64, 3), dtype=torch.uint8)
    model(image)  # statistics of their own
    model.eval()
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(image)
        converted = convert_sync_batchnorm(model)
        assert list(converted.state_dict()) == names
        torch.testing.assert_close(converted(image), expected)
    parts = [m for m in converted.modules() if not isinstance(m, torch.nn.Sequential)]
    kinds = {type(m).__name__ for m in parts if "Norm" in type(m).__name__}
    assert kinds == {"SyncBatchNormAct", "SyncBatchNorm", "LayerNorm"}


def test_glibc_keeps_freed_memory_and_large_tensors_still_come_and_go() -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    for _ in range(3):
        assert float(torch.ones(10_000_000).sum()) == 10_000_000


@pytest.mark.parametrize(("system", "libc"), [("Darwin", ""), ("Linux", "musl")])
def test_freed_memory_is_kept_by_glibc_alone(
    system: str, libc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, ""))
    assert keep_freed_memory() is False
