"""A captured module at work: its class is swapped for one whose forward runs the graph with the fused ops in it.

The class' own forward runs whenever a call is not what was captured: other arguments, other modes, hooks that came
later, a transform, a trace, torch.compile. Parameters, buffers, children and names are the module's own and stay where
they are; a swap is undone by giving the class back.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import inspect
import logging
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.profiler import record_function

from .. import conditions
from .._block import BnScaleModule
from .._conv import autocast_dtype
from .._memory import ran_out
from ..conditions import is_watched
from . import gates, pools, squeezes
from .capture import Arguments, Refused, capture, has_fixed_defaults, is_compared, modes
from .chain import Link, call_block, chain_groups, compiled, links_of
from .channels_last import give_back, inside_of
from .classes import ClassAttributes
from .difference import difference_of
from .exported import run_exported
from .frozen import Versions, frozen_call, refuse_training, run_frozen
from .guard import STATE, Guard
from .kinds import block_of
from .layers import is_conv, is_norm
from .patterns import Group, Matcher
from .words import ModuleWords

_MOST_KINDS = 32
"""Captures of a root. What is no tensor is baked into one, an argument as an attribute, and may be new at each call."""
_MOST_ATTEMPTS = 3
"""To compare a first call. Each may fill memory, which then is freed and allocated anew."""
_lock = threading.RLock()
_log = logging.getLogger("fused_conv_bn")
_SECONDS = 3.0
"""Between two lines of the log about one comparison."""
_roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""All of them: a module does not know what it is in."""
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_profiler_enabled = torch.autograd._profiler_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_tracing_state = torch._C._get_tracing_state
_signature = functools.lru_cache(maxsize=None)(inspect.signature)
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
        with undisturbed(root), _lock:
            may_change = needs_nothing and state.calls == 1
            self.inside.decide(root, self, arguments.copies(), expected, state.changed, may_change, difference_of)

    def chain(self) -> None:
        """Behind the first call of a snapshot: consecutive groups become one op."""
        with _lock:
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


def _leave_alone(values: Any) -> bool:
    """Whether the class' own forward is to run, whatever was captured."""
    if _is_compiling() or conditions.transformed() or _tracing_state() is not None:
        return True
    if conditions.hooks_for_all() or conditions.methods_replaced():
        return True
    for v in values:
        if isinstance(v, fx.Proxy):
            return True
    return False


def run_root(root: nn.Module, of: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state: State | None = root.__dict__.get(STATE)
    own = of.forward
    if (
        state is None  # unfused under a class that FSDP made of ours
        or (state.reason is not None and not state.frozen)
        or state.owner() is not root
        or root in getattr(_own_ways, "modules", ())
        or _leave_alone((*args, *kwargs.values()))
    ):
        if state is not None and conditions.exports_ops():
            return run_exported(root, state, own, args, kwargs)
        return own(root, *args, **kwargs)
    if state.frozen:
        return run_frozen(root, (*args, *kwargs.values()), lambda: _run(root, state, own, args, kwargs))
    return _run(root, state, own, args, kwargs)


def _is_in_cuda_graph() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _run(root: nn.Module, state: State, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state.calls += 1
    if state.reason is not None:
        return own(root, *args, **kwargs)
    # Most calls have one tensor, and most of those are of a kind that was there before.
    is_simple = len(args) == 1 and not kwargs and type(args[0]) is Tensor
    kind = (args[0].dtype, args[0].device, root.training, modes()) if is_simple else None
    key = state.keys.get(kind)
    entry = None if key is None else _entry_of(root, state, key)
    if entry is not None and entry.is_ready:
        return _call(root, entry, args)
    try:
        arguments = Arguments(_signature(own), root, args, kwargs)
    except TypeError:
        return own(root, *args, **kwargs)  # which says so, or takes it
    except Refused as refused:
        return _refuse(root, state, str(refused), own, args, kwargs)
    if key is None:
        key = arguments.call_key(root)
        entry = _entry_of(root, state, key)
        if is_simple and has_fixed_defaults(own):
            state.keys[kind] = key
    if key in state.refused:
        return own(root, *args, **kwargs)
    if (entry is None or entry.unchecked) and _is_in_cuda_graph():
        return own(root, *args, **kwargs)  # a first call looks at values, which a graph has not
    if entry is None:
        try:
            with _lock:
                entry = _entry_of(root, state, key)
                if entry is None:
                    state.captures += 1
                    if state.captures > _MOST_KINDS:
                        raise Refused(f"it was called in {_MOST_KINDS} ways already")
                    _log.info("%s: its forward is captured", type(root).__name__)
                    began = time.monotonic()
                    entry = Entry(root, own, arguments, frozen=state.frozen)
                    took = time.monotonic() - began
                    _log.info("%s: captured in %.1f s, groups: %d", type(root).__name__, took, len(entry.groups))
                    state.keep(key, entry)
                    for path in entry.called:
                        m = root.get_submodule(path)
                        if path in entry.leaves:  # a call of its own has numbers where that trace had none
                            swap(m, state.frozen)
                            if not is_root(m):
                                swap_children(m, state.frozen)
                        elif isinstance(m, nn.Sequential) or not type(m).__module__.startswith(
                            ("torch.nn.", "torch.ao.")
                        ):
                            swap(m, state.frozen)  # a hook watches its call, FSDP's for instance
        except Refused as refused:
            return _refuse(root, state, str(refused), own, args, kwargs)
    if not entry.groups:
        return own(root, *args, **kwargs)
    if entry.unchecked:
        runs_short = False
        try:
            result = _checked(root, state, key, entry, own, arguments, args, kwargs)
        except RuntimeError as error:
            left = _entry_of(root, state, key)  # another one, where a sum was of no shape for its group
            if key in state.refused or not ((left is None or left.unchecked) and ran_out(error)):
                raise
            runs_short = True
        if runs_short:  # what the comparison had is free by now
            return _without_comparison(root, state, key, entry, own, args, kwargs)
    else:
        result = _call(root, entry, [*arguments.tensors.values()])
    if entry.graph is not None and not entry.unchecked:
        entry.chain()
    return result


def _entry_of(root: nn.Module, state: State, key: Any) -> Entry | None:
    for entry in state.entries.get(key, ()):
        if entry.guard.holds(root):
            return entry
    return None


def _call(root: nn.Module, entry: Entry, tensors: Sequence[Tensor]) -> Any:
    """What was captured, and is right."""
    quick = not (_is_grad_enabled() or _is_any_autocast_enabled())
    calls = entry.quick if quick else entry.full
    if quick and _profiler_enabled():
        calls = entry.named(calls)
    return entry.call(root, calls, tensors)


def _refuse(root: nn.Module, state: State, reason: str, own: Any, args: Any, kwargs: Any) -> Any:
    """Where the root's own forward is the trouble, its children are roots."""
    _log.info("%s: not captured, its parts are when they are called: %s", type(root).__name__, reason)
    with _lock:
        state.reason = reason
        swap_children(root, state.frozen)
    try:
        return own(root, *args, **kwargs)
    except Exception:  # it was the call's trouble
        state.reason = None
        raise


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
    before = getattr(_own_ways, "example", None)
    _own_ways.example = model
    try:
        with undisturbed(model):
            model(*args)
    finally:
        _own_ways.example = before


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Calls of a model that leave its buffers, what forwards count in its classes and the random state as they were,
    under ``no_grad``."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    places = [(m._buffers, dict(m._buffers)) for m in model.modules() if isinstance(m._buffers, dict)]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not (b.is_meta or torch.nn.parameter.is_lazy(b))]
    classes = ClassAttributes(model)
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            yield
        finally:
            classes.restore()
            for place, of_place in places:
                if any(place.get(name) is not b for name, b in of_place.items()):
                    place.update(of_place)
            for b, before in buffers:
                if not _is_equal(b, before):
                    b.data.copy_(before)  # counts as no change: what a call before has saved is as it was


def _is_equal(a: Tensor, b: Tensor) -> bool:
    try:
        return torch.equal(a, b)
    except torch.OutOfMemoryError:  # an answer takes memory, and a copy none
        return False


_own_ways = threading.local()


@contextlib.contextmanager
def _in_its_own_way(modules: set[nn.Module]) -> Iterator[None]:
    """This thread's calls of these modules run their own forward: what a graph went through is no root behind it."""
    before: frozenset[nn.Module] = getattr(_own_ways, "modules", frozenset())
    _own_ways.modules = before | modules
    try:
        yield
    finally:
        _own_ways.modules = before


def _checked(
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
        with _lock:
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
        if root is getattr(_own_ways, "example", None):
            return expected
        return entry.call(root, entry.full, [*arguments.tensors.values()])
    if entry.frozen:  # what cannot be frozen may be fused: a model that reads the strides of a result, say
        entry.thaw()
        entry.guard.look_at(entry.blocks)
        return _checked(root, state, key, entry, own, arguments, args, kwargs)
    state.refused[key] = problem
    state.entries.pop(key, None)
    return own(root, *args, **kwargs)


def _without_comparison(root: nn.Module, state: State, key: Any, entry: Entry, own: Any, args: Any, kwargs: Any) -> Any:
    """A first call that memory does not suffice for to compare it, and may suffice for its own forward alone."""
    state.short[key] = state.short.get(key, 0) + 1
    if state.short[key] == _MOST_ATTEMPTS:
        state.refused[key] = f"there was not enough memory to compare it, in {_MOST_ATTEMPTS} calls"
        state.entries.pop(key, None)
    _log.info("%s: not enough memory to compare its first call", type(root).__name__)
    with _in_its_own_way(entry.inlined):
        return own(root, *args, **kwargs)


# ---- classes ---------------------------------------------------------------------------------------------------------

_classes: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(of: type[nn.Module]) -> type[nn.Module]:
    if of not in _classes:

        @functools.wraps(of.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return run_root(self, of, args, kwargs)

        def reduce(self: nn.Module, protocol: Any) -> Any:
            # Pickles are those of the class itself, without what was captured. (The way that does not look at the class
            # of what is pickled.)
            found = _bare(self, of).__reduce_ex__(protocol)
            if isinstance(found, str) or found[0] is not copyreg.__newobj__ or found[1] != (of,):  # type: ignore[attr-defined]
                return found
            return copyreg._reconstructor, (of, object, None), *found[2:]  # type: ignore[attr-defined]

        def deepcopy(self: nn.Module, memo: dict[int, Any]) -> Any:
            bare = _bare(self, of)
            found: Any = bare.__reduce_ex__(4)
            if isinstance(found, str) or found[0] is not copyreg.__newobj__ or found[1] != (of,):  # type: ignore[attr-defined]
                twin = copy.deepcopy(bare, memo)
            else:
                twin = of.__new__(of)
                memo[id(self)] = twin
                state = copy.deepcopy(found[2], memo)
                twin.__setstate__(state) if hasattr(twin, "__setstate__") else twin.__dict__.update(state)
            swap(twin)
            if is_root(twin):
                twin.__dict__[STATE].changed |= self.__dict__[STATE].changed
            return twin

        def load(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            # Of each module that load_state_dict() comes to. Its children follow, and no call before they have.
            of._load_from_state_dict(self, *args, **kwargs)
            with _lock:
                if (state := self.__dict__.get(STATE)) is not None and state.frozen:
                    state.freeze(True)

        own = {
            "forward": forward,
            "_load_from_state_dict": load,
            "__reduce_ex__": reduce,
            "__module__": of.__module__,
            "__qualname__": of.__qualname__,
        }
        if "__deepcopy__" not in dir(of):
            own["__deepcopy__"] = deepcopy
        own["_fused_conv_bn_class"] = of
        _classes[of] = type(of.__name__, (of,), own)
    return _classes[of]


def _bare(m: nn.Module, of: type[nn.Module]) -> nn.Module:
    """The module as one of its own class, with the same attributes."""
    bare = of.__new__(of)
    bare.__dict__.update({k: v for k, v in m.__dict__.items() if k != STATE})
    return bare


def is_root(m: nn.Module) -> bool:
    return STATE in m.__dict__


def around(m: nn.Module) -> tuple[nn.Module, str] | None:
    """The outermost root that a module is in, and its path there."""
    with _lock:
        roots = list(_roots)
        found = [(root, path) for root in roots if root is not m for path, part in root.named_modules() if part is m]
    # One that was called knows more than one that was not.
    return max(found, key=lambda f: (bool(f[0].__dict__[STATE].entries), f[1].count(".")), default=None)


def swap(m: nn.Module, frozen: bool = False) -> None:
    """Makes a module a root. Nothing is captured before it is called."""
    with _lock:
        _swap(m, frozen)


def _swap(m: nn.Module, frozen: bool) -> None:
    if (graphs := m.__dict__.get("_graphs")) is not None:  # fcb.graphed's module: the one in it
        m = graphs.model
    m = conditions.without_disable(m)
    if is_root(m) or "forward" in m.__dict__ or isinstance(m, BnScaleModule) or conditions.compiled_by(m):
        return
    if not any(True for _ in m.children()) or type(m).forward is nn.Module.forward:
        return
    if is_conv(m) or is_norm(m):  # a trace never goes into one: timm's BatchNormAct2d has children
        return
    try:
        fused = fused_class(type(m))
    except Exception:  # a class that refuses to have subclasses
        return
    m.__dict__[STATE] = state = State(m)
    state.frozen = frozen
    m.__class__ = fused
    _roots.add(m)


def swap_children(m: nn.Module, frozen: bool = False) -> None:
    """Those that are called: containers that are not (nn.ModuleList) have children of their own."""
    if conditions.compiled_by(m):
        return
    for child in m.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            swap_children(child, frozen)
        else:
            swap(child, frozen)
            # A container that its parent only iterates over is never called, and its children are.
            if isinstance(child, nn.Sequential):
                swap_children(child, frozen)


def freeze(m: nn.Module, frozen: bool) -> None:
    """Makes all roots in ``m`` snapshots of what their parameters are when they are called next, or live again."""
    with _lock:
        for root in m.modules():
            if is_root(root):
                root.__dict__[STATE].freeze(frozen)


def restore(m: nn.Module) -> None:
    if is_root(m):
        if "_fused_conv_bn_class" in type(m).__dict__:
            m.__class__ = type(m)._fused_conv_bn_class  # type: ignore[attr-defined]
        with _lock:
            _roots.discard(m)
        give_back(m, m.__dict__.pop(STATE).changed)
