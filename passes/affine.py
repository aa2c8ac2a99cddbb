"""Constant functions of one multiplication and one addition per channel, read off a node.

BatchNormalization in inference, Neg, and Mul, Div, Add and Sub with a constant, are all
``scale * x + shift`` with one number each per channel, provided the constant has no other axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]


class Refused(Exception):
    """The pattern is there, but rewriting it would change a result. The text says why."""


@dataclass(frozen=True, slots=True)
class Channels:
    """Where the channels of a tensor stand.

    Attributes:
        count: How many there are.
        axis: Their axis, from the first one: 1 for images, the last one for a product of matrices.
        rank: How many axes the tensor has.
    """

    count: int
    axis: int
    rank: int

    def broadcast(self, numbers: Array) -> Array:
        """Return one number per channel so shaped that it meets the channels of the tensor."""
        return numbers.reshape(-1, *[1] * (self.rank - 1 - self.axis))


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """``scale * x + shift``: one number each per channel, in float64. None: there is none."""

    scale: Doubles | None = None
    shift: Doubles | None = None


def variable_of(node: gs.Node) -> gs.Tensor | None:
    """Return x of a node that computes ``scale * x + shift`` with constants, or None."""
    if node.domain or not node.inputs:  # none: a pass has cut it off
        return None
    if node.op in {"BatchNormalization", "Neg"}:
        return node.inputs[0]
    if node.op not in {"Mul", "Div", "Add", "Sub"}:
        return None
    left, right = node.inputs
    if isinstance(left, gs.Constant) == isinstance(right, gs.Constant):
        return None
    if isinstance(right, gs.Constant):
        return left
    return None if node.op == "Div" else right


def affine_of(node: gs.Node, channels: Channels, opset: int) -> Affine:
    """Return what ``node`` does to each channel of its x, see `variable_of`.

    Raises:
        Refused: If it is not the same for all elements of a channel.
    """
    if node.op == "BatchNormalization":
        return _normalisation(node, channels, opset)
    if node.op == "Neg":
        return Affine(scale=np.full(channels.count, -1.0))
    left, right = node.inputs
    constant = right if isinstance(right, gs.Constant) else left
    numbers = per_channel(constant, channels)
    if numbers is None:
        shape = list(constant.shape)
        raise Refused(f"the constant has shape {shape}: it is not one number per channel")
    match node.op:
        case "Mul":
            return Affine(scale=numbers)
        case "Div":
            with np.errstate(divide="ignore"):  # not finite: refused where it would be folded
                return Affine(scale=1 / numbers)
        case "Sub" if constant is left:
            return Affine(scale=np.full(channels.count, -1.0), shift=numbers)
        case "Sub":
            return Affine(shift=-numbers)
    return Affine(shift=numbers)


def per_channel(constant: gs.Constant, channels: Channels) -> Doubles | None:
    """Return a constant that broadcasts to a tensor as [count], or None where it does not.

    None stands for a constant that varies over another axis and for one that would make the tensor
    larger.
    """
    shape = tuple(constant.shape)
    if len(shape) > channels.rank:
        return None
    full = (1,) * (channels.rank - len(shape)) + shape
    extent = full[channels.axis]
    if extent not in (1, channels.count) or any(
        extent != 1 for axis, extent in enumerate(full) if axis != channels.axis
    ):
        return None
    numbers = constant.values.astype(np.float64).reshape(-1)
    return np.ascontiguousarray(np.broadcast_to(numbers, (channels.count,)))


def _normalisation(node: gs.Node, channels: Channels, opset: int) -> Affine:
    """Return what a BatchNormalization does, from its four constants."""
    if node.attrs.get("training_mode", 0) or any(t.name for t in node.outputs[1:]):
        raise Refused("the BatchNormalization is in training mode: it normalises by its own input")
    if opset < 9 and not node.attrs.get("spatial", 1):
        raise Refused("the BatchNormalization has statistics for each position (spatial=0)")
    if channels.axis != 1:
        raise Refused(
            f"the BatchNormalization works on axis 1, the channels are on axis {channels.axis}"
        )
    constants = node.inputs[1:5]
    if not all(isinstance(tensor, gs.Constant) for tensor in constants):
        raise Refused("the statistics of the BatchNormalization are computed at run time")
    if any(tuple(tensor.shape) != (channels.count,) for tensor in constants):
        raise Refused("the BatchNormalization's constants are not one number per channel")
    gamma, beta, mean, variance = (tensor.values.astype(np.float64) for tensor in constants)
    spread = variance + node.attrs.get("epsilon", 1e-5)
    if not (spread > 0).all():
        raise Refused("a variance of the BatchNormalization is negative or not a number")
    scale = gamma / np.sqrt(spread)
    return Affine(scale, beta - mean * scale)
