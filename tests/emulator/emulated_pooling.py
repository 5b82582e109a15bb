"""The pooling ops by their CUDA kernels, as emulated.py has the others."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

import emulated
from fused_conv_bn import reference
from structures import PoolProblem, PoolWindow, SqueezeNumbers, SqueezeProblem


def _both(values: int | Sequence[int]) -> Sequence[int]:
    return [values, values] if isinstance(values, int) else list(values) * (2 // len(values))


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    capability: int = 90,
) -> Tensor:
    y = emulated._result("max_pool2d", input, kernel_size, stride or [], padding, dilation, ceil_mode)
    if y.numel() == 0:
        return y
    memory_format = torch.contiguous_format if y.is_contiguous() else torch.channels_last
    x = emulated._misaligned_as(input, torch.empty_like(input, memory_format=memory_format))
    channels = 1 if y.is_contiguous() else x.size(1)
    numbers = map(_both, (kernel_size, stride or kernel_size, padding, dilation))
    windows = [PoolWindow(*values) for values in zip(x.shape[2:], y.shape[2:], *numbers, strict=True)]
    problem = PoolProblem(x.size(0) * x.size(1) // channels, channels, *windows)
    emulated._call(
        capability,
        "emulated_max_pool",
        emulated._pointer(x),
        emulated._pointer(y),
        ctypes.byref(problem),
        emulated._element(x),
    )
    return y


def spatial_mean(input: Tensor, *, keepdim: bool = False, capability: int = 90) -> Tensor:
    y = emulated._result("spatial_mean", input, keepdim=keepdim)
    if y.numel() == 0:
        return y
    like = emulated._result("scale_shift", input, None, None)
    x = emulated._misaligned_as(input, like)
    channels = 1 if x.is_contiguous() else x.size(1)
    sizes = x.size(0) * x.size(1) // channels, x[0, 0].numel(), channels
    emulated._call(
        capability,
        "emulated_spatial_mean",
        emulated._pointer(x),
        emulated._pointer(y),
        *map(ctypes.c_int64, sizes),
        emulated._element(x),
    )
    return y


def squeeze_excite(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "relu",
    gate: str = "sigmoid",
    negative_slope: float = 0.01,
    capability: int = 90,
) -> Tensor:
    y = emulated._result("squeeze_excite", input, weight1, bias1, weight2, bias2)
    if y.numel() == 0:
        return y
    x = emulated._misaligned_as(input, emulated._result("scale_shift", input, None, None))
    layers = [None if t is None else t.contiguous() for t in (weight1, bias1, weight2, bias2)]
    known = list(reference.ACTIVATIONS)
    numbers = SqueezeNumbers(
        *(None if t is None else t.data_ptr() for t in layers),
        *(known.index(activation), known.index(gate), negative_slope),
    )
    sizes = x.size(0), x[0, 0].numel(), x.size(1), weight1.size(0), weight2.size(0)
    emulated._call(
        *(capability, "emulated_squeeze", emulated._pointer(x), ctypes.byref(numbers), emulated._pointer(y)),
        *(ctypes.byref(SqueezeProblem(*sizes, not x.is_contiguous())), emulated._element(x)),
    )
    return y
