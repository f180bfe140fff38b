"""Step time and peak memory of training: our K-Nets against mmsegmentation's own.

    python benchmarks/train_step.py --reference-python REFENV/bin/python --reference FOLDER

A step is forward, loss and backward of one batch, in float32: cross-entropy on four stages and 0.4
times the auxiliary classifier's, at label size. That both sides compute the same loss from the same
weights is checked first, with dropout and stochastic depth off. Then a process of each side takes
steps in turns, one at a time, so that whatever else the machine does meets both.
README.md beside this file says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REFERENCES = {
    "r50-fcn": "r50_fcn",
    "r50-pspnet": "r50_pspnet",
    "r50-deeplabv3": "r50_deeplabv3",
    "r50-upernet": "r50_upernet",
    "swin-t-upernet": "swin_t_upernet",
    "swin-l-upernet-512": "swin_l_upernet_512",
    "swin-l-upernet-640": "swin_l_upernet_640",
}
CLASSES = 150
LARGEST_LOSS_DIFFERENCE = 1e-4  # relative

Loss = Callable[[], torch.Tensor]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reference-python", required=True, help="python with mmsegmentation")
    parser.add_argument("--reference", type=Path, required=True, help="folder of make_refs.py")
    parser.add_argument("--presets", nargs="+", choices=REFERENCES, default=list(REFERENCES))
    parser.add_argument("--size", type=int, default=128, help="height and width of an image")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="timed in each process, after two")
    parser.add_argument("--repetitions", type=int, default=3, help="pairs of processes")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    # What the processes of the two sides are told.
    parser.add_argument("--side", choices=("ours", "mmsegmentation"), help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def batch(size: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """RGB uint8 [B, H, W, 3] and labels int64 [B, H, W], a tenth of them ignored."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, size, size, 3), generator=draw, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (count, size, size), generator=draw)
    labels[torch.rand(labels.shape, generator=draw) < 0.1] = 255
    return images, labels


def ours(options: argparse.Namespace) -> tuple[torch.nn.Module, Loss]:
    from knet_train.config import load_config
    from knet_train.loss import training_loss
    from knet_train.mmseg import read_mmseg
    from knet_train.models.build import build_model

    preset = options.presets[0]
    config = load_config(preset)
    if options.check:
        model = read_mmseg(options.weights, preset=preset).model
    else:
        model = build_model(config.model, CLASSES)
    images, labels = batch(options.size, options.batch)
    weights = torch.ones(CLASSES)

    def loss() -> torch.Tensor:
        stages, auxiliary = model.training_logits(images)
        return training_loss(stages, auxiliary, labels, config.loss, weights, 255)

    return model, loss


def mmsegmentation(options: argparse.Namespace) -> tuple[torch.nn.Module, Loss]:
    sys.path.insert(0, str(options.reference.resolve()))
    import make_refs  # type: ignore[import-not-found]
    from mmengine.structures import PixelData  # type: ignore[import-not-found]
    from mmseg.models.decode_heads import decode_head  # type: ignore[import-not-found]
    from mmseg.structures import SegDataSample  # type: ignore[import-not-found]

    config, model = make_refs.build(REFERENCES[options.presets[0]])
    if options.check:
        torch.manual_seed(0)
        make_refs.randomise(model, 0)
        make_refs.save_checkpoint(model, config, options.weights, options.presets[0])
    # Its accuracy for the log is not part of the loss: left out, in its favour.
    decode_head.accuracy = lambda *_, **__: torch.zeros(())
    images, labels = batch(options.size, options.batch)
    samples = []
    for label in labels:
        sample = SegDataSample(metainfo={"img_shape": label.shape, "ori_shape": label.shape})
        sample.gt_sem_seg = PixelData(data=label[None])
        samples.append(sample)

    def loss() -> torch.Tensor:
        rgb = images.permute(0, 3, 1, 2).float()
        losses = model.loss((rgb - make_refs.MEAN) / make_refs.STD, samples)
        return sum(v for key, v in losses.items() if "loss" in key)  # type: ignore[return-value]

    return model, loss


def work(options: argparse.Namespace) -> None:
    """One process of one side: a line of JSON when it is ready, and one per line that it reads."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, loss = (ours if options.side == "ours" else mmsegmentation)(options)
    model.train()
    if options.check:
        for module in model.modules():
            if "Drop" in type(module).__name__:
                module.eval()
        _say(loss=float(loss().detach()))
        return
    _say(before_mib=_peak_mib(), torch=torch.__version__)
    for _ in sys.stdin:
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        loss().backward()
        _say(seconds=time.perf_counter() - start, peak_mib=_peak_mib())


def _say(**found: object) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 if sys.platform == "linux" else 1024**2)


class Side:
    """A process of one side, which takes a step when it is told to."""

    def __init__(self, side: str, preset: str, options: argparse.Namespace, *more: str) -> None:
        python = sys.executable if side == "ours" else options.reference_python
        words = [python, __file__, "--side", side, "--presets", preset, *more]
        for name in ("reference_python", "reference", "size", "batch", "threads"):
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        self._name = f"{side} {preset}"
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},  # not beside make_refs.py
        )
        self.started = self._answer()

    def step(self) -> dict[str, Any]:
        """Seconds of one step, and the process's peak memory after it."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):  # libraries print, too
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"{self._name} ended without an answer")


def compare(preset: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides of one preset in turns. The ratios, ours / mmsegmentation's, are the median over
    all pairs of steps, one after the other, and that of the median memory."""
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        for side in ("mmsegmentation", "ours"):
            checked = Side(side, preset, options, "--check", "--weights", f"{folder}/model.pth")
            losses.append(checked.started["loss"])
            checked.close()
    difference = abs(losses[1] - losses[0]) / abs(losses[0])
    if difference > LARGEST_LOSS_DIFFERENCE:
        raise SystemExit(f"{preset}: losses {losses[1]} and {losses[0]} are not the same thing")
    found: dict[str, dict[str, list[float]]] = {
        side: {"seconds": [], "peak_mib": [], "step_mib": []} for side in ("ours", "mmsegmentation")
    }
    versions = {}
    for _ in range(options.repetitions):
        sides = {side: Side(side, preset, options) for side in found}
        for number in range(options.steps + 2):
            last = {side: process.step() for side, process in sides.items()}
            for side, step in last.items():
                if number >= 2:
                    found[side]["seconds"].append(round(step["seconds"], 4))
        for side, process in sides.items():
            versions[side] = process.started["torch"]
            found[side]["peak_mib"].append(round(last[side]["peak_mib"], 1))
            grown = last[side]["peak_mib"] - process.started["before_mib"]
            found[side]["step_mib"].append(round(grown, 1))
            process.close()
    row: dict[str, Any] = {"preset": preset, "loss_difference": difference}
    for side, lists in found.items():
        row[side] = {key: statistics.median(values) for key, values in lists.items()}
        row[side] |= {"torch": versions[side], "runs": lists}
    pairs = zip(found["ours"]["seconds"], found["mmsegmentation"]["seconds"], strict=True)
    ratios = [ours / reference for ours, reference in pairs]
    row["ratio"] = {"seconds": round(statistics.median(ratios), 4)}
    for key in ("peak_mib", "step_mib"):
        row["ratio"][key] = round(row["ours"][key] / row["mmsegmentation"][key], 4)
    return row


def main() -> None:
    options = parse()
    if options.side:
        work(options)
        return
    rows = []
    for preset in options.presets:
        rows.append(compare(preset, options))
        sys.stderr.write(f"{preset}: {rows[-1]['ratio']}\n")
    report = {
        "what": "forward + loss + backward, float32, CPU; ratio is ours / mmsegmentation",
        "size": options.size,
        "batch": options.batch,
        "steps": options.steps,
        "repetitions": options.repetitions,
        "threads": options.threads,
        "rows": rows,
    }
    from result import write_result  # mmsegmentation's environment has no knet-deploy

    write_result(report, options.output)


if __name__ == "__main__":
    main()
