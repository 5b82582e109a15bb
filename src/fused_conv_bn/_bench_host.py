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
from torch import Tensor

from ._bench_common import EPS, MOMENTUM, SCALING_FACTOR, environment, progress, random_bn
from ._bench_conv import FORCE, Problem
from ._bench_layers import ConvCase, Layer
from ._stopwatch import Stopwatch, spread

Calls = dict[str, Callable[[int], object]]  # of the stopwatch, which counts them

TINY = Layer(4, 4, 1, 2, bias=True, scaling_factor=SCALING_FACTOR)
# So many pixels that the rule has a kernel for it on every GPU that has one, in float32 too.
OWN_KERNEL = Layer(4, 4, 3, 322, bias=True, scaling_factor=SCALING_FACTOR)

NOTE = (
    "wall time that a call takes of the host: the device is idle before each batch of calls, its queue never full. Ops "
    "are called as torch.ops.fused_conv_bn.*. Input (1, 4, 2, 2), and convolutions of 1x1 from 4 to 4 channels, with a "
    "bias. eager of an op: F.conv2d, F.batch_norm and *; of ConvBnScale2d: nn.Conv2d, nn.BatchNorm2d and *. own "
    "kernel, on CUDA: 3x3 on (1, 4, 322, 322), which the rule gives to a kernel of this package."
)


def bn_calls(device: str) -> Calls:
    x, (mean, var, weight, bias) = torch.randn(1, 4, 2, 2, device=device), random_bn(4, torch.float32, device)
    ops = torch.ops.fused_conv_bn

    def eager(train: bool) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, train, MOMENTUM, EPS) * SCALING_FACTOR

    return {
        "torch.mul": lambda i: torch.mul(x, x),
        "bn_scale": lambda i: ops.bn_scale(x, mean, var, weight, bias, SCALING_FACTOR, EPS),
        "bn_scale, eager": lambda i: eager(False),
        "bn_scale_train": lambda i: ops.bn_scale_train(x, mean, var, weight, bias, SCALING_FACTOR, MOMENTUM, EPS),
        "bn_scale_train, eager": lambda i: eager(True),
    }


def conv_calls(device: str, train: bool) -> Calls:
    op, mode = ("conv_bn_scale_train", "training") if train else ("conv_scale_shift", "evaluation")
    case = ConvCase("host", TINY, 1, torch.float32, "nchw", train=train)
    tiny = Problem(case, device)
    conv, bn, (mean, var) = tiny.plain.conv, tiny.plain.bn, tiny.running

    def eager(i: int) -> Tensor:
        y = F.conv2d(tiny.x, conv.weight, conv.bias)
        return F.batch_norm(y, mean, var, bn.weight, bn.bias, train, MOMENTUM, EPS) * SCALING_FACTOR

    module = f"ConvBnScale2d in {mode}"
    calls: Calls = {
        op: lambda i: tiny.op(tiny.x),
        f"{op}, eager": eager,
        module: lambda i: tiny.module(tiny.x),
        f"{module}, eager": lambda i: tiny.plain(tiny.x),
    }
    if device == "cuda":
        larger = Problem(ConvCase("host", OWN_KERNEL, 1, torch.float32, "nchw", train=train), device)
        calls[f"{op}, own kernel"] = lambda i: larger.op(larger.x)
        calls[f"{module}, own kernel"] = lambda i: larger.module(larger.x)
    return calls


def time_host(watch: Stopwatch, device: str, rounds: int = 300, calls: int = 20) -> dict[str, Any]:
    """By the name of the call, see the note."""
    with environment(FORCE, ""):
        rivals = {**bn_calls(device), **conv_calls(device, False), **conv_calls(device, True)}
        times: dict[str, list[float]] = {name: [] for name in rivals}
        for _ in progress(range(rounds), "host"):
            for name, run in rivals.items():
                times[name].append(watch.host_us(run, range(calls)))
    medians = {name: statistics.median(us) for name, us in times.items()}
    rows: dict[str, Any] = {}
    for name, us in medians.items():
        rows[name] = {"us": us, "over torch.mul": us / medians["torch.mul"], "min": min(times[name])}
        if f"{name}, eager" in medians:
            rows[name]["eager/ours"] = medians[f"{name}, eager"] / us
    return rows


def time_import(runs: int) -> dict[str, float]:
    """Milliseconds that the package adds to ``import torch``."""
    code = "import time, torch; t = time.perf_counter(); import fused_conv_bn; print((time.perf_counter() - t) * 1e3)"
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}

    def once() -> float:
        command = [sys.executable, "-c", code]
        return float(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)

    return spread([once() for _ in progress(range(runs), "import")])
