"""Which inputs are so small that forward and backward on a CPU are PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn import conditions

LEAST = dict(conditions.LEAST_OF_STEPS)
C = 16


def model_of(training: bool, first: type[nn.Module] = nn.Conv2d) -> nn.Sequential:
    model = nn.Sequential(first(C, C, 1), nn.BatchNorm2d(C), nn.ReLU())
    nn.init.uniform_(model[1].weight, 0.5, 2)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model.train(training)


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A call's result; its square's gradients, and the statistics that it leaves."""
    y = model(x)
    y.square().mean().backward()
    return y, [y, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


@pytest.mark.parametrize("is_small", [True, False])
@pytest.mark.parametrize("first", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("training", [True, False])
def test_what_runs(training: bool, first: type[nn.Module], is_small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "LEAST_OF_STEPS", LEAST)
    size = LEAST[training] // C - is_small
    x = torch.randn(1, C, 1, size)
    model = model_of(training, first)
    fused = fcb.fuse(copy.deepcopy(model))
    fused(x)
    model(x)
    y, ours = gradients(fused, x)
    assert ("BnScale" in type(y.grad_fn).__name__) is not is_small
    for mine, theirs in zip(ours, gradients(model, x)[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_bias_of_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's convolution refuses it, and the op takes it, whatever the size."""
    monkeypatch.setattr(conditions, "LEAST_OF_STEPS", LEAST)
    module = fcb.ConvBnScale2d(C, C, 1).train(False)
    module.conv.weight.data = module.conv.weight.data.bfloat16()
    module.bn.bfloat16()
    x = torch.randn(2, C, 3, 3).bfloat16()
    with pytest.raises(RuntimeError, match="bias"):
        module._forward_plain(x, None)
    assert "BnScale" in type(module(x).grad_fn).__name__


def test_modes_that_are_no_bools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "LEAST_OF_STEPS", LEAST)
    module = fcb.ConvBnScale2d(C, C, 1)
    module.bn.training = None  # type: ignore[assignment]
    assert module(torch.randn(2, C, 3, 3)).requires_grad


def test_dtypes_that_pytorch_does_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "LEAST_OF_STEPS", LEAST)
    model = model_of(training=True)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    x = torch.randn(2, C, 3, 3).bfloat16()
    with pytest.raises(RuntimeError, match="BFloat16"):
        model(x)
    fused = fcb.fuse(copy.deepcopy(model))
    y, _ = gradients(fused, x)
    assert y.dtype == torch.bfloat16 and "BnScale" in type(y.grad_fn).__name__
