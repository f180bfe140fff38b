"""LR-ASPP (arXiv 1905.02244, section 6.4): a plain head of knet-edge's size, to compare with.

Backbone, training and runtime are knet-edge's; the head is torchvision's, without pyramid, kernels
or stages. ``curve.py`` measures it. It is not a model of knet-deploy: ``train`` and
``read_checkpoint`` get it as their ``build``, and it is exported here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.models.segmentation.lraspp import LRASPPHead

from knet_export.graph.check import check_onnx
from knet_export.graph.to_onnx import LOGITS_NAME, OPSET
from knet_export.spec import export_spec
from knet_export.verify.measure import default_tolerance
from knet_runtime.bundle.manifest import Graph, Licence, Manifest, OutputSpec, Provenance
from knet_runtime.bundle.store import Bundle, write_bundle
from knet_runtime.golden import GOLDEN_NAME, save_golden
from knet_synthetic import Street
from knet_train.checkpoint import Checkpoint
from knet_train.config import ModelConfig
from knet_train.inference import predict_logits
from knet_train.models.backbones import build_backbone, level_channels
from knet_train.models.heads import upsample_to
from knet_train.models.knet import KNet


class LRASPP(KNet):
    """Of the configuration it takes the backbone, ``output_stride`` (16 in the paper), ``stride``
    (8 there: of the finer level, and so of the logits), and ``channels`` of the head."""

    head: LRASPPHead

    def __init__(self, config: ModelConfig, classes: int) -> None:
        backbone = build_backbone(config)
        low, *_, high = level_channels(backbone)
        super().__init__(
            backbone,
            LRASPPHead(low, high, classes, config.channels),
            [],
            classes=classes,
            channels=config.channels,
            dropout=0,
            mean=config.mean,
            std=config.std,
        )
        del self.conv_seg, self.dropout  # the head has its own classifiers, and no dropout

    def decode(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The backbone's levels -> the only logits [B, N, H/s, W/s].

        The coarse level is classified before it is upsampled, not after it as in torchvision: both
        are linear, so that gives the same for less.
        """
        low, high = levels[0], levels[-1]
        coarse = self.head.high_classifier(self.head.cbr(high) * self.head.scale(high))
        logits: Tensor = self.head.low_classifier(low) + upsample_to(coarse, low)
        return [logits]


def export(checkpoint: Checkpoint, destination: Path) -> Bundle:
    """A bundle for images one at a time, by a plain ``torch.onnx.export``: there is nothing to
    rewrite, and engines fold BatchNorm themselves. Held to PyTorch like every export; raises what
    ``check_onnx`` and ``write_bundle`` raise."""
    model, config = checkpoint.model, checkpoint.config
    spec = export_spec(config, None, None, max_batch=1)
    output = OutputSpec(
        "logits", "semantic_logits", (checkpoint.labels.num_classes,), config.model.stride
    )
    tolerance = default_tolerance("fp32")
    street = np.ascontiguousarray(Street(0, spec.size).frame(0)[0])
    images = torch.from_numpy(street[None])
    with tempfile.TemporaryDirectory() as work:
        graph, golden = Path(work) / LOGITS_NAME, Path(work) / GOLDEN_NAME
        torch.onnx.export(
            model,
            (images,),
            graph,
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name],
            output_names=[output.name],
            external_data=False,
            verbose=False,
        )
        check_onnx(model, spec, output, Path(work), tolerance)
        save_golden(golden, street[None], predict_logits(model, street[None]))
        manifest = Manifest(
            name=destination.name.removesuffix(".knet"),
            input=spec,
            labels=checkpoint.labels,
            graphs=(Graph(path=LOGITS_NAME, outputs=(output,), tolerance=tolerance),),
            provenance=Provenance(
                checkpoint.sha256, config.preset, {"torch": str(torch.__version__)}
            ),
            licence=Licence("Apache-2.0", "unstated", "unstated"),
        )
        return write_bundle(destination, manifest, {LOGITS_NAME: graph, GOLDEN_NAME: golden})
