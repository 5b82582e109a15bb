"""The block of what a squeeze-and-excite block squeezes: a mean over its pixels, and two 1x1 convolutions behind it."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .. import conditions
from .blocks import REFUSALS, Block, ConvBlock, ConvNormBlock, PoolBlock, is_dense
from .patterns import Group

_ops = torch.ops.fused_conv_bn
_op, _conv_bn_mean = _ops.squeeze_excite.default._op, _ops.conv_bn_scale_mean.default._op
_exports_ops = conditions.exports_ops
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled

DEVICES = ("cuda",)
"""Where it is one launch, or two. Elsewhere the op calls what the steps call."""
MOST_IMAGES = 64
"""On an H200 the op takes 0.9 to 1.9 times the three kernels' time, and what starts them takes longer than they do:
with it EfficientNet-B0 takes 1.4 ms for 64 images, and 2.0 with the three. A CUDA graph starts kernels for nothing."""


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_one_op(x: Tensor) -> bool:
    """Whether what starts kernels is what takes time."""
    return x.size(0) <= MOST_IMAGES and not _is_captured(x)


class _Means(threading.local):
    """Means that a convolution has put out, until the squeeze of its result asks for them: of each thread."""

    kept: tuple[weakref.ref[Tensor], Tensor] | None = None

    def keep(self, x: Tensor, mean: Tensor) -> None:
        self.kept = weakref.ref(x), mean

    def take(self, x: Any) -> Tensor | None:
        kept = self.kept
        if kept is None or kept[0]() is not x:
            return None
        self.kept = None
        return kept[1]


_means = _Means()


class SqueezedBlock(ConvNormBlock):
    """A convolution and its BatchNorm whose result a squeeze reads, and beside that its gates' products alone: nobody
    writes to it in between. Where that squeeze is several kernels, the means are the convolution's to put out."""

    def quick(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if type(x) is not Tensor or x.dim() != 4 or _is_one_op(x):
            return super().quick(x, residual)
        try:
            y, mean = self.call(_conv_bn_mean, residual, x)
        except REFUSALS:
            return self.forward(x, residual)
        _means.keep(y, mean)
        return y


class SqueezeBlock(Block):
    """One op where no gradient is needed and the host is what takes time. With gradients, under autocast, of many
    images, in a CUDA graph and for what the op refuses they are three blocks. ``conv`` and ``excite``: the model's own
    convolutions."""

    def __init__(self, group: Group, conv: nn.Module | None, excite: nn.Module | None) -> None:
        super().__init__(group, conv, None)
        assert group.squeeze is not None
        mean, reduce, of_gates = group.squeeze
        self.mean = PoolBlock(mean, None, None)
        self.reduce, self.excite = ConvBlock(reduce, conv, None), ConvBlock(of_gates, excite, None)
        self.is_quick = self.reduce.is_quick and self.excite.is_quick
        self.named = {"activation": reduce.activation, "gate": of_gates.activation}
        if reduce.activation == "leaky_relu":
            self.named["negative_slope"] = reduce.negative_slope

    @property
    def parts(self) -> list[nn.Module]:
        return [*self.reduce.parts, *self.excite.parts]

    @property
    def twins(self) -> list[nn.Module]:
        return [*self.reduce.twins, *self.excite.twins]

    def forward(self, x: Any, residual: Tensor | None = None) -> Tensor:
        read = (t for m in self.twins for t in m._parameters.values())
        if self.is_quick and not self._needs_grad(x, *read) and (y := self._in_one_op(x)) is not None:
            return y
        return self.excite.forward(self.reduce.forward(self.mean.forward(x)))

    def _in_one_op(self, x: Any) -> Tensor | None:
        if (type(x) is not Tensor and not _exports_ops()) or x.dim() != 4 or _is_any_autocast_enabled():
            return None
        # What is not dense the op would copy.
        if not _is_one_op(x) or not is_dense(x):
            return None
        layers = []
        for block in (self.reduce, self.excite):
            conv = block.conv_twin.__dict__
            # What a capture does not look at, for a convolution's op gets it.
            if conv["padding"] != (0, 0) or conv["groups"] != 1:
                return None
            bias = conv["_parameters"]["bias"]
            layers += [conv["_parameters"]["weight"], bias]
            if bias is not None and bias.dtype.itemsize == 2:
                block.nothing(bias)  # made here, since in a CUDA graph each replay would make it again
        try:
            y: Tensor = _op(x, *layers, **self.named)
            return y
        except REFUSALS:
            return None

    def quick(self, x: Any, residual: Tensor | None = None) -> Tensor:
        y, mean = self._in_one_op(x), _means.take(x)
        if y is not None:
            return y
        mean = self.mean.quick(x) if mean is None else self.mean.placed(mean, x)
        return self.excite.quick(self.reduce.quick(mean))

    def plain(self, x: Any, residual: Tensor | None = None) -> Tensor:
        return self.excite.plain(self.reduce.plain(self.mean.plain(x)))

    def takes(self, x: Any, residual: Any) -> bool:
        return self.mean.takes(x, residual)

    def algorithm(self, x: Any, residual: Tensor | None) -> str | None:
        return None
