"""Write model.onnx: a small ResNet-18 for images of 128 by 128, as an exporter would leave it.

Each of its 20 convolutions is followed by a BatchNormalization of its own, and the batch is dynamic.
The weights are drawn from a fixed seed: the model computes nothing useful, and the same everywhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = 100
WIDTHS = (16, 32, 64, 128)
BLOCKS = 2


class ResNet:
    """Collects nodes and weights; each method adds a layer and returns the name of its output."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def op(self, kind: str, name: str, *inputs: str, **attributes: object) -> str:
        output = f"/{name}/{kind}_output"
        self.nodes.append(helper.make_node(kind, inputs, [output], f"/{name}/{kind}", **attributes))
        return output

    def weight(self, name: str, shape: tuple[int, ...], mean: float, std: float) -> str:
        values = (mean + std * self._random.standard_normal(shape)).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def conv(
        self, x: str, name: str, before: int, after: int, *, kernel: int, stride: int = 1
    ) -> str:
        shape = (after, before, kernel, kernel)
        weight = self.weight(f"{name}.weight", shape, 0.0, (2 / (before * kernel**2)) ** 0.5)
        return self.op("Conv", name, x, weight, strides=[stride] * 2, pads=[kernel // 2] * 4)

    def norm(self, x: str, name: str, channels: int) -> str:
        shape = (channels,)
        return self.op(
            "BatchNormalization",
            name,
            x,
            self.weight(f"{name}.weight", shape, 0.7, 0.05),
            self.weight(f"{name}.bias", shape, 0.0, 0.1),
            self.weight(f"{name}.running_mean", shape, 0.0, 0.1),
            self.weight(f"{name}.running_var", shape, 1.0, 0.05),
        )

    def block(self, x: str, name: str, before: int, after: int, stride: int) -> str:
        """Add two convolutions and the shortcut around them."""
        y = self.conv(x, f"{name}/conv1", before, after, kernel=3, stride=stride)
        y = self.op("Relu", f"{name}/relu1", self.norm(y, f"{name}/bn1", after))
        y = self.conv(y, f"{name}/conv2", after, after, kernel=3)
        y = self.norm(y, f"{name}/bn2", after)
        if before != after:
            x = self.conv(x, f"{name}/down/conv", before, after, kernel=1, stride=stride)
            x = self.norm(x, f"{name}/down/bn", after)
        return self.op("Relu", f"{name}/relu2", self.op("Add", name, y, x))


def resnet(seed: int = 0) -> onnx.ModelProto:
    """Return the model."""
    net = ResNet(seed)
    before = WIDTHS[0]
    x = net.conv("image", "stem/conv", 3, before, kernel=7, stride=2)
    x = net.op("Relu", "stem/relu", net.norm(x, "stem/bn", before))
    x = net.op("MaxPool", "stem/pool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for i, width in enumerate(WIDTHS):
        for j in range(BLOCKS):
            stride = 2 if i > 0 and j == 0 else 1
            x = net.block(x, f"layer{i + 1}/{j}", before, width, stride)
            before = width
    x = net.op("GlobalAveragePool", "pool", x)
    x = net.op("Flatten", "flatten", x)
    weight = net.weight("fc.weight", (CLASSES, before), 0.0, 0.05)
    bias = net.weight("fc.bias", (CLASSES,), 0.0, 0.05)
    x = net.op("Gemm", "fc", x, weight, bias, transB=1)
    net.nodes.append(helper.make_node("Softmax", [x], ["probability"], "/softmax", axis=1))
    graph = helper.make_graph(
        net.nodes,
        "classifier",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 128, 128])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["batch", CLASSES])],
        net.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


if __name__ == "__main__":
    model = resnet()
    onnx.checker.check_model(model, full_check=True)
    path = Path(__file__).with_name("model.onnx")
    onnx.save(model, path)
    print(f"{path}: {len(model.graph.node)} nodes, {path.stat().st_size / 1e6:.1f} MB")
