"""CUDA graphs of a model's calls: ``graphed`` records a call once for each kind of it, and replays it after that, with
its backward where gradients are needed.

A replay runs kernels at addresses, and no Python. So whatever the addresses stand for has to stay where it was, and
whatever Python would do at each call has to be nothing. What is keyed, refused, kept and forgotten is decided here
without a word of CUDA, which is :class:`Cuda`'s. Tests put a stand-in in its place.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import operator
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import conditions
from ._fuse.undisturbed import undisturbed
from ._graphs.calls import NOT_STRIDED, Call, call_key, is_backward_watched, is_watched
from ._graphs.cuda import Cuda
from ._graphs.kinds import Kinds
from ._graphs.model import Attributes, Leaves, Watch, is_recorded
from ._graphs.recording import Explained, Recording, Results, copies, share_memory
from ._graphs.with_backward import WithBackward, differentiate, in_this_thread, leaves_of, refuse_others
from ._memory import ran_out
from ._together import asking, together

_is_compiling = torch.compiler.is_compiling
_numel = Tensor.numel
_requires_grad = operator.attrgetter("requires_grad")
_WARM_UPS = 3


class _InUse(threading.local):
    """Whether this thread is in a warm-up or a capture: graphed models in the model run plainly there."""

    value = False


_in_use = _InUse()


class Graphs:
    """The graphs of a model."""

    def __init__(self, model: nn.Module, max_graphs: int, clone_outputs: bool, side: Any = Cuda) -> None:
        self.model, self.clone_outputs = model, clone_outputs
        self.kind, self.new_side, self.is_capturing = side.kind, side, side.is_capturing
        self.sides: dict[torch.device, Any] = {}
        self.kinds = Kinds(max_graphs)
        self.plain = 0
        """Calls of the model itself under way that are to have gradients: a recording exchanges its parameters."""
        self.watch: Watch | None = None
        self.lock = threading.Lock()
        self.warned = False

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model = self.model
        if _is_compiling() or _in_use.value or is_watched():
            return model(*args, **kwargs)
        call = Call(args, kwargs)
        device = self._device(call.tensors)
        if device is None:
            return model(*args, **kwargs)
        if self.is_capturing():
            raise RuntimeError(
                "graphed: the current stream is being captured already, expected none: capture its .module instead"
            )
        with self.lock:
            watch = self.watch
            if watch is None or not watch.holds():
                watch = self._look_again()
            needs_grad = watch.needs_grad(call.tensors)
            if watch.has_hooks(needs_grad):
                self._warn_of_hooks(watch)
            elif not ((watch.exchanged and is_recorded()) or (needs_grad and is_backward_watched())):
                needs = (*map(_requires_grad, call.tensors),) if needs_grad else ()
                key = call_key(call), watch.kind(), needs
                recording = self._recording_for(key, call, device, needs_grad)
                if recording is not None:
                    return recording.replay(call.tensors, self.clone_outputs)
            self.plain += needs_grad
        try:
            return model(*args, **kwargs)
        finally:
            if needs_grad:
                with self.lock:
                    self.plain -= 1

    def _recording_for(self, key: Hashable, call: Call, device: torch.device, needs_grad: bool) -> Recording | None:
        """None where the call is the model's own."""
        kind = self.kinds.find(key)
        if kind is None:
            may = any(map(_numel, call.tensors)) and not self.plain
            return self._record(key, call, device, needs_grad) if may else None
        if kind.recordings[0].written and share_memory(call.tensors):
            return None
        recording = kind.free()
        if recording is not None or not kind.needs_another() or self.plain or not self.kinds.has_room():
            return recording
        try:
            return self._record(key, call, device, needs_grad)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            kind.most = len(kind.recordings)
        return None  # behind the error, which keeps memory: the call itself may have enough

    def _warn_of_hooks(self, watch: Watch) -> None:
        if self.warned or watch.lazy:  # lazy modules have hooks until they have parameters
            return
        self.warned = True
        warnings.warn(
            "graphed: a module of the model has a forward hook, or one for gradients, which a replay would not call; "
            "the model runs without graphs",
            stacklevel=4,
        )

    def _device(self, tensors: Sequence[Tensor]) -> torch.device | None:
        """The tensors' device, where graphs are for it. None where the call is the model's own."""
        if not tensors:
            return None
        if len(tensors) == 1 and type(tensors[0]) is Tensor:
            device: torch.device = tensors[0].device
            return device if device.type == self.kind else None
        devices = {t.device for t in tensors}
        if all(d.type != self.kind for d in devices) or not {*map(type, tensors)} <= conditions.PLAIN_TENSORS:
            return None
        if len(devices) > 1:
            raise ValueError(
                f"graphed: the arguments have tensors on {' and '.join(sorted(map(str, devices)))}, expected one device"
            )
        return devices.pop()

    def _look_again(self) -> Watch:
        """The model is not what the graphs were captured of."""
        self._forget()
        self.watch = Watch(self.model)
        return self.watch

    def _forget(self) -> None:
        self._free(self.kinds.pop_all())

    def _make_room(self) -> None:
        while not self.kinds.has_room():
            self._free([self.kinds.pop_one()])

    def _free(self, recordings: list[Recording]) -> None:
        """Of recordings that nobody finds any more. One whose backward is still to come is freed behind that."""
        for side in {r.side for r in recordings}:
            those = [r for r in recordings if r.side is side]
            if any(r.is_waiting() for r in those):
                for r in those:
                    r.dropped = True
            else:
                self._give_up(side, [graph for r in those for graph in r.graphs])

    def clear(self) -> None:
        with self.lock:
            self._forget()
            self.watch = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # when Python ends there may be no device to wait for
            self._forget()

    def _record(self, key: Hashable, call: Call, device: torch.device, needs_grad: bool) -> Recording:
        if any(t.layout is not torch.strided or t.is_quantized for t in call.tensors):
            raise TypeError(NOT_STRIDED)
        assert self.watch is not None
        if needs_grad and self.watch.sends_gradients:  # by what its forward prepares, which a replay would not
            raise TypeError(
                "graphed: the model has a DistributedDataParallel in it, expected it around the graphs: "
                "DistributedDataParallel(fcb.graphed(model))"
            )
        if device not in self.sides:
            self.sides[device] = self.new_side(device)
        side = self.new_side(device) if needs_grad else self.sides[device]
        _in_use.value = True
        try:
            watch, asked = self._warm_up(call, side, needs_grad)
            self._make_room()
            recording = self._capture(call, side, device, watch, needs_grad, asked)
        finally:
            _in_use.value = False
        self.kinds.add(key, recording)
        return recording

    def _warm_up(self, call: Call, side: Any, needs_grad: bool) -> tuple[Watch, list[Tensor]]:
        """Calls that leave no trace: whatever libraries and fused modules do at a first call happens here. Returns the
        weights, too, that layers asked for a cast of."""
        grad, watch = is_recorded(), self.watch
        assert watch is not None
        name = type(self.model).__name__
        with side.aside(), undisturbed(self.model), _as_called(grad):
            for left in reversed(range(_WARM_UPS)):
                if not left and not watch.holds():  # fused modules have found more of them, lazy ones their parameters
                    watch = self._look_again()
                given = copies(call.tensors, needs_grad)
                args, kwargs = call.with_tensors(given)
                with asking() as asked, _told_of_writes(name, call.tensors):
                    result = self.model(*args, **kwargs)
                if needs_grad:
                    found = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.grad_fn is not None]
                    leaves = {id(leaf): leaf for t in found for leaf in leaves_of(t)}
                    refuse_others(name, leaves, {*map(id, self.model.parameters()), *map(id, given)})
                    with Explained(f"backward of {name}"):
                        grads = differentiate(found, [*leaves.values()], [torch.ones_like(t) for t in found])
                    if any(g is not None and g.layout is not torch.strided for g in grads):
                        raise TypeError(f"graphed: {name} has a gradient that is sparse, expected strided ones")
        if not watch.holds():
            self._forget()
            raise RuntimeError(
                f"graphed: the forward of {name} replaces modules, parameters or buffers at each "
                "call, which a replay does not"
            )
        return watch, asked

    def _capture(
        self, call: Call, side: Any, device: torch.device, watch: Watch, needs_grad: bool, asked: list[Tensor]
    ) -> Recording:
        for name, t in itertools.chain(self.model.named_parameters(), self.model.named_buffers()):
            if t.device != device:
                raise ValueError(f"graphed: {name!r} of the model is on {t.device}, and the arguments are on {device}")
        tensors = call.tensors
        ids = [*map(id, tensors)]
        firsts = [*map(ids.index, dict.fromkeys(ids))]
        unique = None if len(firsts) == len(ids) else firsts
        with torch.inference_mode(False):
            statics = side.statics([tensors[i] for i in firsts])
            for static, i in zip(statics, firsts, strict=True):
                static.tensor.requires_grad_(needs_grad and tensors[i].requires_grad)
        by_id = dict(zip(dict.fromkeys(ids), statics, strict=True))
        args, kwargs = call.with_tensors([by_id[i].tensor for i in ids])
        own = [t for t in watch.tensors if not t.is_inference()]
        versions = [s.tensor._version for s in statics], [t._version for t in own]
        attributes = Attributes(watch)
        leaves = Leaves(watch)
        casts = needs_grad and torch.is_autocast_enabled(device.type)
        # Without autocast's cache a weight that is used twice is cast twice, and its gradients add up in float32.
        to_cast = leaves.others_of(asked, once=not torch.is_autocast_cache_enabled()) if casts else []
        mode, name = is_recorded(), type(self.model).__name__

        def run() -> Any:
            with _as_called(mode, casts=needs_grad), leaves, together(to_cast):
                return self.model(*args, **kwargs)

        graphs = []
        try:
            with Explained(f"forward of {name}"):
                graph, result = side.capture(run)
            graphs.append(graph)
            # What modules keep besides parameters and buffers (anchors, say) is memory that the graph may read.
            alive = [t for t in tree_leaves(attributes.before) if isinstance(t, Tensor)]
            if changed := attributes.restore():
                raise RuntimeError(f"graphed: the forward of {changed} at each call, which a replay does not")
            result = tree_map(leaves.owner, result)
            results = Results(result, [s.tensor for s in statics], watch, device)
            if mode and any(map(_requires_grad, results.new)):
                with_backward = WithBackward(side, statics, unique, graph, results)
                graphs.append(with_backward.record(name, leaves.owners, self.lock))
                recording: Recording = with_backward
            else:
                results.new = [t.detach() if t.requires_grad else t for t in results.new]
                recording = Recording(side, statics, unique, graph, results)
        except BaseException:
            attributes.restore()
            self._give_up(side, graphs)
            raise
        recording.alive = alive
        recording.written = [i for i, s in enumerate(statics) if s.tensor._version != versions[0][i]]
        recording.changed = [t for t, version in zip(own, versions[1], strict=True) if t._version != version]
        return recording

    def _give_up(self, side: Any, graphs: list[Any]) -> None:
        side.free(graphs, last=all(r.side is not side for r in self.kinds.all()))


@contextlib.contextmanager
def _told_of_writes(name: str, tensors: Sequence[Tensor]) -> Iterator[None]:
    """What is no leaf of autograd may be written to, and the tensor in its place is one."""
    try:
        yield
    except RuntimeError as error:
        if "leaf Variable that requires grad" not in str(error) or all(t.is_leaf for t in tensors):
            raise
        raise RuntimeError(
            f"graphed: the forward of {name} writes to an argument that requires a gradient, which a replay does not"
        ) from error


@contextlib.contextmanager
def _as_called(grad: bool, casts: bool = False) -> Iterator[None]:
    """For a warm-up or a capture: the caller's grad mode, and nothing that outlives it.

    Inference mode is off, so that tensors made here can be written to in any mode. Autocast's cache is off: it keeps
    weights that were cast in a warm-up, of which a graph would see no change. ``casts``: one call may have it for
    itself, so that the gradient of a weight that is used twice adds up in 16 bits, as eager's does. Other threads have
    the same cache, and other parameters than a capture.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(casts and cached)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(grad), in_this_thread():
            yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(cached)


# ---- the module ------------------------------------------------------------------------------------------------------


class Graphed(nn.Module):
    """A model whose calls are replayed. Made by :func:`graphed`.

    It is the model in all but its calls: attributes, parameters, buffers, children, hooks and methods are the model's,
    and what is set here is set there. ``state_dict()`` has the model's keys, and ``parent.layer = fcb.graphed(layer)``
    leaves those of the parent as they were.
    """

    _graphs: Graphs

    def __init__(self, graphs: Graphs) -> None:
        self.__dict__["_graphs"] = graphs  # and nothing of nn.Module's own

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self.__dict__["_graphs"].model

    @property
    def graphs(self) -> int:
        """How many graphs there are."""
        return len(self.__dict__["_graphs"].kinds)

    def clear(self) -> None:
        """Frees all graphs and their memory. The next call captures again.

        It is for changes that a replay cannot see: Python code and attributes of the model that are no tensors, modules
        or modes.
        """
        self.__dict__["_graphs"].clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling():
            return self.module(*args, **kwargs)
        return self.__dict__["_graphs"].call(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_graphs" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.module, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *dir(self.module)})

    def __repr__(self) -> str:
        return f"graphed({self.module!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        graphs = self.__dict__["_graphs"]
        return _rebuilt, (graphs.model, graphs.kinds.most, graphs.clone_outputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphed:
        _, (model, *options) = self.__reduce_ex__(None)
        return _rebuilt(copy.deepcopy(model, memo), *options)


def _rebuilt(model: nn.Module, max_graphs: int, clone_outputs: bool) -> Graphed:
    return Graphed(Graphs(model, max_graphs, clone_outputs))


def _method(name: str) -> Callable[..., Any]:
    def forwarded(self: Graphed, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.module, name)(*args, **kwargs)
        return self if result is self.module else result

    forwarded.__name__ = name
    return forwarded


def _attribute(name: str) -> property:
    return property(lambda self: getattr(self.module, name), lambda self, value: setattr(self.module, name, value))


for _name in nn.Module().__dict__:
    setattr(Graphed, _name, _attribute(_name))
for _name, _value in vars(nn.Module).items():
    if callable(_value) and not _name.startswith("__") and _name not in Graphed.__dict__:
        setattr(Graphed, _name, _method(_name))


def graphed(model: nn.Module, *, max_graphs: int = 16, clone_outputs: bool = True) -> Graphed:
    """The model, with its calls on CUDA captured as CUDA graphs and replayed: one launch for all kernels of a call.

    Example::

        fast = fcb.graphed(fcb.fuse(model.eval()))
        with torch.no_grad():
            y = fast(x)

    The first call of a kind warms up, captures and replays. Later ones copy their tensors into the graph's, replay, and
    copy the results. A kind of call is: the structure of the arguments; shapes, strides, dtypes and device of their
    tensors; their other values; grad mode, autocast, the modules' modes, which parameters require gradients, and
    PyTorch's flags for TF32, cuDNN and determinism. Warm-ups leave buffers and the random state as they were, and
    replays draw random numbers as eager calls do.

    In a training loop a call that needs gradients has a second graph, of its backward, and ``loss.backward()`` replays
    it. Gradients are copies that add up in ``p.grad`` as eager's do.

    Where calls of a kind wait for their backward together, as those of a GAN's discriminator, each has graphs of its
    own from the second step on, up to 4 of a kind. Before that and beyond, one that comes while the others wait is the
    model's own. A call waits until its backward has come, or nobody holds its results.

    Parameters and buffers that change in place are seen. Ones that were moved or replaced, other children, and another
    class of a module lead to new captures. Python code runs in the warm-ups and the capture alone.

    A call is the model's own where no argument is on CUDA, with a forward hook or one for gradients (and a warning),
    and under torch.compile, torch.export, torch.func, traces, modes, and where anomalies or saved tensors are watched.

    Any thread and any stream may call. Replays wait for each other, since all graphs of the model share memory. While a
    first call with gradients is recorded, the model's parameters are others with the same memory: another thread's call
    of the model itself would have no gradients then.

    Args:
        model: an nn.Module, fused or not, with all its parameters and buffers on the device of its arguments.
        max_graphs: how many graphs are kept, with or without backward. For a new kind of call a further one of another
            kind is freed, or else those of the least recently used kind; further ones have the room that is left.
        clone_outputs: without it results and gradients are the graphs' own memory, which the next call overwrites.

    Returns:
        The model as a :class:`Graphed`, which has all of its attributes and methods, the model itself as ``module``,
        and ``clear()``, which frees all graphs.

    Raises:
        TypeError: ``model`` is no module, or a ScriptModule. When called: arguments or results that are neither tensors
            nor simple values; gradients of a model with a DistributedDataParallel in it; a model with a ScriptModule
            in it that is not frozen.
        ValueError: ``max_graphs`` is less than 1. When called: tensors on several devices.
        RuntimeError: when called: the current stream is being captured, or the model's forward or backward cannot be
            captured (it waits for results, changes its own attributes, or needs gradients of tensors that are neither
            parameters nor arguments). In backward: it comes twice for one call, or behind a change of a parameter.
    """
    if isinstance(model, Graphed):
        model = model.module
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"graphed: model is of type {type(model).__name__}, expected an nn.Module that is no ScriptModule"
        )
    if not isinstance(max_graphs, int) or max_graphs < 1:
        raise ValueError(f"graphed: max_graphs is {max_graphs!r}, expected an integer of at least 1")
    return _rebuilt(model, max_graphs, clone_outputs)
