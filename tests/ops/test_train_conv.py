"""conv_bn_scale_train in its three forms, against float64 and eager.

Outputs, running statistics, special values, errors. Every test starts from random running statistics and parameters.
"""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_conv_bn as fcb
from common import DTYPES, assert_no_worse_than_eager, long
from elementwise_problems import allowed, arrange, epilogue_of, errors, long_of
from fused_conv_bn import reference
from train_problems import (
    CONV_CASES,
    CONVOLUTIONS,
    EPS,
    FACTOR,
    MOMENTUM,
    STORED_CASES,
    check_forms,
    check_running,
    check_statistics,
    check_stored_statistics,
    covered,
    dtypes,
    long_train,
    state,
)


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("case", CONV_CASES)
def test_conv_bn_scale_train(train_device, dtype, layout, case, generator):
    size, weight_size, *window = CONV_CASES[case]
    device = train_device
    x = arrange(torch.randn(size, generator=generator).to(device, dtype), layout)
    w, b = ((torch.randn(s, generator=generator) / 4).to(device, dtype) for s in (weight_size, weight_size[:1]))
    b = b * 8  # a bias that would show
    before = state(weight_size[0], dtype, device, generator)
    ours, eagers = copy.deepcopy(before), copy.deepcopy(before)
    arguments = (FACTOR, MOMENTUM, EPS, *window)
    y = covered(lambda: fcb.conv_bn_scale_train(x, w, b, *ours, *arguments))
    eager = reference.conv_bn_scale_train(x, w, b, *eagers, *arguments)
    assert y.dtype == dtype and y.stride() == eager.stride()
    convolved = CONVOLUTIONS[x.dim()](x.cpu().double(), w.cpu().double(), None, *window)
    truth = long_train(long(convolved), *before[2:])
    if dtype == torch.float64:  # the truth is eager's own arithmetic
        assert errors(truth, y)[0] < 1e-14
        return
    got, eagers_error = errors(truth, y, eager)
    assert got <= 2 * eagers_error + 0.5 * DTYPES[dtype]
    # What is averaged is a convolution in the dtype, of independent roundings.
    check_running(long(convolved), before, ours, b, slack=8 * DTYPES[dtype])


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_conv_epilogue(train_device, dtype, activation, generator):
    for (size, weight_size, *window), layout, residual in (
        (CONV_CASES["3x3"], "contiguous", "first"),
        (CONV_CASES["3x3"], "channels_last", "last"),
        (CONV_CASES["stride and padding"], "channels_last", "none"),
        (CONV_CASES["1x1"], "contiguous", "last"),
    ):
        x = arrange(torch.randn(size, generator=generator).to(train_device, dtype), layout)
        w, b = (
            (torch.randn(s, generator=generator) / 4).to(train_device, dtype) for s in (weight_size, weight_size[:1])
        )
        before = state(weight_size[0], dtype, train_device, generator)
        ours, eagers = copy.deepcopy(before), copy.deepcopy(before)
        arguments = (FACTOR, MOMENTUM, EPS, *window)
        convolved = CONVOLUTIONS[x.dim()](x.cpu().double(), w.cpu().double(), None, *window)
        kwargs = epilogue_of(convolved.to(x), activation, residual, generator)
        try:
            y = fcb.conv_bn_scale_train(x, w, b, *ours, *arguments, **kwargs)
        except RuntimeError as error:
            if "does not cover this convolution" not in str(error):
                raise
            continue
        eager = reference.conv_bn_scale_train(x, w, b, *eagers, *arguments, **kwargs)
        assert y.dtype == dtype and y.stride() == eager.stride()
        got, eagers_error = errors(long_of(long_train(long(convolved), *before[2:]), kwargs), y, eager)
        assert got <= allowed(eagers_error, y), (size, layout, got, eagers_error)
        check_running(long(convolved), before, ours, b, slack=8 * DTYPES[dtype])


@dtypes
@pytest.mark.parametrize("case", ["3x3", "depthwise", "first layer of wide rows", "1d", "3d"])
def test_conv_forms(train_device, dtype, case, generator):
    """The mean is that without the convolution's bias."""
    size, weight_size, *window = CONV_CASES[case]
    window = [*([v] if isinstance(v, int) else list(v) for v in window[:3]), window[3]]
    for layout, given, residual in itertools.product(("contiguous", "channels_last"), (False, True), ("none", "last")):
        x = arrange(torch.randn(size, generator=generator).to(train_device, dtype), layout)
        w = (torch.randn(weight_size, generator=generator) / 4).to(train_device, dtype)
        before = state(weight_size[0], dtype, train_device, generator) if given else [None] * 4
        bias = before[3] if given else None
        convolved = CONVOLUTIONS[x.dim()](x.cpu().double(), w.cpu().double(), None, *window)
        kwargs = epilogue_of(convolved.to(x), "hardswish", residual, generator)
        behind = [FACTOR, MOMENTUM, EPS, *window]
        statistics = covered(
            lambda x=x, w=w, bias=bias, before=before, behind=behind, kwargs=kwargs: check_forms(
                "conv_bn_scale_train", before, x, w, bias, behind, **kwargs
            )
        )
        check_statistics(long(convolved), *statistics, dtype, slack=8 * DTYPES[dtype])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_conv_parts_that_may_be_missing(train_device, memory_format, generator):
    x = torch.randn(4, 5, 12, 10, generator=generator).to(train_device).to(memory_format=memory_format)
    w = torch.randn(8, 5, 3, 3, generator=generator).to(train_device)
    all_of_them = [
        torch.randn(8, generator=generator).to(train_device),
        *state(8, torch.float32, train_device, generator),
    ]
    for bias, statistics, weight in itertools.product((0, 1), repeat=3):
        mask = (bias, statistics, statistics, weight, weight)
        before = [t if m else None for t, m in zip(all_of_them, mask, strict=True)]
        ours, eagers = copy.deepcopy(before), copy.deepcopy(before)
        y = covered(lambda o=ours: fcb.conv_bn_scale_train(x, w, *o))
        eager = reference.conv_bn_scale_train(x, w, *eagers)
        doubles = [None if t is None else t.double() for t in before]
        truth = reference.conv_bn_scale_train(x.double(), w.double(), *doubles)
        assert_no_worse_than_eager(y, eager, truth)
        for i in (1, 2) if statistics else ():
            assert_no_worse_than_eager(ours[i], eagers[i], doubles[i])


# Filters that sums over the input can serve: channels, filter, padding, image.
PATCH_CASES = [
    (8, (3, 3), 0, (4, 16, 16)),
    (8, (3, 3), 1, (5, 17, 19)),
    (5, (3, 3), 2, (3, 9, 8)),
    (3, (3, 3), (0, 1), (2, 6, 33)),
    (1, (3, 3), (1, 0), (7, 5, 4)),
    (6, (2, 3), (1, 0), (3, 12, 20)),
    (7, (3, 2), 1, (3, 11, 12)),
    (4, (1, 3), (0, 1), (2, 7, 10)),
    (2, (1, 1), 0, (6, 4, 5)),
    (8, (3, 3), 0, (41, 60, 64)),  # tasks that two warps share
    (8, (3, 3), 1, (1, 300, 61)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", PATCH_CASES, ids=str)
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_statistics_from_the_input_are_exact(device, case, layout, dtype, generator):
    """Sums of exact products in float64, so that nothing is rounded but what is put out: at any mean."""
    channels, kernel, padding, (batch, *image) = case
    x = torch.randn(batch, channels, *image, generator=generator) * 3 + 20
    x = arrange(x.to(device, dtype), layout)
    w = torch.randn(10, channels, *kernel, generator=generator).to(device, dtype)
    mean, var = torch.zeros(10, device=device), torch.zeros(10, device=device)
    with fcb.use_algorithm("stem_sm90", "from_input"):
        y = covered(lambda: fcb.conv_bn_scale_train(x, w, None, mean, var, None, None, 1, 1, EPS, padding=padding))
    assert y.isfinite().all()
    truth = F.conv2d(x.double(), w.double(), padding=padding)
    u = 2.0**-24
    exact_mean, exact_var = truth.mean((0, 2, 3)), truth.var((0, 2, 3))
    # Of float64 sums: so many terms, each of them at most the largest, before the mean's square is taken away.
    slack = 2.0**-53 * 64 * (exact_var + exact_mean.square() + w.double().abs().sum((1, 2, 3)).square() * 23**2)
    assert ((mean.double() - exact_mean).abs() <= u * exact_mean.abs() + slack).all()
    assert ((var.double() - exact_var).abs() <= u * exact_var + slack).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0, 50])
@pytest.mark.parametrize("case", STORED_CASES)
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_statistics_are_of_the_values_as_stored(device, case, mean, dtype, generator):
    with fcb.use_algorithm("gemm_sm90"):
        check_stored_statistics(*STORED_CASES[case], dtype=dtype, device=device, mean=mean, generator=generator)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("channels", [4, 8])
def test_conv_of_values_far_from_zero(train_device, channels, memory_format, generator):
    """A mean of 1e4 and a deviation of 1: results as good as eager's, statistics as good as a convolution allows.

    That may be off by twice as much as eager's, by a value that has to do with the result or not, so that the deviation
    is off by as much at most, and the variance by what follows.
    """
    x = torch.randn(16, channels, 15, 16, generator=generator).add(1e4)
    x = x.to(train_device).to(memory_format=memory_format)
    w = torch.randn(12, channels, 3, 3, generator=generator).to(train_device)
    weight, bias = state(12, torch.float32, train_device, generator)[2:]
    ours, eagers = ([torch.zeros(12, device=train_device) for _ in range(2)] for _ in range(2))
    y = covered(lambda: fcb.conv_bn_scale_train(x, w, None, *ours, weight, bias, FACTOR, 1, EPS))
    eager = reference.conv_bn_scale_train(x, w, None, *eagers, weight, bias, FACTOR, 1, EPS)
    convolved = F.conv2d(x.double(), w.double())
    truth = reference.bn_scale_train(convolved, None, None, weight.double(), bias.double(), FACTOR, 1, EPS)
    assert_no_worse_than_eager(y, eager, truth)
    mean, var = convolved.mean((0, 2, 3)), convolved.var((0, 2, 3))
    off = 2 * (F.conv2d(x, w).double() - convolved).square().mean((0, 2, 3)).sqrt()
    u = 2.0**-23
    assert ((ours[0].double() - mean).abs() <= off + u * mean.abs()).all()
    assert ((ours[1].double() - var).abs() <= 2 * var.sqrt() * off + off.square() + u * var).all()


# Of 16 bits as gemm_sm90 and gemm_sm80 take them.
KINDS = [(torch.float32, 6, torch.contiguous_format), (torch.float16, 8, torch.channels_last)]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype, channels, memory_format", KINDS, ids=str)
def test_conv_of_values_that_are_not_finite(train_device, dtype, channels, memory_format, value, generator):
    """What BatchNorm makes of them: nothing is left of any channel that has one."""
    x = torch.randn(3, channels, 10, 12, generator=generator).to(train_device, dtype).to(memory_format=memory_format)
    x[1, 2, 4, 5] = value
    w = torch.randn(8, channels, 3, 3, generator=generator).to(train_device, dtype)
    s = state(8, torch.float32, train_device, generator)
    y = covered(lambda: fcb.conv_bn_scale_train(x, w, None, *s))
    assert y.isnan().all() and s[1].isnan().all()
    assert not s[0].isfinite().any()


@pytest.mark.parametrize("dtype, channels, memory_format", KINDS, ids=str)
def test_conv_is_deterministic(train_device, dtype, channels, memory_format, generator):
    x = torch.randn(8, channels, 40, 41, generator=generator).to(train_device, dtype).to(memory_format=memory_format)
    w = torch.randn(16, channels, 3, 3, generator=generator).to(train_device, dtype)
    before = state(16, torch.float32, train_device, generator)
    results = []
    for _ in range(3):
        s = copy.deepcopy(before)
        results.append([covered(lambda s=s: fcb.conv_bn_scale_train(x, w, None, *s)), *s])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_conv_with_a_large_bias(device, generator):
    """It cancels, and takes no digits of the result with it."""
    x = torch.randn(4, 5, 12, 10, generator=generator).to(device)
    w = torch.randn(8, 5, 3, 3, generator=generator).to(device)
    bias = torch.full((8,), 1e6, device=device)
    s = state(8, torch.float32, device, generator)
    y = fcb.conv_bn_scale_train(x, w, bias, *copy.deepcopy(s))
    truth = reference.conv_bn_scale_train(x.double(), w.double(), None, *(t.double() for t in s))
    without = reference.conv_bn_scale_train(x, w, None, *copy.deepcopy(s))
    assert_no_worse_than_eager(y, without, truth)


@pytest.mark.parametrize("batch", [0, 1])
def test_conv_with_nothing_or_too_little_to_average(device, batch, generator):
    x, w = torch.randn(batch, 4, 3, 3, device=device), torch.randn(6, 4, 3, 3, device=device)
    before = state(6, torch.float32, device, generator)
    ours = copy.deepcopy(before)
    if batch == 0:
        assert fcb.conv_bn_scale_train(x, w, None, *ours).shape == (0, 6, 1, 1)
    else:
        message = r"^conv_bn_scale_train: the output has shape \[1, 6, 1, 1\], expected more than 1 value per channel"
        with pytest.raises(RuntimeError, match=message):
            fcb.conv_bn_scale_train(x, w, None, *ours)
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_weight": torch.ones(6, 3, 3, 3)}, r"conv_weight has shape \[6, 3, 3, 3\], expected 4 in dimension 1"),
        ({"conv_weight": torch.ones(6, 4, 3, 3).half()}, "conv_weight has dtype float16, expected float32"),
        ({"conv_weight": torch.ones(6, 4, 9, 3)}, r"conv_weight has shape \[6, 4, 9, 3\], expected a kernel that fits"),
        (
            {"conv_bias": torch.ones(5)},
            r"conv_bias has shape \[5\], expected \[6\], one element for each channel of the output",
        ),
        ({"running_mean": torch.ones(4)}, r"running_mean has shape \[4\], expected \[6\], .* of the output"),
        ({"running_var": None}, "running_var is missing, expected one beside running_mean"),
        ({"stride": (1, 2, 3)}, "stride has 3 values, expected 1 or 2"),
        (
            {"groups": 3},
            "groups is 3, expected a divisor of the 4 channels of input and of the 6 output channels of conv_weight",
        ),
        ({"eps": -1.0}, "eps is -1, expected 0 or more"),
        (
            {"residual": torch.ones(2, 4, 5, 5)},
            r"residual has shape \[2, 4, 5, 5\], expected \[2, 6, 3, 3\], the shape of the output",
        ),
        ({"activation": "GELU"}, "activation is 'GELU', expected one of 'none', 'relu'"),
    ],
)
def test_conv_bad_arguments(change, message, device):
    arguments = {
        "input": torch.ones(2, 4, 5, 5),
        "conv_weight": torch.ones(6, 4, 3, 3),
        "conv_bias": None,
        "running_mean": torch.zeros(6),
        "running_var": torch.ones(6),
        **change,
    }
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    before = copy.deepcopy(arguments)
    with pytest.raises(RuntimeError, match=f"^conv_bn_scale_train: {message}"):
        fcb.conv_bn_scale_train(**arguments)
    assert all(torch.equal(v, before[k]) for k, v in arguments.items() if isinstance(v, Tensor))


def test_running_mean_in_the_weight_is_refused(device):
    w = torch.ones(6, 4, 3, 3, device=device)
    message = "running_mean shares memory with conv_weight, expected separate memory"
    with pytest.raises(RuntimeError, match=message):
        fcb.conv_bn_scale_train(
            torch.ones(2, 4, 5, 5, device=device), w, None, w.view(-1)[:6], torch.ones(6, device=device)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conv_under_autocast(device, dtype, generator):
    """As eager: input and weight are cast, BatchNorm's parameters stay float32."""
    x = torch.randn(4, 5, 12, 10, generator=generator).to(device)
    w = torch.randn(8, 5, 3, 3, generator=generator).to(device)
    b = torch.randn(8, generator=generator).to(device)
    before = state(8, torch.float32, device, generator)
    ours, eagers = copy.deepcopy(before), copy.deepcopy(before)
    with torch.autocast(device, dtype=dtype):
        y = fcb.conv_bn_scale_train(x, w, b, *ours, FACTOR, MOMENTUM, EPS)
        eager = reference.conv_bn_scale_train(x, w, b, *eagers, FACTOR, MOMENTUM, EPS)
    assert y.dtype == eager.dtype == dtype
    doubles = [t.double() for t in before]
    truth = reference.conv_bn_scale_train(x.double(), w.double(), b.double(), *doubles, FACTOR, MOMENTUM, EPS)
    assert_no_worse_than_eager(y, eager, truth)
    for i in (0, 1):
        assert ours[i].dtype == torch.float32
        assert_no_worse_than_eager(ours[i], eagers[i], doubles[i])
