"""Normalisations that are spelt out: how their nodes are found, and what they normalise.

What exporters write is, with small variations, one core

    (x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + epsilon)        or, not centred,
    x / sqrt(mean(x ** 2) + epsilon)

and behind it, where the model has them, a constant scale and a constant bias. The core is searched
from its square root, a few steps up and down: of all its nodes it is the rarest. Which operator says
the same depends on the axes that the means are taken over.

How exact: equal but for rounding. Where the original leaves the range of its type on the way, as
the square of a large float16 does, an operator that computes in a wider type still gives the number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from optc.passes.affine import Array, Refused
from optc.passes.contract import Facts, Report
from optc.passes.dimension import Dim
from optc.passes.match import (
    are_private,
    argument,
    become,
    either_way,
    is_number,
    made_by,
    names_of,
    number,
)
from optc.passes.movement import axes_of

FLOAT16, BFLOAT16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)

WIDER = {FLOAT16: (FLOAT32, FLOAT64), BFLOAT16: (FLOAT32,)}
"""Type of x -> types to compute in, of which none rounds it better than the operator's float32."""

Fit = Callable[[gs.Constant], Array | None]
"""Gives a scale or bias the shape that the operator wants; None where it has another meaning."""


@dataclass(slots=True, eq=False)
class Normalization:
    """A normalisation that is spelt out.

    Attributes:
        x: What is normalised.
        deviation: What is squared: x, or x less its mean.
        means: The nodes that take means: of the squares, and of x where that is taken off.
        epsilon: What is added to the mean of the squares.
        nodes: All of its nodes, the one that makes the result last.
        scale: What the normalised values are multiplied by; None: nothing.
        bias: What is added then; None: nothing.
        dims: Extents of x. This and the types are known once `measure` has been asked.
        dtype: Type of x and of the result.
        stash: Type that the core computes in.
    """

    x: gs.Tensor
    deviation: gs.Tensor
    means: list[gs.Node]
    epsilon: float
    nodes: list[gs.Node]
    scale: gs.Constant | None = None
    bias: gs.Constant | None = None
    dims: tuple[Dim, ...] = ()
    dtype: np.dtype[Any] = FLOAT32
    stash: np.dtype[Any] = FLOAT32

    @property
    def centred(self) -> bool:
        """Whether the mean is taken off."""
        return len(self.means) == 2

    @property
    def y(self) -> gs.Tensor:
        """The result."""
        tensor: gs.Tensor = self.nodes[-1].outputs[0]
        return tensor

    def measure(self, facts: Facts) -> None:
        """Look up types and extents.

        Raises:
            Refused: If they are not known.
        """
        dims, dtype = facts.shapes.dims(self.x.name), facts.shapes.dtype(self.x.name)
        stash = facts.shapes.dtype(self.y.name)
        if dims is None or dtype is None or stash is None:
            raise Refused("rank or type of what it normalises is not known")
        self.dims, self.dtype, self.stash = dims, dtype, stash

    def require_exact(self, facts: Facts) -> None:
        """Check what every operator requires.

        Raises:
            Refused: If none computes the same.
        """
        if self.stash not in (FLOAT16, BFLOAT16, FLOAT32):
            raise Refused(f"it computes in {self.stash.name}, the operator's epsilon is a float32")
        if not 0 < self.epsilon < math.inf:
            raise Refused(f"its epsilon is {self.epsilon:g}")
        if facts.shapes.dims(self.y.name) != self.dims:
            raise Refused("its result has another shape than what it normalises")
        if not are_private(self.nodes[:-1], facts, within=self.nodes):
            raise Refused("a value on the way has another reader")

    def axes(self, facts: Facts) -> tuple[int, ...]:
        """Return the axes that the means are taken over, from the first one.

        Raises:
            Refused: If they are not known, or not the same for mean and variance.
        """
        first, *others = (_axes_of(mean, len(self.dims), facts) for mean in self.means)
        if any(other != first for other in others):
            raise Refused("mean and variance are taken over different axes")
        return first

    def take_casts(self, facts: Facts) -> None:
        """Go on to a Cast that undoes one before or within the core.

        Raises:
            Refused: If there is a Cast within and nothing undoes it.
        """
        is_scaled = self.scale is not None or self.bias is not None
        narrowing = None if is_scaled else self.reader("Cast", facts)
        goal = None if narrowing is None else helper.tensor_dtype_to_np_dtype(narrowing.attrs["to"])
        if self.dtype != self.stash:
            if goal != self.dtype or self.stash not in WIDER.get(self.dtype, ()):
                raise Refused(f"it makes {self.stash.name} of {self.dtype.name}")
            self.nodes.append(narrowing)
        elif goal is not None and self.stash in WIDER.get(np.dtype(goal), ()):
            widening = made_by(self.x, "Cast")
            if widening is None or facts.shapes.dtype(widening.inputs[0].name) != goal:
                return
            if not are_private([widening], facts, within=self.nodes):
                return
            self.x, self.dtype = widening.inputs[0], np.dtype(goal)
            self.nodes = [widening, *self.nodes, narrowing]
        if self.stash == FLOAT64 and self.dtype == FLOAT16:
            self.stash = FLOAT32  # holds the square of any float16, with digits to spare

    def take_affine(self, facts: Facts, fit: Fit, *, with_bias: bool = True) -> None:
        """Go on to a Mul and an Add with constants that ``fit``.

        Raises:
            Refused: If a scale or bias that is part of the core does not fit.
        """
        if not self.fits(fit):
            raise Refused("its scale or bias varies along other axes than the operator's")
        if self.bias is not None:
            return
        if self.scale is None:
            self.scale = self._constant_behind("Mul", facts, fit)
        if with_bias:
            self.bias = self._constant_behind("Add", facts, fit)

    def fits(self, fit: Fit) -> bool:
        """Whether scale and bias fit, or there are none."""
        given = (constant for constant in (self.scale, self.bias) if constant is not None)
        return all(fit(constant) is not None for constant in given)

    def _constant_behind(self, op: str, facts: Facts, fit: Fit) -> gs.Constant | None:
        reader = self.reader(op, facts)
        if reader is None:
            return None
        for value, constant in either_way(reader):
            if value is self.y and isinstance(constant, gs.Constant) and fit(constant) is not None:
                self.nodes.append(reader)
                return constant
        return None

    def reader(self, op: str, facts: Facts) -> gs.Node | None:
        """Return the only reader of the result if it is one of ``op``."""
        if facts.is_shared(self.y):
            return None
        [reader] = self.y.outputs
        return reader if reader.op == op and not reader.domain else None


def _axes_of(mean: gs.Node, rank: int, facts: Facts) -> tuple[int, ...]:
    axes = axes_of(mean, facts)
    if axes is None and argument(mean, 1) is not None:
        raise Refused("the axes of a mean are computed at run time")
    if not axes:
        if mean.attrs.get("noop_with_empty_axes", 0):
            raise Refused("a mean is taken over no axis")
        return tuple(range(rank))
    return tuple(sorted({axis % rank for axis in axes})) if rank else ()


# --- finding the core ----------------------------------------------------------------------------


def normalizations(facts: Facts, *, centred: bool) -> Iterator[Normalization]:
    """Yield the cores in the graph at hand, those that take the mean off or those that do not."""
    for root in facts.nodes("Sqrt", "Pow"):
        found = _above(root)
        if found is not None and found.centred == centred and _below(root, found):
            yield found


def _above(root: gs.Node) -> Normalization | None:
    """Return what is above a root: the mean of squares plus epsilon, and what is squared."""
    if not (_is_root(root) or _is_inverse_root(root)):
        return None
    plus = made_by(root.inputs[0], "Add")
    for variance, constant in either_way(plus) if plus is not None else ():
        mean, epsilon = _mean(variance), number(constant)
        square = None if mean is None else made_by(mean.inputs[0], "Mul", "Pow")
        if mean is None or epsilon is None or square is None or not _is_square(square):
            continue
        deviation = square.inputs[0]
        found = Normalization(deviation, deviation, [mean], epsilon, [square, mean, plus, root])
        _centre(found)
        return found
    return None


def _is_root(node: gs.Node) -> bool:
    return node.op == "Sqrt" or is_number(node.inputs[1], 0.5, rtol=0)


def _is_inverse_root(node: gs.Node) -> bool:
    return node.op == "Pow" and is_number(node.inputs[1], -0.5, rtol=0)


def _is_square(node: gs.Node) -> bool:
    base, other = node.inputs
    return other is base if node.op == "Mul" else is_number(other, 2, rtol=0)


def _mean(tensor: gs.Tensor) -> gs.Node | None:
    """Return the node that makes ``tensor`` if it takes a mean and keeps the axes."""
    mean = made_by(tensor, "ReduceMean")
    return mean if mean is not None and mean.attrs.get("keepdims", 1) else None


def _centre(found: Normalization) -> None:
    """Go on to x where the deviation is x - mean(x), perhaps cast."""
    cast = made_by(found.deviation, "Cast")
    minus = made_by(found.deviation if cast is None else cast.inputs[0], "Sub")
    mean = None if minus is None else _mean(minus.inputs[1])
    if minus is None or mean is None or mean.inputs[0] is not minus.inputs[0]:
        return
    found.x = minus.inputs[0]
    found.means.append(mean)
    found.nodes = [mean, minus, *([] if cast is None else [cast]), *found.nodes]


def _below(root: gs.Node, found: Normalization) -> bool:
    """Find the end: what divides by the root, or multiplies by its inverse."""
    value = root.outputs[0]
    if _is_inverse_root(root):
        return _multiplied(value, found)
    for reader in _readers(value, "Div", "Reciprocal"):
        if reader.op == "Div" and reader.inputs[1] is not value:
            continue
        if reader.op == "Div" and reader.inputs[0] is found.deviation:
            found.nodes.append(reader)
            return True
        if reader.op == "Reciprocal" or is_number(reader.inputs[0], 1, rtol=0):
            found.nodes.append(reader)
            return _multiplied(reader.outputs[0], found)
    return False


def _multiplied(inverse: gs.Tensor, found: Normalization) -> bool:
    """Find the end as a product with ``inverse``, or with ``inverse`` times a constant scale."""
    if _ends(inverse, found):
        return True
    for product, other in _products(inverse):
        if isinstance(other, gs.Constant) and _ends(product.outputs[0], found, product):
            found.scale = other
            return True
    return False


def _ends(factor: gs.Tensor, found: Normalization, *nodes: gs.Node) -> bool:
    """Find ``deviation * factor`` or ``x * factor + (bias - mean * factor)`` as the end.

    Args:
        nodes: Belong to the normalisation too where it ends like this.
    """
    products = {id(other): product for product, other in _products(factor)}
    if id(found.deviation) in products:
        found.nodes += [*nodes, products[id(found.deviation)]]
        return True
    of_x = products.get(id(found.x))
    if of_x is None or not found.centred:
        return False
    for shift, bias in _shifts(found.means[-1].outputs[0], products):
        for plus in _readers(shift[-1].outputs[0], "Add"):
            if any(value is of_x.outputs[0] for value in plus.inputs):
                found.bias = bias
                found.nodes += [*nodes, of_x, *shift, plus]
                return True
    return False


def _shifts(
    mean: gs.Tensor, products: Mapping[int, gs.Node]
) -> Iterator[tuple[list[gs.Node], gs.Constant | None]]:
    """Yield the nodes of ``bias - mean * factor``, the last one last, and the bias.

    Args:
        products: Identity of a tensor -> the node that multiplies it by the factor.
    """
    if (of_mean := products.get(id(mean))) is not None:
        for minus in _readers(of_mean.outputs[0], "Sub"):
            bias, subtrahend = minus.inputs
            if subtrahend is of_mean.outputs[0] and isinstance(bias, gs.Constant):
                yield [of_mean, minus], bias
    for negative in _readers(mean, "Neg"):
        if (product := products.get(id(negative.outputs[0]))) is None:
            continue
        yield [negative, product], None
        for plus in _readers(product.outputs[0], "Add"):
            for value, bias in either_way(plus):
                if value is product.outputs[0] and isinstance(bias, gs.Constant):
                    yield [negative, product, plus], bias


def _products(factor: gs.Tensor) -> Iterator[tuple[gs.Node, gs.Tensor]]:
    """Yield each Mul that reads ``factor``, with what it multiplies it by."""
    for node in _readers(factor, "Mul"):
        left, right = node.inputs
        yield node, right if left is factor else left


def _readers(tensor: gs.Tensor, *ops: str) -> Iterator[gs.Node]:
    return (node for node in tensor.outputs if node.op in ops and not node.domain)


# --- over the last axes --------------------------------------------------------------------------

STASH_TYPES = {FLOAT32: 1, FLOAT16: 10, BFLOAT16: 16}
"""Type -> its number, as the attribute ``stash_type`` wants it."""


def fuse_over_last_axes(facts: Facts, op: str, *, since: int, centred: bool) -> Report:
    """Let what normalises over the last axes be an ``op``, which there is from opset ``since``.

    One that is centred takes a bias too.
    """
    report = Report()
    for found in normalizations(facts, centred=centred):
        try:
            _fuse_over_last_axes(found, facts, op, since)
        except Refused as refusal:
            report.skipped[found.nodes[-1].name] = str(refusal)
        else:
            report.merged[found.nodes[-1].name] = names_of(*found.nodes)
    return report


def _fuse_over_last_axes(found: Normalization, facts: Facts, op: str, since: int) -> None:
    found.measure(facts)
    axes, rank = found.axes(facts), len(found.dims)
    if not axes or axes != tuple(range(rank - len(axes), rank)):
        raise Refused(f"it normalises the axes {list(axes)} of {rank}, not the last ones")
    extents = tuple(dim for dim in found.dims[axes[0] :] if isinstance(dim, int))
    if len(extents) != len(axes) or 0 in extents:
        raise Refused("the extents that it normalises over are not fixed")
    found.take_casts(facts)
    found.require_exact(facts)

    def fit(constant: gs.Constant) -> Array | None:
        return spread_over(constant, extents, rank)

    found.take_affine(facts, fit, with_bias=found.centred)
    if not facts.reach_opset(since):
        raise Refused(f"the model cannot be raised to opset {since}, which has {op}")
    attrs: dict[str, Any] = {"axis": -len(axes), "epsilon": found.epsilon}
    if found.stash != FLOAT32:
        attrs["stash_type"] = STASH_TYPES[found.stash]
    scale = shaped(found, found.scale, fit, "scale", facts)
    if scale is None:
        ones = np.ones(extents, found.dtype)
        scale = gs.Constant(facts.fresh_name(f"{found.y.name}_scale"), ones)
    bias = shaped(found, found.bias, fit, "bias", facts)
    become(found.nodes[-1], op, [found.x, scale, *([] if bias is None else [bias])], attrs)


def shaped(
    found: Normalization, constant: gs.Constant | None, fit: Fit, what: str, facts: Facts
) -> gs.Tensor | None:
    """Return a scale or bias in the shape that ``fit`` gives it: itself where it has it already."""
    if constant is None:
        return None
    values = fit(constant)
    assert values is not None, "take_affine() takes what fits"
    if values.shape == tuple(constant.shape):
        return constant
    return gs.Constant(facts.fresh_name(f"{found.y.name}_{what}"), values)


def spread_over(constant: gs.Constant, extents: tuple[int, ...], rank: int) -> Array | None:
    """Return a constant that meets a tensor's last axes as one of their extents, else None.

    Args:
        constant: What is broadcast to the tensor.
        extents: Those of the last axes.
        rank: That of the tensor.
    """
    shape = tuple(constant.shape)
    lead, last = shape[: -len(extents)], shape[-len(extents) :]
    if len(shape) > rank or any(extent != 1 for extent in lead):
        return None
    wanted = extents[len(extents) - len(last) :]
    if any(extent not in (1, goal) for extent, goal in zip(last, wanted, strict=True)):
        return None
    if shape == extents:
        return np.asarray(constant.values)
    values = np.asarray(constant.values).reshape(last)
    return np.ascontiguousarray(np.broadcast_to(values, extents))
