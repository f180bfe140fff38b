"""A bundle in a notebook: whole in itself, escaped, and everything that `inspect` shows."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser

import msgspec

from knet_runtime.bundle.describe import rows
from knet_runtime.labels import LabelMap
from knet_runtime.markup import card, facts


class Text(HTMLParser):
    """The text, and that every element is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "img", "link", "body", "html")
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""


def read(html: str) -> str:
    parser = Text()
    parser.feed(html)
    parser.close()
    assert not parser.open
    return parser.text


def test_a_card_has_all_that_the_manifest_states(make_bundle):
    bundle = make_bundle()
    found = read(bundle._repr_html_())
    assert found.startswith(bundle.model_id)
    for label, text in rows(bundle):
        if label in ("", "classes"):
            text = text.split()[-1]  # the name; its colour is a square
        assert text in found, label
    colours = re.findall(r"background:rgb(\(.*?\))", bundle._repr_html_())
    assert colours == [str(colour) for colour in bundle.manifest.labels.palette]


def test_names_of_all_scripts_are_escaped(make_bundle):
    labels = LabelMap(("<script>alert(1)</script>", "Straße & Weg", "道路"), ((0, 0, 0),) * 3, 255)
    html = make_bundle(labels=labels)._repr_html_()
    assert "<script" not in html
    for name in labels.names:
        assert name in read(html)
    assert "&lt;script&gt;" in html


def test_the_style_touches_nothing_but_the_card():
    html = card("<b>", facts([("a<", "b>")]), "good")
    assert read(html) == "<b>a<b>"
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.S)
    for selectors in re.findall(r"([^{}]+){", unescape(style)):
        assert all(one.strip().startswith(".knet-deploy") for one in selectors.split(","))


def test_a_bundle_that_is_not_written_yet_is_shown_too(make_bundle):
    bundle = make_bundle()
    manifest = msgspec.structs.replace(bundle.manifest, files={})
    assert read(type(bundle)(bundle.path, manifest)._repr_html_()).startswith(manifest.name)
