"""Bad bundles: each is refused in one line, in time and within memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from corpus.measured import read_apart

from knet_runtime.bundle.store import Bundle

SECONDS = 5.0  # for one bundle
MEMORY_MIB = 400


@pytest.fixture
def corpus(make_bundle: Callable[..., Bundle], tmp_path: Path) -> list[Path]:
    from corpus.make_bundles import make_bundles

    return make_bundles(make_bundle().path, tmp_path / "corpus")


def test_every_bad_bundle_is_refused_in_one_line(corpus: list[Path]) -> None:
    assert len(corpus) == 120
    seen = read_apart("read_bundles.py", corpus, timeout=60)
    assert [line["name"] for line in seen] == [path.name for path in corpus]
    for line in seen:
        assert line["error"], line["name"]
        assert len(line["error"].splitlines()) == 1, line
        assert line["seconds"] < SECONDS, line
    assert seen[-1]["peak_mib"] < MEMORY_MIB
    kinds = {line["kind"] for line in seen}
    assert kinds == {"BundleError", "EngineError", "ParityError"}


def test_the_good_bundle_that_they_are_made_of_passes(make_bundle: Callable[..., Bundle]) -> None:
    (line,) = read_apart("read_bundles.py", [make_bundle().path], timeout=60)
    assert line["error"] == ""
