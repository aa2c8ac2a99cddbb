"""What in `partition.replace` cannot be: files that are not there, names that the model lacks.

Whether a range can be cut out is asked of the graph, once it is loaded (`optc.optimizer.replace`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from optc.specs.compile_spec import Replacement
from optc.specs.diagnostic import Diagnostic, Place, nearest
from optc.specs.model_outline import Outline, OutlineNode

PlaceOf = Callable[..., Place | None]
"""Keys and indices from the top of the spec -> where in the file that stands."""

_KEYS = ("partition", "replace")


def missing_modules(
    replace: tuple[Replacement, ...], folder: Path, place: PlaceOf
) -> Iterator[Diagnostic]:
    """Yield what is wrong with the entries in themselves: their files and names.

    Args:
        replace: The entries.
        folder: What their paths are relative to.
        place: Tells where they stand.
    """
    names: dict[str, int] = {}
    for index, each in enumerate(replace):
        path = folder / each.torch
        if not path.is_file():
            siblings = path.parent.iterdir() if path.parent.is_dir() else ()
            near = nearest(path.name, sorted(file.name for file in siblings))
            yield Diagnostic(
                "module-not-found",
                f"there is no file `{path}`",
                f"write `{Path(each.torch).parent / near}`"
                if near
                else "check the path, which is taken from the folder of the spec",
                place(*_KEYS, index, "torch"),
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
                reason = _why_not(name, key, made, inputs, outline)
                if reason is not None:
                    code, problem, todo = reason
                    yield Diagnostic(code, problem, todo, where)
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


def _why_not(
    name: str,
    key: str,
    made: dict[str, OutlineNode],
    inputs: set[str],
    outline: Outline,
) -> tuple[str, str, str | None] | None:
    """Return code, problem and remedy where no range can begin or end at a tensor, else None."""
    node = made.get(name)
    constant = name in outline.initialisers or (node is not None and node.op_type == "Constant")
    todo: str | None = "name the output of a node of the main graph"
    if node is not None and node.depth == 0 and not constant:
        return None
    if node is not None and node.depth > 0:
        if outline.has_functions:
            return None  # a function's, perhaps: it shows when functions are inlined
        problem = f"`{name}` is made inside the body of a control-flow node"
        return "bad-replacement", problem, todo
    if constant:
        what = "no node computes it" if key == "to" else "the module can have it as a weight"
        return "bad-replacement", f"`{name}` is a constant: {what}", todo
    if name in inputs:
        if key == "from":
            return None
        return "bad-replacement", f"`{name}` is an input of the model: no range ends there", todo
    near = nearest(name, {*made, *(inputs if key == "from" else ())})
    todo = f"the nearest name is `{near}`" if near else None
    return "unknown-tensor", f"the model has no tensor `{name}`", todo
