"""A captured module at work: its class is swapped for one whose forward runs the graph with the fused ops in it.

The class' own forward runs whenever a call is not what was captured: other arguments, other modes, hooks that came
later, a transform, a trace, torch.compile. Parameters, buffers, children and names are the module's own and stay where
they are; a swap is undone by giving the class back.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import logging
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import conditions
from .._block import BnScaleModule
from .._memory import ran_out
from .capture import Arguments, Refused, has_fixed_defaults, modes
from .channels_last import give_back
from .compare import compared_call, own_ways, without_comparison
from .entry import Entry, State, lock
from .exported import run_exported
from .frozen import run_frozen
from .guard import STATE
from .layers import is_conv, is_norm

_MOST_KINDS = 32
"""Captures of a root. What is no tensor is baked into one, an argument as an attribute, and may be new at each call."""
_log = logging.getLogger("fused_conv_bn")
_roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""All of them: a module does not know what it is in."""
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_profiler_enabled = torch.autograd._profiler_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_tracing_state = torch._C._get_tracing_state
_signature = functools.lru_cache(maxsize=None)(inspect.signature)


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
        or root in getattr(own_ways, "modules", ())
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
            with lock:
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
            result = compared_call(root, state, key, entry, own, arguments, args, kwargs)
        except RuntimeError as error:
            left = _entry_of(root, state, key)  # another one, where a sum was of no shape for its group
            if key in state.refused or not ((left is None or left.unchecked) and ran_out(error)):
                raise
            runs_short = True
        if runs_short:  # what the comparison had is free by now
            return without_comparison(root, state, key, entry, own, args, kwargs)
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
    with lock:
        state.reason = reason
        swap_children(root, state.frozen)
    try:
        return own(root, *args, **kwargs)
    except Exception:  # it was the call's trouble
        state.reason = None
        raise


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
            with lock:
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
    with lock:
        roots = list(_roots)
        found = [(root, path) for root in roots if root is not m for path, part in root.named_modules() if part is m]
    # One that was called knows more than one that was not.
    return max(found, key=lambda f: (bool(f[0].__dict__[STATE].entries), f[1].count(".")), default=None)


def swap(m: nn.Module, frozen: bool = False) -> None:
    """Makes a module a root. Nothing is captured before it is called."""
    with lock:
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
    with lock:
        for root in m.modules():
            if is_root(root):
                root.__dict__[STATE].freeze(frozen)


def restore(m: nn.Module) -> None:
    if is_root(m):
        if "_fused_conv_bn_class" in type(m).__dict__:
            m.__class__ = type(m)._fused_conv_bn_class  # type: ignore[attr-defined]
        with lock:
            _roots.discard(m)
        give_back(m, m.__dict__.pop(STATE).changed)
