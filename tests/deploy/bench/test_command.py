"""``knet-deploy bench`` from the command line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest

from knet_deploy.bench.benchmark import Benchmark
from knet_deploy.cli.bench import BASELINES
from knet_runtime.bundle.store import Bundle, default_bundle_path
from knet_runtime.engines import probe_engines

FEW = ("--engine", "onnxruntime-cpu", "--rounds", "1", "--frames", "2")


def test_a_bundle_is_timed_and_all_of_it_is_in_the_files(
    call: Callable[..., Any], free_bundle: Bundle, tmp_path: Path
) -> None:
    out, plot = tmp_path / "new/b.json", tmp_path / "b.png"
    words = ("--size", "32x48", "--size", "48x64", "--json", out, "--plot", plot)
    answer = call("bench", free_bundle.path, *FEW, *words)
    assert answer.code == 0, answer.err
    assert "32×48" in answer.out
    assert "* onnxruntime-cpu: it was never verified" in answer.out
    report = json.loads(out.read_text())
    assert [row["size"] for row in report["rows"]] == ["32×48", "48×64"]
    row = report["rows"][0]
    assert (row["precision"], row["verified"], row["agreement"]) == ("fp32", False, 1.0)
    assert row["graph"] == free_bundle.manifest.files["logits.onnx"].sha256
    assert set(row["stages"]["total"]) == {"median", "p5", "p95", "p99"}
    assert row["startup_seconds"] > 0
    assert report["files"][0]["frames_per_second"] > 0
    assert report["limits"]["matmul"] > 1e6
    assert report["machine"]["packages"]["numpy"]
    assert cv2.imread(str(plot)) is not None


@pytest.mark.usefixtures("_quick")
def test_segments_are_timed_to_the_last_mask_and_in_a_video(
    call: Callable[..., Any], segment_bundle: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "b.json"
    answer = call("bench", segment_bundle.path, *FEW, "--size", "64x96", "--json", out)
    assert answer.code == 0, answer.err
    report = json.loads(out.read_text())
    (row,) = report["rows"]
    times = {stage: row["stages"][stage]["median"] for stage in row["stages"]}
    assert set(times) == {"preprocess", "infer", "postprocess", "total", "draw"}
    assert times["total"] >= times["infer"] + times["postprocess"] > times["infer"]
    assert row["verified"]
    assert row["multiply_adds"] > 1e6
    assert report["files"][0]["frames_per_second"] > 0


@pytest.mark.usefixtures("_quick")
def test_quick_is_one_size_and_few_frames_and_what_is_named_counts(
    call: Callable[..., Any], free_bundle: Bundle, tmp_path: Path
) -> None:
    words = ("--engine", "onnxruntime-cpu", "--quick", "--json", tmp_path / "b.json")
    answer = call("bench", free_bundle.path, *words)
    assert answer.code == 0, answer.err
    report = json.loads((tmp_path / "b.json").read_text())
    assert (report["rounds"], report["frames"], report["files"]) == (3, 5, [])
    assert [row["size"] for row in report["rows"]] == ["360×480"]
    assert call("bench", free_bundle.path, *words, "--rounds", "1", "--size", "32x48").code == 0
    report = json.loads((tmp_path / "b.json").read_text())
    assert (report["rounds"], report["frames"]) == (1, 5)
    assert [row["size"] for row in report["rows"]] == ["32×48"]


@pytest.mark.usefixtures("_quick")
def test_progress_is_told_and_a_first_table_comes_after_the_first_round(
    call: Callable[..., Any], free_bundle: Bundle
) -> None:
    words = ("--size", "32x48", "--sources", "0", *FEW[:2], "--rounds", "3", "--frames", "1")
    answer = call("bench", free_bundle.path, *words)
    assert answer.code == 0
    lines = answer.err.splitlines()
    assert lines[0] == "opening onnxruntime-cpu"
    first, second = (
        place for place, line in enumerate(lines) if re.fullmatch("round .* to go", line)
    )
    assert lines[first].startswith("round 1 of 3 is done, about ")
    table = [line for line in lines[1:first] if line.startswith("onnxruntime-cpu *")]
    assert len(table) == 1
    assert lines[second].startswith("round 2 of 3 is done, about ")
    assert second == first + 1 == len(lines) - 1


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("turn", [1, 3])
def test_ctrl_c_prints_and_writes_what_was_measured_so_far(
    call: Callable[..., Any],
    free_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    turn: int,
) -> None:
    turns = []
    measure = Benchmark._measure

    def interrupted(*words: Any) -> Any:
        turns.append(words)
        if len(turns) > turn:
            raise KeyboardInterrupt
        return measure(*words)

    monkeypatch.setattr(Benchmark, "_measure", interrupted)
    sizes = ("--size", "32x48", "--size", "48x64", "--sources", "0")
    out = tmp_path / "b.json"
    answer = call("bench", free_bundle.path, *sizes, *FEW[:2], "--rounds", "5", "--json", out)
    assert answer.code == 130
    report = json.loads(out.read_text())
    found = {row["size"]: len(row["stages"]) for row in report["rows"]}
    assert list(found) == (["32×48"] if turn == 1 else ["32×48", "48×64"])
    assert report["rounds"] == (turn + 1) // 2
    assert "32×48" in answer.out
    assert f"stopped in round {(turn + 1) // 2} of 5" in answer.err


@pytest.mark.usefixtures("_quick")
def test_ctrl_c_before_anything_is_measured_leaves_nothing(
    call: Callable[..., Any], free_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Benchmark, "_open", interrupt)
    answer = call("bench", free_bundle.path, "--quick", "--json", tmp_path / "b.json")
    assert (answer.code, answer.out) == (130, "")
    assert not (tmp_path / "b.json").exists()


@pytest.mark.usefixtures("_quick")
def test_bundles_stand_side_by_side(
    call: Callable[..., Any], free_bundle: Bundle, tmp_path: Path
) -> None:
    twin, out = tmp_path / "twin.knet", tmp_path / "b.json"
    shutil.copytree(free_bundle.path, twin)
    words = ("--size", "32x48", "--sources", "0", "--json", out)
    assert call("bench", free_bundle.path, twin, *FEW, *words).code == 0
    report = json.loads(out.read_text())
    names = [
        f"onnxruntime-cpu {path.name.removesuffix('.knet')}" for path in (free_bundle.path, twin)
    ]
    assert [row["target"] for row in report["rows"]] == names
    assert report["models"] == 2 * [free_bundle.model_id]
    answer = call("bench", free_bundle.path, free_bundle.path, *FEW)
    assert answer.code == 2
    assert "rename one" in answer.err


@pytest.mark.usefixtures("_quick")
def test_a_video_gives_its_frames_and_its_size(
    call: Callable[..., Any], free_bundle: Bundle, video: Path, tmp_path: Path
) -> None:
    out = tmp_path / "b.json"
    words = ("--source", video, "--sources", "0", "--threads", "1", "--json", out)
    assert call("bench", free_bundle.path, *FEW, *words).code == 0
    report = json.loads(out.read_text())
    assert [row["size"] for row in report["rows"]] == ["96×128"]
    assert (report["files"], report["threads"]) == ([], 1)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--engine", "abacus"), "'abacus' is not one of 'onnxruntime-cpu'"),
        (("--engine", "auto"), "'auto' is not one of 'onnxruntime-cpu'"),
        (("--size", "big"), "write HEIGHTxWIDTH"),
        (("--compare", "torch,keras"), f"no such baseline: use {','.join(BASELINES)}"),
        (("--compare", ","), "names no baseline"),
        (("--threads", "4096"), "this process may use"),
        (("--plot", "bars.jpg"), "let its name end in .png"),
        (("--compare", "torch"), "--compare needs --checkpoint"),
        (("--compare", "torch", "--checkpoint", "none.safetensors"), "is no file"),
        (("--source", "nowhere.mp4"), "nowhere.mp4"),
        (("--source", "rtsp://me:secret@127.0.0.1:1/live"), "rtsp://***@127.0.0.1:1/live is live"),
        (("--json", "/dev/null/b.json"), "/dev/null"),
        (("--plot", "/dev/null/b.png"), "/dev/null"),
        (("--json", "/dev"), "is a folder; name a file in it"),
        (("--json", "/"), "is a folder; name a file in it"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    words: tuple[str, ...], text: str, call: Callable[..., Any], free_bundle: Bundle
) -> None:
    answer = call("bench", free_bundle.path, *words)
    assert answer.code == 2
    assert text in answer.err
    assert len(answer.err.splitlines()) == 1
    assert not answer.out, "it is said before anything is measured"


@pytest.mark.usefixtures("_quick")
def test_an_engine_that_fails_leaves_the_others_standing(
    call: Callable[..., Any], free_bundle: Bundle, tmp_path: Path
) -> None:
    absent = [status.name for status in probe_engines() if not status.available]
    if not absent:
        pytest.skip("every engine works on this machine")
    out = tmp_path / "b.json"
    words = ("--engine", absent[0], "--size", "32x48", "--sources", "0")
    answer = call("bench", free_bundle.path, *FEW, *words, "--json", out)
    assert answer.code == 0, answer.err
    assert f"{absent[0]} did not run: " in answer.out
    report = json.loads(out.read_text())
    assert [row["target"] for row in report["rows"]] == ["onnxruntime-cpu"]
    assert [failure["target"] for failure in report["failures"]] == [absent[0]]
    alone = call("bench", free_bundle.path, "--rounds", "1", "--frames", "1", *words)
    assert alone.code == 1
    assert "no engine ran this bundle" in alone.err


def test_baselines_take_no_other_checkpoint_than_the_bundles(
    call: Callable[..., Any], free_bundle: Bundle, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    shutil.copy(default_bundle_path() / "golden.npz", other)
    answer = call("bench", free_bundle.path, "--compare", "torch", "--checkpoint", other)
    assert answer.code == 2
    assert "was not exported from" in answer.err
