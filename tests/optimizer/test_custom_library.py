"""Custom operators run by a library of ONNX Runtime, or built into engines with a plugin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command import cli
from native import Compiled
from onnx import ModelProto, TensorProto, helper, numpy_helper

import optc
from optc.optimizer.builder import Workers
from optc.optimizer.compile import compile_package, plan_package, verify_package
from optc.optimizer.custom_library import try_out
from optc.optimizer.gpu import Engine, EngineFault, visible_device
from optc.optimizer.job import ProbeJob
from optc.optimizer.ort_errors import ORT_ERRORS
from optc.optimizer.package import sha256_of
from optc.optimizer.reference import Model, OrtRunner
from optc.optimizer.summary import Outcome
from optc.passes import registry
from optc.specs.check import check
from optc.specs.diagnostic import (
    EnvironmentFault,
    InputError,
    ModelError,
    OptcError,
    SpecError,
)
from optc.specs.manifest import Manifest

LIBRARY, PLUGINS = "custom_library.c", "plugin_library.cc"

HEAD = """\
version: 1
model: m.onnx
dims: {batch: {min: 1, opt: 2, max: 4}}
targets: [{name: ampere, compute_capability: "8.6"}]
"""
SWIRL = """\
  - op: acme.vision::Swirl
    inputs: [[n, c, h, w]]
    outputs: [{like: 0}]
    onnxruntime: acme.so
"""
PEAKS = """\
  - op: acme.vision::Peaks
    inputs: [[n, c, h, w]]
    outputs:
      - {dtype: int64, shape: [peaks, 4]}
      - {dtype: bool, shape: [n]}
    bounds: {peaks: n*c*h*w}
    onnxruntime: acme.so
"""
SPEC = HEAD + "operators:\n" + SWIRL + PEAKS


def model(*, peaks: bool = True, level: float = 0.3) -> ModelProto:
    """Return conv, Swirl, conv; and what Peaks finds of that, in an embedding."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> TensorProto:
        scale = np.sqrt(np.prod(shape[1:]))
        return numpy_helper.from_array((rng.normal(size=shape) / scale).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["a"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Swirl", ["a"], ["b"], "swirl", domain="acme.vision", gain=0.5),
        helper.make_node("Conv", ["b", "w2"], ["heat"], "second", pads=[1, 1, 1, 1]),
    ]
    outputs = [helper.make_tensor_value_info("heat", TensorProto.FLOAT, ["batch", 2, 16, 16])]
    weights = [weight("w1", 8, 3, 3, 3), weight("w2", 2, 8, 3, 3)]
    if peaks:
        nodes += [
            helper.make_node(
                "Peaks", ["heat"], ["at", "any"], "peaks", domain="acme.vision", level=level
            ),
            helper.make_node("Cast", ["at"], ["places"], "cast", to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["places", "w3"], ["products"], "embed"),
            helper.make_node("Relu", ["products"], ["embedded"], "relu"),
        ]
        weights.append(weight("w3", 4, 16))
        outputs += [
            helper.make_tensor_value_info("at", TensorProto.INT64, None),
            helper.make_tensor_value_info("any", TensorProto.BOOL, None),
            helper.make_tensor_value_info("embedded", TensorProto.FLOAT, None),
        ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])
    graph = helper.make_graph(nodes, "g", [image], outputs, weights)
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("acme.vision", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=9)


def images(count: int = 2, scale: float = 2.0) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {"image": (rng.random((count, 3, 16, 16)) * scale).astype(np.float32)}


@pytest.fixture
def library(compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library of operators, beside a model that needs it, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPTC_CACHE_DIR", str(tmp_path / "cache"))
    onnx.save(model(), tmp_path / "m.onnx")
    return Path(shutil.copy(compiled(LIBRARY), tmp_path / "acme.so"))


def compiled_package(text: str, folder: str = "out") -> Outcome:
    Path("spec.yaml").write_text(text, encoding="utf-8")
    checked = check("spec.yaml", known_passes=registry.names, options_of=registry.options_of)
    return compile_package(checked, Path(folder))


def planned(text: str) -> Manifest:
    Path("spec.yaml").write_text(text, encoding="utf-8")
    checked = check("spec.yaml", known_passes=registry.names, options_of=registry.options_of)
    return plan_package(checked).manifest


# --- libraries -----------------------------------------------------------------------------------


def test_a_library_that_does_not_load_is_told_of_and_ends_nobody(
    compiled: Compiled, tmp_path: Path
) -> None:
    (tmp_path / "other.c").write_text("int other(void) { return 1; }\n")
    (tmp_path / "text.so").write_text("not a library")
    answers = try_out(
        (
            compiled(LIBRARY),
            compiled(LIBRARY, "-DVERSION=99"),  # of an interface that no ONNX Runtime has yet
            compiled(LIBRARY, "-DREFUSES"),
            compiled(tmp_path / "other.c"),
            tmp_path / "text.so",
            tmp_path / "missing.so",
            compiled(LIBRARY, "-DCRASHES"),
            compiled(LIBRARY),  # after the crash nothing is tried
        )
    )
    assert answers.libraries[0] is None
    assert answers.libraries[1] == "acme.vision needs a newer ONNX Runtime"
    assert answers.libraries[2] == "acme.vision has no licence"
    for why, words in zip(
        answers.libraries[3:7],
        ("RegisterCustomOps", "text.so", "missing.so", "ended by signal 6"),
        strict=True,
    ):
        assert why is not None
        assert words in why
    assert answers.libraries[7] is None
    assert answers.models == ()


def test_a_library_is_asked_for_the_operators_of_the_model(compiled: Compiled) -> None:
    of_double = model(peaks=False)
    of_double.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    unknown = model()
    unknown.graph.node[1].op_type = "Whirl"
    models = [each.SerializeToString() for each in (model(), unknown, of_double)]
    answers = try_out((compiled(LIBRARY),), models)
    assert answers.models[0] is None
    assert "acme.vision:Whirl(-1) is not a registered function/op" in str(answers.models[1])
    assert "double" in str(answers.models[2])


def test_the_library_computes_what_it_says(library: Path) -> None:
    """ONNX Runtime's interface is read right: attributes, shapes, int64 and bool outputs."""
    given = images()
    found = Model(Path("m.onnx"), (library,)).variant(["a", "b", "heat", "at", "any"]).run(given)
    np.testing.assert_allclose(found["b"], 0.5 * found["a"] * abs(found["a"]), rtol=1e-6)
    where = np.argwhere(found["heat"] > np.float32(0.3))
    assert len(where) > 10
    np.testing.assert_array_equal(found["at"], where)
    np.testing.assert_array_equal(found["any"], [i in where[:, 0] for i in range(2)])


def test_a_model_without_its_library_does_not_run(library: Path) -> None:
    with pytest.raises(ORT_ERRORS, match=r"acme\.vision:Swirl\(-1\) is not a registered"):
        OrtRunner(library.parent / "m.onnx", library.parent)


# --- the whole way -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A folder with a model, its library, its spec and its package; and what came of compiling."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OPTC_CACHE_DIR", str(folder / "cache"))
        onnx.save(model(), "m.onnx")
        shutil.copy(compiled(LIBRARY), "acme.so")
        return folder, compiled_package(SPEC + "verify: {}\n")


@pytest.fixture
def package(made: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """The package as ``out`` in the current folder, its model and library beside it."""
    folder, outcome = made
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return outcome


def test_a_node_in_the_middle_leaves_two_engines(library: Path) -> None:
    onnx.save(model(peaks=False), "m.onnx")
    outcome = compiled_package(HEAD + "operators:\n" + SWIRL + "verify: {}\n")
    assert outcome.unmet == []
    assert outcome.verification is not None
    stages = outcome.manifest.stages
    assert [(s.runtime, s.nodes) for s in stages] == [
        ("tensorrt", ("first",)),
        ("onnxruntime", ("swirl",)),
        ("tensorrt", ("second",)),
    ]
    [reason] = stages[1].why
    assert (reason.op, reason.by) == ("acme.vision::Swirl", "spec")
    assert reason.text == "operators: acme.vision::Swirl runs on ONNX Runtime"
    assert [s.libraries for s in stages] == [(), ("libraries/acme.so",), ()]
    assert [s.plugins for s in stages] == [(), (), ()]


def test_what_the_data_decide_goes_into_an_engine_by_its_bound(package: Outcome) -> None:
    assert package.unmet == []
    manifest = package.manifest
    assert [(s.runtime, s.nodes) for s in manifest.stages] == [
        ("tensorrt", ("first",)),
        ("onnxruntime", ("swirl",)),
        ("tensorrt", ("second",)),
        ("onnxruntime", ("peaks",)),
        ("tensorrt", ("cast", "embed", "relu")),
    ]
    last = manifest.stages[-1]
    [profile] = last.profiles
    assert profile["at"].min == (0, 4)
    assert profile["at"].max == (4 * 2 * 16 * 16, 4)
    assert last.engines["ampere"].bytes > 0
    assert {o.name: (o.dtype, o.shape) for o in manifest.outputs} == {
        "heat": ("float32", ("batch", 2, 16, 16)),
        "at": ("int64", ("at_0", 4)),
        "any": ("bool", ("batch",)),
        "embedded": ("float32", ("at_0", 16)),
    }


def test_the_package_brings_its_library(package: Outcome) -> None:
    manifest, library = package.manifest, Path("acme.so")
    assert manifest.files["libraries/acme.so"] == sha256_of(library)
    assert manifest.libraries == {
        "acme.vision::Swirl": "libraries/acme.so",
        "acme.vision::Peaks": "libraries/acme.so",
    }
    given = images()
    expected = Model(Path("m.onnx"), (library,)).runner.run(given)
    library.unlink()
    found = optc.load("out").run(given)
    assert list(found) == ["heat", "at", "any", "embedded"]
    np.testing.assert_allclose(found["heat"], expected["heat"], atol=1e-5)
    np.testing.assert_array_equal(found["at"], expected["at"])
    assert found["any"].dtype == np.bool_
    assert verify_package(Path("out")).unmet == []


def test_nothing_may_be_found(package: Outcome) -> None:
    found = optc.load("out").run(images(scale=0.0))
    assert found["at"].shape == (0, 4)
    assert found["embedded"].shape == (0, 16)
    assert not found["any"].any()


def test_the_package_s_library_is_loaded_only_if_it_is_the_one(package: Outcome) -> None:
    with Path("out/libraries/acme.so").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError) as caught:
        optc.load("out").run(images())
    assert caught.value.diagnostics[0].code == "damaged-package"
    assert "libraries/acme.so" in caught.value.diagnostics[0].problem
    done = cli("verify", "out")
    assert (done.returncode, "error[damaged-package]" in done.stderr) == (2, True)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flag", ["-DVERSION=99", "-DCRASHES"])
def test_a_library_that_this_machine_does_not_load_is_the_machine_s_fault(
    package: Outcome, compiled: Compiled, flag: str
) -> None:
    Path("out/libraries/acme.so").unlink()  # this process has it: it must not change
    shutil.copy(compiled(LIBRARY, flag), "out/libraries/acme.so")
    manifest = json.loads(Path("out/manifest.json").read_text())
    manifest["files"]["libraries/acme.so"] = sha256_of(Path("out/libraries/acme.so"))
    Path("out/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EnvironmentFault) as caught:
        optc.load("out").run(images())
    assert caught.value.diagnostics[0].code == "library-not-loadable"
    with pytest.raises(EnvironmentFault):
        verify_package(Path("out"))


def test_libraries_of_one_name_stay_apart(library: Path, compiled: Compiled) -> None:
    Path("other").mkdir()
    only_swirl = Path(shutil.copy(library, "other/acme.so"))
    with only_swirl.open("ab") as file:
        file.write(b"\0" * 16)  # another file, and the same library all the same
    onnx.save(model(peaks=False), "m.onnx")
    text = HEAD + "operators:\n" + SWIRL + PEAKS.replace("acme.so", "other/acme.so")
    # Both have both operators, which ONNX Runtime does not allow.
    with pytest.raises(SpecError) as caught:
        planned(text)
    assert caught.value.diagnostics[0].code == "library-lacks-operator"
    assert "Conflicting" in caught.value.diagnostics[0].problem


def test_low_precision_is_searched_around_them(library: Path) -> None:
    outcome = compiled_package(SPEC + "precision: fp16\nverify: {}\n")
    assert outcome.unmet == []
    assert [note.code for note in outcome.notes if note.code == "precision-not-measured"] == []
    swirl = outcome.manifest.stages[1]
    assert [swirl.tensors[name].dtype for name in ("a", "b")] == ["float32", "float32"]
    assert "fp16" in outcome.precision


def test_one_in_a_body_keeps_the_whole_node_off_tensorrt(library: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 17, "acme.vision" : 1]>
    g (float[batch,8] x, bool flag) => (float[batch,8] y)
    {
        [in] a = MatMul (x, w)
        [if] b = If (flag)
          <then_branch = t () => (float[batch,8] s) { [swirl] s = acme.vision.Swirl <gain = 2.0> (a) },
           else_branch = e () => (float[batch,8] r) { [relu] r = Relu (a) }>
        [out] y = MatMul (b, w)
    }"""
    made = onnx.parser.parse_model(text)
    values = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    made.graph.initializer.append(numpy_helper.from_array(values, "w"))
    onnx.save(made, "m.onnx")
    spec = HEAD + "operators:\n" + SWIRL.replace("[n, c, h, w]", "[n, c]") + "verify: {}\n"
    outcome = compiled_package(spec)
    assert outcome.unmet == []
    assert [(s.runtime, s.nodes) for s in outcome.manifest.stages] == [
        ("tensorrt", ("in",)),
        ("onnxruntime", ("if",)),
        ("tensorrt", ("out",)),
    ]
    assert outcome.manifest.stages[1].libraries == ("libraries/acme.so",)


# --- what is at fault ----------------------------------------------------------------------------


def test_a_library_that_ends_the_process_is_the_spec_s_fault(
    library: Path, compiled: Compiled
) -> None:
    shutil.copy(compiled(LIBRARY, "-DCRASHES"), "acme.so")
    Path("spec.yaml").write_text(SPEC)
    done = cli("plan", "spec.yaml")
    assert done.returncode == 2
    assert "error[library-not-loadable]" in done.stderr
    assert "--> spec.yaml:9:18" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_library_without_the_operator(library: Path) -> None:
    made = model()
    made.graph.node[1].op_type = "Whirl"
    onnx.save(made, "m.onnx")
    with pytest.raises(SpecError) as caught:
        planned(SPEC.replace("Swirl", "Whirl"))
    [problem] = caught.value.diagnostics
    assert problem.code == "library-lacks-operator"
    assert "acme.vision:Whirl(-1) is not a registered function/op" in problem.problem
    assert problem.place is not None
    assert problem.place.line == 9


def test_an_output_of_another_dtype_than_declared(library: Path) -> None:
    with pytest.raises(SpecError) as caught:
        planned(SPEC.replace("dtype: int64", "dtype: int32"))
    [problem] = caught.value.diagnostics
    assert problem.code == "library-lacks-operator"
    assert "does not match expected type (tensor(int64))" in problem.problem


def test_nodes_that_are_not_as_declared(library: Path) -> None:
    with pytest.raises(SpecError) as caught:
        planned(SPEC.replace("[[n, c, h, w]]", "[[n, 8, h, w]]").replace("n*c*h", "n*h"))
    [problem] = caught.value.diagnostics
    assert problem.code == "not-as-declared"
    assert "node `peaks`" in problem.problem
    assert "axis 1 of input 0 is 2, and is declared as 8" in problem.problem


@pytest.mark.parametrize(
    ("extent", "words"),
    [
        ("h - 100", "axis 2 of output 0 is h - 100, which is -84 where n = 1, c = 8, h = 16, w"),
        ("h*h*h*h*h*h*h*h*w", "which is 68719476736 where"),
        ("n - 2", "which is -1 where n = 1"),
        ("16//(4 - n)", "which divides by zero where n = 4"),
    ],
)
def test_extents_that_no_tensor_can_have(library: Path, extent: str, words: str) -> None:
    onnx.save(model(peaks=False), "m.onnx")
    shape = f'{{dtype: float32, shape: [n, c, "{extent}", w]}}'
    with pytest.raises(SpecError) as caught:
        planned(HEAD + "operators:\n" + SWIRL.replace("{like: 0}", shape))
    [problem] = caught.value.diagnostics
    assert problem.code == "not-as-declared"
    assert words in problem.problem
    assert problem.place is not None


def test_a_bound_that_is_below_zero(library: Path) -> None:
    with pytest.raises(SpecError) as caught:
        planned(SPEC.replace("peaks: n*c*h*w", "peaks: h - 17"))
    [problem] = caught.value.diagnostics
    assert "the bound of `peaks` is h - 17, which is -1 where" in problem.problem


def test_a_starter_has_an_entry_for_each(library: Path) -> None:
    done = cli("init", "m.onnx")
    assert done.returncode == 0
    assert "# operators:\n#   - op: acme.vision::Swirl\n" in done.stdout
    assert "#   - op: acme.vision::Peaks\n#     inputs: [[n, c, h, w]]\n" in done.stdout
    Path("spec.yaml").write_text(done.stdout)
    assert "error[undeclared-operator]" in cli("plan", "spec.yaml").stderr


# --- plugins of TensorRT -------------------------------------------------------------------------

PLUGIN = HEAD + "operators:\n" + SWIRL + "    tensorrt: plugins.so\n" + PEAKS


@pytest.fixture
def plugins(compiled: Compiled, library: Path) -> Path:
    return Path(shutil.copy(compiled(PLUGINS), library.parent / "plugins.so"))


def test_with_a_plugin_the_parser_takes_it_and_the_builder_builds_it(plugins: Path) -> None:
    shape = ((1, 3, 16, 16), (2, 3, 16, 16), (4, 3, 16, 16))
    job = ProbeJob(
        model(peaks=False).SerializeToString(),
        "tensorrt-rtx",
        build=True,
        compute_capability="8.6",
        profiles=({"image": shape},),
    )
    with Workers(1) as workers:
        [without] = workers.probe([job])
        version = workers.identity("tensorrt-rtx")
    with Workers(1, plugins={plugins: None}) as workers:
        [with_plugin] = workers.probe([job])
        # What was answered without it is not taken for an answer with it.
        assert workers.identity("tensorrt-rtx") == f"{version} {sha256_of(plugins)}"
    assert [refusal.op for refusal in without.refusals] == ["Swirl"]
    assert "Plugin not found" in without.refusals[0].text
    assert with_plugin.accepted


def test_a_plugin_goes_into_the_engine_and_the_package(plugins: Path) -> None:
    outcome = compiled_package(PLUGIN + "verify: {}\n")
    assert outcome.unmet == []
    stages = outcome.manifest.stages
    assert [(s.runtime, s.nodes) for s in stages] == [
        ("tensorrt", ("first", "swirl", "second")),
        ("onnxruntime", ("peaks",)),
        ("tensorrt", ("cast", "embed", "relu")),
    ]
    # The engine needs the plugin; its ONNX, where it runs in place of the engine, the other.
    assert stages[0].plugins == ("libraries/plugins.so",)
    assert [s.libraries for s in stages] == [("libraries/acme.so",), ("libraries/acme.so",), ()]
    assert outcome.manifest.files["libraries/plugins.so"] == sha256_of(plugins)


def test_an_operator_that_only_a_plugin_runs_cannot_be_verified(plugins: Path) -> None:
    onnx.save(model(peaks=False), "m.onnx")
    text = HEAD + "operators:\n" + SWIRL.replace("onnxruntime: acme.so", "tensorrt: plugins.so")
    outcome = compiled_package(text + "gate: {max_engines: 1}\n")
    assert [stage.runtime for stage in outcome.manifest.stages] == ["tensorrt"]
    assert [note.code for note in outcome.notes] == ["nothing-verified"]
    assert outcome.verification is None
    with pytest.raises(ModelError) as caught:
        compiled_package(text + "verify: {}\n")
    assert caught.value.diagnostics[0].code == "cannot-run-original"


def test_a_plugin_of_other_operators_leaves_nobody_to_run_it(plugins: Path) -> None:
    made = model(peaks=False)
    made.graph.node[1].op_type = "Whirl"
    onnx.save(made, "m.onnx")
    entry = SWIRL.replace("onnxruntime: acme.so", "tensorrt: plugins.so").replace("Swirl", "Whirl")
    with pytest.raises(OptcError) as caught:
        planned(HEAD + "operators:\n" + entry)
    [problem] = caught.value.diagnostics
    assert (problem.code, caught.value.exit_code) == ("no-runner-left", 1)
    assert "Plugin not found" in problem.problem


@pytest.mark.gpu
def test_an_engine_with_a_plugin_loads_after_its_library(plugins: Path) -> None:
    """It is not run: the plugin of the tests has no kernel."""
    target = f'compute_capability: "{visible_device().compute_capability}"'
    compiled_package(PLUGIN.replace('compute_capability: "8.6"', target))
    data = Path("out/engines/ampere/00.engine").read_bytes()
    with pytest.raises(EngineFault):
        Engine("tensorrt-rtx", data)
    found = Engine("tensorrt-rtx", data, [plugins])
    assert (found.inputs, found.outputs) == (("image",), ("heat",))
    assert Engine("tensorrt-rtx", data, [plugins]).inputs == found.inputs  # the library is there


@pytest.mark.parametrize(
    ("flags", "words"), [((), "getCreators could not be loaded"), (("-DCRASHES",), "SIGABRT")]
)
def test_what_is_no_library_of_plugins(
    plugins: Path, compiled: Compiled, flags: tuple[str, ...], words: str
) -> None:
    shutil.copy(compiled(LIBRARY, *flags), plugins)
    with pytest.raises(InputError) as caught:
        planned(PLUGIN)
    [problem] = caught.value.diagnostics
    assert problem.code == "library-not-loadable"
    assert "plugins.so" in problem.problem
    assert words in problem.problem
    assert problem.place is not None
    assert PLUGIN.splitlines()[problem.place.line - 1].endswith("tensorrt: plugins.so")
