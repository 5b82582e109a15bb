"""What was captured of a root: for each kind of call a graph with the fused ops in it, and what has to be as it was."""

from __future__ import annotations

import functools
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.profiler import record_function

from .._conv import autocast_dtype
from ..conditions import is_watched
from . import gates, pools, squeezes
from .capture import Arguments, Refused, capture, is_compared
from .chain import Link, call_block, chain_groups, compiled, links_of
from .channels_last import inside_of
from .difference import difference_of
from .frozen import Versions, frozen_call, refuse_training
from .guard import Guard
from .kinds import block_of
from .patterns import Group, Matcher
from .undisturbed import undisturbed
from .words import ModuleWords

lock = threading.RLock()
"""Of all that is captured, and of which modules are roots."""
_is_grad_enabled = torch.is_grad_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_dtype = operator.attrgetter("dtype")

Block = Callable[..., Tensor]


def _placed(call: Block, group: Group) -> Block:
    """With the strides of a sum whose first operand is the residual, or the dtype of one in the other's place."""

    def rounded(x: Any, residual: Tensor | None = None) -> Tensor:
        y = call(x, residual)
        of = autocast_dtype if group.conv is not None and _is_any_autocast_enabled() else _dtype
        # A single value promotes no other dtype.
        read = [t for t in x if isinstance(t, Tensor) and t.dim() > 0] if type(x) is tuple else [x]
        dtype = functools.reduce(torch.promote_types, map(of, read)) if read else y.dtype
        return y if residual is None or y.dtype is dtype else y.to(dtype)

    if group.adds_in_place:
        return rounded
    if not group.residual_first:
        return call

    def placed(x: Any, residual: Tensor | None = None) -> Tensor:
        y = call(x, residual)
        if residual is None or y.stride() == residual.stride() or y.shape != residual.shape:
            return y
        return torch.empty_like(residual, dtype=y.dtype).copy_(y)

    return placed


def _in_range(group: Group, block: Any, call: Block, x: Any, residual: Any = None) -> Tensor:
    """A call of a group in a range of a profile, whose name has what the report says of the group."""
    algorithm = block.algorithm(x, residual) if isinstance(x, (Tensor, tuple)) else None
    what = group.describe() + (f" [{algorithm}]" if algorithm else "")
    with record_function(f"fused_conv_bn: {what} {group.name}"):
        return call(x, residual)


class Entry:
    """One kind of call of a root: what runs, and what has to be as it was."""

    def __init__(
        self,
        root: nn.Module,
        forward: Callable[..., Any],
        arguments: Arguments,
        broadcast: frozenset[str] = frozenset(),
        frozen: bool = False,
    ) -> None:
        if frozen:
            refuse_training(root)
        self.broadcast = broadcast
        self.on_cuda = any(t.is_cuda for t in arguments.tensors.values())
        captured = capture(root, forward, arguments)
        graph = captured.graph
        modules = dict(root.named_modules(remove_duplicate=False))
        paths: dict[nn.Module, str] = {}
        for path, m in modules.items():
            paths.setdefault(m, path)
        self.called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
        free = {path for path in self.called if not is_watched(modules[path])}
        words = ModuleWords(modules, free)
        devices = {t.device.type for t in arguments.tensors.values()}
        has_pools, joins, squeeze = (not devices.isdisjoint(m.DEVICES) for m in (pools, gates, squeezes))
        # Under autocast such tensors are of another dtype than what they change.
        channelwise = not (frozen or _is_any_autocast_enabled())
        matcher = Matcher(graph, words, broadcast, has_pools, channelwise, joins, squeeze)
        if matcher.writes_attributes():
            raise Refused("it writes to its parameters or buffers")
        self.groups = matcher.groups()
        self.why = {str(node.target): reason for node, reason in matcher.why.items()}
        self.inlined = set(captured.inlined[1:])
        self.leaves = {paths[m]: reason for m, reason in captured.leaves.items()}

        def module(node: fx.Node | None) -> nn.Module | None:
            return None if node is None else modules[str(node.target)]

        norms = [None if g.bn_path is None else modules[g.bn_path] for g in self.groups]
        self.blocks = [block_of(g, module, bn) for g, bn in zip(self.groups, norms, strict=True)]
        self.algorithms: dict[str, str] = {}
        # Modules whose calls are gone, so that nobody sees hooks of theirs.
        gone = (n for g in self.groups for n in (g.conv, g.bn, *g.swallowed))
        silent = self.inlined | {m for n in gone if n is not None and n.op == "call_module" and (m := module(n))}
        parts = [b.norm.parts for b in self.blocks if b.norm is not None]
        silent |= set(chain(*parts))
        self._put_groups_in(graph)
        self.run_groups = compiled(graph)  # what is compared
        may_go_inside = self.groups and not frozen and is_compared(root)
        self.inside = inside_of(graph, words, arguments.tensors.values()) if may_go_inside else None
        self.full: list[Block] = []
        self.quick: list[Block] = []
        self.thaw()
        self.graph: fx.Graph | None = None  # of a snapshot, until its groups are chains
        self.links: dict[fx.Node, Link] = {}
        self.versions: Versions | None = None
        if frozen:
            self.frozen = True
            self.full = self.quick = [frozen_call(b, g) for b, g in zip(self.blocks, self.groups, strict=True)]
            self.graph, self.links = graph, links_of(graph, words)
            silent |= {m for n in self.links if n.op == "call_module" and (m := module(n))}
            packed = [m for b in self.blocks for m in b.parts]
            packed += [link.linear for link in self.links.values() if link.linear is not None]
            self.versions = Versions(packed)
        of_functions = {paths[bn] for g, bn in zip(self.groups, norms, strict=True) if bn is not None and g.function}
        gone_through = {*self.called, *of_functions, *(paths[m] for m in (*captured.inlined[1:], *chain(*parts)))}
        # Of what is neither called nor gone into a forward reads attributes.
        called = [modules[path] for path in self.called]
        inside = {m for of in called for m in of.modules()}
        fetched = {m for m in captured.fetched if m in paths}
        read = {m for m in fetched if m not in inside and m not in self.inlined}
        watched = [m for m in called if is_watched(m)]
        # A snapshot reads no tensors of the model.
        of_blocks = () if frozen else self.blocks
        guarded = gone_through, self.inlined, silent, read, watched, fetched
        self.guard = Guard(root, modules, *guarded, of_blocks, frozen)
        self.unchecked = is_compared(root)

    def thaw(self) -> None:
        """Live blocks: each reads the parameters of its modules when it is called."""
        self.frozen = False
        self.versions = None
        self.run = self.run_groups
        self.full = [_placed(b.forward, g) for b, g in zip(self.blocks, self.groups, strict=True)]
        quick = [b.quick if b.is_quick else b.forward for b in self.blocks]
        self.quick = [_placed(call, g) for call, g in zip(quick, self.groups, strict=True)]

    @property
    def is_ready(self) -> bool:
        """Whether its calls have nothing to find out any more."""
        return bool(self.groups) and not self.unchecked and self.graph is None

    def call(self, root: nn.Module, calls: list[Block], tensors: Sequence[Tensor]) -> Any:
        if self.inside is not None and self.inside.takes(tensors):
            return self.inside.run(root, calls, *tensors)
        return self.run(root, calls, *tensors)

    def named(self, calls: list[Block]) -> list[Block]:
        """The calls in ranges of a profile. A snapshot's have ops whose names are those of what runs."""
        if self.frozen:
            return calls
        return [functools.partial(_in_range, g, b, c) for g, b, c in zip(self.groups, self.blocks, calls, strict=True)]

    def look_inside(self, root: nn.Module, state: State, arguments: Arguments, expected: Any) -> None:
        """Whether later calls run in channels_last inside.

        Weights may change their strides at the first call of the root. Whoever trains it, or has its calls in a CUDA
        graph, has called it before.
        """
        needs_nothing = not (_is_grad_enabled() or _is_any_autocast_enabled())
        if self.inside is None or not (needs_nothing or state.changed):
            return
        with undisturbed(root), lock:
            may_change = needs_nothing and state.calls == 1
            self.inside.decide(root, self, arguments.copies(), expected, state.changed, may_change, difference_of)

    def chain(self) -> None:
        """Behind the first call of a snapshot: consecutive groups become one op."""
        with lock:
            graph, self.graph = self.graph, None
            if graph is None or not self.frozen:
                return
            with torch.inference_mode(False), torch.no_grad():
                has_chains = chain_groups(graph, self.groups, self.quick, self.links)
            if has_chains:
                self.run = compiled(graph)
            self.links = {}

    def _put_groups_in(self, graph: fx.Graph) -> None:
        # Placeholders of the graph are the tensors; the root and the blocks' calls come before them.
        with graph.inserting_before(next(iter(graph.nodes))):
            calls = graph.placeholder("fused_calls")
        for index, group in enumerate(self.groups):
            last = group.nodes[-1]
            with graph.inserting_before(last):
                arguments = (calls, index, group.argument, *(() if group.residual is None else (group.residual,)))
                fused = graph.call_function(call_block, arguments)
            last.replace_all_uses_with(fused)
            for node in reversed(group.nodes):
                graph.erase_node(node)
            for other in self.groups:  # those whose input or residual this one was
                other.replace(last, fused)


class State:
    """What a root has in its ``__dict__``: where it came from, and what was captured of it."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = weakref.ref(owner)
        self.frozen = False
        self.captures = 0
        self.calls = 0
        self.changed: set[str] = set()  # paths of convolutions whose weights have got channels_last strides
        self.entries: dict[Any, list[Entry]] = {}
        self.keys: dict[Any, Any] = {}  # of calls with one tensor
        self.reason: str | None = None  # why it is not captured
        self.refused: dict[Any, str] = {}
        self.short: dict[Any, int] = {}  # calls that memory did not suffice for to compare them

    def freeze(self, frozen: bool) -> None:
        """What was captured goes: a new snapshot, or none."""
        self.frozen, self.entries, self.refused, self.captures, self.reason = frozen, {}, {}, 0, None
        self.short.clear()

    def keep(self, key: Any, entry: Entry) -> None:
        """The newest first, and no more than four of one kind."""
        found = self.entries.setdefault(key, [])
        found.insert(0, entry)
        del found[4:]

    def drop(self, key: Any, entry: Entry) -> None:
        if entry in self.entries.get(key, ()):
            self.entries[key].remove(entry)
