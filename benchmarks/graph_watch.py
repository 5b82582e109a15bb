"""Times of CUDA graphs: some calls of each rival are captured once, and the graphs take turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fused_conv_bn._graphs.cuda import Cuda

from .common import first_line
from .stopwatch import Rivals, Stats, cuda, spread

MOST_RESERVED = 0.5  # of a device's memory, before that of earlier graphs is given back

Run = Callable[[], object]


class GraphWatch:
    """Microseconds a call, of some calls in a graph, over some replays. On the CPU the calls themselves are timed."""

    def __init__(self, device: str, replays: int) -> None:
        self.cuda, self.replays = device == "cuda", replays
        self.side: Any = None
        self.keeper: Any = None  # a graph, so that the pool keeps the memory of those that are gone

    def compare(self, rivals: Rivals, calls: int) -> tuple[dict[str, Stats], dict[str, str]]:
        """Times by name, and why others have none. Each call of a rival is told its number."""
        runs, missing = {}, {}
        for name, call in rivals.items():
            try:
                runs[name] = self.captured(call, calls) if self.cuda else in_a_row(call, calls)
            except Exception as error:  # of the rival: the row says so
                missing[name] = first_line(error)
        times: dict[str, list[float]] = {name: [] for name in runs}
        limited = dict.fromkeys(runs, False)
        host_us = 0.0
        for turn in range(-1, self.replays):  # one that does not count, from which the host's time is known
            order = list(runs) if turn % 2 == 0 else list(reversed(runs))
            found, host_us, ahead = self.turn({name: runs[name] for name in order}, host_us)
            for name, us in found.items() if turn >= 0 else ():
                times[name].append(us / calls)
                limited[name] |= not ahead
        return {name: {**spread(us), "host_limited": limited[name]} for name, us in times.items()}, missing

    def turn(self, runs: dict[str, Run], host_us: float) -> tuple[dict[str, float], float, bool]:
        """Each once: microseconds of each, of the host for all, and whether it was ahead of the device."""
        if not self.cuda:
            found = {}
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                found[name] = (time.perf_counter() - start) * 1e6
            return found, 0.0, True
        events = {name: [cuda.Event(enable_timing=True) for _ in range(2)] for name in runs}
        cycles = int((host_us + 50) * 1.5 * 2000)  # at 2 GHz, which is about the fastest there is
        ahead = False
        for _ in range(4):
            cuda.synchronize()
            cuda._sleep(cycles)
            begin = time.perf_counter()
            for name, run in runs.items():
                events[name][0].record()
                run()
                events[name][1].record()
            host_us = (time.perf_counter() - begin) * 1e6
            ahead = all(not start.query() for start, _ in list(events.values())[:1])
            cuda.synchronize()
            if ahead:
                break
            cycles = max(2 * cycles, int((host_us + 50) * 1.5 * 2000))
        return {name: start.elapsed_time(end) * 1e3 for name, (start, end) in events.items()}, host_us, ahead

    def captured(self, call: Callable[[int], object], calls: int) -> Run:
        """The graph's replay."""
        if self.side is None or cuda.memory_reserved() > MOST_RESERVED * cuda.get_device_properties(0).total_memory:
            self.keeper = None
            cuda.synchronize()
            cuda.empty_cache()
            self.side = Cuda(torch.device("cuda", cuda.current_device()))
            x = torch.zeros(1, device="cuda")
            self.keeper, _ = self.side.capture(lambda: x.add_(1))
        with self.side.aside():
            call(0)
        cuda.synchronize()
        # Results that are alive have memory of their own.
        graph, _ = self.side.capture(lambda: [call(i) for i in range(calls)])
        replay: Run = graph.replay
        return replay


def in_a_row(call: Callable[[int], object], calls: int) -> Run:
    call(0)

    def run() -> None:
        for i in range(calls):
            call(i)

    return run
