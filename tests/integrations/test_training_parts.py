"""Every subset of what may require a gradient, and torch.func's transforms of modules, against plain PyTorch in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import fused_conv_bn as fcb
from common import FEW, MANY, RESIDUALS
from training_pairs import Network, Plain, networks, randomize

pytestmark = pytest.mark.usefixtures("no_leftover_graphs")
terms = pytest.mark.parametrize("channels", [FEW, MANY], ids=["few terms", "many terms"])


# ---- subsets ---------------------------------------------------------------------------------------------------------

MODES: dict[str, Callable[[Any], Any]] = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "frozen bn": lambda m: m.train().bn.eval(),
}


def pair(channels: int, activation: str, generator: torch.Generator, device: str, last: bool = False) -> list[Any]:
    plain = Plain(channels, 6, 3, 1.7, activation, padding=1)
    ours = fcb.ConvBnScale2d(channels, 6, 3, 1.7, padding=1, activation=activation, residual_last=last)
    randomize(plain, generator)
    ours.load_state_dict(plain.state_dict())
    return [m.to(device, torch.float64) for m in (plain, ours)]


def found(m: Any, run: Callable[..., Tensor], x: Tensor, residual: Tensor | None, names: set[str]) -> dict[str, Any]:
    """The result and every gradient there is."""
    leaves = {"x": x.clone(), **({} if residual is None else {"residual": residual.clone()})}
    for name, leaf in {**leaves, **dict(m.named_parameters())}.items():
        leaf.grad = None
        leaf.requires_grad_(name in names)
    y = run(*leaves.values())
    assert y.requires_grad == bool(names)
    if names:
        y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y))
    leaves |= dict(m.named_parameters())
    return {"y": y.detach(), **{n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}}


def with_plain_residual(plain: Plain, last: bool) -> Callable[..., Tensor]:
    return lambda x, r=None: plain(x) + r if last else plain(x, r)


NAMES = ("x", "conv.weight", "conv.bias", "bn.weight", "bn.bias", "residual")
SUBSETS = [set(s) for n in range(len(NAMES) + 1) for s in itertools.combinations(NAMES, n)]


@terms
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", RESIDUALS)
def test_every_subset(kind: str, mode: str, channels: int, device: str, generator: torch.Generator) -> None:
    x = torch.randn(2, channels, 5, 4, generator=generator, dtype=torch.float64).to(device)
    residual = None
    if kind != "none":
        residual = torch.randn(2, 6, 5, 4, generator=generator, dtype=torch.float64).to(device)
    for activation in ("none", "relu", "silu"):
        plain, ours = pair(channels, activation, generator, device, kind == "last")
        for m in (plain, ours):
            MODES[mode](m)
        for names in SUBSETS:
            if residual is None and "residual" in names:
                continue
            mine = found(ours, ours, x, residual, names)
            eager = found(plain, with_plain_residual(plain, kind == "last"), x, residual, names)
            assert mine.keys() == eager.keys() == {"y", *names}, (activation, names)
            for name in mine:
                torch.testing.assert_close(mine[name], eager[name], msg=lambda m, n=names: f"{n}: {m}")


@terms
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_subsets_compiled(mode: str, channels: int, device: str, generator: torch.Generator) -> None:
    x = torch.randn(2, channels, 5, 4, generator=generator, dtype=torch.float64).to(device)
    residual = torch.randn(2, 6, 5, 4, generator=generator, dtype=torch.float64).to(device)
    plain, ours = pair(channels, "silu", generator, device)
    for m in (plain, ours):
        MODES[mode](m)
    for names in [{name} for name in NAMES] + [set(NAMES), set(NAMES) - {"x"}, set(NAMES) - {"conv.weight"}]:
        torch._dynamo.reset()
        mine = found(ours, torch.compile(ours, fullgraph=True, backend="aot_eager"), x, residual, names)
        eager = found(plain, plain, x, residual, names)
        assert mine.keys() == eager.keys(), names
        for name in mine:
            torch.testing.assert_close(mine[name], eager[name], msg=lambda m, n=names: f"{n}: {m}")


# ---- torch.func ------------------------------------------------------------------------------------------------------


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def loss_of(model: nn.Module, p: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(model, p, (x,)).square().mean()


TRANSFORMS: dict[str, Callable[[nn.Module, dict[str, Tensor], Tensor], Any]] = {
    "grad": lambda m, p, x: grad(lambda q: loss_of(m, q, x))(p),
    "grad of the input": lambda m, p, x: grad(lambda t: loss_of(m, p, t))(x),
    "vjp": lambda m, p, x: vjp(lambda q, t: functional_call(m, q, (t,)), p, x)[1](
        torch.ones(len(x), 5, dtype=x.dtype, device=x.device)
    ),
    "jvp": lambda m, p, x: jvp(lambda t: functional_call(m, p, (t,)), (x,), (torch.cos(x),)),
    "jacrev": lambda m, p, x: jacrev(lambda q: functional_call(m, q, (x,)))(p),
    "hessian": lambda m, p, x: hessian(lambda b: loss_of(m, {**p, "deep.bn.bias": b}, x))(p["deep.bn.bias"]),
    "per sample": lambda m, p, x: vmap(grad(lambda q, t: loss_of(m, q, t[None])), (None, 0))(p, x),
    "ensemble": lambda m, p, x: vmap(lambda q: functional_call(m, q, (x,)))(
        {name: torch.stack([t, t * 0.5]) for name, t in p.items()}
    ),
    "functional_call": lambda m, p, x: functional_call(m, p, (x,)),
}


def assert_equal_trees(mine: Any, eager: Any) -> None:
    mine, eager = (torch.utils._pytree.tree_flatten(tree)[0] for tree in (mine, eager))
    assert len(mine) == len(eager)
    assert any(t.abs().max() > 0 for t in mine)
    for a, b in zip(mine, eager, strict=True):
        torch.testing.assert_close(a, b)


def evaluated(generator: torch.Generator, device: str) -> tuple[Network, Network, Tensor]:
    plain, ours = networks(generator, device)
    x = torch.randn(3, 3, 6, 5, generator=generator, dtype=torch.float64).to(device)
    return plain.eval(), ours.eval(), x


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str, device: str, generator: torch.Generator) -> None:
    plain, ours, x = evaluated(generator, device)
    transform = TRANSFORMS[name]
    assert_equal_trees(transform(ours, parameters(ours), x), transform(plain, parameters(plain), x))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", ["grad", "grad of the input", "vjp", "jacrev", "per sample", "functional_call"])
def test_compiled_transforms(name: str, device: str, generator: torch.Generator) -> None:
    """The transform inside of what is compiled: a gradient of zeros without an error would show here alone."""
    plain, ours, x = evaluated(generator, device)
    transform = TRANSFORMS[name]
    compiled = torch.compile(lambda p, t: transform(ours, p, t), fullgraph=True, backend="aot_eager")
    assert_equal_trees(compiled(parameters(ours), x), transform(plain, parameters(plain), x))


def test_transform_of_a_compiled_module(device: str, generator: torch.Generator) -> None:
    """The compiled module inside of the transform, of one that ran without it before."""
    plain, ours, x = evaluated(generator, device)
    compiled = torch.compile(ours, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))
    for _ in range(2):
        mine = grad(lambda t: compiled(t).square().mean())(x)
        assert_equal_trees(mine, grad(lambda t: plain(t).square().mean())(x))
        torch.testing.assert_close(compiled(x), plain(x))


def test_functional_training(device: str, generator: torch.Generator) -> None:
    """Buffers passed as arguments are those that move, in transforms and without."""
    plain, ours = networks(generator, device)
    x = torch.randn(4, 3, 6, 5, generator=generator, dtype=torch.float64).to(device)
    untouched = {name: b.clone() for name, b in ours.named_buffers()}
    results = []
    for model in (ours, plain):
        buffers = {name: b.clone() for name, b in model.named_buffers()}

        def loss(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, model: Any = model) -> Tensor:
            return functional_call(model, (p, b), (x,)).square().mean()

        gradients = grad(loss)(parameters(model), buffers, x)
        p = {name: t.requires_grad_() for name, t in parameters(model).items()}
        again = torch.autograd.grad(loss(p, buffers, x), list(p.values()))
        assert_equal_trees(list(gradients.values()), list(again))
        assert buffers["deep.bn.num_batches_tracked"] == 2
        results.append([gradients, buffers])
    assert_equal_trees(*results)
    for name, b in ours.named_buffers():
        assert torch.equal(b, untouched[name])


def test_compiled_functional_training(device: str, generator: torch.Generator) -> None:
    plain, ours = networks(generator, device)
    x = torch.randn(4, 3, 6, 5, generator=generator, dtype=torch.float64).to(device)
    results = []
    for model, compiler in (
        (ours, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")),
        (plain, lambda f: f),
    ):
        buffers = {name: b.clone() for name, b in model.named_buffers()}

        def gradients(p: Any, b: Any, x: Tensor, model: Any = model) -> Any:
            return grad(lambda q, c, t: functional_call(model, (q, c), (t,)).square().mean())(p, b, x)

        results.append([compiler(gradients)(parameters(model), buffers, x), buffers])
    assert_equal_trees(*results)
