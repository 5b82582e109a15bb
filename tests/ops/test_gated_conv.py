"""gate_conv_bn_scale: the convolution of a gated input, to the bit, whatever takes the gates along."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_conv_bn as fcb
from common import DTYPES, RESIDUALS, SLOPE, random_bn
from elementwise_problems import EPS, FACTOR, arrange
from fused_conv_bn import reference

ops = torch.ops.fused_conv_bn
# Shape of the input, filters, kernel, window.
PROBLEMS: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], dict[str, Any]]] = {
    "1x1": ((3, 24, 7, 7), 40, (1, 1), {}),
    "1x1 of few pixels": ((9, 16, 1, 2), 24, (1, 1), {}),
    "1x1 of one pixel": ((5, 16, 1, 1), 24, (1, 1), {}),
    "1x1 of many channels": ((2, 528, 5, 6), 16, (1, 1), {}),
    "1x1 of odd channels": ((2, 13, 5, 6), 7, (1, 1), {}),
    "1x1 with a stride": ((2, 16, 9, 8), 8, (1, 1), {"stride": 2}),
    "1x1 with padding": ((2, 16, 9, 8), 8, (1, 1), {"padding": 1}),
    "3x3": ((2, 16, 9, 8), 8, (3, 3), {"padding": 1}),
    "depthwise": ((2, 16, 9, 8), 16, (3, 3), {"padding": 1, "groups": 16}),
    "1-D": ((2, 16, 9), 8, (1,), {}),
    "3-D": ((2, 16, 3, 4, 5), 8, (1, 1, 1), {}),
    "no images": ((0, 16, 9, 8), 8, (1, 1), {}),
}


def tensors(name: str, dtype: torch.dtype, device: str, layout: str, g: torch.Generator) -> tuple[Any, ...]:
    shape, filters, kernel, window = PROBLEMS[name]
    groups = window.get("groups", 1)
    x = arrange(torch.randn(shape, generator=g).to(device, dtype), layout)
    w = torch.randn(filters, shape[1] // groups, *kernel, generator=g).to(device, dtype)
    gates = torch.rand(shape[:2], generator=g).to(device, dtype)
    return x, gates, w, random_bn(filters, dtype, device, g), window


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["", "channels_last"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_is_both_steps(name: str, layout: str, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    """`gate` rounds its results, and eager's product is rounded the same."""
    x, gates, w, bn, window = tensors(name, dtype, device, layout, generator)
    named: dict[str, Any] = {"activation": "silu"}
    ours = fcb.gate_conv_bn_scale(x, gates, w, None, *bn, FACTOR, EPS, **window, **named)
    steps = fcb.conv_bn_scale(fcb.gate(x, gates), w, None, *bn, FACTOR, EPS, **window, **named)
    assert torch.equal(ours, steps) and ours.stride() == steps.stride()
    ones = gates.view(*gates.shape, *(1,) * (x.dim() - 2))
    assert torch.equal(fcb.gate_conv_bn_scale(x, ones, w, None, *bn, FACTOR, EPS, **window, **named), steps)


def algorithms(device: str) -> tuple[str, ...]:
    """Where gates are taken along, and where a pass does it."""
    has_wgmma = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    return ("gemm_sm90", "aten") if has_wgmma else ("by rule",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_epilogues(residual: str, activation: str, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    x, gates, w, bn, _ = tensors("1x1", dtype, device, "channels_last", generator)
    named: dict[str, Any] = {"activation": activation, "negative_slope": SLOPE}
    if residual != "none":
        r = torch.randn(3, 40, 7, 7, generator=generator).to(x).to(memory_format=torch.channels_last)
        named |= {"residual": r, "residual_last": residual == "last"}
    arguments = (w, bn[3] + 1, *bn)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in named.items()}
    exact = reference.gate_conv_bn_scale(*(t.double() for t in (x, gates, *arguments)), FACTOR, EPS, **wide)
    eager = reference.gate_conv_bn_scale(x, gates, *arguments, FACTOR, EPS, **named)
    for algorithm in algorithms(device):
        with fcb.use_algorithm(algorithm):
            ours = fcb.gate_conv_bn_scale(x, gates, *arguments, FACTOR, EPS, **named)
            steps = fcb.conv_bn_scale(x * gates[:, :, None, None], *arguments, FACTOR, EPS, **named)
        assert torch.equal(ours, steps)
        assert (ours.double() - exact).norm() <= 2 * (eager.double() - exact).norm()


def test_gates_in_odd_places(device: str, generator: torch.Generator) -> None:
    """Beside a 16-byte boundary with NaN around them, transposed, expanded."""
    x, gates, w, bn, _ = tensors("1x1", torch.float16, device, "channels_last", generator)
    memory = torch.full((gates.numel() + 16,), math.nan, dtype=x.dtype, device=device)
    views = [memory[i : i + gates.numel()].view(gates.shape) for i in (0, 1, 3)]
    for view in (*views, gates.t().contiguous().t()):
        ours = fcb.gate_conv_bn_scale(x, view.copy_(gates), w, None, *bn)
        assert torch.equal(ours, fcb.conv_bn_scale(fcb.gate(x, gates), w, None, *bn))
    same = gates[:1].expand(3, 24)
    assert torch.equal(
        fcb.gate_conv_bn_scale(x, same, w, None, *bn), fcb.conv_bn_scale(fcb.gate(x, same), w, None, *bn)
    )


def test_gradients(device: str, generator: torch.Generator) -> None:
    x, gates, w, bn, _ = tensors("1x1", torch.float64, device, "", generator)
    for t in (x, gates, w, *bn[2:]):
        t.requires_grad_()
    x, gates, w = x[:2, :3, :2, :2].detach().requires_grad_(), gates[:2, :3].detach().requires_grad_(), w[:, :3]
    w = w.detach().requires_grad_()

    def run(x: Tensor, gates: Tensor, w: Tensor, *affine: Tensor) -> Tensor:
        return fcb.gate_conv_bn_scale(x, gates, w, None, *bn[:2], *affine, FACTOR, EPS, activation="tanh")

    assert torch.autograd.gradcheck(run, (x, gates, w, *bn[2:]), fast_mode=True)
    found = torch.func.grad(lambda g: run(x, g, w, *bn[2:]).sum())(gates.detach())
    (expected,) = torch.autograd.grad(run(x, gates, w, *bn[2:]).sum(), gates)
    torch.testing.assert_close(found, expected)


def test_autocast(device: str, generator: torch.Generator) -> None:
    """As the two functions: the gate in the dtype that it has."""
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        x, gates, w, bn, _ = tensors("1x1", torch.float32, device, "channels_last", generator)
        x, gates = x.to(dtypes[0]), gates.to(dtypes[1])
        with torch.autocast(device, torch.bfloat16):
            ours = fcb.gate_conv_bn_scale(x, gates, w, None, *bn)
            assert ours.dtype == torch.bfloat16
            assert torch.equal(ours, fcb.conv_bn_scale(fcb.gate(x, gates), w, None, *bn))


@pytest.mark.parametrize("name", ["1x1", "1x1 of one pixel", "3x3", "1-D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fakes(name: str, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    for layout in ("", "channels_last"):
        x, gates, w, bn, window = tensors(name, dtype, device, layout, generator)
        lists = {k: [v] if k != "groups" else v for k, v in window.items()}
        op = ops.gate_conv_bn_scale.default
        torch.library.opcheck(op, (x, gates, w, None, *bn, FACTOR, EPS), {**lists, "activation": "relu"})


def test_flops(generator: torch.Generator) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, gates, w, bn, _ = tensors("1x1", torch.float32, "cpu", "", generator)
    with FlopCounterMode(display=False) as counter:
        ops.gate_conv_bn_scale(x, gates, w, None, *bn)
    assert counter.get_total_flops() == 2 * 3 * 7 * 7 * 24 * 40


def test_messages(device: str, generator: torch.Generator) -> None:
    x, gates, w, bn, _ = tensors("1x1", torch.float32, device, "", generator)
    for wrong, message in [
        (gates[:2], r"gate has shape \[2, 24\], expected \[3, 24\] and perhaps ones"),
        (gates.half(), "gate has dtype float16, expected float32, the dtype of input"),
    ]:
        with pytest.raises(RuntimeError, match=f"gate_conv_bn_scale: {message}"):
            fcb.gate_conv_bn_scale(x, wrong, w, None, *bn)
    with pytest.raises(RuntimeError, match="gate_conv_bn_scale: activation is 'elu', expected one of"):
        fcb.gate_conv_bn_scale(x, gates, w, None, *bn, activation="elu")
    with pytest.raises(TypeError, match="gate_conv_bn_scale: gate is None, expected a tensor"):
        fcb.gate_conv_bn_scale(x, None, w, None, *bn)  # type: ignore[arg-type]
