from __future__ import annotations

import onnx
import pytest

from optc.passes.flops import flops
from optc.passes.graph import import_model
from optc.passes.shape import infer
from optc.specs.compile_spec import Range


def counted(source: str, **extents: int) -> dict[str, int]:
    model = onnx.parser.parse_model('<ir_version: 9, opset_import: ["" : 17]>' + source)
    graph = import_model(model)
    profile = {name: Range(min=1, opt=extent, max=100) for name, extent in extents.items()}
    return flops(graph, infer(graph), profile)


@pytest.mark.parametrize(
    ("node", "count"),
    [
        ("Conv <pads = [1,1,1,1]> (x, k)", 2 * (2 * 6 * 5 * 5) * (4 * 9)),
        ("Conv <group = 2> (x, grouped)", 2 * (2 * 6 * 3 * 3) * (2 * 9)),
        ("ConvTranspose <strides = [2,2]> (x, spread)", 2 * (2 * 4 * 5 * 5) * (3 * 4)),
        ("MatMul (x, right)", 2 * (2 * 4 * 5 * 7) * 5),
        ("Gemm <transB = 1> (flat, weight)", 2 * (2 * 3) * 100),
        ('Einsum <equation = "nchw,nkhw->nck"> (x, x)', 2 * 2 * 4 * 4 * 5 * 5),
        ('Einsum <equation = "nchw->nc"> (x)', 2 * 4),
        ("LSTM <hidden_size = 3> (steps, gates, again)", 2 * 2 * (4 * 5) * 4 * 3 * (5 + 3)),
        ("Relu (x)", 2 * 4 * 5 * 5),
        ("ReduceSum (x)", 1),
    ],
)
def test_a_multiply_add_counts_two_and_any_other_element_one(node: str, count: int) -> None:
    source = f"""g (float[n,4,5,5] x, float[n,100] flat, float[4,5,5] steps) => (float[] y)
        <float[6,4,3,3] k = {{0}}, float[6,2,3,3] grouped = {{0}}, float[4,3,2,2] spread = {{0}},
         float[5,7] right = {{0}}, float[3,100] weight = {{0}}, float[2,12,5] gates = {{0}},
         float[2,12,3] again = {{0}}>
        {{ [node] y = {node.replace("LSTM <", 'LSTM <direction = "bidirectional", ')} }}"""
    assert counted(source, n=2) == {"node": count}


def test_what_the_data_decides_counts_at_its_bound() -> None:
    found = counted(
        """g (float[n] x) => (int64[1,c] y, int64[k] r)
        <int64 zero = {0}, int64 one = {1}>
        { [nonzero] y = NonZero (x)  [max] m = ReduceMax <keepdims = 0> (y)
          [range] r = Range (zero, m, one) }""",
        n=40,
    )
    assert found["nonzero"] == 40
    assert found["range"] == 1  # nothing bounds it


def test_an_if_counts_as_its_costlier_branch_and_a_loop_by_its_rounds() -> None:
    found = counted(
        """g (float[n] x, bool c) => (float[n] y, float[n] z)
        <int64 six = {6}, bool yes = {1}>
        {
            [if] y = If (c) <
                then_branch = t () => (float[n] a) { a = Relu (x) },
                else_branch = e () => (float[n] b) { b1 = Exp (x)  b = Log (b1) }
            >
            [loop] z = Loop (six, yes, x) <
                body = l (int64 i, bool on, float[n] v) => (bool go, float[n] next)
                { go = Identity (yes)  next = Add (v, v) }
            >
        }""",
        n=10,
    )
    assert found == {"if": 20, "loop": 6 * 11}
