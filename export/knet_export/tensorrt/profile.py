"""Which shapes a TensorRT plan is built for: the manifest's, or narrower ones.

TensorRT itself takes a profile that contradicts itself or the graph without a word, and fails much
later without a reason. So it is checked here.
"""

from __future__ import annotations

import re

from knet_runtime.bundle.manifest import InputSpec
from knet_runtime.engines.plan_store import Profile, Shape
from knet_runtime.errors import ConfigError
from knet_runtime.types import Size


def profile_of(
    spec: InputSpec, min: str | None = None, opt: str | None = None, max: str | None = None
) -> Profile:
    """The profile for a graph with this input. Each of ``min``, ``opt`` and ``max`` is "BATCH" or
    "BATCHxHEIGHTxWIDTH"; by default from one image to all that was exported, and fastest for one
    image of the bundle's own size.

    Raises ConfigError for shapes that the graph does not take, or that are out of order.
    """
    smallest, largest = spec.size, spec.size
    if spec.sizes is not None:
        smallest, largest = spec.sizes.min, spec.sizes.max
    first = Shape(1, *smallest) if min is None else _read("--min", min, spec, smallest)
    last = Shape(spec.max_batch, *largest) if max is None else _read("--max", max, spec, largest)
    if opt is not None:
        middle = _read("--opt", opt, spec, spec.size)
    else:  # the bundle's own size, or what is nearest to it within the profile
        sides = zip(_sides(first), (1, *spec.size), _sides(last), strict=True)
        middle = Shape(*(sorted(three)[1] for three in sides))
    for names, low, high in (
        ("--min {} and --max {}", first, last),
        ("--min {} and --opt {}", first, middle),
        ("--opt {} and --max {}", middle, last),
    ):
        if any(a > b for a, b in zip(_sides(low), _sides(high), strict=True)):
            raise ConfigError(
                f"{names.format(low, high)}: batch, height and width must each grow from --min to "
                "--opt to --max"
            )
    return Profile(first, middle, last)


def _read(option: str, text: str, spec: InputSpec, size: Size) -> Shape:
    found = re.fullmatch(r"(\d{1,4})(?:[x×](\d{1,5})[x×](\d{1,5}))?", text.strip())
    if found is None:
        raise ConfigError(f"{option} {text}: write BATCH or BATCHxHEIGHTxWIDTH, such as 4x512x1024")
    batch = int(found[1])
    if found[2]:
        size = (int(found[2]), int(found[3]))
    if not 1 <= batch <= spec.max_batch:
        raise ConfigError(
            f"{option} {text}: the graph was exported for batches of 1 to {spec.max_batch}: stay "
            "within, or export again with another --max-batch"
        )
    if spec.sizes is None and size != spec.size:
        raise ConfigError(
            f"{option} {text}: the graph was exported for {spec.height}x{spec.width} only: leave "
            "the size out, or export again with --dynamic"
        )
    if spec.sizes is not None and size not in spec.sizes:
        low, high = spec.sizes.min, spec.sizes.max
        raise ConfigError(
            f"{option} {text}: the graph was exported for {low[0]}x{low[1]} to {high[0]}x{high[1]} "
            f"in multiples of {spec.sizes.multiple}: stay within, or export again"
        )
    return Shape(batch, *size)


def _sides(shape: Shape) -> tuple[int, int, int]:
    return shape.batch, shape.height, shape.width
