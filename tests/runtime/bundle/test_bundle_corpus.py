"""A hundred bad bundles: each is refused in one line, in time and within memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import knet_runtime
from knet_runtime.bundle.store import Bundle

CORPUS = Path(__file__).resolve().parents[2] / "corpus"
SECONDS = 5.0  # for one bundle
MEMORY_MIB = 400


@pytest.fixture
def corpus(make_bundle: Callable[..., Bundle], tmp_path: Path) -> list[Path]:
    spec = importlib.util.spec_from_file_location("make_bundles", CORPUS / "make_bundles.py")
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    bundles: list[Path] = maker.make_bundles(make_bundle().path, tmp_path / "corpus")
    return bundles


def read(bundles: list[Path]) -> list[dict[str, Any]]:
    """What a process of its own said of each; one that takes too long is named."""
    room = str(Path(knet_runtime.__file__).parent.parent)
    with subprocess.Popen(
        [sys.executable, str(CORPUS / "read_bundles.py"), *map(str, bundles)],
        env={**os.environ, "PYTHONPATH": room},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            out, err = child.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
    lines = [json.loads(line) for line in out.splitlines()]
    assert child.returncode == 0, f"at {lines[-1] if lines else 'its start'}: {err[-2000:]}"
    assert err == ""
    return [line for line in lines if "name" in line]


def test_every_bad_bundle_is_refused_in_one_line(corpus: list[Path]) -> None:
    assert len(corpus) == 100
    seen = read(corpus)
    assert [line["name"] for line in seen] == [path.name for path in corpus]
    for line in seen:
        assert line["error"], line["name"]
        assert len(line["error"].splitlines()) == 1, line
        assert line["seconds"] < SECONDS, line
    assert seen[-1]["peak_mib"] < MEMORY_MIB
    kinds = {line["kind"] for line in seen}
    assert kinds == {"BundleError", "EngineError", "ParityError"}


def test_the_good_bundle_that_they_are_made_of_passes(
    make_bundle: Callable[..., Bundle],
) -> None:
    (line,) = read([make_bundle().path])
    assert line["error"] == ""
