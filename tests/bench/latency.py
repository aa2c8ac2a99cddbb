"""Compares the latency of models on ONNX Runtime's CPU provider, before and after our passes.

    python tests/bench/latency.py MODEL... [--rounds N] [--threads N] [--json FILE]

A check that fewer nodes did not mean slower. Both run in one process, with the runtime's default
options and so its own optimisations, on the first inputs of case.py, by turns: original, optimised,
and the original again in a session of its own. The median of a model's times counts; what the two
sessions of the original differ by is its noise.

Prints a line a model; then the geometric mean of optimised over original, and the models above 1.05
by more than their noise. Exits 1 if the mean is above 1 by more than its noise, or a model is slower.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import child
import onnx
import onnxruntime as ort
from case import cases_of

import optc
from optc.optimizer.reference import Model

SLOWER = 1.05
MOST_SECONDS = 20.0
"""A model is not run for longer than this, even if that makes for fewer rounds."""

FEWEST_ROUNDS = 5
LONGEST_SECONDS = 900


def measure(model: str, rounds: int, threads: int) -> None:
    """Say the median seconds of the original, of the optimised model, and of the original again."""
    original = Model(Path(model))
    feeds = cases_of(Path(model), original.runner)[0]
    original.release()
    with tempfile.TemporaryDirectory() as folder:
        after = Path(folder, "after.onnx")
        onnx.save(optc.optimize(model)[0], after)
        sessions = [session(path, threads) for path in (model, str(after), model)]
    for warm in sessions * 2:
        warm.run(None, feeds)
    seconds: list[list[float]] = [[], [], []]
    end = time.perf_counter() + MOST_SECONDS
    for turn in range(rounds):
        if turn >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        # Whoever is first finds the caches as the others left them: so each is first in turn.
        for index in (turn % 3, (turn + 1) % 3, (turn + 2) % 3):
            start = time.perf_counter()
            sessions[index].run(None, feeds)
            seconds[index].append(time.perf_counter() - start)
    before, optimised, again = map(statistics.median, seconds)
    child.answer(before=before, after=optimised, again=again, rounds=len(seconds[0]))


def session(model: str, threads: int) -> ort.InferenceSession:
    """Return a session with default options, apart from the threads where they are given."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


TASKS: dict[str, Callable[..., None]] = {"measure": measure}


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """Return what ``measure`` said with the ratio and its noise, which is never below 1."""
    # The two sessions of the original are one sample of it: the better estimate is of both.
    original = math.sqrt(found["before"] * found["again"])
    noise = math.exp(abs(math.log(found["before"] / found["again"])))
    ratio = found["after"] / original
    return found | {"ratio": ratio, "noise": noise, "slower": ratio > SLOWER * noise}


def mean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(statistics.fmean(map(math.log, values)))


def main() -> int:
    """Compare on the models that the command line names."""
    if child.serve(TASKS):
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=60, help="at most [default: 60]")
    parser.add_argument(
        "--threads", type=int, default=0, help="0: as the runtime likes [default: 0]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here, too")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    failed = []
    for model in arguments.models:
        found = child.call(
            "measure", str(model), arguments.rounds, arguments.threads, seconds=LONGEST_SECONDS
        )
        if "failure" in found:
            failed.append(model)
            print(f"{model}: {found['failure']}", flush=True)
            continue
        row = rows[str(model)] = figures(found)
        print(
            f"{row['before'] * 1e3:10.2f} ms, after {row['after'] * 1e3:10.2f} ms, "
            f"ratio {row['ratio']:.3f}, noise {row['noise']:.3f}{', slower' * row['slower']}  {model}",
            flush=True,
        )
    if not rows:
        return 1
    ratio = mean([row["ratio"] for row in rows.values()])
    noise = mean([row["noise"] for row in rows.values()]) ** (1 / math.sqrt(len(rows)))
    slower = [model for model, row in rows.items() if row["slower"]]
    print(f"{len(rows)} models: geometric mean {ratio:.3f}, its noise {noise:.3f}")
    print(f"{len(slower)} above {SLOWER} beyond their noise: {' '.join(slower)}")
    if arguments.json:
        found = {"rows": rows, "mean": ratio, "noise": noise, "slower": slower}
        arguments.json.write_text(json.dumps(found, indent=1))
    return 1 if failed or slower or ratio > noise else 0


if __name__ == "__main__":
    sys.exit(main())
