"""A call of a model: its tensors, and all else that chooses what the model runs."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.utils import parametrize
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_flatten, tree_unflatten

from .. import algorithms, conditions

CONSTANTS = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    }
)
"""Values in arguments and results that cannot change and say all about themselves. Enumerations are such, too."""

NOT_STRIDED = (
    "graphed: an argument is or has in it a sparse, nested or quantized tensor, expected plain strided tensors"
)
_FLAT = CONSTANTS | {Tensor}
_ONLY_TENSORS = {Tensor}


class Call:
    """A call's arguments: the tensors in them, and all else."""

    __slots__ = "leaves", "spec", "tensors"

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.spec: Any
        self.leaves: Sequence[Any]
        self.tensors: Sequence[Tensor]
        if not kwargs and {*map(type, args)} == _ONLY_TENSORS:
            self.tensors = self.leaves = args
            self.spec = len(args), ()
            return
        kinds = {*map(type, args), *map(type, kwargs.values())}
        if fx.Proxy in kinds:  # whose class must not be asked for
            self.leaves = self.tensors = ()
            return
        if kinds <= _FLAT:
            self.leaves, self.spec = [*args, *kwargs.values()], (len(args), tuple(kwargs))
        else:
            self.leaves, self.spec = tree_flatten((args, kwargs))
        self.tensors = [v for v in self.leaves if isinstance(v, Tensor)]

    def constants(self) -> tuple[Hashable, ...]:
        """The leaves that are no tensors, as what tells them apart: 1 is not True, and 0.0 not -0.0."""
        if self.tensors is self.leaves:
            return ()
        found: list[Hashable] = []
        for v in self.leaves:
            kind = type(v)
            if isinstance(v, Tensor):
                found.append(Tensor)
            elif kind in (float, complex):
                found.append((kind, repr(v)))
            elif kind in CONSTANTS or isinstance(v, enum.Enum):
                found.append((kind, v))
            else:
                raise TypeError(
                    f"graphed: an argument is or has in it a value of type {kind.__name__}, expected tensors, numbers, "
                    "strings, None, dtypes, devices, or tuples, lists and dicts of them"
                )
        return tuple(found)

    def with_tensors(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors in the places of these."""
        those = iter(tensors)
        leaves = [next(those) if isinstance(v, Tensor) else v for v in self.leaves]
        if type(self.spec) is tuple:
            count, names = self.spec
            return tuple(leaves[:count]), dict(zip(names, leaves[count:], strict=True))
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs


def call_key(call: Call) -> Hashable:
    """What a graph depends on, but for the model. Each of these chooses other kernels, or other memory."""
    tensors = call.tensors
    try:
        described = tuple([(t.shape, t.stride(), t.dtype, t.device, t.layout) for t in tensors])
    except RuntimeError:  # some have no strides
        raise TypeError(NOT_STRIDED) from None
    same: tuple[int, ...] | None = None
    if len(tensors) > 1:
        ids = [*map(id, tensors)]
        if len({*ids}) != len(ids):
            same = tuple(map(ids.index, ids))
    return _hashable(call.spec), call.constants(), described, same, torch.is_grad_enabled(), _autocast(), _flags()


def _hashable(spec: Any) -> Hashable:
    """A structure of arguments. Older ones of PyTorch's have no hash where they are of dicts."""
    try:
        hash(spec)
    except TypeError:
        return repr(spec)
    return spec


def _autocast() -> Hashable:
    if not torch._C._is_any_autocast_enabled():
        return None
    of_devices = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cuda", "cpu"))
    return of_devices, torch.is_autocast_cache_enabled()


def _flags() -> Hashable:
    """PyTorch's settings, and this package's."""
    c = torch._C
    precision = c._get_fp32_precision_getter  # the older allow_tf32 raises once this one was set
    return (
        *(c._get_cudnn_enabled(), c._get_cudnn_benchmark(), c._get_cudnn_deterministic()),
        *(precision("cuda", "matmul"), precision("cuda", "conv"), precision("cuda", "rnn")),
        c._get_cublas_allow_fp16_reduced_precision_reduction(),
        c._get_cublas_allow_bf16_reduced_precision_reduction(),
        *(c._get_deterministic_algorithms(), torch.get_default_dtype(), _default_devices()),
        algorithms.current(),
    )


def _default_devices() -> Hashable:
    """Of ``with torch.device(...)`` and ``torch.set_default_device``, which are modes that see each function."""
    count = torch._C._len_torch_function_stack()
    modes = [torch._C._get_function_stack_at(i) for i in range(count)] if count else ()
    return tuple([m.device for m in modes if type(m) is DeviceContext])


def is_watched() -> bool:
    """Whether someone wants to see what a call runs: a trace, a transform, a mode, a hook for all modules."""
    if torch._C._get_tracing_state() is not None or conditions.transformed() or conditions.hooks_for_all():
        return True
    if torch._C._len_torch_dispatch_stack() or parametrize._cache_enabled:  # which keeps tensors from call to call
        return True
    count = torch._C._len_torch_function_stack()
    return count > 0 and any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(count))


def is_backward_watched() -> bool:
    """The same of what forward saves and of each step of backward."""
    return torch.is_anomaly_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
