"""Snapshots whose consecutive groups run as one op."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fuse import close, randomised
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fused_conv_bn as fcb
from fused_conv_bn._fuse import chain, frozen

pytestmark = pytest.mark.skipif(
    not torch.ops.fused_conv_bn._packed_channels(), reason="oneDNN is preferred on this processor"
)


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """All convolutions are this package's, whatever the processor prefers."""
    monkeypatch.setattr(frozen, "_own_kernel_takes", lambda conv, size: True)


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(op.name().removeprefix("fused_conv_bn::"))
        return op(*args, **(kwargs or {}))


def ops_of(model: nn.Module, *args: Any) -> list[str]:
    with Names() as called:
        model(*args)
    return called.names


def conv(channels: int, filters: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(channels, filters, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(filters))


# How a gate's mean is taken, and how its product is written.
MEANS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "module": lambda m, x: m.pool(x),
    "method": lambda m, x: x.mean((2, 3), keepdim=True),
    "from the end": lambda m, x: x.mean([-1, -2], True),
    "function": lambda m, x: F.adaptive_avg_pool2d(x, 1),
}


class Block(nn.Module):
    """An inverted residual, with a squeeze-and-excite block in it where ``mean`` is given."""

    def __init__(self, channels: int, filters: int, kernel: int, stride: int, act: str, mean: str | None) -> None:
        super().__init__()
        inside = 4 * channels
        self.expand, self.spread = conv(channels, inside), conv(inside, inside, kernel, stride, inside)
        self.project = conv(inside, filters)
        self.pool, self.squeeze, self.excite = (
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(inside, 6, 1),
            nn.Conv2d(6, inside, 1),
        )
        self.act: Callable[[Tensor], Tensor] = getattr(F, act)
        self.mean, self.adds = mean, stride == 1 and channels == filters
        self.gate: Callable[[Tensor], Tensor] = torch.sigmoid if act == "silu" else F.hardsigmoid

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.spread(self.act(self.expand(x))))
        if self.mean is not None:
            gate = self.gate(self.excite(F.relu(self.squeeze(MEANS[self.mean](self, y)))))
            y = gate * y if self.mean == "module" else y * gate
        y = self.project(y)
        return y + x if self.adds else y


class Head(nn.Module):
    def __init__(self, channels: int, kind: str, bias: bool = True) -> None:
        super().__init__()
        self.pool, self.flatten, self.drop = nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Dropout(0.2)
        self.linear, self.kind = nn.Linear(channels, 10, bias), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mean":
            x = x.mean((2, 3))
        elif self.kind == "flatten":
            x = torch.flatten(self.pool(x), 1)
        else:
            x = self.flatten(self.pool(x))
        y: Tensor = self.linear(self.drop(x))
        return y


def net(act: str = "silu", mean: str | None = "module", head: str = "flatten") -> nn.Module:
    torch.manual_seed(3)
    blocks = Block(8, 8, 3, 1, act, mean), Block(8, 12, 5, 2, act, mean), Block(12, 12, 3, 1, act, mean)
    return randomised(nn.Sequential(conv(3, 8, 3, 2), nn.ReLU(), *blocks, Head(12, head))).eval()


def image(seed: int = 2, n: int = 2, size: int = 30) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def accurate(got: Tensor, model: nn.Module, x: Tensor) -> None:
    """At most twice as far from the values in float64 as eager is, in norm."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        eager = model(x.to(memory_format=torch.channels_last))
        unit = exact.norm() * torch.finfo(torch.float32).eps
        assert (got.double() - exact).norm() <= 2 * (eager.double() - exact).norm() + unit / 4
        assert got.shape == exact.shape and got.stride() == exact.stride()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("head", ["mean", "flatten", "module"])
@pytest.mark.parametrize(
    ("act", "mean"), [("relu6", None), *(("silu", name) for name in MEANS), ("hardswish", "module")]
)
def test_a_whole_model_is_one_op(act: str, mean: str | None, head: str, threads: int) -> None:
    plain = net(act, mean, head)
    model = fcb.fuse(copy.deepcopy(plain), image(), freeze=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for x in (image(), image(3, 1, 33), image(4, 5, 16)):  # of other sizes as well
            x = x.to(memory_format=torch.channels_last)
            accurate(model(x), plain, x)
            assert [n for n in ops_of(model, x) if "conv" in n or "linear" in n or "mean" in n] == [
                "_conv_packed_chain"
            ]
    finally:
        torch.set_num_threads(before)
    assert fcb.report(model).groups() == fcb.report(fcb.fuse(copy.deepcopy(plain), image())).groups()


class Branches(nn.Module):
    """Results that others read, and two of the op's for one step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8, 3), conv(8, 8), conv(8, 8)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = F.relu(self.a(x))
        b = F.leaky_relu(self.b(a) + a, 0.2)
        c = self.c(b)
        mean = self.pool(c)
        return a, b, F.softmax(c, 1), mean, mean.flatten(1), mean.flatten(1) * 2


def test_several_results() -> None:
    torch.manual_seed(5)
    plain = randomised(Branches().eval())
    model = fcb.fuse(copy.deepcopy(plain), image(), freeze=True)
    for x in (image(), image(3, 1, 9)):
        with torch.no_grad():
            for got, want in zip(model(x), plain(x), strict=True):
                close(got, want)
        assert ops_of(model, x).count("_conv_packed_chain") == 1
    results = model(image())
    kept = [r.clone() for r in results]
    model(image(9))
    assert all(torch.equal(r, k) for r, k in zip(results, kept, strict=True))


def test_a_chain_behind_another_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(F.relu(self.a(x)))
            z = F.max_pool2d(y, 3, 1, 1)
            gate = torch.sigmoid(self.d(F.relu(self.c(y.mean((2, 3), True)))))
            return z + y * gate

    plain = randomised(Two().eval())
    model = fcb.fuse(copy.deepcopy(plain), image(), freeze=True)
    with torch.no_grad():
        close(model(image()), plain(image()))
    assert ops_of(model, image()).count("_conv_packed_chain") == 2


def test_what_the_op_refuses_runs_by_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = net()
    model = fcb.fuse(copy.deepcopy(plain), image(), freeze=True)
    with torch.no_grad():
        empty = model(image()[:0])
        assert empty.shape == (0, 10)
        with pytest.raises(RuntimeError, match="channels"):
            model(torch.randn(2, 5, 30, 30))
        whole = model(image())

        def refuses(*args: Any) -> Any:
            raise RuntimeError("no")

        monkeypatch.setattr(chain, "_op", refuses)
        close(model(image()), whole)
        close(model(image().to(memory_format=torch.channels_last)), whole)


def test_a_residual_that_is_broadcast_later() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 8)

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return F.relu(self.b(F.relu(self.a(x))) + r)

    plain = randomised(Added().eval())
    x, r = image(), torch.randn(2, 8, 30, 30)
    model = fcb.fuse(copy.deepcopy(plain), (x, r), freeze=True)
    with torch.no_grad():
        for residual in (r, r[:1], r[:, :, :1, :1], r):
            close(model(x, residual), plain(x, residual))


def test_nan_passes() -> None:
    for act in ("relu6", "silu", "hardswish"):
        model = fcb.fuse(net(act), image(), freeze=True)
        x = image()
        x[1, 1, 4, 4] = float("nan")
        y = model(x)
        assert y[1].isnan().all() and not y[0].isnan().any()


def test_a_snapshot_of_the_classifier_too() -> None:
    plain = net()
    model = fcb.fuse(copy.deepcopy(plain), image(), freeze=True)
    first = model(image())
    state = model.state_dict()
    for m in (model, plain):
        with torch.no_grad():
            m[-1].linear.weight.mul_(2)  # type: ignore[union-attr, operator]
    assert torch.equal(model(image()), first)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in state.items())
    fcb.thaw(model)
    close(model(image()), plain(image()))
    assert "_conv_packed_chain" not in ops_of(model, image())
    fcb.fuse(model, freeze=True)
    close(model(image()), plain(image()))
    fcb.unfuse(model)
    close(model(image()), plain(image()))


@pytest.mark.parametrize("name", ["linear", "pool", "drop"])
def test_hooks_on_what_is_no_group(name: str) -> None:
    model = fcb.fuse(net(), image(), freeze=True)
    want, calls = model(image()), []
    watched = getattr(model[-1], name)
    handle = watched.register_forward_hook(lambda m, *a: calls.append(m))
    close(model(image()), want)
    assert calls == [watched]
    handle.remove()
    close(model(image()), want)
    assert calls == [watched]


def test_one_convolution_is_no_chain() -> None:
    model = fcb.fuse(randomised(nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d(1)).eval()), image(), freeze=True)
    assert "_conv_packed" in ops_of(model, image()) and "_conv_packed_chain" not in ops_of(model, image())


@pytest.mark.parametrize("model", [net(), net(mean=None), nn.Sequential(conv(3, 8, 5, 2), nn.ReLU()).eval()])
def test_flops_are_those_of_the_layers(model: nn.Module) -> None:
    """Of a chain with gates, of one without, and of a convolution by itself."""
    found = []
    for run in (model, fcb.fuse(copy.deepcopy(model), image(), freeze=True)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(image())
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


def test_what_one_dnn_runs_ends_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    if not frozen._has_packing():
        pytest.skip("needs oneDNN with AVX2")
    monkeypatch.setattr(frozen, "_own_kernel_takes", lambda conv, size: conv.out_channels != 48)
    plain = net(mean=None)
    model = fcb.fuse(copy.deepcopy(plain), image(), freeze=True)
    called = ops_of(model, image())
    assert called.count("_conv_packed_chain") == 2 and called.count("mkldnn::_convolution_pointwise") == 2
    accurate(model(image()), plain, image())


def test_many_threads_at_a_first_call() -> None:
    plain, results = net(), []
    model = fcb.fuse(copy.deepcopy(plain), freeze=True)
    want = plain(image())
    threads = [threading.Thread(target=lambda: results.extend(model(image()) for _ in range(3))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 24
    for got in results:
        close(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    plain = net().to(dtype)
    model = fcb.fuse(copy.deepcopy(plain), image().to(dtype), freeze=True)
    with torch.no_grad():
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(model(image().to(dtype)), plain(image().to(dtype)), rtol=tolerance, atol=tolerance)
    assert "_conv_packed_chain" not in ops_of(model, image().to(dtype))
