"""Which range a dynamic axis most likely wants, from what it is called and where it stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from optc.specs.compile_spec import Range

BATCH: Final = Range(min=1, opt=4, max=8)
_IMAGE: Final = Range(min=320, opt=640, max=1280)
_SEQUENCE: Final = Range(min=1, opt=128, max=512)
_OTHER: Final = Range(min=1, opt=16, max=64)

_SEQUENCE_WORDS: Final = {"token", "tokens", "length", "len", "frame", "frames", "time", "steps"}
_CHANNELS: Final = {1, 3, 4}


def likely_range(
    symbol: str, shape: Sequence[str | int | None], axis: int
) -> tuple[Range, str | None]:
    """Return a range for a dynamic axis, and what is doubtful about it.

    Args:
        symbol: What the axis is called.
        shape: Of an input that has it.
        axis: Its position there, outermost 0.

    Returns:
        The range, and None where name or position make it plain; else what to decide.

    Example:
        >>> likely_range("batch_size", ["batch_size", 3, 224, 224], 0)
        (Range(min=1, opt=4, max=8), None)
    """
    words = set(re.findall(r"[a-z]+", symbol.lower()))
    if words & {"batch", "batchsize", "bs"}:
        return BATCH, None
    if any("seq" in word for word in words) or words & _SEQUENCE_WORDS:
        return _SEQUENCE, None
    if words & {"b", "n"}:  # after the sequences: `n_frames` is one
        return BATCH, None
    if words & {"height", "width", "h", "w"}:
        return _IMAGE, None
    if axis == 0:
        return BATCH, None
    rank = len(shape)
    if rank == 4 and axis in ((1, 2) if shape[3] in _CHANNELS else (2, 3)):
        return _IMAGE, "is this the height or width of an image?"
    if rank == 2 and axis == 1:
        return _SEQUENCE, "is this the length of a sequence?"
    return _OTHER, "nothing says what this axis is"
