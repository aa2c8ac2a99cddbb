"""Write model.onnx: a keypoint detector with a descriptor for each point it finds.

TensorRT refuses NonZero, which says where the points are; what stands before it and after it has
weights. So the model needs two engines where NonZero is not rewritten. The weights are drawn from a
fixed seed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

GRAPH = """
<ir_version: 9, opset_import: ["" : 17]>
keypoints (float[1,1,128,128] image) => (int64[points,2] points, float[points,64] descriptors)
<
    float least = {0.6},
    float tiny = {1e-6},
    int64[1] two = {2}, int64[1] four = {4}, int64[1] one = {1}, int64[1] zero = {0}
>
{
    [conv1]  c1 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (image, conv1_weight)
    [relu1]  r1 = Relu (c1)
    [conv2]  c2 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (r1, conv2_weight)
    [relu2]  r2 = Relu (c2)
    [conv3]  c3 = Conv <pads = [1, 1, 1, 1]> (r2, conv3_weight)
    [relu3]  features = Relu (c3)

    [heat]     h = Conv (features, heat_weight)
    [sigmoid]  heat = Sigmoid (h)
    [around]   highest = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (heat)
    [peak]     is_highest = Equal (heat, highest)
    [clear]    is_high = Greater (heat, least)
    [point]    is_point = And (is_highest, is_high)

    [where]    where = NonZero (is_point)
    [rows]     rows = Transpose <perm = [1, 0]> (where)
    [points]   points = Slice (rows, two, four, one)

    [last]     features_last = Transpose <perm = [0, 2, 3, 1]> (features)
    [squeeze]  plane = Squeeze (features_last, zero)
    [at]       at = GatherND (plane, points)
    [gemm1]    g1 = Gemm (at, gemm1_weight)
    [relu4]    r4 = Relu (g1)
    [gemm2]    g2 = Gemm (r4, gemm2_weight)
    [length]   length = ReduceL2 <axes = [1], keepdims = 1> (g2)
    [safe]     safe = Add (length, tiny)
    [unit]     descriptors = Div (g2, safe)
}
"""

WEIGHTS = {
    "conv1_weight": (32, 1, 3, 3),
    "conv2_weight": (64, 32, 3, 3),
    "conv3_weight": (64, 64, 3, 3),
    "heat_weight": (1, 64, 1, 1),
    "gemm1_weight": (64, 256),
    "gemm2_weight": (256, 64),
}


def keypoints(seed: int = 0) -> onnx.ModelProto:
    """Return the model."""
    model = onnx.parser.parse_model(GRAPH)
    random = np.random.default_rng(seed)
    for name, shape in WEIGHTS.items():
        inputs = shape[0] if len(shape) == 2 else np.prod(shape[1:])
        values = np.sqrt(2 / inputs) * random.standard_normal(shape)
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return model


if __name__ == "__main__":
    model = keypoints()
    onnx.checker.check_model(model, full_check=True)
    path = Path(__file__).with_name("model.onnx")
    onnx.save(model, path)
    print(f"{path}: {len(model.graph.node)} nodes, {path.stat().st_size / 1e6:.1f} MB")
