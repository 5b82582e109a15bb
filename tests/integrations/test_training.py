"""Whole training steps of a small network against plain PyTorch: checkpoints, autocast and GradScaler, accumulation,
hooks on tensors, torch.compile of the step. In float64 where formulas are compared."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fused_conv_bn as fcb
from common import FEW, MANY, random_bn
from training_pairs import (
    Network,
    Plain,
    Step,
    assert_same,
    batches,
    left,
    networks,
    plain_step,
    randomize,
    train,
)

pytestmark = pytest.mark.usefixtures("no_leftover_graphs")
loss_of = nn.functional.cross_entropy


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def block_pair(channels: int, activation: str, generator: torch.Generator, momentum: float | None) -> list[Any]:
    pair = [Plain(channels, 6, 3, 1.7, activation), fcb.ConvBnScale2d(channels, 6, 3, 1.7, activation=activation)]
    randomize(pair[0], generator)
    pair[1].load_state_dict(pair[0].state_dict())
    for m in pair:
        m.bn.momentum = momentum
    return pair


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("channels", [FEW, MANY], ids=["few terms", "many terms"])
def test_a_checkpointed_block_s_statistics(
    channels: int, activation: str, early_stop: bool, reentrant: bool, device: str, generator: torch.Generator
) -> None:
    """Each pass counts as a batch, the recomputed one too, and also where it ends when all that is saved is there.

    Without a momentum the statistics depend on how many batches were counted."""
    x = torch.randn(3, channels, 6, 5, generator=generator, dtype=torch.float64).to(device)
    for momentum in (0.1, None):
        results = []
        for m in block_pair(channels, activation, generator, momentum):
            m.to(device, torch.float64)
            leaf = x.clone().requires_grad_()
            with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
                for _ in range(2):
                    checkpoint(m, leaf, use_reentrant=reentrant).square().sum().backward()
            assert m.bn.num_batches_tracked == 4
            results.append({**left(m), "x": leaf.grad})
        assert_same(results[1], results[0])


def checkpointed(reentrant: bool, depth: str, **kwargs: Any) -> Step:
    def block_of(m: nn.Module) -> Callable[..., Tensor]:
        return lambda *inputs: checkpoint(m, *inputs, use_reentrant=reentrant, **kwargs)

    def step(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        x = x.requires_grad_()
        if depth == "all":
            return loss_of(block_of(model)(x), target)
        y = block_of(model.wide)(block_of(lambda t: model.depthwise(model.stem(t)))(x))
        return loss_of(model.head(block_of(model.deep)(y, y).mean((2, 3))), target)

    return step


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("depth", ["all", "blocks"])
def test_checkpointed_training(depth: str, reentrant: bool, device: str, generator: torch.Generator) -> None:
    plain, ours = networks(generator, device)
    data = batches(generator, 3, device)
    step = checkpointed(reentrant, depth)
    assert_same(train(ours, data, step), train(plain, data, step))


def test_selective_checkpoint(device: str, generator: torch.Generator) -> None:
    """A policy that keeps convolutions and computes the rest again."""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keeps = op is torch.ops.aten.convolution.default
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    plain, ours = networks(generator, device)
    data = batches(generator, 2, device)
    step = checkpointed(False, "blocks", context_fn=lambda: create_selective_checkpoint_contexts(policy))
    assert_same(train(ours, data, step), train(plain, data, step))


def test_a_checkpoint_in_a_compiled_step(device: str, generator: torch.Generator) -> None:
    plain, ours = networks(generator, device)
    data = batches(generator, 2, device)

    def step(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        y = checkpoint(lambda t: model.wide(model.depthwise(model.stem(t))), x, use_reentrant=False)
        return loss_of(model.head(model.deep(y, y).mean((2, 3))), target)

    results = []
    for model in (ours, plain):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        results.append(train(model, data, compiled))
    assert_same(*results)


# ---- autocast, accumulation, frozen parts ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_grad_scaler(dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    """float32 weights, an overflowing step in between, which the scaler skips; as near to float64's as eager, or 2 times
    as far."""
    plain, ours = networks(generator, device, torch.float32)
    exact = copy.deepcopy(plain).double()
    data = batches(generator, 6, device, torch.float32)

    def run(model: Network) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=2)
        scales = []
        for i, (x, target) in enumerate(data):
            optimizer.zero_grad()
            with torch.autocast(device, dtype):
                y = model(x)
                assert y.dtype == dtype
                loss = loss_of(y.float(), target)
            scaler.scale(loss * (float("inf") if i == 2 else 1.0)).backward()
            assert all(p.grad.dtype == torch.float32 for p in model.parameters())
            scaler.unscale_(optimizer)
            if i != 2:
                nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert scales == [1024, 2048, 1024, 1024, 2048, 2048]
        return left(model)

    def run_exact() -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(exact.parameters(), lr=0.01)
        for i, (x, target) in enumerate(data):
            optimizer.zero_grad()
            loss_of(exact(x.double()), target).backward()
            nn.utils.clip_grad_norm_(exact.parameters(), 10.0)
            if i != 2:
                optimizer.step()
        return left(exact)

    mine, eager, truth = run(ours), run(plain), run_exact()
    assert mine.keys() == eager.keys() == truth.keys()

    def errors(found: dict[str, Tensor], names: list[str]) -> float:
        return sum(((found[n].double() - truth[n]).norm() / truth[n].norm()).item() ** 2 for n in names) ** 0.5

    for kind in ("running_mean", "running_var", "gradient", "weight"):
        names = [n for n in truth if kind in n and not n.endswith("conv.bias")]
        assert names
        assert errors(mine, names) <= 2 * errors(eager, names) + torch.finfo(dtype).eps, kind
    for name in truth:
        if name.endswith("num_batches_tracked"):
            assert mine[name] == eager[name] == 6


def test_accumulated_gradients(device: str, generator: torch.Generator) -> None:
    """Over three backward passes, and into gradients that are there already, in place."""
    plain, ours = networks(generator, device)
    data = batches(generator, 3, device)
    results = []
    for model in (ours, plain):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = {name: p.grad for name, p in model.named_parameters()}
        for x, target in data:
            (loss_of(model(x), target) / len(data)).backward()
        assert all(p.grad is before[name] for name, p in model.named_parameters())
        results.append(left(model))
    assert_same(*results)


def test_one_block_used_several_times_in_a_graph(device: str, generator: torch.Generator) -> None:
    """Its gradients add up, and its running statistics move at every use."""
    results = []
    state: dict[str, Tensor] = {}
    x = torch.randn(3, 6, 6, 5, generator=generator, dtype=torch.float64).to(device)
    for m in (Plain(6, 6, 3, 1.7, "silu", padding=1), fcb.ConvBnScale2d(6, 6, 3, 1.7, padding=1, activation="silu")):
        m.load_state_dict(state) if state else randomize(m, generator)
        state = copy.deepcopy(m.state_dict())
        m.to(device, torch.float64)
        leaf = x.clone().requires_grad_()
        y = m(m(m(leaf)), leaf)
        y.square().sum().backward()
        assert m.bn.num_batches_tracked == 3
        results.append({**left(m), "x": leaf.grad})
    assert_same(results[1], results[0])


@pytest.mark.parametrize("what", ["statistics frozen", "frozen bn", "frozen stem", "head alone"])
def test_partly_frozen(what: str, device: str, generator: torch.Generator) -> None:
    """statistics frozen: BatchNorm in evaluation mode with its weight and bias trained."""
    plain, ours = networks(generator, device)
    data = batches(generator, 3, device)

    def prepare(model: Network) -> None:
        for name in ("stem", "depthwise", "wide", "deep"):
            block: Any = getattr(model, name)
            if what in ("statistics frozen", "frozen bn"):
                block.bn.eval()
                block.bn.requires_grad_(what == "statistics frozen")
            elif what == "head alone" or name == "stem":
                block.requires_grad_(False)

    for model in (plain, ours):
        prepare(model)
    mine = train(ours, data)
    assert_same(mine, train(plain, data))
    assert (f"gradient of {'stem'}.bn.weight" in mine) == (what == "statistics frozen")


def test_hooks_of_tensors_and_a_gradient_s_penalty(device: str, generator: torch.Generator) -> None:
    """A hook on a parameter, one after accumulation (an optimizer in backward), and a loss of a gradient's norm."""
    plain, ours = networks(generator, device)
    data = batches(generator, 2, device)
    results = []
    for model in (ours, plain):
        calls: list[str] = []
        for name, p in model.named_parameters():
            p.register_hook(lambda g, name=name, calls=calls: (calls.append(name), g * 2)[1])

            def update(p: Tensor) -> None:
                with torch.no_grad():
                    p.add_(p.grad, alpha=-0.01)

            p.register_post_accumulate_grad_hook(update)
        for x, target in data:
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            loss = loss_of(model(leaf), target)
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            (loss + gradient.square().sum()).backward()
        assert sorted(set(calls)) == sorted(name for name, _ in model.named_parameters())
        results.append(left(model))
    assert_same(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("context", ["save_on_cpu", "anomaly", "allow mutation"])
def test_hooks_of_saved_tensors(context: str, device: str, generator: torch.Generator) -> None:
    graph = torch.autograd.graph
    contexts: dict[str, Callable[[], Any]] = {
        "save_on_cpu": graph.save_on_cpu,
        "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
        "allow mutation": graph.allow_mutation_on_saved_tensors,
    }
    plain, ours = networks(generator, device)
    data = batches(generator, 2, device)

    def step(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return loss_of(model(x), target)

    with contexts[context]():
        mine = train(ours, data, step)
    assert_same(mine, train(plain, data, step))


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def autograd_in_graphs() -> Any:
    """Where torch.compile can have backward() in its graph, which it does not by default."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("torch.compile of this version breaks the graph at backward()")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield


def modes(model: Network, mode: str) -> None:
    if mode == "frozen bn":
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval().requires_grad_(False)
    else:
        model.train(mode == "train")


@pytest.mark.parametrize("mode", ["train", "eval", "frozen bn"])
def test_compiled_step(mode: str, device: str, generator: torch.Generator) -> None:
    """Forward and loss in one graph, backward called outside; other sizes of batches as well."""
    plain, ours = networks(generator, device)
    for model in (plain, ours):
        modes(model, mode)
    data = batches(generator, 3, device)
    data.append((data[0][0][:4], data[0][1][:4]))
    compiled = torch.compile(plain_step, fullgraph=True, backend="aot_eager")
    assert_same(train(ours, data, compiled), train(plain, data))


@pytest.mark.parametrize("mode", ["train", "eval", "frozen bn"])
def test_compiled_step_with_backward_in_the_graph(mode: str, device: str, generator: torch.Generator) -> None:
    plain, ours = networks(generator, device)
    for model in (plain, ours):
        modes(model, mode)

    def step(model: Network, x: Tensor, target: Tensor) -> Tensor:
        loss = loss_of(model(x), target)
        loss.backward()
        return loss.detach()

    (x, target), *_ = batches(generator, 1, device)
    with autograd_in_graphs():
        loss = torch.compile(step, fullgraph=True, backend="aot_eager")(ours, x, target)
    mine = left(ours)
    torch.testing.assert_close(loss, step(plain, x, target))
    assert_same(mine, left(plain))
    assert any(name.startswith("gradient of stem.conv") and mine[name].abs().max() > 0 for name in mine)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compiled_step_with_a_tensor_twice(train: bool, device: str, generator: torch.Generator) -> None:
    """The input is the residual, and BatchNorm's weight its bias: each has the sum of both gradients."""
    x = torch.randn(4, 8, 7, 6, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    w = torch.randn(8, 8, 3, 3, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    bn = [t.to(device) for t in random_bn(8, torch.float64, "cpu", generator)]
    g = bn[2].requires_grad_()

    def step(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        x = x * 2
        named = {"residual": x, "activation": "silu"}
        if train:
            y = fcb.conv_bn_scale_train(x, w, None, None, None, g, g, padding=1, **named)
            return y, fcb.bn_scale_train(x, None, None, g, g, **named)
        y = fcb.conv_bn_scale(x, w, None, bn[0], bn[1], g, g, padding=1, **named)
        return y, fcb.bn_scale(x, bn[0], bn[1], g, g, **named), fcb.scale_shift(x, g, g, **named)

    def gradients(step: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((y * y).sum() for y in step(x, w, g)), (x, w, g))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(gradients(compiled), gradients(step), strict=True):
        torch.testing.assert_close(mine, eager)


def test_compiled_autograd(device: str, generator: torch.Generator) -> None:
    """The backward pass captured at run time."""
    plain, ours = networks(generator, device)
    data = batches(generator, 2, device)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        mine = train(ours, data)
    assert_same(mine, train(plain, data))


def test_inductor_step(device: str, generator: torch.Generator) -> None:
    plain, ours = networks(generator, device)
    data = batches(generator, 2, device)
    assert_same(train(ours, data, torch.compile(plain_step, fullgraph=True)), train(plain, data))


def test_compiled_step_under_autocast(device: str, generator: torch.Generator) -> None:
    plain, ours = networks(generator, device, torch.float32)
    data = batches(generator, 2, device, torch.float32)

    def step(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return loss_of(model(x).float(), target)

    mine = train(ours, data, torch.compile(step, fullgraph=True, backend="aot_eager"))
    eager = train(plain, data, step)
    largest = {name: max(1.0, eager[name].abs().max().item()) for name in eager}
    for name in eager:
        assert mine[name].dtype == eager[name].dtype
        assert (mine[name] - eager[name]).abs().max() <= 0.05 * largest[name], name
