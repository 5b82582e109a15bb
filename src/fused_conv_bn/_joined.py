"""What takes several inputs, concatenated or one as a factor of another: functions of :mod:`fused_conv_bn.ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, reference
from ._checks import check_cat, check_gate
from ._dispatch import RAW, keywords, twin, way_of
from ._memory import go_on_behind

_ops = torch.ops.fused_conv_bn
MOST_PARTS = 128
"""Tensors that one call of the op concatenates: kMaxParts of csrc/kernels/elementwise/parts.h."""
_GATE = ("input", "gate", "residual")


def bn_scale_cat(
    inputs: Sequence[Tensor],
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
) -> Tensor:
    """:func:`bn_scale` of ``torch.cat(inputs, 1)``, which is never written: what DenseNet's layers begin with.

    Differentiable: with grad mode on, and a tensor that requires grad, the inputs are concatenated.

    Args:
        inputs: a list or tuple, of one dtype and device, and of one shape but for the channels; up to 128 in one pass,
            and more of them are concatenated.
        running_mean, running_var, weight, bias: shape (C,), C channels in all; ``weight`` and ``bias`` may be None.
        scaling_factor: factor on the result of BatchNorm.
        eps: as in ``nn.BatchNorm2d``, 0 or more.
        activation, negative_slope: the epilogue, see the module's documentation.

    Returns:
        A tensor of the shape that ``torch.cat(inputs, 1)`` has, with the strides that ``F.batch_norm`` would give.

    Raises:
        RuntimeError: an argument that does not fit.
        TypeError: an argument that is no tensor where one is expected.
    """
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(f"bn_scale_cat: inputs is of type {type(inputs).__name__}, expected a list or tuple of tensors")
    inputs = tuple(inputs)
    names = (*(f"inputs[{i}]" for i in range(len(inputs))), "running_mean", "running_var", "weight", "bias")
    way = way_of("bn_scale_cat", names, (*inputs, running_mean, running_var), (weight, bias))
    bn = running_mean, running_var, weight, bias, scaling_factor, eps
    named = keywords(None, activation, negative_slope, False)
    if way == RAW and len(inputs) <= MOST_PARTS:
        try:
            return _ops.bn_scale_cat.default(inputs, *bn, **named)
        except RuntimeError as error:
            go_on_behind(error)
    check_cat(inputs)
    return ops.bn_scale(torch.cat(inputs, 1), *bn, **named)


def gate(
    input: Tensor,
    gate: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
) -> Tensor:
    """A factor for each channel of each image, and the epilogue, in one pass: what squeeze-and-excite blocks end with.

    Equivalent to ``activation(input * gate[:, :, None, None] + residual)``. Differentiable: with grad mode on, and a
    tensor that requires grad, PyTorch's own ops run.

    Args:
        input: 2 to 5 dimensions, (N, C, ...).
        gate: shape (N, C), or with a 1 for each further dimension of ``input``, and ``input``'s dtype and device.
        residual, activation, negative_slope, residual_last: the epilogue, see the module's documentation.

    Returns:
        A tensor of ``input``'s shape and dtype.

    Raises:
        RuntimeError: an argument that does not fit.
        TypeError: an argument that is no tensor where one is expected.
    """
    way = way_of("gate", _GATE, (input, gate), (residual,))
    named = keywords(residual, activation, negative_slope, residual_last)
    if way == RAW:
        try:
            return _ops.gate.default(input, gate, **named)
        except RuntimeError as error:
            go_on_behind(error)
    reference.check_activation("gate", activation, RuntimeError)
    check_gate(input, gate, residual)
    return twin(reference.gate, input, gate, **named)
