"""The label map: class names, colours, things, and the ignore index of one task."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import ConfigError, DataError

Colour = tuple[int, int, int]


class LabelMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names and RGB colours of classes 0 … N-1, and the label value that means "not labelled".

    ``things`` are the classes whose objects are told apart (cars), in ascending order; the others
    are stuff (road).

        >>> from knet_deploy import LabelMap
        >>> labels = LabelMap(("road", "car"), ((128, 64, 128), (0, 0, 142)), ignore_index=255)
        >>> labels.indices(["Car"])
        (1,)
    """

    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    ignore_index: int
    things: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("a label map needs at least one class")
        if len(self.names) != len(self.palette):
            raise ValueError(f"{len(self.names)} class names but {len(self.palette)} colours")
        if len(set(self.names)) != len(self.names):
            raise ValueError("class names must differ from one another")
        if any(not 0 <= value <= 255 for colour in self.palette for value in colour):
            raise ValueError("colours are RGB triples of 0 … 255")
        if 0 <= self.ignore_index < len(self.names) or not 0 <= self.ignore_index <= 65535:
            raise ValueError(
                f"ignore_index {self.ignore_index} must lie outside the classes "
                f"0 … {len(self.names) - 1} and within 0 … 65535"
            )
        if list(self.things) != sorted(set(self.things) & set(range(len(self.names)))):
            raise ValueError(
                f"things {list(self.things)} must be classes 0 … {len(self.names) - 1}, ascending, "
                "each once"
            )

    @property
    def num_classes(self) -> int:
        return len(self.names)

    def indices(self, names: Sequence[str]) -> tuple[int, ...]:
        """The classes of these names, upper and lower case being the same, in label order.

        Raises ConfigError for a name that is none of them.
        """
        exact = {name: index for index, name in enumerate(self.names)}
        folded = {name.casefold(): index for index, name in enumerate(self.names)}
        found = set()
        for name in names:
            index = exact.get(name, folded.get(name.strip().casefold()))
            if index is None:
                raise ConfigError(
                    f"there is no class {name!r}; this model's are {', '.join(self.names)}"
                )
            found.add(index)
        return tuple(sorted(found))

    def palette_array(self) -> NDArray[np.uint8]:
        """Colours as uint8 [256, 3] RGB; values without a class are black."""
        table = np.zeros((max(256, self.num_classes), 3), np.uint8)
        table[: self.num_classes] = self.palette
        return table


class _LabelsJson(msgspec.Struct):
    class_names: tuple[str, ...]
    palette_rgb: tuple[Colour, ...] | None = None
    ignore_index: int = 255


def load_labels_json(path: Path) -> LabelMap:
    """Read a data set's ``labels.json``: ``class_names``, and optionally ``palette_rgb``
    (a distinct palette is made when it is absent) and ``ignore_index`` (255).

    Raises DataError with the file's name when it is missing or malformed.
    """
    try:
        return _decode(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; a data folder needs a labels.json with class_names"
        ) from error
    except (msgspec.DecodeError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error


def _decode(data: bytes) -> LabelMap:
    raw = msgspec.json.decode(data, type=_LabelsJson)
    palette = raw.palette_rgb or distinct_palette(len(raw.class_names))
    return LabelMap(raw.class_names, palette, raw.ignore_index)


@cache
def ade20k() -> LabelMap:
    """The 150 classes of ADE20K's scene parsing benchmark (arXiv 1608.05442) in its order, with
    mmsegmentation's short names and palette (``mmseg/utils/class_names.py``); 255 is void."""
    return _decode((resources.files("knet_runtime") / "ade20k.json").read_bytes())


def distinct_palette(count: int) -> tuple[Colour, ...]:
    """``count`` colours by the bit-shuffling scheme of Pascal VOC's colormap, from index 1 on."""
    colours = []
    for index in range(1, count + 1):
        colour = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                colour[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        colours.append((colour[0], colour[1], colour[2]))
    return tuple(colours)


CAMVID11 = LabelMap(
    names=(
        "Sky",
        "Building",
        "Pole",
        "Road",
        "Pavement",
        "Tree",
        "SignSymbol",
        "Fence",
        "Car",
        "Pedestrian",
        "Bicyclist",
    ),
    palette=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
    ignore_index=11,
)

CITYSCAPES19 = LabelMap(
    names=(
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    ),
    palette=(
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
        (0, 0, 142),
        (0, 0, 70),
        (0, 60, 100),
        (0, 80, 100),
        (0, 0, 230),
        (119, 11, 32),
    ),
    ignore_index=255,
)
