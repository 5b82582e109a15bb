"""Small networks to train, plain and ours with the same state, and what training leaves in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from common import random_bn
from fused_conv_bn.reference import ACTIVATIONS


class Plain(nn.Module):
    """What ConvBnScale2d stands for, of PyTorch's modules alone."""

    def __init__(self, inputs: int, outputs: int, kernel: int, factor: Any, activation: str, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, **kwargs)
        self.bn = nn.BatchNorm2d(outputs)
        self.scaling_factor, self.activation = factor, activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x)) * self.scaling_factor
        return ACTIVATIONS[self.activation](y if residual is None else y + residual)


class Network(nn.Module):
    """A first layer of few terms, a depthwise one, a 1x1, and a 3x3 of many terms with a residual."""

    def __init__(self, fused: bool) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, kernel: int, factor: float, activation: str, **kwargs: Any) -> nn.Module:
            if fused:
                return fcb.ConvBnScale2d(inputs, outputs, kernel, factor, activation=activation, **kwargs)
            return Plain(inputs, outputs, kernel, factor, activation, **kwargs)

        self.stem = block(3, 8, 3, 1.0, "relu", stride=2, padding=1)
        self.depthwise = block(8, 8, 3, 1.0, "silu", padding=1, groups=8, bias=False)
        self.wide = block(8, 12, 1, 1.3, "none")
        self.deep = block(12, 12, 3, 0.7, "relu", padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(self.depthwise(self.stem(x)))
        return self.head(self.deep(y, y).mean((2, 3)))


def randomize(model: nn.Module, generator: torch.Generator) -> None:
    for bn in model.modules():
        if isinstance(bn, nn.BatchNorm2d):
            targets = bn.running_mean, bn.running_var, bn.weight, bn.bias
            for target, value in zip(targets, random_bn(bn.num_features, torch.float64, "cpu", generator), strict=True):
                target.data.copy_(value)


def networks(
    generator: torch.Generator, device: str = "cpu", dtype: torch.dtype = torch.float64
) -> tuple[Network, Network]:
    """(plain, ours), in training mode, with the same random state."""
    plain, ours = Network(False), Network(True)
    randomize(plain, generator)
    ours.load_state_dict(plain.state_dict())
    return plain.to(device, dtype), ours.to(device, dtype)


def batches(
    generator: torch.Generator, count: int, device: str = "cpu", dtype: torch.dtype = torch.float64
) -> list[tuple[Tensor, Tensor]]:
    return [
        (
            torch.randn(6, 3, 10, 12, generator=generator, dtype=torch.float64).to(device, dtype),
            torch.randint(5, (6,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


def left(model: nn.Module) -> dict[str, Tensor]:
    """State and gradients, copied."""
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return copy.deepcopy({**model.state_dict(), **gradients})


def assert_same(ours: dict[str, Tensor], plain: dict[str, Tensor], **tolerances: Any) -> None:
    assert ours.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(
            ours[name], plain[name], **tolerances, msg=lambda message, name=name: f"{name}: {message}"
        )


Step = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""The loss of a batch."""


def plain_step(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), target)


def train(model: nn.Module, data: list[tuple[Tensor, Tensor]], step: Step = plain_step) -> dict[str, Tensor]:
    """Trains with momentum; what is left, with the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for x, target in data:
        optimizer.zero_grad()
        loss = step(model, x, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {**left(model), "losses": torch.stack(losses)}
