"""The benchmark's short planes: bn_scale_train on the CPU where a channel has few values in a row, or one an image,
against F.batch_norm alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_conv_bn import reference

from .common import (
    EPS,
    LAYOUTS,
    MOMENTUM,
    SCALING_FACTOR,
    batch_moments,
    check,
    progress,
    random_bn,
    statistics_errors,
)
from .stopwatch import Stopwatch, pairs_of

SHAPES = [(1, 1280, 7, 7), (4, 100000), (8, 512, 7, 7), (128, 1000)]

NOTE = (
    "float32 on the CPU; bn_scale_train with a factor, against F.batch_norm in training mode with nothing behind it. "
    "All allocate their results; copy is x.clone()."
)


@dataclass(frozen=True)
class ShortCase:
    shape: tuple[int, ...]
    layout: str

    def __str__(self) -> str:
        layout = f" {self.layout}" if len(self.shape) == 4 else ""
        return f"float32{layout} {'x'.join(map(str, self.shape))} train"

    def tensor(self) -> Tensor:
        x = torch.randn(self.shape) * 2 + 0.5
        return x.contiguous(memory_format=LAYOUTS[self.layout]) if x.dim() == 4 else x


def short_cases() -> list[ShortCase]:
    return [ShortCase(s, layout) for s in SHAPES for layout in LAYOUTS if len(s) == 4 or layout == "nchw"]


def ours(x: Tensor, bn: Sequence[Tensor]) -> Tensor:
    return torch.ops.fused_conv_bn.bn_scale_train(x, bn[0], bn[1], bn[2], bn[3], SCALING_FACTOR, MOMENTUM, EPS)


def batch_norm(x: Tensor, bn: Sequence[Tensor]) -> Tensor:
    return F.batch_norm(x, bn[0], bn[1], bn[2], bn[3], True, MOMENTUM, EPS)


def check_short(case: ShortCase) -> list[dict[str, Any]]:
    x, bn = case.tensor(), random_bn(case.shape[1], torch.float32, "cpu")
    moments = batch_moments(x.double())
    truth = reference.bn_scale_train(
        x.double(), None, None, bn[2].double(), bn[3].double(), SCALING_FACTOR, MOMENTUM, EPS
    )
    errors: dict[str, dict[str, float]] = {}
    for name in ("eager", "ours"):
        after = [t.clone() for t in bn]
        y = ours(x, after) if name == "ours" else batch_norm(x, after) * SCALING_FACTOR
        norm = ((y.double() - truth).norm() / truth.norm()).item()
        errors[name] = {"output": norm, **statistics_errors(bn[:2], after[:2], moments)}
    eps = torch.finfo(torch.float32).eps
    return [
        check(f"{case}, {what}", eps / 2 if what == "output" else eps, {who: e[what] for who, e in errors.items()})
        for what in errors["ours"]
    ]


def time_short(cases: Sequence[ShortCase], watch: Stopwatch, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for case in progress(cases, "short planes"):
        bn = random_bn(case.shape[1], torch.float32, "cpu")
        first = case.tensor()
        pairs = pairs_of(2 * first.nbytes)
        xs = [first, *(first.clone() for _ in range(pairs - 1))]
        stats, calls = watch.compare(
            {
                "copy": lambda i, xs=xs: xs[i].clone(),  # type: ignore[misc]
                "ours": lambda i, xs=xs, bn=bn: ours(xs[i], bn),  # type: ignore[misc]
                "batch_norm": lambda i, xs=xs, bn=bn: batch_norm(xs[i], bn),  # type: ignore[misc]
            },
            pairs,
            repeats,
        )
        us = {name: float(s["median"]) for name, s in stats.items()}
        rows.append(
            {
                "case": str(case),
                "shape": list(case.shape),
                "layout": case.layout,
                "us": stats,
                "missing": {},
                "ours/copy": us["ours"] / us["copy"],
                "ours/batch_norm": us["ours"] / us["batch_norm"],
                "calls": calls,
                "buffer_pairs": pairs,
            }
        )
    return rows
