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
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import conditions
from ..conditions import has_hooks
from ..modules import ConvBnScale2d
from .blocks import block_of
from .capture import Arguments, Refused, capture
from .patterns import Matcher, norm_act_parts

STATE = "_fused_conv_bn"
_lock = threading.RLock()
_is_compiling = torch.compiler.is_compiling
_signature = functools.lru_cache(maxsize=None)(inspect.signature)
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def _call_block(entry: Entry | _Compared, index: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
    return entry.blocks[index].forward(x, residual)


class Entry:
    """One kind of call of a root: what runs, and what has to be as it was."""

    def __init__(self, root: nn.Module, forward: Callable[..., Any], arguments: Arguments) -> None:
        captured = capture(root, forward, arguments)
        graph = captured.graph
        modules = dict(root.named_modules(remove_duplicate=False))
        paths: dict[nn.Module, str] = {}
        for path, m in modules.items():
            paths.setdefault(m, path)
        called = [str(n.target) for n in graph.nodes if n.op == "call_module"]
        free = {path for path in called if not has_hooks(modules[path])}
        matcher = Matcher(graph, modules, free)
        self.groups = matcher.groups()
        self.why = matcher.why
        self.leaves = {paths[m]: reason for m, reason in captured.leaves.items()}
        self.called = set(called)
        self.blocks = [block_of(g, modules) for g in self.groups]
        # Modules whose calls are gone, so that nobody sees hooks of theirs.
        silent = {*captured.inlined[1:], *(modules[p] for g in self.groups for p in g.swallowed)}
        for g in self.groups:
            if parts := norm_act_parts(modules[g.bn]):
                silent |= {modules[g.bn], *parts}
        self.silent = [(m, type(m)) for m in silent]
        watched = {*captured.inlined, *silent, *(modules[g.bn] for g in self.groups)}
        self.modes = [(m, m.training) for m in watched]
        self.bindings = []
        for path in {*called, *(paths[m] for m in captured.inlined[1:])}:
            parent, _, name = path.rpartition(".")
            self.bindings.append((modules[parent]._modules, name, modules[path]))
        self.run = self._compile(graph)
        # Whether the next call is compared: not in training, nor where others would see that the forward runs again.
        self.unchecked = not (root.training or conditions.is_distributed() or any(map(has_hooks, root.modules())))

    def _compile(self, graph: fx.Graph) -> Callable[..., Any]:
        # Placeholders of the graph are the tensors; the root and the entry come before them.
        with graph.inserting_before(next(iter(graph.nodes))):
            entry = graph.placeholder("fused_entry")
        for index, group in enumerate(self.groups):
            last = group.nodes[-1]
            with graph.inserting_before(last):
                arguments = (entry, index, group.input, *(() if group.residual is None else (group.residual,)))
                fused = graph.call_function(_call_block, arguments)
            last.replace_all_uses_with(fused)
            for node in reversed(group.nodes):
                graph.erase_node(node)
            for other in self.groups:  # those whose input or residual this one was
                if other.input is last:
                    other.input = fused
                if other.residual is last:
                    other.residual = fused
        code = graph.python_code("self")
        scope = dict(code.globals)
        exec(compile(code.src, "<fused_conv_bn.fuse>", "exec"), scope)
        run: Callable[..., Any] = scope["forward"]
        return run

    def holds(self) -> bool:
        """Whether all is as it was when this was captured."""
        for modules, name, m in self.bindings:
            if modules.get(name) is not m:
                return False
        for m, training in self.modes:
            if m.training is not training:
                return False
        for m, of in self.silent:
            if type(m) is not of or has_hooks(m) or "forward" in m.__dict__:
                return False
        return True


class State:
    """What a root has in its ``__dict__``: where it came from, and what was captured of it."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.entries: dict[Any, list[Entry]] = {}
        self.reason: str | None = None  # why it is not captured
        self.refused: dict[Any, str] = {}


def _leave_alone(values: Any) -> bool:
    """Whether the class' own forward is to run, whatever was captured."""
    if _is_compiling() or conditions.transformed() or torch._C._get_tracing_state() is not None:
        return True
    if conditions.hooks_for_all():
        return True
    return any(isinstance(v, fx.Proxy) for v in values)


def run_root(root: nn.Module, of: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state: State = root.__dict__[STATE]
    own = of.forward
    if state.reason is not None or state.owner is not root or _leave_alone((*args, *kwargs.values())):
        return own(root, *args, **kwargs)
    try:
        arguments = Arguments(_signature(own), root, args, kwargs)
    except TypeError:
        return own(root, *args, **kwargs)  # which says so
    except Refused as refused:
        return _refuse(root, state, str(refused), own, args, kwargs)
    key = arguments.key, root.training
    if key in state.refused:
        return own(root, *args, **kwargs)
    entry = next((e for e in state.entries.get(key, ()) if e.holds()), None)
    if entry is None:
        try:
            with _lock:
                entry = next((e for e in state.entries.get(key, ()) if e.holds()), None)
                if entry is None:
                    entry = Entry(root, own, arguments)
                    state.entries.setdefault(key, []).insert(0, entry)
                    del state.entries[key][4:]
                    for path in entry.leaves:
                        swap_children(root.get_submodule(path))
        except Refused as refused:
            return _refuse(root, state, str(refused), own, args, kwargs)
    if not entry.groups:
        return own(root, *args, **kwargs)
    if entry.unchecked:
        return _checked(root, state, key, entry, own, arguments, args, kwargs)
    return entry.run(root, entry, *arguments.tensors.values())


def _refuse(root: nn.Module, state: State, reason: str, own: Any, args: Any, kwargs: Any) -> Any:
    """Where the root's own forward is the trouble, its children are roots."""
    with _lock:
        state.reason = reason
        swap_children(root)
    return own(root, *args, **kwargs)


class _Compared:
    """In an entry's place, for one call: its groups by PyTorch's ops, and each compared with the fused op.

    What the graph makes of these is what the forward makes, bit by bit, unless the graph is wrong. So a wrong graph and
    a wrong group show, however much a model makes of roundings.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.problem: str | None = None
        self.blocks = [_ComparedBlock(self, i) for i in range(len(entry.blocks))]


class _ComparedBlock:
    def __init__(self, of: _Compared, index: int) -> None:
        self.of, self.index = of, index

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        block = self.of.entry.blocks[self.index]
        expected = block._forward_plain(x, residual)
        difference = _difference(block.forward(x, residual), expected)
        if difference is not None and self.of.problem is None:
            self.of.problem = f"the op for {self.of.entry.groups[self.index].bn} gave {difference}"
        return expected


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Calls of a model that leave its buffers and the random state as they were, under ``no_grad``."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            yield
        finally:
            for b, before in buffers:
                if not torch.equal(b, before):  # what was only read may be saved for a backward
                    b.copy_(before)


def _checked(
    root: nn.Module, state: State, key: Any, entry: Entry, own: Any, arguments: Arguments, args: Any, kwargs: Any
) -> Any:
    """The first evaluation call: both ways, compared. A mismatch drops the capture."""

    def copies() -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in arguments.tensors.items()}

    compared = _Compared(entry)
    with undisturbed(root):
        expected = own(root, **copies(), **arguments.constants)
    try:
        with undisturbed(root):
            difference = _difference(entry.run(root, compared, *copies().values()), expected)
    except Exception as error:
        difference = f"{type(error).__name__}: {error}"
    problem = compared.problem
    if problem is None and difference is not None:
        problem = f"its graph gave another result than its forward: {difference}"
    if problem is None:
        entry.unchecked = False
        return entry.run(root, entry, *arguments.tensors.values())
    state.refused[key] = problem
    state.entries.pop(key, None)
    return own(root, *args, **kwargs)


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _difference(got: Any, expected: Any) -> str | None:
    mine, theirs = _tensors(got), _tensors(expected)
    if len(mine) != len(theirs):
        return f"{len(mine)} tensors for {len(theirs)}"
    for a, b in zip(mine, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{list(a.shape)} {a.dtype} for {list(b.shape)} {b.dtype}"
        if not a.dtype.is_floating_point:
            if not torch.equal(a, b):
                return "other integers"
            continue
        tolerance = _TOLERANCES.get(a.dtype, 1e-4)
        a, b = a.detach().double(), b.detach().double()
        finite = torch.isfinite(b)
        if not torch.equal(torch.isfinite(a), finite):
            return "other values that are Inf or NaN"
        if finite.any():
            error = float((a - b)[finite].abs().max() / b[finite].abs().max().clamp(min=1e-30))
            if error > tolerance:
                return f"a relative error of {error:.1e}"
    return None


# ---- classes ---------------------------------------------------------------------------------------------------------

_classes: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(of: type[nn.Module]) -> type[nn.Module]:
    if of not in _classes:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return run_root(self, of, args, kwargs)

        def reduce(self: nn.Module, protocol: Any) -> Any:
            # Pickles are those of the class itself, without what was captured. (The way that does not look at the class
            # of what is pickled.)
            state = {k: v for k, v in self.__dict__.items() if k != STATE}
            return copyreg._reconstructor, (of, object, None), state  # type: ignore[attr-defined]

        def deepcopy(self: nn.Module, memo: dict[int, Any]) -> Any:
            twin = of.__new__(of)
            memo[id(self)] = twin
            for k, v in self.__dict__.items():
                if k != STATE:
                    twin.__dict__[k] = copy.deepcopy(v, memo)
            swap(twin)
            return twin

        own = {
            "forward": forward,
            "__reduce_ex__": reduce,
            "__module__": of.__module__,
            "__qualname__": of.__qualname__,
        }
        if "__deepcopy__" not in dir(of):
            own["__deepcopy__"] = deepcopy
        own["_fused_conv_bn_class"] = of
        _classes[of] = type(of.__name__, (of,), own)
    return _classes[of]


def is_root(m: nn.Module) -> bool:
    return STATE in m.__dict__


def swap(m: nn.Module) -> None:
    """Makes a module a root. Nothing is captured before it is called."""
    with _lock:
        _swap(m)


def _swap(m: nn.Module) -> None:
    if (graphs := m.__dict__.get("_graphs")) is not None:  # fcb.graphed's module: the one in it
        m = graphs.model
    if is_root(m) or "forward" in m.__dict__ or isinstance(m, (ConvBnScale2d, torch.jit.ScriptModule)):
        return
    if not any(True for _ in m.children()) or type(m).forward is nn.Module.forward:
        return
    m.__dict__[STATE] = State(m)
    m.__class__ = fused_class(type(m))


def swap_children(m: nn.Module) -> None:
    """Those that are called: containers that are not (nn.ModuleList) have children of their own."""
    for child in m.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            swap_children(child)
        else:
            swap(child)
            # A container that its parent only iterates over is never called, and its children are.
            if isinstance(child, nn.Sequential):
                swap_children(child)


def restore(m: nn.Module) -> None:
    if is_root(m):
        m.__class__ = type(m)._fused_conv_bn_class  # type: ignore[attr-defined]
        del m.__dict__[STATE]
