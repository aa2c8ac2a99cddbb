r"""Let products multiply operands of 8 bits: put QuantizeLinear and DequantizeLinear before them.

    before            after

    x       W         x                              W in 8 bits
     \     /          |                              |
      Conv  b         QuantizeLinear (s)             |
       |              |                              |
       y              DequantizeLinear (s)   DequantizeLinear (one scale a channel)
                            \               /
                             Conv  b
                              |
                              y

    x       W         x                              W in 8 bits
     \     /          |                              |
      Gemm  b         QuantizeLinear (s)             |
       |              |                              |
       y              DequantizeLinear (s)   DequantizeLinear (one scale: t)
                            \               /
                             Gemm
                              |
                             Mul (scale of each column / t)
                              |
                             Add (b)
                              |
                              y

Which nodes, and the largest magnitude of each activation, is told by whoever chose (`Facts.lowering`);
the scales and the rounding are those of `optc.passes.quantisation`.

Where Q and DQ stand, and why. TensorRT's rules for explicit quantisation are that all operands of a
product are quantised, that Q comes right before what reads it and DQ right behind, that nothing stands
between a product and the bias, activation or Add that its kernel takes in, and that the other operand
of a residual Add is quantised. What that gives was read in the layers that the builder of TensorRT for
RTX 1.7.1 lists:
- Directly before the product, behind whatever moves values. The builder takes Q from there backwards
  through Relu, Concat, Reshape, Transpose, Slice, Resize (nearest) and, in int8 between fp16 or fp32,
  MaxPool; the values are in 8 bits from the kernel that makes them. DQ in front of a Resize or an
  AveragePool is not taken forwards, nor of a MaxPool in fp8 or between bf16: the product then
  multiplies floats. Several inputs of a Concat with scales of their own do not become one in 8 bits.
- One pair for each tensor, whoever reads it. A pair each gives the same engine.
- A residual Add reads the DQ of a tensor that products read quantised, and nobody else wants as
  floats: the kernel that makes it then writes 8 bits only. The other operand comes from the product,
  and the branch of a projection from another: they are added in the kernel, and a pair there saves
  nothing and costs exactness.
- Biases stay floats; so do the outputs.
- The weights of a Conv have a scale for each channel of its output, which the builder multiplies by in
  fp32. With several scales on the weights of a Gemm or MatMul it writes the bare sum of the products of
  integers as fp16, which ends at 65504; with one scale it multiplies by that in fp32 first. So there
  the scales of the columns (rows of weights on the left) are multiplied by afterwards. It is the kernel
  that the builder has anyway.
- Both products of an attention are quantised, to fp8, or none: see `optc.passes.quantisation`.
- The scales are float32 also between fp16: DequantizeLinear says of itself what it gives (opset 23),
  and Q then divides in float32. In fp16 the inverse of a small scale is infinite.

What it costs: operands are rounded, to 1/127 of the largest magnitude (int8) or to 4 significant bits
(fp8).

Needs: opset 23; 13 for int8, 19 for fp8 where the floats around stay float32. Finite constant weights.
Keeps: names of products and of tensors; the precision of outputs.
Skips, with the reason in the report: what `quantisable` refuses; an activation whose magnitude is not
known; nodes in bodies.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import Array, Node
from optc.passes.match import argument, made_by
from optc.passes.precision import DTYPES, Lowering
from optc.passes.quantisation import (
    PRODUCTS,
    EightBits,
    Operands,
    identities,
    is_eight_bits,
    is_quantised,
    quantisable,
    quantised,
    scale_of,
    softmax_of,
    weight_scales,
)

OPSETS: dict[EightBits, int] = {"int8": 13, "fp8": 19}
"""Where scales along an axis, and float8, came."""

MIXED_OPSET = 23
"""Where the type of a scale parted from that of the numbers."""


class QuantiseProducts(Pass):
    """Put QuantizeLinear and DequantizeLinear before products that are to multiply 8 bits."""

    name = "quantise-products"
    group = "lower"
    exactness = "operands rounded to int8 or fp8"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Quantise the operands of the products in ``graph`` that are told to be."""
        report = Report()
        if facts.lowering is None:
            return report
        chosen = _chosen(facts, facts.lowering, report)
        if not chosen:
            return report
        work = _Work(
            graph, facts, facts.lowering, report, {each.node.name: each for each in chosen}
        )
        residuals = work.residuals()  # looked for in the graph as it was
        for product in chosen:
            work.quantise(product)
        for add, index, precision in residuals:
            add.inputs[index] = work.activation(add.inputs[index], precision, add)
            report.merged[add.name] = (add.name,)
        return report


@dataclass(frozen=True, slots=True)
class _Product:
    """A product that can be quantised, and how."""

    node: gs.Node
    precision: EightBits
    operands: Operands


def _chosen(facts: Facts, lowering: Lowering, report: Report) -> list[_Product]:
    """Return the products to quantise; ``report`` has why the others cannot be."""
    found = []
    for name, node in _told(facts, lowering):
        precision = lowering.nodes[name]
        assert is_eight_bits(precision), "only these were told"
        operands = _operands(node, precision, facts, lowering)
        if isinstance(operands, str):
            report.skipped[name] = operands or f"{node.op} is no product that is quantised"
        else:
            found.append(_Product(node, precision, operands))
    whole = _with_whole_attentions(found, report)
    return [product for product in whole if _is_float32(product.node, facts, report)]


def _is_float32(node: gs.Node, facts: Facts, report: Report) -> bool:
    """Whether ``node`` multiplies float32; ``report`` has it if not. Asked last: see `_operands`."""
    if all(facts.dtype(tensor) == np.float32 for tensor in node.inputs[:2]):
        return True
    report.skipped[node.name] = "its operands are not float32"
    return False


def _with_whole_attentions(products: list[_Product], report: Report) -> list[_Product]:
    """Return ``products`` but for those in an attention whose other product is not among them."""
    products_of: dict[int, list[_Product]] = {}  # id of a Softmax -> products of two activations
    for product in products:
        softmax = softmax_of(product.node) if product.operands.weights is None else None
        if softmax is not None:
            products_of.setdefault(id(softmax), []).append(product)
    halves = {each.node.name for found in products_of.values() if len(found) == 1 for each in found}
    for name in halves:
        report.skipped[name] = "the other product of its attention is not quantised"
    return [product for product in products if product.node.name not in halves]


def _told(facts: Facts, lowering: Lowering) -> list[tuple[str, gs.Node]]:
    """Return the nodes that are told to be quantised and are not yet."""
    return [
        (node.name, node)
        for node in facts.nodes(*PRODUCTS, "ConvTranspose")
        if is_eight_bits(lowering.nodes.get(node.name, "fp32")) and not is_quantised(node)
    ]


def _operands(
    node: gs.Node, precision: EightBits, facts: Facts, lowering: Lowering
) -> Operands | str:
    if facts.in_body:
        return "nothing in the body of a control-flow node is quantised"

    def rank_of(tensor: gs.Tensor) -> int | None:
        dims = facts.dims(tensor)
        return None if dims is None else len(dims)

    def dtype_of(tensor: gs.Tensor) -> np.dtype[Any] | None:
        # What was left is in a short type when the pass looks again: it is told the same reason.
        found = facts.dtype(tensor)
        return np.dtype(np.float32) if found == DTYPES[lowering.floats] else found

    operands = quantisable(node, dtype_of, rank_of, precision)
    if isinstance(operands, str):
        return operands
    for index in operands.activations:
        name = _measured(node.inputs[index], lowering.amax)
        amax = lowering.amax.get(name)
        if amax is None:
            return f"nobody measured how large the values of `{name}` are"
        if not np.isfinite(amax) or amax < 0:
            return f"the largest magnitude of `{name}` is {amax:g}"
    if operands.weights is not None:
        weights = node.inputs[operands.weights]
        values = np.asarray(weights.values)
        if not values.size or not np.isfinite((values.min(), values.max())).all():
            return f"its weights `{weights.name}` are empty or not finite"
    opset = OPSETS[precision] if lowering.floats == "fp32" else MIXED_OPSET
    if not facts.reach_opset(opset):
        return f"the model cannot be raised to opset {opset}"
    return operands


def _measured(tensor: gs.Tensor, amax: Container[str]) -> str:
    """Return the name under which ``tensor`` was measured, or would have been before a Cast."""
    cast = made_by(tensor, "Cast")
    return tensor.name if cast is None or tensor.name in amax else str(cast.inputs[0].name)


@dataclass(frozen=True, slots=True)
class _Weights:
    """Weights in 8 bits.

    Attributes:
        dequantised: What a product reads.
        factors: What its channels are multiplied by then; None where each has its own scale already.
    """

    dequantised: gs.Variable
    factors: Array | None


@dataclass(slots=True)
class _Work:
    """One run on one graph: what is shared by several products is made once."""

    graph: gs.Graph
    facts: Facts
    lowering: Lowering
    report: Report
    products: dict[str, _Product]
    _activations: dict[tuple[str, EightBits], gs.Variable] = field(default_factory=dict)
    _weights: dict[tuple[str, EightBits, int, bool], _Weights] = field(default_factory=dict)
    _zeros: dict[EightBits, gs.Constant] = field(default_factory=dict)

    def residuals(self) -> list[tuple[gs.Node, int, EightBits]]:
        """Return the Adds that are to read an operand quantised: which, and to what."""
        found: list[tuple[gs.Node, int, EightBits]] = []
        names: dict[EightBits, set[str]] = {"int8": set(), "fp8": set()}
        for name, product in self.products.items():
            names[product.precision].add(name)
        for tensor, precision in self._quantised():
            if not self.facts.is_kept(tensor):
                adds = identities(tensor, names[precision], self._is_float, self.facts.dims)
                found += [(add, index, precision) for add, index in adds]
        return found

    def _quantised(self) -> list[tuple[gs.Tensor, EightBits]]:
        """Return the activations that products read quantised, each once, and to what."""
        read = {
            (tensor.name, product.precision): tensor
            for product in self.products.values()
            for tensor in (product.node.inputs[i] for i in product.operands.activations)
        }
        return [(tensor, precision) for (_, precision), tensor in read.items()]

    def _is_float(self, node: gs.Node) -> bool:
        return self.lowering.float_of(node.name) == self.lowering.floats

    def quantise(self, product: _Product) -> None:
        """Let ``product`` read its operands quantised."""
        node, operands = product.node, product.operands
        for index in operands.activations:
            node.inputs[index] = self.activation(node.inputs[index], product.precision, node)
        self.report.merged[node.name] = (node.name,)
        if operands.weights is None or operands.axis is None:
            return
        constant = node.inputs[operands.weights]
        weights = self.weights(constant, product.precision, operands.axis, node)
        node.inputs[operands.weights] = weights.dequantised
        if weights.factors is not None and (weights.factors != 1).any():
            self._scale_channels(node, weights.factors, rows=operands.weights == 0)

    def activation(self, tensor: gs.Tensor, precision: EightBits, reader: gs.Node) -> gs.Variable:
        """Return ``tensor`` as it is in 8 bits, quantised and dequantised once for all readers."""
        key = (tensor.name, precision)
        if key not in self._activations:
            name = self.facts.fresh_name
            scale = gs.Constant(
                name(f"{tensor.name}_scale"),
                np.asarray(scale_of(self.lowering.amax[tensor.name], precision)),
            )
            stored = self._add(
                "QuantizeLinear",
                f"{tensor.name}_quantise",
                reader,
                tensor,
                scale,
                self._zero(precision),
            )
            self._activations[key] = self._add(
                "DequantizeLinear", f"{tensor.name}_dequantise", reader, stored, scale
            )
        made = self._activations[key]
        for node in (made.inputs[0], made.inputs[0].inputs[0].inputs[0]):
            known = self.report.merged[node.name]
            self.report.merged[node.name] = tuple(dict.fromkeys((*known, reader.name)))
        return made

    def weights(
        self, constant: gs.Constant, precision: EightBits, axis: int, reader: gs.Node
    ) -> _Weights:
        """Return ``constant`` in 8 bits, once for all products that read it along ``axis``."""
        is_conv = reader.op == "Conv"
        key = (constant.name, precision, axis, is_conv)
        if key not in self._weights:
            values = np.asarray(constant.values)
            scales = weight_scales(values, axis, precision)
            stored = gs.Constant(
                self.facts.fresh_name(f"{constant.name}_{precision}"),
                quantised(values, scales, precision, axis),
            )
            shared = scales if is_conv else scales.max()
            scale = gs.Constant(
                self.facts.fresh_name(f"{constant.name}_scale"), np.asarray(shared, np.float32)
            )
            made = self._add(
                "DequantizeLinear",
                f"{constant.name}_dequantise",
                reader,
                stored,
                scale,
                **({"axis": axis} if is_conv else {}),
            )
            self._weights[key] = _Weights(made, None if is_conv else scales / shared)
        made = self._weights[key].dequantised
        known = self.report.merged[made.inputs[0].name]
        self.report.merged[made.inputs[0].name] = tuple(dict.fromkeys((*known, reader.name)))
        return self._weights[key]

    def _scale_channels(self, node: gs.Node, factors: Array, *, rows: bool) -> None:
        """Multiply what the product ``node`` gives by the ``factors`` of its columns, or rows."""
        [output] = node.outputs
        alpha = node.attrs.pop("alpha", 1.0)
        numbers = (factors * np.float32(alpha)).reshape((-1, 1) if rows else (-1,))
        bias = argument(node, 2)
        product = gs.Variable(self.facts.fresh_name(f"{node.name}_product"))
        node.outputs[0] = product
        while len(node.inputs) > 2:
            node.inputs.pop()
        factor = gs.Constant(self.facts.fresh_name(f"{node.name}_factors"), numbers)
        scaled = self._add("Mul", f"{node.name}_scale", node, product, factor)
        if bias is not None:
            beta = node.attrs.pop("beta", 1.0)
            if beta != 1.0:
                value = np.asarray(np.asarray(bias.values) * np.float32(beta))
                bias = gs.Constant(self.facts.fresh_name(f"{node.name}_bias"), value)
            scaled = self._add("Add", f"{node.name}_add", node, scaled, bias)
        [last] = scaled.inputs
        last.outputs[0] = output

    def _zero(self, precision: EightBits) -> gs.Constant:
        if precision not in self._zeros:
            self._zeros[precision] = gs.Constant(
                self.facts.fresh_name(f"{precision}_zero"), np.zeros((), DTYPES[precision])
            )
        return self._zeros[precision]

    def _add(
        self, op: str, stem: str, reader: gs.Node, *inputs: gs.Tensor, **attrs: int
    ) -> gs.Variable:
        """Add a node that stands for ``reader``, as part of it."""
        node = Node(op, self.facts.fresh_name(stem), attrs=dict(attrs), inputs=inputs)
        made = gs.Variable(self.facts.fresh_name(f"{node.name}d"))
        node.outputs.append(made)
        self.graph.nodes.append(node)
        self.report.merged[node.name] = (reader.name,)
        self.report.precisions[node.name] = self.lowering.floats
        return made
