"""The benchmark's activations: some layers in evaluation with each of them, against relu on the same layer and against
the bare convolution with one pass behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from fused_conv_bn import reference

from .common import check, dtype_name, progress
from .conv import Calls, Problem, activated, activated_truth, algorithm, compare, forced, usable
from .layers import ConvCase
from .stopwatch import Stopwatch

ACTIVATIONS = tuple(reference.ACTIVATIONS)
RELU = "relu"  # what the others are measured by

NOTES = {
    "ours": "conv_bn_scale with the row's activation. ours/relu: over the same layer's time with relu.",
    "aten": "the same with the algorithm aten: PyTorch's convolution and one pass behind it. On CUDA alone.",
    "conv": "F.conv2d without bias and with nothing behind it.",
    "pair": "of relu's row: conv_scale_shift on a scale and a shift that fold_bn made before.",
    "turns": "all of a layer's activations take turns in one comparison, so that its rows share copy and conv.",
    "errors": "as those of conv, for ours and aten.",
}


@dataclass(frozen=True)
class ActivationBench:
    """``cases``: without an activation, see activation_cases()."""

    device: str
    repeats: int
    watch: Stopwatch

    def check(self, cases: Sequence[ConvCase]) -> list[dict[str, Any]]:
        return [c for case in progress(cases, "validate") for c in self.check_case(Problem(case, self.device))]

    def time(self, cases: Sequence[ConvCase]) -> list[dict[str, Any]]:
        return [r for case in progress(cases, "activations") for r in self.rows(Problem(case, self.device))]

    def calls(self, problem: Problem) -> tuple[dict[str, Calls], dict[str, str]]:
        """By activation and by the name of their column; and why others are missing."""
        calls: dict[str, Calls] = {}
        missing: dict[str, str] = {}
        for activation in ACTIVATIONS:
            ours = with_activation(problem.op, activation)
            aten, missing = usable({name: forced(ours, name) for name in problem.case.forced}, problem.inputs())
            calls[activation] = {"ours": ours, **aten}
        calls[RELU]["pair"] = with_activation(problem.pair, RELU)
        return calls, missing

    def check_case(self, problem: Problem) -> list[dict[str, Any]]:
        total = problem.sum()
        checks = []
        for activation, calls in self.calls(problem)[0].items():
            truth = activated_truth(*total, activation)
            eager = problem.distance(activated(problem.plain(*problem.inputs()), activation), *truth)
            for name, call in calls.items():
                ours = problem.distance(call(*problem.inputs()), *truth)
                for measure, unit in problem.units().items():
                    errors = {"ours": ours[measure], "eager": eager[measure]}
                    checks.append(check(f"{of(problem.case, activation)}, {name}, by {measure}", unit, errors))
        return checks

    def rows(self, problem: Problem) -> list[dict[str, Any]]:
        calls, missing = self.calls(problem)
        named = {f"{name} {activation}": call for activation in calls for name, call in calls[activation].items()}
        stats, timing = compare(problem, {**named, "conv": problem.convolution}, self.watch, self.repeats)
        relu_us = float(stats[f"ours {RELU}"]["median"])
        rows = []
        for activation in calls:
            case = of(problem.case, activation)
            own = {name: stats[f"{name} {activation}"] for name in calls[activation]}
            row_stats = {"copy": stats["copy"], **own, "conv": stats["conv"]}
            us = {name: float(s["median"]) for name, s in row_stats.items()}
            row = {
                "group": case.group,
                "case": str(case),
                "activation": activation,
                "dtype": dtype_name(case.dtype),
                "layout": case.layout,
                "layer": asdict(case.layer),
                "shape": list(case.shape),
                "output_shape": list(case.output_shape),
                "algorithm": algorithm(problem),
                "us": row_stats,
                "missing": missing,
                "ours/relu": us["ours"] / relu_us,
                "ours/copy": us["ours"] / us["copy"],
            }
            if "aten" in us:
                row["ours/aten"] = us["ours"] / us["aten"]
            ratios = {f"{name}/ours": t / us["ours"] for name, t in us.items() if name not in ("copy", "ours")}
            rows.append({**row, **ratios, **timing})
        return rows


def with_activation(op: Callable[..., Tensor], activation: str) -> Callable[..., Tensor]:
    return lambda *inputs: op(*inputs, activation=activation)


def of(case: ConvCase, activation: str) -> ConvCase:
    return replace(case, layer=replace(case.layer, activation=activation))
