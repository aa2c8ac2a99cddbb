"""Models with heavy control flow that TensorRT does not take, of a few nodes."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'


def with_weights(source: str, **shapes: tuple[int, ...]) -> ModelProto:
    """Return the model of ``source`` with seeded weights of these shapes."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(HEAD + source)
    for name, shape in shapes.items():
        scale = np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 1
        values = (rng.uniform(-1, 1, shape) / scale).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def branching(size: int = 64, channels: int = 32) -> ModelProto:
    """A convolution, then how many are positive by NonZero, then a product; or a cheap way round.

    Which branch is taken, the data says. TensorRT refuses the If for the NonZero in it.
    """
    c = channels
    return with_weights(
        f"""
        g (float[1,{c},{size},{size}] x, float limit) => (float[1,{c}] y)
        <int64[2] row = {{1, {c}}}, int64[1] flat = {{-1}}>
        {{
            [mean]  m = ReduceMean <keepdims = 0> (x)
            [above] c = Greater (m, limit)
            [if]    y = If (c) <
                then_branch = heavy () => (float[1,{c}] t)
                {{
                    [conv1] a1 = Conv <pads = [1, 1, 1, 1]> (x, k1)
                    [relu1] a2 = Relu (a1)
                    [conv2] a3 = Conv <pads = [1, 1, 1, 1]> (a2, k2)
                    [pool]  a4 = GlobalAveragePool (a3)
                    [flat]  a5 = Reshape (a4, flat)
                    [where] i = NonZero (a5)
                    [cast]  j = Cast <to = 1> (i)
                    [total] s = ReduceSum (j)
                    [scale] a6 = Mul (a5, s)
                    [row]   a7 = Reshape (a6, row)
                    [tail1] t1 = MatMul (a7, w)
                    [tail2] t = Tanh (t1)
                }},
                else_branch = light () => (float[1,{c}] e)
                {{
                    [mean2] b1 = ReduceMean <axes = [2, 3], keepdims = 0> (x)
                    [tail3] t2 = MatMul (b1, w)
                    [tail4] e = Tanh (t2)
                }}
            >
        }}""",
        k1=(c, c, 3, 3),
        k2=(c, c, 3, 3),
        w=(c, c),
    )


def looping(rounds: int = 3, size: int = 64, channels: int = 32) -> ModelProto:
    """Rounds of a convolution that is scaled by how many of its means are positive."""
    c = channels
    return with_weights(
        f"""
        g (float[1,{c},{size},{size}] x) => (float[1,{c},{size},{size}] y)
        <int64 n = {{{rounds}}}, bool yes = {{1}}, int64[1] flat = {{-1}}, float one = {{1}}>
        {{
            [loop] y = Loop (n, yes, x) <body = round
                (int64 i, bool go, float[1,{c},{size},{size}] h) =>
                (bool on, float[1,{c},{size},{size}] z)
                {{
                    [on]    on = Identity (go)
                    [conv]  a = Conv <pads = [1, 1, 1, 1]> (h, k)
                    [conv2] b = Conv <pads = [1, 1, 1, 1]> (a, k)
                    [pool]  p = GlobalAveragePool (b)
                    [flat]  f = Reshape (p, flat)
                    [where] w = NonZero (f)
                    [cast]  j = Cast <to = 1> (w)
                    [total] s = ReduceSum <keepdims = 0> (j)
                    [more]  t = Add (s, one)
                    [scale] z = Div (b, t)
                }}>
        }}""",
        k=(c, c, 3, 3),
    )
