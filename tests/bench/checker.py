"""Whether onnx takes what a tool wrote."""

from __future__ import annotations

from pathlib import Path

import onnx

LARGEST_CHECKED = 2 << 30
"""Bytes of a file that onnx's checker takes as a whole."""


def why_refused(model: Path) -> str:
    """Return the reason of onnx's checker, or nothing where the model is fine or too large."""
    if model.stat().st_size >= LARGEST_CHECKED:
        return ""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error).strip().splitlines()[0]
    return ""
