"""Rivals of whole models that are not forms of a torch model: cuDNN's fused ops in the place of ours, and JAX."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn import reference
from fused_conv_bn._fuse.guard import STATE
from fused_conv_bn._fuse.root import is_root

from . import jax_models
from .conv import activated
from .record import ROOT

JAX_TIMEOUT_S = 240.0


class NoRivalError(Exception):
    """Why there is none, in a few words."""


# ---- cuDNN -----------------------------------------------------------------------------------------------------------


def folded(conv: Any, bn: Any, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weight and bias with BatchNorm in them, folded in float32 and rounded to the convolution's dtype."""
    bias = None if conv.bias is None else conv.bias.float()
    if bn is None:
        scale, shift = None, bias
    else:
        mean, var, weight, shift = (t.float() for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
        scale, shift = reference.fold_bn(mean, var, weight, shift, factor, bn.eps, bias)
    weight = conv.weight.detach() if scale is None else conv.weight.detach().float() * scale.view(-1, 1, 1, 1)
    if shift is None:
        shift = weight.new_zeros(len(weight))
    layout = torch.channels_last if conv.weight.is_contiguous(memory_format=torch.channels_last) else None
    weight = weight.to(conv.weight.dtype)
    weight = weight.contiguous() if layout is None else weight.contiguous(memory_format=layout)
    return weight, shift.detach().to(conv.weight.dtype)


def on_cuda(x: Tensor) -> bool:
    return x.is_cuda


def folded_call(group: Any, block: Any) -> Callable[..., Tensor]:
    """The group by cuDNN's fused ops, where it has ReLU and a convolution; else its convolution with a bias and
    PyTorch's ops, and all of PyTorch's ops where there is no convolution."""
    plain: Callable[..., Tensor] = block.plain
    if block.conv is None or block.norm is None or group.negative_slope != 0.01:
        return plain
    conv = block.conv
    weight, bias = folded(conv, block.bn_twin, group.factor)
    window = conv.stride, conv.padding, conv.dilation, conv.groups

    def run(x: Tensor | tuple[Tensor, Tensor], residual: Tensor | None = None) -> Tensor:
        x = x if isinstance(x, Tensor) else x[0] * x[1]  # a gate's product
        if group.activation == "relu" and on_cuda(x) and not group.residual_last:
            if residual is None:
                return torch.cudnn_convolution_relu(x, weight, bias, *window)
            return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *window)
        y = F.conv2d(x, weight, bias, *window)
        if residual is not None and not group.residual_last:
            y += residual
        y = activated(y, group.activation)
        return y + residual if residual is not None and group.residual_last else y

    return run


def cudnn_model(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy with the groups that fuse() finds, each by :func:`folded_call`. In evaluation, under no_grad."""
    found = fcb.fuse(copy.deepcopy(model), x)
    for m in found.modules():
        if is_root(m):
            for entry in (e for of_key in m.__dict__[STATE].entries.values() for e in of_key):
                pairs = zip(entry.groups, entry.blocks, strict=True)
                entry.quick = [folded_call(group, block) for group, block in pairs]
    return found


# ---- JAX -------------------------------------------------------------------------------------------------------------


def array(t: Tensor) -> Any:
    return t.detach().cpu().contiguous().numpy()


def jax_result(name: str, model: nn.Module, x: Tensor, repeats: int, calls: int) -> tuple[Tensor, dict[str, Any]]:
    """What the model gives in JAX, in a process of its own, and the record of it."""
    if name not in jax_models.MODELS:
        raise NoRivalError("benchmarks/jax_models.py does not have it")
    if importlib.util.find_spec("jax") is None:
        raise NoRivalError("jax is not installed")
    if x.dtype not in (torch.float16, torch.float32):
        raise NoRivalError("numpy has no such dtype")
    norms = (nn.BatchNorm2d, nn.Conv2d)
    layers = [m for m in model.modules() if isinstance(m, norms)]
    pairs = [folded(conv, bn) for conv, bn in zip(layers[::2], layers[1::2], strict=True)]
    classifier = next(m for m in model.modules() if isinstance(m, nn.Linear))
    arrays = {"x": array(x.permute(0, 2, 3, 1)), "matrix": array(classifier.weight.t()), "bias": array(classifier.bias)}
    for i, (weight, shift) in enumerate(pairs):
        arrays |= {f"w{i}": array(weight.permute(2, 3, 1, 0)), f"b{i}": array(shift)}
    asked = {"model": name, "device": x.device.type, "convolutions": len(pairs), "repeats": repeats, "calls": calls}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        np.savez(place / "arrays.npz", **arrays)
        (place / "asked.json").write_text(json.dumps(asked))
        # JAX would take most of the device's memory at once.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, "-m", "benchmarks.jax_models", folder]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=JAX_TIMEOUT_S, check=False
        )
        if done.returncode or not (place / "result.json").is_file():
            last = (done.stderr.strip().splitlines() or [""])[-1][:200]
            raise NoRivalError(f"its process ended with {done.returncode}: {last}")
        result: dict[str, Any] = json.loads((place / "result.json").read_text())
        if "problem" in result:
            raise NoRivalError(result["problem"])
        return torch.from_numpy(np.load(place / "y.npy")), result
