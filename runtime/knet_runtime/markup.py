"""Pieces of HTML that pages and notebooks have in common; all text that comes in is escaped."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from html import escape

from knet_runtime.labels import Colour, LabelMap

# A notebook has colours of its own, light or dark, and these are read on both. It has rules for
# tables too, as exact as two classes and an element: ours name their class twice to be more exact.
_STYLE = """
.knet-deploy { max-width: 62em; overflow-wrap: anywhere; line-height: 1.45; }
.knet-deploy table { border-collapse: collapse; margin: .5em 0; font-size: inherit; }
.knet-deploy tr { background: none !important; }
.knet-deploy.knet-deploy table th, .knet-deploy.knet-deploy table td { text-align: left;
  vertical-align: top; border: 0; border-bottom: 1px solid #8885; padding: .2em 1em .2em 0;
  font-weight: normal; white-space: normal; }
.knet-deploy.knet-deploy table:not(.facts) td, .knet-deploy.knet-deploy thead th + th {
  text-align: right; white-space: nowrap; }
.knet-deploy.knet-deploy table.facts th { white-space: nowrap; }
.knet-deploy thead th, .knet-deploy table.facts th, .knet-deploy small { opacity: .7; }
.knet-deploy small { display: block; font-size: .85em; }
.knet-deploy ul { margin: .3em 0; padding-left: 1.2em; }
.knet-deploy ul.legend { list-style: none; padding: 0; margin: 0; display: flex; flex-wrap: wrap;
  gap: .1em 1em; }
.knet-deploy i { display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  border: 1px solid #8888; border-radius: .15em; }
.knet-deploy summary { cursor: pointer; }
.knet-deploy .good { color: #279a5b; }
.knet-deploy .bad { color: #dd4a50; }
"""


def swatch(colour: Colour) -> str:
    """A square of a colour."""
    return f"<i style='background:rgb{colour}'></i>"


def legend(labels: LabelMap, classes: Collection[int]) -> str:
    """List items with the colours and names of ``classes``; values without a class are left out."""
    return "\n".join(
        f"<li>{swatch(labels.palette[one])}{escape(labels.names[one])}</li>"
        for one in sorted(classes)
        if one < labels.num_classes
    )


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A table of a label and a text per row; rows without a label go on with the one before."""
    cells = "".join(
        f"<tr><th scope='row'>{escape(label)}</th><td>{escape(text)}</td></tr>"
        for label, text in rows
    )
    return f"<table class='facts'>{cells}</table>"


def card(title: str, body: str, mark: str = "") -> str:
    """What ``_repr_html_`` gives: ``body``, which is HTML, under a title, with a style that touches
    nothing else in the notebook. ``mark`` is the title's class: "good" or "bad"."""
    heading = f"<strong class='{mark}'>{escape(title)}</strong>"
    return f"<div class='knet-deploy'><style>{_STYLE}</style>{heading}{body}</div>"
