"""Real builds with TensorRT-RTX, which needs no GPU for them: the graphs of random networks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from knet_deploy.cli.main import main
from knet_export.fuse.model import fuse_for
from knet_export.fuse.precision import to_precision
from knet_export.graph.classmap import add_classmap_head
from knet_export.graph.cost import node_costs
from knet_export.graph.onnx_graph import OnnxGraph
from knet_export.graph.to_onnx import CLASSMAP_NAME, LOGITS_NAME, WEIGHTS_NAME, export_onnx
from knet_export.int8.quantise import quantisable, quantise
from knet_export.spec import bundle_graphs
from knet_export.tensorrt.build import _Network, build_plan, parser_reason
from knet_export.tensorrt.profile import profile_of
from knet_runtime.bundle.manifest import (
    InputSpec,
    Kind,
    Licence,
    Manifest,
    OutputSpec,
    Precision,
    Provenance,
    SizeRange,
)
from knet_runtime.bundle.store import Bundle, open_bundle, write_bundle
from knet_runtime.engines.hardware import Gpu, this_gpu
from knet_runtime.engines.plan_store import BuildOptions, find_plan, read_record
from knet_runtime.engines.tensorrt import load_tensorrt, new_log
from knet_runtime.errors import ConfigError, EngineError, EngineUnavailable
from knet_runtime.labels import LabelMap, distinct_palette
from knet_train.config import load_config
from knet_train.models.build import build_model

pytestmark = pytest.mark.tensorrt

SIDE = 64
MakeBundle = Callable[..., Bundle]


@pytest.fixture(scope="module", autouse=True)
def rtx_version() -> str:
    try:
        return str(load_tensorrt("tensorrt-rtx").__version__)
    except EngineUnavailable as error:
        pytest.skip(str(error))


def manifest_of(spec: InputSpec, stride: int, classes: int, precision: Precision) -> Manifest:
    names = tuple(f"class {number}" for number in range(classes))
    return Manifest(
        name="random",
        input=spec,
        labels=LabelMap(names, distinct_palette(classes), 255),
        graphs=bundle_graphs(precision, classes, stride),
        provenance=Provenance("0" * 64, "random", {}),
        licence=Licence("Apache-2.0", "CC0-1.0", "CC0-1.0"),
    )


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """A bundle of a preset with random weights; int8 with ranges that nobody measured."""
    made: dict[str, Bundle] = {}

    def build(
        preset: str, precision: Precision, max_batch: int = 4, sizes: SizeRange | None = None
    ) -> Bundle:
        name = f"{preset}-{precision}-{max_batch}-{'free' if sizes else 'fixed'}"
        if name in made:
            return made[name]
        config = load_config(preset)
        classes = 11 if preset == "knet-edge" else 150
        stride = config.model.stride
        spec = InputSpec("image", SIDE, SIDE, max_batch=max_batch, multiple=stride, sizes=sizes)
        output = OutputSpec("logits", "semantic_logits", (classes,), stride)
        folder = tmp_path_factory.mktemp(name)
        work = folder / "work"
        work.mkdir()
        if precision == "int8":
            source = build(preset, "fp32", max_batch, sizes).path
            quantise_graph(source, work)
        else:
            torch.manual_seed(0)
            model = build_model(config.model, classes).eval()
            fused = to_precision(fuse_for(model, spec, output, precision), precision)
            export_onnx(fused, spec, (output,), work)
        add_classmap_head(work / LOGITS_NAME, work / CLASSMAP_NAME, output)
        files: dict[str, bytes | Path] = {
            file: work / file for file in (LOGITS_NAME, CLASSMAP_NAME, WEIGHTS_NAME)
        }
        manifest = manifest_of(spec, stride, classes, precision)
        made[name] = write_bundle(folder / "random.knet", manifest, files)
        shutil.rmtree(work)
        return made[name]

    return build


def quantise_graph(source: Path, work: Path) -> None:
    graph = OnnxGraph.load(source / LOGITS_NAME)
    costs = node_costs(graph, (SIDE, SIDE))
    nodes = quantisable(graph, {name: cost.multiply_adds for name, cost in costs})
    assert len(nodes) > 20
    ranges = {node.activation: 4.0 for node in nodes}
    quantise(graph, nodes, ranges).save(work / LOGITS_NAME, WEIGHTS_NAME)


def built(bundle: Bundle, kind: Kind, tmp_path: Path, max: str | None = None) -> None:
    """Build in a copy of the bundle, and look at what was kept."""
    copy = open_bundle(shutil.copytree(bundle.path, tmp_path / "copy.knet"))
    profile = profile_of(copy.manifest.input, max=max)
    stored, fresh = build_plan(copy, "tensorrt-rtx", kind, BuildOptions(profile), targets=["sm86"])
    assert fresh
    plan = stored.read()
    assert plan[:4] == b"vtrt"
    major, minor = plan[24:26]
    assert stored.record.version.startswith(f"{major}.{minor}.")
    assert read_record(stored.path) == stored.record
    assert stored.record.targets == ("sm86",)
    assert stored.record.layers is None, "nobody looked into it: there was no GPU"
    shutil.rmtree(copy.path)


def test_edge_in_fp32_and_int8(make: MakeBundle, tmp_path: Path) -> None:
    built(make("knet-edge", "fp32"), "classmap", tmp_path)
    quantised = make("knet-edge", "int8")
    built(quantised, "classmap", tmp_path)
    module = load_tensorrt("tensorrt-rtx")
    graph = _Network(module, new_log(module), quantised.file(LOGITS_NAME)).precisions()
    assert graph["backbone.conv_stem/Conv"] == "int8"
    assert "fp32" in graph.values(), "what works on the kernels stays float"


def test_edge_of_free_size_in_fp16(make: MakeBundle, tmp_path: Path) -> None:
    sizes = SizeRange((64, 64), (128, 256), 32)
    bundle = make("knet-edge", "fp16", sizes=sizes)
    built(bundle, "classmap", tmp_path)
    built(bundle, "logits", tmp_path, max="2x128x128")


def test_r50_fcn_with_a_static_batch(make: MakeBundle, tmp_path: Path) -> None:
    built(make("r50-fcn", "fp16", max_batch=1), "classmap", tmp_path)


@pytest.mark.parametrize("preset", ["r50-upernet", "swin-t-upernet"])
def test_upernets_in_fp16(make: MakeBundle, preset: str, tmp_path: Path) -> None:
    built(make(preset, "fp16"), "classmap", tmp_path)


@pytest.fixture
def edge(make: MakeBundle, tmp_path: Path) -> Bundle:
    """A copy of its own of knet-edge in fp32."""
    return open_bundle(shutil.copytree(make("knet-edge", "fp32").path, tmp_path / "edge.knet"))


def test_build_by_its_command(
    edge: Bundle, capsys: pytest.CaptureFixture[str], rtx_version: str
) -> None:
    words = ["build", str(edge.path), "--engine", "tensorrt-rtx", "--target", "sm89,sm86"]
    words += ["--precision", "fp32", "--max", "2", "--graph", "logits"]
    assert main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "sm86, sm89" in said
    assert "1x64x64 to 2x64x64" in said
    (plan,) = (edge.path / "engines").glob("*.plan")
    written = plan.stat().st_mtime_ns
    assert main(words) == 0
    assert "was there already" in capsys.readouterr().out
    assert plan.stat().st_mtime_ns == written

    def find(sm: str, version: str = rtx_version) -> Path:
        gpu = Gpu("some RTX", sm, "CUDA 13.0")
        return find_plan(edge, "tensorrt-rtx", "logits", version, gpu).path

    assert find("sm86") == plan
    with pytest.raises(EngineUnavailable, match="was built for sm86, sm89, this GPU is sm120"):
        find("sm120")
    with pytest.raises(EngineUnavailable, match=r"was built by tensorrt-rtx .*, this is 2\.0\.0"):
        find("sm86", "2.0.0")
    broken = bytearray(plan.read_bytes())
    broken[len(broken) // 2] ^= 1
    plan.write_bytes(broken)
    assert main(words) == 0
    assert "was there already" not in capsys.readouterr().out, "a damaged plan is built again"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--precision", "int8"], "bundle of fp32"),
        (["--max", "5"], "batches of 1 to 4"),
        (["--max", "2x128x128"], "for 64x64 only"),
        (["--target", "sm87"], "this release builds for sm75, sm80"),
        (["--engine", "openvino"], "'openvino' is not one of 'tensorrt', 'tensorrt-rtx'"),
        (["--engine", "tensorrt"], "--target is for TensorRT-RTX"),
        (["--graph", "masks"], "is not one of 'logits', 'classmap'"),
    ],
)
def test_build_says_in_one_line_what_is_wrong_before_any_work(
    edge: Bundle, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["build", str(edge.path), "--engine", "tensorrt-rtx", "--target", "sm86", *words]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert told in said
    assert len(said.splitlines()) == 1
    assert not (edge.path / "engines").exists()


def test_build_for_this_machine_needs_a_gpu(
    edge: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    if this_gpu() is not None:
        pytest.skip("this machine has a GPU")
    assert main(["build", str(edge.path), "--engine", "tensorrt-rtx"]) == 2
    assert "--target sm86" in capsys.readouterr().err


def test_gpu_too_old_for_the_graph_is_said_with_the_reason(edge: Bundle) -> None:
    options = BuildOptions(profile_of(edge.manifest.input))
    with pytest.raises(EngineError, match=r"FP32 GEMM is not supported.*too old"):
        build_plan(edge, "tensorrt-rtx", "logits", options, targets=["sm75"])
    assert not (edge.path / "engines").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_build_leaves_nothing(edge: Bundle, number: signal.Signals) -> None:
    """The signal arrives in the midst of TensorRT's work."""
    program = (
        "import os, sys\n"
        "from knet_deploy.cli import build\n"
        "from knet_deploy.cli.main import main\n"
        "from contextlib import contextmanager\n"
        "@contextmanager\n"
        "def track(what, total):\n"
        "    steps = iter(range(10**9))\n"
        f"    yield lambda: next(steps) == 100 and os.kill(os.getpid(), {int(number)})\n"
        "build.track = track\n"
        f"sys.exit(main(['build', {str(edge.path)!r}, '--engine', 'tensorrt-rtx', "
        "'--target', 'sm86']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == (130 if number == signal.SIGINT else 143), done.stderr
    assert "Traceback" not in done.stderr
    assert not (edge.path / "engines").exists()


def test_operation_that_the_target_lacks_is_named_with_what_to_try(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], "cast", to=TensorProto.FLOAT),
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], "ranges"),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["y"], "product"),
        helper.make_node("Cast", ["y"], ["logits"], "out", to=TensorProto.FLOAT),
    ]
    weight = numpy_helper.from_array(torch.ones(3, 4, dtype=torch.uint8).numpy(), "w")
    said = refusal_of(nodes, [weight], tmp_path)
    assert "node ranges (DynamicQuantizeLinear) cannot be built" in said
    assert "--precision int8" in said


def test_image_that_is_not_cast_first_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["image"], ["x"], "turn", perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["x"], ["logits"], "out", to=TensorProto.FLOAT),
    ]
    said = refusal_of(nodes, [], tmp_path)
    assert "node turn (Transpose) cannot be built" in said
    assert "UInt8" in said
    assert "cast the image to float" in said


def refusal_of(
    nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], tmp_path: Path
) -> str:
    """What building a bundle of these nodes is refused with."""
    graph = helper.make_graph(
        nodes,
        "refused",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", 8, 8, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", None, None, None])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    manifest = manifest_of(InputSpec("image", 8, 8, max_batch=2), 4, 4, "fp32")
    content = model.SerializeToString()
    files: dict[str, bytes | Path] = {
        LOGITS_NAME: content,
        CLASSMAP_NAME: content,
        WEIGHTS_NAME: b"",
    }
    bundle = write_bundle(tmp_path / "refused.knet", manifest, files)
    options = BuildOptions(profile_of(manifest.input))
    with pytest.raises(EngineError) as caught:
        build_plan(bundle, "tensorrt-rtx", "logits", options, targets=["sm86"])
    assert len(str(caught.value).splitlines()) == 1
    assert not (bundle.path / "engines").exists()
    return str(caught.value)


def test_parser_without_a_reason_still_names_the_file(tmp_path: Path) -> None:
    assert "x.onnx cannot be parsed" in parser_reason(tmp_path / "x.onnx", [])


def test_targets_are_for_tensorrt_rtx(edge: Bundle) -> None:
    options = BuildOptions(profile_of(edge.manifest.input))
    with pytest.raises(ConfigError, match="--engine tensorrt-rtx"):
        build_plan(edge, "tensorrt", "logits", options, targets=["sm86"])


def test_device_needs_neither_torch_nor_onnx_to_build() -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'timm'): sys.modules[name] = None\n"
        "import knet_export.tensorrt.build, knet_export.tensorrt.profile, knet_deploy.cli.build\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
