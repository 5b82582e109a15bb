"""Tensors from a description: the same values on every device, in any memory, with NaN all around them."""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from common import rounded_to_tf32

PERIOD = 1_000_003  # a prime, so that no row or plane begins with the same values
TAIL = 24  # elements of NaN behind a tensor
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

LAYOUTS = (
    "contiguous",
    "channels_last",
    "sliced",
    "sliced channels_last",
    "rows",
    "channels",
    "transposed",
    "permuted",
    "expanded",
)
"""sliced: each second element of the fastest dimension. rows and channels: parts of longer rows, of more channels. transposed:
the last two dimensions. permuted: all of them. expanded: one image for all."""


@dataclass(frozen=True)
class Spec:
    """A tensor. ``values``: normal; unit, between 0 and 1; or variance, over four orders of magnitude. ``shift`` is added to
    them. ``special``: none; finite, for some zeros, denormal numbers and large ones; or non-finite."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    offset: int = 0
    seed: int = 0
    values: str = "normal"
    factor: float = 1.0
    shift: float = 0.0
    tf32: bool = False
    special: str = "none"


@functools.cache
def _pool(values: str, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(20)
    normal, unit = torch.randn(PERIOD, generator=generator), torch.rand(PERIOD, generator=generator)
    return {"normal": normal, "unit": unit, "variance": 10 ** (4 * unit - 2)}[values].to(device)


def _drawn(spec: Spec, device: str) -> Tensor:
    pool, count = _pool(spec.values, device), math.prod(spec.shape)
    start = spec.seed * 7919 % PERIOD
    parts = [pool[start : start + count]]
    count -= parts[0].numel()
    parts += [pool] * (count // PERIOD) + [pool[: count % PERIOD]]
    x = torch.cat(parts) if len(parts[0]) < math.prod(spec.shape) else parts[0].clone()
    x = x.mul_(spec.factor).add_(spec.shift)
    return rounded_to_tf32(x) if spec.tf32 else x


def _specials(kind: str, dtype: torch.dtype) -> list[float]:
    tiny = torch.finfo(dtype).tiny
    large = 2.0**9 if dtype == torch.float16 else 2.0**30
    return [math.inf, -math.inf, math.nan] if kind == "non-finite" else [0.0, -0.0, tiny / 2, -tiny / 4, large, -large]


def _strides(spec: Spec) -> list[int]:
    dim = len(spec.shape)
    order = list(range(dim))  # from the slowest one on
    if "channels_last" in spec.layout and dim > 2:
        order = [0, *range(2, dim), 1]
    elif spec.layout == "transposed" and dim > 1:
        order[-2:] = order[:-3:-1]
    elif spec.layout == "permuted":
        order.reverse()
    steps, room = [1] * dim, [0] * dim
    if spec.layout.startswith("sliced"):
        steps[-1] = 2
    elif spec.layout == "rows":
        room[-1] = 3
    elif spec.layout == "channels":
        room[min(1, dim - 1)] = 5
    strides, running = [0] * dim, 1
    for d in reversed(order):
        strides[d] = running * steps[d]
        running *= max(1, spec.shape[d] * steps[d] + room[d])
    return strides


def placed(spec: Spec, device: str) -> tuple[Tensor, Tensor]:
    """The tensor, and the memory that it is in."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    strides = _strides(spec)
    shape = list(spec.shape)
    if spec.layout == "expanded" and shape[0] > 1:
        shape[0] = 1
        strides[0] = 0
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if math.prod(shape) else 0
    memory = torch.full((spec.offset + extent + TAIL,), math.nan, dtype=dtype, device=device)
    view = memory.as_strided(shape, strides, spec.offset)
    count = math.prod(shape)
    view.copy_(_drawn(spec, device)[:count].view(shape))
    if spec.special != "none" and count:
        numbers = random.Random(spec.seed)
        for value in itertools.islice(itertools.cycle(_specials(spec.special, dtype)), 1 + min(8, count // 50)):
            view[tuple(numbers.randrange(n) for n in shape)] = value
    return view.expand(spec.shape), memory


def tensor(spec: Spec, device: str) -> Tensor:
    return placed(spec, device)[0]


def bits(x: Tensor) -> Tensor:
    """For comparisons in which NaN equals itself, and -0 does not equal 0."""
    return x.view(INTEGERS[x.element_size()])
