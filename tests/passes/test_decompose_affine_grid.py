"""`decompose-affine-grid`: two and three axes, corners aligned or not, and the real builder."""

from __future__ import annotations

import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite

from optc.passes.decompose_affine_grid import DecomposeAffineGrid


def grid(theta: str, size: str, made: str, *, corners: int = 0, dtype: str = "float") -> str:
    return f"""
        <ir_version: 9, opset_import: ["" : 20]>
        g ({dtype}[{theta}] theta) => ({dtype}[{made}] y)
        <int64[{size.count(",") + 1}] size = {{{size}}}>
        {{
            [grid] y = AffineGrid <align_corners = {corners}> (theta, size)
        }}"""


@pytest.mark.parametrize("corners", [0, 1])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("spatial", ["5, 6", "3, 4, 5"])
def test_it_is_a_product_with_all_positions(corners: int, batch: int, spatial: str) -> None:
    rank = spatial.count(",") + 1
    source = grid(
        f"{batch}, {rank}, {rank + 1}",
        f"{batch}, 3, {spatial}",
        f"{batch}, {spatial}, {rank}",
        corners=corners,
    )
    before, after, report = rewrite(source, DecomposeAffineGrid())
    assert [node.op_type for node in after.graph.node] == ["Transpose", "MatMul", "Reshape"]
    assert set(report.merged.values()) == {("grid",)}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            grid("1, 2, 3", "1, 3, 1, 4", "1, 1, 4, 2", corners=1),
            "it aligns the corners of an axis with one position",
        ),
        (grid("1, 2, 3", "1, 3, 5, 4", "1, 5, 4, 2", dtype="double"), "it computes in float64"),
        (
            """
            <ir_version: 9, opset_import: ["" : 20]>
            g (float[1, 2, 3] theta, int64[4] size) => (float[N, H, W, 2] y)
            {
                [grid] y = AffineGrid (theta, size)
            }""",
            "the extents of its grid are not known",
        ),
    ],
)
def test_what_it_leaves_alone(source: str, reason: str) -> None:
    _, after, report = rewrite(source, DecomposeAffineGrid())
    assert [node.op_type for node in after.graph.node] == ["AffineGrid"]
    assert report.skipped == {"grid": reason}


def test_tensorrt_takes_what_it_refused(tensorrt: Builder) -> None:
    before, after, _ = rewrite(grid("N, 2, 3", "2, 3, 5, 6", "N, 5, 6, 2"), DecomposeAffineGrid())
    profiles = ({"theta": ((2, 2, 3), (2, 2, 3), (2, 2, 3))},)
    assert tensorrt.refusal(before, profiles=profiles).startswith("refused")
    assert not tensorrt.refusal(after, profiles=profiles)
