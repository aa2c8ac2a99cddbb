"""An entry of `operators` to start from, for an operator that nothing is known of but its nodes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from optc.specs.source import written

_AXES = ("n", "c", "h", "w")
_PLAIN = re.compile(r"[A-Za-z][\w.]*::\w+")


def operator_entry(op: str, ranks: Sequence[int | None], outputs: int) -> list[str]:
    """Return the lines of an entry, which are to be completed.

    Args:
        op: Domain and op.
        ranks: Of each input; None where it is not known.
        outputs: How many there are.

    Example:
        >>> print("\\n".join(operator_entry("acme::Peaks", [4, None], 1)))
        - op: acme::Peaks
          inputs: [[n, c, h, w], [n1, c1, h1, w1]]
          outputs: [{like: 0}]
          onnxruntime: libpeaks.so  # or a module on torch: `torch: peaks.pt`
    """
    inputs = ", ".join(_axes(index, rank) for index, rank in enumerate(ranks))
    name = op.rpartition("::")[2].lower()
    return [
        f"- op: {op if _PLAIN.fullmatch(op) else written(op)}",
        f"  inputs: [{inputs}]",
        f"  outputs: [{', '.join(['{like: 0}'] * max(1, outputs))}]",
        f"  onnxruntime: {written(f'lib{name}.so')}  # or a module on torch: `torch: {name}.pt`",
    ]


def _axes(index: int, rank: int | None) -> str:
    rank = len(_AXES) if rank is None else rank
    names = _AXES if rank <= len(_AXES) else tuple(f"a{axis}_" for axis in range(rank))
    suffix = str(index) if index else ""
    return "[" + ", ".join(f"{name}{suffix}" for name in names[:rank]) + "]"
