"""ConvBnScale2d beside the model it replaces, with the same random state, and the ops that each of them runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common import DTYPES, assert_no_worse_than_eager, random_bn
from fused_conv_bn import ConvBnScale2d
from fused_conv_bn.reference import ACTIVATIONS

BN_ARGUMENTS = ("eps", "momentum", "affine", "track_running_stats")
FUSED = "fused_conv_bn::conv_bn_scale"
TRAIN = "fused_conv_bn::conv_bn_scale_train"


class Plain(nn.Module):
    """The model that a user replaces."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, scaling_factor: Any = 1.0, **kwargs: Any
    ) -> None:
        super().__init__()
        bn = {name: kwargs.pop(name) for name in BN_ARGUMENTS if name in kwargs}
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels, **bn)
        self.scaling_factor = scaling_factor

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str = "none") -> Tensor:
        y = self.bn(self.conv(x)) * self.scaling_factor
        return ACTIVATIONS[activation](y if residual is None else y + residual)


class Ops(TorchDispatchMode):
    """Records the names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        return sum(part == name if "::" in part else part in name for name in self.names)


def ops_of(module: nn.Module, *args: Any) -> Ops:
    with torch.no_grad(), Ops() as ops:
        module(*args)
    return ops


def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Random statistics and affine parameters: a fresh BatchNorm would hide a module that leaves BN out."""
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            targets = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
            for target, value in zip(targets, random_bn(bn.num_features, torch.float64, "cpu", generator), strict=True):
                if target is not None:
                    target.data.copy_(value)


def models(
    generator: torch.Generator,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    activation: str = "none",
    **kwargs: Any,
) -> tuple[Plain, ConvBnScale2d]:
    """Both modules with the same random state, in evaluation mode."""
    arguments: dict[str, Any] = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "scaling_factor": 1.7, **kwargs}
    plain, ours = Plain(**arguments), ConvBnScale2d(**arguments, activation=activation)
    randomize(plain, generator)
    ours.load_state_dict(plain.state_dict())
    return plain.to(device, dtype).eval(), ours.to(device, dtype).eval()


def sample(
    generator: torch.Generator, device: str = "cpu", dtype: torch.dtype = torch.float32, batch: int = 3
) -> Tensor:
    return torch.randn(batch, 4, 9, 8, generator=generator).to(device, dtype)


def check(y: Tensor, plain: nn.Module, *args: Any) -> Tensor:
    """Holds ``y`` to the accuracy, dtype and strides of ``plain(*args)``, which is returned."""

    def run(dtype: torch.dtype) -> Tensor:
        """On the CPU: CUDA's hardswish multiplies float64 by a float32 1/6."""
        cast = [a.to("cpu", dtype) if isinstance(a, Tensor) else a for a in args]
        with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
            return copy.deepcopy(plain).to("cpu", dtype)(*cast).to(y.device)

    with torch.no_grad():
        eager = plain(*args)
    assert (y.dtype, y.stride()) == (eager.dtype, eager.stride())
    assert_no_worse_than_eager(y, run(torch.float32) if y.dtype == torch.float64 else eager, run(torch.float64))
    return eager


CASES = {
    "plain": {},
    "no_scaling": {"scaling_factor": 1.0},
    "int_scaling": {"scaling_factor": -2},
    "tensor_scaling": {"scaling_factor": torch.tensor(0.37)},
    "no_bias": {"bias": False},
    "no_affine": {"affine": False},
    "no_bias_no_affine": {"bias": False, "affine": False},
    "no_stats": {"track_running_stats": False},
    "no_momentum": {"momentum": None},
    "eps": {"eps": 0.1},
    "stride": {"stride": (2, 1), "padding": (1, 2)},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2},
    "depthwise_1x1": {"groups": 2, "kernel_size": 1},
    "same": {"padding": "same", "kernel_size": (3, 2)},
    **{mode: {"padding_mode": mode, "padding": (1, 2)} for mode in ("zeros", "reflect", "replicate", "circular")},
}
cases = pytest.mark.parametrize("case", CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
