"""What a forward reads of modules that it does not call, and BatchNorms whose statistics others read."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_conv_bn as fcb


def assert_same(m: nn.Module, f: nn.Module, x: Tensor) -> None:
    """Results and states, in the mode that both have."""
    torch.testing.assert_close(f(x), m(x), rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(m.state_dict().items(), f.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


class Functional(nn.Module):
    """Its BatchNorm is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        b = self.bn
        y = F.batch_norm(self.conv(x), b.running_mean, b.running_var, b.weight, b.bias, b.training, b.momentum, b.eps)
        return F.relu(y)


@pytest.mark.parametrize("change", ["mode", "eps", "momentum"])
def test_attributes_of_a_norm_that_a_function_gets(change: str) -> None:
    m = Functional()
    if change == "momentum":
        m.bn.num_batches_tracked = None  # else a call in training is no group
    f = fcb.fuse(copy.deepcopy(m))
    x = torch.randn(4, 3, 9, 9)
    for step in range(3):
        for model in (m, f):
            model.train()
            model.bn.train(change == "momentum" or (change == "mode" and step == 1))
            if change != "mode" and step:
                setattr(model.bn, change, 0.1 * (step + 1))
        assert_same(m, f, x)
        assert fcb.report(f).counts.get("fused") or change == "mode"


class Options(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = 1.5


class ReadsOptions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.options = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Options()
        self.several = nn.ModuleList([Options(), Options()])

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x))) * self.options.alpha
        for options in self.several:
            y = y + options.alpha
        return y if self.options.training else y - 1.0


@pytest.mark.parametrize("change", ["attribute", "of several", "mode", "one more"])
def test_attributes_of_modules_that_are_not_called(change: str) -> None:
    m = ReadsOptions().eval()
    f = fcb.fuse(copy.deepcopy(m))
    x = torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        assert_same(m, f, x)
        for model in (m, f):
            if change == "attribute":
                model.options.alpha = 3.0
            elif change == "of several":
                model.several[1].alpha = 3.0
            elif change == "mode":
                model.options.train()
            else:
                model.options.beta = 2.0
        assert_same(m, f, x)
        assert "fused" in str(fcb.report(f))


def test_a_module_that_nobody_reads_may_change() -> None:
    m = ReadsOptions().eval()
    m.metric = Options()
    f = fcb.fuse(m)
    x = torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        for step in range(40):
            f(x)
            f.metric.alpha = float(step)
    assert f.__dict__["_fused_conv_bn"].captures == 1


def test_a_hook_that_came_and_went() -> None:
    f = fcb.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval())
    x, seen = torch.randn(2, 3, 9, 9), []
    with torch.no_grad():
        f(x)
        handle = f[1].register_forward_hook(lambda *_: seen.append(1))
        f(x)
        handle.remove()
        f(x)
        (entries,) = f.__dict__["_fused_conv_bn"].entries.values()
        assert len(seen) >= 1 and next(e for e in entries if e.guard.holds(f)).groups[0].bn is not None
        before = len(seen)
        f(x)
        assert len(seen) == before


class ReadsStatistics(nn.Module):
    def __init__(self, op: str) -> None:
        super().__init__()
        self.conv, self.bn, self.op = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), op
        self.read = self.bn.running_var.view(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.relu(y + self.read if self.op == "+" else y * self.read)


@pytest.mark.parametrize("op", ["+", "*"])
def test_statistics_that_are_read_behind_the_norm(op: str) -> None:
    m, f = (ReadsStatistics(op).train() for _ in range(2))
    f.load_state_dict(m.state_dict())
    fcb.fuse(f)
    for model in (m, f):
        model.read = model.bn.running_var.view(16, 1, 1)
    for _ in range(3):
        assert_same(m, f, 5 + 3 * torch.randn(8, 3, 64, 64))


@pytest.mark.parametrize("training", [False, True])
def test_statistics_that_require_a_gradient(training: bool) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.gain = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Parameter(torch.rand(16, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * self.gain

    f = fcb.fuse(Scaled()).train(training)
    x = torch.randn(8, 3, 64, 64)
    f(x)
    f.bn.running_mean.requires_grad_()
    with pytest.raises(RuntimeError, match="running_mean"):
        f(x)


@pytest.mark.parametrize("steps", [False, True])
def test_batches_are_counted_under_a_checkpoint(steps: bool) -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bn, self.gain = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Parameter(torch.rand(16))

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.linear(x))
            return F.relu(y * self.gain if steps else y)

    m = Linear()
    f = fcb.fuse(copy.deepcopy(m))
    x = torch.randn(8192, 8, requires_grad=True)
    for model in (m, f):
        model(x)
        for _ in range(2):
            checkpoint(model, x, use_reentrant=False).sum().backward()
    assert m.bn.num_batches_tracked == f.bn.num_batches_tracked
