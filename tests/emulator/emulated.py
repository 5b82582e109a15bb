"""Ops by their CUDA kernels, run on the processor: CPU tensors in, results or a broken rule out.

Functions are called as those of fused_conv_bn. What ops do around their kernels (checks, copies of what does not lie as
kernels want it) is not emulated: here is as much of it as tests need.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import re
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import translate
from fused_conv_bn import reference
from structures import (
    AFFINE,
    Affine,
    Backward,
    BackwardParams,
    Buffer,
    Epilogue,
    GemmSm90Layout,
    Operands,
    Problem,
    Shape,
    Train,
    Weight,
    Wgrad,
    Whole,
)

ELEMENTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # csrc/kernels/common/scalar.h


class RuleBroken(AssertionError):
    """What a kernel did that the emulated GPU does not allow."""


@functools.cache
def _library(capability: int) -> ctypes.CDLL | RuntimeError:
    """Or why there is none: what does not compile once need not be tried for every test."""
    try:
        path = translate.library(capability)
    except RuntimeError as error:
        return error
    library = ctypes.CDLL(str(path))
    library.emulated_narrow.restype = library.emulated_has_faster_gates.restype = ctypes.c_bool
    return library


_seeds = itertools.count(0, 1000)


def _compiled(capability: int = 90) -> ctypes.CDLL:
    compiled = _library(capability)
    if isinstance(compiled, RuntimeError):
        raise compiled
    return compiled


def _call(capability: int, name: str, *arguments: Any) -> None:
    """Each call has another order of events."""
    library = _compiled(capability)
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    answer = function(*arguments, ctypes.c_uint64(next(_seeds)))
    if answer is None:
        return
    message = answer.decode()
    if message == "not covered":
        raise RuntimeError("the algorithm does not cover this convolution")
    if addresses := re.findall(r"\+(0x[0-9a-f]+)", message):
        # The lines where it happened, the innermost first.
        command = ["addr2line", "-i", "-e", library._name, *addresses]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
        places = [line.split()[0].rpartition("/")[2] for line in lines if "/kernels/" in line]
        message = message[: message.index(", at +")] + "; at " + ", ".join(dict.fromkeys(places))
    raise RuleBroken(message)


def has_faster_gates(images: int, channels: int, filters: int, side: int) -> bool:
    """By gemm_sm90's rule on an H200: of a 1x1 convolution in 16 bits of images of so many pixels a side."""
    p = Problem(N=images, C=channels, K=filters, H=side, W=side, P=side, Q=side, element_bytes=2, channels_last=True)
    p.R = p.S = p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = p.groups = 1
    return bool(_compiled().emulated_has_faster_gates(ctypes.byref(p)))


def launches(capability: int = 90) -> int:
    """How many kernels the last call started."""
    return _compiled(capability).emulated_launches()


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _element(x: Tensor) -> int:
    return ELEMENTS.index(x.dtype)


def _buffer(x: Tensor | None) -> Buffer:
    return Buffer() if x is None else Buffer(x.data_ptr(), x.stride(0), _element(x))


def _epilogue(activation: str, negative_slope: float, residual_last: bool) -> Epilogue:
    return Epilogue(list(reference.ACTIVATIONS).index(activation), residual_last, negative_slope)


class _AffineTensors:
    """As the op's affine_tensors() (csrc/torch/checks.h); keeps the tensors alive."""

    def __init__(self, dtype: torch.dtype, scaling_factor: float = 1.0, eps: float = 0.0, **tensors: Tensor | None):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        given = [t for t in tensors.values() if t is not None]
        common = dtype if all(t.dtype == dtype for t in given) else wide
        self.tensors = {name: None if t is None else t.to(common).contiguous() for name, t in tensors.items()}
        pointers = {name: None if t is None else t.data_ptr() for name, t in self.tensors.items()}
        self.struct = Affine(**pointers, scaling_factor=scaling_factor, eps=eps, wide=common == wide)


def gemm_sm90_tiles() -> int:
    return _compiled().emulated_gemm_sm90_tiles()


def gemm_sm90_fits(
    layouts: Iterable[GemmSm90Layout], input: Tensor, weight: Tensor, *window: int | Sequence[int]
) -> list[bool]:
    """Whether there are these layouts of a convolution; each says what would come of it."""
    windows = _windows(input, *(window or (1, 0, 1)))
    y = _result("conv_scale_shift", input, weight, None, None, *windows, 1)
    affine = _AffineTensors(input.dtype)
    conv = _Conv(y, input, weight, affine, windows, 1, None, "gemm_sm90", True)
    fits = _compiled().emulated_gemm_sm90_fits
    fits.restype = ctypes.c_bool
    return [fits(ctypes.byref(conv.problem), ctypes.byref(layout)) for layout in layouts]


# ---- convolutions ----------------------------------------------------------------------------------------------------


def _result(op: str, *arguments: Any, **named: Any) -> Tensor:
    """Of an op: a tensor of its shape and strides, full of NaN."""
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        fake = getattr(torch.ops.fused_conv_bn, op)(*fakes, **named)
    y = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype).fill_(math.nan)
    if "conv" in op and y.dim() != 4:  # there processors differ from each other, and from GPUs
        y = _dense(y, any(t.dim() == 5 and not t.is_contiguous() for t in arguments[:2]), 1)
    return y


def _windows(input: Tensor, *window: int | Sequence[int]) -> list[list[int]]:
    """Stride, padding and dilation, each for all dimensions."""
    if input.dtype == torch.float64 or input.numel() == 0:
        raise RuntimeError("the algorithm does not cover this convolution")
    space = input.dim() - 2
    return [list(v) * (space // len(v)) if isinstance(v, Sequence) else [v] * space for v in window]


_Space = ctypes.c_int64 * 3


def _channels_last(x: Tensor) -> torch.memory_format:
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)


def _dense(x: Tensor, channels_last: bool, alignment: int) -> Tensor:
    dense = x.contiguous(memory_format=_channels_last(x) if channels_last else torch.contiguous_format)
    return dense if dense.data_ptr() % alignment == 0 else dense.clone()


class _Conv:
    """What kernels are told of a convolution; keeps the tensors alive."""

    def __init__(
        self,
        y: Tensor,
        input: Tensor,
        weight: Tensor,
        affine: _AffineTensors,
        windows: list[list[int]],
        groups: int,
        residual: Tensor | None,
        algorithm: str,
        allow_tf32: bool = False,
        gates: Tensor | None = None,
        means: Tensor | None = None,
    ) -> None:
        self.y = y
        last = not self.y.is_contiguous()
        # As the op itself does, csrc/ops/conv_cuda.h.
        gemm = algorithm in ("gemm_sm90", "gemm_sm80")
        dense = gemm or algorithm == "stem_sm90"
        alignment = 16 if dense or (algorithm == "depthwise" and last) else 1
        if dense:
            w_last = gemm or (not weight.is_contiguous() and weight.is_contiguous(memory_format=_channels_last(weight)))
            weight = _dense(weight, w_last, alignment)
        self.tensors = {
            "x": _dense(input, last, alignment),
            "w": weight,
            "residual": None if residual is None else _dense(residual, last, alignment),
            "y": self.y,
            "gates": None if gates is None else _dense(gates, False, alignment),
            "means": means,
        }
        self.affine = affine
        extents = (input.shape[2:], weight.shape[2:], self.y.shape[2:], *windows)
        whole = Whole(
            *(input.dim() - 2, *input.shape[:2], weight.size(0), groups),
            *(_Space(*extent) for extent in extents),
            *(input.element_size(), last, residual is not None, allow_tf32),
        )
        self.problem = Problem()
        if not _compiled().emulated_narrow(ctypes.byref(whole), ctypes.byref(self.problem)):
            raise RuntimeError("the algorithm does not cover this convolution")
        self.operands = Operands(
            **{name: None if t is None else t.data_ptr() for name, t in self.tensors.items()}, affine=affine.struct
        )
        sizes, strides = ((ctypes.c_int64 * weight.dim())(*numbers) for numbers in (weight.shape, weight.stride()))
        _compiled().emulated_set_weight(ctypes.byref(self.operands), _pointer(weight), weight.dim(), sizes, strides)


def _conv(
    y: Tensor,
    input: Tensor,
    weight: Tensor,
    affine: _AffineTensors,
    windows: list[list[int]],
    groups: int,
    residual: Tensor | None,
    epilogue: Epilogue,
    algorithm: str,
    layout: GemmSm90Layout | None,
    capability: int,
    allow_tf32: bool,
    gates: Tensor | None = None,
    means: Tensor | None = None,
) -> Tensor:
    conv = _Conv(y, input, weight, affine, windows, groups, residual, algorithm, allow_tf32, gates, means)
    _call(
        capability,
        "emulated_conv",
        *(ctypes.byref(conv.problem), ctypes.byref(conv.operands), _element(input)),
        *(ctypes.byref(epilogue), algorithm.encode(), None if layout is None else ctypes.byref(layout)),
    )
    return y


def conv_scale_shift(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
    allow_tf32: bool = False,
    algorithm: str,
    layout: GemmSm90Layout | None = None,
    capability: int = 90,
) -> Tensor:
    windows = _windows(input, stride, padding, dilation)
    y = _result("conv_scale_shift", input, weight, scale, shift, *windows, groups)
    affine = _AffineTensors(input.dtype, weight=scale, bias=shift)
    epilogue = _epilogue(activation, negative_slope, residual_last)
    return _conv(
        y, input, weight, affine, windows, groups, residual, epilogue, algorithm, layout, capability, allow_tf32
    )


def conv_bn_scale(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
    allow_tf32: bool = False,
    algorithm: str,
    layout: GemmSm90Layout | None = None,
    capability: int = 90,
    gates: Tensor | None = None,
    means: Tensor | None = None,
) -> Tensor:
    """``means``: where those of the result are put."""
    windows = _windows(input, stride, padding, dilation)
    y = _result("conv_scale_shift", input, conv_weight, None, None, *windows, groups)
    bn = dict(mean=running_mean, var=running_var, weight=weight, bias=bias, conv_bias=conv_bias)
    affine = _AffineTensors(input.dtype, scaling_factor, eps, **bn)
    epilogue = _epilogue(activation, negative_slope, residual_last)
    named = dict(allow_tf32=allow_tf32, gates=gates, means=means)
    _conv(y, input, conv_weight, affine, windows, groups, residual, epilogue, algorithm, layout, capability, **named)
    # The op's with_bn_strides(): extents of 1 have others.
    arguments = (conv_weight, conv_bias, running_mean, running_var, weight, bias, scaling_factor, eps, *windows, groups)
    return y.as_strided(y.shape, _result("conv_bn_scale", input, *arguments).stride())


def conv_bn_scale_train(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
    algorithm: str,
    statistics: str,
    layout: GemmSm90Layout | None = None,
    capability: int = 90,
) -> Tensor:
    windows = _windows(input, stride, padding, dilation)
    bn = (running_mean, running_var, weight, bias)
    numbers = (scaling_factor, momentum, eps)
    y = _result("conv_bn_scale_train", input, conv_weight, conv_bias, *bn, *numbers, *windows, groups)
    conv = _Conv(y, input, conv_weight, _AffineTensors(input.dtype), windows, groups, residual, algorithm)
    train = Train(*(_buffer(t) for t in (*bn, conv_bias)), *numbers)
    epilogue = _epilogue(activation, negative_slope, residual_last)
    _call(
        capability,
        "emulated_conv_train",
        *(ctypes.byref(conv.problem), ctypes.byref(conv.operands), ctypes.byref(train), ctypes.byref(epilogue)),
        *(_element(input), algorithm.encode(), None if layout is None else ctypes.byref(layout), statistics.encode()),
    )
    return y


def _weight(x: Tensor | None) -> Weight:
    return Weight() if x is None else Weight(x.data_ptr(), *x.stride())


def conv_bn_wgrad(
    dy: Tensor,
    result: Tensor | None,
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    scaling_factor: float,
    eps: float,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str = "none",
    has_statistics: bool = False,
    capability: int = 90,
) -> tuple[Tensor, ...]:
    """As the op ``_conv_bn_wgrad`` with everything asked for. dy has the layout that is computed in."""
    if input.dim() != 4:
        raise RuntimeError("the algorithm does not cover this convolution")
    windows = _windows(input, stride, padding, dilation)
    last = not dy.is_contiguous()
    x = _dense(input, last, 4)
    channels = conv_weight.size(0)
    dw, scaled = conv_weight.clone().fill_(math.nan), conv_weight.clone().fill_(math.nan)
    dweight, dbias, dconv_bias, scale, shift = torch.full((5, channels), math.nan)
    sizes = (*x.shape, channels, *conv_weight.shape[2:], *dy.shape[2:], *itertools.chain(*windows))
    problem = Problem(*sizes, groups, x.element_size(), last, False, False)
    operands = Wgrad(
        *(_pointer(x).value, _pointer(dy).value, _pointer(result).value),
        list(reference.ACTIVATIONS).index(activation),
        *(
            _weight(conv_weight),
            has_statistics,
            *map(_buffer, (mean, var, weight, conv_bias)),
            scaling_factor,
            eps,
            None,
        ),
        *map(_weight, (dw, scaled)),
        *map(_buffer, (dweight, dbias, dconv_bias, scale, shift)),
    )
    _call(
        *(capability, "emulated_conv_wgrad", ctypes.byref(problem), ctypes.byref(operands), _element(x)),
    )
    return dw, dweight, dbias, dconv_bias, scaled, scale, shift


# ---- elementwise -----------------------------------------------------------------------------------------------------


def _shape(x: Tensor) -> Shape:
    return Shape(x.numel(), x.size(1), x[0, 0].numel() if x.is_contiguous() else 1)


def bn_scale_train(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
    capability: int = 90,
) -> Tensor:
    statistics = (running_mean, running_var, weight, bias)
    y = _result("bn_scale_train", input, *statistics, scaling_factor, momentum, eps)
    x = y.clone().copy_(input)
    added = None if residual is None else y.clone().copy_(residual)
    bn = Train(*(_buffer(t) for t in (*statistics, None)), scaling_factor, momentum, eps)
    epilogue = _epilogue(activation, negative_slope, residual_last)
    _call(
        *(capability, "emulated_bn_scale_train"),
        *(_pointer(x), _pointer(added), _pointer(y), ctypes.byref(_shape(y)), ctypes.byref(bn)),
        *(ctypes.byref(epilogue), _element(x)),
    )
    return y


def _elementwise(input: Tensor, affine: _AffineTensors, residual: Tensor | None, epilogue: Epilogue, capability: int):
    y = _result("scale_shift", input, None, None)
    x = y.clone().copy_(input)
    added = None if residual is None else y.clone().copy_(residual)
    _call(
        capability,
        "emulated_elementwise",
        *(_pointer(x), _pointer(added), _pointer(y), ctypes.byref(_shape(y)), ctypes.byref(affine.struct)),
        *(ctypes.byref(epilogue), _element(x)),
    )
    return y


def scale_shift(
    input: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
    capability: int = 90,
) -> Tensor:
    affine = _AffineTensors(input.dtype, weight=scale, bias=shift)
    return _elementwise(input, affine, residual, _epilogue(activation, negative_slope, residual_last), capability)


def bn_scale(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
    capability: int = 90,
) -> Tensor:
    bn = dict(mean=running_mean, var=running_var, weight=weight, bias=bias)
    affine = _AffineTensors(input.dtype, scaling_factor, eps, **bn)
    return _elementwise(input, affine, residual, _epilogue(activation, negative_slope, residual_last), capability)


def bn_scale_cat(
    inputs: Sequence[Tensor],
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    capability: int = 90,
) -> Tensor:
    bn = running_mean, running_var, weight, bias
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in inputs]
        fake = torch.ops.fused_conv_bn.bn_scale_cat(fakes, *(None if t is None else mode.from_tensor(t) for t in bn))
    y = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype).fill_(math.nan)
    if y.numel() == 0:
        return y
    inputs = [t for t in inputs if t.size(1) > 0]
    shape = _shape(y)
    memory_format = torch.contiguous_format if y.is_contiguous() else torch.channels_last
    memory_format = torch.channels_last_3d if y.dim() == 5 and not y.is_contiguous() else memory_format
    parts = [t.contiguous(memory_format=memory_format) for t in inputs]
    first = [0, *itertools.accumulate(t.size(1) for t in inputs)]
    affine = _AffineTensors(y.dtype, scaling_factor, eps, **dict(zip(AFFINE, bn, strict=False)))
    epilogue = _epilogue(activation, negative_slope, False)
    _call(
        *(capability, "emulated_cat"),
        *((ctypes.c_void_p * len(parts))(*map(_pointer, parts)), (ctypes.c_uint32 * len(first))(*first), len(parts)),
        *(_pointer(y), ctypes.byref(shape), ctypes.byref(affine.struct), ctypes.byref(epilogue), _element(y)),
    )
    return y


def gate(
    input: Tensor,
    gate: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual_last: bool = False,
    capability: int = 90,
) -> Tensor:
    y = _result("gate", input, gate)
    if y.numel() == 0:
        return y
    x = _misaligned_as(input, y)
    added = None if residual is None else _misaligned_as(residual, y)
    gates = gate.contiguous()
    epilogue = _epilogue(activation, negative_slope, residual_last)
    _call(
        *(capability, "emulated_gate", *map(_pointer, (x, gates, added, y)), ctypes.byref(_shape(y))),
        *(ctypes.c_int64(x[0, 0].numel()), ctypes.byref(epilogue), _element(x)),
    )
    return y


def _misaligned_as(x: Tensor, like: Tensor) -> Tensor:
    """x with the strides of ``like``; itself where it has them, so that its address is of any alignment."""
    if x.stride() == like.stride():
        return x
    return like.clone().copy_(x)


def bn_scale_backward(
    dy: Tensor,
    input: Tensor | None,
    result: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    scaling_factor: float = 1.0,
    eps: float = 1e-5,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
    needs_input: bool = False,
    needs_weight: bool = False,
    needs_bias: bool = False,
    needs_conv_bias: bool = False,
    needs_residual: bool = False,
    capability: int = 90,
) -> tuple[Tensor | None, ...]:
    arguments = (dy, input, result, residual, mean, var, invstd, weight, bias, conv_bias)
    needs = dict(
        needs_input=needs_input, needs_weight=needs_weight, needs_bias=needs_bias, needs_conv_bias=needs_conv_bias
    )
    with FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in arguments]
        op = torch.ops.fused_conv_bn.bn_scale_backward
        described = op(*fakes, scaling_factor, eps, **needs, needs_residual=needs_residual)
        like = op(*fakes, scaling_factor, eps, needs_input=True)[0]
    results = [
        None if f is None else torch.empty_strided(f.shape, f.stride(), dtype=f.dtype).fill_(math.nan)
        for f in described
    ]
    if dy.numel() == 0:
        return tuple(None if r is None else r.zero_() for r in results)
    dz, dweight, dbias, dconv_bias, dresidual = results
    shaped = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    from_input = activation != "none" and result is None
    needs_z = needs_weight or from_input or (invstd is not None and needs_input)
    other = result if result is not None else residual if from_input else None
    tensors = [None if t is None else _misaligned_as(t, shaped) for t in (dy, input if needs_z else None, other)]
    pointers = [None if t is None else t.data_ptr() for t in (*tensors, dz, dresidual)]
    trains = invstd is not None
    params = BackwardParams(
        *(_buffer(t) for t in (mean, var, invstd, weight, bias, None if trains else conv_bias)),
        *(scaling_factor, eps, Buffer(), dy.numel() / dy.size(1)),
        *(_buffer(t) for t in (dweight, dbias, dconv_bias)),
    )
    affine = dict(mean=mean, var=var, weight=weight, bias=bias, conv_bias=conv_bias)
    affine_tensors = _AffineTensors(dy.dtype, scaling_factor, eps, **({} if trains else affine))
    _call(
        *(capability, "emulated_backward"),
        *(ctypes.byref(Backward(*pointers, result is not None)), ctypes.byref(_shape(shaped)), ctypes.byref(params)),
        *(ctypes.byref(affine_tensors.struct), ctypes.byref(_epilogue(activation, negative_slope, False))),
        *(ctypes.c_void_p(None), _element(dy)),
    )
    return tuple(results)


# ---- the emulator itself ---------------------------------------------------------------------------------------------


def break_rule(name: str) -> None:
    """Runs one of broken_rules.cu's kernels."""
    _call(90, "emulated_broken_rule", name.encode())
