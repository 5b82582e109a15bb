"""The benchmark of max_pool2d and spatial_mean: the pools of usual networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_conv_bn as fcb

from .common import check, dtype_name, progress, random_tensor
from .stopwatch import Rivals, Stopwatch, pairs_of

NOTE = (
    "max_pool2d as VGG (2x2, stride 2), ResNet and DenseNet (3x3, stride 2, padding 1) have it at batch 1 and 32, "
    "beside F.max_pool2d; spatial_mean of the squeeze-and-excite blocks of EfficientNet-B0 and MobileNetV3, and of "
    "what is in front of their and ResNet's classifiers, at batch 1 and 64, beside input.mean((2, 3)). On the CPU "
    "both are PyTorch's. copy is a clone that moves as many bytes as are read and written."
)
_KINDS = {
    "cuda": ((torch.float16, "channels_last"), (torch.float32, "nchw")),
    "cpu": ((torch.float32, "channels_last"),),
}
_WINDOWS = {"2x2/2": (2, 2, 0), "3x3/2": (3, 2, 1)}
_MAXIMA = [
    *(("2x2/2", c, side) for c, side in ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14))),
    ("3x3/2", 64, 112),
]
_MEANS = [
    *((32, 112), (96, 56), (144, 56), (240, 28), (480, 14), (672, 14), (1152, 7), (1280, 7)),  # EfficientNet-B0
    *((72, 28), (120, 28), (960, 7)),  # MobileNetV3
    (2048, 7),  # ResNet-50
]


@dataclass(frozen=True)
class PoolCase:
    op: str
    window: str  # "" of a mean
    batch: int
    channels: int
    side: int
    dtype: torch.dtype
    layout: str

    @property
    def bytes(self) -> int:
        """What is read and written."""
        kernel, stride, padding = _WINDOWS.get(self.window, (self.side, 1, 0))
        pooled = (self.side + 2 * padding - kernel) // stride + 1
        return self.batch * self.channels * (self.side**2 + pooled**2) * self.dtype.itemsize

    def __str__(self) -> str:
        what = f"{self.op} {self.window}".strip()
        kind = f"{dtype_name(self.dtype)} {self.layout}"
        return f"{what} {self.channels} {self.side}x{self.side} batch {self.batch} {kind}"

    def input(self, device: str) -> Tensor:
        return random_tensor((self.batch, self.channels, self.side, self.side), self.dtype, self.layout, device)


def pool_cases(device: str, quick: bool) -> list[PoolCase]:
    cases = []
    for kind in _KINDS[device]:
        maxima, means = (_MAXIMA[:1], _MEANS[:1]) if quick else (_MAXIMA, _MEANS)
        for batches, of_each in (
            ((32, 1), [("max_pool2d", *one) for one in maxima]),
            ((64, 1), [("spatial_mean", "", *one) for one in means]),
        ):
            for batch in (1,) if device == "cpu" else batches:
                cases += [PoolCase(op, window, batch, c, side, *kind) for op, window, c, side in of_each]
    return cases


def ours(case: PoolCase, x: Tensor) -> Tensor:
    return fcb.max_pool2d(x, *_WINDOWS[case.window]) if case.window else fcb.spatial_mean(x)


def eager(case: PoolCase, x: Tensor) -> Tensor:
    return F.max_pool2d(x, *_WINDOWS[case.window]) if case.window else x.mean((2, 3))


@dataclass(frozen=True)
class PoolBench:
    device: str
    repeats: int
    watch: Stopwatch

    def check(self, cases: Sequence[PoolCase]) -> list[dict[str, Any]]:
        return [self.check_case(case) for case in progress(cases, "validate")]

    def time(self, cases: Sequence[PoolCase]) -> list[dict[str, Any]]:
        return [self.row(case) for case in progress(cases, "pools")]

    def check_case(self, case: PoolCase) -> dict[str, Any]:
        x = case.input(self.device)
        truth = eager(case, x.double())
        errors = {
            name: float((call(case, x).double() - truth).norm() / truth.norm())
            for name, call in {"eager": eager, "ours": ours}.items()
        }
        return check(str(case), torch.finfo(case.dtype).eps / 2, errors)

    def row(self, case: PoolCase) -> dict[str, Any]:
        pairs = pairs_of(case.bytes)
        xs = [case.input(self.device) for _ in range(pairs)]
        elements = math.ceil(case.bytes / 2 / case.dtype.itemsize)  # of which each is read and written
        copied = [torch.zeros(elements, dtype=case.dtype, device=self.device) for _ in range(pairs)]
        rivals: Rivals = {
            "copy": lambda i: copied[i].clone(),
            "ours": lambda i: ours(case, xs[i]),
            "eager": lambda i: eager(case, xs[i]),
        }
        stats, calls = self.watch.compare(rivals, pairs, self.repeats)
        us = {name: float(s["median"]) for name, s in stats.items()}
        return {
            "case": str(case),
            "op": case.op,
            "dtype": dtype_name(case.dtype),
            "layout": case.layout,
            "batch": case.batch,
            "channels": case.channels,
            "bytes_moved": case.bytes,
            "us": stats,
            "missing": {},
            "ours/copy": us["ours"] / us["copy"],
            "eager/ours": us["eager"] / us["ours"],
            "calls": calls,
            "buffer_pairs": pairs,
        }
