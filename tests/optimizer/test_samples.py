from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from optc.optimizer.arrays import write_arrays
from optc.optimizer.samples import Sample, check_no_leak, samples_of
from optc.specs.compile_spec import Images, Range
from optc.specs.diagnostic import InputError
from optc.specs.manifest import Tensor

Array = npt.NDArray[Any]


@dataclass
class Takes:
    inputs: Sequence[Tensor]
    profiles: Sequence[Mapping[str, Range]] = ()


X = Takes(
    [Tensor(name="x", dtype="float32", shape=("b", 3, 8, 8))], [{"b": Range(min=1, opt=2, max=4)}]
)


def picture(seed: int, batch: int = 1) -> Array:
    return np.random.default_rng(seed).random((batch, 3, 8, 8)).astype(np.float32)


def codes_and_words(*args: Any, **options: Any) -> list[tuple[str, str]]:
    with pytest.raises(InputError) as caught:
        samples_of(*args, **options)
    return [(each.code, each.problem) for each in caught.value.diagnostics]


# --- reading -------------------------------------------------------------------------------------


def test_samples_come_in_the_order_of_the_patterns_each_file_once(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_arrays(tmp_path / f"{name}.npz", {"x": picture(ord(name))})
    found = samples_of(tmp_path, ["c.npz", "*.npz"], X)
    assert [sample.name for sample in found] == ["c.npz", "a.npz", "b.npz"]
    assert (found[1].load()["x"] == picture(ord("a"))).all()


def test_a_batch_is_one_sample(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.npz", {"x": picture(0, 4)})
    [sample] = samples_of(tmp_path, ["a.npz"], X)
    assert sample.load()["x"].shape == (4, 3, 8, 8)


def test_nothing_of_a_file_is_kept(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.npz", {"x": picture(0)})
    [sample] = samples_of(tmp_path, ["a.npz"], X)
    write_arrays(tmp_path / "a.npz", {"x": picture(1)})
    assert (sample.load()["x"] == picture(1)).all()


def test_a_folder_stands_for_the_data_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "calib"
    (folder / "deeper").mkdir(parents=True)
    write_arrays(folder / "a.npz", {"x": picture(0)})
    (folder / "labels.txt").write_text("cat")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "b.PNG")
    found = samples_of(tmp_path, ["calib"], X, Images())
    assert [sample.name for sample in found] == ["calib/a.npz", "calib/b.PNG"]


def test_images_become_the_input(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    [sample] = samples_of(tmp_path, ["*.png"], X, Images())
    assert sample.load()["x"] == pytest.approx(pixels.transpose(2, 0, 1)[None] / 255)


def test_the_other_inputs_are_made_up_as_the_spec_says_and_fit_the_image(tmp_path: Path) -> None:
    for seed, name in ((0, "a"), (0, "same"), (1, "b")):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    signature = Takes(
        [
            Tensor(name="scale", dtype="float32", shape=("b", 2), range=(2.0, 2.0)),
            *X.inputs,
            Tensor(name="shift", dtype="int64", shape=("n",), range=(0, 1000)),
        ],
        [{"b": Range(min=2, opt=3, max=4), "n": Range.fixed(5)}],
    )
    found = samples_of(tmp_path, ["*.png"], signature, Images(input="x"))
    feeds = {sample.name: sample.load() for sample in found}
    assert list(feeds["a.png"]) == ["scale", "x", "shift"]
    assert feeds["a.png"]["scale"].tolist() == [[2, 2], [2, 2]]
    assert feeds["a.png"]["shift"].shape == (5,)
    assert (feeds["a.png"]["shift"] == feeds["same.png"]["shift"]).all()
    assert (feeds["a.png"]["shift"] != feeds["b.png"]["shift"]).any()


def test_all_problems_of_all_files_come_at_once(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.npz", {"x": picture(0)})
    write_arrays(tmp_path / "double.npz", {"x": picture(0).astype(np.float64)})
    write_arrays(tmp_path / "name.npz", {"images": picture(0)})
    write_arrays(tmp_path / "large.npz", {"x": picture(0, 9)})
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "c.jpg").write_bytes(b"")
    found = codes_and_words(tmp_path, ["*.npz", "no/*.npz", "*.jpg"], X, Images())
    assert sorted(code for code, _ in found) == [
        *("bad-image", "damaged-npz", "missing-input", "no-data", "outside-profiles"),
        *("unknown-input", "wrong-dtype"),
    ]
    for code, words in found:
        assert ("no/*.npz" in words) if code == "no-data" else (f"`{tmp_path}/" in words)
    assert (
        "wrong-dtype",
        f"`{tmp_path}/double.npz`: `x` is float64, the model takes float32",
    ) in found


def test_what_is_no_npz_needs_to_be_declared(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    said = "is no npz file, and nothing says how it becomes input"
    assert codes_and_words(tmp_path, ["a.jpg"], X) == [
        ("not-npz", f"`{tmp_path}/a.jpg` {said}"),
    ]
    assert codes_and_words(tmp_path, ["*"], X) == [
        ("not-npz", f"`{tmp_path}/a.jpg`, like 2 more files, {said}"),
    ]


def test_what_the_spec_says_of_images_is_faulted_once_at_its_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / f"{name}.png")
    asked: list[tuple[str, ...]] = []
    found = codes_and_words(
        tmp_path, ["*.png"], X, Images(color="gray"), place=lambda *keys: asked.append(keys)
    )
    assert [code for code, _ in found] == ["bad-images"]
    assert ("images", "layout") in asked


def test_of_very_many_problems_the_first_are_said_and_the_rest_counted(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02}.npz").write_bytes(b"")
    found = codes_and_words(tmp_path, ["*.npz"], X)
    assert len(found) == 21
    assert found[-1] == ("not-npz", "and 30 more like these")


# --- content -------------------------------------------------------------------------------------


def digest_of(folder: Path, feed: Mapping[str, Array], signature: Takes = X) -> str:
    write_arrays(folder / "digest.npz", feed)
    [sample] = samples_of(folder, ["digest.npz"], signature)
    return sample.digest


def test_the_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    two = Takes(
        [*X.inputs, Tensor(name="words", dtype="string", shape=(2,))],
    )
    x, words = picture(0), np.array(["a", "bc"])
    write_arrays(tmp_path / "a.npz", {"x": x, "words": words})
    np.savez_compressed(tmp_path / "b.npz", words=words, x=np.asfortranarray(x))
    np.savez(tmp_path / "c.npz", x=x.astype(">f4"), words=words.astype("U9"))
    found = samples_of(tmp_path, ["*.npz"], two)
    assert len({sample.digest for sample in found}) == 1
    other = np.nextafter(x, np.float32(1))
    assert digest_of(tmp_path, {"x": x}) != digest_of(tmp_path, {"x": other})
    assert digest_of(tmp_path, {"x": x, "words": np.array(["ab", "c"])}, two) != found[0].digest


# --- leaks ---------------------------------------------------------------------------------------


def read(folder: Path, signature: Takes, **feeds: Mapping[str, Array]) -> list[Sample]:
    for name, feed in feeds.items():
        write_arrays(folder / f"{name}.npz", feed)
    return samples_of(folder, [f"{name}.npz" for name in feeds], signature)


def leaks(calibration: Sequence[Sample], verification: Sequence[Sample]) -> list[str]:
    with pytest.raises(InputError) as caught:
        check_no_leak(calibration, verification)
    assert {each.code for each in caught.value.diagnostics} == {"calibration-leak"}
    return [each.problem for each in caught.value.diagnostics]


def test_other_data_are_no_leak(tmp_path: Path) -> None:
    one = read(tmp_path, X, a={"x": picture(0)}, b={"x": picture(1, 2)})
    check_no_leak(one, read(tmp_path, X, c={"x": picture(2)}, d={"x": picture(3, 2)}))
    check_no_leak(one, [])
    check_no_leak([], one)


def test_the_same_content_is_a_leak_whatever_the_file(tmp_path: Path) -> None:
    one = read(tmp_path, X, a={"x": picture(0)}, b={"x": picture(1)})
    np.savez_compressed(tmp_path / "c.npz", x=picture(1))
    two = samples_of(tmp_path, ["a.npz", "c.npz"], X)
    assert leaks(one, two) == [
        "`a.npz` is named both to calibrate and to verify",
        "`b.npz`, to calibrate, and `c.npz`, to verify, hold the same",
    ]


def test_an_image_is_found_in_another_format_and_as_an_array(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.bmp")
    [a] = samples_of(tmp_path, ["a.png"], X, Images())
    [b] = samples_of(tmp_path, ["b.bmp"], X, Images())
    assert len(leaks([a], [b])) == 1
    assert len(leaks([a], read(tmp_path, X, c=a.load()))) == 1


def test_an_entry_of_a_batch_is_found(tmp_path: Path) -> None:
    batch = picture(0, 4)
    one = read(tmp_path, X, batch={"x": batch}, other={"x": picture(9)})
    assert leaks(one, read(tmp_path, X, alone={"x": batch[2:3]})) == [
        "`batch.npz`, to calibrate, and `alone.npz`, to verify, share data of the input `x`"
    ]


TEXT = Takes(
    [
        Tensor(name="ids", dtype="int64", shape=(1, "n")),
        Tensor(name="mask", dtype="int64", shape=(1, "n")),
        Tensor(name="bias", dtype="float32", shape=(1, "n")),
        Tensor(name="sound", dtype="float32", shape=(1, 99)),
        Tensor(name="table", dtype="float32", shape=(2, 99)),
    ]
)


def text(seed: int, sound: int | None = None) -> dict[str, Array]:
    mask = np.ones((1, 100), np.int64)
    mask[:, 70:] = 0
    return {
        "ids": np.random.default_rng(seed).integers(0, 30_000, (1, 100)),
        "mask": mask,
        "bias": np.where(mask, 0, -1e4).astype(np.float32),
        "sound": np.random.default_rng(seed if sound is None else sound)
        .random((1, 99))
        .astype(np.float32),
        "table": np.arange(198, dtype=np.float32).reshape(2, 99),
    }


def test_masks_and_tables_that_all_samples_share_are_no_leak(tmp_path: Path) -> None:
    one = read(tmp_path, TEXT, a=text(0), b=text(1))
    check_no_leak(one, read(tmp_path, TEXT, c=text(2)))


def test_one_array_in_common_is_a_leak(tmp_path: Path) -> None:
    one = read(tmp_path, TEXT, a=text(0), b=text(1))
    two = read(tmp_path, TEXT, c=text(2, sound=1))
    assert leaks(one, two) == [
        "`b.npz`, to calibrate, and `c.npz`, to verify, share data of the input `sound`"
    ]


def test_very_many_leaks_are_counted(tmp_path: Path) -> None:
    feeds = {f"s{number:02}": {"x": picture(number)} for number in range(30)}
    both = read(tmp_path, X, **feeds)
    found = leaks(both, both)
    assert len(found) == 21
    assert found[-1] == "and 10 more like these"


def test_an_image_is_read_whole_from_a_closed_file(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(whole, "png")
    (tmp_path / "a.png").write_bytes(whole.getvalue())
    [sample] = samples_of(tmp_path, ["a.png"], X, Images())
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match="bad-image"):
        sample.load()
