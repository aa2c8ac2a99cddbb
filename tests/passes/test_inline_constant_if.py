from graphs import assert_same_numbers, rewrite, text

from optc.passes.inline_constant_if import InlineConstantIf

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def test_the_branch_that_is_taken_stands_in_the_place_of_the_if() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[2] x) => (float[2] y)
        <bool yes = {1}>
        {
            [pre]  n = Neg (x)
            [if]   m = If (yes) <
                then_branch = t () => (float[2] a) { [one] e = Exp (n)  [two] a = Ceil (e) },
                else_branch = f () => (float[2] b) { [three] b = Log (n) }
            >
            [post] y = Abs (m)
        }""",
        InlineConstantIf(),
    )
    assert (
        text(after)
        == """\
g (float[2] x) => (float[2] y) {
   [pre] n = Neg (x)
   [one] e = Exp (n)
   [two] m = Ceil (e)
   [post] y = Abs (m)
}"""
    )
    assert report.removed == {"if": "its condition is always true"}
    assert_same_numbers(before, after, rtol=0)


def test_a_false_condition_takes_the_other_branch() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[2] x) => (float[2] y)
        <bool[1] no = {0}>
        {
            y = If (no) <
                then_branch = t () => (float[2] a) { a = Exp (x) },
                else_branch = f () => (float[2] b) { b = Neg (x) }
            >
        }""",
        InlineConstantIf(),
    )
    assert text(after).count("y = Neg (x)") == 1
    assert_same_numbers(before, after, rtol=0)


def test_branch_outputs_that_no_node_makes_go_through_an_identity() -> None:
    before, after, report = rewrite(
        HEAD
        + """
        g (float[2] x) => (float[2] y, float[2] z)
        <bool yes = {1}>
        {
            n = Neg (x)
            [if] y, z = If (yes) <
                then_branch = t () => (float[2] a, float[2] k)
                    <float[2] k = {4, 5}> { a = Identity (n) },
                else_branch = f () => (float[2] b, float[2] c) { b = Exp (x)  c = Log (x) }
            >
        }""",
        InlineConstantIf(),
    )
    assert [node.op_type for node in after.graph.node] == ["Neg", "Identity", "Identity"]
    assert report.merged == {"if_1": ("if",)}
    assert_same_numbers(before, after, rtol=0)


def test_a_value_that_a_branch_gives_twice_is_computed_once() -> None:
    _, after, _ = rewrite(
        HEAD
        + """
        g (float[2] x) => (float[2] y, float[2] z)
        <bool yes = {1}>
        {
            y, z = If (yes) <
                then_branch = t () => (float[2] r, float[2] r) { r = Exp (x) },
                else_branch = f () => (float[2] b, float[2] c) { b = Abs (x)  c = Log (x) }
            >
        }""",
        InlineConstantIf(),
    )
    found = [(node.op_type, list(node.input), list(node.output)) for node in after.graph.node]
    assert found == [("Exp", ["x"], ["y"]), ("Identity", ["y"], ["z"])]


def test_nested_ifs_are_inlined_together() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (float[2] x) => (float[2] y)
        <bool yes = {1}, bool no = {0}>
        {
            y = If (yes) <
                then_branch = t () => (float[2] a) {
                    i = Neg (x)
                    a = If (no) <
                        then_branch = tt () => (float[2] p) { p = Exp (i) },
                        else_branch = tf () => (float[2] q) { q = Ceil (i) }
                    >
                },
                else_branch = f () => (float[2] b) { b = Log (x) }
            >
        }""",
        InlineConstantIf(),
    )
    assert [node.op_type for node in after.graph.node] == ["Neg", "Ceil"]
    assert_same_numbers(before, after, rtol=0)


def test_an_if_in_the_body_of_a_loop_is_inlined_there() -> None:
    before, after, _ = rewrite(
        HEAD
        + """
        g (int64 n, float[2] x) => (float[2] y)
        <bool yes = {1}>
        {
            w = Neg (x)
            y = Loop (n, yes, x) <body = b (int64 i, bool c, float[2] v) => (bool d, float[2] o) {
                d = Identity (c)
                o = If (yes) <
                    then_branch = t () => (float[2] a) { a = Add (v, w) },
                    else_branch = f () => (float[2] e) { e = Mul (v, w) }
                >
            }>
        }""",
        InlineConstantIf(),
    )
    body = after.graph.node[1].attribute[0].g
    assert [node.op_type for node in body.node] == ["Identity", "Add"]
    assert body.output[1].name == "o"
    assert_same_numbers(before, after, rtol=0)


def test_a_condition_of_the_run_is_left_alone() -> None:
    _, _, report = rewrite(
        HEAD
        + """
        g (bool c, float[2] x) => (float[2] y)
        {
            y = If (c) <
                then_branch = t () => (float[2] a) { a = Exp (x) },
                else_branch = f () => (float[2] b) { b = Neg (x) }
            >
        }""",
        InlineConstantIf(),
    )
    assert not report.rewritten
