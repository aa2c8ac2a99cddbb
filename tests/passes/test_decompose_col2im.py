"""`decompose-col2im`: any blocks, what it leaves alone, and the real builder."""

from __future__ import annotations

import numpy as np
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from optc.passes.decompose_col2im import DecomposeCol2im


def col2im(
    image: tuple[int, ...],
    block: tuple[int, ...],
    *,
    attrs: str = "",
    blocks: object,
    batch: object = "N",
    dtype: str = "float",
) -> str:
    rank, taps = len(image), int(np.prod(block))
    made = ", ".join(map(str, image))
    return f"""
        <ir_version: 9, opset_import: ["" : 18]>
        g ({dtype}[{batch}, {3 * taps}, {blocks}] x) => ({dtype}[{batch}, 3, {made}] y)
        <int64[{rank}] image = {{{made}}}, int64[{rank}] block = {{{", ".join(map(str, block))}}}>
        {{
            [fold] y = Col2Im {attrs} (x, image, block)
        }}"""


_pair = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    image=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    block=_pair,
    strides=_pair,
    dilations=_pair,
    pads=st.tuples(*(st.integers(0, 2) for _ in range(4))),
)
@settings(max_examples=30, deadline=None)
def test_blocks_are_added_where_they_belong(
    image: tuple[int, int],
    block: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    pads: tuple[int, int, int, int],
) -> None:
    room = [
        image[axis] + pads[axis] + pads[axis + 2] - (block[axis] - 1) * dilations[axis] - 1
        for axis in (0, 1)
    ]
    assume(min(room) >= 0)
    blocks = int(np.prod([r // s + 1 for r, s in zip(room, strides, strict=True)]))
    attrs = f"<strides = {list(strides)}, dilations = {list(dilations)}, pads = {list(pads)}>"
    source = col2im(image, block, attrs=attrs, blocks=blocks)
    before, after, report = rewrite(source, DecomposeCol2im())
    assert [node.op_type for node in after.graph.node] == ["Reshape", "ConvTranspose"]
    assert set(report.merged.values()) == {("fold",)}
    assert_same_numbers(before, after, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "block", "blocks"), [((8,), (3,), 6), ((4, 4, 5), (2, 2, 2), 36)]
)
def test_one_and_three_axes(image: tuple[int, ...], block: tuple[int, ...], blocks: int) -> None:
    _, after, _ = rewrite(col2im(image, block, blocks=blocks), DecomposeCol2im())
    assert [node.op_type for node in after.graph.node] == ["Reshape", "ConvTranspose"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (col2im((4, 4), (2, 2), blocks=9, dtype="double"), "it adds float64"),
        (
            """
            <ir_version: 9, opset_import: ["" : 18]>
            g (float[1, 4, 9] x, int64[2] image) => (float[1, 1, H, W] y) <int64[2] block = {2, 2}>
            {
                [fold] y = Col2Im (x, image, block)
            }""",
            "the shape of its image or its blocks is no constant",
        ),
    ],
)
def test_what_it_leaves_alone(source: str, reason: str) -> None:
    _, after, report = rewrite(source, DecomposeCol2im())
    assert [node.op_type for node in after.graph.node] == ["Col2Im"]
    assert report.skipped == {"fold": reason}


@pytest.mark.parametrize(
    ("image", "attrs", "blocks"),
    [((8, 8), "<strides = [2, 2]>", 16), ((7, 9), "<strides = [2, 2], pads = [1, 0, 0, 0]>", 16)],
)
def test_tensorrt_takes_what_it_refused(
    tensorrt: Builder, image: tuple[int, int], attrs: str, blocks: int
) -> None:
    source = col2im(image, (2, 2), attrs=attrs, blocks=blocks)
    before, after, _ = rewrite(source, DecomposeCol2im())
    profiles = ({"x": ((1, 12, blocks), (4, 12, blocks), (8, 12, blocks))},)
    assert tensorrt.refusal(before, profiles=profiles).startswith("refused")
    assert not tensorrt.refusal(after, profiles=profiles)
