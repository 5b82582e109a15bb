"""Drop-in modules: the fused ops, with gradients, and PyTorch's own where those may not run.

A row each of what :mod:`fused_conv_bn._block` implements: which of :data:`conditions.PAIRS` a class stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._block import BehindTheLayer, BnScaleModule, InOneOp
from ._scriptable import ScriptableLinear, ScriptableTransposed
from .conditions import PAIRS


class ConvBnScale1d(InOneOp):
    """``nn.Conv1d``, then ``nn.BatchNorm1d`` and the rest of :class:`ConvBnScale2d`, for inputs (N, C, L).

    Arguments, parameters, ``state_dict`` keys, results and errors are as there, of the layers for one dimension of
    space. What PyTorch's layers make of an input (C, L) without a batch, they make of it themselves.
    """

    _pair = PAIRS[nn.Conv1d]


class ConvBnScale2d(InOneOp):
    """``nn.Conv2d``, then ``nn.BatchNorm2d``, then a factor, and optionally a residual and an activation.

    Equivalent to::

        y = activation(bn(conv(x)) * scaling_factor + residual)

    with ``self.conv``, ``self.bn`` and ``self.scaling_factor`` as a model would define them: same parameters, same
    random draws in the constructor, same ``state_dict`` keys, same results in training and evaluation.

    In evaluation mode all of it is one :func:`fused_conv_bn.conv_bn_scale`, in training mode one
    :func:`fused_conv_bn.conv_bn_scale_train`: batch statistics, with the running ones and ``num_batches_tracked``
    updated as ``nn.BatchNorm2d`` does. Where a gradient is needed the same ops run forward, and PyTorch's formulas
    backward. The module keeps nothing between calls: BatchNorm is folded inside of the op, from what the parameters are
    at that moment.

    PyTorch's own ops run where :func:`fused_conv_bn.conditions.why_not` says so: with hooks on ``conv`` or ``bn``, with
    a ``conv`` or ``bn`` of another class, for tensor subclasses, under transforms of torch.func, and while a program is
    traced or exported (but see :func:`fused_conv_bn.export_ops`).

    Args:
        in_channels, out_channels, kernel_size: as in ``nn.Conv2d``.
        scaling_factor: a float or a tensor of no dimensions, which may require a gradient.
        stride, padding, dilation, groups, bias, padding_mode: as in ``nn.Conv2d``.
        eps, momentum, affine, track_running_stats: as in ``nn.BatchNorm2d``.
        activation: ``"none"``, ``"relu"``, ``"relu6"``, ``"silu"``, ``"hardswish"``, ``"gelu"``, ``"gelu_tanh"``,
            ``"leaky_relu"``, ``"sigmoid"``, ``"hardsigmoid"``, ``"mish"`` or ``"tanh"``; or PyTorch's module or
            function for one of them.
        device, dtype: of the parameters.
        negative_slope: of ``leaky_relu``.
        residual_last: ``activation(bn(conv(x)) * scaling_factor) + residual`` instead.

    Raises:
        ValueError: an unknown activation, or a ``scaling_factor`` tensor with dimensions.
        TypeError: a ``scaling_factor`` that is no number and no tensor, or a ``negative_slope`` that is no number.
    """

    _pair = PAIRS[nn.Conv2d]


class ConvBnScale3d(InOneOp):
    """``nn.Conv3d``, then ``nn.BatchNorm3d`` and the rest of :class:`ConvBnScale2d`, for inputs (N, C, D, H, W).

    Arguments, parameters, ``state_dict`` keys, results and errors are as there, of the layers for three dimensions of
    space. ``torch.channels_last_3d`` is kept without a copy.
    """

    _pair = PAIRS[nn.Conv3d]


class _ConvTransposeBnScale(BehindTheLayer):
    _scriptable = ScriptableTransposed
    conv: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        scaling_factor: float | Tensor = 1.0,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: Literal["zeros"] = "zeros",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str | nn.Module | Callable[..., Tensor] = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        negative_slope: float = 0.01,
        residual_last: bool = False,
    ) -> None:
        super().__init__()
        conv = self._pair.layer(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            groups=groups,
            bias=bias,
            dilation=dilation,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        bn = self._pair.norm(out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._adopt(type(self).__name__, conv, bn, scaling_factor, activation, negative_slope, residual_last)

    def forward(self, x: Tensor, residual: Tensor | None = None, output_size: list[int] | None = None) -> Tensor:
        """``x``: (N, in_channels, ...). ``residual``: of the result's shape and dtype. ``output_size``: as the layer's
        ``forward`` takes it."""
        return self._forward(x, residual) if output_size is None else self._forward(x, residual, output_size)

    def _forward_plain(self, x: Tensor, residual: Tensor | None, *rest: Any) -> Tensor:
        size: Any = residual
        if isinstance(size, (list, tuple)) and all(type(n) is int for n in size):  # the layer's second argument
            raise TypeError(
                f"{type(self).__name__}: residual is {size!r}, of type {type(size).__name__}, expected a tensor or "
                f"None: an output size is passed as output_size={size!r}"
            )
        return super()._forward_plain(x, residual, *rest)


class ConvTransposeBnScale1d(_ConvTransposeBnScale):
    """``nn.ConvTranspose1d``, then ``nn.BatchNorm1d`` and the rest of :class:`ConvTransposeBnScale2d`.

    Arguments, parameters, ``state_dict`` keys, results and errors are as there, for inputs (N, C, L).
    """

    _pair = PAIRS[nn.ConvTranspose1d]


class ConvTransposeBnScale2d(_ConvTransposeBnScale):
    """``nn.ConvTranspose2d``, then ``nn.BatchNorm2d``, then a factor, and optionally a residual and an activation.

    Equivalent to::

        y = activation(bn(conv(x, output_size)) * scaling_factor + residual)

    with ``self.conv``, ``self.bn`` and ``self.scaling_factor``: same parameters, random draws, ``state_dict`` keys and
    results. The transposed convolution is PyTorch's, and all that follows is one :func:`fused_conv_bn.bn_scale` of its
    result, in training mode one :func:`fused_conv_bn.bn_scale_train`. Gradients, what is kept between calls (nothing)
    and when PyTorch's own ops run are as with :class:`ConvBnScale2d`.

    Args:
        in_channels, out_channels, kernel_size: as in ``nn.ConvTranspose2d``.
        scaling_factor: a float or a tensor of no dimensions, which may require a gradient.
        stride, padding, output_padding, groups, bias, dilation, padding_mode: as in ``nn.ConvTranspose2d``.
        eps, momentum, affine, track_running_stats: as in ``nn.BatchNorm2d``.
        activation, device, dtype, negative_slope, residual_last: as in :class:`ConvBnScale2d`.

    Input and result are (N, C, H, W), float32, float16, bfloat16 or float64, contiguous or channels_last.

    Raises:
        ValueError, TypeError: as :class:`ConvBnScale2d` does. What the layers refuse they refuse in their own words.
    """

    _pair = PAIRS[nn.ConvTranspose2d]


class ConvTransposeBnScale3d(_ConvTransposeBnScale):
    """``nn.ConvTranspose3d``, then ``nn.BatchNorm3d`` and the rest of :class:`ConvTransposeBnScale2d`.

    Arguments, parameters, ``state_dict`` keys, results and errors are as there, for inputs (N, C, D, H, W).
    """

    _pair = PAIRS[nn.ConvTranspose3d]


class LinearBnScale(BehindTheLayer):
    """``nn.Linear``, then ``nn.BatchNorm1d``, then a factor, and optionally a residual and an activation.

    Equivalent to::

        y = activation(bn(linear(x)) * scaling_factor + residual)

    with ``self.linear``, ``self.bn`` and ``self.scaling_factor``: same parameters, random draws, ``state_dict`` keys
    and results. The product is PyTorch's, and all that follows is one :func:`fused_conv_bn.bn_scale` of its result, in
    training mode one :func:`fused_conv_bn.bn_scale_train`. Gradients, what is kept between calls (nothing) and when
    PyTorch's own ops run are as with :class:`ConvBnScale2d`.

    ``x`` is (N, in_features), or (N, L, in_features). ``nn.BatchNorm1d`` normalises dimension 1 of what it gets: the
    features of (N, out_features), and L of (N, L, out_features). The latter takes a ``bn`` of L features, which
    :meth:`from_modules` accepts; the constructor's has ``out_features``.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        scaling_factor: a float or a tensor of no dimensions, which may require a gradient.
        eps, momentum, affine, track_running_stats: as in ``nn.BatchNorm1d``.
        activation, device, dtype, negative_slope, residual_last: as in :class:`ConvBnScale2d`.

    Raises:
        ValueError, TypeError: as :class:`ConvBnScale2d` does. What the layers refuse they refuse in their own words.
    """

    _pair = PAIRS[nn.Linear]
    _scriptable = ScriptableLinear
    linear: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scaling_factor: float | Tensor = 1.0,
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str | nn.Module | Callable[..., Tensor] = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        negative_slope: float = 0.01,
        residual_last: bool = False,
    ) -> None:
        super().__init__()
        linear = self._pair.layer(in_features, out_features, bias=bias, device=device, dtype=dtype)
        bn = self._pair.norm(out_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._adopt(type(self).__name__, linear, bn, scaling_factor, activation, negative_slope, residual_last)

    @classmethod
    def from_modules(  # of another name, which callers may use
        cls,
        linear: Any,
        bn: Any,
        scaling_factor: float | Tensor = 1.0,
        activation: str | nn.Module | Callable[..., Tensor] = "none",
        *,
        negative_slope: float = 0.01,
        residual_last: bool = False,
    ) -> LinearBnScale:
        """Wraps existing modules; they are used, not copied. The training mode is that of ``bn``.

        Raises:
            ValueError: as the constructor does.
            TypeError: as the constructor does, or if ``linear`` is no ``nn.Linear`` or ``bn`` no ``nn.BatchNorm1d``.
        """
        return super().from_modules(
            linear, bn, scaling_factor, activation, negative_slope=negative_slope, residual_last=residual_last
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x``: (N, in_features) or (N, L, in_features). ``residual``: of the result's shape and dtype."""
        return self._forward(x, residual)


CONV_MODULES: dict[type[nn.Module], type[BnScaleModule]] = {
    nn.Conv1d: ConvBnScale1d,
    nn.Conv2d: ConvBnScale2d,
    nn.Conv3d: ConvBnScale3d,
}
"""By the convolution's class: those whose op computes the convolution too."""
