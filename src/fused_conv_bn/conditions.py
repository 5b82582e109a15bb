"""When a fused op may stand for a layer and its BatchNorm: the one place that knows.

:func:`why_not` gives the reason why PyTorch's own ops run, as a sentence, or None. The module asks before every call,
so that what is asked there costs a microsecond or two. What the op itself refuses (a dtype, a size) is asked after it
has refused, by :func:`why_refused`: the op raises before it writes anything.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module

from . import _loader
from ._count import counted

Operands: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""The layer's weight and bias, bn.running_mean, bn.running_var, bn.weight, bn.bias."""

PLAIN_TENSORS = frozenset({Tensor, nn.Parameter, type(None)})
"""The types of tensors that mean what they say. A subclass may compute, distribute or record instead."""

DTENSORS = "the tensors are DTensors, of which each process computes its part"
"""What :func:`operands` says then, and the module asks for."""

dtensor: type[Tensor] | None = None
"""The class, from the import of ``torch.distributed.tensor`` on (_register/sharding.py)."""

_SyncBatchNorm = nn.SyncBatchNorm

# What a call of the modules runs, as it was when this package was imported.
_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl
_SYNC_FORWARD, _F_BATCH_NORM = nn.SyncBatchNorm.forward, F.batch_norm
_METHODS = [
    (of, name)
    for of, names in (
        *((conv, ("forward", "_conv_forward")) for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
        *((bn, ("forward", "_check_input_dim")) for bn in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)),
        (nn.SyncBatchNorm, ("forward",)),
        (nn.Module, ("__call__", "_call_impl")),
        (F, ("conv1d", "conv2d", "conv3d", "batch_norm")),
    )
    for name in names
]
_OWNERS, _METHOD_NAMES = zip(*_METHODS, strict=True)
_OWN_METHODS = list(map(getattr, _OWNERS, _METHOD_NAMES))

_REPLACEABLE_NAMES = "forward", "_conv_forward", "_check_input_dim", "_call_impl", "_slow_forward"
OWN_METHODS = frozenset(_REPLACEABLE_NAMES)
"""Methods that an instance may have of its own."""

_global_forward_hooks = _module._global_forward_hooks
_global_forward_pre_hooks = _module._global_forward_pre_hooks
_global_backward_hooks = _module._global_backward_hooks
_global_backward_pre_hooks = _module._global_backward_pre_hooks

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
LEAST_OF_STEPS = {True: 1 << 15, False: 1 << 17}
"""Elements of a result on a CPU from which on an op gains in forward and backward, in training and in evaluation."""
_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_strided = torch.strided


def has_cuda_library() -> bool:
    return len(_loader.loaded) > 1


# ---- torch.export ----------------------------------------------------------------------------------------------------

_keeps_ops = False


@contextlib.contextmanager
def export_ops() -> Iterator[None]:
    """Keeps this package's ops in what ``torch.export`` captures inside of the ``with`` block.

    Without it an exported program has PyTorch's ops alone, and loads where this package is not installed. With it the
    program runs the fused ops, for AOTInductor, say, and needs ``import fused_conv_bn`` before it is loaded. Of a
    fused model they are those of an earlier call of the same kind and in the same grad mode: without one there is a
    warning, and PyTorch's ops.
    """
    global _keeps_ops
    before, _keeps_ops = _keeps_ops, True
    try:
        yield
    finally:
        _keeps_ops = before


def is_exporting() -> bool:
    """Whether torch.export is at work. (On 2.10 ``torch.compiler.is_exporting()`` is always True in torch.compile.)"""
    return torch.compiler._is_exporting_flag


def exports_ops() -> bool:
    """Whether torch.export is at work and this package's ops are to be in the program."""
    return _keeps_ops and torch.compiler._is_exporting_flag


# ---- what every function of the package asks -------------------------------------------------------------------------


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is under way. It needs ops that it knows, PyTorch's own.

    A compiled ``torch.func.grad`` through an autograd.Function with an unknown op gives zeros without an error.
    """
    return _transforms_active() or forward_ad._current_level >= 0


def is_small_step(x: Any, layer: nn.Module | None, bn: nn.Module) -> bool:
    """Whether PyTorch's own modules take less time forward and backward, for what a backward of ours takes in Python.

    By measurements on a CPU, one thread, in float32, of BatchNorms alone and behind 1x1 and 3x3 convolutions: steps
    with ours take 1.05 to 1.2 times PyTorch's time below these sizes, in evaluation 1.04 to 1.5 times, and 0.4 to 1.0
    above.
    """
    least = LEAST_OF_STEPS[bool(bn.training)]
    if not (_is_grad_enabled() and type(x) is Tensor and x.is_cpu and x.numel() < least):
        return False
    mean, gain = bn._buffers.get("running_mean"), bn._parameters.get("weight")
    if gain is not None and mean is not None and gain.dtype is not mean.dtype:
        return False  # PyTorch's takes no such, nor a weight and bias of different dtypes
    trained = gain
    if layer is not None:
        trained, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        # Filters make a result of so many elements where windows move by single pixels.
        if trained is not None and x.dim() > 1 and x.numel() * trained.size(0) >= least * x.size(1):
            return False
        if trained is not None and bias is not None and trained.dtype is not bias.dtype:
            return False
    return (x.requires_grad or (trained is not None and trained.requires_grad)) and not _is_compiling()


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def hooks_for_all() -> bool:
    """Whether a hook is registered for all modules."""
    return bool(
        _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks
    )


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module is more than its class' forward: to hooks, a method of its own, or its compiler."""
    own = not module.__dict__.keys().isdisjoint(OWN_METHODS) or module._compiled_call_impl is not None
    return own or has_hooks(module)


def compiled_by(module: nn.Module) -> str | None:
    """The compiler that makes a module's calls, if one does: a class of ours would never see them."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript"
    if module._compiled_call_impl is not None:
        return "torch.compile"
    if (inner := without_disable(module)) is not module:
        return compiled_by(inner)
    return None if _dynamo_context(module) is None else "torch.compile"


def without_disable(module: nn.Module) -> nn.Module:
    """The module that is called by what ``torch.compiler.disable`` made of it; any other one as it is."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    context = _dynamo_context(module)
    if context is None or not isinstance(context, dynamo.DisableContext):
        return module
    inner: Any = module._orig_mod
    return without_disable(inner)


def _dynamo_context(module: nn.Module) -> Any:
    """Of what torch.compile, or torch.compiler.disable, made of a module."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")  # what nobody imported has wrapped nothing
    return module.dynamo_ctx if dynamo is not None and isinstance(module, dynamo.OptimizedModule) else None


def methods_replaced() -> bool:
    """Whether somebody put something else in the place of what PyTorch's convolutions and BatchNorms run."""
    return list(map(getattr, _OWNERS, _METHOD_NAMES)) != _OWN_METHODS


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def sync_group(bn: nn.Module) -> Any:
    """The processes whose batches ``bn`` takes its statistics from; None if they are this process' own."""
    if type(bn) is not _SyncBatchNorm or not (bn.training and is_distributed()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


# ---- the modules -----------------------------------------------------------------------------------------------------

DIMENSIONS_OF_NORM: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (2, 3, 4, 5),
}
"""The dimensions of inputs that each BatchNorm takes, and the ops as well."""


class Pair:
    """A layer and the BatchNorm behind it: PyTorch's classes, and what a call of them ran at this package's import.

    ``name``: what a model calls the layer. ``inner``: the method that the layer's forward calls; forward itself if it
    calls none. ``function``: of torch.nn.functional, which computes it. ``dimensions``: of its input, where one op
    computes the layer and BatchNorm; None where the layer is PyTorch's, and an op what follows.
    """

    def __init__(
        self,
        name: str,
        layer: Any,
        norm: Any,
        lazy_norm: Any,
        inner: str,
        function: str,
        dimensions: int | None,
    ) -> None:
        self.name, self.layer, self.norm, self.dimensions = name, layer, norm, dimensions
        self.norms = norm, nn.SyncBatchNorm, lazy_norm
        self.forward = layer.forward
        self.inner_name, self.inner = inner, getattr(layer, inner)
        self.function_name, self.function = function, getattr(F, function)
        self.norm_forward = norm.forward
        self.norm_check = norm._check_input_dim


_1D, _2D, _3D = (
    (nn.BatchNorm1d, nn.LazyBatchNorm1d),
    (nn.BatchNorm2d, nn.LazyBatchNorm2d),
    (nn.BatchNorm3d, nn.LazyBatchNorm3d),
)
PAIRS: dict[type[nn.Module], Pair] = {
    pair.layer: pair
    for pair in (
        Pair("conv", nn.Conv1d, *_1D, "_conv_forward", "conv1d", 3),
        Pair("conv", nn.Conv2d, *_2D, "_conv_forward", "conv2d", 4),
        Pair("conv", nn.Conv3d, *_3D, "_conv_forward", "conv3d", 5),
        Pair("conv", nn.ConvTranspose1d, *_1D, "_output_padding", "conv_transpose1d", None),
        Pair("conv", nn.ConvTranspose2d, *_2D, "_output_padding", "conv_transpose2d", None),
        Pair("conv", nn.ConvTranspose3d, *_3D, "_output_padding", "conv_transpose3d", None),
        Pair("linear", nn.Linear, *_1D, "forward", "linear", None),
    )
}
"""By the layer's class."""


def why_not(conv: nn.Module, bn: nn.Module, x: Any = None, residual: Any = None) -> str | None:
    """Why PyTorch's own ops run for ``bn(conv(x))``, in one sentence; None if a fused op may.

    ``conv``: a convolution, a transposed one or an ``nn.Linear``. Without ``x`` it is about the modules and what
    surrounds the call. With it the input counts as well.
    """
    pair = PAIRS.get(type(conv)) or next((p for p in PAIRS.values() if isinstance(conv, p.layer)), PAIRS[nn.Conv2d])
    found = operands(pair, conv, bn, x, residual)
    if type(found) is str:
        return found
    return None


def operands(pair: Pair, layer: nn.Module, bn: nn.Module, x: Any, residual: Any) -> Operands | str:
    """The tensors of both modules for a fused op, or why PyTorch's own ops run.

    Every call of a module comes here. What is asked twice, or by a function, is a tenth of a microsecond.
    """
    layer_class, bn_class = pair.layer, pair.norm
    if type(layer) is not layer_class:
        return f"{pair.name} is of class {type(layer).__name__}, not nn.{layer_class.__name__} itself"
    if type(bn) is not bn_class:
        if type(bn) is not _SyncBatchNorm:
            return f"bn is of class {type(bn).__name__}, not nn.{bn_class.__name__} itself"
        if (_is_compiling() or (isinstance(x, Tensor) and not x.is_cuda)) and sync_group(bn) is not None:
            return "SyncBatchNorm takes the statistics of all processes' batches, on CUDA and not compiled"
        if _SyncBatchNorm.forward is not _SYNC_FORWARD:
            return "SyncBatchNorm's class has another forward"
    if (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or bn._forward_hooks
        or bn._forward_pre_hooks
        or bn._backward_hooks
        or bn._backward_pre_hooks
    ):
        return f"{pair.name} or bn has a hook"
    if _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks:
        return "a hook for all modules is registered"
    if (
        layer_class.forward is not pair.forward
        or getattr(layer_class, pair.inner_name) is not pair.inner
        or layer_class._call_impl is not _CALL_IMPL
        or bn_class.forward is not pair.norm_forward
        or bn_class._check_input_dim is not pair.norm_check
        or bn_class._call_impl is not _CALL_IMPL
        or getattr(F, pair.function_name) is not pair.function
        or F.batch_norm is not _F_BATCH_NORM
    ):
        return "a method of PyTorch's classes was replaced"
    if (layer_class.__call__ is not _CALL or bn_class.__call__ is not _CALL) and not exports_ops():
        return "nn.Module.__call__ was replaced"  # which torch.export does itself
    compiling = _is_compiling()
    if compiling:  # torch.compile does not know isdisjoint()
        if any(name in layer.__dict__ or name in bn.__dict__ for name in _REPLACEABLE_NAMES):
            return f"{pair.name} or bn has a forward of its own"
    elif not (layer.__dict__.keys().isdisjoint(OWN_METHODS) and bn.__dict__.keys().isdisjoint(OWN_METHODS)):
        return f"{pair.name} or bn has a forward of its own"
    if layer._compiled_call_impl is not None or bn._compiled_call_impl is not None:
        return f"{pair.name} or bn is compiled by itself"
    if _transforms_active():
        return "a transform of torch.func is under way"
    if forward_ad._current_level >= 0:
        return "forward-mode AD is under way"
    if _tracing_state() is not None:
        return "torch.jit.trace is under way"
    try:
        c, p, b = layer._parameters, bn._parameters, bn._buffers
        found = c["weight"], c["bias"], b["running_mean"], b["running_var"], p["weight"], p["bias"]
    except KeyError:
        try:  # as plain attributes, which DataParallel's replicas have
            found = layer.weight, layer.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias  # type: ignore[assignment]
        except AttributeError as error:
            return f"a tensor is missing: {error}"
    weight, layer_bias, mean, var, bn_weight, bn_bias = found
    if compiling and torch.compiler._is_exporting_flag:
        if not _keeps_ops:
            return "torch.export is under way: what it saves needs nothing of this package"
    elif not (
        type(x) in PLAIN_TENSORS
        and type(residual) in PLAIN_TENSORS
        and type(weight) in PLAIN_TENSORS
        and type(layer_bias) in PLAIN_TENSORS
        and type(mean) in PLAIN_TENSORS
        and type(var) in PLAIN_TENSORS
        and type(bn_weight) in PLAIN_TENSORS
        and type(bn_bias) in PLAIN_TENSORS
    ):
        if dtensor is not None and all(t is None or isinstance(t, dtensor) for t in (x, residual, *found)):
            return DTENSORS
        return "a tensor is of another class, or the input is no tensor"
    if weight is None:
        return f"{pair.name} has no weight"
    if (mean is None) is not (var is None):
        return "bn has one of running_mean and running_var"
    if x is not None:
        if not (x.is_cpu or (x.is_cuda and has_cuda_library())):
            return f"no kernel for device {x.device.type}"
        if x.layout is not _strided:
            return f"the input's layout is {x.layout}"
        if residual is not None and residual.is_nested:
            return "the residual is a nested tensor"
        dimensions = pair.dimensions
        if dimensions is not None:
            if x.dim() != dimensions:
                return f"the input has {counted(x.dim(), 'dimension')}, not {dimensions}"
            if residual is not None:
                shape = residual.shape
                if len(shape) != dimensions or shape[0] != x.shape[0] or shape[1] != weight.shape[0]:
                    return f"the residual's shape {list(shape)} is not that of the result"
    return found  # type: ignore[return-value]


# ---- what the ops refuse ---------------------------------------------------------------------------------------------

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def conv_output_size(
    size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """The shape of a convolution's result. Each of the sequences has one value for each spatial dimension, or one."""
    space = len(size) - 2
    windows = zip(*(list(v) * space if len(v) == 1 else v for v in (stride, padding, dilation)), strict=True)
    result = [size[0], weight_size[0]]
    for d, (s, p, dil) in enumerate(windows, 2):
        result.append((size[d] + 2 * p - dil * (weight_size[d] - 1) - 1) // s + 1)
    return result


def shares_memory(running_mean: Tensor, running_var: Tensor | None, *others: Tensor | None) -> bool:
    """Whether a running statistic, which training writes to, shares memory with another tensor.

    A fused op would read the old values, and PyTorch's ops read the new ones.
    """
    start = running_mean.data_ptr()
    end = start + running_mean.numel() * running_mean.element_size()
    ranges = [(start, end)]
    if running_var is not None:
        start_var = running_var.data_ptr()
        end_var = start_var + running_var.numel() * running_var.element_size()
        if start < end_var and start_var < end:
            return True
        ranges.append((start_var, end_var))
    for other in others:
        if other is not None:
            first = other.data_ptr()
            last = first + other.numel() * other.element_size()
            for start, end in ranges:
                if first < end and start < last:
                    return True
    return False


def why_refused(
    x: Tensor,
    found: Operands,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
    takes_batch_statistics: bool,
) -> str | None:
    """Why the op takes no such convolution, in one sentence; None if all arguments are as it wants them.

    ``x``: padded already. ``dtype``: that of the convolution, which autocast may have chosen.
    """
    if x.is_nested:
        return "the input is a nested tensor"
    weight = found[0]
    space = x.dim() - 2
    if weight.dim() != x.dim() or not 1 <= space <= 3:
        return "not the same number of dimensions, or not 1 to 3 of space"
    if any(s <= 0 for s in (*stride, *dilation)) or any(p < 0 for p in padding) or groups <= 0:
        return "a stride, padding, dilation or number of groups out of range"
    if weight.shape[0] == 0 or weight.shape[1] == 0 or x.shape[1] != weight.shape[1] * groups:
        return "the input's channels are not the convolution's, or there are none"
    if weight.shape[0] % groups:
        return "groups does not divide the channels"
    if any(len(v) not in (1, space) for v in (stride, padding, dilation)):
        return "another number of spatial dimensions"
    size = conv_output_size(x.shape, weight.shape, stride, padding, dilation)
    if any(s == 0 for s in x.shape[2:]) or any(s <= 0 for s in size[2:]):
        return "the input is smaller than the kernel"
    return why_norm_refused(x, size, found, residual, dtype, takes_batch_statistics)


def why_norm_refused(
    x: Tensor,
    size: Sequence[int],
    found: tuple[Tensor | None, ...],
    residual: Tensor | None,
    dtype: torch.dtype,
    takes_batch_statistics: bool,
) -> str | None:
    """The same of BatchNorm and what follows. ``size``, ``dtype``: of the result. ``found``: the first may be None,
    where ``x`` is the layer's result."""
    if any(t is not None and t.device != x.device for t in found):
        return "tensors on several devices"
    if any(t is not None and t.layout is not _strided for t in (x, *found, residual)):
        return "a tensor's layout is not strided"
    if dtype not in _DTYPES:
        return f"no kernel for {dtype}"
    allowed = (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,)
    if any(t is not None and t.dtype not in allowed for t in found[1:]):
        return "BatchNorm's tensors and the input are of dtypes that the op does not mix"
    if any(t is not None and t.dim() != 1 for t in found[1:]):
        return "one of the tensors per channel has not 1 dimension"
    if any(t is not None and t.shape[0] != size[1] for t in found[1:]):
        return "bn has another number of channels than its input"
    if residual is not None:
        if list(residual.shape) != list(size):
            return "the residual's shape is not that of the result"
        if residual.dtype != dtype or residual.device != x.device:
            return "the residual's dtype or device is not that of the result"
    if takes_batch_statistics:
        if size[0] * math.prod(size[2:]) == 1:
            return "one value for each channel"
        mean, var = found[2:4]
        if mean is not None and not _is_compiling() and shares_memory(mean, var, x, residual, *found[:2], *found[4:]):
            return "a running statistic shares memory with another tensor"
    return None
