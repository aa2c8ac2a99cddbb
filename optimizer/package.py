"""A package on disk: written beside its place and put there at once, or not at all.

A compile writes into a staging folder beside DIR and exchanges the two when everything is there.
Whoever is killed on the way leaves DIR as it was, or as it is to be; what else it left, the next
writer removes. One writer holds DIR at a time: the lock is the kernel's, so it dies with its holder.

Where two folders cannot be exchanged (some network file systems; DIR is a mount point, the current
folder, or in a folder that is not ours to write to), the new files move into DIR under a name of
their own, ``optc-content-…``, and the manifest, which names them, is replaced last.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import weakref
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from optc.specs.diagnostic import Diagnostic, EnvironmentFault, InputError, OptcError
from optc.specs.manifest import FILE_NAME, Engine, Manifest, damaged_file, is_package

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import TensorProto

SHARED_BYTES = 16 * 1024
"""Constants larger than this are not embedded in the models but written once, for all of them."""
ALIGNMENT = 4096
_CONTENT = re.compile(r"optc-content-[0-9a-f]{8}")
_LINK, _LINKED = "weights", "stages/weights"
_REPLACED = "replaced.json"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_CANNOT_EXCHANGE = {
    errno.ENOSYS,
    errno.EINVAL,
    errno.EXDEV,
    errno.EBUSY,
    errno.EOPNOTSUPP,
}


# --- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[PackageWriter]:
    """Give a writer of the package in ``folder``; what it does not commit is gone afterwards.

    Args:
        folder: Where the package is to be: nothing yet (its parents are made), an empty folder, or
            a package, which is replaced. A symlink is followed.

    Raises:
        InputError: ``not-replaceable`` where ``folder`` is anything else.
        EnvironmentFault: ``package-locked`` while another process writes this package;
            ``disk-full``; ``cannot-write``.
    """
    target = Path(os.path.realpath(folder))
    with contextlib.ExitStack() as stack:
        with _explained(target):
            _check_replaceable(target)
            _make_parents(target)
            home = _home_of(target)
            stack.enter_context(_locked(home / _lock_name(target)))
            _check_replaceable(target)
            _remove_leftovers(target, home)
            token = secrets.token_hex(4)
            staging = home / f".{target.name}.optc-{os.getpid()}-{token}"
            # After a commit this is the package that was replaced. Should some of it stay, the next
            # writer removes it.
            stack.callback(shutil.rmtree, staging, ignore_errors=True)
            staging.mkdir()
        try:
            yield PackageWriter(target, staging, token, inside=home == target)
        except OSError as error:
            if error.errno in _FULL:  # whoever wrote to the staging folder: it is this disk
                raise _refused(target, error) from error
            raise


class PackageWriter:
    """A package in the making.

    Attributes:
        folder: Where its files are written, laid out as in the finished package.
        weights: Large constants, which its models share.
    """

    def __init__(self, target: Path, staging: Path, token: str, *, inside: bool) -> None:
        self.folder = staging
        self.weights = WeightStore(staging)
        self._target = target
        self._token = token
        self._inside = inside or _is_current(target)
        self._hasher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="optc-hash")
        self._hashes: dict[str, Future[str]] = {}

    def write(self, path: str, data: bytes | str) -> Path:
        """Write one file, at ``path`` in the package, and return where it is now."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data.encode() if isinstance(data, str) else data)
        self._hashes.pop(path, None)
        return file

    def engine(self, path: str) -> Engine:
        """Return the record of an engine whose file is in its final state at ``path``.

        Hashing it takes a while and is done in a thread: `commit` fills the hash in.
        """
        file = self.folder / path
        self._hashes[path] = self._hasher.submit(sha256_of, file)
        return Engine(file=path, sha256="", bytes=file.stat().st_size)

    def commit(self, manifest: Manifest) -> Manifest:
        """Put the package in its place, at once, and return its manifest with ``files`` filled in.

        Nothing may be written afterwards.
        """
        with _explained(self._target):
            return self._commit(manifest)

    def _commit(self, manifest: Manifest) -> Manifest:
        self.weights.close()
        paths = [path.relative_to(self.folder).as_posix() for path in _files_under(self.folder)]
        with ThreadPoolExecutor() as pool:  # hashing and flushing let go of the interpreter
            hashes = dict(zip(paths, pool.map(self._settled, paths), strict=True))
        manifest = manifest.with_files(hashes)
        _check_replaceable(self._target)
        if self._inside or not self._exchanged(manifest):
            manifest = self._moved_inside(manifest)
        return manifest

    def _settled(self, path: str) -> str:
        """Make sure that a file survives a power cut, and return its hash."""
        file = self.folder / path
        _flush(file)
        if path in self._hashes:
            return self._hashes[path].result()
        return self.weights.hash_of(file) or sha256_of(file)

    def _exchanged(self, manifest: Manifest) -> bool:
        """Exchange staging folder and package; False where that cannot be done here."""
        _write_flushed(self.folder / FILE_NAME, manifest.text())
        _flush_folders(self.folder)
        if not self._target.exists():
            self.folder.rename(self._target)
        elif not _exchange(self.folder, self._target):
            return False
        _flush(self._target.parent)
        return True

    def _moved_inside(self, manifest: Manifest) -> Manifest:
        """Move the files into the package under a new name, then replace its manifest."""
        content = f"optc-content-{self._token}"
        manifest = manifest.moved_into(content)
        _write_flushed(self.folder / FILE_NAME, manifest.text())
        _flush_folders(self.folder)
        self._target.mkdir(exist_ok=True)
        if (self._target / FILE_NAME).exists():
            shutil.copyfile(self._target / FILE_NAME, self.folder / _REPLACED)
        self.folder.rename(self._target / content)
        _flush(self._target)
        os.replace(self._target / content / FILE_NAME, self._target / FILE_NAME)
        _flush(self._target)
        _remove_replaced(self._target / content)
        return manifest


class WeightStore:
    """The large constants of all models of one package, each written once.

    `for_stage` and `for_model` are what `optc.passes.graph.export_model` takes as ``place``: a
    constant is streamed to ``stages/weights/model.bin``, unless the same bytes are there already,
    and the model gets a tensor that refers to it. From then on its values are mapped from there.
    onnx, ONNX Runtime and TensorRT's parser refuse external data outside a model's own folder, so
    stages and the whole model name it differently.
    """

    _FILE = "model.bin"

    def __init__(self, package: Path) -> None:
        self._package = package
        self._path = package / "stages" / "weights" / self._FILE
        self._out: BinaryIO | None = None
        self._hasher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="optc-hash")
        self._ahead: tuple[int, Future[str]] | None = None
        self._known: dict[int, tuple[weakref.ref[Any], TensorProto]] = {}
        self._offsets: dict[tuple[int, int], list[int]] = {}
        self._checksums: dict[int, int] = {}

    def for_stage(self, constant: gs.Constant) -> TensorProto | None:
        """Return ``constant`` as a model in ``stages/`` refers to it; None: embed it."""
        return self._placed(constant, f"weights/{self._FILE}")

    def for_model(self, constant: gs.Constant) -> TensorProto | None:
        """Return ``constant`` as ``model.onnx`` refers to it; None: embed it."""
        return self._placed(constant, f"stages/weights/{self._FILE}")

    def digest_of(self, tensor: TensorProto) -> bytes | None:
        """Return what tells the values of ``tensor`` from others; None where they lie elsewhere.

        It was computed when they were written, so that nothing is read for it.
        """
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries.get("location") != f"{_LINK}/{self._FILE}":
            return None
        checksum = self._checksums.get(int(entries.get("offset", 0)))
        return None if checksum is None else f"{entries.get('length')} {checksum}".encode()

    def hash_ahead(self) -> None:
        """Begin to hash what is written, in a thread, while an engine is built elsewhere.

        The file only grows, so the hash holds if it has the same size in the end.
        """
        if self._path.exists():
            size = self._path.stat().st_size
            if self._ahead is None or self._ahead[0] != size:
                self._ahead = (size, self._hasher.submit(sha256_of, self._path))

    def hash_of(self, file: Path) -> str | None:
        """Return the hash of ``file`` if it was begun ahead and still holds."""
        if self._ahead is None or file != self._path or file.stat().st_size != self._ahead[0]:
            return None
        return self._ahead[1].result()

    def close(self) -> None:
        """Close the file; constants may still be placed."""
        if self._out is not None:
            self._out.close()
            self._out = None

    def _placed(self, constant: gs.Constant, location: str) -> TensorProto | None:
        from onnx import TensorProto

        from optc.passes.graph import StoredValues

        values = constant._values
        if values.nbytes <= SHARED_BYTES:
            return None
        seen = self._known.get(id(values))
        if seen is not None and seen[0]() is values:
            entry = seen[1]
        elif (data := raw_bytes(values)) is not None:
            entry = TensorProto(
                data_type=element_type(values),
                dims=constant.shape,
                data_location=TensorProto.EXTERNAL,
            )
            entry.external_data.add(key="location", value=self._FILE)
            entry.external_data.add(key="offset", value=str(self._offset_of(data)))
            entry.external_data.add(key="length", value=str(data.nbytes))
            if isinstance(values, np.ndarray):  # now that it is in the file, let go of the memory
                values = constant._values = StoredValues(entry, self._path.parent)
            self._known[id(values)] = (weakref.ref(values), entry)
        else:
            return None
        tensor = TensorProto()
        tensor.CopyFrom(entry)
        tensor.name = constant.name
        tensor.external_data[0].value = location
        return tensor

    def _offset_of(self, data: npt.NDArray[np.uint8]) -> int:
        """Return where ``data`` stands in the file, writing it where it is not there yet."""
        checksum = zlib.crc32(data.data)
        offsets = self._offsets.setdefault((data.nbytes, checksum), [])
        for offset in offsets:
            if _same_bytes(np.memmap(self._path, np.uint8, "r", offset, data.shape), data):
                return offset
        out = self._opened()
        offset = -(-out.seek(0, os.SEEK_END) // ALIGNMENT) * ALIGNMENT
        out.seek(offset)  # the gap becomes a hole that reads as zeros
        out.write(data.data)
        out.flush()
        offsets.append(offset)
        self._checksums[offset] = checksum
        return offset

    def _opened(self) -> BinaryIO:
        if self._out is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            link = self._package / _LINK
            # A convenience that not every file system offers; nothing refers to it.
            with contextlib.suppress(FileExistsError, PermissionError):
                link.symlink_to(_LINKED, target_is_directory=True)
            self._out = self._path.open("r+b" if self._path.exists() else "w+b")
        return self._out


def _same_bytes(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> bool:
    """Whether two arrays of one length are equal; compared in pieces, to need no memory for it."""
    step = 1 << 22
    return all(
        np.array_equal(one[at : at + step], other[at : at + step])
        for at in range(0, one.size, step)
    )


def raw_bytes(values: Any) -> npt.NDArray[np.uint8] | None:
    """Return the bytes of a tensor as ONNX stores them; None for text, which it never shares."""
    from onnx import numpy_helper
    from onnx_graphsurgeon.ir.tensor import LazyValues

    if values.dtype == np.object_ or values.dtype.kind in "US":
        return None
    array = values.load() if isinstance(values, LazyValues) else np.asarray(values)
    if array.dtype.kind == "V":  # ml_dtypes gives a 4-bit element a byte, ONNX packs two into one
        return np.frombuffer(numpy_helper.from_array(array).raw_data, np.uint8)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def element_type(values: Any) -> int:
    """Return the ONNX element type of a constant's values."""
    from onnx import helper

    stored = getattr(values, "tensor", None)
    return int(
        stored.data_type if stored is not None else helper.np_dtype_to_tensor_dtype(values.dtype)
    )


# --- reading -------------------------------------------------------------------------------------


def check_file(folder: Path, manifest: Manifest, path: str) -> None:
    """Check that one file of a package is there and is what the manifest says.

    Raises:
        InputError: ``damaged-package``.
    """
    try:
        found = sha256_of(folder / path)
    except FileNotFoundError as error:
        raise damaged_file(folder, path, "is missing") from error
    except OSError as error:
        raise damaged_file(folder, path, f"cannot be read: {error.strerror}") from error
    recorded = manifest.files.get(path)
    if recorded is None:
        raise damaged_file(folder, path, "is not among the files the manifest lists")
    if found != recorded:
        raise damaged_file(folder, path, "is not the file that was written (its sha256 differs)")


def copy_in(file: Path, to: Path, unreadable: Callable[[str], OptcError]) -> None:
    """Copy a file of the user's into a package.

    Args:
        file: The file.
        to: Where it goes, in a folder that need not be there.
        unreadable: Makes the error to raise where it cannot be read, of why.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        data = file.open("rb")
    except OSError as error:
        raise unreadable(error.strerror or str(error)) from error
    with data, to.open("wb") as out:
        shutil.copyfileobj(data, out)


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


# --- what may be replaced ------------------------------------------------------------------------


def _check_replaceable(target: Path) -> None:
    if reason := _why_not_replaceable(target):
        raise InputError(
            Diagnostic(
                "not-replaceable",
                f"`{target}` is not replaced by a package: {reason}",
                "choose another folder with `-o`, or move that away",
            )
        )


def _why_not_replaceable(target: Path) -> str | None:
    """Return what in ``target`` is not ours to remove, or None."""
    if not target.exists():
        return None
    if not target.is_dir():
        return "it is a file"
    ours = {FILE_NAME} if is_package(target) else set()
    for manifest in (target / FILE_NAME, *target.glob(f"*/{_REPLACED}")) if ours else ():
        ours |= _listed_files(manifest)
    strange = [
        path.relative_to(target).as_posix()
        for path in _files_under(target)
        if path.relative_to(target).as_posix() not in ours
        and not _is_leftover(target, path.relative_to(target).parts[0])
        and not path.name.startswith(".nfs")  # an open file that was removed, on NFS
    ]
    if not strange:
        return None
    if not ours:
        return f"it holds no package but other files (`{strange[0]}`)"
    return f"besides a package it holds files that optc did not write (`{strange[0]}`)"


def _listed_files(manifest: Path) -> set[str]:
    """Return the files that a manifest lists, also where it is damaged or newer than we know."""
    try:
        data = json.loads(manifest.read_bytes())
    except (OSError, ValueError, RecursionError):
        return set()
    files = data.get("files") if isinstance(data, dict) else None
    return set(files) if isinstance(files, dict) else set()


def _files_under(folder: Path) -> list[Path]:
    """Return all files and links under ``folder``, sorted, but for the link that optc makes."""
    found = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [Path(parent, name) for name in (*files, *links)]
    return sorted(path for path in found if not _is_own_link(path))


def _is_own_link(path: Path) -> bool:
    return path.name == _LINK and path.is_symlink() and os.readlink(path) == _LINKED


# --- the place beside it -------------------------------------------------------------------------


def _home_of(target: Path) -> Path:
    """Return where lock and staging folder go: beside the package, else inside it."""
    beside = os.access(target.parent, os.W_OK | os.X_OK)
    if target.is_dir() and (os.path.ismount(target) or not beside):
        return target
    return target.parent


def _lock_name(target: Path) -> str:
    return f".{target.name}.optc-lock"


def _is_current(target: Path) -> bool:
    """Whether this process stands in ``target``: exchanged, it would stand in a removed folder."""
    try:
        return Path.cwd().is_relative_to(target)
    except FileNotFoundError:  # it stands in one already
        return False


def _make_parents(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(
            Diagnostic(
                "not-replaceable",
                f"`{target}` cannot be a folder: `{error.filename}` is a file",
                "choose another folder with `-o`",
            )
        ) from error


def _is_staging(target: Path, name: str) -> bool:
    return bool(re.fullmatch(rf"{re.escape(f'.{target.name}.optc-')}\d+-[0-9a-f]{{8}}", name))


def _is_leftover(target: Path, name: str) -> bool:
    """Whether ``name`` is one that optc gives to what is no package yet, or no more."""
    return (
        name == _lock_name(target)
        or _is_staging(target, name)
        or _CONTENT.fullmatch(name) is not None
    )


def _remove_leftovers(target: Path, home: Path) -> None:
    """Remove what killed writers left. We hold the lock, so none of them is alive."""
    for entry in list(home.iterdir()):
        if _is_staging(target, entry.name):
            _remove(entry)
    if not target.is_dir():
        return
    used = _tops(_listed_files(target / FILE_NAME))
    for entry in list(target.iterdir()):
        if _CONTENT.fullmatch(entry.name):
            if entry.name in used:
                _remove_replaced(entry)
            else:
                _remove(entry)


def _remove_replaced(content: Path) -> None:
    """Remove the package that was where ``content`` has taken its place.

    What cannot be removed (open files on a network file system) the next writer tries again.
    """
    record = content / _REPLACED
    if not record.exists():
        return
    target = content.parent
    links = {path.name for path in target.iterdir() if _is_own_link(path)}
    with contextlib.suppress(OSError):
        for name in (_tops(_listed_files(record)) | links) - {content.name, FILE_NAME}:
            _remove(target / name)
        record.unlink()


def _tops(paths: set[str]) -> set[str]:
    """Return the first parts of ``paths``."""
    return {path.split("/")[0] for path in paths} - {"", ".", ".."}


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock at ``path``; its file is gone afterwards."""
    handle = _lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever waits for it looks again
        os.close(handle)


def _lock(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
                return handle
        except BlockingIOError as error:
            holder = os.pread(handle, 20, 0).decode(errors="replace") or "another process"
            os.close(handle)
            raise EnvironmentFault(
                Diagnostic(
                    "package-locked",
                    f"the package is being written by process {holder} (lock `{path}`)",
                    "wait for it to end, or write to another folder with `-o`",
                )
            ) from error
        except OSError:
            os.close(handle)
            raise
        os.close(handle)  # its last holder removed the file meanwhile: take the new one


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


# --- the file system -----------------------------------------------------------------------------


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that says so."""
    try:
        yield
    except OSError as error:
        raise _refused(target, error) from error


def _refused(target: Path, error: OSError) -> EnvironmentFault:
    at = f" (`{error.filename}`)" if error.filename else ""
    problem = f"`{target}` was not written: {error.strerror or error}{at}"
    if error.errno in _FULL:
        todo = "free some space, or choose a folder on another disk with `-o`"
        return EnvironmentFault(Diagnostic("disk-full", problem, todo))
    todo = "choose a folder that you may write to with `-o`"
    return EnvironmentFault(Diagnostic("cannot-write", problem, todo))


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths at once; False where kernel or file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    done = libc.renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    )
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), os.fspath(other))


def _write_flushed(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_folders(folder: Path) -> None:
    for parent, _, _ in os.walk(folder, topdown=False):
        _flush(Path(parent))
