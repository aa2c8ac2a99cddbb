"""What is prepared for the split: nothing that no output needs, whatever the spec names."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from optc.optimizer.partition import Plan, settled_stages
from optc.optimizer.prepare import Prepared, prepare
from optc.optimizer.progress import Silent
from optc.passes import registry
from optc.specs.check import check
from optc.specs.compile_spec import Target

# The branch to `rows` leads to no output; its first node makes sizes alone.
ASIDE = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n,4] x, int64 k) => (float[n,4] y)
<int64 zero = {0}, int64 one = {1}, int64[1] all = {-1}>
{
    [size]  s = Shape (x)
    [flat]  rows = Reshape (x, all)
    [first] n = Gather (s, zero)
    [count] r = Range (zero, k, one)
    [cast]  f = Cast <to = 1> (r)
    [relu]  y = Relu (x)
}"""


def prepared(folder: Path, partition: str) -> Prepared:
    onnx.save(onnx.parser.parse_model(ASIDE), folder / "m.onnx")
    spec = folder / "spec.yaml"
    spec.write_text(
        "version: 1\nmodel: m.onnx\ndims: {n: {min: 1, opt: 2, max: 4}}\n"
        f"targets: [{{name: ampere, compute_capability: 8.6}}]\npartition: {{{partition}}}\n"
    )
    checked = check(spec, known_passes=registry.names, options_of=registry.options_of)
    return prepare(checked, Silent())


@pytest.mark.parametrize(
    "partition",
    [
        "points: [rows]",
        "points: [s]",  # sizes: any stage may repeat them, so that none would hold them
        "points: [f]",
        "off_tensorrt: [{node: first}]",
        "off_tensorrt: [{node: cast}]",
        "scopes: {aside: [count, cast]}",
    ],
)
def test_what_leads_to_no_output_is_in_no_stage(tmp_path: Path, partition: str) -> None:
    ready = prepared(tmp_path, partition)
    plan = Plan(Target(name="ampere", compute_capability="8.6"), dict(ready.question.off))
    [stage] = settled_stages(ready.question, plan)
    assert stage.nodes == ("relu",)
    assert stage.outputs == ("y",)


def test_a_point_that_leads_to_no_output_is_told(tmp_path: Path) -> None:
    [note] = prepared(tmp_path, "points: [rows]").notes
    assert note.code == "point-is-no-cut"
    assert "leads to no output" in note.problem


def test_a_scope_that_leads_to_no_output_is_told(tmp_path: Path) -> None:
    [note] = prepared(tmp_path, "scopes: {aside: [count, cast], main: relu}").notes
    assert (note.code, note.severity) == ("scope-is-no-stage", "warning")
    assert "the scope `aside` is no stage" in note.problem
    assert note.place is not None
