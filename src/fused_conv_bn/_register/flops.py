"""FLOP formulas: what ``torch.utils.flop_counter`` counts for the convolutions in this package's ops.

Like PyTorch's own it counts the convolution's products and sums, twice the number of products, and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch

from ._later import when_imported

_ops = torch.ops.fused_conv_bn


def _conv_flop(input_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # The results of the training ops are several, of which y is the first.
    result = out_shape if isinstance(out_shape, torch.Size) else out_shape[0]
    flop = 2
    for size in (result[0], *result[2:], *weight_shape):
        flop *= size
    return flop


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


when_imported("torch.utils.flop_counter", _register_with)  # which imports triton
