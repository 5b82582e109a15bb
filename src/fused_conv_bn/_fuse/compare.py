"""The first call of an entry: the graph, and each group in it, beside the class' own forward.

What gives another result is dropped, and the report says why.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._memory import ran_out
from .capture import Arguments
from .difference import difference_of
from .entry import Block, Entry, State, lock
from .undisturbed import undisturbed

_MOST_ATTEMPTS = 3
"""To compare a first call. Each may fill memory, which then is freed and allocated anew."""
_log = logging.getLogger("fused_conv_bn")
_SECONDS = 3.0
"""Between two lines of the log about one comparison."""
own_ways = threading.local()
"""Of a thread: ``modules``, whose calls run their own forward, and ``example``, whose result nobody reads."""


@contextlib.contextmanager
def _in_its_own_way(modules: set[nn.Module]) -> Iterator[None]:
    """This thread's calls of these modules run their own forward: what a graph went through is no root behind it."""
    before: frozenset[nn.Module] = getattr(own_ways, "modules", frozenset())
    own_ways.modules = before | modules
    try:
        yield
    finally:
        own_ways.modules = before


class _Compared:
    """An entry's calls, for once: its groups by PyTorch's ops, and each compared with the fused op.

    What the graph makes of these is what the forward makes, bit by bit, unless the graph is wrong. So a wrong graph and
    a wrong group show, however much a model makes of roundings.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.problem: str | None = None
        self.broadcast: set[str] = set()
        self.said = time.monotonic()
        self.calls: list[Block] = [functools.partial(self._call, i) for i in range(len(entry.blocks))]

    def _call(self, index: int, x: Any, residual: Tensor | None = None) -> Tensor:
        group, block = self.entry.groups[index], self.entry.blocks[index]
        if (now := time.monotonic()) - self.said > _SECONDS:
            self.said = now
            _log.info("group %d of %d, %s, is compared with PyTorch's ops", index + 1, len(self.calls), group.name)
        expected = block.plain(x, residual)
        if not block.takes(x, residual):
            self.broadcast.add(group.key)
            return expected
        if residual is not None and (residual.shape != expected.shape or residual.dtype != expected.dtype):
            self.broadcast.add(group.adds)
            return expected
        got = self.entry.quick[index](x, residual)
        difference = difference_of(got, expected)
        if difference is not None and self.problem is None:
            self.problem = f"the op for {group.name} gave {difference}"
        if (algorithm := block.algorithm(x, residual)) is not None:
            self.entry.algorithms[str(group.conv.target)] = algorithm  # type: ignore[union-attr]
        return expected if got.stride() == expected.stride() else torch.empty_like(got).copy_(expected)


def call_once(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Calls a model for what its first call does. A comparison has run it already, and nobody reads the result."""
    before = getattr(own_ways, "example", None)
    own_ways.example = model
    try:
        with undisturbed(model):
            model(*args)
    finally:
        own_ways.example = before


def compared_call(
    root: nn.Module, state: State, key: Any, entry: Entry, own: Any, arguments: Arguments, args: Any, kwargs: Any
) -> Any:
    """The first evaluation call: both ways, compared. A mismatch drops the capture."""

    given, others = arguments.copies(), arguments.copies()
    began = time.monotonic()
    _log.info("%s: its first call is compared with its own forward", type(root).__name__)
    with undisturbed(root), _in_its_own_way(entry.inlined):
        expected = arguments.call(own, root, given)
    while True:
        compared = _Compared(entry)
        try:
            with undisturbed(root):
                difference = difference_of(entry.run_groups(root, compared.calls, *others), expected)
                if difference is None and (difference := difference_of(others, given)) is not None:
                    difference = f"in an argument, {difference}"
        except Exception as error:
            if ran_out(error):  # which says nothing about the graph
                raise
            difference = f"{type(error).__name__}: {error}"
        if compared.broadcast <= entry.broadcast:
            break
        # What adds a tensor of another shape, or is no gate, runs by itself. Then other groups may end elsewhere.
        with lock:
            state.drop(key, entry)
            others = arguments.copies()
            entry = Entry(root, own, arguments, entry.broadcast | compared.broadcast, entry.frozen)
            state.keep(key, entry)
    _log.info("%s: compared in %.1f s", type(root).__name__, time.monotonic() - began)
    problem = compared.problem
    if problem is None and difference is not None:
        problem = f"its graph gave another result than its forward: {difference}"
    if problem is None:
        entry.unchecked = False
        entry.look_inside(root, state, arguments, expected)
        if root is getattr(own_ways, "example", None):
            return expected
        return entry.call(root, entry.full, [*arguments.tensors.values()])
    if entry.frozen:  # what cannot be frozen may be fused: a model that reads the strides of a result, say
        entry.thaw()
        entry.guard.look_at(entry.blocks)
        return compared_call(root, state, key, entry, own, arguments, args, kwargs)
    state.refused[key] = problem
    state.entries.pop(key, None)
    return own(root, *args, **kwargs)


def without_comparison(root: nn.Module, state: State, key: Any, entry: Entry, own: Any, args: Any, kwargs: Any) -> Any:
    """A first call that memory does not suffice for to compare it, and may suffice for its own forward alone."""
    state.short[key] = state.short.get(key, 0) + 1
    if state.short[key] == _MOST_ATTEMPTS:
        state.refused[key] = f"there was not enough memory to compare it, in {_MOST_ATTEMPTS} calls"
        state.entries.pop(key, None)
    _log.info("%s: not enough memory to compare its first call", type(root).__name__)
    with _in_its_own_way(entry.inlined):
        return own(root, *args, **kwargs)
