"""TorchScript modules from source text. To be called where torch is installed."""

from __future__ import annotations

import importlib.util
import itertools
import textwrap
import warnings
from pathlib import Path

from optc.optimizer.torch_module import require_torch

_NUMBERS = itertools.count()
HEAD = """
from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor


class Module(torch.nn.Module):
"""


def scripted(path: Path, source: str) -> Path:
    """Write a TorchScript module with the methods of ``source`` to ``path``, and return that.

    TorchScript reads the source of a method from its file, so there has to be one.
    """
    torch = require_torch()
    name = f"module_{next(_NUMBERS)}"
    file = path.parent / f"{name}.py"
    file.write_text(HEAD + textwrap.indent(textwrap.dedent(source), "    "), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(made.Module().eval()).save(str(path))
    file.unlink()
    return path
