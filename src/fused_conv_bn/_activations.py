"""Which activation a module or a function is, by the names that the ops know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .reference import ACTIVATIONS

_MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Mish: "mish",
    nn.Tanh: "tanh",
}

_FUNCTIONS: dict[Callable[..., Any], str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
    F.leaky_relu: "leaky_relu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    F.hardsigmoid: "hardsigmoid",
    F.mish: "mish",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    torch.tanh_: "tanh",
}


def named(activation: Any) -> tuple[str, float | None] | None:
    """(name, negative slope or None) of a name, a module of torch.nn or a function of PyTorch; None for another."""
    if activation is None:
        return "none", None
    if isinstance(activation, str):
        return (activation, None) if activation in ACTIVATIONS else None
    kind = type(activation)
    if kind in _MODULES:
        return _MODULES[kind], None
    if kind is nn.GELU:
        return {"none": ("gelu", None), "tanh": ("gelu_tanh", None)}.get(activation.approximate)
    if kind is nn.LeakyReLU:
        return "leaky_relu", float(activation.negative_slope)
    if kind is nn.Hardtanh and (activation.min_val, activation.max_val) == (0, 6):
        return "relu6", None
    try:
        name = _FUNCTIONS.get(activation)
    except TypeError:  # not hashable
        return None
    return None if name is None else (name, None)


def module(activation: str, negative_slope: float) -> nn.Module:
    """A module of torch.nn that computes the activation."""
    special: dict[str, Callable[[], nn.Module]] = {
        "gelu": nn.GELU,
        "gelu_tanh": lambda: nn.GELU("tanh"),
        "leaky_relu": lambda: nn.LeakyReLU(negative_slope),
    }
    if activation in special:
        return special[activation]()
    return {name: kind for kind, name in _MODULES.items()}[activation]()
