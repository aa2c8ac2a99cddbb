"""What in a spec contradicts the model, and what the spec makes of the model's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from optc.specs.compile_spec import Demands, Exactness, Input, Range, Selector
from optc.specs.diagnostic import Diagnostic, Place, nearest, quoted
from optc.specs.likely import likely_range
from optc.specs.model_outline import Dim, Outline, OutlineNode, Value
from optc.specs.onnx_ops import ONNX_OPS
from optc.specs.replace_problem import NAME_AN_OUTPUT, unknown_ends
from optc.specs.schema_problem import Path, Reading
from optc.specs.source import Source, Table, find, find_key, written
from optc.specs.stage_problem import Flow, FlowNode, asked_of

FLOATS: Final = frozenset({1, 10, 11, 14, 15, 16, 17, 18, 19, 20})
"""``TensorProto.DataType`` of floats and complex numbers."""
EXACT: Final[Mapping[int, str]] = {8: "texts", 9: "booleans"}
"""Of what two of are equal or not, and nothing in between."""
MOST_LISTED: Final = 12
"""Names of the model that a message lists."""


@dataclass(frozen=True, slots=True)
class ResolvedInput:
    """An input as the spec has it.

    Attributes:
        dtype: ``TensorProto.DataType``; 0 for an input that is no tensor.
        shape: Outermost axis first: an extent, also where the spec pins it, or a symbol.
        range: Lowest and highest value of made-up input, where the spec says so.
    """

    dtype: int
    shape: tuple[str | int, ...]
    range: tuple[float, float] | None = None


@dataclass
class Comparison:
    """A spec against the outline of its model.

    `run` fills ``inputs``, ``profiles`` and ``problems`` (errors and notes).
    """

    source: Source
    reading: Reading
    outline: Outline
    inputs: dict[str, ResolvedInput] = field(default_factory=dict)
    profiles: tuple[dict[str, Range], ...] = ()
    problems: list[Diagnostic] = field(default_factory=list)
    _shapeless: bool = False
    """Whether some input has no shape, so that its symbols are not known."""

    def run(self) -> None:
        """Compare everything that is valid in itself."""
        self._resolve_inputs()
        self._resolve_ranges()
        self._compare_points()
        spec = self.reading.spec
        self._compare_selectors(spec.partition.off_tensorrt, ("partition", "off_tensorrt"))
        self._compare_stages()
        self.problems += unknown_ends(spec.partition.replace, self.outline, self._place)
        self._compare_selectors(spec.precision.keep_fp32, ("precision", "keep_fp32"))
        self._compare_selectors(spec.precision.layers, ("precision", "layers"))
        if spec.verify is not None:
            self._compare_demands(spec.verify, ("verify",))
            for name, group in spec.verify.groups.items():
                self._compare_demands(group, ("verify", "groups", name))

    # ------------------------------------------------------------------ inputs

    def _resolve_inputs(self) -> None:
        given = self.reading.spec.inputs
        values = {v.name: v for v in self.outline.inputs if v.name not in self.outline.initialisers}
        for name in given:
            if name not in values:
                self._unknown_input(name, values)
        for name, value in values.items():
            if name in self._faulty_inputs:
                continue
            said = given.get(name, Input())
            shape = self._shape_of(value, said)
            if shape is None:
                self._shapeless = True
            else:
                self.inputs[name] = ResolvedInput(value.elem_type, shape, said.range)

    def _unknown_input(self, name: str, inputs: Iterable[str]) -> None:
        near = nearest(name, inputs)
        problem = f"the model has no input `{name}`"
        if name in self.outline.initialisers:
            problem += ": that is a weight"
        todo = f"write `{near}`" if near else f"its inputs are {quoted(inputs, MOST_LISTED)}"
        self._error("unknown-input", problem, todo, self._key("inputs", name))

    def _shape_of(self, value: Value, said: Input) -> tuple[str | int, ...] | None:
        """Return the shape of an input, or None where there is none or it is faulty."""
        name, dims = value.name, value.dims
        if said.shape is None:
            if dims is None and value.elem_type:
                self._error(
                    "input-without-shape",
                    f"the model gives no shape for its input `{name}`",
                    f"add `inputs: {{{name}: {{shape: [batch, 3, 224, 224]}}}}` with its real axes",
                    self._key("inputs", name) or self._key("model"),
                )
            return None if dims is None else tuple(_named(name, a, d) for a, d in enumerate(dims))
        path = ("inputs", name, "shape")
        if dims is None:
            return tuple(_named(name, axis, dim) for axis, dim in enumerate(said.shape))
        if len(said.shape) != len(dims):
            self._error(
                "rank-mismatch",
                f"`{name}` has {len(dims)} axes in the model, and {len(said.shape)} here",
                f"the model says {_shown(dims)}",
                self._place(*path),
            )
            return None
        shape: list[str | int] = []
        for axis, (dim, mine) in enumerate(zip(dims, said.shape, strict=True)):
            if isinstance(dim, int) and mine != dim:
                self._error(
                    "fixed-axis",
                    f"axis {axis} of `{name}` is {dim} in the model and cannot be `{mine}`",
                    f"write {dim}; to change it, export the model with that axis dynamic",
                    self._place(*path, axis),
                )
            elif mine == 0 and dim != 0:
                self._error(
                    "out-of-range",
                    f"axis {axis} of `{name}` is pinned to 0, which leaves no element",
                    "write 1 or more",
                    self._place(*path, axis),
                )
            shape.append(dim if isinstance(dim, int) else _named(name, axis, mine))
        return tuple(shape)

    # ------------------------------------------------------------------ ranges

    def _resolve_ranges(self) -> None:
        spec = self.reading.spec
        given = list(spec.profiles) or [spec.dims]
        uses = self._uses()
        if not self._faulty_inputs and not self._shapeless:
            self._unknown_symbols(uses)
        self._missing_ranges(uses, given)
        pins = {
            symbol: given[0][symbol].min
            for symbol in uses
            if all(symbol in profile and profile[symbol].is_fixed for profile in given)
            and len({profile[symbol].min for profile in given}) == 1
        }
        self.inputs = {
            name: ResolvedInput(
                value.dtype,
                tuple(pins.get(dim, dim) if isinstance(dim, str) else dim for dim in value.shape),
                value.range,
            )
            for name, value in self.inputs.items()
        }
        self.profiles = tuple(
            {symbol: range_ for symbol, range_ in profile.items() if symbol not in pins}
            for profile in given
        )

    def _uses(self) -> dict[str, list[tuple[str, int]]]:
        """Return each symbol of the inputs with the axes that bear it."""
        uses: dict[str, list[tuple[str, int]]] = {}
        for name, value in self.inputs.items():
            for axis, dim in enumerate(value.shape):
                if isinstance(dim, str):
                    uses.setdefault(dim, []).append((name, axis))
        return uses

    def _missing_ranges(
        self, uses: dict[str, list[tuple[str, int]]], given: Sequence[dict[str, Range]]
    ) -> None:
        root, profiles = self.reading.root, self.reading.spec.profiles
        if any(nearest(key, ("dims", "profiles")) for key in root.faulty):
            return  # what is in there is not known
        tables = [find(root, "profiles", i) for i in range(len(profiles))] or [find(root, "dims")]
        faulty = [table.faulty if isinstance(table, Table) else set() for table in tables]
        missing = {
            symbol: f"{written(symbol)}: {self._likely(symbol, axes)}"
            for symbol, axes in uses.items()
            if not any(symbol in profile for profile in given)
            and not any(symbol in keys for keys in faulty)
        }
        for symbol, line in missing.items():
            if profiles:
                todo = f"add `{line}` to each profile, or a number to pin it"
            elif isinstance(tables[0], Table):
                todo = f"add `{line}` to `dims`, or a number to pin it"
            else:
                todo = f"add the line `dims: {{{', '.join(missing.values())}}}`, with your numbers"
            self._error(
                "axis-without-range",
                f"`{symbol}` has no range: it is {_axes(uses[symbol])}",
                todo,
                self._key("profiles") or self._key("dims") or self._key("model"),
            )
        for index, profile in enumerate(profiles):
            for symbol in uses.keys() - profile.keys() - faulty[index] - missing.keys():
                self._error(
                    "axis-without-range",
                    f"this profile gives no range for `{symbol}`, which is {_axes(uses[symbol])}",
                    f"add `{written(symbol)}: {self._likely(symbol, uses[symbol])}`, or a number",
                    self._place("profiles", index),
                )

    def _likely(self, symbol: str, axes: list[tuple[str, int]]) -> Range:
        name, axis = axes[0]
        return likely_range(symbol, self.inputs[name].shape, axis)[0]

    def _unknown_symbols(self, uses: dict[str, list[tuple[str, int]]]) -> None:
        spec = self.reading.spec
        renamed: dict[str, str] = {}
        for value in self.outline.inputs:
            if value.name in self.inputs and value.dims is not None:
                shape = self.inputs[value.name].shape
                for axis, (old, new) in enumerate(zip(value.dims, shape, strict=True)):
                    if not isinstance(old, int):
                        renamed[f"{value.name}_{axis}"] = str(new)
                        renamed.setdefault(old or "", str(new))
        renamed = {old: new for old, new in renamed.items() if old not in uses}
        inner = {
            dim
            for value in [*self.outline.outputs, *self.outline.values]
            for dim in value.dims or ()
            if isinstance(dim, str) and dim not in renamed
        }
        places: list[Path] = [("dims", symbol) for symbol in spec.dims]
        for index, profile in enumerate(spec.profiles):
            places += [("profiles", index, symbol) for symbol in profile]
        for path in places:
            symbol = str(path[-1])
            if symbol in uses or symbol in inner or self._is_inner_axis(symbol):
                continue
            if symbol in renamed:
                todo = f"that axis is called `{renamed[symbol]}` here"
            elif near := nearest(symbol, {*uses, *inner}):
                todo = f"write `{near}`"
            elif uses:
                todo = f"the dynamic axes of the inputs are {quoted(uses, MOST_LISTED)}"
            else:
                todo = "leave it out: no axis of the inputs is dynamic"
            problem = f"no dynamic axis of the model is called `{symbol}`"
            self._error("unknown-symbol", problem, todo, self._key(*path))

    def _is_inner_axis(self, symbol: str) -> bool:
        """Return whether ``symbol`` is made of a tensor's name and an axis."""
        tensor, _, axis = symbol.rpartition("_")
        return axis.isdecimal() and tensor in self._made

    # ------------------------------------------------------------------ tensors and nodes

    def _compare_points(self) -> None:
        points = self.reading.spec.partition.points
        made = self._made if points else {}
        inputs = {value.name for value in self.outline.inputs}
        for index, point in enumerate(each.tensor for each in points):
            if point is None:
                continue
            node = made.get(point)
            place = self._place("partition", "points", index)
            if node is not None and node.depth == 0 and node.op_type != "Constant":
                continue
            if node is not None and node.depth > 0:
                problem = f"`{point}` is made inside the body of a control-flow node or function"
            elif point in inputs:
                problem = f"`{point}` is an input of the model: no stage comes before it"
            elif node is not None or point in self.outline.initialisers:
                problem = f"`{point}` is a constant: no stage computes it"
            else:
                near = nearest(point, made)
                todo = f"the nearest name is `{near}`" if near else NAME_AN_OUTPUT
                problem = f"the model has no tensor `{point}`"
                self._error("unknown-tensor", problem, todo, place)
                continue
            todo = NAME_AN_OUTPUT
            self._error("bad-point", problem, todo, place)

    def _compare_selectors(self, selectors: Sequence[Selector], path: Path) -> None:
        for index, selector in enumerate(selectors):
            if selector.op is not None:
                self._compare_op(selector.op, self._place(*path, index, "op"))
            elif selector.node is not None:
                # A scope has patterns for selectors, and one pattern stands in place of a list.
                ways = ((*path, index, "node"), (*path, index), path)
                place = next(filter(None, (self._place(*way) for way in ways)), None)
                self._compare_node(selector.node, place)

    def _compare_node(self, pattern: str, place: Place | None) -> None:
        if any(Selector(node=pattern).matches("", name) for name in self._names):
            return
        near = nearest(pattern, self._names)
        self._error(
            "unknown-node",
            f"no node of the model has a name that matches `{pattern}`",
            f"the nearest name is `{near}`"
            if near
            else "a node without a name is called `<op>_<position>`, such as `Conv_0`",
            place,
        )

    def _compare_stages(self) -> None:
        """Compare scopes, groups and the nodes of partition points, and ask what is in their way."""
        partition = self.reading.spec.partition
        asked = asked_of(partition)
        by_node = [each for each in partition.points if each.node is not None]
        if not (asked or by_node):
            return
        for each in asked:
            self._compare_selectors(each.selectors, each.keys)
        for index, point in enumerate(partition.points):
            if point.node is not None:
                path = ("partition", "points", index)
                self._compare_node(point.node, self._place(*path, "node") or self._place(*path))
        if self.outline.has_functions:
            return  # their nodes show when they are inlined: it is asked again then
        nodes = self._flow_nodes()
        flow = Flow.of(nodes, asked)
        self.problems += flow.problems(self._place)
        self.problems += flow.points_inside(nodes, partition.points, self._place)

    def _flow_nodes(self) -> list[FlowNode]:
        """Return the nodes of the main graph, constants left out, each with what is in its bodies."""
        found: list[FlowNode] = []
        inner: list[tuple[OutlineNode, str]] = []
        pairs = list(zip(self.outline.nodes, self._names, strict=True))
        for node, name in reversed(pairs):  # the nodes of its bodies follow a node
            inner.append((node, name))
            if node.depth == 0:
                if node.op_type != "Constant":
                    made = {name for each, _ in inner for name in each.outputs}
                    read = {name for each, _ in inner for name in each.inputs}
                    kinds = tuple((each.op_type, own) for each, own in reversed(inner))
                    found.append(FlowNode(name, kinds, frozenset(read - made), node.outputs))
                inner.clear()
        return found[::-1]

    def _compare_op(self, op: str, place: Place | None) -> None:
        ops = {node.op_type for node in self.outline.nodes}
        if op in ops:
            return
        if op in ONNX_OPS:
            problem = f"no node of the model is a {op}"
            self.problems.append(Diagnostic("op-not-in-model", problem, None, place, "note"))
            return
        near = nearest(op, sorted(ops)) or nearest(op, sorted(ONNX_OPS))
        todo = (
            f"write `{near}`"
            if near
            else f"the ops of the model are {quoted(sorted(ops), MOST_LISTED)}"
        )
        problem = f"neither the model nor ONNX has an op `{op}`"
        self._error("unknown-op", problem, todo, place)

    # ------------------------------------------------------------------ outputs

    def _compare_demands(self, demands: Demands, path: Path) -> None:
        """Compare what is asked of outputs by name."""
        outputs = {value.name: value for value in self.outline.outputs}
        for name, asked in demands.outputs.items():
            place = self._key(*path, "outputs", name)
            value = outputs.get(name.partition("[")[0]) if name not in outputs else outputs[name]
            if value is None:
                self._unknown_output(name, outputs, place)
            else:
                self._compare_exactness(value, asked, (*path, "outputs", name))
        for index, boxes in enumerate(demands.detections):
            for key in ("boxes", "scores", "labels"):
                name = getattr(boxes, key)
                if name is not None and name not in outputs:
                    place = self._place(*path, "detections", index, key)
                    self._unknown_output(name, outputs, place)
            dims = outputs[boxes.boxes].dims if boxes.boxes in outputs else None
            if dims and boxes.boxes != boxes.scores and dims[-1] != 4 and isinstance(dims[-1], int):
                self._error(
                    "not-boxes",
                    f"`{boxes.boxes}` is {_shown(dims)}: its last axis does not hold four corners",
                    "name the output that has them",
                    self._place(*path, "detections", index, "boxes"),
                )

    def _unknown_output(self, name: str, outputs: Iterable[str], place: Place | None) -> None:
        near = nearest(name, outputs)
        todo = f"write `{near}`" if near else f"its outputs are {quoted(outputs, MOST_LISTED)}"
        self._error("unknown-output", f"the model has no output `{name}`", todo, place)

    def _compare_exactness(self, value: Value, asked: Exactness, path: Path) -> None:
        """Refuse what says nothing of outputs of that type."""
        if value.elem_type in FLOATS:
            wrong, kind, todo = {"agreement"}, "floats", "write `atol`, `of_scale` or `cosine`"
        elif value.elem_type in EXACT:
            wrong, kind = set(Exactness.model_fields) - {"agreement"}, EXACT[value.elem_type]
            todo = "write `agreement`"
        else:
            return
        for key in Exactness.model_fields:
            if key in wrong and getattr(asked, key) is not None:
                self._error(
                    "not-for-this-output",
                    f"`{key}` says nothing of `{value.name}`, which holds {kind}",
                    todo,
                    self._key(*path, key),
                )

    # ------------------------------------------------------------------ what both sides have

    @cached_property
    def _faulty_inputs(self) -> set[str]:
        """Names of inputs whose shape is not known, as the spec's word on it is faulty."""
        root = self.reading.root
        if any(nearest(key, ("inputs",)) for key in root.faulty):
            return {value.name for value in self.outline.inputs}
        table = find(root, "inputs")
        if not isinstance(table, Table):
            return set()
        inner = {name: value for name, (_, value) in table.entries.items()}
        shapeless = {n for n, v in inner.items() if isinstance(v, Table) and "shape" in v.faulty}
        return table.faulty | shapeless

    @cached_property
    def _made(self) -> dict[str, OutlineNode]:
        """Each tensor that a node makes, with the node; the main graph's first."""
        made: dict[str, OutlineNode] = {}
        for node in sorted(self.outline.nodes, key=lambda node: node.depth):
            for name in filter(None, node.outputs):
                made.setdefault(name, node)
        return made

    @cached_property
    def _names(self) -> list[str]:
        """Names of all nodes; one without a name bears what the loader will call it."""
        return [node.name or f"{node.op_type}_{node.index}" for node in self.outline.nodes]

    def _error(self, code: str, problem: str, todo: str | None, place: Place | None) -> None:
        self.problems.append(Diagnostic(code, problem, todo, place))

    def _place(self, *path: str | int) -> Place | None:
        node = find(self.reading.root, *path)
        return None if node is None else self.source.place(node)

    def _key(self, *path: str | int) -> Place | None:
        node = find_key(self.reading.root, *path)
        return None if node is None else self.source.place(node)


def _named(name: str, axis: int, dim: Dim) -> str | int:
    """Return an axis of an input by its own name, where it has none."""
    return f"{name}_{axis}" if dim in (None, "?", -1) else dim


def _shown(dims: Iterable[Dim]) -> str:
    return f"[{', '.join('?' if dim is None else str(dim) for dim in dims)}]"


def _axes(axes: list[tuple[str, int]]) -> str:
    return " and ".join(f"axis {axis} of `{name}`" for name, axis in axes)
