"""fuse(model) of small models that other rewriters get wrong: the same results, and exactly the groups that there are."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_conv_bn as fcb


class Model(nn.Module):
    """A stem and what a test makes of it: ``run(self, x)``."""

    def __init__(self, run: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.c, self.b, self.r = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.c2, self.b2 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def in_place_after(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    z = m.b(y)
    y.add_(1)
    return z + y


def shared_input_written(m: Any, x: Tensor) -> Tensor:
    """What the convolution reads is written before what follows its BatchNorm."""
    x = x + 0
    y = m.b(m.c(x))
    x.mul_(2)
    return y + x


def asked_for_its_class(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.c(x))
    if isinstance(y, Tensor):
        y = y * 3
    return y


def own_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        y = m.c(x)
    return m.b(y.float())


def in_a_list(m: Any, x: Tensor) -> Tensor:
    for layer in [m.c, m.b, m.r]:
        x = layer(x)
    return x


# What runs, and the groups that the report has then.
MODELS: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "plain": (lambda m, x: m.r(m.b(m.c(x))), ["conv bn relu"]),
    "no activation": (lambda m, x: m.b(m.c(x)), ["conv bn"]),
    "factor": (lambda m, x: m.b(m.c(x)) * 0.5, ["conv bn * 0.5"]),
    "add and relu": (lambda m, x: F.relu(m.b(m.c(x)) + x), ["conv bn add relu"]),
    "add from the right": (lambda m, x: F.silu(x + m.b(m.c(x))), ["conv bn add silu"]),
    "activation, then add": (lambda m, x: x + F.silu(m.b(m.c(x))), ["conv bn silu add"]),
    "two of them added": (
        lambda m, x: F.relu(m.b(m.c(x)) + m.b2(m.c2(x))),
        ["conv bn add relu", "conv bn"],
    ),
    "a chain": (lambda m, x: F.gelu(m.b2(m.c2(m.r(m.b(m.c(x)))))), ["conv bn relu", "conv bn gelu"]),
    "conv also without bn": (lambda m, x: m.b(m.c(x)) + m.c(x), ["conv bn add"]),
    "applied twice": (lambda m, x: m.b(m.c(m.b(m.c(x)))), ["conv bn"]),
    "one conv, two bns": (lambda m, x: (y := m.c(x), m.b(y) + m.b2(y))[1], ["bn add", "bn"]),
    "one bn behind two convs": (lambda m, x: m.b(m.c(x)) + m.b(m.c2(x)), ["conv bn add", "conv bn"]),
    "bn also of x alone": (lambda m, x: m.b(m.c(x)) + m.b(x), ["conv bn add", "bn"]),
    "conv's result read twice": (lambda m, x: (y := m.c(x), m.b(y) * y)[1], ["bn"]),
    "other order than registered": (lambda m, x: m.b2(m.c(F.relu(m.b(m.c2(x))))), ["conv bn", "conv bn relu"]),
    "two sizes": (lambda m, x: m.b(m.c(x)).mean() + m.b(m.c(x[..., ::2, ::2])), ["conv bn"]),
    "written after it was read": (in_place_after, ["bn"]),
    "input written in between": (shared_input_written, ["conv bn"]),
    "relu's input read again": (lambda m, x: (y := m.b(m.c(x)), F.relu(y) + y)[1], ["conv bn"]),
    "asks for a class": (asked_for_its_class, ["conv bn * 3"]),
    "autocast of its own": (own_autocast, []),
    "a list of layers": (in_a_list, ["conv bn relu"]),
    "a branch by value": (lambda m, x: m.b(m.c(x)) if x.sum() > 0 else m.b(m.c(-x)), []),
    "a branch by shape": (lambda m, x: m.b(m.c(x)) if x.shape[0] > 1 else x, []),
    "scaled by a tensor": (lambda m, x: m.b(m.c(x)) * x, ["conv bn"]),
    "bn behind cat": (
        lambda m, x: F.relu(m.b(torch.cat([x[:, :2], x[:, 2:]], 1)) + x),
        ["bn add relu"],
    ),
    "broadcast residual": (lambda m, x: m.b(m.c(x)) + x.mean((2, 3), True), ["conv bn"]),
    "conv without bn": (lambda m, x: F.relu(m.c(x)), ["conv relu"]),
    "conv without bn, added": (lambda m, x: F.silu(x + m.c(x)), ["conv add silu"]),
    "conv, activation, added": (lambda m, x: m.c(x).sigmoid() + x, ["conv sigmoid add"]),
    "conv without bn in front of one": (lambda m, x: m.b(F.relu(m.c(x))), ["conv relu", "bn"]),
    "conv times a number": (lambda m, x: F.relu(m.c(x) * 2), []),
    "conv that others read": (lambda m, x: (y := m.c(x), F.relu(y) + y)[1], []),
    "conv and bn, and a conv to add": (lambda m, x: m.b(m.c(x)) + m.c2(x), ["conv bn add"]),
    "hardtanh": (lambda m, x: F.hardtanh(m.b(m.c(x)), 0.0, 6.0), ["conv bn relu6"]),
    "another hardtanh": (lambda m, x: F.hardtanh(m.b(m.c(x)), 0.0), ["conv bn"]),
    "functional dropout": (lambda m, x: F.relu(F.dropout(m.b(m.c(x)), 0.5, False)), ["conv bn relu"]),
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            for t, low, high in (
                (m.running_mean, -1, 1),
                (m.running_var, 0.5, 2),
                (m.weight, 0.5, 1.5),
                (m.bias, -1, 1),
            ):
                with torch.no_grad():
                    t.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)
    return model


def model_of(name: str, **modules: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return randomised(Model(MODELS[name][0], **modules))


def data(seed: int = 2) -> Tensor:
    return torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    largest = float(b.detach().abs().max()) if b.numel() else 0.0
    torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6 * largest)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation(name: str, device: str) -> None:
    model = model_of(name).eval().to(device)
    inputs = data(2).to(device), data(3).to(device)
    want = [model(x) for x in inputs]
    keys, state = list(model.state_dict()), copy.deepcopy(model.state_dict())
    assert fcb.fuse(model) is model and fcb.fuse(model) is model
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for x, expected in zip(inputs, want, strict=True):
                close(model(x), expected)
    pools = ["mean"] if device == "cuda" and name == "broadcast residual" else []
    assert fcb.report(model).groups() == MODELS[name][1] + pools
    assert list(model.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    fcb.unfuse(model)
    assert type(model) is Model and torch.equal(model(inputs[0]), want[0])


@pytest.mark.parametrize("name", MODELS)
def test_training(name: str, device: str) -> None:
    """Results, gradients and statistics."""
    plain, fused = model_of(name).train().to(device), fcb.fuse(model_of(name).train().to(device))
    for s in (2, 3):
        results = []
        for model in (plain, fused):
            x = data(s).to(device).requires_grad_()
            y = model(x)
            try:
                y.square().mean().backward()
            except RuntimeError:  # eager refuses what was written after it was saved, a BatchNorm that ran twice too
                assert model is plain
                return
            results.append((y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()))
        for got, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(
                got, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.detach().abs().max()))
            )


@pytest.mark.parametrize("where", ["conv", "bn", "relu", "block", "pre-hook", "all modules"])
def test_hooks_that_come_later(where: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = model_of("plain")

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    model = fcb.fuse(Outer().eval())
    want = model(data())
    calls: list[str] = []
    hook = lambda module, *a: calls.append(type(module).__name__)  # noqa: E731
    of = {"conv": model.block.c, "bn": model.block.b, "relu": model.block.r, "block": model.block}
    if where == "all modules":
        handle = nn.modules.module.register_module_forward_hook(hook)
    elif where == "pre-hook":
        handle = model.block.c.register_forward_pre_hook(hook)
    else:
        handle = of[where].register_forward_hook(hook)
    close(model(data()), want)
    assert len(calls) == (5 if where == "all modules" else 1)
    handle.remove()
    close(model(data()), want)
    assert len(calls) == (5 if where == "all modules" else 1)


def test_copies_and_pickles() -> None:
    model = fcb.fuse(model_of("add and relu").eval(), data())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.c.weight.mul_(2)
    fresh = model_of("add and relu").eval()
    close(model(data()), fresh(data()))
    with torch.no_grad():
        fresh.c.weight.mul_(2)
    close(twin(data()), fresh(data()))
    assert fcb.report(twin).groups() == ["conv bn add relu"]


class Picklable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, scale: float = 1.0, *, residual: Tensor | None = None) -> Tensor:
        y = self.b(self.c(x)) * scale
        return y if residual is None else y + residual


def test_pickle_is_that_of_the_class() -> None:
    model = fcb.fuse(randomised(Picklable()).eval(), data())
    for loaded in (pickle.loads(pickle.dumps(model)), torch.load(saved(model), weights_only=False)):
        assert type(loaded) is Picklable
        close(loaded(data()), model(data()))


def saved(model: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_other_arguments_are_other_captures() -> None:
    plain = randomised(Picklable()).eval()
    model = fcb.fuse(copy.deepcopy(plain))
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((data(),), {}),
        ((data(), 2.0), {}),
        ((data(),), {"scale": 3.0}),
        ((data(),), {"residual": data(5)}),
        ((data(), 0.5), {"residual": data(5)}),
    ]
    for args, kwargs in (*calls, *calls):
        close(model(*args, **kwargs), plain(*args, **kwargs))


def test_modes_and_replaced_modules() -> None:
    plain, model = model_of("plain"), fcb.fuse(model_of("plain"))
    for mode in (False, True, False, True):
        close(model.train(mode)(data()), plain.train(mode)(data()))
    for m in (plain, model):
        m.b.eval()
    close(model(data()), plain(data()))
    for m in (plain, model):
        torch.manual_seed(9)
        m.eval().c = nn.Conv2d(4, 4, 1)
    close(model(data()), plain(data()))
    close(model.double()(data().double()), plain.double()(data().double()))
    model.load_state_dict(plain.state_dict())
    close(model(data().double()), plain(data().double()))


class Bag(list):  # type: ignore[type-arg]
    """An argument of a class that no capture knows."""


def test_parts_of_a_model_that_cannot_be_traced() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.heads = nn.ModuleList([model_of("plain"), model_of("a branch by value")])

        def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
            y = self.body(x[0])
            return {str(i): head(y) for i, head in enumerate(self.heads)}

    plain = randomised(Heads().eval())
    model = fcb.fuse(copy.deepcopy(plain))
    for _ in range(2):
        got, want = model(Bag([data()])), plain(Bag([data()]))
        for k in want:
            close(got[k], want[k])
    report = fcb.report(model)
    assert report.groups() == ["conv bn relu", "conv bn relu"]
    assert "its argument x is a Bag" in str(report) and "control flow" in str(report)


@pytest.mark.parametrize(
    "kind",
    [
        *("1d", "3d", "linear", "tokens", "transposed", "dropout", "frozen parts", "no statistics"),
        *(
            "inherits",
            "own forward",
            "parametrised",
            "padding",
            "cumulative",
            "lone",
            "1d bias",
            "frozen",
        ),
        *("frozen otherwise", "frozen eps"),
    ],
)
def test_other_layers(kind: str) -> None:
    torch.manual_seed(3)
    layers: dict[str, tuple[list[nn.Module], tuple[int, ...], list[str]]] = {
        "1d": ([nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU()], (2, 4, 9), ["conv bn relu"]),
        "3d": ([nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), nn.Hardswish()], (2, 4, 5, 4, 3), ["conv bn hardswish"]),
        "linear": ([nn.Linear(4, 6), nn.BatchNorm1d(6), nn.SiLU()], (3, 4), ["linear bn silu"]),
        "tokens": ([nn.Linear(4, 6), nn.BatchNorm1d(5), nn.SiLU()], (3, 5, 4), ["linear bn silu"]),
        "inherits": ([Named(4, 6, 3), NamedNorm(6), nn.ReLU()], (2, 4, 5, 5), ["conv bn relu"]),
        "own forward": ([Doubled(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()], (2, 4, 5, 5), ["bn relu"]),
        "parametrised": (
            [nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6), nn.ReLU()],
            (2, 4, 5, 5),
            ["bn relu"],
        ),
        "padding": (
            [nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm3d(6), nn.ReLU()],
            (2, 4, 5, 4, 3),
            ["conv bn relu"],
        ),
        "cumulative": (
            [
                nn.Conv1d(4, 6, 3),
                nn.BatchNorm1d(6, momentum=None),
                nn.ReLU(),
                nn.BatchNorm1d(6, momentum=None),
                nn.ReLU(),
            ],
            (2, 4, 9),
            ["conv bn relu", "bn relu"],
        ),
        "lone": ([nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.ReLU(inplace=True)], (2, 4, 6, 6), ["bn relu"]),
        "1d bias": ([nn.Conv1d(4, 6, 3, groups=2), nn.GELU()], (2, 4, 9), ["conv gelu"]),
        "frozen": ([nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6), nn.ReLU()], (2, 4, 6, 6), ["conv bn relu"]),
        "frozen otherwise": ([nn.Conv2d(4, 6, 3), frozen_of_its_own(6), nn.ReLU()], (2, 4, 6, 6), []),
        "frozen eps": ([nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6, 0.1), nn.ReLU()], (2, 4, 6, 6), ["conv bn relu"]),
        "transposed": (
            [nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.LeakyReLU(0.2)],
            (2, 4, 5, 5),
            ["convT bn leaky_relu"],
        ),
        "dropout": (
            [nn.Conv2d(4, 6, 3), nn.Dropout(0.5), nn.BatchNorm2d(6), nn.Identity(), nn.ReLU6()],
            (2, 4, 5, 5),
            ["conv bn relu6"],
        ),
        "frozen parts": (
            [nn.Conv2d(4, 6, 3).requires_grad_(False), nn.BatchNorm2d(6, affine=False), nn.Tanh()],
            (2, 4, 5, 5),
            ["conv bn tanh"],
        ),
        "no statistics": (
            [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), nn.Mish()],
            (2, 4, 5, 5),
            ["conv bn mish"],
        ),
    }
    modules, shape, groups = layers[kind]
    plain = nn.Sequential(*modules)
    if kind != "frozen parts":
        randomised(plain)
    model = fcb.fuse(copy.deepcopy(plain))
    for training in (False, True, False):
        x = torch.randn(shape)
        with torch.random.fork_rng():
            want = plain.train(training)(x)
        with torch.random.fork_rng():
            close(model.train(training)(x), want)
    assert fcb.report(model).groups() == groups


class Named(nn.Conv2d):
    """A subclass that computes what its base does."""


class NamedNorm(nn.BatchNorm2d):
    pass


class Doubled(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(input, weight, bias)


class FrozenBatchNorm2d(nn.Module):
    """As torchvision and detectron2 have it: no parameters and no modes."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in ("weight", 1.5), ("bias", 0.5), ("running_mean", 0.3), ("running_var", 0.7):
            self.register_buffer(name, value + torch.rand(channels) / 4)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


def frozen_of_its_own(channels: int) -> nn.Module:
    """One of the same name that computes something else."""

    class Other(FrozenBatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).abs()

    Other.__name__ = "FrozenBatchNorm2d"
    return Other(channels)


def test_old_weight_norm() -> None:
    """A hook makes the weight before each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)).eval()
    want = model(data())
    close(fcb.fuse(model)(data()), want)
    with torch.no_grad():
        model[0].weight_g.mul_(2)
    got = model(data())
    close(got, fcb.unfuse(model)(data()))


def test_a_frozen_norm_is_followed() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6), nn.ReLU()).train()
    x = torch.randn(2, 4, 6, 6)
    fused = fcb.fuse(copy.deepcopy(model))
    for change in (
        lambda m: None,
        lambda m: setattr(m[1], "eps", 0.5),
        lambda m: m[1].weight.mul_(2),
        lambda m: setattr(m[1], "bias", m[1].bias + 1),
        lambda m: m.eval(),
        lambda m: m.double().float(),
    ):
        for m in (model, fused):
            change(m)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                close(fused(x), model(x))
    assert fcb.report(fused).groups() == ["conv bn relu"]


def test_dimensions_that_eager_refuses() -> None:
    """nn.BatchNorm1d takes no images, whatever an op would take."""
    for layers, shape in (
        ([nn.Conv2d(4, 6, 3), nn.BatchNorm1d(6)], (2, 4, 5, 5)),
        ([nn.Identity(), nn.BatchNorm2d(4), nn.ReLU()], (2, 4, 5)),
        ([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)], (4, 5, 5)),
        ([nn.Conv2d(4, 6, 3), nn.ReLU()], (2, 5, 5, 5)),
    ):
        plain = nn.Sequential(*layers).eval()
        model = fcb.fuse(copy.deepcopy(plain))
        for m in (plain, model, model):
            with pytest.raises((ValueError, RuntimeError)) as error:
                m(torch.randn(shape))
            if m is plain:
                want = str(error.value)
            assert str(error.value) == want
    unbatched = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()).eval()
    close(fcb.fuse(copy.deepcopy(unbatched))(x := torch.randn(4, 5, 5)), unbatched(x))


def test_reasons_are_of_a_closed_list() -> None:
    from fused_conv_bn._fuse.words import REASONS

    reasons = set()
    for name in MODELS:
        model = fcb.fuse(model_of(name).eval())
        reasons |= {row.reason for row in fcb.report(model).rows}
        model(data())
        rows = fcb.report(model).rows
        assert all((row.state == "fused") == (not row.reason) and row.text for row in rows)
        reasons |= {row.reason for row in rows}
    assert reasons <= {"", *REASONS} and {"alone", "normalised", "no call", "no capture", "pending"} <= reasons


def test_algorithms_of_the_shapes_seen() -> None:
    model = fcb.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval())
    x = torch.randn(1, 3, 64, 256)
    model(x)
    rows = {row.path: row for row in fcb.report(model).rows}
    assert rows["0"].algorithm == fcb.explain(x, model[0].weight)
    assert rows["1"].algorithm == rows["3"].algorithm == "" and f"[{rows['0'].algorithm}]" in str(fcb.report(model))


def test_a_part_that_only_its_own_call_can_be_traced_of() -> None:
    """What is a number in a call is no number in a trace of the caller."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor, size: int) -> Tensor:
            y = self.b(self.c(x)).relu()
            return F.interpolate(y, size * 2) if size > 4 else y

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, x.shape[2])

    plain = randomised(Outer().eval())
    model = fcb.fuse(copy.deepcopy(plain))
    for x in (data(), data()[:, :, :3]):
        close(model(x), plain(x))
    assert fcb.report(model).groups() == ["conv bn relu"]


def test_threads() -> None:
    plain = model_of("a chain").eval()
    want, model = plain(data()), fcb.fuse(copy.deepcopy(plain))
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(model(data()))) for _ in range(20)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 20
    for got in results:
        close(got, want)


def test_other_threads_during_a_trace() -> None:
    """torch.fx puts methods of its own on nn.Module while it traces. Models of other threads are no part of that."""
    other = model_of("plain").eval()
    want = other(data())
    found: list[Any] = []

    def run(m: Any, x: Tensor) -> Tensor:
        if not isinstance(x, torch.fx.Proxy):
            return m.b(m.c(x))
        thread = threading.Thread(target=lambda: found.append((other(data()), other.c.weight, m.c.weight)))
        thread.start()
        thread.join()
        return m.b(m.c(x))

    model = fcb.fuse(model_of("no activation").eval())
    model.run = run
    model(data())
    ((y, weight, own),) = found
    assert type(y) is Tensor and weight is other.c.weight and own is model.c.weight
    close(y, want)
    assert fcb.report(model).groups() == ["conv bn"]


def test_a_capture_that_is_wrong_is_dropped() -> None:
    """What torch.fx records without an error, and wrongly: here, what a closure has."""
    seen: list[int] = []

    def run(m: Any, x: Tensor) -> Tensor:
        seen.append(1)
        return m.b(m.c(x)) * len(seen)

    torch.manual_seed(1)
    model = fcb.fuse(randomised(Model(run)).eval())
    model(data())
    assert "another result than its forward" in str(fcb.report(model))
    before = len(seen)
    model(data())
    assert len(seen) == before + 1


def asks_for_a_number_s_class(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.c(x))
    half = x.shape[2] + 1
    return y * 3 if isinstance(half, Tensor) else y


def fails_where_the_graph_does(m: Any, x: Tensor) -> Tensor:
    """A value that only a trace lacks."""
    return m.b(m.c(x)) + (x if not hasattr(x, "node") else x[..., :1, :2])


@pytest.mark.parametrize("run", [asks_for_a_number_s_class, fails_where_the_graph_does])
def test_what_a_trace_sees_otherwise(run: Callable[..., Tensor]) -> None:
    torch.manual_seed(1)
    plain = randomised(Model(run)).eval()
    model = fcb.fuse(copy.deepcopy(plain))
    for _ in range(2):
        close(model(data()), plain(data()))


def test_a_wrong_call_is_the_user_s() -> None:
    model = fcb.fuse(model_of("plain").eval())
    with pytest.raises(TypeError, match="positional argument"):
        model(data(), data())
    model(data())
    assert fcb.report(model).groups() == ["conv bn relu"]


def test_statistics_keep_their_order() -> None:
    """A BatchNorm alone that goes to training mode, in a model that calls it twice."""
    plain = model_of("one bn behind two convs").eval()
    model = fcb.fuse(copy.deepcopy(plain), data())
    for m in (plain, model):
        m.b.train()
    for _ in range(2):
        close(model(data()), plain(data()))
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        close(a.double(), b.double())


def test_the_first_call_leaves_what_others_saved() -> None:
    """A backward that is still to come may have saved the buffers."""
    part = model_of("plain").eval()
    y = part(data().requires_grad_())
    fcb.fuse(part)(data())
    y.sum().backward()


def test_report_of_any_model() -> None:
    model = model_of("a chain").eval()
    assert "fuse(model) was not called" in str(fcb.report(model))
    fcb.fuse(model)
    assert fcb.report(model).counts == {"pending": 4}
    model(data())
    report = fcb.report(model)
    assert report.counts == {"fused": 4} and report.to_dict()["counts"] == {"fused": 4}
    assert str(fcb.report(nn.Linear(1, 1))) == "no convolution and no BatchNorm"
    for function, name in ((fcb.unfuse, "unfuse"), (fcb.report, "report")):
        with pytest.raises(TypeError, match=f"^{name}: model is of type NoneType, expected an nn.Module$"):
            function(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fuse: model is of type int, expected an nn.Module"):
        fcb.fuse(3)  # type: ignore[arg-type]


def test_compiled() -> None:
    model = fcb.fuse(model_of("add and relu").eval())
    want = model(data())
    close(torch.compile(model, backend="eager", fullgraph=True)(data()), want)


def test_buffers_are_read_when_the_graph_runs() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.r(m.b(m.c(x))) * m.b.running_var.sqrt().reshape(1, -1, 1, 1) + m.table[0]

    torch.manual_seed(1)
    model = randomised(Model(run)).eval()
    model.register_buffer("table", torch.rand(2, 4, 1, 1))
    fused = fcb.fuse(copy.deepcopy(model))
    for _ in range(2):
        for m in (model, fused):
            m.b.running_var.mul_(2)
            m.table = m.table + 1
        close(fused(data()), model(data()))
    assert fcb.report(fused).groups() == ["conv bn relu"]


def test_one_capture_for_what_an_outer_one_has() -> None:
    """Parts of what was captured are roots by themselves only where their parent could not be captured."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.Sequential(nn.ReLU()))

        def forward(self, xs: list[Tensor]) -> Tensor:
            return self.layers(xs[0])

    model = fcb.fuse(Parts().eval())
    model(Bag([data()]))
    captured = [m for m in model.modules() if (state := m.__dict__.get("_fused_conv_bn")) is not None and state.entries]
    assert captured == [model.layers]


def test_rows_of_what_runs_without_a_capture() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(4, 4, 1)

        def forward(self, xs: list[Tensor]) -> list[Tensor]:
            return [self.c(x) for x in xs]

    model = fcb.fuse(Head().eval())
    model(Bag([data()]))
    (row,) = fcb.report(model).rows
    assert (row.state, row.reason) == ("left", "no capture") and "its argument xs is a Bag" in row.text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_dtypes_and_layouts(dtype: torch.dtype, layout: torch.memory_format, device: str) -> None:
    """Of each op at once: with BatchNorm, without one, one alone."""
    torch.manual_seed(4)
    layers = [
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Conv2d(6, 5, 1),
        nn.ReLU(),
        nn.BatchNorm2d(5),
        nn.GELU(),
    ]
    plain = randomised(nn.Sequential(*layers)).eval().to(device, dtype, memory_format=layout)
    exact = copy.deepcopy(plain).double()
    fused = fcb.fuse(copy.deepcopy(plain))
    x = data().to(device, dtype, memory_format=layout)
    with torch.no_grad():
        want = exact(x.double())
        off = (plain(x).double() - want).abs().max()
        for _ in range(2):
            y = fused(x)
            assert y.dtype == dtype and y.stride() == plain(x).stride()
            # Twice eager's, and what the sums' order is worth in float64, where eager is the exact one itself: its
            # longest has 36 terms. In others the rounding of the result, where eager has less by chance.
            units = 18 if dtype == torch.float64 else 1
            assert (y.double() - want).abs().max() <= 2 * off + units * torch.finfo(dtype).eps * want.abs().max()
    assert fcb.report(fused).groups() == ["conv bn silu", "conv relu", "bn gelu"]


def test_autocast(device: str) -> None:
    torch.manual_seed(5)
    layers = [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.SiLU()]
    plain = randomised(nn.Sequential(*layers)).eval().to(device)
    fused = fcb.fuse(copy.deepcopy(plain))
    x = data().to(device)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                with torch.autocast(device, torch.bfloat16):
                    y, want = fused(x), plain(x)
                assert y.dtype == want.dtype
                torch.testing.assert_close(y, want, rtol=0.05, atol=0.05)
            close(fused(x), plain(x))


def test_exported_and_functional() -> None:
    """Exported programs are those of the model itself, and functional calls use the tensors that they are given."""
    model = model_of("add and relu").eval()
    fused = fcb.fuse(copy.deepcopy(model), data())
    program = torch.export.export(fused, (data(),))
    assert not any("fused_conv_bn" in str(n.target) for n in program.graph.nodes)
    close(program.module()(data()), model(data()))
    other = {name: t * 2 for name, t in model.state_dict().items()}
    for _ in range(2):
        close(torch.func.functional_call(fused, other, data()), torch.func.functional_call(model, other, data()))
    close(fused(data()), model(data()))


def test_data_parallel() -> None:
    """A replica, as DataParallel makes it, runs its own forward on its own tensors."""
    model = model_of("plain").eval()
    fused = fcb.fuse(copy.deepcopy(model), data())
    replica = fused._replicate_for_data_parallel()
    assert replica is not fused
    close(replica(data()), model(data()))


def test_moves_and_dtypes_of_a_fused_model() -> None:
    model = model_of("a chain").eval()
    fused = fcb.fuse(copy.deepcopy(model), data())
    for m in (model, fused):
        m.double().to(memory_format=torch.channels_last)
    close(fused(data().double()), model(data().double()))
    for m in (model, fused):
        m.float().load_state_dict(model_of("a chain").state_dict())
        m.requires_grad_(False)
        nn.utils.fusion.fuse_conv_bn_eval(m.c, m.b)
    close(fused(data()), model(data()))
    assert fcb.report(fused).groups() == ["conv bn relu", "conv bn gelu"]


def test_modules_that_are_not_registered() -> None:
    """A slice of an nn.Sequential, and layers in a plain list."""

    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[3](self.layers[:3](x))

    class Listed(Slices):
        def __init__(self) -> None:
            super().__init__()
            self.own = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()]

        def forward(self, x: Tensor) -> Tensor:
            return self.own[0](self.layers(x))

    torch.manual_seed(6)
    for plain, groups in ((Slices(), ["conv bn relu"]), (Listed(), ["conv bn relu"])):
        randomised(plain).eval()
        fused = fcb.fuse(copy.copy(plain))
        want = type(plain).forward(plain, data())
        for _ in range(2):
            close(fused(data()), want)
        assert fcb.report(fused).groups() == groups


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, features: Any, *more: Tensor, scale: Any = None, **named: Any) -> Tensor:
        y = self.b(self.c(features[-1])).relu()
        for m in more:
            y = y + m
        if scale is not None:
            y = y * scale["by"]
        return y + named["shift"] if "shift" in named else y


def test_arguments_in_containers() -> None:
    plain = randomised(Containers().eval())
    fused = fcb.fuse(copy.deepcopy(plain))
    x, y = data(), data(3)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        (([x, y],), {}),
        (([y, x],), {}),
        (((y, x, y),), {}),
        (((x, x), x, y), {}),
        (([x],), {"scale": {"by": 2.0}}),
        (([x],), {"scale": {"by": 3.0}}),
        (([x],), {"scale": {"by": y}, "shift": 1}),
        (({-1: x},), {}),
    ]
    for args, kwargs in calls * 2:
        close(fused(*args, **kwargs), plain(*args, **kwargs))
    assert fcb.report(fused).groups() == ["conv bn relu"] and fcb.report(fused).counts == {"fused": 2}


def test_arguments_that_a_forward_changes() -> None:
    class Pops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, xs: list[Tensor]) -> Tensor:
            return self.layers(xs.pop())

    plain = randomised(Pops().eval())
    fused = fcb.fuse(copy.deepcopy(plain))
    for _ in range(2):
        given = [data(), data(3)]
        close(fused(given), plain([data(), data(3)]))
        assert len(given) == 1
    report = fcb.report(fused)
    assert report.groups() == ["conv bn"] and "it changes a list or dictionary" in str(report)


def test_other_numbers_at_every_call() -> None:
    class Times(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor, t: float) -> Tensor:
            return self.layers(x) * t

    plain = randomised(Times().eval())
    fused = fcb.fuse(copy.deepcopy(plain))
    for t in range(40):
        close(fused(data(), float(t)), plain(data(), float(t)))
    report = fcb.report(fused)
    assert report.groups() == ["conv bn"] and "it was called in 32 ways already" in str(report)


def test_a_tensor_of_another_class_refuses_nothing() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = fcb.fuse(model_of("plain").eval())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(data())).shape == data().shape
    model(data())
    assert fcb.report(model).groups() == ["conv bn relu"]


class Toggled(nn.Module):
    """Attributes that the forward reads, and that are changed between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.1)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.adds, self.factor, self.order, self.table = True, 2.0, [0], {"shift": 0.0}

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.b(self.c(x))) * self.factor + self.table["shift"]
        for _ in self.order:
            y = self.inner(y)
        return y + x if self.adds else y


CHANGES: dict[str, Callable[[Any], Any]] = {
    "flag": lambda m: setattr(m, "adds", False),
    "number": lambda m: setattr(m, "factor", 3.0),
    "list in place": lambda m: m.order.append(1),
    "dictionary in place": lambda m: m.table.update(shift=1.0),
    "slope": lambda m: setattr(m.act, "negative_slope", 0.5),
    "padding mode": lambda m: setattr(m.inner[0], "padding_mode", "circular"),
    "eps": lambda m: setattr(m.b, "eps", 0.5),
    "another attribute": lambda m: setattr(m, "note", "new"),
    "gone": lambda m: delattr(m, "adds"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("grad", [False, True])
def test_attributes_that_change(change: str, grad: bool) -> None:
    torch.manual_seed(8)
    plain = randomised(Toggled().eval())
    fused = fcb.fuse(copy.deepcopy(plain), data())
    with torch.set_grad_enabled(grad):
        close(fused(data()), plain(data()))
        for m in (plain, fused):
            CHANGES[change](m)
        if change == "gone":
            with pytest.raises(AttributeError, match="adds"):
                fused(data())
            return
        for _ in range(2):
            close(fused(data()), plain(data()))
        for m in (plain, fused):
            CHANGES["flag"](m)
        close(fused(data()), plain(data()))


def test_an_attribute_that_is_new_at_every_call() -> None:
    model = fcb.fuse(model_of("plain").eval())
    want = model(data())
    for step in range(40):
        model.step = step
        close(model(data()), want)
    assert "it was called in 32 ways already" in str(fcb.report(model))


# ---- what a review found ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), act or nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        return self.act(self.bn(self.conv(x)))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Net(), Net()])
        self.down: nn.Module | None = None
        self.gate = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        if self.gate is not None:
            x = x * self.gate
        return x if self.down is None else self.down(x)


STRUCTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "sequential appended": (lambda: nn.Sequential(Net(), Net()), lambda m: m.append(nn.Sigmoid())),
    "list appended": (Layers, lambda m: m.layers.append(nn.Sigmoid())),
    "list replaced": (Layers, lambda m: setattr(m, "layers", nn.ModuleList([nn.Sigmoid(), m.layers[0]]))),
    "module added": (Layers, lambda m: setattr(m, "down", nn.Sigmoid())),
    "parameter gone": (Layers, lambda m: setattr(m, "gate", None)),
    "approximation": (lambda: Net(nn.GELU()), lambda m: setattr(m.act, "approximate", "tanh")),
    "limits": (lambda: Net(nn.Hardtanh(0.0, 6.0)), lambda m: setattr(m.act, "max_val", 0.5)),
    "padding mode": (Net, lambda m: setattr(m.conv, "padding_mode", "circular")),
    "stride": (Net, lambda m: setattr(m.conv, "stride", 2)),
}


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("training", [False, True])
def test_structures_that_change(name: str, training: bool) -> None:
    make, change = STRUCTURES[name]
    torch.manual_seed(1)
    plain = randomised(make()).train(training)
    fused = fcb.fuse(copy.deepcopy(plain))
    with torch.no_grad():
        close(fused(data()), plain(data()))
        for m in (plain, fused):
            change(m)
        for _ in range(2):
            close(fused(data()), plain(data()))


def test_a_class_whose_forward_is_replaced() -> None:
    class Other(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    fused = fcb.fuse(Other().eval())
    y = fused(data())
    Other.forward = lambda self, x: 2 * Net.forward(self, x)  # type: ignore[method-assign, assignment]
    close(fused(data()), 2 * y)


def drops_layers(m: Any, x: Tensor) -> Tensor:
    y = m.r(m.b(m.c(x)))
    return y if torch.rand(1).item() < 0.5 else m.b2(m.c2(y))


def depends_on_grad(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.c(x))
    return y * 2 if torch.is_grad_enabled() else y


def residual_writes(m: Any, x: Tensor) -> Tensor:
    x = x + 0
    return m.b(m.c(x)) + m.r(x)


def function_writes(m: Any, x: Tensor) -> Tensor:
    a = x * 1.5
    b = F.relu(a, inplace=True)
    b += m.b(m.c(x))
    return a


def argument_written(m: Any, x: Tensor) -> Tensor:
    x = x + 0
    z = x * 3
    y = m.c(x)
    torch.mul(z, 2, out=x)
    return m.b(y)


def several_written(m: Any, x: Tensor) -> Tensor:
    x = x + 0
    y = m.c(x)
    torch._foreach_mul_([x * 1, x], 2.0)
    return m.b(y)


def power_in_place(m: Any, x: Tensor) -> Tensor:
    x = x + 0
    y = m.c(x)
    z = x
    x **= 2
    return m.b(y) + z


def by_class(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.c(x))
    return y * 2 if type(y) is Tensor else y


def by_attribute(m: Any, x: Tensor) -> Tensor:
    return m.b(m.c(x.tensors if hasattr(x, "tensors") else x))


def by_size(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.c(x))
    return y * 2 if x.shape[0] in {3, 5} else y


def by_dtype(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.c(x))
    return y * 2 if x.dtype is torch.float32 else y


def layout_of_the_residual(m: Any, x: Tensor) -> Tensor:
    r = x.contiguous(memory_format=torch.channels_last)
    y = r + m.b(m.c(x))
    return y.permute(0, 2, 3, 1).view(-1, 4)


TRICKS = [
    *(drops_layers, depends_on_grad, residual_writes, function_writes, argument_written, several_written),
    *(power_in_place, by_class, by_attribute, by_size, by_dtype, layout_of_the_residual),
]


@pytest.mark.parametrize("run", TRICKS)
@pytest.mark.parametrize("mode", ["eval", "train", "eval, unchecked"])
def test_tricks(run: Callable[..., Tensor], mode: str) -> None:
    """Also where nothing is compared."""
    torch.manual_seed(2)
    plain = randomised(Model(run)).train(mode == "train")
    fused = fcb.fuse(copy.deepcopy(plain))
    if mode == "eval, unchecked":
        for m in (plain, fused):
            m.r.register_forward_hook(lambda *_: None)
    for grad in (False, True):
        for seed in range(4):
            with torch.set_grad_enabled(grad):
                results = []
                for m in (plain, fused):
                    torch.manual_seed(seed)
                    results.append(m(data(seed)))
                close(results[1], results[0])
                assert results[1].stride() == results[0].stride()
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        close(a.double(), b.double())


def test_two_arguments_of_one_memory() -> None:
    class Two(Net):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
            y = self.conv(x)
            z.mul_(0.5)
            return self.bn(y) * (2 if x is z else 1)

    plain = randomised(Two().eval())
    fused = fcb.fuse(copy.deepcopy(plain))
    with torch.no_grad():
        for same in (False, True, False):
            a, b = data(), data()
            close(fused(a, a if same else data(3)), plain(b, b if same else data(3)))
            close(a, b)


def test_what_a_forward_keeps() -> None:
    """Dictionaries, lists and tensors on the module, that it fills."""

    class Keeps(Net):
        def __init__(self) -> None:
            super().__init__()
            self.outs: dict[str, Tensor] = {}
            self.all: list[Tensor] = []
            self.count = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            self.outs["y"] = y
            self.all.append(y)
            self.count += 1
            return self.act(y)

    for training in (False, True):
        plain = Keeps().train(training)
        fused = fcb.fuse(copy.deepcopy(plain))
        with torch.no_grad():
            for m in (plain, fused):
                m(data(1)), m(data(2))
        assert len(fused.all) == len(plain.all) == 2 and fused.count == plain.count == 2
        for a, b in zip([*fused.all, *fused.outs.values()], [*plain.all, *plain.outs.values()], strict=True):
            close(a, b)


def test_parameters_that_a_forward_writes() -> None:
    class Writes(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.conv.weight.data.mul_(0.9)
            return super().forward(x)

    plain = Writes().eval()
    fused = fcb.fuse(copy.deepcopy(plain))
    with torch.no_grad():
        for _ in range(3):
            close(fused(data()), plain(data()))
    assert "it writes to its parameters or buffers" in str(fcb.report(fused))


def test_checkpoints_in_a_forward() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.net, self.reentrant = Net(), reentrant

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=self.reentrant)

    for reentrant in (False, True):
        model = fcb.fuse(Checkpointed(reentrant).train())
        model(data().requires_grad_()).sum().backward()
        assert model.net.bn.num_batches_tracked == 2  # computed again


def test_classes_of_results() -> None:
    class Ordered(Net):
        def forward(self, x: Tensor) -> Any:
            return OrderedDict(out=super().forward(x), x=x)

    fused = fcb.fuse(Ordered().eval())
    for _ in range(2):
        assert type(fused(data())) is OrderedDict and list(fused(data())) == ["out", "x"]
    assert fcb.report(fused).groups() == ["conv bn relu"]


class Locked(Net):
    """With what cannot be copied, and a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


def test_classes_with_a_state_of_their_own() -> None:
    model = Locked().eval()
    want = model(data())
    fcb.fuse(model, data())
    twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert type(loaded) is Locked and twin.lock is not model.lock
    for m in (model, twin, loaded):
        close(m(data()), want)
    assert fcb.report(twin).groups() == ["conv bn relu"]


def test_other_tracers_and_signatures() -> None:
    model = Net().eval()
    want, signature = model(data()), inspect.signature(model.forward)
    fcb.fuse(model, data())
    assert inspect.signature(model.forward) == signature
    close(torch.fx.symbolic_trace(model)(data()), want)
    close(torch.jit.trace(model, data())(data()), want)
    close(model(data()), want)
    assert fcb.report(model).groups() == ["conv bn relu"]


def test_meta_lazy_and_odd_classes() -> None:
    meta = fcb.fuse(Net().eval().to("meta"))
    assert meta(torch.empty(2, 4, 5, 5, device="meta")).shape == (2, 4, 5, 5)
    lazy = fcb.fuse(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).eval(), data())
    assert lazy(data()).shape == (2, 4, 5, 7)

    class Base(nn.Module):
        def __init_subclass__(cls, *, key: str, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)

    class Odd(Base, key="a"):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    plain = Odd().eval()
    close(fcb.fuse(copy.deepcopy(plain))(data()), plain(data()))


def test_a_fused_model_goes_with_its_last_user() -> None:
    model = fcb.fuse(Layers().eval())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            model(data())
    last = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert last() is None
    finally:
        gc.enable()


def test_a_report_of_what_was_replaced() -> None:
    model = fcb.fuse(nn.Sequential(OrderedDict(first=Net(), second=Net())).eval())
    model(data())
    del model.first
    model.second.bn = nn.BatchNorm2d(4).eval()
    assert fcb.report(model).counts == {"not called": 2} or "pending" in fcb.report(model).counts
    model(data())
    assert fcb.report(model).groups() == ["conv bn relu"]


def test_a_call_that_fails_refuses_nothing() -> None:
    class Strict(Net):
        def forward(self, x: Tensor | None = None) -> Tensor:
            if x is None:
                raise ValueError("an image, please")
            return super().forward(x)

    model = fcb.fuse(Strict().eval())
    with pytest.raises(ValueError, match="an image, please"):
        model()
    model(data())
    assert fcb.report(model).groups() == ["conv bn relu"]
