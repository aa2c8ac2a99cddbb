"""`move-scale-into-weights`: the ways a scale may go, whose columns it takes, and what stops it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import assert_same_numbers, parsed, rewrite, text
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from optc.passes.graph import export_model, import_model
from optc.passes.move_scale_into_weights import MoveScaleIntoWeights
from optc.passes.pipeline import optimise

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def test_the_scale_of_a_query_goes_into_the_weights_and_bias_that_make_it() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,T,2] x) => (float[N,2,T,1] q)
        <float[2,2] w = {1, 2, 3, 4}, float[2] b = {10, 20}, float s = {0.5},
         int64[4] shape = {0, 0, 2, 1}>
        {
            [product] p = MatMul (x, w)
            [bias]    a = Add (b, p)
            [split]   h = Reshape (a, shape)
            [turn]    t = Transpose <perm = [0, 2, 1, 3]> (h)
            [scale]   q = Mul (t, s)
        }""",
        MoveScaleIntoWeights(),
    )
    assert (
        text(after)
        == """\
g (float[N,T,2] x) => (float[N,2,T,1] q)
   <float[2,2] w =  {0.5,1,1.5,2}, float[2] b =  {5,10}, int64[4] shape =  {0,0,2,1}>
{
   [product] p = MatMul (x, w)
   [bias] a = Add (b, p)
   [split] h = Reshape (a, shape)
   [turn] q = Transpose <perm: ints = [0, 2, 1, 3]> (h)
}"""
    )
    assert report.merged == {"bias": ("bias", "scale")}
    assert_same_numbers(before, after, rtol=1e-6)


ATTENTION = """
    g (float[N,T,2] x, float[2,T,N] z) => (float[N,T,T] y)
    <float[2,2] w = {1, 2, 3, 4}, float[2] b = {10, 20}, float[1] s = {4}>
    {
        [query] q = MatMul (x, w)
        [turn]  k = Transpose <perm = [2, 0, 1]> (z)
        [score] p = MatMul (q, k)
        [scale] d = Div (p, s)
        [soft]  y = Softmax (d)
    }"""


def test_the_scale_of_a_score_goes_into_the_weights_of_one_of_its_sides() -> None:
    before, after, report = rewrite(HEAD + ATTENTION, MoveScaleIntoWeights())
    assert "float[2,2] w =  {0.25,0.5,0.75,1}" in text(after)
    assert "[soft] y = Softmax (p)" in text(after)
    assert report.merged == {"query": ("query", "scale")}
    assert_same_numbers(before, after, rtol=1e-5)


def test_weights_that_come_behind_take_it_where_none_come_before() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,2,4,4] x) => (float[N,3] y)
        <float[2,3] w = {1, 2, 3, 4, 5, 6}, float[3] b = {1, 2, 3}, float s = {2}>
        {
            [scale] m = Mul (s, x)
            [relu]  r = Relu (m)
            [pool]  p = GlobalAveragePool (r)
            [flat]  f = Flatten (p)
            [gemm]  y = Gemm (f, w, b)
        }""",
        MoveScaleIntoWeights(),
    )
    assert "float[2,3] w =  {2,4,6,8,10,12}, float[3] b =  {1,2,3}" in text(after)
    assert "[relu] r = Relu (x)" in text(after)
    assert report.merged == {"gemm": ("gemm", "scale")}
    assert_same_numbers(before, after, rtol=1e-5)


TAKEN_APART = {
    "gather": """
        [cut] h = Reshape (a, cut)
        [turn] t = Transpose <perm = [2, 0, 3, 1, 4]> (h)
        [q] u = Gather <axis = 0> (t, zero)
        [k] k = Gather <axis = 0> (t, one)
        [v] v = Gather <axis = 0> (t, two)""",
    "split": """
        [cut] h = Reshape (a, cut)
        [turn] t = Transpose <perm = [2, 0, 3, 1, 4]> (h)
        [qkv] u4, k4, v4 = Split <axis = 0> (t)
        [q] u = Reshape (u4, heads)
        [k] k = Reshape (k4, heads)
        [v] v = Reshape (v4, heads)""",
    "slice": """
        [q3] u3 = Slice (a, zero1, two1, axis)
        [k3] k3 = Slice (a, two1, four1, axis)
        [v3] v3 = Slice (a, minus2, six1, axis)
        [q4] u4 = Reshape (u3, cut2)
        [k4] k4 = Reshape (k3, cut2)
        [v4] v4 = Reshape (v3, cut2)
        [q] u = Transpose <perm = [0, 2, 1, 3]> (u4)
        [k] k = Transpose <perm = [0, 2, 1, 3]> (k4)
        [v] v = Transpose <perm = [0, 2, 1, 3]> (v4)""",
}
QKV = """
    g (float[N,3,1] x) => (float[N,2,3,1] q, float[N,2,3,1] k, float[N,2,3,1] v)
    <float[1,6] w = {1, 2, 3, 4, 5, 6}, float[6] b = {1, 2, 3, 4, 5, 6}, float s = {0.5},
     int64[5] cut = {-1, 3, 3, 2, 1}, int64[4] cut2 = {0, 0, 2, 1}, int64 zero = {0},
     int64 one = {1}, int64 two = {2}, int64[1] zero1 = {0}, int64[1] two1 = {2},
     int64[1] four1 = {4}, int64[1] six1 = {6}, int64[1] minus2 = {-2}, int64[1] axis = {2},
     int64[4] heads = {-1, 2, 3, 1}>
    { [product] p = MatMul (x, w) [bias] a = Add (p, b)"""


@pytest.mark.parametrize("way", TAKEN_APART)
@pytest.mark.parametrize(("end", "columns"), [("u", "0.5,1,3,4,5,6"), ("v", "1,2,3,4,2.5,3")])
def test_only_the_columns_of_a_part_are_scaled(way: str, end: str, columns: str) -> None:
    middle = TAKEN_APART[way]
    if end == "u":
        last = "[scale] q = Mul (u, s) }"
    else:
        middle = middle.replace("] u = ", "] q = ").replace("] v = ", "] e = ")
        last = "[scale] v = Mul (e, s) }"
    before, after, report = rewrite(HEAD + QKV + middle + last, MoveScaleIntoWeights())
    assert f"w =  {{{columns}}}, float[6] b =  {{{columns}}}" in text(after)
    assert report.merged == {"bias": ("bias", "scale")}
    assert len(after.graph.node) == len(before.graph.node) - 1
    assert_same_numbers(before, after, rtol=1e-6)


def test_the_channels_of_a_conv_are_taken_apart_too() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[N,1,H,W] x) => (float[N,2,2,P] q, float[N,2,1,P] k)
        <float[6,1,1,1] w = {1, 2, 3, 4, 5, 6}, float s = {0.5}, int64[4] cut = {0, 2, 3, -1},
         int64[2] sizes = {2, 1}>
        {
            [conv]  c = Conv (x, w)
            [heads] h = Reshape (c, cut)
            [qk]    u, k = Split <axis = 2> (h, sizes)
            [scale] q = Mul (u, s)
        }""",
        MoveScaleIntoWeights(),
    )
    assert "w =  {0.5,1,3,2,2.5,6}" in text(after)
    assert "[qk] q, k = Split" in text(after)
    assert_same_numbers(before, after, rtol=1e-6)


OTHER = "between weights and scale, has another reader"
REFUSALS = [
    (  # the caller reads the whole
        f"`h`, {OTHER}",
        "float[N,1,2] y, float[N,1,2] h",
        "h = Reshape (p, cut) [scale] y = Mul (h, s)",
    ),
    (  # another node reads the whole
        f"`p`, {OTHER}",
        "float[N,1,2] y, float[N,2] z",
        "h = Reshape (p, cut) [scale] y = Mul (h, s) z = Relu (p)",
    ),
    (  # another part has some of the same columns
        f"`p`, {OTHER}",
        "float[N,1] y, float[N,2] z",
        """u = Slice (p, zero, one, one) [scale] y = Mul (u, s)
           z = Slice (p, zero, two, one)""",
    ),
    (  # a part of the rows has all columns
        f"`p`, {OTHER}",
        "float[1,2] y, float[1,2] z",
        """u = Slice (p, zero, one, zero) [scale] y = Mul (u, s)
           z = Slice (p, one, two, zero)""",
    ),
    (
        "the weights of the MatMul are shared with another node",
        "float[N,1,2] y, float[N,2] z",
        "h = Reshape (p, cut) [scale] y = Mul (h, s) z = MatMul (x, w)",
    ),
    (
        "the Mul adds an axis, or may do so",
        "float[1,2,N] y",
        "h = Transpose (p) [scale] y = Mul (h, wide)",
    ),
    (
        "it is not known which columns the Slice `cutter` takes",
        "float[N,K] y",
        "[cutter] u = Slice (p, from, two, one) [scale] y = Mul (u, s)",
    ),
]


@pytest.mark.parametrize(("reason", "outputs", "nodes"), REFUSALS)
def test_what_would_change_a_result_is_left_alone_with_the_reason(
    reason: str, outputs: str, nodes: str
) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,1] x, int64[1] from) => ({outputs})
        <float[1,2] w = {{1, 2}}, float s = {{0.5}}, float[1,1,1] wide = {{0.5}},
         int64[3] cut = {{-1, 1, 2}}, int64[1] zero = {{0}}, int64[1] one = {{1}},
         int64[1] two = {{2}}>
        {{ p = MatMul (x, w) {nodes} }}""",
        MoveScaleIntoWeights(),
    )
    assert [node.op_type for node in after.graph.node] == [n.op_type for n in before.graph.node]
    assert report.rewritten == 0
    assert report.skipped == {"scale": reason}


@pytest.mark.parametrize(
    "nodes",
    [
        "p = MatMul (x, w) [scale] y = Mul (p, s)",  # side by side: for the pass that needs no way
        "p = MatMul (x, w) h = Tanh (p) [scale] y = Mul (h, s)",  # no factor passes a Tanh
        "p = MatMul (x, w) h = Relu (p) [scale] y = Mul (h, minus)",  # none below 0 a Relu
        "p = MatMul (x, w) h = Identity (p) [scale] y = Mul (h, b)",  # not one number
        "p = MatMul (x, w) h = Identity (p) [scale] y = Mul (h, zero)",
        "p = MatMul (x, w) h = Identity (p) [scale] y = Div (s, h)",
        "[scale] m = Mul (x, s) y = Transpose (m)",
    ],
)
def test_what_is_no_such_pattern_is_not_spoken_of(nodes: str) -> None:
    _, _, report = rewrite(
        HEAD
        + f"""
        g (float[2,2] x) => (float[2,2] y)
        <float[2,2] w = {{1, 2, 3, 4}}, float s = {{0.5}}, float minus = {{-1}}, float zero = {{0}},
         float[2] b = {{1, 2}}>
        {{ {nodes} }}""",
        MoveScaleIntoWeights(),
    )
    assert report.merged == report.skipped == {}


@pytest.mark.parametrize(("bits", "folds"), [(0x3000, True), (0x0400, False), (0x4000, False)])
def test_float16_values_on_the_way_stay_in_range(bits: int, folds: bool) -> None:
    _, _, report = rewrite(
        HEAD
        + f"""
        g (float16[N,1] x) => (float16[1,N] y)
        <float16[1,1] w = {{15360}}, float16 s = {{{bits}}}>
        {{ p = MatMul (x, w) t = Transpose (p) [scale] y = Mul (t, s) }}""",
        MoveScaleIntoWeights(),
    )
    assert bool(report.rewritten) is folds
    assert folds or report.skipped == {
        "scale": "float16 values between weights and scale would leave their range"
    }


def test_whole_numbers_are_left_alone() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (int64[2,2] x) => (int64[2,2] y) <int64[2,2] w = {1, 2, 3, 4}, int64 s = {2}>
        { p = MatMul (x, w) t = Transpose (p) [scale] y = Mul (t, s) }""",
        MoveScaleIntoWeights(),
    )
    assert report.merged == report.skipped == {}


@st.composite
def _qkv(draw: st.DrawFn) -> onnx.ModelProto:
    """Draw a product that is cut along its columns, moved about and scaled in some parts."""
    extents = draw(st.lists(st.integers(1, 3), min_size=2, max_size=3))
    columns = int(np.prod(extents))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    constants = [
        numpy_helper.from_array(rng.standard_normal((2, columns)).astype(np.float32), "w"),
        numpy_helper.from_array(np.array([2, 5, *extents]), "cut"),
        numpy_helper.from_array(np.float32(0.25), "s"),
    ]
    order = list(draw(st.permutations(range(2 + len(extents)))))
    dims = [[2, 5, *extents][axis] for axis in order]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], "product"),
        helper.make_node("Reshape", ["p", "cut"], ["h"], "cut"),
        helper.make_node("Transpose", ["h"], ["t"], "turn", perm=order),
    ]
    outputs = []
    axis = draw(st.integers(0, len(dims) - 1))
    for part in range(draw(st.integers(1, 3))):
        index = draw(st.integers(-dims[axis] + 1, dims[axis] - 1))
        constants.append(numpy_helper.from_array(np.array(index), f"i{part}"))
        nodes.append(
            helper.make_node("Gather", ["t", f"i{part}"], [f"g{part}"], f"take{part}", axis=axis)
        )
        outputs.append(f"g{part}")
        if draw(st.booleans()):
            nodes.append(helper.make_node("Mul", [f"g{part}", "s"], [f"m{part}"], f"scale{part}"))
            outputs[-1] = f"m{part}"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", 5, 2])],
        [helper.make_tensor_value_info(name, 1, [None] * (len(dims) - 1)) for name in outputs],
        constants,
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


@settings(deadline=None, max_examples=80)
@given(_qkv())
def test_generated_parts_compute_the_same(before: onnx.ModelProto) -> None:
    onnx.checker.check_model(before)
    graph = import_model(before)
    optimise(graph, [MoveScaleIntoWeights()])
    after = export_model(graph, value_info=False)
    onnx.checker.check_model(after)
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


def test_a_dynamic_number_of_rows_does_not_hide_the_columns() -> None:
    source = HEAD + QKV + TAKEN_APART["gather"] + "[scale] q = Mul (u, s) }"
    before = parsed(source)
    assert before.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    _, after, _ = rewrite(source, MoveScaleIntoWeights())
    assert_same_numbers(before, after, rtol=1e-6, dynamic=3)
