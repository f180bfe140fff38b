from __future__ import annotations

import numpy as np
import pytest

from knet_runtime.errors import ConfigError
from knet_runtime.labels import LabelMap, distinct_palette
from knet_synthetic import CAMVID11


def test_palette_array_is_black_beyond_the_classes():
    table = CAMVID11.palette_array()
    assert table.shape == (256, 3)
    assert table.dtype == np.uint8
    assert tuple(table[8]) == CAMVID11.palette[8]
    assert not table[11:].any()


def test_palette_array_grows_with_the_classes():
    names = tuple(f"c{i}" for i in range(300))
    assert LabelMap(names, distinct_palette(300), 65535).palette_array().shape == (300, 3)


@pytest.mark.parametrize(
    ("names", "palette", "ignore_index", "reason"),
    [
        ((), (), 255, "at least one"),
        (("a", "b"), ((0, 0, 0),), 255, "2 class names but 1 colours"),
        (("a", "a"), ((0, 0, 0), (1, 1, 1)), 255, "differ"),
        (("a",), ((0, 0, 256),), 255, "0 … 255"),
        (("a",), ((0, 0, 0),), 0, "outside the classes"),
        (("a",), ((0, 0, 0),), -1, "outside the classes"),
        (("a",), ((0, 0, 0),), 65536, "65535"),
    ],
)
def test_contradictory_label_map_is_refused(names, palette, ignore_index, reason):
    with pytest.raises(ValueError, match=reason):
        LabelMap(names, palette, ignore_index)


def test_distinct_palette_has_no_colour_twice():
    assert len(set(distinct_palette(255))) == 255
    assert (0, 0, 0) not in distinct_palette(255)


def test_classes_are_found_by_name_in_any_case() -> None:
    assert CAMVID11.indices(["car", "ROAD", " Car "]) == (3, 8)
    assert CAMVID11.indices([]) == ()
    twins = LabelMap(("Bus", "bus"), ((0, 0, 0), (1, 1, 1)), 255)
    assert twins.indices(["Bus"]) == (0,)
    assert twins.indices(["bus"]) == (1,)


def test_an_unknown_class_is_refused_with_the_list_of_classes() -> None:
    with pytest.raises(ConfigError, match="no class 'lorry'; this model's are Sky, Building, Pole"):
        CAMVID11.indices(["Car", "lorry"])


@pytest.mark.parametrize(
    "name",
    [
        "a\nb",
        "a\rb",
        "a\tb",
        "\x1b[31mred",
        "a\u2028b",
        "a\u202eb",
        "a\x00",
        "\ufeffa",
        "caf\udce9",
    ],
)
def test_a_class_name_that_could_steer_what_shows_it_is_refused(name):
    with pytest.raises(ValueError, match=r"take out .* control character") as refused:
        LabelMap(("road", name), distinct_palette(2), 255)
    assert str(refused.value).isascii()
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["", " ", " road", "road ", "\u3000road"])
def test_a_class_name_without_letters_or_with_spaces_around_is_refused(name):
    with pytest.raises(ValueError, match="must not be empty, nor begin or end with a space"):
        LabelMap(("road", name), distinct_palette(2), 255)


@pytest.mark.parametrize(
    "name", ["traffic light", "Straße", "背景", "دوچرخه\u200cسوار", "<b>", "😀"]
)
def test_a_class_name_may_be_of_any_script(name):
    assert LabelMap((name,), ((0, 0, 0),), 255).indices([name]) == (0,)
