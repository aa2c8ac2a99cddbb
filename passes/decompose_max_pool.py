r"""Spell a MaxPool with indices or dilations out as the elements of its windows, side by side.

    before                    after

    x                         x
    |                         |
    MaxPool                   Pad, one Slice for each element of a window, Concat
    |     \                   |        \
    y   indices               |       ArgMax: which element of the window
                              |          |
                          ReduceMax     Gather of how far that is, Add of where the window is
                              |          |
                              y       indices

Why it holds: element k of all windows is x from k * dilation on in steps of the stride, which is a
Slice. y is the largest of them; the index is that of the first that is as large, counted through all
images and channels, as the standard says. Exact. What the standard does not define stays undefined:
the index of a window of nothing but minus infinity, or of NaN.

It costs memory where it computes indices or dilations: x at the size of the output, once for each
element of a window. Of more than 32 elements it is left to the fallback.

Needs: static spatial extents. The number of images may be dynamic.
Keeps: the names of the outputs.
Skips, with the reason in the report: windows of more than 32 elements; ceil_mode, automatic padding and
column-major indices; other types than float32 and float16; what is needed and not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.dimension import Dim
from optc.passes.graph import Array
from optc.passes.replacement import Operand, Replacement

MOST_ELEMENTS = 32
"""Elements of the largest window that is spelt out."""


class DecomposeMaxPool(Pass):
    """Spell MaxPool with indices or dilations out as slices and their maximum."""

    name = "decompose-max-pool"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Spell out every MaxPool of ``graph`` that has indices or dilations."""
        report = Report()
        for node in facts.nodes("MaxPool"):
            if len(node.outputs) < 2 and not any(d != 1 for d in node.attrs.get("dilations") or ()):
                continue
            windows = _windows(node, facts)
            if isinstance(windows, str):
                report.skipped[node.name] = windows
            elif not facts.reach_opset(11):
                report.skipped[node.name] = "the model cannot be raised to opset 11"
            else:
                new = Replacement(graph, facts, node)
                new.finish(report, windows.spell_out(new))
        return report


@dataclass(frozen=True, slots=True)
class _Windows:
    """The windows of a MaxPool. Sequences have an entry for each spatial axis."""

    x: gs.Tensor
    dtype: np.dtype[np.generic]
    images: Dim
    channels: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.size)

    @property
    def out(self) -> tuple[int, ...]:
        """How many windows there are along each axis."""
        room = np.array(self.size) + np.reshape(self.pads, (2, -1)).sum(0)
        needed = (np.array(self.kernel) - 1) * self.dilations + 1
        return tuple(int(n) for n in (room - needed) // self.strides + 1)

    def spell_out(self, new: Replacement) -> dict[int, gs.Tensor]:
        """Write the nodes and return both outputs."""
        x = self.x
        if any(self.pads):
            begins, ends = np.reshape(self.pads, (2, -1))
            around = np.concatenate([[0, 0], begins, [0, 0], ends])
            x = new.add("Pad", x, around.astype(np.int64), np.array(-np.inf, self.dtype))
        axes = np.arange(2, 2 + self.rank)
        steps = np.array(self.strides, np.int64)
        elements = []
        for at in product(*map(range, self.kernel)):
            start = np.array(at, np.int64) * self.dilations
            end = start + (np.array(self.out) - 1) * steps + 1
            part = new.add("Slice", x, start, end, axes, steps)
            elements.append(new.along("Unsqueeze", part, [2 + self.rank]))
        window = new.add("Concat", *elements, axis=2 + self.rank)
        largest = new.along("ReduceMax", window, [2 + self.rank], keepdims=0)
        which = new.add("ArgMax", window, axis=2 + self.rank, keepdims=0)
        distance = new.add("Gather", self.distances(), which, axis=0)
        within = new.add("Add", distance, self.origins())
        return {0: largest, 1: new.add("Add", within, self.before(new))}

    def along_x(self, counted: Sequence[Array]) -> Array:
        """Return positions on a grid of numbers for each axis, counted through one channel of x."""
        grids = np.meshgrid(*counted, indexing="ij")
        total = np.zeros_like(grids[0])
        for grid, extent in zip(grids, self.size, strict=True):
            total = total * extent + grid
        return total

    def distances(self) -> Array:
        """Return how far each element of a window is from its first."""
        steps = [np.arange(k) * d for k, d in zip(self.kernel, self.dilations, strict=True)]
        return self.along_x(steps).reshape(-1)

    def origins(self) -> Array:
        """Return where each window begins; what is padded lies before x."""
        return self.along_x(
            [
                np.arange(n) * stride - pad
                for n, stride, pad in zip(self.out, self.strides, self.pads, strict=False)
            ]
        )

    def before(self, new: Replacement) -> Operand:
        """Return how many elements lie before each channel of each image."""
        volume = np.prod(self.size, dtype=np.int64)
        shape = np.array([-1, self.channels, *(1 for _ in self.size)], np.int64)
        if isinstance(self.images, int):
            count: Array = np.arange(self.images * self.channels, dtype=np.int64)
            return (count * volume).reshape(shape)
        images = new.add("Gather", new.add("Shape", self.x), np.array(0, np.int64), axis=0)
        end = new.add("Mul", images, np.array(self.channels, np.int64))
        counted = new.add("Range", np.array(0, np.int64), end, np.array(1, np.int64))
        return new.add("Reshape", new.add("Mul", counted, volume), shape)


def _windows(node: gs.Node, facts: Facts) -> _Windows | str:
    """Return the windows of ``node``, or why it stays."""
    attrs = node.attrs
    [x] = node.inputs
    dims, dtype = facts.shapes.dims(x.name), facts.shapes.dtype(x.name)
    if dims is None or dtype is None or len(dims) < 3 or not isinstance(dims[1], int):
        return "its channels are not known"
    size = tuple(dim for dim in dims[2:] if isinstance(dim, int))
    if len(size) != len(dims) - 2:
        return "its spatial extents are not static"
    if dtype.name not in ("float32", "float16"):
        return f"it computes in {dtype}"
    if attrs.get("auto_pad", "NOTSET") != "NOTSET" or attrs.get("ceil_mode", 0):
        return "its windows go beyond its padding"
    if attrs.get("storage_order", 0):
        return "its indices count down the columns first"
    kernel = tuple(int(k) for k in attrs["kernel_shape"])
    if np.prod(kernel) > MOST_ELEMENTS:
        return f"its windows have more than {MOST_ELEMENTS} elements"
    return _Windows(
        x=x,
        dtype=dtype,
        images=dims[0],
        channels=dims[1],
        size=size,
        kernel=kernel,
        strides=tuple(attrs.get("strides") or [1] * len(size)),
        pads=tuple(attrs.get("pads") or [0] * 2 * len(size)),
        dilations=tuple(attrs.get("dilations") or [1] * len(size)),
    )
