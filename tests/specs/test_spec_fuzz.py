"""Whatever a file holds, it is a right spec or a `SpecError`: nothing else, and in bounded time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spec_file import write_model

from optc.specs.check import check
from optc.specs.compile_spec import CompileSpec, Part
from optc.specs.diagnostic import Diagnostic, SpecError

FULL = """\
version: 1
model: {path: m.onnx}
inputs:
  images: {shape: [batch, 3, height, 32], range: [0, 1]}
dims: {batch: {min: 1, opt: 4, max: 16}, height: 32, ids_0: 4}
targets:
  - {name: ampere, backend: tensorrt-rtx, compute_capability: "8.6"}
  - name: turing
    compute_capability: 7.5
precision: {default: fp32, keep_fp32: [{op: Softmax}, {node: "/head/*"}]}
passes: {disable: [fold-constants]}
partition:
  points: &points [r]
  off_tensorrt: [{op: NonMaxSuppression}, {node: "/stem/*"}]
fallback: {runtime: onnxruntime}
verify:
  atol: 1.0e-4
  rtol: 1e-4
gate: {max_engines: 1, min_tensorrt_flops: 0.95}
"""
SNIPPETS = [
    *" \t\n\r:-[]{},&*!|>'\"%@`#?\\~.0123456789abcUxu_<=",
    *("é", "\u2028", "\x85", "😀", "\x00", "\ufeff", "---\n", "...\n", "<<: ", "? ", "!!str "),
    *("!!python/object:os.system", "&a ", "*a", "*points", "\\u", "\\U99999999", "\\x", "  "),
    *(".nan", "-.inf", "true", "~", "1e999", "0x", "9" * 400, "[" * 50, "{a: " * 50),
]

on_one_folder = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    write_model(tmp_path)
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def check_bytes(data: bytes, name: str = "spec.yaml") -> bool:
    """Return whether ``data`` is a right spec. What it says of a wrong one must be printable."""
    Path(name).write_bytes(data)
    try:
        check(name, known_passes=["fold-constants"])
        found: tuple[Diagnostic, ...] = ()
    except SpecError as error:
        found = error.diagnostics
    for diagnostic in found:
        diagnostic.render().encode()
        json.dumps(diagnostic.as_json())
        place = diagnostic.place
        assert place is None or (place.line >= 1 and place.column >= 1)
    return not found


def test_the_text_that_is_mutated_is_right() -> None:
    assert check_bytes(FULL.encode())


@on_one_folder
@given(st.data())
def test_a_mutated_spec(data: st.DataObject) -> None:
    text = FULL
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(text)))
        end = at + data.draw(st.integers(0, 12))
        text = text[:at] + data.draw(st.sampled_from(["", *SNIPPETS])) + text[end:]
    check_bytes(text.encode("utf-8", "surrogatepass"))


@on_one_folder
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    check_bytes(data)
    check_bytes(data, "spec.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = sorted({key for part in Part.__subclasses__() for key in part.model_fields})


@on_one_folder
@given(st.dictionaries(st.sampled_from(sorted(CompileSpec.model_fields)), json_values))
def test_any_values_under_the_keys_of_a_spec(spec: dict[str, Any]) -> None:
    check_bytes(json.dumps({"version": 1, "model": "m.onnx", **spec}).encode())


@on_one_folder
@given(
    st.sampled_from(sorted(CompileSpec.model_fields)),
    st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3),
    st.booleans(),
)
def test_any_values_one_level_down(key: str, value: dict[str, Any], listed: bool) -> None:
    spec = {"version": 1, "model": "m.onnx", key: [value] if listed else value}
    check_bytes(json.dumps(spec).encode())
