"""Deciding what runs where, with a builder that says what the test wants it to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
from graphs import parsed

from optc.optimizer import partition
from optc.optimizer.job import BuildFailure, BuildResult
from optc.optimizer.partition import (
    Legalise,
    Legalised,
    Off,
    Plan,
    Question,
    Refused,
    begin,
    settle,
    settled_stages,
)
from optc.passes.flops import flops
from optc.passes.graph import import_model
from optc.passes.legalising import Recipe
from optc.passes.precision import NodePrecision
from optc.passes.shape import annotate, infer
from optc.passes.split import Stage
from optc.specs.compile_spec import Range, Target

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
TARGET = Target(name="t")


def question_of(text: str, off: Sequence[str] = (), **ranges: Range) -> Question:
    graph = import_model(parsed(HEAD + text))
    shapes = infer(graph)
    annotate(graph, shapes)
    refused: Off = {name: Refused("parser", "no") for name in off}
    counted = flops(graph, shapes, ranges)
    return Question(graph, shapes, [ranges], refused, frozenset(), counted)


def decided(
    question: Question,
    builds: Callable[[Stage], bool],
    blamed: Callable[[Stage], Sequence[str]],
    legalise: Legalise | None = None,
    lowered: Mapping[str, NodePrecision] | None = None,
) -> Plan:
    def build(stages: Sequence[tuple[Stage, Target]]) -> list[BuildResult]:
        failure = BuildFailure("builder", "it does not build")
        return [BuildResult(0.0, failure=None if builds(s) else failure) for s, _ in stages]

    def blame(stage: Stage, failure: BuildFailure, target: Target) -> Off:
        return {name: Refused("builder", failure.text) for name in blamed(stage)}

    plans = begin([TARGET], {"t": {}}, question, legalise or nothing)
    plans[0].lowered = dict(lowered or {})
    settle(question, plans, build, blame, legalise or nothing)
    return plans[0]


def nothing(off: Off, target: Target) -> Mapping[str, Legalised]:
    """Know no rewrite."""
    return {}


CHAIN = """
g (float[n,4] x) => (float[n,4] y) <float[4,4] w = {1,2,3,4,5,6,7,8,1,2,3,4,5,6,7,8}>
{
    [one] a = MatMul (x, w)
    [two] b = MatMul (a, w)
    [three] y = MatMul (b, w)
}"""

# Both engines need the size, which the first one is the home of.
SIZED = """
g (float[n,4] x) => (float[m,k] y) <float[4,4] w = {1,2,3,4,5,6,7,8,1,2,3,4,5,6,7,8}>
{
    [one]   a = MatMul (x, w)
    [shape] s = Shape (x)
    [twice] s2 = Add (s, s)
    [wide]  e = Tile (a, s)
    [det]   d = Relu (e)
    [again] y = Tile (d, s2)
}"""

# How long the counted part is, only its values say; the free nodes between repeat in both stages.
COUNTED = """
g (int64 count, float[1,4] x, float[4,4] w) => (float[p,q] y, float[r,s] z)
<int64 zero = {0}, int64 one = {1}, int64[1] four = {4}>
{
    [range] c = Range (zero, count, one)
    [shape] s = Shape (c)
    [size]  t = Concat <axis = 0> (s, four)
    [off]   e = Expand (x, t)
    [on]    f = Expand (x, t)
    [product] y = MatMul (f, w)
    [other] z = MatMul (e, w)
}"""


def test_only_what_is_blamed_moves_and_the_rest_is_built_again() -> None:
    question = question_of(CHAIN, n=Range(min=1, opt=2, max=4))
    plan = decided(question, lambda s: "two" not in s.nodes, lambda s: ["two"])
    assert [(s.runtime, s.nodes) for s in plan.stages] == [
        ("tensorrt", ("one",)),
        ("onnxruntime", ("two",)),
        ("tensorrt", ("three",)),
    ]
    assert plan.confirmed


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_past_the_bound_every_engine_that_is_left_was_built(
    monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    monkeypatch.setattr(partition, "MAX_ROUNDS", rounds)
    question = question_of(CHAIN, n=Range(min=1, opt=2, max=4))
    plan = decided(question, lambda s: s.nodes == ("three",), lambda s: s.nodes[:1])
    engines = [stage for stage in plan.stages if stage.runtime == "tensorrt"]
    assert set(plan.engines) == set(engines)
    assert all(result.failure is None for result in plan.engines.values())
    assert "one" in plan.off


def test_a_stage_that_moves_whole_leaves_the_sizes_it_was_home_of() -> None:
    question = question_of(SIZED, ["det"], n=Range(min=1, opt=2, max=4))
    question.flops = dict.fromkeys(question.flops, 1)  # so that no engine is too small
    before = settled_stages(question, Plan(TARGET, dict(question.off)))
    assert [(s.runtime, s.nodes) for s in before] == [
        ("tensorrt", ("one", "shape", "wide")),
        ("onnxruntime", ("det",)),
        ("tensorrt", ("twice", "again")),
    ]
    assert before[0].work == ("one", "wide")
    plan = decided(question, lambda s: "one" not in s.nodes, lambda s: s.work)
    assert [(s.runtime, s.nodes) for s in plan.stages] == [
        ("onnxruntime", ("one", "shape", "wide", "det")),
        ("tensorrt", ("twice", "again")),
    ]


def test_an_axis_without_a_bound_that_only_repeated_sizes_read_moves_what_needs_them() -> None:
    question = question_of(COUNTED, ["range", "off"])
    plan = Plan(TARGET, dict(question.off))
    for stage in settled_stages(question, plan):
        if stage.runtime == "tensorrt":
            assert partition.profile_shapes(question, stage.inputs) is not None
    assert "on" in plan.off


def test_what_can_be_rewritten_stays_until_it_is_refused_as_rewritten() -> None:
    question = question_of(CHAIN, ["two"], n=Range(min=1, opt=2, max=4))
    recipe = Recipe("two", ("spell-out",))

    def legalise(off: Off, target: Target) -> Mapping[str, Legalised]:
        return {name: Legalised(recipe, why) for name, why in off.items() if name == "two"}

    plan = decided(question, lambda s: True, lambda s: [], legalise)
    assert [(s.runtime, s.nodes, s.recipes) for s in plan.stages] == [
        ("tensorrt", ("one", "two", "three"), (recipe,))
    ]
    plan = decided(question, lambda s: not s.recipes, lambda s: ["two"], legalise)
    assert [s.runtime for s in plan.stages] == ["tensorrt", "onnxruntime", "tensorrt"]
    assert plan.off["two"].text == "it does not build (as rewritten by spell-out)"


def test_what_is_refused_as_lowered_is_raised_before_it_goes_off() -> None:
    question = question_of(CHAIN, n=Range(min=1, opt=2, max=4))
    low: dict[str, NodePrecision] = {"one": "fp16", "two": "fp16", "three": "fp16"}
    plan = decided(question, lambda s: "two" not in dict(s.lowered), lambda s: ["two"], lowered=low)
    assert [(s.runtime, dict(s.lowered)) for s in plan.stages] == [
        ("tensorrt", {"one": "fp16", "three": "fp16"})
    ]
    assert plan.raised == {"two": Refused("builder", "it does not build")}
    plan = decided(question, lambda s: "two" not in s.nodes, lambda s: ["two"], lowered=low)
    assert [s.runtime for s in plan.stages] == ["tensorrt", "onnxruntime", "tensorrt"]
    assert plan.off.keys() == {"two"}
