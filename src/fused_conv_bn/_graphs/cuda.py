"""All of it that needs a GPU: streams, the memory pool, captures, and the order of replays."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .recording import Static

_capturing = threading.Lock()
"""One capture at a time, and no replay meanwhile: torch 2.10 marks the device's generator while a graph is captured."""


class Cuda:
    """A model's graphs on one device: where they are captured, the pool that their memory is from, and their order.

    Graphs that share a pool share memory, and must not run at the same time. So each replay waits for the one before
    it, on whatever stream that was.

    cuBLAS has a workspace for each stream, which PyTorch frees for all graphs of a stream when it destroys one of them
    (from torch 2.12 on). So warm-ups run on another stream than captures, and each capture begins without a workspace.
    Then it takes one from the pool, whose memory no one but these graphs gets.
    """

    kind = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.warming = self.capturing = torch.cuda.Stream(device)
        while self.capturing == self.warming:  # PyTorch has 32 streams, and hands them out in turn
            self.capturing = torch.cuda.Stream(device)
        self.done = torch.cuda.Event()
        self.pool: Any = None

    @staticmethod
    def is_capturing() -> bool:
        return torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """On a stream for warm-ups, behind and before what the current stream does."""
        current = torch.cuda.current_stream(self.device)
        self.warming.wait_stream(current)
        try:
            with torch.cuda.stream(self.warming):
                yield
        finally:
            current.wait_stream(self.warming)

    def statics(self, tensors: Sequence[Tensor]) -> list[Static]:
        """From the memory of the captures' stream: when they are freed, no other stream gets it."""
        with torch.cuda.stream(self.capturing):
            made = [Static(t) for t in tensors]
        torch.cuda.current_stream(self.device).wait_stream(self.capturing)
        return made

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Any]:
        """The graph of what ``run`` does, and what it returned."""
        with _capturing, _no_collection(), torch.cuda.stream(self.capturing):
            torch.cuda.empty_cache()  # in a capture the allocator cannot free what it has cached
            self._capture_and_drop()
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            graph: Any = torch.cuda.CUDAGraph()
            try:
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    result = run()
                except BaseException:
                    with contextlib.suppress(Exception):  # the first error is the one to tell
                        graph.capture_end()
                    raise
                graph.capture_end()
            except BaseException:
                # Before 2.12 the allocator and the generator of random numbers take the capture for still under way.
                # The one has to be told, and the other learns from a capture that succeeds.
                with contextlib.suppress(Exception):
                    torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
                with contextlib.suppress(Exception):
                    graph.reset()
                with contextlib.suppress(Exception):
                    self._capture_and_drop()
                raise
        return graph, result

    def _capture_and_drop(self) -> None:
        """A graph that is destroyed at once: PyTorch frees the workspaces of its stream with it."""
        x, graph = torch.zeros(1, device=self.device), torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        x.add_(1)
        graph.capture_end()
        graph.reset()

    def begin(self) -> Any:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.done)
        return stream

    @staticmethod
    def replay(graph: Any) -> None:
        with _capturing:
            graph.replay()

    def end(self, stream: Any) -> None:
        self.done.record(stream)

    def free(self, graphs: Sequence[Any], last: bool) -> None:
        """``last``: no graphs are left, and the pool is gone with them."""
        self.done.synchronize()
        for graph in graphs:
            graph.reset()
        if last:
            self.pool = None


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage collector would free events and graphs in the midst of a capture, which fails it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
