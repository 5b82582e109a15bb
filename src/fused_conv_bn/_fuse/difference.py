"""Whether two ways to compute a result gave the same one, but for roundings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._conv import tf32_is_on

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
TF32_TOLERANCE = 5e-3


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


def difference_of(got: Any, expected: Any) -> str | None:
    """In which way a result is another one than rounding explains; None if in none."""
    mine, theirs = _tensors(got), _tensors(expected)
    if len(mine) != len(theirs):
        return f"{len(mine)} tensors for {len(theirs)}"
    for a, b in zip(mine, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{list(a.shape)} {a.dtype} for {list(b.shape)} {b.dtype}"
        if not a.dtype.is_floating_point:
            if not torch.equal(a, b):
                return "other integers"
            continue
        if a.numel() == 0:
            continue
        is_tf32 = a.is_cuda and a.dtype == torch.float32 and tf32_is_on()
        tolerance = TF32_TOLERANCE if is_tf32 else TOLERANCES.get(a.dtype, 1e-4)
        # What is less than the least normal number has few bits, or none.
        least = torch.finfo(a.dtype).smallest_normal
        wide = torch.promote_types(a.dtype, torch.float32)
        a, b = a.detach().to(wide), b.detach().to(wide)
        largest, off = b.abs().max(), (a - b).abs().max()
        if not torch.isfinite(largest + off):
            finite = torch.isfinite(b)
            if not torch.equal(torch.isfinite(a), finite):
                return "other values that are Inf or NaN"
            zero = b.new_zeros(())
            largest, off = (torch.where(finite, t, zero).abs().max() for t in (b, a - b))
        error = float(off / largest.clamp(min=max(1e-30, least)))
        if error > tolerance:
            return f"a relative error of {error:.1e}"
    return None
