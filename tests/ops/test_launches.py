"""What conv_bn_scale_train launches and allocates: its own passes, its result and one workspace, and nothing else."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fused_conv_bn as fcb
from common import random_bn

EPILOGUES = [("none", False), ("silu", True)]


def arguments(device: str, algorithm: str, generator: torch.Generator) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    channels, of_filter = {"depthwise": (16, 1), "gemm_sm90": (16, 16)}.get(algorithm, (4, 4))
    x = torch.randn(4, channels, 17, 16, generator=generator).to(device)
    w = torch.randn(16, of_filter, 3, 3, generator=generator).to(device)
    if algorithm == "gemm_sm90":
        x, w = (t.half().to(memory_format=torch.channels_last) for t in (x, w))
    return x, w, random_bn(16, torch.float32, device, generator)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def kernels(call: Callable[[], object]) -> list[str]:
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.events() or []
    return [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA]


def allocations(call: Callable[[], object]) -> int:
    call()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    call()
    return torch.cuda.memory_stats()["allocation.all.allocated"] - before


# The passes of each way: statistics, their merge and the convolution; for sums over the input two merges, of pairs of taps and of
# channels; a pass in place behind a convolution that gathers nothing, or its results' statistics (gemm_sm90).
WAYS = [
    ("stem_sm90", "from_output", 3),
    ("stem_sm90", "from_input", 4),
    ("stem_sm80", "from_output", 4),
    ("depthwise", "from_output", 4),
    ("gemm_sm90", "from_output", 3),
    ("aten", "from_output", 3),  # and PyTorch's own
]


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("activation, with_residual", EPILOGUES)
@pytest.mark.parametrize("with_bn", [True, False])
@pytest.mark.parametrize("algorithm, statistics, passes", WAYS)
def test_nothing_but_its_own_passes(
    device, algorithm, statistics, passes, with_bn, activation, with_residual, generator
):
    if algorithm.endswith("_sm90") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"{algorithm} is for compute capability 9.0")
    groups = 16 if algorithm == "depthwise" else 1
    x, w, bn = arguments(device, algorithm, generator)
    residual = torch.randn_like(F.conv2d(x, w, groups=groups)) if with_residual else None
    call = functools.partial(
        fcb.conv_bn_scale_train,
        x,
        w,
        None,
        *(bn if with_bn else (None,) * 4),
        groups=groups,
        residual=residual,
        activation=activation,
    )
    convolution = functools.partial(F.conv2d, x, w, groups=groups)
    by_pytorch = algorithm == "aten"
    with fcb.use_algorithm(algorithm, statistics or None):
        launched, allocated = kernels(call), allocations(call)
    ours = [name for name in launched if "fused_conv_bn" in name]
    assert len(ours) == passes, launched
    assert len(launched) == passes + (len(kernels(convolution)) if by_pytorch else 0), launched
    # Its result, which is the convolution's, and the workspace.
    assert allocated == 1 + (allocations(convolution) if by_pytorch else 1)


# ---- on the CPU ------------------------------------------------------------------------------------------------------


def copies(call: Callable[[], object]) -> Counter[str]:
    """What moves or fills memory as an operator of PyTorch's; allocations by themselves."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    names = ("aten::copy_", "aten::fill_", "aten::empty", "aten::empty_strided", "aten::empty_like")
    return Counter(e.name for e in profiler.events() or [] if e.name in names)


@pytest.mark.parametrize("activation, with_residual", EPILOGUES)
@pytest.mark.parametrize("with_bn", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_nothing_beside_the_convolution(layout, with_bn, activation, with_residual, generator):
    """float64, which is PyTorch's to convolve."""
    x, w, bn = arguments("cpu", "aten", generator)
    x, w = x.double().contiguous(memory_format=layout), w.double()
    residual = torch.randn_like(F.conv2d(x, w)) if with_residual else None
    given = [t.double() for t in bn] if with_bn else [None] * 4
    call = functools.partial(fcb.conv_bn_scale_train, x, w, None, *given, residual=residual, activation=activation)
    assert copies(call) == copies(lambda: F.conv2d(x, w))


def test_a_result_that_is_not_dense_is_copied_once(generator):
    """Eager's conv1d keeps a permuted weight's layout, and its BatchNorm does not."""
    x = torch.randn(4, 6, 20, generator=generator).double()
    w = torch.randn(8, 3, 6, generator=generator).double().permute(0, 2, 1)
    convolution = functools.partial(F.conv1d, x, w)
    assert not convolution().is_contiguous()
    more = copies(lambda: fcb.conv_bn_scale_train(x, w, None, None, None)) - copies(convolution)
    assert more == Counter({"aten::copy_": 1, "aten::empty_like": 1, "aten::empty": 1})
