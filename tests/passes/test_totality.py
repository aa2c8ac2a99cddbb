"""Which nodes are taken never to fail: those named here, and they do not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import parsed, run

from optc.passes.graph import import_model
from optc.passes.shape import infer
from optc.passes.totality import is_total

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
INPUTS = "float[n,4] x, float[n,4] y, float[m,4] z, float[n,3,h,w] p, int64[n] i, int64[m] j"
CONSTANTS = """<float[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[3,4] v = {1,2,3,4,5,6,7,8,9,10,11,12},
    float[2] b = {1, 2}, float[4] s = {1, 2, 3, 4}, int64 two = {2}, int64 zero = {0},
    int64[1] first = {0}, int64[1] fifth = {4}, int64[2] flat = {-1, 2}, int64[2] odd = {-1, 3},
    int64[1] axis = {1}, int64[8] pads = {0,0,1,1,0,0,1,1}, int64[8] crop = {0,0,-1,0,0,0,0,0},
    int64[2] four = {1, 4}, int64[4] mirror = {0, 3, 0, 3}, int64[2] halves = {2, 2}, float[2,3,1,1] k = {1,2,3,4,5,6},
    float[2,3,3,3] k3 = {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1}, float[3] c = {1, 2, 3}, int64[3] gates = {1, 8, 4}, int64[3] again = {1, 8, 2}, int8[4] q = {1, 2, 3, 4}, float half = {0.5}>"""
STATES = "d = Unsqueeze (x, axis) g = ConstantOfShape (gates) a = ConstantOfShape (again)"

TOTAL = {
    "Relu": "o = Relu (x)",
    "Cast to a whole number": "o = Cast <to = 7> (x)",
    "Add of one shape": "o = Add (x, y)",
    "Add of a row": "o = Add (x, s)",
    "Div of floats": "o = Div (x, y)",
    "Div by a number": "o = Div (i, two)",
    "MatMul": "o = MatMul (x, w)",
    "Gemm": "o = Gemm <transA = 0> (x, w, b)",
    "Conv of 1": "o = Conv (p, k)",
    "Conv of 3, padded": "o = Conv <pads = [1, 1, 1, 1]> (p, k3)",
    "Transpose": "o = Transpose (p)",
    "Reshape to what is there": "o = Reshape (x, flat)",
    "Squeeze of one": "u = Unsqueeze (x, axis) o = Squeeze (u, axis)",
    "Concat along": "o = Concat <axis = 0> (x, z)",
    "Slice": "o = Slice (x, first, fifth, axis)",
    "Split in halves": "o, r = Split <axis = 1> (x, halves)",
    "Gather of the first": "o = Gather (x, zero)",
    "Pad": "o = Pad (p, pads)",
    "Pad by the edge": 'o = Pad <mode = "edge"> (p, pads)',
    "Pad by a mirror": 'o = Pad <mode = "reflect"> (x, mirror)',
    "ReduceMax": "o = ReduceMax <axes = [1]> (x)",
    "Softmax": "o = Softmax (x)",
    "MaxPool, padded": "o = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (p)",
    "LayerNormalization": "o = LayerNormalization (x, s)",
    "InstanceNormalization": "o = InstanceNormalization (p, c, c)",
    "BatchNormalization": "o = BatchNormalization (p, c, c, c, c)",
    "Clip": "o = Clip (x, half)",
    "Clip by one element": 'l = Unsqueeze (half, first) o = Clip (x, "", l)',
    "DequantizeLinear": "o = DequantizeLinear (q, half)",
    "DequantizeLinear along an axis": "t = Cast <to = 3> (x) o = DequantizeLinear <axis = 1> (t, s)",
    "Dropout": "o = Dropout (x, half)",
    "LSTM": f"{STATES} o = LSTM <hidden_size = 2> (d, g, a)",
    "Mod of floats": "o = Mod <fmod = 1> (x, y)",
    "Slice to where the data say": "e = Gather (j, first) o = Slice (x, first, e, axis)",
    "ConstantOfShape": "o = ConstantOfShape (four)",
}

MAY_FAIL = {
    "Clip by more than a number": "o = Clip (x, s)",
    "DequantizeLinear by other scales": "t = Cast <to = 3> (x) o = DequantizeLinear <axis = 0> (t, c)",
    "Dropout of any ratio": "r = ReduceSum <keepdims = 0> (x) o = Dropout (x, r)",
    "Slice of two lengths": "o = Slice (x, i, j)",
    "Slice with a step of 0": "o = Slice (x, first, fifth, axis, first)",
    "Add of other rows": "o = Add (x, z)",
    "Div of whole numbers": "o = Div (i, i)",
    "Div by 0": "o = Div (i, zero)",
    "Mod of whole numbers": "o = Mod (i, i)",
    "MatMul of other rows": "o = MatMul (z, p)",
    "MatMul of another extent": "o = MatMul (x, v)",
    "Conv of 3": "o = Conv (p, k3)",
    "MaxPool": "o = MaxPool <kernel_shape = [3, 3]> (p)",
    "Reshape that does not come out": "o = Reshape (x, odd)",
    "Reshape to what the data says": "t = Gather (j, flat) o = Reshape (x, t)",
    "Squeeze of more": "o = Squeeze (x)",
    "Concat across": "o = Concat <axis = 1> (x, z)",
    "Split of what is not even": "o, r = Split <axis = 0> (x)",
    "Gather of the third": "o = Gather (x, two)",
    "Gather by data": "o = Gather (x, j)",
    "Pad by a mirror of one": 'o = Pad <mode = "reflect"> (p, pads)',
    "Pad that cuts": "o = Pad (p, crop)",
    "NonMaxSuppression": "o = NonMaxSuppression (p, p)",
    "RandomNormalLike": "o = RandomNormalLike (x)",
    "LSTM of lengths of any rank": f"{STATES} u = Reshape (i, j) l = Cast <to = 6> (u)"
    ' o = LSTM <hidden_size = 2> (d, g, a, "", l)',
    "OneHot": "o = OneHot (i, two, b)",
}


def last_is_total(nodes: str) -> bool:
    source = f"{HEAD} g ({INPUTS}) => (float[] o) {CONSTANTS} {{ {nodes} }}"
    model = onnx.parser.parse_model(source)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    graph = import_model(model)
    return is_total(graph.nodes[-1], infer(graph))


@pytest.mark.parametrize("nodes", TOTAL.values(), ids=TOTAL)
def test_what_cannot_fail(nodes: str) -> None:
    assert last_is_total(nodes)


@pytest.mark.parametrize("nodes", MAY_FAIL.values(), ids=MAY_FAIL)
def test_what_may_fail(nodes: str) -> None:
    assert not last_is_total(nodes)


@pytest.mark.parametrize("nodes", TOTAL.values(), ids=TOTAL)
@pytest.mark.parametrize("extents", [(1, 1, 1, 1), (5, 2, 1, 3)], ids=str)
def test_what_cannot_fail_runs_at_any_extent(nodes: str, extents: tuple[int, ...]) -> None:
    """Also with numbers that a division or a Cast does not like."""
    source = f"{HEAD} g ({INPUTS}) => (float[] o) {CONSTANTS} {{ {nodes} }}"
    model = onnx.parser.parse_model(source)
    model.graph.output[0].CopyFrom(onnx.ValueInfoProto(name="o"))
    model = onnx.shape_inference.infer_shapes(model)
    sizes = dict(zip("nmhw", extents, strict=True))
    given = {}
    for info in model.graph.input:
        shape = [sizes.get(d.dim_param, d.dim_value) for d in info.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        given[info.name] = np.zeros(shape, dtype)
        if dtype == np.float32:
            given[info.name][..., -1] = np.inf
            given[info.name][..., 0] = np.nan
    assert "o" in run(model, given)


def test_an_operator_of_another_domain_may_do_what_it_likes() -> None:
    source = f'{HEAD[:-2]}, "com.microsoft" : 1]> g (float[n] x) => (float[n] o)'
    graph = import_model(parsed(f"{source} {{ o = com.microsoft.FastGelu (x) }}"))
    assert not is_total(graph.nodes[0], infer(graph))
