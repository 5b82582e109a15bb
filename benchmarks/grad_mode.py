"""The benchmark's grad mode: problem 73 where the parameters require gradients, forward alone, as KernelBench times it
and everybody calls it who forgets no_grad, and in whole steps."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .common import MB, Compiler, check, dtype_name, progress
from .conv import Calls, Problem, compare
from .layers import ConvCase
from .stopwatch import FOOTPRINT, KERNELBENCH_TRIALS, KERNELBENCH_WARM_UPS, Stopwatch, cuda, kernelbench_us

CHECKED_IMAGES = 16  # of which gradients are compared with float64's
GRADIENT_UNIT = 2.0**-20  # of a gradient's norm, which sums of many terms may be off by in any case

NOTES = {
    "ours": "ConvBnScale2d with grad mode on: its parameters require gradients, the input does not, and nobody calls "
    "backward. no_grad: the same module under no_grad. grad_fn: of ours' result.",
    "eager": "bn(conv(x)) * factor with grad mode on, compile: torch.compile(eager, dynamic=False) of that.",
    "kernelbench": "by the rules of KernelBench's timing.py, for models as their constructors leave them: training "
    f"mode, grad mode on, torch.rand as the input. Each model by itself: {KERNELBENCH_WARM_UPS} warm-ups with a "
    f"synchronisation behind each, the allocator's cache emptied, a trial that does not count, {KERNELBENCH_TRIALS} "
    f"that do. In each: a synchronisation, {FOOTPRINT // MB} MB written over L2, an event, the call, an event, a "
    "synchronisation. The mean of the trials. On the CPU and with --quick a few trials, on the CPU of wall time.",
    "step": "forward and backward with a gradient of the result that is always the same; x: the input requires a "
    "gradient too. MB: the peak of what the allocator gave out during a step, above what was there before it. On CUDA "
    "alone.",
    "errors": "of outputs as those of conv and train. Of gradients, of so many images "
    f"({CHECKED_IMAGES}): norm of the error over norm of the float64 result; within max(2 * eager's, one rounding of "
    "the dtype, 2^-20). In training mode the convolution's bias has none but roundings, and is not compared.",
}


def with_grad(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            return call(*inputs)

    return run


def gradients(model: nn.Module, x: Tensor, dy: Tensor, x_needs_one: bool) -> dict[str, Tensor]:
    """One step, without an optimiser."""
    with torch.enable_grad():
        leaves: dict[str, Tensor] = dict(model.named_parameters())
        x = x.detach().requires_grad_(x_needs_one)
        if x_needs_one:
            leaves["x"] = x
        found = torch.autograd.grad(model(x), list(leaves.values()), dy)
    return dict(zip(leaves, found, strict=True))


@dataclass(frozen=True)
class GradBench:
    device: str
    repeats: int
    compiler: Compiler
    watch: Stopwatch
    trials: int = KERNELBENCH_TRIALS

    def check(self, cases: Sequence[ConvCase]) -> list[dict[str, Any]]:
        return [c for case in progress(cases, "validate") for c in self.check_case(Problem(case, self.device))]

    def time(self, cases: Sequence[ConvCase]) -> list[dict[str, Any]]:
        return [self.row(Problem(case, self.device)) for case in progress(cases, "grad mode")]

    def check_case(self, problem: Problem) -> list[dict[str, Any]]:
        case = problem.case
        models: Calls = {"eager": with_grad(problem.plain), "ours": with_grad(problem.module)}
        errors = problem.errors(models)
        checks = []
        for measure, unit in problem.units().items():
            found = {name: of_call[measure] for name, of_call in errors.items()}
            checks.append(check(f"{case}, grad mode, by {measure}", unit, found))
        return checks + self.check_gradients(problem)

    def check_gradients(self, problem: Problem) -> list[dict[str, Any]]:
        case = problem.case
        x = problem.x[:CHECKED_IMAGES]
        dy = torch.randn_like(problem.plain(x))
        truth = gradients(copy.deepcopy(problem.plain).double(), x.double(), dy.double(), True)
        found = {"eager": gradients(problem.plain, x, dy, True), "ours": gradients(problem.module, x, dy, True)}
        unit = max(torch.finfo(case.dtype).eps / 2, GRADIENT_UNIT)
        checks = []
        for name, exact in truth.items():
            if not (case.train and name == "conv.bias"):
                errors = {who: ((g[name].double() - exact).norm() / exact.norm()).item() for who, g in found.items()}
                checks.append(check(f"{case}, gradient of {name}", unit, errors))
        return checks

    def row(self, problem: Problem) -> dict[str, Any]:
        case = problem.case
        with torch.enable_grad():
            compiled, missing = self.compiler(problem.plain, problem.inputs(), case.compile_modes)
        calls: Calls = {"ours": problem.module, "eager": problem.plain, **compiled}
        calls = {name: with_grad(call) for name, call in calls.items()}
        stats, timing = compare(problem, {**calls, "no_grad": problem.module}, self.watch, self.repeats)
        us = {name: float(s["median"]) for name, s in stats.items()}
        row = {
            "group": case.group,
            "case": str(case),
            "dtype": dtype_name(case.dtype),
            "layout": case.layout,
            "train": case.train,
            "shape": list(case.shape),
            "output_shape": list(case.output_shape),
            "grad_fn": type(calls["ours"](*problem.inputs()).grad_fn).__name__,
            "us": stats,
            "missing": missing,
            "ours/no_grad": us["ours"] / us["no_grad"],
            "ours/copy": us["ours"] / us["copy"],
            **{f"{name}/ours": us[name] / us["ours"] for name in calls if name != "ours"},
            **timing,
        }
        if case.train:
            row["kernelbench"] = self.kernelbench(problem, calls)
        row["step"] = {
            name: self.step(problem, x_needs_one) for name, x_needs_one in (("without x", False), ("with x", True))
        }
        return row

    def kernelbench(self, problem: Problem, calls: Calls) -> dict[str, Any]:
        x = torch.rand_like(problem.x)
        on_cuda = self.device == "cuda"
        us = {n: kernelbench_us(functools.partial(call, x), on_cuda, self.trials) for n, call in calls.items()}
        return {"us": us, **{f"{name}/ours": us[name]["mean"] / us["ours"]["mean"] for name in us if name != "ours"}}

    def step(self, problem: Problem, x_needs_one: bool) -> dict[str, Any]:
        x = problem.x
        dy = torch.randn_like(problem.plain(x))
        target = torch.empty_like(dy)

        def run(model: nn.Module) -> Callable[[int], object]:
            return lambda i: gradients(model, x, dy, x_needs_one)

        steps = {"ours": run(problem.module), "eager": run(problem.plain)}
        copy_of_dy: Callable[[int], object] = lambda i: target.copy_(dy)  # noqa: E731
        stats, calls = self.watch.compare({"copy": copy_of_dy, **steps}, 1, self.repeats)
        megabytes = {name: peak_mb(step) for name, step in steps.items()} if self.device == "cuda" else {}
        us = {name: float(s["median"]) for name, s in stats.items()}
        return {"us": stats, "calls": calls, "peak_mb": megabytes, "eager/ours": us["eager"] / us["ours"]}


def peak_mb(run: Callable[[int], object]) -> float:
    """What was allocated at the most during a call, above what was there before."""
    run(0)
    cuda.synchronize()
    before = cuda.memory_allocated()
    cuda.reset_peak_memory_stats()
    run(0)
    cuda.synchronize()
    return float(cuda.max_memory_allocated() - before) / 1e6
