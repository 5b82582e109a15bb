"""KernelBench, level 2, problem 73 (Conv2d, BatchNorm2d, scaling), solved with fused_conv_bn.

In the form that KernelBench's evaluation loads: `Model` is the problem, `ModelNew` the solution, both are built from
get_init_inputs() and called with get_inputs(). The evaluation runs them in training mode, so that BatchNorm uses the
batch's statistics and updates the running ones: under no_grad to compare results, and with grad mode on, where nobody
calls backward, to take times. tests/repo/test_examples.py follows its rules, and checks the running statistics and the
gradients too, which it does not.

    python examples/kernelbench_problem_73.py      # compares both on this machine, and times them
"""

import torch
from torch import Tensor, nn

import fused_conv_bn as fcb

batch_size = 128
in_channels = 8
out_channels = 64
height, width = 128, 128
kernel_size = 3
scaling_factor = 2.0


class Model(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, scaling_factor: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size)
        self.bn = nn.BatchNorm2d(out_channels)
        self.scaling_factor = scaling_factor

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.scaling_factor


class ModelNew(fcb.ConvBnScale2d):
    """Parameters, random draws, buffers and results of `Model`, in training and in evaluation."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, scaling_factor: float) -> None:
        super().__init__(in_channels, out_channels, kernel_size, scaling_factor)


def get_inputs() -> list[Tensor]:
    return [torch.rand(batch_size, in_channels, height, width)]


def get_init_inputs() -> list[int | float]:
    return [in_channels, out_channels, kernel_size, scaling_factor]


def text(us: float) -> str:
    value, unit = (us, "us") if us < 1e3 else (us / 1e3, "ms") if us < 1e6 else (us / 1e6, "s")
    return f"{value:.3g} {unit}"


def main() -> None:
    from fused_conv_bn._progress import part
    from fused_conv_bn._stopwatch import time_us

    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = []
    for cls in (Model, ModelNew):
        torch.manual_seed(42)
        models.append(cls(*get_init_inputs()).to(device))
    x = get_inputs()[0].to(device)
    for mode, grad in (("train", True), ("train", False), ("eval", False)):
        for model in models:
            model.train(mode == "train")
        name = f"{mode}, {'grad mode on' if grad else 'no_grad'}"
        with part(name):  # seconds on a CPU
            with torch.no_grad():
                difference = (models[0](x) - models[1](x)).abs().max().item()
            with torch.set_grad_enabled(grad):
                old_us, new_us = time_us([lambda model=model: model(x) for model in models], device)
        print(
            f"{name}: largest difference {difference:.1e}; Model {text(old_us)}, ModelNew {text(new_us)}, "
            f"{old_us / new_us:.1f} times as fast",
            flush=True,
        )
    for name in ("running_mean", "running_var"):
        old, new = (getattr(model.bn, name) for model in models)
        print(f"{name}: largest relative difference {((old - new) / old).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
