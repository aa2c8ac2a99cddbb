"""Inputs for a model when the user has given none: seeded, and within the ranges of the spec.

Floats are uniform in [0, 1), integers 0 or 1, bools random, strings drawn from a few words; an
input with a ``range`` in the spec keeps to it. The values depend on nothing but the seed, the
input's name and its shape, so that a failure can be repeated and a renamed neighbour changes
nothing.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnx

Array = npt.NDArray[Any]
At = Literal["min", "opt", "max"]

WORDS = ("", "a", "the", "Model", "42", "naïve", "two words")
"""What made-up strings are drawn from: empty, short, a number, not ASCII, with a space."""

MOST_BYTES = 1 << 30
"""Made-up input is never larger than this, however much memory there is."""

ACTIVATIONS = 64
"""How many times the bytes of the input a model may need. A small convolutional network was seen to
take more than 20, and a machine that runs out of memory kills the process without a word."""


class InputSpec(Protocol):
    """What has to be known of an input to make one up.

    Attributes:
        dtype: ONNX element type, as in ``TensorProto.FLOAT``.
        shape: One entry an axis: an extent, or the symbol that a profile gives a range to.
        range: Lowest and highest value; for integers both may occur. None: the default above.
    """

    @property
    def dtype(self) -> int: ...  # noqa: D102 - said above
    @property
    def shape(self) -> Sequence[str | int]: ...  # noqa: D102
    @property
    def range(self) -> tuple[float, float] | None: ...  # noqa: D102


class SizeRange(Protocol):
    """The sizes a symbol takes in one optimisation profile."""

    @property
    def min(self) -> int: ...  # noqa: D102 - said by the name
    @property
    def opt(self) -> int: ...  # noqa: D102
    @property
    def max(self) -> int: ...  # noqa: D102


def sizes(shape: Sequence[str | int], profile: Mapping[str, SizeRange], at: At) -> tuple[int, ...]:
    """Return ``shape`` with each symbol at its minimum, optimum or maximum in ``profile``."""
    return tuple(
        int(getattr(profile[axis], at)) if isinstance(axis, str) else axis for axis in shape
    )


def bytes_needed(inputs: Mapping[str, InputSpec], profile: Mapping[str, SizeRange], at: At) -> int:
    """Return the bytes that `made_up` would make; a string counts as one pointer."""
    return sum(
        math.prod(sizes(spec.shape, profile, at)) * dtype_of(spec.dtype).itemsize
        for spec in inputs.values()
    )


@dataclass(frozen=True)
class Bound:
    """How large made-up input may be on this machine now.

    Attributes:
        available: Bytes of memory that can be had; None where the system does not say.
    """

    available: int | None

    @classmethod
    def here(cls) -> Bound:
        """Return the bound for the memory that is available now."""
        return cls(available_bytes())

    @property
    def bytes(self) -> int:
        """The most that all inputs together may take."""
        if self.available is None:
            return MOST_BYTES
        return min(MOST_BYTES, self.available // ACTIVATIONS)

    def __str__(self) -> str:
        """Return the bound and where it comes from."""
        if self.available is None or self.bytes == MOST_BYTES:
            return shown_bytes(self.bytes)
        return (
            f"{shown_bytes(self.bytes)}, a {ACTIVATIONS}th of the "
            f"{shown_bytes(self.available)} of memory available"
        )


def available_bytes() -> int | None:
    """Return the memory that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def shown_bytes(count: int) -> str:
    """Return ``count`` in the largest unit of which there is at least one."""
    if count >= 1 << 30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count / 2**10:.0f} KiB"


def made_up(
    inputs: Mapping[str, InputSpec],
    profile: Mapping[str, SizeRange],
    at: At,
    seed: int = 0,
) -> dict[str, Array]:
    """Return one array an input, at the sizes that ``profile`` has for ``at``.

    Raises:
        KeyError: If ``profile`` lacks a symbol of an input.
    """
    return {
        name: np.asarray(_values(spec, sizes(spec.shape, profile, at), _generator(seed, name)))
        for name, spec in inputs.items()
    }


def dtype_of(elem_type: int) -> np.dtype[Any]:
    """Return the numpy dtype of an ONNX element type; strings are ``object``."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether ``dtype`` is a floating point type, bfloat16 and the float8 types among them."""
    return dtype.name.startswith(("float", "bfloat"))


def _generator(seed: int, name: str) -> np.random.Generator:
    # hash() differs from process to process; the checksum does not.
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _values(spec: InputSpec, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    dtype = dtype_of(spec.dtype)
    if dtype.kind in "OSU":
        words = np.array(WORDS, dtype=object)[random.integers(len(WORDS), size=shape)]
        return np.asarray(words, dtype=object)  # numpy makes a bare str of a scalar
    if dtype.kind == "b":
        return random.integers(2, size=shape).astype(bool)
    if dtype.kind == "c":
        return (random.random(shape) + 1j * random.random(shape)).astype(dtype)
    if is_float(dtype):
        low, high = spec.range or (0.0, 1.0)
        drawn = (low + (high - low) * random.random(shape)).astype(dtype)
        # A coarse type rounds 0.9999 up to 1: keep it below `high`, as promised.
        return np.where(drawn < dtype.type(high), drawn, dtype.type(low)) if high > low else drawn
    low, high = spec.range or (0, 1)
    return random.integers(math.ceil(low), math.floor(high), size=shape, endpoint=True).astype(
        dtype
    )
