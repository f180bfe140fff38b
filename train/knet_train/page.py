"""What pages that carry all they need have in common: one HTML file, no script, no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_runtime.drawing import encode_jpeg
from knet_runtime.types import Rgb, Size

STYLE = Path(__file__).with_name("page.css").read_text("utf-8")
"""The style sheet of every page: light or dark, as the reader's system is."""

OPACITY = 0.65  # of what is drawn over images
_LONGEST_SIDE = 480  # of an image on a page
_QUALITY = 82
_RED = np.array((255, 59, 48), np.float64)


def shrunk(image: Rgb) -> Rgb:
    """uint8 [H, W, 3] at the size that it has on a page."""
    height, width = image.shape[:2]
    scale = min(1.0, _LONGEST_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def small_marks(marks: NDArray[np.bool_], size: Size) -> NDArray[np.bool_]:
    """The pixels of a smaller image in which anything is marked, so that a lone one is seen too."""
    shares = cv2.resize(marks.astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)
    wider = cv2.dilate((shares > 0).astype(np.uint8), np.ones((3, 3), np.uint8))
    return np.asarray(wider, np.uint8) > 0


def in_red(image: Rgb, marks: NDArray[np.bool_]) -> Rgb:
    """The image uint8 [H, W, 3] in dark grey, and what is marked [H, W] in red."""
    grey = np.repeat(image.mean(2, keepdims=True) * 0.45, 3, 2)
    return np.where(marks[..., None], _RED, grey).astype(np.uint8)


def pictures(name: str, caption: str, cells: Mapping[str, Rgb], *, objects: bool) -> str:
    """Images of one image side by side, each over what it is; labels of ``objects`` can be read in
    two columns, not in four."""
    parts = "".join(
        f'<div><img alt="{what} of {escape(name)}" src="{data_uri(encode_jpeg(image, _QUALITY))}">'
        f"<span>{what}</span></div>"
        for what, image in cells.items()
    )
    kind = " class='objects'" if objects else ""
    return f"<figure{kind}><figcaption>{escape(caption)}</figcaption>{parts}</figure>"


def data_uri(image: bytes, kind: str = "jpeg") -> str:
    """An encoded image as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
