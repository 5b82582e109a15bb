"""Plain-PyTorch twins of the ops: what they must compute, in any dtype that the arguments have.

Called with float64 tensors they are the reference that tests and benchmarks measure errors against; called with the
ops' own arguments they are eager PyTorch, whose error is the yardstick. They are differentiable, and are what runs
where an op cannot: under transforms of torch.func, in forward-mode AD, and for second derivatives. The twins of the ops
that a backward calls, and of the moments of a batch, are in _reference_backward.py.
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


def _pairs(*values: int | Sequence[int]) -> list[list[int]]:
    """Of rows and columns."""
    return [[v, v] if isinstance(v, int) else list(v) * (2 // len(v)) for v in values]


def _window_begins(size: Sequence[int], strides: Sequence[int], paddings: Sequence[int], like: Tensor) -> list[Tensor]:
    """Of rows and columns, to be broadcast over a result of this size."""
    begins = [torch.arange(n, device=like.device) * s - p for n, s, p in zip(size[-2:], strides, paddings, strict=True)]
    return [begins[0].view(-1, 1), begins[1]]


def max_pool2d_train(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = (),
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Twin of the op: the maxima, and in uint8 the position of each in its window, row by row."""
    stride = kernel_size if stride in ((), []) else stride
    kernel, strides, paddings, dilations = _pairs(kernel_size, stride, padding, dilation)
    y, index = F.max_pool2d(input, kernel, strides, paddings, dilations, ceil_mode, return_indices=True)
    begins = _window_begins(y.shape, strides, paddings, y)
    row, column = (
        torch.div(at - begin, d, rounding_mode="floor")
        for at, begin, d in zip((index // input.shape[3], index % input.shape[3]), begins, dilations, strict=True)
    )
    return y, (row * kernel[1] + column).to(torch.uint8)


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
) -> Tensor:
    """Twin of the op: the gradient of the input of :func:`max_pool2d_train`. Differentiable in ``grad_output``."""
    stride = kernel_size if stride in ((), []) else stride
    kernel, strides, paddings, dilations = _pairs(kernel_size, stride, padding, dilation)
    row, column = _window_begins(position.shape, strides, paddings, position)
    place = position.long()
    index = (row + place // kernel[1] * dilations[0]) * input_width + column + place % kernel[1] * dilations[1]
    n, c = grad_output.shape[:2]
    sums = grad_output.new_zeros((n, c, input_height * input_width), dtype=wide(grad_output.dtype))
    sums = sums.scatter_add(2, index.flatten(2), grad_output.flatten(2).to(sums.dtype))
    return sums.to(grad_output.dtype).view(n, c, input_height, input_width)


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


def conv_bn_scale_mean(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """Twin of :func:`fused_conv_bn.conv_bn_scale_mean`."""
    y = conv_bn_scale(*args, **named)
    return y, spatial_mean(y, keepdim=True)


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

from ._reference_backward import FROM_RESULT as FROM_RESULT  # noqa: E402  (it takes the above)
from ._reference_backward import activation_backward as activation_backward  # noqa: E402
from ._reference_backward import bn_moments as bn_moments  # noqa: E402
from ._reference_backward import bn_scale_backward as bn_scale_backward  # noqa: E402
from ._reference_backward import bn_scale_backward_apply as bn_scale_backward_apply  # noqa: E402
from ._reference_backward import bn_scale_backward_sums as bn_scale_backward_sums  # noqa: E402
from ._reference_backward import conv_bn_wgrad as conv_bn_wgrad  # noqa: E402
from ._reference_backward import wide as wide  # noqa: E402
