"""A quantised graph: what is int8 in it, what it computes, and how far it may go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from knet_export.graph.check import open_session
from knet_export.int8.calibrate import CalibrationSet, measure_ranges, open_calibration
from knet_export.int8.quantise import matching, multiply_adds, quantisable, quantise, save
from knet_export.int8.search import Calibrator, quantise_within
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
NOWHERE = Path()  # of external data: there is none
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
def network() -> onnx.ModelProto:
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
    (logits,) = open_session(model, NOWHERE).run(None, {"image": images})
    bias = numpy_helper.from_array(-logits.mean((0, 2, 3)), "classifier.bias")
    model.graph.initializer[-1].CopyFrom(bias)
    onnx.checker.check_model(model, full_check=True)
    return model


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
def data(
    network: onnx.ModelProto, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Streets labelled with what the float network sees in them, so that its mIoU is 100 %."""
    root = tmp_path_factory.mktemp("data")
    session = open_session(network, NOWHERE)
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
def pictures(data: Path, manifest: Manifest) -> CalibrationSet:
    return open_calibration(data, manifest.labels)


def everything(network: onnx.ModelProto, pictures: CalibrationSet) -> onnx.ModelProto:
    """All that can be int8, by minmax."""
    nodes = quantisable(network, multiply_adds(network, "image", SIZE))
    return quantise(network, NOWHERE, nodes, minmax(network, pictures))


def minmax(network: onnx.ModelProto, pictures: CalibrationSet) -> dict[str, float]:
    nodes = quantisable(network, multiply_adds(network, "image", SIZE))
    histograms = measure_ranges(
        network,
        NOWHERE,
        list(dict.fromkeys(node.activation for node in nodes)),
        [pictures.read(index) for index in range(4)],
        InputSpec(name="image", height=SIZE[0], width=SIZE[1]),
    )
    return {name: histogram.threshold("minmax") for name, histogram in histograms.items()}


def test_what_works_on_pixels_can_be_int8_and_the_kernels_can_not(
    network: onnx.ModelProto,
) -> None:
    macs = multiply_adds(network, "image", SIZE)
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
    network: onnx.ModelProto, pictures: CalibrationSet
) -> None:
    quantised = everything(network, pictures)
    onnx.checker.check_model(quantised, full_check=True)
    constants = {t.name: numpy_helper.to_array(t) for t in quantised.graph.initializer}
    for node in quantised.graph.node:
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
    for tensor in network.graph.initializer:
        if tensor.name.endswith(".bias") or tensor.name.startswith("stages."):
            np.testing.assert_array_equal(constants[tensor.name], numpy_helper.to_array(tensor))


def test_it_computes_what_onnxruntimes_own_quantiser_does(
    network: onnx.ModelProto, pictures: CalibrationSet, tmp_path: Path
) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    class Reader:
        def __init__(self) -> None:
            self.images = iter([pictures.read(index)[0] for index in range(4)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"image": image[None]}

    onnx.save(network, tmp_path / "float.onnx")
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
    nodes = quantisable(network, multiply_adds(network, "image", SIZE))
    convolutions = [node for node in nodes if node.op == "Conv"]
    ours = quantise(network, NOWHERE, convolutions, minmax(network, pictures))
    image = pictures.read(9)[0][None]
    reference = open_session(onnx.load(tmp_path / "int8.onnx"), NOWHERE).run(None, {"image": image})
    found = open_session(ours, NOWHERE).run(None, {"image": image})
    plain = open_session(network, NOWHERE).run(None, {"image": image})
    # Scales are rounded in another order; quantisation itself moves the logits far more.
    moved = np.abs(plain[0] - reference[0]).max()
    assert np.abs(found[0] - reference[0]).mean() < 0.02 * moved


def test_external_weights_are_read_and_written(
    network: onnx.ModelProto, pictures: CalibrationSet, tmp_path: Path
) -> None:
    (tmp_path / "fp32").mkdir()
    copy = onnx.ModelProto.FromString(network.SerializeToString())
    onnx.save(
        copy,
        tmp_path / "fp32" / "logits.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=256,
    )
    graph = onnx.load(tmp_path / "fp32" / "logits.onnx", load_external_data=False)
    nodes = quantisable(graph, multiply_adds(graph, "image", SIZE))
    ranges = minmax(network, pictures)
    quantised = quantise(graph, tmp_path / "fp32", nodes, ranges)
    image = {"image": pictures.read(0)[0][None]}
    inside = open_session(everything(network, pictures), NOWHERE).run(None, image)
    before = open_session(quantised, tmp_path / "fp32").run(None, image)
    save(quantised, tmp_path / "fp32", tmp_path / "int8.onnx", "int8.bin")
    after = ort.InferenceSession(tmp_path / "int8.onnx").run(None, image)
    np.testing.assert_array_equal(inside[0], before[0])
    np.testing.assert_array_equal(inside[0], after[0])


def test_patterns_match_names_blocks_weights_and_operators(network: onnx.ModelProto) -> None:
    nodes = quantisable(network, multiply_adds(network, "image", SIZE))
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
    network: onnx.ModelProto, pictures: CalibrationSet, bad: float
) -> None:
    nodes = quantisable(network, multiply_adds(network, "image", SIZE))
    ranges = {**minmax(network, pictures), "head/Relu": bad}
    with pytest.raises(CheckpointError, match="range of head/Relu"):
        quantise(network, NOWHERE, nodes, ranges)


def test_a_network_that_overflows_is_named_while_ranges_are_measured(
    network: onnx.ModelProto, pictures: CalibrationSet
) -> None:
    broken = onnx.ModelProto.FromString(network.SerializeToString())
    for tensor in broken.graph.initializer:
        if tensor.name == "backbone.blocks.0.conv_dw.weight":
            values = np.full_like(numpy_helper.to_array(tensor), np.inf)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(CheckpointError, match=r"backbone\.blocks\.0\.conv_dw/Conv can not"):
        minmax(broken, pictures)


def test_the_sweep_keeps_the_block_that_suffers_and_nothing_else(
    network: onnx.ModelProto, manifest: Manifest, pictures: CalibrationSet
) -> None:
    steps: list[str] = []
    _, record = quantise_within(
        network, NOWHERE, manifest, pictures, TOLERANCE, calibrator="minmax", on_step=steps.append
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


def test_the_same_pictures_give_the_same_graph(
    network: onnx.ModelProto, manifest: Manifest, pictures: CalibrationSet
) -> None:
    one, other = (
        quantise_within(network, NOWHERE, manifest, pictures, TOLERANCE, calibrator="entropy")
        for _ in range(2)
    )
    assert one[0].SerializeToString(deterministic=True) == other[0].SerializeToString(
        deterministic=True
    )
    assert one[1] == other[1]


@pytest.mark.parametrize(("calibrator", "tried"), [("minmax", 1), ("percentile", 3), ("auto", 5)])
def test_every_method_is_measured_and_the_nearest_taken(
    network: onnx.ModelProto,
    manifest: Manifest,
    pictures: CalibrationSet,
    calibrator: Calibrator,
    tried: int,
) -> None:
    _, record = quantise_within(
        network,
        NOWHERE,
        manifest,
        pictures,
        TOLERANCE,
        calibrator=calibrator,
        keep_fp32=["head.fuse.0"],
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
    network: onnx.ModelProto, manifest: Manifest, data: Path
) -> None:
    bare = open_calibration(data / "images" / "train", manifest.labels)
    _, record = quantise_within(network, NOWHERE, manifest, bare, TOLERANCE, calibrator="minmax")
    assert record.score.delta_miou is None
    assert record.kept_blocks == ("head.fuse.0",)


def test_a_tolerance_out_of_reach_is_said(
    network: onnx.ModelProto, manifest: Manifest, pictures: CalibrationSet
) -> None:
    strict = Tolerance(
        delta_miou=1e-9, worst_class_delta_iou=1e-9, agreement=1.0, max_logit_diff=1e-9
    )
    with pytest.raises(ParityError, match=r"int8 is not near enough: .* single block .* agreement"):
        quantise_within(network, NOWHERE, manifest, pictures, strict, calibrator="minmax")


def test_what_is_kept_in_fp16_computes_in_fp16(
    network: onnx.ModelProto, manifest: Manifest, pictures: CalibrationSet
) -> None:
    graph, record = quantise_within(
        network,
        NOWHERE,
        manifest,
        pictures,
        TOLERANCE,
        calibrator="minmax",
        keep_fp16=["head.fuse.0", "classifier*"],
    )
    assert record.fp16_nodes == ("head.fuse.0/Conv", "classifier/MatMul")
    assert record.kept_nodes == ()
    assert record.kept_blocks == (), "fp16 holds what int8 could not"
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        if node.name in record.fp16_nodes:
            held = [types[name] for name in node.input if name in types]
            assert set(held) == {TensorProto.FLOAT16}
            assert len(held) == (2 if node.op_type == "Conv" else 1)
    image = pictures.read(0)[0][None]
    (expected,), (found,) = (
        open_session(one, NOWHERE).run(None, {"image": image}) for one in (network, graph)
    )
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).mean() < 0.02 * np.abs(expected).max()


def test_a_weight_beyond_fp16_is_named(
    network: onnx.ModelProto, manifest: Manifest, pictures: CalibrationSet
) -> None:
    large = onnx.ModelProto()
    large.CopyFrom(network)
    for tensor in large.graph.initializer:
        if tensor.name == "head.fuse.0.weight":
            values = numpy_helper.to_array(tensor).copy()
            values[3] = 1e6
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(CheckpointError, match=r"head\.fuse\.0\.weight holds 1e\+06, and fp16 ends"):
        quantise_within(large, NOWHERE, manifest, pictures, TOLERANCE, keep_fp16=["head.fuse.0"])


def test_patterns_that_leave_nothing_are_refused(
    network: onnx.ModelProto, manifest: Manifest, pictures: CalibrationSet
) -> None:
    with pytest.raises(ConfigError, match="nothing is left to be int8"):
        quantise_within(network, NOWHERE, manifest, pictures, TOLERANCE, keep_fp32=["*"])
