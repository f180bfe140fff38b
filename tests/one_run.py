"""A small training run in a process of its own: ``python one_run.py JOB.json``.

What it is to do stands in the file; see ``Job``. Tests kill it, and start many of it.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec


class Job(msgspec.Struct):
    settings: list[str]  # overrides of knet-edge
    data: str
    run: str
    backbone: str
    losses: str  # the first process writes the loss of every step here
    resume: bool = False
    die_at: int = 0  # at the start of this step …
    die_rank: int = 0  # … this process kills itself


def run(path: Path) -> None:
    import pytorch_lightning as pl  # not for who only imports this file
    import torch

    from knet_train.config import load_config
    from knet_train.fit import train

    class Watch(pl.Callback):
        def __init__(self, job: Job) -> None:
            self.job = job
            self.losses: dict[int, float] = {}

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            here = (trainer.global_step + 1, trainer.global_rank)
            if here == (self.job.die_at, self.job.die_rank):
                os.kill(os.getpid(), signal.SIGKILL)

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.losses[trainer.global_step] = float(trainer.callback_metrics["loss"])
            if trainer.is_global_zero:
                Path(self.job.losses).write_text(json.dumps(self.losses))

    torch.set_num_threads(1)
    gc.disable()  # what a run leaves behind must not depend on when garbage is collected
    job = msgspec.json.decode(path.read_bytes(), type=Job)
    config = load_config("knet-edge", job.settings)
    train(
        config,
        Path(job.data),
        Path(job.run),
        backbone_weights=Path(job.backbone),
        resume=job.resume,
        callbacks=[Watch(job)],
    )


def forked(path: Path, variables: dict[str, str], errors: Path) -> None:
    """``run`` with these environment variables, and its stderr in a file."""
    os.environ.update(variables)
    with errors.open("w") as stderr:
        os.dup2(stderr.fileno(), 2)
    run(path)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
