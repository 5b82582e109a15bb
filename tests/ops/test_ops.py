"""The ops against float64, eager PyTorch and their own promises: numbers, strides, memory, errors, streams.

Truth is the reference in float64; for float64 itself it is computed in numpy's 80-bit long double.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
    long_affine,
    long_bn_scale,
    long_of,
)
from fused_conv_bn import reference

ops = torch.ops.fused_conv_bn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bn_scale(device, dtype, layout, shape, generator):
    x = arrange(torch.randn(shape, generator=generator).to(device, dtype), layout)
    bn = random_bn(shape[1], dtype, device, generator)
    truth = long_bn_scale(x, bn, FACTOR, EPS)
    eager = reference.bn_scale(x, *bn, FACTOR, EPS)
    check(fcb.bn_scale(x, *bn, FACTOR, EPS), eager, truth, layout)

    out = torch.full_like(eager, math.nan)
    strides = out.stride()
    assert fcb.bn_scale(x, *bn, FACTOR, EPS, out=out) is out
    assert out.stride() == strides
    assert errors(truth, out)[0] <= allowed(errors(truth, eager)[0], out)

    ours = arrange(x.contiguous().clone(), layout)
    strides = ours.stride()
    assert fcb.bn_scale_(ours, *bn, FACTOR, EPS) is ours
    assert ours.stride() == strides
    assert errors(truth, ours)[0] <= allowed(errors(truth, eager)[0], ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(device, dtype, generator):
    """Shapes, layouts, missing weight or bias and parameter dtypes at random."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(60):
        dim = draw(2, 6)
        shape = (draw(1, 5), draw(1, 70), *(draw(1, 12) for _ in range(dim - 2)))
        layout = LAYOUTS[draw(0, len(LAYOUTS))]
        x = arrange(torch.randn(shape, generator=generator).to(device, dtype), layout)
        wide = dtype.itemsize == 2 and draw(0, 2)
        mean, var, weight, bias = random_bn(shape[1], torch.float32 if wide else dtype, device, generator)
        bn = (mean, var, weight if draw(0, 3) else None, bias if draw(0, 3) else None)
        factor, eps = float(torch.randn((), generator=generator)), 10.0 ** draw(-6, 1)
        ours = fcb.bn_scale(x, *bn, factor, eps)
        truth = long_bn_scale(x, bn, factor, eps)
        if device == "cpu" or not wide or (bn[2] is not None and bn[3] is not None):
            check(ours, reference.bn_scale(x, *bn, factor, eps), truth, layout)
        assert errors(truth, ours)[0] <= 4 * DTYPES[dtype], (shape, x.stride())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_parameter_dtypes(device, dtype, generator):
    """Each BN tensor of a 16-bit input may be 16-bit or float32 by itself."""
    x = torch.randn(2, 8, 5, 5, generator=generator).to(device, dtype)
    for mask in range(16):
        bn = tuple(t.float() if mask >> i & 1 else t for i, t in enumerate(random_bn(8, dtype, device, generator)))
        truth = long_bn_scale(x, bn, FACTOR, EPS)
        assert errors(truth, fcb.bn_scale(x, *bn, FACTOR, EPS))[0] <= 2 * DTYPES[dtype]
        scale, shift = fcb.fold_bn(*bn, FACTOR, EPS)
        expected = reference.fold_bn(*(t.double() for t in bn), FACTOR, EPS)
        assert scale.dtype == shift.dtype == torch.float32
        torch.testing.assert_close((scale, shift), tuple(t.float() for t in expected), rtol=2**-23, atol=0)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_shift(device, dtype, residual, activation, generator):
    for shape, layout in [
        ((2, 12, 9, 11), "contiguous"),
        ((2, 16, 5, 6), "channels_last"),
        ((3, 7, 3, 3), "permuted"),
        ((2, 6, 2, 2), "sliced"),
        ((5, 24), "contiguous"),
        ((2, 5, 4, 3, 6), "channels_last"),
    ]:
        x = arrange(3 * torch.randn(shape, generator=generator).to(device, dtype), layout)
        kwargs = epilogue_of(x, activation, residual, generator)
        _, _, scale, shift = random_bn(
            shape[1], torch.float64 if dtype == torch.float64 else torch.float32, device, generator
        )
        eager = reference.scale_shift(x, scale, shift, **kwargs)
        truth = long_of(long_affine(x, scale, shift), kwargs)
        ours = fcb.scale_shift(x, scale, shift, **kwargs)
        our_error, eager_error = errors(truth, ours, eager)
        assert our_error <= allowed(eager_error, ours), (shape, our_error, eager_error)
        if layout != "permuted" or device == "cpu":  # see check()
            assert ours.stride() == F.batch_norm(x, shift.to(dtype), scale.abs().to(dtype)).stride()

        out = torch.full_like(ours, math.nan)
        assert fcb.scale_shift(x, scale, shift, out=out, **kwargs) is out and torch.equal(out, ours)
        if kwargs["residual"] is not None:  # out may be the residual
            inplace = kwargs["residual"].clone(memory_format=torch.preserve_format)
            fcb.scale_shift(x, scale, shift, out=inplace, **{**kwargs, "residual": inplace})
            assert torch.equal(inplace, ours)
        assert fcb.scale_shift_(x, scale, shift, **kwargs) is x and torch.equal(x, ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [name for name in reference.ACTIVATIONS if name != "none"])
def test_activations_by_element(device, dtype, activation, generator):
    """Over all magnitudes, each result by itself: within twice eager's largest error and a roundoff, relative to the larger of
    the argument and the result. The arguments are exact, so that the activation alone errs."""
    size = 2.0 ** torch.linspace(-20, 7, 60000, dtype=torch.float64)
    x = torch.cat([size, -size, torch.linspace(-12, 12, 60000, dtype=torch.float64)]).to(dtype).view(1, 1, -1)
    kwargs = epilogue_of(x, activation, "none", generator)
    truth = long_of(long(x), kwargs)
    sizes = np.maximum(abs(long(x)), abs(truth)) + 1e-300
    acc = x.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    eager = reference.activate(acc, activation, SLOPE).to(dtype)
    one = torch.ones(1, device=device, dtype=acc.dtype)
    got, eagers = (
        float((abs(long(y) - truth) / sizes).max()) / DTYPES[dtype]
        for y in (fcb.scale_shift(x.to(device), one, None, **kwargs), eager)
    )
    assert got <= 2 * eagers + 1, (got, eagers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_short_polynomials(device, dtype, activation):
    """Of every argument in 16 bits: 2^-12.5 of the result, as epilogue.h says, behind its rounding. gelu's tail is held to 5."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite() & ((x >= -5) | (activation == "tanh"))].view(1, 1, -1)
    truth = long_of(long(x), {"activation": activation, "residual": None, "residual_last": False})
    ours = long(fcb.scale_shift(x.to(device), None, None, activation=activation))
    least = torch.finfo(dtype).smallest_normal  # below, a result's rounding is as large as this one's
    allowed_errors = (DTYPES[dtype] + 2.0**-12.5) * np.maximum(abs(truth), least)
    wrong = ~((abs(ours - truth) <= allowed_errors) | (ours == truth))
    assert not wrong.any(), (long(x)[wrong][:4], ours[wrong][:4], truth[wrong][:4])


@pytest.mark.parametrize("negative_slope", [0.0, 0.01, 1.0, 1.5, -0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slopes_of_leaky_relu(device, dtype, negative_slope, generator):
    x = torch.randn(3, 5, 7, 9, generator=generator).to(device, dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    ours = fcb.scale_shift(x, None, None, activation="leaky_relu", negative_slope=negative_slope)
    expected = F.leaky_relu(x.to(acc), negative_slope).to(dtype)
    assert torch.equal(ours, expected)
    unused = fcb.scale_shift(x, None, None, activation="relu", negative_slope=negative_slope)
    assert torch.equal(unused, x.relu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 12, 9, 11), (3, 7, 3, 3), (5, 24)], ids=str)
def test_missing_scale_or_shift(device, dtype, shape, generator):
    """They count as 1 and 0: the same bits."""
    x = torch.randn(shape, generator=generator).to(device, dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    _, _, scale, shift = random_bn(shape[1], acc, device, generator)
    one, zero = torch.ones_like(scale), torch.zeros_like(shift)
    for residual in RESIDUALS:
        kwargs = epilogue_of(x, "gelu", residual, generator)
        for a, b in ((scale, None), (None, shift), (None, None)):
            expected = fcb.scale_shift(x, one if a is None else a, zero if b is None else b, **kwargs)
            assert torch.equal(fcb.scale_shift(x, a, b, **kwargs), expected)
            assert torch.equal(fcb.scale_shift(x, a, b, out=torch.full_like(x, math.nan), **kwargs), expected)
            assert torch.equal(fcb.scale_shift_(x.clone(), a, b, **kwargs), expected)
    y = fcb.scale_shift(x, None, None)
    assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bn_scale_with_an_epilogue(device, dtype, residual, activation, generator):
    for shape, layout in [((2, 12, 9, 11), "contiguous"), ((2, 16, 5, 6), "channels_last"), ((5, 24), "contiguous")]:
        x = arrange(torch.randn(shape, generator=generator).to(device, dtype), layout)
        kwargs = epilogue_of(x, activation, residual, generator, layout)
        bn = random_bn(shape[1], dtype, device, generator)
        truth = long_of(long_bn_scale(x, bn, FACTOR, EPS), kwargs)
        eager = reference.bn_scale(x, *bn, FACTOR, EPS, **kwargs)
        ours = fcb.bn_scale(x, *bn, FACTOR, EPS, **kwargs)
        check(ours, eager, truth, layout)
        out = torch.full_like(ours, math.nan)
        assert fcb.bn_scale(x, *bn, FACTOR, EPS, out=out, **kwargs) is out and torch.equal(out, ours)
        if kwargs["residual"] is not None:
            inplace = kwargs["residual"].clone(memory_format=torch.preserve_format)
            fcb.bn_scale(x, *bn, FACTOR, EPS, out=inplace, **{**kwargs, "residual": inplace})
            assert torch.equal(inplace, ours)
        assert fcb.bn_scale_(x, *bn, FACTOR, EPS, **kwargs) is x and torch.equal(x, ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_bn(device, dtype, generator):
    """Within one rounding of the float64 value."""
    for channels in (0, 1, 3, 300):
        mean, var, weight, bias = random_bn(channels, dtype, device, generator)
        conv_bias = torch.randn(channels, generator=generator).to(device, dtype)
        for args in [
            (mean, var, weight, bias, FACTOR, EPS, conv_bias),
            (mean, var, None, None, -0.5, 1e-3, None),
            (mean, var, weight, None, 2.0, 0.0, conv_bias),
        ]:
            scale, shift = fcb.fold_bn(*args)
            wide = [t.double() if isinstance(t, Tensor) else t for t in args]
            expected = reference.fold_bn(*wide)
            acc = torch.float64 if dtype == torch.float64 else torch.float32
            assert scale.dtype == shift.dtype == acc and scale.shape == shift.shape == (channels,)
            rtol = 8 * 2.0**-53 if dtype == torch.float64 else 2.0**-24
            torch.testing.assert_close(scale.double(), expected[0], rtol=rtol, atol=0)
            # The shift is a difference: its error is relative to the larger of its terms.
            terms = (wide[0].abs() + (0 if wide[6] is None else wide[6].abs())) * expected[0].abs() + expected[1].abs()
            assert bool(((shift.double() - expected[1]).abs() <= rtol * terms).all())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_mean(device, layout, generator):
    """A mean of 1e4 with a deviation of 1 comes out as well, element by element, as BatchNorm's definition allows."""
    x = arrange(
        (1e4 + torch.randn(4, 16, 17, 17, generator=generator, dtype=torch.float64)).to(device, torch.float32), layout
    )
    _, var, weight, bias = random_bn(16, torch.float32, device, generator)
    mean = torch.full((16,), 1e4, device=device)
    truth = torch.from_numpy(long_bn_scale(x, (mean, var, weight, bias), FACTOR, EPS).astype(np.float64)).to(device)
    ours = fcb.bn_scale(x, mean, var, weight, bias, FACTOR, EPS).double()
    scale = reference.per_channel((weight * torch.rsqrt(var + EPS) * FACTOR).abs(), 4)
    shift = reference.per_channel((bias * FACTOR).abs(), 4)
    # x - mean is exact here (Sterbenz), then three or four roundings of each term.
    bound = 2.0**-24 * (6 * (x - 1e4).abs() * scale + 3 * shift)
    assert bool(((ours - truth).abs() <= bound).all())


@pytest.mark.usefixtures("gelu_of_infinity")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_non_finite_values_pass_as_in_eager(device, dtype, activation):
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-30, 3.0, -3.0, 60000.0, -60000.0])
    x = values.repeat(2, 3, 7, 1).to(device, dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor([1.0, -2.0, 0.0], device=device, dtype=acc)
    shift = torch.tensor([0.0, 1.0, math.inf], device=device, dtype=acc)
    other = x.flip(-1).contiguous()
    for residual, last in ((None, False), (other, False), (other, True)):
        kwargs = {"activation": activation, "negative_slope": SLOPE, "residual_last": last}
        ours = fcb.scale_shift(x, scale, shift, residual=residual, **kwargs)
        wide = None if residual is None else residual.to(acc)
        eager = reference.scale_shift(x.to(acc), scale, shift, residual=wide, **kwargs).to(dtype)
        assert torch.equal(ours.isnan(), eager.isnan())
        assert torch.equal(ours.isposinf(), eager.isposinf()) and torch.equal(ours.isneginf(), eager.isneginf())


def test_float16_conversions_on_the_cpu(generator):
    """Every float16 and bfloat16 value survives the identity, and float32 results round as PyTorch rounds them."""
    one, zero = torch.ones(1), torch.zeros(1)
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, -1)
        torch.testing.assert_close(fcb.scale_shift(every, one, zero), every, rtol=0, atol=0, equal_nan=True)
        for exponent in range(-30, 18):
            scale = 2.0**exponent * (1 + torch.rand(1, generator=generator))
            ours = fcb.scale_shift(every, scale, zero)
            torch.testing.assert_close(ours, (every.float() * scale).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (1, 4, 8, 8), (3, 16, 2, 2)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_misaligned_views(device, dtype, shape, layout, generator):
    """Input, residual and output each slide over a 16-byte boundary; the memory around the output keeps its sentinels."""
    numel, pad = math.prod(shape), 2 * 16 // dtype.itemsize
    steps = range(16 // dtype.itemsize + 1)
    values, residual_values = (torch.randn(numel, generator=generator).to(device, dtype) for _ in range(2))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    _, _, scale, shift = random_bn(shape[1], acc, device, generator)
    bn = random_bn(shape[1], dtype, device, generator)

    def view(buffer: Tensor, offset: int) -> Tensor:
        dense = torch.empty(shape, device="meta")
        dense = arrange(dense, layout)
        return buffer[offset : offset + numel].as_strided(shape, dense.stride(), buffer.storage_offset() + offset)

    def at(source: Tensor, offset: int) -> Tensor:
        buffer = torch.full((numel + 2 * pad,), math.nan, device=device, dtype=dtype)
        buffer[offset : offset + numel] = source
        return view(buffer, offset)

    expected = fcb.scale_shift(at(values, 0), scale, shift, residual=at(residual_values, 0), activation="relu")
    expected_bn = fcb.bn_scale(at(values, 0), *bn, FACTOR, EPS)
    sentinel = torch.full((numel + 2 * pad,), -7.0, device=device, dtype=dtype)
    for x_offset in steps:
        for out_offset in steps:
            x, residual = at(values, x_offset), at(residual_values, (x_offset + out_offset) % len(steps))
            buffer = sentinel.clone()
            out = view(buffer, pad // 2 + out_offset)
            fcb.scale_shift(x, scale, shift, residual=residual, activation="relu", out=out)
            assert torch.equal(out, expected)
            out.fill_(-7.0)
            assert torch.equal(buffer, sentinel)
            fcb.bn_scale(x, *bn, FACTOR, EPS, out=out)
            assert torch.equal(out, expected_bn)
            out.fill_(-7.0)
            assert torch.equal(buffer, sentinel)
        buffer = sentinel.clone()
        inplace = view(buffer, pad // 2 + x_offset)
        inplace.copy_(view(values, 0))
        fcb.bn_scale_(inplace, *bn, FACTOR, EPS)
        assert torch.equal(inplace, expected_bn)
        inplace.fill_(-7.0)
        assert torch.equal(buffer, sentinel)


@pytest.mark.parametrize(
    "shape", [(0, 3), (2, 0), (2, 3, 0), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 4, 0), (1, 2, 0, 3, 3)], ids=str
)
def test_empty(device, shape):
    x = torch.empty(shape, device=device)
    bn = random_bn(shape[1], torch.float32, device, torch.Generator())
    assert fcb.bn_scale(x, *bn).shape == shape
    assert fcb.bn_scale_(x, *bn) is x
    out = torch.empty(shape, device=device)
    assert fcb.scale_shift(x, bn[0], bn[1], residual=x, out=out) is out


def test_non_contiguous_parameters(device, generator):
    x = torch.randn(2, 8, 5, 5, generator=generator).to(device)
    bn = random_bn(8, torch.float32, device, generator)
    strided = tuple(torch.stack([t, t.neg()], 1)[:, 0] for t in bn)
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(fcb.bn_scale(x, *strided), fcb.bn_scale(x, *bn))
    assert torch.equal(fcb.scale_shift(x, strided[2], strided[3]), fcb.scale_shift(x, bn[2], bn[3]))
    assert all(torch.equal(a, b) for a, b in zip(fcb.fold_bn(*strided), fcb.fold_bn(*bn), strict=True))


def test_out_in_another_layout(device, generator):
    """The result goes where it is asked to, whatever the layout it was computed in."""
    x = torch.randn(2, 8, 5, 6, generator=generator).to(device)
    bn = random_bn(8, torch.float32, device, generator)
    expected = fcb.bn_scale(x, *bn)
    for layout in LAYOUTS:
        out = arrange(torch.full_like(x, math.nan), layout)
        fcb.bn_scale(x, *bn, out=out)
        assert torch.equal(out, expected)
        fcb.bn_scale(arrange(x, "channels_last"), *bn, out=out)
        assert torch.equal(out, expected)


def test_one_thread_and_many_agree(generator):
    x = torch.randn(7, 33, 31, 29, generator=generator)
    bn = random_bn(33, torch.float32, "cpu", generator)
    many, threads = fcb.bn_scale(x, *bn), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(fcb.bn_scale(x, *bn), many)
    finally:
        torch.set_num_threads(threads)


def test_baseline_instruction_set():
    """The CPU kernels for machines without AVX2: this file's CPU tests once more, in a process held to them."""
    if os.environ.get("ATEN_CPU_CAPABILITY") == "default":
        pytest.skip("this is that process")
    selection = "cpu and (test_scale_shift or test_bn_scale or conversions or misaligned)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", selection]
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-2000:]


def test_string_argument_does_not_leak():
    x, one = torch.ones(1, 1), torch.ones(1)
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # noqa: E731, SIM115
    for count in (20_000, 200_000):  # the first round fills the allocator
        before = resident()
        for _ in range(count):
            ops.scale_shift_(x, one, one, activation="hardswish")
    assert resident() - before < 200_000 * 16


# ---- bad input -----------------------------------------------------------------------------------------------------------

X = torch.randn(2, 3, 4, 4)
C3, C4 = torch.ones(3), torch.ones(4)
BAD = [
    (lambda: fcb.bn_scale(torch.ones(3), C3, C3), r"bn_scale: input has shape \[3\], expected 2 to 5 dimensions"),
    (lambda: fcb.bn_scale(torch.ones(1, 3, 1, 1, 1, 1), C3, C3), "expected 2 to 5 dimensions"),
    (lambda: fcb.bn_scale(X.int(), C3, C3), "bn_scale: input has dtype Int, expected float32, float16, bfloat16 or float64"),
    (lambda: fcb.bn_scale(X, C4, C3), r"bn_scale: running_mean has shape \[4\], expected \[3\]"),
    (lambda: fcb.bn_scale(X, C3, C3.view(1, 3)), r"bn_scale: running_var has shape \[1, 3\], expected \[3\]"),
    (lambda: fcb.bn_scale(X, C3, C3, C3.double()), "bn_scale: weight has dtype float64, expected float32 with input of dtype float32"),
    (lambda: fcb.bn_scale(X.half(), C3, C3, C3, C3.bfloat16()), "bn_scale: bias has dtype bfloat16, expected float16 or float32"),
    (lambda: fcb.bn_scale(X, C3, C3, eps=-1.0), "bn_scale: eps is -1, expected 0 or more"),
    (lambda: fcb.bn_scale(X, C3, C3, out=torch.empty(2, 3, 4, 5)), r"bn_scale: out has shape \[2, 3, 4, 5\], expected \[2, 3, 4, 4\]"),
    (lambda: fcb.bn_scale(X, C3, C3, out=X.double()), "bn_scale: out has dtype float64, expected float32"),
    (lambda: fcb.bn_scale(X, C3, C3, out=torch.empty(1, 3, 4, 4).expand(2, 3, 4, 4)), "bn_scale: out has stride 0 in dimension 0"),
    (lambda: fcb.bn_scale_(torch.empty(1, 3, 4, 4).expand(2, 3, 4, 4), C3, C3), "bn_scale_: input has stride 0 in dimension 0"),
    (lambda: fcb.scale_shift(X, C4, C3), r"scale_shift: scale has shape \[4\], expected \[3\]"),
    (lambda: fcb.scale_shift(X, C3, C3.half()), "scale_shift: shift has dtype float16, expected float32"),
    (lambda: fcb.scale_shift(X.double(), C3, C3), "scale_shift: scale has dtype float32, expected float64"),
    (lambda: fcb.scale_shift(X, C3, C3, residual=X[:1]), r"scale_shift: residual has shape \[1, 3, 4, 4\], expected \[2, 3, 4, 4\]"),
    (lambda: fcb.scale_shift(X, C3, C3, residual=X.half()), "scale_shift: residual has dtype float16, expected float32"),
    (lambda: fcb.scale_shift(X, C3, C3, activation="gelu_erf"), f"scale_shift: activation is 'gelu_erf', expected one of {', '.join(map(repr, reference.ACTIVATIONS))}$"),
    (lambda: fcb.bn_scale(X, C3, C3, activation=""), "bn_scale: activation is '', expected one of 'none', 'relu'"),
    (lambda: fcb.bn_scale(X, C3, C3, residual=X[:1]), r"bn_scale: residual has shape \[1, 3, 4, 4\], expected \[2, 3, 4, 4\]"),
    (lambda: fcb.bn_scale_(X.clone(), C3, C3, residual=X.double()), "bn_scale_: residual has dtype float64, expected float32"),
    (lambda: fcb.scale_shift(X, None, C4), r"scale_shift: shift has shape \[4\], expected \[3\]"),
    (lambda: fcb.fold_bn(X, C3), "fold_bn: running_mean has shape .*, expected one dimension"),
    (lambda: fcb.fold_bn(C3.int(), C3), "fold_bn: running_mean has dtype Int"),
    (lambda: fcb.fold_bn(C3, C4), r"fold_bn: running_var has shape \[4\], expected \[3\]"),
    (lambda: fcb.fold_bn(C3.double(), C3), "fold_bn: running_var has dtype float32, expected float64"),
    (lambda: fcb.fold_bn(C3.half(), C3.bfloat16()), "fold_bn: running_var has dtype bfloat16, expected float16 or float32"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_bad_input(call, message):
    with pytest.raises(RuntimeError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value) and ".h:" not in str(caught.value)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kwargs", [{"negative_slope": "0.1"}, {"residual_last": "yes"}], ids=str)
def test_types_of_arguments_that_do_not_matter(grad, kwargs):
    """An argument that the activation or a missing residual makes idle is checked as well."""
    x, ones = torch.randn(2, 3, 4, requires_grad=grad), torch.ones(3)
    with pytest.raises(RuntimeError, match=next(iter(kwargs))):
        fcb.bn_scale(x, ones, ones, activation="relu", **kwargs)
    with pytest.raises(RuntimeError, match=next(iter(kwargs))):
        fcb.conv_bn_scale_train(x, torch.ones(3, 3, 1), None, None, None, activation="relu", **kwargs)


X, C3, W = torch.randn(2, 3, 4, 4), torch.ones(3), torch.ones(3, 3, 1, 1)
TENSORS = {
    "fold_bn": (C3, C3),
    "bn_scale": (X, C3, C3),
    "bn_scale_": (X, C3, C3),
    "bn_scale_train": (X, C3, C3),
    "scale_shift": (X, C3, C3),
    "scale_shift_": (X, C3, C3),
    "gate": (X, X[..., :1, :1]),
    "max_pool2d": (X,),
    "spatial_mean": (X,),
    "squeeze_excite": (X, W, None, W, C3),
    "conv_scale_shift": (X, W, C3, C3),
    "conv_bn_scale": (X, W, None, C3, C3),
    "conv_bn_scale_train": (X, W, None, C3, C3),
}
MORE = {"max_pool2d": (2,)}


@pytest.mark.parametrize("name", TENSORS)
def test_what_is_no_tensor(name):
    """By the function, and None, which PyTorch passes on, by the op as well."""
    arguments = [*TENSORS[name], *MORE.get(name, ())]
    function, op = getattr(fcb, name), getattr(torch.ops.fused_conv_bn, name)
    function(*(t.clone() if isinstance(t, torch.Tensor) else t for t in arguments))
    optional = {argument.name for argument in op.default._schema.arguments if argument.type.kind() == "OptionalType"}
    for i, argument in enumerate(op.default._schema.arguments[: len(TENSORS[name])]):
        for value, what in ((None, "None"), ([1.0], "of type list"), (2.0, "of type float")):
            if value is None and argument.name in optional:
                continue
            wrong = [*arguments[:i], value, *arguments[i + 1 :]]
            with pytest.raises(TypeError, match=f"^{name}: {argument.name} is {what}, expected a tensor( or None)?$"):
                function(*wrong)
        if (
            argument.name not in optional and len(TENSORS[name]) > 1
        ):  # with no tensor at all PyTorch's dispatcher ends it
            with pytest.raises(RuntimeError, match=f"^fused_conv_bn: {argument.name} is None, expected a tensor"):
                op(*arguments[:i], None, *arguments[i + 1 :])


def test_overlap_is_refused_before_anything_is_written(device):
    buffer = torch.arange(2 * 3 * 16 + 40, dtype=torch.float32, device=device)
    kept = buffer.clone()
    x, shifted = (buffer[i : i + 96].view(2, 3, 4, 4) for i in (0, 8))
    c3 = torch.ones(3, device=device)
    with pytest.raises(
        RuntimeError, match="bn_scale: out shares memory with input, expected the same tensor or separate"
    ):
        fcb.bn_scale(x, c3, c3, out=shifted)
    with pytest.raises(RuntimeError, match="bn_scale: out shares memory with running_var, expected separate memory"):
        fcb.bn_scale(x.clone(), c3, buffer[5:8], out=x)
    with pytest.raises(RuntimeError, match="scale_shift: out shares memory with residual"):
        fcb.scale_shift(x.clone(), c3, c3, residual=shifted, out=x)
    with pytest.raises(RuntimeError, match="scale_shift_: input shares memory with shift"):
        fcb.scale_shift_(x, c3, buffer[:3])
    assert torch.equal(buffer, kept)
    fcb.bn_scale(x, c3 - 1, c3, out=x, eps=0.0)  # the same tensor as a whole is fine
    assert torch.equal(buffer, kept)
