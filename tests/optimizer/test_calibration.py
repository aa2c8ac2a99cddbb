from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

from optc.optimizer.calibration import LEVELS, Method, calibrate, range_of
from optc.optimizer.magnitude import Magnitudes
from optc.optimizer.samples import Sample
from optc.passes.quantisation import EightBits, rounded, scale_of
from optc.specs.diagnostic import InputError

Array = npt.NDArray[Any]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "entropy", "mse")

DATA: dict[str, Callable[[np.random.Generator], Array]] = {
    "normal": lambda random: random.normal(size=20_000),
    "after a ReLU": lambda random: np.maximum(random.normal(size=20_000), 0),
    "after a SiLU": lambda random: _silu(3 * random.normal(size=20_000)),
    "long tail": lambda random: random.standard_t(3, size=20_000),
    "uniform": lambda random: random.uniform(-1, 1, size=20_000),
    "outliers": lambda random: np.append(random.normal(size=20_000), 50 * random.normal(size=20)),
    "few": lambda random: random.normal(size=50),
}


def _silu(array: Array) -> Array:
    return array / (1 + np.exp(-array))


def values(name: str) -> Array:
    return DATA[name](np.random.default_rng(0)).astype(np.float32)


def amax_of(array: Array, method: Method, precision: EightBits = "int8") -> float:
    magnitudes = Magnitudes()
    magnitudes.add(array)
    return range_of(magnitudes, method, 99.9, precision=precision)


def error_of(array: Array, amax: float, precision: EightBits) -> float:
    clipped = np.clip(array, -np.float32(amax), np.float32(amax))  # int8 has a -128, ranges do not
    found = rounded(clipped, scale_of(amax, precision), precision)
    return float(np.square(found.astype(np.float64) - array).mean())


def samples(*feeds: Mapping[str, Array]) -> list[Sample]:
    return [
        Sample(f"{number}.npz", str(number), lambda feed=feed: dict(feed))  # type: ignore[misc]
        for number, feed in enumerate(feeds)
    ]


def shows_its_inputs(
    feeds: Mapping[str, Array], wanted: Collection[str], see: Callable[[str, Array], None]
) -> None:
    for name in wanted:
        if name in feeds:
            see(name, feeds[name])


# --- what the methods find, against the data as a whole ------------------------------------------


@pytest.mark.parametrize("name", DATA)
def test_minmax_is_the_largest_magnitude(name: str) -> None:
    array = values(name)
    assert np.float32(amax_of(array, "minmax")) == np.abs(array).max()


@pytest.mark.parametrize("name", DATA)
def test_percentile_is_numpys(name: str) -> None:
    array = values(name)
    expected = np.percentile(np.abs(array), 99.9)
    assert amax_of(array, "percentile") == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("name", DATA)
def test_mse_is_as_good_as_the_best_of_many_ranges(name: str, precision: EightBits) -> None:
    array = values(name)
    largest = float(np.abs(array).max())
    tried = [error_of(array, largest * 2 ** (-step / 20), precision) for step in range(160)]
    found = amax_of(array, "mse", precision)
    assert found <= largest * (1 + 1e-6)
    assert error_of(array, found, precision) <= min(tried) * (1.05 if name == "few" else 1.01)


def brute_force_entropy(array: Array, precision: EightBits) -> float:
    """Return the threshold as the method is told: one after the other, distributions written out."""
    largest = float(np.abs(array).max())
    width = 2.0 ** np.floor(np.log2(largest)) / 1024
    bins = int(largest / width) + 1
    best, least = largest, np.inf
    sides = [
        np.histogram(side[side > 0], bins=bins, range=(0, bins * width))[0]
        for side in (array.astype(np.float64), -array.astype(np.float64))
    ]
    for threshold in range(bins, 127, -1):
        middles = ((np.arange(threshold) + 0.5) / threshold).astype(np.float32)
        signed = np.concatenate([middles, -middles])
        _, level = np.unique(
            rounded(signed, scale_of(1.0, precision), precision), return_inverse=True
        )
        inside = np.concatenate([side[:threshold] for side in sides]).astype(np.float64)
        reference = inside.copy()
        reference[threshold - 1] += sides[0][threshold:].sum()
        reference[-1] += sides[1][threshold:].sum()
        filled = reference > 0
        shares = np.bincount(level, inside) / np.maximum(np.bincount(level, filled), 1)
        quantised = np.where(filled, shares[level], 0)
        if (quantised[filled] == 0).any():
            continue
        p = reference[filled] / reference.sum()
        q = quantised[filled] / quantised.sum()
        divergence = float((p * np.log(p / q)).sum())
        if divergence < least - 1e-12:
            best, least = (largest if threshold == bins else threshold * width), divergence
    return best


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["after a ReLU", "after a SiLU", "long tail", "outliers"])
def test_entropy_is_what_the_method_says(name: str, precision: EightBits) -> None:
    array = values(name)
    assert amax_of(array, "entropy", precision) == pytest.approx(
        brute_force_entropy(array, precision), rel=1e-6
    )


def test_entropy_clips_what_stands_alone_and_keeps_what_fills_the_range() -> None:
    assert amax_of(values("outliers"), "entropy") < 0.6 * np.abs(values("outliers")).max()
    assert amax_of(values("uniform"), "entropy") > 0.99


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_zeros_and_signs_change_nothing_of_a_range(method: Method, precision: EightBits) -> None:
    array = values("long tail")
    assert amax_of(-array, method, precision) == amax_of(array, method, precision)
    if method != "entropy":  # which looks at both sides of a distribution
        assert amax_of(np.abs(array), method, precision) == amax_of(array, method, precision)
    if method != "percentile":  # which counts zeros
        padded = np.append(array, np.zeros(1_000_000, np.float32))
        assert amax_of(padded, method, precision) == amax_of(array, method, precision)


def test_entropy_is_not_drawn_to_where_small_values_of_the_other_sign_end() -> None:
    random = np.random.default_rng(0)
    array = random.normal(size=200_000) * 2
    array = (array * np.clip(array + 3, 0, 6) / 6).astype(np.float32)  # not below -0.375
    assert amax_of(array, "entropy") > 2


@pytest.mark.parametrize("method", METHODS)
def test_ranges_scale_with_the_values(method: Method) -> None:
    array = values("long tail")
    assert amax_of(array * np.float32(2**20), method) == pytest.approx(
        amax_of(array, method) * 2**20, rel=1e-5
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_constant_tensor_has_its_value_and_one_of_zeros_has_zero(
    method: Method, precision: EightBits
) -> None:
    assert amax_of(np.full(100, -0.3, np.float32), method, precision) == pytest.approx(
        0.3, rel=1e-3
    )
    assert amax_of(np.zeros(100, np.float32), method, precision) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-45, 1e-42, 1e-39, 2e-38, 3e38])
def test_ranges_at_the_ends_of_float32(method: Method, size: float) -> None:
    array = (np.random.default_rng(0).uniform(-1, 1, 999) * size).astype(np.float32)
    largest = np.abs(array).max()
    assert largest * np.float32(0.9) <= np.float32(amax_of(array, method)) <= largest


def test_where_the_percentile_is_zero_the_largest_counts() -> None:
    array = np.zeros(100_000, np.float32)
    array[7] = 5
    assert amax_of(array, "percentile") == 5


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_levels_are_those_that_the_graph_is_quantised_to(precision: EightBits) -> None:
    levels = (LEVELS[precision] * 3).astype(np.float32)
    between = np.linspace(0, 3, 100_000, dtype=np.float32)
    scale = scale_of(3.0, precision)
    assert rounded(levels, scale, precision) == pytest.approx(levels, rel=1e-6)
    assert np.unique(rounded(np.append(levels, between), scale, precision)).size == levels.size


# --- over samples --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_samples_are_as_one_whole_in_any_order(method: Method, precision: EightBits) -> None:
    random = np.random.default_rng(5)
    parts = [{"x": (k * random.normal(size=(3, 999))).astype(np.float32)} for k in (1, 30, 0.01)]
    whole = amax_of(np.concatenate([part["x"] for part in parts]), method, precision)

    def found(feeds: Sequence[Mapping[str, Array]]) -> dict[str, float]:
        return calibrate(
            shows_its_inputs, samples(*feeds), ["x"], method, 99.9, precision=precision
        )

    assert found(parts) == found(parts[::-1]) == {"x": whole}


def test_each_sample_is_loaded_and_run_once_and_not_before_its_turn() -> None:
    events: list[str] = []

    def load(name: str) -> dict[str, Array]:
        events.append(f"load {name}")
        return {"x": np.ones(1, np.float32)}

    def run(feeds: Any, wanted: Collection[str], see: Callable[[str, Array], None]) -> None:
        events.append("run")
        shows_its_inputs(feeds, wanted, see)

    parts = [Sample(name, name, lambda name=name: load(name)) for name in "ab"]  # type: ignore[misc]
    calibrate(run, parts, ["x"])
    assert events == ["load a", "run", "load b", "run"]


def test_what_was_empty_throughout_has_no_range() -> None:
    empty, full = np.zeros((0, 4), np.float32), np.ones((1, 4), np.float32)
    feeds = ({"x": empty, "y": empty}, {"x": full, "y": empty})
    assert calibrate(shows_its_inputs, samples(*feeds), ["y", "x"]) == {"x": 1.0}


def test_a_range_is_written_with_the_digits_of_a_float32() -> None:
    found = calibrate(
        shows_its_inputs, samples({"x": np.array([0.1], np.float32)}), ["x"], "minmax"
    )
    assert found == {"x": 0.1}


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "an infinity")])
@pytest.mark.parametrize("method", ["minmax", "entropy"])
def test_nan_and_infinity_name_the_tensor_and_the_sample(
    value: float, word: str, method: Method
) -> None:
    feeds = ({"x": np.ones(2, np.float32)}, {"x": np.array([1, value], np.float32)})
    with pytest.raises(InputError) as caught:
        calibrate(shows_its_inputs, samples(*feeds), ["x"], method)
    [problem] = caught.value.diagnostics
    assert problem.code == "not-finite"
    assert problem.problem.startswith(f"the tensor `x` holds {word} when the model runs on `1.npz`")


def test_tensors_inside_a_model() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 17]>
        g (float[n, 3] x) => (float[n, 2] y) <float[3, 2] w = {1, -2, 3, -4, 5, -6}> {
            a = MatMul (x, w)
            r = Relu (a)
            y = Neg (r)
        }"""
    )
    model = onnx.shape_inference.infer_shapes(model)
    inside = {info.name: info for info in model.graph.value_info}
    model.graph.output.extend(inside[name] for name in ("a", "r"))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(
        feeds: Mapping[str, Array], wanted: Collection[str], see: Callable[[str, Array], None]
    ) -> None:
        for name in wanted:
            see(name, session.run([name], dict(feeds))[0])

    random = np.random.default_rng(0)
    feeds = [{"x": random.normal(size=(50, 3)).astype(np.float32)} for _ in range(3)]
    product = np.concatenate([feed["x"] for feed in feeds]) @ np.array([[1, -2], [3, -4], [5, -6]])
    found = calibrate(run, samples(*feeds), ["r", "a"], "minmax")
    assert list(found) == ["a", "r"]
    assert found["a"] == pytest.approx(np.abs(product).max(), rel=1e-6)
    assert found["r"] == pytest.approx(product.max(), rel=1e-6)
