"""max_pool2d and spatial_mean: values, strides, gradients, memory and messages."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_conv_bn as fcb
from common import DTYPES, long
from elementwise_problems import LAYOUTS, SHAPES, arrange
from fused_conv_bn import reference

ops = torch.ops.fused_conv_bn
# Windows with kernels of their own, at every border, and others.
WINDOWS = [
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=3, stride=2),
    dict(kernel_size=3, stride=2, ceil_mode=True),
    dict(kernel_size=2),
    dict(kernel_size=2, stride=2, padding=1, ceil_mode=True),
    dict(kernel_size=3, stride=1, padding=1),
    dict(kernel_size=5, stride=1, padding=2),
    dict(kernel_size=(1, 3), stride=(2, 1), padding=(0, 1)),
    dict(kernel_size=3, stride=2, padding=1, dilation=2),
    dict(kernel_size=1, stride=3),
]
POOLED = [(2, 16, 9, 11), (3, 8, 4, 4), (1, 24, 5, 3), (2, 5, 7, 8), (1, 64, 3, 3), (4, 40, 6, 1), (1, 1, 13, 12)]
# Of each dtype, layout and shape a kernel: planes of a few elements, of some and of many, with channels that are vectors and
# that are none, in blocks, and in clusters of them.
AVERAGED = [
    (2, 16, 7, 7),
    (3, 24, 40, 30),
    (1, 8, 90, 70),
    (1, 2, 90, 100),
    (2, 7, 30, 31),
    (40, 64, 7, 7),
    (1, 3, 5, 4, 6),
]


def values_of(shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str, generator) -> Tensor:
    return arrange(torch.randn(shape, generator=generator).to(device, dtype), layout)


def same(ours: Tensor, eager: Tensor) -> bool:
    """NaN is NaN, and a zero has either sign."""
    nan = eager.isnan()
    values = (t.masked_fill(nan, 0) for t in (ours, eager))
    return ours.dtype == eager.dtype and torch.equal(ours.isnan(), nan) and torch.equal(*values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_max(device, dtype, layout, window, generator):
    for shape in POOLED:
        if fits(shape, window):
            check_max(values_of(shape, dtype, device, layout, generator), window)


def fits(shape: tuple[int, ...], window: dict) -> bool:
    """Whether there is a window at all."""
    try:
        F.max_pool2d(torch.empty(shape, device="meta"), **window)
    except RuntimeError:
        return False
    return True


def check_max(x: Tensor, window: dict) -> None:
    ours, eager = fcb.max_pool2d(x, **window), F.max_pool2d(x, **window)
    assert same(ours, eager)
    assert ours.stride() == eager.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_of_random_windows(device, dtype, generator):
    chosen = random.Random(4)
    done = 0
    while done < 60:
        kernel, stride = ([chosen.randint(1, 5) for _ in range(2)] for _ in range(2))
        dilation = [chosen.choice((1, 1, 2, 3)) for _ in range(2)]
        padding = [chosen.randint(0, k // 2) for k in kernel]
        window = dict(kernel_size=kernel, stride=stride, padding=padding, dilation=dilation)
        window["ceil_mode"] = chosen.random() < 0.5
        shape = chosen.randint(1, 3), chosen.choice((1, 3, 8, 16, 24)), chosen.randint(1, 14), chosen.randint(1, 14)
        if fits(shape, window):
            check_max(values_of(shape, dtype, device, chosen.choice(LAYOUTS), generator), window)
            done += 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_max_of_values_that_are_not_finite(device, dtype, layout, generator):
    for window in WINDOWS:
        x = values_of((2, 16, 9, 10), dtype, device, layout, generator)
        for value in (math.nan, -math.inf, math.inf):
            x[torch.rand(x.shape, generator=generator).to(device) < 0.15] = value
        x[0, :8] = -math.inf
        check_max(x, window)


def test_max_of_many_outputs(device, generator):
    """Then a thread has several."""
    window = dict(kernel_size=3, stride=2, padding=1)
    for layout, shape in (("channels_last", (9, 64, 91, 92)), ("contiguous", (9, 64, 91, 92))):
        x = values_of(shape, torch.float16, device, layout, generator)
        check_max(x, window)
        check_max(x, dict(kernel_size=2, stride=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_memory(device, dtype, generator):
    """Views beside a 16-byte boundary, with infinity around them."""
    for channels, offset in ((16, 1), (16, 3), (24, 8), (5, 0), (8, 5)):
        n = 2 * channels * 6 * 7
        for strides in ((42 * channels, 1, 7 * channels, channels), (42 * channels, 42, 7, 1)):
            memory = torch.full((n + 16,), math.inf, dtype=dtype, device=device)
            x = memory[offset : offset + n].as_strided((2, channels, 6, 7), strides)
            x.copy_(torch.randn(x.shape, generator=generator))
            for window in WINDOWS[:4]:
                check_max(x, window)
            check_mean(x)


def check_mean(x: Tensor) -> None:
    """Twice eager's error. One rounding of the result, and one of each of the few sums that a value goes through."""
    eager, ours = reference.spatial_mean(x), fcb.spatial_mean(x)
    truth = long(x).reshape(*x.shape[:2], -1).mean(-1)
    size = np.abs(long(x)).reshape(*x.shape[:2], -1).mean(-1)
    our_error, eager_error = (float(np.abs(long(y) - truth).max()) for y in (ours, eager))
    roundings = float((DTYPES[x.dtype] * np.abs(truth) + 8 * sums_roundoff(x.dtype) * size).max())
    assert our_error <= max(2 * eager_error, roundings), (our_error, eager_error, roundings)
    assert ours.dtype == x.dtype and ours.is_contiguous()
    kept = fcb.spatial_mean(x, keepdim=True)
    assert kept.shape == reference.spatial_mean(x, keepdim=True).shape and kept.is_contiguous()
    assert torch.equal(kept.flatten(1), ours)


def sums_roundoff(dtype: torch.dtype) -> float:
    return DTYPES[torch.float64 if dtype == torch.float64 else torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean(device, dtype, layout, generator):
    for shape in [*(s for s in SHAPES if len(s) > 2), *AVERAGED]:
        check_mean(values_of(shape, dtype, device, layout, generator) + 1)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mean_of_values_that_are_not_finite(device, layout, generator):
    x = values_of((2, 16, 9, 10), torch.float16, device, layout, generator)
    x[0, 3, 4, 5], x[1, 7, 8, 9], x[1, 8, 0, 0] = math.nan, math.inf, -math.inf
    x[1, 9] = 65504  # whose sum no half has
    ours, eager = fcb.spatial_mean(x), x.float().mean((2, 3)).half()
    assert torch.equal(ours.isfinite(), eager.isfinite()) and torch.equal(ours.isnan(), eager.isnan())
    assert torch.equal(ours[1, 7:10], eager[1, 7:10])


def test_empty(device):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(0, 8, 6, 6, device=device).to(memory_format=layout)
        assert fcb.max_pool2d(x, 2).shape == (0, 8, 3, 3)
        assert fcb.spatial_mean(x).shape == (0, 8)
    assert fcb.spatial_mean(torch.empty(2, 0, 4, 4, device=device), keepdim=True).shape == (2, 0, 1, 1)
    assert fcb.spatial_mean(torch.empty(2, 3, 0, 4, device=device)).isnan().all()


def test_gradients(device, generator):
    """PyTorch's own, and the same results."""
    x = torch.randn(2, 3, 5, 6, generator=generator).double().to(device).requires_grad_()
    pool = lambda x: fcb.max_pool2d(x, 3, 2, 1)  # noqa: E731
    mean = lambda x: fcb.spatial_mean(x, keepdim=True)  # noqa: E731
    for f in (pool, mean):
        assert torch.autograd.gradcheck(f, (x,))
        with torch.no_grad():
            raw = f(x)
        torch.testing.assert_close(raw, f(x).detach())
        found = torch.func.grad(lambda x, f=f: f(x).sum())(x)
        torch.testing.assert_close(found, torch.autograd.grad(f(x).sum(), x)[0])


def test_messages(device):
    x = torch.randn(2, 3, 8, 8, device=device)
    for arguments, message in [
        ((x[0], 2), r"input has shape \[3, 8, 8\], expected 4 dimensions: \(N, C, H, W\)"),
        (
            (x[:, :0], 2),
            r"input has shape \[2, 0, 8, 8\], expected at least one element in each dimension but the first",
        ),
        ((x.int(), 2), "input has dtype Int, expected float32, float16, bfloat16 or float64"),
        ((x, [2, 2, 2]), "kernel_size has 3 values, expected 1 or 2, for the 2 spatial dimensions of input"),
        ((x, 0), r"kernel_size is \[0, 0\], expected values from 1"),
        ((x, 2, 0), r"stride is \[0, 0\], expected values from 1"),
        ((x, 3, 2, 2), r"padding is \[2, 2\], expected at most half of kernel_size, which is \[3, 3\]"),
        (
            (x, (1, 9)),
            "expected at least one window: in dimension 3 that has 8 elements with its padding, and a window",
        ),
        ((x, 2, 2, 0, 0), r"dilation is \[0, 0\], expected values from 1"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            fcb.max_pool2d(*arguments)
    for shape in ((2, 3), (1, 2, 3, 4, 5, 6)):
        with pytest.raises(RuntimeError, match="spatial_mean: input has shape .*, expected"):
            fcb.spatial_mean(torch.ones(shape, device=device))
    with pytest.raises(TypeError, match="max_pool2d: input is of type list, expected a tensor"):
        fcb.max_pool2d([1.0], 2)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"max_pool2d: input has shape \[3, 8, 8\], expected 4 dimensions"):
        fcb.max_pool2d(x[0], 2)
    with pytest.raises(RuntimeError, match=r"spatial_mean: input has shape \[2, 3\], expected 3 to 5 dimensions"):
        fcb.spatial_mean(x[..., 0, 0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fakes(device, memory_format, generator):
    x = torch.randn(2, 8, 7, 9, generator=generator).to(device, memory_format=memory_format)
    with torch.no_grad():
        for window in ([3, 2, 1], [2], [[3, 1], [1, 2], [1, 0], [1, 1], True]):
            torch.library.opcheck(ops.max_pool2d.default, (x, *window))
        torch.library.opcheck(ops.spatial_mean.default, (x,))
        torch.library.opcheck(ops.spatial_mean.default, (x,), {"keepdim": True})
