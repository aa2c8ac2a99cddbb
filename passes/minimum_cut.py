"""A minimum cut of a small network: Dinic's algorithm, ended as soon as the cut is known to be dear.

networkx has one as well; where hundreds of regions of a graph are asked about, and most of them in
vain, it takes longer than all other passes together.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

ENDLESS = 1 << 60
"""The capacity of an edge that cannot be cut."""


class Network:
    """Edges with capacities between any nodes that can be hashed."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._names: list[Hashable] = []
        self._edges_of: list[list[int]] = []
        self._ends: list[int] = []
        self._left: list[int] = []  # capacity that is left; edge ^ 1 is the way back

    def add(self, start: Hashable, end: Hashable, capacity: int = ENDLESS) -> None:
        """Add an edge."""
        one, other = self._number(start), self._number(end)
        for at, to, room in ((one, other, capacity), (other, one, 0)):
            self._edges_of[at].append(len(self._ends))
            self._ends.append(to)
            self._left.append(room)

    def sink_side(self, source: Hashable, sink: Hashable, below: int) -> set[Hashable] | None:
        """Return the smaller side of ``sink`` of a minimum cut; None if it costs ``below`` or more."""
        first, last = self._number(source), self._number(sink)
        flow = 0
        while levels := self._levels(first, last):
            flow += self._push(first, last, levels, below - flow)
            if flow >= below:
                return None
        return {self._names[number] for number in self._reaching(last)}

    def in_reach(self, of: Iterable[Hashable]) -> set[Hashable]:
        """Return what must be on the side of the source, after `sink_side`, if all of ``of`` is.

        Any other node may change to the side of the sink, and the cut costs the same.
        """
        queue = [self._numbers[name] for name in of if name in self._numbers]
        found = set(queue)
        for at in queue:
            for edge in self._edges_of[at]:
                to = self._ends[edge]
                if self._left[edge] and to not in found:
                    found.add(to)
                    queue.append(to)
        return {self._names[number] for number in found}

    def _number(self, name: Hashable) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self._names)
            self._names.append(name)
            self._edges_of.append([])
        return self._numbers[name]

    def _levels(self, first: int, last: int) -> list[int]:
        """Return how far each node is from ``last``, or [] where ``first`` does not reach it."""
        left, ends, edges_of = self._left, self._ends, self._edges_of
        levels = [-1] * len(edges_of)
        levels[last] = 0
        queue = [last]
        for at in queue:
            beyond = levels[at] + 1
            for edge in edges_of[at]:
                before = ends[edge]
                if levels[before] < 0 and left[edge ^ 1]:
                    levels[before] = beyond
                    if before == first:
                        return levels
                    queue.append(before)
        return []

    def _push(self, first: int, last: int, levels: list[int], enough: int) -> int:
        """Push along falling ``levels`` all that these paths take, or ``enough``; return how much."""
        left, ends, edges_of = self._left, self._ends, self._edges_of
        places = [0] * len(edges_of)  # where to look on
        path: list[int] = []
        flow = 0
        at = first
        while True:
            if at == last:
                room = min([left[edge] for edge in path])
                flow += room
                full = 0
                for step in range(len(path) - 1, -1, -1):
                    edge = path[step]
                    left[edge] -= room
                    left[edge ^ 1] += room
                    if not left[edge]:
                        full = step
                if flow >= enough:
                    return flow
                at = ends[path[full] ^ 1]  # the rest of the path takes more
                del path[full:]
            edges, nearer = edges_of[at], levels[at] - 1
            for place in range(places[at], len(edges)):
                edge = edges[place]
                if left[edge] and levels[ends[edge]] == nearer:
                    path.append(edge)
                    places[at] = place
                    at = ends[edge]
                    break
            else:
                if not path:
                    return flow
                levels[at] = -2  # leads nowhere
                at = ends[path.pop() ^ 1]

    def _reaching(self, last: int) -> set[int]:
        """Return the nodes from which ``last`` can still be reached."""
        found = {last}
        queue = [last]
        for at in queue:
            for edge in self._edges_of[at]:
                before = self._ends[edge]
                if self._left[edge ^ 1] and before not in found:
                    found.add(before)
                    queue.append(before)
        return found
