r"""Spell the attention that ONNX Runtime fuses out in products and a Softmax.

    before                              after

    x   W   b   mask                    x
     \  |   |   /                       |
      Attention                         MatMul (W), Add (b), Split
          |                             |q        |k          |v
          y                             heads     heads       heads
                                         \        /           |
                                          MatMul, Mul (scale) |
                                          |                   |
                                          Add (mask), Softmax |
                                               \             /
                                                   MatMul
                                                   |
                                                   heads joined
                                                   |
                                                   y

Attention and MultiHeadAttention of com.microsoft. Heads are axes of their own: a Reshape and a Transpose
split the last axis into them, and join them again.

Why it holds: softmax(scale * q @ k^T + bias) @ v for each head is how their documentation defines them,
with scale 1 / sqrt(size of a head) where none is given. What a mask of 0 and 1 leaves out, and what lies
ahead where ``unidirectional`` is set, counts as ``mask_filter_value`` (-10000).
How exact: equal up to rounding. The documentation leaves open what a place is that may look at nothing.

Needs: opset 13.
Keeps: names of outputs.
Skips, with the reason in the report: keys and values of earlier steps; rotary embedding; masks that are
not [batch, keys]; heads whose size is not known; packed keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.replacement import Declined, Replacement, replace_each

OPSET = 13
MASKED = -10000.0
"""What a score that the mask leaves out gets where the operator says nothing else."""


class ExpandAttention(Pass):
    """Spell the attention that ONNX Runtime fuses out in products and a Softmax."""

    name = "expand-attention"
    group = "legalise"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Spell the refused operators in ``graph`` out."""
        nodes = facts.nodes("Attention", "MultiHeadAttention", domain="com.microsoft")
        return replace_each(nodes, facts, lambda node: _Attention(graph, facts, node), _written)


def _written(new: _Attention) -> gs.Tensor:
    return _from_input(new) if new.node.op == "Attention" else _from_projections(new)


@dataclass(frozen=True, slots=True)
class _Heads:
    """Queries, keys and values as [batch, places, all heads], and how they come apart.

    Attributes:
        sizes: Of one head of each.
    """

    tensors: tuple[gs.Tensor, gs.Tensor, gs.Tensor]
    sizes: tuple[int, int, int]


@dataclass(slots=True)
class _Attention(Replacement):
    """An attention being spelt out."""

    @property
    def count(self) -> int:
        """How many heads there are."""
        return int(self.node.attrs["num_heads"])

    def dtype(self) -> np.dtype[Any]:
        """Return the type that it computes in."""
        known = self.facts.shapes.dtype(self.node.inputs[0].name)
        if known is None:
            raise Declined("nobody knows which type it computes in")
        return known

    def dims(self, tensor: gs.Tensor) -> tuple[object, ...]:
        """Return the extents of ``tensor``."""
        if isinstance(tensor, gs.Constant):
            return tuple(tensor.shape)
        found = self.facts.shapes.dims(tensor.name)
        if found is None:
            raise Declined(f"nobody knows how many axes `{tensor.name}` has")
        return found

    def refuse(self, inputs: Sequence[int], why: str) -> None:
        """Decline if one of ``inputs`` is there.

        Raises:
            Declined: If so.
        """
        if any(self.input(index) is not None for index in inputs):
            raise Declined(why)

    def refuse_outputs(self) -> None:
        """Decline if an output besides the first is wanted."""
        for tensor in self.node.outputs[1:]:
            if tensor.name and (tensor.outputs or self.facts.is_kept(tensor)):
                raise Declined(f"its output `{tensor.name}` is read")

    def split(self, tensor: gs.Tensor, size: int) -> gs.Variable:
        """Return [batch, places, heads of ``size``] as [batch, heads, places, size]."""
        apart = self.add("Reshape", tensor, np.array([0, 0, self.count, size], np.int64))
        return self.add("Transpose", apart, perm=[0, 2, 1, 3])

    def number(self, value: float) -> np.ndarray[Any, Any]:
        return np.array(value, self.dtype())

    def masked(self, scores: gs.Variable, mask: gs.Tensor) -> gs.Variable:
        """Return ``scores`` where keys that ``mask`` [batch, keys] leaves out have a low one."""
        left_out = self.add("Sub", self.number(1), self.cast(mask, self.dtype()))
        low = self.add("Mul", left_out, self.number(self.filter_value))
        return self.add("Add", scores, self.along("Unsqueeze", low, [1, 2]))

    @property
    def filter_value(self) -> float:
        """What a score that is left out gets."""
        return float(self.node.attrs.get("mask_filter_value", MASKED))

    def causal(self, scores: gs.Variable, queries: gs.Tensor) -> gs.Variable:
        """Return ``scores`` where a place sees no place after it."""
        length = self.add("Slice", self.add("Shape", queries), *map(_int64, ([2], [3])))
        last = self.along("Squeeze", length, [0])
        places = self.add("Range", _int64(0), last, _int64(1))
        ahead = self.add("Greater", places, self.along("Unsqueeze", places, [1]))
        low = self.add("Where", ahead, self.number(self.filter_value), self.number(0))
        return self.add("Add", scores, low)


def _int64(value: int | list[int]) -> np.ndarray[Any, Any]:
    return np.array(value, np.int64)


def _from_input(new: _Attention) -> gs.Tensor:
    """Spell Attention out: one product with weights makes queries, keys and values."""
    new.refuse_outputs()
    new.refuse((4, 6), "it goes on from keys and values of earlier steps")
    if new.node.attrs.get("do_rotary", 0):
        raise Declined("it turns queries and keys by their place (rotary embedding)")
    x, weights = new.node.inputs[:2]
    total = new.dims(weights)[-1]
    if not isinstance(total, int):
        raise Declined("the size of a head is not known")
    widths = new.node.attrs.get("qkv_hidden_sizes") or [total // 3] * 3
    product: gs.Tensor = new.add("MatMul", x, weights)
    if (bias := new.input(2)) is not None:
        product = new.add("Add", product, bias)
    q, k, v = new.add_with(3, "Split", product, _int64(list(widths)), axis=2)
    sizes = (widths[0] // new.count, widths[1] // new.count, widths[2] // new.count)
    return _attended(_Heads((q, k, v), sizes), new.input(3), new.input(5), new)


def _from_projections(new: _Attention) -> gs.Tensor:
    """Spell MultiHeadAttention out: queries, keys and values come from outside."""
    new.refuse_outputs()
    new.refuse((6, 7, 8, 9), "it goes on from keys and values of earlier steps")
    tensors = [new.input(index) for index in range(3)]
    found = [tensor for tensor in tensors if tensor is not None]
    widths = [new.dims(tensor)[-1] for tensor in found if len(new.dims(tensor)) == 3]
    known = [width for width in widths if isinstance(width, int)]
    if len(known) != 3:
        raise Declined("queries, keys and values are not three tensors of a known size of head")
    if (bias := new.input(3)) is not None:
        parts = new.add_with(3, "Split", bias, _int64(known), axis=0)
        found = [new.add("Add", each, part) for each, part in zip(found, parts, strict=True)]
    q, k, v = found
    sizes = (known[0] // new.count, known[1] // new.count, known[2] // new.count)
    return _attended(_Heads((q, k, v), sizes), new.input(4), new.input(5), new)


def _attended(
    heads: _Heads, mask: gs.Tensor | None, bias: gs.Tensor | None, new: _Attention
) -> gs.Tensor:
    if mask is not None and len(new.dims(mask)) != 2:
        raise Declined("its mask is not [batch, keys]")
    new.require_opset(OPSET)
    q, k, v = (new.split(t, size) for t, size in zip(heads.tensors, heads.sizes, strict=True))
    scale = new.node.attrs.get("scale", 0.0) or 1 / math.sqrt(heads.sizes[0])
    turned = new.add("Transpose", k, perm=[0, 1, 3, 2])
    scores = new.add("Mul", new.add("MatMul", q, turned), new.number(scale))
    if new.node.attrs.get("unidirectional", 0):
        scores = new.causal(scores, q)
    if mask is not None:
        scores = new.masked(scores, mask)
    if bias is not None:
        scores = new.add("Add", scores, bias)
    seen = new.add("MatMul", new.add("Softmax", scores, axis=-1), v)
    joined = new.add("Transpose", seen, perm=[0, 2, 1, 3])
    return new.add("Reshape", joined, _int64([0, 0, new.count * heads.sizes[2]]))
