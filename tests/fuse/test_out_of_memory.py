"""Memory that runs out in the middle of a call: the error is PyTorch's, and the next call is as if there had been none.

Here an op fails that would allocate, each of a call's in turn. (What a GPU's allocator does: tests/ops/test_cuda_memory.py)
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stand_in import FakeSide, is_capturing, made
from test_graphed import Run, assert_follows, image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_conv_bn as fcb
from common import random_bn
from fused_conv_bn import (
    _block,
    _conv,
    _conv_mean,
    _gated,
    _joined,
    _memory,
    _pooling,
    _sync,
    _together,
    autograd,
    graphs,
    ops,
)
from fused_conv_bn._fuse import blocks, channels_last, gates, pools
from fused_conv_bn._graphs import with_backward
from fused_conv_bn._graphs.recording import Results, Static
from small_network import Network, random_statistics
from test_two_gpus import CALLS, assert_near, tensors

MESSAGE = "CUDA out of memory. Tried to allocate 20.00 MiB."


class RunsOut(TorchDispatchMode):
    """The ``at``-th op that has a new tensor for its result has no memory for it, and ``lasting``: nor those behind it."""

    def __init__(self, at: int, lasting: bool = False) -> None:
        super().__init__()
        self.at, self.lasting, self.count = at, lasting, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(r.alias_info is None for r in func._schema.returns):
            self.count += 1
            if self.count == self.at + 1 or (self.lasting and self.count > self.at):
                raise torch.OutOfMemoryError(MESSAGE)
        return func(*args, **(kwargs or {}))


def outcome(at: int, lasting: bool, call: Callable[[], Any]) -> tuple[bool, Any]:
    """Of a call with an op that fails: whether it has no such op any more, and its result, if it has one."""
    mode, result = RunsOut(at, lasting), None
    try:
        with mode:
            result = call()
    except torch.OutOfMemoryError as error:
        assert str(error) == MESSAGE
    return mode.count <= at, result


class Ours(TorchDispatchMode):
    """How many of this package's ops run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "fused_conv_bn"
        return func(*args, **(kwargs or {}))


def ours_in(model: nn.Module, x: Tensor) -> int:
    with Ours() as ours:
        model(x)
    return ours.count


def state_of(m: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in m.state_dict().items()}


def assert_state(m: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, t in m.state_dict().items():
        assert torch.equal(t, expected[name]), name


def assert_close(got: Tensor, expected: Tensor, where: Any) -> None:
    atol = 1e-5 * float(expected.detach().abs().max())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=atol, msg=lambda m: f"{where}: {m}")


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the groups that are CUDA's alone, and channels_last inside."""
    monkeypatch.setattr(channels_last, "DEVICES", {"cpu", "cuda"})
    monkeypatch.setattr(channels_last, "pays", lambda seen: True)
    monkeypatch.setattr(pools, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(gates, "DEVICES", ("cpu", "cuda"))


ONCE, FROM_THERE_ON = False, True


@pytest.mark.parametrize(
    ("way", "lasting"),
    [("fused", ONCE), ("fused", FROM_THERE_ON), ("as on CUDA", ONCE), ("frozen", FROM_THERE_ON)],
    ids=["fused, once", "fused, from there on", "as on CUDA, once", "frozen, from there on"],
)
@torch.no_grad()
def test_a_first_call(way: str, lasting: bool, request: pytest.FixtureRequest, generator: torch.Generator) -> None:
    """It compares, which takes more memory than the model itself. The next one does so again, and all is fused."""
    if way == "as on CUDA":
        request.getfixturevalue("as_on_cuda")
    plain = random_statistics(Network(), generator)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    expected, state, random_state = plain(x), state_of(plain), torch.get_rng_state()

    def fused() -> nn.Module:
        return fcb.fuse(copy.deepcopy(plain), freeze=way == "frozen")

    whole = fused()
    whole(x)
    most = ours_in(whole, x)
    assert whole.conv.weight.is_contiguous() is (way != "as on CUDA")
    for at in itertools.count(0, 2):
        model = fused()
        enough, y = outcome(at, lasting, lambda model=model: model(x))
        assert torch.equal(torch.get_rng_state(), random_state)
        assert_state(model, state)
        for result in (y, model(x), model(x)):
            if result is not None:
                assert_close(result, expected, at)
        assert_state(model, state)
        # Of a snapshot a chain that could not be made is not made again.
        assert ours_in(model, x) == most or (way == "frozen" and ours_in(model, x)), f"{at}: {fcb.report(model)}"
        fcb.unfuse(model)
        assert all(p.is_contiguous() for p in model.parameters()), at
        if enough:
            break
    assert at > 50


@pytest.mark.parametrize("lasting", [ONCE, FROM_THERE_ON], ids=["once", "from there on"])
@torch.no_grad()
def test_statistics_that_a_first_call_updates(lasting: bool, generator: torch.Generator) -> None:
    """Of a BatchNorm in training mode in a model that is not: once, or in a call that fails before it not at all."""
    plain = random_statistics(Network(), generator)
    plain.bn.train()
    x = torch.randn(2, 3, 16, 16, generator=generator)
    before, other = state_of(plain), copy.deepcopy(plain)
    other(x)
    after = other.state_dict()
    for at in itertools.count():
        model = fcb.fuse(copy.deepcopy(plain))
        enough, y = outcome(at, lasting, lambda model=model: model(x))
        updates = int(model.bn.num_batches_tracked)
        assert updates in (0, 1) and (updates == 1 or y is None)
        for name, t in model.state_dict().items():
            assert_close(t, (before, after)[updates][name], f"{at}: {name}")
        if enough:
            break
    assert at > 50


class Broadcast(nn.Module):
    """Adds what is of another shape, so that its first call is captured twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.last, self.last_bn = nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return torch.relu(self.last_bn(self.last(y)) + y.mean((2, 3), keepdim=True)).sigmoid()


@pytest.mark.parametrize("lasting", [ONCE, FROM_THERE_ON], ids=["once", "from there on"])
@pytest.mark.parametrize("refused", [False, True], ids=["captured twice", "refused"])
@torch.no_grad()
def test_statistics_behind_a_comparison(
    refused: bool, lasting: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """The call that follows the comparison is no part of it: where that fails nothing runs in its place."""
    plain = random_statistics(Broadcast(), generator)
    plain.bn.train()
    x = torch.randn(2, 3, 16, 16, generator=generator)
    if refused:
        monkeypatch.setattr(blocks.ConvNormBlock, "plain", lambda *_: x)
    most = 0
    for at in itertools.count():
        model = fcb.fuse(copy.deepcopy(plain))
        enough, y = outcome(at, lasting, lambda model=model: model(x))
        updates = int(model.bn.num_batches_tracked)
        assert updates in (0, 1) and (updates == 1 or y is None), at
        most += y is None
        if enough:
            break
    assert at > 50 and most > 0


@torch.no_grad()
def test_a_first_call_whose_comparison_never_fits(generator: torch.Generator) -> None:
    """The model's own forward does. It is not compared again and again, and the report says why."""
    model = fcb.fuse(random_statistics(Network(), generator))
    x = torch.randn(2, 3, 16, 16, generator=generator)
    expected = fcb.unfuse(copy.deepcopy(model))(x)
    counts = []
    for _ in range(5):
        with RunsOut(50) as mode:
            assert_close(model(x), expected, "not compared")
        counts.append(mode.count)
    assert min(counts[:3]) > 50 > max(counts[3:])
    assert "there was not enough memory to compare it, in 3 calls" in str(fcb.report(model))


@pytest.mark.parametrize(
    ("message", "is_compared_again"),
    [
        ("fused_conv_bn: PyTorch could not allocate memory for the result; its own message is on stderr", True),
        ("GET was unable to find an engine to execute this computation", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503599627370496 bytes.", True),
        ("the op is wrong", False),
    ],
)
@torch.no_grad()
def test_other_words_for_it(
    message: str, is_compared_again: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    model = fcb.fuse(random_statistics(Network(), generator))
    x = torch.randn(2, 3, 16, 16, generator=generator)
    expected = fcb.unfuse(copy.deepcopy(model))(x)

    def fails(*args: Any) -> None:
        raise RuntimeError(message)

    with monkeypatch.context() as patch:
        patch.setattr(blocks.ConvNormBlock, "plain", fails)
        assert_close(model(x), expected, message)
    assert_close(model(x), expected, message)
    assert (ours_in(model, x) > 0) is is_compared_again


@pytest.mark.parametrize("lasting", [ONCE, FROM_THERE_ON], ids=["once", "from there on"])
@torch.no_grad()
def test_later_calls(lasting: bool, generator: torch.Generator) -> None:
    model = random_statistics(Network(), generator)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    expected = model(x)
    fcb.fuse(model, x)
    most, state = ours_in(model, x), state_of(model)
    for at in itertools.count():
        enough, y = outcome(at, lasting, lambda: model(x))
        for result in (y, model(x)):
            if result is not None:
                assert_close(result, expected, at)
        assert_state(model, state)
        assert ours_in(model, x) == most
        if enough:
            break
    assert at >= most


# ---- training --------------------------------------------------------------------------------------------------------


class Trained(nn.Module):
    """Each kind of group in training mode, and a module of this package's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.conv, self.second = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16, momentum=None)
        self.alone = nn.BatchNorm2d(16)
        self.block = fcb.ConvBnScale2d(16, 8, 3, 1.5, bias=False, activation="gelu", residual_last=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(self.stem(x)))
        y = F.silu(self.second(self.conv(x)) + x)
        y = F.gelu(self.alone(x * torch.sigmoid(y)) + x)
        return self.block(y, self.block(x))


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Its result, its gradients and its state behind it."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "gradient of x": x.grad, **gradients, **state_of(model)}


@pytest.mark.parametrize("lasting", [ONCE, FROM_THERE_ON], ids=["once", "from there on"])
def test_a_training_step(lasting: bool, generator: torch.Generator) -> None:
    """What is counted of batches is what the running statistics have of them."""
    torch.manual_seed(4)
    plain = Trained()
    before = state_of(plain)
    x = torch.randn(4, 3, 12, 12, generator=generator)
    norms = [name for name, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)]
    fused = fcb.fuse(copy.deepcopy(plain))
    step(fused, x)
    with Ours() as most:
        step(fused, x)
    assert most.count >= 8
    for at in itertools.count():
        model = fcb.fuse(copy.deepcopy(plain))
        enough, done = outcome(at, lasting, lambda model=model: step(model, x))
        state = state_of(model)
        for norm in norms:
            counted = int(state[f"{norm}.num_batches_tracked"])
            updated = not torch.equal(state[f"{norm}.running_mean"], before[f"{norm}.running_mean"])
            assert (counted > 0) is updated and counted <= 1 + norm.startswith("block"), f"{at}: {norm}"
        other = copy.deepcopy(plain)
        other.load_state_dict(before if done is not None else state)
        expected = step(other, x)
        done = step(model, x) if done is None else done
        assert done.keys() == expected.keys()
        for name, t in expected.items():
            assert_close(done[name], t, f"{at}: {name}")
        with Ours() as found:
            step(model, x)
        assert found.count == most.count, at
        if enough:
            break
    assert at > 30


@pytest.mark.parametrize("lasting", [ONCE, FROM_THERE_ON], ids=["once", "from there on"])
def test_statistics_of_several_processes(lasting: bool, generator: torch.Generator, monkeypatch: Any) -> None:
    """A call that fails has updated neither of them."""

    def of_one(z: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.ops.fused_conv_bn.bn_moments(z).unbind(0))

    monkeypatch.setattr(_sync, "gather_moments", of_one)
    z = torch.randn(4, 6, 5, 5, generator=generator)
    bn = random_bn(6, torch.float32, "cpu", generator)
    for at in itertools.count():
        mean, var, weight, bias = (t.clone() for t in bn)
        z.requires_grad_()
        arguments = z, (mean, var, weight, bias, 1.5, 0.3, 1e-5), (None, "silu", 0.01, False), None
        enough, y = outcome(at, lasting, lambda arguments=arguments: _sync.bn_scale_train(*arguments))
        assert torch.equal(mean, bn[0]) is torch.equal(var, bn[1]) is (y is None)
        if enough:
            break
    assert at > 8


# ---- what the ops say of it ------------------------------------------------------------------------------------------

NO_MEMORY = "fused_conv_bn: PyTorch could not allocate memory for the result; its own message is on stderr"
NO_CONVOLUTION = "fused_conv_bn: PyTorch could not run its convolution; its own message is on stderr"


@pytest.mark.parametrize("message", [NO_MEMORY, NO_CONVOLUTION])
@pytest.mark.parametrize("form", ["a module", "any call", "fused", "a BatchNorm"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_error_of_a_module_is_pytorchs(
    training: bool, form: str, message: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """An op has no class for it. PyTorch's ops run in its place: they say it, or have enough."""

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(message)

    factor: Any = torch.tensor(1.5) if form == "any call" else 1.5
    m: nn.Module = fcb.ConvBnScale2d(4, 6, 3, factor, activation="relu")
    if form in ("fused", "a BatchNorm"):
        m = nn.Sequential(
            *([m.conv] if form == "fused" else []), nn.BatchNorm2d(6 if form == "fused" else 4), nn.ReLU()
        )
    m.train(training)
    x = torch.randn(2, 4, 6, 6, generator=generator)
    plain = copy.deepcopy(m)
    if form in ("fused", "a BatchNorm"):
        fcb.fuse(m)
        m(x)  # captures, and compares in evaluation
        m.load_state_dict(plain.state_dict())
    before = state_of(m)
    for of, name in ((_block, "_eval_call"), (_block, "_train_call"), (_block, "_conv_op"), (blocks, "_conv_bn")):
        monkeypatch.setattr(of, name, fails)
    for name in ("bn_scale", "bn_scale_train"):
        monkeypatch.setattr(ops, name, fails)
        monkeypatch.setattr(autograd, name, fails)
    monkeypatch.setattr(blocks, "_bn", fails)
    with RunsOut(0, FROM_THERE_ON), pytest.raises(torch.OutOfMemoryError):
        m(x)
    if not training:
        assert_state(m, before)
    m.load_state_dict(before)
    with Ours() as ours:
        y = m(x)
    assert ours.count == 0
    expected = plain.bn(plain.conv(x)).mul(1.5).relu() if "bn" in plain._modules else plain(x)
    assert_close(y, expected, form)
    for (name, a), b in zip(m.state_dict().items(), plain.state_dict().values(), strict=True):
        assert_close(a, b, name)


FUNCTIONS = [name for name in CALLS if name not in ("fold_bn", "bn_scale, out", "bn_scale_", "scale_shift_")]


@pytest.mark.parametrize("message", [NO_MEMORY, NO_CONVOLUTION])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_error_of_a_function_is_pytorchs(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where PyTorch's ops have enough, the result and the statistics are those of one call."""

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(message)

    class Ops:
        def __getattr__(self, name: str) -> Any:
            return SimpleNamespace(default=fails)

    names, call = CALLS[name]
    given = tensors()
    expected = call(*(given[n] for n in names))
    for of in (ops, _joined, _pooling):
        monkeypatch.setattr(of, "_ops", Ops())
    for of in (_conv_mean, _gated):
        monkeypatch.setattr(of, "_op", fails)
    for function in ("bn_scale", "scale_shift", "bn_scale_train"):
        monkeypatch.setattr(autograd, function, fails)
    with Ours() as ours:
        got = call(*(given[n] for n in names))
    assert ours.count == 0
    assert_near(got, expected, "cpu")
    with pytest.raises(torch.OutOfMemoryError), RunsOut(0, FROM_THERE_ON):
        call(*(given[n] for n in names))


def test_other_errors_of_a_function_are_its_own() -> None:
    with pytest.raises(RuntimeError, match="^bn_scale: running_mean has shape"):
        fcb.bn_scale(torch.ones(2, 3, 4, 4), torch.ones(4), torch.ones(4))
    with pytest.raises(RuntimeError, match="^gate: gate has shape"):
        fcb.gate(torch.ones(2, 3, 4, 4), torch.ones(4))


def test_the_error_of_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's, for memory of a GPU alone."""
    assert _memory.out_of_memory(RuntimeError(NO_MEMORY), torch.ones(1)) is None
    assert _memory.out_of_memory(RuntimeError(NO_MEMORY), None) is None

    class OnCuda:
        is_cuda = True

    assert _memory.out_of_memory(RuntimeError(NO_CONVOLUTION), OnCuda()) is None  # type: ignore[arg-type]
    found = _memory.out_of_memory(RuntimeError(NO_MEMORY), OnCuda())  # type: ignore[arg-type]
    assert type(found) is torch.OutOfMemoryError and str(found) == f"CUDA out of memory. {NO_MEMORY}"

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(NO_MEMORY)

    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    bn = torch.zeros(4), torch.ones(4)
    y = fcb.bn_scale(x, *bn).sum()
    monkeypatch.setattr(autograd, "bn_scale_backward", fails)
    monkeypatch.setattr(autograd, "out_of_memory", lambda error, of: _memory.out_of_memory(error, OnCuda()))
    with pytest.raises(torch.OutOfMemoryError):
        y.backward()


def test_a_convolution_that_is_computed_again(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(NO_CONVOLUTION)

    x, w = torch.randn(2, 4, 6, 6, generator=generator), torch.randn(6, 4, 3, 3, generator=generator)
    monkeypatch.setattr(_conv, "_conv_scale_shift", fails)
    y = _conv.convolution_again(x, w, ((2,), (1,), (1,), 1), False)
    assert_close(y, F.conv2d(x, w, None, 2, 1), "again")


# ---- graphs ----------------------------------------------------------------------------------------------------------


def fails_once(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """In its ``at``-th call, from 0 on."""
    count = itertools.count()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(count) == at:
            raise torch.OutOfMemoryError(MESSAGE)
        return function(*args, **kwargs)

    return failing


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("what", ["the forward", "memory for arguments"])
@torch.no_grad()
def test_a_first_call_of_a_graph(what: str, at: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the three warm-ups and in the capture, or what they read. No graph is kept, and the next call captures one."""
    if what == "the forward":
        model = Run(fails_once(lambda m, x: m.b(m.c(x)), at)).to(device)
    else:
        model = Run(lambda m, x: m.b(m.c(x))).to(device)
        monkeypatch.setattr(Static, "__init__", fails_once(Static.__init__, at))
    fast = made(model, device)
    x = image(device)
    with pytest.raises(torch.OutOfMemoryError):
        fast(x)
    assert fast.graphs == 0 and not is_capturing(device) and torch.is_autocast_cache_enabled()
    for _ in range(2):
        assert_follows(fast, model, x)
    assert fast.graphs == 1


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("what", ["the forward", "a backward", "memory for arguments"])
def test_a_first_step_of_a_graph(what: str, at: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where gradients are needed: neither parameters nor statistics have changed."""
    model = Run(lambda m, x: m.b(m.c(x))).to(device).train()
    plain, before, x = copy.deepcopy(model), state_of(model), image(device)
    if what == "the forward":
        model.run = fails_once(model.run, at)
    elif what == "a backward":
        of, nth = (graphs, at) if at < 3 else (with_backward, 0)
        monkeypatch.setattr(of, "differentiate", fails_once(of.differentiate, nth))
    else:
        monkeypatch.setattr(Static, "__init__", fails_once(Static.__init__, at))
    fast = made(model, device)
    with pytest.raises(torch.OutOfMemoryError):
        fast(x)
    assert fast.graphs == 0 and not is_capturing(device) and torch.is_autocast_cache_enabled()
    assert_state(model, before)
    assert all(p.grad is None for p in model.parameters())
    for got, theirs in zip(step(model, x).items(), step(plain, x).items(), strict=True):
        assert got[0] == theirs[0]
        assert_close(got[1], theirs[1], got[0])
    for _ in range(2):
        for m in (fast, plain):
            m.zero_grad(set_to_none=True)
            m(x).square().mean().backward()
        for (name, p), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(
                p.grad, other.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )
        for (name, b), other in zip(model.named_buffers(), plain.buffers(), strict=True):
            assert_close(b, other, name)
    assert fast.graphs == 1


def test_casts_of_a_capture() -> None:
    """Where they have no memory, later batches are counted as ever."""
    w, batches = torch.randn(4, 4, 3, 3), torch.zeros((), dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(torch.OutOfMemoryError), RunsOut(0):
        with _together.together([w]):
            pass
    assert _together.cast_weight(w) is w
    _together.count(batches)
    assert batches == 1


@torch.no_grad()
def test_a_replay_without_memory_for_its_results(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph stays. The next replay waits for this one all the same."""
    model = Run(lambda m, x: m.b(m.c(x))).to(device)
    fast = made(model, device)
    for x in (image(device), image(device), image(device, 3)):
        with monkeypatch.context() as patch:
            patch.setattr(Results, "take", fails_once(Results.take, 0))
            with pytest.raises(torch.OutOfMemoryError):
                fast(x)
        assert_follows(fast, model, x)
    assert fast.graphs == 2
    if device == "cpu":
        log = FakeSide.made[-1].log
        assert log.count("begin") == log.count("end") == 6
