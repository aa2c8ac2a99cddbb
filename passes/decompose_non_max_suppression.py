r"""Spell NonMaxSuppression out as a matrix of who suppresses whom, and one selection after the other.

    before                      after

    boxes  scores               boxes                 scores
        \  /                      |                     |
    NonMaxSuppression           leaves (i, j):        key: 1 for the last in the order, 0 for
        |                       i and j may both      | \  none; below, of boxes that are left
     selected                   be selected           |  TopK: the best
                                        \             |   |
                                         Gather: its row  |
                                               \      |   |
                                                Mul: key  |     ... as often as may be selected
                                                          |
                                        those with a key that is not 0: selected

Why it holds: it is what NonMaxSuppression is defined to do. The best box is selected, and those that
it overlaps too much are out, itself among them; again with those that are left. The order: score
downwards, the lower index first among equal scores; in the result batch, then class, then that order.

Exact, in the very operations of ONNX Runtime: overlap is intersection over union, of float32, above the
threshold; a box without area neither suppresses nor is suppressed. The order of scores that are NaN is
not defined; here they come last, and below every score threshold.

It is unrolled, as TensorRT for RTX builds no Loop beside an extent that the data decides. As often as
may be selected is at most: the number of boxes, the most per class where that is constant, and the end
of a Slice that is all that reads the result, of one batch and class. It costs four nodes for each, up
to 512, and a number for each pair of boxes, up to 67,108,864; more is left to the fallback.

Needs: the main graph, as an If in a body may not change its extent; a number of classes that is known;
a bound on the number of batches and boxes. Where it is not known how many boxes there are, as many are
added behind them as there may be, which are no candidates.
Keeps: names of the result.
Skips, with the reason in the report: a NonMaxSuppression in a body; extents that are not known, or that
nothing bounds; too many boxes, or too many to select.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.data_extent import SCALAR, first, partition, total
from optc.passes.graph import Array
from optc.passes.match import argument
from optc.passes.movement import axes_of
from optc.passes.replacement import Operand, Replacement

MOST_PAIRS = 1 << 26
"""A matrix of more pairs of boxes would be larger than what the rest of a detector takes."""

MOST_ROUNDS = 512
"""Of more selections, each waiting for the one before, the fallback is as fast."""

OPSET = 13
"""From this version on all operators used here are as they are written here."""

FLAT = np.array([-1], np.int64)
"""What a Reshape to one axis wants."""


class DecomposeNonMaxSuppression(Pass):
    """Spell NonMaxSuppression out as one selection after the other."""

    name = "decompose-non-max-suppression"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Spell out every NonMaxSuppression of ``graph``."""
        report = Report()
        for node in facts.nodes("NonMaxSuppression"):
            sizes = _sizes(node, facts)
            if isinstance(sizes, str):
                report.skipped[node.name] = sizes
                continue
            new = Replacement(graph, facts, node)
            new.finish(report, _Spelling(new, sizes).selected())
        return report


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Extents of a NonMaxSuppression.

    Attributes:
        batches: How many at most.
        is_one_batch: Whether it is always one.
        classes: How many.
        boxes: How many of each batch, at most.
        is_exact: Whether there are always as many boxes.
        rounds: How many may be selected of each class.
    """

    batches: int
    is_one_batch: bool
    classes: int
    boxes: int
    is_exact: bool
    rounds: int


def _sizes(node: gs.Node, facts: Facts) -> _Sizes | str:
    """Return the extents of ``node``, or why it stays."""
    if facts.in_body:
        return "it is in a body, where TensorRT lets no data decide an extent"
    boxes, scores = (facts.shapes.dims(tensor.name) for tensor in node.inputs[:2])
    if boxes is None or scores is None or len(boxes) != 3 or len(scores) != 3:
        return "its shapes are not known"
    classes = scores[1]
    if not isinstance(classes, int) or classes == 0:
        return "the number of its classes is not known"
    batches, count = (facts.shapes.interval(dim)[1] for dim in boxes[:2])
    if math.isinf(batches) or math.isinf(count):
        return "nothing bounds the number of its boxes"
    if batches * count**2 > MOST_PAIRS:
        return f"it may compare {int(batches * count**2)} pairs of boxes"
    batches, count = max(1, int(batches)), max(1, int(count))
    rounds = min(count, _most(node))
    if batches == classes == 1:
        rounds = min(rounds, _read_up_to(node, facts))
    if rounds > MOST_ROUNDS:
        return f"it may select {rounds} boxes of each class, one after the other"
    if not facts.reach_opset(OPSET):
        return f"the model cannot be raised to opset {OPSET}"
    is_exact = isinstance(boxes[1], int) and boxes[1] > 0
    return _Sizes(batches, boxes[0] == 1, classes, count, is_exact, int(rounds))


def _most(node: gs.Node) -> float:
    """Return how many may be selected of each class; none where it is not said."""
    most = argument(node, 2)
    if most is None:
        return 0
    return int(most.values.reshape(-1)[0]) if isinstance(most, gs.Constant) else math.inf


def _read_up_to(node: gs.Node, facts: Facts) -> float:
    """Return how many rows of the result its readers look at."""
    tensor = node.outputs[0]
    while not facts.is_shared(tensor):
        [reader] = tensor.outputs
        match reader.op:
            case "Gather" if reader.inputs[0] is tensor and reader.attrs.get("axis", 0) == 1:
                pass
            case "Squeeze" if axes_of(reader, facts) == [1]:
                pass
            case "Slice" if reader.inputs[0] is tensor:
                return _end(reader)
            case _:
                break
        tensor = reader.outputs[0]
    return math.inf


def _end(node: gs.Node) -> float:
    """Return where a Slice that starts with the first row ends; no limit where it is not plain."""
    parts = [argument(node, index) for index in range(1, 5)]
    if "ends" in node.attrs or any(p is not None and not isinstance(p, gs.Constant) for p in parts):
        return math.inf
    start, end, axes, steps = (None if p is None else p.values.reshape(-1).tolist() for p in parts)
    if start == [0] and axes in (None, [0]) and steps in (None, [1]) and end and end[0] >= 0:
        return int(end[0])
    return math.inf


class _Spelling:
    """The nodes of one NonMaxSuppression. In comments: batch b, class c, row r of both, boxes i and j."""

    def __init__(self, new: Replacement, sizes: _Sizes) -> None:
        self.new = new
        self.sizes = sizes
        self.boxes, self.scores = new.node.inputs[:2]

    def selected(self) -> gs.Tensor:
        """Return lines of batch, class and box, as many as are selected."""
        new, sizes = self.new, self.sizes
        candidate = self.candidates()
        if not sizes.is_exact:
            self.boxes = self.padded(self.boxes, 1)
            self.scores = self.padded(self.scores, 2)
        keys, best = self.rounds(self.leaves(), self.keys(candidate))
        if keys is None or best is None:
            return new.add("Expand", np.array([[0]], np.int64), np.array([0, 3], np.int64))
        is_selected = self.allowed(new.add("Greater", keys, np.float32(0)))
        flat = new.add("Reshape", is_selected, FLAT)
        order = partition(new, flat)
        count = total(new, new.cast(flat, np.int64))
        most = sizes.batches * sizes.classes * sizes.rounds
        found = first(new, order, count, most)
        return self.lines(found, new.add("Reshape", best, FLAT))

    def candidates(self) -> gs.Tensor:
        """Return which scores are above the threshold, (b, c, i); added boxes are not."""
        new = self.new
        threshold = argument(new.node, 4)
        if threshold is not None:
            above = new.add("Greater", self.scores, new.add("Reshape", threshold, SCALAR))
        else:
            above = new.add("Expand", np.array([True]), new.add("Shape", self.scores))
        if self.sizes.is_exact:
            return above
        return new.cast(self.padded(new.cast(above, np.float32), 2), np.bool_)

    def padded(self, tensor: gs.Tensor, axis: int) -> gs.Tensor:
        """Return ``tensor`` with zeros behind, so that there are as many boxes as may be."""
        new, count = self.new, self.sizes.boxes
        pads = np.zeros(6, np.int64)
        pads[3 + axis] = count
        longer = new.add("Pad", tensor, pads)
        return new.add("Gather", longer, np.arange(count), axis=axis)

    def keys(self, candidate: gs.Tensor) -> gs.Tensor:
        """Return how many come after each candidate in the order, and itself, (r, i); 0 for others."""
        new, count = self.new, self.sizes.boxes
        nan = new.add("IsNaN", self.scores)
        scores = new.add("Where", nan, np.float32(-np.inf), self.scores)
        one, other = self.across(scores, -1), self.across(scores, -2)
        behind = new.add("Not", new.add("Greater", *self.numbers()))
        tied = new.add("And", new.add("Equal", one, other), behind)
        after = new.cast(new.add("Or", new.add("Greater", one, other), tied), np.float32)
        keys = new.along("ReduceSum", after, [-1], keepdims=0)
        keys = new.add("Mul", keys, new.cast(candidate, np.float32))
        return new.add("Reshape", keys, np.array([-1, count], np.int64))

    def leaves(self) -> gs.Tensor:
        """Return 1 where a selected i leaves j, else 0, (b*i, j)."""
        new, count = self.new, self.sizes.boxes
        out = new.add("Or", self.overlap(), new.add("Equal", *self.numbers()))
        left = new.cast(new.add("Not", out), np.float32)
        return new.add("Reshape", left, np.array([-1, count], np.int64))

    def numbers(self) -> tuple[Array, Array]:
        """Return i and j as a column and a row: a matrix of both would be megabytes of constant."""
        numbers = np.arange(self.sizes.boxes)
        return numbers[:, np.newaxis], numbers

    def overlap(self) -> gs.Tensor:
        """Return whether i and j overlap more than allowed, (b, i, j)."""
        new, zero = self.new, np.float32(0)
        sides = [self.side(0), self.side(1)]
        area = new.add("Mul", *(new.add("Sub", high, low) for low, high in sides))
        has_area = new.add("Greater", area, zero)
        shared = [self.shared(low, high) for low, high in sides]
        common = new.add("Mul", *shared)
        areas = new.add("Add", self.across(area, -1), self.across(area, -2))
        union = new.add("Sub", areas, common)
        threshold = argument(new.node, 3)
        limit: Operand = zero if threshold is None else new.add("Reshape", threshold, SCALAR)
        found = new.add("Greater", new.add("Div", common, union), limit)
        for test in (
            new.add("Greater", shared[0], zero),
            new.add("Greater", common, zero),
            new.add("Greater", union, zero),
            self.across(has_area, -1),
            self.across(has_area, -2),
        ):
            found = new.add("And", found, test)
        return found

    def side(self, axis: int) -> tuple[gs.Tensor, gs.Tensor]:
        """Return the lower and upper edges of the boxes along an axis, each (b, i)."""
        new = self.new
        one, other = self.column(axis), self.column(axis + 2)
        if new.node.attrs.get("center_point_box", 0):
            half = new.add("Div", other, np.float32(2))
            return new.add("Sub", one, half), new.add("Add", one, half)
        return new.add("Min", one, other), new.add("Max", one, other)

    def column(self, index: int) -> gs.Tensor:
        """Return one number of each box, (b, i)."""
        return self.new.add("Gather", self.boxes, np.array(index), axis=2)

    def shared(self, low: gs.Tensor, high: gs.Tensor) -> gs.Tensor:
        """Return how much i and j share along an axis, (b, i, j)."""
        new = self.new
        ends = new.add("Min", self.across(high, -1), self.across(high, -2))
        return new.add("Sub", ends, new.add("Max", self.across(low, -1), self.across(low, -2)))

    def across(self, tensor: gs.Tensor, axis: int) -> gs.Tensor:
        """Return ``tensor`` of boxes along i: -1, or along j: -2."""
        return self.new.along("Unsqueeze", tensor, [axis])

    def rounds(
        self, leaves: gs.Tensor, keys: gs.Tensor
    ) -> tuple[gs.Tensor | None, gs.Tensor | None]:
        """Return key and index of the best box of each round, both (r, round)."""
        new, sizes = self.new, self.sizes
        rows = self.rows_of_batch()
        largest, indices = [], []
        for _ in range(sizes.rounds):
            key, index = new.add_with(2, "TopK", keys, np.array([1], np.int64), axis=-1)
            largest.append(key)
            indices.append(index)
            line = new.add("Reshape", index, FLAT)
            if rows is not None:
                line = new.add("Add", line, rows)
            keys = new.add("Mul", keys, new.add("Gather", leaves, line, axis=0))
        if not largest:
            return None, None
        return new.add("Concat", *largest, axis=1), new.add("Concat", *indices, axis=1)

    def rows_of_batch(self) -> Operand:
        """Return where in the matrix of all batches those of each (r,) start; None: all at 0."""
        new, sizes = self.new, self.sizes
        if sizes.is_one_batch:
            return None
        starts: Array = np.arange(sizes.batches).repeat(sizes.classes) * sizes.boxes
        batches = new.add("Gather", new.add("Shape", self.scores), np.array([0]), axis=0)
        rows = new.add("Mul", batches, np.array([sizes.classes], np.int64))
        return new.add("Slice", starts, np.array([0], np.int64), rows)

    def allowed(self, is_selected: gs.Tensor) -> gs.Tensor:
        """Return ``is_selected`` of rounds that the most per class, computed at run time, allows."""
        most = argument(self.new.node, 2)
        if most is None or isinstance(most, gs.Constant):
            return is_selected
        limit = self.new.add("Reshape", most, SCALAR)
        allowed = self.new.add("Less", np.arange(self.sizes.rounds), limit)
        return self.new.add("And", is_selected, allowed)

    def lines(self, found: gs.Tensor, best: gs.Tensor) -> gs.Tensor:
        """Return batch, class and box of indices into (b, c, round)."""
        new, sizes = self.new, self.sizes
        column = np.array([-1, 1], np.int64)
        box = new.add("Reshape", new.add("Gather", best, found, axis=0), column)
        if sizes.batches == sizes.classes == 1:
            return new.add("Pad", box, np.array([0, 2, 0, 0], np.int64))
        outer = new.add("Div", new.add("Reshape", found, column), np.array(sizes.rounds))
        classes = np.array(sizes.classes)
        batch, class_ = new.add("Div", outer, classes), new.add("Mod", outer, classes)
        return new.add("Concat", batch, class_, box, axis=1)
