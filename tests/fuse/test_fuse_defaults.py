"""Calls that leave out what a forward has defaults for; attributes and tensors that a module has got behind a capture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_conv_bn as fcb

MASK, LIST, DICT = torch.full((1,), 2.0), [1.0], {"k": 1.0}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def through(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class TensorDefault(Base):
    def forward(self, x: Tensor, mask: Tensor = MASK) -> Tensor:
        return self.through(x) * mask


class TensorInDefault(Base):
    def forward(self, x: Tensor, masks: Any = (MASK,)) -> Tensor:
        return self.through(x) * masks[0]


class ListDefault(Base):
    def forward(self, x: Tensor, factors: list[float] = LIST) -> Tensor:
        return self.through(x) * factors[0]


class DictDefault(Base):
    def forward(self, x: Tensor, options: dict[str, float] = DICT) -> Tensor:
        return self.through(x) * options["k"]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("of", [TensorDefault, TensorInDefault, ListDefault, DictDefault])
def test_defaults(of: type[Base], grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every call: what is a tensor is there in the next ones too, and what was changed in place is seen."""
    model = fcb.fuse(of().eval())
    x = torch.randn(2, 3, 6, 6)
    with torch.set_grad_enabled(grad):
        for call in range(4):
            if call == 3:
                monkeypatch.setitem(DICT, "k", 5.0)
                LIST[0] = 5.0
            expected = of.forward(fcb.unfuse(_copy(model)), x)
            torch.testing.assert_close(model(x), expected)
    LIST[0] = 1.0


def _copy(model: Base) -> Base:
    twin = type(model).__mro__[1]()
    twin.load_state_dict(model.state_dict())
    return twin.eval()


class Extra(Base):
    """``inner`` has no tensors of its own, until it has got one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.through(x))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k = 1.0
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(x) * self.k
        extra = getattr(self, "extra", None)
        return y if extra is None else y + extra


def add_buffer(inner: Inner) -> None:
    inner.register_buffer("extra", torch.ones(1))


def add_parameter(inner: Inner) -> None:
    inner.extra = nn.Parameter(torch.ones(1))


def replace_dict(inner: Inner) -> None:
    inner.__dict__ = {**inner.__dict__, "k": 5.0}


@pytest.mark.parametrize("change", [add_buffer, add_parameter, replace_dict])
def test_what_a_module_has_got(change: Any) -> None:
    model = fcb.fuse(Extra().eval())
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        for _ in range(3):
            before = model(x)
        change(model.inner)
        got = model(x)
        fcb.unfuse(model)
        torch.testing.assert_close(got, model(x))
        assert not torch.allclose(got, before)


def test_a_snapshot_is_taken_again_after_a_refusal() -> None:
    """Another thread's call in the middle of load_state_dict() may find a forward that cannot be captured."""
    model = fcb.fuse(Extra().eval(), torch.randn(2, 3, 6, 6), freeze=True)
    state = model.__dict__["_fused_conv_bn"]
    state.reason = "it changes its own attributes"
    model.load_state_dict(model.state_dict())
    assert state.reason is None
