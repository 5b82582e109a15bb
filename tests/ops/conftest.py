"""The devices of the convolutions' tests, with each algorithm forced on CUDA in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import common
import fused_conv_bn as fcb
from common import CONV_ALGORITHMS, CONV_STATISTICS

CONV_DEVICES = [("cpu", "by rule"), *(("cuda", name) for name in ("by rule", *CONV_ALGORITHMS))]
TRAIN_DEVICES = [*((*pair, "by rule") for pair in CONV_DEVICES), *(("cuda", "stem_sm90", s) for s in CONV_STATISTICS)]


def _forced(
    monkeypatch: pytest.MonkeyPatch,
    need_gpus: Callable[[int], None],
    device: str,
    algorithm: str,
    statistics: str = "by rule",
) -> Iterator[str]:
    if device == "cuda":
        need_gpus(1)
    monkeypatch.setattr(common, "forced_algorithm", algorithm)
    with fcb.use_algorithm(algorithm, statistics):
        yield device


@pytest.fixture(params=CONV_DEVICES, ids="-".join)
def conv_device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, need_gpus: Callable[[int], None]
) -> Iterator[str]:
    """A device for conv_scale_shift, with each of its algorithms forced there in turn."""
    yield from _forced(monkeypatch, need_gpus, *request.param)


@pytest.fixture(params=TRAIN_DEVICES, ids="-".join)
def train_device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, need_gpus: Callable[[int], None]
) -> Iterator[str]:
    """The same for conv_bn_scale_train, and each source of statistics."""
    yield from _forced(monkeypatch, need_gpus, *request.param)
