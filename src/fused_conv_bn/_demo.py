"""``python -m fused_conv_bn demo``: a check against PyTorch, with timings, within a minute."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ConvBnScale2d, _loader, bn_scale
from ._cli import UsageError
from ._count import counted
from ._progress import part, progress
from ._stopwatch import Processors, time_us
from ._table import table


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


def why_no_gpu() -> str:
    """Why torch or this build cannot use the GPU; empty where both can."""
    if not torch.cuda.is_available() or _loader.cuda_archs() is None:
        return "no GPU that torch and this build can use"
    capability = torch.cuda.get_device_capability()
    if not _loader.covers(capability, _loader.cuda_archs() or ""):
        return f"this build has no code for compute capability {capability[0]}.{capability[1]}"
    return ""


def choose_device(wanted: str | None) -> str:
    """The GPU if torch and this build can use it, else the CPU."""
    if wanted == "cpu":
        return "cpu"
    why = why_no_gpu()
    if not why:
        return "cuda"
    if wanted == "cuda":
        raise UsageError(f"--device is cuda: {why}")
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


@torch.no_grad()
def demo(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    torch.manual_seed(0)
    with part("start"):  # a GPU's first kernels take seconds
        model = Model().eval().to(device)
    ours = ConvBnScale2d.from_modules(model.conv, model.bn, model.scaling_factor)
    model64 = Model().eval().to(device).double()
    model64.load_state_dict(model.state_dict())
    batch = 8
    if device == "cuda":
        batch = 128 if torch.cuda.mem_get_info()[0] > 6e9 else 16
        where = torch.cuda.get_device_name()
    else:
        where = f"CPU, {counted(torch.get_num_threads(), 'thread')}"
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
    processors = Processors(on_cuda=device == "cuda")
    for name, reference, inputs, eager_call, our_call in progress(cases, "check and time"):
        processors.look()
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
        processors.look()
    if why := processors.why_disturbed():
        print(f"demo: {why}", file=sys.stderr)
    print(table(rows, numbers_from=1))
    if not accurate:
        print("\nWRONG: our error is above twice eager's.", file=sys.stderr)
        return 1
    return 0
