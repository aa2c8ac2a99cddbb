"""What each node may compute in: what the spec wants, held against what rules allow.

The spec names a precision for all nodes, another one for some. Whether a node can have it is a
matter of its operator and its types (`optc.passes.float_port`, `optc.passes.quantisation`); whether
its exactness allows it, the search finds out among what is left (`optc.optimizer.precision_search`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_graphsurgeon as gs

from optc.optimizer.prepare import Prepared
from optc.passes.float_port import Ports, nodes_of_sizes, ports
from optc.passes.graph import bodies_of, nodes_in
from optc.passes.precision import DTYPES, Float, Lowering, NodePrecision
from optc.specs.compile_spec import Precision

if TYPE_CHECKING:
    from optc.passes.quantisation import Operands

Judge = Literal["spec", "rule", "parser", "builder", "search"]


@dataclass(frozen=True, slots=True)
class Kept:
    """A node that computes in more than the spec's precision.

    Attributes:
        node: Its name.
        op: Its operator.
        precision: What it computes in.
        by: Who wants it so: the spec, a rule, TensorRT's parser or builder, the search.
        text: Why.
        cost: What its rounding alone takes of the tolerance, 1 for all of it; None where nobody
            measured it.
    """

    node: str
    op: str
    precision: NodePrecision
    by: Judge
    text: str
    cost: float | None = None


@dataclass(slots=True)
class Wanted:
    """What the nodes of a model may compute in.

    Attributes:
        lowest: What the spec asks for.
        floats: What quantised nodes take and give.
        levels: Node of the main graph -> the precisions that it may have, the lowest first. One
            that has but one is fixed. A node with bodies stands for the nodes in them.
        kept: Node -> why it cannot have what the spec asks for.
        inner: Node with bodies -> the nodes in them that can be lowered.
        operands: Node that may be quantised -> which of its operands.
    """

    lowest: NodePrecision
    floats: Float
    levels: dict[str, tuple[NodePrecision, ...]] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)
    inner: dict[str, tuple[str, ...]] = field(default_factory=dict)
    operands: dict[str, Operands] = field(default_factory=dict)

    @property
    def draft(self) -> dict[str, NodePrecision]:
        """Each node, of bodies too, at its lowest."""
        return self.spread({name: levels[0] for name, levels in self.levels.items()})

    def spread(self, nodes: Mapping[str, NodePrecision]) -> dict[str, NodePrecision]:
        """Return ``nodes`` below fp32, the nodes in bodies in place of those that they stand in."""
        return {
            inner: precision
            for name, precision in nodes.items()
            if precision != "fp32"
            for inner in self.inner.get(name, (name,))
        }


def is_lowered(precision: Precision) -> bool:
    """Whether a spec asks for less than fp32 anywhere."""
    lowest = {precision.default, *(layer.precision for layer in precision.layers)}
    return not lowest <= {"fp32", "tf32"}


def wanted(prepared: Prepared) -> Wanted:
    """Return what the nodes of a model may compute in."""
    spec = prepared.checked.spec.precision
    lowest: NodePrecision = "fp32" if spec.default == "tf32" else spec.default
    return _Wants(prepared, spec, lowest).found()


class _Wants:
    def __init__(self, prepared: Prepared, spec: Precision, lowest: NodePrecision) -> None:
        self.prepared = prepared
        self.spec = spec
        floats: Float = "bf16" if lowest == "bf16" else "fp16"
        self.wanted = Wanted(lowest, floats)
        self.sizes = nodes_of_sizes(prepared.graph, prepared.shapes)

    def ports(self, node: gs.Node, floats: Float) -> Ports | str:
        return ports(node, _dtype_of, floats, sizes=self.sizes)

    def found(self) -> Wanted:
        question = self.prepared.question
        for node in self.prepared.graph.nodes:
            if node.name in question.off or question.is_free(node):
                continue
            precision, by_spec = self._asked(node)
            if bodies_of(node):
                self._with_bodies(node, precision, by_spec)
            elif _has_floats(node):
                self._one(node, precision, by_spec)
        return self.wanted

    def _asked(self, node: gs.Node) -> tuple[NodePrecision, str | None]:
        """Return what the spec asks of ``node``, and in which words where it speaks of it."""
        found: tuple[NodePrecision, str | None] = (self.wanted.lowest, None)
        names = [each.name for each in nodes_in(node)]
        origins = [o for name in names for o in self.prepared.passes.origins.get(name, ())]
        for layer in self.spec.layers:
            if any(layer.matches(self.prepared.ops[o], o) for o in origins):
                found = (layer.precision, f"layers: {layer} in {layer.precision}")
        for selector in self.spec.keep_fp32:
            if any(selector.matches(self.prepared.ops[o], o) for o in origins):
                found = ("fp32", f"keep_fp32: {selector}")
        return found

    def _float_of(self, precision: NodePrecision) -> Float:
        return Lowering({"": precision}, self.wanted.floats).float_of("")

    def _one(self, node: gs.Node, asked: NodePrecision, by_spec: str | None) -> None:
        if asked == "fp32":
            if by_spec:
                self._keep(node, "fp32", "spec", by_spec)
            return
        float_ = self._float_of(asked)
        allowed = self.ports(node, float_)
        if isinstance(allowed, str):
            self._keep(node, "fp32", "rule", allowed)
            return
        levels: tuple[NodePrecision, ...] = (float_, "fp32")
        if asked in ("int8", "fp8"):
            from optc.passes.quantisation import quantisable

            operands = quantisable(node, _dtype_of, self._rank_of, asked)
            if not isinstance(operands, str):
                levels = (asked, float_, "fp32")
                self.wanted.operands[node.name] = operands
            elif operands or by_spec:
                self._keep(node, float_, "rule", operands)
        if by_spec:
            levels = levels[:1]
            if levels[0] != self.wanted.lowest:
                self._keep(node, levels[0], "spec", by_spec)
        self.wanted.levels[node.name] = levels

    def _with_bodies(self, node: gs.Node, asked: NodePrecision, by_spec: str | None) -> None:
        """Let the nodes in the bodies of ``node`` compute in floats: nothing in them is quantised."""
        if asked == "fp32":
            if by_spec:
                self._keep(node, "fp32", "spec", by_spec)
            return
        float_ = self._float_of(asked)
        inner = tuple(
            each.name
            for each in nodes_in(node)
            if each is not node
            and _has_floats(each)
            and not isinstance(self.ports(each, float_), str)
        )
        if inner:
            self.wanted.inner[node.name] = inner
            self.wanted.levels[node.name] = (float_,) if by_spec else (float_, "fp32")

    def _keep(self, node: gs.Node, precision: NodePrecision, by: Judge, text: str) -> None:
        self.wanted.kept[node.name] = Kept(node.name, node.op, precision, by, text)

    def _rank_of(self, tensor: gs.Tensor) -> int | None:
        if isinstance(tensor, gs.Constant):
            return len(tensor.shape)
        dims = self.prepared.shapes.dims(tensor.name)
        return None if dims is None else len(dims)


def _dtype_of(tensor: gs.Tensor) -> np.dtype[Any] | None:
    return None if tensor.dtype is None else np.dtype(tensor.dtype)


def _has_floats(node: gs.Node) -> bool:
    tensors = (*node.inputs, *node.outputs)
    return any(t.name and _dtype_of(t) == DTYPES["fp32"] for t in tensors)
