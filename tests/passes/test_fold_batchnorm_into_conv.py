"""`fold-batchnorm-into-conv`: each rule, each refusal, and where the pattern stands.

With epsilon 0 and these variances the scale is whole: gamma / sqrt(var) = {6, 6} / {2, 3} = {3, 2},
and the shift is beta - mean * scale = {1, 2} - {1, 4} * {3, 2} = {-2, -6}.
"""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.fold_batchnorm_into_conv import FoldBatchnormIntoConv

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
STATISTICS = (
    "float[2] gamma = {6, 6}, float[2] beta = {1, 2}, float[2] mean = {1, 4}, float[2] var = {4, 9}"
)


@pytest.mark.parametrize(
    ("opset", "attributes"),
    [
        (7, "epsilon = 0.0, momentum = 0.1"),
        (8, "epsilon = 0.0, spatial = 1"),
        (9, "epsilon = 0.0"),
        (17, "epsilon = 0.0, training_mode = 0"),
        (23, "epsilon = 0.0"),
    ],
)
def test_a_batchnorm_behind_a_conv_is_folded_at_every_opset(opset: int, attributes: str) -> None:
    before, after, report = rewrite(
        f'<ir_version: 8, opset_import: ["" : {opset}]>'
        + f"""
        g (float[N,1,2,2] x) => (float[N,2,2,2] y)
        <float[2,1,1,1] w = {{1, 2}}, float[2] b = {{10, 20}}, {STATISTICS}>
        {{
            [conv] c = Conv (x, w, b)
            [norm] y = BatchNormalization <{attributes}> (c, gamma, beta, mean, var)
        }}""",
        FoldBatchnormIntoConv(),
    )
    assert (
        text(after)
        == """\
g (float[N,1,2,2] x) => (float[N,2,2,2] y)
   <float[2,1,1,1] w =  {3,4}, float[2] b =  {28,34}>
{
   [conv] y = Conv (x, w, b)
}"""
    )
    assert report.merged == {"conv": ("conv", "norm")}
    assert_same_numbers(before, after, rtol=1e-6)


def test_a_conv_with_no_bias_gets_one_and_epsilon_counts() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[1,1,2,2] x) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {1, 2}, float[2] gamma = {6, 6}, float[2] beta = {1, 2},
         float[2] mean = {1, 4}, float[2] var = {3, 8}>
        {
            [conv] c = Conv (x, w)
            [norm] y = BatchNormalization <epsilon = 1.0> (c, gamma, beta, mean, var)
        }""",
        FoldBatchnormIntoConv(),
    )
    assert (
        text(after)
        == """\
g (float[1,1,2,2] x) => (float[1,2,2,2] y)
   <float[2,1,1,1] w =  {3,4}, float[2] "conv.bias" =  {-2,-6}>
{
   [conv] y = Conv (x, w, "conv.bias")
}"""
    )
    assert_same_numbers(before, after, rtol=1e-6, atol=1e-6)


def test_a_transposed_conv_in_groups_is_folded() -> None:
    before, after, _ = rewrite(
        HEAD
        + f"""
        g (float[1,4,2,2] x) => (float[1,2,3,3] y)
        <float[4,1,1,1] w = {{1, 1, 1, 1}}, {STATISTICS}>
        {{
            [conv] c = ConvTranspose <group = 2, strides = [2, 2]> (x, w)
            [norm] y = BatchNormalization <epsilon = 0.0> (c, gamma, beta, mean, var)
        }}""",
        FoldBatchnormIntoConv(),
    )
    assert (
        text(after)
        == """\
g (float[1,4,2,2] x) => (float[1,2,3,3] y)
   <float[4,1,1,1] w =  {3,3,2,2}, float[2] "conv.bias" =  {-2,-6}>
{
   [conv] y = ConvTranspose <group: int = 2, strides: ints = [2, 2]> (x, w, "conv.bias")
}"""
    )
    assert_same_numbers(before, after, rtol=1e-5)


def test_a_deformable_conv_is_folded() -> None:
    before, after, _ = rewrite(
        '<ir_version: 9, opset_import: ["" : 19]>'
        + f"""
        g (float[1,1,2,2] x, float[1,2,2,2] o) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {{1, 2}}, {STATISTICS}>
        {{
            [conv] c = DeformConv (x, w, o)
            [norm] y = BatchNormalization <epsilon = 0.0> (c, gamma, beta, mean, var)
        }}""",
        FoldBatchnormIntoConv(),
    )
    assert (
        text(after)
        == """\
g (float[1,1,2,2] x, float[1,2,2,2] o) => (float[1,2,2,2] y)
   <float[2,1,1,1] w =  {3,4}, float[2] "conv.bias" =  {-2,-6}>
{
   [conv] y = DeformConv (x, w, o, "conv.bias")
}"""
    )
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


def test_small_weights_that_others_share_are_copied() -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[1,1,2,2] x) => (float[1,2,2,2] y, float[1,2,2,2] z, float[1,2,2,2] a)
        <float[2,1,1,1] w = {{1, 2}}, {STATISTICS}, float[2] other = {{1, 1}}>
        {{
            [one] c = Conv (x, w) [norm] y = BatchNormalization (c, gamma, beta, mean, var)
            [two] d = Conv (x, w) [last] z = BatchNormalization (d, other, beta, mean, var)
            [three] a = Conv (x, w)
        }}""",
        FoldBatchnormIntoConv(),
    )
    assert [node.op_type for node in after.graph.node] == ["Conv"] * 3
    assert len({node.input[1] for node in after.graph.node}) == 3
    assert after.graph.node[2].input[1] == "w"
    assert set(report.merged) == {"one", "two"}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


def test_statistics_that_others_share_are_only_read() -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[1,1,2,2] x) => (float[1,2,2,2] y, float[1,2,2,2] z)
        <float[2,1,1,1] w = {{1, 2}}, float[2,1,1,1] v = {{3, 4}}, {STATISTICS}>
        {{
            [conv]  c = Conv (x, w)
            [norm]  y = BatchNormalization <epsilon = 0.0> (c, gamma, beta, mean, var)
            [conv2] d = Conv (x, v)
            [norm2] z = BatchNormalization <epsilon = 0.0> (d, gamma, beta, mean, var)
        }}""",
        FoldBatchnormIntoConv(),
    )
    assert (
        text(after)
        == """\
g (float[1,1,2,2] x) => (float[1,2,2,2] y, float[1,2,2,2] z)
   <float[2,1,1,1] w =  {3,4}, float[2] "conv.bias" =  {-2,-6}, float[2,1,1,1] v =  {9,8}, float[2] "conv2.bias" =  {-2,-6}>
{
   [conv] y = Conv (x, w, "conv.bias")
   [conv2] z = Conv (x, v, "conv2.bias")
}"""
    )
    assert report.merged == {"conv": ("conv", "norm"), "conv2": ("conv2", "norm2")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


def test_half_precision_weights_with_float_statistics_are_folded() -> None:
    before, after, _ = rewrite(
        HEAD
        + f"""
        g (float16[1,1,2,2] x) => (float16[1,2,2,2] y)
        <float16[2,1,1,1] w = {{15360, 16384}}, {STATISTICS}>
        {{
            [conv] c = Conv (x, w)
            [norm] y = BatchNormalization <epsilon = 0.0> (c, gamma, beta, mean, var)
        }}""",  # 15360 and 16384 are the bits of 1 and 2
        FoldBatchnormIntoConv(),
    )
    assert (
        text(after)
        == """\
g (float16[1,1,2,2] x) => (float16[1,2,2,2] y)
   <float16[2,1,1,1] w =  {16896,17408}, float16[2] "conv.bias" =  {49152,50688}>
{
   [conv] y = Conv (x, w, "conv.bias")
}"""  # the bits of 3, 4, -2 and -6
    )
    assert before.graph.node[1].op_type == "BatchNormalization"


def test_one_behind_something_else_stays_and_is_not_spoken_of() -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[1,2,2,2] x) => (float[1,2,2,2] y)
        <{STATISTICS}>
        {{
            [relu] r = Relu (x)
            [norm] y = BatchNormalization (r, gamma, beta, mean, var)
        }}""",
        FoldBatchnormIntoConv(),
    )
    assert [node.op_type for node in after.graph.node] == ["Relu", "BatchNormalization"]
    assert report.merged == report.skipped == {}
    assert_same_numbers(before, after, rtol=0)


def graph(
    norm: str = "y = BatchNormalization (c, gamma, beta, mean, var)",
    inputs: str = "float[1,1,2,2] x",
    outputs: str = "float[1,2,2,2] y",
    statistics: str = STATISTICS,
    conv: str = "[conv] c = Conv (x, w)",
) -> str:
    return f"""
        g ({inputs}) => ({outputs})
        <float[2,1,1,1] w = {{1, 2}}, {statistics}>
        {{ {conv} [norm] {norm} }}"""


TRAINING = "the BatchNormalization is in training mode: it normalises by its own input"
REFUSALS = [
    (
        "the Conv output has another reader",
        17,
        graph(outputs="float[1,2,2,2] y, float[1,2,2,2] c"),
    ),
    (
        "the weights of the Conv are shared with another node",
        17,
        graph(
            conv="[conv] c = Conv (x, w) [other] z = Conv (x, w)",
            outputs="float[1,2,2,2] y, float[1,2,2,2] z",
        ),
    ),
    (
        "the statistics of the BatchNormalization are computed at run time",
        17,
        graph(
            inputs="float[1,1,2,2] x, float[2] var",
            statistics=STATISTICS.replace(", float[2] var = {4, 9}", ""),
        ),
    ),
    (
        TRAINING,
        17,
        graph(norm="y, m, v = BatchNormalization <training_mode = 1> (c, gamma, beta, mean, var)"),
    ),
    (TRAINING, 9, graph(norm="y, m, v, s, t = BatchNormalization (c, gamma, beta, mean, var)")),
    (
        "the BatchNormalization has statistics for each position (spatial=0)",
        8,
        graph(norm="y = BatchNormalization <spatial = 0> (c, gamma, beta, mean, var)"),
    ),
    (
        "a variance of the BatchNormalization is negative or not a number",
        17,
        graph(statistics=STATISTICS.replace("{4, 9}", "{4, -9}")),
    ),
    (
        "the folded weights do not fit float32",
        17,
        graph(
            statistics=STATISTICS.replace("gamma = {6, 6}", "gamma = {6, 3e38}")
            .replace("mean = {1, 4}", "mean = {1, 0}")
            .replace("var = {4, 9}", "var = {4, 0}")
        ),
    ),
]


@pytest.mark.parametrize(("reason", "opset", "source"), REFUSALS)
def test_what_would_change_a_result_is_left_alone_with_the_reason(
    reason: str, opset: int, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optc.passes.linear.COPIED_BYTES", 0)
    before, after, report = rewrite(
        f'<ir_version: 8, opset_import: ["" : {opset}]>' + source, FoldBatchnormIntoConv()
    )
    del before.graph.value_info[:]
    assert text(after) == text(before)
    assert report.rewritten == 0
    assert report.skipped == {"norm": reason}
