from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optc.optimizer.arrays import dtype_name, dtype_of, read_arrays, typed, write_arrays
from optc.specs.diagnostic import EnvironmentFault, InputError

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
shared_folder = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def npy(array: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def code_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_arrays(path)
    return caught.value.diagnostics[0].code


# --- names ---------------------------------------------------------------------------------------


@shared_folder
@given(names=st.lists(NAMES, unique=True, max_size=5))
def test_any_name_comes_back_in_its_place(tmp_path: Path, names: list[str]) -> None:
    arrays = {name: np.array(index) for index, name in enumerate(names)}
    write_arrays(tmp_path / "a.npz", arrays)
    found = read_arrays(tmp_path / "a.npz")
    assert list(found) == names
    assert all(found[name] == arrays[name] for name in names)
    with np.load(tmp_path / "a.npz") as by_numpy:
        assert all(by_numpy[name] == arrays[name] for name in names)


@pytest.mark.parametrize("name", ["../../up", "/etc/passwd", "C:\\x", "a:0", "a.npy", "file", ""])
def test_a_name_that_looks_like_a_path_makes_no_file(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "one" / "two"
    inner.mkdir(parents=True)
    write_arrays(inner / "a.npz", {name: np.ones(2)})
    assert list(read_arrays(inner / "a.npz")) == [name]
    assert [p.name for p in tmp_path.rglob("*")] == ["one", "two", "a.npz"]


@pytest.mark.parametrize("name", ["a\0b", "x" * 70_000, "\ud800"])
def test_a_name_that_zip_cannot_hold_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        write_arrays(tmp_path / "a.npz", {name: np.ones(2)})
    assert caught.value.diagnostics[0].code == "cannot-write-npz"
    assert os.listdir(tmp_path) == []


# --- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.array(1.5),
        np.array(True),
        np.zeros((0, 4), np.float32),
        np.array([1, 2], np.uint8),
        np.array(["a", "bü", ""]),
        np.arange(6, dtype=np.int64).reshape(2, 3).T,
        np.array([1 + 2j], np.complex64),
    ],
)
def test_arrays_come_back_as_they_were(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    write_arrays(tmp_path / "a.npz", {"x": array})
    found = read_arrays(tmp_path / "a.npz")["x"]
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "int4", "uint4"])
def test_types_numpy_does_not_know_come_back_where_they_are_named(
    tmp_path: Path, name: str
) -> None:
    array = np.array([1, 3], getattr(ml_dtypes, name))
    write_arrays(tmp_path / "a.npz", {"x": array})
    assert read_arrays(tmp_path / "a.npz")["x"].dtype.kind == "V"
    found = typed(read_arrays(tmp_path / "a.npz")["x"], name)
    assert found.dtype == array.dtype
    assert (found == array).all()


def test_opaque_bytes_of_another_width_are_not_given_a_dtype(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.npz", {"x": np.zeros(2, "V4")})
    assert typed(read_arrays(tmp_path / "a.npz")["x"], "bfloat16").dtype == np.dtype("V4")


def test_python_text_becomes_numpy_text(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.npz", {"x": np.array(["a", "bc"], object)})
    np.testing.assert_array_equal(read_arrays(tmp_path / "a.npz")["x"], ["a", "bc"])


@pytest.mark.parametrize("item", [b"bytes", 1, None, "ends in NUL\0"])
def test_other_objects_are_not_written(tmp_path: Path, item: object) -> None:
    with pytest.raises(InputError):
        write_arrays(tmp_path / "a.npz", {"x": np.array([item], object)})
    assert os.listdir(tmp_path) == []


def test_other_byte_orders_and_compression_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.array([1, 2], ">i4"))
    found = read_arrays(tmp_path / "a.npz")["x"]
    assert found.dtype == np.int32
    assert found.tolist() == [1, 2]


def test_names_of_dtypes_come_back() -> None:
    for name in ("float32", "bool", "int8", "complex64", "bfloat16", "float8_e5m2", "int4"):
        assert dtype_name(dtype_of(name)) == name
    assert dtype_name(dtype_of("string")) == "string"
    with pytest.raises(KeyError):
        dtype_of("sequence(float32)")


# --- what is refused -----------------------------------------------------------------------------


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "owned"),))

    np.savez(tmp_path / "a.npz", x=np.array([Evil()], object))
    assert code_of(tmp_path / "a.npz") == "pickled-array"
    assert not (tmp_path / "owned").exists()


def test_what_is_no_npz_is_said_to_be_none(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.ones(2))
    (tmp_path / "text").write_text("hello")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"x": 1}))
    (tmp_path / "empty").write_bytes(b"")
    for name in ("one.npy", "text", "pickle", "empty"):
        assert code_of(tmp_path / name) == "not-npz"
    assert code_of(zipped(tmp_path / "zip", readme=b"hello")) == "not-npz"
    assert code_of(tmp_path / "none") == "no-such-file"
    assert code_of(tmp_path) == "no-such-file"


def test_two_arrays_of_one_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", npy(np.ones(1)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", npy(np.zeros(1)))
    assert code_of(tmp_path / "a.npz") == "duplicate-array"


def test_a_shape_that_claims_more_than_is_there_takes_no_memory(tmp_path: Path) -> None:
    data = npy(np.zeros((2, 1000), np.float32)).replace(b"(2, 1000)", b"(9999999, 9999999)")
    assert code_of(zipped(tmp_path / "a.npz", **{"x.npy": data})) == "damaged-npz"


def test_a_file_cut_short_is_damaged(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones(100))
    data = (tmp_path / "a.npz").read_bytes()
    for size in (10, 100, len(data) - 5):
        (tmp_path / "b.npz").write_bytes(data[:size])
        assert code_of(tmp_path / "b.npz") == "damaged-npz"


@shared_folder
@given(at=st.integers(0, 400), byte=st.integers(0, 255))
def test_no_changed_byte_makes_a_traceback(tmp_path: Path, at: int, byte: int) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.ones(4), y=np.array(["t"]))
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    path.write_bytes(data)
    try:
        found = read_arrays(path)
    except InputError:
        return  # which of the errors depends on the byte
    assert all(isinstance(array, np.ndarray) for array in found.values())


@shared_folder
@given(header=st.binary(max_size=60))
def test_no_header_makes_a_traceback(tmp_path: Path, header: bytes) -> None:
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    assert code_of(zipped(tmp_path / "a.npz", **{"x.npy": data})) == "damaged-npz"


# --- where it is written -------------------------------------------------------------------------


def test_the_old_file_stays_where_writing_fails(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.npz", {"x": np.ones(1)})
    with pytest.raises(InputError):
        write_arrays(tmp_path / "a.npz", {"x": np.zeros(1), "y": np.array([None])})
    assert read_arrays(tmp_path / "a.npz")["x"] == 1
    assert os.listdir(tmp_path) == ["a.npz"]


def test_a_device_is_written_to_and_not_replaced() -> None:
    write_arrays(Path("/dev/null"), {"x": np.ones(1)})
    assert not Path("/dev/null").is_file()
    with pytest.raises(EnvironmentFault) as caught:
        write_arrays(Path("/dev/full"), {"x": np.ones(1)})
    assert caught.value.diagnostics[0].code == "disk-full"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("a.npz")
    write_arrays(tmp_path / "link", {"x": np.ones(1)})
    assert (tmp_path / "link").is_symlink()
    assert list(read_arrays(tmp_path / "a.npz")) == ["x"]


def test_a_folder_and_a_missing_folder_are_said_so(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "a.npz"):
        with pytest.raises(InputError) as caught:
            write_arrays(path, {"x": np.ones(1)})
        assert caught.value.diagnostics[0].code == "cannot-write-npz"
