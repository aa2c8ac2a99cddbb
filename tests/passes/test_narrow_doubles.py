"""`narrow-doubles`: what is the same in float32, to the last bit, and what is not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite, run

from optc.passes.graph import export_model, import_model
from optc.passes.narrow_doubles import NarrowDoubles
from optc.passes.pipeline import optimise
from optc.passes.remove_identities import RemoveIdentities

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
TO_FLOAT, TO_DOUBLE, TO_INT64 = "Cast <to = 1>", "Cast <to = 11>", "Cast <to = 7>"


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    "operation",
    [
        "Floor (x)",
        "Max (x, z)",
        "Concat <axis = 0> (x, z, c)",
        "Where (b, x, c)",
        "ReduceMax <axes = [1]> (x)",
        "Clip (x, low)",
        "Transpose <perm = [1, 0]> (x)",
    ],
)
def test_what_chooses_among_its_inputs_is_narrowed(operation: str) -> None:
    source = f"""{HEAD}
        g (float[2, 3] a, float16[2, 3] h, bool[2, 3] b) => (double[P, Q] y)
        <double[2, 3] c = {{0.5, 1, 2, 3, -4, 0.25}}, double low = {{-0.125}}>
        {{
            x = {TO_DOUBLE} (a)
            z = {TO_DOUBLE} (h)
            [node] y = {operation}
        }}"""
    before, after, _ = rewrite(source, NarrowDoubles())
    assert ops(after)[-2:] == [operation.split(" ")[0], "Cast"]
    assert_same_numbers(before, after, rtol=0)


@pytest.mark.parametrize("operation", ["Less (x, z)", "Equal (x, x)", "IsNaN (x)"])
def test_comparisons_are_narrowed(operation: str) -> None:
    source = f"""{HEAD}
        g (float[2, 3] a, int8[2, 3] h) => (bool[2, 3] y)
        {{
            x = {TO_DOUBLE} (a)
            z = {TO_DOUBLE} (h)
            [node] y = {operation}
        }}"""
    before, after, report = rewrite(source, NarrowDoubles())
    assert "node" in {part for parts in report.merged.values() for part in parts}
    assert_same_numbers(before, after, rtol=0)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
def test_one_operation_that_is_rounded_again_is_the_same_in_float32(op: str) -> None:
    source = f"""{HEAD}
        g (float[N] a, float[N] b) => (float[N] y)
        {{
            x = {TO_DOUBLE} (a)
            z = {TO_DOUBLE} (b)
            [node] s = {op} (x, z)
            y = {TO_FLOAT} (s)
        }}"""
    before, after, _ = rewrite(source, NarrowDoubles())
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, (2, 200_000), dtype=np.uint32).view(np.float32)
    near = (1 + rng.integers(-9, 9, (2, 1000)) * np.float64(2) ** -23).astype(np.float32)
    a, b = np.concatenate([bits, near], axis=1)
    assert ops(after) == [op, "Cast", "Cast"]
    expected, found = run(before, {"a": a, "b": b})["y"], run(after, {"a": a, "b": b})["y"]
    np.testing.assert_array_equal(found, expected)


def test_the_casts_meet_and_are_gone() -> None:
    source = f"""{HEAD}
        g (float[N] a) => (float[N] y)
        {{
            x = {TO_DOUBLE} (a)
            s = Sqrt (x)
            n = {TO_FLOAT} (s)
            w = {TO_DOUBLE} (n)
            f = Floor (w)
            y = {TO_FLOAT} (f)
        }}"""
    before, after, _ = rewrite(source, NarrowDoubles())
    graph = import_model(after)
    optimise(graph, [RemoveIdentities()])
    clean = export_model(graph)
    assert ops(clean) == ["Sqrt", "Floor"]
    assert_same_numbers(before, clean, rtol=0)


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        ("Floor (d)", "it reads numbers that float32 does not hold"),
        ("Max (x, tenth)", "it reads numbers that float32 does not hold"),
        ("Mul (x, x)", "its result is read as float64"),
    ],
)
def test_what_it_leaves_alone(operation: str, reason: str) -> None:
    source = f"""{HEAD}
        g (float[3] a, double[3] d) => (double[3] y) <double tenth = {{0.1}}>
        {{
            x = {TO_DOUBLE} (a)
            [node] y = {operation}
        }}"""
    before, after, report = rewrite(source, NarrowDoubles())
    assert "Cast" not in ops(after)[1:]
    assert ops(after)[-1] == ops(before)[-1]
    assert report.skipped == {"node": reason}


def test_a_double_that_counts_elements_builds(tensorrt: Builder) -> None:
    source = f"""{HEAD}
        g (float[4] a) => (int64[4] y)
        {{
            x = {TO_DOUBLE} (a)
            f = Ceil (x)
            y = {TO_INT64} (f)
        }}"""
    before, after, _ = rewrite(source, NarrowDoubles())
    assert ops(after) == ["Ceil", "Cast"]
    assert_same_numbers(before, after, rtol=0)
    assert not tensorrt.refusal(after)
