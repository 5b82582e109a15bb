"""A problem from one number: sizes near the borders of tiles and vectors, every layout, dtype, activation and way of a call."""

from __future__ import annotations

import math
import random
from typing import Any

from common import CONV_ALGORITHMS
from fused_conv_bn.reference import ACTIVATIONS

from .problem import CONVOLVED, OPS, POOLED, RUNNING, TRAINING, Problem, changed
from .values import LAYOUTS

DEVICES = ("cpu", "cuda", "emulator")
# Elements of a tensor, and of the taps of all outputs: of most problems, and of one in fifty.
BUDGETS = {"cpu": (1 << 16, 1 << 20), "cuda": (1 << 18, 1 << 23), "emulator": (1 << 12, 1 << 14)}
TAPS = {"cpu": (1 << 20, 1 << 23), "cuda": (1 << 21, 1 << 26), "emulator": (1 << 15, 1 << 17)}
CHANNELS = (
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    13,
    16,
    17,
    24,
    31,
    32,
    33,
    40,
    48,
    63,
    64,
    65,
    72,
    96,
    127,
    128,
    129,
    136,
    192,
    256,
    257,
)
WHOLE = (8, 16, 24, 32, 40, 64, 72, 96, 128, 136, 256, 264)
EXTENTS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 14, 15, 16, 17, 28, 31, 32, 33, 56, 63, 64, 65, 112, 127, 128, 129)
IMAGES = (1, 1, 2, 2, 3, 4, 5, 7, 8, 16)
KERNELS = ((1, 1), (3, 3), (3, 3), (3, 3), (5, 5), (7, 7), (2, 2), (1, 3), (3, 1), (2, 3), (4, 4), (1, 7), (3, 5))
TRAIN_WAYS = (
    ("stem_sm90", "from_input"),
    *((name, "from_output") for name in ("stem_sm90", "stem_sm80", "depthwise", "gemm_sm90", "gemm_sm80")),
)
HIDDEN = (1, 2, 4, 6, 7, 8, 10, 12, 16, 20, 28, 33, 48, 64, 100)
WINDOWS = (
    (3, 2, 1, 1),
    (3, 2, 0, 1),
    (2, 2, 0, 1),
    (3, 1, 1, 1),
    (5, 1, 2, 1),
    (2, 3, 1, 1),
    (3, 2, 1, 2),
    (1, 3, 0, 1),
)


def generate(seed: int, device: str) -> Problem:
    g = random.Random(seed)
    emulated = device == "emulator"
    names = [name for name in OPS if name != "gate_conv_bn_scale" and not (emulated and name == "fold_bn")]
    weights = [4 if name in CONVOLVED else 1.5 if name in ("bn_scale", "scale_shift") else 1 for name in names]
    op = g.choices(names, weights)[0]
    named: dict[str, Any] = {"op": op, "seed": seed}
    named["dtype"] = g.choices(("float32", "float16", "bfloat16", "float64"), (4, 3, 3, 1.5))[0]
    if emulated and named["dtype"] == "float64" and op in CONVOLVED:
        named["dtype"] = "float32"
    big = g.random() < 0.02
    pools = {"max_pool2d": _max_pool2d, "spatial_mean": _mean, "squeeze_excite": _squeeze}
    make = pools.get(op, _conv if op in CONVOLVED else _elementwise)
    named |= make(g, op, named["dtype"], device, big)
    if op not in POOLED:
        named |= _parameters(g, op, named["dtype"])
    if op not in (*POOLED, "fold_bn"):
        named |= _epilogue(g, op)
    p = _gated(g, _way(g, Problem(**named), device), device)
    return _fit(p, BUDGETS[device][big], TAPS[device][big])


def _gated(g: random.Random, p: Problem, device: str) -> Problem:
    """Some convolutions with gates, most of them as gemm_sm90 takes them along."""
    if (p.op, p.way) != ("conv_bn_scale", "function") or g.random() > 0.2:
        return p
    p = changed(p, op="gate_conv_bn_scale", tf32=False)
    if device == "emulator" or g.random() < 0.8:
        dim = len(p.shape) - 2
        ones, groups = (1,) * dim, 1
        p = changed(
            p, kernel=ones, stride=ones, padding=(0,) * dim, dilation=ones, groups=groups, layout="channels_last"
        )
        p = changed(p, shape=(p.shape[0], g.choice(WHOLE), *p.shape[2:]), filters=g.choice(WHOLE))
        if device != "cpu" and not p.gradients:
            p = changed(p, algorithm="gemm_sm90", dtype=g.choice(("float16", "bfloat16")), given_dtype="float32")
    return p


def _sometimes(g: random.Random, chance: float, *choices: Any) -> Any:
    """The first one, or with that chance one of the others."""
    return g.choice(choices[1:]) if g.random() < chance else choices[0]


def _layout(g: random.Random) -> dict[str, Any]:
    usual = g.choice(("contiguous", "channels_last"))
    return {"layout": _sometimes(g, 0.3, usual, *LAYOUTS), "offset": _sometimes(g, 0.25, 0, 1, 2, 3, 4, 5, 7, 8)}


def _weight_layout(g: random.Random) -> dict[str, Any]:
    usual = g.choice(("contiguous", "channels_last"))
    return {
        "weight_layout": _sometimes(g, 0.15, usual, *LAYOUTS[2:8]),
        "weight_offset": _sometimes(g, 0.15, 0, 1, 3, 4, 8),
    }


def _residual_layout(g: random.Random) -> str:
    return _sometimes(g, 0.3, g.choice(("contiguous", "channels_last")), *LAYOUTS)


def _space(g: random.Random, dim: int) -> tuple[int, ...]:
    if dim == 2:
        return ()
    extents = [_sometimes(g, 0.1, g.choice(EXTENTS), g.randrange(1, 40), 257, 1000) for _ in range(dim - 2)]
    return tuple(extents)


def _elementwise(g: random.Random, op: str, dtype: str, device: str, big: bool) -> dict[str, Any]:
    dim = g.choices((2, 3, 4, 5), (1, 1, 5, 1))[0]
    shape = (g.choice(IMAGES), g.choice(CHANNELS), *_space(g, dim))
    if big:
        shape = tuple(n * g.choice((1, 3, 8)) for n in shape)
    named: dict[str, Any] = {"shape": shape, **_layout(g)}
    if op == "bn_scale_cat":
        whole = g.random() < 0.5
        named["parts"] = tuple(g.choice(WHOLE[:6] if whole else CHANNELS[:14]) for _ in range(g.randrange(1, 9)))
        if g.random() < 0.1:
            named["parts"] += (0, g.choice(CHANNELS[:8]))
    elif g.random() < 0.03 and op != "fold_bn" and device != "emulator":
        zero = g.randrange(dim)
        if not (op in TRAINING and zero == 1):
            named["shape"] = tuple(0 if i == zero else n for i, n in enumerate(shape))
    if op == "fold_bn":
        named = {"shape": shape}
    return named


def _max_pool2d(g: random.Random, op: str, dtype: str, device: str, big: bool) -> dict[str, Any]:
    window = g.choice(WINDOWS)
    kernel, stride, padding, dilation = ([n, n] for n in window)
    if g.random() < 0.3:
        kernel, stride = ([g.randrange(1, 6) for _ in range(2)], [g.randrange(1, 4) for _ in range(2)])
        padding, dilation = [g.randrange(0, k // 2 + 1) for k in kernel], [_sometimes(g, 0.2, 1, 2, 3)] * 2
    shape = [g.choice(IMAGES), g.choice(CHANNELS), *_space(g, 4)]
    for i in range(2):
        shape[2 + i] = max(shape[2 + i], dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i])
    of = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "shape": shape}
    return {**{k: tuple(v) for k, v in of.items()}, "ceil_mode": g.random() < 0.3, **_layout(g)}


def _mean(g: random.Random, op: str, dtype: str, device: str, big: bool) -> dict[str, Any]:
    shape = (g.choice(IMAGES), g.choice(CHANNELS), *_space(g, g.choices((3, 4, 5), (1, 4, 1))[0]))
    return {"shape": shape, "keepdim": g.random() < 0.5, **_layout(g)}


def _squeeze(g: random.Random, op: str, dtype: str, device: str, big: bool) -> dict[str, Any]:
    dim = g.choices((3, 4, 5), (1, 6, 1))[0]
    channels = g.choice(_sometimes(g, 0.4, WHOLE, CHANNELS))
    shape = (_sometimes(g, 0.02, g.choice(IMAGES), 0), channels, *_space(g, dim))
    return {
        **{"shape": shape, "hidden": g.choice(HIDDEN), "filters": _sometimes(g, 0.3, channels, *CHANNELS)},
        **{"activation": g.choice(list(ACTIVATIONS)), "gate_activation": _sometimes(g, 0.5, "sigmoid", *ACTIVATIONS)},
        **{"slope": _sometimes(g, 0.5, 0.01, 0.3), "mean": _sometimes(g, 0.5, 0.0, 0.5, 3.0)},
        "given": tuple(name for name in ("bias1", "bias2") if g.random() < 0.85),
        "given_layout": _sometimes(g, 0.15, "contiguous", "sliced", "expanded"),
        **_weight_layout(g),
        **_layout(g),
    }


def _conv(g: random.Random, op: str, dtype: str, device: str, big: bool) -> dict[str, Any]:
    kind = g.choices(("few", "whole", "depthwise", "grouped", "any", "1d", "3d"), (4, 5, 2, 1, 2, 0.5, 0.5))[0]
    dim = {"1d": 3, "3d": 5}.get(kind, 4)
    if device == "emulator" and dim != 4:
        kind, dim = "any", 4
    kernel = g.choice(KERNELS)
    if dim != 4:
        kernel = tuple(g.randrange(1, 5) for _ in range(dim - 2))
    groups, filters, channels = 1, g.choice(CHANNELS), g.choice(CHANNELS)
    if kind == "few":
        channels, filters = g.randrange(1, 17), _sometimes(g, 0.4, g.choice((8, 16, 32, 64)), *CHANNELS)
    elif kind == "whole":
        channels, filters = g.choice(WHOLE), _sometimes(g, 0.2, g.choice(WHOLE), *CHANNELS)
    elif kind == "depthwise":
        groups = channels
        filters = channels * _sometimes(g, 0.1, 1, 2, 3)
    elif kind == "grouped":
        groups = g.choice((2, 3, 4))
        channels, filters = groups * g.choice((1, 2, 5, 8, 16)), groups * g.choice((1, 3, 8, 16))
    stride = tuple(_sometimes(g, 0.1, n, 1, 2, 3) for n in [_sometimes(g, 0.35, 1, 2, 2, 3)] * (dim - 2))
    dilation = tuple([_sometimes(g, 0.15, 1, 2, 3)] * (dim - 2))
    same = g.random() < 0.5
    padding = tuple(k // 2 if same else g.randrange(0, k + 1) for k in kernel)
    space = [
        max(n, d * (k - 1) + 1 - 2 * p) for n, k, d, p in zip(_space(g, dim), kernel, dilation, padding, strict=True)
    ]
    layout = _layout(g)
    if kind == "whole":
        layout["layout"] = _sometimes(g, 0.2, "channels_last", *LAYOUTS)
    images = _sometimes(g, 0.0 if device == "emulator" else 0.02, g.choice(IMAGES), 0)
    weight = _weight_layout(g)
    tf32 = dtype == "float32" and (op, device) != ("conv_bn_scale_train", "emulator") and g.random() < 0.3
    algorithm, statistics = "by rule", "by rule"
    covering = {
        "few": ("stem_sm90", "stem_sm80"),
        "whole": ("gemm_sm90", "gemm_sm80", "pointwise"),
        "depthwise": ("depthwise",),
    }
    if device != "cpu" and (device == "emulator" or g.random() < 0.6):
        algorithm = _sometimes(g, 0.1, g.choice(covering.get(kind, CONV_ALGORITHMS)), *CONV_ALGORITHMS)
        if op == "conv_bn_scale_train" and algorithm != "aten":
            ways = [way for way in TRAIN_WAYS if way[0] == algorithm]
            algorithm, statistics = g.choice(ways or [(algorithm, "from_output")])
        if device == "emulator" and algorithm == "aten":
            algorithm = "stem_sm80"
            statistics = "from_output"
    if algorithm.startswith("gemm") and g.random() < 0.85:  # most of them within its domain
        layout["layout"] = "channels_last"
        if (op, device) == ("conv_bn_scale_train", "emulator"):  # which has no TF32 there
            dtype = g.choice(("float16", "bfloat16"))
        tf32 = dtype == "float32"
    if algorithm == "pointwise" and dim == 4 and g.random() < 0.85:
        kernel, stride, padding, dilation = ((n, n) for n in (1, 1, 0, 1))
        groups, space = 1, [1, 1]  # fully connected layers
    if algorithm == "depthwise" and dim == 4 and g.random() < 0.85:
        extent, step = g.choice((3, 3, 5)), g.choice((1, 1, 2))
        channels = g.choice((channels, *WHOLE))
        groups = filters = channels
        kernel, stride, dilation = (extent,) * 2, (step,) * 2, (1, 1)
        padding = tuple(min(n, extent) for n in padding)
        space = [max(n, extent - 2 * pad) for n, pad in zip(space, padding, strict=True)]
    named = {"stride": stride, "padding": padding, "dilation": dilation, "kernel": kernel, "groups": groups}
    return {
        **{"dtype": dtype, "shape": (images, channels, *space), "filters": filters, "tf32": tf32},
        **{"algorithm": algorithm, "statistics": statistics},
        **named,
        **layout,
        **weight,
    }


def _parameters(g: random.Random, op: str, dtype: str) -> dict[str, Any]:
    if op == "gate":
        return {"given_layout": _sometimes(g, 0.2, "contiguous", "transposed", "sliced", "expanded")}
    layout = {"given_layout": _sometimes(g, 0.15, "contiguous", "sliced", "expanded")}
    if op in ("scale_shift", "conv_scale_shift"):
        given = [name for name in ("scale", "shift") if g.random() < 0.85]
        wide = {"float64": "float64"}.get(dtype, "float32")
        return {"given": tuple(given), "given_dtype": wide, **layout}
    given = [name for name in ("weight", "bias") if g.random() < 0.85]
    if op in ("conv_bn_scale", "conv_bn_scale_train", "fold_bn") and g.random() < 0.5:
        given.append("conv_bias")
    if op in TRAINING and g.random() < 0.85:
        given += RUNNING
        layout["given_layout"] = "contiguous"
    kinds = ("", "") if dtype in ("float32", "float64") else ("", "float32", "mixed")
    numbers = {
        "factor": _sometimes(g, 0.5, 1.0, 1.7, -0.5, 2.0),
        "eps": _sometimes(g, 0.3, 1e-5, 1e-3, 0.1),
        "momentum": _sometimes(g, 0.3, 0.1, 1.0, 0.0, 0.37),
    }
    return {"given": tuple(given), "given_dtype": g.choice(kinds), **layout, **numbers}


def _epilogue(g: random.Random, op: str) -> dict[str, Any]:
    named: dict[str, Any] = {"activation": _sometimes(g, 0.7, "none", "relu", "relu", *ACTIVATIONS)}
    named["slope"] = _sometimes(g, 0.5, 0.01, 0.3)
    if op != "bn_scale_cat" and g.random() < 0.4:
        named |= {
            "residual": g.choice(("first", "last")),
            "residual_layout": _residual_layout(g),
            "residual_offset": _sometimes(g, 0.25, 0, 1, 2, 4, 7),
        }
    return named


def _way(g: random.Random, p: Problem, device: str) -> Problem:
    """How it is called, and by what values."""
    if p.op in ("bn_scale", "scale_shift") and device != "emulator":
        way = _sometimes(g, 0.4, "function", "out", "out is input", "out is residual")
        dense = {"contiguous", "channels_last", "rows", "channels", "permuted", "transposed", "sliced"}
        if way == "out is residual" and (p.residual == "none" or p.residual_layout not in dense):
            way = "function"
        if way == "out is input" and p.layout not in dense:
            way = "function"
        p = changed(p, way=way)
        if way == "out":
            p = changed(p, out_layout=g.choice(sorted(dense)), out_offset=g.choice((0, 0, 1, 3, 4, 8)))
    fits_module = p.op in ("conv_bn_scale", "conv_bn_scale_train") and len(p.kernel) == 2 and device != "emulator"
    if fits_module and g.random() < 0.3:
        given = {name for name in p.given if name in ("conv_bias", *RUNNING)}
        given |= {"weight", "bias"} if "weight" in p.given else set()
        mode = _sometimes(g, 0.3, "zeros", "reflect", "replicate", "circular")
        room = all(pad < n for pad, n in zip(p.padding, p.shape[2:], strict=True))
        if p.shape[0] == 0 or not room:
            mode = "zeros"
        p = changed(p, way="module", given=tuple(sorted(given)), padding_mode=mode, tf32=False)
    special = g.random()
    if special < 0.06 and p.op != "fold_bn":
        return changed(p, special="non-finite")
    if special < 0.12 and p.op not in ("fold_bn", "spatial_mean"):
        return changed(p, special="finite", tf32=False)
    if p.op in TRAINING and not p.tf32:
        p = changed(p, mean=_sometimes(g, 0.2, 0.0, 3.0, 100.0))
    empty = 0 in p.shape or 0 in p.parts
    differentiable = p.op == "max_pool2d" if device == "emulator" else p.op != "fold_bn"
    if p.way in ("function", "module") and differentiable and g.random() < 0.25 and not empty:
        # hardsigmoid's derivative in float64 has a float's sixth in PyTorch.
        # A window without an element of the image has a gradient in PyTorch, at an element of another one.
        fits = p.op != "max_pool2d" or max(p.dilation) == 1 or max(p.padding) == 0
        fits = fits and not (p.dtype == "float64" and "hardsigmoid" in (p.activation, p.gate_activation))
        if fits and p.layout != "expanded" and p.algorithm == "by rule":
            p = changed(p, gradients=True, given_layout="contiguous", tf32=False)
            if p.residual == "none":
                p = changed(p, residual_layout=_residual_layout(g))
    return p


def cost(p: Problem) -> tuple[int, int]:
    """Elements of the largest tensor, and taps of all outputs."""
    inputs = (p.shape[0], sum(p.parts), *p.shape[2:]) if p.parts else p.shape
    if p.op == "squeeze_excite":
        return max(math.prod(inputs), p.hidden * max(p.shape[1], p.filters)), 0
    if p.op not in CONVOLVED:
        return math.prod(inputs), 0
    out = p.out_shape()
    if min(out[2:], default=1) < 1:
        return 0, 0
    positions = out[0] * math.prod(out[2:])
    taps = positions * p.shape[1] * math.prod(p.kernel)
    # A product costs less than a value that is copied for it.
    return max(math.prod(inputs), math.prod(out)), max(taps, taps * p.filters // p.groups // 64)


def _fit(p: Problem, elements: int, taps: int) -> Problem:
    """Halves extents, then images, then channels until it is small enough; statistics need more than one value."""
    while True:
        size, of_taps = cost(p)
        values = p.shape[0] * math.prod(p.out_shape()[2:] if p.op in CONVOLVED else p.shape[2:])
        if p.op in TRAINING and values == 1:
            p = changed(p, shape=(2, *p.shape[1:]))
            continue
        if size <= elements and of_taps <= taps:
            return p
        shape = list(p.shape)
        least = [1] * len(shape)
        if p.kernel:
            window = zip(p.kernel, p.padding, p.dilation, strict=True)
            least[2:] = [max(d * (k - 1) + 1 - 2 * pad, pad + 1) for k, pad, d in window]
        large = [i for i in range(2, len(shape)) if shape[i] > max(4, least[i])]
        if p.op == "squeeze_excite" and math.prod(shape) < size:  # which its weights are
            p = changed(p, hidden=p.hidden // 2)
            continue
        if large:
            i = max(large, key=lambda i: shape[i])
            shape[i] = max(least[i], shape[i] - shape[i] // 2)
        elif shape[0] > 2:
            shape[0] //= 2
        elif p.parts and len(p.parts) > 1:
            p = changed(p, parts=p.parts[:-1])
        elif p.op in CONVOLVED and p.filters > 16 and p.groups == 1:
            p = changed(p, filters=p.filters - p.filters // 2)
        elif p.op in CONVOLVED and shape[1] > 16 and p.groups == 1:
            shape[1] -= shape[1] // 2
        elif p.op not in CONVOLVED and shape[1] > 1 and not p.parts:
            shape[1] //= 2
        else:
            return p
        p = changed(p, shape=tuple(shape))
