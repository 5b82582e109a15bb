"""The benchmark's layers of ten networks: each distinct convolution with all that the network has behind it, at several
batches; checked against float64, then timed in CUDA graphs beside its rivals."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .common import MB, InaccurateError, check, dtype_name, first_line, progress
from .conv import Calls, Problem, algorithm, forced
from .graph_watch import GraphWatch
from .layers import ConvCase
from .networks import NETWORKS, NetworkLayer, network_layers
from .stopwatch import Rivals

BATCHES = (1, 8, 32, 128)
KINDS = {  # by name on the command line: dtype, layout, whether TF32 will do
    "float16": (torch.float16, "channels_last", False),
    "bfloat16": (torch.bfloat16, "channels_last", False),
    "tf32": (torch.float32, "channels_last", True),
    "tf32_nchw": (torch.float32, "nchw", True),
    "float32": (torch.float32, "channels_last", False),
}
LIMIT_S = 300.0
LEAST_CALLS, MOST_CALLS = 5, 20  # in a graph
CALLS_MB = 64  # the calls of a small layer together, about a GPU's L2
REPLAYS, COARSE_REPLAYS = 20, 5
RIVALS = ("eager", "aten", "cudnn")

NOTES = {
    "layers": f"of {', '.join(NETWORKS)}, as torchvision defines them: each distinct convolution with a BatchNorm, and "
    "the residual and activation that fuse() has in its group; on an image of 299x299 for Inception-v3, else 224x224. "
    "networks: those that have the layer, and how often. benchmarks/networks.jsonl has the list.",
    "ours": "conv_bn_scale, by rule, which folds BN inside; in TF32 with allow_tf32=True. algorithm: what it ran.",
    "rivals": "eager: bn(conv(x)), the residual and the activation in place. aten: ours by PyTorch's convolution and "
    "one pass behind it. cudnn: torch.cudnn_convolution_relu, or _add_relu, on weight and bias that BN was folded into "
    "before, where the layer has ReLU. best rival: the fastest of these. conv: the bare convolution, no rival.",
    "times": f"of a call in a CUDA graph of {LEAST_CALLS} to {MOST_CALLS} calls, as many as move {CALLS_MB} MB, each "
    "with an input, residual and result of its own, and the same weight: what is small comes from L2, as in a network, "
    f"and what is large from memory. The median of {REPLAYS} replays (--coarse: {COARSE_REPLAYS}); the graphs of a row "
    "take turns in alternating order, behind a spinning kernel until the host has queued all. CPU: wall time of calls.",
    "floor": "as that of conv: the larger of bytes / copy rate and flop / matrix rate, both measured in this run "
    "(rates). A layer whose tensors come from L2 may be faster than bytes / copy rate.",
    "errors": "as those of conv, of the first, middle and last image, for what is ours and aten. A row whose ours is "
    "wrong or fails is not timed, and named in failed.",
}


@dataclass(frozen=True)
class LayerCase:
    case: ConvCase
    networks: tuple[tuple[str, int], ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the part layers")
    group.add_argument(
        "--layers",
        nargs="+",
        metavar="WORD",
        help="those that have one of these in the name of a network or in their own, such as ResNet-50 or 'depthwise'",
    )
    group.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="N", help="default: 1 8 32 128")
    group.add_argument(
        "--layer-kinds", nargs="+", choices=KINDS, default=["float16"], metavar="KIND", help=f"of {', '.join(KINDS)}"
    )
    group.add_argument("--coarse", action="store_true", help=f"{COARSE_REPLAYS} replays instead of {REPLAYS}")
    group.add_argument(
        "--limit-s",
        type=float,
        default=LIMIT_S,
        metavar="S",
        help=f"ends the part after S seconds, and says what was left out (default: {LIMIT_S:g})",
    )


def layer_cases(args: argparse.Namespace) -> list[LayerCase]:
    """By dtype and batch in the order that was asked for, and in each in the order of the networks."""
    chosen = [layer for layer in network_layers() if is_chosen(layer, args.layers)]
    if args.quick:
        chosen = [chosen[i] for i in sorted({0, len(chosen) // 2, len(chosen) - 1})] if chosen else []
    cases = []
    for kind in args.layer_kinds:
        dtype, layout, tf32 = KINDS[kind]
        group = f"{dtype_name(dtype)}{' TF32' if tf32 else ''} {layout}"
        for batch in args.batches:
            for of in chosen:
                count = sum(count for _, count in of.networks)
                case = ConvCase(group, of.layer, batch, dtype, layout, allow_tf32=tf32, count=count)
                cases.append(LayerCase(case, of.networks))
    return cases


def count_layers() -> dict[str, int]:
    """How many distinct ones each network has."""
    return dict(Counter(name for layer in network_layers() for name, _ in layer.networks))


def is_chosen(layer: NetworkLayer, words: Sequence[str] | None) -> bool:
    names = [str(layer.layer), *(network for network, _ in layer.networks)]
    return words is None or any(word.lower() in name.lower() for word in words for name in names)


@dataclass
class LayerBench:
    device: str
    watch: GraphWatch
    limit_s: float = LIMIT_S

    def __post_init__(self) -> None:
        self.checks: list[dict[str, Any]] = []
        self.failed: dict[str, str] = {}  # by case, why there is no row
        self.left_out: dict[str, int] = {}  # by dtype and batch, how many rows the limit of time has cost

    def time(self, cases: Sequence[LayerCase], rates: dict[str, Any]) -> list[dict[str, Any]]:
        rows = []
        stop = time.perf_counter() + self.limit_s
        lost = False  # the device, with which nothing is possible any more
        for of in progress(cases, "layers"):
            if lost or time.perf_counter() > stop:
                name = f"{of.case.group} batch {of.case.batch}"
                self.left_out[name] = self.left_out.get(name, 0) + 1
                continue
            try:
                rows.append(self.row(of, rates))
            except InaccurateError as error:
                self.failed[str(of.case)] = str(error)
            except Exception as error:
                self.failed[str(of.case)] = first_line(error)
                lost = self.is_lost()
        return rows

    def is_lost(self) -> bool:
        if self.device != "cuda":
            return False
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception:
            return True
        return False

    def row(self, of: LayerCase, rates: dict[str, Any]) -> dict[str, Any]:
        case, problem = of.case, Problem(of.case, self.device)
        ours: Calls = {"ours": problem.op}
        rivals: Calls = {"eager": problem.plain}
        if self.device == "cuda":
            ours["aten"] = forced(problem.op, "aten")
            if case.layer.activation == "relu":
                rivals["cudnn"] = problem.folded_cudnn()
        errors = problem.errors({"eager": problem.plain, **ours})
        self.check(problem, errors)
        calls = max(LEAST_CALLS, min(MOST_CALLS, CALLS_MB * MB // case.bytes))
        inputs = [problem.inputs(), *([t.clone() for t in problem.inputs()] for _ in range(calls - 1))]
        timed: Rivals = {
            name: with_each(call, inputs) for name, call in {**ours, **rivals, "conv": problem.convolution}.items()
        }
        stats, missing = self.watch.compare(timed, calls)
        for name in ("ours", "eager"):
            if name in missing:
                raise RuntimeError(f"{name}: {missing[name]}")
        us = {name: float(s["median"]) for name, s in stats.items()}
        best = min((name for name in RIVALS if name in us), key=us.__getitem__)
        rate = rates["matrix_tflop_per_s"]["TF32" if case.allow_tf32 and problem.x.is_cuda else dtype_name(case.dtype)]
        floor = {"memory": case.bytes / rates["copy_gb_per_s"] / 1e3, "matrix": case.flop / rate / 1e6}
        return {
            "group": case.group,
            "case": str(case),
            "networks": dict(of.networks),
            "batch": case.batch,
            "algorithm": algorithm(problem),
            "flop": case.flop,
            "bytes": case.bytes,
            "floor_us": rounded(floor),
            "us": {name: rounded(of_name) for name, of_name in stats.items()},
            "best rival": best,
            **{f"{name}/ours": t / us["ours"] for name, t in us.items() if name != "ours"},
            "best rival/ours": us[best] / us["ours"],
            "share_of_floor_percent": 100 * max(floor.values()) / us["ours"],
            "errors": {name: {m: float(f"{e:.4g}") for m, e in of_name.items()} for name, of_name in errors.items()},
            "missing": missing,
            "calls": calls,
        }

    def check(self, problem: Problem, errors: dict[str, dict[str, float]]) -> None:
        for name in errors.keys() - {"eager"}:
            for measure, unit in problem.units().items():
                found = {"ours": errors[name][measure], "eager": errors["eager"][measure]}
                self.checks.append(check(f"{problem.case}, {name}, by {measure}", unit, found))


def with_each(call: Callable[..., Tensor], inputs: Sequence[Sequence[Tensor]]) -> Callable[[int], Tensor]:
    return lambda i: call(*inputs[i])


def rounded(values: Any) -> dict[str, Any]:
    """Microseconds to the nanosecond: there are many rows."""
    return {name: value if isinstance(value, bool) else round(value, 3) for name, value in values.items()}
