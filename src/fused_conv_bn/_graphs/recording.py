"""One graph: the memory that it reads from, what it returns, and a replay."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .calls import CONSTANTS
from .model import Watch


class Static:
    """The memory that a graph reads an argument from, laid out as the argument is."""

    def __init__(self, x: Tensor) -> None:
        overlaps = torch._debug_has_internal_overlap(x) == 1  # expanded, say: elements that are the same memory
        self.span = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1 if overlaps else None
        if self.span is None:
            self.tensor = self.memory = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        else:
            self.memory = torch.empty(self.span, dtype=x.dtype, device=x.device)
            self.tensor = self.memory.as_strided(x.shape, x.stride())

    def fill(self, x: Tensor) -> None:
        self.memory.copy_(x if self.span is None else x.as_strided((self.span,), (1,)))


class Results:
    """What a call returned: which of it is new at each call, and which is the caller's or the model's own."""

    def __init__(self, result: Any, inputs: Sequence[Tensor], watch: Watch, device: torch.device) -> None:
        self.alone = type(result) is Tensor
        leaves, self.spec = tree_flatten(result)
        self.new: list[Tensor] = []
        self.places: list[tuple[str, Any]] = []
        for v in leaves:
            if not isinstance(v, Tensor):
                if type(v) not in CONSTANTS and not isinstance(v, enum.Enum):
                    raise TypeError(
                        f"graphed: the model returned a value of type {type(v).__name__}, expected tensors, numbers, "
                        "strings, None, or tuples, lists and dicts of them"
                    )
                self.places.append(("same", v))
            elif (i := _index(v, inputs)) is not None:
                self.places.append(("input", i))
            elif _index(v, watch.tensors) is not None:
                self.places.append(("same", v))
            elif (i := _index(v, self.new)) is not None:
                self.places.append(("new", i))
            else:
                if type(v) is not Tensor or v.layout is not torch.strided or v.device != device:
                    raise TypeError(
                        f"graphed: the model returned a {type(v).__name__} of layout {v.layout} on {v.device}, "
                        f"expected strided tensors on {device}"
                    )
                if v.requires_grad:
                    raise RuntimeError(
                        "graphed: the model returned a tensor that requires a gradient, which a graph does not "
                        "compute; call it under torch.no_grad()"
                    )
                self.places.append(("new", len(self.new)))
                self.new.append(v)
        self.alone = self.alone and len(self.new) == 1

    def take(self, inputs: Sequence[Tensor], clone: bool) -> Any:
        new = [t.clone() for t in self.new] if clone else self.new
        if self.alone:
            return new[0]
        found = {"new": new, "input": inputs}
        return tree_unflatten([v if kind == "same" else found[kind][v] for kind, v in self.places], self.spec)


def _index(t: Tensor, those: Sequence[Tensor]) -> int | None:
    return next((i for i, other in enumerate(those) if other is t), None)


class Recording:
    """One graph, and what it needs."""

    def __init__(self, side: Any, statics: list[Static], unique: list[int] | None) -> None:
        self.side, self.statics, self.unique = side, statics, unique
        self.graph: Any = None
        self.results: Results
        self.written: list[int] = []
        self.alive: list[Tensor] = []

    def replay(self, tensors: Sequence[Tensor], clone: bool) -> Any:
        inputs = tensors if self.unique is None else [tensors[i] for i in self.unique]
        side = self.side
        stream = side.begin()
        try:
            for static, x in zip(self.statics, inputs, strict=True):
                static.fill(x)
            side.replay(self.graph)
            for i in self.written:
                inputs[i].copy_(self.statics[i].tensor)
            return self.results.take(inputs, clone)
        finally:
            side.end(stream)


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Laid out as these are, and the same one where these are."""
    made: dict[int, Tensor] = {}
    for t in tensors:
        if id(t) not in made:
            static = Static(t)
            static.fill(t.detach())
            made[id(t)] = static.tensor
    return [made[id(t)] for t in tensors]


def share_memory(tensors: Sequence[Tensor]) -> bool:
    memory = {id(t): t.untyped_storage().data_ptr() for t in tensors}
    return len({*memory.values()}) < len(memory)
