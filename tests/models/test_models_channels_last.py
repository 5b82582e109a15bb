"""Whole models that are contiguous and run in channels_last inside: eager's values and strides.

On the CPU nothing gains by it, so that the rule is replaced, or asked about another device.
"""

from __future__ import annotations

import copy
import importlib.util
import os

import pytest
import torch
from torch import Tensor

import fused_conv_bn as fcb
from fused_conv_bn import conditions
from fused_conv_bn._fuse import blocks
from fused_conv_bn._fuse import channels_last as inside

PACKAGES = ("torchvision", "timm", "ultralytics", "segmentation_models_pytorch")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
if MISSING and not int(os.environ.get("FUSED_CONV_BN_REQUIRE_MODELS") or 0):
    needs = f"needs {', '.join(MISSING)}: pip install --no-deps -r requirements/models.txt"
    pytest.skip(needs, allow_module_level=True)

import zoo  # noqa: E402

explain_problem = torch.ops.fused_conv_bn._explain_problem

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


def on_an_h200(block: blocks.Block, x: Tensor, residual: Tensor | None) -> str | None:
    """The algorithm for 16 bits."""
    conv = block.conv_twin
    if conv is None or not block.is_quick:
        return None
    extents = *x.shape, conv.out_channels, *conv.kernel_size
    size = conditions.conv_output_size(x.shape, conv.weight.shape, conv.stride, conv.padding, conv.dilation)[2:]
    window = *conv.stride, *conv.padding, *conv.dilation, conv.groups
    rest = 2, x.stride(1) == 1 and x.shape[1] > 1, residual is not None, False
    h200 = 90, 132, 232448, 233472, True
    explained: str = explain_problem([*extents, *size, *window, *map(int, rest)], [*map(int, h200)], "", "none")
    return explained


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "problem 73"])
def test_rule(name: str, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of general convolutions go inside, by the choices for an H200. Where somebody else has the weights, they
    are converted at each call: a small batch is not worth that, unless nearly all of them are of 1x1 pixels."""
    monkeypatch.setattr(blocks.Block, "algorithm", on_an_h200)
    model = fcb.fuse(zoo.make(name))
    others = list(model.parameters()) if held else []
    with torch.no_grad():
        zoo.CASES[name].run(model, 0)
    expected = name != "problem 73" and (name == "mobilenet_v2" or not held)
    assert fcb.report(model).channels_last == ([""] if expected else [])
    assert all(p.is_contiguous() for p in others)


@pytest.mark.parametrize("name", INSIDE)
def test_whole_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "pays", lambda seen: True)
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
