"""What has to be as it was for a capture to hold: modules, their modes, hooks and attributes, and which tensors there
are.

Asked before each call, so it looks twice: at a stamp, which is made of lists without a line of Python for each module,
and where that has changed at everything, one by one.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..conditions import PLAIN_TENSORS, is_watched
from .blocks import Block
from .capture import MODULE_ATTRIBUTES
from .classes import mentioned_of
from .layers import is_conv, is_frozen_norm, is_norm

STATE = "_fused_conv_bn"
"""The attribute that makes a module a root."""

_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_MODULE = MODULE_ATTRIBUTES | {STATE}
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_DEPTH = 20
"""Of containers in containers that are looked at."""
_forward = operator.attrgetter("forward")
_training = operator.itemgetter("training")


class Guard:
    """Of one capture of a root. Nothing in it refers to the root, which refers to it and would outlive its last user.

    ``paths``: of modules that are called or gone into. ``silent``: those whose calls are gone, so that nobody sees
    hooks of theirs. ``read``: those that are neither, and have attributes that the forward may have read. ``seen``:
    those that are called for their hooks. ``fetched``: those that forwards have fetched as attributes. ``blocks``: what
    the ops get their tensors from.
    """

    def __init__(
        self,
        root: nn.Module,
        modules: dict[str, nn.Module],
        paths: set[str],
        inlined: set[nn.Module],
        silent: set[nn.Module],
        read: set[nn.Module],
        seen: list[nn.Module],
        fetched: set[nn.Module],
        blocks: Iterable[Block],
        frozen: bool = False,
    ) -> None:
        self.watched, self.read, self.seen = list(silent), list(read), seen
        self.types = list(map(type, self.watched))
        self.modes = [m.training for m in self.watched]
        self.look_at(blocks)
        self.bindings = []
        for path in paths:
            parent, _, name = path.rpartition(".")
            children = modules[parent]._modules
            self.bindings.append((children, name, children.get(name)))  # of a graphed module, that
        # Which modules, parameters and buffers there are, in all that was gone into and all that is above it.
        above = {path.rpartition(".")[0] for path in paths}
        above |= {path[:i] for path in above for i, c in enumerate(path) if c == "."} | {""}
        gone_into = {modules[path] for path in above} | inlined
        self.parents = [m._modules for m in gone_into]
        self.children = [dict(d) for d in self.parents]
        tensors = [d for m in gone_into for d in (m._parameters, m._buffers)]
        self.structure, self.empty = [d for d in tensors if d], [d for d in tensors if not d]
        self.missing = self._missing()
        of_gone_into = {type(m) for m in gone_into}
        self.classes = list(of_gone_into | {getattr(of, "_fused_conv_bn_class", of) for of in of_gone_into})
        self.forwards = list(map(_forward, self.classes))
        # What is set on the class of a root lands on ours, which is before its own.
        named = mentioned_of({type(m) for m in (root, *inlined)}, of_gone_into | set(map(type, fetched)))
        self.class_dicts = [c.__dict__ for c, names in named for _ in names]
        self.class_names = [name for _, names in named for name in names]
        # What a trace has as it was: attributes that are no tensors and no modules.
        self.baked = _all_of if frozen else _baked
        self.names = [self.baked(m) for m in (root, *self.watched)]
        self.of_root = _getter(self.names[0])
        self.read_names = list(map(_own, self.read))
        # By names: most modules have the same, and then there is no line of Python for each of them.
        by_names: dict[tuple[str, ...], list[nn.Module]] = {}
        for m, names in zip((*self.watched, *self.read), (*self.names[1:], *self.read_names), strict=True):
            if names:
                by_names.setdefault(names, []).append(m)
        self.getters = [(_getter(names), modules_of) for names, modules_of in by_names.items()]
        self.saved = _snapshot(self._attributes(root))
        self._look(root)

    def look_at(self, blocks: Iterable[Block]) -> None:
        """The tensors of these have to be plain ones."""
        modules = [m for b in blocks for m in b.twins]
        places: list[tuple[dict[str, Any], str]] = [
            (m._parameters, name) for m in modules for name in ("weight", "bias")
        ]
        places += [(m._buffers, name) for m in modules for name in ("running_mean", "running_var") if is_norm(m)]
        self.tensors, self.tensor_names = [d for d, _ in places], [name for _, name in places]

    def holds(self, root: nn.Module) -> bool:
        """Whether all is as it was when this was captured."""
        try:
            same = self._stamp(root) == self.stamp
        except Exception:  # an attribute is gone, or is nothing that can be compared
            same = False
        return (same or self.holds_but_for_tensors(root)) and (
            PLAIN_TENSORS.issuperset(map(type, map(dict.get, self.tensors, self.tensor_names)))
        )

    def is_attached(self) -> bool:
        """Whether the modules are still in the places that the capture knows them by, and hooks where it has them."""
        places = all(modules.get(name) is m for modules, name, m in self.bindings) and all(
            a.keys() == b.keys() and all(a[k] is b[k] for k in a)
            for a, b in zip(self.parents, self.children, strict=True)
        )
        return places and not any(map(is_watched, self.watched)) and all(map(is_watched, self.seen))

    def _stamp(self, root: nn.Module) -> list[Any]:
        """What changes with anything that :meth:`holds_but_for_tensors` looks at, or nearly: a hook has its number from
        a counter of all hooks, and a module that has got a method of its own has an attribute more."""
        return [
            RemovableHandle.next_id,
            list(map(type, self.watched)),
            list(map(len, self.dicts)),
            len(root.__dict__),
            list(map(_training, self.dicts)),
            list(chain.from_iterable(map(dict.values, self.parents))),
            any(self.hooks),
            list(map(bool, self.seen_hooks)),
            list(map(_forward, self.classes)),
            self._missing(),
            any(self.empty),
            self._attributes(root),
        ]

    def holds_but_for_tensors(self, root: nn.Module) -> bool:
        """The same one by one, whatever class the tensors have."""
        if not self.is_attached() or list(map(type, self.watched)) != self.types:
            return False
        if [m.training for m in self.watched] != self.modes:
            return False
        if [self.baked(m) for m in (root, *self.watched)] != self.names or self._missing() != self.missing:
            return False
        if any(self.empty):
            return False
        if list(map(_own, self.read)) != self.read_names:
            return False
        if any(of.forward is not f for of, f in zip(self.classes, self.forwards, strict=True)):
            return False
        try:
            if not _is_same(self._attributes(root), self.saved):
                return False
        except Exception:  # what is in itself has no end, and what is in a set may not be comparable
            return False
        self._look(root)
        return True

    def _look(self, root: nn.Module) -> None:
        self.dicts = [m.__dict__ for m in self.watched]
        self.hooks = [d[name] for d in self.dicts for name in _HOOKS]
        self.seen_hooks = [m.__dict__[name] for m in self.seen for name in _HOOKS]
        self.stamp = self._stamp(root)
        self.stamp[-1] = self.saved  # those that can be changed in place are copies there

    def _missing(self) -> list[list[bool]]:
        return [[v is None for v in d.values()] for d in self.structure]

    def _attributes(self, root: nn.Module) -> list[Any]:
        of_modules = [list(map(get, map(_dict_of, of))) for get, of in self.getters]
        return [self.of_root(root.__dict__), *of_modules, list(map(_get, self.class_dicts, self.class_names))]


_dict_of = operator.attrgetter("__dict__")
_get = types.MappingProxyType.get


def _baked(m: nn.Module) -> tuple[str, ...]:
    """Attributes that a trace takes as they are. Convolutions and BatchNorms are not gone into: their ops get them."""
    if is_conv(m):
        return ("padding_mode",)
    if is_norm(m):
        return ("eps",) if is_frozen_norm(m) and "eps" in m.__dict__ else ()  # of which its twin has a copy
    return _all_of(m)


def _all_of(m: nn.Module) -> tuple[str, ...]:
    """A snapshot has them all, those of convolutions and BatchNorms too."""
    return tuple(name for name in m.__dict__ if name not in _MODULE)


def _own(m: nn.Module) -> tuple[str, ...]:
    """All attributes of a module that is not called, and its mode."""
    return (*(name for name in m.__dict__ if name not in _MODULE), "training")


def _getter(names: tuple[str, ...]) -> Callable[[dict[str, Any]], Any]:
    return operator.itemgetter(*names) if names else len


def _snapshot(value: Any, within: frozenset[int] = frozenset()) -> Any:
    """The value, where it can be changed in place a copy of it: not of what is in itself, or too far inside."""
    of = type(value)
    if of not in (list, tuple, set, dict) or id(value) in within or len(within) > _DEPTH:
        return value
    if of is set:
        return set(value)
    within |= {id(value)}
    if of is dict:
        return {k: _snapshot(v, within) for k, v in value.items()}
    return of([_snapshot(v, within) for v in value])


def _is_same(value: Any, saved: Any) -> bool:
    if value is saved:
        return True
    if type(value) is not type(saved):
        return False
    if type(value) in (list, tuple):
        return len(value) == len(saved) and all(map(_is_same, value, saved))
    if type(value) is dict:
        return list(value) == list(saved) and all(map(_is_same, value.values(), saved.values()))
    return (type(value) in _SIMPLE or type(value) is set) and bool(value == saved)
