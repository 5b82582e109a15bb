"""Twins of the ops that a backward calls, and of a batch's moments: functions of :mod:`fused_conv_bn.reference`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .reference import convolution, per_channel, scaled

_aten = torch.ops.aten

FROM_RESULT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, y: _aten.threshold_backward(dy, y, 0),
    "sigmoid": _aten.sigmoid_backward,
    "tanh": _aten.tanh_backward,
}
"""The gradient of an activation's input from that of its result, and the result."""

_FROM_INPUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, x: _aten.threshold_backward(dy, x, 0),
    "relu6": lambda dy, x: _aten.hardtanh_backward(dy, x, 0.0, 6.0),
    "silu": _aten.silu_backward,
    "hardswish": _aten.hardswish_backward,
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda dy, x: _aten.gelu_backward(dy, x, approximate="tanh"),
    "sigmoid": lambda dy, x: _aten.sigmoid_backward(dy, torch.sigmoid(x)),
    "hardsigmoid": _aten.hardsigmoid_backward,
    "mish": _aten.mish_backward,
    "tanh": lambda dy, x: _aten.tanh_backward(dy, torch.tanh(x)),
}
"""The same from the activation's input. ``leaky_relu`` is not in it: it takes a slope."""


def activation_backward(dy: Tensor, x: Tensor, activation: str, negative_slope: float) -> Tensor:
    if activation == "leaky_relu":
        return _aten.leaky_relu_backward(dy, x, negative_slope, False)
    return _FROM_INPUT[activation](dy, x)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What tensors of this dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def _activation_gradient(
    dy: Tensor,
    z: Tensor | None,
    result: Tensor | None,
    residual: Tensor | None,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    if activation == "none":
        return dy
    if result is not None:
        return FROM_RESULT[activation](dy, result)
    assert z is not None
    dtype, dim = wide(dy.dtype), dy.dim()
    v = z.to(dtype)
    if center is not None:
        v = v - per_channel(center, dim)
    if scale is not None:
        v = v * per_channel(scale, dim)
    if shift is not None:
        v = v + per_channel(shift, dim)
    if residual is not None:
        v = v + residual
    return activation_backward(dy.to(dtype), v, activation, negative_slope).to(dy.dtype)


def bn_scale_backward(
    dy: Tensor,
    input: Tensor | None,
    result: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    needs_input: bool = False,
    needs_weight: bool = False,
    needs_bias: bool = False,
    needs_conv_bias: bool = False,
    needs_residual: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Twin of ``torch.ops.fused_conv_bn.bn_scale_backward``: the gradients of input, weight, bias, conv_bias, residual.

    Of ``activation(affine(input) + residual)``, where the affine is that of ``bn_scale`` with ``var``, of
    ``bn_scale_train`` with ``invstd``, and of ``scale_shift`` with neither.
    """
    dtype = wide(dy.dtype)
    center, var, invstd, gain, offset = _wide(dtype, mean, var, invstd, weight, bias)
    if center is not None and conv_bias is not None and invstd is None:
        center = center - conv_bias.to(dtype)
    if scaling_factor != 1.0:
        if gain is None:
            gain = torch.full((dy.size(1),), scaling_factor, dtype=dtype, device=dy.device)
        else:
            gain = gain * scaling_factor
        offset = None if offset is None else offset * scaling_factor
    inverse = torch.rsqrt(var + eps) if invstd is None and var is not None else invstd
    scale = gain if inverse is None else inverse if gain is None else inverse * gain
    dv = _activation_gradient(dy, input, result, residual, center, scale, offset, activation, negative_slope)
    dresidual = dv if needs_residual else None
    dinput, dgain, dbias = dv if needs_input else None, None, None
    if needs_weight or needs_bias or needs_conv_bias or (needs_input and scale is not None):
        trains = invstd is not None
        zeros = torch.zeros(dy.size(1), dtype=dtype, device=dy.device)
        dinput, dgain, dbias = _aten.native_batch_norm_backward(
            dv,
            dv if input is None else input,
            torch.ones_like(zeros) if gain is None else gain,
            zeros if center is None else center,
            torch.ones_like(zeros) if var is None else var,
            center if trains else dy.new_empty(0, dtype=dtype),
            invstd if trains else dy.new_empty(0, dtype=dtype),
            trains,
            eps if var is not None else 0.0,
            [needs_input, needs_weight, needs_bias or needs_conv_bias],
        )
    dconv_bias = None
    if needs_conv_bias:
        assert dbias is not None
        dconv_bias = torch.zeros_like(dbias) if invstd is not None else dbias if scale is None else dbias * scale
    of_weight = dtype if weight is None else weight.dtype
    of_bias = of_weight if bias is None else bias.dtype
    of_conv_bias = dy.dtype if conv_bias is None else conv_bias.dtype
    return (
        dinput if needs_input else None,
        scaled(dgain, scaling_factor).to(of_weight) if needs_weight and dgain is not None else None,
        scaled(dbias, scaling_factor).to(of_bias) if needs_bias and dbias is not None else None,
        None if dconv_bias is None else dconv_bias.to(of_conv_bias),
        dresidual,
    )


def conv_bn_wgrad(
    dy: Tensor,
    result: Tensor | None,
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    scaling_factor: float,
    eps: float,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str = "none",
    has_statistics: bool = False,
) -> tuple[Tensor, ...]:
    """Twin of ``torch.ops.fused_conv_bn._conv_bn_wgrad`` with everything asked for.

    (conv_weight, weight, bias, conv_bias, scaled_weight, input_scale, input_shift); has_statistics: ``var`` is the
    inverse of the batch's deviation.
    """
    dtype = wide(dy.dtype)
    z = convolution(input.to(dtype), conv_weight.to(dtype), None, stride, padding, dilation, groups)
    dv = (dy if result is None else FROM_RESULT[activation](dy, result)).to(dtype)
    channels = dy.size(1)
    gain = (
        torch.ones(channels, dtype=dtype, device=dy.device) if weight is None else weight.to(dtype)
    ) * scaling_factor
    if var is None:
        invstd = torch.ones_like(gain)
    else:
        invstd = var.to(dtype) if has_statistics else torch.rsqrt(var.to(dtype) + eps)
    dims = [d for d in range(dy.dim()) if d != 1]
    center = torch.zeros_like(gain) if mean is None else mean.to(dtype)
    if has_statistics:
        center = z.mean(dims)
    elif conv_bias is not None:
        center = center - conv_bias.to(dtype)
    count = dy.numel() // channels
    dbias = dv.sum(dims)
    dweight = (dv * (z - per_channel(center, dy.dim()))).sum(dims) * invstd
    scale = -dweight / count * invstd if has_statistics else torch.zeros_like(gain)
    shift = -scale * center - dbias / count if has_statistics else torch.zeros_like(gain)
    factor = gain * invstd
    dz = (dv + z * per_channel(scale, dy.dim()) + per_channel(shift, dy.dim())) * per_channel(factor, dy.dim())
    w = conv_weight.to(dtype).detach().requires_grad_()
    with torch.enable_grad():
        again = convolution(input.to(dtype).detach(), w, None, stride, padding, dilation, groups)
    (dw,) = torch.autograd.grad(again, w, dz)
    of_bn = weight.dtype if weight is not None else dtype if mean is None else mean.dtype
    dcb = torch.zeros_like(dbias) if has_statistics else dbias * factor
    return (
        dw.to(conv_weight.dtype),
        (dweight * scaling_factor).to(of_bn),
        (dbias * scaling_factor).to(of_bn),
        dcb.to(dy.dtype if conv_bias is None else conv_bias.dtype),
        (conv_weight.to(dtype) * factor.view(-1, *[1] * (dy.dim() - 1))).to(conv_weight.dtype),
        scale,
        shift,
    )


def bn_scale_backward_sums(
    dy: Tensor,
    input: Tensor,
    result: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scaling_factor: float,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    needs_weight: bool = False,
    needs_bias: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Twin of ``torch.ops.fused_conv_bn.bn_scale_backward_sums``: (sums, dweight, dbias)."""
    _, dweight, dbias, _, dv = bn_scale_backward(
        *(dy, input, result, residual, mean, None, invstd, weight, bias, None, scaling_factor),
        activation=activation,
        negative_slope=negative_slope,
        needs_weight=needs_weight,
        needs_bias=needs_bias,
        needs_residual=True,
    )
    assert dv is not None
    dims = [d for d in range(dy.dim()) if d != 1]
    dv = dv.double()
    distance = input.double() - per_channel(mean.double(), dy.dim())
    return torch.stack([dv.sum(dims), (dv * distance).sum(dims)]), dweight, dbias


def bn_scale_backward_apply(
    dy: Tensor,
    input: Tensor,
    result: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor,
    count: Tensor,
    scaling_factor: float,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    needs_residual: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Twin of ``torch.ops.fused_conv_bn.bn_scale_backward_apply``: (dinput, dresidual)."""
    *_, dv = bn_scale_backward(
        *(dy, input, result, residual, mean, None, invstd, weight, bias, None, scaling_factor),
        activation=activation,
        negative_slope=negative_slope,
        needs_residual=True,
    )
    assert dv is not None
    dtype, dim = wide(dy.dtype), dy.dim()
    scale = invstd * scaling_factor if weight is None else invstd * weight.to(dtype) * scaling_factor
    s1, s2 = ((s / count).to(dtype) for s in sums)
    distance = input.to(dtype) - per_channel(mean, dim)
    dz = dv.to(dtype) - per_channel(s1, dim) - distance * per_channel(invstd.square() * s2, dim)
    return (dz * per_channel(scale, dim)).to(dy.dtype), dv if needs_residual else None


def bn_moments(input: Tensor) -> Tensor:
    """Twin of ``torch.ops.fused_conv_bn.bn_moments``: [count, mean, m2] of each channel, in float64."""
    dims = [d for d in range(input.dim()) if d != 1]
    count = input.numel() // max(1, input.size(1))
    if count == 0:
        return input.new_zeros((3, input.size(1)), dtype=torch.float64)
    var, mean = torch.var_mean(input.double(), dims, correction=0)
    return torch.stack([torch.full_like(mean, count), mean, var * count])
