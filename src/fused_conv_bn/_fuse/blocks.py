"""What runs in the place of a group of nodes: modules that stay where they are in the model, called as one op.

A block has three ways to run. ``forward`` takes any call, with gradients and in training. ``quick`` is for a call in
evaluation that needs no gradient, of modules that the root has looked at already: it calls the op and asks nothing.
``plain`` is what the model's own forward does there.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._conv import allows_tf32
from .._dispatch import keywords
from ..algorithms import explain
from ..conditions import DIMENSIONS_OF_NORM, PAIRS
from ..modules import CONV_MODULES
from .layers import class_of_conv, frozen_twin, norm_of, twin_of
from .patterns import Group

_ops = torch.ops.fused_conv_bn
_conv_bn, _conv, _bn, _cat, _gate, _max_pool, _mean = (
    _ops.conv_bn_scale.default._op,
    _ops.conv_scale_shift.default._op,
    _ops.bn_scale.default._op,
    _ops.bn_scale_cat.default._op,
    _ops.gate.default._op,
    _ops.max_pool2d.default._op,
    _ops.spatial_mean.default._op,
)
_is_grad_enabled = torch.is_grad_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_REFUSALS = RuntimeError, TypeError, KeyError
"""What an op refuses, before it writes anything, is PyTorch's to take, or to refuse in its own words."""


def block_of(group: Group, conv: nn.Module | None, bn: nn.Module | None) -> Block:
    if group.is_gate:
        return GateBlock(group, None, None)
    if group.pooling is not None:
        return PoolBlock(group, None, None)
    if bn is None:
        return ConvBlock(group, conv, None)
    if conv is None:
        return CatNormBlock(group, None, bn) if group.concatenates else NormBlock(group, None, bn)
    return ConvNormBlock(group, conv, bn)


class Block(abc.ABC):
    """``conv`` and ``bn``: the model's own modules, one of them may be None."""

    def __init__(self, group: Group, conv: nn.Module | None, bn: nn.Module | None) -> None:
        self.conv, self.bn = conv, bn
        self.norm = None if bn is None else norm_of(bn)
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
        # What the op does not get when it is what the op takes anyway: arguments cost time.
        self.named = keywords(None, op.activation, op.negative_slope, op.residual_last)
        self.named_tf32 = self.named | {"allow_tf32": True}
        window = () if conv is None else (conv.stride, conv.padding, conv.dilation)
        zeros = conv is None or (conv.padding_mode == "zeros" and all(type(v) is tuple for v in window))
        self.is_quick = zeros and not (bn is not None and (self.bn_twin.training or self._statistics() is None))

    def _statistics(self) -> Any:
        return self.bn_twin._buffers["running_mean"]

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
        return self._plain_epilogue(y, residual)

    def takes(self, x: Any, residual: Any) -> bool:
        """Whether the group is what it was taken for, now that there are values."""
        return residual is None or isinstance(residual, Tensor)

    def _plain_epilogue(self, y: Tensor, residual: Tensor | None) -> Tensor:
        op = self.op
        if op.scaling_factor != 1.0:
            y = y * op.scaling_factor
        if residual is not None and not op.residual_last:
            y = y + residual
        if self.norm is None or self.norm.activation == "none":
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
            tf32 = allows_tf32(x, weight)
            return explain(x, weight, *window, residual=residual is not None, allow_tf32=tf32)
        except RuntimeError:
            return None

    def _needs_grad(self, *tensors: Tensor | None) -> bool:
        return _is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


class ConvNormBlock(Block):
    def __init__(self, group: Group, conv: nn.Module | None, bn: nn.Module | None) -> None:
        super().__init__(group, conv, bn)
        self.is_quick &= type(self.bn_twin) in (PAIRS[type(self.conv_twin)].norm, nn.SyncBatchNorm)

    def forward(self, x: Tensor, residual: Any = None) -> Tensor:
        if residual is not None and not isinstance(residual, Tensor):
            return self.plain(x, residual)
        y: Tensor = self.op.forward(x, residual)
        return y

    def quick(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if type(x) is not Tensor:
            return self.plain(x, residual)
        conv, bn = self.conv_twin.__dict__, self.bn_twin.__dict__
        c, p, b = conv["_parameters"], bn["_parameters"], bn["_buffers"]
        try:
            y: Tensor = _conv_bn(
                x,
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
        except _REFUSALS:
            return self.forward(x, residual)


class ConvBlock(Block):
    """A convolution without a BatchNorm. Its bias is the op's shift."""

    def __init__(self, group: Group, conv: nn.Module | None, bn: nn.Module | None) -> None:
        super().__init__(group, conv, bn)
        self.statistics: tuple[Tensor, Tensor] | None = None

    def _nothing(self, bias: Tensor) -> tuple[Tensor, Tensor, None, None]:
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
        except _REFUSALS:
            return self.plain(x, residual)

    def quick(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv = self.conv_twin.__dict__
        c = conv["_parameters"]
        if type(x) is not Tensor or not self.is_quick or _is_any_autocast_enabled():
            return self.plain(x, residual)
        bias = c["bias"]
        window = conv["stride"], conv["padding"], conv["dilation"], conv["groups"]
        y: Tensor
        try:
            if bias is not None and bias.dtype.itemsize == 2:
                y = _conv_bn(
                    x, c["weight"], bias, *self._nothing(bias), 1.0, 0.0, *window, residual=residual, **self.named
                )
            else:
                named = self.named_tf32 if allows_tf32(x, c["weight"]) else self.named
                y = _conv(x, c["weight"], None, bias, *window, residual=residual, **named)
            return y
        except _REFUSALS:
            return self.plain(x, residual)


class NormBlock(Block):
    """A BatchNorm behind anything."""

    def __init__(self, group: Group, conv: nn.Module | None, bn: nn.Module | None) -> None:
        super().__init__(group, conv, bn)
        self.dimensions = DIMENSIONS_OF_NORM[type(self.bn_twin)]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        bn, op = self.bn_twin, self.op
        p, b = bn._parameters, bn._buffers
        if type(x) is not Tensor or x.dim() not in self.dimensions or _is_any_autocast_enabled():
            return self.plain(x, residual)
        try:
            if bn.training:
                return self._train(x, residual)
            return ops.bn_scale(
                *(x, b["running_mean"], b["running_var"], p["weight"], p["bias"], self.factor, bn.eps),
                residual=residual,
                activation=op.activation,
                negative_slope=op.negative_slope,
                residual_last=op.residual_last,
            )
        except _REFUSALS:
            return self.plain(x, residual)

    def _train(self, x: Tensor, residual: Tensor | None) -> Tensor:
        bn, op = self.bn_twin, self.op
        p, b = bn._parameters, bn._buffers
        # Alone it is PyTorch's, and so are buffers that nobody tracks and an average over all batches.
        batches = b.get("num_batches_tracked")
        if not bn.track_running_stats or batches is None or bn.momentum is None or type(bn) is nn.SyncBatchNorm:
            return self.plain(x, residual)
        if op.activation == "none" and residual is None:
            return self.plain(x, residual)
        y = ops.bn_scale_train(
            *(x, b["running_mean"], b["running_var"], p["weight"], p["bias"], self.factor, bn.momentum, bn.eps),
            residual=residual,
            activation=op.activation,
            negative_slope=op.negative_slope,
            residual_last=op.residual_last,
        )
        batches.add_(1)
        return y

    def quick(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._call(_bn, x, x, residual)

    def _call(self, op: Any, first: Any, x: Any, residual: Tensor | None) -> Tensor:
        """``first``: what says whether the op has such an input."""
        bn = self.bn_twin.__dict__
        p, b = bn["_parameters"], bn["_buffers"]
        if type(first) is not Tensor or first.dim() not in self.dimensions:
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
        except _REFUSALS:
            return self.plain(x, residual)


class CatNormBlock(NormBlock):
    """A BatchNorm of inputs that are concatenated. With gradients they are, by PyTorch."""

    def forward(self, x: Any, residual: Tensor | None = None) -> Tensor:
        return super().forward(torch.cat(x, 1), residual)

    def plain(self, x: Any, residual: Tensor | None = None) -> Tensor:
        return super().plain(torch.cat(x, 1) if type(x) is tuple else x, residual)

    def quick(self, x: Any, residual: Tensor | None = None) -> Tensor:
        return self._call(_cat, x[0], x, residual)


class GateBlock(Block):
    """A product with the gate of a squeeze-and-excite block. Gradients are PyTorch's, and on the CPU so is a product
    alone, which its kernel computes at the speed of memory."""

    def forward(self, x: Any, residual: Tensor | None = None) -> Tensor:
        if self._needs_grad(*x, residual):
            return self.plain(x, residual)
        return self.quick(x, residual)

    def quick(self, x: Any, residual: Tensor | None = None) -> Tensor:
        a, b = x
        if type(a) is not Tensor or type(b) is not Tensor or not (a.is_cuda or self.named or residual is not None):
            return self.plain(x, residual)
        if a.numel() < b.numel():
            a, b = b, a
        # A factor of fewer dimensions is broadcast from the last one on; and the op puts out no other strides.
        if a.dim() != b.dim() or not b.is_contiguous() or not _is_dense(a):
            return self.plain(x, residual)
        try:
            y: Tensor = _gate(a, b, residual=residual, **self.named)
            return y
        except _REFUSALS:
            return self.plain(x, residual)

    def plain(self, x: Any, residual: Tensor | None = None) -> Tensor:
        return self._plain_epilogue(x[0] * x[1], residual)

    def takes(self, x: Any, residual: Any) -> bool:
        if not all(isinstance(t, Tensor) for t in x):
            return False
        large, small = x if x[0].numel() > x[1].numel() else x[::-1]
        if large.dim() < 3 or small.shape != (*large.shape[:2], *[1] * (large.dim() - 2)):
            return False
        return residual is None or (isinstance(residual, Tensor) and residual.shape == large.shape)


class PoolBlock(Block):
    """Maxima of windows, or means over rows and columns. Gradients are PyTorch's."""

    def __init__(self, group: Group, conv: nn.Module | None, bn: nn.Module | None) -> None:
        super().__init__(group, conv, bn)
        assert group.pooling is not None
        self.pooling = group.pooling

    def forward(self, x: Any, residual: Tensor | None = None) -> Tensor:
        return self.plain(x) if self._needs_grad(x) else self.quick(x)

    def quick(self, x: Any, residual: Tensor | None = None) -> Tensor:
        pooling = self.pooling
        if type(x) is not Tensor or x.dim() != 4:
            return self.plain(x)
        y: Tensor
        try:
            if pooling.window is not None:
                y = _max_pool(x, *pooling.window)
                return y
            if not _is_dense(x):  # then PyTorch's result may lie otherwise
                return self.plain(x)
            y = _mean(x, keepdim=pooling.keepdim)
        except _REFUSALS:
            return self.plain(x)
        _, by_channel, _, by_column = x.stride()
        if pooling.adaptive and by_channel == 1 and by_column > 1:
            n, c, _, _ = x.shape
            return y.as_strided((n, c, 1, 1), (c, 1, c, c))
        return y

    def plain(self, x: Any, residual: Tensor | None = None) -> Tensor:
        return self.pooling.plain(x)

    def takes(self, x: Any, residual: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() == 4


def _is_dense(x: Tensor) -> bool:
    """In one of the two layouts whose strides a result has."""
    if x.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])


def shift_of(bias: Tensor | None) -> Tensor | None:
    """A convolution's bias as an op takes a shift: not of 16 bits."""
    return bias if bias is None or bias.dtype.itemsize >= 4 else bias.float()


def _fits(x: Tensor, residual: Tensor | None, conv: nn.Module) -> bool:
    """Whether the op has such an input at all: a plain one, with a batch dimension, outside of autocast."""
    plain = type(x) is Tensor and (residual is None or type(residual) is Tensor)
    return plain and x.dim() == len(conv.kernel_size) + 2 and not _is_any_autocast_enabled()  # type: ignore[arg-type]
