"""``knet-deploy run``: its outputs, its refusals, and a run that is ended early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import msgspec
import numpy as np
import pytest

import knet_runtime.engines
from knet_runtime.bundle.store import Bundle, default_bundle_path, open_bundle, record_parity
from knet_runtime.drawing import encode_png
from knet_runtime.engines import engine_spec, engine_specs
from knet_runtime.engines.hardware import processor_name
from knet_runtime.errors import EngineUnavailable
from knet_runtime.sources.images import read_image

Call = Callable[..., Any]


def read_mask(path: Path) -> np.ndarray:
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert mask is not None
    return mask


def count_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_run_writes_overlay_masks_and_json(call: Call, video: Path, tmp_path: Path) -> None:
    places = tmp_path / "o.mp4", tmp_path / "masks", tmp_path / "o.jsonl"
    answer = call("run", video, "-o", places[0], "--masks", places[1], "--json", places[2])
    assert (answer.code, answer.err) == (0, "")
    assert count_frames(places[0]) == 4
    assert [path.name for path in sorted(places[1].iterdir())] == [
        f"{index:06d}.png" for index in range(4)
    ]
    lines = [json.loads(line) for line in places[2].read_text(encoding="utf-8").splitlines()]
    assert [line["frame"] for line in lines] == [0, 1, 2, 3]
    for text in ("frames", "speed", "infer", "engine", "model", "shares", *map(str, places)):
        assert text in answer.out


def test_frames_worth_labelling_become_a_data_folder(
    call: Call, video: Path, tmp_path: Path
) -> None:
    words = ("run", video, "--capture", "uncertain:3", tmp_path / "unsure", "--blur", "Road")
    answer = call(*words)
    assert (answer.code, answer.err) == (0, "")
    assert f"written      {tmp_path / 'unsure'}/" in answer.out
    (image,) = (tmp_path / "unsure" / "images").iterdir()  # the video lasts less than a second
    (row,) = json.loads((tmp_path / "unsure" / "uncertainty.json").read_text())
    assert row["image"] == image.name
    assert 0 < row["uncertainty"] < 1
    assert read_mask(tmp_path / "unsure" / "labels" / image.name).ndim == 2
    for capture, text in (
        (("uncertain:3", tmp_path / "unsure"), "is there already: name another folder"),
        (("uncertain", tmp_path / "a"), "--capture is 'uncertain': write uncertain:N and a folder"),
        (("uncertain:0", tmp_path / "a"), "such as --capture uncertain:50 unsure"),
    ):
        answer = call("run", video, "--capture", *capture)
        assert answer.code == 2
        assert text in answer.err
    assert not (tmp_path / "a").exists()


def test_run_without_outputs_ends_with_the_summary(call: Call, video: Path) -> None:
    answer = call("run", video, "--max-frames", "1", "--engine", "onnxruntime-cpu")
    assert answer.code == 0
    assert "frames       1\n" in answer.out
    assert "written" not in answer.out


@pytest.mark.parametrize("first", [[], ["--source"]])
def test_several_sources_write_to_places_with_their_names(
    call: Call, video: Path, tmp_path: Path, first: list[str]
) -> None:
    image = tmp_path / "street.png"
    cv2.imwrite(str(image), np.zeros((40, 60, 3), np.uint8))
    outputs = ["-o", tmp_path / "o.mp4", "--json", tmp_path / "o.jsonl", "--masks", tmp_path / "m"]
    answer = call("run", *first, video, "--source", image, "--source", video, *outputs)
    assert (answer.code, answer.err) == (0, "")
    for name, frames in (("drive", 4), ("street", 1), ("drive-2", 4)):
        assert count_frames(tmp_path / f"o.{name}.mp4") == frames
        assert len((tmp_path / f"o.{name}.jsonl").read_text().splitlines()) == frames
        assert len(list((tmp_path / "m" / name).iterdir())) == frames
        assert f"source       {name}\n" in answer.out


def test_a_run_without_a_source_is_refused(call: Call) -> None:
    answer = call("run")
    assert answer.code == 2
    assert answer.err.splitlines() == [
        "knet-deploy: error: there is no source: knet-deploy run SOURCE, or --source for several"
    ]


def test_a_source_that_fails_keeps_no_other_from_its_end(
    call: Call, video: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), np.zeros((32, 48, 3), np.uint8))
    (folder / "b.png").write_text("no image")
    answer = call("run", folder, "--source", video, "-o", tmp_path / "o.mp4")
    assert answer.code == 2
    assert "b.png" in answer.err
    assert count_frames(tmp_path / "o.drive.mp4") == 4
    assert (tmp_path / "o.photos.partial.mp4").is_file()
    assert f"written      {tmp_path / 'o.photos.partial.mp4'}" in answer.out


@pytest.mark.parametrize(
    ("words", "frames"),
    [(["--every", "2"], 2), (["--start", "0.1", "--end", "0.3"], 2), (["--policy", "file"], 4)],
)
def test_a_part_of_the_frames_is_taken(
    call: Call, video: Path, words: list[str], frames: int
) -> None:
    answer = call("run", video, *words)
    assert answer.code == 0, answer.err
    assert f"frames       {frames}\n" in answer.out


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_a_file_is_played_again_and_again_as_a_video_that_goes_on(
    call: Call, video: Path, tmp_path: Path
) -> None:
    places = tmp_path / "o.mp4", tmp_path / "o.jsonl"
    playing = ["--loop", "--realtime", "--max-frames", "7"]
    answer = call("run", video, *playing, "-o", places[0], "--json", places[1])
    assert (answer.code, answer.err) == (0, "")
    assert count_frames(places[0]) == 7
    lines = [json.loads(line) for line in places[1].read_text().splitlines()]
    assert [line["name"] for line in lines] == [f"{index:06d}" for index in range(7)]
    times = [line["pts"] for line in lines]
    assert np.allclose(np.diff(times), times[1] - times[0], atol=0.001)


def test_names_that_are_no_utf8_are_escaped_in_every_output(call: Call, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    picture = encode_png(np.zeros((24, 32, 3), np.uint8))
    for name in (b"caf\xe9.png", b"caf\xe8.png", "café.png".encode()):
        (photos / os.fsdecode(name)).write_bytes(picture)
    places = tmp_path / "o.jsonl", tmp_path / "o.rle", tmp_path / "masks"
    words = ["--json", places[0], "--rle", places[1], "--masks", places[2]]
    assert call("run", photos, *words).code == 0
    names = ["café", r"caf\xe8", r"caf\xe9"]
    for lines in places[:2]:
        records = map(json.loads, lines.read_text(encoding="utf-8").splitlines())
        assert sorted(record["name"] for record in records) == sorted(names)
    assert sorted(path.stem for path in places[2].iterdir()) == sorted(names)


def test_one_image_gives_an_overlay_image(call: Call, tmp_path: Path) -> None:
    image = tmp_path / "street.png"
    cv2.imwrite(str(image), np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8))
    for name in ("o.png", "o.jpg"):
        words = ["--alpha", "0.7", "--no-legend"]
        assert call("run", image, "-o", tmp_path / name, *words).code == 0
        assert read_image(tmp_path / name).shape == (40, 60, 3)
    assert call("run", image, "-o", tmp_path / "l.png").code == 0
    assert read_image(tmp_path / "l.png").shape[0] > 40
    words = ["--side-by-side", "--names", "--legend"]
    assert call("run", image, "-o", tmp_path / "s.png", *words).code == 0
    assert read_image(tmp_path / "s.png").shape[1] == 120
    assert call("run", image, "-o", image).code == 2


def test_a_folder_of_photos_gives_a_folder_of_overlays(call: Call, tmp_path: Path) -> None:
    photos, overlays = tmp_path / "photos", tmp_path / "overlays"
    photos.mkdir()
    random = np.random.default_rng(0)
    for name, hw in (("Straße.png", (24, 32)), ("b.jpg", (50, 40))):
        image = random.integers(0, 256, (*hw, 3), np.uint8)
        (photos / name).write_bytes(cv2.imencode(name[-4:], image)[1].tobytes())
    answer = call("run", photos, "-o", overlays, "--no-legend")
    assert answer.code == 0, answer.err
    assert f"written      {overlays}/\n" in answer.out
    sizes = {path.name: read_image(path).shape for path in overlays.iterdir()}
    assert sizes == {"Straße.jpg": (24, 32, 3), "b.jpg": (50, 40, 3)}
    again = call("run", photos, "-o", overlays)
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "holds the overlays of another run" in again.err
    assert call("run", photos, "-o", overlays, "--overwrite").code == 0
    assert call("run", photos, "-o", photos, "--overwrite").code == 2
    words = ["--source", photos / "b.jpg", "--source", photos, "-o", tmp_path / "two"]
    assert call("run", *words).code == 0
    assert sorted(path.name for path in (tmp_path / "two").glob("*/*.jpg")) == [
        *("Straße.jpg", "b.jpg", "b.jpg")
    ]


def test_the_palette_colours_overlays_and_panoptic_files(call: Call, tmp_path: Path) -> None:
    image, palette = tmp_path / "street.png", tmp_path / "palette.txt"
    cv2.imwrite(str(image), np.zeros((40, 60, 3), np.uint8))
    palette.write_text("\n".join(f"{index} #00ff0{index % 10}" for index in range(11)))
    words = ["--alpha", "1", "--no-legend", "--palette", palette]
    assert call("run", image, "-o", tmp_path / "o.png", *words).code == 0
    drawn = read_image(tmp_path / "o.png")
    assert (drawn[..., 1] == 255).all()
    assert drawn[..., 2].max() < 10
    words = ["--bundle", "street-panoptic", "--coco-panoptic", tmp_path / "coco"]
    assert call("run", image, *words, "--palette", palette).code == 0
    categories = json.loads((tmp_path / "coco/panoptic.json").read_text())["categories"]
    assert [one["color"] for one in categories] == [[0, 255, index % 10] for index in range(11)]
    answer = call("run", image, "-o", tmp_path / "p.png", "--palette", "cityskapes")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "a palette is model, distinct, cityscapes or a file" in answer.err


def _text_file(folder: Path) -> list[str]:
    (folder / "text.mp4").write_text("this is no video")
    return [str(folder / "text.mp4")]


def _empty_folder(folder: Path) -> list[str]:
    (folder / "empty").mkdir()
    return [str(folder / "empty")]


def _videos(folder: Path) -> list[str]:
    (folder / "my clips").mkdir()
    (folder / "my clips" / "b.MP4").write_bytes(b"")
    return [str(folder / "my clips")]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (_videos, "my clips/*.MP4' --out RESULTS"),
        (lambda folder: [str(folder / "*.mp4")], "*.mp4' --out RESULTS takes patterns"),
        (lambda _: ["a.mp4", "b c.mp4"], "knet-deploy batch a.mp4 'b c.mp4' --out RESULTS does"),
        (lambda _: [str(default_bundle_path())], "it is a bundle: name a video or images, and"),
        (lambda folder: [str(folder / "gone.mp4")], "gone.mp4"),
        (_text_file, "is not a video"),
        (_empty_folder, "has no images"),
        (lambda _: ["rtsp://me:secret@host/1"], "rtsp"),
    ],
)
def test_a_source_that_is_none_is_refused(
    call: Call, tmp_path: Path, make: Callable[[Path], list[str]], text: str
) -> None:
    answer = call("run", *make(tmp_path))
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert text in answer.err
    assert "secret" not in answer.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["--engine", "onnxruntime-gpu"],
            "'onnxruntime-gpu' is not one of 'auto', 'onnxruntime-cpu'",
        ),
        (["--engine", "onnxruntime-tensorrt-rtx"], "onnxruntime-ep-nv-tensorrt-rtx"),
        (["--self-test", "maybe"], "'maybe' is not one of 'refuse', 'warn', 'off'"),
        (["--policy", "fast"], "'fast' is not one of 'file', 'live'"),
        (["--transport", "pigeon"], "'pigeon' is not one of 'tcp', 'udp'"),
        (["-o", "o.mp4", "--codec", "av1"], "'av1' is not one of 'h264', 'hevc'"),
        (["--every", "2", "--start", "3", "--end", "1"], "is not after start"),
        (
            ["--source", "rtsp://127.0.0.1:1/x", "--loop"],
            "loop and realtime are for files, and this is none",
        ),
        (["--size", "big"], "write HEIGHTxWIDTH"),
        (["--size", "384x480"], "was exported for 360×480 only"),
        (["-o", "o.avi"], "end in .mp4"),
        (["-o", "o.png"], "single image"),
        (["-o", "o.mp4", "--alpha", "2"], "between 0 and 1"),
        (["--legend"], "name it with -o"),
        (["--overwrite"], "add -o FOLDER, --masks FOLDER"),
        (["--bundle", "gone.knet"], "there is no such bundle"),
        (["-o", "/dev/null/o.mp4"], "/dev/null/o.mp4"),
        (["--masks", "/dev/null/masks"], "/dev/null/masks"),
        (["--json", "/dev/null/o.jsonl"], "/dev/null/o.jsonl"),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_line(
    call: Call,
    video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    answer = call("run", video, *words)
    assert answer.code == 2, answer.err
    assert answer.err.count("\n") == 1
    assert text in answer.err
    assert list(tmp_path.iterdir()) == []


def _record(bundle: Path, engine: str, passed: bool) -> None:
    """As if verify had measured this engine here."""
    opened = open_bundle(bundle)
    measured = opened.graph("logits").parity[0]
    changes = {"engine": engine, "device": processor_name(), "passed": passed}
    record_parity(opened, "logits", msgspec.structs.replace(measured, **changes))


def _forget(bundle: Path) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for graph in manifest["graphs"]:
        graph["parity"] = []
    path.write_text(json.dumps(manifest), encoding="utf-8")


def test_the_engines_line_is_short_and_advises_only_what_works_here(
    call: Call, video: Path, copied_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["run", video, "--bundle", copied_bundle, "--max-frames", "1"]
    alone = engine_spec("openvino-bf16")
    alone = msgspec.structs.replace(alone, probe=_fails)
    others = {name: spec for name, spec in engine_specs().items() if name != alone.name}
    monkeypatch.setattr(knet_runtime.engines, "engine_specs", lambda: {**others, alone.name: alone})
    assert call(*words).out.startswith("engine       onnxruntime-cpu\n")
    there = msgspec.structs.replace(alone, probe=lambda _: "works")
    monkeypatch.setattr(knet_runtime.engines, "engine_specs", lambda: {**others, there.name: there})
    first = call(*words).out.splitlines()[0]
    assert first == (
        "engine       onnxruntime-cpu (openvino-bf16 works here, too, but is not verified: "
        "knet-deploy verify)"
    )


def _fails(_: str) -> str:
    raise EngineUnavailable("it is not installed")


def test_a_bundle_that_was_never_verified_runs_with_one_warning(
    call: Call, video: Path, copied_bundle: Path
) -> None:
    _forget(copied_bundle)
    words = ["run", video, "--bundle", copied_bundle, "--max-frames", "1"]
    answer = call(*words)
    assert answer.code == 0
    (line,) = answer.err.splitlines()
    assert line.startswith("knet-deploy: warning: ")
    for text in (
        "(fp32) on onnxruntime-cpu",
        "never verified on",
        f"verify {copied_bundle} --engine",
    ):
        assert text in line


def test_require_verified_refuses_what_was_not(
    call: Call, video: Path, copied_bundle: Path, tmp_path: Path
) -> None:
    words = ["run", video, "--bundle", copied_bundle, "--max-frames", "1", "--require-verified"]
    assert (call(*words).code, call(*words).err) == (0, "")
    _record(copied_bundle, "onnxruntime-cpu", False)
    named = [*words, "--engine", "onnxruntime-cpu", "--json", tmp_path / "o.jsonl"]
    failed = call(*named)
    assert failed.code == 1
    assert "it did not pass verify on" in failed.err
    assert failed.err.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()
    _record(copied_bundle, "onnxruntime-cpu", True)
    assert call(*named).code == 0
    _forget(copied_bundle)
    assert call(*words).code == 1


def test_an_engine_that_failed_is_never_taken_by_auto(
    call: Call, video: Path, copied_bundle: Path
) -> None:
    words = ["run", video, "--bundle", copied_bundle, "--max-frames", "1"]
    _record(copied_bundle, "onnxruntime-cpu", False)
    answer = call(*words)
    assert answer.code == 1
    assert "passes verify on no engine of this machine" in answer.err
    assert answer.err.count("\n") == 1


def test_the_models_size_is_chosen_within_what_the_bundle_takes(
    call: Call, tmp_path: Path, free_bundle: Bundle
) -> None:
    image = tmp_path / "halves.png"
    cv2.imwrite(str(image), np.repeat([[[0, 0, 255]] * 30 + [[255, 0, 0]] * 30], 40, 0))
    words = ["run", image, "--bundle", free_bundle.path, "--masks", tmp_path / "m", "--overwrite"]
    for size in ("16x24", "64x96", "8×8"):
        answer = call(*words, "--size", size)
        assert answer.code == 0, answer.err
        mask = read_mask(tmp_path / "m" / "halves.png")
        assert mask.shape == (40, 60)
        assert (mask[:, :20] == 0).all()
        assert (mask[:, 40:] == 2).all()
    for size in ("72x96", "12x24", "0x8"):
        answer = call(*words, "--size", size)
        assert answer.code == 2
        assert "heights 8 … 64 and widths 8 … 96 in multiples of 8" in answer.err
        assert answer.err.count("\n") == 1


def test_a_source_that_is_damaged_midway_keeps_what_was_written_as_partial(
    call: Call, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), np.zeros((32, 48, 3), np.uint8))
    (folder / "b.png").write_text("no image")
    answer = call("run", folder, "--json", tmp_path / "o.jsonl")
    assert answer.code == 2
    assert "b.png" in answer.err
    assert f"{tmp_path / 'o.partial.jsonl'}" in answer.out


def test_a_mask_folder_with_another_runs_masks_is_refused_or_overwritten(
    call: Call, tmp_path: Path
) -> None:
    photos, masks = tmp_path / "photos", tmp_path / "m"
    photos.mkdir()
    for name in "abc":
        cv2.imwrite(str(photos / f"{name}.png"), np.zeros((32, 48, 3), np.uint8))
    words = ["run", photos, "--masks", masks]
    assert call(*words).code == 0
    (photos / "c.png").unlink()
    (masks / "readme.txt").write_text("mine")
    before = {path.name: path.stat().st_mtime_ns for path in masks.iterdir()}
    answer = call(*words, "--json", tmp_path / "o.jsonl")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "m: holds the masks of another run; " in answer.err
    assert "--overwrite" in answer.err
    assert {path.name: path.stat().st_mtime_ns for path in masks.iterdir()} == before
    assert not (tmp_path / "o.jsonl").exists()
    assert call(*words, "--overwrite").code == 0
    assert sorted(path.name for path in masks.iterdir()) == ["a.png", "b.png", "readme.txt"]
    several = ["run", "--source", photos, "--source", photos / "a.png", "--masks", tmp_path / "s"]
    assert call(*several).code == 0
    answer = call(*several)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    (photos / "b.png").unlink()
    assert call(*several, "--overwrite").code == 0
    found = sorted(str(path.relative_to(tmp_path / "s")) for path in (tmp_path / "s").glob("*/*"))
    assert found == ["a/a.png", "photos/a.png"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_ended_early_leaves_a_video_that_plays(
    make_video: Callable[[int], Path], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    lines, overlay = tmp_path / "o.jsonl", tmp_path / "o.mp4"
    words = ["run", str(make_video(600)), "-o", str(overlay), "--json", str(lines)]
    with subprocess.Popen(
        [sys.executable, "-m", "knet_deploy", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        until = time.monotonic() + 60
        while not any(p.read_bytes().count(b"\n") > 2 for p in tmp_path.glob(".o.jsonl.*.part")):
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < until, "no frame was written"
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, b"")
    assert b"stopped" in out
    assert str(overlay).encode() in out
    assert count_frames(overlay) >= 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl", "o.mp4"]


@pytest.mark.parametrize("option", ["--json", "--rle"])
def test_lines_on_stdout_come_alone_and_at_once(
    make_video: Callable[[int], Path], option: str
) -> None:
    words = ["run", str(make_video(300)), option, "-"]
    with subprocess.Popen(
        [sys.executable, "-m", "knet_deploy", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert process.poll() is None  # it is there before the run has ended
        process.send_signal(signal.SIGTERM)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 143
    frames = [first["frame"], *(json.loads(line)["frame"] for line in rest.splitlines())]
    assert frames == list(range(len(frames)))
    assert b"stopped" in err


def test_a_reader_of_lines_that_has_had_enough_ends_the_run(
    make_video: Callable[[int], Path],
) -> None:
    words = ["run", str(make_video(300)), "--json", "-"]
    with subprocess.Popen(
        [sys.executable, "-m", "knet_deploy", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["frame"] == 0
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
        assert process.wait(60) == 0
    assert b"Traceback" not in err
    assert b"frames" in err
