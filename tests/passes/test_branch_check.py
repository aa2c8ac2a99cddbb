"""Conditions in branches that must not be written out."""

from __future__ import annotations

import numpy as np
import onnx
from graphs import parsed, run
from onnx import ModelProto

from optc.passes.branch_check import conditions_to_keep, has_branches_within_branches
from optc.passes.graph import export_model, import_model, without_input_extents
from optc.passes.pipeline import optimise
from optc.passes.registry import passes

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def two_rates(width: int) -> ModelProto:
    """A model for rows of 4 or of 8: each branch cuts its rows in pieces of its own length.

    A piece alone loses its axis, and an LSTM takes what is left: that is, of one piece only.
    """

    def branch(name: str, length: int) -> str:
        p = name[0]
        return f"""{name} = {p} () => (float[1,1,1,2] {p}y) {{
            {p}r = Reshape (x, {p}s) {p}h = Shape <start = 0, end = 1> ({p}r)
            {p}one = Equal ({p}h, one) {p}flag = Squeeze ({p}one)
            {p}v = If ({p}flag) <
                then_branch = {p}t () => (float[a,b,{length}] {p}p) {{ {p}p = Squeeze ({p}r, first) }},
                else_branch = {p}e () => (float[a,b,c,d] {p}q) {{ {p}q = Identity ({p}r) }}>
            {p}y, {p}h2, {p}c = LSTM <hidden_size = 2> ({p}v, {p}w, {p}u) }}"""

    source = f"""{HEAD} g (float[1,{width}] x, bool c) => (float[1,1,1,2] y)
        <int64[1] one = {{1}}, int64[1] first = {{0}}, int64[4] ts = {{-1, 1, 1, 4}},
         int64[4] es = {{-1, 1, 1, 8}}> {{
            [if] y = If (c) <{branch("then_branch", 4)}, {branch("else_branch", 8)}>
        }}"""
    model = onnx.parser.parse_model(source)
    rng = np.random.default_rng(0)
    for name, shape in {"tw": (1, 8, 4), "tu": (1, 8, 2), "ew": (1, 8, 8), "eu": (1, 8, 2)}.items():
        values = rng.uniform(-1, 1, shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return without_input_extents(model)


def optimised(model: ModelProto) -> ModelProto:
    for axis, extent in enumerate((1, 8)):  # as a spec pins them
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = extent
    graph = import_model(model)
    assert has_branches_within_branches(graph)
    kept = conditions_to_keep(import_model(model))
    optimise(graph, passes(), points=kept)
    return without_input_extents(export_model(graph, value_info=False))


def test_a_branch_that_would_not_fit_together_keeps_its_condition() -> None:
    """Rows of 8 make one piece of 8, and two of 4: there an LSTM would get four axes."""
    before = two_rates(8)
    feed = {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 8), "c": np.array(False)}
    after = optimised(two_rates(8))
    np.testing.assert_allclose(run(after, feed)["y"], run(before, feed)["y"], rtol=1e-6)
    (node,) = [node for node in after.graph.node if node.op_type == "If"]
    inner = {a.name: {n.op_type for n in a.g.node} for a in node.attribute}
    assert "If" in inner["then_branch"]
    assert "If" not in inner["else_branch"], "the branch that fits is written out"


def test_only_the_conditions_of_that_branch_are_kept() -> None:
    model = two_rates(8)
    for axis, extent in enumerate((1, 8)):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = extent
    assert conditions_to_keep(import_model(model)) == {"tflag"}


def test_an_if_without_others_in_it_is_not_looked_at() -> None:
    source = f"""{HEAD} g (float[2] x, bool c) => (float[2] y) {{
        y = If (c) <then_branch = t () => (float[2] a) {{ a = Neg (x) }},
                    else_branch = e () => (float[2] b) {{ b = Abs (x) }}> }}"""
    assert not has_branches_within_branches(import_model(parsed(source)))
