"""A quantised graph: what is int8 in it, what it computes, and how far it may go."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from knet_export.data import ImageSet, open_images
from knet_export.graph.cost import node_costs
from knet_export.graph.onnx_graph import OnnxGraph
from knet_export.int8 import Calibrator
from knet_export.int8.calibrate import measure_ranges
from knet_export.int8.quantise import Weighted, matching, quantisable, quantise, with_halves
from knet_export.int8.search import quantise_within
from knet_runtime.bundle.manifest import (
    Graph,
    InputSpec,
    Licence,
    Manifest,
    OutputSpec,
    Provenance,
    Tolerance,
)
from knet_runtime.errors import CheckpointError, ConfigError, ParityError
from knet_runtime.labels import LabelMap, distinct_palette
from knet_synthetic import Street

SIZE = (32, 48)
FRAGILE = 2000.0  # how much larger than the others one channel before head.fuse.0 is


def layer(
    graph: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
    name: str,
    source: str,
    weight: np.ndarray,
    **attributes: object,
) -> str:
    """A convolution with a bias, named as ``to_onnx`` names it; its output's name."""
    bias = np.linspace(-0.1, 0.1, weight.shape[0], dtype=np.float32)
    constants += [
        numpy_helper.from_array(weight.astype(np.float32), f"{name}.weight"),
        numpy_helper.from_array(bias, f"{name}.bias"),
    ]
    inputs = [source, f"{name}.weight", f"{name}.bias"]
    graph.append(helper.make_node("Conv", inputs, [f"{name}/Conv"], f"{name}/Conv", **attributes))
    return f"{name}/Conv"


@pytest.fixture(scope="module")
def network() -> OnnxGraph:
    """A small float network of blocks; ``head.fuse.0`` suffers from int8, the others do not: one
    channel of its input is ``FRAGILE`` times the others, and weighs as much less."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = [
        helper.make_node("Cast", ["image"], ["knet/Cast"], "knet/Cast", to=TensorProto.FLOAT),
        helper.make_node(
            "Transpose", ["knet/Cast"], ["knet/Transpose"], "knet/Transpose", perm=[0, 3, 1, 2]
        ),
        helper.make_node("Div", ["knet/Transpose", "scale"], ["knet/Div"], "knet/Div"),
    ]
    constants = [numpy_helper.from_array(np.array(64, np.float32), "scale")]
    stem = layer(
        nodes,
        constants,
        "backbone.conv_stem",
        "knet/Div",
        rng.normal(0, 0.3, (16, 3, 3, 3)),
        strides=[2, 2],
        pads=[0, 0, 1, 1],
    )
    nodes.append(helper.make_node("Relu", [stem], ["backbone/Relu"], "backbone/Relu"))
    depthwise = layer(
        nodes,
        constants,
        "backbone.blocks.0.conv_dw",
        "backbone/Relu",
        rng.normal(0, 0.4, (16, 1, 3, 3)),
        group=16,
        pads=[1, 1, 1, 1],
    )
    large = rng.normal(0, 0.3, (16, 16, 1, 1))
    large[0] *= FRAGILE
    wide = layer(nodes, constants, "backbone.blocks.0.conv_pw", depthwise, large)
    nodes.append(helper.make_node("Relu", [wide], ["head/Relu"], "head/Relu"))
    small = rng.normal(0, 0.3, (16, 16, 1, 1))
    small[:, 0] /= FRAGILE
    fused = layer(nodes, constants, "head.fuse.0", "head/Relu", small)
    nodes += [
        helper.make_node("Reshape", [fused, "flat"], ["knet/Reshape"], "knet/Reshape"),
        helper.make_node(
            "Transpose", ["knet/Reshape"], ["knet/pixels"], "knet/pixels", perm=[0, 2, 1]
        ),
        helper.make_node(
            "MatMul",
            ["knet/pixels", "classifier.weight"],
            ["classifier/MatMul"],
            "classifier/MatMul",
        ),
        helper.make_node(
            "Add", ["classifier/MatMul", "classifier.bias"], ["classifier/Add"], "classifier/Add"
        ),
        helper.make_node(
            "MatMul",
            ["classifier/Add", "stages.0.ffn.0.weight"],
            ["stages.0.ffn.0/MatMul"],
            "stages.0.ffn.0/MatMul",
        ),
        helper.make_node(
            "Transpose", ["stages.0.ffn.0/MatMul"], ["knet/back"], "knet/back", perm=[0, 2, 1]
        ),
        helper.make_node("Reshape", ["knet/back", "square"], ["logits"], "knet/logits"),
    ]
    half = (SIZE[0] // 2, SIZE[1] // 2)
    constants += [
        numpy_helper.from_array(np.array([0, 16, -1], np.int64), "flat"),
        numpy_helper.from_array(np.array([0, 8, *half], np.int64), "square"),
        numpy_helper.from_array(
            rng.normal(0, 0.5, (16, 8)).astype(np.float32), "classifier.weight"
        ),
        numpy_helper.from_array(np.eye(8, dtype=np.float32), "stages.0.ffn.0.weight"),
        numpy_helper.from_array(np.zeros(8, np.float32), "classifier.bias"),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", *SIZE, 3])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 8, *half])],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    # Every class is to win somewhere: their logits get the same mean.
    images = np.stack([Street(number, SIZE).frame(0)[0] for number in range(8)])
    graph = OnnxGraph(model, Path())  # it has no external data
    (logits,) = graph.run({"image": images}, ["logits"])
    bias = numpy_helper.from_array(-logits.mean((0, 2, 3)), "classifier.bias")
    model.graph.initializer[-1].CopyFrom(bias)
    onnx.checker.check_model(model, full_check=True)
    return graph


NAMES = tuple(f"class {number}" for number in range(8))
TOLERANCE = Tolerance(
    delta_miou=10.0, worst_class_delta_iou=100.0, agreement=0.9, max_logit_diff=1.0
)


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Manifest(
        name="small",
        input=InputSpec(name="image", height=SIZE[0], width=SIZE[1], max_batch=4),
        labels=LabelMap(NAMES, distinct_palette(8), 255),
        graphs=(
            Graph(
                path="logits.onnx",
                outputs=(OutputSpec("logits", "semantic_logits", (len(NAMES),), 2),),
                precision="int8",
                tolerance=TOLERANCE,
            ),
        ),
        provenance=Provenance("0" * 64, "small", {}),
        licence=Licence("Apache-2.0", "unstated", "unstated"),
    )


@pytest.fixture(scope="module")
def data(network: OnnxGraph, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Streets labelled with what the float network sees in them, so that its mIoU is 100 %."""
    root = tmp_path_factory.mktemp("data")
    session = network.session()
    for kind in ("images", "labels"):
        (root / kind / "train").mkdir(parents=True)
    for number in range(12):
        image = Street(number, SIZE).frame(5 * number)[0]
        (logits,) = session.run(None, {"image": image[None]})
        label = logits[0].argmax(0).astype(np.uint8).repeat(2, 0).repeat(2, 1)
        Image.fromarray(image).save(root / "images" / "train" / f"{number}.png")
        Image.fromarray(label).save(root / "labels" / "train" / f"{number}.png")
    quoted = ", ".join(f'"{name}"' for name in NAMES)
    (root / "labels.json").write_text(f'{{"class_names": [{quoted}]}}')
    return root


@pytest.fixture(scope="module")
def images(data: Path, manifest: Manifest) -> ImageSet:
    return open_images(data, "train", manifest.labels, "--calibration")


def multiply_adds(network: OnnxGraph) -> dict[str, int]:
    return {name: cost.multiply_adds for name, cost in node_costs(network, SIZE)}


def candidates(network: OnnxGraph) -> tuple[Weighted, ...]:
    return quantisable(network, multiply_adds(network))


def everything(network: OnnxGraph, images: ImageSet) -> OnnxGraph:
    """All that can be int8, by minmax."""
    return quantise(network, candidates(network), minmax(network, images))


def minmax(network: OnnxGraph, images: ImageSet) -> dict[str, float]:
    nodes = candidates(network)
    histograms = measure_ranges(
        network,
        list(dict.fromkeys(node.activation for node in nodes)),
        [images.read(index) for index in range(4)],
        InputSpec(name="image", height=SIZE[0], width=SIZE[1]),
    )
    return {name: histogram.threshold("minmax") for name, histogram in histograms.items()}


def test_what_works_on_pixels_can_be_int8_and_the_kernels_can_not(network: OnnxGraph) -> None:
    macs = multiply_adds(network)
    nodes = quantisable(network, macs)
    assert [(node.name, node.block, node.axis) for node in nodes] == [
        ("backbone.conv_stem/Conv", "backbone.conv_stem", 0),
        ("backbone.blocks.0.conv_dw/Conv", "backbone.blocks.0", 0),
        ("backbone.blocks.0.conv_pw/Conv", "backbone.blocks.0", 0),
        ("head.fuse.0/Conv", "head.fuse.0", 0),
        ("classifier/MatMul", "classifier", 1),
    ]
    pixels = SIZE[0] * SIZE[1] // 4
    assert [node.macs for node in nodes] == [
        pixels * 16 * 27,
        pixels * 16 * 9,
        pixels * 16 * 16,
        pixels * 16 * 16,
        pixels * 8 * 16,
    ]
    assert macs["stages.0.ffn.0/MatMul"] == pixels * 8 * 8


def test_weights_are_int8_per_channel_and_zero_points_zero(
    network: OnnxGraph, images: ImageSet
) -> None:
    quantised = everything(network, images)
    onnx.checker.check_model(quantised.model, full_check=True)
    constants = {name: quantised.value(t) for name, t in quantised.constants().items()}
    for node in quantised.nodes:
        if "Linear" in node.op_type:
            zero = constants[node.input[2]]
            assert zero.dtype == np.int8
            assert not zero.any()
    weight = constants["backbone.conv_stem.weight_int8"]
    assert weight.dtype == np.int8
    assert (np.abs(weight).reshape(16, -1).max(1) == 127).all()
    assert constants["backbone.conv_stem.weight_scale"].shape == (16,)
    assert constants["classifier.weight_scale"].shape == (8,)
    assert "backbone.conv_stem.weight" not in constants
    # Biases, and whatever stays float, are as they were.
    for tensor in network.constants().values():
        if tensor.name.endswith(".bias") or tensor.name.startswith("stages."):
            np.testing.assert_array_equal(constants[tensor.name], numpy_helper.to_array(tensor))


def test_it_computes_what_onnxruntimes_own_quantiser_does(
    network: OnnxGraph, images: ImageSet, tmp_path: Path
) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    class Reader:
        def __init__(self) -> None:
            self.images = iter([images.read(index)[0] for index in range(4)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"image": image[None]}

    onnx.save(network.model, tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv"],
        extra_options={
            "ActivationSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv"],
        },
    )
    nodes = candidates(network)
    convolutions = [node for node in nodes if node.op == "Conv"]
    ours = quantise(network, convolutions, minmax(network, images))
    image = images.read(9)[0][None]
    reference, found, plain = (
        graph.run({"image": image}, ["logits"])
        for graph in (OnnxGraph.load(tmp_path / "int8.onnx"), ours, network)
    )
    # Scales are rounded in another order; quantisation itself moves the logits far more.
    moved = np.abs(plain[0] - reference[0]).max()
    assert np.abs(found[0] - reference[0]).mean() < 0.02 * moved


def test_external_weights_are_read_and_written(
    network: OnnxGraph, images: ImageSet, tmp_path: Path
) -> None:
    (tmp_path / "fp32").mkdir()
    copy = network.rebuilt(network.nodes).model
    onnx.save(
        copy,
        tmp_path / "fp32" / "logits.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=256,
    )
    graph = OnnxGraph.load(tmp_path / "fp32" / "logits.onnx")
    nodes = candidates(graph)
    ranges = minmax(network, images)
    quantised = quantise(graph, nodes, ranges)
    image = {"image": images.read(0)[0][None]}
    inside = everything(network, images).run(image, ["logits"])
    before = quantised.run(image, ["logits"])
    quantised.save(tmp_path / "int8.onnx", "int8.bin")
    after = ort.InferenceSession(tmp_path / "int8.onnx").run(None, image)
    np.testing.assert_array_equal(inside[0], before[0])
    np.testing.assert_array_equal(inside[0], after[0])


def test_patterns_match_names_blocks_weights_and_operators(network: OnnxGraph) -> None:
    nodes = candidates(network)
    assert matching(nodes, ["head.*"], "--keep-fp32") == {"head.fuse.0/Conv"}
    assert matching(nodes, ["MatMul"], "--keep-fp32") == {"classifier/MatMul"}
    assert matching(nodes, ["backbone.blocks.0"], "--keep-fp32") == {
        "backbone.blocks.0.conv_dw/Conv",
        "backbone.blocks.0.conv_pw/Conv",
    }
    with pytest.raises(
        ConfigError, match=r"'heat\.\*' matches nothing .* head\.fuse\.0, classifier"
    ):
        matching(nodes, ["head.*", "heat.*"], "--keep-fp32")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_range_that_is_no_number_is_refused_by_name(
    network: OnnxGraph, images: ImageSet, bad: float
) -> None:
    nodes = candidates(network)
    ranges = {**minmax(network, images), "head/Relu": bad}
    with pytest.raises(CheckpointError, match="range of head/Relu"):
        quantise(network, nodes, ranges)


def test_a_network_that_overflows_is_named_while_ranges_are_measured(
    network: OnnxGraph, images: ImageSet
) -> None:
    broken = network.rebuilt(network.nodes)
    tensor = broken.constants()["backbone.blocks.0.conv_dw.weight"]
    values = np.full_like(broken.value(tensor), np.inf)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(CheckpointError, match=r"backbone\.blocks\.0\.conv_dw/Conv cannot"):
        minmax(broken, images)


def test_the_sweep_keeps_the_block_that_suffers_and_nothing_else(
    network: OnnxGraph, manifest: Manifest, images: ImageSet
) -> None:
    steps: list[str] = []
    _, record = quantise_within(
        network, manifest, images, TOLERANCE, calibrator="minmax", on_step=steps.append
    )
    assert not any(one.score.inside(TOLERANCE) for one in record.tried)
    assert record.blocks[0].block == "head.fuse.0"
    assert record.kept_blocks == ("head.fuse.0",)
    assert record.kept_nodes == ("head.fuse.0/Conv",)
    assert record.int8_nodes == 4
    assert 0.5 < record.int8_macs < 0.9
    assert record.score.inside(record.aim)
    assert record.aim.delta_miou == TOLERANCE.delta_miou / 2
    assert {cost.block for cost in record.blocks} == {
        "backbone.conv_stem",
        "backbone.blocks.0",
        "head.fuse.0",
        "classifier",
    }
    assert any("head.fuse.0 alone in int8" in step for step in steps)


def test_the_same_images_give_the_same_graph(
    network: OnnxGraph, manifest: Manifest, images: ImageSet
) -> None:
    one, other = (
        quantise_within(network, manifest, images, TOLERANCE, calibrator="entropy")
        for _ in range(2)
    )
    texts = [each[0].model.SerializeToString(deterministic=True) for each in (one, other)]
    assert texts[0] == texts[1]
    assert one[1] == other[1]


@pytest.mark.parametrize(("calibrator", "tried"), [("minmax", 1), ("percentile", 3), ("auto", 5)])
def test_every_method_is_measured_and_the_nearest_taken(
    network: OnnxGraph, manifest: Manifest, images: ImageSet, calibrator: Calibrator, tried: int
) -> None:
    _, record = quantise_within(
        network, manifest, images, TOLERANCE, calibrator=calibrator, keep_fp32=["head.fuse.0"]
    )
    assert len(record.tried) == tried
    chosen = [
        o.score for o in record.tried if (o.method, o.percent) == (record.method, record.percent)
    ]
    assert chosen[0].agreement >= min(one.score.agreement for one in record.tried)
    assert record.kept_blocks == ()
    assert record.kept_patterns == ("head.fuse.0",)
    assert record.kept_nodes == ("head.fuse.0/Conv",)


def test_without_labels_the_pixels_that_change_decide(
    network: OnnxGraph, manifest: Manifest, data: Path
) -> None:
    bare = open_images(data / "images" / "train", "train", manifest.labels)
    _, record = quantise_within(network, manifest, bare, TOLERANCE, calibrator="minmax")
    assert record.score.delta_miou is None
    assert record.kept_blocks == ("head.fuse.0",)


def test_a_tolerance_out_of_reach_is_said(
    network: OnnxGraph, manifest: Manifest, images: ImageSet
) -> None:
    strict = Tolerance(
        delta_miou=1e-9, worst_class_delta_iou=1e-9, agreement=1.0, max_logit_diff=1e-9
    )
    with pytest.raises(ParityError, match=r"int8 is not near enough: .* single block .* agreement"):
        quantise_within(network, manifest, images, strict, calibrator="minmax")


def test_what_is_kept_in_fp16_computes_in_fp16(
    network: OnnxGraph, manifest: Manifest, images: ImageSet
) -> None:
    graph, record = quantise_within(
        network,
        manifest,
        images,
        TOLERANCE,
        calibrator="minmax",
        keep_fp16=["head.fuse.0", "classifier*"],
    )
    assert record.fp16_nodes == ("head.fuse.0/Conv", "classifier/MatMul")
    assert record.kept_nodes == ()
    assert record.kept_blocks == (), "fp16 holds what int8 could not"
    types = {name: tensor.data_type for name, tensor in graph.constants().items()}
    for node in graph.nodes:
        if node.name in record.fp16_nodes:
            held = [types[name] for name in node.input if name in types]
            assert set(held) == {TensorProto.FLOAT16}
            assert len(held) == (2 if node.op_type == "Conv" else 1)
    image = images.read(0)[0][None]
    (expected,), (found,) = (one.run({"image": image}, ["logits"]) for one in (network, graph))
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).mean() < 0.02 * np.abs(expected).max()


def test_neighbours_in_fp16_pass_halves_on_and_compute_what_they_do_apart(
    network: OnnxGraph, images: ImageSet
) -> None:
    """``conv_dw`` gives its output to ``conv_pw`` alone, ``conv_pw`` its own to a Relu."""
    apart = []
    for node in map(deepcopy, network.nodes):
        if node.name == "backbone.blocks.0.conv_pw/Conv":
            apart.append(helper.make_node("Identity", [node.input[0]], ["between"], "between"))
            node.input[0] = "between"
        apart.append(node)
    graphs = (network, network.rebuilt(apart))
    halves = [
        with_halves(
            graph, [node for node in candidates(graph) if node.block == "backbone.blocks.0"]
        )
        for graph in graphs
    ]
    onnx.checker.check_model(halves[0].model, full_check=True)
    casts = [[node.name for node in graph.nodes if "_Cast" in node.name] for graph in halves]
    assert casts[0] == ["backbone/Relu_fp16_Cast", "backbone.blocks.0.conv_pw/Conv_Cast"]
    assert len(casts[1]) == 4
    image = {"image": images.read(0)[0][None]}
    plain, together, separate = (graph.run(image, ["logits"])[0] for graph in (network, *halves))
    np.testing.assert_array_equal(together, separate)
    assert 0 < np.abs(together - plain).max() < 0.05 * np.abs(plain).max()


def test_a_half_that_others_read_in_fp32_is_cast_for_them(
    network: OnnxGraph, images: ImageSet
) -> None:
    """The tensor between two neighbours is an output of the graph, too."""
    between = "backbone.blocks.0.conv_dw/Conv"
    shown = network.rebuilt(network.nodes)
    shown.model.graph.output.append(
        helper.make_tensor_value_info(between, TensorProto.FLOAT, ["batch", 16, None, None])
    )
    pair = [node for node in candidates(network) if node.block == "backbone.blocks.0"]
    image = {"image": images.read(0)[0][None]}
    before, after = (graph.run(image, [between])[0] for graph in (shown, with_halves(shown, pair)))
    assert after.dtype == np.float32
    np.testing.assert_allclose(after, before, atol=2e-3 * np.abs(before).max())


def test_a_weight_beyond_fp16_is_named(
    network: OnnxGraph, manifest: Manifest, images: ImageSet
) -> None:
    large = network.rebuilt(network.nodes)
    tensor = large.constants()["head.fuse.0.weight"]
    values = large.value(tensor).copy()
    values[3] = 1e6
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(CheckpointError, match=r"head\.fuse\.0\.weight holds 1e\+06, and fp16 ends"):
        quantise_within(large, manifest, images, TOLERANCE, keep_fp16=["head.fuse.0"])


def test_patterns_that_leave_nothing_are_refused(
    network: OnnxGraph, manifest: Manifest, images: ImageSet
) -> None:
    with pytest.raises(ConfigError, match="nothing is left to be int8"):
        quantise_within(network, manifest, images, TOLERANCE, keep_fp32=["*"])
