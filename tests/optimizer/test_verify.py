from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import networkx as nx
import numpy as np
import onnx
import pytest
from command import cli
from model_package import manifest_of, model_of, stage_of
from onnx import numpy_helper

from optc.optimizer.arrays import write_arrays
from optc.optimizer.compare import Difference
from optc.optimizer.first_difference import Looked, first_of
from optc.optimizer.package import sha256_of, writing
from optc.optimizer.runtime import Package, load
from optc.optimizer.verify import Unwritten, Verification, precision_of, quick_check, verify
from optc.specs.compile_spec import Range, Verify
from optc.specs.diagnostic import InputError
from optc.specs.manifest import ModelRecord, PassRecord, Target

BATCH: Mapping[str, Range] = {"N": Range(min=1, opt=2, max=4)}
TIGHT = Verify(atol=1e-6, rtol=1e-6)

MLP = """g (float[N,4] x) => (float[N,2] y)
<float[4,3] w = {0.11,0.21,0.33,-0.41,0.52,0.63,0.71,-0.82,0.93,0.14,0.25,0.36},
 float[3,2] v = {0.17,-0.29,0.31,0.43,-0.57,0.61}, float[3] b = {0.013,0.027,0.031}>
{
    [first] h = MatMul (x, w)
    [bias] a = Add (h, b)
    [act] r = Tanh (a)
    [last] y = MatMul (r, v)
}"""


def saved(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "original.onnx"
    onnx.save(model_of(text), path)
    return path


def package_of(
    folder: Path,
    whole: str,
    *stages: str,
    profiles: tuple[Mapping[str, Range], ...] = (BATCH,),
    **changes: object,
) -> Package:
    """Write a package whose ``model.onnx`` is ``whole`` and which runs ``stages``."""
    with writing(folder) as writer:
        writer.write("model.onnx", model_of(whole).SerializeToString())
        parts = [stage_of(writer, i, text) for i, text in enumerate(stages or (whole,))]
        writer.commit(manifest_of(whole, parts, profiles).model_copy(update=changes))
    return load(folder)


def held(
    tmp_path: Path, original: str, package: str | None = None, **options: object
) -> Verification:
    """Verify a package of ``package`` (the original where it is not given) against ``original``."""
    made = package_of(tmp_path / "package", package or original)
    return verify(made, saved(tmp_path / "model", original), **options)  # type: ignore[arg-type]


def codes(result: Verification) -> list[str]:
    return [diagnostic.code for diagnostic in result.diagnostics]


# --- what holds ----------------------------------------------------------------------------------


def test_a_faithful_package_is_met_at_min_opt_and_max(tmp_path: Path) -> None:
    result = held(tmp_path, MLP)
    assert {finding.case for finding in result.findings} == {"min", "opt", "max"}
    assert {finding.verdict for finding in result.findings} == {"met"}
    assert result.exit_code == 0
    assert result.diagnostics == []


def test_every_profile_is_tried_and_equal_shapes_once(tmp_path: Path) -> None:
    profiles = ({"N": Range(min=1, opt=1, max=3)}, {"N": Range(min=3, opt=3, max=3)})
    package = package_of(tmp_path / "package", MLP, profiles=profiles)
    result = verify(package, saved(tmp_path, MLP))
    assert [f.case for f in result.findings] == ["profile 1, opt", "profile 1, max"]


def test_it_says_that_no_engine_was_run(tmp_path: Path) -> None:
    with writing(tmp_path / "package") as writer:
        writer.write("model.onnx", model_of(MLP).SerializeToString())
        stage = stage_of(writer, 0, MLP, runtime="tensorrt")
        manifest = manifest_of(MLP, [stage], (BATCH,))
        package = Unwritten(writer.folder, manifest)
        result = verify(package, saved(tmp_path, MLP), device="cpu")
    text = result.render()
    assert "stage 0 as ONNX on ONNX Runtime, NOT as engines (the CPU was asked for)" in text
    assert "3 of 3 outputs within 0.0001 of the scale, the default of fp32" in text
    assert result.as_json()["engines_not_run"] == [0]


def test_a_fallback_stage_is_not_called_a_missing_engine(tmp_path: Path) -> None:
    result = held(tmp_path, MLP, device="cpu")
    assert "stage 0 on ONNX Runtime, as fallback" in result.render()
    assert result.as_json()["engines_not_run"] == []


def test_targets_of_the_same_stages_are_run_once(tmp_path: Path) -> None:
    targets = tuple(
        Target(name=name, backend="tensorrt-rtx", stages=(0,)) for name in ("ampere", "ada")
    )
    package = package_of(tmp_path / "package", MLP, targets=targets)
    result = verify(package, saved(tmp_path, MLP))
    assert {finding.targets for finding in result.findings} == {("ampere", "ada")}
    assert len(result.findings) == 3


def test_a_package_that_is_not_in_place_yet_can_be_verified(tmp_path: Path) -> None:
    with writing(tmp_path / "package") as writer:
        writer.write("model.onnx", model_of(MLP).SerializeToString())
        manifest = manifest_of(MLP, [stage_of(writer, 0, MLP)], (BATCH,))
        result = verify(Unwritten(writer.folder, manifest), saved(tmp_path / "model", MLP))
    assert result.exit_code == 0
    assert len(result.findings) == 3


# --- what does not -------------------------------------------------------------------------------


def test_a_changed_weight_is_caught_and_the_first_tensor_named(tmp_path: Path) -> None:
    result = held(tmp_path, MLP, MLP.replace("0.013,", "0.023,"))
    assert result.exit_code == 3
    assert [d.code for d in result.unmet] == ["verify-not-met"]
    assert result.first is not None
    assert (result.first.tensor, result.first.op, result.first.node) == ("a", "Add", "bias")
    assert result.first.stage is None
    problem = result.unmet[0].problem
    assert "output `y`" in problem
    assert "the first tensor inside that differs is `a`, made by Add `bias`" in problem
    worst = result.worst_first()[0].difference
    assert worst is not None
    assert f"at {list(worst.worst or ())} it is {worst.found}, not {worst.expected}" in problem


def test_the_pass_that_rewrote_the_first_tensor_is_named(tmp_path: Path) -> None:
    record = PassRecord(name="fold-add", fired={"bias": ("bias", "other")})
    broken = package_of(tmp_path / "p", MLP.replace("0.013,", "0.023,"), passes=(record,))
    result = verify(broken, saved(tmp_path, MLP))
    assert "passes: {disable: [fold-add]}" in str(result.unmet[0].todo)


def test_a_stage_that_differs_from_the_whole_is_named(tmp_path: Path) -> None:
    """The whole optimised model is right, so it is not a pass but the second stage."""
    head = """g (float[N,4] x) => (float[N,3] h)
    <float[4,3] w = {0.11,0.21,0.33,-0.41,0.52,0.63,0.71,-0.82,0.93,0.14,0.25,0.36}>
    { [first] h = MatMul (x, w) }"""
    tail = """g (float[N,3] h) => (float[N,2] y)
    <float[3,2] v = {0.17,-0.29,0.31,0.43,-0.57,0.99}, float[3] b = {0.013,0.027,0.031}>
    { [bias] a = Add (h, b) [act] r = Tanh (a) [last] y = MatMul (r, v) }"""
    package = package_of(tmp_path / "package", MLP, head, tail)
    result = verify(package, saved(tmp_path, MLP))
    assert result.first is not None
    assert (result.first.tensor, result.first.stage) == ("y", 1)
    assert "in stage 1 (`model.onnx` as a whole is right)" in result.unmet[0].problem


def test_a_difference_in_a_branch_is_not_hidden_by_a_sound_neighbour() -> None:
    """Tensors of one branch stand before those of the other; only the join shows both."""
    flow = nx.DiGraph()
    left = [f"l{i}" for i in range(40)]
    right = [f"r{i}" for i in range(400)]
    for chain in (left, right):
        flow.add_edges_from(pairwise(chain))
    flow.add_edges_from([(left[-1], "join"), (right[-1], "join")])
    bad = {*left[23:], "join"}
    asked: list[int] = []

    def look(names: Sequence[str]) -> Looked:
        asked.append(len(names))
        off = {name: Difference((), (), 1, 1) for name in names if name in bad}
        return Looked(off, set(names) - bad)

    found = first_of([*left, *right, "join"], flow, look)
    assert found is not None
    assert found[0] == "l23"
    assert max(asked) <= 16
    assert len(asked) <= 6


def test_a_maximum_that_hides_the_difference_does_not_mislead_the_search() -> None:
    """`m` agrees though all before it is off; the search comes back to what stands before `y`."""
    flow = nx.DiGraph()
    chain = [f"t{i}" for i in range(100)]
    flow.add_edges_from(pairwise(chain))
    flow.add_edges_from([("t99", "m"), ("t99", "y"), ("m", "y")])
    bad = {*chain[40:], "y"}

    asked = 0

    def look(names: Sequence[str]) -> Looked:
        nonlocal asked
        asked += 1
        off = {name: Difference((), (), 1, 1) for name in names if name in bad}
        return Looked(off, set(names) - bad)

    found = first_of([*chain, "m", "y"], flow, look)
    assert found is not None
    assert found[0] == "t40"
    assert asked <= 6


def test_a_missing_output_is_a_failure(tmp_path: Path) -> None:
    both = "g (float[N] x) => (float[N] y, float[N] z) { y = Neg (x) z = Abs (x) }"
    one = "g (float[N] x) => (float[N] y) { y = Neg (x) }"
    result = held(tmp_path, both, one)
    assert codes(result) == ["verify-output-missing"]
    assert result.exit_code == 3


def test_a_missing_input_is_a_failure(tmp_path: Path) -> None:
    two = "g (float[N] x, float[N] z) => (float[N] y) { y = Neg (x) }"
    one = "g (float[N] x) => (float[N] y) { y = Neg (x) }"
    result = held(tmp_path, two, one)
    assert "verify-input-missing" in codes(result)
    assert result.exit_code == 3


def test_another_dtype_is_a_failure(tmp_path: Path) -> None:
    result = held(
        tmp_path,
        "g (float[N] x) => (int64[N] y) { y = Cast <to = 7> (x) }",
        "g (float[N] x) => (int32[N] y) { y = Cast <to = 6> (x) }",
    )
    assert codes(result) == ["verify-not-met"]
    assert "it is int32, the original gives int64" in result.unmet[0].problem


def test_another_shape_is_a_failure(tmp_path: Path) -> None:
    result = held(
        tmp_path,
        "g (float[N,4] x) => (float[N,4] y) { y = Neg (x) }",
        "g (float[N,4] x) => (float[M,4] y) { c = Concat <axis = 0> (x, x) y = Neg (c) }",
    )
    assert result.exit_code == 3
    assert "its shape is [4, 4], the original gives [2, 4]" in result.unmet[0].problem


def test_integers_must_be_equal(tmp_path: Path) -> None:
    result = held(
        tmp_path,
        "g (int64[N] x) => (int64[N] y) <int64 one = {1}> { y = Add (x, one) }",
        "g (int64[N] x) => (int64[N] y) <int64 one = {2}> { y = Add (x, one) }",
    )
    assert codes(result) == ["verify-not-met"]


def test_nan_at_the_same_place_is_equal_and_elsewhere_is_not(tmp_path: Path) -> None:
    root = "g (float[N,4] x) => (float[N,4] y) <float[4] c = {%s}> { s = Add (x, c) y = Sqrt (s) }"
    same = held(tmp_path / "a", root % "-7.5,3,3,3")
    assert {f.verdict for f in same.findings} == {"met"}
    other = held(tmp_path / "b", root % "-7.5,3,3,3", root % "3,-7.5,3,3")
    assert codes(other) == ["verify-not-met"]


def test_a_package_that_does_not_run_is_a_failure(tmp_path: Path) -> None:
    original = "g (float[N,4] x) => (float[N,4] y) { y = Neg (x) }"
    broken = """g (float[N,4] x) => (float[M,K] y) <int64[2] s = {3,3}>
    { [r] z = Reshape (x, s) y = Neg (z) }"""
    result = held(tmp_path, original, broken)
    assert codes(result) == ["package-does-not-run"] * 3
    assert result.exit_code == 3
    assert "Reshape" in result.unmet[0].problem


# --- noise ---------------------------------------------------------------------------------------


def noisy_text() -> str:
    """A model of dynamically quantised products: a rounding that flips moves the result a lot."""
    rng = np.random.default_rng(3)
    weights = ",".join(str(v) for v in rng.integers(-127, 127, 64 * 64))
    return f"""g (float[N,64] x) => (float[N,64] y)
    <int8[64,64] w = {{{weights}}}, int8 zero = {{0}}, float scale = {{0.00337}},
     float k = {{SCALE}}>
    {{
        s = Mul (x, k)
        q, qs, qz = DynamicQuantizeLinear (s)
        m = MatMulInteger (q, w, qz, zero)
        f = Cast <to = 1> (m)
        ws = Mul (qs, scale)
        p = Mul (f, ws)
        t = Tanh (p)
        q2, qs2, qz2 = DynamicQuantizeLinear (t)
        m2 = MatMulInteger (q2, w, qz2, zero)
        f2 = Cast <to = 1> (m2)
        ws2 = Mul (qs2, scale)
        y = Mul (f2, ws2)
    }}"""


def test_a_difference_within_the_noise_of_the_original_is_no_failure(tmp_path: Path) -> None:
    text = noisy_text()
    original, package = text.replace("SCALE", "0.9173"), text.replace("SCALE", "0.9173001")
    many = {"N": Range(min=1024, opt=1024, max=1024)}
    made = package_of(tmp_path / "package", package, profiles=(many,))
    result = verify(made, saved(tmp_path, original), asked=TIGHT)
    assert {finding.verdict for finding in result.findings} == {"within noise"}
    assert result.exit_code == 0, result.unmet
    assert "within 4 times the noise of the original" in result.render()


def test_a_difference_beyond_a_large_noise_is_still_caught(tmp_path: Path) -> None:
    text = noisy_text()
    original, package = text.replace("SCALE", "0.9173"), text.replace("SCALE", "0.93")
    result = held(tmp_path, original, package, asked=TIGHT)
    assert result.exit_code == 3
    assert result.first is not None
    assert result.first.tensor == "s"


def test_a_small_difference_everywhere_is_not_hidden_by_a_large_one_of_the_noise_somewhere(
    tmp_path: Path,
) -> None:
    """One rounding that flips makes a large floor; the mean tells it from a weight that is off."""
    text = noisy_text()
    original, package = text.replace("SCALE", "0.9173"), text.replace("SCALE", "0.9174")
    many = {"N": Range(min=1024, opt=1024, max=1024)}
    made = package_of(tmp_path / "package", package, profiles=(many,))
    result = verify(made, saved(tmp_path, original), asked=TIGHT)
    (finding,) = result.findings
    assert finding.difference is not None
    assert finding.floor is not None
    assert finding.difference.max_abs < 4 * finding.floor.max_abs
    assert finding.verdict == "not met"


def test_noise_is_not_measured_where_all_is_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optc.optimizer import noise

    monkeypatch.setattr(noise.Noise, "samples", lambda *args: pytest.fail("measured"))
    assert held(tmp_path, MLP).exit_code == 0


DETECTOR = """g (float[N,6] scores, float[6,4] boxes) => (float[K,4] best, float[K] top, int64[K] which)
<int64[1] k = {4}, int64[1] first = {0}, int64 zero = {0}, float bias = {BIAS}>
{
    s = Add (scores, bias)
    row = Gather <axis = 0> (s, zero)
    [top] top, which = TopK (row, k)
    [pick] best = Gather <axis = 0> (boxes, which)
}"""


def test_rows_that_the_original_swaps_too_are_noise(tmp_path: Path) -> None:
    """Two scores that differ by one unit in the last place: which is first, rounding decides."""
    original, package = DETECTOR.replace("BIAS", "0.3"), DETECTOR.replace("BIAS", "0.30000001")
    scores = np.array([[0.1, 0.7, 0.7, 0.2, 0.3, 0.9]], np.float32)
    scores[0, 2] = np.nextafter(scores[0, 1], np.float32(1))
    boxes = np.arange(24, dtype=np.float32).reshape(6, 4)
    write_arrays(tmp_path / "in.npz", {"scores": scores, "boxes": boxes})
    # The package prefers the other one of the two.
    swapped = package.replace(
        "<int64[1] k = {4}", "<float[6] tilt = {0,0,0.0000002,0,0,0}, int64[1] k = {4}"
    ).replace("s = Add (scores, bias)", "u = Add (scores, bias) s = Add (u, tilt)")
    made = package_of(tmp_path / "package", swapped)
    result = verify(made, saved(tmp_path, original), data=[tmp_path / "in.npz"])
    mine = {f.output: f for f in result.findings if f.case.endswith("in.npz")}
    assert mine["best"].verdict == "within noise", result.unmet
    assert mine["which"].verdict == "within noise"
    assert mine["top"].verdict == "met"
    assert "2 rows in another place (1 to 2, 2 to 1)" in str(mine["best"].rows)


def test_rows_that_the_original_never_swaps_are_a_failure(tmp_path: Path) -> None:
    scores = np.array([[0.1, 0.7, 0.71, 0.2, 0.3, 0.9]], np.float32)
    boxes = np.arange(24, dtype=np.float32).reshape(6, 4)
    write_arrays(tmp_path / "in.npz", {"scores": scores, "boxes": boxes})
    original = DETECTOR.replace("BIAS", "0.3")
    tilted = original.replace(
        "<int64[1] k = {4}", "<float[6] tilt = {0,0.02,0,0,0,0}, int64[1] k = {4}"
    ).replace("s = Add (scores, bias)", "u = Add (scores, bias) s = Add (u, tilt)")
    made = package_of(tmp_path / "package", tilted)
    result = verify(made, saved(tmp_path, original), data=[tmp_path / "in.npz"])
    mine = {f.output: f for f in result.findings if f.case.endswith("in.npz")}
    assert mine["best"].verdict == "not met"
    assert "2 rows in another place" in str(mine["best"].rows)
    assert result.first is not None
    assert result.first.tensor == "s"


# --- lower precision, and what is asked of outputs -------------------------------------------------


def lowered(tmp_path: Path, precision: str, package: str = MLP, **options: object) -> Verification:
    """Verify ``package``, said to be of ``precision``, against `MLP`."""
    made = package_of(tmp_path / "package", package, precision={"default": precision})
    return verify(made, saved(tmp_path / "model", MLP), **options)  # type: ignore[arg-type]


OFF = MLP.replace("0.013,", "0.014,")  # by 1.2e-3 of the scale
FAR_OFF = MLP.replace("0.013,", "0.023,")


def test_what_fp32_does_not_allow_fp16_does(tmp_path: Path) -> None:
    assert lowered(tmp_path / "32", "fp32", OFF).exit_code == 3
    result = lowered(tmp_path / "16", "fp16", OFF)
    assert result.exit_code == 0
    assert {finding.verdict for finding in result.findings} == {"met"}
    text = result.render()
    assert "3 of 3 outputs within 0.005 of the scale, the default of fp16" in text
    assert "of the scale, allowed 0.005" in text
    assert lowered(tmp_path / "far", "fp16", FAR_OFF).exit_code == 3


def test_the_noise_of_the_original_is_not_measured_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optc.optimizer import noise

    monkeypatch.setattr(noise.Noise, "samples", lambda *args: pytest.fail("measured"))
    assert lowered(tmp_path / "a", "fp16", OFF).exit_code == 0
    asked = Verify(sqnr_db=300.0)
    assert lowered(tmp_path / "b", "int8", OFF, asked=asked).exit_code == 3, (
        "the noise of single elements says nothing of a measure of the whole"
    )


def test_a_measure_that_is_not_met_is_named_with_its_limit(tmp_path: Path) -> None:
    result = lowered(tmp_path, "int8", OFF, asked=Verify(cosine=0.999999999, sqnr_db=20.0))
    assert codes(result) == ["verify-not-met"]
    assert re.search(r"cosine 1 - \d\.\de-08, asked 1 - 1\.0e-09", result.unmet[0].problem)
    assert "SQNR" not in result.unmet[0].problem
    assert "lower `verify.cosine`" in str(result.unmet[0].todo)
    assert "precision: {keep_fp32: [...]}" in str(result.unmet[0].todo)


def test_the_first_difference_of_a_lowered_stage_is_looked_for(tmp_path: Path) -> None:
    """The whole is in fp32 and right; the stage is what was lowered too far."""
    with writing(tmp_path / "package") as writer:
        writer.write("model.onnx", model_of(MLP).SerializeToString())
        manifest = manifest_of(MLP, [stage_of(writer, 0, FAR_OFF)], (BATCH,))
        writer.commit(manifest.model_copy(update={"precision": {"default": "fp16"}}))
    result = verify(load(tmp_path / "package"), saved(tmp_path, MLP))
    assert result.first is not None
    assert (result.first.tensor, result.first.stage) == ("y", 0)


@pytest.mark.parametrize(
    ("precision", "lowest"),
    [("fp16", "fp16"), ({"default": "bf16", "keep_fp32": []}, "bf16"), ({}, "fp32"), ("?", "fp32")],
)
def test_the_precision_of_a_package_is_read_from_old_and_new_manifests(
    tmp_path: Path, precision: object, lowest: str
) -> None:
    package = package_of(tmp_path, MLP, precision=precision)
    assert precision_of(package.manifest) == lowest


def test_the_quick_check_of_a_lowered_package_asks_what_its_precision_allows(
    tmp_path: Path,
) -> None:
    package = package_of(tmp_path / "a", OFF, precision="fp16")
    assert quick_check(package, saved(tmp_path, MLP)).diagnostics == []
    package = package_of(tmp_path / "b", FAR_OFF, precision="fp16")
    assert codes(quick_check(package, saved(tmp_path, MLP))) == ["verify-not-met"]


# --- groups --------------------------------------------------------------------------------------


def groups_of(tmp_path: Path) -> dict[str, list[Path]]:
    """Return a group of easy inputs and one of hard ones, whose `y` is near zero."""
    rng = np.random.default_rng(0)
    for name, scale in (("easy-0", 9.0), ("easy-1", 9.0), ("hard", 1e-3)):
        x = (scale * rng.standard_normal((2, 4))).astype(np.float32)
        write_arrays(tmp_path / f"{name}.npz", {"x": x})
    return {"easy": sorted(tmp_path.glob("easy*")), "hard": [tmp_path / "hard.npz"]}


def test_each_group_has_its_own_figures_the_hard_one_first(tmp_path: Path) -> None:
    result = lowered(tmp_path, "fp16", OFF, groups=groups_of(tmp_path))
    figures = {each.group: each for each in result.groups()}
    assert list(figures) == ["hard", None, "easy"]
    assert [figures[name].cases for name in ("hard", None, "easy")] == [1, 3, 2]
    (easy,) = figures["easy"].measures
    mine = [judgement for group, _, judgement in result.judged if group == "easy"]
    assert (easy.metric, easy.limit) == ("of_scale", 5e-3)
    assert easy.worst == max(judgement.value for judgement in mine)
    assert easy.mean == np.mean([judgement.value for judgement in mine])
    assert figures["hard"].measures[0].worst > 5e-3 > figures["easy"].measures[0].worst
    assert result.exit_code == 3
    (problem,) = result.unmet
    assert problem.problem.startswith("group `hard`, output `y`, case ")
    lines = result.render().splitlines()
    rows = [line.split()[0] for line in lines if "largest error of the scale" in line]
    assert rows == ["hard", "(no", "easy"]


def test_a_group_may_have_its_own_tolerance(tmp_path: Path) -> None:
    groups = groups_of(tmp_path)
    group = {"data": "hard.npz", "of_scale": 0.5}
    asked = Verify.model_validate({"groups": {"hard": group}})
    assert lowered(tmp_path / "a", "fp16", OFF, groups=groups, asked=asked).exit_code == 0
    strict = Verify.model_validate({"groups": {"easy": {"data": "easy*", "of_scale": 1e-9}}})
    result = lowered(tmp_path / "b", "bf16", OFF, groups=groups, asked=strict)
    bad = {finding.group for finding in result.findings if finding.verdict == "not met"}
    assert "easy" in bad
    assert None not in bad
    assert result.exit_code == 3


def test_groups_and_measures_are_there_for_programs(tmp_path: Path) -> None:
    result = lowered(tmp_path, "fp16", OFF, groups=groups_of(tmp_path))
    document = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert document["precision"] == "fp16"
    assert (document["atol"], document["rtol"]) == (None, None)
    assert [group["group"] for group in document["groups"]] == ["hard", None, "easy"]
    assert document["groups"][0]["not_met"] == 1
    worst = document["findings"][0]
    assert worst["group"] == "hard"
    assert worst["judgements"][0]["metric"] == "of_scale"
    assert worst["judgements"][0]["limit"] == 5e-3
    assert document["groups"][0]["measures"][0]["worst"] == worst["judgements"][0]["value"]


# --- boxes ---------------------------------------------------------------------------------------

DETECT = """g (float[N,4] boxes, float[N] scores, int64[N] labels)
=> (float[K,4] best, float[K] top, int64[K] classes)
<int64[1] k = {12}, float[1] bias = {BIAS}>
{
    s = Add (scores, bias)
    top, which = TopK (s, k)
    best = Gather <axis = 0> (boxes, which)
    classes = Gather <axis = 0> (labels, which)
}"""
TILT = (
    "<int64[1] k = {12}",
    "<float[16] tilt = {0,0,0,-0.06,0,0,0,0,0,0,0,0,0,0,0,0}, int64[1] k = {12}",
)


def sixteen_boxes(folder: Path) -> Path:
    """Write input with two scores that are 0.05 apart, of boxes that are clear of each other."""
    corner = np.arange(16, dtype=np.float32)[:, None] * 30
    scores = np.linspace(0.95, 0.05, 16, dtype=np.float32)
    scores[4] = scores[3] - np.float32(0.05)
    feeds = {
        "boxes": np.concatenate([corner, corner, corner + 20, corner + 25], axis=1),
        "scores": scores,
        "labels": np.random.default_rng(0).integers(0, 5, 16),
    }
    write_arrays(folder / "in.npz", feeds)
    return folder / "in.npz"


def detector(tmp_path: Path, precision: str) -> Verification:
    """Verify a detector that swaps two rows, and shifts all scores by less than 1e-3."""
    original = DETECT.replace("BIAS", "0")
    package = DETECT.replace("BIAS", "0.0009").replace(*TILT)
    package = package.replace("s = Add (scores, bias)", "u = Add (scores, bias) s = Add (u, tilt)")
    rows = {"N": Range.fixed(16)}
    made = package_of(tmp_path / "p", package, profiles=(rows,), precision=precision)
    return verify(made, saved(tmp_path, original), data=[sixteen_boxes(tmp_path)])


def test_boxes_are_reported_by_band_low_scores_first(tmp_path: Path) -> None:
    result = detector(tmp_path, "fp16")
    mine = [finding for finding in result.findings if finding.case.endswith("in.npz")]
    assert {finding.verdict for finding in mine} == {"met"}, result.unmet
    assert {finding.output for finding in mine} == {"best", "top", "classes"}
    metrics = [judgement.metric for judgement in mine[0].judgements]
    assert "boxes_high" in metrics
    text = result.render()
    table = [line for line in text.splitlines() if "best, top, classes" in line]
    assert re.search(r"boxes 0\.2 to 0\.5 matched +0\.9 +1 +1 +4 of 4 +1$", table[0])
    assert re.search(r"boxes above 0\.5 matched +0\.98 +1 +1 +8 of 8 +1$", table[1])
    assert "or matched as boxes" in text
    assert "with `best`" in text


def test_the_same_boxes_of_fp32_are_held_row_by_row(tmp_path: Path) -> None:
    result = detector(tmp_path, "fp32")
    mine = {f.output: f for f in result.findings if f.case.endswith("in.npz")}
    assert mine["best"].verdict == "not met"


def test_boxes_that_are_missed_are_one_problem(tmp_path: Path) -> None:
    named = {"boxes": "best", "scores": "top", "labels": "classes", "high": 1.0}
    asked = Verify.model_validate({"detections": [named]})
    original = DETECT.replace("BIAS", "0")
    wrong = original.replace(
        "best = Gather <axis = 0> (boxes, which)",
        "far = Add (boxes, off) best = Gather <axis = 0> (far, which)",
    ).replace("<int64[1] k", "<float off = {500}, int64[1] k")
    made = package_of(
        tmp_path / "p", wrong, profiles=({"N": Range.fixed(16)},), precision={"default": "fp16"}
    )
    result = verify(made, saved(tmp_path, original), data=[sixteen_boxes(tmp_path)], asked=asked)
    (problem,) = result.unmet
    assert problem.problem.startswith("outputs `best`, `top`, `classes`, case ")
    assert "boxes above 0.5: 0 of" in problem.problem
    assert "lower `high`" in str(problem.todo)


# --- inputs --------------------------------------------------------------------------------------

LOOKUP = """g (float[N,4] x, int64[N] ids) => (float[N,4] y)
<float[3,4] table = {1,2,3,4,5,6,7,8,9,10,11,12}, int64 far = {FAR}>
{ i = Add (ids, far) t = Gather <axis = 0> (table, i) y = Add (x, t) }"""


def test_made_up_input_that_the_original_rejects_is_a_warning_that_helps(tmp_path: Path) -> None:
    result = held(tmp_path, LOOKUP.replace("FAR", "7"))
    assert codes(result) == ["made-up-input-rejected"] * 3 + ["nothing-verified"]
    assert [d.severity for d in result.notes] == ["warning"] * 3
    assert "inputs: {ids: {range: [0, 9]}}" in str(result.notes[0].todo)
    assert "idx=" in result.notes[0].problem or "out of data bounds" in result.notes[0].problem
    assert result.exit_code == 3


def test_a_range_in_the_spec_is_kept_to(tmp_path: Path) -> None:
    text = LOOKUP.replace("FAR", "-40")
    package = package_of(tmp_path / "package", text)
    inputs = [
        tensor.model_copy(update={"range": (40, 42)}) if tensor.name == "ids" else tensor
        for tensor in package.manifest.inputs
    ]
    package.manifest = package.manifest.model_copy(update={"inputs": tuple(inputs)})
    result = verify(package, saved(tmp_path, text))
    assert result.diagnostics == []
    assert len(result.findings) == 3


def test_the_users_data_is_compared_too(tmp_path: Path) -> None:
    write_arrays(tmp_path / "one.npz", {"x": np.full((3, 4), 0.5, np.float32)})
    result = held(tmp_path, MLP, data=[tmp_path / "one.npz"])
    assert str(tmp_path / "one.npz") in {finding.case for finding in result.findings}


def test_data_of_another_shape_is_the_users_fault(tmp_path: Path) -> None:
    write_arrays(tmp_path / "one.npz", {"x": np.zeros((9, 4), np.float32)})
    with pytest.raises(InputError, match=r"one\.npz.*no profile holds") as caught:
        held(tmp_path, MLP, data=[tmp_path / "one.npz"])
    assert caught.value.exit_code == 2


def test_data_that_the_original_rejects_is_the_users_fault(tmp_path: Path) -> None:
    arrays = {"x": np.zeros((1, 4), np.float32), "ids": np.array([99])}
    write_arrays(tmp_path / "one.npz", arrays)
    with pytest.raises(InputError, match="does not run on it") as caught:
        held(tmp_path, LOOKUP.replace("FAR", "0"), data=[tmp_path / "one.npz"])
    assert caught.value.diagnostics[0].code == "data-rejected"


def test_an_input_beyond_all_memory_is_not_made(tmp_path: Path) -> None:
    profile = {"N": Range(min=1, opt=2, max=2**31 - 1)}
    package = package_of(tmp_path / "package", MLP, profiles=(profile,))
    result = verify(package, saved(tmp_path, MLP))
    assert codes(result) == ["made-up-input-too-large"]
    assert "not compared: max" in result.render()
    assert result.exit_code == 0


def memory(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr("optc.optimizer.made_up.available_bytes", lambda: available)


def test_made_up_input_is_bounded_by_the_memory_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = {"N": Range(min=1, opt=2, max=2**16)}  # max is 1 MiB of x
    package = package_of(tmp_path / "package", MLP, profiles=(profile,))
    memory(monkeypatch, 32 << 20)
    result = verify(package, saved(tmp_path, MLP))
    assert codes(result) == ["made-up-input-too-large"]
    assert (
        "case max was not compared: it would take 1 MiB of made-up input, and optc makes up at "
        "most 512 KiB, a 64th of the 32 MiB of memory available"
    ) in result.notes[0].problem
    assert {finding.case for finding in result.findings} == {"opt", "min"}


@pytest.mark.parametrize(("least", "compared"), [(2**14, ["min"]), (2**14 + 1, [])])
def test_the_quick_check_falls_back_on_min_where_that_is_far_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int, compared: list[str]
) -> None:
    profile = {"N": Range(min=least, opt=2**17, max=2**17)}  # 16 bytes of x a row
    package = package_of(tmp_path / "package", MLP, profiles=(profile, {"N": Range.fixed(1)}))
    memory(monkeypatch, 64 << 20)
    result = quick_check(package, saved(tmp_path, MLP))
    assert [finding.case for finding in result.findings] == [f"profile 1, {at}" for at in compared]
    told = ["made-up-input-too-large"] * (1 if compared else 2)
    assert codes(result) == [*told, *([] if compared else ["nothing-verified"])]
    assert (
        compared or "256 KiB, a quarter of 1 MiB, a 64th of the 64 MiB" in result.notes[1].problem
    )


def test_an_empty_axis_is_compared(tmp_path: Path) -> None:
    profile = {"N": Range(min=0, opt=0, max=2)}
    package = package_of(tmp_path / "package", MLP, profiles=(profile,))
    result = verify(package, saved(tmp_path, MLP))
    assert [f.verdict for f in result.findings] == ["met", "met"]


def test_an_output_that_is_always_empty_proves_nothing(tmp_path: Path) -> None:
    text = """g (float[N] x) => (int64[1,K] where, float[N] y) <float two = {2}>
    { more = Greater (x, two) where = NonZero (more) y = Neg (x) }"""
    result = held(tmp_path, text)
    assert codes(result) == ["nothing-to-compare"]
    assert "`where`" in result.notes[0].problem


def test_an_output_below_the_tolerance_proves_little(tmp_path: Path) -> None:
    text = "g (float[N,4] x) => (float[N,4] y) <float c = {0.00001}> { y = Mul (x, c) }"
    result = held(tmp_path, text, asked=Verify(atol=1e-4))
    assert codes(result) == ["output-below-tolerance"]
    assert result.notes[0].severity == "note"
    assert result.exit_code == 0
    assert held(tmp_path / "b", text, asked=TIGHT).diagnostics == []
    assert held(tmp_path / "c", text).diagnostics == [], "a share of the scale is never too large"


# --- the command ---------------------------------------------------------------------------------


def on_disk(tmp_path: Path, asked: dict[str, object] | None) -> Path:
    """Write a package that is a little off, of fp16, and what its spec asks."""
    original = saved(tmp_path, MLP)
    model = ModelRecord(
        path=original.name, sha256=sha256_of(original), bytes=original.stat().st_size
    )
    demands = None if asked is None else Verify.model_validate(asked).model_dump(mode="json")
    folder = tmp_path / "package"
    package_of(folder, OFF, model=model, precision={"default": "fp16"}, verify=demands)
    return folder


@pytest.mark.parametrize(
    ("asked", "options", "code"),
    [
        (None, (), 0),
        ({"of_scale": 1e-4}, (), 3),
        ({"atol": 1e-2}, (), 0),
        ({"atol": 1e-9, "rtol": 1e-9}, (), 3),
        ({"atol": 1e-9, "rtol": 1e-9}, ("--atol=0.1",), 0),
        ({"of_scale": 1e-9, "outputs": {"y": {"of_scale": 1e-9}}}, ("--atol=0.1",), 0),
        (None, ("--atol=1e-9", "--rtol=1e-9"), 3),
        ({"groups": {"hard": "hard.npz"}}, (), 3),
        ({"groups": {"hard": {"data": "hard.npz", "of_scale": 0.5}}}, (), 0),
        ({"groups": {"hard": "hard.npz"}}, ("--data", "{}/easy*.npz"), 0),
        ({"data": "easy*.npz", "groups": {"hard": "gone.npz"}}, (), 2),
    ],
)
def test_the_command_exits_as_what_is_asked_is_met(
    tmp_path: Path, asked: dict[str, object] | None, options: tuple[str, ...], code: int
) -> None:
    groups_of(tmp_path)
    folder = on_disk(tmp_path, asked)
    given = [option.format(tmp_path) for option in options]
    done = cli("verify", folder, *given)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_what_an_older_optc_wrote_is_still_verified(tmp_path: Path) -> None:
    folder = on_disk(tmp_path, None)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"verify": {"data": None, "atol": 1e-4, "rtol": 1e-4}, "precision": "fp32"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = cli("verify", folder, "--json")
    assert done.returncode == 3
    document = json.loads(done.stdout)
    assert (document["precision"], document["atol"], document["rtol"]) == ("fp32", 1e-4, 1e-4)


# --- for programs --------------------------------------------------------------------------------


def test_json_is_json_even_with_infinities(tmp_path: Path) -> None:
    root = "g (float[N,2] x) => (float[N,2] y) <float[2] c = {%s}> { y = Div (x, c) }"
    result = held(tmp_path, root % "1,1", root % "1,0")
    document = json.loads(json.dumps(result.as_json(), allow_nan=False))
    worst = document["findings"][0]
    assert worst["verdict"] == "not met"
    assert worst["difference"]["worst"]["found"] == "inf"
    assert worst["difference"]["special"] > 0
    assert document["ok"] is False


def test_low_scores_are_shown_on_their_own(tmp_path: Path) -> None:
    text = "g (float[N,64] x) => (float[N,64] y) <float c = {%s}> { y = Mul (x, c) }"
    result = held(tmp_path, text % "0.9", text % "0.90001")
    bands = result.worst_first()[0].difference.bands  # type: ignore[union-attr]
    assert [band.low for band in bands] == [0.0, 0.05, 0.25, 0.5]
    assert bands[0].max_abs < bands[-1].max_abs
    assert "error of `y` by score" in result.render()


# --- the quick check -----------------------------------------------------------------------------


def test_the_quick_check_runs_once(tmp_path: Path) -> None:
    package = package_of(tmp_path / "package", MLP)
    result = quick_check(package, saved(tmp_path, MLP))
    assert [finding.case for finding in result.findings] == ["opt"]
    assert result.diagnostics == []


def test_a_difference_in_the_quick_check_is_a_warning(tmp_path: Path) -> None:
    package = package_of(tmp_path / "package", MLP.replace("0.013,", "0.4,"))
    result = quick_check(package, saved(tmp_path, MLP))
    assert codes(result) == ["verify-not-met"]
    assert result.notes[0].severity == "warning"
    assert "optc verify" in str(result.notes[0].todo)
    assert result.exit_code == 0


def test_a_package_that_does_not_run_fails_the_quick_check(tmp_path: Path) -> None:
    broken = """g (float[N,4] x) => (float[M,K] y) <int64[2] s = {3,3}>
    { z = Reshape (x, s) y = Neg (z) }"""
    package = package_of(tmp_path / "package", broken)
    original = "g (float[N,4] x) => (float[N,4] y) { y = Neg (x) }"
    result = quick_check(package, saved(tmp_path, original))
    assert codes(result) == ["package-does-not-run"]
    assert result.exit_code == 3


def test_made_up_input_that_is_rejected_is_a_warning_in_the_quick_check(tmp_path: Path) -> None:
    text = LOOKUP.replace("FAR", "7")
    result = quick_check(package_of(tmp_path / "p", text), saved(tmp_path, text))
    assert codes(result) == ["made-up-input-rejected", "nothing-verified"]
    assert result.exit_code == 0


def test_weights_in_external_files_are_read_and_moved(tmp_path: Path) -> None:
    """The original's noise needs its weights, wherever they are."""
    rng = np.random.default_rng(0)
    model = model_of(
        "g (float[N,32] x, float[32,32] w) => (float[N,32] y) { h = MatMul (x, w) y = Tanh (h) }"
    )
    del model.graph.input[1]
    weight = rng.standard_normal((32, 32)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(
        model,
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.bin",
        size_threshold=0,
    )
    from optc.optimizer.noise import Noise
    from optc.optimizer.reference import Model

    original = Model(tmp_path / "m.onnx")
    x = rng.random((2, 32)).astype(np.float32)
    plain = original.runner.run({"x": x})["y"]
    moves = [np.abs(sample["y"] - plain).max() for _, sample in Noise(original).samples({"x": x})]
    assert len(moves) == 9
    assert 0 < max(moves[1:4]) < 1e-5
