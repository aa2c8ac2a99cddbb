"""Which range a dynamic axis most likely wants, from what it is called and where it stands."""

from __future__ import annotations

import re
from typing import Final

from optc.specs.compile_spec import Range

_BATCH: Final = Range(min=1, opt=4, max=8)
_IMAGE: Final = Range(min=320, opt=640, max=1280)
_SEQUENCE: Final = Range(min=1, opt=128, max=512)
_OTHER: Final = Range(min=1, opt=16, max=64)


def likely_range(symbol: str, rank: int, axis: int) -> tuple[Range, str | None]:
    """Return a range for a dynamic axis, and what is doubtful about it.

    Args:
        symbol: What the axis is called.
        rank: Of an input that has it.
        axis: Its position there, outermost 0.

    Returns:
        The range, and None where name or position make it plain; else what to decide.

    Example:
        >>> likely_range("batch_size", 4, 0)
        (Range(min=1, opt=4, max=8), None)
    """
    words = set(re.findall(r"[a-z]+", symbol.lower()))
    if words & {"batch", "batchsize", "bs", "b", "n"}:
        return _BATCH, None
    if any("seq" in word for word in words) or words & {"token", "tokens", "length", "len"}:
        return _SEQUENCE, None
    if words & {"height", "width", "h", "w"}:
        return _IMAGE, None
    if axis == 0:
        return _BATCH, None
    if rank == 4 and axis in (2, 3):
        return _IMAGE, "is this the height or width of an image?"
    if rank == 2 and axis == 1:
        return _SEQUENCE, "is this the length of a sequence?"
    return _OTHER, "nothing says what this axis is"
