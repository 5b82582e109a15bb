"""A stand-in for CUDA's graphs on the CPU: its replay runs the forward again, on the same memory, and its backward that of
the last forward."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fused_conv_bn as fcb
from fused_conv_bn import graphs
from fused_conv_bn._fuse.undisturbed import undisturbed
from fused_conv_bn._graphs import with_backward
from fused_conv_bn._graphs.recording import Static


class FakeGraph:
    def __init__(self, run: Callable[[], Any], result: Any) -> None:
        self.run, self.result, self.replays, self.freed = run, result, 0, False

    def replay(self) -> None:
        assert not self.freed
        self.replays += 1
        graphs._in_use.value = True
        try:
            self.compute()
        finally:
            graphs._in_use.value = False

    def compute(self) -> None:
        for kept, new in zip(tree_leaves(self.result), tree_leaves(self.run()), strict=True):
            if isinstance(kept, Tensor) and kept is not new:
                with torch.inference_mode(False), torch.no_grad():
                    kept.copy_(new)
                if new.requires_grad:
                    latest[id(kept)] = kept, new  # which keeps the id from being another's


latest: dict[int, tuple[Tensor, Tensor]] = {}
"""Of the results that a capture left, those of the last replay: their graph of autograd is the one to go back through."""


def differentiate(results: Sequence[Tensor], *rest: Any) -> Any:
    return _differentiate([latest.pop(id(t), (t, t))[1] for t in results], *rest)


_differentiate, with_backward.differentiate = with_backward.differentiate, differentiate


class Capturing(threading.local):
    """Whether a capture is on: of the calling thread's stream, as CUDA's answer is."""

    value = False


class FakeSide:
    kind = "cpu"
    capturing = Capturing()
    made: list[FakeSide] = []
    model: nn.Module  # of the last made(): a real capture computes nothing

    def __init__(self, device: torch.device) -> None:
        self.log: list[str] = []
        self.graphs: list[FakeGraph] = []
        FakeSide.made.append(self)

    @staticmethod
    def is_capturing() -> bool:
        return FakeSide.capturing.value

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        self.log.append("warm up")
        yield

    def statics(self, tensors: Any) -> list[Static]:
        return [Static(t) for t in tensors]

    def capture(self, run: Callable[[], Any]) -> tuple[FakeGraph, Any]:
        self.log.append("capture")
        FakeSide.capturing.value = True
        try:
            with undisturbed(self.model):
                before = [(b, b.detach().clone()) for b in self.model.buffers()]
                self.graphs.append(FakeGraph(run, run()))
                for b, was in before:
                    b.data.copy_(was)  # nothing was computed; what autograd has saved did not change
        finally:
            FakeSide.capturing.value = False
        return self.graphs[-1], self.graphs[-1].result

    def begin(self) -> None:
        self.log.append("begin")

    def replay(self, graph: FakeGraph) -> None:
        graph.replay()

    def end(self, stream: None) -> None:
        self.log.append("end")

    def free(self, freed: Any, last: bool) -> None:
        for graph in freed:
            graph.freed = True
        self.log.append(f"free {len(freed)}{' last' if last else ''}")


def is_capturing(device: str) -> bool:
    return FakeSide.capturing.value if device == "cpu" else torch.cuda.is_current_stream_capturing()


def made(model: nn.Module, device: str, max_graphs: int = 16, clone_outputs: bool = True) -> graphs.Graphed:
    """graphed(), on the CPU with the stand-in."""
    if device == "cuda":
        return fcb.graphed(model.to(device), max_graphs=max_graphs, clone_outputs=clone_outputs)
    FakeSide.model = model
    return graphs.Graphed(graphs.Graphs(model, max_graphs, clone_outputs, FakeSide))
