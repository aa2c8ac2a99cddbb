from __future__ import annotations

import pytest
from graphs import parsed

from optc.passes.graph import import_model
from optc.passes.tensorrt_rule import why_not_its_rounds

LOOP = """
<ir_version: 9, opset_import: ["" : 17]>
g (bool first, float[3] x) => (float[3] last, float[r,3] all) <int64 trips = {{7}}, bool yes = {{1}}>
{{
    [loop] last, all = Loop (trips, {first}, x)
      <body = b (int64 i, bool go, float[3] a) => (bool on, float[3] next, float[3] seen)
       {{
           next = Add (a, a)
           seen = Identity (next)
           {condition}
       }}>
}}"""

GOES_ON = "on = Identity (go)"
ENDS = "total = ReduceSum <keepdims = 0> (next) limit = Constant <value = float {9}> () on = Less (total, limit)"


@pytest.mark.parametrize(
    ("first", "condition", "right"),
    [
        ("", GOES_ON, True),
        ("yes", GOES_ON, True),
        ("yes", "on = Identity (yes)", True),
        ("first", GOES_ON, False),
        ("yes", ENDS, False),
        ("", ENDS, False),
    ],
)
def test_a_loop_that_may_end_early_has_no_scan_outputs_in_tensorrt(
    first: str, condition: str, right: bool
) -> None:
    graph = import_model(parsed(LOOP.format(first=first, condition=condition)))
    assert (why_not_its_rounds(graph.nodes[0]) is None) == right


def test_what_is_carried_round_may_end_early() -> None:
    source = LOOP.format(first="yes", condition=ENDS)
    source = source.replace(", float[r,3] all", "").replace("last, all", "last")
    source = source.replace(", float[3] seen", "").replace("seen = Identity (next)", "")
    assert why_not_its_rounds(import_model(parsed(source)).nodes[0]) is None
