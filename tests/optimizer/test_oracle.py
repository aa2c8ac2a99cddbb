from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from optc.optimizer import answer_cache
from optc.optimizer.builder import Workers
from optc.optimizer.fingerprint import Fingerprint
from optc.optimizer.job import BuildFailure, BuildJob, BuildResult, ProbeJob, ProbeResult, Profile
from optc.optimizer.oracle import Oracle, likeness
from optc.passes.graph import bodies_of, export_model, import_model
from optc.passes.shape import annotate, infer

RTX = "tensorrt-rtx"
HEAD = '<ir_version: 8, opset_import: ["" : 17, "com.example" : 1]>'


class Counted(Workers):
    """Workers that remember what they were asked."""

    def __init__(self) -> None:
        super().__init__(2)
        self.asked: list[ProbeJob] = []

    def probe(self, jobs: Sequence[ProbeJob]) -> list[ProbeResult]:
        self.asked.extend(jobs)
        return super().probe(jobs)


@pytest.fixture(scope="module")
def pool() -> Iterator[Counted]:
    with Counted() as workers:
        yield workers


@pytest.fixture
def workers(pool: Counted) -> Counted:
    pool.asked.clear()
    return pool


@pytest.fixture
def oracle(workers: Counted, tmp_path: Path) -> Oracle:
    return Oracle(workers, tmp_path / "cache")


def model(text: str) -> onnx.ModelProto:
    """Return the model of ``text`` with the types that shape inference finds."""
    return onnx.shape_inference.infer_shapes(parser.parse_model(HEAD + text), data_prop=True)


def fixed(names: Sequence[str]) -> tuple[Profile, ...] | None:
    """Return the profiles of a model without dynamic axes."""
    return ()


def many_non_zero(count: int) -> onnx.ModelProto:
    body = "".join(
        f"""
        [a{i}] a{i} = Relu (x)
        [f{i}] f{i} = NonZero (a{i})
        [t{i}] t{i} = Transpose (f{i})"""
        for i in range(count)
    )
    outputs = ", ".join(f"int64[n{i}, 2] t{i}" for i in range(count))
    return model(f"g (float[2,3] x) => ({outputs}) {{ {body} }}")


def test_what_is_taken_has_no_refusals(workers: Counted, oracle: Oracle) -> None:
    graph = model("g (float[n,3] x) => (float[n,3] y) { [a] y = Relu (x) }")
    assert oracle.refusals(graph, RTX) == {}
    assert len(workers.asked) == 1


def test_all_nodes_are_refused_although_the_parser_names_one_at_a_time(
    workers: Counted, oracle: Oracle
) -> None:
    refused = oracle.refusals(many_non_zero(7), RTX)
    assert set(refused) == {f"f{i}" for i in range(7)}
    assert {r.by for r in refused.values()} == {"parser"}
    assert all("NonZero" in r.text for r in refused.values())
    # The whole, one node for all seven as they are alike, the rest.
    assert len(workers.asked) == 3


def test_nodes_of_one_op_are_judged_one_by_one(oracle: Oracle) -> None:
    # An axis that is not constant is refused; the other Squeeze is not.
    graph = model(
        """
        g (float[1,3,1] x, int64[1] axis) => (float[n,m] y, float[1,3] z) <int64[1] last = {2}> {
            [bad]  y = Squeeze (x, axis)
            [good] z = Squeeze (x, last)
        }"""
    )
    assert set(oracle.refusals(graph, RTX)) == {"bad"}


def test_unknown_ops_are_refused_in_the_parsers_words(oracle: Oracle) -> None:
    graph = parser.parse_model(
        HEAD
        + """
        g (float[2,3] x) => (float[2,3] y) <float[2,3] a> {
            [own]  a = com.example.Own (x)
            [relu] y = Relu (a)
        }"""
    )
    refused = oracle.refusals(graph, RTX)
    assert set(refused) == {"own"}
    assert "Plugin not found" in refused["own"].text


def test_what_reads_a_tensor_of_unknown_rank_is_not_asked_about(oracle: Oracle) -> None:
    graph = parser.parse_model(
        HEAD
        + """
        g (float[2,3] x) => (float[2,3] y) {
            [own]   a = com.example.Own (x)
            [other] y = NonZero (a)
        }"""
    )
    assert set(oracle.refusals(graph, RTX)) == {"own"}


def test_a_refused_node_in_a_body_counts_for_its_owner(oracle: Oracle) -> None:
    graph = model(
        """
        g (bool c, float[2,3] x) => (int64[2,n] y) {
            [choice] y = If (c) <
                then_branch = yes () => (int64[2,n] a) { [inner] a = NonZero (x) },
                else_branch = no () => (int64[2,m] b) { [other] b = NonZero (x) }>
        }"""
    )
    refused = oracle.refusals(graph, RTX)
    assert set(refused) == {"choice"}
    assert "NonZero" in refused["choice"].text


NMS = """
    g (float[1,8,4] boxes, float[1,2,8] scores) => (int64[n,3] y)
    <int64 most = {3}, float iou = {0.5}, float score = {0.1}> {
        [before] b = Relu (boxes)
        [nms] y = NonMaxSuppression (b, scores, most, iou, score)
    }"""

NMS_IN_IF = """
    g (bool c, float[1,8,4] boxes, float[1,2,8] scores) => (int64[n,3] y)
    <int64 most = {3}, float iou = {0.5}, float score = {0.1}> {
        [choice] y = If (c) <
            then_branch = yes () => (int64[n,3] a) {
                [one] a = NonMaxSuppression (boxes, scores, most, iou, score)
            },
            else_branch = no () => (int64[m,3] b) {
                [two] b = NonMaxSuppression (boxes, scores, most, iou)
            }>
    }"""


@pytest.mark.parametrize(("text", "node"), [(NMS, "nms"), (NMS_IN_IF, "choice")])
def test_what_only_the_builder_refuses_is_found_by_a_trial_build(
    oracle: Oracle, text: str, node: str
) -> None:
    graph = model(text)
    assert oracle.refusals(graph, RTX) == {}
    refused = oracle.refusals(graph, RTX, compute_capability="8.6", profiles=fixed)
    assert set(refused) == {node}
    assert refused[node].by == "builder"


NMS_OF_LABELLED = """
    g (bool c, float[1,8,4] boxes, float[1,2,8] scores, int64[k] labels) => (int64[n,3] y)
    <int64 most = {3}, float iou = {0.5}, float score = {0.1}> {
        [choice] y = If (c) <
            then_branch = yes () => (int64[n,3] a) {
                [largest] l = ReduceMax <keepdims = 0> (labels)
                [cast] f = Cast <to = 1> (l)
                [add] s = Add (scores, f)
                [one] a = NonMaxSuppression (boxes, s, most, iou, score)
            },
            else_branch = no () => (int64[m,3] b) {
                [two] b = NonMaxSuppression (boxes, scores, most, iou)
            }>
    }"""


def labelled(names: Sequence[str]) -> tuple[Profile, ...]:
    """Return the profiles of a model whose labels are 0 to 9."""
    return ({"labels": ((0,), (5,), (9,))},) if "labels" in names else ()


def test_integers_of_any_length_are_data_for_a_trial_and_a_few_may_be_sizes(
    workers: Counted, oracle: Oracle
) -> None:
    graph = model(NMS_OF_LABELLED)
    refused = oracle.refusals(graph, RTX, compute_capability="8.6", profiles=labelled)
    assert {name: why.by for name, why in refused.items()} == {"choice": "builder"}
    workers.asked.clear()
    graph = model(NMS_OF_LABELLED.replace("int64[k]", "int64[9]"))
    assert oracle.refusals(graph, RTX, compute_capability="8.6", profiles=fixed) == {}
    assert not any(job.build for job in workers.asked)


def test_another_profile_is_another_trial(workers: Counted, tmp_path: Path) -> None:
    text = NMS.replace("1,8,4", "1,k,4").replace("1,2,8", "1,2,k")

    def ask(most: int) -> int:
        def profiles(names: Sequence[str]) -> tuple[Profile, ...]:
            low, usual, high = 1, 2, most
            boxes = ((1, low, 4), (1, usual, 4), (1, high, 4))
            scores = ((1, 2, low), (1, 2, usual), (1, 2, high))
            return ({"boxes": boxes, "b": boxes, "scores": scores},)

        oracle = Oracle(workers, tmp_path)
        assert set(oracle.refusals(model(text), RTX, profiles=profiles)) == {"nms"}
        return oracle.counts.trials

    assert [ask(8), ask(8), ask(9)] == [1, 0, 1]


def test_without_a_bound_for_an_axis_no_trial_is_made(workers: Counted, oracle: Oracle) -> None:
    assert oracle.refusals(model(NMS), RTX, profiles=lambda names: None) == {}
    assert not any(job.build for job in workers.asked)


def test_what_is_off_anyway_is_not_asked_about(workers: Counted, oracle: Oracle) -> None:
    assert oracle.refusals(model(NMS), RTX, profiles=fixed, off={"nms"}) == {}
    assert not any(job.build for job in workers.asked)


def test_answers_are_kept_on_disk_whatever_the_names(workers: Counted, tmp_path: Path) -> None:
    first = Oracle(workers, tmp_path).refusals(model(NMS), RTX, profiles=fixed)
    workers.asked.clear()
    renamed = model(NMS.replace("nms", "other").replace("boxes", "z").replace("scores", "a"))
    second = Oracle(workers, tmp_path).refusals(renamed, RTX, profiles=fixed)
    assert first["nms"] == second["other"]
    assert not any(job.build for job in workers.asked)


LOOP = """
    g (float[2] a, float[3] b) => (float[2] y, float[3] z) <int64 three = {3}, bool yes = {1}> {
        [loop] y, z = Loop (three, yes, a, b) <
            body = b (int64 i, bool c, float[2] s, float[3] t) => (bool d, float[2] u, float[3] v) {
                [keep] d = Identity (c)
                [left] u = Abs (s)
                [right] v = Neg (t)
            }>
    }"""


def test_names_do_not_count_and_the_places_in_a_body_do() -> None:
    renamed = LOOP.replace("float[2] a", "float[2] z1").replace("yes, a", "yes, z1")
    crossed = LOOP.replace("Abs (s)", "Abs (t)").replace("Neg (t)", "Neg (s)")
    crossed = crossed.replace("[2]", "[3]")
    straight = LOOP.replace("[2]", "[3]")
    assert likeness(model(LOOP), "loop", ()) == likeness(model(renamed), "loop", ())
    assert likeness(model(straight), "loop", ()) != likeness(model(crossed), "loop", ())


def test_answers_differ_where_the_question_does(
    workers: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(**settings: object) -> int:
        workers.asked.clear()
        Oracle(workers, tmp_path).refusals(model(NMS), RTX, profiles=fixed, **settings)  # type: ignore[arg-type]
        return sum(job.build for job in workers.asked)

    assert ask(compute_capability="8.6") == 1
    assert ask(compute_capability="8.6") == 0
    assert ask(compute_capability="8.9") == 1
    assert ask(compute_capability="8.6", tf32=True) == 1
    monkeypatch.setattr(answer_cache, "FORMAT", answer_cache.FORMAT + 1)
    assert ask(compute_capability="8.6") == 1


# An Add before what is refused, so that the model holds something that is taken, too.
REFUSED = """
    g (float[n,1,3] x, int64[1] axis) => (float[n,3] y, int64[3,m] z) <float[3] w = {1, 2, 3}> {
        [add]  a = Add (x, w)
        [bad]  y = Squeeze (a, axis)
        [act]  b = LeakyRelu <alpha = 0.5> (a)
        [find] z = NonZero (b)
    }"""


# The same with a Squeeze that is taken.
SOME_TAKEN = (
    REFUSED.replace("z)", "z, float[n,3] q)")
    .replace("<float", "<int64[1] one = {1}, float")
    .replace("[bad]", "[good] q = Squeeze (x, one) [bad]")
)


def asked_about(oracle: Oracle, text: str, head: str = HEAD) -> tuple[set[str], int]:
    """Return what is refused of a model, and how many questions that took."""
    graph = onnx.shape_inference.infer_shapes(parser.parse_model(head + text), data_prop=True)
    before = oracle.counts.parses + oracle.counts.probes + oracle.counts.trials
    refused = oracle.refusals(graph, RTX)
    after = oracle.counts.parses + oracle.counts.probes + oracle.counts.trials
    return set(refused), after - before


def test_the_same_model_is_asked_about_once(workers: Counted, tmp_path: Path) -> None:
    first = Oracle(workers, tmp_path)
    names, questions = asked_about(first, REFUSED)
    assert names == {"bad", "find"}
    assert questions == len(workers.asked) > 0
    assert asked_about(first, REFUSED) == (names, 0)
    assert first.counts.remembered == 1
    second = Oracle(workers, tmp_path)
    assert asked_about(second, REFUSED) == (names, 0)
    assert second.counts.read == 1
    renamed = REFUSED.replace("bad", "other").replace("x", "a0").replace("axis", "b0")
    assert asked_about(second, renamed) == ({"other", "find"}, 0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("alpha = 0.5", "alpha = 0.25"),
        ("float", "float16"),
        ("float[n,1,3] x", "float[4,1,3] x"),
        ("{1, 2, 3}", "{1, 2, 4}"),
        ('opset_import: ["" : 17', 'opset_import: ["" : 18'),
    ],
)
def test_a_model_that_differs_is_asked_about_anew(
    workers: Counted, tmp_path: Path, old: str, new: str
) -> None:
    asked_about(Oracle(workers, tmp_path), REFUSED)
    workers.asked.clear()
    head, text = HEAD.replace(old, new), REFUSED.replace(old, new)
    assert head + text != HEAD + REFUSED
    names, questions = asked_about(Oracle(workers, tmp_path), text, head)
    assert names == {"bad", "find"}
    assert questions == len(workers.asked) > 0


def test_a_constant_that_is_computed_instead_is_asked_about_anew(
    workers: Counted, tmp_path: Path
) -> None:
    constant = REFUSED.replace(", int64[1] axis", "").replace("<", "<int64[1] axis = {1}, ", 1)
    assert asked_about(Oracle(workers, tmp_path), constant)[0] == {"find"}
    assert asked_about(Oracle(workers, tmp_path), REFUSED)[0] == {"bad", "find"}


class Newer(Counted):
    """Workers whose library says that it is another version."""

    def version(self, backend: str) -> str:
        return super().version(backend) + ".1"


def test_another_version_of_the_library_is_asked_anew(workers: Counted, tmp_path: Path) -> None:
    asked_about(Oracle(workers, tmp_path), REFUSED)
    with Newer() as newer:
        names, questions = asked_about(Oracle(newer, tmp_path), REFUSED)
    assert names == {"bad", "find"}
    assert questions == len(newer.asked) > 0


def test_what_was_refused_before_is_left_out_of_another_model(
    workers: Counted, tmp_path: Path
) -> None:
    Oracle(workers, tmp_path).refusals(many_non_zero(2), RTX)
    cold = Oracle(workers, tmp_path / "cold").refusals(many_non_zero(5), RTX)
    oracle = Oracle(workers, tmp_path)
    assert oracle.refusals(many_non_zero(5), RTX).keys() == cold.keys()
    assert (oracle.counts.parses, oracle.counts.probes) == (1, 0)


def test_no_rule_is_made_of_an_op_of_which_nodes_are_taken(
    workers: Counted, tmp_path: Path
) -> None:
    asked_about(Oracle(workers, tmp_path), SOME_TAKEN)
    workers.asked.clear()
    asked_about(Oracle(workers, tmp_path), REFUSED.replace("0.5", "0.25"))
    whole = next(job for job in workers.asked if len(job.nodes) > 1)
    assert "bad" in whole.nodes
    assert "find" not in whole.nodes


def test_a_rule_decides_nothing_where_what_is_around_may(workers: Counted, tmp_path: Path) -> None:
    asked_about(Oracle(workers, tmp_path), REFUSED)  # of the only Squeeze
    workers.asked.clear()
    names, _ = asked_about(Oracle(workers, tmp_path), REFUSED.replace("0.5", "0.25"))
    assert names == {"bad", "find"}
    # Whether an axis is taken depends on how it is computed, so the whole is asked.
    whole = next(job for job in workers.asked if len(job.nodes) > 1)
    assert "bad" in whole.nodes


class Crashing(Counted):
    """Workers whose library crashes whenever a node is asked about."""

    def probe(self, jobs: Sequence[ProbeJob]) -> list[ProbeResult]:
        results = super().probe(jobs)
        crash = BuildFailure("crash", "the library crashed with SIGSEGV", signal="SIGSEGV")
        return [ProbeResult(result.seconds, crash) for result in results]


def test_what_a_crash_left_unsaid_is_asked_again(workers: Counted, tmp_path: Path) -> None:
    with Crashing() as crashing:
        names, _ = asked_about(Oracle(crashing, tmp_path), REFUSED)
    assert names == {"add", "bad", "act", "find"}
    names, questions = asked_about(Oracle(workers, tmp_path), REFUSED)
    assert names == {"bad", "find"}
    assert questions > 0


@pytest.mark.parametrize("rubbish", ["", "{", "[]", "null", '{"by": 1, "never": 2}'])
def test_a_damaged_cache_is_asked_anew(workers: Counted, tmp_path: Path, rubbish: str) -> None:
    graph = many_non_zero(1)
    expected = Oracle(workers, tmp_path).refusals(model(NMS), RTX, profiles=fixed)
    [*files] = tmp_path.rglob("*.json")
    assert files
    for file in files:
        file.write_text(rubbish)
    assert Oracle(workers, tmp_path).refusals(model(NMS), RTX, profiles=fixed) == expected
    assert set(Oracle(workers, tmp_path).refusals(graph, RTX)) == {"f0"}


def test_a_cache_that_cannot_be_written_is_done_without(workers: Counted, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    assert set(Oracle(workers, blocked / "cache").refusals(many_non_zero(2), RTX)) == {"f0", "f1"}


def test_weights_outside_of_the_model_are_found(workers: Counted, tmp_path: Path) -> None:
    graph = model(
        """
        g (float[1,3,8,8] x) => (int64[4,n] y) <float[4,3,1,1] w = {1,2,3,4,5,6,7,8,9,10,11,12}> {
            [conv] c = Conv (x, w)
            [find] y = NonZero (c)
        }"""
    )
    path = tmp_path / "model.onnx"
    onnx.save(graph, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    placed = onnx.load(path, load_external_data=False)
    refused = Oracle(workers, tmp_path / "cache").refusals(placed, RTX, folder=tmp_path)
    assert set(refused) == {"find"}


def chain(length: int, at: int) -> onnx.ModelProto:
    """Return a chain of nodes with one in it that does not build."""
    nodes = [helper.make_node("Relu", ["boxes"], ["t0"], name="n0")]
    for i in range(1, length):
        if i == at:
            inputs = ["t0", "scores", "most", "iou", "score"]
            nodes.append(helper.make_node("NonMaxSuppression", inputs, [f"t{i}"], name=f"n{i}"))
        else:
            nodes.append(helper.make_node("Abs", [f"t{i - 1}"], [f"t{i}"], name=f"n{i}"))
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("boxes", onnx.TensorProto.FLOAT, [1, 8, 4]),
            helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, [1, 2, 8]),
        ],
        [helper.make_tensor_value_info(f"t{length - 1}", onnx.TensorProto.INT64, ["n", 3])],
        [
            numpy_helper.from_array(np.array(3, np.int64), "most"),
            numpy_helper.from_array(np.array(0.5, np.float32), "iou"),
            numpy_helper.from_array(np.array(0.1, np.float32), "score"),
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, ir_version=8, opset_imports=opsets)
    )


UNNAMED = BuildFailure("builder", "no engine, no reason")


@pytest.mark.parametrize("at", [1, 10, 19])
def test_bisection_finds_the_node_that_does_not_build(
    workers: Counted, oracle: Oracle, at: int
) -> None:
    suspects = oracle.bisect(chain(20, at), RTX, UNNAMED, compute_capability="8.6")
    assert suspects.nodes == (f"n{at}",)
    assert suspects.builds == len(workers.asked) <= 8
    assert suspects.seconds > 0
    if at < 19:  # else the whole model is the shortest that fails, and how it does is known
        assert "no runners" in suspects.failure.text


def test_a_search_is_made_once(workers: Counted, tmp_path: Path) -> None:
    first = Oracle(workers, tmp_path).bisect(chain(20, 10), RTX, UNNAMED, compute_capability="8.6")
    oracle = Oracle(workers, tmp_path)
    assert oracle.bisect(chain(20, 10), RTX, UNNAMED, compute_capability="8.6") == first
    assert oracle.counts.bisections == 0
    oracle.bisect(chain(20, 10), RTX, UNNAMED, compute_capability="8.9")
    assert oracle.counts.bisections == first.builds


def test_a_search_that_ran_out_of_time_is_made_again(workers: Counted, tmp_path: Path) -> None:
    hurried = Oracle(workers, tmp_path).bisect(chain(20, 10), RTX, UNNAMED, max_seconds=0.0)
    assert len(hurried.nodes) == 20
    assert Oracle(workers, tmp_path).bisect(chain(20, 10), RTX, UNNAMED).nodes == ("n10",)


def stage(folder: Path, value: float = 1.0, *, names: str = "") -> tuple[BuildJob, Fingerprint]:
    """Return a stage to build that TensorRT refuses to build for Turing only."""
    graph = parser.parse_model(
        HEAD
        + f"""
        g (float[4,4] x{names}) => (float[4,4] y{names}) <float w{names} = {{{value}}}> {{
            [add{names}] a{names} = Add (x{names}, w{names})
            [square_{names}1] y{names} = MatMul (a{names}, a{names})
        }}"""
    )
    folder.mkdir(exist_ok=True)
    onnx.save(graph, folder / "stage.onnx")
    job = BuildJob(
        folder / "stage.onnx",
        folder / "engine",
        RTX,
        compute_capability="7.5",
        nodes=tuple(node.name for node in graph.graph.node),
    )
    return job, Fingerprint(graph, weights=True)


def test_a_stage_that_does_not_build_is_not_built_again(workers: Counted, tmp_path: Path) -> None:
    first = Oracle(workers, tmp_path / "cache")
    job, fingerprint = stage(tmp_path)
    [result] = first.build([(job, fingerprint)])
    assert result.failure is not None
    assert result.failure.nodes == ("square_1",)
    told: list[BuildResult] = []
    second = Oracle(workers, tmp_path / "cache")
    [again] = second.build([(job, fingerprint)], on_done=lambda job, result: told.append(result))
    assert again.failure == result.failure
    assert told == [again]
    assert (first.counts.builds, second.counts.builds) == (1, 0)
    # With other names it is the same stage, and the failure names its nodes.
    [renamed] = second.build([stage(tmp_path / "renamed", names="_b")])
    assert second.counts.builds == 0
    assert renamed.failure is not None
    assert renamed.failure.nodes == ("square__b1",)
    assert "square__b1" in renamed.failure.text
    assert "square_1" not in renamed.failure.text
    second.build([stage(tmp_path / "other", 2.0)])
    assert second.counts.builds == 1
    for change in ({"compute_capability": "7.5", "tf32": True}, {"compute_capability": "8.6"}):
        second.build([(replace(job, **change), fingerprint)])  # type: ignore[arg-type]
    assert second.counts.builds == 3


def test_an_engine_that_is_wanted_is_built_each_time(workers: Counted, tmp_path: Path) -> None:
    job, fingerprint = stage(tmp_path)
    job = replace(job, compute_capability="8.6")
    oracle = Oracle(workers, tmp_path / "cache")
    for builds in (1, 2):
        [result] = Oracle(workers, tmp_path / "cache").build([(job, fingerprint)])
        assert result.failure is None
        assert job.engine.stat().st_size == result.engine_bytes > 0
        job.engine.unlink()
        [known] = oracle.build([(job, fingerprint)], keep=False)
        assert known.failure is None
        assert oracle.counts.builds == 0, builds
        assert not job.engine.exists()


class Killed(Counted):
    """Workers whose children the system kills."""

    def build(self, jobs: Sequence[BuildJob], *rest: object) -> list[BuildResult]:
        return [BuildResult(0.1, failure=BuildFailure("killed", "killed")) for _ in jobs]


def test_a_build_that_was_killed_is_tried_again(workers: Counted, tmp_path: Path) -> None:
    with Killed() as killed:
        Oracle(killed, tmp_path / "cache").build([stage(tmp_path)])
    oracle = Oracle(workers, tmp_path / "cache")
    [result] = oracle.build([stage(tmp_path)])
    assert result.failure is not None
    assert result.failure.reason == "builder"
    assert oracle.counts.builds == 1


def test_a_stage_whose_weights_nobody_can_tell_apart_is_built_each_time(
    workers: Counted, tmp_path: Path
) -> None:
    job, _ = stage(tmp_path)
    graph = onnx.load(job.model)
    [weight] = graph.graph.initializer
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight), weight.name))
    onnx.save(graph, job.model, save_as_external_data=True, location="w.bin", size_threshold=0)
    placed = Fingerprint(onnx.load(job.model, load_external_data=False), weights=True)
    for _ in range(2):
        oracle = Oracle(workers, tmp_path / "cache")
        oracle.build([(job, placed)])
        assert oracle.counts.builds == 1


NMS_IN_LOOPS = """
    g (float[2] x, float[1,8,4] boxes, float[1,2,8] scores) => (float[2] y)
    <int64 most = {3}, float iou = {0.5}, float score = {0.1}, int64 three = {3}, bool yes = {1}> {
        [outer] y = Loop (three, yes, x) <
            body = b (int64 i, bool c, float[2] s) => (bool d, float[2] u) {
                [keep] d = Identity (c)
                [inner] u = Loop (three, yes, s) <
                    body = bb (int64 ii, bool cc, float[2] ss) => (bool dd, float[2] uu) {
                        [keep_1] dd = Identity (cc)
                        [nms_2] k = NonMaxSuppression (boxes, scores, most, iou, score)
                        [largest] l = ReduceMax <keepdims = 0> (k)
                        [cast] f = Cast <to = 1> (l)
                        [add] uu = Add (ss, f)
                    }>
            }>
    }"""


def test_a_node_in_the_body_of_a_body_leads_back_to_the_node_around(
    workers: Counted, oracle: Oracle
) -> None:
    graph = model(NMS_IN_LOOPS)
    refused = oracle.refusals(graph, RTX, compute_capability="8.6", profiles=fixed)
    assert {name: why.by for name, why in refused.items()} == {"outer": "builder"}
    job = next(job for job in workers.asked if job.build)
    assert job.nodes[:5] == ("outer", "keep", "inner", "keep_1", "nms_2")
    [result] = workers.probe([job])
    assert result.failure is not None
    assert result.failure.nodes == ("nms_2",)  # which the builder calls by a name of its own
    assert "nms_2_" in result.failure.text
    [verdict] = oracle.verdicts([graph], RTX, profiles=[()], compute_capability="8.6")
    assert verdict.ops == {"Loop"}


ALIKE_INSIDE = """
    g (float[2] x, float[1,8,4] boxes, float[1,2,8] scores) => (float[2] y, float[2] z)
    <int64 most = {3}, float iou = {0.5}, float score = {0.1}, int64 three = {3}, bool yes = {1}> {
        [one] y = Loop (three, yes, x) <
            body = b1 (int64 i, bool c, float[2] s) => (bool d, float[2] u) {
                [keep] d = Identity (c)
                [nms] k = NonMaxSuppression (boxes, scores, most, iou, score)
                [largest] l = ReduceMax <keepdims = 0> (k)
                [cast] f = Cast <to = 1> (l)
                [add] u = Add (s, f)
            }>
        [two] z = Loop (three, yes, y) <
            body = b2 (int64 i, bool c, float[2] s) => (bool d, float[2] u) {
                [keep] d = Identity (c)
                [nms] k = local.Kept (boxes, scores)
                [largest] l = ReduceMax <keepdims = 0> (k)
                [cast] f = Cast <to = 1> (l)
                [add] u = Sub (s, f)
            }>
    }
    <domain: "local", opset_import: ["" : 17]>
    Kept (boxes, scores) => (kept) {
        most = Constant <value = int64 {3}> ()
        [nms] kept = NonMaxSuppression (boxes, scores, most)
    }"""


def test_bodies_and_functions_may_name_their_nodes_alike(workers: Counted, oracle: Oracle) -> None:
    head = HEAD.replace("com.example", "local")
    graph = import_model(parser.parse_model(head + ALIKE_INSIDE))
    annotate(graph, infer(graph, opset=graph.opset, ranges={}))
    refused = oracle.refusals(export_model(graph), RTX, compute_capability="8.6", profiles=fixed)
    assert {name: why.by for name, why in refused.items()} == {"one": "builder", "two": "builder"}
    trials = [job for job in workers.asked if job.build]
    named = [result.failure.nodes for result in workers.probe(trials) if result.failure]
    inner = [
        tuple(node.name for node in bodies_of(loop)[0].nodes if node.op == "NonMaxSuppression")
        for loop in graph.nodes
    ]
    assert named == inner
    assert len(set(inner)) == 2


def test_bisection_that_runs_out_of_builds_names_the_range(oracle: Oracle) -> None:
    suspects = oracle.bisect(chain(20, 10), RTX, UNNAMED, max_builds=2)
    assert suspects.builds == 2
    assert "n10" in suspects.nodes
    assert 1 < len(suspects.nodes) < 20


NARROWED = """
    g (float[1,9,4] boxes, float[1,1,9] scores) => (int64[m] y)
    <int64[1] most = {{9}}, int64[1] last = {{2}}, int64[1] one = {{1}}, int64[1] zero = {{0}},
     int64[1] five = {{5}}>
    {{
        [nms] rows = NonMaxSuppression (boxes, scores, most)
        [box] column = Gather <axis = 1> (rows, last)
        [flat] indices = Squeeze (column, one)
        [cut] few = Slice (indices, zero, five)
        [other] {tail}
    }}"""


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("y = Neg (few)", ["nms", "box", "flat", "cut"]),
        ("y = Sub (few, indices)", ["nms", "box", "flat"]),  # all of the indices are read too
    ],
)
def test_a_node_alone_has_behind_it_what_narrows_its_result(
    tail: str, expected: list[str], oracle: Oracle
) -> None:
    part = oracle.alone(model(NARROWED.format(tail=tail)), ["nms"])["nms"]
    assert [node.name for node in part.graph.node] == expected
