"""`expand-functions`: what the standard spells out, what it does not, and the real builder."""

from __future__ import annotations

import onnx
import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite, text

from optc import optimize
from optc.passes.expand_functions import FUNCTIONS, ExpandFunctions


def model(body: str, *, opset: int = 20) -> str:
    return f"""
        <ir_version: 9, opset_import: ["" : {opset}]>
        g {body}"""


LAYER_NORM = model(
    """(float[N, 4, 6] x, float[6] scale) => (float[N, 4, 6] y, float[N, 4, 1] mean)
    {
        [node] y, mean = LayerNormalization (x, scale)
    }"""
)
CENTRE = model(
    """(float[20, 10, 3] x) => (float[10, 7, 3] y) <int64[2] shape = {10, 7}>
    {
        [node] y = CenterCropPad <axes = [0, 1]> (x, shape)
    }"""
)


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("source", [LAYER_NORM, CENTRE])
def test_the_body_returns_what_the_operator_returns(source: str) -> None:
    before, after, report = rewrite(source, ExpandFunctions())
    assert not set(ops(before)) & set(ops(after))
    assert set(report.merged.values()) == {("node",)}
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)


def test_each_node_of_the_body_has_a_name_of_its_own() -> None:
    source = """(float[3] x) => (float[3] y)
    {
        [first] a = Softsign (x)
        [second] y = Softsign (a)
    }"""
    before, after, report = rewrite(model(source), ExpandFunctions())
    assert (
        text(after)
        == """\
g (float[3] x) => (float[3] y)
   <float first_value =  {1}, float second_value =  {1}>
{
   [first_castlike] first_castlike_out = CastLike (first_value, x)
   [first_abs] first_abs_out = Abs (x)
   [first_add] first_add_out = Add (first_castlike_out, first_abs_out)
   [first_div] a = Div (x, first_add_out)
   [second_castlike] second_castlike_out = CastLike (second_value, a)
   [second_abs] second_abs_out = Abs (a)
   [second_add] second_add_out = Add (second_castlike_out, second_abs_out)
   [second_div] y = Div (a, second_add_out)
}"""
    )
    assert report.merged["first_abs"] == ("first",)
    assert_same_numbers(before, after, rtol=1e-6)


def test_one_input_read_twice_and_an_omitted_output() -> None:
    source = """(float[3, 3] x) => (float[3, 3] y, float[3, 1] deviation)
    <float[3] scale = {1, 2, 3}>
    {
        [node] y, , deviation = LayerNormalization (x, scale, scale)
    }"""
    before, after, _ = rewrite(model(source), ExpandFunctions())
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-6)


def test_an_opset_that_does_not_spell_it_out_is_left_alone() -> None:
    source = "(float[N] x) => (float[N] y) { [node] y = Shrink (x) }"
    _, after, report = rewrite(model(source, opset=9), ExpandFunctions())
    assert ops(after) == ["Shrink"]
    assert report.skipped == {
        "node": "the standard does not spell it out for opset 9 and its types"
    }


def test_every_name_is_an_operator_with_a_body() -> None:
    schemas = [s for s in onnx.defs.get_all_schemas_with_history() if not s.domain]
    spelt_out = {s.name for s in schemas if s.has_function or s.has_context_dependent_function}
    assert spelt_out.issuperset(FUNCTIONS)


@pytest.mark.parametrize("source", [LAYER_NORM, CENTRE])
def test_tensorrt_takes_what_it_refused(tensorrt: Builder, source: str) -> None:
    before, after, _ = rewrite(source, ExpandFunctions())
    profile = {
        info.name: tuple(
            tuple(d.dim_value or batch for d in info.type.tensor_type.shape.dim)
            for batch in (2, 2, 2)
        )
        for info in before.graph.input
        if any(d.dim_param for d in info.type.tensor_type.shape.dim)
    }
    profiles = (profile,) if profile else ()
    assert tensorrt.refusal(before, profiles=profiles).startswith("refused")
    optimised, _ = optimize(after)
    assert not tensorrt.refusal(optimised, profiles=profiles)
