from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite, run
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.passes.fuse_hard_sigmoid import FuseHardSigmoid

HEAD = '<ir_version: 8, opset_import: ["" : 13]>'
NUMBERS = """<float zero = {0}, float one = {1}, float two = {2}, float three = {3}, float six = {6},
    float sixth = {0.16666667}, float fifth = {0.2}, float half = {0.5}>"""

FORMS = {
    "as PyTorch writes it": (
        "a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six)",
        1 / 6,
        0.5,
    ),
    "with a factor": ("a = Add(three, x) c = Clip(a, zero, six) y = Mul(sixth, c)", 1 / 6, 0.5),
    "scaled before": ("m = Mul(x, fifth) a = Add(m, half) y = Clip(a, zero, one)", 0.2, 0.5),
    "shifted down": ("a = Sub(x, one) c = Clip(a, zero, two) y = Mul(c, half)", 0.5, -0.5),
    "turned around": ("a = Sub(one, x) c = Clip(a, zero, two) y = Mul(c, half)", -0.5, 0.5),
    "without a shift": ("c = Clip(x, zero, six) y = Div(c, six)", 1 / 6, 0.0),
}


def graph(body: str, dtype: str = "float") -> str:
    return f"{HEAD} g ({dtype}[2,n] x) => ({dtype}[2,n] y) {NUMBERS} {{ {body} }}"


@pytest.mark.parametrize("name", FORMS)
def test_a_clipped_line_becomes_one_hard_sigmoid(name: str) -> None:
    body, alpha, beta = FORMS[name]
    before, after, report = rewrite(graph(body), FuseHardSigmoid())
    (node,) = after.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert (node.op_type, list(node.input)) == ("HardSigmoid", ["x"])
    assert attributes == pytest.approx({"alpha": alpha, "beta": beta}, abs=1e-7)
    (merged,) = report.merged.values()
    assert len(merged) == len(before.graph.node)
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6, dynamic=50)
    special = {"x": np.array([[np.nan, np.inf, -np.inf]] * 2, np.float32)}
    np.testing.assert_array_equal(run(after, special)["y"], run(before, special)["y"])


@given(slope=st.floats(0.01, 9), shift=st.floats(-9, 9), height=st.floats(0.01, 9))
@settings(max_examples=30, deadline=None)
def test_any_line_and_height(slope: float, shift: float, height: float) -> None:
    before, after, _ = rewrite(
        f"""{HEAD} g (float[99] x) => (float[99] y)
        <float a = {{{slope:.6f}}}, float b = {{{shift:.6f}}}, float c = {{{height:.6f}}},
         float zero = {{0.0}}>
        {{ m = Mul(x, a) s = Add(m, b) l = Clip(s, zero, c) y = Div(l, c) }}""",
        FuseHardSigmoid(),
    )
    assert [n.op_type for n in after.graph.node] == ["HardSigmoid"]
    assert_same_numbers(before, after, rtol=1e-4, atol=1e-5 * max(1.0, abs(shift) / height))


def test_bounds_are_attributes_before_opset_11() -> None:
    before, after, _ = rewrite(
        f"""<ir_version: 8, opset_import: ["" : 7]> g (float[9] x) => (float[9] y) {NUMBERS}
        {{ a = Add(x, three) c = Clip<min=0.0,max=6.0>(a) y = Div(c, six) }}""",
        FuseHardSigmoid(),
    )
    assert [n.op_type for n in after.graph.node] == ["HardSigmoid"]
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


def test_a_shared_line_stays_and_the_rest_is_fused() -> None:
    before, after, _ = rewrite(
        f"""{HEAD} g (float[2] x) => (float[2] y, float[2] z) {NUMBERS}
        {{ a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six) z = Abs(a) }}""",
        FuseHardSigmoid(),
    )
    assert sorted(n.op_type for n in after.graph.node) == ["Abs", "Add", "HardSigmoid"]
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, three) y = Clip(a, zero, six)",
        "a = Add(x, three) c = Clip(a, zero, six) y = Div(c, three)",
        "a = Add(x, three) c = Clip(a, one, six) y = Div(c, six)",
        "a = Add(x, x) c = Clip(a, zero) y = Div(c, six)",
        "y = Clip(x, zero, one)",
    ],
)
def test_what_is_no_hard_sigmoid_is_left_alone(body: str) -> None:
    _, _, report = rewrite(graph(body), FuseHardSigmoid())
    assert not report.rewritten
    assert not report.skipped


def test_a_type_without_a_kernel_is_left_alone() -> None:
    body, _, _ = FORMS["as PyTorch writes it"]
    source = graph(body, "double").replace("float ", "double ")
    _, _, report = rewrite(source, FuseHardSigmoid())
    assert not report.rewritten


def test_a_clipped_value_that_is_read_elsewhere_is_kept() -> None:
    body, _, _ = FORMS["as PyTorch writes it"]
    _, _, report = rewrite(graph(body), FuseHardSigmoid(), points=("c",))
    assert list(report.skipped.values()) == ["a value on the way has another reader"]


def test_half_precision() -> None:
    """The float16 numbers are written as the parser takes them: as bits."""
    before, after, _ = rewrite(
        f"""{HEAD} g (float16[2,9] x) => (float16[2,9] y)
        <float16 zero = {{0}}, float16 three = {{16896}}, float16 six = {{17920}},
         float16 sixth = {{12629}}>
        {{ {FORMS["with a factor"][0]} }}""",
        FuseHardSigmoid(),
    )
    assert [n.op_type for n in after.graph.node] == ["HardSigmoid"]
    assert_same_numbers(before, after, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("compute_capability", ["7.5", "8.6", "8.9"])
def test_tensorrt_takes_it(tensorrt: Builder, compute_capability: str) -> None:
    body, _, _ = FORMS["shifted down"]
    _, after, _ = rewrite(graph(body).replace("[2,n]", "[2,64]"), FuseHardSigmoid())
    assert tensorrt.refusal(after, compute_capability=compute_capability) == ""
