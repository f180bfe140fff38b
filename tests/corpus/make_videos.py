"""320 damaged, lying and absurd videos, from small synthetic ones; the same for the same seed.

    python tests/corpus/make_videos.py FOLDER [--seed 0]

Names say what was done: flips-017-h264.mp4. The clips are encoded here, of 48 × 64 pixels, so the
corpus needs no data and holds nothing of anybody's.
"""

from __future__ import annotations

import argparse
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np

CLIPS = {
    "h264.mp4": ("libx264", "yuv420p", {"movflags": "faststart"}),
    "late.mp4": ("libx264", "yuv420p", {}),
    "parts.mp4": ("libx264", "yuv420p", {"movflags": "frag_keyframe+empty_moov"}),
    "hevc.mp4": ("libx265", "yuv420p10le", {}),
    "mpeg4.mov": ("mpeg4", "yuv420p", {}),
    "h264.mkv": ("libx264", "yuv420p", {}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {}),
    "ffv1.mkv": ("ffv1", "gray", {}),
    "h264.ts": ("libx264", "yuv420p", {}),
    "mpeg2.ts": ("mpeg2video", "yuv420p", {}),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {}),
    "h264.flv": ("libx264", "yuv420p", {}),
    "h264.h264": ("libx264", "yuv420p", {}),
    "raw.y4m": ("wrapped_avframe", "yuv420p", {}),
    "palette.gif": ("gif", "rgb8", {}),
    "vp8.ivf": ("libvpx", "yuv420p", {}),
}
_TUNING = {
    "libx264": {"preset": "veryfast", "bf": "2", "threads": "1"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "threads": "1"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "threads": "1"},
}
_BOXES = "mvhd tkhd elst mdhd hdlr stsd avc1 avcC stts ctts stss stsc stsz stco moof tfhd trun mdat"


def encode(
    path: Path,
    codec: str,
    pixels: str,
    options: dict[str, str],
    size: tuple[int, int] = (48, 64),
    frames: int = 20,
) -> bytes:
    """A clip of moving noise (flat grey above a megapixel), as its file's bytes."""
    noise = np.random.default_rng(0)
    large = size[0] * size[1] > 1_000_000
    tuning = (
        {"preset": "ultrafast", "tune": "zerolatency", "threads": "1"}
        if large
        else _TUNING.get(codec, {})
    )
    with av.open(str(path), "w", options={"fflags": "+bitexact", **options}) as container:
        stream = container.add_stream(codec, rate=30, options=tuning)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        stream.codec_context.gop_size = 8
        for index in range(frames):
            if large:  # its planes at once, which takes less memory
                planes = np.full((size[0] * 3 // 2, size[1]), 90, np.uint8)
                frame = av.VideoFrame.from_ndarray(planes, pixels)
            else:
                image = noise.integers(0, 256, (*size, 3), np.uint8)
                image[: 2 * index] = 128
                frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=pixels)
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    path.unlink()
    return data


def flip_bits(data: bytes, dice: random.Random, first: int = 0, last: int | None = None) -> bytes:
    """1 to 200 bits of a range of the file turned over."""
    changed = bytearray(data)
    last = len(data) if last is None else min(last, len(data))
    for _ in range(dice.choice([1, 3, 10, 50, 200])):
        changed[dice.randrange(first, last)] ^= 1 << dice.randrange(8)
    return bytes(changed)


def cut(data: bytes, dice: random.Random) -> bytes:
    """Its end missing, its beginning, or a hole in the middle closed up."""
    here, there = sorted(dice.sample(range(1, len(data)), 2))
    return dice.choice([data[:here], data[there:], data[:here] + data[there:]])


def wreck_header(data: bytes, dice: random.Random) -> bytes:
    """Its first bytes zero, noise, those of another format, or doubled."""
    length = dice.choice([4, 12, 40, 200])
    foreign = [b"RIFF\0\0\0\0AVI LIST", b"\x1aE\xdf\xa3\x9fB\x86\x81", b"\0\0\0\x20ftypisom"]
    foreign += [
        b"GIF89a\xff\xff\xff\xff",
        b"FLV\x01\x05",
        b"DKIF\0\0\x20\0",
        b"ID3\x04",
        b"#EXTM3U\n",
    ]
    head = dice.choice([bytes(length), dice.randbytes(length), dice.choice(foreign), data[:length]])
    return head + data[dice.choice([0, len(head)]) :]


def shuffle(data: bytes, dice: random.Random) -> bytes:
    """Blocks zeroed, repeated many times, or in another order."""
    size = max(1, len(data) // 16)
    blocks = [data[at : at + size] for at in range(0, len(data), size)]
    at = dice.randrange(1, len(blocks))
    match dice.randrange(3):
        case 0:
            blocks[at] = bytes(size)
        case 1:
            blocks[at] *= 20
        case _:
            tail = blocks[1:]
            dice.shuffle(tail)
            blocks[1:] = tail
    return b"".join(blocks)


def join(data: bytes, dice: random.Random) -> bytes:
    """Itself after itself, whole, from anywhere on, or up to anywhere."""
    return dice.choice([data, data[dice.randrange(len(data)) :], flip_bits(data, dice)]) + data


def patch_box(data: bytes, dice: random.Random) -> bytes:
    """A size or a field of one of an MP4's boxes set to an extreme."""
    there = [box.encode() for box in _BOXES.split() if box.encode() in data]
    at = data.index(dice.choice(there)) + dice.choice([-4, 4, 8, 12, 16, 20, 24, 28, 32])
    value = dice.choice([0, 1, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF0001])
    changed = bytearray(data)
    changed[at : at + 4] = struct.pack(">I", value)
    return bytes(changed)


def _seeded(
    kind: str, count: int, clips: dict[str, bytes], change: Callable[[bytes, random.Random], bytes]
) -> Iterator[tuple[str, Callable[[random.Random], bytes]]]:
    names = sorted(clips)
    for number in range(count):
        name = names[number % len(names)]
        data = clips[name]
        yield f"{kind}-{number:03d}-{name}", lambda dice, data=data: change(data, dice)


def _empty() -> dict[str, bytes]:
    """Files of which no frame can come."""
    head = b"YUV4MPEG2 W64 H48 F30:1 C420\n"
    ivf = b"DKIF" + struct.pack("<HH4sHHIII", 0, 32, b"VP80", 64, 48, 30, 1, 0)
    return {
        "empty.mp4": b"",
        "head.y4m": head,
        "mark.y4m": head + b"FRAME\n",
        "head.ivf": ivf + bytes(4),
        "zero.ivf": ivf + bytes(4) + struct.pack("<IQ", 0, 0) * 50,
        "zero.ts": bytes(188 * 100),
        "null.ts": (b"\x47\x1f\xff\x10" + bytes(184)) * 100,
        "ftyp.mp4": struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0),
        "start.h264": b"\0\0\0\1" * 500,
        "ebml.mkv": b"\x1aE\xdf\xa3\x01\0\0\0\0\0\0\0",
    }


def _absurd(clips: dict[str, bytes]) -> dict[str, bytes]:
    """Headers that state sizes and rates that can not be."""
    frame = clips["raw.y4m"].split(b"FRAME", 1)[1]
    made = {}
    for name, size, rate in [
        ("size", "W60000 H60000", "30:1"),
        ("wide", "W2000000000 H2", "30:1"),
        ("nothing", "W0 H0", "30:1"),
        ("minus", "W-64 H-48", "30:1"),
        ("fast", "W64 H48", "2147483647:1"),
        ("slow", "W64 H48", "1:2147483647"),
        ("never", "W64 H48", "0:0"),
        ("endless", "W64 H48", "1:0"),
    ]:
        made[f"{name}.y4m"] = f"YUV4MPEG2 {size} F{rate} C420\nFRAME".encode() + frame
    gif = bytearray(clips["palette.gif"])
    gif[6:10] = b"\xff\xff\xff\xff"
    made["size.gif"] = bytes(gif)
    ivf = bytearray(clips["vp8.ivf"])
    ivf[12:16] = b"\xff\xff\xff\xff"
    made["size.ivf"] = bytes(ivf)
    ivf[12:24] = struct.pack("<HHII", 64, 48, 0xFFFFFFFF, 1)
    made["fast.ivf"] = bytes(ivf)
    avi = bytearray(clips["mjpeg.avi"])
    at = avi.index(b"strf") + 12  # the bitmap header's width and height
    avi[at : at + 8] = struct.pack("<ii", 2**30, 2**30)
    made["size.avi"] = bytes(avi)
    avi[at : at + 8] = struct.pack("<ii", 64, -(2**31))
    made["minus.avi"] = bytes(avi)
    avi = bytearray(clips["mjpeg.avi"])
    at = avi.index(b"strh") + 28  # its scale and rate
    avi[at : at + 8] = struct.pack("<II", 1, 0xFFFFFFFF)
    made["fast.avi"] = bytes(avi)
    avi[at : at + 8] = struct.pack("<II", 0, 0)
    made["never.avi"] = bytes(avi)
    jpeg = clips["mjpeg.avi"]
    at = jpeg.index(b"\xff\xc0") + 5  # every picture's own height and width
    made["jpeg.avi"] = jpeg.replace(jpeg[at : at + 4], b"\xff\xdc\xff\xdc")
    mp4 = bytearray(clips["h264.mp4"])
    at = mp4.index(b"avc1") + 28
    mp4[at : at + 4] = b"\xff\xff\xff\xff"
    made["size.mp4"] = bytes(mp4)
    mp4 = bytearray(clips["h264.mp4"])
    at = mp4.index(b"mdhd") + 16
    mp4[at : at + 4] = struct.pack(">I", 0xFFFFFFFF)
    made["fast.mp4"] = bytes(mp4)
    return made


def _large(folder: Path) -> dict[str, bytes]:
    """Whole frames of a hundred megapixels, small as files."""
    size = (10_000, 10_000)
    return {
        "100mp.mp4": encode(folder / "x.mp4", "libx264", "yuv420p", {}, size, 1),
        "100mp.avi": encode(folder / "x.avi", "mjpeg", "yuvj420p", {}, size, 1),
    }


def make_videos(folder: Path, seed: int = 0) -> list[Path]:
    """Write the 320 into ``folder``, which must exist; their paths, in order of name."""
    clips = {
        name: encode(folder / name, codec, pixels, options)
        for name, (codec, pixels, options) in CLIPS.items()
    }
    boxed = {name: data for name, data in clips.items() if name.endswith((".mp4", ".mov"))}
    jobs = [
        *_seeded("flips", 80, clips, flip_bits),
        *_seeded("headflips", 48, clips, lambda data, dice: flip_bits(data, dice, 0, 1000)),
        *_seeded("cut", 45, clips, cut),
        *_seeded("header", 32, clips, wreck_header),
        *_seeded("shuffled", 25, clips, shuffle),
        *_seeded("joined", 20, clips, join),
        *_seeded("box", 40, boxed, patch_box),
    ]
    written = {name: change(random.Random(f"{seed} {name}")) for name, change in jobs}
    for kind, made in (("zero", _empty()), ("absurd", _absurd(clips)), ("large", _large(folder))):
        written |= {f"{kind}-{number:03d}-{name}": made[name] for number, name in enumerate(made)}
    for name, data in written.items():
        (folder / name).write_bytes(data)
    return sorted(folder / name for name in written)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    print(len(make_videos(given.folder, given.seed)), "videos")  # noqa: T201
