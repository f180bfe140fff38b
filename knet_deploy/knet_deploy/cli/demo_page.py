"""The demo's page: one HTML file that carries its images and needs no network and no script."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from html import escape
from string import Template

import cv2
import numpy as np

from knet_deploy.cli.console import package_version
from knet_runtime.bundle.manifest import Licence
from knet_runtime.drawing import blend, colourise
from knet_runtime.golden import GoldenReport
from knet_runtime.labels import LabelMap
from knet_runtime.metrics import ConfusionMatrix
from knet_runtime.pipeline import RunSummary
from knet_runtime.types import ClassMap, Rgb


@dataclass(frozen=True, eq=False)
class Example:
    """A frame for the page: image uint8 [H, W, 3] RGB, and its class maps [H, W]; ``truth`` where
    there are labels."""

    index: int
    image: Rgb
    prediction: ClassMap
    truth: ClassMap | None = None


@dataclass(frozen=True, eq=False)
class Results:
    """Everything that the page shows."""

    model_id: str
    engine: str
    machine: str
    seed: int
    labels: LabelMap
    summary: RunSummary
    scores: ConfusionMatrix
    golden: GoldenReport
    street: list[Example]
    drive: list[Example]
    licence: Licence


def render(results: Results) -> str:
    """The whole page as HTML."""
    golden, summary = results.golden, results.summary
    return _PAGE.substitute(
        verdict="pass" if golden.passed else "fail",
        golden_title="The same results as PyTorch" if golden.passed else "NOT PyTorch's results",
        golden=escape(str(golden)),
        limit=f"{golden.tolerance.max_logit_diff:g}",
        least=f"{100 * golden.tolerance.agreement:g}",
        miou=f"{100 * results.scores.miou:.1f}",
        accuracy=f"{100 * results.scores.pixel_accuracy:.1f}",
        fps=f"{summary.fps:.1f}",
        frames=summary.frames,
        times=_times(summary),
        classes=_classes(results),
        street=_figures(results.street, results.labels),
        drive=_figures(results.drive, results.labels),
        model=escape(results.model_id),
        engine=escape(results.engine),
        machine=escape(results.machine),
        version=escape(package_version()),
        seed=results.seed,
        weights=escape(results.licence.weights),
        data=escape(results.licence.data),
    )


def _times(summary: RunSummary) -> str:
    return "\n".join(
        f"<tr><td>{escape(_STAGES.get(stage, stage))}</td>"
        f"<td>{time.p50:.1f}</td><td>{time.p95:.1f}</td></tr>"
        for stage, time in summary.stages.items()
    )


def _classes(results: Results) -> str:
    labels = results.labels
    return "\n".join(
        f'<tr><td><i style="background:rgb{colour}"></i>{escape(row.name)}</td>'
        f"<td>{_percent(row.iou)}</td>"
        f'<td><b style="width:{0 if math.isnan(row.iou) else 100 * row.iou:.1f}%"></b></td></tr>'
        for row, colour in zip(results.scores.rows(labels), labels.palette, strict=True)
    )


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}"


def _figures(examples: list[Example], labels: LabelMap) -> str:
    return "\n".join(_figure(example, labels) for example in examples)


def _figure(example: Example, labels: LabelMap) -> str:
    views = {
        "frame": example.image,
        "K-Net": blend(example.image, example.prediction, labels, 0.6),
    }
    if example.truth is not None:
        views["exact labels"] = colourise(example.truth, labels)
    cells = "".join(
        f'<div><img alt="{name} of frame {example.index}" src="{_data_url(image)}">'
        f"<span>{name}</span></div>"
        for name, image in views.items()
    )
    return f"<figure>{cells}<figcaption>frame {example.index}</figcaption></figure>"


def _data_url(image: Rgb) -> str:
    bgr = np.ascontiguousarray(image[..., ::-1])
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"


_STAGES = {
    "read": "read (here: drawing the street)",
    "preprocess": "fit to the model's size",
    "infer": "network",
    "postprocess": "class map at full size",
    "write": "overlay and H.264",
}

_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>knet-deploy: demo</title>
<style>
:root { color-scheme: light dark; --ink: #1c2024; --soft: #626a73; --paper: #fff; --card: #f4f5f7;
  --line: #dfe3e8; --mark: #2563c9; --good: #18794e; --bad: #c62a2f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa3ad; --paper: #15181b;
  --card: #1f2428; --line: #333a41; --mark: #6ea8ff; --good: #4cc38a; --bad: #ff6369; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 60rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .6rem; }
p { margin: .4rem 0; }
.soft, figcaption, span { color: var(--soft); font-size: .88rem; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr));
  margin: 1.4rem 0; }
.cards > div { background: var(--card); border-radius: .6rem; padding: .9rem 1rem; }
.cards strong { display: block; font-size: 1.7rem; line-height: 1.25; }
.pass { border-left: .35rem solid var(--good); }
.fail { border-left: .35rem solid var(--bad); }
.pass strong, .fail strong { font-size: 1.2rem; }
.pass strong { color: var(--good); }
.fail strong { color: var(--bad); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .88rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .5rem .3rem 0; }
td:nth-child(2), th:nth-child(2) { text-align: right; width: 5rem; }
.times td:nth-child(3), .times th:nth-child(3) { text-align: right; width: 5rem; }
.classes td:nth-child(3) { width: 45%; padding-left: .8rem; }
i { display: inline-block; width: .9rem; height: .9rem; border-radius: .2rem; margin-right: .5rem;
  vertical-align: -.1rem; border: 1px solid var(--line); }
b { display: block; height: .55rem; border-radius: .3rem; background: var(--mark); }
figure { margin: .8rem 0 1.2rem; display: grid; gap: .5rem;
  grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); }
figcaption { display: none; }
img { width: 100%; height: auto; display: block; border-radius: .35rem; }
@media (max-width: 36rem) { figure { grid-auto-flow: row; }
  figcaption { display: block; order: -1; font-weight: 600; } }
</style>
<h1>K-Net on a real street and on a synthetic drive</h1>
<p class="soft">knet-deploy demo: two videos, segmented on this machine by the packaged model,
without a network connection.</p>

<div class="cards">
<div class="$verdict"><strong>$golden_title</strong>$golden
<p class="soft">Golden check: stored images and PyTorch's logits for them, run again here.
Allowed: $limit on logits, at least $least % equal.</p></div>
<div><strong>$fps frames/s</strong>$frames frames of the synthetic drive, all stages together,
drawing and video included</div>
<div><strong>$miou % mIoU</strong>$accuracy % of pixels right, on the synthetic drive</div>
</div>

<h2>A real street</h2>
<p>A motorway in California. The model was trained on streets of Cambridge by daylight and knows
eleven classes, whose colours the table below shows: it takes hills for Building and dry grass for
Pavement, as it has no class for them. There are no labels, so there is no score.</p>
$street
<p class="soft">Video: Udacity, CarND-LaneLines-P1, MIT licence.</p>

<h2>The synthetic drive</h2>
<p>A street that is drawn on this machine. The scores are against its exact labels.
<em>They do not say how well the model sees a real street:</em> scenes from the same generator,
though not this street, were part of its training. The model card in the bundle has its scores on
real images.</p>
$drive

<h3>Classes</h3>
<table class="classes">
<tr><th>class</th><th>IoU, %</th><th></th></tr>
$classes
</table>
<p class="soft">IoU: of all pixels that are the class or were taken for it, the part that is both.
–: not on this drive.</p>

<h3>Time per frame</h3>
<table class="times">
<tr><th>stage</th><th>median, ms</th><th>95 %, ms</th></tr>
$times
</table>

<h2>Made by</h2>
<p>Model $model on $engine, knet-deploy $version, $machine; street $seed.</p>
<p class="soft">Licence of the weights: $weights. Training data: $data.</p>
</html>
""")
