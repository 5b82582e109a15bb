"""fuse() of what changes a BatchNorm's result for each channel, of activations in several calls, and of layers that
PyTorch computes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn import ops
from fused_conv_bn._fuse.backend import compile_backend

C = 8


class Model(nn.Module):
    def __init__(self, run: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.run = run
        dims = len(shape)
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.up = {4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}.get(dims, nn.ConvTranspose1d)(C, C, 3, 1, 1, groups=2)
        self.linear = nn.Linear(C, C)
        self.bn = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[dims](C)
        self.silu, self.sigmoid, self.softplus = nn.SiLU(), nn.Sigmoid(), nn.Softplus()
        self.sharp = nn.Softplus(beta=2.0)
        self.one = nn.Parameter(torch.tensor([0.7]))
        self.zero_dims = nn.Parameter(torch.tensor(1.3))
        self.gain = nn.Parameter(torch.randn(C, *[1] * (dims - 2)))
        self.row = nn.Parameter(torch.randn(C))
        self.whole = nn.Parameter(torch.randn(shape))
        self.register_buffer("shift", torch.randn(1, C, *[1] * (dims - 2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def by_hand(m: Any, y: Tensor) -> Tensor:
    return y * torch.sigmoid(y)


def mish(m: Any, y: Tensor) -> Tensor:
    return torch.multiply(torch.tanh(m.softplus(y)), y)


def sharp_mish(m: Any, y: Tensor) -> Tensor:
    return y * torch.tanh(m.sharp(y))


def half_read(m: Any, y: Tensor) -> Tensor:
    """The sigmoid is read once more."""
    gate = torch.sigmoid(y)
    return y * gate + gate


def in_place(m: Any, y: Tensor) -> Tensor:
    y *= m.gain
    y += m.shift
    y /= 3.0
    return y


def of_another(m: Any, y: Tensor) -> Tensor:
    return y * m.sigmoid(m.bn(y))


IMAGES = (2, C, 64, 80)
CASES: dict[str, tuple[tuple[int, ...], Callable[..., Tensor], list[str]]] = {
    "factor": (IMAGES, lambda m, x: m.bn(m.up(x)) * m.gain, ["convT bn * c"]),
    "0-dim": (IMAGES, lambda m, x: m.silu(m.bn(m.up(x)) * m.zero_dims), ["convT bn * c silu"]),
    "sum": (IMAGES, lambda m, x: torch.relu(m.shift + m.bn(x)), ["bn + c relu"]),
    "numbers": (IMAGES, lambda m, x: (m.bn(m.conv(x)) * 2 + 0.5 - 1.5) / 4, ["conv bn * 2 + 0.5 + -1.5 * 0.25"]),
    "both": (IMAGES, lambda m, x: (m.bn(m.conv(x)) * 2 + m.one) * m.gain + x, ["conv bn * 2 + c * c add"]),
    "in place": (IMAGES, lambda m, x: in_place(m, m.bn(m.conv(x))), ["conv bn * c + c * 0.333333"]),
    "zero": (IMAGES, lambda m, x: torch.relu(0 + m.bn(m.conv(x)) + x), ["conv bn add relu"]),
    "from a number": (IMAGES, lambda m, x: 1.0 - m.bn(m.conv(x)), ["conv bn"]),
    "a number over it": (IMAGES, lambda m, x: 1.0 / (4 + m.bn(m.conv(x)).tanh()), ["conv bn tanh"]),
    "columns": ((2, C, 4, C), lambda m, x: m.bn(m.conv(x)) * m.row, ["conv bn"]),
    "many columns": ((2, C, 512, C), lambda m, x: m.bn(m.up(x)) * m.row, ["convT bn"]),
    "whole": (IMAGES, lambda m, x: m.silu(m.bn(m.conv(x)) + m.whole), ["conv bn add silu"]),
    "small": ((2, C, 4, 4), lambda m, x: m.silu(m.bn(m.conv(x)) * m.gain + m.shift), ["conv bn * c + c silu"]),
    "rows": ((9000, C), lambda m, x: by_hand(m, (m.bn(m.linear(x)) + m.one) / 1.0), ["linear bn + c silu"]),
    "row": ((9000, C), lambda m, x: m.bn(m.linear(x)) * m.row, ["linear bn * c"]),
    "lines": ((16, C, 600), lambda m, x: m.bn(m.up(x)) * m.gain * 3, ["convT bn * c * 3"]),
    "volumes": ((2, C, 9, 20, 30), lambda m, x: mish(m, m.bn(m.up(x))), ["convT bn mish"]),
    "silu": (IMAGES, lambda m, x: by_hand(m, m.bn(m.conv(x))), ["conv bn silu"]),
    "silu of modules": (IMAGES, lambda m, x: (lambda y: m.sigmoid(y).mul(y))(m.bn(m.conv(x))), ["conv bn silu"]),
    "mish": (IMAGES, lambda m, x: m.bn(mish(m, m.conv(x))), ["conv mish", "bn"]),
    "another mish": (IMAGES, lambda m, x: sharp_mish(m, m.bn(m.conv(x))), ["conv bn"]),
    "half read": (IMAGES, lambda m, x: half_read(m, m.bn(m.conv(x))), ["conv bn"]),
    "of another": (IMAGES, lambda m, x: of_another(m, m.conv(x)), ["bn sigmoid"]),
    "function": (IMAGES, lambda m, x: (lambda y: y * F.softplus(y).tanh())(m.bn(m.conv(x))), ["conv bn mish"]),
}


SHAPES_DECIDE = ("columns", "many columns", "of another")
"""What is a factor for each channel, or a gate, is told by a call in evaluation mode alone: elsewhere PyTorch's ops run."""


def model_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[Model, Tensor]:
    torch.manual_seed(4)
    shape, run, _ = CASES[name]
    model = Model(run, shape)
    with torch.no_grad():
        for t, low in ((model.bn.weight, -1.5), (model.bn.bias, -0.5), (model.bn.running_mean, -1.0)):
            t.uniform_(low, 1.5)
        model.bn.running_var.uniform_(0.5, 2.0)
    return model.to(dtype), torch.randn(shape).to(dtype)


def results(model: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """The result, all gradients and the statistics."""
    x = x.clone().requires_grad_()
    y = model.train(training)(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    y.backward(dy)
    parameters = [p for p in model.parameters() if p.grad is not None]
    found = [y.detach(), x.grad, *(p.grad for p in parameters), *model.buffers()]
    return [t.double() for t in found]


def norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.detach().double().square().sum() for t in tensors]).sum().sqrt())


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name: str, training: bool) -> None:
    model, x = model_of(name)
    fused = fcb.fuse(copy.deepcopy(model))
    exact = results(copy.deepcopy(model).double(), x.double(), training)
    eager, ours = results(copy.deepcopy(model), x, training), results(fused, x, training)
    assert len(ours) == len(eager) == len(exact)
    for mine, theirs, right in zip(ours, eager, exact, strict=True):
        # What is 0 but for roundings, as the gradient of a bias in front of a BatchNorm, is as small as eager's.
        allowed = 2 * norm([theirs - right]) + 2e-7 * norm([right]) + 1e-7 * norm(exact)
        assert norm([mine - right]) <= allowed
    expected = CASES[name][2]
    if not training or name not in SHAPES_DECIDE:
        assert fcb.report(fused).groups() == expected


@pytest.mark.parametrize("name", CASES)
def test_without_gradients(name: str) -> None:
    model, x = model_of(name)
    fused = fcb.fuse(copy.deepcopy(model))
    with torch.no_grad():
        for training in (False, True, False):
            expected = model.train(training)(x)
            torch.testing.assert_close(fused.train(training)(x), expected, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(fused(x), model(x), atol=2e-5, rtol=2e-5)
    for mine, theirs in zip(fused.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["both", "rows", "mish", "sum"])
def test_the_fused_op_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not PyTorch's ops, which would be as right."""
    from fused_conv_bn._fuse import blocks

    def never(*_: Any) -> Tensor:
        raise AssertionError("PyTorch's ops run")

    model, x = model_of(name)
    fused = fcb.fuse(model)
    with torch.no_grad():
        fused.eval()(x)
    monkeypatch.setattr(blocks.StepsBlock if name != "mish" else blocks.ConvBlock, "plain", never)
    for training in (False, True):
        with torch.no_grad():
            fused.train(training)(x)


def test_changes_are_followed() -> None:
    """Of the tensors, their values and sizes, and of those that are no parameters any more."""
    model, x = model_of("both")
    model.eval()
    fused = fcb.fuse(copy.deepcopy(model))
    for change in ("values", "one for all", "another dtype"):
        for m in (model, fused):
            with torch.no_grad():
                if change == "values":
                    m.gain.mul_(-2.0)
                else:
                    m.gain = nn.Parameter(torch.full((1,), 0.3, dtype=torch.float64 if "d" in change else None))
        for training in (False, True):
            expected, got = model.train(training)(x), fused.train(training)(x)
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", ["both", "small", "row", "columns"])
def test_what_runs_without_the_steps(name: str, training: bool) -> None:
    """Under autocast and of small tensors the convolution and its BatchNorm still are one op."""
    model, x = model_of(name)
    fused = fcb.fuse(copy.deepcopy(model)).train(training)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, eager = fused(x), model.train(training)(x)
            assert ours.dtype == eager.dtype
            with torch.profiler.profile() as profile:
                fused(x)
        exact = copy.deepcopy(model).double()(x.double())
        floor = 2.0**-9 if autocast else 2.0**-23
        assert norm([ours - exact]) <= 2 * norm([eager - exact]) + floor * norm([exact])
        names = {event.name for event in profile.events()}
        if name in ("both", "small") and (autocast or name == "small"):
            assert any("fused_conv_bn" in n for n in names), names
        assert not fcb.report(fused).not_captured


def test_a_hook_keeps_its_calls() -> None:
    model, x = model_of("silu of modules")
    fused = fcb.fuse(model.eval())
    seen: list[Tensor] = []
    fused.sigmoid.register_forward_hook(lambda m, inputs, y: seen.append(y))
    fused(x)
    assert fcb.report(fused).groups() == ["conv bn"] and seen


def test_division_by_zero() -> None:
    model, x = model_of("numbers")
    model.run = lambda m, x: m.bn(m.conv(x)) / 0
    fused = fcb.fuse(copy.deepcopy(model).eval())
    torch.testing.assert_close(fused(x), model.eval()(x))
    assert fcb.report(fused).groups() == ["conv bn"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    for name in ("both", "rows", "factor"):
        model, x = model_of(name, dtype)
        fused = fcb.fuse(copy.deepcopy(model))
        for training in (False, True):
            exact = copy.deepcopy(model).double().train(training)(x.double())
            eager, ours = model.train(training)(x), fused.train(training)(x)
            assert ours.dtype == dtype
            floor = 8 * torch.finfo(dtype).eps if dtype == torch.float64 else torch.finfo(dtype).eps / 2
            assert norm([ours - exact]) <= 2 * norm([eager - exact]) + floor * norm([exact])


def test_frozen() -> None:
    for name in ("both", "silu", "rows", "mish"):
        model, x = model_of(name)
        expected = model.eval()(x)
        with torch.no_grad():
            frozen = fcb.fuse(copy.deepcopy(model), x, freeze=True)
            for _ in range(2):
                torch.testing.assert_close(frozen(x), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["silu", "function", "numbers"])
def test_compiled(name: str) -> None:
    model, x = model_of(name)
    model.eval()
    with torch.no_grad():
        compiled = torch.compile(model, backend=functools.partial(compile_backend, options={"then": "eager"}))
        torch.testing.assert_close(compiled(x), model(x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("shape", "layout", "is_ours"),
    [
        ((4, C, 48, 48), torch.contiguous_format, True),
        ((4, C, 16, 16), torch.contiguous_format, False),
        ((4, C, 48, 48), torch.channels_last, False),
        ((8, C, 1200), torch.contiguous_format, True),
        ((2, C, 8, 24, 24), torch.contiguous_format, True),
        ((9000, C), torch.contiguous_format, False),
    ],
)
def test_a_norm_alone_in_training(
    shape: tuple[int, ...], layout: torch.memory_format, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op where it was measured to be faster, PyTorch's elsewhere; as exact either way."""
    calls = []
    op = ops.bn_scale_train
    monkeypatch.setattr(ops, "bn_scale_train", lambda *args, **named: (calls.append(1), op(*args, **named))[1])
    model = Model(lambda m, x: m.bn(torch.sin(x)), shape)
    x = torch.randn(shape).contiguous(memory_format=layout)
    fused = fcb.fuse(copy.deepcopy(model))
    ours, eager = results(fused, x, True), results(copy.deepcopy(model), x, True)
    for mine, theirs, right in zip(ours, eager, results(model.double(), x.double(), True), strict=True):
        assert norm([mine - right]) <= 2 * norm([theirs - right]) + 2e-7 * norm([right])
    assert len(calls) == is_ours
    assert fcb.report(fused).groups() == ["bn"] and "where that is faster" in str(fcb.report(fused))


def test_rows_of_layers_in_front() -> None:
    model, x = model_of("rows")
    fused = fcb.fuse(model)
    fused.train()(x)
    rows = {row.path: row for row in fcb.report(fused).rows}
    assert rows["linear"].module == "linear" and rows["linear"].text.startswith("linear bn + c silu, one pass")
    assert rows["bn"].text == "with linear"
    fused.eval()(x)
    alone = nn.Sequential(nn.ConvTranspose2d(C, C, 3), nn.BatchNorm2d(C))
    alone = fcb.fuse(alone)
    alone(torch.randn(2, C, 5, 5))
    assert fcb.report(alone).rows[0].text == "convT bn, one pass behind PyTorch's op where that is faster"
