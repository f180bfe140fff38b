"""Small videos of every awkward kind, a pool in this process, and what a single run gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import msgspec
import numpy as np
import pytest

from knet_runtime.batch.records import Job, Outcome, Settings
from knet_runtime.batch.worker import ChunkWorker
from knet_runtime.bundle.store import Bundle
from knet_runtime.errors import SourceError
from knet_runtime.segmenter import Segmenter
from knet_runtime.sinks import JsonLines, MaskFolder
from knet_runtime.sources import open_source

X264 = {"preset": "veryfast", "threads": "1"}
KINDS: dict[str, tuple[str, dict[str, str], int]] = {
    # name: encoder, its options, frames between key frames
    "plain.mp4": ("libx264", {**X264, "bf": "0"}, 10),
    "b-frames.mp4": ("libx264", {**X264, "bf": "3", "b-pyramid": "normal"}, 10),
    "b-frames.mkv": ("libx264", {**X264, "bf": "3"}, 10),
    "b-frames.ts": ("libx264", {**X264, "bf": "3"}, 10),
    "open-gop.mp4": ("libx264", {**X264, "bf": "3", "x264-params": "open-gop=1"}, 10),
    "open-gop.ts": ("libx264", {**X264, "bf": "3", "x264-params": "open-gop=1"}, 10),
    "open-gop-hevc.mp4": (
        "libx265",
        {"preset": "ultrafast", "x265-params": "open-gop=1:bframes=3:log-level=none:pools=none"},
        10,
    ),
    "refresh.mp4": ("libx264", {**X264, "bf": "0", "x264-params": "intra-refresh=1"}, 10),
    "refresh.ts": ("libx264", {**X264, "bf": "0", "x264-params": "intra-refresh=1"}, 10),
    "vfr.mp4": ("libx264", {**X264, "bf": "2"}, 10),
    "vfr.mkv": ("libx264", {**X264, "bf": "2"}, 10),
    "late.mp4": ("libx264", {**X264, "bf": "2"}, 10),
    "interlaced.mp4": ("libx264", {**X264, "flags": "+ildct+ilme", "bf": "2"}, 10),
    "parts.mp4": ("libx264", {**X264, "bf": "0"}, 10),
    "all-keys.avi": ("mjpeg", {}, 1),
    "no-index.h264": ("libx264", {**X264, "bf": "2"}, 10),
    "one-key.mp4": ("libx264", {**X264, "bf": "2"}, 1000),
    "b-frames.avi": ("libx264", {**X264, "bf": "2"}, 10),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "threads": "1"}, 10),
}


def write_video(path: Path, frames: int = 60) -> Path:
    """One of ``KINDS``: coloured noise that moves, 48 × 72 pixels, 20 frames per second."""
    encoder, options, group = KINDS[path.name]
    vfr, late = path.name.startswith("vfr"), path.name.startswith("late")
    noise = np.random.default_rng(1).integers(0, 256, (6, 9, 3)).astype(np.uint8)
    muxer = {"movflags": "frag_keyframe+empty_moov"} if path.name == "parts.mp4" else {}
    with av.open(str(path), "w", options=muxer) as container:
        stream = container.add_stream(encoder, rate=20, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.codec_context.gop_size = 48, 72, group
        stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if path.suffix == ".avi":
            stream.codec_context.time_base = Fraction(1, 20)
        step = 1 if path.suffix == ".avi" else 50
        for index in range(frames):
            picture = np.roll(noise, index, axis=1).repeat(8, 0).repeat(8, 1)
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            jitter = index * index % 17 if vfr else 0
            frame.pts = index * step + jitter + (1700 if late else 0)
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The path of one of ``KINDS``, written once."""
    folder = tmp_path_factory.mktemp("videos")

    def get(name: str) -> Path:
        path = folder / name
        return path if path.exists() else write_video(path)

    return get


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test's memory, away from the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def settings(make_bundle: Callable[..., Bundle]) -> Settings:
    """The colour model on the processor."""
    return Settings(str(make_bundle().path), "onnxruntime-cpu")


class HerePool:
    """Does jobs in this process, and keeps what it did."""

    def __init__(self, settings: Settings, model: str) -> None:
        self.worker = ChunkWorker(settings, model)
        self.done: list[Job] = []

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        for job in jobs:
            self.done.append(job)
            yield self.worker(job)

    @property
    def chunks(self) -> list[str]:
        """The names of the chunks that were asked for, in order."""
        return [job.chunk.name for job in self.done if job.chunk is not None]


@pytest.fixture
def pool(settings: Settings) -> HerePool:
    with Segmenter(settings.bundle, settings.engine) as segmenter:
        return HerePool(settings, segmenter.model_id)


@pytest.fixture
def single(settings: Settings, tmp_path: Path) -> Callable[[Path], dict[str, bytes]]:
    """The files that one run of a video writes, by name."""

    def run(path: Path) -> dict[str, bytes]:
        folder = tmp_path / "single" / path.name
        with Segmenter(settings.bundle, settings.engine) as segmenter, open_source(path) as source:
            sinks = [
                JsonLines(folder / "frames.jsonl", segmenter.model_id),
                MaskFolder(folder / "masks"),
            ]
            complete = True
            try:
                for frame in source:
                    mask = segmenter(frame.image)
                    for sink in sinks:
                        sink.write(frame, mask)
            except SourceError:
                complete = False
            for sink in sinks:
                sink.close(complete=complete)  # type: ignore[arg-type]
        return files(folder)

    return run


@pytest.fixture
def written() -> Callable[[Path], dict[str, bytes]]:
    return files


def files(folder: Path) -> dict[str, bytes]:
    """All files of a folder by name, lines of JSON without their times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "finished.json":
            data = path.read_bytes()
            if path.suffix == ".jsonl":
                records = [msgspec.json.decode(line) for line in data.splitlines()]
                for record in records:
                    del record["timings_ms"]
                data = b"\n".join(msgspec.json.encode(record) for record in records)
            found[path.relative_to(folder).as_posix()] = data
    return found
