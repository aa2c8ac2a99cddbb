"""`fold-add-before-conv`: each rule, each refusal, and where the pattern stands."""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.fold_add_before_conv import FoldAddBeforeConv

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


@pytest.mark.parametrize(
    ("operator", "operands", "weights", "bias"),
    [  # what the two windows see of t: (1 + 2) * 3 + (3 + 4) * 5 = 44, (5 + 6) * 3 + (7 + 8) * 5 = 108
        ("Add", "x, t", "1,2,3,4,5,6,7,8", "54,128"),
        ("Add", "t, x", "1,2,3,4,5,6,7,8", "54,128"),
        ("Sub", "x, t", "1,2,3,4,5,6,7,8", "-34,-88"),
        ("Sub", "t, x", "-1,-2,-3,-4,-5,-6,-7,-8", "54,128"),
    ],
)
def test_a_shift_per_input_channel_is_summed_into_the_bias(
    operator: str, operands: str, weights: str, bias: str
) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,2,3,3] x) => (float[N,2,3,2] y)
        <float[2,2,1,2] w = {{1, 2, 3, 4, 5, 6, 7, 8}}, float[2] b = {{10, 20}},
         float[2,1,1] t = {{3, 5}}>
        {{
            [node] m = {operator} ({operands})
            [conv] y = Conv (m, w, b)
        }}""",
        FoldAddBeforeConv(),
    )
    assert (
        text(after)
        == f"""\
g (float[N,2,3,3] x) => (float[N,2,3,2] y)
   <float[2,2,1,2] w =  {{{weights}}}, float[2] b =  {{{bias}}}>
{{
   [conv] y = Conv (x, w, b)
}}"""
    )
    assert report.merged == {"conv": ("node", "conv")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-4)


def test_each_group_sums_its_own_channels() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[N,2,2,2] x) => (float[N,4,2,2] y)
        <float[4,1,1,1] w = {1, 2, 3, 4}, float[2,1,1] t = {10, 100}>
        {
            [add]  m = Add (x, t)
            [conv] y = Conv <group = 2, auto_pad = "VALID"> (m, w)
        }""",
        FoldAddBeforeConv(),
    )
    assert 'float[4] "conv.bias" =  {10,20,300,400}' in text(after)
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-4)


def test_weights_that_others_share_stay_shared() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,1,2,2] y, float[1,1,2,2] z)
        <float[1,1,1,1] w = {2}, float t = {3}>
        { [add] m = Add (x, t) [conv] y = Conv (m, w) [other] z = Conv (x, w) }""",
        FoldAddBeforeConv(),
    )
    assert [node.op_type for node in after.graph.node] == ["Conv", "Conv"]
    assert {tensor.name for tensor in after.graph.initializer} == {"w", "conv.bias"}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("conv", "op"),
    [
        ("Conv <pads = [0, 0, 1, 1]>", "Conv"),
        ('Conv <auto_pad = "SAME_UPPER">', "Conv"),
        ("ConvTranspose", "ConvTranspose"),
    ],
)
def test_where_a_border_sees_less_of_the_kernel_it_is_left_alone(conv: str, op: str) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[1,1,2,2] x) => (float[1,1,h,v] y)
        <float[1,1,2,2] w = {{1, 2, 3, 4}}, float t = {{3}}>
        {{ [add] m = Add (x, t) [conv] y = {conv} (m, w) }}""",
        FoldAddBeforeConv(),
    )
    assert report.rewritten == 0
    assert report.skipped == {"add": f"not every output of the {op} sees all of the kernel"}
    assert_same_numbers(before, after, rtol=0)


def test_a_sum_that_the_caller_reads_and_one_that_is_larger_than_its_input_are_left_alone() -> None:
    body = "{ [add] m = Add (x, t) [conv] y = Conv (m, w) }"
    _, _, read = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,1,2,2] y, float[1,1,2,2] m)
        <float[1,1,1,1] w = {1}, float t = {3}>"""
        + body,
        FoldAddBeforeConv(),
    )
    assert read.skipped == {"add": "the Add output has another reader"}
    _, _, larger = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,1,2,2] y)
        <float[1,2,1,1] w = {1, 2}, float[2,1,1] t = {3, 5}>"""
        + body,
        FoldAddBeforeConv(),
    )
    assert larger.skipped == {"add": "the Add makes what it reads larger, or may do so"}


def test_a_bias_out_of_range_is_left_alone() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,1,2,2] y)
        <float[1,1,1,1] w = {1e20}, float t = {1e20}>
        { [add] m = Add (x, t) [conv] y = Conv (m, w) }""",
        FoldAddBeforeConv(),
    )
    assert report.skipped == {"add": "the folded bias does not fit float32"}
