"""`fold-batchnorm-before-conv`: the rule, and what is left alone."""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text

from optc.passes.fold_batchnorm_before_conv import FoldBatchnormBeforeConv

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
STATISTICS = """float[2] gamma = {2, 3}, float[2] beta = {5, 7}, float[2] mean = {1, 2},
                float[2] var = {0.75, 0.75}"""  # with epsilon 0.25 the spread is 1
NORM = "[norm] n = BatchNormalization <epsilon = 0.25> (x, gamma, beta, mean, var)"


def test_scale_and_shift_go_into_the_weights_and_biases_of_all_convs_behind_it() -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,2,3,3] x) => (float[N,1,3,3] y, float[N,1,1,1] z)
        <float[1,2,1,1] w = {{1, 2}}, float[1,2,3,3] u = {{1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2,
         2, 2, 2, 2, 2}}, float[1] b = {{10}}, {STATISTICS}>
        {{ {NORM} [near] y = Conv (n, w, b) [far] z = Conv (n, u) }}""",
        FoldBatchnormBeforeConv(),
    )
    assert (
        text(after)
        == """\
g (float[N,2,3,3] x) => (float[N,1,3,3] y, float[N,1,1,1] z)
   <float[1,2,1,1] w =  {2,6}, float[1] b =  {15}, float[1,2,3,3] u =  \
{2,2,2,2,2,2,2,2,2,6,6,6,6,6,6,6,6,6}, float[1] "far.bias" =  {45}>
{
   [near] y = Conv (x, w, b)
   [far] z = Conv (x, u, "far.bias")
}"""
    )
    assert report.merged == {"near": ("norm", "near"), "far": ("norm", "far")}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


REFUSALS = {
    "not every output of the Conv sees all of the kernel": "Conv <pads = [1, 1, 1, 1]> (n, w)",
    "not every output of the ConvTranspose sees all of the kernel": "ConvTranspose (n, w)",
    "the BatchNormalization output has another reader": "Relu (n)",
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_one_reader_that_cannot_take_it_leaves_it_alone_for_all(reason: str) -> None:
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,2,3,3] x) => (float[N,2,3,3] y, float[N,c,h,v] z)
        <float[2,2,1,1] w = {{1, 2, 3, 4}}, {STATISTICS}>
        {{ {NORM} [near] y = Conv (n, w) [far] z = {REFUSALS[reason]} }}""",
        FoldBatchnormBeforeConv(),
    )
    assert list(after.graph.node) == list(before.graph.node)
    assert report.rewritten == 0
    assert report.skipped == {"norm": reason}
