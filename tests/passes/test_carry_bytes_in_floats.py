"""`carry-bytes-in-floats`: each kind of operator, and what the builder says."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder_says import Builder, profile_of
from graphs import rewrite, run, seeded_inputs, text
from onnx import numpy_helper

from optc.passes.carry_bytes_in_floats import CarryBytesInFloats
from optc.passes.graph import export_model, import_model
from optc.passes.make_zero_points_zero import MakeZeroPointsZero
from optc.passes.pipeline import optimise
from optc.passes.remove_casts_of_whole_numbers import RemoveCastsOfWholeNumbers
from optc.passes.remove_identities import RemoveIdentities

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
PASS = CarryBytesInFloats()

MOVES = {
    "reshape": (
        "g (uint8[N,4] x) => (uint8[N,2,2] y) <int64[3] s = {0, 2, 2}> { y = Reshape (x, s) }"
    ),
    "transpose": "g (uint8[N,4] x) => (uint8[4,N] y) { y = Transpose (x) }",
    "pool": """
        g (uint8[N,2,4,4] x) => (uint8[N,2,2,2] y)
        { y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x) }""",
    "concat": """
        g (uint8[N,2] x) => (uint8[N,3] y) <uint8[2,1] c = {7, 255}, int64[2] s = {0, 1}, uint8 o = {0},
        int64[1] i = {0}>
        { d = Gather <axis = 1> (x, i)  y = Concat <axis = 1> (x, d) }""",
    "maximum with a constant": """
        g (uint8[N,2] x) => (uint8[N,2] y) <uint8[2] c = {2, 255}> { y = Max (x, c) }""",
    "pad": """
        g (uint8[N,2] x) => (uint8[N,4] y) <int64[4] p = {0, 1, 0, 1}, uint8 c = {9}>
        { y = Pad (x, p, c) }""",
    "choice": """
        g (bool[N,2] c, uint8[N,2] x, uint8[N,2] z) => (uint8[N,2] y) { y = Where (c, x, z) }""",
    "split": """
        g (uint8[N,4] x) => (uint8[N,1] y, uint8[N,3] z) <int64[2] s = {1, 3}>
        { y, z = Split <axis = 1> (x, s) }""",
}


@pytest.mark.parametrize("name", MOVES)
def test_bytes_are_moved_as_floats(name: str, tensorrt: Builder) -> None:
    before, after, report = rewrite(HEAD + MOVES[name], PASS)
    assert report.rewritten
    inputs = {
        key: value if value.dtype == bool else (value * 85).astype(np.uint8)
        for key, value in seeded_inputs(before, dynamic=3).items()
    }
    for key, value in run(before, inputs).items():
        found = run(after, inputs)[key]
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)

    graph = import_model(after)
    optimise(graph, [RemoveCastsOfWholeNumbers(), RemoveIdentities()])
    legal = export_model(graph)
    profiles = (profile_of(before),)
    assert tensorrt.refusal(before, profiles=profiles)
    assert tensorrt.refusal(legal, profiles=profiles) == ""


def test_between_quantise_and_dequantise_no_integer_is_left(tensorrt: Builder) -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[N,2,4,4] x) => (float[N,2,2,2] y) <float s = {0.01}, uint8 z = {3}>
        {
            q = QuantizeLinear (x, s, z)
            m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (q)
            y = DequantizeLinear (m, s, z)
        }""",
        PASS,
    )
    graph = import_model(after)
    optimise(graph, [MakeZeroPointsZero(), RemoveCastsOfWholeNumbers(), RemoveIdentities()])
    legal = export_model(graph)
    onnx.checker.check_model(legal)
    assert [node.op_type for node in legal.graph.node] == [
        *("Div", "Round", "Add", "Clip", "MaxPool", "Sub", "Mul")
    ]
    inputs = seeded_inputs(before, dynamic=3)
    np.testing.assert_array_equal(run(legal, inputs)["y"], run(before, inputs)["y"])
    assert tensorrt.refusal(legal, profiles=(profile_of(before),)) == ""


def test_a_large_table_of_bytes_leaves_no_cast() -> None:
    model = onnx.parser.parse_model(
        HEAD
        + """
        g (int64[N] i) => (float[N,256] y) <float s = {0.01}, uint8 z = {3}>
        { q = Gather (w, i)  y = DequantizeLinear (q, s, z) }"""
    )
    table = np.random.default_rng(0).integers(0, 256, (500, 256), np.uint8)
    model.graph.initializer.append(numpy_helper.from_array(table, "w"))
    graph = import_model(model)
    optimise(graph, [PASS, MakeZeroPointsZero(), RemoveCastsOfWholeNumbers(), RemoveIdentities()])
    legal = export_model(graph)
    assert [node.op_type for node in legal.graph.node] == ["Gather", "Sub", "Mul"]
    inputs = {"i": np.array([0, 499, 7])}
    np.testing.assert_array_equal(run(legal, inputs)["y"], run(model, inputs)["y"])


@pytest.mark.parametrize("dtype", ["int8", "int64", "float"])
def test_other_types_are_left_alone(dtype: str) -> None:
    _, after, report = rewrite(
        HEAD + f"g ({dtype}[N,4] x) => ({dtype}[4,N] y) {{ y = Transpose (x) }}", PASS
    )
    assert not report.rewritten
    assert "Cast" not in text(after)
