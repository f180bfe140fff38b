"""The report's page: whole in itself, and a browser shows what it says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from knet_export.verify.measure import MarginRow, default_tolerance
from knet_export.verify.report import JSON_NAME, PAGE_NAME, WorstImages, delta_plot, write_page
from knet_export.verify.verify import ClassRow, Compared, VerifyReport
from knet_runtime.errors import OutputError
from knet_runtime.segmentation import Segmentation
from knet_synthetic import CAMVID11, Street

PICTURES = 9
DELTAS = (0.01, -0.02, -0.31, 0.0, 0.003, 0.1, None, -0.004, 0.05, -0.06, 0.02)


@pytest.fixture
def report() -> VerifyReport:
    rows = zip(CAMVID11.names, DELTAS, strict=True)
    return VerifyReport(
        model_id="street@0123456789ab",
        precision="fp32",
        kind="logits",
        size=(96, 128),
        engine="openvino",
        device="a <processor>",
        reference="PyTorch, float32",
        same_checkpoint=False,
        data="streets, split val",
        images=PICTURES,
        miou_reference=70.0,
        miou_measured=69.97,
        delta_miou=-0.03,
        delta_miou_interval=(-0.05, -0.01),
        worst_class="Pole",
        worst_class_delta_iou=-0.31,
        agreement=0.9991,
        agreement_confident=0.99999,
        max_logit_diff=2e-4,
        mean_logit_diff=1e-5,
        margins=(MarginRow(0.0, 1.0, 0.1, 0.99), MarginRow(1.0, None, 0.9, 1.0)),
        classes=tuple(
            ClassRow(name, None if delta is None else 70.0, None if delta is None else 70 + delta)
            for name, delta in rows
        ),
        tolerance=default_tolerance("fp32"),
        failures=(
            "ΔmIoU -0.030 points is outside ±0.02",
            "ΔIoU of Pole -0.310 points <is> outside",
        ),
    )


@pytest.fixture(scope="module")
def worst() -> WorstImages:
    """Nine images; the further on, the more pixels differ; the last has no map at all."""
    kept = WorstImages([f"street <{number}>" for number in range(PICTURES)])
    for number in range(PICTURES):
        image, label = Street(number, (180, 240)).frame(0)
        found = label.copy()
        found[: 15 * number] = 3
        last = number == PICTURES - 1
        agreed = 0.0 if last else float((found == label).mean())
        reference, measured = (Segmentation(one, CAMVID11) for one in (label, found))
        kept.add(Compared(number, image, reference, None if last else measured, agreed))
    return kept


class Links(HTMLParser):
    """Everything that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object")
        self.images += tag == "img"
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]


def test_the_page_is_whole_in_itself(
    report: VerifyReport, worst: WorstImages, tmp_path: Path
) -> None:
    write_page(report, CAMVID11, worst, tmp_path / "new" / "folder")
    page = (tmp_path / "new" / "folder" / PAGE_NAME).read_text("utf-8")
    links = Links()
    links.feed(page)
    assert all(link.startswith("data:") for link in links.found)
    assert not re.search(r"url\(|@import|https?://", page)
    assert links.images == 6 * 4  # of the six worst: input, reference, bundle, difference
    assert len(page) < 4_000_000
    assert page.index("<h1>Failed</h1>") < page.index("<h2>Measures</h2>")
    assert "street &lt;8&gt;" in page
    assert "street &lt;0&gt;" not in page  # it agrees everywhere
    assert "a &lt;processor&gt;" in page
    assert "this compares two models" in page
    assert "$" not in re.sub(r"data:[^\"']*", "", page)
    stored = json.loads((tmp_path / "new" / "folder" / JSON_NAME).read_text())
    assert stored["delta_miou"] == -0.03


def test_a_notebook_shows_the_verdict_and_the_measures(report: VerifyReport) -> None:
    card = report._repr_html_()
    links = Links()
    links.feed(card)
    assert (links.found, links.images) == ([], 0)
    assert "<strong class='bad'>Failed: street@0123456789ab on openvino</strong>" in card
    assert "a &lt;processor&gt;" in card
    assert "Pole -0.310 points &lt;is&gt; outside" in card
    assert "-0.0300 points" in card
    assert "this compares two models" in card
    for row in report.classes:
        assert f"<th scope='row'>{row.name}</th>" in card
    good = msgspec.structs.replace(
        report, failures=(), classes=(), same_checkpoint=True, delta_miou=None
    )
    card = good._repr_html_()
    assert "<strong class='good'>Passed" in card
    assert "this compares two models" not in card
    assert "ΔmIoU" not in card
    assert "<details>" not in card


def test_worst_comes_first_and_an_image_without_a_map_says_why(worst: WorstImages) -> None:
    assert worst.first == PICTURES - 1
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", worst.figures())
    assert [caption.split(":")[0] for caption in captions] == [
        f"street &lt;{number}&gt;" for number in (8, 7, 6, 5, 4, 3)
    ]
    assert "NaN or infinity" in captions[0]


def test_the_plot_shows_every_class_that_has_a_change(report: VerifyReport) -> None:
    plot = delta_plot(report)
    assert plot.count("<title>") == 10
    assert plot.count("class='bar out'") == 1
    many = msgspec.structs.replace(
        report, classes=tuple(ClassRow(f"c{n}", 50.0, 50 + n / 100) for n in range(60))
    )
    plot = delta_plot(many)
    assert plot.count("<title>") == 40
    assert "The 40 of 60 classes that changed most" in plot
    assert "<title>c59 " in plot
    assert "<title>c19 " not in plot
    assert delta_plot(msgspec.structs.replace(report, classes=())) == ""


def test_a_report_that_can_not_be_written_is_named(
    report: VerifyReport, worst: WorstImages, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        write_page(report, CAMVID11, worst, tmp_path / "file" / "report")


@pytest.mark.parametrize(("width", "height"), [(1200, 900), (500, 900)])
def test_a_browser_shows_the_verdict_and_the_images(
    report: VerifyReport, worst: WorstImages, tmp_path: Path, width: int, height: int
) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("there is no chromium to look at the page with: apt install chromium")
    write_page(report, CAMVID11, worst, tmp_path)
    page = tmp_path / PAGE_NAME
    probe = tmp_path / "probe.html"
    # The page itself has no script: a copy gets one that writes down what was laid out.
    probe.write_text(page.read_text("utf-8").replace("</body>", f"{_PROBE}</body>"), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},{height}"]
    dom = subprocess.run(
        [browser, *flags, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    found = re.search(r"<pre id=\"seen\">(.*?)</pre>", dom)
    assert found is not None, dom[-500:]
    seen = json.loads(found[1])
    assert seen["title"] == "Failed"
    assert 0 < seen["verdict"] < 300  # the first thing on the page
    assert seen["loaded"] == 24
    assert seen["bars"] == 10
    assert seen["overflow"] == 0, "the page scrolls sideways"
    shot = tmp_path / "shot.png"
    subprocess.run(
        [browser, *flags, f"--screenshot={shot}", page.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    pixels = cv2.imread(str(shot)).astype(np.int16)
    assert pixels.shape[:2] == (height, width)
    red = (pixels[..., 2] > 150) & (pixels[..., 1] < 80)
    assert red[:200].sum() > 200  # the failed verdict's colour


_PROBE = """<script>
window.addEventListener("load", () => {
  const root = document.documentElement, pre = document.createElement("pre");
  pre.id = "seen";
  pre.textContent = JSON.stringify({
    title: document.querySelector("h1").textContent,
    verdict: document.querySelector("h1").getBoundingClientRect().bottom,
    loaded: [...document.images].filter(image => image.naturalWidth > 0).length,
    bars: document.querySelectorAll("svg rect.bar").length,
    overflow: Math.max(0, root.scrollWidth - root.clientWidth),
  });
  document.body.append(pre);
});
</script>"""
