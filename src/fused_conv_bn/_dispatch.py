"""What a function of this package runs for the tensors that it is given, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from . import conditions

_PLAIN_TENSORS = conditions.PLAIN_TENSORS
_TENSORS = _PLAIN_TENSORS - {type(None)}
_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled

# What runs: the op itself, the op with a derivative, or its twin of PyTorch's ops.
RAW, GRAD, TWIN = range(3)


def way_of(op: str, names: tuple[str, ...], required: tuple[Any, ...], optional: tuple[Any, ...]) -> int:
    """What is to run for these tensors. Raises TypeError for what is no tensor.

    Those that most often require a gradient come first in ``optional``, which is asked first.
    """
    asks = _is_grad_enabled()  # until one tensor requires a gradient
    way = RAW
    for t in optional:
        if type(t) not in _PLAIN_TENSORS:
            return _unusual(op, names, required, optional)
        if asks and t is not None and t.requires_grad:
            way, asks = GRAD, False
    for t in required:
        if type(t) not in _TENSORS:
            return _unusual(op, names, required, optional)
        if asks and t.requires_grad:
            way, asks = GRAD, False
    if _transforms_active() or forward_ad._current_level >= 0 or _tracing_state() is not None:
        return TWIN
    if conditions.is_exporting() and _is_compiling():
        return RAW if conditions.exports_ops() else TWIN
    return way


def _unusual(op: str, names: tuple[str, ...], required: tuple[Any, ...], optional: tuple[Any, ...]) -> int:
    """The same where a tensor is of another class. Its class has the derivative then."""
    tensors = (*required, *optional)
    if any(isinstance(t, torch.fx.Proxy) for t in tensors):
        return RAW
    for i, (name, t) in enumerate(zip(names, tensors, strict=True)):
        check_tensor(op, name, t, may_be_none=i >= len(required))
    if conditions.exports_ops():
        return RAW
    grad = _is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return TWIN if grad or conditions.transformed() or conditions.is_exporting() else RAW


of_dtensors: Callable[..., Any] | None = None
"""Calls a twin, or for DTensors the function on their parts; _register/sharding.py sets it when there may be some."""


def twin(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``plain``, of :mod:`.reference`, computes, differentiably."""
    if of_dtensors is None or _is_compiling():
        return plain(*args, **kwargs)
    return of_dtensors(plain, args, kwargs)


def check_tensor(op: str, name: str, value: Any, may_be_none: bool = False) -> None:
    """Raises TypeError for what is no tensor."""
    if not (isinstance(value, Tensor) or (value is None and may_be_none)):
        what = "None" if value is None else f"of type {type(value).__name__}"
        raise TypeError(f"{op}: {name} is {what}, expected a tensor{' or None' if may_be_none else ''}")


def keywords(
    residual: Tensor | None, activation: str, negative_slope: float, residual_last: bool, allow_tf32: bool = False
) -> dict[str, Any]:
    """The arguments that matter (each costs time to pass), and those of wrong types, which the op refuses."""
    named: dict[str, Any] = {}
    if residual is not None:
        named["residual"] = residual
    if residual_last:
        named["residual_last"] = residual_last
    if activation != "none":
        named["activation"] = activation
    if activation == "leaky_relu" or type(negative_slope) is not float:
        named["negative_slope"] = negative_slope
    if allow_tf32:
        named["allow_tf32"] = allow_tf32
    return named


def refuse_grad(op: str, **tensors: Tensor | None) -> None:
    if forward_ad._current_level >= 0:
        for name, tensor in tensors.items():
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(
                    f"{op}: {name} has a forward-mode tangent, and {op} writes its result to memory without a "
                    f"derivative: call the function that returns a new tensor"
                )
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {name} requires grad, and {op} keeps no autograd graph: call it under torch.no_grad() or pass "
                f"{name}.detach(), or call the function that returns a new tensor"
            )


def require_grad(mean: Tensor | None, var: Tensor | None) -> bool:
    """PyTorch's ops are to refuse it then."""
    return (mean is not None and mean.requires_grad) or (var is not None and var.requires_grad)


def written(*tensors: Tensor | None) -> None:
    if _is_compiling():
        return  # what was copied there has a new version
    for tensor in tensors:
        if tensor is not None:
            increment_version(tensor)
