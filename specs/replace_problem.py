"""What in `partition.replace` cannot be: files that are not there, names that the model lacks.

Whether a range can be cut out is asked of the graph, once it is loaded (`optc.optimizer.replace`).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from optc.specs.compile_spec import Replacement
from optc.specs.diagnostic import Diagnostic, PlaceOf, nearest
from optc.specs.missing_file import missing_file
from optc.specs.model_outline import Outline, OutlineNode

NAME_AN_OUTPUT: Final = "name the output of a node of the main graph"
"""What to do about a tensor at which a model cannot be cut."""

_KEYS = ("partition", "replace")


def missing_modules(
    replace: tuple[Replacement, ...], scopes: Collection[str], folder: Path, place: PlaceOf
) -> Iterator[Diagnostic]:
    """Yield what is wrong with the entries in themselves: their files and names.

    Args:
        replace: The entries.
        scopes: Names of the scopes, which are names of stages, too.
        folder: What their paths are relative to.
        place: Tells where they stand.
    """
    names: dict[str, int] = {}
    for index, each in enumerate(replace):
        if not os.path.isfile(folder / each.torch):  # which says no of a path that cannot be, too
            yield missing_file(
                "module-not-found", "file", folder, each.torch, place(*_KEYS, index, "torch")
            )
        if each.name in scopes:
            yield Diagnostic(
                "bad-replacement",
                f"a scope is called `{each.name}`, too",
                "give each a name of its own: a stage is called by it",
                place(*_KEYS, index, "name"),
            )
        if names.setdefault(each.name, index) != index:
            yield Diagnostic(
                "bad-replacement",
                f"two replacements are called `{each.name}`",
                "give each a name of its own: a stage is called by it",
                place(*_KEYS, index, "name"),
            )


def unknown_ends(
    replace: tuple[Replacement, ...], outline: Outline, place: PlaceOf
) -> Iterator[Diagnostic]:
    """Yield the tensors at which no range can begin or end.

    Args:
        replace: The entries.
        outline: Of the model.
        place: Tells where they stand.
    """
    if not replace:
        return
    made: dict[str, OutlineNode] = {}
    for node in sorted(outline.nodes, key=lambda node: node.depth):
        for name in filter(None, node.outputs):
            made.setdefault(name, node)
    inputs = {value.name for value in outline.inputs}
    given_away: dict[str, tuple[int, str]] = {}  # tensor -> the entry that gives it
    for index, each in enumerate(replace):
        for key, names in (("from", each.from_), ("to", each.to)):
            for at, name in enumerate(names):
                where = place(*_KEYS, index, key, at)
                known = name in made or name in inputs or name in outline.initialisers
                reason = _why_not(name, key, made, outline) if known else None
                if not known:
                    near = nearest(name, {*made, *(inputs if key == "from" else ())})
                    problem = f"the model has no tensor `{name}`"
                    todo = f"the nearest name is `{near}`" if near else NAME_AN_OUTPUT
                    yield Diagnostic("unknown-tensor", problem, todo, where)
                elif reason is not None:
                    todo = NAME_AN_OUTPUT
                    yield Diagnostic("bad-replacement", reason, todo, where)
                elif name in names[:at]:
                    problem = f"`{name}` stands under `{key}` twice"
                    yield Diagnostic("bad-replacement", problem, "name it once", where)
                elif key == "to" and name in each.from_:
                    problem = f"`{name}` stands under `from` and under `to`"
                    todo = "leave it out of one of them: a module need not give what it is given"
                    yield Diagnostic("bad-replacement", problem, todo, where)
                elif key == "to" and given_away.setdefault(name, (index, each.name))[0] != index:
                    other = given_away[name][1]
                    problem = f"both `{other}` and `{each.name}` are to give `{name}`"
                    todo = "let one end where the other begins"
                    yield Diagnostic("bad-replacement", problem, todo, where)


def _why_not(name: str, key: str, made: dict[str, OutlineNode], outline: Outline) -> str | None:
    """Return why no range can begin or end at a tensor that the model has, or None."""
    node = made.get(name)
    if name in outline.initialisers or (node is not None and node.op_type == "Constant"):
        what = "no node computes it" if key == "to" else "the module can have it as a weight"
        return f"`{name}` is a constant: {what}"
    if node is None:
        return None if key == "from" else f"`{name}` is an input of the model: no range ends there"
    if node.depth > 0 and not outline.has_functions:  # of these it shows when they are inlined
        return f"`{name}` is made inside the body of a control-flow node"
    return None
