"""The examples do what their READMEs say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from ruamel.yaml import YAML

from optc.passes import registry
from optc.specs.check import check

EXAMPLES = Path(__file__).parents[1] / "examples"
OFFLINE = ["classifier", "detector", "ci-gate", "precision"]
WITH_TORCH = ["torch-stage"]
FROM_NETWORK = ["ppocr"]
MARKS = {"torch-stage": [pytest.mark.torch], "ppocr": [pytest.mark.network]}
SPECS = [
    pytest.param(
        path.parent.name,
        path.name,
        marks=MARKS.get(path.parent.name, []),
        id=f"{path.parent.name}/{path.name}",
    )
    for path in sorted(EXAMPLES.glob("*/spec*.yaml"))
]

Example = Callable[[str], Path]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """Return the function from an example's name to a copy of its folder, model made."""
    folder = tmp_path_factory.mktemp("examples")

    @cache
    def made(name: str) -> Path:
        made_here = shutil.ignore_patterns("build", "*.onnx", "*.npz", "*.pt*", "ranges.json")
        copy = shutil.copytree(EXAMPLES / name, folder / name, ignore=made_here)
        make_model(copy)
        return copy

    return made


def make_model(folder: Path) -> bytes:
    # From another folder, as the commands of the main README do.
    command = [sys.executable, str(folder / "model.py")]
    subprocess.run(command, cwd=folder.parent, check=True, capture_output=True)
    return (folder / "model.onnx").read_bytes()


def optc(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optc", *arguments]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)


def manifest_of(package: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((package / "manifest.json").read_text())
    return manifest


def console_of(folder: Path) -> dict[str, str]:
    """Return what the README of an example shows: command -> output."""
    blocks = re.findall(r"```console\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    steps = [step for block in blocks for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return {command: output for command, _, output in (step.partition("\n") for step in steps)}


def stages_in(output: str) -> list[str]:
    """Return the lines that tell stages, without what a new pass or TensorRT changes at once."""
    lines = re.findall(
        r"^.*(?:FLOPs in TensorRT|  tensorrt  |  onnxruntime  |  torch  ).*$", output, re.MULTILINE
    )
    return [re.sub(r"\d+ +(?=[\d.]+%)|[\d.]+ MB", "", line).rstrip() for line in lines]


def legalised_in(output: str) -> list[str]:
    """Return the lines that tell what was rewritten for TensorRT."""
    return re.findall(r"^rewritten for TensorRT: .*$", output, re.MULTILINE)


def test_every_example_is_listed_and_tested() -> None:
    folders = sorted(path.parent.name for path in EXAMPLES.glob("*/README.md"))
    index = (EXAMPLES / "README.md").read_text()
    known = OFFLINE + WITH_TORCH + FROM_NETWORK
    assert folders == sorted(known)
    assert re.findall(r"^- \[(.+?)\]\(\1/\)", index, re.MULTILINE) == known
    assert {spec.values[0] for spec in SPECS} == {*folders}


@pytest.mark.parametrize(
    "name", [*OFFLINE, *(pytest.param(name, marks=pytest.mark.torch) for name in WITH_TORCH)]
)
def test_a_model_has_the_same_bytes_each_time(example: Example, name: str) -> None:
    folder = example(name)
    before = (folder / "model.onnx").read_bytes()
    assert make_model(folder) == before


@pytest.mark.parametrize(("name", "spec"), SPECS)
def test_a_spec_passes_its_check(example: Example, name: str, spec: str) -> None:
    checked = check(example(name) / spec, known_passes=registry.names)
    assert checked.outline_ok
    assert not checked.notes


def test_the_classifier_becomes_one_engine_without_batch_normalisation(example: Example) -> None:
    folder = example("classifier")
    done = optc(folder, "compile", "spec.yaml")
    assert done.returncode == 0, done.stderr
    package = folder / "build" / "spec"
    (stage,) = manifest_of(package)["stages"]
    assert stage["runtime"] == "tensorrt"
    assert set(stage["engines"]) == {"ampere", "ada"}
    ops = {node.op_type for node in onnx.load(package / "model.onnx").graph.node}
    assert "BatchNormalization" not in ops
    shown = console_of(folder)["optc compile spec.yaml"]
    assert stages_in(shown) == stages_in(done.stdout)

    image = np.random.default_rng(0).standard_normal((3, 3, 128, 128)).astype(np.float32)
    np.savez(folder / "in.npz", image=image)
    done = optc(folder, "run", "build/spec", "--inputs", "in.npz", "--outputs", "out.npz")
    assert done.returncode == 0, done.stderr
    (expected,) = ort.InferenceSession(folder / "model.onnx").run(None, {"image": image})
    with np.load(folder / "out.npz") as found:
        np.testing.assert_allclose(found["probability"], expected, atol=1e-5, rtol=1e-4)


def why(folder: Path, package: str) -> str:
    command = [sys.executable, "why.py", package]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def judged_in(output: str) -> list[str]:
    """Return what ``why.py`` says, without TensorRT's words and the nodes that a new pass changes."""
    lines = [line for line in output.splitlines() if line[0] != " " or "NonMaxSuppression" in line]
    return [re.sub(r"by builder: .*", "by builder", line) for line in lines]


def test_the_detector_is_two_engines_with_what_was_refused_rewritten(example: Example) -> None:
    folder = example("detector")
    done = optc(folder, "compile", "spec.yaml")
    assert done.returncode == 0, done.stderr
    backbone, head = manifest_of(folder / "build" / "spec")["stages"]
    assert [s["runtime"] for s in (backbone, head)] == ["tensorrt", "tensorrt"]
    assert backbone["outputs"] == ["/backbone/out"]
    assert backbone["legalised"] == []
    [rewritten] = head["legalised"]
    assert (rewritten["op"], rewritten["by"]) == ("NonMaxSuppression", "builder")
    assert rewritten["passes"] == ["decompose-non-max-suppression"]
    shown = console_of(folder)
    assert stages_in(shown["optc compile spec.yaml"]) == stages_in(done.stdout)
    assert legalised_in(shown["optc compile spec.yaml"]) == legalised_in(done.stdout)
    told = why(folder, "build/spec")
    assert judged_in(told) == judged_in(shown["python why.py build/spec"]) != []


def test_the_detector_is_cut_before_what_is_refused_where_that_is_not_rewritten(
    example: Example,
) -> None:
    folder = example("detector")
    done = optc(folder, "compile", "spec-as-it-is.yaml")
    assert done.returncode == 0, done.stderr
    backbone, head, post = manifest_of(folder / "build" / "spec-as-it-is")["stages"]
    assert [s["runtime"] for s in (backbone, head, post)] == ["tensorrt", "tensorrt", "onnxruntime"]
    assert backbone["outputs"] == ["/backbone/out"]
    assert backbone["why"] == head["why"] == []
    refused = post["why"][0]
    assert (refused["op"], refused["by"]) == ("NonMaxSuppression", "builder")
    shown = console_of(folder)
    assert stages_in(shown["optc compile spec-as-it-is.yaml"]) == stages_in(done.stdout)
    told = why(folder, "build/spec-as-it-is")
    assert judged_in(told) == judged_in(shown["python why.py build/spec-as-it-is"]) != []


def test_a_gate_that_holds_exits_0_and_one_that_does_not_3(example: Example) -> None:
    folder = example("ci-gate")
    shown = console_of(folder)
    for spec, code, rewritten in (("spec-pass", 0, ["NonZero"]), ("spec-fail", 3, [])):
        done = optc(folder, "compile", f"{spec}.yaml")
        assert done.returncode == code, done.stderr
        assert ("error[gate-max-engines]" in done.stderr) == (code == 3)
        assert stages_in(shown[f"optc compile {spec}.yaml"]) == stages_in(done.stdout)
        assert legalised_in(shown[f"optc compile {spec}.yaml"]) == legalised_in(done.stdout)
        stages = manifest_of(folder / "build" / spec)["stages"]
        assert [each["op"] for stage in stages for each in stage["legalised"]] == rewritten
    assert done.stderr.strip() in shown["optc compile spec-fail.yaml"]


def test_the_workflow_compiles_the_spec_beside_it() -> None:
    folder = EXAMPLES / "ci-gate"
    job = YAML(typ="safe").load(folder / "workflow.yml")["jobs"]["gate"]
    runs = [step["run"] for step in job["steps"] if "run" in step]
    (compiles,) = [run.split() for run in runs if run.startswith("optc compile")]
    assert (folder / compiles[2]).is_file()
    uploaded = job["steps"][-1]["with"]["path"]
    assert job["defaults"]["run"]["working-directory"] + "/" + compiles[4] == uploaded


def kept_in(output: str) -> list[str]:
    """Return the names of the nodes that a search kept in fp32, as the table of their costs has them."""
    return re.findall(r"^ (/\S+) +\w+ +fp32 +\S+ +<?[\d.]+%  ", output, re.MULTILINE)


def test_only_what_overflows_is_kept_in_fp32(example: Example) -> None:
    folder = example("precision")
    done = optc(folder, "compile", "spec.yaml")
    assert done.returncode == 0, done.stderr
    package = folder / "build" / "spec"
    (stage,) = manifest_of(package)["stages"]
    assert set(stage["engines"]) == {"turing", "ada"}
    kept = {each["node"]: each["by"] for each in stage["precision"]["kept"]}
    overflow = ["/contrast/square", "/contrast/variance", "/contrast/root"]
    beside = ["/contrast/mean", "/contrast/distance"]
    assert kept == dict.fromkeys(overflow, "search") | dict.fromkeys(beside, "rule")
    shown = console_of(folder)
    assert stages_in(shown["optc compile spec.yaml"]) == stages_in(done.stdout)
    assert kept_in(shown["optc compile spec.yaml"]) == kept_in(done.stdout) == overflow
    (told,) = (output for command, output in shown.items() if command.startswith("python -c"))
    assert told.split("\n") == [*(f"{node} fp32 {by}" for node, by in kept.items()), ""]
    assert manifest_of(package)["evidence"]["badness_of_lowest"] == "inf"
    assert (package / "precision.svg").is_file()


def test_products_in_int8_multiply_what_was_calibrated(example: Example) -> None:
    folder = example("precision")
    done = optc(folder, "compile", "spec-int8.yaml")
    assert done.returncode == 0, done.stderr
    shown = console_of(folder)["optc compile spec-int8.yaml"]
    assert stages_in(shown) == stages_in(done.stdout)
    assert kept_in(shown) == kept_in(done.stdout) != []
    nodes = onnx.load(folder / "build" / "spec-int8" / "stages" / "00-tensorrt.onnx").graph.node
    makers = {output: node for node in nodes for output in node.output}
    products = [node for node in nodes if node.op_type in ("Conv", "Gemm")]
    assert len(products) == 4
    quantised = set()
    for product in products:
        value, weight = (makers[operand] for operand in product.input[:2])
        assert (value.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert makers[value.input[0]].op_type == "QuantizeLinear"
        quantised.add(value.input[0])
    ranges = json.loads((folder / "ranges.json").read_text())
    assert len(ranges["amax"]) == len(quantised) == 4
    assert ranges["amax"]["picture"] == 4095
    assert len(ranges["data"]) == 8


@pytest.mark.torch
def test_torch_runs_an_operator_and_a_part_with_learned_weights(example: Example) -> None:
    folder = example("torch-stage")
    done = optc(folder, "compile", "spec.yaml")
    assert done.returncode == 0, done.stderr
    shown = console_of(folder)["optc compile spec.yaml"]
    assert stages_in(shown) == stages_in(done.stdout)
    stages = manifest_of(folder / "build" / "spec")["stages"]
    modules = [stage["module"] for stage in stages if stage["runtime"] == "torch"]
    assert modules == ["modules/Peaks.pt", "modules/rescore.pt2"]
    for path in ("model.onnx", "peaks.pt", "rescore.pt2"):
        shutil.move(folder / path, folder / f"{path}.away")
    images = np.random.default_rng(0).random((3, 3, 96, 96), np.float32)
    np.savez(folder / "in.npz", image=images)
    done = optc(folder, "run", "build/spec", "--inputs", "in.npz", "--outputs", "out.npz")
    assert done.returncode == 0, done.stderr
    assert "modules/rescore.pt2 on torch, cpu" in done.stderr + done.stdout
    with np.load(folder / "out.npz") as found:
        assert len(found["scores"]) == len(found["boxes"]) > 0
    for path in ("model.onnx", "peaks.pt", "rescore.pt2"):
        shutil.move(folder / f"{path}.away", folder / path)


@pytest.mark.network
def test_the_ppocr_detector_becomes_one_engine(example: Example) -> None:
    folder = example("ppocr")
    done = optc(folder, "compile", "spec.yaml")
    assert done.returncode == 0, done.stderr
    assert [s["runtime"] for s in manifest_of(folder / "build" / "spec")["stages"]] == ["tensorrt"]
    shown = console_of(folder)["optc compile spec.yaml"]
    assert stages_in(shown) == stages_in(done.stdout)


def test_without_a_package_index_the_ppocr_example_says_so(tmp_path: Path) -> None:
    model = shutil.copy(EXAMPLES / "ppocr" / "model.py", tmp_path)
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    done = subprocess.run(
        [sys.executable, str(model)],
        env=os.environ | offline,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "needs a network" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "model.onnx").exists()
