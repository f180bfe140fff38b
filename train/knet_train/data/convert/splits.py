"""How images are divided into train, val and test, with the frames of a sequence kept together."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from knet_runtime.errors import ConfigError
from knet_train.data.convert.source import Item
from knet_train.data.drives import sequence

SPLITS = ("train", "val", "test")
USUAL_SHARES = (0.8, 0.2)


def parse_shares(text: str) -> tuple[float, ...]:
    """ "0.8,0.1,0.1" as shares of train, val and test, which may lack. Raises ConfigError."""
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    good = 2 <= len(shares) <= len(SPLITS) and min(shares) > 0
    if not good or abs(sum(shares) - 1) > 0.01:
        raise ConfigError(
            f"--split is {text!r}: write two or three shares, of train, val and test, which add up "
            "to 1, such as 0.8,0.1,0.1"
        )
    return shares


def divide(items: Sequence[Item], shares: Sequence[float] | None) -> tuple[dict[Item, str], str]:
    """The split of every image, and how that was decided, in words.

    By ``shares``; without them as the source says, and by USUAL_SHARES where it has not both
    train and val: a training needs them.
    """
    stated = {item: item.split or "train" for item in items}  # what no list names is learnt from
    names = set(stated.values())
    if shares is None and {"train", "val"} <= names:
        return stated, "as the source has them"
    kept = {i: s for i, s in stated.items() if shares is None and s not in ("train", "val")}
    rest = [item for item in items if item not in kept]
    used = shares or USUAL_SHARES
    groups: dict[str, list[Item]] = {}
    for item in rest:
        groups.setdefault(sequence(item.name), []).append(item)
    text = ", ".join(f"{share:g}" for share in used)
    why = "" if shares else f"the source has no {'val' if 'train' in names else 'train'}: "
    if len(groups) < len(used):
        how = f"{why}{text} in the order of names, as all images are of {len(groups)} sequence(s)"
        return kept | _in_order(rest, used), how
    return kept | _by_group(groups, used), f"{why}{text} by {len(groups)} sequences"


def _in_order(items: Sequence[Item], shares: Sequence[float]) -> dict[Item, str]:
    """Blocks of neighbours, so that only frames at the edges are alike."""
    found: dict[Item, str] = {}
    ordered = sorted(items, key=lambda item: _natural(item.name))
    ends = [round(len(ordered) * sum(shares[: n + 1])) for n in range(len(shares))]
    for number, item in enumerate(ordered):
        place = next((n for n, end in enumerate(ends) if number < end), len(ends) - 1)
        found[item] = SPLITS[place]
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


def _by_group(groups: dict[str, list[Item]], shares: Sequence[float]) -> dict[Item, str]:
    """Whole sequences, the largest first, each to the split that lacks most."""
    total = sum(map(len, groups.values()))
    lacks = [share * total for share in shares]
    found: dict[Item, str] = {}
    left = len(groups)
    empty = set(range(len(shares)))
    for name in sorted(groups, key=lambda n: (-len(groups[n]), _mixed(n))):
        # The last sequences go to splits that have none yet.
        places = empty if left <= len(empty) else range(len(shares))
        place = max(places, key=lambda n: lacks[n])
        lacks[place] -= len(groups[name])
        empty.discard(place)
        left -= 1
        found |= dict.fromkeys(groups[name], SPLITS[place])
    return found


def _mixed(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
