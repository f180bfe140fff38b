"""The sink that writes a line of JSON for each object that came, left, or crossed a line."""

from __future__ import annotations

from pathlib import Path

import msgspec

from knet_runtime.counts import Totals
from knet_runtime.errors import ConfigError
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks.json_lines import LineSink
from knet_runtime.types import Frame


class TotalsRecord(msgspec.Struct, frozen=True):
    """The last line of ``EventLines``: what was counted in all ``frames`` (shown-again ones left
    out)."""

    totals: Totals
    frames: int


class EventLines(LineSink):
    """Writes each ``ZoneEvent`` of the results' ``counts`` as a line to ``path``, in UTF-8, as soon
    as it is certain, and at the end one line with the totals; "-" is stdout.

    The file is written and named as that of ``JsonLines``. Raises OutputError when it cannot be
    written; ``write`` raises ConfigError for a result that no ``ZoneCounter`` has seen.

        >>> from knet_deploy import EventLines, Line, Segmenter, Tracker, ZoneCounter, Zones
        >>> from knet_deploy import Instance, LabelMap, Segmentation, open_source
        >>> from pathlib import Path
        >>> import numpy as np
        >>> labels = LabelMap(("car",), ((0, 0, 142),), ignore_index=255, things=(0,))
        >>> car = Instance(0, 0.9, left=3, top=1, mask=np.ones((2, 4), np.bool_), track=1)
        >>> result = Segmentation.from_instances([car], (360, 480), labels)
        >>> count = ZoneCounter(Zones(lines=(Line("gate", ((0, 90), (480, 90))),)))
        >>> sink = EventLines("events.jsonl")
        >>> with open_source("drive.mp4") as source:
        ...     for frame in source:
        ...         sink.write(frame, count(frame, result))
        >>> sink.close()
        >>> print(Path("events.jsonl").read_text().strip())
        {"totals":{"zones":{},"lines":{"gate":{}}},"frames":8}
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._frames = 0
        self._totals: Totals | None = None

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Add the events of one frame. Raises OutputError; the lines before stay whole."""
        if result.counts is None:
            raise ConfigError("nothing was counted here: let a ZoneCounter see each result first")
        if frame.stale:
            return
        self._frames += 1
        self._totals = result.counts.totals
        for event in result.counts.events:
            self._add(event)

    def close(self, *, complete: bool = True) -> None:
        """Add the totals and give the file its name, which ``path`` is then; without frames nothing
        is left, and ``path`` is None. Raises OutputError."""
        totals, self._totals = self._totals, None
        try:
            if totals is not None:
                self._add(TotalsRecord(totals, self._frames))
        finally:
            super().close(complete=complete)
