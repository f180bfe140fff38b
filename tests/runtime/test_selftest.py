"""The golden self-test at start: made once, made again after a change, never in the way."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from knet_runtime.bundle.store import Bundle
from knet_runtime.errors import ParityError
from knet_runtime.segmenter import Segmenter

MakeBundle = Callable[..., Bundle]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wrong(colour_model: Callable[..., bytes]) -> bytes:
    """A graph that the manifest fits and the golden logits do not: its weights are a third."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load_model_from_string(colour_model())
    kernel = model.graph.initializer[0]
    kernel.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(kernel)[::-1] / 3, kernel.name))
    return bytes(model.SerializeToString())


def test_a_pass_is_remembered(make_bundle: MakeBundle, cache: Path) -> None:
    with Segmenter(make_bundle(), "onnxruntime-cpu") as segmenter:
        first, second = segmenter.self_test(), segmenter.self_test()
    assert first is not None
    assert second is not None
    assert first.passed
    assert (first.remembered, second.remembered) == (False, True)
    assert "passed" in str(first)
    assert "remembered" in str(second)
    assert len(list(cache.rglob("*.json"))) == 1
    assert not list(cache.rglob("*.part"))


def test_another_bundle_version_or_driver_is_tested_anew(
    make_bundle: MakeBundle, colour_model: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tested() -> bool:
        with Segmenter(bundle, "onnxruntime-cpu") as segmenter:
            result = segmenter.self_test()
        assert result is not None
        return not result.remembered

    bundle = make_bundle()
    assert (tested(), tested()) == (True, False)
    bundle = make_bundle(model=colour_model() + b"")
    assert not tested()
    bundle = make_bundle(precision="fp16")
    assert not tested()  # the files are the same
    bundle = make_bundle(classmap=colour_model(kind="classmap"))
    assert (tested(), tested()) == (True, False)
    for module, name in ((np, "numpy"), (sys.modules["onnxruntime"], "onnxruntime")):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "999")
            assert tested(), name
    assert not tested()


def test_a_failure_refuses_or_warns_and_is_never_remembered(
    make_bundle: MakeBundle,
    colour_model: Callable[..., bytes],
    caplog: pytest.LogCaptureFixture,
    cache: Path,
) -> None:
    with Segmenter(make_bundle(model=wrong(colour_model)), "onnxruntime-cpu") as segmenter:
        for _ in range(2):
            with pytest.raises(ParityError, match="--self-test warn"):
                segmenter.self_test("refuse")
        assert segmenter.self_test("off") is None
        with caplog.at_level(logging.WARNING):
            result = segmenter.self_test("warn")
    assert result is not None
    assert not result.passed
    assert "does not give the results that PyTorch gave" in caplog.text
    assert not list(cache.rglob("*.json"))


@pytest.mark.parametrize("kind", ["none", "relative", "file"])
def test_without_a_home_the_self_test_is_made_each_time_and_nothing_is_left(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import pwd

    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)  # as in a container under a number of its own
    monkeypatch.delenv("XDG_CACHE_HOME")
    file = tmp_path / "home"
    file.write_text("not a folder")
    home = {"none": None, "relative": "home/of/mine", "file": str(file)}[kind]
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    folder = tmp_path / "working"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with Segmenter(make_bundle(), "onnxruntime-cpu") as segmenter:
        for _ in range(2):
            result = segmenter.self_test()
            assert result is not None
            assert (result.passed, result.remembered) == (True, False)
    assert not list(folder.iterdir())
    assert file.read_text() == "not a folder"


@pytest.mark.parametrize("kind", ["file", "missing", "garbage", "failure", "no UTF-8"])
def test_a_cache_that_cannot_be_used_only_costs_time(
    make_bundle: MakeBundle, cache: Path, kind: str
) -> None:
    if kind == "file":
        cache.write_text("not a folder")
    with Segmenter(make_bundle(), "onnxruntime-cpu") as segmenter:
        for _ in range(2):
            result = segmenter.self_test()
            assert result is not None
            assert result.passed
            wrong = {
                "garbage": b'{"passed": tru',
                "failure": b'{"passed": false, "detail": "", "seconds": 1.0}',
                "no UTF-8": b'{"passed": true, "detail": "\xff", "seconds": 1.0}',
            }.get(kind)
            if wrong is not None:
                for path in cache.rglob("*.json"):
                    path.write_bytes(wrong)
            else:
                assert result.remembered == (kind == "missing" and _ == 1)


def test_a_bundle_without_golden_tensors_is_run_with_a_warning(
    make_bundle: MakeBundle, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle()
    files = {k: v for k, v in bundle.manifest.files.items() if k != "golden.npz"}
    import msgspec

    bundle = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, files=files))
    with Segmenter(bundle, "onnxruntime-cpu") as segmenter:
        assert segmenter.self_test() is None
    assert "no golden tensors" in caplog.text


def test_another_size_is_tested_at_that_of_the_golden_tensors(
    make_bundle: MakeBundle, colour_model: Callable[..., bytes]
) -> None:
    from knet_runtime.bundle.manifest import InputSpec, SizeRange

    spec = InputSpec("image", 16, 24, "stretch", max_batch=3, sizes=SizeRange((8, 8), (64, 64), 8))
    bundle = make_bundle(model=colour_model(height="H", width="W"), input=spec).with_input_size(
        (32, 32)
    )
    with Segmenter(bundle, "onnxruntime-cpu") as segmenter:
        result = segmenter.self_test()
    assert result is not None
    assert result.passed
