"""The benchmark's convolutions: ConvBnScale2d, in evaluation and in training mode, checked against float64, then timed
with its rivals, and its floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn import modules, ops, reference

from .common import (
    COMPILE_MODES,
    EPS,
    LAYOUTS,
    MB,
    MOMENTUM,
    Compiler,
    batch_moments,
    check,
    dtype_name,
    first_line,
    progress,
    random_bn,
    random_tensor,
    statistics_errors,
)
from .layers import ConvCase, Layer
from .stopwatch import Rivals, Stopwatch, pairs_of

Calls = dict[str, Callable[..., Tensor]]  # by name: what takes the input, and the residual if there is one
Fold = Callable[..., tuple[Tensor, Tensor]]
TF32_UNIT = 2.0**-11  # rounding to TF32's significand

NOTES = {
    "ours": "ConvBnScale2d in eval. op: conv_bn_scale, which folds BN inside. With TF32 ours is the op, with "
    "allow_tf32=True. pair: conv_scale_shift on a scale and a shift that fold_bn made before. algorithm: what ours "
    "ran. aten, stem_sm80: the module under use_algorithm() of that; aten is PyTorch's convolution and one "
    "pass behind it.",
    "eager": "bn(conv(x)), then * factor and += residual where the layer has them, and the activation in place. "
    "float32 may be TF32 in cuDNN (flags); errors tell.",
    "compile": "torch.compile(eager, dynamic=False). max-autotune: its mode max-autotune-no-cudagraphs. freezing: "
    "with torch._inductor.config.freezing. best compile: the fastest mode of a row. Compiles take seconds, so only "
    "some rows have any: problem 73 three modes (in bfloat16 one; with TF32 none, as the rivals are those of the row "
    "before); first layers, depthwise layers and some of each network in float16 max-autotune freezing. All within a "
    "limit of compile time.",
    "cudnn": "torch.cudnn_convolution_relu, or _add_relu, on weight and bias with BN and factor folded into them. It "
    "has a ReLU also where the layer has ReLU6 or no activation: as much work, but another result.",
    "folded": "on the CPU: F.conv2d on weight and bias with BN and factor folded into them before, as "
    "torch.nn.utils.fusion.fuse_conv_bn_eval makes them, then += residual and the activation in place.",
    "conv": "F.conv2d without bias and with nothing behind it: what eager and aten contain.",
    "best rival": "the fastest of eager, compile, cudnn and folded.",
    "copy": "of a tensor like the output, which reads and writes it once; on the CPU y.clone().",
    "floor": "the larger of bytes / copy rate and flop / matrix rate (rates). bytes: input (the pixels that windows "
    "cover), weight and residual read once, output written once. copy rate: of 512 MB (CPU: 64), read and written "
    "bytes counted. matrix rate: multiplying matrices of 8192x8192 (CPU: 2048x2048, smaller ones where that takes "
    "seconds). On CUDA float32 has a third of float16's, as accuracy takes three products, and TF32 all of it, as the "
    "significands are equally long.",
    "errors": "of the first, middle and last image. norm: norm of the error over norm of the float64 result. element: "
    "the largest |error| / (conv(|x|, |w|) |scale| + |shift| + |residual|), or over the result's size where that is "
    "larger. What is ours must be within max(2 * eager's, one rounding of the dtype, or to TF32's significand).",
    "buffers": "inputs, residuals and the copy's tensors rotate as bn_scale's do; every rival allocates its output.",
}
TRAIN_NOTES = {
    "ours": "ConvBnScale2d in training mode, under no_grad: batch statistics, and the running ones updated. op: "
    "conv_bn_scale_train, which leaves num_batches_tracked to the module. algorithm: what computes the convolution. "
    "aten, stem_sm80: the module under use_algorithm() of that; aten is PyTorch's convolution, one read of it "
    "for the statistics and one pass.",
    "eager": "the same modules in training mode, under no_grad; what is behind bn as in evaluation.",
    "compile": "torch.compile(eager, dynamic=False), in float32 NCHW also in mode max-autotune-no-cudagraphs. Freezing "
    "is for evaluation alone. best compile: the fastest mode of a row. Within a limit of compile time.",
    "conv": NOTES["conv"],
    "best rival": "the fastest of eager and compile.",
    "copy": NOTES["copy"],
    "floor": f"{NOTES['floor']} In training too, though nothing can compute an output before it has read all inputs.",
    "errors": f"{NOTES['errors']} The float64 result has the float64 statistics of the whole batch. running_mean, "
    "running_var: after one call on random ones, the largest |error| of a channel over the sizes of its two terms, the "
    "old value's and the batch's; within max(2 * eager's, two roundings of its dtype).",
    "buffers": NOTES["buffers"],
}


# As one would write them where nobody needs the activation's input any more. gelu has no such form.
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu6": lambda y: F.relu6(y, inplace=True),
    "silu": lambda y: F.silu(y, inplace=True),
    "hardswish": lambda y: F.hardswish(y, inplace=True),
    "leaky_relu": lambda y: F.leaky_relu(y, inplace=True),
    "sigmoid": torch.sigmoid_,
    "hardsigmoid": lambda y: F.hardsigmoid(y, inplace=True),
    "mish": lambda y: F.mish(y, inplace=True),
    "tanh": torch.tanh_,
}


def activated(y: Tensor, activation: str) -> Tensor:
    """In place where that can be."""
    return IN_PLACE.get(activation, reference.ACTIVATIONS[activation])(y)


class Plain(nn.Module):
    """The rival of ConvBnScale2d: the model as one would write it."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.conv = nn.Conv2d(
            *(layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.padding),
            groups=layer.groups,
            bias=layer.bias,
        )
        self.bn = nn.BatchNorm2d(layer.outputs, EPS, MOMENTUM)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        if self.layer.scaling_factor != 1:
            y = y * self.layer.scaling_factor
        if residual is not None:
            y += residual
        return activated(y, self.layer.activation)


def activated_truth(total: Tensor, sizes: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Some activations are large where the sum is small."""
    truth = reference.ACTIVATIONS[activation](total)
    return truth, torch.maximum(sizes, truth.abs())


def forced(call: Callable[..., Tensor], algorithm: str) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:
        with fcb.use_algorithm(algorithm):
            return call(*inputs)

    return run


class Problem:
    """A case with its tensors: the plain model and ours, which share their parameters, and ways to call them."""

    def __init__(self, case: ConvCase, device: str) -> None:
        self.case = case
        layer = case.layer
        torch.manual_seed(0)  # the same numbers, whatever else a run measures
        self.plain = Plain(layer)
        bn = self.plain.bn
        for target, source in zip(
            (bn.running_mean, bn.running_var, bn.weight, bn.bias),
            random_bn(layer.outputs, torch.float32, "cpu"),
            strict=True,
        ):
            assert target is not None
            target.copy_(source)
        self.plain.to(device, case.dtype).to(memory_format=LAYOUTS[case.layout])  # type: ignore[call-overload]
        self.plain.train(case.train)
        conv = self.plain.conv
        self.module = modules.ConvBnScale2d.from_modules(conv, bn, layer.scaling_factor, layer.activation)
        self.running = [t for t in (bn.running_mean, bn.running_var) if t is not None]
        self.first_running = [t.clone() for t in self.running]
        self.window: tuple[Any, ...] = (conv.stride, conv.padding, conv.dilation, conv.groups)
        self.scale, self.shift = self.fold(ops.fold_bn)
        self.x = random_tensor(case.shape, case.dtype, case.layout, device)
        self.residual = random_tensor(case.output_shape, case.dtype, case.layout, device) if layer.residual else None
        self.batch = self.moments() if case.train else None

    def fold(self, fold_bn: Fold, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        bn, bias = self.plain.bn, self.plain.conv.bias
        parameters = (bn.running_mean, bn.running_var, bn.weight, bn.bias, bias)
        mean, var, weight, shift, bias = (None if p is None else p.detach().to(dtype) for p in parameters)
        return fold_bn(mean, var, weight, shift, self.case.layer.scaling_factor, EPS, bias)

    def inputs(self) -> list[Tensor]:
        return [self.x] if self.residual is None else [self.x, self.residual]

    def op(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``activation``: instead of the layer's."""
        conv, bn, factor = self.plain.conv, self.plain.bn, self.case.layer.scaling_factor
        convolution, batch_norm = (x, conv.weight, conv.bias), (*self.running, bn.weight, bn.bias, factor)
        epilogue = self.epilogue(residual, activation)
        ops = torch.ops.fused_conv_bn
        if self.case.train:
            return ops.conv_bn_scale_train(*convolution, *batch_norm, MOMENTUM, EPS, *self.window, **epilogue)
        return ops.conv_bn_scale(*convolution, *batch_norm, EPS, *self.window, **epilogue)

    def pair(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """The op behind a fold that was made before, in evaluation."""
        arguments = x, self.plain.conv.weight, self.scale, self.shift, *self.window
        return torch.ops.fused_conv_bn.conv_scale_shift(*arguments, **self.epilogue(residual, activation))

    def epilogue(self, residual: Tensor | None, activation: str | None) -> dict[str, Any]:
        activation = self.case.layer.activation if activation is None else activation
        return {"residual": residual, "activation": activation, "allow_tf32": self.case.allow_tf32}

    def ours(self) -> Calls:
        """By the name of their column: what is ours, and has to be accurate."""
        pair: Calls = {} if self.case.train else {"pair": self.pair}
        if self.case.allow_tf32:
            return {"ours": self.op, **pair}
        return {"ours": self.module, **({"op": self.op} if self.case.with_op else {}), **pair}

    def forced(self) -> Calls:
        """Ours with an algorithm that need not cover the problem."""
        ours = self.ours()["ours"]
        return {name: forced(ours, name) for name in self.case.forced} if self.x.is_cuda else {}

    def folded_parameters(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution with BatchNorm and the factor in them."""
        conv = self.plain.conv
        weight = (conv.weight * self.scale.view(-1, 1, 1, 1)).to(conv.weight)
        return weight.contiguous(memory_format=LAYOUTS[self.case.layout]), self.shift.to(self.x.dtype)

    def folded(self) -> Callable[..., Tensor]:
        weight, bias = self.folded_parameters()

        def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = F.conv2d(x, weight, bias, *self.window)
            if residual is not None:
                y += residual
            return activated(y, self.case.layer.activation)

        return run

    def folded_cudnn(self) -> Callable[..., Tensor]:
        weight, bias = self.folded_parameters()
        stride, padding, dilation, groups = self.window
        if self.residual is None:
            return lambda x: torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
        return lambda x, residual: torch.cudnn_convolution_add_relu(
            x, weight, residual, 1.0, bias, stride, padding, dilation, groups
        )

    def convolution(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return F.conv2d(x, self.plain.conv.weight, None, *self.window)

    # ---- errors ------------------------------------------------------------------------------------------------------

    def some_images(self, y: Tensor) -> Tensor:
        return y[sorted({0, len(y) // 2, len(y) - 1})]

    def moments(self) -> tuple[Tensor, Tensor, int]:
        """Those of the whole batch's convolution, without its bias, in float64."""
        weight = self.plain.conv.weight.double()
        return batch_moments(F.conv2d(self.x.double(), weight, None, *self.window))

    def truth(self) -> tuple[Tensor, Tensor]:
        """The result, and the size of what is added up in each element of it, in float64."""
        return activated_truth(*self.sum(), self.case.layer.activation)

    def sum(self) -> tuple[Tensor, Tensor]:
        """The same without the activation."""
        if self.batch is None:
            scale, shift = self.fold(reference.fold_bn, torch.float64)
        else:  # the convolution's bias would go with the mean
            mean, var, _ = self.batch
            weight, bias = self.plain.bn.weight.double(), self.plain.bn.bias.double()
            scale, shift = reference.fold_bn(mean, var, weight, bias, self.case.layer.scaling_factor, EPS)
        weight = self.plain.conv.weight.double()
        x, *residuals = (self.some_images(t).double() for t in self.inputs())
        residual = residuals[0] if residuals else None

        def result(tensors: Iterable[Tensor], residual: Tensor | None) -> Tensor:
            x, weight, scale, shift = tensors
            return reference.conv_scale_shift(x, weight, scale, shift, *self.window, residual=residual)

        tensors = (x, weight, scale, shift)
        sizes = result((t.abs() for t in tensors), None if residual is None else residual.abs())
        return result(tensors, residual), sizes

    def restore(self) -> None:
        """The running statistics, as they were at first."""
        for target, source in zip(self.running, self.first_running, strict=True):
            target.copy_(source)

    def errors(self, calls: Calls) -> dict[str, dict[str, float]]:
        truth = self.truth()
        errors = {}
        for name, call in calls.items():
            if self.case.train:
                self.restore()
            errors[name] = self.distance(call(*self.inputs()), *truth)
            if self.batch is not None:
                mean, var, count = self.batch
                moments = (mean if self.plain.conv.bias is None else mean + self.plain.conv.bias.double(), var, count)
                errors[name] |= statistics_errors(self.first_running, self.running, moments)
        return errors

    def distance(self, y: Tensor, truth: Tensor, sizes: Tensor) -> dict[str, float]:
        distance = (self.some_images(y).double() - truth).abs()
        return {"norm": (distance.norm() / truth.norm()).item(), "element": (distance / sizes).max().item()}

    def units(self) -> dict[str, float]:
        """What each of the errors may be in any case."""
        unit = TF32_UNIT if self.case.allow_tf32 else torch.finfo(self.case.dtype).eps / 2
        units = {"norm": unit, "element": unit}
        if self.case.train:
            units |= dict.fromkeys(("running_mean", "running_var"), torch.finfo(self.case.dtype).eps)
        return units


def measure_rates(watch: Stopwatch, device: str, dtypes: Sequence[torch.dtype], repeats: int) -> dict[str, Any]:
    """The device's rates of copying and of multiplying matrices."""

    def us(run: Callable[[int], object]) -> float:
        order = range(10 if watch.cuda else 2)
        watch.host_us(run, order)
        host_us = watch.host_us(run, order)
        return statistics.median(watch.device_us(run, order, host_us)[0] for _ in range(repeats))

    def product(matrix: Tensor) -> Callable[[int], object]:
        return lambda i: matrix @ matrix

    source = torch.randn((512 if watch.cuda else 64) * MB // 4, device=device)
    target = torch.empty_like(source)
    rates: dict[str, Any] = {"copy_gb_per_s": 2 * source.nbytes / us(lambda i: target.copy_(source)) / 1e3}
    tflops = {}
    for dtype in dict.fromkeys([torch.float16, *dtypes] if watch.cuda else dtypes):
        if dtype != torch.float32 or not watch.cuda:
            n = 8192 if watch.cuda else 256
            matrix = torch.randn(n, n, device=device).to(dtype)
            while n < 2048 and watch.host_us(product(matrix), range(1)) < 5e4:  # 16-bit ones take long on some CPUs
                n *= 2
                matrix = torch.randn(n, n, device=device).to(dtype)
            tflops[dtype_name(dtype)] = 2 * n**3 / us(product(matrix)) / 1e6
    if watch.cuda:
        tflops["TF32"] = tflops["float16"]
        tflops["float32"] = tflops["float16"] / 3
    return {**rates, "matrix_tflop_per_s": tflops}


def algorithm(problem: Problem) -> str:
    """What the rule chooses for ours; nothing on the CPU."""
    case = problem.case
    if problem.x.device.type != "cuda":
        return ""
    conv = problem.plain.conv
    assert not isinstance(conv.padding, str)
    return fcb.explain(
        problem.x,
        conv.weight,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        residual=case.layer.residual,
        allow_tf32=case.allow_tf32,
        training=case.train,
    )


def compare(problem: Problem, calls: Calls, watch: Stopwatch, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Their times and the copy's, and how they were taken."""
    case, device = problem.case, problem.x.device
    pairs = pairs_of(case.bytes)
    inputs = [problem.inputs(), *([t.clone() for t in problem.inputs()] for _ in range(pairs - 1))]
    sources = [torch.randn(case.output_shape, device=device).to(case.dtype) for _ in range(pairs)]
    targets = [torch.empty_like(source) for source in sources]

    def rival(call: Callable[..., Tensor]) -> Callable[[int], Tensor]:
        return lambda i: call(*inputs[i])

    rivals: Rivals = {
        "copy": lambda i: targets[i].copy_(sources[i]) if watch.cuda else sources[i].clone(),
        **{name: rival(call) for name, call in calls.items()},
    }
    stats, count = watch.compare(rivals, pairs, repeats)
    return stats, {"calls": count, "buffer_pairs": pairs}


@dataclass(frozen=True)
class ConvBench:
    """What the rows of a run share."""

    device: str
    repeats: int
    compiler: Compiler
    watch: Stopwatch

    def check(self, cases: Sequence[ConvCase]) -> list[dict[str, Any]]:
        return [c for case in progress(cases, "validate") for c in self.check_case(Problem(case, self.device))]

    def time(self, cases: Sequence[ConvCase], rates: dict[str, Any]) -> list[dict[str, Any]]:
        return [self.row(Problem(case, self.device), rates) for case in progress(cases, "convolutions")]

    def check_case(self, problem: Problem) -> list[dict[str, Any]]:
        case = problem.case
        calls = {**problem.ours(), **usable(problem.forced(), problem.inputs())[0]}
        errors = problem.errors({"eager": problem.plain, **calls})
        return [
            check(
                f"{case}, {name}, by {measure}",
                unit,
                {"ours": errors[name][measure], "eager": errors["eager"][measure]},
            )
            for name in calls
            for measure, unit in problem.units().items()
        ]

    def rivals(self, problem: Problem) -> tuple[Calls, dict[str, str]]:
        """What gives the layer's result without us (cudnn: or nearly), and why others are missing."""
        modes = problem.case.compile_modes
        compiled, missing = self.compiler(problem.plain, problem.inputs(), modes)
        if not modes:
            missing["compile"] = "this row has none, see the note on compile in the record"
        has_cudnn = problem.x.is_cuda and not problem.case.train  # which has no op with batch statistics
        cudnn, no_cudnn = usable({"cudnn": problem.folded_cudnn()} if has_cudnn else {}, problem.inputs())
        folded: Calls = {} if problem.x.is_cuda or problem.case.train else {"folded": problem.folded()}
        return {"eager": problem.plain, **compiled, **cudnn, **folded}, {**missing, **no_cudnn}

    def row(self, problem: Problem, rates: dict[str, Any]) -> dict[str, Any]:
        case = problem.case
        forced, missing = usable(problem.forced(), problem.inputs())
        ours = {**problem.ours(), **forced}
        spent = self.compiler.spent
        rivals, no_rivals = self.rivals(problem)
        compile_s = self.compiler.spent - spent
        same = {name: call for name, call in rivals.items() if name != "cudnn" or case.layer.activation == "relu"}
        errors = problem.errors({**ours, **same})
        stats, timing = compare(problem, {**ours, **rivals, "conv": problem.convolution}, self.watch, self.repeats)
        us = {name: float(s["median"]) for name, s in stats.items()}
        best = {"best rival": min(us[name] for name in rivals)}
        compiled = [us[name] for name in rivals if name in COMPILE_MODES]
        if compiled:
            best["best compile"] = min(compiled)
        rate = rates["matrix_tflop_per_s"]["TF32" if case.allow_tf32 else dtype_name(case.dtype)]
        floor = {"memory": case.bytes / rates["copy_gb_per_s"] / 1e3, "matrix": case.flop / rate / 1e6}
        return {
            "group": case.group,
            "case": str(case),
            "dtype": dtype_name(case.dtype),
            "layout": case.layout,
            "allow_tf32": case.allow_tf32,
            "layer": asdict(case.layer),
            "count": case.count,
            "shape": list(case.shape),
            "output_shape": list(case.output_shape),
            "algorithm": algorithm(problem),
            "flop": case.flop,
            "bytes": case.bytes,
            "output_bytes": case.output_bytes,
            "us": stats,
            "missing": {**missing, **no_rivals},
            "errors": errors,
            "floor_us": floor,
            "share_of_floor_percent": 100 * max(floor.values()) / us["ours"],
            "ours/copy": us["ours"] / us["copy"],
            **{f"{name}/ours": t / us["ours"] for name, t in {**us, **best}.items() if name not in ("copy", "ours")},
            "compile_s": compile_s,
            **timing,
        }


def usable(calls: Calls, inputs: Sequence[Tensor]) -> tuple[Calls, dict[str, str]]:
    """The calls that work on these inputs, and why the others do not."""
    usable, missing = {}, {}
    for name, call in calls.items():
        try:
            call(*inputs)
            usable[name] = call
        except RuntimeError as error:
            missing[name] = first_line(error)
    return usable, missing
