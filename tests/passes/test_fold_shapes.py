from __future__ import annotations

import onnx
import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.fold_shapes import FoldShapes
from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import optimise

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def test_the_one_extent_that_only_the_run_knows_is_copied() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[batch,2,3] x) => (float[n,6] y)
        <int64 zero = {0}, int64[1] axis = {0}, int64[1] six = {6}>
        {
            [shape]  s = Shape (x)
            [gather] b = Gather (s, zero)
            [list]   l = Unsqueeze (b, axis)
            [concat] t = Concat <axis = 0> (l, six)
            [view]   y = Reshape (x, t)
        }""",
        FoldShapes(),
    )
    assert (
        text(after)
        == """\
g (float[batch,2,3] x) => (float[n,6] y)
   <int64[2] view_target =  {0,6}>
{
   [view] y = Reshape (x, view_target)
}"""
    )
    assert report.merged == {"view": ("view",)}
    assert list(report.removed) == ["concat", "list", "gather", "shape"]
    for dynamic in (1, 5):
        assert_same_numbers(before, after, rtol=0, dynamic=dynamic)


def test_an_extent_of_no_axis_is_left_to_the_number_of_elements() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[batch,2,3] x) => (float[n,3] y)
        <int64 zero = {0}, int64 two = {2}, int64[1] axis = {0}, int64[1] three = {3}>
        {
            [shape]  s = Shape (x)
            [gather] b = Gather (s, zero)
            [twice]  d = Mul (b, two)
            [list]   l = Unsqueeze (d, axis)
            [concat] t = Concat <axis = 0> (l, three)
            [view]   y = Reshape (x, t)
        }""",
        FoldShapes(),
    )
    assert (
        text(after)
        == """\
g (float[batch,2,3] x) => (float[n,3] y)
   <int64[2] view_target =  {-1,3}>
{
   [view] y = Reshape (x, view_target)
}"""
    )
    for dynamic in (1, 4):
        assert_same_numbers(before, after, rtol=0, dynamic=dynamic)


def test_two_open_extents_are_left_alone() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[a,b,6] x) => (float[n,m,3] y)
        <int64[1] from = {0}, int64[1] to = {2}, int64[1] three = {3}, int64[2] twos = {1, 2}>
        {
            [shape]  s = Shape (x)
            [slice]  p = Slice (s, from, to)
            [twice]  d = Mul (p, twos)
            [swap]   r = Slice (d, minus, low, from, minus)
            [concat] t = Concat <axis = 0> (r, three)
            [view]   y = Reshape (x, t)
        }""".replace("int64[2] twos", "int64[1] minus = {-1}, int64[1] low = {-9}, int64[2] twos"),
        FoldShapes(),
    )
    assert not report.merged
    assert report.skipped == {"view": "only the run knows what `t` says"}


def test_beside_an_axis_that_may_be_empty_no_extent_is_left_open() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[n] x, int64[1] k) => (float[c,d] y)
        <int64[1] from = {0}, int64[1] to = {1}>
        {
            [nonzero] z = NonZero (x)
            [swap]    w = Transpose (z)
            [cast]    f = Cast <to = 1> (w)
            [shape]   s = Shape (f)
            [count]   c = Slice (s, from, to)
            [concat]  t = Concat <axis = 0> (c, k)
            [view]    y = Reshape (f, t)
        }""",
        FoldShapes(),
    )
    # Where nothing is found, 0 elements would not say what k is.
    assert report.skipped == {"view": "only the run knows what `t` says"}


def test_allowzero_goes_where_no_extent_is_a_literal_zero() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[batch,4] x) => (float[b,2,2] y)
        <int64[1] from = {0}, int64[1] to = {1}, int64[2] twos = {2, 2}>
        {
            [shape]  s = Shape (x)
            [first]  b = Slice (s, from, to)
            [concat] t = Concat <axis = 0> (b, twos)
            [view]   y = Reshape <allowzero = 1> (x, t)
        }""",
        FoldShapes(),
    )
    assert "[view] y = Reshape (x, view_target)" in text(after)
    assert "{0,2,2}" in text(after)
    assert_same_numbers(before, after, rtol=0, dynamic=3)


def test_expand_keeps_the_axes_that_stay_as_they_are() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[batch,1] x) => (float[b,3] y)
        <int64[1] from = {0}, int64[1] to = {1}, int64[1] three = {3}>
        {
            [shape]  s = Shape (x)
            [first]  b = Slice (s, from, to)
            [concat] t = Concat <axis = 0> (b, three)
            [wide]   y = Expand (x, t)
        }""",
        FoldShapes(),
    )
    assert "int64[2] wide_target =  {1,3}" in text(after)
    assert_same_numbers(before, after, rtol=0, dynamic=4)


def test_a_slice_to_the_end_of_the_axis_says_so() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[batch,5] x) => (float[b,5] y)
        <int64[1] from = {0}, int64[1] to = {1}, int64[1] start = {1}>
        {
            [shape] s = Shape (x)
            [end]   e = Slice (s, from, to)
            [cut]   y = Slice (x, start, e, from)
        }""",
        FoldShapes(),
    )
    assert "int64[1] cut_ends =  {9223372036854775807}" in text(after)
    assert_same_numbers(before, after, rtol=0, dynamic=4)


def test_a_size_that_is_an_output_becomes_a_constant_under_its_name() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[batch,5] x) => (int64 n)
        <int64 one = {1}>
        {
            [shape]  s = Shape (x)
            [gather] n = Gather (s, one)
        }""",
        FoldShapes(),
    )
    assert list(report.removed) == ["gather", "shape"]
    assert_same_numbers(before, after, rtol=0)


def test_an_output_of_many_gives_way_alone() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[batch,5] x) => (int64[1] b, int64[1] twice)
        <int64[2] parts = {1, 1}>
        {
            [shape] s = Shape (x)
            [split] b, n = Split (s, parts)
            [add]   twice = Add (n, n)
        }""",
        FoldShapes(),
    )
    assert report.merged == {"split": ("split",)}
    assert list(report.removed) == ["add"]
    assert_same_numbers(before, after, rtol=0)


def test_a_body_reads_the_constant_of_the_graph_around_it() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[batch,5] x, bool c) => (int64[1] y)
        <int64[1] from = {1}, int64[1] to = {2}>
        {
            [shape] s = Shape (x)
            [five]  n = Slice (s, from, to)
            [if]    y = If (c) <
                then_branch = t () => (int64[1] p) { [add] p = Add (n, n) },
                else_branch = e () => (int64[1] q) { [mul] q = Mul (n, n) }
            >
        }""",
        FoldShapes(),
    )
    assert "Shape" not in text(after)
    assert_same_numbers(before, after, rtol=0)


@pytest.mark.parametrize("op", ["Tile", "ConstantOfShape"])
def test_a_large_result_is_not_stored(op: str) -> None:
    made = "Tile (one, size)" if op == "Tile" else "ConstantOfShape <value = int64[1] {1}> (size)"
    _, after, report = rewrite(
        HEAD
        + f"""
        g (int64[1] x) => (int64[1] y)
        <int64[1] one = {{1}}, int64[1] size = {{2000}}, int64[1] axis = {{0}}>
        {{
            [large] l = {made}
            [add]   a = Add (l, x)
            [sum]   y = ReduceSum (a, axis)
        }}""",
        FoldShapes(),
    )
    assert op in text(after)
    assert not report.removed


def test_the_branches_of_an_if_are_left_alone() -> None:
    source = (
        HEAD
        + """
        g (float[2,6] x, bool c) => (float[m,n] y)
        {
            [choice] y = If (c) <
                then_branch = t () => (float[m,n] a) { s = Shape (x) [a1] a = Reshape (x, s) },
                else_branch = e () => (float[m,n] b) { [b1] b = Identity (x) }
            >
        }"""
    )
    _, _, report = rewrite(source, FoldShapes())
    assert report.rewritten == 0


def test_a_condition_in_the_branch_of_an_if_is_folded() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[2,N] x, bool c) => (float[2,N] y)
        <int64 first = {0}>
        {
            [choice] y = If (c) <
                then_branch = t () => (float[2,N] a) {
                    [s] shape = Shape (x)
                    [g] rows = Gather (shape, first)
                    [b] some = Cast <to = 9> (rows)
                    [i] a = If (some) <
                        then_branch = tt () => (float[2,N] p) { [n] p = Neg (x) },
                        else_branch = te () => (float[2,N] q) { [r] q = Relu (x) }
                    >
                },
                else_branch = e () => (float[2,N] b) { [k] b = Identity (x) }
            >
        }""",
        FoldShapes(),
    )
    assert "Cast" not in text(after)
    assert "Shape" not in text(after)
    assert "some =  {1}" in text(after)
    assert report.removed.keys() == {"s", "g", "b"}
    assert_same_numbers(before, after, rtol=0)


def test_an_extent_that_was_open_before_stays_open_beside_an_axis_that_may_be_empty() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[N] x) => (float[K,1] y)
        <int64[1] open = {-1}, int64[1] from = {0}, int64[1] to = {1}>
        {
            [which] places = NonZero (x)
            [turn]  t = Transpose <perm = [1, 0]> (places)
            [to]    f = Cast <to = 1> (t)
            [shape] s = Shape (f)
            [rows]  n = Slice (s, from, to)
            [join]  target = Concat <axis = 0> (n, open)
            [end]   y = Reshape (f, target)
        }""",
        FoldShapes(),
    )
    assert "Concat" not in text(after)
    assert_same_numbers(before, after, rtol=0)


def test_an_output_that_is_declared_with_another_rank_is_corrected() -> None:
    source = (
        HEAD
        + """
        g (float[batch,4] x) => (y)
        <int64[1] from = {0}, int64[1] to = {1}, int64[2] twos = {2, 2}>
        {
            [shape]  s = Shape (x)
            [first]  b = Slice (s, from, to)
            [concat] t = Concat <axis = 0> (b, twos)
            [view]   y = Reshape (x, t)
        }"""
    )
    model = onnx.parser.parse_model(source)
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, "n"])
    model.graph.output[0].CopyFrom(output)
    graph = import_model(model)
    optimise(graph, [FoldShapes()])
    after = export_model(graph, value_info=False)
    onnx.checker.check_model(after, full_check=True)
    dims = after.graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [0, 2, 2]
