"""What a package or model is given to run on, held against what it takes. All problems at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from optc.optimizer.arrays import dtype_name, dtype_of, typed
from optc.specs.compile_spec import Range
from optc.specs.diagnostic import Diagnostic, InputError, nearest, quoted
from optc.specs.manifest import Tensor

Array = npt.NDArray[Any]
_AXIS = "axis {} of `{}`"


class Signature(Protocol):
    """What something takes: a manifest says it of a package.

    Attributes:
        inputs: In their order.
        profiles: The extents that symbols may have together; none where any will do.
    """

    @property
    def inputs(self) -> Sequence[Tensor]: ...  # noqa: D102 - said above
    @property
    def profiles(self) -> Sequence[Mapping[str, Range]]: ...  # noqa: D102


def checked_feed(
    signature: Signature, given: Mapping[str, Any], *, taker: str = "package"
) -> dict[str, Any]:
    """Return ``given`` as arrays, by the names of the inputs of ``signature`` and in their order.

    Opaque bytes (see `optc.optimizer.arrays`) take the dtype that is wanted, text becomes an
    array of Python strings; nothing else is converted.

    Args:
        signature: What is taken.
        given: Name of an input -> its value.
        taker: What takes it, in the words of an error.

    Raises:
        InputError: With one diagnostic a problem: ``missing-input``, ``unknown-input``,
            ``wrong-dtype``, ``wrong-rank``, ``wrong-extent``, ``symbol-conflict``,
            ``outside-profiles``.
    """
    inputs = {tensor.name: tensor for tensor in signature.inputs}
    problems = list(_name_problems(inputs, given, taker))
    feed = {name: _value(tensor, given[name]) for name, tensor in inputs.items() if name in given}
    axes: dict[str, tuple[int, str]] = {}
    for name, value in feed.items():
        if isinstance(value, np.ndarray):
            problems += _array_problems(inputs[name], value, axes, taker)
    problems += _profile_problems(signature.profiles, axes)
    if problems:
        raise InputError(*problems)
    return feed


def _value(tensor: Tensor, given: Any) -> Any:
    if not _is_dense(tensor):
        return given  # a sequence or map: its runtime says what it thinks of it
    array = typed(np.asarray(given), tensor.dtype)
    if array.dtype.kind in "UT":
        return array.astype(object)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _is_dense(tensor: Tensor) -> bool:
    try:
        dtype_of(tensor.dtype)
    except KeyError:
        return False
    return True


def _name_problems(
    inputs: Mapping[str, Tensor], given: Mapping[str, Any], taker: str
) -> Iterator[Diagnostic]:
    unknown = [name for name in given if name not in inputs]
    for name in inputs:
        if name not in given:
            yield Diagnostic(
                "missing-input",
                f"the input `{name}` is missing",
                f"give an array {_wanted(inputs[name])} called `{name}`",
            )
    for name in unknown:
        guess = nearest(name, [known for known in inputs if known not in given] or inputs)
        takes = quoted(inputs) or "no input at all"
        yield Diagnostic(
            "unknown-input",
            f"there is no input called `{name}`",
            f"call it `{guess}`" if guess else f"the {taker} takes {takes}",
        )


def _array_problems(
    tensor: Tensor, array: Array, axes: dict[str, tuple[int, str]], taker: str
) -> Iterator[Diagnostic]:
    """Yield what is wrong with one array, and note in ``axes`` what its symbols are."""
    found = dtype_name(array.dtype) if array.dtype.kind != "V" or array.dtype.isbuiltin else ""
    if _is_text(array) != (tensor.dtype == "string") or found != tensor.dtype:
        yield Diagnostic(
            "wrong-dtype",
            f"`{tensor.name}` is {array.dtype}, the {taker} takes {tensor.dtype}",
            f"convert it: nothing is cast on the way; it takes an array {_wanted(tensor)}",
        )
    if tensor.shape is None:
        return
    if array.ndim != len(tensor.shape):
        yield Diagnostic(
            "wrong-rank",
            f"`{tensor.name}` has shape {_shape(array.shape)}, which is {array.ndim} axes; the "
            f"{taker} takes {len(tensor.shape)}: {_shape(tensor.shape)}",
            f"give an array {_wanted(tensor)}",
        )
        return
    for axis, (extent, wanted) in enumerate(zip(array.shape, tensor.shape, strict=True)):
        where = _AXIS.format(axis, tensor.name)
        if isinstance(wanted, int):
            if extent != wanted:
                yield Diagnostic(
                    "wrong-extent",
                    f"{where} is {extent}, the {taker} takes {wanted}: the shape is "
                    f"{_shape(array.shape)}, wanted is {_shape(tensor.shape)}",
                    f"give an array {_wanted(tensor)}",
                )
            continue
        known, place = axes.setdefault(wanted, (extent, where))
        if known != extent:
            yield Diagnostic(
                "symbol-conflict",
                f"`{wanted}` is {known} at {place} and {extent} at {where}",
                f"give both the same extent: they are one axis, `{wanted}`",
            )


def _is_text(array: Array) -> bool:
    """Whether an array of objects holds text and nothing else."""
    return array.dtype == object and all(isinstance(item, str) for item in array.reshape(-1))


def _profile_problems(
    profiles: Sequence[Mapping[str, Range]], axes: Mapping[str, tuple[int, str]]
) -> Iterator[Diagnostic]:
    sizes = {symbol: extent for symbol, (extent, _) in axes.items()}
    if not profiles or any(all(_holds(p, s, sizes[s]) for s in sizes) for p in profiles):
        return
    alone = [s for s in sizes if not any(_holds(profile, s, sizes[s]) for profile in profiles)]
    for symbol in alone:
        ranges = dict.fromkeys(_words(p[symbol]) for p in profiles if symbol in p)
        yield Diagnostic(
            "outside-profiles",
            f"`{symbol}` is {sizes[symbol]} ({axes[symbol][1]}), which no profile holds: "
            f"{' or '.join(ranges)}",
            f"give an extent in that range, or widen `{symbol}` in the spec and compile again",
        )
    if not alone:
        asked = ", ".join(f"`{symbol}` = {extent}" for symbol, extent in sizes.items())
        listed = "; ".join(
            ", ".join(f"`{s}` {_words(p[s])}" for s in sizes if s in p) for p in profiles
        )
        yield Diagnostic(
            "outside-profiles",
            f"no profile holds {asked} together; the profiles: {listed}",
            "give extents that one profile holds, or add a profile to the spec and compile again",
        )


def _holds(profile: Mapping[str, Range], symbol: str, extent: int) -> bool:
    return symbol not in profile or profile[symbol].min <= extent <= profile[symbol].max


def _words(extents: Range) -> str:
    if extents.min == extents.max:
        return str(extents.min)
    return f"{extents.min} to {extents.max}"


def _wanted(tensor: Tensor) -> str:
    shape = "" if tensor.shape is None else f" of shape {_shape(tensor.shape)}"
    return f"of {tensor.dtype}{shape}"


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
