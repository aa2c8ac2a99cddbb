"""Shapes, types and FLOPs of com.microsoft's operators: held against what ONNX Runtime returns."""

from __future__ import annotations

import onnx
import pytest
from graphs import run, seeded_inputs

from optc.passes.flops import flops
from optc.passes.graph import import_model
from optc.passes.shape import infer
from optc.specs.compile_spec import Range

HEAD = '<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>'
GRID = "float s, uint8 z"
BYTES = f"uint8[N,4,6,6] a, uint8[1,4,6,1] b, {GRID}"

OPERATORS = {
    "Gelu": ("float[N,5] x", "y = ms.Gelu (x)", 5),
    "BiasGelu": ("float[N,5] x, float[5] b", "y = ms.BiasGelu (x, b)", 5),
    "FastGelu": ("float[N,5] x", "y = ms.FastGelu (x)", 5),
    "QuickGelu": ("float[N,5] x", "y = ms.QuickGelu (x)", 5),
    "SkipLayerNormalization": (
        "float[N,3,8] x, float[8] w",
        "y, , , k = ms.SkipLayerNormalization (x, x, w)",
        48,
    ),
    "SkipSimplifiedLayerNormalization": (
        "float[N,3,8] x, float[8] w",
        "y, , , k = ms.SkipSimplifiedLayerNormalization (x, x, w)",
        48,
    ),
    "EmbedLayerNormalization": (
        "int32[N,4] i, float[9,8] w, float[6,8] p, float[8] g",
        "y, k = ms.EmbedLayerNormalization (i, , w, p, , g, g)",
        33,
    ),
    "FusedConv": (
        "float[N,3,8,8] x, float[4,3,3,3] w",
        'y = ms.FusedConv <activation = "Relu", strides = [2, 2]> (x, w)',
        2 * 4 * 9 * 27,
    ),
    "FusedGemm": (
        "float[5,N] x, float[5,4] w",
        'y = ms.FusedGemm <activation = "Relu", transA = 1> (x, w)',
        2 * 4 * 5,
    ),
    "FusedMatMul": (
        "float[N,5,7] x, float[4,5] w",
        "y = ms.FusedMatMul <transA = 1, transB = 1> (x, w)",
        2 * 7 * 4 * 5,
    ),
    "Attention": (
        "float[N,6,8] x, float[8,24] w, float[24] b",
        "y = ms.Attention <num_heads = 2> (x, w, b)",
        2 * 6 * 8 * 24 + 2 * 6 * 6 * 16,
    ),
    "Attention of other values": (
        "float[N,6,8] x, float[8,20] w, float[20] b",
        "y = ms.Attention <num_heads = 2, qkv_hidden_sizes = [8, 8, 4]> (x, w, b)",
        2 * 6 * 8 * 20 + 2 * 6 * 6 * 12,
    ),
    "MultiHeadAttention": (
        "float[N,3,8] q, float[N,5,8] k, float[N,5,4] v",
        "y = ms.MultiHeadAttention <num_heads = 2> (q, k, v)",
        2 * 3 * 5 * 12,
    ),
    "DynamicQuantizeMatMul": (
        "float[N,5] x, uint8[5,4] w, float s",
        "y = ms.DynamicQuantizeMatMul (x, w, s)",
        2 * 4 * 5,
    ),
    "MatMulIntegerToFloat": (
        "uint8[N,5] x, uint8[5,4] w, float s",
        "y = ms.MatMulIntegerToFloat (x, w, s, s)",
        2 * 4 * 5,
    ),
    "QGemm": (
        f"uint8[N,5] x, uint8[4,5] w, {GRID}",
        "y = ms.QGemm <transB = 1> (x, s, z, w, s, z, , s, z)",
        2 * 4 * 5,
    ),
    "QGemm to floats": (
        f"uint8[N,5] x, uint8[5,4] w, {GRID}",
        "y = ms.QGemm (x, s, z, w, s, z)",
        2 * 4 * 5,
    ),
    "QLinearAdd": (BYTES, "y = ms.QLinearAdd (a, s, z, b, s, z, s, z)", 144),
    "QLinearMul": (BYTES, "y = ms.QLinearMul (b, s, z, a, s, z, s, z)", 144),
    "QLinearSigmoid": (BYTES, "y = ms.QLinearSigmoid (a, s, z, s, z)", 144),
    "QLinearLeakyRelu": (BYTES, "y = ms.QLinearLeakyRelu (a, s, z, s, z)", 144),
    "QLinearSoftmax": (BYTES, "y = ms.QLinearSoftmax <opset = 13> (a, s, z, s, z)", 144),
    "QLinearConcat": (BYTES, "y = ms.QLinearConcat <axis = 1> (s, z, a, s, z, a, s, z)", 288),
    "QLinearWhere": (
        f"bool[4,1,1] c, {BYTES}",
        "y = ms.QLinearWhere (c, a, s, z, b, s, z, s, z)",
        144,
    ),
    "QLinearAveragePool": (
        BYTES,
        "y = ms.QLinearAveragePool <kernel_shape = [3, 3], strides = [2, 2]> (a, s, z, s, z)",
        16,
    ),
    "QLinearGlobalAveragePool": (BYTES, "y = ms.QLinearGlobalAveragePool (a, s, z, s, z)", 4),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_inferred_is_what_comes_out(name: str) -> None:
    inputs, node, work = OPERATORS[name]
    outputs = "float[?] y, float[?] k" if ", k = " in node else "float[?] y"
    text = f"g ({inputs}) => ({outputs}) {{ [n] {node} }}".replace("ms.", "com.microsoft.")
    model = onnx.parser.parse_model(HEAD + text)
    for output in model.graph.output:
        output.ClearField("type")
    graph = import_model(model)
    shapes = infer(graph, opset=graph.opset)
    sizes = {"N": Range.fixed(3)}
    for tensor, array in run(model, seeded_inputs(model, dynamic=3)).items():
        dims = shapes.dims(tensor)
        assert dims is not None
        assert tuple(shapes.bound_at_opt(dim, sizes) for dim in dims) == array.shape
        assert shapes.dtype(tensor) == array.dtype
    assert flops(graph, shapes, {"N": Range.fixed(1)}) == {"n": work}


def test_channels_last_are_not_taken_for_first() -> None:
    model = onnx.parser.parse_model(
        HEAD
        + f"""g ({BYTES}) => (uint8[N,h,w,c] y)
          {{ y = com.microsoft.QLinearGlobalAveragePool <channels_last = 1> (a, s, z, s, z) }}"""
    )
    graph = import_model(model)
    dims = infer(graph, opset=graph.opset).dims("y")
    assert dims is not None
    assert list(map(str, dims)) == ["N", "h", "w", "c"]


def test_a_mean_is_over_the_axes_it_names() -> None:  # for which ONNX Runtime has no kernel
    model = onnx.parser.parse_model(
        HEAD
        + f"""g ({BYTES}) => (y, k)
          {{
            y = com.microsoft.QLinearReduceMean <axes = [-1, 1], keepdims = 0> (a, s, z, s, z)
            k = com.microsoft.QLinearReduceMean <axes = [1]> (a, s, z, s, z)
          }}"""
    )
    graph = import_model(model)
    shapes = infer(graph, opset=graph.opset)
    assert list(map(str, shapes.dims("y") or ())) == ["N", "6"]
    assert list(map(str, shapes.dims("k") or ())) == ["N", "1", "6", "6"]
