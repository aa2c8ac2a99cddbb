from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto

from optc.optimizer.made_up import WORDS, Bound, available_bytes, bytes_needed, made_up, sizes
from optc.specs.compile_spec import Range
from optc.specs.model_problem import ResolvedInput

PROFILE = {"N": Range(min=1, opt=3, max=1000), "L": Range(min=0, opt=2, max=2)}


def one(dtype: int, *, shape: tuple[str | int, ...] = ("N", 4), **options: object) -> np.ndarray:
    return made_up({"x": ResolvedInput(dtype, shape, **options)}, PROFILE, "max")["x"]  # type: ignore[arg-type]


@pytest.mark.parametrize("at", ["min", "opt", "max"])
def test_shapes_follow_the_profile(at: str) -> None:
    extent = getattr(PROFILE["N"], at)
    given = {"x": ResolvedInput(TensorProto.FLOAT, ("N", 3, "N"))}
    if at != "max":
        assert made_up(given, PROFILE, at)["x"].shape == (extent, 3, extent)  # type: ignore[arg-type]
    assert sizes(("N", 3), PROFILE, at) == (extent, 3)  # type: ignore[arg-type]


def test_empty_axes_and_scalars_are_made() -> None:
    given = {
        "empty": ResolvedInput(TensorProto.FLOAT, ("L", 4)),
        "scalar": ResolvedInput(TensorProto.INT64, ()),
        "word": ResolvedInput(TensorProto.STRING, ()),
    }
    made = made_up(given, PROFILE, "min")
    assert made["empty"].shape == (0, 4)
    assert made["scalar"].shape == ()
    assert made["scalar"].dtype == np.int64
    assert made["word"].shape == ()
    assert isinstance(made["word"].item(), str)


@pytest.mark.parametrize(
    "dtype",
    [
        TensorProto.FLOAT,
        TensorProto.DOUBLE,
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.FLOAT8E4M3FN,
    ],
)
def test_floats_are_uniform_from_0_to_below_1(dtype: int) -> None:
    made = one(dtype).astype(np.float64)
    assert made.min() >= 0
    assert made.max() < 1
    assert 0.4 < made.mean() < 0.6


def test_bfloat16_stays_bfloat16() -> None:
    assert one(TensorProto.BFLOAT16).dtype == np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", [TensorProto.INT64, TensorProto.INT32, TensorProto.UINT8])
def test_integers_are_0_or_1(dtype: int) -> None:
    assert set(one(dtype).reshape(-1).tolist()) == {0, 1}


def test_bools_and_strings_vary() -> None:
    assert set(one(TensorProto.BOOL).reshape(-1).tolist()) == {False, True}
    assert set(one(TensorProto.STRING).reshape(-1).tolist()) == set(WORDS)


def test_a_range_is_kept_to_and_for_integers_both_ends_occur() -> None:
    floats = one(TensorProto.FLOAT, range=(-2.0, 5.0))
    assert -2 <= floats.min() < -1.9
    assert 4.9 < floats.max() < 5
    integers = one(TensorProto.INT64, range=(7, 9))
    assert set(integers.reshape(-1).tolist()) == {7, 8, 9}


def test_a_range_of_one_value_gives_it() -> None:
    assert set(one(TensorProto.FLOAT, range=(16000.0, 16000.0)).reshape(-1)) == {16000.0}
    assert set(one(TensorProto.INT32, range=(5, 5)).reshape(-1)) == {5}


def test_values_depend_on_name_seed_and_shape_alone() -> None:
    x = ResolvedInput(TensorProto.FLOAT, ("N", 4))
    alone = made_up({"x": x}, PROFILE, "opt")["x"]
    beside = made_up({"w": x, "x": x}, PROFILE, "opt")
    np.testing.assert_array_equal(alone, beside["x"])
    assert (beside["w"] != beside["x"]).any()
    assert (made_up({"x": x}, PROFILE, "opt", seed=1)["x"] != alone).any()


def test_values_are_the_same_in_another_process() -> None:
    code = (
        "from optc.optimizer.made_up import made_up;"
        "from optc.specs.model_problem import ResolvedInput as R;"
        "print(made_up({'x': R(1, (3,))}, {}, 'opt')['x'].tolist())"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        for _ in range(2)
    }
    here = made_up({"x": ResolvedInput(1, (3,))}, {}, "opt")["x"].tolist()
    assert runs == {f"{here}\n".encode()}


def test_bytes_are_known_before_they_are_taken() -> None:
    given = {
        "x": ResolvedInput(TensorProto.FLOAT, ("N", 4)),
        "h": ResolvedInput(TensorProto.FLOAT16, ("N",)),
    }
    assert bytes_needed(given, PROFILE, "max") == 1000 * 4 * 4 + 1000 * 2
    huge = {"N": Range(min=1, opt=1, max=2**31 - 1)}
    given = {"x": ResolvedInput(TensorProto.FLOAT, ("N", "N", "N"))}
    assert bytes_needed(given, huge, "max") == 4 * (2**31 - 1) ** 3


@pytest.mark.parametrize(
    ("available", "most", "words"),
    [
        (None, 1 << 30, "1.0 GiB"),
        (512 << 30, 1 << 30, "1.0 GiB"),
        (32 << 30, 512 << 20, "512 MiB, a 64th of the 32.0 GiB of memory available"),
    ],
)
def test_the_bound_is_a_part_of_the_memory_there_is(
    available: int | None, most: int, words: str
) -> None:
    assert (Bound(available).bytes, str(Bound(available))) == (most, words)


def test_memory_is_known_where_the_system_says_it() -> None:
    available = available_bytes()
    assert (available is not None) == Path("/proc/meminfo").exists()
    assert available is None or 0 < available < os.sysconf("SC_PHYS_PAGES") * os.sysconf(
        "SC_PAGE_SIZE"
    )
