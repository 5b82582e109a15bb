"""graphed(model): what is keyed, seen, refused and kept. On the CPU a stand-in takes the place of CUDA's graphs: its
replay runs the forward again, on the same memory. On CUDA the same tests run real graphs, and those at the end, too."""

from __future__ import annotations

import contextlib
import copy
import enum
import gc
import io
import pickle
import threading
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stand_in import FakeSide, is_capturing, made
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fused_conv_bn as fcb
from fused_conv_bn import graphs
from fused_conv_bn._graphs import calls
from fused_conv_bn._graphs.cuda import Cuda

# ---- models ----------------------------------------------------------------------------------------------------------


class Run(nn.Module):
    """A layer or two, and what a test makes of them: ``run(self, ...)``."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.run = run
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def net() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    for m in (model[1], model[4]):
        m.running_mean.normal_()
        m.running_var.uniform_(0.5, 2)
    return model.eval()


def image(device: str, n: int = 2, size: int = 10) -> Tensor:
    return torch.randn(n, 3, size, size).to(device)


def assert_follows(fast: graphs.Graphed, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The result is eager's to the bit, and laid out as eager's."""
    expected = model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    got = fast(*args, **kwargs)
    mine, theirs = tree_leaves(got), tree_leaves(expected)
    assert len(mine) == len(theirs) and type(got) is type(expected)
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(b, Tensor):
            assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
        else:
            assert type(a) is type(b) and a == b
    return got


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@torch.no_grad()
def test_replays_compute_what_the_model_does(fused: bool, device: str) -> None:
    model = net().to(device)
    if fused:
        fcb.fuse(model)
    fast = made(model, device)
    for _ in range(3):
        assert_follows(fast, model, image(device))
    assert fast.graphs == 1
    if fused:
        assert str(fcb.report(model)).endswith("4 fused")


@torch.no_grad()
def test_shapes_strides_and_dtypes_have_graphs_of_their_own(device: str) -> None:
    model = net().to(device)
    fast = made(model, device)
    for x in (image(device), image(device, 3), image(device, 2, 12)):
        for _ in range(2):
            assert_follows(fast, model, x)
            assert_follows(fast, model, x.contiguous(memory_format=torch.channels_last))
    assert fast.graphs == 6
    assert_follows(fast, model, image(device, 2, 14)[:, :, ::2])  # with gaps
    assert_follows(fast, model, image(device)[:1].expand(4, -1, -1, -1))  # the same memory again and again
    assert_follows(fast, model, image(device)[:1].expand(4, -1, -1, -1))
    assert fast.graphs == 8


@torch.no_grad()
def test_results_are_nobody_elses(device: str) -> None:
    """They stay as they are when the graph is replayed: views, parts of one tensor and results of results, too."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.c(x)
        return {"y": y, "views": (y[:, ::2], y.flatten(2).transpose(1, 2)), "n": [len(x), None, "s", 0.5], "again": y}

    model = Run(run).to(device)
    fast = made(model, device)
    results, copies = [], []
    for _ in range(3):
        result = fast(image(device))
        results.append(result)
        copies.append(copy.deepcopy(result))
        assert result["again"] is result["y"] and result["n"] == [2, None, "s", 0.5]
    for result, before in zip(results, copies, strict=True):
        for a, b in zip(tree_leaves(result), tree_leaves(before), strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    results[0]["n"].append("mine")
    assert len(fast(image(device))["n"]) == 4


@torch.no_grad()
def test_results_without_copies(device: str) -> None:
    model = net().to(device)
    fast = made(model, device, clone_outputs=False)
    x = image(device), image(device)
    first = fast(x[0])
    expected = model(x[0])
    assert torch.equal(first, expected)
    second = fast(x[1])
    assert second is first and torch.equal(first, model(x[1]))


Pair = namedtuple("Pair", "x w")


@torch.no_grad()
def test_what_is_returned_as_it_came(device: str) -> None:
    model = Run(lambda m, x, y: (Pair(x, m.c.weight), x + y, OrderedDict(b=m.b.running_mean))).to(device)
    fast = made(model, device)
    for _ in range(2):
        x, y = image(device), image(device)
        pair, total, rest = fast(x, y)
        assert type(pair) is Pair and pair.x is x and pair.w is model.c.weight
        assert torch.equal(total, x + y) and rest["b"] is model.b.running_mean


@torch.no_grad()
def test_arguments_that_are_written_to(device: str) -> None:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        return m.c(x + y)

    model = Run(run).to(device)
    fast = made(model, device)
    for x, y in [(image(device), image(device)) for _ in range(3)]:
        mine, theirs = x.clone(), x.clone()
        assert torch.equal(fast(mine, y), model(theirs, y)) and torch.equal(mine, theirs) and not torch.equal(mine, x)
    for _ in range(2):  # the same tensor twice: both arguments change
        x = image(device)
        mine, theirs = x.clone(), x.clone()
        assert torch.equal(fast(mine, mine), model(theirs, theirs)) and torch.equal(mine, theirs)
    for _ in range(2):  # two tensors, one memory
        x = image(device)
        mine, theirs = x.clone(), x.clone()
        assert torch.equal(fast(mine, mine.view_as(mine)), model(theirs, theirs.view_as(theirs)))
        assert torch.equal(mine, theirs)
    assert fast.graphs == 2
    relu = nn.ReLU(inplace=True).eval()
    fast, x = made(relu, device), image(device)
    assert fast(x) is x and x.min() == 0


class Mode(enum.Enum):
    A = 1
    B = 2


@torch.no_grad()
def test_other_arguments(device: str) -> None:
    def run(m: Any, x: Tensor, scale: Any = 1.0, *, parts: Any = (), mode: Mode = Mode.A) -> Any:
        y = m.c(x) * scale + sum(parts)
        return -y if mode is Mode.B else y

    model = Run(run).to(device)
    fast = made(model, device)
    x = image(device)
    z = torch.zeros(1, device=device)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}),
        ((x, 2.0), {}),
        ((x, 2), {}),
        ((x,), {"scale": 2.0}),
        ((x, True), {}),
        ((x, -0.0), {}),
        ((x, 0.0), {}),
        ((x,), {"parts": [x.mean(), z]}),
        ((x,), {"parts": (x.mean(), 3)}),
        ((x,), {"mode": Mode.B}),
        ((x,), {"mode": Mode.A}),
    ]
    for _ in range(2):
        for args, kwargs in calls:
            assert_follows(fast, model, *args, **kwargs)
    assert fast.graphs == len(calls)
    nan = made(model, device)
    for _ in range(3):
        assert nan(x, float("nan")).isnan().all()
    assert nan.graphs == 1


@torch.no_grad()
def test_tensors_without_elements(device: str) -> None:
    model = Run(lambda m, x, y: (m.c(x), y * 2)).to(device)
    fast = made(model, device)
    nothing = torch.zeros(0, 4, device=device)
    for _ in range(2):
        assert_follows(fast, model, image(device), nothing)
    assert fast.graphs == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch's about an empty graph
        for _ in range(2):
            assert_follows(fast, model, image(device)[:0], nothing)
    assert fast.graphs == 1


@torch.no_grad()
def test_random_numbers_are_eagers(device: str) -> None:
    model = Run(lambda m, x: F.dropout(m.c(x), 0.5, training=True) + torch.rand(8, 1, 1, device=x.device)).to(device)
    fast = made(model, device)
    x = image(device)
    sequences = []
    for f in (model, fast):
        torch.manual_seed(3)
        sequences.append([f(x) for _ in range(3)] + [torch.rand(4, device=device), torch.rand(4)])
    for a, b in zip(*sequences, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(sequences[1][0], sequences[1][1])
    torch.manual_seed(3)
    assert torch.equal(fast(x), sequences[0][0])


@torch.no_grad()
def test_warm_ups_leave_statistics_alone(device: str) -> None:
    """A BatchNorm in training mode within a model in evaluation mode: one update a call, from the first call on."""
    models = [net().to(device)]
    models[0][1].train()
    models.append(copy.deepcopy(models[0]))
    fast = made(models[0], device)
    for step in range(3):
        x = image(device)
        assert torch.equal(fast(x), models[1](x))
        for mine, theirs in zip(models[0].buffers(), models[1].buffers(), strict=True):
            assert torch.equal(mine, theirs), step
    assert models[0][1].num_batches_tracked == 3 and fast.graphs == 1


# ---- changes of the model --------------------------------------------------------------------------------------------


def in_place(m: Any) -> None:
    m[0].weight.mul_(2)
    m[1].running_mean.add_(1)
    m.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in m.state_dict().items()})


def by_data(m: Any) -> None:
    m[0].weight.data = m[0].weight.data * 2


def by_a_prefix(m: Any) -> None:
    """The same address, and fewer channels."""
    for t in (*m[3].parameters(), *m[4].parameters(), m[4].running_mean, m[4].running_var):
        t.data = t.data[:2]


def by_parameter(m: Any) -> None:
    m[0].weight = nn.Parameter(m[0].weight * 2)


def by_buffer(m: Any) -> None:
    m[1].running_mean = m[1].running_mean + 1


def by_module(m: Any) -> None:
    m[2] = nn.SiLU().eval()


def no_bias(m: Any) -> None:
    m[3].bias = None


def one_more(m: Any) -> None:
    m.append(nn.Sigmoid().eval())


def a_child_of_a_leaf(m: Any) -> None:
    m[2].add_module("unused", nn.ReLU().eval())
    m[2].register_buffer("unused_buffer", torch.zeros(1, device=m[0].weight.device))


def other_mode(m: Any) -> None:
    m[1].train()


def other_class(m: Any) -> None:
    fcb.fuse(m)


def double(m: Any) -> None:
    m.double()


@pytest.mark.parametrize(
    "change",
    [in_place, by_data, by_a_prefix, by_parameter, by_buffer, by_module, no_bias, one_more]
    + [a_child_of_a_leaf, other_mode, other_class, double],
    ids=lambda f: f.__name__,
)
@torch.no_grad()
def test_changes_are_seen(change: Callable[[Any], None], device: str) -> None:
    model = net().to(device)
    fast = made(model, device)
    assert_follows(fast, model, image(device))
    assert_follows(fast, model, image(device, 3))
    graphs_before = [r.graph for r in fast._graphs.kinds.all()]
    change(model)
    x = image(device)
    if change is double:
        x = x.double()
    for _ in range(3):
        expected = copy.deepcopy(model)(x)
        assert torch.equal(fast(x), expected)
    left = [r.graph for r in fast._graphs.kinds.all()]
    if change is in_place:
        assert left[0] is graphs_before[1] and left[1] is graphs_before[0]
    elif change is other_mode:
        assert left[:2] == graphs_before and len(left) == 3
        model[1].eval()
        assert_follows(fast, model, image(device))
        assert fast.graphs == 3  # the first one once more
    else:
        assert len(left) == 1 and left[0] not in graphs_before


@torch.no_grad()
def test_memory_that_modules_keep_on_their_own(device: str) -> None:
    """Anchors that are made anew for each other size: the first graph reads those of its size all the same."""

    class Head(nn.Module):
        shape: Any = None

        def forward(self, x: Tensor) -> Tensor:
            if self.shape != x.shape:
                self.shape, self.kept = x.shape, [torch.full((100_000,), float(x.shape[0]), device=x.device)]
            return x * self.kept[0][: x[0].numel()].view_as(x[0])

    model = nn.Sequential(Head()).eval()
    fast = made(model, device)
    xs = [image(device, n) for n in (2, 3)]
    for _ in range(3):
        for x in xs:
            fast(x)
            torch.full((100_000,), 7.0, device=device)  # into whatever memory became free
            assert torch.equal(fast(x), x * len(x))
    assert fast.graphs == 2


@torch.no_grad()
def test_hooks_are_called(device: str) -> None:
    model = net().to(device)
    fast = made(model, device)
    x = image(device)
    expected = fast(x)
    seen: list[Any] = []
    handle = fast.module[3].register_forward_hook(lambda *a: seen.append(a))
    with pytest.warns(UserWarning, match="^graphed: a module of the model has a forward hook"):
        assert torch.equal(fast(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        fast(x)
    assert len(seen) == 2
    handle.remove()
    fast(x)
    assert len(seen) == 2 and fast.graphs == 1
    everywhere = nn.modules.module.register_module_forward_pre_hook(lambda *a: seen.append(a))
    fast(x)
    everywhere.remove()
    assert len(seen) == 2 + 6


@torch.no_grad()
def test_lazy_modules(device: str) -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()).eval().to(device)
    fast = made(model, device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = image(device)
        fast(x)
        for _ in range(2):
            assert_follows(fast, model, x)
    assert type(model[0]) is nn.Conv2d and fast.graphs == 1


# ---- the key ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_flags_have_graphs_of_their_own(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net().to(device)
    fast = made(model, device)
    x = image(device)
    fast(x)

    def again(count: int) -> None:
        for _ in range(2):
            assert_follows(fast, model, x)
        assert fast.graphs == count

    with torch.autocast(device, torch.bfloat16):
        again(2)
    with torch.autocast(device, torch.float16):
        again(3)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", True)
        again(4)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "deterministic", False)
        again(5)
    with torch.device(device):
        again(6)
    with fcb.use_algorithm("aten"):
        fast(x)
        count = fast.graphs
        assert count in (6, 7)  # without a CUDA library there is nothing to choose
        again(count)
    fast(x)  # now that there is a choice to be told
    again(fast.graphs)
    with torch.inference_mode():
        again(fast.graphs)


def test_flags_of_the_newer_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """After fp32_precision was set, reading allow_tf32 may raise. The key does not."""
    before = calls._flags()
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        assert calls._flags() != before
    finally:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        monkeypatch.undo()


def test_autocasts_cache_is_not_part_of_it(device: str) -> None:
    """Weights that eager calls cast, or warm-ups, are not what a graph reads."""
    model = net().to(device)
    fast = made(model, device)
    x = image(device)
    for _ in range(3):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            expected = model(x)
            assert torch.equal(fast(x), expected) and torch.is_autocast_cache_enabled()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.25)
    assert fast.graphs == 1
    seen = []
    with torch.no_grad():  # other threads have the same cache
        made(Run(lambda m, x: (seen.append(torch.is_autocast_cache_enabled()), m.c(x))[1]), device)(x)
    assert seen and not any(seen)


@torch.no_grad()
def test_inference_mode_first(device: str) -> None:
    """Whichever mode captured, the other replays."""
    model = Run(lambda m, x: F.dropout(m.c(x), 0.5, training=True)).to(device)
    for first, second in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        fast = made(model, device)
        x = image(device)
        torch.manual_seed(5)
        expected = [model(x), model(x)]
        torch.manual_seed(5)
        with first():
            assert torch.equal(fast(x), expected[0])
        with second():
            assert torch.equal(fast(x), expected[1])
        assert fast.graphs == 1


@torch.no_grad()
def test_the_least_recently_used_graph_goes(device: str) -> None:
    model = net().to(device)
    xs = [image(device, n) for n in (1, 2, 3)]
    fast = made(model, device, max_graphs=2)
    graphs_of: list[Any] = []
    for x in (xs[0], xs[1], xs[0], xs[2]):
        assert_follows(fast, model, x)
        graphs_of.append(fast._graphs.kinds.all()[-1].graph)
    assert [r.graph for r in fast._graphs.kinds.all()] == [graphs_of[0], graphs_of[3]]
    assert_follows(fast, model, xs[1])
    assert fast._graphs.kinds.all()[0].graph is graphs_of[3]
    one = made(model, device, max_graphs=1)
    for x in (*xs, *xs):
        assert_follows(one, model, x)
        assert one.graphs == 1
    fast.clear()
    assert fast.graphs == 0
    assert_follows(fast, model, xs[0])


def test_the_policy_of_graphs_and_pools() -> None:
    """Graphs are freed before others are made; a pool is given up with the last of them alone, since PyTorch takes no
    pool again that has no graphs."""
    FakeSide.made.clear()
    fast = made(net(), "cpu", max_graphs=2)
    with torch.no_grad():
        for n in (1, 2, 1, 3):
            fast(torch.zeros(n, 3, 8, 8))
        (side,) = FakeSide.made
        replay = ["begin", "end"]
        assert side.log == [
            *("warm up", "capture", *replay),
            *("warm up", "capture", *replay),
            *replay,
            *("warm up", "free 1", "capture", *replay),
        ]
        assert [g.freed for g in side.graphs] == [False, True, False] and side.graphs[0].replays == 2
        side.log.clear()
        fast.module[0].weight = nn.Parameter(fast.module[0].weight * 2)
        fast(torch.zeros(1, 3, 8, 8))
        assert side.log == ["free 2 last", "warm up", "capture", *replay]
        side.log.clear()
        fast.clear()
        assert side.log == ["free 1 last"]
        one = made(net(), "cpu", max_graphs=1)
        one(torch.zeros(1, 3, 8, 8))
        one(torch.zeros(2, 3, 8, 8))
        assert "free 1 last" in FakeSide.made[-1].log


# ---- refusals --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_arguments_and_results_that_are_refused(device: str) -> None:
    class Thing:
        x: Any

    model = Run(lambda m, x, *rest: m.c(x)).to(device)
    fast = made(model, device)
    for thing in (Thing(), {1, 2}, [object()], {"f": len}):
        with pytest.raises(
            TypeError, match=r"^graphed: an argument is or has in it a value of type \w+, expected tensors, numbers"
        ):
            fast(image(device), thing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about kinds of tensors that it gives up
        eye = torch.eye(3, device=device)
        kinds = [eye.to_sparse(), eye.to_sparse_csr(), torch.quantize_per_tensor(eye, 0.1, 0, torch.quint8)]
        kinds.append(torch.nested.nested_tensor([eye, eye[:2]], layout=torch.strided))
    for kind in kinds:
        with pytest.raises(
            TypeError,
            match="^graphed: an argument is or has in it a sparse, nested or quantized tensor, expected plain",
        ):
            fast(image(device), kind)
    assert_follows(fast, model, image(device))

    def thing_of(m: Any, x: Tensor) -> Any:
        found = Thing()
        found.x = m.c(x)
        return found

    with pytest.raises(
        TypeError, match="^graphed: the model returned a value of type Thing, expected tensors, numbers"
    ):
        made(Run(thing_of), device)(image(device))
    with pytest.raises(TypeError, match=r"^graphed: the model returned a Tensor of layout torch.sparse_coo on \w+"):
        made(Run(lambda m, x: torch.eye(3).to_sparse()), device)(image(device))


@torch.no_grad()
def test_errors_of_the_model_are_its_own(device: str) -> None:
    model = net().to(device)
    fast = made(model, device)
    x = torch.zeros(2, 5, 8, 8, device=device)
    with pytest.raises(RuntimeError) as eager:
        model(x)
    for _ in range(2):
        with pytest.raises(RuntimeError) as mine:
            fast(x)
        assert str(mine.value) == str(eager.value)
    assert fast.graphs == 0
    assert_follows(fast, model, image(device))


@torch.no_grad()
def test_a_forward_that_fails_in_the_capture(device: str) -> None:
    broken = True

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.c(x)
        if broken and is_capturing(device):
            m.c.note = "changed"
            raise ValueError("not now\nand more")
        return F.dropout(m.b(y), 0.5, training=True)

    model = Run(run).to(device)
    fast = made(model, device)
    stream = torch.cuda.current_stream() if device == "cuda" else None
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"^graphed: the forward of Run cannot be captured: ValueError: not now$"
        ) as caught:
            fast(image(device))
        assert isinstance(caught.value.__cause__, ValueError) and fast.graphs == 0
        assert not hasattr(model.c, "note") and torch.is_autocast_cache_enabled() and gc.isenabled()
        if device == "cuda":
            assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
        F.dropout(image(device), 0.5)
        other = net().to(device)
        assert_follows(made(other, device), other, image(device))
    broken = False
    x = image(device)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(fast(x), expected)


@torch.no_grad()
def test_forwards_that_change_their_module(device: str) -> None:
    def counts(m: Any, x: Tensor) -> Tensor:
        m.c.calls = getattr(m.c, "calls", 0) + 1
        return m.c(x)

    def keeps(m: Any, x: Tensor) -> Tensor:
        m.state = getattr(m, "state", 0) + m.c(x)
        return m.state

    def rebinds(m: Any, x: Tensor) -> Tensor:
        m.b.running_mean = m.b.running_mean * 0.5
        return m.b(m.c(x))

    def same(m: Any, x: Tensor) -> Tensor:
        m.scale = 1.5 * len(x)
        return m.c(x) * m.scale

    for run, of in ((counts, "Conv2d sets its attribute 'calls'"), (keeps, "Run sets its attribute 'state'")):
        model = Run(run)
        fast = made(model, device)
        with pytest.raises(RuntimeError, match=f"^graphed: the forward of {of} at each call, which a replay does not$"):
            fast(image(device))
        assert fast.graphs == 0
    assert not torch.equal(model.state, model(image(device)))  # of the last warm-up, with memory of its own
    with pytest.raises(
        RuntimeError, match="^graphed: the forward of Run replaces modules, parameters or buffers at each call"
    ):
        made(Run(rebinds), device)(image(device))
    model = Run(same)
    fast = made(model, device)
    for _ in range(2):
        assert_follows(fast, model, image(device))


def test_captures_of_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = made(net(), "cpu")
    monkeypatch.setattr(FakeSide.capturing, "value", True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="^graphed: the current stream is being captured already"):
        fast(image("cpu"))


@torch.no_grad()
def test_graphed_models_in_one(device: str) -> None:
    inner = net().to(device)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), inner).eval().to(device)
    model[1] = made(inner, device)
    fast = made(model, device)
    for _ in range(2):
        x = image(device)
        expected = inner(model[0](x))
        assert torch.equal(fast(x), expected)
    assert fast.graphs == 1 and model[1].graphs == 0
    assert torch.equal(model(x), expected) and model[1].graphs == 1


def test_what_graphed_takes() -> None:
    with pytest.raises(
        TypeError, match="^graphed: model is of type function, expected an nn.Module that is no ScriptModule$"
    ):
        fcb.graphed(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^graphed: model is of type RecursiveScriptModule"):
        fcb.graphed(torch.jit.script(nn.ReLU()))
    for n in (0, -1, 2.0, None):
        with pytest.raises(ValueError, match=r"^graphed: max_graphs is .*, expected an integer of at least 1$"):
            fcb.graphed(net(), max_graphs=n)  # type: ignore[arg-type]
    model = net()
    assert fcb.graphed(fcb.graphed(model)).module is model


# ---- plain calls -----------------------------------------------------------------------------------------------------


def test_on_the_cpu_it_is_the_model() -> None:
    """Training, gradients and any arguments: there is nothing that a graph would have to see."""
    model = net().train()
    fast, twin = fcb.graphed(model), copy.deepcopy(model)
    x = image("cpu")
    y, expected = fast(x), twin(x)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(y, expected) and torch.equal(model[0].weight.grad, twin[0].weight.grad)
    assert torch.equal(model[1].running_mean, twin[1].running_mean) and fast.graphs == 0
    thing = object()
    assert fcb.graphed(Run(lambda m, x: x))(thing) is thing


def test_compiled_exported_and_traced(no_leftover_graphs: None, device: str) -> None:
    model = net().to(device)
    fast = made(model, device)
    x = image(device)
    expected = model(x)
    assert torch.equal(torch.compile(fast, backend="eager", fullgraph=True)(x), expected)
    parent = nn.Sequential(fast, nn.ReLU()).eval()
    assert torch.equal(torch.compile(parent, backend="eager", fullgraph=True)(x), expected.relu())
    assert torch.equal(torch.export.export(fast, (x,)).module()(x), expected)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(torch.jit.trace(fast, x, check_trace=False)(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(fast.module)(x), expected)
    assert torch.func.vmap(fast)(x[None]).shape == (1, *expected.shape)
    assert fast.graphs == 0


@torch.no_grad()
def test_modes_see_each_op(device: str) -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils.flop_counter import FlopCounterMode

    class Functions(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += 1
            return func(*args, **(kwargs or {}))

    model = net().to(device)
    fast = made(model, device)
    x = image(device)
    fast(x)
    with FlopCounterMode(display=False) as flops:
        fast(x)
    with Functions() as functions:
        fast(x)
    assert flops.get_total_flops() > 0 and functions.seen > 3


class Marked(Tensor):
    pass


@torch.no_grad()
def test_subclasses_of_tensors_are_the_models(device: str) -> None:
    model = net().to(device)
    fast = made(model, device)
    assert type(fast(image(device).as_subclass(Marked))) is Marked and fast.graphs == 0
    model[0].weight = nn.Parameter(model[0].weight.data.as_subclass(Marked))
    with pytest.raises(
        TypeError, match="^graphed: a parameter or buffer of the model is a Marked, expected plain tensors$"
    ):
        fast(image(device))


# ---- the module ------------------------------------------------------------------------------------------------------


def test_it_is_the_model_in_all_else() -> None:
    model = net()
    model.note = "n"
    fast = fcb.graphed(model)
    assert isinstance(fast, nn.Module) and fast.module is model and fast.note == "n" and "note" in dir(fast)
    assert repr(fast) == f"graphed({model!r})"
    assert list(fast.state_dict()) == list(model.state_dict()) and [*fast.parameters()][0] is model[0].weight
    for method in ("train", "eval", "double", "float", "cpu", "requires_grad_", "half"):
        assert getattr(fast, method)() is fast
    assert fast.to(torch.float32) is fast and model[0].weight.dtype == torch.float32
    fast.train()
    assert model.training and model[1].training and fast.training
    fast.training = False
    fast.extra = nn.ReLU()
    assert not model.training and model.extra is fast.extra and "extra" in dict(model.named_modules())
    del fast.extra, fast.note
    assert not hasattr(model, "extra") and not hasattr(fast, "note")
    assert fast.load_state_dict(model.state_dict()).missing_keys == []
    handle = fast.register_forward_hook(lambda *a: None)
    assert len(model._forward_hooks) == 1
    handle.remove()
    for value in ("_parameters", "_buffers", "_modules"):
        assert getattr(fast, value) is getattr(model, value)


def test_as_a_part_of_another_model() -> None:
    inner = net()
    plain = nn.Sequential(OrderedDict(body=inner, last=nn.ReLU()))
    keys = list(plain.state_dict())
    plain.body = fcb.graphed(inner)
    assert (
        list(plain.state_dict()) == keys
        and [n for n, _ in plain.named_parameters()] == keys[:2] + keys[2:4] + keys[7:11]
    )
    assert plain.load_state_dict(plain.state_dict()).unexpected_keys == []
    plain.train()
    assert inner[1].training
    plain.eval().double()
    assert not inner.training and inner[0].weight.dtype == torch.float64
    x = image("cpu").double()
    expected = plain(x)
    fcb.fuse(plain)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(plain(x), expected.detach(), rtol=1e-12, atol=1e-12)
    assert str(fcb.report(plain)).endswith("4 fused")


@torch.no_grad()
def test_fusing_what_is_graphed(device: str) -> None:
    """It is the model in it that is fused, and its graphs are captured anew."""
    model = net().to(device)
    fast, x = made(model, device), image(device)
    expected = fast(x)
    assert fcb.fuse(fast, x) is fast and type(fast) is graphs.Graphed and isinstance(model, nn.Sequential)
    for _ in range(2):
        torch.testing.assert_close(fast(x), expected)
    assert str(fcb.report(fast)).endswith("4 fused") and fast.graphs == 1
    assert fcb.unfuse(fast) is fast and type(model) is nn.Sequential
    assert torch.equal(fast(x), expected) and fast.graphs == 1


@torch.no_grad()
def test_copies_and_pickles(device: str) -> None:
    model = net().to(device)
    fast = fcb.graphed(model, max_graphs=3, clone_outputs=False)
    x = image(device)
    expected = fast(x).clone()
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(buffer, weights_only=False)):
        assert type(twin) is graphs.Graphed and twin.module is not model and twin.graphs == 0
        assert twin._graphs.kinds.most == 3 and not twin._graphs.clone_outputs
        assert torch.equal(twin(x), expected)
        twin.module[0].weight.add_(1)
        assert not torch.equal(twin(x), expected) and torch.equal(fast(x), expected)
    assert copy.copy(fast).module is model
    fused = copy.deepcopy(fcb.graphed(fcb.fuse(model)))
    assert type(fused) is graphs.Graphed and fused.module is not model


def in_threads(count: int, work: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def safely(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=safely, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


@torch.no_grad()
def test_threads(device: str) -> None:
    """They share graphs, on streams of their own, and each gets the result for its own arguments."""
    model = net().to(device)
    xs = [[image(device, 1 + i % 2) for i in range(8)] for _ in range(4)]
    expected = [[model(x) for x in those] for those in xs]
    fast = made(model, device)
    if device == "cuda":
        torch.cuda.synchronize()

    def work(i: int) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
        with torch.no_grad(), stream:
            for _ in range(5):
                for got, theirs in [(fast(x), y) for x, y in zip(xs[i], expected[i], strict=True)]:
                    assert torch.equal(got, theirs)

    in_threads(4, work)
    assert fast.graphs == 2


# ---- what CUDA is asked ----------------------------------------------------------------------------------------------


class Asked:
    """In the place of torch.cuda's streams, events and graphs: what is asked of them, on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.names = iter(("warming", "capturing"))
        self.pools = iter(("pool 1", "pool 2", "pool 3"))
        self.current: Any = Stream(self, "the caller's")
        self.invalid = False
        for name, stand_in in {
            "Stream": lambda device: Stream(self, next(self.names)),
            "Event": lambda: Event(self),
            "CUDAGraph": lambda: Graph(self),
            "stream": self.on,
            "current_stream": lambda device: self.current,
            "empty_cache": lambda: self.log.append("empty cache"),
            "graph_pool_handle": lambda: next(self.pools),
            "is_current_stream_capturing": lambda: False,
        }.items():
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, stand_in)
        stand_in = lambda device, pool: self.log.append(f"give up {pool}")  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", stand_in, raising=False)
        monkeypatch.setattr(Cuda, "kind", "cpu")

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def since(self) -> list[str]:
        log, self.log[:] = [*self.log], []
        return log


class Stream:
    def __init__(self, asked: Asked, name: str) -> None:
        self.asked, self.name = asked, name

    def wait_stream(self, other: Stream) -> None:
        self.asked.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Event) -> None:
        self.asked.log.append(f"{self.name} waits for the last replay")


class Event:
    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def record(self, stream: Stream) -> None:
        self.asked.log.append(f"replayed on {stream.name}")

    def synchronize(self) -> None:
        self.asked.log.append("wait for the last replay")


class Graph:
    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert capture_error_mode == "thread_local" and self.asked.current.name == "capturing" and not gc.isenabled()
        self.pool = pool
        self.asked.log.append(f"capture into {pool}")

    def capture_end(self) -> None:
        assert self.asked.current.name == "capturing"
        self.asked.log.append("end")
        if self.pool and self.asked.invalid:
            raise RuntimeError("invalidated")

    def replay(self) -> None:
        self.asked.log.append("replay")

    def reset(self) -> None:
        self.asked.log.append("reset")


@torch.no_grad()
def test_what_cuda_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    fails = False

    def run(m: Any, x: Tensor) -> Tensor:
        if fails and asked.current.name == "capturing":
            asked.invalid = True
            raise ValueError("no")
        return m.c(x)

    fast = graphs.Graphed(graphs.Graphs(Run(run), 2, True, Cuda))
    warm = ["warming waits for the caller's", "the caller's waits for warming"]
    fresh = ["the caller's waits for capturing", "empty cache", "capture into None", "end", "reset"]
    replay = ["the caller's waits for the last replay", "replay", "replayed on the caller's"]
    freed = ["wait for the last replay", "reset"]
    fast(image("cpu"))
    assert asked.since() == [*warm, *fresh, "capture into pool 1", "end", *replay]
    fast(image("cpu"))
    assert asked.since() == replay
    fast(image("cpu", 3))
    assert asked.since() == [*warm, *fresh, "capture into pool 1", "end", *replay]
    fast(image("cpu", 4))
    assert asked.since() == [*warm, *freed, *fresh, "capture into pool 1", "end", *replay]
    fast.clear()
    assert asked.since() == [*freed, "reset"]
    fast(image("cpu"))
    assert asked.since() == [*warm, *fresh, "capture into pool 2", "end", *replay]
    fails = True
    with pytest.raises(RuntimeError, match="cannot be captured: ValueError: no$"):
        fast(image("cpu", 3))
    recovered = ["give up pool 2", "reset", "capture into None", "end", "reset", "wait for the last replay"]
    assert asked.since() == [*warm, *fresh, "capture into pool 2", "end", *recovered]
    assert asked.current.name == "the caller's" and gc.isenabled() and fast.graphs == 1
    fails = asked.invalid = False
    fast(image("cpu", 3))
    assert asked.since() == [*warm, *fresh, "capture into pool 2", "end", *replay]
    del fast
    assert asked.since() == [*freed, "reset"]


# ---- CUDA alone ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(need_gpus: Callable[[int], None]) -> str:
    need_gpus(1)
    return "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@torch.no_grad()
def test_a_fused_network_in_16_bits(dtype: torch.dtype, cuda: str) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6()),
        *(nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64), nn.SiLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    model = fcb.fuse(model.eval()).to(cuda, dtype, memory_format=torch.channels_last)
    fast = fcb.graphed(model)
    for _ in range(3):
        x = torch.randn(4, 3, 64, 64, device=cuda, dtype=dtype).contiguous(memory_format=torch.channels_last)
        assert_follows(fast, model, x)
    assert fast.graphs == 1


@torch.no_grad()
def test_calls_on_several_streams_wait_for_each_other(cuda: str) -> None:
    """Each call on its own stream, and no wait in between by the caller: the second would overwrite the first's memory
    while a long kernel holds the first up."""

    def run(m: Any, x: Tensor) -> Tensor:
        torch.cuda._sleep(20_000_000)
        return m.c(x) + x.mean()

    model = Run(run).to(cuda)
    fast = fcb.graphed(model)
    xs = [image(cuda, 8, 32) for _ in range(6)]
    expected = [model(x) for x in xs]
    fast(xs[0])
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for i, x in enumerate(xs):
        with torch.cuda.stream(streams[i % 3]):
            results.append(fast(x))
    torch.cuda.synchronize()
    for got, theirs in zip(results, expected, strict=True):
        assert torch.equal(got, theirs)


@torch.no_grad()
def test_a_forward_that_waits_for_the_device(cuda: str) -> None:
    """It cannot be captured, and says so; what comes after it works: random numbers, other captures, the same model."""
    waits = True

    def run(m: Any, x: Tensor) -> Tensor:
        y = F.dropout(m.c(x), 0.5, training=True)
        return y * y.sum().item() if waits else y

    model = Run(run).to(cuda)
    fast = fcb.graphed(model)
    stream = torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="^graphed: the forward of Run cannot be captured: "):
            fast(image(cuda))
        assert (
            torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing() and fast.graphs == 0
        )
        assert 0.3 < F.dropout(torch.ones(10_000, device=cuda), 0.5).count_nonzero().item() / 10_000 < 0.7
        other = net().to(cuda)
        assert_follows(fcb.graphed(other), other, image(cuda))
        graph, y = torch.cuda.CUDAGraph(), torch.zeros(4, device=cuda)
        with torch.cuda.graph(graph):
            y.add_(1)
        graph.replay()
        assert y.sum() == 4
    waits = False
    x = image(cuda)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(fast(x), expected)


@torch.no_grad()
def test_workspaces_outlive_other_graphs(cuda: str) -> None:
    """PyTorch frees cuBLAS' workspaces of a stream with any graph of it. Graphs that are left still have theirs: what is
    allocated and filled meanwhile neither changes their results nor is changed by them."""
    model = nn.Sequential(nn.Linear(640, 640), nn.ReLU(), nn.Linear(640, 640)).eval().to(cuda, torch.bfloat16)
    fast = fcb.graphed(model, max_graphs=2)
    xs = [torch.randn(n, 640, device=cuda, dtype=torch.bfloat16) for n in (32768, 8, 64, 2048)]
    expected = [model(x) for x in xs]
    other = fcb.graphed(copy.deepcopy(model), max_graphs=1)
    assert torch.equal(fast(xs[0]), expected[0])
    for i in (1, 2, 3, 1, 2, 3):
        assert torch.equal(fast(xs[i]), expected[i])  # one graph goes, the first stays
        assert torch.equal(other(xs[i]), expected[i])
        gc.collect()
        filled = [torch.full((8 << 20,), 5.0, device=cuda) for _ in range(8)]
        assert torch.equal(fast(xs[0]), expected[0]) and torch.equal(other(xs[i]), expected[i])
        assert all((f == 5).all() for f in filled)
        del filled


@torch.no_grad()
def test_memory_comes_back(cuda: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 3, 3, padding=1)).eval().to(cuda)
    fast = fcb.graphed(model, max_graphs=1)
    x = torch.randn(8, 3, 256, 256, device=cuda)  # 134 MB between the convolutions

    def reserved() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    fast(x)
    fast.clear()
    before = reserved()
    fast(x)
    assert reserved() >= before + (128 << 20)
    fast.clear()
    assert reserved() <= before + (32 << 20)
    sizes = []
    for n in (8, 7, 6, 8, 7, 6, 8, 7, 6):  # one pool after the other, or the same: never all of them
        fast(x[:n])
        sizes.append(reserved())
    assert max(sizes) <= before + 2 * (sizes[0] - before) + (64 << 20)
    del fast
    assert reserved() <= before + (32 << 20)


@torch.no_grad()
def test_graphs_of_two_models_in_two_threads(cuda: str) -> None:
    """Captures, while other threads replay, free graphs and allocate."""
    models = [Run(lambda m, x: m.b(m.c(x)).relu() + m.c(x)).to(cuda) for _ in range(4)]
    xs = [image(cuda, n) for n in range(1, 7)]
    expected = [[model(x) for x in xs] for model in models]
    torch.cuda.synchronize()

    def work(i: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            fast = fcb.graphed(models[i], max_graphs=3)
            for _ in range(2):
                for x, theirs in zip(xs, expected[i], strict=True):
                    for _ in range(3):
                        assert torch.equal(fast(x), theirs)

    in_threads(4, work)


@torch.no_grad()
def test_captures_of_others_on_cuda(cuda: str) -> None:
    model = net().to(cuda)
    fast = fcb.graphed(model)
    x = image(cuda)
    expected = fast(x)
    graph, y = torch.cuda.CUDAGraph(), torch.zeros(4, device=cuda)
    with (
        pytest.raises(RuntimeError, match="^graphed: the current stream is being captured already"),
        torch.cuda.graph(graph),
    ):
        y.add_(1)
        fast(x)
    assert torch.equal(fast(x), expected) and fast.graphs == 1


@torch.no_grad()
def test_devices_do_not_mix(cuda: str) -> None:
    model = Run(lambda m, x, y=None: m.c(x)).to(cuda)
    fast = fcb.graphed(model)
    with pytest.raises(
        ValueError, match="^graphed: the arguments have tensors on cpu and cuda:0, expected one device$"
    ):
        fast(image(cuda), torch.zeros(1))
    model.b.running_mean = model.b.running_mean.cpu()
    with pytest.raises(
        ValueError, match="^graphed: 'b.running_mean' of the model is on cpu, and the arguments are on cuda:0$"
    ):
        fast(image(cuda))
    model.to(cuda)
    assert_follows(fast, model, image(cuda))
    with pytest.raises(
        TypeError,
        match="^graphed: the model returned a Tensor of layout torch.strided on cpu, expected strided tensors on cuda:0$",
    ):
        fcb.graphed(Run(lambda m, x: torch.zeros(1)).to(cuda))(image(cuda))
    model.cpu()
    x = image("cpu")
    assert torch.equal(fast(x), model(x))


@torch.no_grad()
def test_another_device_than_the_current_one(two_gpus: tuple[str, str]) -> None:
    model = net().to(two_gpus[1])
    fast = fcb.graphed(model)
    for _ in range(3):
        x = image(two_gpus[1])
        assert torch.equal(fast(x), model(x))
    model.to(two_gpus[0])
    x = image(two_gpus[0])
    assert torch.equal(fast(x), model(x)) and torch.cuda.current_device() == 0
