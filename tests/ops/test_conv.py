"""conv_scale_shift and conv_bn_scale against float64 and eager PyTorch: numbers, special values, layouts, errors, compile,
autocast.

Errors are measured in two ways. In norm, as everywhere (common.py). And element by element, relative to the size of what
was added up there, conv(|x|, |w|) * |scale| + |shift| + |residual|: what a small result beside huge ones must be held to.
Both are held to twice eager's own.

That size is the right one behind an activation as well. None of them is steeper than 1.5 (hardswish at 3; gelu and mish have
1.13 and 1.09), so that an error of the sum stays one of that size, for eager as for us. But the result must be stored, and
that may err by a unit roundoff of the result. relu, silu, tanh and the others that begin at 0 are nowhere larger than what
goes in, but sigmoid and hardsigmoid are 1/2 there: an element's size is at least that of its exact result. With the residual
behind the activation the two may cancel; its size is a part of the sum then as well, so that half of what is stored in
between remains in the larger of both.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import fused_conv_bn as fcb
from common import DTYPES, RESIDUALS, SLOPE, long, long_epilogue, random_bn
from fused_conv_bn import reference

OPS = torch.ops.fused_conv_bn
CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
FACTOR, EPS = -1.7, 1e-3  # of conv_bn_scale
activations = pytest.mark.parametrize("activation", reference.ACTIVATIONS)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Call:
    """The arguments of one call of conv_scale_shift."""

    x: Tensor
    w: Tensor
    scale: Tensor | None
    shift: Tensor | None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    residual: Tensor | None = None
    activation: str = "none"
    residual_last: bool = False

    def window(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    def affine(self) -> tuple[Tensor | None, ...]:
        """The tensors of one element a channel."""
        return self.scale, self.shift

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.x, self.w, *self.affine(), self.residual) if t is not None]

    def epilogue(self) -> dict[str, Any]:
        return {
            "residual": self.residual,
            "activation": self.activation,
            "negative_slope": SLOPE,
            "residual_last": self.residual_last,
        }

    def call(self) -> Tensor:
        return fcb.conv_scale_shift(self.x, self.w, self.scale, self.shift, *self.window(), **self.epilogue())

    def ours(self) -> Tensor | None:
        """None where the algorithm that is forced does not cover the call."""
        try:
            return self.call()
        except RuntimeError as error:
            if "does not cover this convolution" not in str(error):
                raise
            return None

    def to(self, device: str, dtype: torch.dtype) -> Call:
        def moved(t: Tensor | None, to: torch.dtype) -> Tensor | None:
            return None if t is None else t.to(device, to)

        return replace(
            self,
            **{name: moved(getattr(self, name), dtype) for name in ("x", "w", "residual")},
            **{name: moved(getattr(self, name), acc_dtype(dtype)) for name in ("scale", "shift")},
        )

    def convolved(self) -> Tensor:
        """PyTorch's convolution in the dtype."""
        return CONVOLUTIONS[self.x.dim()](self.x, self.w, None, *self.window())

    def eager(self) -> Tensor:
        """PyTorch's convolution in the dtype, and the rest rounded once: more than eager modules of 16 bits do."""
        return self.eager_affine(self.convolved().to(acc_dtype(self.x.dtype))).to(self.x.dtype)

    def eager_strides(self, convolved: Tensor) -> tuple[int, ...]:
        """The machine's own: they depend on the instructions that it has, for three dimensions above all."""
        return convolved.stride()

    def eager_affine(self, y: Tensor) -> Tensor:
        epilogue = self.epilogue()
        epilogue["residual"] = None if self.residual is None else self.residual.to(y.dtype)
        return reference.scale_shift(y, self.scale, self.shift, **epilogue)

    def pair(self) -> tuple[Any, Any]:
        """scale and shift in long double."""
        return 1 if self.scale is None else long(self.scale), 0 if self.shift is None else long(self.shift)

    def pair_sizes(self) -> tuple[Any, Any]:
        """The same with all terms in absolute values."""
        scale, shift = self.pair()
        return abs(scale), abs(shift)

    def sizes(self) -> np.ndarray:
        """What is added up in each element of the result, in absolute values."""
        x, w = (t.cpu().double().abs() for t in (self.x, self.w))
        y = long(CONVOLUTIONS[x.dim()](x, w, None, *self.window()))
        scale, shift = (np.reshape(v, (-1, *[1] * (y.ndim - 2))) for v in self.pair_sizes())
        y = y * scale + shift
        return y if self.residual is None else y + abs(long(self.residual))

    def truth(self) -> np.ndarray:
        if self.x.dtype != torch.float64:
            return long(self.to("cpu", torch.float64).eager())
        y = long_convolution(self)
        scale, shift = (np.reshape(v, (-1, *[1] * (y.ndim - 2))) for v in self.pair())
        return long_epilogue(y * scale + shift, self.residual, self.activation, self.residual_last)

    def out_size(self) -> list[int]:
        return list(CONVOLUTIONS[self.x.dim()](self.x.to("meta"), self.w.to("meta"), None, *self.window()).shape)


BN_TENSORS = ("conv_bias", "running_mean", "running_var", "weight", "bias")


@dataclass
class BnCall(Call):
    """The arguments of one call of conv_bn_scale; `scale` and `shift` are None."""

    conv_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    scaling_factor: float = 1.0
    eps: float = 1e-5

    def affine(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) for name in BN_TENSORS)

    def numbers(self) -> tuple[float, float]:
        return self.scaling_factor, self.eps

    def call(self) -> Tensor:
        return fcb.conv_bn_scale(self.x, self.w, *self.affine(), *self.numbers(), *self.window(), **self.epilogue())

    def to(self, device: str, dtype: torch.dtype) -> BnCall:
        """BatchNorm's tensors keep their dtype, but for float64, which takes none but its own."""
        moved = super().to(device, dtype)
        for name, t in zip(BN_TENSORS, self.affine(), strict=True):
            wide = dtype == torch.float64 or (t is not None and t.dtype == torch.float64)
            setattr(moved, name, None if t is None else t.to(device, dtype if wide else t.dtype))
        return moved

    def eager_strides(self, convolved: Tensor) -> tuple[int, ...]:
        one = torch.ones(convolved.size(1), dtype=convolved.dtype, device=convolved.device)
        return F.batch_norm(convolved, one, one).stride()

    def eager_affine(self, y: Tensor) -> Tensor:
        conv_bias, *bn = (None if t is None else t.to(y.dtype) for t in self.affine())
        y = y if conv_bias is None else y + reference.per_channel(conv_bias, y.dim())
        epilogue = self.epilogue()
        epilogue["residual"] = None if self.residual is None else self.residual.to(y.dtype)
        return reference.bn_scale(y, *bn, *self.numbers(), **epilogue)

    def terms(self) -> tuple[np.ndarray, ...]:
        """In long double: scale, and the shift's three terms."""
        conv_bias, mean, var, weight, bias = (None if t is None else long(t) for t in self.affine())
        factor = np.longdouble(self.scaling_factor)
        scale = (1 if weight is None else weight) * factor / np.sqrt(var + np.longdouble(self.eps))
        terms = (0 if conv_bias is None else conv_bias) * scale, -mean * scale, (0 if bias is None else bias) * factor
        return scale, *terms

    def pair(self) -> tuple[Any, Any]:
        scale, *terms = self.terms()
        return scale, sum(terms)

    def pair_sizes(self) -> tuple[Any, Any]:
        scale, *terms = (abs(v) for v in self.terms())
        return scale, sum(terms)


def long_convolution(call: Call) -> np.ndarray:
    """In 80-bit long double: the truth for float64. Tap by tap."""
    space = call.x.dim() - 2
    stride, padding, dilation = (
        list(v) if isinstance(v, Sequence) and len(v) == space else [v[0] if isinstance(v, Sequence) else v] * space
        for v in call.window()[:3]
    )
    x = np.pad(long(call.x), ((0, 0), (0, 0), *((p, p) for p in padding)))
    w = long(call.w)
    size = call.out_size()
    groups, channels = call.groups, w.shape[1]
    y = np.zeros((size[0], groups, size[1] // groups, *size[2:]), np.longdouble)
    for tap in itertools.product(*(range(k) for k in w.shape[2:])):
        window = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, dilation, size[2:], stride, strict=True)
        )
        part = x[(slice(None), slice(None), *window)].reshape(size[0], groups, channels, *size[2:])
        y += np.einsum("ngc...,gkc->ngk...", part, w[(..., *tap)].reshape(groups, -1, channels))
    return y.reshape(size)


def in_norm(y: Tensor, truth: np.ndarray, sizes: np.ndarray) -> float:
    norm = np.sqrt((truth**2).sum())
    distance = np.sqrt(((long(y) - truth) ** 2).sum())
    return float(distance / norm if norm else distance)


def by_element(y: Tensor, truth: np.ndarray, sizes: np.ndarray) -> float:
    """The largest error of an element, relative to its size."""
    return float(np.max(np.abs(long(y) - truth) / np.maximum(sizes, 1e-300), initial=0))


def check(call: Call, *, strides: bool = True) -> bool:
    """Holds the call to the promises above. False if there is nothing to check."""
    before = [t.clone() for t in call.tensors()]
    ours = call.ours()
    if ours is None:
        return False
    assert all(torch.equal(a, b) for a, b in zip(call.tensors(), before, strict=True)), "an argument was written to"
    again = call.ours()
    assert again is not None and torch.equal(ours, again), "two runs differ"
    eager = call.eager()
    assert (ours.shape, ours.dtype, ours.device) == (eager.shape, eager.dtype, eager.device)
    if strides and ours.numel() > 0:
        assert ours.stride() == call.eager_strides(call.convolved())
    u, truth = DTYPES[call.x.dtype], call.truth()
    sizes = np.maximum(call.sizes(), abs(truth))
    # Of a few elements eager's error may be next to nothing by luck. What holds there is the sum of ten roundings, each of up to
    # one unit roundoff: of the convolution, the mean's difference, the scale's five, their product, the shift and the sum.
    few = ours.numel() < 64
    for measure, luck in ((in_norm, 0.5), (by_element, 1.0))[few:]:  # see common.assert_no_worse_than_eager
        got, eagers = (measure(y, truth, sizes) / u for y in (ours, eager))
        allowed = max(2 * eagers + luck, 10 if few else 0)
        assert got <= allowed, (
            f"{measure.__name__}: {got:.3g} unit roundoffs, allowed {allowed:.3g}, eager {eagers:.3g}"
        )
    return True


def channels_last(x: Tensor) -> Tensor:
    return x if x.dim() < 4 else x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def make(
    generator: torch.Generator,
    device: str,
    dtype: torch.dtype,
    x: Sequence[int],
    w: Sequence[int],
    *window: Any,
    formats: str = "cc",
    residual: bool | str = False,
    activation: str = "none",
    bn: bool = False,
) -> Call:
    """Random arguments. formats: a letter each for the memory formats of x and w, c or l. residual: also one of RESIDUALS.
    bn: of conv_bn_scale, whose tensors then have the dtype."""
    fan_in = math.prod(w[1:])
    mean, var, scale, shift = random_bn(w[0], torch.float32, "cpu", generator)
    values = torch.randn(x, generator=generator), torch.randn(w, generator=generator) / math.sqrt(fan_in)
    call: Call
    if bn:
        conv_bias = torch.randn(w[0], generator=generator)
        tensors = dict(zip(BN_TENSORS, (t.to(dtype) for t in (conv_bias, mean, var, scale, shift)), strict=True))
        call = BnCall(*values, None, None, *window, **tensors, scaling_factor=FACTOR, eps=EPS)
    else:
        call = Call(*values, scale, shift, *window)
    call.activation, call.residual_last = activation, residual == "last"
    if residual and residual != "none":
        call.residual = torch.randn(call.out_size(), generator=generator)
    call = call.to(device, dtype)
    for name, letter in zip(("x", "w"), formats, strict=True):
        if letter == "l":
            setattr(call, name, channels_last(getattr(call, name)))
    return call


def is_covered(dtype: torch.dtype, *, depthwise: bool) -> bool:
    """Whether the algorithm that is forced, if any, covers some of a test's calls; ``depthwise``: if those are among them."""
    covers = {
        "stem_sm90": dtype != torch.float64,
        "stem_sm80": dtype != torch.float64,
        "depthwise": depthwise and dtype != torch.float64,
    }
    return covers.get(common.forced_algorithm, True)


# ---- numbers -----------------------------------------------------------------------------------------------------------


@dtypes
def test_random_problems(conv_device, dtype, generator):
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    covered = 0
    names = list(reference.ACTIVATIONS)
    for _ in range(80):
        groups = (1, 1, 1, draw(2, 5), 0)[draw(0, 5)]
        channels = draw(1, 41)
        groups = channels if groups == 0 else groups
        channels = -(-channels // groups) * groups
        outputs = groups * draw(1, 4) if groups > 1 else draw(1, 41)
        kernel = draw(1, 8), draw(1, 8)
        stride, dilation, padding = ((draw(1, n), draw(1, n)) for n in (4, 3, 4))
        padding = padding[0] - 1, padding[1] - 1
        if conv_device == "cpu" and dtype == torch.bfloat16:
            stride = stride[0], 1  # oneDNN 3.12 reads narrow images wrongly here with AMX, eager's convolution too
        least = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        space = [draw(max(1, n), max(1, n) + 20) for n in least]
        covered += check(
            make(
                *(
                    generator,
                    conv_device,
                    dtype,
                    (draw(0, 4), channels, *space),
                    (outputs, channels // groups, *kernel),
                ),
                *(stride, padding, dilation, groups),
                formats=("cc", "cl", "lc", "ll")[draw(0, 4)],
                residual=RESIDUALS[draw(0, 3)],
                activation=names[draw(0, len(names))],
                bn=bool(draw(0, 2)),
            )
        )
    assert covered or not is_covered(dtype, depthwise=False)


@dtypes
def test_random_depthwise_problems(conv_device, dtype, generator):
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    covered = 0
    names = list(reference.ACTIVATIONS)
    for _ in range(16):
        kernel, stride, padding = (3, 5)[draw(0, 2)], draw(1, 3), (draw(0, 4), draw(0, 4))
        channels = 8 * draw(1, 14) if draw(0, 4) else draw(1, 50)
        space = [draw(max(1, kernel - 2 * p), 33) for p in padding]
        covered += check(
            make(
                *(generator, conv_device, dtype, (draw(1, 4), channels, *space), (channels, 1, kernel, kernel)),
                *(stride, padding, 1, channels),
                formats=("cc", "cl", "lc", "ll")[draw(0, 4)],
                residual=RESIDUALS[draw(0, 3)],
                activation=names[draw(0, len(names))],
                bn=bool(draw(0, 2)),
            )
        )
    if common.forced_algorithm == "depthwise":  # the others have few of these in their domains, or none
        assert covered or not is_covered(dtype, depthwise=True)


@dtypes
def test_filters_of_few_terms(conv_device, dtype, generator):
    """Where each product's own error shows: that of an element is the largest of many."""
    for channels, kernel in itertools.product((1, 2, 3, 5), ((1, 1), (2, 1), (1, 3), (2, 2), (3, 3))):
        for formats in ("cc", "ll"):
            check(make(generator, conv_device, dtype, (2, channels, 30, 30), (32, channels, *kernel), formats=formats))


@activations
@dtypes
def test_activations_and_residual(conv_device, dtype, activation, generator):
    covered = 0
    for formats, residual in itertools.product(("cc", "ll"), RESIDUALS):
        for x, w, groups in (((2, 5, 13, 11), (9, 5, 3, 3), 1), ((2, 16, 9, 14), (16, 1, 3, 3), 16)):
            covered += check(
                make(
                    *(generator, conv_device, dtype, x, w, 1, 1, 1, groups),
                    formats=formats,
                    residual=residual,
                    activation=activation,
                )
            )
    assert covered or not is_covered(dtype, depthwise=True)


@dtypes
def test_missing_scale_or_shift(conv_device, dtype, generator):
    """They count as 1 and 0."""
    for scale, shift, residual in itertools.product((False, True), (False, True), RESIDUALS):
        for x, w, groups in (((2, 5, 13, 11), (9, 5, 3, 3), 1), ((2, 16, 9, 14), (16, 1, 3, 3), 16)):
            call = make(generator, conv_device, dtype, x, w, 1, 1, 1, groups, residual=residual, activation="relu6")
            call.scale, call.shift = call.scale if scale else None, call.shift if shift else None
            check(call)
    call.residual, call.activation = None, "none"  # nothing but the convolution is left
    if call.ours() is not None:
        call.scale = call.shift = None
        assert check(call)


PROBLEMS = {
    "problem 73": ((2, 8, 64, 64), (64, 8, 3, 3)),
    "stem": ((2, 3, 61, 57), (64, 3, 7, 7), 2, 3),
    "first layer": ((1, 3, 45, 33), (32, 3, 3, 3), 2, 1),
    "depthwise": ((2, 24, 19, 23), (24, 1, 3, 3), 1, 1, 1, 24),
    "depthwise, 5x5, stride 2": ((2, 40, 20, 21), (40, 1, 5, 5), 2, 2, 1, 40),
    "rows of whole vectors, longer than a tile": ((1, 3, 9, 1104), (64, 3, 3, 3), 1, (1, 2)),
    "rows of odd lengths, longer than a tile": ((1, 5, 9, 1101), (33, 5, 3, 5), (1, 2), (0, 3), 2),
    "many weights": ((2, 40, 12, 14), (70, 40, 5, 5), 1, 2),
    "many weights for float32": ((2, 10, 24, 24), (70, 10, 5, 5)),
    "1x1": ((2, 32, 9, 9), (40, 32, 1, 1)),
    "one pixel": ((1, 1, 1, 1), (1, 1, 1, 1)),
    "as large as its kernel": ((3, 4, 5, 6), (7, 4, 5, 6)),
    "mostly padding": ((2, 3, 2, 2), (5, 3, 3, 3), 1, (4, 5)),
    "1-D": ((3, 6, 25), (10, 6, 4), 2, 1),
    "1-D, grouped": ((2, 6, 11), (12, 2, 3), 1, 2, 2, 3),
    "3-D": ((2, 3, 5, 7, 6), (6, 3, 2, 3, 3), (1, 2, 1), 1),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@dtypes
def test_problems(conv_device, dtype, problem, generator):
    for formats in ("cc", "ll", "cl"):
        check(
            make(generator, conv_device, dtype, *PROBLEMS[problem], formats=formats, residual=True, activation="relu")
        )


@pytest.mark.parametrize("problem", PROBLEMS)
@dtypes
def test_bn_problems(conv_device, dtype, problem, generator):
    for formats, residual, activation in (("cc", "none", "none"), ("ll", "last", "silu"), ("lc", "first", "sigmoid")):
        check(
            make(
                *(generator, conv_device, dtype, *PROBLEMS[problem]),
                formats=formats,
                residual=residual,
                activation=activation,
                bn=True,
            )
        )


@dtypes
def test_bn_parts_that_may_be_missing(conv_device, dtype, generator):
    covered = 0
    for given in itertools.product((False, True), repeat=3):
        for x, w, groups in (((2, 5, 13, 11), (9, 5, 3, 3), 1), ((2, 16, 9, 14), (16, 1, 3, 3), 16)):
            call = make(generator, conv_device, dtype, x, w, 1, 1, 1, groups, activation="relu", bn=True)
            for name, kept in zip(("conv_bias", "weight", "bias"), given, strict=True):
                setattr(call, name, getattr(call, name) if kept else None)
            covered += check(call)
    assert covered or not is_covered(dtype, depthwise=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_bn_tensors_of_either_dtype(conv_device, dtype, generator):
    """Those of a 16-bit input may be float32, all of them or each by itself."""
    covered = 0
    for wide in ((True,) * 5, *(tuple(i == j for i in range(5)) for j in range(5))):
        for formats in ("cc", "ll"):
            call = make(generator, conv_device, dtype, (2, 8, 13, 11), (9, 8, 3, 3), formats=formats, bn=True)
            for name, w in zip(BN_TENSORS, wide, strict=True):
                drawn = getattr(call, name).float()
                # Digits that the 16-bit dtype does not hold.
                setattr(call, name, drawn * (1 + 2.0**-13) if w else drawn.to(dtype))
            covered += check(call)
    assert covered or not is_covered(dtype, depthwise=False)


@pytest.mark.parametrize("scaling_factor", [0.0, 1.0, -2.5, 1e-30, 3e4])
def test_bn_scaling_factors(conv_device, scaling_factor, generator):
    for dtype in (torch.float32, torch.float16):
        for problem in (((2, 8, 13, 11), (9, 8, 3, 3)), PROBLEMS["depthwise"]):
            call = make(generator, conv_device, dtype, *problem, activation="leaky_relu", bn=True)
            call.scaling_factor = scaling_factor
            check(call)


def test_bn_far_from_zero(conv_device, generator):
    """A running mean of 1e4 beside a deviation of 1: taken away before anything is scaled, it costs no digits. The
    convolution's own roundings are those of 1e4, for eager as for us."""
    for dtype in (torch.float32, torch.float64):
        for problem in ("problem 73", "depthwise"):
            for formats in ("cc", "ll"):
                call = make(generator, conv_device, dtype, *PROBLEMS[problem], formats=formats, bn=True)
                call.x.add_(1e4)
                call.running_mean.copy_(call.convolved().double().mean((0, 2, 3)) + call.conv_bias)
                check(call)


def kinds(y: Tensor) -> Tensor:
    """1 for NaN, 2 and 3 for the infinities."""
    return y.isnan() + 2 * y.isposinf() + 3 * y.isneginf()


@pytest.mark.parametrize("name", BN_TENSORS)
def test_bn_of_values_that_are_not_finite(conv_device, name, generator):
    """As in eager, as BatchNorm's definition has it, or as one affine has that BatchNorm is folded into. They differ where the
    scale is infinite: eager on the CPU computes x * scale + (bias - mean * scale), NaN where the definition has infinity."""
    covered = 0
    for activation in ("none", "relu", "sigmoid", "hardswish"):
        call = make(generator, conv_device, torch.float32, (2, 8, 9, 8), (6, 8, 3, 3), activation=activation, bn=True)
        for i, value in enumerate((math.nan, math.inf, -math.inf)):
            getattr(call, name)[i] = value
        call.running_var[4], call.eps = 0, 0.0
        ours = call.ours()
        if ours is None:
            continue
        covered += 1
        wide = call.to(conv_device, torch.float64)
        bias, mean, var, weight, shift = (reference.per_channel(t, 4) for t in wide.affine())
        x, scale = wide.convolved(), var.rsqrt() * weight
        answers = ((x + bias - mean) * scale + shift, x * scale + (shift - (mean - bias) * scale))
        expected = [reference.activate(y * FACTOR, activation).float() for y in answers]
        with contextlib.suppress(ValueError):  # torch 2.11 and some others refuse an eps of 0
            expected.append(call.eager())
        found = kinds(ours)
        assert torch.stack([found == kinds(y) for y in expected]).any(0).all(), activation
    assert covered or not is_covered(torch.float32, depthwise=False)


def test_bn_tensors_that_are_views(conv_device, generator):
    """Not contiguous, and off every boundary."""
    for dtype in (torch.float32, torch.float16):
        call = make(generator, conv_device, dtype, *PROBLEMS["problem 73"], bn=True)
        expected = call.ours()
        for name, t in zip(BN_TENSORS, call.affine(), strict=True):
            setattr(call, name, torch.stack([t, t.neg()], 1)[:, 0])
        strided = call.ours()
        for i, name in enumerate(BN_TENSORS):
            t = getattr(call, name)
            setattr(call, name, torch.empty(t.numel() + 8, device=t.device, dtype=dtype)[i + 1 :][: t.numel()].copy_(t))
        moved = call.ours()
        assert expected is None or (torch.equal(strided, expected) and torch.equal(moved, expected))


def test_bn_follows_parameters_that_change_behind_its_back(conv_device, generator):
    """Nothing is kept from one call to the next: writes through .data, which no version counter sees, count."""
    call = make(generator, conv_device, torch.float32, *PROBLEMS["problem 73"], bn=True)
    for name in (*BN_TENSORS, "w"):
        before = call.ours()
        getattr(call, name).data.mul_(2)
        if before is not None:
            assert check(call) and not torch.equal(call.ours(), before)


# Sums of more than 2000 terms, with shifts far beyond them: the library that computes them may be another one than for small
# sums, may add up in blocks, and may begin with a bias where it gets one. MKL takes float64, and float32 of one small image or
# with one thread; oneDNN takes the rest.
LONG_SUMS = {
    "3x3": ((2, 260, 7, 6), (8, 260, 3, 3), 1, 1),
    "one image": ((1, 240, 7, 6), (12, 240, 3, 3), 1, 1),
    "1x1": ((2, 2100, 5, 5), (8, 2100, 1, 1)),
    "one image, 1x1": ((1, 2100, 3, 3), (8, 2100, 1, 1)),
    "one volume": ((1, 80, 4, 5, 6), (8, 80, 3, 3, 3), 1, 1),
    "one volume, 1x1x1": ((1, 2100, 2, 3, 2), (8, 2100, 1, 1, 1)),
    "a row": ((1, 700, 15), (8, 700, 3), 1, 1),
    "groups": ((1, 480, 7, 6), (8, 240, 3, 3), 1, 1, 1, 2),
}


@pytest.mark.parametrize("problem", LONG_SUMS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu"])
def test_long_sums(device, dtype, threads, problem, generator):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for formats, bn in (("cc", False), ("ll", False), ("cc", True)):
            call = make(generator, device, dtype, *LONG_SUMS[problem], formats=formats, residual="last", bn=bn)
            for shift in (call.running_mean, call.conv_bias, call.bias) if bn else (call.shift,):
                shift.mul_(100)
            check(call)
    finally:
        torch.set_num_threads(before)


CAPABILITIES = {"AVX2": ("avx2", "AVX2"), "none": ("default", "SSE41")}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_lower_instruction_sets_on_the_cpu(capability):
    """Some of these tests in a process where PyTorch, oneDNN and this package are held to older instructions. oneDNN for
    SSE4.1 adds a bias first, where newer ones add it last."""
    aten, onednn = CAPABILITIES[capability]
    if os.environ.get("ONEDNN_MAX_CPU_ISA") or torch.backends.cpu.get_cpu_capability().lower() == aten:
        pytest.skip("this is such a process, or such a CPU")
    names = "long_sums", "large_shifts", "few_terms", "test_problems", "bn_parts", "random_depthwise", "instructions"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", f"cpu and not cuda and not float16 and ({' or '.join(names)})"]
    env = {**os.environ, "ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_more_tiles_than_multiprocessors(conv_device, dtype, generator):
    """A block has several, through buffers that it uses again and again."""
    batch = 2 if conv_device == "cpu" else 24
    for x, w in (((8, 130, 48), (64, 8, 3, 3)), ((3, 66, 50), (48, 3, 5, 5))):
        for formats in ("cc", "ll"):
            call = make(generator, conv_device, dtype, (batch, *x), w, formats=formats)
            assert check(call) or not is_covered(dtype, depthwise=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_depthwise_rows_of_many_images(conv_device, dtype, generator):
    """A block's range of rows begins and ends anywhere in an image, and goes on into the next ones."""
    batch = 2 if conv_device == "cpu" else 3001
    for kernel, stride in ((3, 1), (5, 2)):
        call = make(
            *(generator, conv_device, dtype, (batch, 64, 3, 1), (64, 1, kernel, kernel), stride, kernel // 2, 1, 64),
            formats="ll",
        )
        assert check(call) or common.forced_algorithm != "depthwise"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outlier", [2.0**30, -(2.0**40)])
@pytest.mark.parametrize("where", ["x", "w"])
def test_one_huge_value_among_small_ones(conv_device, where, outlier, dtype, generator):
    for problem in ("problem 73", "depthwise", "stem"):
        for formats in ("cc", "ll"):
            call = make(generator, conv_device, dtype, *PROBLEMS[problem], formats=formats)
            if where == "x":
                call.x[0, 1, 5, 7] = outlier
            else:
                call.w[3, 0, 1, 1] = outlier
            check(call)


WIDE_FIRST_LAYERS = {
    "problem 73": ((1, 8, 36, 128), (30, 8, 3, 3)),
    "padding, a last tile of channels": ((1, 3, 67, 70), (13, 3, 5, 5), 1, 2),
    "stride 2": ((3, 3, 45, 225), (32, 3, 3, 3), 2, 1),
    "7x7, stride 2": ((2, 1, 75, 131), (9, 1, 7, 7), 2, 3),
    "stride of rows alone": ((1, 4, 170, 81), (8, 4, 3, 3), (3, 1), (0, 1)),
    "dilation": ((1, 2, 80, 100), (16, 2, 3, 4), 1, (3, 1), (4, 3)),
    "a row of taps": ((1, 9, 41, 113), (17, 9, 1, 8), 1, (0, 7)),
    "a column of taps": ((2, 5, 90, 64), (24, 5, 6, 1), (2, 1), (5, 0)),
    "rows longer than the buffer": ((1, 6, 3, 4100), (10, 6, 2, 3), 1, 1),
}
has_vectors = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="the CPU has no AVX2"
)


def runs_pytorchs(call: Call) -> bool:
    """Whether PyTorch's convolution is part of the call."""
    with torch.autograd.profiler.profile() as profile:
        call.ours()
    return any("conv" in event.name and event.name.startswith("aten::") for event in profile.function_events)


@has_vectors
@pytest.mark.parametrize("problem", WIDE_FIRST_LAYERS)
def test_wide_first_layers_on_the_cpu(problem, generator):
    """Those that a kernel of this package computes there."""
    arguments = WIDE_FIRST_LAYERS[problem]
    cases = [("none", "none", True), ("none", "first", False)]
    if problem == "problem 73":
        cases += [(name, residual, False) for name in list(reference.ACTIVATIONS)[1:] for residual in RESIDUALS[::2]]
        cases += [("gelu", "first", True)]
    for activation, residual, bn in cases:
        call = make(generator, "cpu", torch.float32, *arguments, residual=residual, activation=activation, bn=bn)
        assert not runs_pytorchs(call) and check(call)
    call = make(generator, "cpu", torch.float32, *arguments, residual=True)
    ours, threads = call.ours(), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(call.ours(), ours)
    finally:
        torch.set_num_threads(threads)
    # As they come from elsewhere: a slice, a transposed and a permuted tensor, addresses that are no vector's.
    other = replace(call)
    other.x = torch.empty(*call.x.shape[:-1], call.x.size(-1) + 3)[..., 1:-2].copy_(call.x)
    other.w = torch.empty(*call.w.shape[:2], *call.w.shape[:1:-1]).transpose(2, 3).copy_(call.w)
    other.residual = torch.empty(call.residual.numel() + 1)[1:].view(call.residual.shape).copy_(call.residual)
    assert torch.equal(other.ours(), ours)
    call.x[0, 0, 1, 5], call.x[-1, -1, -1, -9], call.x[0, -1, 0, 0] = math.nan, math.inf, -math.inf
    ours, eager = call.ours(), call.eager()
    for pattern in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(pattern(ours), pattern(eager))


def test_instructions_are_those_of_pytorch_on_the_cpu(generator):
    """ATEN_CPU_CAPABILITY holds PyTorch's kernels to an instruction set, and so it does ours."""
    vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert runs_pytorchs(make(generator, "cpu", torch.float32, *WIDE_FIRST_LAYERS["problem 73"])) != vectors


@has_vectors
def test_other_layers_are_pytorchs_on_the_cpu(generator):
    for x, w, *window in (
        ((2, 8, 80, 60), (64, 8, 3, 3)),  # narrow
        ((1, 16, 64, 80), (64, 16, 3, 3)),  # many terms
        ((1, 8, 64, 80), (64, 8, 1, 1)),  # one tap
        ((1, 8, 64, 80), (64, 4, 3, 3), 1, 1, 1, 2),
    ):
        assert runs_pytorchs(make(generator, "cpu", torch.float32, x, w, *window))
    wide = WIDE_FIRST_LAYERS["problem 73"]
    for dtype, formats in ((torch.float64, "cc"), (torch.bfloat16, "cc"), (torch.float32, "lc"), (torch.float32, "cl")):
        assert runs_pytorchs(make(generator, "cpu", dtype, *wide, formats=formats))


@has_vectors
def test_wide_first_layers_without_avx512():
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        pytest.skip("this is such a CPU, or a process held to AVX2")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    command += ["-k", "wide_first_layers_on_the_cpu"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and f"{len(WIDE_FIRST_LAYERS)} passed" in result.stdout, result.stdout[-2000:]


def test_many_tiles_of_whole_rows(conv_device, generator):
    """So many that a block of the stem_sm80 kernel has two tiles at a time: ragged ones too, and some that do not split."""
    call = make(
        *(generator, conv_device, torch.float32, (3, 5, 700, 64), (33, 5, 3, 3), 1, 1), residual=True, activation="relu"
    )
    check(call)
    call.x[0, 1, 5, 7] = 2.0**30
    call.x[1, 4, 340:480] *= 2.0**-40
    call.x[2, :, -1] *= 2.0**-40
    check(call)
    moved = torch.empty(call.x.numel() + 1, device=conv_device)[1:].view(call.x.shape).copy_(call.x)
    check(replace(call, x=moved))


@dtypes
def test_large_magnitudes_that_cancel(conv_device, dtype, generator):
    """Sums of terms a thousand times as large as what is left of them."""
    for problem in ("problem 73", "depthwise", "1x1"):
        for formats in ("cc", "ll"):
            call = make(generator, conv_device, dtype, *PROBLEMS[problem], formats=formats)
            call.x.add_(1000)
            call.w.sub_(call.w.mean((1, 2, 3), keepdim=True))
            check(call)


@dtypes
def test_large_shifts(conv_device, dtype, generator):
    """A shift far beyond the sum that it is added to. Sums that begin with it would round each partial sum to its size."""
    for problem in ("problem 73", "depthwise", "stem", "1x1"):
        for formats in ("cc", "ll"):
            call = make(generator, conv_device, dtype, *PROBLEMS[problem], formats=formats)
            call.shift.mul_(100)
            check(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scales_of_any_magnitude(conv_device, dtype, generator):
    """Also those that would take weights out of the range of their type, if they were folded into them."""
    for least, most in ((-44, -30), (-8, 8), (25, 30)):
        call = make(generator, conv_device, dtype, (2, 4, 9, 8), (16, 4, 3, 3), formats="ll")
        call.x.mul_(2.0 ** round(-1.66 * (least + most)))
        call.scale.copy_(10.0 ** torch.linspace(least, most, 16, dtype=torch.float64))
        assert call.scale.all() and call.eager().isfinite().all()
        assert check(call) or not is_covered(dtype, depthwise=False)


SPECIAL = (math.nan, math.inf, -math.inf, 0.0)


@activations
@dtypes
def test_non_finite_values_are_where_eager_has_them(conv_device, dtype, activation, generator):
    covered = 0
    for problem, formats in itertools.product(("problem 73", "depthwise", "stem", "1x1"), ("cc", "ll")):
        call = make(generator, conv_device, dtype, *PROBLEMS[problem], formats=formats, activation=activation)
        for i, value in enumerate(SPECIAL):
            call.x[0, i % call.x.size(1), 2 * i : 2 * i + 2, 2 * i] = value
        call.scale[0], call.shift[1] = 0, math.inf
        ours, eager = call.ours(), call.eager()
        if ours is not None:
            covered += 1
            # cuDNN's Winograd kernels spread what is not finite to outputs that do not depend on it.
            exact = call.to("cpu", torch.float64).eager().to(ours)
            for pattern in (torch.isnan, torch.isposinf, torch.isneginf):
                found = pattern(ours)
                assert torch.equal(found, pattern(eager)) or torch.equal(found, pattern(exact)), (
                    problem,
                    formats,
                    pattern,
                )
    assert covered or not is_covered(dtype, depthwise=True)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["scale", "shift", "w"])
def test_non_finite_parameters(conv_device, where, value, generator):
    call = make(generator, conv_device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3))
    getattr(call, where)[2] = value
    ours, eager = call.ours(), call.eager()
    if ours is not None:
        torch.testing.assert_close(ours, eager, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_relu_keeps_nan_on_the_cpu(generator):
    """oneDNN's own fused relu does not."""
    for activation in ("relu", "relu6"):
        call = make(generator, "cpu", torch.float32, (1, 8, 9, 9), (16, 8, 3, 3), activation=activation)
        call.x[0, 0, 4, 4] = math.nan
        ours = call.ours()
        assert ours is not None and ours.isnan().sum() == 16 * 9


# ---- how tensors lie -----------------------------------------------------------------------------------------------------


def layouts(shape: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
    wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)
    dense = wide[..., ::2].contiguous()
    order = (0, len(shape) - 1, *range(1, len(shape) - 1))
    permuted = torch.randn([shape[0], *shape[2:], shape[1]], generator=generator).permute(order)
    return {
        "contiguous": dense,
        "channels_last": channels_last(dense),
        "channels_last by strides": permuted,
        "sliced": wide[..., ::2],
        "sliced channels_last": channels_last(wide)[..., ::2],
        "transposed": dense.transpose(-1, -2).contiguous().transpose(-1, -2),
        "expanded": dense[:1].expand(shape),
    }


LAID_OUT = [
    ((2, 4, 6, 5), (6, 4, 3, 3), 1),
    ((2, 4, 6, 5), (6, 4, 1, 1), 1),
    ((1, 4, 6, 5), (6, 4, 3, 3), 1),
    ((2, 1, 6, 5), (6, 1, 3, 3), 1),
    ((2, 4, 1, 1), (6, 4, 1, 1), 1),
    ((1, 1, 1, 1), (1, 1, 1, 1), 1),
    ((2, 4, 6, 5), (4, 1, 3, 3), 4),
    ((2, 4, 6, 5), (1, 4, 3, 3), 1),
    ((2, 4, 3, 3), (6, 4, 3, 3), 1),
    ((2, 4, 6, 1), (6, 4, 3, 1), 1),
    ((0, 4, 6, 5), (6, 4, 3, 3), 1),
    ((2, 4, 6), (6, 4, 3), 1),
    ((2, 4, 3, 6, 5), (6, 4, 3, 3, 3), 1),
    ((2, 1, 3, 6, 5), (6, 1, 3, 3, 3), 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("x_shape", "w_shape", "groups"), LAID_OUT, ids=str)
def test_strides_are_eagers_and_the_fakes(conv_device, x_shape, w_shape, groups, dtype, generator):
    """For every mixture of layouts of input and weight, and the numbers are right as well."""
    space = len(x_shape) - 2
    window = [1] * space, [0] * space, [1] * space, groups
    scale, shift = torch.ones(w_shape[0], device=conv_device), torch.zeros(w_shape[0], device=conv_device)
    scale, shift = scale.to(acc_dtype(dtype)), shift.to(acc_dtype(dtype))
    for (x_name, x), (w_name, w) in itertools.product(
        layouts(x_shape, generator).items(), layouts(w_shape, generator).items()
    ):
        x, w = (t.to(conv_device, dtype, memory_format=torch.preserve_format) for t in (x, w))
        convolved = CONVOLUTIONS[x.dim()](x, w, None, *window)
        call = Call(x, w, scale, shift, *window)
        bn = BnCall(x, w, None, None, *window, running_mean=shift.to(dtype), running_var=scale.to(dtype))
        for name, c in (("affine", call), ("bn", bn)):
            ours = c.ours()
            if ours is None:
                continue
            with FakeTensorMode() as mode:
                fakes = [None if t is None else mode.from_tensor(t) for t in (x, w, *c.affine())]
                if c is call:
                    fake = OPS.conv_scale_shift(*fakes, *window)
                else:
                    fake = OPS.conv_bn_scale(*fakes, *bn.numbers(), *window)
            what = name, x_name, w_name
            assert (fake.shape, fake.stride(), fake.dtype) == (ours.shape, ours.stride(), ours.dtype), what
            # For cuDNN's BatchNorm, extents of 1 mean something else than for PyTorch's own kernels.
            if ours.numel() > 0 and (c is call or conv_device == "cpu"):
                assert ours.stride() == c.eager_strides(convolved), what
            eager = c.eager_affine(convolved.to(acc_dtype(dtype))).to(dtype)
            torch.testing.assert_close(ours, eager, rtol=16 * DTYPES[dtype], atol=64 * DTYPES[dtype])


@dtypes
def test_misaligned_addresses(conv_device, dtype, generator):
    """Input, weight and residual each off the 16-byte boundary, by several numbers of elements."""
    for problem, formats in itertools.product(("problem 73", "depthwise", "first layer"), ("cc", "ll")):
        call = make(generator, conv_device, dtype, *PROBLEMS[problem], formats=formats, residual=True)
        assert call.residual is not None
        call.residual = channels_last(call.residual) if formats == "ll" else call.residual
        for i in (1, 2, 3)[: 16 // dtype.itemsize - 1]:
            moved = [
                torch.empty(t.numel() + 16, device=conv_device, dtype=dtype)
                .as_strided(t.shape, t.stride(), (i * k) % 8)
                .copy_(t)
                for k, t in enumerate((call.x, call.w, call.residual), 1)
            ]
            check(replace(call, x=moved[0], w=moved[1], residual=moved[2]))


def test_parameters_and_residual_of_any_strides(conv_device, generator):
    call = make(generator, conv_device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3), residual=True)
    expected = call.ours()
    call.scale, call.shift = (torch.stack([t, t.neg()], 1)[:, 0] for t in (call.scale, call.shift))
    assert call.residual is not None
    call.residual = call.residual.transpose(1, 3).contiguous().transpose(1, 3)
    call.w = call.w.transpose(2, 3).contiguous().transpose(2, 3)
    assert not any(t.is_contiguous() for t in (call.scale, call.residual, call.w))
    ours = call.ours()
    assert (ours is None) == (expected is None)
    if ours is not None:
        assert torch.equal(ours, expected)


def test_one_value_for_all_dimensions(conv_device, generator):
    one = make(generator, conv_device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3), 2, 1, 1)
    expected = one.ours()
    for make_list in (lambda v: (v, v), lambda v: [v], lambda v: torch.Size([v, v])):
        one.stride, one.padding, one.dilation = (make_list(v) for v in (2, 1, 1))
        ours = one.ours()
        assert (ours is None) == (expected is None) and (ours is None or torch.equal(ours, expected))


def test_empty_batch(conv_device):
    for x, w in (((0, 4, 9, 8), (6, 4, 3, 3)), ((0, 4, 9), (6, 4, 3)), ((0, 4, 9, 8, 7), (6, 4, 3, 3, 3))):
        one = torch.ones(6, device=conv_device)
        x, w = torch.empty(x, device=conv_device), torch.ones(w, device=conv_device)
        expected = CONVOLUTIONS[x.dim()](x, w).shape
        residual = torch.empty(expected, device=conv_device)
        ours = Call(x, w, one, one, residual=residual, activation="silu").ours()
        assert ours is None or ours.shape == expected


# ---- bad input -----------------------------------------------------------------------------------------------------------

X, W, C6 = torch.randn(2, 4, 9, 8), torch.randn(6, 4, 3, 3), torch.ones(6)
conv = fcb.conv_scale_shift
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: conv(X[0, 0], W, C6, C6), r"input has shape \[9, 8\], expected 3 to 5 dimensions: \(N, C, L\), \(N, C, H, W\) or"),
    (lambda: conv(X[None, None], W, C6, C6), r"input has shape \[1, 1, 2, 4, 9, 8\], expected"),
    (lambda: conv(X.int(), W.int(), C6, C6), "input has dtype Int, expected float32, float16, bfloat16 or float64"),
    (lambda: conv(X[:, :, :0], W, C6, C6), r"input has shape \[2, 4, 0, 8\], expected at least one element in each dimension but"),
    (lambda: conv(X, W[0], C6, C6), r"weight has shape \[4, 3, 3\], expected 4 dimensions, as many as input"),
    (lambda: conv(X, W.half(), C6, C6), "weight has dtype float16, expected float32, the dtype of input"),
    (lambda: conv(X, W[:, :0], C6, C6), r"weight has shape \[6, 0, 3, 3\], expected at least one element in each dimension"),
    (lambda: conv(X, W[:, :3], C6, C6), r"weight has shape \[6, 3, 3, 3\], expected 4 in dimension 1, the channels of input, 4, over"),
    (lambda: conv(X, W, C6, C6, groups=3), "groups is 3, expected a divisor of the 4 channels of input and of the 6 output channels"),
    (lambda: conv(X, W, C6, C6, groups=0), "groups is 0, expected a divisor"),
    (lambda: conv(X, W, C6, C6, groups=4), "groups is 4, expected a divisor"),
    (lambda: conv(X, W, C6, C6, groups=2), r"weight has shape \[6, 4, 3, 3\], expected 2 in dimension 1"),
    (lambda: conv(X, W, C6, C6, stride=0), r"stride is \[0\], expected values from 1 to 2147483647"),
    (lambda: conv(X, W, C6, C6, stride=(1, 2, 1)), "stride has 3 values, expected 1 or 2, for the 2 spatial dimensions of input"),
    (lambda: conv(X[..., 0], W[..., 0], C6, C6, stride=(1, 2)), "stride has 2 values, expected 1, for the 1 spatial dimension of input"),
    (lambda: conv(X, W, C6, C6, padding=(0, -1)), r"padding is \[0, -1\], expected values from 0 to"),
    (lambda: conv(X, W, C6, C6, padding=()), "padding has 0 values, expected 1 or 2"),
    (lambda: conv(X, W, C6, C6, padding=2**40), "padding is .1099511627776., expected values from 0 to"),
    (lambda: conv(X, W, C6, C6, dilation=(1, 0)), r"dilation is \[1, 0\], expected values from 1 to"),
    (lambda: conv(X, W, C6, C6, dilation=(1, 5), padding=1), r"weight has shape \[6, 4, 3, 3\], expected a kernel that fits into input of shape \[2, 4, 9, 8\]: in dimension 3 that has 10 elements with its padding, and 3 taps with dilation 5 cover more"),
    (lambda: conv(X, W, C6[:5], C6), r"scale has shape \[5\], expected \[6\], one element for each channel of the output"),
    (lambda: conv(X, W, C6, C6.double()), "shift has dtype float64, expected float32 with input of dtype float32"),
    (lambda: conv(X.half(), W.half(), C6.half(), C6), "scale has dtype float16, expected float32 with input of dtype float16"),
    (lambda: conv(X, W, C6, C6, residual=X), r"residual has shape \[2, 4, 9, 8\], expected \[2, 6, 7, 6\], the shape of the output"),
    (lambda: conv(X, W, C6, C6, residual=torch.ones(2, 6, 7, 6).half()), "residual has dtype float16, expected float32"),
    (lambda: conv(X, W, C6, C6, activation="swish"), f"activation is 'swish', expected one of {', '.join(map(repr, reference.ACTIVATIONS))}$"),
]  # fmt: skip


bn_conv = fcb.conv_bn_scale
BAD_BN: list[tuple[Callable[[], Any], str]] = [
    (lambda: bn_conv(X[0, 0], W, None, C6, C6), r"input has shape \[9, 8\], expected 3 to 5 dimensions"),
    (lambda: bn_conv(X, W[:, :3], None, C6, C6), r"conv_weight has shape \[6, 3, 3, 3\], expected 4 in dimension 1, the channels of input, 4, over"),
    (lambda: bn_conv(X, W, None, C6, C6, groups=3), "groups is 3, expected a divisor of the 4 channels of input and of the 6 output channels"),
    (lambda: bn_conv(X, W, C6[:5], C6, C6), r"conv_bias has shape \[5\], expected \[6\], one element for each channel of the output"),
    (lambda: bn_conv(X, W, None, C6[:4], C6), r"running_mean has shape \[4\], expected \[6\]"),
    (lambda: bn_conv(X, W, None, C6, C6.view(2, 3)), r"running_var has shape \[2, 3\], expected \[6\]"),
    (lambda: bn_conv(X, W, None, C6, C6, C6.half()), "weight has dtype float16, expected float32 with input of dtype float32"),
    (lambda: bn_conv(X, W, None, C6, C6, None, C6.double()), "bias has dtype float64, expected float32 with input of dtype float32"),
    (lambda: bn_conv(X.half(), W.half(), None, C6, C6.bfloat16()), "running_var has dtype bfloat16, expected float16 or float32"),
    (lambda: bn_conv(X.double(), W.double(), None, C6.double(), C6), "running_var has dtype float32, expected float64"),
    (lambda: bn_conv(X, W, None, C6, C6, eps=-1e-5), "eps is -1e-05, expected 0 or more"),
    (lambda: bn_conv(X, W, None, C6, C6, stride=(1, 2, 1)), "stride has 3 values, expected 1 or 2, for the 2 spatial dimensions of input"),
    (lambda: bn_conv(X, W, None, C6, C6, residual=X), r"residual has shape \[2, 4, 9, 8\], expected \[2, 6, 7, 6\], the shape of the output"),
    (lambda: bn_conv(X, W, None, C6, C6, activation="elu"), "activation is 'elu', expected one of 'none', 'relu'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "call", "message"),
    [("conv_scale_shift", *row) for row in BAD] + [("conv_bn_scale", *row) for row in BAD_BN],
    ids=[message[:50] for _, message in BAD + BAD_BN],
)
def test_bad_input(op, call, message):
    with pytest.raises(RuntimeError, match=f"^{op}: {message}") as caught:
        call()
    assert "\n" not in str(caught.value) and ".h:" not in str(caught.value)


def test_largest_kernel_and_padding_that_fit(conv_device):
    one = torch.ones(1, device=conv_device)
    x, w = torch.ones(1, 1, 4, 4, device=conv_device), torch.ones(1, 1, 3, 3, device=conv_device)
    ours = Call(x, w, one, one, 1, 0, (1, 1)).ours()
    assert ours is None or ours.shape == (1, 1, 2, 2)
    ours = Call(x, w, one, one, 2**31 - 1, 1, (2, 2)).ours()
    assert ours is None or ours.shape == (1, 1, 1, 1)


# ---- PyTorch around it ---------------------------------------------------------------------------------------------------

OPCHECKED: dict[str, Callable[[torch.Generator, str], Call]] = {
    "2-D": lambda g, d: make(g, d, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3), [2], [1], [1], 1),
    "channels_last": lambda g, d: make(
        g, d, torch.bfloat16, (2, 4, 9, 8), (6, 2, 3, 3), [1, 2], [1, 0], [1, 2], 2, formats="lc", residual=True
    ),
    "1-D": lambda g, d: make(g, d, torch.float64, (2, 4, 9), (6, 4, 3), [2], [1], [1], 1, activation="silu"),
    "3-D": lambda g, d: make(g, d, torch.float32, (2, 4, 9, 8, 4), (6, 4, 3, 3, 1), [1], [0], [1], 1, formats="cl"),
}


@pytest.mark.parametrize("sample", OPCHECKED)
def test_opcheck(device, sample, generator):
    call = OPCHECKED[sample](generator, device)
    arguments = (call.x, call.w, call.scale, call.shift, *call.window())
    torch.library.opcheck(OPS.conv_scale_shift.default, arguments, call.epilogue())
    torch.library.opcheck(OPS.conv_scale_shift.default, (call.x, call.w, None, call.shift, *call.window()))
    scale = call.scale.abs().to(call.x.dtype)
    bn = scale, scale, None, scale, 1.5, 1e-3
    for conv_bias in (None, scale):
        torch.library.opcheck(
            OPS.conv_bn_scale.default, (call.x, call.w, conv_bias, *bn, *call.window()), call.epilogue()
        )


def test_compiled(device, generator):
    """One graph for all shapes, in any layout, and the same bits."""

    def f(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = fcb.conv_scale_shift(x, w, scale, shift, 2, 1, activation="relu")
        return fcb.conv_scale_shift(x, w, scale, shift, 2, 1, residual=y) + 1

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    inductor = torch.compile(f, fullgraph=True, dynamic=True)
    for shape in ((2, 4, 9, 8), (3, 4, 16, 16), (5, 4, 7, 30)):
        call = make(generator, device, torch.float32, shape, (6, 4, 3, 3))
        expected = f(*call.tensors())
        assert torch.equal(compiled(*call.tensors()), expected)
        torch.testing.assert_close(inductor(*call.tensors()), expected)
    assert counter.frame_count == 1
    call.x = channels_last(call.x)
    assert torch.equal(inductor(*call.tensors()), f(*call.tensors()))
    torch._dynamo.reset()


def test_exported(device, generator):
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return fcb.conv_scale_shift(x, w, scale, shift, padding=1, activation="hardswish")

    call = make(generator, device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3), 1, 1, activation="hardswish")
    batch = torch.export.Dim("n", min=1, max=1024)
    shapes = {"x": {0: batch}, "w": None, "scale": None, "shift": None}

    def exported() -> torch.export.ExportedProgram:
        return torch.export.export(Model(), tuple(call.tensors()), dynamic_shapes=shapes)

    plain = exported()
    with fcb.export_ops():
        kept = exported()
    assert "fused_conv_bn" not in str(plain.graph) and "fused_conv_bn" in str(kept.graph)
    for n in (1, 7):
        call.x = torch.randn(n, 4, 9, 8, generator=generator).to(device)
        ours = call.ours()
        assert torch.equal(kept.module()(*call.tensors()), ours)
        torch.testing.assert_close(plain.module()(*call.tensors()), ours)


@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_as_for_a_convolution(device, dtype, bn, generator):
    call = make(generator, device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3), residual=True, bn=bn)
    low = call.to(device, dtype)
    with torch.autocast(device, dtype=dtype):
        ours = call.ours()
        assert ours is not None and ours.dtype == F.conv2d(call.x, call.w).dtype == dtype
        assert torch.equal(ours, low.ours())
        double = call.to(device, torch.float64)
        assert double.ours().dtype == F.conv2d(double.x, double.w).dtype == torch.float64
        with torch.autocast(device, enabled=False):
            assert call.ours().dtype == torch.float32
        compiled = torch.compile(lambda: call.call(), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(), ours)
    assert call.ours().dtype == torch.float32
    torch._dynamo.reset()


@pytest.mark.parametrize("bn", [False, True])
def test_raw_ops_have_no_derivative(device, bn, generator):
    """A tangent that the convolution inside computed would be the wrong one for the result."""
    window = [1], [0], [1], 1
    call = make(generator, device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3), *window, activation="relu", bn=bn)
    name = "conv_bn_scale" if bn else "conv_scale_shift"
    numbers = (FACTOR, EPS) if bn else ()

    def run(x: Tensor) -> Tensor:
        return getattr(OPS, name)(x, call.w, *call.affine(), *numbers, *window, activation="relu")

    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(call.x, torch.ones_like(call.x))
        assert torch.autograd.forward_ad.unpack_dual(run(x)).tangent is None
    x = call.x.clone().requires_grad_()
    y = run(x)
    with pytest.warns(UserWarning, match=f"{name}: an autograd kernel was not registered"):
        y.sum().backward()
    assert x.grad is None


def test_list_and_string_arguments_do_not_leak():
    x, one = torch.ones(1, 1, 1, 1), torch.ones(1)
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # noqa: E731, SIM115
    for count in (20_000, 100_000):  # the first round fills the allocator
        before = resident()
        for _ in range(count):
            OPS.conv_scale_shift(x, x, one, one, [1, 1], [0, 0], [1, 1], 1, activation="hardswish")
            OPS.conv_bn_scale(x, x, one, one, one, stride=[1, 1], padding=[0, 0], activation="hardsigmoid")
    assert resident() - before < 100_000 * 16


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_flags_stay_as_they_are(device, generator, monkeypatch):
    for flag in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", flag)
        call = make(generator, device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3))
        fcb.conv_scale_shift(*call.tensors(), allow_tf32=not flag)
        assert torch.backends.cudnn.allow_tf32 == flag
