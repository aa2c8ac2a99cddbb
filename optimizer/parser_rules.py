"""Rules from earlier answers: ops that the parser refuses whatever the node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onnx import NodeProto

from optc.optimizer.answer_cache import key_of
from optc.optimizer.probe import Answer, Memory


class ParserRules:
    """Which ops the parser is known to refuse.

    Nodes of such an op are asked about on their own before a model is parsed, which saves the parses
    that only go to name them.

    Args:
        memory: Keeps the rules.
        backend: Name of the backend, and what identifies its library.
    """

    def __init__(self, memory: Memory, backend: tuple[str, str]) -> None:
        self._memory = memory
        self._backend = backend

    def suspects(self, nodes: Iterable[NodeProto]) -> list[NodeProto]:
        """Return those of ``nodes`` whose op is known to be refused."""
        nodes = list(nodes)
        ops = {(node.domain, node.op_type) for node in nodes}
        known = {op for op in ops if self._memory.peek(self._key(op))}
        return [node for node in nodes if (node.domain, node.op_type) in known]

    def learn(self, nodes: Iterable[NodeProto], answers: Mapping[str, Answer]) -> None:
        """Make a rule of each op that is refused on its own whatever the node; else take it back.

        Args:
            nodes: All nodes of some ops that the parser named in a model.
            answers: What it said of them on their own.
        """
        refused: dict[tuple[str, str], bool] = {}
        for node in nodes:
            op = (node.domain, node.op_type)
            answer = answers.get(node.name)
            refused[op] = refused.get(op, True) and answer is not None and refuses(answer)
        for op, always in refused.items():
            self._memory.put(self._key(op), always, lasting=True)

    def _key(self, op: tuple[str, str]) -> str:
        return key_of("rule", *self._backend, *op)


def refuses(answer: Answer) -> bool:
    """Return whether it is the parser that refuses, and would again."""
    return answer.by == "parser" and answer.lasting
