"""Which pictures the exported graphs take."""

from __future__ import annotations

import msgspec

from knet_runtime.errors import ConfigError
from knet_runtime.manifest import InputSpec, Size, SizeRange
from knet_train.config import Config
from knet_train.evaluate import input_spec

LEAST, MOST = (128, 128), (1024, 2048)
MULTIPLE = 8  # of every stride that logits come at
_SMALLEST_SIDE = 32  # below it the coarsest level is less than a pixel


def size_range(least: Size = LEAST, most: Size = MOST) -> SizeRange:
    """The sizes of a graph of free height and width. Raises ConfigError where there are none."""
    if min(least) < _SMALLEST_SIDE:
        raise ConfigError(f"--min {_times(least)}: a side must be at least {_SMALLEST_SIDE} pixels")
    try:
        return SizeRange(least, most, MULTIPLE)
    except ValueError as error:
        raise ConfigError(
            f"--dynamic: {error}; both --min and --max are HEIGHTxWIDTH, such as "
            f"{_times(LEAST)} and {_times(MOST)}"
        ) from error


def export_spec(
    config: Config, size: Size | None, sizes: SizeRange | None, max_batch: int
) -> InputSpec:
    """The graphs' input: of ``size``, by default the one in the checkpoint, and of all ``sizes``.

    Raises ConfigError for a size that is no multiple of the logits' stride, too small, or not
    among ``sizes``, and for a batch below 1.
    """
    usual = input_spec(config)
    height, width = size or (usual.height, usual.width)
    stride = config.model.stride
    if max_batch < 1:
        raise ConfigError(f"--max-batch {max_batch} must be at least 1")
    if height % stride or width % stride or min(height, width) < _SMALLEST_SIDE:
        near = tuple(max(round(side / stride) * stride, _SMALLEST_SIDE) for side in (height, width))
        raise ConfigError(
            f"--size {height}x{width}: both sides must be multiples of {stride}, the stride of "
            f"{config.preset}'s logits, and at least {_SMALLEST_SIDE}: {near[0]}x{near[1]} is near"
        )
    if sizes is not None and sizes.multiple % stride:
        raise ConfigError(
            f"sizes in multiples of {sizes.multiple} do not fit the stride {stride} of "
            f"{config.preset}'s logits: take multiples of {MULTIPLE}"
        )
    if sizes is not None and (height, width) not in sizes:
        raise ConfigError(
            f"--dynamic from {_times(sizes.least)} to {_times(sizes.most)} in multiples of "
            f"{sizes.multiple} leaves out {height}x{width}, the size it would run at: "
            "widen --min and --max, or choose another --size"
        )
    return msgspec.structs.replace(
        usual, height=height, width=width, sizes=sizes, max_batch=max_batch
    )


def _times(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
