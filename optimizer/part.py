"""A scope compiled on its own: where the original is cut for it, and what leads to it.

What is computed from the tensors that enter a scope is compiled, and held against the same part of
the original. To find out what enters, the rest of the original is run before it, on inputs of the
whole: the user's, or made-up ones. So the part sees in verification what it will see in use, and the
data that a spec names serve the whole and each of its scopes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import helper

from optc.optimizer.arrays import dtype_name, dtype_of
from optc.optimizer.asked_stages import nodes_of_scope
from optc.optimizer.custom_library import Libraries
from optc.optimizer.cut import Cut, tensors_of
from optc.optimizer.model_file import load_graph, read_model
from optc.optimizer.reference import Model, Rejected
from optc.optimizer.samples import Sample
from optc.passes.determinism import is_deterministic
from optc.passes.graph import reads
from optc.passes.shape import Shapes, annotate, infer
from optc.specs.check import CheckedSpec
from optc.specs.compile_spec import CompileSpec, Demands, Range
from optc.specs.diagnostic import Diagnostic, InputError, ModelError, SpecError, nearest
from optc.specs.manifest import ModelPart, Size
from optc.specs.model_problem import ResolvedInput
from optc.specs.stage_problem import SHAPE_OPS, asked_of

Array = npt.NDArray[Any]
D = TypeVar("D", bound=Demands)


def part_of(checked: CheckedSpec, stage: str) -> CheckedSpec:
    """Return the spec of the scope ``stage`` alone.

    Its inputs are the tensors that enter the scope, with the extents that shape inference of the
    whole finds for them; of the spec holds on what concerns nodes and tensors of the scope.

    Raises:
        InputError: ``unknown-stage``.
        SpecError: If the scope cannot be one stage, or cannot stand alone.
        ModelError: If the model cannot be read or is damaged.
    """
    _check_known(checked, stage)
    graph = load_graph(read_model(checked.model_path), checked.inputs)
    inside = nodes_of_scope(graph, asked_of(checked.spec.partition), stage, checked.place)
    shapes = infer(graph, opset=graph.opset, ranges=checked.symbol_ranges)
    annotate(graph, shapes)
    borders = _Borders(graph, shapes)
    entering, sizes = borders.entering(inside)
    leaving = borders.leaving(inside)
    problems = [] if leaving else [_leads_nowhere(checked, stage)]
    tensors = {t.name: t for t in (*graph.inputs, *borders.made)}
    for name in (*entering, *leaving):
        if _why_not_alone(tensors[name]):
            problems.append(_not_alone(checked, stage, name, tensors[name]))
    if problems:
        raise SpecError(*problems)
    inputs, profiles = _types(checked, stage, [tensors[name] for name in entering], shapes)
    return replace(
        checked,
        spec=_restricted(
            checked.spec, stage, {*entering, *leaving, *borders.made_in(inside)}, leaving
        ),
        inputs=inputs,
        profiles=profiles,
        part=ModelPart(
            stage=stage,
            outputs=tuple(leaving),
            sizes=sizes,
            original_inputs=tuple(tensors_of(checked.inputs)),
            original_profiles=checked.profiles,
        ),
    )


def _check_known(checked: CheckedSpec, stage: str) -> None:
    scopes = checked.spec.partition.scopes
    if stage in scopes:
        return
    if not scopes:
        todo = 'name the nodes of the stage in the spec: `partition: {scopes: {backbone: "/backbone/*"}}`'
        problem = f"`{checked.path}` has no scopes, which are what can be compiled on their own"
    else:
        near = nearest(stage, scopes)
        problem = f"`{checked.path}` has no scope called `{stage}`"
        todo = f"write `{near}`" if near else f"write one of {', '.join(scopes)}"
    raise InputError(
        Diagnostic("unknown-stage", problem, todo, checked.place("partition", key=True))
    )


# --- where it is cut -----------------------------------------------------------------------------


class _Borders:
    """What passes between nodes of a graph, but for sizes, which each part finds out for itself."""

    def __init__(self, graph: gs.Graph, shapes: Shapes) -> None:
        self._graph = graph
        self._shapes = shapes
        self._makers = {t.name: node for node in graph.nodes for t in node.outputs if t.name}
        self._order = {t.name: n for n, t in enumerate((*graph.inputs, *self.made))}
        self._constant: set[str] = set()  # nodes that compute the same in every run
        for node in graph.nodes:
            if is_deterministic(node) and all(map(self._is_constant, reads(node))):
                self._constant.add(node.name)

    @property
    def made(self) -> list[gs.Tensor]:
        """All tensors that nodes make."""
        return [t for node in self._graph.nodes for t in node.outputs if t.name]

    def made_in(self, inside: Collection[str]) -> set[str]:
        """Return the names of what the nodes ``inside`` make."""
        return {t.name for node in self._nodes(inside) for t in node.outputs if t.name}

    def entering(self, inside: Collection[str]) -> tuple[list[str], dict[str, Size]]:
        """Return what the nodes ``inside`` need of others: tensors, and sizes that are known."""
        found: set[str] = set()
        sizes: dict[str, Size] = {}
        pending = self._nodes(inside)
        seen = {node.name for node in pending}
        while pending:
            node = pending.pop()
            if node.op in SHAPE_OPS and (known := self._constants(node)):
                sizes |= known
                continue
            for tensor in reads(node):
                maker = self._makers.get(tensor.name)
                if isinstance(tensor, gs.Constant) or (maker is not None and maker.name in inside):
                    continue
                if maker is None or not (
                    maker.name in self._constant or self._shapes.is_size(tensor.name)
                ):
                    found.add(tensor.name)
                elif (value := self._whole_numbers(tensor.name)) is not None:
                    sizes[tensor.name] = _size(value)
                elif maker.name not in seen:  # it is computed here, too
                    seen.add(maker.name)
                    pending.append(maker)
        return sorted(found, key=self._order.__getitem__), sizes

    def leaving(self, inside: Collection[str]) -> list[str]:
        """Return what the nodes ``inside`` make and others, or the caller, need."""
        others = {node.name for node in self._graph.nodes if node.name not in inside}
        needed, _ = self.entering(others)
        outputs = {tensor.name for tensor in self._graph.outputs}
        made = self.made_in(inside)
        return sorted(made & {*needed, *outputs}, key=self._order.__getitem__)

    def _nodes(self, inside: Collection[str]) -> list[gs.Node]:
        return [node for node in self._graph.nodes if node.name in inside]

    def _is_constant(self, tensor: gs.Tensor) -> bool:
        maker = self._makers.get(tensor.name)
        known = maker is not None and maker.name in self._constant
        return isinstance(tensor, gs.Constant) or not tensor.name or known

    def _whole_numbers(self, name: str) -> Array | None:
        """Return the elements of a tensor of integers or booleans that are always the same."""
        value = self._shapes.constant(name)
        return value if value is not None and value.dtype.kind in "iub" else None

    def _constants(self, node: gs.Node) -> dict[str, Size]:
        """Return the outputs of ``node`` where all are known numbers."""
        values = {t.name: self._whole_numbers(t.name) for t in node.outputs if t.name}
        known = {name: _size(value) for name, value in values.items() if value is not None}
        return known if len(known) == len(values) else {}


def _size(value: Array) -> Size:
    return Size(
        dtype=dtype_name(value.dtype), shape=value.shape, values=tuple(value.ravel().tolist())
    )


def _types(
    checked: CheckedSpec, stage: str, entering: Sequence[gs.Tensor], shapes: Shapes
) -> tuple[dict[str, ResolvedInput], tuple[dict[str, Range], ...]]:
    """Return what enters as inputs of a spec, and the ranges of their axes in each profile."""
    found: list[dict[str, Range]] = [{} for _ in checked.profiles]
    problems = []
    for tensor in entering:
        dims = shapes.dims(tensor.name) or ()
        for axis, (name, dim) in enumerate(zip(tensor.shape, dims, strict=True)):
            ranges = [shapes.axis_range(dim, profile) for profile in checked.profiles]
            known = [each for each in ranges if each is not None]
            if len(known) < len(ranges):
                problems.append(_unbounded(checked, stage, tensor.name, axis, name))
            elif isinstance(name, str):
                for profile, each in zip(found, known, strict=True):
                    profile[name] = each
    if problems:
        raise SpecError(*problems)
    pins = {
        name: extents.min
        for name, extents in found[0].items()
        if all(each[name] == extents and extents.is_fixed for each in found)
    }
    inputs = {
        tensor.name: checked.inputs[tensor.name]
        if tensor.name in checked.inputs
        else ResolvedInput(
            helper.np_dtype_to_tensor_dtype(tensor.dtype),
            tuple(pins.get(axis, axis) for axis in tensor.shape),
        )
        for tensor in entering
    }
    of_inputs = {a for given in checked.inputs.values() for a in given.shape}
    profiles = tuple(
        {name: each for name, each in own.items() if name not in pins}
        | {name: each for name, each in given.items() if name not in of_inputs | own.keys()}
        for own, given in zip(found, checked.profiles, strict=True)
    )
    return inputs, profiles


def _why_not_alone(tensor: gs.Tensor) -> str | None:
    """Return why a tensor cannot be an input or output of a package, or None."""
    if getattr(tensor, "proto", None) is not None:
        return "is no tensor"
    if tensor.dtype is None:
        return "has no known type"
    return "has no known rank" if tensor.shape is None else None


def _not_alone(checked: CheckedSpec, stage: str, name: str, tensor: gs.Tensor) -> Diagnostic:
    return Diagnostic(
        "not-on-its-own",
        f"the scope `{stage}` cannot be compiled on its own: `{name}`, where it is cut, "
        f"{_why_not_alone(tensor)}",
        "let the scope begin or end elsewhere, or compile the whole model",
        checked.place("partition", "scopes", stage),
    )


def _leads_nowhere(checked: CheckedSpec, stage: str) -> Diagnostic:
    return Diagnostic(
        "not-on-its-own",
        f"the scope `{stage}` cannot be compiled on its own: nothing reads what it computes",
        "let it hold nodes that lead to an output of the model",
        checked.place("partition", "scopes", stage),
    )


def _unbounded(
    checked: CheckedSpec, stage: str, tensor: str, axis: int, symbol: str | int
) -> Diagnostic:
    return Diagnostic(
        "axis-without-range",
        f"nothing bounds `{symbol}`, axis {axis} of `{tensor}`, which enters the scope `{stage}`",
        f"give `{symbol}` a range under `dims`",
        checked.place("dims", key=True) or checked.place("partition", "scopes", stage),
    )


def _restricted(
    spec: CompileSpec, stage: str, tensors: AbstractSet[str], outputs: Collection[str]
) -> CompileSpec:
    """Return what of ``spec`` holds for a part of the model that is the scope ``stage``."""
    partition = spec.partition.model_copy(
        update={
            "points": (),  # there is none inside a scope
            "scopes": {stage: ("*",)},
            "replace": tuple(
                each for each in spec.partition.replace if {*each.from_, *each.to} <= tensors
            ),
        }
    )
    verify = spec.verify
    if verify is not None:
        groups = {name: _asked(each, outputs) for name, each in verify.groups.items()}
        verify = _asked(verify, outputs).model_copy(update={"groups": groups})
    precision = spec.precision
    if precision.calibration is not None:  # the file that the spec names holds those of the whole
        calibration = precision.calibration.model_copy(update={"cache": None})
        precision = precision.model_copy(update={"calibration": calibration})
    return spec.model_copy(
        update={"partition": partition, "verify": verify, "precision": precision}
    )


def _asked(demands: D, outputs: Collection[str]) -> D:
    """Return what of ``demands`` is asked of ``outputs``."""
    return demands.model_copy(
        update={
            "outputs": {
                name: asked
                for name, asked in demands.outputs.items()
                if name in outputs or name.partition("[")[0] in outputs
            },
            "detections": tuple(
                each
                for each in demands.detections
                if {each.boxes, each.scores, each.labels or each.boxes} <= set(outputs)
            ),
        }
    )


# --- what leads to it ----------------------------------------------------------------------------


KEPT_BYTES: Final = 1 << 28
"""Of what enters a part, this much is kept in memory: a search runs the same inputs many times."""

Make = Callable[[], Mapping[str, Array]]


class Lead:
    """What of an original comes before a part, and what the whole takes.

    Args:
        part: The part.
        entering: Names of its inputs.
        path: Of the original.
        libraries: Of custom operators that it has.
        modules: Operator, as domain and op -> the torch module that runs its nodes.

    Attributes:
        inputs: Of the whole.
        profiles: Of the whole.
    """

    def __init__(
        self,
        part: ModelPart,
        entering: Sequence[str],
        path: Path,
        libraries: Libraries,
        modules: Mapping[tuple[str, str], Path],
    ) -> None:
        self.inputs = part.original_inputs
        self.profiles = part.original_profiles
        self._entering = tuple(entering)
        self._kept_bytes = 0
        own = {tensor.name for tensor in self.inputs}
        made = [name for name in entering if name not in own]
        self._model = Model(path, libraries, modules, Cut(self.inputs, made, {})) if made else None

    def takes(self, given: Collection[str]) -> bool:
        """Whether arrays of these names are for the whole, not for the part itself."""
        own = {tensor.name for tensor in self.inputs}
        return own <= set(given) or not set(self._entering) <= set(given)

    def feeds(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """Return what enters the part where the whole is given ``given``.

        Raises:
            Rejected: If the original does not take it.
            ModelError: ``cannot-run-original``.
        """
        made = dict(given)
        if self._model is not None:
            made |= self._model.runner.run(given)
        return {name: made[name] for name in self._entering}

    def samples(self, found: Sequence[Sample]) -> list[Sample]:
        """Return samples of the whole as samples of the part."""
        return [replace(each, load=self.kept(each.name, each.load)) for each in found]

    def kept(self, name: str, make: Make) -> Callable[[], dict[str, Array]]:
        """Return what makes input of the part, of what makes input of the whole.

        It raises ModelError, ``data-rejected``, where the original does not take the input.
        """
        known: list[dict[str, Array]] = []

        def made() -> dict[str, Array]:
            if known:
                return known[0]
            try:
                found = self.feeds(make())
            except Rejected as error:
                raise ModelError(
                    Diagnostic(
                        "data-rejected",
                        f"`{name}`: the original model does not run on it: {error}",
                        "give inputs that the original takes",
                    )
                ) from error
            self._kept_bytes += sum(array.nbytes for array in found.values())
            if self._kept_bytes <= KEPT_BYTES:
                known.append(found)
            return found

        return made

    @property
    def asked(self) -> dict[str, ResolvedInput]:
        """The inputs of the whole as things to make up; of type 0 where one is no tensor."""
        return {
            tensor.name: ResolvedInput(_number(tensor.dtype), tensor.shape or (), tensor.range)
            for tensor in self.inputs
        }


def _number(dtype: str) -> int:
    try:
        return int(helper.np_dtype_to_tensor_dtype(dtype_of(dtype)))
    except KeyError:
        return 0
