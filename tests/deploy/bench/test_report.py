"""A report's lines and its drawing."""

from __future__ import annotations

import cv2
import msgspec
import numpy as np

from knet_deploy.bench.machine import Limits, Machine
from knet_deploy.bench.plot import bars_of, title_of
from knet_deploy.bench.report import Failure, FileRow, MediaRow, Ratio, Report, Row, Spread, lines
from knet_deploy.cli.console import one_line

BLUE, PALE_BLUE, GREY = (33, 113, 181), (158, 202, 225), (170, 170, 170)


def row(name: str, ms: float, *, ours: bool = True, unverified_reason: str | None = None) -> Row:
    times = Spread(ms, ms - 1, ms + 1, ms + 2)
    return Row(
        target=name,
        size="360×480",
        ours=ours,
        precision="fp32",
        graph="0" * 64 if ours else None,
        verified=ours and unverified_reason is None,
        unverified_reason=unverified_reason,
        note="",
        frames_per_second=round(1000 / ms, 2),
        stages={"infer": times, "total": times},
        agreement=0.99996,
        startup_seconds=0.5,
        peak_bytes=200 << 20,
        device_bytes=None,
        joules_per_frame=None,
        multiply_adds=2_100_000_000 if ours else None,
        min_bytes=50_000_000 if ours else None,
        matmul_share=0.754 if ours else None,
        copy_share=0.101 if ours else None,
    )


REPORT = Report(
    models=["small@0123456789ab"],
    source="synthetic street",
    frames=20,
    rounds=7,
    threads=2,
    reference="good",
    rows=[
        row("good", 10.0),
        row("quick", 5.0, unverified_reason="it was never verified on this"),
        row("baseline torch", 40.0, ours=False),
    ],
    failures=[Failure("baseline torch", "out of memory"), Failure("cuda", "there is no\nGPU")],
    ratios=[
        Ratio("360×480", "baseline torch", "good", 4.0, 3.9, 4.2),
        Ratio("360×480", "baseline torch", "quick", 8.0, 7.9, 8.2),
        Ratio("360×480", "good", "quick", 2.0, 1.9, 2.2),
    ],
    files=[FileRow("good", "360×480", 4, 81.25, [80.0, 82.5])],
    media=[MediaRow("360×480", {"decode": Spread(0.5, 0.4, 0.6, 0.7)})],
    limits=Limits(26.5e9, 15.8e9),
    machine=Machine(
        "a processor", 2, "Linux", "3.11", {}, None, None, None, 2.5, None, None, "abc"
    ),
)


def test_the_table_has_a_column_for_what_is_known_and_a_line_for_each() -> None:
    said = list(lines(REPORT))
    assert "a processor, 2 threads: matrix product 53 GFLOP/s float32, copy 15.8 GB/s" in said
    assert "note: the load is 2.5: others compute here too" in said
    head = next(line for line in said if line.startswith("360×480 "))
    words = "360×480 precision frames/s ms p5 p95 p99 infer matmul copy MiB start s equal"
    assert head.split() == words.split()
    rows = said[said.index(head) + 1 :][:3]
    numbers = ["fp32", "100.0", "10.00", "9.00", "11.00", "12.00", "10.00"]
    assert rows[0].split() == ["good", *numbers, "75", "%", "10", "%", "200", "0.5", "99.996", "%"]
    assert rows[1].startswith("quick *  ")
    column = head.index("frames/s") + len("frames/s")
    assert [line[:column].rpartition(" ")[2] for line in rows] == ["100.0", "200.0", "25.0"]
    assert len({len(line) for line in (head, *rows)}) == 1


def test_the_ratios_are_of_the_fastest_that_is_verified() -> None:
    said = list(lines(REPORT))
    assert "360×480: good is 4.00 times as fast as baseline torch (3.90 … 4.20)" in said
    assert not any(line.startswith("360×480: quick is") for line in said)
    unverified = msgspec.structs.replace(REPORT, rows=REPORT.rows[1:])
    assert any(line.startswith("360×480: quick is 8.00") for line in lines(unverified))


def test_who_fails_is_named_with_the_reason() -> None:
    said = [one_line(line) for line in lines(REPORT)]  # as the command prints them
    assert "baseline torch stopped: out of memory" in said
    assert "cuda did not run: there is no GPU" in said
    assert "* quick: it was never verified on this; knet-deploy verify measures it" in said
    assert "file to file 360×480: good 81.2 frames/s, 4 files at once" in said
    assert "file 360×480, ms a frame: decode 0.50" in said


def test_the_bars_are_in_order_and_their_colours_say_whose_they_are() -> None:
    found = cv2.imdecode(np.frombuffer(bars_of(REPORT), np.uint8), cv2.IMREAD_COLOR)
    assert found is not None
    image = found[..., ::-1]
    lengths, places = [], []
    for colour in (PALE_BLUE, BLUE, GREY):
        inked = (image == colour).all(-1)
        columns = np.nonzero(inked.sum(0) > 8)[0]  # letters have some grey too, but are thin
        places.append(np.nonzero(inked[:, columns])[0].mean())
        lengths.append(int(np.ptp(columns)) + 1)
    assert places == sorted(places), "the fastest stands first"
    assert abs(lengths[1] / lengths[0] - 2) < 0.05
    assert abs(lengths[2] / lengths[0] - 8) < 0.2


def test_one_is_not_called_many() -> None:
    least = msgspec.structs.replace(REPORT, rounds=1, frames=1, threads=1)
    said = "\n".join(lines(least))
    assert "synthetic street, 1 round of 1 frame\n" in said
    assert ", 1 thread: matrix product" in said
    assert title_of(least) == "small@0123456789ab: ms a frame, 1 thread"
    assert title_of(REPORT).endswith(", 2 threads")
