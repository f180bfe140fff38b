"""An image as a person has it (the name of a file, a PIL image or an array) as RGB pixels."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import SourceError, first_line
from knet_runtime.sources.container import redacted, scheme_of
from knet_runtime.sources.images import VIDEO_SUFFIXES, eight_bits, read_image
from knet_runtime.types import MAX_PIXELS, Rgb

_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # PIL's modes, and what they are without that


@runtime_checkable
class PilImage(Protocol):
    """What is used of a ``PIL.Image.Image``: the package itself is needed by those who have one."""

    @property
    def mode(self) -> str: ...

    @property
    def size(self) -> tuple[int, int]: ...

    def convert(self, mode: str) -> Any: ...

    def getexif(self) -> Mapping[int, Any]: ...


ImageInput = Rgb | str | Path | PilImage
"""What ``read_given`` takes."""


def read_given(image: ImageInput) -> Rgb:
    """An image as uint8 [H, W, 3] RGB, upright by its EXIF data.

    ``image`` is the name of a PNG, JPEG, BMP, TIFF or WebP file (read by ``images.read_image``), a
    PIL image of any mode but floats, which is treated as a file of its content would be, or an
    array, which is handed on as it is. Raises SourceError, with what to do, for all else.
    """
    if isinstance(image, np.ndarray):
        return image
    if isinstance(image, str | Path):
        return _read_file(image)
    if isinstance(image, PilImage):
        return _from_pil(image)
    raise SourceError(
        "an image is the name of a file, a PIL image, or a NumPy array uint8 [H, W, 3] RGB, not "
        f"{type(image).__name__}; a tensor becomes an array by np.asarray(image)"
    )


def _read_file(name: str | Path) -> Rgb:
    text = str(name)
    if isinstance(name, str) and scheme_of(name):
        raise SourceError(
            f"{redacted(text)}: is an address; download the image and name its file, or take "
            "frames with open_source"
        )
    path = Path(name)
    if path.suffix.lower() in VIDEO_SUFFIXES or path.is_dir():
        kind = "a folder" if path.is_dir() else "a video"
        raise SourceError(
            f"{text}: is {kind}, not an image; go through its frames with open_source, or use "
            f"knet-deploy run {shlex.quote(text)}"
        )
    return read_image(path)


def _from_pil(image: PilImage) -> Rgb:
    name = str(getattr(image, "filename", "")) or "the PIL image"
    width, height = image.size
    if height * width > MAX_PIXELS:
        raise SourceError(
            f"{name}: {height}×{width} pixels are more than {MAX_PIXELS // 1_000_000} million; "
            "scale the image down or cut it into tiles"
        )
    if image.mode == "F":
        raise SourceError(
            f"{name}: has float samples (mode F), of which nobody knows how bright 1.0 is; scale "
            "them to 0 … 255, and pass the image after convert('L')"
        )
    from PIL import ImageOps

    upright: Any = image
    try:
        upright = ImageOps.exif_transpose(upright)
        if image.mode.startswith("I"):
            return _from_16_bits(np.asarray(upright), name)
        if image.mode in _PREMULTIPLIED:
            upright = upright.convert(_PREMULTIPLIED[image.mode])
        return np.array(upright.convert("RGB"), np.uint8)
    except (OSError, SyntaxError, ValueError) as error:  # of files that PIL reads only now
        raise SourceError(
            f"{name}: cannot be read by PIL: {first_line(error)}; copy or export the image again"
        ) from error


def _from_16_bits(grey: NDArray[Any], name: str) -> Rgb:
    """PIL's modes I and I;16, which are grey PNGs and TIFFs of 16 bits, as ``read_image`` has
    them."""
    if grey.size and not 0 <= int(grey.min()) <= int(grey.max()) <= 65535:
        raise SourceError(
            f"{name}: has values outside the 0 … 65535 of 16 bits; scale them to 0 … 255, and "
            "pass the image after convert('L')"
        )
    return np.repeat(eight_bits(grey.astype(np.uint16))[..., None], 3, axis=2)
