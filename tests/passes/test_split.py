from __future__ import annotations

from itertools import product
from random import Random

import networkx as nx
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.passes.split import (
    CutApart,
    Splitter,
    Stage,
    crossings,
    quantised,
    split,
    why_not_whole,
)


def graph_of(edges: dict[str, list[str]], outputs: list[str] | None = None) -> gs.Graph:
    """Return a graph whose node n makes the tensor n from the named tensors; x is the input."""
    tensors = {"x": gs.Variable("x", np.float32, [1])}
    nodes = []
    for name, sources in edges.items():
        tensors[name] = gs.Variable(name, np.float32, [1])
        node = gs.Node("Sum", name, inputs=[tensors[s] for s in sources], outputs=[tensors[name]])
        nodes.append(node)
    read = {source for sources in edges.values() for source in sources}
    ends = outputs or [name for name in edges if name not in read]
    return gs.Graph(nodes, [tensors["x"]], [tensors[name] for name in ends])


def shown(stages: list[Stage]) -> list[str]:
    """Return each stage as ``T a b (r): in -> out``; repeated nodes in brackets."""
    return [
        f"{stage.runtime[0].upper()} {' '.join(stage.nodes)}"
        + (f" ({' '.join(stage.repeated)})" if stage.repeated else "")
        + f": {' '.join(stage.inputs)} -> {' '.join(stage.outputs)}"
        for stage in stages
    ]


def test_a_graph_that_tensorrt_takes_is_one_engine() -> None:
    graph = graph_of({"a": ["x"], "b": ["a"], "c": ["a", "b"]})
    assert shown(split(graph, [])) == ["T a b c: x -> c"]


def test_a_refused_node_in_the_middle_makes_three_stages() -> None:
    graph = graph_of({"a": ["x"], "d": ["a"], "b": ["d"]})
    assert shown(split(graph, ["d"])) == ["T a: x -> a", "O d: a -> d", "T b: d -> b"]


@pytest.mark.parametrize(
    ("side", "first", "last"), [(1, "T a: x -> a", "T side b"), (0, "T a side: x -> a side", "T b")]
)
def test_what_skips_the_refused_node_stands_where_fewer_bytes_cross(
    side: int, first: str, last: str
) -> None:
    # `a` crosses in any case, as far as to `d`.
    graph = graph_of({"a": ["x"], "d": ["a"], "side": ["a"], "b": ["d", "side"]})
    sizes = {"a": 2, "d": 2, "side": 1 + 2 * side, "b": 2}
    stages = shown(Splitter(graph, bytes_of=sizes.get).split(["d"]))
    assert stages[0] == first
    assert stages[1] == "O d: a -> d"
    assert stages[2].startswith(last)


def test_a_refused_node_first_runs_before_the_only_engine() -> None:
    graph = graph_of({"d": ["x"], "a": ["x", "d"]})
    assert shown(split(graph, ["d"])) == ["O d: x -> d", "T a: x d -> a"]


def test_a_point_ends_a_stage_between_two_engines() -> None:
    graph = graph_of({"a": ["x"], "b": ["a"], "c": ["a", "b"]})
    assert shown(split(graph, [], points=["a"])) == ["T a: x -> a", "T b c: a -> c"]


def test_a_point_between_two_fallback_nodes_splits_only_the_fallback_stage() -> None:
    graph = graph_of({"d": ["x"], "e": ["d"], "a": ["x"], "b": ["a", "e"]})
    assert shown(split(graph, ["d", "e"], points=["d"])) == [
        "O d: x -> d",
        "O e: d -> e",
        "T a b: x e -> b",
    ]


def test_a_point_on_the_way_into_the_fallback_does_not_cut_twice() -> None:
    graph = graph_of({"a": ["x"], "d": ["a"], "b": ["d"]})
    assert len(split(graph, ["d"], points=["a", "d"])) == 3


def test_shape_arithmetic_is_repeated_where_it_is_read_and_owned_once() -> None:
    graph = graph_of({"a": ["x"], "size": ["x"], "d": ["a", "size"], "b": ["d", "size"]})
    stages = split(graph, ["d"], is_free=lambda node: node.name == "size")
    assert shown(stages) == [
        "T a: x -> a",
        "O size d: x a -> d",
        "T b (size): x d -> b",
    ]


def test_what_only_repeated_shape_arithmetic_reads_is_sent_too() -> None:
    graph = graph_of({"a": ["x"], "size": ["a"], "d": ["x", "size"], "b": ["d", "size"]})
    stages = split(graph, ["d"], is_free=lambda node: node.name == "size")
    assert shown(stages) == ["T a: x -> a", "O size d: a x -> d", "T b (size): a d -> b"]


def test_shape_arithmetic_that_the_caller_reads_is_an_ordinary_node() -> None:
    graph = graph_of({"a": ["x"], "size": ["x"]}, outputs=["a", "size"])
    stages = split(graph, [], is_free=lambda node: node.name == "size")
    assert shown(stages) == ["T a size: x -> a size"]


def test_shape_arithmetic_does_not_raise_a_level() -> None:
    # size comes from d's result, yet b reads d's result anyway: one engine behind d, not two.
    graph = graph_of({"d": ["x"], "size": ["d"], "b": ["d", "size"], "c": ["b", "size"]})
    stages = split(graph, ["d"], is_free=lambda node: node.name == "size")
    assert shown(stages) == ["O d: x -> d", "T size b c: d -> c"]


def test_a_node_in_no_stage_is_noticed() -> None:
    graph = graph_of({"a": ["x"], "b": ["a"]})
    stage = Stage("tensorrt", ("a",), (), ("x",), ("a",))
    assert why_not_whole(graph, [stage]) == "a node is in no stage, or in two"


def test_a_cheap_node_that_enlarges_what_it_reads_is_repeated_and_never_sent() -> None:
    graph = graph_of({"a": ["x"], "wide": ["a"], "d": ["wide"], "b": ["d", "wide"]})
    graph.nodes[1].op = "Cast"
    sizes = {"a": 1, "wide": 4, "d": 1, "b": 1}
    assert shown(Splitter(graph, bytes_of=sizes.get).split(["d"])) == [
        "T a: x -> a",
        "O wide d: a -> d",
        "T b (wide): a d -> b",
    ]
    sizes["wide"] = 1  # no smaller is what it reads
    assert shown(Splitter(graph, bytes_of=sizes.get).split(["d"])) == [
        "T a wide: x -> wide",
        "O d: wide -> d",
        "T b: d wide -> b",
    ]


def test_what_nobody_knows_the_size_of_does_not_pass_into_an_engine_that_could_make_it() -> None:
    graph = graph_of({"a": ["x"], "d": ["a"], "many": ["a"], "b": ["d", "many"]})
    sizes = {"a": 1000, "d": 1, "b": 1}
    assert shown(Splitter(graph, bytes_of=sizes.get).split(["d"]))[2] == "T many b: a d -> b"


def test_a_unit_goes_off_whole_and_says_with_which_node() -> None:
    graph = graph_of({"a": ["x"], "d": ["a"], "q": ["d"], "b": ["q"]})
    splitter = Splitter(graph, units=[["q", "d"]])
    assert splitter.drags(["d"]) == {"q": "d"}
    assert shown(splitter.split(["d"])) == ["T a: x -> a", "O d q: a -> q", "T b: q -> b"]
    assert shown(splitter.split([])) == ["T a d q b: x -> b"]


def test_units_that_share_a_node_are_one() -> None:
    graph = graph_of({"a": ["x"], "b": ["a"], "c": ["b"], "d": ["c"]})
    assert Splitter(graph, units=[["a", "b"], ["b", "c"]]).drags(["c"]) == {"a": "c", "b": "c"}


def test_a_unit_moves_whole_to_where_fewer_bytes_cross() -> None:
    edges = {"a": ["x"], "d": ["a"], "m": ["a"], "n": ["x"], "b": ["d", "m", "n"]}
    sizes = {"a": 1, "d": 1, "m": 9, "n": 1, "b": 1}
    splitter = Splitter(graph_of(edges), units=[["m", "n"]], bytes_of=sizes.get)
    assert shown(splitter.split(["d"]))[2] == "T m n b: a x d -> b"


def test_a_scope_is_a_stage_of_its_own_with_its_name() -> None:
    graph = graph_of({"a": ["x"], "b": ["a"], "other": ["x"], "c": ["b", "other"]})
    stages = Splitter(graph, scopes={"body": ["a", "b"]}).split([])
    assert shown(stages) == ["T a b: x -> b", "T other c: x b -> c"]
    assert [stage.name for stage in stages] == ["body", None]


def test_two_scopes_that_do_not_read_one_another_need_two_engines_of_one_level() -> None:
    graph = graph_of({"a": ["x"], "b": ["x"], "c": ["a", "b"]})
    stages = Splitter(graph, scopes={"left": ["a"], "right": ["b"]}).split([])
    assert [(stage.name, stage.nodes) for stage in stages] == [
        ("left", ("a",)),
        ("right", ("b",)),
        (None, ("c",)),
    ]


def test_a_scope_with_a_refused_node_is_a_fallback_stage_of_its_own() -> None:
    graph = graph_of({"e": ["x"], "a": ["e"], "b": ["a"], "c": ["b"]})
    stages = Splitter(graph, scopes={"body": ["a", "b"]}).split(["b", "e"])
    assert [(stage.runtime, stage.nodes, stage.name) for stage in stages] == [
        ("onnxruntime", ("e",), None),
        ("onnxruntime", ("a", "b"), "body"),
        ("tensorrt", ("c",), None),
    ]


def test_a_unit_that_a_path_leaves_and_enters_again_is_refused_with_the_shortest_such_path() -> (
    None
):
    edges = {"a": ["x"], "p": ["a"], "q": ["p"], "r": ["a"], "b": ["q", "r"], "c": ["b"]}
    with pytest.raises(CutApart) as caught:
        Splitter(graph_of(edges), units=[["a", "b"]])
    assert caught.value.path == ("a", "r", "b")


def test_nodes_on_torch_are_stages_by_themselves_and_the_rest_of_the_fallback_is_not_cut_in_vain() -> (
    None
):
    edges = {"t": ["x"], "d": ["x"], "e": ["t"], "u": ["e"], "f": ["u", "d"], "a": ["f"]}
    splitter = Splitter(graph_of(edges), runtimes={"t": "torch", "u": "torch"})
    assert shown(splitter.split(["t", "u", "d", "e", "f"])) == [
        "T t: x -> t",  # torch
        "O d e: x t -> d e",
        "T u: e -> u",
        "O f: u d -> f",
        "T a: f -> a",
    ]
    assert [stage.runtime for stage in splitter.split(["t", "u", "d", "e", "f"])][::2] == [
        "torch",
        "torch",
        "tensorrt",
    ]


def test_what_a_torch_node_reads_is_sent_to_it_also_where_others_repeat_it() -> None:
    graph = graph_of({"a": ["x"], "size": ["x"], "t": ["a", "size"], "b": ["t", "size"]})
    splitter = Splitter(graph, is_free=lambda n: n.name == "size", runtimes={"t": "torch"})
    stages = splitter.split(["t"])
    assert [stage.nodes for stage in stages if stage.runtime == "torch"] == [("t",)]
    assert not any(stage.repeated for stage in stages)


def test_a_node_that_torch_can_run_stays_in_an_engine_while_tensorrt_takes_it() -> None:
    splitter = Splitter(graph_of({"a": ["x"], "t": ["a"], "b": ["t"]}), runtimes={"t": "torch"})
    assert [stage.runtime for stage in splitter.split([])] == ["tensorrt"]
    assert [stage.runtime for stage in splitter.split(["t"])] == ["tensorrt", "torch", "tensorrt"]


def test_what_crosses_is_told_with_how_far() -> None:
    graph = graph_of({"a": ["x"], "d": ["a"], "b": ["d", "a"]})
    found = crossings(split(graph, ["d"]))
    assert [(c.tensor, c.maker, c.readers, c.boundaries) for c in found] == [
        ("a", 0, (1, 2), 2),
        ("d", 1, (2,), 1),
    ]


@st.composite
def dags(draw: st.DrawFn) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Draw edges, the nodes off TensorRT, and the points of a graph of up to 7 nodes."""
    size = draw(st.integers(1, 7))
    edges: dict[str, list[str]] = {}
    for index in range(size):
        names = ["x", *edges]
        edges[f"n{index}"] = draw(
            st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)
        )
    off = draw(st.lists(st.sampled_from(list(edges)), max_size=4, unique=True))
    points = draw(st.lists(st.sampled_from(list(edges)), max_size=2, unique=True))
    return edges, off, points


def fewest_engines(edges: dict[str, list[str]], off: list[str], points: list[str]) -> int:
    """Return the least number of engines over all assignments, by trying them all."""
    on = [name for name in edges if name not in off]
    for count in range(len(on) + 1):
        for engine in product(range(count), repeat=len(on)):
            group = dict(zip(on, engine, strict=True))
            quotient = nx.DiGraph()
            quotient.add_nodes_from(group.get(name, name) for name in edges)
            for name, sources in edges.items():
                for source in sources:
                    here, there = group.get(name, name), group.get(source, source)
                    if source != "x" and (here != there or (source in points and name in group)):
                        quotient.add_edge(there, here)
            if nx.is_directed_acyclic_graph(quotient):
                return count
    return len(on)


@settings(max_examples=150, deadline=None)
@given(dags())
def test_no_assignment_has_fewer_engines(
    drawn: tuple[dict[str, list[str]], list[str], list[str]],
) -> None:
    edges, off, points = drawn
    graph = graph_of(edges)
    stages = split(graph, off, points=points)
    assert why_not_whole(graph, stages) is None
    engines = sum(stage.runtime == "tensorrt" for stage in stages)
    assert engines == fewest_engines(edges, off, points)


@pytest.mark.parametrize("size", [20_000])
def test_a_long_chain_needs_no_recursion(size: int) -> None:
    edges = {"n0": ["x"]} | {f"n{i}": [f"n{i - 1}"] for i in range(1, size)}
    stages = split(graph_of(edges), [f"n{size // 2}"])
    assert [stage.runtime for stage in stages] == ["tensorrt", "onnxruntime", "tensorrt"]


@st.composite
def large_dags(draw: st.DrawFn) -> tuple[dict[str, list[str]], list[str], list[str], list[str]]:
    """Draw edges, the nodes off TensorRT, points and nodes on torch of a graph of 20 to 60 nodes."""
    edges: dict[str, list[str]] = {}
    for index in range(draw(st.integers(20, 60))):
        near = [*edges][-8:] or ["x"]
        edges[f"n{index}"] = draw(
            st.lists(st.sampled_from(near), min_size=1, max_size=3, unique=True)
        )
    names = st.sampled_from(list(edges))
    off = draw(st.lists(names, max_size=8, unique=True))
    points = draw(st.lists(names, max_size=2, unique=True))
    torch = draw(st.lists(st.sampled_from(off), max_size=2, unique=True)) if off else []
    return edges, off, points, torch


@settings(max_examples=60, deadline=None)
@given(large_dags(), st.randoms(use_true_random=False))
def test_stages_are_whole_convex_and_the_same_for_every_listing_order(
    drawn: tuple[dict[str, list[str]], list[str], list[str], list[str]], shuffle: Random
) -> None:
    edges, off, points, torch = drawn
    weights = {name: shuffle.randrange(1, 100) for name in edges}

    def stages_of(order: dict[str, list[str]]) -> list[Stage]:
        graph = graph_of(order)
        stages = Splitter(
            graph,
            points=points,
            bytes_of=weights.get,
            runtimes=dict.fromkeys(torch, "torch"),
        ).split(off)
        assert why_not_whole(graph, stages) is None
        return stages

    stages = stages_of(edges)
    place = {name: index for index, stage in enumerate(stages) for name in stage.nodes}
    for name, sources in edges.items():
        for source in sources:
            if source != "x":
                assert place[source] <= place[name]  # so every stage is convex
                both_on = source not in off and name not in off
                assert not (both_on and source in points) or place[source] < place[name]
    for stage in stages:
        kinds = {name in off for name in stage.nodes}
        assert kinds == {stage.runtime != "tensorrt"}
        assert stage.runtime != "torch" or len(stage.nodes) == 1
    view = nx.DiGraph([(s, name) for name, sources in edges.items() for s in sources if s != "x"])
    engines = sum(stage.runtime == "tensorrt" for stage in stages)
    assert engines == longest_alternation(view, edges, set(off), set(points))
    for _ in range(2):
        order = list(edges)
        shuffle.shuffle(order)
        again = stages_of({name: edges[name] for name in _sorted(order, edges)})
        assert [(s.runtime, set(s.nodes), set(s.inputs), set(s.outputs)) for s in again] == [
            (s.runtime, set(s.nodes), set(s.inputs), set(s.outputs)) for s in stages
        ]


def longest_alternation(
    view: nx.DiGraph, edges: dict[str, list[str]], off: set[str], points: set[str]
) -> int:
    """Return the most engines that any path needs by itself: no scheme has fewer."""
    engines: dict[str, int] = {}  # on a path that ends here
    for name, sources in edges.items():
        counts = [0]
        for source in sources:
            if source == "x":
                continue
            new = name not in off and (source in off or source in points)
            counts.append(engines[source] + new)
        engines[name] = max(counts)
        if name not in off:
            engines[name] = max(engines[name], 1)
    return max(engines.values())


def _sorted(order: list[str], edges: dict[str, list[str]]) -> list[str]:
    """Return the names in a topological order that follows ``order`` where it can."""
    found: list[str] = []
    while len(found) < len(order):
        for name in order:
            if name not in found and all(s == "x" or s in found for s in edges[name]):
                found.append(name)
                break
    return found


def test_a_quantised_operator_goes_off_with_what_rounds_its_result() -> None:
    # Bytes cross, not floats: x -> q -> dq -> op -> q2 -> dq2 -> b
    edges = {"q": ["x"], "dq": ["q"], "op": ["dq"], "q2": ["op"], "dq2": ["q2"], "b": ["dq2"]}
    graph = graph_of(edges)
    for node in graph.nodes:
        if "q" in node.name:
            node.op = "DequantizeLinear" if node.name.startswith("dq") else "QuantizeLinear"
    sizes = {name: 1 if name in ("q", "q2") else 4 for name in edges}
    assert quantised(graph) == [["op", "q2"]]
    splitter = Splitter(graph, units=quantised(graph), bytes_of=sizes.get)
    assert shown(splitter.split(["op"])) == [
        "T q: x -> q",
        "O dq op q2: q -> q2",
        "T dq2 b: q2 -> b",
    ]
