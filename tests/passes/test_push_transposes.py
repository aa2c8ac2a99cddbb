from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.push_transposes import PushTransposes

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def ops(source: str) -> list[str]:
    """Return the operators that are left of ``source``, its numbers compared."""
    before, after, _ = rewrite(source, PushTransposes())
    assert_same_numbers(before, after, rtol=1e-6, atol=1e-7)
    return [node.op_type for node in after.graph.node]


def test_a_pair_cancels_across_what_works_in_any_layout() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,2,1,3] x) => (float[N,2,1,3] y)
        <float[2] scale = {1, 2}, float one = {1}>
        {
            [a] t = Transpose <perm = [0, 2, 3, 1]> (x)
            [b] u = Mul (t, scale)
            [c] v = Add (one, u)
            [d] s = Softmax <axis = -1> (v)
            [e] y = Transpose <perm = [0, 3, 1, 2]> (s)
        }""",
        PushTransposes(),
    )
    assert (
        text(after)
        == """\
g (float[N,2,1,3] x) => (float[N,2,1,3] y)
   <float[1,2,1,1] scale_turned =  {1,2}, float one =  {1}>
{
   [b] u_turned = Mul (x, scale_turned)
   [c] v_turned = Add (one, u_turned)
   [d] y = Softmax <axis: int = 1> (v_turned)
}"""
    )
    assert report.removed == {
        "a": "what reads it works in any layout",
        "e": "what it reads works in any layout",
    }
    assert_same_numbers(before, after, rtol=0)


BETWEEN = {
    "unary": "n = Sigmoid (t)",
    "cast": "h = Cast <to = 11> (t) n = Cast <to = 1> (h)",
    "constant of full rank": "n = Add (t, full)",
    "constant of two axes": "n = Sub (two, t)",
    "compare and choose": "c = Greater (t, three) n = Where (c, t, three)",
    "concat": "n = Concat <axis = -1> (t, full, t)",
    "split": "a, b = Split <axis = 3> (t) n = Max (a, b)",
    "split into sizes": "a, b = Split <axis = 1> (t, halves) n = Concat <axis = 2> (b, a)",
    "slice": "n = Slice (t, i1, i3, i2)",
    "slice without axes": "n = Slice (t, z2, e2)",
    "pad": "n = Pad (t, pads)",
    "reflected": "n = Pad <mode = 'reflect'> (t, pads)",
    "gather": "n = Gather <axis = -2> (t, odd)",
    "tile": "n = Tile (t, counts)",
    "reduce and keep": "m = ReduceMax <axes = [1, -1]> (t) n = Sub (t, m)",
    "sum and keep": "m = ReduceSum (t, i2) n = Div (t, m)",
    "arg": "m = ArgMax <axis = 3> (t) n = Cast <to = 1> (m)",
    "quantise": "q = QuantizeLinear <axis = 3> (t, qs, qz) n = DequantizeLinear <axis = 3> (q, qs, qz)",
    "slope": "n = PRelu (t, four)",
    "residual": "a = Relu (t) b = Tanh (t) c = Add (a, b) n = Mul (c, t)",
}


@pytest.mark.parametrize("nodes", BETWEEN.values(), ids=BETWEEN)
def test_every_operator_that_works_in_any_layout(nodes: str) -> None:
    nodes = nodes.replace("'", '"')
    found = ops(
        f"""{HEAD} g (float[N,4,2,3] x) => (float[A,B,C,D] y)
        <float[2,2,3,4] full = {{{", ".join(map(str, range(48)))}}}, float[2,1,1] two = {{1, 2}},
         float three = {{0.3}}, float[4] four = {{1, 2, 3, 4}}, int64[2] halves = {{1, 1}},
         int64[1] i1 = {{1}}, int64[1] i2 = {{2}}, int64[1] i3 = {{3}}, int64[2] odd = {{2, 0}},
         int64[8] pads = {{0, 1, 0, 2, 0, 0, 1, 0}}, int64[4] counts = {{1, 1, 2, 1}},
         int64[2] z2 = {{0, 1}}, int64[2] e2 = {{9, 9}}, float[4] qs = {{0.1, 0.2, 0.3, 0.4}},
         int8[4] qz = {{0, 0, 0, 0}}>
        {{
            t = Transpose <perm = [0, 2, 3, 1]> (x)
            {nodes}
            y = Transpose <perm = [0, 3, 1, 2]> (n)
        }}"""
    )
    assert "Transpose" not in found


ENDS = {
    "reduced": ("y = ReduceMean <axes = [1, 2], keepdims = 0> (t)", "float[A,B]"),
    "found": ("y = ArgMin <axis = 3, keepdims = 0> (t)", "int64[A,B,C]"),
    "squeezed": ("m = ReduceMax <axes = [1, 2]> (t) y = Squeeze (m, i12)", "float[A,B]"),
    "gathered": ("a = Relu (t) y = Gather <axis = -1> (a, zero)", "float[A,B,C]"),
}


@pytest.mark.parametrize(("ending", "kind"), ENDS.values(), ids=ENDS)
def test_an_end_that_keeps_the_order_of_what_is_left(ending: str, kind: str) -> None:
    found = ops(
        f"""{HEAD} g (float[2,4,1,3] x) => ({kind} y)
        <int64[2] i12 = {{1, 2}}, int64 zero = {{0}}>
        {{ t = Transpose <perm = [0, 2, 3, 1]> (x) {ending} }}"""
    )
    assert "Transpose" not in found


def test_an_end_that_would_change_the_order_of_what_is_left_stays() -> None:
    found = ops(
        HEAD
        + """
        g (float[2,4,1,3] x) => (float[A,B,C] y)
        {
            t = Transpose <perm = [0, 2, 3, 1]> (x)
            y = ReduceMax <axes = [2], keepdims = 0> (t)
        }"""
    )
    assert found == ["Transpose", "ReduceMax"]


def test_a_residual_network_in_another_layout() -> None:
    found = ops(
        HEAD
        + """
        g (float[N,2,4,4] x) => (float[N,2,4,4] y)
        <float[2,2,1,1] w = {1, 2, 3, 4}, float[2] b = {1, 2}>
        {
            c1 = Conv (x, w)
            t1 = Transpose <perm = [0, 2, 3, 1]> (c1)
            b1 = Add (t1, b)
            r1 = Relu (b1)
            n1 = Transpose <perm = [0, 3, 1, 2]> (r1)
            c2 = Conv (n1, w)
            t2 = Transpose <perm = [0, 2, 3, 1]> (c2)
            s2 = Add (t2, r1)
            r2 = Relu (s2)
            n2 = Transpose <perm = [0, 3, 1, 2]> (r2)
            c3 = Conv (n2, w)
            t3 = Transpose <perm = [0, 2, 3, 1]> (c3)
            s3 = Add (r2, t3)
            y = Transpose <perm = [0, 3, 1, 2]> (s3)
        }"""
    )
    assert found == ["Conv", "Add", "Relu", "Conv", "Add", "Relu", "Conv", "Add"]


def test_two_become_one_after_what_joins_them() -> None:
    found = ops(
        HEAD
        + """
        g (float[2,3] a, float[2,3] b) => (float[3,2] y)
        {
            t = Transpose (a)
            u = Transpose (b)
            y = Add (t, u)
        }"""
    )
    assert found == ["Add", "Transpose"]


def test_an_output_inside_keeps_its_layout_where_it_still_pays() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[2,3] a, float[2,3] b) => (float[2,3] y, float[2,3] z, float[3,2] r)
        {
            t = Transpose (a)
            u = Transpose (b)
            r = Add (t, u)
            s = Relu (r)
            y = Transpose (s)
            e = Exp (s)
            z = Transpose (e)
        }""",
        PushTransposes(),
    )
    assert sum(node.op_type == "Transpose" for node in after.graph.node) == 1
    assert_same_numbers(before, after, rtol=0)


STAYS = {
    "one in, one out": "t = Transpose (x) y = Relu (t) z = Neg (x)",
    "another input": "t = Transpose (x) y = Add (t, w) z = Neg (x)",
    "an output before": "z = Transpose (x) r = Relu (z) y = Transpose (r)",
    "an axis that is left out": "t = Transpose (x) m = Relu (t) y = MatMul (m, x) z = Neg (x)",
    "of no known axes": "t = Transpose (x) y = ReduceSum (t, n) z = Neg (x)",
    "indices": "t = Transpose (i) y = Gather (x, t) z = Neg (x)",
}


@pytest.mark.parametrize("nodes", STAYS.values(), ids=STAYS)
def test_what_would_save_nothing_stays(nodes: str) -> None:
    kind = "float[A,B,C]" if "Gather" in nodes else "float[A,B]"
    before, after, report = rewrite(
        f"""{HEAD} g (float[3,3] x, float[3,3] w, int64[1] n, int64[2,2] i)
        => ({kind} y, float[C,D] z) {{ {nodes} }}""",
        PushTransposes(),
    )
    if nodes != STAYS["an output before"]:
        assert not report.rewritten
    kept = [sum(n.op_type == "Transpose" for n in m.graph.node) for m in (before, after)]
    assert kept[1] <= kept[0]


def test_one_that_leads_back_into_its_region_is_counted_once() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[3,3] x) => (float[3,3] y)
        {
            a = Relu (x)
            t = Transpose (a)
            b = Add (t, a)
            u = Transpose (b)
            y = Add (u, b)
        }""",
        PushTransposes(),
    )
    assert_same_numbers(before, after, rtol=0)


def test_a_region_that_pays_in_part_is_turned_in_part() -> None:
    found = ops(
        HEAD
        + """
        g (float[N,2,1,3] x, float[N,1,3,2] other) => (float[N,2,1,3] y, float[N,1,3,2] z)
        {
            t = Transpose <perm = [0, 2, 3, 1]> (x)
            r = Relu (t)
            y = Transpose <perm = [0, 3, 1, 2]> (r)
            s = Add (r, other)
            e = Exp (s)
            z = Mul (e, other)
        }"""
    )
    assert found.count("Transpose") == 1


def test_a_transpose_in_a_body_is_not_moved_out() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (bool c, float[2,3] x) => (float[K,L] y, float[2,3] z)
        {
            t = Transpose (x)
            r = Relu (t)
            y = If (c) <
                then_branch = f () => (float[2,3] a) { a = Transpose (r) },
                else_branch = e () => (float[3,2] b) { b = Neg (r) }
            >
            z = Transpose (r)
        }""",
        PushTransposes(),
    )
    assert_same_numbers(before, after, rtol=0)


def test_fp16_and_an_empty_axis() -> None:
    found = ops(
        HEAD
        + """
        g (float16[0,2,N] x) => (float16[0,2,N] y)
        {
            t = Transpose <perm = [2, 0, 1]> (x)
            r = Relu (t)
            y = Transpose <perm = [1, 2, 0]> (r)
        }"""
    )
    assert found == ["Relu"]
