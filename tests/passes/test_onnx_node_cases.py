"""A seeded sample of what tests/bench/onnx_node_cases.py runs in full."""

import random
import warnings
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import numpy as np
import pytest
from bench.onnx_node_cases import check_case, difference
from onnx.backend.test.case import node as cases_of_onnx

SLOW_MODULES = frozenset({"attention", "causal_conv_with_state", "linear_attention"})


def sample(modules: int, per_module: int) -> list[Any]:
    """Return cases of some modules: making all of onnx's cases takes longer than running these."""
    rng = random.Random(0)
    names = sorted(m.name for m in iter_modules(cases_of_onnx.__path__) if m.name != "utils")
    chosen = rng.sample([name for name in names if name not in SLOW_MODULES], modules)
    found: list[Any] = []
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        for name in chosen:
            before = len(cases_of_onnx._NodeTestCases)
            import_module(f"onnx.backend.test.case.node.{name}")
            added = cases_of_onnx._NodeTestCases[before:]
            found += rng.sample(added, min(per_module, len(added)))
    return found


def test_a_sample_of_all_operators_comes_out_as_it_went_in() -> None:
    cases = sample(modules=60, per_module=2)
    assert len(cases) > 90
    for case in cases:
        for constant in (False, True):
            check_case(case, constant)


@pytest.mark.parametrize(
    ("found", "expected", "is_same"),
    [
        (np.float32([1, np.nan]), np.float32([1, np.nan]), True),
        (np.float32([1]), np.float32([1.1]), False),
        (np.float32([1]), np.float64([1]), False),
        (np.float32([1]), np.float32([[1]]), False),
        (np.int64([1]), np.int64([2]), False),
        (np.array(["a"]), np.array(["b"]), False),
        ([np.int64([1])], [np.int64([1]), np.int64([1])], False),
        (None, np.int64([1]), False),
    ],
)
def test_differences_are_seen(found: Any, expected: Any, is_same: bool) -> None:
    assert (difference(found, expected, 1e-3, 1e-7) is None) == is_same
