"""Calls of conv_scale_shift and conv_bn_scale, and what their results are held to.

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

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import common
import fused_conv_bn as fcb
from common import DTYPES, SLOPE, long, long_epilogue, random_bn, rounded_to_tf32
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
    allow_tf32: bool = False

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

    def named(self) -> dict[str, Any]:
        return self.epilogue() | ({"allow_tf32": True} if self.allow_tf32 else {})

    def call(self) -> Tensor:
        return fcb.conv_scale_shift(self.x, self.w, self.scale, self.shift, *self.window(), **self.named())

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
        return fcb.conv_bn_scale(self.x, self.w, *self.affine(), *self.numbers(), *self.window(), **self.named())

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
    tf32: bool = False,
) -> Call:
    """Random arguments. formats: a letter each for the memory formats of x and w, c or l. residual: also one of RESIDUALS.
    bn: of conv_bn_scale, whose tensors then have the dtype. tf32: it is allowed, and exact, as x and w have its bits."""
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
    call.activation, call.residual_last, call.allow_tf32 = activation, residual == "last", tf32
    if tf32:
        call.x, call.w = rounded_to_tf32(call.x), rounded_to_tf32(call.w)
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
        "pointwise": False,  # some have one such call, and test_images_of_one_pixel many
        "stem_sm90": dtype != torch.float64,
        "stem_sm80": dtype != torch.float64,
        "depthwise": depthwise and dtype != torch.float64,
        "gemm_sm90": False,  # some tests have calls for these, and test_random_gemm_problems many
        "gemm_sm80": False,
    }
    return covers.get(common.forced_algorithm, True)


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
    "3x3 of many channels": ((2, 72, 15, 11), (136, 72, 3, 3), 2, 1),
    "grouped": ((2, 48, 10, 9), (72, 16, 3, 3), 1, 1, 1, 3),
    "one pixel": ((1, 1, 1, 1), (1, 1, 1, 1)),
    "as large as its kernel": ((3, 4, 5, 6), (7, 4, 5, 6)),
    "mostly padding": ((2, 3, 2, 2), (5, 3, 3, 3), 1, (4, 5)),
    "1-D": ((3, 6, 25), (10, 6, 4), 2, 1),
    "1-D, grouped": ((2, 6, 11), (12, 2, 3), 1, 2, 2, 3),
    "3-D": ((2, 3, 5, 7, 6), (6, 3, 2, 3, 3), (1, 2, 1), 1),
}
