"""Modules run PyTorch's own ops in forward and backward on a CPU where the input is small."""

from __future__ import annotations

import pytest
import torch

import fused_conv_bn as fcb
from fused_conv_bn import conditions

LEAST = dict(conditions.LEAST_OF_STEPS)
C = 16


def runs_ours(module: torch.nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None) -> bool:
    return "BnScale" in type(module(x, residual).grad_fn).__name__


@pytest.mark.parametrize("kind", [fcb.ConvBnScale2d, fcb.ConvTransposeBnScale2d, fcb.LinearBnScale])
@pytest.mark.parametrize("training", [True, False])
def test_what_runs(kind, training, monkeypatch, generator):
    monkeypatch.setattr(conditions, "LEAST_OF_STEPS", LEAST)
    is_linear = kind is fcb.LinearBnScale
    module = kind(C, C, **({} if is_linear else {"kernel_size": 1})).train(training)
    rows = LEAST[training] // C
    large, small = (torch.randn((n, C) if is_linear else (1, C, 1, n), generator=generator) for n in (rows, rows - 1))
    assert runs_ours(module, large) and not runs_ours(module, small)
    assert runs_ours(module, small, torch.randn_like(module(small)))  # the op looks at a residual's shape
    assert torch.equal(module(small), module._forward_plain(small, None)) or training
    module.requires_grad_(False)
    assert not runs_ours(module, small.requires_grad_()) and runs_ours(module, large.requires_grad_())


def test_dtypes_that_pytorch_does_not_mix(monkeypatch, generator):
    """BatchNorm in float32 with a weight of its own in bfloat16: the op takes it, whatever the size."""
    monkeypatch.setattr(conditions, "LEAST_OF_STEPS", LEAST)
    module = fcb.ConvBnScale2d(C, C, 1)
    for p in module.parameters():
        p.data = p.data.bfloat16()
    assert runs_ours(module, torch.randn(2, C, 3, 3, generator=generator).bfloat16())


def test_a_large_result_of_a_small_input(monkeypatch, generator):
    """What an op saves is passes over results."""
    monkeypatch.setattr(conditions, "LEAST_OF_STEPS", LEAST)
    for training in (True, False):
        x = torch.randn(2, 8, 64, LEAST[training] // 4096, generator=generator)  # a quarter of what is small
        assert runs_ours(fcb.ConvBnScale2d(8, 64, 3).train(training), x)
        assert not runs_ours(fcb.ConvBnScale2d(8, 16, 3).train(training), x)
