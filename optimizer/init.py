"""A spec to start from: what a model says of its inputs, and what was tried on it.

The names of axes suggest sizes; whether the model takes them is found out by running it on made-up
input, in a child process and not for long. Where they are refused, others that are common are tried;
a range shrinks to what of it ran, or to one size that did.
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from optc.optimizer.model_file import load_graph, read_model
from optc.optimizer.trial import NotLoadedError, Sizes, Trials
from optc.passes.graph import all_nodes
from optc.specs.compile_spec import Range
from optc.specs.diagnostic import Diagnostic, EnvironmentFault, InputError
from optc.specs.likely import BATCH
from optc.specs.model_problem import ResolvedInput
from optc.specs.operator_entry import operator_entry
from optc.specs.operator_problem import KNOWN_DOMAINS
from optc.specs.starter import DECIDE, InputOutline, LikelyRange, likely_ranges, starter_spec

MOST_SECONDS = 12.0
"""After this nothing is tried any more, counted from the beginning."""

COMMON_SIZES = (224, 32, 48, 64, 128, 256, 16, 8, 4, 2, 1, 96, 112, 160, 192, 299, 320, 384, 512)
"""What an axis may have to be, the most frequent first."""

BATCH_SIZES = (1, 2, 4, 8)

KEEPS_VALUES = {
    "Cast",
    "Clip",
    "Concat",
    "Expand",
    "Flatten",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
"""Ops whose output holds values of their first input, so that an index passes through."""


def starter(model: Path, beside: Path | None = None) -> str:
    """Return the text of a spec for ``model``.

    It compiles as it stands, or has lines that hold `optc.specs.starter.DECIDE`. Takes some
    seconds, as the model is run.

    Args:
        model: The ONNX file.
        beside: Where the spec will be; its folder is what the model's path is taken from. None: the
            current folder.

    Raises:
        ModelError: If the model is at fault.
    """
    graph = load_graph(read_model(model))
    tried = try_out(model, graph)
    path = os.path.relpath(model, beside.parent if beside is not None else Path())
    return starter_spec(
        path,
        tried.outlines,
        ranges=tried.ranges,
        values=tried.values,
        note=tried.note,
        operators=_entries(graph),
    )


def _entries(graph: gs.Graph) -> list[list[str]]:
    """Return what to write under `operators`: an entry for each that nobody knows."""
    first: dict[str, gs.Node] = {}
    for node in all_nodes(graph):
        if (node.domain or "") not in KNOWN_DOMAINS:
            first.setdefault(f"{node.domain}::{node.op}", node)
    return [
        operator_entry(
            op, [_rank(tensor) for tensor in node.inputs], sum(bool(t.name) for t in node.outputs)
        )
        for op, node in first.items()
    ]


def _rank(tensor: gs.Tensor) -> int | None:
    return None if tensor.shape is None else len(tensor.shape)


@dataclass(frozen=True, slots=True)
class Tried:
    """What was found out of a model's inputs.

    Attributes:
        outlines: Name, dtype and shape of each input that is a tensor.
        inputs: The same as made-up input needs them; empty where a shape is not known.
        values: Name of an input -> the range its values must keep to, where one is known.
        ranges: Symbol -> the extents that ran, as far as any was tried, and what to say of them.
        note: Why the model does not run on made-up input, if it does not.
    """

    outlines: list[InputOutline]
    inputs: Mapping[str, ResolvedInput]
    values: Mapping[str, tuple[int, int]]
    ranges: Mapping[str, LikelyRange]
    note: str | None


def try_out(model: Path, graph: gs.Graph) -> Tried:
    """Run a model in a child process to find extents that it takes. Takes some seconds.

    Args:
        model: The ONNX file.
        graph: What is in it.
    """
    deadline = time.monotonic() + MOST_SECONDS
    tensors = [tensor for tensor in graph.inputs if tensor.type == "tensor_type"]
    outlines: list[InputOutline] = [
        (tensor.name, _dtype_name(tensor), tensor.shape) for tensor in tensors
    ]
    rows = {tensor.name: _rows_indexed_by(tensor) for tensor in tensors}
    values = {name: (0, count - 1) for name, count in rows.items() if count is not None}
    ranges: Mapping[str, LikelyRange] = likely_ranges(outlines)
    note = None
    inputs: dict[str, ResolvedInput] = {}
    if all(tensor.shape is not None for tensor in graph.inputs):
        inputs = {
            tensor.name: ResolvedInput(
                helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)),
                tuple(tensor.shape),
                values.get(tensor.name),
            )
            for tensor in tensors
        }
        try:
            with Trials(model, inputs, deadline) as trials:
                ranges, note = _tried(trials, ranges)
        except NotLoadedError as error:
            note = f"ONNX Runtime does not run this model: {error}"
    return Tried(outlines, inputs, values, ranges, note)


def write_new(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, where there is nothing yet; all of it or nothing.

    Raises:
        InputError: If something is there (``file-exists``).
        EnvironmentFault: If it cannot be written (``cannot-write``, ``disk-full``).
    """
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise InputError(
            Diagnostic("file-exists", f"`{path}` is there already", "choose another name with `-o`")
        ) from error
    except OSError as error:
        raise _not_written(path, error) from error
    try:
        with file:
            file.write(text)
    except OSError as error:
        path.unlink()
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> EnvironmentFault:
    problem = f"`{path}` cannot be written: {error.strerror or error}"
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return EnvironmentFault(
            Diagnostic("disk-full", problem, "free some space, or write to another disk")
        )
    return EnvironmentFault(
        Diagnostic(
            "cannot-write", problem, "choose a folder that is there and that you may write to"
        )
    )


def _dtype_name(tensor: gs.Variable) -> str:
    dtype = np.dtype(tensor.dtype)
    return "string" if dtype.kind == "O" else dtype.name


def _rows_indexed_by(tensor: gs.Variable) -> int | None:
    """Return the rows of the smallest table that ``tensor`` indexes; None where it indexes none."""
    if np.dtype(tensor.dtype).kind not in "iu":
        return None
    rows: list[int] = []
    pending, seen = [tensor], {id(tensor)}
    while pending:
        values = pending.pop()
        for node in values.outputs:
            if node.op == "Gather" and node.inputs[1] is values:
                table, axis = node.inputs[0], node.attrs.get("axis", 0)
                if table.shape and isinstance(table.shape[axis], int):
                    rows.append(table.shape[axis])
            elif node.op in KEEPS_VALUES and node.inputs[0] is values:
                for output in node.outputs:
                    if id(output) not in seen:
                        seen.add(id(output))
                        pending.append(output)
    return min(rows, default=None)


# --- trying it -----------------------------------------------------------------------------------


def _tried(
    trials: Trials, likely: Mapping[str, LikelyRange]
) -> tuple[Mapping[str, LikelyRange], str | None]:
    """Return the ranges as far as the model takes them, and a note where it does not run at all."""
    batch = {symbol for symbol, (range_, _) in likely.items() if range_ == BATCH}
    usual = {s: 1 if s in batch else range_.opt for s, (range_, _) in likely.items()}
    candidates = itertools.takewhile(lambda _: not trials.is_over, _candidates(usual, batch))
    sizes = next((sizes for sizes in candidates if trials.runs(sizes)), None)
    if sizes is None:
        return likely, (
            f"made-up input does not run on ONNX Runtime ({trials.refusal}): give a `range`, or "
            "inputs of your own in `verify`"
        )
    ranges = _ranges_that_run(trials, likely, sizes, batch)
    best = {symbol: range_.opt for symbol, range_ in ranges.items()}
    if not trials.runs(best):  # each by itself does, but not all at once
        ranges |= {s: Range.fixed(sizes[s]) for s in sizes if best[s] != sizes[s]}
    kept = dict(likely)
    for symbol, range_ in ranges.items():
        if range_ != likely[symbol][0]:
            common = BATCH_SIZES if symbol in batch else COMMON_SIZES
            ran = {e for e in {*common, *_extents(range_)} if trials.runs(sizes | {symbol: e})}
            kept[symbol] = range_, f"{DECIDE} {_said_of(sorted({*ran, sizes[symbol]}), trials)}"
    return kept, None


def _ranges_that_run(
    trials: Trials, likely: Mapping[str, LikelyRange], sizes: Sizes, batch: set[str]
) -> dict[str, Range]:
    """Return of each range what runs beside ``sizes``, which do; else one size."""
    # A large batch is tried at small sizes, if the model takes them: it is the batch that is asked
    # about.
    small = {s: e if s in batch else min(e, likely[s][0].min) for s, e in sizes.items()}
    if not trials.runs(small):
        small = sizes
    ranges = {}
    for symbol, (range_, _) in likely.items():
        others = small if symbol in batch else sizes
        ran = [e for e in _extents(range_) if trials.runs(others | {symbol: e})]
        if range_.opt in ran:
            ranges[symbol] = Range(min=min(ran), opt=range_.opt, max=max(ran))
        else:
            ranges[symbol] = Range.fixed(sizes[symbol])
    return ranges


def _extents(range_: Range) -> list[int]:
    return sorted({range_.min, range_.opt, range_.max})


def _said_of(ran: list[int], trials: Trials) -> str:
    if trials.exhausted:
        return f"{_listed(ran)} ran; others were refused, or too slow or too large to try"
    return f"of the usual sizes, the model takes {_listed(ran)}"


def _listed(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def _candidates(usual: Sizes, batch: set[str]) -> Iterator[Sizes]:
    """Yield sizes to try: the usual ones first, then all the same, then any."""
    free = [symbol for symbol in usual if symbol not in batch]
    same = ((extent,) * len(free) for extent in COMMON_SIZES)
    mixed = itertools.product(*((usual[symbol], *COMMON_SIZES) for symbol in free))
    yield usual
    for extents in itertools.chain(same, mixed) if free else ():
        yield usual | dict(zip(free, extents, strict=True))
