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


def decoding(most: int = 12, width: int = 32, words: int = 20) -> ModelProto:
    """An encoder of an image, and a greedy decoder that attends to it until all rows have ended.

    As exporters write it: keys and values are computed in each round, words are joined to those
    before them, so how many come out is for the data to say.
    """
    d, n = width, words
    return with_weights(
        f"""
        g (float[batch,1,16,wide] image) => (int64[batch,length] tokens, float[batch,{d}] state)
        <int64 most = {{{most}}}, bool yes = {{1}}, int64 end = {{1}}, int64[1] first = {{0}},
         int64[1] two = {{2}}, int64[1] one = {{1}}, int64[1] none = {{0}}, int64[1] wide = {{{d}}}>
        {{
            [enc1]  e1 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (image, k1)
            [enc2]  e2 = Relu (e1)
            [enc3]  e3 = Conv <strides = [2, 1], pads = [1, 1, 1, 1]> (e2, k2)
            [enc4]  e4 = ReduceMean <axes = [2], keepdims = 0> (e3)
            [enc5]  memory = Transpose <perm = [0, 2, 1]> (e4)
            [size]  batch = Shape <start = 0, end = 1> (memory)
            [size1] empty = Concat <axis = 0> (batch, none)
            [size2] full = Concat <axis = 0> (batch, wide)
            [t0]    tokens0 = ConstantOfShape <value = int64[1] {{0}}> (empty)
            [h0]    state0 = ConstantOfShape <value = float[1] {{0}}> (full)
            [w0]    word0 = ConstantOfShape <value = int64[1] {{0}}> (batch)
            [d0]    done0 = ConstantOfShape <value = bool[1] {{0}}> (batch)
            [loop]  last, tokens, state, ended = Loop (most, yes, word0, tokens0, state0, done0) <
                body = step (int64 i, bool go, int64[batch] word, int64[batch,before] said,
                             float[batch,{d}] h, bool[batch] done)
                    => (bool on, int64[batch] next, int64[batch,after] more, float[batch,{d}] h2,
                        bool[batch] done2)
                {{
                    [keys]   k = MatMul (memory, wk)
                    [values] v = MatMul (memory, wv)
                    [turn]   kt = Transpose <perm = [0, 2, 1]> (k)
                    [embed]  e = Gather (words, word)
                    [query]  q = MatMul (h, wq)
                    [row]    q1 = Unsqueeze (q, one)
                    [score]  s = MatMul (q1, kt)
                    [soft]   a = Softmax (s)
                    [mix]    c = MatMul (a, v)
                    [flat]   c1 = Squeeze (c, one)
                    [sum]    u = Add (c1, e)
                    [cell]   u1 = MatMul (h, wh)
                    [sum2]   u2 = Add (u, u1)
                    [tanh]   h2 = Tanh (u2)
                    [out]    l = MatMul (h2, wo)
                    [best]   next = ArgMax <axis = 1, keepdims = 0> (l)
                    [column] n1 = Unsqueeze (next, one)
                    [say]    more = Concat <axis = 1> (said, n1)
                    [stop]   x = Equal (next, end)
                    [either] done2 = Or (done, x)
                    [open]   o = Not (done2)
                    [count]  o1 = Cast <to = 6> (o)
                    [any]    o2 = ReduceMax <keepdims = 0> (o1)
                    [on]     on = Cast <to = 9> (o2)
                }}>
        }}""",
        k1=(d, 1, 3, 3),
        k2=(d, d, 3, 3),
        wk=(d, d),
        wv=(d, d),
        wq=(d, d),
        wh=(d, d),
        wo=(d, n),
        words=(n, d),
    )
