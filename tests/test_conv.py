"""conv_scale_shift against float64 and eager PyTorch: numbers, special values, layouts, errors, compile, autocast.

Errors are measured in two ways. In norm, as everywhere (common.py). And element by element, relative to the size of what
was added up there, conv(|x|, |w|) * |scale| + |shift| + |residual|: what a small result beside huge ones must be held to.
Both are held to twice eager's own.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_conv_bn as fcb
from common import DTYPES, random_bn
from fused_conv_bn import reference

OPS = torch.ops.fused_conv_bn
CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
activations = pytest.mark.parametrize("activation", reference.ACTIVATIONS)


LONG_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
}


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Call:
    """The arguments of one call."""

    x: Tensor
    w: Tensor
    scale: Tensor
    shift: Tensor
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    residual: Tensor | None = None
    activation: str = "none"

    def window(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    def tensors(self) -> list[Tensor]:
        return [self.x, self.w, self.scale, self.shift, *([] if self.residual is None else [self.residual])]

    def ours(self) -> Tensor | None:
        """None where the algorithm that is forced does not cover the call."""
        try:
            return fcb.conv_scale_shift(
                *(self.x, self.w, self.scale, self.shift, *self.window()),
                residual=self.residual,
                activation=self.activation,
            )
        except RuntimeError as error:
            if "does not cover this convolution" not in str(error):
                raise
            return None

    def to(self, device: str, dtype: torch.dtype) -> Call:
        acc = acc_dtype(dtype)
        residual = None if self.residual is None else self.residual.to(device, dtype)
        x, w, scale, shift = (
            t.to(device, d) for t, d in zip(self.tensors()[:4], (dtype, dtype, acc, acc), strict=True)
        )
        return Call(x, w, scale, shift, *self.window(), residual, self.activation)

    def eager(self) -> Tensor:
        """PyTorch's convolution in the dtype, and the rest rounded once: more than eager modules of 16 bits do."""
        y = CONVOLUTIONS[self.x.dim()](self.x, self.w, None, *self.window())
        residual = None if self.residual is None else self.residual.to(self.scale.dtype)
        wide = reference.scale_shift(
            y.to(self.scale.dtype), self.scale, self.shift, residual=residual, activation=self.activation
        )
        return wide.to(self.x.dtype)

    def sizes(self) -> Tensor:
        """What is added up in each element of the result, in absolute values, in float64 on the CPU."""
        x, w, scale, shift, *residual = (t.cpu().double().abs() for t in self.tensors())
        y = CONVOLUTIONS[x.dim()](x, w, None, *self.window())
        y = y * reference.per_channel(scale, y.dim()) + reference.per_channel(shift, y.dim())
        return y + residual[0] if residual else y

    def truth(self) -> np.ndarray:
        if self.x.dtype != torch.float64:
            return long(self.to("cpu", torch.float64).eager())
        y = long_convolution(self)
        shape = (-1, *[1] * (y.ndim - 2))
        y = y * long(self.scale).reshape(shape) + long(self.shift).reshape(shape)
        y = y if self.residual is None else y + long(self.residual)
        return LONG_ACTIVATIONS[self.activation](y)

    def out_size(self) -> list[int]:
        return list(CONVOLUTIONS[self.x.dim()](self.x.to("meta"), self.w.to("meta"), None, *self.window()).shape)


def long(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy().astype(np.longdouble)


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
        assert ours.stride() == CONVOLUTIONS[call.x.dim()](call.x, call.w, None, *call.window()).stride()
    u, truth, sizes = DTYPES[call.x.dtype], call.truth(), long(call.sizes())
    for measure, luck in ((in_norm, 0.5), (by_element, 1.0)):  # see common.assert_no_worse_than_eager
        got, eagers = (measure(y, truth, sizes) / u for y in (ours, eager))
        allowed = 2 * eagers + luck
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
    residual: bool = False,
    activation: str = "none",
) -> Call:
    """Random arguments. formats: a letter each for the memory formats of x and w, c or l."""
    fan_in = math.prod(w[1:])
    _, _, scale, shift = random_bn(w[0], torch.float32, "cpu", generator)
    call = Call(
        torch.randn(x, generator=generator),
        torch.randn(w, generator=generator) / math.sqrt(fan_in),
        scale,
        shift,
        *window,
        activation=activation,
    )
    if residual:
        call.residual = torch.randn(call.out_size(), generator=generator)
    call = call.to(device, dtype)
    for name, letter in zip(("x", "w"), formats, strict=True):
        if letter == "l":
            setattr(call, name, channels_last(getattr(call, name)))
    return call


def is_covered(dtype: torch.dtype, *, depthwise: bool) -> bool:
    """Whether the algorithm that is forced, if any, covers some of a test's calls; ``depthwise``: if those are among them."""
    covers = {
        "hopper": dtype != torch.float64,
        "few_channels": dtype != torch.float64,
        "depthwise": depthwise and dtype != torch.float64,
    }
    return covers.get(os.environ.get("FUSED_CONV_BN_CONV", ""), True)


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
                residual=bool(draw(0, 2)),
                activation=names[draw(0, len(names))],
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
                residual=bool(draw(0, 2)),
                activation=names[draw(0, len(names))],
            )
        )
    if os.environ.get("FUSED_CONV_BN_CONV") == "depthwise":  # the others have few of these in their domains, or none
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
    for formats, residual in itertools.product(("cc", "ll"), (False, True)):
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
        assert check(call) or os.environ.get("FUSED_CONV_BN_CONV") != "depthwise"


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
    cases = [("none", False), ("none", True)]
    if problem == "problem 73":
        cases += itertools.product(list(reference.ACTIVATIONS)[1:], (False, True))
    for activation, residual in cases:
        call = make(generator, "cpu", torch.float32, *arguments, residual=residual, activation=activation)
        assert not runs_pytorchs(call) and check(call)
    ours, threads = call.ours(), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(call.ours(), ours)
    finally:
        torch.set_num_threads(threads)
    # As they come from elsewhere: a slice, a transposed and a permuted tensor, addresses that are no vector's.
    other = Call(*call.tensors()[:4], *call.window(), call.residual, call.activation)
    other.x = torch.empty(*call.x.shape[:-1], call.x.size(-1) + 3)[..., 1:-2].copy_(call.x)
    other.w = torch.empty(*call.w.shape[:2], *call.w.shape[:1:-1]).transpose(2, 3).copy_(call.w)
    other.residual = torch.empty(call.residual.numel() + 1)[1:].view(call.residual.shape).copy_(call.residual)
    assert torch.equal(other.ours(), ours)
    call.x[0, 0, 1, 5], call.x[-1, -1, -1, -9], call.x[0, -1, 0, 0] = math.nan, math.inf, -math.inf
    ours, eager = call.ours(), call.eager()
    for pattern in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(pattern(ours), pattern(eager))


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
    """So many that a block of the few_channels kernel has two tiles at a time: ragged ones too, and some that do not split."""
    call = make(
        *(generator, conv_device, torch.float32, (3, 5, 700, 64), (33, 5, 3, 3), 1, 1), residual=True, activation="relu"
    )
    check(call)
    call.x[0, 1, 5, 7] = 2.0**30
    call.x[1, 4, 340:480] *= 2.0**-40
    call.x[2, :, -1] *= 2.0**-40
    check(call)
    moved = torch.empty(call.x.numel() + 1, device=conv_device)[1:].view(call.x.shape).copy_(call.x)
    check(Call(moved, call.w, call.scale, call.shift, *call.window(), call.residual, call.activation))


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
        ours = Call(x, w, scale, shift, *window).ours()
        if ours is None:
            continue
        eager = CONVOLUTIONS[x.dim()](x, w, None, *window)
        with FakeTensorMode() as mode:
            fake = OPS.conv_scale_shift(*(mode.from_tensor(t) for t in (x, w, scale, shift)), *window)
        assert (fake.shape, fake.stride(), fake.dtype) == (ours.shape, ours.stride(), ours.dtype), (x_name, w_name)
        # The one difference: eager's conv1d keeps a permutation of its weight.
        if ours.numel() > 0 and space > 1:
            assert ours.stride() == eager.stride(), (x_name, w_name)
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
            check(Call(moved[0], moved[1], call.scale, call.shift, *call.window(), moved[2]))


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


def test_folded_weight(generator):
    """Each product rounded once, in the weight's layout; where folding costs accuracy both are left as they are."""
    for shape in ((6, 4, 3, 3), (6, 4, 1, 1), (1, 1, 1, 1), (40, 1, 5), (6, 2, 3, 3, 3)):
        for dtype, (name, w) in itertools.product(DTYPES, layouts(shape, generator).items()):
            w = w.to(dtype, memory_format=torch.preserve_format)
            _, _, scale, _ = random_bn(shape[0], acc_dtype(dtype), "cpu", generator)
            folded, rest = OPS._fold_conv_weight(w, scale)
            if dtype.itemsize == 2:
                assert torch.equal(folded, w) and torch.equal(rest, scale)
                continue
            assert torch.equal(folded, w * scale.view(-1, *[1] * (w.dim() - 1))), name
            assert torch.equal(rest, torch.ones_like(scale))
            with FakeTensorMode() as mode:
                fake = OPS._fold_conv_weight(mode.from_tensor(w), mode.from_tensor(scale))
            assert (fake[0].shape, fake[0].dtype) == (folded.shape, folded.dtype)
    w = torch.rand(2, 3, 1, 1) + 1.5
    for factor, folds in (
        (1e-30, True),
        (0.0, False),
        (math.inf, False),
        (math.nan, False),
        (1e-39, False),
        (3e38, False),
    ):
        scale = torch.tensor([1.0, factor])
        folded, rest = OPS._fold_conv_weight(w, scale)
        assert torch.equal(folded, w * scale.view(2, 1, 1, 1)) == folds
        torch.testing.assert_close(rest, torch.ones(2) if folds else scale, equal_nan=True, rtol=0, atol=0)


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
    (lambda: conv(X, W, C6, C6, activation="gelu"), "activation is 'gelu', expected 'none', 'relu', 'relu6', 'silu' or 'hardswish'"),
    (lambda: OPS._fold_conv_weight(C6, C6), r"weight has shape \[6\], expected 3 to 5 dimensions"),
    (lambda: OPS._fold_conv_weight(W.int(), C6), "weight has dtype Int"),
    (lambda: OPS._fold_conv_weight(W, C6[:4]), r"scale has shape \[4\], expected \[6\]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_bad_input(call, message):
    with pytest.raises(RuntimeError, match=rf"^(conv_scale_shift|_fold_conv_weight): {message}") as caught:
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
    options = {"residual": call.residual, "activation": call.activation}
    torch.library.opcheck(OPS.conv_scale_shift.default, arguments, options)
    if device == "cpu":
        torch.library.opcheck(OPS._fold_conv_weight.default, (call.w, call.scale))


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
    program = torch.export.export(
        Model(), tuple(call.tensors()), dynamic_shapes={"x": {0: batch}, "w": None, "scale": None, "shift": None}
    )
    for n in (1, 7):
        call.x = torch.randn(n, 4, 9, 8, generator=generator).to(device)
        ours = program.module()(*call.tensors())
        assert torch.equal(ours, call.ours())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_as_for_a_convolution(device, dtype, generator):
    call = make(generator, device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3), residual=True)
    low = call.to(device, dtype)
    with torch.autocast(device, dtype=dtype):
        ours = call.ours()
        assert ours is not None and ours.dtype == F.conv2d(call.x, call.w).dtype == dtype
        assert torch.equal(ours, low.ours())
        double = call.to(device, torch.float64)
        assert double.ours().dtype == F.conv2d(double.x, double.w).dtype == torch.float64
        with torch.autocast(device, enabled=False):
            assert call.ours().dtype == torch.float32
        compiled = torch.compile(
            lambda: fcb.conv_scale_shift(*call.tensors()[:4], residual=call.residual),
            fullgraph=True,
            backend="aot_eager",
        )
        assert torch.equal(compiled(), ours)
    assert call.ours().dtype == torch.float32
    torch._dynamo.reset()


def test_raw_op_has_no_derivative(device, generator):
    """A tangent that the convolution inside computed would be the wrong one for the result."""
    call = make(generator, device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3), [1], [0], [1], 1, activation="relu")
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(call.x, torch.ones_like(call.x))
        y = OPS.conv_scale_shift(x, call.w, call.scale, call.shift, *call.window(), activation="relu")
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is None
    x = call.x.clone().requires_grad_()
    y = OPS.conv_scale_shift(x, call.w, call.scale, call.shift, *call.window(), activation="relu")
    with pytest.warns(UserWarning, match="conv_scale_shift: an autograd kernel was not registered"):
        y.sum().backward()
    assert x.grad is None


def test_list_and_string_arguments_do_not_leak():
    x, one = torch.ones(1, 1, 1, 1), torch.ones(1)
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # noqa: E731, SIM115
    for count in (20_000, 100_000):  # the first round fills the allocator
        before = resident()
        for _ in range(count):
            OPS.conv_scale_shift(x, x, one, one, [1, 1], [0, 0], [1, 1], 1, activation="hardswish")
    assert resident() - before < 100_000 * 16


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_choices_are_printed_once(device, generator, monkeypatch, capfd):
    call = make(generator, device, torch.float16, (3, 4, 9, 11), (6, 4, 3, 3), (1, 2), formats="ll")
    monkeypatch.setenv("FUSED_CONV_BN_PRINT_CONFIG", "1")
    for _ in range(3):
        call.ours()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(
        "fused_conv_bn: conv_scale_shift of [3, 4, 9, 11] with [6, 4, 3, 3], stride [1, 2], padding [0, 0], "
        "dilation [1, 1], groups 1, float16 channels_last: "
    )
    monkeypatch.setenv("FUSED_CONV_BN_PRINT_CONFIG", "0")
    make(generator, device, torch.float16, (3, 4, 9, 12), (6, 4, 3, 3)).ours()
    assert not capfd.readouterr().err


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_unknown_algorithm(device, generator, monkeypatch):
    monkeypatch.setenv("FUSED_CONV_BN_CONV", "fastest")
    with pytest.raises(RuntimeError, match="conv_scale_shift: FUSED_CONV_BN_CONV is 'fastest', expected one of 'aten'"):
        make(generator, device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3)).ours()


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_flags_stay_as_they_are(device, generator, monkeypatch):
    for flag in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", flag)
        call = make(generator, device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3))
        fcb.conv_scale_shift(*call.tensors(), allow_tf32=not flag)
        assert torch.backends.cudnn.allow_tf32 == flag
