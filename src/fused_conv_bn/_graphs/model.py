"""A model as it was when its graphs were captured."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from .. import conditions
from .calls import CONSTANTS

_data_ptr, _numel = Tensor.data_ptr, Tensor.numel
_values: Callable[[Any], Iterable[Any]] = dict.values
_training = operator.itemgetter("training")
_requires_grad, _backward_hooks = operator.attrgetter("requires_grad"), operator.attrgetter("_backward_hooks")


def is_recorded() -> bool:
    """Whether autograd records. Grad mode may be on in inference mode, where it does not."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


class Looked(list[Any]):
    """What is looked at where it is. Who has such a list has no claim on what is in it."""


class Watch:
    """A model's modules and tensors as they were. All of it is lists, so that a look at them is a few calls into C."""

    def __init__(self, model: nn.Module) -> None:
        _refuse_scripts(model)
        self.modules = list(model.modules())
        contents = [d for m in self.modules for d in (m._modules, m._parameters, m._buffers)]
        self.filled, self.empty = [d for d in contents if d], [d for d in contents if not d]
        self.hooks = [d for m in self.modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self.backward_hooks = [d for m in self.modules for d in (m._backward_hooks, m._backward_pre_hooks)]
        self.values = Looked(itertools.chain.from_iterable(map(_values, self.filled)))
        tensors = [v for v in self.values if isinstance(v, Tensor)]
        self.tensors = Looked(t for t in tensors if not is_lazy(t))
        self.lazy = len(self.tensors) < len(tensors)  # nothing to compare, until they have memory
        for t in self.tensors:
            if type(t) not in conditions.PLAIN_TENSORS:
                raise TypeError(
                    f"graphed: a parameter or buffer of the model is a {type(t).__name__}, expected plain tensors"
                )
        self.parameters = Looked(p for p in self.tensors if isinstance(p, nn.Parameter))
        own = [p for m in self.modules for p in m._parameters.values() if p is not None]
        self.exchanged = not all(isinstance(p, nn.Parameter) for p in own)  # by functional_call, say
        self.pointers, self.sizes = [*map(_data_ptr, self.tensors)], [*map(_numel, self.parameters)]
        self.attributes = [m.__dict__ for m in self.modules]
        self.types = [*map(type, self.modules)]
        self.states = [d for d in self.attributes if "training" in d]
        self.sends_gradients = any(isinstance(m, DistributedDataParallel) for m in self.modules)

    def kind(self) -> tuple[bool, ...]:
        """What graphs depend on and a loop of training and evaluation changes in turn: the modules' modes, and which
        parameters require gradients."""
        return (*map(_training, self.states), *map(_requires_grad, self.parameters))

    def has_hooks(self, needs_grad: bool) -> bool:
        """Whether somebody is to be called that a replay would not call, in backward as well."""
        if any(self.hooks):
            return True
        return needs_grad and (any(self.backward_hooks) or any(map(_backward_hooks, self.parameters)))

    def needs_grad(self, arguments: Iterable[Tensor]) -> bool:
        return is_recorded() and (any(map(_requires_grad, self.parameters)) or any(map(_requires_grad, arguments)))

    def holds(self) -> bool:
        """Whether each module has the same children, the same tensors in the same memory, and class."""
        return (
            not self.lazy
            and sum(map(len, self.filled)) == len(self.values)
            and all(map(operator.is_, itertools.chain.from_iterable(map(_values, self.filled)), self.values))
            and [*map(_data_ptr, self.tensors)] == self.pointers
            and [*map(_numel, self.parameters)] == self.sizes
            and not any(self.empty)
            and [*map(type, self.modules)] == self.types
        )


def _refuse_scripts(model: nn.Module) -> None:
    """Their parameters, modes and attributes are in C++, where no look finds a change. Frozen ones have none."""
    for name, m in model.named_modules():
        if not isinstance(m, torch.jit.ScriptModule):
            continue
        if hasattr(m, "training") or any((m._modules, m._parameters, m._buffers)):
            raise TypeError(
                f"graphed: {name!r} of the model is a {type(m).__name__}, expected an nn.Module that is no "
                "ScriptModule, or a frozen one (torch.jit.freeze)"
            )


class Leaves:
    """Parameters in the place of a model's, with the same memory, which no graph of autograd has yet.

    Autograd keeps a parameter's node for as long as some graph has it, and the stream that it was made on: a result
    that somebody holds does so, and DistributedDataParallel. A capture on another stream must not wait for that one.
    """

    def __init__(self, watch: Watch) -> None:
        self.others = others = {id(p): _other(p) for p in watch.parameters if p.requires_grad}
        self.owners: dict[int, Tensor] = {id(p): p for p in watch.parameters}
        self.owners |= {id(others[id(p)]): p for p in watch.parameters if id(p) in others}
        found = [(m._parameters, name, p) for m in watch.modules for name, p in m._parameters.items()]
        self.places = [(place, name, p, others[id(p)]) for place, name, p in found if id(p) in others]
        # These have lists of their own, which a look at the parameters would make anew.
        recurrent = [m.__dict__ for m in watch.modules if isinstance(m, nn.RNNBase)]
        self.places += [(d, name, d[name], made) for d in recurrent for name, made in self._lists(d)]

    def _lists(self, of: dict[str, Any]) -> Iterable[tuple[str, Any]]:
        weights = [*map(self.other, of["_flat_weights"])]
        yield "_flat_weights", weights
        yield "_flat_weight_refs", [None if w is None else weakref.ref(w) for w in weights]

    def other(self, v: Any) -> Any:
        return self.others.get(id(v), v)

    def owner(self, v: Any) -> Any:
        return self.owners.get(id(v), v)

    def others_of(self, those: Sequence[Tensor], once: bool) -> list[Tensor]:
        """Of parameters of float32 among these. ``once``: of those that are there once."""
        times = Counter(id(t) for t in those if t.dtype is torch.float32)
        return [self.others[i] for i, n in times.items() if i in self.others and not (once and n > 1)]

    def __enter__(self) -> None:
        for place, name, _, other in self.places:
            place[name] = other

    def __exit__(self, *_: object) -> None:
        for place, name, own, other in self.places:
            if place.get(name) is other:
                place[name] = own


def _other(p: nn.Parameter) -> nn.Parameter:
    other = nn.Parameter(p.detach())
    other.__dict__.update(p.__dict__)
    return other


class Attributes:
    """All attributes of a model's modules, before a call that is to change none of them."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.before = [dict(d) for d in watch.attributes]

    def restore(self) -> str | None:
        """Takes changes back. Returns what they were, as a sentence's subject, predicate and object."""
        changed = None
        for m, now, before in zip(self.watch.modules, self.watch.attributes, self.before, strict=True):
            names = [k for k in {**before, **now} if not _is_same(now.get(k, self), before.get(k, self))]
            for k in names:
                now.pop(k, None)
                if k in before:
                    now[k] = before[k]
            if names:
                changed = changed or f"{type(m).__name__} sets its attribute {names[0]!r}"
        return changed


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and type(a) in CONSTANTS and a == b)
