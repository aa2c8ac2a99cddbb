"""Scales and shifts behind convolutions whose weights are all the same number."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import assert_same_numbers, rewrite, text
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.passes.fold_affine_into_filled_conv import FoldAffineIntoFilledConv

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
NORM = "BatchNormalization <epsilon = 0.0>"


def test_the_number_is_multiplied_and_the_weights_stay_small() -> None:
    before, after, report = rewrite(
        f"""{HEAD} g (float[N,3,4,4] x) => (float[N,2,4,4] y)
        <int64[4] s = {{2, 3, 1, 1}}, float[2] gamma = {{6, 6}}, float[2] beta = {{1, 2}},
         float[2] mean = {{1, 0}}, float[2] var = {{4, 4}}>
        {{
            [fill] w = ConstantOfShape <value = float[1] {{2}}> (s)
            [conv] c = Conv (x, w)
            [norm] y = {NORM} (c, gamma, beta, mean, var)
        }}""",
        FoldAffineIntoFilledConv(),
    )
    assert [node.op_type for node in after.graph.node] == ["ConstantOfShape", "Conv"]
    fill = onnx.numpy_helper.to_array(after.graph.node[0].attribute[0].t)
    assert fill.tolist() == [6]
    assert '"conv.bias" =  {-2,2}' in text(after)
    assert report.merged["conv"] == ("conv", "norm")
    assert_same_numbers(before, after, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("bias", ["", ", b"])
@pytest.mark.parametrize(
    "follower", ["Mul (c, k)", "Mul (k, c)", "Div (c, k)", "Add (c, v)", "Sub (v, c)", "Neg (c)"]
)
def test_each_operator_that_scales_or_shifts(bias: str, follower: str) -> None:
    before, after, _ = rewrite(
        f"""{HEAD} g (float[1,4,5,5] x) => (float[1,2,4,4] y)
        <int64[4] s = {{2, 2, 2, 2}}, float[2] b = {{1, 3}}, float k = {{2}},
         float[2,1,1] v = {{5, 7}}>
        {{
            w = ConstantOfShape <value = float[1] {{0.5}}> (s)
            c = Conv <group = 2> (x, w{bias})
            y = {follower}
        }}""",
        FoldAffineIntoFilledConv(),
    )
    assert [node.op_type for node in after.graph.node] == ["ConstantOfShape", "Conv"]
    assert_same_numbers(before, after, rtol=1e-6, atol=1e-6)


def test_another_reader_of_the_weights_keeps_them() -> None:
    before, after, _ = rewrite(
        f"""{HEAD} g (float[1,3,4,4] x) => (float[1,2,4,4] y, float[1,2,4,4] z)
        <int64[4] s = {{2, 3, 1, 1}}, float k = {{3}}>
        {{
            w = ConstantOfShape <value = float[1] {{2}}> (s)
            c = Conv (x, w) y = Mul (c, k) z = Conv (x, w)
        }}""",
        FoldAffineIntoFilledConv(),
    )
    assert [node.op_type for node in after.graph.node].count("ConstantOfShape") == 2
    assert_same_numbers(before, after, rtol=1e-6, atol=1e-5)


SCALED = """
    <int64[4] s = {2, 3, 1, 1}, float[2,1,1] v = {3, 4}>
    { w = ConstantOfShape <value = float[1] {2}> (s) c = Conv (x, w) y = Mul (c, v) }"""


def test_few_weights_are_stored_where_the_scale_tells_them_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = f"{HEAD} g (float[1,3,4,4] x) => (float[1,2,4,4] y) {SCALED}"
    before, after, _ = rewrite(source, FoldAffineIntoFilledConv())
    (conv,) = after.graph.node
    (stored,) = (t for t in after.graph.initializer if t.name == conv.input[1])
    assert onnx.numpy_helper.to_array(stored).reshape(2, 3).tolist() == [[6] * 3, [8] * 3]
    assert_same_numbers(before, after, rtol=1e-6, atol=1e-5)
    monkeypatch.setattr("optc.passes.fold_affine_into_filled_conv.STORED_BYTES", 23)
    _, _, report = rewrite(source, FoldAffineIntoFilledConv())
    assert list(report.skipped.values()) == ["the scale is not the same for all channels"]


LEFT = {
    "another reader": ("y = Mul (c, k) z = Relu (c)", "the Conv output has another reader"),
    "kept": ("y = Mul (c, k) z = Identity (y)", None),
    "too large": ("y = Mul (c, large)", "the folded numbers do not fit float32"),
    "over space": ("y = Mul (c, m)", "the constant has shape [4, 4]: it is not one number"),
}


@pytest.mark.parametrize(("nodes", "reason"), LEFT.values(), ids=LEFT)
def test_what_is_left_alone(nodes: str, reason: str | None) -> None:
    outputs = ", float[1,2,4,4] c" if reason is None else ""
    numbers = ", ".join("1" * 16)
    _, _, report = rewrite(
        f"""{HEAD} g (float[1,3,4,4] x) => (float[1,2,4,4] y{outputs})
        <int64[4] s = {{2, 3, 1, 1}}, float k = {{3}},
         float large = {{3e38}}, float[4,4] m = {{{numbers}}}>
        {{ w = ConstantOfShape <value = float[1] {{2}}> (s) c = Conv (x, w) {nodes} }}""",
        FoldAffineIntoFilledConv(),
    )
    assert not report.rewritten
    expected = "the Conv output has another reader" if reason is None else reason
    assert all(expected in skipped for skipped in report.skipped.values())
    assert report.skipped


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(1, 1), (2, 3), (4, 2)]),
    st.integers(1, 3),
    st.sampled_from([1, 2]),
    st.floats(-4, 4, width=16),
    st.lists(st.floats(-4, 4, width=16), min_size=4, max_size=4),
)
def test_any_shape_and_any_number(
    channels: tuple[int, int], kernel: int, groups: int, fill: float, numbers: list[float]
) -> None:
    outputs, inputs = channels[0] * groups, channels[1]
    gamma, beta, mean, var = numbers

    def all_(value: float) -> str:
        return "{" + ", ".join([repr(float(np.float32(value)))] * outputs) + "}"

    before, after, report = rewrite(
        f"""{HEAD} g (float[2,{inputs * groups},4,5] x) => (float[2,{outputs},h,w] y)
        <int64[4] s = {{{outputs}, {inputs}, {kernel}, {kernel}}}, float[{outputs}] a = {all_(gamma)},
         float[{outputs}] b = {all_(beta)}, float[{outputs}] m = {all_(mean)},
         float[{outputs}] v = {all_(abs(var) + 0.5)}>
        {{
            f = ConstantOfShape <value = float[1] {{{fill!r}}}> (s)
            c = Conv <group = {groups}, pads = [1, 0, 1, 0]> (x, f)
            y = BatchNormalization (c, a, b, m, v)
        }}""",
        FoldAffineIntoFilledConv(),
    )
    assert report.rewritten or report.skipped
    assert_same_numbers(before, after, rtol=1e-4, atol=1e-3)
