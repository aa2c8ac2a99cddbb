"""`fold-mul-into-conv`: each rule, each refusal, and where the pattern stands."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.fold_mul_into_conv import FoldMulIntoConv

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def half(*numbers: float) -> str:
    """Return float16 numbers as onnx.parser takes them: as the integers their bits are."""
    return f"{{{', '.join(str(np.float16(number).view(np.uint16)) for number in numbers)}}}"


def test_a_scale_per_channel_is_folded() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {1, 2}, float[2] b = {10, 20}, float[2,1,1] s = {3, 5}>
        {
            [conv] c = Conv (x, w, b)
            [mul]  y = Mul (c, s)
        }""",
        FoldMulIntoConv(),
    )
    assert (
        text(after)
        == """\
g (float[1,1,2,2] x) => (float[1,2,2,2] y)
   <float[2,1,1,1] w =  {3,10}, float[2] b =  {30,100}>
{
   [conv] y = Conv (x, w, b)
}"""
    )
    assert report.merged == {"conv": ("conv", "mul")}
    assert_same_numbers(before, after, rtol=1e-6)


@pytest.mark.parametrize(
    ("scale", "weights"),
    [
        ("float s = {3}", "3,6"),
        ("float[1] s = {3}", "3,6"),
        ("float[1,1,1,1] s = {3}", "3,6"),
        ("float[2,1,1] s = {3,5}", "3,10"),
        ("float[1,2,1,1] s = {3,5}", "3,10"),
    ],
)
@pytest.mark.parametrize("operands", ["c, s", "s, c"])
def test_every_shape_that_is_one_number_per_channel_is_folded_in_either_order(
    scale: str, weights: str, operands: str
) -> None:
    before, after, _ = rewrite(
        HEAD
        + f"""
        g (float[N,1,2,2] x) => (float[N,2,2,2] y)
        <float[2,1,1,1] w = {{1, 2}}, {scale}>
        {{
            [conv] c = Conv (x, w)
            [mul]  y = Mul ({operands})
        }}""",
        FoldMulIntoConv(),
    )
    assert (
        text(after)
        == f"""\
g (float[N,1,2,2] x) => (float[N,2,2,2] y)
   <float[2,1,1,1] w =  {{{weights}}}>
{{
   [conv] y = Conv (x, w)
}}"""
    )
    assert_same_numbers(before, after, rtol=1e-6)


def test_a_division_by_a_constant_is_folded_and_a_constant_divided_is_not() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {8, 6}, float[2] b = {4, 2}, float[2,1,1] s = {4, 2}, float one = {1}>
        {
            [conv] c = Conv (x, w, b)
            [div]  d = Div (c, s)
            [inv]  y = Div (one, d)
        }""",
        FoldMulIntoConv(),
    )
    assert (
        text(after)
        == """\
g (float[1,1,2,2] x) => (float[1,2,2,2] y)
   <float[2,1,1,1] w =  {2,3}, float[2] b =  {1,1}, float one =  {1}>
{
   [conv] d = Conv (x, w, b)
   [inv] y = Div (one, d)
}"""
    )
    assert report.skipped == {}
    assert_same_numbers(before, after, rtol=1e-6)


def test_the_groups_of_a_transposed_conv_each_get_their_channels() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[1,4,2,2] x) => (float[1,4,3,3] y)
        <float[4,2,1,1] w = {1, 1, 1, 1, 1, 1, 1, 1}, float[4,1,1] s = {2, 3, 5, 7}>
        {
            [conv] c = ConvTranspose <group = 2, strides = [2, 2]> (x, w)
            [mul]  y = Mul (c, s)
        }""",
        FoldMulIntoConv(),
    )
    assert (
        text(after)
        == """\
g (float[1,4,2,2] x) => (float[1,4,3,3] y)
   <float[4,2,1,1] w =  {2,3,2,3,5,7,5,7}>
{
   [conv] y = ConvTranspose <group: int = 2, strides: ints = [2, 2]> (x, w)
}"""
    )
    assert_same_numbers(before, after, rtol=1e-6)


def test_a_chain_of_two_is_folded_and_the_conv_stands_for_all() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {1, 2}, float s = {3}, float t = {2}>
        {
            [conv] c = Conv (x, w)
            [mul]  m = Mul (c, s)
            [mul2] y = Mul (t, m)
        }""",
        FoldMulIntoConv(),
    )
    assert (
        text(after)
        == """\
g (float[1,1,2,2] x) => (float[1,2,2,2] y)
   <float[2,1,1,1] w =  {6,12}>
{
   [conv] y = Conv (x, w)
}"""
    )
    assert report.merged == {"conv": ("conv", "mul", "mul2")}
    assert_same_numbers(before, after, rtol=1e-6)


def test_a_shared_bias_is_copied() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y, float[1,2,2,2] z)
        <float[2,1,1,1] w = {1, 2}, float[2,1,1,1] v = {1, 1}, float[2] b = {10, 20}, float s = {3}>
        {
            [conv]  c = Conv (x, w, b)
            [mul]   y = Mul (c, s)
            [other] z = Conv (x, v, b)
        }""",
        FoldMulIntoConv(),
    )
    assert (
        text(after)
        == """\
g (float[1,1,2,2] x) => (float[1,2,2,2] y, float[1,2,2,2] z)
   <float[2,1,1,1] w =  {3,6}, float[2] "conv.bias" =  {30,60}, float[2,1,1,1] v =  {1,1}, float[2] b =  {10,20}>
{
   [conv] y = Conv (x, w, "conv.bias")
   [other] z = Conv (x, v, b)
}"""
    )
    assert_same_numbers(before, after, rtol=1e-6)


def test_half_precision_is_folded_in_double_and_rounded_once() -> None:
    before, after, _ = rewrite(
        HEAD
        + f"""
        g (float16[1,1,2,2] x) => (float16[1,2,2,2] y)
        <float16[2,1,1,1] w = {half(1, 2)}, float16[2] b = {half(0.5, 1.5)},
         float16[2,1,1] s = {half(3, 0.125)}>
        {{
            [conv] c = Conv (x, w, b)
            [mul]  y = Mul (c, s)
        }}""",
        FoldMulIntoConv(),
    )
    weights, bias = map(onnx.numpy_helper.to_array, after.graph.initializer)
    assert weights.dtype == bias.dtype == np.float16
    assert weights.ravel().tolist() == [3, 0.25]
    assert bias.tolist() == [1.5, 0.1875]
    assert_same_numbers(before, after, rtol=2e-3, atol=1e-3)


def test_a_conv_in_a_body_is_folded_in_the_body() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x, bool p) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {1, 2}, float s = {3}>
        {
            [if] y = If (p) <
                then_branch = then () => (float[1,2,2,2] a) {
                    [conv] c = Conv (x, w)
                    [mul]  a = Mul (c, s)
                },
                else_branch = other () => (float[1,2,2,2] o) { o = Concat <axis = 1> (x, x) }
            >
        }""",
        FoldMulIntoConv(),
    )
    (branch,) = (a.g for a in after.graph.node[0].attribute if a.name == "then_branch")
    assert [node.op_type for node in branch.node] == ["Conv"]
    assert report.merged == {"conv": ("conv", "mul")}
    assert_same_numbers(before, after, rtol=1e-6)


def test_a_mul_in_a_body_is_not_folded_into_a_conv_outside() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x, bool p) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {1, 2}, float s = {3}>
        {
            [conv] c = Conv (x, w)
            [if] y = If (p) <
                then_branch = then () => (float[1,2,2,2] a) { [mul] a = Mul (c, s) },
                else_branch = other () => (float[1,2,2,2] o) { o = Concat <axis = 1> (x, x) }
            >
        }""",
        FoldMulIntoConv(),
    )
    assert report.rewritten == 0
    assert_same_numbers(before, after, rtol=0)


REFUSALS = {
    "the Conv output has another reader": """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y, float[1,2,2,2] z)
        <float[2,1,1,1] w = {1, 2}, float s = {3}>
        { [conv] c = Conv (x, w) [mul] y = Mul (c, s) [relu] z = Relu (c) }""",
    "the weights of the Conv are shared with another node": """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y, float[1,2,2,2] z)
        <float[2,1,1,1] w = {1, 2}, float s = {3}>
        { [conv] c = Conv (x, w) [mul] y = Mul (c, s) [other] z = Conv (x, w) }""",
    "the weights of the Conv are computed at run time": """
        g (float[1,1,2,2] x, float[2,1,1,1] w) => (float[1,2,2,2] y)
        <float s = {3}>
        { [conv] c = Conv (x, w) [mul] y = Mul (c, s) }""",
    "the bias of the Conv is computed at run time": """
        g (float[1,1,2,2] x, float[2] b) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {1, 2}, float s = {3}>
        { [conv] c = Conv (x, w, b) [mul] y = Mul (c, s) }""",
    "the constant has shape [2]: it is not one number per channel": """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {1, 2}, float[2] s = {3, 5}>
        { [conv] c = Conv (x, w) [mul] y = Mul (c, s) }""",
    "the constant has shape [2, 1, 1, 1]: it is not one number per channel": """
        g (float[1,1,2,2] x) => (float[2,2,2,2] y)
        <float[2,1,1,1] w = {1, 2}, float[2,1,1,1] s = {3, 5}>
        { [conv] c = Conv (x, w) [mul] y = Mul (c, s) }""",
    "the constant has shape [1, 1, 2, 1, 1]: it is not one number per channel": """
        g (float[1,1,2,2] x) => (float[1,1,2,2,2] y)
        <float[2,1,1,1] w = {1, 2}, float[1,1,2,1,1] s = {3, 5}>
        { [conv] c = Conv (x, w) [mul] y = Mul (c, s) }""",
    "the constant has shape [3, 1, 1]: it is not one number per channel": """
        g (float[1,1,2,2] x) => (float[1,3,2,2] y)
        <float[1,1,1,1] w = {1}, float[3,1,1] s = {3, 5, 7}>
        { [conv] c = Conv (x, w) [mul] y = Mul (c, s) }""",
    "the folded weights do not fit float16": f"""
        g (float16[1,1,2,2] x) => (float16[1,2,2,2] y)
        <float16[2,1,1,1] w = {half(1, 1000)}, float16 s = {half(100)}>
        {{ [conv] c = Conv (x, w) [mul] y = Mul (c, s) }}""",
    "the folded bias does not fit float16": f"""
        g (float16[1,1,2,2] x) => (float16[1,2,2,2] y)
        <float16[2,1,1,1] w = {half(1, 1)}, float16[2] b = {half(1, 1000)}, float16 s = {half(100)}>
        {{ [conv] c = Conv (x, w, b) [mul] y = Mul (c, s) }}""",
    "the folded weights do not fit float32": """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {1, 2}, float[2,1,1] s = {3, 0}>
        { [conv] c = Conv (x, w) [mul] y = Div (c, s) }""",
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_would_change_a_result_is_left_alone_with_the_reason(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optc.passes.linear.COPIED_BYTES", 0)
    before, after, report = rewrite(HEAD + REFUSALS[reason], FoldMulIntoConv())
    del before.graph.value_info[:]
    assert text(after) == text(before)
    assert report.rewritten == 0
    assert report.skipped == {"mul": reason}


def test_a_half_precision_channel_that_would_lose_its_digits_is_left_alone() -> None:
    _, _, report = rewrite(
        HEAD
        + f"""
        g (float16[1,1,2,2] x) => (float16[1,2,2,2] y)
        <float16[2,1,1,1] w = {half(1, 0.001)}, float16 s = {half(0.001)}>
        {{ [conv] c = Conv (x, w) [mul] y = Mul (c, s) }}""",
        FoldMulIntoConv(),
    )
    assert report.skipped == {"mul": "the folded weights do not fit float16"}


@pytest.mark.parametrize(
    ("dtype", "weights", "scale"),
    [
        ("float", "{1, 2}", "{3, 0}"),
        ("float16", half(1, 2), half(3, 0)),
        ("float", "{1, 2}", "{1, 1e-42}"),
    ],
)
def test_a_channel_scaled_to_nothing_is_folded(dtype: str, weights: str, scale: str) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g ({dtype}[1,1,2,2] x) => ({dtype}[1,2,2,2] y)
        <{dtype}[2,1,1,1] w = {weights}, {dtype}[2,1,1] s = {scale}>
        {{ [conv] c = Conv (x, w) [mul] y = Mul (c, s) }}""",
        FoldMulIntoConv(),
    )
    assert report.merged == {"conv": ("conv", "mul")}
    assert_same_numbers(before, after, rtol=1e-3, atol=1e-40)


def test_a_conv_output_that_the_caller_reads_or_that_is_a_partition_point_is_left_alone() -> None:
    outputs = "float[1,2,2,2] y, float[1,2,2,2] c"
    source = """
        g (float[1,1,2,2] x) => ({outputs})
        <float[2,1,1,1] w = {{1, 2}}, float s = {{3}}>
        {{ [conv] c = Conv (x, w) [mul] y = Mul (c, s) }}"""
    _, _, read = rewrite(HEAD + source.format(outputs=outputs), FoldMulIntoConv())
    assert read.skipped == {"mul": "the Conv output has another reader"}
    _, _, cut = rewrite(
        HEAD + source.format(outputs="float[1,2,2,2] y"), FoldMulIntoConv(), points=("c",)
    )
    assert cut.skipped == {"mul": "the Conv output has another reader"}


def test_weights_behind_a_dequantize_linear_are_computed_at_run_time() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y)
        <int8[2,1,1,1] q = {1, 2}, float step = {0.5}, float s = {3}>
        {
            [dq]   w = DequantizeLinear (q, step)
            [conv] c = Conv (x, w)
            [mul]  y = Mul (c, s)
        }""",
        FoldMulIntoConv(),
    )
    assert report.skipped == {"mul": "the weights of the Conv are computed at run time"}


def test_a_mul_of_two_results_or_with_another_operator_is_not_spoken_of() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y, float[1,1,2,2] z)
        <float[2,1,1,1] w = {1, 2}, float s = {3}>
        {
            [conv] c = Conv (x, w)
            [gate] h = Sigmoid (c)
            [mul]  y = Mul (c, h)
            [relu] r = Relu (x)
            [mul2] z = Mul (r, s)
        }""",
        FoldMulIntoConv(),
    )
    assert report.merged == report.skipped == {}


def test_a_scale_whose_result_is_rounded_stays() -> None:
    _, after, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,1,2,2] y) <float[1,1,1,1] w = {2}, float s = {0.125}>
        {
            [conv] c = Conv (x, w)
            [div]  d = Div (c, s)
            [step] y = Round (d)
        }""",
        FoldMulIntoConv(),
    )
    assert len(after.graph.node) == 3
    assert "its result is rounded" in report.skipped["div"]
