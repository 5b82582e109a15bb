"""``python -m fuzz.soak``: mixed calls from several threads for a long time. Memory may not grow, nor results change.

Each thread has a stream of its own on CUDA, and takes turns between random calls of the ops, training steps of modules,
models that are fused, unfused and copied, and one fused model that all threads share. What a thread calls again has to give
the bits that it gave before. The main thread reads the process's memory, and the GPU's.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn._count import counted

from .generate import generate
from .run import Placed, call, not_covered
from .values import bits

KEPT_SEEDS = 150
"""Problems that each thread calls again and again, so that whatever is kept for a kind of call is there after a while."""
MOST_BYTES_A_CALL = 64
"""Of growth. What is kept for each call takes more: the smallest block that malloc has is 32 bytes, of a Python object 48
and an entry of what holds it."""
LEAST_SAMPLES = 12
"""Of memory, before which no run ends: a process with many objects takes a while for each."""
NOISE = 24 << 20
"""Bytes: what the same program has more or less of from one time to another, by its allocator's fragments."""


class Broken(AssertionError):
    """A promise that does not hold."""


# ---- what is called --------------------------------------------------------------------------------------------------


class Calls:
    """A thread's calls, each counted by its kind."""

    def __init__(
        self, index: int, seed: int, device: str, shared: tuple[nn.Module, list[tuple[Tensor, Tensor]]]
    ) -> None:
        self.random = random.Random(seed + index)
        self.generator = torch.Generator().manual_seed(seed + index)
        self.device, self.shared = device, shared
        self.first_seed = seed + index * 1_000_000
        self.known: dict[int, list[Tensor]] = {}
        self.counts: Counter[str] = Counter()
        self.trained = [self._block(i) for i in range(3)]
        self.network = _network(self.generator).to(device)
        self.kinds: tuple[Callable[[], None], ...] = (self.op, self.op, self.op, self.step, self.model, self.share)

    def one(self) -> None:
        kind = self.random.choice(self.kinds)
        kind()
        self.counts[kind.__name__] += 1

    def op(self) -> None:
        """Of any seed, or of one that was called before."""
        again = self.random.random() < 0.7
        seed = self.first_seed + self.random.randrange(KEPT_SEEDS if again else 900_000)
        p = generate(seed, self.device)
        try:
            made = Placed(p, self.device)
            results, _ = call(p, self.device, made.tensors)
        except (RuntimeError, ValueError) as error:
            if not_covered(RuntimeError(str(error))) or not again or seed not in self.known:
                return  # as the fuzzer finds out, which asks PyTorch whether it is right
            raise Broken(f"seed {seed} ran before, and now raises {error}") from error
        got = [bits(y.detach()).clone() for y in results.values()]
        if again and p.way != "module":  # which is PyTorch's own while another thread captures a model
            before = self.known.setdefault(seed, got)
            if any(not torch.equal(a, b) for a, b in zip(got, before, strict=True)):
                raise Broken(f"seed {seed}: two calls differ: {p}")

    def _block(self, i: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        activation = ("relu", "silu", "none")[i]
        m = fcb.ConvBnScale2d(4 << i, 16, 3, 1.5, padding=1, activation=activation).to(self.device)
        return m, torch.optim.SGD(m.parameters(), lr=1e-3)

    def step(self) -> None:
        m, optimizer = self.random.choice(self.trained)
        x = torch.randn(self.random.randint(2, 5), m.conv.in_channels, *self._size(), generator=self.generator)
        m(x.to(self.device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        m.eval()
        with torch.no_grad():
            m(x.to(self.device))
        m.train()

    def _size(self) -> tuple[int, int]:
        return self.random.randint(3, 20), self.random.randint(3, 20)

    def model(self) -> None:
        """A copy that is fused, called, unfused and thrown away."""
        m = fcb.fuse(copy.deepcopy(self.network))
        x = torch.randn(2, 3, *self._size(), generator=self.generator).to(self.device)
        if self.random.random() < 0.5:
            m.train()(x).mean().backward()
        with torch.no_grad():
            y = m.eval()(x)
            fcb.unfuse(m)
            expected = m(x)
        if not _is_near(y, expected):
            raise Broken("a fused model's result is not the model's own")

    def share(self) -> None:
        m, samples = self.shared
        x, expected = self.random.choice(samples)
        with torch.no_grad():
            y = m(x)
        # Not the same bits, for the reason in op().
        if not _is_near(y, expected):
            off = float((y - expected).abs().max())
            raise Broken(f"the model that threads share is {off:.3g} off what it put out before")


def _is_near(y: Tensor, expected: Tensor) -> bool:
    return y.shape == expected.shape and float((y - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def _network(generator: torch.Generator) -> nn.Module:
    m = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.SiLU()),
        *(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)),
    )
    for bn in m[1::3]:
        bn.running_mean.normal_(generator=generator)
        bn.running_var.uniform_(0.5, 2, generator=generator)
    return m


def _shared(device: str, generator: torch.Generator) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    m: Any = fcb.fuse(_network(generator).to(device).eval())
    if device == "cuda":
        m = fcb.graphed(m)
    inputs = [torch.randn(n, 3, 8 + n, 9, generator=generator).to(device) for n in (1, 2, 3, 5)]
    with torch.no_grad():
        for x in inputs:
            m(x)  # the first call is compared, and the next one quick
        return m, [(x, m(x).clone()) for x in inputs]


# ---- memory ----------------------------------------------------------------------------------------------------------


def bytes_in_use(device: str) -> dict[str, int]:
    """Of this process, and of the GPU what PyTorch gave out and what it holds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    if device != "cuda":
        return {"process": resident}
    free, total = torch.cuda.mem_get_info()
    return {"process": resident, "tensors": torch.cuda.memory_allocated(), "gpu": total - free}


def growth(samples: Sequence[tuple[int, int]]) -> tuple[int, float]:
    """``samples``: calls and bytes. Bytes that the last third has more than the second one, in the median; and for a call."""
    third = len(samples) // 3
    parts = samples[third : 2 * third], samples[2 * third :]
    (calls, size), (later, larger) = (
        [statistics.median(column) for column in zip(*part, strict=True)] for part in parts
    )
    return int(larger - size), (larger - size) / max(later - calls, 1)


def too_much(samples: Sequence[tuple[int, int]]) -> bool:
    grown, a_call = growth(samples)
    return grown > NOISE and a_call > MOST_BYTES_A_CALL


# ---- the program -----------------------------------------------------------------------------------------------------


def soak(device: str, seconds: float, threads: int, seed: int) -> dict[str, Any]:
    shared = _shared(device, torch.Generator().manual_seed(seed))
    workers = [Calls(i, seed, device, shared) for i in range(threads)]
    ends = threading.Event()
    broken: list[str] = []

    def work(calls: Calls) -> None:
        stream = torch.cuda.Stream() if device == "cuda" else None
        torch.manual_seed(calls.first_seed)
        try:
            with torch.cuda.stream(stream):
                while not ends.is_set():
                    calls.one()
        except Exception as error:
            broken.append(f"{type(error).__name__}: {error}")
            ends.set()

    running = [threading.Thread(target=work, args=(calls,)) for calls in workers]
    for thread in running:
        thread.start()
    samples: dict[str, list[tuple[int, int]]] = {}
    begin = said = time.monotonic()
    while not ends.wait(min(2.0, seconds / 40)):
        now = time.monotonic()
        count = sum(sum(calls.counts.values()) for calls in workers)
        for name, size in bytes_in_use(device).items():
            samples.setdefault(name, []).append((count, size))
        if now - said > 30:
            said = now
            sizes = ", ".join(f"{name} {of[-1][1] / 2**20:.0f} MiB" for name, of in samples.items())
            print(f"soak: {now - begin:.0f} s, {counted(count, 'call')}, {sizes}", file=sys.stderr, flush=True)
        if now - begin > seconds and len(samples["process"]) >= LEAST_SAMPLES:
            ends.set()
    for thread in running:
        thread.join()
    for name, of in samples.items():
        if len(of) >= LEAST_SAMPLES and too_much(of):
            grown, a_call = growth(of)
            broken.append(f"{name}: memory grew by {grown / 2**20:.1f} MiB, {a_call:.0f} bytes a call")
    return {
        "seconds": time.monotonic() - begin,
        "threads": threads,
        "seed": seed,
        "calls": dict(sum((calls.counts for calls in workers), Counter())),
        "growth": {name: growth(of) for name, of in samples.items() if len(of) >= LEAST_SAMPLES},
        "broken": broken,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long (default: 3600)")
    parser.add_argument("--threads", type=int, default=4, help="that call (default: 4)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the summary to FILE as JSON")
    parser.add_argument("--commit", help="recorded (default: what git says)")
    args = parser.parse_args(argv)
    summary = soak(args.device, args.seconds, args.threads, args.seed)
    for name, (grown, a_call) in summary["growth"].items():
        print(f"{name:8} grew by {grown / 2**20:.1f} MiB, {a_call:.1f} bytes a call")
    calls, threads = counted(sum(summary["calls"].values()), "call"), counted(args.threads, "thread")
    print(f"soak: {calls} in {summary['seconds']:.0f} s by {threads}")
    print(*(f"soak: {line}" for line in summary["broken"] or ["nothing broke"]), sep="\n")
    if args.record:
        from .__main__ import describe

        args.record.write_text(json.dumps(describe(args.device, args.commit) | {"soak": summary}) + "\n")
    return 1 if summary["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
