"""Put type stubs of TensorRT where mypy finds them: ``python .ci/tensorrt_stubs.py FOLDER``.

The distribution ``tensorrt-stubs`` was generated, and a few signatures in it are not Python: a
parameter called ``in``, a parameter without a default behind one that has one. mypy rejects such a
file as a whole, so this writes a repaired copy. The package's own requirement, TensorRT itself,
cannot be had from PyPI and is not needed: install it with ``--no-deps``.
"""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import files
from pathlib import Path

REPAIRS = (
    (re.compile(r"\bin: (list\[)"), r"in_: \1"),
    (re.compile(r"(power: Weights = None, channel_axis: int)\)"), r"\1 = ...)"),
)


def main(folder: Path) -> None:
    """Write the repaired stubs into ``folder``, which is to be on mypy's path."""
    for stub in files("tensorrt-stubs") or ():
        if stub.suffix != ".pyi":
            continue
        text = stub.read_text(encoding="utf-8")
        for pattern, replacement in REPAIRS:
            text = pattern.sub(replacement, text)
        ast.parse(text, filename=str(stub))  # another version may need another repair
        target = folder / stub
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
