"""The functions of this package: ``torch.ops.fused_conv_bn.*`` with documentation and derivatives.

All of them work on CUDA and CPU tensors of dtype float32, float16, bfloat16 or float64. Inputs have 2 to 5 dimensions,
(N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); contiguous and channels_last tensors are used as they are, others
are copied once, and results have the strides that ``F.batch_norm`` would give. 16-bit inputs are computed in float32.
The per-channel BN tensors have shape (C,) and the dtype of the input, or float32 if that is a 16-bit one.

Functions that return a new tensor are differentiable: the fused op runs forward, PyTorch's formulas run backward, also
for second derivatives. Under transforms of torch.func and in forward-mode AD PyTorch's own ops run instead. Functions
that write to ``input`` or ``out`` have no derivative: with grad mode on and an argument that requires grad, or with one
that carries a forward-mode tangent, they raise RuntimeError.

What they share is the epilogue, by keyword: ``activation(y + residual)``, or ``activation(y) + residual`` with
``residual_last``.

- ``residual``: shape, dtype and device of the result; None to add nothing.
- ``activation``: ``"none"``, ``"relu"``, ``"relu6"``, ``"silu"``, ``"hardswish"``, ``"gelu"``, ``"gelu_tanh"``,
  ``"leaky_relu"``, ``"sigmoid"``, ``"hardsigmoid"``, ``"mish"`` or ``"tanh"``. NaN passes as in PyTorch.
- ``negative_slope``: of ``leaky_relu``.
- ``residual_last``: adds the residual behind the activation.

A wrong argument raises RuntimeError, and what is no tensor TypeError, before anything is written. A tensor that is
written to counts as modified, so that autograd refuses to use it where it needed the old values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import autograd, reference
from ._conv import NO_WINDOW, Window
from ._dispatch import GRAD, RAW, keywords, refuse_grad, require_grad, twin, way_of, written
from ._joined import MOST_PARTS as MOST_PARTS
from ._joined import bn_scale_cat as bn_scale_cat
from ._joined import gate as gate
from ._memory import go_on_behind
from ._pooling import max_pool2d as max_pool2d
from ._pooling import spatial_mean as spatial_mean
from ._squeeze import squeeze_excite as squeeze_excite

_ops = torch.ops.fused_conv_bn
_is_compiling = torch.compiler.is_compiling


def _named(names: tuple[str, ...], *tensors: Tensor | None) -> dict[str, Tensor | None]:
    return dict(zip(names, tensors, strict=True))


def _window(
    stride: int | Sequence[int], padding: int | Sequence[int], dilation: int | Sequence[int], groups: int
) -> Window:
    return (
        (stride,) if isinstance(stride, int) else stride,
        (padding,) if isinstance(padding, int) else padding,
        (dilation,) if isinstance(dilation, int) else dilation,
        groups,
    )


_FOLD = ("running_mean", "running_var", "weight", "bias", "conv_bias")
_BN = ("input", "running_mean", "running_var", "weight", "bias", "residual")
_AFFINE = ("input", "scale", "shift", "residual")
_CONV_AFFINE = ("input", "weight", "scale", "shift", "residual")
_CONV_BN = ("input", "conv_weight", "running_mean", "running_var", "conv_bias", "weight", "bias", "residual")
_TRAIN = ("input", "weight", "bias", "residual", "running_mean", "running_var")
_CONV_TRAIN = ("input", "conv_weight", "conv_bias", "weight", "bias", "residual", "running_mean", "running_var")


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

    A missing ``weight`` counts as 1, a missing ``bias`` or ``conv_bias`` as 0. Differentiable.

    Args:
        running_mean, running_var, weight, bias, conv_bias: shape (C,); float32, one 16-bit dtype, a mixture of these
            two, or all float64.
        scaling_factor: factor on the result of BatchNorm.
        eps: as in ``nn.BatchNorm2d``, 0 or more.

    Returns:
        Scale and shift, as :func:`scale_shift` takes them, each of shape (C,), float32, or float64 for float64
        arguments.

    Raises:
        RuntimeError: a shape, dtype, device or eps that does not fit.
        TypeError: ``running_mean`` or ``running_var`` is no tensor.
    """
    if way_of("fold_bn", _FOLD, (running_mean, running_var), (weight, bias, conv_bias)) != RAW:
        dtype = torch.float64 if running_mean.dtype == torch.float64 else torch.float32
        weight, bias, conv_bias = (None if t is None else t.to(dtype) for t in (weight, bias, conv_bias))
        return reference.fold_bn(
            running_mean.to(dtype), running_var.to(dtype), weight, bias, scaling_factor, eps, conv_bias
        )
    return _ops.fold_bn.default(running_mean, running_var, weight, bias, scaling_factor, eps, conv_bias)


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
    out: Tensor | None = None,
) -> Tensor:
    """BatchNorm in inference mode, times a scaling factor, and the epilogue, in one pass over memory. Differentiable.

    Equivalent to ``F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps) * scaling_factor``
    and the epilogue.

    Args:
        input: 2 to 5 dimensions, channels in dimension 1.
        running_mean, running_var, weight, bias: shape (C,); ``weight`` and ``bias`` may be None.
        scaling_factor: factor on the result of BatchNorm.
        eps: as in ``nn.BatchNorm2d``, 0 or more.
        residual, activation, negative_slope, residual_last: the epilogue, see the module's documentation.
        out: written to and returned if given; of ``input``'s shape, dtype and device, and either ``input`` or
            ``residual`` itself or memory of its own. With ``out`` there is no derivative.

    Returns:
        A tensor of ``input``'s shape and dtype.

    Raises:
        RuntimeError: an argument that does not fit, or with ``out`` one that requires grad in grad mode.
        TypeError: an argument that is no tensor where one is expected.
    """
    way = way_of("bn_scale", _BN, (input, running_mean, running_var), (weight, bias, residual))
    bn = running_mean, running_var, weight, bias, scaling_factor, eps
    epilogue = residual, activation, negative_slope, residual_last
    if out is not None:
        refuse_grad("bn_scale", **_named(_BN, input, running_mean, running_var, weight, bias, residual), out=out)
        if not _is_compiling() and out.is_neg():
            return out.copy_(bn_scale(input, *bn, **keywords(*epilogue)))
        _ops.bn_scale.out(input, *bn, out=out, **keywords(*epilogue))
        increment_version(out)
        return out
    try:
        if way == RAW:
            return _ops.bn_scale.default(input, *bn, **keywords(*epilogue))
        if way == GRAD and not require_grad(running_mean, running_var):
            return autograd.bn_scale(input, None, None, bn, NO_WINDOW, epilogue)
    except RuntimeError as error:
        go_on_behind(error)
    reference.check_activation("bn_scale", activation, RuntimeError)
    return twin(reference.bn_scale, input, *bn, **keywords(*epilogue))


def bn_scale_(
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
    """:func:`bn_scale` in place, without a derivative. Returns ``input``."""
    way_of("bn_scale_", _BN, (input, running_mean, running_var), (weight, bias, residual))
    refuse_grad("bn_scale_", **_named(_BN, input, running_mean, running_var, weight, bias, residual))
    bn = running_mean, running_var, weight, bias, scaling_factor, eps
    epilogue = residual, activation, negative_slope, residual_last
    # PyTorch resolves the sign of what an op returns, and this one returns nothing.
    if not _is_compiling() and input.is_neg():
        return input.copy_(bn_scale(input, *bn, **keywords(*epilogue)))
    _ops.bn_scale_.default(input, *bn, **keywords(*epilogue))
    increment_version(input)
    return input


def scale_shift(
    input: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """An affine per channel and the epilogue, in one pass over memory. Differentiable.

    Equivalent to ``activation(input * scale[:, None, None] + shift[:, None, None] + residual)``, rounded once.

    Args:
        input: 2 to 5 dimensions, channels in dimension 1.
        scale, shift: shape (C,), float32 (float64 for float64 input), as :func:`fold_bn` returns them. None counts as
            1 and 0.
        residual, activation, negative_slope, residual_last: the epilogue, see the module's documentation.
        out: written to and returned if given; of ``input``'s shape, dtype and device, and either ``input`` or
            ``residual`` itself or memory of its own. With ``out`` there is no derivative.

    Returns:
        A tensor of ``input``'s shape and dtype.

    Raises:
        RuntimeError: an argument that does not fit, or with ``out`` one that requires grad in grad mode.
        TypeError: an argument that is no tensor where one is expected.
    """
    way = way_of("scale_shift", _AFFINE, (input,), (scale, shift, residual))
    epilogue = residual, activation, negative_slope, residual_last
    if out is not None:
        refuse_grad("scale_shift", input=input, scale=scale, shift=shift, residual=residual, out=out)
        if not _is_compiling() and out.is_neg():
            return out.copy_(scale_shift(input, scale, shift, **keywords(*epilogue)))
        _ops.scale_shift.out(input, scale, shift, out=out, **keywords(*epilogue))
        increment_version(out)
        return out
    try:
        if way == RAW:
            return _ops.scale_shift.default(input, scale, shift, **keywords(*epilogue))
        if way == GRAD:
            return autograd.scale_shift(input, None, scale, shift, NO_WINDOW, epilogue)
    except RuntimeError as error:
        go_on_behind(error)
    reference.check_activation("scale_shift", activation, RuntimeError)
    return twin(reference.scale_shift, input, scale, shift, **keywords(*epilogue))


def scale_shift_(
    input: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
) -> Tensor:
    """:func:`scale_shift` in place, without a derivative. Returns ``input``."""
    way_of("scale_shift_", _AFFINE, (input,), (scale, shift, residual))
    refuse_grad("scale_shift_", input=input, scale=scale, shift=shift, residual=residual)
    epilogue = residual, activation, negative_slope, residual_last
    # PyTorch resolves the sign of what an op returns, and this one returns nothing.
    if not _is_compiling() and input.is_neg():
        return input.copy_(scale_shift(input, scale, shift, **keywords(*epilogue)))
    _ops.scale_shift_.default(input, scale, shift, **keywords(*epilogue))
    increment_version(input)
    return input


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
    allow_tf32: bool = False,
) -> Tensor:
    """A convolution, then an affine per output channel and the epilogue. Differentiable.

    Equivalent to::

        activation(F.conv2d(input, weight, None, stride, padding, dilation, groups) * scale[:, None, None]
                   + shift[:, None, None] + residual)

    and with ``F.conv1d`` or ``F.conv3d`` for inputs of 3 or 5 dimensions. The memory format of the result is that of
    PyTorch's convolution. Under ``torch.autocast`` input, weight and residual are cast as ``F.conv2d`` casts its
    arguments.

    On CUDA a kernel of this package runs where there is a faster one, and else PyTorch's convolution and one pass in
    place behind it. On the CPU a kernel of this package runs for contiguous float32 inputs of few channels and wide
    rows, and else PyTorch's convolution with the same pass. This package's kernels are as accurate as float32
    arithmetic, whatever PyTorch's flags say, unless ``allow_tf32`` is set. PyTorch's convolution is what eager would
    run, and as accurate: cuDNN's follows ``torch.backends.cudnn.allow_tf32``, which this function neither reads nor
    changes.

    Where a gradient is needed and the convolution has many terms, PyTorch's convolution runs and keeps its result, as
    eager does. Where it has few, backward computes the result again.

    :func:`explain` says what runs for a convolution, and :func:`use_algorithm` names what is to run on CUDA instead.

    Args:
        input: (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        weight: (K, C / groups, and the kernel's extents), in the dtype of ``input``.
        scale, shift: shape (K,), float32 (float64 for float64 input), as :func:`fold_bn` returns them. None counts as
            1 and 0.
        stride, padding, dilation: an int for all spatial dimensions, or one for each. Padding is with zeros.
        groups: divides C and K.
        residual, activation, negative_slope, residual_last: the epilogue, see the module's documentation.
        allow_tf32: lets float32 kernels of this package round products to TF32's 11 bits.

    Returns:
        A tensor of shape (N, K, ...) and the dtype of ``input``.

    Raises:
        RuntimeError: an argument that does not fit.
        TypeError: an argument that is no tensor where one is expected.
    """
    way = way_of("conv_scale_shift", _CONV_AFFINE, (input, weight), (scale, shift, residual))
    window = _window(stride, padding, dilation, groups)
    epilogue = residual, activation, negative_slope, residual_last
    try:
        if way == RAW:
            named = keywords(*epilogue, allow_tf32)
            return _ops.conv_scale_shift.default(input, weight, scale, shift, *window, **named)
        if way == GRAD:
            return autograd.scale_shift(input, weight, scale, shift, window, epilogue, allow_tf32)
    except RuntimeError as error:
        go_on_behind(error)
    reference.check_activation("conv_scale_shift", activation, RuntimeError)
    return twin(reference.conv_scale_shift, input, weight, scale, shift, *window, **keywords(*epilogue))


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
    allow_tf32: bool = False,
) -> Tensor:
    """A convolution, then :func:`bn_scale` of its result: BatchNorm in inference mode. Differentiable.

    Equivalent to::

        y = F.conv2d(input, conv_weight, conv_bias, stride, padding, dilation, groups)
        y = F.batch_norm(y, running_mean, running_var, weight, bias, False, 0.0, eps) * scaling_factor
        activation(y + residual)

    BatchNorm is folded inside of the op at every call, so that nothing computed from the parameters is kept. What
    computes the convolution is chosen as in :func:`conv_scale_shift`; memory format, autocast, ``allow_tf32`` and
    :func:`use_algorithm` are as there.

    Args:
        input: (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        conv_weight: (K, C / groups, and the kernel's extents), in the dtype of ``input``.
        conv_bias: shape (K,), or None.
        running_mean, running_var, weight, bias, scaling_factor, eps: as in :func:`bn_scale`, for K channels.
        stride, padding, dilation, groups: as in :func:`conv_scale_shift`.
        residual, activation, negative_slope, residual_last: the epilogue, see the module's documentation.
        allow_tf32: lets float32 kernels of this package round products to TF32's 11 bits.

    Returns:
        A tensor of shape (N, K, ...) and the dtype of ``input``.

    Raises:
        RuntimeError: an argument that does not fit.
        TypeError: an argument that is no tensor where one is expected.
    """
    required = input, conv_weight, running_mean, running_var
    way = way_of("conv_bn_scale", _CONV_BN, required, (conv_bias, weight, bias, residual))
    bn = running_mean, running_var, weight, bias, scaling_factor, eps
    window = _window(stride, padding, dilation, groups)
    epilogue = residual, activation, negative_slope, residual_last
    try:
        if way == RAW:
            named = keywords(*epilogue, allow_tf32)
            return _ops.conv_bn_scale.default(input, conv_weight, conv_bias, *bn, *window, **named)
        if way == GRAD and not require_grad(running_mean, running_var):
            return autograd.bn_scale(input, conv_weight, conv_bias, bn, window, epilogue, allow_tf32)
    except RuntimeError as error:
        go_on_behind(error)
    reference.check_activation("conv_bn_scale", activation, RuntimeError)
    return twin(reference.conv_bn_scale, input, conv_weight, conv_bias, *bn, *window, **keywords(*epilogue))


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
    """BatchNorm in training mode, times a scaling factor, and the epilogue; updates the running statistics.
    Differentiable.

    Equivalent to ``F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps) * scaling_factor``
    and the epilogue: the input is normalised by its own mean and biased variance, and the running buffers move towards
    its mean and unbiased variance by ``momentum``. The input is read twice and the result written once. An empty input
    gives an empty result and updates nothing.

    Args:
        input: 2 to 5 dimensions, channels in dimension 1, more than one element for each channel.
        running_mean, running_var: shape (C,), written to; both None to keep none.
        weight, bias: shape (C,), or None.
        scaling_factor: factor on the result of BatchNorm.
        momentum: share of the batch in the updated running statistics.
        eps: as in ``nn.BatchNorm2d``, 0 or more.
        residual, activation, negative_slope, residual_last: the epilogue, see the module's documentation.

    Returns:
        A tensor of ``input``'s shape and dtype.

    Raises:
        RuntimeError: an argument that does not fit. Nothing is updated then.
        TypeError: an argument that is no tensor where one is expected.
    """
    way = way_of("bn_scale_train", _TRAIN, (input,), (weight, bias, residual, running_mean, running_var))
    bn = running_mean, running_var, weight, bias, scaling_factor, momentum, eps
    epilogue = residual, activation, negative_slope, residual_last
    try:
        if way == RAW:
            if _is_compiling():
                return autograd.functional_train(input, None, None, *bn, **keywords(*epilogue))
            y = _ops.bn_scale_train.default(input, *bn, **keywords(*epilogue))
            written(running_mean, running_var)
            return y
        if way == GRAD and not require_grad(running_mean, running_var):
            y = autograd.bn_scale_train(input, None, None, bn, NO_WINDOW, epilogue)
            written(running_mean, running_var)
            return y
    except RuntimeError as error:
        go_on_behind(error)
    reference.check_activation("bn_scale_train", activation, RuntimeError)
    return twin(reference.bn_scale_train, input, *bn, **keywords(*epilogue))


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
    allow_tf32: bool = False,
) -> Tensor:
    """A convolution, then :func:`bn_scale_train` of its result. Differentiable.

    Equivalent to::

        y = F.conv2d(input, conv_weight, conv_bias, stride, padding, dilation, groups)
        y = F.batch_norm(y, running_mean, running_var, weight, bias, True, momentum, eps) * scaling_factor
        activation(y + residual)

    and with ``F.conv1d`` or ``F.conv3d`` for inputs of 3 or 5 dimensions. The batch's mean takes the convolution's bias
    away again, so that it is added to the running mean alone, and its gradient is zero. What computes the convolution
    is chosen as in :func:`conv_scale_shift`; memory format, autocast, ``allow_tf32`` and :func:`use_algorithm` are as
    there.

    Args:
        input: (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        conv_weight: (K, C / groups, and the kernel's extents), in the dtype of ``input``.
        conv_bias: shape (K,), or None.
        running_mean, running_var, weight, bias, scaling_factor, momentum, eps: as in :func:`bn_scale_train`, for K
            channels.
        stride, padding, dilation, groups: as in ``F.conv2d``.
        residual, activation, negative_slope, residual_last: the epilogue, see the module's documentation.
        allow_tf32: lets float32 kernels of this package round products to TF32's 11 bits.

    Returns:
        A tensor of shape (N, K, ...) and the dtype of ``input``.

    Raises:
        RuntimeError: an argument that does not fit. Nothing is updated then.
        TypeError: an argument that is no tensor where one is expected.
    """
    optional = conv_bias, weight, bias, residual, running_mean, running_var
    way = way_of("conv_bn_scale_train", _CONV_TRAIN, (input, conv_weight), optional)
    bn = running_mean, running_var, weight, bias, scaling_factor, momentum, eps
    window = _window(stride, padding, dilation, groups)
    epilogue = residual, activation, negative_slope, residual_last
    try:
        if way == RAW:
            named = keywords(*epilogue, allow_tf32)
            if _is_compiling():
                return autograd.functional_train(input, conv_weight, conv_bias, *bn, window, **named)
            y = _ops.conv_bn_scale_train.default(input, conv_weight, conv_bias, *bn, *window, **named)
            written(running_mean, running_var)
            return y
        if way == GRAD and not require_grad(running_mean, running_var):
            y = autograd.bn_scale_train(input, conv_weight, conv_bias, bn, window, epilogue, allow_tf32)
            written(running_mean, running_var)
            return y
    except RuntimeError as error:
        go_on_behind(error)
    reference.check_activation("conv_bn_scale_train", activation, RuntimeError)
    return twin(reference.conv_bn_scale_train, input, conv_weight, conv_bias, *bn, *window, **keywords(*epilogue))
