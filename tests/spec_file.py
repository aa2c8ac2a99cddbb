"""What tests of specs use: a small model on disk, a spec beside it, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import onnx

from optc.specs.check import CheckedSpec, check
from optc.specs.diagnostic import Diagnostic, SpecError

MODEL = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[batch, 3, height, 32] images, int64[?] ids, bool flag) => (float[batch, found] boxes, int64[many] kept)
<float[4, 3, 1, 1] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>
{
    [stem__Conv] s = Conv (images, w)
    [stem__Relu] r = Relu (s)
    p = GlobalAveragePool (r)
    one = Constant <value = float {1}> ()
    [head__Add] a = Add (p, one)
    [head__If] i = If (flag)
      <then_branch = t () => (float[n] t1) { [head__then__Exp] t1 = Exp (a) },
       else_branch = e () => (float[n] e1) { e1 = Neg (a) }>
    [head__Flatten] boxes = Flatten (i)
    kept = Identity (ids)
}
"""

RANGES = "dims: {batch: {min: 1, opt: 4, max: 8}, height: 32, ids_0: 5}\n"
HEAD = "version: 1\nmodel: m.onnx\n"
VALID = HEAD + RANGES

OPTIONS: dict[str, dict[str, tuple[type[object], float | None]]] = {
    "fold-constants": {"growth_bytes": (int, 0)},
    "fuse-gelu": {},
}
"""Passes and their options, as a registry would tell them."""


def write_model(folder: Path, text: str = MODEL) -> Path:
    """Write the model that ``text`` (onnx.parser's) describes to ``folder``/m.onnx.

    The parser takes no slashes in names: ``stem__Conv`` becomes ``/stem/Conv``.
    """
    model = onnx.parser.parse_model(text)
    bodies = [a.g for node in model.graph.node for a in node.attribute if a.HasField("g")]
    for graph in (model.graph, *bodies):
        for node in graph.node:
            if node.name:
                node.name = "/" + node.name.replace("__", "/")
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def checked(text: str, name: str = "spec.yaml") -> CheckedSpec:
    """Write a spec to the current folder and check it."""
    Path(name).write_text(text, encoding="utf-8", newline="")
    return check(name, known_passes=OPTIONS, options_of=OPTIONS.__getitem__)


def faults(text: str, name: str = "spec.yaml") -> tuple[Diagnostic, ...]:
    """Return what is wrong with a spec, or () where it is right."""
    try:
        checked(text, name)
    except SpecError as error:
        return error.diagnostics
    return ()


def codes(text: str, name: str = "spec.yaml") -> list[str]:
    """Return the codes of what is wrong with a spec."""
    return [fault.code for fault in faults(text, name)]


def rendered(text: str, name: str = "spec.yaml") -> str:
    """Return what a user reads about a spec that is wrong."""
    return "\n".join(fault.render() for fault in faults(text, name))
