"""The benchmark of bn_scale_cat and gate: how DenseNet's layers begin, and how squeeze-and-excite blocks end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_conv_bn import reference

from .common import EPS, Compiler, check, dtype_name, progress, random_bn, random_tensor
from .stopwatch import Rivals, Stopwatch, pairs_of

NOTE = (
    "bn_scale_cat with ReLU, of DenseNet-121's layers at batch 32: eager is F.relu(F.batch_norm(torch.cat(inputs, 1), "
    "...)). gate, of EfficientNet-B0's blocks at batch 64: eager is x * gate. On the CPU both at batch 4. compile is "
    "torch.compile of eager, within a limit of compile time. copy is a clone of all that is read, of as many bytes."
)
_ops = torch.ops.fused_conv_bn
_KINDS = {
    "cuda": ((torch.float16, "channels_last"), (torch.float32, "nchw")),
    "cpu": ((torch.float32, "channels_last"),),
}
_GROWTH = 32
_DENSE = [(64, 3, 56), (128, 6, 28), (256, 12, 14), (512, 15, 7)]  # channels of the first input, others, side
_GATED = [(32, 112), (96, 56), (240, 28), (672, 14), (1152, 7)]  # channels, side


@dataclass(frozen=True)
class CatGateCase:
    op: str
    batch: int
    channels: tuple[int, ...]  # of each input
    side: int
    dtype: torch.dtype
    layout: str

    @property
    def bytes(self) -> int:
        return self.batch * sum(self.channels) * self.side**2 * self.dtype.itemsize

    def __str__(self) -> str:
        inputs = f"{self.channels[0]}" + (f" + {len(self.channels) - 1} x {_GROWTH}" if len(self.channels) > 1 else "")
        return f"{self.op} {inputs} {self.side}x{self.side} batch {self.batch} {dtype_name(self.dtype)} {self.layout}"

    def arguments(self, device: str) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs, and what belongs to their channels: BatchNorm's tensors, or a gate."""
        xs = [
            random_tensor((self.batch, c, self.side, self.side), self.dtype, self.layout, device) for c in self.channels
        ]
        if self.op == "gate":
            return xs, [torch.rand(self.batch, self.channels[0], 1, 1, device=device).to(self.dtype)]
        return xs, random_bn(sum(self.channels), self.dtype, device)


def cat_gate_cases(device: str, quick: bool) -> list[CatGateCase]:
    cases = []
    for dtype, layout in _KINDS[device]:
        dense, gated = (_DENSE[:1], _GATED[:1]) if quick else (_DENSE, _GATED)
        small = device == "cpu"
        for first, others, side in dense:
            channels = (first, *[_GROWTH] * others)
            cases.append(CatGateCase("bn_scale_cat", 4 if small else 32, channels, side, dtype, layout))
        for c, side in gated:
            cases.append(CatGateCase("gate", 4 if small else 64, (c,), side, dtype, layout))
    return cases


def ours(case: CatGateCase, xs: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    if case.op == "gate":
        return _ops.gate(xs[0], others[0])
    return _ops.bn_scale_cat(list(xs), *others, 1.0, EPS, activation="relu")


def eager(case: CatGateCase, xs: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    if case.op == "gate":
        return xs[0] * others[0]
    mean, var, weight, bias = others
    return F.relu(F.batch_norm(torch.cat(list(xs), 1), mean, var, weight, bias, False, 0.0, EPS))


@dataclass(frozen=True)
class CatGateBench:
    device: str
    repeats: int
    compiler: Compiler
    watch: Stopwatch

    def check(self, cases: Sequence[CatGateCase]) -> list[dict[str, Any]]:
        return [self.check_case(case) for case in progress(cases, "validate")]

    def time(self, cases: Sequence[CatGateCase]) -> list[dict[str, Any]]:
        return [self.row(case) for case in progress(cases, "cat and gate")]

    def check_case(self, case: CatGateCase) -> dict[str, Any]:
        xs, others = case.arguments(self.device)
        wide, of_wide = [x.double() for x in xs], [t.double() for t in others]
        if case.op == "gate":
            truth = reference.gate(wide[0], of_wide[0])
        else:
            mean, var, weight, bias = of_wide
            truth = reference.bn_scale_cat(wide, mean, var, weight, bias, 1.0, EPS, activation="relu")
        norm = float(truth.norm())
        calls = {"eager": eager, "ours": ours}
        errors = {name: float((call(case, xs, others).double() - truth).norm()) / norm for name, call in calls.items()}
        return check(str(case), torch.finfo(case.dtype).eps / 2, errors)

    def row(self, case: CatGateCase) -> dict[str, Any]:
        pairs = pairs_of(2 * case.bytes)
        given = [case.arguments(self.device) for _ in range(pairs)]
        wholes = [torch.cat(xs, 1).flatten() for xs, _ in given]

        def plain(*tensors: Tensor) -> Tensor:
            return eager(case, tensors[: len(case.channels)], tensors[len(case.channels) :])

        flat = [[*xs, *others] for xs, others in given]
        compiled, missing = self.compiler(plain, flat[0], ["compile"])
        rivals: Rivals = {
            "copy": lambda i: wholes[i].clone(),
            "ours": lambda i: ours(case, *given[i]),
            "eager": lambda i: eager(case, *given[i]),
        }
        if run := compiled.get("compile"):
            rivals["compile"] = _called(run, flat)
        stats, calls = self.watch.compare(rivals, pairs, self.repeats)
        us = {name: float(s["median"]) for name, s in stats.items()}
        return {
            "case": str(case),
            "op": case.op,
            "dtype": dtype_name(case.dtype),
            "layout": case.layout,
            "channels": list(case.channels),
            "bytes_moved": 2 * case.bytes,
            "us": stats,
            "missing": missing,
            "ours/copy": us["ours"] / us["copy"],
            **{f"{name}/ours": us[name] / us["ours"] for name in us if name not in ("copy", "ours")},
            "calls": calls,
            "buffer_pairs": pairs,
        }


def _called(run: Callable[..., Tensor], arguments: Sequence[Sequence[Tensor]]) -> Callable[[int], Tensor]:
    return lambda i: run(*arguments[i])
