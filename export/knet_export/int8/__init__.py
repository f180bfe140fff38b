"""Static quantisation: ranges from images, Q/DQ in the graph, and what must stay float."""

from __future__ import annotations

from typing import Literal

Method = Literal["minmax", "percentile", "entropy"]
"""How a tensor's range is found."""

Calibrator = Literal["auto", "minmax", "percentile", "entropy"]
"""A method, or the best of all by measurement."""
