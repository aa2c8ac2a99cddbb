"""What in `operators` cannot be, and which operators of the model it lacks."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from optc.specs.axis_arithmetic import Arithmetic, NotArithmetic, arithmetic, is_axis_name
from optc.specs.compile_spec import Operator
from optc.specs.diagnostic import Diagnostic, Place, nearest, quoted
from optc.specs.missing_file import missing_file
from optc.specs.model_outline import Outline, OutlineError, OutlineNode
from optc.specs.onnx_ops import ONNX_OPS
from optc.specs.operator_entry import operator_entry
from optc.specs.schema_problem import Reading
from optc.specs.source import Items, Source, Table, find, find_key

ONNX_DOMAINS: Final = frozenset({"", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training"})
KNOWN_DOMAINS: Final = ONNX_DOMAINS | {
    "com.microsoft",
    "com.microsoft.experimental",
    "com.microsoft.nchwc",
    "com.ms.internal.nhwc",
}
"""Of operators that ONNX or ONNX Runtime has."""

MOST_NAMED: Final = 3
"""Nodes that are named where there are many."""

Keys = tuple[str | int, ...]
"""Keys and indices from `operators` to a value."""

_FILES: Final = {
    "onnxruntime": ("library-not-found", "library"),
    "torch": ("module-not-found", "module"),
    "tensorrt": ("library-not-found", "library"),
}


def operator_problems(
    source: Source, reading: Reading, folder: Path, outline: Outline | None
) -> list[Diagnostic]:
    """Return what is wrong with `operators`, in itself and against the model.

    Args:
        source: The file of the spec.
        reading: What is valid in it.
        folder: What paths in it are relative to.
        outline: Of the model; None where it is not known.
    """
    nodes: dict[str, list[OutlineNode]] | None = None
    if (
        not reading.spec.operators
        and outline is not None
        and outline.opsets.keys() <= KNOWN_DOMAINS
    ):
        return []  # without a look at the nodes, of which there may be many
    if outline is not None:
        with contextlib.suppress(OutlineError):  # some node is broken: for the loader to say
            nodes = _custom_nodes(outline)
    check = _Check(source, reading, folder, nodes, outline)
    return [*check.entries(), *check.undeclared()]


def _custom_nodes(outline: Outline) -> dict[str, list[OutlineNode]]:
    """Return the nodes that are neither ONNX's nor functions of the model, by domain and op."""
    found: dict[str, list[OutlineNode]] = defaultdict(list)
    for node in outline.nodes:
        if node.domain and (node.domain, node.op_type) not in outline.functions:
            found[f"{node.domain}::{node.op_type}"].append(node)
    return found


@dataclass(frozen=True, slots=True)
class _Check:
    source: Source
    reading: Reading
    folder: Path
    nodes: Mapping[str, Sequence[OutlineNode]] | None
    outline: Outline | None

    def entries(self) -> Iterator[Diagnostic]:
        first: dict[str, int] = {}
        for index, operator in enumerate(self.reading.spec.operators):
            yield from self._name(index, operator)
            if first.setdefault(operator.op, index) != index:
                yield Diagnostic(
                    "operator-twice",
                    f"{operator.op} is declared twice",
                    "keep one of the entries",
                    self._place(index, "op"),
                )
            yield from self._files(index, operator)
            yield from self._axes(index, operator)
            yield from self._against_nodes(index, operator)

    def _name(self, index: int, operator: Operator) -> Iterator[Diagnostic]:
        domain, _, op = operator.op.rpartition("::")
        place = self._place(index, "op")
        if domain in ONNX_DOMAINS and op in ONNX_OPS:
            yield Diagnostic(
                "not-custom",
                f"{op} is an operator of ONNX",
                "leave the entry out; where its nodes run is for `partition` to say",
                place,
            )
        elif domain in ONNX_DOMAINS or not op:
            known = {name.rpartition("::")[2]: name for name in self.nodes or ()}
            near = nearest(op or domain, known)
            yield Diagnostic(
                "operator-without-domain",
                f"`{operator.op}` names no domain and op of its own",
                f"write `{known[near]}`" if near else "write both, such as `acme.vision::Peaks`",
                place,
            )
        elif self.nodes is not None and operator.op not in self.nodes:
            near = nearest(operator.op, self.nodes)
            yield Diagnostic(
                "operator-not-in-model",
                f"no node of the model is of {operator.op}",
                f"the nearest is `{near}`" if near else None,
                place,
                severity="note",
            )

    def _files(self, index: int, operator: Operator) -> Iterator[Diagnostic]:
        for key, (code, what) in _FILES.items():
            name = getattr(operator, key)
            if name is None:
                continue
            path = self.folder / name
            if os.path.isfile(path):  # which says no of a path that cannot be, too
                if not os.access(path, os.R_OK):
                    yield Diagnostic(
                        "library-unreadable",
                        f"the {what} `{path}` cannot be read",
                        "let it be read by who runs optc",
                        self._place(index, key),
                    )
                continue
            yield missing_file(code, what, self.folder, name, self._place(index, key))

    # --- axes ------------------------------------------------------------------------------------

    def _axes(self, index: int, operator: Operator) -> Iterator[Diagnostic]:
        known: set[str] = set()
        for at, axes in enumerate(operator.inputs):
            for axis, name in enumerate(axes):
                if isinstance(name, str) and is_axis_name(name):
                    known.add(name)
                elif name not in ("?", -1) and not isinstance(name, int):
                    yield Diagnostic(
                        "bad-axis",
                        f"`{name}` cannot be the name of an axis",
                        'write a number, a name made of letters, digits, `_` and `.`, or "?" for '
                        "any",
                        self._place(index, "inputs", at, axis),
                    )
        read: dict[Keys, Arithmetic] = {}
        for at, output in enumerate(operator.outputs):
            for axis, extent in enumerate(output.shape or ()):
                yield from self._read((index, "outputs", at, "shape", axis), extent, read)
        decided = {each.name for each in read.values() if each.name is not None} - known
        for path, text in read.items():
            for name in sorted(text.names - known - decided):
                yield self._unknown(name, known, path)
        for name in sorted(decided - operator.bounds.keys()):
            near = nearest(name, known)
            if near is not None:
                where = next(path for path, text in read.items() if text.name == name)
                yield Diagnostic(
                    "unbounded-extent",
                    f"`{name}` is an axis of no input, so it is an extent that the data decide",
                    f"write `{near}`, if that is what is meant; else give it a bound under `bounds`",
                    self._place(*where),
                    severity="note",
                )
        bounds: dict[Keys, Arithmetic] = {}
        for name, bound in operator.bounds.items():
            if name not in decided:
                near = nearest(name, decided)
                yield Diagnostic(
                    "unknown-axis",
                    f"`{name}` is an axis of an input: it needs no bound"
                    if name in known
                    else f"no output has an axis that is called `{name}`",
                    f"write `{near}`" if near else "leave the bound out",
                    self._key(index, "bounds", name),
                )
            yield from self._read((index, "bounds", name), bound, bounds)
        for path, text in bounds.items():
            for name in sorted(text.names - known):
                yield self._unknown(name, known, path)

    def _read(
        self,
        path: Keys,
        text: str | int,
        found: dict[Keys, Arithmetic],
    ) -> Iterator[Diagnostic]:
        """Put ``text`` into ``found`` as arithmetic, or tell why it is none."""
        try:
            read = arithmetic(text)
            # Extents that no arithmetic is written for: what divides by zero here always does.
            tried = {name: 100_003 + 1_009 * at for at, name in enumerate(sorted(read.names))}
            value = read.value(tried)
        except NotArithmetic as error:
            problem = f"`{text}` is no arithmetic with axes: {error}"
        except ZeroDivisionError:
            problem = f"`{text}` divides by zero"
        else:
            if value >= 0 or read.names:
                found[path] = read
                return
            problem = f"no axis has the extent {text}"
        yield Diagnostic(
            "bad-arithmetic",
            problem,
            "write a number, the name of an axis, or arithmetic such as `(height + 31)//32`",
            self._place(*path),
        )

    def _unknown(self, name: str, known: set[str], path: Keys) -> Diagnostic:
        near = nearest(name, known)
        listed = quoted(sorted(known))
        return Diagnostic(
            "unknown-axis",
            f"no input has an axis that is called `{name}`",
            f"write `{near}`"
            if near
            else f"the axes of the inputs are {listed}"
            if listed
            else "name the axes of the inputs under `inputs`",
            self._place(*path),
        )

    # --- the model -------------------------------------------------------------------------------

    def _against_nodes(self, index: int, operator: Operator) -> Iterator[Diagnostic]:
        nodes = (self.nodes or {}).get(operator.op, ())
        most_inputs = max((_count(node.inputs) for node in nodes), default=None)
        most_outputs = max((_count(node.outputs) for node in nodes), default=None)
        named = _named(nodes)
        inputs = len(operator.inputs) or most_inputs
        if most_inputs is not None and inputs != most_inputs:
            yield Diagnostic(
                "wrong-arity",
                f"{operator.op} is declared with {_inputs(len(operator.inputs))}, and takes "
                f"{_inputs(most_inputs)} in the model ({named})",
                'declare each input; one of which nothing has to be said as ["?", "?"]',
                self._place(index, "inputs"),
            )
        if most_outputs is not None and len(operator.outputs) != most_outputs:
            yield Diagnostic(
                "wrong-arity",
                f"{operator.op} is declared with {_outputs(len(operator.outputs))}, and gives "
                f"{_outputs(most_outputs)} in the model ({named})",
                "declare each output",
                self._place(index, "outputs"),
            )
        for at, output in enumerate(operator.outputs):
            if output.like is not None and inputs is not None and output.like >= inputs:
                yield Diagnostic(
                    "like-beyond-inputs",
                    f"there is no input {output.like}: {operator.op} takes {_inputs(inputs)}",
                    "inputs are counted from 0",
                    self._place(index, "outputs", at, "like"),
                )
        has_functions = self.outline is not None and self.outline.has_functions
        inner = [node for node in nodes if node.depth > 0 and not has_functions]
        if operator.torch is not None and inner:
            yield Diagnostic(
                "torch-in-body",
                f"torch cannot run nodes in the body of a control-flow node: {_named(inner)} "
                f"({operator.op})",
                "name a library of ONNX Runtime that runs it, or move it out of the body",
                self._place(index, "torch"),
            )

    def undeclared(self) -> Iterator[Diagnostic]:
        """Yield the operators of the model that nobody knows."""
        written = find(self.source.root, "operators")
        whole = len(written.items) if isinstance(written, Items) else 0
        faulty = self.source.root.faulty | self.reading.root.faulty
        if whole != len(self.reading.spec.operators) or "operators" in faulty:
            return  # what is in there is not known
        declared = {operator.op for operator in self.reading.spec.operators}
        ranks = _ranks(self.outline)
        lines = [] if declared else ["operators:"]
        for op, nodes in (self.nodes or {}).items():
            if op.rpartition("::")[0] in KNOWN_DOMAINS or op in declared:
                continue
            inputs = [ranks.get(name) for name in nodes[0].inputs]
            lines += [f"  {line}" for line in operator_entry(op, inputs, _count(nodes[0].outputs))]
            near = nearest(op, declared - (self.nodes or {}).keys())
            yield Diagnostic(
                "undeclared-operator",
                f"neither ONNX nor ONNX Runtime has {op}, which {_named(nodes)} "
                f"{'is' if len(nodes) == 1 else 'are'}",
                f"write it in place of `{near}`, which the model does not have"
                if near
                else "say under `operators` what it returns and who runs it, such as\n"
                + "\n".join(f"      {line}" for line in lines),
                self._key_of_model(),
            )
            lines.clear()

    # --- places ----------------------------------------------------------------------------------

    def _place(self, *keys: str | int) -> Place | None:
        for length in range(len(keys), 0, -1):
            node = find(self.reading.root, "operators", *keys[:length])
            if node is not None:
                return self.source.place(node)
        return None

    def _key(self, *keys: str | int) -> Place | None:
        node = find_key(self.reading.root, "operators", *keys)
        return None if node is None else self.source.place(node)

    def _key_of_model(self) -> Place | None:
        root = self.reading.root
        node = find_key(root, "operators") or find(root, "model", "path") or find(root, "model")
        return None if node is None or isinstance(node, Table) else self.source.place(node)


def _count(names: Sequence[str]) -> int:
    """Return how many inputs or outputs a node has, less those left out at the end."""
    return max((index + 1 for index, name in enumerate(names) if name), default=0)


def _ranks(outline: Outline | None) -> dict[str, int]:
    if outline is None:
        return {}
    values = (*outline.inputs, *outline.outputs, *outline.values)
    return {value.name: len(value.dims) for value in values if value.dims is not None}


def _named(nodes: Sequence[OutlineNode]) -> str:
    names = [f"`{node.name or f'{node.op_type}_{node.index}'}`" for node in nodes[:MOST_NAMED]]
    more = len(nodes) - len(names)
    if more:
        return f"{', '.join(names)} and {more} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _inputs(count: int) -> str:
    return f"{count} input" + ("" if count == 1 else "s")


def _outputs(count: int) -> str:
    return f"{count} output" + ("" if count == 1 else "s")
