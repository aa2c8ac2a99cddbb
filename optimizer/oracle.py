"""What TensorRT refuses, asked of its own parser and builder with the real nodes.

The parser names every node that its op checkers refuse, but of those whose import fails only the
first. So after each answer every node of a refused op is asked about on its own, and the model
again without what was refused, until the parser takes what is left. What a few ops do in the
builder, whatever the parser says, only a trial build of the node tells.

A node on its own is a model of that node, its constants and the shape arithmetic that leads to it.
The answer depends on nothing else, so it is kept, in memory and on disk, under the content of that
model without its names and large weights.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, Self

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from optc.optimizer.builder import Workers
from optc.optimizer.cache_folder import cache_folder
from optc.optimizer.job import BuildFailure, ProbeJob, ProbeResult, Profile
from optc.optimizer.partition import Off, Refused

TRIAL_OPS: Final = frozenset(
    {
        "NonMaxSuppression",  # the parser takes it, and no builder so far has an implementation
        "If",  # branches of unlike shape, and data-dependent shapes inside, fail in the build
        "Loop",  # the same for its body
    }
)
"""Ops that the parser takes and the builder may yet refuse. Short, as each node costs a build."""

MAX_ROUNDS: Final = 64
"""Parses of the whole model. Each names at least one node more; three is usual."""

_PROBE_SECONDS: Final = 120.0
_CACHE_FORMAT: Final = 2
_SMALL_BYTES: Final = 1024
"""Constants up to this size count with their values: an axis, a zero point, a shape."""

_MOST_SIZES: Final = 64
"""Of a tensor of sizes. A longer one, or one of any length, is data."""

_SHAPE_OPS: Final = frozenset(
    {
        "Add",
        "Cast",
        "Ceil",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Div",
        "Equal",
        "Expand",
        "Floor",
        "Gather",
        "Greater",
        "Identity",
        "Less",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Range",
        "ReduceProd",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "Squeeze",
        "Sub",
        "Unsqueeze",
        "Where",
    }
)
"""What sizes are computed with. A node is asked about together with what computes its sizes."""

_DTYPES: Final = frozenset(
    {
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.FLOAT8E4M3FN,
        TensorProto.INT64,
        TensorProto.INT32,
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.BOOL,
    }
)
"""Of tensors that can enter and leave an engine."""

_INTEGERS: Final = frozenset({TensorProto.INT64, TensorProto.INT32})

ProfilesOf = Callable[[Sequence[str]], tuple[Profile, ...] | None]
"""Tensor names -> the optimisation profiles of a model that has these as inputs: () where none has
a dynamic axis, None where an axis has no bound."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What TensorRT said of a small model that it was asked about as a whole.

    Attributes:
        refused: Why it does not take it; None where it does.
        ops: Ops of the nodes it named.
    """

    refused: Refused | None
    ops: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Suspects:
    """What `Oracle.bisect` found.

    Attributes:
        nodes: Names; one node, or all between the last prefix that built and the first that did
            not, where the bound was reached first.
        builds: How many builds it took.
        seconds: How long they took.
        failure: Of the shortest prefix that does not build.
    """

    nodes: tuple[str, ...]
    builds: int
    seconds: float
    failure: BuildFailure


class Oracle:
    """Answers what TensorRT refuses.

    Args:
        workers: Who asks.
        cache: Folder of the answers on disk; by default `cache_folder`.
    """

    def __init__(self, workers: Workers, cache: Path | None = None) -> None:
        self._workers = workers
        self._cache = cache if cache is not None else cache_folder() / "oracle"
        self._known: dict[str, _Answer] = {}

    def refusals(
        self,
        model: ModelProto,
        backend: str,
        *,
        folder: Path | None = None,
        compute_capability: str | None = None,
        profiles: ProfilesOf | None = None,
        tf32: bool = False,
        off: Collection[str] = (),
    ) -> Off:
        """Return the nodes of the main graph that TensorRT refuses, and in whose words.

        Args:
            model: Every node named, names unique, bodies included; the types of all tensors in
                ``value_info``. What reads a tensor whose rank is not given is not asked about.
            backend: Name of the backend.
            folder: Where external data of ``model`` lies.
            compute_capability: For trial builds.
            profiles: For trial builds; without it none is made.
            tf32: For trial builds.
            off: Nodes that are off TensorRT anyway and are not asked about.
        """
        ask = _Asking(backend, folder)
        graph = _Graph(model)
        off = frozenset(off)
        refused = self._by_parser(graph, ask, off)
        if profiles is not None:
            nodes = [
                node
                for node in model.graph.node
                if node.op_type in TRIAL_OPS and node.name not in off | refused.keys()
            ]
            trial = _Trial(compute_capability, tf32)
            refused |= self._alone(graph, nodes, ask, profiles, trial)
        return refused

    def refused_alone(
        self,
        model: ModelProto,
        names: Iterable[str],
        backend: str,
        *,
        profiles: ProfilesOf,
        folder: Path | None = None,
        compute_capability: str | None = None,
        tf32: bool = False,
    ) -> Off:
        """Return which of the nodes ``names`` do not build when each is all there is.

        Args:
            model: Typed as for `refusals`.
            names: Of nodes of the main graph.
            backend: Name of the backend.
            profiles: Gives the optimisation profiles of each trial.
            folder: Where external data of ``model`` lies.
            compute_capability: To build for.
            tf32: Whether TF32 is on.
        """
        wanted = set(names)
        nodes = [node for node in model.graph.node if node.name in wanted]
        ask = _Asking(backend, folder)
        return self._alone(_Graph(model), nodes, ask, profiles, _Trial(compute_capability, tf32))

    def _by_parser(self, graph: _Graph, ask: _Asking, off: frozenset[str]) -> Off:
        refused: Off = {}
        for _ in range(MAX_ROUNDS):
            [result] = self._workers.probe([ask.job(graph.without(off | refused.keys()))])
            new = {
                name: Refused("parser", refusal.text)
                for refusal in result.refusals
                if (name := graph.owner.get(refusal.node)) is not None and name not in refused
            }
            if result.accepted:
                break
            # A crash, or a refusal of the model as a whole, names no node: then ask about all.
            ops = {graph.nodes[name].op_type for name in new}
            rest = [
                node
                for node in graph.nodes.values()
                if node.name not in off | refused.keys() | new.keys()
                and (not new or node.op_type in ops)
            ]
            new |= self._alone(graph, rest, ask)
            if not new:
                break  # whatever it is, no node alone brings it about: the build will tell
            refused |= new
        return refused

    def _alone(
        self,
        graph: _Graph,
        nodes: Iterable[NodeProto],
        ask: _Asking,
        profiles: ProfilesOf | None = None,
        trial: _Trial | None = None,
    ) -> Off:
        """Return which of ``nodes`` are refused when each is all that the model holds."""
        questions = {}
        for node in nodes:
            model = graph.alone(node)
            if model is None:
                continue
            shapes = profiles(_inputs(model)) if profiles is not None else ()
            if shapes is not None and not (trial is not None and _takes_sizes(model)):
                questions[node.name] = _Question(model, shapes, frozenset(_names(node)))
        answers = self._answers(list(questions.values()), ask, trial)
        found = {name: a.refused for name, a in zip(questions, answers, strict=True)}
        return {name: refused for name, refused in found.items() if refused is not None}

    def alone(self, model: ModelProto, names: Collection[str]) -> dict[str, ModelProto]:
        """Return each of the nodes ``names`` as a model of its own.

        Behind it stands what narrows its result: how much of it is read may decide how it can be
        rewritten.

        Args:
            model: Typed as for `refusals`.
            names: Of nodes of the main graph. One with a tensor that cannot enter or leave an
                engine is left out.
        """
        graph = _Graph(model)
        found = {name: graph.alone(graph.nodes[name], narrowed=True) for name in names}
        return {name: part for name, part in found.items() if part is not None}

    def verdicts(
        self,
        models: Sequence[ModelProto],
        backend: str,
        *,
        profiles: Sequence[tuple[Profile, ...]],
        folder: Path | None = None,
        compute_capability: str | None = None,
        tf32: bool = False,
    ) -> list[Verdict]:
        """Return what parser and builder say of each of ``models`` as a whole.

        Args:
            models: Small ones, typed as for `refusals`.
            backend: Name of the backend.
            profiles: For each model, its optimisation profiles.
            folder: Where external data of ``models`` lies.
            compute_capability: To build for.
            tf32: Whether TF32 is on.
        """
        questions = [
            _Question(
                model, shapes, frozenset(n for node in model.graph.node for n in _names(node))
            )
            for model, shapes in zip(models, profiles, strict=True)
        ]
        answers = self._answers(
            questions, _Asking(backend, folder), _Trial(compute_capability, tf32)
        )
        return [Verdict(answer.refused, frozenset(answer.ops)) for answer in answers]

    def _answers(
        self, questions: Sequence[_Question], ask: _Asking, trial: _Trial | None
    ) -> list[_Answer]:
        """Return an answer to each question: remembered, read, or asked for now."""
        version = self._workers.version(ask.backend)
        keys = [_key(each, ask.backend, version, trial) for each in questions]
        unknown: dict[str, _Question] = {}
        for key, question in zip(keys, questions, strict=True):
            if key not in self._known and key not in unknown:
                answer = self._read(key)
                if answer is not None:
                    self._known[key] = answer
                else:
                    unknown[key] = question
        jobs = [ask.job(each.model, each.profiles, trial) for each in unknown.values()]
        for (key, question), result in zip(unknown.items(), self._workers.probe(jobs), strict=True):
            answer = self._known[key] = _Answer.of(result, question)
            if answer.lasting:
                self._write(key, answer)
        return [self._known[key] for key in keys]

    def bisect(
        self,
        model: ModelProto,
        backend: str,
        failure: BuildFailure,
        *,
        folder: Path | None = None,
        compute_capability: str | None = None,
        profiles: tuple[Profile, ...] = (),
        tf32: bool = False,
        max_builds: int = 24,
        max_seconds: float = 120.0,
    ) -> Suspects:
        """Return the node that keeps ``model`` from building, by building beginnings of it.

        Args:
            model: What did not build, in topological order, typed as for `refusals`.
            backend: Name of the backend.
            failure: How it failed.
            folder: Where external data of ``model`` lies.
            compute_capability: As in the failed build.
            profiles: As in the failed build.
            tf32: As in the failed build.
            max_builds: The most builds.
            max_seconds: No build starts later; one that has started ends by itself.
        """
        graph = _Graph(model)
        names = list(graph.nodes)
        ask = _Asking(backend, folder)
        started = time.monotonic()
        builds, good, bad = 0, 0, len(names)  # the first `good` nodes build, the first `bad` do not
        while bad - good > 1 and builds < max_builds and time.monotonic() - started < max_seconds:
            at_once = min(self._workers.count, max_builds - builds, bad - good - 1)
            lengths = [good + (bad - good) * (i + 1) // (at_once + 1) for i in range(at_once)]
            jobs = [
                ask.job(graph.beginning(length), profiles, _Trial(compute_capability, tf32))
                for length in lengths
            ]
            builds += len(jobs)
            for length, result in zip(lengths, self._workers.probe(jobs), strict=True):
                if result.failure is None:
                    good = length
                else:
                    bad, failure = length, result.failure
                    break
        seconds = round(time.monotonic() - started, 3)
        return Suspects(tuple(names[good:bad]), builds, seconds, failure)

    def _read(self, key: str) -> _Answer | None:
        """Return the answer kept on disk; one that cannot be read is as good as none."""
        try:
            return _Answer(**json.loads(self._file(key).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _write(self, key: str, answer: _Answer) -> None:
        file = self._file(key)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=file.parent, suffix=".new", encoding="utf-8", delete=False
            ) as new:
                json.dump(asdict(answer), new)
            Path(new.name).replace(file)
        except OSError:
            return  # a full or read-only disk costs the next run its time, and nothing else

    def _file(self, key: str) -> Path:
        return self._cache / key[:2] / f"{key}.json"


@dataclass(frozen=True, slots=True)
class _Trial:
    """What a trial build is for."""

    compute_capability: str | None
    tf32: bool


@dataclass(frozen=True, slots=True)
class _Asking:
    """Whom to ask, and where the model's weights lie."""

    backend: str
    folder: Path | None

    def job(
        self, model: ModelProto, profiles: tuple[Profile, ...] = (), trial: _Trial | None = None
    ) -> ProbeJob:
        """Return the job that parses ``model``, and builds it where there is a ``trial``."""
        return ProbeJob(
            model=model.SerializeToString(),
            backend=self.backend,
            folder=self.folder,
            build=trial is not None,
            compute_capability=trial.compute_capability if trial else None,
            profiles=profiles,
            tf32=trial is not None and trial.tf32,
            nodes=tuple(node.name for node in model.graph.node),
            time_limit_seconds=_PROBE_SECONDS,
        )


@dataclass(frozen=True, slots=True)
class _Question:
    """A small model that TensorRT is asked about.

    Attributes:
        model: The model.
        profiles: Its optimisation profiles.
        names: Of the nodes that the question is about, those of bodies too.
    """

    model: ModelProto
    profiles: tuple[Profile, ...]
    names: frozenset[str]

    @property
    def ops(self) -> dict[str, str]:
        """Name of a node -> its op; that of the control-flow node for one in a body."""
        return {name: node.op_type for node in self.model.graph.node for name in _names(node)}


@dataclass(frozen=True, slots=True)
class _Answer:
    """What TensorRT said of a small model.

    Attributes:
        by: Who refused it; None where nobody did.
        lasting: Whether it would say so again: a crash or a lack of memory may not come again.
        ops: Ops of the nodes it named.
    """

    by: Literal["parser", "builder"] | None = None
    text: str = ""
    lasting: bool = True
    ops: Sequence[str] = ()

    @classmethod
    def of(cls, result: ProbeResult, question: _Question) -> Self:
        """Return what ``result`` means for the nodes that ``question`` is about."""
        names, ops = question.names, question.ops
        failure = result.failure
        if failure is None:
            return cls()
        match failure.reason:
            case "refused":
                # What computes its sizes may be refused where it is cut from the rest, which says
                # nothing of the node.
                named = [r for r in failure.refusals if r.node in names]
                texts = dict.fromkeys(r.text for r in named)
                found = sorted({ops[r.node] for r in named})
                if named or names.issuperset(ops):
                    return cls("parser", "; ".join(texts) or failure.text, ops=found)
                return cls()
            case "builder":
                found = sorted({ops[name] for name in failure.nodes if name in ops})
                return cls("builder", failure.text, ops=found)
            case "crash" | "timeout":
                return cls("parser", failure.text, lasting=False)
            case "killed" | "target" | "output":  # says nothing of the node
                return cls(lasting=False)

    @property
    def refused(self) -> Refused | None:
        """The same as a refusal, if it is one."""
        return Refused(self.by, self.text) if self.by is not None else None


class _Graph:
    """A model, ready to be taken apart."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self._model = model
        self.nodes = {node.name: node for node in graph.node}
        self._place = {name: place for place, name in enumerate(self.nodes)}
        self.owner = {inner: node.name for node in graph.node for inner in _names(node)}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._types = {info.name: info for info in (*graph.value_info, *graph.output, *graph.input)}
        self._producer = {name: node for node in graph.node for name in node.output if name}
        self._outputs = {info.name for info in graph.output}

    def without(self, names: Collection[str]) -> ModelProto:
        """Return the model without the nodes ``names``, whose outputs become inputs.

        What reads an output that cannot be an input is left out too.
        """
        if not names:
            return self._model
        left, missing = [], set[str]()
        for node in self.nodes.values():
            blind = any(name in missing and not self._can_enter(name) for name in _reads(node))
            if node.name in names or blind:
                missing.update(node.output)
            else:
                left.append(node)
        return self._part(left)

    def beginning(self, length: int) -> ModelProto:
        """Return the first ``length`` nodes."""
        return self._part(list(self.nodes.values())[:length])

    def alone(self, node: NodeProto, *, narrowed: bool = False) -> ModelProto | None:
        """Return ``node`` and what computes its sizes; None where a type is missing.

        Args:
            node: Of the main graph.
            narrowed: Whether to go on to what alone reads its result, and reads a part of it.
        """
        tail = self._narrowing(node) if narrowed else []
        chain = {each.name: each for each in (node, *tail)}
        queue = [node]
        while queue:
            for name in _reads(queue.pop()):
                producer = self._producer.get(name)
                if producer is not None and producer.name not in chain and self._is_size(name):
                    chain[producer.name] = producer
                    queue.append(producer)
        part = [self.nodes[name] for name in sorted(chain, key=self._place.__getitem__)]
        entering = _entering(part) - self._constants.keys()
        leaving = [name for name in (tail or [node])[-1].output if name]
        if not all(map(self._can_enter, entering)) or not all(map(self._has_dtype, leaving)):
            return None
        return self._part(part, leaving)

    def _narrowing(self, node: NodeProto) -> list[NodeProto]:
        """Return the chain of nodes behind ``node`` that each read but a part of what they read."""
        chain: list[NodeProto] = []
        while len(node.output) == 1 and node.output[0] not in self._outputs:
            readers = self._readers.get(node.output[0], [])
            if len(readers) != 1 or not self._narrows(readers[0], node.output[0]):
                break
            node = readers[0]
            chain.append(node)
        return chain

    def _narrows(self, node: NodeProto, name: str) -> bool:
        return (
            node.op_type in ("Gather", "Slice", "Squeeze")
            and node.domain in ("", "ai.onnx")
            and node.input[0] == name
            and all(other in self._constants for other in node.input[1:])
        )

    @cached_property
    def _readers(self) -> dict[str, list[NodeProto]]:
        """Name of a tensor -> the nodes of the main graph that read it, in bodies too."""
        found: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes.values():
            for name in set(_reads(node)):
                found[name].append(node)
        return found

    def _part(self, nodes: list[NodeProto], leaving: Sequence[str] | None = None) -> ModelProto:
        """Return a model of ``nodes``, which leaves ``leaving`` or what others read of it."""
        entering = _entering(nodes)
        own = {node.name for node in nodes}
        if leaving is None:
            others = [node for name, node in self.nodes.items() if name not in own]
            wanted = self._outputs.union(*map(_reads, others))
            made = [name for node in nodes for name in node.output]
            leaving = [name for name in made if name in wanted and self._has_dtype(name)]
        model = ModelProto(ir_version=self._model.ir_version)
        model.opset_import.extend(self._model.opset_import)
        model.functions.extend(self._model.functions)
        graph = model.graph
        graph.name = self._model.graph.name
        graph.node.extend(nodes)
        constants = entering & self._constants.keys()
        graph.initializer.extend(self._constants[name] for name in sorted(constants))
        inputs = sorted(entering - self._constants.keys())
        graph.input.extend(self._types[name] for name in inputs)
        graph.output.extend(self._types[name] for name in leaving)
        return model

    def _is_size(self, name: str) -> bool:
        """Return whether ``name`` looks like one or a few sizes that were computed."""
        node = self._producer[name]
        info = self._types.get(name)
        if node.domain not in ("", "ai.onnx") or node.op_type not in _SHAPE_OPS or info is None:
            return False
        return info.type.tensor_type.HasField("shape") and _may_be_sizes(info)

    def _has_dtype(self, name: str) -> bool:
        return name in self._types and self._types[name].type.tensor_type.elem_type in _DTYPES

    def _can_enter(self, name: str) -> bool:
        """Return whether ``name`` can be an input: TensorRT knows its dtype, we its rank."""
        return self._has_dtype(name) and self._types[name].type.tensor_type.HasField("shape")


def _inputs(model: ModelProto) -> list[str]:
    return [info.name for info in model.graph.input]


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g


def _names(node: NodeProto) -> Iterator[str]:
    """Yield the name of ``node`` and those of the nodes in its bodies."""
    yield node.name
    for body in _bodies(node):
        for inner in body.node:
            yield from _names(inner)


def _reads(node: NodeProto) -> set[str]:
    """Return the tensors that ``node`` reads, those that its bodies read from outside too."""
    found = {name for name in node.input if name}
    for body in _bodies(node):
        own = {info.name for info in body.input} | {tensor.name for tensor in body.initializer}
        outputs = {info.name for info in body.output}
        found |= (_entering(body.node) | outputs - _made(body.node)) - own
    return found


def _takes_sizes(model: ModelProto) -> bool:
    """Return whether an input may be a size, which an engine cannot take from outside."""
    return any(
        info.type.tensor_type.elem_type in _INTEGERS and _may_be_sizes(info)
        for info in model.graph.input
    )


def _may_be_sizes(info: ValueInfoProto) -> bool:
    """Return whether a tensor is short enough to hold sizes, whatever the extents of others."""
    dims = info.type.tensor_type.shape.dim
    return len(dims) <= 1 and all(0 < dim.dim_value <= _MOST_SIZES for dim in dims)


def _made(nodes: Iterable[NodeProto]) -> set[str]:
    return {name for node in nodes for name in node.output}


def _entering(nodes: Collection[NodeProto]) -> set[str]:
    """Return the tensors that ``nodes`` read and do not make."""
    return set[str]().union(*map(_reads, nodes)) - _made(nodes)


def _key(question: _Question, backend: str, version: str, trial: _Trial | None) -> str:
    """Return what an answer is kept under: all it can depend on, and no name."""
    asked = {
        "format": _CACHE_FORMAT,
        "backend": backend,
        "version": version,
        "trial": asdict(trial) if trial else None,
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    digest.update(_without_names(question, weights=False))
    return digest.hexdigest()


def likeness(model: ModelProto, node: str, profiles: tuple[Profile, ...]) -> bytes:
    """Return what is the same for nodes that are alike in all but the names.

    Args:
        model: Of one node and what belongs to it, as `Oracle.alone` returns it.
        node: Its name.
        profiles: The optimisation profiles of ``model``.
    """
    question = _Question(model, profiles, frozenset({node}))
    return hashlib.sha256(_without_names(question, weights=True)).digest()


def _without_names(question: _Question, *, weights: bool) -> bytes:
    """Return ``question`` with numbers for names; ``weights``: with the values of large constants."""
    plain = ModelProto()
    plain.CopyFrom(question.model)
    about = [node.name in question.names for node in plain.graph.node]
    anonymous = _Anonymous(weights=weights)
    anonymous.graph(plain.graph)
    profiles = [
        {anonymous.number(name): shapes for name, shapes in profile.items()}
        for profile in question.profiles
    ]
    content: bytes = plain.SerializeToString(deterministic=True)
    return json.dumps({"about": about, "profiles": profiles}, sort_keys=True).encode() + content


class _Anonymous:
    """Replaces the names in a graph by numbers, and large constants by their type.

    Args:
        weights: Whether large constants stay as they are.
    """

    def __init__(self, *, weights: bool) -> None:
        self._weights = weights
        self._numbers: dict[str, str] = {"": ""}

    def graph(self, graph: GraphProto, *, is_body: bool = False) -> None:
        """Do so in ``graph``, in place."""
        # In the order of the nodes, which does not depend on the names.
        for node in graph.node:
            self._node(node)
        for tensor in graph.initializer:
            tensor.name = self.number(tensor.name)
            is_large = tensor.data_location == TensorProto.EXTERNAL or (
                tensor.ByteSize() > _SMALL_BYTES
            )
            if is_large and not self._weights:
                kept = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
                tensor.CopyFrom(kept)
        graph.initializer.sort(key=lambda tensor: tensor.name)
        for info in (*graph.input, *graph.output):
            info.name = self.number(info.name)
        if not is_body:  # what a body takes and gives is told apart by its place
            graph.input.sort(key=lambda info: info.name)
        for info in (*graph.input, *graph.output):
            for dim in info.type.tensor_type.shape.dim:
                if dim.HasField("dim_param"):
                    dim.dim_param = self.number(f"dim {dim.dim_param}")
        del graph.value_info[:]
        graph.name = ""

    def _node(self, node: NodeProto) -> None:
        node.name = ""
        node.doc_string = ""
        del node.metadata_props[:]
        for body in _bodies(node):
            self.graph(body, is_body=True)
        for names in (node.input, node.output):
            names[:] = [self.number(name) for name in names]

    def number(self, name: str) -> str:
        """Return what stands for ``name``."""
        return self._numbers.setdefault(name, f"{len(self._numbers):06d}")
