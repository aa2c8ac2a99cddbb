"""Rules from earlier answers: nodes that are known to be refused before a model is parsed."""

from __future__ import annotations

from optc.optimizer.answer_cache import key_of
from optc.optimizer.model_parts import takes_sizes
from optc.optimizer.partition import Off, Refused
from optc.optimizer.probe import Memory, Probe, Prober, Setting


class ParserRules:
    """Which nodes the parser is known to refuse.

    What was answered earlier is not to change what is decided, only how soon. So only that counts
    which the parser refused on its own and in a whole model, and not what reads sizes that come from
    outside of it: there it may decide what is around.
    """

    def __init__(
        self, memory: Memory, prober: Prober, setting: Setting, backend: tuple[str, str]
    ) -> None:
        self._memory = memory
        self._prober = prober
        self._setting = setting
        self._backend = backend

    def knows(self, domain: str, op: str) -> bool:
        """Return whether there are rules for nodes of an op."""
        return self._memory.peek(self._key_of_op(domain, op)) is not None

    def refused(self, probes: dict[str, Probe]) -> Off:
        """Return which nodes are refused by rule, of those that are asked about in ``probes``."""
        found = {}
        for name, probe in probes.items():
            text = self._memory.get(self._key(probe))
            if text is not None:
                found[name] = Refused("parser", probe.fingerprint.with_names(text))
        return found

    def learn(self, probes: dict[str, Probe]) -> None:
        """Keep what was named in a whole model and is known to be refused alone, too."""
        for probe in probes.values():
            answer = self._prober.known(probe, self._setting)
            if answer is None or answer.by != "parser" or not answer.lasting:
                continue
            if not takes_sizes(probe.model):
                self._memory.put(self._key(probe), answer.text, lasting=probe.fingerprint.complete)
                for node in probe.model.graph.node:
                    if node.name in probe.names:
                        self._memory.put(
                            self._key_of_op(node.domain, node.op_type), 1, lasting=True
                        )

    def _key(self, probe: Probe) -> str:
        return key_of("rule", self._prober.key(probe, self._setting))

    def _key_of_op(self, domain: str, op: str) -> str:
        return key_of("rules", *self._backend, domain, op)
