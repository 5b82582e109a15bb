"""Pooling at the speed of memory: functions of :mod:`fused_conv_bn.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._checks import check_max_pool2d, check_spatial_mean
from ._dispatch import RAW, twin, way_of
from ._memory import go_on_behind

_ops = torch.ops.fused_conv_bn


def max_pool2d(
    input: Tensor,
    kernel_size: int | list[int] | tuple[int, ...],
    stride: int | list[int] | tuple[int, ...] | None = None,
    padding: int | list[int] | tuple[int, ...] = 0,
    dilation: int | list[int] | tuple[int, ...] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``F.max_pool2d``: the largest element of each window, and NaN where a window has one.

    Of zeros of both signs either may be the largest. On the CPU PyTorch's own op runs. Differentiable: with grad mode
    on, and an ``input`` that requires grad, PyTorch's own op runs as well.

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
