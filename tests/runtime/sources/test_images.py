"""Image files and folders as sources: formats, orientation, order, names, and damage."""

from __future__ import annotations

import os
import socket
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from knet_runtime.errors import SourceError
from knet_runtime.sources import open_source
from knet_runtime.sources.images import frame_names, list_images, read_image

ENCODINGS = (".png", ".jpg", ".bmp", ".tif", ".webp")


def drawn(height: int = 24, width: int = 40) -> NDArray[np.uint8]:
    """Smooth RGB that no two mirrorings or channel orders share."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.dstack([rows * 8, columns * 5, 40 + rows * 2 + columns]).astype(np.uint8)


def encoded(suffix: str, image: cv2.typing.MatLike | None = None) -> bytes:
    pixels = cv2.cvtColor(drawn(), cv2.COLOR_RGB2BGR) if image is None else image
    good, data = cv2.imencode(suffix, pixels)
    assert good
    return bytes(data)


def save(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def exif(orientation: int) -> bytes:
    return b"II*\x00\x08\x00\x00\x00\x01\x00" + struct.pack(
        "<HHIHHI", 0x112, 3, 1, orientation, 0, 0
    )


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_lossless_formats_come_out_as_the_same_rgb(tmp_path: Path, suffix: str) -> None:
    image = read_image(save(tmp_path / f"a{suffix}", encoded(suffix)))
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, drawn())


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_formats_come_out_as_nearly_the_same_rgb(tmp_path: Path, suffix: str) -> None:
    image = read_image(save(tmp_path / f"a{suffix}", encoded(suffix)))
    assert np.abs(image.astype(int) - drawn()).mean() < 4


def test_lossless_webp_and_one_pixel(tmp_path: Path) -> None:
    flags = [cv2.IMWRITE_WEBP_QUALITY, 101]
    data = cv2.imencode(".webp", cv2.cvtColor(drawn(), cv2.COLOR_RGB2BGR), flags)[1]
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.webp", bytes(data))), drawn())
    one = np.array([[[3, 2, 1]]], np.uint8)
    assert read_image(save(tmp_path / "b.png", encoded(".png", one))).tolist() == [[[1, 2, 3]]]


def test_sixteen_bits_are_rounded_to_eight(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 32767, 65406, 65407, 65535]], np.uint16)
    image = read_image(save(tmp_path / "a.png", encoded(".png", values)))
    assert image.shape == (1, 8, 3)
    np.testing.assert_array_equal(image[0, :, 0], np.round(values[0] / 257))


def test_grey_becomes_rgb_and_transparency_is_dropped(tmp_path: Path) -> None:
    grey = read_image(save(tmp_path / "g.png", encoded(".png", drawn()[..., 0])))
    np.testing.assert_array_equal(grey, np.dstack([drawn()[..., 0]] * 3))
    clear = np.dstack([cv2.cvtColor(drawn(), cv2.COLOR_RGB2BGR), np.zeros((24, 40), np.uint8)])
    image = read_image(save(tmp_path / "c.png", encoded(".png", clear)))
    np.testing.assert_array_equal(image, drawn())


def test_palette_png_takes_its_colours(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 2, 1, 8, 3, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"PLTE", bytes([10, 20, 30, 200, 100, 50]))
        + png_chunk(b"IDAT", zlib.compress(b"\x00\x01\x00"))
        + png_chunk(b"IEND", b"")
    )
    assert read_image(save(tmp_path / "p.png", data)).tolist() == [[[200, 100, 50], [10, 20, 30]]]


def test_a_jpeg_is_turned_upright_by_exif(tmp_path: Path) -> None:
    upright = np.rot90(drawn(), -1)  # orientation 6: turn clockwise to see it upright
    body = b"Exif\x00\x00" + exif(6)
    jpeg = encoded(".jpg")
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    image = read_image(save(tmp_path / "a.jpg", jpeg[:2] + segment + jpeg[2:]))
    assert image.shape == (40, 24, 3)
    assert np.abs(image.astype(int) - upright).mean() < 4


def test_a_name_outside_ascii_and_a_wrong_suffix_are_no_obstacle(tmp_path: Path) -> None:
    path = save(tmp_path / "straße 道路.png", encoded(".bmp"))
    np.testing.assert_array_equal(read_image(path), drawn())


@pytest.mark.parametrize("suffix", ENCODINGS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_cut_image_is_refused_by_name_in_silence(
    tmp_path: Path, suffix: str, share: float, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(suffix, noise)
    path = save(tmp_path / f"cut{suffix}", data[: int(len(data) * share)])
    with pytest.raises(SourceError, match=f"cut{suffix}: .*(copy|export)"):
        read_image(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "is empty"),
        (b"hello, I am text\n" * 9, "is not a PNG, JPEG, BMP, TIFF or WebP"),
        (b"\x89PNG\r\n\x1a\n" + b"text" * 40, "is cut off"),
        (b"\xff\xd8\xff", "is cut off"),
        (b"\xff\xd8\xff\xe0\x00\x04ab" + b"x" * 99, "no JPEG segment"),
        (b"BM" + b"\x00" * 9, "is cut off"),
        (b"BM" + b"\x00" * 90, "states a size of 0×0"),
        (b"II*\x00\xff\xff\xff\xff", "is cut off"),
        (b"RIFF\x04\x00\x00\x00WEBPabcdefgh", "is damaged"),
    ],
)
def test_what_is_no_image_is_refused_by_name_in_silence(
    tmp_path: Path, data: bytes, complaint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "bad.png", data)
    with pytest.raises(SourceError, match=f"bad.png: .*{complaint}"):
        read_image(path)
    assert capfd.readouterr() == ("", "")


def test_a_png_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    data = bytearray(encoded(".png"))
    data[len(data) // 2] ^= 4
    with pytest.raises(SourceError, match="checksum"):
        read_image(save(tmp_path / "a.png", bytes(data)))


def test_a_broken_colour_profile_is_ignored_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = encoded(".png")
    profile = png_chunk(b"iCCP", b"name\x00\x00" + zlib.compress(b"no profile"))
    image = read_image(save(tmp_path / "a.png", data[:33] + profile + data[33:]))
    np.testing.assert_array_equal(image, drawn())
    assert capfd.readouterr() == ("", "")


def test_opencv_log_level_is_what_it_was(tmp_path: Path) -> None:
    log = getattr(cv2.utils, "logging", cv2)
    before = log.getLogLevel()
    with pytest.raises(SourceError):
        read_image(save(tmp_path / "a.bmp", encoded(".bmp")[:900]))
    assert log.getLogLevel() == before


def test_opencv_log_level_survives_many_readers_at_once(tmp_path: Path) -> None:
    log = getattr(cv2.utils, "logging", cv2)
    before = log.getLogLevel()
    path = save(tmp_path / "a.png", encoded(".png"))
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(read_image, [path] * 64))
    assert log.getLogLevel() == before
    assert all(np.array_equal(image, drawn()) for image in images)


@pytest.mark.parametrize("suffix", ENCODINGS)
def test_a_header_that_promises_too_many_pixels_is_refused_before_decoding(
    tmp_path: Path, suffix: str
) -> None:
    data = bytearray(encoded(suffix))
    match suffix:
        case ".png":
            data[16:24] = struct.pack(">II", 60000, 60000)
            data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        case ".jpg":
            at = data.index(b"\xff\xc0") + 5
            data[at : at + 4] = struct.pack(">HH", 60000, 60000)
        case ".bmp":
            data[18:26] = struct.pack("<ii", 60000, -60000)
        case ".tif":
            (at,) = struct.unpack_from("<I", data, 4)
            for entry in range(at + 2, len(data) - 11, 12):
                tag, kind = struct.unpack_from("<HH", data, entry)
                if tag in (256, 257):
                    struct.pack_into("<H" if kind == 3 else "<I", data, entry + 8, 60000)
        case _:
            data[12:30] = b"VP8X" + struct.pack("<II", 10, 0) + b"\xff\xff\x00" * 2
    with pytest.raises(SourceError, match="200 million; scale the image down"):
        read_image(save(tmp_path / f"bomb{suffix}", bytes(data)))


def test_float_samples_are_refused_with_the_mend(tmp_path: Path) -> None:
    data = encoded(".tif", drawn().astype(np.float32))
    with pytest.raises(SourceError, match="float32 samples; save it with 8 or 16 bits"):
        read_image(save(tmp_path / "f.tif", data))


def test_a_missing_image_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no\.png: No such file"):
        read_image(tmp_path / "no.png")
    with pytest.raises(SourceError, match="is a folder"):
        read_image(tmp_path)


def test_a_folder_is_read_in_natural_order_without_strangers(tmp_path: Path) -> None:
    for name in ("f10.PNG", "f2.png", "F1.jpg", "f2b.jpeg", "._f3.png"):
        save(tmp_path / name, encoded(".png"))
    save(tmp_path / "notes.txt", b"text")
    (tmp_path / "sub.png").mkdir()
    (tmp_path / "inner").mkdir()
    save(tmp_path / "inner" / "x.png", encoded(".png"))
    found = [path.name for path in list_images(tmp_path)]
    assert found == ["F1.jpg", "f2.png", "f2b.jpeg", "f10.PNG"]
    with open_source(tmp_path) as source:
        assert (source.info.kind, source.info.hw) == ("images", (24, 40))
        assert (source.info.frames, source.info.rate) == (4, None)
        frames = list(source)
    assert [frame.name for frame in frames] == ["F1", "f2", "f2b", "f10"]
    assert [frame.index for frame in frames] == [0, 1, 2, 3]
    assert {frame.pts for frame in frames} == {None}


def test_an_empty_folder_names_the_extensions(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="png jpg jpeg bmp tif tiff webp"):
        open_source(tmp_path)


def test_images_that_share_a_stem_keep_different_names() -> None:
    paths = [Path(name) for name in ("a.jpg", "a.png", "b.png")]
    assert frame_names(paths) == ["a.jpg", "a.png", "b"]
    paths = [Path(name) for name in ("a.jpg", "a.png", "a.png.png")]
    assert frame_names(paths) == ["a.jpg", "a.png", "a.png.png"]


def test_a_damaged_image_in_the_middle_stops_there_by_name(tmp_path: Path) -> None:
    for name in ("1.png", "2.png", "3.png"):
        save(tmp_path / name, encoded(".png"))
    save(tmp_path / "2.png", encoded(".png")[:-20])
    seen: list[str] = []
    with open_source(str(tmp_path)) as source, pytest.raises(SourceError, match=r"2\.png: is cut"):
        seen.extend(frame.name for frame in source)
    assert seen == ["1"]


def test_a_single_image_is_one_frame_and_a_second_loop_goes_on(tmp_path: Path) -> None:
    with open_source(save(tmp_path / "one.png", encoded(".png"))) as source:
        assert source.info.kind == "image"
        assert [frame.name for frame in source] == ["one"]
        assert list(source) == []


def make_irregular(kind: str, path: Path) -> None:
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
        case "loop":
            path.symlink_to(path)
        case "zeros":
            with path.open("wb") as file:
                file.truncate(100 * 10**9)
        case "vast":
            path.write_bytes(encoded(".png"))
            with path.open("r+b") as file:
                file.truncate(100 * 10**9)


IRREGULAR = {
    "fifo": "is not a regular file",
    "device": "is not a regular file",
    "socket": "is not a regular file",
    "loop": "Too many levels of symbolic links",
    "zeros": "begins with zeros",
    "vast": "is larger than 1,667 MB",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("kind", "complaint"), IRREGULAR.items())
def test_what_is_no_regular_file_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    make_irregular(kind, path := Path("odd.png"))
    for read in (read_image, open_source):
        with pytest.raises(SourceError, match=rf"^odd\.png: .*{complaint}.*; ") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.timeout(20)
def test_a_folder_of_images_leaves_out_what_is_no_regular_file(tmp_path: Path) -> None:
    save(tmp_path / "a.png", encoded(".png"))
    for kind in ("fifo", "device", "loop"):
        make_irregular(kind, tmp_path / f"{kind}.png")
    with open_source(tmp_path) as source:
        assert [frame.name for frame in source] == ["a"]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    "flags",
    [
        [],
        [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
        [cv2.IMWRITE_JPEG_RST_INTERVAL, 4],
        [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444],
    ],
)
def test_half_a_jpeg_with_an_end_marker_is_refused_in_silence(
    tmp_path: Path, flags: list[int], share: float, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 120, 3), np.uint8)
    data = bytes(cv2.imencode(".jpg", noise, flags)[1])
    assert read_image(save(tmp_path / "whole.jpg", data)).shape == (96, 120, 3)
    scan = data.index(b"\xff\xda") + 14
    half = data[: scan + int((len(data) - scan) * share)] + b"\xff\xd9"
    with pytest.raises(SourceError, match=r"half\.jpg: is damaged or cut off; copy or export"):
        read_image(save(tmp_path / "half.jpg", half))
    assert capfd.readouterr() == ("", "")


def test_what_applications_put_into_a_jpeg_is_no_damage(tmp_path: Path) -> None:
    jpeg = encoded(".jpg")
    odd = b"".join(
        b"\xff" + marker + struct.pack(">H", len(body) + 2) + body
        for marker, body in ((b"\xe1", b"Exif\0\0II*\0junk"), (b"\xe2", b"ICC"), (b"\xfe", b""))
    )
    path = save(tmp_path / "a.jpg", jpeg[:2] + odd + jpeg[2:] + b"another image follows")
    np.testing.assert_array_equal(read_image(path), read_image(save(tmp_path / "b.jpg", jpeg)))


def test_odd_chunks_of_a_png_are_ignored_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = encoded(".png")
    odd = png_chunk(b"PLTE", bytes(7)) + png_chunk(b"tRNS", bytes(40)) + png_chunk(b"gAMA", b"x")
    image = read_image(save(tmp_path / "a.png", data[:33] + odd + data[33:]))
    np.testing.assert_array_equal(image, drawn())
    assert capfd.readouterr() == ("", "")


def tiff(image: NDArray[np.generic], *, order: str, big: bool, planar: int, extra: int) -> bytes:
    """An uncompressed TIFF of one strip per plane, written tag by tag."""
    height, width, channels = image.shape
    pixels = image.astype(image.dtype.newbyteorder(order))
    planes = [pixels] if planar == 1 else list(np.moveaxis(pixels, 2, 0))
    strips = [plane.tobytes() for plane in planes]
    wide, counting = ("Q", "Q") if big else ("I", "H")
    room = struct.calcsize(wide)
    body = b"".join(strips)
    begin = 16 if big else 8
    places = [begin + sum(map(len, strips[:i])) for i in range(len(strips))]
    tags: dict[int, tuple[str, list[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [8 * image.itemsize] * channels),
        259: ("H", [1]),
        262: ("H", [2]),
        273: ("I", places),
        277: ("H", [channels]),
        278: ("I", [height]),
        279: ("I", [len(strip) for strip in strips]),
        284: ("H", [planar]),
    }
    if channels == 4:
        tags[338] = ("H", [extra])
    entries = b""
    for tag, (form, values) in tags.items():
        value = struct.pack(f"{order}{len(values)}{form}", *values)
        if len(value) > room:
            body += value
            value = struct.pack(order + wide, begin + len(body) - len(value))
        kind = {"H": 3, "I": 4}[form]
        entries += struct.pack(f"{order}HH{wide}", tag, kind, len(values)) + value.ljust(
            room, b"\0"
        )
    body += struct.pack(order + counting, len(tags)) + entries + bytes(room)
    at = begin + len(body) - len(entries) - room - struct.calcsize(counting)
    mark = b"II" if order == "<" else b"MM"
    head = struct.pack(order + "HHHQ", 43, 8, 0, at) if big else struct.pack(order + "HI", 42, at)
    return mark + head + body


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_tiffs_of_any_layout_keep_the_stored_colours(
    tmp_path: Path, order: str, big: bool, planar: int, extra: int
) -> None:
    half_clear = np.dstack([drawn(), np.full((24, 40), 100, np.uint8)])
    for name, image in (("rgb", drawn()), ("rgba", half_clear)):
        data = tiff(image, order=order, big=big, planar=planar, extra=extra)
        np.testing.assert_array_equal(read_image(save(tmp_path / f"{name}.tif", data)), drawn())


def test_a_tiff_of_sixteen_bits_with_its_channels_apart_is_refused(tmp_path: Path) -> None:
    deep = drawn().astype(np.uint16) * 257
    layout = {"order": "<", "big": False, "extra": 0}
    together = save(tmp_path / "a.tif", tiff(deep, planar=1, **layout))  # type: ignore[arg-type]
    np.testing.assert_array_equal(read_image(together), drawn())
    apart = save(tmp_path / "b.tif", tiff(deep, planar=2, **layout))  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=r"b\.tif: is a TIFF of 16 bits with its channels apart"):
        read_image(apart)


def test_an_animated_webp_gives_its_first_image_or_a_clear_line(tmp_path: Path) -> None:
    flags = [cv2.IMWRITE_WEBP_QUALITY, 101]
    frame = bytes(cv2.imencode(".webp", cv2.cvtColor(drawn(), cv2.COLOR_RGB2BGR), flags)[1])[12:]
    size = struct.pack("<I", 39)[:3] + struct.pack("<I", 23)[:3]
    shown = bytes(6) + size + b"\x64\0\0\0" + frame
    parts = [
        (b"VP8X", b"\x02\0\0\0" + size),
        (b"ANIM", bytes(6)),
        (b"ANMF", shown),
        (b"ANMF", shown),
    ]
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(data)) + data for kind, data in parts)
    path = save(tmp_path / "a.webp", b"RIFF" + struct.pack("<I", len(body)) + body)
    try:
        np.testing.assert_array_equal(read_image(path), drawn())
    except SourceError as error:  # older OpenCV
        assert "a.webp: is an animated WebP, which OpenCV" in str(error)  # noqa: PT017
