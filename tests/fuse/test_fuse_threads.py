"""fuse() where other threads call modules while one captures a model."""

from __future__ import annotations

import math
import threading
from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_conv_bn as fcb


class Waits(nn.Module):
    """Whose forward is looked up before a capture ends, and called behind it."""

    entered, goes_on = threading.Event(), threading.Event()

    @property
    def forward(self) -> Any:  # type: ignore[override]
        Waits.entered.set()
        assert Waits.goes_on.wait(20)
        return lambda x: x * ceil(1.5)


class WaitsForIt(nn.Module):
    """Whose forward ends when the other thread is in its call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)).relu()
        if isinstance(x, torch.fx.Proxy):
            threading.Thread(target=call).start()
            assert Waits.entered.wait(20)
        return y


results: list[Any] = []


def call() -> None:
    try:
        results.append(Waits()(torch.ones(2)))
    except Exception as error:
        results.append(error)


def test_a_call_that_a_capture_ends_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.fx replaces nn.Module.__call__ for all threads: who is in it by then goes on as without it."""
    results.clear()
    Waits.entered.clear()
    Waits.goes_on.clear()
    model = fcb.fuse(WaitsForIt().eval())
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        y = model(x)
        assert str(fcb.report(model)).count("fused") == 3  # twice, and in the sum
        Waits.goes_on.set()
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join(20)
        assert torch.equal(results[0], torch.full((2,), 2.0)), results
        assert ceil is math.ceil  # nothing was replaced in this module for good
        torch.testing.assert_close(y, fcb.unfuse(model)(x))
