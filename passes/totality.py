"""Which nodes cannot fail, whatever the values they are given.

A node that is computed earlier than it stands, or where it would not have run at all, must not stop
a run that went well before: a Loop may make no round, a branch of an If may not be taken. So a node
is *total* where its operator is defined for every value, and all that it asks of extents follows from
what is known of them: that two of them are the same, that one is no less than a number. Operators
without a rule here are taken to fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.determinism import is_deterministic
from optc.passes.dimension import Dim, product
from optc.passes.graph import Array, bodies_of
from optc.passes.shape import Shapes

Dims = tuple[Dim, ...]

_FOR_EVERY_VALUE = frozenset(
    {
        *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cast", "Ceil", "Celu", "Cos"),
        *("Cosh", "Elu", "Erf", "Exp", "Flatten", "Floor"),
        *("Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log"),
        *("Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shape", "Sigmoid", "Sign"),
        *("Sin", "Sinh", "Size", "Softplus", "Softsign", "Sqrt", "Tan", "Tanh", "ThresholdedRelu"),
    }
)
"""Ops that take any tensor of their types, of any extents."""

_BROADCAST = frozenset(
    {
        *("Add", "And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean"),
        *("Min", "Mul", "Or", "Sub", "Sum", "Where", "Xor"),
    }
)

_REDUCTIONS = frozenset(
    {
        *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
        *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "ArgMax", "ArgMin"),
        *("Softmax", "LogSoftmax", "Hardmax", "GlobalAveragePool", "GlobalMaxPool"),
        *("InstanceNormalization", "LpNormalization"),
    }
)
"""Ops that are defined over at least one element; their other inputs are checked in the rules."""


def is_total(node: gs.Node, shapes: Shapes) -> bool:
    """Whether ``node`` gives a result for all values of its inputs, and the same each time.

    Args:
        node: Of the default domain; any other may do what it likes. One with bodies may fail.
        shapes: Of the tensors it reads and makes.
    """
    if node.domain or bodies_of(node) or not is_deterministic(node):
        return False
    known = _Known(node, shapes)
    if not known.are_plain():
        return False
    if node.op in _FOR_EVERY_VALUE:
        return True
    if node.op in _BROADCAST:
        return known.fit([known.dims(index) for index in range(len(node.inputs))])
    rule = _RULES.get(node.op)
    return rule is not None and rule(known)


class _Known:
    """What is known of the tensors of one node."""

    def __init__(self, node: gs.Node, shapes: Shapes) -> None:
        self.node = node
        self._shapes = shapes

    def are_plain(self) -> bool:
        """Whether all are tensors of numbers or booleans."""
        for tensor in (*self.node.inputs, *self.node.outputs):
            if not tensor.name:
                continue
            constant = isinstance(tensor, gs.Constant)
            dtype = tensor.dtype if constant else self._shapes.dtype(tensor.name)
            if dtype is None or np.dtype(dtype).kind == "O":
                return False
            if not constant and self._shapes.is_sequence(tensor.name):
                return False
        return True

    def has(self, index: int) -> bool:
        return index < len(self.node.inputs) and bool(self.node.inputs[index].name)

    def dims(self, index: int) -> Dims | None:
        """Return the extents of an input; None where its rank is not known."""
        return self._dims(self.node.inputs[index]) if self.has(index) else None

    def made(self) -> Dims | None:
        """Return the extents of the first output."""
        return self._dims(self.node.outputs[0])

    def _dims(self, tensor: gs.Tensor) -> Dims | None:
        if isinstance(tensor, gs.Constant):
            return tuple(tensor.shape)
        return self._shapes.dims(tensor.name)

    def value(self, index: int) -> Array | None:
        """Return the elements of an input that are the same in every run; else None."""
        if not self.has(index):
            return None
        tensor = self.node.inputs[index]
        if isinstance(tensor, gs.Constant):
            return np.asarray(tensor.values)
        return self._shapes.constant(tensor.name)

    def is_known(self, index: int) -> bool:
        """Whether each element of an input follows from the extents of the graph's inputs."""
        tensor = self.node.inputs[index]
        if isinstance(tensor, gs.Constant):
            return True
        value = self._shapes.value(tensor.name)
        return value is not None and all(element is not None for element in value.flat)

    def is_float(self, index: int) -> bool:
        tensor = self.node.inputs[index]
        constant = isinstance(tensor, gs.Constant)
        dtype = tensor.dtype if constant else self._shapes.dtype(tensor.name)
        return dtype is not None and np.dtype(dtype).kind not in "iub"

    def attr(self, name: str, default: object = None) -> object:
        return self.node.attrs.get(name, default)

    def at_least_one(self, dims: Sequence[Dim] | None) -> bool:
        """Whether none of ``dims`` can be 0."""
        return dims is not None and all(self._shapes.interval(dim)[0] >= 1 for dim in dims)

    def low(self, dim: Dim) -> float:
        return self._shapes.interval(dim)[0]

    @staticmethod
    def fit(shapes: Sequence[Dims | None]) -> bool:
        """Whether tensors of these extents are broadcast to one shape."""
        known = [dims for dims in shapes if dims is not None]
        if len(known) < len(shapes):
            return False
        columns = zip_longest(*(reversed(dims) for dims in known), fillvalue=1)
        return all(len({dim for dim in column if dim != 1}) <= 1 for column in columns)


Rule = Callable[[_Known], bool]


def _turned(known: _Known) -> bool:
    source, order = known.dims(0), known.attr("perm")
    return source is not None and (not isinstance(order, list) or len(order) == len(source))


def _by_number(known: _Known) -> bool:
    """Div and Mod: whole numbers are not divided by 0, which stops the whole process."""
    if not known.fit([known.dims(0), known.dims(1)]):
        return False
    if known.node.op == "Mod" and known.is_float(1) and not known.attr("fmod"):
        return False
    divisor = known.value(1)
    return known.is_float(1) or (divisor is not None and bool(np.all(divisor > 0)))


def _clipped(known: _Known) -> bool:
    """Clip: its bounds are single numbers."""
    return all(not known.has(index) or known.dims(index) in ((), (1,)) for index in (1, 2))


def _dequantised(known: _Known) -> bool:
    """DequantizeLinear: one scale for all, or one for each place along an axis."""
    source, scale = known.dims(0), known.dims(1)
    if scale is None or (known.has(2) and known.dims(2) != scale):
        return False
    if known.attr("block_size"):
        return False
    if scale in ((), (1,)):
        return True
    axis = int(str(known.attr("axis", 1)))
    return source is not None and -len(source) <= axis < len(source) and scale == (source[axis],)


def _dropped(known: _Known) -> bool:
    """Dropout: its ratio is looked at though nothing is dropped."""
    ratio = known.value(1)
    return not known.has(1) or (ratio is not None and bool(np.all((ratio >= 0) & (ratio < 1))))


def _pow(known: _Known) -> bool:
    return known.is_float(0) and known.fit([known.dims(0), known.dims(1)])


def _matmul(known: _Known) -> bool:
    left, right = known.dims(0), known.dims(1)
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return False
    return (
        left[-1] == right[-2]
        and known.at_least_one(left[-1:])
        and known.fit([left[:-2], right[:-2]])
    )


def _gemm(known: _Known) -> bool:
    left, right, made = known.dims(0), known.dims(1), known.made()
    if left is None or right is None or made is None or len(left) != 2 or len(right) != 2:
        return False
    inner = left[0 if known.attr("transA") else 1]
    if inner != right[1 if known.attr("transB") else 0] or not known.at_least_one([inner]):
        return False
    bias = known.dims(2)
    return not known.has(2) or (bias is not None and _goes_into(bias, made))


def _goes_into(dims: Dims, into: Dims) -> bool:
    """Whether a tensor of ``dims`` is broadcast to ``into`` and no further."""
    if len(dims) > len(into):
        return False
    pairs = zip(reversed(dims), reversed(into), strict=False)
    return all(dim in (1, wide) for dim, wide in pairs)


def _conv(known: _Known) -> bool:
    source, weight, made = known.dims(0), known.dims(1), known.made()
    if source is None or weight is None or made is None or not len(source) == len(weight) >= 3:
        return False
    if not all(isinstance(extent, int) for extent in (source[1], *weight)):
        return False
    group = int(str(known.attr("group", 1)))
    filters = weight[0]
    if source[1] != weight[1] * group or filters % group != 0:
        return False
    if known.has(2) and known.dims(2) != (filters,):
        return False
    return known.at_least_one(made[2:]) and known.at_least_one(source[2:])


def _pool(known: _Known) -> bool:
    source, made = known.dims(0), known.made()
    return (
        source is not None
        and known.at_least_one(source[2:])
        and (made is not None and known.at_least_one(made[2:]))
    )


def _normalised(known: _Known) -> bool:
    source = known.dims(0)
    if source is None:
        return False
    axis = int(str(known.attr("axis", -1)))
    tail = source[axis if axis < 0 else axis - len(source) :]
    given = [known.dims(index) for index in range(1, len(known.node.inputs)) if known.has(index)]
    return known.at_least_one(source) and all(
        dims is not None and _goes_into(dims, tail) for dims in given
    )


def _batch_normalised(known: _Known) -> bool:
    source = known.dims(0)
    if source is None or len(source) < 2 or known.attr("training_mode"):
        return False
    return all(known.dims(index) == (source[1],) for index in range(1, 5))


def _reduced(known: _Known) -> bool:
    source = known.dims(0)
    if source is None or not known.at_least_one(source):
        return False
    if known.node.op == "InstanceNormalization":
        return all(known.dims(index) == (source[1],) for index in (1, 2))
    axis = int(str(known.attr("axis", 0)))
    if not -len(source) <= axis < max(1, len(source)):
        return False
    return not known.has(1) or known.value(1) is not None


def _reshaped(known: _Known) -> bool:
    source, made, goal = known.dims(0), known.made(), known.value(1)
    if source is None or made is None or not known.is_known(1):
        return False
    if product(source) != product(made):
        return False
    if goal is not None and not (goal < 0).any():
        return True
    return known.at_least_one(made)  # what -1 stands for is found by a division


def _by_axes(known: _Known) -> bool:
    """Squeeze: what goes has one element, whatever the extents."""
    source, made = known.dims(0), known.made()
    if source is None or made is None or (known.has(1) and known.value(1) is None):
        return False
    axes = known.value(1) if known.has(1) else known.attr("axes")
    if axes is None:
        return all(isinstance(dim, int) for dim in source)
    return all(source[int(axis)] == 1 for axis in np.asarray(axes).reshape(-1))


def _unsqueezed(known: _Known) -> bool:
    return known.dims(0) is not None and (not known.has(1) or known.value(1) is not None)


def _joined(known: _Known) -> bool:
    parts = [known.dims(index) for index in range(len(known.node.inputs))]
    whole = [dims for dims in parts if dims is not None]
    if len(whole) < len(parts) or len({len(dims) for dims in whole}) != 1:
        return False
    axis = int(str(known.attr("axis"))) % len(whole[0])
    return len({(*dims[:axis], *dims[axis + 1 :]) for dims in whole}) == 1


def _sliced(known: _Known) -> bool:
    """Slice: starts and ends are cut to what is there; a step of 0 has no meaning."""
    source, steps = known.dims(0), known.value(4)
    if source is None or known.made() is None:
        return False
    given = [index for index in range(1, 5) if known.has(index)]
    if any(known.value(index) is None for index in given if index > 2):
        return False
    lengths = {known.dims(index) for index in given}  # no longer than the axes that there are
    if not lengths <= {(length,) for length in range(len(source) + 1)} or len(lengths) > 1:
        return False
    return steps is None or bool(np.all(steps != 0))


def _parted(known: _Known) -> bool:
    source = known.dims(0)
    if source is None:
        return False
    axis = int(str(known.attr("axis", 0)))
    sizes = known.value(1) if known.has(1) else known.attr("split")
    if known.has(1) and sizes is None:
        return False
    if sizes is None:
        extent, parts = source[axis], len(known.node.outputs)
        return isinstance(extent, int) and extent % parts == 0
    return bool(source[axis] == int(np.sum(np.asarray(sizes))))


def _gathered(known: _Known) -> bool:
    source, indices = known.dims(0), known.value(1)
    if source is None or indices is None:
        return False
    low = known.low(source[int(str(known.attr("axis", 0)))])
    return bool(np.all((indices >= -low) & (indices < low)))


def _expanded(known: _Known) -> bool:
    source, made, goal = known.dims(0), known.made(), known.dims(1)
    if source is None or made is None or goal is None or known.value(1) is None:
        return False
    return _goes_into(source, made)


def _padded(known: _Known) -> bool:
    source = known.dims(0)
    pads = known.value(1) if known.has(1) else known.attr("pads")
    if source is None or pads is None or known.has(3) or (np.asarray(pads) < 0).any():
        return False
    mode = str(known.attr("mode", "constant"))
    if mode == "constant":
        return True
    ends = np.asarray(pads).reshape(2, -1).max(axis=0)
    needed = [int(end) + 1 if mode == "reflect" else 1 for end in ends]
    return len(needed) == len(source) and all(
        known.low(dim) >= least for dim, least in zip(source, needed, strict=True)
    )


def _filled(known: _Known) -> bool:
    goal = known.value(0)
    return goal is not None and bool(np.all(goal >= 0))


def _recurrent(known: _Known) -> bool:
    source, weight, again = known.dims(0), known.dims(1), known.dims(2)
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[known.node.op]
    size = known.attr("hidden_size")
    if source is None or weight is None or again is None or known.attr("layout") or not size:
        return False
    ways, hidden = weight[0], int(str(size))
    if len(source) != 3 or weight != (ways, gates * hidden, source[2]):
        return False
    if again != (ways, gates * hidden, hidden) or not known.at_least_one(source):
        return False
    if known.has(4):  # lengths of sequences, which must not be longer than these are
        return False
    if known.has(3) and known.dims(3) != (ways, 2 * gates * hidden):
        return False
    states = range(5, len(known.node.inputs))
    return all(
        not known.has(index) or known.dims(index) == (ways, source[1], hidden) for index in states
    )


_RULES: dict[str, Rule] = {
    "AveragePool": _pool,
    "BatchNormalization": _batch_normalised,
    "Clip": _clipped,
    "Concat": _joined,
    "ConstantOfShape": _filled,
    "Conv": _conv,
    "DequantizeLinear": _dequantised,
    "Div": _by_number,
    "Dropout": _dropped,
    "Expand": _expanded,
    "GRU": _recurrent,
    "Gather": _gathered,
    "Gemm": _gemm,
    "LSTM": _recurrent,
    "LayerNormalization": _normalised,
    "MatMul": _matmul,
    "MaxPool": _pool,
    "Mod": _by_number,
    "Pad": _padded,
    "Pow": _pow,
    "RMSNormalization": _normalised,
    "RNN": _recurrent,
    "Reshape": _reshaped,
    "Slice": _sliced,
    "Split": _parted,
    "Squeeze": _by_axes,
    "Transpose": _turned,
    "Unsqueeze": _unsqueezed,
    **dict.fromkeys(_REDUCTIONS, _reduced),
}
"""Op -> its rule."""
