"""What overlays show: legends, frames side by side, and a folder with one for each image."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import fakes
import numpy as np
import pytest
from numpy.typing import NDArray

from knet_runtime.drawing import legend_strip, text_scale
from knet_runtime.errors import ConfigError, OutputError
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks import Look, OverlayFolder, OverlayImage, OverlayVideo
from knet_runtime.sinks.look import OverlayPainter
from knet_runtime.sources.base import SourceInfo
from knet_runtime.sources.images import read_image
from knet_runtime.types import Frame
from knet_synthetic import CAMVID11

HW = (96, 128)
VIDEO = SourceInfo("video", HW, Fraction(25), None, Fraction(1, 90_000))


def a_frame(
    index: int, pts: Fraction | None, hw: tuple[int, int] = HW, name: str = "a"
) -> tuple[Frame, Segmentation]:
    image = np.random.default_rng(index).integers(60, 200, (*hw, 3), np.uint8)
    frame, mask = fakes.a_frame(index, pts, image=image)
    return Frame(frame.image, index, pts, name), mask


def covered(share: float, name: str = "Car") -> Segmentation:
    """Road, of which a share is another class."""
    classes = np.full((100, 100), CAMVID11.names.index("Road"), np.uint8)
    classes[: round(100 * share)] = CAMVID11.names.index(name)
    return Segmentation(classes, CAMVID11)


def legends(frames: list[tuple[Fraction | None, Segmentation]]) -> list[NDArray[np.uint8]]:
    painter = OverlayPainter(Look(legend=True), steady=True)
    image = np.zeros((100, 100, 3), np.uint8)
    return [
        painter.paint(Frame(image, index, pts, str(index)), result)[100:]
        for index, (pts, result) in enumerate(frames)
    ]


def names(strip: NDArray[np.uint8], name: str) -> bool:
    colour = CAMVID11.palette[CAMVID11.names.index(name)]
    return bool((strip == colour).all(2).sum() > 40)


def test_a_videos_legend_does_not_flicker_and_forgets_after_two_seconds() -> None:
    tenths = [Fraction(index, 10) for index in range(40)]
    seen = [covered(0.2) if index in (5, 7) else covered(0) for index in range(40)]
    strips = legends(list(zip(tenths, seen, strict=True)))
    assert len({strip.shape for strip in strips}) == 1
    assert [names(strip, "Car") for strip in strips] == [5 <= index < 27 for index in range(40)]
    assert all(names(strip, "Road") for strip in strips)


def test_a_class_keeps_its_place_when_another_one_comes_or_goes() -> None:
    times = [Fraction(0), Fraction(1), Fraction(5, 2)]
    first, _, last = strips = legends(
        list(zip(times, [covered(0.2, "Sky"), covered(0), covered(0)], strict=True))
    )
    assert [names(strip, "Sky") for strip in strips] == [True, True, False]
    road = CAMVID11.palette[CAMVID11.names.index("Road")]
    np.testing.assert_array_equal((first == road).all(2), (last == road).all(2))


def name_places(frames: list[tuple[Fraction | None, int, range]]) -> list[tuple[int, int]]:
    """Where a region of these columns has its name, in frames of these times and scenes."""
    painter, found = OverlayPainter(Look(names=True), steady=True), []
    image = np.zeros((120, 400, 3), np.uint8)
    for index, (pts, scene, columns) in enumerate(frames):
        classes = np.full(image.shape[:2], 255, np.uint8)
        classes[:, columns] = 0
        result = Segmentation(classes, CAMVID11)
        painted = painter.paint(Frame(image, index, pts, str(index), scene=scene), result)
        rows, across = np.nonzero((painted != result.overlay(image)).any(2))
        assert across.size
        found.append((int(across.min()), int(rows.min())))
    return found


def test_a_name_stays_in_its_place_while_that_lies_in_its_region() -> None:
    wide = [range(left, left + 190) for left in (100, 130, 20, 60, 205, 5)]
    frames = [(Fraction(index, 25), 0, columns) for index, columns in enumerate(wide)]
    places, alone = name_places(frames), [name_places([one])[0] for one in frames]
    assert len(set(alone)) == 6
    assert places == [*alone[:1] * 4, *alone[4:]]  # the fifth is no longer there where it stood


@pytest.mark.parametrize(("pts", "scene"), [(Fraction(9), 0), (Fraction(1, 25), 1), (None, 0)])
def test_names_are_placed_anew_after_a_gap_in_another_scene_and_without_times(
    pts: Fraction | None, scene: int
) -> None:
    frames = [(Fraction(0), 0, range(100, 300)), (pts, scene, range(130, 330))]
    assert name_places(frames)[1] == name_places(frames[1:])[0]
    assert len({*name_places(frames)}) == 2


def test_a_region_that_grows_and_shrinks_loses_its_name_late() -> None:
    painter, shown = OverlayPainter(Look(names=True), steady=True), []
    image = np.zeros((300, 400, 3), np.uint8)
    for index, side in enumerate((34, 44, 40, 34, 28)):  # of 120,000 pixels 1,800 are large
        classes = np.full(image.shape[:2], 255, np.uint8)
        classes[100 : 100 + side, 100 : 100 + side] = 0
        result = Segmentation(classes, CAMVID11)
        painted = painter.paint(Frame(image, index, Fraction(index, 25), str(index)), result)
        shown.append(bool((painted != result.overlay(image)).any()))
    assert shown == [False, True, True, True, False]


def test_images_without_a_time_have_legends_of_their_own() -> None:
    strips = legends([(None, covered(0.2)), (None, covered(0)), (None, covered(0.2, "Sky"))])
    assert [names(strip, "Car") for strip in strips] == [True, False, False]
    assert names(strips[2], "Sky")


def test_a_legend_has_only_what_is_in_the_image(tmp_path: Path) -> None:
    sink = OverlayImage(tmp_path / "o.png", Look(legend=True))
    result = covered(0.2)
    sink.write(Frame(np.zeros((100, 100, 3), np.uint8), 0, None, "a"), result)
    strip = read_image(tmp_path / "o.png")[100:]
    shown = [CAMVID11.names.index(name) for name in ("Road", "Car")]
    expected = legend_strip(CAMVID11, 100, result.shares(), shown, text_scale((100, 100)))
    np.testing.assert_array_equal(strip, expected)


@pytest.mark.parametrize("legend", [False, True])
def test_side_by_side_has_the_frame_left_and_the_overlay_right(
    tmp_path: Path, legend: bool
) -> None:
    frame, mask = a_frame(0, None)
    image, video = tmp_path / "o.png", tmp_path / "o.mp4"
    OverlayImage(image, Look(side_by_side=True, legend=legend)).write(frame, mask)
    drawn = read_image(image)
    height, width = HW
    assert (drawn.shape[0] > height) == legend
    assert drawn.shape[1] == 2 * width
    np.testing.assert_array_equal(drawn[:height, :width], frame.image)
    np.testing.assert_array_equal(drawn[:height, width:], mask.overlay(frame.image))
    sink = OverlayVideo(video, VIDEO, Look(side_by_side=True))
    for index, hw in enumerate([HW, (33, 31)]):
        sink.write(*a_frame(index, Fraction(index, 25), hw))
    sink.close()
    with av.open(str(video)) as container:
        sizes = {(one.height, one.width) for one in container.decode(video=0)}
    assert sizes == {(height, 2 * width)}


def test_a_folder_has_an_overlay_for_each_image_at_its_own_size(tmp_path: Path) -> None:
    sink = OverlayFolder(tmp_path / "overlays")
    frames = [
        a_frame(0, None),
        a_frame(1, None, (33, 31), "Straße 道路"),
        a_frame(2, None, (1, 1), "b.png"),
    ]
    for frame, mask in frames:
        sink.write(frame, mask)
    sink.write(Frame(frame.image, 2, None, frame.name, stale=True), mask)  # is there already
    sink.close()
    found = sorted(path.name for path in (tmp_path / "overlays").iterdir())
    assert found == ["Straße 道路.jpg", "a.jpg", "b.png.jpg"]
    for frame, mask in frames:
        drawn = read_image(tmp_path / "overlays" / f"{frame.name}.jpg")
        assert drawn.shape == frame.image.shape
        assert np.abs(drawn.astype(int) - mask.overlay(frame.image)).mean() < 25


def test_a_folder_of_overlays_never_mixes_runs_nor_writes_over_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "overlays"
    first = OverlayFolder(folder)
    first.write(*a_frame(0, None))
    first.close(complete=False)
    (folder / "photo.jpg").write_bytes(b"not ours")
    assert (folder / "PARTIAL.txt").read_text() == "The run ended early: 1 overlays were written.\n"
    with pytest.raises(OutputError, match="holds the overlays of another run"):
        OverlayFolder(folder)
    second = OverlayFolder(folder, overwrite=True)
    second.write(*a_frame(1, None, name="b"))
    with pytest.raises(OutputError, match="is there already"):
        second.write(*a_frame(2, None, name="photo"))
    second.close()
    assert sorted(path.name for path in folder.iterdir()) == ["b.jpg", "photo.jpg"]
    assert (folder / "photo.jpg").read_bytes() == b"not ours"


def test_wrong_options_of_a_folder_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Look(alpha=2)
    sink = OverlayFolder(tmp_path / "o", Look(classes=("bus",)))
    with pytest.raises(ConfigError, match="there is no class 'bus'"):
        sink.write(*a_frame(0, None))
    sink.close()
    assert list(tmp_path.iterdir()) == []
