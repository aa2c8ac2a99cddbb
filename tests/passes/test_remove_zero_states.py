"""Recurrent operators that start from zeros."""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.remove_zero_states import RemoveZeroStates

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
WEIGHTS = """
    float[1,8,3] w = {1, 2, 0, 1, 0, 0, 2, 1, 0, 1, 0, 1, 2, 0, 0, 1, 1, 0, 0, 1, 0, 2, 0, 1},
    float[1,8,2] r = {1, 0, 1, 0, 0, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 0}"""
LSTM = "LSTM <hidden_size = 2>"


def test_the_zeros_of_an_lstm_and_what_sized_them_are_gone() -> None:
    before, after, report = rewrite(
        f"""{HEAD} g (float[T,B,3] x) => (float[T,1,B,2] y)
        <{WEIGHTS}, int64 one = {{1}}, int64[1] first = {{0}}, int64[1] pair = {{2}},
         int64[2] halves = {{1, 1}}>
        {{
            [s] shape = Shape (x)
            [g] batch = Gather (shape, one)
            [u] extent = Unsqueeze (batch, first)
            [c] extents = Concat <axis = 0> (pair, extent, pair)
            [z] zeros = ConstantOfShape (extents)
            [h] h, c = Split <axis = 0> (zeros, halves)
            [l] y = {LSTM} (x, w, r, , , h, c)
        }}""",
        RemoveZeroStates(),
    )
    assert "[l] y = LSTM <hidden_size: int = 2> (x, w, r)" in text(after)
    assert len(after.graph.node) == 1
    assert report.merged == {"l": ("l",)}
    assert_same_numbers(before, after, rtol=0)


ZEROS = {
    "a constant": ("z = Identity (zero)", "z, z"),
    "moved": (
        "a = ConstantOfShape <value = float[1] {0}> (extents) z = Transpose <perm = [1, 0, 2]> (a)",
        "z, z",
    ),
    "one of two": ("z = Identity (zero)", "z, s"),
    "the other": ("z = Identity (zero)", "s, z"),
}


@pytest.mark.parametrize(("nodes", "states"), ZEROS.values(), ids=ZEROS)
@pytest.mark.parametrize("peepholes", ["", ", p"])
def test_each_kind_of_zeros(nodes: str, states: str, peepholes: str) -> None:
    before, after, _ = rewrite(
        f"""{HEAD} g (float[4,2,3] x, float[1,2,2] s) => (float[4,1,2,2] y)
        <{WEIGHTS}, float[1,2,2] zero = {{0, 0, 0, 0}}, int64[3] extents = {{2, 1, 2}},
         float[1,6] p = {{1, 2, 3, 4, 5, 6}}>
        {{ {nodes} y = {LSTM} (x, w, r, , , {states}{peepholes}) }}""",
        RemoveZeroStates(),
    )
    (lstm,) = after.graph.node
    assert "z" not in lstm.input
    assert ("s" in lstm.input) == ("s" in states)
    assert_same_numbers(before, after, rtol=0)


@pytest.mark.parametrize(("op", "gates"), [("GRU", 3), ("RNN", 1)])
def test_other_recurrent_operators(op: str, gates: int) -> None:
    before, after, _ = rewrite(
        f"""{HEAD} g (float[4,2,3] x, float[1,{gates * 2},3] w, float[1,{gates * 2},2] r)
            => (float[4,1,2,2] y, float[1,2,2] last)
        <int64[3] extents = {{1, 2, 2}}>
        {{ z = ConstantOfShape (extents) y, last = {op} <hidden_size = 2> (x, w, r, , , z) }}""",
        RemoveZeroStates(),
    )
    (node,) = after.graph.node
    assert list(node.input) == ["x", "w", "r"]
    assert_same_numbers(before, after, rtol=0)


LEFT = {
    "ones": "z = ConstantOfShape <value = float[1] {1}> (extents)",
    "a zero with a sign": "z = ConstantOfShape <value = float[1] {-0.0}> (extents)",
    "an input": "z = Identity (s)",
    "computed": "a = ConstantOfShape (extents) z = Add (a, s)",
    "not all of them": "z = Identity (most)",
}


@pytest.mark.parametrize("nodes", LEFT.values(), ids=LEFT)
def test_what_is_left_alone(nodes: str) -> None:
    _, _, report = rewrite(
        f"""{HEAD} g (float[4,2,3] x, float[1,2,2] s) => (float[4,1,2,2] y)
        <{WEIGHTS}, int64[3] extents = {{1, 2, 2}}, float[1,2,2] most = {{0, 0, 0, 1}}>
        {{ {nodes} y = {LSTM} (x, w, r, , , z, z) }}""",
        RemoveZeroStates(),
    )
    assert not report.rewritten


def test_zeros_that_the_caller_reads_stay() -> None:
    before, after, _ = rewrite(
        f"""{HEAD} g (float[4,2,3] x) => (float[4,1,2,2] y, float[1,2,2] z)
        <{WEIGHTS}, int64[3] extents = {{1, 2, 2}}>
        {{ z = ConstantOfShape (extents) y = {LSTM} (x, w, r, , , z, z) }}""",
        RemoveZeroStates(),
    )
    assert [node.op_type for node in after.graph.node] == ["ConstantOfShape", "LSTM"]
    assert_same_numbers(before, after, rtol=0)
