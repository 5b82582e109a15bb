"""Drop-in modules: PyTorch's own ops where a gradient is needed, the fused ones where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _loader, ops
from ._fake import conv_output_size
from .reference import ACTIVATIONS


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward()."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def _state(tensor: Any) -> tuple[Any, ...]:
    """What changes when a tensor is replaced, written to or given other storage. Holds the tensor, so that its identity
    is not reused. Raises RuntimeError for what keeps no version (inference tensors) or no data (fake tensors)."""
    if not isinstance(tensor, Tensor):
        return (tensor,)
    if type(tensor) not in (Tensor, nn.Parameter):
        raise RuntimeError("a subclass of Tensor")
    return (tensor, tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device)


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    if len(a) != len(b):
        return False
    return all(x is y if isinstance(x, Tensor) or isinstance(y, Tensor) else x == y for x, y in zip(a, b, strict=True))


class _Folded(NamedTuple):
    """What a fold gave and what it was made of; replaced as a whole, so that threads never see parts of two."""

    key: tuple[Any, ...]
    tensors: tuple[Tensor | None, Tensor, Tensor]  # weight (None: the module's own), scale, shift
    stream: torch.cuda.Stream | None  # that the fold ran on, and its end there; None on the CPU
    done: torch.cuda.Event | None


class _Prepared(NamedTuple):
    """A call in evaluation mode: what it depends on, and what the op takes beside the input and the residual."""

    key: tuple[Any, ...]
    sources: tuple[Any, ...]  # the tensors whose identities are in the key: they are not reused meanwhile
    weight: Tensor
    scale: Tensor
    shift: Tensor
    window: tuple[Any, ...]  # stride, padding, dilation, groups


class ConvBnScale2d(nn.Module):
    """``nn.Conv2d``, then ``nn.BatchNorm2d``, then a factor, and optionally a residual and an activation.

    Equivalent to::

        y = activation(bn(conv(x)) * scaling_factor + residual)

    with ``self.conv``, ``self.bn`` and ``self.scaling_factor`` as a model would define them: same parameters, same
    random draws in the constructor, same ``state_dict`` keys, same results in training and evaluation.

    In training mode, where no gradient is needed, convolution, BN and factor are one
    :func:`fused_conv_bn.conv_bn_scale_train`: batch statistics, with the running ones and ``num_batches_tracked``
    updated as ``nn.BatchNorm2d`` does, also for ``momentum=None`` and ``track_running_stats=False``. (An
    ``nn.SyncBatchNorm`` runs as it is there: its statistics are those of all processes.)

    In evaluation mode, where no gradient is needed, all of it is one :func:`fused_conv_bn.conv_scale_shift`. BN, factor
    and bias are folded into a scale and a shift per channel once, on the CPU also into the weight, and kept until one
    of them changes: assigned or written to in place, loaded, moved or cast; also every ``train()`` or ``eval()`` drops
    them. (A write through ``tensor.data`` is invisible to PyTorch; call ``eval()`` after one.) Where a gradient is
    needed, with hooks on ``conv`` or ``bn``, with a ``conv`` or ``bn`` of another class, or with a ``bn`` in evaluation
    mode in a module in training mode, PyTorch's ops run.

    Args:
        in_channels, out_channels, kernel_size: as in ``nn.Conv2d``.
        scaling_factor: a float or a tensor of no dimensions.
        stride, padding, dilation, groups, bias, padding_mode: as in ``nn.Conv2d``.
        eps, momentum, affine, track_running_stats: as in ``nn.BatchNorm2d``.
        activation: ``"none"``, ``"relu"``, ``"relu6"``, ``"silu"`` or ``"hardswish"``.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown activation, or a ``scaling_factor`` tensor with dimensions.
    """

    _folded: _Folded | None = None
    _prepared: _Prepared | None = None

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
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
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
        self._adopt(conv, bn, scaling_factor, activation)

    @classmethod
    def from_modules(
        cls, conv: nn.Conv2d, bn: nn.BatchNorm2d, scaling_factor: float | Tensor = 1.0, activation: str = "none"
    ) -> ConvBnScale2d:
        """Wraps existing modules; they are used, not copied. The training mode is that of ``bn``.

        Raises:
            ValueError: as the constructor does, or if ``bn`` has another number of channels than ``conv`` puts out.
        """
        if conv.out_channels != bn.num_features:
            raise ValueError(
                f"from_modules: bn has {bn.num_features} features, expected {conv.out_channels}, conv's out_channels"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt(conv, bn, scaling_factor, activation)
        self.training = bn.training
        return self

    def _adopt(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, scaling_factor: float | Tensor, activation: str) -> None:
        if activation not in ACTIVATIONS:
            known = ", ".join(repr(name) for name in ACTIVATIONS)
            raise ValueError(f"ConvBnScale2d: activation is {activation!r}, expected one of {known}")
        if isinstance(scaling_factor, Tensor) and scaling_factor.dim() != 0:
            raise ValueError(
                f"ConvBnScale2d: scaling_factor has shape {list(scaling_factor.shape)}, "
                f"expected a float or a tensor of no dimensions"
            )
        self.conv = conv
        self.bn = bn
        self.scaling_factor = scaling_factor
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x``: (N, in_channels, H, W). ``residual``: of the result's shape and dtype, added before the activation."""
        key, sources = (None, ()) if torch.compiler.is_compiling() else self._key(x, residual)
        prepared = self._prepared
        if key is not None and prepared is not None and key == prepared.key:
            return torch.ops.fused_conv_bn.conv_scale_shift(
                *(x, prepared.weight, prepared.scale, prepared.shift, *prepared.window),
                residual=residual,
                activation=self.activation,
            )
        if self._fusible(x, residual):
            conv = self.conv
            padded, padding = self._padded(x)
            size = conv_output_size(padded, conv.weight, conv.stride, padding, conv.dilation)
            dtype = ops.autocast_dtype(x)
            if self._takes_batch_statistics():
                if min(size[2:]) > 0 and size[0] * size[2] * size[3] > 1 and self._params_fit(dtype):
                    return self._forward_train(padded, padding, residual, dtype)
            elif min(size[2:]) > 0 and (residual is None or (list(residual.shape) == size and residual.dtype == dtype)):
                operands = self._operands(dtype)
                window = conv.stride, tuple(padding), conv.dilation, conv.groups
                if key is not None and padded is x and self._is_plain((*sources, *operands)):
                    self._prepared = _Prepared(key, sources, *operands, window)
                return torch.ops.fused_conv_bn.conv_scale_shift(
                    padded, *operands, *window, residual=residual, activation=self.activation
                )
        return self._forward_plain(x, residual)

    def _padded(self, x: Tensor) -> tuple[Tensor, Sequence[int]]:
        """The input and what is left to pad it with, as ``nn.Conv2d`` does: zeros on both sides alike."""
        conv = self.conv
        if conv.padding_mode != "zeros":
            return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), (0, 0)
        if not isinstance(conv.padding, str):
            return x, conv.padding
        if conv.padding == "valid":
            return x, (0, 0)
        height, width = (d * (k - 1) for d, k in zip(conv.dilation, conv.weight.shape[2:], strict=True))
        if height % 2 == 0 and width % 2 == 0:
            return x, (height // 2, width // 2)
        return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)), (0, 0)

    def _forward_train(self, x: Tensor, padding: Sequence[int], residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        conv, bn, factor = self.conv, self.bn, self.scaling_factor
        weight: Tensor | None = bn.weight
        bias: Tensor | None = bn.bias
        number = 1.0
        if isinstance(factor, Tensor):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            ones = torch.ones(bn.num_features, dtype=wide, device=x.device)
            weight = (ones if weight is None else weight.to(wide)) * factor
            bias = None if bias is None else bias.to(wide) * factor
        else:
            number = float(factor)
        # As nn.BatchNorm2d does: buffers that are there but not tracked are left alone.
        updates = bn.training and bn.track_running_stats
        running_mean, running_var, batches = (
            (bn.running_mean, bn.running_var, bn.num_batches_tracked) if updates else (None, None, None)
        )
        momentum = bn.momentum
        if momentum is None:
            momentum = 0.0 if batches is None else 1.0 / (float(batches) + 1.0)
        y = ops.conv_bn_scale_train(
            x,
            conv.weight,
            conv.bias,
            running_mean,
            running_var,
            weight,
            bias,
            number,
            momentum,
            bn.eps,
            conv.stride,
            padding,
            conv.dilation,
            conv.groups,
        )
        if batches is not None:
            batches.add_(1)
        return self._finish(y, residual)

    def _forward_plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self._finish(self.bn(self.conv(x)) * self.scaling_factor, residual)

    def _finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            y = y + residual
        return ACTIVATIONS[self.activation](y)

    def _key(self, x: Tensor, residual: Tensor | None) -> tuple[tuple[Any, ...] | None, tuple[Tensor | None, ...]]:
        """All that forward() looks at before it calls conv_scale_shift, in a form that is quick to get and to compare,
        and the tensors among it. (None, ()) where more than that would have to be looked at."""
        modules: dict[str, Any] = self._modules
        conv, bn = modules["conv"], modules["bn"]
        if self.training or type(conv) is not nn.Conv2d or type(bn) is not nn.BatchNorm2d:
            return None, ()
        if _has_hooks(conv) or _has_hooks(bn) or forward_ad._current_level >= 0:
            return None, ()
        factor = self.scaling_factor
        weights, affine, buffers = conv._parameters, bn._parameters, bn._buffers
        if type(weights.get("weight")) not in (Tensor, nn.Parameter):  # of fake tensors, say, which have no data
            return None, ()
        try:
            sources = (
                weights["weight"],
                weights["bias"],
                affine["weight"],
                affine["bias"],
                buffers["running_mean"],
                buffers["running_var"],
                buffers["num_batches_tracked"],
                factor if isinstance(factor, Tensor) else None,
            )
            states = [None if t is None else (id(t), t._version, t.data_ptr(), t.dtype, t.device) for t in sources]
        except (KeyError, RuntimeError):  # no parameter there, or nothing tells when it changes
            return None, ()
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, *sources)):
            return None, ()
        device = x.device
        kind = device.type
        stream = None
        if kind == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return None, ()
            stream = torch._C._cuda_getCurrentRawStream(device.index)
        key = (
            *(x.shape, x.dtype, device, stream),
            None if residual is None else (residual.shape, residual.dtype),
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            *(conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode, bn.training, bn.eps),
            None if isinstance(factor, Tensor) else factor,
            self.activation,
            *states,
        )
        return key, sources

    def _is_plain(self, tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether nothing but a change of the key can change what a call does; tensors: that it reads."""
        conv = self.conv
        return (
            type(conv.stride) is type(conv.dilation) is tuple
            and type(conv.padding) in (tuple, str)
            and all(t is None or type(t) in (Tensor, nn.Parameter) for t in tensors)
        )

    # ---- when the fused ops may run ----------------------------------------------------------------------------------

    def _takes_batch_statistics(self) -> bool:
        bn = self.bn
        return bn.training or (bn.running_mean is None and bn.running_var is None)

    def _params_fit(self, dtype: torch.dtype) -> bool:
        """Whether conv_bn_scale_train takes BN's tensors as they are. The others get PyTorch's own answer."""
        bn, conv = self.bn, self.conv
        dtypes = (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,)
        tensors = (conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
        return all(t is None or (t.dtype in dtypes and t.device == conv.weight.device) for t in tensors)

    def _fusible(self, x: Tensor, residual: Tensor | None) -> bool:
        conv, bn = self.conv, self.bn
        if type(conv) is not nn.Conv2d or type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
            return False
        if (bn.running_mean is None) != (bn.running_var is None):
            return False
        if self._takes_batch_statistics():
            if type(bn) is not nn.BatchNorm2d:
                return False
        elif self.training:
            return False
        if _has_hooks(conv) or _has_hooks(bn):
            return False
        if x.dim() != 4 or x.device.type not in ("cpu", "cuda") or (x.is_cuda and len(_loader.loaded) < 2):
            return False
        # Inputs that the convolution refuses get its own message.
        channels = conv.weight.size(1) * conv.groups
        if x.size(1) != channels or x.size(2) == 0 or x.size(3) == 0 or x.device != conv.weight.device:
            return False
        if ops.autocast_dtype(x) != ops.autocast_dtype(conv.weight):
            return False
        if forward_ad._current_level >= 0:  # forward-mode AD, which neither grad mode nor requires_grad shows
            return False
        if torch.is_grad_enabled():
            tensors = (x, residual, conv.weight, conv.bias, bn.weight, bn.bias, self.scaling_factor)
            return not any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
        return True

    # ---- the folded scale, shift and weight --------------------------------------------------------------------------

    def _fold(self, dtype: torch.dtype, keeps_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(weight, scale, shift), the weight being the convolution's own unless a version of it is to be kept."""
        bn, factor = self.bn, self.scaling_factor
        number = 1.0 if isinstance(factor, Tensor) else float(factor)
        assert bn.running_mean is not None and bn.running_var is not None
        with torch.no_grad():
            scale, shift = ops.fold_bn(
                bn.running_mean, bn.running_var, bn.weight, bn.bias, number, bn.eps, self.conv.bias
            )
            if isinstance(factor, Tensor):
                scale, shift = scale * factor, shift * factor
            if not keeps_weight:
                return self.conv.weight, scale, shift
            weight = self.conv.weight.detach().to(dtype)
            if weight.device.type == "cpu" and weight.dtype == scale.dtype:
                weight, scale = torch.ops.fused_conv_bn._fold_conv_weight(weight, scale)
            return weight, scale, shift

    def _operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The weight, scale and shift of a convolution that computes in ``dtype``."""
        bn, weight = self.bn, self.conv.weight
        if torch.compiler.is_compiling():
            return self._fold(dtype, False)
        assert bn.running_mean is not None  # _fusible() made sure
        # The weight is cast as autocast would, and folded where conv_scale_shift would do so in each call.
        folds_weight = weight.device.type == "cpu" and dtype.itemsize > 2 and self.activation == "none"
        keeps_weight = folds_weight or weight.dtype != dtype
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            # Into the graph: it runs at each replay, on what the parameters are then.
            return self._fold(dtype, keeps_weight)
        try:
            # F.batch_norm updates the running statistics without giving them a new version: num_batches_tracked tells.
            bn_state = (bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.num_batches_tracked, bn.eps)
            sources = (self.conv.bias, self.scaling_factor, *bn_state, dtype, *((weight,) if keeps_weight else ()))
            key = tuple(part for source in sources for part in _state(source))
        except RuntimeError:  # nothing tells when they change
            return self._fold(dtype, False)
        folded = self._folded
        stream = torch.cuda.current_stream(bn.running_mean.device) if bn.running_mean.is_cuda else None
        if folded is None or not _same(folded.key, key):
            own, scale, shift = self._fold(dtype, keeps_weight)
            tensors = own if keeps_weight else None, scale, shift
            folded = _Folded(key, tensors, stream, None if stream is None else stream.record_event())
            self._folded = folded
        elif stream is not None and folded.done is not None and stream != folded.stream:
            # Another stream's fold: this one waits for it, the host does not.
            stream.wait_event(folded.done)
            for tensor in folded.tensors:
                if tensor is not None:
                    tensor.record_stream(stream)
        kept, scale, shift = folded.tensors
        return weight if kept is None else kept, scale, shift

    def train(self, mode: bool = True) -> ConvBnScale2d:
        self._folded = self._prepared = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> ConvBnScale2d:
        self._folded = self._prepared = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": None, "_prepared": None}

    def extra_repr(self) -> str:
        text = f"scaling_factor={self.scaling_factor}"
        return text if self.activation == "none" else f"{text}, activation={self.activation}"
