"""What ``curve.py`` compares: variants of knet-edge and plain heads, and how long they train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lraspp import LRASPP

from knet_train.config import ModelConfig
from knet_train.models.build import build_model
from knet_train.models.knet import KNet


@dataclass(frozen=True)
class Variant:
    """A configuration by name: ``settings`` go on top of the preset knet-edge. One of ``full``
    budget is trained as the preset says, as the default model was; the others as ``budget`` says.
    """

    name: str
    family: str  # "knet", or what stands in its place: "fpn", "lr-aspp"
    settings: tuple[str, ...] = ()
    full: bool = False

    def overrides(self, steps: int) -> list[str]:
        """Of the preset, to train it for ``steps`` steps, or for all of them."""
        return [*([] if self.full else budget(steps)), *self.settings]


def _stages(count: int) -> tuple[str, ...]:
    return (f"model.stages={count}", f"loss.stage_weights={[1.0] * (count + 1)}")


def _width(channels: int) -> tuple[str, ...]:
    return tuple(
        f"model.{key}={value}"
        for key, value in (
            ("channels", channels),
            ("update_channels", channels),
            ("ffn_channels", 4 * channels),
        )
    )


_LR_ASPP = ("preset=lr-aspp", "model.output_stride=16", "model.stride=8", *_stages(0))
# The first say most: a run that must end early ends with something to compare.
VARIANTS = (
    Variant("knet-edge", "knet"),
    Variant("fpn", "fpn", _stages(0)),
    Variant("stages-1", "knet", _stages(1)),
    Variant("lr-aspp", "lr-aspp", _LR_ASPP),
    Variant("stride-8", "knet", ("model.stride=8",)),
    Variant("fpn-stride-8", "fpn", ("model.stride=8", *_stages(0))),
    Variant("width-64", "knet", _width(64)),
    Variant("fpn-width-192", "fpn", (*_width(192), *_stages(0))),
    Variant("input-256x352", "knet", ("data.eval_size=[256, 352]",)),
    Variant("stages-2", "knet", _stages(2)),
    Variant("width-192", "knet", _width(192)),
    Variant("knet-edge-seed-1", "knet", ("trainer.seed=1",)),
    Variant("fpn-seed-1", "fpn", (*_stages(0), "trainer.seed=1")),
    Variant("stride-8-full", "knet", ("model.stride=8",), full=True),
    Variant("stages-1-full", "knet", _stages(1), full=True),
    Variant("fpn-full", "fpn", _stages(0), full=True),
)
# Not trained here.
DEFAULT = Variant("default-model", "knet", full=True)


def budget(steps: int) -> list[str]:
    """The preset's schedule, which has 2200 steps, shrunk to ``steps``; smaller crops, which are
    half the work, and a score at the end only."""
    share = steps / 2200
    return [
        "data.crop=[256, 352]",
        f"optim.steps={steps}",
        f"optim.warmup_steps={round(150 * share)}",
        f"optim.ema_decay={1 - 0.005 / share:.4f}",
        f"trainer.val_every={steps}",
        "trainer.save_every=20",
    ]


def builder(variant: Variant) -> Callable[[ModelConfig, int], KNet]:
    """What makes the variant's network."""
    return LRASPP if variant.family == "lr-aspp" else build_model
