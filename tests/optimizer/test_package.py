from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from text_package import manifest, read, write

from optc.optimizer import package
from optc.optimizer.package import sha256_of, writing
from optc.passes.graph import export_model, import_model
from optc.specs.diagnostic import EnvironmentFault, InputError, OptcError
from optc.specs.manifest import read_manifest


def give_up_writing(folder: Path) -> None:
    with writing(folder) as writer:
        writer.write("model.onnx", "half")
        raise ZeroDivisionError


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


def code_of(error: pytest.ExceptionInfo[OptcError]) -> str:
    return error.value.diagnostics[0].code


# --- replaced at once ----------------------------------------------------------------------------


def test_a_package_is_in_its_place_with_the_hashes_of_all_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "build" / "p"
    done = write(folder)
    assert read(folder) == "0.1.0"
    assert read_manifest(folder) == done
    assert files(folder) == {*done.files, "manifest.json"}
    assert done.files["model.onnx"] == sha256_of(folder / "model.onnx")
    assert os.listdir(folder.parent) == ["p"]


def test_a_package_replaces_the_one_before_whole(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    with writing(folder) as writer:
        writer.write("engines/ampere/00.engine", b"old")
        writer.commit(manifest())
    write(folder, "2")
    assert read(folder) == "2"
    assert not (folder / "engines").exists()
    assert os.listdir(tmp_path) == ["p"]


def test_what_is_not_committed_leaves_the_package_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    write(folder, "1")
    with pytest.raises(ZeroDivisionError):
        give_up_writing(folder)
    assert read(folder) == "1"
    assert os.listdir(tmp_path) == ["p"]


def test_an_engine_is_recorded_as_it_is(tmp_path: Path) -> None:
    with writing(tmp_path / "p") as writer:
        file = writer.write("engines/ampere/00.engine", b"engine")
        engine = writer.engine("engines/ampere/00.engine")
        asked = manifest()
        stage = asked.stages[0].model_copy(update={"engines": {"ampere": engine}})
        done = writer.commit(asked.model_copy(update={"stages": (stage,)}))
    recorded = done.stages[0].engines["ampere"]
    assert recorded.sha256 == done.files[engine.file] == sha256_of(tmp_path / "p" / engine.file)
    assert recorded.bytes == 6
    assert read_manifest(tmp_path / "p") == done
    assert not file.exists()


# --- what is not replaced ------------------------------------------------------------------------


def test_a_folder_that_is_no_package_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.tex") as error, writing(tmp_path):
        pass
    assert code_of(error) == "not-replaceable"
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_package_that_holds_a_file_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    write(folder)
    (folder / "stages" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"stages/notes\.txt") as error, writing(folder):
        pass
    assert code_of(error) == "not-replaceable"


def test_a_file_that_appears_during_the_compile_is_not_removed(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    write(folder)
    with writing(folder) as writer:
        (folder / "notes.txt").write_text("mine")
        with pytest.raises(InputError, match=r"notes\.txt"):
            writer.commit(manifest())
    assert (folder / "notes.txt").exists()


def test_a_file_is_not_replaced_nor_is_anything_below_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for folder in (file, file / "p"):
        with pytest.raises(InputError) as error, writing(folder):
            pass
        assert code_of(error) == "not-replaceable"


def test_a_damaged_package_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    write(folder)
    (folder / "model.onnx").write_text("scratched")
    (folder / "report.json").unlink()
    write(folder, "2")
    assert read(folder) == "2"


def test_an_empty_folder_becomes_the_package(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    write(tmp_path / "p")
    assert read(tmp_path / "p") == "0.1.0"
    assert os.listdir(tmp_path) == ["p"]


# --- ways to name a folder -----------------------------------------------------------------------


def test_a_link_to_a_package_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "p", "1")
    link = tmp_path / "link"
    link.symlink_to("p")
    write(link, "2")
    assert link.is_symlink()
    assert read(tmp_path / "p") == "2"


@pytest.mark.parametrize("path", ["p/", "./p", "q/../p", "p/."])
def test_odd_spellings_name_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path(path), "1")
    write(tmp_path / "p", "2")
    assert read(tmp_path / "p") == "2"
    assert os.listdir(tmp_path) == ["p"]


def test_the_current_folder_is_replaced_from_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "p"
    write(folder, "1")
    monkeypatch.chdir(folder)
    for version in ("2", "3"):
        write(Path(), version)
        assert read(Path()) == version  # this process still stands in it
    assert os.listdir(tmp_path) == ["p"]
    assert len(os.listdir(folder)) == 2


def test_a_folder_in_which_nothing_may_be_made_is_said_so(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    # Root may write everywhere but in /proc.
    path = Path("/proc/optc") if os.access(locked, os.W_OK) else locked / "p"
    with pytest.raises(EnvironmentFault) as error, writing(path):
        pass
    assert code_of(error) == "cannot-write"


# --- where folders cannot be exchanged -----------------------------------------------------------


@pytest.fixture
def _no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "_exchange", lambda one, other: False)


@pytest.mark.usefixtures("_no_exchange")
def test_without_exchange_the_manifest_is_replaced_last(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    for version in ("1", "2", "3"):
        write(folder, version)
        assert read(folder) == version
        assert files(folder) == {*read_manifest(folder).files, "manifest.json"}
    assert os.listdir(tmp_path) == ["p"]


def test_a_package_written_inside_is_exchanged_for_a_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "p"
    write(folder, "1")
    with monkeypatch.context() as patch:
        patch.setattr(package, "_exchange", lambda one, other: False)
        write(folder, "2")
    write(folder, "3")
    assert read(folder) == "3"
    assert (folder / "model.onnx").exists()


@pytest.mark.usefixtures("_no_exchange")
def test_killed_after_the_manifest_the_next_writer_tidies_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "p"
    monkeypatch.setattr(package, "_exchange", lambda one, other: False)
    write(folder, "1")
    with monkeypatch.context() as patch:
        patch.setattr(package, "_remove_replaced", lambda content: None)
        write(folder, "2")
    assert (folder / "model.onnx").exists()
    assert read(folder) == "2"
    write(folder, "3")
    assert read(folder) == "3"
    assert files(folder) == {*read_manifest(folder).files, "manifest.json"}


@pytest.mark.usefixtures("_no_exchange")
def test_killed_before_the_manifest_the_old_package_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "p"
    for version in ("1", "2"):  # of the plain form, then of the other
        write(folder, version)

        def killed(*args: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                write(folder, "half")
        assert read(folder) == version
    write(folder, "3")
    assert read(folder) == "3"
    assert files(folder) == {*read_manifest(folder).files, "manifest.json"}


# --- one writer, killed writers ------------------------------------------------------------------


def test_a_second_writer_is_told_who_holds_the_package(tmp_path: Path) -> None:
    with writing(tmp_path / "p"):
        with pytest.raises(EnvironmentFault, match=str(os.getpid())) as error:
            write(tmp_path / "p")
        assert code_of(error) == "package-locked"
    write(tmp_path / "p")


def test_another_package_in_the_same_folder_is_not_held(tmp_path: Path) -> None:
    with writing(tmp_path / "p") as writer:
        write(tmp_path / "p.optc-1")
        assert writer.folder.exists()
    assert read(tmp_path / "p.optc-1") == "0.1.0"


def test_a_stray_lock_file_and_staging_folder_are_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".p.optc-lock").write_text("1")
    (tmp_path / ".p.optc-123-0123abcd" / "stages").mkdir(parents=True)
    (tmp_path / ".p.optc-mine").mkdir()  # not of the form that optc gives
    write(tmp_path / "p")
    assert sorted(os.listdir(tmp_path)) == [".p.optc-mine", "p"]


WRITER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from optc.optimizer import package
    from text_package import write
    if sys.argv[2] == "inside":
        package._exchange = lambda one, other: False
    print("ready", flush=True)
    number = 0
    while True:
        write(Path(sys.argv[1]), str(number := number + 1))
""")


@pytest.mark.parametrize("way", ["exchange", "inside"])
def test_killed_at_any_moment_a_package_is_the_old_or_the_new_one(tmp_path: Path, way: str) -> None:
    folder = tmp_path / "p"
    seeded = random.Random(7)
    seen = set()
    for _ in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), way],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(seeded.uniform(0.01, 0.12))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        if folder.exists() and os.listdir(folder):
            seen.add(read(folder))
        write(folder, "after")
        assert read(folder) == "after"
        assert os.listdir(tmp_path) == ["p"]
        assert files(folder) == {*read_manifest(folder).files, "manifest.json"}
    assert len(seen) > 1  # the kills did hit writers at work


# --- a full disk ---------------------------------------------------------------------------------


def test_a_full_disk_is_said_so_and_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "p", "1")
    with pytest.raises(EnvironmentFault) as error, writing(tmp_path / "p"):
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    assert code_of(error) == "disk-full"
    assert read(tmp_path / "p") == "1"
    assert os.listdir(tmp_path) == ["p"]


def test_an_error_of_the_body_is_not_taken_for_one_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path / "p"):
        (tmp_path / "none").read_bytes()


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "changed", "folder", "unlisted"])
def test_damage_of_a_file_is_found(tmp_path: Path, damage: str) -> None:
    found = write(tmp_path / "p")
    file = tmp_path / "p" / "model.onnx"
    file.unlink()
    match damage:
        case "changed":
            file.write_text("else")
        case "folder":
            file.mkdir()
        case "unlisted":
            file.write_text("model 0.1.0")
            rest = {k: v for k, v in found.files.items() if k != "model.onnx"}
            found = found.model_copy(update={"files": rest})
    with pytest.raises(InputError) as error:
        package.check_file(tmp_path / "p", found, "model.onnx")
    assert code_of(error) == "damaged-package"


# --- weights -------------------------------------------------------------------------------------

SOURCE = """<ir_version: 9, opset_import: ["" : 17]>
g (float[n,128] x, bool c) => (float[n,128] y) {
    h = MatMul (x, w)
    y = If (c) <
        then_branch = t () => (float[n,128] yt) { yt = Add (h, small) },
        else_branch = e () => (float[n,128] ye) { ye = MatMul (h, v) }>
}"""


def graph_with_weights() -> gs.Graph:
    model = onnx.parser.parse_model(SOURCE)
    seeded = np.random.default_rng(0)
    values = {"w": (128, 128), "v": (128, 128), "small": (128,)}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(seeded.random(shape, np.float32), name)
        for name, shape in values.items()
    )
    return import_model(model)


def test_onnx_and_onnxruntime_load_models_with_shared_weights(tmp_path: Path) -> None:
    graph = graph_with_weights()
    whole = export_model(graph)
    with writing(tmp_path / "p") as writer:
        model = export_model(graph, place=writer.weights.for_model)
        writer.write("model.onnx", model.SerializeToString())
        stage = export_model(graph, place=writer.weights.for_stage)
        writer.write("stages/00-onnxruntime.onnx", stage.SerializeToString())
        done = writer.commit(manifest())
    assert set(done.files) == {
        "model.onnx",
        "stages/00-onnxruntime.onnx",
        "stages/weights/model.bin",
    }
    bin_file = tmp_path / "p" / "weights" / "model.bin"
    assert bin_file.stat().st_size == 2 * 128 * 128 * 4  # each weight once, aligned, no small one
    feeds = {"x": np.ones((2, 128), np.float32), "c": np.array(False)}
    (expected,) = onnxruntime.InferenceSession(whole.SerializeToString()).run(None, feeds)
    for path in ("model.onnx", "stages/00-onnxruntime.onnx"):
        file = str(tmp_path / "p" / path)
        loaded = onnx.load(file)
        assert loaded.graph.initializer[0].raw_data == whole.graph.initializer[0].raw_data
        onnx.checker.check_model(file)
        (found,) = onnxruntime.InferenceSession(file).run(None, feeds)
        np.testing.assert_array_equal(found, expected)


def test_tensorrt_parses_models_with_shared_weights(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    graph = graph_with_weights()
    with writing(tmp_path / "p") as writer:
        for path, place in (
            ("model.onnx", writer.weights.for_model),
            ("stages/00-tensorrt.onnx", writer.weights.for_stage),
        ):
            writer.write(path, export_model(graph, place=place).SerializeToString())
        writer.commit(manifest())
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    for path in ("model.onnx", "stages/00-tensorrt.onnx"):
        network = builder.create_network(0)  # lives longer than its parser
        parser = trt.OnnxParser(network, logger)
        assert parser.parse_from_file(str(tmp_path / "p" / path))


@pytest.mark.parametrize(
    ("dtype", "packed"), [("float16", 2.0), ("bfloat16", 2.0), ("int4", 0.5), ("bool", 1.0)]
)
def test_equal_weights_are_written_once_in_onnx_form(
    tmp_path: Path, dtype: str, packed: float
) -> None:
    element = getattr(onnx.TensorProto, dtype.upper())
    kind = onnx.helper.tensor_dtype_to_np_dtype(element)
    values = (np.arange(65_538) % 2).astype(kind)
    with writing(tmp_path / "p") as writer:
        tensors = [
            writer.weights.for_stage(gs.Constant(name, array))
            for name, array in (("a", values), ("b", values.copy()), ("c", values[::-1]))
        ]
        loaded = []
        for tensor in tensors:
            assert tensor is not None
            onnx.external_data_helper.load_external_data_for_tensor(
                tensor, str(writer.folder / "stages")
            )
            loaded.append(onnx.numpy_helper.to_array(tensor))
        size = (writer.folder / "stages/weights/model.bin").stat().st_size
    for array, expected in zip(loaded, (values, values, values[::-1]), strict=True):
        assert array.dtype == kind
        assert (array == expected).all()
    length = int(65_538 * packed)
    assert size == -(-length // 4096) * 4096 + length


def test_small_and_text_constants_are_embedded(tmp_path: Path) -> None:
    text = np.array(["word"] * 10_000, dtype=object)
    with writing(tmp_path / "p") as writer:
        assert writer.weights.for_stage(gs.Constant("s", np.zeros(4096, np.float32))) is None
        assert writer.weights.for_stage(gs.Constant("t", text)) is None
        assert not (writer.folder / "stages").exists()


def digests_of(folder: Path, *arrays: np.ndarray[tuple[int], np.dtype[np.float32]]) -> list[bytes]:
    """Return what a store in ``folder`` tells the values of constants by."""
    found = []
    with writing(folder) as writer:
        for index, array in enumerate(arrays):
            placed = writer.weights.for_stage(gs.Constant(f"w{index}", array))
            assert placed is not None
            digest = writer.weights.digest_of(placed)
            assert digest is not None
            found.append(digest)
    return found


def test_values_are_told_apart_wherever_they_lie(tmp_path: Path) -> None:
    one, other = np.zeros(8192, np.float32), np.ones(8192, np.float32)
    first = digests_of(tmp_path / "first", one, other, one)
    assert first[0] == first[2] != first[1]
    assert digests_of(tmp_path / "second", other, one) == [first[1], first[0]]


def test_of_values_in_a_file_of_the_users_nothing_is_told(tmp_path: Path) -> None:
    with writing(tmp_path / "p") as writer:
        placed = writer.weights.for_stage(gs.Constant("w", np.zeros(8192, np.float32)))
        assert placed is not None
        placed.external_data[0].value = "model.bin"
        assert writer.weights.digest_of(placed) is None
