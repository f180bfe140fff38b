"""What batch says before any work; its work is in tests/runtime/batch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from knet_runtime.locks import FileLock
from knet_runtime.types import Closeable

Call = Callable[..., Any]


def test_batch_without_ray_is_the_pip_line(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "x.mp4").write_bytes(b"x")
    outcome = call("batch", tmp_path / "*.mp4", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert 'pip install "knet-deploy[ray]"' in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_batch_says_what_is_wrong_before_ray_is_started(call: Call, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"x")
    out = tmp_path / "out"
    for words, expected in (
        ((tmp_path / "none/**/*.mp4",), "no file is found"),
        (
            (tmp_path / "x.mp4", "--engine", "nope"),
            "'nope' is not one of 'auto', 'onnxruntime-cpu'",
        ),
        ((tmp_path / "x.mp4", "--bundle", tmp_path / "none.knet"), "no such bundle"),
        ((tmp_path / "x.mp4", "--size", "big"), "HEIGHTxWIDTH"),
        ((tmp_path / "x.mp4", "--track"), "--track is for bundles of panoptic and instance"),
        ((tmp_path / "x.mp4", "--coco"), "--coco is for bundles of panoptic and instance"),
        ((tmp_path / "x.mp4", "--coco-panoptic"), "--coco-panoptic is for bundles of panoptic"),
        ((tmp_path / "x.mp4", "--score", "0.4"), "--score is for bundles of panoptic and"),
        ((tmp_path / "x.mp4", "--top-k", "4"), "--top-k is for bundles of instance"),
    ):
        outcome = call("batch", *words, "--out", out)
        assert outcome.code == 2, words
        assert expected in outcome.err
        assert len(outcome.err.splitlines()) == 1
        assert not out.exists()


def test_a_second_batch_is_refused_before_ray_is_started(
    call: Call, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unused(Closeable):
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr("knet_runtime.batch.ray_pool.RayPool", Unused)
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"):
        answer = call("batch", video, "--out", out)
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert answer.code == 2
    assert answer.err == (
        f"knet-deploy: error: {out}: another batch is writing there; wait for its end, or name "
        "another --out\n"
    )
