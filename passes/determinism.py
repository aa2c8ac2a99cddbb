"""Which nodes give the same outputs whenever they are given the same inputs."""

from __future__ import annotations

from functools import cache

import onnx
import onnx_graphsurgeon as gs

from optc.passes.graph import bodies_of, is_constant

RANDOM = frozenset(
    {
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)


def is_deterministic(node: gs.Node) -> bool:
    """Whether ``node``, its bodies included, is an ONNX operator that computes and nothing else.

    An operator of another domain may draw random numbers or keep a state: nobody can tell.
    """
    if node.op in RANDOM or not is_standard(node.op, node.domain or ""):
        return False
    if node.op == "Dropout" and is_training(node):
        return False
    return all(is_deterministic(inner) for body in bodies_of(node) for inner in body.nodes)


@cache
def is_standard(op: str, domain: str) -> bool:
    """Whether ONNX defines the operator, in any version."""
    return bool(onnx.defs.has(op, domain))


def is_training(dropout: gs.Node) -> bool:
    """Whether a Dropout drops anything, as far as the graph tells: if in doubt, it does.

    Source:
        ONNX operators, Dropout: versions 7 and 10 never do, 12 and later as the third input says.
    """
    if len(dropout.inputs) < 3 or not dropout.inputs[2].name:
        return False
    mode = dropout.inputs[2]
    return not is_constant(mode) or bool(mode.values.any())
