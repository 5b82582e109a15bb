"""A convolution's arguments: how autocast casts them, and its gradients by PyTorch's formulas."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._memory import is_pytorchs

_aten = torch.ops.aten
_conv_scale_shift = torch.ops.fused_conv_bn.conv_scale_shift.default
_is_compiling = torch.compiler.is_compiling
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_precision = torch._C._get_fp32_precision_getter

Window: TypeAlias = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""stride, padding, dilation, groups."""

NO_WINDOW: Window = (), (), (), 1

AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
_nothing = contextlib.nullcontext()


def without_autocast() -> contextlib.AbstractContextManager[Any]:
    """Autocast off for what runs inside. What is to be cast was cast outside."""
    if not _is_any_autocast_enabled() or _is_compiling():
        return _nothing
    return torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives to a tensor that takes part in a convolution."""
    device = x.device.type
    if x.dtype == torch.float64 or not x.is_floating_point() or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def as_autocast(*tensors: Tensor | None) -> Sequence[Tensor | None]:
    """The tensors as autocast would cast a convolution's, differentiably."""
    if not _is_any_autocast_enabled():
        return tensors
    return [None if t is None else t.to(autocast_dtype(t)) for t in tensors]


def allows_tf32(input: Tensor, weight: Tensor) -> bool:
    """Whether a convolution may round float32 to TF32: PyTorch's flag allows it, and eager's own does it.

    Eager's of few channels need not, whatever the flag says. (The older flag raises once the newer one was set.)
    """
    return input.dtype is torch.float32 and input.is_cuda and weight.shape[1] > 16 and tf32_is_on()


def tf32_is_on() -> bool:
    return bool(_precision("cuda", "conv") == "tf32" and torch._C._get_cudnn_enabled())


def keeps_result(input: Tensor, weight: Tensor, groups: int, backward_needs_it: bool) -> bool:
    """Whether forward keeps the convolution's result for backward, as eager does; else backward convolves again.

    Where the convolution's own arguments need no gradient, eager keeps its result alone, and not what it is made of.
    On the CPU convolving again takes longer than keeping saves: steps took up to 1.4 times eager's time with it.
    """
    if not (weight.requires_grad or input.requires_grad):
        return True
    if input.is_cuda:
        return weight.shape[1] > 16
    if backward_needs_it:
        return True
    return groups != 1 or weight.numel() > 75 * weight.shape[0]


def convolution_again(input: Tensor, weight: Tensor, window: Window, allow_tf32: bool) -> Tensor:
    """The convolution's result, without its bias."""
    if _is_compiling():  # an op with a derivative, for whoever differentiates the compiled graph again
        return torch.convolution(input, weight, None, *_arguments(input, window))
    try:
        return _conv_scale_shift(input, weight, None, None, *window, allow_tf32=allow_tf32)
    except RuntimeError as error:
        if not is_pytorchs(error):
            raise
    return torch.convolution(input, weight, None, *_arguments(input, window))


def _arguments(input: Tensor, window: Window) -> tuple[Any, ...]:
    """What ``aten::convolution`` takes after the bias."""
    stride, padding, dilation, groups = window
    space = input.dim() - 2
    stride, padding, dilation = (list(v) * space if len(v) == 1 else list(v) for v in (stride, padding, dilation))
    return stride, padding, dilation, False, [0] * space, groups


def convolution_backward(
    dz: Tensor, input: Tensor, weight: Tensor, window: Window, needs_input: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    stride, padding, dilation, transposed, output_padding, groups = _arguments(input, window)
    dx, dw, _ = _aten.convolution_backward(
        dz,
        input,
        weight,
        None,
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
        [needs_input, needs_weight, False],
    )
    return (dx if needs_input else None), (dw if needs_weight else None)


# ---- the gradient of a weight from the gradient of the output --------------------------------------------------------


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _patch_units(weight: Tensor) -> int:
    """Of 8 values, in which the kernels have a pixel's patch: unit_layout() of the CUDA library."""
    channels, rows, cols = weight.shape[1:]
    slots: int = min(8, 1 << (channels - 1).bit_length())
    units: int = -(-channels // 8) * rows * -(-cols // (8 // slots))
    return units


def covers_weight_pass(dy: Tensor, input: Tensor, weight: Tensor, window: Window) -> bool:
    """Whether the op ``_conv_bn_wgrad`` takes a convolution: WgradStemSm80::supports() of the CUDA library."""
    if not input.is_cuda or input.dim() != 4 or input.dtype == torch.float64 or _capability(input.get_device())[0] < 8:
        return False
    stride, _, dilation, groups = window
    channels, rows, cols = weight.shape[1:]
    window_size = -(-channels // 8) * 8 * ((rows - 1) * dilation[0] + 1)
    window_size *= (cols - 1) * dilation[-1] + 16 * stride[-1]
    most = 1 << 30
    return (
        groups == 1
        and channels <= 16
        and rows * cols <= 128
        and _patch_units(weight) <= 128
        and window_size <= 2304
        and input.numel() // input.size(0) <= most
        and dy.numel() // dy.size(0) <= most
        and dy.numel() // dy.size(1) <= most
    )


def leaves_input_sums(input: Tensor, weight: Tensor) -> bool:
    """Whether the forward keeps the sums over the input that a batch's statistics may come from, for the weight pass.

    The op ``_conv_bn_scale_train_sums`` returns them: ``FromInputSm90`` of the CUDA library has few channels.
    """
    return weight.shape[1] <= 8 and input.is_cuda and weight.dim() == 4 and _is_large(input)


def _is_large(x: Tensor) -> bool:
    """Whether there are so many pixels that the weight pass has something to do on every multiprocessor."""
    return x.numel() // x.size(1) >= 100_000


def prefers_weight_pass(
    dy: Tensor, input: Tensor, weight: Tensor, window: Window, has_statistics: bool, needs_input: bool
) -> bool:
    """Whether it is faster than the convolution again and PyTorch's gradient of the weight, by measurements.

    On an H200, eleven convolutions of 1 to 16 channels in three dtypes and layouts. In evaluation always: a step takes
    0.15 to 0.81 of the other way's time. With a batch's statistics there are the sums over pairs of a patch's values,
    too. Where the forward keeps them, or without a gradient of the input for patches of up to 144 values, a step takes
    0.3 to 0.89; with one, it is for up to 64 values that none takes more than 1.01. 7x7/2 of 3 channels takes 1.5.
    """
    if not input.is_cuda or not _is_large(dy) or not covers_weight_pass(dy, input, weight, window):
        return False
    if not has_statistics:
        return True
    channels, rows, cols = weight.shape[1:]
    stride, _, dilation, _ = window
    keeps_sums = channels <= 8 and rows <= 3 and cols <= 3 and all(v == 1 for v in (*stride, *dilation))
    return _capability(input.get_device()) == (9, 0) and (
        keeps_sums or _patch_units(weight) <= (8 if needs_input else 18)
    )
