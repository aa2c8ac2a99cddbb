"""Replace a HardSwish or Mish that is to compute in bfloat16 by the function that defines it.

    before                     after

    x                          x
    |                          |   \\
    HardSwish, in bf16         |    HardSigmoid
    |                          |   /
    y                         Mul
                               |
                               y

Why: TensorRT for RTX 1.7 takes these in fp32 and fp16 but not in bfloat16, and their parts in all
three. Left in fp32 each would cost two Casts; networks have dozens of them.

Why it holds: ONNX defines them so. What is between the parts is rounded once more, unless the builder
keeps it in its registers, as it does with most of what it fuses.

Keeps: names of outputs.
Skips, with the reason in the report: one that ONNX does not spell out in the opset of the model.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from optc.passes.contract import Facts, Pass, Report
from optc.passes.expand_functions import expand

SPELT_OUT = ("HardSwish", "Mish")


class SpellOutActivations(Pass):
    """Replace a HardSwish or Mish that is to compute in bfloat16 by the function that defines it."""

    name = "spell-out-activations"
    group = "lower"
    exactness = "equal up to rounding"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        """Spell out the activations of ``graph`` that are asked for in bfloat16."""
        report = Report()
        if facts.lowering is None:
            return report
        for node in facts.nodes(*SPELT_OUT):
            if facts.lowering.float_of(node.name) == "bf16":
                expand(node, graph, facts, report)
        report.precisions.update(dict.fromkeys(report.merged, "bf16"))
        return report
