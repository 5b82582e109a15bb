"""The benchmark's whole models: torchvision's and timm's, as they are, fused, and each of both as a CUDA graph, beside
cuDNN's fused ops, torch.compile and JAX; and a training step.

On the CPU they are small images, and frozen instead of graphed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn._model_times import fill_in_statistics

from .common import COMPILE_MODES, LAYOUTS, MB, Compiler, InaccurateError, check, dtype_name, first_line, progress
from .model_rivals import NoRivalError, cudnn_model, jax_result
from .model_steps import NOTES as STEP_NOTES
from .model_steps import ModelStep, limit
from .stopwatch import FOOTPRINT, Stopwatch, spread

# By name on the command line: the columns that go with it.
RIVALS = {
    "eager": ("eager", "eager graphed"),
    "cudnn": ("cudnn graphed",),
    "compile": ("compile", "compile freezing", "compile graphed"),
    "autotune": ("autotune graphed",),
    "jax": ("jax",),
}
# Where there is which, by the device and whether it is a training step.
COLUMNS = {
    ("cuda", False): ("eager", "eager graphed", "cudnn graphed", "compile graphed", "autotune graphed", "jax"),
    ("cpu", False): ("eager", "compile freezing", "jax"),
    ("cuda", True): ("eager", "eager graphed", "compile", "compile graphed"),
    ("cpu", True): ("eager", "compile"),
}
OURS = ("graphed", "frozen", "fused")  # the first of them that a row has is what rivals are compared with
COPY = "copy of"
LEFT_OUT = "left out by --rivals"
FURTHEST = 10  # times eager's error: a rival that is further off computes something else
CALLS = {"cuda": 10, "cpu": 2}  # in a row

NOTES = {
    "models": "random weights; each BatchNorm's statistics are those of what it reads, its affine is random. In "
    "evaluation mode, under no_grad, channels_last; nchw: contiguous. float32 as PyTorch computes it by default, with "
    "TF32 in cuDNN's convolutions (flags). train: see step.",
    "forms": "eager: the model. fused: fuse(model). graphed: graphed(fuse(model)), with its copies of input and "
    "output; eager graphed: graphed(model). frozen: fuse(model, freeze=True), on the CPU.",
    "rivals": "cudnn graphed: graphed() of the model with torch.cudnn_convolution_relu and _add_relu on folded weights "
    "in each group of fuse()'s that has ReLU, and in the other groups the convolution with a bias and PyTorch's ops. "
    "compile graphed, autotune graphed: torch.compile with freezing in mode reduce-overhead and max-autotune, in its "
    "own CUDA graphs; cudagraph_skips: how often it would not capture one. compile: of a training step, without "
    "graphs; compile freezing: on the CPU. jax: "
    "benchmarks/jax_models.py, NHWC with folded weights, compiled by XLA, in a process of its own behind the others, "
    "so not in turns with them; by the wall. missing says why there is none. A compile begins within a limit of "
    f"compile time. A rival whose error is above {FURTHEST} times eager's is not timed.",
    "times": "as users run it: the time of some calls in a row over their number, the host's work in it, where a "
    "device waits for that. CUDA: between events. Forms take turns.",
    "errors": "norm of the error over the norm of the float64 result of the same weights; in 16 bits ours must be "
    "within max(2 * eager's, one rounding of the dtype). A model whose ours is wrong is not timed, and named in "
    "failed.",
    **STEP_NOTES,
}

Form = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ModelCase:
    name: str
    source: str  # a function of a package that makes it
    batch: int
    dtype: torch.dtype
    size: int = 224
    layout: str = "channels_last"
    train: bool = False  # a step, in autocast to the dtype

    def __str__(self) -> str:
        dtype = f"{dtype_name(self.dtype)}{' nchw' if self.layout == 'nchw' else ''}{' train' if self.train else ''}"
        return f"{self.name} batch {self.batch} {dtype} {self.size}x{self.size}"

    def make(self) -> nn.Module:
        module, _, function = self.source.partition(":")
        call = getattr(importlib.import_module(module), function.partition("=")[0])
        name = function.partition("=")[2]
        model: nn.Module = call(name) if name else call(weights=None)
        return model.eval()

    def prepared(self, device: str) -> tuple[nn.Module, Tensor]:
        """The model and its input; for a step in float32, as autocast has it."""
        model = self.make().to(device)
        x = torch.randn(self.batch, 3, self.size, self.size, device=device)
        fill_in_statistics(model, lambda: model(x))
        dtype, layout = torch.float32 if self.train else self.dtype, LAYOUTS[self.layout]
        model = model.to(device, dtype, memory_format=layout)  # type: ignore[call-overload]
        return model, x.to(dtype).contiguous(memory_format=layout)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(name for name in text.split(",") if name)
        if unknown := [name for name in found if name not in RIVALS]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(RIVALS)}")
        return found

    group = parser.add_argument_group("the part models")
    group.add_argument(
        "--rivals",
        type=names,
        default=tuple(RIVALS),
        metavar="NAME,...",
        help=f"time these beside ours, of {','.join(RIVALS)} (default: all; with --quick no torch.compile)",
    )
    group.add_argument("--models", nargs="+", metavar="WORD", help="those that have one of these in their name")


def model_cases(device: str, quick: bool, words: Sequence[str] | None = None) -> list[ModelCase]:
    half = torch.float16
    resnet50 = ModelCase("ResNet-50", "torchvision.models:resnet50", 32, half)
    cases = [
        resnet50,
        ModelCase("ResNet-50", "torchvision.models:resnet50", 1, half),
        ModelCase("MobileNetV2", "torchvision.models:mobilenet_v2", 64, half),
        ModelCase("MobileNetV3-L", "timm:create_model=mobilenetv3_large_100", 64, half),
        ModelCase("EfficientNet-B0", "torchvision.models:efficientnet_b0", 64, half),
        ModelCase("DenseNet-121", "torchvision.models:densenet121", 32, half),
        ModelCase("MobileNetV2", "torchvision.models:mobilenet_v2", 1, half),
        ModelCase("ResNet-18", "torchvision.models:resnet18", 128, half),
        ModelCase("VGG11-BN", "torchvision.models:vgg11_bn", 32, half),
        replace(resnet50, dtype=torch.float32, layout="nchw"),
        replace(resnet50, train=True),
    ]
    if device == "cpu":
        cases = [
            ModelCase("ResNet-50", "torchvision.models:resnet50", 1, torch.float32),
            ModelCase("ResNet-18", "torchvision.models:resnet18", 8, torch.float32),
            ModelCase("MobileNetV2", "torchvision.models:mobilenet_v2", 1, torch.float32),
            ModelCase("EfficientNet-B0", "torchvision.models:efficientnet_b0", 1, torch.float32),
        ]
    if words is not None:
        cases = [case for case in cases if any(word.lower() in str(case).lower() for word in words)]
    return cases[:1] if quick else cases


class ModelBench:
    def __init__(
        self,
        device: str,
        repeats: int,
        compiler: Compiler,
        watch: Stopwatch,
        rivals: Sequence[str] = tuple(RIVALS),
    ) -> None:
        self.device, self.repeats, self.compiler, self.watch = device, repeats, compiler, watch
        self.rivals = rivals
        self.checks: list[dict[str, Any]] = []
        self.failed: dict[str, str] = {}  # by case, why there is no row

    def time(self, cases: Sequence[ModelCase]) -> list[dict[str, Any]]:
        rows = []
        for case in progress(cases, "models"):
            try:
                rows.append(self.step_row(case) if case.train else self.row(case))
            except InaccurateError as error:
                self.failed[str(case)] = str(error)
            except Exception as error:  # no torchvision, no memory, ...: the other models have their rows
                self.failed[str(case)] = first_line(error)
        return rows

    def wanted(self, case: ModelCase) -> tuple[list[str], dict[str, str]]:
        """The columns of this run's rivals, and that the others were left out."""
        columns = COLUMNS[self.device, case.train]
        asked = {name for rival in self.rivals for name in RIVALS[rival]}
        return [n for n in columns if n in asked], {n: LEFT_OUT for n in columns if n not in asked}

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def row(self, case: ModelCase) -> dict[str, Any]:
        model, x = case.prepared(self.device)
        exact = copy.deepcopy(model).double()(x[:2].double())
        fused = copy.deepcopy(model)
        start = time.perf_counter()
        fcb.fuse(fused, x)
        self.watch.sync()
        fuse_s = time.perf_counter() - start
        forms: dict[str, Form] = {"fused": fused}
        if self.device == "cuda":
            forms["graphed"] = fcb.graphed(fused)
        else:
            forms["frozen"] = fcb.fuse(copy.deepcopy(model), x, freeze=True)

        def error_of(y: Tensor) -> float:
            return float((y[:2].double() - exact).norm() / exact.norm())

        errors = {"eager": error_of(model(x)), **{name: error_of(run(x)) for name, run in forms.items()}}
        found = {"eager": errors["eager"], "ours": max(errors[name] for name in forms)}
        unit = torch.finfo(case.dtype).eps / 2
        self.checks.append(check(str(case), unit, found))
        wanted, missing = self.wanted(case)
        furthest = FURTHEST * max(errors["eager"], unit)
        skips = cudagraph_skips()
        for name, make in self.rivals_of(model, x, wanted, missing).items():
            try:
                run = make()
                for _ in range(3):  # graphs are captured, replayed and replayed again
                    y = run(x)
                errors[name] = error_of(y)
                if errors[name] <= furthest:
                    forms[name] = run
                else:
                    missing[name] = f"its error is {errors[name]:.2g}, eager's {errors['eager']:.2g}"
            except Exception as error:  # of the rival: the row says so
                missing[name] = first_line(error)
        stats = self.compare({name: self.call(run, x) for name, run in forms.items()})
        row: dict[str, Any] = {"fuse and first call, s": fuse_s, **groups_of(fused)}
        if skips := cudagraph_skips() - skips:
            row["cudagraph_skips"] = skips
        if "jax" in wanted:
            try:
                y, row["jax"] = jax_result(case.name, model, x, 2 * self.repeats, CALLS[self.device])
                errors["jax"] = error_of(y.to(exact.device))
                if errors["jax"] > furthest:
                    raise NoRivalError(f"its error is {errors['jax']:.2g}, eager's {errors['eager']:.2g}")
                stats["jax"] = spread(row["jax"].pop("us"))
            except NoRivalError as error:
                missing["jax"] = str(error)
            except Exception as error:
                missing["jax"] = first_line(error)
        return {**described(case, stats), "missing": missing, "errors": errors, **row}

    def rivals_of(
        self, model: nn.Module, x: Tensor, wanted: Sequence[str], missing: dict[str, str]
    ) -> dict[str, Callable[[], Form]]:
        """What makes each of them, but for JAX. All that torch.compile makes is made here."""
        compiled, not_compiled = self.compiler(model, (x,), [name for name in wanted if name in COMPILE_MODES])
        missing |= not_compiled
        makers: dict[str, Callable[[], Form]] = {
            "eager": lambda: model,
            "eager graphed": lambda: fcb.graphed(model),
            "cudnn graphed": lambda: fcb.graphed(cudnn_model(model, x)),
        }
        found = {name: makers[name] for name in wanted if name in makers}
        return {**found, **{name: functools.partial(given, run) for name, run in compiled.items()}}

    # ---- a training step -----------------------------------------------------------------------------------------

    def step_row(self, case: ModelCase) -> dict[str, Any]:
        of = ModelStep(*case.prepared(self.device), case.dtype)
        truth = of.truth()
        start = time.perf_counter()
        fused = fcb.fuse(of.copied(), of.x)
        step = of.step_of(fused)
        step()
        self.watch.sync()
        fuse_s = time.perf_counter() - start
        wanted, missing = self.wanted(case)
        errors = {"eager": of.error(of.model, of.step_of(of.model), truth), "fused": of.error(fused, step, truth)}
        forms: dict[str, Callable[[], object]] = {"fused": step}
        if self.device == "cuda":
            forms["graphed"] = of.step_of(fcb.graphed(fused))
            errors["graphed"] = of.error(fused, forms["graphed"], truth)
        if "eager" in wanted:
            forms["eager"] = of.step_of(of.model)
        copies = {name: of.copied() for name in wanted if name != "eager"}
        to_compile: dict[str, Callable[..., Tensor]] = {
            name: m for name, m in copies.items() if name.startswith("compile")
        }
        compiled, not_compiled = self.compiler.all_of(to_compile, lambda run: of.step_of(run)())
        missing |= not_compiled
        steps = {name: of.step_of(run) for name, run in compiled.items()}
        if "eager graphed" in copies:
            steps["eager graphed"] = of.step_of(fcb.graphed(copies["eager graphed"]))
        for name, run in steps.items():
            try:
                own = copies[name]
                for _ in range(3):  # graphs are captured, replayed and replayed again
                    run()
                errors[name] = of.error(own, run, truth)
                if not errors[name] <= limit(errors["eager"]):
                    raise NoRivalError(f"its error is {errors[name]:.2g}, eager's {errors['eager']:.2g}")
                forms[name] = run
            except NoRivalError as error:
                missing[name] = str(error)
            except Exception as error:  # of the form: the row says so
                missing[name] = first_line(error)
        ours = max(error for name, error in errors.items() if name in OURS)
        allowed = limit(errors["eager"])
        if not ours <= allowed:
            raise InaccurateError(f"{case}: error of gradients {ours:.3g}, allowed {allowed:.3g}")
        self.checks.append({"case": str(case), "limit": allowed, "eager": errors["eager"], "ours": ours})
        stats = self.compare(forms)
        row = {"fuse and first call, s": fuse_s, **groups_of(fused)}
        return {**described(case, stats), "missing": missing, "errors": errors, **row}

    # ---- times ---------------------------------------------------------------------------------------------------

    @staticmethod
    def call(run: Form, x: Tensor) -> Callable[[], object]:
        return lambda: run(x)

    def compare(self, calls: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
        source = torch.empty(FOOTPRINT // 4, device=self.device)
        target = torch.empty_like(source)
        calls = {**calls, f"{COPY} {FOOTPRINT // MB} MB": lambda: target.copy_(source)}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            for _ in range(3):
                call()
        for repeat in range(2 * self.repeats):
            for name in list(calls) if repeat % 2 == 0 else reversed(calls):
                times[name].append(self.several(calls[name]))
        return {name: spread(us) for name, us in times.items()}

    def several(self, call: Callable[[], object]) -> float:
        """Microseconds a call, of some in a row."""
        count = CALLS[self.device]
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


def given(run: Any, *_: object) -> Any:
    """What was made before."""
    return run


def cudagraph_skips() -> int:
    """How often torch.compile would not capture a graph that it was asked for."""
    counters: Any = importlib.import_module("torch._dynamo.utils").counters
    return int(counters["inductor"]["cudagraph_skips"])


def described(case: ModelCase, stats: dict[str, dict[str, float]]) -> dict[str, Any]:
    us = {name: of["median"] for name, of in stats.items()}
    best = next(name for name in OURS if name in us)
    rivals = {name: t for name, t in us.items() if name not in OURS and not name.startswith(COPY)}
    row: dict[str, Any] = {"case": str(case), "model": case.name, "batch": case.batch, "dtype": dtype_name(case.dtype)}
    row |= {"us": stats, **{f"{name}/{best}": t / us[best] for name, t in rivals.items()}}
    if rivals:
        fastest = min(rivals, key=rivals.__getitem__)
        row |= {"best rival": fastest, "best rival/ours": rivals[fastest] / us[best]}
    return row


def groups_of(fused: nn.Module) -> dict[str, Any]:
    counts = fcb.report(fused).to_dict()
    return {"groups": counts["groups"], "counts": counts["counts"]}
