"""FLOP formulas: what ``torch.utils.flop_counter`` counts for the convolutions in this package's ops.

Like PyTorch's own it counts the convolution's products and sums, twice the number of products, and nothing else: ops
without a convolution have no formula, as PyTorch's elementwise ops, pools and BatchNorms have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..conditions import conv_output_size
from ._later import when_imported

_ops = torch.ops.fused_conv_bn
_CONV, _DEPTHWISE, _MEAN, _GATE = range(4)


def _conv_flop(input_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # The results of the training ops are several, of which y is the first.
    result = out_shape if isinstance(out_shape, torch.Size) else out_shape[0]
    flop = 2
    for size in (result[0], *result[2:], *weight_shape):
        flop *= size
    return flop


def _gate_conv_flop(input_shape: Any, gate_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _conv_flop(input_shape, weight_shape, *args, **kwargs)


def _squeeze_flop(
    input_shape: Any, weight1_shape: Any, bias1_shape: Any, weight2_shape: Any, *args: Any, **kwargs: Any
) -> int:
    return 2 * int(input_shape[0]) * (math.prod(weight1_shape) + math.prod(weight2_shape))


def _weight_flop(
    dy_shape: Any,
    result_shape: Any,
    input_shape: Any,
    weight_shape: Any,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Of the gradient of a convolution's weight."""
    return _conv_flop(input_shape, weight_shape, out_shape=dy_shape)


def _packed_flop(input: Tensor, weight: Tensor, *args: Any, out_val: Tensor, **kwargs: Any) -> int:
    """The weight is (tiles, R, S, C, tile) of output channels or, depthwise, (R, S, C)."""
    taps = weight.shape[1] * weight.shape[2] * weight.shape[3] if weight.dim() == 5 else weight[..., 0].numel()
    return 2 * out_val.numel() * taps


def _chain_flop(inputs: Sequence[Tensor], packed: Tensor, steps: Tensor, *args: Any, **kwargs: Any) -> int:
    """The rows of ``steps`` are Step of csrc/ops/conv_packed_chain_cpu.cpp."""
    sizes: list[Sequence[int]] = [x.shape for x in inputs]
    flop = 0
    for row in steps.tolist():
        kind, x = row[0], sizes[row[1]]
        if kind == _MEAN:
            sizes.append((*x[:2], 1, 1))
        elif kind == _GATE:
            sizes.append(max(x, sizes[row[3]], key=lambda size: size[2] * size[3]))
        else:
            channels, filters, *window = row[7:17]
            kernel, stride, padding, dilation = (window[i : i + 2] for i in range(0, 8, 2))
            y = conv_output_size(x, (filters, channels, *kernel), stride, padding, dilation)
            flop += 2 * math.prod(y) * math.prod(kernel) * (1 if kind == _DEPTHWISE else channels)
            sizes.append(y)
    return flop


def _register_with(flop_counter: Any) -> None:
    formulas: list[tuple[Any, Callable[..., int], bool]] = [
        (_ops.conv_scale_shift, _conv_flop, False),
        (_ops.conv_bn_scale, _conv_flop, False),
        (_ops.conv_bn_scale_mean, _conv_flop, False),
        (_ops.gate_conv_bn_scale, _gate_conv_flop, False),
        (_ops.squeeze_excite, _squeeze_flop, False),
        (_ops.conv_bn_scale_train, _conv_flop, False),
        (_ops.conv_bn_scale_train_stats, _conv_flop, False),
        (_ops.conv_bn_scale_train_functional, _conv_flop, False),
        (_ops._conv_bn_scale_train_sums, _conv_flop, False),
        (_ops._conv_bn_wgrad, _weight_flop, False),
        (_ops._conv_packed, _packed_flop, True),
        (_ops._conv_packed_chain, _chain_flop, True),
    ]
    for op, formula, takes_tensors in formulas:
        if op not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(op, get_raw=takes_tensors)(formula)


when_imported("torch.utils.flop_counter", _register_with)  # which imports triton
