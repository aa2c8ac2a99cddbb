from __future__ import annotations

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st

from optc.passes.minimum_cut import ENDLESS, Network

EDGES = st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 7), st.sampled_from([1, 1, 2, ENDLESS])),
    max_size=24,
)


@given(edges=EDGES)
def test_the_cut_is_a_smallest_one_with_the_smallest_side(
    edges: list[tuple[int, int, int]],
) -> None:
    network, view = Network(), nx.DiGraph()
    view.add_nodes_from([0, 7])
    for start, end, capacity in edges:
        if start == end or view.has_edge(start, end):
            continue
        network.add(start, end, capacity)
        view.add_edge(start, end, capacity=capacity)
    value, (_, sink_side) = nx.minimum_cut(view, 0, 7)
    assert network.sink_side(0, 7, value) is None or value == 0
    again = Network()
    for start, end, data in view.edges(data=True):
        again.add(start, end, data["capacity"])
    assert again.sink_side(0, 7, value + 1) == sink_side


def test_a_cut_that_is_known_to_be_dear_is_not_looked_for() -> None:
    network = Network()
    for middle in range(5):
        network.add("in", middle, 1)
        network.add(middle, "out")
    assert network.sink_side("in", "out", 5) is None
