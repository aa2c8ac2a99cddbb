"""Looks at the tensors inside a model: how large they get, and where low precision makes error grow.

It costs one run in fp32; the run in low precision is one that a search makes anyway. Of a tensor some
elements are compared, evenly spread: enough to see an error that is all over it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from optc.optimizer.compare import is_inexact
from optc.passes.graph import Array

FINGERPRINT = 4096
"""Elements of a tensor that are compared."""


class Looks:
    """What was seen of tensors.

    Attributes:
        largest: Name of a tensor -> its largest magnitude in fp32, on all samples seen.
        error: Name of a tensor -> its relative error in low precision, with all the error that came
            with the tensors it is made from; infinite where it is no number any more.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self.largest: dict[str, float] = {}
        self.error: dict[str, float] = {}
        self._prints: dict[str, Array] = {}

    def see_reference(self, name: str, array: Array) -> None:
        """Take in a tensor in fp32."""
        if not is_inexact(array):
            return
        size = np.abs(array)
        most = float(size.max(initial=0.0))
        if not math.isfinite(most):  # as in masks: rounding keeps it as it is
            most = float(size[np.isfinite(size)].max(initial=0.0))
        self.largest[name] = max(most, self.largest.get(name, 0.0))
        self._prints[name] = _fingerprint(array)

    def see_lowered(self, name: str, array: Array) -> None:
        """Compare a tensor in low precision with what it was in fp32."""
        expected = self._prints.pop(name, None)
        if expected is None:
            return
        found = _fingerprint(array)
        if found.shape != expected.shape:  # an extent that the data decides
            return
        there = np.isfinite(expected)
        with np.errstate(invalid="ignore", over="ignore"):
            error = float(np.linalg.norm(found[there] - expected[there]))
        norm = float(np.linalg.norm(expected[there]))
        if not math.isfinite(error):
            self.error[name] = math.inf
        elif norm:
            self.error[name] = error / norm

    def forget(self) -> None:
        """Let go of what only a run in low precision would need."""
        self._prints.clear()

    def as_json(self) -> dict[str, Any]:
        """Return what was seen, for a file."""
        return {
            "largest": dict(sorted(self.largest.items())),
            "error": {name: str(error) for name, error in sorted(self.error.items())},
        }

    def take_in(self, seen: Any) -> bool:
        """Take in what `as_json` gave; return whether there was anything."""
        if not seen:
            return False
        for name, most in seen["largest"].items():
            self.largest[name] = max(most, self.largest.get(name, 0.0))
        self.error.update((name, float(error)) for name, error in seen["error"].items())
        return True

    def grown(self, inputs: Sequence[str], outputs: Sequence[str]) -> float:
        """Return the relative error that came up between tensors, in low precision."""
        before = max((self.error.get(name, 0.0) for name in inputs), default=0.0)
        after = max((self.error.get(name, 0.0) for name in outputs), default=0.0)
        if math.isinf(before):
            return 0.0
        return math.sqrt(max(after**2 - before**2, 0.0)) if math.isfinite(after) else math.inf

    def most(self, tensors: Iterable[str]) -> tuple[str, float] | None:
        """Return that of ``tensors`` which gets the largest, and how large; None where all are 0."""
        seen = [(self.largest[name], name) for name in tensors if self.largest.get(name)]
        if not seen:
            return None
        most, name = max(seen)
        return name, most


def _fingerprint(array: Array) -> Array:
    flat = array.reshape(-1)
    step = max(1, -(-flat.size // FINGERPRINT))
    # A step that shares no factor with the extents would be better spread; an odd one does for
    # channels in powers of two.
    return flat[:: step | 1].astype(np.float64)
