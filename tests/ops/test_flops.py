"""What torch.utils.flop_counter counts of every op: as much as of PyTorch's own that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fused_conv_bn as fcb
from common import random_bn

_ops = torch.ops.fused_conv_bn
N, C, K = 3, 4, 6
WINDOW = [2], [1], [1], 2
"""stride, padding, dilation, groups."""


def flop(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def tensors() -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, C, 9, 8, generator=generator)
    return x, torch.randn(K, C // 2, 3, 5, generator=generator), random_bn(K, torch.float32, "cpu", generator)


def test_every_op_with_a_convolution_has_a_formula() -> None:
    names = {name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    ours = {name for name in names if hasattr(_ops, name)} & set(dir(_ops))
    assert {"conv_bn_scale", "gate", "bn_scale_backward"} <= ours
    with_formula = {name for name in ours if getattr(_ops, name) in flop_registry}
    convolves = {name for name in ours if name.lstrip("_").removeprefix("gate_").startswith("conv_")}
    assert with_formula == {*convolves, "squeeze_excite"}


@pytest.mark.parametrize("form", ["", "_stats", "_functional", "sums"])
def test_training(form: str) -> None:
    x, w, bn = tensors()
    x, w, mean, var, weight, bias = (t.to("meta") for t in (x, w, *bn))  # the last form is CUDA's
    name = "_conv_bn_scale_train_sums" if form == "sums" else f"conv_bn_scale_train{form}"
    expected = flop(lambda: torch.conv2d(x, w, None, *WINDOW))
    assert flop(lambda: getattr(_ops, name)(x, w, None, mean, var, weight, bias, 2.0, 0.1, 1e-5, *WINDOW)) == expected
    assert expected > 0


def test_gradients() -> None:
    """Of the functions: forward, and PyTorch's convolution backward."""
    x, w, bn = tensors()
    found = []
    for run in (
        lambda: fcb.conv_bn_scale(x, w, None, *bn, 2.0, 1e-5, *WINDOW, activation="relu"),
        lambda: fcb.reference.conv_bn_scale(x, w, None, *bn, 2.0, 1e-5, *WINDOW, activation="relu"),
    ):
        x.requires_grad_(), w.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            y = run()
            forward = counter.get_total_flops()
            y.sum().backward()
        found.append((forward, counter.get_total_flops()))
    # A convolution of few terms is computed again in backward.
    (ours, ours_total), (eager, eager_total) = found
    assert ours == eager > 0
    assert ours_total - eager_total in (0, ours)


def test_the_gradient_of_a_weight() -> None:
    """Of the CUDA kernel, for which shapes are enough."""
    x, w, bn = (t.to("meta") if isinstance(t, Tensor) else t for t in tensors())
    x, w = x.new_empty(N, C, 9, 8), w.new_empty(K, C, 3, 5)
    dy = torch.conv2d(x, w, None, 2, 1)
    mean, var, weight, _ = (t.to("meta") for t in bn)
    arguments = [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    expected = flop(lambda: torch.ops.aten.convolution_backward(dy, x, w, None, *arguments))
    got = flop(lambda: _ops._conv_bn_wgrad(dy, None, x, w, None, mean, var, weight, 2.0, 1e-5, [2], [1], [1], 1))
    assert got == expected > 0


def test_what_has_no_convolution_counts_nothing() -> None:
    """As PyTorch's BatchNorm, pools and products of elements."""
    x, _, _ = tensors()
    bn = random_bn(C, torch.float32, "cpu", torch.Generator().manual_seed(2))
    mean, var, weight, bias = bn
    invstd, sums, count = torch.rsqrt(var + 1e-5), torch.zeros(2, C).double(), torch.ones(C).double()
    calls: dict[str, Callable[[], Any]] = {
        "bn_scale": lambda: fcb.bn_scale(x, *bn),
        "bn_scale_": lambda: fcb.bn_scale_(x, *bn),
        "bn_scale.out": lambda: fcb.bn_scale(x, *bn, out=torch.empty_like(x)),
        "bn_scale_cat": lambda: fcb.bn_scale_cat([x[:, :1], x[:, 1:]], *bn),
        "scale_shift": lambda: fcb.scale_shift(x, weight, bias),
        "fold_bn": lambda: fcb.fold_bn(*bn),
        "gate": lambda: fcb.gate(x, x[:, :, 0, 0]),
        "max_pool2d": lambda: fcb.max_pool2d(x, 2),
        "spatial_mean": lambda: fcb.spatial_mean(x),
        "bn_scale_train": lambda: fcb.bn_scale_train(x, *bn),
        "bn_scale_train_functional": lambda: _ops.bn_scale_train_functional(x, *bn),
        "bn_scale_backward": lambda: _ops.bn_scale_backward(
            x, x, None, None, mean, var, None, weight, bias, None, 1.0, 1e-5, needs_input=True, needs_weight=True
        ),
        "bn_scale_backward_sums": lambda: _ops.bn_scale_backward_sums(
            x, x, None, None, mean, invstd, weight, bias, 1.0
        ),
        "bn_scale_backward_apply": lambda: _ops.bn_scale_backward_apply(
            x, x, None, None, mean, invstd, weight, bias, sums, count, 1.0
        ),
        "bn_moments": lambda: _ops.bn_moments(x),
    }
    eager = (
        lambda: torch.batch_norm(x, weight, bias, mean, var, False, 0.0, 1e-5, True),
        lambda: torch.max_pool2d(x, 2),
        lambda: x.mean((2, 3)),
        lambda: x * x,
    )
    assert all(flop(call) == 0 for call in eager)
    assert {name: flop(call) for name, call in calls.items()} == dict.fromkeys(calls, 0)
