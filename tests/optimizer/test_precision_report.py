"""What a search found, as text and as evidence."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from optc.optimizer.precision_report import MOST_RANKED, MOST_ROWS, evidence_of, text_of
from optc.optimizer.precision_search import Found, Point, Ranked


def ranked(number: int, cost: float, *, kept: bool) -> Ranked:
    precision = "fp32" if kept else "fp16"
    why = f"alone in fp16 it costs {cost:g} times the tolerance"
    return Ranked(f"node{number}", "Softmax", precision, "fp16", cost, True, 0.01, why)


FOUND = Found(
    nodes={"node0": "fp32", "node1": "fp16"},
    ranking=(ranked(0, math.inf, kept=True), ranked(1, 0.25, kept=False)),
    curve=(Point(0.0, 0.0, 2), Point(0.99, 0.3, 1, chosen=True), Point(1.0, math.inf, 0)),
    curve_sample="hard/1.npz",
    share=0.99,
    lowest=math.inf,
    badness=0.3,
    met=True,
    complete=True,
    reason="",
    runs=12.5,
    reused=0,
    seconds=3.21,
    samples=4,
    margin=0.8,
)


def many(count: int, kept: int) -> Found:
    nodes = [ranked(n, 100.0 - n / 100, kept=n >= count - kept) for n in range(count)]
    return replace(FOUND, ranking=tuple(nodes))


def test_the_text_says_what_was_found_and_why() -> None:
    text = text_of(FOUND)
    first, *_ = text.split("\n")
    assert first == (
        "99.00% of the FLOPs in low precision, 1 node kept in more; error 0.3 of the "
        "tolerance, with none kept inf; 50 runs over 4 inputs, 3.2 s"
    )
    assert "trade-off, measured on hard/1.npz:" in text
    assert [line.split()[-1] for line in text.split("\n") if "99.0%" in line] == ["chosen"]
    assert "node0" in text
    assert "alone in fp16 it costs inf times the tolerance" in text


def test_the_text_says_why_a_search_was_ended() -> None:
    text = text_of(replace(FOUND, complete=False, reason="a limit ended the search"))
    assert text.split("\n")[1] == "a limit ended the search"


def test_names_of_nodes_are_not_markup() -> None:
    entry = replace(FOUND.ranking[0], node="[bold]x[/bold]")
    assert "[bold]x[/bold]" in text_of(replace(FOUND, ranking=(entry,)))


def test_a_long_list_is_cut_and_says_so() -> None:
    text = text_of(many(400, 300))
    assert f"and {300 - MOST_ROWS} more that are kept (see --json)" in text


def test_evidence_is_json() -> None:
    evidence = evidence_of(FOUND)
    assert json.loads(json.dumps(evidence, allow_nan=False)) == evidence
    assert evidence["ranking"][0]["cost"] == "inf"
    assert [point["chosen"] for point in evidence["curve"]["points"]] == [False, True, False]


def test_evidence_has_all_that_are_kept_and_the_costliest_of_the_others() -> None:
    evidence = evidence_of(many(1000, 300))
    kept = [each for each in evidence["ranking"] if each["precision"] == "fp32"]
    assert (len(kept), evidence["not_ranked"]) == (300, 700)
    evidence = evidence_of(many(1000, 10))
    assert len(evidence["ranking"]) == MOST_RANKED
    costs = [each["cost"] for each in evidence["ranking"]]
    assert costs == sorted(costs, reverse=True)
