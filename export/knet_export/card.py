"""The model card that goes into a bundle when its author brings none."""

from __future__ import annotations

import msgspec

from knet_export.int8.sensitivity import Quantisation
from knet_export.int8.write import card_lines
from knet_runtime.manifest import Manifest
from knet_train.config import Config


def model_card(manifest: Manifest, config: Config, int8: Quantisation | None = None) -> str:
    """Markdown that states what is known: input, classes, parity, int8, recipe, licences."""
    spec, records = manifest.input, manifest.artefacts[0].parity
    lines = [
        f"# {manifest.name}",
        "",
        f"K-Net (arXiv 2106.14855), preset `{config.preset}`, exported by knet-deploy.",
        "",
        f"- Input: {spec.width}×{spec.height} RGB; other sizes are fitted by {spec.resize}.",
        f"- Classes ({manifest.labels.num_classes}): {', '.join(manifest.labels.names)}.",
        f"- Checkpoint: SHA-256 `{manifest.provenance.checkpoint_sha256}`.",
        f"- Licences: code {manifest.licence.code}; weights {manifest.licence.weights}; "
        f"training data {manifest.licence.data}.",
        "",
        "## Parity with PyTorch",
        "",
    ]
    if not records:
        lines.append("Not measured.")
    for parity in records:
        lines.append(f"Measured on {parity.images} pictures ({parity.data}), {parity.engine}:")
        lines.append("")
        if parity.miou_reference is not None:
            lines.append(f"- mIoU in PyTorch {parity.miou_reference:.2f} %")
            lines.append(f"- mIoU of the artefact {parity.miou_artefact:.2f} %")
        lines.append(f"- equal pixels {100 * parity.agreement:.4f} %")
        lines.append(f"- largest logit difference {parity.max_logit_diff:.1e} of the largest logit")
    if int8 is not None:
        lines += ["", *card_lines(int8)]
    recipe = msgspec.json.format(msgspec.json.encode(config), indent=2).decode()
    lines += ["", "## Recipe", "", "```json", recipe, "```", ""]
    return "\n".join(lines)
