"""What may pass between stages: every type an engine takes, nothing else, and no tensor too many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from optc.optimizer import gpu
from optc.optimizer.arrays import dtype_of
from optc.optimizer.compile import compile_package
from optc.optimizer.gpu import Device
from optc.optimizer.runtime import Package, load
from optc.passes import registry
from optc.passes.graph import import_model
from optc.passes.tensorrt_rule import shape_readers
from optc.specs.check import check
from optc.specs.manifest import Shapes, Stage

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
EVERY_ENGINE = "partition: {cost: {keep_share: 0}"
Compile = Callable[..., Package]


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compile:
    """Return the function that compiles a model for one GPU; no engine is too small to stay."""
    monkeypatch.setenv("OPTC_CACHE_DIR", str(tmp_path / "cache"))

    def package(model: ModelProto, *, off: str = "", dims: str = "", points: str = "") -> Package:
        onnx.save(model, tmp_path / "model.onnx")
        text = f"""version: 1
model: model.onnx
targets: [{{name: ampere, compute_capability: 8.6}}]
passes: {{legalise: false}}
{EVERY_ENGINE}, off_tensorrt: [{off}], points: [{points}]}}
"""
        (tmp_path / "spec.yaml").write_text(text + (f"dims: {dims}\n" if dims else ""))
        checked = check(
            tmp_path / "spec.yaml", known_passes=registry.names, options_of=registry.options_of
        )
        outcome = compile_package(checked, tmp_path / "package")
        assert not outcome.unmet
        return load(outcome.folder)

    return package


def parsed(source: str, **weights: tuple[int, ...]) -> ModelProto:
    model = onnx.parser.parse_model(HEAD + source)
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        values = rng.integers(-3, 4, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def engines(package: Package) -> list[Stage]:
    return [stage for stage in package.manifest.stages if stage.runtime == "tensorrt"]


def assert_as_the_original(package: Package, feed: dict[str, Any]) -> None:
    """Compare all outputs: values, dtypes and shapes. The weights are whole numbers: exact."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = package.path.parent / "model.onnx"
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = package.run(feed)
    for output in session.get_outputs():
        [expected] = session.run([output.name], feed)
        value = found[output.name]
        assert np.asarray(value).dtype == np.asarray(expected).dtype, output.name
        assert np.shape(value) == np.shape(expected), output.name
        np.testing.assert_array_equal(value, expected, err_msg=output.name)


# --- types ---------------------------------------------------------------------------------------

CROSSING = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}


@pytest.mark.parametrize("kind", CROSSING)
def test_a_type_leaves_one_engine_and_enters_the_next(compiled: Compile, kind: str) -> None:
    """In the fallback between them it is turned round."""
    model = parsed(
        f"""g (float[n,4] x) => (float[n,4] y) <int64[2] there = {{0, 1}}> {{
            [product] a = MatMul (x, w)
            [cast] b = Cast <to = {CROSSING[kind]}> (a)
            [turn] c = Transpose <perm = [1, 0]> (b)
            [back] d = Cast <to = 1> (c)
            [again] e = MatMul (v, d)
            [last] y = Transpose <perm = [1, 0]> (e)
        }}""",
        w=(4, 4),
        v=(4, 4),
    )
    dims = "{n: {min: 1, opt: 2, max: 5}}"
    package = compiled(model, off="{node: turn}", dims=dims, points="b, c")
    first, last = engines(package)
    assert [stage.runtime for stage in package.manifest.stages].count("onnxruntime") == 1
    [leaving], [entering] = first.outputs, last.inputs
    assert first.tensors[leaving].dtype == last.tensors[entering].dtype == kind
    rng = np.random.default_rng(1)
    for rows in (1, 5):
        assert_as_the_original(package, {"x": rng.integers(0, 3, (rows, 4)).astype(np.float32)})


@pytest.mark.parametrize("kind", ["float32", "int64", "bool"])
def test_a_scalar_crosses(compiled: Compile, kind: str) -> None:
    model = parsed(
        f"""g (float[3,4] x) => (float[3,4] y) {{
            [product] a = MatMul (x, w)
            [sum] s = ReduceSum <keepdims = 0> (a)
            [cut] t = Cast <to = {CROSSING[kind]}> (s)
            [back] u = Cast <to = 1> (t)
            [scale] b = Mul (a, u)
            [again] y = MatMul (b, w)
        }}""",
        w=(4, 4),
    )
    package = compiled(model, off="{node: cut}")
    shapes = [engine.tensors[name].shape for engine in engines(package) for name in engine.inputs]
    assert () in shapes
    assert_as_the_original(package, {"x": np.ones((3, 4), np.float32)})


# What an engine does not have stays where it is: between a product before and one behind.
FOREIGN = {
    "strings": """[text] s = Cast <to = 8> (a) [same] e = Equal (s, s) [cut] c = Cast <to = 1> (e)""",
    "sequences": """[list] s = SequenceConstruct (a, a) [len] l = SequenceLength (s)
        [at] e = SequenceAt (s, zero) [cut] c = Neg (e)""",
    "optionals": "[some] s = Optional (a) [get] e = OptionalGetElement (s) [cut] c = Neg (e)",
    "doubles": "[wide] d = Cast <to = 11> (a) [exp] f = Erf (d) [cut] c = Cast <to = 1> (f)",
}


@pytest.mark.parametrize("nodes", FOREIGN.values(), ids=FOREIGN)
def test_what_engines_have_not_stays_in_the_fallback(compiled: Compile, nodes: str) -> None:
    if "Erf" in nodes:
        nodes = nodes.replace("Erf", "Sin")
    source = f"""g (float[3,4] x) => (float[3,4] y) <int64 zero = {{0}}> {{
        [product] a = MatMul (x, w) {nodes} [again] y = MatMul (c, w) }}"""
    model = parsed(source.replace("Equal (s, s)", "StringsEqual (s, s)"), w=(4, 4))
    for node in model.graph.node:
        node.op_type = node.op_type.replace("StringsEqual", "Equal")
    model.opset_import[0].version = 19
    package = compiled(model)
    both = "product" in engines(package)[0].nodes and "again" in engines(package)[-1].nodes
    assert both or "Optional" in nodes  # of what comes out of an optional the rank is not known
    for engine in engines(package):
        for name in (*engine.inputs, *engine.outputs):
            assert engine.tensors[name].dtype in CROSSING
    assert_as_the_original(package, {"x": np.eye(3, 4, dtype=np.float32)})


def test_maps_of_classical_models_stay_in_the_fallback(compiled: Compile) -> None:
    """A ZipMap gives a sequence of maps; the product before it is an engine."""
    model = parsed("g (float[2,4] x) => (float[2,3] p) { [product] p = MatMul (x, w) }", w=(4, 3))
    zipped = helper.make_node(
        "ZipMap", ["p"], ["z"], "zip", domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]
    )
    model.graph.node.append(zipped)
    kind = helper.make_map_type_proto(
        TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    )
    model.graph.output.append(helper.make_value_info("z", helper.make_sequence_type_proto(kind)))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    package = compiled(model)
    (engine,) = engines(package)
    assert "zip" not in engine.nodes
    found = package.run({"x": np.eye(2, 4, dtype=np.float32)})
    assert [sorted(each) for each in found["z"]] == [[0, 1, 2]] * 2


# --- extents that the data decides ---------------------------------------------------------------

SIFTING = """g (float[n,4] x) => (float[kept,3] y) <float zero = {0}, int64[1] first = {0},
    int64[1] row = {1}> {
    [product] a = MatMul (x, w)
    [best] m = ReduceMax <axes = [1], keepdims = 0> (a)
    [above] c = Greater (m, zero)
    [where] i = NonZero (c)
    [flat] j = Squeeze (i, first)
    [pick] b = Gather (a, j)
    [again] d = MatMul (b, v)
    [act] y = Relu (d)
}"""


def ranges_of(profile: Mapping[str, Shapes]) -> list[tuple[int, int]]:
    """Return smallest and largest extent of each axis."""
    return [axis for each in profile.values() for axis in zip(each.min, each.max, strict=True)]


def sifting() -> ModelProto:
    model = parsed(SIFTING, v=(4, 3))
    model.graph.initializer.append(numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    return model


def test_what_finds_nothing_passes_on_nothing(compiled: Compile) -> None:
    package = compiled(sifting(), dims="{n: {min: 1, opt: 4, max: 16}}")
    last = engines(package)[-1]
    assert "again" in last.nodes
    (profile,) = last.profiles
    assert (0, 16) in ranges_of(profile), "as many as there are rows, and none"
    for values in (-1.0, 1.0):
        rows = np.full((5, 4), values, np.float32)
        assert_as_the_original(package, {"x": rows})
        assert package.run({"x": rows})["y"].shape == (0 if values < 0 else 5, 3)


def test_bounds_go_through_what_is_joined_and_sliced(compiled: Compile) -> None:
    source = SIFTING.replace(
        "[again] d = MatMul (b, v)",
        """[more] b2 = Concat <axis = 0> (b, b) [top] b3 = Slice (b2, first, seven)
        [again] d = MatMul (b3, v)""",
    ).replace("int64[1] row = {1}", "int64[1] seven = {7}")
    model = parsed(source, v=(4, 3))
    model.graph.initializer.append(numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    package = compiled(model, off="{node: top}", dims="{n: {min: 1, opt: 2, max: 16}}")
    (profile,) = engines(package)[-1].profiles
    assert (0, 7) in ranges_of(profile)
    for rows in (1, 16):
        for sign in (-1, 1):
            assert_as_the_original(package, {"x": np.full((rows, 4), sign, np.float32)})


def test_a_call_that_leaves_a_profile_runs_that_stage_as_onnx(
    compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spec may bound what is found tighter than it is; no GPU is needed to see what is chosen."""
    package = compiled(sifting(), dims="{n: 16, kept: {min: 0, opt: 2, max: 3}}")
    last = engines(package)[-1]
    (profile,) = last.profiles
    assert (0, 3) in ranges_of(profile)
    asked: list[int] = []

    class OnTheCpu:
        """An engine that gives what its ONNX gives, and notes that it was asked."""

        def __init__(self, backend: str, data: bytes, *rest: object) -> None:
            self.stage = next(
                stage
                for stage in package.manifest.stages
                if any((package.path / e.file).read_bytes() == data for e in stage.engines.values())
            )

        def run(self, given: dict[str, Any], profile: int) -> dict[str, Any]:
            asked.append(self.stage.id)
            session = ort.InferenceSession(package.path / self.stage.model)
            names = [output.name for output in session.get_outputs()]
            feed = {name: given[name] for name in self.stage.inputs}
            return dict(zip(names, session.run(names, feed), strict=True))

    monkeypatch.setattr(gpu, "visible_device", lambda: Device("Some GPU", "8.6"))
    monkeypatch.setattr(gpu, "is_installed", lambda backend: True)
    monkeypatch.setattr(gpu, "Engine", OnTheCpu)
    for found, holds in ((0, True), (3, True), (4, False), (16, False)):
        asked.clear()
        rows = np.full((16, 4), -1, np.float32)
        rows[:found] = 1
        assert_as_the_original(package, {"x": rows})
        assert package.last_run is not None
        run = next(run for run in package.last_run.stages if run.id == last.id)
        assert (last.id in asked) == holds
        assert (run.runtime == "tensorrt") == holds
        if not holds:
            assert f"is {found}, its engine takes 0 to 3" in (run.why or "")


# --- sizes ---------------------------------------------------------------------------------------


def test_shape_chains_are_repeated_on_both_sides(compiled: Compile) -> None:
    """A size that both engines need is computed in both; what crosses is the tensor alone."""
    model = parsed(
        """g (float[n,m,4] x) => (float[n,m,4] y) <int64[1] last = {-1}, int64[1] four = {4}> {
            [size] s = Shape (x)
            [rows] r = Shape <start = 0, end = 2> (x)
            [flat] f = Reshape (x, flat2)
            [product] a = MatMul (f, w)
            [full] t = Concat <axis = 0> (r, four)
            [fold] b = Reshape (a, t)
            [cut] c = Neg (b)
            [flat3] g = Reshape (c, flat2)
            [again] h = MatMul (g, w)
            [fold2] y = Reshape (h, t)
        }""",
        w=(4, 4),
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 4], np.int64), "flat2"))
    dims = "{n: {min: 1, opt: 2, max: 3}, m: {min: 1, opt: 2, max: 5}}"
    package = compiled(model, off="{node: cut}", dims=dims)
    assert len(engines(package)) == 2
    assert no_size_enters(package)
    for shape in ((1, 1, 4), (3, 5, 4)):
        assert_as_the_original(package, {"x": np.ones(shape, np.float32)})


def no_size_enters(package: Package) -> bool:
    """Whether no engine reads how large something is from outside."""
    for stage in engines(package):
        graph = import_model(onnx.load(package.path / stage.model), package.path / "stages")
        if shape_readers(graph.nodes, stage.inputs):
            return False
    return True


def test_every_type_here_is_one_that_a_manifest_can_name() -> None:
    assert all(dtype_of(kind) is not None for kind in CROSSING)
