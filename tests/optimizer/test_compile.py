"""The whole way, with real engines, on models of a few nodes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from command import cli
from text_package import check_files

import optc
from optc.optimizer.compile import compile_package, plan_package, verify_package
from optc.optimizer.ort_errors import ORT_ERRORS
from optc.optimizer.progress import Silent
from optc.optimizer.summary import Outcome
from optc.passes import registry
from optc.specs.check import check
from optc.specs.diagnostic import InputError, ModelError, NotMetError, SpecError
from optc.specs.manifest import Stage

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
WEIGHTS = "<float[4,3,3,3] w, float[4,4,1,1] v, float[8,4] m>"

CHAIN = """
g (float[batch,3,8,8] x) => (float[batch,4,6,6] y)
{
    [first]  a = Conv (x, w)
    [middle] b = Relu (a)
    [last]   y = Conv (b, v)
}"""

# Det is refused by the parser; what is before and after it is work for engines.
CUT = """
g (float[batch,3,8,8] x) => (float[batch,4,6,6] y)
{
    [first]  a = Conv (x, w)
    [square] s = MatMul (a, a)
    [det]    d = Det (s)
    [shape]  n = Unsqueeze (d, axes)
    [scale]  t = Mul (a, n)
    [last]   y = Conv (t, v)
}"""

# How many elements are above zero is known only at run time, and bounded by the graph.
SIFT = """
g (float[batch,8] x) => (float[kept,4] y)
{
    [flat]  f = Reshape (x, whole)
    [where] i = NonZero (f)
    [turn]  t = Transpose <perm = [1, 0]> (i)
    [cast]  c = Cast <to = 1> (t)
    [wide]  e = Concat <axis = 1> (c, c, c, c, c, c, c, c)
    [product] y = MatMul (e, m)
}"""


def model_of(text: str, path: Path) -> Path:
    """Write the model of ``text``; the weights it names and does not give are drawn."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(HEAD + text)
    drawn = {"w": (4, 3, 3, 3), "v": (4, 4, 1, 1), "m": (8, 4)}
    for name, shape in drawn.items():
        if any(name in node.input for node in model.graph.node):
            values = rng.uniform(-0.3, 0.3, shape).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    for name, ints in {"axes": [2, 3], "whole": [-1]}.items():
        if any(name in node.input for node in model.graph.node):
            values = np.array(ints, np.int64)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, path)
    return path


def spec_of(
    folder: Path,
    text: str,
    extra: str = "",
    targets: str = "{name: ampere, compute_capability: 8.6}",
) -> Path:
    """Write a model and a spec for it; return the spec."""
    model_of(text, folder / "m.onnx")
    spec = folder / "spec.yaml"
    spec.write_text(
        "version: 1\nmodel: m.onnx\ndims: {batch: {min: 1, opt: 2, max: 4}}\n"
        f"targets: [{targets}]\n{extra}\n"
    )
    return spec


def compiled(spec: Path, output: Path) -> Outcome:
    return compile_package(check(spec, known_passes=registry.names), output)


def shown(stages: tuple[Stage, ...]) -> list[str]:
    return [f"{stage.runtime}: {' '.join(stage.nodes)}" for stage in stages]


def test_a_model_that_tensorrt_takes_becomes_one_engine_that_computes_the_same(
    tmp_path: Path,
) -> None:
    spec = spec_of(
        tmp_path,
        CHAIN,
        "verify: {atol: 1e-5, rtol: 1e-5}\ngate: {max_engines: 1, min_tensorrt_flops: 1}",
    )
    package = optc.compile(spec, tmp_path / "out")
    assert shown(package.manifest.stages) == ["tensorrt: first middle last"]
    check_files(package.path, package.manifest)
    x = np.random.default_rng(1).uniform(0, 1, (3, 3, 8, 8)).astype(np.float32)
    outputs = package.run({"x": x})
    assert outputs["y"].shape == (3, 4, 6, 6)
    assert verify_package(tmp_path / "out").exit_code == 0


def test_what_the_parser_refuses_runs_in_the_fallback_and_says_why(tmp_path: Path) -> None:
    outcome = compiled(spec_of(tmp_path, CUT), tmp_path / "out")
    stages = outcome.manifest.stages
    assert shown(stages) == [
        "tensorrt: first square",
        "onnxruntime: det",
        "tensorrt: shape scale last",
    ]
    (why,) = stages[1].why
    assert (why.node, why.op, why.by, why.targets) == ("det", "Det", "parser", ("ampere",))
    assert why.text
    assert outcome.exit_code == 0


def test_a_partition_point_ends_a_stage(tmp_path: Path) -> None:
    outcome = compiled(spec_of(tmp_path, CHAIN, "partition: {points: [b]}"), tmp_path / "out")
    assert shown(outcome.manifest.stages) == ["tensorrt: first middle", "tensorrt: last"]
    assert outcome.manifest.stages[0].outputs == ("b",)


@pytest.mark.parametrize("selector", ["{op: Relu}", "{node: mid*}"])
def test_what_the_spec_keeps_off_tensorrt_is_off(tmp_path: Path, selector: str) -> None:
    extra = f"partition: {{off_tensorrt: [{selector}]}}"
    outcome = compiled(spec_of(tmp_path, CHAIN, extra), tmp_path / "out")
    stages = outcome.manifest.stages
    assert shown(stages) == ["tensorrt: first", "onnxruntime: middle", "tensorrt: last"]
    assert [(why.node, why.by) for why in stages[1].why] == [("middle", "spec")]


def test_an_axis_that_appears_at_a_cut_gets_its_bound_from_the_graph(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, SIFT, "passes: {disable: [decompose-non-zero]}")
    outcome = compiled(spec, tmp_path / "out")
    engine = outcome.manifest.stages[-1]
    assert engine.runtime == "tensorrt"
    (entering,) = engine.inputs
    shapes = engine.profiles[0][entering]
    assert (shapes.min[-1], shapes.max[-1]) == (0, 32) or (shapes.min[0], shapes.max[0]) == (0, 32)
    package = optc.load(tmp_path / "out")
    none = package.run({"x": np.zeros((2, 8), np.float32)})
    assert none["y"].shape == (0, 4)


def test_what_one_target_refuses_stays_in_the_engine_of_another(tmp_path: Path) -> None:
    text = """
    g (float[batch,3,8,8] x) => (float[batch,4,6,6] y)
    {
        [first] a = Conv (x, w)
        [other] r = Relu (a)
        [inner] s = MatMul (a, r)
        [last]  y = Conv (s, v)
    }"""
    targets = "{name: turing, compute_capability: 7.5}, {name: ampere, compute_capability: 8.6}"
    outcome = compiled(spec_of(tmp_path, text, targets=targets), tmp_path / "out")
    manifest = outcome.manifest
    on_turing = manifest.stages_of(manifest.target("turing"))
    assert shown(on_turing) == ["tensorrt: first other", "onnxruntime: inner", "tensorrt: last"]
    assert [(why.by, why.targets) for why in on_turing[1].why] == [("builder", ("turing",))]
    assert shown(manifest.stages_of(manifest.target("ampere"))) == [
        "tensorrt: first other inner last"
    ]


def test_several_profiles_are_recorded_for_every_engine(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, CUT)
    profiles = "profiles: [{batch: 1}, {batch: {min: 2, opt: 4, max: 8}}]"
    spec.write_text(spec.read_text().replace("dims: {batch: {min: 1, opt: 2, max: 4}}", profiles))
    outcome = compiled(spec, tmp_path / "out")
    first = outcome.manifest.stages[0]
    assert [profile["x"].max[0] for profile in first.profiles] == [1, 8]


def test_a_gate_that_is_not_met_says_what_costs_it_and_leaves_the_package(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, CUT, "gate: {max_engines: 1}")
    with pytest.raises(NotMetError) as caught:
        optc.compile(spec, tmp_path / "out")
    assert (
        "2 engines" in caught.value.diagnostics[0].problem
        or "2" in caught.value.diagnostics[0].problem
    )
    assert caught.value.diagnostics[0].place is not None
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_gate_on_bytes_counts_what_crosses_at_its_largest(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, CUT, "gate: {max_boundary_bytes: 0}")
    outcome = compiled(spec, tmp_path / "out")
    assert outcome.exit_code == 3
    assert [problem.code for problem in outcome.unmet] == ["gate-max-boundary-bytes"]
    (target,) = outcome.manifest.targets
    most = sum((each.most_bytes or 0) * each.boundaries for each in target.crossings)
    usual = sum((each.bytes or 0) * each.boundaries for each in target.crossings)
    assert most == 2 * usual > 0  # batch 4 at most, 2 as a rule
    assert f"up to {most:,} bytes cross" in outcome.unmet[0].problem
    spec = spec_of(tmp_path, CUT, f"gate: {{max_boundary_bytes: {most}}}")
    assert compiled(spec, tmp_path / "out").exit_code == 0


def test_what_calls_and_stages_are_taken_to_need_follows_the_spec(tmp_path: Path) -> None:
    manifest = compiled(spec_of(tmp_path, CUT), tmp_path / "out").manifest
    stages = [stage.estimate_us or 0 for stage in manifest.stages]
    assert all(stage > 0 for stage in stages)
    assert sum(stages) < (manifest.targets[0].estimate_us or 0)
    slower = "partition: {cost: {launch_us: 1000}}"
    manifest = compiled(spec_of(tmp_path, CUT, slower), tmp_path / "out").manifest
    engines = [s.estimate_us or 0 for s in manifest.stages if s.runtime == "tensorrt"]
    assert all(engine >= 1000 for engine in engines)
    assert len(engines) == 2  # each has enough of the FLOPs to stay whatever it costs
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["cost"]["launch_us"] == 1000
    assert report["cost"]["node_us"] == 5


def test_a_plan_decides_what_a_compile_does_and_writes_nothing(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, CUT)
    checked = check(spec, known_passes=registry.names)
    before = sorted(tmp_path.rglob("*"))
    planned = plan_package(checked).as_json()
    assert sorted(tmp_path.rglob("*")) == before
    done: dict[str, Any] = compiled(spec, tmp_path / "out").manifest.as_plan()
    for key in ("inputs", "outputs", "stages", "targets", "profiles"):
        assert planned[key] == done[key], key


def test_a_plan_keeps_its_files_where_the_next_removes_what_is_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    seen: list[list[Path]] = []

    class Watching(Silent):
        def step(self, text: str) -> None:
            seen.append([path.parent for path in temporary.glob("*/lock")])
            assert seen[-1] == list(temporary.iterdir())

    plan_package(check(spec_of(tmp_path, CUT), known_passes=registry.names), progress=Watching())
    assert any(seen)
    assert list(temporary.iterdir()) == []


def test_a_plan_without_builds_marks_its_engines_unconfirmed(tmp_path: Path) -> None:
    checked = check(spec_of(tmp_path, CUT), known_passes=registry.names)
    stages = plan_package(checked, build=False).manifest.stages
    assert [stage.unconfirmed for stage in stages] == [True, False, True]


def test_extents_that_the_model_does_not_take_are_the_specs_fault(tmp_path: Path) -> None:
    text = """
    g (float[1,4,n] x) => (float[1,4,n] y)
    {
        [half]  h = MaxPool <kernel_shape = [2], strides = [2]> (x)
        [twice] t = Concat <axis = 2> (h, h)
        [sum]   y = Add (x, t)
    }"""
    spec = spec_of(tmp_path, text)
    spec.write_text(
        spec.read_text().replace("batch: {min: 1, opt: 2, max: 4}", "n: {min: 3, opt: 7, max: 9}")
    )
    with pytest.raises(SpecError) as caught:
        optc.compile(spec, tmp_path / "out")
    (problem,) = caught.value.diagnostics
    assert problem.code == "profile-breaks-model"
    assert problem.place is not None
    assert problem.place.line == 3
    assert not (tmp_path / "out").exists()


def test_a_model_whose_own_shapes_do_not_fit_together_is_refused(tmp_path: Path) -> None:
    text = """
    g (float[2,4,5,3] x) => (float[2,4,5,4] y)
    {
        [first] y = MatMul (x, m)
    }"""
    spec = spec_of(tmp_path, text)
    spec.write_text(spec.read_text().replace("dims: {batch: {min: 1, opt: 2, max: 4}}\n", ""))
    with pytest.raises(ModelError) as caught:
        optc.compile(spec, tmp_path / "out")
    assert caught.value.diagnostics[0].code == "invalid-shapes"
    assert not (tmp_path / "out").exists()


def test_an_unknown_target_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        optc.compile(spec_of(tmp_path, CHAIN), tmp_path / "out", targets=["amper"])
    assert caught.value.diagnostics[0].todo == "write `ampere`"


def test_several_specs_in_one_call_each_get_their_package_and_the_worst_code_wins(
    tmp_path: Path,
) -> None:
    good = spec_of(tmp_path, CHAIN)
    bad = tmp_path / "bad.yaml"
    bad.write_text(good.read_text().replace("version: 1", "version: 1\nnonsense: 3"))
    done = cli("compile", good, bad, "-o", tmp_path / "out", "--json")
    assert done.returncode == 2
    results = json.loads(done.stdout)["results"]
    assert [result["ok"] for result in results] == [True, False]
    assert results[1]["diagnostics"][0]["code"] == "unknown-key"
    assert (tmp_path / "out" / "spec" / "manifest.json").exists()
    assert not (tmp_path / "out" / "bad").exists()


@pytest.mark.parametrize("tolerance", ["nan", "-1", "inf"])
def test_a_tolerance_that_lets_anything_pass_is_refused(tmp_path: Path, tolerance: str) -> None:
    done = cli("verify", tmp_path, f"--atol={tolerance}")
    assert done.returncode == 2
    assert "finite number" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dump_after_every_pass_can_be_loaded(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, CHAIN.replace("Relu", "Identity"))
    done = cli("compile", spec, "-o", tmp_path / "out", "--dump-after", "all")
    assert done.returncode == 0, done.stderr
    dumps = sorted((tmp_path / "out.dump").glob("*.onnx"))
    assert dumps
    for dump in dumps:
        onnx.checker.check_model(dump)
    unknown = cli("compile", spec, "-o", tmp_path / "out", "--dump-after", "fold-constant")
    assert unknown.returncode == 2
    assert "write `fold-constants`" in unknown.stderr


def stray_processes(folder: Path) -> list[str]:
    """Return the command lines of living processes that name ``folder``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


@pytest.mark.parametrize("seconds", [0.6, 1.2, 2.0])
def test_a_compile_that_is_killed_leaves_the_old_package_and_no_process(
    tmp_path: Path, seconds: float
) -> None:
    spec = spec_of(tmp_path, CUT)
    old = compiled(spec, tmp_path / "out").manifest
    command = [sys.executable, "-m", "optc", "compile", str(spec), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while stray_processes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert stray_processes(tmp_path) == []
    package = optc.load(tmp_path / "out")
    check_files(package.path, package.manifest)
    assert package.manifest.stages == old.stages
    compiled(spec, tmp_path / "out")
    left = [path.name for path in tmp_path.iterdir() if "optc-" in path.name]
    assert [name for name in left if not name.endswith("optc-lock")] == []


def test_ctrl_c_exits_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, CUT)
    command = [sys.executable, "-m", "optc", "compile", str(spec), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any(tmp_path.glob(".out.optc-*-*")))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    assert not any(tmp_path.glob(".out.optc-*-*"))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_only_tensorrt_takes_is_compiled_with_a_warning(tmp_path: Path) -> None:
    text = f"""
    <ir_version: 11, opset_import: ["" : {onnx.defs.onnx_opset_version()}]>
    g (float[batch,8] x) => (float[batch,8] y)
    {{
        [swish] s = Swish (x)
        [twice] y = Add (s, s)
    }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    try:
        onnxruntime.InferenceSession(tmp_path / "m.onnx")
    except ORT_ERRORS:
        pass
    else:
        pytest.skip("this ONNX Runtime has a kernel for Swish")
    spec = tmp_path / "spec.yaml"
    spec.write_text("version: 1\nmodel: m.onnx\ndims: {batch: 2}\n")
    outcome = compiled(spec, tmp_path / "out")
    assert outcome.exit_code == 0
    assert [stage.runtime for stage in outcome.manifest.stages] == ["tensorrt"]
    assert "cannot-check-here" in {note.code for note in outcome.notes}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_compile_that_is_asked_to_end_removes_what_is_half_done(
    tmp_path: Path, number: signal.Signals
) -> None:
    spec = spec_of(tmp_path, CUT)
    command = [sys.executable, "-m", "optc", "compile", str(spec), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any(tmp_path.glob(".out.optc-*-*")))
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert not any(tmp_path.glob(".out.optc-*-*"))
