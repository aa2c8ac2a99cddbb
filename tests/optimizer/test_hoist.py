"""Control flow that no target takes is opened where that pays, with real engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from control_flow import branching, decoding, looping
from onnx import ModelProto, helper

from optc.optimizer.compile import compile_package, plan_package
from optc.optimizer.runtime import load
from optc.passes import registry
from optc.specs.check import check
from optc.specs.manifest import Manifest

AMPERE = "{name: ampere, compute_capability: 8.6}"
TURING = "{name: turing, compute_capability: 7.5}"
Spec = Callable[..., Path]


@pytest.fixture
def spec_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spec:
    """Return the function that writes a model and its spec, with a cache of its own."""
    monkeypatch.setenv("OPTC_CACHE_DIR", str(tmp_path / "cache"))

    def written(model: ModelProto, rest: str = "", targets: str = AMPERE) -> Path:
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, tmp_path / "model.onnx")
        text = f"version: 1\nmodel: model.onnx\ntargets: [{targets}]\n{rest}\n"
        (tmp_path / "spec.yaml").write_text(text)
        return tmp_path / "spec.yaml"

    return written


def checked(spec: Path) -> Any:
    return check(spec, known_passes=registry.names, options_of=registry.options_of)


def compiled(spec: Path) -> tuple[Path, Manifest]:
    outcome = compile_package(checked(spec), spec.parent / "package")
    assert not outcome.unmet
    return outcome.folder, outcome.manifest


def planned(spec: Path) -> Manifest:
    return plan_package(checked(spec), build=False).manifest


def runtime_of(manifest: Manifest, name: str) -> str:
    (stage,) = [stage for stage in manifest.stages if name in stage.nodes]
    return stage.runtime


def numbers(model: Path, feed: dict[str, Any]) -> dict[str, Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


# --- If ------------------------------------------------------------------------------------------


def test_the_heavy_part_of_a_branch_is_an_engine_in_front(spec_of: Spec) -> None:
    spec = spec_of(branching(), "verify: {}", f"{AMPERE}, {TURING}")
    folder, manifest = compiled(spec)
    assert [stage.runtime for stage in manifest.stages] == ["tensorrt", "onnxruntime"]
    assert {"conv1", "conv2"} <= set(manifest.stages[0].nodes)
    (why,) = {reason.op for reason in manifest.stages[1].why}
    assert why == "If"
    package = load(folder)
    rng = np.random.default_rng(0)
    for limit in (-1e9, 1e9):  # one branch, then the other
        feed = {
            "x": rng.standard_normal((1, 32, 64, 64)).astype(np.float32),
            "limit": np.array(limit, np.float32),
        }
        expected = numbers(spec.parent / "model.onnx", feed)["y"]
        np.testing.assert_allclose(package.run(feed)["y"], expected, rtol=1e-4, atol=1e-3)


def test_a_branch_with_too_little_to_do_stays_whole(spec_of: Spec) -> None:
    manifest = planned(spec_of(branching(size=8, channels=4)))
    assert not any("conv1" in stage.nodes for stage in manifest.stages)


def test_what_costs_more_on_the_gpu_stays_in_the_branch(spec_of: Spec) -> None:
    """The same model, where copies cost as much as on a slow bus."""
    manifest = planned(spec_of(branching(), "partition: {cost: {copy_us: 10000000}}"))
    assert not any("conv1" in stage.nodes for stage in manifest.stages)


def test_opening_can_be_disabled(spec_of: Spec) -> None:
    spec = spec_of(branching(), "passes: {disable: [open-branches]}")
    assert not any("conv1" in stage.nodes for stage in planned(spec).stages)
    spec = spec_of(looping(rounds=20), "passes: {disable: [unroll-loop], legalise: false}")
    assert runtime_of(planned(spec), "loop") == "onnxruntime"


def test_an_if_that_tensorrt_takes_stays_whole(spec_of: Spec) -> None:
    model = branching()
    (node,) = [node for node in model.graph.node if node.op_type == "If"]
    body = next(attr.g for attr in node.attribute if attr.name == "then_branch")
    where = next(n for n in body.node if n.op_type == "NonZero")
    where.op_type = "Sign"
    manifest = planned(spec_of(model))
    assert not any("conv1" in stage.nodes for stage in manifest.stages)
    assert runtime_of(manifest, "if") == "tensorrt"


def test_an_if_that_the_spec_keeps_off_stays_whole(spec_of: Spec) -> None:
    spec = spec_of(branching(), "partition: {off_tensorrt: [{op: If}]}")
    assert not any("conv1" in stage.nodes for stage in planned(spec).stages)


def test_a_node_that_the_spec_keeps_off_stays_off_in_front(spec_of: Spec) -> None:
    spec = spec_of(branching(), "partition: {off_tensorrt: [{node: conv2}]}")
    manifest = planned(spec)
    stages = [stage for stage in manifest.stages if "conv2" in stage.nodes]
    assert all(stage.runtime == "onnxruntime" for stage in stages)


def test_what_both_branches_end_in_is_an_engine_behind(spec_of: Spec) -> None:
    rows = 1024
    rng = np.random.default_rng(1)
    weight = rng.uniform(-0.05, 0.05, (512, 512)).astype(np.float32)
    source = """<ir_version: 9, opset_import: ["" : 17]>
        g (float[1024,512] x, bool c) => (float[1024,512] y) {
            [if] y = If (c) <
                then_branch = t () => (float[1024,512] p) {
                    [where] i = NonZero (x) [cast] j = Cast <to = 1> (i)
                    [sum] s = ReduceSum (j) [mul] a = Mul (x, s)
                    [tail1] a1 = MatMul (a, w) [tail2] a2 = Tanh (a1) [tail3] p = MatMul (a2, w) },
                else_branch = e () => (float[1024,512] q) {
                    [abs] b = Abs (x)
                    [end1] b1 = MatMul (b, w) [end2] b2 = Tanh (b1) [end3] q = MatMul (b2, w) }>
        }"""
    model = onnx.parser.parse_model(source)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    spec = spec_of(model, "verify: {}")
    folder, manifest = compiled(spec)
    assert runtime_of(manifest, "tail1") == runtime_of(manifest, "tail3") == "tensorrt"
    assert runtime_of(manifest, "if") == "onnxruntime"
    package = load(folder)
    for taken in (True, False):
        x = rng.uniform(-1e-6, 1e-6, (rows, 512)).astype(np.float32)
        feed = {"x": x, "c": np.array(taken)}
        expected = numbers(spec.parent / "model.onnx", feed)["y"]
        np.testing.assert_allclose(package.run(feed)["y"], expected, rtol=1e-4, atol=1e-4)


# --- Loop ----------------------------------------------------------------------------------------


def test_the_products_of_a_short_loop_become_engines(spec_of: Spec) -> None:
    spec = spec_of(looping(), "passes: {legalise: false}\nverify: {}")
    _, manifest = compiled(spec)
    assert sum(stage.runtime == "tensorrt" for stage in manifest.stages) in (3, 4)
    assert not any("loop" in stage.nodes for stage in manifest.stages)
    refused = {reason.op for stage in manifest.stages for reason in stage.why}
    assert "NonZero" in refused
    assert next(record for record in manifest.passes if record.name == "unroll-loop").removed


def test_a_loop_becomes_one_engine_where_its_rounds_can_be_rewritten(spec_of: Spec) -> None:
    (stage,) = planned(spec_of(looping())).stages
    assert stage.runtime == "tensorrt"


def test_rounds_that_cost_more_apart_stay_a_loop(spec_of: Spec) -> None:
    spec = spec_of(looping(rounds=20, size=4, channels=4), "passes: {legalise: false}")
    assert runtime_of(planned(spec), "loop") == "onnxruntime"


def test_a_loop_that_tensorrt_takes_stays_a_loop(spec_of: Spec) -> None:
    model = looping(rounds=20)
    body = model.graph.node[0].attribute[0].g
    next(n for n in body.node if n.op_type == "NonZero").op_type = "Sign"
    assert runtime_of(planned(spec_of(model)), "loop") == "tensorrt"


def test_a_greedy_decoder_runs_as_engine_and_loop(spec_of: Spec) -> None:
    """Its keys and values are part of the engine; how many words come out, the data says."""
    dims = "dims: {batch: {min: 1, opt: 2, max: 4}, wide: {min: 8, opt: 24, max: 64}}"
    spec = spec_of(decoding(), f"{dims}\nverify: {{}}")
    folder, manifest = compiled(spec)
    assert runtime_of(manifest, "keys") == runtime_of(manifest, "values") == "tensorrt"
    assert runtime_of(manifest, "enc3") == "tensorrt"
    assert runtime_of(manifest, "loop") == "onnxruntime"
    assert sum(stage.runtime == "tensorrt" for stage in manifest.stages) == 1
    package = load(folder)
    lengths = set()
    rng = np.random.default_rng(0)
    for batch, wide in [(1, 8), (1, 24), (2, 24), (4, 64), (1, 64), (1, 40)]:
        feed = {"image": (3 * rng.standard_normal((batch, 1, 16, wide))).astype(np.float32)}
        expected = numbers(spec.parent / "model.onnx", feed)
        found = package.run(feed)
        assert found["tokens"].dtype == np.int64
        np.testing.assert_array_equal(found["tokens"], expected["tokens"])
        lengths.add(found["tokens"].shape[1])
    assert len(lengths) > 1, "the decoder is to end early at times"


def test_a_node_that_the_spec_keeps_off_stays_off_in_front_of_its_loop(spec_of: Spec) -> None:
    dims = "dims: {batch: 2, wide: 24}"
    manifest = planned(
        spec_of(decoding(), f"{dims}\npartition: {{off_tensorrt: [{{node: keys}}]}}")
    )
    assert runtime_of(manifest, "keys") == "onnxruntime"
    assert runtime_of(manifest, "values") == "tensorrt"


def test_a_scope_keeps_its_control_flow_whole(spec_of: Spec) -> None:
    scope = "partition: {scopes: {choice: [if, mean, above]}}"
    manifest = planned(spec_of(branching(), scope))
    (stage,) = [stage for stage in manifest.stages if stage.name == "choice"]
    assert "if" in stage.nodes
    assert not any("conv1" in each.nodes for each in manifest.stages)


# --- what TensorRT takes whole -------------------------------------------------------------------

ROUND = "body = one (int64 i, bool go, float[2,4] h) => (bool on, float[2,4] z"
WHOLE = {
    "constant rounds": f"y = Loop (n, yes, x) <{ROUND}) {{ on = Identity (go) z = MatMul (h, w) }}>",
    "an early end": f"""y = Loop (n, yes, x) <{ROUND}) {{ z = MatMul (h, w)
        s = ReduceSum <keepdims = 0> (z) on = Less (s, big) }}>""",
    "a while": f"""y = Loop (, yes, x) <{ROUND}) {{ z = MatMul (h, w)
        s = ReduceSum <keepdims = 0> (z) on = Less (s, big) }}>""",
    "rounds that the data says": f"""u = ReduceMax <keepdims = 0> (x) t = Cast <to = 7> (u)
        y = Loop (t, yes, x) <{ROUND}) {{ on = Identity (go) z = MatMul (h, w) }}>""",
    "a scan output": f"""y, all = Loop (n, yes, x) <{ROUND}, float[2,4] r)
        {{ on = Identity (go) z = MatMul (h, w) r = Neg (z) }}>""",
}
NOT_WHOLE = {
    "a value that grows": """y = Loop (n, yes, x) <body = one (int64 i, bool go, float[a,4] h)
        => (bool on, float[b,4] z) { on = Identity (go) z = Concat <axis = 0> (h, x) }>""",
    "NonZero": f"""y = Loop (n, yes, x) <{ROUND}) {{ on = Identity (go) a = NonZero (h)
        b = Cast <to = 1> (a) s = ReduceSum <keepdims = 0> (b) z = Add (h, s) }}>""",
}


def loop_model(nodes: str) -> ModelProto:
    more = ", float[rounds,2,4] all" if "all" in nodes else ""
    rows = "rows" if "Concat" in nodes else "2"
    source = f"""<ir_version: 9, opset_import: ["" : 17]>
        g (float[2,4] x) => (float[{rows},4] y{more})
        <int64 n = {{5}}, bool yes = {{1}}, float big = {{100}},
         float[4,4] w = {{1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}}> {{ {nodes} }}"""
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(source))
    for index, node in enumerate(model.graph.node):
        node.name = f"node{index}"
    return model


@pytest.mark.parametrize("nodes", WHOLE.values(), ids=WHOLE)
def test_loops_that_tensorrt_takes_whole(tensorrt: Any, nodes: str) -> None:
    assert tensorrt.refusal(loop_model(nodes)) == ""


@pytest.mark.parametrize("nodes", NOT_WHOLE.values(), ids=NOT_WHOLE)
def test_loops_that_tensorrt_refuses(tensorrt: Any, nodes: str) -> None:
    assert tensorrt.refusal(loop_model(nodes)) != ""


def test_scan_outputs_behind_an_early_end_are_ruled_out(spec_of: Spec) -> None:
    """TensorRT takes them, and makes them as long as the trip count says."""
    nodes = f"""y, all = Loop (n, yes, x) <{ROUND}, float[2,4] r) {{ z = MatMul (h, w)
        s = ReduceSum <keepdims = 0> (z) on = Less (s, big) r = Neg (z) }}>"""
    manifest = planned(spec_of(loop_model(nodes)))
    (reason,) = [r for stage in manifest.stages for r in stage.why if r.op == "Loop"]
    assert reason.by == "rule"
    assert "trip count" in reason.text


def test_a_model_without_heavy_control_flow_is_not_asked_about(
    spec_of: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optc.optimizer.hoist import Asking

    def never(*args: object) -> object:
        raise AssertionError("asked")

    monkeypatch.setattr(Asking, "closed", never)
    relu = helper.make_node("Relu", ["x"], ["y"], name="relu")
    x, y = (helper.make_tensor_value_info(name, 1, [2]) for name in "xy")
    imports = [helper.make_opsetid("", 17)]
    graph = helper.make_graph([relu], "g", [x], [y])
    planned(spec_of(helper.make_model(graph, opset_imports=imports, ir_version=9)))
