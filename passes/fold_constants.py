r"""Replace what follows from constants by its value.

    before                    after

    W     perm=[1,0]
     \
     Transpose                x    W' (constant)
      |                        \  /
    x |                       MatMul
     \|
    MatMul

Why it holds: the nodes give the same values at each run. They are computed once, by the kernels that
would compute them at run time.

An If, Loop or Scan folds as a whole where all that its bodies read from outside is constant.

Skips, with the reason in the report:
- what makes the model grow. A value of more than 64 KiB must be paid for by the constants that are
  gone with it, or all such values together be a small share of the model: ConstantOfShape, Expand or
  Tile turn a few bytes into hundreds of megabytes, and a transposed copy beside a weight that is still
  read doubles it. Computed numbers, a table of sines say, that do not repeat along an axis may be
  stored until the constants take 1 MiB. What lies behind such a value folds where its own result is small;
- quantised weights (DequantizeLinear, QuantizeLinear of a constant): they say in which precision the
  reader is to compute;
- what neither ONNX Runtime nor the reference can compute.

Left alone: random numbers, operators of other domains, sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report, option
from optc.passes.determinism import is_deterministic
from optc.passes.graph import (
    Array,
    all_nodes,
    bodies_of,
    is_constant,
    nodes_in,
    producer,
    reads,
    redirect,
    remove_dead,
)

HUGE_BYTES = 2**30
"""A node that makes more than this is not computed, however little is left of it in the end."""

REPEATING = frozenset({"ConstantOfShape", "Expand", "Tile"})
MOVING = frozenset({"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})

QUANTISING = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute what follows from constants."""

    name = "fold-constants"

    growth_bytes: int = option(
        64 * 1024, "a value of up to so many bytes folds, whatever it is made from", least=0
    )
    growth_share: int = option(
        50,
        "all larger values together may add one byte to so many of the graph's constants",
        least=1,
    )
    small_bytes: int = option(
        2**20,
        "computed values, not moved or repeated ones, may make a graph's constants take so many bytes",
        least=0,
    )

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        report = Report()
        _read_through_identities(graph, facts, report, self.growth_bytes)
        folding = _Folding(graph, facts, self)
        values = folding.values(report)
        for node in folding.nodes:
            for index, tensor in enumerate(node.outputs):
                if tensor.name in values:
                    node.outputs[index] = gs.Variable.empty()
                    tensor.to_constant(values[tensor.name])  # for all readers, in bodies too
        for node in remove_dead(graph, facts.kept):
            report.removed[node.name] = "what it computes is constant"
        return report


def _read_through_identities(
    graph: gs.Graph, facts: Facts, report: Report, growth_bytes: int
) -> None:
    """Let the readers of a constant's Identity read the constant itself: no byte is copied."""
    for node in graph.nodes:
        if node.op != "Identity" or node.domain or not is_constant(node.inputs[0]):
            continue
        constant, output = node.inputs[0], node.outputs[0]
        redirect(output, constant)
        if facts.is_kept(output) and constant._values.nbytes <= growth_bytes:
            node.outputs[0] = gs.Variable.empty()
            output.to_constant(constant._values)
        elif facts.is_kept(output):
            report.skipped[node.name] = "it gives a large constant the name of an output"


class _Folding:
    """The nodes of a graph that fold."""

    def __init__(self, graph: gs.Graph, facts: Facts, limits: FoldConstants) -> None:
        self.graph = graph
        self.limits = limits
        self.facts = facts
        self.why_not: dict[str, str] = {}
        self.nodes: list[gs.Node] = []
        self.members: set[int] = set()  # ids of nodes, those in their bodies included
        self.find()

    def find(self) -> None:
        """Collect the nodes that follow from constants, without those of ``why_not``."""
        self.nodes.clear()
        self.members.clear()
        known: set[int] = set()
        for node in self.graph.nodes:
            if node.name in self.why_not or node.domain:
                continue
            if node.op == "Identity" and is_constant(node.inputs[0]):
                continue  # read through, or left for its name
            if not _follows(node, known):
                continue
            if not is_deterministic(node):
                continue
            if node.op in QUANTISING:
                self.why_not[node.name] = "it says in which precision its reader computes"
                continue
            self.nodes.append(node)
            self.members.update(id(each) for each in nodes_in(node))
            known.update(id(tensor) for tensor in node.outputs)

    def wanted(self) -> dict[str, gs.Node]:
        """Return the tensors that are left when the nodes are gone -> who makes them."""
        return {
            tensor.name: node
            for node in self.nodes
            for tensor in node.outputs
            if tensor.name
            and (
                self.facts.is_kept(tensor)
                or any(id(reader) not in self.members for reader in tensor.outputs)
            )
        }

    def values(self, report: Report) -> dict[str, Array]:
        """Return the values that replace nodes, by tensor; add to ``report`` what does not fold."""
        while wanted := self.wanted():
            sizes = {name: self.inferred_bytes(name) for name in wanted}
            if self.give_up(self.huge() | self.growing(wanted, sizes)):
                continue
            values = {name: value for name in wanted if (value := self.inferred(name)) is not None}
            bad: dict[str, str] = {}
            if unknown := wanted.keys() - values.keys():
                from optc.passes.evaluation import evaluate

                found = evaluate(self.leading_to(unknown), unknown, self.facts.opset)
                values |= found.values
                bad |= found.failures
            if not bad:
                bad = {
                    node.name: "its result is no tensor"
                    for name, node in wanted.items()
                    if name not in values
                }
            sizes = {name: value.nbytes for name, value in values.items()}
            if not self.give_up(bad or self.growing(wanted, sizes, values)):
                report.skipped |= self.why_not
                return values
        report.skipped |= self.why_not
        return {}

    def inferred(self, name: str) -> Array | None:
        """Return a value that shape inference has computed already: integers are exact there."""
        value = self.facts.shapes.constant(name)
        if value is None or value.dtype.kind not in "biu":
            return None
        return np.array(value, order="C")

    def leading_to(self, names: AbstractSet[str]) -> list[gs.Node]:
        """Return the folding nodes that the tensors ``names`` are computed from, in order."""
        needed = set(names)
        found = []
        for node in reversed(self.nodes):
            if any(tensor.name in needed for tensor in node.outputs):
                needed.update(tensor.name for tensor in reads(node))
                found.append(node)
        return found[::-1]

    def give_up(self, reasons: dict[str, str]) -> bool:
        """Take nodes out, and with them what follows from them."""
        self.why_not |= reasons
        if reasons:
            self.find()
        return bool(reasons)

    def inferred_bytes(self, name: str) -> int:
        """Return the size of a tensor as shape inference knows it; 0 where it does not."""
        dims, dtype = self.facts.shapes.dims(name), self.facts.shapes.dtype(name)
        if dims is None or dtype is None:
            return 0
        extents = [dim for dim in dims if isinstance(dim, int)]
        return math.prod(extents) * dtype.itemsize if len(extents) == len(dims) else 0

    def huge(self) -> dict[str, str]:
        """Return the nodes that are not even to be tried -> why."""
        return {
            node.name: f"it would take {size:,} bytes to compute it ahead"
            for node in self.nodes
            for tensor in node.outputs
            if (size := self.inferred_bytes(tensor.name)) > HUGE_BYTES
        }

    def growing(
        self,
        wanted: Mapping[str, gs.Node],
        sizes: Mapping[str, int],
        values: Mapping[str, Array] = MappingProxyType({}),
    ) -> dict[str, str]:
        """Return the makers of values that would make the model grow -> why they are left.

        Each byte of a constant that is gone pays for one byte of one value.
        """
        if all(size <= self.limits.growth_bytes for size in sizes.values()):
            return {}
        unspent: dict[int, int] = {}
        stored = _constant_bytes(self.graph)
        allowance = stored // self.limits.growth_share
        small = max(self.limits.small_bytes - stored, 0)
        growing = {}
        for name, node in wanted.items():
            if sizes.get(name, 0) <= self.limits.growth_bytes:
                continue
            price = sizes[name] - self.limits.growth_bytes
            for constant in self.freed_by(node):
                left = unspent.setdefault(id(constant), constant._values.nbytes)
                paid = min(left, price)
                unspent[id(constant)] -= paid
                price -= paid
            if price <= allowance:
                allowance -= price
            elif price <= small and _is_computed(node, values.get(name)):
                small -= price
            else:
                growing[node.name] = f"the model would grow by {sizes[name]:,} bytes"
        return growing

    def freed_by(self, node: gs.Node) -> list[gs.Constant]:
        """Return the constants that ``node`` follows from and that only folding nodes read."""
        maker = {id(tensor): n for n in self.nodes for tensor in n.outputs}
        found: dict[int, gs.Constant] = {}
        pending, seen = [node], {id(node)}
        while pending:
            for tensor in _all_reads(pending.pop()):
                before = maker.get(id(tensor))
                if before is not None and id(before) not in seen:
                    seen.add(id(before))
                    pending.append(before)
                if (
                    is_constant(tensor)
                    and not self.facts.is_kept(tensor)
                    and all(id(reader) in self.members for reader in tensor.outputs)
                ):
                    found[id(tensor)] = tensor
        return list(found.values())


def _follows(node: gs.Node, known: AbstractSet[int]) -> bool:
    """Whether all that ``node`` reads is constant, or has its ``id()`` in ``known``."""
    for tensor in node.inputs:
        if tensor.name and not isinstance(tensor, gs.Constant) and id(tensor) not in known:
            return False
    return not bodies_of(node) or all(is_constant(t) or id(t) in known for t in reads(node))


def _constant_bytes(graph: gs.Graph) -> int:
    """Return the bytes of all constants that ``graph`` and its bodies read."""
    found = {
        id(tensor): tensor._values.nbytes
        for node in all_nodes(graph)
        for tensor in node.inputs
        if is_constant(tensor)
    }
    return sum(found.values())


def _all_reads(node: gs.Node) -> Iterator[gs.Tensor]:
    """Yield all that ``node`` and its bodies read, constants of bodies too."""
    for each in nodes_in(node):
        yield from each.inputs


def _is_computed(node: gs.Node, value: Array | None) -> bool:
    """Whether ``node`` makes numbers that were not there before, and not the same ones many times.

    Where ``value`` is not known yet, nothing is said against it.
    """
    maker: gs.Node | None = node
    while maker is not None and maker.op in MOVING:
        maker = producer(maker.inputs[0])
    if maker is None or maker.op in REPEATING:
        return False
    return value is None or not any(
        bool((value == value.take([0], axis)).all())
        for axis, extent in enumerate(value.shape)
        if extent > 1
    )
