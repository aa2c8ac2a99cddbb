"""A spec to start from passes the check, and its usual sizes run."""

from __future__ import annotations

import io
import time
from pathlib import Path

import onnx
import pytest
from onnx import parser

from optc.optimizer.init import MOST_SECONDS, starter, write_new
from optc.optimizer.made_up import made_up
from optc.optimizer.reference import OrtRunner
from optc.specs.check import CheckedSpec, check
from optc.specs.compile_spec import Range
from optc.specs.diagnostic import EnvironmentFault, InputError, ModelError
from optc.specs.starter import decisions

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
HEAD = '<ir_version: 9, opset_import: ["" : 17]>\n'


def started(folder: Path, source: str) -> tuple[str, CheckedSpec]:
    """Return the starter spec for a model, and what checking it gives."""
    (folder / "model").mkdir()
    path = folder / "model" / "m.onnx"
    onnx.save(parser.parse_model(HEAD + source), path)
    text = starter(path, folder / "spec.yaml")
    (folder / "spec.yaml").write_text(text)
    return text, check(folder / "spec.yaml")


def runs(checked: CheckedSpec) -> bool:
    runner = OrtRunner(checked.model_path, checked.model_path.parent)
    return bool(runner.run(made_up(checked.inputs, checked.profiles[0], "opt")))


def test_named_axes_get_ranges_that_run(tmp_path: Path) -> None:
    text, checked = started(tmp_path, "g (float[batch,3] x) => (float[batch,3] y) { y = Relu (x) }")
    assert not decisions(text)
    assert checked.model_path == tmp_path / "model/m.onnx"
    assert checked.profiles == ({"batch": Range(min=1, opt=4, max=8)},)
    assert runs(checked)


def test_an_index_gets_the_range_of_its_table(tmp_path: Path) -> None:
    table = ", ".join("1" for _ in range(30))
    text, checked = started(
        tmp_path,
        f"""
        g (int64[batch,seq] ids, int64[batch,seq] mask) => (float[batch,seq] y)
        <float[30] table = {{{table}}}>
        {{
            small = Cast <to = 6> (ids)
            words = Gather (table, small)
            float_mask = Cast <to = 1> (mask)
            y = Mul (words, float_mask)
        }}""",
    )
    assert checked.inputs["ids"].range == (0, 29)
    assert checked.inputs["mask"].range is None
    assert not decisions(text)
    assert runs(checked)


def test_a_size_the_model_insists_on_is_found(tmp_path: Path) -> None:
    text, checked = started(
        tmp_path,
        """
        g (float[batch,3,height,width] x) => (float[batch,3,48,width] y)
        {
            shape = Constant <value = int64[3] {3, 48, 1}> ()
            ones = ConstantOfShape <value = float[1] {1}> (shape)
            y = Add (x, ones)
        }""",
    )
    (line,) = decisions(text)
    assert "the model takes 1 and 48" in text.splitlines()[line - 1]
    assert checked.inputs["x"].shape == ("batch", 3, 48, "width")
    assert runs(checked)


def test_a_batch_the_model_insists_on_is_found(tmp_path: Path) -> None:
    text, checked = started(
        tmp_path,
        """
        g (float[batch,4] x) => (float[4] y)
        {
            shape = Constant <value = int64[1] {4}> ()
            y = Reshape (x, shape)
        }""",
    )
    assert "the model takes 1\n" in text
    assert runs(checked)


def test_a_batch_keeps_its_range_where_the_other_axes_cannot_be_small(tmp_path: Path) -> None:
    text, checked = started(
        tmp_path,
        """
        g (float[N,part,8] x) => (float[N,4,left] y)
        {
            turned = Transpose <perm = [0, 2, 1]> (x)
            shape = Constant <value = int64[3] {4, 8, 12}> ()
            weight = ConstantOfShape (shape)
            y = Conv (turned, weight)
        }""",
    )
    (line,) = decisions(text)
    assert "the model takes 16, 32, 48, 64," in text.splitlines()[line - 1]
    part = Range(min=16, opt=16, max=64)
    assert checked.profiles == ({"N": Range(min=1, opt=4, max=8), "part": part},)
    assert runs(checked)


def test_axes_that_run_only_one_at_a_time_get_sizes_that_run(tmp_path: Path) -> None:
    """[4, 1] + [1, 4] and [1, 128] + [128, 1] are sums; [4, 128] + [128, 4] is none."""
    text, checked = started(
        tmp_path,
        """
        g (float[batch,seq] x) => (float[rows,columns] y)
        {
            turned = Transpose (x)
            y = Add (x, turned)
        }""",
    )
    (line,) = decisions(text)
    assert (
        "batch: 1  # DECIDE: of the usual sizes, the model takes 1" in text.splitlines()[line - 1]
    )
    assert checked.profiles == ({"seq": Range(min=1, opt=128, max=512)},)
    assert runs(checked)


@pytest.fixture
def endless() -> str:
    """Return a model that runs for hours where x is longer than 100."""
    return """
        g (float[seq] x) => (float[] y)
        {
            n = Size (x)
            limit = Constant <value = int64 {100}> ()
            over = Greater (n, limit)
            many = Constant <value = int64 {1000000000000}> ()
            few = Constant <value = int64 {1}> ()
            times = Where (over, many, few)
            yes = Constant <value = bool {1}> ()
            start = Constant <value = float {0}> ()
            y = Loop (times, yes, start) <body = one (int64 i, bool c, float s) => (bool c2, float s2)
            {
                c2 = Identity (c)
                s2 = Cos (s)
            }>
        }"""


def test_a_size_that_takes_too_long_is_given_up(
    tmp_path: Path, endless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optc.optimizer.trial.TRIAL_SECONDS", 0.5)
    begin = time.monotonic()
    text, checked = started(tmp_path, endless)
    assert time.monotonic() - begin < MOST_SECONDS + 5
    (line,) = decisions(text)
    assert "others were refused, or too slow" in text.splitlines()[line - 1]
    assert checked.inputs["x"].shape == (32,)
    assert runs(checked)


def test_when_the_time_is_over_no_more_is_tried(
    tmp_path: Path, endless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optc.optimizer.init.MOST_SECONDS", 4.0)
    begin = time.monotonic()
    text, _ = started(tmp_path, endless.replace("{100}", "{0}"))
    assert time.monotonic() - begin < 10
    assert "# made-up input does not run on ONNX Runtime (more than" in text


def test_a_model_that_is_not_loaded_in_time_is_said_to_be(
    tmp_path: Path, endless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optc.optimizer.init.MOST_SECONDS", 0.1)
    text, checked = started(tmp_path, endless)
    assert "# ONNX Runtime does not run this model: while loading it, more than 0 s went by" in text
    assert checked.profiles == ({"seq": Range(min=1, opt=128, max=512)},)


def test_a_size_that_takes_too_much_memory_does_not_run(tmp_path: Path) -> None:
    _, checked = started(
        tmp_path,
        """
        g (float[seq] x) => (float y)
        {
            shape = Constant <value = int64[2] {1000000000, 1}> ()
            short = Constant <value = int64 {10}> ()
            n = Size (x)
            long = Greater (n, short)
            y = If (long) <
                then_branch = huge () => (float a) { many = Expand (x, shape) a = ReduceSum (many) },
                else_branch = small () => (float b) { b = ReduceSum (x) }>
        }""",
    )
    assert checked.inputs["x"].shape == (8,)
    assert runs(checked)


def test_a_model_that_runs_at_no_size_is_said_to(tmp_path: Path) -> None:
    source = "g (float[batch,4] x) => (float[batch,4] y) { y = mine.Op (x) }"
    text, checked = started(tmp_path, source)
    assert "# ONNX Runtime does not run this model: " in text
    assert checked.profiles == ({"batch": Range(min=1, opt=4, max=8)},)


def test_an_input_without_a_shape_is_for_the_user_to_decide(tmp_path: Path) -> None:
    text, checked = started(tmp_path, "g (float x) => (float y) { y = Relu (x) }")
    assert checked.inputs["x"].shape == ()
    proto = parser.parse_model(HEAD + "g (float x) => (float y) { y = Relu (x) }")
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(proto, tmp_path / "m.onnx")
    text = starter(tmp_path / "m.onnx", tmp_path / "spec.yaml")
    assert len(decisions(text)) == 1
    (tmp_path / "spec.yaml").write_text(text)
    assert check(tmp_path / "spec.yaml").inputs["x"].shape == ("batch", 3, 224, 224)


@pytest.mark.parametrize("name", ["light_squeezenet", "light_inception_v1"])
def test_an_old_model_gets_a_spec(tmp_path: Path, name: str) -> None:
    text = starter(LIGHT / f"{name}.onnx", tmp_path / "spec.yaml")
    (tmp_path / "spec.yaml").write_text(text)
    checked = check(tmp_path / "spec.yaml")
    assert list(checked.inputs) == ["data_0"]
    assert runs(checked)


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError):
        starter(tmp_path / "m.onnx")


def test_a_spec_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    write_new(path, "one")
    with pytest.raises(InputError, match="file-exists"):
        write_new(path, "two")
    assert path.read_text() == "one"


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="cannot-write"):
        write_new(tmp_path / "absent" / "spec.yaml", "text")


def test_a_full_disk_leaves_no_half_of_a_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "spec.yaml"
    full = io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True)

    def opened(self: Path, *_: object, **__: object) -> io.TextIOWrapper:
        self.touch()
        return full

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(EnvironmentFault, match="disk-full"):
        write_new(path, "text")
    assert not path.exists()
