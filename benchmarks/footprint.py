"""What the base install weighs against one with torch: disk, import time, memory of a run.

    python benchmarks/footprint.py --output benchmarks/results/footprint.json

run with a python that has the train extra. The base install is made by pip in a fresh virtual
environment, from this checkout. Imports and runs alternate between the two sides, each in a process
of its own.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import numpy as np
from result import parser_of, write_result

REPOSITORY = Path(__file__).resolve().parent.parent
PATHS = [str(REPOSITORY / folder) for folder in ("knet_deploy", "train", "export", "runtime")]
IMPORTS = {
    "knet_runtime": "import knet_runtime",
    "run": "import knet_runtime.segmenter, knet_runtime.pipeline, "
    "knet_runtime.sources, knet_runtime.sinks, knet_runtime.engines.onnxruntime",
    "torch": "import torch",
}
TIMED = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
# The same loop on both sides: read a file, segment each frame, write the overlay.
RUN = f"""
import sys
from knet_deploy.cli.main import main
assert main(["run", sys.argv[1], "-o", sys.argv[2], "--engine", "onnxruntime-cpu"]) == 0
{PEAK}
"""
LOOP = f"""
import sys
import torch
from torch.nn.functional import interpolate
from knet_runtime.bundle.store import default_bundle_path, open_bundle
from knet_runtime.preprocess import fit_to_input
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks import OverlayVideo
from knet_runtime.sources import open_source
from knet_train.models.build import build_model
from knet_train.config import load_config

manifest = open_bundle(default_bundle_path()).manifest
config = load_config(manifest.provenance.preset)
model = build_model(config.model, manifest.labels.num_classes).eval()
with torch.inference_mode(), open_source(sys.argv[1]) as source:
    sink = OverlayVideo(sys.argv[2], source.info)
    for frame in source:
        image, _ = fit_to_input(frame.image, manifest.input)
        logits = model(torch.from_numpy(image)[None])
        large = interpolate(logits, frame.image.shape[:2], mode="bilinear", align_corners=False)
        classes = large.argmax(1)[0].to(torch.uint8).numpy()
        sink.write(frame, Segmentation(classes, manifest.labels))
    sink.close(complete=True)
{PEAK}
"""


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--frames", type=int, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = install(folder / "base")
        sizes = {"base": size_mb(base), "base_largest": largest(base)}
        times = imports(given.repetitions)
        video = write_video(folder / "video.mp4", given.frames)
        peaks = memory(folder, video)
    site = Path(sysconfig.get_paths()["purelib"])
    report = {
        "site_packages_mb": sizes,
        "torch_mb": {"package": size_mb(site / "torch"), "nvidia": size_mb(site / "nvidia")},
        "import_seconds": {name: round(statistics.median(of), 4) for name, of in times.items()},
        "import_runs": times,
        "import_ratio": {
            name: round(statistics.median(times[name]) / statistics.median(times["torch"]), 4)
            for name in ("knet_runtime", "run")
        },
        "peak_mib": {name: statistics.median(of) for name, of in peaks.items()},
        "peak_runs": peaks,
        "peak_ratio": round(statistics.median(peaks["run"]) / statistics.median(peaks["torch"]), 4),
        "frames": given.frames,
    }
    write_result(report, given.output)


def install(home: Path) -> Path:
    """A base install by pip; its site-packages, without pip itself."""
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-compile", str(REPOSITORY)], check=True
    )
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "pip"], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return home / "lib" / version / "site-packages"


def imports(repetitions: int) -> dict[str, list[float]]:
    """Seconds of each import, in turns, after one round that fills the file cache."""
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for turn in range(repetitions + 1):
        for name, code in IMPORTS.items():
            seconds = float(call(TIMED.format(code)))
            if turn:
                times[name].append(round(seconds, 4))
    return times


def memory(folder: Path, video: Path) -> dict[str, list[float]]:
    """Largest resident memory in MiB of both loops over the video, in turns."""
    peaks: dict[str, list[float]] = {"run": [], "torch": []}
    for _ in range(3):
        for name, code in (("run", RUN), ("torch", LOOP)):
            said = call(code, str(video), str(folder / f"{name}.mp4"))
            peaks[name].append(round(float(said.splitlines()[-1]), 1))
    return peaks


def call(code: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def write_video(path: Path, frames: int) -> Path:
    """1280 × 720 of moving blocks, H.264."""
    import av

    noise = np.random.default_rng(0).integers(0, 256, (45, 80, 3)).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for index in range(frames):
            image = np.roll(noise, index, 1).repeat(16, 0).repeat(16, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode(None))
    return path


def size_mb(folder: Path) -> float:
    files = (item for item in folder.rglob("*") if item.is_file() and not item.is_symlink())
    return round(sum(item.stat().st_size for item in files) / 1e6, 1)


def largest(site: Path) -> dict[str, float]:
    """The ten largest folders."""
    sizes = {item.name: size_mb(item) for item in site.iterdir() if item.is_dir()}
    return dict(sorted(sizes.items(), key=lambda item: -item[1])[:10])


if __name__ == "__main__":
    main()
