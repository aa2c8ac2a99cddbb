"""`expand-quantised-operators`: to one step of ONNX Runtime's result, and what the builder says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builder_says import Builder, profile_of
from graphs import rewrite, run, seeded_inputs, text
from onnx import ModelProto

from optc.passes.expand_quantised_operators import ExpandQuantisedOperators
from optc.passes.graph import export_model, import_model
from optc.passes.make_zero_points_zero import MakeZeroPointsZero
from optc.passes.pipeline import optimise

HEAD = '<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>'
PASS = ExpandQuantisedOperators()
GRIDS = "float s = {0.05}, float t = {0.02}, float r = {0.1}, uint8 z = {128}, uint8 v = {100}"
SIGNED = "float s = {0.05}, float t = {0.02}, float r = {0.1}, int8 z = {0}, int8 v = {0}"
MS = "com.microsoft"


def constant(name: str, dtype: str, *shape: int, low: int = -100) -> str:
    count = int(np.prod(shape))
    drawn = np.random.default_rng(len(name)).integers(low, low + 200, count)
    numbers = ", ".join(map(str, drawn))
    return f"{dtype}[{','.join(map(str, shape))}] {name} = {{{numbers}}}"


OPERATORS = {
    "conv": (
        "uint8[N,2,5,5] x",
        "uint8[N,3,5,5] y",
        [constant("w", "uint8", 3, 2, 3, 3, low=20), constant("b", "int32", 3)],
        "QLinearConv <pads = [1, 1, 1, 1]> (x, s, z, w, t, v, r, z, b)",
    ),
    "conv with a scale for each channel": (
        "int8[N,2,5,5] x",
        "int8[N,2,3,3] y",
        [
            constant("w", "int8", 2, 1, 3, 3),
            "float[2] ws = {0.01, 0.02}, int8[2] wz = {0, 0}",
            constant("b", "int32", 2),
        ],
        "QLinearConv <group = 2> (x, s, z, w, ws, wz, r, z, b)",
    ),
    "conv, channels last": (
        "uint8[N,5,5,2] x",
        "uint8[N,3,3,3] y",
        [constant("w", "uint8", 3, 2, 3, 3, low=20)],
        f"{MS}.QLinearConv <channels_last = 1> (x, s, z, w, t, v, r, z)",
    ),
    "product": (
        "uint8[N,4] x",
        "uint8[N,3] y",
        [constant("w", "uint8", 4, 3, low=20)],
        "QLinearMatMul (x, s, z, w, t, v, r, z)",
    ),
    "product with a scale for each column": (
        "int8[2,N,4] x",
        "int8[2,N,3] y",
        [constant("w", "int8", 4, 3), "float[3] ws = {0.01, 0.02, 0.03}, int8[3] wz = {0, 0, 0}"],
        "QLinearMatMul (x, s, z, w, ws, wz, r, z)",
    ),
    "linear": (
        "uint8[N,4] x",
        "uint8[N,3] y",
        [constant("w", "uint8", 3, 4, low=20), constant("b", "int32", 3)],
        f"{MS}.QGemm <transB = 1, alpha = 0.5> (x, s, z, w, t, v, b, r, z)",
    ),
    "linear to floats": (
        "uint8[N,4] x",
        "float[N,3] y",
        [constant("w", "uint8", 4, 3, low=20)],
        f"{MS}.QGemm (x, s, z, w, t, v)",
    ),
    "sum": (
        "uint8[N,4] x, uint8[4] a",
        "uint8[N,4] y",
        [],
        f"{MS}.QLinearAdd (x, s, z, a, t, v, r, z)",
    ),
    "elementwise product": (
        "int8[N,4] x, int8[N,4] a",
        "int8[N,4] y",
        [],
        f"{MS}.QLinearMul (x, s, z, a, t, v, r, z)",
    ),
    "sigmoid": ("uint8[N,4] x", "uint8[N,4] y", [], f"{MS}.QLinearSigmoid (x, s, z, t, v)"),
    "leaky": (
        "uint8[N,4] x",
        "uint8[N,4] y",
        [],
        f"{MS}.QLinearLeakyRelu <alpha = 0.2> (x, s, z, r, v)",
    ),
    "softmax": (
        "uint8[N,4] x",
        "uint8[N,4] y",
        [],
        f"{MS}.QLinearSoftmax <axis = 1, opset = 13> (x, s, z, t, v)",
    ),
    "average": (
        "uint8[N,2,4,4] x",
        "uint8[N,2,2,2] y",
        [],
        f"{MS}.QLinearAveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x, s, z, r, v)",
    ),
    "global average": (
        "uint8[N,2,4,4] x",
        "uint8[N,2,1,1] y",
        [],
        f"{MS}.QLinearGlobalAveragePool <channels_last = 0> (x, s, z, t, v)",
    ),
    "global average, channels last": (
        "uint8[N,4,4,2] x",
        "uint8[N,1,1,2] y",
        [],
        f"{MS}.QLinearGlobalAveragePool <channels_last = 1> (x, s, z, t, v)",
    ),
    "concat": (
        "uint8[N,4] x, uint8[N,2] a",
        "uint8[N,6] y",
        [],
        f"{MS}.QLinearConcat <axis = 1> (r, z, x, s, z, a, t, v)",
    ),
    "where": (
        "bool[N,4] c, uint8[N,4] x, uint8[N,4] a",
        "uint8[N,4] y",
        [],
        f"{MS}.QLinearWhere (c, x, s, z, a, t, v, r, z)",
    ),
}


def source(name: str) -> str:
    inputs, output, constants, call = OPERATORS[name]
    grids = SIGNED if "int8" in inputs.replace("uint8", "") else GRIDS
    listed = ", ".join([grids, *constants])
    return HEAD + f"g ({inputs}) => ({output}) <{listed}> {{ [n] y = {call} }}"


def drawn(model: ModelProto) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    inputs = seeded_inputs(model, dynamic=3)
    for name, value in inputs.items():
        if value.dtype.itemsize == 1 and value.dtype.kind in "iu":
            info = np.iinfo(value.dtype)
            inputs[name] = rng.integers(info.min, int(info.max) + 1, value.shape, value.dtype)
    return inputs


def assert_within_a_step(before: ModelProto, after: ModelProto) -> None:
    inputs = drawn(before)
    expected, found = run(before, inputs)["y"], run(after, inputs)["y"]
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if expected.dtype == np.float32:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        return
    steps = np.abs(found.astype(int) - expected.astype(int))
    assert len(np.unique(expected)) > 2
    assert steps.max() <= 1
    assert np.mean(steps) <= 0.1


@pytest.mark.parametrize("name", OPERATORS)
def test_it_is_what_onnxruntime_computes_to_a_step(name: str, tensorrt: Builder) -> None:
    before, after, report = rewrite(source(name), PASS)
    assert report.skipped == {}
    assert set(report.merged.values()) == {("n",)}
    assert_within_a_step(before, after)

    graph = import_model(after)
    optimise(graph, [MakeZeroPointsZero()])
    legal = export_model(graph)
    onnx.checker.check_model(legal)
    assert_within_a_step(before, legal)
    profiles = (profile_of(before),)
    assert tensorrt.refusal(before, profiles=profiles)
    assert tensorrt.refusal(legal, profiles=profiles) == ""


def test_a_product_of_int8_stays_one_of_integers() -> None:
    _, after, _ = rewrite(
        HEAD
        + f"""
        g (int8[N,2] x) => (int8[N,1] y) <int8[2,1] w = {{1, 2}}, {SIGNED}>
        {{ [n] y = QLinearMatMul (x, s, z, w, t, v, r, z) }}""",
        PASS,
    )
    assert [node.op_type for node in after.graph.node] == [
        "DequantizeLinear",
        "DequantizeLinear",
        "MatMul",
        "QuantizeLinear",
    ]
    assert "n_dequantizelinear_1_out = DequantizeLinear <axis: int = 1> (w, t, v)" in text(after)


REFUSALS = {
    "it has a scale for each row": f"""
        g (int8[2,2] x) => (int8[2,1] y)
        <int8[2,1] w = {{1, 2}}, float[2] q = {{1, 2}}, int8[2] o = {{0, 0}}, {SIGNED}>
        {{ [n] y = QLinearMatMul (x, q, o, w, t, v, r, z) }}""",
    "it is of before opset 13, over more than the last axis": f"""
        g (uint8[2,2,2] x) => (uint8[2,2,2] y) <{GRIDS}>
        {{ [n] y = {MS}.QLinearSoftmax <axis = 1, opset = 11> (x, s, z, r, v) }}""",
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_is_not_spelt_out_stays_and_says_why(reason: str) -> None:
    _, _, report = rewrite(HEAD + REFUSALS[reason], PASS)
    assert report.skipped == {"n": reason}
    assert not report.rewritten
