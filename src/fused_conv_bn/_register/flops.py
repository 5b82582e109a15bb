"""FLOP formulas: what ``torch.utils.flop_counter`` counts for the convolutions in this package's ops.

Like PyTorch's own it counts the convolution's products and sums, twice the number of products, and nothing else.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import torch

_NAME = "torch.utils.flop_counter"
_ops = torch.ops.fused_conv_bn


def _conv_flop(input_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # The results of the training ops are several, of which y is the first.
    result = out_shape if isinstance(out_shape, torch.Size) else out_shape[0]
    flop = 2
    for size in (result[0], *result[2:], *weight_shape):
        flop *= size
    return flop


def _gate_conv_flop(input_shape: Any, gate_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _conv_flop(input_shape, weight_shape, *args, **kwargs)


def _register_with(flop_counter: Any) -> None:
    targets = [
        _ops.conv_scale_shift,
        _ops.conv_bn_scale,
        _ops.conv_bn_scale_train,
        _ops.conv_bn_scale_train_stats,
        _ops.conv_bn_scale_train_functional,
        _ops._conv_bn_scale_train_sums,
    ]
    flop_counter.register_flop_formula([t for t in targets if t not in flop_counter.flop_registry])(_conv_flop)
    if _ops.gate_conv_bn_scale not in flop_counter.flop_registry:
        flop_counter.register_flop_formula([_ops.gate_conv_bn_scale])(_gate_conv_flop)


class _Finder(importlib.abc.MetaPathFinder):
    """Registers the formulas when somebody imports the counter: that imports triton, which takes long."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name != _NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            _register_with(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


# Now if the counter is imported already, else when it is.
if _NAME in sys.modules:
    _register_with(sys.modules[_NAME])
else:
    sys.meta_path.insert(0, _Finder())
