"""`fold-pad-into-conv`: which Pad goes into which window, and what stays."""

from __future__ import annotations

import pytest
from graphs import assert_same_numbers, rewrite, text
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.passes.fold_pad_into_conv import FoldPadIntoConv

HEAD = '<ir_version: 9, opset_import: ["" : 18]>'


def test_the_pads_of_both_are_added() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[N,1,4,5] x) => (float[N,1,H,W] y)
        <float[1,1,2,2] w = {1, 2, 3, 4}, int64[8] p = {0, 0, 1, 2, 0, 0, 3, 4}>
        {
            [pad]  m = Pad (x, p)
            [conv] y = Conv <pads = [1, 0, 0, 1]> (m, w)
        }""",
        FoldPadIntoConv(),
    )
    assert (
        text(after)
        == """\
g (float[N,1,4,5] x) => (float[N,1,8,11] y)
   <float[1,1,2,2] w =  {1,2,3,4}>
{
   [conv] y = Conv <pads: ints = [2, 2, 3, 5]> (x, w)
}"""
    )
    assert report.merged == {"conv": ("pad", "conv")}
    assert_same_numbers(before, after, rtol=1e-6)


def test_axes_may_be_named_and_all_readers_take_it() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[N,1,4,5] x) => (float[N,1,H,W] y, float[N,1,A,B] z)
        <float[1,1,2,2] w = {1, 2, 3, 4}, int64[2] p = {1, 2}, int64[1] axes = {-1},
         float zero = {0}>
        {
            m = Pad (x, p, zero, axes)
            y = Conv <auto_pad = "VALID"> (m, w)
            z = AveragePool <kernel_shape = [2, 3]> (m)
        }""",
        FoldPadIntoConv(),
    )
    assert "y = Conv <pads: ints = [0, 1, 0, 2]> (x, w)" in text(after)
    assert "count_include_pad: int = 1" in text(after)
    assert_same_numbers(before, after, rtol=1e-6)


def test_pads_may_be_attributes_before_opset_11() -> None:
    before, after, _ = rewrite(
        """<ir_version: 8, opset_import: ["" : 10]>
        g (float[N,1,4] x) => (float[N,1,L] y) <float[1,1,2] w = {1, 2}>
        { m = Pad <pads = [0, 0, 1, 0, 0, 2]> (x) y = Conv (m, w) }""",
        FoldPadIntoConv(),
    )
    assert "Conv <pads: ints = [1, 2]> (x, w)" in text(after)
    assert_same_numbers(before, after, rtol=1e-6)


def test_a_convinteger_without_a_zero_point_takes_it() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (uint8[N,1,4] x) => (int32[N,1,L] y)
        <uint8[1,1,2] w = {1, 2}, int64[6] p = {0, 0, 1, 0, 0, 2}>
        { m = Pad (x, p) y = ConvInteger (m, w) }""",
        FoldPadIntoConv(),
    )
    assert "ConvInteger <pads: ints = [1, 2]> (x, w)" in text(after)
    assert_same_numbers(before, after, rtol=0)


def test_a_maxpool_takes_a_pad_of_the_lowest_number_or_zeros_behind_a_relu() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[N,1,4] x) => (float[N,1,L] y, float[N,1,L] z)
        <int64[6] p = {0, 0, 1, 0, 0, 1}, float low = {-3.4028234663852886e38}>
        {
            m = Pad (x, p, low)
            y = MaxPool <kernel_shape = [3], pads = [1, 1]> (m)
            r = Relu (x)
            n = Pad (r, p)
            z = MaxPool <kernel_shape = [3], pads = [1, 1]> (n)
        }""",
        FoldPadIntoConv(),
    )
    assert [str(node.op_type) for node in after.graph.node] == ["MaxPool", "Relu", "MaxPool"]
    assert text(after).count("pads: ints = [2, 2]") == 2
    assert_same_numbers(before, after, rtol=0)


ONE = "int64[6] p = {0, 0, 1, 0, 0, 1}"
CONV = "m = Pad (x, p) y = Conv (m, w)"
REFUSALS = [
    ("its pads are computed at run time", "float zero = {0}", "m = Pad (x, q) y = Conv (m, w)"),
    ("it cuts off elements", "int64[6] p = {0, 0, -1, 0, 0, 1}", CONV),
    ("it pads the batch or the channels", "int64[6] p = {1, 0, 0, 0, 0, 1}", CONV),
    (
        "the Conv does not pad with 2",
        f"{ONE}, float v = {{2}}",
        "m = Pad (x, p, v) y = Conv (m, w)",
    ),
    ("the Conv does not pad with nan", ONE, "m = Pad (x, p, v) y = Conv (m, w)"),
    ("it does not pad with a constant", ONE, 'm = Pad <mode = "edge"> (x, p) y = Conv (m, w)'),
    (
        "the Conv chooses its pads itself (auto_pad)",
        ONE,
        'm = Pad (x, p) y = Conv <auto_pad = "SAME_UPPER"> (m, w)',
    ),
    ("what it pads has another reader", ONE, CONV + " z = Relu (m)"),
    (
        "the MaxPool does not pad with 0",
        ONE,
        "m = Pad (x, p) y = MaxPool <kernel_shape = [2]> (m)",
    ),
    (
        "the AveragePool does not count its own padding",
        ONE,
        "m = Pad (x, p) y = AveragePool <kernel_shape = [3], pads = [1, 1]> (m)",
    ),
    (
        "the AveragePool would have windows of padding alone",
        ONE,
        "m = Pad (x, p) y = AveragePool <kernel_shape = [1]> (m)",
    ),
    (
        "the AveragePool has windows that end beyond the padding, or dilations",
        ONE,
        "m = Pad (x, p) y = AveragePool <kernel_shape = [2], ceil_mode = 1> (m)",
    ),
    (
        "the MaxPool returns where its results are from",
        ONE,
        "r = Relu (x) m = Pad (r, p) y, i = MaxPool <kernel_shape = [2]> (m) z = Cast <to = 1> (i)",
    ),
]


@pytest.mark.parametrize(("reason", "constants", "nodes"), REFUSALS)
def test_what_would_change_a_result_is_left_alone_with_the_reason(
    reason: str, constants: str, nodes: str
) -> None:
    outputs = "float[a,b,c] y" + (", float[d,e,f] z" if "z = " in nodes else "")
    inputs = "float[N,1,6] x, int64[6] q"
    if " v)" in nodes and " v =" not in constants:
        inputs += ", float v"
    before, after, report = rewrite(
        HEAD
        + f"""
        g ({inputs}) => ({outputs}) <float[1,1,2] w = {{1, 2}}, {constants}>
        {{ {nodes.replace("m = Pad", "[pad] m = Pad")} }}""",
        FoldPadIntoConv(),
    )
    assert [node.op_type for node in after.graph.node] == [n.op_type for n in before.graph.node]
    assert report.rewritten == 0
    assert report.skipped == {"pad": reason}


def test_a_padded_value_that_the_caller_reads_stays() -> None:
    _, _, report = rewrite(
        HEAD
        + f"""
        g (float[N,1,4] x) => (float[N,1,L] y, float[N,1,6] m)
        <float[1,1,2] w = {{1, 2}}, {ONE}> {{ [pad] {CONV} }}""",
        FoldPadIntoConv(),
    )
    assert report.skipped == {"pad": "what it pads has another reader"}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_generated_windows_see_the_same(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))

    def ints(low: int, high: int, count: int) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    low, high, kernel = ints(0, 2, rank), ints(0, 2, rank), ints(1, 3, rank)
    attributes = f"kernel_shape = {kernel}, strides = {ints(1, 3, rank)}"
    op = data.draw(st.sampled_from(["Conv", "AveragePool", "MaxPool"]))
    operands = "m"
    if op == "Conv":
        attributes += f", pads = {ints(0, 2, 2 * rank)}, dilations = {ints(1, 2, rank)}"
        operands = "m, w"
    elif data.draw(st.booleans()):
        attributes += ", count_include_pad = 1" if op == "AveragePool" else ""
        attributes += f", pads = {[0] * 2 * rank}"
    size = 1
    for extent in kernel:
        size *= extent
    pads = ", ".join(map(str, [0, 0, *low, 0, 0, *high]))
    weights = ", ".join(str(index + 1) for index in range(2 * size))
    before, after, report = rewrite(
        HEAD
        + f"""
        g (float[N,2,{",".join(["7"] * rank)}] x) => (float[N,{",".join("ABCD"[: rank + 1])}] y)
        <float[1,{",".join(map(str, [2, *kernel]))}] w = {{{weights}}},
         int64[{2 * rank + 4}] p = {{{pads}}}>
        {{ r = Relu (x) [pad] m = Pad (r, p) y = {op} <{attributes}> ({operands}) }}""",
        FoldPadIntoConv(),
    )
    assert report.rewritten or op != "Conv"
    assert_same_numbers(before, after, rtol=1e-5, atol=1e-5)
