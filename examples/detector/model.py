"""Write model.onnx: a small one-stage detector, from pixels to the boxes that are kept.

    image -> backbone (stride 8) -> three levels with a feature pyramid -> class scores and distances
          -> boxes -> the best points -> NonMaxSuppression -> the kept boxes, their scores and classes

How many boxes are kept depends on the image. The weights are drawn from a fixed seed: the model
detects nothing that anyone would call an object, and the same everywhere.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 256
CLASSES = 8
WIDTH = 48
STRIDES = (8, 16, 32)
BEST_POINTS = 200
MOST_KEPT_OF_A_CLASS = 20


class Detector:
    """Collects nodes and weights; each method adds a layer and returns the name of its output."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def op(self, kind: str, name: str, *inputs: str, to: str = "", **attributes: object) -> str:
        output = to or f"/{name}/{kind}_output"
        self.nodes.append(helper.make_node(kind, inputs, [output], f"/{name}/{kind}", **attributes))
        return output

    def constant(self, name: str, values: npt.ArrayLike, dtype: str = "float32") -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def drawn(self, name: str, shape: tuple[int, ...], mean: float, std: float) -> str:
        return self.constant(name, mean + std * self._random.standard_normal(shape))

    def conv(
        self, x: str, name: str, before: int, after: int, *, kernel: int = 3, stride: int = 1
    ) -> str:
        shape = (after, before, kernel, kernel)
        weight = self.drawn(f"{name}.weight", shape, 0.0, (2 / (before * kernel**2)) ** 0.5)
        bias = self.drawn(f"{name}.bias", (after,), 0.0, 0.1)
        return self.op("Conv", name, x, weight, bias, strides=[stride] * 2, pads=[kernel // 2] * 4)

    def predict(self, x: str, name: str, channels: int) -> str:
        """Add a convolution of one pixel whose outputs spread widely: some boxes stand out."""
        weight = self.drawn(f"{name}.weight", (channels, WIDTH, 1, 1), 0.0, 1.2)
        return self.op("Conv", name, x, weight)

    def layer(
        self, x: str, name: str, before: int, after: int, *, stride: int = 1, to: str = ""
    ) -> str:
        """Add convolution, batch normalisation and SiLU, as YOLO has them."""
        y = self.conv(x, f"{name}/conv", before, after, stride=stride)
        y = self.op(
            "BatchNormalization",
            f"{name}/bn",
            y,
            self.drawn(f"{name}/bn.weight", (after,), 1.0, 0.05),
            self.drawn(f"{name}/bn.bias", (after,), 0.0, 0.1),
            self.drawn(f"{name}/bn.running_mean", (after,), 0.0, 0.1),
            self.drawn(f"{name}/bn.running_var", (after,), 1.0, 0.05),
        )
        return self.op("Mul", f"{name}/act", y, self.op("Sigmoid", f"{name}/act", y), to=to)

    def pyramid(self, x: str) -> list[str]:
        """Return a level for each stride: made smaller step by step, then added from the top."""
        levels = [x]
        for i in range(1, len(STRIDES)):
            levels.append(self.layer(levels[-1], f"neck/down{i}", WIDTH, WIDTH, stride=2))
        twice = self.constant("twice", [1, 1, 2, 2])
        for i in reversed(range(len(levels) - 1)):
            up = self.op("Resize", f"neck/up{i}", levels[i + 1], "", twice, mode="nearest")
            levels[i] = self.op("Add", f"neck/add{i}", levels[i], up)
        return levels

    def head(self, level: str, i: int) -> tuple[str, str]:
        """Return scores [batch, CLASSES, points] and distances [batch, 4, points] of a level."""
        x = self.layer(level, f"head{i}/stem", WIDTH, WIDTH)
        flat = self.constant(f"head{i}.flat", [0, 0, -1], "int64")
        scores = self.op("Sigmoid", f"head{i}/score", self.predict(x, f"head{i}/class", CLASSES))
        distances = self.op("Softplus", f"head{i}/box", self.predict(x, f"head{i}/box", 4))
        return (
            self.op("Reshape", f"head{i}/score", scores, flat),
            self.op("Reshape", f"head{i}/box", distances, flat),
        )

    def boxes(self, distances: str) -> str:
        """Return corners [batch, points, 4], clipped to the image, in pixels."""
        grids = []
        for stride in STRIDES:
            centre = (np.arange(SIZE // stride) + 0.5) * stride
            y, x = np.meshgrid(centre, centre, indexing="ij")
            grids.append(np.stack([x.ravel(), y.ravel(), np.full(x.size, stride)]))
        grid = np.concatenate(grids, axis=1)  # x, y and stride of each point
        points = self.constant("points", np.concatenate([grid[:2], grid[:2]])[None])
        signed = self.constant("strides", np.outer([-1, -1, 1, 1], grid[2])[None])
        corners = self.op("Mul", "decode/scale", distances, signed)
        corners = self.op("Add", "decode/move", corners, points)
        corners = self.op(
            "Clip", "decode/clip", corners, self.constant("low", 0), self.constant("high", SIZE)
        )
        return self.op("Transpose", "decode", corners, perm=[0, 2, 1])

    def best(self, boxes: str, scores: str) -> tuple[str, str]:
        """Return boxes and scores of the points that are the likeliest to be anything."""
        highest = self.op("ReduceMax", "best/of_classes", scores, axes=[1], keepdims=0)
        most = self.constant("best.most", [BEST_POINTS], "int64")
        ranked = ["/best/TopK_values", "/best/TopK_indices"]
        self.nodes.append(helper.make_node("TopK", [highest, most], ranked, "/best/TopK"))
        points = self.op("Unsqueeze", "best", ranked[1], self.constant("best.last", [2], "int64"))
        of_points = self.op("Transpose", "best/by_point", scores, perm=[0, 2, 1])
        picked = self.op("GatherND", "best/scores", of_points, points, batch_dims=1)
        return (
            self.op("GatherND", "best/boxes", boxes, points, batch_dims=1),
            self.op("Transpose", "best/by_class", picked, perm=[0, 2, 1]),
        )

    def keep(self, boxes: str, scores: str) -> None:
        """Add what picks the boxes of each class that overlap no better one."""
        kept = self.op(
            "NonMaxSuppression",
            "post",
            boxes,
            scores,
            self.constant("most", [MOST_KEPT_OF_A_CLASS], "int64"),
            self.constant("least_overlap", [0.5]),
            self.constant("least_score", [0.9]),
        )  # a row [image, class, point] for each
        ends = [self.constant(f"column{i}", [i], "int64") for i in range(4)]

        def columns(name: str, low: int, high: int) -> str:
            return self.op("Slice", f"post/{name}", kept, ends[low], ends[high], ends[1])

        row = self.op("Concat", "post/row", columns("i", 0, 1), columns("j", 2, 3), axis=1)
        self.op("GatherND", "post/boxes", boxes, row, to="boxes")
        self.op("GatherND", "post/scores", scores, kept, to="scores")
        self.op("Squeeze", "post/images", columns("image", 0, 1), ends[1], to="images")
        self.op("Squeeze", "post/classes", columns("class", 1, 2), ends[1], to="classes")


def detector(seed: int = 0) -> onnx.ModelProto:
    """Return the model."""
    net = Detector(seed)
    x = "image"
    widths = (3, 16, 32, WIDTH)
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        x = net.layer(x, f"backbone/{i}/a", before, after, stride=2)
        to = "/backbone/out" if after == WIDTH else ""
        x = net.layer(x, f"backbone/{i}/b", after, after, to=to)
    scores, distances = zip(*[net.head(x, i) for i, x in enumerate(net.pyramid(x))], strict=True)
    boxes = net.boxes(net.op("Concat", "decode", *distances, axis=2))
    net.keep(*net.best(boxes, net.op("Concat", "scores", *scores, axis=2)))
    graph = helper.make_graph(
        net.nodes,
        "detector",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["kept", 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["kept"]),
            helper.make_tensor_value_info("classes", TensorProto.INT64, ["kept"]),
            helper.make_tensor_value_info("images", TensorProto.INT64, ["kept"]),
        ],
        net.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


if __name__ == "__main__":
    model = detector()
    onnx.checker.check_model(model, full_check=True)
    path = Path(__file__).with_name("model.onnx")
    onnx.save(model, path)
    print(f"{path}: {len(model.graph.node)} nodes, {path.stat().st_size / 1e6:.1f} MB")
