"""How long calls take, as the demo and the examples measure it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch


def call_us(call: Callable[[], object], on_cuda: bool) -> float:
    """One call's time, in microseconds: between two events around it, on the CPU wall time."""
    if on_cuda:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def time_us(calls: Sequence[Callable[[], object]], device: str) -> list[float]:
    """Median time of each call. They take turns, so that a change of clocks meets all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    stop = time.perf_counter() + 5.0
    for turn in range(50):
        if turn >= 5 and time.perf_counter() > stop:
            break
        for call, samples in zip(calls, times, strict=True):
            samples.append(call_us(call, device == "cuda"))
    return [median(samples) for samples in times]
