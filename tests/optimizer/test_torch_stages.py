"""Models of which torch runs a part, the whole way: spec, package, run, verification."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from modules import scripted
from onnx import numpy_helper

import optc
from optc.optimizer import torch_module
from optc.optimizer.compile import compile_package, plan_package, verify_package
from optc.optimizer.model_file import load_graph, read_model
from optc.optimizer.operators import Operators
from optc.optimizer.reference import Model, Rejected
from optc.optimizer.summary import Outcome
from optc.passes import registry
from optc.specs.check import check
from optc.specs.diagnostic import EnvironmentFault, InputError, OptcError, SpecError

pytestmark = pytest.mark.torch

HEAD = '<ir_version: 9, opset_import: ["" : 17, "acme" : 1]>'
CONVS = """
g (float[batch, 2, 8, 8] x) => (float[batch, 3, 8, 8] y)
{
    [first]  a = Conv <pads = [1, 1, 1, 1]> (x, w0)
    [relu]   b = Relu (a)
    [mine]   c = acme.Shrink <lambd = 0.25, strict = 1> (b)
    [second] d = Conv <pads = [1, 1, 1, 1]> (c, w1)
    [last]   y = Sigmoid (d)
}"""
SHRINK = """
def forward(self, x, lambd: float, strict: bool = False):
    return torch.nn.functional.softshrink(x, lambd) if strict else x
"""
OPERATOR = "operators:\n  - {op: acme::Shrink, outputs: [{like: 0}], torch: shrink.pt}\n"
DIMS = "dims: {batch: {min: 1, opt: 2, max: 4}}\n"
HEADER = (
    "version: 1\nmodel: m.onnx\n"
    'targets: [{name: ampere, compute_capability: "8.6"}]\n'
    "verify: {atol: 1.0e-4, rtol: 1.0e-4}\n"
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model(text: str, **weights: tuple[int, ...]) -> onnx.ModelProto:
    """Write m.onnx with weights of these shapes, drawn from a seed."""
    made = onnx.parser.parse_model(HEAD + text)
    random = np.random.default_rng(0)
    made.graph.initializer.extend(
        numpy_helper.from_array(random.standard_normal(shape).astype(np.float32) / 4, name)
        for name, shape in weights.items()
    )
    onnx.save(made, "m.onnx")
    return made


def convs(module: str | None = SHRINK) -> None:
    model(CONVS, w0=(3, 2, 3, 3), w1=(3, 3, 3, 3))
    if module is not None:
        scripted(Path("shrink.pt"), module)


def compiled(spec: str) -> Outcome:
    Path("spec.yaml").write_text(HEADER + spec)
    checked = check("spec.yaml", known_passes=registry.names, options_of=registry.options_of)
    return compile_package(checked, Path("package"))


def refused(spec: str) -> OptcError:
    with pytest.raises(OptcError) as caught:
        compiled(spec)
    return caught.value


def stages() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Path("package/manifest.json").read_text())["stages"]
    return found


# --- a custom operator ---------------------------------------------------------------------------


def test_a_custom_operator_is_a_stage_of_its_own_between_engines() -> None:
    convs()
    outcome = compiled(DIMS + OPERATOR)
    outcome.check()
    first, mine, second = stages()
    assert [stage["runtime"] for stage in (first, mine, second)] == [
        *("tensorrt", "torch", "tensorrt"),
    ]
    assert set(first["engines"]) == set(second["engines"]) == {"ampere"}
    assert mine["module"] == "modules/Shrink.pt"
    assert mine["nodes"] == ["mine"]
    assert mine["why"][0]["by"] == "spec"
    manifest = outcome.manifest
    assert manifest.modules == {"acme::Shrink": "modules/Shrink.pt"}
    assert "modules/Shrink.pt" in manifest.files
    (node,) = onnx.load(f"package/{mine['model']}").graph.node
    assert (node.op_type, node.domain) == ("Shrink", "acme")
    assert "torch" in manifest.environment["libraries"]  # type: ignore[operator]


def test_what_runs_gives_what_the_modules_numbers_say() -> None:
    convs()
    compiled(DIMS + OPERATOR)
    package = optc.load("package")
    x = np.random.default_rng(1).standard_normal((3, 2, 8, 8)).astype(np.float32)
    found = package.run({"x": x})["y"]
    plain = onnx.parser.parse_model(
        HEAD
        + CONVS.replace(
            "acme.Shrink <lambd = 0.25, strict = 1>", "Shrink <lambd = 0.25, bias = 0.25>"
        )
    )
    plain.graph.initializer.extend(onnx.load("m.onnx").graph.initializer)
    (expected,) = ort.InferenceSession(plain.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert package.last_run is not None
    ran = package.last_run.stages[1]
    assert (ran.runtime, ran.device, ran.file) == ("torch", "cpu", "modules/Shrink.pt")
    assert "modules/Shrink.pt on torch, cpu" in package.last_run.render()


def test_a_package_is_verified_without_the_spec_and_its_modules() -> None:
    convs()
    compiled(DIMS + OPERATOR).check()
    Path("shrink.pt").unlink()
    done = verify_package(Path("package"))
    assert done.exit_code == 0
    assert "in 2 parts beside torch" in done.reference
    assert "stage 1 on torch, on the CPU" in done.render()


def test_a_module_that_was_changed_is_not_run() -> None:
    convs()
    compiled(DIMS + OPERATOR)
    with Path("package/modules/Shrink.pt").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError) as caught:
        optc.load("package").run({"x": np.zeros((1, 2, 8, 8), np.float32)})
    assert caught.value.diagnostics[0].code == "damaged-package"
    assert "modules/Shrink.pt" in caught.value.diagnostics[0].problem


def test_one_module_for_several_nodes_and_operators_is_stored_once() -> None:
    twice = CONVS.replace(
        "[last]   y = Sigmoid (d)",
        "e = acme.Shrink <lambd = 0.125, strict = 1> (d)\n y = acme.Other <lambd = 0.1> (e)",
    )
    model(twice, w0=(3, 2, 3, 3), w1=(3, 3, 3, 3))
    scripted(Path("shrink.pt"), SHRINK)
    shutil.copy("shrink.pt", "copy.pt")
    operators = OPERATOR + "  - {op: acme::Other, outputs: [{like: 0}], torch: copy.pt}\n"
    compiled(DIMS + operators).check()
    modules = [stage["module"] for stage in stages() if stage["runtime"] == "torch"]
    assert modules == ["modules/Shrink.pt"] * 3
    assert [path.name for path in Path("package/modules").iterdir()] == ["Shrink.pt"]


def test_a_plan_says_the_same_and_writes_nothing() -> None:
    convs()
    Path("spec.yaml").write_text(HEADER + DIMS + OPERATOR)
    plan = plan_package(check("spec.yaml", known_passes=registry.names))
    assert [stage.runtime for stage in plan.manifest.stages] == ["tensorrt", "torch", "tensorrt"]
    assert not Path("package").exists()


def test_a_size_that_a_module_reads_is_computed_for_it() -> None:
    model(
        """
        g (float[batch, 2, 8, 8] x) => (float[batch, 3, 8, 8] y)
        <int64[1] at = {0}>
        {
            [first]  a = Conv <pads = [1, 1, 1, 1]> (x, w0)
            [shape]  s = Shape (a)
            [rows]   r = Gather (s, at)
            [mine]   c = acme.Scaled (a, r)
            [second] d = Conv <pads = [1, 1, 1, 1]> (c, w1)
            [last]   y = Sigmoid (d)
        }""",
        w0=(3, 2, 3, 3),
        w1=(3, 3, 3, 3),
    )
    scripted(Path("scaled.pt"), "def forward(self, x, rows):\n    return x / rows.to(x.dtype)\n")
    compiled(
        DIMS + "operators: [{op: acme::Scaled, outputs: [{like: 0}], torch: scaled.pt}]\n"
    ).check()
    assert [stage["runtime"] for stage in stages()].count("torch") == 1


def test_a_constant_that_a_module_reads_is_in_the_package() -> None:
    model(
        """
        g (float[batch, 64] x) => (float[batch, 64] y)
        {
            [first] a = MatMul (x, w0)
            [mine]  c = acme.Product (a, w1)
            [last]  y = MatMul (c, w0)
        }""",
        w0=(64, 64),
        w1=(64, 80),
    )
    scripted(Path("product.pt"), "def forward(self, x, w):\n    return (x @ w)[:, :64]\n")
    compiled(
        DIMS + "operators: [{op: acme::Product, outputs: [{like: 0}], torch: product.pt}]\n"
    ).check()
    mine = next(stage for stage in stages() if stage["runtime"] == "torch")
    assert mine["inputs"] == ["a"]


DETECTED = """
g (float[batch, 2, 8, 8] x) => (float[rows, 3] y)
{
    [first] a = Conv <pads = [1, 1, 1, 1]> (x, w0)
    [mine]  p = acme.Peaks (a)
    [last]  y = MatMul (p, w1)
}"""
PEAKS = "def forward(self, x):\n    return x[x > 1e9].reshape(-1, 1).expand(-1, 4)\n"


def peaks(bound: str = "") -> str:
    model(DETECTED, w0=(3, 2, 3, 3), w1=(4, 3))
    scripted(Path("peaks.pt"), PEAKS)
    return (
        "operators:\n  - op: acme::Peaks\n    inputs: [[n, c, h, w]]\n"
        f"    outputs: [{{dtype: float32, shape: [found, 4]}}]\n    torch: peaks.pt\n{bound}"
    )


def test_no_rows_at_all_pass_between_the_stages() -> None:
    compiled(DIMS + peaks("    bounds: {found: n * h * w}\n")).check()
    found = optc.load("package").run({"x": np.ones((1, 2, 8, 8), np.float32)})
    assert found["y"].shape == (0, 3)


def test_an_engine_behind_an_axis_without_a_bound_is_not_built_and_it_is_said_which() -> None:
    compiled(DIMS + peaks()).check()
    *_, last = stages()
    assert last["runtime"] == "onnxruntime"
    (why,) = {reason["text"] for reason in last["why"]}
    assert why == (
        "nothing bounds `rows`, an axis of `p`, which enters the engine here; give it a range "
        "under `dims` in the spec"
    ) or why.startswith("nothing bounds `p_0`, an axis of `p`")
    name = why.split("`")[1]
    compiled(f"dims: {{batch: 2, {name}: {{min: 0, opt: 8, max: 64}}}}\n" + peaks()).check()
    assert [stage["runtime"] for stage in stages()] == ["tensorrt", "torch", "tensorrt"]


def test_torch_runs_what_the_engine_of_a_plugin_does_not() -> None:
    convs()
    Path("plugin.so").touch()
    both = OPERATOR.replace("torch: shrink.pt", "torch: shrink.pt, tensorrt: plugin.so")
    Path("spec.yaml").write_text(HEADER + DIMS + both)
    checked = check("spec.yaml")
    graph = load_graph(read_model(checked.model_path), checked.inputs)
    operators = Operators(checked)
    assert operators.off(graph) == {}
    assert operators.runtimes(graph) == {"mine": "torch"}


# --- what is wrong with a module -----------------------------------------------------------------


def test_an_attribute_that_a_module_does_not_take_is_an_error_before_anything_is_built() -> None:
    convs("def forward(self, x, lambd: float):\n    return x\n")
    error = refused(DIMS + OPERATOR)
    assert isinstance(error, SpecError)
    (problem,) = error.diagnostics
    assert problem.code == "bad-module"
    assert (
        "the node has an attribute `strict`, which its `forward` does not take" in problem.problem
    )
    assert problem.place is not None
    assert problem.place.line == 7
    assert not Path("package").exists()


def test_a_node_in_a_body_is_not_for_torch() -> None:
    model(
        """
        g (float[batch, 4] x, bool c) => (float[batch, 4] y)
        {
            [if] i = If (c)
              <then_branch = t () => (float[n, 4] t1) { [inner] t1 = acme.Shrink <lambd = 0.25> (x) },
               else_branch = e () => (float[n, 4] e1) { e1 = Neg (x) }>
            y = Relu (i)
        }"""
    )
    scripted(Path("shrink.pt"), SHRINK)
    (problem,) = refused(DIMS + OPERATOR).diagnostics
    assert problem.code == "torch-in-body"
    assert "in the body of a control-flow node: `inner`" in problem.problem


def test_a_node_in_a_body_of_a_function_is_not_for_torch_either() -> None:
    made = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 17, "acme" : 1, "mine" : 1]>
        g (float[batch, 4] x, bool c) => (float[batch, 4] y) { y = mine.either (x, c) }
        <domain: "mine", opset_import: ["" : 17, "acme" : 1]>
        either (x, c) => (y) {
            y = If (c)
              <then_branch = t () => (t1) { [inner] t1 = acme.Shrink <lambd = 0.25> (x) },
               else_branch = e () => (e1) { e1 = Neg (x) }>
        }
        """
    )
    onnx.save(made, "m.onnx")
    scripted(Path("shrink.pt"), SHRINK)
    (problem,) = refused(DIMS + OPERATOR).diagnostics
    assert problem.code == "torch-in-body"
    assert "in the body of a control-flow node: `inner__1`" in problem.problem


def test_a_file_that_is_no_module_is_an_error_at_its_place() -> None:
    convs(None)
    Path("shrink.pt").write_bytes(b"\0")
    error = refused(DIMS + OPERATOR)
    assert error.diagnostics[0].code == "bad-module"
    assert "is neither TorchScript nor an exported program" in error.diagnostics[0].problem


def test_without_torch_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    convs()

    def missing() -> Any:
        raise EnvironmentFault(optc.specs.diagnostic.Diagnostic("missing-extra", "no torch"))

    monkeypatch.setattr(torch_module, "require_torch", missing)
    assert isinstance(refused(DIMS + OPERATOR), EnvironmentFault)
    assert not Path("package").exists()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            "def forward(self, x, lambd: float, strict: int):\n    return x.double()\n",
            "result 0 of `Shrink.pt`, `c`, is float64, and has to be float32",
        ),
        (
            "def forward(self, x, lambd: float, strict: int):\n    return x[:, :2]\n",
            "`c`, is of shape [2, 2, 8, 8], and has to be [?, 3, 8, 8]",
        ),
        (
            "def forward(self, x, lambd: float, strict: int):\n    return x, x\n",
            "`Shrink.pt` gives 2 tensors, and has to give 1: `c`",
        ),
    ],
)
def test_a_module_that_gives_something_else_is_told_in_words(module: str, words: str) -> None:
    convs(module)
    (problem,) = refused(DIMS + OPERATOR).diagnostics
    assert problem.code == "bad-module"
    assert words in problem.problem.replace("shrink.pt", "Shrink.pt")


def test_a_module_that_fails_on_all_made_up_input_is_told_in_its_words() -> None:
    convs("def forward(self, x, lambd: float, strict: int):\n    return x @ x.t()\n")
    outcome = compiled(DIMS + OPERATOR)
    assert [problem.code for problem in outcome.unmet] == ["nothing-verified"]
    told = [note.problem for note in outcome.notes if note.code == "made-up-input-rejected"]
    assert len(told) == 3
    assert all("`Shrink.pt` fails: " in words for words in told)


def test_an_attribute_of_an_exported_program_is_noted() -> None:
    torch = torch_module.require_torch()

    class Shrink(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return torch.nn.functional.softshrink(x, 0.25)

    convs(None)
    batch = {0: torch.export.Dim("batch", min=1, max=4)}
    program = torch.export.export(Shrink(), (torch.ones(2, 3, 8, 8),), dynamic_shapes=(batch,))
    torch.export.save(program, "shrink.pt2")
    outcome = compiled(DIMS + OPERATOR.replace("shrink.pt", "shrink.pt2"))
    outcome.check()
    notes = [note for note in outcome.notes if note.code == "attribute-not-given"]
    assert ["`lambd`" in note.problem for note in notes] == [True, False]
    assert all(note.severity == "note" for note in notes)


# --- a range -------------------------------------------------------------------------------------

HEADED = """
g (float[batch, 2, 8, 8] x) => (float[batch, 3] y)
{
    [first]  a = Conv <pads = [1, 1, 1, 1]> (x, w0)
    [relu]   b = Relu (a)
    [pool]   p = GlobalAveragePool (b)
    [flat]   f = Flatten (p)
    [hidden] h = Gemm <transB = 1> (f, w1, b1)
    [tanh]   t = Tanh (h)
    [out]    o = Gemm <transB = 1> (t, w2, b2)
    [last]   y = Softmax (o)
}"""
SHAPES = {"w0": (3, 2, 3, 3), "w1": (16, 3), "b1": (16,), "w2": (3, 16), "b2": (3,)}
REPLACE = "partition:\n  replace: [{name: head, from: [f], to: [o], torch: head.pt2}]\n"


def headed(change: Callable[[dict[str, Any]], None] = lambda weights: None) -> None:
    """Write the model, and the module of its head with the same weights, changed."""
    torch = torch_module.require_torch()
    made = model(HEADED, **SHAPES)
    weights = {t.name: numpy_helper.to_array(t).copy() for t in made.graph.initializer}
    change(weights)

    class Head(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.hidden = torch.nn.Linear(3, 16)
            self.out = torch.nn.Linear(16, 3)
            names = {"hidden.weight": "w1", "hidden.bias": "b1"}
            names |= {"out.weight": "w2", "out.bias": "b2"}
            self.load_state_dict({k: torch.from_numpy(weights[v]) for k, v in names.items()})

        def forward(self, x: Any) -> Any:
            return self.out(self.hidden(x).tanh())

    batch = {0: torch.export.Dim("batch", min=1, max=4)}
    program = torch.export.export(Head(), (torch.ones(2, 3),), dynamic_shapes=(batch,))
    torch.export.save(program, "head.pt2")


def test_a_module_with_learned_weights_stands_for_a_range() -> None:
    headed()
    outcome = compiled(DIMS + REPLACE)
    outcome.check()
    head = next(stage for stage in stages() if stage["runtime"] == "torch")
    assert (head["name"], head["module"]) == ("head", "modules/head.pt2")
    (why,) = head["why"]
    assert why["text"] == "partition.replace: head"
    assert {"hidden", "tanh", "out"} == set(why["origins"])
    whole = onnx.load("package/model.onnx").graph
    assert {"hidden", "tanh", "out"}.isdisjoint(node.name for node in whole.node)
    assert verify_package(Path("package")).exit_code == 0


def test_a_module_with_other_weights_is_found_out_and_the_first_difference_named() -> None:
    def change(weights: dict[str, Any]) -> None:
        weights["b2"][0] += 1

    headed(change)
    outcome = compiled(DIMS + REPLACE)
    assert [problem.code for problem in outcome.unmet] == ["verify-not-met"]
    assert outcome.verification is not None
    first = outcome.verification.first
    assert first is not None
    assert (first.tensor, first.rewritten) == ("o", "head")


def test_a_point_inside_a_range_is_told() -> None:
    headed()
    replaced = REPLACE.replace("partition:", "partition:\n  points: [t]")
    outcome = compiled(DIMS + replaced)
    (note,) = [note for note in outcome.notes if note.code == "point-is-no-cut"]
    assert "in a range that is replaced" in note.problem


def test_torch_is_no_fallback_for_operators_of_onnx() -> None:
    headed()
    (problem,) = refused(DIMS + REPLACE + "fallback: {runtime: torch}\n").diagnostics
    assert problem.code == "not-in-this-version"
    assert "no operator of ONNX: these run on ONNX Runtime" in problem.problem


def test_a_range_is_no_obstacle_to_low_precision() -> None:
    headed()
    spec = DIMS + "precision: fp16\n" + REPLACE
    outcome = compiled(spec.replace("1.0e-4", "1.0e-2"))
    assert not any(problem.code == "package-does-not-run" for problem in outcome.unmet)
    assert any("fp16" in stage["precision"]["nodes"] for stage in stages())


# --- the original in parts -----------------------------------------------------------------------


@pytest.fixture
def original(here: Path) -> Model:
    convs()
    return Model(Path("m.onnx"), (), {("acme", "Shrink"): Path("shrink.pt")})


def fed() -> dict[str, Any]:
    return {"x": np.random.default_rng(0).standard_normal((2, 2, 8, 8)).astype(np.float32)}


def test_an_original_runs_in_as_few_parts_as_its_modules_leave(original: Model) -> None:
    runner = original.runner
    assert runner.engine.startswith(f"ONNX Runtime {ort.__version__} on the CPU, in 2 parts beside")
    assert (runner.inputs, runner.outputs) == (("x",), ("y",))
    assert runner.run(fed())["y"].shape == (2, 3, 8, 8)
    assert not original.by_evaluator


def test_tensors_inside_an_original_can_be_looked_at(original: Model) -> None:
    found = original.variant(["b", "c", "x"]).run(fed())
    np.testing.assert_allclose(found["c"], np.maximum(found["b"] - 0.25, 0), atol=1e-6)
    np.testing.assert_array_equal(found["x"], fed()["x"])
    assert original.leading_to("c") == {"x", "w0", "a", "b", "c"}


def test_weights_on_both_sides_of_a_module_can_be_moved(original: Model) -> None:
    seen = set()

    def change(name: str, array: Any) -> Any:
        seen.add(name.rpartition(": ")[2])
        return array * 0

    found = original.variant(None, change).run(fed())["y"]
    np.testing.assert_array_equal(found, 0.5)
    assert seen >= {"w0", "w1"}


def test_an_original_runs_with_optimisations_too(original: Model) -> None:
    runner = original.optimised()
    assert runner is not None
    np.testing.assert_allclose(runner.run(fed())["y"], original.runner.run(fed())["y"], atol=1e-6)


def test_a_module_that_fails_on_an_input_rejects_it(here: Path) -> None:
    convs("def forward(self, x, lambd: float, strict: int):\n    return x @ x[0, 0, :3]\n")
    runner = Model(Path("m.onnx"), (), {("acme", "Shrink"): Path("shrink.pt")}).runner
    with pytest.raises(Rejected, match=r"`shrink.pt` fails: "):
        runner.run(fed())


def test_modules_in_a_row_and_side_by_side_leave_two_parts(here: Path) -> None:
    model(
        """
        g (float[batch, 4] x) => (float[batch, 4] y, float[batch, 4] z)
        {
            a = Relu (x)
            b = acme.Shrink <lambd = 0.25> (a)
            c = acme.Shrink <lambd = 0.25> (b)
            d = acme.Shrink <lambd = 0.5> (a)
            e = Neg (x)
            f = Add (c, d)
            y = Add (f, e)
            z = Mul (a, e)
        }"""
    )
    scripted(Path("shrink.pt"), SHRINK)
    runner = Model(Path("m.onnx"), (), {("acme", "Shrink"): Path("shrink.pt")}).runner
    assert "in 2 parts beside" in runner.engine
    x = np.ones((1, 4), np.float32)
    found = runner.run({"x": x})
    np.testing.assert_allclose(found["y"], 1 + 1 - 1)
    np.testing.assert_allclose(found["z"], -1)


def test_modules_inside_a_function_are_found(here: Path) -> None:
    made = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 17, "acme" : 1, "mine" : 1]>
        g (float[n, 4] x) => (float[n, 4] y) { y = mine.both (x) }
        <domain: "mine", opset_import: ["" : 17, "acme" : 1]>
        both (x) => (y) { a = Relu (x) b = acme.Shrink <lambd = 0.25> (a) y = Neg (b) }
        """
    )
    onnx.save(made, "m.onnx")
    scripted(Path("shrink.pt"), SHRINK.replace("strict: bool = False", "strict: bool = True"))
    runner = Model(Path("m.onnx"), (), {("acme", "Shrink"): Path("shrink.pt")}).runner
    found = runner.run({"x": np.ones((1, 4), np.float32)})["y"]
    np.testing.assert_allclose(found, -0.75)


def test_a_part_that_nothing_runs_is_said_of_the_original(here: Path) -> None:
    model(
        """
        g (float[n, 4] x) => (float[n, 4] y)
        { a = acme.Shrink <lambd = 0.25> (x) y = acme.Unheard (a) }"""
    )
    scripted(Path("shrink.pt"), SHRINK)
    runner = Model(Path("m.onnx"), (), {("acme", "Shrink"): Path("shrink.pt")}).runner
    with pytest.raises(OptcError) as caught:
        runner.run({"x": np.ones((1, 4), np.float32)})
    assert caught.value.diagnostics[0].code == "cannot-run-original"
    assert "Unheard" in caught.value.diagnostics[0].problem
