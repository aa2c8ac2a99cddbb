from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from pathlib import Path

import networkx as nx
import pytest
from spec_file import VALID, checked, codes, faults, rendered, write_model

from optc.specs.compile_spec import Selector
from optc.specs.stage_problem import Asked, Flow, FlowNode, Member, numbers_of

pytestmark = pytest.mark.usefixtures("beside_model")

# /stem/Conv -> /stem/Relu -> GlobalAveragePool_2 -> /head/Add -> /head/If -> /head/Flatten


def partition(text: str) -> str:
    return VALID + f"partition: {{{text}}}\n"


@pytest.mark.parametrize(
    "text",
    [
        "scopes: {stem: /stem/*, head: [/head/A*, /head/If, /head/Flatten]}",
        "scopes: {all: '*'}",
        "keep_together: [[{node: /stem/*}, {op: GlobalAveragePool}], [{op: Add}, {op: If}]]",
        "scopes: {head: /head/*}, keep_together: [[{op: Add}, {op: Flatten}]]",
        "scopes: {head: [/head/*, GlobalAveragePool_2]}, points: [{node: /stem/*}, r]",
        "scopes: {head: [/head/Flatten, /head/then/Exp]}",  # in a body: its If is meant
    ],
)
def test_what_can_be_stages_is_no_mistake(text: str) -> None:
    assert faults(partition(text)) == ()


def test_the_path_in_the_way_of_a_scope_is_shown() -> None:
    text = VALID + "partition:\n  scopes:\n    ends: [/stem/*, /head/Flatten]\n"
    assert (
        rendered(text)
        == """\
error[cannot-stay-whole]: the scope `ends` cannot be one stage: a path leaves it and enters it \
again, `/stem/Relu` -> `GlobalAveragePool_2` -> `/head/Add` -> `/head/If` -> `/head/Flatten`
  --> spec.yaml:6:11
6 |     ends: [/stem/*, /head/Flatten]
  |           ^^^^^^^^^^^^^^^^^^^^^^^^
  do: let it hold `GlobalAveragePool_2` too, and what else is on the way, or end it before it"""
    )


def test_a_group_that_a_path_leaves_is_none() -> None:
    (fault,) = faults(partition("keep_together: [[{op: Conv}, {op: GlobalAveragePool}]]"))
    assert fault.code == "cannot-stay-whole"
    assert "`/stem/Conv` -> `/stem/Relu` -> `GlobalAveragePool_2`" in fault.problem
    assert str(fault.place).startswith("spec.yaml:4:")


def test_a_node_is_in_one_scope() -> None:
    (fault,) = faults(partition("scopes: {a: /stem/*, b: [/stem/Relu, GlobalAv*]}"))
    assert fault.code == "node-in-two-scopes"
    assert fault.problem == "`/stem/Relu` is in the scope `a` and in the scope `b`"


def test_that_too_much_matches_is_all_that_is_told() -> None:
    (fault,) = faults(partition("scopes: {a: /stem/*, b: [/stem/Conv, /head/*]}"))
    assert fault.code == "node-in-two-scopes"


def test_a_group_is_not_half_in_a_scope() -> None:
    (fault,) = faults(
        partition("scopes: {a: /stem/*}, keep_together: [[{op: Relu}, {op: GlobalAveragePool}]]")
    )
    assert fault.code == "group-across-scopes"
    assert "`/stem/Relu`, which is in the scope `a`, and `GlobalAveragePool_2`" in fault.problem


@pytest.mark.parametrize("point", ["s", "{node: /stem/Conv}", "{node: /stem/C*}"])
@pytest.mark.parametrize("stage", ["scopes: {stem: /stem/*}", "keep_together: [[{node: /stem/*}]]"])
def test_a_point_does_not_end_a_stage_in_its_middle(point: str, stage: str) -> None:
    (fault,) = faults(partition(f"points: [{point}], {stage}"))
    assert fault.code == "point-inside-stage"
    assert fault.problem.endswith("`/stem/Conv` -> `/stem/Relu`")


def test_nodes_that_lead_nowhere_else_end_no_stage() -> None:
    (note,) = checked(partition("points: [{node: '*'}]")).notes
    assert (note.code, note.severity) == ("point-is-no-cut", "warning")


def test_scopes_that_wait_for_each_other(beside_model: Path) -> None:
    write_model(
        beside_model,
        """
        <ir_version: 9, opset_import: ["" : 17]>
        g (float[2] x) => (float[2] y, float[2] z)
        {
            [a__one] p = Relu (x)
            [b__one] q = Exp (x)
            [b__two] y = Add (q, p)
            [a__two] z = Add (p, q)
        }""",
    )
    text = "version: 1\nmodel: m.onnx\npartition: {scopes: {a: /a/*, b: /b/*}}\n"
    (fault,) = faults(text)
    assert fault.code == "stages-in-a-circle"
    assert fault.problem == (
        "the scope `a` and the scope `b` wait for each other: "
        "`/a/one` -> `/b/two` -> `/b/one` -> `/a/two`"
    )


def test_sizes_are_in_nobodys_way(beside_model: Path) -> None:
    write_model(
        beside_model,
        """
        <ir_version: 9, opset_import: ["" : 17]>
        g (float[2, 3] x) => (float[m, n] y)
        {
            [a__one] p = Relu (x)
            size = Shape (p)
            [a__two] y = Reshape (p, size)
        }""",
    )
    assert codes("version: 1\nmodel: m.onnx\npartition: {scopes: {a: /a/*}}\n") == []


def test_all_mistakes_come_at_once_each_with_its_place() -> None:
    text = VALID + (
        "partition:\n"
        "  points: [{node: /stme/*}]\n"
        "  scopes:\n"
        "    stem: [/stem/*, /stm/*]\n"
        "    a b: /head/*\n"
        "    ends: [GlobalAv*, /head/Flatten]\n"
        "    none: /nothing/at/all\n"
        "  keep_together: [[{op: Convv}, {op: Conv}], [{op: Conv, node: a}]]\n"
    )
    found = [(f.code, str(f.place).removeprefix("spec.yaml:")) for f in faults(text)]
    assert found == [
        ("unknown-node", "5:19"),
        ("unknown-node", "7:21"),
        ("bad-stage-name", "8:5"),
        ("cannot-stay-whole", "9:11"),
        ("unknown-node", "10:11"),
        ("unknown-op", "11:25"),
        ("bad-selector", "11:47"),
    ]


# --- the search for a path -----------------------------------------------------------------------


def flow_of(graph: nx.DiGraph, stages: list[set[int]]) -> Flow:
    members = [
        Member(Asked(f"stage {number}", (number,), (), str(number)), frozenset(stage))
        for number, stage in enumerate(stages)
    ]
    return Flow(
        [str(node) for node in range(len(graph))],
        [sorted(graph.successors(node)) for node in range(len(graph))],
        members,
    )


def can_be_stages(graph: nx.DiGraph, stages: list[set[int]]) -> bool:
    parts = [*stages, *({node} for node in graph if not any(node in each for each in stages))]
    return nx.is_directed_acyclic_graph(nx.quotient_graph(graph, parts))


def test_what_it_finds_is_what_the_quotient_graph_says() -> None:
    rng = random.Random(0)
    verdicts = Counter[bool]()
    for _ in range(500):
        size = rng.randint(3, 8)
        order = rng.sample(range(size), size)
        graph = nx.DiGraph()
        graph.add_nodes_from(range(size))
        graph.add_edges_from(e for e in itertools.combinations(order, 2) if rng.random() < 0.35)
        home = [rng.choice([0, 1, None]) for _ in range(size)]
        stages = [s for k in (0, 1) if (s := {n for n in range(size) if home[n] == k})]
        found = list(flow_of(graph, stages).problems(lambda *keys: None))
        assert bool(found) is not can_be_stages(graph, stages)
        verdicts[bool(found)] += 1
        for problem in found:
            path = [int(number) for number in re.findall("`([0-9]+)`", problem.problem)]
            for a, b in itertools.pairwise(path):  # each step is an edge, or stays within a stage
                assert graph.has_edge(a, b) or any({a, b} <= stage for stage in stages)
            assert any({path[0], path[-1]} <= stage for stage in stages)
    assert min(verdicts.values()) > 50


def test_a_long_path_is_shown_without_its_middle() -> None:
    graph = nx.path_graph(30, create_using=nx.DiGraph)
    (fault,) = flow_of(graph, [{0, 29}]).problems(lambda *keys: None)
    assert fault.problem.endswith("`0` -> `1` -> `2` -> `3` -> (23 more) -> `27` -> `28` -> `29`")


def test_a_long_chain_is_no_matter() -> None:
    size = 100_000
    graph = nx.path_graph(size, create_using=nx.DiGraph)
    (fault,) = flow_of(graph, [{0, size - 1}]).problems(lambda *keys: None)
    assert f"({size - 7} more)" in fault.problem
    assert list(flow_of(graph, [set(range(size // 2))]).problems(lambda *keys: None)) == []


@pytest.mark.parametrize(
    "selectors",
    [
        [Selector(node="/a/*")],
        [Selector(node="/a/*"), Selector(op="Conv")],
        [Selector(op="Relu"), Selector(op="Conv")],
        [Selector(node="a[0]"), Selector(node="a[0-9]")],
        [Selector(node="?")],
        [Selector(node="none")],
    ],
)
def test_nodes_are_selected_as_everywhere(selectors: list[Selector]) -> None:
    names = ["/a/b", "/a/", "/A/b", "/b/a", "a[0]", "a0", "a\nb", "x"]
    kinds = [(op, name) for op in ("Conv", "Relu", "Add") for name in names]
    nodes = [FlowNode(kind[1], (kind,), frozenset(), ()) for kind in kinds]
    nodes += [FlowNode("if", (("If", "if"), kind), frozenset(), ()) for kind in kinds]
    expected = {
        number
        for number, node in enumerate(nodes)
        if any(selector.matches(*kind) for selector in selectors for kind in node.kinds)
    }
    assert numbers_of(nodes, selectors) == expected
