r"""Merge Concats that follow on one another, and Concats of parts of one tensor.

    before                              after

    x [batch, 56, 96]                   x
    |           |                       |
    Slice 3:    Slice :3                Gather 3, 4, ..., 55, 0, 1, 2 (axis 1)
     \         /                        |
      Concat (axis 1)                   y
      |
      y

Why it holds:
- a Concat of a Concat along the same axis is one Concat of all;
- parts of one tensor (what Split, Slice and Gather take along the axis) that are put together again
  are that tensor where they come in order and leave nothing out: it is put in their place;
- in another order, they are a Slice of that tensor where they count up in equal steps, else a Gather.
  So a roll, as window attention does along each axis, moves its data once instead of twice.
- Slices in steps of s that take every s-th element from each offset are, put together along another
  axis, a Reshape that makes axes of extent s, a Transpose that moves them, and a Reshape. So patch
  merging becomes three nodes in place of five.

Needs: the same axis; constant indices, and an extent that is a number. Whatever takes the parts must be
read by the Concat alone: else nothing would be saved.
Skips, with the reason in the report: a Gather of more than 4096 indices, or one that would copy less than
8 elements at a time: both take longer than what they replace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, permutations, product

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.dimension import Dim
from optc.passes.graph import detach
from optc.passes.match import are_private, argument, become, made_by, names_of
from optc.passes.movement import (
    SLICE_READS_CUTS,
    Cut,
    cut_of,
    cuts_of,
    integers,
    readers_of,
    reshape_target,
    sizes,
    write_cuts,
)
from optc.passes.replacement import Replacement

MOST_INDICES = 4096
"""A Gather with more of them would carry a large constant."""

SMALLEST_RUN = 8
"""Elements that a Gather has to copy at a time to be faster than Slices."""


class MergeConcats(Pass):
    """Merge Concats that follow on one another, and Concats of parts of one tensor."""

    name = "merge-concats"
    group = "clean"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Merge the Concats in ``graph``."""
        report = Report()
        concats = facts.nodes("Concat")
        here = {id(node) for node in graph.nodes}
        for first in concats:
            _flatten(first, readers_of(first.outputs[0], facts, here), facts, report)
        if facts.conditional:  # the extents at hand may belong to the other branch
            return report
        for node in concats:
            if node.inputs:
                _put_together(node, facts, report)
        for node in concats:
            if node.op == "Concat" and len(node.inputs) > 2:
                _to_depth(node, graph, facts, report)
        return report


def _flatten(first: gs.Node, readers: list[gs.Node], facts: Facts, report: Report) -> None:
    """Let each Concat that reads the Concat ``first`` read what it reads, if all of them can."""
    made = first.outputs[0]
    if not readers or not all(_is_same_axis(first, node, facts) for node in readers):
        return
    _ = facts.shapes  # inferred before anything changes
    for node in readers:
        inputs = [
            part
            for tensor in node.inputs
            for part in (first.inputs if tensor is made else (tensor,))
        ]
        node.inputs.clear()
        node.inputs.extend(inputs)
        report.merged[node.name] = names_of(first, node)
    detach(first)


def _axis_of(node: gs.Node, facts: Facts) -> int | None:
    """Return the axis of a node that makes tensors of known rank, from 0."""
    dims = facts.shapes.dims(node.outputs[0].name)
    axis = int(node.attrs.get("axis", 1 if node.op == "Concat" else 0))
    return axis % len(dims) if dims else None


def _is_same_axis(first: gs.Node, second: gs.Node, facts: Facts) -> bool:
    if second.op != "Concat" or second.domain:
        return False
    if first.attrs.get("axis", 1) == second.attrs.get("axis", 1):
        return True  # they have the same rank, as one is a part of the other
    axis = _axis_of(first, facts)
    return axis is not None and axis == _axis_of(second, facts)


# --- parts of one tensor -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """What an input of a Concat takes of a tensor along the axis of the Concat."""

    source: gs.Tensor
    extent: int
    indices: Sequence[int]
    maker: gs.Node


def _put_together(node: gs.Node, facts: Facts, report: Report) -> None:
    """Put a tensor in the place of all its parts, or take at once what they took one by one."""
    makers = [made_by(tensor, "Split", "Slice", "Gather") for tensor in node.inputs]
    if not any(makers) or (axis := _axis_of(node, facts)) is None:
        return
    parts = [
        None if maker is None else _part(tensor, maker, axis, facts)
        for tensor, maker in zip(node.inputs, makers, strict=True)
    ]
    inputs: list[gs.Tensor] = []
    gone: list[gs.Node] = []
    for _, group in groupby(
        zip(node.inputs, parts, strict=True), key=lambda pair: pair[1] and id(pair[1].source)
    ):
        members = list(group)
        run = [part for _, part in members if part is not None]
        indices = [index for part in run for index in part.indices]
        if run and indices == list(range(run[0].extent)):
            inputs.append(run[0].source)
            gone += [part.maker for part in run]
        elif len(run) == len(parts) > 1:
            _take_at_once(node, run, indices, axis, facts, report)
            return
        else:
            inputs += [tensor for tensor, _ in members]
    if gone:
        node.inputs.clear()
        node.inputs.extend(inputs)
        report.merged[node.name] = names_of(*gone, node)


def _part(tensor: gs.Tensor, maker: gs.Node, axis: int, facts: Facts) -> Part | None:
    """Return what ``tensor`` takes along ``axis``, and along no other one, of what ``maker`` reads."""
    source = maker.inputs[0]
    dims = facts.shapes.dims(source.name)
    if dims is None or axis >= len(dims) or not isinstance(extent := dims[axis], int):
        return None
    indices: Sequence[int] | None = None
    if maker.op == "Slice" and facts.opset >= SLICE_READS_CUTS:
        cuts = cuts_of(maker, facts.shapes) or {}
        if cuts.keys() == {axis}:
            indices = cuts[axis].indices(extent)
    elif maker.op == "Gather" and maker.attrs.get("axis", 0) % len(dims) == axis:
        given = integers(argument(maker, 1))
        if given is not None and all(-extent <= index < extent for index in given):
            indices = [index % extent for index in given]
    elif maker.op == "Split" and maker.attrs.get("axis", 0) % len(dims) == axis:
        start = 0
        for output in maker.outputs:
            made = facts.shapes.dims(output.name)
            if made is None or not isinstance(size := made[axis], int):
                return None
            if output is tensor:
                indices = range(start, start + size)
            start += size
    return None if indices is None else Part(source, extent, indices, maker)


def _take_at_once(
    node: gs.Node, parts: list[Part], indices: list[int], axis: int, facts: Facts, report: Report
) -> None:
    """Let ``node`` be the Slice or Gather that takes ``indices`` of what ``parts`` are of."""
    source, makers = parts[0].source, [part.maker for part in parts]
    if not indices or not are_private(makers, facts, within=[node]):
        return
    names = names_of(*makers, node)
    steps = {later - earlier for earlier, later in pairwise(indices)}
    if len(steps) == 1 and 0 not in steps and facts.opset >= SLICE_READS_CUTS:
        (step,) = steps
        become(node, "Slice", [source])
        write_cuts(node, {axis: cut_of(range(indices[0], indices[-1] + step, step))}, facts)
    elif reason := _why_slow(indices, facts.shapes.dims(source.name) or (), axis):
        report.skipped[node.name] = reason
        return
    else:
        become(
            node, "Gather", [source, sizes(facts, f"{node.name}_indices", indices)], {"axis": axis}
        )
    report.merged[node.name] = names


def _why_slow(indices: Sequence[int], dims: Sequence[Dim], axis: int) -> str | None:
    if len(indices) > MOST_INDICES:
        return f"a Gather would need more than {MOST_INDICES} indices"
    if math.prod(extent for extent in dims[axis + 1 :] if isinstance(extent, int)) < SMALLEST_RUN:
        return f"a Gather would copy less than {SMALLEST_RUN} elements at a time"
    return None


# --- every s-th element --------------------------------------------------------------------------


def _to_depth(node: gs.Node, graph: gs.Graph, facts: Facts, report: Report) -> None:
    """Spell out Slices in steps, put together along another axis, as Reshape and Transpose."""
    makers = [made_by(tensor, "Slice") for tensor in node.inputs]
    slices = [maker for maker in makers if maker is not None]
    axis = _axis_of(node, facts) if len(slices) == len(makers) else None
    if axis is None or facts.opset < SLICE_READS_CUTS:
        return
    source = slices[0].inputs[0]
    dims, goal = facts.shapes.dims(source.name), facts.shapes.dims(node.outputs[0].name)
    if dims is None or goal is None or any(n.inputs[0] is not source for n in slices):
        return
    steps, order = _grid([cuts_of(n, facts.shapes) or {} for n in slices], dims)
    if not steps or axis in steps or not are_private(slices, facts, within=[node]):
        return
    split: list[Dim] = []
    place: dict[int, int] = {}  # axis of the source -> where it is among those of `split`
    for old, extent in enumerate(dims):
        place[old] = len(split)
        split += [extent // steps[old], steps[old]] if old in steps else [extent]
    perm = [place[old] for old in range(len(dims))]
    perm[axis:axis] = [place[old] + 1 for old in order]
    there = reshape_target(dims, split, facts.shapes)
    back = reshape_target([split[at] for at in perm], goal, facts.shapes)
    if there is None or back is None:
        report.skipped[node.name] = "only the run knows the sizes that a Reshape would have to say"
        return
    new = Replacement(graph, facts, node, others=tuple(slices))
    parted = new.add("Reshape", source, np.array(there, np.int64))
    moved = new.add("Transpose", parted, perm=perm)
    new.finish(report, new.add("Reshape", moved, np.array(back, np.int64)))


def _grid(
    taken: list[dict[int, Cut]], dims: Sequence[Dim]
) -> tuple[dict[int, int], tuple[int, ...]]:
    """Return the steps by axis, and the axes slowest first, if every offset comes once, in order.

    Else nothing: an empty mapping.
    """
    nothing: tuple[dict[int, int], tuple[int, ...]] = ({}, ())
    axes = tuple(taken[0])
    steps = {axis: cut.step for axis, cut in taken[0].items()}
    if math.prod(steps.values()) != len(taken) or min(steps.values(), default=0) < 2:
        return nothing
    offsets = []
    for cuts in taken:
        if cuts.keys() != steps.keys():
            return nothing
        for axis, cut in cuts.items():
            extent, step = dims[axis], steps[axis]
            if not isinstance(extent, int) or extent % step or cut.start < 0:
                return nothing
            if cut.indices(extent) != range(cut.start, extent, step):
                return nothing
        offsets.append({axis: cut.start for axis, cut in cuts.items()})
    for order in permutations(axes):
        counted = product(*(range(steps[axis]) for axis in order))
        if [tuple(at[axis] for axis in order) for at in offsets] == list(counted):
            return steps, order
    return nothing
