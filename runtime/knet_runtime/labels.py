"""The label map: class names, colours, things, and the ignore index of one task."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.colours import Colour as Colour, distinct_palette as distinct_palette
from knet_runtime.errors import ConfigError

_UNSHOWABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's controls, formats, halves, line ends
_JOINERS = "\u200c\u200d"  # formats that Persian, Hindi and others are written with


class LabelMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names and RGB colours of classes 0 … N-1, and the label value that means "not labelled".

    ``things`` are the classes whose objects are told apart (cars), in ascending order; the others
    are stuff (road). A name is one line of text in any script: what could end a line, steer a
    terminal or turn the direction of writing is refused here, for all who show names. Raises
    ValueError.

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
        for name in self.names:
            _check_name(name)
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


def _check_name(name: str) -> None:
    if not name or name != name.strip():
        raise ValueError(f"class name {name!r}: must not be empty, nor begin or end with a space")
    for char in name:
        if char not in _JOINERS and unicodedata.category(char) in _UNSHOWABLE:
            raise ValueError(
                f"class name {name!a}: take out {char!a}, which is no letter or sign but a control "
                "character"
            )
