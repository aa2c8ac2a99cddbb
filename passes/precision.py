"""What the nodes of a graph are to compute in: what the passes that lower precision are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np

Float = Literal["fp32", "fp16", "bf16"]
NodePrecision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]

DTYPES: Mapping[NodePrecision, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""Precision -> the type of its values."""

LARGEST: Mapping[NodePrecision, float] = {
    "fp32": float(np.finfo(np.float32).max),
    "fp16": 65504.0,
    "bf16": 2.0**127 * (2 - 2.0**-7),
    "int8": 127.0,
    "fp8": 448.0,
}
"""Precision -> its largest value; -128 of int8 is not used, so that it is symmetric."""


@dataclass(frozen=True, slots=True)
class Lowering:
    """What the nodes of a graph are to compute in.

    Attributes:
        nodes: Name of a node, also of one in a body -> its precision. A node that is not named is
            left as it is. A node in int8 or fp8 multiplies quantised operands; what is around them
            is in ``floats``.
        floats: What the nodes in int8 and fp8 take and give.
        amax: Name of a tensor -> the largest magnitude that its quantised values stand for.
    """

    nodes: Mapping[str, NodePrecision]
    floats: Float = "fp16"
    amax: Mapping[str, float] = field(default_factory=dict)

    def float_of(self, node: str) -> Float:
        """Return the type that the floats of a node are to have."""
        match self.nodes.get(node, "fp32"):
            case "int8" | "fp8":
                return self.floats
            case precision:
                return precision
