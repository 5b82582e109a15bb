"""What runs in the place of a group of nodes: modules that stay where they are in the model, called as one op.

A block has three ways to run. ``forward`` takes any call, with gradients and in training. ``quick`` is for a call in
evaluation that needs no gradient, of modules that the root has looked at already: it calls the op and asks nothing.
``plain`` is what the model's own forward does there.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _together, conditions, ops, reference
from .._conv import allows_tf32
from .._dispatch import keywords
from ..algorithms import explain
from ..conditions import DIMENSIONS_OF_NORM, PAIRS, is_small_step
from ..modules import CONV_MODULES
from .layers import AnyNorm, Norm, class_of_conv, frozen_twin, norm_of, twin_of
from .patterns import Group

_ops = torch.ops.fused_conv_bn
_conv_bn, _conv, _bn, _cat, _max_pool, _mean = (
    _ops.conv_bn_scale.default._op,
    _ops.conv_scale_shift.default._op,
    _ops.bn_scale.default._op,
    _ops.bn_scale_cat.default._op,
    _ops.max_pool2d.default._op,
    _ops.spatial_mean.default._op,
)
_exports_ops = conditions.exports_ops
_is_grad_enabled = torch.is_grad_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_DIMENSIONS = {**DIMENSIONS_OF_NORM, AnyNorm: (2, 3, 4, 5)}
REFUSALS = RuntimeError, TypeError, KeyError
"""What an op refuses, before it writes anything, is PyTorch's to take, or to refuse in its own words."""
_BY_HAND: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda y: y * torch.sigmoid(y),
    "mish": lambda y: torch.tanh(F.softplus(y)) * y,
}
"""Activations that a model may have as several calls, as :meth:`Matcher.by_hand` knows them."""


class Block(abc.ABC):
    """``conv`` and ``bn``: the model's own modules, one of them may be None."""

    def __init__(self, group: Group, conv: nn.Module | None, bn: nn.Module | None) -> None:
        if bn is not None and group.function is not None:
            bn = group.function.twin(bn)
        self.conv, self.bn = conv, bn
        self.norm = None if bn is None else Norm(AnyNorm) if group.function is not None else norm_of(bn)
        self.conv_twin: Any = None
        if conv is not None:
            of = class_of_conv(conv)
            assert of is not None
            self.conv_twin = twin_of(conv, of)
        self.bn_twin: Any = None
        if bn is not None:
            assert self.norm is not None
            self.bn_twin = frozen_twin(bn) if self.norm.frozen else twin_of(bn, self.norm.of)
        # The op's arguments that are not the modules' own, and an instance that knows how to train with them.
        of_op = CONV_MODULES[nn.Conv2d if conv is None else type(self.conv_twin)]
        self.op = op = of_op.__new__(of_op)
        nn.Module.__init__(op)
        op._modules.update(conv=self.conv_twin, bn=self.bn_twin)
        op.scaling_factor = self.factor = float(group.factor)
        op.activation, op.negative_slope = group.activation, group.negative_slope
        op.residual_last = group.residual_last
        self.by_hand = _BY_HAND[group.activation] if group.by_hand else None
        # What the op does not get when it is what the op takes anyway: arguments cost time.
        self.named = keywords(None, op.activation, op.negative_slope, op.residual_last)
        self.named_tf32 = self.named | {"allow_tf32": True}
        window = () if conv is None else (conv.stride, conv.padding, conv.dilation)
        zeros = conv is None or (conv.padding_mode == "zeros" and all(type(v) is tuple for v in window))
        self.is_quick = zeros and not (bn is not None and (self.bn_twin.training or self._statistics() is None))

    def _statistics(self) -> Any:
        return self.bn_twin._buffers["running_mean"]

    @property
    def parts(self) -> list[nn.Module]:
        """The model's own modules that it computes."""
        return [m for m in (self.conv, self.bn) if m is not None]

    @property
    def twins(self) -> list[nn.Module]:
        """What it gets their tensors from."""
        return [m for m in (self.conv_twin, self.bn_twin) if m is not None]

    @abc.abstractmethod
    def forward(self, x: Any, residual: Tensor | None = None) -> Tensor:
        """Any call. ``x``: a tensor, or where a block has several inputs a tuple of them."""

    @abc.abstractmethod
    def quick(self, x: Any, residual: Tensor | None = None) -> Tensor:
        """A call in evaluation that needs no gradient."""

    def plain(self, x: Any, residual: Tensor | None = None) -> Tensor:
        """PyTorch's own ops."""
        y: Tensor = x if self.conv is None else self.conv(x)
        if self.bn is not None:
            y = self.bn(y)
        return self._plain_epilogue(y, residual, self.by_hand)

    def takes(self, x: Any, residual: Any) -> bool:
        """Whether the group is what it was taken for, now that there are values."""
        return residual is None or isinstance(residual, Tensor)

    @property
    def may_be_plain(self) -> bool:
        """Whether sizes decide if PyTorch's ops are to run."""
        return False

    def _plain_epilogue(
        self, y: Tensor, residual: Tensor | None, by_hand: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """``by_hand``: in the place of PyTorch's own activation."""
        op = self.op
        if op.scaling_factor != 1.0:
            y = y * op.scaling_factor
        if residual is not None and not op.residual_last:
            y = y + residual
        if by_hand is not None:
            y = by_hand(y)
        elif self.norm is None or self.norm.activation == "none":
            y = op._activated(y, not y.requires_grad)
        if residual is not None and op.residual_last:
            y = y + residual
        return y

    def algorithm(self, x: Tensor, residual: Tensor | None) -> str | None:
        """What :func:`explain` says of the convolution."""
        conv = self.conv_twin
        if conv is None or not self.is_quick:
            return None
        try:
            window = conv.stride, conv.padding, conv.dilation, conv.groups
            weight = conv._parameters["weight"]
            return explain(x, weight, *window, residual=residual is not None, allow_tf32=allows_tf32(x, weight))
        except RuntimeError:
            return None

    def _needs_grad(self, *tensors: Tensor | None) -> bool:
        return _is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)

    def _small_step(self, x: Any, residual: Tensor | None) -> Tensor | None:
        """By what calls of the modules run, which nobody watches, where that takes less time."""
        bn: Any = self.bn_twin
        if not is_small_step(x, self.conv_twin, bn):
            return None
        bn, y = self.bn, x if self.conv is None else self.conv.forward(x)
        return self._plain_epilogue(bn.forward(y), residual, self.by_hand)


class ConvNormBlock(Block):
    def __init__(self, group: Group, conv: nn.Module | None, bn: nn.Module | None) -> None:
        super().__init__(group, conv, bn)
        norm, known = type(self.bn_twin), PAIRS[type(self.conv_twin)].norm
        self.is_quick &= norm in (known, nn.SyncBatchNorm, AnyNorm)
        self.is_function = norm is AnyNorm

    def forward(self, x: Tensor, residual: Any = None) -> Tensor:
        if residual is not None and not isinstance(residual, Tensor):
            return self.plain(x, residual)
        y = self._small_step(x, residual)
        if y is None and not self.is_function:
            y = self.op.forward(x, residual)
        elif y is None:
            y = self.fused(x, residual, self.bn_twin._parameters["weight"], self.bn_twin._parameters["bias"])
        return self.plain(x, residual) if y is None else y

    def fused(self, x: Tensor, residual: Any, gain: Tensor | None, shift: Tensor | None) -> Tensor | None:
        """With another weight and bias of the BatchNorm; None where PyTorch's ops have to run."""
        conv, bn = self.conv_twin, self.bn_twin
        c, b = conv._parameters, bn._buffers
        if not _fits(x, residual, conv) or conv.padding_mode != "zeros" or type(conv.padding) is not tuple:
            return None
        if type(bn) not in (PAIRS[type(conv)].norm, nn.SyncBatchNorm, AnyNorm):
            return None
        if type(bn) is nn.SyncBatchNorm and bn.training:
            return None
        found = c["weight"], c["bias"], b["running_mean"], b["running_var"], gain, shift
        window = conv.stride, conv.padding, conv.dilation, conv.groups
        y: Tensor | None = self.op._fused(x, residual, bn, found, window, x.dtype)
        return y

    def quick(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if type(x) is not Tensor and not _exports_ops():
            return self.plain(x, residual)
        try:
            return self.call(_conv_bn, residual, x)
        except REFUSALS:
            return self.forward(x, residual)

    def call(self, op: Any, residual: Tensor | None, x: Tensor, *gate: Tensor) -> Tensor:
        """``op``: takes ``gate`` behind the input."""
        conv, bn = self.conv_twin.__dict__, self.bn_twin.__dict__
        c, p, b = conv["_parameters"], bn["_parameters"], bn["_buffers"]
        y: Tensor = op(
            x,
            *gate,
            c["weight"],
            c["bias"],
            b["running_mean"],
            b["running_var"],
            p["weight"],
            p["bias"],
            self.factor,
            bn["eps"],
            conv["stride"],
            conv["padding"],
            conv["dilation"],
            conv["groups"],
            residual=residual,
            **(self.named_tf32 if allows_tf32(x, c["weight"]) else self.named),
        )
        return y


class ConvBlock(Block):
    """A convolution without a BatchNorm. Its bias is the op's shift."""

    def __init__(self, group: Group, conv: nn.Module | None, bn: nn.Module | None) -> None:
        super().__init__(group, conv, bn)
        self.statistics: tuple[Tensor, Tensor] | None = None

    def nothing(self, bias: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """A BatchNorm that changes nothing, for a bias of 16 bits. Its op takes that as it is, where all of its tensors
        have one dtype; a shift would have to be cast first."""
        found = self.statistics
        if found is None or (found[0].device, found[0].dtype, found[0].shape) != (bias.device, bias.dtype, bias.shape):
            with torch.inference_mode(False):
                zero, one = (bias.new_full(bias.shape, v) for v in (0.0, 1.0))
            found = self.statistics = zero, one
        return (*found, None, None)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv = self.conv_twin
        c = conv._parameters
        if not self._needs_grad(x, residual, c["weight"], c["bias"]):
            return self.quick(x, residual)
        # PyTorch's ops take no longer there on the CPU.
        if x.is_cpu and self.by_hand is not None:
            return self._plain_epilogue(self.conv(x), residual)  # type: ignore[misc]
        if not x.is_cuda or not self.is_quick or not _fits(x, residual, conv) or _is_any_autocast_enabled():
            return self.plain(x, residual)
        op = self.op
        try:
            return ops.conv_scale_shift(
                *(x, c["weight"], None, shift_of(c["bias"])),
                *(conv.stride, conv.padding, conv.dilation, conv.groups),
                residual=residual,
                activation=op.activation,
                negative_slope=op.negative_slope,
                residual_last=op.residual_last,
                allow_tf32=allows_tf32(x, c["weight"]),
            )
        except REFUSALS:
            return self.plain(x, residual)

    def quick(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv = self.conv_twin.__dict__
        c = conv["_parameters"]
        if (type(x) is not Tensor and not _exports_ops()) or not self.is_quick or _is_any_autocast_enabled():
            return self.plain(x, residual)
        bias = c["bias"]
        window = conv["stride"], conv["padding"], conv["dilation"], conv["groups"]
        y: Tensor
        try:
            if bias is not None and bias.dtype.itemsize == 2:
                y = _conv_bn(
                    x, c["weight"], bias, *self.nothing(bias), 1.0, 0.0, *window, residual=residual, **self.named
                )
            else:
                named = self.named_tf32 if allows_tf32(x, c["weight"]) else self.named
                y = _conv(x, c["weight"], None, bias, *window, residual=residual, **named)
            return y
        except REFUSALS:
            return self.plain(x, residual)


class NormBlock(Block):
    """A BatchNorm behind anything."""

    def __init__(self, group: Group, conv: nn.Module | None, bn: nn.Module | None) -> None:
        super().__init__(group, conv, bn)
        self.dimensions = _DIMENSIONS[type(self.bn_twin)]
        self.is_alone = group.factor == 1.0 and group.residual is None and group.activation == "none"

    @property
    def may_be_plain(self) -> bool:
        """In training mode, with nothing behind it."""
        return self.is_alone and self.bn_twin.training

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        p = self.bn_twin._parameters
        if residual is None and self.may_be_plain and not (type(x) is Tensor and _gains_alone(x)):
            return self.plain(x, residual)
        if (y := self._small_step(x, residual)) is not None:
            return y
        found = self.fused(x, residual, p["weight"], p["bias"])
        return self.plain(x, residual) if found is None else found

    def fused(self, x: Tensor, residual: Any, gain: Tensor | None, shift: Tensor | None) -> Tensor | None:
        """With another weight and bias of the BatchNorm; None where PyTorch's ops have to run."""
        bn, op = self.bn_twin, self.op
        b = bn._buffers
        if type(x) is not Tensor or x.dim() not in self.dimensions or _is_any_autocast_enabled():
            return None
        try:
            if bn.training:
                return self._train(x, residual, gain, shift)
            return ops.bn_scale(
                *(x, b["running_mean"], b["running_var"], gain, shift, self.factor, bn.eps),
                residual=residual,
                activation=op.activation,
                negative_slope=op.negative_slope,
                residual_last=op.residual_last,
            )
        except torch.OutOfMemoryError:  # PyTorch's ops take more, and count a batch before they have it
            raise
        except REFUSALS:
            return None

    def _train(self, x: Tensor, residual: Tensor | None, gain: Tensor | None, shift: Tensor | None) -> Tensor | None:
        bn, op = self.bn_twin, self.op
        b = bn._buffers
        # PyTorch's are buffers that nobody tracks, and an average over all batches.
        batches = b.get("num_batches_tracked")
        if not bn.track_running_stats or batches is None or bn.momentum is None or type(bn) is nn.SyncBatchNorm:
            return None
        # Counted first, as PyTorch does: a checkpoint may end the call behind the op.
        _together.count(batches)
        try:
            return ops.bn_scale_train(
                *(x, b["running_mean"], b["running_var"], gain, shift, self.factor, bn.momentum, bn.eps),
                residual=residual,
                activation=op.activation,
                negative_slope=op.negative_slope,
                residual_last=op.residual_last,
            )
        except REFUSALS:  # and whoever runs in its place counts
            _together.count_back(batches)
            raise

    def quick(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._call(_bn, x, x, residual)

    def _call(self, op: Any, first: Any, x: Any, residual: Tensor | None) -> Tensor:
        """``first``: what says whether the op has such an input."""
        bn = self.bn_twin.__dict__
        p, b = bn["_parameters"], bn["_buffers"]
        if (type(first) is not Tensor and not _exports_ops()) or first.dim() not in self.dimensions:
            return self.plain(x, residual)
        named = self.named if residual is None else self.named | {"residual": residual}
        try:
            y: Tensor = op(
                x,
                b["running_mean"],
                b["running_var"],
                p["weight"],
                p["bias"],
                self.factor,
                bn["eps"],
                **named,
            )
            return y
        except REFUSALS:
            return self.plain(x, residual)


class CatNormBlock(NormBlock):
    """A BatchNorm of inputs that are concatenated. With gradients they are, by PyTorch."""

    def forward(self, x: Any, residual: Tensor | None = None) -> Tensor:
        return super().forward(torch.cat(x, 1), residual)

    def plain(self, x: Any, residual: Tensor | None = None) -> Tensor:
        return super().plain(torch.cat(x, 1) if type(x) is tuple else x, residual)

    def quick(self, x: Any, residual: Tensor | None = None) -> Tensor:
        return self._call(_cat, x[0], x, residual)


class StepsBlock(Block):
    """A BatchNorm, with the convolution in front of it or not, whose result is changed by tensors that have a value for
    each channel: these go into its weight and its bias. The first of the inputs is its own."""

    def __init__(self, group: Group, conv: nn.Module | None, bn: nn.Module | None) -> None:
        super().__init__(group, conv, bn)
        of: Any = NormBlock if conv is None else ConvNormBlock
        self.inner = of(group, conv, bn)
        nothing: dict[str, Any] = dict(
            steps=[], factor=1.0, residual=None, activation="none", residual_last=False, by_hand=False
        )
        self.bare = of(dataclasses.replace(group, **nothing), conv, bn)  # what is left without the steps
        self.is_quick = False
        # Of each step the number, or which of the tensors it is.
        places = itertools.count()
        self.steps = [(op, v if isinstance(v, float) else next(places)) for op, v in group.steps]

    def forward(self, x: Any, residual: Tensor | None = None) -> Tensor:
        first, *tensors = x
        y: Tensor | None = None
        if type(first) is Tensor and _is_large(first) and self._may_be_in_the_op(first, tensors):
            y = self.inner.fused(first, residual, *self._affine(first, tensors))
        return self._in_steps(self.bare.forward(first), tensors, residual) if y is None else y

    def _may_be_in_the_op(self, x: Tensor, tensors: Sequence[Any]) -> bool:
        if not self._are_channelwise(x, tensors):
            return False
        mean, var = (self.bn_twin._buffers[name] for name in ("running_mean", "running_var"))
        # Training writes to the statistics, and what stands behind the BatchNorm reads the new ones.
        return not (self.bn_twin.training and mean is not None and conditions.shares_memory(mean, var, *tensors))

    def _are_channelwise(self, x: Tensor, tensors: Sequence[Any]) -> bool:
        """Whether they are broadcast along channels, and change no dtype."""
        channels, dims = self.bn_twin.num_features, x.dim()
        return all(
            type(t) in (Tensor, nn.Parameter)
            and (t.dtype, t.device) == (x.dtype, x.device)
            and t.dim() <= dims
            and (t.numel() == 1 or (t.dim() >= dims - 1 and t.shape[t.dim() - dims + 1] == channels == t.numel()))
            for t in tensors
        )

    def _affine(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """BatchNorm's weight and bias with the steps in them."""
        p = self.bn_twin._parameters
        gain, shift = p["weight"], p["bias"]
        wide = reference.wide(x.dtype)
        size = (self.bn_twin.num_features,)
        for op, operand in self.steps:
            value: Any = operand if isinstance(operand, float) else tensors[operand].reshape(-1).to(wide)
            full = value if isinstance(value, Tensor) else x.new_full(size, value, dtype=wide)
            if op == "*":
                gain = full.expand(size).contiguous() if gain is None else gain * value
                shift = None if shift is None else shift * value
            else:
                shift = full.expand(size).contiguous() if shift is None else shift + value
        return gain, shift

    def quick(self, x: Any, residual: Tensor | None = None) -> Tensor:
        first, *tensors = x
        if type(first) is Tensor and _is_large(first):
            return self.forward(x, residual)
        bare = self.bare.quick if self.bare.is_quick else self.bare.forward
        return self._in_steps(bare(first), tensors, residual)

    def plain(self, x: Any, residual: Tensor | None = None) -> Tensor:
        y, *tensors = x
        for m in (self.conv, self.bn):
            y = y if m is None else m(y)
        return self._in_steps(y, tensors, residual)

    def _in_steps(self, y: Tensor, tensors: Sequence[Tensor], residual: Tensor | None) -> Tensor:
        """By PyTorch's ops."""
        for op, operand in self.steps:
            value = operand if isinstance(operand, float) else tensors[operand]
            y = y * value if op == "*" else y + value
        return self._plain_epilogue(y, residual, self.by_hand)

    def takes(self, x: Any, residual: Any) -> bool:
        return isinstance(x[0], Tensor) and self._are_channelwise(x[0], x[1:]) and super().takes(x, residual)


class PoolBlock(Block):
    """Maxima of windows, or means over rows and columns. Gradients of means are PyTorch's."""

    def __init__(self, group: Group, conv: nn.Module | None, bn: nn.Module | None) -> None:
        super().__init__(group, conv, bn)
        assert group.pooling is not None
        self.pooling = group.pooling

    def forward(self, x: Any, residual: Tensor | None = None) -> Tensor:
        if not self._needs_grad(x):
            return self.quick(x)
        window = self.pooling.window
        if window is None or type(x) is not Tensor:
            return self.plain(x)
        try:
            return ops.max_pool2d(x, *window)
        except REFUSALS:
            return self.plain(x)

    def quick(self, x: Any, residual: Tensor | None = None) -> Tensor:
        pooling = self.pooling
        if (type(x) is not Tensor and not _exports_ops()) or x.dim() != 4:
            return self.plain(x)
        y: Tensor
        try:
            if pooling.window is not None:
                y = _max_pool(x, *pooling.window)
                return y
            if not is_dense(x):  # then PyTorch's result may lie otherwise
                return self.plain(x)
            y = _mean(x, keepdim=pooling.keepdim)
        except REFUSALS:
            return self.plain(x)
        return self.placed(y, x)

    def placed(self, y: Tensor, x: Tensor) -> Tensor:
        """Means of x in the strides of PyTorch's."""
        _, by_channel, _, by_column = x.stride()
        if self.pooling.adaptive and by_channel == 1 and by_column > 1:
            n, c, _, _ = x.shape
            return y.as_strided((n, c, 1, 1), (c, 1, c, c))
        return y

    def plain(self, x: Any, residual: Tensor | None = None) -> Tensor:
        return self.pooling.plain(x)

    def takes(self, x: Any, residual: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() == 4


def is_dense(x: Tensor) -> bool:
    """In one of the two layouts whose strides a result has."""
    if x.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])


def _is_large(x: Tensor) -> bool:
    """Whether a pass over it takes longer than the host takes for some ops on a value for each channel."""
    return x.numel() >= 1 << (20 if x.is_cuda else 16)


def _gains_alone(x: Tensor) -> bool:
    """Whether a BatchNorm in training mode with nothing behind it is faster as our op, by measurements.

    On a CPU, contiguous float32 of 3 to 5 dimensions: steps take 0.3 to 0.7 of PyTorch's time from 65,536 elements on,
    and 1.4 times as long below, where the host's time is all. In channels_last 0.8 to 1.0, of two dimensions 0.9 to
    1.2. On an H200, forward of large images: contiguous in float32 0.3 to 0.85, channels_last in 16 bits 0.25 to 0.35,
    in float32 1.0.
    """
    if x.is_cuda and x.dtype.itemsize == 2:
        is_measured = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    else:
        is_measured = x.dim() > 2 and x.dtype == torch.float32 and x.is_contiguous()
    return is_measured and x.numel() >= 1 << (22 if x.is_cuda else 16)


def shift_of(bias: Tensor | None) -> Tensor | None:
    """A convolution's bias as an op takes a shift: not of 16 bits."""
    return bias if bias is None or bias.dtype.itemsize >= 4 else bias.float()


def _fits(x: Tensor, residual: Tensor | None, conv: nn.Module) -> bool:
    """Whether the op has such an input at all: a plain one, with a batch dimension, outside of autocast."""
    plain = type(x) is Tensor and (residual is None or type(residual) is Tensor)
    return plain and x.dim() == len(conv.kernel_size) + 2 and not _is_any_autocast_enabled()  # type: ignore[arg-type]
