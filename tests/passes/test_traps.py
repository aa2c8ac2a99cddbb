"""What has broken models in other optimisers, each through all of the passes at once."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import parsed, run, seeded_inputs
from onnx import ModelProto, numpy_helper

import optc

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def optimised(model: ModelProto, dynamic: int = 2) -> ModelProto:
    """Return what all passes make of ``model``, checked and held against it."""
    after, _ = optc.optimize(model)
    onnx.checker.check_model(after, full_check=True)
    inputs = seeded_inputs(model, dynamic=dynamic)
    expected, found = run(model, inputs), run(after, inputs)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        assert found[name].dtype == value.dtype
    return after


@pytest.mark.parametrize("rows", [2, 5])
def test_a_wrong_shape_that_an_output_declares_is_not_believed(rows: int) -> None:
    model = onnx.parser.parse_model(
        HEAD
        + """
        g (float[n,6] x) => (float[1,3] y) <int64[2] three = {-1, 3}>
        {
            s = Shape (x)
            a = Relu (x)
            y = Reshape (a, three)
        }"""
    )
    after, _ = optc.optimize(model)
    x = {"x": np.random.default_rng(0).standard_normal((rows, 6)).astype(np.float32)}
    assert run(after, x)["y"].shape == (2 * rows, 3)
    np.testing.assert_array_equal(run(after, x)["y"], run(model, x)["y"])


def test_what_a_branch_captures_stands_before_it_when_it_is_inlined() -> None:
    model = parsed(
        HEAD
        + """
        g (float[n,4] x) => (float[n,4] y) <bool yes = {1}, float[4] w = {1, 2, 3, 4}>
        {
            late = Mul (x, w)
            a = If (yes) <
              then_branch = t () => (float[n,4] p) { p = Sub (late, w) },
              else_branch = e () => (float[n,4] q) { q = Add (late, late) }>
            y = Exp (a)
        }"""
    )
    assert not any(node.op_type == "If" for node in optimised(model).graph.node)


def test_a_captured_name_is_renamed_inside_bodies_too() -> None:
    model = parsed(
        HEAD
        + """
        g (float[n,4] x, bool c) => (float[n,4] y)
        {
            same = Identity (x)
            twice = Identity (same)
            y = If (c) <
              then_branch = t () => (float[n,4] p) { p = Relu (twice) },
              else_branch = e () => (float[n,4] q) { q = Neg (twice) }>
        }"""
    )
    after = optimised(model)
    assert [node.op_type for node in after.graph.node] == ["If"]


@pytest.mark.parametrize("opset", [7, 13])
def test_no_allowzero_is_written_into_an_opset_that_has_none(opset: int) -> None:
    model = parsed(
        f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        g (float[n,2,3] x) => (float[n,6] y) <int64[3] a = {{0, 3, 2}}, int64[2] b = {{0, -1}}>
        {{
            r = Reshape (x, a)
            t = Reshape (r, b)
            y = Relu (t)
        }}"""
    )
    for node in optimised(model).graph.node:
        assert not any(attribute.name == "allowzero" for attribute in node.attribute)


def test_a_weight_that_is_shared_through_identities_is_stored_once() -> None:
    model = _with_weight()
    after = optimised(model)
    big = [t for t in after.graph.initializer if np.prod(t.dims) == 64 * 64]
    assert len(big) == 1
    assert after.ByteSize() < model.ByteSize() + 512


def _with_weight() -> ModelProto:
    model = onnx.parser.parse_model(
        HEAD
        + """
        g (float[n,64] x, float[64,64] w) => (float[n,64] y)
        {
            w1 = Identity (w)
            w2 = Identity (w1)
            a = MatMul (x, w)
            b = Tanh (a)
            c = MatMul (b, w1)
            d = Tanh (c)
            y = MatMul (d, w2)
        }"""
    )
    del model.graph.input[1]
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32) / 8
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return model


@pytest.mark.parametrize(
    "maker",
    [
        "big = ConstantOfShape (large)",
        "big = Expand (small, large)",
        "big = Tile (row, large)",
    ],
)
def test_what_a_few_bytes_make_large_is_not_stored(maker: str) -> None:
    model = parsed(
        HEAD
        + f"""
        g (float[1,1] x) => (float[p,q] y)
        <int64[2] large = {{700, 900}}, float[1,1] small = {{3}}, float[1,1] row = {{2}}>
        {{
            {maker}
            y = Add (big, x)
        }}"""
    )
    assert optimised(model).ByteSize() < 4096


def test_an_initialiser_that_is_an_input_too_is_a_constant() -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 3, opset_import: ["" : 8]>
        g (float[2,3] x, float[3] w, float[3] v) => (float[2,3] y)
        <float[3] w = {1, 2, 3}, float[3] v = {4, 5, 6}>
        {
            s = Add (w, v)
            y = Mul (x, s)
        }"""
    )
    after, _ = optc.optimize(model)
    assert [node.op_type for node in after.graph.node] == ["Mul"]
    assert [value.name for value in after.graph.input] == ["x"]
    x = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    np.testing.assert_array_equal(run(after, x)["y"], x["x"] * np.array([5, 7, 9], np.float32))


def test_a_normalisation_that_cannot_be_folded_stays_one_node() -> None:
    model = parsed(
        HEAD
        + """
        g (float[n,2,4,4] x) => (float[n,2,4,4] y)
        <float[2] s = {1, 2}, float[2] b = {3, 4}, float[2] m = {5, 6}, float[2] v = {7, 8}>
        {
            a = Relu (x)
            c = BatchNormalization (a, s, b, m, v)
            y = Relu (c)
        }"""
    )
    ops = [node.op_type for node in optimised(model).graph.node]
    assert ops == ["Relu", "BatchNormalization", "Relu"]


def test_a_rounding_of_a_quantised_model_stays_where_it_is() -> None:
    model = parsed(
        HEAD
        + """
        g (float[n,4] x) => (float[n,2] y)
        <uint8[4,2] w = {3, 200, 17, 99, 128, 4, 250, 66}, uint8 wz = {128}, float ws = {0.02}>
        {
            q, s, z = DynamicQuantizeLinear (x)
            i = MatMulInteger (q, w, z, wz)
            f = Cast <to = 1> (i)
            t = Mul (s, ws)
            y = Mul (f, t)
        }"""
    )
    after, _ = optc.optimize(model)
    x = {"x": np.random.default_rng(3).standard_normal((50, 4)).astype(np.float32)}
    np.testing.assert_allclose(run(after, x)["y"], run(model, x)["y"], rtol=1e-6)


@pytest.mark.parametrize("boxes", [0, 1, 4])
def test_the_rounds_of_a_loop_that_the_data_decides_are_not_taken_for_one(boxes: int) -> None:
    model = parsed(
        HEAD
        + """
        g (int64[m] boxes) => (int64[k] y) <bool yes = {1}, int64 zero = {0}>
        {
            shape = Shape (boxes)
            bare = Squeeze (shape)
            y = Loop (bare, yes) <body = b (int64 i, bool go) => (bool on, int64 box)
              {
                on = Identity (go)
                one = Gather (boxes, i)
                box = Add (one, i)
              }>
        }"""
    )
    after, _ = optc.optimize(model)
    given = {"boxes": np.arange(10, 10 + boxes)}
    np.testing.assert_array_equal(run(after, given)["y"], given["boxes"] + np.arange(boxes))
