"""Compiles each construct that TensorRT refuses, without and with what legalises it.

    python tests/bench/refused_constructs.py [NAME...] [--capability X.Y] [--json FILE]

A construct (see constructs.py) is written to a folder with a spec, as a user would, and planned with
the passes off that legalise: what TensorRT says of it, and how many engines and other stages it would
be. Then it is compiled with all passes, and held against the original at its usual and its largest
extents: the package runs its stages as ONNX on ONNX Runtime, the original runs there unoptimised, or on
onnx.reference where ONNX Runtime has no kernel. Builds and comparisons are those of the product.

Prints a table. Exits 1 where a construct is not accepted that is said to be, where one is that is said
not to be, or where the result differs by more than is said.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from constructs import CONSTRUCTS, Construct
from onnx import ModelProto
from onnx_node_cases import on_onnxruntime, on_reference

from optc.optimizer.arrays import write_arrays
from optc.optimizer.compile import compile_package, plan_package
from optc.optimizer.runtime import load
from optc.passes import registry
from optc.specs.check import CheckedSpec, check
from optc.specs.diagnostic import OptcError
from optc.specs.manifest import Manifest

USUAL, LARGEST = 1, 2
WIDTH = 60
"""Letters of what TensorRT says that the table has room for."""

BOILERPLATE = re.compile(
    r"\b[A-Z_]+ in (?=\w+:)|Assertion failed: |Invalid Node - \S+ |IBuilder::\w+: "
    r"|\[[\w.:]+\] |Error Code \d+: |(API Usage|Internal) Error \("
)
"""What TensorRT puts before what it has to say."""


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one construct.

    Attributes:
        name: Of the construct.
        capability: For which compute capability.
        said: What TensorRT says of it as it is; empty where it takes it.
        before: Engines and other stages without what legalises.
        after: Engines and other stages with it, and what is said of what is left.
        passes: What rewrote it.
        difference: Largest difference, relative to the largest number expected.
        seconds: To compile it.
        fault: What is not as it should be; empty where nothing is.
    """

    name: str
    capability: str
    said: str = ""
    before: str = ""
    after: str = ""
    passes: tuple[str, ...] = ()
    difference: float = 0.0
    seconds: float = 0.0
    fault: str = ""


class Unlike(Exception):
    """How a package's results cannot be compared with the original's."""


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs, and what the original makes of them."""

    feeds: dict[str, Any]
    expected: list[Any]

    @classmethod
    def of(cls, construct: Construct, model: ModelProto, size: int) -> Case:
        """Return the inputs of that size."""
        feeds = construct.feeds(model, size)
        expected = on_onnxruntime(model, feeds)
        if expected is None:
            expected = on_reference(model, feeds)
        assert expected is not None, f"neither runtime has {construct.name}"
        return cls(feeds, expected)

    @property
    def scale(self) -> float:
        """The largest number of the output whose largest is the smallest."""
        return min(map(scale_of, self.expected))

    def difference(self, package: Path) -> float:
        """Return the largest difference, relative to the largest number of each output.

        Raises:
            Unlike: If shapes or types differ.
        """
        found = load(package).run(self.feeds, device="cpu")
        worst = 0.0
        for (name, value), wanted in zip(found.items(), self.expected, strict=True):
            kinds = [f"{array.dtype}{array.shape}" for array in (value, wanted)]
            if kinds[0] != kinds[1]:
                raise Unlike(f"`{name}` is {kinds[0]}, not {kinds[1]}")
            if wanted.size:
                gap = np.abs(value.astype(np.float64) - wanted.astype(np.float64)).max()
                worst = max(worst, float(gap) / scale_of(wanted))
        return worst


def scale_of(array: Any) -> float:
    """Return the largest magnitude in ``array``, 1 where there is none or all is 0."""
    return float(np.abs(array.astype(np.float64)).max(initial=0)) or 1.0


def measure(construct: Construct, capability: str, folder: Path) -> Row:
    """Compile one construct both ways."""
    model = construct.model()
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    cases = [Case.of(construct, model, size) for size in (USUAL, LARGEST)]
    for index, case in enumerate(cases):
        write_arrays(folder / f"in{index}.npz", case.feeds)
    allowed = construct.within * min(case.scale for case in cases)
    off = [*registry.LEGALISING, *construct.ordinary]
    planned = plan_package(spec_of(construct, capability, folder, off, allowed))
    start = time.perf_counter()
    package = folder / "package"
    outcome = compile_package(spec_of(construct, capability, folder, [], allowed), package)
    seconds = time.perf_counter() - start
    said, left = words(planned.manifest), words(outcome.manifest)
    one_engine = stages(outcome.manifest) == "1 + 0"
    faults = (
        [] if one_engine == (construct.ends == "engine") else [f"ends as {left or 'an engine'}"]
    )
    if bool(said) != construct.refused:
        faults.append("is refused" if said else "is not refused")
    faults += [str(each.problem) for each in outcome.diagnostics]
    try:
        difference = max(case.difference(package) for case in cases)
    except Unlike as error:
        difference = float("nan")
        faults.append(str(error))
    if difference > construct.within:
        faults.append(f"differs by more than {construct.within:.0e}")
    return Row(
        construct.name,
        capability,
        said,
        stages(planned.manifest),
        f"{stages(outcome.manifest)} {left}".strip(),
        fired(construct, outcome.manifest),
        difference,
        seconds,
        "; ".join(faults),
    )


def spec_of(
    construct: Construct, capability: str, folder: Path, disable: list[str], allowed: float
) -> CheckedSpec:
    """Write the spec of a construct and return it as optc reads it."""
    spec: dict[str, Any] = {
        "version": 1,
        "model": "model.onnx",
        "targets": [{"name": "rtx", "backend": "tensorrt-rtx", "compute_capability": capability}],
        "passes": {"disable": disable},
        "verify": {"data": "in*.npz", "atol": allowed, "rtol": 0.0},
    }
    if construct.sizes:
        spec["dims"] = {
            name: {"min": low, "opt": usual, "max": high}
            for name, (low, usual, high) in construct.sizes.items()
        }
    path = folder / "spec.yaml"
    path.write_text(json.dumps(spec))
    return check(path, known_passes=registry.names, options_of=registry.options_of)


def stages(manifest: Manifest) -> str:
    """Return how many engines and how many other stages there are."""
    engines = sum(stage.runtime == "tensorrt" for stage in manifest.stages)
    return f"{engines} + {len(manifest.stages) - engines}"


def words(manifest: Manifest) -> str:
    """Return why something is not on TensorRT, in whose words; empty where all is."""
    reasons = [reason for stage in manifest.stages for reason in stage.why]
    if not reasons:
        return ""
    text = " ".join(reasons[0].text.split())
    return f"{reasons[0].by}: {text}"


def fired(construct: Construct, manifest: Manifest) -> tuple[str, ...]:
    """Return the passes that rewrote the construct, in the order they did."""
    ordinary = [
        record.name
        for record in manifest.passes
        if record.name in construct.ordinary and (record.fired or record.removed)
    ]
    legalised = [
        name for stage in manifest.stages for each in stage.legalised for name in each.passes
    ]
    return tuple(dict.fromkeys(ordinary + legalised))


def brief(said: str) -> str:
    """Return the beginning of what is said, without where in TensorRT's sources it is said."""
    return BOILERPLATE.sub("", said)[:WIDTH].strip()


def table(rows: list[Row]) -> str:
    """Return the table as Markdown."""
    lines = [
        "construct | CC | TensorRT on it | before | after | passes | difference | s",
        "--- | --- | --- | --- | --- | --- | --- | ---",
    ]
    lines += [
        f"{row.name} | {row.capability} | {brief(row.said) or 'takes it'} | {row.before} | "
        f"{brief(row.after)} | {', '.join(row.passes) or '-'} | "
        f"{row.difference:.0e} | {row.seconds:.1f}"
        for row in rows
    ]
    return "\n".join(lines).replace("0e+00", "0")


def main() -> int:
    """Measure the constructs that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names; all constructs if there is none")
    parser.add_argument("--capability", help="instead of the one that each is refused by")
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    wanted = [
        each
        for each in CONSTRUCTS
        if not arguments.names or any(part in each.name for part in arguments.names)
    ]
    rows = []
    with tempfile.TemporaryDirectory(prefix="optc-constructs-") as work:
        for index, construct in enumerate(wanted):
            capability = arguments.capability or construct.capability
            try:
                row = measure(construct, capability, Path(work) / str(index))
            except OptcError as error:
                row = Row(construct.name, capability, fault=str(error))
            rows.append(row)
            print(f"{row.name}: {row.fault or 'as said'}", file=sys.stderr, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(table(rows))
    faults = [row for row in rows if row.fault]
    for row in faults:
        print(f"{row.name}: {row.fault}")
    print(f"{len(rows) - len(faults)} of {len(rows)} as said")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
