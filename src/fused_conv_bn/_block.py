"""What the modules are: a layer of PyTorch's, a BatchNorm and a factor, called as one op. modules.py has their classes.

There are two kinds. In :class:`InOneOp` an op computes the layer too, as it does with convolutions. In
:class:`BehindTheLayer` PyTorch computes it, and an op what follows.
"""

from __future__ import annotations

import inspect
import numbers
import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _activations, _sync, _together, autograd, conditions, ops
from ._conv import NO_WINDOW, Window, allows_tf32, autocast_dtype
from ._count import counted
from ._dispatch import check_tensor, keywords
from ._memory import is_pytorchs
from ._scriptable import Scriptable, ScriptableConv
from .conditions import DTENSORS, PLAIN_TENSORS, Pair, is_small_step, operands, why_norm_refused, why_refused
from .reference import ACTIVATIONS, activate, convolution

_ops = torch.ops.fused_conv_bn
# As torch.compile knows them, and as they are called quickest.
_conv_op, _bn_op = _ops.conv_bn_scale.default, _ops.bn_scale.default
_eval_call, _train_call = _conv_op._op, _ops.conv_bn_scale_train.default._op
_bn_eval_call, _bn_train_call = _bn_op._op, _ops.bn_scale_train.default._op
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_SyncBatchNorm = nn.SyncBatchNorm
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled

_Module = TypeVar("_Module", bound="BnScaleModule")

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


class BnScaleModule(nn.Module):
    """What all of them share: the parts, PyTorch's own way, and what a call of an op needs."""

    _pair: ClassVar[Pair]
    _scriptable: ClassVar[type[Scriptable]]
    bn: Any
    negative_slope: float = 0.01
    residual_last: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class that stands for a pair has methods of its own name, which Python's messages about arguments begin
        with."""
        super().__init_subclass__(**kwargs)
        for name in ("__init__", "forward", "from_modules") if "_pair" in cls.__dict__ else ():
            if name not in cls.__dict__:
                method = inspect.getattr_static(cls, name)
                own = _renamed(getattr(method, "__func__", method), f"{cls.__qualname__}.{name}", cls.__module__)
                setattr(cls, name, classmethod(own) if isinstance(method, classmethod) else own)

    @classmethod
    def from_modules(
        cls: type[_Module],
        conv: Any,
        bn: Any,
        scaling_factor: float | Tensor = 1.0,
        activation: str | nn.Module | Callable[..., Tensor] = "none",
        *,
        negative_slope: float = 0.01,
        residual_last: bool = False,
    ) -> _Module:
        """Wraps existing modules; they are used, not copied. The training mode is that of ``bn``.

        Raises:
            ValueError: as the constructor does, or if ``bn`` has another number of channels than ``conv`` puts out.
            TypeError: as the constructor does, or if ``conv`` or ``bn`` is not of the classes that this one stands for.
        """
        _check_modules(cls._pair, conv, bn)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt("from_modules", conv, bn, scaling_factor, activation, negative_slope, residual_last)
        self.training = bn.training
        return self

    def _adopt(
        self,
        op: str,
        layer: Any,
        bn: Any,
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
        setattr(self, self._pair.name, layer)
        self.bn = bn
        self.scaling_factor = scaling_factor
        if not isinstance(negative_slope, numbers.Real):
            raise TypeError(
                f"{op}: negative_slope is {negative_slope!r}, of type {type(negative_slope).__name__}, expected a float"
            )
        self.activation, slope = found
        self.negative_slope = float(negative_slope if slope is None else slope)
        self.residual_last = bool(residual_last)

    def _fused(
        self,
        x: Tensor,
        residual: Tensor | None,
        bn: Any,
        found: tuple[Tensor | None, ...],
        window: Window,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Any call of the fused ops: of any factor, without statistics, under torch.compile. None: it is PyTorch's.

        ``x``: padded already, or the layer's result, and then ``found`` begins with None twice. ``dtype``: of the
        result.
        """
        factor: Any = self.scaling_factor
        weight, conv_bias, mean, var, bn_weight, bn_bias = found
        compiling = _is_compiling()
        exporting = compiling and conditions.exports_ops()
        if isinstance(factor, Tensor):
            if factor.dim() != 0 or factor.is_complex() or not (exporting or type(factor) in PLAIN_TENSORS):
                return None
        elif not isinstance(factor, (float, int)):
            return None
        if mean is not None and var is not None and (mean.requires_grad or var.requires_grad):
            return None
        if residual is not None and residual.dtype != dtype:  # PyTorch's ops promote
            return None
        if compiling and self._refused(x, window, residual, found, dtype) is not None:
            return None
        try:
            number = 1.0
            if isinstance(factor, Tensor):
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                if bn_weight is None:
                    channels = x.size(1) if weight is None else weight.size(0)
                    bn_weight = torch.ones(channels, dtype=wide, device=x.device)
                bn_weight = bn_weight.to(wide) * factor
                bn_bias = None if bn_bias is None else bn_bias.to(wide) * factor
            else:
                number = float(factor)
            grad = (
                _is_grad_enabled()
                and not exporting
                and (
                    x.requires_grad
                    or (weight is not None and weight.requires_grad)
                    or (conv_bias is not None and conv_bias.requires_grad)
                    or (bn_weight is not None and bn_weight.requires_grad)
                    or (bn_bias is not None and bn_bias.requires_grad)
                    or (residual is not None and residual.requires_grad)
                )
            )
            if bn.training or mean is None:
                return self._train(
                    bn, x, weight, conv_bias, mean, var, bn_weight, bn_bias, number, window, residual, grad, compiling
                )
            epilogue = residual, self.activation, self.negative_slope, self.residual_last
            batch_norm: Any = mean, var, bn_weight, bn_bias, number, bn.eps
            tf32 = weight is not None and not compiling and allows_tf32(x, weight)
            if grad:
                return autograd.bn_scale(x, weight, conv_bias, batch_norm, window, epilogue, tf32)
            y: Tensor
            if weight is not None:
                y = _conv_op(x, weight, conv_bias, *batch_norm, *window, **keywords(*epilogue, tf32))
            else:
                y = (_bn_op if compiling else _bn_eval_call)(x, *batch_norm, **keywords(*epilogue))
            return y
        except RuntimeError as error:
            if compiling or not (is_pytorchs(error) or self._refused(x, window, residual, found, dtype)):
                raise
        return None

    def _refused(
        self,
        x: Tensor,
        window: Window,
        residual: Tensor | None,
        found: tuple[Any, ...],
        dtype: torch.dtype,
    ) -> str | None:
        """Why the op takes no such arguments; None if they are all as it wants them."""
        takes_batch_statistics = self.bn.training or found[2] is None
        weight = found[0]
        if weight is None:
            return why_norm_refused(x, x.shape, found, residual, dtype, takes_batch_statistics)
        if _is_any_autocast_enabled():
            dtype = autocast_dtype(x)
            if autocast_dtype(weight) != dtype:
                return "autocast leaves the input and the weight of different dtypes"
        elif weight.dtype != dtype:
            return "the input and the weight are of different dtypes"
        return why_refused(x, found, residual, *window, dtype, takes_batch_statistics)

    def _train(
        self,
        bn: Any,
        x: Tensor,
        weight: Tensor | None,
        conv_bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        factor: float,
        window: tuple[Any, ...],
        residual: Tensor | None,
        grad: bool,
        compiling: bool,
    ) -> Tensor:
        """``weight``, ``conv_bias``: of the convolution; None if ``x`` is the layer's result."""
        # As PyTorch's BatchNorm does: buffers that are there but not tracked are left alone.
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
        # Counted first, as PyTorch does: what is no error may end the call behind the op, such as a checkpoint
        # that has all it recomputes for.
        if batches is not None:
            _together.count(batches)
        try:
            group = conditions.sync_group(bn) if type(bn) is _SyncBatchNorm else None
            if group is not None:
                z = x if weight is None else convolution(x, weight, conv_bias, *window)
                return _sync.bn_scale_train(z, batch_norm, epilogue, group)
            if conditions.dtensor is not None and isinstance(x, conditions.dtensor):
                assert weight is not None
                return ops.conv_bn_scale_train(x, weight, conv_bias, *batch_norm, *window, **keywords(*epilogue))
            if grad:
                return autograd.bn_scale_train(x, weight, conv_bias, batch_norm, window, epilogue)
            if compiling:
                return autograd.functional_train(x, weight, conv_bias, *batch_norm, window, **keywords(*epilogue))
            y: Tensor
            if weight is None:
                y = _bn_train_call(x, *batch_norm, **keywords(*epilogue))
            else:
                y = _train_call(x, weight, conv_bias, *batch_norm, *window, **keywords(*epilogue))
        except RuntimeError:  # the op refused, and whoever runs in its place counts
            if batches is not None:
                _together.count_back(batches)
            raise
        # The statistics get no new version: F.batch_norm writes to them so, and a backward may have kept them.
        return y

    def _forward_plain(self, x: Tensor, residual: Tensor | None, *rest: Any) -> Tensor:
        """PyTorch's own ops. ``rest``: what the layer takes beside its input."""
        if residual is not None and not hasattr(type(residual), "__torch_function__"):
            check_tensor(type(self).__name__, "residual", residual, may_be_none=True)  # x is PyTorch's to refuse
        modules: dict[str, Any] = self._modules
        return self._epilogue_plain(modules["bn"](modules[self._pair.name](x, *rest)), residual)

    def _epilogue_plain(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """``y``: BatchNorm's result."""
        factor = self.scaling_factor
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
        bn: Any = self._modules["bn"]
        if type(bn) is not self._pair.norm or _is_compiling():
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
        return self._scriptable(self, self._pair.name)

    def extra_repr(self) -> str:
        text = f"scaling_factor={self.scaling_factor}"
        if self.activation != "none":
            text += f", activation={self.activation}"
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        return f"{text}, residual_last=True" if self.residual_last else text


class InOneOp(BnScaleModule):
    """A convolution, which the op computes as well."""

    _scriptable = ScriptableConv
    conv: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        scaling_factor: float | Tensor = 1.0,
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
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
        conv = self._pair.layer(
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
        bn = self._pair.norm(out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._adopt(type(self).__name__, conv, bn, scaling_factor, activation, negative_slope, residual_last)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x``: (N, in_channels, ...). ``residual``: of the result's shape and dtype."""
        modules: dict[str, Any] = self._modules
        conv, bn = modules["conv"], modules["bn"]
        if residual is None and is_small_step(x, conv, bn):
            return self._forward_plain(x, None)
        found = operands(self._pair, conv, bn, x, residual)
        if isinstance(found, str) or x is None:
            return self._forward_dtensors(x, residual) if found is DTENSORS else self._forward_plain(x, residual)
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
            and (residual is None or not _is_any_autocast_enabled() or residual.dtype is autocast_dtype(x))
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
                        bn, x, weight, conv_bias, mean, var, bn_weight, bn_bias, factor, window, residual, grad, False
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
            except RuntimeError as error:
                # The op refuses before it writes anything. What PyTorch's ops take, or refuse in words of their own,
                # is theirs.
                window = conv.stride, conv.padding, conv.dilation, conv.groups
                if not (is_pytorchs(error) or self._refused(x, window, residual, found, x.dtype)):
                    raise
            return self._forward_plain(x, residual)
        padded, padding = self._padded(x, conv, weight)
        dtype = autocast_dtype(x) if _is_any_autocast_enabled() else x.dtype
        y = self._fused(padded, residual, bn, found, (conv.stride, padding, conv.dilation, conv.groups), dtype)
        return self._forward_plain(x, residual) if y is None else y

    def _forward_dtensors(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Each process computes its part, as :func:`.conv_bn_scale` does it, where nothing is to be prepared.

        PyTorch's own convolution is wrong where the weight is distributed.
        """
        conv, bn, factor = self.conv, self.bn, self.scaling_factor
        mean, var = bn.running_mean, bn.running_var
        has_zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        adds = residual is None or residual.dtype == x.dtype
        if type(factor) is not float or not has_zeros or not adds or conditions.sync_group(bn) or _is_compiling():
            return self._forward_plain(x, residual)
        window: Any = (conv.stride, conv.padding, conv.dilation, conv.groups)
        of_layer = conv.weight, conv.bias
        if bn.training or mean is None or var is None:
            return self._train(bn, x, *of_layer, mean, var, bn.weight, bn.bias, factor, window, residual, False, False)
        epilogue = residual, self.activation, self.negative_slope, self.residual_last
        named = keywords(*epilogue, allows_tf32(x, conv.weight))
        return ops.conv_bn_scale(x, *of_layer, mean, var, bn.weight, bn.bias, factor, bn.eps, *window, **named)

    def _padded(self, x: Tensor, conv: Any, weight: Tensor) -> tuple[Tensor, Sequence[int]]:
        """The input and what is left to pad it with, as PyTorch's convolutions do: zeros on both sides alike."""
        padding: Any = conv.padding
        none = (0,) * (x.dim() - 2)
        if conv.padding_mode != "zeros":
            return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), none
        if not isinstance(padding, str):
            return x, padding
        if padding == "valid":
            return x, none
        total = [d * (k - 1) for d, k in zip(conv.dilation, weight.shape[2:], strict=True)]
        if all(t % 2 == 0 for t in total):
            return x, tuple(t // 2 for t in total)
        return F.pad(x, [side for t in reversed(total) for side in (t // 2, t - t // 2)]), none


class BehindTheLayer(BnScaleModule):
    """A layer that PyTorch computes, and what follows in one pass over its result."""

    def _forward(self, x: Tensor, residual: Tensor | None, *rest: Any) -> Tensor:
        """``rest``: what the layer takes beside its input."""
        modules: dict[str, Any] = self._modules
        pair = self._pair
        layer, bn = modules[pair.name], modules["bn"]
        if residual is None and is_small_step(x, layer, bn):
            return self._forward_plain(x, None, *rest)
        found = operands(pair, layer, bn, x, residual)
        if isinstance(found, str):
            return self._forward_plain(x, residual, *rest)
        z: Tensor = layer.forward(x, *rest)
        y = None
        if z.dim() in conditions.DIMENSIONS_OF_NORM[type(bn)] and not z.is_nested:
            y = self._fused(z, residual, bn, (None, None, *found[2:]), NO_WINDOW, z.dtype)
        return self._epilogue_plain(bn(z), residual) if y is None else y


def _renamed(function: Any, qualified: str, module: str) -> Any:
    """The same code, by another name."""
    own = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    own.__kwdefaults__, own.__annotations__ = function.__kwdefaults__, function.__annotations__
    own.__doc__, own.__module__, own.__qualname__ = function.__doc__, module, qualified
    return own


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
    elif isinstance(factor, bool) or not isinstance(factor, numbers.Real):  # a bool is a layer's argument for bias
        raise TypeError(
            f"{op}: scaling_factor is {factor!r}, of type {type(factor).__name__}, expected a float or a tensor of no "
            f"dimensions"
        )


def _check_modules(pair: Pair, layer: Any, bn: Any) -> None:
    name, expected = pair.name, pair.layer.__name__
    if isinstance(layer, pair.norms) and isinstance(bn, pair.layer):
        what = "convolution" if name == "conv" else f"{name} layer"
        raise TypeError(f"from_modules: {name} is the BatchNorm and bn the {what}, expected {name} first")
    if not isinstance(layer, pair.layer):
        raise TypeError(f"from_modules: {name} is of type {type(layer).__name__}, expected an nn.{expected}")
    if not isinstance(bn, pair.norms):
        raise TypeError(f"from_modules: bn is of type {type(bn).__name__}, expected an nn.{pair.norm.__name__}")
    if name == "linear" or (isinstance(bn, pair.norms[2]) and bn.has_uninitialized_params()):
        return  # a linear layer's channels are the last dimension, and BatchNorm's the second; lazy ones come later
    if layer.out_channels != bn.num_features:
        raise ValueError(
            f"from_modules: bn has {counted(bn.num_features, 'feature')}, expected {layer.out_channels}, {name}'s "
            f"out_channels"
        )
