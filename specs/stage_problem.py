"""What keeps the scopes and groups of a spec from being stages: a path of nodes in the way.

A stage runs as a whole. So a path that leaves it and enters it again is in the way, and so are two
stages each of which waits for the other. It is looked for here on the nodes of a graph as numbers,
so that a spec is checked with it against the outline of a model before anything heavy is loaded, and
once more against the graph that the passes leave. Linear in the nodes and edges for each stage.
"""

from __future__ import annotations

import fnmatch
import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

from optc.specs.compile_spec import Partition, Point, Selector
from optc.specs.diagnostic import Diagnostic, PlaceOf

SHOWN_NODES: Final = 8
"""A longer path is shown without its middle."""

SHAPE_OPS: Final = frozenset({"Shape", "Size"})
"""What these return does not depend on what was computed: it is in nobody's way, as each stage finds
out sizes for itself."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Nodes that a spec wants in one stage.

    Attributes:
        label: What they are called in a sentence.
        keys: Where the spec asks for it.
        selectors: Which nodes they are.
        scope: Name of the stage; None for a group, which may share its stage with others.
    """

    label: str
    keys: tuple[str | int, ...]
    selectors: tuple[Selector, ...]
    scope: str | None = None


def asked_of(partition: Partition) -> list[Asked]:
    """Return what ``partition`` wants in one stage, scopes first."""
    scopes = [
        Asked(
            f"the scope `{name}`",
            ("partition", "scopes", name),
            tuple(Selector(node=pattern) for pattern in patterns),
            name,
        )
        for name, patterns in partition.scopes.items()
    ]
    groups = [
        Asked(f"group {index + 1} of `keep_together`", ("partition", "keep_together", index), group)
        for index, group in enumerate(partition.keep_together)
    ]
    return scopes + groups


@dataclass(frozen=True, slots=True)
class FlowNode:
    """A node of a main graph, with what is in its bodies.

    Attributes:
        name: Of the node.
        kinds: Op and name, its own first, then those of the nodes in its bodies.
        reads: Names of the tensors that it reads, the bodies too.
        makes: Names of its outputs.
    """

    name: str
    kinds: tuple[tuple[str, str], ...]
    reads: frozenset[str]
    makes: tuple[str, ...]


def numbers_of(nodes: Sequence[FlowNode], selectors: Sequence[Selector]) -> frozenset[int]:
    """Return the numbers of the nodes that one of ``selectors`` means, or a node in their bodies.

    It is what `Selector.matches` says, asked of many nodes at once.
    """
    ops = {each.op for each in selectors if each.node is None}
    names = {each.node for each in selectors if each.node is not None}
    matches = re.compile("|".join(map(fnmatch.translate, sorted(filter(None, names))))).match
    return frozenset(
        number
        for number, node in enumerate(nodes)
        if any(op in ops or name in names or (names and matches(name)) for op, name in node.kinds)
    )


@dataclass(frozen=True, slots=True)
class Member:
    """A stage that a spec asks for, and its nodes by number."""

    asked: Asked
    nodes: frozenset[int]

    @property
    def label(self) -> str:
        """What it is called in a sentence."""
        return self.asked.label


class Flow:
    """A graph as the edges between its nodes, and the stages that a spec asks for in it.

    Args:
        names: Of the nodes; their positions are their numbers.
        after: Number of a node -> those of the nodes that read what it makes.
        members: The stages, scopes first.
    """

    def __init__(
        self,
        names: Sequence[str],
        after: Sequence[Collection[int]],
        members: Sequence[Member],
    ) -> None:
        self.names = names
        self.after = after
        self.members = [each for each in members if each.nodes]

    @classmethod
    def of(cls, nodes: Sequence[FlowNode], asked: Sequence[Asked]) -> Self:
        """Return the flow of a model as it is written."""
        maker = {name: number for number, node in enumerate(nodes) for name in node.makes}
        after: list[set[int]] = [set() for _ in nodes]
        for number, node in enumerate(nodes):
            if node.kinds[0][0] in SHAPE_OPS:
                continue
            for name in node.reads & maker.keys():
                after[maker[name]].add(number)
        members = [Member(each, numbers_of(nodes, each.selectors)) for each in asked]
        return cls([node.name for node in nodes], [sorted(each) for each in after], members)

    @property
    def stages(self) -> list[Member]:
        """The members but for groups within a scope, which are in one stage as it is."""
        scopes = [each.nodes for each in self.members if each.asked.scope is not None]
        return [
            each
            for each in self.members
            if each.asked.scope is not None or not any(each.nodes <= scope for scope in scopes)
        ]

    def apart(self) -> list[Member]:
        """Return the stages, of those that share a node one: that of the first."""
        merged: list[Member] = []
        for member in self.stages:  # groups with a node in common are one stage
            nodes = member.nodes
            for other in [each for each in merged if not each.nodes.isdisjoint(nodes)]:
                merged.remove(other)
                member, nodes = other, nodes | other.nodes
            merged.append(replace(member, nodes=nodes))
        return merged

    def problems(self, place: PlaceOf) -> Iterator[Diagnostic]:
        """Yield what keeps the stages from being stages.

        Each alone first; whether they wait for each other is asked where nothing else is wrong.
        """
        found = [*self._shared(place), *self._left_and_entered(place)]
        yield from found
        if not found:
            yield from self._in_a_circle(place)

    def _shared(self, place: PlaceOf) -> Iterator[Diagnostic]:
        """Yield nodes in two scopes, and groups that are partly in one."""
        scopes = [each for each in self.members if each.asked.scope is not None]
        home: dict[int, Member] = {}
        told: set[tuple[str, str]] = set()
        for member in scopes:
            for node in sorted(member.nodes):
                other = home.setdefault(node, member)
                if other is not member and (pair := (other.label, member.label)) not in told:
                    told.add(pair)
                    count = len(other.nodes & member.nodes)
                    more = f" and {count - 1} more nodes are" if count > 1 else " is"
                    yield Diagnostic(
                        "node-in-two-scopes",
                        f"`{self.names[node]}`{more} in {other.label} and in {member.label}",
                        "let one pattern match less: a node is in one stage",
                        place(*member.asked.keys),
                    )
        for member in self.members:
            if member.asked.scope is not None:
                continue
            inside = {home[node].label: node for node in sorted(member.nodes) if node in home}
            outside = [node for node in sorted(member.nodes) if node not in home]
            if len(inside) > 1 or (inside and outside):
                label, node = next(iter(inside.items()))
                apart = outside[0] if outside else [*inside.values()][1]
                yield Diagnostic(
                    "group-across-scopes",
                    f"{member.label} holds `{self.names[node]}`, which is in {label}, and "
                    f"`{self.names[apart]}`, which is not",
                    f"put all of them into {label}, or none: a scope is a stage of its own",
                    place(*member.asked.keys),
                )

    def _left_and_entered(self, place: PlaceOf) -> Iterator[Diagnostic]:
        """Yield the stages that a path leaves and enters again."""
        scopes = [each for each in self.stages if each.asked.scope is not None]
        for member in self.stages:
            if member in scopes and any(
                each is not member and not each.nodes.isdisjoint(member.nodes) for each in scopes
            ):
                continue  # too much matches: where it is left follows from that
            home = dict.fromkeys(member.nodes, 0)
            path = self._way_back(home, 0)
            if path is None:
                continue
            between = next(node for node in path if node not in member.nodes)
            yield Diagnostic(
                "cannot-stay-whole",
                f"{member.label} cannot be one stage: a path leaves it and enters it again, "
                f"{self.shown(path)}",
                f"let it hold `{self.names[between]}` too, and what else is on the way, or end it "
                "before it",
                place(*member.asked.keys),
            )

    def _in_a_circle(self, place: PlaceOf) -> Iterator[Diagnostic]:
        """Yield the first circle of stages that wait for each other."""
        merged = self.apart()
        home = {node: number for number, member in enumerate(merged) for node in member.nodes}
        if not self._waits(home):
            return
        for number, member in enumerate(merged):
            path = self._way_back(home, number)
            if path is None:
                continue
            met = dict.fromkeys(home[node] for node in path if node in home)
            labels = [merged[each].label for each in met]
            problem = (
                f"{' and '.join(labels)} wait for each other: {self.shown(path)}"
                if len(labels) > 1
                else f"{member.label}, with the groups that share a node with it, cannot be one "
                f"stage: a path leaves it and enters it again, {self.shown(path)}"
            )
            yield Diagnostic(
                "stages-in-a-circle",
                problem,
                "move the nodes of this path from one to the other, or make two stages of one",
                place(*member.asked.keys),
            )
            return

    def _waits(self, home: Mapping[int, int]) -> bool:
        """Whether no order of the stages runs all: what is left when all that can run has run."""
        total = len(self.names)
        stage = [total + home[node] if node in home else node for node in range(total)]
        edges: dict[int, set[int]] = {each: set() for each in stage}
        for node, readers in enumerate(self.after):
            edges[stage[node]].update(stage[reader] for reader in readers)
        waiting = dict.fromkeys(edges, 0)
        for each, readers in edges.items():
            readers.discard(each)
            for reader in readers:
                waiting[reader] += 1
        ready = [each for each, count in waiting.items() if not count]
        done = 0
        while ready:
            done += 1
            for reader in edges[ready.pop()]:
                waiting[reader] -= 1
                if not waiting[reader]:
                    ready.append(reader)
        return done < len(edges)

    def points_inside(
        self, nodes: Sequence[FlowNode], points: Sequence[Point], place: PlaceOf
    ) -> Iterator[Diagnostic]:
        """Yield the partition points that would end a stage in the middle of one of the stages."""
        maker = {name: number for number, node in enumerate(nodes) for name in node.makes}
        for index, point in enumerate(points):
            where = place("partition", "points", index)
            if point.node is not None:
                matched = numbers_of(nodes, [Selector(node=point.node)])
                edges = [(n, m) for n in sorted(matched) for m in self.after[n] if m not in matched]
                if matched and not edges:
                    yield Diagnostic(
                        "point-is-no-cut",
                        f"nothing goes from a node that matches `{point.node}` to one that does not: "
                        "no stage ends there",
                        "write a pattern that leaves out the nodes behind the cut",
                        where,
                        "warning",
                    )
            elif point.tensor in maker:
                made = maker[point.tensor]
                edges = [(made, m) for m in self.after[made] if point.tensor in nodes[m].reads]
            else:
                continue
            for member in self.members:
                inside = [e for e in edges if e[0] in member.nodes and e[1] in member.nodes]
                if inside:
                    yield Diagnostic(
                        "point-inside-stage",
                        f"this ends a stage inside {member.label}, which is to be one: "
                        f"{self.shown(inside[0])}",
                        "leave the point out, or let the stage end there",
                        where,
                    )

    def _way_back(self, home: Mapping[int, int], start: int) -> list[int] | None:
        """Return the nodes of a shortest path that leaves a stage and enters it again, or None.

        Args:
            home: Node -> number of its stage; nodes without are stages of their own.
            start: Number of the stage.
        """
        nodes_of: dict[int, list[int]] = {}
        for node, number in home.items():
            nodes_of.setdefault(number, []).append(node)
        came: dict[int, tuple[int, int]] = {}  # stage -> the edge by which it was reached first
        total = len(self.names)

        def stage(node: int) -> int:
            return total + home[node] if node in home else node

        def back(edge: tuple[int, int]) -> list[int]:
            path = [edge[1]]
            while True:
                if path[-1] != edge[0]:
                    path.append(edge[0])
                if stage(edge[0]) == total + start:
                    return path[::-1]
                edge = came[stage(edge[0])]
                if path[-1] != edge[1]:
                    path.append(edge[1])

        pending = deque([total + start])
        while pending:
            here = pending.popleft()
            for node in sorted(nodes_of[here - total]) if here >= total else (here,):
                for reader in self.after[node]:
                    there = stage(reader)
                    if there == total + start:
                        if here != there:
                            return back((node, reader))
                    elif there != here and there not in came:
                        came[there] = (node, reader)
                        pending.append(there)
        return None

    def shown(self, path: Sequence[int]) -> str:
        """Return a path of nodes for a sentence, a long one without its middle."""
        names = [f"`{self.names[node]}`" for node in path]
        if len(names) > SHOWN_NODES:
            left = len(names) - SHOWN_NODES + 1
            half = SHOWN_NODES // 2
            names[half : half + left] = [f"({left} more)"]
        return " -> ".join(names)
