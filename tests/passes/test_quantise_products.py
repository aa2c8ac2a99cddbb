"""`quantise-products`: each pattern, each refusal, the numbers, and what the builder multiplies."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from engine_layers import engine_layers, multiplied
from graphs import assert_same_numbers, parsed, run, seeded_inputs, text
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper

from optc.passes import quantisation
from optc.passes.graph import export_model, import_model
from optc.passes.lower_floats import LowerFloats
from optc.passes.pipeline import PassRecord, optimise
from optc.passes.precision import Float, Lowering, NodePrecision
from optc.passes.quantisation import EightBits, rounded, scale_of, weight_scales
from optc.passes.quantise_products import QuantiseProducts

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
PRODUCTS = ("Conv", "Gemm", "MatMul", "ConvTranspose")


def quantise(
    source: str | ModelProto,
    *,
    amax: Mapping[str, float] | None = None,
    precision: EightBits = "int8",
    floats: Float = "fp32",
    nodes: Mapping[str, NodePrecision] | None = None,
) -> tuple[ModelProto, ModelProto, PassRecord]:
    """Return the model before and after all its products were quantised, and the report.

    Both are checked, and a second run must change nothing. ``amax``: 12.7 for all by default.
    """
    before = parsed(HEAD + source) if isinstance(source, str) else source
    graph = import_model(before)
    told: dict[str, NodePrecision] = {
        node.name: precision if node.op in PRODUCTS else floats for node in graph.nodes
    }
    if amax is None:
        amax = dict.fromkeys(graph.tensors(), 12.7)
    lowering = Lowering({**told, **(nodes or {})}, floats, amax)
    report = optimise(graph, [QuantiseProducts()], lowering=lowering)
    after = export_model(graph, value_info=False)
    onnx.checker.check_model(after, full_check=True)
    again = optimise(import_model(after), [QuantiseProducts()], lowering=lowering)
    assert again.records[0].rewritten == 0, "a second run changed something"
    return before, after, report.records[0]


def ops(model: ModelProto) -> list[str]:
    """Return what the nodes are, in order."""
    return [node.op_type for node in model.graph.node]


# --- patterns ------------------------------------------------------------------------------------


def test_a_conv_has_a_scale_for_each_channel_and_reads_its_input_quantised() -> None:
    _, after, report = quantise(
        """
        g (float[1,1,3] x) => (float[1,2,3] y)
        <float[2,1,1] w = {127, -12.7}, float[2] b = {10, 20}>
        {
            [conv] c = Conv (x, w, b)
            [relu] y = Relu (c)
        }"""
    )
    assert (
        text(after)
        == """\
g (float[1,1,3] x) => (float[1,2,3] y)
   <float x_scale =  {0.1}, int8 int8_zero =  {0}, int8[2,1,1] w_int8 =  {127,-127}, \
float[2] w_scale =  {1,0.1}, float[2] b =  {10,20}>
{
   [x_quantise] x_quantised = QuantizeLinear (x, x_scale, int8_zero)
   [x_dequantise] x_dequantised = DequantizeLinear (x_quantised, x_scale)
   [w_dequantise] w_dequantised = DequantizeLinear <axis: int = 0> (w_int8, w_scale)
   [conv] c = Conv (x_dequantised, w_dequantised, b)
   [relu] y = Relu (c)
}"""
    )
    assert report.merged == dict.fromkeys(
        ("x_quantise", "x_dequantise", "w_dequantise", "conv"), ("conv",)
    )


def test_fp8_weights_are_stored_as_fp8() -> None:
    _, after, _ = quantise(
        """
        g (float[1,1,3] x) => (float[1,2,3] y) <float[2,1,1] w = {1, -7}>
        {
            [conv] y = Conv (x, w)
        }""",
        precision="fp8",
    )
    [weights] = [t for t in after.graph.initializer if t.name == "w_fp8"]
    assert numpy_helper.to_array(weights).astype(float).reshape(-1).tolist() == [448, -448]
    assert after.opset_import[0].version == 19


def test_the_columns_of_a_gemm_are_scaled_behind_it_and_then_the_bias_is_added() -> None:
    before, after, report = quantise(
        """
        g (float[N,2] x) => (float[N,3] y)
        <float[3,2] w = {127, 0, 63.5, -63.5, 12.7, 0}, float[3] b = {1, 2, 3}>
        {
            [fc] y = Gemm <alpha = 2.0, beta = 3.0, transB = 1> (x, w, b)
        }"""
    )
    assert (
        text(after)
        == """\
g (float[N,2] x) => (float[N,3] y)
   <float x_scale =  {0.1}, int8 int8_zero =  {0}, int8[3,2] w_int8 =  {127,0,127,-127,127,0}, \
float w_scale =  {1}, float[3] fc_factors =  {2,1,0.2}, float[3] fc_bias =  {3,6,9}>
{
   [x_quantise] x_quantised = QuantizeLinear (x, x_scale, int8_zero)
   [x_dequantise] x_dequantised = DequantizeLinear (x_quantised, x_scale)
   [w_dequantise] w_dequantised = DequantizeLinear (w_int8, w_scale)
   [fc] fc_product = Gemm <transB: int = 1> (x_dequantised, w_dequantised)
   [fc_scale] fc_scaled = Mul (fc_product, fc_factors)
   [fc_add] y = Add (fc_scaled, fc_bias)
}"""
    )
    assert report.merged["fc_add"] == ("fc",)
    assert_same_numbers(before, after, rtol=0.05, atol=40)


def test_rows_of_weights_on_the_left_are_scaled_as_rows() -> None:
    _, after, _ = quantise(
        """
        g (float[2,2,3] x) => (float[2,2,3] y) <float[2,2] w = {127, 1, 12.7, 1}>
        {
            [mm] y = MatMul (w, x)
        }"""
    )
    factors = next(t for t in after.graph.initializer if t.name == "mm_factors")
    np.testing.assert_allclose(numpy_helper.to_array(factors), [[1], [0.1]], rtol=1e-6)


def test_both_activations_of_a_product_are_quantised() -> None:
    _, after, _ = quantise(
        """
        g (float[N,2,4] a, float[N,4,2] b) => (float[N,2,2] y)
        {
            [mm] y = MatMul (a, b)
        }"""
    )
    assert ops(after) == ["QuantizeLinear", "DequantizeLinear"] * 2 + ["MatMul"]


def test_a_tensor_is_quantised_once_for_all_that_read_it_and_so_are_weights() -> None:
    _, after, report = quantise(
        """
        g (float[1,1,3] x) => (float[1,1,3] y, float[1,1,3] z, float[1,1,3] s)
        <float[1,1,1] w = {1}, float[1] b = {1}>
        {
            [first]  y = Conv (x, w)
            [second] z = Conv (x, w, b)
            [soft]   s = Softmax (x)
        }"""
    )
    assert sorted(ops(after)) == [
        "Conv",
        "Conv",
        "DequantizeLinear",
        "DequantizeLinear",
        "QuantizeLinear",
        "Softmax",
    ]
    assert next(node for node in after.graph.node if node.name == "soft").input == ["x"]
    assert report.merged["x_quantise"] == ("first", "second")
    assert report.merged["w_dequantise"] == ("first", "second")


RESIDUAL = """
    g (float[1,1,2,2] x) => (float[1,1,2,2] y, float[1,1,2,2] o)
    <float[1,1,1,1] v = {{1}}, float[1,1,1,1] w = {{2}}, float[1,1,1,1] u = {{3}}, float c = {{1}}>
    {{
        [first]  a = Conv (x, v)
        [relu]   r = Relu (a)
        [second] b = Conv (r, w)
        [add]    s = Add ({operands})
        [clip]   t = Relu (s)
        [third]  y = Conv (t, u)
        [other]  o = {other}
    }}"""


@pytest.mark.parametrize(("op", "operands"), [("Add", "r, b"), ("Add", "b, r"), ("Sum", "r, b")])
def test_a_residual_add_reads_what_is_quantised_for_a_product(op: str, operands: str) -> None:
    source = RESIDUAL.format(operands=operands, other="Neg (t)").replace("Add", op)
    _, after, report = quantise(source)
    add = next(node for node in after.graph.node if node.name == "add")
    assert list(add.input) == operands.replace("r", "r_dequantised").split(", ")
    assert ops(after).count("QuantizeLinear") == 3
    assert report.merged["r_quantise"] == ("second", "add")


FLOATS_WANTED = {
    "another node reads the floats": ("r, b", "Neg (r)", {}),
    "the Add is to be more exact": ("r, b", "Neg (t)", {"add": "fp32"}),
    "the branch comes from no quantised product": ("r, b", "Neg (t)", {"second": "fp16"}),
    "there is no branch": ("r, r", "Neg (b)", {}),
    "the other operand is a constant": ("r, c", "Neg (b)", {}),
}


@pytest.mark.parametrize("why", FLOATS_WANTED)
def test_a_residual_add_reads_floats_where(why: str) -> None:
    operands, other, nodes = FLOATS_WANTED[why]
    _, after, _ = quantise(
        RESIDUAL.format(operands=operands, other=other), floats="fp16", nodes=nodes
    )
    add = next(node for node in after.graph.node if node.name == "add")
    assert list(add.input) == operands.split(", ")


def test_an_operand_that_is_an_output_too_stays_floats_for_an_add() -> None:
    source = RESIDUAL.format(operands="r, b", other="Neg (t)")
    _, after, _ = quantise(source.replace("=> (", "=> (float[1,1,2,2] r, "))
    add = next(node for node in after.graph.node if node.name == "add")
    assert list(add.input) == ["r", "b"]


def test_pooling_and_concat_stand_before_the_one_pair() -> None:
    _, after, _ = quantise(
        """
        g (float[1,1,4,4] x, float[1,1,2,2] z) => (float[1,1,2,2] y)
        <float[1,2,1,1] w = {1, 2}>
        {
            [pool]   p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)
            [concat] c = Concat <axis = 1> (p, z)
            [conv]   y = Conv (c, w)
        }"""
    )
    assert ops(after) == [
        "MaxPool",
        "Concat",
        "QuantizeLinear",
        "DequantizeLinear",
        "DequantizeLinear",
        "Conv",
    ]


def test_a_tensor_times_itself_is_quantised_once() -> None:
    _, after, _ = quantise(
        """
        g (float[2,2] x) => (float[2,2] y)
        {
            [mm] y = MatMul (x, x)
        }"""
    )
    assert ops(after) == ["QuantizeLinear", "DequantizeLinear", "MatMul"]
    assert list(after.graph.node[-1].input) == ["x_dequantised"] * 2


def test_int8_and_fp8_side_by_side_have_a_pair_each() -> None:
    _, after, report = quantise(
        """
        g (float[1,1,3] x) => (float[1,1,3] y, float[1,1,3] z) <float[1,1,1] w = {2}>
        {
            [a] y = Conv (x, w)
            [b] z = Conv (x, w)
        }""",
        nodes={"b": "fp8"},
    )
    assert ops(after).count("QuantizeLinear") == 2
    assert report.merged["x_quantise"] == ("a",)
    assert report.merged["x_quantise_1"] == ("b",)


def test_columns_that_are_equally_strong_need_no_factors() -> None:
    _, after, _ = quantise(
        """
        g (float[N,2] x, float[2] b) => (float[N,2] y) <float[2,2] w = {1, 2, -2, 1}>
        {
            [fc] y = Gemm <beta = 1.0> (x, w, b)
        }"""
    )
    assert ops(after)[-1] == "Gemm"
    assert list(after.graph.node[-1].input) == ["x_dequantised", "w_dequantised", "b"]


# --- refusals ------------------------------------------------------------------------------------

CONV = """
    g (float[1,1,3] x) => (float[1,1,3] y) <float[1,1,1] w = {1}>
    {
        [conv] y = Conv (x, w)
    }"""


@pytest.mark.parametrize(
    ("amax", "reason"),
    [
        ({}, "nobody measured how large the values of `x` are"),
        ({"x": float("inf")}, "the largest magnitude of `x` is inf"),
        ({"x": float("nan")}, "the largest magnitude of `x` is nan"),
    ],
)
def test_without_a_range_nothing_is_quantised(amax: dict[str, float], reason: str) -> None:
    _, after, report = quantise(CONV, amax=amax)
    assert ops(after) == ["Conv"]
    assert report.skipped == {"conv": reason}


def test_the_reason_stays_when_what_was_left_is_in_a_short_type() -> None:
    graph = import_model(parsed(HEAD + CONV))
    lowering = Lowering({"conv": "int8"}, "fp16", {})
    report = optimise(graph, [QuantiseProducts(), LowerFloats()], lowering=lowering)
    assert [node.op for node in graph.nodes] == ["Cast", "Conv", "Cast"]
    assert report.rounds > 1
    assert report.records[0].skipped == {"conv": "nobody measured how large the values of `x` are"}


def test_a_product_of_another_float_is_left() -> None:
    _, after, report = quantise(
        """
        g (float16[1,1,3] x) => (float16[1,1,3] y) <float16[1,1,1] w = {1}>
        {
            [conv] y = Conv (x, w)
        }""",
        floats="fp16",
    )
    assert ops(after) == ["Conv"]
    assert report.skipped == {"conv": "its operands are not float32"}


def test_weights_that_are_not_finite_stay() -> None:
    _, after, report = quantise(CONV.replace("{1}", "{inf}"))
    assert ops(after) == ["Conv"]
    assert report.skipped == {"conv": "its weights `w` are empty or not finite"}


def test_what_cannot_be_quantised_is_left_with_the_reason() -> None:
    _, after, report = quantise(
        """
        g (float[1,1,3] x) => (float[1,1,3] y) <float[1,1,1] w = {1}>
        {
            [up] y = ConvTranspose (x, w)
        }"""
    )
    assert ops(after) == ["ConvTranspose"]
    assert "in floats whether it is quantised or not" in report.skipped["up"]


def test_bodies_are_left() -> None:
    before = parsed(
        HEAD
        + """
        g (bool c, float[1,1,3] x) => (float[1,1,3] y) <float[1,1,1] w = {1}>
        {
            [if] y = If (c) <
                then_branch = t () => (float[1,1,3] a) { [conv] a = Conv (x, w) },
                else_branch = e () => (float[1,1,3] b) { [neg] b = Neg (x) }
            >
        }"""
    )
    _, _, report = quantise(before, nodes={"conv": "int8"})
    assert report.skipped == {"conv": "nothing in the body of a control-flow node is quantised"}


def test_a_product_that_is_quantised_already_is_left_silently() -> None:
    _, _, first = quantise(CONV)
    assert not first.skipped
    _, after, second = quantise(
        """
        g (int8[1,1,3] q) => (float[1,1,3] y) <float[1,1,1] w = {1}, float s = {0.1}>
        {
            x = DequantizeLinear (q, s)
            [conv] y = Conv (x, w)
        }"""
    )
    assert ops(after) == ["DequantizeLinear", "Conv"]
    assert not second.skipped


def test_half_an_attention_is_not_quantised() -> None:
    source = """
        g (float[1,32,8] q, float[1,8,32] k, float[1,32,8] v) => (float[1,32,8] y)
        {
            [scores] s = MatMul (q, k)
            [soft]   p = Softmax (s)
            [values] y = MatMul (p, v)
        }"""
    for kept, left in (("scores", "values"), ("values", "scores")):
        _, after, report = quantise(source, precision="fp8", nodes={kept: "fp16"})
        assert ops(after) == ["MatMul", "Softmax", "MatMul"]
        assert report.skipped == {left: "the other product of its attention is not quantised"}
    _, after, report = quantise(source, precision="fp8")
    assert ops(after).count("QuantizeLinear") == 4
    assert not report.skipped


def test_what_was_not_told_is_left() -> None:
    _, after, report = quantise(CONV, nodes={"conv": "fp16"})
    assert ops(after) == ["Conv"]
    assert not report.skipped


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_conv_computes_what_numpy_rounds(precision: EightBits) -> None:
    rng = np.random.default_rng(1)
    weights = (rng.standard_normal((5, 4, 3, 3)) * [[[[0.1]]]] * 5).astype(np.float32)
    before = onnx.parser.parse_model(
        HEAD + "g (float[2,4,6,6] x) => (float[2,5,4,4] y) { [conv] y = Conv (x, w) }"
    )
    before.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    _, after, _ = quantise(before, amax={"x": 2.5}, precision=precision)
    inputs = seeded_inputs(before)

    scales = weight_scales(weights, 0, precision)
    before.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(rounded(weights, scales, precision, 0), "w")
    )
    expected = run(before, {"x": rounded(inputs["x"], scale_of(2.5, precision), precision)})
    np.testing.assert_array_equal(run(after, inputs)["y"], expected["y"])


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_product_of_matrices_computes_what_numpy_rounds(precision: EightBits) -> None:
    rng = np.random.default_rng(2)
    weights = (rng.standard_normal((8, 6)) * np.geomspace(0.01, 1, 6)).astype(np.float32)
    before = onnx.parser.parse_model(
        HEAD + "g (float[3,8] x, float[6] b) => (float[3,6] y) { [fc] y = Gemm (x, w, b) }"
    )
    before.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    _, after, _ = quantise(before, amax={"x": 2.5}, precision=precision)
    inputs = seeded_inputs(before)

    scales = weight_scales(weights, 1, precision)
    x = rounded(inputs["x"], scale_of(2.5, precision), precision)
    expected = x @ rounded(weights, scales, precision, 1) + inputs["b"]
    np.testing.assert_allclose(run(after, inputs)["y"], expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["int8", "fp8"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, (), (1,), (6,), (1, 6), (3, 1), (3, 6)]),
    st.booleans(),
    st.sampled_from([1.0, -0.5]),
    st.sampled_from([1.0, 3.0]),
)
def test_each_form_of_a_gemm_computes_what_numpy_rounds(
    precision: EightBits,
    on_the_left: bool,
    left_turned: bool,
    right_turned: bool,
    bias: tuple[int, ...] | None,
    bias_is_computed: bool,
    alpha: float,
    beta: float,
) -> None:
    rng = np.random.default_rng(4)
    left = (8, 3) if left_turned else (3, 8)
    right = (6, 8) if right_turned else (8, 6)
    beta = 1.0 if bias_is_computed else beta
    values = {"a": rng.standard_normal(left), "b": rng.standard_normal(right)}
    weights, activation = ("a", "b") if on_the_left else ("b", "a")
    inputs = [helper.make_tensor_value_info(activation, 1, values[activation].shape)]
    constants = {weights: values[weights].astype(np.float32)}
    if bias is not None:
        values["c"] = rng.standard_normal(bias)
        if bias_is_computed:
            inputs.append(helper.make_tensor_value_info("c", 1, bias))
        else:
            constants["c"] = values["c"].astype(np.float32)
    gemm = helper.make_node(
        "Gemm",
        ["a", "b", *(["c"] if bias is not None else [])],
        ["y"],
        "fc",
        alpha=alpha,
        beta=beta,
        transA=int(left_turned),
        transB=int(right_turned),
    )
    graph = helper.make_graph(
        [gemm],
        "g",
        inputs,
        [helper.make_tensor_value_info("y", 1, (3, 6))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    before = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    feeds = {info.name: values[info.name].astype(np.float32) for info in inputs}
    _, after, report = quantise(before, amax={activation: 2.0}, precision=precision)
    assert not report.skipped

    channels = int(left_turned) if on_the_left else int(not right_turned)
    scales = weight_scales(constants[weights], channels, precision)
    before.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(rounded(constants[weights], scales, precision, channels), weights)
    )
    x = rounded(feeds[activation], scale_of(2.0, precision), precision)
    expected = run(before, {**feeds, activation: x})["y"]
    np.testing.assert_allclose(run(after, feeds)["y"], expected, rtol=1e-5, atol=1e-5)


# --- what the builder makes of it ----------------------------------------------------------------

IMAGES = "g (float[1,16,16,16] x) => (float y)"
WIDE = {
    "chain": f"{IMAGES} {{ [a] p = Conv (x, w) [r] q = Relu (p) [b] y = Conv (q, w) }}",
    "pool": f"{IMAGES} {{ [a] p = Conv (x, w) [m] q = MaxPool <kernel_shape = [2, 2]> (p) "
    "[b] y = Conv (q, w) }",
    "residual": f"{IMAGES} {{ [a] p = Conv (x, w) [b] q = Conv (p, w) [s] s = Add (p, q) "
    "[c] y = Conv (s, w) }",
    "concat": f"{IMAGES} {{ [a] p = Conv (x, w) [b] q = Conv (x, w) [j] j = Concat <axis = 2> (p, q) "
    "[c] y = Conv (j, w) }",
    "matrices": "g (float[4,16] x) => (float y) "
    "{ [a] p = Gemm (x, v, b) [r] q = Relu (p) [m] y = MatMul (q, v) }",
    "attention": "g (float[1,2,8,16] p, float[1,2,16,8] q) => (float y) { [m] y = MatMul (p, q) }",
}
"""Graphs of 16 channels. Their weights are w of a Conv, v and b of a Gemm."""

CASES = [
    ("8.9", "int8", "fp16"),
    ("8.9", "int8", "bf16"),
    ("8.9", "fp8", "fp16"),
    ("8.0", "int8", "fp32"),
    ("12.0", "fp8", "bf16"),
]


def wide(name: str) -> ModelProto:
    """Return one of `WIDE` with its weights, seeded, and its shapes."""
    model = onnx.parser.parse_model(HEAD + WIDE[name])
    rng = np.random.default_rng(3)
    read = {tensor for node in model.graph.node for tensor in node.input}
    for tensor, shape in {"w": (16, 16, 1, 1), "v": (16, 16), "b": (16,)}.items():
        if tensor in read:
            values = rng.standard_normal(shape).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(values, tensor))
    return inferred(model)


def inferred(model: ModelProto) -> ModelProto:
    """Return ``model`` with the shape that its output has."""
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model)


def lowered(before: ModelProto, precision: EightBits, floats: Float) -> ModelProto:
    """Return a model with its products quantised and the rest in ``floats``."""
    graph = import_model(before)
    nodes: dict[str, NodePrecision] = {
        node.name: precision if node.op in PRODUCTS else floats for node in graph.nodes
    }
    amax = dict.fromkeys(graph.tensors(), 8.0)
    optimise(graph, [QuantiseProducts(), LowerFloats()], lowering=Lowering(nodes, floats, amax))
    after = export_model(graph, value_info=False)
    onnx.checker.check_model(after, full_check=True)
    return after


@pytest.mark.parametrize(("capability", "precision", "floats"), CASES)
def test_the_builder_multiplies_8_bits(
    capability: str, precision: EightBits, floats: Float
) -> None:
    engines = engine_layers([lowered(wide(n), precision, floats) for n in WIDE], capability)
    wanted = {"int8": "Int8", "fp8": "FP8"}[precision]
    assert {n: set(multiplied(layers)) for n, layers in zip(WIDE, engines, strict=True)} == {
        n: {wanted} for n in WIDE
    }


def test_on_7_5_it_multiplies_8_bits_in_products_of_matrices_only() -> None:
    names = ("matrices", "chain")
    engines = engine_layers([lowered(wide(name), "int8", "fp16") for name in names], "7.5")
    assert [set(multiplied(layers)) for layers in engines] == [{"Int8"}, {"Half"}]


@pytest.mark.parametrize(("width", "multiplied_as"), [(8, "FP8"), (9, "Half")])
def test_fp8_of_more_than_32_taps_would_be_multiplied_as_floats(
    width: int, multiplied_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass declines such a Conv; this is what it would become."""
    monkeypatch.setattr(quantisation, "MOST_TAPS", 99)
    model = wide("chain")
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.ones((16, 16, 4, width), np.float32), "w")
    )
    del model.graph.node[1:], model.graph.value_info[:]
    model.graph.output[0].name = "p"
    [layers] = engine_layers([lowered(inferred(model), "fp8", "fp16")], "8.9")
    assert multiplied(layers) == [multiplied_as]


ATTENTION = "g (float[N,2,{t},32] q, float[N,2,32,{t}] k, float[N,2,{t},32] v) => (float y) "
ATTENTION += "<float z = {{0}}> {{ [a] s = MatMul (q, k) [s] p = Softmax <axis = -1> (s) {guard} "
ATTENTION += "[b] y = MatMul ({p}, v) }}"
GUARD = "[n] n = IsNaN (p) [w] r = Where (n, z, p)"


@pytest.mark.parametrize(
    ("precision", "length", "guard", "reads"),
    [
        ("int8", "32", "", "Half"),
        ("fp8", "32", "", "FP8"),
        ("fp8", "31", "", "Half"),
        ("fp8", "T", "", "Half"),
        ("fp8", "32", GUARD, "Half"),
    ],
)
def test_attention_stays_one_kernel(
    precision: EightBits, length: str, guard: str, reads: str
) -> None:
    source = ATTENTION.format(t=length, guard=guard, p="r" if guard else "p")
    model = inferred(onnx.parser.parse_model(HEAD + source))
    [layers] = engine_layers([lowered(model, precision, "fp16")], "8.9")
    [kernel] = [layer for layer in layers if len(layer.reads) >= 4 and layer.kind == "kgen"]
    assert kernel.reads[:3] == (reads,) * 3
    assert not multiplied(layers)


def test_no_sum_of_integers_is_written_as_fp16() -> None:
    """One scale for all columns is what makes the builder multiply before it writes fp16."""
    after = lowered(wide("matrices"), "int8", "fp16")
    scales = {node.input[1] for node in after.graph.node if node.op_type == "DequantizeLinear"}
    sizes = {t.name: int(np.prod(t.dims)) for t in after.graph.initializer}
    assert {sizes[name] for name in scales} == {1}
    after = lowered(wide("chain"), "int8", "fp16")
    [layers] = engine_layers([after], "8.9")
    sums = [layer.makes[0] for layer in layers if layer.kind == "correlation"]
    assert sums == ["Float", "Float"]
