"""Gates and the 1x1 convolutions behind them as one op in fused models: on CUDA, and where these tests ask for it."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_conv_bn as fcb
from common import assert_no_worse_than_eager
from fused_conv_bn._fuse import blocks, channels_last, gates
from fused_conv_bn._fuse import tune as tuning
from small_network import random_statistics

C = 16
OPS = {"gate conv": (gates, "_gated_conv"), "gate": (gates, "_gate"), "conv": (blocks, "_conv_bn")}


class MBConv(nn.Module):
    """``f(self, y, g)``: what is behind a depthwise convolution, and its gate before the sigmoid."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.f = f
        self.conv = nn.Conv2d(3, C, 3, padding=1, bias=False)
        self.squeeze, self.excite = nn.Conv2d(C, 4, 1), nn.Conv2d(4, C, 1)
        self.project, self.bn, self.bn2 = nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.strided, self.padded = nn.Conv2d(C, C, 1, 2), nn.Conv2d(C, C, 1, padding=1)
        self.reflected = nn.Conv2d(C, C, 1, padding=1, padding_mode="reflect")
        self.wide, self.grouped = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 1, groups=2)

    def forward(self, x: Tensor) -> Any:
        y = F.silu(self.conv(x))
        return self.f(self, y, self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))


def gated(y: Tensor, g: Tensor) -> Tensor:
    return y * torch.sigmoid(g)


def _in_place(m: MBConv, y: Tensor, g: Tensor) -> Tensor:
    z = m.bn(m.project(gated(y, g)))
    z += y
    return z


def _expanded(m: MBConv, y: Tensor, g: Tensor) -> Tensor:
    z: Tensor = m.bn(m.project(y * torch.sigmoid(g).expand_as(y)))
    return z


def _written(m: MBConv, y: Tensor, g: Tensor) -> Tensor:
    z = gated(y, g)
    y += 1
    return m.bn(m.project(z)) + y


def _read_twice(m: MBConv, y: Tensor, g: Tensor) -> Tensor:
    z = gated(y, g)
    return m.bn(m.project(z)) + z


def _of_function(m: MBConv, y: Tensor, g: Tensor) -> Tensor:
    bn: Any = m.bn
    z = m.project(gated(y, g))
    return F.silu(F.batch_norm(z, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, bn.eps))


# The last groups of the model: "gate" is not in a convolution's.
PAIRS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "alone": (lambda m, y, g: m.bn(m.project(gated(y, g))), ["gate conv bn"]),
    "the gate first": (lambda m, y, g: m.bn(m.project(torch.sigmoid(g) * y)), ["gate conv bn"]),
    "hardsigmoid, method": (lambda m, y, g: m.bn(m.project(y.mul(F.hardsigmoid(g)))), ["gate conv bn"]),
    "expand_as": (_expanded, ["gate conv bn"]),
    "residual": (lambda m, y, g: m.bn(m.project(gated(y, g))) + y, ["gate conv bn add"]),
    "residual first, relu": (lambda m, y, g: F.relu(y + m.bn(m.project(gated(y, g)))), ["gate conv bn add relu"]),
    "residual in place": (_in_place, ["gate conv bn add"]),
    "the gate's sigmoid is a residual": (
        lambda m, y, g: m.bn(m.project(y * (s := torch.sigmoid(g)))) + s,
        ["gate conv bn"],
    ),
    "factor, silu": (lambda m, y, g: F.silu(m.bn(m.project(gated(y, g))) * 0.5), ["gate conv bn * 0.5 silu"]),
    "stride": (lambda m, y, g: F.relu(m.bn(m.strided(gated(y, g)))), ["gate conv bn relu"]),
    "padding": (lambda m, y, g: F.relu(m.bn(m.padded(gated(y, g)))), ["gate conv bn relu"]),
    "one pixel": (lambda m, y, g: m.bn(m.project(gated(y.mean((2, 3), True), g))), ["gate conv bn"]),
    "other strides": (lambda m, y, g: m.bn(m.project(gated(y.transpose(2, 3), g))), ["gate conv bn"]),
    "other padding": (lambda m, y, g: F.relu(m.bn(m.reflected(gated(y, g)))), ["gate", "conv bn relu"]),
    "a function's BatchNorm": (_of_function, ["gate conv bn silu"]),
    "two gates": (lambda m, y, g: m.bn(m.project(gated(gated(y, g), g * 2))), ["gate", "gate conv bn"]),
    "two convolutions": (
        lambda m, y, g: F.relu(m.bn(m.project(gated(F.silu(m.bn2(m.padded(gated(y, g)))), g)))),
        ["gate conv bn silu", "gate conv bn relu"],
    ),
    "3x3": (lambda m, y, g: m.bn(m.wide(gated(y, g))), ["gate", "conv bn"]),
    "grouped": (lambda m, y, g: m.bn(m.grouped(gated(y, g))), ["gate", "conv bn"]),
    "no BatchNorm": (lambda m, y, g: F.silu(m.project(gated(y, g))), ["gate", "conv silu"]),
    "an activation of the product": (lambda m, y, g: m.bn(m.project(F.relu(gated(y, g)))), ["gate relu", "conv bn"]),
    "a residual of the product": (lambda m, y, g: m.bn(m.project(gated(y, g) + y)), ["gate add", "conv bn"]),
    "read twice": (_read_twice, ["gate", "conv bn add"]),
    "written before": (_written, ["gate", "conv bn add"]),
    "a product for each channel": (
        lambda m, y, g: m.bn(m.project(gated(y, g))) * m.squeeze.weight.new_ones(C, 1, 1),
        ["gate conv bn"],
    ),
    "a map of the pixels": (lambda m, y, g: m.bn(m.project(y * torch.sigmoid(y.mean(1, True)))), ["conv bn"]),
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which ops are called, those of pairs on the CPU too."""
    found: list[str] = []

    def counted(op: Callable[..., Tensor], what: str) -> Callable[..., Tensor]:
        def call(*args: Any, **named: Any) -> Tensor:
            if what != "conv" or args[8] > 0:  # eps: a bias of 16 bits is a BatchNorm as well
                found.append(what)
            return op(*args, **named)

        return call

    monkeypatch.setattr(gates, "DEVICES", ("cpu", "cuda"))
    for what, (of, name) in OPS.items():
        monkeypatch.setattr(of, name, counted(getattr(of, name), what))
    return found


def model_of(name: str, device: str, memory_format: Any = torch.channels_last) -> nn.Module:
    model = random_statistics(MBConv(PAIRS[name][0]), torch.Generator().manual_seed(3))
    return model.to(device, memory_format=memory_format)


def data(device: str, dtype: torch.dtype = torch.float32, n: int = 2) -> Tensor:
    x = torch.randn(n, 3, 9, 8, generator=torch.Generator().manual_seed(4))
    return x.to(device, dtype, memory_format=torch.channels_last)


def separate(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A copy that is fused with gates by themselves."""
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(gates, "DEVICES", ())
        model = fcb.fuse(copy.deepcopy(model), x)
        assert not any(g.startswith("gate conv") for g in fcb.report(model).groups())
    return model


def groups_of(model: nn.Module) -> list[str]:
    """Those of the gate and of what is behind it."""
    return [g for g in fcb.report(model).groups() if "gate" in g or "bn" in g or g == "conv silu"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(
    name: str,
    dtype: torch.dtype,
    memory_format: Any,
    device: str,
    called: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit what the two groups are, and twice: the first call compares."""
    model = model_of(name, device, memory_format).to(dtype)
    fused = fcb.fuse(copy.deepcopy(model))
    with torch.no_grad():
        for x in (data(device, dtype), data(device, dtype), data(device, dtype, 3)):
            x = x.contiguous(memory_format=memory_format)
            unmerged = separate(model, x, monkeypatch)
            got = fused(x)
            called.clear()
            expected, eager, truth = unmerged(x), model(x), copy.deepcopy(model).double()(x.double())
            assert "gate conv" not in called
            assert torch.equal(got, expected) and got.stride() == expected.stride() == eager.stride()
            if dtype != torch.float16:
                assert_no_worse_than_eager(got, eager, truth)
    groups = PAIRS[name][1]
    found = groups_of(fused)
    assert sorted(found) == sorted(["conv silu", *groups])
    called.clear()
    with torch.no_grad():
        fused(data(device, dtype).contiguous(memory_format=memory_format))
    # A product of other strides is PyTorch's, and the convolution reads it.
    merged = 0 if name == "other strides" else sum(g.startswith("gate conv") for g in groups)
    assert called.count("gate conv") == merged
    if name != "other padding":  # which the module's own forward does
        assert called.count("conv") == sum("bn" in g for g in groups) - merged
    assert not fcb.report(fused).not_captured


def test_the_cpu_has_two_groups() -> None:
    model = model_of("residual", "cpu")
    fused = fcb.fuse(copy.deepcopy(model), data("cpu"))
    report = fcb.report(fused)
    assert groups_of(fused) == ["conv silu", "conv bn add", "gate"]
    assert {row.text for row in report.rows if row.module == "gate"} == {"gate, on the CPU PyTorch's own product"}


def test_the_report(device: str, called: list[str]) -> None:
    model = nn.Sequential(model_of("residual", device), nn.Identity()).eval()
    with torch.no_grad():
        model = fcb.fuse(model, data(device))
    rows = {row.path: row for row in fcb.report(model).rows}
    assert rows["0.project"].text == "gate conv bn add" and rows["0.project"].algorithm
    assert rows["0.bn"].text == "with 0.project"
    (gate,) = (row for row in rows.values() if row.module == "gate")
    assert (gate.path, gate.state, gate.text, gate.reason) == ("mul", "fused", "with 0.project", "")
    assert fcb.report(model).groups().count("gate conv bn add") == 1
    part = {row.path: row.text for row in fcb.report(model[0]).rows}
    assert part["project"] == "gate conv bn add" and part["bn"] == "with project"
    assert "mul" in str(fcb.report(model)) and "with 0.project" in str(fcb.report(model))


def test_a_profile(device: str, called: list[str]) -> None:
    model, x = model_of("alone", device), data(device)
    with torch.no_grad():
        fused = fcb.fuse(model, x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            fused(x)
    algorithm = next(row.algorithm for row in fcb.report(fused).rows if row.path == "project")
    names = {e.name for e in profile.events() or []}
    assert f"fused_conv_bn: gate conv bn [{algorithm}] bn" in names and "fused_conv_bn::gate_conv_bn_scale" in names


class Alone(nn.Module):
    """A product of two arguments in front of a convolution."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        self.project, self.bn, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        if hooked:  # then no first call is compared
            self.other.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        y: Tensor = F.relu(self.bn(self.project(x * torch.sigmoid(g)))) + self.other(x)
        return y


@pytest.mark.parametrize("way", ["eval", "hooked", "train", "grad", "frozen"])
@pytest.mark.parametrize("first", [(4, 4, 1, 1), (4, 4)])
def test_products_that_are_no_gates(
    device: str, first: tuple[int, ...], way: str, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first call, or at a later one."""
    model = random_statistics(Alone(way == "hooked"), torch.Generator().manual_seed(3)).train(way == "train").to(device)
    fused = fcb.fuse(copy.deepcopy(model), freeze=way == "frozen")
    x = torch.randn(4, 4, 4, 4, device=device)
    with torch.set_grad_enabled(way == "grad"):
        for shape in (
            first,
            (4, 4, 1, 1),
            (4, 4),
            (4, 1, 4, 4),
            (4, 4, 4, 4),
            (1, 4, 1, 1),
            (2, 4, 4, 4, 4),
            (),
            first,
        ):
            g = torch.randn(shape, device=device)
            for args in ((x, g), (x, g.double())) if len(shape) < 5 else ((x, g[0]),):
                try:
                    expected = model(*args)
                except RuntimeError:  # a product in float64
                    with pytest.raises(RuntimeError):
                        fused(*args)
                    continue
                torch.testing.assert_close(fused(*args), expected, rtol=1e-5, atol=1e-5)
    has_gates = len(first) == 4
    if way == "eval":
        assert [g for g in fcb.report(fused).groups() if "relu" in g] == [
            "gate conv bn relu add" if has_gates else "conv bn relu add"
        ]
        called.clear()
        with torch.no_grad():
            fused(x, x[:, :, :1, :1].contiguous())
        assert called == (["gate conv"] if has_gates else ["conv"])
    if way == "train":
        assert "gate conv" not in called


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients(device: str, training: bool, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a gate is in the convolution there."""
    model = model_of("residual in place", device).double().train(training)
    fused = fcb.fuse(copy.deepcopy(model))
    x = data(device, torch.float64)
    for m in (model, fused, fused):
        called.clear()
        m.zero_grad()
        m(x).pow(2).sum().backward()
    assert "gate conv" not in called
    for p, q in zip(model.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)
    if training:
        assert not any("gate conv" in g for g in fcb.report(fused).groups())


def test_gradients_of_one_tensor(device: str, called: list[str]) -> None:
    """Each alone: of the input, the gate, the residual, parameters."""
    model = model_of("residual", device).double().requires_grad_(False)
    fused = fcb.fuse(copy.deepcopy(model))
    x = data(device, torch.float64)
    fused(x)
    called.clear()
    assert not fused(x).requires_grad and called.count("gate conv") == 1
    for path in ("conv.weight", "excite.bias", "project.weight", "bn.bias"):
        called.clear()
        grads = []
        for m in (model, fused):
            p = m.get_parameter(path).requires_grad_()
            grads += torch.autograd.grad(m(x).pow(2).sum(), p)
            p.requires_grad_(False)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)
        assert "gate conv" not in called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["residual in place", "factor, silu", "a function's BatchNorm"])
@pytest.mark.parametrize("grad", [False, True])
def test_autocast(
    name: str, dtype: torch.dtype, grad: bool, device: str, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op where what it reads is of 16 bits by then, and the sum of one dtype."""
    model, x = model_of(name, device), data(device, dtype)
    fused = fcb.fuse(copy.deepcopy(model))
    with torch.autocast(device, torch.bfloat16), torch.set_grad_enabled(grad):
        unmerged = separate(model, x, monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(gates, "DEVICES", ())
            expected = unmerged(x)
        fused(x)
        called.clear()
        got = fused(x)
        assert got.dtype == expected.dtype == model(x).dtype
    assert torch.equal(got, expected)
    assert called.count("gate conv") == int(not grad and name != "a function's BatchNorm")


def test_a_residual_of_another_dtype_under_autocast(
    device: str, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's sum is of the wider one, where no first call is compared either."""

    class Model(MBConv):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            y = self.conv(x)
            return F.relu(self.bn(self.project(y * torch.sigmoid(y.mean((2, 3), keepdim=True)))) + r)

    model = hooked(random_statistics(Model(lambda *_: None), torch.Generator().manual_seed(3)).to(device))
    fused, x = fcb.fuse(copy.deepcopy(model)), data(device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        r = model.conv(x).detach()
        for residual in (r, r.float(), r):
            called.clear()
            expected, got = model(x, residual), fused(x, residual)
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)
            assert called.count("gate conv") == int(residual is r)


def hooked(model: nn.Module) -> nn.Module:
    """A model whose first call is not compared."""
    model.get_submodule("grouped").register_forward_hook(lambda *_: None)
    return model


def test_what_is_left_to_the_modules(device: str, called: list[str]) -> None:
    """A BatchNorm of the batch's statistics, a padding by name, and a BatchNorm that refuses images."""
    for change in ("statistics", "padding", "dimensions"):
        model = hooked(model_of("alone", device))
        if change == "padding":
            model.project = nn.Conv2d(C, C, 1, padding="same").to(device)
        else:
            of: Any = nn.BatchNorm3d if change == "dimensions" else nn.BatchNorm2d
            model.bn = of(C, track_running_stats=change == "dimensions").to(device).eval()
        fused = fcb.fuse(copy.deepcopy(model))
        with torch.no_grad():
            if change == "dimensions":
                with pytest.raises(ValueError, match="expected 5D input"):
                    fused(data(device))
            else:
                torch.testing.assert_close(fused(data(device)), model(data(device)), rtol=1e-5, atol=1e-5)
        assert "gate conv" not in called


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["image", "gate"])
def test_odd_values(where: str, value: float, device: str, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_of("residual first, relu", device), data(device)
    fused, unmerged = fcb.fuse(copy.deepcopy(model), x), separate(model, x, monkeypatch)
    with torch.no_grad():
        for m in (model, fused, unmerged):
            if where == "gate":
                m.excite.bias[1] = value
            else:
                m.project.weight[1] = 0  # 0 * inf
        if where == "image":
            x[0, 1, 2, 3] = value
        called.clear()
        got, expected, eager = fused(x), unmerged(x), model(x)
        assert called.count("gate conv") == 1
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(), expected.nan_to_num())
    assert torch.equal(got.isnan(), eager.isnan())


def test_copies_pickles_snapshots_and_the_way_back(device: str, called: list[str]) -> None:
    model, x = model_of("residual", device), data(device)
    model.f = _in_place
    with torch.no_grad():
        expected = model(x)
        fused = fcb.fuse(copy.deepcopy(model), x)
        got = fused(x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        for one in (copy.deepcopy(fused), fcb.fuse(pickle.loads(pickle.dumps(fused)))):
            one(x)
            called.clear()
            assert torch.equal(one(x), got) and called.count("gate conv") == 1
        frozen = fcb.fuse(copy.deepcopy(model), x, freeze=True)
        torch.testing.assert_close(frozen(x), expected, rtol=1e-5, atol=1e-5)
        assert "gate conv bn add" in fcb.report(frozen).groups()
        assert torch.equal(fcb.thaw(frozen)(x), got)
        assert type(fcb.unfuse(fused)) is MBConv
        called.clear()
        assert torch.equal(fused(x), expected) and called == []


def test_parameters_and_modules_that_change(device: str, called: list[str]) -> None:
    model, x = model_of("residual", device), data(device)
    fused = fcb.fuse(copy.deepcopy(model), x)

    def same(*ops: str) -> None:
        fused(x)
        called.clear()
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
        assert [op for op in called if op != "gate"] == list(ops)

    with torch.no_grad():
        for m in (model, fused):
            m.project.weight.mul_(2)
            m.bn.eps = 0.5
        same("gate conv")
        for m in (model, fused):
            m.project.padding = (1, 1)
            m.f = lambda m, y, g: m.bn(m.project(gated(y, g)))
        same("gate conv")
        for m in (model, fused):
            m.project = nn.Conv2d(C, C, 3, padding=1, bias=False).to(device)
            m.project.load_state_dict({"weight": torch.ones(C, C, 3, 3)})
        same("conv")
        seen: list[int] = []
        handle = fused.project.register_forward_hook(lambda *_: seen.append(1))
        same()
        assert len(seen) > 0
        handle.remove()
        same("conv")


def test_threads(device: str, called: list[str]) -> None:
    model, x = model_of("residual", device), data(device)
    with torch.no_grad():
        fused = fcb.fuse(model, x)
        expected = fused(x)
    results: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            results.extend(fused(x) for _ in range(10))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 40 and all(torch.equal(y, expected) for y in results)


def test_an_exported_program(device: str, called: list[str]) -> None:
    model, x = model_of("residual", device), data(device)
    with torch.no_grad():
        fused = fcb.fuse(model, x)
        with fcb.export_ops():
            program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names.count("fused_conv_bn.gate_conv_bn_scale.default") == 1
    with torch.no_grad():
        for n in (1, 2, 5):
            torch.testing.assert_close(program.module()(data(device, n=n)), fused(data(device, n=n)))


def test_in_channels_last_inside(device: str, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its elements are counted as those of the two groups."""
    asked: list[channels_last.Seen] = []
    monkeypatch.setattr(channels_last, "DEVICES", {"cpu", "cuda"})
    monkeypatch.setattr(channels_last, "pays", lambda seen: asked.append(seen) or True)
    monkeypatch.setattr(channels_last, "_is_own", lambda algorithm: algorithm is not None)
    monkeypatch.setattr(channels_last._Trial, "_count", _counted(channels_last._Trial._count))
    model, x = model_of("residual", device, torch.contiguous_format), data(device).contiguous()
    with torch.no_grad():
        fused = fcb.fuse(copy.deepcopy(model), x)
        assert fcb.report(fused).channels_last == [""]
        called.clear()
        y = fused(x)
        assert called.count("gate conv") == 1 and y.is_contiguous()
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)
    pixels = 2 * C * 9 * 8
    assert 2 * pixels + 2 * C in asked[0].gained


def _counted(count: Callable[..., None]) -> Callable[..., None]:
    """As if a kernel took each convolution in channels_last alone."""
    return lambda self, block, x, y, is_own, was_own: count(self, block, x, y, True, False)


def test_choices_are_measured(device: str, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolution is a case of its own problem, whoever calls it."""
    model, x = model_of("alone", device), data(device)
    with torch.no_grad():
        fused = fcb.fuse(copy.deepcopy(model), x)
        unmerged = separate(model, x, monkeypatch)

    def problems(m: nn.Module) -> set[Any]:
        monkeypatch.setattr(
            tuning._ops, "_candidates", lambda *args, **named: ("cpu", (*args[1].shape, *args[0].shape), "aten")
        )
        return {case.problem for case in tuning.cases_of(m, (x,))}

    assert problems(fused) == problems(unmerged)
    (call,) = (
        call
        for case in tuning.cases_of(fused, (x,))
        for call in case.calls
        if call.op is torch.ops.fused_conv_bn.gate_conv_bn_scale.default
    )
    named = call.tensors(torch.Generator(device))
    assert named["gate"].shape == (2, C, 1, 1)
    x_wide = torch.cat([named["input"]] * 3)
    part = tuning._part(call.op, named | {"input": x_wide, "gate": torch.cat([named["gate"]] * 3)})
    assert call.op(**part).shape == (4, C, 9, 8)
