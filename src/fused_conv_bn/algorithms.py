"""Which algorithm computes a convolution: asked for, and chosen by the user."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._conv import as_autocast
from ._dispatch import check_tensor
from .conditions import has_cuda_library

_ops = torch.ops.fused_conv_bn
_was_used = False


@contextlib.contextmanager
def use_algorithm(algorithm: str | None = None, statistics: str | None = None) -> Iterator[None]:
    """Convolutions on CUDA run this algorithm inside of the ``with`` block, instead of the one that is chosen by rule.

    Example::

        with fcb.use_algorithm("aten"):  # PyTorch's convolution, and one pass behind it
            y = model(x)

    It is for measurements and comparisons: the choice by rule is the fastest known, and what ``fuse(tune=True)`` has
    measured comes before it. Where the algorithm does not cover a convolution, the call raises RuntimeError. Blocks
    nest, and what was set before comes back at their end, also after an error.

    It holds for the calling thread: also for compiled functions that are called there, and not for the backward of
    CUDA tensors, which autograd runs in a thread of its own. In all other threads the environment variables
    FUSED_CONV_BN_CONV and FUSED_CONV_BN_STATISTICS hold. They take the same names of algorithms and statistics, and are
    read once, when the package is imported: an unknown name is an ImportError. Enter the block outside of what
    torch.compile compiles, and not around an ``await``.

    Args:
        algorithm: ``"pointwise"``, ``"gemm_sm90"``, ``"stem_sm90"``, ``"stem_sm80"``, ``"depthwise"``, ``"gemm_sm80"``
            or ``"aten"``; ``"by rule"``, whatever was measured; ``"default"`` for what the environment variable says;
            None to leave it as it is.
        statistics: where :func:`conv_bn_scale_train` takes a batch's statistics from, ``"from_output"`` or
            ``"from_input"``; ``"by rule"``, ``"default"`` or None as above.

    Raises:
        RuntimeError: an unknown name.
    """
    global _was_used
    before, _was_used = _use(algorithm or "", statistics or ""), True
    try:
        yield
    finally:
        _use(*before)


def _use(algorithm: str, statistics: str) -> tuple[str, str]:
    """Returns what was set before. Without a CUDA library there is nothing to set."""
    if has_cuda_library():
        return _ops._use_algorithm(algorithm, statistics)
    _ops._check_algorithm(algorithm, statistics)
    return "", ""


def current() -> tuple[str, str] | None:
    """What :func:`use_algorithm` chose for this thread; None if it was never used, which costs nothing to tell."""
    return _use("", "") if _was_used else None


def explain(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    residual: bool = False,
    allow_tf32: bool = False,
    training: bool = False,
) -> str:
    """What :func:`conv_scale_shift` and :func:`conv_bn_scale` run for a convolution, in words. Computes nothing.

    Example::

        >>> x = torch.randn(64, 8, 128, 128, device="cuda")
        >>> w = torch.randn(64, 8, 3, 3, device="cuda")
        >>> fcb.explain(x, w)
        'stem_sm90 2x126 pixels'
        >>> fcb.explain(x, w, training=True)
        'stem_sm90 2x126 pixels, statistics from the input'
        >>> with fcb.use_algorithm("aten"):
        ...     fcb.explain(x, w)
        'aten'

    The first word is the algorithm. On CUDA that is one of :func:`use_algorithm`'s, which it follows; on the CPU
    ``direct_cpu``, a kernel of this package, or ``aten``, PyTorch's convolution and one pass behind it. ``tuned`` at
    the end says that it was measured to be the fastest on this device (``fuse(tune=True)``). Under autocast
    the answer is about the tensors that autocast makes. Where a gradient is needed and the convolution has many terms,
    PyTorch's convolution runs whatever the answer is (see :func:`conv_scale_shift`).

    Args:
        input, weight, stride, padding, dilation, groups, allow_tf32: as in :func:`conv_scale_shift`. The values of the
            tensors do not matter.
        residual: whether one is added.
        training: of :func:`conv_bn_scale_train`, and where it takes the batch's statistics from.

    Raises:
        RuntimeError: an argument that does not fit, or an algorithm of :func:`use_algorithm`'s that does not cover the
            convolution.
        TypeError: ``input`` or ``weight`` is no tensor.
    """
    check_tensor("explain", "input", input)
    check_tensor("explain", "weight", weight)
    return _ops._explain(
        *as_autocast(input, weight),
        stride if isinstance(stride, Sequence) else (stride,),
        padding if isinstance(padding, Sequence) else (padding,),
        dilation if isinstance(dilation, Sequence) else (dilation,),
        groups,
        has_residual=residual,
        has_statistics=training,
        allow_tf32=allow_tf32,
    )
