from __future__ import annotations

import numpy as np
import pytest
from graphs import assert_same_numbers, rewrite, text
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.passes.merge_slices import MergeSlices
from optc.passes.movement import Cut

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'

CONSTANTS = """
    <int64[1] m1 = {-1}, int64[1] m9 = {-9}, int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i2 = {2},
     int64[1] i3 = {3}, int64[1] i4 = {4}, int64[1] i6 = {6}, int64[1] all = {99},
     int32[1] small1 = {1}, int32[1] small4 = {4}>
"""

MERGED = {
    "other axes": "a = Slice (x, i1, i4, i0) y = Slice (a, i0, i2, m1)",
    "one axis": "a = Slice (x, i1, all, i0) y = Slice (a, i1, i3, i0)",
    "in steps": "a = Slice (x, i1, all, i0, i2) y = Slice (a, i1, all, i0, i2)",
    "backwards": "a = Slice (x, m1, m9, i0, m1) y = Slice (a, i0, i3, i0, i2)",
    "there and back": "a = Slice (x, m1, m9, i0, m1) y = Slice (a, m1, m9, i0, m1)",
    "nothing left": "a = Slice (x, i1, i3, i0) y = Slice (a, i2, i4, i0)",
    "small integers": "a = Slice (x, small1, small4) y = Slice (a, i0, i2, i1)",
}


@pytest.mark.parametrize("nodes", MERGED.values(), ids=MERGED)
def test_a_slice_of_a_slice_becomes_one(nodes: str) -> None:
    before, after, _ = rewrite(
        f"{HEAD} g (float[6,4] x) => (y) {CONSTANTS} {{ {nodes} }}", MergeSlices()
    )
    assert len(after.graph.node) == 1
    assert_same_numbers(before, after, rtol=0)


def test_the_one_left_says_whose_work_it_does() -> None:
    before, after, report = rewrite(
        f"""{HEAD} g (float[N,M] x) => (float[A,B] y) {CONSTANTS} {{
            [a] t = Slice (x, i1, all, i0)
            [b] y = Slice (t, i1, i4, i1)
        }}""",
        MergeSlices(),
    )
    assert (
        text(after)
        == """\
g (float[N,M] x) => (float[A,B] y)
   <int64[2] b_starts =  {1,1}, int64[2] b_ends =  {99,4}, int64[2] b_axes =  {0,1}>
{
   [b] y = Slice (x, b_starts, b_ends, b_axes)
}"""
    )
    assert report.merged == {"b": ("a", "b")}
    assert_same_numbers(before, after, rtol=0, dynamic=5)


@pytest.mark.parametrize("extent", range(1, 6))
def test_one_dynamic_axis_is_cut_twice(extent: int) -> None:
    before, after, _ = rewrite(
        f"""{HEAD} g (float[N] x) => (float[A] y) {CONSTANTS} {{
            t = Slice (x, i1, i4)
            y = Slice (t, i1, i6)
        }}""",
        MergeSlices(),
    )
    assert len(after.graph.node) == 1
    assert_same_numbers(before, after, rtol=0, dynamic=extent)


def test_all_slices_take_the_work_over() -> None:
    before, after, _ = rewrite(
        f"""{HEAD} g (float[6,4] x) => (float[3,2] y, float[3,1] z) {CONSTANTS} {{
            t = Slice (x, i0, all, i0, i2)
            y = Slice (t, i0, i2, i1)
            z = Slice (t, i3, i4, i1)
        }}""",
        MergeSlices(),
    )
    assert [node.op_type for node in after.graph.node] == ["Slice", "Slice"]
    assert_same_numbers(before, after, rtol=0)


STAYS = {
    "read by another": "a = Slice (x, i1, i4) y = Slice (a, i1, i3) z = Neg (a)",
    "an output": "z = Slice (x, i1, i4) y = Slice (z, i1, i3)",
    "computed": "a = Slice (x, i1, n) y = Slice (a, i1, i3) z = Neg (x)",
    "from the end of what is not known": "a = Slice (d, i1, m1) y = Slice (a, i1, i3) z = Neg (x)",
    "in steps of what is not known": (
        "a = Slice (d, i0, all, i0, i2) y = Slice (a, i0, i3) z = Neg (x)"
    ),
    "another axis": "y = Slice (x, i0, i3, i0) z = Slice (x, i3, i4, i1)",
    "a gap": "y = Slice (x, i0, i2, i0) z = Slice (x, i3, all, i0)",
    "twice the same element": "y = Slice (x, i0, i3, i0) z = Slice (x, i2, all, i0)",
    "no number": "y = Slice (d, i0, i3, i0) z = Slice (d, i3, all, i0)",
}


@pytest.mark.parametrize("nodes", STAYS.values(), ids=STAYS)
def test_what_cannot_be_merged_stays(nodes: str) -> None:
    _, _, report = rewrite(
        f"""{HEAD} g (float[6,4] x, float[N,4] d, int64[1] n) => (float[A,B] y, float[C,D] z)
        {CONSTANTS} {{ {nodes} }}""",
        MergeSlices(),
    )
    assert not report.rewritten


def test_slices_that_share_an_axis_out_are_a_split() -> None:
    before, after, report = rewrite(
        f"""{HEAD} g (float[N,6] x) => (float[N,2] y, float[N,3] z, float[N,1] w, float[N,6] v)
        {CONSTANTS} {{
            [b] z = Slice (x, i1, i4, i1)
            [a] t = Slice (x, i0, i1, i1)
            [c] y = Slice (x, i4, all, m1)
            [d] w = Neg (t)
            [e] v = Neg (x)
        }}""",
        MergeSlices(),
    )
    assert "[a] t, z, y = Split <axis: int = 1> (x, a_sizes)" in text(after)
    assert "int64[3] a_sizes =  {1,3,2}" in text(after)
    assert report.merged == {"a": ("a", "b", "c")}
    assert_same_numbers(before, after, rtol=0)


def test_an_older_split_says_its_sizes_itself() -> None:
    before, after, _ = rewrite(
        f"""<ir_version: 7, opset_import: ["" : 11]>
        g (float[6] x) => (float[2] y, float[4] z) {CONSTANTS} {{
            y = Slice (x, i0, i2)
            z = Slice (x, i2, all)
        }}""",
        MergeSlices(),
    )
    assert "y, z = Split <axis: int = 0, split: ints = [2, 4]> (x)" in text(after)
    assert_same_numbers(before, after, rtol=0)


def test_a_branch_gets_no_sizes_written_out() -> None:
    _, _, report = rewrite(
        f"""{HEAD} g (bool c, float[6] x) => (float[K] y) {CONSTANTS} {{
            y = If (c) <
                then_branch = t () => (float[L] a) {{
                    p = Slice (x, i0, i4)
                    q = Slice (x, i4, all)
                    a = Concat <axis = 0> (q, p)
                }},
                else_branch = e () => (float[M] b) {{ b = Neg (x) }}
            >
        }}""",
        MergeSlices(),
    )
    assert not report.rewritten


edges = st.integers(-8, 8) | st.just(2**62)
cuts = st.builds(Cut, edges, edges, st.sampled_from([-3, -2, -1, 1, 2, 3]))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(first=cuts, second=cuts, extent=st.integers(0, 7))
def test_a_cut_of_a_cut_is_what_one_after_the_other_takes(
    first: Cut, second: Cut, extent: int
) -> None:
    expected = np.arange(extent)[list(first.indices(extent))]
    expected = expected[list(second.indices(len(expected)))]
    both = first.then(second, extent)
    assert both is not None
    assert list(both.indices(extent)) == list(expected)
    low = min(first.start, first.end, second.start, second.end)
    if low >= 0 and first.step == second.step == 1:
        from optc.passes.dimension import symbol

        unknown = first.then(second, symbol("n"))
        assert unknown is not None
        assert list(unknown.indices(extent)) == list(expected)
