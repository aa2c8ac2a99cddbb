"""A spec to start from: the model's real inputs and symbols, with comments that explain them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optc.specs.compile_spec import Range
from optc.specs.likely import likely_range
from optc.specs.source import written

DECIDE = "# DECIDE:"
"""What begins the comment on a line that only the user can fill in."""

InputOutline = tuple[str, str, Sequence[str | int | None] | None]
"""Name, dtype in words, and shape of an input. An axis is an extent, a name, or None where it has
neither; the shape is None where the model gives none."""

LikelyRange = tuple[Range, str | None]
"""Of a dynamic axis, and a comment where there is something to say about it."""

_HEAD = """\
# What optc compiles, for which GPUs, and how exact the result must be.
#   optc plan SPEC       says what becomes of the model
#   optc compile SPEC    builds the package
version: 1
model: {model}
"""

_OPERATORS = (
    f"{DECIDE} what operators return that ONNX does not have, and who runs them. Without it the model",
    "# does not compile. In `outputs`, `{dtype: int64, shape: [n, k]}` says both dtype and shape.",
    "# operators:",
)

_TAIL = """\

targets:
  - {name: portable, backend: tensorrt-rtx}  # one engine for every NVIDIA GPU since Ampere
  # - {name: ada, backend: tensorrt-rtx, compute_capability: "8.9"}
  # - {name: turing, backend: tensorrt-rtx, compute_capability: "7.5"}

precision: fp32  # or tf32; fp16, bf16, as far as `verify` allows; int8, fp8, with `calibration`

# How exactly the package must compute what the model does. Checked by `optc compile`, if it is here.
# `verify: {}` asks for the default of the precision.
# verify: {atol: 1.0e-4, rtol: 1.0e-4}
# With inputs of your own: verify: {data: "verify/*.npz"}

# What makes `optc compile` exit with 3.
# gate: {max_engines: 1, min_tensorrt_flops: 0.95}
"""


def starter_spec(
    model_path: str,
    inputs: Sequence[InputOutline],
    *,
    ranges: Mapping[str, LikelyRange] | None = None,
    values: Mapping[str, tuple[int, int]] | None = None,
    note: str | None = None,
    operators: Sequence[Sequence[str]] = (),
) -> str:
    """Return the text of a spec for a model.

    It compiles as it stands, or has lines that hold `DECIDE`, a guess, and what to decide.

    Args:
        model_path: Of the model, from the folder where the spec will be.
        inputs: Of the model, weights left out.
        ranges: Of every dynamic axis. None: what `likely_ranges` makes of their names.
        values: Name of an input -> lowest and highest value that it may have.
        note: What else there is to know about made-up input, in one line.
        operators: An entry of `operators`, in lines, for each operator that nobody knows.
    """
    ranges = likely_ranges(inputs) if ranges is None else ranges
    values = values or {}
    lines = [_HEAD.format(model=written(model_path))]
    lines.append("# The inputs of the model, a name for each dynamic axis:")
    for name, dtype, shape in inputs:
        lines.append(f"#   {written(name)}: {dtype} {_shown(name, shape)}")
    if note is not None:
        lines.append(f"# {note}")
    said = [entry for entry in (_said(input_, values) for input_ in inputs) if entry]
    if said:
        lines += ["inputs:", *said]
    else:
        # An example that is true of this model.
        name = written(inputs[0][0]) if inputs else "images"
        lines.append("# Made-up input is in [0, 1); to have it otherwise:")
        lines.append(f"# inputs: {{{name}: {{range: [-1, 1]}}}}")
    if ranges:
        lines += ["", "# The range of each dynamic axis, or a number to pin it."]
        lines.append("dims:")
        for symbol, (range_, comment) in ranges.items():
            lines.append(f"  {written(symbol)}: {range_}" + (f"  {comment}" if comment else ""))
    if operators:
        lines += ["", *_OPERATORS]
        lines += [f"#   {line}" for entry in operators for line in entry]
    return "\n".join(lines) + "\n" + _TAIL


def decisions(text: str) -> list[int]:
    """Return the numbers of the lines, counted from 1, that need a decision."""
    return [number for number, line in enumerate(text.splitlines(), 1) if DECIDE in line]


def likely_ranges(inputs: Sequence[InputOutline]) -> dict[str, LikelyRange]:
    """Return a range for each dynamic axis, by its name and place."""
    found: dict[str, LikelyRange] = {}
    for name, _, shape in inputs:
        for axis, dim in enumerate(shape if shape is not None else ["batch"]):
            if isinstance(dim, int):
                continue
            symbol = dim or f"{name}_{axis}"
            if symbol not in found:
                range_, doubt = likely_range(symbol, shape or (), axis)
                found[symbol] = range_, f"{DECIDE} {doubt}" if doubt else None
    return found


def _said(input_: InputOutline, values: Mapping[str, tuple[int, int]]) -> str | None:
    """Return the line of ``inputs`` on an input, where there is something to say."""
    name, _, shape = input_
    parts, comments = [], []
    if shape is None:
        parts.append("shape: [batch, 3, 224, 224]")
        comments.append(f"{DECIDE} the model gives no shape for this input")
    if name in values:
        low, high = values[name]
        parts.append(f"range: [{low}, {high}]")
        if not comments:
            comments.append(f"# it indexes a table of {high + 1} rows")
    if not parts:
        return None
    return f"  {written(name)}: {{{', '.join(parts)}}}  {comments[0]}"


def _shown(name: str, shape: Sequence[str | int | None] | None) -> str:
    if shape is None:
        return "of unknown shape"
    dims = (
        str(dim) if isinstance(dim, int) else written(dim or f"{name}_{axis}")
        for axis, dim in enumerate(shape)
    )
    return f"[{', '.join(dims)}]"
