"""Which modules are convolutions and BatchNorms that the ops know: PyTorch's own, what inherits from them, and others'.

An op computes what a *class of PyTorch's* computes. A module of another class has a *twin*: an instance of that class
with the very same attributes, so that whatever happens to the module happens to its twin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from .. import _activations
from ..conditions import has_hooks

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_METHODS = (
    *("forward", "_conv_forward", "_check_input_dim", "_check_non_zero_input_channels"),
    *("__call__", "_call_impl", "__getattr__"),
)


def is_conv(m: nn.Module) -> bool:
    return isinstance(m, nn.modules.conv._ConvNd)


def is_norm(m: nn.Module) -> bool:
    return isinstance(m, nn.modules.batchnorm._BatchNorm) or is_frozen_norm(m)


def is_frozen_norm(m: nn.Module) -> bool:
    """FrozenBatchNorm2d of torchvision, detectron2 and those who took it from there: four buffers and no modes."""
    return (
        type(m).__name__ == "FrozenBatchNorm2d"
        and not m._parameters
        and m._buffers.keys() >= {"weight", "bias", "running_mean", "running_var"}
    )


def class_of_conv(m: nn.Module) -> type[nn.Module] | None:
    """The class of PyTorch's that computes what ``m`` computes; None if there is none."""
    return _inherited(m, CONVS) if m._parameters.keys() >= {"weight", "bias"} else None


class Norm(NamedTuple):
    """What a module computes: BatchNorm as a class of PyTorch's does it, and an activation behind it."""

    of: type[nn.Module]
    activation: str = "none"
    negative_slope: float = 0.01
    frozen: bool = False
    parts: tuple[nn.Module, ...] = ()  # called by it


def norm_of(m: nn.Module) -> Norm | None:
    """None: it is no BatchNorm, or does something else as well."""
    if is_frozen_norm(m):
        return Norm(nn.BatchNorm2d, frozen=True) if _is_affine(m) else None
    if not (m._parameters.keys() >= {"weight", "bias"} and m._buffers.keys() >= {"running_mean", "running_var"}):
        return None
    if type(m).__name__ == "BatchNormAct2d" and type(m).__module__.startswith("timm."):
        return _norm_act(m)
    of = _inherited(m, NORMS)
    return None if of is None else Norm(of)


def twin_of(m: nn.Module, of: type[nn.Module]) -> nn.Module:
    """``m``, or an instance of class ``of`` that shares its attributes."""
    if type(m) is of:
        return m
    twin = of.__new__(of)
    object.__setattr__(twin, "__dict__", m.__dict__)
    return twin


def frozen_twin(m: nn.Module) -> nn.Module:
    """A BatchNorm in evaluation with a FrozenBatchNorm2d's buffers."""
    twin = nn.BatchNorm2d.__new__(nn.BatchNorm2d)
    nn.Module.__init__(twin)
    twin.__dict__.update(_parameters=m._buffers, _buffers=m._buffers, training=False)
    twin.__dict__.update(eps=_frozen_eps(m), momentum=0.1, affine=True, track_running_stats=True)
    twin.__dict__.update(num_features=m._buffers["weight"].numel())  # type: ignore[union-attr]
    return twin


class FunctionNorm(NamedTuple):
    """A call of F.batch_norm with a module's tensors, under the names that a BatchNorm has for them."""

    path: str  # of the module
    training: bool
    momentum: float
    eps: float

    def twin(self, m: nn.Module) -> nn.Module:
        """A BatchNorm with the tensors of ``m``."""
        twin = AnyNorm.__new__(AnyNorm)
        nn.Module.__init__(twin)
        mean = m._buffers["running_mean"]
        affine = next((d for d in (m._parameters, m._buffers) if "weight" in d), _NO_AFFINE)
        twin.__dict__.update(_parameters=affine, _buffers=m._buffers, training=self.training)
        twin.__dict__.update(eps=self.eps, momentum=self.momentum, affine=True, track_running_stats=True)
        twin.__dict__.update(num_features=mean.numel(), num_batches_tracked=None)  # type: ignore[union-attr]
        return twin


class AnyNorm(nn.modules.batchnorm._BatchNorm):
    """F.batch_norm as a module: of any dimensions, and it counts no batches."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass


_NO_AFFINE: dict[str, torch.Tensor | None] = {"weight": None, "bias": None}


def _inherited(m: nn.Module, classes: tuple[type[nn.Module], ...]) -> type[nn.Module] | None:
    kind = type(m)
    for of in classes:
        if kind is of:
            return of
        if issubclass(kind, of):
            same = all(getattr(kind, name, None) is getattr(of, name, None) for name in _METHODS)
            tensors = "weight", "bias", "running_mean", "running_var"
            return of if same and not any(hasattr(kind, name) for name in tensors) else None
    return None


def _norm_act(m: nn.Module) -> Norm | None:
    """timm's BatchNormAct2d: a BatchNorm, then its ``drop``, then its ``act``."""
    parts = tuple(p for p in (m._modules.get("drop"), m._modules.get("act")) if p is not None)
    if len(parts) != 2 or not isinstance(m, nn.BatchNorm2d) or type(parts[0]) is not nn.Identity:
        return None
    if any(map(has_hooks, (m, *parts))):
        return None
    found = _activations.named(parts[1])
    if found is None:
        return None
    name, slope = found
    return Norm(nn.BatchNorm2d, name, 0.01 if slope is None else slope, parts=parts)


def _frozen_eps(m: nn.Module) -> float:
    return float(getattr(m, "eps", 1e-5))


def _is_affine(m: nn.Module) -> bool:
    """Whether a FrozenBatchNorm2d computes what its buffers and its ``eps`` say. Tried, for there are many of them."""
    b = m._buffers
    with torch.no_grad():
        weight, bias, mean, var = (b[k].double() for k in ("weight", "bias", "running_mean", "running_var"))  # type: ignore[union-attr]
        if weight.dim() != 1 or weight.is_meta:
            return False
        x = torch.linspace(-1, 1, weight.numel(), device=weight.device).view(1, -1, 1, 1)
        expected = (x.flatten() - mean) * (weight / (var + _frozen_eps(m)).sqrt()) + bias
        try:
            got = type(m).forward(m, x.to(b["weight"].dtype)).flatten().double()  # type: ignore[union-attr]
        except Exception:
            return False
        # Another eps is off by more wherever it matters.
        unit = (x.flatten().abs() + mean.abs()) * (weight / (var + _frozen_eps(m)).sqrt()).abs() + bias.abs()
        return bool(((got - expected).abs() <= 8 * torch.finfo(b["weight"].dtype).eps * unit + 1e-30).all())  # type: ignore[union-attr]
