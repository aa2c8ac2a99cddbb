"""Reads what an engine is made of from the builder's own log: no GPU has to run it for that."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass

from onnx import ModelProto

_LAYER = re.compile(r"Name: (\S+), LayerType: (\w+)")
SIZES = (1, 16, 32)
"""Least, best and largest extent of each dynamic axis of an input."""

_PART = r"{}: \[(.*?)\}}\]"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an engine.

    Attributes:
        kind: What it is to the builder: ``correlation``, ``gemm``, ``kgen`` (elementwise), ``maxpool``.
        reads: Types of what it reads, constants last: ``Half``, ``Float``, ``Int8``, ``FP8``.
        makes: Types of its outputs.
    """

    kind: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]


def engine_layers(models: Sequence[ModelProto], compute_capability: str) -> list[list[Layer]]:
    """Return the layers of the engine that the builder makes of each model, in a child of its own."""
    child = subprocess.run(
        [sys.executable, __file__, compute_capability],
        input=json.dumps([b64encode(model.SerializeToString()).decode() for model in models]),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [
        [_layer(line) for line in text.splitlines() if _LAYER.match(line)]
        for text in json.loads(child.stdout)
    ]


def multiplied(layers: list[Layer]) -> list[str]:
    """Return the type of the first operand of each product, in order."""
    return [layer.reads[0] for layer in layers if layer.kind in ("correlation", "deconv", "gemm")]


def _layer(line: str) -> Layer:
    match = _LAYER.match(line)
    assert match is not None

    def types(part: str) -> tuple[str, ...]:
        found = re.search(_PART.format(part), line)
        return tuple(re.findall(r"Datatype: (\w+)", found[1])) if found else ()

    return Layer(match[2], types("Inputs") + types("Constants"), types("Outputs"))


def _main(compute_capability: str) -> None:
    models = [b64decode(text) for text in json.load(sys.stdin)]
    print(json.dumps([_log_of_layers(model, compute_capability) for model in models]))


def _log_of_layers(model: bytes, compute_capability: str) -> str:
    import tensorrt_rtx as trt

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, _severity: object, text: str) -> None:
            self.lines.append(text)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    target = getattr(trt.ComputeCapability, "SM" + compute_capability.replace(".", ""))
    config.set_compute_capability(target, 0)
    parsed = parser.parse(model)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = [[size if extent < 0 else extent for extent in tensor.shape] for size in SIZES]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    if not parsed or builder.build_serialized_network(network, config) is None:
        raise SystemExit("\n".join(log.lines[-5:]))
    return next(text for text in log.lines if text.startswith("Layers:"))


if __name__ == "__main__":
    _main(sys.argv[1])
