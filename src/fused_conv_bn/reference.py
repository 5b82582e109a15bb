"""Plain-PyTorch twins of the ops: what they must compute, in any dtype that the arguments have.

Called with float64 tensors they are the reference that tests and benchmarks measure errors against; called with the
ops' own arguments they are eager PyTorch, whose error is the yardstick. They are differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def fold_bn(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    conv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Twin of :func:`fused_conv_bn.fold_bn`, computed in the arguments' dtype."""
    scale = torch.rsqrt(running_var + eps) * scaling_factor
    if weight is not None:
        scale = scale * weight
    mean = running_mean if conv_bias is None else running_mean - conv_bias
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias * scaling_factor
    return scale, shift


def bn_scale(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    """Twin of :func:`fused_conv_bn.bn_scale`."""
    return F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps) * scaling_factor


def per_channel(x: Tensor, dim: int) -> Tensor:
    """``x`` of shape (C,), to be broadcast over a tensor of ``dim`` dimensions."""
    return x.view(-1, *[1] * (dim - 2))


def scale_shift(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Twin of :func:`fused_conv_bn.scale_shift`: each step in the dtype of ``input``, as separate ops would be."""
    y = input * per_channel(scale, input.dim()).to(input.dtype) + per_channel(shift, input.dim()).to(input.dtype)
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[activation](y)


_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def conv_scale_shift(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Twin of :func:`fused_conv_bn.conv_scale_shift`."""
    y = _CONVOLUTIONS[input.dim()](input, weight, None, stride, padding, dilation, groups)
    return scale_shift(y, scale, shift, residual=residual, activation=activation)


def bn_scale_train(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Twin of :func:`fused_conv_bn.bn_scale_train`; updates the running statistics as well."""
    return F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps) * scaling_factor


def conv_bn_scale_train(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Twin of :func:`fused_conv_bn.conv_bn_scale_train`; updates the running statistics as well."""
    y = _CONVOLUTIONS[input.dim()](input, conv_weight, conv_bias, stride, padding, dilation, groups)
    return bn_scale_train(y, running_mean, running_var, weight, bias, scaling_factor, momentum, eps)
