"""What ``torch.onnx.export`` writes for the ops that an evaluation graph has: ONNX's standard operators alone.

Each step is an operator of its own, as :mod:`fused_conv_bn.reference` has them: runtimes fold BatchNorms into
convolutions and fuse activations themselves. It is imported when somebody asks for the translations, since it imports
onnxscript. The exporter reads the annotations: what has none is a tensor, all else a number or a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnx import TensorProto
from onnx.helper import make_tensor
from onnxscript import opset18

op: Any = opset18
_ops = torch.ops.fused_conv_bn


def _like(number: float, x: Any) -> Any:
    """A number in the dtype of ``x``, which may be float64."""
    return op.CastLike(op.Constant(value=make_tensor("number", TensorProto.DOUBLE, [], [number])), x)


def _silu(x: Any) -> Any:
    return op.Mul(x, op.Sigmoid(x))


def _gelu(x: Any) -> Any:
    half = op.Mul(x, _like(0.5, x))
    return op.Mul(half, op.Add(op.Erf(op.Mul(x, _like(math.sqrt(0.5), x))), _like(1.0, x)))


def _gelu_tanh(x: Any) -> Any:
    cubic = op.Mul(op.Mul(op.Mul(x, x), x), _like(0.044715, x))
    inner = op.Mul(op.Add(x, cubic), _like(math.sqrt(2 / math.pi), x))
    return op.Mul(op.Mul(x, _like(0.5, x)), op.Add(op.Tanh(inner), _like(1.0, x)))


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "none": lambda x: x,
    "relu": lambda x: op.Relu(x),
    "relu6": lambda x: op.Clip(x, _like(0.0, x), _like(6.0, x)),
    "silu": _silu,
    "hardswish": lambda x: op.HardSwish(x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "sigmoid": lambda x: op.Sigmoid(x),
    "hardsigmoid": lambda x: op.HardSigmoid(x, alpha=1 / 6, beta=0.5),
    "mish": lambda x: op.Mish(x),
    "tanh": lambda x: op.Tanh(x),
}
"""By name, but ``leaky_relu``, which takes a slope."""


def _epilogue(y: Any, residual: Any, activation: str, negative_slope: float, residual_last: bool) -> Any:
    if residual is not None and not residual_last:
        y = op.Add(y, residual)
    y = op.LeakyRelu(y, alpha=negative_slope) if activation == "leaky_relu" else _ACTIVATIONS[activation](y)
    if residual is not None and residual_last:
        y = op.Add(y, residual)
    return y


def _per_channel(t: Any, rank: int, like: Any) -> Any:
    """A tensor of shape (C,), to be broadcast over one of that many dimensions, in its dtype."""
    return op.Unsqueeze(op.CastLike(t, like), op.Constant(value_ints=list(range(1, rank - 1))))


def _scaled(t: Any, factor: float) -> Any:
    return t if factor == 1.0 else op.Mul(t, _like(factor, t))


def _normalised(x: Any, mean: Any, var: Any, weight: Any, bias: Any, factor: float, eps: float) -> Any:
    """BatchNormalization with the factor in its scale and bias, which a runtime multiplies once."""
    of = mean if weight is None else weight
    if weight is None:
        weight = op.Expand(_like(1.0, of), op.Shape(mean))
    if bias is None:
        bias = op.Expand(_like(0.0, of), op.Shape(mean))
    y = op.BatchNormalization(x, _scaled(weight, factor), _scaled(bias, factor), mean, var, epsilon=eps)
    return y[0] if isinstance(y, Sequence) else y


def _convolution(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Any:
    space = len(weight.shape) - 2
    stride, padding, dilation = (_over(v, space) for v in (stride, padding, dilation))
    operands = (x, weight) if bias is None else (x, weight, bias)
    return op.Conv(*operands, strides=stride, pads=[*padding, *padding], dilations=dilation, group=groups)


def _over(values: Sequence[int], space: int) -> list[int]:
    return [*values] * space if len(values) == 1 else [*values]


# ---- the ops, with their schemas' arguments --------------------------------------------------------------------------


def fold_bn(
    running_mean,
    running_var,
    weight=None,
    bias=None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    conv_bias=None,
):
    wide = running_mean if running_mean.dtype.name == "DOUBLE" else op.Constant(value_float=0.0)

    def widened(t: Any) -> Any:
        return None if t is None else op.CastLike(t, wide)

    mean, var, weight, bias, conv_bias = map(widened, (running_mean, running_var, weight, bias, conv_bias))
    scale = op.Div(_like(scaling_factor, var), op.Sqrt(op.Add(var, _like(eps, var))))
    if weight is not None:
        scale = op.Mul(scale, weight)
    if conv_bias is not None:
        mean = op.Sub(mean, conv_bias)
    shift = op.Neg(op.Mul(mean, scale))
    if bias is not None:
        shift = op.Add(shift, _scaled(bias, scaling_factor))
    return scale, shift


def scale_shift(
    input,
    scale,
    shift,
    residual=None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
):
    y, rank = input, len(input.shape)
    if scale is not None:
        y = op.Mul(y, _per_channel(scale, rank, input))
    if shift is not None:
        y = op.Add(y, _per_channel(shift, rank, input))
    y = _epilogue(y, residual, activation, negative_slope, residual_last)
    return op.Identity(y) if y is input else y


def bn_scale(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    residual=None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
):
    y = _normalised(input, running_mean, running_var, weight, bias, scaling_factor, eps)
    return _epilogue(y, residual, activation, negative_slope, residual_last)


def bn_scale_cat(
    inputs,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
):
    y = _normalised(op.Concat(*inputs, axis=1), running_mean, running_var, weight, bias, scaling_factor, eps)
    return _epilogue(y, None, activation, negative_slope, False)


def conv_scale_shift(
    input,
    weight,
    scale,
    shift,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    residual=None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
    allow_tf32: bool = False,
):
    # A shift alone is a bias, as the exporter writes that of a convolution.
    bias = None if shift is None or scale is not None else op.CastLike(shift, input)
    y, rank = _convolution(input, weight, bias, stride, padding, dilation, groups), len(weight.shape)
    if scale is not None:
        y = op.Mul(y, _per_channel(scale, rank, input))
        if shift is not None:
            y = op.Add(y, _per_channel(shift, rank, input))
    return _epilogue(y, residual, activation, negative_slope, residual_last)


def conv_bn_scale(
    input,
    conv_weight,
    conv_bias,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    residual=None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
    allow_tf32: bool = False,
):
    if conv_bias is not None:
        conv_bias = op.CastLike(conv_bias, input)
    y = _convolution(input, conv_weight, conv_bias, stride, padding, dilation, groups)
    y = _normalised(y, running_mean, running_var, weight, bias, scaling_factor, eps)
    return _epilogue(y, residual, activation, negative_slope, residual_last)


def conv_bn_scale_mean(
    input,
    conv_weight,
    conv_bias,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    residual=None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
    allow_tf32: bool = False,
):
    bn = running_mean, running_var, weight, bias, scaling_factor, eps
    window = stride, padding, dilation, groups
    epilogue = residual, activation, negative_slope, residual_last
    y = conv_bn_scale(input, conv_weight, conv_bias, *bn, *window, *epilogue)
    return y, _mean(y, len(input.shape), True)


def _gated(input: Any, gate: Any) -> Any:
    # (N, C) and perhaps ones: 0 is an extent that stays, of which all that follow are 1.
    shape = op.Constant(value_ints=[0, 0, *[1] * (len(input.shape) - 2)])
    return op.Mul(input, op.Reshape(gate, shape))


def gate_conv_bn_scale(
    input,
    gate,
    conv_weight,
    conv_bias,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    residual=None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
    allow_tf32: bool = False,
):
    bn = running_mean, running_var, weight, bias, scaling_factor, eps
    window = stride, padding, dilation, groups
    epilogue = residual, activation, negative_slope, residual_last
    return conv_bn_scale(_gated(input, gate), conv_weight, conv_bias, *bn, *window, *epilogue)


def gate(
    input,
    gate,
    residual=None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
):
    return _epilogue(_gated(input, gate), residual, activation, negative_slope, residual_last)


def max_pool2d(
    input,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
):
    kernel, padding, dilation = (_over(v, 2) for v in (kernel_size, padding, dilation))
    stride = _over(stride, 2) if stride else kernel
    y = op.MaxPool(
        input,
        kernel_shape=kernel,
        strides=stride,
        pads=[*padding, *padding],
        dilations=dilation,
        ceil_mode=int(ceil_mode),
    )
    return y[0] if isinstance(y, Sequence) else y


def _mean(y: Any, dims: int, keepdim: bool) -> Any:
    """``dims``: how many it has, which what is made here does not know."""
    return op.ReduceMean(y, op.Constant(value_ints=list(range(2, dims))), keepdims=int(keepdim))


def spatial_mean(input, keepdim: bool = False):
    return _mean(input, len(input.shape), keepdim)


def squeeze_excite(
    input,
    weight1,
    bias1,
    weight2,
    bias2,
    activation: str = "relu",
    gate: str = "sigmoid",
    negative_slope: float = 0.01,
):
    window = (1,), (0,), (1,), 1
    hidden = _convolution(spatial_mean(input, True), weight1, bias1, *window)
    hidden = _epilogue(hidden, None, activation, negative_slope, False)
    return _epilogue(_convolution(hidden, weight2, bias2, *window), None, gate, negative_slope, False)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translation of each op."""
    return {
        getattr(_ops, f.__name__).default: f
        for f in (
            bn_scale,
            bn_scale_cat,
            conv_bn_scale,
            conv_bn_scale_mean,
            conv_scale_shift,
            fold_bn,
            gate,
            gate_conv_bn_scale,
            max_pool2d,
            scale_shift,
            spatial_mean,
            squeeze_excite,
        )
    }
