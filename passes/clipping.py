"""What passes around Clip share: between which numbers a node cuts its input."""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.match import argument, number

LARGEST = float(np.finfo(np.float32).max)


def bounds_of(clip: gs.Node, opset: int) -> tuple[float | None, float | None]:
    """Return the smallest and largest value that ``clip`` lets through.

    Infinite where it has no such bound, None where that is computed at run time. Before opset 11 a
    bound that is not given is the largest finite number of float32.
    """
    end = LARGEST if opset < 11 else math.inf
    found: list[float | None] = []
    for index, (name, none) in enumerate((("min", -end), ("max", end)), start=1):
        if name in clip.attrs:  # until opset 11
            found.append(float(clip.attrs[name]))
        else:
            tensor = argument(clip, index)
            found.append(none if tensor is None else number(tensor))
    return found[0], found[1]
