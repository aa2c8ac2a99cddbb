"""Asks TensorRT's real parser and builder about a model: what legalising passes are held against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onnx import ModelProto

from optc.optimizer.builder import Workers
from optc.optimizer.job import ProbeJob, Profile

BACKEND = "tensorrt-rtx"


class Builder:
    """TensorRT, asked in children that are kept for the next question."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def refusal(
        self,
        model: ModelProto,
        *,
        compute_capability: str = "8.6",
        profiles: tuple[Profile, ...] = (),
    ) -> str:
        """Return why there is no engine for ``model``, in TensorRT's words; "" where there is one."""
        [result] = self._workers.probe(
            [
                ProbeJob(
                    model.SerializeToString(),
                    BACKEND,
                    build=True,
                    compute_capability=compute_capability,
                    profiles=profiles,
                    nodes=tuple(node.name for node in model.graph.node),
                )
            ]
        )
        return "" if result.failure is None else f"{result.failure.reason}: {result.failure.text}"


def profile_of(model: ModelProto, sizes: tuple[int, int, int] = (1, 3, 8)) -> Profile:
    """Return the profile in which each dynamic axis of the inputs of ``model`` has ``sizes``."""
    constants = {tensor.name for tensor in model.graph.initializer}
    profile = {}
    for info in model.graph.input:
        dims = info.type.tensor_type.shape.dim
        if info.name not in constants and not all(dim.HasField("dim_value") for dim in dims):
            low, opt, high = (tuple(dim.dim_value or size for dim in dims) for size in sizes)
            profile[info.name] = (low, opt, high)
    return profile


@contextmanager
def builder() -> Iterator[Builder]:
    """Yield a builder; its children end with the block."""
    with Workers(1) as workers:
        yield Builder(workers)
