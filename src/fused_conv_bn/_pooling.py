"""Pooling at the speed of memory: functions of :mod:`fused_conv_bn.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import reference
from ._checks import check_max_pool2d, check_spatial_mean
from ._dispatch import GRAD, RAW, twin, way_of
from ._gradients import differentiates_formula
from ._memory import go_on_behind, out_of_memory

_ops = torch.ops.fused_conv_bn
_train, _backward = _ops.max_pool2d_train.default._op, _ops.max_pool2d_backward.default._op
_is_compiling = torch.compiler.is_compiling

TRAINS_ON = ("cuda",)
"""Where max_pool2d's ops with gradients are faster than PyTorch's."""
MOST_POSITIONS = 256
"""Elements of a window, whose positions these ops keep in a byte each."""


class _MaxPool(Function):
    """max_pool2d with a gradient. It keeps the position of each maximum, and not the input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, *window: Any) -> Tensor:
        y: Tensor
        y, position = _train(input, *window)
        ctx.size, ctx.window = input.shape[2:], window
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(position)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return (None,) * 6
        (position,) = ctx.saved_tensors
        run: Any = reference.max_pool2d_backward if differentiates_formula(dy) else _backward
        try:
            return run(dy, position, *ctx.size, *ctx.window), *(None,) * 5
        except RuntimeError as error:
            if (found := out_of_memory(error, dy)) is None:
                raise
            raise found from None


# Function.apply inspects forward's signature at every call; what it calls in the end is the base class's.
_apply_max_pool: Any = super(Function, _MaxPool).apply


def _trains(input: Tensor, kernel_size: Any) -> bool:
    """Whether these ops are for it, if it is an input and a window at all. torch.compile has kernels of its own."""
    if input.device.type not in TRAINS_ON or _is_compiling():
        return False
    if isinstance(kernel_size, (list, tuple)):
        return len(kernel_size) == 0 or kernel_size[0] * kernel_size[-1] <= MOST_POSITIONS
    return not isinstance(kernel_size, int) or kernel_size**2 <= MOST_POSITIONS


def max_pool2d(
    input: Tensor,
    kernel_size: int | list[int] | tuple[int, ...],
    stride: int | list[int] | tuple[int, ...] | None = None,
    padding: int | list[int] | tuple[int, ...] = 0,
    dilation: int | list[int] | tuple[int, ...] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``F.max_pool2d``: the largest element of each window, and NaN where a window has one.

    Of zeros of both signs either may be the largest. On the CPU PyTorch's own op runs. Differentiable: of a window's
    equal elements the first gets the gradient, and of NaN the last, as in PyTorch. (For channels_last PyTorch's CUDA
    kernel gives that of a window of nothing but -inf to the image's first pixel; here the window's first element gets
    it.) In torch.compile, and for windows of more than 256 elements, PyTorch's own op runs where a gradient is needed.

    Args:
        input: shape (N, C, H, W).
        kernel_size, stride, padding, dilation, ceil_mode: as in ``F.max_pool2d``; ``stride`` is ``kernel_size`` if it
            is None.

    Returns:
        A tensor of ``input``'s dtype, with the shape and strides that ``F.max_pool2d`` would give.

    Raises:
        RuntimeError: an argument that does not fit.
        TypeError: an input that is no tensor.
    """
    way = way_of("max_pool2d", ("input",), (input,), ())
    stride = kernel_size if stride is None else stride
    y: Tensor
    if way == RAW:
        try:
            y = _ops.max_pool2d.default(input, kernel_size, stride, padding, dilation, ceil_mode)
            return y
        except RuntimeError as error:
            go_on_behind(error)
    check_max_pool2d(input)
    if way == GRAD and _trains(input, kernel_size):
        try:
            y = _apply_max_pool(input, kernel_size, stride, padding, dilation, ceil_mode)
            return y
        except RuntimeError as error:
            go_on_behind(error)
    return twin(reference.max_pool2d, input, kernel_size, stride, padding, dilation, ceil_mode)


def spatial_mean(input: Tensor, *, keepdim: bool = False) -> Tensor:
    """The mean of each channel of each image: global average pooling, and what squeeze-and-excite blocks begin with.

    Equivalent to ``input.mean((2, 3), keepdim)`` in 4 dimensions. The sums are in float32, or float64 for that, and in
    one order in every run. On the CPU PyTorch's own op runs. Differentiable: with grad mode on, and an ``input`` that
    requires grad, PyTorch's own op runs as well.

    Args:
        input: 3 to 5 dimensions, (N, C, ...).
        keepdim: keeps a 1 for each dimension behind the channels.

    Returns:
        A contiguous tensor of ``input``'s dtype, of shape (N, C), or (N, C, 1, ...) with ``keepdim``.

    Raises:
        RuntimeError: an argument that does not fit.
        TypeError: an input that is no tensor.
    """
    way = way_of("spatial_mean", ("input",), (input,), ())
    y: Tensor
    if way == RAW:
        try:
            y = _ops.spatial_mean.default(input, keepdim=keepdim)
            return y
        except RuntimeError as error:
            go_on_behind(error)
    check_spatial_mean(input)
    return twin(reference.spatial_mean, input, keepdim=keepdim)
