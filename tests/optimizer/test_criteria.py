from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from optc.optimizer.criteria import DEFAULTS, PIECE, SCORES, Criteria, in_words, score_columns
from optc.optimizer.judgement import Judgement, badness_of_misses
from optc.specs.compile_spec import Exactness, PrecisionName, Verify
from optc.specs.manifest import Tensor

Array = Any
NAN, INF = np.nan, np.inf
RNG = np.random.default_rng(0)


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def criteria(
    asked: Mapping[str, object] | None = None,
    precision: PrecisionName = "fp32",
    *outputs: Tensor,
) -> Criteria:
    return Criteria.of(None if asked is None else Verify.model_validate(asked), precision, outputs)


def judged(
    asked: Mapping[str, object] | None,
    expected: Array,
    found: Array,
    precision: PrecisionName = "fp32",
    group: str | None = None,
) -> list[Judgement]:
    return criteria(asked, precision).judge({"y": expected}, {"y": found}, group)


def only(*args: Any, **options: Any) -> Judgement:
    (judgement,) = judged(*args, **options)
    return judgement


# --- measures, against plain numpy ---------------------------------------------------------------

PAIRS = [
    (RNG.standard_normal(shape), 10.0**-digits)
    for shape in ((7,), (2, 3, 5), (PIECE + 3,), (3, PIECE // 2))
    for digits in (1, 4)
]


@pytest.mark.parametrize(("expected", "size"), PAIRS)
def test_every_measure_is_what_numpy_makes_of_it(expected: Array, size: float) -> None:
    found = expected + size * RNG.standard_normal(expected.shape)
    asked = {"atol": 1e-3, "rtol": 1e-2, "of_scale": 0.01, "sqnr_db": 30.0, "cosine": 0.99}
    values = {each.metric: each.value for each in judged(asked, expected, found)}
    error = np.abs(found - expected)
    assert values["tolerance"] == pytest.approx((error / (1e-3 + 1e-2 * np.abs(expected))).max())
    assert values["of_scale"] == pytest.approx(error.max() / np.abs(expected).max())
    assert values["sqnr_db"] == pytest.approx(10 * np.log10((expected**2).sum() / (error**2).sum()))
    norms = np.linalg.norm(expected) * np.linalg.norm(found)
    assert values["cosine"] == pytest.approx((expected * found).sum() / norms)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.complex64])
def test_every_float_is_measured(dtype: Any) -> None:
    expected = np.array([1.0, -2.0, 4.0], dtype)
    found = np.array([1.0, -2.0, 4.5], dtype)
    assert only({"of_scale": 0.2}, expected, found).value == pytest.approx(0.125)
    assert only({"sqnr_db": 10.0}, expected, found).value == pytest.approx(10 * np.log10(21 / 0.25))


@given(
    arrays(np.int64, array_shapes(max_dims=2, min_side=0), elements=st.integers(0, 2)),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_agreement_is_the_share_of_equal_elements(expected: Array, random: Any) -> None:
    found = expected.copy().reshape(-1)
    for index in range(found.size):
        if random.random() < 0.3:
            found[index] = 3
    found = found.reshape(expected.shape)
    judgement = only({"agreement": 0.5}, expected, found)
    share = float((expected == found).mean()) if expected.size else 1.0
    assert judgement.value == share
    assert judgement.met == (share >= 0.5)


@given(
    arrays(
        np.float64, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.integers(-9, 9)
    ),
    st.integers(1, 7),
)
@settings(max_examples=100, deadline=None)
def test_the_best_are_the_same_set_where_ties_may_stand_for_each_other(
    expected: Array, k: int
) -> None:
    found = expected + np.random.default_rng(k).normal(size=expected.shape)
    k_here = min(k, expected.shape[1])
    same = 0
    for want, got in zip(expected, found, strict=True):
        best = np.argsort(-got)[:k_here]
        same += sorted(want[best]) == sorted(want)[len(want) - k_here :]
    judgement = only({"top_k": {"k": k, "agreement": 0.5}}, expected, found)
    assert judgement.value == same / len(expected)


def test_the_best_of_all_may_not_be_missing_among_ties() -> None:
    expected, found = f32(-1, 0, -1, -1)[None], f32(3, 0, 2, 1)[None]
    assert only({"top_k": {"k": 3, "agreement": 1.0}}, expected, found).value == 0


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_equal_outputs_with_nan_have_the_same_best(k: int) -> None:
    expected = f32(NAN, 1, INF, -INF, NAN, 3)[None]
    assert only({"top_k": {"k": k, "agreement": 1.0}}, expected, expected.copy()).value == 1


def test_the_best_along_another_axis() -> None:
    expected = f32(1, 5, 2, 3, 4, 9).reshape(3, 2)  # the best of each column: rows 2 and 2
    found = f32(1, 9, 6, 3, 4, 5).reshape(3, 2)
    judgement = only({"top_k": {"axis": 0, "agreement": 1.0}}, expected, found)
    assert judgement.words == "top 1 the same in 0 of 2, asked 1"
    assert only({"top_k": {"axis": -1, "agreement": 1.0}}, expected, found).value == 2 / 3


# --- badness -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [{"atol": 0.1, "rtol": 0.0}, {"of_scale": 0.1}, {"sqnr_db": 20.0}, {"cosine": 0.995}],
)
def test_badness_grows_with_the_error_and_is_one_at_the_limit(asked: dict[str, object]) -> None:
    expected = RNG.standard_normal(1000)
    noise = RNG.standard_normal(1000)
    scale = 10.0 ** np.arange(-6, 1)
    badness = [only(asked, expected, expected + size * noise).badness for size in scale]
    assert badness == sorted(badness)
    assert badness[0] < 0.01
    assert badness[-1] > 1
    low, high = 1e-6, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        met = only(asked, expected, expected + middle * noise).met
        low, high = (middle, high) if met else (low, middle)
    assert only(asked, expected, expected + low * noise).badness == pytest.approx(1, rel=1e-6)


def test_of_a_share_no_rounding_makes_one_too_many() -> None:
    for total in range(1, 400):
        for least in (0.9, 0.95, 0.98, 0.99):
            allowed = round(total * (1 - least) * 100) // 100
            assert badness_of_misses(allowed, total, least) <= 1
            assert badness_of_misses(allowed + 1, total, least) > 1


def test_all_that_is_said_must_hold_and_the_worst_comes_first() -> None:
    expected, found = f32(1, 2, 4), f32(1, 2, 4.04)
    both = judged({"of_scale": 0.1, "cosine": 1.0}, expected, found)
    assert [each.metric for each in both] == ["cosine", "of_scale"]
    assert [each.met for each in both] == [False, True]
    assert criteria({"of_scale": 0.1, "cosine": 1.0}).badness({"y": expected}, {"y": found}) > 1


def test_equal_arrays_are_met_whatever_is_asked() -> None:
    asked = {"atol": 0.0, "rtol": 0.0, "of_scale": 0.0, "sqnr_db": 300.0, "cosine": 1.0}
    for expected in (RNG.standard_normal(999), np.zeros(3), np.zeros(0), f32(NAN, INF, -INF, 0)):
        all_ = judged(asked, expected, expected.copy())
        assert len(all_) == 4
        assert max(each.badness for each in all_) == 0


def test_zeros_have_no_scale_so_one_is_taken() -> None:
    zeros = np.zeros(4, np.float32)
    assert only({"of_scale": 0.1}, zeros, zeros + np.float32(0.05)).value == pytest.approx(0.05)
    assert only({"sqnr_db": 20.0}, zeros, zeros + np.float32(0.1)).value == pytest.approx(20)
    assert only({"cosine": 0.5}, zeros, zeros + np.float32(0.1)).value == 0


def test_what_is_no_number_is_infinitely_bad() -> None:
    for found in (f32(1, NAN), f32(1, INF), f32(1, -INF)):
        judgements = judged({"of_scale": 0.1}, f32(1, 2), found)
        assert judgements[0].metric == "finite"
        assert judgements[0].badness == math.inf
    assert judged({"of_scale": 0.1}, f32(1, INF), f32(1, -INF))[0].badness == math.inf
    assert only({"of_scale": 0.1}, f32(1, INF, NAN), f32(1, INF, NAN)).badness == 0
    special = judged({"sqnr_db": 10.0, "cosine": 0.9}, f32(3, 4, INF), f32(3, 4, INF))
    assert [each.value for each in special] == [INF, 1.0]


def test_another_shape_or_dtype_or_no_output_at_all_is_infinitely_bad() -> None:
    assert only(None, np.zeros(3), np.zeros((1, 3))).metric == "shape"
    assert only(None, np.zeros(3), np.zeros(3, np.float32)).metric == "dtype"
    (missing,) = criteria().judge({"y": np.zeros(3)}, {})
    assert (missing.metric, missing.badness) == ("output", math.inf)


def test_nothing_to_judge_is_not_bad() -> None:
    assert criteria().badness({}, {}) == 0


# --- what is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "metric", "limit"),
    [
        ("fp32", "of_scale", 1e-4),
        ("tf32", "of_scale", 5e-3),
        ("fp16", "of_scale", 5e-3),
        ("bf16", "of_scale", 3e-2),
        ("int8", "sqnr_db", 20.0),
        ("fp8", "sqnr_db", 20.0),
    ],
)
def test_the_default_of_each_precision(precision: PrecisionName, metric: str, limit: float) -> None:
    for asked in (None, {}, {"data": "x/*.npz"}):
        judgement = only(asked, f32(1, 2), f32(1, 2), precision=precision)
        assert (judgement.metric, judgement.limit) == (metric, limit)


@pytest.mark.parametrize(
    ("precision", "missed"), [("fp32", 0), ("fp16", 1), ("bf16", 2), ("int8", 5), ("fp8", 5)]
)
def test_of_a_hundred_integers_so_many_may_differ(precision: PrecisionName, missed: int) -> None:
    for expected in (np.arange(100), np.zeros(100, bool), np.array([str(i) for i in range(100)])):
        found = expected.copy()
        for index in range(missed):
            found[index] = found[index - 1] if expected.dtype.kind != "b" else True
        assert only(None, expected, found, precision=precision).met
        found[50] = found[49] if expected.dtype.kind != "b" else True
        assert not only(None, expected, found, precision=precision).met


def test_the_only_integer_there_is_must_be_right() -> None:
    assert not only(None, np.array([3]), np.array([4]), precision="int8").met


def test_one_of_atol_and_rtol_leaves_the_other_where_it_was() -> None:
    assert in_words(Exactness(atol=0.5)) == "atol 0.5, rtol 0.0001"
    assert in_words(Exactness(rtol=0.5)) == "atol 0.0001, rtol 0.5"
    assert only({"atol": 0.0}, f32(1000), f32(1000.09)).met
    assert not only({"atol": 0.0, "rtol": 0.0}, f32(1000), f32(1000.09)).met


def test_the_particular_goes_before_the_general() -> None:
    asked = {
        "of_scale": 1.0,
        "outputs": {"y": {"of_scale": 2.0}},
        "groups": {
            "plain": "a.npz",
            "own": {"data": "a.npz", "of_scale": 3.0},
            "both": {"data": "a.npz", "of_scale": 3.0, "outputs": {"y": {"cosine": 0.5}}},
        },
    }
    limits = {
        group: only(asked, f32(1), f32(1), group=group).limit
        for group in (None, "plain", "own", "both", "unknown")
    }
    assert limits == {None: 2.0, "plain": 2.0, "own": 3.0, "both": 0.5, "unknown": 2.0}
    (other,) = criteria(asked).judge({"z": f32(1)}, {"z": f32(1)}, "both")
    assert other.limit == 3.0


def test_what_is_said_of_floats_says_nothing_of_integers() -> None:
    asked = {"atol": 10.0, "rtol": 10.0, "top_k": {"k": 1}}
    judgement = only(asked, np.array([1, 2]), np.array([1, 3]))
    assert (judgement.metric, judgement.met) == ("agreement", False)
    assert only({"agreement": 0.5}, f32(1), f32(1)).metric == "of_scale"


def test_integers_that_are_named_are_held_to_any_measure() -> None:
    asked = {"outputs": {"y": {"atol": 1.0, "rtol": 0.0}}}
    pixels = np.array([0, 128, 255], np.uint8)
    assert only(asked, pixels, np.array([1, 127, 254], np.uint8)).met
    assert not only(asked, pixels, np.array([2, 128, 255], np.uint8)).met
    assert only(asked, np.array([True]), np.array([False])).metric == "agreement"


def test_an_output_without_the_axis_is_not_asked_for_its_best() -> None:
    assert only({"top_k": {"axis": 1}}, f32(1), f32(1)).metric == "of_scale"
    assert only({"top_k": {"axis": 1}}, f32(1)[None], f32(1)[None]).metric == "top_k"


def test_the_tolerance_of_single_elements() -> None:
    asked = criteria({"outputs": {"a": {"atol": 0.5, "rtol": 0.0, "of_scale": 0.1}}}, "int8")
    limit = asked.tolerance("a", f32(1)).on(f32(-3, 1))
    assert [limit.of(0), limit.of(1e9)] == pytest.approx([0.3, 0.3])
    assert asked.tolerance("b", f32(1)).of(1) == INF


# --- scores beside coordinates -------------------------------------------------------------------


def raw_head(channels_first: bool, extra: int = 0) -> Array:
    rng = np.random.default_rng(0)
    coordinates = rng.uniform(0, 640, (1, 300, 4))
    rest = [rng.random((1, 300, 20)), *([rng.normal(size=(1, 300, extra))] if extra else [])]
    table = np.concatenate([coordinates, *rest], axis=2).astype(np.float32)
    return np.ascontiguousarray(table.transpose(0, 2, 1)) if channels_first else table


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("extra", [0, 8])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_scores_do_not_hide_behind_the_scale_of_pixels(
    channels_first: bool, extra: int, precision: PrecisionName
) -> None:
    expected = raw_head(channels_first, extra)
    assert len(judged(None, expected, expected, precision)) == 2
    for size, met in ((0.9, True), (1.1, False)):
        found = expected.copy()
        place = (0, 23, 7) if channels_first else (0, 7, 23)
        found[place] += np.float32(size * SCORES[precision])
        result = {each.metric: each for each in judged(None, expected, found, precision)}
        assert result["scores"].met == met
        assert all(each.met for metric, each in result.items() if metric != "scores")
        moved = expected.copy()
        moved[(0, 0, 7) if channels_first else (0, 7, 0)] += np.float32(0.01)
        assert all(each.met for each in judged(None, expected, moved, precision))


def test_only_where_nothing_is_asked_scores_are_looked_for() -> None:
    expected = raw_head(False)
    assert only({"of_scale": 0.1}, expected, expected, "fp16").metric == "of_scale"


def test_what_is_no_raw_head_has_no_score_columns() -> None:
    rng = np.random.default_rng(0)
    features = 10 * rng.standard_normal((1, 197, 64))
    dead = raw_head(False)
    dead[:, :, 4:] = 0
    normalised = rng.random((1, 300, 24))
    for array in (
        features,
        dead,
        normalised,
        raw_head(False)[0],
        features[:, :0],
        features[..., :4],
    ):
        assert score_columns(array) is None


# --- rows that come and go -----------------------------------------------------------------------

INDICES = Tensor(name="y", dtype="int64", shape=("n", 3))


def test_indices_of_boxes_are_a_set_below_fp32() -> None:
    expected = RNG.integers(0, 99, (100, 3))
    found = RNG.permutation(expected)[1:]
    low = criteria(None, "fp16", INDICES)
    (judgement,) = low.judge({"y": expected}, {"y": found})
    assert judgement.words == "99 of 100 rows are in both, asked 0.99"
    assert judgement.met
    assert low.badness({"y": expected}, {"y": found[1:]}) > 1
    assert low.badness({"y": expected}, {"y": RNG.permutation(expected)}) == 0
    assert low.badness({"y": expected[:0]}, {"y": expected[:0]}) == 0
    assert low.badness({"y": expected[:0]}, {"y": expected}) > 1
    high = criteria(None, "fp32", INDICES)
    assert high.badness({"y": expected}, {"y": found}) == INF


def test_a_row_twice_is_not_a_row_once() -> None:
    expected = np.array([[0, 0, 1], [0, 0, 1], [0, 0, 2]])
    found = np.array([[0, 0, 1], [0, 0, 2], [0, 0, 2]])
    (judgement,) = criteria(None, "int8", INDICES).judge({"y": expected}, {"y": found})
    assert judgement.counts == (2, 3)


def test_indices_may_stand_in_columns() -> None:
    columns = Tensor(name="y", dtype="int64", shape=(2, "n"))
    expected = np.arange(200).reshape(2, 100)
    low = criteria(None, "fp16", columns)
    assert low.badness({"y": expected}, {"y": expected[:, 1:]}) == pytest.approx(1)
    assert low.badness({"y": expected}, {"y": expected[:1]}) == INF


# --- for people and programs ---------------------------------------------------------------------


def test_words_say_what_came_out_and_what_is_asked() -> None:
    expected, found = f32(1, 2, 4), f32(1, 2, 4.004)
    asked = {"atol": 1e-4, "rtol": 0.0, "of_scale": 5e-3, "sqnr_db": 20.0, "cosine": 0.99}
    words = {each.metric: each.words for each in judged(asked, expected, found)}
    assert words == {
        "tolerance": "40 of what atol 0.0001, rtol 0 allow",
        "of_scale": "0.001 of the scale, allowed 0.005",
        "sqnr_db": "SQNR 61.2 dB, asked 20 dB",
        "cosine": "cosine 1 - 9.1e-08, asked 0.99",
    }
    assert str(criteria(asked)) == (
        "within atol 0.0001, rtol 0, 0.005 of the scale, SQNR 20 dB, cosine 0.99"
    )
    assert str(criteria(None, "int8")) == "within SQNR 20 dB, the default of int8"
    own = {"groups": {"hard": {"data": "x", "of_scale": 0.1}}}
    assert str(criteria(own)).endswith("the default of fp32, or what is asked of single ones")


def test_json_has_no_infinities() -> None:
    judgement = only(None, np.zeros(3), np.zeros(2))
    text = json.dumps(judgement.as_json(), allow_nan=False)
    assert json.loads(text)["badness"] == "inf"


def test_there_is_a_default_for_each_precision_and_each_kind() -> None:
    for precision, default in DEFAULTS.items():
        assert default.agreement is not None, precision
        assert (default.of_scale is None) != (default.sqnr_db is None), precision
