"""A spec to start from: the model's real inputs and symbols, with comments that explain them."""

from __future__ import annotations

from collections.abc import Sequence

from optc.specs.compile_spec import Range
from optc.specs.likely import likely_range
from optc.specs.source import written

DECIDE = "# DECIDE:"
"""What begins the comment on a line that only the user can fill in."""

InputOutline = tuple[str, str, Sequence[str | int | None] | None]
"""Name, dtype in words, and shape of an input. An axis is an extent, a name, or None where it has
neither; the shape is None where the model gives none."""

_HEAD = """\
# What optc compiles, for which GPUs, and how exact the result must be.
#   optc plan SPEC       says what becomes of the model
#   optc compile SPEC    builds the package
version: 1
model: {model}
"""

_TAIL = """\

targets:
  - {name: portable, backend: tensorrt-rtx}  # one engine for every NVIDIA GPU since Ampere
  # - {name: ada, backend: tensorrt-rtx, compute_capability: "8.9"}
  # - {name: turing, backend: tensorrt-rtx, compute_capability: "7.5"}

precision: fp32  # or tf32

# How exactly the package must compute what the model does. Checked by `optc compile`, if it is here.
# verify: {atol: 1.0e-4, rtol: 1.0e-4}
# With inputs of your own: verify: {data: "verify/*.npz"}

# What makes `optc compile` exit with 3.
# gate: {max_engines: 1, min_tensorrt_flops: 0.95}
"""


def starter_spec(model_path: str, inputs: Sequence[InputOutline]) -> str:
    """Return the text of a spec for a model.

    It compiles as it stands, or has lines that hold `DECIDE`, a guess, and what to decide.

    Args:
        model_path: Of the model, from the folder where the spec will be.
        inputs: Of the model, weights left out.
    """
    lines = [_HEAD.format(model=written(model_path))]
    guessed = [entry for entry in inputs if entry[2] is None]
    lines.append("# The inputs of the model, a name for each dynamic axis:")
    for name, dtype, shape in inputs:
        lines.append(f"#   {written(name)}: {dtype} {_shown(name, shape)}")
    if guessed:
        lines.append("inputs:")
        for name, _, _ in guessed:
            lines.append(
                f"  {written(name)}: {{shape: [batch, 3, 224, 224]}}  "
                f"{DECIDE} the model gives no shape for this input"
            )
    else:
        # An example that is true of this model.
        name = written(inputs[0][0]) if inputs else "images"
        lines.append("# Made-up input is in [0, 1); to have it otherwise:")
        lines.append(f"# inputs: {{{name}: {{range: [-1, 1]}}}}")
    ranges = _ranges(inputs)
    if ranges:
        lines += ["", "# The range of each dynamic axis, or a number to pin it."]
        lines.append("dims:")
        for symbol, (range_, doubt) in ranges.items():
            comment = f"  {DECIDE} {doubt}" if doubt else ""
            lines.append(f"  {written(symbol)}: {range_}{comment}")
    return "\n".join(lines) + "\n" + _TAIL


def decisions(text: str) -> list[int]:
    """Return the numbers of the lines, counted from 1, that need a decision."""
    return [number for number, line in enumerate(text.splitlines(), 1) if DECIDE in line]


def _ranges(inputs: Sequence[InputOutline]) -> dict[str, tuple[Range, str | None]]:
    found: dict[str, tuple[Range, str | None]] = {}
    for name, _, shape in inputs:
        for axis, dim in enumerate(shape if shape is not None else ["batch"]):
            if not isinstance(dim, int):
                symbol = dim or f"{name}_{axis}"
                found.setdefault(symbol, likely_range(symbol, len(shape or ()), axis))
    return found


def _shown(name: str, shape: Sequence[str | int | None] | None) -> str:
    if shape is None:
        return "of unknown shape"
    dims = (
        str(dim) if isinstance(dim, int) else written(dim or f"{name}_{axis}")
        for axis, dim in enumerate(shape)
    )
    return f"[{', '.join(dims)}]"
