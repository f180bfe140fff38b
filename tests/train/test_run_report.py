"""A run's report: whole in itself, the same however often the run was stopped, and of no effect."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_segments import labels_of, segment_config

from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Instance, Segmentation
from knet_train.curves import chart, rounded_ticks, small_line
from knet_train.data.truth import Truth
from knet_train.page import small_marks
from knet_train.run_report import REPORT, RunReport, show


class Parts(HTMLParser):
    """Everything that a page would load, and the names and texts of its pictures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object")
        found = dict(attrs)
        self.links += [found[name] or "" for name in ("src", "href", "srcset") if name in found]
        if tag == "img":
            self.pictures.append(found["alt"] or "")


def test_the_report_says_what_a_run_has_measured(whole: Callable[..., Any]) -> None:
    ran = whole()
    page = (ran.best.parent / REPORT).read_text("utf-8")
    parts = Parts(page)
    assert all(link.startswith("data:") for link in parts.links)
    assert not re.search(r"url\(|@import|https?://", page)
    kinds = ("image", "label", "prediction", "difference")
    assert parts.pictures == [f"{kind} of {name}" for name in "abcdef" for kind in kinds] + [
        "Confusion matrix"
    ]
    assert f"<h1>mIoU {100 * ran.best_score:.2f} %</h1>" in page
    assert "of the run, at step " in page
    curves = re.findall(r"<h3>(.*?)</h3>.*?points='(.*?)'", page)
    lengths = {name: len(points.split()) for name, points in curves}
    assert lengths == {"Loss": 6, "mIoU, %": 3, "Learning rate": 6}
    assert "data.eval_size=[64,96]\n" in page
    best = re.escape(str(ran.best))
    assert re.search(rf"knet-deploy export {best} -o run\.knet --data \S+/data\n", page)
    assert "--resume" not in page  # it is complete
    # A third of the pixels is road, half less a car each is sky.
    row = r"road</th><td>(\S+)</td>.*?sky</th><td>(\S+)</td>.*?car</th><td>(\S+)</td>"
    shares = re.search(row, page, re.DOTALL)
    assert shares is not None
    assert sum(map(float, shares.groups())) == pytest.approx(100, abs=0.02)


def test_tensorboard_shows_the_same(whole: Callable[..., Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ran = whole()
    found = EventAccumulator(str(ran.best.parent / "logs" / "version_0"))
    found.Reload()
    tags = found.Tags()
    assert sorted(tags["images"]) == ["confusion", *(f"images/{name}" for name in "abcdef")]
    assert {"val_miou", "IoU/road", "IoU/sky", "IoU/car"} <= set(tags["scalars"])
    assert [event.step for event in found.Images("images/a")] == [2, 4, 6]
    assert found.Images("images/a")[0].width == 4 * 96 // 2
    each = [found.Scalars(f"IoU/{name}")[-1].value for name in ("road", "sky", "car")]
    assert np.mean(each) == pytest.approx(found.Scalars("val_miou")[-1].value, abs=1e-6)


def test_the_report_changes_nothing_that_is_learnt(
    go: Callable[..., Any],
    whole: Callable[..., Any],
    different: Callable[[Path, Path], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("on_validation_batch_end", "on_validation_end"):
        monkeypatch.delattr(RunReport, name)
    without = go("without")
    assert not (without.last.parent / REPORT).exists()
    assert without.last.read_bytes() == whole().last.read_bytes()
    assert not different(without.best, whole().best)


def test_a_report_that_cannot_be_written_does_not_end_the_run(
    go: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run" / REPORT).mkdir(parents=True)
    result = go("run", "optim.steps=2")
    assert result.last.exists()
    assert f"{tmp_path / 'run' / REPORT} cannot be written: " in caplog.text


def test_unlabelled_pixels_are_never_wrong() -> None:
    labels = LabelMap(("road", "sky"), ((128, 64, 128), (0, 0, 255)), 255)
    label = np.zeros((20, 30), np.uint8)
    label[:5] = 255
    found = label.copy()
    found[:5] = 1
    found[10:15, :15] = 1  # 75 of 450 labelled pixels
    image = np.zeros((20, 30, 3), np.uint8)
    shown = show("a", image, label, Segmentation(found, labels), segment_config("panoptic"))
    assert shown.right == pytest.approx(1 - 75 / 450)
    assert shown.wrong[11:14, :14].all()
    assert not shown.wrong[:8].any()
    assert shown.classes == {0, 1, 255}


def test_unsure_objects_and_crowds_are_not_shown_as_wrong() -> None:
    labels, size = labels_of("instance"), (40, 60)
    ids = np.zeros((1, *size), np.uint16)
    ids[0, 5:15, 5:15] = 1
    ids[0, 25:35, 5:15] = 2  # a crowd, of which nothing is found
    truth = Truth(ids, (0, 0), frozenset({2}), np.zeros(size, np.bool_))
    mask = np.ones((10, 10), np.bool_)
    objects = [Instance(0, 0.9, 5, 5, mask), Instance(1, 0.05, 40, 5, mask)]
    found = Segmentation.from_instances(objects, size, labels)
    image = np.full((*size, 3), 90, np.uint8)
    shown = show("a", image, truth, found, segment_config("instance"))
    assert shown.right == 1
    assert (shown.found[5:15, 40:50] == 90).all()
    assert (shown.found[5:15, 5:15] != 90).any()
    assert (shown.label[5:15, 5:15] != 90).any()
    missed = Segmentation.from_instances([], size, labels)
    assert show("a", image, truth, missed, segment_config("instance")).right < 1


def test_a_lone_pixel_is_still_marked_in_a_small_image() -> None:
    marks = np.zeros((400, 400), np.bool_)
    marks[201, 301] = True
    assert small_marks(marks, (100, 100))[50, 75]


@pytest.mark.parametrize(
    ("highest", "ticks"),
    [(2200, [0, 500, 1000, 1500, 2000]), (6, [0, 2, 4, 6]), (0.0009, [0, 2e-4, 4e-4, 6e-4, 8e-4])],
)
def test_ticks_are_round(highest: float, ticks: list[float]) -> None:
    assert rounded_ticks(highest) == ticks


def test_curves_stay_inside_their_axes() -> None:
    for drawn in (chart("loss", [(1, 8.0), (10, 0.0)], 10), small_line([(1, 1.0), (10, 0.0)], 10)):
        width, height = map(int, re.findall(r"viewBox='0 0 (\d+) (\d+)'", drawn)[0])
        (points,) = re.findall(r"points='(.*?)'", drawn)
        (left, top), (right, bottom) = (map(float, one.split(",")) for one in points.split())
        assert 0 < left < right < width
        assert 0 < top < bottom < height
    assert "NaN" not in chart("loss", [], 10)


def test_a_browser_shows_the_report_without_scrolling_sideways(
    whole: Callable[..., Any], tmp_path: Path
) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("there is no chromium to look at the page with: apt install chromium")
    page = (whole().best.parent / REPORT).read_text("utf-8")
    probe = tmp_path / "probe.html"
    # The page itself has no script: a copy gets one that writes down what was laid out.
    probe.write_text(page.replace("</body>", f"{_PROBE}</body>"), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900"]
    dom = subprocess.run(
        [browser, *flags, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=240
    ).stdout
    assert re.search(r"<pre id=\"seen\">25 0</pre>", dom) is not None, dom[-500:]


_PROBE = """<script>
window.addEventListener("load", () => {
  const root = document.documentElement, pre = document.createElement("pre");
  pre.id = "seen";
  const loaded = [...document.images].filter((image) => image.naturalWidth > 0).length;
  pre.textContent = `${loaded} ${root.scrollWidth - root.clientWidth}`;
  document.body.append(pre);
});
</script>"""
