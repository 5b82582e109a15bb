"""What a problem's results must be, in float64 on the device itself, and how large the terms are that make them.

An error of an element is measured in unit roundoffs of its size: the sum of the magnitudes of all that is added up in it,
conv(|x|, |w|) * |scale| + |shift| + |residual| (tests/ops/conv_problems.py says why that is right behind an activation). In 16
bits these sums are float32's, and have its roundoffs; what is stored has those of 16 bits: the convolution's result, where
PyTorch computes it, and the op's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import DTYPES
from fused_conv_bn import reference

from .problem import CONVOLVED, RUNNING, TRAINING, Problem

KINKS = {
    "relu": (0.0,),
    "leaky_relu": (0.0,),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, 3.0),
    "hardsigmoid": (-3.0, 3.0),
}
"""Where an activation's derivative jumps."""
STEEPEST = 1.5
"""No activation is steeper, nor is a second derivative larger."""

PAD_MODES = {"reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@dataclass
class Exact:
    """Of a result: its values, its sizes, and the unit roundoff that its errors are measured in."""

    values: Tensor
    sizes: Tensor
    unit: float


@dataclass
class Forward:
    """What is computed on the way: the convolution and its sizes; before the activation; and behind it."""

    z: Tensor
    z_sizes: Tensor
    v: Tensor
    v_sizes: Tensor
    scale: Tensor | None  # absolute values, in the shape of a channel
    deviations: Tensor | None  # of a batch's values, in their inverse deviation
    results: dict[str, Exact]


def columns(t: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """(N, C, outputs, taps), a view of what is padded."""
    space = t.dim() - 2
    out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(t.shape[2:], kernel, stride, dilation, strict=True)]
    if min(out, default=1) < 1:
        raise ValueError("no window")
    of = t.stride()[2:]
    steps = [of[i] * stride[i] for i in range(space)] + [of[i] * dilation[i] for i in range(space)]
    return t.as_strided([*t.shape[:2], *out, *kernel], [*t.stride()[:2], *steps])


def padded(p: Problem, x: Tensor) -> tuple[Tensor, Sequence[int]]:
    """The input as the module hands it to its convolution, and that one's own padding, of zeros."""
    if p.padding_mode == "zeros":
        return x, p.padding
    pads = [n for pad in reversed(p.padding) for n in (pad, pad)]
    return F.pad(x, pads, mode=PAD_MODES[p.padding_mode]), [0] * len(p.padding)


def convolve(p: Problem, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution, and the same of magnitudes: as one matrix product for each group."""
    space = len(p.kernel)
    x, padding = padded(p, x)
    x = F.pad(x, [n for pad in reversed(padding) for n in (pad, pad)])
    view = columns(x.contiguous(), p.kernel, p.stride, p.dilation)
    out, count = view.shape[2 : 2 + space], view.shape[0]
    groups, inner = p.groups, p.shape[1] // p.groups
    view = view.unflatten(1, (groups, inner))  # N, G, c, outputs, taps
    outputs, taps = range(3, 3 + space), range(3 + space, 3 + 2 * space)
    matrix = view.permute(1, 0, *outputs, 2, *taps).reshape(groups, count * math.prod(out), inner * math.prod(p.kernel))
    filters = w.reshape(groups, p.filters // groups, -1).transpose(1, 2)

    def product(a: Tensor, b: Tensor) -> Tensor:
        y = torch.bmm(a, b).view(groups, count, *out, p.filters // groups)
        return y.permute(1, 0, 2 + space, *range(2, 2 + space)).reshape(count, p.filters, *out)

    y = product(matrix, filters)
    own = matrix._base is None and not matrix.requires_grad
    return y, product(matrix.abs_() if own else matrix.abs(), filters.abs())


def unit(dtype: torch.dtype) -> float:
    return DTYPES[dtype]


def of_sums(u: float) -> float:
    """The share of a sum's magnitudes that an error has for each roundoff of what is stored: ten roundings of a sum for each
    four of those (run.py), or a few more."""
    return 4 * 2.0**-24 / u if u > 2.0**-20 else 1.0


def smallest(dtype: torch.dtype) -> float:
    """Below it a number's rounding is no smaller than there."""
    return torch.finfo(dtype).tiny


def activated(v: Tensor, name: str, slope: float) -> Tensor:
    """In float64. PyTorch's own of CUDA have a sixth in float32 there."""
    if name not in ("hardsigmoid", "hardswish"):
        return reference.activate(v, name, slope)
    share = (v / 6 + 0.5).clamp(0, 1)
    return v * share if name == "hardswish" else share


def channel(t: Tensor, dim: int) -> Tensor:
    return t.view(-1, *[1] * (dim - 2))


def _others(t: Tensor) -> list[int]:
    return [d for d in range(t.dim()) if d != 1]


def gated(p: Problem, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the input that is convolved: the product of input and gate, as `gate` rounds it."""
    if p.op != "gate_conv_bn_scale":
        return t
    own: torch.dtype = getattr(torch, p.dtype)
    x, gate = t["input"].to(own), t["gate"].to(own)
    return t | {"input": reference.gate(x, gate).to(t["input"].dtype)}


def forward(p: Problem, t: dict[str, Tensor]) -> Forward:
    """From tensors in float64. Of the ops that end in the epilogue."""
    dtype: torch.dtype = getattr(torch, p.dtype)
    t = gated(p, t)
    u = unit(dtype)
    conv_bias = t.get("conv_bias")
    convolved = p.op in CONVOLVED
    if convolved:
        z, sums = convolve(p, t["input"], t["weight" if p.op == "conv_scale_shift" else "conv_weight"])
        z_sizes = sums * of_sums(u) if of_sums(u) == 1 else z.abs() + sums * of_sums(u)
        if (
            p.gradients and conv_bias is not None
        ):  # kept as PyTorch's convolution stores it, with its bias, in 16 bits itself
            z_sizes = z_sizes + channel(conv_bias, z.dim()).abs()
    elif p.op == "bn_scale_cat":
        z = torch.cat([t[f"part{i}"] for i in range(len(p.parts))], 1)
        z_sizes = z.abs()
    else:
        z = t["input"]
        z_sizes = z.abs()
    dim = z.dim()
    # With a gradient gate is PyTorch's ops, each of which stores its result.
    share = 1.0 if p.op == "gate" and p.gradients else of_sums(u)
    scale: Tensor | None = None
    deviations: Tensor | None = None
    results: dict[str, Exact] = {}
    if p.op in TRAINING:
        v, v_sizes, scale, deviations = _normalised(p, t, z, z_sizes, u, results)
    elif p.op == "gate":
        scale = t["gate"].view(*z.shape[:2], *[1] * (dim - 2))
        v, v_sizes = z * scale, z_sizes * scale.abs() * share
        scale = scale.abs()
    elif "running_mean" in t:
        scale = torch.rsqrt(t["running_var"] + p.eps) * p.factor
        if "weight" in t:
            scale = scale * t["weight"]
        scale, mean = channel(scale, dim), channel(t["running_mean"], dim)
        shift = channel(t["bias"], dim) * p.factor if "bias" in t else torch.zeros_like(scale)
        added = torch.zeros_like(mean) if conv_bias is None else channel(conv_bias, dim)
        v = (z + added - mean) * scale + shift
        # A convolution's epilogue has the mean in its shift, as all do in 16 bits. Else the mean is taken from the input.
        if convolved:
            apart = z_sizes + (added.abs() + mean.abs()) * of_sums(u)
        elif of_sums(u) < 1:
            apart = (z_sizes + mean.abs()) * of_sums(u)
        else:
            apart = (z - mean).abs()
        v_sizes = apart * scale.abs() + shift.abs() * of_sums(u)
        scale = scale.abs()
    else:
        v, v_sizes = z, z_sizes if convolved else z_sizes * of_sums(u)
        if "scale" in t:
            scale = channel(t["scale"], dim)
            v, v_sizes = v * scale, v_sizes * scale.abs()
            scale = scale.abs()
        if "shift" in t:
            shift = channel(t["shift"], dim)
            v, v_sizes = v + shift, v_sizes + shift.abs() * of_sums(u)
    residual = t.get("residual")
    if residual is not None:
        # Behind the activation the two may cancel, whose own error in 16 bits is of what it puts out.
        v_sizes = v_sizes + residual.abs() * (share if p.residual == "first" else 1)
        if p.residual == "first":
            v = v + residual
    y = activated(v, p.activation, p.slope)
    if residual is not None and p.residual == "last":
        y = y + residual
    if p.gradients and of_sums(u) < 1:  # a residual may be added apart from the activation then, and be stored
        v_sizes = v_sizes + v.abs()
    sizes = torch.maximum(v_sizes, y.abs()) if of_sums(u) == 1 else v_sizes + y.abs()
    results["result"] = Exact(y, sizes.clamp_min(smallest(dtype)), u)
    return Forward(z, z_sizes, v, v_sizes, scale, deviations, results)


def _normalised(
    p: Problem, t: dict[str, Tensor], z: Tensor, z_sizes: Tensor, u: float, results: dict[str, Exact]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By a batch's own statistics. An error of the values, at most ``z_sizes`` unit roundoffs, reaches the mean and the
    deviation as well: the sizes have all three. Values of an op without a convolution are exact."""
    dims, dim = _others(z), z.dim()
    count = z.numel() // max(1, z.shape[1])
    mean = z.mean(dims, keepdim=True)
    apart = z - mean
    var = apart.square().mean(dims, keepdim=True)
    # Roundings of what is stored or added up; for exact values those of the differences alone.
    errs = z_sizes if p.op in CONVOLVED else apart.abs()
    if p.op not in CONVOLVED:
        errs = (errs + mean.abs()) * of_sums(u) if of_sums(u) < 1 else errs
    spread = errs.square().mean(dims, keepdim=True).sqrt()
    least = (var.sqrt() - 10 * u * spread).clamp_min(0).square()  # of the variance, with these errors
    gain = channel(t["weight"], dim).abs() if "weight" in t else torch.ones_like(var)
    gain = gain * abs(p.factor)
    inverse = torch.rsqrt(var + p.eps)
    deviations = apart * inverse
    v = deviations * p.factor
    if "weight" in t:
        v = v * channel(t["weight"], dim)
    steepest = gain * torch.rsqrt(least + p.eps)
    of_mean = errs.mean(dims, keepdim=True)
    v_sizes = steepest * (errs + of_mean + deviations.abs() * spread)
    v_sizes = v_sizes + v.abs()  # the scale's own roundings
    if "bias" in t:
        shift = channel(t["bias"], dim) * p.factor
        v, v_sizes = v + shift, v_sizes + shift.abs()
    if "running_mean" in t:
        m = p.momentum
        stored: torch.dtype = torch.float32 if p.given_dtype in ("mixed", "float32") else getattr(torch, p.dtype)
        own = unit(stored)
        batch = mean.reshape(-1)
        if "conv_bias" in t:
            batch = batch + t["conv_bias"]
        # On CUDA float32 has added up the first few values: a rounding of the deviation (docs/numerics.md).
        narrow = min(2.0**-24, 2.0**-24 if own > 2.0**-50 else own) * var.sqrt().reshape(-1) / own
        values = (1 - m) * t["running_mean"] + m * batch
        exact = p.op not in CONVOLVED
        off = (0 if exact else u / own) * of_mean.reshape(-1)
        size = abs(1 - m) * t["running_mean"].abs() + abs(m) * (batch.abs() + narrow + off)
        if "conv_bias" in t:
            size = size + abs(m) * t["conv_bias"].abs()
        results["running_mean"] = Exact(values, size.clamp_min(smallest(stored)), own)
        unbiased = (var * count / max(1, count - 1)).reshape(-1)
        values = (1 - m) * t["running_var"] + m * unbiased
        off = (0 if exact else u / own) * 2 * (var.sqrt() * spread + u * 10 * spread.square()).reshape(-1)
        size = abs(1 - m) * t["running_var"].abs() + abs(m) * (unbiased + off * count / max(1, count - 1))
        results["running_var"] = Exact(values, size.clamp_min(smallest(stored)), own)
    return v, v_sizes, steepest, deviations


def folded(p: Problem, t: dict[str, Tensor]) -> dict[str, Exact]:
    """Of fold_bn: scale and shift, which float64 folds, rounded once."""
    scale = torch.rsqrt(t["running_var"] + p.eps) * p.factor
    if "weight" in t:
        scale = scale * t["weight"]
    conv_bias, bias = (t[name] if name in t else torch.zeros_like(scale) for name in ("conv_bias", "bias"))
    shift = bias * p.factor + (conv_bias - t["running_mean"]) * scale
    sizes = bias.abs() * abs(p.factor) + (conv_bias.abs() + t["running_mean"].abs()) * scale.abs()
    wide = reference.wide(getattr(torch, p.dtype))
    u, least = unit(wide), smallest(wide)
    return {"scale": Exact(scale, scale.abs().clamp_min(least), u), "shift": Exact(shift, sizes.clamp_min(least), u)}


def pooled(p: Problem, t: dict[str, Tensor]) -> dict[str, Exact]:
    dtype: torch.dtype = getattr(torch, p.dtype)
    x = t["input"]
    if p.op == "max_pool2d":
        # Contiguous: PyTorch's kernel for float64 in channels_last writes to misaligned shared memory (torch 2.11).
        y = F.max_pool2d(x.contiguous(), p.kernel, p.stride, p.padding, p.dilation, p.ceil_mode)
        return {"result": Exact(y, torch.zeros_like(y), unit(dtype))}  # no error at all
    dims = tuple(range(2, x.dim()))
    y, u = x.mean(dims, p.keepdim), unit(dtype)
    sizes = y.abs() + x.abs().mean(dims, p.keepdim) * of_sums(u)
    return {"result": Exact(y, sizes.clamp_min(smallest(dtype)), u)}


def near(activation: str, v: Tensor, sizes: Tensor, u: float) -> Tensor:
    """Where an error of ``v``, of so many roundoffs, could put it beyond a kink of the activation."""
    found = torch.zeros_like(v, dtype=torch.bool)
    for kink in KINKS.get(activation, ()):
        found |= (v - kink).abs() <= 40 * u * sizes
    return found


def kinks_near(p: Problem, f: Forward) -> Tensor:
    """Of which elements of the result the gradient may jump."""
    return near(p.activation, f.v, f.v_sizes, unit(getattr(torch, p.dtype)))


def steepened(dy: Tensor, activation: str, sizes: Tensor) -> Tensor:
    """The size of a gradient in front of an activation: the second derivative is what an error of its input, of so many
    roundoffs, makes of the first."""
    return dy if activation == "none" else dy * STEEPEST * (1 + sizes)


def gradient_sizes(p: Problem, t: dict[str, Tensor], f: Forward, dy: Tensor) -> dict[str, Tensor]:
    """Of each gradient the magnitudes of the terms that are added up in it."""
    dims, dim = _others(f.z), f.z.dim()
    dv = steepened(dy.abs(), p.activation, f.v_sizes)
    sizes = {"residual": dv}
    spread = f.z_sizes
    if p.op in TRAINING:
        inverse = torch.rsqrt(f.z.var(dims, correction=0, keepdim=True) + p.eps)
        spread = (f.z_sizes + f.z_sizes.mean(dims, keepdim=True)) * inverse
        dz = dv + dv.mean(dims, keepdim=True) + spread * (dv * spread).mean(dims, keepdim=True)
        # The inverse deviation errs by as many roundoffs as the values have of it.
        dz = dz * (1 + spread.square().mean(dims, keepdim=True).sqrt())
    else:
        dz = dv
        if "running_mean" in t:
            inverse = channel(torch.rsqrt(t["running_var"] + p.eps), dim)
            bias = t["conv_bias"] if "conv_bias" in t else torch.zeros_like(t["running_mean"])
            spread = (f.z_sizes + channel(t["running_mean"].abs() + bias.abs(), dim)) * inverse
    sizes["scale"] = (dv * f.z_sizes).sum(dims)
    sizes["shift"] = dv.sum(dims)
    sizes["weight"], sizes["bias"] = (dv * spread).sum(dims) * abs(p.factor), dv.sum(dims) * abs(p.factor)
    dz = dz if f.scale is None else dz * f.scale
    sizes["conv_bias"] = dz.sum(dims)
    if p.op == "gate":
        terms = dv * f.z_sizes
        sizes["gate"] = terms.sum(list(range(2, dim))) if dim > 2 else terms
    if p.op == "bn_scale_cat":
        for i, part in enumerate(dz.split(list(p.parts), 1)):
            sizes[f"part{i}"] = part
    elif p.op not in CONVOLVED:
        sizes["input"] = dz
    else:
        name = "weight" if p.op == "conv_scale_shift" else "conv_weight"
        convolved = gated(p, t)
        with torch.enable_grad():
            x, w = (convolved[k].detach().abs().requires_grad_() for k in ("input", name))
            y, _ = convolve(p, x, w)
            sizes["input"], sizes[name] = torch.autograd.grad(y, (x, w), dz)
        if p.op == "gate_conv_bn_scale":
            dx = sizes["input"]
            sizes["input"] = dx * t["gate"].abs().view(*dx.shape[:2], *[1] * (dim - 2))
            sizes["gate"] = (dx * t["input"].abs()).sum(list(range(2, dim)))
    return sizes


def pooled_gradient_sizes(p: Problem, t: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """Of max_pool2d the magnitudes that are added up in an element's gradient. A mean's is one term."""
    if p.op == "spatial_mean":
        return {}
    with torch.enable_grad():
        x = t["input"].detach().contiguous().requires_grad_()  # as pooled() has it
        y = reference.max_pool2d(x, p.kernel, p.stride, p.padding, p.dilation, p.ceil_mode)
        (added,) = torch.autograd.grad(y, x, dy.abs())
    return {"input": added * of_sums(unit(getattr(torch, p.dtype)))}


def aligned(t: Tensor) -> Tensor:
    """The tensor, or where it does not begin on 16 bytes a copy in the same strides that does: PyTorch's BatchNorm of
    channels_last tensors takes them in vectors wherever they begin, which is a misaligned address on CUDA (torch 2.11)."""
    if t.data_ptr() % 16 == 0 or t.numel() == 0:
        return t
    extent = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    memory = t.as_strided((extent,), (1,)).clone()
    return memory.as_strided(t.shape, t.stride(), 0)


def spread(y: Tensor, exact: Exact, forward: Forward, training: bool) -> Tensor:
    """``y``, with the exact values where an infinity or NaN of another group may be in it: docs/numerics.md has them spread
    to all channels at their place, and a batch's statistics have them everywhere."""
    reached = ~forward.z.isfinite().all(1, keepdim=True)
    if training:
        reached = reached.any()
    return torch.where(reached & ~y.isfinite(), exact.values.to(y.dtype), y)


def twin(p: Problem) -> Callable[..., Any]:
    """The reference's, with the module's padding."""
    function = getattr(reference, p.op)
    if p.padding_mode == "zeros":
        return function

    def of_padded(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        *others, stride, _, dilation, groups = arguments
        x, padding = padded(p, x)
        return function(x, *others, stride, padding, dilation, groups, **named)

    return of_padded


def eager(p: Problem, t: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """PyTorch's ops in the dtype: the convolution, and the rest rounded once, which is more than eager modules do."""
    wide = reference.wide(dtype)
    t = gated(p, {k: aligned(v) for k, v in t.items() if k != "out"})
    arranged = {k: v.to(wide) for k, v in t.items()}
    if p.op in ("max_pool2d", "spatial_mean", "fold_bn"):
        positional, named = p.arguments(arranged)
        made = getattr(reference, p.op)(*positional, **named)
        return dict(zip(("scale", "shift"), made, strict=True)) if p.op == "fold_bn" else {"result": made.to(dtype)}
    tail = p
    if p.op in CONVOLVED:
        name = "weight" if p.op == "conv_scale_shift" else "conv_weight"
        x, padding = padded(p, t["input"].to(dtype))
        w = t[name].to(dtype)
        # With a gradient the convolution is PyTorch's with its bias, which its sums may begin with: each is rounded to its size.
        conv_bias = t.get("conv_bias")
        begins = conv_bias.to(dtype) if p.gradients and conv_bias is not None else None
        # Factors of TF32 problems have its digits already. Its sums are those of the tensor cores, in eager's as well.
        allowed = torch.backends.cudnn.allow_tf32
        try:
            torch.backends.cudnn.allow_tf32 = p.tf32
            z = reference.convolution(x, w, begins, p.stride, padding, p.dilation, p.groups).to(wide)
        finally:
            torch.backends.cudnn.allow_tf32 = allowed
        apart = conv_bias is not None and begins is None
        arranged["input"] = z + channel(arranged["conv_bias"], z.dim()) if apart else z
        names = {
            "conv_scale_shift": "scale_shift",
            "conv_bn_scale": "bn_scale",
            "gate_conv_bn_scale": "bn_scale",
            "conv_bn_scale_train": "bn_scale_train",
        }
        tail = Problem(**{**vars(p), "op": names[p.op], "way": "function", "tf32": False})
    if tail.way.startswith("out"):
        tail = Problem(**{**vars(tail), "way": "function"})
    for name in RUNNING:
        if name in arranged:
            arranged[name] = arranged[name].clone()
    positional, named = tail.arguments(arranged)
    y = getattr(reference, tail.op)(*positional, **named).to(dtype)
    return {"result": y, **{k: arranged[k].to(t[k].dtype) for k in RUNNING if k in t and p.op in TRAINING}}
