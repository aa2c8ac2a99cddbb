"""`give-vectors-a-row`: numbers, and what the builder says."""

from __future__ import annotations

import pytest
from builder_says import Builder
from graphs import assert_same_numbers, rewrite

from optc.passes.give_vectors_a_row import GiveVectorsARow

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
PASS = GiveVectorsARow()


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("stack", ["2", "3,2"])
def test_a_vector_becomes_a_row(opset: int, dtype: str, stack: str, tensorrt: Builder) -> None:
    before, after, report = rewrite(
        HEAD.replace("17", str(opset))
        + f"""g ({dtype}[5] v, {dtype}[{stack},5,4] x) => ({dtype}[{stack},4] y)
          {{ [n] y = MatMul (v, x) }}""",
        PASS,
    )
    assert [n.op_type for n in after.graph.node] == ["Unsqueeze", "MatMul", "Squeeze"]
    assert set(report.merged.values()) == {("n",)}
    assert_same_numbers(before, after, rtol=1e-5 if dtype == "float" else 4e-3, atol=1e-3)
    assert tensorrt.refusal(before)
    assert tensorrt.refusal(after) == ""


@pytest.mark.parametrize(
    "source",
    [
        "g (float[5] v, float[5,4] x) => (float[4] y) { y = MatMul (v, x) }",
        "g (float[2,3,5] x, float[5] v) => (float[2,3] y) { y = MatMul (x, v) }",
        "g (float[1,5] v, float[2,5,4] x) => (float[2,1,4] y) { y = MatMul (v, x) }",
    ],
)
def test_other_products_are_left_alone(source: str, tensorrt: Builder) -> None:
    before, _, report = rewrite(HEAD + source, PASS)
    assert not report.rewritten
    assert tensorrt.refusal(before) == ""
