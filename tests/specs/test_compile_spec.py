from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError
from spec_file import codes

from optc.specs.compile_spec import (
    CompileSpec,
    Input,
    ModelFile,
    Part,
    Precision,
    Range,
    Selector,
    Target,
    json_schema,
)

FULL: dict[str, Any] = {
    "version": 1,
    "model": {"path": "m.onnx", "sha256": "AB" * 32},
    "inputs": {"images": {"shape": ["batch", 3, "?", -1], "range": [0, 1]}, "n": {"shape": []}},
    "dims": {"batch": {"min": 1, "opt": 4, "max": 16}, "height": 640},
    "targets": [
        {"name": "ampere", "backend": "tensorrt-rtx", "compute_capability": "8.6"},
        {"name": "turing", "compute_capability": 7.5},
        {"name": "here", "backend": "tensorrt"},
    ],
    "precision": {"default": "fp16", "keep_fp32": [{"op": "Softmax"}, {"node": "/head/*"}]},
    "passes": {"disable": ["fuse-gelu"]},
    "partition": {"points": ["/backbone/out"], "off_tensorrt": [{"op": "NonZero"}]},
    "fallback": {"runtime": "torch"},
    "verify": {"data": ["a/*.npz", "b.npz"], "atol": 1e-4, "rtol": 0},
    "gate": {"max_engines": 1, "min_tensorrt_flops": 0.95},
}
MINIMAL: dict[str, Any] = {"version": 1, "model": "m.onnx"}
AGAINST_THE_MODEL = {"axis-without-range", "unknown-input", "unknown-symbol", "model-not-found"}


def test_short_forms_become_the_long_ones() -> None:
    spec = CompileSpec.model_validate(
        {**MINIMAL, "dims": {"b": 4}, "precision": "tf32", "verify": {"data": "x/*.npz"}}
    )
    assert spec.model == ModelFile(path="m.onnx")
    assert spec.dims == {"b": Range(min=4, opt=4, max=4)}
    assert spec.precision == Precision(default="tf32")
    assert spec.verify is not None
    assert spec.verify.data == ("x/*.npz",)
    assert (spec.verify.atol, spec.verify.rtol) == (None, None)


def test_defaults() -> None:
    spec = CompileSpec.model_validate(MINIMAL)
    assert spec.targets == (Target(name="portable"),)
    assert spec.targets[0].backend == "tensorrt-rtx"
    assert spec.targets[0].compute_capability is None
    assert spec.precision.default == "fp32"
    assert spec.fallback.runtime == "onnxruntime"
    assert (spec.verify, spec.gate, spec.profiles) == (None, None, ())


def test_a_spec_is_frozen() -> None:
    spec = CompileSpec.model_validate(FULL)
    with pytest.raises(ValidationError):
        spec.version = 2  # type: ignore[misc, assignment]
    assert spec.model.sha256 == "ab" * 32


@pytest.mark.parametrize(
    ("given", "read"),
    [(8.6, "8.6"), ("8.6", "8.6"), (8.0, "8.0"), (8, "8.0"), ("12.0", "12.0"), (12.1, "12.1")],
)
def test_a_compute_capability_is_the_same_as_number_and_text(given: object, read: str) -> None:
    target = Target.model_validate({"name": "a", "compute_capability": given})
    assert target.compute_capability == read


def test_tensorrt_builds_for_whichever_gpu_is_at_hand() -> None:
    target = {"name": "a", "backend": "tensorrt", "compute_capability": "9.0"}
    assert Target.model_validate(target).compute_capability == "9.0"


def test_a_range_prints_as_a_spec_writes_it() -> None:
    assert str(Range.fixed(640)) == "640"
    assert Range.fixed(640).is_fixed
    assert str(Range(min=0, opt=1, max=2)) == "{min: 0, opt: 1, max: 2}"


@pytest.mark.parametrize(
    ("selector", "op", "name", "matches"),
    [
        ({"op": "Conv"}, "Conv", "x", True),
        ({"op": "Conv"}, "conv", "x", False),
        ({"node": "/head/*"}, "Conv", "/head/0/Conv", True),
        ({"node": "/head/*"}, "Conv", "/Head/0", False),
        ({"node": "/head"}, "Conv", "/head/0", False),
        ({"node": "a[0]/b"}, "Conv", "a[0]/b", True),
        ({"node": "a[01]"}, "Conv", "a1", True),
        ({"node": "a?"}, "Conv", "ab", True),
    ],
)
def test_what_a_selector_matches(
    selector: dict[str, str], op: str, name: str, matches: bool
) -> None:
    assert Selector.model_validate(selector).matches(op, name) is matches


def test_every_field_is_described() -> None:
    for part in Part.__subclasses__():
        assert (part.__doc__ or "").strip(), part
        for name, field in part.model_fields.items():
            assert field.description, f"{part.__name__}.{name}"


def test_the_json_schema_is_one() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"]
    assert (
        schema["properties"]["model"]["description"]
        == "The ONNX file to compile: its path, or a mapping."
    )
    assert "null" not in json.dumps(schema)


def variants(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**MINIMAL, **change} for change in changes]


@pytest.mark.parametrize(
    "spec",
    [
        FULL,
        MINIMAL,
        *variants(
            {"model": {"path": "x"}},
            {"dims": {}},
            {"dims": {"a": {"min": 0, "opt": 0, "max": 1}}},
            {"profiles": [{"a": 1, "b": {"min": 1, "opt": 2, "max": 3}}, {"a": 2, "b": 1}]},
            {"precision": "int8"},
            {"precision": {}},
            {"inputs": {"x": {}}},
            {"inputs": {"x": {"range": [-1.5, 2]}}},
            {"targets": [{"name": "a", "compute_capability": 12}]},
            {"verify": {}},
            {"gate": {}},
            {"verify": {"data": "x"}},
        ),
    ],
)
def test_the_json_schema_accepts_what_the_models_accept(spec: dict[str, Any]) -> None:
    CompileSpec.model_validate(spec)
    jsonschema.validate(spec, json_schema(), jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"version": 1},
        *variants(
            {"version": 2},
            {"version": "1"},
            {"version": True},
            {"modle": "x"},
            {"model": ""},
            {"model": None},
            {"model": {"path": "x", "sha256": "abc"}},
            {"dims": {"a": True}},
            {"dims": {"a": 0}},
            {"dims": {"a": -1}},
            {"dims": {"a": 2**31}},
            {"dims": {"a": 1.5}},
            {"dims": {"a": "1"}},
            {"dims": {"a": {"min": 1, "max": 2}}},
            {"dims": {"": 1}},
            {"dims": [1]},
            {"profiles": []},
            {"profiles": {"a": 1}},
            {"targets": []},
            {"targets": [{"backend": "tensorrt"}]},
            {"targets": [{"name": "a/b"}]},
            {"targets": [{"name": ".a"}]},
            {"targets": [{"name": "a", "backend": "trt"}]},
            {"targets": [{"name": "a", "compute_capability": "sm_86"}]},
            {"targets": [{"name": "a", "compute_capability": None}]},
            {"precision": "fp64"},
            {"precision": 16},
            {"precision": {"keep_fp32": [{}]}},
            {"precision": {"keep_fp32": [{"op": "a", "node": "b"}]}},
            {"passes": {"disable": "a"}},
            {"passes": {"disable": [1]}},
            {"partition": {"points": [None]}},
            {"fallback": {"runtime": "tflite"}},
            {"verify": {"atol": -1}},
            {"verify": {"atol": "1e-4"}},
            {"verify": {"data": []}},
            {"verify": {"data": ""}},
            {"verify": None},
            {"gate": {"max_engines": 0}},
            {"gate": {"max_engines": 1.0e10}},
            {"gate": {"min_tensorrt_flops": 1.1}},
            {"gate": {"min_tensorrt_flops": True}},
            {"inputs": {"x": {"shape": ["", 1]}}},
            {"inputs": {"x": {"shape": [1.5]}}},
            {"inputs": {"x": {"shape": [-2]}}},
            {"inputs": {"x": {"shape": "batch"}}},
            {"inputs": {"x": {"range": [0]}}},
            {"inputs": {"x": {"range": [0, 1, 2]}}},
            {"inputs": {"x": {"range": [0, "1"]}}},
        ),
    ],
)
def test_the_json_schema_refuses_what_the_reader_refuses(
    spec: dict[str, Any], beside_model: Path
) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spec, json_schema(), jsonschema.Draft202012Validator)
    # The models take None for what is not given; it is the reader that sees nothing stand there.
    assert set(codes(json.dumps(spec), "spec.json")) - AGAINST_THE_MODEL


def test_reading_a_spec_imports_nothing_heavy() -> None:
    code = (
        "import sys, optc.specs.check\n"
        "heavy = {'onnx', 'numpy', 'onnxruntime', 'networkx', 'rich', 'tensorrt_rtx'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_input_keeps_the_order_of_its_axes() -> None:
    assert Input.model_validate({"shape": ["a", 2, "b"]}).shape == ("a", 2, "b")
