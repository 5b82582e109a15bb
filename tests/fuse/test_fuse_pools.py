"""Max pooling and means over space in fused models: PyTorch's on the CPU, where these tests ask for the ops as well."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn import _pooling
from fused_conv_bn._fuse import blocks, pools

C = 16
OPS = {"_max_pool": "max pool", "_mean": "mean"}


class Pooled(nn.Module):
    """``pool(self, y)`` behind a convolution and its BatchNorm."""

    def __init__(self, pool: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, C, 3, bias=False), nn.BatchNorm2d(C)
        self.max, self.global_mean, self.listed = (
            nn.MaxPool2d(3, 2, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.AdaptiveAvgPool2d((1, 1)),
        )
        self.indexed = nn.MaxPool2d(2, return_indices=True)
        self.mean, self.adaptive = nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)
        self.pool = pool

    def forward(self, x: Tensor) -> Any:
        return self.pool(self, F.relu(self.bn(self.conv(x))))


def _written(m: Pooled, y: Tensor) -> Tensor:
    pooled = F.max_pool2d(y, 2)
    y += 1
    return pooled + F.max_pool2d(y, 2)


POOLS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "nn.MaxPool2d": (lambda m, y: m.max(y), ["max pool"]),
    "F.max_pool2d": (lambda m, y: F.max_pool2d(y, 2), ["max pool"]),
    "by name": (lambda m, y: F.max_pool2d(y, kernel_size=(3, 2), padding=1, ceil_mode=True), ["max pool"]),
    "dilated": (lambda m, y: F.max_pool2d(y, 2, 1, 0, 2), ["max pool"]),
    "torch.max_pool2d": (lambda m, y: torch.max_pool2d(y, [3], padding=[1]), ["max pool"]),
    "nn.AdaptiveAvgPool2d(1)": (lambda m, y: m.global_mean(y), ["mean"]),
    "nn.AdaptiveAvgPool2d((1, 1))": (lambda m, y: m.listed(y), ["mean"]),
    "F.adaptive_avg_pool2d": (lambda m, y: F.adaptive_avg_pool2d(y, (1, 1)), ["mean"]),
    "method": (lambda m, y: y.mean((2, 3), keepdim=True), ["mean"]),
    "function": (lambda m, y: torch.mean(y, [-2, -1]), ["mean"]),
    "from the end": (lambda m, y: y.mean(dim=(-1, -2)), ["mean"]),
    "one behind the other": (lambda m, y: m.max(m.max(y)).mean((2, 3)), ["max pool", "max pool", "mean"]),
    "read twice": (lambda m, y: m.max(y) + m.max(y), ["max pool", "max pool"]),
    "a residual": (lambda m, y: F.relu(m.bn(y) + m.global_mean(y)), ["mean"]),
    "in front of a write": (_written, ["max pool", "max pool"]),
    "of other strides": (lambda m, y: y.transpose(2, 3).mean((2, 3)), ["mean"]),
    "indices": (lambda m, y: m.indexed(y), []),
    "indices of a function": (lambda m, y: F.max_pool2d(y, 2, return_indices=True), []),
    "averages": (lambda m, y: m.mean(y), []),
    "of four": (lambda m, y: m.adaptive(y), []),
    "of all": (lambda m, y: y.mean(), []),
    "of a row": (lambda m, y: y.mean((1, 2)), []),
    "of another dtype": (lambda m, y: y.mean((2, 3), dtype=torch.float64), []),
    "of three dimensions": (lambda m, y: F.max_pool2d(y[0], 2), []),
    "of five dimensions": (lambda m, y: y[None].mean((-1, -2)), []),
}
# A module that is called twice has one.
ONE_ROW = {"one behind the other": ["max pool", "mean"], "read twice": ["max pool"]}


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops run on the CPU too. Which calls there are."""
    called: list[str] = []

    def counted(op: Callable[..., Tensor], what: str) -> Callable[..., Tensor]:
        return lambda *args, **named: (called.append(what), op(*args, **named))[1]

    monkeypatch.setattr(pools, "DEVICES", ("cpu", "cuda"))
    for name, what in OPS.items():
        monkeypatch.setattr(blocks, name, counted(getattr(blocks, name), what))
    return called


def pooling_of(model: nn.Module) -> list[str]:
    return [row.text for row in fcb.report(model).rows if row.module == "pool"]


def model_of(name: str, device: str, memory_format: torch.memory_format = torch.channels_last) -> nn.Module:
    return Pooled(POOLS[name][0]).eval().to(device, memory_format=memory_format)


def same(got: Any, expected: Any) -> None:
    got, expected = (t if isinstance(t, tuple) else (t,) for t in (got, expected))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", POOLS)
def test_pools(device: str, name: str, memory_format: torch.memory_format, everywhere: list[str]) -> None:
    model = model_of(name, device, memory_format)
    fused = fcb.fuse(copy.deepcopy(model))
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        for i, shape in enumerate(((2, 3, 12, 14), (2, 3, 12, 14), (3, 3, 9, 11))):
            x = torch.randn(shape, device=device).contiguous(memory_format=memory_format)
            everywhere.clear()
            same(fused(x.clone()), model(x.clone()))
            if i > 0 and name != "of other strides":  # the first call compares
                assert everywhere == POOLS[name][1]
    report = fcb.report(fused)
    rows = ONE_ROW.get(name, POOLS[name][1])
    assert pooling_of(fused) == rows and not report.not_captured
    assert [g for g in report.groups() if g in OPS.values()] == rows


def test_names() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "DEVICES", ("cpu",))
        model = fcb.fuse(
            nn.Sequential(model_of("one behind the other", "cpu"), nn.Identity()), torch.randn(1, 3, 16, 16)
        )
    rows = [row.path for row in fcb.report(model).rows if row.module == "pool"]
    assert rows == ["0.max", "mean"]


def test_the_cpu_has_pytorchs() -> None:
    model = fcb.fuse(model_of("one behind the other", "cpu"), torch.randn(1, 3, 16, 16))
    assert pooling_of(model) == [] and fcb.report(model).groups() == ["conv bn relu"]


@pytest.mark.parametrize("name", ["nn.MaxPool2d", "method", "nn.AdaptiveAvgPool2d(1)"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients(device: str, name: str, training: bool, everywhere: list[str]) -> None:
    model = model_of(name, device).to(torch.float64).train(training)
    fused = fcb.fuse(copy.deepcopy(model))
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64, device=device)
    for m in (model, fused, fused):
        m.zero_grad()
        m(x).pow(2).sum().backward()
    for p, q in zip(model.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "name", [name for name, (_, rows) in POOLS.items() if "max pool" in rows and name != "in front of a write"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_gradients_of_maxima(
    device: str,
    dtype: torch.dtype,
    name: str,
    memory_format: torch.memory_format,
    everywhere: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the ops with positions, on the CPU as well. (Eager refuses the write.) Of integers many are equal: the gradients have to go to the same."""
    monkeypatch.setattr(_pooling, "TRAINS_ON", ("cpu", "cuda"))
    trained: list[int] = []
    apply = _pooling._apply_max_pool
    monkeypatch.setattr(_pooling, "_apply_max_pool", lambda *args: (trained.append(1), apply(*args))[1])
    model = nn.Sequential(nn.Identity(), model_of(name, device, memory_format)).to(dtype)
    model[1].conv, model[1].bn = nn.Identity(), nn.Identity()
    fused = fcb.fuse(copy.deepcopy(model))
    for shape in ((2, 8, 12, 14), (2, 8, 12, 14), (3, 8, 9, 11)):
        x = torch.randint(-2, 4, shape, device=device).to(dtype).contiguous(memory_format=memory_format)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        trained.clear()
        results = [m(one) for m, one in zip((fused, model), inputs, strict=True)]
        same(*results)
        dy = [torch.randint(-3, 4, r.shape, device=device).to(dtype) for r in _tuple(results[1])]
        for result in results:
            torch.autograd.backward(_tuple(result), dy)
        same(inputs[0].grad, inputs[1].grad)
        assert len(trained) == POOLS[name][1].count("max pool")


def test_gradients_under_autocast(device: str, everywhere: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which casts no pooling, but what is in front of it; with a hook PyTorch's op runs."""
    monkeypatch.setattr(_pooling, "TRAINS_ON", ("cpu", "cuda"))
    model = nn.Sequential(nn.Conv2d(3, C, 1), nn.MaxPool2d(3, 2, 1)).to(device)
    nn.init.constant_(model[0].weight, 1.0)  # sums of small integers have no rounding
    fused = fcb.fuse(copy.deepcopy(model))
    seen: list[str] = []
    for i in range(3):
        x = torch.randint(-3, 4, (2, 3, 9, 10), device=device).float()
        if i == 2:
            fused[1].register_forward_hook(lambda m, args, y: seen.append(type(y.grad_fn).__name__))
        results = []
        for m in (model, fused):
            m.zero_grad()
            m[0].bias.data.zero_()
            with torch.autocast(device, torch.bfloat16):
                y = m(x)
            assert y.dtype == torch.bfloat16
            y.backward(torch.ones_like(y))
            results.append((y, m[0].weight.grad))
        names = [type(y.grad_fn).__name__ for y, _ in results]
        assert names == [
            "MaxPool2DWithIndicesBackward0",
            "MaxPool2DWithIndicesBackward0" if seen else "_MaxPoolBackward",
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert seen == ["MaxPool2DWithIndicesBackward0"]


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_copies_pickles_and_the_way_back(device: str, everywhere: list[str]) -> None:
    model = model_of("nn.MaxPool2d", device)
    model.pool = _of_max
    x = torch.randn(2, 3, 9, 9, device=device)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        expected = model(x)
        fused = fcb.fuse(model, x)
        for one in (copy.deepcopy(fused), fcb.fuse(pickle.loads(pickle.dumps(fused)))):
            same(one(x), expected)
            assert pooling_of(one) == ["max pool"]
        everywhere.clear()
        assert type(fcb.unfuse(fused)) is Pooled
        same(fused(x), expected)
    assert everywhere == []


def _of_max(m: Pooled, y: Tensor) -> Tensor:
    pooled: Tensor = m.max(y)
    return pooled


def test_a_module_that_changes(device: str, everywhere: list[str]) -> None:
    """Its window, or its forward; and hooks see its calls."""
    model = model_of("nn.MaxPool2d", device)
    fused = fcb.fuse(copy.deepcopy(model))
    x = torch.randn(2, 3, 9, 9, device=device)
    seen: list[Any] = []
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        same(fused(x), model(x))
        for m in (model, fused):
            m.max.kernel_size, m.max.padding = 5, 2
        same(fused(x), model(x))
        everywhere.clear()
        handle = fused.max.register_forward_hook(lambda *_: seen.append(1))
        same(fused(x), model(x))
        assert len(seen) == 1 and everywhere == []
        handle.remove()
        same(fused(x), model(x))
        fused.max.forward = lambda y: y * 2
        torch.testing.assert_close(fused(x), F.relu(model.bn(model.conv(x))) * 2, rtol=1e-5, atol=1e-5)


def test_integers_and_odd_values(device: str, everywhere: list[str]) -> None:
    """What the op refuses is PyTorch's."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.max = nn.Conv2d(3, 4, 1), nn.MaxPool2d(2)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return F.relu(self.conv(x)), self.max(y)

    model = Model().eval().to(device)
    fused = fcb.fuse(copy.deepcopy(model))
    x = torch.randn(2, 3, 6, 6, device=device)
    odd = [x.masked_fill(x > 1, torch.nan), x.masked_fill(x > 1, -torch.inf), x[0], x.double()]
    with torch.no_grad():
        for y in odd if device == "cuda" else [*odd, (x * 9).int()]:
            for a, b in zip(fused(x, y), model(x, y), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
