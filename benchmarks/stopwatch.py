"""How the benchmark takes times: what a call costs the device, or the CPU, with the rivals of a row taking turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fused_conv_bn._stopwatch import call_us

FOOTPRINT = 256 << 20  # bytes that calls rotate over, several times a GPU's L2
MAX_PAIRS = 64
KERNELBENCH_WARM_UPS = 5
KERNELBENCH_TRIALS = 100

cuda: Any = torch.cuda  # which has types only in part
Rivals = dict[str, Callable[[int], object]]  # by name: run once on buffer pair i
Stats = dict[str, float | bool]


class Stopwatch:
    """Times some calls in a row, in microseconds a call."""

    def __init__(self, device: str, max_calls: int | None = None) -> None:
        self.cuda = device == "cuda"
        self.budget_us = 4e3 if self.cuda else 2e4  # of one timing
        # With two kernels each still well below what a stream queues.
        self.max_calls = max_calls or (100 if self.cuda else 500)

    def sync(self) -> None:
        if self.cuda:
            cuda.synchronize()

    def host_us(self, run: Callable[[int], object], order: Sequence[int]) -> float:
        self.sync()
        start = time.perf_counter()
        for i in order:
            run(i)
        if not self.cuda:
            return (time.perf_counter() - start) * 1e6 / len(order)
        queued = time.perf_counter()
        self.sync()
        return (queued - start) * 1e6 / len(order)

    def device_us(self, run: Callable[[int], object], order: Sequence[int], host_us: float) -> tuple[float, bool]:
        """The time, and whether the host was ahead of the device all the while."""
        if not self.cuda:
            return self.host_us(run, order), True
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        cycles = int((host_us * len(order) + 50) * 1.5 * 2000)  # at 2 GHz, which is about the fastest there is
        ahead = False
        for _ in range(4):
            cuda.synchronize()
            cuda._sleep(cycles)
            start.record()
            for i in order:
                run(i)
            end.record()
            ahead = not start.query()
            end.synchronize()
            if ahead:
                break
            cycles *= 2
        return start.elapsed_time(end) * 1e3 / len(order), ahead

    def compare(self, rivals: Rivals, pairs: int, repeats: int) -> tuple[dict[str, Stats], int]:
        """Times by name, and how many calls went into each."""
        for run in rivals.values():
            for i in range(min(pairs, 3)):
                run(i)
        probe = [i % pairs for i in range(3)]
        first_us, _ = self.device_us(rivals["copy"], probe, 50.0)
        calls = int(min(self.max_calls, max(5, self.budget_us / first_us)))
        order = [i % pairs for i in range(calls)]
        host_us = {name: self.host_us(run, order) for name, run in rivals.items()}
        times: dict[str, list[float]] = {name: [] for name in rivals}
        limited = dict.fromkeys(rivals, False)
        for repeat in range(repeats):
            for name in list(rivals) if repeat % 2 == 0 else reversed(rivals):
                us, ahead = self.device_us(rivals[name], order, host_us[name])
                times[name].append(us)
                limited[name] |= not ahead
        return {name: {**spread(us), "host_limited": limited[name]} for name, us in times.items()}, calls


def kernelbench_us(run: Callable[[], object], on_cuda: bool, trials: int = KERNELBENCH_TRIALS) -> dict[str, float]:
    """By KernelBench's rules for a model and its baseline: events around each call, which finds the device idle and
    other data in its L2; the mean of all trials but the first. On the CPU wall time."""
    for _ in range(KERNELBENCH_WARM_UPS):
        run()
        if on_cuda:
            cuda.synchronize()
    if on_cuda:
        cuda.empty_cache()
    times = []
    for _ in range(1 + trials):
        if on_cuda:
            cuda.synchronize()
            torch.empty(FOOTPRINT // 8, dtype=torch.int64, device="cuda").fill_(42)
        times.append(call_us(run, on_cuda))
    times = times[1:]
    return {"mean": statistics.mean(times), "std": statistics.pstdev(times), "min": min(times), "max": max(times)}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def pairs_of(pair_bytes: int) -> int:
    return min(MAX_PAIRS, max(1, math.ceil(FOOTPRINT / pair_bytes)))
