"""fuse(model, freeze=True): the values of the model, as accurate as eager's, from a snapshot that thaw() ends."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fuse import MODELS, Model, Picklable, close, data, model_of, randomised
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_conv_bn as fcb
from fused_conv_bn import _activations
from fused_conv_bn._fuse import frozen
from fused_conv_bn.reference import ACTIVATIONS, activate

OPS = "mkldnn._convolution_pointwise", "fused_conv_bn._conv_packed"
KERNELS = ["own", "oneDNN"]


class Counted(TorchDispatchMode):
    """How often the ops are called that take a packed weight; of one that takes several, each of those."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        steps = int((args[2][:, 0] < 2).sum()) if "_chain" in str(op) else 1
        self.calls += [name for name in OPS if name in str(op)] * steps
        return op(*args, **(kwargs or {}))


def packed_calls(model: nn.Module, *args: Any) -> list[str]:
    with Counted() as counted:
        model(*args)
    return counted.calls


def has_packed() -> bool:
    return frozen._has_packing() or bool(torch.ops.fused_conv_bn._packed_channels())


needs_packing = pytest.mark.skipif(not has_packed(), reason="needs AVX2")


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel is to run, with what each lacks left to the other."""
    if request.param == "own" and not torch.ops.fused_conv_bn._packed_channels():
        pytest.skip("oneDNN is preferred on this processor")
    if request.param == "oneDNN":
        if not frozen._has_packing():
            pytest.skip("needs oneDNN with AVX2")
        monkeypatch.setattr(frozen, "_own_kernel_takes", lambda conv, size: False)
    return request.param


@pytest.mark.parametrize("name", MODELS)
def test_values(name: str) -> None:
    model = model_of(name).eval()
    want = [model(data(s)) for s in (2, 3)]
    state = copy.deepcopy(model.state_dict())
    assert fcb.fuse(model, freeze=True) is model
    for _ in range(2):
        for x, expected in zip((data(2), data(3)), want, strict=True):
            got = model(x)
            close(got, expected)
            assert got.stride() == expected.stride() and not got.requires_grad
    assert fcb.report(model).groups() == MODELS[name][1]
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    fcb.unfuse(model)
    assert type(model) is Model and torch.equal(model(data(2)), want[0])


@needs_packing
@pytest.mark.parametrize(
    ("name", "count"), [("plain", 1), ("add and relu", 1), ("activation, then add", 1), ("two of them added", 2)]
)
def test_what_is_packed_runs(name: str, count: int) -> None:
    model = fcb.fuse(model_of(name).eval(), data(), freeze=True)
    assert len(packed_calls(model, data())) == count
    assert packed_calls(fcb.thaw(model), data()) == []


def errors(got: Tensor, exact: Tensor, unit: Tensor) -> tuple[float, float]:
    """In norm, and the largest of an element by what was summed up for it."""
    difference = (got.double() - exact).abs()
    return float(difference.norm() / exact.norm()), float((difference / unit).max())


# channels, filters, kernel, stride, groups, size, batch: 1x1, 3x3, depthwise, grouped, the stem, long sums.
CONVS = [
    (64, 256, 1, 1, 1, 14, 1),
    (256, 64, 1, 2, 1, 14, 2),
    (2048, 32, 1, 1, 1, 7, 1),
    (64, 64, 3, 1, 1, 14, 2),
    (512, 40, 3, 1, 1, 7, 1),
    (3, 32, 3, 2, 1, 32, 1),
    (3, 64, 7, 2, 1, 32, 1),
    (96, 96, 3, 2, 96, 28, 1),
    (120, 120, 5, 1, 120, 14, 2),
    (64, 64, 3, 1, 4, 14, 1),
    (24, 6, 1, 1, 1, 1, 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [1.0, 1e4])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("conv", CONVS)
def test_no_less_accurate_than_eager(
    conv: tuple[int, ...],
    residual: bool,
    shift: float,
    dtype: torch.dtype,
    kernel: str,
    generator: torch.Generator,
) -> None:
    """Errors against float64, at most twice eager's own where eager takes oneDNN as well: in channels_last, 16 images.

    For few of them, or with one thread, eager may take MKL, which sums long sums in blocks. A large shift shows whether
    it was added first.
    """
    channels, filters, extent, stride, groups, size, batch = conv
    model = nn.Sequential(
        nn.Conv2d(channels, filters, extent, stride, extent // 2, groups=groups, bias=False), nn.BatchNorm2d(filters)
    )
    model[1].running_mean.copy_(shift * torch.randn(filters, generator=generator))
    model[1].running_var.copy_(torch.rand(filters, generator=generator) + 0.5)
    with torch.no_grad():
        model[1].weight.copy_(torch.rand(filters, generator=generator) + 0.5)
        model[1].bias.copy_(torch.randn(filters, generator=generator))
    model.eval().to(dtype)
    x = torch.randn(batch, channels, size, size, generator=generator).to(dtype)

    class Added(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor, r: Tensor | None = None) -> Tensor:
            y: Tensor = self.body(x)
            return y if r is None else F.relu(y + r)

    whole = Added(model).eval()
    double = copy.deepcopy(whole).double()
    with torch.no_grad():
        out = model(x).shape
        r = torch.randn(out, generator=generator).to(dtype) if residual else None
        exact = double(x.double(), None if r is None else r.double())
        # What an element's error is measured by.
        b = double.body[1]
        scale = (b.weight / (b.running_var + b.eps).sqrt()).view(-1, 1, 1)
        convolved = double.body[0]
        unit = F.conv2d(x.double().abs(), convolved.weight.abs(), None, stride, extent // 2, 1, groups) * scale.abs()
        unit = unit + (b.running_mean.view(-1, 1, 1) * scale).abs() + b.bias.abs().view(-1, 1, 1)
        unit = unit if r is None else unit + r.double().abs()
        args = (x,) if r is None else (x, r)
        last = copy.deepcopy(whole).to(memory_format=torch.channels_last)
        many = (torch.cat([t] * (16 // batch)).to(memory_format=torch.channels_last) for t in args)
        eager = errors(last(*many)[:batch], exact, unit)
        fused = fcb.fuse(copy.deepcopy(whole), freeze=True)
        fused(*args)
        if dtype == torch.float32:
            own = kernel == "own" and frozen._own_kernel_takes(convolved, x.shape)
            assert packed_calls(fused, *args) == [OPS[1] if own else OPS[0]]
        mine = errors(fused(*args), exact, unit)
    for error, theirs in zip(mine, eager, strict=True):
        # The scale that is in the weight rounds each product once more.
        assert error <= 2 * theirs + torch.finfo(dtype).eps / 4


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("adds", ["nothing", "before", "behind"])
@pytest.mark.parametrize("groups", [1, 8])
def test_every_activation(activation: str, adds: str, groups: int, kernel: str) -> None:
    torch.manual_seed(4)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.b = nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.c(x)) * 3.0
            y = y + x if adds == "before" else y
            y = self.act(y)
            return y + x if adds == "behind" else y

        def act(self, y: Tensor) -> Tensor:
            if activation == "gelu_tanh":
                return F.gelu(y, approximate="tanh")
            if activation == "leaky_relu":
                return F.leaky_relu(y, 0.2)
            return y if activation == "none" else getattr(F, activation)(y)

    model = randomised(Whole().eval())
    x = torch.randn(2, 8, 9, 11)
    with torch.no_grad():
        want = copy.deepcopy(model).double()(x.double())
        got = fcb.fuse(model, x, freeze=True)(x)
    assert fcb.report(model).groups()[0].startswith("conv bn * 3")
    # Each result is rounded at a magnitude of up to 20, and not much more.
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
    assert packed_calls(model, x) == [OPS[1] if kernel == "own" else OPS[0]]


def test_post_ops_are_the_activations() -> None:
    """Over all magnitudes, and for infinities; what becomes of NaN is oneDNN's."""
    x = torch.cat([torch.linspace(-30, 30, 8 * 32 * 31), torch.tensor([float("inf"), -float("inf")] * 128)])
    conv = nn.Conv2d(1, 1, 1, bias=False)
    conv.weight.data.fill_(1)
    for activation in ACTIVATIONS:
        act: Callable[[Tensor], Tensor] = functools.partial(activate, activation=activation, negative_slope=0.01)
        op = frozen._POST_OPS.get(activation)
        if op is None or not frozen._has_packing():
            continue
        window = [0, 0], [1, 1], [1, 1], 1
        image = x.view(1, 1, 32, -1)
        packed = frozen._pack(conv.weight.detach(), window, list(image.shape))
        y = torch.ops.mkldnn._convolution_pointwise.default(image, packed, None, *window, *op).flatten()
        finite = x.isfinite()
        # A few units in the last place, or of the argument where the function is near 0.
        torch.testing.assert_close(y[finite].double(), act(x[finite].double()), rtol=4e-7, atol=2e-6)
        # (Gelu of an infinity is NaN on some processors, PyTorch's as well as oneDNN's.)
        at_infinity = y[x == float("inf")], act(x[x == float("inf")])
        torch.testing.assert_close(*at_infinity, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_this_packages_kernel(activation: str, gelu_of_infinity: None) -> None:
    """Over all magnitudes, and for infinities and NaN."""
    if not torch.ops.fused_conv_bn._packed_channels():
        pytest.skip("oneDNN is preferred on this processor")
    large = torch.tensor([s * v for v in (89, 104, 1e4, 1e30, 3e38, float("inf")) for s in (1, -1)])
    x = torch.cat(
        [torch.linspace(-30, 30, 8 * 32 * 31), torch.linspace(-1, 1, 500), large, torch.tensor([float("nan")])]
    )
    one = torch.ones(1, 1, 1, 1), torch.zeros(1), ((1, 1), (0, 0), (1, 1))
    y = frozen.PackedConv(*one, activation=activation)(x.view(1, 1, 1, -1), None).flatten()
    wide = frozen.PackedConv(one[0].expand(32, 1, 1, 1), torch.zeros(32), one[2], activation=activation)
    assert torch.equal(wide(x.view(1, 1, 1, -1), None)[0, 7, 0].nan_to_num(), y.nan_to_num())
    exact = activate(x.double(), activation=activation, negative_slope=0.01)
    by_float = activate(x, activation=activation, negative_slope=0.01)
    finite = x.isfinite()
    torch.testing.assert_close(y[finite].double(), exact[finite], rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(y[~finite], by_float[~finite], rtol=0, atol=0, equal_nan=True)


def test_this_packages_kernel_passes_nan_on() -> None:
    if not torch.ops.fused_conv_bn._packed_channels():
        pytest.skip("oneDNN is preferred on this processor")
    for activation in ("relu", "relu6", "hardsigmoid", "silu"):
        torch.manual_seed(6)
        layers = nn.Conv2d(8, 20, 1), nn.BatchNorm2d(20), _activations.module(activation, 0.01)
        model = fcb.fuse(nn.Sequential(*layers).eval(), torch.randn(1, 8, 5, 5), freeze=True)
        x = torch.randn(1, 8, 5, 5)
        x[0, 3, 2, 2] = float("nan")
        y = model(x)
        assert y[0, :, 2, 2].isnan().all() and int(y.isnan().sum()) == 20


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 5, 37), (3, 7, 7), (2, 1, 50), (5, 2, 3), (1, 30, 31)])
@pytest.mark.parametrize(
    ("channels", "filters", "kernel_size", "groups", "stride", "padding", "dilation"),
    [
        (3, 5, 3, 1, 2, 1, 1),
        (5, 40, (1, 3), 1, 1, (0, 1), 1),
        (7, 24, 3, 1, 1, 2, (2, 1)),
        (130, 17, 3, 1, 1, 1, 1),
        (9, 33, 2, 1, (2, 1), (1, 0), 1),
        (33, 8, 1, 1, 1, 0, 1),
        (600, 16, 1, 1, 2, 1, 1),
        (24, 24, 3, 24, 1, 1, 1),
        (56, 56, 5, 56, 2, 2, 1),
        (8, 8, 3, 8, 1, 3, 2),
        (64, 64, (7, 1), 64, 1, (3, 4), 1),
    ],
)
def test_this_packages_kernel(
    channels: int,
    filters: int,
    kernel_size: Any,
    groups: int,
    stride: Any,
    padding: Any,
    dilation: Any,
    size: tuple[int, int, int],
    threads: int,
) -> None:
    """Borders, tails of tiles, bands over several images, sums in blocks, and threads that share channels."""
    torch.manual_seed(7)
    conv = nn.Conv2d(channels, filters, kernel_size, stride, padding, dilation, groups).eval()
    x = torch.randn(size[0], channels, *size[1:])
    before = torch.get_num_threads()
    try:
        expected = conv.double()(x.double())
    except RuntimeError:  # smaller than the filter
        return
    if not torch.ops.fused_conv_bn._packed_channels():
        pytest.skip("oneDNN is preferred on this processor")
    assert frozen._own_kernel_takes(conv, (1, channels, 1, 1))
    conv.float()
    residual = torch.randn(expected.shape)
    run = frozen.PackedConv(
        conv.weight.detach(), conv.bias.detach(), (conv.stride, conv.padding, conv.dilation), groups
    )
    try:
        torch.set_num_threads(threads)
        plain, added = run(x, None), run(x, residual)
    finally:
        torch.set_num_threads(before)
    unit = conv.double().requires_grad_(False)
    unit.weight.abs_()
    unit.bias.abs_()
    # Sums of up to 512 terms, and of those: an error of a rounding for each term would be at the bound.
    terms = min(512, conv.weight[0].numel()) + 4
    bound = unit(x.double().abs()) * terms * 2.0**-24
    assert plain.is_contiguous(memory_format=torch.channels_last)
    assert bool(((plain.double() - expected).abs() <= bound).all())
    added_expected = F.relu(expected + residual.double())
    y = F.relu(added.double())
    assert bool(((y - added_expected).abs() <= bound + residual.double().abs() * 2.0**-23).all())


@needs_packing
def test_a_snapshot_until_it_is_thawed() -> None:
    model = fcb.fuse(model_of("a chain").eval(), data(), freeze=True)
    first = model(data())
    plain = model_of("a chain").eval()
    for m in (model, plain):
        with torch.no_grad():
            m.c.weight.mul_(2)
            m.b.running_mean.add_(1)
    assert torch.equal(model(data()), first)
    assert fcb.thaw(model) is model
    close(model(data()), plain(data()))
    assert not torch.allclose(plain(data()), first)
    for m in (model, plain):
        with torch.no_grad():
            m.b2.bias.add_(1)
    close(model(data()), plain(data()))
    fcb.fuse(model, freeze=True)
    second = model(data())
    close(second, plain(data()))
    for m in (model, plain):
        with torch.no_grad():
            m.c.weight.div_(2)
    fcb.fuse(model)  # which leaves it frozen
    assert torch.equal(model(data()), second)
    fcb.fuse(model, freeze=True)  # a new snapshot
    close(model(data()), plain(data()))
    fcb.unfuse(model)
    assert torch.equal(model(data()), plain(data()))


def test_a_batch_norm_alone_is_frozen_too() -> None:
    model = fcb.fuse(model_of("bn behind cat").eval(), data(), freeze=True)
    first = model(data())
    with torch.no_grad():
        model.b.bias.add_(1)
    assert torch.equal(model(data()), first)


def test_what_is_refused() -> None:
    model = model_of("plain")
    message = "fuse: freeze is True, and the model itself is in training mode, expected model.eval()"
    with pytest.raises(RuntimeError, match=message):
        fcb.fuse(model, freeze=True)
    assert type(model) is Model
    model.eval().b.train()
    with pytest.raises(RuntimeError, match="and b is in training mode"):
        fcb.fuse(model, freeze=True)
    fcb.fuse(model.eval(), data(), freeze=True)
    model.train()
    with pytest.raises(RuntimeError, match="the model is frozen and it is in training mode"):
        model(data())
    model.eval().b.train()
    with pytest.raises(RuntimeError, match="the model is frozen and its module b is in training mode"):
        model(data())
    model.eval()
    with pytest.raises(RuntimeError, match="the model is frozen and computes no gradients"):
        model(data().requires_grad_())
    with torch.no_grad():
        model(data().requires_grad_())
    assert not model(data()).requires_grad
    fcb.thaw(model)
    assert model(data()).requires_grad and model.train()(data()).requires_grad
    with pytest.raises(TypeError, match="thaw: model is of type int, expected an nn.Module"):
        fcb.thaw(3)  # type: ignore[arg-type]


def test_no_gradient_by_what_is_not_captured() -> None:
    """Half a gradient would train half a model."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = model_of("plain"), nn.Linear(9, 2)

        def forward(self, x: list[Tensor]) -> Tensor:
            y: Tensor = self.head(self.body(x[0]))
            return y

    model = fcb.fuse(Outer().eval(), freeze=True)
    for _ in range(2):
        assert not model([data()]).requires_grad
    with pytest.raises(RuntimeError, match="computes no gradients"):
        model([data().requires_grad_()])
    if has_packed():
        assert len(packed_calls(model, [data()])) == 1


def test_copies_are_live() -> None:
    plain = randomised(Picklable().eval())
    model = fcb.fuse(copy.deepcopy(plain), data(), freeze=True)
    twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for m in (twin, loaded, plain):
        with torch.no_grad():
            m.c.weight.mul_(2)
    close(twin(data()), plain(data()))
    assert twin(data()).requires_grad and fcb.report(twin).groups() == ["conv bn"]
    assert type(loaded) is Picklable
    close(loaded(data()), plain(data()))


def test_threads() -> None:
    plain = model_of("a chain").eval()
    want, model = plain(data()), fcb.fuse(copy.deepcopy(plain), freeze=True)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(model(data()))) for _ in range(20)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 20
    for got in results:
        close(got, want)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_other_sizes_and_formats(memory_format: torch.memory_format) -> None:
    plain = model_of("a chain").eval()
    model = fcb.fuse(copy.deepcopy(plain), freeze=True)
    for shape in ((2, 4, 7, 9), (1, 4, 33, 16), (3, 4, 3, 3), (1, 4, 1, 1), (2, 4, 7, 9)):
        x = torch.randn(shape).to(memory_format=memory_format)
        got, want = model(x), plain(x)
        close(got, want)
        assert got.is_contiguous(memory_format=memory_format)
    x = torch.randn(2, 4, 9, 18)[..., ::2]
    close(model(x), plain(x))
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(2, 3, 9, 9))


def test_a_forward_that_reads_strides() -> None:
    """It runs fused, and live."""
    torch.manual_seed(1)
    plain = randomised(Model(lambda m, x: m.b2(m.c2(m.b(m.c(x)))).view(2, -1))).eval()
    model = fcb.fuse(copy.deepcopy(plain), freeze=True)
    for _ in range(2):
        close(model(data()), plain(data()))
    assert fcb.report(model).groups() == ["conv bn", "conv bn"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    plain = model_of("add and relu").eval().to(dtype)
    model = fcb.fuse(copy.deepcopy(plain), freeze=True)
    live = fcb.fuse(copy.deepcopy(plain))
    for _ in range(2):
        got, want = model(data().to(dtype)), live(data().to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_converted_and_under_autocast() -> None:
    plain = model_of("plain").eval()
    model = fcb.fuse(copy.deepcopy(plain), data(), freeze=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(data()), fcb.fuse(copy.deepcopy(plain))(data()))
    close(model.double()(data().double()), plain.double()(data().double()))
    with torch.inference_mode():
        model = fcb.fuse(plain.float(), freeze=True)
        inside = model(data())
    assert torch.equal(model(data()), inside)


def test_hooks_that_come_later() -> None:
    model = fcb.fuse(model_of("a chain").eval(), data(), freeze=True)
    want = model(data())
    calls: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda m, *a: calls.append(m)) for m in (model.c, model.b2, model.r)]
    close(model(data()), want)
    assert set(calls) == {model.c, model.b2, model.r}
    for handle in handles:
        handle.remove()
    close(model(data()), want)


def test_compiled_it_is_the_model_itself(no_leftover_graphs: None) -> None:
    model = fcb.fuse(model_of("add and relu").eval(), data(), freeze=True)
    close(torch.compile(model, backend="eager", fullgraph=True)(data()), model_of("add and relu").eval()(data()))


@needs_packing
def test_processors_that_add_a_bias_first_run_live() -> None:
    program = "import torch; from fused_conv_bn._fuse import frozen; print(frozen._has_packing())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "SSE41"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False"]


def test_on_cuda_it_runs_live(device: str) -> None:
    plain = model_of("add and relu").eval().to(device)
    model = fcb.fuse(copy.deepcopy(plain), freeze=True)
    x = data().to(device)
    for _ in range(2):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
