"""What becomes of an error of an op for which PyTorch had no memory, or that PyTorch's own ops failed at inside of it.

PyTorch's C ABI has a code for that, without a class, words and numbers. Its headers have words of their own, where they
call PyTorch's ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HEADERS = "API call failed at "
_ALLOCATION = "fused_conv_bn: PyTorch could not allocate memory"
_CALLS = "fused_conv_bn: PyTorch could not ", _HEADERS


def is_pytorchs(error: RuntimeError) -> bool:
    """Whether that is what an op raised. PyTorch's ops in its place say the reason, in an error of their own."""
    return any(words in str(error) for words in _CALLS)


def go_on_behind(error: RuntimeError) -> None:
    """For a function, whose twin of PyTorch's ops comes next. Any other error is the caller's."""
    if not is_pytorchs(error):
        raise error


def out_of_memory(error: RuntimeError, of: Tensor | None) -> torch.OutOfMemoryError | None:
    """The same where nothing may run in the op's place: PyTorch's error for memory of a GPU that ran out.

    Programs that look for a batch size which fits know it by the class or by its first words.
    """
    if of is not None and of.is_cuda and _ALLOCATION in str(error):
        return torch.OutOfMemoryError(f"CUDA out of memory. {error}")
    return None


_WORDS = (
    _ALLOCATION,
    _HEADERS,  # of aten::contiguous and the like: what failed for another reason fails again
    "out of memory",
    "unable to find an engine to execute",  # of cuDNN, where no workspace fits
    "STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: ",
)


def ran_out(error: Exception) -> bool:
    """Whether there was not enough memory for something, by an error of PyTorch's or an op's."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
    )
