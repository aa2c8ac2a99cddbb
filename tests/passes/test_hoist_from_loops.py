"""What is the same in every round of a Loop or Scan is computed in front of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from generated import models
from graphs import assert_same_numbers, parsed, rewrite, run
from hypothesis import HealthCheck, given, settings
from onnx import ModelProto
from test_generated_graphs import expected_outputs, outputs

from optc.passes.graph import export_model, import_model
from optc.passes.hoist_from_loops import HoistFromLoops
from optc.passes.pipeline import optimise

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
WEIGHTS = "float[2,2] w = {1, 2, 3, 4}, bool yes = {1}, int64 three = {3}"


def looping(nodes: str, *, trips: str = "n", go: str = "c", shape: str = "2,2") -> str:
    """Return a model whose Loop carries `h` to `b` by ``nodes``; it may read `e` from outside."""
    return f"""{HEAD} g (float[2,2] x, float[{shape}] e, int64 n, bool c) => (float[2,2] y)
        <{WEIGHTS}>
        {{ [loop] y = Loop ({trips}, {go}, x) <
            body = one (int64 i, bool go, float[2,2] h) => (bool again, float[2,2] b)
            {{ [on] again = Identity (go) {nodes} }}> }}"""


KEYS = "[keys] k = MatMul (e, w) [act] r = Relu (k) [next] b = MatMul (h, r)"


def ops(graph: onnx.GraphProto) -> list[str]:
    return [node.op_type for node in graph.node]


def body_of(model: ModelProto) -> onnx.GraphProto:
    (loop,) = [node for node in model.graph.node if node.op_type in ("Loop", "Scan")]
    return next(attr.g for attr in loop.attribute if attr.name == "body")


def assert_same_for(before: ModelProto, after: ModelProto, **given_: Any) -> None:
    rng = np.random.default_rng(0)
    inputs = {
        info.name: rng.standard_normal(
            [dim.dim_value or 2 for dim in info.type.tensor_type.shape.dim]
        ).astype(np.float32)
        for info in before.graph.input
    }
    inputs |= {name: np.asarray(value) for name, value in given_.items()}
    for name, value in run(before, inputs).items():
        found = run(after, inputs)[name]
        assert found.shape == value.shape
        np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize(("trips", "go"), [(0, True), (3, True), (3, False), (1, True)])
def test_what_reads_only_from_outside_stands_in_front(trips: int, go: bool) -> None:
    before, after, report = rewrite(looping(KEYS), HoistFromLoops())
    assert ops(after.graph) == ["MatMul", "Relu", "Loop"]
    assert ops(body_of(after)) == ["Identity", "MatMul"]
    assert report.merged == {"keys": ("keys",), "act": ("act",)}
    assert_same_for(before, after, n=np.int64(trips), c=np.bool_(go))


def test_what_may_fail_stays_where_there_may_be_no_round() -> None:
    """A MatMul of 3 columns with 2 rows fails: the Loop of no rounds does not."""
    before, after, report = rewrite(looping(KEYS, shape="2,k"), HoistFromLoops())
    assert ops(after.graph) == ["Loop"]
    assert report.skipped["keys"] == "it may fail, and there may be no round"
    wrong = np.ones((2, 3), np.float32)
    assert_same_for(before, after, n=np.int64(0), c=np.bool_(True), e=wrong)


def test_what_may_fail_moves_where_there_is_a_round() -> None:
    before, after, _ = rewrite(
        looping(KEYS, shape="2,k", trips="three", go="yes"), HoistFromLoops()
    )
    assert ops(after.graph) == ["MatMul", "Relu", "Loop"]
    assert_same_numbers(before, after, rtol=0)


def test_a_condition_that_only_the_run_knows_may_mean_no_round() -> None:
    _, after, _ = rewrite(looping(KEYS, shape="2,k", trips="three"), HoistFromLoops())
    assert ops(after.graph) == ["Loop"]


def test_a_trip_count_that_is_an_extent_means_a_round() -> None:
    """An extent is at least 1; the Loop over a sequence runs."""
    source = looping(KEYS, shape="2,k", trips="m", go="yes").replace(
        "{ [loop]", "{ [shape] s = Shape <start = 1> (e) [m] m = Squeeze (s) [loop]"
    )
    _, after, _ = rewrite(source, HoistFromLoops())
    assert ops(after.graph) == ["Shape", "Squeeze", "MatMul", "Relu", "Loop"]


def test_what_the_body_gives_out_stays_in_it() -> None:
    source = looping("b = MatMul (e, w)")
    _, after, report = rewrite(source.replace("b = M", "[all] b = M"), HoistFromLoops())
    assert ops(after.graph) == ["Loop"]
    assert report.skipped == {"all": "the body gives its result out"}


def test_what_differs_by_round_stays() -> None:
    nodes = "[draw] d = RandomNormal <shape = [2, 2]> () [sum] k = Add (d, e) b = MatMul (h, k)"
    _, after, report = rewrite(looping(nodes, trips="three", go="yes"), HoistFromLoops())
    assert ops(after.graph) == ["Loop"]
    assert report.skipped == {"draw": "it may give another result in each round"}


def test_the_weights_of_a_product_that_stays_stay_with_it() -> None:
    nodes = "[whole] q = DequantizeLinear (v, s) [next] b = MatMul (h, q)"
    source = looping(nodes).replace(WEIGHTS, "int8[2,2] v = {1, 2, 3, 4}, float s = {0.5}")
    _, after, _ = rewrite(source, HoistFromLoops())
    assert ops(body_of(after)) == ["Identity", "DequantizeLinear", "MatMul"]


def test_a_node_leaves_bodies_within_bodies() -> None:
    inner = """b = Loop (i, go, h) < body = two (int64 j, bool on, float[2,2] p)
        => (bool o, float[2,2] q) { o = Identity (on) [keys] k = MatMul (e, w) q = Add (p, k) }>"""
    before, after, report = rewrite(looping(inner), HoistFromLoops())
    assert ops(after.graph) == ["MatMul", "Loop"]
    assert report.merged == {"keys": ("keys",)}
    assert_same_for(before, after, n=np.int64(3), c=np.bool_(True))


def test_a_node_in_a_branch_stays_in_it() -> None:
    branch = """b = If (go) <then_branch = t () => (float[2,2] u) { k = MatMul (e, w)
        u = Add (h, k) }, else_branch = f () => (float[2,2] v) { v = Neg (h) }>"""
    _, after, report = rewrite(looping(branch), HoistFromLoops())
    assert ops(after.graph) == ["Loop"]
    assert not report.rewritten


SCAN = f"""{HEAD} g (float[2,2] x, float[LENGTH,2,2] rows, float[2,2] e)
    => (float[2,2] y, float[k,2,2] all) <{WEIGHTS}>
    {{ [scan] y, all = Scan <num_scan_inputs = 1, body = one (float[2,2] h, float[2,2] r)
        => (float[2,2] b, float[2,2] o) {{ [keys] k = MatMul (e, w) b = MatMul (h, k)
            o = Add (b, r) }}> (x, rows) }}"""


@pytest.mark.parametrize("length", ["3", "n"])
def test_a_scan_is_treated_the_same(length: str) -> None:
    before, after, _ = rewrite(SCAN.replace("LENGTH", length), HoistFromLoops())
    assert ops(after.graph) == ["MatMul", "Scan"]
    assert_same_numbers(before, after, rtol=0)


def test_a_tensor_that_is_an_output_of_the_model_keeps_its_name() -> None:
    source = looping(KEYS).replace("float[2,2] y)", "float[2,2] y, float[2,2] z)")
    before, after, _ = rewrite(source.replace("}> }", "}> z = Neg (y) }"), HoistFromLoops())
    assert [info.name for info in after.graph.output] == ["y", "z"]
    assert_same_for(before, after, n=np.int64(2), c=np.bool_(True))


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(model=models(smooth=False))
def test_random_models_keep_their_numbers(model: ModelProto) -> None:
    """Their Loops make no to three rounds, with whatever in the body."""
    graph = import_model(model)
    optimise(graph, [HoistFromLoops()])
    after = export_model(graph)
    onnx.checker.check_model(after)
    for flag in (True, False):
        expected, found = expected_outputs(model, flag=flag), outputs(after, flag=flag)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)


def test_the_checker_takes_what_is_left() -> None:
    onnx.checker.check_model(rewrite(looping(KEYS), HoistFromLoops())[1], full_check=True)
    assert parsed(looping(KEYS)).graph.node[0].op_type == "Loop"
