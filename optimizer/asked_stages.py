"""What a spec wants in one stage, followed from the nodes of the original to those passes leave.

The tensors around a scope, a group, or the nodes of a partition point are kept alive, so that no pass
merges across them. What passes merge all the same, such as a node that two scopes compute alike, goes
to the stage that runs first: there all it reads is at hand, and nobody waits who did not wait before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import networkx as nx
import onnx_graphsurgeon as gs

from optc.passes.graph import bodies_of, nodes_in, reads
from optc.passes.shape import Shapes
from optc.specs.compile_spec import Partition, Selector
from optc.specs.diagnostic import Diagnostic, PlaceOf, SpecError
from optc.specs.stage_problem import SHAPE_OPS, Asked, Flow, FlowNode, Member, numbers_of


@dataclass(frozen=True, slots=True)
class AskedStages:
    """What a spec wants in one stage, in terms of the original model.

    Attributes:
        stages: Scopes and groups, those that share a node as one, each with its nodes.
        outer: Name of a node, bodies included -> that of the node of the main graph that it is in.
        rank: Name of a node of the main graph -> its place in an order in which stages could run.
        points: Tensors that go from the nodes of a partition point to others.
        kept: Tensors around all of these.
        place: Tells where the spec says what.
    """

    stages: tuple[tuple[Asked, frozenset[str]], ...]
    outer: Mapping[str, str]
    rank: Mapping[str, int]
    points: frozenset[str]
    kept: frozenset[str]
    place: PlaceOf

    @classmethod
    def of(
        cls,
        graph: gs.Graph,
        partition: Partition,
        asked: Sequence[Asked],
        shapes_of: Callable[[], Shapes],
        place: PlaceOf,
    ) -> Self:
        """Return what ``partition`` wants of ``graph``, the original model.

        Args:
            graph: Not changed.
            partition: Its points count here.
            asked: Its scopes and groups, as `optc.specs.stage_problem.asked_of` gives them.
            shapes_of: Infers the shapes of ``graph``; called only where they are needed.
            place: Tells where the spec says what.

        Raises:
            SpecError: If a path is in the way of a stage.
        """
        by_node = [point.node for point in partition.points if point.node is not None]
        if not asked and not by_node:
            return cls((), {}, {}, frozenset(), frozenset(), place)
        nodes = [_flow_node(node) for node in graph.nodes]
        flow = _sound_flow(nodes, asked, place)
        stages = flow.apart()
        matched = [numbers_of(nodes, [Selector(node=pattern)]) for pattern in by_node]
        shapes = shapes_of()
        edges = _Edges(nodes, shapes)
        return cls(
            tuple((each.asked, frozenset(nodes[n].name for n in each.nodes)) for each in stages),
            {name: node.name for node in nodes for _, name in node.kinds},
            _rank(flow, stages),
            frozenset(name for each in matched for name in edges.out_of(each)),
            frozenset(
                name
                for each in (*matched, *(stage.nodes for stage in stages))
                for name in (*edges.out_of(each), *edges.into(each))
            ),
            place,
        )

    def on(
        self,
        graph: gs.Graph,
        origins: Mapping[str, Sequence[str]],
        is_free: Callable[[gs.Node], bool],
        alone: Collection[str] = (),
    ) -> tuple[dict[str, frozenset[str]], list[frozenset[str]]]:
        """Return scopes and groups in terms of ``graph``, which passes made of the original.

        Args:
            graph: What passes made.
            origins: Node of it -> the nodes of the original that it stands for.
            is_free: Whether a node makes nothing but sizes, so that any stage may repeat it.
            alone: Names of nodes that are stages by themselves.

        Returns:
            Name of each scope -> its nodes; the nodes of each group that is in no scope.

        Raises:
            SpecError: If a path is in the way of a stage now, though none was before.
        """
        if not self.stages:
            return {}, []
        outputs = {tensor.name for tensor in graph.outputs}
        free = {
            number
            for number, node in enumerate(graph.nodes)
            if is_free(node)
            and not bodies_of(node)
            and outputs.isdisjoint(tensor.name for tensor in node.outputs)
        }
        members = self._members(graph, origins, free)
        names = [node.name for node in graph.nodes]
        flow = Flow(names, _after(graph, free), members)
        problems = [
            replace(problem, problem=f"{problem.problem} (in the optimised model)")
            for problem in flow.problems(self.place)
        ]
        for each in members:
            by_module = [n for n in sorted(each.nodes) if names[n] in alone]
            if by_module and len(each.nodes) > 1:
                problems.append(_with_module(each, names[by_module[0]], self.place))
        if problems:
            raise SpecError(*problems)
        scopes = {
            each.asked.scope: frozenset(names[number] for number in each.nodes)
            for each in members
            if each.asked.scope is not None and each.nodes
        }
        groups = [
            frozenset(names[number] for number in each.nodes)
            for each in members
            if each.asked.scope is None and len(each.nodes) > 1
        ]
        return scopes, groups

    def _members(
        self, graph: gs.Graph, origins: Mapping[str, Sequence[str]], free: Collection[int]
    ) -> list[Member]:
        """Return the stages with those nodes of ``graph`` that came of theirs, but for free ones."""
        home = {name: index for index, (_, names) in enumerate(self.stages) for name in names}
        found: list[list[int]] = [[] for _ in self.stages]
        for number, node in enumerate(graph.nodes):
            parts = {
                self.outer[origin]
                for each in nodes_in(node)
                for origin in origins.get(each.name, ())
                if origin in self.outer
            }
            first = min(parts, key=self.rank.__getitem__, default=None)
            if first in home and number not in free:
                found[home[first]].append(number)
        return [
            Member(asked, frozenset(numbers))
            for (asked, _), numbers in zip(self.stages, found, strict=True)
        ]


def _with_module(member: Member, node: str, place: PlaceOf) -> Diagnostic:
    return Diagnostic(
        "module-inside-stage",
        f"{member.label} holds `{node}` and other nodes: torch runs it, in a stage of its own",
        "leave it out, or let the module stand for all of them",
        place(*member.asked.keys),
    )


def nodes_of_scope(
    graph: gs.Graph, asked: Sequence[Asked], scope: str, place: PlaceOf
) -> frozenset[str]:
    """Return the names of the nodes that ``scope`` holds of ``graph``, the original model.

    Raises:
        SpecError: If something is in the way of a stage that the spec asks for.
    """
    flow = _sound_flow([_flow_node(node) for node in graph.nodes], asked, place)
    (member,) = [each for each in flow.members if each.asked.scope == scope]
    return frozenset(flow.names[number] for number in member.nodes)


def _sound_flow(nodes: Sequence[FlowNode], asked: Sequence[Asked], place: PlaceOf) -> Flow:
    """Return the flow of a model in which nothing is in the way of what is asked.

    The check of the spec asked the same, but of a model whose functions were not inlined.
    """
    flow = Flow.of(nodes, asked)
    found = {member.asked.keys for member in flow.members}
    problems = [
        Diagnostic(
            "unknown-node",
            f"{each.label} holds no node: its patterns match constants or calls of functions alone, "
            "in whose place other nodes stand",
            "see with `optc optimize` what the nodes of the model are called",
            place(*each.keys),
        )
        for each in asked
        if each.scope is not None and each.keys not in found
    ]
    if problems := [*problems, *flow.problems(place)]:
        raise SpecError(*problems)
    return flow


class _Edges:
    """The tensors between nodes, but for sizes that are known without computing anything else."""

    def __init__(self, nodes: Sequence[FlowNode], shapes: Shapes) -> None:
        self._nodes = nodes
        self._makers = {
            name: number
            for number, node in enumerate(nodes)
            for name in node.makes
            if name and not shapes.is_size(name)
        }
        self._readers: dict[str, list[int]] = {}
        for number, node in enumerate(nodes):
            if node.kinds[0][0] not in SHAPE_OPS:
                for name in node.reads & self._makers.keys():
                    self._readers.setdefault(name, []).append(number)

    def out_of(self, inside: frozenset[int]) -> list[str]:
        """Return what the nodes ``inside`` make and others read."""
        return [
            name
            for number in inside
            for name in self._nodes[number].makes
            if any(reader not in inside for reader in self._readers.get(name, ()))
        ]

    def into(self, inside: frozenset[int]) -> list[str]:
        """Return what the nodes ``inside`` read and others make."""
        return [
            name
            for number in inside
            if self._nodes[number].kinds[0][0] not in SHAPE_OPS
            for name in self._nodes[number].reads & self._makers.keys()
            if self._makers[name] not in inside
        ]


def _flow_node(node: gs.Node) -> FlowNode:
    return FlowNode(
        node.name,
        tuple((each.op, each.name) for each in nodes_in(node)),
        frozenset(t.name for t in reads(node) if not isinstance(t, gs.Constant)),
        tuple(tensor.name for tensor in node.outputs),
    )


def _rank(flow: Flow, stages: Sequence[Member]) -> dict[str, int]:
    """Return for each node its place in an order of the stages; other nodes are their own."""
    stage = {node: -1 - index for index, each in enumerate(stages) for node in each.nodes}
    graph = nx.DiGraph()
    for node, readers in enumerate(flow.after):
        here = stage.get(node, node)
        graph.add_node(here)
        there = (stage.get(reader, reader) for reader in readers)
        graph.add_edges_from((here, each) for each in there if each != here)
    place = {each: number for number, each in enumerate(nx.topological_sort(graph))}
    return {name: place[stage.get(node, node)] for node, name in enumerate(flow.names)}


def _after(graph: gs.Graph, free: set[int]) -> list[set[int]]:
    """Return for each node those that read what it makes, also through nodes that are free."""
    roots: dict[str, frozenset[int]] = {}  # tensor -> the nodes that are not free and lead to it
    after: list[set[int]] = [set() for _ in graph.nodes]
    for number, node in enumerate(graph.nodes):  # in topological order
        made = frozenset((number,))
        sources: set[int] = set()
        for tensor in reads(node):
            sources |= roots.get(tensor.name, frozenset())
        if number in free:
            made = frozenset(sources)
        else:
            for source in sources:
                after[source].add(number)
        roots.update((tensor.name, made) for tensor in node.outputs)
    return after
