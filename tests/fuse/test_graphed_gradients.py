"""graphed(model) in training, where models and loops are less plain: gradients are eager's, or a sentence says why not."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stand_in import made
from test_graphed_training import Run, assert_same, image, pair
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import fused_conv_bn as fcb


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        y, (h, c) = self.rnn(x)
        return self.head(y[:, -1]), (h, c)


def test_recurrent_layers(device: str) -> None:
    """They have a list of their weights besides the parameters."""
    fast, model = pair(Recurrent(), device)
    kept = fast.rnn._flat_weights
    for step in range(4):
        x = torch.randn(4, 5, 8, device=device)
        for m in (fast, model):
            m.zero_grad()
            m(x)[0].square().sum().backward()
            with torch.no_grad():
                for p in m.parameters():
                    p.sub_(p.grad, alpha=0.1)
        for mine, theirs in zip(fast.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x))
        assert fast.graphs == 2 and fast.rnn._flat_weights is kept, step
    assert all(w is p for w, p in zip(kept, fast.rnn.parameters(), strict=True))


class Heads(nn.Module):
    """Three, one of which is out of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = (fcb.ConvBnScale2d(16, 16, 3, activation="relu") for _ in range(4))

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.stem(x)
        with torch.autocast(x.device.type, enabled=False):
            z = self.c(y.float())
        return [self.a(y), self.b(y), z]


def test_heads_under_autocast(device: str) -> None:
    """Weights are cast at once. Still those of a head that the loss leaves out have no gradients, rather than zeros."""
    fast, model = pair(Heads(), device)
    for step in range(6):
        x = torch.randn(4, 16, 20, 20, device=device)
        for m in (fast, model):
            m.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                results = m(x)
            results[step % 3].float().square().mean().backward()
        assert [h.conv.weight.grad is None for h in (fast.a, fast.b, fast.c)].count(True) == 2
        assert_same(fast, model)
    assert fast.graphs == 1


def test_what_comes_from_another_call(device: str) -> None:
    """Neither a parameter nor an argument: refused before its own backward runs, which waits for the call."""
    fast, _ = pair(Run(lambda m, x: m.c(x) + kept[0]), device)
    kept = [torch.zeros(1, device=device)]
    kept[0] = fast(image(device)).mean()
    with pytest.raises(
        RuntimeError, match="^graphed: the forward of Run uses a tensor that requires a gradient and is ne"
    ):
        fast(image(device, 2))
    kept[0].backward()
    assert fast.c.weight.grad is not None and fast.graphs == 1


def test_a_recording_needs_no_thread_of_autograds(device: str) -> None:
    """That may be in the backward of a call which waits for the recording."""
    threads: list[tuple[int, bool]] = []

    class Tells(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            threads.append((threading.get_ident(), torch._C._is_multithreading_enabled()))
            return g

    fast, _ = pair(Run(lambda m, x: Tells.apply(m.c(x))), device)
    y = fast(image(device))
    assert len(threads) >= 4 and {*threads} == {(threading.get_ident(), False)}
    assert torch._C._is_multithreading_enabled()
    y.sum().backward()


def test_a_backward_that_a_warm_up_stops_at(device: str) -> None:
    fast, _ = pair(
        Run(lambda m, x: checkpoint(lambda y: m.b(m.c(y)), m.c.weight.sum() * x, use_reentrant=True)), device
    )
    with pytest.raises(
        RuntimeError, match="^graphed: the backward of Run cannot be captured: RuntimeError: When use_reentrant=True"
    ):
        fast(image(device))
    assert all(p.grad is None for p in fast.parameters()) and fast.graphs == 0


@pytest.mark.parametrize("run", [lambda m, x: m.c(x).argmax(1), lambda m, x: None], ids=["indices", "nothing"])
def test_an_argument_that_requires_a_gradient_for_nothing(run: Any, device: str) -> None:
    fast, model = pair(Run(run), device)
    x = image(device).requires_grad_()
    for _ in range(2):
        mine, theirs = fast(x), model(x)
        assert mine is theirs is None or torch.equal(mine, theirs)
    assert fast.graphs == 1


def test_where_autograd_does_not_record(device: str) -> None:
    """Grad mode that is on in inference mode, or in a forward under no_grad."""

    def run(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return m.b(m.c(x))

    fast, model = pair(Run(run).eval(), device)
    for mode in (torch.no_grad, torch.inference_mode):
        for _ in range(2):
            x = image(device)
            with mode(), torch.enable_grad() if mode is torch.inference_mode else mode():
                mine, theirs = fast(x), model(x)
            assert torch.equal(mine, theirs) and not mine.requires_grad
    x = image(device)
    for m in (fast, model):
        m.zero_grad()
        m(x).square().sum().backward()
    assert_same(fast, model)


def test_weights_used_twice_under_autocast(device: str) -> None:
    """Eager adds their gradients up in 16 bits where autocast keeps what it has cast, and in 32 where it does not."""
    fast, model = pair(Run(lambda m, x: m.other(F.pad(m.other(m.c(x).mean((2, 3))), (0, 6)))), device)
    found = []
    for keeps in (True, False):
        for _ in range(2):
            torch.manual_seed(1)
            x = image(device)
            for m in (fast, model):
                m.zero_grad()
                with torch.autocast(device, torch.bfloat16, cache_enabled=keeps):
                    y = m(x)
                y.float().square().mean().backward()
            assert_same(fast, model)
        found.append(fast.other.weight.grad)
    assert fast.graphs == 2 and not torch.equal(*found)


def test_parametrizations(device: str) -> None:
    """What ``cached()`` keeps is of other calls: these run plainly."""
    for parametrized in (parametrizations.weight_norm, parametrizations.spectral_norm):
        plain = Run(lambda m, x: m.b(m.c(x)))
        parametrized(plain.c)
        fast, model = pair(plain, device)
        for step in range(6):
            x = image(device)
            for m in (fast, model):
                m.zero_grad()
                if step < 3:
                    m(x).square().sum().backward()
                else:
                    with parametrize.cached():
                        m(x).square().sum().backward()
            assert_same(fast, model)
            with torch.no_grad(), parametrize.cached():
                assert torch.equal(fast.eval()(x), model.eval()(x))
            fast.train(), model.train()
        assert fast.graphs == 1


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_without_copies_add_up(set_to_none: bool, device: str) -> None:
    """A parameter's gradient may be the graph's memory, which a second backward writes to before it is added. So may an
    argument's."""
    fast, model = pair(Run(lambda m, x: m.b(m.c(x)) * x.sum()), device, clone_outputs=False)
    x = image(device).requires_grad_()
    y = x.detach().clone().requires_grad_()
    for _ in range(2):
        for m, argument in ((fast, x), (model, y)):
            m.zero_grad(set_to_none=set_to_none)
            for factor in (1, 2, 3):
                (factor * m(argument)).square().sum().backward()
        assert_same(fast, model)
        assert torch.equal(x.grad, y.grad)
    assert fast.graphs == 1
    memory = [g.data_ptr() for g in fast._graphs.kinds.all()[0].grads]
    fast.zero_grad()
    for factor in (1, 2):
        loss = factor * fast(x.detach().requires_grad_()).square().sum()
        assert not any(p.grad is not None and p.grad.data_ptr() in memory for p in fast.parameters())
        loss.backward()
        assert factor == 2 or any(p.grad is not None and p.grad.data_ptr() in memory for p in fast.parameters())


def test_gradients_without_copies_are_apart(device: str) -> None:
    """One that flows on to two parameters is a tensor for each: clipping scales both."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x + (self.a + self.b)

    fast, model = pair(Sum(), device, clone_outputs=False)
    for _ in range(3):
        x = torch.randn(4, 8, device=device)
        for m in (fast, model):
            m.zero_grad()
            m(x).square().sum().backward()
            nn.utils.clip_grad_norm_(m.parameters(), 0.1)
        assert_same(fast, model)


def test_parameters_that_move_before_backward(device: str) -> None:
    fast, model = pair(Run(lambda m, x: m.c(x).sigmoid()), device)
    for _ in range(2):
        y = fast(image(device))
        fast.c.weight.data = fast.c.weight.data * 2
        with pytest.raises(
            RuntimeError, match="^graphed: a parameter was moved between a call and its backward, which re"
        ):
            y.sum().backward()
    model.c.weight.data = model.c.weight.data * 4
    x = image(device)
    for m in (fast, model):
        m.zero_grad()
        m(x).sum().backward()
    assert_same(fast, model)


def test_writes_to_an_argument_that_requires_a_gradient(device: str) -> None:
    first = nn.Conv2d(3, 3, 1).to(device)
    fast, model = pair(Run(lambda m, x: m.c(F.relu(x, inplace=True))), device)
    x = image(device)
    with pytest.raises(
        RuntimeError, match="^graphed: the forward of Run writes to an argument that requires a gradient, "
    ):
        fast(first(x))
    for m in (fast, model):  # eager's own words
        with pytest.raises(RuntimeError, match="^a leaf Variable that requires grad is being used in an in-place op"):
            m(image(device).requires_grad_())
    for _ in range(2):
        a, b = x.clone(), x.clone()
        fast(a).sum().backward(), model(b).sum().backward()
        assert torch.equal(a, b) and not torch.equal(a, x)
        assert_same(fast, model)


def test_sparse_gradients_are_refused(device: str) -> None:
    fast, _ = pair(nn.Embedding(8, 4, sparse=True), device)
    for _ in range(2):
        with pytest.raises(TypeError, match="^graphed: Embedding has a gradient that is sparse, expected strided ones"):
            fast(torch.arange(4, device=device))
    assert fast.graphs == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_script_modules(device: str) -> None:
    """No look at one finds its parameters and its mode, but frozen ones have none."""
    first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).to(device)
    x = image(device)
    for script, name in (
        (torch.jit.script(first), "RecursiveScriptModule"),
        (torch.jit.trace(first, x, check_trace=False), "TopLevelTracedModule"),
        (torch.jit.script(nn.Dropout()), "RecursiveScriptModule"),
    ):
        fast = made(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ModuleDict({"part": script})).to(device), device)
        for grad in (False, True):
            with (
                torch.set_grad_enabled(grad),
                pytest.raises(
                    TypeError,
                    match=rf"^graphed: '1\.part' of the model is a {name}, expected an nn.Module that is no Sc",
                ),
            ):
                fast(x)
        assert fast.graphs == 0
    fast, model = pair(Around(torch.jit.freeze(torch.jit.script(first.eval()))), device)
    for _ in range(3):
        for m in (fast, model):
            m.zero_grad()
            m(x).square().sum().backward()
        assert_same(fast, model)
    assert fast.graphs == 1


class Around(nn.Module):
    def __init__(self, script: Any) -> None:
        super().__init__()
        self.script, self.c = script, nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.script(x))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self.c(x)))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_graphs_of_a_part_and_of_the_whole(fused: bool, device: str) -> None:
    whole = nn.ModuleDict({"first": nn.Conv2d(3, 8, 3), "backbone": Inner()}).to(device)
    both = [copy.deepcopy(whole) for _ in range(2)]
    if fused:
        for m in both:
            fcb.fuse(m["backbone"])
    mine, theirs = both
    mine["backbone"] = part = made(mine["backbone"], device)

    class Whole(nn.Module):
        def __init__(self, parts: nn.ModuleDict) -> None:
            super().__init__()
            self.parts = parts

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["backbone"](self.parts["first"](x))

    model = Whole(theirs)
    for fast, expected in ((Whole(mine), (1, 0)), (made(Whole(mine), device), (1, 1))):
        for _ in range(3):
            x = image(device)
            for m in (fast, model):
                m.zero_grad()
                m(x).square().sum().backward()
            assert_same(fast, model)
        assert (part.graphs, getattr(fast, "graphs", 0)) == expected


def test_parameters_of_a_functional_call(device: str) -> None:
    """Others for one call: their gradients are of a plain one."""
    fast, model = pair(Run(lambda m, x: m.b(m.c(x))), device)
    for _ in range(2):
        x = image(device)
        found = []
        for m in (fast, model):
            others = {
                name: (p.detach() * 2).requires_grad_() for name, p in m.named_parameters() if "other" not in name
            }
            y = torch.func.functional_call(m, others, (x,))
            found.append(torch.autograd.grad(y.square().sum(), [*others.values()]))
        for mine, theirs in zip(*found, strict=True):
            assert torch.equal(mine, theirs)
        for m in (fast, model):
            m.zero_grad()
            m(x).square().sum().backward()
        assert_same(fast, model)
        assert fast.graphs == 1
