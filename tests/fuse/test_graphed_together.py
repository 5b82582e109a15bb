"""graphed(model) where several calls wait for one backward, as in GANs and with contrastive losses: a recording for each, up
to a bound, and none by accident in a loop of one call and one backward."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_graphed_training import Net, Run, assert_same, image, pair
from torch import Tensor, nn

from fused_conv_bn import graphs
from fused_conv_bn._graphs.kinds import MOST_OF_A_KIND
from fused_conv_bn._graphs.with_backward import WithBackward


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


class Counted(Net):
    """``own``: what it was called with outside of recordings and replays."""

    def __init__(self) -> None:
        super().__init__()
        self.own: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        if not graphs._in_use.value:
            self.own.append((*x.shape,))
        return super().forward(x)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each recording, those included that were freed since."""
    made: list[int] = []
    record = graphs.Graphs._record

    def counted(self: Any, *args: Any) -> Any:
        made.append(1)
        return record(self, *args)

    monkeypatch.setattr(graphs.Graphs, "_record", counted)
    return made


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each call by a graph, where forward is not to be another one than the model's: fuse() reads it."""
    made: list[int] = []
    replay = WithBackward.replay

    def counted(self: Any, *args: Any) -> Any:
        made.append(1)
        return replay(self, *args)

    monkeypatch.setattr(WithBackward, "replay", counted)
    return made


def losses_of(m: Any, xs: list[Tensor]) -> list[Tensor]:
    return [m(x).square().sum() * (i + 1) for i, x in enumerate(xs)]


def step(fast: Any, model: nn.Module, device: str, calls: int, seed: int = 0) -> None:
    """So many calls and one backward of both, with the same random numbers."""
    xs = [image(device) for _ in range(calls)]
    for m in (fast, model):
        m.zero_grad()
        torch.manual_seed(seed)
        torch.stack(losses_of(m, xs)).sum().backward()
    assert_same(fast, model)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_gan(fused: bool, device: str, replayed: list[int]) -> None:
    """Its discriminator sees real and fake images before one backward, and the generator's again. Parameters, statistics
    and random numbers stay eager's to the bit, through the step that records once more."""
    fast, model = pair(Net(), device, fused)
    generators = [nn.Conv2d(3, 3, 3, padding=1).to(device) for _ in range(2)]
    generators[1].load_state_dict(generators[0].state_dict())
    data = [(image(device), image(device)) for _ in range(5)]
    for d, g in zip((fast, model), generators, strict=True):
        torch.manual_seed(5)
        of_d, of_g = (torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (d, g))
        for real, noise in data:
            fake = g(noise)
            of_d.zero_grad()
            (F.softplus(-d(real)).mean() + F.softplus(d(fake.detach())).mean()).backward()
            of_d.step()
            of_g.zero_grad()
            F.softplus(-d(fake)).mean().backward()
            of_g.step()
    assert_same(fast, model)
    for mine, theirs in zip(
        [*fast.parameters(), *generators[0].parameters()],
        [*model.parameters(), *generators[1].parameters()],
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    assert fast.graphs == 3 and len(replayed) == 3 * len(data) - 1  # but for the first fake images


def test_three_views(device: str) -> None:
    """The engine adds gradients up in one order: of the last call first."""
    fast, model = pair(Counted(), device)
    for i in range(5):
        step(fast, model, device, 3, i)
        assert fast.graphs == (3 if i else 1)
    assert len(fast.own) == 2


def test_one_argument_of_two_calls(device: str) -> None:
    """Its gradient is of both."""
    fast, model = pair(Run(lambda m, x: m.b(m.c(x))), device)
    for _ in range(4):
        x = image(device)
        found = []
        for m in (fast, model):
            m.zero_grad()
            given = x.clone().requires_grad_()
            torch.stack(losses_of(m, [given, given])).sum().backward()
            found.append(given.grad)
        assert torch.equal(*found)
        assert_same(fast, model)
    assert fast.graphs == 2


def test_steps_of_one_call_and_of_two(device: str, recorded: list[int]) -> None:
    fast, model = pair(Counted(), device)
    for i, calls in enumerate((1, 1, 2, 1, 2, 2, 1, 1, 2, 1)):
        step(fast, model, device, calls, i)
        assert fast.graphs == (1 if i < 4 else 2)
    assert len(fast.own) == 1 and len(recorded) == 2


def test_the_first_recording_is_taken_first(device: str) -> None:
    fast, model = pair(Counted(), device)
    for _ in range(3):
        step(fast, model, device, 2)
    first, second = fast._graphs.kinds.all()
    y = fast(image(device))
    assert first.is_waiting() and not second.is_waiting()
    z = fast(image(device))
    assert second.is_waiting()
    y.sum().backward()
    assert not first.is_waiting() and second.is_waiting()
    y = fast(image(device))
    assert first.is_waiting() and fast.graphs == 2
    z.sum().backward(), y.sum().backward()


@pytest.mark.parametrize("clone", [True, False], ids=["copies", "no copies"])
@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "in the other order"])
def test_a_backward_for_each_call(reverse: bool, clone: bool, device: str) -> None:
    fast, model = pair(Counted(), device, clone_outputs=clone)
    for i in range(4):
        xs = [image(device) for _ in range(3)]
        for m in (fast, model):
            m.zero_grad()
            torch.manual_seed(i)
            losses = losses_of(m, xs)
            for loss in reversed(losses) if reverse else losses:
                loss.backward()
        assert_same(fast, model)
    assert fast.graphs == 3 and len(fast.own) == 2


def test_a_call_ahead_of_each_backward(device: str) -> None:
    """As in a pipeline: one waits at any time, and for a moment two."""
    fast, model = pair(Counted(), device)
    fast.drop.p = model.drop.p = 0.0
    xs = [image(device) for _ in range(6)]
    for m in (fast, model):
        waiting = losses_of(m, xs[:1])
        for x in xs[1:]:
            waiting += losses_of(m, [x])
            waiting.pop(0).backward()
        waiting.pop().backward()
    assert_same(fast, model)
    assert fast.graphs == 2 and len(fast.own) == 1


@pytest.mark.parametrize("max_graphs", [16, 3, 1])
def test_more_calls_than_recordings(max_graphs: int, device: str, recorded: list[int]) -> None:
    """Those behind the bound are the model's own, and nothing is recorded anew for them."""
    fast, model = pair(Counted(), device, max_graphs=max_graphs)
    most = min(max_graphs, MOST_OF_A_KIND)
    for i in range(4):
        step(fast, model, device, MOST_OF_A_KIND + 2, i)
    assert fast.graphs == len(recorded) == most
    assert len(fast.own) == MOST_OF_A_KIND + 1 + 3 * (MOST_OF_A_KIND + 2 - most)


def test_what_a_kind_needs_is_what_waited_together(device: str) -> None:
    """Not as many calls as came beside others in all the steps before."""
    fast, model = pair(Counted(), device)
    held = [fast(image(device)) for _ in range(4)]
    held.clear()
    model.load_state_dict(fast.state_dict())
    for i in range(3):
        step(fast, model, device, 2, i)
    held += [fast(image(device)) for _ in range(3)]
    assert fast.graphs == 2 and len(fast.own) == 3 + 1 + 1


# ---- abandoned calls, and loops of one call --------------------------------------------------------------------------


def test_a_result_that_is_dropped(device: str, recorded: list[int]) -> None:
    """Its recording is the next call's, be it the only one or one of two."""
    fast, model = pair(Counted(), device)
    for i in range(6):
        for m in (fast, model):
            torch.manual_seed(i)
            m(image(device))
            if i > 3:
                kept = m(image(device))
                m(image(device))
                kept.sum().backward()
        gc.collect()
        assert not any(r.is_waiting() for r in fast._graphs.kinds.all())
        step(fast, model, device, 1 if i < 2 else 2, i)
        assert fast.graphs == (1 if i < 3 else 2)
    assert len(recorded) == 2 and len(fast.own) == 1


def test_results_that_are_held_without_backward(device: str, recorded: list[int]) -> None:
    """A call runs plainly beside them, and memory for more of them is not taken."""
    fast, _ = pair(Counted(), device)
    held = [fast(image(device)) for _ in range(5)]
    assert fast.graphs == 1 and len(fast.own) == 4
    held.clear()
    gc.collect()
    fast(image(device)).sum().backward()
    assert fast.graphs == len(recorded) == 1 and len(fast.own) == 4


def skips_a_step(m: Any, xs: list[Tensor]) -> None:
    """As where a loss is not finite. It is still there in the call of the next step."""
    for i, x in enumerate(xs):
        loss = m(x).square().sum()
        if i in (1, 3, 4):
            continue
        loss.backward()


def keeps_its_losses(m: Any, xs: list[Tensor]) -> None:
    losses = []
    for x in xs:
        losses.append(m(x).square().sum())
        losses[-1].backward()


def accumulates(m: Any, xs: list[Tensor]) -> None:
    for i, x in enumerate(xs):
        (m(x).square().sum() / 2).backward()
        if i % 2:
            m.zero_grad()


def validates(m: Any, xs: list[Tensor]) -> None:
    """In training mode, without gradients and with them, which nobody asks for. The last result is there in the next
    step's call."""
    for x in xs:
        m(x).square().sum().backward()
        with torch.no_grad():
            m(x)
        y = m(x).sum().item()
        y = m(x)  # noqa: F841


def retains(m: Any, xs: list[Tensor]) -> None:
    """With a second backward, that graphs refuse."""
    for x in xs:
        loss = m(x).square().sum()
        loss.backward(retain_graph=True)
        if isinstance(m, graphs.Graphed):
            with pytest.raises(RuntimeError, match="^graphed: a second backward of one call"):
                loss.backward()


def evaluates(m: Any, xs: list[Tensor]) -> None:
    """Without no_grad, and with results that stay."""
    m(xs[0]).square().sum().backward()
    m.eval()
    results = [m(x) for x in xs]
    m.train()
    del results
    m(xs[0]).square().sum().backward()


@pytest.mark.parametrize(
    ("loop", "kinds"),
    [(skips_a_step, 1), (keeps_its_losses, 1), (accumulates, 1), (validates, 2), (retains, 1), (evaluates, 2)],
)
def test_a_loop_of_one_call_records_once(
    loop: Callable[[Any, list[Tensor]], None], kinds: int, device: str, recorded: list[int]
) -> None:
    fast, model = pair(Counted(), device)
    fast.drop.p = model.drop.p = 0.0
    for _ in range(3):
        xs = [image(device) for _ in range(6)]
        loop(fast, xs), loop(model, xs)
        assert_same(fast, model)
    assert fast.graphs == len(recorded) == kinds


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_other_kinds_take_the_room_of_further_recordings(device: str, recorded: list[int]) -> None:
    """They count in max_graphs. One that waits is freed behind its backward, and no kind is recorded again for another's
    further ones."""
    fast, model = pair(Counted(), device, max_graphs=3)
    for i in range(3):
        step(fast, model, device, 3, i)
    first, second, third = fast._graphs.kinds.all()
    small, tiny = image(device, 2), image(device, 1, 5)
    xs = [image(device) for _ in range(3)]
    for m in (fast, model):
        m.zero_grad()
        torch.manual_seed(1)
        losses = losses_of(m, xs)
        m(small).sum().backward()
        torch.stack(losses).sum().backward()
    assert_same(fast, model)
    assert fast._graphs.kinds.all()[:2] == [first, second] and fast.graphs == 3 and third.dropped
    if device == "cpu":
        assert third.graph.freed and third.backward_graph.freed and not second.graph.freed
    for m in (fast, model):
        torch.manual_seed(2)
        m(tiny).sum().backward()
    assert fast._graphs.kinds.all()[0] is first and fast.graphs == 3 and not second.dropped
    made, own = len(recorded), len(fast.own)
    for i in range(3):
        step(fast, model, device, 3, i)
        for x in (small, tiny):
            for m in (fast, model):
                torch.manual_seed(i)
                m(x).sum().backward()
        assert_same(fast, model)
    assert fast.graphs == 3 and len(recorded) == made == 5 and len(fast.own) == own + 3 * 2


def test_changes_of_the_model_between_calls(device: str) -> None:
    """All recordings of a kind are freed, behind the backward of those that wait."""
    fast, model = pair(Counted(), device)
    for i in range(2):
        step(fast, model, device, 2, i)
    before = fast._graphs.kinds.all()
    for m in (fast, model):
        m.zero_grad()
        torch.manual_seed(1)
        losses = losses_of(m, [image(device)] * 2)
        m.b3 = nn.BatchNorm2d(8).to(device)
        m(image(device))
        m.zero_grad()
        if m is fast:
            assert fast.graphs == 1 and all(r.dropped for r in before)
        losses[1].backward(), losses[0].backward()
    if device == "cpu":
        assert all(r.graph.freed and r.backward_graph.freed for r in before)
    model.load_state_dict(fast.state_dict())
    for i in range(3):
        step(fast, model, device, 2, i)
    assert fast.graphs == 2
    fast.clear()
    assert fast.graphs == 0
    step(fast, model, device, 2)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. A test"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")],
    ids=["PyTorch's", "cuDNN's"],
)
def test_a_recording_without_memory(error: Exception, device: str, recorded: list[int]) -> None:
    """The call that would have had one has enough for itself, and none tries again."""
    short = False

    def run(m: Any, x: Tensor) -> Tensor:
        if short and graphs._in_use.value and fast._graphs.is_capturing():
            raise error
        return m.b(m.c(x))

    fast, model = pair(Run(run), device)
    step(fast, model, device, 2)
    short = True
    for i in range(3):
        # Replays of the stand-in are no captures.
        step(fast, model, device, 2, i)
    assert fast.graphs == 1 and len(recorded) == 2
    short = False
    fast.clear()
    for i in range(3):
        step(fast, model, device, 2, i)
    assert fast.graphs == 2


@pytest.mark.parametrize("grad", [False, True])
def test_a_recording_beside_another_threads_call(grad: bool, device: str) -> None:
    """It would exchange the parameters of a plain call under way, which had no gradients then."""
    comes, goes = threading.Event(), threading.Event()
    waits = False

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.c(x)
        if waits and not graphs._in_use.value and threading.current_thread() is not threading.main_thread():
            comes.set()
            assert goes.wait(60)
        return m.b(y)

    fast, _ = pair(Run(run), device)
    held = fast(image(device))
    waits = True
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(fast(image(device))))
    thread.start()
    assert comes.wait(60)
    with torch.set_grad_enabled(grad):
        small = fast(image(device, 2))
    assert fast.graphs == 1
    goes.set()
    thread.join()
    for y in (results[0], small, held) if grad else (results[0], held):
        fast.zero_grad()
        y.square().sum().backward()
        assert fast.c.weight.grad is not None and fast.b.weight.grad is not None
    fast(image(device, 2)).sum().backward()
    assert fast.graphs == 2


# ---- autocast --------------------------------------------------------------------------------------------------------


def test_autocast(device: str) -> None:
    """Gradients of two calls add up in float32. So do eager's where each call has autocast to itself, or no cache."""
    fast, model = pair(Counted(), device)
    cases: list[tuple[bool, bool]] = [(True, True), (True, False), (False, False)]
    for cache, apart in cases:
        for i in range(3):
            xs = [image(device), image(device)]
            for m in (fast, model):
                m.zero_grad()
                torch.manual_seed(i)
                results = []
                if apart:
                    for x in xs:
                        with torch.autocast(device, torch.bfloat16, cache_enabled=cache):
                            results.append(m(x))
                else:
                    with torch.autocast(device, torch.bfloat16, cache_enabled=cache):
                        results = [m(x) for x in xs]
                (results[0].float().square().sum() + results[1].float().sum()).backward()
            if apart or not cache:
                assert_same(fast, model)
            else:
                for mine, theirs in zip(fast.parameters(), model.parameters(), strict=True):
                    if theirs.grad is not None:
                        off = (mine.grad - theirs.grad).norm() / theirs.grad.norm()
                        assert mine.grad.dtype is torch.float32 and off < 2**-7
    assert fast.graphs == 4 and len(fast.own) == 2
