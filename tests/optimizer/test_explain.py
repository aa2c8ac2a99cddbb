"""What is said to be saved is what is saved: the graph is split again by hand, and compared."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Collection, Mapping

import pytest
from graphs import parsed

from optc.optimizer import explain as explaining
from optc.optimizer.explain import Explanation, Tally, explain, without_names
from optc.optimizer.explain_table import text_of
from optc.optimizer.partition import Off, Plan, Question, Refused, settled_stages
from optc.passes.flops import flops
from optc.passes.graph import import_model
from optc.passes.shape import annotate, infer
from optc.passes.split import crossings
from optc.specs.compile_spec import Cost, Passes, Range, Target

HEAD = '<ir_version: 9, opset_import: ["" : 17, "acme" : 1]>'
TARGET = Target(name="t")
NO = Refused("parser", "no")


def ones(name: str, rows: int, columns: int) -> str:
    return f"float[{rows},{columns}] {name} = {{{', '.join(['1'] * rows * columns)}}}"


W = ones("w", 4, 4)

# Matrix products are on TensorRT; the two others are refused, one after the other.
SERIES = f"""
g (float[n,4] x) => (float[n,4] y) <{W}>
{{
    [m0] a = MatMul (x, w)
    [r1] b = Erf (a)
    [m1] c = MatMul (b, w)
    [r2] d = Selu (c)
    [m2] y = MatMul (d, w)
}}"""

# Two ways from the first product to the last, a refused node on each.
PARALLEL = f"""
g (float[n,4] x) => (float[n,4] y) <{W}>
{{
    [m0] a = MatMul (x, w)
    [r1] b = Erf (a)
    [r2] c = Selu (a)
    [m1] d = Add (b, c)
    [m2] y = MatMul (d, w)
}}"""

# How long the second part is, only the values of a tensor say: nothing bounds it behind a cut.
COUNTED = f"""
g (float[n,4] x, int64 count) => (float[n,4] z, float[p,4] y)
<{W}, int64 zero = {{0}}, int64 one = {{1}}, int64[1] last = {{1}}, int64[2] four = {{1, 4}}>
{{
    [m0]    z = MatMul (x, w)
    [range] c = Range (zero, count, one)
    [cast]  f = Cast <to = 1> (c)
    [axis]  u = Unsqueeze (f, last)
    [wide]  e = Expand (u, four)
    [m1]    y = MatMul (e, w)
}}"""


def question_of(text: str, **more: object) -> Question:
    """Return the question about a graph of which no engine is too small."""
    graph = import_model(parsed(HEAD + text))
    shapes = infer(graph)
    annotate(graph, shapes)
    ranges = {"n": Range(min=1, opt=2, max=8)}
    fields = {"off": {}, "points": frozenset(), **more}
    counted = flops(graph, shapes, ranges)
    cost = Cost(keep_share=1e-9)
    return Question(graph, shapes, [ranges], flops=counted, cost=cost, **fields)  # type: ignore[arg-type]


def planned(question: Question, off: Mapping[str, Refused]) -> Plan:
    plan = Plan(TARGET, {**off, **question.off})
    plan.stages = settled_stages(question, plan)
    return plan


def explained(question: Question, off: Mapping[str, Refused], **more: object) -> Explanation:
    return explain(question, planned(question, off), **more)  # type: ignore[arg-type]


def counted(question: Question, off: Off) -> tuple[int, int, int, int]:
    """Return engines, other stages, bytes and most bytes of a split made by hand."""
    stages = planned(question, off).stages
    engines = sum(stage.runtime == "tensorrt" for stage in stages)
    usual = most = 0
    for crossing in crossings(stages):
        usual += (question.bytes_of(crossing.tensor) or 0) * crossing.boundaries
        most += (question.most_bytes_of(crossing.tensor) or 0) * crossing.boundaries
    return engines, len(stages) - engines, usual, most


def numbers(tally: Tally | None) -> tuple[int, int, int, int]:
    assert tally is not None
    return tally.engines, tally.fallback_stages, tally.bytes, tally.most_bytes


def without(off: Mapping[str, Refused], nodes: Collection[str]) -> Off:
    return {name: why for name, why in off.items() if name not in nodes}


# --- the work list -------------------------------------------------------------------------------


def test_refused_ops_in_series_save_an_engine_each() -> None:
    question = question_of(SERIES)
    found = explained(question, {"r1": NO, "r2": Refused("builder", "never")})
    assert numbers(found.now) == (3, 2, 4 * 32, 4 * 128)  # four tensors of [2, 4], and of [8, 4]
    assert [(each.what, each.by, each.text) for each in found.work] == [
        ("Erf", "parser", "no"),
        ("Selu", "builder", "never"),
    ]
    assert [numbers(each.then) for each in found.work] == [(2, 1, 64, 256)] * 2
    assert numbers(found.all) == (1, 0, 0, 0)
    assert found.pair is None  # each saves alone


def test_parallel_ops_pay_only_together() -> None:
    question = question_of(PARALLEL)
    found = explained(question, {"r1": NO, "r2": NO})
    assert found.now.engines == 2
    assert all(each.then is not None and each.then.engines == 2 for each in found.work)
    assert found.pair is not None
    assert sorted(found.work[number].what for number in found.pair.items) == ["Erf", "Selu"]
    assert numbers(found.pair.then) == (1, 0, 0, 0)


def test_nodes_of_one_kind_are_one_item_and_those_that_save_alone_are_named() -> None:
    question = question_of(SERIES.replace("Selu", "Erf"))
    words = "`{}` is refused by line {}"
    off = {n: Refused("parser", words.format(n, i)) for i, n in enumerate(("r1", "r2"))}
    found = explained(question, off)
    [item] = found.work
    assert item.nodes == ("r1", "r2")
    assert item.text == "`r1` is refused by line 0"
    assert numbers(item.then) == (1, 0, 0, 0)
    assert {each.node: numbers(each.then) for each in item.alone} == {
        "r1": (2, 1, 64, 256),
        "r2": (2, 1, 64, 256),
    }


def test_what_saves_most_comes_first() -> None:
    wide, tall = ones("wide", 4, 40), ones("tall", 40, 4)
    text = SERIES.replace("MatMul (b, w)", "MatMul (b, wide)")
    text = text.replace("MatMul (d, w)", "MatMul (d, tall)").replace(W, f"{W}, {wide}, {tall}")
    question = question_of(text)
    found = explained(question, {"r1": NO, "r2": NO})
    assert [each.what for each in found.work] == ["Selu", "Erf"]  # as many engines, more bytes
    saves = [each["saves"] for each in found.as_json()["work"]]
    assert [each["engines"] for each in saves] == [1, 1]
    assert [each["bytes"] for each in saves] == [2 * 2 * 40 * 4, 2 * 2 * 4 * 4]


def test_what_costs_an_engine_more_is_said_to_and_comes_last() -> None:
    question = question_of(SERIES.replace("[m2] y = MatMul (d, w)", "[m2] y = Erf (d)"))
    found = explained(question, {"r2": NO, "m2": NO})
    assert numbers(found.now) == (1, 1, 32, 128)
    first, last = found.work
    assert first.nodes == ("r2",)
    assert numbers(first.then) == (1, 1, 32, 128)
    assert first.then is not None
    assert first.then.flops_share > found.now.flops_share
    assert last.nodes == ("m2",)
    assert numbers(last.then) == (2, 1, 64, 256)
    assert [item["saves"]["engines"] for item in found.as_json()["work"]] == [0, -1]


def test_what_follows_from_a_refusal_comes_back_with_it() -> None:
    question = question_of(SERIES.replace("Erf (a)", "acme.Peaks (a)"))
    plan = planned(question, {"r1": NO})
    assert plan.off["m1"].by == "rule"  # what Peaks makes has no rank, so no engine can begin there
    found = explain(question, plan)
    [cut] = found.cuts
    assert [each.node for each in cut.refused if not each.follows] == ["r1"]
    assert {each.node for each in cut.refused if each.follows} >= {"m1"}
    [item] = found.work
    assert (item.what, numbers(item.then)) == ("acme::Peaks", (1, 0, 0, 0))


def test_an_axis_that_nothing_bounds_is_an_item_beside_the_node_that_makes_it() -> None:
    question = question_of(COUNTED)
    found = explained(question, {"range": NO})
    items = {item.kind: item for item in found.work}
    assert set(items) == {"node", "range"}
    assert items["node"].nodes == ("range",)
    # With a range for the axis, an engine could begin behind it.
    behind = items["range"]
    assert behind.todo == f"give `{behind.what}` a range under `dims`"
    assert "m1" in behind.nodes
    assert behind.then is not None
    assert behind.then.flops_share > found.now.flops_share
    assert behind.then.unbounded == 1  # how large what crosses is, nobody knows yet


def test_what_an_earlier_round_took_off_is_not_said_to_be_saved() -> None:
    question = question_of(SERIES.replace("Selu", "Erf"))
    stale = Refused("rule", "it did not pay in a round before")
    found = explained(question, {"r1": NO, "m1": stale, "r2": NO})
    assert numbers(found.now) == (2, 1, 64, 256)
    [item] = found.work  # nobody refuses m1
    assert item.nodes == ("r1", "r2")
    assert numbers(item.then) == (2, 1, 64, 256)


def test_a_point_is_an_item_of_its_own() -> None:
    question = question_of(SERIES, points=frozenset(["c"]))
    found = explained(question, {})
    [cut] = found.cuts
    assert (cut.before, cut.after, cut.stages, cut.points) == (0, 1, (), ("c",))
    assert [(sent.tensor, sent.dtype, sent.shape, sent.bytes) for sent in cut.enters] == [
        ("c", "float32", ("n", 4), 32)
    ]
    [item] = found.work
    assert (item.kind, item.what, item.by) == ("point", "c", "spec")
    assert numbers(item.then) == (1, 0, 0, 0)


def test_what_the_spec_keeps_off_is_one_item_for_each_of_its_lines() -> None:
    line = Refused("spec", "off_tensorrt: {node: r*}")
    question = question_of(SERIES, off={"r1": line, "r2": line})
    found = explained(question, {})
    [item] = found.work
    assert (item.what, item.nodes, item.by) == ("Erf, Selu", ("r1", "r2"), "spec")
    assert item.todo == "take it out of `partition.off_tensorrt`"
    assert numbers(item.then) == (1, 0, 0, 0)


def test_a_node_with_a_runtime_of_its_own_is_asked_about_without_it() -> None:
    question = question_of(
        SERIES, off={"r1": Refused("spec", "operators: torch")}, runtimes={"r1": "torch"}
    )
    found = explained(question, {})
    [item] = found.work
    assert numbers(item.then) == (1, 0, 0, 0)
    assert item.todo == "give its operator a TensorRT plugin: `tensorrt` under `operators`"


def test_a_pair_may_save_a_fallback_stage_alone() -> None:
    question = question_of(SERIES.replace("[m0] a = MatMul (x, w)", "[m0] a = Neg (x)"))
    found = explained(question, {"m0": NO, "r1": Refused("parser", "never")})
    assert numbers(found.now)[:2] == (1, 1)
    assert found.pair is not None
    assert numbers(found.pair.then) == (1, 0, 0, 0)


def test_a_scope_is_an_item_of_its_own() -> None:
    question = question_of(SERIES, scopes={"middle": ["r1", "m1"]})
    found = explained(question, {})
    assert found.now.engines == 3
    assert [(cut.stages, cut.scopes) for cut in found.cuts] == [((), ("middle",))] * 2
    [item] = found.work
    assert (item.kind, item.what, item.by) == ("scope", "middle", "spec")
    assert numbers(item.then) == (1, 0, 0, 0)


def test_nothing_is_cut_where_all_is_one_stage() -> None:
    found = explained(question_of(SERIES), {})
    assert (found.cuts, found.work, found.all) == ((), (), None)
    assert text_of([found]) == "\nt: nothing is cut"


def test_a_model_that_is_off_as_a_whole_is_explained() -> None:
    question = question_of("g (float[n,4] x) => (float[n,4] y) { [r1] y = Erf (x) }")
    found = explained(question, {"r1": NO})
    [cut] = found.cuts
    assert (cut.before, cut.after, cut.stages) == (None, None, (0,))
    [item] = found.work
    assert numbers(found.now) == (0, 1, 0, 0)
    assert numbers(item.then) == (1, 0, 0, 0)
    assert "between the start and the end: fallback stage 0" in text_of([found])


def test_the_plan_and_the_question_stay_as_they_are() -> None:
    question = question_of(SERIES, points=frozenset(["c"]))
    plan = planned(question, {"r1": NO})
    before = (dict(plan.off), list(plan.stages), question.points, dict(question.off))
    explain(question, plan)
    assert (dict(plan.off), list(plan.stages), question.points, dict(question.off)) == before


def test_the_number_of_splits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "MOST_SPLITS", 3)
    monkeypatch.setattr(explaining, "FEWEST_SPLITS", 3)
    question = question_of(SERIES)
    found = explained(question, {"r1": NO, "r2": Refused("builder", "never")})
    assert found.splits <= 3
    looked_at = [item for item in found.work if item.then is not None]
    assert len(looked_at) == 1
    assert found.work[-1].then is None
    assert "not looked at" in text_of([found])


def test_nodes_that_there_is_no_time_for_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "MOST_SPLITS", 3)
    monkeypatch.setattr(explaining, "FEWEST_SPLITS", 3)
    found = explained(question_of(SERIES.replace("Selu", "Erf")), {"r1": NO, "r2": NO})
    [item] = found.work
    assert len(item.alone) + found.unseen == 2
    assert found.unseen > 0
    assert f"{found.unseen} node" in text_of([found])


# --- brute force ---------------------------------------------------------------------------------


def chain_of_branches(seed: int) -> tuple[Question, dict[str, Refused]]:
    """Return a random graph of products and other nodes, and which of the others are refused."""
    drawn = random.Random(seed)
    values, nodes, off = ["x"], [], {}
    for number in range(drawn.randint(4, 12)):
        first, second = (drawn.choice(values[-4:]) for _ in range(2))
        if drawn.random() < 0.5:
            nodes.append(f"[m{number}] v{number} = MatMul ({first}, w)")
        else:
            op = drawn.choice(["Erf", "Selu"])
            if drawn.random() < 0.3:
                nodes.append(f"[a{number}] v{number} = Add ({first}, {second})")
            else:
                nodes.append(f"[r{number}] v{number} = {op} ({first})")
                off[f"r{number}"] = Refused("parser", op)
        values.append(f"v{number}")
    read = " ".join(node.partition("=")[2] for node in nodes)
    ends = [v for v in values[1:] if f"{v})" not in read and f"{v}," not in read]
    outputs = ", ".join(f"float[n,4] {name}" for name in ends)
    body = "\n".join(nodes)
    text = f"g (float[n,4] x) => ({outputs}) <{W}>\n{{\n{body}\n}}"
    points = frozenset(drawn.sample(values[1:-1], 1)) if drawn.random() < 0.3 else frozenset()
    return question_of(text, points=points), off


@pytest.mark.parametrize("seed", range(40))
def test_what_is_said_to_be_saved_is_what_splitting_again_saves(seed: int) -> None:
    question, off = chain_of_branches(seed)
    found = explained(question, off)
    now = counted(question, off)
    assert numbers(found.now) == now
    for item in (item for item in found.work if item.kind == "node"):
        assert numbers(item.then) == counted(question, without(off, item.nodes))
        for alone in item.alone:
            assert numbers(alone.then) == counted(question, without(off, [alone.node]))
            assert alone.then.engines < found.now.engines
    if found.pair is not None:
        first, second = (found.work[number] for number in found.pair.items)
        assert numbers(found.pair.then)[:2] < now[:2]
        assert all(numbers(item.then)[:2] >= now[:2] for item in (first, second))
        if "point" not in (first.kind, second.kind):
            both = (*first.nodes, *second.nodes)
            assert numbers(found.pair.then) == counted(question, without(off, both))


@pytest.mark.parametrize("seed", range(40))
def test_each_node_that_saves_an_engine_alone_is_named(seed: int) -> None:
    question, off = chain_of_branches(seed)
    found = explained(question, off)
    engines = found.now.engines
    saving = {name for name in off if counted(question, without(off, [name]))[0] < engines}
    named = {alone.node for item in found.work for alone in item.alone}
    named |= {
        item.nodes[0]
        for item in found.work
        if item.kind == "node"
        and len(item.nodes) == 1
        and item.then is not None
        and item.then.engines < engines
    }
    assert named == saving


@pytest.mark.parametrize("seed", range(40))
def test_each_boundary_between_engines_is_explained(seed: int) -> None:
    question, off = chain_of_branches(seed)
    plan = planned(question, off)
    found = explain(question, plan)
    engines = [n for n, stage in enumerate(plan.stages) if stage.runtime == "tensorrt"]
    between = [(cut.before, cut.after) for cut in found.cuts]
    for pair in itertools.pairwise(engines) if len(plan.stages) > 1 else ():
        assert pair in between
    for cut in found.cuts:
        assert cut.refused or cut.points
        for refusal in cut.refused:
            assert plan.off[refusal.node].text == refusal.text
    if len(engines) > 1:
        sent = {
            each.tensor
            for cut in found.cuts
            for each in (*cut.enters, *cut.leaves, *cut.passes, *cut.within)
        }
        assert {crossing.tensor for crossing in crossings(plan.stages)} == sent


# --- words ---------------------------------------------------------------------------------------


def todo(op: str, passes: Passes) -> str:
    text = SERIES.replace("Erf (a)", f"{op} (a)")
    [item] = explained(question_of(text), {"r1": NO}, passes=passes).work
    return item.todo


@pytest.mark.parametrize(
    ("op", "passes", "said"),
    [
        ("Det", Passes(legalise=False), "`decompose-det` rewrites it"),
        ("Erf", Passes(legalise=False), "a pass may rewrite it"),
        ("Det", Passes(disable=("decompose-det",)), "take `decompose-det` out of `passes.disable`"),
        ("acme.Peaks", Passes(), "a TensorRT plugin under `operators`"),
        ("Erf", Passes(), "write a pass that rewrites it"),
    ],
)
def test_what_can_be_done_is_said(op: str, passes: Passes, said: str) -> None:
    assert said in todo(op, passes)


def test_the_text_is_complete_and_fits_its_width() -> None:
    long = "in a function that has a very long name " * 9
    question = question_of(SERIES)
    found = explained(question, {"r1": Refused("parser", long), "r2": Refused("builder", "never")})
    text = text_of([found])
    assert max(map(len, text.splitlines())) <= 100
    flat = " ".join(text.split())
    assert "cut 1, between engine 0 and engine 2: fallback stage 1" in flat
    assert "refused Erf: r1 by parser in a function that has a very long name" in flat
    assert "goes in 1 tensor, 32 B (at most 128 B) 32 B float32 [n, 4] a" in flat
    assert "comes out 1 tensor, 32 B (at most 128 B) 32 B float32 [n, 4] b" in flat
    assert "all of these together 3 → 1 2 → 0 128 B → 0 B" in flat


def test_nodes_that_save_alike_alone_share_a_line() -> None:
    question = question_of(SERIES.replace("Selu", "Erf"))
    text = " ".join(text_of([explained(question, {"r1": NO, "r2": NO})]).split())
    assert "alone r1, r2, each: 2 engines, 1 fallback stage, 64 B between stages" in text


def test_the_json_holds_every_word() -> None:
    question = question_of(SERIES)
    found = explained(question, {"r1": NO, "r2": NO}, origins={"r1": ["a", "b"]})
    document = json.loads(json.dumps(found.as_json()))
    first = document["cuts"][0]
    assert first["refused"] == [
        {
            "node": "r1",
            "op": "Erf",
            "by": "parser",
            "text": "no",
            "follows": False,
            "origins": ["a", "b"],
        }
    ]
    assert first["enters"][0] == {
        "tensor": "a",
        "dtype": "float32",
        "shape": ["n", 4],
        "bytes": 32,
        "most_bytes": 128,
    }
    assert document["work"][0]["saves"]["engines"] == 1


def test_names_and_numbers_tell_no_two_kinds_apart() -> None:
    a = without_names("[x.cpp::f::4039] node /a/b: `t1` takes 63.5 us")
    b = without_names("[y.cpp::f::12] node /c/d/e: `t2` takes 7 us")
    assert a.replace("x.cpp", "") == b.replace("y.cpp", "")
    assert without_names("one reason") != without_names("another reason")
