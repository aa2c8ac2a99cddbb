"""What passes around Clip share: between which numbers a node cuts its input."""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from optc.passes.match import argument, number


def bounds_of(clip: gs.Node) -> tuple[float | None, float | None]:
    """Return the smallest and largest value that ``clip`` lets through.

    Infinite where it has no such bound, None where that is computed at run time.
    """
    found: list[float | None] = []
    for index, (name, none) in enumerate((("min", -math.inf), ("max", math.inf)), start=1):
        if name in clip.attrs:  # until opset 11
            found.append(float(clip.attrs[name]))
        else:
            tensor = argument(clip, index)
            found.append(none if tensor is None else number(tensor))
    return found[0], found[1]
