"""The int8 graph of a bundle, from the float graph and the user's own pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx

from knet_export.graph.to_onnx import LOGITS_NAME, WEIGHTS_NAME
from knet_export.int8.calibrate import CalibrationSet
from knet_export.int8.quantise import save
from knet_export.int8.search import Calibrator, Quantisation, quantise_within
from knet_runtime.bundle.manifest import Manifest

QUANTISATION_NAME = "quantisation.json"


@dataclass(frozen=True)
class Calibration:
    """What int8 is made with: pictures, the method that finds the ranges, and patterns of nodes
    that stay float32 or become fp16."""

    pictures: CalibrationSet
    calibrator: Calibrator = "auto"
    keep_fp32: tuple[str, ...] = ()
    keep_fp16: tuple[str, ...] = ()


def write_int8(
    source: Path,
    target: Path,
    manifest: Manifest,
    calibration: Calibration,
    on_step: Callable[[str], None],
) -> Quantisation:
    """Quantise the float graph in the folder ``source`` as far as the manifest's tolerance allows;
    write graph, weights and ``quantisation.json`` into the folder ``target``.

    Raises what ``quantise_within`` raises, and OSError.
    """
    graph, record = quantise_within(
        onnx.load(source / LOGITS_NAME, load_external_data=False),
        source,
        manifest,
        calibration.pictures,
        manifest.graphs[0].tolerance,
        calibrator=calibration.calibrator,
        keep_fp32=calibration.keep_fp32,
        keep_fp16=calibration.keep_fp16,
        on_step=on_step,
    )
    save(graph, source, target / LOGITS_NAME, WEIGHTS_NAME)
    text = msgspec.json.format(msgspec.json.encode(record)) + b"\n"
    (target / QUANTISATION_NAME).write_bytes(text)
    return record


def read_quantisation(folder: Path) -> Quantisation:
    """The record that ``write_int8`` left in ``folder``."""
    return msgspec.json.decode((folder / QUANTISATION_NAME).read_bytes(), type=Quantisation)


def card_lines(record: Quantisation) -> list[str]:
    """What the model card says of it, in Markdown."""
    method = record.method if record.percent is None else f"{record.method} {record.percent:g}"
    delta = record.score.delta_miou
    lines = [
        "## Quantisation",
        "",
        f"- int8 (static Q/DQ): {record.int8_nodes} convolutions and products, "
        f"{100 * record.int8_macs:.1f} % of the multiply-adds.",
        f"- Calibrated by {method} on {record.calibrated} pictures of {record.pictures}.",
        f"- Against the float graph on {record.held_out} others: "
        + ("" if delta is None else f"ΔmIoU {delta:+.2f} points, ")
        + f"equal pixels {100 * record.score.agreement:.2f} %.",
    ]
    kept = [*record.kept_blocks, *record.kept_patterns]
    lines.append(
        f"- Kept in fp32: {', '.join(f'`{name}`' for name in kept) or 'nothing of these'}."
    )
    if record.fp16_patterns:
        half = ", ".join(f"`{name}`" for name in record.fp16_patterns)
        lines.append(f"- Kept in fp16: {half}.")
    worst = [
        f"`{cost.block}` ({100 * (1 - cost.score.agreement):.2f} %)" for cost in record.blocks[:5]
    ]
    lines += [
        f"- Costliest blocks, each alone in int8, by pixels changed: {', '.join(worst)}. "
        f"All of them, with numbers: `{QUANTISATION_NAME}`.",
        "",
    ]
    return lines
