"""graphed(model) where gradients are needed: results, gradients, statistics and random numbers are eager's to the bit. On
the CPU a stand-in takes the place of CUDA's graphs; on CUDA the same tests run real ones."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stand_in import made
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn import _together, autograd


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's gradients add up in one order, and by one algorithm."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


class Net(nn.Module):
    """Two groups, a residual, dropout, and a parameter that no result depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head, self.drop = nn.Linear(8, 5), nn.Dropout(0.25)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.b1(self.c1(x)))
        y = F.relu(self.b2(self.c2(y)) + y)
        return self.head(self.drop(y.mean((2, 3))))


class Run(nn.Module):
    """A layer, and what a test makes of it."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.other = nn.Linear(8, 2)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def image(device: str, n: int = 4, size: int = 10) -> Tensor:
    return torch.randn(n, 3, size, size).to(device)


def pair(model: nn.Module, device: str, fused: bool = False, **options: Any) -> tuple[Any, nn.Module]:
    """The same model twice, one of them graphed."""
    torch.manual_seed(0)
    theirs = model.to(device)
    mine = copy.deepcopy(theirs)
    if fused:
        fcb.fuse(mine), fcb.fuse(theirs)
    return made(mine, device, **options), theirs


def assert_same(fast: Any, model: nn.Module) -> None:
    """Gradients, whether there are any, and buffers."""
    for (name, mine), theirs in zip(fast.named_parameters(), model.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            assert torch.equal(mine.grad, theirs.grad) and mine.grad.stride() == theirs.grad.stride(), name
    for (name, mine), theirs in zip(fast.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_steps_are_eagers(fused: bool, device: str, deterministic: None) -> None:
    """An optimizer's steps, with an epoch of evaluation between two of training: parameters stay eager's to the bit."""
    fast, model = pair(Net(), device, fused)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (fast, model)]
    data = [(image(device), torch.randint(0, 5, (4,), device=device)) for _ in range(4)]
    losses: list[list[float]] = [[], []]
    for m, optimizer, of in zip((fast, model), optimizers, losses, strict=True):
        torch.manual_seed(3)
        for _ in range(2):
            m.train()
            for x, target in data:
                optimizer.zero_grad()
                loss = F.cross_entropy(m(x), target)
                loss.backward()
                optimizer.step()
                of.append(loss.item())
            m.eval()
            with torch.no_grad():
                of.extend(F.cross_entropy(m(x), target).item() for x, target in data)
    assert losses[0] == losses[1]
    assert_same(fast, model)
    for mine, theirs in zip(fast.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert fast.graphs == 2  # not one for each epoch


def test_gradients_add_up_and_are_nobody_elses(device: str, deterministic: None) -> None:
    fast, model = pair(Net(), device)
    kept = []
    for step in range(4):
        x = image(device)
        for m in (fast, model):
            torch.manual_seed(step)
            m(x).square().sum().backward()
        assert_same(fast, model)
        if step == 1:
            before = [p.grad for p in fast.parameters() if p.grad is not None]
            kept = [(g, g.clone()) for g in before]
            fast.zero_grad(), model.zero_grad()
    assert kept and all(torch.equal(g, was) for g, was in kept)
    assert fast.graphs == 1


def test_an_arguments_gradient(device: str, deterministic: None) -> None:
    """In the midst of a larger model, and of the same tensor twice."""
    fast, model = pair(Run(lambda m, x, y: m.b(m.c(x * y + y))), device)
    first = nn.Conv2d(3, 3, 1).to(device)
    for same in (False, True):
        for _ in range(2):
            x, y = image(device), image(device)
            found = []
            for m in (fast, model):
                first.zero_grad()
                a = first(x)
                b = a if same else y.clone().requires_grad_()
                m(a, b).square().mean().backward()
                found.append([first.weight.grad.clone(), *([] if same else [b.grad])])
            for mine, theirs in zip(*found, strict=True):
                assert torch.equal(mine, theirs)
            assert_same(fast, model)
    assert fast.graphs == 2
    with torch.no_grad():  # another kind
        assert torch.equal(fast(x, y), model(x, y)) and fast.graphs == 3
    model.requires_grad_(False), fast.requires_grad_(False)
    for m in (fast, model):
        m.zero_grad()
    for _ in range(2):
        a, b = image(device).requires_grad_(), image(device)
        gradients = [torch.autograd.grad(m(a, b).square().sum(), a)[0] for m in (fast, model)]
        assert torch.equal(*gradients)
        for m in (fast, model):
            assert not m(a.detach(), b).requires_grad
    assert_same(fast, model)


def test_results_that_a_loss_leaves_out(device: str, deterministic: None) -> None:
    """What nothing flows to has no gradient, rather than zeros: an optimizer would decay it."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.b(m.c(x))
        return {"out": y, "extra": m.other(y.mean((2, 3))), "n": y.detach() + 1, "shape": 3}

    fast, model = pair(Run(run), device)
    for names in (("out", "extra"), ("out",), ("extra",), ("out", "extra")):
        x = image(device)
        for m in (fast, model):
            m.zero_grad()
            result = m(x)
            assert not result["n"].requires_grad and result["shape"] == 3
            sum(result[name].square().sum() for name in names).backward()
        assert (fast.other.weight.grad is None) == ("extra" not in names)
        assert_same(fast, model)
    assert fast.graphs == 1


def test_other_calls_before_backward(device: str, deterministic: None) -> None:
    """Other kinds of calls between forward and backward have other memory; graphs that are freed wait for backward."""
    for clear in (False, True):
        fast, model = pair(Net(), device, max_graphs=2)
        fast.drop.p = model.drop.p = 0.0
        for _ in range(3):
            x, small = image(device), image(device, 2)
            for m in (fast, model):
                m.zero_grad()
                a = m(x)
                b = m(small)
                m.eval()
                with torch.no_grad():
                    m(small)
                m.train()
                if clear and m is fast:
                    fast.clear()
                b.sum().backward()
                a.square().sum().backward()
            assert_same(fast, model)


def test_autocast_and_a_scaler(device: str, deterministic: None) -> None:
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    fast, model = pair(Net(), device, fused=True)
    for step in range(3):
        x = image(device)
        for m in (fast, model):
            m.zero_grad()
            torch.manual_seed(step)
            with torch.autocast(device, dtype):
                loss = m(x).float().square().mean()
            (loss * 64).backward()
            with torch.no_grad():
                for p in m.parameters():
                    p.sub_(0 if p.grad is None else p.grad / 64)
        assert_same(fast, model)
    assert fast.graphs == 1


@pytest.mark.parametrize("cache", [True, False])
def test_weights_are_cast_and_batches_counted_together(
    cache: bool, device: str, deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A BatchNorm that is called twice counts twice; a weight that is used twice has one gradient, of 16 bits with
    autocast's cache, and without it two, that add up in float32."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c0, self.b0 = nn.Conv2d(3, 24, 1, bias=False), nn.BatchNorm2d(24)
            self.c, self.b = nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.b0(self.c0(x)))
            return F.relu(self.b(self.c(F.relu(self.b(self.c(y))))))

    fast, model = pair(Twice(), device, fused=True)
    taken: list[tuple[Tensor, Tensor]] = []

    def cast_weight(weight: Tensor) -> Tensor:
        taken.append((weight, _together.cast_weight(weight)))
        return taken[-1][1]

    monkeypatch.setattr(autograd, "cast_weight", cast_weight)
    for _ in range(3):
        x = image(device)
        for m in (fast, model):
            m.zero_grad()
            with torch.autocast(device, torch.bfloat16, cache_enabled=cache):
                y = m(x)
            y.float().square().sum().backward()
        assert_same(fast, model)
    assert fast.b.num_batches_tracked == 6 and fast.b0.num_batches_tracked == 3
    cast = [(of, c) for of, c in taken if c is not of]
    assert cast and all(c.dtype is torch.bfloat16 for _, c in cast)
    if cache:
        assert len({id(of) for of, _ in cast[:3]}) == 2 and cast[1][1] is cast[2][1]
    else:
        assert all(of.shape == fast.c0.weight.shape for of, _ in cast)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_statistics_count_as_changed(fused: bool, device: str) -> None:
    """PyTorch counts what a replay writes, where it counts what the model writes."""
    fast, model = pair(Net(), device, fused)
    for grad in (True, True, True, False, False):
        counted = []
        for m in (fast, model):
            before = [b._version for b in m.buffers()]
            with torch.set_grad_enabled(grad):
                m(image(device))
            counted.append([b._version > was for b, was in zip(m.buffers(), before, strict=True)])
        assert counted[0] == counted[1] and any(counted[1])


def test_frozen_parameters_are_another_kind(device: str, deterministic: None) -> None:
    fast, model = pair(Net(), device)
    for frozen in (False, True, False):
        for m in (fast, model):
            m.c1.requires_grad_(not frozen)
        for _ in range(2):
            x = image(device)
            for m in (fast, model):
                m.zero_grad()
                torch.manual_seed(1)
                m(x).square().sum().backward()
            assert (fast.c1.weight.grad is None) == frozen
            assert_same(fast, model)
    assert fast.graphs == 2


def test_hooks_for_gradients_are_called(device: str, deterministic: None) -> None:
    fast, model = pair(Net(), device)
    seen: list[Any] = []
    for m in (fast, model):
        m(image(device)).sum().backward()  # a graph is there
        m.zero_grad()
    for m in (fast, model):
        m.b1.weight.register_hook(lambda g: seen.append("parameter") or g * 2)
        m.c2.register_full_backward_hook(lambda *_: seen.append("module"))
        m.head.weight.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated"))
    with pytest.warns(UserWarning, match="^graphed: a module of the model has a forward hook, or one for gradients"):
        fast(image(device))
    x = image(device)
    called = []
    for m in (fast, model):
        seen.clear()
        for b, of_model in zip(m.buffers(), model.buffers(), strict=True):
            b.copy_(of_model)
        torch.manual_seed(2)
        m(x).square().sum().backward()
        called.append(sorted(seen))
    assert called[0] == called[1] == ["accumulated", "module", "parameter"]
    for mine, theirs in zip(fast.parameters(), model.parameters(), strict=True):
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


def test_hooks_behind_the_gradient_need_no_plain_call(device: str) -> None:
    """DistributedDataParallel's and those of optimizers that step in backward."""
    fast, _ = pair(Net(), device)
    seen: list[str] = []
    fast.head.weight.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated"))
    for _ in range(3):
        fast(image(device)).sum().backward()
    assert len(seen) == 3 and fast.graphs == 1


def test_who_watches_backward_sees_the_model(device: str) -> None:
    fast, _ = pair(Net(), device)
    fast(image(device)).sum().backward()
    seen: list[Tensor] = []
    with (
        warnings.catch_warnings(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t),
    ):
        warnings.simplefilter("error")
        fast(image(device)).sum().backward()
    assert len(seen) > 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="returned nan values"):
            fast(image(device) * float("nan")).sum().backward()


def test_what_backward_refuses(device: str) -> None:
    fast, _ = pair(Net(), device)
    fast(image(device)).sum().backward()
    y = fast(image(device))
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="^graphed: a second backward of one call, expected one: the first has"):
        y.sum().backward()
    y = fast(image(device))
    with torch.no_grad():
        fast.c1.weight.mul_(2)
    with pytest.raises(
        RuntimeError, match="^graphed: a parameter was changed in place between a call and its backward"
    ):
        y.sum().backward()
    y = fast(image(device))
    (first,) = torch.autograd.grad(y.square().sum(), fast.head.bias, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    fast(image(device)).sum().backward()  # and goes on
    assert fast.graphs == 1


def test_tensors_that_are_nobodys_are_refused(device: str) -> None:
    own = torch.zeros(1, device=device, requires_grad=True)
    fast, _ = pair(Run(lambda m, x: m.c(x) + own), device)
    for flag in (True, False):
        fast.requires_grad_(flag)
        with pytest.raises(
            RuntimeError,
            match="^graphed: the forward of Run uses a tensor that requires a gradient and is neither a parameter nor an "
            "argument, expected none",
        ):
            fast(image(device))
        assert fast.graphs == 0
    with torch.no_grad():
        assert fast(image(device)).shape == (4, 8, 10, 10)


def test_a_backward_that_cannot_be_captured(device: str) -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            if broken and fast._graphs.is_capturing():
                raise ValueError("not now\nand more")
            return g

    broken = True
    fast, model = pair(Run(lambda m, x: m.c(Reads.apply(m.c.weight.sum() + x))), device)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"^graphed: the backward of Run cannot be captured: ValueError: not now$"
        ) as caught:
            fast(image(device))
        assert isinstance(caught.value.__cause__, ValueError) and fast.graphs == 0
    broken = False
    x = image(device)
    for m in (fast, model):
        m(x).sum().backward()
    assert_same(fast, model)


def test_distributed_data_parallel(device: str, deterministic: None, tmp_path: Path) -> None:
    """Around the graphs it sends gradients; in them nothing would."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        fast, model = pair(Net(), device, fused=True)
        sent: list[int] = []
        both = [nn.parallel.DistributedDataParallel(m, find_unused_parameters=True) for m in (fast, model)]
        for m in both:
            m.register_comm_hook(None, lambda _, bucket: sent.append(1) or done(bucket.buffer()))
        for step in range(3):
            x = image(device)
            counts = []
            for m in both:
                sent.clear()
                m.zero_grad()
                torch.manual_seed(step)
                m(x).square().sum().backward()
                counts.append(len(sent))
            assert counts[0] == counts[1] > 0
            assert_same(fast, model)
        assert fast.graphs == 1
        inside = made(both[1], device)
        with pytest.raises(
            TypeError, match="^graphed: the model has a DistributedDataParallel in it, expected it around"
        ):
            inside(image(device))
        with torch.no_grad():
            inside.eval()(image(device))
    finally:
        dist.destroy_process_group()


def done(value: Tensor) -> Any:
    future: Any = torch.futures.Future()
    future.set_result(value)
    return future


def test_results_without_copies(device: str, deterministic: None) -> None:
    fast, model = pair(Net(), device, clone_outputs=False)
    for step in range(3):
        x = image(device)
        for m in (fast, model):
            m.zero_grad()
            torch.manual_seed(step)
            m(x).square().sum().backward()
        assert_same(fast, model)


def test_a_thread_of_its_own_for_backward(device: str, deterministic: None) -> None:
    fast, model = pair(Net(), device)
    fast.drop.p = model.drop.p = 0.0
    x = image(device)
    for m in (fast, model):
        for _ in range(2):
            m.zero_grad()
            loss = m(x).square().sum()
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
    assert_same(fast, model)
