"""Options whose choices are the engines that there are: ``--help`` lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from knet_runtime.engines import engine_specs

if TYPE_CHECKING:  # which ones there are is known when it runs
    EngineName = str
    PlanEngine = str
else:
    _specs = engine_specs()
    EngineName = Literal[("auto", *_specs)]
    PlanEngine = Literal[tuple(name for name, spec in _specs.items() if spec.runs_plans)]

EngineOption = Annotated[
    EngineName, typer.Option("--engine", help="auto takes what verify has passed here.")
]
PlanEngineOption = Annotated[PlanEngine, typer.Option("--engine", help="What the plan is for.")]
EnginesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="|".join(engine_specs()),
        help="Repeatable; every one that works by default.",
    ),
]
