"""Whole models that are contiguous and run in channels_last inside: eager's values and strides.

On the CPU nothing gains by it, so that the rule is replaced: whatever may goes inside.
"""

from __future__ import annotations

import copy
import importlib.util
import os

import pytest
import torch

import fused_conv_bn as fcb
from fused_conv_bn._fuse import inside

PACKAGES = ("torchvision", "timm", "ultralytics", "segmentation_models_pytorch")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
if MISSING and not int(os.environ.get("FUSED_CONV_BN_REQUIRE_MODELS") or 0):
    needs = f"needs {', '.join(MISSING)}: pip install --no-deps -r requirements/models.txt"
    pytest.skip(needs, allow_module_level=True)

import zoo  # noqa: E402

# What goes inside: the whole, or this and as many parts.
WHOLE = "", 1
INSIDE = dict.fromkeys(zoo.CASES, WHOLE) | {
    "faster_rcnn": ("backbone", 2),
    "mask_rcnn": ("backbone", 4),
    "yolo11n": ("model.2.m.0", 30),
    "rtdetr-l": ("model.28.input_proj.0", 3),
    "unet++": ("decoder", 1),
    "r3d_18": ("", 0),
}


@pytest.fixture(autouse=True)
def goes_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "DEVICES", {"cpu"})
    monkeypatch.setattr(inside, "pays", lambda seen: True)


@pytest.mark.parametrize("name", INSIDE)
def test_whole_models(name: str) -> None:
    case = zoo.CASES[name]
    plain = zoo.make(name)
    fused = fcb.fuse(copy.deepcopy(plain))
    limit = 3e-6 if case.before_selection is None else 1e-5
    with torch.no_grad():
        for index in (0, 1, 0):
            got, wanted = case.run(fused, index), case.run(plain, index)
            assert [(t.shape, t.stride()) for t in got] == [(t.shape, t.stride()) for t in wanted]
            for a, b in zip(got, wanted, strict=True):
                assert float((a - b).abs().max()) <= limit * float(b.abs().max())
    paths = fcb.report(fused).channels_last
    assert len(paths) == INSIDE[name][1] and (not paths or INSIDE[name][0] in paths)
    fcb.unfuse(fused)
    for a, b in zip(fused.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
