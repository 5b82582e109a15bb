"""``python -m fused_conv_bn {info,demo,bench}``: what is installed, a check with timings, the benchmark."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ConvBnScale2d, __version__, _loader, bn_scale

Rows = Sequence[Sequence[str]]


def table(rows: Rows, numbers_from: int | None = None) -> str:
    """Columns of equal width; those from ``numbers_from`` on are flushed right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = len(widths) if numbers_from is None else numbers_from
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i >= right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


# ---- info ------------------------------------------------------------------------------------------------------------


def library_rows() -> list[tuple[str, str]]:
    if os.environ.get(_loader.FORCE):
        why = f"not loaded: {_loader.FORCE}={os.environ[_loader.FORCE]}"
    elif torch.version.cuda is None:
        why = "not loaded: torch is built without CUDA"
    else:
        why = "not loaded: it is for another CUDA version than torch's"
    rows = [
        (f"library {name}", f"{path} ({'loaded' if name in _loader.loaded else why})")
        for name, path in _loader.shipped().items()
    ]
    archs = _loader.cuda_archs()
    if archs is not None:
        rows.append(("CUDA code for", archs))
    return rows


def gpu_rows() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("GPU", "none that torch can use")]
    archs = _loader.cuda_archs() or ""
    rows = []
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        state = "covered" if _loader.covers(capability, archs) else "NOT covered"
        name = torch.cuda.get_device_name(i)
        rows.append((f"GPU {i}", f"{name}, compute capability {capability[0]}.{capability[1]} ({state} by this build)"))
    return rows


def info(args: argparse.Namespace) -> int:
    rows = [
        ("fused_conv_bn", f"{__version__} ({_loader.PACKAGE})"),
        ("Python", f"{sys.version.split()[0]} ({sys.executable})"),
        ("torch", torch.__version__),
        ("torch's CUDA", torch.version.cuda or "none"),
        *library_rows(),
        *gpu_rows(),
        ("CPU threads", str(torch.get_num_threads())),
    ]
    print(table(rows))
    return 0


# ---- demo ------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """KernelBench level 2 problem 73, with statistics as training would have left them."""

    def __init__(self, scaling_factor: float = 2.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 64, kernel_size=3)
        self.bn = nn.BatchNorm2d(64)
        self.scaling_factor = scaling_factor
        # A fresh BatchNorm is nearly the identity, and would hide an error in it.
        nn.init.normal_(self.bn.weight)
        nn.init.normal_(self.bn.bias)
        assert self.bn.running_mean is not None and self.bn.running_var is not None
        nn.init.normal_(self.bn.running_mean)
        nn.init.uniform_(self.bn.running_var, 0.1, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.scaling_factor


def choose_device(wanted: str | None) -> str:
    """The GPU if torch and this build can use it, else the CPU."""
    if wanted == "cpu":
        return "cpu"
    why = ""
    if not torch.cuda.is_available() or _loader.cuda_archs() is None:
        why = "no GPU that torch and this build can use"
    else:
        capability = torch.cuda.get_device_capability()
        if not _loader.covers(capability, _loader.cuda_archs() or ""):
            why = f"this build has no code for compute capability {capability[0]}.{capability[1]}"
    if not why:
        return "cuda"
    if wanted == "cuda":
        raise SystemExit(f"demo: {why}")
    print(f"On the CPU: {why}.\n")
    return "cpu"


def largest_errors(
    reference: Callable[[Tensor], Tensor], inputs: Tensor, outputs: Sequence[Tensor], images: int = 8
) -> list[float]:
    """Of each output: the largest |output - reference| over the largest |reference|, which is called in float64."""
    largest = 0.0
    errors = [0.0] * len(outputs)
    for begin in range(0, len(inputs), images):  # in parts: float64 takes twice the memory
        truth = reference(inputs[begin : begin + images].double())
        largest = max(largest, truth.abs().max().item())
        for i, output in enumerate(outputs):
            error = (output[begin : begin + images].double() - truth).abs().max().item()
            errors[i] = error if not error <= errors[i] else errors[i]  # NaN stays
    return [error / largest for error in errors]


def time_us(calls: Sequence[Callable[[], Tensor]], device: str) -> list[float]:
    """Median time of each call. They take turns, so that a change of clocks meets all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    stop = time.perf_counter() + 5.0
    for turn in range(50):
        if turn >= 5 and time.perf_counter() > stop:
            break
        for call, samples in zip(calls, times, strict=True):
            if device == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                call()
                end.record()
                end.synchronize()
                samples.append(begin.elapsed_time(end) * 1e3)
            else:
                start = time.perf_counter()
                call()
                samples.append((time.perf_counter() - start) * 1e6)
    return [median(samples) for samples in times]


@torch.no_grad()
def demo(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    torch.manual_seed(0)
    model = Model().eval().to(device)
    ours = ConvBnScale2d.from_modules(model.conv, model.bn, model.scaling_factor)
    model64 = Model().eval().to(device).double()
    model64.load_state_dict(model.state_dict())
    batch = 8
    if device == "cuda":
        batch = 128 if torch.cuda.mem_get_info()[0] > 6e9 else 16
        where = torch.cuda.get_device_name()
    else:
        where = f"CPU, {torch.get_num_threads()} threads"
    x = torch.randn(batch, 8, 128, 128, device=device)
    y = model.conv(x)
    bn, factor = model.bn, model.scaling_factor

    def bn_eager() -> Tensor:
        return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps) * factor

    def bn_ours() -> Tensor:
        assert bn.running_mean is not None and bn.running_var is not None
        return bn_scale(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, factor, bn.eps)

    cases: list[tuple[str, Callable[[Tensor], Tensor], Tensor, Callable[[], Tensor], Callable[[], Tensor]]] = [
        ("conv, bn, * factor (ConvBnScale2d)", model64, x, lambda: model(x), lambda: ours(x)),
        ("bn, * factor (bn_scale)", lambda z: model64.bn(z) * factor, y, bn_eager, bn_ours),
    ]
    print(f"KernelBench 2.73: Conv2d(8, 64, 3), BatchNorm2d, * {factor:g} on {tuple(x.shape)}, float32, eval, {where}")
    print("Medians; errors are the largest one against float64 over the largest result.\n")
    rows = [("", "eager", "ours", "speed-up", "eager's error", "our error")]
    accurate = True
    for name, reference, inputs, eager_call, our_call in cases:
        eager_error, our_error = largest_errors(reference, inputs, (eager_call(), our_call()))
        eager_us, our_us = time_us((eager_call, our_call), device)
        # Twice eager's error is the package's promise; one rounding is what storing a result costs by itself.
        accurate &= our_error <= 2 * eager_error + torch.finfo(torch.float32).eps
        rows.append(
            (
                name,
                f"{eager_us:,.0f} us",
                f"{our_us:,.0f} us",
                f"{eager_us / our_us:.2f}x",
                f"{eager_error:.1e}",
                f"{our_error:.1e}",
            )
        )
    print(table(rows, numbers_from=1))
    if not accurate:
        print("\nWRONG: our error is above twice eager's.", file=sys.stderr)
        return 1
    return 0


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m fused_conv_bn", description="fused_conv_bn from the command line.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed, loaded and usable").set_defaults(main=info)
    demo_parser = commands.add_parser("demo", help="check and time a small model against PyTorch, within a minute")
    demo_parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    demo_parser.set_defaults(main=demo)
    bench_parser = commands.add_parser("bench", help="the benchmark")
    if "bench" in argv[:1]:
        from . import bench

        bench.add_arguments(bench_parser)
        bench_parser.set_defaults(main=bench.main)
    args = parser.parse_args(argv)
    return int(args.main(args) or 0)


if __name__ == "__main__":
    sys.exit(main())
