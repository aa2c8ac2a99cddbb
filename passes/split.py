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
from typing import Literal

import onnx_graphsurgeon as gs

from optc.passes.graph import bodies_of, dataflow, reads
from optc.passes.legalising import Recipe
from optc.passes.precision import NodePrecision

Runtime = Literal["tensorrt", "onnxruntime", "torch"]


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
        free: Those of ``nodes`` that are free. They are no reason for a stage, and never to blame.
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
        """The nodes it owns that are not free."""
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


class Splitter:
    """Splits one graph, as often as nodes turn out to be off TensorRT.

    Args:
        graph: Topologically sorted; bodies go with their node.
        points: Names of tensors where a stage must end.
        is_free: Whether a node makes nothing but sizes and may be computed more than once. Nodes
            that are off, control flow, and nodes that make an output or a point never are.
        fallback: Runtime of what is off TensorRT.
        bytes_of: Returns the bytes of a tensor, by its name, at usual extents.
        units: Nodes that stay in one stage. Where one is off TensorRT, all of its unit are.
        scopes: Name of a stage -> the nodes it holds, and no others.
        runtimes: Name of a node that has a runtime of its own -> that. One on ``torch`` is a stage
            by itself.
    """

    def __init__(
        self,
        graph: gs.Graph,
        *,
        points: Collection[str] = (),
        is_free: Callable[[gs.Node], bool] = lambda node: False,
        fallback: Runtime = "onnxruntime",
        bytes_of: Callable[[str], int] = lambda name: 1,
        units: Sequence[Collection[str]] = (),
        scopes: Mapping[str, Collection[str]] = MappingProxyType({}),
        runtimes: Mapping[str, Runtime] = MappingProxyType({}),
    ) -> None:
        self._graph = graph
        self._points = frozenset(points)
        self._is_free = is_free
        self._fallback = fallback

    def split(self, off: Collection[str]) -> list[Stage]:
        """Return the stages of the graph in running order.

        Args:
            off: Names of nodes that cannot or shall not run on TensorRT.
        """
        return _Split(
            self._graph, frozenset(off), self._points, self._is_free, self._fallback
        ).stages()


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


StageKey = tuple[int, int, int]
"""Level; 0 off TensorRT, 1 on it; which part of a fallback stage that points cut."""


class _Split:
    def __init__(
        self,
        graph: gs.Graph,
        off: frozenset[str],
        points: frozenset[str],
        is_free: Callable[[gs.Node], bool],
        fallback: Runtime,
    ) -> None:
        self.view = dataflow(graph)  # in topological order, bodies contracted
        self.off = off
        self.points = points
        self.fallback = fallback
        self.outputs = {tensor.name for tensor in graph.outputs}
        self.free = {
            name
            for name, node in self.view.nodes(data="node")
            if self._may_repeat(node) and is_free(node)
        }
        self.keys: dict[str, StageKey] = {}

    def _may_repeat(self, node: gs.Node) -> bool:
        if node.name in self.off or bodies_of(node):
            return False
        return not any(t.name in self.outputs or t.name in self.points for t in node.outputs)

    def stages(self) -> list[Stage]:
        self._assign_keys()
        members: dict[StageKey, list[str]] = {}
        for name, key in self.keys.items():
            members.setdefault(key, []).append(name)
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

    def _assign_keys(self) -> None:
        """Give every node that is not free its stage."""
        roots: dict[str, set[tuple[str, str]]] = {}  # free node -> what its result comes from
        for name in self.view:
            sources: set[tuple[str, str]] = set()  # maker and tensor
            for maker, _, tensors in self.view.in_edges(name, data="tensors"):
                if maker in self.free:
                    sources |= roots[maker]
                else:
                    sources.update((maker, tensor) for tensor in tensors)
            if name in self.free:
                roots[name] = sources
            else:
                self.keys[name] = self._key(name, sources)

    def _key(self, name: str, sources: Iterable[tuple[str, str]]) -> StageKey:
        on = name not in self.off
        level = part = 0
        for maker, tensor in sources:
            its_level, its_side, its_part = self.keys[maker]
            point = tensor in self.points
            if its_side == 1 and (point or not on):
                its_level, its_part = its_level + 1, 0
            elif its_side == 0 and not on and point:
                its_part += 1
            if its_level > level:
                level, part = its_level, 0
            if its_level == level and not on and its_side == 0:
                part = max(part, its_part)
        return (level, 1, 0) if on else (level, 0, part)

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

    def _inputs(self, inside: set[str]) -> tuple[str, ...]:
        """Return what the nodes ``inside`` read and do not make."""
        nodes = [node for name, node in self.view.nodes(data="node") if name in inside]
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
        return Stage(
            runtime="tensorrt" if key[1] else self.fallback,
            nodes=tuple(name for name in self.view if name in owned),
            repeated=tuple(name for name in self.view if name in repeated),
            inputs=inputs,
            outputs=tuple(
                tensor.name
                for name, node in self.view.nodes(data="node")
                if name in owned
                for tensor in node.outputs
                if tensor.name and (tensor.name in self.outputs or tensor.name in sent)
            ),
            free=tuple(name for name in self.view if name in owned and name in self.free),
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
