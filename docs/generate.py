"""Write docs/reference/*.md from the code: ``python docs/generate.py``.

What the reference says of keys, passes, codes and commands stands in the code that it is about. Only
what introduces a page is written here. The result depends on nothing but the code; a test compares
it with what is committed.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel
from typer.models import ArgumentInfo

from optc.optimizer import cli
from optc.passes import registry
from optc.passes.contract import Pass
from optc.specs import manifest
from optc.specs.codes import TOPICS
from optc.specs.compile_spec import json_schema
from optc.specs.diagnostic import Diagnostic, Place

REFERENCE = Path(__file__).parent / "reference"
MADE = "<!-- Made from the code by docs/generate.py: change the code, not this file. -->"

Schema = Mapping[str, Any]


def pages() -> dict[str, str]:
    """Return the text of each page by the name of its file."""
    made = {
        "spec.md": spec_page(),
        "passes.md": passes_page(),
        "manifest.md": manifest_page(),
        "errors.md": errors_page(),
        "cli.md": cli_page(),
    }
    return {name: f"{MADE}\n\n{_spaced(text)}\n" for name, text in made.items()}


# --- the spec ------------------------------------------------------------------------------------

SPEC_INTRO = """\
# The spec, version 1

A spec is a YAML file, or a JSON file where its name ends in `.json`. `optc schema` prints the same
as a JSON Schema, for editors and for programs that write specs. `optc init MODEL` writes a spec to
start from.

```yaml
version: 1
model: {path: detector.onnx}
inputs:
  images: {shape: [batch, 3, height, width], range: [0, 1]}
dims: {batch: {min: 1, opt: 4, max: 16}, height: 640, width: 640}
targets:
  - {name: ampere, compute_capability: "8.6"}
  - {name: turing, compute_capability: "7.5"}
precision: fp32
passes: {disable: [fold-mul-into-conv]}
partition:
  points: [/backbone/out]
  off_tensorrt: [{op: NonMaxSuppression}, {node: "/post/*"}]
fallback: {runtime: onnxruntime}
verify: {data: "verify/*.npz", atol: 1.0e-4, rtol: 1.0e-4}
gate: {max_engines: 2, min_tensorrt_flops: 0.95}
```

Rules that hold everywhere:

- An unknown key, a wrong type, an unknown name or a number out of range is an error with its line,
  its column and a [code](errors.md). All problems of a spec are told in one go.
- Paths and patterns of paths are relative to the folder of the spec.
- Names of tensors, nodes and ops are those of the original model, before any pass.
- A symbol is the name of a dynamic axis. Axes with one symbol have one extent. An axis that the
  model does not name, or calls `?`, is called `<input>_<axis>`, such as `images_0`.
- Nothing in a spec runs code.
"""


def spec_page() -> str:
    """Return the page on what a user may write."""
    schema = json_schema()
    homes = _homes(schema)
    links = {name: f"[`{paths[0]}`](#{_anchor(paths[0])})" for name, paths in homes.items()}
    parts = [SPEC_INTRO, "## The keys of a spec\n", _table(schema, schema, links)]
    for name, paths in homes.items():
        part = schema["$defs"][name]
        parts.append(f"\n## `{paths[0]}`\n")
        parts.append(part["description"])
        if len(paths) > 1:
            parts.append(f"The same at {_listed(f'`{path}`' for path in paths[1:])}.")
        forms = part.get("anyOf", [part])
        long = next(form for form in forms if form.get("type") == "object")
        if short := [form for form in forms if form is not long]:
            parts.append(f"\nShort form: {kind(short[0], links)}.")
        if "oneOf" in part:
            keys = [f"`{key}`" for form in part["oneOf"] for key in form["required"]]
            parts.append(f"\nExactly one of {_listed(keys)} is given.")
        parts.append("\n" + _table(long, schema, links))
    return "\n".join(parts)


def _homes(schema: Schema) -> dict[str, list[str]]:
    """Return where in a spec each part stands, in the order in which they are met."""
    found: dict[str, list[str]] = {}

    def visit(part: Schema, path: str) -> None:
        for key, value in part.get("properties", {}).items():
            follow(value, f"{path}.{key}" if path else key)

    def follow(value: Schema, path: str) -> None:
        if "$ref" in value:
            name = _name(value)
            paths = found.setdefault(name, [])
            if path not in paths:
                paths.append(path)
            target = schema["$defs"][name]
            for form in target.get("anyOf", [target]):
                visit(form, path)
        elif value.get("type") == "array" and "items" in value:
            follow(value["items"], f"{path}[]")
        elif isinstance(value.get("additionalProperties"), Mapping):
            follow(value["additionalProperties"], f"{path}.<name>")

    visit(schema, "")
    return found


def _table(part: Schema, schema: Schema, links: Mapping[str, str]) -> str:
    required = part.get("required", ())
    rows = []
    for key, value in part["properties"].items():
        default = "required" if key in required else _default(value)
        about = value if "description" in value else schema["$defs"][_name(value)]
        rows.append((f"`{key}`", kind(value, links), default, about["description"]))
    return table(("key", "value", "default", "meaning"), rows)


def _name(reference: Schema) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _default(value: Schema) -> str:
    default = value.get("default")
    return "" if default in (None, [], {}, "") else f"`{default}`"


def kind(value: Schema, links: Mapping[str, str]) -> str:
    """Return what may stand for a value, in words.

    Args:
        value: A JSON Schema.
        links: Name of a definition -> what stands for it.
    """
    if "$ref" in value:
        return links[_name(value)]
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(kind(form, links) for form in value["anyOf"]))
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    match value.get("type"):
        case "array" if "prefixItems" in value:
            return f"[{', '.join(kind(item, links) for item in value['prefixItems'])}]"
        case "array":
            item = kind(value["items"], links)
            return f"list of ({item})" if " or " in item else f"list of {item}"
        case "object":
            return f"mapping of name to {kind(value.get('additionalProperties', {}), links)}"
        case "integer":
            return "whole number" + _bounds(value)
        case "number":
            return "number" + _bounds(value)
        case "string":
            return "text"
        case "null":
            return "null"
        case "boolean":
            return "true or false"
        case _:
            return "any JSON"


def _bounds(value: Schema) -> str:
    least, most = value.get("minimum"), value.get("maximum")
    if most == 2**31 - 1:
        most = None  # the largest extent of an axis: no bound that anybody meets
    if least is not None and most is not None:
        return f", {least:,} to {most:,}"
    bounds = {
        "at least": least,
        "above": value.get("exclusiveMinimum"),
        "at most": most,
        "below": value.get("exclusiveMaximum"),
    }
    said = [f"{words} {bound:,}" for words, bound in bounds.items() if bound is not None]
    return f", {' and '.join(said)}" if said else ""


# --- the manifest --------------------------------------------------------------------------------

MANIFEST_INTRO = """\
# The manifest, schema version 1

`manifest.json` stands at the top of a package and says what is in it, which stage runs where, and
why. `optc plan --json` prints the same document without `files` and engines. A package holds:

```text
manifest.json                   this file
report.json                     the long version: builds, verification, where nodes come from
stages.svg                      the stages, drawn
model.onnx                      the optimised model as a whole
stages/NN-<runtime>.onnx        stage NN as ONNX, whatever runs it
stages/weights/*.bin            constants of more than 16 KiB, which the ONNX files share
weights                         a link to stages/weights
engines/<target>/NN.engine      the engine of stage NN for a target
```

To run a package without optc, take the stages of a target in the order of `targets[].stages`, and
give each the tensors that its `inputs` name. How the weights are laid out, and why, stands in
[Architecture](../explanation/architecture.md#weights).

"""


def manifest_page() -> str:
    """Return the page on the keys of `manifest.json`."""
    schema = manifest.Manifest.model_json_schema(mode="serialization")
    parts = [MANIFEST_INTRO + _prose(_body(inspect.getdoc(manifest) or "")), ""]
    classes = [manifest.Manifest, *_parts_of(manifest.Manifest)]
    links = {each.__name__: f"[{each.__name__}](#{each.__name__.lower()})" for each in classes}
    links |= {"Range": "mapping with `min`, `opt`, `max`", "JsonValue": "any JSON"}
    for each in classes:
        shape = schema if each is manifest.Manifest else schema["$defs"][each.__name__]
        meanings = _attributes(each)
        rows = [
            (f"`{key}`", kind(value, links), meanings[key])
            for key, value in shape["properties"].items()
        ]
        summary = (each.__doc__ or "").split("\n\n")[0]
        parts += [
            f"## {each.__name__}\n",
            _inline(summary),
            "",
            table(("key", "value", "meaning"), rows),
        ]
    return "\n".join(parts)


def _parts_of(model: type[BaseModel]) -> list[type[BaseModel]]:
    """Return the models that ``manifest.py`` defines and ``model`` refers to, in that file's order."""
    names = set(model.model_json_schema()["$defs"])
    return [
        each
        for name, each in vars(manifest).items()
        if name in names and inspect.isclass(each) and each.__module__ == manifest.__name__
    ]


def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """Return what the docstrings of ``model`` and its bases say of their attributes."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        _, _, listed = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?=    \w)", "\n" + listed.split("\n\n")[0]):
            name, colon, meaning = entry.strip().partition(": ")
            if colon:
                found[name] = _inline(" ".join(meaning.split()))
    return found


# --- passes --------------------------------------------------------------------------------------

PASSES_INTRO = """\
# Passes

In running order. Passes run round after round until a whole round changes nothing, on the bodies of
If, Loop and Scan too. `optc passes` lists them with those that other distributions bring.

A spec leaves passes out with `passes: {disable: [...]}`. What a pass rewrote, and what it met and left
alone, is under `passes` in the [manifest](manifest.md).
"""

LABEL = re.compile(r"^((?:Why it holds|Needs|Keeps|Skips|Left alone|Order)\b[^:]*:)", re.MULTILINE)


LEGALISING_INTRO = """\

## Passes that legalise

They do not run with the others. Each is shown the nodes that a target refuses, and what it makes of them
is kept where that target's parser and builder take it: see
[Legalising](../explanation/legalising.md). `optc optimize --only PASS` runs one on all nodes it knows.
"""

LOWERING_INTRO = """\

## Passes that lower precision

They run on a stage that is to be built, where the spec asks for less than fp32, and do what was decided for each
node: see [Precision](../explanation/precision.md). In an engine of fp32 there is nothing for them to do.
"""

OPENING_INTRO = """\

## Passes that open control flow

They run once, where no target takes an If whole, on the nodes for which that pays: see
[Control flow](../explanation/control-flow.md).
"""


def passes_page() -> str:
    """Return the page on the built-in passes, each with its docstring."""
    optimising = [registry.load(name) for name in registry.ORDER]
    legalising = [registry.load(name) for name in registry.LEGALISING]
    lowering = [registry.load(name) for name in registry.LOWERING]
    opening = [registry.load(name) for name in registry.OPENING]
    parts = [PASSES_INTRO, _table_of(optimising), LEGALISING_INTRO, _table_of(legalising)]
    parts += [LOWERING_INTRO, _table_of(lowering), OPENING_INTRO, _table_of(opening)]
    for each in (*optimising, *legalising, *lowering, *opening):
        doc = inspect.getdoc(inspect.getmodule(each)) or ""
        parts.append(f"\n## {each.name}\n")
        parts.append(f"Group: {each.group}. Exactness: {each.exactness}.\n")
        parts.append(_prose(doc))
        if options := each.options():
            rows = [
                (f"`{name}`", option.type.__name__, f"`{option.default}`", _inline(option.help))
                for name, option in options.items()
            ]
            parts.append("\nUnder `passes.options` in a spec:\n")
            parts.append(table(("option", "type", "default", "meaning"), rows))
    return "\n".join(parts)


def _table_of(passes: Iterable[type[Pass]]) -> str:
    rows = [
        (f"[{each.name}](#{each.name})", each.group, each.exactness, _inline(each.summary()))
        for each in passes
    ]
    return table(("pass", "group", "exactness", "what it does"), rows)


# --- errors --------------------------------------------------------------------------------------

EXAMPLE = Diagnostic(
    code="unknown-pass",
    problem="there is no pass called `fold-mul-into-cnov`",
    place=Place(
        file="spec.yaml",
        line=12,
        column=7,
        length=18,
        text="    - fold-mul-into-cnov",
    ),
    todo="write `fold-mul-into-conv`, or see all of them with `optc passes`",
)

ERRORS_INTRO = f"""\
# Errors

An error says what is wrong, where, and what to do:

```text
{EXAMPLE.render()}
```

The word in brackets is its code. Codes are stable: programs may rely on them. With `--json` an error
is in the `diagnostics` of the document on stdout, with `severity`, `code`, `problem`, `todo` and
`place`. A `warning` or `note` has a code too and does not change the exit code.

The exit codes are in the [reference of the command line](cli.md#exit-codes).
"""


def errors_page() -> str:
    """Return the page on the codes, topic by topic."""
    parts = [ERRORS_INTRO]
    for topic, codes in TOPICS.items():
        rows = [(f"`{code}`", meaning) for code, meaning in codes.items()]
        parts += [f"## {topic}\n", table(("code", "meaning"), rows), ""]
    return "\n".join(parts)


# --- the command line ----------------------------------------------------------------------------

CLI_INTRO = """\
# The command line

Results go to stdout, progress and errors to stderr. With `--json` stdout holds one JSON document and
nothing else. Every command has `-h` and `--help`.
"""


def cli_page() -> str:
    """Return the page on the commands with their arguments and options."""
    parts = [CLI_INTRO, "## Exit codes\n"]
    stated = " ".join(cli.EXIT_CODES.removeprefix("Exit codes: ").rstrip(".").split())
    rows = [tuple(entry.split(" ", 1)) for entry in stated.split("; ")]
    parts.append(table(("code", "meaning"), ((f"`{code}`", meaning) for code, meaning in rows)))
    parts.append("\nWith several specs: 1 where one ended with 1, else 2, else 3.")
    for command in cli.app.registered_commands:
        assert command.callback is not None, "a command is a function"
        name = command.name or command.callback.__name__
        parameters = list(_parameters(command.callback))
        needed = [p.usage for p in parameters if p.required]
        more = ["[OPTIONS]"] if any(not p.required for p in parameters) else []
        parts += [
            f"\n## optc {name}\n",
            f"```text\n{' '.join(['optc', name, *needed, *more])}\n```\n",
            _inline(inspect.getdoc(command.callback) or ""),
        ]
        rows = [(p.shown, p.help) for p in parameters]
        if rows:
            parts.append("\n" + table(("argument or option", "meaning"), rows))
    return "\n".join(parts)


@dataclass(frozen=True)
class Parameter:
    """An argument or option of a command: how usage and table show it, and what it means."""

    usage: str
    shown: str
    help: str
    required: bool


def _parameters(command: Callable[..., Any]) -> Iterator[Parameter]:
    """Yield the parameters of ``command``, from its signature: what typer makes of it varies."""
    types = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        type_, info = get_args(types[name])
        default = parameter.default
        required = default is inspect.Parameter.empty
        if isinstance(info, ArgumentInfo):
            shown = usage = info.metavar or name.upper()
        else:
            # Within Annotated, typer takes the first spelling for a default.
            spelt = [s for s in (info.default, *(info.param_decls or ())) if isinstance(s, str)]
            spelt = spelt or [f"--{name}"]
            value = info.metavar or _value_of(type_)
            usage = f"{spelt[-1]} {value}".strip()
            shown = f"{', '.join(spelt)} {value}".strip()
        told = _inline(info.help or "")
        if not required and default:
            told += f"  [default: {default}]"
        yield Parameter(usage, f"`{shown}`", told, required)


def _value_of(type_: Any) -> str:
    """Return what stands for the value of an option of this type."""
    if type_ is bool:
        return ""
    if isinstance(type_, type) and issubclass(type_, Enum):
        return "|".join(str(choice.value) for choice in type_)
    assert float in get_args(type_), f"no word for {type_}"
    return "NUMBER"


# --- Markdown ------------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [_row(heads), _row(["---"] * len(heads))]
    return "\n".join([*lines, *(_row([_cell(cell) for cell in row]) for row in rows)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _prose(doc: str) -> str:
    """Return a module's docstring as Markdown: drawings as they are, labels in bold."""
    return "\n".join(_paragraphs(doc))


def _paragraphs(doc: str) -> Iterator[str]:
    drawn: list[str] = []
    for line in [*doc.splitlines(), "end"]:
        if line.startswith("    ") or (drawn and not line):
            drawn.append(line[4:].rstrip())
            continue
        if drawn:
            yield "```text\n" + "\n".join(drawn).strip("\n") + "\n```\n"
            drawn = []
        if line != "end":
            yield LABEL.sub(r"\n**\1**", _inline(line))


def _body(doc: str) -> str:
    """Return a docstring without its first paragraph."""
    return doc.partition("\n\n")[2]


def _inline(text: str) -> str:
    """Return the text of a docstring as Markdown: its code, its stars and its angle brackets."""
    pieces = re.split(r"(`+[^`]+`+)", text)
    for index, piece in enumerate(pieces):
        if index % 2:
            pieces[index] = f"`{piece.strip('`')}`"
        else:
            pieces[index] = piece.replace("*", "\\*").replace("<", "&lt;")
    return "".join(pieces)


def _spaced(text: str) -> str:
    """Return ``text`` with one empty line before a heading, and never two of them."""
    text = re.sub(r"\n+(?=## )", "\n\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _anchor(title: str) -> str:
    """Return the anchor that Markdown gives to a heading of this text in backticks."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def main() -> None:
    """Write the pages."""
    REFERENCE.mkdir(exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
