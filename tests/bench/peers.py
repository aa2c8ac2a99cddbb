"""Compares our graph passes with other optimisers on model files: nodes, numbers, time, memory.

    python tests/bench/peers.py MODEL... [--tool NAME]... [--repeat N] [--json FILE]

Each tool runs in a process of its own, so that a crash counts as its failure and nothing else.

    nodes       left; those of bodies count, a call of a function as the function's, Constants not
    foreign     of these, in domains that are not ONNX's own
    seconds     loading, optimising and saving, imports left out, best of N
    MiB, peak   of the written file; of memory beyond what the imports took, in the first run
    off         largest difference from the original's outputs, over the output's largest number,
                with inputs of two sizes (case.py), ONNX Runtime's optimisations off
    noise       that difference over the noise floor of the original (optimizer/noise.py); 0 where
                it is no more than rounding

A result is valid if onnx's full checker takes it, or refuses the original, too; ONNX Runtime loads
it; inputs and outputs are named as they were; and its numbers are within the noise.

Below the table: geometric means over the models where both tools are valid; the models where a valid
peer without foreign nodes of its own leaves fewer than ours, and what ours has more of; what is
wrong with ours. Exits 1 if ours is somewhere not valid, or not among the smallest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import child
import numpy as np
import onnx
from case import cases_of
from checker import why_refused
from tool import OURS, TOOLS, UNCOUNTED, ready

from optc.optimizer.arrays import dtype_name, read_arrays, typed, write_arrays
from optc.optimizer.compare import Tolerance, compare, errors, is_inexact, wide
from optc.optimizer.noise import Floor, Noise
from optc.optimizer.reference import Model, OrtRunner, flattened

ROUNDING = Tolerance(atol=1e-6, rtol=1e-4)
"""What is equal without a look at the noise; also what makes two rows the same."""

STANDARD = {"", "ai.onnx", "ai.onnx.ml"}
LONGEST_SECONDS = 600


@dataclass(slots=True)
class Result:
    """What one tool made of one model.

    Attributes:
        ops: Operator -> how many are left; empty where the tool itself failed.
        failure: Why the result is not valid.
    """

    nodes: int = 0
    foreign: int = 0
    seconds: float = 0.0
    mib: float = 0.0
    peak_mib: float = 0.0
    difference: float = 0.0
    noise: float = 0.0
    ops: dict[str, int] = field(default_factory=dict)
    failure: str = ""

    def __str__(self) -> str:
        if not self.ops:
            return f"  {self.failure}"
        return (
            f"{self.nodes:7}{self.foreign:8}{self.seconds:9.2f}{self.mib:9.1f}{self.peak_mib:9.1f}"
            f"{self.difference:9.1e}{self.noise:7.2f}  {self.failure}"
        )


HEAD = f"{'nodes':>7}{'foreign':>8}{'seconds':>9}{'MiB':>9}{'peak':>9}{'off':>9}{'noise':>7}"


@dataclass(slots=True)
class Row:
    """A model and what the tools made of it.

    Attributes:
        cases: The shapes of the inputs it was run on, a line a case.
        failure: Why nothing could be compared.
    """

    model: str
    nodes: int = 0
    foreign: int = 0
    mib: float = 0.0
    cases: list[str] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)
    failure: str = ""

    def valid(self, tool: str) -> Result | None:
        """Return what ``tool`` made, if it is valid."""
        result = self.results.get(tool)
        return result if result and not result.failure else None

    @property
    def smallest(self) -> tuple[str, Result] | None:
        """The valid peer that leaves the fewest nodes, none of them foreign that was not before."""
        peers = {tool: self.valid(tool) for tool in self.results if tool not in {OURS, *UNCOUNTED}}
        fair = {t: r for t, r in peers.items() if r is not None and r.foreign <= self.foreign}
        return min(fair.items(), key=lambda peer: peer[1].nodes, default=None)


# --- in the child processes ----------------------------------------------------------------------


def prepare(model: str, folder: str) -> None:
    """Find inputs that the model takes, and say what it is like."""
    path = Path(model)
    cases = cases_of(path, Model(path).runner)
    for index, feeds in enumerate(cases):
        write_arrays(Path(folder, f"in{index}.npz"), feeds)
    proto = onnx.load(path, load_external_data=False)
    ops = ops_of(proto)
    constants = {tensor.name for tensor in proto.graph.initializer}  # inputs as well, long ago
    child.answer(
        cases=[" ".join(f"{n}{list(np.shape(a))}" for n, a in feeds.items()) for feeds in cases],
        nodes=sum(ops.values()),
        foreign=foreign(ops),
        mib=path.stat().st_size / 2**20,
        refused=why_refused(path),
        inputs=[value.name for value in proto.graph.input if value.name not in constants],
        outputs=[value.name for value in proto.graph.output],
    )


def optimise(tool: str, model: str, folder: str, repeat: int, before: Mapping[str, Any]) -> None:
    """Let ``tool`` optimise the model; then run what came of it on the cases."""
    target = Path(folder, tool, "after.onnx")
    target.parent.mkdir()
    model = str(Path(model).resolve())
    os.chdir(folder)  # some tools leave files where they are called
    optimiser = ready(tool)
    child.forget_peak()
    base = child.status_mib("VmRSS")
    seconds: list[float] = []
    for _ in range(repeat):
        start = time.perf_counter()
        optimiser(model, str(target))
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            child.answer(peak_mib=child.status_mib("VmHWM") - base)
    proto = onnx.load(target, load_external_data=False)
    ops = ops_of(proto)
    child.answer(
        nodes=sum(ops.values()),
        foreign=foreign(ops),
        ops=ops,
        seconds=min(seconds),
        mib=sum(file.stat().st_size for file in target.parent.iterdir()) / 2**20,
    )
    if not before["refused"] and (reason := why_refused(target)):
        sys.exit(f"invalid: {reason}")
    constants = {tensor.name for tensor in proto.graph.initializer}
    for kind, values in (("inputs", proto.graph.input), ("outputs", proto.graph.output)):
        names = [value.name for value in values]
        if kind == "inputs":
            names = [name for name in names if name not in constants]
        if names != before[kind]:
            sys.exit(f"other {kind}: {names}")
    del proto
    runner = OrtRunner(target, target.parent)
    for index in range(len(before["cases"])):
        found = flattened(runner.run(read_arrays(Path(folder, f"in{index}.npz"))))
        write_arrays(target.with_name(f"out{index}.npz"), found)


def ops_of(model: onnx.ModelProto) -> Counter[str]:
    """Return how many of each operator a model has: in bodies, too, and of functions for each call."""
    functions = {(f.domain, f.name): f for f in model.functions}
    counts: dict[tuple[str, str], Counter[str]] = {}

    def of_call(node: onnx.NodeProto) -> Counter[str]:
        key = (node.domain, node.op_type)
        if key not in functions:
            name = node.op_type if node.domain in STANDARD else f"{node.domain}::{node.op_type}"
            return Counter() if name == "Constant" else Counter([name])
        if key not in counts:
            counts[key] = of_nodes(functions[key].node)
        return counts[key]

    def of_nodes(nodes: Iterable[onnx.NodeProto]) -> Counter[str]:
        found: Counter[str] = Counter()
        for node in nodes:
            found.update(of_call(node))
            for attribute in node.attribute:
                for body in (attribute.g, *attribute.graphs):
                    found.update(of_nodes(body.node))
        return found

    return of_nodes(model.graph.node)


def foreign(ops: Mapping[str, int]) -> int:
    """Return how many operators are in domains that are not ONNX's own."""
    return sum(count for op, count in ops.items() if "::" in op)


@dataclass(slots=True)
class Verdict:
    """What the outputs of one tool's model are like; as in `Result`."""

    difference: float = 0.0
    noise: float = 0.0
    failure: str = ""


def judge(model: str, folder: str, count: int, tools: Sequence[str]) -> None:
    """Hold the outputs of each tool's model against those of the original, and its noise."""
    original = Model(Path(model))
    noise = Noise(original)
    verdicts = {tool: Verdict() for tool in tools}
    for index in range(count):
        feeds = read_arrays(Path(folder, f"in{index}.npz"))
        expected = flattened(original.runner.run(feeds))
        found = {tool: read_arrays(Path(folder, tool, f"out{index}.npz")) for tool in tools}
        for tool, outputs in found.items():
            for name, array in expected.items():
                outputs[name] = typed(outputs[name], dtype_name(array.dtype))
                verdict = verdicts[tool]
                verdict.difference = max(verdict.difference, share_off(array, outputs[name]))
        for tool, (share, beyond) in in_noise(noise, feeds, expected, found).items():
            verdict = verdicts[tool]
            verdict.noise = max(verdict.noise, share)
            if beyond:
                verdict.failure = f"case {index}: beyond the noise: {', '.join(beyond)}"
        child.answer(**{tool: asdict(verdict) for tool, verdict in verdicts.items()})


def in_noise(
    noise: Noise,
    feeds: Mapping[str, Any],
    expected: Mapping[str, Any],
    found: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[float, list[str]]]:
    """Return of each tool how many times the floor it is off, and which outputs are not covered."""
    open_ = {
        (tool, name)
        for tool, outputs in found.items()
        for name, array in expected.items()
        if not compare(array, outputs[name], ROUNDING).agrees
    }
    floors = {name: Floor(expected[name], ROUNDING) for _, name in open_}
    beyond = set(open_)
    for ulps, sample in noise.samples(feeds) if open_ else ():
        for name, floor in floors.items():
            if name in sample:
                floor.add(sample[name], ulps)
        rows_move = any(floor.rows_move for floor in floors.values())
        unpaired = max(floor.unpaired for floor in floors.values())
        beyond -= {
            (tool, name)
            for tool, name in beyond
            if floors[name].covers(found[tool][name], rows_move=rows_move, unpaired=unpaired)
        }
        if not beyond:
            break
    return {
        tool: (
            max(
                (times(expected[n], found[tool][n], floors[n]) for t, n in open_ if t == tool),
                default=0.0,
            ),
            sorted(name for t, name in beyond if t == tool),
        )
        for tool in found
    }


def times(expected: Any, found: Any, floor: Floor) -> float:
    """Return the largest difference as a multiple of the largest that is noise."""
    if not is_inexact(expected):
        off, most = float(np.sum(expected != found)), float(floor.unequal)
    else:
        off, most = largest_error(expected, found), floor.max_abs
    return off / most if most else (math.inf if off else 0.0)


def largest_error(expected: Any, found: Any) -> float:
    """Return the largest finite difference; infinite where the shapes are unlike."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return math.inf
    gaps = errors(wide(expected).reshape(-1), wide(found).reshape(-1))
    return float(np.max(gaps, initial=0.0, where=np.isfinite(gaps)))


def share_off(expected: Any, found: Any) -> float:
    """Return the largest difference over the largest number."""
    if expected.dtype.kind in "OSU":
        return float(expected.astype(str).tolist() != found.astype(str).tolist())
    size = np.abs(wide(expected))
    scale = float(np.max(size, initial=0.0, where=np.isfinite(size))) or 1.0
    return largest_error(expected, found) / scale


TASKS: dict[str, Callable[..., None]] = {"prepare": prepare, "optimise": optimise, "judge": judge}


# --- in the parent -------------------------------------------------------------------------------


def compared(model: Path, tools: Sequence[str], repeat: int) -> Row:
    """Return what each tool makes of one model."""
    row = Row(str(model))
    with tempfile.TemporaryDirectory() as folder:
        before = child.call("prepare", str(model), folder, seconds=LONGEST_SECONDS)
        if "failure" in before:
            row.failure = before["failure"]
            return row
        row.nodes, row.foreign, row.mib = before["nodes"], before["foreign"], before["mib"]
        row.cases = before["cases"]
        for tool in tools:
            found = child.call(
                "optimise", tool, str(model), folder, repeat, before, seconds=LONGEST_SECONDS
            )
            row.results[tool] = Result(**found)
        ran = [tool for tool in tools if not row.results[tool].failure]
        verdicts = child.call(
            "judge", str(model), folder, len(row.cases), ran, seconds=LONGEST_SECONDS
        )
    for tool in ran:
        verdict = dict(verdicts.get(tool, {}))
        if "failure" in verdicts:
            verdict["failure"] = f"not compared: {verdicts['failure']}"
        row.results[tool] = replace(row.results[tool], **verdict)
    return row


def summary(rows: Sequence[Row], tools: Sequence[str]) -> dict[str, Any]:
    """Return the geometric means, where ours is larger, and where it fails."""
    rows = [row for row in rows if not row.failure]
    means = {}
    for tool in tools:
        valid = [(row, result) for row in rows if (result := row.valid(tool))]
        both = [(ours, result) for row, result in valid if (ours := row.valid(OURS))]
        means[tool] = {
            "valid": len(valid),
            "nodes left": geometric_mean((r.nodes, row.nodes) for row, r in valid),
        } | {
            f"{key}, {OURS} / {tool}": geometric_mean(
                (getattr(ours, key), getattr(peer, key)) for ours, peer in both
            )
            for key in ("nodes", "seconds", "peak_mib")
        }
    return {
        "models": len(rows),
        "means": means,
        "larger": list(larger(rows)),
        "failed": {row.model: r.failure for row in rows if (r := row.results[OURS]).failure},
    }


def larger(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """Yield where a peer leaves fewer nodes than ours, the widest gap first."""
    gaps: list[dict[str, Any]] = []
    for row in rows:
        ours, best = row.valid(OURS), row.smallest
        if ours and best and best[1].nodes < ours.nodes:
            more = Counter(ours.ops)
            more.subtract(best[1].ops)
            gaps.append(
                {
                    "model": row.model,
                    "ours": ours.nodes,
                    "peer": best[0],
                    "theirs": best[1].nodes,
                    "ops": {op: count for op, count in more.most_common() if count},
                }
            )
    yield from sorted(gaps, key=lambda gap: gap["theirs"] - gap["ours"])


def geometric_mean(ratios: Iterable[tuple[float, float]]) -> float | None:
    """Return the mean of the quotients, or None where there are none."""
    logs = [math.log(max(a, 1e-9) / max(b, 1e-9)) for a, b in ratios]
    return math.exp(sum(logs) / len(logs)) if logs else None


def print_summary(found: Mapping[str, Any]) -> None:
    """Print what `summary` returned."""
    print(f"\n{found['models']} models; geometric means where both tools are valid")
    print(f"{'':14}{'valid':>6}{'nodes left':>12}   {OURS} / tool: nodes, seconds, peak")
    for tool, means in found["means"].items():
        valid, *ratios = means.values()
        shown = "".join(f"{'-' if r is None else format(r, '.3f'):>11}" for r in ratios)
        print(f"{tool:14}{valid:6}{shown}")
    if OURS not in found["means"]:
        return
    print(f"\n{len(found['larger'])} models where a peer leaves fewer nodes")
    for gap in found["larger"]:
        ops = " ".join(f"{op}{count:+}" for op, count in gap["ops"].items())
        print(f"{gap['model']}: {gap['ours']}, {gap['peer']} {gap['theirs']}: {ops}")
    print(f"\n{len(found['failed'])} models where {OURS} fails")
    for model, failure in found["failed"].items():
        print(f"{model}: {failure}")


def main() -> int:
    """Compare on the models that the command line names."""
    if child.serve(TASKS):
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="only these; again for more")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="[default: 3]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here, too")
    arguments = parser.parse_args()
    tools = arguments.tool or list(TOOLS)
    rows = []
    for model in arguments.models:
        row = compared(model, tools, arguments.repeat)
        rows.append(row)
        print(f"{row.model}: {row.failure or f'{row.nodes} nodes, {row.mib:.1f} MiB'}")
        print("\n".join(f"    on {case[:150]}" for case in row.cases))
        if row.results:
            print(f"    {'':14}{HEAD}")
        for tool, result in row.results.items():
            print(f"    {tool:14}{result}")
        sys.stdout.flush()
        if arguments.json:
            found = {"rows": [asdict(row) for row in rows]} | summary(rows, tools)
            arguments.json.write_text(json.dumps(found, indent=1))
    found = summary(rows, tools)
    print_summary(found)
    return 1 if found["larger"] or found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
