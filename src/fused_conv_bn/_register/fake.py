"""What ``torch.compile``, ``torch.export`` and meta tensors see of the ops: shapes, dtypes and strides, no data.

Sizes may be symbolic; nothing here asks for their values beyond comparisons that hold for a whole range of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _suggests_channels_last(x: Tensor) -> bool:
    """suggests_channels_last() of csrc/torch/layout.h."""
    if x.dim() < 4 or x.stride(1) == 0:
        return False
    least = 0
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.size(d) == 0 or x.stride(d) < least or (d == 0 and least == x.stride(1)):
            return False
        least = x.stride(d) * x.size(d) if x.size(d) > 1 else x.stride(d)
    return True


def _channels_last(dim: int) -> torch.memory_format:
    return torch.channels_last if dim == 4 else torch.channels_last_3d


def _result_format(x: Tensor) -> torch.memory_format:
    """The memory format that csrc/torch/layout.h computes in: its computes_channels_last()."""
    if x.dim() >= 4 and x.device.type == "cpu":
        if x.is_contiguous():
            return torch.contiguous_format
        if x.is_contiguous(memory_format=_channels_last(x.dim())):
            return _channels_last(x.dim())
    return _channels_last(x.dim()) if _suggests_channels_last(x) else torch.contiguous_format


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


def _nothing(*args, **kwargs):
    return None


def _like_input(input, *args, **kwargs):
    return _like(input)


@torch.library.register_fake("fused_conv_bn::bn_scale_cat")
def _bn_scale_cat(inputs, *args, **kwargs):
    # The format is torch.cat's, if all inputs have one.
    y = torch.cat(inputs, 1)
    last = y.dim() >= 4 and all(_suggests_channels_last(x) for x in inputs)
    return _like(y.contiguous(memory_format=_channels_last(y.dim()) if last else torch.contiguous_format))


@torch.library.register_fake("fused_conv_bn::max_pool2d")
def _max_pool2d(input, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
    return torch.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


@torch.library.register_fake("fused_conv_bn::max_pool2d_train")
def _max_pool2d_train(input, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
    y = torch.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
    return y, torch.empty_like(y, dtype=torch.uint8)


@torch.library.register_fake("fused_conv_bn::max_pool2d_backward")
def _max_pool2d_backward(grad_output, position, input_height, input_width, *args, **kwargs):
    x = grad_output.new_empty((*grad_output.shape[:2], input_height, input_width))
    last = _suggests_channels_last(position)
    return torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)


@torch.library.register_fake("fused_conv_bn::spatial_mean")
def _spatial_mean(input, *, keepdim=False):
    return input.new_empty((*input.shape[:2], *[1] * (input.dim() - 2 if keepdim else 0)))


@torch.library.register_fake("fused_conv_bn::squeeze_excite")
def _squeeze_excite(input, weight1, bias1, weight2, bias2, *, activation="relu", gate="sigmoid", negative_slope=0.01):
    return input.new_empty((input.size(0), weight2.size(0), *[1] * (input.dim() - 2)))


for _name in ("bn_scale", "scale_shift", "bn_scale_train", "gate"):
    torch.library.register_fake(f"fused_conv_bn::{_name}")(_like_input)
for _name in ("bn_scale.out", "bn_scale_", "scale_shift.out", "scale_shift_"):
    torch.library.register_fake(f"fused_conv_bn::{_name}")(_nothing)


def _statistics(channels, running_mean, running_var, y):
    """mean, invstd, and the updated running statistics."""
    dtype = _acc_dtype(y.dtype)
    mean, invstd = (torch.empty(channels, dtype=dtype, device=y.device) for _ in range(2))
    return (
        mean,
        invstd,
        *(y.new_empty(0, dtype=dtype) if t is None else torch.empty_like(t) for t in (running_mean, running_var)),
    )


@torch.library.register_fake("fused_conv_bn::bn_scale_train_stats")
def _bn_scale_train_stats(input, running_mean, running_var, *args, **kwargs):
    y = _like(input)
    return y, *_statistics(input.size(1), running_mean, running_var, y)[:2]


@torch.library.register_fake("fused_conv_bn::bn_scale_train_functional")
def _bn_scale_train_functional(input, running_mean, running_var, *args, **kwargs):
    y = _like(input)
    return y, *_statistics(input.size(1), running_mean, running_var, y)


# ---- backward --------------------------------------------------------------------------------------------------------


def _per_channel(needed, dy, parameter, dtype):
    if not needed:
        return None
    return dy.new_empty(dy.size(1), dtype=dtype if parameter is None else parameter.dtype)


def _gradient(needed, dy, input, result, residual):
    """As it lies: as what it is the gradient of."""
    return _like(next(t for t in (input, result, residual, dy) if t is not None)) if needed else None


@torch.library.register_fake("fused_conv_bn::bn_scale_backward")
def _bn_scale_backward(
    dy,
    input,
    result,
    residual,
    mean,
    var,
    invstd,
    weight,
    bias,
    conv_bias,
    scaling_factor,
    eps,
    activation="none",
    negative_slope=0.01,
    needs_input=False,
    needs_weight=False,
    needs_bias=False,
    needs_conv_bias=False,
    needs_residual=False,
):
    wide = _acc_dtype(dy.dtype)
    return (
        _gradient(needs_input, dy, input, result, residual),
        _per_channel(needs_weight, dy, weight, wide),
        _per_channel(needs_bias, dy, bias, wide if weight is None else weight.dtype),
        _per_channel(needs_conv_bias, dy, conv_bias, dy.dtype),
        _gradient(needs_residual, dy, input, result, residual),
    )


@torch.library.register_fake("fused_conv_bn::_conv_bn_wgrad")
def _conv_bn_wgrad(
    dy,
    result,
    input,
    conv_weight,
    conv_bias,
    mean,
    var,
    weight,
    scaling_factor,
    eps,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    activation="none",
    has_statistics=False,
    needs_conv_weight=True,
    needs_input=False,
    input_sums=None,
):
    wide = _acc_dtype(dy.dtype)
    last = _suggests_channels_last(conv_weight)
    dense = torch.channels_last if last else torch.contiguous_format

    def values(wanted, dtype):
        return dy.new_empty(dy.size(1) if wanted else 0, dtype=dtype)

    def like_weight(wanted):
        if not wanted:
            return values(False, conv_weight.dtype)
        return torch.empty_like(conv_weight, memory_format=dense)

    of_bn = weight.dtype if weight is not None else wide if mean is None else mean.dtype
    of_input = needs_input and has_statistics
    return (
        like_weight(needs_conv_weight),
        values(True, of_bn),
        values(True, of_bn),
        values(conv_bias is not None, wide if conv_bias is None else conv_bias.dtype),
        like_weight(needs_input),
        values(of_input, wide),
        values(of_input, wide),
    )


@torch.library.register_fake("fused_conv_bn::bn_scale_backward_sums")
def _bn_scale_backward_sums(
    dy,
    input,
    result,
    residual,
    mean,
    invstd,
    weight,
    bias,
    scaling_factor,
    activation="none",
    negative_slope=0.01,
    needs_weight=False,
    needs_bias=False,
):
    wide = _acc_dtype(dy.dtype)
    return (
        dy.new_empty((2, dy.size(1)), dtype=torch.float64),
        _per_channel(needs_weight, dy, weight, wide),
        _per_channel(needs_bias, dy, bias, wide if weight is None else weight.dtype),
    )


@torch.library.register_fake("fused_conv_bn::bn_scale_backward_apply")
def _bn_scale_backward_apply(
    dy,
    input,
    result,
    residual,
    mean,
    invstd,
    weight,
    bias,
    sums,
    count,
    scaling_factor,
    activation="none",
    negative_slope=0.01,
    needs_residual=False,
):
    return _like(input), _like(input) if needs_residual else None


@torch.library.register_fake("fused_conv_bn::bn_moments")
def _bn_moments(input):
    return input.new_empty((3, input.size(1)), dtype=torch.float64)


# ---- convolutions ----------------------------------------------------------------------------------------------------


def _convolution(input, weight, stride, padding, dilation, groups):
    """What PyTorch's own convolution gives, whose strides the ops' results have."""
    space = input.dim() - 2
    stride, padding, dilation = (list(x) * space if len(x) == 1 else list(x) for x in (stride, padding, dilation))
    return torch.ops.aten.convolution.default(
        input, weight, None, stride, padding, dilation, False, [0] * space, groups
    )


@torch.library.register_fake("fused_conv_bn::conv_scale_shift")
def _conv_scale_shift(input, weight, scale, shift, stride=(1,), padding=(0,), dilation=(1,), groups=1, **kwargs):
    return _convolution(input, weight, stride, padding, dilation, groups)


@torch.library.register_fake("fused_conv_bn::conv_bn_scale")
def _conv_bn_scale(
    input,
    conv_weight,
    conv_bias,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    scaling_factor=1.0,
    eps=1e-5,
    stride=(1,),
    padding=(0,),
    dilation=(1,),
    groups=1,
    **kwargs,
):
    return _like(_convolution(input, conv_weight, stride, padding, dilation, groups))


@torch.library.register_fake("fused_conv_bn::conv_bn_scale_mean")
def _conv_bn_scale_mean(*args, **kwargs):
    y = _conv_bn_scale(*args, **kwargs)
    return y, _spatial_mean(y, keepdim=True)


@torch.library.register_fake("fused_conv_bn::gate_conv_bn_scale")
def _gate_conv_bn_scale(input, gate, *args, **kwargs):
    return _conv_bn_scale(input, *args, **kwargs)


def _conv_bn_scale_train_functional(
    input,
    conv_weight,
    conv_bias,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    scaling_factor=1.0,
    momentum=0.1,
    eps=1e-5,
    stride=(1,),
    padding=(0,),
    dilation=(1,),
    groups=1,
    **kwargs,
):
    y = _like(_convolution(input, conv_weight, stride, padding, dilation, groups))
    return y, *_statistics(conv_weight.size(0), running_mean, running_var, y)


@torch.library.register_fake("fused_conv_bn::conv_bn_scale_train_stats")
def _conv_bn_scale_train_stats(*args, **kwargs):
    return _conv_bn_scale_train_functional(*args, **kwargs)[:3]


@torch.library.register_fake("fused_conv_bn::_conv_bn_scale_train_sums")
def _conv_bn_scale_train_sums(input, *args, **kwargs):
    # Whether there are sums is up to the kernel that is chosen: none are always right.
    return *_conv_bn_scale_train_stats(input, *args, **kwargs), input.new_empty(0, dtype=torch.float64)


@torch.library.register_fake("fused_conv_bn::conv_bn_scale_train")
def _conv_bn_scale_train(*args, **kwargs):
    return _conv_bn_scale_train_functional(*args, **kwargs)[0]


torch.library.register_fake("fused_conv_bn::conv_bn_scale_train_functional")(_conv_bn_scale_train_functional)
