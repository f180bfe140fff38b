"""``knet-deploy demo``: a video that plays, a page that needs nothing else, and its verdict."""

from __future__ import annotations

import re
from pathlib import Path

import av
import pytest

from knet_deploy.cli.demo import Drive
from knet_deploy.cli.main import main
from knet_runtime.bundle.store import default_bundle_path, open_bundle
from knet_runtime.golden import GoldenReport


def test_demo_writes_a_video_and_a_page_that_stands_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "demo"
    assert main(["demo", "--out", str(out), "--frames", "3"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["overlay.mp4", "report.html"]
    with av.open(str(out / "overlay.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 3
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 9
    assert not re.search(r"<script|<link|https?://|src=\"(?!data:)", page)
    model = open_bundle(default_bundle_path()).model_id
    for text in (model, "mIoU", "do not say how well", "Bicyclist", "prefers-color-scheme"):
        assert text in page
    assert str(out / "report.html") in capsys.readouterr().out
    assert main(["demo", "--out", str(out), "--frames", "1"]) == 0  # replaces both


def test_a_failed_golden_check_fails_the_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tolerance = open_bundle(default_bundle_path()).artefact.tolerance
    report = GoldenReport(2, 9.0, 0.5, False, tolerance)
    monkeypatch.setattr("knet_runtime.golden.replay", lambda *_: report)
    assert main(["demo", "--out", str(tmp_path), "--frames", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "does not give the results that PyTorch gave" in captured.err
    assert "NOT PyTorch" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_folder_that_can_not_be_written_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "--out", "/dev/null/demo"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_drive_hands_out_frames_with_their_exact_labels() -> None:
    with Drive(0, 2) as drive:
        frames = list(drive)
        assert [frame.index for frame in frames] == [0, 1]
        assert drive.labels(1).shape == frames[1].image.shape[:2]
    assert list(drive) == []
