"""Modules that run on libtorch: TorchScript, or an exported program, from arrays to arrays.

torch is an optional library and heavy: it is loaded when a module is. Which of the two a file holds
is told by what is in its archive, so that a file that is neither (a pickle of weights, most often)
is refused in words, and nothing in it is run.

A module may write into its arguments, and may give back what it keeps: so arrays are copied on the
way in and on the way out.
"""

from __future__ import annotations

import importlib
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

from optc.optimizer.arrays import dtype_of
from optc.passes.graph import StoredValues
from optc.specs.diagnostic import Diagnostic, EnvironmentFault, quoted

Array = npt.NDArray[Any]
Kind = Literal["TorchScript", "exported program"]
SUFFIXES: Final[Mapping[Kind, str]] = {"TorchScript": ".pt", "exported program": ".pt2"}
"""What the file of a module is called, by which torch knows an exported program."""

MODULE_ERRORS = (
    RuntimeError,  # torch's own are of this kind, those of CUDA too
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    MemoryError,
)
"""What running a module may raise: in an exported program an operator may be any Python code."""

_BY_BITS: Final = frozenset(
    {"bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"}
)
"""Types that numpy has from ml_dtypes only: these go to torch and come back as their bits."""

_DIRECT: Final = frozenset(
    {
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    }
)


class ModuleRejected(Exception):
    """A module cannot be loaded, or not be run on some values. The text says why."""


class ModuleMismatch(ModuleRejected):
    """A module gives something else than the node that it stands for, whatever it is given."""


def torch_version() -> str | None:
    """Return the version of torch, or None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def require_torch() -> Any:
    """Return the library.

    Raises:
        EnvironmentFault: ``missing-extra`` where it is not installed or does not load.
    """
    try:
        return importlib.import_module("torch")
    except (ImportError, OSError) as error:
        found = torch_version()
        problem = (
            "a stage runs on torch, which is not installed"
            if found is None
            else f"torch {found} is installed and does not load: {error}"
        )
        raise EnvironmentFault(
            Diagnostic(
                "missing-extra",
                problem,
                "pip install 'optc[torch]'"
                if found is None
                else "install a build of torch that is for this machine",
            )
        ) from error


def sees_gpu() -> bool:
    """Whether torch can run on a GPU here.

    Raises:
        EnvironmentFault: ``missing-extra``.
    """
    return bool(require_torch().cuda.is_available())


def kind_of(path: Path) -> Kind:
    """Return what the file at ``path`` holds, without loading it.

    Raises:
        ModuleRejected: If it is neither, or cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except OSError as error:
        raise ModuleRejected(f"`{path}` cannot be read: {error.strerror}") from error
    except zipfile.BadZipFile as error:
        raise ModuleRejected(
            f"`{path}` is neither TorchScript nor an exported program: it is no archive, or cut "
            "short"
        ) from error
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return "TorchScript"
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "exported program"
    what = "a pickle, as `torch.save` writes it," if "data.pkl" in names else "an archive"
    raise ModuleRejected(
        f"`{path}` is {what} and neither TorchScript nor an exported program: it holds no program"
    )


@dataclass(frozen=True, slots=True)
class _Argument:
    """An argument of a module's `forward`.

    Attributes:
        type: Its type as TorchScript calls it; empty where it is not known.
        required: Whether it has no default.
    """

    type: str
    required: bool


class TorchModule:
    """A module that was loaded, on one device.

    Args:
        path: Its file.
        cuda: Whether it runs on the GPU that torch sees first; else it runs on the CPU.

    Attributes:
        kind: What the file holds.
        device: ``cpu``, or the name of the GPU.
        engine: What runs it, in words.

    Raises:
        EnvironmentFault: ``missing-extra``.
        ModuleRejected: If it cannot be loaded.
    """

    def __init__(self, path: Path, *, cuda: bool = False) -> None:
        self.kind = kind_of(path)
        self._torch = torch = require_torch()
        self._device = torch.device("cuda" if cuda else "cpu")
        self._name = path.name
        self._errors: tuple[type[Exception], ...] = (*MODULE_ERRORS, torch.jit.Error, OSError)
        self.device = str(torch.cuda.get_device_name(0)) if cuda else "cpu"
        self.engine = f"torch {torch.__version__} on " + (self.device if cuda else "the CPU")
        try:
            self._module = self._loaded(path)
        except self._errors as error:
            raise ModuleRejected(f"torch does not load `{path}`: {self._words(error)}") from error

    def _loaded(self, path: Path) -> Any:
        torch = self._torch
        with warnings.catch_warnings():  # that there are newer ways is for whoever made the module
            warnings.simplefilter("ignore", DeprecationWarning)
            if self.kind == "TorchScript":
                return torch.jit.load(str(path), map_location=self._device).eval()
        program = importlib.import_module("torch.export").load(str(path))
        if self._device.type == "cuda":  # what it makes itself, it makes where it was exported
            passes = importlib.import_module("torch.export.passes")
            program = passes.move_to_device_pass(program, str(self._device))
        return program.module()

    def _words(self, error: BaseException) -> str:
        """Return what ``error`` says in a line: TorchScript says it last, after its own traceback."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if not lines:
            return type(error).__name__
        return lines[-1 if self.kind == "TorchScript" else 0]

    # -- what it takes

    def _arguments(self) -> dict[str, _Argument] | None:
        """Return the arguments of `forward` in order; None for an exported program.

        The arguments of an exported program that are no tensors are part of the program.
        """
        if self.kind != "TorchScript":
            return None
        own = self._module.forward.schema.arguments[1:]
        return {a.name: _Argument(str(a.type), not a.has_default_value()) for a in own}

    def problems(self, node: NodeProto) -> list[str]:
        """Return why the module cannot stand for ``node``: what it lacks, or does not take."""
        arguments = self._arguments()
        if arguments is None:
            return []
        names = list(arguments)
        given = len(_without_omitted(node.input))
        found = []
        tensors = [name for name, each in arguments.items() if each.type in _TENSORS]
        if given > len(names):
            count = f"{given} tensors" if given != 1 else "a tensor"
            found.append(
                f"the node gives it {count}, its `forward` takes {quoted(tensors) or 'none'}"
            )
            return found
        attributes = {attribute.name for attribute in node.attribute}
        for name in sorted(attributes):
            if name not in arguments:
                takes = quoted(names[given:]) or "none"
                found.append(
                    f"the node has an attribute `{name}`, which its `forward` does not take "
                    f"(beside tensors it takes {takes})"
                )
            elif name in names[:given]:
                found.append(f"both a tensor and an attribute of the node are its `{name}`")
        found += [
            f"its `forward` needs `{name}`, and the node has neither a tensor nor an attribute for "
            "it"
            for name in names[given:]
            if arguments[name].required and name not in attributes
        ]
        return found

    def ignored(self, node: NodeProto) -> list[str]:
        """Return the attributes of ``node`` that the module is not given: they are part of it."""
        if self._arguments() is not None:
            return []
        return sorted(attribute.name for attribute in node.attribute)

    # -- running

    def run(
        self, arguments: Sequence[Array | None], attributes: Mapping[str, Any] | None = None
    ) -> list[Array]:
        """Return the results of the module, in order.

        Args:
            arguments: Its tensors, in order; None for one that is omitted.
            attributes: Name -> value of what else `forward` takes by name.

        Raises:
            ModuleMismatch: If it gives back something else than tensors.
            ModuleRejected: If it raises an error.
        """
        torch = self._torch
        takes = self._arguments()
        named = {}
        if takes is not None:
            named = {
                name: _fitting(value, takes[name].type if name in takes else "")
                for name, value in (attributes or {}).items()
            }
        try:
            given = [None if array is None else self._tensor(array) for array in arguments]
            named = {
                name: self._tensor(value) if isinstance(value, np.ndarray) else value
                for name, value in named.items()
            }
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                found = self._module(*given, **named)
            return [self._array(value, index) for index, value in enumerate(_flat(found))]
        except self._errors as error:
            raise ModuleRejected(f"`{self._name}` fails: {self._words(error)}") from error

    def _tensor(self, array: Array) -> Any:
        """Return a copy of ``array`` on the device."""
        torch, name = self._torch, array.dtype.name
        copy = np.array(array, order="C")
        if name in _BY_BITS:
            bits = torch.from_numpy(copy.view(f"i{copy.dtype.itemsize}"))
            return bits.view(getattr(torch, name)).to(self._device)
        if name not in _DIRECT:
            raise ModuleRejected(f"`{self._name}` is given {name}, a type that torch does not have")
        return torch.from_numpy(copy).to(self._device)

    def _array(self, value: Any, index: int) -> Array:
        torch = self._torch
        if not isinstance(value, torch.Tensor):
            raise ModuleMismatch(
                f"result {index} of `{self._name}` is {_article(type(value).__name__)}, not a tensor"
            )
        tensor = value.detach().to("cpu")
        if tensor.layout is not torch.strided:
            tensor = tensor.to_dense()
        if tensor.is_quantized:
            tensor = tensor.dequantize()
        name = str(tensor.dtype).removeprefix("torch.")
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        if name in _BY_BITS:
            bits = torch.int8 if tensor.element_size() == 1 else torch.int16
            found: Array = tensor.view(bits).numpy().view(dtype_of(name))
            return found
        if name not in _DIRECT:
            raise ModuleMismatch(
                f"result {index} of `{self._name}` is {name}, a type that ONNX does not have"
            )
        array: Array = tensor.numpy(force=True)
        return array


_TENSORS: Final = frozenset({"Tensor", "Optional[Tensor]"})


@dataclass(frozen=True, slots=True)
class Expected:
    """What a result has to be.

    Attributes:
        dtype: Of numpy or ml_dtypes; None where nothing says it.
        dims: One entry an axis: an extent, or None for any; None where the rank is not known.
    """

    dtype: np.dtype[Any] | None
    dims: tuple[int | None, ...] | None

    def why_not(self, array: Array) -> str | None:
        """Return how ``array`` is something else, or None."""
        if self.dtype is not None and array.dtype != self.dtype:
            return f"{array.dtype.name}, and has to be {self.dtype.name}"
        if self.dims is None:
            return None
        fits = len(self.dims) == array.ndim and all(
            wanted in (None, extent) for wanted, extent in zip(self.dims, array.shape, strict=True)
        )
        wanted = ", ".join("?" if dim is None else str(dim) for dim in self.dims)
        return None if fits else f"of shape {list(array.shape)}, and has to be [{wanted}]"


class ModuleNode:
    """A node of a model that a module runs.

    Args:
        node: The node.
        module: What runs it.
        constants: Name of a tensor that the node reads -> its values, where the model has them.
    """

    def __init__(
        self, node: NodeProto, module: TorchModule, constants: Mapping[str, Array]
    ) -> None:
        self.module = module
        self._constants = constants
        self._inputs = _without_omitted(node.input)
        self._outputs = tuple(node.output)
        self._attributes = {a.name: _value_of(a) for a in node.attribute}

    @classmethod
    def of_model(cls, path: Path, module: TorchModule) -> Self:
        """Return the node of the model in the file at ``path``, which has no other."""
        model = onnx.load(path, load_external_data=False)
        (node,) = model.graph.node
        constants = {
            tensor.name: StoredValues(tensor, path.parent).load()
            for tensor in model.graph.initializer
        }
        return cls(node, module, constants)

    def run(
        self, values: Mapping[str, Any], expected: Mapping[str, Expected] | None = None
    ) -> dict[str, Array]:
        """Return the outputs of the node by name.

        Args:
            values: Name -> array of each input that is no constant.
            expected: Name of an output -> what it has to be.

        Raises:
            ModuleMismatch: If the module gives something else than the node does.
            ModuleRejected: If it fails.
        """
        arguments: list[Array | None] = []
        for name in self._inputs:
            value = self._constants[name] if name in self._constants else values.get(name)
            if name and not isinstance(value, np.ndarray | np.generic):
                raise ModuleRejected(f"`{name}` is no tensor, and modules take tensors only")
            arguments.append(np.asarray(value) if name else None)
        results = self.module.run(arguments, self._attributes)
        if len(results) != len(self._outputs):
            gives = "1 tensor" if len(results) == 1 else f"{len(results)} tensors"
            raise ModuleMismatch(
                f"`{self.module._name}` gives {gives}, and has to give {len(self._outputs)}: "
                + quoted(name for name in self._outputs if name)
            )
        found = dict(zip(self._outputs, results, strict=True))
        found.pop("", None)
        for index, name in enumerate(self._outputs):
            wanted = (expected or {}).get(name)
            reason = wanted.why_not(found[name]) if wanted is not None else None
            if reason is not None:
                raise ModuleMismatch(
                    f"result {index} of `{self.module._name}`, `{name}`, is {reason}"
                )
        return found


def _value_of(attribute: AttributeProto) -> Any:
    """Return an attribute as a module takes it."""
    if attribute.type == AttributeProto.TENSOR:
        return numpy_helper.to_array(attribute.t)
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, int | float | str):
        return value
    return [each.decode(errors="replace") if isinstance(each, bytes) else each for each in value]


def _fitting(value: Any, type_: str) -> Any:
    """Return ``value`` as an argument of TorchScript type ``type_``: ONNX has no bool, and ints for it."""
    wanted = type_.removeprefix("Optional[").removesuffix("]") if "Optional" in type_ else type_
    if wanted == "bool" and isinstance(value, int):
        return bool(value)
    if wanted == "float" and isinstance(value, int):
        return float(value)
    if isinstance(value, list) and wanted == "List[bool]":
        return [bool(each) for each in value]
    if isinstance(value, list) and wanted == "List[float]":
        return [float(each) for each in value]
    if wanted == "Tensor" and isinstance(value, int | float | list):
        dtype = np.int64 if np.asarray(value).dtype.kind == "i" else np.float32
        return np.asarray(value, dtype)
    return value


def _without_omitted(names: Sequence[str]) -> tuple[str, ...]:
    """Return the inputs of a node without those that are left out at its end."""
    given = list(names)
    while given and not given[-1]:
        given.pop()
    return tuple(given)


def _flat(value: Any) -> list[Any]:
    """Return results in order, tuples and lists in them taken apart."""
    if isinstance(value, tuple | list):
        return [item for each in value for item in _flat(each)]
    return [value]


def _article(noun: str) -> str:
    return f"an {noun}" if noun[:1] in "aeiou" else f"a {noun}"
