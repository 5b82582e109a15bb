"""Two GPUs in one process: tensors of one while the other is current, models that move, a thread for each.

(Several processes: tests/integrations/test_distributed.py. FUSED_CONV_BN_REQUIRE_CUDA=2 demands two GPUs.)
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from common import random_bn
from small_network import Network, random_statistics

Tensors = dict[str, Tensor]


@pytest.fixture(params=[(0, 1), (1, 0)], ids=["of cuda:1, cuda:0 is current", "of cuda:0, cuda:1 is current"])
def places(request: pytest.FixtureRequest, two_gpus: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """(where tensors are, the current device), which stays the current one."""
    here, there = (two_gpus[i] for i in request.param)
    torch.cuda.set_device(here)
    yield there, here
    current = torch.cuda.current_device()
    torch.cuda.set_device(0)
    assert current == torch.device(here).index


# ---- the functions ---------------------------------------------------------------------------------------------------


def tensors() -> Tensors:
    """All that calls take, on the CPU."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    t = {"x": normal(4, 16, 20, 18), "residual": normal(4, 16, 20, 18), "image": normal(2, 3, 40, 36)}
    t |= {"gate": torch.rand(4, 16, 1, 1, generator=generator), "w": normal(24, 16, 3, 3) / 12}
    t |= {"w1": normal(24, 16, 1, 1) / 4, "stem": normal(24, 3, 3, 3) / 5, "depthwise": normal(16, 1, 3, 3) / 3}
    for channels in (16, 24, 32):
        values = random_bn(channels, torch.float32, "cpu", generator)
        t |= {f"{n}{channels}": v for n, v in zip(("mean", "var", "weight", "bias"), values, strict=True)}
    return t


BN16, BN24, BN32 = (tuple(f"{n}{c}" for n in ("mean", "var", "weight", "bias")) for c in (16, 24, 32))


def half(t: Tensor) -> Tensor:
    return t.half().to(memory_format=torch.channels_last)


def updated(call: Callable[..., Tensor], *args: Any, at: int, **kwargs: Any) -> tuple[Tensor, ...]:
    """The result and the running statistics, which are the arguments from ``at`` on."""
    args = (*args[:at], *(t.clone() for t in args[at : at + 2]), *args[at + 2 :])
    return call(*args, **kwargs), *args[at : at + 2]


def gradients(call: Callable[..., Tensor], *args: Tensor, rest: tuple[Any, ...] = ()) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in args]
    y = call(*leaves, *rest)
    return y.detach(), *torch.autograd.grad(y.square().mean(), leaves)


CALLS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "fold_bn": (BN16, lambda *bn: fcb.fold_bn(*bn, 1.5)),
    "bn_scale": (("x", "residual", *BN16), lambda x, r, *bn: fcb.bn_scale(x, *bn, 1.5, residual=r, activation="silu")),
    "bn_scale, out": (("x", *BN16), lambda x, *bn: fcb.bn_scale(x, *bn, out=torch.empty_like(x))),
    "bn_scale_": (("x", *BN16), lambda x, *bn: fcb.bn_scale_(x.clone(), *bn)),
    "scale_shift": (("x", "weight16", "bias16"), lambda *t: fcb.scale_shift(*t, activation="relu")),
    "scale_shift_": (("x", "weight16", "bias16"), lambda x, *t: fcb.scale_shift_(x.clone(), *t)),
    "bn_scale_cat": (("x", "residual", *BN32), lambda x, r, *bn: fcb.bn_scale_cat([x, r], *bn)),
    "gate": (("x", "gate", "residual"), lambda x, g, r: fcb.gate(x, g, residual=r)),
    "max_pool2d": (("x",), lambda x: fcb.max_pool2d(x, 3, 2, 1)),
    "spatial_mean": (("x",), lambda x: fcb.spatial_mean(x)),
    "conv_scale_shift": (("x", "w", "weight24", "bias24"), lambda *t: fcb.conv_scale_shift(*t, padding=1)),
    "conv_bn_scale": (("x", "w", "bias24", *BN24), lambda *t: fcb.conv_bn_scale(*t, 1.5, activation="gelu")),
    "a stem": (("image", "stem", *BN24), lambda x, w, *bn: fcb.conv_bn_scale(x, w, None, *bn, 1.5, stride=2)),
    "depthwise": (
        ("x", "depthwise", *BN16),
        lambda x, w, *bn: fcb.conv_bn_scale(x, w, None, *bn, 1.5, padding=1, groups=16),
    ),
    "16 bits": (("x", "w", *BN24), lambda x, w, *bn: fcb.conv_bn_scale(half(x), half(w), None, *bn, padding=1)),
    "conv_bn_scale_mean": (
        ("x", "depthwise", *BN16),
        lambda x, w, *bn: fcb.conv_bn_scale_mean(half(x), half(w), None, *bn, padding=1, groups=16)[1],
    ),
    "gate_conv_bn_scale": (
        ("x", "gate", "w1", *BN24),
        lambda x, g, w, *bn: fcb.gate_conv_bn_scale(half(x), g.half(), half(w), None, *bn),
    ),
    "bn_scale_train": (("x", *BN16), lambda *t: updated(fcb.bn_scale_train, *t, 1.5, at=1, activation="mish")),
    "conv_bn_scale_train": (
        ("x", "w", "bias24", *BN24),
        lambda *t: updated(fcb.conv_bn_scale_train, *t, 1.5, at=3, activation="relu"),
    ),
    "a stem in training": (
        ("image", "stem", *BN24),
        lambda x, w, *bn: updated(fcb.conv_bn_scale_train, x, w, None, *bn, 1.5, at=3),
    ),
    "gradients of bn_scale": (
        ("x", "weight16", "bias16", "mean16", "var16"),
        lambda x, w, b, mean, var: gradients(lambda x, w, b: fcb.bn_scale(x, mean, var, w, b, 1.5), x, w, b),
    ),
    "gradients of bn_scale_train": (
        ("x", "weight16", "bias16"),
        lambda *t: gradients(
            lambda x, w, b: fcb.bn_scale_train(x, None, None, w, b, 1.5, activation="relu"), *t
        ),
    ),
    "gradients of conv_bn_scale_train": (
        ("image", "stem", "weight24", "bias24"),
        lambda *t: gradients(lambda x, k, w, b: fcb.conv_bn_scale_train(x, k, None, None, None, w, b, 1.5), *t),
    ),
}  # fmt: skip
"""The tensors that a call takes, and the call."""


def assert_near(got: Any, expected: Any, device: str) -> None:
    mine, theirs = (torch.utils._pytree.tree_leaves(v) for v in (got, expected))
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        assert a.device == torch.device(device)
        tolerance = 2e-2 if b.dtype == torch.float16 else 1e-4
        atol = tolerance * max(0.01, float(b.detach().abs().max()))  # that of a bias in front of a BatchNorm is 0
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=tolerance, atol=atol)


@pytest.mark.parametrize("name", CALLS)
def test_a_call(name: str, places: tuple[str, str]) -> None:
    there, _ = places
    names, call = CALLS[name]
    t = tensors()
    assert_near(call(*(t[n].to(there) for n in names)), call(*(t[n] for n in names)), there)


@pytest.mark.parametrize("name", [name for name, (names, _) in CALLS.items() if len(names) > 1])
def test_arguments_on_different_devices(name: str, places: tuple[str, str]) -> None:
    """A sentence of ours or, where gradients or a cast come first, of PyTorch's."""
    there, here = places
    names, call = CALLS[name]
    t = tensors()
    for other in names[1:]:
        given = [t[n].to(here if n == other else there) for n in names]
        with pytest.raises(RuntimeError) as caught:
            call(*given)
        told = str(caught.value).splitlines()[0]
        assert f"is on {here}, expected {there}, where " in told or "same device" in told, told
    torch.cuda.synchronize(there)
    torch.cuda.synchronize(here)


# ---- modules and models ----------------------------------------------------------------------------------------------


def assert_model(model: nn.Module, plain: nn.Module, x: Tensor, device: str) -> None:
    with torch.no_grad():
        assert_near(model(x.to(device)), plain(x), device)


def train(model: Any, x: Tensor) -> list[Tensor]:
    model.train()
    model.zero_grad(set_to_none=True)
    y = model(x)
    y.square().mean().backward()
    model.eval()
    return [y, *(p.grad for p in model.parameters()), *(b for b in model.buffers() if b.is_floating_point())]


def test_a_fused_model_moves(places: tuple[str, str], generator: torch.Generator) -> None:
    """From one GPU to the other and back: fused on both, and right in both modes."""
    there, here = places
    plain = random_statistics(Network(), generator)
    x = torch.randn(4, 3, 32, 32, generator=generator)
    model = fcb.fuse(copy.deepcopy(plain))
    for device in (there, here, there):
        model.to(device)
        for _ in range(2):
            assert_model(model, plain, x, device)
        assert fcb.report(model).counts["fused"] > 0
        assert all(t.device == torch.device(device) for t in model.state_dict().values())
        assert_near(train(model, x.to(device)), train(plain, x), device)


def test_a_fused_model_of_two_devices_is_refused(places: tuple[str, str], generator: torch.Generator) -> None:
    there, here = places
    model = fcb.fuse(random_statistics(Network(), generator).to(there))
    x = torch.randn(4, 3, 32, 32, generator=generator)
    with torch.no_grad():
        y = model(x.to(there))
        with pytest.raises(RuntimeError, match=r"same device|is on cuda:\d, expected cuda:\d"):
            model(x.to(here))
        assert torch.equal(model(x.to(there)), y)


def test_a_module(places: tuple[str, str], generator: torch.Generator) -> None:
    there, _ = places
    plain = random_statistics(nn.Sequential(fcb.ConvBnScale2d(3, 8, 3, 1.5, activation="silu")), generator)
    ours = copy.deepcopy(plain).to(there)
    x = torch.randn(4, 3, 20, 20, generator=generator)
    assert_model(ours, plain, x, there)
    assert_near(train(ours, x.to(there)), train(plain, x), there)


@torch.no_grad()
def test_graphs_on_both(places: tuple[str, str], generator: torch.Generator) -> None:
    """Two models in turns, each with graphs on its own device, and one that moves."""
    there, here = places
    plain = random_statistics(Network(), generator)
    fast = {device: fcb.graphed(fcb.fuse(copy.deepcopy(plain).to(device))) for device in (there, here)}
    moves = fcb.graphed(fcb.fuse(copy.deepcopy(plain)))
    for images, graphs in ((2, 1), (4, 2), (2, 2), (4, 2)):
        x = torch.randn(images, 3, 32, 32, generator=generator)
        expected = plain(x)
        for device in (there, here):
            assert_near(fast[device](x.to(device)), expected, device)
            assert_near(moves.to(device)(x.to(device)), expected, device)
            assert fast[device].graphs == graphs and moves.graphs == 1
    with pytest.raises(RuntimeError, match=r"same device|is on cuda:\d, expected cuda:\d"):
        fast[there](x.to(here))
    assert_near(fast[there](x.to(there)), expected, there)


def test_a_thread_for_each(two_gpus: tuple[str, str], generator: torch.Generator) -> None:
    """Functions, a fused model, graphs and training steps at the same time, as a thread alone has them."""
    plain = random_statistics(Network(), generator)
    xs = [torch.randn(n, 3, 32, 32, generator=generator) for n in (2, 3)]
    t = tensors()
    names, call = CALLS["conv_bn_scale"]
    errors: list[str] = []

    def work(device: str) -> list[Tensor]:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            model = fcb.fuse(copy.deepcopy(plain).to(device))
            trained = fcb.fuse(copy.deepcopy(plain).to(device))
            fast = fcb.graphed(copy.deepcopy(model))
            steps = fcb.graphed(fcb.fuse(copy.deepcopy(plain).to(device)))
            found: list[Tensor] = []
            for i in range(6):
                x = xs[i % 2].to(device)
                with torch.no_grad():
                    found += [call(*(t[n].to(device) for n in names)), model(x), fast(x)]
                for m in (trained, steps):
                    found += [v.detach().clone() for v in train(m, x)]
            torch.cuda.current_stream().synchronize()
            return [v.cpu() for v in found]

    alone = {device: work(device) for device in two_gpus}

    def checked(device: str) -> None:
        try:
            for a, b in zip(work(device), alone[device], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(0.01, float(b.abs().max())))
        except Exception as error:
            errors.append(f"{device}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=checked, args=(device,)) for device in two_gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert errors == []
