"""Other colours for the classes of a model: generated, Cityscapes', or those of a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import msgspec

from knet_runtime.colours import Colour, distinct_palette, further, hex_colour
from knet_runtime.errors import ConfigError
from knet_runtime.labels import LabelMap

PaletteName = Literal["model", "distinct", "cityscapes"]

_CITYSCAPES = Path(__file__).with_name("cityscapes.json")
# What other data sets call Cityscapes' classes, without spaces, signs and what _ENDS has.
_ALIASES = {
    **dict.fromkeys(("street", "drivable"), "road"),
    **dict.fromkeys(("pavement", "footpath"), "sidewalk"),
    **dict.fromkeys(("house", "buildings"), "building"),
    **dict.fromkeys(("columnpole", "utilitypole"), "pole"),
    **dict.fromkeys(("signsymbol", "sign", "trafficsignfront"), "trafficsign"),
    **dict.fromkeys(("tree", "trees", "plant", "plants"), "vegetation"),
    **dict.fromkeys(("grass", "earth", "dirt"), "terrain"),
    **dict.fromkeys(("pedestrian", "people", "human"), "person"),
    **dict.fromkeys(("bicyclist", "cyclist", "motorcyclist"), "rider"),
    **dict.fromkeys(("motorbike", "motorcyclescooter"), "motorcycle"),
    "bike": "bicycle",
    "vehicle": "car",
    "lorry": "truck",
}
_ENDS = re.compile("(-other)?(-merged|-stuff)?$")  # of COCO's names
_LINE = re.compile(r"(\S.*?)[\s=:,]+(\S+)")
_FORM = 'write JSON {"road": "#804080"}, or a line: road #804080'


def recoloured(labels: LabelMap, palette: str | Path) -> LabelMap:
    """``labels`` with other colours.

    ``palette`` is "model" (as they are), "distinct" (``distinct_palette``), "cityscapes" (its
    colours for classes of its names, or of usual other names for them, and distinct ones for the
    rest), or a file that names colours for some classes or all: JSON ``{"road": "#804080"}``, or a
    line ``road #804080`` for each. There the key is a class's name or its index. Raises
    ConfigError.

        >>> from knet_runtime.labels import LabelMap
        >>> labels = LabelMap(("Road", "Car"), ((0, 0, 0), (0, 0, 0)), ignore_index=255)
        >>> recoloured(labels, "cityscapes").palette
        ((128, 64, 128), (0, 0, 142))
    """
    match palette:
        case "model":
            return labels
        case "distinct":
            colours = distinct_palette(labels.num_classes)
        case "cityscapes":
            colours = _filled(labels, _cityscapes())
        case _:
            found = _indexed(Path(palette), labels)
            colours = tuple(found.get(index, colour) for index, colour in enumerate(labels.palette))
    return msgspec.structs.replace(labels, palette=colours)


def _filled(labels: LabelMap, known: Mapping[str, Colour]) -> tuple[Colour, ...]:
    """Each of ``known`` for one class: that of its name before those of other names for it."""
    plain = [_plain(name) for name in labels.names]
    found: dict[int, Colour] = {}
    for names in (plain, [_ALIASES.get(name, name) for name in plain]):
        for index, name in enumerate(names):
            colour = known.get(name)
            if colour is not None and index not in found and colour not in found.values():
                found[index] = colour
    others = iter(further(tuple(found.values()), labels.num_classes - len(found)))
    return tuple(
        found[index] if index in found else next(others) for index in range(labels.num_classes)
    )


def _plain(name: str) -> str:
    """A class's name for comparing; of Mapillary's ("nature--vegetation") the last part."""
    last = name.casefold().rpartition("--")[2]
    return re.sub(r"[\W_]", "", _ENDS.sub("", last))


def _cityscapes() -> dict[str, Colour]:
    stated = msgspec.json.decode(_CITYSCAPES.read_bytes())
    pairs = zip(stated["class_names"], stated["palette_rgb"], strict=True)
    return {_plain(name): (colour[0], colour[1], colour[2]) for name, colour in pairs}


def _indexed(path: Path, labels: LabelMap) -> dict[int, Colour]:
    """The colours of a file by class. Raises ConfigError."""
    found = {}
    for key, text in _read(path):
        colour = hex_colour(text)
        if colour is None:
            raise ConfigError(f"{path}: {key!r} has {text!r}, which is no colour #rrggbb: {_FORM}")
        if key not in labels.names and key.isdecimal():
            if int(key) >= labels.num_classes:
                last = labels.num_classes - 1
                raise ConfigError(f"{path}: there is no class {key}; this model has 0 … {last}")
            found[int(key)] = colour
            continue
        try:
            (index,) = labels.indices([key])
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        found[index] = colour
    if not found:
        raise ConfigError(f"{path}: names no class: {_FORM}")
    return found


def _read(path: Path) -> list[tuple[str, str]]:
    """The names and colours of a file, as text. Raises ConfigError."""
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; a palette is {', '.join(get_args(PaletteName))} or a file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no text in UTF-8: {_FORM}") from error
    if text.lstrip().startswith("{"):
        try:
            return list(msgspec.json.decode(text, type=dict[str, str]).items())
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}: {error}: {_FORM}") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = _LINE.fullmatch(line.strip())
        if parts is None:
            raise ConfigError(f"{path}: line {number} is {line.strip()!r}: {_FORM}")
        found.append((parts[1], parts[2]))
    return found
