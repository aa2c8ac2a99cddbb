from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builder_says import Builder
from graphs import parsed, rewrite, run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from optc.passes.decompose_non_max_suppression import DecomposeNonMaxSuppression
from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import optimise

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
NO_LIMIT = 2**63 - 1


def source(
    batches: int | str,
    classes: int,
    boxes: int | str,
    *,
    most: int | None = NO_LIMIT,
    overlap: float | None = 0.5,
    score: float | None = None,
    center: int = 0,
) -> str:
    given = {"most": most, "overlap": overlap, "score": score}
    types = {"most": "int64[1]", "overlap": "float[1]", "score": "float[1]"}
    constants = ", ".join(
        f"{types[name]} {name} = {{{value}}}" for name, value in given.items() if value is not None
    )
    names = ", ".join(name if value is not None else '""' for name, value in given.items())
    return (
        HEAD
        + f"""
        g (float[{batches},{boxes},4] boxes, float[{batches},{classes},{boxes}] scores)
            => (int64[selected,3] y) <{constants}>
        {{ [nms] y = NonMaxSuppression <center_point_box = {center}> (boxes, scores, {names}) }}"""
    )


def bounded(model: ModelProto, **ranges: tuple[int, int]) -> ModelProto:
    graph = import_model(model)
    report = optimise(graph, [DecomposeNonMaxSuppression()], ranges=ranges)
    assert not report.records[0].skipped
    return export_model(graph, value_info=False)


def assert_same(before: ModelProto, after: ModelProto, inputs: dict[str, Any]) -> None:
    for name, expected in run(before, inputs).items():
        found = run(after, inputs)[name]
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def made_up(seed: int, batches: int, classes: int, boxes: int) -> dict[str, Any]:
    """Return boxes that overlap, some with corners the wrong way round, and scores with ties."""
    rng = np.random.default_rng(seed)
    corner, size = rng.random((2, batches, boxes, 2)).round(1)
    return {
        "boxes": np.concatenate([corner, corner + size - 0.2], axis=-1).astype(np.float32),
        "scores": rng.random((batches, classes, boxes)).round(1).astype(np.float32),
    }


CORNER = st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0, 2.0, 1e30, np.inf, -np.inf, np.nan])


@settings(deadline=None, max_examples=60)
@given(
    boxes=st.lists(st.tuples(CORNER, CORNER, CORNER, CORNER), min_size=7, max_size=7),
    scores=st.lists(
        st.sampled_from([0.0, -0.0, 0.5, 0.75, -1.0, np.inf]), min_size=14, max_size=14
    ),
    most=st.sampled_from([None, 0, 1, 3, NO_LIMIT]),
    overlap=st.sampled_from([None, 0.0, 0.25, 1.0]),
    score=st.sampled_from([None, 0.0, 0.5]),
    center=st.sampled_from([0, 1]),
)
def test_it_selects_what_onnxruntime_selects(
    boxes: list[tuple[float, ...]],
    scores: list[float],
    most: int | None,
    overlap: float | None,
    score: float | None,
    center: int,
) -> None:
    text = source(1, 2, 7, most=most, overlap=overlap, score=score, center=center)
    before, after, _ = rewrite(text, DecomposeNonMaxSuppression())
    inputs = {
        "boxes": np.array(boxes, np.float32).reshape(1, 7, 4),
        "scores": np.array(scores, np.float32).reshape(1, 2, 7),
    }
    assert_same(before, after, inputs)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("center", [0, 1])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 20), (2, 3, 17), (3, 1, 9)])
def test_batches_and_classes_come_in_their_order(
    sizes: tuple[int, int, int], center: int, seed: int
) -> None:
    text = source(*sizes, most=5, score=0.2, center=center)
    before, after, _ = rewrite(text, DecomposeNonMaxSuppression())
    assert_same(before, after, made_up(seed, *sizes))


def test_scores_that_are_nan_are_below_every_threshold() -> None:
    before, after, _ = rewrite(source(1, 1, 3, score=-5.0), DecomposeNonMaxSuppression())
    inputs = made_up(0, 1, 1, 3)
    inputs["scores"][0, 0, 1] = np.nan
    assert_same(before, after, inputs)


def test_the_most_per_class_may_be_computed() -> None:
    text = source(1, 2, 9).replace("scores)", "scores, int64[1] most)", 1)
    text = text.replace(f"int64[1] most = {{{NO_LIMIT}}}, ", "")
    before, after, _ = rewrite(text, DecomposeNonMaxSuppression())
    for most in (0, 2, 100):
        inputs = {**made_up(1, 1, 2, 9), "most": np.array([most])}
        assert_same(before, after, inputs)


def test_a_slice_behind_it_says_how_many_are_needed() -> None:
    text = source(1, 1, 2000).replace("int64[selected,3] y", "int64[first] y")
    text = text.replace("<int64", "<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, "
        "int64[1] ten = {10}, int64", 1).replace("[nms] y", "[nms] rows").rstrip("} ")  # fmt: skip
    text += """
        [box] b = Gather <axis = 1> (rows, two)
        [flat] f = Squeeze (b, one)
        [cut] y = Slice (f, zero, ten)
    }"""
    before = parsed(text)
    after = bounded(before)
    assert sum(node.op_type == "TopK" for node in after.graph.node) == 10
    for seed in range(3):
        assert_same(before, after, made_up(seed, 1, 1, 2000))


@pytest.mark.parametrize("compute_capability", ["7.5", "8.6", "8.9"])
def test_tensorrt_takes_it(compute_capability: str, tensorrt: Builder) -> None:
    text = source(2, 3, 17, most=4, score=0.1)
    before, after, _ = rewrite(text, DecomposeNonMaxSuppression())
    assert tensorrt.refusal(before, compute_capability=compute_capability)
    assert not tensorrt.refusal(after, compute_capability=compute_capability)


def test_batches_and_boxes_may_be_dynamic(tensorrt: Builder) -> None:
    before = parsed(source("batch", 3, "count", most=4))
    after = bounded(before, batch=(1, 3), count=(0, 12))
    for batch, count in ((1, 0), (1, 12), (3, 1), (2, 7)):
        assert_same(before, after, made_up(count, batch, 3, count))
    profile = {
        "boxes": ((1, 0, 4), (2, 5, 4), (3, 12, 4)),
        "scores": ((1, 3, 0), (2, 3, 5), (3, 3, 12)),
    }
    assert tensorrt.refusal(before, profiles=(profile,))
    assert not tensorrt.refusal(after, profiles=(profile,))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (source(1, 1, "n"), "nothing bounds the number of its boxes"),
        (source(1, 1, 9000, most=10), "it may compare 81000000 pairs of boxes"),
        (source(1, 1, 600), "it may select 600 boxes of each class, one after the other"),
    ],
)
def test_what_is_left_and_why(text: str, reason: str) -> None:
    _, _, report = rewrite(text, DecomposeNonMaxSuppression())
    assert report.skipped == {"nms": reason}
    assert not report.merged


def test_one_in_a_body_is_left() -> None:
    body = source(1, 1, 3).split("{ [nms]")[1].rstrip("} ").replace(" y =", "[nms] p =")
    text = (
        HEAD
        + f"""
        g (bool c, float[1,3,4] boxes, float[1,1,3] scores) => (int64[n,3] y)
        <int64[1] most = {{3}}, float[1] overlap = {{0.5}}, int64[1,3] none = {{0,0,0}}>
        {{
            [if] y = If (c) <
                then_branch = t () => (int64[a,3] p) {{ {body} }},
                else_branch = e () => (int64[1,3] q) {{ [id] q = Identity (none) }}
            >
        }}"""
    )
    _, _, report = rewrite(text, DecomposeNonMaxSuppression())
    assert set(report.skipped) == {"nms"}
