r"""Merge nodes that compute the same, and constants that hold the same.

    before                     after

        x                          x
       / \                         |
    Relu  Relu                   Relu
     |     |                      / \
    Exp   Neg                  Exp   Neg

Why it holds: the same deterministic operator with the same attributes and the same inputs gives the
same outputs. Constants are the same where dtype, shape and every byte are.

Keeps: names that must stay; where both nodes make one, they are not merged. Nodes with bodies are
not compared, nor is a Conv that a BatchNormalization is to go into: it is compared when it has.
Constants are merged within a graph, large ones also across bodies. The values of a constant are read
only where another has its dtype and shape.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import AttributeProto

from optc.passes.contract import Facts, Pass, Report
from optc.passes.determinism import is_deterministic
from optc.passes.graph import StoredValues, all_bodies, bodies_of, redirect

LARGE_BYTES = 64 * 1024
"""Constants beyond this are shared by a graph and its bodies; smaller ones stay where they are read."""

SAMPLE_BYTES = 256
"""Constants are told apart by this many bytes of their ends before all of their bytes are read."""


class MergeCommonSubexpressions(Pass):
    """Merge nodes that compute the same, and constants that hold the same."""

    name = "merge-common-subexpressions"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Merge what is the same in ``graph``."""
        report = Report()
        for reader in _merge_constants(graph, facts):
            report.merged[reader] = (reader,)
        first_of: dict[Hashable, gs.Node] = {}
        for node in graph.nodes:
            if bodies_of(node) or not is_deterministic(node) or _is_normalised(node):
                continue
            first = first_of.setdefault(_signature(node), node)
            if first is node:
                continue
            if _both_kept(first, node, facts):
                report.skipped[node.name] = (
                    f"it computes what `{first.name}` does under another name"
                )
                continue
            _merge(first, node, facts)
            report.merged[first.name] = (*report.merged.get(first.name, (first.name,)), node.name)
        gone = {name for names in report.merged.values() for name in names[1:]}
        if gone:
            graph.nodes = [node for node in graph.nodes if node.name not in gone]
        return report


def _is_normalised(node: gs.Node) -> bool:
    """Whether a BatchNormalization goes into ``node``, which is not to be shared then."""
    readers = node.outputs[0].outputs
    return node.op == "Conv" and len(readers) == 1 and readers[0].op == "BatchNormalization"


def _signature(node: gs.Node) -> Hashable:
    """Return what two nodes that compute the same have in common, and no others."""
    return (
        node.op,
        node.domain or "",
        tuple(id(tensor) if tensor.name else None for tensor in node.inputs),
        tuple(bool(tensor.name) for tensor in node.outputs),
        tuple(sorted((name, _comparable(value)) for name, value in node.attrs.items())),
    )


def _comparable(value: Any) -> str:
    """Return an attribute's value as text that tells 1 from 1.0, and 0.0 from -0.0."""
    if isinstance(value, gs.Constant):
        array = np.asarray(value.values)
        return f"{array.dtype} {array.shape} {_digest(array)}"
    if isinstance(value, AttributeProto):
        return str(value.SerializeToString(deterministic=True))
    return repr(value)


def _both_kept(first: gs.Node, second: gs.Node, facts: Facts) -> bool:
    return any(
        facts.is_kept(a) and facts.is_kept(b)
        for a, b in zip(first.outputs, second.outputs, strict=True)
    )


def _merge(first: gs.Node, second: gs.Node, facts: Facts) -> None:
    """Let the readers of ``second`` read ``first``, and take over the names that must stay."""
    outputs = list(second.outputs)
    second.outputs.clear()
    second.inputs.clear()
    for index, tensor in enumerate(outputs):
        if not tensor.name:
            continue
        if facts.is_kept(tensor):
            replaced = first.outputs[index]
            first.outputs[index] = tensor
            redirect(replaced, tensor)
        else:
            redirect(tensor, first.outputs[index])


# --- constants -----------------------------------------------------------------------------------


def _merge_constants(graph: gs.Graph, facts: Facts) -> Iterator[str]:
    """Share constants that hold the same; yield the names of the nodes that read another now."""
    alike: defaultdict[Hashable, list[gs.Constant]] = defaultdict(list)
    for constant in _constants(graph):
        if not facts.is_kept(constant):  # the name of an output stays, and its values with it
            alike[np.dtype(constant.dtype), tuple(constant.shape)].append(constant)
    for candidates in alike.values():
        for same in _groups(candidates):
            first, *others = same
            for other in others:
                readers = [node.name for node in other.outputs]
                redirect(other, first)
                yield from readers


def _constants(graph: gs.Graph) -> list[gs.Constant]:
    """Return the constants that may be shared in ``graph``, in the order they are read."""
    found: dict[int, gs.Constant] = {}
    for part in (graph, *all_bodies(graph)):
        for node in part.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant) and (
                    part is graph or tensor._values.nbytes > LARGE_BYTES
                ):
                    found[id(tensor)] = tensor
    return list(found.values())


def _groups(candidates: list[gs.Constant]) -> Iterator[list[gs.Constant]]:
    """Yield groups, of two and more, of the constants whose bytes are the same."""
    groups = [candidates]
    for key in (_sample, _all):
        finer: list[list[gs.Constant]] = []
        for group in groups:
            if len(group) < 2:
                continue
            by_key: defaultdict[Hashable, list[gs.Constant]] = defaultdict(list)
            for constant in group:
                by_key[key(constant)].append(constant)
            finer += by_key.values()
        groups = finer
    return (group for group in groups if len(group) > 1)


def _sample(constant: gs.Constant) -> Hashable:
    stored = constant._values
    if stored.nbytes <= SAMPLE_BYTES and np.dtype(stored.dtype).kind != "O":
        raw = stored.tensor.raw_data if isinstance(stored, StoredValues) else b""
        return raw or _loaded(constant).tobytes()
    values = _loaded(constant).reshape(-1)
    count = max(1, SAMPLE_BYTES // max(1, values.itemsize))
    return _digest(values[:count]), _digest(values[-count:])


def _all(constant: gs.Constant) -> Hashable:
    if constant._values.nbytes <= SAMPLE_BYTES and np.dtype(constant.dtype).kind != "O":
        return 0  # all of it was compared
    return _digest(_loaded(constant))


def _loaded(constant: gs.Constant) -> np.ndarray[Any, Any]:
    """Return the values without keeping them in memory."""
    stored = constant._values
    return np.asarray(stored if isinstance(stored, np.ndarray) else stored.load())


def _digest(values: np.ndarray[Any, Any]) -> Hashable:
    """Return a hash of every byte; strings, which are no bytes in numpy, as they are."""
    if values.dtype == object:
        return tuple(values.ravel().tolist())
    return hashlib.blake2b(
        np.ascontiguousarray(values).view(np.uint8).data, digest_size=16
    ).digest()
