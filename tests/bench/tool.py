"""The optimisers that the benchmarks compare, each called the way its users call it.

An entry of `TOOLS` imports its tool and returns a function that reads a model file, optimises it and
writes the result. `ready` gives one that has nothing left to import, so that imports are not timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx

WARM_UP = """
<ir_version: 8, opset_import: ["" : 17]>
warm_up (float[N, 3] x) => (float[N, 2] y) <float[2, 3] w = {1, 2, 3, 4, 5, 6}, float two = {2}> {
    v = Mul (w, two)
    t = Transpose <perm = [1, 0]> (v)
    i = Identity (x)
    y = MatMul (i, t)
}"""
"""A model with a little for each of the tools to do: some import what they need only then."""

Optimiser = Callable[[str, str], None]
OURS = "optc"


def by_optc() -> Optimiser:
    """Return ours, as ``optc.optimize`` has it."""
    import optc

    return lambda source, target: onnx.save(optc.optimize(source)[0], target)


def by_onnxsim() -> Optimiser:
    """Return onnxsim, without its own comparison of the outputs."""
    import onnxsim

    return lambda source, target: onnx.save(
        onnxsim.simplify(onnx.load(source), certify=False)[0], target
    )


def by_onnxslim() -> Optimiser:
    """Return onnxslim."""
    import onnxslim

    return lambda source, target: onnx.save(onnxslim.slim(onnx.load(source)), target)


def by_onnxscript() -> Optimiser:
    """Return onnxscript's optimiser, and its default rules after it."""
    from onnxscript import optimizer, rewriter

    return lambda source, target: onnx.save(
        rewriter.rewrite(optimizer.optimize(onnx.load(source))), target
    )


def by_onnxoptimizer() -> Optimiser:
    """Return onnxoptimizer, with all its passes that fuse or eliminate."""
    import onnxoptimizer

    passes = onnxoptimizer.get_fuse_and_elimination_passes()
    return lambda source, target: onnx.save(
        onnxoptimizer.optimize(onnx.load(source), passes), target
    )


def by_polygraphy() -> Optimiser:
    """Return what ``polygraphy surgeon sanitize --fold-constants`` does."""
    from polygraphy.backend.onnx import fold_constants, infer_shapes, onnx_from_path, save_onnx

    def run(source: str, target: str) -> None:
        save_onnx(fold_constants(infer_shapes(onnx_from_path(source))), target)

    return run


def by_ort() -> Optimiser:
    """Return ONNX Runtime's offline optimiser, at the level that keeps to standard operators."""
    import onnxruntime as ort

    def run(source: str, target: str) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = target
        options.log_severity_level = 3
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    return run


TOOLS: dict[str, Callable[[], Optimiser]] = {
    OURS: by_optc,
    "onnxsim": by_onnxsim,
    "onnxslim": by_onnxslim,
    "onnxscript": by_onnxscript,
    "onnxoptimizer": by_onnxoptimizer,
    "polygraphy": by_polygraphy,
    "ort": by_ort,
}

UNCOUNTED = {"ort"}
"""Whose nodes are shown and not compared: what it writes is meant for itself."""


def ready(tool: str) -> Optimiser:
    """Return a tool, imported and used once."""
    optimiser = TOOLS[tool]()
    with tempfile.TemporaryDirectory() as folder:
        source, target = str(Path(folder, "before.onnx")), str(Path(folder, "after.onnx"))
        onnx.save(onnx.parser.parse_model(WARM_UP), source)
        optimiser(source, target)
    return optimiser
