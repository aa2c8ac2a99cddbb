from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.optimizer.criteria import Criteria
from optc.optimizer.detection import (
    FULL,
    PAIRS,
    STANDARDS,
    BoxSet,
    Columns,
    Rows,
    match,
    overlaps,
    recognised,
)
from optc.optimizer.judgement import Judgement
from optc.specs.compile_spec import PrecisionName, Verify
from optc.specs.diagnostic import InputError
from optc.specs.manifest import Tensor

Array = Any
Arrays = dict[str, Any]
LIST = (
    Tensor(name="boxes", dtype="float32", shape=("n", 4)),
    Tensor(name="scores", dtype="float32", shape=("n",)),
    Tensor(name="labels", dtype="int64", shape=("n",)),
)


def scene(count: int, *, low: float = 0.05, high: float = 0.95, seed: int = 0) -> Arrays:
    """Return boxes that are clear of each other, the best score first."""
    rng = np.random.default_rng(seed)
    place = np.arange(count)
    corner = np.stack([place % 20 * 30.0, place // 20 * 30.0], axis=1)
    size = rng.uniform(8, 25, (count, 2))
    return {
        "boxes": np.concatenate([corner, corner + size], axis=1).astype(np.float32),
        "scores": np.linspace(high, low, count, dtype=np.float32),
        "labels": rng.integers(1, 6, count),
    }


def taken(arrays: Mapping[str, Array], rows: Any) -> Arrays:
    return {name: array[rows] for name, array in arrays.items()}


def changed(arrays: Mapping[str, Array], **changes: Array) -> Arrays:
    return {**arrays, **changes}


def judged(
    expected: Arrays,
    found: Arrays,
    precision: PrecisionName = "fp16",
    asked: Mapping[str, object] | None = None,
    outputs: tuple[Tensor, ...] = LIST,
) -> dict[str, Judgement]:
    verify = None if asked is None else Verify.model_validate(asked)
    judgements = Criteria.of(verify, precision, outputs).judge(expected, found)
    return {judgement.metric: judgement for judgement in judgements}


def badness(*args: Any, **options: Any) -> float:
    return max(each.badness for each in judged(*args, **options).values())


# --- matching ------------------------------------------------------------------------------------


def test_boxes_in_another_order_are_the_same_boxes() -> None:
    expected = scene(100)
    found = taken(expected, np.random.default_rng(1).permutation(100))
    result = judged(expected, found)
    assert set(result) == {
        "boxes_low",
        "boxes_middle",
        "boxes_high",
        "boxes_overlap",
        "boxes_score",
    }
    assert max(each.badness for each in result.values()) == 0
    assert result["boxes_high"].words == "boxes above 0.5: 50 of 50 matched, asked 0.98"
    assert result["boxes_low"].words == "boxes below 0.2: 17 of 17 matched, reported only"


def test_a_swapped_box_is_no_error_of_the_scale() -> None:
    expected = scene(20)
    order = np.arange(20)
    order[[3, 4]] = 4, 3
    assert badness(expected, taken(expected, order)) == 0
    assert badness(expected, taken(expected, order), "fp32") > 100


def test_each_band_counts_its_own() -> None:
    expected = scene(100)
    moved = expected["boxes"].copy()
    gone = [0, 10, 20, 60, 90, 95]  # three high ones, one in the middle, two low ones
    moved[gone] += 1000
    result = judged(expected, changed(expected, boxes=moved))
    assert result["boxes_high"].counts == (47, 50)
    assert result["boxes_middle"].counts == (32, 33)
    assert result["boxes_low"].counts == (15, 17)
    assert result["boxes_high"].words == (
        "boxes above 0.5: 47 of 50 matched, 3 more found, asked 0.98"
    )
    assert [result[f"boxes_{band}"].met for band in ("high", "middle", "low")] == [
        False,
        True,
        True,
    ]


def test_a_box_that_the_original_does_not_have_counts_too() -> None:
    expected = scene(100)
    ghost = {
        "boxes": np.tile(np.float32([[900, 900, 950, 950]]), (2, 1)),
        "scores": np.float32([0.9, 0.8]),
        "labels": np.array([1, 2]),
    }
    found = {name: np.concatenate([array, ghost[name]]) for name, array in expected.items()}
    result = judged(expected, found)
    assert result["boxes_high"].counts == (50, 50)
    assert "2 more found" in result["boxes_high"].words
    assert result["boxes_high"].value == pytest.approx(50 / 52)
    assert not result["boxes_high"].met


def test_another_class_is_another_box() -> None:
    expected = scene(10, low=0.6)
    other = expected["labels"].copy()
    other[:2] += 1
    result = judged(expected, changed(expected, labels=other))
    assert result["boxes_high"].counts == (8, 10)
    assert badness(expected, changed(expected, labels=other)) > 1


def test_too_little_overlap_is_another_box() -> None:
    expected = scene(9, low=0.6)
    size = expected["boxes"][:, 2:] - expected["boxes"][:, :2]
    for shift, matched in ((0.3, 9), (0.4, 0)):  # overlap 0.54 and 0.43
        moved = expected["boxes"].copy()
        moved[:, [0, 2]] += shift * size[:, :1]
        result = judged(expected, changed(expected, boxes=moved))
        assert result["boxes_high"].counts == (matched, 9)
        assert not all(each.met for each in result.values()), "such an overlap is no agreement"


def test_a_partner_is_taken_once() -> None:
    expected = taken(scene(1), [0, 0, 0])
    result = judged(expected, taken(scene(1), [0]), asked={})
    assert result["boxes_high"].counts == (1, 3)


def test_the_best_score_chooses_first() -> None:
    a = Rows(
        np.array([[0.0, 0, 10, 10], [0, 0, 10, 9]]),
        np.array([0.5, 0.9]),
        np.zeros((2, 1)),
        np.arange(2),
    )
    b = Rows(np.array([[0.0, 0, 10, 9.4]]), np.array([0.9]), np.zeros((1, 1)), np.arange(1))
    result = match(a, b, iou=0.5, cut=0.0)
    assert result.partner.tolist() == [-1, 0]


def test_boxes_without_area_have_a_place() -> None:
    expected = changed(scene(2, low=0.8), boxes=np.float32([[0, 0, 300, 0], [50, 50, 50, 90]]))
    assert badness(expected, taken(expected, [1, 0])) == 0
    away = changed(expected, boxes=expected["boxes"] + np.float32(20))
    assert judged(expected, away)["boxes_high"].counts == (0, 2)


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e4))
@settings(max_examples=40, deadline=None)
def test_overlap_is_what_counting_cells_gives_at_any_scale(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.integers(0, 12, (2, 5, 2, 2)), axis=2)
    left, right = corners.reshape(2, 5, 4)
    cells = [
        [{(x, y) for x in range(x1, x2) for y in range(y1, y2)} for x1, y1, x2, y2 in rows]
        for rows in (left, right)
    ]
    counted = [[len(a & b) / len(a | b) if a | b else 0.0 for b in cells[1]] for a in cells[0]]
    np.testing.assert_allclose(overlaps(left * scale, right * scale), counted, rtol=1e-9)


def test_one_box_far_away_does_not_make_the_others_one() -> None:
    expected = scene(9, low=0.6)
    boxes = expected["boxes"].copy()
    boxes[0, 2:] = 1e7
    expected = changed(expected, boxes=boxes)
    moved = boxes.copy()
    moved[1:, [1, 3]] += 300
    assert judged(expected, changed(expected, boxes=moved))["boxes_high"].counts == (1, 9)


def test_many_boxes_are_matched_in_pieces() -> None:
    count = 1500
    assert count * count > PAIRS
    expected = changed(scene(count), labels=np.ones(count, np.int64))
    found = taken(expected, np.random.default_rng(0).permutation(count))
    assert badness(expected, found) == 0


# --- noise, few boxes, and the model's own cut ---------------------------------------------------


def noisy(arrays: Arrays, of_scale: float, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    boxes = arrays["boxes"] + of_scale * 30 * rng.standard_normal(arrays["boxes"].shape)
    scores = np.clip(arrays["scores"] + of_scale * rng.standard_normal(len(boxes)), 0, 1)
    order = np.argsort(-scores)
    return taken(
        changed(arrays, boxes=boxes.astype(np.float32), scores=scores.astype(np.float32)), order
    )


@pytest.mark.parametrize(("precision", "size"), [("fp16", 5e-3), ("bf16", 3e-2), ("int8", 5e-2)])
def test_noise_of_the_size_of_the_precision_is_met_and_ten_times_that_is_not(
    precision: PrecisionName, size: float
) -> None:
    expected = scene(60)
    for seed in range(5):
        assert badness(expected, noisy(expected, size, seed), precision) <= 1
        assert badness(expected, noisy(expected, 10 * size, seed), precision) > 1


def test_badness_grows_with_the_noise() -> None:
    expected = scene(60)
    found = [badness(expected, noisy(expected, 10.0**-digits)) for digits in (6, 5, 4, 3, 2, 1)]
    assert found == sorted(found)
    assert 0 < found[0] < 1e-3


@pytest.mark.parametrize(("count", "met"), [(1, False), (2, False), (3, True), (20, True)])
def test_one_of_a_few_may_be_missed_but_not_one_of_two(count: int, met: bool) -> None:
    expected = scene(count, low=0.8)
    lost = taken(expected, slice(1, None))
    assert judged(expected, lost)["boxes_high"].met == met
    assert not judged(expected, taken(expected, slice(2, None)))["boxes_high"].met
    assert not judged(expected, lost, asked=ASK_ALL)["boxes_high"].met


ASK_ALL = {"detections": [{"boxes": "boxes", "scores": "scores", "labels": "labels", "high": 1.0}]}


def test_a_box_at_the_threshold_of_the_model_may_come_and_go() -> None:
    expected = scene(3, low=0.302, high=0.9)
    gone = taken(expected, slice(0, 2))
    result = judged(
        expected,
        gone,
        asked={
            "detections": [
                {"boxes": "boxes", "scores": "scores", "labels": "labels", "middle": 1.0}
            ]
        },
    )
    assert result["boxes_middle"].met
    assert "1 at the model's own cut not counted" in result["boxes_middle"].words
    assert all(each.met for each in judged(gone, expected).values()), "and the other way round"


def test_a_lone_sure_box_is_at_no_threshold() -> None:
    expected = scene(1, high=0.97, low=0.97)
    assert not judged(expected, taken(expected, slice(0, 0)))["boxes_high"].met


def test_ties_at_the_end_of_a_full_list_may_come_and_go() -> None:
    many = changed(scene(40), scores=np.full(40, 0.9999, np.float32))
    expected, found = taken(many, slice(0, 20)), taken(many, slice(10, 30))
    result = judged(expected, found)
    assert result["boxes_high"].met
    assert result["boxes_high"].words == (
        "boxes above 0.5: 10 of 10 matched, 10 at the model's own cut not counted, asked 0.98"
    )
    assert FULL <= 20


def test_ties_that_nothing_replaces_are_missed() -> None:
    many = changed(scene(40), scores=np.full(40, 0.9999, np.float32))
    expected = taken(many, slice(0, 20))
    assert not judged(expected, taken(many, slice(10, 20)))["boxes_high"].met
    worse = changed(taken(many, slice(10, 30)), scores=np.linspace(0.9, 0.8, 20, dtype=np.float32))
    assert not judged(expected, worse)["boxes_high"].met


def test_ties_of_which_not_one_is_found_are_missed() -> None:
    many = changed(scene(40), scores=np.full(40, 0.9999, np.float32))
    result = judged(taken(many, slice(0, 20)), taken(many, slice(20, 40)))
    assert result["boxes_high"].counts == (0, 20)
    assert not result["boxes_high"].met


def test_a_full_list_excuses_nothing_far_from_its_end() -> None:
    many = scene(40, high=0.99, low=0.6)
    expected, found = taken(many, slice(0, 20)), taken(many, slice(10, 30))
    assert not judged(expected, found)["boxes_high"].met


def test_low_scores_of_which_none_match_are_compared_by_rank() -> None:
    many = scene(40, high=0.11, low=0.1)
    expected, found = taken(many, slice(0, 20)), taken(many, slice(20, 40))
    result = judged(expected, found)
    assert "by rank" in result["boxes_score"].words
    assert result["boxes_score"].met
    sure = changed(found, scores=found["scores"] + np.float32(0.08))
    assert not judged(expected, sure)["boxes_score"].met


def test_no_boxes_at_all() -> None:
    none = taken(scene(4), slice(0, 0))
    assert badness(none, none) == 0
    assert badness(none, scene(4)) > 1
    assert badness(scene(4), none) > 1
    (only,) = judged(none, none, asked=ASK_ALL).values()
    assert only.words == "no boxes on either side"


def test_what_is_no_number_is_infinitely_bad() -> None:
    expected = scene(30)
    for name in ("boxes", "scores"):
        broken = expected[name].copy()
        broken.reshape(-1)[5] = np.nan
        assert badness(expected, changed(expected, **{name: broken})) == math.inf


def test_a_box_that_is_no_box_on_either_side_is_left_out() -> None:
    expected = scene(30)
    corners = expected["boxes"].copy()
    corners[3, 1], corners[4] = np.nan, np.inf
    broken = changed(expected, boxes=corners)
    assert badness(broken, taken(broken, slice(None, None, -1))) == 0
    assert badness(broken, expected) > 0


def test_a_missing_output_another_dtype_and_rows_that_contradict_each_other() -> None:
    expected = scene(30)
    found = dict(expected)
    del found["labels"]
    assert badness(expected, found) == math.inf
    assert badness(expected, changed(expected, labels=expected["labels"].astype(np.int32))) > 1e9
    assert badness(expected, changed(expected, labels=expected["labels"][:-1])) == math.inf
    assert badness(expected, changed(expected, boxes=expected["boxes"][:, :3])) == math.inf


# --- recognising ---------------------------------------------------------------------------------


def sets(arrays: Arrays, *outputs: Tensor) -> list[BoxSet]:
    return recognised(outputs, arrays, arrays, set(arrays))


def test_torchvision_gives_boxes_labels_and_scores() -> None:
    assert sets(scene(30), *LIST) == [BoxSet("boxes", "scores", ("labels",))]


def test_boxes_without_labels_are_known_by_the_order_of_their_scores() -> None:
    arrays = {name: array for name, array in scene(30).items() if name != "labels"}
    assert sets(arrays) == [BoxSet("boxes", "scores")]
    assert sets(taken(arrays, np.random.default_rng(0).permutation(30))) == []


def test_saturated_scores_are_not_taken_for_labels() -> None:
    arrays = changed(scene(30), scores=np.ones(30, np.float32))
    assert sets(arrays, *LIST) == [BoxSet("boxes", "scores", ("labels",))]
    floats = changed(arrays, labels=np.ones(30, np.float32))
    assert sets(floats, *LIST) == [BoxSet("boxes", "scores", ("labels",))]


def with_columns(arrays: Arrays, *order: str) -> Array:
    count = len(arrays["scores"])
    columns = {
        "image": np.zeros((count, 1)),
        **{n: a.reshape(count, -1) for n, a in arrays.items()},
    }
    return np.concatenate([columns[name] for name in order], axis=1).astype(np.float32)


@pytest.mark.parametrize(
    ("order", "columns"),
    [
        (("boxes", "scores"), Columns(0, 4)),
        (("boxes", "scores", "labels"), Columns(0, 4, 5)),
        (("labels", "scores", "boxes"), Columns(2, 1, 0)),
        (("image", "labels", "scores", "boxes"), Columns(3, 2, 1, 0)),
        (("image", "boxes", "labels", "scores"), Columns(1, 6, 5, 0)),
    ],
)
def test_boxes_in_columns(order: tuple[str, ...], columns: Columns) -> None:
    expected = scene(60)
    table = with_columns(expected, *order)
    assert sets({"y": table}) == [BoxSet("y", "y", columns=columns)]
    mixed = table[np.random.default_rng(0).permutation(60)]
    outputs = (Tensor(name="y", dtype="float32", shape=("n", table.shape[1])),)
    result = judged({"y": table}, {"y": mixed}, outputs=outputs)
    assert max(each.badness for each in result.values()) == 0
    result = judged({"y": table}, {"y": mixed[3:]}, outputs=outputs)
    assert sum(result[f"boxes_{band}"].counts[0] for band in ("high", "middle", "low")) >= 55  # type: ignore[index]


def test_labels_may_stand_beside_columns() -> None:
    expected = scene(30)
    arrays = {
        "dets": with_columns(expected, "boxes", "scores")[None],
        "labels": expected["labels"][None],
    }
    assert sets(arrays) == [BoxSet("dets", "dets", ("labels",), columns=Columns(0, 4))]


def test_what_is_no_detection_is_left_alone() -> None:
    rng = np.random.default_rng(0)
    rotations = {"q": rng.standard_normal((50, 4)), "confidence": np.sort(rng.random(50))[::-1]}
    assert sets(rotations) == []
    raw = {"y": rng.random((1, 2000, 85)).astype(np.float32)}
    assert sets(raw) == []
    one_class = {"y": rng.random((1, 2000, 6)).astype(np.float32) * 100}
    assert sets(one_class) == []
    head = {"boxes": scene(2000)["boxes"][None], "scores": rng.random((1, 2000, 80))}
    assert sets(head) == []
    unordered = {"boxes": scene(2000)["boxes"][None], "scores": rng.random((1, 2000))}
    assert sets(unordered) == []
    two = changed(scene(30), more=scene(30)["boxes"])
    assert sets(two) == []
    assert sets({"text": np.array(["a"]), "n": np.array(3), "z": np.zeros(0)}) == []
    assert sets({"c": np.zeros((3, 4), complex), "scores": np.float32([0.9, 0.8, 0.7])}) == []


def test_an_output_that_is_named_is_no_box() -> None:
    expected = scene(30)
    swapped = taken(expected, [1, 0, *range(2, 30)])
    asked = {"outputs": {"boxes": {"of_scale": 1e-3}}}
    assert badness(expected, swapped, asked=asked) > 1


# --- batches -------------------------------------------------------------------------------------

PADDED = (
    Tensor(name="num", dtype="int32", shape=("batch", 1)),
    Tensor(name="boxes", dtype="float32", shape=("batch", 50, 4)),
    Tensor(name="scores", dtype="float32", shape=("batch", 50)),
    Tensor(name="classes", dtype="int32", shape=("batch", 50)),
)


def padded(*images: Arrays) -> Arrays:
    """Return lists of 50 rows an image, those that hold nothing filled with junk and no score."""
    boxes = np.zeros((len(images), 50, 4), np.float32)
    scores = np.zeros((len(images), 50), np.float32)
    classes = np.full((len(images), 50), -1, np.int32)
    for image, arrays in enumerate(images):
        count = len(arrays["scores"])
        boxes[image, :count] = arrays["boxes"]
        scores[image, :count] = arrays["scores"]
        classes[image, :count] = arrays["labels"]
    num = np.array([[len(arrays["scores"])] for arrays in images], np.int32)
    return {"num": num, "boxes": boxes, "scores": scores, "classes": classes}


def test_padding_and_the_number_of_boxes_belong_to_the_boxes() -> None:
    first, second = scene(30), scene(20, seed=1)
    expected = padded(first, second)
    assert sets(expected, *PADDED) == [BoxSet("boxes", "scores", ("classes",), count="num")]
    one_less = padded(taken(first, slice(1, None)), second)
    result = judged(expected, one_less, outputs=PADDED)
    assert all(each.met for each in result.values())
    assert sum(result[f"boxes_{band}"].counts[1] for band in ("high", "middle", "low")) == 50  # type: ignore[index]


def test_images_are_not_mixed_up() -> None:
    first, second = scene(30), scene(30, seed=1)
    other = changed(second, boxes=second["boxes"] + np.float32(700))
    expected, found = padded(first, other), padded(other, first)
    assert judged(expected, found, outputs=PADDED)["boxes_high"].counts == (0, 30)


# --- what boxes have besides ---------------------------------------------------------------------


def test_masks_are_compared_where_the_boxes_are_the_same() -> None:
    expected = changed(scene(30), masks=np.random.default_rng(0).random((30, 1, 7, 7)))
    order = np.random.default_rng(1).permutation(30)
    result = judged(expected, taken(expected, order))
    assert result["boxes_attached"].outputs == ("masks",)
    assert result["boxes_attached"].value == 0
    wrong = changed(taken(expected, order), masks=expected["masks"])
    assert not judged(expected, wrong)["boxes_attached"].met


# --- what a spec says ----------------------------------------------------------------------------


def test_a_spec_may_name_boxes_that_nothing_else_shows() -> None:
    plain = scene(30)
    center = (plain["boxes"][:, :2] + plain["boxes"][:, 2:]) / 2
    size = plain["boxes"][:, 2:] - plain["boxes"][:, :2]
    order = np.random.default_rng(0).permutation(30)
    expected = {
        "where": np.concatenate([center, size], axis=1)[order],
        "how_sure": plain["scores"][order, None],
    }
    found = taken(expected, slice(None, None, -1))
    asked = {"detections": [{"boxes": "where", "scores": "how_sure", "format": "center"}]}
    assert judged(expected, found, asked=asked)["boxes_high"].counts == (15, 15)
    assert badness(expected, found, asked=asked) == 0
    assert badness(expected, found) > 1


def test_what_belongs_to_boxes_that_are_named_is_found() -> None:
    plain = scene(30)
    expected = padded(plain, scene(10, seed=1)) | {"masks": np.zeros((2, 50, 3, 3))}
    expected = {f"_{name}": array for name, array in expected.items()}
    asked = {"detections": [{"boxes": "_boxes", "scores": "_scores", "labels": "_classes"}]}
    result = judged(expected, expected, asked=asked, outputs=())
    assert result["boxes_attached"].outputs == ("_masks",)
    assert result["boxes_high"].outputs == ("_boxes", "_scores", "_classes", "_num")
    assert set(result) & {"agreement", "of_scale"} == set()


def test_a_spec_may_ask_for_more_and_for_less() -> None:
    expected = scene(100)
    found = taken(expected, np.setdiff1d(np.arange(100), [1, 11, 21, 31, 60, 65, 90, 91]))

    def said(**shares: float) -> dict[str, bool]:
        named = {"boxes": "boxes", "scores": "scores", "labels": "labels", **shares}
        result = judged(expected, found, asked={"detections": [named]})
        return {metric: each.met for metric, each in result.items()}

    assert not said()["boxes_high"]
    assert said(high=0.9)["boxes_high"]
    assert not said(middle=0.99)["boxes_middle"]
    assert said()["boxes_low"]
    assert not said(low=0.95)["boxes_low"]
    assert said(iou=0.99, high=0.9)["boxes_high"]


def test_boxes_of_fp32_are_compared_as_sets_where_the_spec_names_them() -> None:
    expected = scene(30)
    found = taken(expected, slice(None, None, -1))
    named = {"detections": [{"boxes": "boxes", "scores": "scores", "labels": "labels"}]}
    assert badness(expected, found, "fp32") > 1
    assert badness(expected, found, "fp32", named) == 0


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"boxes": "scores", "scores": "scores"}, r"`scores` is float32 \[30\]"),
        ({"boxes": "boxes", "scores": "boxes"}, "no column is known to be a score"),
        ({"boxes": "boxes", "scores": "wide"}, "which is not one a box"),
        ({"boxes": "wide", "scores": "scores"}, "the last axis of `wide` has 5 entries"),
        ({"boxes": "boxes", "scores": "absent"}, "there is no output `absent`"),
    ],
)
def test_outputs_that_cannot_be_boxes_are_the_users_fault(
    said: dict[str, str], reason: str
) -> None:
    expected = changed(scene(30), wide=np.zeros((30, 5), np.float32) - 7)
    with pytest.raises(InputError, match=reason) as caught:
        judged(expected, expected, asked={"detections": [said]})
    assert caught.value.diagnostics[0].code == "not-boxes"


def test_there_is_a_standard_for_each_precision_and_lower_ones_ask_for_less() -> None:
    names: list[PrecisionName] = ["fp32", "tf32", "fp16", "bf16", "int8"]
    shares = [(STANDARDS[name].high, STANDARDS[name].middle) for name in names]
    assert shares == sorted(shares, reverse=True)
    assert STANDARDS["fp8"] == STANDARDS["int8"]


# --- whatever a model gives ----------------------------------------------------------------------

SHAPES = st.sampled_from(
    [
        (),
        (0,),
        (3,),
        (3, 1),
        (3, 4),
        (0, 4),
        (3, 5),
        (3, 6),
        (3, 7),
        (2, 3),
        (2, 3, 4),
        (2, 1),
        (1, 7, 5),
    ]
)
VALUES = st.sampled_from([-1.0, 0.0, 0.3, 1.0, 2.0, 7.0, np.nan, np.inf])
DTYPES = st.sampled_from(
    ["float32", "float16", "bfloat16", "int64", "uint8", "bool", "str", "complex64"]
)


@st.composite
def whatever(draw: Any) -> Arrays:
    arrays = {}
    for name in draw(st.lists(st.sampled_from(["a", "boxes", "scores", "b"]), unique=True)):
        shape, dtype = draw(SHAPES), draw(DTYPES)
        count = math.prod(shape)
        values = np.array(draw(st.lists(VALUES, min_size=count, max_size=count)), np.float64)
        if dtype in ("int64", "uint8", "bool"):
            values = np.nan_to_num(np.abs(values), posinf=3.0)
        made = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        arrays[name] = made.reshape(shape)
    return arrays


@given(whatever(), whatever(), st.sampled_from(sorted(STANDARDS)), st.booleans())
@settings(max_examples=200, deadline=None)
def test_whatever_a_model_gives_is_judged(
    expected: Arrays, found: Arrays, precision: PrecisionName, symbolic: bool
) -> None:
    outputs = tuple(
        Tensor(
            name=name,
            dtype="float32",
            shape=tuple(
                f"n{axis}" if symbolic else extent for axis, extent in enumerate(array.shape)
            ),
        )
        for name, array in expected.items()
    )
    criteria = Criteria.of(None, precision, outputs)
    same = {name: array.copy() for name, array in expected.items()}
    assert criteria.badness(expected, same) == 0
    for judgement in criteria.judge(expected, found):
        assert judgement.badness >= 0
        assert judgement.words
        assert set(judgement.outputs) <= expected.keys()
    told = {name for judgement in criteria.judge(expected, found) for name in judgement.outputs}
    assert told == expected.keys()
