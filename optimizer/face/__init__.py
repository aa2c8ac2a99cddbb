"""optc: compile ONNX models to TensorRT engines and the runtime around them, as a spec asks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optc.optimizer.compile import compile_spec as compile
    from optc.optimizer.optimize import optimize
    from optc.optimizer.runtime import Package, load
    from optc.specs.diagnostic import OptcError

__all__ = ["OptcError", "Package", "__version__", "compile", "load", "optimize"]
__version__ = "0.1.0"

_HOME = {
    "OptcError": ("optc.specs.diagnostic", "OptcError"),
    "Package": ("optc.optimizer.runtime", "Package"),
    "compile": ("optc.optimizer.compile", "compile_spec"),
    "load": ("optc.optimizer.runtime", "load"),
    "optimize": ("optc.optimizer.optimize", "optimize"),
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that ``optc --help`` and ``optc.specs`` stay light."""
    if name in _HOME:
        module, attribute = _HOME[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'optc' has no attribute {name!r}")
