"""The functions of this package: ``torch.ops.fused_conv_bn.*`` with documentation and a guard against lost gradients.

All of them work on CUDA and CPU tensors of dtype float32, float16, bfloat16 or float64. Inputs have 2 to 5 dimensions,
(N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); contiguous and channels_last tensors are used as they are, others
are copied once, and results have the strides that ``F.batch_norm`` would give. 16-bit inputs are computed in float32.
The per-channel BN tensors have shape (C,) and the dtype of the input, or float32 if that is a 16-bit one.

They keep no autograd graph. With grad mode on and an argument that requires grad, or with one that carries a
forward-mode tangent, they raise RuntimeError, rather than return a tensor whose derivative would be silently missing.
Every other wrong argument raises RuntimeError too, before anything is written. A tensor that is written to counts as
modified, so that autograd refuses to use it where it needed the old values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

_ops = torch.ops.fused_conv_bn


def _refuse_grad(op: str, **tensors: Tensor | None) -> None:
    if forward_ad._current_level >= 0:
        for name, tensor in tensors.items():
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(
                    f"{op}: {name} has a forward-mode tangent, and {op} has no derivative: ConvBnScale2d runs "
                    f"PyTorch's own ops where one is needed"
                )
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {name} requires grad, and {op} keeps no autograd graph: call it under torch.no_grad() or pass "
                f"{name}.detach(); ConvBnScale2d runs PyTorch's own ops where a gradient is needed"
            )


def _written(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            increment_version(tensor)


def fold_bn(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    conv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Folds BatchNorm's inference parameters, a scaling factor and a convolution's bias into one affine per channel.

    Equivalent to::

        scale = weight / sqrt(running_var + eps) * scaling_factor
        shift = (bias + (conv_bias - running_mean) * weight / sqrt(running_var + eps)) * scaling_factor

    computed in float64. A missing ``weight`` counts as 1, a missing ``bias`` or ``conv_bias`` as 0.

    Args:
        running_mean, running_var, weight, bias, conv_bias: shape (C,); float32, one 16-bit dtype, a mixture of these
            two, or all float64.
        scaling_factor: factor on the result of BatchNorm.
        eps: as in ``nn.BatchNorm2d``, 0 or more.

    Returns:
        (scale, shift), each of shape (C,), float32, or float64 for float64 arguments: what :func:`scale_shift` takes.

    Raises:
        RuntimeError: a shape, dtype, device or eps that does not fit, or an argument that requires grad in grad mode.
    """
    _refuse_grad(
        "fold_bn", running_mean=running_mean, running_var=running_var, weight=weight, bias=bias, conv_bias=conv_bias
    )
    return _ops.fold_bn(running_mean, running_var, weight, bias, scaling_factor, eps, conv_bias)


def bn_scale(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """BatchNorm in inference mode, times a scaling factor, in one pass over memory.

    Equivalent to ``F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps) * scaling_factor``.

    Args:
        input: 2 to 5 dimensions, channels in dimension 1.
        running_mean, running_var, weight, bias: shape (C,); ``weight`` and ``bias`` may be None.
        scaling_factor: factor on the result.
        eps: as in ``nn.BatchNorm2d``, 0 or more.
        out: written to and returned if given; of ``input``'s shape, dtype and device, and either ``input`` itself or
            memory of its own.

    Returns:
        A tensor of ``input``'s shape and dtype.

    Raises:
        RuntimeError: an argument that does not fit, or that requires grad in grad mode.
    """
    _refuse_grad(
        "bn_scale",
        input=input,
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
        out=out,
    )
    if out is None:
        return _ops.bn_scale(input, running_mean, running_var, weight, bias, scaling_factor, eps)
    _ops.bn_scale.out(input, running_mean, running_var, weight, bias, scaling_factor, eps, out=out)
    increment_version(out)
    return out


def bn_scale_(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`bn_scale` in place. Returns ``input``."""
    _refuse_grad("bn_scale_", input=input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _ops.bn_scale_(input, running_mean, running_var, weight, bias, scaling_factor, eps)
    increment_version(input)
    return input


def scale_shift(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """An affine per channel, an optional residual and an optional activation, in one pass over memory.

    Equivalent to ``activation(input * scale[:, None, None] + shift[:, None, None] + residual)``, rounded once.

    Args:
        input: 2 to 5 dimensions, channels in dimension 1.
        scale, shift: shape (C,), float32 (float64 for float64 input), as :func:`fold_bn` returns them.
        residual: shape, dtype and device of ``input``.
        activation: ``"none"``, ``"relu"``, ``"relu6"``, ``"silu"`` or ``"hardswish"``. NaN passes through.
        out: written to and returned if given; of ``input``'s shape, dtype and device, and either ``input`` or
            ``residual`` itself or memory of its own.

    Returns:
        A tensor of ``input``'s shape and dtype.

    Raises:
        RuntimeError: an argument that does not fit, or that requires grad in grad mode.
    """
    _refuse_grad("scale_shift", input=input, scale=scale, shift=shift, residual=residual, out=out)
    if out is None:
        return _ops.scale_shift(input, scale, shift, residual=residual, activation=activation)
    _ops.scale_shift.out(input, scale, shift, residual=residual, activation=activation, out=out)
    increment_version(out)
    return out


def scale_shift_(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """:func:`scale_shift` in place. Returns ``input``."""
    _refuse_grad("scale_shift_", input=input, scale=scale, shift=shift, residual=residual)
    _ops.scale_shift_(input, scale, shift, residual=residual, activation=activation)
    increment_version(input)
    return input


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
    allow_tf32: bool = False,
) -> Tensor:
    """A convolution, then an affine per output channel, an optional residual and an optional activation.

    Equivalent to::

        activation(F.conv2d(input, weight, None, stride, padding, dilation, groups) * scale[:, None, None]
                   + shift[:, None, None] + residual)

    and with ``F.conv1d`` or ``F.conv3d`` for inputs of 3 or 5 dimensions. The memory format of the result is that of
    PyTorch's convolution: channels_last if the input or the weight is. Under ``torch.autocast`` input, weight and
    residual are cast as ``F.conv2d`` casts its arguments.

    On CUDA a kernel of this package runs where there is a faster one, and else PyTorch's convolution and one pass in
    place behind it. On the CPU a kernel of this package runs for contiguous float32 inputs of few channels and wide
    rows, and else PyTorch's convolution with the same pass, or none: without residual and activation, scale and shift
    are folded into the convolution where that costs no accuracy.
    This package's kernels are as accurate as float32 arithmetic, whatever PyTorch's flags say, unless ``allow_tf32``
    is set. PyTorch's convolution is what eager would run, and as accurate: cuDNN's follows
    ``torch.backends.cudnn.allow_tf32``, which this function neither reads nor changes.

    The environment variable FUSED_CONV_BN_PRINT_CONFIG=1 prints on stderr what runs on CUDA, once for each kind of
    call; FUSED_CONV_BN_CONV names an algorithm to run instead, ``aten`` for PyTorch's convolution.

    Args:
        input: (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        weight: (K, C / groups, and the kernel's extents), in the dtype of ``input``.
        scale, shift: shape (K,), float32 (float64 for float64 input), as :func:`fold_bn` returns them.
        stride, padding, dilation: an int for all spatial dimensions, or one for each. Padding is with zeros.
        groups: divides C and K.
        residual: of the result's shape, and the dtype and device of ``input``.
        activation: ``"none"``, ``"relu"``, ``"relu6"``, ``"silu"`` or ``"hardswish"``. NaN passes through.
        allow_tf32: lets float32 kernels of this package round products to TF32's 11 bits.

    Returns:
        A tensor of shape (N, K, ...) and the dtype of ``input``.

    Raises:
        RuntimeError: an argument that does not fit, or that requires grad in grad mode.
    """
    _refuse_grad("conv_scale_shift", input=input, weight=weight, scale=scale, shift=shift, residual=residual)
    stride, padding, dilation = ((x,) if isinstance(x, int) else x for x in (stride, padding, dilation))
    return _ops.conv_scale_shift(
        input,
        weight,
        scale,
        shift,
        stride,
        padding,
        dilation,
        groups,
        residual=residual,
        activation=activation,
        allow_tf32=allow_tf32,
    )


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
    """BatchNorm in training mode, times a scaling factor; updates the running statistics, and keeps no graph.

    Equivalent to ``F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps) * scaling_factor``
    under ``torch.no_grad()``: the input is normalised by its own mean and biased variance, and the running buffers
    move towards its mean and unbiased variance by ``momentum``. The input is read twice and the result written once.
    An empty input gives an empty result and updates nothing.

    Args:
        input: 2 to 5 dimensions, channels in dimension 1, more than one element for each channel.
        running_mean, running_var: shape (C,), written to; both None to keep none.
        weight, bias: shape (C,), or None.
        scaling_factor: factor on the result.
        momentum: share of the batch in the updated running statistics.
        eps: as in ``nn.BatchNorm2d``, 0 or more.

    Returns:
        A tensor of ``input``'s shape and dtype.

    Raises:
        RuntimeError: an argument that does not fit, or that requires grad in grad mode. Nothing is updated then.
    """
    _refuse_grad(
        "bn_scale_train",
        input=input,
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
    )
    y = _ops.bn_scale_train(input, running_mean, running_var, weight, bias, scaling_factor, momentum, eps)
    _written(running_mean, running_var)
    return y


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
    allow_tf32: bool = False,
) -> Tensor:
    """A convolution, then :func:`bn_scale_train` of its result.

    Equivalent to::

        y = F.conv2d(input, conv_weight, conv_bias, stride, padding, dilation, groups)
        F.batch_norm(y, running_mean, running_var, weight, bias, True, momentum, eps) * scaling_factor

    under ``torch.no_grad()``, and with ``F.conv1d`` or ``F.conv3d`` for inputs of 3 or 5 dimensions. The batch's mean
    takes the convolution's bias away again, so that it is added to the running mean alone. What computes the
    convolution is chosen as in :func:`conv_scale_shift`; memory format, autocast, ``allow_tf32`` and the environment
    variables are as there.

    Args:
        input: (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        conv_weight: (K, C / groups, and the kernel's extents), in the dtype of ``input``.
        conv_bias: shape (K,), or None.
        running_mean, running_var, weight, bias, scaling_factor, momentum, eps: as in :func:`bn_scale_train`, for K
            channels.
        stride, padding, dilation, groups: as in ``F.conv2d``.
        allow_tf32: lets float32 kernels of this package round products to TF32's 11 bits.

    Returns:
        A tensor of shape (N, K, ...) and the dtype of ``input``.

    Raises:
        RuntimeError: an argument that does not fit, or that requires grad in grad mode. Nothing is updated then.
    """
    _refuse_grad(
        "conv_bn_scale_train",
        input=input,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
    )
    stride, padding, dilation = ((x,) if isinstance(x, int) else x for x in (stride, padding, dilation))
    y = _ops.conv_bn_scale_train(
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
        stride,
        padding,
        dilation,
        groups,
        allow_tf32=allow_tf32,
    )
    _written(running_mean, running_var)
    return y


# ---- autocast --------------------------------------------------------------------------------------------------------

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives to a tensor that takes part in a convolution."""
    device = x.device.type
    if x.dtype == torch.float64 or not x.is_floating_point() or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def _autocast_conv_scale_shift(
    input: Tensor, weight: Tensor, *args: Any, residual: Tensor | None = None, **kwargs: Any
) -> Tensor:
    # Autocast is off inside, as in PyTorch's own autocast kernels. Without this one the convolution inside the op would
    # be cast by itself, behind the back of what is computed from its result.
    input, weight = (x.to(autocast_dtype(x)) for x in (input, weight))
    residual = None if residual is None else residual.to(autocast_dtype(residual))
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return _ops.conv_scale_shift(input, weight, *args, residual=residual, **kwargs)


def _autocast_conv_bn_scale_train(input: Tensor, conv_weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # The convolution's bias stays as it is: it meets the running mean alone, which is not cast either.
    input, conv_weight = (x.to(autocast_dtype(x)) for x in (input, conv_weight))
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return _ops.conv_bn_scale_train(input, conv_weight, *args, **kwargs)


_autocast_library = torch.library.Library("fused_conv_bn", "IMPL")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _autocast_library.impl("conv_scale_shift", _autocast_conv_scale_shift, _key)
    _autocast_library.impl("conv_bn_scale_train", _autocast_conv_bn_scale_train, _key)
