"""Concatenations in front of a BatchNorm, and the gates of squeeze-and-excite blocks, in fused models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fused_conv_bn as fcb

C = 16


class Gated(nn.Module):
    """``product(self, x, g)`` with g of shape (N, C, 1, 1), between convolutions."""

    def __init__(self, product: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, C, 3, bias=False), nn.BatchNorm2d(C)
        self.squeeze, self.excite, self.pool = nn.Conv2d(C, 4, 1), nn.Conv2d(4, C, 1), nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(C, C)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.product(self, x, self.excite(F.relu(self.squeeze(self.pool(x)))))


def _of_linear(m: Gated, x: Tensor, g: Tensor) -> Tensor:
    b, c, _, _ = x.size()
    y = torch.sigmoid(m.linear(m.pool(x).view(b, c))).view(b, c, 1, 1)
    return x * y.expand_as(x)


def _written_between(m: Gated, x: Tensor, g: Tensor) -> Tensor:
    y = x * torch.sigmoid(g)
    z = x * 2
    x += 1
    return F.relu(y + z) + x


GATES: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "sigmoid": (lambda m, x, g: x * torch.sigmoid(g), ["gate"]),
    "the gate first": (lambda m, x, g: torch.sigmoid(g) * x, ["gate"]),
    "hardsigmoid, method": (lambda m, x, g: x.mul(F.hardsigmoid(g)), ["gate"]),
    "relu6 / 6": (lambda m, x, g: x * (F.relu6(g + 3.0) / 6.0), ["gate"]),
    "linear, expand_as": (_of_linear, ["gate"]),
    "residual, relu": (lambda m, x, g: F.relu(x * torch.sigmoid(g) + x), ["gate add relu"]),
    "residual first, silu": (lambda m, x, g: F.silu(x + x * torch.sigmoid(g)), ["gate add silu"]),
    "activation, residual": (lambda m, x, g: F.relu(x * torch.sigmoid(g)) + x, ["gate relu add"]),
    "a factor": (lambda m, x, g: x * torch.sigmoid(g) * 2.0, ["gate"]),
    "in place": (lambda m, x, g: x.mul_(torch.sigmoid(g)), []),
    "written before the sum": (_written_between, ["gate"]),
    "a map of the pixels": (lambda m, x, g: x * torch.sigmoid(x.mean(1, keepdim=True)), []),
    "of its own sigmoid": (lambda m, x, g: x * torch.sigmoid(x), []),
    "of the gate's size": (lambda m, x, g: g * torch.sigmoid(m.pool(x)), ["gate"]),
    "two gates": (lambda m, x, g: x * torch.sigmoid(g) * F.hardsigmoid(g), ["gate", "gate"]),
    "one for all images": (lambda m, x, g: x * torch.sigmoid(g[:1]), []),
}


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return model


def added(model: nn.Module, first: tuple[str, ...] = ("gate", "cat")) -> list[str]:
    return [g for g in fcb.report(model).groups() if g.split()[0] in first]


def compare(model: nn.Module, device: str, memory_format: torch.memory_format, **options: Any) -> nn.Module:
    """Twice, with another shape, and with strides as they are."""
    fused = fcb.fuse(copy.deepcopy(model), **options)
    with torch.no_grad():
        for shape in ((2, 3, 9, 9), (2, 3, 9, 9), (3, 3, 6, 11)):
            x = torch.randn(shape, device=device).contiguous(memory_format=memory_format)
            expected, got = model(x.clone()), fused(x.clone())
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            if not options:
                assert got.stride() == expected.stride()
    return fused


def same_step(model: nn.Module, device: str, training: bool) -> None:
    """The same gradients and buffers as the plain model has."""
    model = randomised(model).to(device, torch.float64).train(training)
    fused = fcb.fuse(copy.deepcopy(model))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, device=device)
    for m in (model, fused):
        m(x).pow(2).sum().backward()
    for p, q in zip(model.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)
    for a, b in zip(model.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", GATES)
def test_gates(device: str, name: str, memory_format: torch.memory_format) -> None:
    product, groups = GATES[name]
    model = randomised(Gated(product).eval()).to(device, memory_format=memory_format)
    with torch.backends.cudnn.flags(allow_tf32=False):
        fused = compare(model, device, memory_format)
        assert added(fused) == groups
        rows = [row for row in fcb.report(fused).rows if row.module == "gate"]
        assert [row.text.split(",")[0] for row in rows] == groups
        own = {"gate": ", on the CPU PyTorch's own product"} if device == "cpu" else {}
        assert all(row.text == group + own.get(group, "") for row, group in zip(rows, groups, strict=True))
        if device == "cpu":
            compare(model, device, memory_format, freeze=True)


@pytest.mark.parametrize("name", ["sigmoid", "residual, relu", "linear, expand_as"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_of_gates(device: str, name: str, training: bool) -> None:
    same_step(Gated(GATES[name][0]), device, training)


def test_a_gate_that_is_a_map_later(device: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, C, 1), nn.BatchNorm2d(C)

        def forward(self, x: Tensor, g: Tensor) -> Tensor:
            return F.relu(self.bn(self.conv(x)) * torch.sigmoid(g))

    model = randomised(Model().eval()).to(device)
    fused = fcb.fuse(copy.deepcopy(model))
    x = torch.randn(2, 3, 5, 5, device=device)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        for shape in ((2, C, 1, 1), (2, 1, 5, 5), (1, C, 1, 1), (2, C, 5, 5), (1,), (3, 2, C, 1, 1), (2, C, 1, 1)):
            g = torch.randn(shape, device=device)
            torch.testing.assert_close(fused(x, g), model(x, g), rtol=1e-5, atol=1e-5)
            g = g.double()
            torch.testing.assert_close(fused(x, g), model(x, g), rtol=1e-5, atol=1e-5)
    assert added(fused) == ["gate relu"]


class Alone(nn.Module):
    """``f(self, ...)``, beside a convolution and its BatchNorm."""

    def __init__(self, f: Callable[..., Any], hooked: bool) -> None:
        super().__init__()
        self.c, self.b, self.f = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), f
        if hooked:  # then no first call is compared
            self.c.register_forward_hook(lambda *_: None)

    def forward(self, *args: Tensor) -> Any:
        return self.f(self, *args)


def _spatial(m: Alone, x: Tensor, g: Tensor) -> Tensor:
    return F.relu(m.b(m.c(x)) * torch.sigmoid(g) + x)


def _views(m: Alone, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.transpose(2, 3)
    return F.relu(y * torch.sigmoid(y.mean((2, 3), keepdim=True))).transpose(2, 3).view(2, -1), m.b(m.c(x))


def _several(m: Alone, *args: Tensor) -> tuple[Tensor, ...]:
    x, g, u, v, t = args
    y = m.b(m.c(x))
    p = torch.relu(x * torch.sigmoid(g))
    return y, p, u * torch.sigmoid(v) + (t * 2) * torch.sigmoid(t.mean((2, 3), keepdim=True))


def _of_a_number(m: Alone, x: Tensor) -> Tensor:
    y = F.relu(m.b(m.c(x)))
    return x.shape[-2] * torch.sigmoid(y) + y * torch.sigmoid(y.mean((2, 3), keepdim=True)) + x.shape[0]


def _larger_residual(m: Alone, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(x * torch.sigmoid(x.mean((2, 3), keepdim=True)) + r), m.b(m.c(x))


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


ODD: dict[str, tuple[Callable[..., Any], list[tuple[Tensor, ...]]]] = {
    # A factor of two dimensions is one of rows and columns, though it has as many as there are images and channels.
    "a map of two dimensions": (
        _spatial,
        [(_randn(4, 4, 4, 4), _randn(4, 4, 1, 1)), (_randn(4, 4, 4, 4), _randn(4, 4))],
    ),
    "a map at the first call": (_spatial, [(_randn(4, 4, 4, 4), _randn(4, 4))]),
    "strides": (_views, [(_randn(2, 4, 6, 6),)]),
    "several that are none": (
        _several,
        [(_randn(4, 4, 4, 4), _randn(4, 4), _randn(4, 4, 4, 1), _randn(4, 1, 4, 1), _randn(4, 4, 4, 4))],
    ),
    "numbers": (_of_a_number, [(_randn(2, 4, 6, 6),), (_randn(3, 4, 5, 6),)]),
    "a larger residual": (_larger_residual, [(_randn(1, 4, 6, 6), _randn(3, 4, 6, 6))]),
}


@pytest.mark.parametrize("way", ["eval", "hooked", "train", "frozen"])
@pytest.mark.parametrize("name", ODD)
def test_products_that_are_no_gates(device: str, name: str, way: str) -> None:
    f, calls = ODD[name]
    model = randomised(Alone(f, way == "hooked").train(way == "train")).to(device)
    fused = fcb.fuse(copy.deepcopy(model), freeze=way == "frozen")
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        for args in [*calls, *calls]:
            args = tuple(t.to(device) for t in args)
            torch.testing.assert_close(fused(*args), model(*args), rtol=1e-5, atol=1e-5)
    with torch.backends.cudnn.flags(allow_tf32=False):
        for args in calls if way == "train" else ():
            args = tuple(t.to(device) for t in args)
            torch.testing.assert_close(fused(*args), model(*args), rtol=1e-5, atol=1e-5)
    assert not fcb.report(fused).not_captured
    if name != "numbers" and way in ("eval", "frozen"):
        assert not any(
            "relu" in g for g in added(fused, ("gate",)) if name not in ("a map of two dimensions", "strides")
        )


class Dense(nn.Module):
    """``join(self, x, y)`` in front of a BatchNorm of 2 C channels."""

    def __init__(self, join: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv1, self.conv2, self.bn1 = nn.Conv2d(3, C, 1), nn.Conv2d(3, C, 1, bias=False), nn.BatchNorm2d(C)
        self.bn, self.last = nn.BatchNorm2d(2 * C), nn.Conv2d(2 * C, 4, 1)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, self.conv1(x), F.relu(self.bn1(self.conv2(x))))


def _written_before(m: Dense, x: Tensor, y: Tensor) -> Tensor:
    both = torch.cat([x, y], 1)
    y += 1
    return F.relu(m.bn(both)) + y.mean()


def _read_twice(m: Dense, x: Tensor, y: Tensor) -> Tensor:
    both = torch.cat([x, y], 1)
    return F.relu(m.bn(both)) + both


CATS: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "relu": (lambda m, x, y: F.relu(m.bn(torch.cat([x, y], 1))), ["cat bn relu"]),
    "a convolution behind": (lambda m, x, y: m.last(F.silu(m.bn(torch.cat((x, y), dim=1)))), ["cat bn silu"]),
    "alone": (lambda m, x, y: m.bn(torch.concat([x, y], dim=1)), ["cat bn"]),
    "one": (lambda m, x, y: F.relu(m.bn(torch.cat([torch.cat([x, y], 1)], 1))), ["cat bn relu"]),
    "one twice": (lambda m, x, y: F.relu(m.bn(torch.cat([y, y], 1)) * 2.0), ["cat bn * 2 relu"]),
    "axis": (lambda m, x, y: F.relu(m.bn(torch.cat([x, y], axis=1))), ["cat bn relu"]),
    "of another dimension": (lambda m, x, y: F.relu(m.bn1(torch.cat([x, y], 2))), []),
    "from the end": (lambda m, x, y: F.relu(m.bn(torch.cat([x, y], -3))), []),
    "a residual": (lambda m, x, y: F.relu(m.bn(torch.cat([x, y], 1)) + torch.cat([y, x], 1)), []),
    "written before": (_written_before, []),
    "read twice": (_read_twice, []),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", CATS)
def test_cats(device: str, name: str, memory_format: torch.memory_format) -> None:
    join, groups = CATS[name]
    model = randomised(Dense(join).eval()).to(device, memory_format=memory_format)
    with torch.backends.cudnn.flags(allow_tf32=False):
        fused = compare(model, device, memory_format)
        assert added(fused) == groups
        if device == "cpu":
            compare(model, device, memory_format, freeze=True)


def test_a_snapshot_has_them() -> None:
    model = fcb.fuse(randomised(Dense(CATS["relu"][0]).eval()), freeze=True)
    x = torch.randn(2, 3, 5, 6).to(memory_format=torch.channels_last)
    with torch.no_grad():
        first = model(x)
        model.bn.weight.mul_(3)
        assert torch.equal(model(x), first)
        assert not torch.equal(fcb.thaw(model)(x), first)


@pytest.mark.parametrize("name", ["relu", "one twice"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_of_cats(device: str, name: str, training: bool) -> None:
    same_step(Dense(CATS[name][0]), device, training)


def test_more_tensors_than_the_op_takes() -> None:
    n = fcb.ops.MOST_PARTS + 1

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(2 * n)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.bn(torch.cat([x * i for i in range(n)], 1)))

    model = randomised(Many().eval())
    fused = fcb.fuse(copy.deepcopy(model))
    x = torch.randn(2, 2, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
    assert fcb.report(fused).groups() == ["bn relu"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_convolutions_of_a_gate_are_launched_alone(device: str, dtype: torch.dtype, memory_format: Any) -> None:
    """Nothing is cast or copied around a convolution with a bias and an activation; nor behind a change of the dtype."""
    model = nn.Sequential(nn.Conv2d(12, 5, 1), nn.SiLU(), nn.Conv2d(5, 12, 1), nn.Sigmoid()).eval().to(device)
    fused = fcb.fuse(copy.deepcopy(model))
    x = torch.randn(3, 12, 1, 1, device=device)
    with torch.no_grad():
        torch.testing.assert_close(fused.bfloat16()(x.bfloat16()), model.bfloat16()(x.bfloat16()), rtol=0.02, atol=0.02)
        model, fused, x = (t.to(dtype=dtype, memory_format=memory_format) for t in (model, fused, x))
        torch.testing.assert_close(fused(x), model(x), rtol=0.02, atol=0.02)
        with profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]) as profiler:
            fused(x)
            if device == "cuda":
                torch.cuda.synchronize()
    events = profiler.events() or []
    assert not any(e.name == "aten::_to_copy" for e in events)
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        kernels = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len(kernels) == 2 and all("pointwise_kernel" in name for name in kernels), kernels
