"""What a split costs, and which engines pay."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from dataclasses import fields, replace
from typing import get_args

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from graphs import parsed
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.optimizer import partition
from optc.optimizer.cost import (
    Constants,
    CostModel,
    Work,
    copies_us,
    engine_us,
    fallback_us,
    time_text,
)
from optc.optimizer.partition import Off, Plan, Question, Refused, settled_stages
from optc.passes.flops import flops, traffic
from optc.passes.graph import import_model
from optc.passes.shape import annotate, infer
from optc.passes.split import Stage
from optc.specs.compile_spec import Cost, Range, Target
from optc.specs.measured_cost import ConstantName

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
TARGET = Target(name="t")
PLAIN = Cost(
    launch_us=20,
    node_us=5,
    copy_us=10,
    copy_gb_s=1,
    tensorrt_gflops=1000,
    tensorrt_gb_s=100,
    fallback_gflops=10,
    fallback_gb_s=1,
)


def question_of(
    text: str, off: tuple[str, ...] = (), cost: Cost = PLAIN, **ranges: Range
) -> Question:
    graph = import_model(parsed(HEAD + text))
    shapes = infer(graph)
    annotate(graph, shapes)
    refused: Off = {name: Refused("parser", "no") for name in off}
    counted = flops(graph, shapes, ranges)
    return Question(graph, shapes, [ranges], refused, frozenset(), counted, cost=cost)


# --- the constants -------------------------------------------------------------------------------


def test_the_defaults_are_those_that_the_spec_names() -> None:
    said = {
        name: float(found.group(1))
        for name, field in Cost.model_fields.items()
        if (found := re.search(r"by default (\d+)", field.description or ""))
    }
    assert said == {each.name: getattr(Constants(), each.name) for each in fields(Constants)}
    assert set(said) == set(get_args(ConstantName))


def test_what_a_spec_gives_comes_before_the_defaults() -> None:
    assert Constants.of(Cost(node_us=2)) == replace(Constants(), node_us=2)


# --- what things cost ----------------------------------------------------------------------------

CONSTANTS = Constants.of(PLAIN)


def test_an_engine_costs_its_launch_and_the_more_of_arithmetic_and_traffic() -> None:
    assert engine_us(CONSTANTS, [Work(10**6, 0), Work(10**6, 10**5)]) == 20 + 2
    assert engine_us(CONSTANTS, [Work(10**6, 0), Work(0, 10**6)]) == 20 + 10


def test_the_fallback_costs_node_by_node() -> None:
    assert fallback_us(CONSTANTS, [Work(10**6, 0), Work(0, 10**5)]) == 5 + 100 + 5 + 100
    assert fallback_us(CONSTANTS, [Work(0, 0, steps=7)]) == 35


def test_a_copy_costs_its_start_and_its_bytes() -> None:
    assert copies_us(CONSTANTS, [0, 3000]) == 10 + 10 + 3


@pytest.mark.parametrize(
    ("node", "moved"),
    [
        ("Relu (x)", 2 * 400),
        ("Gemm (x, w)", 400 + 40 * 4 + 10 * 4 * 4),
        ("Add (x, x)", 3 * 400),
        ("Gather (x, one)", 2 * 40 + 8),
        ("Slice (x, zeros, one)", 2 * 40 + 16),
        ("Reshape (x, flat)", 0),
        ("Shape (x)", 0),
    ],
)
def test_a_node_moves_what_it_reads_and_writes(node: str, moved: int) -> None:
    graph = import_model(
        parsed(
            HEAD
            + f"""g (float[10,10] x) => (y)
            <float[10,4] w = {{{", ".join(["0"] * 40)}}}, int64[1] one = {{1}},
             int64[1] zeros = {{0}}, int64[1] flat = {{100}}>
            {{ [node] y = {node} }}"""
        )
    )
    assert traffic(graph, infer(graph), {})["node"].bytes == moved


def test_a_loop_moves_and_runs_its_body_in_every_round() -> None:
    graph = import_model(
        parsed(
            HEAD
            + """g (float[10] x) => (float[10] y) <int64 six = {6}, bool yes = {1}>
            { [loop] y = Loop (six, yes, x) <body =
                b (int64 i, bool c, float[10] s) => (bool d, float[10] t)
                { d = Identity (c) [one] u = Relu (s) [two] t = Relu (u) }> }"""
        )
    )
    found = traffic(graph, infer(graph), {})["loop"]
    assert (found.steps, found.bytes) == (1 + 6 * 3, 8 + 1 + 40 + 40 + 6 * 2 * 80)


# a -> d (off) -> b: one tensor in, one copied to the host and read twice there, one back, one out.
SANDWICH = """
g (float[250] x) => (float[250] y, float[250] z)
{
    [a] s = Relu (x)
    [d] t = Sigmoid (s)
    [e] z = Tanh (s)
    [b] y = Add (t, s)
}"""


def test_a_tensor_is_copied_once_for_all_its_readers_on_the_other_side() -> None:
    question = question_of(SANDWICH, ("d", "e"))
    stages = question.split(question.off)
    assert [stage.runtime for stage in stages] == ["tensorrt", "onnxruntime", "tensorrt"]
    model = CostModel(question)
    kilobyte = 10 + 1
    assert model.stage_us(stages[0]) == 20 + 0.02
    assert model.stage_us(stages[1]) == 2 * (5 + 2)
    # x to the GPU, s to the host for d and e, t to the GPU, y to the host; s stays for b.
    expected = 20.02 + 14 + 20.03 + 4 * kilobyte
    assert model.split_us(stages) == pytest.approx(expected, abs=1e-9)


def test_what_is_all_on_one_side_is_not_copied() -> None:
    question = question_of(SANDWICH, ("a", "d", "e", "b"))
    assert CostModel(question).split_us(question.split(question.off)) == 3 * 7 + 8
    question = question_of(SANDWICH)
    whole = CostModel(question).split_us(question.split({}))
    assert whole == pytest.approx(20.09 + 3 * 11, abs=1e-9)  # x, y and z


def test_an_axis_that_nothing_bounds_counts_one() -> None:
    text = """
    g (int64 count) => (float[n] y) <int64 zero = {0}, int64 one = {1}>
    { [range] r = Range (zero, count, one)  [cast] y = Cast <to = 1> (r) }"""
    question = question_of(text, ("range",))
    stages = question.split(question.off)
    assert question.bytes_of("r") is None
    assert CostModel(question).split_us(stages) == pytest.approx(
        (5 + 0.032) + (20 + 0.00012) + (10 + 0.008) + (10 + 0.004), abs=1e-6
    )


@pytest.mark.parametrize(("us", "text"), [(0.04, "0.0 us"), (9.96, "10.0 us"), (9999, "9999 us")])
def test_times_are_told_for_people(us: float, text: str) -> None:
    assert time_text(us) == text


# --- which engines pay ---------------------------------------------------------------------------


def dag_of(
    edges: dict[str, list[str]], work: dict[str, int], off: list[str], cost: Cost
) -> Question:
    """Return the question of a graph whose node n makes n from the named tensors; x is the input."""
    tensors = {"x": gs.Variable("x", np.float32, [256])}
    nodes = []
    for name, sources in edges.items():
        tensors[name] = gs.Variable(name, np.float32, [256])
        made_from = [tensors[source] for source in sources]
        nodes.append(gs.Node("Sum", name, inputs=made_from, outputs=[tensors[name]]))
    read = {source for sources in edges.values() for source in sources}
    ends = [tensors[name] for name in edges if name not in read]
    graph = gs.Graph(nodes, [tensors["x"]], ends, opset=17)
    refused: Off = {name: Refused("parser", "no") for name in off}
    return Question(graph, infer(graph), [{}], refused, frozenset(), work, cost=cost)


@st.composite
def questions(
    draw: st.DrawFn, most: int = 12
) -> tuple[dict[str, list[str]], dict[str, int], list[str], Cost]:
    """Draw a graph, the FLOPs of its nodes, what is off TensorRT, and what things cost."""
    edges: dict[str, list[str]] = {}
    for index in range(draw(st.integers(2, most))):
        names = ["x", *list(edges)[-4:]]
        sources = st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)
        edges[f"n{index}"] = draw(sources)
    work = {name: draw(st.integers(0, 10**6)) for name in edges}
    off = draw(st.lists(st.sampled_from(list(edges)), max_size=6, unique=True))
    cost = PLAIN.model_copy(
        update={
            "launch_us": draw(st.floats(0.1, 60)),
            "copy_us": draw(st.floats(0.1, 60)),
            "keep_share": draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
        }
    )
    return edges, work, off, cost


@given(questions())
@settings(max_examples=60, deadline=None)
def test_the_engines_that_lose_are_those_of_the_fastest_choice(
    drawn: tuple[dict[str, list[str]], dict[str, int], list[str], Cost],
) -> None:
    question = dag_of(*drawn)
    stages = question.split(question.off)
    engines = [n for n, stage in enumerate(stages) if stage.runtime == "tensorrt"]
    model = CostModel(question)

    def time_without(dropped: tuple[int, ...]) -> float:
        moved = [
            replace(stage, runtime="onnxruntime") if n in dropped else stage
            for n, stage in enumerate(stages)
        ]
        return model.split_us(moved)

    losing = [stages.index(each.stage) for each in model.losing(stages, engines[:1])]
    choices = itertools.chain.from_iterable(
        itertools.combinations(engines[1:], size) for size in range(max(1, len(engines)))
    )
    best = min(map(time_without, choices))
    assert time_without(tuple(losing)) == pytest.approx(best, abs=0.01)  # it counts nanoseconds
    assert engines[0] not in losing if engines else not losing


@given(questions())
@settings(max_examples=60, deadline=None)
def test_dropping_engines_never_costs_time_and_leaves_no_engine_that_loses(
    drawn: tuple[dict[str, list[str]], dict[str, int], list[str], Cost],
) -> None:
    question = dag_of(*drawn)
    model = CostModel(question)
    before = question.split(question.off)
    plan = Plan(TARGET, dict(question.off))
    after = settled_stages(question, plan)
    assert model.split_us(after) <= model.split_us(before)
    engines = [stage for stage in before if stage.runtime == "tensorrt"]
    left = [stage for stage in after if stage.runtime == "tensorrt"]
    assert bool(left) == bool(engines)
    assert {name for stage in left for name in stage.work}.isdisjoint(plan.off)
    kept = {
        stage
        for stage in engines
        if question.share(stage) >= question.cost.keep_share and question.cost.keep_share
    }
    held = {name for stage in left for name in stage.work}
    assert all(held.issuperset(stage.work) for stage in kept)


@given(questions(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_which_engines_stay_does_not_depend_on_the_listing_order(
    drawn: tuple[dict[str, list[str]], dict[str, int], list[str], Cost], random: st.DataObject
) -> None:
    edges, *rest = drawn
    done, shuffled = {"x"}, {}
    while len(shuffled) < len(edges):
        ready = [n for n in edges if n not in shuffled and done.issuperset(edges[n])]
        name = random.choice(ready)  # type: ignore[attr-defined]
        shuffled[name] = edges[name]
        done.add(name)
    found = []
    for order in (edges, shuffled):
        question = dag_of(order, *rest)
        plan = Plan(TARGET, dict(question.off))
        stages = settled_stages(question, plan)
        texts = {name: refused.text for name, refused in plan.off.items()}
        found.append(([(s.runtime, frozenset(s.nodes)) for s in stages], texts))
    assert found[0] == found[1]


@given(questions(), st.lists(st.integers(0, 11), max_size=3))
@settings(max_examples=60, deadline=None)
def test_engines_beside_points_stay(
    drawn: tuple[dict[str, list[str]], dict[str, int], list[str], Cost], points: list[int]
) -> None:
    question = dag_of(*drawn)
    question.points = frozenset(f"n{number}" for number in points if number < len(drawn[0]))
    asked = [
        stage
        for stage in question.split(question.off)
        if stage.runtime == "tensorrt"
        and not question.points.isdisjoint((*stage.inputs, *stage.outputs))
    ]
    plan = Plan(TARGET, dict(question.off))
    stages = settled_stages(question, plan)
    assert all(plan.off.keys().isdisjoint(stage.work) for stage in asked)
    on_gpu = {name for stage in stages if stage.runtime == "tensorrt" for name in stage.work}
    assert all(on_gpu.issuperset(stage.work) for stage in asked)


@pytest.mark.parametrize("most", [0, 1, 2])
def test_past_the_bound_what_is_left_stays(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(partition, "MAX_TRIALS", most)
    question = chain()
    stages = settled_stages(question, Plan(TARGET, dict(question.off)))
    assert len(stages) == (5 if most == 0 else 3)


def chain(cost: Cost = PLAIN, **work: int) -> Question:
    """Return a chain of an engine, a refused node, a small engine, another, and an engine."""
    edges = {"a": ["x"], "d": ["a"], "s": ["d"], "e": ["s"], "b": ["e"]}
    flops_of = {"a": 10**9, "d": 1, "s": 256, "e": 1, "b": 10**9, **work}
    return dag_of(edges, flops_of, ["d", "e"], cost)


def nodes_of(stages: list[Stage]) -> list[tuple[str, ...]]:
    return [stage.nodes for stage in stages]


def test_an_engine_that_does_not_pay_joins_the_fallback_around_it() -> None:
    question = chain()
    plan = Plan(TARGET, dict(question.off))
    assert nodes_of(settled_stages(question, plan)) == [("a",), ("d", "s", "e"), ("b",)]
    # 20 and two copies of a kilobyte, against 5 and 2 KiB of traffic.
    assert plan.off["s"] == Refused(
        "rule",
        "an engine of its own does not pay: about 42 us with it, 7.0 us without (cost model)",
    )


def test_an_engine_with_enough_of_the_flops_stays_whatever_it_costs() -> None:
    question = chain(s=3 * 10**7, cost=PLAIN.model_copy(update={"fallback_gflops": 1e9}))
    assert len(settled_stages(question, Plan(TARGET, dict(question.off)))) == 5
    question.cost = question.cost.model_copy(update={"keep_share": 0.02})
    assert len(settled_stages(question, Plan(TARGET, dict(question.off)))) == 3


def test_an_engine_beside_a_point_stays_as_the_user_asked_for_it() -> None:
    question = chain()
    question.points = frozenset({"s"})
    assert len(settled_stages(question, Plan(TARGET, dict(question.off)))) == 5


def test_an_engine_with_a_name_stays_as_the_user_asked_for_it() -> None:
    question = chain()
    question.scopes = {"middle": ["s"]}
    stages = settled_stages(question, Plan(TARGET, dict(question.off)))
    assert ("middle", ("s",)) in [(stage.name, stage.nodes) for stage in stages]


def test_an_engine_stays_without_which_one_that_is_kept_would_lose_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    question = chain()
    split = partition.Question.split
    without: list[bool] = []

    def watched(self: Question, off: Collection[str]) -> list[Stage]:
        without.append("s" in off)
        return split(self, off)

    def unbounded(question: Question, stage: Stage) -> Off:
        return {"b": Refused("rule", "no bound")} if without[-1] and "b" in stage.nodes else {}

    monkeypatch.setattr(Question, "split", watched)
    monkeypatch.setattr(partition, "_unbounded", unbounded)
    plan = Plan(TARGET, dict(question.off))
    assert len(settled_stages(question, plan)) == 5
    assert plan.off.keys() == {"d", "e"}
    assert any(without)  # it was tried


def test_where_no_engine_would_be_left_all_stay() -> None:
    question = chain(a=1, d=10**9, s=1, b=1)
    plan = Plan(TARGET, dict(question.off))
    assert len(settled_stages(question, plan)) == 5
    assert plan.off.keys() == {"d", "e"}


def test_engines_that_lose_only_together_go_together() -> None:
    # Both read `a`, which is on the GPU: for one of them it is copied, for the other as well.
    edges = {"a": ["x"], "b": ["a"], "d": ["b"], "s": ["d", "a"], "e": ["s"], "t": ["e", "a"]}
    edges["f"] = ["t"]
    free = {"copy_us": 39, "node_us": 70, "fallback_gb_s": 1e9}
    work = {**dict.fromkeys(edges, 0), "a": 10**9, "b": 10**9}
    question = dag_of(edges, work, ["d", "e", "f"], PLAIN.model_copy(update=free))
    model, off = CostModel(question), question.off
    before = model.split_us(question.split(off))
    assert model.split_us(question.split({*off, "s"})) > before
    assert model.split_us(question.split({*off, "t"})) > before
    stages = settled_stages(question, Plan(TARGET, dict(off)))
    assert nodes_of(stages) == [("a", "b"), ("d", "s", "e", "t", "f")]
    assert model.split_us(stages) < before
