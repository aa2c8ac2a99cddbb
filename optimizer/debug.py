"""What to look at when a pass is in doubt: the graph after it, as text or as a model file."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx

from optc.passes import registry
from optc.passes.graph import export_model, skeleton
from optc.passes.pipeline import AfterStep, Step

ALL = "all"
"""What is written in place of a pass's name to mean every one."""


def dumps(output: Path, wanted: str) -> AfterStep:
    """Return what saves the graph beside ``output`` after the pass called ``wanted``.

    Raises:
        InputError: If there is no such pass (``unknown-pass``).
    """
    _require(wanted)
    folder = output.parent / f"{output.name}.dump"

    def save(step: Step) -> None:
        if wanted in (ALL, step.name):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{step.number:03d}-{step.name}.onnx"
            path.write_bytes(export_model(step.graph).SerializeToString())

    return save


def prints(wanted: str) -> AfterStep:
    """Return what prints the graph to stderr after the pass called ``wanted``, without weights.

    Raises:
        InputError: If there is no such pass (``unknown-pass``).
    """
    _require(wanted)

    def show(step: Step) -> None:
        if wanted in (ALL, step.name):
            heading = f"// step {step.number}: after {step.name}"
            print(
                heading, onnx.printer.to_text(skeleton(step.graph).graph), sep="\n", file=sys.stderr
            )

    return show


def _require(wanted: str) -> None:
    if wanted != ALL:
        registry.require(wanted)
