from __future__ import annotations

from graphs import parsed

from optc.passes.graph import import_model
from optc.passes.profile_check import why_not_at

# Half of n, doubled, is n only where n is even.
HALVED = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[1,1,n] x) => (float[1,1,n] y) <float[1,1,2] w = {1, 1}, float[4] s = {1, 1, 2, 0}>
{
    [half]  h = MaxPool <kernel_shape = [2], strides = [2]> (x)
    [twice] t = ConvTranspose <strides = [2]> (h, w)
    [sum]   y = Add (x, t)
}"""


def test_extents_that_the_model_takes_are_taken() -> None:
    assert why_not_at(import_model(parsed(HALVED)), {"n": 8}) is None


def test_extents_that_break_a_rule_are_refused_with_the_node() -> None:
    reason = why_not_at(import_model(parsed(HALVED)), {"n": 7})
    assert reason is not None
    assert "sum" in reason
