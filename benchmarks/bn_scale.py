"""The benchmark of bn_scale and bn_scale_train: sizes and shapes, checked against float64, then timed with their
rivals."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_conv_bn import reference

from .common import (
    EPS,
    LAYOUTS,
    MB,
    MOMENTUM,
    SCALING_FACTOR,
    Compiler,
    batch_moments,
    check,
    dtype_name,
    first_line,
    random_bn,
    random_tensor,
    statistics_errors,
)
from .stopwatch import Rivals, Stopwatch, pairs_of

NAIVE_SOURCE = Path(__file__).with_name("naive_bn_scale.cu")

PROBLEM_73 = 128 * 64 * 126 * 126 * 4  # bytes of the tensor that KernelBench 2.73 applies BN to
SIZES = [*(4**k * 4096 for k in range(9)), PROBLEM_73, 1024 * MB]
QUICK_SIZES = [4096, 16 * MB, PROBLEM_73]
OTHER_SHAPES = {(256, 14): (16 * MB, 512 * MB), (2048, 7): (16 * MB, 512 * MB)}  # (C, H = W): sizes
COMPILED_SIZES = {torch.float32: (4096, 16 * MB, 64 * MB, PROBLEM_73), torch.float16: (PROBLEM_73,)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
TRAIN_KINDS = [(torch.float32, layout) for layout in LAYOUTS]
TRAIN_KINDS += [(dtype, "channels_last") for dtype in (torch.float16, torch.bfloat16)]
TRAIN_SHAPES = [(64, 112), (256, 56), *OTHER_SHAPES]  # (C, H = W)
TRAIN_SIZES = 256 * MB, 16 * MB  # theirs: the first below the largest one

CHECKED_AT_ONCE = 1 << 24  # elements, so that the float64 copies stay small

NOTES = {
    "outputs": "copy is out.copy_(x), ours bn_scale.out; copy, ours and naive write preallocated outputs. eager and "
    "compile take theirs from the caching allocator, which costs no device time and hands them the same memory, which "
    "may still be cached, each time. On the CPU new memory costs more than the arithmetic, so there every rival "
    "allocates: copy is x.clone(), ours bn_scale.",
    "copy": "bytes_moved is what has to be: the input read once, the output written once. The copy of a row moves as "
    "many. The share of its rate is copy time / our time.",
    "eager": "F.batch_norm(x, ...) * s. Backend flags as given under flags.",
    "compile": "torch.compile(eager, dynamic=False), default mode, at a few sizes and within a limit of compile time.",
    "naive": "benchmarks/naive_bn_scale.cu: a thread per element, 1/sqrt and two 64-bit divisions in each; fp32 NCHW.",
}
TRAIN_NOTE = (
    "batch statistics, and the running ones updated, in ours, eager and compile, which all allocate their outputs. "
    "bytes_moved counts the input twice, as no output is known before all of it was read: the floor is 1.5 times the "
    "copy. What a cache keeps of the input for the second read can bring a time below it."
)


# ---- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    nominal_bytes: int
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: str
    main: bool  # of the sweep over sizes, not one of the other shapes
    train: bool = False  # bn_scale_train, not bn_scale

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        text = f"{dtype_name(self.dtype)} {self.layout} {'x'.join(map(str, self.shape))}"
        return f"{text} train" if self.train else text


def shape_near(size: float, dtype: torch.dtype, channels: int = 64, side: int = 0) -> tuple[int, int, int, int]:
    """Met to within a few percent: the batch takes up what the image leaves over. The side is chosen if not given."""
    pixels = size / dtype.itemsize / channels
    side = side or next(s for s in (126, 32, 16, 8, 4, 2, 1) if s * s <= pixels or s == 1)
    return max(1, round(pixels / side**2)), channels, side, side


def bn_cases(sizes: Sequence[int], dtypes: Sequence[torch.dtype], max_bytes: float, others: bool) -> Iterator[Case]:
    for layout in LAYOUTS:
        for dtype in dtypes:
            for size in (s for s in sizes if s <= max_bytes):
                yield Case(size, shape_near(size, dtype), dtype, layout, True)
            for (channels, side), other_sizes in OTHER_SHAPES.items() if others else ():
                for size in (s for s in other_sizes if s <= max_bytes):
                    yield Case(size, shape_near(size, dtype, channels, side), dtype, layout, False)


def bn_train_cases(dtypes: Sequence[torch.dtype], max_bytes: float, others: bool) -> Iterator[Case]:
    """Problem 73's size or the largest below it, then other planes."""
    size = int(min(PROBLEM_73, max_bytes))
    for dtype, layout in TRAIN_KINDS:
        if dtype in dtypes:
            yield Case(size, shape_near(size, dtype), dtype, layout, True, train=True)
    size = next((s for s in TRAIN_SIZES if s < size), 0)
    for channels, side in TRAIN_SHAPES if others and size else ():
        for dtype, layout in (TRAIN_KINDS[0], TRAIN_KINDS[2]):
            yield Case(size, shape_near(size, dtype, channels, side), dtype, layout, False, train=True)


class NaiveKernel:
    """The naive kernel, compiled here and now. ``why_not``: why it cannot run, if so."""

    def __init__(self, device: str) -> None:
        self.kernel: Callable[..., None] | None = None
        self.why_not = ""
        if device != "cuda":
            self.why_not = "needs a GPU"
        else:
            try:
                self.kernel = torch.cuda._compile_kernel(NAIVE_SOURCE.read_text(), "naive_bn_scale")
            except Exception as error:  # NVRTC may be missing, the function is private: neither stops a benchmark
                self.why_not = first_line(error)

    def why_not_for(self, case: Case) -> str:
        return self.why_not or ("" if (case.dtype, case.layout) == (torch.float32, "nchw") else "fp32 NCHW only")

    def __call__(self, x: Tensor, bn: list[Tensor], out: Tensor) -> None:
        assert self.kernel is not None
        images, channels, plane = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        bits = [struct.unpack("i", struct.pack("f", value))[0] for value in (SCALING_FACTOR, EPS)]
        blocks = (x.numel() + 255) // 256
        self.kernel((blocks, 1, 1), (256, 1, 1), [x, *bn, out, images, channels, plane, *bits])


# ---- validation ------------------------------------------------------------------------------------------------------


Truth = Callable[[Tensor], tuple[Tensor, Tensor | float]]  # the result as a sum of two, as one float64 may not hold it


def relative_errors(outputs: dict[str, Tensor], x: Tensor, truth: Truth, elements: int) -> dict[str, float]:
    """||y - truth|| / ||truth|| of each output, a few images at a time."""
    errors, norm = dict.fromkeys(outputs, 0.0), 0.0
    step = max(1, CHECKED_AT_ONCE // elements)
    for i in range(0, len(x), step):
        high, low = truth(x[i : i + step])
        norm += float(high.square().sum())
        for name, y in outputs.items():
            errors[name] += float((y[i : i + step].double() - high - low).square().sum())
    # math.sqrt(NaN) is NaN, and NaN is not within any limit.
    return {name: math.sqrt(error) / math.sqrt(norm) for name, error in errors.items()}


def double_truth(bn: list[Tensor]) -> Truth:
    mean, var, weight, bias = (t.double() for t in bn)
    return lambda x: (reference.bn_scale(x.double(), mean, var, weight, bias, SCALING_FACTOR, EPS), 0.0)


def long_double_truth(bn: list[Tensor]) -> Truth:
    import numpy as np

    def wide(t: Tensor) -> Any:
        return t.cpu().numpy().astype(np.longdouble)

    mean, var, weight, bias = (wide(t).reshape(1, -1, 1, 1) for t in bn)

    def truth(x: Tensor) -> tuple[Tensor, Tensor]:
        y = ((wide(x) - mean) / np.sqrt(var + np.longdouble(EPS)) * weight + bias) * np.longdouble(SCALING_FACTOR)
        high = y.astype(np.float64)
        low = (y - high).astype(np.float64)
        return torch.from_numpy(high).to(x.device), torch.from_numpy(low).to(x.device)

    return truth


def eager_bn_scale(x: Tensor, bn: list[Tensor], train: bool = False) -> Tensor:
    return F.batch_norm(x, bn[0], bn[1], bn[2], bn[3], train, MOMENTUM, EPS) * SCALING_FACTOR


def ours_out(x: Tensor, bn: list[Tensor], out: Tensor) -> None:
    torch.ops.fused_conv_bn.bn_scale.out(x, bn[0], bn[1], bn[2], bn[3], SCALING_FACTOR, EPS, out=out)


def ours_new(x: Tensor, bn: list[Tensor]) -> Tensor:
    return torch.ops.fused_conv_bn.bn_scale(x, bn[0], bn[1], bn[2], bn[3], SCALING_FACTOR, EPS)


def ours_train(x: Tensor, bn: list[Tensor]) -> Tensor:
    return torch.ops.fused_conv_bn.bn_scale_train(x, bn[0], bn[1], bn[2], bn[3], SCALING_FACTOR, MOMENTUM, EPS)


# ---- the rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What the rows of a run share."""

    device: str
    repeats: int
    naive: NaiveKernel
    compiler: Compiler
    watch: Stopwatch

    def check_bn_scale(self, case: Case) -> dict[str, Any]:
        x, bn = (
            random_tensor(case.shape, case.dtype, case.layout, self.device),
            random_bn(case.shape[1], case.dtype, self.device),
        )
        outputs = {"eager": eager_bn_scale(x, bn), "ours": torch.full_like(x, math.nan)}
        ours_out(x, bn, outputs["ours"])
        if not self.naive.why_not_for(case):
            outputs["naive"] = torch.full_like(x, math.nan)
            self.naive(x, bn, outputs["naive"])
        if case.dtype == torch.float64:
            x, outputs = x[[0, -1]], {name: y[[0, -1]] for name, y in outputs.items()}
        truth = long_double_truth(bn) if case.dtype == torch.float64 else double_truth(bn)
        unit = torch.finfo(case.dtype).eps / 2
        return check(str(case), unit, relative_errors(outputs, x, truth, x[0].numel()))

    def check_bn_scale_train(self, case: Case) -> list[dict[str, Any]]:
        x = random_tensor(case.shape, case.dtype, case.layout, self.device)
        bn = random_bn(case.shape[1], case.dtype, self.device)
        moments = batch_moments(x.double())
        outputs, errors = {}, {}
        for name in ("eager", "ours"):
            after = [t.clone() for t in bn]
            outputs[name] = ours_train(x, after) if name == "ours" else eager_bn_scale(x, after, train=True)
            errors[name] = statistics_errors(bn[:2], after[:2], moments)
        truth = double_truth([*moments[:2], *bn[2:]])
        eps = torch.finfo(case.dtype).eps
        checks = [check(str(case), eps / 2, relative_errors(outputs, x, truth, x[0].numel()))]
        for which in errors["ours"]:
            found = {name: of_call[which] for name, of_call in errors.items()}
            checks.append(check(f"{case}, {which}", eps, found))
        return checks

    def time_bn_scale(self, case: Case) -> dict[str, Any]:
        pairs = pairs_of(2 * case.bytes)
        bn = random_bn(case.shape[1], case.dtype, self.device)
        xs = [random_tensor(case.shape, case.dtype, case.layout, self.device) for _ in range(pairs)]
        outs = [torch.empty_like(x) for x in xs]
        on_cpu = self.device == "cpu"  # see the note on outputs
        new = ours_train if case.train else ours_new
        rivals: Rivals = {
            "copy": lambda i: xs[i].clone() if on_cpu else outs[i].copy_(xs[i]),
            "ours": lambda i: new(xs[i], bn) if on_cpu or case.train else ours_out(xs[i], bn, outs[i]),
            "eager": lambda i: eager_bn_scale(xs[i], bn, case.train),
        }
        missing = {"compile": "not among the compiled sizes"}
        if not case.train:
            missing["naive"] = self.naive.why_not_for(case)
        if case.main and (case.train or case.nominal_bytes in COMPILED_SIZES.get(case.dtype, ())):
            compiled, not_compiled = self.compiler(lambda x: eager_bn_scale(x, bn, case.train), xs[:1], ["compile"])
            missing["compile"] = not_compiled.get("compile", "")
            if compiled:
                rivals["compile"] = lambda i: compiled["compile"](xs[i])
        if missing.get("naive") == "":
            rivals["naive"] = lambda i: self.naive(xs[i], bn, outs[i])
        row = {"case": str(case), "dtype": dtype_name(case.dtype), "layout": case.layout, "shape": list(case.shape)}
        sizes = {"main": case.main, "nominal_bytes": case.nominal_bytes, "tensor_bytes": case.bytes}
        return {**row, **sizes, **self.time_row(rivals, case, pairs, missing)}

    def time_row(self, rivals: Rivals, case: Case, pairs: int, missing: dict[str, str]) -> dict[str, Any]:
        moved = (3 if case.train else 2) * case.bytes
        stats, calls = self.watch.compare(rivals, pairs, self.repeats)
        us = {name: float(s["median"]) for name, s in stats.items()}
        return {
            "bytes_moved": moved,
            "us": stats,
            "missing": {name: why for name, why in missing.items() if why},
            "ours/copy": us["ours"] / us["copy"],
            "share_of_copy_percent": 100 * us["copy"] / us["ours"],
            **({"share_of_floor_percent": 150 * us["copy"] / us["ours"]} if case.train else {}),
            **{f"{name}/ours": t / us["ours"] for name, t in us.items() if name not in ("copy", "ours")},
            "gb_per_s": {name: (2 * case.bytes if name == "copy" else moved) / t / 1e3 for name, t in us.items()},
            "calls": calls,
            "buffer_pairs": pairs,
            "footprint_bytes": pairs * 2 * case.bytes,
        }
