"""Colours of classes: generated, Cityscapes' and those of files."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from knet_runtime.bundle.store import open_bundle
from knet_runtime.colours import Colour, distinct_palette, hex_colour
from knet_runtime.errors import ConfigError
from knet_runtime.labels import LabelMap
from knet_runtime.palettes import recoloured
from knet_synthetic import CAMVID11

# Machado, Oliveira and Fernandes 2009, severity 1.0, from linear RGB to linear RGB.
SIGHTS = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def smallest_difference(palette: tuple[Colour, ...], sight: str) -> float:
    """The smallest CIELAB difference (ΔE 1976; 2.3 is just noticeable) between two colours."""
    rgb = np.array(palette, np.float64) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (linear @ SIGHTS[sight].T).clip(0, 1)
    coded = np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab: NDArray[np.float32] = cv2.cvtColor(coded[None].astype(np.float32), cv2.COLOR_RGB2LAB)[0]
    differences = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return float(differences[np.triu_indices(len(palette), 1)].min())


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize(("count", "least"), [(6, 12), (11, 12), (19, 8), (40, 4.5), (150, 1.5)])
def test_generated_colours_are_told_apart_also_by_colour_blind_eyes(
    sight: str, count: int, least: float
) -> None:
    assert smallest_difference(distinct_palette(count), sight) > least


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("name", ["default", "street-panoptic"])
def test_the_packaged_models_have_colours_that_are_told_apart(sight: str, name: str) -> None:
    labels = open_bundle(None if name == "default" else name).manifest.labels
    assert smallest_difference(labels.palette, sight) > 12
    # What CamVid's own colours do not give: they are why there are others.
    assert smallest_difference(CAMVID11.palette, "deuteranopia") < 6


def test_generated_colours_are_the_same_everywhere_and_fewer_begin_more() -> None:
    assert distinct_palette(10) == (
        *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178)),
        *((213, 94, 0), (119, 68, 85), (136, 255, 204), (170, 68, 255), (170, 0, 0)),
    )
    assert distinct_palette(4) == distinct_palette(10)[:4]
    assert distinct_palette(0) == ()


def test_there_are_colours_for_any_number_of_classes() -> None:
    many = distinct_palette(1500)
    assert len(many) == 1500
    assert len(set(many)) == 1024
    assert all(0 <= value <= 255 for colour in many for value in colour)


def test_cityscapes_colours_are_found_by_the_names_of_other_data_sets() -> None:
    palette = dict(zip(CAMVID11.names, recoloured(CAMVID11, "cityscapes").palette, strict=True))
    assert palette["Road"] == (128, 64, 128)
    assert palette["Pavement"] == (244, 35, 232)
    assert palette["Tree"] == (107, 142, 35)
    assert palette["SignSymbol"] == (220, 220, 0)
    assert palette["Bicyclist"] == (255, 0, 0)
    names = ("object--vehicle--car", "sky-other-merged", "Traffic Light", "toaster")
    grey = LabelMap(names, ((9, 9, 9),) * 4, 255)
    car, sky, light, toaster = recoloured(grey, "cityscapes").palette
    assert (car, sky, light) == ((0, 0, 142), (70, 130, 180), (250, 170, 30))
    assert toaster not in (car, sky, light, (9, 9, 9))


def test_no_two_classes_get_the_same_cityscapes_colour() -> None:
    labels = LabelMap(("tree", "plant", "vegetation", "person"), ((0, 0, 0),) * 4, 255)
    palette = recoloured(labels, "cityscapes").palette
    assert len(set(palette)) == 4
    assert palette[2] == (107, 142, 35)  # its own name comes before the others'


@pytest.mark.parametrize(
    "text",
    [
        "Car #FF0000\n# a comment\n\n3: #00ff00\nsky = #0000ff",
        '{"Car": "#ff0000", "3": "#00ff00", "Sky": "#0000ff"}',
        "\ufeffcar,#ff0000\n3\t#00ff00\nSky   #0000ff\n",
    ],
)
def test_a_file_gives_colours_to_some_classes(tmp_path: Path, text: str) -> None:
    file = tmp_path / "Farben.txt"
    file.write_text(text, "utf-8")
    palette = recoloured(CAMVID11, file).palette
    assert (palette[8], palette[3], palette[0]) == ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    assert palette[1] == CAMVID11.palette[1]


def test_a_file_names_classes_of_several_words_in_any_script(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("traffic light #010203\n道路: #040506", "utf-8")
    labels = LabelMap(("道路", "traffic light"), ((0, 0, 0), (0, 0, 0)), 255)
    assert recoloured(labels, str(file)).palette == ((4, 5, 6), (1, 2, 3))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"Car red", "'red', which is no colour #rrggbb"),
        (b"Car #ff00", "which is no colour"),
        (b"Bus #ff0000", "there is no class 'Bus'; this model's are Sky"),
        (b"11 #ff0000", "there is no class 11; this model has 0 … 10"),
        (b"Car", "line 1 is 'Car': write JSON"),
        (b"", "names no class"),
        (b'{"Car": 3}', "Expected `str`"),
        (b'{"Car"', "truncated"),
        (b"\xff\xfe\x00", "is no text in UTF-8"),
        (None, "No such file or directory; a palette is model, distinct, cityscapes or a file"),
    ],
)
def test_a_wrong_file_is_refused_in_a_line(
    tmp_path: Path, text: bytes | None, problem: str
) -> None:
    file = tmp_path / "palette"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        recoloured(CAMVID11, file)
    assert problem in str(caught.value)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_bundle_with_another_palette_is_the_same_model() -> None:
    bundle = open_bundle()
    other = bundle.with_palette("distinct")
    assert other.model_id == bundle.model_id
    assert other.manifest.labels.palette == distinct_palette(11)
    assert other.manifest.labels.names == bundle.manifest.labels.names
    assert bundle.with_palette("model").manifest == bundle.manifest


@pytest.mark.parametrize(
    ("text", "colour"),
    [("#0A0b0c", (10, 11, 12)), ("0a0b0c", None), ("#0a0b0", None), ("#0a0b0g", None), ("", None)],
)
def test_hex_colours(text: str, colour: Colour | None) -> None:
    assert hex_colour(text) == colour
