r"""Fold a constant Pad into the convolution or the pooling behind it.

    before                      after

    x                           x   W
    |                            \ /
    Pad   W                     Conv (with the pads of both)
       \ /                        |
      Conv                        y
        |
        y

Why it holds: a Conv pads with zeros itself, an AveragePool that counts its padding does, and a
MaxPool pads with what no element is below. So a Pad of zeros goes into a Conv, a ConvInteger without a
zero point and an AveragePool, which then counts its padding; and a Pad of the lowest number goes into
a MaxPool, or one of zeros where x is known to have no element below 0. Where several read what is
padded, it goes into all of them. Exact: the same numbers meet.

Needs: pads that are the same in every run, none below 0, of spatial axes only.
Keeps: the names of the Conv and y.
Skips, with the reason in the report: a value that the Conv or pooling does not pad with; pads that
other axes have or that cut off; a padded value that any other node or the caller reads; auto_pad;
ceil_mode, dilations, indices, and pads not smaller than the window, of a pooling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.affine import Refused
from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import Array, detach, producer, redirect
from optc.passes.match import argument, number

WINDOWS = frozenset({"AveragePool", "Conv", "ConvInteger", "MaxPool"})
NEVER_NEGATIVE = frozenset({"Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Sqrt"})


class FoldPadIntoConv(Pass):
    """Fold ``Conv(Pad(x), W)`` into ``Conv(x, W)`` with pads; also ConvInteger and pooling."""

    name = "fold-pad-into-conv"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        report = Report()
        own: set[int] | None = None
        for pad in reversed(facts.nodes("Pad")):  # of two in a row the last one goes first
            padded = pad.outputs[0]
            readers = list({id(node): node for node in padded.outputs}.values())
            if not any(_is_window(node, padded) for node in readers):
                continue
            own = own or {id(node) for node in graph.nodes}
            try:
                if facts.is_kept(padded) or not all(
                    _is_window(node, padded) and id(node) in own for node in readers
                ):
                    raise Refused("what it pads has another reader")
                padding = _padding_of(pad, facts)
                attrs = [_padded(node, padding, facts) for node in readers]
            except Refused as refused:
                report.skipped[pad.name] = str(refused)
                continue
            for node, changed in zip(readers, attrs, strict=True):
                node.attrs.update(changed)
                node.attrs.pop("auto_pad", None)
                report.merged[node.name] = (pad.name, *report.merged.get(node.name, (node.name,)))
            redirect(padded, pad.inputs[0])
            detach(pad)
        return report


@dataclass(frozen=True, slots=True)
class _Padding:
    """What a Pad does.

    Attributes:
        x: What it pads.
        pads: Elements before and behind each spatial axis, in the order that a Conv wants.
        value: What it pads with; NaN where that is not known.
    """

    x: gs.Tensor
    pads: tuple[int, ...]
    value: float


def _is_window(node: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether ``node`` moves a window over ``tensor``."""
    return (
        node.op in WINDOWS
        and not node.domain
        and node.inputs[0] is tensor
        and not any(read is tensor for read in node.inputs[1:])
    )


def _padding_of(pad: gs.Node, facts: Facts) -> _Padding:
    """Return what ``pad`` does.

    Raises:
        Refused: If that is more than a pooling or Conv can do.
    """
    x = pad.inputs[0]
    if pad.attrs.get("mode", "constant") != "constant":
        raise Refused("it does not pad with a constant")
    if "pads" in pad.attrs:  # before opset 11
        pads, value = np.array(pad.attrs["pads"]), float(pad.attrs.get("value", 0.0))
    else:
        pads = _constant(pad, 1, facts)
        fill = argument(pad, 2)
        found = 0.0 if fill is None else number(fill)
        value = math.nan if found is None else found
    axes = None if argument(pad, 3) is None else _constant(pad, 3, facts)
    if axes is None:
        rank = len(pads) // 2
        axes = np.arange(rank)
    else:
        dims = facts.shapes.dims(x.name)
        if dims is None:
            raise Refused("the rank of what it pads is not known")
        rank = len(dims)
    before, behind = np.zeros((2, rank), np.int64)
    for axis, low, high in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        before[int(axis)], behind[int(axis)] = low, high
    if (before < 0).any() or (behind < 0).any():
        raise Refused("it cuts off elements")
    if before[:2].any() or behind[:2].any():
        raise Refused("it pads the batch or the channels")
    return _Padding(x, (*before[2:].tolist(), *behind[2:].tolist()), value)


def _constant(node: gs.Node, index: int, facts: Facts) -> Array:
    found = facts.constant(argument(node, index))
    if found is None:
        raise Refused("its pads are computed at run time")
    return found


def _padded(node: gs.Node, padding: _Padding, facts: Facts) -> dict[str, Any]:
    """Return the attributes with which ``node`` pads as well.

    Raises:
        Refused: If there are none.
    """
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Refused(f"the {node.op} chooses its pads itself (auto_pad)")
    own = node.attrs.get("pads") or [0] * len(padding.pads)
    pads = [one + other for one, other in zip(own, padding.pads, strict=True)]
    if node.op in ("AveragePool", "MaxPool"):
        _require_plain_pooling(node, pads)
    changed: dict[str, Any] = {"pads": pads}
    match node.op:
        case "AveragePool":
            if any(own) and not node.attrs.get("count_include_pad", 0):
                raise Refused("the AveragePool does not count its own padding")
            fits = padding.value == 0
            changed["count_include_pad"] = 1
        case "MaxPool":
            fits = padding.value <= _lowest(padding.x, facts) or (
                padding.value == 0 and _is_never_negative(padding.x)
            )
        case "ConvInteger":
            zero = argument(node, 2)
            has_zero = zero is None or (isinstance(zero, gs.Constant) and not zero.values.any())
            fits = padding.value == 0 and has_zero
        case _:
            fits = padding.value == 0
    if not fits:
        raise Refused(f"the {node.op} does not pad with {padding.value:g}")
    return changed


def _require_plain_pooling(node: gs.Node, pads: list[int]) -> None:
    if node.attrs.get("ceil_mode", 0) or any(step != 1 for step in node.attrs.get("dilations", ())):
        raise Refused(f"the {node.op} has windows that end beyond the padding, or dilations")
    if any(tensor.name for tensor in node.outputs[1:]):
        raise Refused(f"the {node.op} returns where its results are from")
    window = node.attrs["kernel_shape"]
    if any(pad >= extent for pad, extent in zip(pads, (*window, *window), strict=True)):
        raise Refused(f"the {node.op} would have windows of padding alone")


def _lowest(tensor: gs.Tensor, facts: Facts) -> float:
    """Return the lowest number that the elements of ``tensor`` may be; NaN where not known."""
    dtype = facts.shapes.dtype(tensor.name)
    if dtype is None:
        return math.nan
    if dtype.kind in "iu":
        return float(np.iinfo(dtype).min)
    return float(ml_dtypes.finfo(dtype).min)  # type: ignore[no-untyped-call]


def _is_never_negative(tensor: gs.Tensor) -> bool:
    maker = producer(tensor)
    return maker is not None and maker.op in NEVER_NEGATIVE and not maker.domain
