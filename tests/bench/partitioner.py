"""The rules by which graphs are cut into engines and the rest, and how a cut is measured.

Beside optc's own `PEERS` has, written anew from what is public of them, those of:

- **ONNX Runtime's TensorRT providers** (`runs_by_index`, `runs_by_depth`). ``GetCapability`` of
  ``onnxruntime/core/providers/tensorrt`` and ``nv_tensorrt_rtx``: nodes are taken in ONNX Runtime's
  topological order, and the parser returns one group for each run of supported nodes in it
  (``ModelImporter::supportsModel`` of onnx-tensorrt opens a new one after each refused node). Groups
  that are part of a cycle are dropped, which runs of a topological order never are. Then, if all
  groups together make no cycle, they become one. The order is that of ``GraphViewer``: by index
  among what is ready, Shape and Size first, in providers of today; depth first, back from what
  nobody reads, in older ones. The parser is taken to name all it refuses at once; the real
  one names some a round, and after ``trt_max_partition_iterations`` (1,000) rounds nothing at all
  goes to TensorRT. Nothing is dropped for its size (``trt_min_subgraph_size`` is 1).
- **ONNX Runtime's other providers** (`waves`): ``utils::CreateSupportedPartitions`` in
  ``onnxruntime/core/providers/partitioning_utils.cc``, as its comment describes it.
- **torch.fx** (`merged_backwards`): ``CapabilityBasedPartitioner.propose_partitions`` of
  ``torch/fx/passes/infra/partitioner.py``, with ``allows_single_node_partition``: without it, nodes
  that could run in an engine stay outside. `merged_along_edges` is the same with
  ``skip_horizontal_fusion``; some of what it makes, in the original too, is a cycle.

partitioner_check.py holds them against what there is of the originals.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.graph import Node
from optc.passes.split import Splitter, Stage


@dataclass(frozen=True)
class Dag:
    """A graph as partitioners see it. Nodes are numbered in the order in which they are listed.

    Attributes:
        reads: Node -> the tensors that it reads and that nodes make.
        makes: Node -> the tensors that it makes.
        sizes: Tensor -> its bytes.
        on: Node -> whether TensorRT takes it.
        ops: Node -> its operator.
    """

    reads: Sequence[Sequence[int]]
    makes: Sequence[Sequence[int]]
    sizes: Sequence[int]
    on: Sequence[bool]
    ops: Sequence[str]

    def __len__(self) -> int:
        return len(self.reads)

    @cached_property
    def maker(self) -> list[int]:
        """Tensor -> the node that makes it."""
        found = [-1] * len(self.sizes)
        for node, tensors in enumerate(self.makes):
            for tensor in tensors:
                found[tensor] = node
        return found

    @cached_property
    def before(self) -> list[list[int]]:
        """Node -> the nodes it reads from, each once, ascending."""
        return [sorted({self.maker[tensor] for tensor in tensors}) for tensors in self.reads]

    @cached_property
    def after(self) -> list[list[int]]:
        """Node -> the nodes that read from it, each once, ascending."""
        found: list[list[int]] = [[] for _ in self.reads]
        for node, makers in enumerate(self.before):
            for maker in makers:
                found[maker].append(node)
        return found

    @classmethod
    def like_a_network(cls, nodes: int, seed: int, *, refused: float = 0.06) -> Self:
        """Return a random graph with one tensor a node.

        A node reads the one before it or one shortly before; some add up two, the other of which may
        be far back, as in residual connections and feature pyramids. Sizes span 1 KiB to 4 MiB.
        """
        random = np.random.default_rng(seed)
        reads: list[list[int]] = [[]]
        for node in range(1, nodes):
            near = node - min(int(random.geometric(0.5)), node)
            found = {near}
            if random.random() < 0.3:
                found.add(node - min(int(random.geometric(0.08)), node))
            if random.random() < 0.001:
                found = set()  # reads an input of the graph only
            reads.append(sorted(found))
        sizes = (2 ** random.uniform(10, 22, nodes)).astype(int).tolist()
        on = (random.random(nodes) >= refused).tolist()
        return cls(reads, [[node] for node in range(nodes)], sizes, on, ["Relu"] * nodes)

    def listed_otherwise(self, seed: int) -> tuple[Self, list[int]]:
        """Return the same graph in another topological order, and which node each of it was."""
        random = np.random.default_rng(seed)
        key = random.permutation(len(self)).tolist()
        order = _by_key(self, key)
        return self._in_order(order), order

    def listed_anyhow(self, seed: int) -> Self:
        """Return the same graph in an order that need not be topological."""
        return self._in_order(np.random.default_rng(seed).permutation(len(self)).tolist())

    def _in_order(self, order: Sequence[int]) -> Self:
        return type(self)(
            [self.reads[node] for node in order],
            [self.makes[node] for node in order],
            self.sizes,
            [self.on[node] for node in order],
            [self.ops[node] for node in order],
        )


Engines = list[list[int]]
"""The nodes of each engine."""


def _by_key(dag: Dag, key: Sequence[object]) -> list[int]:
    """Return the nodes so that of those that are ready the one with the least key comes next."""
    waiting = [len(makers) for makers in dag.before]
    ready = [(key[node], node) for node in range(len(dag)) if not waiting[node]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, node = heapq.heappop(ready)
        order.append(node)
        for reader in dag.after[node]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, (key[reader], reader))
    return order


# --- ONNX Runtime's TensorRT providers -----------------------------------------------------------


def index_order(dag: Dag) -> list[int]:
    """Return the nodes in ``ExecutionOrder::PRIORITY_BASED``."""
    return _by_key(dag, [(op not in ("Shape", "Size"), node) for node, op in enumerate(dag.ops)])


def depth_order(dag: Dag) -> list[int]:
    """Return the nodes in ``ExecutionOrder::DEFAULT``."""
    pending = [(node, False) for node in range(len(dag)) if not dag.after[node]]
    seen: set[int] = set()
    order = []
    while pending:
        node, leaving = pending.pop()
        if leaving:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            pending.append((node, True))
            pending += [(maker, False) for maker in dag.before[node] if maker not in seen]
    return order


def runs_by_index(dag: Dag) -> Engines:
    """Cut as ONNX Runtime's TensorRT providers do."""
    return _consolidated(dag, runs(dag, index_order(dag)))


def runs_by_depth(dag: Dag) -> Engines:
    """Cut as older TensorRT providers of ONNX Runtime did."""
    return _consolidated(dag, runs(dag, depth_order(dag)))


def runs(dag: Dag, order: Iterable[int]) -> Engines:
    """Return the groups that TensorRT's parser makes of nodes listed in ``order``."""
    groups: Engines = []
    is_open = False
    for node in order:
        if not dag.on[node]:
            is_open = False
        elif is_open:
            groups[-1].append(node)
        else:
            groups.append([node])
            is_open = True
    return groups


def _consolidated(dag: Dag, groups: Engines) -> Engines:
    """Return ``groups`` as one, if that makes no cycle."""
    whole = [node for group in groups for node in group]
    return [whole] if len(groups) > 1 and is_acyclic(dag, [whole]) else groups


# --- ONNX Runtime's other providers --------------------------------------------------------------


def waves(dag: Dag) -> Engines:
    """Cut as ONNX Runtime's helper for providers does: wave after wave in Kahn's order."""
    waiting = [len(makers) for makers in dag.before]
    ready = deque(node for node in depth_order(dag) if not waiting[node])
    held_back: deque[int] = deque()
    groups: Engines = [[]]
    border: set[int] = set()
    while ready or held_back:
        if not ready:
            ready, held_back = held_back, deque()
            if groups[-1]:
                groups.append([])
            border.clear()
            continue
        node = ready.popleft()
        if dag.on[node]:
            groups[-1].append(node)
            border.update(dag.after[node])
        elif node in border:
            held_back.append(node)
            continue
        for reader in dag.after[node]:
            waiting[reader] -= 1
            if not waiting[reader]:
                ready.append(reader)
    return [group for group in groups if group]


# --- torch.fx ------------------------------------------------------------------------------------


def merged_backwards(dag: Dag) -> Engines:
    """Cut as torch.fx does: from the last node to the first, merging what makes no cycle."""
    return _Merging(dag, along_edges=False).engines()


def merged_along_edges(dag: Dag) -> Engines:
    """Cut as torch.fx does that merges a node with what reads from it only."""
    return _Merging(dag, along_edges=True).engines()


class _Merging:
    """The parts so far. Sets of nodes are the bits of whole numbers; the last node has bit 0."""

    def __init__(self, dag: Dag, *, along_edges: bool) -> None:
        self.dag = dag
        self.along_edges = along_edges
        self.bit = [1 << (len(dag) - 1 - node) for node in range(len(dag))]
        self.nodes: dict[int, int] = {}  # part -> its nodes
        self.readers: dict[int, set[int]] = {}  # part -> nodes outside that read from it
        self.reached: dict[int, set[int]] = {}  # part -> parts behind it, also such as are no more
        self.first: dict[int, int] = {}  # part -> the part that its last node began with
        self.behind = [0] * len(dag)  # node -> itself and all that depends on it
        for node in reversed(range(len(dag))):
            self.behind[node] = self.bit[node] | self.union(dag.after[node])

    def union(self, nodes: Iterable[int]) -> int:
        found = 0
        for node in nodes:
            found |= self.behind[node]
        return found

    def engines(self) -> Engines:
        for number, node in enumerate(reversed(range(len(self.dag)))):
            if self.along_edges:
                others = self.readers_parts(node) if self.dag.on[node] else []
            else:
                others = sorted(self.first, key=self.first.__getitem__)
            if self.dag.on[node]:
                others.insert(0, number)
                self.nodes[number] = self.bit[node]
                self.first[number] = number
                self.readers[number] = set(self.dag.after[node])
                self.reached[number] = self.parts_in(self.union(self.dag.after[node]))
            if others:
                part = others[0]
                for other in others[1:]:
                    part = self.merged(part, other)
        bits = {bit: node for node, bit in enumerate(self.bit)}
        return [sorted(bits[bit] for bit in _bits_of(nodes)) for nodes in self.nodes.values()]

    def readers_parts(self, node: int) -> list[int]:
        """Return the parts that read from ``node``, in the order of its readers."""
        bits = [self.bit[reader] for reader in self.dag.after[node]]
        found = [part for bit in bits for part, own in self.nodes.items() if own & bit]
        return list(dict.fromkeys(found))

    def parts_in(self, nodes: int) -> set[int]:
        """Return the parts that have some of ``nodes``, and what they reach."""
        there = [part for part, own in self.nodes.items() if own & nodes]
        return {*there, *(each for part in there for each in self.reached[part])}

    def merged(self, part: int, other: int) -> int:
        """Merge the two, if that makes no cycle; return the part to go on with."""
        both = self.nodes[part] | self.nodes[other]
        readers = {
            node for node in self.readers[part] | self.readers[other] if not self.bit[node] & both
        }
        behind = self.union(readers)
        if behind & both:
            return part
        for each, own in self.nodes.items():
            if own & behind and (part in self.reached[each] or other in self.reached[each]):
                return part
        kept, gone = part, other
        if self.nodes[part].bit_count() < self.nodes[other].bit_count():
            kept, gone = other, part
        self.nodes[kept] = both
        self.readers[kept] = readers
        self.first[kept] = min(self.first[kept], self.first[gone])
        self.reached[kept] |= self.reached[gone]
        del self.nodes[gone], self.readers[gone], self.first[gone], self.reached[gone]
        self.reached[kept] |= self.parts_in(behind)
        self.reached[kept] -= {kept, gone}
        return kept


def _bits_of(number: int) -> Iterable[int]:
    while number:
        yield number & -number
        number &= number - 1


# --- optc ----------------------------------------------------------------------------------------


def graph_of(dag: Dag) -> gs.Graph:
    """Return ``dag`` as a graph for optc; tensors bear their numbers as names."""
    tensors = [
        gs.Variable(str(tensor), np.float32, (size,)) for tensor, size in enumerate(dag.sizes)
    ]
    entry = gs.Variable("entry", np.float32, (1,))
    nodes = [
        Node(
            op,
            str(node),
            inputs=[tensors[t] for t in dag.reads[node]] or [entry],
            outputs=[tensors[t] for t in dag.makes[node]],
        )
        for node, op in enumerate(dag.ops)
    ]
    read = {tensor for tensors_ in dag.reads for tensor in tensors_}
    unread = [tensor for number, tensor in enumerate(tensors) if number not in read]
    return gs.Graph(nodes, [entry], unread)


def stages_of(dag: Dag, graph: gs.Graph) -> list[Stage]:
    """Cut ``graph``, which is that of ``dag``, as optc does."""
    off = [str(node) for node, on in enumerate(dag.on) if not on]
    return Splitter(graph, bytes_of=lambda name: dag.sizes[int(name)]).split(off)


# --- what comes of it ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """A stage, whoever cut it.

    Attributes:
        is_engine: Whether it runs in TensorRT.
        reads: The tensors it reads; those that nothing makes do not count.
        makes: The tensors it makes.
    """

    is_engine: bool
    reads: frozenset[object]
    makes: frozenset[object]


@dataclass(frozen=True, slots=True)
class Figures:
    """What a cut comes to.

    Attributes:
        engines: How many of its stages are.
        fallbacks: How many are not.
        across: Bytes at the boundaries between stages that run after one another: each tensor at
            every one that it lives across.
        sent: Bytes that pass between stages: each tensor once.
    """

    engines: int
    fallbacks: int
    across: int
    sent: int


def figures(parts: Sequence[Part], bytes_of: Callable[[object], int]) -> Figures:
    """Return what ``parts``, in running order, come to."""
    maker: dict[object, int] = {}
    last: dict[object, int] = {}
    for index, part in enumerate(parts):
        for tensor in part.reads:
            if tensor in maker and maker[tensor] < index:
                last[tensor] = index
        for tensor in part.makes:
            maker.setdefault(tensor, index)
    return Figures(
        engines=sum(part.is_engine for part in parts),
        fallbacks=sum(not part.is_engine for part in parts),
        across=sum(bytes_of(tensor) * (last[tensor] - maker[tensor]) for tensor in last),
        sent=sum(map(bytes_of, last)),
    )


def parts_of(stages: Iterable[Stage]) -> list[Part]:
    """Return optc's stages as parts."""
    return [
        Part(stage.runtime == "tensorrt", frozenset(stage.inputs), frozenset(stage.outputs))
        for stage in stages
    ]


class CycleError(Exception):
    """Engines wait for each other."""


class _Condensed:
    """A graph with each engine drawn into one vertex; what is in none is one by itself."""

    def __init__(self, dag: Dag, engines: Engines) -> None:
        self.engines = engines
        self.of = [-1] * len(dag)
        for number, engine in enumerate(engines):
            for node in engine:
                self.of[node] = number
        loose = [node for node, number in enumerate(self.of) if number < 0]
        for number, node in enumerate(loose, len(engines)):
            self.of[node] = number
        self.members = [*engines, *([node] for node in loose)]
        edges = {
            (self.of[maker], self.of[node])
            for node, makers in enumerate(dag.before)
            for maker in makers
            if self.of[maker] != self.of[node]
        }
        self.before: list[list[int]] = [[] for _ in self.members]
        self.after: list[list[int]] = [[] for _ in self.members]
        for maker, reader in sorted(edges):
            self.before[reader].append(maker)
            self.after[maker].append(reader)

    def order(self) -> list[int]:
        """Return the vertices in topological order; those of a cycle and behind it are missing."""
        waiting = [len(makers) for makers in self.before]
        ready = deque(vertex for vertex, count in enumerate(waiting) if not count)
        order = []
        while ready:
            order.append(ready.popleft())
            for reader in self.after[order[-1]]:
                waiting[reader] -= 1
                if not waiting[reader]:
                    ready.append(reader)
        return order


def is_acyclic(dag: Dag, engines: Engines) -> bool:
    """Whether ``engines`` can run one after another."""
    condensed = _Condensed(dag, engines)
    return len(condensed.order()) == len(condensed.members)


def running_order(dag: Dag, engines: Engines) -> list[Part]:
    """Return ``engines`` and the rest in the fewest stages that can run after one another.

    What peers leave outside has no stages of its own. It is grouped as favourably as can be: what
    is behind as many changes from engine to rest as another runs with it.

    Raises:
        CycleError: If they cannot run one after another.
    """
    condensed = _Condensed(dag, engines)
    order = condensed.order()
    if len(order) < len(condensed.members):
        raise CycleError
    level: dict[int, int] = {}
    for vertex in order:
        is_engine = vertex < len(engines)
        level[vertex] = max(
            (level[m] + (m < len(engines) and not is_engine) for m in condensed.before[vertex]),
            default=-1 if is_engine else 0,
        )
    rest: dict[int, list[int]] = {}
    for vertex in order[:]:
        if vertex >= len(engines):
            rest.setdefault(level[vertex], []).extend(condensed.members[vertex])
    stages = [(each, 0, False, nodes) for each, nodes in rest.items()]
    stages += [
        (level[vertex], place, True, engines[vertex])
        for place, vertex in enumerate(order, 1)
        if vertex < len(engines)
    ]
    return [
        Part(
            is_engine,
            frozenset(tensor for node in nodes for tensor in dag.reads[node]),
            frozenset(tensor for node in nodes for tensor in dag.makes[node]),
        )
        for _, _, is_engine, nodes in sorted(stages, key=lambda stage: stage[:2])
    ]


PEERS: dict[str, Callable[[Dag], Engines]] = {
    "ort-trt": runs_by_index,
    "ort-trt-depth": runs_by_depth,
    "ort-others": waves,
    "torch.fx": merged_backwards,
    "torch.fx-edges": merged_along_edges,
}
"""Short name -> rule."""
