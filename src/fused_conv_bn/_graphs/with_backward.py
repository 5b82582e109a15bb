"""A call that needs gradients: one graph of its forward, one of its backward, and the node of autograd between them.

The two share what forward saved. So a call whose backward has yet to come keeps its graphs for itself, and they have a
pool of memory of their own.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._together import edges
from .recording import Explained, Recording, Static

_version = operator.attrgetter("_version")
_data_ptr: Callable[[Any], int] = Tensor.data_ptr
_apply: Callable[..., Any]
_replayed: Any


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def leaves_of(result: Tensor) -> list[Tensor]:
    """The tensors that a result's gradient flows to, and replayed calls, which a capture cannot go through."""
    if result.grad_fn is None:
        return [result] if result.requires_grad else []
    found: dict[int, Any] = {}
    left: list[tuple[Any, int]] = [(result.grad_fn, result.output_nr)]
    seen = {*left}
    while left:
        node, output = left.pop()
        leaf = node if isinstance(node, _replayed) else getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
            continue
        fresh = {edge for edge in edges(node, output) if edge[0] is not None} - seen
        seen |= fresh
        left += fresh
    return list(found.values())


def refuse_others(name: str, leaves: Iterable[int], known: Container[int]) -> None:
    """``leaves``: ids of what gradients of a forward's results flow to. ``known``: of parameters and arguments."""
    if not all(i in known for i in leaves):
        raise RuntimeError(
            f"graphed: the forward of {name} uses a tensor that requires a gradient and is neither a parameter nor "
            "an argument, expected none: a replay has no gradient for it"
        )


def in_this_thread() -> Any:
    """Where backward runs. A device's own thread may be in another call's, which waits for what is recorded here."""
    return torch.autograd.set_multithreading_enabled(False)


def differentiate(results: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Any]:
    """Backward of results that need gradients, without a trace in the leaves, and outside of autocast as in loops."""
    if not leaves:
        return ()
    with torch.autocast(results[0].device.type, enabled=False), in_this_thread():
        try:
            return torch.autograd.grad(results, leaves, grads, allow_unused=True)
        finally:  # a checkpoint casts weights once more
            torch.clear_autocast_cache()


class Ticket:
    """Of one call: whether its backward is still to come."""

    __slots__ = "__weakref__", "beside", "came", "recording", "versions"

    def __init__(self, recording: WithBackward) -> None:
        self.recording, self.came, self.beside = recording, False, 0
        self.versions: list[int] = []


class WithBackward(Recording):
    """A recording with a second graph, of its backward."""

    leaves: list[Tensor]
    """What gets gradients: parameters, and arguments as the graph has them."""
    given: list[int | None]
    """Of each leaf, which of the call's arguments it is; None for a parameter."""
    has_gradient: list[bool]
    """Of the new results."""
    flows: list[frozenset[int]]
    """Of each of those that have, which leaves its gradient flows to."""
    pointers: list[int]
    """Where the leaves are."""
    alone: frozenset[int]
    """Which gradients have memory to themselves: one that flows on to several leaves, or as it came, has not."""
    incoming: list[Static]
    grads: Sequence[Tensor | None]
    backward_graph: Any
    lock: Any
    waiting: weakref.ref[Ticket] | None = None

    @property
    def graphs(self) -> list[Any]:
        return [self.graph, self.backward_graph]

    def is_waiting(self) -> bool:
        ticket = None if self.waiting is None else self.waiting()
        return ticket is not None and not ticket.came

    def waits_beside(self, others: int) -> None:
        ticket = None if self.waiting is None else self.waiting()
        if ticket is not None:
            ticket.beside = others

    def record(self, name: str, owners: dict[int, Tensor], lock: Any) -> Any:
        """Behind the capture of the forward, whose results still have their graph of autograd. ``owners``: by a leaf's
        id, the parameter that its gradient is of. Returns the new graph."""
        new = self.results.new
        outputs = [t for t in new if t.requires_grad]
        known: dict[int, int | None] = dict.fromkeys(owners)
        known |= {id(s.tensor): i for i, s in enumerate(self.statics)}
        reached = [leaves_of(t) for t in outputs]
        unique = {id(leaf): leaf for leaf in itertools.chain.from_iterable(reached)}
        refuse_others(name, unique, known)
        places = {i: place for place, i in enumerate(unique)}
        leaves, self.given = list(unique.values()), [known[i] for i in unique]
        self.leaves = [owners.get(i, leaf) for i, leaf in unique.items()]
        self.has_gradient = [t.requires_grad for t in new]
        self.flows = [frozenset(places[id(leaf)] for leaf in of_result) for of_result in reached]
        self.lock = lock
        with torch.no_grad():
            self.incoming = self.side.statics([torch.empty_like(t) for t in outputs])
        given = [s.tensor for s in self.incoming]
        with Explained(f"backward of {name}"):
            self.backward_graph, self.grads = self.side.capture(lambda: differentiate(outputs, leaves, given))
        self.pointers = [*map(_data_ptr, self.leaves)]
        found = {i: g for i, g in enumerate(self.grads) if g is not None}
        memory = Counter(map(_storage, [*found.values(), *given]))
        self.alone = frozenset(i for i, g in found.items() if memory[_storage(g)] == 1)
        self.results.new = [t.detach() for t in new]
        return self.backward_graph

    def replay(self, tensors: Sequence[Tensor], clone: bool) -> Any:
        inputs = self.inputs(tensors)
        ticket = Ticket(self)
        leaves = [p if i is None else inputs[i] for p, i in zip(self.leaves, self.given, strict=True)]
        if not clone:
            self._leave(t for t in leaves if t.is_leaf)
        new = _apply(ticket, clone, inputs, *leaves)
        ticket.versions = [*map(_version, self.leaves)]
        self.waiting = weakref.ref(ticket)
        return self.results.put(list(new), inputs)

    def replay_backward(
        self, ticket: Ticket, clone: bool, grads: Sequence[Tensor | None], nodes: Sequence[tuple[Any, int]]
    ) -> list[Tensor | None]:
        """``nodes``: of autograd, that the leaves' gradients go to."""
        with self.lock:
            if ticket.came:
                raise RuntimeError(
                    "graphed: a second backward of one call, expected one: the first has overwritten what the call "
                    "saved; add the results up, and call backward once"
                )
            ticket.came = True
            self.need.calls = max(self.need.calls, 1 + ticket.beside)
            if [*map(_version, self.leaves)] != ticket.versions:
                raise RuntimeError(
                    "graphed: a parameter was changed in place between a call and its backward, which reads it, "
                    "expected backward before the change"
                )
            if [*map(_data_ptr, self.leaves)] != self.pointers:
                raise RuntimeError(
                    "graphed: a parameter was moved between a call and its backward, which reads it where it was, "
                    "expected backward before the move"
                )
            flowing = frozenset().union(*(to for to, g in zip(self.flows, grads, strict=True) if g is not None))
            stream = self.side.begin()
            try:
                if not clone:
                    self._leave(node.variable for node, _ in nodes if hasattr(node, "variable"))
                for static, g in zip(self.incoming, grads, strict=True):
                    if g is None:
                        static.memory.zero_()
                    else:
                        static.fill(g)
                self.side.replay(self.backward_graph)
                found = [g if i in flowing else None for i, g in enumerate(self.grads)]
                there = [g for g in found if g is not None]
                if clone and there:
                    made = [torch.empty_like(g) for g in there]
                    torch._foreach_copy_(made, there)
                else:
                    made = [g.detach() if i in self.alone else g.clone() for i, g in enumerate(found) if g is not None]
            finally:
                self.side.end(stream)
            if self.dropped:
                self.side.free(self.graphs, last=True)
        fresh = iter(made)
        return [None if g is None else next(fresh) for g in found]

    def _leave(self, leaves: Iterable[Tensor]) -> None:
        """What has added up in this graph's memory is to stay, for what comes is added to it. Forward writes there,
        too: a gradient may have the memory of what forward needs for a moment."""
        memory = {_data_ptr(self.grads[i]) for i in self.alone}
        for leaf in leaves:
            if leaf.grad is not None and leaf.grad.layout is torch.strided and _data_ptr(leaf.grad) in memory:
                leaf.grad = leaf.grad.clone()


class _Replayed(torch.autograd.Function):
    """A call and its backward as autograd sees them."""

    @staticmethod
    def forward(ctx: Any, ticket: Ticket, clone: bool, inputs: Sequence[Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
        recording = ticket.recording
        kept = recording.results.new
        new = recording.run(inputs, lambda: [t.clone() if clone else t.detach() for t in kept])
        ctx.ticket, ctx.clone = ticket, clone
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t, has in zip(new, recording.has_gradient, strict=True) if not has))
        return tuple(new)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ticket = ctx.ticket
        recording = ticket.recording
        wanted = [g for g, has in zip(grads, recording.has_gradient, strict=True) if has]
        return (None, None, None, *recording.replay_backward(ticket, ctx.clone, wanted, ctx.next_functions))


_apply = _Replayed.apply
_replayed = getattr(_Replayed, "_backward_cls")  # noqa: B009
