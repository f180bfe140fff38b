"""``knet-deploy demo``: videos that play, a page that needs nothing else, and its verdict."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import av
import pytest

from knet_deploy.cli.demo import _STREET, Drive
from knet_deploy.cli.main import main
from knet_runtime.bundle.store import default_bundle_path, open_bundle
from knet_runtime.golden import GoldenReport
from knet_runtime.sources import open_source


def test_demo_writes_videos_and_a_page_that_stands_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "demo"
    assert main(["demo", "--out", str(out), "--frames", "3"]) == 0
    written = ["report.html", "street.mp4", "synthetic.mp4"]
    assert sorted(path.name for path in out.iterdir()) == written
    for video in written[1:]:
        with av.open(str(out / video)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 3
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 2 * 2 + 3 * 3  # the real street has no labels to show
    for video in written[1:]:  # the very files, as addresses that hold them
        data = base64.b64encode((out / video).read_bytes()).decode()
        assert f'src="data:video/mp4;base64,{data}"' in page
    assert not re.search(r"<script|<link|https?://|src=\"(?!data:)", page)
    model = open_bundle(default_bundle_path()).model_id
    words = ("mIoU", "do not say how well", "Udacity", "Bicyclist", "prefers-color-scheme")
    for text in (model, *words):
        assert text in page
    assert str(out / "report.html") in capsys.readouterr().out
    assert main(["demo", "--out", str(out), "--frames", "1"]) == 0  # replaces all


def test_the_real_street_is_packaged_with_its_licence() -> None:
    licence = _STREET.with_name("street.LICENSE.txt").read_text(encoding="utf-8")
    assert "MIT License" in licence
    assert "Udacity" in licence
    assert _STREET.stat().st_size < 700_000
    with open_source(_STREET) as source:
        assert source.info.frames == 75
        assert sum(1 for _ in source) == 75


def test_a_failed_golden_check_fails_the_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tolerance = open_bundle(default_bundle_path()).graph("logits").tolerance
    report = GoldenReport(2, 9.0, 0.5, False, tolerance)
    monkeypatch.setattr("knet_runtime.golden.replay", lambda *_: report)
    assert main(["demo", "--out", str(tmp_path), "--frames", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "does not give the results that PyTorch gave" in captured.err
    assert "NOT PyTorch" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_folder_that_can_not_be_written_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", "/dev/null/demo"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_drive_hands_out_frames_with_their_exact_labels() -> None:
    with Drive(0, 2) as drive:
        frames = list(drive)
        assert [frame.index for frame in frames] == [0, 1]
        assert drive.labels(1).shape == frames[1].image.shape[:2]
    assert list(drive) == []
