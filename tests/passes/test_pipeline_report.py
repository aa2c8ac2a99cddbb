"""What passes say of a graph that is rewritten more than once."""

from __future__ import annotations

from graphs import parsed

from optc.passes.graph import import_model
from optc.passes.pipeline import optimise
from optc.passes.registry import passes
from optc.passes.unroll_loop import UnrollLoop

SOURCE = """<ir_version: 9, opset_import: ["" : 17]> g (float[2] x) => (float[2] y)
    <int64 n = {2}, bool yes = {1}, float[2] s = {2, 3}> {
        [before] a = Exp (x)
        [same] b = Identity (a)
        [loop] y = Loop (n, yes, b) <body = one (int64 i, bool go, float[2] h)
            => (bool on, float[2] z) { [on] on = Identity (go) [mul] z = Mul (h, s) }>
    }"""


def test_origins_lead_back_to_the_first_graph() -> None:
    graph = import_model(parsed(SOURCE))
    report = optimise(graph, passes(disable=["unroll-loop"]))
    nodes, seconds = report.nodes_before, report.seconds
    report.go_on(optimise(graph, [UnrollLoop()]))
    report.go_on(optimise(graph, passes()))
    assert {node.op for node in graph.nodes} == {"Exp", "Mul"}
    assert set(report.origins) == {node.name for node in graph.nodes}
    found = {origin for origins in report.origins.values() for origin in origins}
    assert found <= {"before", "same", "loop", "mul", "on"}
    assert {"before", "mul"} <= found
    assert (report.nodes_before, report.nodes_after) == (nodes, len(graph.nodes))
    assert report.seconds > seconds


def test_a_pass_that_ran_twice_has_one_record() -> None:
    graph = import_model(parsed(SOURCE))
    report = optimise(graph, passes(disable=["unroll-loop"]))
    runs = {record.name: record.runs for record in report.records}
    assert "unroll-loop" not in runs
    report.go_on(optimise(graph, passes()))
    names = [record.name for record in report.records]
    assert len(names) == len(set(names))
    record = next(record for record in report.records if record.name == "unroll-loop")
    assert "loop" in record.removed
    assert record.origins >= {"mul"}
    identities = next(record for record in report.records if record.name == "remove-identities")
    assert identities.runs > runs["remove-identities"]
