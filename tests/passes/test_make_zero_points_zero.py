"""`make-zero-points-zero`: each rule, each refusal, and what the builder says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builder_says import Builder, profile_of
from graphs import parsed, rewrite, run, seeded_inputs, text
from onnx import ModelProto

from optc.passes.graph import import_model
from optc.passes.make_zero_points_zero import MakeZeroPointsZero
from optc.passes.tensorrt_rule import why_not_its_types

HEAD = '<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>'
PASS = MakeZeroPointsZero()


def spread(model: ModelProto) -> dict[str, Any]:
    """Return inputs for ``model``: floats that hit both ends of a grid, ties and zero."""
    inputs = seeded_inputs(model, dynamic=3)
    for name, value in inputs.items():
        flat = np.asarray(np.random.default_rng(0).uniform(-200, 200, value.shape))
        if value.dtype == np.float32:
            inputs[name] = np.asarray(np.rint(flat * 2) / 2, np.float32)
        elif value.dtype.itemsize == 1:
            inputs[name] = np.rint(np.abs(flat)).astype(np.uint8).view(value.dtype)
    return inputs


def assert_equal(before: ModelProto, after: ModelProto) -> None:
    inputs = spread(before)
    expected, found = run(before, inputs), run(after, inputs)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value, err_msg=name)


PAIR = """
g (float[N,4] x) => (float[N,4] y) <float s = {0.5}, %s z = {%d}>
{
    [q] i = QuantizeLinear (x, s, z)
    [dq] y = DequantizeLinear (i, s, z)
}"""


def test_a_zero_point_of_128_becomes_int8_with_none(tensorrt: Builder) -> None:
    before, after, report = rewrite(HEAD + PAIR % ("uint8", 128), PASS)
    assert (
        text(after)
        == """\
g (float[N,4] x) => (float[N,4] y)
   <float s =  {0.5}, int8 q_zero_point =  {0}, int8 dq_zero_point =  {0}>
{
   [q] i = QuantizeLinear (x, s, q_zero_point)
   [dq] y = DequantizeLinear (i, s, dq_zero_point)
}"""
    )
    assert report.merged == {"q": ("q",), "dq": ("dq",)}
    assert_equal(before, after)
    profiles = (profile_of(before),)
    assert "Non-zero zero point" in tensorrt.refusal(before, profiles=profiles)
    assert tensorrt.refusal(after, profiles=profiles) == ""


@pytest.mark.parametrize(("dtype", "zero"), [("uint8", 0), ("uint8", 3), ("int8", -7)])
def test_any_other_pair_becomes_arithmetic(dtype: str, zero: int, tensorrt: Builder) -> None:
    before, after, report = rewrite(HEAD + PAIR % (dtype, zero), PASS)
    assert [node.op_type for node in after.graph.node] == ["Div", "Round", "Clip", "Mul"]
    assert set(report.merged.values()) == {("q", "dq")}
    assert_equal(before, after)
    profiles = (profile_of(before),)
    if (dtype, zero) == ("uint8", 0):  # TensorRT would take it, for int8
        quantise = import_model(before).nodes[0]
        assert why_not_its_types(quantise) is not None
    else:
        assert "Non-zero zero point" in tensorrt.refusal(before, profiles=profiles)
    assert tensorrt.refusal(after, profiles=profiles) == ""


def test_int8_without_a_zero_point_is_left_alone() -> None:
    _, _, report = rewrite(HEAD + PAIR % ("int8", 0), PASS)
    assert not report.rewritten
    assert report.skipped == {}


@pytest.mark.parametrize(
    ("quantise", "refused"),
    [
        ("QuantizeLinear (x, s)", True),
        ("QuantizeLinear <output_dtype = 3> (x, s)", False),
        ("QuantizeLinear (x, s, z)", False),
    ],
)
def test_only_what_makes_uint8_is_refused_by_rule(quantise: str, refused: bool) -> None:
    model = parsed(
        HEAD.replace("17", "21")
        + f"""
        g (float[N] x) => (float[N] y) <float s = {{1}}, int8 z = {{0}}>
        {{ q = {quantise}  y = Cast <to = 1> (q) }}"""
    )
    assert (why_not_its_types(import_model(model).nodes[0]) is not None) == refused


OTHERS = {
    "along an axis": """
        g (float[N,2,3] x) => (float[N,2,3] y)
        <float[2] s = {0.5, 2}, uint8[2] z = {3, 250}>
        { q = QuantizeLinear <axis = -2> (x, s, z)  y = DequantizeLinear <axis = -2> (q, s, z) }""",
    "128 along an axis": """
        g (float[N,2,3] x) => (float[N,2,3] y)
        <float[2] s = {0.5, 2}, uint8[2] z = {128, 128}>
        { q = QuantizeLinear (x, s, z)  y = DequantizeLinear (q, s, z) }""",
    "of onnxruntime": """
        g (float[N,4] x) => (float[N,4] y) <float s = {0.5}, uint8 z = {3}>
        { q = com.microsoft.QuantizeLinear (x, s, z)
          y = com.microsoft.DequantizeLinear (q, s, z) }""",
    "to an output": """
        g (float[N,4] x) => (uint8[N,4] q) <float s = {0.5}, uint8 z = {3}>
        { q = QuantizeLinear (x, s, z) }""",
    "from an input": """
        g (uint8[N,4] q) => (float[N,4] y) <float s = {0.5}, uint8 z = {128}>
        { y = DequantizeLinear (q, s, z) }""",
    "a scale computed at run time": """
        g (float[N,4] x, float s) => (float[N,4] y) <float one = {1}, uint8 z = {128}>
        { a = Abs (s)  t = Add (a, one)
          q = QuantizeLinear (x, t, z)  y = DequantizeLinear (q, t, z) }""",
    "another scale after it": """
        g (float[N,4] x) => (float[N,4] y) <float s = {0.5}, float t = {4}, uint8 z = {3}>
        { q = QuantizeLinear (x, s, z)  y = DequantizeLinear (q, t, z) }""",
    "weights of uint8": """
        g (float[N,2] x) => (float[N,2] y)
        <uint8[2,2] w = {0, 100, 128, 255}, float s = {0.5}, uint8 z = {128}>
        { d = DequantizeLinear (w, s, z)  y = MatMul (x, d) }""",
    "weights of uint8 that fit no int8": """
        g (float[N,2] x) => (float[N,2] y)
        <uint8[2,2] w = {0, 100, 128, 255}, float[2] s = {0.5, 2}, uint8[2] z = {3, 128}>
        { d = DequantizeLinear (w, s, z)  y = MatMul (x, d) }""",
    "a bias": """
        g (float[N,2] x) => (float[N,2] y) <int32[2] b = {-70000, 70000}, float s = {0.5}>
        { d = DequantizeLinear (b, s)  y = Add (x, d) }""",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_places_give_the_same_numbers(name: str, tensorrt: Builder) -> None:
    before, after, report = rewrite(HEAD + OTHERS[name], PASS)
    assert report.rewritten
    assert_equal(before, after)
    profiles = (profile_of(before),)
    assert tensorrt.refusal(before, profiles=profiles)
    assert tensorrt.refusal(after, profiles=profiles) == ""


def test_weights_that_fit_stay_integers() -> None:
    _, after, _ = rewrite(HEAD + OTHERS["weights of uint8"], PASS)
    assert "int8[2,2] DequantizeLinear_0_value =  {-128,-28,0,127}" in text(after)


def test_a_zero_point_of_128_that_is_shared_with_arithmetic_is_not_shifted() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[N,4] x) => (float[N,4] y, float[4,N] v) <float s = {0.5}, uint8 z = {128}>
        { q = QuantizeLinear (x, s, z)  y = DequantizeLinear (q, s, z)
          t = Transpose (q)  v = DequantizeLinear (t, s, z) }""",
        PASS,
    )
    assert not any("quantize" in node.op_type.lower() for node in after.graph.node)
    assert_equal(before, after)


REFUSALS = {
    "its scale is not known to be float32": """
        g (float16[N,4] x) => (float16[N,4] y) <float16 s = {1}, uint8 z = {3}>
        { [n] q = QuantizeLinear (x, s, z)  y = Cast <to = 10> (q) }""",
    "its zero point is computed at run time": """
        g (float[N,4] x, uint8 z) => (uint8[N,4] y) <float s = {0.5}>
        { [n] y = QuantizeLinear (x, s, z) }""",
    "its scale is computed at run time, and is not known to be one number": """
        g (float[N,4] x, float[4] s) => (uint8[N,4] y)
        { [n] y = QuantizeLinear (x, s) }""",
    "it quantises blocks, or says which precision it computes in": """
        g (float[4,4] x) => (uint8[4,4] y) <float[2,4] s = {1,1,1,1,1,1,1,1}>
        { [n] y = QuantizeLinear <axis = 0, block_size = 2> (x, s) }""",
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_is_not_spelt_out_stays_and_says_why(reason: str) -> None:
    _, _, report = rewrite(HEAD.replace("17", "21") + REFUSALS[reason], PASS)
    assert report.skipped == {"n": reason}
    assert not report.rewritten
