"""Which shapes a plan is built for, and which are refused before TensorRT sees them."""

from __future__ import annotations

import pytest

from knet_export.tensorrt.profile import profile_of
from knet_runtime.bundle.manifest import InputSpec, SizeRange
from knet_runtime.engines.plan_store import Profile, Shape
from knet_runtime.errors import ConfigError

FIXED = InputSpec("image", 64, 96, max_batch=8)
FREE = InputSpec("image", 64, 96, max_batch=8, sizes=SizeRange((32, 32), (128, 256), 32))


def test_by_default_all_that_was_exported() -> None:
    one = Shape(1, 64, 96)
    assert profile_of(FIXED) == Profile(one, one, Shape(8, 64, 96))
    assert profile_of(FREE) == Profile(Shape(1, 32, 32), one, Shape(8, 128, 256))


def test_narrower_shapes_are_taken() -> None:
    wanted = profile_of(FREE, min="2x64x64", opt="4x64×96", max="4x128x128")
    assert wanted == Profile(Shape(2, 64, 64), Shape(4, 64, 96), Shape(4, 128, 128))
    assert profile_of(FIXED, max="4").max == Shape(4, 64, 96)
    assert profile_of(FIXED, min="4").min == Shape(4, 64, 96)


def test_the_usual_shape_moves_into_the_range() -> None:
    assert profile_of(FREE, min="2x128x128").opt == Shape(2, 128, 128)
    assert profile_of(FREE, max="4x32x64").opt == Shape(1, 32, 64)


@pytest.mark.parametrize(
    ("spec", "shapes", "told"),
    [
        (FIXED, {"max": "9"}, r"--max 9: .* batches of 1 to 8"),
        (FIXED, {"min": "0"}, r"--min 0: .* batches of 1 to 8"),
        (FIXED, {"max": "8x128x128"}, r"for 64x96 only.*--dynamic"),
        (FREE, {"max": "8x256x256"}, r"32x32 to 128x256 in multiples of 32"),
        (FREE, {"opt": "1x65x96"}, r"--opt 1x65x96: .*multiples of 32"),
        (FREE, {"min": "4", "max": "2"}, r"--min 4x32x32 and --max 2x128x256"),
        (FREE, {"opt": "8", "max": "2"}, r"--opt 8x64x96 and --max 2x128x256"),
        (FREE, {"min": "1x64x64", "opt": "1x32x96"}, r"--min 1x64x64 and --opt 1x32x96"),
        (FREE, {"max": "64x96"}, r"write BATCH or BATCHxHEIGHTxWIDTH"),
        (FREE, {"max": "many"}, r"write BATCH or BATCHxHEIGHTxWIDTH"),
    ],
)
def test_shapes_outside_the_export_or_out_of_order_are_refused(
    spec: InputSpec, shapes: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        profile_of(spec, **shapes)
