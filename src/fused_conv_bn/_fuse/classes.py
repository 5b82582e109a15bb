"""What forwards mention of classes: attributes and methods, which instances do not have and a trace takes as they are.

Only the names in code are looked at, and only objects of Python's own types: nothing of the model's runs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from itertools import chain
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

_ASKED = "__getattr__", "__getattribute__"
"""Called for each attribute that is not there, or for all."""
_METHODS = FunctionType, staticmethod, classmethod, property
_CONTAINERS = list, dict, set
_NOWHERE = object()


def mentioned_of(running: set[type], read: set[type]) -> list[tuple[type, list[str]]]:
    """Classes, and the names that may be read of each: those that the forwards of ``running`` mention, and what methods
    of these names, of ``read`` too, mention in turn. PyTorch's classes stay as they are."""
    own = {of: [c for c in of.__mro__ if _may_change(c)] for of in running | read}
    of_running = {c for of in running for c in own[of]}
    classes = {c for several in own.values() for c in several}
    values = [c.__dict__["forward"] for c in of_running if "forward" in c.__dict__]
    values += [c.__dict__[name] for c in classes for name in _ASKED if name in c.__dict__]
    # Forwards of what is read and not gone into, as of leaves, are none of these.
    done = {"forward", *_ASKED}
    while values:
        new = _names_in(values) - done
        done |= new
        values = [c.__dict__[name] for c in classes for name in new & c.__dict__.keys()]
    found: dict[type, set[str]] = {}
    for of, several in own.items():
        names = done.intersection(chain.from_iterable(c.__dict__ for c in of.__mro__))
        for c in several:
            found.setdefault(c, set()).update(names)
    return [(c, sorted(names)) for c, names in found.items()]


def _may_change(of: type) -> bool:
    module = of.__dict__.get("__module__")  # of a class that is written in Python
    return type(module) is str and not module.startswith(("torch.", "builtins", "fused_conv_bn."))


def _names_in(values: list[Any]) -> set[str]:
    """The names in functions, in methods of any kind and in properties, and in what their decorators have made of
    them."""
    names, seen, waiting = set[str](), set[int](), list(values)
    while waiting:
        value = waiting.pop()
        of = type(value)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if of is CodeType:
            names.update(value.co_names)
            names.update(c for c in value.co_consts if type(c) is str)  # of getattr()
            waiting += [c for c in value.co_consts if type(c) is CodeType]
        elif of is FunctionType:
            waiting += [value.__code__, value.__dict__.get("__wrapped__"), *_contents(value.__closure__)]
        elif of in (staticmethod, classmethod, MethodType):
            waiting.append(value.__func__)
        elif of is property:
            waiting.append(value.fget)
        elif of in (functools.partial, functools.partialmethod, functools.cached_property):
            waiting.append(value.func)
    return names


def _contents(cells: tuple[CellType, ...] | None) -> Iterator[Any]:
    for cell in cells or ():
        try:
            yield cell.cell_contents
        except ValueError:  # nothing is in it yet
            pass


class ClassAttributes:
    """Those that forwards in a module mention and that are no methods, as they are now, and what is in them."""

    def __init__(self, root: nn.Module) -> None:
        self.saved = [
            (of, name, value, copy.copy(value) if type(value) in _CONTAINERS else None)
            for of, names in mentioned_of(set(map(type, root.modules())), set())
            for name in names
            if type(value := of.__dict__.get(name, _NOWHERE)) not in _METHODS
        ]

    def values(self) -> Iterator[tuple[type, Any]]:
        return ((of, value) for of, _, value, _ in self.saved)

    def restore(self) -> list[type]:
        """Puts them back; returns the classes that had others."""
        changed = []
        for of, name, value, inside in self.saved:
            if of.__dict__.get(name, _NOWHERE) is not value:
                type.__delattr__(of, name) if value is _NOWHERE else type.__setattr__(of, name, value)
                changed.append(of)
            if inside is not None and put_back(value, inside):
                changed.append(of)
        return changed


def put_back(container: Any, saved: Any) -> bool:
    """Puts back what was in a list, dictionary or set; returns whether it had anything else."""
    if len(container) == len(saved) and has_same(container, saved):
        return False
    container.clear()
    container.extend(saved) if isinstance(container, list) else container.update(saved)
    return True


def has_same(a: Any, b: Any) -> bool:
    """Whether two containers have the very same things in them."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[k] is b[k] for k in a)
    if isinstance(a, set):
        return {id(v) for v in a} == {id(v) for v in b}
    return all(v is w for v, w in zip(a, b, strict=True))
