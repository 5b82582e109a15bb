"""A network with each kind of group that the CPU has an op for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common import random_bn


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.pool = nn.MaxPool2d(2)
        self.conv, self.bn = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.bare = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU())
        self.norm, self.squeeze, self.head = nn.BatchNorm2d(32), nn.Conv2d(32, 32, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        y = torch.relu(x + self.bn(self.conv(x)))
        z = torch.relu(self.norm(torch.cat([x, self.bare(y)], 1)))
        z = torch.relu(z * torch.sigmoid(self.squeeze(z.mean((2, 3), keepdim=True))))
        return self.head(z.mean((2, 3)))


def random_statistics(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """In evaluation mode, with BatchNorms that are not nearly the identity."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            statistics = random_bn(m.num_features, torch.float32, "cpu", generator)
            for name, value in zip(("running_mean", "running_var", "weight", "bias"), statistics, strict=True):
                getattr(m, name).data.copy_(value)
    return model.eval()
