"""Shapes, layouts and epilogues that reach every elementwise kernel, and what results are held to.

Truth is the reference in float64; for float64 itself it is computed in numpy's 80-bit long double.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import DTYPES, SLOPE, long, long_epilogue

EPS = 1e-5
FACTOR = 1.7

# Shapes and layouts that reach every kernel: long planes, planes that are no multiple of a vector, planes shorter than a
# vector, channels_last with channel counts that are and are not multiples of a vector and of a block's share.
SHAPES = [
    (3, 8, 16, 16),
    (2, 5, 7, 9),
    (2, 64, 13, 13),
    (3, 7, 2, 2),
    (2, 3, 1, 5),
    (4, 40),
    (5, 3),
    (2, 320, 3, 5),
    (2, 6, 49),
    (2, 4, 3, 5, 6),
    (1, 1, 1, 1),
    (1, 1),
    (1, 257, 1, 2),
    (2, 1, 5, 6),
    (2, 8, 1, 1),
]
LAYOUTS = ["contiguous", "channels_last", "sliced", "sliced channels_last", "permuted"]


def arrange(x: Tensor, layout: str) -> Tensor:
    """x's values in another memory layout."""
    if layout.endswith("channels_last") and x.dim() in (4, 5):
        memory_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        if layout == "channels_last":
            return x.to(memory_format=memory_format)
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1).to(memory_format=memory_format)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "sliced":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "permuted":
        order = list(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order)
    return x


def long_bn_scale(x: Tensor, bn: tuple[Tensor | None, ...], factor: float, eps: float) -> np.ndarray:
    mean, var, weight, bias = (None if t is None else long(t) for t in bn)
    shape = (-1,) + (1,) * (x.dim() - 2)
    y = (long(x) - mean.reshape(shape)) / np.sqrt(var + np.longdouble(eps)).reshape(shape)
    if weight is not None:
        y = y * weight.reshape(shape)
    if bias is not None:
        y = y + bias.reshape(shape)
    return y * np.longdouble(factor)


def errors(truth: np.ndarray, *results: Tensor) -> list[float]:
    """Norm-relative errors, computed in long double."""
    norm = np.sqrt((truth**2).sum()) or 1
    return [float(np.sqrt(((long(r) - truth) ** 2).sum()) / norm) for r in results]


def is_channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])


def check(ours: Tensor, eager: Tensor, truth: np.ndarray, layout: str) -> None:
    """The project's promise, as in common.assert_no_worse_than_eager, and eager's strides.

    For permuted inputs eager has no one answer on CUDA: cuDNN puts out the suggested memory format, PyTorch's own
    kernels (16-bit parameters, two dimensions) keep the permutation. We put out the suggested format, as on the CPU.
    """
    assert ours.dtype == eager.dtype and ours.shape == eager.shape
    if ours.is_cuda and layout == "permuted":
        assert ours.is_contiguous() or is_channels_last(ours)
    else:
        assert ours.stride() == eager.stride()
    our_error, eager_error = errors(truth, ours, eager)
    assert our_error <= allowed(eager_error, ours), (our_error, eager_error)


def allowed(eager_error: float, ours: Tensor) -> float:
    """Twice eager's error and the half roundoff of common.assert_no_worse_than_eager. On a few elements eager's error may
    be 0 by luck, and one channel's is all of the norm; what holds there is the sum of the seven roundings on the way, each
    of up to one roundoff."""
    bound = 2 * eager_error + 0.5 * DTYPES[ours.dtype]
    return max(bound, 7 * DTYPES[ours.dtype]) if ours.numel() < 200 else bound


def epilogue_of(
    x: Tensor, activation: str, residual: str, generator: torch.Generator, layout: str = "permuted"
) -> dict[str, Any]:
    """Keyword arguments of an op. residual: one of RESIDUALS."""
    added = None
    if residual != "none":
        added = arrange(torch.randn(x.shape, generator=generator).to(x.device, x.dtype), layout)
    return {
        "residual": added,
        "activation": activation,
        "negative_slope": SLOPE,
        "residual_last": residual == "last",
    }


def long_affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> np.ndarray:
    shape = (-1,) + (1,) * (x.dim() - 2)
    y = long(x) if scale is None else long(x) * long(scale).reshape(shape)
    return y if shift is None else y + long(shift).reshape(shape)


def long_of(y: np.ndarray, epilogue: dict[str, Any]) -> np.ndarray:
    return long_epilogue(y, epilogue["residual"], epilogue["activation"], epilogue["residual_last"])
