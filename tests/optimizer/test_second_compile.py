"""What a second compile asks of TensorRT: nothing; and what makes it ask again."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import parser

from optc.optimizer.compile import compile_package, plan_package
from optc.passes import registry
from optc.specs.check import check
from optc.specs.manifest import Manifest

# The parser refuses NonZero, the builder NonMaxSuppression, and for Turing the MatMuls of floats.
MODEL = """<ir_version: 9, opset_import: ["" : 17]>
g (float[1,8,4] boxes, float[1,2,8] scores) => (float[1,8,8] y, int64[n,3] kept, int64[3,m] found)
<int64 most = {3}, float iou = {0.5}, float score = {0.1}> {
    [act]    a = LeakyRelu <alpha = 0.5> (boxes)
    [turned] t = Transpose <perm = [0, 2, 1]> (a)
    [square_1] s = MatMul (a, t)
    [again]  y = MatMul (s, s)
    [nms_1]    kept = NonMaxSuppression (a, scores, most, iou, score)
    [find_1]   found = NonZero (scores)
}"""
TARGETS = "{name: turing, compute_capability: 7.5}, {name: ada, compute_capability: 8.9}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTC_CACHE_DIR", str(tmp_path / "cache"))


def spec_of(
    folder: Path,
    text: str = MODEL,
    targets: str = TARGETS,
    more: str = "passes: {legalise: false}",
) -> Path:
    folder.mkdir(exist_ok=True)
    onnx.save(parser.parse_model(text), folder / "m.onnx")
    spec = folder / "spec.yaml"
    spec.write_text(f"version: 1\nmodel: m.onnx\ntargets: [{targets}]\n{more}\n")
    return spec


def compiled(spec: Path) -> Manifest:
    outcome = compile_package(check(spec, known_passes=registry.names), spec.parent / "package")
    assert not outcome.unmet
    return outcome.manifest


def planned(spec: Path) -> Manifest:
    return plan_package(check(spec, known_passes=registry.names)).manifest


def questions(manifest: Manifest) -> int:
    """Return how often TensorRT was asked, but for engines."""
    kinds = ("parses", "probes", "trials", "bisections")
    return sum(manifest.oracle[kind] for kind in kinds)


def engines(manifest: Manifest) -> int:
    return sum(len(stage.engines) for stage in manifest.stages)


def decided(manifest: Manifest) -> list[object]:
    return [(stage.runtime, stage.nodes, stage.why) for stage in manifest.stages]


def test_a_second_compile_asks_nothing_and_builds_what_it_keeps(tmp_path: Path) -> None:
    first = compiled(spec_of(tmp_path / "model"))
    assert questions(first) > 0
    assert first.oracle["builds"] > engines(first) > 0  # Turing refuses what Ada takes
    second = compiled(spec_of(tmp_path / "model"))
    assert questions(second) == 0
    assert second.oracle["builds"] == engines(second) == engines(first)
    assert decided(second) == decided(first)


def test_a_plan_after_a_compile_builds_nothing_and_is_confirmed(tmp_path: Path) -> None:
    first = compiled(spec_of(tmp_path / "model"))
    plan = planned(spec_of(tmp_path / "model"))
    assert questions(plan) == plan.oracle["builds"] == 0
    assert not any(stage.unconfirmed for stage in plan.stages)
    assert decided(plan) == decided(first)


def test_a_compile_after_a_plan_builds_what_it_keeps(tmp_path: Path) -> None:
    planned(spec_of(tmp_path / "model"))
    manifest = compiled(spec_of(tmp_path / "model"))
    assert questions(manifest) == 0
    assert manifest.oracle["builds"] == engines(manifest) > 0


def test_what_became_of_rewrites_and_of_less_precision_is_remembered_too(tmp_path: Path) -> None:
    first = planned(spec_of(tmp_path / "model", more="precision: fp16"))
    assert first.oracle["trials"] > 1
    assert any(stage.legalised for stage in first.stages)
    second = planned(spec_of(tmp_path / "model", more="precision: fp16"))
    assert questions(second) == second.oracle["builds"] == 0
    assert decided(second) == decided(first)


def test_other_names_are_asked_about_no_more(tmp_path: Path) -> None:
    first = compiled(spec_of(tmp_path / "model"))
    text = MODEL
    for old, new in {"boxes": "b", "nms_1": "post/nms", "find_1": "z1", "square_1": "a_1"}.items():
        text = text.replace(old, f'"{new}"' if "/" in new else new)
    renamed = planned(spec_of(tmp_path / "renamed", text))
    assert questions(renamed) == renamed.oracle["builds"] == 0
    assert [stage.runtime for stage in renamed.stages] == [s.runtime for s in first.stages]
    names = {reason.node for stage in renamed.stages for reason in stage.why}
    assert names == {"post/nms", "z1", "a_1", "again"}
    said = [reason.text for stage in first.stages for reason in stage.why]
    assert any("'square_1'" in text for text in said)
    assert any("nms_1_0 has no runners" in text for text in said)
    said = [reason.text for stage in renamed.stages for reason in stage.why]
    assert any("'a_1'" in text for text in said)
    assert any("post/nms_0 has no runners" in text for text in said)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("alpha = 0.5", "alpha = 0.25"),
        ("[1,8,4]", "[1,8,6]"),
        ("float[1,", "float16[1,"),
        ("17]>", "18]>"),
    ],
)
def test_a_model_that_differs_is_asked_about(tmp_path: Path, old: str, new: str) -> None:
    planned(spec_of(tmp_path / "model"))
    changed = MODEL.replace(old, new)
    assert changed != MODEL
    assert questions(planned(spec_of(tmp_path / "changed", changed))) > 0


def test_another_target_is_asked_of_the_builder_alone(tmp_path: Path) -> None:
    planned(spec_of(tmp_path / "model"))
    other = planned(spec_of(tmp_path / "model", targets="{name: a, compute_capability: 8.6}"))
    assert other.oracle["parses"] == other.oracle["probes"] == 0
    assert other.oracle["trials"] == 1
    assert other.oracle["builds"] == 1


def test_what_was_asked_is_in_the_report(tmp_path: Path) -> None:
    manifest = compiled(spec_of(tmp_path / "model"))
    report = (tmp_path / "model" / "package" / manifest.report).read_text(encoding="utf-8")
    assert f'"parses": {manifest.oracle["parses"]}' in report
