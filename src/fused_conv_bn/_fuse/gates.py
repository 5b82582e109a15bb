"""Blocks of products with a squeeze-and-excite block's gate: alone, and in front of a 1x1 convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import conditions
from .._conv import autocast_dtype
from .blocks import REFUSALS, Block, ConvNormBlock, is_dense
from .patterns import Group

_ops = torch.ops.fused_conv_bn
_gate, _gated_conv = _ops.gate.default._op, _ops.gate_conv_bn_scale.default._op
_exports_ops = conditions.exports_ops
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled

DEVICES = ("cuda",)
"""Where a convolution may take a gate along. Elsewhere its op writes the product as PyTorch does."""


class GateBlock(Block):
    """A product with the gate of a squeeze-and-excite block. Gradients are PyTorch's, and on the CPU so is a product
    alone, which its kernel computes at the speed of memory."""

    def forward(self, x: Any, residual: Tensor | None = None) -> Tensor:
        if self._needs_grad(*x, residual):
            return self.plain(x, residual)
        return self.quick(x, residual)

    def factors(self, x: Any) -> tuple[Tensor, Tensor] | None:
        """The tensor and its gate, as an op takes them; None where PyTorch's product has to run."""
        a, b = x
        if (type(a) is not Tensor or type(b) is not Tensor) and not _exports_ops():
            return None
        if a.numel() < b.numel():
            a, b = b, a
        # A factor of fewer dimensions is broadcast from the last one on; and the op puts out no other strides.
        if a.dim() != b.dim() or not b.is_contiguous() or not is_dense(a):
            return None
        return a, b

    def quick(self, x: Any, residual: Tensor | None = None) -> Tensor:
        is_worth_it = self.named or residual is not None or (isinstance(x[0], Tensor) and x[0].is_cuda)
        factors = self.factors(x) if is_worth_it else None
        if factors is None:
            return self.plain(x, residual)
        try:
            y: Tensor = _gate(*factors, residual=residual, **self.named)
            return y
        except REFUSALS:
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


class GatedConvBlock(Block):
    """A convolution and its BatchNorm behind such a product: one op where no gradient is needed, which decides by
    itself whether a kernel takes the gate along. It rounds the product as the two steps do."""

    def __init__(self, group: Group, conv: nn.Module | None, bn: nn.Module | None) -> None:
        super().__init__(group, conv, bn)
        assert group.gate is not None
        self.gate, self.inner = GateBlock(group.gate, None, None), ConvNormBlock(group, conv, bn)
        self.is_quick = self.inner.is_quick

    def forward(self, x: Any, residual: Tensor | None = None) -> Tensor:
        y = self._in_one_op(x, residual) if self._may_be_one_op(x, residual) else None
        return self.inner.forward(self.gate.forward(x), residual) if y is None else y

    def _may_be_one_op(self, x: Any, residual: Tensor | None) -> bool:
        """Whether a call needs no gradient, and autocast nothing but what the op does there."""
        conv, bn = self.conv_twin, self.bn_twin
        if not self.is_quick or (self.inner.is_function and _is_any_autocast_enabled()):
            return False
        read = x if residual is None else (*x, residual)
        if not all(isinstance(t, Tensor) and t.dtype is autocast_dtype(t) for t in read):
            return False
        return not self._needs_grad(*read, *conv._parameters.values(), *bn._parameters.values(), *bn._buffers.values())

    def _in_one_op(self, x: Any, residual: Tensor | None) -> Tensor | None:
        factors = self.gate.factors(x)
        try:
            return None if factors is None else self.inner.call(_gated_conv, residual, *factors)
        except REFUSALS:
            return None

    def quick(self, x: Any, residual: Tensor | None = None) -> Tensor:
        y = self._in_one_op(x, residual)
        return self.inner.quick(self.gate.quick(x), residual) if y is None else y

    def plain(self, x: Any, residual: Tensor | None = None) -> Tensor:
        return self.inner.plain(self.gate.plain(x), residual)

    def takes(self, x: Any, residual: Any) -> bool:
        return self.gate.takes(x, None) and super().takes(x, residual)

    def algorithm(self, x: Any, residual: Tensor | None) -> str | None:
        factors = self.gate.factors(x)
        return None if factors is None else super().algorithm(factors[0], residual)
