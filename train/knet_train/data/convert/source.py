"""What a reader of a foreign format gives: images, and what to draw for each of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.colours import Colour, hex_colour
from knet_runtime.errors import DataError

VOID = -1  # in maps of a source's classes: not labelled
BACKGROUND = "background"  # what no outline covers, in formats of outlines

Size = tuple[int, int]  # height, width

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_UNDIVIDED = ("", "all", "default", "trainval", "images", "data")


class Drawing(NamedTuple):
    """The labels of one image: ``classes`` int16 [H, W] holds the source's classes or VOID,
    ``objects`` uint16 [H, W] the numbers of objects, 0 where there is none; None of a format that
    tells none apart. ``hidden`` objects have no pixel: nothing of them is seen under others."""

    classes: NDArray[np.int16]
    objects: NDArray[np.uint16] | None = None
    hidden: int = 0


@dataclass(frozen=True)
class Item:
    """One labelled image, not yet read.

    ``name`` is its path below the split's folder, without a suffix; ``label`` the file that states
    its labels, for errors. ``draw`` gives the labels of an image of that (height, width), and
    raises DataError. ``split`` is None where the source does not say.
    """

    name: str
    image: Path
    label: Path
    draw: Callable[[Size], Drawing]
    split: str | None = None


@dataclass(frozen=True)
class Source:
    """What lies in a folder of a foreign format.

    ``classes`` are the names behind the numbers of drawings, ``things`` those whose objects are
    told apart, ``palette`` their colours where they are stated. ``left_out`` says, a line each,
    what is there and was not taken.
    """

    classes: tuple[str, ...]
    items: tuple[Item, ...]
    things: frozenset[str] = frozenset()
    palette: Mapping[str, Colour] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def split_of(name: str) -> str | None:
    """``train``, ``val`` or ``test`` for the many names of the three (``train2017``, ``valid``,
    ``training``), None for names of no split, else the name itself."""
    plain = re.sub(r"[\d_.-]+$", "", name.casefold())
    return None if plain in _UNDIVIDED else _SPLITS.get(plain, name)


def usual_split(name: str) -> str | None:
    """``train``, ``val`` or ``test`` for the many names of the three, None for any other."""
    return _SPLITS.get(split_of(name) or "")


def stated_colour(text: str | None, file: Path) -> Colour | None:
    """The colour ``#rrggbb`` that ``file`` states; None where it states none. Raises DataError."""
    if not text:
        return None
    colour = hex_colour(text)
    if colour is None:
        raise DataError(f"{file} has the colour {text!r}: write it as #rrggbb, or take it out")
    return colour


def check_size(stated: Size, size: Size) -> None:
    """Raise DataError, for whoever knows the image's name, unless labels of the ``stated`` size are
    of an image of ``size``."""
    if stated != size:
        raise DataError(
            f"was labelled at {stated[1]}×{stated[0]}, but the image is "
            f"{size[1]}×{size[0]}: put the image there that was labelled"
        )


def some(names: Sequence[str], what: str) -> list[str]:
    """One line that counts ``names`` and gives the first of them; none for no names."""
    more = ", …" if len(names) > 3 else ""
    return [f"{len(names)} {what} ({', '.join(names[:3])}{more})"] if names else []


def read_json(path: Path, type: Any) -> Any:
    """A JSON file as ``type``; raises DataError that names the file."""
    try:
        return msgspec.json.decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), type=type)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; let this user read the file") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}; export the file again") from error


def read_text(path: Path) -> str:
    """A text file in UTF-8; raises DataError that names the file."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; let this user read the file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}; write the file in UTF-8") from error
