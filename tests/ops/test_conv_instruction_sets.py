"""conv_scale_shift and conv_bn_scale on the CPU: MKL's, oneDNN's and this package's kernels, by instruction set."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common import RESIDUALS
from conv_problems import Call, check, make
from fused_conv_bn import reference

# Sums of more than 2000 terms, with shifts far beyond them: the library that computes them may be another one than for small
# sums, may add up in blocks, and may begin with a bias where it gets one. MKL takes float64, and float32 of one small image or
# with one thread; oneDNN takes the rest.
LONG_SUMS = {
    "3x3": ((2, 260, 7, 6), (8, 260, 3, 3), 1, 1),
    "one image": ((1, 240, 7, 6), (12, 240, 3, 3), 1, 1),
    "1x1": ((2, 2100, 5, 5), (8, 2100, 1, 1)),
    "one image, 1x1": ((1, 2100, 3, 3), (8, 2100, 1, 1)),
    "one volume": ((1, 80, 4, 5, 6), (8, 80, 3, 3, 3), 1, 1),
    "one volume, 1x1x1": ((1, 2100, 2, 3, 2), (8, 2100, 1, 1, 1)),
    "a row": ((1, 700, 15), (8, 700, 3), 1, 1),
    "groups": ((1, 480, 7, 6), (8, 240, 3, 3), 1, 1, 1, 2),
}


@pytest.mark.parametrize("problem", LONG_SUMS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu"])
def test_long_sums(device, dtype, threads, problem, generator):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for formats, bn in (("cc", False), ("ll", False), ("cc", True)):
            call = make(generator, device, dtype, *LONG_SUMS[problem], formats=formats, residual="last", bn=bn)
            for shift in (call.running_mean, call.conv_bias, call.bias) if bn else (call.shift,):
                shift.mul_(100)
            check(call)
    finally:
        torch.set_num_threads(before)


CAPABILITIES = {"AVX2": ("avx2", "AVX2"), "none": ("default", "SSE41")}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_lower_instruction_sets_on_the_cpu(capability):
    """Some of the convolutions' tests in a process where PyTorch, oneDNN and this package are held to older instructions.
    oneDNN for SSE4.1 adds a bias first, where newer ones add it last."""
    aten, onednn = CAPABILITIES[capability]
    if os.environ.get("ONEDNN_MAX_CPU_ISA") or torch.backends.cpu.get_cpu_capability().lower() == aten:
        pytest.skip("this is such a process, or such a CPU")
    files = ("test_conv.py", "test_conv_bn.py", "test_conv_instruction_sets.py")
    names = "long_sums", "large_shifts", "few_terms", "test_problems", "bn_parts", "random_depthwise", "instructions"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += map(str, map(Path(__file__).with_name, files))
    command += ["-k", f"cpu and not cuda and not float16 and ({' or '.join(names)})"]
    env = {**os.environ, "ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:]


WIDE_FIRST_LAYERS = {
    "problem 73": ((1, 8, 36, 128), (30, 8, 3, 3)),
    "padding, a last tile of channels": ((1, 3, 67, 70), (13, 3, 5, 5), 1, 2),
    "stride 2": ((3, 3, 45, 225), (32, 3, 3, 3), 2, 1),
    "7x7, stride 2": ((2, 1, 75, 131), (9, 1, 7, 7), 2, 3),
    "stride of rows alone": ((1, 4, 170, 81), (8, 4, 3, 3), (3, 1), (0, 1)),
    "dilation": ((1, 2, 80, 100), (16, 2, 3, 4), 1, (3, 1), (4, 3)),
    "a row of taps": ((1, 9, 41, 113), (17, 9, 1, 8), 1, (0, 7)),
    "a column of taps": ((2, 5, 90, 64), (24, 5, 6, 1), (2, 1), (5, 0)),
    "rows longer than the buffer": ((1, 6, 3, 4100), (10, 6, 2, 3), 1, 1),
}
has_vectors = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="the CPU has no AVX2"
)


def runs_pytorchs(call: Call) -> bool:
    """Whether PyTorch's convolution is part of the call."""
    with torch.autograd.profiler.profile() as profile:
        call.ours()
    return any("conv" in event.name and event.name.startswith("aten::") for event in profile.function_events)


@has_vectors
@pytest.mark.parametrize("problem", WIDE_FIRST_LAYERS)
def test_wide_first_layers_on_the_cpu(problem, generator):
    """Those that a kernel of this package computes there."""
    arguments = WIDE_FIRST_LAYERS[problem]
    cases = [("none", "none", True), ("none", "first", False)]
    if problem == "problem 73":
        cases += [(name, residual, False) for name in list(reference.ACTIVATIONS)[1:] for residual in RESIDUALS[::2]]
        cases += [("gelu", "first", True)]
    for activation, residual, bn in cases:
        call = make(generator, "cpu", torch.float32, *arguments, residual=residual, activation=activation, bn=bn)
        assert not runs_pytorchs(call) and check(call)
    call = make(generator, "cpu", torch.float32, *arguments, residual=True)
    ours, threads = call.ours(), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(call.ours(), ours)
    finally:
        torch.set_num_threads(threads)
    # As they come from elsewhere: a slice, a transposed and a permuted tensor, addresses that are no vector's.
    other = replace(call)
    other.x = torch.empty(*call.x.shape[:-1], call.x.size(-1) + 3)[..., 1:-2].copy_(call.x)
    other.w = torch.empty(*call.w.shape[:2], *call.w.shape[:1:-1]).transpose(2, 3).copy_(call.w)
    other.residual = torch.empty(call.residual.numel() + 1)[1:].view(call.residual.shape).copy_(call.residual)
    assert torch.equal(other.ours(), ours)
    call.x[0, 0, 1, 5], call.x[-1, -1, -1, -9], call.x[0, -1, 0, 0] = math.nan, math.inf, -math.inf
    ours, eager = call.ours(), call.eager()
    for pattern in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(pattern(ours), pattern(eager))


def test_instructions_are_those_of_pytorch_on_the_cpu(generator):
    """ATEN_CPU_CAPABILITY holds PyTorch's kernels to an instruction set, and so it does ours."""
    vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert runs_pytorchs(make(generator, "cpu", torch.float32, *WIDE_FIRST_LAYERS["problem 73"])) != vectors


@has_vectors
def test_other_layers_are_pytorchs_on_the_cpu(generator):
    for x, w, *window in (
        ((2, 8, 80, 60), (64, 8, 3, 3)),  # narrow
        ((1, 16, 64, 80), (64, 16, 3, 3)),  # many terms
        ((1, 8, 64, 80), (64, 8, 1, 1)),  # one tap
        ((1, 8, 64, 80), (64, 4, 3, 3), 1, 1, 1, 2),
    ):
        assert runs_pytorchs(make(generator, "cpu", torch.float32, x, w, *window))
    wide = WIDE_FIRST_LAYERS["problem 73"]
    for dtype, formats in ((torch.float64, "cc"), (torch.bfloat16, "cc"), (torch.float32, "lc"), (torch.float32, "cl")):
        assert runs_pytorchs(make(generator, "cpu", dtype, *wide, formats=formats))


@has_vectors
def test_wide_first_layers_without_avx512():
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        pytest.skip("this is such a CPU, or a process held to AVX2")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    command += ["-k", "wide_first_layers_on_the_cpu"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and f"{len(WIDE_FIRST_LAYERS)} passed" in result.stdout, result.stdout[-2000:]


def test_relu_keeps_nan_on_the_cpu(generator):
    """oneDNN's own fused relu does not."""
    for activation in ("relu", "relu6"):
        call = make(generator, "cpu", torch.float32, (1, 8, 9, 9), (16, 8, 3, 3), activation=activation)
        call.x[0, 0, 4, 4] = math.nan
        ours = call.ours()
        assert ours is not None and ours.isnan().sum() == 16 * 9
