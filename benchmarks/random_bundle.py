"""Bundles of random weights: what a network costs does not depend on what it has learned."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from knet_export.fuse.model import fuse_for
from knet_export.fuse.precision import to_precision
from knet_export.graph.classmap import add_classmap_head
from knet_export.graph.to_onnx import CLASSMAP_NAME, LOGITS_NAME, WEIGHTS_NAME, export_onnx
from knet_export.spec import bundle_graphs, export_spec
from knet_runtime.bundle.manifest import Licence, Manifest, Precision, Provenance, SizeRange
from knet_runtime.bundle.store import Bundle, write_bundle
from knet_runtime.labels import LabelMap, distinct_palette
from knet_runtime.types import Size
from knet_synthetic import Street
from knet_train.config import load_config
from knet_train.models.build import build_model, build_segment_model
from knet_train.models.knet import KNet
from knet_train.models.segments import SegmentKNet


def random_model(preset: str, classes: int) -> KNet:
    """A network of random weights, the same each time. Its first kernels are large, so that a map
    has several classes, as a trained one's: the class map's cost depends on them."""
    torch.manual_seed(0)
    model = build_model(load_config(preset).model, classes).eval()
    torch.nn.init.normal_(model.conv_seg.weight)
    return model.requires_grad_(False)


@torch.no_grad()
def random_segment_model(preset: str, labels: LabelMap) -> SegmentKNet:
    """A network of random weights for objects, the same each time. It is sure of several classes,
    its masks are neither empty nor everywhere, and its kernels stay near what they were: with hard
    masks, a pixel that rounding turns would else turn many more in every stage."""
    torch.manual_seed(0)
    model = build_segment_model(load_config(preset).model, labels).eval()
    images = torch.from_numpy(np.stack([Street(seed, (256, 256)).frame(0)[0] for seed in range(2)]))
    location, semantic = model.head(model.levels(images))
    for stage in model.stages:
        nn.init.normal_(stage.fc_class.weight, std=0.5)
        nn.init.normal_(stage.fc_class.bias)
        nn.init.normal_(stage.fc_mask.weight, std=0.5)
        nn.init.constant_(stage.updator.norm_in.bias, -4)
        nn.init.constant_(stage.updator.input_norm_in.bias, 4)
        stage.feat_transform.bias -= stage.feat_transform(location + semantic).mean((0, 2, 3))
    return model.requires_grad_(False)


def write_random(
    folder: Path,
    model: KNet,
    preset: str,
    *,
    size: Size,
    sizes: SizeRange | None = None,
    max_batch: int = 1,
    precision: Precision = "fp32",
) -> Bundle:
    """``folder`` as a bundle of ``model``, compared with nothing: it is there to be timed."""
    config = load_config(preset)
    classes = int(model.conv_seg.out_channels)
    spec = export_spec(config, size, sizes, max_batch)
    graphs = bundle_graphs(precision, classes, config.model.stride)
    (output,) = graphs[0].outputs
    names = [graph.path for graph in graphs]
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        files = Path(work)
        fused = to_precision(fuse_for(model, spec, output, precision), precision)
        export_onnx(fused, spec, (output,), files)
        if CLASSMAP_NAME in names:
            add_classmap_head(files / LOGITS_NAME, files / CLASSMAP_NAME, output)
        manifest = Manifest(
            name=folder.name.removesuffix(".knet"),
            input=spec,
            labels=LabelMap(
                tuple(f"class {index}" for index in range(classes)),
                distinct_palette(classes),
                65535,
            ),
            graphs=graphs,
            provenance=Provenance("0" * 64, preset, {}),
            licence=Licence("Apache-2.0", "Apache-2.0", "none"),
        )
        return write_bundle(
            folder, manifest, {name: files / name for name in (*names, WEIGHTS_NAME)}
        )
