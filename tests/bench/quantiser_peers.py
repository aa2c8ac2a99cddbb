"""Compares our int8 with ONNX Runtime's static quantiser on models that read pictures.

    python tests/bench/quantiser_peers.py MODEL... [--tool NAME]... [--pictures N] [--json FILE]

A model is a file, or a folder of them. Its input is made here, seeded: pictures with words, shapes
and noise on them, for each image input of 1 or 3 channels; so that models that read text see text.
Some are for calibration, others for optc's search; what is measured is measured on a third lot.
Quantisers that do not search are given the first two lots for calibration. All results are
measured by the same means (lowered.py).

    SQNR       signal over quantisation noise in dB, on optc's simulator, of the original on ONNX
               Runtime with its optimisations off; of the output where it is the least
    top-1      how often the largest entry along the last axis (of images: the channels) is the same
    quantised  the share of the floating-point operations that is done on int8
    low        the same on int8 or fp16
    Q, DQ      how many of them
    MiB        of the engine for 8.9; what TensorRT for RTX says where there is none
    seconds    of quantising, calibration included, after a warm-up; `whole` is with the start of
               the process and the imports

For optc both are ``optc compile`` without building engines and without holding the package against
the original, which the others do not do.

Exits 1 where ours is not valid, or is off by more than it promises, or where a peer with an engine
has a higher SQNR at no smaller a share of int8.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import child
import numpy as np
from case import cases_of, inputs_of
from checker import why_refused
from converter import OURS, converted
from lowered import Chain, engines_of, ledger_of, outputs_of, sqnr_db
from picture import drawn, takes_pictures
from precision_peers import FAULTS, first_line, models_in
from quantiser import QUANTISERS

from optc.optimizer.arrays import read_arrays, write_arrays
from optc.optimizer.reference import Model, flattened

LONGEST_SECONDS = 1800
PROMISED_DB = 20.0
"""What optc's default asks of int8."""

LOTS = {"calibration": 2, "search": 1, "measured": 2}
"""Lot of pictures -> how large it is, in parts of the whole."""


@dataclass(slots=True)
class Result:
    """What one tool made of one model; see the head of this file."""

    sqnr_db: float = math.nan
    top_1: float = math.nan
    quantised: float = math.nan
    low: float = math.nan
    quantise_nodes: int = -1
    dequantise_nodes: int = -1
    casts: int = -1
    mib: float = math.nan
    seconds: float = math.nan
    whole: float = math.nan
    words: str = ""
    steps: dict[str, float] = field(default_factory=dict)
    failure: str = ""

    def __str__(self) -> str:
        return (
            f"{self.sqnr_db:7.1f}{self.top_1:8.4f}{self.quantised:11.4f}{self.low:8.4f}"
            f"{self.quantise_nodes:6}{self.dequantise_nodes:6}{self.mib:8.2f}{self.seconds:9.1f}"
            f"{self.whole:8.1f}  {'; '.join(filter(None, (self.failure, self.words)))}"
        )


HEAD = (
    f"{'SQNR':>7}{'top-1':>8}{'quantised':>11}{'low':>8}{'Q':>6}{'DQ':>6}{'MiB':>8}"
    f"{'seconds':>9}{'whole':>8}"
)


@dataclass(slots=True)
class Row:
    """A model and what the tools made of it.

    Attributes:
        shapes: Of the pictures.
        failure: Why nothing could be compared.
    """

    model: str
    shapes: str = ""
    results: dict[str, Result] = field(default_factory=dict)
    failure: str = ""


# --- in the child processes ----------------------------------------------------------------------


def prepare(model: str, folder: str, count: int) -> None:
    """Draw pictures for the model, and keep what it makes of those that are measured on."""
    path = Path(model)
    runner = Model(path).runner
    sizes = inputs_of(path)
    shapes = {name: np.shape(array) for name, array in cases_of(path, runner)[0].items()}
    if not takes_pictures(shapes):
        sys.exit(f"reads no pictures: {shapes}")
    index = 0
    lots: dict[str, list[str]] = {}
    for lot, parts in LOTS.items():
        lots[lot] = []
        for _ in range(parts * count // sum(LOTS.values())):
            feeds = {name: drawn(index, shape) for name, shape in shapes.items()}
            file = Path(folder, f"{lot}{index}.npz")
            write_arrays(file, feeds)
            if lot == "measured":
                write_arrays(file.with_name(f"expected-{file.name}"), flattened(runner.run(feeds)))
            lots[lot].append(str(file))
            index += 1
    child.answer(
        shapes=" ".join(f"{name}{list(shape)}" for name, shape in shapes.items()),
        dims={symbol: (n, n, n) for symbol, n in sizes.sizes(feeds).items()},
        refused=why_refused(path),
        lots=lots,
    )


def measure(model: str, parts: list[str], lot: list[str], refused: str) -> None:
    """Check what a tool made, count what is in it, and run it on the simulator."""
    paths = [Path(part) for part in parts]
    faults = [f"checker: {why}" for path in paths if not refused and (why := why_refused(path))]
    names = outputs_of(Path(model))
    expected: dict[str, list[Any]] = {}
    found: dict[str, list[Any]] = {}
    try:
        chain = Chain(paths)
        for file in map(Path, lot):
            values = chain.run(read_arrays(file))
            add(expected, read_arrays(file.with_name(f"expected-{file.name}")))
            add(found, flattened({name: values[name] for name in names}))
        ledger = ledger_of(paths, values)
    except FAULTS as error:
        faults.append(f"cannot be run: {first_line(error)}")
        child.answer(failure="; ".join(faults))
        return
    assert ledger.quantising is not None
    want, got = ({n: np.stack(a) for n, a in each.items()} for each in (expected, found))
    child.answer(
        sqnr_db=sqnr_db(want, got),
        top_1=top_1(want, got),
        quantised=ledger.quantised / ledger.work,
        low=ledger.share,
        quantise_nodes=ledger.quantising["QuantizeLinear"],
        dequantise_nodes=ledger.quantising["DequantizeLinear"],
        casts=ledger.casts,
        failure="; ".join(faults),
    )


def add(lists: dict[str, list[Any]], arrays: Mapping[str, Any]) -> None:
    """Add each array to the list of its name."""
    for name, array in arrays.items():
        lists.setdefault(name, []).append(array)


def top_1(expected: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """Return how often the largest entry is the same, of the output where it is the least often.

    The arrays have an axis for the pictures before their own; classes are along the last axis, or
    along the channels of an image.
    """
    shares = []
    for name, array in expected.items():
        axis = 2 if array.ndim == 5 else -1
        if array.ndim >= 3 and array.shape[axis] > 1 and array.dtype.kind == "f":
            best = [np.argmax(each, axis) for each in (array, found[name])]
            shares.append(float(np.mean(best[0] == best[1])))
    return min(shares, default=math.nan)


def build(parts: list[str], lot: list[str]) -> None:
    """Let TensorRT build the parts."""
    found = list(engines_of([Path(part) for part in parts], [read_arrays(Path(lot[0]))]))
    sizes = [each for each in found if isinstance(each, int)]
    child.answer(
        bytes=sum(sizes) if len(sizes) == len(found) else None,
        words="; ".join(each[:300] for each in found if isinstance(each, str)),
    )


TASKS: dict[str, Callable[..., None]] = {"prepare": prepare, "measure": measure, "build": build}


# --- in the parent -------------------------------------------------------------------------------


def compared(model: Path, tools: Sequence[str], count: int) -> Row:
    """Return what each tool makes of one model."""
    row = Row(str(model))
    with tempfile.TemporaryDirectory() as folder:
        before = child.call("prepare", str(model), folder, count, seconds=LONGEST_SECONDS)
        if "failure" in before:
            row.failure = before["failure"]
            return row
        row.shapes = before["shapes"]
        for tool in tools:
            row.results[tool] = result_of(tool, model, Path(folder), before)
    return row


def result_of(tool: str, model: Path, folder: Path, before: dict[str, Any]) -> Result:
    """Let one tool quantise the model, and measure what it made."""
    target = folder / tool
    target.mkdir()
    lots: dict[str, list[str]] = before["lots"]
    job: dict[str, Any] = {
        "model": str(model.resolve()),
        "data": lots["search"],
        "target": str(target),
        "dims": before["dims"],
        "calibration": lots["calibration"] + lots["search"],
        "precision": {"default": "int8", "calibration": {"data": lots["calibration"]}},
    }
    answer = converted("quantiser.py", tool, job, target / "job.json", LONGEST_SECONDS)
    if "failure" in answer:
        return Result(failure=answer["failure"])
    result = Result(seconds=answer["seconds"], whole=answer["whole"], steps=answer.get("steps", {}))
    parts, lot = answer["parts"], lots["measured"]
    found = child.call(
        "measure", str(model), parts, lot, before["refused"], seconds=LONGEST_SECONDS
    )
    for name, value in found.items():
        setattr(result, name, value)
    engines = [part for part, is_engine in zip(parts, answer["engines"], strict=True) if is_engine]
    built = child.call("build", engines, lot, seconds=LONGEST_SECONDS)
    if size := built.get("bytes"):
        result.mib = size / 2**20
    words = [built.get("words", ""), built.get("failure", ""), *answer.get("unmet", ())]
    result.words = "; ".join(filter(None, words))
    return result


def losses(rows: Iterable[Row]) -> Iterator[str]:
    """Yield where ours is not as good as the head of this file promises."""
    for row in rows:
        ours = row.results.get(OURS)
        if ours is None:
            continue
        if ours.failure:
            yield f"{row.model}: not valid: {ours.failure}"
            continue
        if not ours.sqnr_db >= PROMISED_DB:
            yield f"{row.model}: {ours.sqnr_db:.1f} dB"
        for tool, peer in row.results.items():
            better = peer.quantised >= ours.quantised and peer.sqnr_db > ours.sqnr_db
            if tool != OURS and better and not math.isnan(peer.mib):
                yield f"{row.model}: {tool} has {peer.sqnr_db:.1f} dB, ours {ours.sqnr_db:.1f}"


def main() -> int:
    """Compare on the models that the command line names."""
    if child.serve(TASKS):
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument(
        "--tool", action="append", choices=QUANTISERS, help="only these; again for more"
    )
    parser.add_argument(
        "--pictures", type=int, default=40, metavar="N", help="of all three lots [default: 40]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here, too")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for model in models_in(arguments.models):
        row = compared(model, arguments.tool or list(QUANTISERS), arguments.pictures)
        rows.append(row)
        print(f"{row.model}: {row.failure or row.shapes}")
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
