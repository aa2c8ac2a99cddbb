r"""Spell RoiAlign out as one sampling of all regions and a reduction of the samples of each bin.

    before                          after

    x    rois   indices             x        rois (, indices)
     \    |    /                    |          |
      RoiAlign                      |   Gather, Mul, Sub, Add...: where to sample, in [-1, 1]
         |                          |          |
         y                           GridSample
                                         |
                                     ReduceMean over the samples of a bin
                                         |
                                     Reshape, Transpose
                                         |
                                         y

Why it holds: RoiAlign is the mean (or the maximum) of s*s bilinear samples in each bin of each region,
and a sample beyond the image by more than a pixel is 0. All samples of all regions are rows of one
grid over one image, so nothing is repeated per region: position p, cut to the image, is sampled at
(2 * p + 1) / extent - 1, and what must be 0 is sampled far outside, where GridSample pads with zeros.
Several images become one tall one, each with its first and last row twice, so that no sample mixes
two of them. ``mode="max"`` is the largest of the four *weighted* corners of each sample, which is
what ONNX Runtime and the reference compute: the corners are sampled one by one, times their weights.

Equal up to rounding: positions are computed in the same order of operations, but scaled to [-1, 1]
and back, which moves them by some 2**-24 of the extent. A sample on the very edge, one pixel beyond
the image, may so become 0 or not, as it may where a compiler fuses a multiply-add. Samples of float16
and bfloat16 are computed in float32.

It costs the memory of the samples: s*s times the output (4*s*s with ``max``), and a copy of x where it
is of more than one image.

Needs: a known number of channels and sampling_ratio above 0. Extents of x, and the number of regions
and images, may be dynamic; there may be no region at all.
Keeps: the name of y.
Skips, with the reason in the report: sampling_ratio 0, as the number of samples then depends on the
region and nothing bounds it; float64; channels or type not known; a model that cannot be raised to
opset 16, which GridSample is from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.dimension import Dim
from optc.passes.graph import Array
from optc.passes.replacement import Operand, Replacement
from optc.passes.shape_fact import DType

OUTSIDE = np.array(-3, np.float32)
"""A coordinate from which GridSample reads nothing but its padding."""


class DecomposeRoiAlign(Pass):
    """Spell RoiAlign out as one GridSample of all regions and a reduction over each bin."""

    name = "decompose-roi-align"
    group = "legalise"
    exactness = "equal up to rounding of the positions"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Spell out every RoiAlign of ``graph``."""
        report = Report()
        for node in facts.nodes("RoiAlign"):
            pooling = _pooling(node, facts)
            if isinstance(pooling, str):
                report.skipped[node.name] = pooling
            elif not facts.reach_opset(16):
                report.skipped[node.name] = "the model cannot be raised to opset 16"
            else:
                new = Replacement(graph, facts, node)
                new.finish(report, pooling.spell_out(new, facts.opset))
        return report


@dataclass(frozen=True, slots=True)
class _Pooling:
    """A RoiAlign. Pairs are height and width.

    Positions of samples along one axis are laid out as regions, bins along y, bins along x, samples
    along y, samples along x, 1: the other axis has extent 1 and broadcasts.
    """

    x: gs.Tensor
    rois: gs.Tensor
    indices: gs.Tensor
    dtype: DType
    images: Dim
    channels: int
    size: tuple[Dim, Dim]
    bins: tuple[int, int]
    samples: int
    scale: float
    shift: float
    is_max: bool

    def spell_out(self, new: Replacement, opset: int) -> gs.Tensor:
        """Write the nodes and return the last result."""
        narrow = self.dtype.itemsize < 4
        x = new.cast(self.x, np.float32) if narrow else self.x
        rois = new.cast(self.rois, np.float32) if narrow else self.rois
        scaled = new.add("Mul", rois, np.array(self.scale, np.float32))
        if self.shift:
            scaled = new.add("Sub", scaled, np.array(self.shift, np.float32))
        y_grid, y_weight = self.along(new, scaled, 0)
        x_grid, x_weight = self.along(new, scaled, 1)
        grid = new.add(
            "Add",
            new.add("Mul", x_grid, np.array([1, 0], np.float32)),
            new.add("Mul", y_grid, np.array([0, 1], np.float32)),
        )
        per_bin = (self.samples * (2 if self.is_max else 1)) ** 2
        linear = "linear" if opset >= 20 else "bilinear"
        values = new.add(
            "GridSample",
            self.one_image(new, x),
            new.add("Reshape", grid, _vector(1, -1, per_bin, 2)),
            mode="nearest" if self.is_max else linear,
            padding_mode="zeros",
            align_corners=0,
        )
        if self.is_max:
            weights = new.add("Mul", y_weight, x_weight)
            weights = new.add("Reshape", weights, _vector(1, 1, -1, per_bin))
            values = new.add("Mul", values, weights)
        reduction = "ReduceMax" if self.is_max else "ReduceMean"
        values = new.along(reduction, values, [3], keepdims=0)
        values = new.add("Reshape", values, _vector(self.channels, -1, *self.bins))
        pooled = new.add("Transpose", values, perm=[1, 0, 2, 3])
        return new.cast(pooled, self.dtype) if narrow else pooled

    def along(
        self, new: Replacement, scaled: gs.Tensor, axis: int
    ) -> tuple[gs.Tensor, gs.Tensor | None]:
        """Return where to sample along y (0) or x (1), and with which weights for a maximum."""
        position = self.positions(new, scaled, axis)
        extent = self.extent(new, axis)
        one, zero = np.array(1, np.float32), np.array(0, np.float32)
        is_outside = new.add(
            "Or",
            new.add("Less", position, np.array(-1, np.float32)),
            new.add("Greater", position, extent),
        )
        last = _plus(new, extent, -1)
        inside = new.add("Min", new.add("Max", position, zero), last)
        weight = None
        if self.is_max:
            low = new.add("Floor", inside)
            high = new.add("Min", new.add("Add", low, one), last)
            to_high = new.add("Sub", inside, low)
            to_low = new.add("Sub", one, to_high)
            weights = [new.add("Where", is_outside, zero, part) for part in (to_low, to_high)]
            weight = new.add("Concat", *weights, axis=3 + axis)
            inside = new.add("Concat", low, high, axis=3 + axis)
        grid = self.normalised(new, inside, axis)
        if not self.is_max:
            grid = new.add("Where", is_outside, OUTSIDE, grid)
        return grid, weight

    def positions(self, new: Replacement, scaled: gs.Tensor, axis: int) -> gs.Tensor:
        """Return where the samples of each region are along an axis, in pixels of x."""
        column = 1 - axis  # a region is x1, y1, x2, y2
        shape = _vector(-1, 1, 1, 1, 1, 1)
        start, end = (
            new.add("Reshape", new.add("Gather", scaled, _vector(at), axis=1), shape)
            for at in (column, column + 2)
        )
        length = new.add("Sub", end, start)
        if not self.shift:
            length = new.add("Max", length, np.array(1, np.float32))
        bin_size = new.add("Div", length, np.array(self.bins[axis], np.float32))
        bins = _laid_along(np.arange(self.bins[axis]), 1 + axis)
        samples = _laid_along(np.arange(self.samples) + 0.5, 3 + axis)
        within = new.add("Mul", bin_size, samples)
        within = new.add("Div", within, np.array(self.samples, np.float32))
        before = new.add("Add", start, new.add("Mul", bin_size, bins))
        return new.add("Add", before, within)

    def normalised(self, new: Replacement, inside: gs.Tensor, axis: int) -> gs.Tensor:
        """Return positions in an image as GridSample counts them over the one tall image."""
        extent = self.extent(new, axis)
        if axis == 0 and self.images != 1:
            rows = _plus(new, extent, 2)
            index = new.add("Reshape", self.indices, _vector(-1, 1, 1, 1, 1, 1))
            first = new.add("Mul", new.cast(index, np.float32), rows)
            inside = new.add("Add", inside, _plus(new, first, 1))
            images: Operand = (
                np.array(self.images, np.float32)
                if isinstance(self.images, int)
                else self.counted(new, 0)
            )
            extent = new.add("Mul", rows, images)
        two, one = np.array(2, np.float32), np.array(1, np.float32)
        doubled = new.add("Add", new.add("Mul", inside, two), one)
        return new.add("Sub", new.add("Div", doubled, extent), one)

    def extent(self, new: Replacement, axis: int) -> Operand:
        """Return how many rows (0) or columns (1) an image has."""
        extent = self.size[axis]
        return (
            np.array(extent, np.float32) if isinstance(extent, int) else self.counted(new, 2 + axis)
        )

    def counted(self, new: Replacement, axis: int) -> gs.Tensor:
        """Return an extent of x that is only known at run time."""
        extent = new.add("Gather", new.add("Shape", self.x), np.array(axis, np.int64), axis=0)
        return new.cast(extent, np.float32)

    def one_image(self, new: Replacement, x: gs.Tensor) -> gs.Tensor:
        """Return all images as one, one above the other, each with its edges twice."""
        if self.images == 1:
            return x
        padded = new.add("Pad", x, _vector(0, 0, 1, 0, 0, 0, 1, 0), mode="edge")
        turned = new.add("Transpose", padded, perm=[1, 0, 2, 3])
        return new.add("Reshape", turned, _vector(1, self.channels, -1, 0))


def _pooling(node: gs.Node, facts: Facts) -> _Pooling | str:
    """Return what ``node`` does, or why it stays."""
    x, rois, indices = node.inputs
    attrs = node.attrs
    samples = int(attrs.get("sampling_ratio", 0))
    if samples <= 0:
        return "its sampling_ratio is 0: how many samples it takes depends on each region"
    dims, dtype = facts.shapes.dims(x.name), facts.shapes.dtype(x.name)
    if dims is None or len(dims) != 4 or not isinstance(dims[1], int):
        return "its channels are not known"
    if dtype is None or dtype == np.float64:
        return f"it computes in {'an unknown type' if dtype is None else dtype}"
    default = "half_pixel" if facts.opset >= 16 else "output_half_pixel"
    is_shifted = attrs.get("coordinate_transformation_mode", default) == "half_pixel"
    return _Pooling(
        x=x,
        rois=rois,
        indices=indices,
        dtype=dtype,
        images=dims[0],
        channels=dims[1],
        size=(dims[2], dims[3]),
        bins=(int(attrs.get("output_height", 1)), int(attrs.get("output_width", 1))),
        samples=samples,
        scale=float(attrs.get("spatial_scale", 1.0)),
        shift=0.5 if is_shifted else 0.0,
        is_max=attrs.get("mode", "avg") == "max",
    )


def _vector(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


def _laid_along(numbers: Array, axis: int) -> Array:
    """Return numbers along one of the six axes of positions."""
    shape = [1] * 6
    shape[axis] = -1
    return numbers.astype(np.float32).reshape(shape)


def _plus(new: Replacement, value: Operand, addend: float) -> Operand:
    """Return a sum, computed here where it can be."""
    if isinstance(value, gs.Tensor):
        return new.add("Add", value, np.array(addend, np.float32))
    return np.asarray(value) + np.float32(addend)
