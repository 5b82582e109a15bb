"""What a module's forward computes, as a torch.fx graph of the convolutions, BatchNorms and ops in it.

Whole models cannot be traced, most of their modules can. So a trace begins at a module that is called, its *root*, goes
into everything that torch.fx can follow, and leaves the rest as calls of modules (*leaves*). What breaks a trace
becomes a leaf, and the trace is tried again; where the root's own forward breaks it, its children are roots.

A trace is of one kind of call: arguments that are no tensors are taken as they came, and so are the modes of the
modules that it went through. Where torch.fx would record something else than what happens, it is stopped: a tensor
that is asked for its class, an autocast or a grad mode of the forward's own, an attribute that a forward changes.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import functools
import inspect
import operator
import random
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from .. import conditions
from .._block import BnScaleModule
from ..conditions import has_hooks, is_distributed, is_watched
from .classes import ClassAttributes, has_same, put_back
from .layers import is_conv, is_norm
from .words import IN_PLACE_OPERATORS

MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)
"""Those that every module has."""

_is_grad_enabled = torch.is_grad_enabled
_is_inference_mode_enabled = torch.is_inference_mode_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled

CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)
"""Arguments that a trace takes as they are."""


def modes() -> tuple[Any, ...]:
    """PyTorch's, which a forward may ask for, and so may what it calls."""
    found = _is_grad_enabled(), _is_inference_mode_enabled()
    if not _is_any_autocast_enabled():
        return found
    kinds = "cpu", "cuda"
    return *found, *(torch.is_autocast_enabled(k) and torch.get_autocast_dtype(k) for k in kinds)


@functools.cache
def has_fixed_defaults(forward: Any) -> bool:
    """Whether calls with the same arguments are of one kind: no default is a tensor, or can change in place."""
    defaults = [p.default for p in inspect.signature(forward).parameters.values()]
    return all(d is inspect.Parameter.empty or type(d) in CONSTANTS for d in defaults)


class Refused(Exception):
    """Why a forward cannot be captured, in one sentence."""


class Arguments:
    """A call's arguments: their tensors, also those in lists, tuples and dictionaries, and what is baked into a trace.

    ``tensors``: by names that a graph may have. ``key``: equal for calls that one trace is of. TypeError if they do not
    fit the signature, or a tensor is of another class.
    """

    def __init__(self, signature: inspect.Signature, root: nn.Module, args: Any, kwargs: Any) -> None:
        self.bound = signature.bind(root, *args, **kwargs)
        self.bound.apply_defaults()
        self.tensors: dict[str, Tensor] = {}
        self.same: list[int] = []  # of each tensor, which one is the first that is it
        named = list(self.bound.arguments.items())[1:]
        self.key: Any = tuple((name, self._kind(name, value, name)) for name, value in named)

    def _kind(self, argument: str, value: Any, name: str) -> Any:
        of = type(value)
        if of is Tensor or of is nn.Parameter or (conditions.exports_ops() and isinstance(value, Tensor)):
            if value.is_meta:
                raise TypeError(f"argument {argument} has no values")
            same = next((i for i, t in enumerate(self.tensors.values()) if t is value), len(self.tensors))
            self.same.append(same)
            self.tensors[name] = value
            return same, value.dtype, value.device
        if of in CONSTANTS:
            return of, repr(value) if of is float else value  # -0.0 is another one than 0.0, and NaN the same as NaN
        if of is list or of is tuple:
            return of, tuple(self._kind(argument, v, f"{argument}_{len(self.tensors)}_") for v in value)
        if of in (dict, OrderedDict) and all(type(k) in (str, int) for k in value):
            return of, tuple((k, self._kind(argument, v, f"{argument}_{len(self.tensors)}_")) for k, v in value.items())
        if isinstance(value, (Tensor, fx.Proxy)):
            raise TypeError(f"argument {argument} is a tensor of another class")  # of this call, and not of the root
        verb = "is" if name == argument else "has"
        raise Refused(f"its argument {argument} {verb} a {of.__name__}")

    def call_key(self, root: nn.Module) -> Any:
        """Equal for calls that one capture of the root is of."""
        return self.key, root.training, modes()

    def copies(self) -> list[Tensor]:
        """Of the tensors. What is one is one there, too."""
        found: list[Tensor] = []
        for i, t in zip(self.same, self.tensors.values(), strict=True):
            found.append(found[i] if i < len(found) else t.detach().clone())
        return found

    def call(self, function: Callable[..., Any], root: nn.Module, tensors: Sequence[Any]) -> Any:
        """Calls it with other tensors in the places of these. Refused if it changes what they are in."""
        waiting = iter([tensors[i] for i in self.same])
        named = {name: _rebuilt(value, waiting) for name, value in list(self.bound.arguments.items())[1:]}
        before = _flat(named)
        first = next(iter(self.bound.arguments))
        bound = inspect.BoundArguments(self.bound.signature, OrderedDict({first: root, **named}))
        result = function(*bound.args, **bound.kwargs)
        if _flat(named) != before:
            raise Refused("it changes a list or dictionary that it is given")
        return result


def _rebuilt(value: Any, tensors: Iterator[Any]) -> Any:
    """An argument with other tensors in it."""
    of = type(value)
    if of is Tensor or of is nn.Parameter:
        return next(tensors)
    if of is list or of is tuple:
        return of([_rebuilt(v, tensors) for v in value])
    if of is dict or of is OrderedDict:
        return of([(k, _rebuilt(v, tensors)) for k, v in value.items()])
    return value


def _flat(value: Any) -> list[Any]:
    """What is where in an argument."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if type(value) in (list, tuple) else ()
    return [id(value), *(x for k, v in items for x in (k, *_flat(v)))]


# What returns a tensor if its first argument is one. (Of a shape the same make numbers.)
_OF_TENSORS = frozenset(
    {operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, operator.truediv, operator.neg}
)
_TENSOR_FUNCTIONS = frozenset({"relu", "max_pool2d", "adaptive_avg_pool2d"})
_TENSOR_METHODS = frozenset(
    {"view", "reshape", "flatten", "permute", "transpose", "contiguous", "mean", "clone", "float"}
)


def _is_tensor(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node's value is a tensor for sure."""
    if node.op == "placeholder":
        return True
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        several = nn.RNNBase, nn.MultiheadAttention, nn.AdaptiveMaxPool2d, nn.MaxPool2d
        return type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, several)
    name = getattr(node.target, "__name__", node.target)
    if node.op == "call_function" and name in ("cat", "stack"):
        return True
    known = (node.op == "call_method" and name in _TENSOR_METHODS) or (
        node.op == "call_function" and (node.target in _OF_TENSORS or name in _TENSOR_FUNCTIONS)
    )
    return known and any(_is_tensor(n, root) for n in node.all_input_nodes[:1])


def is_compared(root: nn.Module) -> bool:
    """Whether a first call is: not in training, nor where others would see that the forward runs again."""
    return not (root.training or is_distributed() or any(map(has_hooks, root.modules())))


class _Proxy(fx.Proxy):
    """Refuses what Python asks of a value in silence, and of a proxy would get an answer that is none."""

    def __getattr__(self, name: str) -> Any:
        tracer: Any = self.tracer
        if self.node.op == "placeholder" and name in ("dtype", "device", "is_cuda", "is_cpu"):
            return getattr(tracer.arguments.tensors[self.node.target], name)
        if not hasattr(Tensor, name) and not name.startswith("__") and _is_tensor(self.node, tracer.root):
            raise AttributeError(f"'Tensor' object has no attribute '{name}'")
        return super().__getattr__(name)

    def __hash__(self) -> int:
        raise Refused("it looks a value up")


def _written(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.fx has no method for what writes to its left operand, and Python would take the one that does not."""

    def method(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_name}__", _written(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # buffers are read when the graph runs, as parameters are

    def __init__(self, leaves: set[nn.Module], arguments: Arguments, forward: Callable[..., Any]) -> None:
        self.thread = threading.get_ident()
        super().__init__()
        self.leaves, self.arguments, self.forward_of_root = leaves, arguments, forward
        self.inlined: list[nn.Module] = []
        self.fetched: list[nn.Module] = []  # as attributes
        self.culprit: nn.Module | None = None
        self.modes = self._modes()
        self.registered: frozenset[nn.Module] = frozenset()
        self.before: _Attributes | None = None

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        self.registered = frozenset(root.modules())
        return super().trace(root, concrete_args)

    @staticmethod
    def _modes() -> tuple[Any, ...]:
        enabled = torch.is_autocast_enabled
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # checkpoints and offloading have them
        return torch.is_grad_enabled(), enabled("cpu"), enabled("cuda"), hooks

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) is not dict:
            if type(a) is not OrderedDict:
                raise Refused(f"it makes a {type(a).__name__}")
            return self.create_proxy("call_function", OrderedDict, ([(k, v) for k, v in a.items()],), {}).node
        if isinstance(a, (list, tuple)) and type(a) not in (list, tuple, torch.Size) and not hasattr(a, "_fields"):
            raise Refused(f"it makes a {type(a).__name__}")
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self.leaves or is_watched(m) or is_conv(m) or is_norm(m) or isinstance(m, BnScaleModule):
            return True
        if conditions.compiled_by(m) is not None:  # a trace would have tensors of TorchScript's in it
            return True
        return bool(super().is_leaf_module(m, module_qualified_name))

    # While it traces, torch.fx has methods of its own on nn.Module, for all threads. Others are let through. They may
    # still be in them when the trace is over, and this has no attributes any more.

    def _is_of_other_thread(self) -> bool:
        return threading.get_ident() != self.__dict__.get("thread")

    @property
    def _autowrap_function_ids(self) -> set[int]:
        """Functions that torch.fx replaces in the globals of what is called: not of what other threads call."""
        return set() if self._is_of_other_thread() else self.__dict__["function_ids"]

    @_autowrap_function_ids.setter
    def _autowrap_function_ids(self, ids: set[int]) -> None:
        self.__dict__["function_ids"] = ids

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._is_of_other_thread():
            return attr_val
        if isinstance(attr_val, nn.Module):
            self.fetched.append(attr_val)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._is_of_other_thread():
            return forward(*args, **kwargs)
        if m not in self.registered:
            # A slice of an nn.Sequential is another one, of the same modules.
            if type(m) is nn.Sequential and self.registered.issuperset(m.children()) and not is_watched(m):
                return forward(*args, **kwargs)
            raise Refused("it calls a module that is not registered")
        if self.before is not None and self.before.has_changed(m):  # eps or stride, say, or the mode
            raise Refused("it changes attributes of what it calls")
        try:
            if not self.is_leaf_module(m, self.path_of_module(m)):
                self.inlined.append(m)
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.culprit = self.culprit or m
            raise

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self._modes() != self.modes:
            raise Refused("it changes grad mode, autocast or what autograd saves")
        return super().create_node(*args, **kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.arguments.tensors]

        def call(*values: Any) -> Any:
            return self.arguments.call(self.forward_of_root, self.root, values)

        return call, proxies


@contextlib.contextmanager
def _classes_are_asked(tracer: _Tracer) -> Iterator[None]:
    """isinstance() of a traced value: what is known, or the trace ends."""
    real = builtins.isinstance

    def asked(value: Any, classes: Any) -> bool:
        # PyTorch's own questions are torch.fx's business.
        if not (type(value) is _Proxy and value.tracer is tracer):
            return real(value, classes)
        if sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.", __name__)):
            return real(value, classes)
        wanted = classes if type(classes) is tuple else (classes,)
        # In evaluation mode a first call finds an answer that is wrong.
        if Tensor in wanted or not is_compared(tracer.root):
            if _is_tensor(value.node, tracer.root):
                return issubclass(Tensor, classes)
            raise Refused("it asks what class a value is")
        return real(value, classes)

    builtins.isinstance = asked
    try:
        yield
    finally:
        builtins.isinstance = real


class Captured:
    """A root's graph, the modules that the trace went through, those that it left as leaves for want of better, and
    those that it fetched as attributes, with what is in them if they are containers."""

    def __init__(
        self, graph: fx.Graph, inlined: list[nn.Module], leaves: dict[nn.Module, str], fetched: list[nn.Module]
    ) -> None:
        self.graph, self.inlined, self.leaves = graph, inlined, leaves
        containers = nn.ModuleList, nn.ModuleDict
        self.fetched = set(fetched)
        for m in fetched:
            if isinstance(m, containers):
                self.fetched |= set(m.modules())


def capture(root: nn.Module, forward: Callable[..., Any], arguments: Arguments) -> Captured:
    """Traces ``forward(root, ...)``. Raises :class:`Refused` where the root's own forward cannot be."""
    leaves: dict[nn.Module, str] = {}
    while True:
        tracer = _Tracer(set(leaves), arguments, forward)
        before = tracer.before = _Attributes(root)
        try:
            with _classes_are_asked(tracer), torch.no_grad() if not tracer.modes[0] else contextlib.nullcontext():
                graph = tracer.trace(root)
        except Exception as error:
            reason = str(error) if type(error) is Refused else f"torch.fx cannot follow it: {error}".split("\n")[0]
            culprit = tracer.culprit
            if culprit not in tracer.registered - {root, *leaves}:
                raise Refused(reason) from None
            # All of the class: whatever broke one of them breaks the others.
            leaves |= {m: reason for m in root.modules() if type(m) is type(culprit) and m is not root}
            continue
        finally:
            inlined, fetched = [root, *tracer.inlined], tracer.fetched
            changed = before.restore(inlined)
            tracer.__dict__.clear()  # torch.fx leaves it in cycles, and it has the root
        if before.draws:
            raise Refused("it draws random numbers that are no tensors of its graph")
        if root in changed:
            raise Refused("it changes its own attributes, or makes tensors of its own")
        if not set(changed) <= {*inlined, *leaves}:
            raise Refused("it changes attributes of what it calls")
        if not is_compared(root) and any(map(_asks_for_types, inlined)):
            raise Refused("it asks what class a value is")
        if broken := [m for m in changed if m in inlined and m not in leaves]:
            leaves |= dict.fromkeys(broken, "it changes its own attributes")
            continue
        return Captured(graph, inlined, leaves, fetched)


def _asks_for_types(m: nn.Module) -> bool:
    """Whether its forward, or a function that this calls by name, calls ``type``."""
    if type(m).__module__.startswith("torch."):
        return False
    waiting = [getattr(type(m), "forward", None), *m.__dict__.values()]
    seen: set[Any] = set()
    while waiting and len(seen) < 200:
        function = inspect.unwrap(f) if callable(f := waiting.pop()) else f
        code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
        if code is None or code in seen or names.get("__name__", "").startswith("torch."):
            continue
        seen.add(code)
        if "type" in code.co_names:
            return True
        waiting += [names[name] for name in code.co_names if name in names]
    return False


_Owner: TypeAlias = "nn.Module | type"
"""Of what may have changed."""


class _Attributes:
    """What modules have before a trace: their attributes and those of their classes that forwards mention, what is in
    those that are containers, plain tensors' values, and the states of the generators."""

    def __init__(self, root: nn.Module) -> None:
        self.of = {m: dict(m.__dict__) for m in root.modules()}
        self.containers: dict[_Owner, list[tuple[Any, Any]]] = {}
        self.tensors: dict[_Owner, list[tuple[Tensor, int, Tensor]]] = {}
        for m, attributes in self.of.items():
            own = m._parameters, m._buffers, m._modules
            self.containers[m] = [(d, copy.copy(d)) for d in own if isinstance(d, dict)]  # TorchScript's are not
            for name, value in attributes.items():
                if name not in MODULE_ATTRIBUTES:
                    self._look(m, value)
        self.classes = ClassAttributes(root)
        for of, value in self.classes.values():
            if issubclass(type(value), Tensor):
                self._look(of, value)
        self.generators = self._generators()
        self.draws = False

    def _look(self, m: _Owner, value: Any, depth: int = 0) -> None:
        if isinstance(value, Tensor):
            self.tensors.setdefault(m, []).append((value, value._version, value.detach().clone()))
        elif isinstance(value, (list, dict, set)) and depth < 4:
            self.containers.setdefault(m, []).append((value, copy.copy(value)))
            for v in value.values() if isinstance(value, dict) else value:
                self._look(m, v, depth + 1)
        elif type(value).__dictoffset__ and not callable(value) and not isinstance(value, types.ModuleType):
            self._look(m, object.__getattribute__(value, "__dict__"), depth + 1)  # without its class' __getattr__

    @staticmethod
    def _generators() -> list[Any]:
        states: list[Any] = [torch.get_rng_state(), random.getstate()]
        if (numpy := sys.modules.get("numpy")) is not None:
            states.append(numpy.random.get_state())
        return states

    def has_changed(self, m: nn.Module) -> bool:
        """Whether a module has other attributes than before, or others in its place."""
        attributes = self.of.get(m)
        return attributes is not None and not has_same(m.__dict__, attributes)

    def restore(self, inlined: list[nn.Module]) -> list[nn.Module]:
        """Takes back what a trace did, once; returns the modules that it did it to. ``inlined``: those that it went
        through, of which the first is the root: where a class has changed, whose it may be."""
        changed: list[_Owner] = [*self.classes.restore()]
        for m, attributes in self.of.items():
            if self.has_changed(m):
                m.__dict__.clear()
                m.__dict__.update(attributes)
                changed.append(m)
        for owner, containers in self.containers.items():
            for container, saved in containers:
                if put_back(container, saved):
                    changed.append(owner)
        for owner, tensors in self.tensors.items():
            for t, version, saved in tensors:
                if t._version != version:
                    with torch.no_grad():
                        t.copy_(saved)
                    changed.append(owner)
        after = self._generators()
        torch.set_rng_state(self.generators[0])
        random.setstate(self.generators[1])
        self.draws = not torch.equal(self.generators[0], after[0]) or self.generators[1] != after[1]
        if len(self.generators) > 2:
            sys.modules["numpy"].random.set_state(self.generators[2])
            self.draws |= str(self.generators[2]) != str(after[2])
        for kept in (self.of, self.containers, self.tensors):  # an exception may have this, and nobody else the tensors
            kept.clear()
        found = [m for m in changed if isinstance(m, nn.Module)]
        for of in {owner for owner in changed if isinstance(owner, type)}:
            # The root where no part is left that may have done it.
            found += [m for m in inlined[1:] if of in type(m).__mro__] or inlined[:1]
        return list(dict.fromkeys(found))
