"""What squeeze_excite must give, as truth.py says it of the ops that end in the epilogue: two layers, each with its errors.

A layer's error is that of its input, and roundings of the sum. The mean may be stored in 16 bits, where the op takes two
launches; with a gradient PyTorch's ops run, each of which stores its result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_conv_bn import reference

from .problem import Problem
from .truth import STEEPEST, Exact, activated, aligned, near, of_sums, smallest, steepened, unit

OF_HIDDEN = 0.25
"""Of a hidden value an activation's error in 16 bits, for each of run.STORED_ROUNDINGS: GELU's is 2^-12.6 of it there."""


@dataclass
class Sized:
    """A matrix, of images and channels, and how many unit roundoffs it may be off by for each rounding of run.py."""

    values: Tensor
    sizes: Tensor


@dataclass
class Squeezed:
    """What is computed on the way. ``hidden`` and ``gates``: before the activation."""

    mean: Sized
    hidden: Sized
    active: Sized
    gates: Sized
    results: dict[str, Exact]


def forward(p: Problem, t: dict[str, Tensor]) -> Squeezed:
    """From tensors in float64."""
    dtype: torch.dtype = getattr(torch, p.dtype)
    u = unit(dtype)
    share = of_sums(u)
    stored = p.gradients and share < 1
    x = t["input"].flatten(2)
    mean = Sized(x.mean(2), x.abs().mean(2) * share)
    if share < 1:
        mean.sizes += mean.values.abs()

    def layer(of: Sized, i: int) -> Sized:
        w, bias = t[f"weight{i}"].flatten(1).T, t.get(f"bias{i}")
        y = Sized(of.values @ w, of.sizes @ w.abs())
        if bias is not None:
            y = Sized(y.values + bias, y.sizes + bias.abs() * share)
        return Sized(y.values, y.sizes + y.values.abs()) if stored else y

    hidden = layer(mean, 1)
    a = activated(hidden.values, p.activation, p.slope)
    active = Sized(a, STEEPEST * hidden.sizes + a.abs() * (1.0 if stored or share == 1 else OF_HIDDEN))
    gates = layer(active, 2)
    y = activated(gates.values, p.gate_activation, p.slope)
    sizes = torch.maximum(gates.sizes, y.abs()) if share == 1 else gates.sizes + y.abs()
    shape = (*y.shape, *[1] * (len(p.shape) - 2))
    result = Exact(y.view(shape), sizes.clamp_min(smallest(dtype)).view(shape), u)
    return Squeezed(mean, hidden, active, gates, {"result": result})


def kinks_near(p: Problem, s: Squeezed) -> Tensor:
    """As truth.kinks_near(). A hidden value that is near one is in all gates of its image."""
    u = unit(getattr(torch, p.dtype))
    of_image = near(p.activation, s.hidden.values, s.hidden.sizes, u).any(1, keepdim=True)
    of_gate = near(p.gate_activation, s.gates.values, s.gates.sizes, u)
    return (of_image | of_gate).view(s.results["result"].values.shape)


def gradient_sizes(p: Problem, t: dict[str, Tensor], s: Squeezed, dy: Tensor) -> dict[str, Tensor]:
    """As truth.gradient_sizes()."""
    w1, w2 = (t[name].flatten(1).abs() for name in ("weight1", "weight2"))
    of_gates = steepened(dy.flatten(1).abs(), p.gate_activation, s.gates.sizes)
    of_hidden = steepened(of_gates @ w2, p.activation, s.hidden.sizes)
    x = t["input"]
    of_mean = (of_hidden @ w1).view(*x.shape[:2], *[1] * (x.dim() - 2))
    return {
        "weight2": (of_gates.T @ s.active.sizes).view(t["weight2"].shape),
        "bias2": of_gates.sum(0),
        "weight1": (of_hidden.T @ torch.maximum(s.mean.sizes, s.mean.values.abs())).view(t["weight1"].shape),
        "bias1": of_hidden.sum(0),
        "input": of_mean.expand(x.shape) * x.shape[0] * x.shape[1] / x.numel(),
    }


def eager(p: Problem, t: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """PyTorch's ops in float32 at least, but for the mean and the result; with a gradient in the dtype."""
    positional, named = p.arguments({k: aligned(v).to(dtype) for k, v in t.items()})
    if p.gradients:
        return {"result": reference.squeeze_excite(*positional, **named)}
    wide = reference.wide(dtype)
    mean = reference.spatial_mean(positional[0].to(wide), keepdim=True).to(dtype)
    layers = [None if w is None else w.to(wide) for w in positional[1:]]
    return {"result": reference.squeeze_excite(mean.to(wide), *layers, **named).to(dtype)}
