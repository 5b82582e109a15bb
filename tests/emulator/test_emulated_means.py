"""The depthwise kernel that puts out means: images in one block, several of them, in parts, and across clusters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import emulated
from common import random_bn
from fused_conv_bn import reference

EPS, FACTOR = 1e-3, 1.7
# Shape, side of the filters, stride, and padding. The emulated GPU decides how rows and columns are cut.
PROBLEMS: dict[str, tuple[tuple[int, ...], int, int, int]] = {
    "large images": ((3, 16, 40, 37), 3, 1, 1),
    "large images, a stride": ((5, 40, 70, 41), 5, 2, 2),
    "rows of one image after the other": ((19, 32, 18, 17), 3, 1, 1),
    "one small image": ((1, 16, 7, 7), 3, 1, 1),
    "many small images": ((67, 24, 5, 7), 3, 1, 1),
    "one image in parts": ((1, 32, 30, 9), 5, 1, 2),
    "columns of several blocks": ((2, 16, 9, 120), 3, 1, 1),
    "columns and rows": ((1, 72, 23, 61), 5, 2, 2),
    "a stride of 2": ((5, 40, 15, 14), 3, 2, 1),
    "5x5 with many channels": ((3, 264, 7, 7), 5, 1, 2),
    "results smaller than inputs": ((2, 16, 9, 11), 5, 1, 0),
    "two pixels": ((9, 16, 1, 2), 3, 1, 1),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_means(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Of the results to the last bit but for the order of sums; and those are what the kernel puts out without them."""
    shape, side, stride, padding = PROBLEMS[name]
    c = shape[1]
    x = torch.randn(shape, generator=generator).to(dtype).to(memory_format=torch.channels_last)
    w = torch.randn(c, 1, side, side, generator=generator).to(dtype)
    arguments = (w, None, *random_bn(c, dtype, "cpu", generator), FACTOR, EPS, stride, padding, 1, c)
    for turn, activation in enumerate(("silu", "relu6", "none")):
        named: dict[str, Any] = dict(activation=activation, algorithm="depthwise")
        expected = emulated.conv_bn_scale(x, *arguments, **named)
        if turn == 1:
            named["residual"] = torch.randn(expected.shape, generator=generator).to(expected)
            expected = emulated.conv_bn_scale(x, *arguments, **named)
        means = torch.full((shape[0], c), float("nan"), dtype=dtype)
        y = emulated.conv_bn_scale(x, *arguments, **named, means=means)
        assert torch.equal(y, expected)
        exact = y.double().mean((2, 3))
        sums = (
            2.0**-24 * y[0, 0].numel() * y.double().abs().mean((2, 3))
        )  # a rounding of float32 for each pixel at most
        bound = torch.finfo(dtype).eps / 2 * (exact.abs() + sums) + sums
        assert ((means.double() - exact).abs() <= bound + torch.finfo(dtype).tiny).all()
        again = torch.empty_like(means)
        emulated.conv_bn_scale(x, *arguments, **named, means=again)
        assert torch.equal(means, again)  # one order of sums, in whatever order blocks run


def test_values_that_are_not_finite(generator: torch.Generator) -> None:
    """They reach their own channel of their own image."""
    x = torch.randn(3, 16, 9, 9, generator=generator).half().to(memory_format=torch.channels_last)
    x[1, 5, 8, 8] = float("inf")
    x[2, 0, 0, 0] = float("nan")
    w = torch.ones(16, 1, 3, 3).half()
    bn = random_bn(16, torch.float16, "cpu", generator)
    means = torch.empty(3, 16, dtype=torch.float16)
    y = emulated.conv_bn_scale(x, w, None, *bn, 1.0, EPS, 1, 1, 1, 16, algorithm="depthwise", means=means)
    assert torch.equal(means.isfinite(), y.isfinite().all(3).all(2)) and means.isfinite().sum() == 3 * 16 - 2


def test_gpus_without_clusters(generator: torch.Generator) -> None:
    """There an image is one block's, or sums of its parts are another kernel's."""
    x = torch.randn(2, 16, 9, 9, generator=generator).half().to(memory_format=torch.channels_last)
    w, bn = torch.ones(16, 1, 3, 3).half(), random_bn(16, torch.float16, "cpu", generator)
    means = torch.empty(2, 16, dtype=torch.float16)
    run: dict[str, Any] = dict(algorithm="depthwise", means=means, capability=86)
    y = emulated.conv_bn_scale(x, w, None, *bn, 1.0, EPS, 1, 1, 1, 16, **run)
    torch.testing.assert_close(means, reference.spatial_mean(y), rtol=2e-3, atol=1e-3)
    wide = torch.randn(1, 16, 5, 500, generator=generator).half().to(memory_format=torch.channels_last)
    run["means"] = means = torch.empty(1, 16, dtype=torch.float16)
    y = emulated.conv_bn_scale(wide, w, None, *bn, 1.0, EPS, 1, 1, 1, 16, **run)
    torch.testing.assert_close(means, reference.spatial_mean(y), rtol=2e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="not cover"):  # no registers for it
        emulated.conv_bn_scale(x.float(), w.float(), None, *(t.float() for t in bn), groups=16, **run)
