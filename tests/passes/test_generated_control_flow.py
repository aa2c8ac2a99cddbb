"""Random Ifs and Loops within each other, through all passes and with every branch opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from generated import Drawer, Value, typed
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper
from test_generated_graphs import expected_outputs, outputs

from optc.passes.graph import all_nodes, export_model, import_model
from optc.passes.open_branches import OpenBranches
from optc.passes.pipeline import optimise
from optc.passes.registry import passes
from optc.passes.unroll_loop import UnrollLoop

SETTINGS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class FlowDrawer(Drawer):
    """Draws models in which much is in bodies, bodies in bodies among them."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        super().__init__(draw, smooth=False)
        self.depth = 0
        self.collected: list[tuple[str, int]] = []

    def step(self, depth: int) -> None:
        if self.depth < 2 and self.integer(0, 3) == 0:
            self.depth += 1
            self.one_of([self.branched, self.looped, self.collecting])()
            self.depth -= 1
        else:
            super().step(0)

    def collecting(self) -> None:
        """Emit a Loop that may make no round or end early, counts, and gives out each round."""
        start = self.value()
        trips = self.one_of(["", "bounded"])
        if trips:
            trips = self.constant(np.array(self.integer(0, 3)), as_node=self.flag())
        go = self.constant(np.array(self.integer(0, 3) > 0), as_node=self.flag())
        go = self.one_of([go, "flag"])
        count, goes_on, carried = self.name("i"), self.name("g"), Value(self.name("v"), start.shape)
        with self.body([carried]) as scope:
            number = self.hidden("Cast", [count], to=TensorProto.FLOAT)
            moved = self.emit("Add", [carried.name, number], start.shape)
            output = self.fill(scope, 0, start.shape)
            total = self.hidden("ReduceSum", [moved.name], keepdims=0)
            small = self.hidden("Less", [total, self.constant(np.array(40, np.float32))])
            few = self.hidden("Less", [count, self.constant(np.array(2, np.int64))])
            condition = self.hidden("And", [small, few])
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
                typed(moved.name, start.shape),
            ],
            scope.constants,
        )
        rounds = self.name("r")
        made = Value(self.name(), start.shape)
        node = helper.make_node("Loop", [trips, go, start.name], [made.name, rounds], body=graph)
        self.scope.nodes.append(node)
        self.scope.values.append(made)
        if len(self.scopes) == 1:
            self.collected.append((rounds, 1 + len(start.shape)))

    def model(self) -> ModelProto:
        model = super().model()
        model.graph.output.extend(typed(name, [None] * rank) for name, rank in self.collected)
        onnx.checker.check_model(model)
        return model


@st.composite
def flows(draw: Callable[..., Any]) -> ModelProto:
    return FlowDrawer(draw).model()


def assert_same(before: ModelProto, after: ModelProto) -> None:
    note(onnx.printer.to_text(before))
    note(onnx.printer.to_text(after))
    onnx.checker.check_model(after)
    for flag in (True, False):
        expected, found = expected_outputs(before, flag=flag), outputs(after, flag=flag)
        for name, value in expected.items():
            assert found[name].shape == value.shape, name
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


@SETTINGS
@given(model=flows())
def test_what_opens_bodies_keeps_the_numbers(model: ModelProto) -> None:
    graph = import_model(model)
    names = frozenset(node.name for node in all_nodes(graph))
    optimise(graph, [OpenBranches(front=names, behind=names), UnrollLoop(most_nodes=4096)])
    assert_same(model, export_model(graph))


@SETTINGS
@given(model=flows())
def test_all_passes_keep_the_numbers(model: ModelProto) -> None:
    graph = import_model(model)
    optimise(graph, passes())
    names = frozenset(node.name for node in all_nodes(graph))
    optimise(graph, [OpenBranches(front=names, behind=names), *passes()])
    assert_same(model, export_model(graph))
