"""The static transformation: what was in short floats computes in fp32 and is rounded as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from optc.optimizer.reference import OrtRunner
from optc.optimizer.simulation import short_floats, simulated
from optc.passes.precision import DTYPES
from optc.specs.diagnostic import ModelError

Array = np.ndarray[Any, Any]

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


def model_of(text: str, opset: int = 21, **weights: Array) -> ModelProto:
    domains = f'["" : {opset}, "ai.onnx.ml" : 3]'
    model = onnx.parser.parse_model(f"<ir_version: 10, opset_import: {domains}> {text}")
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    model.graph.initializer.extend(tensors)
    onnx.checker.check_model(model)
    return model


def run(model: ModelProto, **feeds: Array) -> list[Array]:
    onnx.checker.check_model(model)
    return list(OrtRunner(model, Path()).run(feeds).values())


def as_short(array: Array, dtype: np.dtype[Any] = F16) -> Array:
    """Return ``array`` rounded to ``dtype``, as float32."""
    with np.errstate(over="ignore", under="ignore"):
        rounded: Array = array.astype(dtype).astype(np.float32)
    return rounded


def neighbourhoods(dtype: np.dtype[Any]) -> Array:
    """Return each number of a type, the middles between it and the next, and what is beside them."""
    bits = np.arange(1 << (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")
    numbers = np.sort(bits.view(dtype).astype(np.float32))
    finite = numbers[np.isfinite(numbers)]
    with np.errstate(over="ignore"):
        edge = finite[-1] + (finite[-1] - finite[-2]) * np.array([0.5, 1, 2], np.float32)
        middles = np.concatenate([finite[:-1] / 2 + finite[1:] / 2, edge, -edge])
        exact = np.concatenate([finite, middles])
        beside = [np.nextafter(exact, np.float32(end)) for end in (-np.inf, np.inf)]
    ends = np.array([np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-45, -1e-45, -0.0], np.float32)
    return np.concatenate([exact, *beside, ends])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_rounding_is_that_of_numpy_to_the_last_bit(precision: Any) -> None:
    dtype = DTYPES[precision]
    number = helper.np_dtype_to_tensor_dtype(dtype)
    model = model_of(
        f"""g (float[N] x) => (float[N] y) {{
            h = Cast <to: int = {number}> (x)
            y = Cast <to: int = 1> (h)
        }}"""
    )
    x = neighbourhoods(dtype)
    assert x.size > 3 * 60_000
    [found] = run(simulated(model), x=x)
    expected = as_short(x, dtype)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    known = ~np.isnan(expected)
    np.testing.assert_array_equal(found[known].view(np.uint32), expected[known].view(np.uint32))


def test_each_operator_computes_in_fp32_and_its_result_is_rounded() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 8)).astype(F16)
    model = model_of(
        """g (float[N,64] x) => (float[N,8] y) {
            h = Cast <to: int = 10> (x)
            a = MatMul (h, w)
            b = Sigmoid (a)
            c = Mul (b, b)
            d = Neg (c)
            y = Cast <to: int = 1> (d)
        }""",
        w=w,
    )
    x = rng.uniform(0, 1, (3, 64)).astype(np.float32)
    a = as_short(as_short(x) @ w.astype(np.float32))
    b = as_short(run(model_of("g (float[N,8] x) => (float[N,8] y) { y = Sigmoid (x) }"), x=a)[0])
    expected = -as_short(b * b)
    [found] = run(simulated(model), x=x)
    np.testing.assert_array_equal(found, expected)
    [unrounded] = run(model, x=x)
    assert not np.array_equal(unrounded, expected, equal_nan=True), "nothing to simulate"


def test_a_chain_that_onnxruntime_keeps_in_fp32_is_rounded_at_each_step() -> None:
    """Left to itself it takes away the Casts between operators that it has no fp16 kernels for."""
    model = model_of(
        """g (float16[N] x) => (float16[N] y) {
            a = Exp (x)
            b = Log (a)
            c = Exp (b)
            y = Log (c)
        }"""
    )
    x = np.random.default_rng(0).uniform(0.01, 4, 2000).astype(F16)
    value = x.astype(np.float32)
    for step in (np.exp, np.log, np.exp, np.log):
        value = as_short(step(value))
    [found] = run(simulated(model), x=x)
    [flattered] = run(model, x=x)
    error = np.abs(value.astype(F16).astype(np.float64) - x)
    assert found.dtype == F16
    assert np.mean(found == value.astype(F16)) > 0.999  # exp and log of numpy may differ in a bit
    assert np.abs(found.astype(np.float64) - x).mean() > 0.9 * error.mean() > 0
    assert np.abs(flattered.astype(np.float64) - x).mean() < 0.5 * error.mean()


@pytest.mark.parametrize("order", [(10, 16, 10), (16, 10, 16), (10, 10, 16), (16, 16, 10)])
def test_rounding_to_one_type_after_another_is_not_taken_away(order: tuple[int, ...]) -> None:
    names = ["x", "a", "b", "c"]
    casts = "\n".join(
        f"{names[i + 1]} = Cast <to: int = {to}> ({names[i]})" for i, to in enumerate(order)
    )
    model = model_of(
        f"g (float[N] x) => (float[N] y, float[N] z) {{ {casts} z = Cast <to: int = 1> (a)"
        " y = Cast <to: int = 1> (c) }"
    )
    x = np.random.default_rng(0).standard_normal(5000).astype(np.float32) * 300
    value, first = x, None
    for to in order:
        value = as_short(value, helper.tensor_dtype_to_np_dtype(to))
        first = value if first is None else first
    y, z = run(simulated(model), x=x)
    np.testing.assert_array_equal(y, value)
    np.testing.assert_array_equal(z, first)


def test_bf16_runs_where_onnxruntime_has_no_kernel() -> None:
    w = np.random.default_rng(0).standard_normal((4, 2, 3, 3)).astype(BF16)
    model = model_of(
        """g (float[1,2,6,6] x) => (bfloat16[1,4,4,4] y) {
            h = Cast <to: int = 16> (x)
            y = Conv (h, w)
        }""",
        opset=22,
        w=w,
    )
    x = np.random.default_rng(1).standard_normal((1, 2, 6, 6)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(as_short(x, BF16)[0], (3, 3), (1, 2))
    exact = np.einsum("chwij,ocij->ohw", windows, w.astype(np.float32), dtype=np.float64)
    [found] = run(simulated(model), x=x)
    assert found.dtype == BF16
    np.testing.assert_allclose(found[0].astype(np.float64), exact, rtol=2**-8, atol=1e-6)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        run(model, x=x)


def test_inputs_and_outputs_keep_type_name_and_order() -> None:
    model = model_of(
        """g (float16[N] x, float[N] z, bfloat16[N] b)
           => (float16[N] same, float[N] wide, float16[2] fixed, bfloat16[N] c)
        {
            same = Identity (x)
            wide = Cast <to: int = 1> (x)
            fixed = Identity (w)
            c = Add (b, b)
        }""",
        w=np.array([0.1, 7], F16),
    )
    made = simulated(model)
    types = [(v.name, v.type.tensor_type.elem_type) for v in model.graph.output]
    assert [(v.name, v.type.tensor_type.elem_type) for v in made.graph.output] == types
    assert [v.name for v in made.graph.input] == ["x", "z", "b"]
    x = np.array([0.1, 65504, -0.0, 6e-8], F16)
    b = np.array([1.5, 2, 3, 3.01], BF16)
    same, wide, fixed, c = run(made, x=x, z=np.zeros(4, np.float32), b=b)
    np.testing.assert_array_equal(same.view(np.uint16), x.view(np.uint16))
    np.testing.assert_array_equal(wide, x.astype(np.float32))
    np.testing.assert_array_equal(fixed, np.array([0.1, 7], F16))
    np.testing.assert_array_equal(c, b + b)


def test_an_input_that_is_an_output_passes_through() -> None:
    model = model_of("g (float16[N] x) => (float16[N] y) { y = Neg (x) }")
    model.graph.output.append(model.graph.input[0])
    x = np.array([1, 2], F16)
    y, passed = run(simulated(model), x=x)
    np.testing.assert_array_equal(y, -x)
    np.testing.assert_array_equal(passed, x)


def test_constants_stay_short_in_the_file() -> None:
    w = np.random.default_rng(0).standard_normal((256, 256)).astype(F16)
    model = model_of("g (float16[N,256] x) => (float16[N,256] y) { y = MatMul (x, w) }", w=w)
    made = simulated(model)
    [constant] = [t for t in made.graph.initializer if t.name == "w"]
    assert constant.data_type == TensorProto.FLOAT16
    assert made.ByteSize() < model.ByteSize() + 2000


def test_external_data_stays_external(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(F16)
    model = model_of("g (float16[N,64] x) => (float16[N,64] y) { y = MatMul (x, w) }", w=w)
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(F16)
    [expected] = run(simulated(model), x=x)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    made = simulated(onnx.load(tmp_path / "m.onnx", load_external_data=False))
    assert made.ByteSize() < 2000
    np.testing.assert_array_equal(OrtRunner(made, tmp_path).run({"x": x})["y"], expected)


LOOP = """
g (float[N] x, int64 trips) => (float[N] y, float[K,N] steps)
{
    h = Cast <to: int = 10> (x)
    last, scan = Loop (trips, go, h) <body = b (int64 i, bool g, float16[N] v)
        => (bool g_out, float16[N] v_out, float16[N] seen)
    {
        g_out = Identity (g)
        small = Mul (v, factor)
        v_out = Add (small, h)
        seen = Identity (v_out)
    }>
    y = Cast <to: int = 1> (last)
    steps = Cast <to: int = 1> (scan)
}"""


def test_bodies_round_in_every_round() -> None:
    model = model_of(LOOP, go=np.array(True), factor=np.array(0.7, F16))
    x = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    y, steps = run(simulated(model), x=x, trips=np.array(5))
    h, factor = as_short(x), as_short(np.array(0.7, np.float32))
    value, rounds = h, []
    for _ in range(5):
        value = as_short(as_short(value * factor) + h)
        rounds.append(value)
    np.testing.assert_array_equal(y, value)
    np.testing.assert_array_equal(steps, np.stack(rounds))


def test_a_branch_may_give_a_constant_or_what_is_around_it() -> None:
    model = model_of(
        """g (float16[2] x, bool c) => (float16[2] y)
        {
            y = If (c) <then_branch = a () => (float16[2] p) { p = Mul (x, x) },
                        else_branch = b () => (float16[2] q) { q = Identity (w) }>
        }""",
        w=np.array([3, 4], F16),
    )
    x = np.array([0.1, 30], F16)
    made = simulated(model)
    np.testing.assert_array_equal(run(made, x=x, c=np.array(True))[0], x * x)
    np.testing.assert_array_equal(run(made, x=x, c=np.array(False))[0], np.array([3, 4], F16))


def test_attributes_that_name_a_type_follow() -> None:
    model = model_of(
        """g (float16[2] x, int64[1] n, float[3,3] m, float[2] z)
           => (float16[K] filled, float16[3,3] eye, float16[2] like, float16[2] norm,
               float[2] unlike)
        {
            filled = ConstantOfShape <value: tensor = float16[1] {11878}> (n)
            eye = EyeLike <dtype: int = 10> (m)
            like = CastLike (z, x)
            norm = LayerNormalization <stash_type: int = 1> (x, x)
            inner = Neg (z)
            unlike = CastLike (x, inner)
        }"""
    )
    x = np.array([1.5, -3], F16)
    z = np.array([0.1, 1e6], np.float32)
    filled, eye, like, norm, unlike = run(
        simulated(model), x=x, n=np.array([4]), m=np.zeros((3, 3), np.float32), z=z
    )
    np.testing.assert_array_equal(filled, np.full(4, np.uint16(11878).view(F16)))
    np.testing.assert_array_equal(eye, np.eye(3, dtype=F16))
    np.testing.assert_array_equal(like, as_short(z).astype(F16))
    assert norm.dtype == F16
    np.testing.assert_array_equal(unlike, x.astype(np.float32))


def test_a_cast_from_integers_rounds_once() -> None:
    model = model_of(
        """g (int64[N] x) => (float[N] y) {
            h = Cast <to: int = 10> (x)
            y = Cast <to: int = 1> (h)
        }"""
    )
    x = np.array([2049, 2051, 70000, -3])
    np.testing.assert_array_equal(run(simulated(model), x=x)[0], as_short(x))


@pytest.mark.parametrize(
    ("number", "dtype"),
    [(TensorProto.INT8, np.int8), (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn)],
)
def test_quantised_operands_between_short_floats(number: int, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    w = rng.integers(-50, 50, (16, 4)).astype(np.float32).astype(dtype)
    model = onnx.parser.parse_model(
        f"""<ir_version: 12, opset_import: ["" : 23]>
        g (float[N,16] x) => (float[N,4] y) <float s = {{0.031}}, float t = {{0.0017}}> {{
            h = Cast <to: int = 10> (x)
            q = QuantizeLinear <output_dtype: int = {number}> (h, s)
            d = DequantizeLinear <output_dtype: int = 10> (q, s)
            v = DequantizeLinear <output_dtype: int = 10> (w, t)
            p = MatMul (d, v)
            y = Cast <to: int = 1> (p)
        }}"""
    )
    model.graph.initializer.append(numpy_helper.from_array(w, "w"))
    x = rng.standard_normal((3, 16)).astype(np.float32)
    steps = as_short(x) / np.float32(0.031)
    low = (np.rint(steps) if dtype is np.int8 else steps).astype(dtype).astype(np.float32)
    operand = as_short(low * np.float32(0.031))
    weights = as_short(w.astype(np.float32) * np.float32(0.0017))
    [found] = run(simulated(model), x=x)
    np.testing.assert_array_equal(found, as_short(operand @ weights))


def test_an_operator_of_another_domain_gets_the_types_it_was_written_for() -> None:
    node = helper.make_node("Custom", ["h"], ["k"], name="custom", domain="com.example")
    model = model_of(
        """g (float[N] x) => (float[N] y) <float16[N] k> {
            h = Cast <to: int = 10> (x)
            a = Exp (h)
            y = Cast <to: int = 1> (a)
        }"""
    )
    model.graph.node.insert(1, node)
    model.graph.node[2].input[0] = "k"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    made = simulated(model)
    maker = {name: each for each in made.graph.node for name in each.output}
    [custom] = [each for each in made.graph.node if each.op_type == "Custom"]
    assert maker[custom.input[0]].op_type == "Cast"
    assert maker[custom.input[0]].attribute[0].i == TensorProto.FLOAT16
    [reader] = [each for each in made.graph.node if custom.output[0] in each.input]
    assert (reader.op_type, reader.attribute[0].i) == ("Cast", TensorProto.FLOAT)


def test_a_sequence_of_short_floats_inside_is_one_of_fp32() -> None:
    model = model_of(
        """g (float[N] x, int64 i) => (float[N] y) {
            h = Cast <to: int = 10> (x)
            e = Exp (h)
            s = SequenceConstruct (h, e)
            p = SequenceAt (s, i)
            y = Cast <to: int = 1> (p)
        }"""
    )
    x = np.array([0.3, 2.7], np.float32)
    [found] = run(simulated(model), x=x, i=np.array(1))
    np.testing.assert_array_equal(found, as_short(np.exp(as_short(x))))


def test_a_sequence_of_short_floats_at_the_boundary_is_refused() -> None:
    model = model_of(
        "g (float16[N] x) => (seq(float16[N]) y) { y = SequenceConstruct (x, x) }",
    )
    with pytest.raises(ModelError, match="sequence of fp16") as caught:
        simulated(model)
    assert caught.value.diagnostics[0].code == "cannot-simulate"


def test_a_sequence_of_maps_leaves_as_it_is() -> None:
    model = model_of(
        """g (float[N,2] x) => (seq(map(int64, float)) y) {
            h = Cast <to: int = 10> (x)
            w = Cast <to: int = 1> (h)
            y = ai.onnx.ml.ZipMap <classlabels_int64s = [5, 6]> (w)
        }"""
    )
    x = np.array([[0.1, 2]], np.float32)
    [[row]] = run(simulated(model), x=x)
    assert row == {5: float(as_short(x)[0, 0]), 6: 2.0}


def test_a_model_in_fp32_stays_as_it_is_but_for_its_names() -> None:
    model = model_of("g (float[N] x) => (float[N] y) { a = Exp (x) y = Relu (a) }")
    assert short_floats(model) == set()
    assert [node.op_type for node in simulated(model).graph.node] == ["Exp", "Relu"]


def test_short_floats_are_found_wherever_they_are() -> None:
    assert short_floats(model_of(LOOP, go=np.array(True), factor=np.array(0.7, F16))) == {"fp16"}
    inside = (
        "g (float[N] x) => (float[N] y) { h = Cast <to: int = 16> (x) y = Cast <to: int = 1> (h) }"
    )
    assert short_floats(model_of(inside)) == {"bf16"}


def test_the_given_model_is_not_changed() -> None:
    model = model_of(LOOP, go=np.array(True), factor=np.array(0.7, F16))
    before = model.SerializeToString(deterministic=True)
    simulated(model)
    assert model.SerializeToString(deterministic=True) == before


def test_onnxruntime_takes_none_of_the_rounding_away(tmp_path: Path) -> None:
    """It removes Casts that meet even with optimisations off; these it must leave."""
    model = model_of(LOOP, go=np.array(True), factor=np.array(0.7, F16))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "kept.onnx")
    made = simulated(model)
    ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kept = onnx.load(tmp_path / "kept.onnx")
    [loop] = [node for node in kept.graph.node if node.op_type == "Loop"]
    [body] = [attribute.g for attribute in loop.attribute]
    assert [node.op_type for node in body.node].count("Cast") == 4
