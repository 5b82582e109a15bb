"""Convolutions of one dimension and of three by kernels that have two, where they are as good as two."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import emulated
import fused_conv_bn as fcb
import train_problems
from common import CONV_ALGORITHMS, RESIDUALS
from conv_problems import check, make

CASES: dict[str, tuple[Any, ...]] = {
    "1-D": ((2, 3, 301), (16, 3, 7), 2, 3),
    "1xRxS": ((2, 16, 3, 9, 11), (24, 16, 1, 3, 3), (1, 2, 1), (0, 1, 1)),
    "1xRxS of few channels": ((2, 3, 3, 19, 21), (24, 3, 1, 3, 5), (1, 2, 1), (0, 1, 2), (1, 1, 2)),
    "1xRxS, depthwise": ((2, 16, 3, 9, 11), (16, 1, 1, 3, 3), 1, (0, 1, 1), 1, 16),
    "Tx1x1": ((2, 16, 9, 5, 4), (40, 16, 3, 1, 1), (2, 1, 1), (1, 0, 0)),
    "Tx1x1 of few channels": ((2, 5, 9, 5, 7), (40, 5, 3, 1, 1), 1, (1, 0, 0), (2, 1, 1)),
    "1x1xS": ((2, 24, 3, 4, 21), (16, 24, 1, 1, 5), 1, (0, 0, 2)),
    "1x1x1": ((2, 24, 3, 5, 7), (40, 24, 1, 1, 1)),
    "1x1x1 of a pixel": ((3, 24, 1, 1, 1), (40, 24, 1, 1, 1)),
    "1x1x1 that skips images": ((2, 24, 5, 4, 3), (16, 24, 1, 1, 1), (2, 1, 1)),
}
NOT_OF_TWO: dict[str, tuple[Any, ...]] = {
    "3x3x3": ((1, 8, 5, 6, 7), (16, 8, 3, 3, 3), 1, 1),
    "1x1x1 that skips pixels": ((1, 8, 5, 6, 7), (16, 8, 1, 1, 1), 2),
    "1x3x3 that skips images": ((1, 8, 5, 6, 7), (16, 8, 1, 3, 3), (2, 1, 1), (0, 1, 1)),
    "1x3x3 with images of padding": ((1, 8, 5, 6, 7), (16, 8, 1, 3, 3), 1, 1),
}


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    def choose(algorithm: str) -> None:
        for name, more in (("conv_scale_shift", {}), ("conv_bn_scale_train", {"statistics": "from_output"})):
            function = functools.partial(getattr(emulated, name), algorithm=algorithm, **more)
            monkeypatch.setattr(fcb, name, function)

    return choose


@pytest.mark.parametrize("name", CASES)
def test_evaluation(name, use, generator):
    """By every algorithm that takes it, in both layouts."""
    took = set()
    for i, algorithm in enumerate(CONV_ALGORITHMS[:-1]):
        use(algorithm)
        for formats in ("cc", "ll", "lc") if len(CASES[name][0]) > 3 else ("cc",):
            residual = RESIDUALS[(i + len(name)) % 3]
            call = make(
                *(generator, "cpu", torch.float16, *CASES[name]), formats=formats, residual=residual, activation="silu"
            )
            if check(call, strides=False):
                took.add((algorithm, formats))
    names = {algorithm for algorithm, _ in took}
    assert names & {"stem_sm80", "depthwise"}, took
    contiguous_or_few = any(word in name for word in ("1-D", "few", "depthwise", "of a pixel"))
    assert ("gemm_sm90" in names) != contiguous_or_few, took


@pytest.mark.parametrize("name", NOT_OF_TWO)
def test_what_needs_three(name, use, generator):
    for algorithm in CONV_ALGORITHMS[:-1]:
        use(algorithm)
        assert make(generator, "cpu", torch.float16, *NOT_OF_TWO[name], formats="ll").ours() is None


def test_windows_over_rows_and_columns_take_channels_last(use, generator):
    use("stem_sm80")
    problem = CASES["1xRxS of few channels"]
    assert make(generator, "cpu", torch.float16, *problem, formats="cc").ours() is None
    assert check(make(generator, "cpu", torch.float16, *problem, formats="lc"), strides=False)


@pytest.mark.parametrize("name", ["1-D", "1xRxS", "Tx1x1", "1x1x1"])
def test_training(name, use, generator, monkeypatch):
    monkeypatch.setattr(train_problems, "adds_in_float32", lambda x: True)
    size, weight, *window = CASES[name]
    stride, padding, dilation = (*window, *(1, 0, 1)[len(window) :])[:3]
    use("gemm_sm90" if name != "1-D" else "stem_sm80")
    train_problems.check_stored_statistics(
        *(size, weight, stride, padding, dilation, 1),
        **dict(dtype=torch.float16, device="cpu", mean=50, generator=generator),
        **dict(activation="relu", residual="first"),
    )
