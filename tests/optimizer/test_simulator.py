"""The simulator: single nodes in low precision, and only what follows from them computed."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from generated import models
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from optc.optimizer import simulator as simulator_module
from optc.optimizer.model_file import load_graph, read_model
from optc.optimizer.node_session import (
    give_back_memory,
    quantising_session,
    rounding_session,
    value_of,
)
from optc.optimizer.reference import OrtRunner, Rejected
from optc.optimizer.simulation import simulated
from optc.optimizer.simulator import See, Simulator
from optc.passes import registry
from optc.passes.graph import StoredValues, all_nodes, export_model, finish, import_model
from optc.passes.pipeline import optimise
from optc.passes.precision import DTYPES, LARGEST, Float, Lowering, NodePrecision
from optc.passes.quantisation import rounded, scale_of, weight_scales
from optc.passes.shape import infer
from optc.specs.diagnostic import ModelError

Array = np.ndarray[Any, Any]

CNN = """
g (float[N,3,12,12] x) => (float[N,5] y)
{
    [first]  a = Conv <pads = [1,1,1,1]> (x, w1)
    [act]    b = Relu (a)
    [second] c = Conv <pads = [1,1,1,1]> (b, w2)
    [sum]    d = Add (c, b)
    [pool]   e = MaxPool <kernel_shape = [2,2], strides = [2,2]> (d)
    [mean]   f = GlobalAveragePool (e)
    [flat]   h = Flatten (f)
    [head]   i = Gemm (h, w3, bias)
    [soft]   y = Softmax (i)
}"""


def graph_of(text: str, /, **weights: Array) -> gs.Graph:
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]> {text}')
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    model.graph.initializer.extend(tensors)
    onnx.checker.check_model(model)
    return import_model(model)


def simulator_of(graph: gs.Graph, floats: Float = "fp16", amax: Any = None) -> Simulator:
    return Simulator(graph, infer(graph), floats=floats, amax=amax)


def cnn() -> gs.Graph:
    rng = np.random.default_rng(0)
    shapes = {"w1": (8, 3, 3, 3), "w2": (8, 8, 3, 3), "w3": (8, 5), "bias": (5,)}
    weights = {n: rng.uniform(-0.5, 0.5, s).astype(np.float32) for n, s in shapes.items()}
    return graph_of(CNN, **weights)


def picture() -> dict[str, Array]:
    return {"x": np.random.default_rng(1).standard_normal((2, 3, 12, 12)).astype(np.float32)}


def as_short(array: Array, precision: Float = "fp16") -> Array:
    with np.errstate(over="ignore", under="ignore"):
        found: Array = array.astype(DTYPES[precision]).astype(np.float32)
    return found


def same(left: dict[str, Array], right: dict[str, Array]) -> bool:
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype
        and np.array_equal(left[name], right[name], equal_nan=True)
        for name in left
    )


def collecting(names: list[str]) -> See:
    """Return what adds the name of each tensor that it is shown."""
    return lambda name, array: names.append(name)


# --- one node ------------------------------------------------------------------------------------

PRODUCT = """
g (float[N,K] x) => (float[N,M] y)
{
    [before]  a = Relu (x)
    [product] b = Gemm (a, w, bias)
    [after]   y = Mul (b, b)
}"""


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_node_in_low_precision_reads_and_gives_rounded_numbers(precision: Any) -> None:
    # Sums of two products that fp32 has all digits of: in whatever order they are added up.
    rng = np.random.default_rng(0)
    w, bias, x = (rng.uniform(1, 2, s).astype(np.float32) for s in ((2, 400), (400,), (3, 2)))
    simulator = simulator_of(graph_of(PRODUCT, w=w, bias=bias))
    found = simulator.run(simulator.reference({"x": x}), {"product": precision})["y"]
    operands = [as_short(array, precision) for array in (np.maximum(x, 0), w, bias)]
    product = as_short(operands[0] @ operands[1] + operands[2], precision)
    unrounded = as_short(x @ w + bias, precision)
    assert np.mean(product == unrounded) < 0.9, "what is read is rounded, too"
    np.testing.assert_array_equal(found, product * product)


def test_what_is_beyond_fp16_is_infinite() -> None:
    simulator = simulator_of(graph_of("g (float[N] x) => (float[N] y) { [m] y = Mul (x, x) }"))
    reference = simulator.reference({"x": np.array([200, 300, -1e6, np.nan], np.float32)})
    found = simulator.run(reference, {"m": "fp16"})["y"]
    np.testing.assert_array_equal(found, np.array([40000, np.inf, np.inf, np.nan], np.float32))


def test_a_node_whose_weight_is_beyond_the_type_stays_as_it_is() -> None:
    """As the pass leaves it: its result would be infinite whatever it reads."""
    graph = graph_of(
        "g (float[N] x) => (float[N] y, float[N] z) { [m] y = Mul (x, w) [n] z = Mul (x, v) }",
        w=np.array(1e5, np.float32),
        v=np.array(1e-9, np.float32),
    )
    simulator = simulator_of(graph)
    reference = simulator.reference({"x": np.array([1.0001, 2], np.float32)})
    assert same(simulator.run(reference, {"m": "fp16", "n": "fp16"}), dict(reference.outputs))
    lower = simulator.run(reference, {"m": "bf16", "n": "bf16"})
    assert not np.array_equal(lower["y"], reference.outputs["y"])


def test_a_node_that_cannot_be_lowered_stays_in_fp32() -> None:
    graph = graph_of("g (float[N] x) => (float[N] y) { [n] k = NonZero (x) [c] y = Exp (x) }")
    simulator = simulator_of(graph)
    reference = simulator.reference({"x": np.ones(2, np.float32)})
    assert same(simulator.run(reference, {"n": "fp16"}), dict(reference.outputs))


# --- what is computed ----------------------------------------------------------------------------


def test_the_reference_is_what_onnxruntime_gives() -> None:
    graph = cnn()
    expected = OrtRunner(export_model(graph), Path()).run(picture())
    reference = simulator_of(graph).reference(picture())
    np.testing.assert_allclose(reference.outputs["y"], expected["y"], rtol=1e-6)


def test_only_what_follows_is_computed_and_shown() -> None:
    simulator = simulator_of(cnn())
    reference = simulator.reference(picture())
    seen: dict[str, Array] = {}

    def see(name: str, array: Array) -> None:
        assert name not in seen
        seen[name] = array.copy()

    found = simulator.run(reference, {"pool": "fp16"}, see=see)
    assert list(seen) == ["e", "f", "h", "i", "y"]
    np.testing.assert_array_equal(seen["y"], found["y"])
    assert simulator.runs == 1


def test_nothing_in_low_precision_is_the_reference() -> None:
    simulator = simulator_of(cnn())
    reference = simulator.reference(picture())
    seen: list[str] = []
    found = simulator.run(reference, {"first": "fp32"}, see=collecting(seen))
    assert same(found, dict(reference.outputs))
    assert not seen


def test_what_turns_out_the_same_is_computed_no_further() -> None:
    graph = graph_of(
        """g (float[N,4] x) => (int64[K] y, float[N,4] z)
        {
            [exp]   z = Exp (x)
            [shape] s = Shape (z)
            [add]   y = Add (s, s)
        }"""
    )
    simulator = simulator_of(graph)
    reference = simulator.reference({"x": np.full((3, 4), 0.3, np.float32)})
    seen: list[str] = []
    found = simulator.run(reference, {"exp": "fp16"}, see=collecting(seen))
    assert seen == ["z"]
    np.testing.assert_array_equal(found["y"], [6, 8])


def test_no_session_is_made_twice_and_alike_nodes_share_one() -> None:
    simulator = simulator_of(cnn())
    reference = simulator.reference(picture())
    assert simulator.sessions == 8  # nine nodes, of which two are Convs with the same attributes
    names = [node.name for node in cnn().nodes]
    for precision in ("fp16", "bf16"):
        for name in names:
            simulator.run(reference, {name: precision})
    simulator.reference({"x": picture()["x"][:1]})
    assert simulator.sessions == 8


def test_runs_do_not_depend_on_those_before() -> None:
    simulator = simulator_of(cnn())
    reference = simulator.reference(picture())
    every: dict[str, NodePrecision] = {node.name: "fp16" for node in cnn().nodes}
    first = simulator.run(reference, every)
    simulator.run(reference, {"second": "bf16"})
    other = simulator.reference({"x": 2 * picture()["x"]})
    simulator.run(other, every)
    assert same(simulator.run(reference, every), first)
    fresh = simulator_of(cnn())
    assert same(fresh.run(fresh.reference(picture()), every), first)


@pytest.mark.parametrize("limit", [0, 3000, 20000])
def test_tensors_that_there_is_no_memory_for_are_computed_again(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    plenty = simulator_of(cnn())
    whole = plenty.reference(picture())
    monkeypatch.setattr(simulator_module, "spare_bytes", lambda: limit)
    simulator = simulator_of(cnn())
    reference = simulator.reference(picture())
    kept = {name: array.tensor_size_in_bytes() for name, array in reference.kept.items()}
    assert sum(size for name, size in kept.items() if name != "x") <= limit
    assert len(kept) < len(whole.kept)
    for name in ("first", "sum", "soft"):
        seen: list[list[str]] = []
        results = []
        for runs, start in ((simulator, reference), (plenty, whole)):
            shown: list[str] = []
            see = collecting(shown)
            results.append(runs.run(start, {name: "bf16"}, see=see))
            seen.append(shown)
        assert same(*results)
        assert seen[0] == seen[1], "what is computed again is not news"


def test_weights_stay_where_they_are() -> None:
    graph = cnn()
    simulator = simulator_of(graph)
    reference = simulator.reference(picture())
    simulator.run(reference, {node.name: "fp16" for node in graph.nodes})
    weights = [t for node in graph.nodes for t in node.inputs if isinstance(t, gs.Constant)]
    assert len(weights) == 4
    assert all(isinstance(tensor._values, StoredValues) for tensor in weights)


def resident_mib() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def test_what_a_simulator_took_goes_back_to_the_system() -> None:
    chain = "\n".join(f"t{i + 1} = Exp (t{i})" for i in range(20))
    simulator = simulator_of(graph_of(f"g (float[N] t0) => (float[N] t20) {{ {chain} }}"))
    give_back_memory()
    before = resident_mib()
    reference = simulator.reference({"t0": np.full(1 << 21, -np.inf, np.float32)})
    assert reference.nbytes >> 20 == 21 * 8
    assert resident_mib() > before + 150
    gone = weakref.ref(simulator)
    del simulator, reference
    gc.collect()
    assert gone() is None
    give_back_memory()
    assert resident_mib() < before + 60


# --- everything ----------------------------------------------------------------------------------


def lowered_and_simulated(graph: gs.Graph, lowering: Lowering, feeds: Any) -> dict[str, Array]:
    """Return the outputs of ``graph`` as the passes lower it."""
    copy = import_model(export_model(graph))
    optimise(copy, registry.lowerers(), lowering=lowering)
    return OrtRunner(simulated(export_model(copy)), Path()).run(feeds)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_all_nodes_low_is_the_lowered_model_to_the_last_bit(precision: Any) -> None:
    graph = cnn()
    simulator = simulator_of(graph)
    nodes: dict[str, NodePrecision] = {node.name: precision for node in graph.nodes}
    found = simulator.run(simulator.reference(picture()), nodes)
    assert same(found, lowered_and_simulated(graph, Lowering(nodes), picture()))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_a_real_model_is_the_lowered_one_to_the_last_bit(
    real_model: Callable[[str], Path], precision: Any
) -> None:
    """A ResNet with deformable convolutions; its last product is told to stay in floats."""
    graph = load_graph(read_model(real_model("dcn_resnet18")))
    optimise(graph, registry.passes())
    finish(graph)
    [given] = graph.inputs
    shape = [extent if isinstance(extent, int) else 1 for extent in given.shape]
    feeds = {given.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    amax: dict[str, float] = {}

    def see(name: str, array: Array) -> None:
        amax[name] = float(np.abs(array).max())

    made = {tensor.name for node in graph.nodes for tensor in node.inputs}
    simulator_of(graph).tensors(feeds, made, see)
    floats: Float = precision if precision == "bf16" else "fp16"
    nodes: dict[str, NodePrecision] = {
        node.name: precision if node.op == "Conv" else floats for node in graph.nodes
    }
    simulator = simulator_of(graph, floats, amax)
    reference = simulator.reference(feeds)
    found = simulator.run(reference, nodes)
    assert not same(found, dict(reference.outputs))
    assert same(found, lowered_and_simulated(graph, Lowering(nodes, floats, amax), feeds))


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(model=models(smooth=True), precision=st.sampled_from(["fp16", "bf16"]))
def test_any_model_is_about_what_its_lowered_model_is(
    model: onnx.ModelProto, precision: Float
) -> None:
    """Of what the pass leaves in fp32 where that saves Casts, the simulator is told."""
    graph = import_model(model)
    finish(graph)
    rng = np.random.default_rng(0)
    feeds: dict[str, Array] = {
        "x": rng.standard_normal((2, 3, 4)).astype(np.float32),
        "z": rng.standard_normal((3, 2)).astype(np.float32),
        "flag": np.array(True),
    }
    try:
        exact = OrtRunner(export_model(graph), Path()).run(feeds)
    except Rejected:
        reject()  # ONNX Runtime does not run the model itself: there is nothing to compare with
    simulator = simulator_of(graph)
    reference = simulator.reference(feeds)
    for name, array in exact.items():
        np.testing.assert_allclose(reference.outputs[name], array, rtol=1e-5, atol=1e-6)
    nodes: dict[str, NodePrecision] = {node.name: precision for node in all_nodes(graph)}
    copy = import_model(export_model(graph))
    report = optimise(copy, registry.lowerers(), lowering=Lowering(nodes))
    left = {name for record in report.records for name in record.skipped}
    found = simulator.run(reference, {name: p for name, p in nodes.items() if name not in left})
    expected = OrtRunner(simulated(export_model(copy)), Path()).run(feeds)
    step = 2.0 ** (-10 if precision == "fp16" else -7)
    for name, array in expected.items():
        scale = max(1.0, np.abs(reference.outputs[name]).max(initial=0))
        np.testing.assert_allclose(found[name], array, rtol=0, atol=16 * step * scale)


# --- bodies --------------------------------------------------------------------------------------

LOOP = """
g (float[N] x) => (float[N] y, float[N] z)
{
    [loop] y = Loop (trips, go, x) <body = b (int64 i, bool c, float[N] v)
        => (bool c_out, float[N] v_out)
    {
        [same]   c_out = Identity (c)
        [shrink] s = Mul (v, factor)
        [grow]   v_out = Add (s, x)
    }>
    [after] z = Exp (y)
}"""


def test_a_node_in_a_body_is_rounded_in_every_round() -> None:
    factor = np.array(0.7, np.float32)
    graph = graph_of(LOOP, trips=np.array(4), go=np.array(True), factor=factor)
    simulator = simulator_of(graph)
    x = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    reference = simulator.reference({"x": x})
    made = simulator.sessions
    seen: list[str] = []
    found = simulator.run(reference, {"shrink": "fp16"}, see=collecting(seen))
    value = x
    for _ in range(4):
        value = as_short(as_short(value) * as_short(factor)) + x
    np.testing.assert_array_equal(found["y"], value)
    assert seen == ["y", "z"]
    assert simulator.sessions == made + 1
    simulator.run(reference, {"shrink": "fp16"})
    assert simulator.sessions == made + 1


def test_a_loop_around_which_all_is_fp32_is_computed_once() -> None:
    graph = graph_of(LOOP, trips=np.array(4), go=np.array(True), factor=np.array(0.7, np.float32))
    simulator = simulator_of(graph)
    reference = simulator.reference({"x": np.ones(3, np.float32)})
    seen: list[str] = []
    simulator.run(reference, {"after": "fp16", "loop": "fp16"}, see=collecting(seen))
    assert seen == ["z"]


# --- 8 bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantising_is_that_of_the_pass_to_the_last_bit(precision: Any) -> None:
    """Up to 448 and down to -448: beyond, ONNX and numpy have other conventions."""
    dtype = DTYPES[precision]
    largest = LARGEST[precision]
    numbers = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    finite = np.sort(numbers[np.isfinite(numbers)])
    middles = (finite[1:] + finite[:-1]) / 2
    exact = np.concatenate([finite, middles, [largest * 2, -largest * 2, 1e30, np.inf, -np.inf]])
    sides = [np.nextafter(exact.astype(np.float32), np.float32(end)) for end in (-np.inf, np.inf)]
    x = np.concatenate([exact, *sides]).astype(np.float32)
    session = quantising_session(helper.np_dtype_to_tensor_dtype(dtype))
    for scale in (np.float32(1), np.float32(0.013), np.float32(37.5)):
        with np.errstate(over="ignore"):
            values = x * scale
        [found] = session.run([value_of(values), value_of(np.asarray(scale))])
        np.testing.assert_array_equal(found.numpy(), rounded(values, scale, precision))
    if precision == "fp8":
        clamped = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        [found] = session.run([value_of(x), value_of(np.asarray(np.float32(1)))])
        np.testing.assert_array_equal(found.numpy(), clamped)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("floats", ["fp32", "fp16", "bf16"])
def test_a_product_multiplies_quantised_operands(precision: Any, floats: Any) -> None:
    rng = np.random.default_rng(0)
    w, bias, x = (rng.uniform(0.2, 2, s).astype(np.float32) for s in ((2, 400), (400,), (3, 2)))
    simulator = simulator_of(graph_of(PRODUCT, w=w, bias=bias), floats, {"a": 2.0})
    found = simulator.run(simulator.reference({"x": x}), {"product": precision})["y"]
    a = rounded(np.maximum(x, 0), scale_of(2.0, precision), precision)
    scales = weight_scales(w, 1, precision)
    weights = rounded(w, scales, precision, 1)
    a, weights, addend = (as_short(array, floats) for array in (a, weights, bias))
    product = as_short(a @ weights + addend, floats)
    np.testing.assert_allclose(found, product * product, rtol=1e-5)


def test_a_product_whose_range_nobody_measured_stays_in_floats() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((32, 4)).astype(np.float32)
    graph = graph_of(PRODUCT, w=w, bias=np.zeros(4, np.float32))
    simulator = simulator_of(graph)
    reference = simulator.reference({"x": rng.standard_normal((3, 32)).astype(np.float32)})
    in_int8 = simulator.run(reference, {"product": "int8"})
    assert same(in_int8, simulator.run(reference, {"product": "fp16"}))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantised_convolutions_are_those_of_the_lowered_model(precision: Any) -> None:
    """Also the residual: it is read as the Conv beside it reads it."""
    graph = cnn()
    amax = {"x": 3.0, "b": 2.5, "h": 2.0}
    nodes: dict[str, NodePrecision] = {
        node.name: precision if node.op == "Conv" else "fp16" for node in graph.nodes
    }
    simulator = simulator_of(graph, amax=amax)
    found = simulator.run(simulator.reference(picture()), nodes)
    expected = lowered_and_simulated(graph, Lowering(nodes, "fp16", amax), picture())
    assert same(found, expected)


# --- calibration ---------------------------------------------------------------------------------


def test_wanted_tensors_are_shown_once() -> None:
    graph = cnn()
    simulator = simulator_of(graph)
    seen: dict[str, Array] = {}

    def see(name: str, array: Array) -> None:
        assert name not in seen
        seen[name] = array.copy()

    found = simulator.tensors(picture(), {"x", "b", "y", "w2"}, see)
    assert sorted(seen) == ["b", "w2", "x", "y"]
    np.testing.assert_array_equal(seen["x"], picture()["x"])
    np.testing.assert_array_equal(seen["y"], found["y"])
    assert seen["b"].shape == (2, 8, 12, 12)
    assert same(found, dict(simulator.reference(picture()).outputs))


# --- what there also is --------------------------------------------------------------------------


def test_text_sequences_and_omitted_inputs_pass_from_node_to_node() -> None:
    graph = graph_of(
        """g (float[2] x, string[1] s) => (float[4] y, string[2] t)
        {
            [clip]  a = Clip (x, , high)
            [exp]   b = Exp (a)
            [list]  l = SequenceConstruct (a, b)
            [join]  y = ConcatFromSequence <axis = 0> (l)
            [words] t = Concat <axis = 0> (s, word)
        }""",
        high=np.array(1, np.float32),
        word=np.array(["b"], object),
    )
    simulator = simulator_of(graph)
    x = np.array([0.3, 5], np.float32)
    reference = simulator.reference({"x": x, "s": np.array(["a"], object)})
    assert reference.outputs["t"].tolist() == ["a", "b"]
    found = simulator.run(reference, {"exp": "fp16"})
    exact = np.minimum(x, 1)
    np.testing.assert_array_equal(found["y"][:2], exact)
    np.testing.assert_allclose(found["y"][2:], as_short(np.exp(as_short(exact))), rtol=1e-7)


def test_random_numbers_are_drawn_once() -> None:
    graph = graph_of(
        """g (float[N] x) => (float[N] y)
        {
            [exp]   a = Exp (x)
            [noise] r = RandomNormalLike (a)
            [add]   y = Add (a, r)
        }"""
    )
    simulator = simulator_of(graph)
    reference = simulator.reference({"x": np.zeros(1000, np.float32) + np.float32(0.1)})
    found = simulator.run(reference, {"exp": "fp16"})
    assert 0 < np.abs(found["y"] - reference.outputs["y"]).max() < 1e-3


def test_a_model_that_is_in_short_floats_already_is_rounded_as_it_says() -> None:
    graph = graph_of(
        """g (float[N] x) => (float[N] y)
        {
            [down] h = Cast <to: int = 16> (x)
            [exp]  e = Mul (h, h)
            [up]   y = Cast <to: int = 1> (e)
        }"""
    )
    x = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    simulator = simulator_of(graph)
    short = as_short(x, "bf16")
    reference = simulator.reference({"x": x})
    np.testing.assert_array_equal(reference.outputs["y"], as_short(short * short, "bf16"))


def test_a_node_without_a_kernel_is_named() -> None:
    graph = graph_of("g (double[1,1,4,4] x) => (double[K] y) { [odd] y = Conv (x, x) }")
    with pytest.raises(ModelError, match=r"`odd` \(Conv\): .*NOT_IMPLEMENTED") as caught:
        simulator_of(graph).reference({"x": np.ones((1, 1, 4, 4))})
    assert caught.value.diagnostics[0].code == "cannot-simulate"


def test_a_node_that_stops_is_named() -> None:
    graph = graph_of("g (float[N] x, float[M] z) => (float[N] y) { [sum] y = Add (x, z) }")
    with pytest.raises(ModelError, match=r"`sum` \(Add\)") as caught:
        simulator_of(graph).reference({"x": np.ones(3, np.float32), "z": np.ones(2, np.float32)})
    assert caught.value.diagnostics[0].code == "simulation-failed"


def test_outputs_behind_a_node_that_low_precision_stops_are_of_no_shape_that_passes() -> None:
    graph = graph_of(
        """g (float[N] x, float[M] table) => (float[K] y, float[N] z)
        {
            [scale] a = Mul (x, thousand)
            [whole] i = Cast <to = 7> (a)
            [pick]  p = Gather (table, i)
            [after] y = Exp (p)
            [other] z = Neg (a)
        }""",
        thousand=np.array(1000, np.float32),
    )
    simulator = simulator_of(graph)
    # 2.0479 * 1000 is 2047, and 2048 where the scale is applied in bf16: one more than there are.
    feeds = {"x": np.array([2.0479, 0], np.float32), "table": np.ones(2048, np.float32)}
    reference = simulator.reference(feeds)
    seen: list[str] = []
    found = simulator.run(reference, {"scale": "bf16"}, see=collecting(seen))
    assert found["y"].shape == (2, 0)
    assert seen == ["a", "i", "z"]
    assert found["z"].tolist() == [-2048, 0]
    assert simulator.run(reference, {"after": "bf16"})["y"].shape == (2,)


@pytest.mark.parametrize("number", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_rounding_goes_along_any_axes(number: int) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(number)
    for shape in ((), (0, 3), (2, 3, 4)):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        [found] = rounding_session(number).run([ort.OrtValue.ortvalue_from_numpy(np.asarray(x))])
        np.testing.assert_array_equal(found.numpy(), np.asarray(x).astype(dtype).astype(np.float32))
