"""fuse() of F.batch_norm that a forward calls itself, with the tensors of a module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_conv_bn as fcb

C = 6


class Own(nn.Module):
    """A BatchNorm of one's own."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.eps = 1e-3
        self.weight = nn.Parameter(torch.rand(C) + 0.5) if affine else None
        self.bias = nn.Parameter(torch.randn(C)) if affine else None
        self.register_buffer("running_mean", torch.randn(C))
        self.register_buffer("running_var", torch.rand(C) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, training=self.training, momentum=0.2, eps=self.eps)


class Model(nn.Module):
    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run, self.conv = run, nn.Conv2d(C, C, 3, padding=1)
        self.bn, self.other = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        for m in (self.bn, self.other):
            with torch.no_grad():
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2.0)
                m.weight.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def of_a_module(m: Any, x: Tensor) -> Tensor:
    b = m.bn
    y = F.batch_norm(m.conv(x), b.running_mean, b.running_var, b.weight, b.bias, m.training, 0.3, b.eps)
    return torch.relu(y + x)


def of_two(m: Any, x: Tensor) -> Tensor:
    b = m.bn
    y = F.batch_norm(m.conv(x), b.running_mean, b.running_var, m.other.weight, b.bias, m.training, 0.3, b.eps)
    return torch.relu(y)


def without_affine(m: Any, x: Tensor) -> Tensor:
    """The module has one."""
    return torch.relu(F.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var, training=m.training))


def without_statistics(m: Any, x: Tensor) -> Tensor:
    return torch.relu(F.batch_norm(m.conv(x), None, None, m.bn.weight, m.bn.bias, True))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def check(plain: nn.Module, x: Tensor, groups: dict[bool, list[str]]) -> nn.Module:
    """Both modes, with gradients and without, and what is left of it in float64; returns the fused one."""
    fused = fcb.fuse(copy.deepcopy(plain))
    for training in (False, True, False):
        for m in (plain, fused):
            m.train(training).zero_grad()
        with torch.no_grad():
            close(fused(x), plain(x))
        a, b = (m(x).square() for m in (fused, plain))
        close(a, b)
        a.sum().backward()
        b.sum().backward()
        for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, atol=1e-4 * float(x.numel() ** 0.5), rtol=1e-4)
        for p, q in zip(fused.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(p, q)
        of_mode = fcb.fuse(copy.deepcopy(plain))
        of_mode(x)
        assert fcb.report(of_mode).groups() == groups[training]
    return fused


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_norm_of_one_s_own(dims: int, affine: bool) -> None:
    torch.manual_seed(dims)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](C, C, 3)
    groups = ["conv bn relu", "bn silu"]
    plain = nn.Sequential(conv, Own(affine), nn.ReLU(), nn.Identity(), Own(affine), nn.SiLU())
    x = torch.randn(3, C, *[6] * dims)
    fused = check(plain, x, {False: groups, True: groups})
    for m in (fused, plain):
        m.eval().double()
    close(fused(x.double()), plain(x.double()))
    for m in (fused, plain):  # other tensors under the same names, and another module in the place of one
        m[1].register_buffer("running_mean", m[1].running_mean * 2)
        m[4] = copy.deepcopy(m[1])
        m[4].running_var.mul_(3)
    close(fused(x.double()), plain(x.double()))


@pytest.mark.parametrize(
    ("run", "of_evaluation"),
    [
        (of_a_module, ["conv bn add relu"]),
        (of_two, []),
        (without_affine, []),
        (without_statistics, []),
    ],
)
def test_a_module_s_tensors(run: Callable[..., Tensor], of_evaluation: list[str]) -> None:
    """In training mode not those of a module that counts batches, which nobody does here."""
    torch.manual_seed(1)
    check(Model(run), torch.randn(2, C, 7, 7), {False: of_evaluation, True: []})


def test_a_module_that_is_replaced() -> None:
    torch.manual_seed(2)
    plain = Model(of_a_module).eval()
    fused = fcb.fuse(copy.deepcopy(plain))
    x = torch.randn(2, C, 7, 7)
    close(fused(x), plain(x))
    assert {row.path: row.state for row in fcb.report(fused).rows}["bn"] == "fused"
    for m in (plain, fused):
        m.bn = copy.deepcopy(m.other)
        m.bn.eps = 0.5
    close(fused(x), plain(x))
    frozen = fcb.fuse(copy.deepcopy(plain), x, freeze=True)
    with torch.no_grad():
        close(frozen(x), plain(x))
