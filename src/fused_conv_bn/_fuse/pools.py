"""Which nodes of a graph pool as this package's ops do: maxima of windows, and means over rows and columns."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

DEVICES = ("cuda",)
"""Where the ops are faster than PyTorch's, which they call elsewhere."""


class Pooling(NamedTuple):
    """``window``: of maxima, what F.max_pool2d takes behind its input. Else it is a mean over ``dims``; ``adaptive``:
    F.adaptive_avg_pool2d's, whose result has the memory format of its input."""

    window: tuple[Any, ...] | None = None
    dims: tuple[int, ...] = (2, 3)
    keepdim: bool = True
    adaptive: bool = False

    @property
    def is_mean(self) -> bool:
        return self.window is None

    def describe(self) -> str:
        return "mean" if self.is_mean else "max pool"

    def plain(self, x: Tensor) -> Tensor:
        """By PyTorch's own op."""
        if self.window is not None:
            return F.max_pool2d(x, *self.window)
        return F.adaptive_avg_pool2d(x, 1) if self.adaptive else torch.mean(x, self.dims, self.keepdim)


def of_module(m: nn.Module) -> Pooling | None:
    if type(m) is nn.MaxPool2d and not m.return_indices:
        return _of_window(m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)
    if type(m) is nn.AdaptiveAvgPool2d and m.output_size in (1, (1, 1), [1, 1]):
        return Pooling(adaptive=True)
    return None


def of_call(node: fx.Node) -> Pooling | None:
    """Of a function's or a method's."""
    if node.target in (F.max_pool2d, torch.max_pool2d):
        named = _named(node, "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        if named.pop("return_indices", False) is not False or "kernel_size" not in named:
            return None
        defaults = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
        if not named.keys() <= {"kernel_size", *defaults}:
            return None
        window = defaults | named
        return _of_window(*(window[name] for name in ("kernel_size", *defaults)))
    if node.target is F.adaptive_avg_pool2d:
        sizes = list(_named(node, "output_size").values())
        return Pooling(adaptive=True) if sizes in ([1], [(1, 1)], [[1, 1]]) else None
    if node.target in ("mean", torch.mean):
        named = _named(node, "dim", "keepdim")
        dims, keepdim = named.pop("dim", None), named.pop("keepdim", False)
        if named or not isinstance(dims, (list, tuple)) or not isinstance(keepdim, bool):
            return None
        return Pooling(dims=tuple(dims), keepdim=keepdim) if sorted(dims) in ([2, 3], [-2, -1]) else None
    return None


def _named(node: fx.Node, *names: str) -> dict[str, Any]:
    named = dict(zip(("input", *names), node.args, strict=False)) | node.kwargs
    named.pop("input", None)
    return named


def _of_window(kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any) -> Pooling | None:
    """Of numbers that are known."""
    stride = kernel if stride in (None, [], ()) else stride
    flat = [v for of in (kernel, stride, padding, dilation) for v in (of if isinstance(of, (list, tuple)) else [of])]
    if not all(type(v) is int for v in flat) or not isinstance(ceil_mode, bool):
        return None
    return Pooling((kernel, stride, padding, dilation, ceil_mode))
