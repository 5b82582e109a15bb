"""torchvision's op ``nms`` where its own library does not load.

PyPI has torchvision for one build of torch only. Next to another one, such as one for the CPU alone, ``import
torchvision`` fails, because it describes to torch ops that its library did not bring. Everything else of it is Python.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The indices of the boxes that are kept, the best ones first: boxes (n, 4), scores (n,)."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    order = scores.argsort(descending=True, stable=True)
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[order, :2])
        high = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        order = order[shared / (area[best] + area[order] - shared) <= iou_threshold]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.long)


def _loads(library: Path) -> bool:
    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return True


def provide() -> None:
    """Makes ``import torchvision`` work, before anything imports it. Each module that needs it may ask."""
    if "ops" in provide.__dict__:
        return
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    libraries = list(Path(found.origin).parent.glob("_C*.so"))
    if libraries and all(map(_loads, libraries)):
        return
    ops = torch.library.Library("torchvision", "DEF")
    ops.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    ops.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    ops.impl("nms", _nms, "CPU")
    provide.__dict__["ops"] = ops  # which takes them back when it is deleted

    import torchvision.extension
    import torchvision.ops

    # roi_align asks the name that it imported, gets False, and takes its version in Python: not compiled, here.
    torchvision.extension._has_ops = lambda: True
    roi_align = sys.modules["torchvision.ops.roi_align"]
    roi_align._roi_align = roi_align._roi_align.__wrapped__
