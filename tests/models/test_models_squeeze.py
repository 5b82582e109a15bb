"""Squeeze-and-excite blocks of whole models: each squeeze is one op, and its gate goes on as it did. As on CUDA."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fused_conv_bn as fcb
from fused_conv_bn._fuse import gates, pools, squeezes

PACKAGES = ("torchvision", "timm")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
if MISSING and not int(os.environ.get("FUSED_CONV_BN_REQUIRE_MODELS") or 0):
    needs = f"needs {', '.join(MISSING)}: pip install --no-deps -r requirements/models.txt"
    pytest.skip(needs, allow_module_level=True)

import vision_ops  # noqa: E402

vision_ops.provide()

import timm  # noqa: E402
import timm.layers  # noqa: E402
import torchvision.models as tv  # noqa: E402

SILU, RELU = "mean conv silu conv sigmoid", "mean conv relu conv sigmoid"
HARD = "mean conv relu conv hardsigmoid"
# What is found of the squeezes; how many gates go into a convolution's group, and how many are alone.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int], int, int]] = {
    "efficientnet_b0": (lambda: tv.efficientnet_b0(weights=None), {SILU: 16}, 16, 0),
    "mobilenet_v3_large": (lambda: tv.mobilenet_v3_large(weights=None), {HARD: 8}, 8, 0),
    "regnet_y_400mf": (lambda: tv.regnet_y_400mf(weights=None), {RELU: 16}, 16, 0),
    "timm, efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), {SILU: 16}, 16, 0),
    "timm, mobilenetv3_large_100": (lambda: timm.create_model("mobilenetv3_large_100"), {HARD: 8}, 8, 0),
    "timm, regnety_002": (lambda: timm.create_model("regnety_002"), {RELU: 13}, 13, 0),
    "timm, seresnet18": (lambda: timm.create_model("seresnet18"), {RELU: 8}, 0, 8),
    "timm's SqueezeExcite": (
        lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), timm.layers.SqueezeExcite(32)),
        {RELU: 1},
        0,
        1,
    ),
}


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for of in (gates, pools, squeezes):
        monkeypatch.setattr(of, "DEVICES", ("cpu", "cuda"))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_groups(name: str, memory_format: torch.memory_format, device: str) -> None:
    make, expected, inside, alone = MODELS[name]
    torch.manual_seed(2)
    model = make().eval().to(device, memory_format=memory_format)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0, 0.1)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    fused = fcb.fuse(copy.deepcopy(model))
    x = torch.randn(2, 3, 64, 64, device=device).contiguous(memory_format=memory_format)
    with torch.no_grad():
        for _ in range(2):
            got, y = fused(x), model(x)
            assert float((got - y).abs().max()) <= 1e-4 * float(y.abs().max()) and got.stride() == y.stride()
    report = fcb.report(fused)
    groups = report.to_dict()["groups"]
    assert {g: n for g, n in groups.items() if g.startswith("mean conv")} == expected
    of_gates = [row.text for row in report.rows if row.module == "gate"]
    assert sum(text.startswith("with ") for text in of_gates) == inside
    assert sum(text.startswith("gate") for text in of_gates) == alone
    assert not report.not_captured
