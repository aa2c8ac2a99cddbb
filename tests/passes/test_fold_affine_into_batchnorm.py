"""`fold-affine-into-batchnorm`: behind it, before it, beside another one, and what is left alone."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import assert_same_numbers, rewrite, text
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.passes.fold_affine_into_batchnorm import FoldAffineIntoBatchnorm

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
STATISTICS = """float[2] gamma = {2, 3}, float[2] beta = {5, 7}, float[2] mean = {1, 2},
                float[2] var = {0.75, 0.75}"""  # with epsilon 0.25 the spread is 1


def norm(x: str, y: str, name: str = "norm") -> str:
    return f"[{name}] {y} = BatchNormalization <epsilon = 0.25> ({x}, gamma, beta, mean, var)"


def test_a_mul_and_an_add_behind_it_go_into_scale_and_shift() -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,2,H,W] x) => (float[N,2,H,W] y)
        <{STATISTICS}, float[2,1,1] s = {{3, 5}}, float[1,2,1,1] t = {{1, 2}}>
        {{ {norm("x", "n")} [mul] m = Mul (n, s) [add] y = Add (t, m) }}""",
        FoldAffineIntoBatchnorm(),
    )
    assert (
        text(after)
        == """\
g (float[N,2,H,W] x) => (float[N,2,H,W] y)
   <float[2] "norm.scale_1" =  {6,15}, float[2] "norm.bias_1" =  {16,37}, float[2] mean =  {1,2}, \
float[2] var =  {0.75,0.75}>
{
   [norm] y = BatchNormalization <epsilon: float = 0.25> (x, "norm.scale_1", "norm.bias_1", mean, var)
}"""
    )
    assert report.merged == {"norm": ("norm", "mul", "add")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "scale", "shift"),
    [
        ("m = Mul (x, s)", "6,15", "9,31"),
        ("m = Div (x, s)", "0.6666667,0.6", "3.6666667,2.2"),
        ("m = Add (x, s)", "2,3", "11,22"),
        ("m = Sub (s, x)", "-2,-3", "7,10"),
        ("m = Neg (x)", "-2,-3", "1,-5"),
    ],
)
def test_what_comes_before_it_too(nodes: str, scale: str, shift: str) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,2] x) => (float[N,2] y) <{STATISTICS}, float[2] s = {{3, 5}}>
        {{ [node] {nodes} {norm("m", "y")} }}""",
        FoldAffineIntoBatchnorm(),
    )
    assert f'"norm.scale" =  {{{scale}}}, float[2] "norm.bias" =  {{{shift}}}' in text(after)
    assert report.merged == {"norm": ("norm", "node")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_of_three_in_a_row_one_is_left_and_shared_constants_are_not_touched() -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,2,L] x) => (float[N,2,L] y, float[N,2,L] z) <{STATISTICS}>
        {{
            {norm("x", "a", "first")} {norm("a", "b", "second")} {norm("b", "y", "third")}
            r = Relu (x) {norm("r", "z", "other")}
        }}""",
        FoldAffineIntoBatchnorm(),
    )
    assert [str(node.op_type) for node in after.graph.node].count("BatchNormalization") == 2
    assert "float[2] gamma =  {2,3}" in text(after)
    assert [sorted(names) for names in report.merged.values()] == [["first", "second", "third"]]
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


REFUSALS = [
    (
        "mul",
        "the BatchNormalization output has another reader",
        "float[N,2,3] y, float[N,2,3] n",
        norm("x", "n") + " [mul] y = Mul (n, s)",
    ),
    (
        "mul",
        "the Mul output has another reader",
        "float[N,2,3] y, float[N,2,3] m",
        "[mul] m = Mul (x, s) " + norm("m", "y"),
    ),
    (
        "mul",
        "the constant has shape [3]: it is not one number per channel",
        "float[N,2,3] y",
        norm("x", "n") + " [mul] y = Mul (n, wide)",
    ),
    (
        "mul",
        "the channels that the Mul reads are not known",
        "float[N,2,3] y",
        "[mul] m = Mul (one, both) " + norm("m", "y"),
    ),
    (
        "mul",
        "the statistics of the BatchNormalization are computed at run time",
        "float[N,2,3] y",
        "n = BatchNormalization (x, v, beta, mean, var) [mul] y = Mul (n, s)",
    ),
]


@pytest.mark.parametrize(("name", "reason", "outputs", "nodes"), REFUSALS)
def test_what_would_change_a_result_is_left_alone_with_the_reason(
    name: str, reason: str, outputs: str, nodes: str
) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,2,3] x, float[N,1,3] one, float[2] v) => ({outputs})
        <{STATISTICS}, float s = {{3}}, float[3] wide = {{1, 2, 3}}, float[2,1] both = {{1, 2}}>
        {{ {nodes} }}""",
        FoldAffineIntoBatchnorm(),
    )
    assert [node.op_type for node in after.graph.node] == [n.op_type for n in before.graph.node]
    assert report.rewritten == 0
    assert report.skipped == {name: reason}


def test_float16_constants_that_would_overflow_are_left_alone() -> None:
    large, one = 0x7BFF, 0x3C00  # as bits: 65504 and 1
    _, _, report = rewrite(
        HEAD
        + f"""
        g (float16[N,1] x) => (float16[N,1] y)
        <float16[1] s = {{{large}}}, float16[1] b = {{{large}}}, float16[1] m = {{0}},
         float16[1] v = {{{one}}}>
        {{ n = BatchNormalization (x, s, b, m, v) [mul] y = Mul (n, s) }}""",
        FoldAffineIntoBatchnorm(),
    )
    assert report.skipped == {"mul": "the folded constants do not fit float16"}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_generated_rows_of_scales_and_shifts_compute_the_same(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    count = data.draw(st.integers(1, 5))
    at, value, nodes = data.draw(st.integers(0, count)), "x", []
    for index in range(count + 1):
        made = "y" if index == count else f"t{index}"
        if index == at:
            nodes.append(norm(value, made))
        else:
            op = data.draw(st.sampled_from(["Mul", "Div", "Add", "Sub"]))
            operands = [value, data.draw(st.sampled_from(["s", "c"]))]
            if op != "Div" and data.draw(st.booleans()):
                operands.reverse()
            nodes.append(f"[n{index}] {made} = {op} ({', '.join(operands)})")
        value = made
    low, high = rng.uniform(0.5, 2, 2)
    before, after, _ = rewrite(
        HEAD
        + f"""
        g (float[N,2,3] x) => (float[N,2,3] y)
        <{STATISTICS}, float s = {{{low}}}, float[2,1] c = {{{low}, {high}}}>
        {{ {" ".join(nodes)} }}""",
        FoldAffineIntoBatchnorm(),
    )
    assert len(after.graph.node) == 1
    assert_same_numbers(before, after, rtol=1e-4, atol=1e-4)
