"""Scopes, groups and points by node, the whole way; and scopes compiled on their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from command import cli

import optc
from optc.optimizer.arrays import write_arrays
from optc.optimizer.asked_stages import AskedStages
from optc.optimizer.compile import compile_package, plan_package, verify_package
from optc.optimizer.part import part_of
from optc.optimizer.prepare import Prepared, prepare
from optc.optimizer.progress import Silent
from optc.optimizer.summary import Outcome
from optc.passes import registry
from optc.passes.graph import import_model
from optc.passes.shape import infer
from optc.specs.check import CheckedSpec, check
from optc.specs.diagnostic import InputError, SpecError
from optc.specs.manifest import Manifest, read_manifest
from optc.specs.stage_problem import asked_of

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'

# A backbone that halves the extents and two heads that read it.
SHARED = """
g (float[batch,3,height,16] x) => (float[batch,4,h2,8] boxes, float[batch,4] scores)
<float[4,3,3,3] w, float[4,4,1,1] v, float[4,4,1,1] u>
{
    [backbone_conv] a = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w)
    [backbone_relu] b = Relu (a)
    [boxes_conv]    c = Conv (b, v)
    [boxes_add]     boxes = Add (c, b)
    [scores_conv]   s = Conv (b, u)
    [scores_pool]   p = GlobalAveragePool (s)
    [scores_flat]   scores = Flatten (p)
}"""
SCOPES = 'scopes: {backbone: "backbone_*", boxes: "boxes_*", scores: "scores_*"}'
DIMS = "dims: {batch: {min: 1, opt: 2, max: 4}, height: {min: 8, opt: 16, max: 32}}"


def write(
    folder: Path, text: str, partition: str, dims: str = "", extra: str = "", head: str = HEAD
) -> CheckedSpec:
    """Write a model whose weights are drawn, and a spec for it; return the spec, checked."""
    model = onnx.parser.parse_model(head + text)
    random = np.random.default_rng(0)
    for info in model.graph.value_info:  # the weights that the text names and gives no values
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        values = random.uniform(-0.4, 0.4, shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, info.name))
    del model.graph.value_info[:]
    onnx.save(model, folder / "m.onnx")
    spec = folder / "spec.yaml"
    spec.write_text(
        "version: 1\nmodel: m.onnx\ntargets: [{name: ampere, compute_capability: 8.6}]\n"
        f"{dims}\npartition: {{{partition}}}\n{extra}\n"
    )
    return checked(spec)


def checked(spec: Path) -> CheckedSpec:
    return check(spec, known_passes=registry.names, options_of=registry.options_of)


def prepared(spec: CheckedSpec) -> Prepared:
    return prepare(spec, Silent())


def stages(outcome: Outcome) -> list[tuple[str | None, str, set[str]]]:
    """Return name, runtime and nodes of each stage, in running order."""
    manifest = outcome.manifest
    return [
        (stage.name, stage.runtime, set(stage.nodes))
        for stage in manifest.stages_of(manifest.targets[0])
    ]


def original(folder: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(folder / "m.onnx")
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


# --- in the whole --------------------------------------------------------------------------------


def test_scopes_are_stages_with_a_name(tmp_path: Path) -> None:
    spec = write(tmp_path, SHARED, SCOPES, DIMS, "verify: {}")
    outcome = compile_package(spec, tmp_path / "package")
    assert outcome.exit_code == 0
    found = stages(outcome)
    assert {name: runtime for name, runtime, _ in found} == {
        "backbone": "tensorrt",
        "boxes": "tensorrt",
        "scores": "tensorrt",
    }
    assert found[0] == ("backbone", "tensorrt", {"backbone_conv", "backbone_relu"})
    assert outcome.manifest.stages[0].outputs == ("b",)


def test_the_table_has_names_where_stages_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write(tmp_path, SHARED, SCOPES, DIMS)
    plan_package(spec, build=False).print()
    assert "backbone" in capsys.readouterr().out
    spec = write(tmp_path, SHARED, "", DIMS)
    plan_package(spec, build=False).print()
    assert " name " not in capsys.readouterr().out


REFUSED = """
g (float[batch,4,4] x) => (float[batch] y, float[batch,4,4] z)
<float[4,4] w>
{
    [before] a = MatMul (x, w)
    [one]    b = MatMul (a, w)
    [two]    y = Det (b)
    [other]  z = Relu (a)
}"""


@pytest.mark.parametrize(
    ("partition", "words"),
    [
        ("scopes: {tail: [one, two]}", "the scope `tail` is one stage and holds `two` too"),
        ("keep_together: [[{node: one}, {op: Det}]]", "`keep_together` holds `two` too"),
    ],
)
def test_what_is_kept_together_goes_to_the_fallback_together(
    tmp_path: Path, partition: str, words: str
) -> None:
    spec = write(tmp_path, REFUSED, partition, "dims: {batch: {min: 1, opt: 2, max: 4}}")
    outcome = compile_package(spec, tmp_path / "package")
    (fallback,) = [s for s in outcome.manifest.stages if s.runtime == "onnxruntime"]
    assert set(fallback.nodes) == {"one", "two"}
    reasons = {reason.node: reason for reason in fallback.why}
    assert reasons["two"].by == "parser"
    assert reasons["one"].by == "rule"
    assert words in reasons["one"].text
    assert "(parser: " in reasons["one"].text


def test_a_stage_ends_behind_the_nodes_of_a_point(tmp_path: Path) -> None:
    spec = write(tmp_path, SHARED, 'points: [{node: "backbone_*"}]', DIMS)
    found = stages(compile_package(spec, tmp_path / "package"))
    assert len(found) == 2
    assert found[0][2] == {"backbone_conv", "backbone_relu"}


NORMALISED = """
g (float[1,3,8,8] x) => (float[1,4,8,8] y)
<float[4,3,1,1] w, float[4] scale, float[4] bias, float[4] mean, float[4] var = {1, 2, 3, 4}>
{
    [conv] a = Conv (x, w)
    [norm] b = BatchNormalization (a, scale, bias, mean, var)
    [relu] y = Relu (b)
}"""


@pytest.mark.parametrize(
    ("partition", "kept"),
    [
        ("", False),
        ("scopes: {first: conv}", True),
        ("scopes: {last: [norm, relu]}", True),
        ("scopes: {all: [conv, norm]}", False),
        ("keep_together: [[{op: BatchNormalization}, {op: Relu}]]", True),
        ("points: [{node: conv}]", True),
    ],
)
def test_no_pass_merges_across_a_border(tmp_path: Path, partition: str, kept: bool) -> None:
    graph = prepared(write(tmp_path, NORMALISED, partition)).graph
    assert ("a" in {t.name for node in graph.nodes for t in node.outputs}) is kept


ALIKE = """
g (float[2,4] x) => (float[2,4] y, float[2,4] z)
<float[4,4] w>
{
    [a_exp]  p = Exp (x)
    [a_mul]  y = MatMul (p, w)
    [b_exp]  q = Exp (x)
    [b_add]  r = Add (q, y)
    [b_mul]  z = MatMul (r, w)
}"""


@pytest.mark.parametrize("order", ['a: "a_*", b: "b_*"', 'b: "b_*", a: "a_*"'])
def test_what_two_scopes_compute_alike_is_in_the_one_that_runs_first(
    tmp_path: Path, order: str
) -> None:
    question = prepared(write(tmp_path, ALIKE, f"scopes: {{{order}}}")).question
    assert len(question.graph.nodes) == 4, "the two Exp are one node"
    assert question.scopes == {"a": {"a_exp", "a_mul"}, "b": {"b_add", "b_mul"}}
    found = stages(compile_package(write(tmp_path, ALIKE, f"scopes: {{{order}}}"), tmp_path / "p"))
    assert [name for name, _, _ in found] == ["a", "b"]


def test_a_scope_of_calls_that_are_inlined_holds_nothing(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        """
    g (float[2] x) => (float[2] y)
    {
        [first]  a = Relu (x)
        [second] y = own.twice (a)
    }
    <domain: "own", opset_import: ["" : 17]>
    twice (x) => (y) { y = Add (x, x) }""",
        "scopes: {head: second}",
        head='<ir_version: 9, opset_import: ["" : 17, "own" : 1]>',
    )
    with pytest.raises(SpecError, match="the scope `head` holds no node"):
        prepared(spec)


def test_groups_that_share_a_node_are_one(tmp_path: Path) -> None:
    text = "keep_together: [[{op: Conv}, {op: BatchNormalization}], [{op: Relu}, {node: norm}]]"
    question = prepared(write(tmp_path, NORMALISED, text)).question
    (unit,) = question.units
    assert {node.name for node in question.graph.nodes} == unit


QUANTISED = """
g (float[1,4,8,8] x) => (float[1,4,8,8] y)
<float scale = {0.1}, int8 zero = {0}, float[4,4,1,1] w, float[4,4,1,1] v>
{
    [a_round] r = QuantizeLinear (x, scale, zero)
    [a_take]  s = DequantizeLinear (r, scale, zero)
    [a_conv]  c = Conv (s, w)
    [b_round] t = QuantizeLinear (c, scale, zero)
    [b_take]  u = DequantizeLinear (t, scale, zero)
    [b_conv]  y = Conv (u, v)
}"""


@pytest.mark.parametrize("partition", ["scopes: {a: 'a_*', b: 'b_*'}", "points: [c]"])
def test_what_is_quantised_together_is_cut_where_the_spec_says(
    tmp_path: Path, partition: str
) -> None:
    found = stages(compile_package(write(tmp_path, QUANTISED, partition), tmp_path / "package"))
    assert len(found) == 2
    assert {"a_conv"} == {"a_conv", "b_conv"} & found[0][2]


def test_sizes_that_are_computed_elsewhere_are_in_the_way_only_off_tensorrt(
    tmp_path: Path,
) -> None:
    text = """
    g (float[n,4] x) => (float[m,k] y)
    <float[4,4] w, float[2,3] v, int64[1] two = {2}, int64[1] first = {0}>
    {
        [a_one]   p = MatMul (x, w)
        [b_size]  s = Shape (p)
        [b_pick]  d = Gather (s, first)
        [b_twice] t = Mul (d, two)
        [b_both]  c = Concat <axis = 0> (t, two)
        [a_two]   q = Reshape (p, c)
        [a_three] y = MatMul (q, v)
    }"""
    disabled = "passes: {disable: [fold-shapes]}"
    spec = write(tmp_path, text, "scopes: {a: 'a_*'}", "dims: {n: 4}", disabled)
    question = prepared(spec).question
    assert [stage.name for stage in question.split([])] == ["a"]
    with pytest.raises(SpecError, match="cannot-stay-whole") as caught:
        question.split(["b_twice"])
    assert caught.value.diagnostics[0].place is not None


def test_a_module_is_a_stage_by_itself(tmp_path: Path) -> None:
    spec = write(tmp_path, NORMALISED, "scopes: {all: '*'}")
    graph = import_model(onnx.load(tmp_path / "m.onnx"))
    asked = AskedStages.of(
        graph, spec.spec.partition, asked_of(spec.spec.partition), lambda: infer(graph), spec.place
    )
    origins = {node.name: (node.name,) for node in graph.nodes}
    with pytest.raises(SpecError, match="the scope `all` holds `norm` and other nodes") as caught:
        asked.on(graph, origins, lambda node: False, alone={"norm"})
    (fault,) = caught.value.diagnostics
    assert (fault.code, str(fault.place).rpartition("/")[2]) == (
        "module-inside-stage",
        "spec.yaml:5:27",
    )


# --- on its own ----------------------------------------------------------------------------------


def test_a_backbone_and_its_heads_compiled_apart_are_the_model(tmp_path: Path) -> None:
    spec = write(tmp_path, SHARED, SCOPES, DIMS, "verify: {}")
    made: dict[str, Manifest] = {}
    for stage in ("backbone", "boxes", "scores"):
        outcome = compile_package(spec, tmp_path / stage, stage=stage)
        assert outcome.exit_code == 0
        assert [(name, runtime) for name, runtime, _ in stages(outcome)] == [(stage, "tensorrt")]
        made[stage] = outcome.manifest
    assert [tensor.name for tensor in made["backbone"].outputs] == ["b"]
    (entering,) = made["boxes"].inputs
    assert (entering.name, entering.shape) == ("b", ("batch", 4, "floor((height + 1)/2)", 8))
    (profile,) = made["boxes"].profiles
    extents = profile["floor((height + 1)/2)"]
    assert (extents.min, extents.opt, extents.max) == (4, 8, 16)

    x = np.random.default_rng(1).random((3, 3, 24, 16), np.float32)
    features = optc.load(tmp_path / "backbone").run({"x": x})
    found = optc.load(tmp_path / "boxes").run(features)
    found |= optc.load(tmp_path / "scores").run(features)
    for name, expected in original(tmp_path, {"x": x}).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


def test_parts_of_a_real_model_one_after_another_are_its_stages(
    tmp_path: Path, real_model: Callable[[str], Path]
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        f"version: 1\nmodel: {real_model('dcn_resnet18')}\ndims: {{batch: {{min: 1, opt: 2, max: 4}}}}\n"
        "targets: [{name: ampere, compute_capability: 8.6}]\nverify: {}\n"
        'partition: {scopes: {stem: "/stem/*", a: "/a/*", b: "/b/*", tail: ["/fc/*", "/Reduce*"]}}\n'
    )
    whole = compile_package(checked(spec), tmp_path / "whole")
    assert whole.exit_code == 0
    assert [name for name, _, _ in stages(whole)] == ["stem", "a", "b", "tail"]
    (image,) = whole.manifest.inputs
    assert image.shape is not None
    extents = [3 if isinstance(axis, str) else axis for axis in image.shape]
    values = {image.name: np.random.default_rng(5).random(extents, np.float32)}
    expected = optc.load(tmp_path / "whole").run(values)
    for stage in ("stem", "a", "b", "tail"):
        outcome = compile_package(checked(spec), tmp_path / stage, stage=stage)
        assert outcome.exit_code == 0
        package = optc.load(tmp_path / stage)
        values |= package.run({t.name: values[t.name] for t in outcome.manifest.inputs})
    for name, array in expected.items():
        np.testing.assert_allclose(values[name], array, rtol=1e-5, atol=1e-6)


def test_points_at_the_border_of_a_part_are_no_matter(tmp_path: Path) -> None:
    spec = write(tmp_path, SHARED, f'points: [b, {{node: "backbone_*"}}], {SCOPES}', DIMS)
    for stage in ("backbone", "boxes"):
        planned = plan_package(spec, stage=stage, build=False)
        assert not planned.notes
        assert [each.name for each in planned.manifest.stages] == [stage]


def test_a_stage_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write(tmp_path, SHARED, SCOPES, DIMS)
    monkeypatch.chdir(tmp_path)
    package = optc.compile(spec.path, stage="scores")
    assert package.path == Path("build/spec-scores")
    assert [tensor.name for tensor in package.manifest.outputs] == ["scores"]


def test_a_part_is_verified_against_the_same_part(tmp_path: Path) -> None:
    spec = write(tmp_path, SHARED, SCOPES, DIMS)
    compile_package(spec, tmp_path / "boxes", stage="boxes")
    verification = verify_package(tmp_path / "boxes")
    assert verification.exit_code == 0
    assert {finding.case for finding in verification.findings} == {"min", "opt", "max"}
    assert {finding.output for finding in verification.findings} == {"boxes"}


def test_a_part_that_is_wrong_is_found_out(tmp_path: Path) -> None:
    spec = write(tmp_path, SHARED, SCOPES, DIMS)
    compile_package(spec, tmp_path / "boxes", stage="boxes")
    manifest = read_manifest(tmp_path / "boxes")
    assert manifest.model.part is not None
    swapped = manifest.model.part.model_copy(update={"outputs": ("c",)})  # boxes without the Add
    package = optc.load(tmp_path / "boxes")
    other = manifest.model_copy(
        update={"model": manifest.model.model_copy(update={"part": swapped})}
    )
    package.manifest = other
    from optc.optimizer.verify import verify

    verification = verify(package, tmp_path / "m.onnx")
    assert verification.exit_code == 3


def test_data_of_the_whole_and_of_the_part_verify_a_part(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    write_arrays(tmp_path / "whole.npz", {"x": random.random((1, 3, 16, 16), np.float32)})
    write_arrays(tmp_path / "part.npz", {"b": random.random((1, 4, 8, 8), np.float32)})
    extra = "verify: {data: whole.npz, outputs: {boxes: {atol: 1.0e-3}, scores: {atol: 1.0e-9}}}"
    spec = write(tmp_path, SHARED, SCOPES, DIMS, extra)
    outcome = compile_package(spec, tmp_path / "boxes", stage="boxes")
    assert outcome.exit_code == 0
    assert outcome.verification is not None
    cases = {finding.case for finding in outcome.verification.findings}
    assert str(tmp_path / "whole.npz") in cases
    found = verify_package(tmp_path / "boxes", data=[str(tmp_path / "part.npz")])
    assert found.exit_code == 0
    assert str(tmp_path / "part.npz") in {finding.case for finding in found.findings}
    bad = tmp_path / "bad.npz"
    write_arrays(bad, {"y": random.random((1, 4, 8, 8), np.float32)})
    with pytest.raises(InputError, match=r"bad\.npz"):
        verify_package(tmp_path / "boxes", data=[str(bad)])


def test_low_precision_of_a_part_is_searched_on_what_enters_it(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    for name in ("a", "b"):
        array = random.random((1, 3, 16, 16), np.float32)
        write_arrays(tmp_path / f"{name}.npz", {"x": array})
    extra = "precision: {default: int8, calibration: {data: a.npz}}\nverify: {data: b.npz, of_scale: 0.2}"
    spec = write(tmp_path, SHARED, SCOPES, DIMS, extra)
    outcome = compile_package(spec, tmp_path / "boxes", stage="boxes")
    assert outcome.exit_code == 0
    (stage,) = outcome.manifest.stages
    assert stage.precision is not None
    assert "int8" in stage.precision.nodes


def test_low_precision_of_a_part_is_measured_on_made_up_input_of_the_whole(tmp_path: Path) -> None:
    spec = write(tmp_path, SHARED, SCOPES, DIMS, "precision: fp16")
    outcome = compile_package(spec, tmp_path / "boxes", stage="boxes")
    assert outcome.precision
    assert {note.code for note in outcome.notes} <= {"verify-not-met"}
    (stage,) = outcome.manifest.stages
    assert stage.precision is not None
    assert "fp16" in stage.precision.nodes


def test_input_that_the_original_rejects_is_the_users(tmp_path: Path) -> None:
    text = """
    g (float[2,4] x, int64[1] i) => (float[1,4] y)
    <float[4,4] w>
    {
        [pick]     a = Gather (x, i)
        [head_mul] y = MatMul (a, w)
    }"""
    write_arrays(
        tmp_path / "bad.npz", {"x": np.ones((2, 4), np.float32), "i": np.array([7], np.int64)}
    )
    spec = write(tmp_path, text, "scopes: {head: 'head_*'}", "", "verify: {data: bad.npz}")
    with pytest.raises(InputError, match="data-rejected"):
        compile_package(spec, tmp_path / "head", stage="head")
    spec = write(
        tmp_path,
        text,
        "scopes: {head: 'head_*'}",
        "",
        "precision: {default: int8, calibration: {data: bad.npz}}",
    )
    with pytest.raises(InputError, match="data-rejected"):
        compile_package(spec, tmp_path / "head", stage="head")


SIZES = """
g (float[2,6] x, float[2,3,2] k) => (float[2,3,2] y)
<float[6,6] w, int64[3] i = {0, 1, 2}>
{
    [body]       a = MatMul (x, w)
    [other_size] n = Shape (k)
    [other_pick] m = Gather (n, i)
    [head_shape] r = Reshape (a, m)
    [head_add]   y = Relu (r)
}"""


def test_sizes_that_are_known_do_not_enter_a_part(tmp_path: Path) -> None:
    spec = write(tmp_path, SIZES, 'scopes: {head: "head_*"}')
    manifest = compile_package(spec, tmp_path / "head", stage="head").manifest
    assert [tensor.name for tensor in manifest.inputs] == ["a"]
    assert manifest.model.part is not None
    assert [*manifest.model.part.sizes["m"].values] == [2, 3, 2]
    assert verify_package(tmp_path / "head").exit_code == 0


def test_sizes_of_a_dynamic_axis_are_computed_from_what_has_it(tmp_path: Path) -> None:
    text = SIZES.replace("[2,6] x", "[b,6] x").replace("[2,3,2] k", "[b,3,2] k")
    spec = write(tmp_path, text, 'scopes: {head: "head_*"}', "dims: {b: {min: 1, opt: 2, max: 4}}")
    manifest = compile_package(spec, tmp_path / "head", stage="head").manifest
    assert [tensor.name for tensor in manifest.inputs] == ["k", "a"]
    assert verify_package(tmp_path / "head").exit_code == 0


def test_how_many_there_are_may_depend_on_the_data(tmp_path: Path) -> None:
    text = """
    g (float[8] x) => (float[n,4] y)
    <float[1,4] w>
    {
        [find_some] i = NonZero (x)
        [find_turn] t = Transpose <perm = [1, 0]> (i)
        [find_cast] c = Cast <to = 1> (t)
        [head_mul]  y = MatMul (c, w)
    }"""
    spec = write(tmp_path, text, 'scopes: {head: "head_*"}')
    manifest = compile_package(spec, tmp_path / "head", stage="head").manifest
    (entering,) = manifest.inputs
    assert entering.shape is not None
    (profile,) = manifest.profiles
    extents = profile[str(entering.shape[0])]
    assert (extents.min, extents.max) == (0, 8)
    found = optc.load(tmp_path / "head").run({"c": np.ones((3, 1), np.float32)})
    assert found["y"].shape == (3, 4)
    assert verify_package(tmp_path / "head").exit_code == 0


def test_a_sequence_is_no_input_of_a_part(tmp_path: Path) -> None:
    text = """
    g (float[2,4] x) => (float[2,2] y)
    <int64 zero = {0}, int64[2] parts = {2, 2}>
    {
        [first]     s = SplitToSequence <axis = 1> (x, parts)
        [head_at]   t = SequenceAt (s, zero)
        [head_relu] y = Relu (t)
    }"""
    spec = write(tmp_path, text, 'scopes: {head: "head_*"}')
    with pytest.raises(SpecError, match="`s`, where it is cut") as caught:
        part_of(spec, "head")
    (fault,) = caught.value.diagnostics
    assert fault.code == "not-on-its-own"
    assert fault.place is not None


def test_an_axis_without_a_bound_does_not_enter_a_part(tmp_path: Path) -> None:
    text = """
    g (float[n] x, int64 k) => (float[m] y)
    <int64 zero = {0}, int64 one = {1}>
    {
        [first]    r = Range (zero, k, one)
        [cast]     f = Cast <to = 1> (r)
        [head_exp] y = Exp (f)
    }"""
    spec = write(tmp_path, text, 'scopes: {head: "head_*"}', "dims: {n: 4}")
    with pytest.raises(SpecError) as caught:
        part_of(spec, "head")
    (fault,) = caught.value.diagnostics
    assert fault.code == "axis-without-range"
    assert fault.todo is not None
    assert "under `dims`" in fault.todo


def test_a_part_has_weights_from_where_the_model_has_them(tmp_path: Path) -> None:
    spec = write(tmp_path, SHARED, SCOPES, DIMS)
    model = onnx.load(tmp_path / "m.onnx")
    onnx.save(
        model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0
    )
    compile_package(checked(spec.path), tmp_path / "boxes", stage="boxes")
    assert verify_package(tmp_path / "boxes").exit_code == 0
    (tmp_path / "boxes-only").mkdir()
    (tmp_path / "boxes").rename(
        tmp_path / "boxes-only" / "package"
    )  # the model is not needed to run
    (tmp_path / "m.bin").unlink()
    b = np.ones((1, 4, 4, 8), np.float32)
    assert optc.load(tmp_path / "boxes-only" / "package").run({"b": b})["boxes"].shape == b.shape


@pytest.mark.parametrize(
    ("partition", "stage", "words"),
    [
        (SCOPES, "boxs", "write `boxes`"),
        (SCOPES, "zzz", "write one of backbone, boxes, scores"),
        ("", "boxes", "name the nodes of the stage in the spec"),
    ],
)
def test_a_stage_that_nobody_named(tmp_path: Path, partition: str, stage: str, words: str) -> None:
    spec = write(tmp_path, SHARED, partition, DIMS)
    with pytest.raises(InputError, match="unknown-stage") as caught:
        plan_package(spec, stage=stage, build=False)
    assert words in str(caught.value)


def test_the_command_compiles_stages_side_by_side(tmp_path: Path) -> None:
    spec = write(tmp_path, SHARED, SCOPES, DIMS)
    done = cli(
        "compile",
        spec.path,
        "--stage",
        "boxes",
        "--stage",
        "scores",
        "-o",
        tmp_path / "out",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [Path(each["output"]).name for each in results] == ["spec-boxes", "spec-scores"]
    assert read_manifest(tmp_path / "out" / "spec-boxes").model.part is not None
