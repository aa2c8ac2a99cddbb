"""Random chains of operators that move data, through the passes that shorten them: no bit changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from graphs import run
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import optimise
from optc.passes.registry import load

PASSES = (
    "remove-identities",
    "fold-shapes",
    "remove-expands",
    "push-transposes",
    "merge-reshapes",
    "merge-concats",
    "merge-slices",
)
MAX_ELEMENTS = 600


class Chain:
    """Draws one model; the extent of every axis is known while it is drawn."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self.draw = draw
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def integer(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def one_of(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def ints(self, numbers: Sequence[int]) -> str:
        return self.constant(np.array(numbers, np.int64))

    def emit(self, op: str, inputs: Sequence[str], *shapes: Sequence[int], **attrs: Any) -> str:
        names = [f"t{len(self.shapes) + index}" for index in range(len(shapes))]
        self.nodes.append(helper.make_node(op, list(inputs), names, f"n{names[0]}", **attrs))
        self.shapes.update(zip(names, map(tuple, shapes), strict=True))
        return names[0]

    def recent(self) -> str:
        names = list(self.shapes)
        return names[max(0, len(names) - 1 - self.integer(0, 3))]

    # One step each

    def transpose(self, x: str, shape: tuple[int, ...]) -> None:
        perm = self.draw(st.permutations(range(len(shape))))
        self.emit("Transpose", [x], [shape[axis] for axis in perm], perm=list(perm))

    def there_and_back(self, x: str, shape: tuple[int, ...]) -> None:
        """Work in another layout, as exporters of channels-last frameworks do."""
        perm = list(self.draw(st.permutations(range(len(shape)))))
        self.emit("Transpose", [x], [shape[axis] for axis in perm], perm=perm)
        for _ in range(self.integer(1, 3)):
            self.work(self.recent())
        last = list(self.shapes)[-1]
        if len(self.shapes[last]) == len(perm):
            back = [perm.index(axis) for axis in range(len(perm))]
            turned = [self.shapes[last][axis] for axis in back]
            self.emit("Transpose", [last], turned, perm=back)

    def work(self, x: str) -> None:
        shape = self.shapes[x]
        self.one_of([self.unary, self.add, self.cut, self.pad, self.highest, self.join])(x, shape)

    def unary(self, x: str, shape: tuple[int, ...]) -> None:
        self.emit(self.one_of(["Neg", "Abs"]), [x], shape)

    def add(self, x: str, shape: tuple[int, ...]) -> None:
        alike = [name for name, other in self.shapes.items() if other == shape]
        own = shape[self.integer(0, len(shape)) :] if shape else ()
        value = np.arange(math.prod(own), dtype=np.float32).reshape(own)
        other = self.one_of([self.constant(value), self.one_of(alike)])
        self.emit("Max", [x, other] if self.integer(0, 1) else [other, x], shape)

    def highest(self, x: str, shape: tuple[int, ...]) -> None:
        if not shape or 0 in shape:
            return
        axis, keep = self.integer(0, len(shape) - 1), self.integer(0, 1)
        made = shape[:axis] + (1,) * keep + shape[axis + 1 :]
        self.emit("ReduceMax", [x], made, axes=[axis], keepdims=keep)

    def pad(self, x: str, shape: tuple[int, ...]) -> None:
        pads = [self.integer(0, 1) for _ in range(2 * len(shape))]
        made = [e + a + b for e, a, b in zip(shape, pads, pads[len(shape) :], strict=False)]
        if shape and math.prod(made) <= MAX_ELEMENTS:
            self.emit("Pad", [x, self.ints(pads)], made)

    def cut(self, x: str, shape: tuple[int, ...]) -> None:
        axes = self.draw(st.sets(st.integers(0, len(shape) - 1), max_size=2)) if shape else ()
        if not axes:
            return
        cuts = {a: (self.integer(-3, 3), self.one_of([1, 3, 99, -1]), 1) for a in axes}
        if self.integer(0, 2) == 0:
            cuts = {a: (self.integer(0, 1), 99, self.one_of([2, 3])) for a in axes}
        made = [len(range(e)[slice(*cuts[a])]) if a in axes else e for a, e in enumerate(shape)]
        told = [a - len(shape) * self.integer(0, 1) for a in cuts]
        edges = [self.ints([cut[part] for cut in cuts.values()]) for part in range(3)]
        self.emit("Slice", [x, *edges[:2], self.ints(told), edges[2]], made)

    def join(self, x: str, shape: tuple[int, ...]) -> None:
        if not shape:
            return
        axis = self.integer(0, len(shape) - 1)
        alike = [name for name, other in self.shapes.items() if other == shape]
        parts = [x, *(self.one_of(alike) for _ in range(self.integer(0, 2)))]
        made = (*shape[:axis], len(parts) * shape[axis], *shape[axis + 1 :])
        if math.prod(made) <= MAX_ELEMENTS:
            self.emit("Concat", parts, made, axis=axis)

    def rolled(self, x: str, shape: tuple[int, ...]) -> None:
        axes = [axis for axis, extent in enumerate(shape) if extent > 1]
        if not axes:
            return
        axis = self.one_of(axes)
        at = self.integer(1, shape[axis] - 1)
        ends = [(*shape[:axis], e, *shape[axis + 1 :]) for e in (at, shape[axis] - at)]
        if self.integer(0, 1):
            self.emit("Split", [x, self.ints([at, shape[axis] - at])], *ends, axis=axis)
            first, second = list(self.shapes)[-2:]
        else:
            first = self.emit("Slice", [x, *map(self.ints, ([0], [at], [axis]))], ends[0])
            second = self.emit("Slice", [x, *map(self.ints, ([at], [99], [axis]))], ends[1])
        order = [second, first] if self.integer(0, 2) else [first, second]
        self.emit("Concat", order, shape, axis=axis)

    def patches(self, x: str, shape: tuple[int, ...]) -> None:
        axes = [axis for axis, extent in enumerate(shape) if extent and extent % 2 == 0]
        if len(axes) < 2 or len(shape) < 3:
            return
        first, second = self.one_of([axes[:2], axes[-2:], axes[1::-1]])
        join = self.one_of([axis for axis in range(len(shape)) if axis not in (first, second)])
        made = [e // 2 if axis in (first, second) else e for axis, e in enumerate(shape)]
        parts = [
            self.emit(
                "Slice", [x, *map(self.ints, ([a, b], [99, 99], [first, second], [2, 2]))], made
            )
            for a in (0, 1)
            for b in (0, 1)
        ]
        self.emit(
            "Concat", parts, [4 * e if a == join else e for a, e in enumerate(made)], axis=join
        )

    def reshape(self, x: str, shape: tuple[int, ...]) -> None:
        count, kind = math.prod(shape), self.integer(0, 4)
        if kind == 0:
            axis = self.integer(0, len(shape))
            self.emit("Flatten", [x], (math.prod(shape[:axis]), math.prod(shape[axis:])), axis=axis)
        elif kind == 1 and len(shape) < 5:
            axis = self.integer(0, len(shape))
            self.emit("Unsqueeze", [x, self.ints([axis])], (*shape[:axis], 1, *shape[axis:]))
        elif kind == 2 and 1 in shape:
            axis = shape.index(1)
            self.emit("Squeeze", [x, self.ints([axis])], shape[:axis] + shape[axis + 1 :])
        elif kind == 3 and shape and shape[0]:
            self.emit("Reshape", [x, self.ints([0, -1])], (shape[0], count // shape[0]))
        elif count:
            first = self.one_of([part for part in (1, 2, 3, 4, 6) if count % part == 0])
            self.emit("Reshape", [x, self.ints([first, -1])], (first, count // first))

    def repeat(self, x: str, shape: tuple[int, ...]) -> None:
        ones = [e if self.integer(0, 1) else 1 for e in shape]
        starts, ends = self.ints([0] * len(shape)), self.ints(ones)
        if not shape:
            return
        small = self.emit("Slice", [x, starts, ends], ones)
        if self.integer(0, 1):
            wide = self.emit("Expand", [small, self.ints(shape)], shape)
        else:
            counts = [e // o if o else 1 for e, o in zip(shape, ones, strict=True)]
            wide = self.emit("Tile", [small, self.ints(counts)], shape)
        self.emit("Min", [x, wide], shape)

    def model(self) -> tuple[ModelProto, dict[str, Any]]:
        shape = tuple(self.one_of([0, 1, 1, 2, 2, 3, 4, 4]) for _ in range(self.integer(1, 4)))
        self.shapes["x"] = shape
        steps = [self.transpose, self.there_and_back, self.cut, self.join, self.rolled]
        steps += [self.patches, self.reshape, self.reshape, self.add, self.unary, self.repeat]
        for _ in range(self.integer(2, 8)):
            x = self.recent()
            some = steps if self.shapes[x] else [self.reshape, self.add, self.unary]
            self.one_of(some)(x, self.shapes[x])
        made = [name for name in self.shapes if name != "x"]
        if not made:
            made = [self.emit("Neg", ["x"], shape)]
        outputs = {made[-1], self.one_of(made)}
        dynamic = [f"D{a}" if e and self.integer(0, 1) else e for a, e in enumerate(shape)]
        float32 = TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "chain",
            [helper.make_tensor_value_info("x", float32, dynamic)],
            [
                helper.make_tensor_value_info(name, float32, [None] * len(self.shapes[name]))
                for name in sorted(outputs)
            ],
            self.constants,
        )
        imports = [helper.make_opsetid("", 17)]
        values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        return helper.make_model(graph, opset_imports=imports, ir_version=8), {"x": values}


@st.composite
def chains(draw: Callable[..., Any]) -> tuple[ModelProto, dict[str, Any]]:
    """Draw a model and its input."""
    return Chain(draw).model()


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(chains())
def test_chains_of_movements_keep_every_bit(drawn: tuple[ModelProto, dict[str, Any]]) -> None:
    model, feeds = drawn
    onnx.checker.check_model(model)
    note(onnx.printer.to_text(model))
    expected = run(model, feeds)
    graph = import_model(model)
    report = optimise(graph, [load(name)() for name in PASSES])
    after = export_model(graph)
    onnx.checker.check_model(after)
    note(onnx.printer.to_text(after))
    assert report.nodes_after <= report.nodes_before
    for name, value in run(after, feeds).items():
        assert value.shape == expected[name].shape, name
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
