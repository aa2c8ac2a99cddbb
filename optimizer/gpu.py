"""Engines on a GPU, through cuda-python and the runtime of TensorRT or TensorRT for RTX.

Nothing here is loaded on a machine without a GPU, but for cuda-python, which says that there is
none. The two libraries have one interface; the code is checked as code for TensorRT.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from optc.optimizer.backend import backend_of, is_installed
from optc.optimizer.package import sha256_of

if TYPE_CHECKING:
    import tensorrt as trt

Array = npt.NDArray[Any]

_DTYPES: dict[str, npt.DTypeLike] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "FP8": ml_dtypes.float8_e4m3fn,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
"""TensorRT's name of a dtype -> numpy's. Those of 4 bits cannot cross an engine's boundary here."""


_LOADED: set[str] = set()
"""Hashes of the libraries of plugins that this process has, of whichever package: TensorRT refuses
plugins of a name that it knows already."""


class NoGpu(Exception):
    """There is no GPU to use. The text says why."""


class EngineFault(Exception):
    """An engine could not be loaded or run. The text is the library's own."""


@dataclass(frozen=True, slots=True)
class Device:
    """The GPU that engines run on: the current one of this process."""

    name: str
    compute_capability: str


def visible_device() -> Device:
    """Return the GPU that CUDA uses in this process; raises NoGpu."""
    cuda = _cuda_runtime()
    code, count = cuda.cudaGetDeviceCount()
    if code != cuda.cudaError_t.cudaSuccess:
        raise NoGpu(f"no GPU: {_words(cuda, code)}")
    if count == 0:
        raise NoGpu("no GPU is visible to this process")
    index = _called(cuda, cuda.cudaGetDevice())
    kinds = cuda.cudaDeviceAttr
    major, minor = (
        _called(cuda, cuda.cudaDeviceGetAttribute(kind, index))
        for kind in (
            kinds.cudaDevAttrComputeCapabilityMajor,
            kinds.cudaDevAttrComputeCapabilityMinor,
        )
    )
    name = _called(cuda, cuda.cudaGetDeviceProperties(index)).name
    return Device(name.decode().rstrip("\0"), f"{major}.{minor}")


def why_not(backend: str, compute_capability: str | None, device: Device) -> str | None:
    """Return why engines of ``backend`` for ``compute_capability`` do not run on ``device``."""
    if compute_capability is None:
        # TensorRT for RTX: one engine for Ampere and all that came later.
        if tuple(map(int, device.compute_capability.split("."))) < (8, 0):
            return f"portable engines need compute capability 8.0, {device.name} has " + (
                device.compute_capability
            )
    elif compute_capability != device.compute_capability:
        return (
            f"the engines are for compute capability {compute_capability}, {device.name} has "
            + (device.compute_capability)
        )
    if not is_installed(library := backend_of(backend)):
        return f"`{library.module}` is not installed (pip install 'optc[{library.extra}]')"
    return None


class Engine:
    """One engine, loaded, with one execution context. It runs one call at a time.

    Args:
        backend: As the manifest names it.
        data: The engine file.
        plugins: Libraries of the plugins in it.

    Raises:
        EngineFault: Where the library does not take it.
    """

    def __init__(self, backend: str, data: bytes, plugins: Sequence[Path] = ()) -> None:
        library = importlib.import_module(backend_of(backend).module)
        self._cuda = _cuda_runtime()
        self._library: Any = library
        self._log = _log(library)
        self._runtime: trt.Runtime = library.Runtime(self._log)
        for path in plugins:
            if (sha256 := sha256_of(path)) not in _LOADED:
                if library.get_plugin_registry().load_library(str(path)) is None:
                    raise EngineFault(self._said(f"the plugins `{path}` cannot be loaded"))
                _LOADED.add(sha256)
        engine: trt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise EngineFault(self._said("the engine cannot be deserialised"))
        context: trt.IExecutionContext | None = engine.create_execution_context()
        if context is None:
            raise EngineFault(self._said("the engine gives no execution context"))
        self._engine, self._context = engine, context
        self._stream = int(_called(self._cuda, self._cuda.cudaStreamCreate()))
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        is_input = {n: engine.get_tensor_mode(n) == library.TensorIOMode.INPUT for n in names}
        self.inputs = tuple(name for name in names if is_input[name])
        self.outputs = tuple(name for name in names if not is_input[name])
        self._dtypes = {name: self._dtype(name) for name in names}

    def run(self, arrays: Mapping[str, Array], profile: int) -> dict[str, Array]:
        """Return the outputs for ``arrays``, whose shapes optimisation profile ``profile`` holds.

        An input of another dtype than the engine's is converted: TensorRT has no float64, and
        takes and gives float32 in its place.

        Raises:
            EngineFault: Where TensorRT or CUDA fail.
        """
        context = self._context
        if not context.set_optimization_profile_async(profile, self._stream):
            raise EngineFault(self._said(f"optimisation profile {profile} cannot be set"))
        with _Memory(self._cuda, self._stream) as memory:
            kept = [self._give(memory, name, arrays[name]) for name in self.inputs]
            if missing := context.infer_shapes():
                raise EngineFault(self._said(f"the shapes of {', '.join(missing)} are not known"))
            outputs = {name: self._receive(memory, name) for name in self.outputs}
            if not context.execute_async_v3(self._stream):
                raise EngineFault(self._said("the engine does not run"))
            memory.wait()  # shapes that depend on data are known from here on
            results = {name: output.fetch() for name, output in outputs.items()}
            memory.wait()
            del kept  # inputs on the host were read until here
        return results

    def _give(self, memory: _Memory, name: str, array: Array) -> Array:
        """Bind an input; returns the host array that must outlive the run."""
        host = np.array(array, self._dtypes[name], order="C", copy=None)
        if not self._context.set_input_shape(name, host.shape):
            raise EngineFault(self._said(f"shape {host.shape} of `{name}` is not taken"))
        on_host = self._engine.get_tensor_location(name) == self._library.TensorLocation.HOST
        address = host.ctypes.data if on_host else memory.put(host)
        self._context.set_tensor_address(name, address)
        return host

    def _receive(self, memory: _Memory, name: str) -> _Output:
        """Bind an output."""
        shape = _extents(self._context.get_tensor_shape(name))
        on_host = self._engine.get_tensor_location(name) == self._library.TensorLocation.HOST
        output = _Output(memory, self._dtypes[name])
        if -1 in shape:
            # The allocator holds the output, and the context only borrows the allocator.
            output.allocator = _allocator(self._library, output)
            self._context.set_output_allocator(name, output.allocator)
        elif on_host:
            output.shape, output.host = shape, np.empty(shape, self._dtypes[name])
            self._context.set_tensor_address(name, output.host.ctypes.data)
        else:
            output.shape, output.address = shape, memory.take(output.bytes_of(shape))
            self._context.set_tensor_address(name, output.address)
        return output

    def _dtype(self, name: str) -> np.dtype[Any]:
        known = self._engine.get_tensor_dtype(name)
        if known.name not in _DTYPES:
            raise EngineFault(f"`{name}` is {known.name}, which cannot cross an engine's boundary")
        return np.dtype(_DTYPES[known.name])

    def _said(self, problem: str) -> str:
        said = "; ".join(self._log.errors)
        self._log.errors.clear()
        return f"{problem}: {said}" if said else problem


class _Output:
    """One output of one run: where it is, and its shape once that is known."""

    def __init__(self, memory: _Memory, dtype: np.dtype[Any]) -> None:
        self.memory = memory
        self.dtype = dtype
        self.shape: tuple[int, ...] = ()
        self.address = 0
        self.room = 0
        self.host: Array | None = None
        self.allocator: Any = None

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        return int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize

    def grow(self, size: int) -> int:
        """Return the address of at least ``size`` bytes."""
        if self.address == 0 or size > self.room:
            self.address, self.room = self.memory.take(size), size
        return self.address

    def fetch(self) -> Array:
        """Return the values; they are there after the next wait."""
        if self.host is not None:
            return self.host
        array = np.empty(self.shape, self.dtype)
        self.memory.get(array, self.address)
        return array


class _Memory:
    """Device memory of one run, taken and given back in the order of one stream."""

    def __init__(self, cuda: Any, stream: int) -> None:
        self._cuda = cuda
        self._stream = stream
        self._taken: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for address in self._taken:
            # Where the run failed, this fails for the same reason, and that is being raised.
            code = self._cuda.cudaFreeAsync(address, self._stream)
            if error is None:
                _called(self._cuda, code)

    def take(self, size: int) -> int:
        """Return the address of ``size`` bytes; TensorRT wants one for an empty tensor, too."""
        address = int(_called(self._cuda, self._cuda.cudaMallocAsync(max(size, 1), self._stream)))
        self._taken.append(address)
        return address

    def put(self, array: Array) -> int:
        """Copy ``array`` to the device and return where it is. It must outlive the next wait."""
        address = self.take(array.nbytes)
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")
        return address

    def get(self, array: Array, address: int) -> None:
        """Fill ``array`` from the device; it is filled after the next wait."""
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")

    def wait(self) -> None:
        _called(self._cuda, self._cuda.cudaStreamSynchronize(self._stream))

    def _copy(self, to: int, source: int, size: int, kind: str) -> None:
        if size:
            way = getattr(self._cuda.cudaMemcpyKind, kind)
            _called(self._cuda, self._cuda.cudaMemcpyAsync(to, source, size, way, self._stream))


def _extents(shape: trt.Dims) -> tuple[int, ...]:
    return tuple(int(shape[axis]) for axis in range(len(shape)))


def _log(library: Any) -> Any:
    """Return a logger that keeps errors: the library's own one writes to stdout."""

    class Log(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity <= library.ILogger.Severity.ERROR:
                self.errors.append(msg)

    return Log()


def _allocator(library: Any, output: _Output) -> Any:
    """Return what TensorRT asks for the memory of an output whose shape depends on data."""

    class Allocator(library.IOutputAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IOutputAllocator.__init__(self)

        def reallocate_output(self, name: str, memory: int, size: int, alignment: int) -> int:
            return output.grow(size)

        def reallocate_output_async(
            self, name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int:
            return output.grow(size)

        def notify_shape(self, name: str, shape: Any) -> None:
            output.shape = _extents(shape)

    return Allocator()


def _cuda_runtime() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise NoGpu(f"cuda-python does not load ({error}; pip install 'optc[gpu]')") from error


def _called(cuda: Any, answer: tuple[Any, ...]) -> Any:
    """Return what a CUDA call gave, or raise what it says."""
    code, *values = answer
    if code != cuda.cudaError_t.cudaSuccess:
        raise EngineFault(f"CUDA: {_words(cuda, code)}")
    return values[0] if values else None


def _words(cuda: Any, code: Any) -> str:
    _, text = cuda.cudaGetErrorString(code)
    return f"{text.decode()} (error {int(code)})"
