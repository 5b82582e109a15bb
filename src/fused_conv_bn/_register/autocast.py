"""What ``torch.autocast`` does to the ops with a convolution in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._conv import AUTOCAST_KEYS, autocast_dtype

_ops = torch.ops.fused_conv_bn


def _under_autocast(op: Any) -> Any:
    """The op with its convolution's input, weight and residual cast.

    Autocast is off inside, as in PyTorch's own autocast kernels. Without this the convolution inside of the op would be
    cast by itself, behind the back of what is computed from its result. A convolution's bias stays as it is: it meets
    BatchNorm's tensors alone, which are not cast either.
    """

    def run(input: Tensor, weight: Tensor, *args: Any, residual: Tensor | None = None, **kwargs: Any) -> Any:
        input, weight = input.to(autocast_dtype(input)), weight.to(autocast_dtype(weight))
        residual = None if residual is None else residual.to(autocast_dtype(residual))
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
            return op(input, weight, *args, residual=residual, **kwargs)

    return run


_library = torch.library.Library("fused_conv_bn", "IMPL")
for _name in (
    "conv_scale_shift",
    "conv_bn_scale",
    "conv_bn_scale_mean",
    "conv_bn_scale_train",
    "conv_bn_scale_train_stats",
    "conv_bn_scale_train_functional",
):
    for _key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(_name, _under_autocast(getattr(_ops, _name).default), _key)


def _squeeze_under_autocast(input: Tensor, *layers: Tensor | None, **kwargs: Any) -> Any:
    """Its convolutions with everything cast, biases too, as PyTorch's are."""
    tensors = [t if t is None else t.to(autocast_dtype(t)) for t in (input, *layers)]
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
        return _ops.squeeze_excite.default(*tensors, **kwargs)


def _gated_under_autocast(input: Tensor, gate: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    """In two steps where the convolution casts what the gate puts out: that is rounded before."""
    if not input.dtype == gate.dtype == autocast_dtype(input):
        return _ops.conv_bn_scale.default(_ops.gate.default(input, gate), weight, *args, **kwargs)
    op = _ops.gate_conv_bn_scale.default
    return _under_autocast(lambda x, w, *rest, **named: op(x, gate, w, *rest, **named))(input, weight, *args, **kwargs)


for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("gate_conv_bn_scale", _gated_under_autocast, _key)
    _library.impl("squeeze_excite", _squeeze_under_autocast, _key)
