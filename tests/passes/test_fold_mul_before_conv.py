"""`fold-mul-before-conv`: each rule, each refusal, and where the pattern stands."""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.fold_mul_before_conv import FoldMulBeforeConv

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


@pytest.mark.parametrize("operands", ["x, s", "s, x"])
def test_a_scale_per_input_channel_goes_into_the_weights(operands: str) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,2,2,2] x) => (float[N,2,4,4] y)
        <float[2,2,1,1] w = {{1, 2, 3, 4}}, float[2] b = {{10, 20}}, float[1,2,1,1] s = {{3, 5}}>
        {{
            [mul]  m = Mul ({operands})
            [conv] y = Conv <pads = [1, 1, 1, 1]> (m, w, b)
        }}""",
        FoldMulBeforeConv(),
    )
    assert (
        text(after)
        == """\
g (float[N,2,2,2] x) => (float[N,2,4,4] y)
   <float[2,2,1,1] w =  {3,10,9,20}, float[2] b =  {10,20}>
{
   [conv] y = Conv <pads: ints = [1, 1, 1, 1]> (x, w, b)
}"""
    )
    assert report.merged == {"conv": ("mul", "conv")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_a_division_goes_into_each_group_of_a_conv() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[N,4,2,2] x) => (float[N,2,2,2] y)
        <float[2,2,1,1] w = {2, 6, 20, 42}, float[4,1,1] s = {2, 3, 5, 7}>
        {
            [div]  m = Div (x, s)
            [conv] y = Conv <group = 2> (m, w)
        }""",
        FoldMulBeforeConv(),
    )
    assert "float[2,2,1,1] w =  {1,2,4,6}" in text(after)
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_a_transposed_conv_in_groups_takes_it_along_its_first_axis() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[N,4,2,2] x) => (float[N,2,3,3] y)
        <float[4,1,1,1] w = {1, 1, 1, 1}, float[4,1,1] s = {2, 3, 5, 7}>
        {
            [mul]  m = Mul (x, s)
            [conv] y = ConvTranspose <group = 2, strides = [2, 2]> (m, w)
        }""",
        FoldMulBeforeConv(),
    )
    assert "float[4,1,1,1] w =  {2,3,5,7}" in text(after)
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


ENLARGES = "the Mul makes what it reads larger, or may do so"
REFUSALS = [
    (
        "the Mul output has another reader",
        """
        g (float[1,1,2,2] x) => (float[1,1,2,2] y, float[1,1,2,2] m)
        <float s = {3}, float[1,1,1,1] w = {1}>""",
    ),
    (
        "the weights of the Conv are computed at run time",
        """
        g (float[1,1,2,2] x, float[1,1,1,1] w) => (float[1,1,2,2] y)
        <float s = {3}>""",
    ),
    (
        ENLARGES,  # one channel becomes two
        """
        g (float[1,1,2,2] x) => (float[1,1,2,2] y)
        <float[2,1,1] s = {3, 5}, float[1,2,1,1] w = {1, 2}>""",
    ),
    (
        ENLARGES,  # a new axis
        """
        g (float[2,2,2] x) => (float[1,1,2,2] y)
        <float[1,2,1,1] s = {3, 5}, float[1,2,1,1] w = {1, 2}>""",
    ),
    (
        ENLARGES,  # that may be one channel
        """
        g (float[1,C,2,2] x) => (float[1,1,2,2] y)
        <float[1,2,1,1] s = {3, 5}, float[1,2,1,1] w = {1, 2}>""",
    ),
    (
        "the constant has shape [2, 2]: it is not one number per channel",
        """
        g (float[1,1,2,2] x) => (float[1,1,2,2] y)
        <float[2,2] s = {1, 2, 3, 4}, float[1,1,1,1] w = {1}>""",
    ),
]


@pytest.mark.parametrize(("reason", "head"), REFUSALS)
def test_what_would_change_a_result_is_left_alone_with_the_reason(reason: str, head: str) -> None:
    source = head + "{ [mul] m = Mul (x, s) [conv] y = Conv (m, w) }"
    before, after, report = rewrite(HEAD + source, FoldMulBeforeConv())
    del before.graph.value_info[:]
    assert text(after) == text(before)
    assert report.rewritten == 0
    assert report.skipped == {"mul": reason}


def test_weights_that_others_share_are_left_alone() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,1,2,2] y, float[1,1,2,2] z)
        <float[1,1,1,1] w = {1}, float s = {3}>
        { [mul] m = Mul (x, s) [conv] y = Conv (m, w) [other] z = Conv (x, w) }""",
        FoldMulBeforeConv(),
    )
    assert report.skipped == {"mul": "the weights of the Conv are shared with another node"}


def test_a_mul_outside_is_not_folded_into_a_conv_in_a_body() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x, bool p) => (float[1,1,2,2] y)
        <float[1,1,1,1] w = {2}, float s = {3}>
        {
            [mul] m = Mul (x, s)
            [if] y = If (p) <
                then_branch = then () => (float[1,1,2,2] a) { [conv] a = Conv (m, w) },
                else_branch = other () => (float[1,1,2,2] o) { o = Relu (x) }
            >
        }""",
        FoldMulBeforeConv(),
    )
    assert report.rewritten == 0
    assert_same_numbers(before, after, rtol=0)


def test_what_makes_the_weights_is_not_taken_for_what_makes_the_input() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x, float[1,1,1,1] v) => (float[1,1,2,2] y)
        <float s = {3}>
        { [mul] w = Mul (v, s) [conv] y = Conv (x, w) }""",
        FoldMulBeforeConv(),
    )
    assert report.merged == report.skipped == {}


@pytest.mark.parametrize(
    ("node", "addend"),
    [("a = Add (t, m)", "2,4"), ("a = Sub (m, t)", "2,4"), ("a = Sub (t, m)", "2,4")],
)
def test_an_add_that_cannot_be_folded_lets_the_scale_pass(node: str, addend: str) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,2,2,2] x) => (float[N,1,4,4] y)
        <float[1,2,1,1] w = {{1, 2}}, float[2,1,1] s = {{3, 5}}, float[2,1,1] t = {{6, 20}}>
        {{
            [mul]  m = Mul (x, s)
            [add]  {node}
            [conv] y = Conv <pads = [1, 1, 1, 1]> (a, w)
        }}""",
        FoldMulBeforeConv(),
    )
    assert "float[1,2,1,1] w =  {3,10}" in text(after)
    assert f'float[2,1,1] "add.addend" =  {{{addend}}}' in text(after)
    assert len(after.graph.node) == 2
    assert report.merged == {"conv": ("mul", "conv")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("reason", "scale", "shift", "outputs"),
    [
        ("what the Add would add does not fit float", "0", "1", ""),
        ("what the Add would add does not fit float", "1e-30", "1e8", ""),
        ("what the Add would add does not fit float", "1e30", "1e-20", ""),
        ("the Add output has another reader", "2", "1", ", float[1,1,2,2] a"),
    ],
)
def test_a_scale_that_no_sum_can_do_without_is_left_alone(
    reason: str, scale: str, shift: str, outputs: str
) -> None:
    _, _, report = rewrite(
        HEAD
        + f"""
        g (float[1,1,2,2] x) => (float[1,1,4,4] y{outputs})
        <float[1,1,1,1] w = {{1}}, float s = {{{scale}}}, float t = {{{shift}}}>
        {{
            [mul] m = Mul (x, s)
            [add] a = Add (m, t)
            [conv] y = Conv <pads = [1, 1, 1, 1]> (a, w)
        }}""",
        FoldMulBeforeConv(),
    )
    assert report.rewritten == 0
    assert report.skipped["mul"].startswith(reason)


def test_a_product_in_a_sum_that_others_read_is_left_alone() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,1,4,4] y, float[1,1,2,2] m)
        <float[1,1,1,1] w = {1}, float s = {2}, float t = {1}>
        { [mul] m = Mul (x, s) a = Add (m, t) [conv] y = Conv <pads = [1, 1, 1, 1]> (a, w) }""",
        FoldMulBeforeConv(),
    )
    assert report.rewritten == 0
    assert report.skipped == {"mul": "the Mul output has another reader"}
