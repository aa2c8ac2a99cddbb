"""Random models for property tests: mixed operators, bodies, constants sprinkled in.

`models` is a hypothesis strategy. Every tensor's shape is known while a model is drawn, with the
dynamic axis at `BATCH`, so that each operator that is drawn is a valid one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

BATCH = 2
OPSET = 17
MAX_ELEMENTS = 400


@dataclass(frozen=True)
class Value:
    """A float tensor that nodes may read."""

    name: str
    shape: tuple[int, ...]
    is_constant: bool = False


@dataclass
class Scope:
    """A graph or body as it is drawn."""

    values: list[Value]
    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)


class Drawer:
    """Draws one model."""

    def __init__(self, draw: Callable[..., Any], *, smooth: bool) -> None:
        self.draw = draw
        self.smooth = smooth
        self.count = 0
        self.scopes: list[Scope] = []

    @property
    def scope(self) -> Scope:
        """The innermost graph or body."""
        return self.scopes[-1]

    # Small choices

    def integer(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def flag(self) -> bool:
        return bool(self.draw(st.booleans()))

    def one_of(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def name(self, stem: str = "t") -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def visible(self) -> list[Value]:
        return [value for scope in self.scopes for value in scope.values]

    def value(self) -> Value:
        """Return a tensor to read, with a liking for those just made."""
        values = self.visible()
        return values[max(0, len(values) - 1 - self.integer(0, 5))]

    # Constants

    def constant(self, array: np.ndarray[Any, Any], *, as_node: bool = False) -> str:
        name = self.name("c")
        tensor = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        if as_node:
            self.scope.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.scope.constants.append(tensor)
        return name

    def integers(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64), as_node=self.flag())

    def floats(self, shape: Sequence[int]) -> np.ndarray[Any, Any]:
        kind = self.integer(0, 4)
        if kind < 4:
            return np.full(shape, (0.0, -0.0, 1.0, -1.0)[kind], np.float32)
        seed = self.integer(0, 3)
        return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)

    def weights(self, shape: Sequence[int]) -> str:
        rng = np.random.default_rng(self.integer(0, 3))
        scale = 1 / math.sqrt(max(1, math.prod(shape[1:])))
        return self.constant((scale * rng.uniform(-1, 1, shape)).astype(np.float32))

    # Nodes

    def emit(self, op: str, inputs: Sequence[str], shape: Sequence[int], **attrs: Any) -> Value:
        made = Value(self.name(), tuple(shape))
        self.scope.nodes.append(helper.make_node(op, list(inputs), [made.name], **attrs))
        self.scope.values.append(made)
        return made

    def hidden(self, op: str, inputs: Sequence[str], outputs: int = 1, **attrs: Any) -> str:
        """Emit a node whose result is no float tensor, or not for others to read."""
        names = [self.name("h") for _ in range(outputs)]
        self.scope.nodes.append(helper.make_node(op, list(inputs), names, **attrs))
        return names[0]

    def step(self, depth: int) -> None:
        """Emit one more operation."""
        steps = [self.unary, self.binary, self.constant_value, self.moved, self.reshaped]
        steps += [self.sliced, self.joined, self.cast, self.reduced, self.product, self.convolved]
        steps += [self.by_its_shape, self.selected, self.padded, self.repeated]
        if depth:
            steps += [self.branched, self.looped]
        self.one_of(steps)()

    def unary(self) -> None:
        ops = ["Relu", "Neg", "Abs", "Sigmoid", "Tanh", "Identity", "Dropout"]
        if not self.smooth:
            ops += ["Floor", "Ceil", "Sign", "Round"]
        x = self.value()
        self.emit(self.one_of(ops), [x.name], x.shape)

    def binary(self) -> None:
        x = self.value()
        shapes = [x.shape, (), x.shape[-1:], *((1,) * n for n in range(1, 3))]
        alike = [v.name for v in self.visible() if v.shape == x.shape]
        if self.flag():
            other = self.one_of(alike)
            shape = x.shape
        else:
            other_shape = self.one_of(shapes)
            other = self.constant(self.floats(other_shape), as_node=self.flag())
            shape = np.broadcast_shapes(x.shape, other_shape)
        pair = [x.name, other] if self.flag() else [other, x.name]
        self.emit(self.one_of(["Add", "Sub", "Mul", "Max", "Min"]), pair, shape)

    def constant_value(self) -> None:
        """Add a constant that later nodes read like any other tensor."""
        shape = self.one_of([(2, 3), (BATCH, 3, 4), (1,), (3, 1), (0, 3)])
        name = self.constant(self.floats(shape), as_node=self.flag())
        self.scope.values.append(Value(name, shape, is_constant=True))

    def moved(self) -> None:
        x = self.value()
        perm = self.draw(st.permutations(range(len(x.shape))))
        self.emit("Transpose", [x.name], [x.shape[a] for a in perm], perm=list(perm))

    def reshaped(self) -> None:
        x = self.value()
        count, rank = math.prod(x.shape), len(x.shape)
        kind = self.integer(0, 4)
        if kind == 0:
            axis = self.integer(0, rank)
            shape = (math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
            self.emit("Flatten", [x.name], shape, axis=axis)
        elif kind == 1 and rank < 5:
            axis = self.integer(0, rank)
            shape = (*x.shape[:axis], 1, *x.shape[axis:])
            self.emit("Unsqueeze", [x.name, self.integers(axis)], shape)
        elif kind == 2 and 1 in x.shape:
            axis = x.shape.index(1)
            shape = x.shape[:axis] + x.shape[axis + 1 :]
            self.emit("Squeeze", [x.name, self.integers(axis)], shape)
        elif kind == 3 and rank and count:
            self.emit("Reshape", [x.name, self.integers(0, -1)], (x.shape[0], count // x.shape[0]))
        elif count:
            parts = [p for p in (1, 2, 3, 4, 6) if count % p == 0]
            first = self.one_of(parts)
            self.emit("Reshape", [x.name, self.integers(first, -1)], (first, count // first))

    def sliced(self) -> None:
        x = self.value()
        if not x.shape:
            return
        axis = self.integer(0, len(x.shape) - 1)
        start, stop = self.integer(-2, 2), self.one_of([1, 2, 99, -1])
        step = self.one_of([1, 1, 2, -1])
        if step < 0:
            start, stop = -1, -99
        extent = len(range(x.shape[axis])[start:stop:step])
        shape = (*x.shape[:axis], extent, *x.shape[axis + 1 :])
        bounds = [self.integers(number) for number in (start, stop, axis, step)]
        self.emit("Slice", [x.name, *bounds], shape)

    def joined(self) -> None:
        x = self.value()
        if not x.shape:
            return
        axis = self.integer(0, len(x.shape) - 1)
        rest = x.shape[:axis], x.shape[axis + 1 :]
        alike = [
            v
            for v in self.visible()
            if len(v.shape) == len(x.shape) and (v.shape[:axis], v.shape[axis + 1 :]) == rest
        ]
        parts = [x] + [self.one_of(alike) for _ in range(self.integer(0, 2))]
        extent = sum(part.shape[axis] for part in parts)
        shape = (*rest[0], extent, *rest[1])
        if math.prod(shape) <= MAX_ELEMENTS:
            self.emit("Concat", [part.name for part in parts], shape, axis=axis)

    def cast(self) -> None:
        x = self.value()
        types = [TensorProto.DOUBLE, TensorProto.FLOAT]
        if not self.smooth:
            types += [TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL]
        there = self.hidden("Cast", [x.name], to=self.one_of(types))
        self.emit("Cast", [there], x.shape, to=TensorProto.FLOAT)

    def reduced(self) -> None:
        x = self.value()
        if not x.shape or 0 in x.shape:
            return
        axis = self.integer(0, len(x.shape) - 1)
        shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
        self.emit(self.one_of(["ReduceMax", "ReduceMean"]), [x.name], shape, axes=[axis])

    def product(self) -> None:
        x = self.value()
        if len(x.shape) < 2 or 0 in x.shape:
            return
        columns = self.integer(1, 4)
        w = self.weights((x.shape[-1], columns))
        if len(x.shape) == 2 and self.flag():
            b = self.weights((columns,))
            self.emit("Gemm", [x.name, w, b], (x.shape[0], columns))
        else:
            self.emit("MatMul", [x.name, w], (*x.shape[:-1], columns))

    def convolved(self) -> None:
        x = self.value()
        if len(x.shape) != 3 or 0 in x.shape:
            return
        channels = self.integer(1, 3)
        w = self.weights((channels, x.shape[1], 1))
        y = self.emit("Conv", [x.name, w], (x.shape[0], channels, x.shape[2]))
        if self.flag():
            parts = [self.constant(np.linspace(1, 2, channels, dtype=np.float32)) for _ in range(4)]
            self.emit("BatchNormalization", [y.name, *parts], y.shape)

    def by_its_shape(self) -> None:
        """Reshape or expand by arithmetic on shapes, as exporters write it."""
        x = self.value()
        if len(x.shape) < 2 or 0 in x.shape:
            return
        shape = self.hidden("Shape", [x.name])
        first = self.hidden("Gather", [shape, self.integers(0)])
        if self.flag():
            goal = self.hidden("Concat", [first, self.integers(-1)], axis=0)
            rest = math.prod(x.shape) // x.shape[0]
            self.emit("Reshape", [x.name, goal], (x.shape[0], rest))
        else:
            self.emit("Expand", [x.name, shape], x.shape)

    def selected(self) -> None:
        x = self.value()
        if not x.shape or not x.shape[0]:
            return
        indices = [self.integer(0, x.shape[0] - 1) for _ in range(self.integer(1, 3))]
        self.emit("Gather", [x.name, self.integers(*indices)], (len(indices), *x.shape[1:]))

    def padded(self) -> None:
        x = self.value()
        pads = [self.integer(0, 1) for _ in range(2 * len(x.shape))]
        shape = [
            e + a + b
            for e, a, b in zip(x.shape, pads[: len(x.shape)], pads[len(x.shape) :], strict=True)
        ]
        if x.shape and math.prod(shape) <= MAX_ELEMENTS:
            self.emit("Pad", [x.name, self.integers(*pads)], shape)

    def repeated(self) -> None:
        x = self.value()
        counts = [self.integer(1, 2) if self.flag() else 1 for _ in x.shape]
        shape = [e * n for e, n in zip(x.shape, counts, strict=True)]
        if x.shape and math.prod(shape) <= MAX_ELEMENTS:
            self.emit("Tile", [x.name, self.integers(*counts)], shape)

    # Bodies

    @contextmanager
    def body(self, inputs: Sequence[Value] = ()) -> Iterator[Scope]:
        scope = Scope(list(inputs))
        self.scopes.append(scope)
        yield scope
        self.scopes.pop()

    def fill(self, scope: Scope, depth: int, goal: tuple[int, ...]) -> str:
        """Draw a few steps; return a tensor of ``scope``'s own with the shape ``goal``."""
        for _ in range(self.integer(0, 3)):
            self.step(depth)
        alike = [v.name for v in self.visible() if v.shape == goal]
        if alike and self.flag():
            return self.emit(self.one_of(["Neg", "Identity"]), [self.one_of(alike)], goal).name
        return self.constant(self.floats(goal), as_node=self.flag())

    def branched(self) -> None:
        condition = self.one_of(["flag", "always", "never"])
        if condition != "flag":
            condition = self.constant(np.array(condition == "always"), as_node=self.flag())
        goal = self.value().shape
        branches = {}
        for branch in ("then_branch", "else_branch"):
            with self.body() as scope:
                output = self.fill(scope, 0, goal)
            branches[branch] = helper.make_graph(
                scope.nodes, self.name("b"), [], [typed(output, goal)], scope.constants
            )
        self.emit("If", [condition], goal, **branches)

    def looped(self) -> None:
        start = self.value()
        trips = self.constant(np.array(self.integer(0, 3)), as_node=self.flag())
        go = self.constant(np.array(True), as_node=self.flag())
        count, goes_on, carried = self.name("i"), self.name("g"), Value(self.name("v"), start.shape)
        with self.body([carried]) as scope:
            condition = self.hidden("Identity", [goes_on])
            output = self.fill(scope, 0, start.shape)
        graph = helper.make_graph(
            scope.nodes,
            self.name("b"),
            [
                helper.make_tensor_value_info(count, TensorProto.INT64, []),
                helper.make_tensor_value_info(goes_on, TensorProto.BOOL, []),
                typed(carried.name, start.shape),
            ],
            [
                helper.make_tensor_value_info(condition, TensorProto.BOOL, []),
                typed(output, start.shape),
            ],
            scope.constants,
        )
        self.emit("Loop", [trips, go, start.name], start.shape, body=graph)

    # The model

    def model(self) -> ModelProto:
        with self.body([Value("x", (BATCH, 3, 4)), Value("z", (3, 2))]) as scope:
            for _ in range(self.integer(3, 14)):
                self.step(1)
        made = {name for node in scope.nodes for name in node.output}
        results = [value for value in scope.values if value.name in made]
        if not results:
            self.scopes.append(scope)
            results = [self.emit("Relu", ["x"], (BATCH, 3, 4))]
        outputs = {results[-1].name: results[-1]}
        for _ in range(self.integer(0, 2)):
            value = self.one_of(results)
            outputs[value.name] = value
        batch = self.one_of([BATCH, "N"])
        graph = helper.make_graph(
            scope.nodes,
            "generated",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 4]),
                typed("z", (3, 2)),
                helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
            ],
            [typed(name, [None] * len(value.shape)) for name, value in outputs.items()],
            scope.constants,
        )
        imports = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=8)
        onnx.checker.check_model(model)
        return model


def typed(name: str, shape: Sequence[int | None]) -> ValueInfoProto:
    """Return a float tensor's declaration; None is an extent that it does not say."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


@st.composite
def models(draw: Callable[..., Any], *, smooth: bool = False) -> ModelProto:
    """Draw a model with the inputs `x`, `z` and `flag`.

    Args:
        draw: Given by hypothesis.
        smooth: Without operators that turn a rounding error into a jump.
    """
    return Drawer(draw, smooth=smooth).model()
