"""Which devices the tests run on, and the same seeds and the same arithmetic for each of them.

The only skip policy: without a usable GPU, tests on "cuda" are skipped, and tests that take ``two_gpus`` are skipped
with fewer than two. FUSED_CONV_BN_REQUIRE_CUDA=1 (or 2) demands that many GPUs: what lacks one then fails.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import common
from common import CONV_ALGORITHMS, CONV_STATISTICS, DEVICES

REQUIRED_GPUS = int(os.environ.get("FUSED_CONV_BN_REQUIRE_CUDA") or 0)


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _need_gpus(count: int) -> None:
    if _gpus() >= count:
        return
    message = f"needs {count} GPU(s), {_gpus()} usable"
    if count <= REQUIRED_GPUS:
        pytest.fail(f"{message}, and FUSED_CONV_BN_REQUIRE_CUDA={REQUIRED_GPUS}", pytrace=False)
    pytest.skip(message)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "two_gpus: takes two GPUs (set by the fixture of that name)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "two_gpus" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.two_gpus)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        _need_gpus(1)
    return request.param


CONV_DEVICES = [("cpu", "by rule"), *(("cuda", name) for name in ("by rule", *CONV_ALGORITHMS))]
TRAIN_DEVICES = [*((*pair, "by rule") for pair in CONV_DEVICES), *(("cuda", "stem_sm90", s) for s in CONV_STATISTICS)]


def _forced(monkeypatch: pytest.MonkeyPatch, device: str, algorithm: str, statistics: str = "by rule") -> Iterator[str]:
    import fused_conv_bn as fcb  # most tests of what builds the libraries run without them

    if device == "cuda":
        _need_gpus(1)
    monkeypatch.setattr(common, "forced_algorithm", algorithm)
    with fcb.use_algorithm(algorithm, statistics):
        yield device


@pytest.fixture(params=CONV_DEVICES, ids="-".join)
def conv_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device for conv_scale_shift, with each of its algorithms forced there in turn."""
    yield from _forced(monkeypatch, *request.param)


@pytest.fixture(params=TRAIN_DEVICES, ids="-".join)
def train_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same for conv_bn_scale_train, and each source of statistics."""
    yield from _forced(monkeypatch, *request.param)


@pytest.fixture
def two_gpus() -> tuple[str, str]:
    _need_gpus(2)
    return "cuda:0", "cuda:1"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds, and cuDNN in true float32 with deterministic algorithms: its defaults, TF32 and whatever algorithm is
    fastest today, would drown the errors that tests measure and make exact comparisons a matter of chance."""
    torch.manual_seed(10)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
