from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.merge_reshapes import MergeReshapes

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'

CONSTANTS = """
    <int64[1] a0 = {0}, int64[1] a1 = {1}, int64[1] a2 = {2}, int64[1] last = {-1},
     int64[2] a03 = {0, 3}, int64[1] flat = {-1}, int64[2] s46 = {4, 6}, int64[2] s64 = {6, 4},
     int64[3] copied = {0, 2, -1}, int64[3] kept = {0, 0, -1}, int64[2] keep1 = {0, -1}>
"""

MERGED = {
    "reshapes": ("a = Reshape (x, flat) y = Reshape (a, s46)", "Reshape", [4, 6]),
    "flatten": ("a = Flatten <axis = 2> (x) y = Reshape (a, s46)", "Reshape", [4, 6]),
    "a flatten at the end": (
        "a = Unsqueeze (x, a0) y = Flatten <axis = 2> (a)",
        "Reshape",
        [2, 12],
    ),
    "a zero that the first makes": (
        "a = Reshape (x, s64) y = Reshape (a, copied)",
        "Reshape",
        [6, 2, 2],
    ),
    "unsqueezes": ("a = Unsqueeze (x, a03) y = Unsqueeze (a, a1)", "Unsqueeze", [0, 1, 4]),
    "unsqueezes from the end": (
        "a = Unsqueeze (x, last) y = Unsqueeze (a, last)",
        "Unsqueeze",
        [3, 4],
    ),
    "a squeeze of another axis": (
        "a = Unsqueeze (x, a0) b = Reshape (a, kept) y = Squeeze (b, a0)",
        "Reshape",
        [2, 12],
    ),
    "a transpose that moves one": (
        "a = Unsqueeze (x, a0) y = Transpose <perm = [1, 0, 2, 3]> (a)",
        "Reshape",
        [2, 1, 3, 4],
    ),
    "a squeeze of a moved one": (
        "a = Unsqueeze (x, a0) b = Transpose <perm = [1, 2, 0, 3]> (a) y = Flatten <axis = 1> (b)",
        "Reshape",
        [2, 12],
    ),
}


@pytest.mark.parametrize(("nodes", "op", "numbers"), MERGED.values(), ids=MERGED)
def test_a_chain_becomes_one(nodes: str, op: str, numbers: list[int]) -> None:
    before, after, _ = rewrite(
        f"{HEAD} g (float[2,3,4] x) => (y) {CONSTANTS} {{ {nodes} }}", MergeReshapes()
    )
    (node,) = after.graph.node
    (constant,) = after.graph.initializer
    assert node.op_type == op
    assert f"{{{','.join(map(str, numbers))}}}" in text(after), constant.name
    assert_same_numbers(before, after, rtol=0)


def test_squeezes_become_one_and_say_whose_work_they_do() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[1,N,1,M] x) => (float[N,M] y)
        <int64[1] first = {0}, int64[1] second = {-2}>
        {
            [a] t = Squeeze (x, first)
            [b] y = Squeeze (t, second)
        }""",
        MergeReshapes(),
    )
    assert (
        text(after)
        == """\
g (float[1,N,1,M] x) => (float[N,M] y)
   <int64[2] b_axes =  {0,2}>
{
   [b] y = Squeeze (x, b_axes)
}"""
    )
    assert report.merged == {"b": ("a", "b")}
    assert_same_numbers(before, after, rtol=0)


def test_axes_stay_attributes_where_they_are() -> None:
    before, after, _ = rewrite(
        """<ir_version: 7, opset_import: ["" : 11]>
        g (float[N,M] x) => (float[1,N,1,M] y)
        {
            t = Unsqueeze <axes = [1]> (x)
            y = Unsqueeze <axes = [0]> (t)
        }""",
        MergeReshapes(),
    )
    assert "y = Unsqueeze <axes: ints = [0, 2]> (x)" in text(after)
    assert_same_numbers(before, after, rtol=0)


def test_a_dynamic_extent_is_copied_or_computed() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[N,3,4] x) => (float[N,1,12] y, float[K,6] z)
        <int64[2] flat = {0, -1}, int64[1] one = {1}, int64[2] six = {0, 6}, int64[2] pairs = {-1, 6}>
        {
            a = Reshape (x, flat)
            y = Unsqueeze (a, one)
            b = Reshape (x, pairs)
            z = Reshape (b, six)
        }""",
        MergeReshapes(),
    )
    assert "{0,1,12}" in text(after)
    assert "{-1,6}" in text(after)
    assert len(after.graph.node) == 2
    assert_same_numbers(before, after, rtol=0)


def test_all_readers_take_the_work_over() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[2,3,4] x) => (float[6,4] y, float[24] z)
        <int64[2] s = {4, 6}, int64[2] t = {6, 4}, int64[1] flat = {-1}>
        {
            [a] r = Reshape (x, s)
            [b] y = Reshape (r, t)
            [c] z = Reshape (r, flat)
        }""",
        MergeReshapes(),
    )
    assert {node.input[0] for node in after.graph.node} == {"x"}
    assert report.merged == {"b": ("a", "b"), "c": ("a", "c")}
    assert_same_numbers(before, after, rtol=0)


STAYS = {
    "read by another": "a = Reshape (x, s) y = Reshape (a, t) z = Neg (a)",
    "an output": "z = Reshape (x, s) y = Reshape (z, t)",
    "a shape that is reshaped": "a = Shape (x) b = Reshape (a, flat) y = Reshape (x, b) z = Neg (x)",
    "a transpose": "a = Unsqueeze (x, one) y = Transpose <perm = [2, 1, 0, 3]> (a) z = Neg (x)",
    "two transposes": "a = Transpose (x) y = Transpose <perm = [1, 0, 2]> (a) z = Neg (x)",
}


@pytest.mark.parametrize("nodes", STAYS.values(), ids=STAYS)
def test_what_would_save_nothing_stays(nodes: str) -> None:
    _, _, report = rewrite(
        f"""{HEAD} g (float[2,3,4] x) => (y, z)
        <int64[2] s = {{4, 6}}, int64[2] t = {{6, 4}}, int64[1] flat = {{-1}}, int64[1] one = {{1}}>
        {{ {nodes} }}""",
        MergeReshapes(),
    )
    assert not report.rewritten


def test_two_sizes_that_only_the_run_knows_are_reported() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[N,M,4] x, int64[3] s) => (y)
        <int64[1] one = {1}>
        {
            [a] r = Reshape (x, s)
            [b] y = Unsqueeze (r, one)
        }""",
        MergeReshapes(),
    )
    assert report.skipped == {"a": "only the run knows what the merged one has to say"}


def test_an_empty_tensor_keeps_its_shape() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[2,0,4] x) => (float[1,0,8] y)
        <int64[2] flat = {0, 8}, int64[1] zero = {0}>
        {
            t = Transpose <perm = [1, 0, 2]> (x)
            a = Reshape (t, flat)
            y = Unsqueeze (a, zero)
        }""",
        MergeReshapes(),
    )
    assert_same_numbers(before, after, rtol=0)


def test_a_branch_gets_no_sizes_written_out() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (bool c, float[N,6] x) => (float[1,K] y)
        <int64[1] zero = {0}>
        {
            y = If (c) <
                then_branch = t () => (float[1,L] a) {
                    p = Unsqueeze (x, zero)
                    a = Flatten <axis = 0> (p)
                },
                else_branch = e () => (float[1,M] b) { b = Flatten <axis = 0> (x) }
            >
        }""",
        MergeReshapes(),
    )
    assert not report.rewritten
