"""Which algorithm computed a convolution, in a profile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode

_ops = torch.ops.fused_conv_bn


@contextlib.contextmanager
def name_algorithms(*, nvtx: bool = False) -> Iterator[None]:
    """Ranges around this package's convolutions inside of the ``with`` block, whose names say which algorithm ran.

    Example::

        with torch.profiler.profile() as profile, torch.no_grad(), fcb.name_algorithms():
            model(x)
        print(profile.key_averages().table())  # fused_conv_bn::conv_bn_scale [direct_cpu]

    In brackets is what :func:`explain` says. Without it nothing is spent on names: the calls of a model of
    :func:`fuse` have such ranges by themselves while a profiler runs, with the layer's path, and those of functions
    and modules have their op's name alone. Inside of the block each op that PyTorch runs takes some microseconds more.
    Enter it outside of what torch.compile compiles.

    Args:
        nvtx: the ranges are NVTX's, too, for NVIDIA's profilers.

    Raises:
        RuntimeError: ``nvtx``, and PyTorch was built without it.
    """
    if nvtx:
        _check_nvtx()
    with _Names(nvtx):
        yield


class _Names(TorchDispatchMode):
    def __init__(self, nvtx: bool) -> None:
        super().__init__()
        self.nvtx = nvtx

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from ._fuse.tune import CONV_OPS, problem_arguments

        kwargs = kwargs or {}
        if func not in CONV_OPS:
            return func(*args, **kwargs)
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        positional, keywords = problem_arguments(func, named)
        name = func._schema.name
        with contextlib.suppress(RuntimeError):  # the op says in its own words what it refuses
            name += f" [{_ops._explain(*positional, **keywords)}]"
        with record_function(name), _nvtx_range(name) if self.nvtx else contextlib.nullcontext():
            return func(*args, **kwargs)


@contextlib.contextmanager
def _nvtx_range(name: str) -> Iterator[None]:
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def _check_nvtx() -> None:
    try:
        with _nvtx_range("fused_conv_bn"):
            pass
    except RuntimeError as error:
        raise RuntimeError(f"name_algorithms: nvtx is True, and this torch has no NVTX ({error})") from None
