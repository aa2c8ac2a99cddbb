"""`fill-axes-before-gathers`: numbers with and without something to take, and what the builder says."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder_says import Builder, profile_of
from graphs import parsed, run
from onnx import ModelProto

from optc.passes.fill_axes_before_gathers import FillAxesBeforeGathers
from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import PassRecord, optimise

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
USUALLY_NONE = (0, 0, 9)


def rewrite(source: str) -> tuple[ModelProto, ModelProto, PassRecord]:
    """Return the model before and after the pass, where N and M may be 0, and what it reported."""
    before = parsed(source)
    graph = import_model(before)
    ranges = {"N": (0, 9), "M": (0, 9)}
    report = optimise(graph, [FillAxesBeforeGathers()], ranges=ranges)
    again = optimise(graph, [FillAxesBeforeGathers()], ranges=ranges)
    assert again.records[0].rewritten == 0, "a second run changed something"
    after = export_model(graph, value_info=False)
    onnx.checker.check_model(after)
    return before, after, report.records[0]


def guarded(dtype: str, index: str, *, opset: int = 17) -> str:
    """Return a model that takes rows of x where there are any."""
    return (
        HEAD.replace("17", str(opset))
        + f"""
        g ({dtype}[N,4] x) => ({dtype}[K,4] y) <int64 zero = {{0}}, {index}>
        {{
            s = Shape (x)
            n = Gather (s, zero)
            c = Greater (n, zero)
            [if] y = If (c) <
                then_branch = t () => ({dtype}[P,4] a) {{ [take] a = Gather (x, i) }},
                else_branch = f () => ({dtype}[N,4] b) {{ [none] b = Identity (x) }}
            >
        }}"""
    )


@pytest.mark.parametrize("dtype", ["float", "float16", "int64", "int32"])
@pytest.mark.parametrize(
    "index", ["int64[2] i = {0, 0}", "int64[2] i = {-1, 0}", "int32[1] i = {-1}"]
)
def test_rows_are_taken_where_there_are_any(dtype: str, index: str, tensorrt: Builder) -> None:
    before, after, report = rewrite(guarded(dtype, index))
    assert set(report.merged.values()) == {("take",)}
    for rows in (0, 1, 5):
        x = np.arange(rows * 4).reshape(rows, 4)
        names = {"float": np.float32, "float16": np.float16}
        inputs = {"x": x.astype(names.get(dtype, dtype))}
        expected, found = run(before, inputs)["y"], run(after, inputs)["y"]
        np.testing.assert_array_equal(found, expected)
        assert found.shape == expected.shape

    profiles = (profile_of(before, USUALLY_NONE),)
    assert "from an empty axis" in tensorrt.refusal(before, profiles=profiles)
    assert tensorrt.refusal(after, profiles=profiles) == ""


def test_it_goes_along_any_axis_with_indices_from_outside(tensorrt: Builder) -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[2,N,3] x, int32[M] i) => (float[2,M,3] y)
        { [take] y = Gather <axis = -2> (x, i) }"""
    )
    assert set(report.merged.values()) == {("take",)}
    x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    for indices in ([4, -5, 0, -1], []):
        inputs = {"x": x, "i": np.array(indices, np.int32)}
        np.testing.assert_array_equal(run(after, inputs)["y"], run(before, inputs)["y"])
    profile = {"x": ((2, 0, 3), (2, 0, 3), (2, 9, 3)), "i": ((0,), (2,), (9,))}
    assert "from an empty axis" in tensorrt.refusal(before, profiles=(profile,))
    assert tensorrt.refusal(after, profiles=(profile,)) == ""


@pytest.mark.parametrize(
    "source",
    [
        "g (float[3,4] x, int64[M] i) => (float[M,4] y) { y = Gather (x, i) }",
        "g (float[N,4] x, int64[M] i) => (float[N,M] y) { y = Gather <axis = 1> (x, i) }",
        "g (int64[M] i) => (float[M] y) <float[2] x = {1, 2}> { y = Gather (x, i) }",
    ],
)
def test_what_is_never_empty_is_left_alone(source: str) -> None:
    _, _, report = rewrite(HEAD + source)
    assert not report.rewritten
    assert report.skipped == {}


def test_types_that_are_not_padded_stay_and_say_why() -> None:
    _, _, report = rewrite(guarded("bool", "int64[1] i = {0}"))
    assert report.skipped == {"take": "`x` is bool, which Pad has not"}


def test_an_older_model_is_raised() -> None:
    _, after, report = rewrite(guarded("float", "int64[1] i = {0}", opset=9))
    assert report.rewritten
    assert after.opset_import[0].version >= 11


def test_of_a_refused_if_the_branches_are_filled() -> None:
    graph = import_model(parsed(guarded("float", "int64[1] i = {0}")))
    ranges = {"N": (0, 9)}
    refused = frozenset({"if"})
    report = optimise(graph, [FillAxesBeforeGathers()], ranges=ranges, refused=refused)
    assert set(report.records[0].merged.values()) == {("take",)}
