"""Random calls of the CUDA kernels, on the processor."""

from __future__ import annotations

import pytest

import emulated
from fuzz import __main__ as program
from fuzz import truth
from fuzz.problem import Problem
from fuzz.run import Failure, check


def test_some_seconds():
    assert program.main(["--device", "emulator", "--first", "0", "--count", "120", "--seconds", "40"]) == 0


def test_gradients_of_max_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    window = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
    p = Problem("max_pool2d", "float16", (2, 8, 9, 10), "channels_last", gradients=True, **window)
    called = []
    original = emulated._call
    monkeypatch.setattr(emulated, "_call", lambda *arguments: called.append(arguments[1]) or original(*arguments))
    assert check(p, "emulator")
    assert called == ["emulated_max_pool_train"] * 2 + ["emulated_max_pool_backward"] * 2


# So small that one of its values is not finite.
GROUPS = {"shape": (1, 16, 1, 3), "layout": "channels_last", "filters": 16, "groups": 2}
GROUPS |= {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}


@pytest.mark.parametrize("op", ["conv_scale_shift", "conv_bn_scale", "conv_bn_scale_train"])
def test_an_infinity_in_a_group(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """gemm_sm90 makes NaN of its neighbours' results at its place: no failure, but one it is in all others."""
    p = Problem(op, "float16", algorithm="gemm_sm90", statistics="from_output", special="non-finite", **GROUPS)
    assert check(p, "emulator")
    original = truth.spread
    monkeypatch.setattr(truth, "spread", lambda y, *others: y)
    with pytest.raises(Failure, match="elements that are not finite where exact ones are"):
        check(p, "emulator")
    if op == "conv_bn_scale_train":  # an infinity is everywhere in a batch's statistics
        return

    def elsewhere(y, exact, forward, training):
        y = y.clone()
        y[0, 0][forward.z[0].isfinite().all(0)] = float("nan")
        return original(y, exact, forward, training)

    monkeypatch.setattr(truth, "spread", elsewhere)
    with pytest.raises(Failure, match="elements that are not finite where exact ones are"):
        check(p, "emulator")
