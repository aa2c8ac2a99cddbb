"""Image files as the input of a model, prepared as a spec declares.

An image is turned upright as its EXIF orientation says, brought to gray or three channels of 8 bits
(transparency is dropped), resized bilinearly (with a filter as wide as the reduction, which not all
libraries have), and then scaled: ``(value * scale - mean) / std``, in float32.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from optc.optimizer.arrays import dtype_of
from optc.optimizer.feed import Signature
from optc.specs.compile_spec import Images, Range
from optc.specs.diagnostic import Diagnostic, EnvironmentFault, InputError, Place, nearest, quoted
from optc.specs.manifest import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Array = npt.NDArray[Any]
PlaceOf = Callable[..., Place | None]
"""Keys below ``calibration`` -> where they stand in the spec."""

_FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow knows more, some of which it hands to other programs."""

_DAMAGE: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    struct.error,
)
"""What Pillow raises for a damaged file, depending on the format and where it is cut."""

_FLOATS: Final = frozenset({"float16", "bfloat16", "float32", "float64"})


@dataclass(frozen=True, slots=True)
class ImageReader:
    """Reads image files as one input of a model.

    Attributes:
        images: How.
        input: Name of the input.
        dtype: Its type, as a manifest names it.
        size: Height and width.
        batch: How many times the image is repeated along the batch axis, where the model takes no
            less; None where it has no such axis.
    """

    images: Images
    input: str
    dtype: str
    size: tuple[int, int]
    batch: int | None

    def read(self, path: Path) -> Array:
        """Return the image at ``path`` as the model takes it.

        Raises:
            InputError: ``bad-image``.
            EnvironmentFault: ``missing-extra``: Pillow is not installed.
        """
        pixels = np.asarray(self._resized(_opened(path, self.images.color)))
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if self.images.color == "bgr":
            pixels = pixels[:, :, ::-1]
        values = self._scaled(pixels)
        if self.images.layout == "nchw":
            values = values.transpose(2, 0, 1)
        if self.batch is not None:
            values = np.repeat(values[None], self.batch, axis=0)
        return np.ascontiguousarray(values)

    def _resized(self, image: Image) -> Image:
        from PIL.Image import Resampling, new

        height, width = self.size
        if image.size == (width, height):
            return image
        across, down = width / image.width, height / image.height
        match self.images.resize:
            case "stretch":
                return image.resize((width, height), Resampling.BILINEAR)
            case "crop":
                factor = max(across, down)
                left = (image.width - width / factor) / 2
                top = (image.height - height / factor) / 2
                box = (left, top, image.width - left, image.height - top)
                return image.resize((width, height), Resampling.BILINEAR, box=box)
            case "letterbox":
                factor = min(across, down)
                inner = (
                    max(1, round(image.width * factor)),
                    max(1, round(image.height * factor)),
                )
                fill = self.images.fill
                whole = new(image.mode, (width, height), fill if image.mode == "L" else (fill,) * 3)
                corner = ((width - inner[0]) // 2, (height - inner[1]) // 2)
                whole.paste(image.resize(inner, Resampling.BILINEAR), corner)
                return whole

    def _scaled(self, pixels: Array) -> Array:
        if self.dtype == "uint8":
            return pixels
        images = self.images
        mean, std = (np.array(each, np.float32) for each in (images.mean, images.std))
        values = (pixels * np.float32(images.scale) - mean) / std
        return values.astype(dtype_of(self.dtype))


def _opened(path: Path, color: str) -> Image:
    """Return the upright image at ``path``, of 8 bits a channel, in gray or in three channels."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise EnvironmentFault(
            Diagnostic(
                "missing-extra",
                f"`{path}` is taken for an image, and Pillow, which reads images, does not load: "
                f"{error}",
                "pip install 'optc[images]'",
            )
        ) from error
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=_FORMATS) as file:
            mode = file.mode
            image = ImageOps.exif_transpose(file)
            if not mode.startswith(("I", "F")):
                return image.convert("L" if color == "gray" else "RGB")
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        raise _bad(path, f"it cannot be read as an image ({error})") from error
    raise _bad(path, "its channels have more than 8 bits, whose range nobody has declared")


def _bad(path: Path, problem: str) -> InputError:
    todo = "give an image of 8 bits a channel, or an npz file with the values that the model takes"
    return InputError(Diagnostic("bad-image", f"`{path}` is not taken: {problem}", todo))


# --- from the spec and the model to a reader -----------------------------------------------------


def reader_of(
    images: Images, signature: Signature, place: PlaceOf = lambda *keys: None
) -> ImageReader:
    """Return what reads images as the model takes them.

    Args:
        images: What the spec says of images.
        signature: What the model takes.
        place: Tells where in the spec ``"images", "color"`` stands.

    Raises:
        InputError: ``bad-images`` where the two do not fit, all problems at once.
    """
    return _Fitting(images, signature, place).reader()


class _Fitting:
    def __init__(self, images: Images, signature: Signature, place: PlaceOf) -> None:
        self._images = images
        self._signature = signature
        self._place = place
        self._problems: list[Diagnostic] = []

    def _add(self, problem: str, todo: str, key: str) -> None:
        place = self._place("images", key) or self._place("images")
        self._problems.append(Diagnostic("bad-images", problem, todo, place))

    def reader(self) -> ImageReader:
        tensor = self._input()
        found = self._fitted(tensor) if tensor is not None else None
        if found is None or self._problems:
            raise InputError(*self._problems)
        return found

    def _input(self) -> Tensor | None:
        inputs = {tensor.name: tensor for tensor in self._signature.inputs}
        name = self._images.input
        if name is None and len(inputs) == 1:
            return next(iter(inputs.values()))
        if name in inputs:
            others = [t.name for t in inputs.values() if t.name != name and t.range is None]
            for other in others:
                self._add(
                    f"the model takes `{other}` besides the image, and an image file does not "
                    "give it",
                    f"say in `inputs.{other}.range` which values may be made up for it, or give "
                    "npz files with all inputs",
                    "input",
                )
            return inputs[name]
        listed = quoted(inputs)
        if name is None:
            problem = f"the model has {len(inputs)} inputs: {listed}"
            self._add(problem, "say in `images.input` which of them takes the image", "input")
        else:
            near = nearest(name, inputs)
            todo = f"write `{near}`" if near else f"the model takes {listed}"
            self._add(f"the model has no input `{name}`", todo, "input")
        return None

    def _fitted(self, tensor: Tensor) -> ImageReader | None:
        images, name = self._images, tensor.name
        if tensor.shape is None or len(tensor.shape) not in (3, 4):
            words = "" if tensor.shape is None else f": its shape is {_shown(tensor.shape)}"
            todo = "name another input, or give npz files"
            self._add(f"the input `{name}` is no image{words}", todo, "input")
            return None
        self._check_type(tensor)
        planes = tensor.shape[-3:]
        channels, *extents = planes if images.layout == "nchw" else (planes[2], *planes[:2])
        given = 1 if images.color == "gray" else 3
        if isinstance(channels, int) and channels != given:
            self._add(
                f"the input `{name}` has shape {_shown(tensor.shape)}, which is {channels} channels "
                f"for the layout {images.layout}; `{images.color}` gives {given}",
                "set `color` and `layout` to what the model takes",
                "layout",
            )
            return None
        size = self._size(name, extents)
        if size is None:
            return None
        batch = None
        if len(tensor.shape) == 4:
            first = tensor.shape[0]
            profile = self._profile(dict(zip(extents, size, strict=True)))
            if isinstance(first, str):
                first = max(1, profile[first].min) if first in profile else 1
            batch = first
        return ImageReader(images, name, tensor.dtype, size, batch)

    def _check_type(self, tensor: Tensor) -> None:
        images = self._images
        if tensor.dtype == "uint8":
            if images.scale != 1 or set(images.mean) != {0.0} or set(images.std) != {1.0}:
                self._add(
                    f"the input `{tensor.name}` is uint8: the values of an image go in as they are",
                    "write `scale: 1`, and leave `mean` and `std` out",
                    "scale",
                )
        elif tensor.dtype not in _FLOATS:
            self._add(
                f"the input `{tensor.name}` is {tensor.dtype}, which an image does not become",
                "name another input, or give npz files",
                "input",
            )

    def _size(self, name: str, extents: Sequence[int | str]) -> tuple[int, int] | None:
        """Return height and width: those of the spec, of the model, or the best of a profile."""
        asked = self._images.size
        if asked is None:
            profile = self._profile({})
            height, width = (
                extent
                if isinstance(extent, int)
                else profile[extent].opt
                if extent in profile
                else 0
                for extent in extents
            )
            if height and width:
                return height, width
            self._add(
                f"neither the model nor `dims` says how large the images of `{name}` are",
                "write `size: [height, width]`",
                "size",
            )
            return None
        for extent, wanted, words in zip(extents, asked, ("height", "width"), strict=True):
            if isinstance(extent, int) and extent != wanted:
                self._add(
                    f"`size` asks for a {words} of {wanted}, and the input `{name}` has {extent}",
                    "leave `size` out, or write what the model takes",
                    "size",
                )
                return None
        return asked

    def _profile(self, sizes: Mapping[int | str, int]) -> Mapping[str, Range]:
        """Return the first profile that holds ``sizes``, else the first; outside all is said later."""
        profiles = self._signature.profiles or ({},)

        def holds(profile: Mapping[str, Range]) -> bool:
            return all(
                profile[symbol].min <= extent <= profile[symbol].max
                for symbol, extent in sizes.items()
                if isinstance(symbol, str) and symbol in profile
            )

        return next(filter(holds, profiles), profiles[0])


def _shown(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
