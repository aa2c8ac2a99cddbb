from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.remove_expands import RemoveExpands

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def test_what_is_repeated_for_a_mul_need_not_be() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,3] x, float[1,3] s) => (float[N,3] y)
        {
            [a] shape = Shape (x)
            [b] e = Expand (s, shape)
            [c] y = Mul (x, e)
        }""",
        RemoveExpands(),
    )
    assert (
        text(after)
        == """\
g (float[N,3] x, float[1,3] s) => (float[N,3] y) {
   [c] y = Mul (x, s)
}"""
    )
    assert report.merged == {"c": ("b", "c")}
    assert_same_numbers(before, after, rtol=0)


REMOVED = {
    "tile": "e = Tile (s, twice) y = Add (e, x)",
    "more axes": "e = Expand (v, full) y = Sub (x, e)",
    "all readers": "e = Expand (s, full) a = Sub (x, e) y = Add (e, a)",
    "condition": "c = Greater (s, v) e = Expand (c, full) y = Where (e, x, s)",
    "slope": "e = Expand (s, full) y = PRelu (x, e)",
}


@pytest.mark.parametrize("nodes", REMOVED.values(), ids=REMOVED)
def test_each_operator_that_spreads_its_inputs(nodes: str) -> None:
    before, after, _ = rewrite(
        f"""{HEAD} g (float[2,3] x, float[1,3] s, float[3] v) => (float[2,3] y)
        <int64[2] full = {{2, 3}}, int64[2] twice = {{2, 1}}>
        {{ {nodes} }}""",
        RemoveExpands(),
    )
    assert not {"Expand", "Tile"} & {node.op_type for node in after.graph.node}
    assert_same_numbers(before, after, rtol=0)


def test_matrices_that_are_repeated_for_a_product() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[B,4,2,3] x, float[B,1,3,5] w) => (float[B,4,2,5] y)
        <int64[4] heads = {1, 4, 1, 1}>
        {
            e = Expand (w, heads)
            y = MatMul (x, e)
        }""",
        RemoveExpands(),
    )
    assert [node.op_type for node in after.graph.node] == ["MatMul"]
    assert_same_numbers(before, after, rtol=1e-6)


STAYS = {
    "nobody else has the extent": "e = Expand (s, full) y = Mul (s, e)",
    "by itself": "e = Expand (s, full) y = Mul (e, e)",
    "one more axis": "e = Expand (x, one) y = Mul (e, x)",
    "a tile of more than one": "e = Tile (x, wide) y = Mul (e, o)",
    "read by another": "e = Expand (s, full) a = Mul (x, e) y = Concat <axis = 1> (a, e)",
    "rows of a product": "e = Expand (s, full) t = Transpose (x) y = MatMul (t, e)",
    "what a slope is for": "e = Expand (s, full) y = PRelu (e, x)",
}


@pytest.mark.parametrize("nodes", STAYS.values(), ids=STAYS)
def test_what_is_needed_stays(nodes: str) -> None:
    kind = "float[A,B,C]" if "one)" in nodes else "float[A,B]"
    source = f"""{HEAD} g (float[2,3] x, float[1,3] s, float[2,6] o) => ({kind} y)
        <int64[2] full = {{2, 3}}, int64[3] one = {{1, 2, 3}}, int64[2] wide = {{1, 2}}>
        {{ {nodes} }}"""
    _, _, report = rewrite(source, RemoveExpands())
    assert not report.rewritten


def test_an_output_keeps_its_extents() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[2,3] x, float[1,3] s) => (float[2,3] y, float[2,3] e)
        <int64[2] full = {2, 3}>
        {
            e = Expand (s, full)
            y = Mul (x, e)
        }""",
        RemoveExpands(),
    )
    assert not report.rewritten


@pytest.mark.parametrize(("opset", "left"), [(7, ["Tile", "Max"]), (8, ["Max"])])
def test_a_maximum_spreads_its_inputs_since_opset_8(opset: int, left: list[str]) -> None:
    source = f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        g (float[1,3] x, float[2,3] y) => (float[2,3] z) <int64[2] r = {{2,1}}>
        {{
            [tile] t = Tile (x, r)
            [max]  z = Max (t, y)
        }}"""
    _, after, _ = rewrite(source, RemoveExpands())
    assert [node.op_type for node in after.graph.node] == left
