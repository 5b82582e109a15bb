"""The benchmark's host part: what a call costs the host, whatever the device does, and what the import does."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_conv_bn
from fused_conv_bn import ops

from .common import EPS, MOMENTUM, SCALING_FACTOR, progress, random_bn
from .conv import Problem
from .layers import ConvCase, Layer
from .stopwatch import Stopwatch, spread

Calls = dict[str, Callable[[int], object]]  # of the stopwatch, which counts them

TINY = Layer(4, 4, 1, 2, bias=True, scaling_factor=SCALING_FACTOR)
# So many pixels that the rule has a kernel for it on every GPU that has one, in float32 too.
OWN_KERNEL = Layer(4, 4, 3, 322, bias=True, scaling_factor=SCALING_FACTOR)

NOTE = (
    "wall time that a call takes of the host: the device is idle before each batch of calls, its queue never full. Ops "
    "are called as torch.ops.fused_conv_bn.*, without the keywords. Input (1, 4, 2, 2), and convolutions of 1x1 from 4 "
    "to 4 channels, with a bias. eager of an op: F.conv2d, F.batch_norm and *; of ConvBnScale2d: nn.Conv2d, "
    "nn.BatchNorm2d and *. own kernel, on CUDA: 3x3 on (1, 4, 322, 322), which the rule gives to a kernel of this "
    "package. All under no_grad, but for grad mode: there conv's and bn's parameters require gradients, and the graph "
    "is built and dropped; fcb.* are the package's functions. over op: the module's time over the op's."
)
EVALUATION, TRAINING = "ConvBnScale2d in evaluation", "ConvBnScale2d in training"
OPS = {EVALUATION: "conv_bn_scale", TRAINING: "conv_bn_scale_train"}  # that a module's call is measured by
GRAD, OWN = ", grad mode", ", own kernel"


def bn_calls(device: str) -> Calls:
    x, (mean, var, weight, bias) = torch.randn(1, 4, 2, 2, device=device), random_bn(4, torch.float32, device)
    raw = torch.ops.fused_conv_bn
    parameters = nn.Parameter(weight), nn.Parameter(bias)

    def eager(train: bool, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, train, MOMENTUM, EPS) * SCALING_FACTOR

    functions: Calls = {
        "fcb.bn_scale": lambda i: ops.bn_scale(x, mean, var, *parameters, SCALING_FACTOR, EPS),
        "fcb.bn_scale_train": lambda i: ops.bn_scale_train(x, mean, var, *parameters, SCALING_FACTOR, MOMENTUM, EPS),
    }
    return {
        "torch.mul": lambda i: torch.mul(x, x),
        "bn_scale": lambda i: raw.bn_scale(x, mean, var, weight, bias, SCALING_FACTOR, EPS),
        "bn_scale, eager": lambda i: eager(False, weight, bias),
        "bn_scale_train": lambda i: raw.bn_scale_train(x, mean, var, weight, bias, SCALING_FACTOR, MOMENTUM, EPS),
        "bn_scale_train, eager": lambda i: eager(True, weight, bias),
        **{f"{name}{GRAD}": call for name, call in functions.items()},
        f"fcb.bn_scale{GRAD}, eager": lambda i: eager(False, *parameters),
        f"fcb.bn_scale_train{GRAD}, eager": lambda i: eager(True, *parameters),
    }


def conv_calls(device: str, train: bool) -> Calls:
    module = TRAINING if train else EVALUATION
    op = OPS[module]
    case = ConvCase("host", TINY, 1, torch.float32, "nchw", train=train)
    tiny = Problem(case, device)
    conv, bn, (mean, var) = tiny.plain.conv, tiny.plain.bn, tiny.running

    def call(op: Callable[..., Tensor], problem: Problem) -> Callable[[int], object]:
        conv, bn, running = problem.plain.conv, problem.plain.bn, problem.running
        momentum = (MOMENTUM,) if train else ()
        batch_norm = (*running, bn.weight, bn.bias, SCALING_FACTOR, *momentum, EPS)
        return lambda i: op(problem.x, conv.weight, conv.bias, *batch_norm, *problem.window)

    def eager(i: int) -> Tensor:
        y = F.conv2d(tiny.x, conv.weight, conv.bias)
        return F.batch_norm(y, mean, var, bn.weight, bn.bias, train, MOMENTUM, EPS) * SCALING_FACTOR

    raw, function = getattr(torch.ops.fused_conv_bn, op), getattr(ops, op)
    calls: Calls = {
        op: call(raw, tiny),
        f"{op}, eager": eager,
        module: lambda i: tiny.module(tiny.x),
        f"{module}, eager": lambda i: tiny.plain(tiny.x),
        f"fcb.{op}{GRAD}": call(function, tiny),
        f"fcb.{op}{GRAD}, eager": eager,
        f"{module}{GRAD}": lambda i: tiny.module(tiny.x),
        f"{module}{GRAD}, eager": lambda i: tiny.plain(tiny.x),
    }
    if not train:
        pair = torch.ops.fused_conv_bn.conv_scale_shift
        calls["conv_scale_shift"] = lambda i: pair(tiny.x, conv.weight, tiny.scale, tiny.shift, *tiny.window)
    if device == "cuda":
        larger = Problem(ConvCase("host", OWN_KERNEL, 1, torch.float32, "nchw", train=train), device)
        calls[f"{op}{OWN}"] = call(raw, larger)
        calls[f"{module}{OWN}"] = lambda i: larger.module(larger.x)
        calls[f"{module}{GRAD}{OWN}"] = lambda i: larger.module(larger.x)
    return calls


def time_host(watch: Stopwatch, device: str, rounds: int = 300, calls: int = 20) -> list[dict[str, Any]]:
    """A row a call, see the note."""
    rivals = {**bn_calls(device), **conv_calls(device, False), **conv_calls(device, True)}
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in progress(range(rounds), "host"):
        for name, run in rivals.items():
            with torch.set_grad_enabled(GRAD in name):
                times[name].append(watch.host_us(run, range(calls)))
    medians = {name: statistics.median(us) for name, us in times.items()}
    rows = []
    for name, us in medians.items():
        row: dict[str, Any] = {
            "case": name,
            "us": us,
            "over torch.mul": us / medians["torch.mul"],
            "min": min(times[name]),
        }
        if f"{name}, eager" in medians:
            row["eager/ours"] = medians[f"{name}, eager"] / us
        of_small = name.removesuffix(OWN)
        if of_small in OPS:
            row["over op"] = us / medians[name.replace(of_small, OPS[of_small])]
        rows.append(row)
    return rows


def time_import(runs: int) -> dict[str, float]:
    """Milliseconds that the package adds to ``import torch``."""
    code = "import time, torch; t = time.perf_counter(); import fused_conv_bn; print((time.perf_counter() - t) * 1e3)"
    path = os.pathsep.join(filter(None, [str(Path(fused_conv_bn.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}

    def once() -> float:
        command = [sys.executable, "-c", code]
        return float(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)

    return spread([once() for _ in progress(range(runs), "import")])
