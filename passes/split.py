"""Splits a graph into stages: the fewest engines, with the rest on the fallback runtime.

    level(v) = max over what v reads, made by u, of
               level(u) + [u on TensorRT, and v off TensorRT or the tensor is a partition point]

Nodes on TensorRT of one level form one engine; nodes off it of one level form one fallback stage,
which runs before the engine of its level. Why it holds: an edge between two engines, or from an
engine into a fallback stage, raises the level, so the stages are acyclic by construction; and a path
that alternates k times needs k engines under any scheme, so their number is minimal. It is linear
and does not depend on the order in which nodes are listed.

Shape arithmetic is not cut: a node that makes nothing but sizes is *free*. It has no level of its
own; each stage that needs its result computes it again from the tensors it starts from, because
TensorRT takes no shape tensors as engine inputs without value ranges, and bytes are cheaper computed
than sent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import networkx as nx
import onnx_graphsurgeon as gs
from networkx.utils import UnionFind

from optc.passes.graph import bodies_of, dataflow, reads
from optc.passes.legalising import Recipe
from optc.passes.placement import Arc, Passed, place
from optc.passes.precision import NodePrecision
from optc.specs.manifest import Runtime

CHEAP = frozenset({"Cast", "ConstantOfShape", "DequantizeLinear", "Expand", "Range"})
"""Ops that do next to nothing for an element, and may make more than they read."""

REPLACED = "optc.replaced"
"""Domain of a node that stands for a range of nodes; its op is the name that the spec gives it."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a graph that runs as a whole on one runtime.

    Attributes:
        runtime: Where it runs.
        nodes: Names of the nodes it owns, in topological order. Every node of the graph is owned by
            exactly one stage.
        repeated: Names of free nodes that it computes again, owned by an earlier stage.
        inputs: Tensors it reads from the caller or from other stages, in the order first read.
        outputs: Tensors it makes that other stages or the caller read.
        free: Those of ``nodes`` and ``repeated`` that make nothing but sizes. They are no reason for
            a stage, and never to blame.
        recipes: How those of ``nodes`` are rewritten that TensorRT would refuse as they are.
        lowered: Those of ``nodes``, and of the nodes in their bodies, that compute in less than
            fp32, each with its precision.
        name: What the spec calls it; None where it gives it no name.
    """

    runtime: Runtime
    nodes: tuple[str, ...]
    repeated: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    free: tuple[str, ...] = ()
    recipes: tuple[Recipe, ...] = ()
    lowered: tuple[tuple[str, NodePrecision], ...] = ()
    name: str | None = None

    @property
    def work(self) -> tuple[str, ...]:
        """The nodes it owns that make more than sizes."""
        free = set(self.free)
        return tuple(name for name in self.nodes if name not in free)


@dataclass(frozen=True, slots=True)
class Crossing:
    """A tensor that passes between stages.

    Attributes:
        tensor: Its name.
        maker: Index of the stage that makes it.
        readers: Indices of the stages that read it, ascending.
    """

    tensor: str
    maker: int
    readers: tuple[int, ...]

    @property
    def boundaries(self) -> int:
        """How many boundaries between stages it lives across."""
        return self.readers[-1] - self.maker


def crossings(stages: Sequence[Stage]) -> list[Crossing]:
    """Return what passes between ``stages``, in the order in which it is made."""
    readers: dict[str, list[int]] = {}
    for index, stage in enumerate(stages):
        for name in stage.inputs:
            readers.setdefault(name, []).append(index)
    return [
        Crossing(name, index, tuple(readers[name]))
        for index, stage in enumerate(stages)
        for name in stage.outputs
        if name in readers
    ]


class CutApart(Exception):
    """Nodes that are to stay together cannot: a path leads out of them and back.

    Attributes:
        path: Names of the nodes along it. The first and the last are to stay together.
    """

    def __init__(self, path: Sequence[str]) -> None:
        super().__init__(" -> ".join(path))
        self.path = tuple(path)


class Splitter:
    """Splits one graph, as often as nodes turn out to be off TensorRT.

    Args:
        graph: Topologically sorted; bodies go with their node.
        points: Names of tensors where a stage must end.
        is_free: Whether a node makes nothing but sizes and may be computed more than once.
        fallback: Runtime of what is off TensorRT.
        bytes_of: Returns the bytes of a tensor, by its name, at usual extents; None where nobody
            knows, as nothing bounds them.
        units: Nodes that stay in one stage. Where one is off TensorRT, all of its unit are.
        scopes: Name of a stage -> the nodes it holds, and no others.
        runtimes: Name of a node that is off TensorRT -> who runs it, if not ``fallback``. One on
            ``torch`` is a stage by itself.

    Raises:
        CutApart: If a unit or a scope cannot stay whole.
    """

    def __init__(
        self,
        graph: gs.Graph,
        *,
        points: Collection[str] = (),
        is_free: Callable[[gs.Node], bool] = lambda node: False,
        fallback: Runtime = "onnxruntime",
        bytes_of: Callable[[str], int | None] = lambda name: 1,
        units: Sequence[Collection[str]] = (),
        scopes: Mapping[str, Collection[str]] = MappingProxyType({}),
        runtimes: Mapping[str, Runtime] = MappingProxyType({}),
    ) -> None:
        self.view = dataflow(graph)  # in topological order, bodies contracted
        self.points = frozenset(points)
        self.fallback = fallback
        self.runtimes = runtimes
        self.outputs = frozenset(tensor.name for tensor in graph.outputs)
        self.place = {name: place for place, name in enumerate(self.view)}
        self.scope_of = {node: name for name, nodes in scopes.items() for node in nodes}
        self.unit_of = self._joined([*units, *scopes.values()])
        self.makers = {
            tensor.name: name
            for name, node in self.view.nodes(data="node")
            for tensor in node.outputs
            if tensor.name
        }
        sizes = {name: bytes_of(name) for name in self.makers}
        # What nobody knows the size of shall not enter an engine, which wants a largest extent.
        unknown = 1 + sum(size for size in sizes.values() if size is not None)
        self.bytes = {n: unknown if size is None else size for n, size in sizes.items()}
        may_repeat = {n: node for n, node in self.view.nodes(data="node") if self._may_repeat(node)}
        self.sizes = {name for name, node in may_repeat.items() if is_free(node)}
        self.repeatable = self.sizes | {
            name for name, node in may_repeat.items() if self._is_cheaper_again(node, sizes)
        }
        self._check_units()

    def split(self, off: Collection[str]) -> list[Stage]:
        """Return the stages of the graph in running order.

        Args:
            off: Names of nodes that cannot or shall not run on TensorRT.
        """
        return _Split(self, off).stages()

    def drags(self, off: Collection[str]) -> dict[str, str]:
        """Return the nodes that go off with one of ``off`` -> that node."""
        cause: dict[str, str] = {}
        for name in sorted(off, key=self.place.__getitem__):
            if name in self.unit_of:
                cause.setdefault(self.unit_of[name], name)
        return {
            name: cause[unit]
            for name, unit in self.unit_of.items()
            if unit in cause and name not in off and name not in self.repeatable
        }

    def _joined(self, groups: Iterable[Collection[str]]) -> dict[str, str]:
        """Return name of a node of any group -> the first node of all that it stays with."""
        sets = UnionFind()
        for group in groups:
            sets.union(*sorted(group, key=self.place.__getitem__))
        found = {}
        for members in sets.to_sets():
            first = min(members, key=self.place.__getitem__)
            found.update(dict.fromkeys(members, first))
        return found

    def _may_repeat(self, node: gs.Node) -> bool:
        if bodies_of(node) or any(self.runtimes.get(n) for n in self.view.successors(node.name)):
            return False
        return not any(t.name in self.outputs or t.name in self.points for t in node.outputs)

    def _is_cheaper_again(self, node: gs.Node, sizes: Mapping[str, int | None]) -> bool:
        """Whether ``node`` does next to nothing, and reads less than it makes."""
        if (node.domain or "") or node.op not in CHEAP:
            return False
        made = sum(self.bytes[tensor.name] for tensor in node.outputs if tensor.name)
        read = {t.name for t in node.inputs if t.name and not isinstance(t, gs.Constant)}
        if any(name in self.makers and sizes[name] is None for name in read):
            return False
        return sum(self.bytes.get(name, 0) for name in read) < made

    def _check_units(self) -> None:
        """Make sure that no path leads out of a unit and back into it, but for what is repeated.

        Raises:
            CutApart: Showing a path.
        """
        _Items(self, self.repeatable)


class _Items:
    """What cannot be cut: nodes and units, numbered in a topological order; free nodes left out.

    Attributes:
        names: For each item its nodes, in topological order.
        of: Name of a node -> its item.
        reads: Name of a node that is not free -> the tensors that it reads, through free nodes too.
    """

    def __init__(self, splitter: Splitter, free: Collection[str]) -> None:
        view = splitter.view
        roots: dict[str, dict[str, None]] = {}  # free node -> tensors that its result comes from
        reads_of: dict[str, dict[str, None]] = {}
        members: dict[str, list[str]] = {}
        for name in view:
            read: dict[str, None] = {}
            for maker, _, tensors in view.in_edges(name, data="tensors"):
                read.update(roots[maker] if maker in free else dict.fromkeys(tensors))
            if name in free:
                roots[name] = read
            else:
                members.setdefault(splitter.unit_of.get(name, name), []).append(name)
                reads_of[name] = read
        unit = {name: first for first, names in members.items() for name in names}
        made_by = splitter.makers
        order = list(members)
        if splitter.unit_of:  # they stand behind all that one of their nodes reads
            graph = nx.DiGraph()
            graph.add_nodes_from(members)
            for name, read in reads_of.items():
                graph.add_edges_from(
                    (unit[made_by[t]], unit[name]) for t in read if unit[made_by[t]] != unit[name]
                )
            try:
                order = list(nx.lexicographical_topological_sort(graph, splitter.place.get))
            except nx.NetworkXUnfeasible as error:
                raise CutApart(_way_back(graph, members, view)) from error
        self.names = [members[first] for first in order]
        number = {first: index for index, first in enumerate(order)}
        self.of = {name: number[first] for name, first in unit.items()}
        self.reads = reads_of


def _way_back(
    items: nx.DiGraph, members: Mapping[str, Sequence[str]], view: nx.DiGraph
) -> list[str]:
    """Return the nodes of the shortest path that leaves a unit and enters it again."""
    best: list[str] = []
    units = [
        first
        for part in nx.strongly_connected_components(items)
        for first in sorted(part)
        if len(part) > 1 and len(members[first]) > 1
    ]
    for first in units:
        inside = set(members[first])
        starts = [n for m in members[first] for n in view.successors(m) if n not in inside]
        distance = nx.multi_source_dijkstra_path(view, set(starts)) if starts else {}
        ends = [distance[m] for m in members[first] if m in distance]
        for path in ends:
            start = next(m for m in members[first] if view.has_edge(m, path[0]))
            if not best or len(path) + 1 < len(best):
                best = [start, *path]
    return best


def quantised(graph: gs.Graph) -> list[list[str]]:
    """Return the operators on quantised values, each with what rounds its result again.

    TensorRT computes them in 8 bits only where both are in one engine. What makes its operands floats
    is repeated in any case.
    """
    return [
        [node.name, *(reader.name for reader in node.outputs[0].outputs)]
        for node in graph.nodes
        if len(node.outputs) == 1
        and node.outputs[0].outputs
        and all(reader.op == "QuantizeLinear" for reader in node.outputs[0].outputs)
        and any(t.inputs and t.inputs[0].op == "DequantizeLinear" for t in node.inputs)
    ]


def split(
    graph: gs.Graph,
    off: Collection[str],
    *,
    points: Collection[str] = (),
    is_free: Callable[[gs.Node], bool] = lambda node: False,
    fallback: Runtime = "onnxruntime",
) -> list[Stage]:
    """Return the stages of ``graph`` in running order: `Splitter` for one question."""
    return Splitter(graph, points=points, is_free=is_free, fallback=fallback).split(off)


StageKey = tuple[int, int, int, int, int, str]
"""Level; 0 off TensorRT, 1 on it; which part of the fallback of a level; 0 on torch, 1 else; how many
nodes on torch come before it in its part; scope, or the node that is a stage by itself."""


class _Split:
    """One split: ``off`` and all that follows from it."""

    def __init__(self, splitter: Splitter, off: Collection[str]) -> None:
        self.splitter = splitter
        self.view = splitter.view
        self.off = {*off, *splitter.drags(off)}
        self.free = splitter.repeatable - self.off
        self.items = _Items(splitter, self.free)
        self.on = [names[0] not in self.off for names in self.items.names]

    def stages(self) -> list[Stage]:
        members: dict[StageKey, list[str]] = {}
        for item, key in enumerate(self._keys()):
            members.setdefault(key, []).extend(self.items.names[item])
        order = sorted(members)
        contents: list[tuple[set[str], set[str]]] = []  # owned and repeated, stage by stage
        at_home: set[str] = set()  # free nodes that some stage owns: the first that needs them
        for key in order:
            needed = self._free_nodes_behind(members[key])
            contents.append(({*members[key], *(needed - at_home)}, needed & at_home))
            at_home |= needed
        inputs = [self._inputs(owned | repeated) for owned, repeated in contents]
        sent = {name for names in inputs for name in names}
        return [
            self._stage(key, owned, repeated, names, sent)
            for key, (owned, repeated), names in zip(order, contents, inputs, strict=True)
        ]

    def _keys(self) -> list[StageKey]:
        """Return the stage of each item."""
        items, splitter = self.items, self.splitter
        scopes = [splitter.scope_of.get(names[0], "") for names in items.names]
        torch = [
            not on and splitter.runtimes.get(names[0]) == "torch"
            for on, names in zip(self.on, items.names, strict=True)
        ]
        arcs: dict[tuple[int, int], bool] = {}  # maker and reader -> whether a cut is asked for
        passed: dict[str, set[int]] = {}
        for name, read in items.reads.items():
            reader = items.of[name]
            for tensor in read:
                maker = items.of[splitter.makers[tensor]]
                if maker == reader:
                    continue
                cut = tensor in splitter.points or scopes[maker] != scopes[reader]
                arcs[maker, reader] = arcs.get((maker, reader), False) or cut
                passed.setdefault(tensor, set()).add(reader)
        on = self.on
        levels = place(
            on,
            (Arc(u, v, int(on[u] and (cut or not on[v]))) for (u, v), cut in arcs.items()),
            (
                Passed(items.of[splitter.makers[tensor]], tuple(readers), splitter.bytes[tensor])
                for tensor, readers in passed.items()
            ),
        )
        # Within the fallback of a level torch takes the place of what is off, and the rest of what
        # is on: the same rule gives the fewest parts.
        parts, depths = [0] * len(on), [0] * len(on)
        makers_of: list[list[tuple[int, bool]]] = [[] for _ in on]
        for (maker, reader), cut in arcs.items():
            if not on[reader] and not on[maker] and levels[maker] == levels[reader]:
                makers_of[reader].append((maker, cut))
        for item, makers in enumerate(makers_of):
            for maker, cut in makers:
                step = not torch[maker] and (torch[item] or cut)
                parts[item] = max(parts[item], parts[maker] + step)
            before = (depths[m] + 1 for m, _ in makers if torch[m] and parts[m] == parts[item])
            depths[item] = max(before, default=0) if torch[item] else 0
        return [
            (level, 1, 0, 1, 0, scopes[item])
            if on[item]
            else (
                level,
                0,
                parts[item],
                int(not torch[item]),
                depths[item],
                items.names[item][0] if torch[item] else scopes[item],
            )
            for item, level in enumerate(levels)
        ]

    def _free_nodes_behind(self, names: Iterable[str]) -> set[str]:
        """Return the free nodes whose results the named nodes read, directly or through others."""
        found: set[str] = set()
        pending = list(names)
        while pending:
            for maker in self.view.predecessors(pending.pop()):
                if maker in self.free and maker not in found:
                    found.add(maker)
                    pending.append(maker)
        return found

    def _sorted(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=self.splitter.place.__getitem__)

    def _inputs(self, inside: set[str]) -> tuple[str, ...]:
        """Return what the nodes ``inside`` read and do not make."""
        nodes = [self.view.nodes[name]["node"] for name in self._sorted(inside)]
        made = {tensor.name for node in nodes for tensor in node.outputs}
        read = [t for node in nodes for t in reads(node) if not isinstance(t, gs.Constant)]
        return tuple(dict.fromkeys(t.name for t in read if t.name not in made))

    def _stage(
        self,
        key: StageKey,
        owned: set[str],
        repeated: set[str],
        inputs: tuple[str, ...],
        sent: set[str],
    ) -> Stage:
        nodes = self._sorted(owned)
        first = self.view.nodes[nodes[0]]["node"]
        outputs = self.splitter.outputs
        return Stage(
            runtime="tensorrt" if key[1] else self.splitter.fallback if key[3] else "torch",
            nodes=tuple(nodes),
            repeated=tuple(self._sorted(repeated)),
            inputs=inputs,
            outputs=tuple(
                tensor.name
                for name in nodes
                for tensor in self.view.nodes[name]["node"].outputs
                if tensor.name and (tensor.name in outputs or tensor.name in sent)
            ),
            free=tuple(self._sorted(self.free & self.splitter.sizes & (owned | repeated))),
            name=(first.op if first.domain == REPLACED else None) if not key[3] else key[5] or None,
        )


def why_not_whole(graph: gs.Graph, stages: list[Stage]) -> str | None:
    """Return what is wrong with ``stages`` as a split of ``graph``, or None. Checked after each split.

    Every node is owned once; every input of a stage is an input of the graph or an output of an
    earlier stage; every output of the graph is made.
    """
    owned = [name for stage in stages for name in stage.nodes]
    if sorted(owned) != sorted(node.name for node in graph.nodes):
        return "a node is in no stage, or in two"
    made = {tensor.name for tensor in graph.inputs}
    for index, stage in enumerate(stages):
        missing = [name for name in stage.inputs if name not in made]
        if missing:
            return f"stage {index} reads `{missing[0]}` before it is made"
        made.update(stage.outputs)
    constants = {t.name for t in graph.outputs if isinstance(t, gs.Constant)}
    lost = [t.name for t in graph.outputs if t.name not in made | constants]
    return f"no stage makes the output `{lost[0]}`" if lost else None


def extract(graph: gs.Graph, stage: Stage) -> gs.Graph:
    """Return ``stage`` as a graph of its own. It shares nodes and tensors with ``graph``.

    Only for export: editing it would edit ``graph``, and its inputs still have their makers.
    """
    inside = {*stage.nodes, *stage.repeated}
    nodes = [node for node in graph.nodes if node.name in inside]
    tensors = {t.name: t for t in graph.inputs}
    tensors.update((t.name, t) for node in graph.nodes for t in node.outputs)
    part = gs.Graph(
        nodes,
        [tensors[name] for name in stage.inputs],
        [tensors[name] for name in stage.outputs],
        name=graph.name,
    )
    part.opset = graph.opset
    part.import_domains = graph.import_domains
    part.ir_version = graph.ir_version
    part.producer_name = "optc"
    part.producer_version = ""
    return part
