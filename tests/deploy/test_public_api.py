"""The public face: light, lazy, typed, and every name documented by an example that runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from traced import traced_before

import knet_deploy
from knet_runtime.sinks.encoder import ENCODERS, VideoWriter, working_encoder
from knet_synthetic import Street

FACE = Path(knet_deploy.__file__)
NEEDS_TORCH = {
    "CheckpointError",
    "DataError",
    "KNet",
    "export_bundle",
    "load_checkpoint",
    "verify_bundle",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run: street.png, drive.mp4 (8 frames), photos/ (a.png, b.png)."""
    place = tmp_path_factory.mktemp("examples")
    (place / "photos").mkdir()
    street = Street(5, (360, 480))
    frames = [street.frame(index)[0] for index in range(8)]
    for path, image in zip(("street", "photos/a", "photos/b"), frames, strict=False):
        cv2.imwrite(str(place / f"{path}.png"), image[..., ::-1])
    encoder = working_encoder(ENCODERS["h264"], (360, 480))
    tick = Fraction(1, 25)
    video = VideoWriter(place / "drive.mp4", (360, 480), tick, Fraction(25), encoder)
    for index, image in enumerate(frames):
        video.write(image, index)
    video.close()
    return place


@pytest.fixture
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(folder.iterdir())
    monkeypatch.chdir(folder)
    yield
    for path in set(folder.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.usefixtures("_there")
@pytest.mark.parametrize("name", knet_deploy.__all__)
def test_every_name_has_an_example_that_runs(name: str, request: pytest.FixtureRequest) -> None:
    exporting: AbstractContextManager[None] = nullcontext()
    if name in NEEDS_TORCH:
        if importlib.util.find_spec("torch") is None:
            pytest.skip("PyTorch is not installed")
        shutil.copy(request.getfixturevalue("checkpoint"), "best.safetensors")
        exporting = traced_before(request.getfixturevalue("small_bundle"))
    found = getattr(knet_deploy, name)
    tests = doctest.DocTestFinder(recurse=False).find(found, name, globs={"np": np})
    assert tests, f"{name} has no example in its docstring"
    assert tests[0].examples, f"{name} has no example in its docstring"
    (test,) = tests
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    with exporting:
        runner.run(test, out=told.append)
    assert not runner.failures, "".join(told)


def test_type_checkers_and_the_run_see_the_same_names() -> None:
    (block,) = (
        node for node in ast.parse(FACE.read_text("utf-8")).body if isinstance(node, ast.If)
    )
    typed = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name  # what a type checker takes for public
    }
    assert typed == knet_deploy._HOME
    assert knet_deploy.__all__ == sorted(typed)
    for name, module in typed.items():
        assert hasattr(importlib.import_module(module), name)


def test_what_is_public_says_where_its_arguments_go() -> None:
    for name in knet_deploy.__all__:
        assert inspect.getdoc(getattr(knet_deploy, name)), name


def test_the_import_is_light() -> None:
    code = (
        "import sys, time; before = set(sys.modules); began = time.perf_counter()\n"
        "import knet_deploy\n"
        "heavy = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(heavy & {'numpy', 'cv2', 'torch', 'onnxruntime', 'av', 'knet_runtime'}))\n"
        "print(dir(knet_deploy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, names = done.stdout.splitlines()
    assert loaded == "[]"
    assert "'Segmenter'" in names


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Segmentor'"):
        _ = knet_deploy.Segmentor


@pytest.mark.parametrize(
    ("name", "gone", "extra"),
    [
        ("export_bundle", "torch", "export"),
        ("load_checkpoint", "torch", "train"),
        ("LivePage", "uvicorn", "serve"),
    ],
)
def test_a_missing_extra_is_named_with_its_install_command(
    name: str, gone: str, extra: str
) -> None:
    code = f"import sys; sys.modules[{gone!r}] = None\nfrom knet_deploy import {name}\n{name}('x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f'pip install "knet-deploy[{extra}]"' in done.stderr.splitlines()[-1]
