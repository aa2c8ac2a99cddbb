"""The search's logic, on models that are arithmetic: each node in low precision adds a known error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from optc.optimizer.precision_measure import Journal, Sample, See
from optc.optimizer.precision_search import Candidate, Found, Problem, search
from optc.passes.graph import Array
from optc.passes.precision import NodePrecision
from optc.specs.compile_spec import SearchLimits

Error = Callable[[Mapping[str, NodePrecision], float], float]
"""Nodes in low precision, and the input -> the error of the output."""


@dataclass
class Run:
    outputs: dict[str, Array]
    feed: float
    nbytes: int = 1000


@dataclass
class Model:
    """Its output is 1, plus the error of the nodes in low precision."""

    error: Error
    tensors_are: Mapping[str, float] = field(default_factory=dict)
    runs: int = 0
    references: int = 0

    def reference(self, feeds: Mapping[str, Array]) -> Run:
        self.references += 1
        return Run({"y": np.ones(1, np.float32)}, float(feeds["x"]))

    def run(
        self, reference: Run, nodes: Mapping[str, NodePrecision], *, see: See | None = None
    ) -> dict[str, Array]:
        self.runs += 1
        assert all(precision != "fp32" for precision in nodes.values())
        return {"y": np.array([1 + self.error(nodes, reference.feed)], np.float64)}

    def tensors(
        self, feeds: Mapping[str, Array], wanted: Collection[str], see: See
    ) -> dict[str, Array]:
        for name, most in self.tensors_are.items():
            if name in wanted:
                see(name, np.array([most, -1], np.float32))
        return {}


@dataclass
class Judged:
    badness: float
    outputs: tuple[str, ...] = ("y",)


class Absolute:
    """Allows an error of 1."""

    def judge(
        self, expected: Mapping[str, Array], found: Mapping[str, Array], group: str | None = None
    ) -> list[Judged]:
        return [Judged(float(np.abs(found["y"] - expected["y"]).max()))]


class Steps(Absolute):
    """Sees no error until it is large, as where the best class is compared."""

    def judge(
        self, expected: Mapping[str, Array], found: Mapping[str, Array], group: str | None = None
    ) -> list[Judged]:
        [judged] = super().judge(expected, found)
        return [Judged(0.0 if judged.badness <= 1 else 2.0)]


def of_squares(costs: Mapping[str, float]) -> Error:
    """Return the error of independent roundings."""
    return lambda nodes, _: math.sqrt(sum(costs.get(name, 0.0) ** 2 for name in nodes))


def candidates(
    count: int,
    levels: tuple[NodePrecision, ...] = ("fp16", "fp32"),
    ops: tuple[str, ...] = ("Conv", "Relu", "Add", "MatMul", "Softmax"),
) -> list[Candidate]:
    return [
        Candidate(f"n{i}", ops[i % len(ops)], 100.0 if ops[i % len(ops)] == "Conv" else 1.0, levels)
        for i in range(count)
    ]


def samples(*feeds: float) -> list[Sample]:
    return [
        Sample(f"s{i}", lambda feed=feed: {"x": np.array(feed)})  # type: ignore[misc]
        for i, feed in enumerate(feeds or (1.0,))
    ]


def found_in(
    model: Model,
    nodes: list[Candidate],
    *feeds: float,
    limits: SearchLimits | None = None,
    **more: object,
) -> Found:
    judge = more.pop("judge", Absolute())
    problem = Problem(model, samples(*feeds), judge, nodes)  # type: ignore[arg-type]
    return search(problem, limits or SearchLimits(), **more)  # type: ignore[arg-type]


def kept(found: Found) -> set[str]:
    return {each.node for each in found.kept}


def test_a_model_that_is_exact_enough_costs_next_to_nothing() -> None:
    model = Model(of_squares({"n3": 0.5}))
    found = found_in(model, candidates(500))
    assert kept(found) == set()
    assert (found.met, found.complete, found.share) == (True, True, 1.0)
    assert found.badness == found.lowest == pytest.approx(0.5)
    assert (model.references, model.runs) == (1, 2)  # one for the curve


def test_what_breaks_it_alone_is_kept_and_nothing_else() -> None:
    costs = {f"n{i}": 0.01 for i in range(1000)} | {"n17": 4.0, "n500": math.inf, "n903": 1.5}
    model = Model(of_squares(costs))
    found = found_in(model, candidates(1000))
    assert kept(found) == {"n17", "n500", "n903"}
    assert found.met
    assert found.complete
    assert found.runs < 55
    assert [each.node for each in found.ranking[:3]] == ["n500", "n17", "n903"]
    assert found.ranking[1].why == "alone in fp16 it costs 4 times the tolerance of `y`"
    assert found.ranking[0].why == "alone in fp16 it costs all: `y` is no number any more"
    assert found.ranking[1].measured


def test_on_several_samples_the_search_runs_on_the_hardest_and_then_on_all() -> None:
    def error(nodes: Mapping[str, NodePrecision], feed: float) -> float:
        # n5 breaks the first kind of input, n80 the second; the third is easy.
        return {0.0: 9.0 * ("n5" in nodes), 1.0: 3.0 * ("n80" in nodes), 2.0: 0.0}[feed]

    found = found_in(Model(error), candidates(100), 2.0, 0.0, 1.0, 2.0)
    assert kept(found) == {"n5", "n80"}
    assert found.runs < 15
    assert found.samples == 4


def test_small_errors_that_add_up_are_taken_where_they_save_the_most_operations() -> None:
    # All cost the same, the Convs are dear: it is the others that are kept.
    found = found_in(Model(of_squares({f"n{i}": 0.1 for i in range(100)})), candidates(100))
    assert found.met
    assert found.badness <= 0.8
    assert all(each.op != "Conv" for each in found.kept)
    assert len(found.kept) <= 40  # 36 of 100 make up for the excess
    assert found.share > 0.95


def test_nodes_that_cost_only_together_are_found() -> None:
    def error(nodes: Mapping[str, NodePrecision], _: float) -> float:
        return 5.0 if {"n10", "n77"} <= nodes.keys() else 0.0

    found = found_in(Model(error), candidates(100))
    assert len(kept(found)) == 1
    assert kept(found) <= {"n10", "n77"}
    assert found.met


def test_demands_that_see_errors_in_steps_only_are_met_with_few_nodes() -> None:
    costs = {f"n{i}": 0.001 for i in range(200)} | {"n40": 0.9, "n41": 0.8}
    found = found_in(Model(of_squares(costs)), candidates(200), judge=Steps())
    assert found.met
    assert len(kept(found) & {"n40", "n41"}) == 1
    assert len(kept(found)) <= 3


def test_no_kept_node_can_be_lowered() -> None:
    generator = np.random.default_rng(0)
    costs = {f"n{i}": float(c) for i, c in enumerate(generator.lognormal(-3, 1.5, 80))}
    error = of_squares(costs)
    nodes = candidates(80)
    found = found_in(Model(error), nodes, limits=SearchLimits(max_runs=2000))
    assert found.complete
    assert found.met
    low = [each.name for each in nodes if found.nodes[each.name] == "fp16"]
    for name in kept(found):
        assert error(dict.fromkeys([*low, name], "fp16"), 1.0) > 0.8


def test_what_cannot_be_quantised_falls_back_to_fp16_and_then_to_fp32() -> None:
    levels: tuple[NodePrecision, ...] = ("int8", "fp16", "fp32")
    costs = {"n0": {"int8": 3.0, "fp16": 0.01}, "n5": {"int8": 9.0, "fp16": 2.0}}

    def error(nodes: Mapping[str, NodePrecision], _: float) -> float:
        each = (costs.get(n, {"int8": 0.01}).get(p, 0.001) for n, p in nodes.items())
        return math.sqrt(sum(cost**2 for cost in each))

    nodes = [
        *candidates(50, levels, ("Conv",)),
        Candidate("softmax", "Softmax", 1.0, ("fp16", "fp32")),
    ]
    found = found_in(Model(error), nodes)
    assert found.nodes["n0"] == "fp16"
    assert found.nodes["n5"] == "fp32"
    assert found.nodes["softmax"] == "fp16"
    assert kept(found) == {"n0", "n5"}
    assert found.met
    assert found.share == pytest.approx(48 * 100 / 5001)


def test_a_node_that_was_set_by_hand_stays() -> None:
    nodes = candidates(10)
    nodes[3] = Candidate("n3", "Conv", 1.0, ("bf16",))
    found = found_in(Model(of_squares({"n3": 0.3, "n4": 2.0})), nodes)
    assert found.nodes["n3"] == "bf16"
    assert kept(found) == {"n4"}
    assert found.met


def test_what_the_outputs_should_be_may_be_told() -> None:
    told = Sample("s", lambda: {"x": np.array(1.0)}, None, lambda: {"y": np.array([1.5])})
    problem = Problem(Model(of_squares({"n4": 0.4, "n6": 0.9})), [told], Absolute(), candidates(10))
    found = search(problem, SearchLimits(margin=1))
    assert kept(found) == set()  # in fp32 the model is 0.5 too low; what is lowered adds to that
    assert found.badness == pytest.approx(abs(1 + math.hypot(0.4, 0.9) - 1.5))


def test_what_is_the_noise_of_the_model_is_not_held_against_a_node() -> None:
    class Noisy(Model):
        def reference(self, feeds: Mapping[str, Array]) -> Run:
            moves = 0.0 if feeds["x"] == 1 / 3 else 0.5
            return Run({"y": np.full(1, 1 + moves)}, float(feeds["x"]))

    model = Noisy(of_squares({"n3": 5.0, **{f"n{i}": 0.5 for i in range(4, 9)}}))
    found = found_in(model, candidates(10), 1 / 3)
    assert kept(found) == {"n3"}
    assert found.met
    assert found.badness == pytest.approx(math.sqrt(5) / 2)
    assert found.reason == (
        "inputs moved by one unit in their last place cost 50 % of the tolerance of `y` in fp32, "
        "and 4 times as much is taken for noise"
    )


def test_each_sample_is_judged_by_the_demands_of_its_group() -> None:
    class OfGroups(Absolute):
        def judge(
            self,
            expected: Mapping[str, Array],
            found: Mapping[str, Array],
            group: str | None = None,
        ) -> list[Judged]:
            [judged] = super().judge(expected, found)
            return [Judged(judged.badness * (10 if group == "hard" else 1))]

    easy, hard = samples(1.0, 1.0)
    nodes, model = candidates(10), Model(of_squares({"n4": 0.4}))
    groups = [easy, Sample("hard", hard.feeds, "hard")]
    assert kept(search(Problem(model, [easy], OfGroups(), nodes), SearchLimits())) == set()
    assert kept(search(Problem(model, groups, OfGroups(), nodes), SearchLimits())) == {"n4"}


def test_each_run_is_told() -> None:
    class Seen:
        def __init__(self) -> None:
            self.phases: list[str] = []
            self.fractions: list[float] = []

        def step(self, text: str) -> None:
            raise AssertionError("it is one step of the work")

        def part(self, label: str, phase: str, fraction: float) -> None:
            self.phases.append(phase)
            self.fractions.append(fraction)

    seen = Seen()
    model = Model(of_squares({"n4": 4.0}))
    found_in(model, candidates(10), progress=seen, limits=SearchLimits(max_runs=50))
    assert len(seen.phases) == model.runs + 2  # and two in fp32, on inputs that were moved
    assert seen.phases[:2] == ["run 1 of at most 50", "run 2 of at most 50"]
    assert seen.fractions == sorted(seen.fractions)
    assert 0 <= min(seen.fractions) <= max(seen.fractions) < 1


def test_demands_that_nothing_can_meet_do_not_keep_everything() -> None:
    nodes = candidates(10)
    nodes[3] = Candidate("n3", "Conv", 1.0, ("int8",))
    found = found_in(Model(of_squares({"n3": 7.0, "n4": 20.0})), nodes)
    assert not found.met
    assert found.reason.startswith("what is set by hand alone costs 7 times the tolerance")
    assert kept(found) == {"n4"}


def test_overflow_is_told_by_its_tensor() -> None:
    nodes = candidates(64)
    nodes[20] = Candidate("n20", "Add", 1.0, ("fp16", "fp32"), ("a",), ("b",))
    model = Model(of_squares({"n20": math.inf}), {"a": 3.0, "b": 1.2e5})
    found = found_in(model, nodes)
    assert kept(found) == {"n20"}
    assert found.kept[0].why.startswith("`b` reaches 1.2e+05, fp16 ends at 65504; ")


def test_the_same_is_found_each_time() -> None:
    generator = np.random.default_rng(1)
    costs = {f"n{i}": float(c) for i, c in enumerate(generator.lognormal(-2, 2, 60))}
    first, second = (
        found_in(Model(of_squares(costs)), candidates(60), 1.0, 2.0, clock=lambda: 0.0)
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("most", [1, 2, 3, 5, 10, 20, 40])
def test_a_search_that_is_ended_gives_what_was_measured(most: int) -> None:
    generator = np.random.default_rng(2)
    costs = {f"n{i}": float(c) for i, c in enumerate(generator.lognormal(-2, 2, 100))}
    model = Model(of_squares(costs))
    found = found_in(model, candidates(100), 1.0, 2.0, limits=SearchLimits(max_runs=most))
    assert model.runs <= 2 * most
    assert found.runs <= most
    assert found.met
    low = {name: precision for name, precision in found.nodes.items() if precision != "fp32"}
    assert model.error(low, 1.0) == pytest.approx(found.badness, abs=1e-6)
    assert found.badness <= 0.8
    if not found.complete:
        assert "a limit ended the search" in found.reason


def test_time_ends_it_too() -> None:
    model = Model(of_squares({"n3": 9.0, "n60": 9.0}))
    found = found_in(
        model, candidates(100), clock=lambda: float(model.runs), limits=SearchLimits(max_seconds=4)
    )
    assert not found.complete
    assert model.runs <= 5
    assert found.met


def test_a_long_search_of_little_time_still_lowers_what_it_can() -> None:
    costs = {f"n{i}": 3.0 for i in range(0, 400, 7)}
    model = Model(of_squares(costs))
    found = found_in(model, candidates(400), limits=SearchLimits(max_runs=60))
    assert not found.complete
    assert found.met
    assert found.share > 0.25


def test_a_search_is_taken_up_where_it_was_left(tmp_path: Path) -> None:
    costs = {"n17": 4.0, "n50": 2.0, "n93": 1.5}
    path = tmp_path / "search.jsonl"
    first, second, third = (Model(of_squares(costs), {"a": 1.0}) for _ in range(3))
    nodes = candidates(100)
    nodes[17] = Candidate("n17", "Add", 1.0, ("fp16", "fp32"), ("a",), ())
    found_in(first, nodes, limits=SearchLimits(max_runs=10), journal=Journal(path, "k"))
    again = found_in(second, nodes, journal=Journal(path, "k"), clock=lambda: 0.0)
    whole = found_in(Model(of_squares(costs), {"a": 1.0}), nodes, clock=lambda: 0.0)
    assert kept(again) == kept(whole) == {"n17", "n50", "n93"}
    assert again.reused >= 5
    assert second.runs == whole.runs - again.reused
    repeated = found_in(third, nodes, journal=Journal(path, "k"), clock=lambda: 0.0)
    assert third.runs == third.references == 0
    assert repeated.ranking == again.ranking == whole.ranking
    assert repeated.curve == whole.curve


def test_what_was_measured_before_ctrl_c_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    error = of_squares({"n17": 4.0, "n50": 2.0})
    model = Model(error)

    def interrupted(nodes: Mapping[str, NodePrecision], feed: float) -> float:
        if model.runs > 8:
            raise KeyboardInterrupt
        return error(nodes, feed)

    model.error = interrupted
    with pytest.raises(KeyboardInterrupt):
        found_in(model, candidates(100), journal=Journal(path, "k"))
    found = found_in(Model(error), candidates(100), journal=Journal(path, "k"))
    assert kept(found) == {"n17", "n50"}
    assert found.reused == 8 + 2  # two of them in fp32


def test_a_journal_of_another_problem_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    found_in(Model(of_squares({"n1": 2.0})), candidates(10), journal=Journal(path, "one"))
    model = Model(of_squares({"n2": 2.0}))
    found = found_in(model, candidates(10), journal=Journal(path, "two"))
    assert kept(found) == {"n2"}
    assert found.reused == 0
    assert json.loads(path.read_text().split("\n")[0])["key"] == "two"


def test_damaged_lines_of_a_journal_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    found_in(Model(of_squares({"n1": 2.0})), candidates(10), journal=Journal(path, "k"))
    lines = path.read_text().split("\n")
    # The first line tells whose it is, the second what was seen of the tensors.
    path.write_text("\n".join([*lines[:4], '{"sample": "s0"}', "[]", lines[4][:20]]))
    model = Model(of_squares({"n1": 2.0}))
    found = found_in(model, candidates(10), journal=Journal(path, "k"))
    assert kept(found) == {"n1"}
    assert found.reused == 2
    assert len(Journal(path, "k")) > 2  # what came after the broken line is read


def test_a_journal_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    found = found_in(
        Model(of_squares({"n1": 2.0})), candidates(10), journal=Journal(blocked / "j", "k")
    )
    assert kept(found) == {"n1"}


def test_few_references_are_held_when_memory_is_short() -> None:
    model = Model(of_squares({"n1": 2.0}))
    wide, narrow = (
        found_in(model, candidates(10), 1.0, 2.0, 3.0, memory_mib=mib, clock=lambda: 0.0)
        for mib in (1, 0)
    )
    assert wide == narrow
    assert model.references > 6


def test_the_curve_goes_from_all_high_to_all_low() -> None:
    found = found_in(Model(of_squares({"n0": 3.0, "n7": 5.0})), candidates(100))
    assert found.curve[0].share == found.curve[0].badness == 0
    assert found.curve[-1].share == 1
    assert found.curve[-1].badness == found.lowest
    shares = [point.share for point in found.curve]
    assert shares == sorted(shares)
    assert len(shares) >= 5
    [chosen] = [point for point in found.curve if point.chosen]
    assert chosen.share == found.share
    assert chosen.kept == 2


def test_nothing_to_search_is_no_problem() -> None:
    found = found_in(Model(of_squares({})), [])
    assert found.met
    assert found.nodes == {}
    assert found.curve == ()
