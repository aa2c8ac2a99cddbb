from __future__ import annotations

import itertools
from collections.abc import Hashable

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


@given(edges=EDGES, of=st.sets(st.integers(1, 6), max_size=3))
def test_all_that_is_not_in_reach_may_change_sides_at_no_cost(
    edges: list[tuple[int, int, int]], of: set[int]
) -> None:
    network = Network()
    for start, end, capacity in edges:
        network.add(start, end, capacity)
    full = network.sink_side(0, 7, ENDLESS)
    if full is None or of & full:
        return
    stays = network.in_reach({0} | of)

    def cost(low: set[Hashable]) -> int:
        return sum(c for start, end, c in edges if start in low and end not in low)

    named = {0, 7} | {end for edge in edges for end in edge[:2]}
    assert not stays & full
    assert cost(stays) == cost(named - full)
    for more in range(1, 7):
        if more in stays - of:  # it must be: with of on that side, each cut without it costs more
            assert all(
                cost({0, *of, *others}) > cost(stays)
                for count in range(7)
                for others in itertools.combinations(set(range(1, 7)) - {more}, count)
            )


def test_a_cut_that_is_known_to_be_dear_is_not_looked_for() -> None:
    network = Network()
    for middle in range(5):
        network.add("in", middle, 1)
        network.add(middle, "out")
    assert network.sink_side("in", "out", 5) is None
