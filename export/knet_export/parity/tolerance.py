"""How far an artefact may be from the model that was trained, by precision, and why so far.

A tolerance is there to tell a fault from rounding. So each stands above what a right artefact of
its precision was measured to differ by, the default model on CamVid's 101 validation pictures:
fp32, fp16 and int8 in ONNX Runtime (whose CPU computes fp16 in fp32: only what is stored rounds),
bf16 in OpenVINO.

|                   | fp32   | fp16    | bf16    | int8    |
|-------------------|--------|---------|---------|---------|
| ΔmIoU, points     | 0.0000 | -0.0104 | -0.0573 | +0.1442 |
| worst class       | 0.0001 | -0.0449 | -0.2752 | +0.5279 |
| agreement         | 1.0000 | 0.99976 | 0.99713 | 0.99376 |
| where confident   | 1.0000 | 1.00000 | 0.99997 | 0.99991 |
| largest logit     | 2.3e-6 | 8.6e-3  | 1.1e-1  | 1.7e-1  |
| mean logit        | 1.7e-7 | 4.5e-4  | 5.4e-3  | 9.8e-3  |

Where the reference is sure, rounding turns next to nothing: that limit is the tightest of each row.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from knet_runtime.errors import ConfigError
from knet_runtime.manifest import Precision, Tolerance

_LEAST = ("agreement", "agreement_confident")  # the larger, the tighter


def default_tolerance(precision: Precision) -> Tolerance:
    """What an artefact of this precision is held to unless somebody asks for less."""
    match precision:
        case "fp32":  # another order of sums, nothing else
            return Tolerance(
                delta_miou=0.02,
                worst_class_delta_iou=0.2,
                agreement=0.9999,
                max_logit_diff=1e-3,
                agreement_confident=0.99999,
                mean_logit_diff=1e-4,
            )
        case "fp16":  # 11 bits for what has the picture's size
            return Tolerance(
                delta_miou=0.05,
                worst_class_delta_iou=0.5,
                agreement=0.995,
                max_logit_diff=2e-2,
                agreement_confident=0.9999,
                mean_logit_diff=2e-3,
            )
        case "bf16":  # 8 bits
            return Tolerance(
                delta_miou=0.2,
                worst_class_delta_iou=1.0,
                agreement=0.99,
                max_logit_diff=3e-1,
                agreement_confident=0.999,
                mean_logit_diff=2e-2,
            )
        case "int8":  # ranges and weights in 255 steps: what that costs, the search keeps inside
            return Tolerance(
                delta_miou=0.5,
                worst_class_delta_iou=5.0,
                agreement=0.95,
                max_logit_diff=5e-1,
                agreement_confident=0.995,
                mean_logit_diff=5e-2,
            )


def tightened(tolerance: Tolerance, settings: Sequence[str]) -> Tolerance:
    """``tolerance`` with ``NAME=VALUE`` settings such as "delta_miou=0.01".

    Raises ConfigError for an unknown name, what is no number, and a value that would loosen it: the
    bundle's own tolerance is a promise.
    """
    values = msgspec.structs.asdict(tolerance)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in values:
            raise ConfigError(f"--tolerance {setting}: write NAME=VALUE, of {', '.join(values)}")
        try:
            value = float(text)
        except ValueError as error:
            raise ConfigError(f"--tolerance {setting}: {text!r} is no number") from error
        kept = getattr(tolerance, name)
        if value < kept if name in _LEAST else value > kept:
            raise ConfigError(
                f"--tolerance {setting} is looser than the bundle's own {kept:g}: a tolerance can "
                "only be tightened"
            )
        values[name] = value
    try:
        return Tolerance(**values)
    except ValueError as error:
        raise ConfigError(f"--tolerance: {error}") from error
