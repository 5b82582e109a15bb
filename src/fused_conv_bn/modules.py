"""Drop-in modules: the fused ops, with gradients, and PyTorch's own where those may not run."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from . import _activations, _sync, autograd, conditions, ops
from ._conv import allows_tf32, autocast_dtype
from ._dispatch import check_tensor, keywords
from .conditions import PLAIN_TENSORS, Operands, operands, why_refused
from .reference import ACTIVATIONS, activate, check_activation, convolution

_ops = torch.ops.fused_conv_bn
# As torch.compile knows them, and as they are called quickest.
_eval_op = _ops.conv_bn_scale.default
_eval_call, _train_call = _eval_op._op, _ops.conv_bn_scale_train.default._op
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
    "silu": lambda x: F.silu(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "sigmoid": torch.sigmoid_,
    "hardsigmoid": lambda x: F.hardsigmoid(x, inplace=True),
    "mish": lambda x: F.mish(x, inplace=True),
    "tanh": torch.tanh_,
}


class ConvBnScale2d(nn.Module):
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

    negative_slope: float = 0.01
    residual_last: bool = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        scaling_factor: float | Tensor = 1.0,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
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
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._adopt("ConvBnScale2d", conv, bn, scaling_factor, activation, negative_slope, residual_last)

    @classmethod
    def from_modules(
        cls,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d,
        scaling_factor: float | Tensor = 1.0,
        activation: str | nn.Module | Callable[..., Tensor] = "none",
        *,
        negative_slope: float = 0.01,
        residual_last: bool = False,
    ) -> ConvBnScale2d:
        """Wraps existing modules; they are used, not copied. The training mode is that of ``bn``.

        Raises:
            ValueError: as the constructor does, or if ``bn`` has another number of channels than ``conv`` puts out.
            TypeError: as the constructor does, or if ``conv`` is no ``nn.Conv2d`` or ``bn`` no ``nn.BatchNorm2d``.
        """
        _check_modules(conv, bn)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt("from_modules", conv, bn, scaling_factor, activation, negative_slope, residual_last)
        self.training = bn.training
        return self

    def _adopt(
        self,
        op: str,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d,
        scaling_factor: float | Tensor,
        activation: Any,
        negative_slope: Any,
        residual_last: bool,
    ) -> None:
        _check_scaling_factor(op, scaling_factor)
        found = _activations.named(activation)
        if found is None:
            known = ", ".join(repr(name) for name in ACTIVATIONS)
            raise ValueError(
                f"{op}: activation is {activation!r}, expected one of {known}, or PyTorch's module or function for one"
            )
        self.conv = conv
        self.bn = bn
        self.scaling_factor = scaling_factor
        if not isinstance(negative_slope, numbers.Real):
            raise TypeError(
                f"{op}: negative_slope is {negative_slope!r}, of type {type(negative_slope).__name__}, expected a float"
            )
        self.activation, slope = found
        self.negative_slope = float(negative_slope if slope is None else slope)
        self.residual_last = bool(residual_last)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x``: (N, in_channels, H, W). ``residual``: of the result's shape and dtype."""
        modules: dict[str, Any] = self._modules
        conv, bn = modules["conv"], modules["bn"]
        found = operands(conv, bn, x, residual)
        if isinstance(found, str) or x is None:
            if found is conditions.DTENSORS:
                return _forward_dtensors(self, x, residual)
            return self._forward_plain(x, residual)
        weight, conv_bias, mean, var, bn_weight, bn_bias = found
        factor = self.scaling_factor
        # What most calls are: with nothing to prepare.
        if (
            type(factor) is float
            and mean is not None
            and var is not None
            and conv.padding_mode == "zeros"
            and type(conv.padding) is tuple
            and not _is_compiling()
            and (residual is None or not _is_any_autocast_enabled())
        ):
            grad = _is_grad_enabled() and (
                x.requires_grad
                or weight.requires_grad
                or (conv_bias is not None and conv_bias.requires_grad)
                or (bn_weight is not None and bn_weight.requires_grad)
                or (bn_bias is not None and bn_bias.requires_grad)
                or mean.requires_grad
                or var.requires_grad
                or (residual is not None and residual.requires_grad)
            )
            if grad and (mean.requires_grad or var.requires_grad):
                return self._forward_plain(x, residual)
            try:
                if bn.training:
                    window = conv.stride, conv.padding, conv.dilation, conv.groups
                    return self._train(
                        bn, x, weight, conv_bias, mean, var, bn_weight, bn_bias, factor, window, residual, grad
                    )
                if grad:
                    return autograd.bn_scale(
                        x,
                        weight,
                        conv_bias,
                        (mean, var, bn_weight, bn_bias, factor, bn.eps),
                        (conv.stride, conv.padding, conv.dilation, conv.groups),
                        (residual, self.activation, self.negative_slope, self.residual_last),
                        allows_tf32(x, weight),
                    )
                return _eval_call(
                    x,
                    weight,
                    conv_bias,
                    mean,
                    var,
                    bn_weight,
                    bn_bias,
                    factor,
                    bn.eps,
                    conv.stride,
                    conv.padding,
                    conv.dilation,
                    conv.groups,
                    **keywords(
                        residual, self.activation, self.negative_slope, self.residual_last, allows_tf32(x, weight)
                    ),
                )
            except RuntimeError:
                # The op refuses before it writes anything. What PyTorch's ops take, or refuse in words of their own,
                # is theirs.
                if self._refused(x, conv.padding, residual, found, x.dtype) is None:
                    raise
                return self._forward_plain(x, residual)
        return self._forward_fused(x, residual, conv, bn, found)

    def _forward_fused(
        self, x: Tensor, residual: Tensor | None, conv: nn.Conv2d, bn: nn.BatchNorm2d, found: Operands
    ) -> Tensor:
        """Any call of the fused ops: of any factor and padding, without statistics, under torch.compile."""
        factor: Any = self.scaling_factor
        weight, conv_bias, mean, var, bn_weight, bn_bias = found
        compiling = _is_compiling()
        exporting = compiling and conditions.exports_ops()
        if isinstance(factor, Tensor):
            if factor.dim() != 0 or factor.is_complex() or not (exporting or type(factor) in PLAIN_TENSORS):
                return self._forward_plain(x, residual)
        elif not isinstance(factor, (float, int)):
            return self._forward_plain(x, residual)
        if mean is not None and var is not None and (mean.requires_grad or var.requires_grad):
            return self._forward_plain(x, residual)
        padded: Tensor = x
        padding: Any = conv.padding
        if conv.padding_mode != "zeros" or isinstance(padding, str):
            padded, padding = self._padded(x, conv, weight)
        dtype = autocast_dtype(x) if _is_any_autocast_enabled() else x.dtype
        if residual is not None and residual.dtype != dtype:  # PyTorch's ops promote
            return self._forward_plain(x, residual)
        if compiling and self._refused(padded, padding, residual, found, dtype) is not None:
            return self._forward_plain(x, residual)
        try:
            number = 1.0
            if isinstance(factor, Tensor):
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                if bn_weight is None:
                    bn_weight = torch.ones(weight.size(0), dtype=wide, device=weight.device)
                bn_weight = bn_weight.to(wide) * factor
                bn_bias = None if bn_bias is None else bn_bias.to(wide) * factor
            else:
                number = float(factor)
            grad = (
                _is_grad_enabled()
                and not exporting
                and (
                    x.requires_grad
                    or weight.requires_grad
                    or (conv_bias is not None and conv_bias.requires_grad)
                    or (bn_weight is not None and bn_weight.requires_grad)
                    or (bn_bias is not None and bn_bias.requires_grad)
                    or (residual is not None and residual.requires_grad)
                )
            )
            window = conv.stride, padding, conv.dilation, conv.groups
            if bn.training or mean is None:
                return self._train(
                    bn, padded, weight, conv_bias, mean, var, bn_weight, bn_bias, number, window, residual, grad
                )
            epilogue = residual, self.activation, self.negative_slope, self.residual_last
            batch_norm = mean, var, bn_weight, bn_bias, number, bn.eps
            if grad:
                return autograd.bn_scale(padded, weight, conv_bias, batch_norm, window, epilogue)  # type: ignore[arg-type]
            return _eval_op(padded, weight, conv_bias, *batch_norm, *window, **keywords(*epilogue))
        except RuntimeError:
            if compiling or self._refused(padded, padding, residual, found, dtype) is None:
                raise
        return self._forward_plain(x, residual)

    def _train(
        self,
        bn: nn.BatchNorm2d,
        x: Tensor,
        weight: Tensor,
        conv_bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        factor: float,
        window: tuple[Any, ...],
        residual: Tensor | None,
        grad: bool,
    ) -> Tensor:
        # As nn.BatchNorm2d does: buffers that are there but not tracked are left alone.
        batches: Tensor | None = None
        if bn.training and bn.track_running_stats:
            batches = bn._buffers.get("num_batches_tracked")
        else:
            mean = var = None
        momentum = bn.momentum
        if momentum is None:
            momentum = 0.0 if batches is None else 1.0 / (float(batches) + 1.0)
        batch_norm = mean, var, bn_weight, bn_bias, factor, momentum, bn.eps
        epilogue = residual, self.activation, self.negative_slope, self.residual_last
        # Counted first, as nn.BatchNorm2d does: what is no error may end the call behind the op, such as a checkpoint
        # that has all it recomputes for.
        if batches is not None:
            batches.add_(1)
        try:
            group = conditions.sync_group(bn)
            if group is not None:
                z = convolution(x, weight, conv_bias, *window)
                return _sync.bn_scale_train(z, batch_norm, epilogue, group)
            if conditions.dtensor is not None and isinstance(x, conditions.dtensor):
                return ops.conv_bn_scale_train(x, weight, conv_bias, *batch_norm, *window, **keywords(*epilogue))
            if grad:
                return autograd.bn_scale_train(x, weight, conv_bias, batch_norm, window, epilogue)
            if _is_compiling():
                return autograd.functional_train(x, weight, conv_bias, *batch_norm, window, **keywords(*epilogue))
            y: Tensor = _train_call(x, weight, conv_bias, *batch_norm, *window, **keywords(*epilogue))
        except RuntimeError:  # the op refused, and whoever runs in its place counts
            if batches is not None:
                batches.sub_(1)
            raise
        if mean is not None and var is not None:
            increment_version((mean, var))
        return y

    def _padded(self, x: Tensor, conv: nn.Conv2d, weight: Tensor) -> tuple[Tensor, Sequence[int]]:
        """The input and what is left to pad it with, as ``nn.Conv2d`` does: zeros on both sides alike."""
        if conv.padding_mode != "zeros":
            return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), (0, 0)
        if not isinstance(conv.padding, str):
            return x, conv.padding
        if conv.padding == "valid":
            return x, (0, 0)
        height, width = (d * (k - 1) for d, k in zip(conv.dilation, weight.shape[2:], strict=True))
        if height % 2 == 0 and width % 2 == 0:
            return x, (height // 2, width // 2)
        return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)), (0, 0)

    def _refused(
        self, x: Tensor, padding: Sequence[int], residual: Tensor | None, found: Operands, dtype: torch.dtype
    ) -> str | None:
        conv, bn = self.conv, self.bn
        if _is_any_autocast_enabled():
            dtype = autocast_dtype(x)
            if autocast_dtype(found[0]) != dtype:
                return "autocast leaves the input and the weight of different dtypes"
        elif found[0].dtype != dtype:
            return "the input and the weight are of different dtypes"
        takes_batch_statistics = bn.training or found[2] is None
        window = conv.stride, padding, conv.dilation, conv.groups
        return why_refused(x, found, residual, *window, dtype, takes_batch_statistics)

    def _forward_plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if not (type(residual) in PLAIN_TENSORS or hasattr(type(residual), "__torch_function__")):
            check_tensor("ConvBnScale2d", "residual", residual, may_be_none=True)  # x is PyTorch's to refuse
        factor = self.scaling_factor
        y = self.bn(self.conv(x))
        own = self._bn_is_plain()  # whether nobody else has y
        if isinstance(factor, Tensor) or factor != 1.0:
            y, own = y * factor, True
        if residual is not None and not self.residual_last:
            y, own = y + residual, True
        y = self._activated(y, own)
        if residual is not None and self.residual_last:
            y = y + residual
        return y

    def _bn_is_plain(self) -> bool:
        """Whether a call of ``bn`` is PyTorch's own, which keeps nothing of the tensor that it returns."""
        bn = self.bn
        if type(bn) is not nn.BatchNorm2d or _is_compiling():
            return False
        return not (conditions.is_watched(bn) or conditions.hooks_for_all() or conditions.methods_replaced())

    def _activated(self, y: Tensor, own: bool) -> Tensor:
        activation = self.activation
        if (
            own
            and activation in _IN_PLACE
            and type(y) is Tensor
            and not _is_compiling()
            and not conditions.transformed()
            and torch._C._get_tracing_state() is None
            and (activation == "relu" or not y.requires_grad)
        ):
            return _IN_PLACE[activation](y)
        return activate(y, activation, self.negative_slope)

    # ---- copies and other forms ------------------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What was pickled before this version may carry folded tensors, and has no slope.
        kept = {name: value for name, value in state.items() if name not in ("_folded", "_prepared")}
        super().__setstate__(kept)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles: the same modules under the same names, and PyTorch's own ops."""
        return _Scriptable(self)

    def extra_repr(self) -> str:
        text = f"scaling_factor={self.scaling_factor}"
        if self.activation != "none":
            text += f", activation={self.activation}"
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        return f"{text}, residual_last=True" if self.residual_last else text


def _forward_dtensors(module: ConvBnScale2d, x: Tensor, residual: Tensor | None) -> Tensor:
    """Each process computes its part, as :func:`.conv_bn_scale` does it, where nothing is to be prepared.

    PyTorch's own convolution is wrong where the weight is distributed.
    """
    conv, bn, factor = module.conv, module.bn, module.scaling_factor
    mean, var = bn.running_mean, bn.running_var
    has_zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    adds = residual is None or residual.dtype == x.dtype
    if type(factor) is not float or not has_zeros or not adds or conditions.sync_group(bn) or _is_compiling():
        return module._forward_plain(x, residual)
    window: Any = (conv.stride, conv.padding, conv.dilation, conv.groups)
    convolution = conv.weight, conv.bias
    if bn.training or mean is None or var is None:
        return module._train(bn, x, *convolution, mean, var, bn.weight, bn.bias, factor, window, residual, False)
    epilogue = residual, module.activation, module.negative_slope, module.residual_last
    named = keywords(*epilogue, allows_tf32(x, conv.weight))
    return ops.conv_bn_scale(x, *convolution, mean, var, bn.weight, bn.bias, factor, bn.eps, *window, **named)


class _Scriptable(nn.Module):
    """ConvBnScale2d in the subset of Python that TorchScript knows."""

    def __init__(self, module: ConvBnScale2d) -> None:
        super().__init__()
        check_activation("ConvBnScale2d", module.activation)
        self.conv = module.conv
        self.bn = module.bn
        self.scaling_factor = module.scaling_factor
        self.activation = _activations.module(module.activation, module.negative_slope)
        self.residual_last = module.residual_last
        self.training = module.training

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x)) * self.scaling_factor
        if residual is not None and not self.residual_last:
            y = y + residual
        y = self.activation(y)
        if residual is not None and self.residual_last:
            y = y + residual
        return y


def _check_scaling_factor(op: str, factor: Any) -> None:
    if isinstance(factor, Tensor):
        if factor.dim() != 0:
            raise ValueError(
                f"{op}: scaling_factor has shape {list(factor.shape)}, expected a float or a tensor of no dimensions"
            )
    elif isinstance(factor, nn.Module):
        raise TypeError(
            f"{op}: scaling_factor is a module, {type(factor).__name__}, expected a float or a tensor of no "
            f"dimensions: an activation is passed as activation="
        )
    elif not isinstance(factor, numbers.Real):
        raise TypeError(
            f"{op}: scaling_factor is {factor!r}, of type {type(factor).__name__}, expected a float or a tensor of no "
            f"dimensions"
        )


def _check_modules(conv: Any, bn: Any) -> None:
    bn_classes = nn.BatchNorm2d, nn.SyncBatchNorm, nn.LazyBatchNorm2d
    if isinstance(conv, bn_classes) and isinstance(bn, nn.Conv2d):
        raise TypeError("from_modules: conv is the BatchNorm and bn the convolution, expected conv first")
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"from_modules: conv is of type {type(conv).__name__}, expected an nn.Conv2d")
    if not isinstance(bn, bn_classes):
        raise TypeError(f"from_modules: bn is of type {type(bn).__name__}, expected an nn.BatchNorm2d")
    if isinstance(bn, nn.LazyBatchNorm2d) and bn.has_uninitialized_params():
        return  # its channels come with the first input
    if conv.out_channels != bn.num_features:
        raise ValueError(
            f"from_modules: bn has {bn.num_features} features, expected {conv.out_channels}, conv's out_channels"
        )
