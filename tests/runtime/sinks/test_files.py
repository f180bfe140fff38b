"""Overlay video, masks and JSON lines: what is written, when it appears, and under which name."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from fakes import a_frame
from numpy.typing import NDArray

from knet_runtime.drawing import legend_strip, text_scale
from knet_runtime.errors import ConfigError, OutputError
from knet_runtime.labels import LabelMap, distinct_palette
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks import JsonLines, Look, MaskFolder, OverlayVideo, Sink
from knet_runtime.sources.base import SourceInfo
from knet_synthetic import CAMVID11

VIDEO = SourceInfo("video", (48, 64), Fraction(25), None, Fraction(1, 1000))
IMAGES = SourceInfo("images", (48, 64), None, 3)


def read_video(path: Path) -> tuple[list[Fraction], list[NDArray[np.uint8]]]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        frames = list(container.decode(stream))
    assert {frame.format.name for frame in frames} == {"yuv420p"}
    times = [(frame.pts or 0) * Fraction(frame.time_base or 0) for frame in frames]
    return times, [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in frames]


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_times(
    path: Path, times: list[Fraction | None], info: SourceInfo = VIDEO
) -> tuple[OverlayVideo, list[Fraction]]:
    sink = OverlayVideo(path, info)
    for index, time in enumerate(times):
        sink.write(*a_frame(index, time))
    sink.close()
    return sink, read_video(path)[0]


def test_the_overlay_is_the_blend_of_each_frame(tmp_path: Path) -> None:
    sink = OverlayVideo(tmp_path / "o.mp4", VIDEO, Look(alpha=0.5))
    pairs = [a_frame(index, Fraction(index, 25)) for index in range(8)]
    for frame, mask in pairs:
        sink.write(frame, mask)
    sink.close()
    times, images = read_video(tmp_path / "o.mp4")
    assert times == [Fraction(index, 25) for index in range(8)]
    for (frame, mask), image in zip(pairs, images, strict=True):
        expected = mask.overlay(frame.image, 0.5).astype(int)
        assert np.abs(image - expected).mean() < 4
    assert files_in(tmp_path) == ["o.mp4"]


def test_the_legend_lies_below_the_frame(tmp_path: Path) -> None:
    sink = OverlayVideo(tmp_path / "o.mp4", VIDEO, Look(legend=True))
    sink.write(*a_frame(0))
    sink.close()
    height = 48 + legend_strip(CAMVID11, 64, scale=text_scale((48, 64))).shape[0]
    assert read_video(tmp_path / "o.mp4")[1][0].shape == (height + height % 2, 64, 3)


def test_a_variable_rate_is_kept_exactly(tmp_path: Path) -> None:
    times: list[Fraction | None] = [Fraction(t, 1000) for t in (0, 1, 7, 8, 200, 201, 1999, 2000)]
    sink, seen = write_times(tmp_path / "o.mp4", times)
    assert seen == times
    assert sink.retimed == 0


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30000, 1001), Fraction(2, 3)])
def test_missing_times_follow_the_rate(tmp_path: Path, rate: Fraction) -> None:
    info = SourceInfo("video", (48, 64), rate, None)
    _, seen = write_times(tmp_path / "o.mp4", [None] * 6, info)
    assert seen == [index / rate for index in range(6)]


def test_without_any_rate_thirty_a_second_and_images_two(tmp_path: Path) -> None:
    info = SourceInfo("camera", (48, 64), None, None)
    assert write_times(tmp_path / "a.mp4", [None] * 3, info)[1][2] == Fraction(2, 30)
    assert write_times(tmp_path / "b.mp4", [None] * 3, IMAGES)[1][2] == 1


def test_repeated_and_backward_times_are_nudged_and_counted(tmp_path: Path) -> None:
    times: list[Fraction | None] = [Fraction(t, 25) for t in (0, 1, 1, 2, 1, 3, 4)]
    sink, seen = write_times(tmp_path / "o.mp4", times)
    assert len(seen) == 7
    assert seen == sorted(set(seen))
    assert sink.retimed == 2
    tick = Fraction(1, 1000)
    assert seen[:5] == [0, Fraction(1, 25), Fraction(1, 25) + tick, Fraction(2, 25), seen[3] + tick]
    assert seen[5:] == times[5:]


def test_a_clock_that_begins_anew_goes_on_at_the_rate(tmp_path: Path) -> None:
    times: list[Fraction | None] = [Fraction(100), Fraction(101), Fraction(0), Fraction(1)]
    sink, seen = write_times(tmp_path / "o.mp4", times)
    assert seen == [0, 1, 1 + Fraction(1, 25), 2 + Fraction(1, 25)]
    assert sink.retimed == 1


def test_mixed_missing_and_negative_times_never_crash(tmp_path: Path) -> None:
    info = SourceInfo("video", (48, 64), None, None)
    times = [None, Fraction(-1), Fraction(1, 7), None, Fraction(1, 7), Fraction(5)]
    _, seen = write_times(tmp_path / "o.mp4", times, info)
    assert len(seen) == 6
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("hw", [(1, 1), (35, 51), (32, 7)])
def test_odd_sizes_are_padded_to_even_ones(tmp_path: Path, hw: tuple[int, int]) -> None:
    sink = OverlayVideo(tmp_path / "o.mp4", SourceInfo("image", hw, None, 1))
    frame, mask = a_frame(0, hw=hw)
    sink.write(frame, mask)
    sink.close()
    image = read_video(tmp_path / "o.mp4")[1][0]
    assert image.shape == (hw[0] + hw[0] % 2, hw[1] + hw[1] % 2, 3)
    expected = mask.overlay(frame.image).astype(int)
    assert np.abs(image[: hw[0], : hw[1]] - expected).mean() < 8


def test_a_frame_of_another_size_is_letterboxed_into_the_first(tmp_path: Path) -> None:
    sink = OverlayVideo(tmp_path / "o.mp4", VIDEO)
    sink.write(*a_frame(0))
    sink.write(*a_frame(1, hw=(48, 16)))
    sink.close()
    first, second = read_video(tmp_path / "o.mp4")[1]
    assert first.shape == second.shape == (48, 64, 3)
    assert second[:, :22].max() < 24
    assert second[:, 42:].max() < 24
    assert second[:, 26:38].min() > 24


def test_the_target_changes_only_at_close(tmp_path: Path) -> None:
    (tmp_path / "o.mp4").write_bytes(b"the old one")
    sink = OverlayVideo(tmp_path / "o.mp4", VIDEO)
    sink.write(*a_frame(0))
    assert (tmp_path / "o.mp4").read_bytes() == b"the old one"
    assert all(name.startswith(".") for name in files_in(tmp_path) if name != "o.mp4")
    sink.close()
    sink.close()
    assert len(read_video(tmp_path / "o.mp4")[0]) == 1
    with pytest.raises(ValueError, match="closed"):
        sink.write(*a_frame(1))


def test_partial_outputs_say_so_in_their_names(tmp_path: Path) -> None:
    sinks: tuple[Sink, ...] = (
        OverlayVideo(tmp_path / "o.mp4", VIDEO),
        JsonLines(tmp_path / "o.jsonl", "m@1"),
        MaskFolder(tmp_path / "masks"),
    )
    for sink in sinks:
        sink.write(*a_frame(0))
        sink.close(complete=False)
    assert files_in(tmp_path) == [
        "masks",
        "masks/000000.png",
        "masks/PARTIAL.txt",
        "o.partial.jsonl",
        "o.partial.mp4",
    ]
    assert "1 masks" in (tmp_path / "masks/PARTIAL.txt").read_text()
    again = MaskFolder(tmp_path / "masks", overwrite=True)
    again.write(*a_frame(0))
    again.close()
    assert files_in(tmp_path / "masks") == ["000000.png"]


def test_paths_say_where_results_are_after_the_end(tmp_path: Path) -> None:
    for complete, frames, names in (
        (True, 1, ["o.mp4", "o.jsonl", "m"]),
        (False, 1, ["o.partial.mp4", "o.partial.jsonl", "n"]),
        (False, 1, ["o.partial.2.mp4", "o.partial.2.jsonl", "l"]),
        (False, 0, [None, None, None]),
    ):
        sinks: tuple[Sink, ...] = (
            OverlayVideo(tmp_path / "o.mp4", VIDEO),
            JsonLines(tmp_path / "o.jsonl", "m@1"),
            MaskFolder(tmp_path / (names[2] or "k")),
        )
        for sink in sinks:
            for index in range(frames):
                sink.write(*a_frame(index))
            sink.close(complete=complete)
        assert [sink.path for sink in sinks] == [name and tmp_path / name for name in names]


def test_a_mask_folder_never_mixes_two_runs_and_keeps_what_is_not_a_runs(tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    folder.mkdir()
    (folder / "note.txt").write_text("mine")
    cv2.imwrite(str(folder / "truth.png"), np.zeros((4, 4), np.uint8))
    (folder / "sub.png").mkdir()
    sink = MaskFolder(folder)
    for index in range(3):
        sink.write(*a_frame(index))
    sink.close()
    own = ["note.txt", "sub.png", "truth.png"]
    masks = ["000000.png", "000001.png", "000002.png"]
    assert files_in(folder) == [*masks, *own]
    with pytest.raises(OutputError, match=r"masks: holds the masks of another run; .*--overwrite"):
        MaskFolder(folder)
    unused = MaskFolder(folder, overwrite=True)
    unused.close()
    assert files_in(folder) == [*masks, *own]  # until there is something else
    (folder / ".000002.png.0f.part").write_bytes(b"half of a mask of a killed run")
    (folder / ".o.jsonl.0f.part").write_bytes(b"lines of a killed run: for JsonLines to find")
    again = MaskFolder(folder, overwrite=True)
    again.write(*a_frame(1))
    again.close()
    assert files_in(folder) == [".o.jsonl.0f.part", "000001.png", *own]
    assert (folder / "truth.png").read_bytes() != (folder / "000001.png").read_bytes()


def test_a_mask_is_not_written_over_somebodys_file(tmp_path: Path) -> None:
    (tmp_path / "000001.png").write_bytes(b"mine")
    for overwrite in (False, True):
        sink = MaskFolder(tmp_path, overwrite=overwrite)
        sink.write(*a_frame(0))
        with pytest.raises(OutputError, match=r"000001\.png: is there already"):
            sink.write(*a_frame(1))
        sink.close(complete=False)
        assert files_in(tmp_path) == ["000000.png", "000001.png", "PARTIAL.txt"]
        assert (tmp_path / "000001.png").read_bytes() == b"mine"


@pytest.mark.skipif(os.name != "posix", reason="an open file cannot be removed there")
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_outputs_whose_folder_is_removed_meanwhile_are_kept_and_named(
    tmp_path: Path, suffix: str
) -> None:
    folder = tmp_path / "out"
    video = OverlayVideo(folder / f"o.{suffix}", VIDEO)
    lines, masks = JsonLines(folder / "o.jsonl", "m@1"), MaskFolder(folder / "m")
    for index in range(120):
        frame, mask = a_frame(index, Fraction(index, 25))
        for sink in (video, lines):
            sink.write(frame, mask)
    masks.write(*a_frame(0))
    shutil.rmtree(folder)
    with pytest.raises(OutputError, match=r"out/m/000001\.png: No such file"):
        masks.write(*a_frame(1))
    masks.close(complete=False)
    for sink in (video, lines):
        with pytest.raises(OutputError, match="what was written is kept in "):
            sink.close()
    assert (video.path, lines.path, masks.path) == (None, None, None)
    assert len((folder / "o.partial.jsonl").read_text().splitlines()) == 120
    with av.open(str(folder / f"o.partial.{suffix}")) as container:
        assert sum(1 for _ in container.decode(video=0)) >= 50  # what was in whole fragments
    assert files_in(folder) == ["o.partial.jsonl", f"o.partial.{suffix}"]


def test_a_torn_last_line_of_a_killed_run_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / ".o.jsonl.0f.part").write_bytes(b'{"frame":0}\n' + b"x" * 100_000)
    JsonLines(tmp_path / "o.jsonl", "m@1").close()
    assert (tmp_path / "o.partial.jsonl").read_bytes() == b'{"frame":0}\n'
    assert files_in(tmp_path) == ["o.partial.jsonl"]


def test_outputs_without_frames_leave_nothing(tmp_path: Path) -> None:
    for complete in (True, False):
        sinks: tuple[Sink, ...] = (
            OverlayVideo(tmp_path / "new/deep/o.mp4", VIDEO),
            JsonLines(tmp_path / "new/o.jsonl", "m@1"),
            MaskFolder(tmp_path / "new/masks"),
        )
        assert files_in(tmp_path) == []
        for sink in sinks:
            sink.close(complete=complete)
    assert files_in(tmp_path) == []


def test_missing_parents_are_created(tmp_path: Path) -> None:
    sinks: tuple[Sink, ...] = (
        OverlayVideo(tmp_path / "a/b/o.mp4", VIDEO),
        JsonLines(tmp_path / "c/d/o.jsonl", "m@1"),
        MaskFolder(tmp_path / "e/f"),
    )
    for sink in sinks:
        sink.write(*a_frame(0))
        sink.close()
    assert {"a/b/o.mp4", "c/d/o.jsonl", "e/f/000000.png"} <= set(files_in(tmp_path))


def test_places_that_cannot_be_written_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OutputError, match=r"o\.mp4: .*a part of this path is a file"):
        OverlayVideo(tmp_path / "file/o.mp4", VIDEO)
    with pytest.raises(OutputError, match=r"o\.jsonl: .*a part of this path is a file"):
        JsonLines(tmp_path / "file/o.jsonl", "m@1")
    with pytest.raises(OutputError, match=r"file: .*a part of this path is a file"):
        MaskFolder(tmp_path / "file")
    with pytest.raises(OutputError, match="is a folder; name a file in it"):
        OverlayVideo(tmp_path / "folder.mp4", VIDEO)
    assert files_in(tmp_path) == ["file", "folder.mp4"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="write to a folder that you may change"):
        MaskFolder(tmp_path / "masks")


def test_a_wrong_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"o\.avi: .*end in \.mp4"):
        OverlayVideo(tmp_path / "o.avi", VIDEO)


def test_the_next_encoder_is_tried_and_none_is_an_error(tmp_path: Path) -> None:
    sink = OverlayVideo(tmp_path / "o.mp4", VIDEO, encoders=("no_such_encoder", "libx264"))
    sink.write(*a_frame(0))
    sink.close()
    assert len(read_video(tmp_path / "o.mp4")[0]) == 1
    with pytest.raises(OutputError, match=r"tried no_such_encoder\); install PyAV"):
        OverlayVideo(tmp_path / "p.mp4", VIDEO, encoders=("no_such_encoder",))
    assert files_in(tmp_path) == ["o.mp4"]


def test_masks_are_grey_images_of_class_indices(tmp_path: Path) -> None:
    sink = MaskFolder(tmp_path / "masks")
    frame, mask = a_frame(0, name="street 1")
    sink.write(frame, mask)
    sink.close()
    read = cv2.imread(str(tmp_path / "masks/street 1.png"), cv2.IMREAD_UNCHANGED)
    assert read is not None
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, mask.class_map)


@pytest.mark.parametrize(("classes", "kind"), [(255, np.uint8), (256, np.uint16), (300, np.uint16)])
def test_more_than_255_classes_take_16_bits(tmp_path: Path, classes: int, kind: type) -> None:
    labels = LabelMap(tuple(map(str, range(classes))), distinct_palette(classes), 65535)
    indices = np.arange(classes)[None]
    class_map = indices.astype(np.uint16) if classes > 256 else indices.astype(np.uint8)
    frame, _ = a_frame(0)
    MaskFolder(tmp_path).write(frame, Segmentation(class_map, labels, {}))
    read = cv2.imread(str(tmp_path / "000000.png"), cv2.IMREAD_UNCHANGED)
    assert read is not None
    assert read.dtype == kind
    np.testing.assert_array_equal(read, class_map)


def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot hold folders"):
        MaskFolder(tmp_path / "masks").write(*a_frame(0, name="../x"))
    assert files_in(tmp_path) == []


def test_json_lines_hold_one_object_per_frame(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "o.jsonl", "street@0123456789ab")
    sink.write(*a_frame(0, Fraction(1, 3)))
    frame, mask = a_frame(1, None, name="straße")
    sink.write(replace(frame, wall=1_700_000_000.5, stale=True), mask)
    sink.close()
    first, second = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert first["shares"].pop("Sky") == first["shares"].pop("Road") == 0.5
    assert set(first["shares"].values()) == {0.0}
    del first["shares"]
    assert first == {
        "frame": 0,
        "name": "000000",
        "pts": pytest.approx(1 / 3),
        "wall": None,
        "stale": False,
        "size": [48, 64],
        "timings_ms": {"preprocess": 1.0, "infer": 2.5, "postprocess": 0.25},
        "model": "street@0123456789ab",
    }
    assert (second["name"], second["pts"]) == ("straße", None)
    assert (second["wall"], second["stale"]) == (1_700_000_000.5, True)
