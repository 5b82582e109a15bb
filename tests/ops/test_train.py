"""BatchNorm with batch statistics: bn_scale_train and conv_bn_scale_train in their three forms, and ConvBnScale2d in training
mode.

Against float64 (for float64 itself against numpy's 80-bit long double) and eager: outputs, running statistics, special
values, layouts, errors, compile, autocast. Every test starts from random running statistics and parameters.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_conv_bn as fcb
from common import DTYPES, RESIDUALS, assert_no_worse_than_eager, long, random_bn
from fused_conv_bn import reference
from test_module import CASES, TRAIN, Plain, models, ops_of, randomize, sample
from test_ops import LAYOUTS, SHAPES, allowed, arrange, check, epilogue_of, errors, long_of

OPS = torch.ops.fused_conv_bn
FACTOR = 1.7
MOMENTUM = 0.3
EPS = 1e-3
CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def values_per_channel(shape: tuple[int, ...]) -> int:
    return math.prod(shape) // shape[1]


# Those of the inference ops, and some that are cut into several parts, or whose parts are cut unevenly.
TRAIN_SHAPES = [shape for shape in SHAPES if values_per_channel(shape) > 1]
LONG_SHAPES = [
    (2, 3, 300, 301),  # planes in several parts, off the 16-byte boundaries
    (1, 2, 70001),
    (150, 5, 7, 7),  # several planes at a time
    (64, 40, 5, 5),
    (700, 48, 3, 3),  # planes shorter than 128 bytes: each pixel a column
    (9000, 24),
    (3001, 33),
    (2, 1030, 9, 9),
    (40, 260, 12, 12),
]


def state(channels: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> list[Tensor]:
    """running_mean, running_var, weight, bias."""
    return list(random_bn(channels, dtype, device, generator))


def long_moments(y: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Of each channel: mean, biased variance, and how many values there are."""
    axes = (0, *range(2, y.ndim))
    mean = y.mean(axes, keepdims=True)
    return mean.reshape(-1), ((y - mean) ** 2).mean(axes), y.size // y.shape[1]


def long_train(y: np.ndarray, weight: Tensor | None, bias: Tensor | None, eps: float = EPS) -> np.ndarray:
    mean, var, _ = long_moments(y)
    shape = (-1,) + (1,) * (y.ndim - 2)
    z = (y - mean.reshape(shape)) / np.sqrt(var + np.longdouble(eps)).reshape(shape)
    if weight is not None:
        z = z * long(weight).reshape(shape)
    if bias is not None:
        z = z + long(bias).reshape(shape)
    return z * np.longdouble(FACTOR)


def adds_in_float32(x: Tensor) -> bool:
    """Whether kernels that gather statistics add the first few values up in float32."""
    return x.is_cuda


def check_running(
    y: np.ndarray,
    before: list[Tensor],
    after: list[Tensor],
    conv_bias: Tensor | None = None,
    momentum: float = MOMENTUM,
    slack: float = 0,
) -> None:
    """Within two roundings of the exact values, of which the mean's is that of its two terms: they may cancel. On CUDA
    also within one of what is averaged.
    ``slack``: what the values that are averaged may be off by."""
    mean, var, count = long_moments(y)
    if conv_bias is not None:
        mean = mean + long(conv_bias)
    u = DTYPES[after[0].dtype]
    # In float64 there is nothing wider to add up in: a few roundings of the largest partial sum.
    roundings = 2 if u > 2.0**-50 else 64
    slack += DTYPES[torch.float32] if adds_in_float32(after[0]) and u > 2.0**-50 else 0
    m = np.longdouble(momentum)
    for old, new, batch, spread in (
        (before[0], after[0], mean, np.sqrt(var)),
        (before[1], after[1], var * count / (count - 1), var),
    ):
        exact = (1 - m) * long(old) + m * batch
        size = abs((1 - m) * long(old)) + abs(m * batch)
        off = abs(long(new) - exact)
        assert (off <= roundings * u * size + slack * m * (spread + abs(batch))).all(), (off / (u * size)).max()


# ---- bn_scale_train --------------------------------------------------------------------------------------------------


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


def check_statistics(
    y: np.ndarray, mean: Tensor, invstd: Tensor, dtype: torch.dtype, eps: float = EPS, slack: float = 0
) -> None:
    """What a backward needs of a batch, in the type that it is accumulated in: within four roundings of the exact values.
    ``slack``: as in check_running, here of what they are made of, so that half of it remains behind a root."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert mean.dtype == invstd.dtype == wide and mean.shape == invstd.shape == y.shape[1:2]
    batch, var, _ = long_moments(y)
    u = DTYPES[wide]
    roundings = 4 if u > 2.0**-50 else 64
    slack += DTYPES[torch.float32] if adds_in_float32(mean) and u > 2.0**-50 else 0
    size = abs(y).mean((0, *range(2, y.ndim)))
    assert (abs(long(mean) - batch) <= roundings * u * size + slack * (np.sqrt(var) + size)).all()
    exact = 1 / np.sqrt(var + np.longdouble(eps))
    assert (abs(long(invstd) - exact) <= (roundings * u + slack) * exact).all()


def check_forms(name: str, before: list[Tensor | None], *arguments: Any, **epilogue: Any) -> tuple[Tensor, Tensor]:
    """All three forms compute the same bits, _functional without a write. Returns mean and invstd.

    ``arguments``: those ahead of the running statistics, a list of those behind the parameters."""
    ahead, behind = arguments[:-1], arguments[-1]

    def run(form: str) -> tuple[Any, list[Tensor | None]]:
        s = copy.deepcopy(before)
        return getattr(OPS, name + form)(*ahead, *s, *behind, **epilogue), s

    y, updated = run("")
    (y_stats, mean, invstd), updated_stats = run("_stats")
    (y_functional, mean_functional, invstd_functional, *running), kept = run("_functional")
    for a in (y_stats, y_functional):
        assert torch.equal(a.nan_to_num(99.0), y.nan_to_num(99.0)) and (a.stride(), a.dtype) == (y.stride(), y.dtype)
    assert torch.equal(mean, mean_functional) and torch.equal(invstd, invstd_functional)
    for old, new, new_stats, new_functional, same in zip(
        before, updated, updated_stats, (*running, *before[2:]), kept, strict=True
    ):
        if old is None:
            assert new_functional is None or (new_functional.shape == (0,) and new_functional.dtype == mean.dtype)
            continue
        assert torch.equal(new, new_stats) and torch.equal(new, new_functional) and new_functional.dtype == old.dtype
        assert torch.equal(same, old)
    if before[0] is not None and y.numel() > 0:
        assert not torch.equal(updated[0], before[0])
        assert all(r.data_ptr() != k.data_ptr() for r, k in zip(running, kept, strict=False))
    return mean, invstd


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


# ---- conv_bn_scale_train ---------------------------------------------------------------------------------------------

# input, weight, stride, padding, dilation, groups
CONV_CASES: dict[str, tuple[Any, ...]] = {
    "first layer of wide rows": ((2, 3, 40, 70), (9, 3, 3, 3), 1, 1, 1, 1),
    "3x3": ((4, 8, 14, 13), (16, 8, 3, 3), 1, 0, 1, 1),
    "stride and padding": ((4, 6, 15, 12), (10, 6, 3, 3), (2, 1), (1, 2), 1, 1),
    "3 channels, 7x7": ((3, 3, 20, 21), (8, 3, 7, 7), 2, 3, 1, 1),
    "dilation": ((2, 4, 15, 15), (6, 4, 3, 3), 1, 2, 2, 1),
    "groups": ((2, 8, 9, 9), (6, 4, 3, 3), 1, 1, 1, 2),
    "depthwise": ((4, 12, 11, 13), (12, 1, 3, 3), 1, 1, 1, 12),
    "1x1": ((2, 16, 7, 5), (24, 16, 1, 1), 1, 0, 1, 1),
    "1 pixel": ((5, 4, 3, 3), (6, 4, 3, 3), 1, 0, 1, 1),
    "1d": ((4, 5, 33), (7, 5, 4), 3, 1, 1, 1),
    "3d": ((2, 4, 5, 6, 7), (6, 4, 3, 3, 3), 1, 1, 1, 1),
}


def covered(call: Callable[[], Any]) -> Any:
    """Skips where the algorithm that is forced does not cover the call."""
    try:
        return call()
    except RuntimeError as error:
        if "does not cover this convolution" not in str(error):
            raise
    pytest.skip("outside of the algorithm's domain")


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


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_conv_of_values_that_are_not_finite(train_device, value, generator):
    """What BatchNorm makes of them: nothing is left of any channel that has one."""
    x = torch.randn(3, 6, 10, 12, generator=generator).to(train_device)
    x[1, 2, 4, 5] = value
    w = torch.randn(8, 6, 3, 3, generator=generator).to(train_device)
    s = state(8, torch.float32, train_device, generator)
    y = covered(lambda: fcb.conv_bn_scale_train(x, w, None, *s))
    assert y.isnan().all() and s[1].isnan().all()
    assert not s[0].isfinite().any()


def test_conv_is_deterministic(train_device, generator):
    x = torch.randn(8, 8, 40, 41, generator=generator).to(train_device)
    w = torch.randn(16, 8, 3, 3, generator=generator).to(train_device)
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


# ---- schemas, fakes, compile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, dtype, statistics, layout, generator):
    x = arrange(torch.randn(3, 4, 5, 6, generator=generator).to(device, dtype), layout)
    s = state(4, dtype, device, generator) if statistics else [None] * 4
    kwargs = epilogue_of(x, "gelu", "last", generator)
    for form in ("", "_stats", "_functional"):
        op = getattr(OPS, f"bn_scale_train{form}").default
        torch.library.opcheck(op, (x, *copy.deepcopy(s), FACTOR, MOMENTUM, EPS), kwargs)
    w = torch.randn(4, 4, 3, 3, generator=generator).to(device, dtype)
    conv_bias = s[3]
    for form in ("", "_stats", "_functional"):
        op = getattr(OPS, f"conv_bn_scale_train{form}").default
        arguments = (x, w, conv_bias, *copy.deepcopy(s), FACTOR, MOMENTUM, EPS, [1], [1], [1], 1)
        torch.library.opcheck(op, arguments, kwargs)


def test_fake_is_like_real(device, generator):
    for size, weight_size, *window in CONV_CASES.values():
        for layout in LAYOUTS:
            x = arrange(torch.randn(size).to(device), layout)
            w = torch.randn(weight_size, device=device)
            if layout == "permuted":  # conv1d keeps the weight's permutation, and BatchNorm does not
                w = w.transpose(1, -1).contiguous().transpose(1, -1)
            calls = (
                lambda x, w: fcb.bn_scale_train(x, None, None),
                lambda x, w, window=window: fcb.conv_bn_scale_train(
                    x, w, None, None, None, None, None, 1.0, 0.1, 1e-5, *window
                ),
            )
            for call in calls:
                y = call(x, w)
                with FakeTensorMode() as mode:
                    fake = call(mode.from_tensor(x), mode.from_tensor(w))
                assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_functions(device, backend, generator):
    """With the writes to the running statistics, functionalised by AOTAutograd."""

    def f(x: Tensor, w: Tensor, s: list[Tensor]) -> tuple[Tensor, ...]:
        y = fcb.bn_scale_train(x, *s)
        first = s[0] + 1
        z = fcb.conv_bn_scale_train(y, w, s[3], *s, padding=1)
        return y, z, first, s[1] * 2

    torch._dynamo.reset()
    x, w = torch.randn(3, 4, 6, 5, device=device), torch.randn(4, 4, 3, 3, device=device)
    eagers = state(4, torch.float32, device, generator)
    compiled = copy.deepcopy(eagers)
    expected = f(x, w, eagers)
    got = torch.compile(f, fullgraph=True, backend=backend)(x, w, compiled)
    for a, b in zip((*expected, *eagers), (*got, *compiled), strict=True):
        assert torch.equal(a, b)
    torch._dynamo.reset()


# ---- ConvBnScale2d ---------------------------------------------------------------------------------------------------


def train_models(device: str, generator: torch.Generator, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    plain, ours = models(generator, device, dtype, **kwargs)
    return plain.train(), ours.train()


def check_module(
    y: Tensor, eager: Tensor, plain_before: nn.Module, x: Tensor, ours: nn.Module, plain: nn.Module
) -> None:
    """The output and all buffers, against float64 and what eager made of the same."""
    exact = copy.deepcopy(plain_before).double()
    if isinstance(exact.scaling_factor, Tensor):
        exact.scaling_factor = exact.scaling_factor.double()
    with torch.no_grad():
        truth = exact(x.double())
    assert y.dtype == eager.dtype and y.stride() == eager.stride()
    assert_no_worse_than_eager(y, eager, truth)
    mine, theirs, exacts = ours.state_dict(), plain.state_dict(), exact.state_dict()
    assert list(mine) == list(theirs)
    for name in mine:
        if name.startswith("bn.running"):
            assert_no_worse_than_eager(mine[name], theirs[name], exacts[name])
        else:
            assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize("case", CASES)
def test_module_in_training_without_grad(case, device, generator):
    """One op, and the same results and buffers as eager's, over several batches."""
    plain, ours = train_models(device, generator, **CASES[case])
    assert ops_of(copy.deepcopy(ours), sample(generator, device)).count(TRAIN) == 1
    for step in range(3):
        x = sample(generator, device) * (step + 1) + step
        before = copy.deepcopy(plain)
        ours.load_state_dict(plain.state_dict())
        with torch.no_grad():
            check_module(ours(x), plain(x), before, x, ours, plain)
    if CASES[case].get("track_running_stats", True):
        assert ours.bn.num_batches_tracked == 3


def test_module_runs_one_op(device, generator):
    _, ours = train_models(device, generator)
    ops = ops_of(ours, sample(generator, device))
    assert ops.count(TRAIN) == 1 and ops.count("aten::convolution") == ops.count("batch_norm") == ops.count("mul") == 0


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("affine", [False, True])
def test_module_without_running_statistics(device, mode, affine, generator):
    """Batch statistics in either mode."""
    plain, ours = models(generator, device, track_running_stats=False, affine=affine)
    for module in (plain, ours):
        module.train(mode == "train")
    x = sample(generator, device)
    assert ops_of(ours, x).count(TRAIN) == 1
    with torch.no_grad():
        check_module(ours(x), plain(x), copy.deepcopy(plain), x, ours, plain)


def test_module_with_buffers_that_are_not_tracked(device, generator):
    """track_running_stats switched off afterwards: the buffers stay, and training leaves them alone."""
    plain, ours = train_models(device, generator)
    for module in (plain, ours):
        module.bn.track_running_stats = False
    x = sample(generator, device)
    with torch.no_grad():
        check_module(ours(x), plain(x), copy.deepcopy(plain), x, ours, plain)
    assert ours.bn.num_batches_tracked == 0
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_module_dtypes_and_formats(device, dtype, channels_last, generator):
    plain, ours = train_models(device, generator, dtype)
    x = sample(generator, device, dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
        plain, ours = (module.to(memory_format=torch.channels_last) for module in (plain, ours))
    assert ops_of(copy.deepcopy(ours), x).count(TRAIN) == 1
    before = copy.deepcopy(plain)
    with torch.no_grad():
        y, eager = ours(x), plain(x)
    if dtype == torch.float64:
        torch.testing.assert_close(y, eager, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.bn.running_var, plain.bn.running_var, rtol=1e-12, atol=1e-12)
        assert y.stride() == eager.stride()
    else:
        check_module(y, eager, before, x, ours, plain)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_module_with_residual_and_activation(device, activation, with_residual, generator):
    plain, ours = train_models(device, generator, activation=activation)
    x = sample(generator, device)
    residual = torch.randn(3, 6, 7, 6, generator=generator).to(device) if with_residual else None
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        y, eager = ours(x, residual), plain(x, residual, activation)
        truth = exact(x.double(), None if residual is None else residual.double(), activation)
    assert_no_worse_than_eager(y, eager, truth)


def test_module_under_autocast(device, generator):
    plain, ours = train_models(device, generator)
    x = sample(generator, device)
    before = copy.deepcopy(plain)
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        assert ops_of(copy.deepcopy(ours), x).count(TRAIN) == 1
        y, eager = ours(x), plain(x)
    check_module(y, eager, before, x, ours, plain)


def test_module_with_grad(device, generator):
    """The same op, and the same bits as without."""
    plain, ours = train_models(device, generator)
    x = sample(generator, device)
    other, before = copy.deepcopy(ours), copy.deepcopy(plain)
    y = ours(x)
    assert y.requires_grad
    with torch.no_grad():
        expected = other(x)
        check_module(y, plain(x), before, x, ours, plain)
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), other.buffers(), strict=True))
    with torch.no_grad():
        expected = copy.deepcopy(ours)(x)
    ours.requires_grad_(False)
    assert torch.equal(ours(x), expected)  # grad mode is on, and nothing needs a gradient


@pytest.mark.parametrize("shape", [(1, 4, 3, 3), (0, 4, 9, 8)], ids=str)
def test_module_leaves_odd_inputs_to_pytorch(device, shape, generator):
    """Its own errors and its own answers, and the same buffers afterwards."""
    plain, ours = train_models(device, generator)
    outcomes = []
    for module in (plain, ours):
        try:
            with torch.no_grad():
                outcomes.append(module(torch.ones(shape, device=device)).shape)
        except (ValueError, RuntimeError) as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert all(torch.equal(a, b) for a, b in zip(ours.bn.buffers(), plain.bn.buffers(), strict=True))


def test_synchronised_batchnorm_is_not_replaced(device, generator):
    """Its statistics are those of all processes. In evaluation mode they are the running ones, and it is."""
    _, ours = models(generator, device)
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours).train()
    assert type(ours.bn) is nn.SyncBatchNorm
    ops = ops_of(ours, sample(generator, device))
    assert ops.count("batch_norm") > 0 and ops.count("fused_conv_bn") == 0
    assert ops_of(ours.eval(), sample(generator, device)).count("fused_conv_bn::conv_bn_scale") == 1


def test_subclasses_of_batchnorm_are_not_replaced(device, generator):
    class Loud(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 100

    _, ours = train_models(device, generator)
    loud = Loud(6).to(device).train()
    ours.bn = loud
    with torch.no_grad():
        assert ours(sample(generator, device)).mean() > 90


def test_eval_after_training_uses_the_new_statistics(device, generator):
    """Also where neither train() nor eval() of the module is called between."""
    plain, ours = models(generator, device)
    x = sample(generator, device)
    with torch.no_grad():
        stale = ours(x)
        for module in (plain, ours):
            module.bn.train()
            module(x * 3 + 1)
            module.bn.eval()
        torch.testing.assert_close(ours(x), plain(x))
        assert not torch.equal(ours(x), stale)


def test_update_bn(device, generator):
    """torch.optim.swa_utils.update_bn: cumulative averages, momentum being None inside."""
    plain, ours = train_models(device, generator)
    before = copy.deepcopy(plain).double()
    batches = [sample(generator, device) * s for s in (1.0, 2.0, 0.5)]
    for module, cast in ((plain, torch.float32), (ours, torch.float32), (before, torch.float64)):
        torch.optim.swa_utils.update_bn([b.to(cast) for b in batches], module)
    assert ours.bn.num_batches_tracked == 3 and ours.bn.momentum == 0.1
    for name in ("running_mean", "running_var"):
        assert_no_worse_than_eager(*(getattr(m.bn, name) for m in (ours, plain, before)))


def test_compiled_module(device, generator):
    torch._dynamo.reset()
    plain, ours = train_models(device, generator)
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            x = sample(generator, device)
            torch.testing.assert_close(compiled(x), plain(x))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(compiled.bn, name), getattr(plain.bn, name))
    torch._dynamo.reset()


def test_a_model_of_several(device, generator):
    class Net(nn.Module):
        def __init__(self, block: Any) -> None:
            super().__init__()
            self.first, self.second = block(4, 6, 3, 1.5), block(6, 5, 3, 0.5, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    plain, ours = Net(Plain).to(device), Net(fcb.ConvBnScale2d).to(device)
    for module in (plain.first, plain.second):
        randomize(module, generator)
    ours.load_state_dict(plain.state_dict())
    x = sample(generator, device)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x))
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
