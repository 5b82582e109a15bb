"""Which devices the tests run on, and the same seeds and the same arithmetic for each of them.

The only skip policy: without a usable GPU, tests on "cuda" are skipped, and tests that take ``two_gpus`` are skipped
with fewer than two. FUSED_CONV_BN_REQUIRE_CUDA=1 (or 2) demands that many GPUs: what lacks one then fails.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from common import DEVICES
from fused_conv_bn import conditions, reference

sys.path.append(str(Path(__file__).parent / "ops"))  # others test its problems, too

pytest.register_assert_rewrite(
    "conv_problems", "elementwise_problems", "train_problems", "module_pairs", "training_pairs", "building"
)

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


# What the user has tuned is not for the tests, nor is theirs for the user.
_choices = tempfile.TemporaryDirectory()


def pytest_configure(config: pytest.Config) -> None:
    os.environ["FUSED_CONV_BN_CHOICES"] = _choices.name
    config.addinivalue_line("markers", "two_gpus: takes two GPUs (set by the fixture of that name)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "two_gpus" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.two_gpus)


@pytest.fixture(autouse=True)
def small_steps_are_ours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of tests are small. What is faster by PyTorch's ops there is to be tested as well; documents are as they are."""
    if "document" in request.path.stem:
        return
    monkeypatch.setattr(conditions, "LEAST_OF_STEPS", {True: 0, False: 0})


@pytest.fixture
def gelu_of_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """GELU by PyTorch's own kernels: to oneDNN that of an infinity is NaN on some processors."""

    def gelu(x: torch.Tensor) -> torch.Tensor:
        with torch.backends.mkldnn.flags(enabled=False):
            return torch.nn.functional.gelu(x)

    monkeypatch.setitem(reference.ACTIVATIONS, "gelu", gelu)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        _need_gpus(1)
    return request.param


@pytest.fixture
def need_gpus() -> Callable[[int], None]:
    return _need_gpus


@pytest.fixture
def two_gpus() -> tuple[str, str]:
    _need_gpus(2)
    return "cuda:0", "cuda:1"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


@pytest.fixture
def no_leftover_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds, and cuDNN in true float32 with deterministic algorithms: its defaults, TF32 and whatever algorithm is
    fastest today, would drown the errors that tests measure and make exact comparisons a matter of chance."""
    torch.manual_seed(10)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
