"""`fold-constant-chains`: what a chain becomes, and where it ends."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import assert_same_numbers, rewrite, run, text
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.passes.fold_constant_chains import FoldConstantChains

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def test_three_become_a_mul_and_an_add() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,2] x) => (float[N,2] y)
        <float a = {1}, float[2] s = {2, 3}, float b = {10}>
        { [first] t = Add (a, x) [second] u = Mul (t, s) [third] y = Sub (u, b) }""",
        FoldConstantChains(),
    )
    assert (
        text(after)
        == """\
g (float[N,2] x) => (float[N,2] y)
   <float[2] "second.constant" =  {2,3}, float[2] "third.constant" =  {-8,-7}>
{
   [second] u = Mul (x, "second.constant")
   [third] y = Add (u, "third.constant")
}"""
    )
    assert report.merged == dict.fromkeys(("second", "third"), ("first", "second", "third"))
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "result"),
    [
        ("t = Add (x, a) y = Add (b, t)", 'y = Add (x, "n.constant")'),
        ("t = Sub (x, a) y = Sub (b, t)", 'y = Sub ("n.constant", x)'),
        ("t = Sub (a, x) y = Sub (b, t)", 'y = Add (x, "n.constant")'),
        ("t = Mul (x, a) y = Div (t, b)", 'y = Mul (x, "n.constant")'),
        ("t = Neg (x) y = Mul (t, b)", 'y = Mul (x, "n.constant")'),
        ("t = Neg (x) y = Add (t, b)", 'y = Sub ("n.constant", x)'),
    ],
)
def test_two_of_a_kind_become_one(nodes: str, result: str) -> None:
    before, after, _ = rewrite(
        HEAD
        + f"""
        g (float[N,2] x) => (float[N,2] y) <float a = {{3}}, float[2] b = {{2, 5}}>
        {{ {nodes.replace("y =", "[n] y =")} }}""",
        FoldConstantChains(),
    )
    assert f"[n] {result}" in text(after)
    assert len(after.graph.node) == 1
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Add (x, a)",
        "t = Mul (x, a) y = Add (t, b)",
        "t = Add (x, a) y = Mul (t, b)",
        "t = Neg (x) u = Neg (t) y = Neg (u)",
        "t = Div (b, x) y = Div (a, t)",
        "t = Add (x, x) y = Mul (t, b)",
    ],
)
def test_what_is_as_short_as_it_can_be_is_left_alone(nodes: str) -> None:
    before, after, report = rewrite(
        HEAD
        + f"g (float[N,2] x) => (float[N,2] y) <float a = {{3}}, float[2] b = {{2, 5}}> {{ {nodes} }}",
        FoldConstantChains(),
    )
    assert [node.op_type for node in after.graph.node] == [n.op_type for n in before.graph.node]
    assert report.merged == report.skipped == {}


@pytest.mark.parametrize("more", ["float[N] t", "float[N] z"])
def test_a_value_that_others_read_ends_the_chain(more: str) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N] x) => (float[N] y, {more}) <float a = {{3}}>
        {{ t = Add (x, a) y = Add (t, a) z = Relu (t) }}""",
        FoldConstantChains(),
    )
    assert report.rewritten == 0
    assert_same_numbers(before, after, rtol=0)


REFUSALS = [
    (
        "a large number is added and taken away again: that rounds",
        "float a = {12582912}, float b = {12582912}",
        "t = Add (x, a) y = Sub (t, b)",
    ),
    (
        "the folded constants do not fit float32",
        "float a = {1e30}, float b = {1e30}",
        "t = Mul (x, a) y = Mul (t, b)",
    ),
    (
        "the folded constants do not fit float32",
        "float a = {1}, float b = {0}",
        "t = Mul (x, a) y = Div (t, b)",
    ),
    (
        "the folded constant would be larger than those of the chain",
        "float[2,1] a = {1, 2}, float[1,2] b = {3, 4}",
        "t = Mul (x, a) y = Mul (t, b)",
    ),
]


@pytest.mark.parametrize(("reason", "constants", "nodes"), REFUSALS)
def test_what_would_change_a_result_is_left_alone_with_the_reason(
    reason: str, constants: str, nodes: str
) -> None:
    before, after, report = rewrite(
        HEAD
        + f"g (float[2,2] x) => (float[2,2] y) <{constants}> {{ {nodes.replace('y =', '[n] y =')} }}",
        FoldConstantChains(),
    )
    assert report.rewritten == 0
    assert report.skipped == {"n": reason}
    assert_same_numbers(before, after, rtol=0)


def test_a_division_of_integers_cuts_off() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (int32[N] x) => (int32[N] y) <int32 a = {2}>
        { t = Mul (x, a) [n] y = Div (t, a) }""",
        FoldConstantChains(),
    )
    assert report.skipped == {"n": "a division of int32 cuts off"}


def test_a_chain_that_begins_outside_a_body_is_not_moved_into_it() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[N] x, bool p) => (float[N] y) <float a = {3}> {
            t = Add (x, a)
            y = If (p) <
                then_branch = then () => (float[N] u) { u = Add (t, a) },
                else_branch = other () => (float[N] e) { e = Identity (x) }
            >
        }""",
        FoldConstantChains(),
    )
    assert report.rewritten == 0


DTYPES = {"float": np.float32, "double": np.float64, "int32": np.int32, "int64": np.int64}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_generated_chains_compute_the_same(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(DTYPES)))
    ops = ["Add", "Sub", "Mul", "Neg", *(["Div"] if kind in ("float", "double") else [])]
    nodes, constants, value = [], [], "x"
    count = data.draw(st.integers(2, 6))
    for index in range(count):
        made = "y" if index == count - 1 else f"t{index}"
        op = data.draw(st.sampled_from(ops))
        shape = data.draw(st.sampled_from(["", "[1]", "[3]", "[2,1]", "[2,3]"]))
        elements = {"": 1, "[1]": 1, "[3]": 3, "[2,1]": 2, "[2,3]": 6}[shape]
        largest = 2**31 - 1 if kind == "int32" else 9
        numbers = [data.draw(st.integers(1, largest)) for _ in range(elements)]
        constants.append(f"{kind}{shape} c{index} = {{{', '.join(map(str, numbers))}}}")
        operands = [value, f"c{index}"]
        if op != "Div" and data.draw(st.booleans()):
            operands.reverse()
        nodes.append(f"{made} = {op} ({value if op == 'Neg' else ', '.join(operands)})")
        value = made
    before, after, report = rewrite(
        HEAD
        + f"""
        g ({kind}[2,3] x) => ({kind}[2,3] y) <{", ".join(constants)}> {{ {" ".join(nodes)} }}""",
        FoldConstantChains(),
    )
    ops_left = [node.op_type for node in after.graph.node]
    assert len(ops_left) <= 2 or report.skipped or set(ops_left) == {"Neg"}
    inputs = {"x": np.arange(6).reshape(2, 3).astype(DTYPES[kind])}
    expected, found = run(before, inputs)["y"], run(after, inputs)["y"]
    assert expected.dtype == found.dtype
    if kind in ("int32", "int64"):
        np.testing.assert_array_equal(found, expected)
    else:
        largest_value = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * largest_value)
