from __future__ import annotations

from itertools import product

import networkx as nx
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.passes.split import Stage, split, why_not_whole


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


def test_what_skips_the_refused_node_joins_the_later_engine_only_where_it_must() -> None:
    graph = graph_of({"a": ["x"], "d": ["a"], "side": ["a"], "b": ["d", "side"]})
    assert shown(split(graph, ["d"])) == [
        "T a side: x -> a side",
        "O d: a -> d",
        "T b: d side -> b",
    ]


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
