"""Batch statistics: shapes, random state, the truth in numpy's 80-bit long double, and what results are held to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_conv_bn as fcb
from common import DTYPES, long, random_bn
from conv_problems import channels_last
from elementwise_problems import LAYOUTS, SHAPES, allowed, epilogue_of, errors, long_of
from fused_conv_bn import reference

OPS = torch.ops.fused_conv_bn
FACTOR = 1.7
MOMENTUM = 0.3
EPS = 1e-3
CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def values_per_channel(shape: tuple[int, ...]) -> int:
    return math.prod(shape) // shape[1]


# Those of the inference ops, and some that are cut into several parts, or whose parts are cut unevenly.
TRAIN_SHAPES = [shape for shape in SHAPES if values_per_channel(shape) > 1]
LONG_SHAPES = [
    (2, 3, 300, 301),  # planes in several parts, off the 16-byte boundaries
    (1, 2, 70001),
    (150, 5, 7, 7),  # several planes at a time
    (64, 40, 5, 5),
    (700, 48, 3, 3),  # planes shorter than 128 bytes: each pixel a column
    (9000, 24),
    (3001, 33),
    (2, 1030, 9, 9),
    (40, 260, 12, 12),
]


def state(channels: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> list[Tensor]:
    """running_mean, running_var, weight, bias."""
    return list(random_bn(channels, dtype, device, generator))


def long_moments(y: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Of each channel: mean, biased variance, and how many values there are."""
    axes = (0, *range(2, y.ndim))
    mean = y.mean(axes, keepdims=True)
    return mean.reshape(-1), ((y - mean) ** 2).mean(axes), y.size // y.shape[1]


def long_train(y: np.ndarray, weight: Tensor | None, bias: Tensor | None, eps: float = EPS) -> np.ndarray:
    mean, var, _ = long_moments(y)
    shape = (-1,) + (1,) * (y.ndim - 2)
    z = (y - mean.reshape(shape)) / np.sqrt(var + np.longdouble(eps)).reshape(shape)
    if weight is not None:
        z = z * long(weight).reshape(shape)
    if bias is not None:
        z = z + long(bias).reshape(shape)
    return z * np.longdouble(FACTOR)


def adds_in_float32(x: Tensor) -> bool:
    """Whether kernels that gather statistics add the first few values up in float32."""
    return x.is_cuda


def check_running(
    y: np.ndarray,
    before: list[Tensor],
    after: list[Tensor],
    conv_bias: Tensor | None = None,
    momentum: float = MOMENTUM,
    slack: float = 0,
) -> None:
    """Within two roundings of the exact values, of which the mean's is that of its two terms: they may cancel. On CUDA
    also within one of what is averaged.
    ``slack``: what the values that are averaged may be off by."""
    mean, var, count = long_moments(y)
    if conv_bias is not None:
        mean = mean + long(conv_bias)
    u = DTYPES[after[0].dtype]
    # In float64 there is nothing wider to add up in: a few roundings of the largest partial sum.
    roundings = 2 if u > 2.0**-50 else 64
    slack += DTYPES[torch.float32] if adds_in_float32(after[0]) and u > 2.0**-50 else 0
    m = np.longdouble(momentum)
    for old, new, batch, spread in (
        (before[0], after[0], mean, np.sqrt(var)),
        (before[1], after[1], var * count / (count - 1), var),
    ):
        exact = (1 - m) * long(old) + m * batch
        size = abs((1 - m) * long(old)) + abs(m * batch)
        off = abs(long(new) - exact)
        assert (off <= roundings * u * size + slack * m * (spread + abs(batch))).all(), (off / (u * size)).max()


def check_statistics(
    y: np.ndarray, mean: Tensor, invstd: Tensor, dtype: torch.dtype, eps: float = EPS, slack: float = 0
) -> None:
    """What a backward needs of a batch, in the type that it is accumulated in: within four roundings of the exact values.
    ``slack``: as in check_running, here of what they are made of, so that half of it remains behind a root."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert mean.dtype == invstd.dtype == wide and mean.shape == invstd.shape == y.shape[1:2]
    batch, var, _ = long_moments(y)
    u = DTYPES[wide]
    roundings = 4 if u > 2.0**-50 else 64
    slack += DTYPES[torch.float32] if adds_in_float32(mean) and u > 2.0**-50 else 0
    size = abs(y).mean((0, *range(2, y.ndim)))
    assert (abs(long(mean) - batch) <= roundings * u * size + slack * (np.sqrt(var) + size)).all()
    exact = 1 / np.sqrt(var + np.longdouble(eps))
    assert (abs(long(invstd) - exact) <= (roundings * u + slack) * exact).all()


def check_forms(name: str, before: list[Tensor | None], *arguments: Any, **epilogue: Any) -> tuple[Tensor, Tensor]:
    """All three forms compute the same bits, _functional without a write. Returns mean and invstd.

    ``arguments``: those ahead of the running statistics, a list of those behind the parameters."""
    ahead, behind = arguments[:-1], arguments[-1]

    def run(form: str) -> tuple[Any, list[Tensor | None]]:
        s = copy.deepcopy(before)
        return getattr(OPS, name + form)(*ahead, *s, *behind, **epilogue), s

    y, updated = run("")
    (y_stats, mean, invstd), updated_stats = run("_stats")
    (y_functional, mean_functional, invstd_functional, *running), kept = run("_functional")
    for a in (y_stats, y_functional):
        assert torch.equal(a.nan_to_num(99.0), y.nan_to_num(99.0)) and (a.stride(), a.dtype) == (y.stride(), y.dtype)
    assert torch.equal(mean, mean_functional) and torch.equal(invstd, invstd_functional)
    for old, new, new_stats, new_functional, same in zip(
        before, updated, updated_stats, (*running, *before[2:]), kept, strict=True
    ):
        if old is None:
            assert new_functional is None or (new_functional.shape == (0,) and new_functional.dtype == mean.dtype)
            continue
        assert torch.equal(new, new_stats) and torch.equal(new, new_functional) and new_functional.dtype == old.dtype
        assert torch.equal(same, old)
    if before[0] is not None and y.numel() > 0:
        assert not torch.equal(updated[0], before[0])
        assert all(r.data_ptr() != k.data_ptr() for r, k in zip(running, kept, strict=False))
    return mean, invstd


# input, weight, stride, padding, dilation, groups
CONV_CASES: dict[str, tuple[Any, ...]] = {
    "first layer of wide rows": ((2, 3, 40, 70), (9, 3, 3, 3), 1, 1, 1, 1),
    "3x3": ((4, 8, 14, 13), (16, 8, 3, 3), 1, 0, 1, 1),
    "stride and padding": ((4, 6, 15, 12), (10, 6, 3, 3), (2, 1), (1, 2), 1, 1),
    "3 channels, 7x7": ((3, 3, 20, 21), (8, 3, 7, 7), 2, 3, 1, 1),
    "dilation": ((2, 4, 15, 15), (6, 4, 3, 3), 1, 2, 2, 1),
    "groups": ((2, 8, 9, 9), (6, 4, 3, 3), 1, 1, 1, 2),
    "depthwise": ((4, 12, 11, 13), (12, 1, 3, 3), 1, 1, 1, 12),
    "1x1": ((2, 16, 7, 5), (24, 16, 1, 1), 1, 0, 1, 1),
    "1 pixel": ((5, 4, 3, 3), (6, 4, 3, 3), 1, 0, 1, 1),
    "1d": ((4, 5, 33), (7, 5, 4), 3, 1, 1, 1),
    "3d": ((2, 4, 5, 6, 7), (6, 4, 3, 3, 3), 1, 1, 1, 1),
}


# The same, of 16 bits in channels_last. Tiles end behind the last pixel, filter and channel.
STORED_CASES: dict[str, tuple[Any, ...]] = {
    "3x3": ((2, 8, 17, 19), (40, 8, 3, 3), 1, 1, 1, 1),
    "3x3 with a stride": ((1, 24, 45, 49), (136, 24, 3, 3), 2, 1, 1, 1),
    "2x3 with dilation": ((1, 96, 24, 21), (8, 96, 2, 3), 1, (0, 2), (1, 2), 1),
    "1x1": ((3, 16, 14, 15), (264, 16, 1, 1), 1, 0, 1, 1),
    "few pixels, many channels": ((2, 40, 9, 8), (136, 40, 4, 4), 1, 2, 1, 1),
    "1 pixel of each image": ((5, 16, 3, 3), (24, 16, 3, 3), 1, 0, 1, 1),
    "2 pixels of each image": ((3, 16, 3, 4), (24, 16, 3, 3), 1, 0, 1, 1),
    "2 pixels": ((1, 8, 1, 2), (8, 8, 1, 1), 1, 0, 1, 1),
    "several tiles of each block": ((20, 24, 60, 61), (72, 24, 1, 1), 1, 0, 1, 1),
}


def check_stored_statistics(
    size: tuple[int, ...],
    weight_size: tuple[int, ...],
    *window: Any,
    dtype: torch.dtype,
    device: str,
    mean: float,
    generator: torch.Generator,
    activation: str = "none",
    residual: str = "none",
) -> None:
    """A batch's statistics are those of the convolution's values as they are stored, whatever their mean is, and what is put out
    is these values' BatchNorm; the same bits each time. ``mean``: of a channel, in about as many deviations."""
    x = torch.randn(size, generator=generator).add(mean / math.sqrt(math.prod(weight_size[1:])))
    x = channels_last(x.to(device, dtype))
    w = torch.rand(weight_size, generator=generator).sub(0 if mean else 0.5).to(device, dtype)
    before = state(weight_size[0], torch.float32, device, generator)
    z = covered(lambda: fcb.conv_scale_shift(x, w, None, None, *window))
    kwargs = epilogue_of(z, activation, residual, generator)
    results = []
    for _ in range(2):
        ours = copy.deepcopy(before)
        results.append((fcb.conv_bn_scale_train(x, w, None, *ours, FACTOR, 1.0, EPS, *window, **kwargs), *ours))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    y, *ours = results[0]
    check_running(long(z), before, ours, momentum=1.0)
    eager = reference.bn_scale_train(z, *copy.deepcopy(before), FACTOR, 1.0, EPS, **kwargs)
    got, eagers_error = errors(long_of(long_train(long(z), *before[2:]), kwargs), y, eager)
    assert got <= allowed(eagers_error, y), (got, eagers_error)


def covered(call: Callable[[], Any]) -> Any:
    """Skips where the algorithm that is forced does not cover the call."""
    try:
        return call()
    except RuntimeError as error:
        if "does not cover this convolution" not in str(error):
            raise
    pytest.skip("outside of the algorithm's domain")
