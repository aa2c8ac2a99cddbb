"""Holds what shape inference says against tensors of a real run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from optc.passes.dimension import Dim, Expression, Interval, interval, substitute, symbols
from optc.passes.shape import Shapes
from optc.passes.shape_fact import Ratio


def value_at(dim: Dim, values: Mapping[str, int]) -> int:
    """Return the number that ``dim`` is once its symbols, all of them, have ``values``."""
    number = substitute(dim, values)
    assert isinstance(number, int), f"{number} still depends on a symbol"
    return number


class Witness:
    """One run of a model."""

    def __init__(self, shapes: Shapes, inputs: Mapping[str, Any]) -> None:
        """Learn the extents of the symbols from the run's inputs."""
        self.shapes = shapes
        self.extents: dict[str, int] = {}
        for name, array in inputs.items():
            for dim, extent in zip(shapes.dims(name) or (), np.shape(array), strict=False):
                if isinstance(dim, Expression) and dim.bare_symbol is not None:
                    self.extents[dim.bare_symbol] = extent

    def bounds(self, dim: Dim) -> Interval:
        """Return what ``dim`` may be in this run."""
        ranges: dict[str, Interval] = {}

        def visit(name: str) -> None:
            upper = self.shapes.upper(name)
            for inner in () if upper is None else symbols(upper):
                visit(inner)
            if name in self.extents:
                ranges[name] = (self.extents[name], self.extents[name])
            else:
                high = math.inf if upper is None else interval(upper, ranges)[1]
                ranges[name] = (-math.inf, high)

        for name in symbols(dim):
            visit(name)
        return interval(dim, ranges)

    def contradictions(self, name: str, array: Any) -> list[str]:
        """Return where the inference of a tensor is wrong; nothing where it only knows little."""
        shapes, problems = self.shapes, []
        dtype, dims = shapes.dtype(name), shapes.dims(name)
        if dtype is not None and dtype != array.dtype:
            problems.append(f"{name}: dtype {dtype}, found {array.dtype}")
        if dims is None:
            return problems
        if len(dims) != array.ndim:
            return [*problems, f"{name}: {len(dims)} axes, found {array.shape}"]
        for dim, extent in zip(dims, array.shape, strict=True):
            low, high = self.bounds(dim)
            if not low <= extent <= high:
                problems.append(f"{name}: {dim} is {low} to {high}, found {array.shape}")
        value = shapes.value(name)
        for said, found in zip(() if value is None else value.flat, array.flat, strict=False):
            if not self._agrees(said, found):
                problems.append(f"{name}: an element is {said}, found {found}")
        return problems

    def _agrees(self, said: Any, found: Any) -> bool:
        if isinstance(said, Ratio):
            if self.shapes.data_dependent(said.numerator):
                return True
            said = value_at(said.numerator, self.extents) / said.denominator
        if isinstance(said, Expression):
            low, high = self.bounds(said)
            return bool(low <= found <= high)
        return said is None or bool(np.array_equal(said, found, equal_nan=isinstance(said, float)))
