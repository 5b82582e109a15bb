"""What a run measures: bn_scale and bn_scale_train (bn_scale.py), the convolutions (conv.py), with every activation
(activations.py), concatenations and gates (cat_gate.py), pools (pools.py), with grad mode on (grad_mode.py), whole
steps (steps.py), whole models (models.py), KernelBench's problems with a BatchNorm (kernelbench.py), the layers of ten
networks (network_layers.py), the host's times (host.py), the CPU's short planes (short_planes.py).

Times compare only within a run: every row has the time of a device copy, measured in turn with everything else in it,
but for those of whole models and problems.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

import fused_conv_bn as fcb
from fused_conv_bn._cli import UsageError

from . import (
    activations,
    bn_scale,
    cat_gate,
    conv,
    grad_mode,
    host,
    kernelbench,
    models,
    network_layers,
    pools,
    record,
    short_planes,
    steps,
)
from .common import EPS, MB, SCALING_FACTOR, Compiler, progress
from .graph_watch import GraphWatch
from .layers import GROUPS, ConvCase, StepCase, activation_cases, conv_cases, grad_mode_cases, step_cases
from .stopwatch import FOOTPRINT, KERNELBENCH_TRIALS, MAX_PAIRS, Stopwatch

CPU_MAX_MB = 64
COMPILE_BUDGETS = {
    "bn_scale": 45,
    "conv": 120,
    "train": 40,
    "grad_mode": 60,
    "steps": 75,
    "models": 90,
    "kernelbench": 600,
    "cat_gate": 60,
}  # seconds
PARTS = [
    "bn_scale",
    "bn_scale_train",
    "host",
    "activations",
    "cat_gate",
    "pools",
    "grad_mode",
    "steps",
    "models",
    "kernelbench",
    "layers",
    "conv",
    *GROUPS,
]
BY_NAME = ["models", "kernelbench", "layers"]  # models take torchvision and timm, all take minutes
QUICK_TRIALS = 5  # of KernelBench's 100, and on the CPU, where it does not measure

NOTES = {
    "device time": "CUDA: the time between two events around the calls, over their number, so with the gaps between "
    "launches. A spinning kernel before the first event holds the device back until the host has queued all calls; "
    "where it did not, host_limited is true. CPU: wall time.",
    "repeats": "median, min and max over the repeats; in each, the rivals of a row take turns, in alternating order.",
    "buffers": f"calls rotate over pairs of input and output of {FOOTPRINT // MB} MB or more in all, so that they come "
    f"from memory; at most {MAX_PAIRS} pairs, so tensors under 2 MB may come from a cache.",
    "validation": "norm of the error over norm of the float64 result (for float64: long double, first and last image), "
    "with random running statistics and affine; ours must be within max(2 * eager's, one rounding of the dtype). "
    "Running statistics: the largest error of a channel after one call, over the sizes of its two terms, the old "
    "value's and the batch's; within max(2 * eager's, two roundings).",
}
PART_NOTES: dict[str, str | dict[str, str]] = {
    "bn_scale": bn_scale.NOTES,
    "bn_scale_train": bn_scale.TRAIN_NOTE,
    "short_planes": short_planes.NOTE,
    "host": host.NOTE,
    "conv": conv.NOTES,
    "train": conv.TRAIN_NOTES,
    "activations": activations.NOTES,
    "cat_gate": cat_gate.NOTE,
    "pools": pools.NOTE,
    "grad_mode": grad_mode.NOTES,
    "steps": steps.NOTES,
    "models": models.NOTES,
    "kernelbench": kernelbench.NOTES,
    "layers": network_layers.NOTES,
}


def selected_convolutions(args: argparse.Namespace, parts: Sequence[str], device: str) -> list[ConvCase]:
    cases = []
    for group in GROUPS:
        if group in parts or "conv" in parts:
            of_group = conv_cases(group, device)
            cases += [of_group[0], of_group[len(of_group) // 2]] if args.quick else of_group
    return with_batch(cases, args)


def with_batch(cases: Sequence[ConvCase], args: argparse.Namespace) -> list[ConvCase]:
    """With one that the cases differ in alone, they are one case."""
    return list(dict.fromkeys(replace(case, batch=args.conv_batch or case.batch) for case in cases))


def selected_steps(args: argparse.Namespace, device: str) -> list[StepCase]:
    cases = step_cases(device)
    if args.quick:  # one of problem 73 in each mode, and two layers
        layers = [case for case in cases if case.in_network]
        cases = [*cases[:3], layers[0], layers[len(layers) // 2]]
    return [replace(step, case=replace(step.case, batch=args.conv_batch or step.case.batch)) for step in cases]


@fcb.use_algorithm("by rule", "by rule")
@torch.no_grad()
def measure(args: argparse.Namespace) -> record.Report:
    began = time.perf_counter()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    default = (
        [p for p in PARTS if p not in BY_NAME]
        if device == "cuda"
        else ["bn_scale", "bn_scale_train", "host", "problem_73", "train"]
    )
    parts = args.only or default
    max_bytes = math.inf if args.max_mb is None and device == "cuda" else (args.max_mb or CPU_MAX_MB) * MB
    sizes, dtypes = bn_scale.SIZES, bn_scale.DTYPES
    if args.quick:
        sizes, dtypes = bn_scale.QUICK_SIZES, dtypes[:2]
    cases = {
        "bn_scale": list(bn_scale.bn_cases(sizes, dtypes, max_bytes, others=not args.quick)),
        "bn_scale_train": list(bn_scale.bn_train_cases(dtypes, max_bytes, others=not args.quick)),
    }
    cases = {part: of_part for part, of_part in cases.items() if part in parts and of_part}
    selected = selected_convolutions(args, parts, device)
    convs = {"conv": [c for c in selected if not c.train], "train": [c for c in selected if c.train]}
    convs = {part: of_part for part, of_part in convs.items() if of_part}
    with_each = with_batch(activation_cases(device, args.quick) if "activations" in parts else [], args)
    in_grad_mode = with_batch(grad_mode_cases(device) if "grad_mode" in parts else [], args)
    joined = cat_gate.cat_gate_cases(device, args.quick) if "cat_gate" in parts else []
    pooled = pools.pool_cases(device, args.quick) if "pools" in parts else []
    whole = models.model_cases(device, args.quick, args.models) if "models" in parts else []
    problems = kernelbench.problem_cases(device, args.quick, args.problems) if "kernelbench" in parts else []
    of_networks = network_layers.layer_cases(args) if "layers" in parts else []
    in_steps = selected_steps(args, device) if "steps" in parts else []
    short = short_planes.short_cases() if device == "cpu" and "bn_scale_train" in parts else []
    selected_by_part = [cases, convs, with_each, in_grad_mode, joined, pooled, whole, problems]
    selected_by_part += [of_networks, in_steps, short]
    if not any(selected_by_part) and "host" not in parts:
        raise UsageError(
            f"nothing of {', '.join(parts)} is left to measure: --max-mb, --models, --problems or --layers leaves out "
            f"all of it"
        )
    compilers = {
        part: Compiler((0.0 if args.quick else budget) if args.compile_budget is None else args.compile_budget)
        for part, budget in COMPILE_BUDGETS.items()
    }
    bench = bn_scale.Bench(device, args.repeats, bn_scale.NaiveKernel(device), compilers["bn_scale"], Stopwatch(device))
    # There are many rows, and some rivals run more kernels a call.
    watch = Stopwatch(device, max_calls=50)
    conv_benches = {part: conv.ConvBench(device, args.repeats, compilers[part], watch) for part in convs}
    activation_bench = activations.ActivationBench(device, args.repeats, watch)
    trials = QUICK_TRIALS if args.quick or device == "cpu" else KERNELBENCH_TRIALS
    grad_bench = grad_mode.GradBench(device, args.repeats, compilers["grad_mode"], watch, trials)

    joined_bench = cat_gate.CatGateBench(device, args.repeats, compilers["cat_gate"], watch)
    pool_bench = pools.PoolBench(device, args.repeats, watch)
    # A step is many kernels, or some seconds of a CPU's.
    step_watch = Stopwatch(device, max_calls=20 if device == "cuda" else 5)
    step_bench = steps.StepBench(device, args.repeats, compilers["steps"], step_watch)

    checks = [bench.check_bn_scale(case) for case in progress(cases.get("bn_scale", []), "validate")]
    for case in progress(cases.get("bn_scale_train", []), "validate"):
        checks += bench.check_bn_scale_train(case)
    for part, of_part in convs.items():
        checks += conv_benches[part].check(of_part)
    for short_case in short:
        checks += short_planes.check_short(short_case)
    checks += joined_bench.check(joined) + pool_bench.check(pooled)
    checks += activation_bench.check(with_each) + grad_bench.check(in_grad_mode) + step_bench.check(in_steps)
    model_bench = models.ModelBench(device, args.repeats, compilers["models"], watch, args.rivals)
    model_rows = model_bench.time(whole)
    few = QUICK_TRIALS if args.quick or device == "cpu" else kernelbench.TRIALS
    problem_bench = kernelbench.ProblemBench(device, few, compilers["kernelbench"], watch, args.rivals)
    problem_rows = problem_bench.time(problems)
    checks += model_bench.checks + problem_bench.checks
    report: record.Report = {
        **record.describe(device, args.commit),
        "settings": {"quick": args.quick, "repeats": args.repeats, "eps": EPS, "scaling_factor": SCALING_FACTOR},
        "validation": record.summary(checks),
    }
    if "host" in parts:  # the import first, with the machine still cool
        report["import_ms"] = host.time_import(1 if args.quick else 5)
        report["host"] = host.time_host(bench.watch, device, rounds=30 if args.quick else 300)
    if convolutions := [*selected, *(of.case for of in of_networks)]:
        report["rates"] = conv.measure_rates(watch, device, [case.dtype for case in convolutions], args.repeats)
    for part, of_part in convs.items():
        report[part] = conv_benches[part].time(of_part, report["rates"])
    if with_each:
        report["activations"] = activation_bench.time(with_each)
    if joined:
        report["cat_gate"] = joined_bench.time(joined)
    if pooled:
        report["pools"] = pool_bench.time(pooled)
    if in_grad_mode:
        report["grad_mode"] = grad_bench.time(in_grad_mode)
    if in_steps:
        report["steps"] = step_bench.time(in_steps)
    if whole:
        report["models"] = model_rows
    if problems:
        report["kernelbench"] = problem_rows
    if short:
        report["short_planes"] = short_planes.time_short(short, bench.watch, args.repeats)
    for part in cases:
        report[part] = [bench.time_bn_scale(case) for case in progress(cases[part], part)]
    failed = {**model_bench.failed, **problem_bench.failed}
    if of_networks:  # the last, as it has most kernels: if one of them harms the device, all other numbers are there
        replays = network_layers.COARSE_REPLAYS if args.coarse or args.quick else network_layers.REPLAYS
        layer_bench = network_layers.LayerBench(device, GraphWatch(device, replays), args.limit_s)
        report["layers"] = layer_bench.time(of_networks, report["rates"])
        report["layers_left_out"] = layer_bench.left_out
        report["settings"] |= {"replays": replays, "network_layers": network_layers.count_layers()}
        report["validation"] = record.summary(checks + layer_bench.checks)
        failed = {**failed, **layer_bench.failed}
    if failed:
        report["failed"] = failed
    report["notes"] = {**NOTES, **{part: note for part, note in PART_NOTES.items() if part in report}}
    spent = {part: compiler.spent for part, compiler in compilers.items()}
    return {**report, "compile_s": spent, "seconds": time.perf_counter() - began}
