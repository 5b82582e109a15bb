"""conv_bn_scale_mean: the convolution's result to the bit, and means of it, whatever puts them out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_conv_bn as fcb
from common import DTYPES, RESIDUALS, SLOPE, random_bn
from elementwise_problems import EPS, FACTOR, arrange
from fused_conv_bn import reference

ops = torch.ops.fused_conv_bn
# Shape of the input, filters, kernel, window.
PROBLEMS: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], dict[str, Any]]] = {
    "depthwise": ((2, 16, 9, 8), 16, (3, 3), {"padding": 1, "groups": 16}),
    "depthwise, large images": ((1, 32, 61, 130), 32, (5, 5), {"padding": 2, "groups": 32}),
    "depthwise, many images": ((97, 24, 7, 7), 24, (3, 3), {"padding": 1, "groups": 24}),
    "depthwise, a stride": ((3, 264, 15, 14), 264, (5, 5), {"padding": 2, "stride": 2, "groups": 264}),
    "depthwise, odd channels": ((2, 13, 9, 8), 13, (3, 3), {"padding": 1, "groups": 13}),
    "depthwise, one pixel": ((5, 16, 1, 1), 16, (3, 3), {"padding": 1, "groups": 16}),
    "depthwise, very wide images": ((1, 16, 5, 1500), 16, (3, 3), {"groups": 16}),
    "depthwise, 1xRxS": ((2, 16, 3, 9, 8), 16, (1, 3, 3), {"padding": (0, 1, 1), "groups": 16}),
    "1x1": ((3, 24, 7, 7), 40, (1, 1), {}),
    "3x3": ((2, 16, 9, 8), 8, (3, 3), {"padding": 1}),
    "1-D": ((2, 16, 9), 8, (3,), {}),
    "no images": ((0, 16, 9, 8), 16, (3, 3), {"padding": 1, "groups": 16}),
}


def tensors(name: str, dtype: torch.dtype, device: str, layout: str, g: torch.Generator) -> tuple[Any, ...]:
    shape, filters, kernel, window = PROBLEMS[name]
    x = arrange(torch.randn(shape, generator=g).to(device, dtype), layout)
    w = torch.randn(filters, shape[1] // window.get("groups", 1), *kernel, generator=g).to(device, dtype)
    return x, w, random_bn(filters, dtype, device, g), window


def assert_means(means: Tensor, y: Tensor) -> None:
    """They are rounded once, and their sums for each pixel at most."""
    dims = tuple(range(2, y.dim()))
    assert means.shape == (*y.shape[:2], *[1] * len(dims)) and means.dtype == y.dtype and means.is_contiguous()
    exact, size = y.double().mean(dims, keepdim=True), y.double().abs().mean(dims, keepdim=True)
    info, wide = torch.finfo(y.dtype), torch.finfo(reference.wide(y.dtype))
    sums = wide.eps / 2 * max(1, y[:1, :1].numel()) * size
    assert ((means.double() - exact).abs() <= info.eps / 2 * (exact.abs() + sums) + sums + info.tiny).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["", "channels_last"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_is_both_steps(name: str, layout: str, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    x, w, bn, window = tensors(name, dtype, device, layout, generator)
    arguments: Any = (x, w, None, *bn, FACTOR, EPS)
    y, means = fcb.conv_bn_scale_mean(*arguments, **window, activation="silu")
    expected = fcb.conv_bn_scale(*arguments, **window, activation="silu")
    assert torch.equal(y, expected) and y.stride() == expected.stride()
    assert_means(means, y)
    again = fcb.conv_bn_scale_mean(*arguments, **window, activation="silu")[1]
    assert torch.equal(means, again)  # one order of sums


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_epilogues(residual: str, activation: str, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    """Also a convolution's bias. The means' error is no more than twice eager's."""
    x, w, bn, window = tensors("depthwise", dtype, device, "channels_last", generator)
    named: dict[str, Any] = {"activation": activation, "negative_slope": SLOPE, **window}
    if residual != "none":
        named |= {"residual": torch.randn(x.shape, generator=generator).to(x), "residual_last": residual == "last"}
    arguments = (w, bn[3] + 1, *bn)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in named.items()}
    exact = reference.conv_bn_scale_mean(*(t.double() for t in (x, *arguments)), FACTOR, EPS, **wide)
    eager = reference.conv_bn_scale_mean(x, *arguments, FACTOR, EPS, **named)
    ours = fcb.conv_bn_scale_mean(x, *arguments, FACTOR, EPS, **named)
    assert torch.equal(ours[0], fcb.conv_bn_scale(x, *arguments, FACTOR, EPS, **named))
    assert_means(ours[1], ours[0])
    for mine, theirs, true in zip(ours, eager, exact, strict=True):
        rounding = (true - true.to(dtype).double()).norm()
        assert (mine.double() - true).norm() <= max(2 * (theirs.double() - true).norm(), 1.01 * rounding)


def test_values_that_are_not_finite(device: str, generator: torch.Generator) -> None:
    """They reach their own channel of their own image, and what rounds to infinity has an infinite mean."""
    x, w, bn, window = tensors("depthwise, many images", torch.float16, device, "channels_last", generator)
    x[1, 5, 6, 6], x[2, 0, 0, 0], x[3, 7, 3, 3] = float("inf"), float("nan"), 65504
    w = torch.full_like(w, 4)
    y, means = fcb.conv_bn_scale_mean(x, w, None, *bn, **window)
    assert torch.equal(means.isfinite()[:, :, 0, 0], y.isfinite().all(3).all(2))
    assert (~means.isfinite()).sum() >= 2


def test_gradients(device: str, generator: torch.Generator) -> None:
    x, w, bn, _ = tensors("depthwise", torch.float64, device, "", generator)
    x, w = x[:2, :3, :3, :2].detach().requires_grad_(), w[:3].detach().requires_grad_()
    bn = [t[:3].detach() for t in bn]

    def run(x: Tensor, w: Tensor, *affine: Tensor) -> Any:
        named: dict[str, Any] = dict(padding=1, groups=3, activation="tanh")
        return fcb.conv_bn_scale_mean(x, w, None, *bn[:2], *affine, FACTOR, EPS, **named)

    assert torch.autograd.gradcheck(run, (x, w, *(t.requires_grad_() for t in bn[2:])), fast_mode=True)
    found = torch.func.grad(lambda x: run(x, w.detach(), *bn[2:])[1].square().sum())(x.detach())
    (expected,) = torch.autograd.grad(run(x, w, *bn[2:])[1].square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_autocast(device: str, generator: torch.Generator) -> None:
    """As the two functions."""
    x, w, bn, window = tensors("depthwise", torch.float32, device, "channels_last", generator)
    with torch.autocast(device, torch.bfloat16):
        y, means = fcb.conv_bn_scale_mean(x, w, None, *bn, **window)
        assert y.dtype == means.dtype == torch.bfloat16
        assert torch.equal(y, fcb.conv_bn_scale(x, w, None, *bn, **window))
    assert_means(means, y)


@pytest.mark.parametrize("name", ["depthwise", "depthwise, one pixel", "3x3", "1-D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fakes(name: str, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    for layout in ("", "channels_last"):
        x, w, bn, window = tensors(name, dtype, device, layout, generator)
        lists = {k: [v] if k != "groups" else v for k, v in window.items()}
        op = ops.conv_bn_scale_mean.default
        torch.library.opcheck(op, (x, w, None, *bn, FACTOR, EPS), {**lists, "activation": "relu"})


def test_flops(generator: torch.Generator) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, w, bn, _ = tensors("1x1", torch.float32, "cpu", "", generator)
    with FlopCounterMode(display=False) as counter:
        ops.conv_bn_scale_mean(x, w, None, *bn)
    assert counter.get_total_flops() == 2 * 3 * 7 * 7 * 24 * 40


def test_messages(device: str, generator: torch.Generator) -> None:
    x, w, bn, _ = tensors("1x1", torch.float32, device, "", generator)
    for call in (fcb.conv_bn_scale_mean, ops.conv_bn_scale_mean):
        with pytest.raises(RuntimeError, match=r"conv_bn_scale_mean: running_mean has shape \[3\], expected \[40\]"):
            call(x, w, None, bn[0][:3], *bn[1:])
        with pytest.raises(RuntimeError, match="conv_bn_scale_mean: activation is 'elu', expected one of"):
            call(x, w, None, *bn, activation="elu")
    with pytest.raises(TypeError, match="conv_bn_scale_mean: running_var is None, expected a tensor"):
        fcb.conv_bn_scale_mean(x, w, None, bn[0], None)  # type: ignore[arg-type]
