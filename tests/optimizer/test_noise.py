from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from model_package import model_of
from onnx import numpy_helper

from optc.optimizer import noise as module
from optc.optimizer.compare import Tolerance
from optc.optimizer.noise import FACTOR, Floor, Noise, floors_covering, moved, paired_rows
from optc.optimizer.reference import Model

CLOSE = Tolerance(1e-4, 1e-4)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- moving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_each_value_moves_by_one_unit_in_the_last_place(dtype: Any) -> None:
    values = (rng().standard_normal(1000) * 3).astype(dtype)
    values = values[np.abs(values.astype(np.float64) * 16) % 1 != 0]
    other = moved(values, rng(1), 1)
    bits = f"i{values.dtype.itemsize}"
    assert set(np.unique(other.view(bits) - values.view(bits))) == {-1, 1}
    assert other.dtype == values.dtype


def test_several_units_move_it_further() -> None:
    values = np.full(9, 0.7, np.float32)
    other = moved(values, rng(), 4)
    np.testing.assert_allclose(np.abs(other - values), 4 * np.spacing(np.float32(0.7)))


def test_what_stands_for_something_exact_is_left() -> None:
    exact = np.array([0, 1, -2, 0.5, 640, 0.0625, np.nan, np.inf, 1e20], np.float32)
    np.testing.assert_array_equal(moved(exact, rng(), 1), exact)
    codes = np.array([0.3, 0.7], ml_dtypes.float8_e4m3fn)
    assert moved(codes, rng(), 1) is codes
    whole = np.arange(4)
    assert moved(whole, rng(), 1) is whole


def test_the_largest_float_does_not_become_infinite() -> None:
    values = np.full(64, np.finfo(np.float16).max, np.float16)
    assert np.isfinite(moved(values, rng(), 1)).all()


def test_scalars_and_empty_arrays_keep_their_shape() -> None:
    assert moved(np.array(0.3, np.float32), rng(), 1).shape == ()
    assert moved(np.zeros((0, 3), np.float32), rng(), 1).shape == (0, 3)


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 8)
    values = rng().random((5, 7)).astype(np.float32)
    other = moved(values, rng(1), 1)
    assert other.shape == values.shape
    assert (np.abs(other - values) == np.spacing(np.minimum(other, values))).all()


# --- rows ----------------------------------------------------------------------------------------

ROWS = np.arange(20, dtype=np.float32).reshape(5, 4)


def test_swapped_rows_are_found() -> None:
    rows = paired_rows(ROWS, ROWS[[0, 2, 1, 3, 4]], CLOSE)
    assert rows is not None
    assert (rows.axis, rows.moved, rows.unpaired) == (0, ((1, 2), (2, 1)), 0)
    assert str(rows) == "2 rows in another place (1 to 2, 2 to 1)"


def test_rows_that_came_or_went_are_named() -> None:
    gone = paired_rows(ROWS, ROWS[[0, 1, 3, 4]], CLOSE)
    assert gone is not None
    assert (gone.lost, gone.new) == ((2,), ())
    assert "1 row only in the original (2)" in str(gone)
    come = paired_rows(ROWS, np.concatenate([ROWS, ROWS[:1] + 100]), CLOSE)
    assert come is not None
    assert (come.lost, come.new, come.unpaired) == ((), (5,), 1)


def test_rows_may_lie_along_a_later_axis_and_are_paired_within_their_batch() -> None:
    batch = np.stack([ROWS, ROWS + 100])
    other = batch.copy()
    other[0, [1, 2]] = batch[0, [2, 1]]
    rows = paired_rows(batch, other, CLOSE)
    assert rows is not None
    assert (rows.axis, len(rows.moved), rows.unpaired) == (1, 2, 0)


def test_each_row_is_paired_once() -> None:
    twice = np.array([[1.0], [1.0], [2.0]])
    rows = paired_rows(twice, np.array([[2.0], [1.0], [3.0]]), CLOSE)
    assert rows is not None
    assert (rows.moved, rows.lost, rows.new) == (((2, 0),), (0,), (2,))


def test_rows_without_sense_are_not_paired() -> None:
    assert paired_rows(ROWS, ROWS[:, :3][:4], CLOSE) is None
    assert paired_rows(ROWS, ROWS[0], CLOSE) is None
    assert paired_rows(np.array(1.0), np.array(2.0), CLOSE) is None


def test_a_feature_map_is_not_taken_for_rows() -> None:
    big = rng().random((1, 4000, 8))
    assert paired_rows(big, big + 1, CLOSE) is None


# --- the floor -----------------------------------------------------------------------------------


def test_a_difference_up_to_the_factor_is_covered() -> None:
    expected = rng().random(1000)
    floor = Floor(expected, Tolerance(0, 0))
    floor.add(expected + 1e-3, 1)
    assert floor.covers(expected + 1e-3 * FACTOR * 0.99)
    assert not floor.covers(expected + 1e-3 * FACTOR * 1.01)


def test_a_sample_moved_further_counts_for_less() -> None:
    expected = rng().random(1000)
    floor = Floor(expected, Tolerance(0, 0))
    floor.add(expected + 4e-3, 4)
    assert floor.max_abs == pytest.approx(1e-3)


def test_the_noise_of_large_values_does_not_excuse_small_ones() -> None:
    """Boxes of hundreds of pixels and scores below one in the same output."""
    expected = np.concatenate([rng().random(640) * 600 + 40, rng().random(640)])
    noise = np.concatenate([np.full(640, 1e-2), np.full(640, 1e-6)])
    floor = Floor(expected, Tolerance(1e-6, 1e-6))
    floor.add(expected + noise, 1)
    assert floor.covers(expected + noise)
    wrong = expected.copy()
    wrong[-1] += 1e-2
    assert not floor.covers(wrong)


def test_a_large_noise_in_one_place_does_not_excuse_a_difference_everywhere() -> None:
    expected = rng().random(64)
    flipped = expected.copy()
    flipped[3] += 0.1
    floor = Floor(expected, Tolerance(1e-6, 1e-6))
    floor.add(flipped, 1)
    assert floor.covers(flipped)
    assert not floor.covers(expected + 0.05)


def test_an_integer_may_change_where_the_originals_do() -> None:
    expected = np.arange(100)
    other, worse = expected.copy(), expected.copy()
    other[3] = 7
    worse[:20] = 0
    floor = Floor(expected, CLOSE)
    assert not floor.covers(other)
    floor.add(other[::1], 1)
    assert floor.unequal == 1
    assert floor.covers(other)
    assert not floor.covers(worse)


def test_nan_is_noise_only_where_the_original_makes_it_too() -> None:
    expected = rng().random(50)
    other = expected.copy()
    other[7] = np.nan
    floor = Floor(expected, CLOSE)
    floor.add(expected, 1)
    assert not floor.covers(other)
    floor.add(other, 1)
    assert floor.covers(other)


def test_swapped_rows_make_no_floor_of_their_own_size() -> None:
    """The original swaps rows 1 and 2, which excuses that, and not a box that is wrong."""
    expected = ROWS * 10
    floor = Floor(expected, CLOSE)
    floor.add(expected[[0, 2, 1, 3, 4]], 1)
    assert floor.rows_move
    assert floor.max_abs == 0
    assert floor.covers(expected[[0, 1, 2, 4, 3]])
    wrong = expected.copy()
    wrong[4, 0] += 5
    assert not floor.covers(wrong)


def test_as_many_rows_may_come_and_go_as_in_the_original() -> None:
    expected = np.arange(400, dtype=np.float32).reshape(100, 4)
    floor = Floor(expected, CLOSE)
    floor.add(expected[1:], 1)
    assert floor.covers(expected[:-FACTOR])
    assert not floor.covers(expected[: -FACTOR - 1])


def test_another_dtype_is_never_noise() -> None:
    floor = Floor(ROWS, CLOSE)
    floor.add(ROWS, 1)
    assert not floor.covers(ROWS.astype(np.float64))


def test_an_empty_array_has_a_floor() -> None:
    floor = Floor(np.zeros((0, 4), np.float32), CLOSE)
    floor.add(np.zeros((0, 4), np.float32), 1)
    assert floor.covers(np.zeros((0, 4), np.float32))
    assert not floor.covers(np.zeros((1, 4), np.float32))


# --- of a model ----------------------------------------------------------------------------------

NET = """g (float[N,32] x) => (float[N,32] y)
<float half = {0.3}> { h = MatMul (x, w) s = Mul (h, half) y = Tanh (s) }"""


def saved(path: Path) -> Model:
    """Save `NET` with weights in an external file."""
    model = model_of(NET.replace("float[N,32] x)", "float[N,32] x, float[32,32] w)"))
    del model.graph.input[1]
    weight = rng().standard_normal((32, 32)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    name = f"{path.stem}.bin"
    onnx.save(model, path, save_as_external_data=True, location=name, size_threshold=1000)
    return Model(path)


def test_a_model_is_sampled_with_its_external_weights_moved(tmp_path: Path) -> None:
    model = saved(tmp_path / "m.onnx")
    feeds = {"x": np.ones((2, 32), np.float32)}  # whole numbers are not moved: it is the weights
    plain = model.runner.run(feeds)["y"]
    samples = list(Noise(model).samples(feeds))
    assert [ulps for ulps, _ in samples] == [1, 1, 1, 1, 4, 4, 4, 4, 4]
    moves = [float(np.abs(sample["y"] - plain).max()) for _, sample in samples[1:]]
    assert all(0 < move < 1e-5 for move in moves)
    assert len({sample["y"].tobytes() for _, sample in samples[1:]}) == 8


def test_samples_are_the_same_every_time(tmp_path: Path) -> None:
    model = saved(tmp_path / "m.onnx")
    feeds = {"x": rng().random((2, 32)).astype(np.float32)}
    first, again = (
        [sample["y"].tobytes() for _, sample in Noise(model).samples(feeds)] for _ in range(2)
    )
    assert first == again


def test_weights_are_moved_once_and_kept_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tmp_path / "m.onnx")
    feeds = {"x": rng().random((2, 32)).astype(np.float32)}
    kept = [s["y"].tobytes() for _, s in Noise(model, more=False).samples(feeds)]
    monkeypatch.setattr(module, "KEPT_BYTES", 100)
    noise = Noise(model, more=False)
    assert [s["y"].tobytes() for _, s in noise.samples(feeds)] == kept
    assert [s["y"].tobytes() for _, s in noise.samples(feeds)] == kept


def test_sampling_stops_when_all_is_covered(tmp_path: Path) -> None:
    model = saved(tmp_path / "m.onnx")
    feeds = {"x": rng().random((4, 32)).astype(np.float32)}
    expected = model.runner.run(feeds)
    (_, sample), *_ = list(Noise(model).samples(feeds))[1:]
    floors, covered = floors_covering(
        Noise(model), feeds, expected, {"y": sample["y"]}, Tolerance(0, 0)
    )
    assert covered == {"y"}
    assert floors["y"].samples < 9
    _, covered = floors_covering(
        Noise(model), feeds, expected, {"y": expected["y"] + np.float32(1e-3)}, Tolerance(0, 0)
    )
    assert covered == set()


def test_constants_that_share_a_name_are_each_moved(tmp_path: Path) -> None:
    """Exporters call the tensor of every Constant node `value`."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,2] x) => (float[N,3] y) {'
        "a = Constant <value = float[2,3] value {0.1,0.2,0.3,0.4,0.6,0.7}> ()"
        "b = Constant <value = float[3] value {0.1,0.2,0.3}> ()"
        "c = Constant <value = float value {0.3}> ()"
        "h = MatMul (x, a) s = Add (h, b) y = Mul (s, c) }"
    )
    onnx.save(model, tmp_path / "m.onnx")
    feeds = {"x": np.ones((1, 2), np.float32)}
    samples = list(Noise(Model(tmp_path / "m.onnx"), more=False).samples(feeds))
    assert len(samples) == 4
    assert all(sample["y"].shape == (1, 3) for _, sample in samples)
