"""What TensorRT refuses, asked of its own parser and builder with the real nodes.

In layers, each asked only where the one before does not tell:

1. the same model was asked about before, whatever the names in it: what was refused of it;
2. a rule from earlier answers: an op that the parser named in a model and refused whatever the node is
   asked about node by node before the model is parsed;
3. a parse of the whole model. The parser names every node that its op checkers refuse, but of those
   whose import fails only the first. So after each answer every node of a refused op is asked about
   on its own, and then the model again without what was refused, until the parser takes the rest;
4. a trial build of each node of an op that the builder may refuse whatever the parser says;
5. the build of a stage. If it fails, nodes are built alone, and then beginnings of the stage.

A node on its own is a model of that node, its constants and the shape arithmetic that leads to it.
Answers are kept on disk under all that they depend on (`optc.optimizer.fingerprint`), so that
compiling once more asks nothing, and builds nothing but the engines that it keeps.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from onnx import ModelProto, NodeProto

from optc.optimizer.answer_cache import AnswerCache, key_of
from optc.optimizer.backend import backend_of
from optc.optimizer.builder import OnDone, OnProgress, Workers
from optc.optimizer.cache_folder import cache_folder
from optc.optimizer.fingerprint import DigestOf, Fingerprint
from optc.optimizer.job import (
    BuildFailure,
    BuildJob,
    BuildResult,
    ProbeResult,
    Profile,
)
from optc.optimizer.kept_failure import failure_as_json, failure_from
from optc.optimizer.model_parts import ModelParts, ProfilesOf, inputs_of, names_in, takes_sizes
from optc.optimizer.parser_rules import ParserRules, refuses
from optc.optimizer.partition import Off, Refused
from optc.optimizer.probe import Answer, Counts, Memory, Probe, Prober, Setting, Trial

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

_LASTING: Final = frozenset({"refused", "builder"})
"""Failures that would come again."""


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
        digest_of: Tells constants apart that lie in files. What depends on the values of one that
            it does not know is not kept for the next run.

    Attributes:
        counts: How often TensorRT was asked so far, and how often that was saved.
    """

    def __init__(
        self,
        workers: Workers,
        cache: Path | None = None,
        *,
        digest_of: DigestOf = lambda tensor: None,
    ) -> None:
        self._workers = workers
        self._digest_of = digest_of
        self.counts = Counts()
        folder = cache if cache is not None else cache_folder() / "oracle"
        self._memory = Memory(AnswerCache(folder), self.counts)
        self._prober = Prober(workers, self._memory, self.counts)

    # --- what the parser refuses of a model ------------------------------------------------------

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
        parts = ModelParts(model)
        off = frozenset(off)
        refused = self._by_parser(parts, Setting(backend, folder), off)
        if profiles is not None:
            nodes = [
                node
                for node in model.graph.node
                if node.op_type in TRIAL_OPS and node.name not in off | refused.keys()
            ]
            setting = Setting(backend, folder, Trial(compute_capability, tf32))
            refused |= _refused(self._alone(parts, nodes, setting, profiles))
        return refused

    def _by_parser(self, parts: ModelParts, setting: Setting, off: frozenset[str]) -> Off:
        asked = parts.without(off)
        fingerprint = Fingerprint(asked, digest_of=self._digest_of)
        key = key_of("parser", *self._backend(setting), fingerprint.digest)
        known: list[tuple[int, str]] | None = self._memory.get(key)
        if known is None:
            left = {node.name for node in asked.graph.node}  # without what would read nothing
            refused, lasting = self._parsed(parts, setting, frozenset(parts.nodes.keys() - left))
            known = [
                (fingerprint.number_of_node(name), fingerprint.without_names(why.text))
                for name, why in refused.items()
            ]
            self._memory.put(key, known, lasting=lasting and fingerprint.complete)
        return {
            fingerprint.nodes[number]: Refused("parser", fingerprint.with_names(text))
            for number, text in known
        }

    def _parsed(self, parts: ModelParts, setting: Setting, off: frozenset[str]) -> tuple[Off, bool]:
        """Return what the parser refuses, and whether it would again."""
        rules = ParserRules(self._memory, self._backend(setting))
        refused = self._by_rule(parts, setting, off, rules)
        lasting = True
        for _ in range(MAX_ROUNDS):
            self.counts.parses += 1
            [result] = self._workers.probe([setting.job(parts.without(off | refused.keys()))])
            if result.accepted:
                return refused, lasting
            lasting &= _is_lasting(result)
            named = {
                name: Refused("parser", refusal.text)
                for refusal in result.refusals
                if (name := parts.owner.get(refusal.node)) is not None and name not in refused
            }
            # A crash, or a refusal of the model as a whole, names no node: then ask about all.
            ops = {parts.nodes[name].op_type for name in named}
            asked = [
                node
                for node in parts.nodes.values()
                if node.name not in off | refused.keys() and (not named or node.op_type in ops)
            ]
            answers = self._alone(parts, asked, setting)
            lasting &= all(answer.lasting for answer in answers.values())
            new = _refused(answers) | named
            if not new:  # whatever it is, no node alone brings it about: the build will tell
                return refused, lasting
            if named:
                rules.learn(asked, answers)
            refused |= new
        return refused, False  # the next run goes on from what this one has learnt

    def _by_rule(
        self, parts: ModelParts, setting: Setting, off: frozenset[str], rules: ParserRules
    ) -> Off:
        """Return what is refused of the nodes that are suspected before the model is parsed.

        What was answered earlier is not to change what is decided, only how soon. So what reads
        sizes from outside is left for the parse: there it may decide what is around a node.
        """
        suspects = rules.suspects(node for node in parts.nodes.values() if node.name not in off)
        probes = self._probes(parts, suspects, setting)
        probes = {name: probe for name, probe in probes.items() if not takes_sizes(probe.model)}
        answers = self._prober.answers(list(probes.values()), setting)
        found = dict(zip(probes, answers, strict=True))
        return _refused({name: answer for name, answer in found.items() if refuses(answer)})

    # --- nodes on their own ----------------------------------------------------------------------

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
        setting = Setting(backend, folder, Trial(compute_capability, tf32))
        return _refused(self._alone(ModelParts(model), nodes, setting, profiles))

    def _alone(
        self,
        parts: ModelParts,
        nodes: Iterable[NodeProto],
        setting: Setting,
        profiles: ProfilesOf | None = None,
    ) -> dict[str, Answer]:
        """Return what is said of ``nodes`` when each is all that the model holds."""
        probes = self._probes(parts, nodes, setting, profiles)
        answers = self._prober.answers(list(probes.values()), setting)
        return dict(zip(probes, answers, strict=True))

    def _probes(
        self,
        parts: ModelParts,
        nodes: Iterable[NodeProto],
        setting: Setting,
        profiles: ProfilesOf | None = None,
    ) -> dict[str, Probe]:
        """Return the probes of those of ``nodes`` that can be asked about alone, by their names."""
        probes = {}
        for node in nodes:
            model = parts.alone(node)
            if model is None:
                continue
            shapes = profiles(inputs_of(model)) if profiles is not None else ()
            if shapes is not None and not (setting.trial is not None and takes_sizes(model)):
                probes[node.name] = Probe(model, shapes, frozenset(names_in(node)), self._digest_of)
        return probes

    def alone(self, model: ModelProto, names: Collection[str]) -> dict[str, ModelProto]:
        """Return each of the nodes ``names`` as a model of its own.

        Behind it stands what narrows its result: how much of it is read may decide how it can be
        rewritten.

        Args:
            model: Typed as for `refusals`.
            names: Of nodes of the main graph. One with a tensor that cannot enter or leave an
                engine is left out.
        """
        parts = ModelParts(model)
        found = {name: parts.alone(parts.nodes[name], narrowed=True) for name in names}
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
        probes = [
            Probe(
                model,
                shapes,
                frozenset(name for node in model.graph.node for name in names_in(node)),
                self._digest_of,
            )
            for model, shapes in zip(models, profiles, strict=True)
        ]
        setting = Setting(backend, folder, Trial(compute_capability, tf32))
        answers = self._prober.answers(probes, setting)
        return [Verdict(answer.refused, frozenset(answer.ops)) for answer in answers]

    # --- stages ----------------------------------------------------------------------------------

    def build(
        self,
        jobs: Sequence[tuple[BuildJob, Fingerprint]],
        *,
        keep: bool = True,
        on_done: OnDone | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[BuildResult]:
        """Build engines side by side, but for those that are known not to build.

        Args:
            jobs: What to build. The fingerprint is of the model, weights included.
            keep: Whether the engines are wanted; if not, what has built before is not built again.
            on_done: As for `Workers.build`.
            on_progress: As for `Workers.build`.
        """
        found: dict[int, BuildResult] = {}
        keys: dict[int, str] = {}
        for index, (job, fingerprint) in enumerate(jobs):
            # A GPU that is short of memory today says nothing of tomorrow.
            if fingerprint.complete and not backend_of(job.backend).needs_gpu:
                keys[index] = self._key_of_build("build", job, fingerprint)
                known = self._memory.get(keys[index])
                failure = known and failure_from(known["failure"], fingerprint)
                if known is not None and (failure is not None or not keep):
                    found[index] = BuildResult(0.0, failure=failure)
                    if on_done is not None:
                        on_done(job, found[index])
        left = [index for index in range(len(jobs)) if index not in found]
        self.counts.builds += len(left)
        results = self._workers.build([jobs[index][0] for index in left], on_done, on_progress)
        for index, result in zip(left, results, strict=True):
            found[index] = result
            if index in keys and (result.failure is None or result.failure.reason in _LASTING):
                kept = {"failure": failure_as_json(result.failure, jobs[index][1])}
                self._memory.put(keys[index], kept, lasting=True)
        return [found[index] for index in range(len(jobs))]

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
        fingerprint = Fingerprint(model, weights=True, digest_of=self._digest_of)
        setting = Setting(backend, folder, Trial(compute_capability, tf32))
        key = key_of(
            "bisect",
            *self._backend(setting),
            (compute_capability, tf32, max_builds),
            fingerprint.shapes_of(profiles),
            fingerprint.digest,
        )
        known = self._memory.get(key)
        if known is not None:
            found = failure_from(known["failure"], fingerprint)
            assert found is not None, "a search begins with a failure"
            nodes = tuple(fingerprint.nodes[number] for number in known["nodes"])
            return Suspects(nodes, known["builds"], known["seconds"], found)
        suspects, lasting = self._search(
            ModelParts(model), setting, failure, profiles, max_builds, max_seconds
        )
        kept = {
            "nodes": [fingerprint.number_of_node(name) for name in suspects.nodes],
            "builds": suspects.builds,
            "seconds": suspects.seconds,
            "failure": failure_as_json(suspects.failure, fingerprint),
        }
        self._memory.put(key, kept, lasting=lasting and fingerprint.complete)
        return suspects

    def _search(
        self,
        parts: ModelParts,
        setting: Setting,
        failure: BuildFailure,
        profiles: tuple[Profile, ...],
        max_builds: int,
        max_seconds: float,
    ) -> tuple[Suspects, bool]:
        """Return the suspects, and whether the next search would find the same."""
        names = list(parts.nodes)
        started = time.monotonic()
        lasting = failure.reason in _LASTING
        builds, good, bad = 0, 0, len(names)  # the first `good` nodes build, the first `bad` do not
        while bad - good > 1 and builds < max_builds:
            if time.monotonic() - started >= max_seconds:
                lasting = False
                break
            at_once = min(self._workers.count, max_builds - builds, bad - good - 1)
            lengths = [good + (bad - good) * (i + 1) // (at_once + 1) for i in range(at_once)]
            jobs = [setting.job(parts.beginning(length), profiles) for length in lengths]
            builds += len(jobs)
            for length, result in zip(lengths, self._workers.probe(jobs), strict=True):
                lasting &= _is_lasting(result)
                if result.failure is None:
                    good = length
                else:
                    bad, failure = length, result.failure
                    break
        self.counts.bisections += builds
        seconds = round(time.monotonic() - started, 3)
        return Suspects(tuple(names[good:bad]), builds, seconds, failure), lasting

    def _key_of_build(self, kind: str, job: BuildJob, fingerprint: Fingerprint) -> str:
        return key_of(
            kind,
            (job.backend, self._workers.identity(job.backend)),
            (job.compute_capability, job.tf32),
            fingerprint.shapes_of(job.profiles),
            fingerprint.digest,
        )

    def _backend(self, setting: Setting) -> tuple[str, str]:
        return setting.backend, self._workers.identity(setting.backend)


def likeness(model: ModelProto, node: str, profiles: tuple[Profile, ...]) -> bytes:
    """Return what is the same for nodes that are alike in all but the names.

    Args:
        model: Of one node and what belongs to it, as `Oracle.alone` returns it.
        node: Its name.
        profiles: The optimisation profiles of ``model``.
    """
    fingerprint = Fingerprint(model, weights=True)
    about = [each.name == node for each in model.graph.node]
    return key_of("likeness", about, fingerprint.shapes_of(profiles), fingerprint.digest).encode()


def _refused(answers: dict[str, Answer]) -> Off:
    found = {name: answer.refused for name, answer in answers.items()}
    return {name: refused for name, refused in found.items() if refused is not None}


def _is_lasting(result: ProbeResult) -> bool:
    return result.failure is None or result.failure.reason in _LASTING
