r"""Spell a deformable convolution out as sampling and a 1x1 Conv.

    before                                after

    x  W  offset  b  mask                 x    offset
     \  \   |    /  /                     |      |
        DeformConv                        |   Gather, Reshape, Transpose
            |                             |      |
            y                             |   Add, Mul, Add: where to sample, in [-1, 1]
                                          |      |
                                        GridSample   mask
                                              \       /
                                                 Mul   W as 1x1   b
                                                   \      |      /
                                                        Conv
                                                         |
                                                         y

Why it holds: kernel tap k of output position (i, j) reads x at

    (i * stride - pad + k * dilation) + offset

bilinearly, and zero outside of x. That is GridSample with zero padding and ``align_corners=0`` at
(2 * position + 1) / extent - 1. With the taps of all outputs laid out as taller rows, one GridSample
reads them all; the C channels and K taps are then C*K channels of a 1x1 Conv with the same weights.
Each group of offsets is an image of its own.

Equal up to rounding: a position is scaled to [-1, 1] and back, which moves it by some 2**-24 of the
extent of x. Positions and samples of float16 and bfloat16 are computed in float32, more exactly than
before.

It costs memory: the sampled taps, K times x at the size of the output, as any im2col does.

Needs: two spatial axes; channels and kernel that are known. All other extents may be dynamic.
Keeps: the name of y.
Skips, with the reason in the report: other than two spatial axes, as GridSample takes no more on
TensorRT; float64; channels, kernel or type that are not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.dimension import Dim
from optc.passes.graph import Array
from optc.passes.match import argument
from optc.passes.replacement import Operand, Replacement
from optc.passes.shape_fact import DType


class DecomposeDeformConv(Pass):
    """Spell DeformConv out as GridSample, a product with the mask, and a 1x1 Conv."""

    name = "decompose-deform-conv"
    group = "legalise"
    exactness = "equal up to rounding of the positions"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Spell out every DeformConv of ``graph``."""
        report = Report()
        for node in facts.nodes("DeformConv"):
            layer = _layer(node, facts)
            if isinstance(layer, str):
                report.skipped[node.name] = layer
            else:
                new = Replacement(graph, facts, node)
                new.finish(report, layer.spell_out(new, facts.opset))
        return report


@dataclass(frozen=True, slots=True)
class _Layer:
    """A DeformConv of two spatial axes. Pairs are height and width, None where they are dynamic.

    ``filters`` are outputs and, of one group, inputs; ``begins`` what is padded before x.
    """

    x: gs.Tensor
    weight: gs.Tensor
    offset: gs.Tensor
    bias: gs.Tensor | None
    mask: gs.Tensor | None
    dtype: DType
    channels: int
    filters: tuple[int, int]
    kernel: tuple[int, int]
    group: int
    offset_group: int
    strides: tuple[int, int]
    begins: tuple[int, int]
    dilations: tuple[int, int]
    size: tuple[int, ...] | None
    out: tuple[int, ...] | None

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def is_narrow(self) -> bool:
        return self.dtype.itemsize < 4

    def spell_out(self, new: Replacement, opset: int) -> gs.Tensor:
        """Write the nodes. In comments: batch n, group of offsets g, channel c, tap k."""
        x = self.x
        if self.offset_group > 1:  # (n, g*c, h, w) -> (n*g, c, h, w)
            x = new.add("Reshape", x, _vector(-1, self.channels // self.offset_group, 0, 0))
        samples = new.add(
            "GridSample",
            new.cast(x, np.float32) if self.is_narrow else x,
            self.grid(new),
            mode="linear" if opset >= 20 else "bilinear",
            padding_mode="zeros",
            align_corners=0,
        )
        if self.is_narrow:
            samples = new.cast(samples, self.dtype)
        if self.mask is not None:  # (n, g*k, h, w) -> (n*g, 1, k*h, w)
            mask = new.add("Reshape", self.mask, self.laid_out(new, -1, 1, tall=True))
            samples = new.add("Mul", samples, mask)
        columns = self.laid_out(new, -1, self.channels * self.taps)
        return new.add(
            "Conv",
            new.add("Reshape", samples, columns),
            self.weights(new),
            *([] if self.bias is None else [self.bias]),
            group=self.group,
            kernel_shape=[1, 1],
        )

    def grid(self, new: Replacement) -> gs.Tensor:
        """Return where to sample, (n*g, k*h, w, 2): x before y, -1 to 1 from edge to edge."""
        y_before_x = np.arange(2 * self.taps * self.offset_group).reshape(-1, 2)
        x_before_y = new.add("Gather", self.offset, y_before_x[:, ::-1].reshape(-1), axis=1)
        offset = new.add("Reshape", x_before_y, self.laid_out(new, -1, self.taps, 2))
        offset = new.add("Transpose", offset, perm=[0, 1, 3, 4, 2])
        if self.is_narrow:
            offset = new.cast(offset, np.float32)
        position = new.add("Add", offset, self.taps_at(new))
        scale, shift = self.normalisation(new)
        grid = new.add("Add", new.add("Mul", position, scale), shift)
        return new.add("Reshape", grid, self.laid_out(new, -1, tall=True, last=(2,)))

    def laid_out(
        self, new: Replacement, *before: int, tall: bool = False, last: tuple[int, ...] = ()
    ) -> Operand:
        """Return a shape that ends in rows and columns of the output, ``tall``: of all taps."""
        rows = self.taps if tall else 1
        if self.out is not None:
            return _vector(*before, rows * self.out[0], self.out[1], *last)
        extents = new.add("Gather", new.add("Shape", self.offset), _vector(2, 3), axis=0)
        if tall:
            extents = new.add("Mul", extents, _vector(rows, 1))
        parts: list[Operand] = [_vector(*before), extents, *([_vector(*last)] if last else [])]
        return new.add("Concat", *parts, axis=0)

    def taps_at(self, new: Replacement) -> Operand:
        """Return where each tap of each output is without its offset, (k, h, w, 2), in pixels."""
        steps = [np.arange(self.kernel[axis]) * self.dilations[axis] for axis in (0, 1)]
        rows, columns = np.meshgrid(*steps, indexing="ij")
        taps = np.stack([columns - self.begins[1], rows - self.begins[0]], axis=-1)
        taps = taps.reshape(self.taps, 1, 1, 2).astype(np.float32)
        row_step = np.array([0, self.strides[0]], np.float32)
        column_step = np.array([self.strides[1], 0], np.float32)
        if self.out is not None:
            at_row = np.arange(self.out[0], dtype=np.float32).reshape(-1, 1, 1) * row_step
            at_column = np.arange(self.out[1], dtype=np.float32).reshape(-1, 1) * column_step
            return taps + at_row + at_column
        at_row = new.add("Mul", self.counted(new, 2, -1, 1, 1), row_step)
        at_column = new.add("Mul", self.counted(new, 3, -1, 1), column_step)
        return new.add("Add", new.add("Add", at_row, at_column), taps)

    def counted(self, new: Replacement, axis: int, *shape: int) -> gs.Tensor:
        """Return 0, 1, 2... along an axis of the output."""
        extents = new.add("Shape", self.offset)
        end = new.add("Gather", extents, np.array(axis, np.int64), axis=0)
        count = new.add("Range", np.array(0, np.int64), end, np.array(1, np.int64))
        return new.add("Reshape", new.cast(count, np.float32), _vector(*shape))

    def normalisation(self, new: Replacement) -> tuple[Operand, Operand]:
        """Return the scale and shift that bring a position, x before y, to [-1, 1]."""
        if self.size is not None:
            extents = np.array(self.size[::-1], np.float64)
            return (2 / extents).astype(np.float32), (1 / extents - 1).astype(np.float32)
        two, one = np.array(2, np.float32), np.array(1, np.float32)
        known = new.add("Gather", new.add("Shape", self.x), _vector(3, 2), axis=0)
        extents_of_x = new.cast(known, np.float32)
        shift = new.add("Sub", new.add("Div", one, extents_of_x), one)
        return new.add("Div", two, extents_of_x), shift

    def weights(self, new: Replacement) -> Operand:
        """Return the weights of a 1x1 Conv over channels and taps."""
        outputs, inputs = self.filters
        shape = (outputs, inputs * self.taps, 1, 1)
        if isinstance(self.weight, gs.Constant):
            return np.asarray(self.weight.values).reshape(shape)
        return new.add("Reshape", self.weight, _vector(*shape))


def _layer(node: gs.Node, facts: Facts) -> _Layer | str:
    """Return the layer that ``node`` is, or why it stays."""
    x, weight, offset = node.inputs[:3]
    shapes = facts.shapes
    dims, kernel, out = (shapes.dims(t.name) for t in (x, weight, offset))
    if dims is None or kernel is None or out is None:
        return "its shapes are not known"
    if len(dims) != 4:
        return f"it has {len(dims) - 2} spatial axes, TensorRT samples along two"
    filters, channels = _numbers(kernel), _numbers(dims[1:2])
    if filters is None or channels is None:
        return "its channels or its kernel are not known"
    dtype = shapes.dtype(x.name)
    if dtype is None or dtype == np.float64:
        return f"it computes in {'an unknown type' if dtype is None else dtype}"
    attrs = node.attrs
    return _Layer(
        x=x,
        weight=weight,
        offset=offset,
        bias=argument(node, 3),
        mask=argument(node, 4),
        dtype=dtype,
        channels=channels[0],
        filters=(filters[0], filters[1]),
        kernel=(filters[2], filters[3]),
        group=int(attrs.get("group", 1)),
        offset_group=int(attrs.get("offset_group", 1)),
        strides=_pair(attrs.get("strides") or (1, 1)),
        begins=_pair(attrs.get("pads") or (0, 0)),
        dilations=_pair(attrs.get("dilations") or (1, 1)),
        size=_numbers(dims[2:]),
        out=_numbers(out[2:]),
    )


def _vector(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


def _numbers(dims: Sequence[Dim]) -> tuple[int, ...] | None:
    """Return extents that are all known."""
    found = tuple(dim for dim in dims if isinstance(dim, int))
    return found if len(found) == len(dims) else None


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return int(values[0]), int(values[1])
