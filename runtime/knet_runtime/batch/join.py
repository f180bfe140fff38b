"""From segments to what one run of the video would have written: the same files, byte for byte."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from knet_runtime.batch.records import FINISHED_NAME, LINES_NAME, MASKS_NAME, Outcome, SourceResult
from knet_runtime.bundle import exchange_folders
from knet_runtime.output.json_lines import Record
from knet_runtime.output.mask_folder import MaskFolder
from knet_runtime.pending import output_error


def join(target: Path, work: Path, pieces: Sequence[Outcome], result: SourceResult) -> SourceResult:
    """Make the folder ``target`` of the finished ``pieces`` in ``work``, which is then removed.

    Frames are numbered through. An old ``target`` that a batch wrote is exchanged whole. The result
    is also in it, for the next batch. Raises OutputError.
    """
    fresh = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        totals: dict[str, float] = {}
        count = 0
        with (fresh / LINES_NAME).open("wb") as lines:
            for piece in pieces:
                lines.writelines(_renumbered(work / piece.segment / LINES_NAME, count, totals))
                _link_masks(work / piece.segment / MASKS_NAME, count, fresh / MASKS_NAME)
                count += piece.frames
        whole = msgspec.structs.replace(
            result,
            frames=count,
            segments=tuple(piece.frames for piece in pieces),
            engines=tuple(sorted({piece.engine for piece in pieces})),
            shares={name: round(total / count, 6) for name, total in totals.items()},
        )
        if whole.error:  # as a run that fails names what it keeps
            name = Path(LINES_NAME)
            (fresh / name).rename(fresh / f"{name.stem}.partial{name.suffix}")
            if (fresh / MASKS_NAME).is_dir():
                text = f"The run ended early: {count} masks were written.\n"
                (fresh / MASKS_NAME / MaskFolder.MARK).write_text(text)
        (fresh / FINISHED_NAME).write_bytes(msgspec.json.encode(whole))
        exchange_folders(fresh, target, fresh.with_suffix(".old"))
        shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise output_error(target, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return whole


def _renumbered(lines: Path, offset: int, totals: dict[str, float]) -> Iterator[bytes]:
    """The lines with frames counted from ``offset``; their shares are added to ``totals``."""
    with lines.open("rb") as file:
        for line in file:
            record = msgspec.json.decode(line, type=Record)
            for name, share in record.shares.items():
                totals[name] = totals.get(name, 0.0) + share
            index = record.frame + offset
            moved = msgspec.structs.replace(record, frame=index, name=f"{index:06d}")
            yield msgspec.json.encode(moved) + b"\n"


def _link_masks(masks: Path, offset: int, target: Path) -> None:
    """A second name for each mask, so that the segment stays whole until the video is."""
    if not masks.is_dir():
        return
    target.mkdir(exist_ok=True)
    for mask in masks.glob("*.png"):
        named = target / f"{int(mask.stem) + offset:06d}.png"
        try:
            named.hardlink_to(mask)
        except OSError:  # a file system without links
            shutil.copyfile(mask, named)
