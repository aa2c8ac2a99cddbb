import onnx
from graphs import assert_same_numbers, rewrite, text

from optc.passes.graph import export_model, import_model
from optc.passes.pipeline import optimise
from optc.passes.remove_dead import RemoveDead

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def test_nodes_that_nothing_reads_go() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[2] x) => (float[2] y)
        {
            [kept] y = Relu (x)
            [first] a = Neg (x)
            [second] b = Exp (a)
        }""",
        RemoveDead(),
    )
    assert [node.name for node in after.graph.node] == ["kept"]
    assert set(report.removed) == {"first", "second"}
    assert_same_numbers(before, after, rtol=0)


def test_optional_outputs_that_nothing_reads_go() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[1,1,4,4] x) => (float[1,1,2,2] y, float[1,1,3,3] z, int64[1,1,3,3] i)
        {
            [one] y, unread = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)
            [two] z, i = MaxPool <kernel_shape = [2, 2]> (x)
        }""",
        RemoveDead(),
    )
    assert [list(node.output) for node in after.graph.node] == [["y"], ["z", "i"]]
    assert report.merged == {"one": ("one",)}
    assert_same_numbers(before, after, rtol=0)


def test_so_do_those_of_operators_that_onnx_has_no_schema_of() -> None:
    before, after, _ = rewrite(
        HEAD.replace("17]", '17, "com.microsoft" : 1]')
        + """
        g (float[2,3,8] x) => (float[2,3,8] y, float[2,3,8] z, float[2,3,8] sum)
        <float[8] w = {1, 2, 3, 4, 5, 6, 7, 8}>
        {
            y, unread, other, another = com.microsoft.SkipLayerNormalization (x, x, w)
            z, mean, deviation, sum = com.microsoft.SkipLayerNormalization (y, x, w)
        }""",
        RemoveDead(),
    )
    assert [list(node.output) for node in after.graph.node] == [["y"], ["z", "", "", "sum"]]
    assert_same_numbers(before, after, rtol=0)


def test_an_output_before_one_that_is_read_is_left_out_by_name() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[2,1,1] x) => (float[1,1,3] y)
        <float[1,12,1] w, float[1,12,3] r>
        {
            all, y, cell = LSTM <hidden_size = 3> (x, w, r)
        }""".replace(
            "<float[1,12,1] w, float[1,12,3] r>",
            f"<float[1,12,1] w = {{{', '.join('1' * 12)}}}, "
            f"float[1,12,3] r = {{{', '.join('2' * 36)}}}>",
        ),
        RemoveDead(),
    )
    assert list(after.graph.node[0].output) == ["all", "y"]
    assert_same_numbers(before, after, rtol=0)


def test_batchnorm_outputs_stay_as_their_number_means_something() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 13]>
        g (float[1,2,3] x) => (float[1,2,3] y)
        <float[2] s = {1, 2}, float[2] b = {0, 0}, float[2] m = {0, 0}, float[2] v = {1, 1}>
        { y, a, b2, c, d = BatchNormalization (x, s, b, m, v) }"""
    )
    graph = import_model(model)
    assert optimise(graph, [RemoveDead()]).records[0].rewritten == 0
    assert len(graph.nodes[0].outputs) == 5


def test_unread_outputs_of_an_if_go_from_both_branches() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (bool c, float[2] x) => (float[2] y)
        {
            unread, y = If (c) <
                then_branch = t () => (float[2] a, float[2] b) { a = Exp (x)  b = Neg (x) },
                else_branch = f () => (float[2] d, float[2] e) { d = Log (x)  e = Abs (d) }
            >
        }""",
        RemoveDead(),
    )
    (node,) = after.graph.node
    then, other = (attribute.g for attribute in node.attribute)
    assert [inner.op_type for inner in then.node] == ["Neg"]
    assert [inner.op_type for inner in other.node] == ["Log", "Abs"]
    assert_same_numbers(before, after, rtol=0)


def test_collected_outputs_of_a_loop_go_but_its_state_stays() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (int64 n, float[1] x) => (float[k,1] last)
        <bool go = {1}>
        {
            state, one, last = Loop (n, go, x) <
                body = b (int64 i, bool c, float[1] v) =>
                    (bool d, float[1] w, float[1] p, float[1] q) {
                    d = Identity (c)  w = Mul (v, v)  p = Exp (w)  q = Neg (w)
                }
            >
        }""",
        RemoveDead(),
    )
    (node,) = after.graph.node
    assert list(node.output) == ["state", "last"]
    assert [inner.op_type for inner in node.attribute[0].g.node] == ["Identity", "Mul", "Neg"]
    assert_same_numbers(before, after, rtol=0)


def test_collected_outputs_of_a_scan_go_with_their_axes() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[1] s, float[3,1] x) => (float[1,3] y)
        {
            state, one, y = Scan <
                num_scan_inputs = 1, scan_output_axes = [0, 1],
                body = b (float[1] v, float[1] e) => (float[1] w, float[1] p, float[1] q) {
                    w = Add (v, e)  p = Exp (w)  q = Neg (w)
                }
            > (s, x)
        }""",
        RemoveDead(),
    )
    (node,) = after.graph.node
    assert list(node.output) == ["state", "y"]
    (axes,) = (list(a.ints) for a in node.attribute if a.name == "scan_output_axes")
    assert axes == [1]
    assert_same_numbers(before, after, rtol=0)


def test_partition_points_stay_though_nothing_reads_them() -> None:
    _, after, report = rewrite(
        HEAD + "g (float[2] x) => (float[2] y) { y = Relu (x)  a = Neg (x) }",
        RemoveDead(),
        points=("a",),
    )
    assert "a = Neg (x)" in text(after)
    assert not report.rewritten


def test_what_a_removed_node_read_in_its_body_goes_too() -> None:
    model = onnx.parser.parse_model(
        HEAD
        + """
        g (bool c, float[2] x) => (float[2] y)
        {
            y = Relu (x)
            n = Neg (x)
            unread = If (c) <
                then_branch = t () => (float[2] a) { a = Exp (n) },
                else_branch = f () => (float[2] b) { b = Log (n) }
            >
        }"""
    )
    graph = import_model(model)
    optimise(graph, [RemoveDead()])
    assert [node.op_type for node in export_model(graph).graph.node] == ["Relu"]
