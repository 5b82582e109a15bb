"""The benchmark's KernelBench: its thirty problems of level 2 and 3 that have a BatchNorm, as they are and fused.

In training mode with grad mode on, forward alone, which is how KernelBench calls a model; and in evaluation mode.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn._fuse.undisturbed import undisturbed
from fused_conv_bn._model_times import fill_in_statistics
from fused_conv_bn._stopwatch import call_us

from .common import MB, Compiler, InaccurateError, check, first_line, progress
from .kernelbench_problems import PROBLEMS, Problem
from .models import LEFT_OUT, groups_of
from .stopwatch import FOOTPRINT, KERNELBENCH_WARM_UPS, Stopwatch, spread

TOLERANCE = 1e-4  # KernelBench's in float32, absolute and relative
SEED = 42
SMALL = {"cuda": 1, "cpu": 4}
QUICK_SMALL = 8
QUICK = ("2-73", "2-97", "3-8")
TRIALS = 50
ROUNDING = 2.0**-22  # what an error may be by chance

NOTES = {
    "problems": "benchmarks/kernelbench_problems.py: KernelBench's layers, sizes and inputs, in float32, contiguous, "
    f"with seed {SEED}; on the CPU widths and images over {SMALL['cpu']}. train: training mode, grad mode on, forward "
    "alone, models as their constructors leave them. eval: evaluation mode, no_grad, with statistics of what is read "
    "and a random affine.",
    "forms": "eager: the model. fused: fcb.fuse(model). compile: torch.compile(model, dynamic=False), within a limit "
    "of compile time.",
    "times": f"as KernelBench takes them: {KERNELBENCH_WARM_UPS} warm-ups, then each call by itself between two "
    f"events, with the device idle and {FOOTPRINT // MB} MB written over L2 before it; the median of {TRIALS} trials "
    "in which the forms take turns. TF32 as PyTorch has it by default (flags). On the CPU wall time of a few trials.",
    "errors": "with TF32 off: norm of the error over the norm of the float64 result; ours must be within "
    "max(2 * eager's, some roundings), else the problem is not timed, and named in failed.",
    "judged": f"the largest of |ours - eager| / ({TOLERANCE:g} + {TOLERANCE:g} |eager|), which KernelBench wants to be "
    "at most 1. truth: the same of eager against float64. Where that is above 1 whoever rounds otherwise than eager "
    "may fail, as eager does in another memory format.",
}

Form = Callable[[Tensor], Any]


@dataclass(frozen=True)
class ProblemCase:
    problem: Problem
    train: bool
    small: int = 1

    def __str__(self) -> str:
        return f"{self.problem}{f' / {self.small}' if self.small > 1 else ''} {'train' if self.train else 'eval'}"

    def prepared(self, device: str) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(SEED)
        model, shape = self.problem.make(self.small)
        model, x = model.to(device), torch.rand(shape, device=device)
        if not self.train:
            fill_in_statistics(model.eval(), lambda: model(x))
        return model, x


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the part kernelbench")
    group.add_argument("--problems", nargs="+", metavar="WORD", help="those that have one of these in their name")


def problem_cases(device: str, quick: bool, words: Sequence[str] | None = None) -> list[ProblemCase]:
    small = QUICK_SMALL if quick else SMALL[device]
    cases = [ProblemCase(problem, train, small) for problem in PROBLEMS for train in (True, False)]
    if words is not None:
        return [case for case in cases if any(word.lower() in str(case).lower() for word in words)]
    return [case for case in cases if not quick or str(case).startswith(QUICK)]


class ProblemBench:
    def __init__(
        self, device: str, trials: int, compiler: Compiler, watch: Stopwatch, rivals: Sequence[str] = ("compile",)
    ) -> None:
        self.device, self.trials, self.compiler, self.watch = device, trials, compiler, watch
        self.wants_compile = "compile" in rivals
        self.checks: list[dict[str, Any]] = []
        self.failed: dict[str, str] = {}  # by case, why there is no row

    def time(self, cases: Sequence[ProblemCase]) -> list[dict[str, Any]]:
        rows = []
        for case in progress(cases, "kernelbench"):
            try:
                with torch.set_grad_enabled(case.train):
                    rows.append(self.row(case))
            except InaccurateError as error:
                self.failed[str(case)] = str(error)
            except Exception as error:  # no memory, ...: the other problems have their rows
                self.failed[str(case)] = first_line(error)
        return rows

    def row(self, case: ProblemCase) -> dict[str, Any]:
        model, x = case.prepared(self.device)
        fused = fcb.fuse(copy.deepcopy(model), x)
        errors, judged = self.judge(case, model, fused, x)
        forms: dict[str, Form] = {"eager": model, "fused": fused}
        missing: dict[str, str] = {}
        if self.wants_compile:
            of = copy.deepcopy(model)
            compiled, missing = self.compiler.all_of({"compile": of}, lambda run: run(x))
            forms |= compiled
        else:
            missing["compile"] = LEFT_OUT
        stats = self.compare(forms, x)
        us = {name: s["median"] for name, s in stats.items()}
        return {
            "case": str(case),
            "problem": str(case.problem),
            "train": case.train,
            "shape": list(x.shape),
            "us": stats,
            "missing": missing,
            "errors": errors,
            "judged": judged,
            **{f"{name}/fused": us[name] / us["fused"] for name in us if name != "fused"},
            **groups_of(fused),
        }

    def judge(
        self, case: ProblemCase, model: nn.Module, fused: nn.Module, x: Tensor
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Errors, and the differences as KernelBench judges them, of calls that leave the statistics as they were."""
        with without_tf32(), undisturbed(model), undisturbed(fused), torch.set_grad_enabled(case.train):
            eager, ours = model(x).detach(), fused(x).detach()
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
        size = exact.norm()
        errors = {name: float((y - exact).norm() / size) for name, y in (("eager", eager), ("ours", ours))}
        self.checks.append(check(str(case), ROUNDING, errors))
        allowed = TOLERANCE + TOLERANCE * eager.abs()
        return errors, {
            "ours": float(((ours - eager).abs() / allowed).max()),
            "truth": float(((exact - eager).abs() / allowed).max()),
        }

    def compare(self, forms: dict[str, Form], x: Tensor) -> dict[str, dict[str, float]]:
        on_cuda = self.device == "cuda"
        times: dict[str, list[float]] = {name: [] for name in forms}
        for run in forms.values():
            for _ in range(KERNELBENCH_WARM_UPS):
                run(x)
                self.watch.sync()
        for trial in range(self.trials):
            for name in list(forms) if trial % 2 == 0 else reversed(forms):
                self.watch.sync()
                if on_cuda:
                    torch.empty(FOOTPRINT // 8, dtype=torch.int64, device="cuda").fill_(SEED)
                times[name].append(call_us(lambda run=forms[name]: run(x), on_cuda))  # type: ignore[misc]
        return {name: spread(us) for name, us in times.items()}


@contextlib.contextmanager
def without_tf32() -> Any:
    cudnn: Any = torch.backends.cudnn
    with cudnn.flags(allow_tf32=False, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic):
        yield


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values) if values else 0.0
