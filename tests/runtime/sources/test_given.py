"""An image as a person has it: a name, a PIL image or an array comes out as the same pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from knet_runtime.errors import SourceError
from knet_runtime.sources.given import read_given
from knet_runtime.sources.images import read_image
from knet_runtime.types import Rgb

pil = pytest.importorskip("PIL.Image", reason="pillow is not installed")


def drawn() -> Rgb:
    """A picture that no turn and no change of channels leaves as it is."""
    return np.random.default_rng(3).integers(0, 256, (17, 23, 3), np.uint8)


def test_an_array_is_handed_on_as_it_is() -> None:
    image = drawn()
    assert read_given(image) is image


def test_a_name_is_read_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "straße 1.png"
    pil.fromarray(drawn()).save(path)
    for name in (path, str(path)):
        np.testing.assert_array_equal(read_given(name), drawn())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_pil_image_is_treated_as_its_file(mode: str, tmp_path: Path) -> None:
    if mode == "I;16":
        deep = np.random.default_rng(4).integers(0, 65536, (17, 23), np.uint16)
        image = pil.fromarray(deep)
    else:
        image = pil.fromarray(drawn()).convert("RGBA")
        image.putalpha(pil.fromarray(drawn()[..., 0]))
        image = image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)
    assert image.mode == mode
    path = tmp_path / "image.png"
    image.save(path)
    wanted = read_image(path)
    np.testing.assert_array_equal(read_given(image), wanted)
    with pil.open(path) as opened:
        np.testing.assert_array_equal(read_given(opened), wanted)


def test_a_palette_with_a_transparent_colour_keeps_the_stored_one(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    pil.fromarray(drawn()).quantize(16).save(path, transparency=3)
    with pil.open(path) as opened:
        np.testing.assert_array_equal(read_given(opened), read_image(path))


@pytest.mark.parametrize("mode", ["CMYK", "HSV", "YCbCr", "RGBX", "La", "RGBa", "PA", "I"])
def test_modes_that_no_png_has_are_read_too(mode: str) -> None:
    plain = pil.new("RGB", (5, 4), (120, 120, 120))
    if mode == "I":
        image = pil.fromarray(np.full((4, 5), 120 * 257, np.int32))
    else:
        steps = {"La": "LA", "RGBa": "RGBA"}
        image = plain.quantize(4) if mode == "PA" else plain.convert(steps.get(mode, mode))
        image = image.convert(mode)
    assert image.mode == mode
    found = read_given(image)
    assert (found.shape, found.dtype) == ((4, 5, 3), np.uint8)
    assert abs(found.astype(int) - 120).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_pil_image_is_turned_upright_by_exif_as_its_file_is(
    orientation: int, tmp_path: Path
) -> None:
    exif = pil.Exif()
    exif[0x112] = orientation
    path = tmp_path / "image.png"
    pil.fromarray(drawn()).save(path, exif=exif)
    wanted = read_image(path)
    assert wanted.shape[:2] == ((17, 23) if orientation < 5 else (23, 17))
    with pil.open(path) as opened:
        found = read_given(opened)
        assert opened.size == (23, 17)  # the caller's image is not turned
    np.testing.assert_array_equal(found, wanted)


def cut_off() -> Any:
    file = io.BytesIO()
    pil.fromarray(drawn()).save(file, "PNG")
    return pil.open(io.BytesIO(file.getvalue()[:300]))


def closed() -> Any:
    image = pil.new("RGB", (3, 3))
    image.close()
    return image


class Huge:
    """A PIL image of a billion pixels, without them."""

    mode, size = "L", (50_000, 20_000)

    def convert(self, mode: str) -> None:
        pytest.fail(f"converted to {mode}")

    def getexif(self) -> dict[int, int]:
        return {}


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (pil.new("F", (3, 3)), r"the PIL image: has float samples \(mode F\)"),
        (pil.fromarray(np.full((2, 2), 70_000, np.int32)), "values outside the 0 … 65535"),
        (cut_off(), "the PIL image: cannot be read by PIL: "),
        (closed(), "the PIL image: cannot be read by PIL: "),
        (Huge(), "20000×50000 pixels are more than 200 million"),
        (b"\x89PNG", "not bytes"),
        (None, "not NoneType"),
        (
            "https://me:secret@host/a.png?key=1",
            r"^https://\*\*\*@host/a.png\?\*\*\*: is an address",
        ),
        ("drive.mp4", "drive.mp4: is a video, not an image; .* knet-deploy run drive.mp4$"),
        ("gone.png", "gone.png: No such file or directory"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_read_is_one_line_that_says_what_to_do(image: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message) as raised:
        read_given(image)
    assert "\n" not in str(raised.value)


def test_a_folder_and_a_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"is a folder, not an image; .* open_source"):
        read_given(tmp_path)
    broken = tmp_path / "broken.jpg"
    cv2.imwrite(str(broken), drawn())
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(SourceError, match=r"broken\.jpg: is cut off"):
        read_given(broken)
