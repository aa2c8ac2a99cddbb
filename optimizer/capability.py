"""Whether a target computes in a precision at all, asked of its builder with a model of one product.

bfloat16 came with compute capability 8.0 and float8 with 8.9; the builder says so, but only after
minutes where it is asked with a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from optc.optimizer.oracle import Oracle
from optc.passes.precision import DTYPES, NodePrecision
from optc.specs.compile_spec import Target
from optc.specs.diagnostic import Diagnostic, Place, SpecError

LEAST_OF_PORTABLE = "8.0"
"""A portable engine is for Ampere and later. The builder takes float8 for it, and most of these GPUs
do not have it; so it is asked for the least of them."""

SIZE = 16
"""Channels, rows and columns."""

OPSET = 23
"""In which Q and DQ know float8, and float16 scales."""


def check_targets(
    precisions: Collection[NodePrecision],
    targets: Sequence[Target],
    oracle: Oracle,
    place: Callable[[NodePrecision], Place | None],
) -> None:
    """Make sure that all ``targets`` compute in all ``precisions``.

    Args:
        precisions: Those that nodes are to be lowered to.
        targets: What is built for.
        oracle: Who is asked. It remembers.
        place: Where the spec names a precision.

    Raises:
        SpecError: ``precision-not-on-target``, with the builder's words, one a target.
    """
    asked = sorted(set(precisions) - {"fp32"})
    problems = []
    for target in targets:
        verdicts = oracle.verdicts(
            [_product(precision) for precision in asked],
            target.backend,
            profiles=[()] * len(asked),
            compute_capability=target.compute_capability or LEAST_OF_PORTABLE,
        )
        for precision, verdict in zip(asked, verdicts, strict=True):
            if verdict.refused is not None:
                capability = target.compute_capability or f"portable, from {LEAST_OF_PORTABLE} on"
                problems.append(
                    Diagnostic(
                        "precision-not-on-target",
                        f"target `{target.name}` ({capability}) does not compute in {precision}; "
                        f"{verdict.refused.by}: {verdict.refused.text}",
                        "choose another precision, or compile for this target from a spec of its own",
                        place(precision),
                    )
                )
    if problems:
        raise SpecError(*problems)


def _product(precision: NodePrecision) -> ModelProto:
    """Return a model of one product in ``precision``, float32 outside.

    It is a Conv: of products of matrices 7.5 takes none in fp32, which they are around int8 here.
    """
    shape = [1, SIZE, SIZE, SIZE]
    weights = np.eye(SIZE, dtype=np.float32).reshape(SIZE, SIZE, 1, 1)
    if precision in ("fp16", "bf16"):
        type_ = helper.np_dtype_to_tensor_dtype(DTYPES[precision])
        nodes = [
            helper.make_node("Cast", ["x"], ["low"], "lower", to=type_),
            helper.make_node("Conv", ["low", "w"], ["product"], "multiply"),
            helper.make_node("Cast", ["product"], ["y"], "raise", to=TensorProto.FLOAT),
        ]
        constants = [numpy_helper.from_array(weights.astype(DTYPES[precision]), "w")]
    else:
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "quantise"),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "dequantise"),
            helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["v"], "weights"),
            helper.make_node("Conv", ["d", "v"], ["y"], "multiply"),
        ]
        constants = [
            numpy_helper.from_array(weights.astype(DTYPES[precision]), "w"),
            numpy_helper.from_array(np.zeros((), DTYPES[precision]), "zero"),
            numpy_helper.from_array(np.ones((), np.float32), "scale"),
        ]
    graph = helper.make_graph(
        nodes,
        precision,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
