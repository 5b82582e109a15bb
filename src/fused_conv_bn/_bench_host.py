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

from ._bench_common import EPS, MOMENTUM, SCALING_FACTOR, progress, random_bn
from ._stopwatch import Stopwatch, spread


def time_host(watch: Stopwatch, device: str, rounds: int = 300, calls: int = 20) -> dict[str, Any]:
    """Wall time that a call takes of the host: the device is idle before each batch of calls, its queue never full."""
    x, bn = torch.randn(1, 4, 2, 2, device=device), random_bn(4, torch.float32, device)
    op = torch.ops.fused_conv_bn.bn_scale
    rivals: dict[str, Callable[[int], object]] = {
        "torch.mul": lambda i: torch.mul(x, x),
        "eager": lambda i: F.batch_norm(x, bn[0], bn[1], bn[2], bn[3], False, MOMENTUM, EPS) * SCALING_FACTOR,
        "ours": lambda i: op(x, bn[0], bn[1], bn[2], bn[3], SCALING_FACTOR, EPS),
    }
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
            times[name].append(watch.host_us(run, range(calls)))
    mul = statistics.median(times["torch.mul"])
    return {
        name: {"us": statistics.median(us), "over torch.mul": statistics.median(us) / mul, "min": min(us)}
        for name, us in times.items()
    }


def time_import(runs: int) -> dict[str, float]:
    """Milliseconds that the package adds to ``import torch``."""
    code = "import time, torch; t = time.perf_counter(); import fused_conv_bn; print((time.perf_counter() - t) * 1e3)"
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}

    def once() -> float:
        command = [sys.executable, "-c", code]
        return float(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)

    return spread([once() for _ in progress(range(runs), "import")])
