"""The benchmark's whole models: torchvision's and timm's, as they are, fused, and each of both as a CUDA graph.

On the CPU they are small images, and frozen instead of graphed.
"""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn._model_times import fill_in_statistics

from .common import MB, Compiler, check, dtype_name, progress
from .stopwatch import FOOTPRINT, Stopwatch, spread

NOTES = {
    "models": "random weights; each BatchNorm's statistics are those of what it reads, its affine is random. In "
    "evaluation mode, under no_grad, channels_last.",
    "forms": "eager: the model. fused: fuse(model). graphed: graphed(fuse(model)), with its copies of input and "
    "output; eager graphed: graphed(model). frozen: fuse(model, freeze=True), on the CPU. compile: torch.compile of "
    "the model, on the CPU with its weights frozen.",
    "times": "as users run it: the time of some calls in a row over their number, the host's work in it, where a "
    "device waits for that. CUDA: between events. Forms take turns.",
    "errors": "norm of the error over the norm of the float64 result of the same weights; in 16 bits ours must be "
    "within max(2 * eager's, one rounding of the dtype).",
}

Form = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ModelCase:
    name: str
    source: str  # a function of a package that makes it
    batch: int
    dtype: torch.dtype
    size: int = 224

    def __str__(self) -> str:
        return f"{self.name} batch {self.batch} {dtype_name(self.dtype)} {self.size}x{self.size}"

    def make(self) -> nn.Module:
        module, _, function = self.source.partition(":")
        call = getattr(importlib.import_module(module), function.partition("=")[0])
        name = function.partition("=")[2]
        model: nn.Module = call(name) if name else call(weights=None)
        return model.eval()


def model_cases(device: str, quick: bool) -> list[ModelCase]:
    half = torch.float16
    cases = [
        ModelCase("ResNet-50", "torchvision.models:resnet50", 32, half),
        ModelCase("ResNet-50", "torchvision.models:resnet50", 1, half),
        ModelCase("MobileNetV2", "torchvision.models:mobilenet_v2", 64, half),
        ModelCase("MobileNetV3-L", "timm:create_model=mobilenetv3_large_100", 64, half),
        ModelCase("EfficientNet-B0", "torchvision.models:efficientnet_b0", 64, half),
        ModelCase("DenseNet-121", "torchvision.models:densenet121", 32, half),
        ModelCase("MobileNetV2", "torchvision.models:mobilenet_v2", 1, half),
        ModelCase("ResNet-18", "torchvision.models:resnet18", 128, half),
        ModelCase("VGG11-BN", "torchvision.models:vgg11_bn", 32, half),
    ]
    if device == "cpu":
        cases = [
            ModelCase("ResNet-50", "torchvision.models:resnet50", 1, torch.float32),
            ModelCase("ResNet-18", "torchvision.models:resnet18", 8, torch.float32),
            ModelCase("MobileNetV2", "torchvision.models:mobilenet_v2", 1, torch.float32),
            ModelCase("EfficientNet-B0", "torchvision.models:efficientnet_b0", 1, torch.float32),
        ]
    return cases[:1] if quick else cases


class ModelBench:
    def __init__(self, device: str, repeats: int, compiler: Compiler, watch: Stopwatch) -> None:
        self.device, self.repeats, self.compiler, self.watch = device, repeats, compiler, watch

    def time(self, cases: Sequence[ModelCase]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(rows, checks)"""
        rows, checks = [], []
        for case in progress(cases, "models"):
            row, checked = self.row(case)
            rows.append(row)
            checks.append(checked)
        return rows, checks

    def row(self, case: ModelCase) -> tuple[dict[str, Any], dict[str, Any]]:
        model = case.make().to(self.device)
        x = torch.randn(case.batch, 3, case.size, case.size, device=self.device)
        fill_in_statistics(model, lambda: model(x))
        model = model.to(self.device, case.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.to(case.dtype).contiguous(memory_format=torch.channels_last)
        exact = copy.deepcopy(model).double()(x[:2].double())
        fused = copy.deepcopy(model)
        start = time.perf_counter()
        fcb.fuse(fused, x)
        self.watch.sync()
        fuse_s = time.perf_counter() - start
        forms: dict[str, Form] = {"eager": model, "fused": fused}
        if self.device == "cuda":
            forms |= {"graphed": fcb.graphed(fused), "eager graphed": fcb.graphed(model)}
        else:
            forms["frozen"] = fcb.fuse(copy.deepcopy(model), x, freeze=True)
        errors = {name: float((run(x)[:2].double() - exact).norm() / exact.norm()) for name, run in forms.items()}
        ours = max(error for name, error in errors.items() if not name.startswith("eager"))
        checked = check(str(case), torch.finfo(case.dtype).eps / 2, {"eager": errors["eager"], "ours": ours})
        modes = ["compile" if self.device == "cuda" else "compile freezing"]
        compiled, missing = self.compiler(model, (x,), modes)
        forms |= compiled
        best = "graphed" if "graphed" in forms else "frozen"
        stats = self.compare({name: self.call(run, x) for name, run in forms.items()})
        us = {name: of["median"] for name, of in stats.items()}
        counts = fcb.report(fused).to_dict()
        row = {
            "case": str(case),
            "model": case.name,
            "batch": case.batch,
            "dtype": dtype_name(case.dtype),
            "us": stats,
            "missing": missing,
            "errors": errors,
            "fuse and first call, s": fuse_s,
            "groups": counts["groups"],
            "counts": counts["counts"],
            **{f"{name}/{best}": us[name] / us[best] for name in us if name not in (best, "copy")},
        }
        return row, checked

    @staticmethod
    def call(run: Form, x: Tensor) -> Callable[[], object]:
        return lambda: run(x)

    def compare(self, calls: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
        source = torch.empty(FOOTPRINT // 4, device=self.device)
        target = torch.empty_like(source)
        calls = {**calls, f"copy of {FOOTPRINT // MB} MB": lambda: target.copy_(source)}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            for _ in range(3):
                call()
        for repeat in range(2 * self.repeats):
            for name in list(calls) if repeat % 2 == 0 else reversed(calls):
                times[name].append(self.several(calls[name]))
        return {name: spread(us) for name, us in times.items()}

    def several(self, call: Callable[[], object]) -> float:
        """Microseconds a call, of ten in a row; on the CPU of two."""
        count = 10 if self.device == "cuda" else 2
        if self.device == "cpu":
            return self.watch.host_us(lambda _: call(), range(count))
        cuda: Any = torch.cuda
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        call()
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / count
