"""TF32: modules and fuse() follow PyTorch's flag, where eager's own convolution does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fused_conv_bn as fcb
from common import random_bn
from fused_conv_bn import _conv

TF32 = 2.0**-11
"""Unit roundoff."""


def make(device: str, channels: int) -> tuple[nn.Conv2d, nn.BatchNorm2d, torch.Tensor]:
    conv = nn.Conv2d(channels, 64, 3, padding=1, bias=False).eval()
    bn = nn.BatchNorm2d(64).eval()
    mean, var, weight, bias = random_bn(64, torch.float32, "cpu", torch.Generator().manual_seed(1))
    bn.load_state_dict(bn.state_dict() | dict(running_mean=mean, running_var=var, weight=weight, bias=bias))
    x = torch.randn(4, channels, 30, 30)
    return (
        *(m.to(device, memory_format=torch.channels_last) for m in (conv, bn)),
        x.to(device).contiguous(memory_format=torch.channels_last),
    )  # type: ignore[return-value]


def module(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Module:
    return fcb.ConvBnScale2d.from_modules(conv, bn).eval()


def fused(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Module:
    return fcb.fuse(nn.Sequential(conv, bn)).eval()


def error(y: torch.Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, x: torch.Tensor) -> float:
    """Of the norm, in TF32's unit roundoffs."""
    with torch.no_grad():
        exact = bn.double()(conv.double()(x.double()))
    conv.float(), bn.float()
    return float((y.double() - exact).norm() / exact.norm()) / TF32


@pytest.mark.parametrize("make_model", [module, fused])
@pytest.mark.parametrize("grad", [False, True])
def test_the_flag(
    device: str, make_model: Callable[..., nn.Module], grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it, errors are of TF32's size at most; without it, of float32's, which is 2^-13 of that."""
    conv, bn, x = make(device, 40)
    for flag, limit in ((False, 2.0**-8), (True, 2.0)):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", flag)
        model = make_model(conv, bn)
        with torch.set_grad_enabled(grad):
            y = model(x.requires_grad_(grad)).detach()
        assert error(y, conv, bn, x.detach()) < limit, flag
        fcb.unfuse(model)


def test_where_eager_need_not_round(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first layer's kernel is accurate to float32, whatever the flag says."""
    conv, bn, x = make(device, 3)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with torch.no_grad(), fcb.use_algorithm("stem_sm80" if device == "cuda" else "default"):
        assert error(module(conv, bn)(x), conv, bn, x) < 2.0**-8


class Flag:
    """A tensor as far as allows_tf32() looks at it."""

    def __init__(self, dtype: torch.dtype, is_cuda: bool, shape: tuple[int, ...]) -> None:
        self.dtype, self.is_cuda, self.shape = dtype, is_cuda, shape


@pytest.mark.parametrize(
    ("dtype", "is_cuda", "channels", "expected"),
    [
        (torch.float32, True, 17, True),
        (torch.float32, True, 16, False),
        (torch.float32, False, 64, False),
        (torch.float16, True, 64, False),
        (torch.float64, True, 64, False),
    ],
)
def test_what_is_allowed(
    dtype: torch.dtype, is_cuda: bool, channels: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x: Any = Flag(dtype, is_cuda, (1, channels, 9, 9))
    w: Any = Flag(dtype, is_cuda, (8, channels, 3, 3))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert _conv.allows_tf32(x, w) == expected
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert not _conv.allows_tf32(x, w)


def test_the_newer_flag() -> None:
    """Once it was set, reading the older one raises. Nothing of that comes out."""
    before = torch.backends.cudnn.conv.fp32_precision
    x: Any = Flag(torch.float32, True, (1, 64, 9, 9))
    try:
        for value, expected in (("tf32", True), ("ieee", False)):
            torch.backends.cudnn.conv.fp32_precision = value
            assert _conv.allows_tf32(x, x) == expected
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
