"""`decompose-det`: matrices of each small extent, and the real builder."""

from __future__ import annotations

import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite

from optc.passes.decompose_det import DecomposeDet


def det(shape: str, made: str, *, dtype: str = "float", opset: int = 17) -> str:
    return f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        g ({dtype}[{shape}] x) => ({dtype}[{made}] y)
        {{
            [det] y = Det (x)
        }}"""


@pytest.mark.parametrize("extent", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", ["", "N", "N, 3", "0"])
@pytest.mark.parametrize("opset", [11, 13, 22])
def test_matrices_of_up_to_four_rows(extent: int, batch: str, opset: int) -> None:
    axes = f"{batch}, " if batch else ""
    before, after, report = rewrite(
        det(f"{axes}{extent}, {extent}", batch, opset=opset), DecomposeDet()
    )
    assert "Det" not in {node.op_type for node in after.graph.node}
    assert set(report.merged.values()) == {("det",)}
    assert_same_numbers(before, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (det("5, 5", ""), "matrices of 5 rows have too many products"),
        (det("N, N", ""), "the shape or type of its matrices is not known"),
        (det("2, 2", "", dtype="double"), "it computes in float64"),
    ],
)
def test_what_it_leaves_alone(source: str, reason: str) -> None:
    _, after, report = rewrite(source, DecomposeDet())
    assert [node.op_type for node in after.graph.node] == ["Det"]
    assert report.skipped == {"det": reason}


@pytest.mark.parametrize("extent", [1, 3])
def test_tensorrt_takes_what_it_refused(tensorrt: Builder, extent: int) -> None:
    before, after, _ = rewrite(det(f"N, {extent}, {extent}", "N"), DecomposeDet())
    profiles = ({"x": ((1, extent, extent), (4, extent, extent), (8, extent, extent))},)
    assert tensorrt.refusal(before, profiles=profiles).startswith("refused")
    assert not tensorrt.refusal(after, profiles=profiles)
