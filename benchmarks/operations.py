"""Multiply-adds of every preset, as published and deployed: a table of docs/results/models.md.

    python benchmarks/operations.py

Counted, not timed, so it says the same on every machine; a test holds the page to it.
"""

from __future__ import annotations

from knet_export.graph.cost import count_operations, operations_row
from knet_train.config import load_config, presets

CLASSES = {"knet-edge": 11}  # CamVid; the others are ADE20K's 150

for preset in presets():
    config = load_config(preset)
    counted = count_operations(config, CLASSES.get(preset, 150), config.data.eval_size)
    print(operations_row(counted), flush=True)  # noqa: T201
