"""Which classes a conversion keeps, under which names and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import ConfigError, DataError
from knet_runtime.labels import Colour, LabelMap, distinct_palette
from knet_train.data.convert.source import VOID, Source

IGNORE = 255
_SHOWN = 40  # names in one line


class Selection(NamedTuple):
    """The classes ``labels``, and what each of the source's becomes: ``table`` uint8 [N + 1], whose
    last entry stands for VOID. ``dropped`` are the source's classes that become void."""

    labels: LabelMap
    table: NDArray[np.uint8]
    dropped: tuple[str, ...]


def select(source: Source, classes: Sequence[str], renamed: Sequence[str]) -> Selection:
    """``renamed`` are OLD=NEW, ``classes`` names after that; none means all, in the source's order.

    A new class is a thing where all that it is made of are. Raises ConfigError for names that the
    source does not have, DataError for names that cannot be classes.
    """
    new = {name: name for name in source.classes}
    for text in renamed:
        old, equals, name = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--map is {text!r}: write OLD=NEW, such as --map truck=car")
        new[_known(old, source.classes, "--map")] = name.strip()
    names = tuple(dict.fromkeys(new.values()))
    if classes:
        names = tuple(dict.fromkeys(_known(name, names, "--classes") for name in classes))
    if len(names) > IGNORE:
        raise DataError(f"there are {len(names)} classes, and at most {IGNORE} fit: use --classes")
    table = np.full(len(source.classes) - VOID, IGNORE, np.uint8)
    for number, name in enumerate(source.classes):
        if new[name] in names:
            table[number] = names.index(new[name])
    made_of = [[old for old in source.classes if new[old] == name] for name in names]
    things = tuple(n for n, olds in enumerate(made_of) if source.things.issuperset(olds))
    colours: list[Colour] = []
    for olds, fresh in zip(made_of, distinct_palette(len(names)), strict=True):
        stated = (source.palette[old] for old in olds if old in source.palette)
        colours.append(next(stated, fresh))
    if len(set(colours)) < len(colours):
        colours = list(distinct_palette(len(names)))
    try:
        labels = LabelMap(names, tuple(colours), IGNORE, things)
    except ValueError as error:
        raise DataError(f"{error}; rename it with --map OLD=NEW") from error
    dropped = tuple(name for name in source.classes if new[name] not in names)
    return Selection(labels, table, dropped)


def _known(name: str, names: Sequence[str], option: str) -> str:
    exact = [one for one in names if one == name] or [
        one for one in names if one.strip().casefold() == name.strip().casefold()
    ]
    if len(exact) != 1:
        more = ", …" if len(names) > _SHOWN else ""
        raise ConfigError(
            f"{option} names {name!r}, and the classes are {', '.join(names[:_SHOWN])}{more}"
        )
    return exact[0]
