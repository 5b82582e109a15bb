"""The benchmark of max_pool2d, with its gradient too, and spatial_mean: the pools of usual networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    "beside F.max_pool2d. train: forward and backward; backward: that alone. Both are torch.autograd.grad with a "
    "gradient of the result that is always the same. spatial_mean of the squeeze-and-excite blocks of EfficientNet-B0 "
    "and MobileNetV3, and of what is in front of their and ResNet's classifiers, at batch 1 and 64, beside "
    "input.mean((2, 3)). On the CPU both are PyTorch's. copy is a clone that moves as many bytes as are read and "
    "written, the position of each maximum, for backward, as one of them."
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
    step: str = ""  # train: forward and backward; or backward alone

    @property
    def pooled(self) -> int:
        kernel, stride, padding = _WINDOWS.get(self.window, (self.side, 1, 0))
        return (self.side + 2 * padding - kernel) // stride + 1

    @property
    def bytes(self) -> int:
        """What is read and written."""
        passes = 2 if self.step == "train" else 1
        positions = self.pooled**2 if self.step else 0
        elements = self.side**2 + self.pooled**2
        return self.batch * self.channels * passes * (elements * self.dtype.itemsize + positions)

    def __str__(self) -> str:
        what = f"{self.op} {self.window}".strip()
        kind = f"{dtype_name(self.dtype)} {self.layout} {self.step}".strip()
        return f"{what} {self.channels} {self.side}x{self.side} batch {self.batch} {kind}"

    def input(self, device: str) -> Tensor:
        x = random_tensor((self.batch, self.channels, self.side, self.side), self.dtype, self.layout, device)
        return x.requires_grad_(self.step != "")

    def gradient(self, device: str) -> Tensor:
        """Of the result."""
        return random_tensor((self.batch, self.channels, self.pooled, self.pooled), self.dtype, self.layout, device)


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
        batch = 1 if device == "cpu" else 32
        for step in ("train", "backward"):
            cases += [PoolCase("max_pool2d", window, batch, c, side, *kind, step) for window, c, side in maxima]
    return cases


def ours(case: PoolCase, x: Tensor) -> Tensor:
    return fcb.max_pool2d(x, *_WINDOWS[case.window]) if case.window else fcb.spatial_mean(x)


def eager(case: PoolCase, x: Tensor) -> Tensor:
    return F.max_pool2d(x, *_WINDOWS[case.window]) if case.window else x.mean((2, 3))


Call = Callable[[PoolCase, Tensor], Tensor]


def result(call: Call, case: PoolCase, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(x.requires_grad):
        return call(case, x)


def backward(y: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, dy, retain_graph=True)[0]


def error(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm())


@dataclass(frozen=True)
class PoolBench:
    device: str
    repeats: int
    watch: Stopwatch

    def check(self, cases: Sequence[PoolCase]) -> list[dict[str, Any]]:
        return [c for case in progress(cases, "validate") for c in self.check_case(case)]

    def time(self, cases: Sequence[PoolCase]) -> list[dict[str, Any]]:
        return [self.row(case) for case in progress(cases, "pools")]

    def check_case(self, case: PoolCase) -> list[dict[str, Any]]:
        """The result, and what a step gives besides."""
        x = case.input(self.device)
        # Contiguous: PyTorch's kernel for float64 in channels_last writes to misaligned shared memory (torch 2.11).
        exact = x.detach().double().contiguous().requires_grad_(x.requires_grad)
        dy = case.gradient(self.device) if case.step else None

        def results(call: Call, x: Tensor) -> dict[str, Tensor]:
            y = result(call, case, x)
            return {"": y.detach()} | ({} if dy is None else {", gradient": backward(y, x, dy.to(y.dtype))})

        truth, by_eager, by_ours = results(eager, exact), results(eager, x), results(ours, x)
        unit = torch.finfo(case.dtype).eps / 2
        return [
            check(f"{case}{what}", unit, {"eager": error(by_eager[what], t), "ours": error(by_ours[what], t)})
            for what, t in truth.items()
        ]

    def rival(self, case: PoolCase, call: Call, xs: Sequence[Tensor], dys: Sequence[Tensor]) -> Callable[[int], object]:
        if not case.step:
            return lambda i: call(case, xs[i])
        if case.step == "train":
            return lambda i: torch.autograd.grad(result(call, case, xs[i]), xs[i], dys[i])
        ys = [result(call, case, x) for x in xs]
        return lambda i: backward(ys[i], xs[i], dys[i])

    def row(self, case: PoolCase) -> dict[str, Any]:
        pairs = pairs_of(case.bytes)
        xs = [case.input(self.device) for _ in range(pairs)]
        dys = [case.gradient(self.device) for _ in xs] if case.step else []
        elements = math.ceil(case.bytes / 2 / case.dtype.itemsize)  # of which each is read and written
        copied = [torch.zeros(elements, dtype=case.dtype, device=self.device) for _ in range(pairs)]
        rivals: Rivals = {"copy": lambda i: copied[i].clone()}
        rivals |= {name: self.rival(case, call, xs, dys) for name, call in {"ours": ours, "eager": eager}.items()}
        stats, calls = self.watch.compare(rivals, pairs, self.repeats)
        us = {name: float(s["median"]) for name, s in stats.items()}
        return {
            "case": str(case),
            "op": case.op,
            "step": case.step,
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
