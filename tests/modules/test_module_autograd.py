"""Gradients of the modules: right in value, compiled and under autocast too, no dearer in memory than eager's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import FEW, MANY, random_bn, saved_bytes
from fused_conv_bn.reference import ACTIVATIONS
from module_pairs import CONV2D, Row, residual_of, rows

pytestmark = pytest.mark.usefixtures("no_leftover_graphs")
K, FACTOR = 6, 1.7


def modules(channels: int, generator: torch.Generator, row: Row = CONV2D, **kwargs: Any) -> tuple[Any, Any]:
    """(plain, ours): PyTorch's own modules with the same state, and the module."""
    first, *sizes = row.arguments.values()
    ours = row.of(channels, *sizes, **{"scaling_factor": FACTOR, **kwargs})
    targets = ours.bn.running_mean, ours.bn.running_var, ours.bn.weight, ours.bn.bias
    for target, value in zip(targets, random_bn(K, torch.float32, "cpu", generator), strict=True):
        target.data.copy_(value)
    plain = copy.deepcopy(ours)
    plain.forward = lambda x, residual=None: plain._forward_plain(x, residual)  # type: ignore[method-assign]
    return plain, ours


def sample(row: Row, channels: int, generator: torch.Generator, device: str, dtype: torch.dtype) -> Tensor:
    size = [*row.size]
    size[1 if row.name == "conv" else -1] = channels
    return torch.randn(size, generator=generator).to(device, dtype)


def steps(module: Any, x: Tensor, *rest: Any) -> list[Tensor]:
    """The gradients of the input and of the parameters, and the buffers."""
    leaf = x.clone().requires_grad_()
    module.zero_grad()
    module(leaf, *rest).square().sum().backward()
    named = [
        p.grad.clone()
        for n, p in module.named_parameters()
        if p.grad is not None and n not in ("conv.bias", "linear.bias")
    ]
    return [leaf.grad, *named, *(b.clone() for b in module.buffers())]


MODES: dict[str, Callable[[Any], Any]] = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "frozen bn": lambda m: (m.train(), m.bn.eval(), m.bn.requires_grad_(False)),
    "frozen convolution": lambda m: (m.train(), m.get_submodule(m._pair.name).requires_grad_(False)),
}
modes = pytest.mark.parametrize("mode", MODES)
terms = pytest.mark.parametrize("channels", [FEW, MANY], ids=["few terms", "many terms"])


@rows
@modes
@terms
@pytest.mark.parametrize("factor", ["number", "tensor", "parameter"])
def test_module(row: Row, factor: str, channels: int, mode: str, device: str, generator: torch.Generator) -> None:
    value: Any = {"number": 1.7, "tensor": torch.tensor(1.7), "parameter": nn.Parameter(torch.tensor(1.7))}[factor]
    plain, ours = modules(channels, generator, row, scaling_factor=value, activation="silu")
    for m in (plain, ours):
        m.to(device, torch.float64)
        MODES[mode](m)
        if factor == "tensor":
            m.scaling_factor = m.scaling_factor.to(device)
    x = sample(row, channels, generator, device, torch.float64)
    residual = residual_of(row, generator, device, torch.float64)
    for _ in range(2):
        for a, b in zip(steps(ours, x, residual), steps(plain, x, residual), strict=True):
            torch.testing.assert_close(a, b)
    if factor == "parameter":
        assert ours.scaling_factor.grad is not None


@modes
@terms
def test_compiled_module(channels: int, mode: str, device: str, generator: torch.Generator) -> None:
    """fullgraph, twice, and for other shapes."""
    plain, ours = modules(channels, generator, activation="silu", padding=1)
    for m in (plain, ours):
        m.to(device, torch.float64)
        MODES[mode](m)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for n in (2, 2, 3, 5):
        x = torch.randn(n, channels, 6, 5 + n, generator=generator).to(device, torch.float64)
        ours.zero_grad()
        leaf = x.clone().requires_grad_()
        compiled(leaf).square().sum().backward()
        named = [
            p.grad.clone()
            for k, p in ours.named_parameters()
            if p.grad is not None and k not in ("conv.bias", "linear.bias")
        ]
        got = [leaf.grad, *named, *(b.clone() for b in ours.buffers())]
        for a, b in zip(got, steps(plain, x), strict=True):
            torch.testing.assert_close(a, b)


@rows
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiled_classes(row: Row, mode: str, device: str, generator: torch.Generator) -> None:
    plain, ours = modules(FEW, generator, row, activation="silu")
    for m in (plain, ours):
        m.to(device, torch.float64)
        MODES[mode](m)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x, residual = sample(row, FEW, generator, device, torch.float64), residual_of(row, generator, device, torch.float64)
    compiled.named_parameters, compiled.buffers = ours.named_parameters, ours.buffers
    for a, b in zip(steps(compiled, x, residual), steps(plain, x, residual), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, residual), plain(x, residual))


def test_inductor(device: str, generator: torch.Generator) -> None:
    plain, ours = modules(FEW, generator, activation="relu")
    for m in (plain, ours):
        m.to(device, torch.float64).train()
    compiled = torch.compile(ours, fullgraph=True)
    x = torch.randn(2, FEW, 6, 5, generator=generator).to(device, torch.float64)
    leaf = x.clone().requires_grad_()
    compiled(leaf).square().sum().backward()
    torch.testing.assert_close(leaf.grad, steps(plain, x)[0])


@modes
@terms
def test_module_under_autocast(channels: int, mode: str, device: str, generator: torch.Generator) -> None:
    plain, ours = modules(channels, generator, activation="relu")
    for m in (plain, ours):
        m.to(device)
        MODES[mode](m)
    x = torch.randn(4, channels, 8, 8, generator=generator).to(device)
    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    results = []
    for m in (ours, plain):
        leaf = x.clone().requires_grad_()
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01)
        with torch.autocast(device, torch.bfloat16):
            y = m(leaf)
            assert y.dtype == torch.bfloat16
            loss = y.float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        results.append([leaf.grad, *(p for n, p in m.named_parameters() if n != "conv.bias")])
        scaler.update()
    truth = copy.deepcopy(plain)
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * b.abs().max().item())
    del truth


def test_backward_under_another_autocast(device: str, generator: torch.Generator) -> None:
    """Backward computes as forward did, whatever surrounds the call of backward()."""
    _, ours = modules(FEW, generator, activation="silu")
    ours.to(device)
    x = torch.randn(2, FEW, 6, 6, generator=generator).to(device)
    expected = steps(ours.eval(), x)
    leaf = x.clone().requires_grad_()
    ours.zero_grad()
    y = ours(leaf).square().sum()
    with torch.autocast(device, torch.bfloat16):
        y.backward()
    assert torch.equal(leaf.grad, expected[0])


@terms
def test_module_checkpointed(channels: int, device: str, generator: torch.Generator) -> None:
    _, ours = modules(channels, generator, activation="silu")
    ours.to(device).eval()
    x = torch.randn(2, channels, 6, 6, generator=generator).to(device)
    expected = steps(ours, x)
    for a, b in zip(steps(lambda_module(ours), x), expected, strict=True):
        assert torch.equal(a, b)


def lambda_module(ours: Any) -> Any:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ours

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner.named_parameters()

    return Checkpointed()


@modes
@terms
def test_module_is_deterministic(channels: int, mode: str, device: str, generator: torch.Generator) -> None:
    _, ours = modules(channels, generator, activation="silu")
    ours.to(device)
    MODES[mode](ours)
    x = torch.randn(2, channels, 6, 6, generator=generator).to(device)
    first, second = (steps(copy.deepcopy(ours), x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@rows
@modes
@terms
def test_module_memory(row: Row, channels: int, mode: str, device: str, generator: torch.Generator) -> None:
    for activation in ACTIVATIONS:
        plain, ours = modules(channels, generator, row, activation=activation)
        for m in (plain, ours):
            m.to(device)
            MODES[mode](m)
        x = sample(row, channels, generator, device, torch.float32).requires_grad_()
        assert saved_bytes(lambda m=ours, x=x: m(x)) <= saved_bytes(lambda m=plain, x=x: m(x)), activation
