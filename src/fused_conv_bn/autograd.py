"""The ops with a derivative: autograd Functions above the dispatcher, around the fused forward.

Each Function covers its op with and without the convolution in front of it (``conv_weight`` is None then). Backward is
``bn_scale_backward``, which is one op for all of them, then ``convolution_backward`` (:func:`._gradients.backward`).

Memory is never above eager's, which keeps the convolution's input and result, and an activation's input or result.

- Where a convolution has few terms (:func:`._conv.keeps_result`), its result is not kept: backward convolves again.
- Elsewhere PyTorch's convolution runs, a node of the graph like any other, and the Function covers what follows.
- An activation's derivative comes from the result for relu, sigmoid and tanh. For the others backward computes the
  activation's input again, so that results may be written to in place after them, as eager allows.

With grad mode on in backward (``create_graph``) the plain formula is differentiated: second derivatives are right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from . import reference
from ._conv import (
    NO_WINDOW,
    Window,
    as_autocast,
    autocast_dtype,
    keeps_result,
    leaves_input_sums,
    without_autocast,
)
from ._dispatch import keywords
from ._gradients import (
    Affine,
    Needs,
    backward,
    bn_scale_backward,
    derivative_from,
    differentiates_formula,
    elementwise_keywords,
    formula_backward,
    parameter_dtype,
)
from ._memory import out_of_memory
from ._together import cast_weight

_ops = torch.ops.fused_conv_bn
# Looked up once. torch.compile knows an op by these; their ``_op`` is what they call, and quicker to call.
_bn_scale, _conv_bn_scale = _ops.bn_scale.default, _ops.conv_bn_scale.default
_scale_shift, _conv_scale_shift = _ops.scale_shift.default, _ops.conv_scale_shift.default
_bn_stats, _conv_bn_stats = _ops.bn_scale_train_stats.default._op, _ops.conv_bn_scale_train_stats.default._op
_conv_bn_sums = _ops._conv_bn_scale_train_sums.default._op
_bn_functional = _ops.bn_scale_train_functional.default
_conv_bn_functional = _ops.conv_bn_scale_train_functional.default
_is_compiling = torch.compiler.is_compiling
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled

Epilogue: TypeAlias = tuple[Tensor | None, str, float, bool]
"""residual, activation, negative_slope, residual_last."""

BatchNorm: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None, float, float]
"""running_mean, running_var, weight, bias, scaling_factor, eps."""

TrainedBatchNorm: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, float, float]
"""The same with momentum before eps. The running statistics may be None."""


def _residual_gradient(dy: Tensor, result: Tensor | None, activation: str) -> Tensor:
    """Where it alone is asked for, and nothing in front of the epilogue was saved."""
    return dy if result is None else reference.FROM_RESULT[activation](dy, result)


# ---- BatchNorm in evaluation -----------------------------------------------------------------------------------------


class _BnScale(Function):
    """bn_scale, and conv_bn_scale."""

    @staticmethod
    def forward(
        input: Tensor,
        conv_weight: Tensor | None,
        conv_bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        numbers: tuple[Any, ...],
    ) -> Tensor:
        factor, eps, window, activation, slope, last, allow_tf32, compiling = numbers
        named = keywords(residual, activation, slope, last, allow_tf32 and conv_weight is not None)
        if conv_weight is None:
            op = _bn_scale if compiling else _bn_scale._op
            return op(input, running_mean, running_var, weight, bias, factor, eps, **named)
        op = _conv_bn_scale if compiling else _conv_bn_scale._op
        bn = running_mean, running_var, weight, bias, factor, eps
        return op(input, conv_weight, conv_bias, *bn, *window, **named)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, conv_weight, conv_bias, mean, var, weight, bias, residual = inputs[:8]
        needs = ctx.needs_input_grad
        ctx.numbers = numbers = inputs[8]
        activation, residual_last = numbers[3], numbers[5]
        affine = needs[0] or needs[1] or needs[2] or needs[5] or needs[6]
        from_result, from_input = derivative_from(activation, residual is not None, residual_last, affine, needs[7])
        # Of BatchNorm the gradient of the input alone needs no input, and that of the bias nothing.
        keeps = needs[5] or from_input or (conv_weight is not None and (needs[0] or needs[1]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(  # in the order of bn_scale_backward's arguments
            input if keeps else None,
            output if from_result else None,
            residual if from_input and not residual_last else None,
            mean if affine or from_input else None,
            var if affine or from_input else None,
            None,
            weight if affine or from_input else None,
            bias if from_input else None,
            conv_bias if keeps else None,
            conv_weight if keeps else None,
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return (None,) * 9
        input, result, residual, mean, var, _, weight, bias, conv_bias, conv_weight = ctx.saved_tensors
        factor, eps, window, activation, slope, last, allow_tf32, _ = ctx.numbers
        needs = Needs(*ctx.needs_input_grad[:3], *ctx.needs_input_grad[5:8])
        if mean is None:  # the residual's alone
            return *(None,) * 7, _residual_gradient(dy, result, activation), None
        if differentiates_formula(dy):
            # No gradient depends on the values of what is zero here, unless an activation's does, which kept them.
            b, cb = bias, conv_bias
            if needs.bias and b is None:
                b = mean.new_zeros(mean.shape, dtype=parameter_dtype(mean, weight))
            if needs.conv_bias and cb is None:
                cb = mean.new_zeros(mean.shape, dtype=dy.dtype)

            def formula(x: Any, w: Any, cb: Any, g: Any, b: Any) -> Tensor:
                if w is not None:
                    z = reference.convolution(x, w, cb, *window)
                else:
                    z = x if cb is None else x + reference.per_channel(cb, x.dim())
                return reference.scaled(reference.batch_norm(z, mean, var, g, b, False, 0.0, eps), factor)

            (dx, dw, dcb, dg, db), dr = formula_backward(
                formula,
                (torch.zeros_like(dy) if input is None else input, conv_weight, cb, weight, b),
                needs[:5],
                *(residual, result, dy, needs.residual, activation, slope, last),
            )
        else:
            affine = Affine(mean, var, None, weight, bias, conv_bias, factor, eps)
            dx, dw, dcb, dg, db, dr = backward(
                dy, input, conv_weight, window, allow_tf32, affine, result, residual, activation, slope, last, needs
            )
        return dx, dw, dcb, None, None, dg, db, dr, None


# ---- an affine per channel -------------------------------------------------------------------------------------------


class _ScaleShift(Function):
    """scale_shift, and conv_scale_shift."""

    @staticmethod
    def forward(
        input: Tensor,
        conv_weight: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        numbers: tuple[Any, ...],
    ) -> Tensor:
        window, activation, slope, last, allow_tf32, compiling = numbers
        named = keywords(residual, activation, slope, last, allow_tf32 and conv_weight is not None)
        if conv_weight is None:
            op = _scale_shift if compiling else _scale_shift._op
            return op(input, scale, shift, **named)
        op = _conv_scale_shift if compiling else _conv_scale_shift._op
        return op(input, conv_weight, scale, shift, *window, **named)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, conv_weight, scale, shift, residual = inputs[:5]
        needs = ctx.needs_input_grad
        ctx.numbers = numbers = inputs[5]
        activation, residual_last = numbers[1], numbers[3]
        affine = needs[0] or needs[1] or needs[2] or needs[3]
        from_result, from_input = derivative_from(activation, residual is not None, residual_last, affine, needs[4])
        keeps = needs[2] or from_input or (conv_weight is not None and (needs[0] or needs[1]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            input if keeps else None,
            conv_weight if keeps else None,
            scale if keeps or needs[0] else None,
            shift if from_input else None,
            residual if from_input and not residual_last else None,
            output if from_result else None,
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return (None,) * 6
        input, conv_weight, scale, shift, residual, result = ctx.saved_tensors
        window, activation, slope, last, allow_tf32, _ = ctx.numbers
        needs_x, needs_w, needs_scale, needs_shift, needs_r = ctx.needs_input_grad[:5]
        if differentiates_formula(dy):
            b = shift
            if needs_shift and b is None:
                b = dy.new_zeros(dy.size(1), dtype=reference.wide(dy.dtype))

            def formula(x: Any, w: Any, scale: Any, shift: Any) -> Tensor:
                z = x if w is None else reference.convolution(x, w, None, *window)
                return reference.scale_shift(z, scale, shift)

            (dx, dw, dscale, dshift), dr = formula_backward(
                formula,
                (torch.zeros_like(dy) if input is None else input, conv_weight, scale, b),
                (needs_x, needs_w, needs_scale, needs_shift),
                *(residual, result, dy, needs_r, activation, slope, last),
            )
        else:
            affine = Affine(None, None, None, scale, shift, None)
            needs = Needs(needs_x, needs_w, False, needs_scale, needs_shift, needs_r)
            dx, dw, _, dscale, dshift, dr = backward(
                dy, input, conv_weight, window, allow_tf32, affine, result, residual, activation, slope, last, needs
            )
        return dx, dw, dscale, dshift, dr, None


# ---- BatchNorm in training -------------------------------------------------------------------------------------------


class _BnScaleTrain(Function):
    """bn_scale_train, and conv_bn_scale_train: (y, mean, invstd), with the running statistics updated in place.

    functional: they are left alone, and the updated ones are two more results.
    """

    @staticmethod
    def forward(
        input: Tensor,
        conv_weight: Tensor | None,
        conv_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        numbers: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        factor, eps, window, activation, slope, last, allow_tf32, functional, momentum = numbers
        named = keywords(residual, activation, slope, last, allow_tf32 and conv_weight is not None)
        op: Any
        if conv_weight is None:
            op = _bn_functional if functional else _bn_stats
            return op(input, running_mean, running_var, weight, bias, factor, momentum, eps, **named)
        op = _conv_bn_functional
        if not functional:
            op = _conv_bn_sums if leaves_input_sums(input, conv_weight) else _conv_bn_stats
        bn = running_mean, running_var, weight, bias, factor, momentum, eps
        return op(input, conv_weight, conv_bias, *bn, *window, **named)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, conv_weight, conv_bias, _, _, weight, bias, residual = inputs[:8]
        needs = ctx.needs_input_grad
        ctx.numbers = numbers = inputs[8]
        activation, residual_last = numbers[3], numbers[5]
        affine = needs[0] or needs[1] or needs[2] or needs[5] or needs[6]
        from_result, from_input = derivative_from(activation, residual is not None, residual_last, affine, needs[7])
        keeps = affine or from_input
        ctx.set_materialize_grads(False)
        if numbers[7]:
            ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(  # in the order of bn_scale_backward's arguments
            input if keeps else None,
            output[0] if from_result else None,
            residual if from_input and not residual_last else None,
            output[1] if keeps else None,
            None,
            output[2] if keeps else None,
            weight if keeps else None,
            bias if from_input else None,
            None,
            conv_weight if keeps else None,
            output[3] if len(output) == 4 and output[3].numel() > 0 and (needs[1] or needs[5]) else None,
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *statistics: Any) -> Any:
        if dy is None:
            return (None,) * 9
        input, result, residual, mean, _, invstd, weight, bias, _, conv_weight, sums = ctx.saved_tensors
        factor, eps, window, activation, slope, last, allow_tf32, _, _ = ctx.numbers
        needs_x, needs_w, needs_cb, _, _, needs_g, needs_b, needs_r, _ = ctx.needs_input_grad
        if mean is None:  # the residual's alone
            return *(None,) * 7, _residual_gradient(dy, result, activation), None
        # The batch's mean takes the bias away again.
        zeros = mean.new_zeros(mean.shape, dtype=dy.dtype) if needs_cb else None
        if differentiates_formula(dy):
            b = bias
            if needs_b and b is None:
                b = mean.new_zeros(mean.shape, dtype=parameter_dtype(mean, weight))

            def formula(x: Any, w: Any, cb: Any, g: Any, b: Any) -> Tensor:
                z = x if w is None else reference.convolution(x, w, cb, *window)
                return reference.scaled(reference.batch_norm(z, None, None, g, b, True, 0.0, eps), factor)

            (dx, dw, dcb, dg, db), dr = formula_backward(
                formula,
                (input, conv_weight, zeros, weight, b),
                (needs_x, needs_w, needs_cb, needs_g, needs_b),
                *(residual, result, dy, needs_r, activation, slope, last),
            )
        else:
            affine = Affine(mean, None, invstd, weight, bias, None, factor, eps)
            needs = Needs(needs_x, needs_w, False, needs_g, needs_b, needs_r)
            dx, dw, _, dg, db, dr = backward(
                *(dy, input, conv_weight, window, allow_tf32, affine, result, residual),
                *(activation, slope, last, needs, sums),
            )
            dcb = zeros
        return dx, dw, dcb, None, None, dg, db, dr, None


# ---- the functions ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _asked_for(needs: tuple[bool, ...], activation: str, negative_slope: float, last: bool) -> dict[str, Any]:
    """What bn_scale_backward gets by keyword. ``needs``: of the inputs of a Function of BatchNorm."""
    return elementwise_keywords(Needs(*needs[:3], *needs[5:8]), activation, negative_slope, last, True)


def _eager(function: type[Function]) -> Callable[..., Tensor]:
    """``function.apply`` outside of torch.compile: returns its first result alone.

    Function.apply inspects forward's signature at every call, which takes longer than the rest; what it calls in the
    end is the base class's. And a forward that takes ctx needs not return what it saves.

    Every call, tuple and attribute here and in forward and setup_context shows in a small call's time: one class and
    one non-tensor argument for all settings, nothing asked twice. Backward of most calls is one op, whose arguments
    forward has put together.
    """
    derivative: Any = function
    run, setup_context, general = derivative.forward, derivative.setup_context, derivative.backward
    is_norm = function is not _ScaleShift

    def forward(ctx: Any, *inputs: Any) -> Tensor:
        has_conv = inputs[1] is not None
        if has_conv and _is_any_autocast_enabled():  # a convolution, whose arguments were cast
            with without_autocast():
                output = run(*inputs)
        else:
            output = run(*inputs)
        setup_context(ctx, inputs, output)
        needs = ctx.needs_input_grad
        ctx.asked_for = _asked_for(needs, *inputs[8][3:6]) if is_norm and needs[0] and not has_conv else None
        return output[0] if type(output) is tuple else output

    def backward(ctx: Any, dy: Tensor | None) -> Any:
        asked_for = ctx.asked_for
        try:
            if asked_for is None or dy is None or differentiates_formula(dy) or _is_compiling():
                return general(ctx, dy)
            numbers = ctx.numbers
            dz, dg, db, _, dr = bn_scale_backward(dy, *ctx.saved_tensors[:9], numbers[0], numbers[1], **asked_for)
        except RuntimeError as error:
            if (found := out_of_memory(error, dy)) is None:
                raise
            raise found from None
        if dr is None and ctx.needs_input_grad[7]:
            dr = dy
        return dz, None, None, None, None, dg, db, dr, None

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    eager = type(function.__name__.lstrip("_"), (Function,), members)
    return super(Function, eager).apply  # type: ignore[misc]


def _apply_compiled(function: type[Function], *inputs: Any) -> Any:
    """``function.apply`` inside of torch.compile, with aliases of what comes twice, as an input that is the residual.

    Of a tensor that comes twice torch 2.11 loses a gradient without an error, and torch 2.14 refuses it.
    """
    distinct: list[Any] = []
    for x in inputs:
        twice = isinstance(x, Tensor) and any(x is other for other in distinct)
        distinct.append(x.view_as(x) if twice else x)
    return function.apply(*distinct)


_apply_bn_scale = _eager(_BnScale)
_apply_scale_shift = _eager(_ScaleShift)
_apply_bn_scale_train = _eager(_BnScaleTrain)


def _is_kept_apart(activation: str, residual_last: bool, *tensors: Tensor | None) -> bool:
    """Whether eager keeps the activation's input and nothing else: an op of its own for the activation does as well.

    To compute that input again takes two tensors, what the residual is added to and the residual. Eager has the former
    as well if one of ``tensors`` needs a gradient.
    """
    if residual_last or activation == "none" or activation in reference.FROM_RESULT:
        return False
    return not any(t is not None and t.requires_grad for t in tensors)


def _convolved(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    window: Window,
    backward_needs_result: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(input, conv_weight, conv_bias, residual) of the Function: after PyTorch's convolution where its result is kept.

    Where autocast casts a convolution's arguments, these are cast. PyTorch's convolution of 16 bits takes no bias of
    float32.
    """
    conv_weight = cast_weight(conv_weight)
    if keeps_result(input, conv_weight, window[3], backward_needs_result):
        if residual is not None:
            (residual,) = as_autocast(residual)
        if conv_bias is not None and conv_bias.dtype == reference.wide(dtype := autocast_dtype(input)):
            conv_bias = conv_bias.to(dtype)
        return reference.convolution(input, conv_weight, conv_bias, *window), None, None, residual
    if not _is_any_autocast_enabled():
        return input, conv_weight, conv_bias, residual
    cast: Any = as_autocast(input, conv_weight, residual)
    return cast[0], cast[1], conv_bias, cast[2]


def _needs_result(conv_weight: Tensor, gain: Tensor | None, activation: str) -> bool:
    """Whether backward needs what an affine is applied to, in evaluation. gain: BatchNorm's weight, or the scale.

    Not of a first layer, which has a kernel of its own: who forgets no_grad() in inference is to have it too.
    """
    if conv_weight.shape[1] <= 8:
        return False
    return (gain is not None and gain.requires_grad) or activation not in ("none", *reference.FROM_RESULT)


def _gains_when_compiled(conv_weight: Tensor | None) -> bool:
    """Whether a training step in torch.compile is faster with our forward than as PyTorch's ops.

    The compiler fuses those of backward with what is around them, and does it best with its own forward. On an H200 the
    3x3 convolution of problem 73 takes 1.17 to 1.26 times as long without ours, and four layers of ResNet-50, among
    them its 7x7, took 1.02 to 1.13 times as long with it.
    """
    return conv_weight is not None and conv_weight.shape[1] <= 8 and conv_weight[0, 0].numel() <= 9


def bn_scale(
    input: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    bn: BatchNorm,
    window: Window,
    epilogue: Epilogue,
    allow_tf32: bool = False,
) -> Tensor:
    """:func:`fused_conv_bn.conv_bn_scale` with a gradient, or :func:`fused_conv_bn.bn_scale`."""
    running_mean, running_var, weight, bias, scaling_factor, eps = bn
    residual, activation, negative_slope, residual_last = epilogue
    if residual is not None and _is_kept_apart(activation, residual_last, input, conv_weight, conv_bias, weight, bias):
        y = bn_scale(input, conv_weight, conv_bias, bn, window, (residual, "none", 0.01, False), allow_tf32)
        return reference.activate(y, activation, negative_slope)
    if conv_weight is not None:
        needs = _needs_result(conv_weight, weight, activation)
        input, conv_weight, conv_bias, residual = _convolved(input, conv_weight, conv_bias, residual, window, needs)
    compiling = _is_compiling()
    apply = functools.partial(_apply_compiled, _BnScale) if compiling else _apply_bn_scale
    return apply(
        input,
        conv_weight,
        conv_bias,
        running_mean,
        running_var,
        weight,
        bias,
        residual,
        (scaling_factor, eps, window, activation, negative_slope, residual_last, allow_tf32, compiling),
    )


def scale_shift(
    input: Tensor,
    conv_weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    window: Window,
    epilogue: Epilogue,
    allow_tf32: bool = False,
) -> Tensor:
    """:func:`fused_conv_bn.conv_scale_shift` with a gradient, or :func:`fused_conv_bn.scale_shift`."""
    residual, activation, negative_slope, residual_last = epilogue
    if residual is not None and _is_kept_apart(activation, residual_last, scale):
        y = scale_shift(input, conv_weight, scale, shift, window, (residual, "none", 0.01, False), allow_tf32)
        return reference.activate(y, activation, negative_slope)
    if conv_weight is not None:
        needs = _needs_result(conv_weight, scale, activation)
        input, conv_weight, _, residual = _convolved(input, conv_weight, None, residual, window, needs)
    compiling = _is_compiling()
    apply = functools.partial(_apply_compiled, _ScaleShift) if compiling else _apply_scale_shift
    return apply(
        input,
        conv_weight,
        scale,
        shift,
        residual,
        (window, activation, negative_slope, residual_last, allow_tf32, compiling),
    )


def bn_scale_train(
    input: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    bn: TrainedBatchNorm,
    window: Window,
    epilogue: Epilogue,
    allow_tf32: bool = False,
) -> Tensor:
    """:func:`fused_conv_bn.conv_bn_scale_train` with a gradient, or :func:`fused_conv_bn.bn_scale_train`."""
    running_mean, running_var, weight, bias, scaling_factor, momentum, eps = bn
    residual, activation, negative_slope, residual_last = epilogue
    if _is_compiling() and not _gains_when_compiled(conv_weight):
        named = keywords(*epilogue)
        if conv_weight is None:
            return reference.bn_scale_train(input, *bn, **named)
        return reference.conv_bn_scale_train(input, conv_weight, conv_bias, *bn, *window, **named)
    if residual is not None and _is_kept_apart(activation, residual_last, input, conv_weight, conv_bias, weight, bias):
        y = bn_scale_train(input, conv_weight, conv_bias, bn, window, (residual, "none", 0.01, False), allow_tf32)
        return reference.activate(y, activation, negative_slope)
    if conv_weight is not None:
        input, conv_weight, conv_bias, residual = _convolved(input, conv_weight, conv_bias, residual, window, True)
    compiling = _is_compiling()
    apply = functools.partial(_apply_compiled, _BnScaleTrain) if compiling else _apply_bn_scale_train
    result: Any = apply(
        input,
        conv_weight,
        conv_bias,
        running_mean,
        running_var,
        weight,
        bias,
        residual,
        (scaling_factor, eps, window, activation, negative_slope, residual_last, allow_tf32, compiling, momentum),
    )
    if compiling and running_mean is not None and running_var is not None:
        running_mean.copy_(result[3])
        running_var.copy_(result[4])
    return result[0] if compiling else result


def functional_train(
    input: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scaling_factor: float,
    momentum: float,
    eps: float,
    window: Window = NO_WINDOW,
    *,
    allow_tf32: bool = False,
    **epilogue: Any,
) -> Tensor:
    """The same without a gradient, for torch.compile.

    The ops that write to the running statistics are not functionalised everywhere: not where none are given, and not
    inside of a nested compile region.
    """
    bn = running_mean, running_var, weight, bias, scaling_factor, momentum, eps
    if conv_weight is None:
        results = _bn_functional(input, *bn, **epilogue)
    else:
        results = _conv_bn_functional(input, conv_weight, conv_bias, *bn, *window, allow_tf32=allow_tf32, **epilogue)
    if running_mean is not None and running_var is not None:
        running_mean.copy_(results[3])
        running_var.copy_(results[4])
    return results[0]
