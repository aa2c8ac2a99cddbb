"""Every step of every operator, as it was before and as it is after, on onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import assert_same_numbers, parsed, text
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from optc.passes.graph import all_nodes, export_model, import_model
from optc.passes.opset import EXTENDED, NEWEST, OLDEST, REWRITTEN, changes, raise_opset
from optc.passes.shape import infer

CANNOT = {("Attention", 24), ("GroupNormalization", 21), ("Scan", 9)}
"""Changes that no node follows."""

WITHOUT_KERNEL = {
    *("Bernoulli", "GlobalLpPool", "MaxRoiPool", "Multinomial", "RandomNormal", "RandomNormalLike"),
    *("RandomUniform", "RandomUniformLike", "RoiAlign"),
}
"""Operators that onnxruntime lacks in their version 22."""

UP_TO = {"RoiAlign": 21}
"""The last version of a case, where it is not the newest."""


def model(body: str, opset: int) -> ModelProto:
    """Return the model of ``body``, which is the signature and all that follows it."""
    ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)], True)
    header = f'<ir_version: {max(8, ir_version)}, opset_import: ["" : {opset}]> g '
    found: ModelProto = parsed(header + body)
    return found


def raised(before: ModelProto, to: int) -> ModelProto | None:
    """Return ``before`` in version ``to``, or None where it cannot follow; then it is unchanged."""
    graph = import_model(before)
    whole = text(export_model(graph))
    if not raise_opset(graph, to, lambda: infer(graph, opset=graph.opset)):
        assert text(export_model(graph)) == whole
        return None
    after = export_model(graph, value_info=False)
    onnx.checker.check_model(after, full_check=True)
    return after


def test_every_change_of_every_operator_is_in_one_table() -> None:
    known = [(op, version) for version, ops in EXTENDED.items() for op in ops.split()]
    known += [*REWRITTEN, *CANNOT, *((op, 22) for op in WITHOUT_KERNEL)]
    assert len(known) == len(set(known))
    expected = {
        (schema.name, version)
        for schema in onnx.defs.get_all_schemas()
        if not schema.domain and schema.name != "Constant"  # none is a node here
        for version in changes(schema.name, OLDEST, NEWEST)
        if onnx.defs.has(schema.name, version - 1, "")
    }
    assert set(known) == expected


CASES = {
    "Squeeze": (7, "(float[1,2,1] x) => (float[2] y) { y = Squeeze<axes=[0,2]>(x) }"),
    "Squeeze all": (7, "(float[1,2,1] x) => (float[2] y) { y = Squeeze(x) }"),
    "Unsqueeze": (7, "(float[2] x) => (float[1,2,1] y) { y = Unsqueeze<axes=[0,2]>(x) }"),
    "ReduceSum": (7, "(float[2,3] x) => (float[2] y) { y = ReduceSum<axes=[1],keepdims=0>(x) }"),
    "ReduceSum all": (7, "(float[2,3] x) => (float[1,1] y) { y = ReduceSum(x) }"),
    **{
        op: (7, f"(float[2,3] x) => (float[2,1] y) {{ y = {op}<axes=[1]>(x) }}")
        for op in ("ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean")
    },
    **{
        op: (7, f"(float[2,3] x) => (float[] y) {{ y = {op}<keepdims=0>(x) }}")
        for op in ("ReduceMin", "ReduceProd", "ReduceSumSquare")
    },
    "ReduceLogSum": (
        7,
        "(float[2,3] x) => (float[2,1] y) { a = Abs(x) y = ReduceLogSum<axes=[1]>(a) }",
    ),
    "Split": (
        7,
        "(float[2,6] x) => (float[2,2] y, float[2,4] z) { y, z = Split<axis=1,split=[2,4]>(x) }",
    ),
    "Split evenly": (
        7,
        "(float[4,n] x) => (float[2,n] y, float[2,n] z) { y, z = Split(x) }",
    ),
    "Softmax of the last axis": (7, "(float[2,3] x) => (float[2,3] y) { y = Softmax(x) }"),
    "Softmax of a wide axis": (
        7,
        "(float[2,3,1,1] x) => (float[2,3,1,1] y) { y = Softmax<axis=1>(x) }",
    ),
    "LogSoftmax": (11, "(float[2,n,3] x) => (float[2,n,3] y) { y = LogSoftmax<axis=-1>(x) }"),
    "Hardmax": (7, "(float[2,1,3] x) => (float[2,1,3] y) { y = Hardmax(x) }"),
    "Dropout": (7, "(float[2] x) => (float[2] y) { y = Dropout<ratio=0.3>(x) }"),
    "BatchNormalization": (
        7,
        """(float[2,2,3] x) => (float[2,2,3] y) <float[2] s = {1,2}, float[2] v = {3,4}>
        { y = BatchNormalization<epsilon=0.1>(x, s, s, s, v) }""",
    ),
    "Clip": (7, "(float[9] x) => (float[9] y) { y = Clip<min=-0.5,max=0.5>(x) }"),
    "Clip at a maximum": (7, "(float[9] x) => (float[9] y) { y = Clip<max=0.5>(x) }"),
    "Clip at nothing": (7, "(float[9] x) => (float[9] y) { y = Clip(x) }"),
    "Pad": (7, "(float[2,2] x) => (float[4,3] y) { y = Pad<pads=[1,0,1,1],value=3.0>(x) }"),
    "Pad of zeros": (7, "(float[2,2] x) => (float[4,3] y) { y = Pad<pads=[1,0,1,1]>(x) }"),
    "Pad by reflection": (
        7,
        '(float[3,3] x) => (float[5,3] y) { y = Pad<mode="reflect",pads=[1,0,1,0],value=1.0>(x) }',
    ),
    "Slice": (
        7,
        "(float[4,4] x) => (float[2,3] y) { y = Slice<axes=[1,0],starts=[1,-3],ends=[99,3]>(x) }",
    ),
    "Slice of the first axes": (
        7,
        "(float[4,4] x) => (float[2,4] y) { y = Slice<starts=[1],ends=[3]>(x) }",
    ),
    "TopK": (7, "(float[2,5] x) => (float[2,3] y, int64[2,3] i) { y, i = TopK<k=3>(x) }"),
    "Upsample": (
        7,
        "(float[1,1,2,2] x) => (float[1,1,4,6] y) { y = Upsample<scales=[1.0,1.0,2.0,3.0]>(x) }",
    ),
    "Upsample linearly": (
        7,
        """(float[1,1,2,2] x) => (float[1,1,4,5] y)
        { y = Upsample<mode="linear",scales=[1.0,1.0,2.0,2.5]>(x) }""",
    ),
    "Upsample of version 9": (
        9,
        """(float[1,1,2,2] x) => (float[1,1,4,4] y) <float[4] s = {1,1,2,2}>
        { y = Upsample(x, s) }""",
    ),
    "Resize": (
        10,
        """(float[1,1,4,4] x) => (float[1,1,6,6] y) <float[4] s = {1,1,1.5,1.5}>
        { y = Resize(x, s) }""",
    ),
    "Resize that shrinks": (
        10,
        """(float[1,1,8,8] x) => (float[1,1,5,5] y) <float[4] s = {1,1,0.7,0.7}>
        { y = Resize<mode="linear">(x, s) }""",
    ),
    "Resize to sizes": (
        11,
        """(float[1,1,4,4] x) => (float[1,1,7,3] y)
        <float[0] none = {}, int64[4] sizes = {1,1,7,3}>
        { y = Resize<mode="linear">(x, none, none, sizes) }""",
    ),
    "Resize of a region": (
        11,
        """(float[1,1,4,4] x) => (float[a,b,c,d] y)
        <float[8] roi = {0,0,0.25,0.25,1,1,0.75,0.75}, float[4] s = {1,1,1,1}>
        { y = Resize<mode="linear",coordinate_transformation_mode="tf_crop_and_resize">(x, roi, s) }
        """,
    ),
    "Scatter": (
        9,
        """(float[2,2] x, float[1,2] u) => (float[2,2] y) <int64[1,2] i = {1,0}>
        { y = Scatter<axis=1>(x, i, u) }""",
    ),
    "OneHot": (
        9,
        """(float[1] x) => (float[3,4] y)
        <int64[3] i = {0,2,9}, int64[1] depth = {4}, float[2] values = {1,5}>
        { h = OneHot(i, depth, values) y = Add(h, x) }""",
    ),
    "ConvTranspose": (
        7,
        """(float[1,1,3] x) => (float[1,1,7] y) <float[1,1,2] w = {1,2}>
        { y = ConvTranspose<strides=[2],output_padding=[1]>(x, w) }""",
    ),
    "Erf": (9, "(float[3] x) => (float[3] y) { y = Erf(x) }"),
    "RoiAlign": (
        10,
        """(float[1,1,8,8] x) => (float[1,1,3,3] y)
        <float[1,4] rois = {1,1,6,5}, int64[1] batch = {0}>
        { y = RoiAlign<output_height=3,output_width=3>(x, rois, batch) }""",
    ),
    "AveragePool": (
        7,
        """(float[1,1,5] x) => (float[1,1,3] y)
        { y = AveragePool<kernel_shape=[3],pads=[1,1],strides=[2]>(x) }""",
    ),
    "MaxPool": (7, "(float[1,1,5] x) => (float[1,1,4] y) { y = MaxPool<kernel_shape=[2]>(x) }"),
    "MaxPool that rounds up": (
        10,
        """(float[1,1,6,7] x) => (float[1,1,3,4] y)
        { y = MaxPool<kernel_shape=[3,2],strides=[2,2],pads=[0,1,0,0],ceil_mode=1>(x) }""",
    ),
    "DFT": (17, "(float[1,5,4,1] x) => (float[1,5,4,2] y) { y = DFT(x) }"),
    "DFT along an axis": (
        17,
        "(float[1,5,4,1] x) => (float[1,5,3,2] y) { y = DFT<axis=2,onesided=1>(x) }",
    ),
    **{
        f"GridSample {mode}": (
            16,
            f"""(float[1,1,4,4] x, float[1,3,3,2] grid) => (float[1,1,3,3] y)
            {{ y = GridSample{said}(x, grid) }}""",
        )
        for mode, said in {
            "unsaid": "",
            "bilinear": '<mode="bilinear",padding_mode="border">',
            "bicubic": '<mode="bicubic">',
            "nearest": '<mode="nearest">',
        }.items()
    },
    "LSTM": (
        7,
        """(float[3,1,2] x, float[1,4,2] w, float[1,4,1] r) => (float[3,1,1,1] y)
        { y = LSTM<hidden_size=1>(x, w, r) }""",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("to", [NEWEST, 17, 13, 11])
def test_a_node_means_the_same_in_a_later_version(name: str, to: int) -> None:
    opset, body = CASES[name]
    to = min(to, UP_TO.get(name, to))
    before = model(body, opset)
    after = raised(before, to)
    assert after is not None
    assert after.opset_import[0].version == max(opset, to)
    assert_same_numbers(before, after, rtol=1e-6, atol=1e-7)


@given(name=st.sampled_from(sorted(CASES)), steps=st.data())
@settings(max_examples=60, deadline=None)
def test_steps_in_any_sizes_lead_to_the_same(name: str, steps: st.DataObject) -> None:
    opset, body = CASES[name]
    before = model(body, opset)
    newest = UP_TO.get(name, NEWEST)
    direct = raised(before, newest)
    assert direct is not None
    found, at = before, opset
    while at < newest:
        at = steps.draw(st.integers(at + 1, newest))
        next_one = raised(found, at)
        assert next_one is not None
        found = next_one
    assert_same_numbers(direct, found, rtol=0)


REFUSED = {
    "an old model": (6, 7, "(float[2] x) => (float[2] y) { y = Relu(x) }"),
    "a version too new": (20, NEWEST + 1, "(float[2] x) => (float[2] y) { y = Relu(x) }"),
    "a Softmax over two axes": (11, 13, "(float[2,3,4] x) => (float[2,3,4] y) { y = Softmax(x) }"),
    "a Softmax over an unknown axis": (
        11,
        13,
        "(float[2,n,4] x) => (float[2,n,4] y) { y = Softmax(x) }",
    ),
    "statistics of each position": (
        7,
        9,
        """(float[1,2,2] x) => (float[1,2,2] y) <float[2,2] s = {1,2,3,4}>
        { y = BatchNormalization<spatial=0>(x, s, s, s, s) }""",
    ),
    "a mask that is read": (
        7,
        10,
        "(float[2] x) => (float[2] y, float[2] z) { y, m = Dropout(x) z = Add(y, m) }",
    ),
    "the nearest element when shrinking": (
        10,
        11,
        """(float[1,1,8,8] x) => (float[1,1,4,4] y) <float[4] s = {1,1,0.5,0.5}>
        { y = Resize(x, s) }""",
    ),
    "a mode that was dropped": (
        11,
        13,
        """(float[1,1,4,4] x) => (float[1,1,8,8] y) <float[0] roi = {}, float[4] s = {1,1,2,2}>
        { y = Resize<coordinate_transformation_mode="tf_half_pixel_for_nn">(x, roi, s) }""",
    ),
    "indices that may be negative": (
        9,
        11,
        """(int64[3] i) => (float[3,4] y) <int64[1] depth = {4}, float[2] values = {1,5}>
        { y = OneHot(i, depth, values) }""",
    ),
    "padding on the other side": (
        10,
        11,
        """(float[1,1,3] x) => (float[1,1,m] y) <float[1,1,3] w = {1,2,3}>
        { y = ConvTranspose<strides=[2],auto_pad="SAME_UPPER">(x, w) }""",
    ),
    "pooling that rounds up": (
        18,
        19,
        """(float[1,1,6] x) => (float[1,1,m] y)
        { y = AveragePool<kernel_shape=[3],strides=[2],ceil_mode=1>(x) }""",
    ),
    "maxima that round up": (
        21,
        22,
        """(float[1,1,6] x) => (float[1,1,m] y)
        { y = MaxPool<kernel_shape=[2],strides=[3],ceil_mode=1>(x) }""",
    ),
    "Erf of integers": (12, 13, "(int32[2] x) => (int32[2] y) { y = Erf(x) }"),
    "an operator defined by older ones": (
        13,
        18,
        "(float[1,2,2,2] x) => (float[1,2,2,2] y) { y = MeanVarianceNormalization(x) }",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_follow_exactly_stays_as_it_is(name: str) -> None:
    opset, to, body = REFUSED[name]
    assert raised(model(body, opset), to) is None


def test_one_node_that_cannot_follow_holds_all_others() -> None:
    before = model(
        """(float[2,3,4] x) => (float[2,3,4] y, float[2,4] z)
        { y = Softmax(x) m = ReduceSum<axes=[1],keepdims=0>(x) z = Identity(m) }""",
        11,
    )
    assert raised(before, 13) is None


def test_nodes_of_bodies_follow_too() -> None:
    before = model(
        """(bool c, float[1,2] x) => (float[2] y) {
            y = If (c) <
                then_branch = t () => (float[2] a) { a = Squeeze<axes=[0]>(x) },
                else_branch = e () => (float[2] b) { b = ReduceMean<axes=[0],keepdims=0>(x) }
            >
        }""",
        11,
    )
    after = raised(before, 18)
    assert after is not None
    graph = import_model(after)
    assert all("axes" not in node.attrs for node in all_nodes(graph))
    assert_same_numbers(before, after, rtol=0)


def test_other_domains_are_imported_as_before() -> None:
    before = parsed(
        """<ir_version: 8, opset_import: ["com.microsoft" : 1, "" : 11]>
        g (float[2] x) => (float[2] y) { t = com.microsoft.Gelu(x) y = Relu(t) }"""
    )
    after = raised(before, 20)
    assert after is not None
    assert {entry.domain: entry.version for entry in after.opset_import} == {
        "": 20,
        "com.microsoft": 1,
    }
    assert after.ir_version == 9
    assert_same_numbers(before, after, rtol=0)


def test_the_default_bounds_of_a_type_stay_what_they_were() -> None:
    """Until 11 they were float32's; of float16 they do not clip, of float64 they do."""
    double = raised(model("(double[2] x) => (double[2] y) { y = Clip<min=0.0>(x) }", 7), 11)
    half = raised(model("(float16[2] x) => (float16[2] y) { y = Clip<min=0.0>(x) }", 7), 11)
    assert double is not None
    assert half is not None
    bounds = [
        onnx.numpy_helper.to_array(constant)
        for found in (double, half)
        for constant in found.graph.initializer
        if constant.name.endswith("max")
    ]
    assert bounds == [np.float64(np.finfo(np.float32).max), np.float16(np.inf)]


def test_the_result_reads_as_one_would_write_it() -> None:
    after = raised(
        model(
            "(float[1,1,2,2] x) => (float[1,1,4,4] y) "
            "{ [up] y = Upsample<scales=[1.0,1.0,2.0,2.0]>(x) }",
            7,
        ),
        13,
    )
    assert after is not None
    assert (
        text(after)
        == """\
g (float[1,1,2,2] x) => (float[1,1,4,4] y)
   <float[4] up_scales =  {1,1,2,2}>
{
   [up] y = Resize <nearest_mode: string = "floor", coordinate_transformation_mode: string = "asymmetric"> (x, "", up_scales)
}"""
    )
