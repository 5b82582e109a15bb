"""How long calls take, how far that is known, and whether other programs were in the way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from ._count import counted

LOOK_SECONDS = 0.02  # some of the slices of time that a system gives to programs
GRAIN = 32768  # elements that a thread gets at least of what PyTorch divides among threads
ENOUGH = 0.9  # of the time of all threads; on a machine of its own a program gets 0.98 and more


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


# ---- what is known of a time -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A time, and the range that half of its samples, or the quarter next to it, are in: in microseconds."""

    us: float
    low: float
    high: float

    @classmethod
    def of_median(cls, samples: Sequence[float]) -> Figure:
        low, us, high = _quartiles(samples)
        return cls(us, low, high)

    @classmethod
    def of_least(cls, samples: Sequence[float]) -> Figure:
        """Where other programs can only add to a sample. The least is no accident if others are close to it."""
        least = min(samples)
        return cls(least, least, _quartiles(samples)[0])

    @property
    def spread(self) -> float:
        """The range over the time itself."""
        return (self.high - self.low) / self.us

    def plus(self, other: Figure, count: int = 1) -> Figure:
        """And ``count`` times the other one."""
        return Figure(self.us + count * other.us, self.low + count * other.low, self.high + count * other.high)


def _quartiles(samples: Sequence[float]) -> Sequence[float]:
    return quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3


# ---- other programs --------------------------------------------------------------------------------------------------


class Processors:
    """Whether the threads of this process get the processors that they could use, by looks between measurements.

    In a look all threads have work. On CUDA one thread has it, which launches kernels.
    """

    def __init__(self, on_cuda: bool = False) -> None:
        self.threads = 1 if on_cuda else torch.get_num_threads()
        self.used = self.wanted = 0.0  # seconds of processors

    def plus(self, other: Processors) -> None:
        self.used, self.wanted = self.used + other.used, self.wanted + other.wanted

    def look(self) -> None:
        elements = self.threads * GRAIN if self.threads > 1 else GRAIN // 2
        x = torch.full((elements,), 0.5, dtype=torch.float32, device="cpu")
        begin, used = time.perf_counter(), time.process_time()
        while time.perf_counter() - begin < LOOK_SECONDS:
            torch.sin_(x)
        self.used += time.process_time() - used
        self.wanted += (time.perf_counter() - begin) * self.threads

    @property
    def share(self) -> float:
        """Of the time of all threads."""
        return min(1.0, self.used / self.wanted) if self.wanted else 1.0

    @property
    def is_disturbed(self) -> bool:
        return self.share < ENOUGH

    def why_disturbed(self, again: str = "run it again") -> str:
        """One sentence, or nothing. ``again``: what measures once more."""
        if not self.is_disturbed:
            return ""
        threads, there = counted(self.threads, "thread"), len(os.sched_getaffinity(0))
        if self.threads > there:
            return (
                f"{threads} share {counted(there, 'processor')}, which disturbs the measurement: set "
                f"OMP_NUM_THREADS={there}"
            )
        return (
            f"other programs disturb the measurement, whose {threads} had a processor for {self.share:.0%} of the "
            f"time: {again} without them"
        )
