"""bn_scale_cat and gate: values, strides, gradients, memory and messages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fused_conv_bn as fcb
from common import DTYPES, RESIDUALS, SLOPE, long, random_bn
from elementwise_problems import (
    EPS,
    FACTOR,
    LAYOUTS,
    SHAPES,
    allowed,
    arrange,
    check,
    epilogue_of,
    errors,
    long_bn_scale,
    long_of,
)
from fused_conv_bn import reference

ops = torch.ops.fused_conv_bn
# Channels of the parts: whole vectors of every dtype, one of them alone, none, and odd ones.
PARTS = [(8, 16, 40), (64,), (8, 0, 16), (3, 5, 1), (256, 8, 264), (1, 1), (32,) * 30]


def parts_of(shape: tuple[int, ...], channels: tuple[int, ...], layout: str, like: Tensor, g) -> list[Tensor]:
    shapes = [(shape[0], c, *shape[2:]) for c in channels]
    return [
        arrange(torch.randn(s, generator=g).to(like), layout) if math.prod(s) else like.new_empty(s) for s in shapes
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", PARTS, ids=str)
def test_cat(device, dtype, layout, channels, generator):
    """Planes of whole vectors, of odd sizes, shorter than a vector, and none; of several dimensions."""
    for space in ((16, 8), (7, 7), (1, 2), (), (5,), (2, 3, 4), (1, 1)):
        like = torch.empty(0, dtype=dtype, device=device)
        inputs = parts_of((3, 0, *space), channels, layout, like, generator)
        bn = random_bn(sum(channels), dtype, device, generator)
        whole = torch.cat(inputs, 1)
        eager = reference.bn_scale_cat(inputs, *bn, FACTOR, EPS)
        ours = fcb.bn_scale_cat(inputs, *bn, FACTOR, EPS)
        check(ours, eager, long_bn_scale(whole, bn, FACTOR, EPS), layout)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_of_cat(device, dtype, activation, generator):
    for layout, space in (("contiguous", (9, 9)), ("channels_last", (5, 4)), ("contiguous", (2, 1))):
        like = torch.empty(0, dtype=dtype, device=device)
        inputs = parts_of((2, 0, *space), (8, 16, 24), layout, like, generator)
        bn = random_bn(48, dtype, device, generator)
        named = {"activation": activation, "negative_slope": SLOPE}
        eager = reference.bn_scale_cat(inputs, *bn, FACTOR, EPS, **named)
        whole = long_bn_scale(torch.cat(inputs, 1), bn, FACTOR, EPS)
        truth = long_of(whole, {"residual": None, "residual_last": False, **named})
        ours = fcb.bn_scale_cat(inputs, *bn, FACTOR, EPS, **named)
        our_error, eager_error = errors(truth, ours, eager)
        assert our_error <= allowed(eager_error, ours), (our_error, eager_error)


def test_cat_of_mixed_layouts_and_missing_parameters(device, generator):
    like = torch.empty(0, dtype=torch.float16, device=device)
    a, b = (parts_of((2, 0, 6, 5), (c,), layout, like, generator)[0] for c, layout in ((8, "channels_last"), (16, "")))
    mean, var, weight, bias = random_bn(24, torch.float32, device, generator)
    for bn in ((mean, var, None, None), (mean, var, weight, None), (mean, var, None, bias)):
        eager = reference.bn_scale(torch.cat((a, b), 1), *bn, FACTOR, EPS)
        ours = fcb.bn_scale_cat((a, b), *bn, FACTOR, EPS)
        assert ours.is_contiguous() and ours.stride() == eager.stride()
        assert errors(long_bn_scale(torch.cat((a, b), 1), bn, FACTOR, EPS), ours)[0] <= 2 * DTYPES[ours.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_misaligned_parts_and_many(device, dtype, generator):
    """Parts that lie beside a 16-byte boundary, with NaN around them; as many as one call takes, and more."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for count, channels in ((3, 8), (fcb.ops.MOST_PARTS, 8), (fcb.ops.MOST_PARTS + 3, 2)):
            inputs = []
            for i in range(count):
                n = 2 * channels * 4 * 5
                memory = torch.full((n + 24,), math.nan, dtype=dtype, device=device)
                view = memory[i % 11 : i % 11 + n]
                size, strides = (2, channels, 4, 5), torch.empty(2, channels, 4, 5).to(memory_format=memory_format)
                inputs.append(view.as_strided(size, strides.stride()).copy_(torch.randn(size, generator=generator)))
            bn = random_bn(count * channels, dtype, device, generator)
            ours = fcb.bn_scale_cat(inputs, *bn, FACTOR, EPS, activation="relu")
            whole = reference.bn_scale(torch.cat(inputs, 1).double(), *(t.double() for t in bn), FACTOR, EPS).relu()
            assert errors(long(whole), ours)[0] <= 4 * DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (5, 24, 9, 7), (6, 520, 3, 3), (1, 16, 64, 2)], ids=str)
def test_gate(device, dtype, layout, shape, generator):
    x = arrange(torch.randn(shape, generator=generator).to(device, dtype), layout)
    g = torch.rand(shape[:2], generator=generator).to(device, dtype)
    ones = (1,) * (len(shape) - 2)
    for gates in (g, g.view(*shape[:2], *ones), g.t().contiguous().t()):
        eager = x * gates.reshape(*shape[:2], *ones)
        ours = fcb.gate(x, gates)
        assert torch.equal(ours, eager)  # one rounding, as eager has
        strides = reference.bn_scale(x, *random_bn(shape[1], dtype, device, generator)).stride()
        # Those of dimensions of one element are of no account.
        long = [i for i, size in enumerate(shape) if size > 1]
        assert [ours.stride(i) for i in long] == [strides[i] for i in long] or (ours.is_cuda and layout == "permuted")


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogue_of_gate(device, dtype, residual, activation, generator):
    for shape, layout in [((3, 16, 5, 6), "channels_last"), ((2, 12, 9, 11), ""), ((3, 7, 3, 3), "channels_last")]:
        x = arrange(3 * torch.randn(shape, generator=generator).to(device, dtype), layout)
        g = torch.rand(shape[:2], generator=generator).to(device, dtype)
        named = epilogue_of(x, activation, residual, generator)
        truth = long_of(long(x) * long(g)[:, :, None, None], named)
        our_error, eager_error = errors(truth, fcb.gate(x, g, **named), reference.gate(x, g, **named))
        assert our_error <= allowed(eager_error, x), (our_error, eager_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gate_of_misaligned_memory(device, dtype, generator):
    for c, offset in ((16, 1), (16, 3), (24, 8), (5, 0)):
        n = 3 * c * 4 * 7
        memory = torch.full((n + 16,), math.nan, dtype=dtype, device=device)
        x = memory[offset : offset + n].as_strided((3, c, 4, 7), (28 * c, 1, 7 * c, c))
        x.copy_(torch.randn(x.shape, generator=generator))
        g = torch.rand(3 * c + 3, generator=generator).to(device, dtype)[offset % 4 :][: 3 * c].view(3, c)
        assert torch.equal(fcb.gate(x, g), x * g[:, :, None, None])


def test_many_images(device, generator):
    """More than a grid has rows."""
    x = torch.randn(65537, 8, 1, 2, generator=generator).to(device).to(memory_format=torch.channels_last)
    g = torch.rand(65537, 8, generator=generator).to(device)
    assert torch.equal(fcb.gate(x, g), x * g[:, :, None, None])


def test_empty(device):
    for shape in ((0, 8, 4, 4), (2, 0, 4, 4), (2, 8, 0, 4)):
        x = torch.empty(shape, device=device)
        assert fcb.gate(x, x.new_ones(shape[:2])).shape == shape
        bn = [x.new_ones(2 * shape[1])] * 2
        expected = torch.cat((x, x), 1)
        assert fcb.bn_scale_cat([x, x], *bn).shape == expected.shape


def test_gradients(device, generator):
    """By PyTorch's formulas, and the same results in grad mode."""
    x, y = (torch.randn(2, c, 4, 3, generator=generator).double().to(device) for c in (3, 5))
    bn = random_bn(8, torch.float64, device, generator)
    g = torch.rand(2, 3, generator=generator).double().to(device)
    residual = torch.randn(2, 3, 4, 3, generator=generator).double().to(device)
    for t in (x, y, g, bn[2], bn[3], residual):
        t.requires_grad_()
    cat = lambda x, y, w, b: fcb.bn_scale_cat([x, y], *bn[:2], w, b, FACTOR, EPS, activation="silu")  # noqa: E731
    assert torch.autograd.gradcheck(cat, (x, y, bn[2], bn[3]))
    assert torch.autograd.gradcheck(lambda x, g, r: fcb.gate(x, g, residual=r, activation="tanh"), (x, g, residual))
    with torch.no_grad():
        raw = cat(x, y, bn[2], bn[3])
    torch.testing.assert_close(raw, cat(x, y, bn[2], bn[3]))
    # Transforms of torch.func see PyTorch's ops.
    found = torch.func.grad(lambda x: fcb.gate(x, g).sum())(x)
    torch.testing.assert_close(found, g[:, :, None, None].expand_as(x))


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_messages(device, grad):
    """The same where PyTorch's ops would compute."""
    x, y = torch.randn(2, 3, 4, 4, device=device), torch.randn(2, 5, 4, 4, device=device)
    c = torch.ones(8, device=device)
    x.requires_grad_(grad)
    for inputs, message in [
        ([], "expected"),
        (
            [x, y[:1]],
            r"inputs\[1\] has shape \[1, 5, 4, 4\], expected \[2, 3, 4, 4\], the shape of inputs\[0\], but for",
        ),
        ([x, y[..., 0]], r"inputs\[1\] has shape \[2, 5, 4\], expected \[2, 3, 4, 4\]"),
        ([x, y.double()], r"inputs\[1\] has dtype float64, expected float32, the dtype of inputs\[0\]"),
        ([x, x], r"running_mean has shape \[8\], expected \[6\], one element for each channel of input"),
        ([x] * 200, "inputs has 200 tensors, expected 1 to 128"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            (fcb if grad and len(inputs) < 200 else ops).bn_scale_cat(inputs, c, c)
    with pytest.raises(RuntimeError, match="activation is 'elu', expected one of"):
        fcb.bn_scale_cat([x, y], c, c, activation="elu")
    with pytest.raises(TypeError, match=r"inputs\[1\] is of type list, expected a tensor"):
        fcb.bn_scale_cat([x, [1]], c, c)
    for wrong, kind in ((x, "Tensor"), (None, "NoneType"), (3, "int")):
        with pytest.raises(
            TypeError, match=f"bn_scale_cat: inputs is of type {kind}, expected a list or tuple of tensors"
        ):
            fcb.bn_scale_cat(wrong, c, c)
    for gates, message in [
        (c, r"gate has shape \[8\], expected \[2, 3\] and perhaps ones"),
        (x, r"gate has shape \[2, 3, 4, 4\], expected \[2, 3\] and perhaps ones"),
        (torch.ones(2, 3, device=device).half(), "gate has dtype float16, expected float32, the dtype of input"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            (fcb if grad else ops).gate(x, gates)
    with pytest.raises(RuntimeError, match=r"residual has shape \[2, 5, 4, 4\], expected \[2, 3, 4, 4\]"):
        fcb.gate(x, torch.ones(2, 3, device=device), residual=y)
    with pytest.raises(RuntimeError, match="activation is 'elu', expected one of"):
        fcb.gate(x, torch.ones(2, 3, device=device), activation="elu")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fakes(device, memory_format, generator):
    x, y = (torch.randn(2, c, 4, 3, generator=generator).to(device, memory_format=memory_format) for c in (3, 5))
    bn = random_bn(8, torch.float32, device, generator)
    with torch.no_grad():
        torch.library.opcheck(ops.bn_scale_cat.default, ([x, y], *bn), {"activation": "relu"})
        torch.library.opcheck(ops.gate.default, (x, torch.rand(2, 3, device=device)), {"residual": x})
