"""The parts of backward: the activations' derivatives, BatchNorm's gradients, and the plain formula differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import conditions, reference
from ._conv import without_autocast

_aten = torch.ops.aten
_is_compiling = torch.compiler.is_compiling

# ---- activations -----------------------------------------------------------------------------------------------------

FROM_RESULT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, y: _aten.threshold_backward(dy, y, 0),
    "sigmoid": _aten.sigmoid_backward,
    "tanh": _aten.tanh_backward,
}
"""The gradient of an activation's input from that of its result, and the result."""

_FROM_INPUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, x: _aten.threshold_backward(dy, x, 0),
    "relu6": lambda dy, x: _aten.hardtanh_backward(dy, x, 0.0, 6.0),
    "silu": _aten.silu_backward,
    "hardswish": _aten.hardswish_backward,
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda dy, x: _aten.gelu_backward(dy, x, approximate="tanh"),
    "sigmoid": lambda dy, x: _aten.sigmoid_backward(dy, torch.sigmoid(x)),
    "hardsigmoid": _aten.hardsigmoid_backward,
    "mish": _aten.mish_backward,
    "tanh": lambda dy, x: _aten.tanh_backward(dy, torch.tanh(x)),
}
"""The same from the activation's input. ``leaky_relu`` is not in it: it takes a slope."""


def activation_backward(dy: Tensor, x: Tensor, activation: str, negative_slope: float) -> Tensor:
    if activation == "leaky_relu":
        return _aten.leaky_relu_backward(dy, x, negative_slope, False)
    return _FROM_INPUT[activation](dy, x)


def derivative_from(
    activation: str, has_residual: bool, residual_last: bool, affine: bool, residual_grad: bool
) -> tuple[bool, bool]:
    """Whether the activation's derivative is computed from its result, and whether from its input.

    affine: whether anything in front of the epilogue needs a gradient.
    """
    if activation == "none" or not (affine or (residual_grad and not residual_last)):
        return False, False
    from_result = activation in FROM_RESULT and not (has_residual and residual_last)
    return from_result, not from_result


# ---- BatchNorm -------------------------------------------------------------------------------------------------------


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def effective(weight: Tensor | None, scaling_factor: float, like: Tensor) -> Tensor | None:
    """BatchNorm's weight with the factor in it, so that the factor costs no pass over memory."""
    if weight is None:
        return None if scaling_factor == 1.0 else torch.full_like(like, scaling_factor)
    weight = weight.to(like.dtype)
    return weight if scaling_factor == 1.0 else weight * scaling_factor


def scaled(gradient: Tensor | None, scaling_factor: float) -> Tensor | None:
    return gradient if gradient is None or scaling_factor == 1.0 else gradient * scaling_factor


def parameter_dtype(mean: Tensor, weight: Tensor | None) -> torch.dtype:
    """That of BatchNorm's bias."""
    return mean.dtype if weight is None else weight.dtype


def to_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def differentiates_formula(dy: Tensor) -> bool:
    """Whether backward is itself differentiated or transformed, or has nothing to compute on."""
    if _is_compiling():
        return False
    return torch.is_grad_enabled() or conditions.transformed() or dy.numel() == 0


def formula_backward(
    affine: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    residual: Tensor | None,
    result: Tensor | None,
    dy: Tensor,
    needs_residual: bool,
    activation: str,
    negative_slope: float,
    residual_last: bool,
) -> tuple[list[Tensor | None], Tensor | None]:
    """The gradients of ``inputs`` and of the residual by differentiating ``affine(*inputs)`` and the epilogue.

    ``result`` is given where the activation's derivative is computed from it. The residual is given only where the
    derivative depends on it.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast():
        # An alias of each, since one tensor may be two of the inputs.
        mine = [None if t is None else t.view_as(t) if t.requires_grad else t.detach() for t in inputs]
        for t, need in zip(mine, needs, strict=True):
            if t is not None and need and not t.requires_grad:
                t.requires_grad_()
        y = affine(*mine)
        add: Tensor | None = None
        gradient = dy
        if result is not None:
            gradient = FROM_RESULT[activation](dy, result)
        elif activation != "none":
            if residual is not None and not residual_last:
                add = residual.view_as(residual) if residual.requires_grad else residual.detach().requires_grad_()
                y = y + add
            y = reference.activate(y, activation, negative_slope)
        wanted = [t for t, need in zip(mine, needs, strict=True) if need and t is not None]
        if add is not None and needs_residual:
            wanted.append(add)
        got = iter(
            torch.autograd.grad(y, wanted, gradient, create_graph=create_graph, allow_unused=True) if wanted else ()
        )
    gradients = [next(got) if need and t is not None else None for t, need in zip(mine, needs, strict=True)]
    if not needs_residual:
        return gradients, None
    if residual_last:
        return gradients, dy
    return gradients, next(got) if add is not None else gradient


def affine_backward(
    dv: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    batch_mean: Tensor | None,
    batch_invstd: Tensor | None,
    eps: float,
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of BatchNorm's input, weight and bias. Without ``z`` the weight's is not to be asked for."""
    trains = batch_mean is not None
    dtype = wide(dv.dtype)
    # CUDA's kernel wants tensors there, as its forward leaves them, and makes gradients in the weight's likeness.
    if batch_mean is None:
        batch_mean = batch_invstd = dv.new_empty(0, dtype=dtype)
    if weight is None and (mask[1] or mask[2]):
        weight = torch.ones(dv.size(1), dtype=dtype, device=dv.device)
    return _aten.native_batch_norm_backward(
        dv, dv if z is None else z, weight, mean, var, batch_mean, batch_invstd, trains, eps, mask
    )
