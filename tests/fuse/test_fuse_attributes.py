"""Forwards that change attributes and buffers of themselves or of what they call; attributes that change behind a snapshot."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn._fuse import entry
from fused_conv_bn._fuse.guard import STATE


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.register_buffer("calls", torch.zeros(()))

    def through(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))

    def change(self) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self.change()
        return self.through(x)


class CountsInPlace(Base):
    def change(self) -> None:
        self.calls += 1


class ReplacesBuffer(Base):
    def change(self) -> None:
        self.calls = self.calls * 0.9 + 1


class ReplacesStatistics(Base):
    def change(self) -> None:
        self.bn.running_mean = self.bn.running_mean * 0.5


class SetsEps(Base):
    def change(self) -> None:
        self.bn.eps = 0.1


class SetsMomentum(Base):
    def change(self) -> None:
        self.bn.momentum = 0.5


class SetsStride(Base):
    def change(self) -> None:
        self.conv.stride = (2, 2)


class TakesOtherStatistics(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.bn.eval()
        y = self.through(x)
        self.bn.train(self.training)
        return y


class FlipsItsMode(Base):
    def forward(self, x: Tensor) -> Tensor:
        was = self.training
        self.train(not was)
        y = self.through(x)
        self.train(was)
        return y


class Around(nn.Module):
    """The one that changes something is a part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.conv, self.bn = part, nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.part(x)))


KINDS = (
    *(CountsInPlace, ReplacesBuffer, ReplacesStatistics, SetsEps, SetsMomentum, SetsStride),
    *(TakesOtherStatistics, FlipsItsMode),
)


@pytest.mark.parametrize("is_part", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("of", KINDS)
def test_forwards_that_change_something(of: type[Base], training: bool, is_part: bool) -> None:
    """Results and state of three calls, a copy, and the model as it was before."""
    model: nn.Module = Around(of()) if is_part else of()
    model.train(training)
    fused = fcb.fuse(copy.deepcopy(model))
    for _ in range(3):
        x = torch.randn(4, 3, 9, 9)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fused.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(fused)(x), copy.deepcopy(model)(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fcb.unfuse(fused)(x), model(x), rtol=1e-4, atol=1e-5)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "stride": lambda m: setattr(m[3], "stride", (2, 2)),
    "padding": lambda m: setattr(m[3], "padding", (1, 1)),
    "dilation": lambda m: setattr(m[0], "dilation", (2, 2)),
    "eps": lambda m: setattr(m[1], "eps", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_snapshot_sees_attributes(change: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    plain = copy.deepcopy(model.eval())
    x = torch.randn(2, 3, 16, 16)
    fused = fcb.fuse(model, x, freeze=True)
    before = fused(x)
    for m in (fused, plain):
        CHANGES[change](m)
    got = fused(x)
    with torch.no_grad():
        torch.testing.assert_close(got, plain(x), rtol=1e-4, atol=1e-5)
    assert got.shape != before.shape or not torch.allclose(got, before)


MIXED = ("small, large", "large, small", "evaluation, training")


@pytest.mark.parametrize("order", MIXED)
@pytest.mark.parametrize("kind", ["module", "fused"])
def test_calls_before_one_backward(kind: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and PyTorch's, of one BatchNorm, as a head has it for several levels. F.batch_norm writes the statistics that others
    have kept without a word to autograd, and so do we."""
    monkeypatch.setattr("fused_conv_bn.conditions.LEAST_OF_STEPS", {True: 1 << 15, False: 1 << 17})
    own = fcb.ConvBnScale2d(16, 16, 3, activation="relu")
    plain = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    plain[0].load_state_dict(own.conv.state_dict())
    model: nn.Module = own if kind == "module" else fcb.fuse(copy.deepcopy(plain))
    small, large = torch.randn(2, 16, 16, 16), torch.randn(2, 16, 72, 72)
    first, second = (large, small) if order == "large, small" else (small, large)
    for m in (model, plain):
        m.train(order != "evaluation, training")
        y = m(first).square().sum()
        (y + m.train()(second).square().sum()).backward()
    ours, theirs = ([p.grad for p in m.parameters()] for m in (model, plain))
    largest = max(float(g.abs().max()) for g in theirs)  # a convolution's bias has none but roundings
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * largest)


def _add(z: Tensor, x: Tensor) -> Tensor:
    z += x
    return torch.relu(z)


# What is added to, and how.
SUMS_IN_PLACE: dict[str, Callable[[AddsInPlace, Tensor], Tensor]] = {
    "operator": lambda m, x: _add(m.bn(m.conv(x)), x),
    "method": lambda m, x: torch.relu(m.bn(m.conv(x)).add_(x)),
    "behind a product for each channel": lambda m, x: _add(m.bn(m.conv(x)) * m.scale, x),
    "behind a gate": lambda m, x: _add((z := m.bn(m.conv(x))) * torch.sigmoid(z.mean((2, 3), keepdim=True)), x),
    "behind a wider gate": lambda m, x: _add(
        (z := m.bn(m.conv(x))).bfloat16() * torch.sigmoid(z.mean((2, 3), keepdim=True)), x
    ),
}


class AddsInPlace(Base):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, 8).view(8, 1, 1))
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return SUMS_IN_PLACE[self.name](self, x)


@pytest.mark.parametrize("name", SUMS_IN_PLACE)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_in_place_keep_their_dtype(dtype: torch.dtype, training: bool, name: str) -> None:
    """Under autocast a convolution's result is of 16 bits, and what is added to it need not be."""
    model = AddsInPlace(name).train(training)
    fused = fcb.fuse(copy.deepcopy(model))
    for enabled in (True, False):
        for grad in (True, False):
            x = torch.randn(2, 8, 9, 9).to(dtype if enabled else torch.float32)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.set_grad_enabled(grad):
                expected, got = model(x), fused(x)
            assert got.dtype is expected.dtype
            torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)
    if dtype is torch.bfloat16:  # else the sum has another dtype by PyTorch's ops, and the model's forward runs
        assert not fcb.report(fused).not_captured


class ReadsItsClass(Base):
    """An attribute, through a method and a comprehension, and methods of both kinds."""

    gain, scale, shape, offsets = 2.0, 1.5, (8, -1), [0.5, 0.25]

    @staticmethod
    def last(y: Tensor) -> Tensor:
        return y - 1

    @property
    def factor(self) -> float:
        return self.gain

    def through(self, x: Tensor) -> Tensor:
        y = super().through(x)
        return self.last(y.flatten(2) * self.factor + sum([n * self.scale for n in self.offsets]))

    def forward(self, x: Tensor) -> Tensor:
        return self.through(x).unflatten(1, self.shape)


CLASS_CHANGES: dict[str, Callable[[type], None]] = {
    "a number": lambda of: setattr(of, "gain", 3.0),
    "one in a comprehension": lambda of: setattr(of, "scale", 0.5),
    "a tuple": lambda of: setattr(of, "shape", (4, 2)),
    "a list, in place": lambda of: of.offsets.append(1.0),
    "a static method": lambda of: setattr(of, "last", staticmethod(torch.sigmoid)),
    "a method": lambda of: setattr(of, "through", lambda self, x: Base.through(self, x).flatten(2) * 2),
    "an attribute is gone": lambda of: delattr(of, "gain"),
}


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("is_part", [False, True])
@pytest.mark.parametrize("change", CLASS_CHANGES)
def test_class_attributes_that_change(change: str, is_part: bool, freeze: bool) -> None:
    of = type("Own", (ReadsItsClass,), {"gain": 2.5, "offsets": [0.5]})
    plain: Any = of().eval()
    plain = nn.Sequential(nn.Identity(), plain).eval() if is_part else plain
    model = fcb.fuse(copy.deepcopy(plain), freeze=freeze)
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
        CLASS_CHANGES[change](of)
        want = plain(x)
        for _ in range(2):
            torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert fcb.report(model).counts == {"fused": 2}


def test_what_a_forward_does_not_mention_of_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count of instances, and what copying leaves in a class: the capture holds."""

    class Counted(Base):
        made, change = 0, lambda self: None

        def __init__(self) -> None:
            super().__init__()
            type(self).made += 1

    model = fcb.fuse(Counted().eval())
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        want = model(x)
        copy.deepcopy(model), Counted()

        def again(*_: object) -> None:
            raise AssertionError("it is captured again")

        monkeypatch.setattr(entry, "capture", again)
        assert torch.equal(model(x), want)


class AttrDict(dict):  # type: ignore[type-arg]
    __getattr__ = dict.__getitem__


class ReturnsItself:
    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any) -> Any:
        return self


class ReturnsAnother:
    def __getattr__(self, name: str) -> Any:
        return ReturnsAnother()


class OfInstancesOnly:
    def __get__(self, of: Any, cls: type) -> Any:
        if of is None:
            raise RuntimeError("it is of instances")
        return 2.0


class Unequal:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("it is compared")

    __hash__ = None  # type: ignore[assignment]


def in_itself(of: type) -> Any:
    found: Any = of([0])
    found.append(found)
    return found


def key_in_itself() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["itself"] = [found]
    return found


def deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(3000):
        found = [found]
    return found


def its_own_wrapper() -> Callable[[Any], float]:
    def method(self: Any) -> float:
        return 2.0

    method.__wrapped__ = method  # type: ignore[attr-defined]
    return method


ODD: dict[str, Callable[[], Any]] = {
    "a dictionary with attributes": lambda: AttrDict(scale=2.0),
    "what returns itself": ReturnsItself,
    "what returns another": ReturnsAnother,
    "a descriptor of instances": OfInstancesOnly,
    "a wrapper of itself": its_own_wrapper,
    "no comparison": Unequal,
    "a list in itself": lambda: in_itself(list),
    "a dictionary in itself": key_in_itself,
    "lists in lists": deep,
}


@pytest.mark.parametrize("of_instance", [False, True])
@pytest.mark.parametrize("odd", ODD)
def test_odd_attributes(odd: str, of_instance: bool) -> None:
    """The guard looks at them, asks them nothing, and holds; another one in the place is seen."""

    class Reads(Base):
        scale = 1.5

        def forward(self, x: Tensor) -> Tensor:
            self.odd  # noqa: B018
            return self.through(x) * self.scale

    plain: Any = Reads().eval()
    place = plain if of_instance else Reads
    place.odd = ODD[odd]()
    model = fcb.fuse(plain)
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        want = Reads.forward(plain, x)
        for _ in range(3):
            torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        assert model.__dict__[STATE].captures == 1
        place.odd = ODD[odd]()
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        Reads.scale = 3.0
        torch.testing.assert_close(model(x), want * 2, rtol=1e-4, atol=1e-5)
    assert fcb.report(model).counts == {"fused": 2}


def with_wraps(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Any:
        return forward(self, x) * self.gain

    return wrapper


def without_wraps(forward: Any) -> Any:
    return lambda self, x: forward(self, x)


class Child(nn.Module):
    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(8)

    def run(self, y: Tensor) -> Tensor:
        return torch.relu(self.bn(y)) * self.gain

    def forward(self, y: Tensor) -> Tensor:
        return torch.relu(self.bn(y))


def parent(forward: Callable[[Any, Tensor], Tensor]) -> type:
    def __init__(self: Any) -> None:
        nn.Module.__init__(self)
        self.conv, self.child = nn.Conv2d(3, 8, 3), type("OwnChild", (Child,), {})()

    return type("Parent", (nn.Module,), {"__init__": __init__, "forward": forward})


def own(forward: Callable[[Any, Tensor], Tensor], **others: Any) -> type:
    return type("Own", (Base,), {"gain": 1.0, "forward": forward, **others})


# A class whose forward has a factor, and the class that the factor is set on.
READS: dict[str, tuple[Callable[[], type], Callable[[Any], type]]] = {
    "the fused class": (lambda: own(lambda m, x: m.through(x) * m.gain), type),
    "a wrapper": (lambda: own(with_wraps(Base.through)), lambda m: type(m).__mro__[1]),
    "a wrapper that names no other": (
        lambda: own(without_wraps(lambda m, x: m.through(x) * m.gain)),
        lambda m: type(m).__mro__[1],
    ),
    "a decorator of PyTorch's": (
        lambda: own(torch.no_grad()(lambda m, x: m.through(x) * m.gain)),
        lambda m: type(m).__mro__[1],
    ),
    "a constant name": (lambda: own(lambda m, x: m.through(x) * getattr(m, "gain")), lambda m: type(m).__mro__[1]),  # noqa: B009
    "a method with arguments": (
        lambda: own(lambda m, x: m.through(x) * m.times(), times=functools.partialmethod(lambda m, n: m.gain * n, 1.0)),
        lambda m: type(m).__mro__[1],
    ),
    "__getattr__": (
        lambda: own(
            lambda m, x: m.through(x) * m.dynamic,
            __getattr__=lambda m, name: m.gain if name == "dynamic" else nn.Module.__getattr__(m, name),
        ),
        lambda m: type(m).__mro__[1],
    ),
    "a child": (lambda: parent(lambda m, x: m.child(m.conv(x)) * m.child.gain), lambda m: type(m.child)),
    "a child that is not called": (
        lambda: parent(lambda m, x: torch.relu(m.child.bn(m.conv(x))) * m.child.gain),
        lambda m: type(m.child),
    ),
    "a child's method": (lambda: parent(lambda m, x: m.child.run(m.conv(x))), lambda m: type(m.child)),
    "a child's base": (lambda: parent(lambda m, x: m.child.run(m.conv(x))), lambda m: Child),
}


@pytest.mark.parametrize("kind", READS)
def test_where_class_attributes_are_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, place = READS[kind]
    model: Any = fcb.fuse(make()().eval())
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(model(x), before)
        monkeypatch.setattr(place(model), "gain", 3.0, raising=False)
        torch.testing.assert_close(model(x), before * 3)
        assert model.__dict__[STATE].captures == 2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("is_part", [False, True])
@pytest.mark.parametrize("kind", ["a number", "a list", "a dictionary"])
def test_forwards_that_count_in_their_class(kind: str, is_part: bool, training: bool) -> None:
    """It is never captured, and its class has what eager calls leave."""

    class Counts(Base):
        count, seen, last = 0, [], {}  # type: ignore[var-annotated]

        def forward(self, x: Tensor) -> Tensor:
            y = self.through(x)
            if kind == "a number":
                Counts.count += 1
            elif kind == "a list":
                self.seen.append(1)
            else:
                self.last["y"] = y
            return y

    plain: nn.Module = Around(Counts()) if is_part else Counts()
    plain.train(training)
    model = fcb.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 3, 9, 9)
    for n in range(1, 41):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
        if kind == "a number":
            assert Counts.count == 2 * n
        elif kind == "a list":
            assert len(Counts.seen) == 2 * n
        else:
            assert type(Counts.last["y"]) is Tensor
    assert model.__dict__[STATE].captures == 1
    report = fcb.report(model)
    assert "it changes its own attributes, or makes tensors of its own" in str(report)
    assert report.counts == ({"left": 2, "fused": 2} if is_part else {"left": 2})


def test_what_a_part_counts_in_a_base_of_both() -> None:
    """The part is left, and not the model, whose class has the same base."""

    class Counting(nn.Module):
        count = 0

    class Part(Counting, Base):
        def forward(self, x: Tensor) -> Tensor:
            Counting.count += 1
            return self.through(x)

    class Whole(Counting, Around):
        pass

    model = fcb.fuse(Whole(Part()).eval())
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        for n in range(1, 41):
            model(x)
            assert Counting.count == n
    assert fcb.report(model).counts == {"left": 2, "fused": 2}
