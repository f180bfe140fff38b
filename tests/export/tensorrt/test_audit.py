"""What the engine inspector's JSON says of precision.

The JSON here was written by hand, after NVIDIA's documentation of TensorRT 10 and 11 and its
samples: no GPU was at hand to record it.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from knet_export.tensorrt.audit import check_delivered, count, read_layers
from knet_runtime.errors import EngineError


def tensor(name: str, kind: str, key: str = "Format/Datatype") -> dict[str, Any]:
    return {"Name": name, "Location": "Device", "Dimensions": [1, 64, 16, 16], key: kind}


def layer(name: str, kind: str, node: str, tactic: str, ins: Any, outs: Any) -> dict[str, Any]:
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": ins,
        "Outputs": outs,
        "TacticName": tactic,
        "Metadata": f"[ONNX Layer: {node}]",
    }


TEN = json.dumps(
    {
        "Layers": [
            layer(
                "backbone.conv1/Conv",
                "CaskConvolution",
                "backbone.conv1/Conv]\x1e[ONNX Layer: backbone.relu/Relu",
                "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x64x64",
                [tensor("x", "Channel major FP16 format where channel % 8 == 0")],
                [tensor("y", "Channel major FP16 format where channel % 8 == 0")],
            ),
            layer(
                "stages.0.fc/MatMul",
                "gemm",
                "stages.0.fc/MatMul",
                "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize32x32x8_simt_aligna4",
                [tensor("k", "Row major linear FP32")],
                [tensor("l", "Row major linear FP32")],
            ),
            layer(
                "Reformatting CopyNode for Input Tensor 0",
                "Reformat",
                "none",
                "0x0000000000000000",
                [tensor("image", "Row major linear UInt8 format")],
                [tensor("image'", "Row major linear FP32")],
            ),
        ],
        "Bindings": ["image", "logits"],
    }
)
ELEVEN = json.dumps(
    {
        "Layers": [
            layer(
                "__myl_MulAddCast_myl0_3",
                "kgen",
                "stages.0.norm/Mul",
                "__myl_MulAddCast_0x3d7a",
                [tensor("a", "Half", "Datatype")],
                [tensor("b", "Half", "Datatype")],
            ),
            layer(
                "backbone.conv2/Conv_myl0_4",
                "conv",
                "backbone.conv2/Conv",
                "sm89_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32",
                [tensor("c", "Int8", "Datatype")],
                [tensor("d", "Int8", "Datatype")],
            ),
            layer(
                "__myl_Soft_myl0_5",
                "kgen",
                "softmax",
                "",
                [tensor("e", "BFloat16", "DataType"), tensor("i", "Int32", "DataType")],
                [tensor("f", "BFloat16", "DataType")],
            ),
        ],
        "I/O Tensors": [{"Name": "image", "DataType": "UInt8", "ProfileInfo": []}],
    }
)


def test_layers_of_tensorrt_10() -> None:
    layers = read_layers(TEN)
    assert [found.precision for found in layers] == ["fp16", "fp32", "fp32"]
    assert layers[0].nodes == ("backbone.conv1/Conv", "backbone.relu/Relu")
    assert count(layers)["CaskConvolution fp16"] == 1


def test_layers_of_tensorrt_11() -> None:
    layers = read_layers(ELEVEN)
    assert [found.precision for found in layers] == ["undecided", "int8", "bf16"]
    assert count(layers) == {"conv int8": 1, "kgen bf16": 1, "kgen undecided": 1}


@pytest.mark.parametrize(
    ("tactic", "precision"),
    [
        ("ampere_scudnn_128x64_relu_small_nn_v1", "fp32"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "bf16"),
        ("sm80_xmma_fprop_implicit_gemm_tf32f32_f32f32_nhwckrsc_nhwc", "tf32"),
        ("turing_h1688cudnn_256x64_ldg8_relu_exp_interior_nhwc_tn_v1", "fp16"),
        ("sm89_xmma_gemm_e4m3e4m3_e4m3f32_f32_tn_n_tilesize64x64x64", "fp8"),
    ],
)
def test_kernels_are_named_after_their_arithmetic(tactic: str, precision: str) -> None:
    fp32 = [tensor("x", "Float", "Datatype")]
    text = json.dumps({"Layers": [layer("gemm", "gemm", "n", tactic, fp32, fp32)]})
    assert read_layers(text)[0].precision == precision


def test_what_was_asked_for_passes() -> None:
    check_delivered(read_layers(TEN), {"backbone.conv1/Conv": "fp16", "stages.0.fc/MatMul": "fp32"})
    check_delivered(
        read_layers(ELEVEN), {"backbone.conv2/Conv": "int8", "stages.0.norm/Mul": "fp32"}
    )


def test_another_precision_than_the_graph_has_is_an_error_that_names_the_node() -> None:
    with pytest.raises(EngineError, match=r"stages\.0\.fc/MatMul \(fp16\) runs in fp32"):
        check_delivered(read_layers(TEN), {"stages.0.fc/MatMul": "fp16"})


def test_quantised_graph_without_an_int8_layer_is_an_error() -> None:
    with pytest.raises(EngineError, match="no layer of the plan runs in int8"):
        check_delivered(read_layers(TEN), {"backbone.conv1/Conv": "int8"})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"Layers": ["a", "b"]}', "names only"),
        ('{"Layers": []}', "names only"),
        ("{}", "another form"),
        ("no JSON", "another form"),
    ],
)
def test_an_answer_without_details_is_refused(text: str, told: str) -> None:
    with pytest.raises(EngineError, match=told):
        read_layers(text)
