r"""Fuse an instance normalisation that is spelt out, in whole or in part, into one operator.

    before                                       after

    x                                            x  scale  bias
    |\                                            \   |   /
    | ReduceMean                            InstanceNormalization
    |/                                                |
    Sub ___                                           y
    |      \
    |      Pow (2)
    |      ReduceMean
    |      Add (epsilon)
    |      Sqrt
    |     /
    Div
    |
    Mul (scale)
    Add (bias)
    |
    y

Why it holds: this is the definition of InstanceNormalization, the means being taken over all axes
behind the channels, scale and bias holding one number per channel. The variations met are those of
fuse-layer-normalization, to which it is left where a LayerNormalization says the same: one fixed axis
and no number per channel, or a scale that varies along the axes normalised over.

    before                                       after

    x                                            x  s*scale  b*scale+bias
    |                                             \    |    /
    Reshape (to [N, C, ...])                InstanceNormalization
    InstanceNormalization (s, b)                      |
    Reshape (back)                                    y
    Mul (scale)
    Add (bias)
    |
    y

Why it holds: a Reshape that keeps the extents of the first two axes keeps the elements of each
channel together, and mean and variance do not ask how they are arranged; what follows is one
multiplication and one addition per channel, as the end of the operator is. The Reshapes, the Mul or
the Add may be missing. Equal up to rounding: new constants are computed in float64 and rounded once.

A group normalisation is left as PyTorch exports it: Reshape to [N, groups, -1], InstanceNormalization,
Reshape, Mul, Add; one that is spelt out comes to the same. GroupNormalization is not used: its
definition computes the variance as mean(x ** 2) - mean(x) ** 2, and a runtime without a kernel of its
own for it computes just that. In float32 the result is then off by 2e-4 where the mean is 10 times
the standard deviation, by 2e-2 where it is 100 times.

Needs: a fixed number of channels; constants; an epsilon above 0.
Keeps: y and its name. A scale of ones and a bias of zeros are made where there are none.
Skips, with the reason in the report: a value on the way that another node or the caller reads; a
Cast within, as the operator computes in the type of its input; bfloat16, which it takes since opset 22
only; float64; new constants that leave the range of their type.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.affine import Array, Channels, Doubles, Refused, per_channel
from optc.passes.contract import Facts, Pass, Report
from optc.passes.match import are_private, become, made_by, names_of
from optc.passes.normalization import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Fit,
    Normalization,
    normalizations,
    spread_over,
)
from optc.passes.opset import OLDEST

SMALLEST = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}
"""Type -> the smallest number that it holds with all its digits."""


class FuseInstanceNormalization(Pass):
    """Fuse a normalisation of each channel, with scale and bias, into InstanceNormalization."""

    name = "fuse-instance-normalization"
    group = "fuse"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fuse what can be fused in ``graph``."""
        report = Report()
        if facts.opset < OLDEST:  # Mul and Add broadcast by attributes of their own
            return report
        for node in facts.nodes("InstanceNormalization"):
            source, epsilon = node.inputs[0], node.attrs.get("epsilon", 1e-5)
            _attempt(_widened, Normalization(source, source, [], epsilon, [node]), facts, report)
        for found in normalizations(facts, centred=True):
            _attempt(_fused, found, facts, report)
        return report


def _attempt(
    rewrite: Callable[[Normalization, Facts], bool],
    found: Normalization,
    facts: Facts,
    report: Report,
) -> None:
    try:
        if rewrite(found, facts):
            report.merged[found.nodes[-1].name] = names_of(*found.nodes)
    except Refused as refusal:
        report.skipped[found.nodes[-1].name] = str(refusal)


def _fused(found: Normalization, facts: Facts) -> bool:
    """Let a core over all axes behind the channels be the operator, unless another does better."""
    dims = facts.shapes.dims(found.x.name)
    if dims is None or len(dims) < 3 or not isinstance(dims[1], int):
        return False
    found.measure(facts)
    axes, fit = tuple(range(2, len(dims))), _per_channel(found, dims[1])
    if found.axes(facts) != axes or not found.fits(fit):
        return False
    found.take_affine(facts, fit)
    constants = [constant for constant in (found.scale, found.bias) if constant is not None]
    if all(np.prod(constant.shape) == 1 for constant in constants) and _is_layer(found, facts):
        return False
    found.require_exact(facts)
    if found.stash != found.dtype:
        raise Refused("it casts on the way, the operator computes in the type of its input")
    if found.dtype not in (FLOAT16, FLOAT32) and not (
        found.dtype == BFLOAT16 and facts.opset >= 22
    ):
        raise Refused(f"the operator does not take {found.dtype.name}")
    scale, bias = _numbers(found, dims[1])
    _replace(found, _constant(found, scale, "scale", facts), _constant(found, bias, "bias", facts))
    return True


def _is_layer(found: Normalization, facts: Facts) -> bool:
    """Whether a LayerNormalization does as well, or takes in more of what is behind."""
    extents = tuple(dim for dim in found.dims[2:] if isinstance(dim, int) and dim)
    rank = len(found.dims)
    if len(extents) + 2 != rank:
        return False
    behind = [reader for op in ("Mul", "Add") if (reader := found.reader(op, facts)) is not None]
    return len(extents) == 1 or any(
        isinstance(tensor, gs.Constant) and spread_over(tensor, extents, rank) is not None
        for reader in behind
        for tensor in reader.inputs
    )


def _widened(found: Normalization, facts: Facts) -> bool:
    """Let an InstanceNormalization take in the Reshapes around it, and what follows by channel."""
    [node] = found.nodes
    if all(found.reader(op, facts) is None for op in ("Reshape", "Mul", "Add")):
        return False
    found.measure(facts)
    _take_reshapes(found, facts)
    _, scale, bias = node.inputs
    count = found.dims[1] if len(found.dims) > 2 else None
    if isinstance(count, int) and all(
        isinstance(tensor, gs.Constant) and tuple(tensor.shape) == (count,)
        for tensor in (scale, bias)
    ):
        found.take_affine(facts, _per_channel(found, count))
    if len(found.nodes) == 1:
        return False
    if found.scale is not None or found.bias is not None:
        scale, bias = _composed(found, scale, bias, facts)
    _replace(found, scale, bias)
    return True


def _take_reshapes(found: Normalization, facts: Facts) -> None:
    """Go on to a Reshape before that keeps the channels and one behind that undoes it."""
    before, behind = made_by(found.x, "Reshape"), found.reader("Reshape", facts)
    if before is None or behind is None:
        return
    source = before.inputs[0]
    dims = facts.shapes.dims(source.name)
    if dims is None or len(dims) < 3 or dims[:2] != found.dims[:2]:
        return
    if facts.shapes.dims(behind.outputs[0].name) != dims:
        return
    if are_private([before], facts, within=found.nodes):
        found.x, found.dims = source, dims
        found.nodes = [before, *found.nodes, behind]


def _composed(
    found: Normalization, scale: gs.Constant, bias: gs.Constant, facts: Facts
) -> tuple[gs.Tensor, gs.Tensor]:
    """Return scale and bias of a node with those found behind it applied to them."""
    factor, summand = _numbers(found, scale.shape[0])
    with np.errstate(all="ignore"):  # what is not finite is refused
        new_bias = np.asarray(bias.values, np.float64) * factor + summand
        new_scale = np.asarray(scale.values, np.float64) * factor
    return (
        scale if found.scale is None else _constant(found, new_scale, "scale", facts),
        _constant(found, new_bias, "bias", facts),
    )


def _per_channel(found: Normalization, count: int) -> Fit:
    """Return what gives a constant the shape [count] if it meets the channels of the result."""

    def fit(constant: gs.Constant) -> Array | None:
        return per_channel(constant, Channels(count, axis=1, rank=len(found.dims)))

    return fit


def _numbers(found: Normalization, count: int) -> tuple[Doubles, Doubles]:
    """Return scale and bias of what was found as one number per channel each."""
    fit = _per_channel(found, count)
    scale = np.ones(count) if found.scale is None else fit(found.scale)
    bias = np.zeros(count) if found.bias is None else fit(found.bias)
    assert scale is not None, "take_affine() takes what fits"
    assert bias is not None, "take_affine() takes what fits"
    return scale, bias


def _constant(found: Normalization, numbers: Doubles, what: str, facts: Facts) -> gs.Constant:
    """Return a new constant of the type of the result.

    Raises:
        Refused: If that cannot hold the numbers, or only with fewer digits.
    """
    with np.errstate(all="ignore"):  # what is not finite is refused
        values = numbers.astype(found.dtype)
    lost = values.astype(np.float64) != numbers
    is_small = np.abs(numbers) < SMALLEST[found.dtype.name]
    if not np.isfinite(values.astype(np.float64)).all() or (lost & is_small).any():
        raise Refused(f"the new {what} does not fit {found.dtype.name}")
    return gs.Constant(facts.fresh_name(f"{found.y.name}_{what}"), values)


def _replace(found: Normalization, scale: gs.Tensor, bias: gs.Tensor) -> None:
    attrs = {"epsilon": found.epsilon}
    become(found.nodes[-1], "InstanceNormalization", [found.x, scale, bias], attrs)
