"""Runs the onnx package's single-operator cases through the graph passes and compares the outputs.

    python tests/bench/onnx_node_cases.py [NAME...]

Each case runs twice: as it is, and with all its tensors as constants, so that it folds. Before and
after the passes it is computed by ONNX Runtime, or by onnx.reference where ONNX Runtime does not run
the original. The output must be what the case says, within the tolerance the case states. Where the
runtime's own answer to the original is another one, that one must come out again.

Prints how many were compared how, and every failure. Exits 1 if there is any.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.reference import ReferenceEvaluator

from optc.passes.evaluation import REFERENCE_ERRORS, RUNTIME_ERRORS
from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import optimise
from optc.passes.registry import passes

Feeds = dict[str, Any]
Runtime = Callable[[ModelProto, Feeds], "list[Any] | None"]


class ChangedError(Exception):
    """A case does not come out of the passes as it went in."""


@cache
def cases() -> dict[str, Any]:
    """Return all cases by name."""
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        return {case.name: case for case in collect_testcases(None)}


def on_onnxruntime(model: ModelProto, feeds: Feeds) -> list[Any] | None:
    """Return the outputs, or None where ONNX Runtime does not run the model."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return list(session.run(None, feeds))
    except (*RUNTIME_ERRORS, RuntimeError, TypeError, ValueError):  # the last three: of feeding
        return None


def on_reference(model: ModelProto, feeds: Feeds) -> list[Any] | None:
    """Return the outputs, or None where the reference does not run the model."""
    try:
        return list(ReferenceEvaluator(model).run(None, feeds))
    except REFERENCE_ERRORS:
        return None


def plain(value: Any) -> Any:
    """Return a value of a case as numpy has it."""
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, list):
        return [plain(element) for element in value]
    return value if value is None else np.asarray(value)


def with_constants(model: ModelProto, feeds: Feeds) -> tuple[ModelProto, Feeds]:
    """Return ``model`` with the tensors of ``feeds`` as constants, and what is left to feed."""
    constant = ModelProto()
    constant.CopyFrom(model)
    left = {name: value for name, value in feeds.items() if not isinstance(value, np.ndarray)}
    for index in reversed(range(len(constant.graph.input))):
        name = constant.graph.input[index].name
        if name in feeds and name not in left:
            del constant.graph.input[index]
            constant.graph.initializer.append(numpy_helper.from_array(feeds[name], name))
    return constant, left


def difference(found: Any, expected: Any, rtol: float, atol: float) -> str | None:
    """Return how ``found`` differs from ``expected``, or None."""
    if isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            return f"{found} is not a sequence of {len(expected)}"
        pairs = zip(found, expected, strict=True)
        return next(filter(None, (difference(a, b, rtol, atol) for a, b in pairs)), None)
    if found is None or expected is None:
        return None if found is expected else f"{found} is not {expected}"
    one, other = np.asarray(found), np.asarray(expected)
    if one.shape != other.shape:
        return f"shape {one.shape} is not {other.shape}"
    if one.dtype.kind in "OUS" or other.dtype.kind in "OUS":
        return None if one.astype(str).tolist() == other.astype(str).tolist() else "other text"
    if one.dtype != other.dtype:
        return f"dtype {one.dtype} is not {other.dtype}"
    wide = np.complex128 if one.dtype.kind == "c" else np.float64
    if one.dtype.kind in "iu":
        return None if np.array_equal(one, other) else "other integers"
    close = np.isclose(one.astype(wide), other.astype(wide), rtol, atol, equal_nan=True)
    return None if close.all() else f"{np.count_nonzero(~close)} elements differ"


def unlike(found: Sequence[Any], expected: Sequence[Any], case: Any) -> str | None:
    """Return how the outputs of a case differ, or None."""
    pairs = zip(found, expected, strict=True)
    return next(filter(None, (difference(a, b, case.rtol, case.atol) for a, b in pairs)), None)


def optimised(model: ModelProto) -> ModelProto:
    """Return the model after all passes."""
    graph = import_model(model)
    optimise(graph, passes())
    return export_model(graph)


def check(name: str, constant: bool) -> str:
    """Put one case through the passes and return how it was compared.

    Raises:
        ChangedError: If it comes out another.
    """
    return check_case(cases()[name], constant)


def check_case(case: Any, constant: bool) -> str:
    """As `check`, of the case itself."""
    inputs, stored = (list(map(plain, values)) for values in case.data_sets[0])
    feeds = dict(zip((i.name for i in case.model.graph.input), inputs, strict=False))
    model, left = with_constants(case.model, feeds) if constant else (case.model, feeds)
    after = optimised(model)
    for runtime in (on_onnxruntime, on_reference):
        before = runtime(model, left)
        if before is None:
            continue
        found = runtime(after, left)
        if found is None:
            raise ChangedError(f"{runtime.__name__}: runs no more")
        how = runtime.__name__.removeprefix("on_")
        expected = stored
        if unlike(before, stored, case) and unlike(found, stored, case):
            again = runtime(model, left)
            if again is None or unlike(again, before, case):
                if [np.shape(v) for v in found] != [np.shape(v) for v in before]:
                    raise ChangedError(f"{how}: other shapes")
                return f"{how}, shapes only: it is random"
            expected, how = before, f"{how}, with its own output: the stored one is another"
        if reason := unlike(found, expected, case):
            raise ChangedError(f"{how}: {reason}")
        return how
    return "neither runs the original"


def check_all(names: Iterable[str], workers: int) -> tuple[Counter[str], list[str]]:
    """Return how many cases were compared how, and what failed."""
    tally: Counter[str] = Counter()
    failures = []
    with ProcessPoolExecutor(workers) as pool:
        runs = [
            (name, constant, pool.submit(check, name, constant))
            for name in names
            for constant in (False, True)
        ]
        for name, constant, run in runs:
            way = "as constants" if constant else "as it is"
            if (error := run.exception()) is not None:
                failures.append(f"{name}, {way}: {type(error).__name__}: {error}")
            else:
                tally[f"{way}: {run.result()}"] += 1
    return tally, failures


def main() -> int:
    """Run the cases that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="cases to run; all if there is none")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    names = arguments.names or list(cases())
    if unknown := set(names) - cases().keys():
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    start = time.perf_counter()
    tally, failures = check_all(names, arguments.workers)
    print(f"{len(names)} cases of onnx {onnx.__version__}, {time.perf_counter() - start:.0f} s")
    for how, count in sorted(tally.items()):
        print(f"{count:6} {how}")
    print(f"{len(failures):6} failures")
    for failure in failures:
        print(f"       {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
