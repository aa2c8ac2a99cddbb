from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from optc.optimizer.arrays import dtype_of
from optc.optimizer.image_file import ImageReader, reader_of
from optc.specs.compile_spec import Images, Range
from optc.specs.diagnostic import EnvironmentFault, InputError
from optc.specs.manifest import Tensor

Array = npt.NDArray[Any]


@dataclass
class Takes:
    inputs: Sequence[Tensor]
    profiles: Sequence[Mapping[str, Range]] = ()


def takes(*shape: int | str, dtype: str = "float32", **ranges: Range) -> Takes:
    return Takes([Tensor(name="x", dtype=dtype, shape=shape)], [ranges] if ranges else [])


def written(path: Path, pixels: Any, mode: str | None = None, **options: Any) -> Path:
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def problems(images: Images, signature: Takes) -> list[str]:
    with pytest.raises(InputError) as caught:
        reader_of(images, signature)
    assert {each.code for each in caught.value.diagnostics} == {"bad-images"}
    return [f"{each.problem} // {each.todo}" for each in caught.value.diagnostics]


# --- values --------------------------------------------------------------------------------------

TWO = [[[10, 20, 30], [40, 50, 60]]]
"""One row of two pixels."""


def test_values_are_scaled_then_moved_then_divided_channel_by_channel(tmp_path: Path) -> None:
    images = Images(scale=0.1, mean=(1, 2, 3), std=(1, 2, 4))
    found = reader_of(images, takes(1, 3, 1, 2)).read(written(tmp_path / "a.png", TWO))
    assert found.dtype == np.float32
    assert found == pytest.approx(np.array([[[[0, 3]], [[0, 1.5]], [[0, 0.75]]]]), abs=1e-6)
    assert found.flags.c_contiguous


def test_by_default_values_are_shares_of_255(tmp_path: Path) -> None:
    found = reader_of(Images(), takes(1, 3, 1, 2)).read(written(tmp_path / "a.png", TWO))
    assert found == pytest.approx(np.array(TWO).transpose(2, 0, 1)[None] / 255)


def test_bgr_and_channels_last(tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", TWO)
    plain = Images(scale=1)
    rgb = reader_of(plain, takes(1, 3, 1, 2)).read(path)
    bgr = reader_of(Images(scale=1, color="bgr", mean=(30, 0, 0)), takes(1, 3, 1, 2)).read(path)
    last = reader_of(Images(scale=1, layout="nhwc"), takes(1, 1, 2, 3)).read(path)
    assert bgr[0, :, 0, 0].tolist() == [0, 20, 10]
    assert (last == rgb.transpose(0, 2, 3, 1)).all()


def test_gray_is_one_channel_by_luma(tmp_path: Path) -> None:
    found = reader_of(Images(scale=1, color="gray"), takes(1, 1, 1, 2)).read(
        written(tmp_path / "a.png", TWO)
    )
    assert found.shape == (1, 1, 1, 2)
    assert found[0, 0, 0] == pytest.approx(np.array(TWO[0]) @ [0.299, 0.587, 0.114], abs=0.6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_values_are_rounded_to_the_type_of_the_input_last(tmp_path: Path, dtype: str) -> None:
    path = written(tmp_path / "a.png", TWO)
    exact = reader_of(Images(), takes(1, 3, 1, 2)).read(path)
    found = reader_of(Images(), takes(1, 3, 1, 2, dtype=dtype)).read(path)
    assert found.dtype == dtype_of(dtype)
    assert (found == exact.astype(dtype_of(dtype))).all()


def test_bytes_go_in_as_they_are_where_that_is_asked_for(tmp_path: Path) -> None:
    signature = takes(1, 3, 1, 2, dtype="uint8")
    found = reader_of(Images(scale=1), signature).read(written(tmp_path / "a.png", TWO))
    assert found.dtype == np.uint8
    assert found[0, :, 0, 1].tolist() == [40, 50, 60]
    [problem] = problems(Images(), signature)
    assert problem == (
        "the input `x` is uint8: the values of an image go in as they are // write `scale: 1`, and "
        "leave `mean` and `std` out"
    )


@pytest.mark.parametrize("suffix", ["bmp", "gif", "jpg", "pgm", "png", "ppm", "tif", "webp"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / f"a.{suffix}", np.full((16, 16, 3), 255))
    assert (reader_of(Images(), takes(1, 3, 16, 16)).read(path) > 0.98).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_kind_of_8_bits_becomes_three_channels(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    written(path, np.full((4, 4, 3), 255), mode)
    found = reader_of(Images(), takes(1, 3, 4, 4)).read(path)
    assert (found == 1).all()


def test_an_image_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    path = written(tmp_path / "a.png", TWO, exif=exif)
    found = reader_of(Images(scale=1), takes(1, 3, 2, 1)).read(path)
    assert found[0, 0, :, 0].tolist() == [10, 40]


# --- sizes ---------------------------------------------------------------------------------------


def halves(height: int, width: int) -> Array:
    """Return an image whose left half is 0 and whose right half is 200."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, width // 2 :] = 200
    return pixels


def test_stretch_fills_the_whole(tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", halves(10, 40))
    found = reader_of(Images(scale=1), takes(1, 3, 20, 20)).read(path)[0, 0]
    assert (found[:, :8] == 0).all()
    assert (found[:, 12:] == 200).all()


def test_letterbox_keeps_the_aspect_and_fills_equally(tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", halves(10, 40))
    images = Images(scale=1, resize="letterbox", fill=7)
    found = reader_of(images, takes(1, 3, 20, 20)).read(path)[0, 0]
    assert (found[:7] == 7).all()
    assert (found[12:] == 7).all()
    assert (found[7:12, :8] == 0).all()
    assert (found[7:12, 12:] == 200).all()


def test_crop_keeps_the_aspect_and_cuts_equally(tmp_path: Path) -> None:
    pixels = halves(10, 40)
    pixels[:, :15] = pixels[:, 25:] = 99  # what is cut off
    found = reader_of(Images(scale=1, resize="crop"), takes(1, 3, 10, 10)).read(
        written(tmp_path / "a.png", pixels)
    )[0, 0]
    assert found[0].tolist() == [0] * 5 + [200] * 5


def test_letterbox_of_a_line_keeps_a_pixel(tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", np.full((1, 300, 3), 50))
    found = reader_of(Images(scale=1, resize="letterbox", color="gray"), takes(1, 1, 9, 9)).read(
        path
    )
    assert np.count_nonzero(found == 50) == 9


def size_of(images: Images, signature: Takes) -> tuple[int | None, tuple[int, int]]:
    reader = reader_of(images, signature)
    return reader.batch, reader.size


def test_sizes_come_from_the_spec_the_model_or_the_first_profile() -> None:
    batch, height = Range(min=2, opt=4, max=8), Range(min=16, opt=32, max=64)
    dynamic = takes("b", 3, "h", 24, b=batch, h=height)
    assert size_of(Images(), takes(1, 3, 8, 9)) == (1, (8, 9))
    assert size_of(Images(), dynamic) == (2, (32, 24))
    assert size_of(Images(size=(48, 24)), dynamic) == (2, (48, 24))
    assert size_of(Images(), takes(3, 8, 9)) == (None, (8, 9))
    assert size_of(Images(layout="nhwc"), takes("b", "h", 9, 3, b=batch, h=height)) == (2, (32, 9))


def test_the_batch_is_that_of_the_profile_that_has_the_size() -> None:
    signature = takes("b", 3, "h", 24)
    signature.profiles = [
        {"b": Range.fixed(1), "h": Range.fixed(32)},
        {"b": Range.fixed(5), "h": Range.fixed(48)},
    ]
    assert size_of(Images(size=(48, 24)), signature) == (5, (48, 24))


def test_an_image_is_repeated_where_the_model_takes_no_less(tmp_path: Path) -> None:
    found = reader_of(Images(), takes(4, 3, 1, 2)).read(written(tmp_path / "a.png", TWO))
    assert found.shape == (4, 3, 1, 2)
    assert (found == found[:1]).all()


# --- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "signature", "said"),
    [
        (
            Images(color="gray"),
            takes(1, 3, 8, 8),
            "which is 3 channels for the layout nchw; `gray`",
        ),
        (Images(), takes(1, 8, 8, 3), "has shape [1, 8, 8, 3], which is 8 channels for the layout"),
        (Images(), takes(1, 3, 8), "which is 1 channels"),
        (Images(), takes(1, 8), "the input `x` is no image: its shape is [1, 8] // name another"),
        (Images(), takes(1, 3, 8, 8, dtype="int64"), "is int64, which an image does not become"),
        (Images(size=(9, 8)), takes(1, 3, 8, 8), "asks for a height of 9, and the input `x` has 8"),
        (Images(size=(8, 9)), takes(1, 3, 8, 8), "asks for a width of 9, and the input `x` has 8"),
        (Images(input="y"), takes(1, 3, 8, 8), "the model has no input `y` // the model takes `x`"),
        (Images(), takes(1, 3, "h", 8), "says how large the images of `x` are // write `size:"),
    ],
)
def test_what_the_spec_says_and_the_model_does_not(
    images: Images, signature: Takes, said: str
) -> None:
    [problem] = problems(images, signature)
    assert said in problem


def test_several_inputs() -> None:
    image = Tensor(name="image", dtype="float32", shape=(1, 3, 8, 8))
    scale = Tensor(name="scale", dtype="float32", shape=(1, 2))
    [problem] = problems(Images(), Takes([image, scale]))
    assert problem == (
        "the model has 2 inputs: `image`, `scale` // say in `images.input` which of them takes the "
        "image"
    )
    [problem] = problems(Images(input="imag"), Takes([image, scale]))
    assert problem == "the model has no input `imag` // write `image`"
    [problem] = problems(Images(input="image"), Takes([image, scale]))
    assert problem.startswith("the model takes `scale` besides the image")
    made_up = scale.model_copy(update={"range": (1.0, 1.0)})
    assert reader_of(Images(input="image"), Takes([image, made_up])).input == "image"


def reader() -> ImageReader:
    return reader_of(Images(), takes(1, 3, 8, 8))


def test_a_damaged_image_is_said_to_be_one(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.png", np.zeros((64, 64, 3))).read_bytes()
    jpeg = written(tmp_path / "a.jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
    damaged = {
        "empty.png": b"",
        "text.jpg": b"not an image",
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "cut.png": whole[: len(whole) // 2],
        "cut.jpg": jpeg.read_bytes()[:-2000],
        "flipped.png": whole[:30] + bytes(255 - byte for byte in whole[30:]),
    }
    for name, content in damaged.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            reader().read(path)
        [problem] = caught.value.diagnostics
        assert problem.code == "bad-image"
        assert problem.problem.startswith(f"`{path}` is not taken: it cannot be read as an image")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bad-image"):
        reader().read(tmp_path / "no.png")


def test_16_bits_are_not_cut_to_8(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path)
    with pytest.raises(InputError, match="more than 8 bits"):
        reader().read(path)


def test_a_picture_too_large_to_be_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match="bad-image"):
        reader().read(written(tmp_path / "a.png", np.zeros((8, 8, 3))))


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.png", TWO)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(EnvironmentFault) as caught:
        reader().read(path)
    [problem] = caught.value.diagnostics
    assert problem.code == "missing-extra"
    assert problem.todo == "pip install 'optc[images]'"
