"""What ``torch.distributed.tensor`` needs to run the ops on DTensors: which part of them each process computes.

An op runs on the processes' own parts where these go together, and results are distributed in the same way:

- over the images, or for elementwise ops over pixels: what is per channel is whole in each process;
- over the output channels: weight and everything per channel likewise, and a convolution's input whole;
- else each process computes all of it. A batch's statistics are of this kind, unless the channels are distributed.

``register_sharding()`` of PyTorch cannot say it. It redistributes no keyword, such as a residual, and keeps what it has
found for other strides and window sizes. These are rules of ``torch.library.register_torch_dispatch``, in DTensor's
public methods. This module is imported with ``torch.distributed.tensor``, which takes long, and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .. import _dispatch, conditions

_ops = torch.ops.fused_conv_bn
_TWICE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
"""Whether to_local() can be differentiated twice. On 2.10 the second derivative is lost without a word."""

_IMAGES = frozenset({"input", "inputs", "residual", "out"})
"""Arguments of shape (N, C, ...). All others have their channels first, but for ``gate``, (N, C)."""

_EVERYWHERE, _FIRST_TWO, _NO_CHANNELS = range(3)
_ELEMENTWISE = {
    "bn_scale": _EVERYWHERE,
    "bn_scale_": _EVERYWHERE,
    "scale_shift": _EVERYWHERE,
    "scale_shift_": _EVERYWHERE,
    "gate": _EVERYWHERE,
    "max_pool2d": _FIRST_TWO,
    "spatial_mean": _FIRST_TWO,
    "bn_scale_cat": _NO_CHANNELS,
}
"""Ops that compute each element of an image, or each channel, from its own: which dimensions may be distributed."""

_OF_IMAGES = ("squeeze_excite",)
"""Ops that compute each image from itself and tensors that are whole."""

_CONVOLUTIONS = "conv_scale_shift", "conv_bn_scale"
_TRAINING = tuple(
    f"{name}{form}" for name in ("bn_scale_train", "conv_bn_scale_train") for form in ("", "_stats", "_functional")
)


class _Call(NamedTuple):
    op: Any
    named: dict[str, Any]

    @property
    def name(self) -> str:
        name: str = self.op._schema.name.partition("::")[2]
        return name

    @property
    def weight(self) -> DTensor | None:
        """The convolution's."""
        if not self.name.startswith("conv"):
            return None
        weight: DTensor = self.named["weight" if self.name == "conv_scale_shift" else "conv_weight"]
        return weight

    @property
    def input(self) -> DTensor:
        """What says how many images there are."""
        found: DTensor = self.named["inputs"][0] if "inputs" in self.named else self.named["input"]
        return found


# ---- how the arguments are to be distributed -------------------------------------------------------------------------


def _sharded(t: DTensor, i: int) -> int | None:
    """The tensor's dimension that is distributed over dimension ``i`` of the mesh, in the plain way."""
    placement: Any = t.placements[i]
    return placement.dim % t.dim() if type(placement) is Shard else None


def _shards(t: DTensor | None, i: int, axis: int) -> bool:
    """Whether dimension ``axis`` of a tensor is distributed over dimension ``i`` of the mesh."""
    return t is not None and _sharded(t, i) == axis


def _axis(call: _Call, i: int) -> int | None:
    """The result's dimension that is to be distributed over dimension ``i`` of the mesh."""
    name, named, weight = call.name, call.named, call.weight
    by_weight = weight is not None and named.get("groups", 1) == 1 and _shards(weight, i, 0)
    if name == "fold_bn":
        return 1 if _shards(named["running_mean"], i, 0) else None
    if name in _TRAINING:
        mean, var = named.get("running_mean"), named.get("running_var")
        if mean is not None and var is not None:  # what is written to stays where it is
            taken = _shards(mean, i, 0) and _shards(var, i, 0) and named.get("groups", 1) == 1
        else:
            taken = by_weight if weight is not None else _shards(call.input, i, 1)
        return 1 if taken else None
    if name in _OF_IMAGES:
        return 0 if _shards(call.input, i, 0) else None
    if name in _CONVOLUTIONS:
        return 0 if _shards(call.input, i, 0) else 1 if by_weight else None
    axis = _sharded(named.get("out", call.input), i)
    allowed = _ELEMENTWISE[name]
    if axis is None or (allowed == _FIRST_TWO and axis > 1) or (allowed == _NO_CHANNELS and axis == 1):
        return None
    return axis


def _axis_of(call: _Call, name: str, axis: int | None) -> int | None:
    """The dimension of an argument where the result's dimension ``axis`` is distributed; None if it is whole."""
    if axis is None or (axis == 1 and name == "input" and call.weight is not None):
        return None
    if name in _IMAGES or (name == "gate" and axis < 2):
        return axis
    return 0 if axis == 1 and name != "gate" else None


def _fits(call: _Call, tensors: dict[str, list[DTensor]], axis: int, parts: int) -> bool:
    """Whether all arguments are of one size there, and no process is left without a channel.

    If not, each process gets to see, and to refuse, the same as all others.
    """
    sizes = set()
    for name, of_name in tensors.items():
        dim = _axis_of(call, name, axis)
        for t in of_name:
            if dim is not None:
                sizes.add(t.shape[dim] if dim < t.dim() else -1)
    return len(sizes) == 1 and -1 not in sizes and (axis != 1 or sizes.pop() >= parts)


def _tensors(call: _Call) -> dict[str, list[DTensor]]:
    """The arguments that are tensors. Raises RuntimeError for what is no DTensor, or on another mesh."""
    op, found = call.name, {}
    first: Any = next(
        t for v in call.named.values() for t in (v if isinstance(v, (list, tuple)) else [v]) if isinstance(t, DTensor)
    )
    mesh = first.device_mesh
    for name, value in call.named.items():
        many = isinstance(value, (list, tuple)) and any(isinstance(t, Tensor) for t in value)
        if not (many or isinstance(value, Tensor)):
            continue
        of_name = []
        for t in value if many else [value]:
            if not isinstance(t, DTensor):
                if not getattr(DTensor._op_dispatcher, "_allow_implicit_replication", False):
                    raise RuntimeError(
                        f"{op}: {name} is a plain tensor next to DTensors, expected a DTensor, which "
                        f"torch.distributed.tensor.distribute_tensor makes"
                    )
                t = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
            elif t.device_mesh != mesh:
                raise RuntimeError(f"{op}: {name} is on {t.device_mesh}, expected {mesh}, the mesh of the others")
            of_name.append(t)
        call.named[name] = of_name if many else of_name[0]
        found[name] = of_name
    return found


# ---- the call --------------------------------------------------------------------------------------------------------


def _local(call: _Call, name: str, t: DTensor, axes: Sequence[int | None], is_written: bool) -> Tensor:
    """This process' part of an argument. Its gradient is one of parts to be added up, where others compute with it."""
    placements: list[Placement] = []
    gradients: list[Placement] = []
    for axis in axes:
        dim = _axis_of(call, name, axis)
        placements.append(Replicate() if dim is None else Shard(dim))
        gradients.append(Partial() if dim is None and axis is not None else placements[-1])
    if [p if type(p) is not Shard else Shard(p.dim % t.dim()) for p in t.placements] != placements:
        if is_written:
            raise RuntimeError(
                f"{call.name}: {name} has the placements {list(t.placements)}, expected {placements} here, as what is "
                f"written to is not redistributed"
            )
        t = t.redistribute(t.device_mesh, placements)
    part = t.to_local(grad_placements=gradients)
    if not _TWICE and part.requires_grad and torch.is_grad_enabled():
        part.register_hook(_refuse_second_derivatives)
    return part


def _refuse_second_derivatives(_: Tensor) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"create_graph is True in backward, and torch {torch.__version__} has no second derivatives of DTensors' "
            f"parts: torch 2.13 has"
        )


def _global(local: Tensor, mesh: Any, dims: Sequence[int | None], sizes: Sequence[int]) -> DTensor:
    """The DTensor whose part in this process is ``local``; ``dims``: which of its dimensions are distributed."""
    shape = list(local.shape)
    for dim, size in zip(dims, sizes, strict=True):
        if dim is not None:
            shape[dim] = size
    strides, step = [0] * local.dim(), 1
    for d in sorted(range(local.dim()), key=lambda d: (local.stride(d), -d)):  # laid out as the part is
        strides[d], step = step, step * max(shape[d], 1)
    placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides))


def _run(op: Any, run: Callable[..., Any], named: dict[str, Any]) -> Any:
    """``run``, which computes what ``op`` does, on this process' parts of the arguments."""
    call = _Call(op, named)
    tensors = _tensors(call)
    mesh = next(iter(tensors.values()))[0].device_mesh
    axes = [_axis(call, i) for i in range(mesh.ndim)]
    axes = [axis if axis is not None and _fits(call, tensors, axis, mesh.size()) else None for axis in axes]
    local = dict(named)
    for argument in op._schema.arguments:
        of_name = tensors.get(argument.name)
        if of_name is not None:
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            parts = [_local(call, argument.name, t, axes, is_written) for t in of_name]
            local[argument.name] = parts if isinstance(named[argument.name], list) else parts[0]
    results = run(**local)
    if results is None:
        return None
    if call.name == "fold_bn":
        shape: Sequence[int] = (0, named["running_mean"].shape[0])
    else:
        weight = call.weight
        shape = list(call.input.shape)
        if weight is not None:
            shape[1] = weight.shape[0]
    sizes = [0 if axis is None else shape[axis] for axis in axes]

    def whole(i: int, result: Tensor) -> DTensor:
        dims: list[int | None] = list(axes)
        if i > 0 or call.name == "fold_bn":  # per channel; empty where there are no running statistics
            dims = [0 if axis == 1 and result.numel() else None for axis in axes]
        return _global(result, mesh, dims, sizes)

    if isinstance(results, Tensor):
        return whole(0, results)
    return tuple(whole(i, result) for i, result in enumerate(results))


def _rule(_: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """An op's on DTensors, below autograd."""
    named = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=False)}
    with torch.no_grad():
        return _run(op, op, named | (kwargs or {}))


def _differentiably(plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The function of the name that ``plain`` has, on DTensors, with a derivative; ``plain`` itself where none is."""
    from .. import ops

    if not any(isinstance(t, DTensor) for t in (*args, *kwargs.values())):
        return plain(*args, **kwargs)
    op = getattr(_ops, plain.__name__).default
    named = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=False)}
    return _run(op, getattr(ops, plain.__name__), named | kwargs)


for _name in (*_ELEMENTWISE, *_OF_IMAGES, *_CONVOLUTIONS, *_TRAINING, "fold_bn"):
    torch.library.register_torch_dispatch(f"fused_conv_bn::{_name}", DTensor, _rule)
for _name in ("bn_scale", "scale_shift"):
    torch.library.register_torch_dispatch(f"fused_conv_bn::{_name}.out", DTensor, _rule)
_dispatch.of_dtensors = _differentiably
conditions.dtensor = DTensor
