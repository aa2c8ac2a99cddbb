"""Compares our graph passes with onnxsim on model files: nodes left, seconds, correctness.

    python tests/bench/peers.py MODEL... [--repeat N] [--dim NAME=EXTENT]...

Each tool runs in a process of its own, so that a crash counts as its failure and nothing else. The
seconds are those of loading, optimising and saving, imports left out, best of N runs. The numbers
are compared on ONNX Runtime, its optimisations off, with the inputs of ``MODEL.in*.npz`` beside the
model where there are any (``net.onnx``: ``net.in0.npz``), else with made-up ones. Nodes of bodies
count, Constant nodes do not.

Exits 1 if our passes fail on a model, or change an output by more than 1e-3 of its scale.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

TOLERANCE = 1e-3
LONGEST_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Result:
    """What one tool made of one model; without ``failure``, all of the rest is known."""

    nodes: int = 0
    seconds: float = 0.0
    mib: float = 0.0
    difference: float = 0.0
    failure: str = ""

    def __str__(self) -> str:
        if self.failure:
            return f"failed: {self.failure}"
        return (
            f"{self.nodes:6} nodes {self.seconds:8.2f} s {self.mib:8.1f} MiB "
            f"{self.difference:9.1e} off"
        )


# --- in the child processes ----------------------------------------------------------------------


def by_optc() -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """Return our optimiser, imported."""
    from optc.passes import evaluation, shape
    from optc.passes.graph import export_model, import_model
    from optc.passes.pipeline import optimise
    from optc.passes.registry import passes

    assert evaluation, shape  # imported here, so that no run pays for it

    def run(model: onnx.ModelProto) -> onnx.ModelProto:
        graph = import_model(model)
        optimise(graph, passes())
        return export_model(graph)

    return run


def by_onnxsim() -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """Return onnxsim, imported."""
    import onnxsim

    return lambda model: onnxsim.simplify(model, certify=False)[0]


TOOLS = {"optc": by_optc, "onnxsim": by_onnxsim}


def optimise_file(tool: str, source: str, target: str, repeat: int) -> dict[str, float]:
    """Optimise one file as ``tool`` does; return nodes and seconds."""
    optimiser = TOOLS[tool]()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        model = optimiser(onnx.load(source))
        onnx.save(model, target)
        seconds.append(time.perf_counter() - start)
    return {"nodes": node_count(model.graph), "seconds": min(seconds)}


def node_count(graph: onnx.GraphProto) -> int:
    """Return the number of nodes, those of bodies included, constants left out."""
    bodies = (a.g for node in graph.node for a in node.attribute if a.HasField("g"))
    own = sum(node.op_type != "Constant" for node in graph.node)
    return own + sum(map(node_count, bodies))


def compare_files(
    source: str, target: str, inputs: list[str], dims: Mapping[str, int]
) -> dict[str, float]:
    """Return the largest difference of any output, as a share of the output's largest number."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    before, after = (
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for path in (source, target)
    )
    worst = 0.0
    for feeds in [dict(np.load(path)) for path in inputs] or [made_up(before, dims)]:
        pairs = zip(before.run(None, feeds), after.run(None, feeds), strict=True)
        worst = max([worst, *(share_off(one, other) for one, other in pairs)])
    return {"difference": worst}


def made_up(session: Any, dims: Mapping[str, int]) -> dict[str, Any]:
    """Return seeded inputs: floats in [0, 1), integers 0 or 1; a dynamic axis is 1 unless given."""
    rng = np.random.default_rng(0)
    feeds = {}
    for tensor in session.get_inputs():
        shape = [d if isinstance(d, int) else dims.get(str(d), 1) for d in tensor.shape]
        if "float" in tensor.type or "double" in tensor.type:
            dtype = {"tensor(float16)": "f2", "tensor(double)": "f8"}.get(tensor.type, "f4")
            feeds[tensor.name] = rng.random(shape).astype(dtype)
        else:
            dtype = tensor.type.removeprefix("tensor(").removesuffix(")")
            feeds[tensor.name] = rng.integers(0, 2, shape).astype(dtype)
    return feeds


def share_off(one: Any, other: Any) -> float:
    """Return the largest difference over the largest number; infinite where shapes are unlike."""
    if np.shape(one) != np.shape(other) or np.asarray(one).dtype != np.asarray(other).dtype:
        return float("inf")
    if np.size(one) == 0:
        return 0.0
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    scale = np.max(np.abs(a[np.isfinite(a)]), initial=0.0) or 1.0
    gap = np.abs(a - b)[~(np.isnan(a) & np.isnan(b)) & (a != b)]
    return float(np.max(gap, initial=0.0) / scale) if not np.isnan(gap).any() else float("inf")


# --- in the parent -------------------------------------------------------------------------------


def child(task: str, *arguments: Any) -> dict[str, Any]:
    """Run one task of this file in a process of its own; its failure is in the answer."""
    command = [sys.executable, __file__, "--child", json.dumps([task, *arguments])]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"no answer in {LONGEST_SECONDS} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        return {"failure": f"exit {done.returncode}: {last[0][:150]}"}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def results(model: Path, repeat: int, dims: Mapping[str, int]) -> Iterator[tuple[str, Result]]:
    """Yield what each tool makes of one model."""
    inputs = sorted(map(str, model.parent.glob(f"{model.stem}.in*.npz")))
    for tool in TOOLS:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "after.onnx")
            found = child("optimise", tool, str(model), str(target), repeat)
            if "failure" not in found:
                found["mib"] = target.stat().st_size / 2**20
                found |= child("compare", str(model), str(target), inputs, dims)
            yield tool, Result(**found)


TASKS = {"optimise": optimise_file, "compare": compare_files}


def main() -> int:
    """Compare on the models that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--dim", action="append", default=[], help="NAME=EXTENT of a made-up input")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task, *rest = json.loads(arguments.child)
        print(json.dumps(TASKS[task](*rest)))
        return 0
    dims = {name: int(extent) for name, _, extent in (d.rpartition("=") for d in arguments.dim)}
    found: dict[str, list[Result]] = {tool: [] for tool in TOOLS}
    for model in arguments.models:
        before = node_count(onnx.load(model, load_external_data=False).graph)
        print(f"{model.name}: {before} nodes")
        for tool, result in results(model, arguments.repeat, dims):
            print(f"    {tool:8} {result}", flush=True)
            found[tool].append(result)
    both = [pair for pair in zip(*found.values(), strict=True) if not any(r.failure for r in pair)]
    for what in ("nodes", "seconds") if both else ():
        logs = [np.log(getattr(a, what) / getattr(b, what)) for a, b in both]
        print(f"optc / onnxsim, geometric mean of {what}: {np.exp(np.mean(logs)):.2f}")
    ours = found["optc"]
    return 1 if any(r.failure or r.difference > TOLERANCE for r in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
