from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.merge_concats import MergeConcats

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'

CONSTANTS = """
    <int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i2 = {2}, int64[1] i3 = {3}, int64[1] all = {99},
     int64[2] s24 = {2, 4}, int64[2] first = {0, 0}, int64[2] odd = {1, -3}, int64[2] ends = {99, 99},
     int64[2] twos = {2, 2}, int64[2] rows = {1, 2}, int64[2] at00 = {0, 0}, int64[2] at10 = {1, 0},
     int64[2] at01 = {0, 1}, int64[2] at11 = {1, 1}>
"""


def test_concats_become_one() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[2,N] x, float[2,M] y) => (float[2,K] z, float[2,L] w)
        {
            [a] t = Concat <axis = 1> (x, y)
            [b] u = Concat <axis = -1> (x, t)
            [c] z = Concat <axis = 1> (u, y, u)
            [d] w = Concat <axis = -1> (y, u)
        }""",
        MergeConcats(),
    )
    assert "[c] z = Concat <axis: int = 1> (x, x, y, y, x, x, y)" in text(after)
    assert "[d] w = Concat <axis: int = -1> (y, x, x, y)" in text(after)
    assert report.merged["c"] == ("b", "c")
    assert_same_numbers(before, after, rtol=0)


def test_concats_and_parts_of_one_tensor_in_one_run() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[2,3] x) => (float[2,3] y, float[2,9] z)
        <int64[2] parts = {1, 2}>
        {
            t = Concat <axis = 1> (x, x)
            z = Concat <axis = 1> (t, x)
            a, b = Split <axis = 1> (x, parts)
            c = Concat <axis = 1> (a, b)
            y = Neg (c)
        }""",
        MergeConcats(),
    )
    assert [node.op_type for node in after.graph.node] == ["Concat", "Concat", "Neg"]
    assert_same_numbers(before, after, rtol=0)


TAKEN = {
    "all of a split": ("a, b = Split <axis = 1> (x, s24) n = Concat <axis = 1> (a, b)", "Concat"),
    "all of slices": (
        "a = Slice (x, i0, i2, i1) b = Slice (x, i2, all, i1) n = Concat <axis = 1> (a, b)",
        "Concat",
    ),
    "in the midst of others": (
        "a, b = Split <axis = 1> (x, s24) n = Concat <axis = -2> (x, a, b, x)",
        "Concat",
    ),
    "a roll": (
        "a = Slice (x, i2, all, i1) b = Slice (x, i0, i2, i1) n = Concat <axis = 1> (a, b)",
        "Gather",
    ),
    "the other way round": (
        "a, b = Split <axis = 1> (x, s24) n = Concat <axis = 1> (b, a)",
        "Gather",
    ),
    "gathered": (
        "a = Gather <axis = 1> (x, odd) b = Gather <axis = 1> (x, i2) n = Concat <axis = 1> (a, b)",
        "Gather",
    ),
    "counting up": (
        "a = Slice (x, i0, i2, i1) b = Slice (x, i2, i3, i1) n = Concat <axis = 1> (a, b)",
        "Slice",
    ),
    "counting down": (
        "a = Gather <axis = 1> (x, i2) b = Gather <axis = 1> (x, i1) n = Concat <axis = 1> (a, b)",
        "Slice",
    ),
}


@pytest.mark.parametrize(("nodes", "op"), TAKEN.values(), ids=TAKEN)
def test_parts_of_one_tensor_are_taken_at_once(nodes: str, op: str) -> None:
    before, after, _ = rewrite(
        f"{HEAD} g (float[B,6,8] x) => (float[B,K,8] y) {CONSTANTS} {{ {nodes} y = Neg (n) }}",
        MergeConcats(),
    )
    assert [node.op_type for node in after.graph.node] == [op, "Neg"]
    assert_same_numbers(before, after, rtol=0)


def test_a_roll_says_whose_work_it_does() -> None:
    before, after, report = rewrite(
        f"""{HEAD} g (float[B,4,8] x) => (float[B,4,8] y) {CONSTANTS} {{
            [a] p = Slice (x, i3, all, i1)
            [b] q = Slice (x, i0, i3, i1)
            [c] y = Concat <axis = 1> (p, q)
        }}""",
        MergeConcats(),
    )
    assert (
        text(after)
        == """\
g (float[B,4,8] x) => (float[B,4,8] y)
   <int64[4] c_indices =  {3,0,1,2}>
{
   [c] y = Gather <axis: int = 1> (x, c_indices)
}"""
    )
    assert report.merged == {"c": ("a", "b", "c")}
    assert_same_numbers(before, after, rtol=0)


STAYS = {
    "a part is read by another": (
        "a, b = Split <axis = 1> (x, s24) y = Concat <axis = 1> (b, a) z = Neg (a)"
    ),
    "a part is an output": "z, b = Split <axis = 1> (x, s24) y = Concat <axis = 1> (b, z)",
    "another axis": (
        "a = Slice (x, i0, i1, i0) b = Slice (x, i0, i1, i0) y = Concat <axis = 1> (a, b) z = Neg (x)"
    ),
    "two axes": (
        "a = Slice (x, rows, ends, rows) b = Slice (x, first, rows, rows)"
        " y = Concat <axis = 1> (a, b) z = Neg (x)"
    ),
    "two tensors": (
        "w = Neg (x) a = Slice (x, i2, all, i1) b = Slice (w, i0, i2, i1)"
        " y = Concat <axis = 1> (a, b) z = Neg (x)"
    ),
    "an extent that is no number": (
        "a = Slice (x, i2, all, i0) b = Slice (x, i0, i2, i0) y = Concat <axis = 0> (a, b) z = Neg (x)"
    ),
    "a concat that is read by another": (
        "a = Concat <axis = 1> (x, x) y = Concat <axis = 1> (a, x) z = Neg (a)"
    ),
    "a concat along another axis": (
        "a = Concat <axis = 1> (x, x) y = Concat <axis = 0> (a, a) z = Neg (x)"
    ),
}


@pytest.mark.parametrize("nodes", STAYS.values(), ids=STAYS)
def test_what_cannot_be_taken_at_once_stays(nodes: str) -> None:
    _, _, report = rewrite(
        f"{HEAD} g (float[B,6,8] x) => (float[A,K,L] y, float[C,D,E] z) {CONSTANTS} {{ {nodes} }}",
        MergeConcats(),
    )
    assert not report.rewritten


def test_a_gather_that_would_be_slower_is_declined() -> None:
    _, _, report = rewrite(
        f"""{HEAD} g (float[B,4] x) => (float[B,4] y) {CONSTANTS} {{
            a = Slice (x, i3, all, i1)
            b = Slice (x, i0, i3, i1)
            [c] y = Concat <axis = 1> (a, b)
        }}""",
        MergeConcats(),
    )
    assert report.skipped == {"c": "a Gather would copy less than 8 elements at a time"}


def test_patches_are_merged_by_reshape_and_transpose() -> None:
    before, after, report = rewrite(
        f"""{HEAD} g (float[B,4,6,3] x) => (float[B,2,3,12] y) {CONSTANTS} {{
            [a] p = Slice (x, at00, ends, rows, twos)
            [b] q = Slice (x, at10, ends, rows, twos)
            [c] r = Slice (x, at01, ends, rows, twos)
            [d] s = Slice (x, at11, ends, rows, twos)
            [e] y = Concat <axis = -1> (p, q, r, s)
        }}""",
        MergeConcats(),
    )
    assert [node.op_type for node in after.graph.node] == ["Reshape", "Transpose", "Reshape"]
    assert "{0,2,2,3,2,3}" in text(after)
    assert "perm: ints = [0, 1, 3, 4, 2, 5]" in text(after)
    assert set(report.merged.values()) == {("a", "b", "c", "d", "e")}
    assert_same_numbers(before, after, rtol=0)


def test_channels_first_and_rows_slowest() -> None:
    before, after, _ = rewrite(
        f"""{HEAD} g (float[B,3,4,6] x) => (float[B,12,2,3] y)
        <int64[2] at00 = {{0, 0}}, int64[2] at10 = {{1, 0}}, int64[2] at01 = {{0, 1}},
         int64[2] at11 = {{1, 1}}, int64[2] ends = {{99, 99}}, int64[2] axes = {{2, 3}},
         int64[2] twos = {{2, 2}}> {{
            p = Slice (x, at00, ends, axes, twos)
            q = Slice (x, at01, ends, axes, twos)
            r = Slice (x, at10, ends, axes, twos)
            s = Slice (x, at11, ends, axes, twos)
            y = Concat <axis = 1> (p, q, r, s)
        }}""",
        MergeConcats(),
    )
    assert "perm: ints = [0, 3, 5, 1, 2, 4]" in text(after)
    assert_same_numbers(before, after, rtol=0)


@pytest.mark.parametrize("order", ["p, q, s, r", "p, q, r, p"])
def test_patches_in_another_order_stay(order: str) -> None:
    _, _, report = rewrite(
        f"""{HEAD} g (float[B,4,6,3] x) => (float[B,2,3,12] y) {CONSTANTS} {{
            p = Slice (x, at00, ends, rows, twos)
            q = Slice (x, at10, ends, rows, twos)
            r = Slice (x, at01, ends, rows, twos)
            s = Slice (x, at11, ends, rows, twos)
            y = Concat <axis = -1> ({order})
        }}""",
        MergeConcats(),
    )
    assert not report.rewritten


def test_patches_of_an_odd_extent_stay() -> None:
    _, _, report = rewrite(
        f"""{HEAD} g (float[B,5,6,3] x) => (float[B,K,3,6] y) {CONSTANTS} {{
            p = Slice (x, i0, all, i2, i2)
            q = Slice (x, i1, all, i2, i2)
            r = Slice (x, i1, all, i2, i2)
            y = Concat <axis = -1> (p, q, r)
        }}""",
        MergeConcats(),
    )
    assert not report.rewritten


def test_parts_of_a_tensor_of_another_rank_are_no_parts() -> None:
    source = """
        g (float[4] x) => (float[2,4] z) <int64[2,2] i = {0,1,2,3}>
        {
            [gather] p = Gather <axis = 0> (x, i)
            [concat] z = Concat <axis = 1> (p, p)
        }"""
    _, after, _ = rewrite(HEAD + source, MergeConcats())
    assert [node.op_type for node in after.graph.node] == ["Gather", "Concat"]
