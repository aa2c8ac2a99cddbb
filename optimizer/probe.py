"""Asks TensorRT about small models, and remembers what it said.

An answer depends on the content of the model, on the backend and its version, and, where it takes a
trial build, on what is built for. It is kept under these, in memory and on disk. What a child says
that crashes or runs out of time may not come again, and is not kept for the next run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Self

from onnx import ModelProto

from optc.optimizer.answer_cache import AnswerCache, key_of
from optc.optimizer.builder import Workers
from optc.optimizer.fingerprint import DigestOf, Fingerprint
from optc.optimizer.job import ProbeJob, ProbeResult, Profile
from optc.optimizer.model_parts import names_in
from optc.optimizer.partition import Refused

_PROBE_SECONDS: Final = 120.0


@dataclass(slots=True)
class Counts:
    """How often TensorRT was asked, and how often that could be saved.

    Attributes:
        parses: Parses of a whole model.
        probes: Parses of a node on its own.
        trials: Builds on trial of a node, as it is or as rewritten.
        bisections: Builds of beginnings of a stage, to find what keeps it from building.
        builds: Builds of engines.
        remembered: Answers that this run had been given before.
        read: Answers that an earlier run had left on disk.
    """

    parses: int = 0
    probes: int = 0
    trials: int = 0
    bisections: int = 0
    builds: int = 0
    remembered: int = 0
    read: int = 0

    def as_json(self) -> dict[str, int]:
        """Return the counts by their names."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial build is for."""

    compute_capability: str | None
    tf32: bool


@dataclass(frozen=True, slots=True)
class Setting:
    """Whom to ask, and for what.

    Attributes:
        backend: Name of the backend.
        folder: Where external data of the models lies.
        trial: What to build for; None: the parser alone is asked.
    """

    backend: str
    folder: Path | None = None
    trial: Trial | None = None

    def job(self, model: ModelProto, profiles: tuple[Profile, ...] = ()) -> ProbeJob:
        """Return the job that asks about ``model``."""
        trial = self.trial
        return ProbeJob(
            model=model.SerializeToString(),
            backend=self.backend,
            folder=self.folder,
            build=trial is not None,
            compute_capability=trial.compute_capability if trial else None,
            profiles=profiles,
            tf32=trial is not None and trial.tf32,
            nodes=tuple(name for node in model.graph.node for name in names_in(node)),
            time_limit_seconds=_PROBE_SECONDS,
        )


@dataclass(frozen=True)
class Probe:
    """A small model that TensorRT is asked about.

    Attributes:
        model: The model.
        profiles: Its optimisation profiles.
        names: Of the nodes that the question is about, those of bodies too.
        digest_of: Tells constants apart that lie in files.
    """

    model: ModelProto
    profiles: tuple[Profile, ...]
    names: frozenset[str]
    digest_of: DigestOf

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What tells the model from others."""
        return Fingerprint(self.model, digest_of=self.digest_of)

    @property
    def ops(self) -> dict[str, str]:
        """Name of a node -> its op; that of the control-flow node for one in a body."""
        return {name: node.op_type for node in self.model.graph.node for name in names_in(node)}

    def key(self, setting: Setting, version: str) -> str:
        """Return what the answer is kept under."""
        return key_of(
            "probe",
            (setting.backend, version, setting.trial and astuple(setting.trial)),
            [node.name in self.names for node in self.model.graph.node],
            self.fingerprint.shapes_of(self.profiles),
            self.fingerprint.digest,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What TensorRT said of a small model.

    Attributes:
        by: Who refused it; None where nobody did.
        text: In whose words.
        lasting: Whether it would say so again: a crash or a lack of memory may not come again.
        ops: Ops of the nodes it named.
    """

    by: Literal["parser", "builder"] | None = None
    text: str = ""
    lasting: bool = True
    ops: Sequence[str] = ()

    @classmethod
    def of(cls, result: ProbeResult, probe: Probe) -> Self:
        """Return what ``result`` means for the nodes that ``probe`` is about."""
        names, ops = probe.names, probe.ops
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


class Memory:
    """What was answered in this run and, where it lasts, in earlier ones.

    Args:
        cache: Keeps answers on disk.
        counts: Of answers that were known.
    """

    def __init__(self, cache: AnswerCache, counts: Counts) -> None:
        self._cache = cache
        self._counts = counts
        self._known: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        """Return the answer, which JSON can hold; None where there is none."""
        if key in self._known:
            self._counts.remembered += 1
        elif (answer := self._cache.read(key)) is not None:
            self._counts.read += 1
            self._known[key] = answer
        return self._known.get(key)

    def peek(self, key: str) -> Any:
        """Return the answer as `get` does, without counting it."""
        if key not in self._known and (answer := self._cache.read(key)) is not None:
            self._known[key] = answer
        return self._known.get(key)

    def put(self, key: str, answer: Any, *, lasting: bool) -> None:
        """Keep an answer; for the next run, too, where it is ``lasting``."""
        self._known[key] = answer
        if lasting:
            self._cache.write(key, answer)


class Prober:
    """Answers probes: from memory, or by asking.

    Args:
        workers: Who asks.
        memory: What is known.
        counts: Of what was asked.
    """

    def __init__(self, workers: Workers, memory: Memory, counts: Counts) -> None:
        self._workers = workers
        self._memory = memory
        self._counts = counts

    def answers(self, probes: Sequence[Probe], setting: Setting) -> list[Answer]:
        """Return the answer to each probe. Of those that are alike one is asked."""
        alike: dict[str, list[int]] = {}
        for index, probe in enumerate(probes):
            alike.setdefault(self.key(probe, setting), []).append(index)
        known = {key: self._memory.get(key) for key in alike}
        unknown = {key: probes[alike[key][0]] for key, answer in known.items() if answer is None}
        jobs = [setting.job(probe.model, probe.profiles) for probe in unknown.values()]
        if setting.trial is None:
            self._counts.probes += len(jobs)
        else:
            self._counts.trials += len(jobs)
        for (key, probe), result in zip(unknown.items(), self._workers.probe(jobs), strict=True):
            answer = Answer.of(result, probe)
            plain = replace(answer, text=probe.fingerprint.without_names(answer.text))
            lasting = answer.lasting and probe.fingerprint.complete
            known[key] = asdict(plain)
            self._memory.put(key, known[key], lasting=lasting)
        found: dict[int, Answer] = {}
        for key, indices in alike.items():
            for index in indices:
                answer = Answer(**known[key])
                text = probes[index].fingerprint.with_names(answer.text)
                found[index] = replace(answer, text=text)
        return [found[index] for index in range(len(probes))]

    def key(self, probe: Probe, setting: Setting) -> str:
        """Return what the answer to ``probe`` is kept under."""
        return probe.key(setting, self._workers.identity(setting.backend))
