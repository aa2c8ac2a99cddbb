"""`expand-dynamic-quantisation`: integers equal to ONNX Runtime's, and what the builder says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builder_says import Builder, profile_of
from graphs import rewrite, run, seeded_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import ModelProto, numpy_helper

from optc.passes.contract import Pass
from optc.passes.expand_dynamic_quantisation import ExpandDynamicQuantisation
from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import optimise
from optc.passes.remove_casts_of_whole_numbers import RemoveCastsOfWholeNumbers
from optc.passes.remove_identities import RemoveIdentities

HEAD = '<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>'
PASS = ExpandDynamicQuantisation()


def numbers(seed: int, *shape: int, low: int = -127, high: int = 128) -> str:
    """Return seeded integers as the text of a constant."""
    count = int(np.prod(shape))
    return ", ".join(map(str, np.random.default_rng(seed).integers(low, high, count)))


def assert_equal(before: ModelProto, after: ModelProto, inputs: dict[str, Any]) -> None:
    expected, found = run(before, inputs), run(after, inputs)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)


QUANTISE = (
    HEAD
    + """
    g (float[N,M] x) => (uint8[N,M] q, float s, uint8 z) { q, s, z = DynamicQuantizeLinear (x) }"""
)


@settings(max_examples=100, deadline=None)
@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 5)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
        | st.sampled_from([0.0, -0.0, 0.5, 1.5, 2.5, 254.5, 127.5, -127.5, 255.0]),
    )
)
def test_what_is_quantised_are_the_integers_of_onnxruntime(x: Any) -> None:
    assert_equal(QUANTISED[0], QUANTISED[1], {"x": x})


QUANTISED = rewrite(QUANTISE, PASS)[:2]

CHAIN = """
g (float[N,5,16] x) => (float[N,5,3] y)
<int8[16,3] w = {%s}, int8 wz = {%d}, float ws = {0.02}>
{
    [quantise] q, s, z = DynamicQuantizeLinear (x)
    [product] i = MatMulInteger (q, w, z, wz)
    [back] f = Cast <to = 1> (i)
    [scales] t = Mul (s, ws)
    [scale] y = Mul (f, t)
}"""


@pytest.mark.parametrize("zero_point", [0, 5])
def test_a_linear_layer_runs_in_floats_alone(zero_point: int, tensorrt: Builder) -> None:
    before, after, report = rewrite(HEAD + CHAIN % (numbers(0, 16, 3), zero_point), PASS)
    assert report.removed == {"back": "what it would cast is computed in floats"}
    after = optimised(after, RemoveCastsOfWholeNumbers(), RemoveIdentities())
    assert "Cast" not in {node.op_type for node in after.graph.node}
    assert_equal(before, after, seeded_inputs(before, dynamic=3))

    profiles = (profile_of(before),)
    assert "checkDynamicQuantizeLinear" in tensorrt.refusal(before, profiles=profiles)
    assert tensorrt.refusal(after, profiles=profiles) == ""


def optimised(model: ModelProto, *passes: Pass) -> ModelProto:
    graph = import_model(model)
    optimise(graph, passes)
    after = export_model(graph)
    onnx.checker.check_model(after)
    return after


PRODUCTS = {
    "plain": "g (uint8[N,4] x) => (int32[N,3] y) <int8[4,3] w = {W}> { y = MatMulInteger (x, w) }",
    "int8": "g (int8[N,4] x) => (int32[N,3] y) <uint8[4,3] w = {U}> { y = MatMulInteger (x, w) }",
    "zero points": """
        g (uint8[2,N,4] x, uint8 z) => (int32[2,N,3] y) <int8[4,3] w = {W}, int8[3] v = {1,-2,3}>
        { y = MatMulInteger (x, w, z, v) }""",
    "constant zero points": """
        g (uint8[N,4] x) => (int32[N,3] y) <int8[4,3] w = {W}, uint8 z = {7}, int8 v = {-5}>
        { y = MatMulInteger (x, w, z, v) }""",
    "no constants": """
        g (uint8[N,4] x, uint8[4,3] w) => (int32[N,3] y) <uint8 z = {128}>
        { y = MatMulInteger (x, w, z, z) }""",
    "conv": """
        g (uint8[N,2,5,5] x, uint8 z) => (int32[N,3,3,3] y) <uint8[3,2,3,3] w = {C}, uint8 v = {9}>
        { y = ConvInteger <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w, z, v) }""",
    "conv in groups": """
        g (uint8[N,2,5,5] x) => (int32[N,2,3,3] y) <uint8[2,1,3,3] w = {G}>
        { y = ConvInteger <group = 2> (x, w) }""",
}


def source(name: str) -> str:
    text = HEAD + PRODUCTS[name]
    for key, shape, low in (
        ("{W}", (4, 3), -127),
        ("{U}", (4, 3), 0),
        ("{C}", (3, 2, 3, 3), 0),
        ("{G}", (2, 1, 3, 3), 0),
    ):
        text = text.replace(key, "{" + numbers(1, *shape, low=low) + "}")
    return text


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_integers_are_the_same(name: str, tensorrt: Builder) -> None:
    before, after, _ = rewrite(source(name), PASS)
    rng = np.random.default_rng(0)
    inputs = {
        key: rng.integers(0, 128 if value.dtype == np.int8 else 256, value.shape).astype(
            value.dtype
        )
        for key, value in seeded_inputs(before, dynamic=3).items()
    }
    assert_equal(before, after, inputs)

    profiles = (profile_of(before),)
    assert "false" in tensorrt.refusal(before, profiles=profiles)
    assert tensorrt.refusal(after, profiles=profiles) == ""


def wide(inner: int) -> ModelProto:
    """Return a product over ``inner`` places whose sums are as large as they can be."""
    model = onnx.parser.parse_model(
        HEAD
        + f"""
        g (uint8[N,{inner}] x) => (float[N,2] y)
        {{ i = MatMulInteger (x, w)  f = Cast <to = 1> (i)  y = Neg (f) }}"""
    )
    weights = np.full((inner, 2), 127, np.int8)
    weights[:, 1] = -127
    model.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    return model


@pytest.mark.parametrize(("inner", "parts"), [(518, 1), (519, 2), (3000, 6)])
def test_sums_that_float32_cannot_hold_are_split(inner: int, parts: int) -> None:
    before = wide(inner)
    graph = import_model(before)
    report = optimise(graph, [PASS]).records[0]
    after = export_model(graph)
    ops = [node.op_type for node in after.graph.node]
    assert ops.count("MatMul") == parts
    assert (report.removed == {}) == (parts > 1)
    assert_equal(before, after, {"x": np.full((2, inner), 255, np.uint8)})


def test_what_would_take_too_many_parts_stays() -> None:
    graph = import_model(wide(5000))
    report = optimise(graph, [PASS]).records[0]
    assert report.skipped == {
        "MatMulInteger_0": "its sums may reach 2**24, beyond which float32 is not exact"
    }
    assert not report.rewritten
    assert [node.name for node in graph.inputs[0].outputs] == ["MatMulInteger_0"]


REFUSALS = {
    "its sums may reach 2**24, beyond which float32 is not exact": (
        "g (uint8[N,259] x, uint8[259,2] w) => (int32[N,2] y) { [n] y = MatMulInteger (x, w) }"
    ),
    "there are several zero points, computed at run time": (
        "g (uint8[2,4] x, uint8[4,2] w, uint8[2] z) => (int32[2,2] y)"
        "{ [n] y = MatMulInteger (x, w, z) }"
    ),
    "the weights have one axis, or are empty": (
        "g (uint8[N,2] x) => (int32[N] y) <int8[2] w = {1, 2}> { [n] y = MatMulInteger (x, w) }"
    ),
    "the weights are computed at run time, or are empty": (
        "g (uint8[1,1,2,2] x, uint8[1,1,1,1] w) => (int32[1,1,2,2] y){ [n] y = ConvInteger (x, w) }"
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_is_not_exact_stays_and_says_why(reason: str) -> None:
    _, _, report = rewrite(HEAD + REFUSALS[reason], PASS)
    assert report.skipped == {"n": reason}
    assert not report.rewritten


def test_a_cast_to_half_precision_or_to_an_output_keeps_the_integers() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (uint8[N,2] x) => (float16[N,1] y, float[N,1] f) <int8[2,1] w = {1, 2}>
        { i = MatMulInteger (x, w)  y = Cast <to = 10> (i)  f = Cast <to = 1> (i) }""",
        PASS,
    )
    assert report.removed == {}
    assert_equal(before, after, seeded_inputs(before))


FUSED = {
    "MatMulIntegerToFloat": """
        g (uint8[N,4] x, float s, uint8 z) => (float[N,3] y)
        <int8[4,3] w = {W}, float[3] t = {0.1, 0.2, 0.3}, int8[3] v = {1,-2,3}, float[3] b = {1, 2, 3}>
        { y = com.microsoft.MatMulIntegerToFloat (x, w, s, t, z, v, b) }""",
    "DynamicQuantizeMatMul": """
        g (float[N,4] x) => (float[N,3] y)
        <int8[4,3] w = {W}, float t = {0.1}, int8 v = {-2}, float[3] b = {1, 2, 3}>
        { y = com.microsoft.DynamicQuantizeMatMul (x, w, t, v, b) }""",
}


@pytest.mark.parametrize("op", FUSED)
def test_the_operators_of_onnxruntime_round_alike(op: str, tensorrt: Builder) -> None:
    text = HEAD + FUSED[op].replace("{W}", "{" + numbers(1, 4, 3) + "}")
    before, after, _ = rewrite(text, PASS)
    inputs = seeded_inputs(before, dynamic=3)
    expected, found = run(before, inputs)["y"], run(after, inputs)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    after = optimised(after, RemoveCastsOfWholeNumbers(), RemoveIdentities())
    profiles = (profile_of(after),)
    assert "Plugin not found" in tensorrt.refusal(before, profiles=profiles)
    assert tensorrt.refusal(after, profiles=profiles) == ""
