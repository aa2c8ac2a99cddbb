"""`spell-out-activations`: what becomes of them, in which type, and what the builder says."""

from __future__ import annotations

import onnx
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, parsed, text

from optc.passes import registry
from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import optimise
from optc.passes.precision import Float, Lowering
from optc.passes.spell_out_activations import SpellOutActivations

NETWORK = """<ir_version: 10, opset_import: ["" : 22]>
    g (float[1,1,4,4] x) => (float[1,1,4,4] y) <float[1,1,1,1] w = {2}>
    { [c] c = Conv (x, w) [a] a = HardSwish (c) [m] m = Mish (a) [d] y = Conv (m, w) }"""


def test_what_is_asked_for_in_bfloat16_is_spelt_out_and_computes_in_it() -> None:
    before = parsed(NETWORK)
    graph = import_model(before)
    lowering = Lowering({"c": "bf16", "a": "bf16"})
    report = optimise(graph, [SpellOutActivations()], lowering=lowering)
    after = export_model(graph, value_info=False)
    assert (
        text(after)
        == """\
g (float[1,1,4,4] x) => (float[1,1,4,4] y)
   <float[1,1,1,1] w =  {2}>
{
   [c] c = Conv (x, w)
   [a_hardsigmoid] a_hardsigmoid_out = HardSigmoid <alpha: float = 0.16666667, beta: float = 0.5> (c)
   [a_mul] a = Mul (c, a_hardsigmoid_out)
   [m] m = Mish (a)
   [d] y = Conv (m, w)
}"""
    )
    assert report.records[0].merged == {"a_hardsigmoid": ("a",), "a_mul": ("a",)}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_in_other_types_they_stay(precision: Float) -> None:
    graph = import_model(parsed(NETWORK))
    lowering = Lowering({"a": precision})
    assert not optimise(graph, [SpellOutActivations()], lowering=lowering).records[0].rewritten
    assert not optimise(graph, [SpellOutActivations()]).records[0].rewritten


def test_the_builder_takes_the_parts_but_not_the_whole(tensorrt: Builder) -> None:
    def refusal(*, passes: list[str]) -> str:
        graph = import_model(parsed(NETWORK))
        lowering = Lowering(dict.fromkeys("camd", "bf16"))
        chosen = [each for each in registry.lowerers() if each.name in passes]
        optimise(graph, chosen, lowering=lowering)
        model = export_model(graph, value_info=False)
        onnx.checker.check_model(model, full_check=True)
        assert sum(node.op_type == "Cast" for node in model.graph.node) == 2
        return tensorrt.refusal(model, compute_capability="8.9")

    assert "HardSwish" in refusal(passes=["lower-floats"])
    assert refusal(passes=["spell-out-activations", "lower-floats"]) == ""
