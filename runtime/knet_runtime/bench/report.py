"""What a contest found, as one value that is written as JSON."""

from __future__ import annotations

import msgspec

from knet_runtime.bench.limits import Limits
from knet_runtime.bench.machine import Machine
from knet_runtime.bench.summary import Ratio, Spread


class Row(msgspec.Struct, frozen=True):
    """One contestant at one frame size (``task``, "HEIGHT×WIDTH").

    ``verified`` says whether verify has passed this very graph on this engine and device, ``doubt``
    why not. ``stages`` are milliseconds per frame: "total" from the decoded frame to the class map
    at its size, in which "fit", "infer" and "tail" lie (an upload counts as "infer"), and "draw"
    after it. ``frames_per_second`` is one over the total's median. ``agreement`` is the share of
    pixels equal to ``Report.reference``'s. ``startup_seconds`` goes from opening to the first mask,
    engine's import included; ``peak_bytes`` is the most memory of its own process,
    ``device_bytes`` of the GPU's; ``joules_per_frame`` are the processor's or the GPU's, drawing
    included. ``multiply_adds`` and ``least_bytes`` are the graph's for one picture;
    ``matmul_share`` and ``copy_share`` say how much of the machine's float32 matrix product
    (whatever the row's precision) and copy speed they are in "infer".
    None: not known here.
    """

    contestant: str
    task: str
    ours: bool
    precision: str
    graph: str | None
    verified: bool
    doubt: str | None
    note: str
    frames_per_second: float
    stages: dict[str, Spread]
    agreement: float | None
    startup_seconds: float
    peak_bytes: int | None
    device_bytes: int | None
    joules_per_frame: float | None
    multiply_adds: int | None
    least_bytes: int | None
    matmul_share: float | None
    copy_share: float | None


class Failure(msgspec.Struct, frozen=True):
    """A contestant that could not take part, and why."""

    contestant: str
    reason: str


class FileRow(msgspec.Struct, frozen=True):
    """File to file through the whole pipeline: all sources' frames per second, round by round."""

    contestant: str
    task: str
    sources: int
    frames_per_second: float
    rounds: list[float]


class MediaRow(msgspec.Struct, frozen=True):
    """Milliseconds per frame to decode and to encode a file of this size, alone."""

    task: str
    stages: dict[str, Spread]


class Report(msgspec.Struct, frozen=True):
    """All of it. ``models`` are the identities of the bundles."""

    models: list[str]
    source: str
    frames: int
    rounds: int
    threads: int
    reference: str | None
    rows: list[Row]
    failures: list[Failure]
    ratios: list[Ratio]
    files: list[FileRow]
    media: list[MediaRow]
    limits: Limits
    machine: Machine
