"""Contiguous models that fuse() runs in channels_last inside: nobody can tell, but by the time and the weights' strides.

On the CPU nothing gains by it, so that the rule is replaced: everything may go inside.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_conv_bn as fcb
from common import assert_no_worse_than_eager
from fused_conv_bn._fuse import blocks
from fused_conv_bn._fuse import channels_last as inside
from fused_conv_bn._fuse.guard import STATE
from fused_conv_bn._graphs.model import Watch


@pytest.fixture(autouse=True)
def goes_inside(monkeypatch: pytest.MonkeyPatch) -> list[inside.Seen]:
    """What was asked of the rule."""
    asked: list[inside.Seen] = []

    def pays(seen: inside.Seen) -> bool:
        asked.append(seen)
        return True

    monkeypatch.setattr(inside, "DEVICES", {"cpu", "cuda"})
    monkeypatch.setattr(inside, "pays", pays)
    return asked


def block(channels: int = 8, out: int = 8, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class Net(nn.Module):
    """Two blocks, a tail, and what a test makes of them: ``run(self, x)``."""

    def __init__(self, run: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.a, self.b = block(3, 8), block()
        self.pool, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = run

    def forward(self, x: Tensor, *others: Any) -> Any:
        return self.run(self, x, *others)


class Strange(nn.Module):
    """Of no known class; torch.fx would follow it, so that it is watched."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2 if x.is_contiguous() else 3)


def randomised(model: nn.Module, device: str) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low, high in (
                (m.running_mean, -1, 1),
                (m.running_var, 0.5, 2),
                (m.weight, 0.5, 1.5),
                (m.bias, -1, 1),
            ):
                with torch.no_grad():
                    t.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)
    return model.eval().to(device)


def net(run: Callable[..., Any], device: str, **modules: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return randomised(Net(run, **modules), device)


def data(device: str, shape: tuple[int, ...] = (2, 3, 9, 8), seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def leaves(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)


def same(got: Any, wanted: Any) -> None:
    """Of one structure, with eager's strides, and close to it: float32, of sums of 27 and 72 terms."""
    assert type(got) is type(wanted) and len(leaves(got)) == len(leaves(wanted))
    for a, b in zip(leaves(got), leaves(wanted), strict=True):
        if isinstance(b, Tensor):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
            torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6 * float(b.detach().abs().max()))
        else:
            assert a == b


@pytest.fixture(autouse=True)
def no_tf32() -> Any:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def is_inside(model: nn.Module) -> bool:
    return fcb.report(model).channels_last == [""]


def changed(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.dim() == 4 and not p.is_contiguous()}


def twice(m: Any, x: Tensor) -> Any:
    y = m.b(m.a(x))
    return y, y


def unet(m: Any, x: Tensor) -> Tensor:
    a = m.a(x)
    down = m.b(F.max_pool2d(a, 2))
    up = F.interpolate(down, size=a.shape[2:], mode="bilinear", align_corners=False)
    return m.c(torch.cat([a, up], 1))


def gated(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    return F.relu(y * m.g(m.pool(y)).sigmoid() + y)


def written(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    z = m.a2(x)
    z += y
    z.mul_(0.5)
    return F.relu(z, inplace=True)


def features(m: Any, x: Tensor) -> dict[str, Any]:
    a = m.a(x)
    b = m.b(a)
    return {"low": a, "high": b, "logits": m.linear(m.pool(b).flatten(1)), "size": 3, "list": [b.mean((2, 3))]}


def shuffled(m: Any, x: Tensor) -> Tensor:
    left, right = m.a(x).chunk(2, dim=1)
    y = torch.cat([left, m.right(right)], 1)
    n, c, h, w = y.size()
    return m.b(y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w))


INSIDE: dict[str, tuple[Callable[..., Any], dict[str, Callable[[], nn.Module]]]] = {
    "images": (lambda m, x: m.b(m.a(x)), {}),
    "classes": (lambda m, x: m.linear(torch.flatten(m.pool(m.b(m.a(x))), 1)), {}),
    "a residual": (lambda m, x: F.relu((y := m.a(x)) + m.b(y)), {}),
    "pooled to one pixel": (lambda m, x: m.pool(m.b(m.a(x))), {}),
    "one channel": (lambda m, x: m.one(m.a(x)), {"one": lambda: nn.Conv2d(8, 1, 1)}),
    "all pixels": (lambda m, x: m.big(m.b(m.a(x)).view(x.size(0), -1)), {"big": lambda: nn.LazyLinear(5)}),
    "reshaped": (lambda m, x: m.b(m.a(x)).reshape(x.shape[0], -1), {}),
    "a result twice": (twice, {}),
    "its argument": (lambda m, x: [x, m.b(m.a(x * 2)), x], {}),
    "a mapping": (features, {}),
    "a U-Net": (unet, {"c": lambda: block(16, 4)}),
    "a gate": (gated, {"g": lambda: nn.Conv2d(8, 8, 1)}),
    "written in place": (written, {"a2": lambda: block(3, 8)}),
    "shuffled": (shuffled, {"right": lambda: block(4, 4)}),
    "an upsampling": (lambda m, x: m.up(m.a(x)), {"up": lambda: nn.Sequential(nn.Upsample(scale_factor=2), block())}),
    "transposed": (lambda m, x: m.t(m.a(x)), {"t": lambda: nn.ConvTranspose2d(8, 4, 2, 2)}),
    "dropouts": (lambda m, x: m.d(m.a(x)), {"d": lambda: nn.Dropout(0.5, inplace=True)}),
}


def build(name: str, device: str, of: dict[str, Any]) -> nn.Module:
    run, modules = of[name]
    model = net(run, "cpu", **{key: make() for key, make in modules.items()})
    with torch.no_grad():
        model(data("cpu"))  # lazy layers
    return randomised(model, device)


@pytest.mark.parametrize("name", INSIDE)
def test_inside(name: str, device: str) -> None:
    plain = build(name, device, INSIDE)
    fused = fcb.fuse(copy.deepcopy(plain))
    shapes = [(2, 3, 9, 8), (1, 3, 9, 8)] if name == "all pixels" else [(2, 3, 9, 8), (1, 3, 8, 8), (3, 3, 16, 10)]
    with torch.no_grad():
        for _ in range(2):
            for seed, shape in enumerate(shapes):
                x = data(device, shape, seed)
                kept, wanted = x.clone(), plain(x)
                got = fused(x)
                same(got, wanted)
                assert torch.equal(x, kept) and (name != "its argument" or (got[0] is x and got[2] is x))
    assert is_inside(fused) and changed(fused) and not changed(plain)
    with torch.no_grad():
        x = data(device, (2, 5, 12, 8))[:, 1:4, 1:10]  # a part of another tensor
        same(fused(x), plain(x))
        if name not in ("all pixels", "shuffled"):  # of which eager fails, or is contiguous from some point on
            x = data(device).to(memory_format=torch.channels_last)
            same(fused(x), plain(x))
    fcb.unfuse(fused)
    for (key, a), b in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride(), key


def test_containers_of_its_own(device: str) -> None:
    plain = net(lambda m, x: OrderedDict(low=(a := m.a(x)), high=m.b(a)), device)
    fused, x = fcb.fuse(copy.deepcopy(plain)), data(device)
    with torch.no_grad():
        for _ in range(2):
            same(fused(x), plain(x))
    assert is_inside(fused)


def result_is_written(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    z = y.flatten(1)
    y.add_(1)
    return z.sum(1) + y.sum((1, 2, 3))


def asks_for_strides(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    return y * (y.stride(1) - 71)  # of 72 pixels


def unknown_ops(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) + m.a[1].running_mean.view(1, -1, 1, 1).expand(2, 8, 9, 8)[:, :, :, ::2].repeat(1, 1, 1, 2)


OUTSIDE: dict[str, tuple[Callable[..., Any], dict[str, Callable[[], nn.Module]]]] = {
    "a module that nobody knows": (lambda m, x: m.b(m.s(m.a(x))), {"s": Strange}),
    "strides": (asks_for_strides, {}),
    "its argument's memory": (lambda m, x: (m.b(m.a(x)), x.unsqueeze(0)), {}),
    "a part of its argument": (lambda m, x: (m.b(m.a(x)), x[:, :2]), {}),
    "its argument written": (lambda m, x: m.b(m.a(x.mul_(2))), {}),
    "one memory twice": (lambda m, x: ((y := m.b(m.a(x))), y.flatten(1)), {}),
    "a part": (lambda m, x: m.b(m.a(x))[:, :4], {}),
    "permuted": (lambda m, x: m.b(m.a(x)).permute(0, 2, 3, 1), {}),
    "written behind a view": (result_is_written, {}),
    "its own channels_last": (lambda m, x: m.b(m.a(x).contiguous(memory_format=torch.channels_last)), {}),
    "unknown ops": (unknown_ops, {}),
    "a view of the bits": (lambda m, x: m.b(m.a(x)).view(torch.int32), {}),
    "a transposed view": (lambda m, x: m.b(m.a(x)[:1].transpose(0, 1).view(1, 8, 9, 8)), {}),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_outside(name: str, device: str) -> None:
    plain = build(name, device, OUTSIDE)
    fused = fcb.fuse(copy.deepcopy(plain))
    if name == "a module that nobody knows":
        for model in (plain, fused):
            model.s.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        for _ in range(2):
            given = data(device), data(device)
            wanted, got = plain(given[0]), fused(given[1])
            same(got, wanted)
            same(given[1], given[0])
            if name.startswith("one memory"):
                assert got[0].data_ptr() == got[1].data_ptr()
    assert not fcb.report(fused).channels_last and not changed(fused)


def test_hooks_see_what_eager_shows_them(device: str) -> None:
    plain = net(lambda m, x: m.b(m.a(x)), device)
    fused, x = fcb.fuse(copy.deepcopy(plain)), data(device)
    with torch.no_grad():
        fused(x)
        assert is_inside(fused)
        seen: list[Any] = []
        for model in (plain, fused):
            model.b[1].register_forward_hook(lambda m, args, y: seen.append((args[0].shape, y.detach().clone())))
        same(fused(x).contiguous(), plain(x))
    assert len(seen) >= 2


def test_one_input_of_several(device: str) -> None:
    """A tensor of two dimensions, one that is given twice, numbers."""
    plain = net(lambda m, x, y, v, k: m.b(m.a(x) * k + m.a(y)) * v[:, :, None, None], device)
    fused, x, v = fcb.fuse(copy.deepcopy(plain)), data(device), data(device, (2, 8))
    with torch.no_grad():
        for arguments in ((x, x, v, 2.0), (x, data(device, seed=5), v, 2.0), (x, x, v, 3.0)):
            same(fused(*arguments), plain(*arguments))
    assert is_inside(fused)


def test_grayscale_images(device: str) -> None:
    plain = net(lambda m, x: m.b(m.g(x)), device, g=block(1, 8))
    fused, x = fcb.fuse(copy.deepcopy(plain)), data(device, (2, 1, 9, 8))
    with torch.no_grad():
        for _ in range(2):
            same(fused(x), plain(x))
        other = x.as_strided(x.shape, (72, 1, 8, 1))  # channels_last, for eager
        same(fused(other), plain(other))
    assert is_inside(fused)


@pytest.mark.parametrize("which", ["grad", "autocast", "inference", "double"])
def test_other_modes_keep_the_strides(which: str, device: str) -> None:
    """Weights have other strides by then, and a convolution of PyTorch's would put out these."""
    plain = net(lambda m, x: m.b(m.a(x)), device)
    fused, x = fcb.fuse(copy.deepcopy(plain)), data(device)
    with torch.no_grad():
        fused(x)
    assert changed(fused)
    if which == "double":
        plain, fused, x = plain.double(), fused.double(), x.double()
    results = []
    for model in (plain, fused):
        for _ in range(2):
            with (
                torch.set_grad_enabled(which == "grad"),
                torch.inference_mode(which == "inference"),
                torch.autocast(torch.device(device).type, torch.bfloat16, enabled=which == "autocast"),
            ):
                given = x.clone().requires_grad_(which == "grad")
                y = model(given)
        if which == "grad":
            y.square().mean().backward()
            results.append((y, given.grad, *(p.grad.contiguous() for p in model.parameters() if p.grad is not None)))
        else:
            results.append((y,))
    assert len(results[0]) == len(results[1])
    for got, wanted in zip(results[1], results[0], strict=True):
        if which == "autocast":
            assert got.stride() == wanted.stride()
            torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05 * float(wanted.detach().abs().max()))
        elif wanted is results[0][0]:
            same(got, wanted)
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.detach().abs().max()))


# ---- weights ---------------------------------------------------------------------------------------------------------


def first_call(model: nn.Module, device: str) -> nn.Module:
    with torch.no_grad():
        fcb.fuse(model)(data(device))
    return model


def test_weights_change_at_the_first_call_alone(device: str) -> None:
    model = net(lambda m, x: m.b(m.a(x)), device)
    parameters = [id(p) for p in model.parameters()]
    first_call(model, device)
    assert changed(model) == {"a.0.weight", "b.0.weight"}
    assert [id(p) for p in model.parameters()] == parameters
    pointers = [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        model(data(device, (1, 3, 20, 20)))
    model(data(device))
    assert [p.data_ptr() for p in model.parameters()] == pointers


@pytest.mark.parametrize("how", ["training", "with gradients"])
def test_weights_of_what_was_called_before_stay(how: str, device: str) -> None:
    """Who trains it has called it, and whoever has its calls in a CUDA graph."""
    model = fcb.fuse(net(lambda m, x: m.b(m.a(x)), device))
    model.train(how == "training")
    model(data(device))
    model.eval()
    pointers = [p.data_ptr() for p in model.parameters()]
    first_call(model, device)
    assert not changed(model) and [p.data_ptr() for p in model.parameters()] == pointers
    assert is_inside(model)  # and they are copied at each call


OWNERS = "a gradient", "a view", "a flat buffer", "state_dict", "another parameter", "subclass", "optimizer", "module"


@pytest.mark.parametrize("why", OWNERS)
def test_weights_that_others_have_stay(why: str, device: str) -> None:
    class Own(nn.Parameter):
        pass

    model = net(lambda m, x: m.b(m.a(x)), device)
    conv, kept = model.b[0], None
    if why == "a gradient":
        conv.weight.grad = torch.zeros_like(conv.weight)
    elif why == "a view":
        kept = conv.weight.detach()[0]
    elif why == "a flat buffer":
        flat = torch.empty(2 * conv.weight.numel(), device=device)
        flat[: conv.weight.numel()].copy_(conv.weight.detach().flatten())
        conv.weight.data = flat[: conv.weight.numel()].view_as(conv.weight)
        del flat
    elif why == "state_dict":
        kept = model.state_dict()
    elif why == "another parameter":
        kept = nn.Parameter(conv.weight.data)
    elif why == "optimizer":
        kept = torch.optim.Adam([conv.weight])
    elif why == "module":
        kept = nn.Conv2d(8, 8, 3)
        kept.weight = conv.weight
    else:
        conv.weight = Own(conv.weight.data)
    pointer = conv.weight.data_ptr()
    with torch.no_grad():
        wanted = copy.deepcopy(model)(data(device))
        same(first_call(model, device)(data(device)), wanted)
    assert conv.weight.is_contiguous() and conv.weight.data_ptr() == pointer
    assert changed(model) == (set() if why == "state_dict" else {"a.0.weight"} if why != "subclass" else changed(model))
    del kept


def test_weights_that_are_only_watched(device: str) -> None:
    """fcb.graphed looks at a model's tensors, and sees that they have moved."""
    model = net(lambda m, x: m.b(m.a(x)), device)
    watch = Watch(model)
    first_call(model, device)
    assert changed(model) == {"a.0.weight", "b.0.weight"} and not watch.holds()


def test_weights_of_two_modules(device: str) -> None:
    """One parameter of two convolutions."""
    model = net(lambda m, x: m.c(m.b(m.a(x))), device, c=block())
    model.c[0].weight = model.b[0].weight
    with torch.no_grad():
        wanted = copy.deepcopy(model)(data(device))
        same(first_call(model, device)(data(device)), wanted)
    assert changed(model) == {"a.0.weight", "b.0.weight"} and model.c[0].weight is model.b[0].weight
    fcb.unfuse(model)
    assert not changed(model) and model.c[0].weight is model.b[0].weight


def test_copies_and_checkpoints(device: str) -> None:
    plain = net(lambda m, x: m.b(m.a(x)), device)
    fused, x = first_call(copy.deepcopy(plain), device), data(device)
    twin = copy.deepcopy(fused)
    with torch.no_grad():
        same(twin(x), plain(x))
        assert is_inside(twin)
        twin.a[0].weight.mul_(2)
        same(fused(x), plain(x))
    fcb.unfuse(twin)
    assert not changed(twin) and changed(fused)
    # A checkpoint of the fused model into the plain one, and the other way round.
    other = net(lambda m, x: m.b(m.a(x)), device)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        wanted = plain(x)
        fresh = net(lambda m, x: m.b(m.a(x)), device)
        fresh.load_state_dict(torch.load(file))
        same(fresh(x), wanted)
        fused.load_state_dict(other.state_dict())
        same(fused(x), other(x))
        fused.load_state_dict(plain.state_dict(), assign=True)
        same(fused(x), wanted)


def test_pickles(device: str) -> None:
    model = first_call(randomised(nn.Sequential(block(3, 8), block()), device), device)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is nn.Sequential
    with torch.no_grad():
        torch.testing.assert_close(again(data(device)).contiguous(), model(data(device)))


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "fused Adam", "fused Adam before"])
def test_training_afterwards(optimizer: str, device: str) -> None:
    """Steps of an optimizer, then evaluation again. A fused one is wrong where its tensors' strides are not a weight's."""
    options = {"momentum": 0.9} if optimizer == "SGD" else {"fused": optimizer.startswith("fused")}
    of = getattr(torch.optim, "SGD" if optimizer == "SGD" else "Adam")
    plain, x = net(lambda m, x: m.b(m.a(x)), device), data(device)
    fused = copy.deepcopy(plain)
    optimizers = {}
    if optimizer.endswith("before"):
        for model in (plain, fused):
            optimizers[model] = of(model.parameters(), 0.01, **options)
            model.train()(x).square().mean().backward()
            optimizers[model].step()
            optimizers[model].zero_grad()
            model.eval()
    first_call(fused, device)
    assert bool(changed(fused)) is not optimizer.endswith("before")
    for model in (plain, fused):
        optimizer = optimizers.get(model) or of(model.parameters(), 0.01, **options)
        for _ in range(3):
            model.train()(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    with torch.no_grad():
        got, wanted = fused.eval()(x), plain.eval()(x)
    assert got.stride() == wanted.stride() and is_inside(fused)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.detach().abs().max()))


# ---- the decision ----------------------------------------------------------------------------------------------------


def test_what_the_rule_sees(device: str, goes_inside: list[inside.Seen]) -> None:
    model = net(lambda m, x: m.linear(m.pool(m.b(m.a(x))).flatten(1)), device)
    first_call(model, device)
    (seen,) = goes_inside
    assert seen.converted == [2 * 3 * 9 * 8]
    model = net(lambda m, x: m.b(m.a(x)), device)
    model.a[0].weight.grad = torch.zeros_like(model.a[0].weight)
    first_call(model, device)
    assert goes_inside[1].converted == [2 * 3 * 9 * 8, 2 * 8 * 9 * 8, 8 * 3 * 9]


def test_gains_and_losses(device: str, goes_inside: list[inside.Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gained: what has a kernel in channels_last alone. Lost: the other way round, and groups without one."""

    def algorithm(self: Any, x: Tensor, residual: Any) -> str:
        is_last = not x.is_contiguous()
        if self.conv is model.c[0]:
            return "aten, with a residual"
        own = is_last if self.conv is model.a[0] else not is_last
        return "gemm_sm90 64x64" if own else "aten"

    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8))
    model = net(lambda m, x: m.c(m.b(m.a(x))), device, c=grouped)
    monkeypatch.setattr("fused_conv_bn._fuse.blocks.Block.algorithm", algorithm)
    first_call(model, device)
    (seen,) = goes_inside
    assert seen.gained == [2 * 11 * 72] and seen.lost == [2 * 16 * 72] * 2
    assert {row.algorithm for row in fcb.report(model).rows if row.module == "conv"} == {
        "gemm_sm90 64x64",
        "aten",
        "aten, with a residual",
    }


def test_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    seen = inside.Seen
    assert inside.DEVICES == {"cuda"}
    assert inside.pays(seen([100] * 3, [], [50]))
    assert not inside.pays(seen([], [], [1]))
    assert not inside.pays(seen([1000] * 2, [], [1]))  # few
    assert not inside.pays(seen([10] * 50, [], [500]))  # large results
    assert not inside.pays(seen([100] * 20, [1000], [10]))
    assert not inside.pays(seen([100] * 20, [1] * 10, [10]))


def test_a_rule_that_says_no(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "pays", lambda seen: False)
    model = first_call(net(lambda m, x: m.b(m.a(x)), device), device)
    assert not fcb.report(model).channels_last and not changed(model)


def test_nothing_on_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "DEVICES", {"cuda"})
    monkeypatch.setattr(inside, "_Graph", None)
    model = first_call(net(lambda m, x: m.b(m.a(x)), "cpu"), "cpu")
    assert not fcb.report(model).channels_last and not changed(model)


def test_models_that_are_channels_last_already(device: str) -> None:
    plain = net(lambda m, x: m.b(m.a(x)), device).to(memory_format=torch.channels_last)
    fused, x = fcb.fuse(copy.deepcopy(plain)), data(device)
    with torch.no_grad():
        for given in (x.to(memory_format=torch.channels_last), x):
            same(fused(given), plain(given))
    assert not is_inside(fused)
    fcb.unfuse(fused)
    assert changed(fused) == {"a.0.weight", "b.0.weight"}


@pytest.mark.parametrize("what", ["is wrong", "fails"])
def test_a_group_in_channels_last(what: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = blocks._conv_bn

    def op(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.is_contiguous():
            return real(x, *args, **kwargs)
        if what == "fails":
            raise ValueError
        return real(x, *args, **kwargs) * 1.1

    monkeypatch.setattr(blocks, "_conv_bn", op)
    plain = net(lambda m, x: m.b(m.a(x)), device)
    fused = first_call(copy.deepcopy(plain), device)
    assert not fcb.report(fused).channels_last and not changed(fused)
    with torch.no_grad():
        same(fused(data(device)), plain(data(device)))


def test_frozen_models(device: str) -> None:
    """Are in channels_last by themselves, on the CPU."""
    model = net(lambda m, x: m.b(m.a(x)), device)
    with torch.no_grad():
        wanted = model(data(device))
        fcb.fuse(model, data(device), freeze=True)
        same(model(data(device)), wanted)
    assert not fcb.report(model).channels_last and not changed(model)


def test_report(device: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net(lambda m, x: m.b(m.a(x)), device)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if x.sum() > -1e9 else x  # which torch.fx cannot follow

    model = first_call(Outer().eval(), device)
    report = fcb.report(model)
    assert report.channels_last == ["inner"] == report.to_dict()["channels_last inside"]
    assert "inner runs in channels_last inside" in str(report).split("\n")
    assert model.inner.__dict__[STATE].changed == {"a.0", "b.0"}
    fcb.unfuse(model)
    assert not fcb.report(model).channels_last and not changed(model)


# ---- by the rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("graphs", [False, True])
def test_by_the_rule(graphs: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits the rule's own kernels run where there are some; their results are held to float64's."""
    monkeypatch.undo()
    torch.manual_seed(3)
    exact = randomised(nn.Sequential(block(64, 64), *(block(64, 64) for _ in range(7))), "cpu").double()
    plain = copy.deepcopy(exact).to(device, dtype)
    fused = fcb.fuse(copy.deepcopy(plain))
    run = fcb.graphed(fused) if graphs else fused
    x = data(device, (4, 64, 28, 28)).to(dtype)
    own = fcb.explain(x.to(memory_format=torch.channels_last), plain[0][0].weight, padding=1).split()[0]
    with torch.no_grad():
        for _ in range(3):
            got, eager = run(x), plain(x)
            assert got.stride() == eager.stride()
            assert_no_worse_than_eager(got.cpu(), eager.cpu(), exact(x.cpu().double()))
    assert is_inside(fused) == (own != "aten") == bool(changed(fused))
    if is_inside(fused):
        assert {row.algorithm.split()[0] for row in fcb.report(fused).rows if row.module == "conv"} == {own}
