"""Real exports, compiled the way a user does: what TensorRT refuses is cut out, and no more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from models.materialise import materialise

from optc.specs.manifest import Manifest

RealModel = Callable[[str], Path]

NOT_LEGALISED = "passes: {legalise: false}"


def compiled(model: Path, folder: Path, dims: str, *lines: str) -> Manifest:
    spec = folder / "spec.yaml"
    target = '{name: ada, compute_capability: "8.9"}'
    model_path = json.dumps(str(model))
    spec.write_text(
        f"version: 1\nmodel: {model_path}\ndims: {dims}\ntargets: [{target}]\n"
        + "".join(f"{line}\n" for line in lines)
    )
    command = [sys.executable, "-m", "optc", "compile", "spec.yaml", "-o", "package", "--json"]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["verification"]["findings"], "the package was not run"
    assert not result["verification"]["diagnostics"]
    return Manifest.model_validate_json((folder / "package" / "manifest.json").read_text())


def test_the_same_seed_gives_the_same_weights(real_model: RealModel, tmp_path: Path) -> None:
    first = real_model("dcn_resnet18").read_bytes()
    assert materialise("dcn_resnet18", tmp_path).read_bytes() == first
    assert materialise("dcn_resnet18", tmp_path, seed=1).read_bytes() != first


def test_a_deformable_convolution_is_cut_out_of_a_backbone(
    real_model: RealModel, tmp_path: Path
) -> None:
    dims = "{batch: {min: 1, opt: 2, max: 8}}"
    manifest = compiled(real_model("dcn_resnet18"), tmp_path, dims, NOT_LEGALISED)
    [target] = manifest.targets
    runtimes = [stage.runtime for stage in manifest.stages_of(target)]
    assert runtimes == ["tensorrt", "onnxruntime", "tensorrt", "onnxruntime", "tensorrt"]
    for stage in manifest.stages:
        refused = [(reason.op, reason.by) for reason in stage.why]
        assert refused == [("DeformConv", "parser")] * (stage.runtime == "onnxruntime")
    reads = [name for stage in manifest.stages if stage.why for name in stage.inputs]
    assert set(reads) < {crossing.tensor for crossing in target.crossings}
    assert sum(crossing.boundaries for crossing in target.crossings) == len(target.crossings)


def test_a_deformable_convolution_that_is_spelt_out_leaves_one_engine(
    real_model: RealModel, tmp_path: Path
) -> None:
    manifest = compiled(real_model("dcn_resnet18"), tmp_path, "{batch: {min: 1, opt: 2, max: 8}}")
    [stage] = manifest.stages
    assert stage.runtime == "tensorrt"
    assert [(each.op, each.passes) for each in stage.legalised] == [
        ("DeformConv", ("decompose-deform-conv",))
    ] * 2
    whole = onnx.load(tmp_path / "package" / "model.onnx", load_external_data=False)
    assert set(stage.nodes) == {node.name for node in whole.graph.node}
    assert {each.node for each in stage.legalised} <= set(stage.nodes)


def test_a_detector_keeps_its_work_in_engines(real_model: RealModel, tmp_path: Path) -> None:
    # Legalised it is one engine, which takes longer to build than a test may.
    manifest = compiled(real_model("ssd300_vgg16"), tmp_path, "{}", NOT_LEGALISED)
    engines = [stage for stage in manifest.stages if stage.runtime == "tensorrt"]
    assert sum(stage.flops_share for stage in engines) > 0.9999
    assert len(engines) <= 2
    reasons = [reason for stage in manifest.stages for reason in stage.why]
    refused = {reason.op: reason.by for reason in reasons if reason.by != "rule"}
    assert refused == {"NonZero": "parser", "If": "builder"}  # of the bodies' NonMaxSuppression
    whole = onnx.load(tmp_path / "package" / "model.onnx", load_external_data=False)
    found = {reason.node for reason in reasons if reason.op == "NonZero"}
    assert found == {node.name for node in whole.graph.node if node.op_type == "NonZero"}
    assert np.isclose(sum(stage.flops_share for stage in manifest.stages), 1, atol=1e-4)
