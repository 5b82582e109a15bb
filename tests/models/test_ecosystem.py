"""docs/ecosystem.md as it is written, and accelerate: training in two precisions, and a model that it offloads."""

from __future__ import annotations

import copy
import doctest
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

PACKAGES = ("accelerate", "torchvision", "timm", "ultralytics", "segmentation_models_pytorch")
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
if missing and not int(os.environ.get("FUSED_CONV_BN_REQUIRE_MODELS") or 0):
    pytest.skip(
        f"needs {', '.join(missing)}: pip install --no-deps -r requirements/models.txt", allow_module_level=True
    )

from accelerate import Accelerator, cpu_offload, disk_offload  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

import fused_conv_bn as fcb  # noqa: E402
import zoo  # noqa: E402  (what ultralytics and torchvision need to be imported)

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "ecosystem.md"


@pytest.fixture(autouse=True)
def _one_accelerator() -> Iterator[None]:
    """Its state is global."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_the_document() -> None:
    failed, attempted = doctest.testfile(str(DOCUMENT), module_relative=False)
    assert attempted > 25 and not failed


def network() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 4)),
    )


def images(seed: int) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains(precision: str) -> None:
    """As the plain model, in accumulated steps; and what is left of it is a state that the plain model loads."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    found: list[dict[str, Any]] = []
    for prepare in (lambda m: m, fcb.fuse):
        model = prepare(network())
        before = copy.deepcopy(model.state_dict())
        prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
        for step in range(4):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(images(step)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        found.append(accelerator.unwrap_model(prepared).state_dict())
        assert not torch.equal(before["0.weight"], found[-1]["0.weight"])
    assert fcb.report(model).counts == {"fused": 4}
    network().load_state_dict(found[1])
    tolerance = {} if precision == "no" else {"rtol": 0.02, "atol": 0.02}
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_accelerate_offloads(place: str, tmp_path: Path) -> None:
    """Its hooks bring each layer's weights when it is called: PyTorch's ops run, before and after the first call."""
    plain = network().eval()
    model = fcb.fuse(copy.deepcopy(plain))
    with torch.no_grad():
        want = plain(images(1))
        torch.testing.assert_close(model(images(1)), want)
        device = torch.device("cpu")
        if place == "cpu":
            cpu_offload(model, device)
        else:
            disk_offload(model, str(tmp_path / "weights"), device)
        assert model[0].weight.device.type == "meta"
        for _ in range(2):
            torch.testing.assert_close(model(images(1)), want)


def test_a_network_that_ultralytics_has_fused_runs_as_it_is() -> None:
    torch.manual_seed(1)
    network = zoo.tasks.DetectionModel("yolov8n.yaml", verbose=False).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        network.fuse(verbose=False)
        want = network(x)[0]
        assert torch.equal(fcb.fuse(network)(x)[0], want)
    assert "fused" not in fcb.report(network).counts
