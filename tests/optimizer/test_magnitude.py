from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from optc.optimizer.magnitude import RESOLUTION, Magnitudes, NotFinite

Array = npt.NDArray[Any]

DATA: dict[str, Callable[[np.random.Generator], Array]] = {
    "normal": lambda random: random.normal(size=50_000),
    "after a ReLU": lambda random: np.maximum(random.normal(size=50_000), 0),
    "long tail": lambda random: random.standard_t(2, size=50_000),
    "one outlier": lambda random: np.append(random.normal(size=50_000), 1e6),
    "tiny": lambda random: random.normal(size=50_000) * 1e-30,
    "few": lambda random: random.normal(size=7),
    "one": lambda random: np.array([-3.7]),
}


def values(name: str) -> Array:
    return DATA[name](np.random.default_rng(0)).astype(np.float32)


def of(*arrays: Array) -> Magnitudes:
    found = Magnitudes()
    for array in arrays:
        found.add(array)
    return found


@pytest.mark.parametrize("name", DATA)
def test_the_bins_are_those_that_numpy_fills(name: str) -> None:
    array = values(name)
    low, high, counts = of(array).bins()
    size = np.sort(np.abs(array[array != 0]).astype(np.float64))
    assert counts.tolist() == [
        np.count_nonzero((size >= a) & ((size < b) | (b == size[-1])))
        for a, b in zip(low[:-1], high[:-1], strict=True)
    ] + [np.count_nonzero(size >= low[-1])]
    assert ((high - low) <= low / RESOLUTION).all()
    assert high[-1] == size[-1]


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("percent", [50.5, 90, 99, 99.99, 99.9999, 100])
def test_a_percentile_is_numpys_within_a_bin(name: str, percent: float) -> None:
    array = values(name)
    expected = np.percentile(np.abs(array.astype(np.float64)), percent)
    assert of(array).percentile(percent) == pytest.approx(expected, rel=1 / RESOLUTION)


def test_the_largest_is_exact_and_zeros_are_counted_apart() -> None:
    found = of(np.array([[0.0, -0.1], [0.0, 0.05]], np.float32))
    assert found.largest == np.float32(0.1)
    assert (found.size, found.zeros) == (4, 2)


@given(
    nps.arrays(
        np.float32,
        st.integers(1, 60),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    st.integers(0, 60),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_neither_order_nor_pieces_matter(array: Array, cut: int, random: Any) -> None:
    shuffled = array.tolist()
    random.shuffle(shuffled)
    other = np.array(shuffled, np.float32)
    one, two = of(array), of(other[:cut], other[cut:])
    assert (one.size, one.zeros, one.largest) == (two.size, two.zeros, two.largest)
    for mine, yours in zip(one.bins(), two.bins(), strict=True):
        assert (mine == yours).all()


def test_large_arrays_are_counted_in_pieces_to_the_last_value() -> None:
    array = np.random.default_rng(1).normal(size=(1 << 18) + 17).astype(np.float32)
    array[-1] = 100
    found = of(array)
    assert found.size == array.size == found.bins()[2].sum()
    assert found.largest == 100


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int8])
def test_other_types_count_as_float32(dtype: type[Any]) -> None:
    array = np.array([0, 1, -2, 5]).astype(dtype)
    assert of(array).largest == 5
    assert of(array.reshape(2, 2).T).bins()[2].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("value", "word"), [(np.nan, "NaN"), (np.inf, "an infinity"), (-np.inf, "an infinity")]
)
def test_what_is_not_finite_is_refused(value: float, word: str) -> None:
    with pytest.raises(NotFinite, match=word):
        of(np.array([1, value, 2], np.float32))


def test_a_double_that_no_float32_holds_is_an_infinity() -> None:
    with pytest.raises(NotFinite, match="an infinity"):
        of(np.array([1e300]))


def test_memory_does_not_grow_with_the_data() -> None:
    random = np.random.default_rng(0)
    pieces = [random.normal(size=1 << 19).astype(np.float32) for _ in range(2)]
    found = Magnitudes()
    found.add(pieces[0])
    tracemalloc.start()
    try:
        for index in range(20):
            found.add(pieces[index % 2] * np.float32(1.5**index))
        after, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after < 1 << 20
    assert most < 16 << 20
