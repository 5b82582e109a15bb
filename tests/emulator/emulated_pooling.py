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
    x, problem = _problem(input, y, _format(y), (kernel_size, stride or kernel_size, padding, dilation))
    _call(capability, "emulated_max_pool", x, (x, y), problem)
    return y


def max_pool2d_train(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = (),
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    capability: int = 90,
) -> tuple[Tensor, Tensor]:
    y = emulated._result("max_pool2d", input, kernel_size, stride, padding, dilation, ceil_mode)
    position = torch.full_like(y, 0, dtype=torch.uint8).fill_(255)
    if y.numel() == 0:
        return y, position
    x, problem = _problem(input, y, _format(y), (kernel_size, stride or kernel_size, padding, dilation))
    _call(capability, "emulated_max_pool_train", x, (x, y, position), problem)
    return y, position


def max_pool2d_backward(
    grad_output: Tensor,
    position: Tensor,
    input_height: int,
    input_width: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = (),
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    capability: int = 90,
) -> Tensor:
    numbers = kernel_size, stride, padding, dilation
    x = emulated._result("max_pool2d_backward", grad_output, position, input_height, input_width, *numbers, ceil_mode)
    if x.numel() == 0:
        return x
    dy, at = (
        emulated._misaligned_as(t, torch.empty_like(t, memory_format=_format(x))) for t in (grad_output, position)
    )
    _, problem = _problem(x, dy, _format(x), (kernel_size, stride or kernel_size, padding, dilation))
    _call(capability, "emulated_max_pool_backward", x, (dy, at, x), problem)
    return x


def _format(y: Tensor) -> torch.memory_format:
    return torch.contiguous_format if y.is_contiguous() else torch.channels_last


def _problem(
    input: Tensor, y: Tensor, memory_format: torch.memory_format, numbers: Sequence[int | Sequence[int]]
) -> tuple[Tensor, PoolProblem]:
    """The input as it lies for a kernel, and the numbers of both."""
    x = emulated._misaligned_as(input, torch.empty_like(input, memory_format=memory_format))
    channels = 1 if memory_format == torch.contiguous_format else x.size(1)
    windows = [PoolWindow(*values) for values in zip(x.shape[2:], y.shape[2:], *map(_both, numbers), strict=True)]
    return x, PoolProblem(x.size(0) * x.size(1) // channels, channels, *windows)


def _call(capability: int, name: str, of: Tensor, tensors: Sequence[Tensor], problem: PoolProblem) -> None:
    pointers = map(emulated._pointer, tensors)
    emulated._call(capability, name, *pointers, ctypes.byref(problem), emulated._element(of))


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
