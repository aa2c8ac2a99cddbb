"""Conv, ConvTranspose, DeformConv, Gemm and MatMul with constant weights, seen by channel.

All of them multiply by weights and add a bias. So what follows them channel by channel goes into
weights and bias, and so does what comes before them:

    s * (W x + b) + t  =  (s * W) x + (s * b + t)
    W (s * x + t) + b  =  (W * s) x + (b + W t)

That arithmetic, and the reasons against it, are here once for all passes that fold.

How exact: weights and bias are computed in float64 and rounded once to their own type. Where the
type cannot hold them (overflow, or a float16 channel so small that it would lose digits), nothing
is folded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from optc.passes.affine import (
    Array,
    Channels,
    Doubles,
    Refused,
    affine_of,
    per_channel,
    variable_of,
)
from optc.passes.contract import Facts, Report
from optc.passes.graph import detach, producer, redirect

CONVOLUTIONS = ("Conv", "ConvTranspose", "DeformConv")
PRODUCTS = ("Gemm", "MatMul")
FLOATS = ("float16", "bfloat16", "float32", "float64")

ROOM = 1 / 64
"""What part of the range of a type a new addend may take: the sum needs room as well."""

STEPPING = frozenset({"Ceil", "Floor", "QuantizeLinear", "Round"})
"""Ops that make a whole step of the last bit of what they read. A quantised model spells its
quantisation out so, and the scale in front of the rounding has to stay what it is."""

COPIED_BYTES = 64 * 1024
"""Weights of up to so many bytes are copied where those who share them want different things."""

NOTHING = 1e-30
"""A channel whose largest weight is below this may vanish: training leaves such dead channels."""


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A node that multiplies its input by weights and adds a bias.

    Attributes:
        node: The node itself.
        weight: Its weights, constant or not.
        bias: Its bias, constant or not; None where it has none.
        adder: The Add right behind a MatMul that holds its bias; None for all others.
    """

    node: gs.Node
    weight: gs.Tensor
    bias: gs.Tensor | None = None
    adder: gs.Node | None = None

    @property
    def last(self) -> gs.Node:
        """The node that makes the result."""
        return self.adder or self.node

    @property
    def groups(self) -> int:
        """How many groups of channels there are that do not see each other."""
        return int(self.node.attrs.get("group", 1))

    @property
    def is_transposed(self) -> bool:
        """Whether the weights of a Gemm are [output channels, input channels]."""
        return bool(self.node.attrs.get("transB", 0))

    def require_constants(self) -> None:
        """Check that weights and bias can be given new values.

        Raises:
            Refused: If they cannot.
        """
        op = self.node.op
        if not isinstance(self.weight, gs.Constant):
            raise Refused(f"the weights of the {op} are computed at run time")
        if self.bias is not None and not isinstance(self.bias, gs.Constant):
            raise Refused(f"the bias of the {op} is computed at run time")
        shape, dtype = self.weight.shape, np.dtype(self.weight.dtype)
        if dtype.name not in FLOATS:
            raise Refused(f"the weights of the {op} are {dtype.name}")
        if 0 in shape or len(shape) < 2 or shape[0] % self.groups:
            raise Refused(f"the weights of the {op} have the shape {list(shape)}")

    def channels(self, facts: Facts) -> Channels:
        """Return where the output channels are. The weights must be constant."""
        shape = self.weight.shape
        match self.node.op:
            case "Conv" | "DeformConv":
                return Channels(shape[0], axis=1, rank=len(shape))
            case "ConvTranspose":
                return Channels(shape[1] * self.groups, axis=1, rank=len(shape))
            case "Gemm":
                return Channels(shape[0 if self.is_transposed else 1], axis=1, rank=2)
        dims = facts.shapes.dims(self.node.outputs[0].name)
        rank = 1 if dims is None else len(dims)  # unknown: one axis is there for sure
        return Channels(shape[-1], axis=rank - 1, rank=rank)

    def input_channels(self, facts: Facts) -> Channels:
        """Return where the input channels are. The weights must be constant.

        Raises:
            Refused: If a product has more than one matrix of weights, or its input an unknown rank.
        """
        shape = self.weight.shape
        match self.node.op:
            case "Conv" | "DeformConv":
                return Channels(shape[1] * self.groups, axis=1, rank=len(shape))
            case "ConvTranspose":
                return Channels(shape[0], axis=1, rank=len(shape))
            case "Gemm":
                axis = 0 if self.node.attrs.get("transA", 0) else 1
                return Channels(shape[1 if self.is_transposed else 0], axis, rank=2)
        dims = facts.shapes.dims(self.node.inputs[0].name)
        if dims is None or len(shape) != 2:
            raise Refused("the MatMul is not known to multiply by one matrix")
        return Channels(shape[0], axis=len(dims) - 1, rank=len(dims))

    def bias_numbers(self, channels: Channels) -> Doubles:
        """Return the constant bias, zeros where there is none, as one number per output channel.

        Raises:
            Refused: If it varies over another axis.
        """
        if self.bias is None:
            return np.zeros(channels.count)
        if self.node.op in CONVOLUTIONS:  # their bias has one axis, not those of the result
            channels = Channels(channels.count, axis=0, rank=1)
        numbers = per_channel(self.bias, channels)
        if numbers is None:
            raise Refused(f"the bias of the {self.node.op} is not one number per channel")
        return numbers * self.node.attrs.get("beta", 1.0) if self.node.op == "Gemm" else numbers

    def by_channel(self, weight: Array) -> Array:
        """Return contiguous weights as a view: [group, output channel, input channel, the rest]."""
        kernel = math.prod(weight.shape[2:])
        match self.node.op:
            case "Conv" | "DeformConv":
                return weight.reshape(self.groups, -1, weight.shape[1], kernel)
            case "ConvTranspose":
                return weight.reshape(self.groups, -1, weight.shape[1], kernel).swapaxes(1, 2)
            case "Gemm" if self.is_transposed:
                return weight.reshape(1, *weight.shape, 1)
        return weight.reshape(1, -1, weight.shape[-1], 1).swapaxes(1, 2)

    def scaled(self, factor: Doubles) -> Array:
        """Return the weights times ``factor``.

        Args:
            factor: Has four axes, and broadcasts to the view that `by_channel` gives.

        Raises:
            Refused: If the type of the weights cannot hold the result.
        """
        weight = np.ascontiguousarray(peek(self.weight))
        product = np.empty(weight.shape, weight.dtype)
        rows, result = self.by_channel(weight), self.by_channel(product)
        with np.errstate(all="ignore"):  # what comes of it is judged below
            # numpy computes this in float64 buffer by buffer: no double copy of large weights
            np.multiply(rows, factor, out=result, dtype=np.float64, casting="unsafe")
        largest = np.maximum(result.max((2, 3)), -result.min((2, 3))).astype(np.float64)
        is_small = largest < limits(weight.dtype)[0]
        fits = bool(np.isfinite(largest).all())
        if fits and is_small.any():
            exact = np.abs(np.multiply(rows, factor, dtype=np.float64, casting="unsafe"))
            fits = bool(exact[is_small].max() < NOTHING)
        if not fits:
            raise Refused(f"the folded weights do not fit {weight.dtype.name}")
        return product

    def summed(self, shift: Doubles) -> Doubles:
        """Return what the weights make of a constant per input channel: a number per output one.

        Args:
            shift: Broadcast to [group, output channel, input channel].
        """
        rows = self.by_channel(np.ascontiguousarray(peek(self.weight)))
        with np.errstate(all="ignore"):  # what is not finite is refused
            summed: Doubles = (rows.astype(np.float64).sum(3) * shift).sum(2).reshape(-1)
        return summed * self.node.attrs.get("alpha", 1.0) if self.node.op == "Gemm" else summed


def linear_making(tensor: gs.Tensor, ops: Collection[str]) -> Linear | None:
    """Return the node of ``ops`` that makes ``tensor``, or None.

    A MatMul counts where its right operand is a constant; with an Add of a constant right behind
    it, the two are seen as one.
    """
    node = producer(tensor)
    if node is None or node.domain:
        return None
    if node.op == "Add" and "MatMul" in ops:
        x = variable_of(node)
        product = producer(x) if x is not None else None
        if product is None or not _is_weighted_product(product):
            return None
        bias = next(t for t in node.inputs if isinstance(t, gs.Constant))
        return Linear(product, product.inputs[1], bias, adder=node)
    if node.op not in ops or (node.op == "MatMul" and not _is_weighted_product(node)):
        return None
    return _linear_at(node)


def _is_weighted_product(node: gs.Node) -> bool:
    """Whether ``node`` is a MatMul with weights, not one of two results."""
    return node.op == "MatMul" and not node.domain and isinstance(node.inputs[1], gs.Constant)


def _linear_at(node: gs.Node) -> Linear:
    at = _bias_at(node)
    has_bias = len(node.inputs) > at and bool(node.inputs[at].name)
    return Linear(node, node.inputs[1], node.inputs[at] if has_bias else None)


def _bias_at(node: gs.Node) -> int:
    return 3 if node.op == "DeformConv" else 2  # X, W, offset, B, mask


def linear_reading(node: gs.Node, facts: Facts) -> Linear:
    """Return ``node`` as a linear one, with the Add of a constant right behind it if a MatMul."""
    readers = node.outputs[0].outputs
    if node.op == "MatMul" and len(readers) == 1 and not facts.is_kept(node.outputs[0]):
        linear = linear_making(readers[0].outputs[0], ("MatMul",)) if readers[0].outputs else None
        if linear is not None and linear.node is node:
            return linear
    return _linear_at(node)


def fold_into(
    graph: gs.Graph, facts: Facts, *, followers: Collection[str], into: Collection[str]
) -> Report:
    """Fold every node of ``followers`` into the node of ``into`` whose result it reads.

    That node keeps its name and takes over the output of the one it now stands for. A MatMul of
    matrices that is given a bias becomes a Gemm. Nodes that share their weights are folded together
    where all are followed by the same scale, else not at all.
    """
    report = Report()
    candidates = facts.nodes(*followers)
    own = {id(node) for node in graph.nodes} if candidates else set()

    def linear_before(follower: gs.Node) -> Linear | None:
        x = variable_of(follower) if follower.op in followers else None
        linear = linear_making(x, into) if x is not None else None
        if linear is None or not own.issuperset(map(id, (follower, linear.node, linear.last))):
            return None  # not our pattern, or in a body and fed by what is computed outside it
        return linear

    for follower in candidates:
        linear = linear_before(follower)
        if linear is None:
            continue
        try:
            folds = _together(_after(linear, follower, facts), linear_before, facts)
            _apply(folds, facts)
        except Refused as refused:
            report.skipped[follower.name] = str(refused)
            continue
        for fold in folds:
            last, output = fold.linear.last, fold.gone.outputs[0]
            detach(fold.gone)
            last.outputs = [output]
            stands_for = report.merged.get(last.name, (last.name,))
            report.merged[last.name] = (*stands_for, fold.gone.name)
    return report


def fold_back(
    graph: gs.Graph, facts: Facts, *, leaders: Collection[str], into: Collection[str]
) -> Report:
    """Fold every node of ``leaders`` into the nodes of ``into`` that read its result: all or none.

    They keep their names and outputs, and read what the other read. A leader that only scales may have
    an Add or Sub of a constant behind it that cannot be folded: s * x + t is s * (x + t / s).
    """
    report = Report()
    own: set[int] | None = None
    for leader in reversed(facts.nodes(*leaders)):  # of two in a row the last one goes first
        x = variable_of(leader)
        if x is None:
            continue
        adder = _adder_behind(leader, into)
        made = (adder or leader).outputs[0]
        readers = list({id(node): node for node in made.outputs}.values())
        if not any(reads_linearly(node, made, into) for node in readers):
            continue
        own = own or {id(node) for node in graph.nodes}
        try:
            if facts.is_kept(made) or not all(
                reads_linearly(node, made, into) and id(node) in own for node in readers
            ):
                raise Refused(f"the {(adder or leader).op} output has another reader")
            folds = [_before(node, leader, x, facts) for node in readers]
            _require_alike(folds, facts)
            addend = None if adder is None else _unscaled(adder, leader, folds[0].linear, facts)
            _apply(folds, facts)
        except Refused as refused:
            report.skipped[leader.name] = str(refused)
            continue
        if adder is not None:
            adder.inputs = [addend if isinstance(t, gs.Constant) else t for t in adder.inputs]
        redirect(leader.outputs[0], x)
        detach(leader)
        for fold in folds:
            last = fold.linear.last
            report.merged[last.name] = (leader.name, *report.merged.get(last.name, (last.name,)))
    return report


def _adder_behind(leader: gs.Node, into: Collection[str]) -> gs.Node | None:
    """Return the Add or Sub of a constant between a ``leader`` that scales and nodes of ``into``."""
    made = leader.outputs[0]
    if leader.op not in {"Mul", "Div", "Neg"} or len(made.outputs) != 1:
        return None
    adder: gs.Node = made.outputs[0]
    if adder.op not in {"Add", "Sub"} or variable_of(adder) is not made:
        return None
    summed = adder.outputs[0]
    return adder if any(reads_linearly(node, summed, into) for node in summed.outputs) else None


def _unscaled(adder: gs.Node, leader: gs.Node, linear: Linear, facts: Facts) -> gs.Constant:
    """Return what ``adder`` adds, over the scale of the ``leader`` before it.

    Raises:
        Refused: If that is no number, or one so large that the rest of the sum would be lost in it.
    """
    if facts.is_shared(leader.outputs[0]):
        raise Refused(f"the {leader.op} output has another reader")
    inputs = linear.input_channels(facts)
    constant = next(t for t in adder.inputs if isinstance(t, gs.Constant))
    shift, scale = per_channel(constant, inputs), affine_of(leader, inputs, facts.opset).scale
    if shift is None or scale is None:
        shape = list(constant.shape)
        raise Refused(f"the constant has shape {shape}: it is not one number per channel")
    dtype = np.dtype(constant.dtype)
    with np.errstate(all="ignore"):  # what is not finite is refused
        numbers = shift / scale
        smallest, largest = limits(dtype)
        fits = np.abs(numbers) <= largest * ROOM
        fits &= (np.abs(numbers) >= smallest) | (shift == 0)
    if not fits.all():
        raise Refused(f"what the {adder.op} would add does not fit {dtype.name}")
    form = numbers[:1] if (numbers == numbers[0]).all() else numbers
    values = inputs.broadcast(form) if form.size > 1 else form.reshape(())
    return gs.Constant(facts.fresh_name(f"{adder.name}.addend"), values.astype(dtype))


def reads_linearly(node: gs.Node, tensor: gs.Tensor, into: Collection[str]) -> bool:
    """Whether ``node`` is one of ``into`` and multiplies ``tensor``, once, by its weights."""
    if node.op == "MatMul" and not _is_weighted_product(node):
        return False
    return (
        node.op in into
        and not node.domain
        and node.inputs[0] is tensor
        and sum(read is tensor for read in node.inputs) == 1
    )


def scale_outputs(linear: Linear, numbers: Doubles, gone: gs.Node, facts: Facts) -> None:
    """Multiply what ``linear`` makes by a number per output channel, in place of ``gone``.

    Raises:
        Refused: If its weights and bias cannot take it.
    """
    linear.require_constants()
    if linear.adder is not None and facts.is_shared(linear.node.outputs[0]):
        raise Refused(f"the {linear.node.op} output has another reader")
    channels = linear.channels(facts)
    bias = None if linear.bias is None else linear.bias_numbers(channels) * numbers
    fold = _Fold(linear, gone, channels, numbers.reshape(linear.groups, -1, 1, 1), bias)
    _require_alike([fold], facts)
    _apply([fold], facts)


def scale_input(linear: Linear, number: float, gone: gs.Node, facts: Facts) -> None:
    """Multiply what ``linear`` reads by a number, in place of ``gone``.

    Raises:
        Refused: If its weights cannot take it.
    """
    linear.require_constants()
    factor = np.full((1, 1, 1, 1), number)
    fold = _Fold(linear, gone, linear.channels(facts), factor, None)
    _require_alike([fold], facts)
    _apply([fold], facts)


@dataclass(frozen=True, slots=True, eq=False)
class _Fold:
    """One node that may go into a linear node: worked out, and not done yet.

    Attributes:
        linear: Where it goes.
        gone: The node that goes.
        channels: The output channels.
        factor: What to multiply the weights by, see `Linear.scaled`; None leaves them alone.
        bias: The new bias, one number per output channel; None leaves it alone.
        copies: Whether the new weights are its own, and the old ones stay for others.
    """

    linear: Linear
    gone: gs.Node
    channels: Channels
    factor: Doubles | None
    bias: Doubles | None
    copies: bool = False


def _after(linear: Linear, follower: gs.Node, facts: Facts) -> _Fold:
    """Return how ``follower`` would go into the node before it."""
    if any(facts.is_shared(node.outputs[0]) for node in (linear.node, linear.last)):
        raise Refused(f"the {linear.node.op} output has another reader")
    if any(reader.op in STEPPING for reader in follower.outputs[0].outputs):
        raise Refused(
            "its result is rounded: what another order of rounding moves would become a step"
        )
    linear.require_constants()
    channels = linear.channels(facts)
    affine = affine_of(follower, channels, facts.opset)
    bias = linear.bias_numbers(channels)
    factor = None
    with np.errstate(all="ignore"):  # what is not finite then is refused
        if affine.scale is not None:
            factor = affine.scale.reshape(linear.groups, -1, 1, 1)
            bias = bias * affine.scale
        if affine.shift is not None:
            bias = bias + affine.shift
    is_unbiased = linear.bias is None and affine.shift is None
    return _Fold(linear, follower, channels, factor, None if is_unbiased else bias)


def _before(node: gs.Node, leader: gs.Node, x: gs.Tensor, facts: Facts) -> _Fold:
    """Return how ``leader``, which reads ``x``, would go into the linear node behind it."""
    linear = linear_reading(node, facts)
    linear.require_constants()
    inputs, outputs = linear.input_channels(facts), linear.channels(facts)
    dims = facts.shapes.dims(x.name)
    if dims is None or len(dims) != inputs.rank or dims[inputs.axis] != inputs.count:
        raise Refused(f"the {leader.op} makes what it reads larger, or may do so")
    affine = affine_of(leader, inputs, facts.opset)
    factor = bias = None
    if affine.scale is not None:
        factor = affine.scale.reshape(linear.groups, 1, -1, 1)
    if affine.shift is not None:
        if not _adds_evenly(node):
            raise Refused(f"not every output of the {node.op} sees all of the kernel")
        bias = linear.bias_numbers(outputs)
        bias = bias + linear.summed(affine.shift.reshape(linear.groups, 1, -1))
    return _Fold(linear, leader, outputs, factor, bias)


def _adds_evenly(node: gs.Node) -> bool:
    """Whether each output is a sum over all of the weights that lead to it: nothing is padded."""
    if node.op in PRODUCTS:
        return True
    is_padded = any(node.attrs.get("pads", ())) or node.attrs.get("auto_pad", "").startswith("SAME")
    return node.op == "Conv" and not is_padded


def _together(
    fold: _Fold, linear_before: Callable[[gs.Node], Linear | None], facts: Facts
) -> list[_Fold]:
    """Return ``fold`` and those of all other nodes that read the same weights.

    Where the others want something else, it is alone with a copy of the weights, if they are small.
    """
    weight = fold.linear.weight
    if fold.factor is None or not facts.is_shared(weight):
        return [fold]
    try:
        return _with_others(fold, linear_before, facts)
    except Refused:
        is_read_twice = sum(tensor is weight for tensor in fold.linear.node.inputs) > 1
        if weight._values.nbytes > COPIED_BYTES or is_read_twice:
            raise
        return [replace(fold, copies=True)]


def _with_others(
    fold: _Fold, linear_before: Callable[[gs.Node], Linear | None], facts: Facts
) -> list[_Fold]:
    weight, folds = fold.linear.weight, [fold]
    for node in weight.outputs:
        if node is fold.linear.node:
            continue
        readers = node.outputs[0].outputs
        other = linear_before(readers[0]) if len(readers) == 1 else None
        if other is None:
            raise _shared(fold)
        try:
            folds.append(_after(other, readers[0], facts))
        except Refused:
            raise _shared(fold) from None
    _require_alike(folds, facts)
    return folds


def _shared(fold: _Fold) -> Refused:
    return Refused(f"the weights of the {fold.linear.node.op} are shared with another node")


def _require_alike(folds: Sequence[_Fold], facts: Facts) -> None:
    """Check that all who read weights that are to change want the same change.

    Raises:
        Refused: If not.
    """
    for fold in folds:
        weight = fold.linear.weight
        if fold.factor is None or not facts.is_shared(weight):
            continue
        alike = {id(other.linear.node) for other in folds if _is_like(fold, other)}
        if facts.is_kept(weight) or alike != {id(node) for node in weight.outputs}:
            raise _shared(fold)
        if len(alike) != len(weight.outputs):  # one reads them twice
            raise _shared(fold)


def _is_like(one: _Fold, other: _Fold) -> bool:
    """Whether both multiply the same weights, laid out the same way, by the same numbers."""
    return (
        one.linear.weight is other.linear.weight
        and one.linear.node.op == other.linear.node.op
        and one.linear.is_transposed == other.linear.is_transposed
        and one.factor is not None
        and other.factor is not None
        and np.array_equal(one.factor, other.factor)  # of the same shape, so of the same groups
    )


def _apply(folds: Sequence[_Fold], facts: Facts) -> None:
    """Give nodes new weights and biases. Those that share weights want the same of them.

    Raises:
        Refused: If one of them cannot have them; then none is changed.
    """
    for fold in folds:
        _require_room_for_bias(fold)
    scaled: dict[int, tuple[gs.Tensor, Array]] = {}
    for fold in folds:
        weight = fold.linear.weight
        if fold.factor is not None and id(weight) not in scaled:
            scaled[id(weight)] = weight, fold.linear.scaled(fold.factor)
    for fold in folds:
        if fold.copies:
            weight, numbers = scaled.pop(id(fold.linear.weight))
            fold.linear.node.inputs[1] = gs.Constant(facts.fresh_name(weight.name), numbers)
    for weight, numbers in scaled.values():
        weight.values = numbers
    for fold in folds:
        if fold.bias is not None:
            numbers = fold.bias.astype(fold.linear.weight.dtype)
            _give_bias(fold.linear, numbers, fold.channels, facts)


def _require_room_for_bias(fold: _Fold) -> None:
    linear, dtype = fold.linear, np.dtype(fold.linear.weight.dtype)
    if fold.bias is None:
        return
    if not (np.abs(fold.bias) <= limits(dtype)[1]).all():
        raise Refused(f"the folded bias does not fit {dtype.name}")
    is_matrix = fold.channels.rank == 2 and len(linear.weight.shape) == 2
    if linear.last.op == "MatMul" and not is_matrix:
        raise Refused("a MatMul has no bias, and only one of two matrices can be a Gemm")


def _give_bias(linear: Linear, numbers: Array, channels: Channels, facts: Facts) -> None:
    """Write the bias: over the old one where nobody else reads that, else as a new constant."""
    node, old = linear.last, linear.bias
    if node.op == "MatMul":
        node.op = "Gemm"
    node.attrs.pop("beta", None)  # it is in the numbers
    if linear.adder is not None:
        numbers = channels.broadcast(numbers)
    if old is not None and not facts.is_shared(old):
        old.values = numbers
        return
    new = gs.Constant(facts.fresh_name(f"{node.name}.bias"), numbers)
    inputs = list(node.inputs)
    if linear.adder is not None:
        inputs = [new if tensor is old else tensor for tensor in inputs]
    else:
        at = _bias_at(node)
        inputs += [gs.Variable.empty() for _ in range(at - len(inputs))]
        inputs[at : at + 1] = [new]
    node.inputs = inputs


def limits(dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return the smallest number that has all its digits, and the largest one."""
    limits = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return float(limits.smallest_normal), float(limits.max)


def peek(constant: gs.Constant) -> Array:
    """Return the values of a constant without leaving a copy of them in it."""
    stored = constant._values
    values: Array = stored.load() if isinstance(stored, LazyValues) else stored
    return values
