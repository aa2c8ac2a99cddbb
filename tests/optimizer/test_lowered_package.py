"""The whole way in less than fp32: real engines, the lowered stages, and what is said of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from optc.optimizer import precision_choice
from optc.optimizer.compile import compile_package, plan_package, verify_package
from optc.optimizer.runtime import load
from optc.optimizer.summary import Outcome
from optc.passes import registry
from optc.specs.check import check
from optc.specs.diagnostic import InputError, SpecError

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'

NET = """
g (float[batch,4,8,8] x) => (float[batch,8] y)
{
    [first]  a = Conv <pads = [1,1,1,1]> (x, w)
    [gate]   b = Sigmoid (a)
    [swish]  c = Mul (a, b)
    [second] d = Conv (c, v)
    [pool]   e = GlobalAveragePool (d)
    [flat]   f = Flatten (e)
    [head]   h = MatMul (f, m)
    [soft]   y = Softmax (h)
}"""

# The square of what is in the hundreds is beyond the largest number of fp16.
STEEP = """
g (float[batch,4,8,8] x) => (float[batch,8] y)
{
    [first]  a = Conv <pads = [1,1,1,1]> (x, w)
    [up]     b = Mul (a, large)
    [square] c = Mul (b, b)
    [root]   d = Sqrt (c)
    [shrink] i = Mul (d, tiny)
    [bound]  k = Tanh (i)
    [second] e = Conv (k, v)
    [pool]   f = GlobalAveragePool (e)
    [flat]   y = Flatten (f)
}"""

WEIGHTS = {
    "w": (8, 4, 3, 3),
    "v": (8, 8, 3, 3),
    "m": (8, 8),
}


def spec_of(
    folder: Path, text: str, precision: str, extra: str = "", capability: str = "8.9"
) -> Path:
    """Write a model and a spec for it; return the spec."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(HEAD + text)
    read = {name for node in model.graph.node for name in node.input}
    for name, shape in WEIGHTS.items():
        if name in read:
            values = rng.uniform(-0.3, 0.3, shape).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    for name, number in {"large": 1e3, "tiny": 1e-3}.items():
        if name in read:
            array = np.array(number, np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, folder / "m.onnx")
    spec = folder / "spec.yaml"
    spec.write_text(
        "version: 1\nmodel: m.onnx\ndims: {batch: {min: 1, opt: 2, max: 4}}\n"
        f"targets: [{{name: gpu, compute_capability: {capability}}}]\n"
        f"precision: {precision}\n{extra}\n"
    )
    return spec


def data(folder: Path, name: str, count: int, seed: int) -> None:
    """Write inputs of two samples each."""
    rng = np.random.default_rng(seed)
    (folder / name).mkdir()
    for index in range(count):
        x = rng.uniform(0, 1, (2, 4, 8, 8)).astype(np.float32)
        np.savez(folder / name / f"{index}.npz", x=x)


def compiled(spec: Path) -> Outcome:
    return compile_package(check(spec, known_passes=registry.names), spec.parent / "out")


def stage_of(outcome: Outcome, number: int = 0) -> onnx.ModelProto:
    """Return a stage as ONNX, checked in full."""
    path = outcome.folder / outcome.manifest.stages[number].model
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(path)


def types_of(model: onnx.ModelProto) -> Counter[int]:
    return Counter(tensor.data_type for tensor in model.graph.initializer)


@pytest.mark.parametrize(
    ("precision", "capability", "dtype"),
    [
        ("fp16", "7.5", TensorProto.FLOAT16),
        ("fp16", "8.9", TensorProto.FLOAT16),
        ("bf16", "8.0", TensorProto.BFLOAT16),
    ],
)
def test_a_model_computes_in_the_short_type_and_keeps_its_inputs_and_outputs(
    tmp_path: Path, precision: str, capability: str, dtype: int
) -> None:
    spec = spec_of(tmp_path, NET, precision, "verify: {}\ngate: {max_engines: 1}", capability)
    outcome = compiled(spec)
    assert outcome.exit_code == 0
    model = stage_of(outcome)
    assert {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)} == {
        TensorProto.FLOAT
    }
    assert types_of(model)[dtype] == 3
    casts = [node.op_type for node in model.graph.node].count("Cast")
    assert casts == 2, "one for the input, one for the output"
    (stage,) = outcome.manifest.stages
    assert stage.precision is not None
    assert stage.precision.flops == {precision: 1.0}
    assert stage.engines["gpu"].bytes > 0
    assert verify_package(tmp_path / "out").exit_code == 0


def test_the_evidence_is_in_the_package(tmp_path: Path) -> None:
    outcome = compiled(spec_of(tmp_path, NET, "fp16", "verify: {}"))
    evidence = json.loads((tmp_path / "out" / "manifest.json").read_text())["evidence"]
    assert evidence["met"]
    assert 0 < evidence["badness"] <= 1
    assert {each["node"] for each in evidence["ranking"]} >= {"first", "second", "head"}
    assert [p["chosen"] for p in evidence["curve"]["points"]].count(True) == 1
    picture = ElementTree.parse(tmp_path / "out" / "precision.svg")
    assert picture.getroot().tag.endswith("svg")
    assert "precision.svg" in outcome.manifest.files


def test_what_the_spec_keeps_is_kept(tmp_path: Path) -> None:
    precision = (
        "{default: fp16, keep_fp32: [{op: Softmax}], layers: [{node: first, precision: fp32}]}"
    )
    outcome = compiled(spec_of(tmp_path, NET, precision))
    (stage,) = outcome.manifest.stages
    assert stage.precision is not None
    kept = {each.node: (each.precision, each.by) for each in stage.precision.kept}
    assert kept == {"soft": ("fp32", "spec"), "first": ("fp32", "spec")}
    model = stage_of(outcome)
    makers = {name: node for node in model.graph.node for name in node.output}
    dtypes = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    first = next(node for node in model.graph.node if node.name == "first")
    assert dtypes[first.input[1]] == TensorProto.FLOAT
    soft = next(node for node in model.graph.node if node.op_type == "Softmax")
    assert makers[soft.input[0]].op_type == "Cast"


def test_a_layer_may_be_lower_than_the_rest(tmp_path: Path) -> None:
    precision = "{default: fp32, layers: [{op: MatMul, precision: fp16}]}"
    outcome = compiled(spec_of(tmp_path, NET, precision))
    assert types_of(stage_of(outcome)) == {TensorProto.FLOAT: 2, TensorProto.FLOAT16: 1}


def test_what_would_overflow_stays_in_fp32_and_the_rest_does_not(tmp_path: Path) -> None:
    outcome = compiled(spec_of(tmp_path, STEEP, "fp16", "verify: {}"))
    assert outcome.exit_code == 0
    (stage,) = outcome.manifest.stages
    assert stage.precision is not None
    kept = {each.node: each.by for each in stage.precision.kept}
    assert set(kept.values()) == {"search"}
    assert "square" in kept
    assert kept.keys() <= {"square", "root"}
    assert stage.precision.flops["fp16"] > 0.9


def test_a_target_without_the_precision_is_an_error_of_the_spec(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, NET, "bf16", capability="7.5")
    with pytest.raises(SpecError) as caught:
        compiled(spec)
    (problem,) = caught.value.diagnostics
    assert problem.code == "precision-not-on-target"
    assert problem.place is not None
    assert problem.place.line == 5
    assert not (tmp_path / "out").exists()


def test_the_fallback_computes_in_fp32(tmp_path: Path) -> None:
    outcome = compiled(spec_of(tmp_path, NET, "fp16", "partition: {off_tensorrt: [{op: Sigmoid}]}"))
    stages = outcome.manifest.stages
    assert [stage.runtime for stage in stages] == ["tensorrt", "onnxruntime", "tensorrt"]
    assert stages[1].precision is not None
    assert stages[1].precision.nodes == {"fp32": 1}
    for stage in (0, 2):
        assert TensorProto.FLOAT16 in types_of(stage_of(outcome, stage))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("int8", TensorProto.INT8), ("fp8", TensorProto.FLOAT8E4M3FN)]
)
def test_products_are_quantised_with_the_ranges_of_the_data(
    tmp_path: Path, precision: str, dtype: int
) -> None:
    data(tmp_path, "calib", 4, seed=1)
    data(tmp_path, "verify", 2, seed=2)
    spec = spec_of(
        tmp_path,
        NET,
        f"{{default: {precision}, calibration: {{data: calib/*.npz, method: minmax, cache: r.json}}}}",
        "verify: {data: verify/*.npz}",
    )
    outcome = compiled(spec)
    assert outcome.exit_code == 0
    types = types_of(stage_of(outcome))
    assert types[dtype] >= 3
    ranges = json.loads((tmp_path / "r.json").read_text())
    x = [np.load(path)["x"] for path in sorted((tmp_path / "calib").glob("*.npz"))]
    assert ranges["amax"]["x"] == pytest.approx(float(np.max(x)))
    (stage,) = outcome.manifest.stages
    assert stage.precision is not None
    assert stage.precision.flops[precision] > 0.9
    outputs = load(tmp_path / "out").run({"x": x[0]})
    assert outputs["y"].dtype == np.float32


def test_data_to_verify_with_are_not_calibrated_with(tmp_path: Path) -> None:
    data(tmp_path, "calib", 2, seed=1)
    x = np.load(tmp_path / "calib" / "1.npz")["x"]
    np.savez_compressed(tmp_path / "same.npz", x=x)
    precision = "{default: int8, calibration: {data: calib/*.npz, cache: r.json}}"
    spec = spec_of(tmp_path, NET, precision, "verify: {data: same.npz}")
    with pytest.raises(InputError) as caught:
        compiled(spec)
    assert [each.code for each in caught.value.diagnostics] == ["calibration-leak"]
    assert not (tmp_path / "r.json").exists(), "ranges of such data are not kept"


def test_a_target_is_asked_before_anything_is_calibrated(tmp_path: Path) -> None:
    data(tmp_path, "calib", 1, seed=1)
    precision = "{default: fp8, calibration: {data: calib/*.npz, cache: r.json}}"
    with pytest.raises(SpecError) as caught:
        compiled(spec_of(tmp_path, NET, precision, capability="8.6"))
    assert [each.code for each in caught.value.diagnostics] == ["precision-not-on-target"]
    assert not (tmp_path / "r.json").exists()


def test_a_plan_says_what_each_stage_computes_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_of(tmp_path, NET, "{default: fp16, keep_fp32: [{op: Softmax}]}")
    planned = plan_package(check(spec, known_passes=registry.names))
    planned.print()
    shown = capsys.readouterr().out
    assert "fp16 99." in shown
    assert "kept in fp32: Softmax x1; spec: keep_fp32: {op: Softmax}" in shown
    assert "precision, simulated: " in shown
    assert planned.as_json()["evidence"]


def test_a_node_is_counted_once_however_many_stages_it_stands_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_of(tmp_path, NET, "{default: fp16, keep_fp32: [{op: MatMul}]}", capability="7.5")
    turing = "{name: gpu, compute_capability: 7.5}"
    ada = "{name: ada, compute_capability: 8.9}"
    spec.write_text(spec.read_text().replace(turing, f"{turing}, {ada}"))
    planned = plan_package(check(spec, known_passes=registry.names))
    assert len(planned.manifest.stages) == 2, "7.5 does not multiply matrices in fp32"
    planned.print()
    assert "kept in fp32: MatMul x1; spec: keep_fp32: {op: MatMul}" in capsys.readouterr().out


def test_a_model_that_does_not_take_made_up_input_is_lowered_unmeasured(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    onnx.save(
        onnx.parser.parse_model(
            HEAD
            + """
            g (int64[2] ids) => (float[2,4] y)
            <float[1,4] table = {1, 2, 3, 4}, float[4,4] w = {1,2,3,4,5,6,7,8,1,2,3,4,5,6,7,8}>
            {
                [look] r = Gather (table, ids)
                [head] y = MatMul (r, w)
            }"""
        ),
        tmp_path / "m.onnx",
    )
    spec.write_text(
        "version: 1\nmodel: m.onnx\nprecision: fp16\n"
        "targets: [{name: gpu, compute_capability: 8.9}]\n"
    )
    outcome = compiled(spec)
    assert outcome.exit_code == 0
    assert [each.code for each in outcome.notes if each.severity == "warning"][:1] == [
        "precision-not-measured"
    ]
    assert outcome.manifest.stages[0].precision is not None
    assert outcome.manifest.stages[0].precision.flops == {"fp16": 1.0}


def test_weights_that_are_too_small_for_the_type_are_told(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, NET, "fp16")
    model = onnx.load(tmp_path / "m.onnx")
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == "w"]
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0, 0, 0] = 1e-9
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "w"))
    onnx.save(model, tmp_path / "m.onnx")
    (stage,) = compiled(spec).manifest.stages
    assert stage.precision is not None
    ((name, words),) = stage.precision.constants.items()
    assert name.startswith("w")
    assert "of 288 numbers 1 are 0 in float16" in words


def test_a_plan_writes_no_ranges_beside_the_spec(tmp_path: Path) -> None:
    data(tmp_path, "calib", 2, seed=1)
    precision = "{default: int8, calibration: {data: calib/*.npz, cache: r.json}}"
    spec = spec_of(tmp_path, NET, precision)
    planned = plan_package(check(spec, known_passes=registry.names), build=False)
    (stage,) = planned.manifest.stages
    assert stage.precision is not None
    assert "int8" in stage.precision.flops
    assert not (tmp_path / "r.json").exists()
    compiled(spec)
    assert (tmp_path / "r.json").exists()


def test_what_is_not_exact_enough_as_written_is_searched_again_for_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = precision_choice._badness
    seen: list[float] = []

    def worse_at_first(*arguments: Any) -> float:
        seen.append(measured(*arguments))
        return 2.0 if len(seen) == 1 else seen[-1]

    monkeypatch.setattr(precision_choice, "_badness", worse_at_first)
    outcome = compiled(spec_of(tmp_path, NET, "bf16", "verify: {}"))
    assert outcome.exit_code == 0
    assert len(seen) == 2
    assert all(0 < badness <= 1 for badness in seen)
    assert isinstance(outcome.manifest.evidence, dict)
    assert outcome.manifest.evidence["margin"] == pytest.approx(0.8 * 0.6)
