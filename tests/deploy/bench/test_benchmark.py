"""A benchmark's rows, limits, videos and bars, each by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from knet_deploy.bench.benchmark import Benchmark, Entry, write_video
from knet_deploy.bench.machine import Limits, this_machine
from knet_deploy.bench.plot import Bar, draw_bars
from knet_deploy.bench.target import BundleTarget
from knet_export.graph.cost import Cost
from knet_runtime.bundle.store import Bundle
from knet_runtime.sources import open_source
from knet_runtime.types import Frame


def test_a_benchmark_times_compares_and_reports(
    tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    bundle = make_bundle()
    random = np.random.default_rng(0)
    frames = [random.integers(0, 256, (32, 48, 3)).astype(np.uint8) for _ in range(2)]
    entries = [
        Entry(
            "ours",
            partial(BundleTarget, bundle.path, "onnxruntime-cpu"),
            True,
            cost=Cost(1000, 4000),
        ),
        Entry("baseline", partial(BundleTarget, bundle.path, "onnxruntime-cpu")),
        Entry("absent", partial(BundleTarget, bundle.path, "no-such-engine"), True),
    ]
    benchmark = Benchmark(tmp_path, {"32×48": frames}, threads=1, sources=2, file_frames=3)
    benchmark.run(entries, 2, pause=0)
    ours, baseline = benchmark.rows(Limits(1e9, 1e9))
    assert (ours.target, ours.size, ours.agreement) == ("ours", "32×48", 1.0)
    assert list(ours.stages) == ["preprocess", "infer", "postprocess", "total", "draw"]
    assert ours.matmul_share == pytest.approx(1 / ours.stages["infer"].median / 1000, rel=0.2)
    assert (ours.multiply_adds, ours.min_bytes, baseline.multiply_adds) == (1000, 4000, None)
    assert (ours.precision, baseline.matmul_share, baseline.agreement) == ("fp32", None, 1.0)
    assert ours.graph == bundle.manifest.files["model.onnx"].sha256
    assert not ours.verified
    assert "never verified" in str(ours.unverified_reason)
    assert benchmark.reference == "ours"
    (failure,) = benchmark.failures
    assert failure.target == "absent"
    assert "no-such-engine" in failure.reason
    (file,) = benchmark.files()
    assert (file.sources, len(file.rounds)) == (2, 2)
    (media,) = benchmark.media()
    assert set(media.stages) == {"decode", "encode"}


def test_a_video_holds_all_frames_and_a_time_for_each(tmp_path: Path) -> None:
    frames = [np.full((32, 48, 3), 40 * index, np.uint8) for index in range(4)]
    assert len(write_video(tmp_path / "v.mp4", frames)) == 4
    with open_source(tmp_path / "v.mp4") as source:
        read: list[Frame] = list(source)
    assert [round(float(frame.image.mean()) / 40) for frame in read] == [0, 1, 2, 3]


def test_the_better_limits_are_kept() -> None:
    assert Limits(3.0, 4.0).best(Limits(5.0, 2.0)) == Limits(5.0, 4.0)


def test_a_machine_says_what_it_is() -> None:
    machine = this_machine(3)
    assert machine.cores == 3
    assert machine.processor
    assert "numpy" in machine.packages


def test_bars_are_as_long_as_their_values() -> None:
    red, blue = (200, 0, 0), (0, 0, 200)
    bars = [Bar("one", 10.0, 9.0, 11.0, "10 ms", red), Bar("two", 5.0, 5.0, 5.0, "5 ms", blue)]
    png = draw_bars("title", "a×b", [("360×480", bars), ("empty", [])])
    drawn = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    assert drawn is not None
    lengths = [(drawn[..., ::-1] == colour).all(-1).sum(1).max() for colour in (red, blue)]
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=0.05)
