"""The names of ONNX's own ops, of the domains ``ai.onnx`` and ``ai.onnx.ml``, in all versions.

A spec that names an op the model lacks is right if ONNX knows the op, and mistaken otherwise; this
list tells them apart without importing onnx.
"""

from typing import Final

_NAMES: Final = """
Abs Acos Acosh Add AffineGrid And ArgMax ArgMin ArrayFeatureExtractor Asin Asinh Atan Atanh
Attention AveragePool BatchNormalization Bernoulli Binarizer BitCast BitShift BitwiseAnd
BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Cast CastLike CastMap CategoryMapper
CausalConvWithState Ceil Celu CenterCropPad Clip Col2Im Compress Concat ConcatFromSequence
Constant ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumProd CumSum DFT DeformConv
DepthToSpace DequantizeLinear Det DictVectorizer Div Dropout DynamicQuantizeLinear Einsum Elu
Equal Erf Exp Expand EyeLike FeatureVectorizer Flatten Floor GRU Gather GatherElements GatherND
Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If
ImageDecoder Imputer InstanceNormalization IsInf IsNaN LRN LSTM LabelEncoder LayerNormalization
LeakyRelu Less LessOrEqual LinearAttention LinearClassifier LinearRegressor Log LogSoftmax Loop
LpNormalization LpPool MatMul MatMulInteger Max MaxPool MaxRoiPool MaxUnpool Mean
MeanVarianceNormalization MelWeightMatrix Min Mish Mod Mul Multinomial Neg
NegativeLogLikelihoodLoss NonMaxSuppression NonZero Normalizer Not OneHot OneHotEncoder Optional
OptionalGetElement OptionalHasElement Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear
RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range
Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
ReduceProd ReduceSum ReduceSumSquare RegexFullMatch Relu Reshape Resize ReverseSequence RoiAlign
RotaryEmbedding Round STFT SVMClassifier SVMRegressor Scaler Scan Scatter ScatterElements
ScatterND Selu SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert
SequenceLength SequenceMap Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth Split SplitToSequence Sqrt Squeeze
StringConcat StringNormalizer StringSplit Sub Sum SwiGLU Swish Tan Tanh TensorScatter
TfIdfVectorizer ThresholdedRelu Tile TopK Transpose TreeEnsemble TreeEnsembleClassifier
TreeEnsembleRegressor Trilu Unique Unsqueeze Upsample Where Xor ZipMap
"""

ONNX_OPS: Final = frozenset(_NAMES.split())
