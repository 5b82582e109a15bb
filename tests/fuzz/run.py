"""Runs a problem and holds its results to the promises: in norm and element by element at most twice eager's error; the same
bits twice; nothing written but what is to be; no value taken from beyond a tensor."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import fused_conv_bn as fcb
from fused_conv_bn import _pooling, conditions, reference

from . import squeeze, truth
from .problem import CONVOLVED, POOLED, RUNNING, TRAINING, Problem
from .truth import Exact, unit
from .values import Spec, bits, placed, tensor

ROUNDINGS = 10
"""What a result is made of, each of up to one unit roundoff: the convolution, the mean's difference, the scale's five, their
product, the shift and the sum. Eager's error may be less than that by luck, so that this is always allowed."""
STORED_ROUNDINGS = 4
"""The same in 16 bits: the convolution's result and the op's, twice the roundings of both; all else is float32."""
GRADIENT_ROUNDINGS = 16
"""The same of a gradient, whose chain has the forward's in it."""
STEPS = {torch.float64: 12, torch.float32: 6, torch.float16: 2, torch.bfloat16: 2}
"""Roundoffs of a gradient in norm beyond eager's: of a handful of steps that both take (tests/ops/test_autograd.py)."""
FEW = 200
"""Elements in which a norm is as much luck as one of them is."""
FORMATS = {n: {"contiguous", "channels_last"} if n > 3 else {"contiguous"} for n in range(2, 6)}
"""Layouts of inputs and weights, by their dimensions, for which eager's strides are promised."""
FEW_CHANNELS = 16
"""A scale's roundings are those of all its channel. Of fewer channels in a norm eager's may be nothing by luck."""


class Failure(AssertionError):
    """A promise that a problem breaks."""


class Invalid(ValueError):
    """A problem that is none: PyTorch refuses it as well, or it asks for what the ops do not offer."""


class Placed:
    """The tensors of a problem in their memory, and what was there before."""

    def __init__(self, p: Problem, device: str) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.memory: dict[str, Tensor] = {}
        for name, spec in p.specs().items():
            self.tensors[name], self.memory[name] = placed(spec, device)
        self.before = {name: m.clone() for name, m in self.memory.items()}

    def view(self, name: str, memory: Tensor) -> Tensor:
        t = self.tensors[name]
        return memory.as_strided(t.shape, t.stride(), t.storage_offset())

    def first_values(self) -> dict[str, Tensor]:
        return {name: self.view(name, memory) for name, memory in self.before.items()}

    def restore(self, names: set[str]) -> None:
        for name in names:
            self.memory[name].data.copy_(self.before[name])  # no new version: a backward may have kept them

    def changed(self, written: set[str]) -> list[tuple[str, Tensor]]:
        """A boolean for each tensor, true if memory changed that may not have."""
        found = []
        for name, memory in self.memory.items():
            was = self.before[name]
            if name in written:
                memory, was = memory.clone(), was.clone()
                for m in (memory, was):
                    self.view(name, m).zero_()
            found.append((name, (bits(memory) != bits(was)).any()))
        return found


# ---- ours ------------------------------------------------------------------------------------------------------------


@functools.cache
def _emulated() -> tuple[Any, Any]:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "emulator"))
    import emulated
    import emulated_pooling

    return emulated, emulated_pooling


def function_of(p: Problem, device: str) -> Callable[..., Any]:
    if device != "emulator":
        return getattr(fcb, p.op)
    if p.gradients:
        return getattr(fcb, p.op)  # by emulated kernels: see ours_everywhere()
    kernels = _emulated()[p.op in POOLED]
    named: dict[str, Any] = {"capability": p.capability}
    if p.op in CONVOLVED:
        named["algorithm"] = p.algorithm
    if p.op == "gate_conv_bn_scale":
        return lambda x, gate, *others, **epilogue: kernels.conv_bn_scale(x, *others, gates=gate, **named, **epilogue)
    if p.op == "conv_bn_scale_train":
        named["statistics"] = p.statistics
    return functools.partial(getattr(kernels, p.op), **named)


@contextlib.contextmanager
def ours_everywhere(p: Problem, device: str) -> Iterator[None]:
    """Where small steps, and on the CPU the gradients of max pooling, are PyTorch's by rule, our ops run."""
    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(conditions, "LEAST_OF_STEPS", {True: 0, False: 0}))
        stack.enter_context(patch(_pooling, "TRAINS_ON", ("cpu", "cuda")))
        if device == "emulator" and p.gradients:
            for name in ("_train", "_backward"):
                emulated = getattr(_emulated()[1], f"max_pool2d{name}")
                stack.enter_context(patch(_pooling, name, functools.partial(emulated, capability=p.capability)))
        yield


def module_of(p: Problem, t: dict[str, Tensor]) -> fcb.ConvBnScale2d:
    affine = "weight" in t
    m = fcb.ConvBnScale2d(
        *(p.shape[1], p.filters, p.kernel, p.factor, p.stride, p.padding, p.dilation, p.groups, "conv_bias" in t),
        *(p.padding_mode, p.eps, p.momentum, affine, "running_mean" in t, p.activation),
        device="meta",
        negative_slope=p.slope,
        residual_last=p.residual == "last",
    )
    m.conv.weight = nn.Parameter(t["conv_weight"])
    if "conv_bias" in t:
        m.conv.bias = nn.Parameter(t["conv_bias"])
    if affine:
        m.bn.weight, m.bn.bias = nn.Parameter(t["weight"]), nn.Parameter(t["bias"])
    if "running_mean" in t:
        m.bn.running_mean, m.bn.running_var = t["running_mean"], t["running_var"]
        m.bn.num_batches_tracked = torch.zeros((), dtype=torch.long, device=t["input"].device)
    return m.train(p.op in TRAINING)


def leaf_names(p: Problem, t: dict[str, Tensor]) -> list[str]:
    return [name for name in t if name not in RUNNING]


def call(p: Problem, device: str, t: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The results and the leaves."""
    leaves = {k: v.detach().requires_grad_() for k, v in t.items() if k not in RUNNING} if p.gradients else {}
    t = t | leaves
    with torch.set_grad_enabled(p.gradients), fcb.use_algorithm(p.algorithm, p.statistics):
        if p.way == "module":
            m = module_of(p, t)
            if p.gradients:
                of_module = {"conv_weight": m.conv.weight, "conv_bias": m.conv.bias}
                of_module |= {"weight": m.bn.weight, "bias": m.bn.bias}
                leaves |= {k: v for k, v in of_module.items() if k in leaves}
            y = m(t["input"], t.get("residual"))
            if p.op in TRAINING and "running_mean" in t and int(m.bn.num_batches_tracked) != 1:
                raise Failure("num_batches_tracked was not counted up")
        else:
            positional, named = p.arguments(t)
            y = function_of(p, device)(*positional, **named)
            if p.op == "conv_bn_scale" and p.way == "function" and device != "emulator" and not p.gradients:
                check_means(y, *fcb.conv_bn_scale_mean(*positional, **named))
    results = dict(zip(("scale", "shift"), y, strict=True)) if p.op == "fold_bn" else {"result": y}
    if p.op in TRAINING:
        results |= {name: t[name] for name in RUNNING if name in t}
    return results, leaves


def check_means(expected: Tensor, y: Tensor, means: Tensor) -> None:
    """Of conv_bn_scale_mean, beside conv_bn_scale's result: a mean is rounded once, and its sum for each pixel at most."""
    if y.stride() != expected.stride() or (bits(y) != bits(expected)).any():
        raise Failure("conv_bn_scale_mean: another result than conv_bn_scale's")
    dims = tuple(range(2, y.dim()))
    if means.shape != (*y.shape[:2], *[1] * len(dims)) or means.dtype != y.dtype:
        raise Failure(f"conv_bn_scale_mean: means of shape {list(means.shape)} and dtype {means.dtype}")
    if not y.numel():
        return
    exact, size = y.double().mean(dims, keepdim=True), y.double().abs().mean(dims, keepdim=True)
    sums = torch.finfo(reference.wide(y.dtype)).eps / 2 * y[0, 0].numel() * size
    info = torch.finfo(y.dtype)
    bound = info.eps / 2 * (exact.abs() + sums) + sums + info.tiny
    near = (means.double() - exact).abs() <= bound
    near |= (exact.isnan() & means.isnan()) | (means.double() == exact)
    near |= exact.abs() + bound > info.max  # which a mean may round to infinity
    if not near.all():
        raise Failure("conv_bn_scale_mean: a mean is further off than its roundings")


def filters_of(p: Problem, t: dict[str, Tensor]) -> Tensor:
    return t["weight" if p.op == "conv_scale_shift" else "conv_weight"]


def runs_on_cuda(p: Problem, t: dict[str, Tensor], algorithm: str) -> bool:
    x, padding = truth.padded(p, t["input"])
    named = {"residual": "residual" in t, "allow_tf32": p.tf32, "training": p.op in TRAINING}
    with fcb.use_algorithm(p.algorithm, p.statistics):
        found = fcb.explain(x, filters_of(p, t), p.stride, padding, p.dilation, p.groups, **named)
    return found.startswith(algorithm)


def spreads(p: Problem, device: str, t: dict[str, Tensor]) -> bool:
    """Whether what is not finite in one group may be so in all of them: where gemm_sm90 runs (docs/numerics.md)."""
    if p.special != "non-finite" or p.op not in CONVOLVED or p.groups == 1:
        return False
    return p.algorithm == "gemm_sm90" or (
        device == "cuda" and p.algorithm == "by rule" and runs_on_cuda(p, t, "gemm_sm90")
    )


def ends_work_on_cuda(p: Problem, t: dict[str, Tensor]) -> bool:
    """Whether PyTorch's convolution or its derivative gets channels_last tensors that do not begin on 16 bytes. cuDNN reads
    them in vectors all the same, a misaligned address, after which the GPU takes no more work (torch 2.11, cuDNN 9.19)."""
    if p.op == "squeeze_excite":  # whose convolutions get a mean that is aligned
        weights = t["weight1"], t["weight2"]
        return p.gradients and "channels" in p.weight_layout and any(w.data_ptr() % 16 for w in weights)
    if p.op not in CONVOLVED or "channels" not in p.layout + p.weight_layout:
        return False
    misaligned = t["input"].data_ptr() % 16 != 0 or filters_of(p, t).data_ptr() % 16 != 0
    by_rule = p.algorithm in ("by rule", "aten")
    return misaligned and (p.gradients or (by_rule and runs_on_cuda(p, t, "aten")))


def ends_the_process(p: Problem, device: str) -> bool:
    """Whether PyTorch's convolution with its bias, which runs where a gradient is needed, is a segmentation fault: oneDNN's
    dilated ones in channels_last may be, if no window has an element of the image in some dimension (torch 2.13)."""
    if (
        device != "cpu"
        or p.op not in CONVOLVED
        or not p.gradients
        or "conv_bias" not in p.given
        or max(p.dilation) == 1
    ):
        return False
    window = zip(p.shape[2:], p.out_shape()[2:], p.kernel, p.stride, p.padding, p.dilation, strict=True)
    return not all(
        any(0 <= at * stride - pad + tap * step < n for at in range(out) for tap in range(kernel))
        for n, out, kernel, stride, pad, step in window
    )


def not_covered(error: RuntimeError) -> bool:
    return "does not cover this convolution" in str(error)


# ---- the promises ----------------------------------------------------------------------------------------------------


class Measures(NamedTuple):
    """Of errors, in roundoffs of 1."""

    element: float  # the largest one, relative to its size
    norm: float
    classes: int  # how many elements are NaN or infinite where the exact ones are not, or the other way round
    channels: float  # how many of them the norm of the exact values is made of


def measures(y: Tensor, exact: Exact, steps: Tensor, axis: int = 1) -> Measures:
    """``steps``: the exact values as they are stored. ``axis``: of the channels."""
    got = y.double()
    counts = torch.isfinite(steps)
    same = (got.isnan() & steps.isnan()) | (got == steps) | (counts & torch.isfinite(got))
    error = torch.where(counts & torch.isfinite(got), (got - exact.values).abs(), 0.0)
    sizes = exact.sizes.nan_to_num(math.inf, math.inf)
    relative = torch.where(error == 0, 0.0, error / sizes)
    values = torch.where(counts, exact.values, 0.0)
    energies = values.movedim(axis, 0).flatten(1).square().sum(1) if values.dim() > 1 else values.square()
    norm, largest = energies.sum(), relative.max() if relative.numel() else relative.sum()
    channels = norm.square() / energies.square().sum()
    numbers = torch.stack([largest, error.norm(), norm.sqrt(), (~same).sum().double(), channels]).tolist()
    return Measures(numbers[0], numbers[1] / (numbers[2] or 1.0), int(numbers[3]), numbers[4])


def roundings_of(u: float) -> int:
    return STORED_ROUNDINGS if u > 2.0**-20 else ROUNDINGS


def hold(
    name: str,
    y: Tensor,
    exact: Exact,
    eager: Callable[[], list[Tensor]],
    roundings: float,
    luck: float | None,
    least: float = 0.0,
    axis: int = 1,
) -> None:
    """``eager``: its result; for float64 that in float32, whose roundoffs are so much larger than the truth's, and that in
    float64, which adds up as PyTorch does there. Their errors count in roundoffs of their own, or of ``least``. ``luck``: roundoffs in norm
    beyond eager's; None where a few elements are all of the norm."""
    u = exact.unit
    steps = exact.values.to(y.dtype).double()
    if name in RUNNING:  # what is not finite is so in one way or the other
        y, steps = (torch.where(torch.isfinite(t), t, math.nan) for t in (y, steps))
    got = measures(y, exact, steps, axis)
    if got.classes and all(measures(y, exact, theirs.double()).classes for theirs in eager()):
        raise Failure(
            f"{name}: elements that are not finite where exact ones are, or the other way round: {got.classes}"
        )
    if got.element <= u and got.norm <= u / 2:
        return
    found = [(measures(t, exact, steps), max(unit(t.dtype), least)) for t in eager()]
    times = 3 if u < 2.0**-50 else 2
    eagers = max(of.element / roundoff for of, roundoff in found)
    allowed = max(times * eagers + 1, roundings)
    if not got.element / u <= allowed:
        off = got.element / u
        raise Failure(f"{name}: an element is {off:.3g} unit roundoffs off, allowed {allowed:.3g}; eager {eagers:.3g}")
    if luck is None or y.numel() < FEW or not got.channels >= FEW_CHANNELS or got.element <= 2 * u:
        return
    eagers = max(of.norm / roundoff for of, roundoff in found)
    allowed = times * eagers + luck
    if not got.norm / u <= allowed:
        raise Failure(
            f"{name}: {got.norm / u:.3g} unit roundoffs off in norm, allowed {allowed:.3g}; eager {eagers:.3g}"
        )


def like_eagers(y: Tensor, eager: Tensor) -> bool:
    """The strides of both, but for dimensions of one element."""
    long = [i for i, n in enumerate(y.shape) if n > 1]
    return [y.stride(i) for i in long] == [eager.stride(i) for i in long]


def check(p: Problem, device: str) -> bool:
    """False where the algorithm that is asked for does not cover the problem."""
    with ours_everywhere(p, device):
        return _holds(p, device)


def _holds(p: Problem, device: str) -> bool:
    where = "cpu" if device == "emulator" else device
    try:
        made = Placed(p, where)
    except (ValueError, RuntimeError) as error:
        raise Invalid(str(error)) from error
    if device == "cuda" and ends_work_on_cuda(p, made.tensors):
        raise Invalid("PyTorch's convolution of channels_last tensors that do not begin on 16 bytes")
    if ends_the_process(p, device):
        raise Invalid("PyTorch's convolution of nothing but padding")
    first = made.first_values()
    own: torch.dtype = getattr(torch, p.dtype)
    yardsticks = (torch.float32, own) if p.dtype == "float64" else (own,)
    eager = functools.cache(lambda: [exact_of(p).eager(p, first, dtype) for dtype in yardsticks])
    try:
        ours, leaves = call(p, device, made.tensors)
    except RuntimeError as error:
        if not_covered(error):
            return False
        if p.way == "module" and "should be the same" in str(error):  # of PyTorch's own convolution, where it runs
            raise Invalid(str(error)) from error
        try:
            eager()
        except (ValueError, RuntimeError, IndexError):
            raise Invalid(str(error)) from error
        raise Failure(f"the call raised {type(error).__name__}: {error}") from error
    written = {p.way.rpartition(" ")[2]} if p.way.startswith("out") else set()
    written |= set(RUNNING) & set(made.tensors) if p.op in TRAINING else set()
    kept = {name: y.detach().clone() for name, y in ours.items()}
    alarms = [(f"{name}: written to, or memory around it", alarm) for name, alarm in made.changed(written)]
    made.restore(written)
    again, leaves_again = call(p, device, made.tensors)
    alarms += [(f"{name}: two runs differ", (bits(y.detach()) != bits(kept[name])).any()) for name, y in again.items()]
    for (message, _), rings in zip(alarms, torch.stack([alarm for _, alarm in alarms]).tolist(), strict=True):
        if rings:
            raise Failure(message)
    results, forward = results_of(p, first)
    all_groups = isinstance(forward, truth.Forward) and spreads(p, device, first)
    for name, exact in results.items():
        y = kept[name]
        if y.shape != exact.values.shape:
            raise Failure(f"{name}: has shape {list(y.shape)}, expected {list(exact.values.shape)}")
        if all_groups:
            y = truth.spread(y, exact, forward, p.op in TRAINING)
        roundings = 0 if p.op == "max_pool2d" else roundings_of(exact.unit)
        luck = 0.5 if p.special == "none" else None
        hold(name, y, exact, lambda name=name: [of[name] for of in eager()], roundings, luck)
    # One in four: PyTorch takes a while for a convolution that it has not seen.
    dense = p.seed % 4 == 0 and {p.layout, p.weight_layout} <= FORMATS[len(p.shape)]
    dense = dense and (p.op, p.shape[1]) != ("gate_conv_bn_scale", 1)  # whose product has a choice of strides
    if dense and p.way in ("function", "module") and p.op != "fold_bn" and p.dtype != "float64":
        if ours["result"].numel() and not like_eagers(ours["result"], eager()[0]["result"]):
            strides = ours["result"].stride(), eager()[0]["result"].stride()
            raise Failure(f"result: has strides {strides[0]}, expected eager's, {strides[1]}")
    if p.gradients:
        check_gradients(p, first, forward, (ours, leaves), (again, leaves_again), yardsticks)
    return True


Computed = truth.Forward | squeeze.Squeezed | None
"""On the way to a result, where there is one."""


def exact_of(p: Problem) -> Any:
    """The module that has its forward(), and what follows from that."""
    return squeeze if p.op == "squeeze_excite" else truth


def results_of(p: Problem, first: dict[str, Tensor]) -> tuple[dict[str, Exact], Computed]:
    double = {k: v.double() for k, v in first.items() if k != "out"}
    if p.op == "fold_bn":
        return truth.folded(p, double), None
    if p.op in ("max_pool2d", "spatial_mean"):
        return truth.pooled(p, double), None
    forward = exact_of(p).forward(p, double)
    return forward.results, forward


def check_gradients(
    p: Problem,
    first: dict[str, Tensor],
    forward: Computed,
    ours: tuple[dict[str, Tensor], dict[str, Tensor]],
    again: tuple[dict[str, Tensor], dict[str, Tensor]],
    yardsticks: tuple[torch.dtype, ...],
) -> None:
    results, leaves = ours
    y = results["result"]
    spec = Spec(tuple(y.shape), p.dtype, p.residual_layout if y.dim() > 1 else "contiguous", 1, p.seed * 64 + 50)
    dy = tensor(spec, str(y.device.type))
    # cuDNN's derivatives read it in vectors (see ends_work_on_cuda), where an image has one pixel in any layout.
    if y.is_cuda and (p.op == "squeeze_excite" or (p.op in CONVOLVED and "channels" in spec.layout)):
        dy = truth.aligned(dy)
    if forward is not None:
        jumps = exact_of(p).kinks_near(p, forward)
        dy = dy.masked_fill(jumps, 0) if jumps.any() else dy
    names = list(leaves)

    def reference_gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        # PyTorch's batch_norm takes its tensors in the input's dtype, or all of them in float32.
        own = {"scale", "shift"} | ({*RUNNING, "weight", "bias"} if p.given_dtype else set())
        of = {k: v.detach().to(wide if k in own and v.dim() == 1 else dtype, copy=True) for k, v in first.items()}
        result_gradient = dy
        # PyTorch's kernels have their gaps in other strides: see truth.pooled(), and of an image of one column, whose channels
        # lie beside each other, BatchNorm's gradient is another one (torch 2.13).
        if dtype == torch.float64 or p.op not in CONVOLVED:
            of, result_gradient = {k: v.contiguous() for k, v in of.items()}, dy.contiguous()
        of = {k: v if k in RUNNING else v.requires_grad_() for k, v in of.items()}
        positional, named = p.arguments(of)
        named.pop("allow_tf32", None)
        with torch.enable_grad():
            z = truth.twin(p)(*positional, **named)
            return torch.autograd.grad(z, [of[name] for name in names], truth.aligned(result_gradient.to(z.dtype)))

    eager = functools.cache(lambda: [reference_gradients(dtype) for dtype in yardsticks])
    try:
        got = torch.autograd.grad(y, list(leaves.values()), dy)
        got_again = torch.autograd.grad(again[0]["result"], list(again[1].values()), dy)
    except RuntimeError as error:
        try:
            eager()
        except RuntimeError:  # PyTorch's backward of the convolution has its gaps
            raise Invalid(str(error)) from error
        raise
    exact = reference_gradients(torch.float64)
    double = {k: v.double() for k, v in first.items()}
    if forward is None:
        sizes = truth.pooled_gradient_sizes(p, double, dy.double())
    else:
        sizes = exact_of(p).gradient_sizes(p, double, forward, dy.double())
    own: torch.dtype = getattr(torch, p.dtype)
    u = unit(own)
    for i, name in enumerate(names):
        g = got[i]
        # On the CPU that of a convolution's bfloat16 weight is PyTorch's, and has uninitialised memory in it (torch 2.13).
        of_filters = "weight" in name and g.dim() > 1
        if of_filters and p.dtype == "bfloat16" and not g.is_cuda:
            continue
        if (g.shape, g.dtype) != (leaves[name].shape, leaves[name].dtype):
            raise Failure(f"gradient of {name}: is {list(g.shape)} of {g.dtype}, expected {list(leaves[name].shape)}")
        # On the CPU PyTorch's gradients of a convolution are not the same bits every time, on CUDA those of copied borders.
        varies = g.is_cuda and name == "input" and p.padding_mode in ("reflect", "replicate")
        convolved = p.op in CONVOLVED and (of_filters or name in ("input", "gate"))
        same = not (convolved or p.op == "squeeze_excite") or (g.is_cuda and not varies)
        if same and not torch.equal(bits(g), bits(got_again[i])):
            raise Failure(f"gradient of {name}: two runs differ")
        size = sizes[name] if name in sizes else exact[i].abs()
        roundoff = max(u, unit(g.dtype))
        size = torch.maximum(size, exact[i].abs()).clamp_min(truth.smallest(g.dtype))
        theirs = lambda i=i: [of[i] for of in eager()]  # noqa: E731
        axis = 0 if of_filters else 1
        least = 0.0 if p.dtype == "float64" else roundoff
        hold(
            f"gradient of {name}",
            g,
            Exact(exact[i], size, roundoff),
            theirs,
            roundings_of(roundoff) if forward is None else GRADIENT_ROUNDINGS,  # a pool's has no chain
            STEPS[own],
            least,
            axis,
        )
