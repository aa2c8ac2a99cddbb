"""Write model.onnx, and pictures for it: a small classifier of pictures of 12 bits, as of an X-ray.

Three convolutions read the picture, and a branch beside them its contrast: the root of the mean of the
squared distances from the mean. Those squares go up to some millions; the largest number of fp16 is
65504. Weights and pictures are drawn from fixed seeds: the model computes nothing useful, and the
same everywhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 64
WIDTHS = (16, 32, 64)
CLASSES = 10
BRIGHTEST = 4095

PICTURES = {"calibration": 8, "verification": 4}
"""Folder -> how many pictures are in it, a file each."""

Picture = npt.NDArray[np.float32]


class Net:
    """Collects nodes and weights; each method adds a layer and returns the name of its output."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def op(self, kind: str, name: str, *inputs: str, **attributes: object) -> str:
        output = f"/{name}_output"
        self.nodes.append(helper.make_node(kind, inputs, [output], f"/{name}", **attributes))
        return output

    def number(self, name: str, value: float) -> str:
        self.weights.append(numpy_helper.from_array(np.array(value, np.float32), name))
        return name

    def weight(self, name: str, shape: tuple[int, ...], std: float) -> str:
        values = (std * self._random.standard_normal(shape)).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def features(self, picture: str) -> str:
        """Add the convolutions, each of which halves the picture."""
        x = self.op("Mul", "scale", picture, self.number("scale.factor", 1 / BRIGHTEST))
        before = 1
        for number, width in enumerate(WIDTHS):
            name = f"conv{number}"
            shape = (width, before, 3, 3)
            weight = self.weight(f"{name}.weight", shape, (2 / (before * 9)) ** 0.5)
            bias = self.weight(f"{name}.bias", (width,), 0.1)
            x = self.op("Conv", name, x, weight, bias, strides=[2, 2], pads=[1] * 4)
            x = self.op("Relu", f"relu{number}", x)
            before = width
        return self.op("GlobalAveragePool", "pool", x)

    def contrast(self, picture: str) -> str:
        """Add the branch that measures how far the pixels are from their mean."""
        mean = self.op("GlobalAveragePool", "contrast/mean", picture)
        distance = self.op("Sub", "contrast/distance", picture, mean)
        square = self.op("Mul", "contrast/square", distance, distance)
        variance = self.op("GlobalAveragePool", "contrast/variance", square)
        root = self.op("Sqrt", "contrast/root", variance)
        return self.op("Mul", "contrast/scale", root, self.number("contrast.factor", 1e-3))


def classifier(seed: int = 0) -> onnx.ModelProto:
    """Return the model."""
    net = Net(seed)
    x = net.op("Concat", "join", net.features("picture"), net.contrast("picture"), axis=1)
    x = net.op("Flatten", "flatten", x)
    weight = net.weight("head.weight", (CLASSES, WIDTHS[-1] + 1), 0.5)
    x = net.op("Gemm", "head", x, weight, transB=1)
    net.nodes.append(helper.make_node("Softmax", [x], ["probability"], "/softmax", axis=1))
    shape = ["batch", 1, SIDE, SIDE]
    graph = helper.make_graph(
        net.nodes,
        "contrast",
        [helper.make_tensor_value_info("picture", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["batch", CLASSES])],
        net.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def picture(random: np.random.Generator) -> Picture:
    """Return a few bright disks on a slope, with noise: one picture, 0 to 4095."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    light = random.uniform(200, 800) + random.uniform(0, 15) * x + random.uniform(0, 15) * y
    for _ in range(random.integers(1, 6)):
        (row, column), radius = random.uniform(0, SIDE, 2), random.uniform(4, 16)
        inside = (y - row) ** 2 + (x - column) ** 2 < radius**2
        light = light + random.uniform(200, 2500) * inside
    light = light + random.normal(0, 20, light.shape)
    return light.clip(0, BRIGHTEST).round().astype(np.float32)[None, None]


if __name__ == "__main__":
    model = classifier()
    onnx.checker.check_model(model, full_check=True)
    path = Path(__file__).with_name("model.onnx")
    onnx.save(model, path)
    for seed, (name, count) in enumerate(PICTURES.items(), start=1):
        random = np.random.default_rng(seed)
        path.with_name(name).mkdir(exist_ok=True)
        for number in range(count):
            np.savez(path.with_name(name) / f"{number}.npz", picture=picture(random))
    pictures = ", ".join(f"{count} for {name}" for name, count in PICTURES.items())
    print(f"{path}: {len(model.graph.node)} nodes; pictures: {pictures}")
