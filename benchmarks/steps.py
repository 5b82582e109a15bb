"""The benchmark's steps: forward and backward of problem 73 and of networks' layers, with a gradient of the result that
is always the same; checked against float64, then timed, with the peak of their memory."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .common import Compiler, check, dtype_name, progress
from .conv import Problem, algorithm
from .layers import EAGER_COMPILED, OURS_COMPILED, StepCase
from .stopwatch import Rivals, Stopwatch, cuda

CHECKED_IMAGES = 16  # of which gradients are compared with float64's
GRADIENT_UNIT = 2.0**-20  # of a gradient's norm, which sums of many terms may be off by in any case

NOTES = {
    "step": "forward and backward, without an optimiser, with a gradient of the result that is always the same. train: "
    "the batch's statistics; else the running ones; frozen BN: its weight and bias require no gradient. Without x: the "
    "parameters alone require gradients, as in a network's first layer. With x: the input and the residual as well.",
    "eager": "bn(conv(x)), then * factor and += residual where the layer has them, and the activation in place.",
    "compile": "torch.compile(eager, dynamic=False), ours compiled: torch.compile(ConvBnScale2d, dynamic=False), each "
    "called and differentiated once before, within a limit of compile time.",
    "copy": "of a tensor like the result, which reads and writes it once.",
    "MB": "the peak of what the allocator gave out during a step, above what was there before it. On CUDA alone.",
    "errors": f"of gradients, of so many images ({CHECKED_IMAGES}): norm of the error over norm of the float64 result; "
    "within max(2 * eager's, one rounding of the dtype, 2^-20). In training mode the convolution's bias has none but "
    "roundings, and is not compared.",
}

Call = Callable[..., Tensor]
Gradients = dict[str, Tensor]


def gradients(call: Call, owner: nn.Module, inputs: Sequence[Tensor], dy: Tensor, x_needs_one: bool) -> Gradients:
    """One step of ``call``, which computes with the owner's parameters, without an optimiser."""
    with torch.enable_grad():
        leaves: Gradients = {name: p for name, p in owner.named_parameters() if p.requires_grad}
        inputs = [t.detach().requires_grad_(x_needs_one) for t in inputs]
        if x_needs_one:
            leaves |= dict(zip(("x", "residual"), inputs, strict=False))
        found = torch.autograd.grad(call(*inputs), list(leaves.values()), dy)
    return dict(zip(leaves, found, strict=True))


class StepProblem:
    """The case with its tensors. Both models have the same parameters."""

    def __init__(self, step: StepCase, device: str) -> None:
        self.step = step
        self.problem = Problem(step.case, device)
        plain = self.problem.plain
        if step.frozen:
            plain.bn.requires_grad_(False)
        self.inputs = self.problem.inputs()
        self.dy = torch.randn_like(plain(*self.inputs))

    def run(self, call: Call) -> Gradients:
        return gradients(call, self.problem.plain, self.inputs, self.dy, self.step.x)

    def errors(self) -> dict[str, dict[str, float]]:
        """Of each gradient, by model."""
        plain, x_needs_one = self.problem.plain, self.step.x
        inputs, dy = [t[:CHECKED_IMAGES] for t in self.inputs], self.dy[:CHECKED_IMAGES]
        found = {}
        for name, model in (("eager", plain), ("ours", self.problem.module)):
            found[name] = gradients(model, plain, inputs, dy, x_needs_one)
        exact = copy.deepcopy(plain).double()
        truth = gradients(exact, exact, [t.double() for t in inputs], dy.double(), x_needs_one)
        return {
            name: {who: ((of[name].double() - t).norm() / t.norm()).item() for who, of in found.items()}
            for name, t in truth.items()
            if not (self.step.case.train and name == "conv.bias")
        }


@dataclass(frozen=True)
class StepBench:
    device: str
    repeats: int
    compiler: Compiler
    watch: Stopwatch

    def check(self, cases: Sequence[StepCase]) -> list[dict[str, Any]]:
        return [c for case in progress(cases, "validate") for c in self.check_case(case)]

    def time(self, cases: Sequence[StepCase]) -> list[dict[str, Any]]:
        """In the order of the tables; what is to be compiled first, before the limit of compile time is reached."""
        first = sorted(cases, key=lambda case: -len(case.compiled))
        rows = {case: self.row(case) for case in progress(first, "steps")}
        return [rows[case] for case in cases]

    def check_case(self, case: StepCase) -> list[dict[str, Any]]:
        unit = max(torch.finfo(case.case.dtype).eps / 2, GRADIENT_UNIT)
        errors = StepProblem(case, self.device).errors()
        return [check(f"{case}, gradient of {name}", unit, found) for name, found in errors.items()]

    def row(self, step: StepCase) -> dict[str, Any]:
        case, of = step.case, StepProblem(step, self.device)
        plain, module = of.problem.plain, of.problem.module
        of_compiled: dict[str, Call] = {EAGER_COMPILED: plain, OURS_COMPILED: module}
        spent = self.compiler.spent
        compiled, missing = self.compiler.all_of({name: of_compiled[name] for name in step.compiled}, of.run)
        if not step.compiled:
            missing[EAGER_COMPILED] = "this row has none, see the note on compile in the record"
        calls: dict[str, Call] = {"ours": module, "eager": plain, **compiled}
        steps = {name: functools.partial(of.run, call) for name, call in calls.items()}
        target = torch.empty_like(of.dy)
        rivals: Rivals = {"copy": lambda i: target.copy_(of.dy)}
        for name, run in steps.items():
            rivals[name] = of_pair(run)
        stats, count = self.watch.compare(rivals, 1, self.repeats)
        us = {name: float(s["median"]) for name, s in stats.items()}
        row = {
            "group": case.group,
            "case": str(step),
            "dtype": dtype_name(case.dtype),
            "layout": case.layout,
            "train": case.train,
            "frozen": step.frozen,
            "x": step.x,
            "in_network": step.in_network,
            "layer": asdict(case.layer),
            "count": case.count,
            "shape": list(case.shape),
            "output_shape": list(case.output_shape),
            "algorithm": algorithm(of.problem),
            "us": stats,
            "missing": missing,
            "errors": of.errors(),
            "peak_mb": {name: peak_mb(run) for name, run in steps.items()} if self.device == "cuda" else {},
            "compile_s": self.compiler.spent - spent,
            "calls": count,
            "ours/copy": us["ours"] / us["copy"],
            **{f"{name}/ours": us[name] / us["ours"] for name in us if name not in ("copy", "ours")},
        }
        if compiled.keys() >= {EAGER_COMPILED, OURS_COMPILED}:
            row[f"{EAGER_COMPILED}/{OURS_COMPILED}"] = us[EAGER_COMPILED] / us[OURS_COMPILED]
        return row


def of_pair(run: Callable[[], object]) -> Callable[[int], object]:
    """There is one pair of buffers: a step's tensors are many times a cache's size, or its layer is a small one."""
    return lambda i: run()


def peak_mb(run: Callable[[], object]) -> float:
    """What was allocated at the most during a call, above what was there before."""
    run()
    cuda.synchronize()
    before = cuda.memory_allocated()
    cuda.reset_peak_memory_stats()
    run()
    cuda.synchronize()
    return float(cuda.max_memory_allocated() - before) / 1e6
