"""`fold-add-into-conv`: each rule, each refusal, and where the pattern stands."""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.fold_add_into_conv import FoldAddIntoConv

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def test_a_shift_per_channel_is_added_to_the_bias() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {1, 2}, float[2] b = {10, 20}, float[2,1,1] t = {3, 5}>
        {
            [conv] c = Conv (x, w, b)
            [add]  y = Add (c, t)
        }""",
        FoldAddIntoConv(),
    )
    assert (
        text(after)
        == """\
g (float[1,1,2,2] x) => (float[1,2,2,2] y)
   <float[2,1,1,1] w =  {1,2}, float[2] b =  {13,25}>
{
   [conv] y = Conv (x, w, b)
}"""
    )
    assert report.merged == {"conv": ("conv", "add")}
    assert_same_numbers(before, after, rtol=1e-6)


@pytest.mark.parametrize(
    ("operator", "operands", "weights", "bias"),
    [
        ("Add", "c, t", "1,2", "3,5"),
        ("Add", "t, c", "1,2", "3,5"),
        ("Sub", "c, t", "1,2", "-3,-5"),
        ("Sub", "t, c", "-1,-2", "3,5"),
    ],
)
def test_a_conv_with_no_bias_gets_one_in_either_order(
    operator: str, operands: str, weights: str, bias: str
) -> None:
    before, after, _ = rewrite(
        HEAD
        + f"""
        g (float[N,1,2,2] x) => (float[N,2,2,2] y)
        <float[2,1,1,1] w = {{1, 2}}, float[1,2,1,1] t = {{3, 5}}>
        {{
            [conv] c = Conv (x, w)
            [node] y = {operator} ({operands})
        }}""",
        FoldAddIntoConv(),
    )
    assert (
        text(after)
        == f"""\
g (float[N,1,2,2] x) => (float[N,2,2,2] y)
   <float[2,1,1,1] w =  {{{weights}}}, float[2] "conv.bias" =  {{{bias}}}>
{{
   [conv] y = Conv (x, w, "conv.bias")
}}"""
    )
    assert_same_numbers(before, after, rtol=1e-6)


def test_weights_that_others_share_stay_shared() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y, float[1,2,2,2] z)
        <float[2,1,1,1] w = {1, 2}, float t = {3}>
        {
            [conv]  c = Conv (x, w)
            [add]   y = Add (c, t)
            [other] z = Conv (x, w)
        }""",
        FoldAddIntoConv(),
    )
    assert (
        text(after)
        == """\
g (float[1,1,2,2] x) => (float[1,2,2,2] y, float[1,2,2,2] z)
   <float[2,1,1,1] w =  {1,2}, float[2] "conv.bias" =  {3,3}>
{
   [conv] y = Conv (x, w, "conv.bias")
   [other] z = Conv (x, w)
}"""
    )
    assert report.skipped == {}
    assert_same_numbers(before, after, rtol=1e-6)


def test_the_bias_of_a_deformable_conv_is_its_fourth_input() -> None:
    before, after, _ = rewrite(
        '<ir_version: 9, opset_import: ["" : 19]>'
        + """
        g (float[1,1,2,2] x, float[1,2,2,2] o, float[1,1,2,2] m) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {1, 2}, float[2,1,1] t = {3, 5}>
        {
            [conv] c = DeformConv (x, w, o, , m)
            [add]  y = Add (c, t)
        }""",
        FoldAddIntoConv(),
    )
    assert (
        text(after)
        == """\
g (float[1,1,2,2] x, float[1,2,2,2] o, float[1,1,2,2] m) => (float[1,2,2,2] y)
   <float[2,1,1,1] w =  {1,2}, float[2] "conv.bias" =  {3,5}>
{
   [conv] y = DeformConv (x, w, o, "conv.bias", m)
}"""
    )
    assert_same_numbers(before, after, rtol=1e-6)


REFUSALS = {
    "the Conv output has another reader": """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y, float[1,2,2,2] c)
        <float[2,1,1,1] w = {1, 2}, float t = {3}>
        { [conv] c = Conv (x, w) [add] y = Add (c, t) }""",
    "the weights of the Conv are shared with another node": """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y, float[1,2,2,2] z)
        <float[2,1,1,1] w = {1, 2}, float t = {3}>
        { [conv] c = Conv (x, w) [add] y = Sub (t, c) [other] z = Conv (x, w) }""",
    "the bias of the Conv is computed at run time": """
        g (float[1,1,2,2] x, float[2] b) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {1, 2}, float t = {3}>
        { [conv] c = Conv (x, w, b) [add] y = Add (c, t) }""",
    "the constant has shape [1, 2, 2, 2]: it is not one number per channel": """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {1, 2}, float[1,2,2,2] t = {1, 2, 3, 4, 5, 6, 7, 8}>
        { [conv] c = Conv (x, w) [add] y = Add (c, t) }""",
    "the folded bias does not fit float32": """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {1, 2}, float[2] b = {3e38, 1}, float t = {3e38}>
        { [conv] c = Conv (x, w, b) [add] y = Add (c, t) }""",
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_would_change_a_result_is_left_alone_with_the_reason(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optc.passes.linear.COPIED_BYTES", 0)
    before, after, report = rewrite(HEAD + REFUSALS[reason], FoldAddIntoConv())
    del before.graph.value_info[:]
    assert text(after) == text(before)
    assert report.rewritten == 0
    assert report.skipped == {"add": reason}


def test_a_sum_of_two_results_is_not_spoken_of() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (float[1,2,2,2] x) => (float[1,2,2,2] y)
        <float[2,2,1,1] w = {1, 2, 3, 4}>
        { [conv] c = Conv (x, w) [add] y = Add (c, x) }""",
        FoldAddIntoConv(),
    )
    assert report.merged == report.skipped == {}
