"""What ``torch.compile``, ``torch.export`` and meta tensors see of the ops: shapes, dtypes and strides, no data.

Sizes may be symbolic; nothing here asks for their values beyond comparisons that hold for a whole range of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _suggests_channels_last(x: Tensor) -> bool:
    """suggests_channels_last() of csrc/checks.h."""
    if x.dim() < 4 or x.stride(1) == 0:
        return False
    least = 0
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.size(d) == 0 or x.stride(d) < least or (d == 0 and least == x.stride(1)):
            return False
        least = x.stride(d) * x.size(d) if x.size(d) > 1 else x.stride(d)
    return True


def _channels_last(dim: int) -> torch.memory_format:
    return torch.channels_last if dim == 4 else torch.channels_last_3d


def _result_format(x: Tensor) -> torch.memory_format:
    """The memory format that csrc/checks.h computes in: its computes_channels_last()."""
    if x.dim() >= 4 and x.device.type == "cpu":
        if x.is_contiguous():
            return torch.contiguous_format
        if x.is_contiguous(memory_format=_channels_last(x.dim())):
            return _channels_last(x.dim())
    return _channels_last(x.dim()) if _suggests_channels_last(x) else torch.contiguous_format


def _conv_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The same for convolutions."""
    double = input.dtype == torch.float64 and not (input.device.type == "cpu" and input.dim() == 4)
    if input.size(0) == 0 or double or not (_suggests_channels_last(input) or _suggests_channels_last(weight)):
        return torch.contiguous_format
    return _channels_last(input.dim())


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=_result_format(x))


def _acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("fused_conv_bn::fold_bn")
def _fold_bn(running_mean, running_var, weight=None, bias=None, scaling_factor=1.0, eps=1e-5, conv_bias=None):
    dtype = _acc_dtype(running_mean.dtype)
    return (
        running_mean.new_empty(running_mean.shape, dtype=dtype),
        running_mean.new_empty(running_mean.shape, dtype=dtype),
    )


@torch.library.register_fake("fused_conv_bn::bn_scale")
def _bn_scale(input, running_mean, running_var, weight=None, bias=None, scaling_factor=1.0, eps=1e-5):
    return _like(input)


@torch.library.register_fake("fused_conv_bn::bn_scale.out")
def _bn_scale_out(input, running_mean, running_var, weight=None, bias=None, scaling_factor=1.0, eps=1e-5, *, out):
    return None


@torch.library.register_fake("fused_conv_bn::bn_scale_")
def _bn_scale_inplace(input, running_mean, running_var, weight=None, bias=None, scaling_factor=1.0, eps=1e-5):
    return None


@torch.library.register_fake("fused_conv_bn::scale_shift")
def _scale_shift(input, scale, shift, *, residual=None, activation="none"):
    return _like(input)


@torch.library.register_fake("fused_conv_bn::scale_shift.out")
def _scale_shift_out(input, scale, shift, *, residual=None, activation="none", out):
    return None


@torch.library.register_fake("fused_conv_bn::scale_shift_")
def _scale_shift_inplace(input, scale, shift, *, residual=None, activation="none"):
    return None


def conv_output_size(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """The shape of a convolution's result. Each of the sequences has one value for each spatial dimension, or one."""
    space = input.dim() - 2
    windows = zip(*(list(x) * space if len(x) == 1 else x for x in (stride, padding, dilation)), strict=True)
    size = [input.size(0), weight.size(0)]
    for d, (s, p, dil) in enumerate(windows, 2):
        size.append((input.size(d) + 2 * p - dil * (weight.size(d) - 1) - 1) // s + 1)
    return size


@torch.library.register_fake("fused_conv_bn::conv_scale_shift")
def _conv_scale_shift(
    input,
    weight,
    scale,
    shift,
    stride,
    padding,
    dilation,
    groups,
    *,
    residual=None,
    activation="none",
    allow_tf32=False,
):
    size = conv_output_size(input, weight, stride, padding, dilation)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=_conv_format(input, weight))


@torch.library.register_fake("fused_conv_bn::bn_scale_train")
def _bn_scale_train(input, running_mean, running_var, weight, bias, scaling_factor, momentum, eps):
    return _like(input)


@torch.library.register_fake("fused_conv_bn::conv_bn_scale_train")
def _conv_bn_scale_train(
    input,
    conv_weight,
    conv_bias,
    running_mean,
    running_var,
    weight,
    bias,
    scaling_factor,
    momentum,
    eps,
    stride,
    padding,
    dilation,
    groups,
    *,
    allow_tf32=False,
):
    size = conv_output_size(input, conv_weight, stride, padding, dilation)
    memory_format = _conv_format(input, conv_weight)
    return _like(torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format))


@torch.library.register_fake("fused_conv_bn::_fold_conv_weight")
def _fold_conv_weight(weight, scale):
    channels_last = _suggests_channels_last(weight)
    memory_format = _channels_last(weight.dim()) if channels_last else torch.contiguous_format
    return torch.empty_like(weight, memory_format=memory_format), torch.empty_like(scale)
