"""What ``torch.compile``, ``torch.export`` and meta tensors see of the ops: shapes, dtypes and strides, no data.

Sizes may be symbolic; nothing here asks for their values beyond comparisons that hold for a whole range of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _result_format(x: Tensor) -> torch.memory_format:
    """The memory format that csrc/checks.h computes in: its computes_channels_last() and suggests_channels_last()."""
    if x.dim() < 4:
        return torch.contiguous_format
    channels_last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if x.device.type == "cpu":
        if x.is_contiguous():
            return torch.contiguous_format
        if x.is_contiguous(memory_format=channels_last):
            return channels_last
    if x.stride(1) == 0:
        return torch.contiguous_format
    least = 0
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.size(d) == 0 or x.stride(d) < least or (d == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = x.stride(d) * x.size(d) if x.size(d) > 1 else x.stride(d)
    return channels_last


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
