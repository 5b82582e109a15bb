"""What layers do one by one and a captured call does at once: autocast's casts of weights, and counts of batches.

Each is a kernel that takes as long to start as to run, of which a training step of ResNet-50 has 160. Outside of a
capture layers do their own: a cast of all weights would keep DistributedDataParallel from sending gradients while
backward runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._conv import autocast_dtype


class _Now(threading.local):
    asked: list[Tensor] | None = None
    cast: dict[int, Tensor] | None = None
    batches: list[Tensor] | None = None


_now = _Now()


def cast_weight(weight: Tensor) -> Tensor:
    """What a convolution under autocast takes for its weight: the cast that is there already, or the weight."""
    if _now.asked is None and _now.cast is None:
        return weight
    dtype = autocast_dtype(weight)
    if _now.asked is not None and dtype is not weight.dtype:
        _now.asked.append(weight)
    cast = weight if _now.cast is None else _now.cast.get(id(weight), weight)
    return cast if cast.dtype is dtype else weight  # a part of the model may be out of autocast


def count(batches: Tensor) -> None:
    """Adds 1 to ``num_batches_tracked``, now or behind the call."""
    if _now.batches is None:
        batches.add_(1)
    else:
        _now.batches.append(batches)


def count_back(batches: Tensor) -> None:
    if _now.batches is None:
        batches.sub_(1)
    else:
        _now.batches.pop()


@contextlib.contextmanager
def asking() -> Iterator[list[Tensor]]:
    """Which weights a call asks for."""
    before, asked = _now.asked, list[Tensor]()
    _now.asked = asked
    try:
        yield asked
    finally:
        _now.asked = before


@contextlib.contextmanager
def together(weights: Sequence[Tensor]) -> Iterator[None]:
    """A call in which these weights are cast at once, and batches counted behind it."""
    before, batches = (_now.cast, _now.batches), list[Tensor]()
    try:
        _now.batches = batches
        if weights:  # for whose casts memory may run out
            _now.cast = dict(zip(map(id, weights), _Cast.apply(autocast_dtype(weights[0]), *weights), strict=True))
        yield
    finally:
        _now.cast, _now.batches = before
    times = Counter(map(id, batches))  # a BatchNorm may be called more than once
    with torch.no_grad():
        for n in {*times.values()}:
            torch._foreach_add_([b for b in {id(b): b for b in batches}.values() if times[id(b)] == n], n)


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [w.dtype for w in weights]
        made = [torch.empty_like(w, dtype=dtype) for w in weights]
        torch._foreach_copy_(made, list(weights))
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        there = [g for g in grads if g is not None]
        made = [torch.empty_like(g, dtype=of) for g, of in zip(grads, ctx.dtypes, strict=True) if g is not None]
        if there:
            torch._foreach_copy_(made, there)
        fresh = iter(made)
        return None, *(None if g is None else next(fresh) for g in grads)


_cast_node: Any = getattr(_Cast, "_backward_cls")  # noqa: B009 (of a metaclass, of which mypy knows nothing)


def edges(node: Any, output: int) -> Sequence[tuple[Any, int]]:
    """What the gradient of a node's result flows to: of a cast that is there for all weights, one of them."""
    found: Sequence[tuple[Any, int]] = node.next_functions
    return found[output : output + 1] if isinstance(node, _cast_node) else found
