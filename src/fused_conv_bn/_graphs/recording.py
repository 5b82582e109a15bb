"""One graph: the memory that it reads from, what it returns, and a replay."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
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
                self.places.append(("new", len(self.new)))
                self.new.append(v)
        self.alone = self.alone and len(self.new) == 1

    def take(self, inputs: Sequence[Tensor], clone: bool) -> Any:
        return self.put([t.clone() for t in self.new] if clone else self.new, inputs)

    def put(self, new: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any:
        """What the caller gets, with these in the places of what is new."""
        if self.alone:
            return new[0]
        found = {"new": new, "input": inputs}
        return tree_unflatten([v if kind == "same" else found[kind][v] for kind, v in self.places], self.spec)


def _index(t: Tensor, those: Sequence[Tensor]) -> int | None:
    return next((i for i, other in enumerate(those) if other is t), None)


class Need:
    """Of one kind of call: how many have waited together for their backward, and got it. Recordings know this, and not
    their kind, which has them: memory is free with its last user, and not at a collection."""

    calls = 1


class Recording:
    """One graph, and what it needs."""

    need: Need

    def __init__(
        self, side: Any, statics: list[Static], unique: list[int] | None, graph: Any, results: Results
    ) -> None:
        self.side, self.statics, self.unique, self.graph, self.results = side, statics, unique, graph, results
        self.written: list[int] = []
        self.changed: list[Tensor] = []
        """Parameters and buffers that a call writes to, of which PyTorch counts the versions."""
        self.alive: list[Tensor] = []
        self.dropped = False
        """Whether nobody finds it any more, and its graphs are to be freed behind the backward to come."""

    @property
    def graphs(self) -> list[Any]:
        return [self.graph]

    def is_waiting(self) -> bool:
        """Whether a backward is still to come that reads this recording's memory."""
        return False

    def waits_beside(self, others: int) -> None:
        """So many calls of its kind have come since, or wait as well."""

    def inputs(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors if self.unique is None else [tensors[i] for i in self.unique]

    def run(self, inputs: Sequence[Tensor], take: Callable[[], Any]) -> Any:
        """A replay of these, and what ``take`` makes of its results before another one overwrites them."""
        side = self.side
        stream = side.begin()
        try:
            for static, x in zip(self.statics, inputs, strict=True):
                static.fill(x)
            side.replay(self.graph)
            for i in self.written:
                inputs[i].copy_(self.statics[i].tensor)
            if self.changed:
                increment_version(self.changed)
            return take()
        finally:
            side.end(stream)

    def replay(self, tensors: Sequence[Tensor], clone: bool) -> Any:
        inputs = self.inputs(tensors)
        with torch.no_grad():  # an argument may require a gradient where no result has one
            return self.run(inputs, lambda: self.results.take(inputs, clone))


class Explained:
    """An error in a capture says what was captured. Out of memory is what callers look for as it is."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, torch.OutOfMemoryError):
            told = str(error).strip().split("\n")[0]
            raise RuntimeError(
                f"graphed: the {self.what} cannot be captured: {type(error).__name__}: {told}"
            ) from error


def copies(tensors: Sequence[Tensor], need_grad: bool) -> list[Tensor]:
    """Laid out as these are, and the same one where these are. ``need_grad``: what requires a gradient does so here."""
    made: dict[int, Tensor] = {}
    for t in tensors:
        if id(t) not in made:
            static = Static(t)
            static.fill(t.detach())
            made[id(t)] = static.tensor.requires_grad_(need_grad and t.requires_grad)
    return [made[id(t)] for t in tensors]


def share_memory(tensors: Sequence[Tensor]) -> bool:
    memory = {id(t): t.untyped_storage().data_ptr() for t in tensors}
    return len({*memory.values()}) < len(memory)
