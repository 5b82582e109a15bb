"""conv_bn_scale against float64 and eager PyTorch: what BatchNorm's tensors may be, and how they are folded."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
from torch import Tensor

from conv_problems import BN_TENSORS, FACTOR, PROBLEMS, check, dtypes, is_covered, make
from fused_conv_bn import reference


@pytest.mark.parametrize("problem", PROBLEMS)
@dtypes
def test_bn_problems(conv_device, dtype, problem, generator):
    for formats, residual, activation in (("cc", "none", "none"), ("ll", "last", "silu"), ("lc", "first", "sigmoid")):
        check(
            make(
                *(generator, conv_device, dtype, *PROBLEMS[problem]),
                formats=formats,
                residual=residual,
                activation=activation,
                bn=True,
            )
        )


@dtypes
def test_bn_parts_that_may_be_missing(conv_device, dtype, generator):
    covered = 0
    for given in itertools.product((False, True), repeat=3):
        for x, w, groups in (((2, 5, 13, 11), (9, 5, 3, 3), 1), ((2, 16, 9, 14), (16, 1, 3, 3), 16)):
            call = make(generator, conv_device, dtype, x, w, 1, 1, 1, groups, activation="relu", bn=True)
            for name, kept in zip(("conv_bias", "weight", "bias"), given, strict=True):
                setattr(call, name, getattr(call, name) if kept else None)
            covered += check(call)
    assert covered or not is_covered(dtype, depthwise=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_bn_tensors_of_either_dtype(conv_device, dtype, generator):
    """Those of a 16-bit input may be float32, all of them or each by itself."""
    covered = 0
    for wide in ((True,) * 5, *(tuple(i == j for i in range(5)) for j in range(5))):
        for formats in ("cc", "ll"):
            call = make(generator, conv_device, dtype, (2, 8, 13, 11), (9, 8, 3, 3), formats=formats, bn=True)
            for name, w in zip(BN_TENSORS, wide, strict=True):
                drawn = getattr(call, name).float()
                # Digits that the 16-bit dtype does not hold.
                setattr(call, name, drawn * (1 + 2.0**-13) if w else drawn.to(dtype))
            covered += check(call)
    assert covered or not is_covered(dtype, depthwise=False)


@pytest.mark.parametrize("scaling_factor", [0.0, 1.0, -2.5, 1e-30, 3e4])
def test_bn_scaling_factors(conv_device, scaling_factor, generator):
    for dtype in (torch.float32, torch.float16):
        for problem in (((2, 8, 13, 11), (9, 8, 3, 3)), PROBLEMS["depthwise"]):
            call = make(generator, conv_device, dtype, *problem, activation="leaky_relu", bn=True)
            call.scaling_factor = scaling_factor
            check(call)


def test_bn_far_from_zero(conv_device, generator):
    """A running mean of 1e4 beside a deviation of 1: taken away before anything is scaled, it costs no digits. The
    convolution's own roundings are those of 1e4, for eager as for us."""
    for dtype in (torch.float32, torch.float64):
        for problem in ("problem 73", "depthwise"):
            for formats in ("cc", "ll"):
                call = make(generator, conv_device, dtype, *PROBLEMS[problem], formats=formats, bn=True)
                call.x.add_(1e4)
                call.running_mean.copy_(call.convolved().double().mean((0, 2, 3)) + call.conv_bias)
                check(call)


def kinds(y: Tensor) -> Tensor:
    """1 for NaN, 2 and 3 for the infinities."""
    return y.isnan() + 2 * y.isposinf() + 3 * y.isneginf()


@pytest.mark.parametrize("name", BN_TENSORS)
def test_bn_of_values_that_are_not_finite(conv_device, name, generator):
    """As in eager, as BatchNorm's definition has it, or as one affine has that BatchNorm is folded into. They differ where the
    scale is infinite: eager on the CPU computes x * scale + (bias - mean * scale), NaN where the definition has infinity."""
    covered = 0
    for activation in ("none", "relu", "sigmoid", "hardswish"):
        call = make(generator, conv_device, torch.float32, (2, 8, 9, 8), (6, 8, 3, 3), activation=activation, bn=True)
        for i, value in enumerate((math.nan, math.inf, -math.inf)):
            getattr(call, name)[i] = value
        call.running_var[4], call.eps = 0, 0.0
        ours = call.ours()
        if ours is None:
            continue
        covered += 1
        wide = call.to(conv_device, torch.float64)
        bias, mean, var, weight, shift = (reference.per_channel(t, 4) for t in wide.affine())
        x, scale = wide.convolved(), var.rsqrt() * weight
        answers = ((x + bias - mean) * scale + shift, x * scale + (shift - (mean - bias) * scale))
        expected = [reference.activate(y * FACTOR, activation).float() for y in answers]
        with contextlib.suppress(ValueError):  # torch 2.11 and some others refuse an eps of 0
            expected.append(call.eager())
        found = kinds(ours)
        assert torch.stack([found == kinds(y) for y in expected]).any(0).all(), activation
    assert covered or not is_covered(torch.float32, depthwise=False)


def test_bn_tensors_that_are_views(conv_device, generator):
    """Not contiguous, and off every boundary."""
    for dtype in (torch.float32, torch.float16):
        call = make(generator, conv_device, dtype, *PROBLEMS["problem 73"], bn=True)
        expected = call.ours()
        for name, t in zip(BN_TENSORS, call.affine(), strict=True):
            setattr(call, name, torch.stack([t, t.neg()], 1)[:, 0])
        strided = call.ours()
        for i, name in enumerate(BN_TENSORS):
            t = getattr(call, name)
            setattr(call, name, torch.empty(t.numel() + 8, device=t.device, dtype=dtype)[i + 1 :][: t.numel()].copy_(t))
        moved = call.ours()
        assert expected is None or (torch.equal(strided, expected) and torch.equal(moved, expected))


def test_bn_follows_parameters_that_change_behind_its_back(conv_device, generator):
    """Nothing is kept from one call to the next: writes through .data, which no version counter sees, count."""
    call = make(generator, conv_device, torch.float32, *PROBLEMS["problem 73"], bn=True)
    for name in (*BN_TENSORS, "w"):
        before = call.ours()
        getattr(call, name).data.mul_(2)
        if before is not None:
            assert check(call) and not torch.equal(call.ours(), before)
