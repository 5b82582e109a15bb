"""A convolution of what a gate was applied to: a function beside those of :mod:`fused_conv_bn.ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import conditions, ops
from ._dispatch import RAW, keywords, way_of
from ._memory import go_on_behind

_op = torch.ops.fused_conv_bn.gate_conv_bn_scale.default
_REQUIRED = "input", "gate", "conv_weight", "running_mean", "running_var"
_NAMES = *_REQUIRED, "conv_bias", "weight", "bias", "residual"


def gate_conv_bn_scale(
    input: Tensor,
    gate: Tensor,
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
) -> Tensor:
    """:func:`conv_bn_scale` of ``gate(input, gate)``: how MBConv blocks go on behind squeeze-and-excite.

    The convolution ``gemm_sm90`` takes the gates along where its window is one pixel, in 16 bits: what is gated is
    never written. It rounds as :func:`gate` does, so that the result is the same. Elsewhere the gate and the
    convolution are two steps. Differentiable: with grad mode on, and a tensor that requires grad, they are the two
    functions.

    Args:
        input: (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        gate: shape (N, C), or with a 1 for each spatial dimension, and ``input``'s dtype and device.
        conv_weight, conv_bias, running_mean, running_var, weight, bias: as in :func:`conv_bn_scale`.
        scaling_factor, eps, stride, padding, dilation, groups: as there.
        residual, activation, negative_slope, residual_last, allow_tf32: as there.

    Returns:
        A tensor of shape (N, K, ...) and the dtype of ``input``.

    Raises:
        RuntimeError: an argument that does not fit.
        TypeError: an argument that is no tensor where one is expected.
    """
    required = input, gate, conv_weight, running_mean, running_var
    way = way_of("gate_conv_bn_scale", _NAMES, required, (conv_bias, weight, bias, residual))
    window = stride, padding, dilation, groups
    of_conv = conv_weight, conv_bias, running_mean, running_var, weight, bias, scaling_factor, eps
    named = keywords(residual, activation, negative_slope, residual_last, allow_tf32)
    # DTensors have rules for either step.
    if way == RAW and (conditions.dtensor is None or not isinstance(input, conditions.dtensor)):
        y: Tensor
        try:
            y = _op(input, gate, *of_conv, *ops._window(*window), **named)
            return y
        except RuntimeError as error:
            go_on_behind(error)
    return ops.conv_bn_scale(ops.gate(input, gate), *of_conv, *window, **named)
