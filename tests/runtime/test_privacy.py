"""Privacy: nothing of what is hidden is left in the image."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from knet_runtime.errors import ConfigError
from knet_runtime.labels import LabelMap
from knet_runtime.privacy import Concealed, Concealer, conceal, margin
from knet_runtime.segmentation import Instance, Segmentation
from knet_runtime.sinks import OverlayVideo
from knet_runtime.sources.base import SourceInfo
from knet_runtime.types import Frame
from knet_synthetic import CAMVID11

HW = (240, 320)
BOUND = 0.05  # of |correlation| between hidden pixels and what stands in their place


def a_image(seed: int = 0) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    image = np.full((*HW, 3), (90, 120, 60), np.uint8)
    image[100:180, 120:220] = random.integers(0, 256, (80, 100, 3), np.uint8)
    return image


def a_region() -> NDArray[np.uint8]:
    region = np.zeros(HW, np.uint8)
    region[100:180, 120:220] = 255
    return region


def correlation(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """The largest |r| over the channels; 0 where one of the two is constant."""
    found = [0.0]
    for channel in range(3):
        x, y = (p[..., channel].ravel().astype(float) for p in (a, b))
        if x.std() and y.std():
            found.append(abs(float(np.corrcoef(x, y)[0, 1])))
    return max(found)


def test_hidden_pixels_have_no_part_in_the_result() -> None:
    """The strongest statement there is: other hidden pixels, the very same result."""
    region, reach = a_region(), margin(*HW)
    around = slice(100 - reach, 180 + reach), slice(120 - reach, 220 + reach)
    first, second = a_image(), a_image()
    second[around] = np.random.default_rng(5).integers(0, 256, second[around].shape, np.uint8)
    np.testing.assert_array_equal(conceal(first, region), conceal(second, region))


def test_the_result_does_not_correlate_with_what_was_there() -> None:
    image, inside = a_image(), (slice(100, 180), slice(120, 220))
    hidden = conceal(image, a_region())
    assert correlation(image[inside], hidden[inside]) < BOUND
    assert correlation(image[inside], image[inside]) > 0.99
    assert hidden[inside].std((0, 1)).max() < 2  # nor is there anything that could


def test_the_edge_is_hidden_too_and_the_rest_is_untouched() -> None:
    image, reach = a_image(), margin(*HW)
    image[95:100, 115:225] = 255  # a rim that the class map has missed
    hidden = conceal(image, a_region())
    assert reach >= 6
    assert hidden[90:190, 110:230].max() < 160
    outside = np.ones(HW, bool)
    outside[100 - reach : 180 + reach, 120 - reach : 220 + reach] = False
    np.testing.assert_array_equal(hidden[outside], image[outside])


def test_a_image_that_is_hidden_throughout_is_grey() -> None:
    hidden = conceal(a_image(), np.full(HW, 255, np.uint8))
    assert np.unique(hidden).tolist() == [128]


@pytest.mark.parametrize("hw", [(1, 1), (7, 9), (33, 500)])
def test_any_size(hw: tuple[int, int]) -> None:
    image = np.full((*hw, 3), 200, np.uint8)
    region = np.zeros(hw, np.uint8)
    region[0, 0] = 255
    assert conceal(image, region).shape == image.shape


class Kept:
    """A sink that keeps what it is given."""

    name, path = "kept", None

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.results: list[Segmentation] = []
        self.closed: list[bool] = []

    def write(self, frame: Frame, mask: Segmentation) -> None:
        self.frames.append(frame)
        self.results.append(mask)

    def close(self, *, complete: bool = True) -> None:
        self.closed.append(complete)


def test_sinks_see_only_the_concealed_frame_and_the_work_is_done_once() -> None:
    class_map = np.where(a_region(), 8, 3).astype(np.uint8)
    frame, mask = Frame(a_image(), 0, None, "0"), Segmentation(class_map, CAMVID11, {})
    concealer, kept, other = Concealer(CAMVID11, ["car", "PEDESTRIAN"]), Kept(), Kept()
    for sink in (Concealed(kept, concealer), Concealed(other, concealer)):
        sink.write(frame, mask)
        sink.close(complete=False)
        assert (sink.name, sink.path) == ("kept", None)
    np.testing.assert_array_equal(kept.frames[0].image, conceal(frame.image, a_region()))
    assert kept.frames[0] is other.frames[0]
    assert kept.results == [mask]
    assert kept.closed == [False]
    Concealed(kept, concealer).write(frame, replace(mask, image=frame.image))
    np.testing.assert_array_equal(kept.results[1].image, kept.frames[0].image)
    nothing = Segmentation(np.full(HW, 3, np.uint8), CAMVID11, {})
    assert concealer(frame, nothing) is frame


def test_16_bit_maps_are_concealed_and_unknown_names_refused() -> None:
    class_map = np.where(a_region(), 8, 3).astype(np.uint16)
    frame = Frame(a_image(), 0, None, "0")
    clean = Concealer(CAMVID11, ["Car"])(frame, Segmentation(class_map, CAMVID11, {}))
    np.testing.assert_array_equal(clean.image, conceal(frame.image, a_region()))
    with pytest.raises(ConfigError, match="no class 'Bus'"):
        Concealer(CAMVID11, ["Bus"])


def test_the_encoded_overlay_shows_nothing_of_it(tmp_path: Path) -> None:
    info = SourceInfo("video", HW, Fraction(25), None, Fraction(1, 1000))
    sink = Concealed(OverlayVideo(tmp_path / "o.mp4", info), Concealer(CAMVID11, ["Car"]))
    class_map = np.where(a_region(), 8, 3).astype(np.uint8)
    for index in range(5):
        frame = Frame(a_image(index), index, Fraction(index, 25), str(index))
        sink.write(frame, Segmentation(class_map, CAMVID11, {}))
    sink.close()
    with av.open(str(tmp_path / "o.mp4")) as container:
        for index, image in enumerate(container.decode(video=0)):
            shown = image.to_ndarray(format="rgb24")[110:170, 130:210]
            assert correlation(a_image(index)[110:170, 130:210], shown) < BOUND


def test_an_object_is_hidden_where_another_one_lies_above_it() -> None:
    labels = LabelMap(("car", "person"), ((0, 0, 142), (220, 20, 60)), 255, things=(0, 1))
    person = Instance(1, 0.6, 120, 100, np.ones((80, 100), np.bool_))
    car = Instance(0, 0.9, 120, 100, np.ones((80, 100), np.bool_))
    result = Segmentation.from_instances([car, person], HW, labels)
    assert not (result.class_map == 1).any()
    frame = Frame(a_image(), 0, None, "0")
    hidden = Concealer(labels, ["person"])(frame, result)
    np.testing.assert_array_equal(hidden.image, conceal(frame.image, a_region()))
    alone = Segmentation.from_instances([car], HW, labels)
    assert Concealer(labels, ["person"])(frame, alone) is frame
