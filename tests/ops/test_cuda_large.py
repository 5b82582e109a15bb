"""Tensors of more than 2^31 elements on CUDA: convolutions, pooling, gates, concatenation and gradients.

A tensor of float16 has 4.3 GB. It is compared with PyTorch in float64 where an index of 32 bits would go wrong: at the first
and the last images, and on both sides of element 2^31.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fused_conv_bn as fcb
from fused_conv_bn import reference

pytestmark = pytest.mark.parametrize("device", ["cuda"], indirect=True)

BIG = 2**31
CHUNK = 2**27  # elements that are compared at a time


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def normal(shape: tuple[int, ...], device: str, channels_last: bool = False, mean: float = 0.0) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, device=device, dtype=torch.float16, memory_format=layout).normal_(mean)


def bn_of(channels: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results of about 1, of which an element at a wrong place is that far off."""
    generator = torch.Generator().manual_seed(1)
    mean, weight, bias = torch.randn(3, channels, generator=generator)
    var = torch.rand(channels, generator=generator) * 1.5 + 0.5
    return mean.to(device), var.to(device), weight.sign().to(device) + 0.1 * weight.to(device), bias.to(device)


def edges(*tensors: Tensor) -> list[int]:
    """Images of dense tensors: the first and the last ones, and those around element 2^31."""
    images = tensors[0].size(0)
    found = {0, 1, images - 2, images - 1}
    for t in tensors:
        at = BIG // (t.numel() // images)
        found |= {at - 1, at, at + 1}
    return sorted(i for i in found if 0 <= i < images)


def taken(t: Tensor, images: list[int]) -> Tensor:
    """In float64. (Indexing would make an index of 64 bits for the whole tensor.)"""
    return torch.stack([t[i] for i in images]).double()


def assert_near(got: Tensor, exact: Tensor) -> None:
    """Within roundings of float16, twice where a convolution's result is rounded first."""
    assert got.shape == exact.shape and bool(got.isfinite().all())
    off = (got - exact).abs() - 2.0**-9 * exact.abs()
    assert float(off.max()) <= 2.0**-6, float(off.max())


# ---- convolutions ----------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    algorithm: str
    images: Callable[[int], int]
    """How many for more than so many elements."""
    size: tuple[int, int, int]  # channels, rows, columns
    weight: tuple[int, int, int, int]
    stride: int = 1
    padding: int = 0
    groups: int = 1
    channels_last: bool = False
    refused: str | None = None
    """An algorithm that is not for so many elements."""


CONVOLUTIONS = {
    "pixels, input": Case("by rule", lambda n: n // 4096 + 1, (4096, 1, 1), (16, 4096, 1, 1), refused="pointwise"),
    "pixels, output": Case("by rule", lambda n: n // 4096 + 1, (16, 1, 1), (4096, 16, 1, 1), refused="pointwise"),
    "depthwise": Case("depthwise", lambda n: n // 2**17 + 1, (32, 64, 64), (32, 1, 3, 3), 1, 1, 32),
    "depthwise, channels_last": Case(
        "depthwise", lambda n: n // 2**17 + 1, (32, 64, 64), (32, 1, 5, 5), 1, 2, 32, True
    ),
    "depthwise, stride 2": Case("depthwise", lambda n: n // 2**17 + 1, (32, 64, 64), (32, 1, 3, 3), 2, 1, 32),
    "gemm_sm90": Case(
        *("gemm_sm90", lambda n: n // 2**18 + 1, (64, 64, 64), (64, 64, 3, 3), 1, 1, 1, True),
        refused="gemm_sm80",
    ),
    "gemm_sm90, 1x1": Case("gemm_sm90", lambda n: n // 2**18 + 1, (64, 64, 64), (64, 64, 1, 1), channels_last=True),
    "gemm_sm90, stride 2": Case("gemm_sm90", lambda n: n // 2**18 + 1, (64, 64, 64), (64, 64, 3, 3), 2, 1, 1, True),
    "gemm_sm90, groups": Case("gemm_sm90", lambda n: n // 2**18 + 1, (64, 64, 64), (64, 16, 3, 3), 1, 1, 4, True),
    "gemm_sm80, output": Case("gemm_sm80", lambda n: n // 2**20 + 1, (64, 64, 64), (256, 64, 1, 1), channels_last=True),
    "stem_sm90, input": Case("stem_sm90", lambda n: n // (3 * 2**18) + 1, (3, 512, 512), (4, 3, 3, 3), 2, 1),
    "stem_sm90, output": Case("stem_sm90", lambda n: n // 2**20 + 1, (3, 128, 128), (64, 3, 3, 3), 1, 1),
    "stem_sm90, channels_last": Case(
        "stem_sm90", lambda n: n // 2**20 + 1, (3, 128, 128), (64, 3, 3, 3), 1, 1, 1, True
    ),
    "stem_sm80, input": Case("stem_sm80", lambda n: n // (3 * 2**18) + 1, (3, 512, 512), (4, 3, 3, 3), 2, 1),
    "stem_sm80, output": Case("stem_sm80", lambda n: n // 2**20 + 1, (3, 128, 128), (64, 3, 3, 3), 1, 1),
    "stem_sm80, channels_last": Case(
        "stem_sm80", lambda n: n // 2**20 + 1, (3, 128, 128), (64, 3, 3, 3), 1, 1, 1, True
    ),
}


def forced(algorithm: str, *statistics: str) -> contextlib.AbstractContextManager[None]:
    if algorithm.endswith("_sm90") and torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("its code is for compute capability 9.0 alone")
    return fcb.use_algorithm(algorithm, *statistics)


def operands_of(c: Case, device: str) -> tuple[Tensor, Tensor]:
    x = normal((c.images(BIG), *c.size), device, c.channels_last, mean=0.25)
    terms = c.weight[1] * c.weight[2] * c.weight[3]
    w = (torch.randn(c.weight, generator=torch.Generator().manual_seed(2)) / terms**0.5).to(device, torch.float16)
    return x, w


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(device: str, name: str) -> None:
    c = CONVOLUTIONS[name]
    window = c.stride, c.padding, 1, c.groups
    with forced(c.algorithm):
        x, w = operands_of(c, device)
        bn = bn_of(c.weight[0], device)
        y = fcb.conv_bn_scale(x, w, None, *bn, 1.5, 1e-5, *window, activation="silu")
    assert max(x.numel(), y.numel()) > BIG
    images = edges(x, y)
    wide = [t.double() for t in bn]
    exact = reference.conv_bn_scale(taken(x, images), w.double(), None, *wide, 1.5, 1e-5, *window, activation="silu")
    assert_near(taken(y, images), exact)
    if c.refused is not None and device == "cuda":
        with fcb.use_algorithm(c.refused), pytest.raises(RuntimeError, match="does not cover this convolution"):
            fcb.conv_bn_scale(x, w, None, *bn, 1.5, 1e-5, *window)


def test_a_gated_convolution(device: str) -> None:
    c = CONVOLUTIONS["gemm_sm90, 1x1"]
    x, w = operands_of(c, device)
    gate = torch.rand(x.size(0), x.size(1), 1, 1, device=device).half()
    bn = bn_of(c.weight[0], device)
    y = fcb.gate_conv_bn_scale(x, gate, w, None, *bn, 1.5)
    images = edges(x, y)
    gated = (taken(x, images) * taken(gate, images)).half().double()
    assert_near(taken(y, images), reference.conv_bn_scale(gated, w.double(), None, *(t.double() for t in bn), 1.5))


def test_means_of_a_depthwise_convolution(device: str) -> None:
    c = CONVOLUTIONS["depthwise, channels_last"]
    x, w = operands_of(c, device)
    y, means = fcb.conv_bn_scale_mean(x, w, None, *bn_of(c.weight[0], device), 1.5, 1e-5, 1, c.padding, 1, c.groups)
    images = edges(x, y)
    assert_near(taken(means, images), taken(y, images).double().mean((2, 3), keepdim=True))


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of images, of all tensors alike."""
    largest = max(t.numel() // t.size(0) for t in tensors)
    yield from zip(*(t.split(max(1, CHUNK // largest)) for t in tensors), strict=True)


@pytest.mark.parametrize(
    ("name", "statistics"),
    [
        ("stem_sm90, output", "from_output"),
        ("stem_sm90, output", "from_input"),
        ("stem_sm90, channels_last", "from_output"),
        ("stem_sm90, channels_last", "from_input"),
        ("gemm_sm90", "from_output"),
        ("depthwise", "from_output"),
    ],
)
def test_training_convolutions(device: str, name: str, statistics: str) -> None:
    c = CONVOLUTIONS[name]
    window = c.stride, c.padding, 1, c.groups
    with forced(c.algorithm, statistics):
        x, w = operands_of(c, device)
        mean, var, weight, bias = bn_of(c.weight[0], device)
        updated = mean.clone(), var.clone()
        y = fcb.conv_bn_scale_train(x, w, None, *updated, weight, bias, 1.5, 0.3, 1e-5, *window)
    assert y.numel() > BIG
    count = y.numel() // y.size(1)
    total = square = torch.zeros((), dtype=torch.float64, device=device)
    for part, _ in chunks(x, y):
        z = reference.convolution(part.float(), w.float(), None, *window).double()
        total, square = total + z.sum((0, 2, 3)), square + z.square().sum((0, 2, 3))
    batch_mean = total / count
    batch_var = square / count - batch_mean.square()  # of values around 0, in float64
    torch.testing.assert_close(updated[0].double(), 0.7 * mean.double() + 0.3 * batch_mean, rtol=1e-4, atol=1e-4)
    unbiased = batch_var * count / (count - 1)
    torch.testing.assert_close(updated[1].double(), 0.7 * var.double() + 0.3 * unbiased, rtol=1e-3, atol=1e-4)
    images = edges(x, y)
    exact = reference.conv_bn_scale(
        *(taken(x, images), w.double(), None, batch_mean, batch_var, weight.double(), bias.double(), 1.5, 1e-5),
        *window,
    )
    assert_near(taken(y, images), exact)


# ---- pooling, gates, concatenation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("stride", [1, 2])
def test_max_pool2d(device: str, stride: int, channels_last: bool) -> None:
    x = normal((BIG // 2**15 + 1, 8, 64, 64), device, channels_last)
    y = fcb.max_pool2d(x, 3, stride, 1)
    assert x.numel() > BIG and (y.numel() > BIG or stride == 2)
    images = edges(x, y)
    assert torch.equal(taken(y, images), torch.nn.functional.max_pool2d(taken(x, images), 3, stride, 1))


def test_max_pool2d_of_a_large_plane(device: str) -> None:
    """Its rows are compared in blocks, whose windows touch no others."""
    side = int(BIG**0.5) // 64 * 64 + 64
    x = normal((1, 1, side, side), device)
    assert x.numel() > BIG
    y = fcb.max_pool2d(x, 2)
    for row in (0, BIG // side // 2 - 32, side // 2 - 64):
        exact = torch.nn.functional.max_pool2d(x[:, :, 2 * row : 2 * row + 128].double(), 2)
        assert torch.equal(y[:, :, row : row + 64].double(), exact)


@pytest.mark.parametrize(
    ("images", "size", "channels_last"),
    [
        (lambda n: n // 2**15 + 1, (8, 64, 64), False),
        (lambda n: n // 2**15 + 1, (8, 64, 64), True),
        (lambda n: 1, (2, 2**15, 2**15 + 1), False),
        (lambda n: 1, (2, 2**15, 2**15 + 1), True),
    ],
    ids=["contiguous", "channels_last", "large planes", "large planes, channels_last"],
)
def test_spatial_mean(
    device: str, images: Callable[[int], int], size: tuple[int, int, int], channels_last: bool
) -> None:
    x = normal((images(BIG), *size), device, channels_last, mean=3.0)
    y = fcb.spatial_mean(x)
    for i in edges(x):
        rows = [part.double().sum((1, 2)) for part in x[i].split(max(1, CHUNK // (size[0] * size[2])), 1)]
        assert_near(y[i].double(), torch.stack(rows).sum(0) / (size[1] * size[2]))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_gate(device: str, channels_last: bool) -> None:
    x = normal((BIG // 2**15 + 1, 8, 64, 64), device, channels_last)
    gate = torch.rand(x.size(0), 8, 1, 1, device=device).half()
    y = fcb.gate(x, gate, residual=x, activation="relu")
    assert y.numel() > BIG
    images = edges(x)
    of_x, of_gate = taken(x, images), taken(gate, images)
    assert_near(taken(y, images), (of_x * of_gate + of_x).relu())


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_bn_scale_cat(device: str, channels_last: bool) -> None:
    images = BIG // 2**15 + 1
    parts = [normal((images, c, 64, 64), device, channels_last, mean) for c, mean in ((3, 0.0), (5, 1.0))]
    bn = bn_of(8, device)
    y = fcb.bn_scale_cat(parts, *bn, 1.5, activation="relu")
    assert y.numel() > BIG
    at = edges(y)
    together = torch.cat([taken(part, at) for part in parts], 1)
    assert_near(taken(y, at), reference.bn_scale(together, *(t.double() for t in bn), 1.5, activation="relu"))


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_a_step_of_bn_scale_train(device: str, channels_last: bool) -> None:
    x = normal((BIG // 2**15 + 1, 8, 64, 64), device, channels_last, mean=1.0).requires_grad_()
    dy = normal(tuple(x.shape), device, channels_last, mean=0.5)
    mean, var, weight, bias = bn_of(8, device)
    weight.requires_grad_()
    bias.requires_grad_()
    y = fcb.bn_scale_train(x, mean, var, weight, bias, 1.5, 0.3, 1e-5, activation="relu")
    y.backward(dy)
    assert x.grad is not None and weight.grad is not None and bias.grad is not None
    count = x.numel() // 8
    total = square = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        for (part,) in chunks(x):
            z = part.double()
            total, square = total + z.sum((0, 2, 3)), square + z.square().sum((0, 2, 3))
        batch_mean = total / count
        invstd = (square / count - batch_mean.square() + 1e-5).rsqrt()
        one, centre, gain = (reference.per_channel(t, 4) for t in (invstd, batch_mean, invstd * weight.double() * 1.5))
        sums = torch.zeros(2, 8, dtype=torch.float64, device=device)
        for part, result, gradient in chunks(x, y, dy):
            dv = gradient.double() * (result > 0)
            sums += torch.stack([dv.sum((0, 2, 3)), (dv * (part.double() - centre) * one).sum((0, 2, 3))])
        torch.testing.assert_close(bias.grad.double(), 1.5 * sums[0], rtol=1e-4, atol=1e-4 * count**0.5)
        torch.testing.assert_close(weight.grad.double(), 1.5 * sums[1], rtol=1e-4, atol=1e-4 * count**0.5)
        images = edges(x)
        of_x, of_dy, of_y = (taken(t, images) for t in (x, dy, y))
        dv, normed = of_dy * (of_y > 0), (of_x - centre) * one
        mean_dv, mean_product = (reference.per_channel(t / count, 4) for t in sums)
        assert_near(taken(x.grad, images), gain * (dv - mean_dv - normed * mean_product))


def test_a_backward_of_a_stem(device: str) -> None:
    """The weight's gradient and BatchNorm's may come from one pass over dy and the input."""
    c = CONVOLUTIONS["stem_sm90, output"]
    x, w = operands_of(c, device)
    w.requires_grad_()
    mean, var, weight, bias = bn_of(64, device)
    bias.requires_grad_()
    y = fcb.conv_bn_scale(x, w, None, mean, var, weight, bias, 1.5, 1e-5, 1, 1)
    dy = normal(tuple(y.shape), device, mean=0.25).mul_(2.0**-10)  # whose sums 16 bits hold
    y.backward(dy)
    assert y.numel() > BIG and w.grad is not None and bias.grad is not None
    exact, total = torch.zeros(c.weight, dtype=torch.float64, device=device), 0.0
    scale = reference.per_channel(weight * (var + 1e-5).rsqrt() * 1.5, 4)
    for part, gradient in chunks(x, dy):
        dz = gradient.float()
        total = total + dz.double().sum((0, 2, 3)) * 1.5
        exact += torch.nn.grad.conv2d_weight(part.float(), list(c.weight), dz * scale, 1, 1).double()
    # Roundings of dz to 16 bits add up as a walk of so many steps.
    steps = (y.numel() // 64) ** 0.5
    torch.testing.assert_close(bias.grad.double(), total, rtol=1e-4, atol=1e-4 * steps * 2.0**-10)
    torch.testing.assert_close(w.grad.double(), exact, rtol=2.0**-10, atol=2.0**-18 * steps)


def test_a_backward_of_a_convolution(device: str) -> None:
    """Behind the op PyTorch computes it, which has to get every element of dz."""
    c = CONVOLUTIONS["gemm_sm80, output"]
    x, w = operands_of(c, device)
    x.requires_grad_()
    bn = bn_of(256, device)
    y = fcb.conv_bn_scale(x, w, None, *bn, 1.5, activation="relu")
    dy = normal(tuple(y.shape), device, True)
    y.backward(dy)
    assert y.numel() > BIG and x.grad is not None
    images = edges(x, y)
    scale = reference.per_channel(bn[2].double() * (bn[1].double() + 1e-5).rsqrt() * 1.5, 4)
    dz = taken(dy, images) * (taken(y, images) > 0) * scale
    exact = torch.nn.functional.conv_transpose2d(dz, w.double())
    got = taken(x.grad, images)
    assert float((got - exact).abs().max()) <= 2.0**-7 * float(exact.abs().max())
