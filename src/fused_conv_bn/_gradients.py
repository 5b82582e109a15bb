"""The parts of backward: what it is computed from, the gradients by the ops, and the plain formula differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import conditions, reference
from ._conv import Window, convolution_again, convolution_backward, prefers_weight_pass, without_autocast

bn_scale_backward = torch.ops.fused_conv_bn.bn_scale_backward.default._op
_conv_bn_wgrad = torch.ops.fused_conv_bn._conv_bn_wgrad.default._op
_scale_shift_ = torch.ops.fused_conv_bn.scale_shift_.default._op
_is_compiling = torch.compiler.is_compiling


def derivative_from(
    activation: str, has_residual: bool, residual_last: bool, affine: bool, residual_grad: bool
) -> tuple[bool, bool]:
    """Whether the activation's derivative is computed from its result, and whether from its input.

    affine: whether anything in front of the epilogue needs a gradient.
    """
    if activation == "none" or not (affine or (residual_grad and not residual_last)):
        return False, False
    from_result = activation in reference.FROM_RESULT and not (has_residual and residual_last)
    return from_result, not from_result


# ---- by the ops ------------------------------------------------------------------------------------------------------


class Needs(NamedTuple):
    """Which gradients are asked for."""

    input: bool
    conv_weight: bool
    conv_bias: bool
    weight: bool
    bias: bool
    residual: bool


class Affine(NamedTuple):
    """What a channel's affine is made of: BatchNorm's tensors, or a scale and a shift as weight and bias.

    ``invstd`` takes the place of ``var`` where the statistics are the batch's. Those that no gradient depends on may be
    missing.
    """

    mean: Tensor | None
    var: Tensor | None
    invstd: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    conv_bias: Tensor | None
    scaling_factor: float = 1.0
    eps: float = 0.0


def elementwise_keywords(
    needs: Needs, activation: str, negative_slope: float, residual_last: bool, has_affine: bool
) -> dict[str, Any]:
    """What bn_scale_backward is asked for, by keyword; empty if there is nothing to compute.

    What is not asked for is not passed: arguments cost time.
    """
    named: dict[str, Any] = {}
    if needs.weight:
        named["needs_weight"] = True
    if needs.bias:
        named["needs_bias"] = True
    if needs.conv_bias:
        named["needs_conv_bias"] = True
    derives = activation != "none"
    dv_is_asked_for = needs.residual and derives and not residual_last
    needs_z = needs.input or needs.conv_weight
    if not (named or dv_is_asked_for or (needs_z and (has_affine or derives))):
        return named
    if needs_z:
        named["needs_input"] = True
    # Without an affine dz is dv.
    if dv_is_asked_for and (has_affine or not needs_z):
        named["needs_residual"] = True
    if derives:
        named["activation"] = activation
    if activation == "leaky_relu":
        named["negative_slope"] = negative_slope
    return named


def backward(
    dy: Tensor,
    input: Tensor | None,
    conv_weight: Tensor | None,
    window: Window,
    allow_tf32: bool,
    affine: Affine,
    result: Tensor | None,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    residual_last: bool,
    needs: Needs,
    input_sums: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients that ``needs`` asks for, in its order.

    ``input`` is that of the convolution, or what the affine is applied to where ``conv_weight`` is None. ``residual``
    and ``result`` are there where the activation's derivative takes them. Every call and tuple here shows in a small
    step's time.
    """
    needs_input, needs_conv_weight, _, needs_weight, _, needs_residual = needs
    if conv_weight is not None and (needs_conv_weight or needs_weight) and not _is_compiling():
        assert input is not None
        if prefers_weight_pass(dy, input, conv_weight, window, affine.invstd is not None, needs_input):
            return weight_pass(
                *(dy, input, conv_weight, window, allow_tf32, affine, result, residual),
                *(activation, negative_slope, residual_last, needs, input_sums),
            )
    dx = dw = dr = None
    needs_z = needs_input or needs_conv_weight
    derives = activation != "none"
    has_affine = affine.mean is not None or affine.weight is not None
    if needs_residual and (residual_last or not derives):
        dr = dy
    named = elementwise_keywords(needs, activation, negative_slope, residual_last, has_affine)
    with without_autocast():
        if not named:
            dz, dg, db, dcb = dy if needs_z else None, None, None, None
        else:
            z = None
            if needs_weight or (derives and result is None) or (needs_z and affine.invstd is not None):
                z = input
                if conv_weight is not None:
                    assert input is not None
                    z = convolution_again(input, conv_weight, window, allow_tf32)
            dz, dg, db, dcb, dv = elementwise_backward()(dy, z, result, residual, *affine, **named)
            del z  # its memory is the convolution's
            if needs_residual and dr is None:
                dr = dz if dv is None else dv
        if needs_z and conv_weight is not None:
            assert dz is not None and input is not None
            dx, dw = convolution_backward(dz, input, conv_weight, window, needs_input, needs_conv_weight)
        else:
            dx = dz
    return dx, dw, dcb, dg, db, dr


def elementwise_backward() -> Callable[..., Any]:
    """bn_scale_backward. torch.compile gets PyTorch's ops, and fuses them with what is around them."""
    return reference.bn_scale_backward if _is_compiling() else bn_scale_backward


def weight_pass(
    dy: Tensor,
    input: Tensor,
    conv_weight: Tensor,
    window: Window,
    allow_tf32: bool,
    affine: Affine,
    result: Tensor | None,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    residual_last: bool,
    needs: Needs,
    input_sums: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The same where the weight's gradient and BatchNorm's come from one pass over dy and the input.

    It takes the activation's derivative along where the result tells it and nothing else wants it. The gradient of the
    convolution's result is a channel's factor times something: the factor goes into the weight that takes it to the
    input's gradient.
    """
    dx = dr = z = None
    dv = dy
    derives = activation != "none"
    trains = affine.invstd is not None
    with without_autocast():
        dv_is_asked_for = needs.input or (needs.residual and not residual_last)
        if derives and (result is None or dv_is_asked_for):
            if result is None:
                z = convolution_again(input, conv_weight, window, allow_tf32)
            *_, dv = elementwise_backward()(
                *(dy, z, result, residual, *affine),
                activation=activation,
                negative_slope=negative_slope,
                needs_residual=True,
            )
            derives = False
        if needs.residual:
            dr = dy if residual_last else dv
        dw, dg, db, dcb, scaled_weight, scale, shift = _conv_bn_wgrad(
            *(dv, result if derives else None, input, conv_weight, affine.conv_bias, affine.mean),
            *(affine.invstd if trains else affine.var, affine.weight, affine.scaling_factor, affine.eps, *window),
            activation=activation if derives else "none",
            has_statistics=trains,
            needs_conv_weight=needs.conv_weight,
            needs_input=needs.input,
            input_sums=input_sums,
        )
        if needs.input:
            dz = dv
            if trains:
                dz = convolution_again(input, conv_weight, window, allow_tf32) if z is None else z
                _scale_shift_(dz, scale, shift, residual=dv)
            del z, dv  # their memory is the convolution's
            dx, _ = convolution_backward(dz, input, scaled_weight, window, True, False)
    return (
        dx,
        dw if needs.conv_weight else None,
        dcb if needs.conv_bias else None,
        dg if needs.weight else None,
        db if needs.bias else None,
        dr,
    )


# ---- by the formula --------------------------------------------------------------------------------------------------


def parameter_dtype(mean: Tensor, weight: Tensor | None) -> torch.dtype:
    """That of BatchNorm's bias."""
    return mean.dtype if weight is None else weight.dtype


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
            gradient = reference.FROM_RESULT[activation](dy, result)
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
