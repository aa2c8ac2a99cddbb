"""Compares our fp16 with other converters' on model files: error, share, Casts, time, engines.

    python tests/bench/precision_peers.py MODEL... [--tool NAME]... [--json FILE]

A model is a file, or a folder of them. Inputs are as in case.py and, of those that the model takes
first, variations: other pictures where they are made up and have the shape of pictures; else
floats with noise on them, and integers rolled along their last axis. Each tool lowers to fp16 in a
process of its own, as its users call it, inputs and outputs kept in their types; optc and
AutoCast, which look at data, are given half of the inputs. All results are measured on all of
them, by the same means (lowered.py).

    off        largest difference from the original over the output's largest number: the geometric
               mean over the inputs, as the largest over all is mostly chance; on optc's simulator,
               the original on ONNX Runtime with its optimisations off
    worst      the largest of them
    met        how much of what optc's defaults for fp16 allow is used up at worst; 1 is the limit
               (boxes are matched, other outputs held against 0.005 of their largest number)
    share      of the floating-point operations that are done in fp16, Casts not counted
    Casts      from one float type to another, in all parts
    seconds    of lowering, after a warm-up; `whole` is with the start of the process and the
               imports
    engine     whether TensorRT for RTX builds it for 8.9; of optc, which builds, how many parts are
               engines and how many are not

For optc both are ``optc compile`` without building engines and without holding the package against
the original, which the others do not do.

A result is valid if onnx's full checker takes it, or refuses the original, too; ONNX Runtime loads
it; and inputs and outputs are what they were. Of one that only the checker refuses (nodes out of
order), the figures are given all the same, and count.

A peer that is more exact than ours, by more than a tenth, is matched: ours is made again, and
asked for less error by as much as it was off by more, on all inputs. That row, "as NAME", shows
what it costs.

Exits 1 where ours is not valid or does not keep to the defaults; where ours, matched where it has
to be, has more error than a peer (by more than a tenth), a smaller share (by more than 0.001), or,
unmatched, more Casts; where AutoCast is faster, imports and all. What TensorRT refuses of a peer's
is not held against ours.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import child
import numpy as np
import onnx
from case import cases_of, inputs_of
from checker import why_refused
from converter import CONVERTERS, LOW, OURS, converted
from lowered import Chain, Feeds, engines_of, ledger_of, of_scale, outputs_of
from picture import drawn, takes_pictures

from optc.optimizer.arrays import read_arrays, write_arrays
from optc.optimizer.criteria import Criteria
from optc.optimizer.ort_errors import ORT_ERRORS
from optc.optimizer.reference import Model, Rejected, flattened
from optc.specs.diagnostic import ModelError
from optc.specs.manifest import Tensor

LONGEST_SECONDS = 1200
SAME_SHARE = 1e-3
SAME_ERROR = 1.1
"""Factor: which of two sets of roundings is off by that much more is chance."""

NOISE = 0.1
"""Of an input's standard deviation, on its variations."""

EXACT = 1e-9
"""Of the scale: what an output is off by at least, where logarithms are taken."""

FAULTS: tuple[type[Exception], ...] = (*ORT_ERRORS, Rejected, ModelError)
"""What running a model raises."""


@dataclass(slots=True)
class Result:
    """What one tool made of one model; see the head of this file."""

    off: float = math.nan
    worst: float = math.nan
    met: float = math.nan
    share: float = math.nan
    casts: int = -1
    seconds: float = math.nan
    whole: float = math.nan
    engine: str = ""
    words: str = ""
    steps: dict[str, float] = field(default_factory=dict)
    failure: str = ""

    def __str__(self) -> str:
        return (
            f"{self.off:9.1e}{self.worst:9.1e}{self.met:7.2f}{self.share:8.4f}{self.casts:7}"
            f"{self.seconds:9.2f}{self.whole:8.2f}  {self.engine:8} {'; '.join(filter(None, (self.failure, self.words)))}"
        )


HEAD = f"{'off':>9}{'worst':>9}{'met':>7}{'share':>8}{'Casts':>7}{'seconds':>9}{'whole':>8}  engine"


@dataclass(slots=True)
class Row:
    """A model and what the tools made of it.

    Attributes:
        cases: The shapes of the inputs it was run on, a line a case.
        engine: What TensorRT says of the original.
        failure: Why nothing could be compared.
    """

    model: str
    cases: list[str] = field(default_factory=list)
    engine: str = ""
    results: dict[str, Result] = field(default_factory=dict)
    failure: str = ""

    def usable(self, tool: str) -> Result | None:
        """Return what ``tool`` made, if it can be run."""
        result = self.results.get(tool)
        return result if result and not math.isnan(result.off) else None


# --- in the child processes ----------------------------------------------------------------------


def prepare(model: str, folder: str, count: int) -> None:
    """Find inputs that the model takes, what it makes of them, and what it is like."""
    path = Path(model)
    runner = Model(path).runner
    first, *others = cases_of(path, runner)
    given = bool(list(path.parent.glob(f"{path.stem}.in*.npz")))
    cases = [*varied(first, count - len(others), given=given), *others]
    for index, feeds in enumerate(cases):
        write_arrays(Path(folder, f"in{index}.npz"), feeds)
        write_arrays(Path(folder, f"expected{index}.npz"), flattened(runner.run(feeds)))
    inputs = inputs_of(path)
    sizes = [inputs.sizes(feeds) for feeds in cases]
    dims = {
        symbol: (min(s[symbol] for s in sizes), opt, max(s[symbol] for s in sizes))
        for symbol, opt in sizes[0].items()
    }
    child.answer(
        cases=[" ".join(f"{n}{list(a.shape)}" for n, a in feeds.items()) for feeds in cases],
        dims=dims,
        refused=why_refused(path),
        signature=signature_of(path),
    )


def varied(feeds: Feeds, count: int, *, given: bool) -> Iterator[Feeds]:
    """Yield ``count`` variations of ``feeds``; the first is as it is, if it is ``given``."""
    shapes = {name: array.shape for name, array in feeds.items()}
    for index in range(count):
        if not given and takes_pictures(shapes):
            yield {name: drawn(index, shape) for name, shape in shapes.items()}
        else:
            rng = np.random.default_rng(index)
            yield {name: _moved(array, index, rng) for name, array in feeds.items()}


def _moved(array: Any, index: int, rng: np.random.Generator) -> Any:
    if not index or not array.ndim:
        return array
    if array.dtype.kind != "f":
        return np.roll(array, index, -1)
    noise = rng.standard_normal(array.shape) * array.std() * NOISE
    return (array + noise).astype(array.dtype)


def measure(model: str, folder: str, parts: list[str], before: dict[str, Any]) -> None:
    """Check what a tool made, count what is in it, and run it on the simulator."""
    paths = [Path(part) for part in parts]
    faults, runs = [], True
    if len(paths) == 1 and sorted(signature_of(paths[0])) != sorted(before["signature"]):
        faults.append(f"other inputs or outputs: {signature_of(paths[0])}")
    for path in paths:
        if not before["refused"] and (reason := why_refused(path)):
            faults.append(f"checker: {reason}")
        try:
            Chain([path], simulate=False)
        except ORT_ERRORS as error:
            faults.append(f"ONNX Runtime: {first_line(error)}")
            runs = False
    child.answer(failure="; ".join(faults))
    if not runs:
        return
    try:
        chain = Chain(paths)
        offs: list[float] = []
        met = 0.0
        names = outputs_of(Path(model))
        criteria: Criteria | None = None
        for index in range(len(before["cases"])):
            values = chain.run(read_arrays(Path(folder, f"in{index}.npz")))
            expected = read_arrays(Path(folder, f"expected{index}.npz"))
            found = flattened({name: values[name] for name in names})
            criteria = criteria or Criteria.of(None, LOW, [tensor(*e) for e in expected.items()])
            offs.append(max(of_scale(expected, found), EXACT))
            met = max(met, criteria.badness(expected, found))
            if not index:
                ledger = ledger_of(paths, values)
    except FAULTS as error:
        faults.append(f"cannot be run: {first_line(error)}")
        child.answer(failure="; ".join(faults))
        return
    off = math.exp(sum(map(math.log, offs)) / len(offs))
    child.answer(off=off, worst=max(offs), met=met, share=ledger.share, casts=ledger.casts)


def tensor(name: str, array: Any) -> Tensor:
    """Return what is known of an output: its shape may vary."""
    return Tensor(name=name, dtype=array.dtype.name, shape=array.shape)


def build(parts: list[str], folder: str, count: int) -> None:
    """Let TensorRT build the parts."""
    cases = [read_arrays(Path(folder, f"in{index}.npz")) for index in range(count)]
    words = list(engines_of([Path(part) for part in parts], cases))
    child.answer(words=words)


def signature_of(model: Path) -> list[str]:
    """Return names and types of inputs and outputs."""
    graph = onnx.load(model, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [
        f"{value.name}: {onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)}"
        for value in (*graph.input, *graph.output)
        if value.name not in constants
    ]


def first_line(error: Exception) -> str:
    """Return how an error begins."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


TASKS: dict[str, Callable[..., None]] = {"prepare": prepare, "measure": measure, "build": build}


# --- in the parent -------------------------------------------------------------------------------


def compared(model: Path, tools: Sequence[str], count: int, *, engines: bool) -> Row:
    """Return what each tool makes of one model."""
    row = Row(str(model))
    with tempfile.TemporaryDirectory() as folder:
        before = child.call("prepare", str(model), folder, count, seconds=LONGEST_SECONDS)
        if "failure" in before:
            row.failure = before["failure"]
            return row
        row.cases = before["cases"]
        if engines:
            row.engine = built([str(model)], folder, before)
        for tool in tools:
            row.results[tool] = result_of(tool, model, Path(folder), before, engines=engines)
        ours = row.usable(OURS)
        for tool in tools if ours else ():
            peer = row.usable(tool)
            if peer and ours and peer.off * SAME_ERROR < ours.off:
                off = 0.9 * ours.worst * peer.off / ours.off
                row.results[matching(tool)] = result_of(
                    OURS, model, Path(folder), before, engines=engines, off=off
                )
    return row


def matching(tool: str) -> str:
    """Return what ours is called where it is as exact as ``tool``."""
    return f"as {tool}"


def result_of(
    tool: str,
    model: Path,
    folder: Path,
    before: dict[str, Any],
    *,
    engines: bool,
    off: float | None = None,
) -> Result:
    """Let one tool convert the model, and measure what it made.

    Args:
        off: Of ours: the error that it is asked for on all inputs; None for its default, on half
        of them.
    """
    target = Path(tempfile.mkdtemp(dir=folder))
    inputs = [str(folder / f"in{index}.npz") for index in range(len(before["cases"]))]
    job: dict[str, Any] = {
        "model": str(model.resolve()),
        "data": inputs[: len(inputs) // 2],
        "target": str(target),
        "dims": before["dims"],
    }
    if off is not None:
        job["data"] = inputs
        job["verify"] = {"of_scale": off}
        job["precision"] = {"default": LOW, "search": {"margin": 1}}
    answer = converted("converter.py", tool, job, target / "job.json", LONGEST_SECONDS)
    if "failure" in answer:
        return Result(failure=answer["failure"])
    result = Result(seconds=answer["seconds"], whole=answer["whole"], steps=answer.get("steps", {}))
    found = child.call(
        "measure", str(model), str(folder), answer["parts"], before, seconds=LONGEST_SECONDS
    )
    for name, value in found.items():
        setattr(result, name, value)
    result.words = "; ".join(answer.get("unmet", ()))
    if tool == OURS:
        count = sum(answer["engines"])
        result.engine = f"{count} + {len(answer['engines']) - count}"
    elif engines:
        said = built(answer["parts"], str(folder), before)
        result.engine = "refused" if said else "built"
        result.words = said
    return result


def built(parts: Sequence[str], folder: str, before: dict[str, Any]) -> str:
    """Return why TensorRT builds no engine; nothing where it does."""
    found = child.call("build", parts, folder, len(before["cases"]), seconds=LONGEST_SECONDS)
    words = found.get("words", [found.get("failure", "")])
    return "; ".join(word for word in words if isinstance(word, str))[:300]


def losses(rows: Iterable[Row]) -> Iterator[str]:
    """Yield where ours is not as good as the head of this file promises."""
    for row in rows:
        ours = row.results.get(OURS)
        if ours is None:
            continue
        if ours.failure:
            yield f"{row.model}: not valid: {ours.failure}"
            continue
        if not ours.met <= 1:
            yield f"{row.model}: {ours.met:.2f} of the tolerance"
        for tool in CONVERTERS:
            peer = row.usable(tool)
            if tool == OURS or peer is None:
                continue
            if tool == "autocast" and peer.whole < ours.whole:
                yield f"{row.model}: {tool} takes {peer.whole:.1f} s, ours {ours.whole:.1f}"
            if peer.engine == "refused":
                continue
            best = row.results.get(matching(tool), ours)
            if not best.off <= peer.off * SAME_ERROR:
                yield f"{row.model}: {tool} is off by {peer.off:.1e}, ours {best.off:.1e}"
            if best.share < peer.share - SAME_SHARE:
                yield f"{row.model}: {tool} has a share of {peer.share:.4f}, ours {best.share:.4f}"
            if best is ours and ours.casts > peer.casts:
                yield f"{row.model}: {tool} has {peer.casts} Casts, ours {ours.casts}"


def models_in(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the files, and those in the folders."""
    for path in paths:
        yield from sorted(path.rglob("*.onnx")) if path.is_dir() else [path]


def main() -> int:
    """Compare on the models that the command line names."""
    if child.serve(TASKS):
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument(
        "--tool", action="append", choices=CONVERTERS, help="only these; again for more"
    )
    parser.add_argument("--inputs", type=int, default=8, metavar="N", help="[default: 8]")
    parser.add_argument("--no-engines", action="store_true", help="do not ask TensorRT of peers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here, too")
    arguments = parser.parse_args()
    tools = arguments.tool or list(CONVERTERS)
    rows: list[Row] = []
    for model in models_in(arguments.models):
        row = compared(model, tools, arguments.inputs, engines=not arguments.no_engines)
        rows.append(row)
        print(f"{row.model}: {row.failure or row.engine or 'TensorRT builds it as it is'}")
        print("\n".join(f"    on {case[:150]}" for case in dict.fromkeys(row.cases)))
        if row.results:
            print(f"    {'':22}{HEAD}")
        for tool, result in row.results.items():
            print(f"    {tool:22}{result}")
        sys.stdout.flush()
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    found = list(losses(rows))
    print(f"\n{len(rows)} models; {len(found)} where {OURS} is not the better one")
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
