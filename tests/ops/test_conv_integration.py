"""conv_scale_shift and conv_bn_scale within PyTorch: opcheck, compile, export, autocast, derivatives, flags."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import fused_conv_bn as fcb
from conv_problems import EPS, FACTOR, OPS, Call, channels_last, make

OPCHECKED: dict[str, Callable[[torch.Generator, str], Call]] = {
    "2-D": lambda g, d: make(g, d, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3), [2], [1], [1], 1),
    "channels_last": lambda g, d: make(
        g, d, torch.bfloat16, (2, 4, 9, 8), (6, 2, 3, 3), [1, 2], [1, 0], [1, 2], 2, formats="lc", residual=True
    ),
    "1-D": lambda g, d: make(g, d, torch.float64, (2, 4, 9), (6, 4, 3), [2], [1], [1], 1, activation="silu"),
    "3-D": lambda g, d: make(g, d, torch.float32, (2, 4, 9, 8, 4), (6, 4, 3, 3, 1), [1], [0], [1], 1, formats="cl"),
}


@pytest.mark.parametrize("sample", OPCHECKED)
def test_opcheck(device, sample, generator):
    call = OPCHECKED[sample](generator, device)
    arguments = (call.x, call.w, call.scale, call.shift, *call.window())
    torch.library.opcheck(OPS.conv_scale_shift.default, arguments, call.epilogue())
    torch.library.opcheck(OPS.conv_scale_shift.default, (call.x, call.w, None, call.shift, *call.window()))
    scale = call.scale.abs().to(call.x.dtype)
    bn = scale, scale, None, scale, 1.5, 1e-3
    for conv_bias in (None, scale):
        torch.library.opcheck(
            OPS.conv_bn_scale.default, (call.x, call.w, conv_bias, *bn, *call.window()), call.epilogue()
        )


def test_compiled(device, generator):
    """One graph for all shapes, in any layout, and the same bits."""

    def f(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = fcb.conv_scale_shift(x, w, scale, shift, 2, 1, activation="relu")
        return fcb.conv_scale_shift(x, w, scale, shift, 2, 1, residual=y) + 1

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    inductor = torch.compile(f, fullgraph=True, dynamic=True)
    for shape in ((2, 4, 9, 8), (3, 4, 16, 16), (5, 4, 7, 30)):
        call = make(generator, device, torch.float32, shape, (6, 4, 3, 3))
        expected = f(*call.tensors())
        assert torch.equal(compiled(*call.tensors()), expected)
        torch.testing.assert_close(inductor(*call.tensors()), expected)
    assert counter.frame_count == 1
    call.x = channels_last(call.x)
    assert torch.equal(inductor(*call.tensors()), f(*call.tensors()))
    torch._dynamo.reset()


def test_exported(device, generator):
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return fcb.conv_scale_shift(x, w, scale, shift, padding=1, activation="hardswish")

    call = make(generator, device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3), 1, 1, activation="hardswish")
    batch = torch.export.Dim("n", min=1, max=1024)
    shapes = {"x": {0: batch}, "w": None, "scale": None, "shift": None}

    def exported() -> torch.export.ExportedProgram:
        return torch.export.export(Model(), tuple(call.tensors()), dynamic_shapes=shapes)

    plain = exported()
    with fcb.export_ops():
        kept = exported()
    assert "fused_conv_bn" not in str(plain.graph) and "fused_conv_bn" in str(kept.graph)
    for n in (1, 7):
        call.x = torch.randn(n, 4, 9, 8, generator=generator).to(device)
        ours = call.ours()
        assert torch.equal(kept.module()(*call.tensors()), ours)
        torch.testing.assert_close(plain.module()(*call.tensors()), ours)


@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_as_for_a_convolution(device, dtype, bn, generator):
    call = make(generator, device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3), residual=True, bn=bn)
    low = call.to(device, dtype)
    with torch.autocast(device, dtype=dtype):
        ours = call.ours()
        assert ours is not None and ours.dtype == F.conv2d(call.x, call.w).dtype == dtype
        assert torch.equal(ours, low.ours())
        double = call.to(device, torch.float64)
        assert double.ours().dtype == F.conv2d(double.x, double.w).dtype == torch.float64
        with torch.autocast(device, enabled=False):
            assert call.ours().dtype == torch.float32
        compiled = torch.compile(lambda: call.call(), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(), ours)
    assert call.ours().dtype == torch.float32
    torch._dynamo.reset()


@pytest.mark.parametrize("bn", [False, True])
def test_raw_ops_have_no_derivative(device, bn, generator):
    """A tangent that the convolution inside computed would be the wrong one for the result."""
    window = [1], [0], [1], 1
    call = make(generator, device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3), *window, activation="relu", bn=bn)
    name = "conv_bn_scale" if bn else "conv_scale_shift"
    numbers = (FACTOR, EPS) if bn else ()

    def run(x: Tensor) -> Tensor:
        return getattr(OPS, name)(x, call.w, *call.affine(), *numbers, *window, activation="relu")

    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(call.x, torch.ones_like(call.x))
        assert torch.autograd.forward_ad.unpack_dual(run(x)).tangent is None
    x = call.x.clone().requires_grad_()
    y = run(x)
    with pytest.warns(UserWarning, match=f"{name}: an autograd kernel was not registered"):
        y.sum().backward()
    assert x.grad is None


def test_list_and_string_arguments_do_not_leak():
    x, one = torch.ones(1, 1, 1, 1), torch.ones(1)
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # noqa: E731, SIM115
    for count in (20_000, 100_000):  # the first round fills the allocator
        before = resident()
        for _ in range(count):
            OPS.conv_scale_shift(x, x, one, one, [1, 1], [0, 0], [1, 1], 1, activation="hardswish")
            OPS.conv_bn_scale(x, x, one, one, one, stride=[1, 1], padding=[0, 0], activation="hardsigmoid")
    assert resident() - before < 100_000 * 16


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_flags_stay_as_they_are(device, generator, monkeypatch):
    for flag in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", flag)
        call = make(generator, device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3))
        fcb.conv_scale_shift(*call.tensors(), allow_tf32=not flag)
        assert torch.backends.cudnn.allow_tf32 == flag
