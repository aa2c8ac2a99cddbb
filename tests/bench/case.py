"""The inputs that the benchmarks run a model on: two sets, of two sizes where the model has them.

The first are those of ``MODEL.in*.npz`` beside the model (``net.onnx``: ``net.in0.npz``), where there
are any, else made-up ones. The second have every dynamic axis twice as long, or as many of them as
the model takes; their values are those of the first, repeated. A model without dynamic axes gets
other made-up values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from optc.optimizer.arrays import read_arrays
from optc.optimizer.init import COMMON_SIZES
from optc.optimizer.made_up import made_up
from optc.optimizer.reference import Rejected, Runner
from optc.specs.compile_spec import Range
from optc.specs.likely import BATCH
from optc.specs.model_problem import ResolvedInput
from optc.specs.starter import likely_ranges

Feeds = dict[str, Any]
Sizes = dict[str, int]
COUNT = 2


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a model: element type, and extents or symbols."""

    dtypes: Mapping[str, int]
    shapes: Mapping[str, tuple[int | str, ...]]

    @property
    def symbols(self) -> list[str]:
        """The symbols, each once."""
        dims = (dim for shape in self.shapes.values() for dim in shape)
        return list(dict.fromkeys(dim for dim in dims if isinstance(dim, str)))

    def sizes(self, feeds: Mapping[str, Any]) -> Sizes:
        """Return the extent of each symbol in ``feeds``."""
        return {
            dim: extent
            for name, shape in self.shapes.items()
            for dim, extent in zip(shape, np.shape(feeds[name]), strict=True)
            if isinstance(dim, str)
        }

    def at(self, sizes: Mapping[str, int], name: str) -> tuple[int, ...]:
        """Return the shape of an input."""
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.shapes[name])

    def made_up(self, sizes: Mapping[str, int], seed: int) -> Feeds:
        """Return seeded values: floats in [0, 1), integers 0 or 1."""
        specs = {
            name: ResolvedInput(self.dtypes[name], shape, None)
            for name, shape in self.shapes.items()
        }
        ranges = {symbol: Range.fixed(extent) for symbol, extent in sizes.items()}
        return made_up(specs, ranges, "opt", seed)


def inputs_of(model: Path) -> Inputs:
    """Return the inputs of a model; an axis without a name gets one of its own."""
    graph = onnx.load(model, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    dtypes: dict[str, int] = {}
    shapes: dict[str, tuple[int | str, ...]] = {}
    for value in graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        dtypes[value.name] = tensor.elem_type
        shapes[value.name] = tuple(
            _extent(dim, f"{value.name}_{axis}") for axis, dim in enumerate(tensor.shape.dim)
        )
    return Inputs(dtypes, shapes)


def _extent(dim: onnx.TensorShapeProto.Dimension, name: str) -> int | str:
    """Return the extent of an axis, or its symbol: ``name`` where it says nothing, -1 or ``?``."""
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return int(dim.dim_value)
    return name if dim.dim_param in {"", "?"} else str(dim.dim_param)


def cases_of(model: Path, runner: Runner) -> list[Feeds]:
    """Return two sets of inputs, less where the model takes no second.

    Raises:
        Rejected: If it takes none at all.
    """
    inputs = inputs_of(model)
    given = [read_arrays(path) for path in sorted(model.parent.glob(f"{model.stem}.in*.npz"))]
    found = given[:COUNT] or [_first_that_runs(_made_up(inputs), runner)]
    if len(found) < COUNT:
        found += _runs(_others(inputs, found[0]), runner)
    return found


def _first_that_runs(candidates: Iterator[Feeds], runner: Runner) -> Feeds:
    reasons = []
    for feeds in candidates:
        try:
            runner.run(feeds)
        except Rejected as error:
            reasons.append(error)
        else:
            return feeds
    raise reasons[0]


def _runs(candidates: Iterator[Feeds], runner: Runner) -> list[Feeds]:
    """Return the first that runs, in a list; an empty one where none does."""
    try:
        return [_first_that_runs(candidates, runner)]
    except Rejected:
        return []


def _made_up(inputs: Inputs) -> Iterator[Feeds]:
    """Yield made-up values of the sizes that the names of the axes suggest, then of common ones."""
    outlines = [(name, "float32", shape) for name, shape in inputs.shapes.items()]
    likely = {symbol: range_ for symbol, (range_, _) in likely_ranges(outlines).items()}
    batch = {symbol for symbol in inputs.symbols if likely.get(symbol) == BATCH}
    usual = {symbol: 1 if symbol in batch else likely[symbol].opt for symbol in inputs.symbols}
    yield inputs.made_up(usual, seed=0)
    if set(usual) - batch:
        for extent in COMMON_SIZES:
            sizes = {symbol: 1 if symbol in batch else extent for symbol in usual}
            yield inputs.made_up(sizes, seed=0)


def _others(inputs: Inputs, feeds: Feeds) -> Iterator[Feeds]:
    """Yield other inputs than ``feeds``: larger ones, where there are dynamic axes."""
    sizes = inputs.sizes(feeds)
    batch = {shape[0] for shape in inputs.shapes.values() if shape and isinstance(shape[0], str)}
    for grown in (set(sizes), set(sizes) - batch, batch, *({symbol} for symbol in sizes)):
        if grown:
            other = {symbol: n * 2 if symbol in grown else n for symbol, n in sizes.items()}
            yield {name: np.resize(array, inputs.at(other, name)) for name, array in feeds.items()}
    if not sizes:
        yield inputs.made_up(sizes, seed=1)
