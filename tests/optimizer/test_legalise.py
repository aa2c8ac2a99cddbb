"""Rewriting what a target refuses: which rewrites are kept, and where they end up."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from graphs import parsed, run
from onnx import numpy_helper

import optc
from optc.optimizer.builder import Workers
from optc.optimizer.job import BuildFailure, ProbeJob, ProbeResult, Refusal
from optc.optimizer.legalise import Legaliser
from optc.optimizer.oracle import Oracle, likeness
from optc.optimizer.partition import Judge, Legalised, Off, Question, Refused, profile_shapes
from optc.passes.contract import Facts, Pass, Report
from optc.passes.flops import flops
from optc.passes.graph import export_model, import_model
from optc.passes.legalising import Recipe
from optc.passes.match import made_by
from optc.passes.replacement import Replacement
from optc.passes.shape import annotate, infer
from optc.specs.compile_spec import Range, Target

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
RANGES = {"n": Range(min=1, opt=2, max=4), "m": Range(min=1, opt=2, max=9)}

ABS = "g (float[n,4] x) => (float[n,4] y) { [abs] y = Abs (x) }"


class SpellOutAbs(Pass):
    """Let Abs be ``Max(x, -x)``."""

    name = "spell-out-abs"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        report = Report()
        for node in facts.nodes("Abs"):
            new = Replacement(graph, facts, node)
            x = node.inputs[0]
            new.finish(report, new.add("Max", x, new.add("Neg", x)))
        return report


class SpellOutMax(Pass):
    """Let Max be ``Where(a > b, a, b)``."""

    name = "spell-out-max"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        report = Report()
        for node in facts.nodes("Max"):
            new = Replacement(graph, facts, node)
            a, b = node.inputs
            new.finish(report, new.add("Where", new.add("Greater", a, b), a, b))
        return report


class AddAbsTogether(Pass):
    """Let ``Abs(a) + Abs(b)`` be ``Max(a, -a) + Max(b, -b)``, in one go."""

    name = "add-abs-together"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        report = Report()
        refused = {id(node) for node in facts.nodes("Abs")}
        for add in [node for node in graph.nodes if node.op == "Add"]:
            both = [node for tensor in add.inputs if (node := made_by(tensor, "Abs"))]
            if len(both) == 2 and refused.issuperset(map(id, both)):
                new = Replacement(graph, facts, add, tuple(both))
                values = [node.inputs[0] for node in both]
                sides = [new.add("Max", x, new.add("Neg", x)) for x in values]
                new.finish(report, new.add("Add", *sides))
        return report


class GoLongWay(Pass):
    """Let Abs be the same behind two products that change nothing and cost much."""

    name = "go-long-way"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        report = Report()
        for node in facts.nodes("Abs"):
            new = Replacement(graph, facts, node)
            wide = new.add("MatMul", node.inputs[0], np.eye(4, 512, dtype=np.float32))
            same = new.add("MatMul", wide, np.eye(512, 4, dtype=np.float32))
            new.finish(report, new.add("Max", same, new.add("Neg", same)))
        return report


class TryAgain(Pass):
    """Let Abs be another Abs, for ever."""

    name = "try-again"
    group = "legalise"

    def run(self, graph: gs.Graph, facts: Facts) -> Report:
        report = Report()
        for node in facts.nodes("Abs"):
            new = Replacement(graph, facts, node)
            new.finish(report, new.add("Abs", node.inputs[0]))
        return report


class Scripted(Workers):
    """Workers that refuse the ops that a test names, by compute capability."""

    def __init__(self, refused: Mapping[str, Collection[str]]) -> None:
        super().__init__(1)
        self.asked: list[list[str]] = []
        self._refused = refused

    def version(self, backend: str) -> str:
        return "scripted"

    def probe(self, jobs: Sequence[ProbeJob]) -> list[ProbeResult]:
        return [ProbeResult(0.0, self._failure(job)) for job in jobs]

    def _failure(self, job: ProbeJob) -> BuildFailure | None:
        assert isinstance(job.model, bytes)
        nodes = onnx.load_model_from_string(job.model).graph.node
        self.asked.append([node.op_type for node in nodes])
        refusals = tuple(
            Refusal(node.name, node.op_type, "UNSUPPORTED_NODE", f"no {node.op_type} here")
            for node in nodes
            if node.op_type in self._refused.get(job.compute_capability or "", ())
        )
        return BuildFailure("refused", "no", refusals=refusals) if refusals else None


class Bench:
    """A model and what may be done for it, with scripted workers.

    Args:
        text: The model.
        legalisers: Passes.
        path: A folder of the test's own.
        refused: Compute capability -> ops that are refused for it.
    """

    def __init__(
        self,
        text: str,
        legalisers: Sequence[Pass],
        path: Path,
        refused: Mapping[str, Collection[str]],
    ) -> None:
        self.workers = Scripted(refused)
        self.loaded = 0  # how often the passes were asked for
        self._legalisers = legalisers
        self.oracle = Oracle(self.workers, path / "cache")
        graph = import_model(parsed(HEAD + text))
        shapes = infer(graph)
        annotate(graph, shapes)
        counted = flops(graph, shapes, RANGES)
        self.question = Question(graph, shapes, [RANGES], {}, frozenset(), counted)
        self.legaliser = Legaliser(
            self.question,
            self.oracle,
            legalisers=self._passes,
            optimisers=[],
            place=lambda constant: None,
            folder=path,
            tf32=False,
        )

    def _passes(self) -> Sequence[Pass]:
        self.loaded += 1
        return self._legalisers

    def legalised(
        self, *names: str, by: Judge = "parser", compute_capability: str = "8.6"
    ) -> dict[str, Legalised | str]:
        """Return what comes of the nodes ``names`` when they are refused."""
        refused: Off = dict.fromkeys(names, Refused(by, "not as it is"))
        return self.legaliser.legalise(
            refused,
            Target(name="t", compute_capability=compute_capability),
            lambda: export_model(self.question.graph),
            lambda inputs: profile_shapes(self.question, inputs),
        )

    def recipe(self, node: str) -> Recipe:
        """Return how ``node`` is rewritten when it is refused."""
        found = self.legalised(node)[node]
        assert isinstance(found, Legalised), found
        return found.recipe

    def part(self, node: str) -> bytes:
        """Return what a node is known by among those that are alike."""
        model = self.oracle.alone(export_model(self.question.graph), [node])[node]
        shapes = profile_shapes(self.question, [info.name for info in model.graph.input])
        assert shapes is not None
        return likeness(model, node, shapes)


MakeBench = Callable[..., Bench]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[MakeBench]:
    """Return the function that makes a bench; what it made is closed after the test."""
    with ExitStack() as made:

        def make(text: str, *legalisers: Pass, refused: Mapping[str, Collection[str]]) -> Bench:
            found = Bench(text, legalisers, tmp_path, refused)
            made.enter_context(found.workers)
            return found

        yield make


def test_what_is_taken_as_rewritten_is_kept_with_who_refused_it(bench: MakeBench) -> None:
    made = bench(ABS, SpellOutAbs(), refused={"8.6": ["Abs"]})
    found = made.legalised("abs")
    assert found == {
        "abs": Legalised(Recipe("abs", ("spell-out-abs",)), Refused("parser", "not as it is"))
    }
    assert made.workers.asked == [["Neg", "Max"]]


def test_what_is_refused_in_turn_is_rewritten_in_turn(bench: MakeBench) -> None:
    made = bench(ABS, SpellOutMax(), SpellOutAbs(), refused={"8.6": ["Abs", "Max"]})
    recipe = made.recipe("abs")
    assert recipe.passes == ("spell-out-abs", "spell-out-max")
    assert recipe.then == (frozenset({"Max"}),)
    assert made.workers.asked == [["Neg", "Max"], ["Neg", "Greater", "Where"]]


def test_what_no_pass_knows_to_rewrite_in_turn_stays_off(bench: MakeBench) -> None:
    made = bench(ABS, SpellOutAbs(), refused={"8.6": ["Abs", "Max"]})
    words = "as rewritten by spell-out-abs refused, too: no Max here"
    assert made.legalised("abs") == {"abs": words}
    assert made.workers.asked == [["Neg", "Max"]]


def test_rewrites_that_lead_nowhere_end(bench: MakeBench) -> None:
    made = bench(ABS, TryAgain(), refused={"8.6": ["Abs"]})
    assert made.legalised("abs") == {"abs": "as rewritten by try-again refused, too: no Abs here"}
    assert made.workers.asked == [["Abs"]], "what is asked for a second time is remembered"


def test_a_rewrite_that_does_not_pay_is_not_even_asked_about(bench: MakeBench) -> None:
    made = bench(ABS, GoLongWay(), refused={"8.6": ["Abs"]})
    assert str(made.legalised("abs")["abs"]).startswith(
        "not rewritten: it would take 1.6e+04 FLOPs"
    )
    assert made.workers.asked == []


def test_a_dear_rewrite_pays_where_the_rest_of_the_model_is_dearer_by_far(
    bench: MakeBench,
) -> None:
    text = """
    g (float[n,4] x, float[1024,1024] w) => (float[n,4] y, float[1024,1024] z)
    {
        [abs] y = Abs (x)
        [product] z = MatMul (w, w)
    }"""
    made = bench(text, GoLongWay(), refused={"8.6": ["Abs"]})
    assert made.recipe("abs").passes == ("go-long-way",)


def test_what_the_spec_keeps_off_is_left_alone(bench: MakeBench) -> None:
    made = bench(ABS, SpellOutAbs(), refused={"8.6": ["Abs"]})
    assert made.legalised("abs", by="spec") == {}
    assert made.workers.asked == []


def test_an_axis_without_a_bound_is_not_asked_about(bench: MakeBench) -> None:
    made = bench(ABS.replace("[n,4]", "[k,4]"), SpellOutAbs(), refused={"8.6": ["Abs"]})
    assert made.legalised("abs") == {}
    assert made.workers.asked == []


MANY = """
g (float[n,4] a, float[n,4] b, float[n,4] c, float[m,4] d) =>
  (float[n,4] e, float[n,4] f, float[n,4] h, float[m,4] i)
{
    [first] e = Abs (a)
    [second] f = Abs (b)
    [third] h = Abs (c)
    [other] i = Abs (d)
}"""


def test_of_nodes_that_differ_in_names_only_one_is_tried(bench: MakeBench) -> None:
    made = bench(MANY, SpellOutAbs(), SpellOutMax(), refused={"8.6": ["Abs", "Max"]})
    then = (frozenset({"Max"}),)
    found = made.legalised("first", "second", "third")
    assert [legalised.recipe for legalised in found.values()] == [
        Recipe(name, ("spell-out-abs", "spell-out-max"), then)
        for name in ("first", "second", "third")
    ]
    assert len(made.workers.asked) == 2  # of the first, once more after it was refused in turn
    assert made.part("first") == made.part("second")
    assert made.part("first") != made.part("other"), "its axis has another range"
    assert set(made.legalised("other")) == {"other"}
    assert len(made.workers.asked) == 4


def test_nodes_of_unlike_weights_are_each_tried(bench: MakeBench) -> None:
    rng = np.random.default_rng(0)
    values = [",".join(map(str, rng.integers(0, 9, 400))) for _ in range(2)]
    text = f"""
    g (float[400] x) => (float[400] y, float[400] z)
    <float[400] v = {{{values[0]}}}, float[400] w = {{{values[1]}}}>
    {{
        [one] y = PRelu (x, v)
        [two] z = PRelu (x, w)
    }}"""
    made = bench(text, refused={})
    assert made.part("one") != made.part("two")
    same = bench(text.replace(values[1], values[0]), refused={})
    assert same.part("one") == same.part("two")


def test_each_target_is_asked_for_itself(bench: MakeBench) -> None:
    refused = {"7.5": ["Abs", "Max"], "8.9": ["Abs"]}
    made = bench(ABS, SpellOutAbs(), SpellOutMax(), refused=refused)
    turing = made.legalised("abs", compute_capability="7.5")["abs"].recipe
    ada = made.legalised("abs", compute_capability="8.9")["abs"].recipe
    assert turing.then == (frozenset({"Max"}),)
    assert ada.then == ()


def test_in_their_stage_nodes_are_rewritten_as_each_was_on_its_own(bench: MakeBench) -> None:
    made = bench(MANY, SpellOutAbs(), SpellOutMax(), refused={"8.6": ["Abs", "Max"]})
    recipes = [found.recipe for found in made.legalised("first", "other").values()]
    plain = Recipe("second", ("spell-out-abs",))
    work = made.legaliser.rewritten(made.question.graph, [*recipes, plain])
    assert sorted(node.op for node in work.graph.nodes) == sorted(
        ["Neg", "Greater", "Where"] * 2 + ["Neg", "Max"] + ["Abs"]
    )
    owners = {(node.op, *work.owners[node.name]) for node in work.graph.nodes}
    assert owners >= {("Where", "first"), ("Where", "other"), ("Max", "second"), ("Abs", "third")}
    before, after = export_model(made.question.graph), export_model(work.graph)
    inputs = {name: np.array([[-1, 2, -3, 0]], np.float32) for name in "abcd"}
    for name, expected in run(before, inputs).items():
        np.testing.assert_array_equal(run(after, inputs)[name], expected)
    assert [node.op for node in made.question.graph.nodes] == ["Abs"] * 4, "the whole stays"


def test_the_passes_are_loaded_when_something_is_refused_and_not_before(bench: MakeBench) -> None:
    made = bench(ABS, SpellOutAbs(), refused={"8.6": ["Abs"]})
    assert made.legalised() == made.legalised("abs", by="spec") == {}
    assert made.loaded == 0
    made.legalised("abs")
    made.legalised("abs", compute_capability="8.9")
    assert made.loaded == 1


TOGETHER = """
g (float[n,4] a, float[n,4] b, float[n,4] c) => (float[n,4] d, float[n,4] e)
{
    [first] x = Abs (a)
    [second] y = Abs (b)
    [add] d = Add (x, y)
    [third] e = Abs (c)
}"""


def test_a_stage_says_which_passes_rewrote_each_of_its_nodes(bench: MakeBench) -> None:
    made = bench(TOGETHER, AddAbsTogether(), SpellOutAbs(), SpellOutMax(), refused={"8.6": ["Abs"]})
    names = ["first", "second", "third"]
    recipes = [found.recipe for found in made.legalised(*names).values()]
    alone = [("spell-out-abs",)] * 3
    assert [recipe.passes for recipe in recipes] == alone
    work = made.legaliser.rewritten(made.question.graph, recipes)
    assert {name: work.fired[name] for name in names} == {
        "first": ["add-abs-together"],
        "second": ["add-abs-together"],
        "third": ["spell-out-abs"],
    }
    in_turn = Recipe("third", ("spell-out-abs", "spell-out-max"), (frozenset({"Max"}),))
    work = made.legaliser.rewritten(made.question.graph, [*recipes[:2], in_turn])
    assert work.fired["first"] == ["add-abs-together"]
    assert work.fired["third"] == ["spell-out-abs", "spell-out-max"]


# --- the whole way, with the real parser and builder ---------------------------------------------


def spec_of(folder: Path, text: str, more: str, **weights: tuple[int, ...]) -> Path:
    """Write a model, with weights drawn by name and shape, and a spec for it; return the spec."""
    model = onnx.parser.parse_model(HEAD + text)
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        values = rng.uniform(-0.3, 0.3, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.save(model, folder / "m.onnx")
    spec = folder / "spec.yaml"
    spec.write_text(f"version: 1\nmodel: m.onnx\n{more}\n")
    return spec


# For 7.5 a float32 product is refused, and taken as a convolution.
PRODUCT = """
g (float[batch,64,8,8] x) => (float[batch,64,8,64] y)
{
    [conv] a = Conv <pads = [1, 1, 1, 1]> (x, w)
    [product] y = MatMul (a, m)
}"""


def test_targets_with_unlike_answers_have_their_own_form_and_share_the_weights(
    tmp_path: Path,
) -> None:
    spec = spec_of(
        tmp_path,
        PRODUCT,
        """
dims: {batch: {min: 1, opt: 2, max: 4}}
targets: [{name: turing, compute_capability: 7.5}, {name: ada, compute_capability: 8.9}]
verify: {atol: 1.0e-4, rtol: 1.0e-4}""",
        w=(64, 64, 3, 3),
        m=(8, 64),
    )
    package = optc.compile(spec, tmp_path / "out")
    turing, ada = package.manifest.stages
    assert [list(stage.engines) for stage in (turing, ada)] == [["turing"], ["ada"]]
    assert [(each.node, each.by) for each in turing.legalised] == [("product", "builder")]
    assert "FP32 GEMM" in turing.legalised[0].text
    assert ada.legalised == ()
    models = [
        onnx.load(package.path / stage.model, load_external_data=False) for stage in (turing, ada)
    ]
    assert [[node.op_type for node in model.graph.node] for model in models] == [
        ["Conv", "Transpose", "Conv", "Transpose"],
        ["Conv", "MatMul"],
    ]
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for model in models
        for tensor in model.graph.initializer
        if tensor.name == "w"
    ]
    assert places[0]["location"]
    assert places[0] == places[1]


# Each of both has an engine on its own. Beside a loop, no engine lets data decide an extent.
BESIDE = """
g (float[8] x, float[4,8] z) => (int64[1,k] y, float[4,8] l)
<int64 three = {3}, bool yes = {1}>
{
    [find] y = NonZero (x)
    [loop] l = Loop (three, yes, z) <body = b (int64 i, bool c, float[4,8] s)
        => (bool d, float[4,8] r)
    {
        [keep] d = Identity (c)
        [grow] r = Add (s, s)
    }>
}"""


def test_what_keeps_a_stage_from_building_as_rewritten_goes_to_the_fallback(
    tmp_path: Path,
) -> None:
    spec = spec_of(
        tmp_path,
        BESIDE,
        """
targets: [{name: t, compute_capability: 8.6}]
passes: {disable: [unroll-loop]}
verify: {atol: 0, rtol: 0}""",
    )
    package = optc.compile(spec, tmp_path / "out")
    found = [(stage.runtime, stage.nodes, stage.legalised) for stage in package.manifest.stages]
    assert sorted(found) == [("onnxruntime", ("find",), ()), ("tensorrt", ("loop",), ())]
    [why] = [why for stage in package.manifest.stages for why in stage.why]
    assert why.by == "builder"
    assert why.text.endswith("(as rewritten by decompose-non-zero)")
