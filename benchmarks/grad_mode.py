"""The benchmark's grad mode: problem 73 where the parameters require gradients, forward alone, as KernelBench times it
and everybody calls it who forgets no_grad. Whole steps are in steps.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .common import MB, Compiler, check, dtype_name, progress
from .conv import Calls, Problem, compare
from .layers import ConvCase
from .stopwatch import FOOTPRINT, KERNELBENCH_TRIALS, KERNELBENCH_WARM_UPS, Stopwatch, kernelbench_us

NOTES = {
    "ours": "ConvBnScale2d with grad mode on: its parameters require gradients, the input does not, and nobody calls "
    "backward. no_grad: the same module under no_grad. grad_fn: of ours' result.",
    "eager": "bn(conv(x)) * factor with grad mode on, compile: torch.compile(eager, dynamic=False) of that.",
    "kernelbench": "by the rules of KernelBench's timing.py, for models as their constructors leave them: training "
    f"mode, grad mode on, torch.rand as the input. Each model by itself: {KERNELBENCH_WARM_UPS} warm-ups with a "
    f"synchronisation behind each, the allocator's cache emptied, a trial that does not count, {KERNELBENCH_TRIALS} "
    f"that do. In each: a synchronisation, {FOOTPRINT // MB} MB written over L2, an event, the call, an event, a "
    "synchronisation. The mean of the trials. On the CPU and with --quick a few trials, on the CPU of wall time.",
    "errors": "of outputs as those of conv and train.",
}


def with_grad(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            return call(*inputs)

    return run


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
        return row

    def kernelbench(self, problem: Problem, calls: Calls) -> dict[str, Any]:
        x = torch.rand_like(problem.x)
        on_cuda = self.device == "cuda"
        us = {n: kernelbench_us(functools.partial(call, x), on_cuda, self.trials) for n, call in calls.items()}
        return {"us": us, **{f"{name}/ours": us[name]["mean"] / us["ours"]["mean"] for name in us if name != "ours"}}
