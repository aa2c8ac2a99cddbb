"""`take-reduction-out-of-scatters`: both operators, all reductions, and the real builder."""

from __future__ import annotations

import onnx
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite

from optc.passes.take_reduction_out_of_scatters import TakeReductionOutOfScatters


def scatter_nd(
    reduction: str, *, indices: str = "1, -1", rows: str = "4", dtype: str = "float"
) -> str:
    return f"""
        <ir_version: 8, opset_import: ["" : 18]>
        g ({dtype}[{rows}, 3] x, {dtype}[2, 3] u) => ({dtype}[{rows}, 3] y)
        <int64[2, 1] i = {{{indices}}}>
        {{
            [node] y = ScatterND <reduction = "{reduction}"> (x, i, u)
        }}"""


def scatter_elements(reduction: str, *, indices: str = "0, 3, 2, 1", axis: int = 1) -> str:
    return f"""
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[2, 4] x, float[2, 2] u) => (float[2, 4] y) <int64[2, 2] i = {{{indices}}}>
        {{
            [node] y = ScatterElements <reduction = "{reduction}", axis = {axis}> (x, i, u)
        }}"""


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    ("reduction", "combined"), [("add", "Add"), ("mul", "Mul"), ("max", "Max"), ("min", "Min")]
)
def test_it_reads_combines_and_writes(reduction: str, combined: str) -> None:
    before, after, report = rewrite(scatter_nd(reduction), TakeReductionOutOfScatters())
    assert ops(after) == ["GatherND", combined, "ScatterND"]
    assert set(report.merged.values()) == {("node",)}
    assert_same_numbers(before, after, rtol=0)
    before, after, _ = rewrite(scatter_elements(reduction), TakeReductionOutOfScatters())
    assert ops(after) == ["GatherElements", combined, "ScatterElements"]
    assert_same_numbers(before, after, rtol=0)


@pytest.mark.parametrize(
    "source",
    [
        scatter_nd("add", dtype="int64"),
        scatter_nd("add", indices="1, 3", rows="N"),
        scatter_elements("add", indices="0, 1, 1, 0", axis=0),
        scatter_elements("add", indices="0, -3, 2, 1", axis=-1),
    ],
)
def test_other_types_axes_and_indices(source: str) -> None:
    before, after, _ = rewrite(source, TakeReductionOutOfScatters())
    assert len(after.graph.node) == 3
    assert_same_numbers(before, after, rtol=0, dynamic=5)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (scatter_nd("add", indices="1, 1"), "two of its indices are equal"),
        (scatter_nd("add", indices="3, -1"), "two of its indices are equal"),
        (
            scatter_nd("add", indices="1, -1", rows="N"),
            "the extents that it indexes are not static",
        ),
        (scatter_elements("add", indices="0, 0, 2, 1"), "two of its indices are equal"),
        (
            """
            <ir_version: 8, opset_import: ["" : 18]>
            g (float[4] x, int64[2, 1] i, float[2] u) => (float[4] y)
            {
                [node] y = ScatterND <reduction = "add"> (x, i, u)
            }""",
            "its indices are no constant: two of them may be equal",
        ),
    ],
)
def test_what_it_leaves_alone(source: str, reason: str) -> None:
    before, after, report = rewrite(source, TakeReductionOutOfScatters())
    assert ops(after) == ops(before)
    assert report.skipped == {"node": reason}


def test_a_scatter_that_does_not_reduce_is_none_of_its_business() -> None:
    _, after, report = rewrite(scatter_nd("none"), TakeReductionOutOfScatters())
    assert ops(after) == ["ScatterND"]
    assert not report.skipped


@pytest.mark.parametrize("source", [scatter_nd("add"), scatter_elements("max")])
def test_tensorrt_takes_what_it_refused(tensorrt: Builder, source: str) -> None:
    before, after, _ = rewrite(source, TakeReductionOutOfScatters())
    assert tensorrt.refusal(before).startswith("refused")
    assert not tensorrt.refusal(after)
