"""Tensors of one number, moved."""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.fill_final_shape import FillFinalShape

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
CONSTANTS = """
    <int64[2] s = {2, 3}, int64[2] turned = {3, 2}, int64[3] wide = {4, 2, 3}, int64[1] zero = {0},
     int64[1] one = {1}, int64[2] twice = {1, 2}>"""


def test_a_shape_is_not_changed_but_written_down() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[6] x) => (float[6] y)
        <int64[2] s = {2, 3}, int64[1] flat = {6}>
        {
            [fill] f = ConstantOfShape <value = float[1] {2}> (s)
            [view] r = Reshape (f, flat)
            [add]  y = Add (x, r)
        }""",
        FillFinalShape(),
    )
    assert (
        text(after)
        == """\
g (float[6] x) => (float[6] y)
   <int64[1] view_shape =  {6}>
{
   [view] r = ConstantOfShape <value: tensor = float[1] {2}> (view_shape)
   [add] y = Add (x, r)
}"""
    )
    assert report.merged == {"view": ("fill", "view")}
    assert_same_numbers(before, after, rtol=0)


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        ("Transpose (f)", "3,2"),
        ("Expand (f, wide)", "4,2,3"),
        ("Slice (f, zero, one, zero)", "1,3"),
        ("Tile (f, twice)", "2,6"),
        ("Gather (f, zero)", "1,3"),
        ("Unsqueeze (f, zero)", "1,2,3"),
        ("Slice (f, one, one, zero)", "0,3"),
    ],
)
@pytest.mark.parametrize("value", ["", " <value = float[1] {-0.0}>", " <value = int64[1] {7}>"])
def test_each_operator_that_moves(node: str, shape: str, value: str) -> None:
    dtype = "int64" if "int64" in value else "float"
    before, after, _ = rewrite(
        f"""{HEAD} g ({dtype} x) => ({dtype}[{shape}] y) {CONSTANTS}
        {{ f = ConstantOfShape{value} (s) m = {node} y = Mul (m, x) }}""",
        FillFinalShape(),
    )
    assert [node.op_type for node in after.graph.node] == ["ConstantOfShape", "Mul"]
    assert_same_numbers(before, after, rtol=0)


def test_another_reader_keeps_what_was_filled() -> None:
    before, after, _ = rewrite(
        f"""{HEAD} g (float x) => (float[3,2] y, float[2,3] f) {CONSTANTS}
        {{ f = ConstantOfShape (s) t = Transpose (f) y = Add (t, x) }}""",
        FillFinalShape(),
    )
    assert [node.op_type for node in after.graph.node] == [
        "ConstantOfShape",
        "ConstantOfShape",
        "Add",
    ]
    assert_same_numbers(before, after, rtol=0)


def test_an_extent_that_only_the_run_knows_is_left_to_it() -> None:
    _, _, report = rewrite(
        f"""{HEAD} g (float[N] x) => (float[N,1] y) {CONSTANTS}
        {{ s0 = Shape (x) f = ConstantOfShape (s0) y = Unsqueeze (f, one) }}""",
        FillFinalShape(),
    )
    assert not report.rewritten
