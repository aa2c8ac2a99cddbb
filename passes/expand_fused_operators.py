r"""Spell operators that ONNX Runtime fuses out in standard ones.

    before                                      after

    x   skip   gamma  beta  bias                x   skip
     \   |      |     /    /                     \  /
    SkipLayerNormalization                        Add   bias
         |         \                                \  /
         y          sum                              Add ──────────── sum
                                                      |
                                                LayerNormalization (gamma, beta)
                                                      |
                                                      y

All are of com.microsoft, and written by ONNX Runtime's offline optimiser: BiasGelu,
EmbedLayerNormalization, FastGelu, FusedConv, FusedGemm, FusedMatMul, Gelu, NhwcMaxPool,
QuickGelu, SkipLayerNormalization, SkipSimplifiedLayerNormalization and
TransposeMatMul. Attention has a pass of its own.

Why it holds: it is how their documentation defines them.
How exact: equal up to rounding; half precision is normalised in float32, as there.

Needs: opset 13; for what normalises by mean and variance opset 17, else it is spelt out further.
Keeps: names of outputs.
Skips, with the reason in the report: activations without a counterpart; batch axes that are transposed;
statistics for training that are read; types that nobody knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.replacement import Declined, Replacement, Results, replace_each

OPSET = 13
LAYER_NORMALIZATION = 17
"""The opset that has it."""

CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
POOL = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")


class ExpandFusedOperators(Pass):
    """Spell operators that ONNX Runtime fuses out in standard ones."""

    name = "expand-fused-operators"
    group = "legalise"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Spell the refused operators in ``graph`` out."""
        nodes = facts.nodes(*_RULES, domain="com.microsoft")
        return replace_each(nodes, facts, lambda node: _Fused(graph, facts, node), _written)


def _written(new: _Fused) -> Results:
    results = _RULES[new.node.op](new)
    new.require_opset(OPSET)
    return results


@dataclass(slots=True)
class _Fused(Replacement):
    """A fused operator being spelt out."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type that it computes in."""
        for tensor in self.node.inputs:
            known = self.facts.dtype(tensor)
            if known is not None and known.kind == "f":
                return known
        raise Declined("nobody knows which type it computes in")

    def rank(self, tensor: gs.Tensor) -> int:
        """Return how many axes ``tensor`` has."""
        dims = self.facts.dims(tensor)
        if dims is None:
            raise Declined(f"nobody knows how many axes `{tensor.name}` has")
        return len(dims)

    def number(self, value: float) -> np.ndarray[Any, Any]:
        """Return a number of the type that the operator computes in."""
        return np.array(value, self.dtype)

    def attrs(self, *names: str) -> dict[str, Any]:
        """Return those attributes that the standard operator has too."""
        return {name: self.node.attrs[name] for name in names if name in self.node.attrs}

    def present(self, *indices: int) -> list[gs.Tensor]:
        """Return those of the inputs that are not left out."""
        found = [self.input(index) for index in indices]
        return [tensor for tensor in found if tensor is not None]

    def sum(self, tensors: Sequence[gs.Tensor]) -> gs.Tensor:
        """Return the sum of ``tensors``, from the left."""
        total, *rest = tensors
        for tensor in rest:
            total = self.add("Add", total, tensor)
        return total

    def require_unread(self, *indices: int) -> None:
        """Make sure that nobody wants the outputs ``indices``; ask before anything else."""
        for tensor in [t for i, t in enumerate(self.node.outputs) if i in indices and t.name]:
            if tensor.outputs or self.facts.is_kept(tensor):
                raise Declined(f"its output `{tensor.name}` is read")


# --- activations ---------------------------------------------------------------------------------


def _activated(x: gs.Tensor, params: Sequence[float], new: _Fused) -> gs.Tensor:
    """Return the activation that the node names, of ``x``."""
    match new.node.attrs.get("activation", ""), *params:
        case ("" | "Identity", *_):
            return x
        case ("HardSwish" | "Relu" | "Sigmoid" | "Softplus" | "Tanh") as op, *_:
            return new.add(op, x)
        case ("Elu" | "LeakyRelu" | "ThresholdedRelu") as op, alpha, *_:
            return new.add(op, x, alpha=alpha)
        case "HardSigmoid", alpha, beta, *_:
            return new.add("HardSigmoid", x, alpha=alpha, beta=beta)
        case "Clip", low, high, *_:
            return new.add("Clip", x, new.number(low), new.number(high))
        case op, *_:
            raise Declined(f"its activation {op} is not known here")
    raise AssertionError("every activation is one of the above")


def _conv(new: _Fused) -> Results:
    summed = new.sum([new.add("Conv", *new.present(0, 1, 2), **new.attrs(*CONV)), *new.present(3)])
    return {0: _activated(summed, new.node.attrs.get("activation_params", ()), new)}


def _gemm(new: _Fused) -> Results:
    product = new.add(
        "Gemm", *new.present(0, 1, 2), **new.attrs("alpha", "beta", "transA", "transB")
    )
    names = ("activation_alpha", "activation_beta", "activation_gamma")
    return {0: _activated(product, list(new.attrs(*names).values()), new)}


def _matmul(new: _Fused) -> Results:
    if new.node.attrs.get("transBatchA", 0) or new.node.attrs.get("transBatchB", 0):
        raise Declined("it transposes batch axes")
    operands = []
    for tensor, name in zip(new.node.inputs, ("transA", "transB"), strict=True):
        rank = new.rank(tensor) if new.node.attrs.get(name, 0) else 0
        if rank > 1:
            perm = [*range(rank - 2), rank - 1, rank - 2]
            tensor = new.add("Transpose", tensor, perm=perm)
        operands.append(tensor)
    product = new.add("MatMul", *operands)
    alpha = new.node.attrs.get("alpha", 1.0)
    return {0: product if alpha == 1 else new.add("Mul", product, new.number(alpha))}


def _gelu(new: _Fused) -> Results:
    x = new.sum(new.present(0, 1))
    ratio = new.add("Div", x, new.number(math.sqrt(2)))
    share = new.add("Add", new.add("Erf", ratio), new.number(1))
    return {0: new.add("Mul", new.add("Mul", x, share), new.number(0.5))}


def _fast_gelu(new: _Fused) -> Results:
    x = new.sum(new.present(0, 1))
    cube = new.add("Mul", new.add("Mul", x, x), x)
    sum_ = new.add("Add", x, new.add("Mul", cube, new.number(0.044715)))
    bent = new.add("Tanh", new.add("Mul", sum_, new.number(math.sqrt(2 / math.pi))))
    share = new.add("Add", bent, new.number(1))
    return {0: new.add("Mul", new.add("Mul", x, share), new.number(0.5))}


def _quick_gelu(new: _Fused) -> Results:
    x = new.node.inputs[0]
    alpha = new.node.attrs.get("alpha", 1.702)
    return {0: new.add("Mul", x, new.add("Sigmoid", new.add("Mul", x, new.number(alpha))))}


# --- normalisation -------------------------------------------------------------------------------


def _layer_normalised(
    x: gs.Tensor, gamma: gs.Tensor, beta: Sequence[gs.Tensor], epsilon: float, new: _Fused
) -> gs.Tensor:
    if new.facts.reach_opset(LAYER_NORMALIZATION):
        return new.add("LayerNormalization", x, gamma, *beta, axis=-1, epsilon=epsilon)
    wide = _widened(x, new)
    centred = new.add("Sub", wide, new.along("ReduceMean", wide, [-1]))
    return _scaled(_divided(centred, epsilon, new), [gamma], beta, new)


def _rms_normalised(x: gs.Tensor, gamma: gs.Tensor, epsilon: float, new: _Fused) -> gs.Tensor:
    return _scaled(_divided(_widened(x, new), epsilon, new), [gamma], (), new)


def _widened(x: gs.Tensor, new: _Fused) -> gs.Tensor:
    return x if new.dtype == np.float32 else new.cast(x, np.float32)


def _divided(x: gs.Tensor, epsilon: float, new: _Fused) -> gs.Tensor:
    """Return ``x`` by the root of its mean square."""
    mean = new.along("ReduceMean", new.add("Mul", x, x), [-1])
    return new.add("Div", x, new.add("Sqrt", new.add("Add", mean, np.array(epsilon, np.float32))))


def _scaled(
    x: gs.Tensor, gamma: Sequence[gs.Tensor], beta: Sequence[gs.Tensor], new: _Fused
) -> gs.Tensor:
    if new.dtype != np.float32:
        x = new.cast(x, new.dtype)
    for tensor in gamma:
        x = new.add("Mul", x, tensor)
    return new.sum([x, *beta])


def _skip_layer_normalization(new: _Fused) -> Results:
    new.require_unread(1, 2)
    total = new.sum(new.present(0, 1, 4))
    epsilon = new.node.attrs.get("epsilon", 1e-12)
    result = _layer_normalised(total, new.node.inputs[2], new.present(3), epsilon, new)
    return {0: result, 3: total}


def _skip_rms_normalization(new: _Fused) -> Results:
    new.require_unread(1, 2)
    total = new.sum(new.present(0, 1, 3))
    epsilon = new.node.attrs.get("epsilon", 1e-12)
    return {0: _rms_normalised(total, new.node.inputs[2], epsilon, new), 3: total}


def _embed_layer_normalization(new: _Fused) -> Results:
    ids, _, words, places, _, gamma, beta = new.node.inputs[:7]
    segments, mask, positions = new.input(1), new.input(7), new.input(8)
    if mask is None:
        new.require_unread(1)
    total = new.add("Gather", words, ids)
    if positions is None:
        length = new.add("Slice", new.add("Shape", ids), *_int64([1], [2]))
        place = new.add("Slice", places, *_int64([0]), length, *_int64([0]))
    else:
        place = new.add("Gather", places, positions)
    total = new.add("Add", total, place)
    if segments is not None:
        total = new.add("Add", total, new.add("Gather", new.node.inputs[4], segments))
    epsilon = new.node.attrs.get("epsilon", 1e-12)
    results = {0: _layer_normalised(total, gamma, [beta], epsilon, new), 2: total}
    if mask is not None:
        results[1] = new.add("ReduceSum", mask, *_int64([1]), keepdims=0)
    return results


def _int64(*values: list[int]) -> list[np.ndarray[Any, Any]]:
    return [np.array(value, np.int64) for value in values]


# --- channels last -------------------------------------------------------------------------------


def _max_pool(new: _Fused) -> Results:
    [x] = new.node.inputs
    rank = new.rank(x)
    first = new.add("Transpose", x, perm=[0, rank - 1, *range(1, rank - 1)])
    pooled = new.add("MaxPool", first, **new.attrs(*POOL))
    return {0: new.add("Transpose", pooled, perm=[0, *range(2, rank), 1])}


_RULES: dict[str, Callable[[_Fused], Results]] = {
    "BiasGelu": _gelu,
    "EmbedLayerNormalization": _embed_layer_normalization,
    "FastGelu": _fast_gelu,
    "FusedConv": _conv,
    "FusedGemm": _gemm,
    "FusedMatMul": _matmul,
    "Gelu": _gelu,
    "NhwcMaxPool": _max_pool,
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_layer_normalization,
    "SkipSimplifiedLayerNormalization": _skip_rms_normalization,
    "TransposeMatMul": _matmul,
}
