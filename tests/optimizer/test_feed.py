from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optc.optimizer.feed import checked_feed
from optc.specs.compile_spec import Range
from optc.specs.diagnostic import InputError
from optc.specs.manifest import Manifest, ModelRecord, SpecRecord, Tensor

IMAGE = Tensor(name="image", dtype="float32", shape=("batch", 3, "size"))
MASK = Tensor(name="mask", dtype="bool", shape=("batch",))
ONE = {"batch": Range(min=1, opt=2, max=4), "size": Range(min=8, opt=8, max=8)}
TWO = {"batch": Range(min=16, opt=16, max=16), "size": Range(min=32, opt=32, max=64)}


def manifest(*inputs: Tensor, profiles: tuple[dict[str, Range], ...] = ()) -> Manifest:
    return Manifest(
        optc_version="0.1.0",
        spec=SpecRecord(sha256="0"),
        model=ModelRecord(path="m.onnx", sha256="0", bytes=0),
        inputs=inputs,
        outputs=(),
        profiles=profiles,
        stages=(),
        targets=(),
    )


def problems(found: Manifest, **given: Any) -> dict[str, str]:
    with pytest.raises(InputError) as caught:
        checked_feed(found, given)
    return {d.code: f"{d.problem} // {d.todo}" for d in caught.value.diagnostics}


def image(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)


def test_inputs_come_back_in_the_models_order_and_uncopied() -> None:
    pixels, mask = image(2, 3, 8), np.ones(2, bool)
    feed = checked_feed(manifest(IMAGE, MASK, profiles=(ONE,)), {"mask": mask, "image": pixels})
    assert list(feed) == ["image", "mask"]
    assert feed["image"] is pixels


def test_all_problems_come_at_once() -> None:
    extra = Tensor(name="extra", dtype="int64", shape=())
    found = problems(
        manifest(IMAGE, MASK, extra), image=np.zeros((1, 3)), imsk=np.ones(2), mask=image(2)
    )
    assert set(found) == {"missing-input", "unknown-input", "wrong-dtype", "wrong-rank"}


def test_a_missing_input_says_what_it_has_to_be() -> None:
    found = problems(manifest(IMAGE))
    assert found == {
        "missing-input": "the input `image` is missing // give an array of float32 of shape "
        "[batch, 3, size] called `image`"
    }


def test_an_unknown_input_is_told_the_name_it_is_near_to() -> None:
    found = problems(manifest(MASK), mask=np.ones(1, bool), msk=np.ones(1, bool))
    assert found == {"unknown-input": "there is no input called `msk` // call it `mask`"}


@pytest.mark.parametrize(
    ("dtype", "value", "said"),
    [
        ("float32", np.zeros(2), "is float64, the package takes float32"),
        ("float16", np.zeros(2, np.float32), "is float32, the package takes float16"),
        ("int64", [True, False], "is bool, the package takes int64"),
        ("string", np.array([1, 2]), "is int64, the package takes string"),
        ("string", np.array([b"a", b"b"]), "is |S1, the package takes string"),
        ("string", np.array(["a", 1], object), "is object, the package takes string"),
        ("float32", np.array(["a", "b"]), "is object, the package takes float32"),
        ("bfloat16", np.zeros(2, np.float16), "is float16, the package takes bfloat16"),
        ("bfloat16", np.zeros(2, np.uint16), "is uint16, the package takes bfloat16"),
        ("int4", np.zeros(2, np.int8), "is int8, the package takes int4"),
        ("float32", np.zeros(2, "V4"), "is |V4, the package takes float32"),
    ],
)
def test_nothing_is_cast_silently(dtype: str, value: Any, said: str) -> None:
    found = problems(manifest(Tensor(name="x", dtype=dtype, shape=("n",))), x=value)
    assert list(found) == ["wrong-dtype"]
    assert f"`x` {said}" in found["wrong-dtype"]


@pytest.mark.parametrize(
    ("dtype", "value", "kept"),
    [
        ("string", np.array(["a", "bü"]), np.dtype(object)),
        ("string", np.array(["a", "b"], object), np.dtype(object)),
        ("float32", np.zeros(2, ">f4"), np.dtype(np.float32)),
        ("bfloat16", np.zeros(2, ml_dtypes.bfloat16), np.dtype(ml_dtypes.bfloat16)),
        ("bfloat16", np.zeros(2, "V2"), np.dtype(ml_dtypes.bfloat16)),
        ("float8_e4m3fn", np.zeros(2, "V1"), np.dtype(ml_dtypes.float8_e4m3fn)),
    ],
)
def test_other_notations_of_the_same_are_taken(dtype: str, value: Any, kept: np.dtype[Any]) -> None:
    feed = checked_feed(manifest(Tensor(name="x", dtype=dtype, shape=("n",))), {"x": value})
    assert feed["x"].dtype == kept


def test_a_fixed_axis_is_fixed() -> None:
    found = problems(manifest(IMAGE), image=image(1, 4, 8))
    assert found["wrong-extent"].startswith("axis 1 of `image` is 4, the package takes 3")


def test_axes_that_share_a_symbol_agree() -> None:
    found = problems(manifest(IMAGE, MASK), image=image(2, 3, 8), mask=np.ones(3, bool))
    assert found["symbol-conflict"].startswith(
        "`batch` is 2 at axis 0 of `image` and 3 at axis 0 of `mask`"
    )


def test_an_extent_outside_every_profile_is_told_their_ranges() -> None:
    found = problems(manifest(IMAGE, profiles=(ONE, TWO)), image=image(5, 3, 8))
    assert found["outside-profiles"].startswith(
        "`batch` is 5 (axis 0 of `image`), which no profile holds: 1 to 4 or 16"
    )


def test_extents_must_be_held_by_one_profile_together() -> None:
    found = problems(manifest(IMAGE, profiles=(ONE, TWO)), image=image(16, 3, 8))
    assert found["outside-profiles"].startswith(
        "no profile holds `batch` = 16, `size` = 8 together; the profiles: `batch` 1 to 4, "
        "`size` 8; `batch` 16, `size` 32 to 64"
    )
    assert checked_feed(manifest(IMAGE, profiles=(ONE, TWO)), {"image": image(16, 3, 40)})


def test_scalars_empty_arrays_and_unknown_ranks_are_taken() -> None:
    scalar = Tensor(name="s", dtype="int64", shape=())
    anything = Tensor(name="a", dtype="float32", shape=None)
    empty = Tensor(name="e", dtype="float32", shape=("n", 4))
    some = manifest(scalar, anything, empty, profiles=({"n": Range(min=0, opt=1, max=2)},))
    feed = checked_feed(
        some, {"s": np.array(3), "a": image(1, 2, 3), "e": np.zeros((0, 4), np.float32)}
    )
    assert feed["s"].shape == ()
    assert "wrong-rank" in problems(manifest(scalar), s=np.array([3]))


def test_a_value_that_is_no_tensor_is_passed_on() -> None:
    sequence = Tensor(name="q", dtype="sequence(float32)", shape=None)
    assert checked_feed(manifest(sequence), {"q": [1, 2]}) == {"q": [1, 2]}


def test_what_is_no_package_yet_is_called_what_it_is() -> None:
    with pytest.raises(InputError, match="is float64, the model takes float32"):
        checked_feed(manifest(IMAGE), {"image": np.zeros((1, 3, 8))}, taker="model")
