"""BatchNorm in training mode with the statistics of several processes' batches, as ``nn.SyncBatchNorm`` has them.

Each process takes the moments of its own batch. They are gathered, and put together in float64 by the formula of Chan,
Golub and LeVeque (1979), so that nothing is lost where batches have means far apart. Backward adds up two sums per
channel over all processes. The gradients of weight and bias are those of the process, which DDP averages.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import reference
from ._dispatch import keywords
from ._gradients import derivative_from
from .autograd import Epilogue, TrainedBatchNorm

_ops = torch.ops.fused_conv_bn
_bn_scale, _bn_moments = _ops.bn_scale.default._op, _ops.bn_moments.default._op
_backward_sums, _backward_apply = _ops.bn_scale_backward_sums.default._op, _ops.bn_scale_backward_apply.default._op


def gather_moments(z: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, m2) of each channel of all batches, in float64. m2: the sum of squared distances from the mean."""
    own = _bn_moments(z)
    gathered = own.new_empty((dist.get_world_size(group), *own.shape))
    dist.all_gather(list(gathered), own, group)
    counts, means, m2s = gathered.unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    return count, mean, (m2s + counts * (means - mean).square()).sum(0)


class _SyncBnScaleTrain(Function):
    """bn_scale_train over the batches of a group. Updates the running statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        numbers: tuple[Any, ...],
    ) -> Tensor:
        factor, momentum, eps, activation, slope, last, group = numbers
        wide = reference.wide(z.dtype)
        count, mean, m2 = gather_moments(z, group)
        var = m2 / count
        named = keywords(residual, activation, slope, last)
        y: Tensor = _bn_scale(z, mean.to(wide), var.to(wide), weight, bias, factor, eps, **named)
        needs = ctx.needs_input_grad
        affine = needs[0] or needs[3] or needs[4]
        from_result, from_input = derivative_from(activation, residual is not None, last, affine, needs[5])
        ctx.numbers = numbers
        ctx.save_for_backward(
            z,
            y if from_result else None,
            residual if from_input and not last else None,
            mean.to(wide),
            (var + eps).rsqrt().to(wide),
            weight,
            bias,
            count,
        )
        # Last, and both or none: what comes before may run out of memory.
        if running_mean is not None and running_var is not None:
            new_mean = running_mean.double().lerp_(mean, momentum)
            new_var = running_var.double().lerp_(m2 / (count - 1), momentum)
            running_mean.copy_(new_mean)
            running_var.copy_(new_var)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        z, result, residual, mean, invstd, weight, bias, count = ctx.saved_tensors
        factor, _, _, activation, slope, last, group = ctx.numbers
        needs_z, _, _, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:6]
        dv_is_asked_for = needs_residual and not last and activation != "none"
        common = dy, z, result, residual, mean, invstd, weight, bias
        named = {"activation": activation, "negative_slope": slope}
        dz = dw = db = dr = None
        if needs_z or needs_weight or needs_bias or dv_is_asked_for:
            sums, dw, db = _backward_sums(*common, factor, **named, needs_weight=needs_weight, needs_bias=needs_bias)
            if needs_z:
                dist.all_reduce(sums, group=group)
            if needs_z or dv_is_asked_for:
                dz, dr = _backward_apply(*common, sums, count, factor, **named, needs_residual=dv_is_asked_for)
        if needs_residual and not dv_is_asked_for:
            dr = dy
        return dz if needs_z else None, None, None, dw, db, dr, None


def bn_scale_train(z: Tensor, bn: TrainedBatchNorm, epilogue: Epilogue, group: Any) -> Tensor:
    """:func:`fused_conv_bn.bn_scale_train` with the statistics of the batches of all processes in ``group``.

    All of them call it, and all run backward or none does. A batch may be empty. No second derivatives.
    """
    residual, *of_epilogue = epilogue
    y: Tensor = _SyncBnScaleTrain.apply(z, *bn[:4], residual, (*bn[4:], *of_epilogue, group))
    return y
