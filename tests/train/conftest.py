"""A network and a data folder that train in seconds."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import one_run
import pytest
import torch
from made_once import made_once
from PIL import Image
from safetensors.torch import load_file, save_file

from knet_runtime.labels import LabelMap
from knet_train.config import Config, load_config
from knet_train.models.backbones import build_backbone
from knet_train.models.build import build_model
from knet_train.models.knet import KNet

if TYPE_CHECKING:
    from knet_train.fit import RunResult

TINY = (
    "model.channels=32",
    "model.stages=1",
    "model.heads=2",
    "model.update_channels=32",
    "model.ffn_channels=64",
    "data.eval_size=[64, 96]",
    "data.crop=[64, 64]",
    "data.synthetic_share=0",
    "data.train_split=all",
    "data.val_split=all",
    "loss.stage_weights=[1.0, 1.0]",
    "optim.steps=6",
    "optim.batch_size=2",
    "optim.warmup_steps=2",
    "trainer.val_every=2",
    "trainer.workers=0",
    "trainer.precision=32-true",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and sums keep their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_config() -> Callable[..., Config]:
    """The preset, shrunk; more overrides go on top."""
    return lambda *overrides: load_config("knet-edge", [*TINY, *overrides])


@pytest.fixture
def tiny_labels() -> LabelMap:
    return LabelMap(("road", "sky", "car"), ((128, 64, 128), (0, 0, 255), (255, 0, 0)), 255)


@pytest.fixture
def tiny_model(tiny_config: Callable[..., Config]) -> KNet:
    torch.manual_seed(0)
    return build_model(tiny_config().model, 3).eval()


@pytest.fixture(scope="session")
def backbone_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the whole shape of ImageNet's, without their meaning."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("backbone") / "model.safetensors"
    save_file(build_backbone(load_config("knet-edge").model).state_dict(), path)
    return path


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """A data folder: images by stem (which may hold a folder), coloured by their class."""

    def make(
        stems: Sequence[str] = tuple("abcdef"),
        size: tuple[int, int] = (64, 96),
        classes: Sequence[str] = ("road", "sky", "car"),
        root: str = "data",
    ) -> Path:
        folder = tmp_path / root
        rng = np.random.default_rng(0)
        for stem in stems:
            label = np.zeros(size, np.uint8)
            label[: size[0] // 2] = 1
            top, left = int(rng.integers(size[0] // 2)), int(rng.integers(size[1] // 2))
            label[top : top + size[0] // 3, left : left + size[1] // 3] = 2
            image = np.stack([label * 100, 255 - label * 60, label * 20 + 40], -1)
            image = (image * 0.9 + rng.integers(0, 20, image.shape)).astype(np.uint8)
            label[0] = 255
            write(folder / "images" / f"{stem}.png", image)
            write(folder / "labels" / f"{stem}.png", label)
        (folder / "labels.json").write_text(json.dumps({"class_names": list(classes)}))
        return folder

    return make


@pytest.fixture
def data(make_folder: Callable[..., Path]) -> Path:
    return make_folder()


@pytest.fixture
def go(
    tiny_config: Callable[..., Config], data: Path, tmp_path: Path, backbone_file: Path
) -> Callable[..., RunResult]:
    """A small run in this process, in the folder ``name``."""

    def run(name: str, *overrides: str, **options: Any) -> RunResult:
        from knet_train.fit import train  # Lightning: no need to wait for it in other tests

        config = tiny_config(*overrides)
        options = {"backbone_weights": backbone_file, **options}
        return train(config, data, tmp_path / name, **options)

    return run


@dataclass(frozen=True)
class Whole:
    """A run that nothing interrupted."""

    best: Path
    last: Path
    best_score: float
    losses: dict[int, float]  # of every step
    evaluated: list[int]  # after these steps


@pytest.fixture
def whole(
    tiny_config: Callable[..., Config],
    data: Path,
    backbone_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Whole]:
    """What ``go`` gives with these settings, of one run for all tests."""

    def run(*overrides: str) -> Whole:
        name = hashlib.sha256(" ".join(overrides).encode()).hexdigest()[:8]

        def make(folder: Path) -> None:
            import pytorch_lightning as pl

            from knet_train.fit import train

            losses: dict[int, float] = {}
            evaluated: list[int] = []

            class Watch(pl.Callback):
                def on_train_batch_end(
                    self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any
                ) -> None:
                    losses[trainer.global_step] = float(outputs["loss"])

                def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
                    evaluated.append(trainer.global_step)

            config = tiny_config(*overrides)
            result = train(
                config, data, folder / "run", backbone_weights=backbone_file, callbacks=[Watch()]
            )
            whole = Whole(result.best, result.last, result.best_score, losses, evaluated)
            (folder / "whole.json").write_bytes(msgspec.json.encode(whole, enc_hook=str))

        folder = made_once(tmp_path_factory, f"whole-{name}", make)
        found = (folder / "whole.json").read_bytes()
        return msgspec.json.decode(found, type=Whole, dec_hook=lambda kind, text: kind(text))

    return run


@pytest.fixture
def start(data: Path, tmp_path: Path, backbone_file: Path) -> Iterator[Callable[..., Started]]:
    """The same run in processes of its own: one, ``ranks`` as torchrun would start them, or (with
    trainer.devices=2) one that starts the other itself. They are forks of a process that has
    imported everything, or with ``fresh`` as a user starts them. None of them outlives the test."""
    processes: list[Started] = []

    def launch(
        name: str, *overrides: str, ranks: int = 1, fresh: bool = False, **options: Any
    ) -> Started:
        job = tmp_path / f"{name}-{len(processes)}.json"
        losses = job.with_suffix(".losses")
        job.write_text(
            json.dumps(
                {
                    "settings": [*TINY, *overrides],
                    "data": str(data),
                    "run": str(tmp_path / name),
                    "backbone": str(backbone_file),
                    "losses": str(losses),
                    **options,
                }
            )
        )
        began = Started([], losses)
        processes.append(began)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(ranks):
            torchrun = {
                "TORCHELASTIC_RUN_ID": "test",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            }
            own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            own |= torchrun if ranks > 1 else {}
            made = Fresh if fresh else Forked
            began.processes.append(made(job, own, job.with_suffix(f".{rank}.stderr")))
        return began

    yield launch
    for began in processes:
        for process in began.processes:
            process.kill()
            process.ended()


class Fresh:
    """A process that runs ``one_run.py`` as a command."""

    def __init__(self, job: Path, variables: dict[str, str], _: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, one_run.__file__, str(job)],
            env={**os.environ, **variables},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.poll, self.kill = self._process.poll, self._process.kill
        self.terminate = self._process.terminate

    def ended(self, seconds: float | None = None) -> tuple[int, str]:
        """Exit code and stderr; it, and whatever it started, must end within ``seconds``."""
        text = self._process.communicate(timeout=seconds)[1]
        return self._process.returncode, text


class Forked:
    """The same, forked from a process that has imported PyTorch and Lightning."""

    def __init__(self, job: Path, variables: dict[str, str], errors: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["knet_train.fit"])
        self._errors = errors
        self._process = context.Process(target=one_run.forked, args=(job, variables, errors))
        self._process.start()
        self.kill = self._process.kill

    def ended(self, seconds: float | None = None) -> tuple[int, str]:
        self._process.join(seconds)
        assert self._process.exitcode is not None, "it still runs"
        return self._process.exitcode, self._errors.read_text()


class Started:
    """Processes of one run."""

    def __init__(self, processes: list[Any], losses: Path) -> None:
        self.processes = processes
        self.losses_file = losses

    def ended(self, seconds: float = 400) -> list[tuple[int, str]]:
        """Exit code and stderr of each, which must end within ``seconds``."""
        return [process.ended(seconds) for process in self.processes]

    def losses(self) -> dict[int, float]:
        return {int(k): v for k, v in json.loads(self.losses_file.read_text()).items()}


@pytest.fixture
def different() -> Callable[[Path, Path], list[str]]:
    """Names of the weights that two checkpoints do not share to the last bit."""

    def compare(a: Path, b: Path) -> list[str]:
        first, second = load_file(a), load_file(b)
        shared = first.keys() & second.keys()
        alone = sorted(first.keys() ^ second.keys())
        return alone + [key for key in sorted(shared) if not torch.equal(first[key], second[key])]

    return compare


@pytest.fixture
def reported() -> Callable[[Path], str]:
    """The report beside a checkpoint without what says where and when the run was."""

    def read(beside: Path) -> str:
        page = (beside.parent / "report.html").read_text("utf-8")
        return re.sub(r"<(title|dl|pre)>.*?</\1>", "", page, flags=re.DOTALL)

    return read


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
