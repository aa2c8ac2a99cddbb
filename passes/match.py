"""What passes that look for a pattern share: finding its parts, and putting one node in its place.

A pattern is searched from its last node backwards. The last node then *becomes* the fused one: it
keeps its name, its place and its outputs, and what only it read dies with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts
from optc.passes.graph import producer


def made_by(tensor: gs.Tensor | None, *ops: str) -> gs.Node | None:
    """Return the node of the default domain that makes ``tensor`` if it is one of ``ops``."""
    maker = None if tensor is None else producer(tensor)
    return maker if maker is not None and maker.op in ops and not maker.domain else None


def argument(node: gs.Node, index: int) -> gs.Tensor | None:
    """Return an input of ``node``, or None where it is omitted."""
    if index >= len(node.inputs) or not node.inputs[index].name:
        return None
    tensor: gs.Tensor = node.inputs[index]
    return tensor


def number(tensor: gs.Tensor | None) -> float | None:
    """Return the number that a constant of one element holds, whatever its rank; else None."""
    if not isinstance(tensor, gs.Constant) or int(np.prod(tensor.shape)) != 1:
        return None
    value = np.asarray(tensor.values)
    if value.dtype.kind in "OScV" and not _is_float(value):
        return None
    return float(value.reshape(-1)[0])


def _is_float(value: np.ndarray[Any, Any]) -> bool:
    return value.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")  # kind V to numpy


def is_number(tensor: gs.Tensor | None, wanted: float, *, rtol: float = 1e-3) -> bool:
    """Whether ``tensor`` is a constant of one element close to ``wanted``."""
    value = number(tensor)
    return value is not None and bool(abs(value - wanted) <= rtol * abs(wanted))


def either_way(node: gs.Node) -> tuple[tuple[gs.Tensor, gs.Tensor], tuple[gs.Tensor, gs.Tensor]]:
    """Return the two inputs of a commutative node in both orders."""
    first, second = node.inputs
    return (first, second), (second, first)


def are_private(nodes: Iterable[gs.Node], facts: Facts, *, within: Iterable[gs.Node]) -> bool:
    """Whether nothing but ``within`` reads what ``nodes`` make, and nothing keeps it.

    Only then do ``nodes`` die when the last node of the pattern is rewritten.
    """
    inside = {id(node) for node in within}
    return all(
        id(reader) in inside
        for node in nodes
        for tensor in node.outputs
        for reader in tensor.outputs
    ) and not any(facts.is_kept(tensor) for node in nodes for tensor in node.outputs)


def become(
    node: gs.Node, op: str, inputs: Sequence[gs.Tensor], attrs: Mapping[str, Any] | None = None
) -> None:
    """Let ``node`` be another one of the default domain. Name, place and outputs stay.

    What it read before and nothing else reads is removed when the pass is done.
    """
    node.op = op
    node.domain = ""
    node.attrs = dict(attrs or {})
    node.inputs.clear()
    node.inputs.extend(inputs)


def names_of(*nodes: gs.Node) -> tuple[str, ...]:
    """Return the names of ``nodes``, each once, as `Report.merged` wants them."""
    return tuple(dict.fromkeys(node.name for node in nodes))
