r"""Fold a constant Mul, Div, Add, Sub or Neg per channel into the BatchNormalization beside it.

    before                                  after

    x   gamma beta mean var                 x   s*gamma  s*beta+t  mean var
     \    |    |    |   /                    \     |        |       |   /
     BatchNormalization   s                  BatchNormalization
                      \  /                           |
                       Mul   t                       y
                         \  /
                         Add
                          |
                          y

Why it holds: with d = sqrt(var + epsilon) a BatchNormalization is gamma * (x - mean) / d + beta. What
comes behind it, s * ... + t, makes gamma s * gamma and beta s * beta + t. What comes before it, with
s * x + t in the place of x, gives

    s * gamma * (x - mean) / d  +  (beta + gamma * (s * mean + t - mean) / d)

A BatchNormalization beside another one is such a scale and shift, too. Equal up to rounding: gamma
and beta are computed in float64 and rounded once. Caffe's models have such a Mul and Add behind each;
where a Conv takes up the BatchNormalization, it takes up these too.

Needs: s, t and the four constants of the BatchNormalization.
Keeps: the names of the BatchNormalization and y.
Skips, with the reason in the report: training mode; a value between the two that another node or the
caller reads; a Mul or Add that makes what it reads larger, or may do so; constants that vary over
another axis; gamma or beta that would leave the range of their type.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.affine import Channels, Doubles, Refused, affine_of, variable_of
from optc.passes.contract import Facts, Pass, Report
from optc.passes.graph import detach, producer
from optc.passes.linear import NOTHING, limits

NEIGHBOURS = frozenset({"Add", "BatchNormalization", "Div", "Mul", "Neg", "Sub"})


class FoldAffineIntoBatchnorm(Pass):
    """Fold ``Add(Mul(BatchNormalization(x), s), t)`` into the BatchNormalization; also before it."""

    name = "fold-affine-into-batchnorm"
    exactness = "equal up to rounding of scale and shift"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Fold what can be folded in ``graph``."""
        report = Report()
        norms = facts.nodes("BatchNormalization")
        own = {id(node) for node in graph.nodes} if norms else set()
        for norm, find in [(norm, find) for norm in norms for find in (_follower, _leader)]:
            while (neighbour := find(norm)) is not None and id(neighbour) in own:
                try:
                    _fold(norm, neighbour, facts)
                except Refused as refused:
                    report.skipped[neighbour.name] = str(refused)
                    break
                stands_for = report.merged.pop(neighbour.name, (neighbour.name,))
                report.merged[norm.name] = (
                    *report.merged.get(norm.name, (norm.name,)),
                    *stands_for,
                )
        return report


def _leader(norm: gs.Node) -> gs.Node | None:
    """Return the node before ``norm`` if it scales and shifts by constants."""
    before = producer(norm.inputs[0]) if norm.inputs else None
    if before is None or before.op not in NEIGHBOURS or variable_of(before) is None:
        return None
    return before


def _follower(norm: gs.Node) -> gs.Node | None:
    """Return the node behind ``norm`` if it scales and shifts by constants."""
    if not norm.outputs:
        return None
    for reader in norm.outputs[0].outputs:
        if reader.op in NEIGHBOURS and variable_of(reader) is norm.outputs[0]:
            found: gs.Node = reader
            return found
    return None


def _fold(norm: gs.Node, neighbour: gs.Node, facts: Facts) -> None:
    """Fold ``neighbour`` into ``norm`` and cut it off.

    Raises:
        Refused: If that would change a result.
    """
    is_leader = norm.inputs[0] is neighbour.outputs[0]
    first = neighbour if is_leader else norm
    if facts.is_shared(first.outputs[0]):
        raise Refused(f"the {first.op} output has another reader")
    x = variable_of(first)
    dims = None if x is None else facts.shapes.dims(x.name)
    count = int(np.prod(norm.inputs[1].shape)) if norm.inputs[1].shape else 0
    if x is None or dims is None or len(dims) < 2 or dims[1] != count:
        raise Refused(f"the channels that the {first.op} reads are not known")
    channels = Channels(count, axis=1, rank=len(dims))
    own = affine_of(norm, channels, facts.opset)
    other = affine_of(neighbour, channels, facts.opset)
    gamma, beta, mean = (t.values.astype(np.float64) for t in norm.inputs[1:4])
    scale = np.ones(count) if other.scale is None else other.scale
    shift = np.zeros(count) if other.shift is None else other.shift
    with np.errstate(all="ignore"):  # what is not finite then is refused
        if is_leader:
            beta = beta + own.scale * (scale * mean + shift - mean)
        else:
            beta = beta * scale + shift
        gamma = gamma * scale
    numbers = [_rounded(gamma, norm.inputs[1]), _rounded(beta, norm.inputs[2])]
    for index, values in enumerate(numbers, start=1):
        norm.inputs[index] = gs.Constant(
            facts.fresh_name(f"{norm.name}.{'scale' if index == 1 else 'bias'}"), values
        )
    output = neighbour.outputs[0]
    detach(neighbour)
    if is_leader:
        norm.inputs[0] = x
    else:
        norm.outputs = [output]


def _rounded(numbers: Doubles, like: gs.Constant) -> Doubles:
    """Return ``numbers`` in the type of ``like``.

    Raises:
        Refused: If that cannot hold them.
    """
    dtype = np.dtype(like.dtype)
    smallest, largest = limits(dtype)
    size = np.abs(numbers)
    if not (size <= largest).all() or ((size < smallest) & (size > NOTHING)).any():
        raise Refused(f"the folded constants do not fit {dtype.name}")
    rounded: Doubles = numbers.astype(dtype)
    return rounded
