"""What all tests share: the dtypes, random BatchNorm statistics, the activations in 80-bit long double, the yardstick
"no less accurate than eager", and what a graph keeps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# One row for each dtype that the ops take: its unit roundoff, the largest relative error of rounding to nearest.
DTYPES: dict[torch.dtype, float] = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float64: 2.0**-53,
}

# Input channels of convolutions of few terms, whose results are computed again, and of many, whose results are kept.
FEW, MANY = 3, 20

DEVICES = ("cpu", "cuda")
"""The parameters of the fixture ``device`` (conftest.py)."""

CONV_ALGORITHMS = ("pointwise", "gemm_sm90", "stem_sm90", "stem_sm80", "depthwise", "gemm_sm80", "aten")
"""The algorithms of conv_scale_shift on CUDA, each of which tests force (ops/conftest.py's ``conv_device``)."""

CONV_STATISTICS = ("from_output", "from_input")
"""Where conv_bn_scale_train can take a batch's statistics from on CUDA (ops/conftest.py's ``train_device``)."""

forced_algorithm = "by rule"
"""The one that the fixtures force (conftest.py)."""

RESIDUALS = ("none", "first", "last")
"""Without a residual; with one before the activation; with one behind it."""

SLOPE = 0.3
"""Of leaky_relu in tests: neither its default nor a number that float32 holds."""


def random_bn(
    channels: int, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(running_mean, running_var, weight, bias), none near those of a fresh BatchNorm, which is almost the identity.

    The variances span four orders of magnitude, within what float16 holds as normal numbers. Drawn on the generator's
    device, so that all devices get the same numbers, and in float32, so that those for float64 are exact in float32.
    """

    def draw(distribution: Callable[..., Tensor]) -> Tensor:
        return distribution(channels, generator=generator, device=generator.device, dtype=torch.float32)

    values = draw(torch.randn), 10 ** (4 * draw(torch.rand) - 2), draw(torch.randn), draw(torch.randn)
    running_mean, running_var, weight, bias = (value.to(device, dtype) for value in values)
    return running_mean, running_var, weight, bias


def rounded_to_tf32(x: Tensor) -> Tensor:
    """float32 with TF32's 10 bits behind the first one: to nearest, halves away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


# ---- 80-bit long double: the truth for float64 -----------------------------------------------------------------------


def long(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy().astype(np.longdouble)


def long_erf(x: np.ndarray) -> np.ndarray:
    """To 2^-60 or better. The series of erf(x) * e^(x^2) has positive terms alone, so that nothing cancels in it. Beyond 7
    erf is 1 to 22 digits."""
    z = np.minimum(np.abs(x), np.longdouble(7))
    total = term = z
    n = 0
    while (term > total * 2.0**-66).any():
        n += 1
        term = term * (2 * z * z / (2 * n + 1))
        total = total + term
    return np.copysign(total * np.exp(-z * z) * (2 / np.sqrt(4 * np.arctan(np.longdouble(1)))), x)


LONG_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "gelu": lambda x: x * (1 + long_erf(x / np.sqrt(np.longdouble(2)))) / 2,
    "gelu_tanh": lambda x: (
        x * (1 + np.tanh(np.sqrt(1 / (2 * np.arctan(np.longdouble(1)))) * (x + np.longdouble("0.044715") * x**3))) / 2
    ),
    "leaky_relu": lambda x: np.where(x > 0, x, x * np.longdouble(SLOPE)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "hardsigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "tanh": np.tanh,
}
"""reference.ACTIVATIONS, with SLOPE."""


def long_epilogue(y: np.ndarray, residual: Tensor | None, activation: str, residual_last: bool) -> np.ndarray:
    if residual is not None and not residual_last:
        y = y + long(residual)
    y = LONG_ACTIVATIONS[activation](y)
    return y + long(residual) if residual is not None and residual_last else y


# ---- the yardstick ---------------------------------------------------------------------------------------------------


def error(y: Tensor, truth: Tensor) -> float:
    """|y - truth| / |truth|, Euclidean, in float64. NaN where ``y`` has one; 0 for empty tensors."""
    assert y.shape == truth.shape, (y.shape, truth.shape)
    y, truth = y.detach().double(), truth.detach().double()
    distance, norm = torch.linalg.vector_norm(y - truth).item(), torch.linalg.vector_norm(truth).item()
    return distance / norm if norm else distance


def assert_no_worse_than_eager(ours: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Holds ``ours`` to twice eager's error. ``truth`` is computed in float64, ``eager`` in the dtype of ``ours``.

    For float64 nothing is more exact than eager itself. There ``eager`` is to be its float32 result for the same
    numbers (all of them exact in float32), which tells how many unit roundoffs this computation costs; ``truth``, eager
    in float64, is off by as many, so that ``ours`` may be 2 + 1 times as many away from it.

    Twice is the project's promise. What is added to it is the cost of storing a result at all: rounding to nearest errs
    uniformly by up to u * 2^e, with u the unit roundoff and 2^e the binade, which is u/sqrt(3) in norm for significands
    near 1 and u/sqrt(12) for those near 2, so roughly u/2. An eager result is closer than that only by luck (few
    elements, or values that happen to be representable), and nobody can be held to luck.
    """
    double = ours.dtype == torch.float64
    assert eager.dtype == (torch.float32 if double else ours.dtype), (ours.dtype, eager.dtype)
    u = DTYPES[ours.dtype]
    eagers = error(eager, truth) / DTYPES[eager.dtype]
    allowed = (3 if double else 2) * eagers + 0.5
    got = error(ours, truth) / u
    assert got <= allowed, f"error {got:.3g} unit roundoffs, allowed {allowed:.3g}, eager's {eagers:.3g}"


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """The bytes that the graph keeps, each memory counted once. What is per channel belongs to a module anyway."""
    memory: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if t.dim() > 1:
            memory[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = run()
    del y
    return sum(memory.values())
