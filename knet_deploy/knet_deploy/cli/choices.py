"""Options that several commands share, and choices: ``--help`` lists what can be chosen."""

from __future__ import annotations

from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from knet_runtime.engines import engine_specs

if TYPE_CHECKING:  # which ones there are is known when it runs
    EngineName = str
    NamedEngine = Enum
    PlanEngine = str
else:
    _specs = engine_specs()
    EngineName = Literal[("auto", *_specs)]
    NamedEngine = Enum("NamedEngine", {name: name for name in _specs})  # typer has no list[Literal]
    PlanEngine = Literal[tuple(name for name, spec in _specs.items() if spec.runs_plans)]

# As the runtime has them, in modules that load FFmpeg: --help should not.
Policy = Literal["file", "live"]
Codec = Literal["h264", "hevc"]
Transport = Literal["tcp", "udp"]


class LoggerChoice(Enum):  # typer has no list[Literal]
    """As training has them, in a module that loads torch."""

    CSV = "csv"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    MLFLOW = "mlflow"


engine_panel = partial(typer.Option, rich_help_panel="Engine")
segments_panel = partial(typer.Option, rich_help_panel="Segments")
_AUTO = "auto takes what verify has passed here."

EngineOption = Annotated[EngineName, typer.Option(help=_AUTO)]
EnginesOption = Annotated[
    list[NamedEngine] | None, typer.Option(help="Repeatable; every one that works by default.")
]
PlanEngineOption = Annotated[PlanEngine, typer.Option(help="What the plan is for.")]

LABELLED = "Labelled images: our, ADE20K's, Cityscapes' or COCO's layout."

BUNDLE = "NAME.knet, or the name of a packaged model"

# Of run and batch.
RunEngine = Annotated[EngineName, engine_panel(help=_AUTO)]
BundleOption = Annotated[
    Path | None,
    engine_panel(
        "--bundle", "-b", help=f"The bundle: {BUNDLE}; the one called default if left out."
    ),
]
RequireVerified = Annotated[
    bool,
    engine_panel(
        "--require-verified",
        help="Refuse to run what verify has not passed on this engine and device.",
    ),
]
SizeOption = Annotated[
    str | None, engine_panel(help="HEIGHTxWIDTH that the model sees; for bundles of any size.")
]
ScoreOption = Annotated[
    float | None,
    segments_panel(
        help="Leave out objects below this score, 0 to 1; as the bundle says by default."
    ),
]
TrackOption = Annotated[
    bool, segments_panel("--track", help="Give objects ids that last over the frames of a video.")
]
TopKOption = Annotated[
    int | None,
    segments_panel(
        min=1, help="Of an instance bundle: at most so many objects, those of best score."
    ),
]
