"""The benchmark's list of networks' layers is what fuse() finds in torchvision's models."""

from __future__ import annotations

import importlib.util
import os

import pytest

from benchmarks import networks

if importlib.util.find_spec("torchvision") is None and not int(os.environ.get("FUSED_CONV_BN_REQUIRE_MODELS") or 0):
    pytest.skip(
        "needs torchvision: pip install --no-deps -r requirements/models.txt",
        allow_module_level=True,
    )

import vision_ops  # noqa: E402

vision_ops.provide()


@pytest.mark.parametrize("name", ["ResNet-18", "MobileNetV3-L", "RegNetY-1.6GF"])
def test_the_layers_of(name: str) -> None:
    listed = [line for line in networks.FILE.read_text().splitlines() if f'"network": "{name}"' in line]
    assert list(networks.lines([name])) == listed, "run: python -m benchmarks.networks"
