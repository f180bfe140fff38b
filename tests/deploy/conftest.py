"""A short video, two bundles, and the command line called in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from knet_deploy.cli.main import main
from knet_runtime.bundle.manifest import (
    Graph,
    InputSpec,
    Licence,
    Manifest,
    OutputSpec,
    Provenance,
    SizeRange,
    Tolerance,
)
from knet_runtime.bundle.store import Bundle, default_bundle_path, write_bundle
from knet_runtime.labels import LabelMap
from knet_runtime.sinks.encoder import ENCODERS, VideoWriter, working_encoder
from knet_synthetic import Street

RATE = 10


@dataclass(frozen=True)
class Answer:
    """What a command gave back."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Passed self-tests are remembered for these tests, and not in the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Call ``knet-deploy`` with these words."""

    def run(*words: str | Path) -> Answer:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def make_video(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """An MP4 of so many frames of a street, 96×128."""

    def make(frames: int) -> Path:
        path = tmp_path_factory.mktemp("video") / "drive.mp4"
        encoder = working_encoder(ENCODERS["h264"], (96, 128))
        writer = VideoWriter(path, (96, 128), Fraction(1, RATE), Fraction(RATE), encoder)
        street = Street(1, (96, 128))
        images = [street.frame(index)[0] for index in range(min(frames, 4))]
        for tick in range(frames):
            writer.write(images[tick % len(images)], tick)
        writer.close()
        return path

    return make


@pytest.fixture(scope="session")
def video(make_video: Callable[[int], Path]) -> Path:
    """An MP4 of four frames."""
    return make_video(4)


@pytest.fixture
def copied_bundle(tmp_path: Path) -> Path:
    """The packaged model, where it can be damaged."""
    return Path(shutil.copytree(default_bundle_path(), tmp_path / "copy.knet"))


@pytest.fixture
def free_bundle(tmp_path: Path) -> Bundle:
    """A bundle that says which colour prevails, of free size, with a class map graph."""

    def graph(kind: str) -> bytes:
        nodes = [
            helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node(
                "AveragePool", ["planes"], ["logits"], kernel_shape=[4, 4], strides=[4, 4]
            ),
            helper.make_node("ArgMax", ["planes"], ["best"], axis=1, keepdims=0),
            helper.make_node("Cast", ["best"], ["classmap"], to=TensorProto.UINT8),
        ]
        outputs = {
            "logits": (TensorProto.FLOAT, ["B", 3, "h", "w"]),
            "classmap": (TensorProto.UINT8, ["B", "H", "W"]),
        }
        made = helper.make_graph(
            nodes[:3] if kind == "logits" else [*nodes[:2], *nodes[3:]],
            "colours",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", "H", "W", 3])],
            [helper.make_tensor_value_info(kind, *outputs[kind])],
        )
        opsets = [helper.make_opsetid("", 18)]
        return bytes(
            helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString()
        )

    limits = Tolerance(0.02, 0.2, 0.9999, 1e-3)
    manifest = Manifest(
        name="colours",
        input=InputSpec("image", 16, 24, max_batch=2, sizes=SizeRange((8, 8), (64, 96), 8)),
        labels=LabelMap(("red", "green", "blue"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)), 255),
        graphs=(
            Graph(
                path="logits.onnx",
                outputs=(OutputSpec("logits", "semantic_logits", (3,), 4),),
                tolerance=limits,
            ),
            Graph(
                path="classmap.onnx",
                kind="classmap",
                outputs=(OutputSpec("classmap", "class_map", stride=1),),
                tolerance=limits,
            ),
        ),
        provenance=Provenance("0" * 64, "none", {}),
        licence=Licence("", "", ""),
    )
    files = {f"{kind}.onnx": graph(kind) for kind in ("logits", "classmap")}
    return write_bundle(tmp_path / "colours.knet", manifest, files)
