"""A convolution and the means of its result: a function beside those of :mod:`fused_conv_bn.ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import conditions, ops
from ._dispatch import RAW, keywords, way_of
from ._memory import go_on_behind

_op = torch.ops.fused_conv_bn.conv_bn_scale_mean.default
_REQUIRED = "input", "conv_weight", "running_mean", "running_var"
_NAMES = *_REQUIRED, "conv_bias", "weight", "bias", "residual"


def conv_bn_scale_mean(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`conv_bn_scale`, and the mean of each channel of each image of its result: how squeeze-and-excite begins.

    The depthwise kernel for channels_last puts out the means of 16-bit results along with them, so that nobody reads
    the result for it. They are of the results as they are rounded, in one order of sums for a shape. Elsewhere the
    mean is a step of its own. Differentiable: with grad mode on, and a tensor that requires grad, they are the two
    functions.

    Args:
        input: (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        conv_weight, conv_bias, running_mean, running_var, weight, bias: as in :func:`conv_bn_scale`.
        scaling_factor, eps, stride, padding, dilation, groups: as there.
        residual, activation, negative_slope, residual_last, allow_tf32: as there.

    Returns:
        What :func:`conv_bn_scale` returns, (N, K, ...), and ``spatial_mean(result, keepdim=True)``, (N, K, 1, ...),
        both of the dtype of ``input``.

    Raises:
        RuntimeError: an argument that does not fit.
        TypeError: an argument that is no tensor where one is expected.
    """
    required = input, conv_weight, running_mean, running_var
    way = way_of("conv_bn_scale_mean", _NAMES, required, (conv_bias, weight, bias, residual))
    window = stride, padding, dilation, groups
    of_conv = conv_weight, conv_bias, running_mean, running_var, weight, bias, scaling_factor, eps
    named = keywords(residual, activation, negative_slope, residual_last, allow_tf32)
    # DTensors have rules for either step.
    if way == RAW and (conditions.dtensor is None or not isinstance(input, conditions.dtensor)):
        try:
            both: tuple[Tensor, Tensor] = _op(input, *of_conv, *ops._window(*window), **named)
            return both
        except RuntimeError as error:
            go_on_behind(error)
    y = ops.conv_bn_scale(input, *of_conv, *window, **named)
    return y, ops.spatial_mean(y, keepdim=True)
