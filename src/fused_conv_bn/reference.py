"""Plain-PyTorch twins of the ops: what they must compute, in any dtype that the arguments have.

Called with float64 tensors they are the reference that tests and benchmarks measure errors against; called with the
ops' own arguments they are eager PyTorch, whose error is the yardstick. They are differentiable, and are what runs
where an op cannot: under transforms of torch.func, in forward-mode AD, and for second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
    "tanh": torch.tanh,
}
"""By name. ``leaky_relu`` has its default slope here; :func:`activate` takes another."""


def check_activation(op: str, activation: str, error: type[Exception] = ValueError, name: str = "activation") -> None:
    """``name``: of the argument."""
    if activation not in ACTIVATIONS:
        known = ", ".join(repr(name) for name in ACTIVATIONS)
        raise error(f"{op}: {name} is {activation!r}, expected one of {known}")


def activate(x: Tensor, activation: str, negative_slope: float = 0.01) -> Tensor:
    """The activation of that name. ``negative_slope`` is used by ``leaky_relu`` alone."""
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    return ACTIVATIONS[activation](x)


def epilogue(
    y: Tensor,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
) -> Tensor:
    """``activation(y + residual)``, or with ``residual_last`` ``activation(y) + residual``."""
    if residual is not None and not residual_last:
        y = y + residual
    y = activate(y, activation, negative_slope)
    if residual is not None and residual_last:
        y = y + residual
    return y


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


def scaled(y: Tensor, scaling_factor: float | Tensor) -> Tensor:
    """``y * scaling_factor``, without a pass over memory for a factor of 1."""
    if not isinstance(scaling_factor, Tensor) and scaling_factor == 1.0:
        return y
    return y * scaling_factor


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """``F.batch_norm``, with a weight of ones where there is a bias alone.

    PyTorch's gradient of the bias is wrong there on CUDA, or raises, and so are its second derivatives on every device
    (torch 2.11 and 2.13).
    """
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def bn_scale(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
) -> Tensor:
    """Twin of :func:`fused_conv_bn.bn_scale`."""
    y = scaled(batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps), scaling_factor)
    return epilogue(y, residual, activation, negative_slope, residual_last)


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
    """Twin of :func:`fused_conv_bn.bn_scale_cat`."""
    bn = running_mean, running_var, weight, bias, scaling_factor, eps
    return bn_scale(torch.cat(tuple(inputs), 1), *bn, activation=activation, negative_slope=negative_slope)


def gate(
    input: Tensor,
    gate: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
) -> Tensor:
    """Twin of :func:`fused_conv_bn.gate`."""
    y = input * gate.reshape(*input.shape[:2], *[1] * (input.dim() - 2))
    return epilogue(y, residual, activation, negative_slope, residual_last)


def max_pool2d(
    input: Tensor,
    kernel_size: int | list[int] | tuple[int, ...],
    stride: int | list[int] | tuple[int, ...] | None = None,
    padding: int | list[int] | tuple[int, ...] = 0,
    dilation: int | list[int] | tuple[int, ...] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Twin of :func:`fused_conv_bn.max_pool2d`."""
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


def spatial_mean(input: Tensor, *, keepdim: bool = False) -> Tensor:
    """Twin of :func:`fused_conv_bn.spatial_mean`."""
    return input.mean(tuple(range(2, input.dim())), keepdim)


def per_channel(x: Tensor, dim: int) -> Tensor:
    """``x`` of shape (C,), to be broadcast over a tensor of ``dim`` dimensions."""
    return x.view(-1, *[1] * (dim - 2))


def scale_shift(
    input: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
) -> Tensor:
    """Twin of :func:`fused_conv_bn.scale_shift`: each step in the dtype of ``input``, as separate ops would be."""
    y = input
    if scale is not None:
        y = y * per_channel(scale, input.dim()).to(input.dtype)
    if shift is not None:
        y = y + per_channel(shift, input.dim()).to(input.dtype)
    y = epilogue(y, residual, activation, negative_slope, residual_last)
    return y.clone() if y is input else y


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv1d``, ``F.conv2d`` or ``F.conv3d`` by the number of dimensions."""
    if input.dim() == 4:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if input.dim() == 3:
        return F.conv1d(input, weight, bias, stride, padding, dilation, groups)
    return F.conv3d(input, weight, bias, stride, padding, dilation, groups)


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
) -> Tensor:
    """Twin of :func:`fused_conv_bn.squeeze_excite`."""
    hidden = activate(convolution(spatial_mean(input, keepdim=True), weight1, bias1), activation, negative_slope)
    return activate(convolution(hidden, weight2, bias2), gate, negative_slope)


def conv_scale_shift(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
) -> Tensor:
    """Twin of :func:`fused_conv_bn.conv_scale_shift`."""
    y = convolution(input, weight, None, stride, padding, dilation, groups)
    return scale_shift(
        y,
        scale,
        shift,
        residual=residual,
        activation=activation,
        negative_slope=negative_slope,
        residual_last=residual_last,
    )


def conv_bn_scale(
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
) -> Tensor:
    """Twin of :func:`fused_conv_bn.conv_bn_scale`."""
    return bn_scale(
        convolution(input, conv_weight, conv_bias, stride, padding, dilation, groups),
        running_mean,
        running_var,
        weight,
        bias,
        scaling_factor,
        eps,
        residual=residual,
        activation=activation,
        negative_slope=negative_slope,
        residual_last=residual_last,
    )


def gate_conv_bn_scale(input: Tensor, gated_by: Tensor, *args: Any, **named: Any) -> Tensor:
    """Twin of :func:`fused_conv_bn.gate_conv_bn_scale`."""
    return conv_bn_scale(gate(input, gated_by), *args, **named)


def bn_scale_train(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
) -> Tensor:
    """Twin of :func:`fused_conv_bn.bn_scale_train`; updates the running statistics as well."""
    y = scaled(batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps), scaling_factor)
    return epilogue(y, residual, activation, negative_slope, residual_last)


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
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
) -> Tensor:
    """Twin of :func:`fused_conv_bn.conv_bn_scale_train`; updates the running statistics as well."""
    return bn_scale_train(
        convolution(input, conv_weight, conv_bias, stride, padding, dilation, groups),
        running_mean,
        running_var,
        weight,
        bias,
        scaling_factor,
        momentum,
        eps,
        residual=residual,
        activation=activation,
        negative_slope=negative_slope,
        residual_last=residual_last,
    )


# ---- the forms that return statistics --------------------------------------------------------------------------------


def batch_statistics(input: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, invstd) of each channel over all else, in float32, or in float64 for float64."""
    x = input.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x, dims, correction=0)
    return mean, torch.rsqrt(var + eps)


def _updated(running: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if running is None else running.detach().clone()


def bn_scale_train_stats(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    momentum: float = 0.1,
    eps: float = 1e-5,
    **epilogue: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of ``torch.ops.fused_conv_bn.bn_scale_train_stats``: (y, mean, invstd)."""
    y = bn_scale_train(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        scaling_factor,
        momentum,
        eps,
        **epilogue,  # type: ignore[arg-type]
    )
    return y, *batch_statistics(input, eps)


def bn_scale_train_functional(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    momentum: float = 0.1,
    eps: float = 1e-5,
    **epilogue: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Twin of ``torch.ops.fused_conv_bn.bn_scale_train_functional``: (y, mean, invstd, running_mean, running_var), the
    latter two updated, and empty where none were given. Nothing is written."""
    mean, invstd = batch_statistics(input, eps)
    new_mean, new_var = _updated(running_mean, mean), _updated(running_var, mean)
    y = bn_scale_train(
        input,
        None if running_mean is None else new_mean,
        None if running_var is None else new_var,
        weight,
        bias,
        scaling_factor,
        momentum,
        eps,
        **epilogue,  # type: ignore[arg-type]
    )
    return y, mean, invstd, new_mean, new_var


def conv_bn_scale_train_stats(
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
    **epilogue: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of ``torch.ops.fused_conv_bn.conv_bn_scale_train_stats``. The mean is that without ``conv_bias``."""
    window = stride, padding, dilation, groups
    y = conv_bn_scale_train(
        input,
        conv_weight,
        conv_bias,
        running_mean,
        running_var,
        weight,
        bias,
        scaling_factor,
        momentum,
        eps,
        *window,
        **epilogue,  # type: ignore[arg-type]
    )
    return y, *batch_statistics(convolution(input, conv_weight, None, *window), eps)


def conv_bn_scale_train_functional(
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
    **epilogue: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Twin of ``torch.ops.fused_conv_bn.conv_bn_scale_train_functional``."""
    window = stride, padding, dilation, groups
    z = convolution(input, conv_weight, conv_bias, *window)
    y, _, _, new_mean, new_var = bn_scale_train_functional(
        z, running_mean, running_var, weight, bias, scaling_factor, momentum, eps, **epilogue
    )
    return y, *batch_statistics(convolution(input, conv_weight, None, *window), eps), new_mean, new_var


# ---- backward --------------------------------------------------------------------------------------------------------

_aten = torch.ops.aten

FROM_RESULT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, y: _aten.threshold_backward(dy, y, 0),
    "sigmoid": _aten.sigmoid_backward,
    "tanh": _aten.tanh_backward,
}
"""The gradient of an activation's input from that of its result, and the result."""

_FROM_INPUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, x: _aten.threshold_backward(dy, x, 0),
    "relu6": lambda dy, x: _aten.hardtanh_backward(dy, x, 0.0, 6.0),
    "silu": _aten.silu_backward,
    "hardswish": _aten.hardswish_backward,
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda dy, x: _aten.gelu_backward(dy, x, approximate="tanh"),
    "sigmoid": lambda dy, x: _aten.sigmoid_backward(dy, torch.sigmoid(x)),
    "hardsigmoid": _aten.hardsigmoid_backward,
    "mish": _aten.mish_backward,
    "tanh": lambda dy, x: _aten.tanh_backward(dy, torch.tanh(x)),
}
"""The same from the activation's input. ``leaky_relu`` is not in it: it takes a slope."""


def activation_backward(dy: Tensor, x: Tensor, activation: str, negative_slope: float) -> Tensor:
    if activation == "leaky_relu":
        return _aten.leaky_relu_backward(dy, x, negative_slope, False)
    return _FROM_INPUT[activation](dy, x)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What tensors of this dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def _activation_gradient(
    dy: Tensor,
    z: Tensor | None,
    result: Tensor | None,
    residual: Tensor | None,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    if activation == "none":
        return dy
    if result is not None:
        return FROM_RESULT[activation](dy, result)
    assert z is not None
    dtype, dim = wide(dy.dtype), dy.dim()
    v = z.to(dtype)
    if center is not None:
        v = v - per_channel(center, dim)
    if scale is not None:
        v = v * per_channel(scale, dim)
    if shift is not None:
        v = v + per_channel(shift, dim)
    if residual is not None:
        v = v + residual
    return activation_backward(dy.to(dtype), v, activation, negative_slope).to(dy.dtype)


def bn_scale_backward(
    dy: Tensor,
    input: Tensor | None,
    result: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    needs_input: bool = False,
    needs_weight: bool = False,
    needs_bias: bool = False,
    needs_conv_bias: bool = False,
    needs_residual: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Twin of ``torch.ops.fused_conv_bn.bn_scale_backward``: the gradients of input, weight, bias, conv_bias, residual.

    Of ``activation(affine(input) + residual)``, where the affine is that of ``bn_scale`` with ``var``, of
    ``bn_scale_train`` with ``invstd``, and of ``scale_shift`` with neither.
    """
    dtype = wide(dy.dtype)
    center, var, invstd, gain, offset = _wide(dtype, mean, var, invstd, weight, bias)
    if center is not None and conv_bias is not None and invstd is None:
        center = center - conv_bias.to(dtype)
    if scaling_factor != 1.0:
        if gain is None:
            gain = torch.full((dy.size(1),), scaling_factor, dtype=dtype, device=dy.device)
        else:
            gain = gain * scaling_factor
        offset = None if offset is None else offset * scaling_factor
    inverse = torch.rsqrt(var + eps) if invstd is None and var is not None else invstd
    scale = gain if inverse is None else inverse if gain is None else inverse * gain
    dv = _activation_gradient(dy, input, result, residual, center, scale, offset, activation, negative_slope)
    dresidual = dv if needs_residual else None
    dinput, dgain, dbias = dv if needs_input else None, None, None
    if needs_weight or needs_bias or needs_conv_bias or (needs_input and scale is not None):
        trains = invstd is not None
        zeros = torch.zeros(dy.size(1), dtype=dtype, device=dy.device)
        dinput, dgain, dbias = _aten.native_batch_norm_backward(
            dv,
            dv if input is None else input,
            torch.ones_like(zeros) if gain is None else gain,
            zeros if center is None else center,
            torch.ones_like(zeros) if var is None else var,
            center if trains else dy.new_empty(0, dtype=dtype),
            invstd if trains else dy.new_empty(0, dtype=dtype),
            trains,
            eps if var is not None else 0.0,
            [needs_input, needs_weight, needs_bias or needs_conv_bias],
        )
    dconv_bias = None
    if needs_conv_bias:
        assert dbias is not None
        dconv_bias = torch.zeros_like(dbias) if invstd is not None else dbias if scale is None else dbias * scale
    of_weight = dtype if weight is None else weight.dtype
    of_bias = of_weight if bias is None else bias.dtype
    of_conv_bias = dy.dtype if conv_bias is None else conv_bias.dtype
    return (
        dinput if needs_input else None,
        scaled(dgain, scaling_factor).to(of_weight) if needs_weight and dgain is not None else None,
        scaled(dbias, scaling_factor).to(of_bias) if needs_bias and dbias is not None else None,
        None if dconv_bias is None else dconv_bias.to(of_conv_bias),
        dresidual,
    )


def conv_bn_wgrad(
    dy: Tensor,
    result: Tensor | None,
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    scaling_factor: float,
    eps: float,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str = "none",
    has_statistics: bool = False,
) -> tuple[Tensor, ...]:
    """Twin of ``torch.ops.fused_conv_bn._conv_bn_wgrad`` with everything asked for.

    (conv_weight, weight, bias, conv_bias, scaled_weight, input_scale, input_shift); has_statistics: ``var`` is the
    inverse of the batch's deviation.
    """
    dtype = wide(dy.dtype)
    z = convolution(input.to(dtype), conv_weight.to(dtype), None, stride, padding, dilation, groups)
    dv = (dy if result is None else FROM_RESULT[activation](dy, result)).to(dtype)
    channels = dy.size(1)
    gain = (
        torch.ones(channels, dtype=dtype, device=dy.device) if weight is None else weight.to(dtype)
    ) * scaling_factor
    if var is None:
        invstd = torch.ones_like(gain)
    else:
        invstd = var.to(dtype) if has_statistics else torch.rsqrt(var.to(dtype) + eps)
    dims = [d for d in range(dy.dim()) if d != 1]
    center = torch.zeros_like(gain) if mean is None else mean.to(dtype)
    if has_statistics:
        center = z.mean(dims)
    elif conv_bias is not None:
        center = center - conv_bias.to(dtype)
    count = dy.numel() // channels
    dbias = dv.sum(dims)
    dweight = (dv * (z - per_channel(center, dy.dim()))).sum(dims) * invstd
    scale = -dweight / count * invstd if has_statistics else torch.zeros_like(gain)
    shift = -scale * center - dbias / count if has_statistics else torch.zeros_like(gain)
    factor = gain * invstd
    dz = (dv + z * per_channel(scale, dy.dim()) + per_channel(shift, dy.dim())) * per_channel(factor, dy.dim())
    w = conv_weight.to(dtype).detach().requires_grad_()
    with torch.enable_grad():
        again = convolution(input.to(dtype).detach(), w, None, stride, padding, dilation, groups)
    (dw,) = torch.autograd.grad(again, w, dz)
    of_bn = weight.dtype if weight is not None else dtype if mean is None else mean.dtype
    dcb = torch.zeros_like(dbias) if has_statistics else dbias * factor
    return (
        dw.to(conv_weight.dtype),
        (dweight * scaling_factor).to(of_bn),
        (dbias * scaling_factor).to(of_bn),
        dcb.to(dy.dtype if conv_bias is None else conv_bias.dtype),
        (conv_weight.to(dtype) * factor.view(-1, *[1] * (dy.dim() - 1))).to(conv_weight.dtype),
        scale,
        shift,
    )


def bn_scale_backward_sums(
    dy: Tensor,
    input: Tensor,
    result: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scaling_factor: float,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    needs_weight: bool = False,
    needs_bias: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Twin of ``torch.ops.fused_conv_bn.bn_scale_backward_sums``: (sums, dweight, dbias)."""
    _, dweight, dbias, _, dv = bn_scale_backward(
        *(dy, input, result, residual, mean, None, invstd, weight, bias, None, scaling_factor),
        activation=activation,
        negative_slope=negative_slope,
        needs_weight=needs_weight,
        needs_bias=needs_bias,
        needs_residual=True,
    )
    assert dv is not None
    dims = [d for d in range(dy.dim()) if d != 1]
    dv = dv.double()
    distance = input.double() - per_channel(mean.double(), dy.dim())
    return torch.stack([dv.sum(dims), (dv * distance).sum(dims)]), dweight, dbias


def bn_scale_backward_apply(
    dy: Tensor,
    input: Tensor,
    result: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor,
    count: Tensor,
    scaling_factor: float,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    needs_residual: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Twin of ``torch.ops.fused_conv_bn.bn_scale_backward_apply``: (dinput, dresidual)."""
    *_, dv = bn_scale_backward(
        *(dy, input, result, residual, mean, None, invstd, weight, bias, None, scaling_factor),
        activation=activation,
        negative_slope=negative_slope,
        needs_residual=True,
    )
    assert dv is not None
    dtype, dim = wide(dy.dtype), dy.dim()
    scale = invstd * scaling_factor if weight is None else invstd * weight.to(dtype) * scaling_factor
    s1, s2 = ((s / count).to(dtype) for s in sums)
    distance = input.to(dtype) - per_channel(mean, dim)
    dz = dv.to(dtype) - per_channel(s1, dim) - distance * per_channel(invstd.square() * s2, dim)
    return (dz * per_channel(scale, dim)).to(dy.dtype), dv if needs_residual else None


def bn_moments(input: Tensor) -> Tensor:
    """Twin of ``torch.ops.fused_conv_bn.bn_moments``: [count, mean, m2] of each channel, in float64."""
    dims = [d for d in range(input.dim()) if d != 1]
    count = input.numel() // max(1, input.size(1))
    if count == 0:
        return input.new_zeros((3, input.size(1)), dtype=torch.float64)
    var, mean = torch.var_mean(input.double(), dims, correction=0)
    return torch.stack([torch.full_like(mean, count), mean, var * count])
