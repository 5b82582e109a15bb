"""The modules in the subset of Python that TorchScript knows: the same parts and names, and PyTorch's own ops."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import _activations
from .reference import check_activation


class Scriptable(nn.Module):
    """``name``: of the layer, in ``module`` and in what scripts it."""

    def __init__(self, module: Any, name: str) -> None:
        super().__init__()
        check_activation(type(module).__name__, module.activation)
        setattr(self, name, getattr(module, name))
        self.bn = module.bn
        self.scaling_factor = module.scaling_factor
        self.activation = _activations.module(module.activation, module.negative_slope)
        self.residual_last = module.residual_last
        self.training = module.training

    def behind(self, y: Tensor, residual: Tensor | None) -> Tensor:
        y = self.bn(y) * self.scaling_factor
        if residual is not None and not self.residual_last:
            y = y + residual
        y = self.activation(y)
        if residual is not None and self.residual_last:
            y = y + residual
        return y


class ScriptableConv(Scriptable):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.behind(self.conv(x), residual)  # type: ignore[operator]


class ScriptableTransposed(Scriptable):
    def forward(self, x: Tensor, residual: Tensor | None = None, output_size: list[int] | None = None) -> Tensor:
        return self.behind(self.conv(x, output_size), residual)  # type: ignore[operator]


class ScriptableLinear(Scriptable):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.behind(self.linear(x), residual)  # type: ignore[operator]
