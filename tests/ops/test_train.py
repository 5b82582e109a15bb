"""bn_scale_train in its three forms, against float64 and eager.

Outputs, running statistics, special values, layouts, errors. For float64 itself the truth is numpy's long double.
Every test starts from random running statistics and parameters.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_conv_bn as fcb
from common import DTYPES, RESIDUALS, assert_no_worse_than_eager, long
from elementwise_problems import arrange, check, epilogue_of, long_of
from fused_conv_bn import reference
from train_problems import (
    EPS,
    FACTOR,
    LONG_SHAPES,
    MOMENTUM,
    OPS,
    TRAIN_SHAPES,
    check_forms,
    check_running,
    check_statistics,
    dtypes,
    layouts,
    long_moments,
    long_train,
    state,
)


@dtypes
@layouts
@pytest.mark.parametrize("shape", TRAIN_SHAPES, ids=str)
def test_bn_scale_train(device, dtype, layout, shape, generator):
    x = arrange((torch.randn(shape, generator=generator) + 0.5).to(device, dtype), layout)
    before = state(shape[1], dtype, device, generator)
    ours, eagers = copy.deepcopy(before), copy.deepcopy(before)
    saved = x.clone()
    y = fcb.bn_scale_train(x, *ours, FACTOR, MOMENTUM, EPS)
    eager = reference.bn_scale_train(x, *eagers, FACTOR, MOMENTUM, EPS)
    check(y, eager, long_train(long(x), *before[2:]), layout)
    check_running(long(x), before, ours)
    assert torch.equal(x, saved)
    assert all(torch.equal(a, b) for a, b in zip(ours[2:], before[2:], strict=True))


@dtypes
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_epilogue(device, dtype, residual, activation, generator):
    for shape, layout in (
        ((3, 8, 16, 16), "contiguous"),
        ((2, 16, 5, 6), "channels_last"),
        ((5, 7, 3, 3), "sliced"),
        ((6, 24), "contiguous"),
    ):
        x = arrange((torch.randn(shape, generator=generator) + 0.5).to(device, dtype), layout)
        kwargs = epilogue_of(x, activation, residual, generator)
        before = state(shape[1], dtype, device, generator)
        ours, eagers = copy.deepcopy(before), copy.deepcopy(before)
        saved = x.clone(), None if kwargs["residual"] is None else kwargs["residual"].clone()
        y = fcb.bn_scale_train(x, *ours, FACTOR, MOMENTUM, EPS, **kwargs)
        eager = reference.bn_scale_train(x, *eagers, FACTOR, MOMENTUM, EPS, **kwargs)
        check(y, eager, long_of(long_train(long(x), *before[2:]), kwargs), layout)
        check_running(long(x), before, ours)
        assert torch.equal(x, saved[0])
        assert saved[1] is None or torch.equal(kwargs["residual"], saved[1])


@dtypes
@pytest.mark.parametrize("given", [True, False])
def test_forms(device, dtype, given, generator):
    for shape, layout in (
        ((3, 8, 16, 16), "contiguous"),
        ((2, 16, 5, 6), "channels_last"),
        ((40, 6, 2, 2), "contiguous"),
        ((6, 24), "contiguous"),
        ((2, 4, 3, 5, 6), "sliced channels_last"),
    ):
        x = arrange((torch.randn(shape, generator=generator) * 3 - 2).to(device, dtype), layout)
        before = state(shape[1], dtype, device, generator) if given else [None] * 4
        for activation, residual in (("none", "none"), ("mish", "last"), ("relu", "first")):
            kwargs = epilogue_of(x, activation, residual, generator)
            statistics = check_forms("bn_scale_train", before, x, [FACTOR, MOMENTUM, EPS], **kwargs)
            check_statistics(long(x), *statistics, dtype)


def test_forms_with_float32_parameters(device, generator):
    """The updated statistics have the dtypes of those that were given."""
    x = torch.randn(4, 6, 9, 10, generator=generator).to(device, torch.bfloat16)
    before = state(6, torch.float32, device, generator)
    for wide in itertools.product((False, True), repeat=2):
        mixed = [t if w else t.bfloat16() for t, w in zip(before, (*wide, True, False), strict=True)]
        check_statistics(long(x), *check_forms("bn_scale_train", mixed, x, [FACTOR, MOMENTUM, EPS]), torch.bfloat16)


def test_forms_of_views(device, generator):
    """Running statistics that are not contiguous, and expanded ones, which a functional form may read."""
    x = torch.randn(4, 6, 9, 10, generator=generator).to(device)
    before = state(6, torch.float32, device, generator)
    expected = OPS.bn_scale_train_functional(x, *before, FACTOR, MOMENTUM, EPS)
    strided = [torch.stack([t, t.neg()], 1)[:, 0] for t in before]
    for a, b in zip(OPS.bn_scale_train_functional(x, *strided, FACTOR, MOMENTUM, EPS), expected, strict=True):
        assert torch.equal(a, b)
    one = torch.ones(1, device=device).expand(6)
    dense = OPS.bn_scale_train_functional(x, one.clone(), one.clone(), None, None, FACTOR, MOMENTUM, EPS)
    for a, b in zip(OPS.bn_scale_train_functional(x, one, one, None, None, FACTOR, MOMENTUM, EPS), dense, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
def test_large_inputs(device, dtype, layout, shape, generator):
    x = arrange((torch.randn(shape, generator=generator) * 2 - 3).to(device, dtype), layout)
    before = state(shape[1], dtype, device, generator)
    ours, eagers = copy.deepcopy(before), copy.deepcopy(before)
    y = fcb.bn_scale_train(x, *ours, FACTOR, MOMENTUM, EPS)
    eager = reference.bn_scale_train(x, *eagers, FACTOR, MOMENTUM, EPS)
    check(y, eager, long_train(long(x), *before[2:]), layout)
    check_running(long(x), before, ours)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("mean", "deviation"), [(1e4, 1.0), (-3e5, 1.0), (1.0, 1e-4), (0.0, 1e-12), (1e12, 1e9)])
@pytest.mark.parametrize("shape", [(8, 5, 31, 33), (64, 16, 7, 7), (200, 40, 2, 2)], ids=str)
def test_a_mean_far_from_zero(device, layout, mean, deviation, shape, generator):
    x = arrange((torch.randn(shape, generator=generator) * deviation + mean).to(device), layout)
    before = state(shape[1], torch.float32, device, generator)
    ours, eagers = copy.deepcopy(before), copy.deepcopy(before)
    y = fcb.bn_scale_train(x, *ours, FACTOR, MOMENTUM, 1e-30)
    eager = reference.bn_scale_train(x, *eagers, FACTOR, MOMENTUM, 1e-30)
    check(y, eager, long_train(long(x), *before[2:], 1e-30), layout)
    check_running(long(x), before, ours)


def test_an_outlier_in_front(device, generator):
    """The first element, which sums about it would be thrown off by."""
    for shape in ((4, 3, 40, 40), (64, 8)):
        x = torch.randn(shape, generator=generator).to(device) + 7
        x[0, :] = 1e6
        before = state(shape[1], torch.float32, device, generator)
        ours = copy.deepcopy(before)
        y = fcb.bn_scale_train(x, *ours, FACTOR, MOMENTUM, EPS)
        eager = reference.bn_scale_train(x, *copy.deepcopy(before), FACTOR, MOMENTUM, EPS)
        check(y, eager, long_train(long(x), *before[2:]), "contiguous")
        check_running(long(x), before, ours)


@pytest.mark.parametrize("value", [0.0, 1.0, -12345.678])
def test_a_constant_channel(device, value, generator):
    """Its variance is 0, and the result bias * factor, but for roundings of the mean that eps makes small."""
    for shape in ((6, 4, 20, 21), (70, 12)):
        x = torch.full(shape, value, device=device)
        before = state(shape[1], torch.float32, device, generator)
        ours = copy.deepcopy(before)
        y = fcb.bn_scale_train(x, *ours, FACTOR, MOMENTUM, EPS)
        expected = reference.per_channel(before[3] * FACTOR, y.dim()).expand_as(y)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
        assert_no_worse_than_eager(ours[1], (1 - MOMENTUM) * before[1], (1 - MOMENTUM) * before[1].double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_input_with_float32_parameters(device, dtype, generator):
    """Any mixture of both, for each tensor by itself."""
    x = torch.randn(4, 6, 9, 10, generator=generator).to(device, dtype)
    for wide in itertools.product((False, True), repeat=4):
        before = [
            t if w else t.to(dtype) for t, w in zip(state(6, torch.float32, device, generator), wide, strict=True)
        ]
        ours = copy.deepcopy(before)
        y = fcb.bn_scale_train(x, *ours, FACTOR, MOMENTUM, EPS)
        assert [t.dtype for t in ours] == [t.dtype for t in before] and y.dtype == dtype
        eager = F.batch_norm(x, None, None, *(t.to(dtype) for t in before[2:]), True, MOMENTUM, EPS) * FACTOR
        check(y, eager, long_train(long(x), *before[2:]), "contiguous")
        for i in range(2):
            pair = [before[i]] * 2, [ours[i]] * 2
            mean, var, count = long_moments(long(x))
            exact = (1 - MOMENTUM) * long(pair[0][0]) + MOMENTUM * (mean, var * count / (count - 1))[i]
            assert (abs(long(ours[i]) - exact) <= 2 * DTYPES[ours[i].dtype] * (abs(exact) + 0.01)).all()


@pytest.mark.parametrize("given", list(itertools.product((False, True), repeat=3)), ids=str)
def test_optional_tensors(device, given, generator):
    x = torch.randn(4, 6, 9, 10, generator=generator).to(device)
    statistics, weight, bias = given
    before = state(6, torch.float32, device, generator)
    arguments = [t if g else None for t, g in zip(before, (statistics, statistics, weight, bias), strict=True)]
    ours = copy.deepcopy(arguments)
    y = fcb.bn_scale_train(x, *ours, FACTOR, MOMENTUM, EPS)
    eager = reference.bn_scale_train(x, *copy.deepcopy(arguments), FACTOR, MOMENTUM, EPS)
    check(y, eager, long_train(long(x), *arguments[2:]), "contiguous")
    if statistics:
        check_running(long(x), before, ours)


@pytest.mark.parametrize("momentum", [0.0, 1.0, 0.1, 1 / 3])
def test_momentum(device, momentum, generator):
    x = torch.randn(4, 6, 9, 10, generator=generator).to(device)
    before = state(6, torch.float32, device, generator)
    ours = copy.deepcopy(before)
    fcb.bn_scale_train(x, *ours, FACTOR, momentum, EPS)
    check_running(long(x), before, ours, momentum=momentum)
    if momentum == 0:
        assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


@dtypes
@pytest.mark.parametrize("shape", [(5, 6, 9, 11), (40, 6, 2, 2), (3, 8, 40, 40), (33, 20)], ids=str)
@pytest.mark.parametrize("offset", [1, 3, 7])
def test_misaligned_memory(device, dtype, shape, offset, generator):
    """A view into a buffer of NaN, which any read beyond it would bring into the statistics."""
    x = torch.randn(shape, generator=generator).to(device, dtype)
    buffer = torch.full((x.numel() + 64,), math.nan, device=device, dtype=dtype)
    view = buffer[offset : offset + x.numel()].view(shape)
    view.copy_(x)
    saved = buffer.clone()
    before = state(shape[1], dtype, device, generator)
    ours = copy.deepcopy(before)
    y = fcb.bn_scale_train(view, *ours, FACTOR, MOMENTUM, EPS)
    eager = reference.bn_scale_train(x, *copy.deepcopy(before), FACTOR, MOMENTUM, EPS)
    check(y, eager, long_train(long(x), *before[2:]), "contiguous")
    check_running(long(x), before, ours)
    assert torch.equal(buffer.nan_to_num(99.0), saved.nan_to_num(99.0))


def test_running_buffers_that_are_views(device, generator):
    """Every second element of a buffer; the others stay as they are."""
    x = torch.randn(4, 6, 9, 10, generator=generator).to(device)
    before = state(6, torch.float32, device, generator)
    buffer = torch.full((2, 12), math.pi, device=device)
    views = [row[::2] for row in buffer]
    for view, value in zip(views, before, strict=False):
        view.copy_(value)
    fcb.bn_scale_train(x, *views, *before[2:], FACTOR, MOMENTUM, EPS)
    check_running(long(x), before, views)
    assert torch.equal(buffer[:, 1::2], torch.full((2, 6), math.pi, device=device))
    both = torch.stack(before[:2], 1)  # interleaved
    fcb.bn_scale_train(x, both[:, 0], both[:, 1], *before[2:], FACTOR, MOMENTUM, EPS)
    assert torch.equal(both.t(), torch.stack([v.clone() for v in views]))


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_inf_and_nan(device, dtype, layout, special, generator):
    """They spoil their channel, as in eager, and no other."""
    for shape in ((4, 9, 12, 13), (40, 8, 2, 2)):
        x = torch.randn(shape, generator=generator)
        x[1, 3, 1, 1] = special
        x = arrange(x.to(device, dtype), layout)
        before = state(shape[1], dtype, device, generator)
        ours, eagers = copy.deepcopy(before), copy.deepcopy(before)
        y = fcb.bn_scale_train(x, *ours, FACTOR, MOMENTUM, EPS)
        eager = reference.bn_scale_train(x, *eagers, FACTOR, MOMENTUM, EPS)
        assert torch.equal(y.isnan(), eager.isnan()) and y[:, 3].isnan().all()
        assert torch.equal(ours[1].isnan(), eagers[1].isnan()) and not ours[0][3].isfinite()
        others = [c for c in range(shape[1]) if c != 3]
        check_running(long(x[:, others]), *([t[others] for t in s[:2]] for s in (before, ours)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(16, 30, 33, 35), (150, 48, 3, 3), (64, 512, 7, 7)], ids=str)
def test_results_are_the_same_bits_every_time(device, layout, dtype, shape, generator):
    x = arrange(torch.randn(shape, generator=generator).to(device, dtype), layout)
    before = state(shape[1], torch.float32, device, generator)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (threads, threads, 1, 3):
            torch.set_num_threads(count)
            s = copy.deepcopy(before)
            results.append([fcb.bn_scale_train(x, *s, FACTOR, MOMENTUM, EPS), *s])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 5, 0, 3), (0, 5), (2, 0, 4), (0, 0, 2, 2)], ids=str)
def test_an_empty_input_updates_nothing(device, shape, generator):
    x = torch.randn(shape, device=device)
    before = state(shape[1], torch.float32, device, generator)
    ours = copy.deepcopy(before)
    y = fcb.bn_scale_train(x, *ours, FACTOR, MOMENTUM, EPS)
    assert y.shape == x.shape and all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))
    y, mean, invstd, *running = OPS.bn_scale_train_functional(x, *ours, FACTOR, MOMENTUM, EPS)
    assert y.shape == x.shape and mean.shape == invstd.shape == (shape[1],)
    assert all(torch.equal(a, b) for a, b in zip(running, before, strict=False))


BAD: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "one value": (
        r"input has shape \[1, 3, 1, 1\], expected more than 1 value per channel when training",
        lambda a: a.update(input=a["input"][:1, :, :1, :1]),
    ),
    "one dimension": (
        r"input has shape \[3\], expected 2 to 5 dimensions",
        lambda a: a.update(input=a["input"][0, :, 0, 0]),
    ),
    "integers": ("input has dtype Int, expected float32", lambda a: a.update(input=a["input"].int())),
    "mean alone": (
        "running_var is missing, expected one beside running_mean, or neither of them",
        lambda a: a.update(running_var=None),
    ),
    "variance alone": ("running_mean is missing, expected one beside", lambda a: a.update(running_mean=None)),
    "shape": (
        r"running_var has shape \[4\], expected \[3\], one element for each channel of input",
        lambda a: a.update(running_var=torch.ones(4)),
    ),
    "bias's shape": (r"bias has shape \[1, 3\], expected \[3\]", lambda a: a.update(bias=torch.ones(1, 3))),
    "dtype": (
        "running_mean has dtype float64, expected float32 with input of dtype float32",
        lambda a: a.update(running_mean=torch.ones(3, dtype=torch.float64)),
    ),
    "weight's dtype": (
        "weight has dtype bfloat16, expected float32 with input of dtype float32",
        lambda a: a.update(weight=torch.ones(3, dtype=torch.bfloat16)),
    ),
    "eps": ("eps is -1, expected 0 or more", lambda a: a.update(eps=-1.0)),
    "expanded": (
        "running_mean has stride 0 in dimension 0, expected a memory location for each element",
        lambda a: a.update(running_mean=torch.ones(1).expand(3)),
    ),
    "same buffer": (
        "running_mean shares memory with running_var, expected separate memory",
        lambda a: a.update(running_var=a["running_mean"]),
    ),
    "weight as a buffer": (
        "running_var shares memory with weight, expected separate memory",
        lambda a: a.update(weight=a["running_var"]),
    ),
    "residual's shape": (
        r"residual has shape \[2, 3, 4, 4\], expected \[2, 3, 4, 5\], the shape of input",
        lambda a: a.update(residual=a["input"][..., :4]),
    ),
    "residual's dtype": (
        "residual has dtype float16, expected float32, the dtype of input",
        lambda a: a.update(residual=a["input"].half()),
    ),
    "residual as a buffer": (
        "running_var shares memory with residual, expected separate memory",
        lambda a: a.update(residual=(r := a["input"].clone()), running_var=r[0, 0, 0, :3]),
    ),
    "activation": (
        "activation is 'softplus', expected one of 'none', 'relu'",
        lambda a: a.update(activation="softplus"),
    ),
    "input as a buffer": (
        "running_mean shares memory with input, expected separate memory",
        lambda a: a.update(running_mean=a["input"][0, 0, 0, :3]),
    ),
}


def arguments_of_a_call(device: str) -> dict[str, Any]:
    return {
        "input": torch.randn(2, 3, 4, 5, device=device),
        "running_mean": torch.ones(3, device=device),
        "running_var": torch.ones(3, device=device),
        "weight": torch.ones(3, device=device),
        "bias": torch.ones(3, device=device),
        "scaling_factor": FACTOR,
        "momentum": MOMENTUM,
        "eps": EPS,
    }


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_and_nothing_is_updated(case, device):
    message, spoil = BAD[case]
    arguments = arguments_of_a_call(device)
    spoil(arguments)
    arguments = {
        k: v.to(device) if isinstance(v, Tensor) and v.device.type != device else v for k, v in arguments.items()
    }
    if case == "expanded":
        arguments["running_mean"] = torch.ones(1, device=device).expand(3)
    before = copy.deepcopy({k: v for k, v in arguments.items() if isinstance(v, Tensor)})
    calls = [("bn_scale_train", fcb.bn_scale_train)]
    for form in ("", "_stats", "_functional"):
        calls.append((f"bn_scale_train{form}", getattr(OPS, f"bn_scale_train{form}")))
    for name, call in calls:
        if name.endswith("functional") and ("shares memory" in message or "stride 0" in message):
            continue  # it writes to none of them
        with pytest.raises(RuntimeError, match=f"^{name}: {message}"):
            call(**arguments)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())
    assert all(arguments[name]._version == 0 for name in ("running_mean", "running_var") if arguments[name] is not None)


def test_one_value_is_eagers_error_too():
    """So that the message above is no invention of ours."""
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        F.batch_norm(torch.ones(1, 3, 1, 1), None, None, training=True)
    with pytest.raises(
        RuntimeError, match="bn_scale_train: input has shape .*, expected more than 1 value per channel"
    ):
        fcb.bn_scale_train(torch.ones(1, 3), None, None)


def test_running_statistics_get_a_new_version(device, generator):
    x = torch.randn(2, 3, 4, 5, device=device)
    for update in (
        lambda s: fcb.bn_scale_train(x, *s),
        lambda s: fcb.conv_bn_scale_train(x, torch.ones(3, 3, 1, 1, device=device), None, *s),
    ):
        s = state(3, torch.float32, device, generator)
        update(s)
        assert [t._version > 0 for t in s] == [True, True, False, False]
        saved = s[0].clone().requires_grad_().sigmoid()
        product = saved * s[1].clone().requires_grad_()
        with torch.no_grad():
            update([saved, *s[1:]])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_inference_mode(device, generator):
    with torch.inference_mode():
        x = torch.randn(2, 3, 4, 5, device=device)
        s = state(3, torch.float32, device, generator)
        before = copy.deepcopy(s)
        fcb.bn_scale_train(x, *s, FACTOR, MOMENTUM, EPS)
    check_running(long(x), before, s)
