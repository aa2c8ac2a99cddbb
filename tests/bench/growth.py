"""Measures how our passes grow with the model: their time with its nodes, their memory with its weights.

    python tests/bench/growth.py [--nodes N]... [--repeat N] [--gib SIZE] [--folder DIR] [--json FILE]

Time: a family of models, each of residual convolutional blocks, elementwise chains, shape arithmetic,
attention written out, and Ifs with bodies, in equal parts. The exponent is the slope of log(seconds)
over log(nodes) by least squares; 1 is linear, and at most 1.15 is wanted. Reading and writing count.

Memory: a model of SIZE GiB of weights in an external file, once with nothing that changes a weight,
once with a BatchNormalization after each Conv, which all fold. The peak is that of a process of its
own, in shares of the weights; pages of a mapped file count. At most 0.5 and 1.3 are wanted.

Exits 1 where more is needed. Writes the models to DIR, which needs twice SIZE.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import child
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from tool import OURS, ready

NODES = (1_000, 3_000, 10_000, 30_000, 100_000)
MOST_EXPONENT = 1.15
MOST_PEAK = {"unchanged": 0.5, "folded": 1.3}
CHANNELS = 8
LONGEST_SECONDS = 3600
OPSET = 17


class Family:
    """A model of the family as it is put together: blocks of five kinds, one after another."""

    def __init__(self, nodes: int) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self._random = np.random.default_rng(0)
        blocks = (self._residual, self._elementwise, self._reshape, self._attention, self._choice)
        value = "x"
        while len(self.nodes) < nodes:
            for block in blocks:
                value = block(value)
        self._output = value

    def model(self) -> onnx.ModelProto:
        """Return the model."""
        shape: list[int | str | None] = ["batch", CHANNELS, "height", "width"]
        graph = helper.make_graph(
            self.nodes,
            "family",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
                helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
            ],
            [helper.make_tensor_value_info(self._output, TensorProto.FLOAT, shape)],
            self.constants,
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8
        )

    def _node(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], f"n{name}", **attributes))
        return name

    def _constant(self, values: Any, dtype: str = "float32") -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def _weights(self, *shape: int) -> str:
        return self._constant(self._random.normal(size=shape) / math.sqrt(CHANNELS))

    def _residual(self, x: str) -> str:
        """Conv, BatchNormalization, Relu, Conv, a scale and a shift, and around all an Add."""
        y = self._node("Conv", x, self._weights(CHANNELS, CHANNELS, 1, 1))
        normal = [self._constant(self._random.random(CHANNELS) + 0.5) for _ in range(4)]
        y = self._node("Relu", self._node("BatchNormalization", y, *normal))
        y = self._node("Conv", y, self._weights(CHANNELS, CHANNELS, 1, 1))
        y = self._node("Mul", y, self._weights(CHANNELS, 1, 1))
        return self._node("Add", self._node("Add", y, self._weights(CHANNELS, 1, 1)), x)

    def _elementwise(self, x: str) -> str:
        """SiLU and GELU written out, an Identity, a product with 1, a Cast to what is there."""
        y = self._node("Mul", x, self._node("Sigmoid", x))
        y = self._node("Identity", self._node("Mul", y, self._constant(1.0)))
        bent = self._node("Erf", self._node("Div", y, self._constant(math.sqrt(2))))
        bent = self._node("Mul", y, self._node("Add", bent, self._constant(1.0)))
        return self._node(
            "Cast", self._node("Mul", bent, self._constant(0.5)), to=TensorProto.FLOAT
        )

    def _reshape(self, x: str) -> str:
        """Flatten the image and restore it, by shapes computed at run time."""
        shape = self._node("Shape", x)
        ends = [
            self._node(
                "Unsqueeze",
                self._node("Gather", shape, self._constant(axis, "int64"), axis=0),
                self._constant([0], "int64"),
            )
            for axis in (0, 1, 2, 3)
        ]
        flat = self._node("Concat", ends[0], ends[1], self._constant([-1], "int64"), axis=0)
        y = self._node("Reshape", x, flat)
        return self._node("Reshape", y, self._node("Concat", *ends, axis=0))

    def _attention(self, x: str) -> str:
        """Attention of the channels to each other, and a layer normalisation written out."""
        shape = self._node("Shape", x)
        rows = self._node("Reshape", x, self._constant([0, CHANNELS, -1], "int64"))
        across = self._node("Transpose", rows, perm=[0, 2, 1])
        q, k, v = (
            self._node(
                "Add",
                self._node("MatMul", across, self._weights(CHANNELS, CHANNELS)),
                self._weights(CHANNELS),
            )
            for _ in range(3)
        )
        scores = self._node("MatMul", self._node("Transpose", q, perm=[0, 2, 1]), k)
        scores = self._node("Softmax", self._node("Div", scores, self._constant(8.0)), axis=-1)
        y = self._node("MatMul", v, scores)
        mean = self._node("Sub", y, self._node("ReduceMean", y, axes=[-1]))
        square = self._node("Pow", mean, self._constant(2.0))
        variance = self._node("ReduceMean", square, axes=[-1])
        root = self._node("Sqrt", self._node("Add", variance, self._constant(1e-5)))
        y = self._node("Mul", self._node("Div", mean, root), self._weights(CHANNELS))
        y = self._node("Add", y, self._weights(CHANNELS))
        return self._node("Reshape", self._node("Transpose", y, perm=[0, 2, 1]), shape)

    def _choice(self, x: str) -> str:
        """An If that the caller decides; both bodies read what is outside."""
        name = f"if_{len(self.nodes)}"
        bodies = {}
        for branch, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
            inner, copy, out = (f"{name}_{branch}_{part}" for part in ("a", "b", "c"))
            bodies[branch] = helper.make_graph(
                [
                    helper.make_node(op, [x], [inner], f"{inner}_node"),
                    helper.make_node("Identity", [inner], [copy], f"{copy}_node"),
                    helper.make_node("Add", [copy, x], [out], f"{out}_node"),
                ],
                branch,
                [],
                [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
            )
        return self._node("If", "flag", **bodies)


def write_heavy(path: Path, weights: int, *, batchnorm: bool) -> None:
    """Write a model of Convs whose weights take about ``weights`` bytes, in a file beside it.

    Every Relu is followed by an Identity, so that there is something to do.
    """
    channels = 2048
    layer = channels * channels * 4
    count = max(1, round(weights / layer))
    data = path.with_suffix(".data")
    nodes, constants, value = [], [], "x"
    random = np.random.default_rng(0)
    kernel = random.normal(size=(channels, channels)).astype("float32") / math.sqrt(channels)
    with data.open("wb") as file:
        for index in range(count):
            kernel[0, 0] = index  # no two are alike, so that none can be shared
            name = f"w{index}"
            constants.append(external(name, (channels, channels, 1, 1), data, file.tell()))
            file.write(kernel.tobytes())
            made = f"conv{index}"
            nodes.append(helper.make_node("Conv", [value, name], [made], made))
            if batchnorm:
                normal = [f"{part}{index}" for part in ("scale", "shift", "mean", "var")]
                for part in normal:
                    values = random.random(channels).astype("float32") + 0.5
                    constants.append(numpy_helper.from_array(values, part))
                value, made = made, f"normal{index}"
                nodes.append(helper.make_node("BatchNormalization", [value, *normal], [made], made))
            for op in ("Relu", "Identity"):
                value, made = made, f"{op.lower()}{index}"
                nodes.append(helper.make_node(op, [value], [made], made))
            value = made
    shape = [1, channels, 1, 1]
    graph = helper.make_graph(
        nodes,
        "heavy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)],
        constants,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


def external(name: str, shape: Sequence[int], file: Path, offset: int) -> TensorProto:
    """Return a float tensor whose values stand in ``file``."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    length = math.prod(shape) * 4
    for key, value in (("location", file.name), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


# --- in the child processes ----------------------------------------------------------------------


def timed(model: str, target: str, repeat: int) -> None:
    """Say how long our passes take for a file, and what is left."""
    optimiser = ready(OURS)
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        optimiser(model, target)
        seconds.append(time.perf_counter() - start)
    child.answer(seconds=min(seconds), nodes=len(onnx.load(target).graph.node))


def weighed(model: str, target: str) -> None:
    """Say what memory a process needs that optimises a file and writes the result."""
    from optc.optimizer.optimize import optimize_file

    start = time.perf_counter()
    optimize_file(Path(model), Path(target))
    seconds = time.perf_counter() - start
    child.answer(peak_mib=child.status_mib("VmHWM"), seconds=seconds)


TASKS: dict[str, Callable[..., None]] = {"timed": timed, "weighed": weighed}


# --- in the parent -------------------------------------------------------------------------------


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the exponent by which the second of each pair grows with the first."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def growth_of_time(folder: Path, sizes: Sequence[int], repeat: int) -> dict[str, Any]:
    """Time the family; print a line a model."""
    points = []
    for size in sizes:
        path = folder / f"family{size}.onnx"
        model = Family(size).model()
        before = len(model.graph.node)
        onnx.save(model, path)
        target = str(folder / "after.onnx")
        found = child.call("timed", str(path), target, repeat, seconds=LONGEST_SECONDS)
        if "failure" in found:
            sys.exit(f"{before} nodes: {found['failure']}")
        print(
            f"{before:8} nodes, {found['nodes']:7} left {found['seconds']:9.2f} s "
            f"{found['seconds'] / before * 1e6:8.0f} us a node",
            flush=True,
        )
        points.append((before, found["seconds"]))
        path.unlink()
    exponent = slope(points) if len(points) > 1 else math.nan
    print(f"exponent {exponent:.3f}, at most {MOST_EXPONENT} wanted")
    return {"points": points, "exponent": exponent, "met": not exponent > MOST_EXPONENT}


def growth_of_memory(folder: Path, gib: float) -> dict[str, Any]:
    """Measure the peaks; print a line a model."""
    found: dict[str, Any] = {}
    for kind, most in MOST_PEAK.items():
        path = folder / f"{kind}.onnx"
        write_heavy(path, int(gib * 2**30), batchnorm=kind == "folded")
        weights = path.with_suffix(".data").stat().st_size / 2**20
        run = child.call("weighed", str(path), str(folder / "after.onnx"), seconds=LONGEST_SECONDS)
        if "failure" in run:
            sys.exit(f"{kind}: {run['failure']}")
        share = run["peak_mib"] / weights
        print(
            f"{kind}: {weights:.0f} MiB of weights, peak {run['peak_mib']:.0f} MiB, "
            f"{share:.2f} of them, at most {most} wanted; {run['seconds']:.1f} s",
            flush=True,
        )
        found[kind] = run | {"weights_mib": weights, "share": share, "met": share <= most}
        for file in folder.glob("*"):
            file.unlink()
    return found


def main() -> int:
    """Measure both."""
    if child.serve(TASKS):
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, action="append", help=f"[default: {NODES}]")
    parser.add_argument("--repeat", type=int, default=3, help="best of these [default: 3]")
    parser.add_argument("--gib", type=float, default=4, help="0: no memory [default: 4]")
    parser.add_argument("--folder", type=Path, help="where the models go for a while")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        time_ = growth_of_time(Path(folder), arguments.nodes or NODES, arguments.repeat)
        memory = growth_of_memory(Path(folder), arguments.gib) if arguments.gib else {}
    if arguments.json:
        arguments.json.write_text(json.dumps({"time": time_, "memory": memory}, indent=1))
    return 0 if time_["met"] and all(kind["met"] for kind in memory.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
