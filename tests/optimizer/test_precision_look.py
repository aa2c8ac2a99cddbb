"""What is seen of tensors: how large they get, and where error comes up."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest

from optc.optimizer.precision_look import FINGERPRINT, Looks
from optc.optimizer.precision_measure import drift
from optc.passes.graph import Array


def looked(expected: dict[str, Array], found: dict[str, Array]) -> Looks:
    looks = Looks([*expected, *found])
    for name, array in expected.items():
        looks.see_reference(name, array)
    for name, array in found.items():
        looks.see_lowered(name, array)
    return looks


def test_the_largest_of_all_samples_is_kept() -> None:
    looks = Looks(["a", "b"])
    for a in (np.float32([1, -7]), np.float32([2, 3])):
        looks.see_reference("a", a)
    looks.see_reference("b", np.float32([0, 0]))
    assert looks.most(["a", "b", "unseen"]) == ("a", 7.0)
    assert looks.most(["b", "unseen"]) is None


def test_infinities_of_a_mask_are_not_taken_for_large_numbers() -> None:
    looks = Looks(["a"])
    looks.see_reference("a", np.float32([-np.inf, 5]))
    assert looks.most(["a"]) == ("a", 5.0)


def test_integers_have_no_error() -> None:
    looks = looked({"a": np.int64([1, 2])}, {"a": np.int64([1, 3])})
    assert looks.error == {}
    assert looks.most(["a"]) is None


def test_error_comes_up_where_it_was_not_before() -> None:
    one = np.ones(8, np.float32)
    looks = looked({"x": one, "a": one, "b": one}, {"x": one, "a": one * 1.03, "b": one * 1.05})
    assert looks.grown(["x"], ["a"]) == pytest.approx(0.03, rel=1e-5)
    assert looks.grown(["a"], ["b"]) == pytest.approx(0.04, rel=1e-5)
    assert looks.grown(["b"], ["a"]) == 0


def test_what_is_no_number_came_up_where_it_was_one_before() -> None:
    one = np.ones(8, np.float32)
    bad, worse = np.full(8, np.inf, np.float32), np.full(8, np.nan, np.float32)
    looks = looked({"x": one, "a": one, "b": one}, {"x": one, "a": bad, "b": worse})
    assert looks.grown(["x"], ["a"]) == math.inf
    assert looks.grown(["a"], ["b"]) == 0


def test_large_tensors_are_looked_at_all_over() -> None:
    array = np.zeros((64, 32, 32), np.float32)
    array[::2] = 1
    worse = array.copy()
    worse[40:] *= 1.5
    looks = looked({"a": array}, {"a": worse})
    exact = float(np.linalg.norm(worse - array) / np.linalg.norm(array))
    assert array.size > FINGERPRINT
    assert looks.error["a"] == pytest.approx(exact, rel=0.1)


def test_it_comes_back_from_a_file() -> None:
    one = np.ones(8, np.float32)
    looks = looked({"a": one, "b": 3 * one}, {"a": one * 1.5, "b": one * np.inf})
    again = Looks(["a", "b"])
    assert again.take_in(json.loads(json.dumps(looks.as_json(), allow_nan=False)))
    assert (again.largest, again.error) == (looks.largest, looks.error)
    assert not again.take_in(None)


@pytest.mark.parametrize(
    ("expected", "found", "error"),
    [
        (np.float32([3, 4]), np.float32([3, 5]), 0.2),
        (np.float32([3, 4]), np.float32([3, np.nan]), math.inf),
        (np.float32([3, -np.inf, 4]), np.float32([3, -np.inf, 4]), 0.0),
        (np.float32([0, 0]), np.float32([0, 0]), 0.0),
        (np.float32([0, 0]), np.float32([0, 1]), math.inf),
        (np.float32([1, 2]), np.float32([1]), 1.0),
        (np.int64([1, 2]), np.int64([1, 5]), 0.0),
        (np.array([3, 4], ml_dtypes.bfloat16), np.array([3, 5], ml_dtypes.bfloat16), 0.2),
    ],
)
def test_drift_is_the_relative_error_of_floats(expected: Array, found: Array, error: float) -> None:
    assert drift({"y": expected}, {"y": found}) == pytest.approx(error)


def test_drift_is_that_of_the_worst_output() -> None:
    expected = {"y": np.float32([1]), "z": np.float32([1])}
    assert drift(expected, {"y": np.float32([1.5]), "z": np.float32([1.25])}) == 0.5
    assert drift(expected, {"z": np.float32([1.25])}) == 0.25
    assert drift({}, {}) == 0
