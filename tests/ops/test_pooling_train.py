"""max_pool2d_train and max_pool2d_backward: which element a gradient goes to, sums, memory and messages."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_conv_bn as fcb
from common import DTYPES, long
from elementwise_problems import LAYOUTS, arrange
from fused_conv_bn import _pooling, reference
from test_pooling import POOLED, WINDOWS, fits, same, values_of

ops = torch.ops.fused_conv_bn
train, backward = ops.max_pool2d_train, ops.max_pool2d_backward
NAMES = "kernel_size", "stride", "padding", "dilation"


def numbers_of(window: dict[str, Any]) -> list[list[int]]:
    """Of rows and columns each."""
    given = {"stride": window["kernel_size"], "padding": 0, "dilation": 1} | window
    return [[v, v] if isinstance(v, int) else list(v) for v in (given[name] for name in NAMES)]


def index_of(position: Tensor, width: int, window: dict[str, Any]) -> Tensor:
    """As F.max_pool2d returns it."""
    kernel, stride, padding, dilation = numbers_of(window)
    row, column = (
        torch.arange(n, device=position.device) * s - p
        for n, s, p in zip(position.shape[2:], stride, padding, strict=True)
    )
    place = position.long()
    row = row.view(-1, 1) + place // kernel[1] * dilation[0]
    return row * width + column + place % kernel[1] * dilation[1]


def is_anywhere(shape: tuple[int, ...], window: dict[str, Any]) -> bool:
    """Whether each window has an element of the image: eager's index of one without is that of another row."""
    out = F.max_pool2d(torch.empty(shape, device="meta"), **window).shape
    for d, (k, s, p, dilation) in enumerate(zip(*numbers_of(window), strict=True), 2):
        for at in range(out[d]):
            if not any(0 <= at * s - p + i * dilation < shape[d] for i in range(k)):
                return False
    return True


def check(x: Tensor, window: dict[str, Any], generator: torch.Generator, dy_layout: str | None = None) -> None:
    """Values, positions and strides are eager's. Of the gradients the error is at most twice eager's, or a rounding."""
    eager, index = F.max_pool2d(x, **window, return_indices=True)
    if x.is_cuda:  # of windows of nothing but -inf eager has other indices there
        index = F.max_pool2d(x.cpu(), **window, return_indices=True)[1].to(x.device)
    y, position = train(x, **window)
    assert same(y, eager) and y.stride() == eager.stride()
    assert position.dtype == torch.uint8 and position.stride() == y.stride()
    assert torch.equal(index_of(position, x.size(3), window), index)

    dy = torch.randn(y.shape, generator=generator).to(x.device, x.dtype)
    dy = arrange(dy, dy_layout) if dy_layout else dy.as_strided(y.shape, y.stride())
    check_gradient(dy, position, index, x, window)


def check_gradient(dy: Tensor, position: Tensor, index: Tensor, x: Tensor, window: dict[str, Any]) -> None:
    numbers = numbers_of(window)
    ceil_mode = window.get("ceil_mode", False)
    dx = backward(dy, position, *x.shape[2:], *numbers, ceil_mode)
    eager = torch.ops.aten.max_pool2d_with_indices_backward(dy, x, *numbers, ceil_mode, index)
    assert dx.dtype == x.dtype and dx.shape == x.shape
    of_several = [d for d, n in enumerate(x.shape) if n > 1]
    assert [dx.stride(d) for d in of_several] == [eager.stride(d) for d in of_several] or x.numel() == 0
    size = (*x.shape[:2], x.shape[2] * x.shape[3])
    flat = index.flatten(2).cpu().numpy()
    truth, magnitude = (np.zeros(size, dtype=np.longdouble) for _ in range(2))
    at = np.ogrid[tuple(slice(n) for n in flat.shape)]
    values = long(dy).reshape(flat.shape)
    np.add.at(truth, (at[0], at[1], flat), values)
    np.add.at(magnitude, (at[0], at[1], flat), np.abs(values))
    ours, theirs = (np.abs(long(t).reshape(size) - truth) for t in (dx, eager))
    wide = DTYPES[torch.float64 if x.dtype == torch.float64 else torch.float32]
    roundings = DTYPES[x.dtype] * np.abs(truth) + 8 * wide * magnitude
    if ours.size:
        assert (ours <= np.maximum(2 * theirs.max(), roundings)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_values(device, dtype, layout, window, generator):
    for shape in POOLED:
        if fits(shape, window) and is_anywhere(shape, window):
            check(values_of(shape, dtype, device, layout, generator), window, generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_windows(device, dtype, generator):
    """Of integers, of which many are equal, with gradients that lie otherwise as well."""
    chosen = random.Random(5)
    done = 0
    while done < 60:
        kernel, stride = ([chosen.randint(1, 5), chosen.randint(1, 5)] for _ in range(2))
        dilation = [chosen.choice((1, 1, 2, 3)) for _ in range(2)]
        padding = [chosen.randint(0, k // 2) for k in kernel]
        window = dict(kernel_size=kernel, stride=stride, padding=padding, dilation=dilation)
        window["ceil_mode"] = chosen.random() < 0.5
        shape = chosen.randint(1, 3), chosen.choice((1, 3, 8, 16, 24)), chosen.randint(1, 14), chosen.randint(1, 14)
        if fits(shape, window) and is_anywhere(shape, window):
            x = torch.randint(-2, 2, shape, generator=generator).to(device, dtype)
            check(arrange(x, chosen.choice(LAYOUTS)), window, generator, chosen.choice(LAYOUTS))
            done += 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_values_that_are_not_finite(device, dtype, layout, generator):
    """The last NaN of a window has its gradient, and the first of nothing but -inf."""
    for window in WINDOWS:
        x = values_of((2, 16, 9, 10), dtype, device, layout, generator)
        for value in (math.nan, -math.inf, math.inf):
            x[torch.rand(x.shape, generator=generator).to(device) < 0.2] = value
        x[0, :8] = -math.inf
        x[0, 9] = math.nan
        if is_anywhere(x.shape, window):
            check(x, window, generator)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_that_are_not_finite(device, layout, generator):
    """They stay where they belong."""
    for window in WINDOWS[:6]:
        x = values_of((2, 16, 9, 10), torch.float16, device, layout, generator)
        y, position = train(x, **window)
        dy = torch.ones_like(y)
        dy[0, 3, 1, 1], dy[1, 7, 2, 2], dy[1, 7, 2, 3], dy[1, 8] = math.nan, math.inf, -math.inf, 65504
        numbers, ceil_mode = numbers_of(window), window.get("ceil_mode", False)
        found = backward(dy, position, *x.shape[2:], *numbers, ceil_mode)
        expected = reference.max_pool2d_backward(dy, position, *x.shape[2:], *numbers, ceil_mode)
        assert same(found, expected)


def test_many_outputs(device, generator):
    for layout in ("channels_last", "contiguous"):
        x = values_of((9, 64, 61, 62), torch.float16, device, layout, generator)
        check(x, dict(kernel_size=3, stride=2, padding=1), generator)
        check(x, dict(kernel_size=2), generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_memory(device, dtype, generator):
    """Views beside a 16-byte boundary, with infinity around them."""
    for channels, offset in ((16, 1), (16, 3), (24, 8), (5, 0), (8, 5)):
        for strides in (
            lambda h, w, c=channels: (h * w * c, 1, w * c, c),
            lambda h, w, c=channels: (h * w * c, h * w, w, 1),
        ):
            x = _between(torch.randn(2, channels, 6, 7, generator=generator).to(device, dtype), offset, strides)
            for window in WINDOWS[:4]:
                y, position = train(x, **window)
                index = index_of(position, 7, window)
                dy = _between(torch.randn(y.shape, generator=generator).to(device, dtype), offset, strides)
                at = _between(position, offset, strides)
                assert torch.equal(index, F.max_pool2d(x, **window, return_indices=True)[1])
                check_gradient(dy, at, index, x, window)


def _between(t: Tensor, offset: int, strides: Any) -> Tensor:
    outside = 255 if t.dtype == torch.uint8 else math.inf
    memory = torch.full((t.numel() + 16,), outside, dtype=t.dtype, device=t.device)
    view = memory[offset : offset + t.numel()].as_strided(t.shape, strides(*t.shape[2:]))
    return view.copy_(t)


def test_gradients_that_are_expanded(device, generator):
    """As those of sums are."""
    for layout in ("contiguous", "channels_last"):
        x = values_of((2, 8, 9, 10), torch.float32, device, layout, generator)
        y, position = train(x, 3, 2, 1)
        one = torch.ones((), device=device).expand(y.shape)
        assert torch.equal(backward(one, position, 9, 10, 3, 2, 1), backward(one.clone(), position, 9, 10, 3, 2, 1))


def test_empty(device):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(0, 8, 6, 6, device=device).to(memory_format=layout)
        y, position = train(x, 2)
        assert y.shape == position.shape == (0, 8, 3, 3) and position.dtype == torch.uint8
        assert backward(y, position, 6, 6, 2).shape == x.shape


def test_largest_window(device, generator):
    """256 positions."""
    for layout in ("contiguous", "channels_last"):
        x = arrange(torch.randint(0, 9, (2, 8, 20, 24), generator=generator).to(device, torch.float32), layout)
        check(x, dict(kernel_size=(16, 16), stride=3, padding=5), generator)
        check(x, dict(kernel_size=(20, 12), stride=1), generator)


def test_twins(device, generator):
    for layout in ("contiguous", "channels_last"):
        x = arrange(torch.randint(0, 3, (2, 8, 9, 10), generator=generator).to(device, torch.float64), layout)
        for window in WINDOWS:
            numbers, ceil_mode = numbers_of(window), window.get("ceil_mode", False)
            y, position = train(x, *numbers, ceil_mode)
            twins = reference.max_pool2d_train(x, *numbers, ceil_mode)
            assert torch.equal(y, twins[0]) and torch.equal(position, twins[1])
            dy = torch.randn(y.shape, generator=generator).to(device, torch.float64)
            found = backward(dy, position, 9, 10, *numbers, ceil_mode)
            torch.testing.assert_close(found, reference.max_pool2d_backward(dy, position, 9, 10, *numbers, ceil_mode))


def test_derivatives(device, generator, monkeypatch):
    """Of the function, on the CPU as well, where PyTorch's op is as fast."""
    monkeypatch.setattr(_pooling, "TRAINS_ON", ("cpu", "cuda"))
    for layout in ("contiguous", "channels_last"):
        x = values_of((2, 4, 6, 7), torch.float64, device, layout, generator).requires_grad_()
        for window in WINDOWS[:7]:
            pool = lambda x, window=window: fcb.max_pool2d(x, **window)  # noqa: E731
            y, eager = pool(x), F.max_pool2d(x, **window)
            assert type(y.grad_fn).__name__ == "_MaxPoolBackward" and torch.equal(y, eager)
            assert torch.autograd.gradcheck(pool, (x,)) and torch.autograd.gradgradcheck(pool, (x,))
            ours, theirs = (torch.autograd.grad(r.square().sum(), x)[0] for r in (y, eager))
            torch.testing.assert_close(ours, theirs)
            assert ours.stride() == theirs.stride()
    large = torch.randn(1, 2, 20, 20, device=device, requires_grad=True)
    for window in (17, (16, 17)):  # no position
        assert type(fcb.max_pool2d(large, window).grad_fn).__name__ == "MaxPool2DWithIndicesBackward0"


def test_keeps_no_input(device, monkeypatch):
    monkeypatch.setattr(_pooling, "TRAINS_ON", ("cpu", "cuda"))
    x = torch.randn(2, 8, 8, 8, device=device, requires_grad=True)
    y = fcb.max_pool2d(x, 2)
    (saved,) = y.grad_fn.saved_tensors
    assert saved.dtype == torch.uint8 and saved.shape == (2, 8, 4, 4)


def test_messages(device):
    x = torch.randn(2, 3, 8, 8, device=device)
    y, position = train(x, 2)
    for f, arguments, message in [
        (train, (x[0], 2), r"max_pool2d_train: input has shape \[3, 8, 8\], expected 4 dimensions"),
        (train, (x, 3, 2, 2), r"max_pool2d_train: padding is \[2, 2\], expected at most half of kernel_size"),
        (
            train,
            (torch.randn(1, 1, 40, 40, device=device), 17),
            r"max_pool2d_train: kernel_size is \[17, 17\], expected a window of at most 256 elements",
        ),
        (backward, (y[0], position, 8, 8, 2), r"grad_output has shape \[3, 4, 4\], expected 4 dimensions"),
        (
            backward,
            (y, position, 8, 10, 2),
            r"grad_output has shape \[2, 3, 4, 4\], expected 4 rows of 5 elements, as many as an input of shape "
            r"\[2, 3, 8, 10\] has windows",
        ),
        (backward, (y, position[:1], 8, 8, 2), r"position has shape \[1, 3, 4, 4\], expected \[2, 3, 4, 4\]"),
        (backward, (y, position.long(), 8, 8, 2), "position has dtype Long, expected uint8"),
        (backward, (y, position, 0, 8, 2), r"input has shape \[2, 3, 0, 8\], expected at least one element"),
        (backward, (y.int(), position, 8, 8, 2), "grad_output has dtype Int, expected float32"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            f(*arguments)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fakes(device, memory_format, generator):
    x = torch.randn(2, 8, 7, 9, generator=generator).to(device, memory_format=memory_format)
    for window in ([3, 2, 1], [2], [[3, 1], [1, 2], [1, 0], [1, 1], True], [7]):
        torch.library.opcheck(train.default, (x, *window))
        y, position = train(x, *window)
        torch.library.opcheck(backward.default, (y, position, 7, 9, *window))
