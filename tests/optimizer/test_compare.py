from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from optc.optimizer import compare as module
from optc.optimizer.compare import LEAST_SCORE, Difference, Tolerance, compare, scale_of

EXACT = Tolerance(0, 0)
NAN, INF = np.nan, np.inf


def f32(*values: float) -> Any:
    return np.array(values, np.float32)


def test_equal_arrays_agree() -> None:
    difference = compare(f32(1, 2, 3), f32(1, 2, 3), EXACT)
    assert difference.agrees
    assert difference.worst is None
    assert (difference.outside, difference.max_abs, difference.share_outside) == (0, 0, 0)


def test_the_tolerance_is_atol_plus_rtol_times_the_reference() -> None:
    expected, found = np.array([1.0, 100.0]), np.array([1.011, 101.01])
    assert compare(expected, found, Tolerance(0.002, 0.01)).outside == 1
    assert compare(expected, found, Tolerance(0.011, 0.01)).outside == 0
    assert compare(found, expected, Tolerance(0.0, 0.01)).outside == 1


def test_the_figures() -> None:
    difference = compare(
        np.array([[1.0, 2.0], [4.0, 0.0]]), np.array([[1.5, 2.0], [3.0, 0.25]]), EXACT
    )
    assert difference.max_abs == 1
    assert difference.mean_abs == pytest.approx(1.75 / 4)
    assert difference.max_rel == 0.5
    assert difference.outside == 3
    assert difference.share_outside == 0.75


def test_the_worst_element_is_the_one_furthest_outside_its_tolerance() -> None:
    """The largest absolute error is within tolerance here; the small one is not."""
    difference = compare(np.array([1000.0, 0.1]), np.array([1000.5, 0.2]), Tolerance(0, 1e-3))
    assert difference.worst == (1,)
    assert (difference.expected, difference.found) == (0.1, 0.2)
    assert difference.max_abs == 0.5


def test_values_are_shown_as_short_as_their_type_allows() -> None:
    difference = compare(f32(0.1), f32(0.2), EXACT)
    assert (difference.expected, difference.found) == (0.1, 0.2)


def test_nan_and_infinities_agree_with_themselves_only() -> None:
    expected = f32(NAN, INF, -INF, 1, NAN, INF)
    found = f32(NAN, INF, -INF, NAN, 1, -INF)
    difference = compare(expected, found, Tolerance(1e9, 1e9))
    assert difference.special == 3
    assert difference.outside == 3
    assert difference.max_abs == 0
    assert difference.worst == (3,)


def test_an_overflow_in_half_precision_is_special() -> None:
    found = np.array([60000, INF], np.float16)
    assert compare(np.array([60000, 65000], np.float16), found, Tolerance(10, 1)).special == 1


def test_shapes_and_dtypes_must_be_the_same() -> None:
    shape = compare(np.zeros((2, 3)), np.zeros((3, 2)), EXACT)
    assert not shape.agrees
    assert not shape.same_shape
    assert shape.share_outside == 1
    dtype = compare(np.zeros(2), np.zeros(2, np.float32), EXACT)
    assert dtype.dtypes == ("float64", "float32")
    assert not dtype.agrees


def test_an_empty_array_that_should_not_be_is_no_agreement() -> None:
    assert compare(np.zeros((0, 4)), np.zeros((0, 4)), EXACT).agrees
    grown = compare(np.zeros((0, 4)), np.zeros((2, 4)), EXACT)
    assert not grown.agrees
    assert grown.share_outside == 1


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int8, np.bool_])
def test_integers_and_bools_are_exact_whatever_the_tolerance(dtype: Any) -> None:
    expected, found = np.array([0, 1, 1], dtype), np.array([0, 1, 0], dtype)
    difference = compare(expected, found, Tolerance(1e9, 1e9))
    assert difference.outside == 1
    assert difference.worst == (2,)
    assert difference.max_abs == 1


def test_integers_that_are_one_float_are_told_apart() -> None:
    difference = compare(np.array([2**62]), np.array([2**62 + 1]), EXACT)
    assert difference.outside == 1
    assert difference.worst == (0,)
    assert (difference.expected, difference.found) == (2**62, 2**62 + 1)


def test_unsigned_differences_do_not_wrap() -> None:
    assert compare(np.array([0], np.uint8), np.array([255], np.uint8), EXACT).max_abs == 255


def test_strings_are_exact() -> None:
    expected, found = np.array(["a", "b"], object), np.array(["a", "c"], object)
    difference = compare(expected, found, EXACT)
    assert difference.worst == (1,)
    assert (difference.expected, difference.found) == ("b", "c")
    assert compare(expected, np.array(["a", "b"]), EXACT).agrees


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float16])
def test_narrow_floats_have_a_tolerance(dtype: Any) -> None:
    expected, found = np.array([1, 2], dtype), np.array([1, 2.25], dtype)
    difference = compare(expected, found, Tolerance(0.1, 0))
    assert (difference.outside, difference.max_abs, difference.found) == (1, 0.25, 2.25)


def test_complex_numbers_are_compared_by_distance() -> None:
    difference = compare(np.array([3 + 4j]), np.array([0j]), Tolerance(1, 0))
    assert difference.max_abs == 5
    json.dumps(difference.as_json(), allow_nan=False)


def test_scalars_are_compared() -> None:
    difference = compare(np.array(1.0), np.array(2.0), EXACT)
    assert difference.worst == ()
    assert difference.found == 2


def test_errors_are_shown_by_score_the_low_ones_first() -> None:
    expected = np.array([0.01, 0.1, 0.3, 0.9, 1.0])
    difference = compare(expected, expected + np.array([0.5e-3, 1e-3, 0, 0, 2e-3]), EXACT)
    assert [(b.low, b.high, b.elements) for b in difference.bands] == [
        (0.0, 0.05, 1),
        (0.05, 0.25, 1),
        (0.25, 0.5, 1),
        (0.5, 1.0, 2),
    ]
    assert difference.bands[3].max_abs == pytest.approx(2e-3)
    assert difference.bands[3].mean_abs == pytest.approx(1e-3)


def test_an_output_that_leaves_0_to_1_has_no_scores() -> None:
    assert compare(np.array([0.5, 1.01]), np.array([0.5, 1.0]), EXACT).bands == ()


def test_pieces_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    expected = random.random((7, 11, 5))
    found = expected + random.standard_normal(expected.shape) * 1e-3
    found[3, 4, 2] = NAN
    whole = compare(expected, found, Tolerance(1e-3, 0))
    monkeypatch.setattr(module, "PIECE", 13)
    pieces = compare(expected, found, Tolerance(1e-3, 0))
    assert pieces.worst == whole.worst == (3, 4, 2)
    assert (pieces.outside, pieces.special) == (whole.outside, whole.special)
    assert pieces.mean_abs == pytest.approx(whole.mean_abs)
    assert [b.elements for b in pieces.bands] == [b.elements for b in whole.bands]


@given(
    st.data(),
    array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_it_agrees_with_numpy(
    data: st.DataObject, shape: tuple[int, ...], atol: float, rtol: float
) -> None:
    elements = st.floats(width=32, allow_nan=True, allow_infinity=True)
    expected, found = (data.draw(arrays(np.float32, shape, elements=elements)) for _ in range(2))
    with np.errstate(all="ignore"):
        close = np.isclose(
            found.astype(np.float64), expected.astype(np.float64), rtol, atol, equal_nan=True
        )
    difference: Difference = compare(expected, found, Tolerance(atol, rtol))
    assert difference.outside == int((~close).sum())
    json.dumps(difference.as_json(), allow_nan=False)


def test_scores_of_nothing_have_a_scale_all_the_same() -> None:
    assert scale_of(np.array([2e-5, 0.0], np.float32)) == LEAST_SCORE
    assert scale_of(np.array([0.3, 0.0], np.float32)) == pytest.approx(0.3)
    assert scale_of(np.array([2e-5, -2e-5])) == 2e-5
    assert scale_of(np.zeros(3)) == 1.0
