"""What the parts of the benchmark share: random arguments, the limit on errors, torch.compile with a limit of time."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_conv_bn._progress import progress as progress

MB = 1 << 20
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SCALING_FACTOR = 2.0
EPS = 1e-5
MOMENTUM = 0.1


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def random_bn(channels: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """running_mean, running_var, weight, bias: far from the identity that a fresh BatchNorm nearly is."""
    mean, weight, bias = (torch.randn(channels, device=device) for _ in range(3))
    var = torch.rand(channels, device=device) * 4 + 0.1
    return [t.to(dtype) for t in (mean, var, weight, bias)]


def random_tensor(shape: Sequence[int], dtype: torch.dtype, layout: str, device: str) -> Tensor:
    x = torch.empty(shape, dtype=dtype, device=device, memory_format=LAYOUTS[layout])
    return x.normal_(0.5, 2.0)


class InaccurateError(Exception):
    pass


def check(label: str, unit: float, errors: dict[str, float]) -> dict[str, Any]:
    """Holds "ours" to twice the error of "eager", or to ``unit``: what rounding costs by itself."""
    limit = max(2 * errors["eager"], unit)
    if not errors["ours"] <= limit:
        found = f"relative error {errors['ours']:.3g}, allowed {limit:.3g} (eager: {errors['eager']:.3g})"
        raise InaccurateError(f"{label}: {found}")
    return {"case": label, "limit": limit, **errors}


def batch_moments(y: Tensor) -> tuple[Tensor, Tensor, int]:
    """Of each channel: mean, biased variance, and how many values there are."""
    var, mean = torch.var_mean(y, [dim for dim in range(y.dim()) if dim != 1], correction=0)
    return mean, var, y.numel() // y.shape[1]


def statistics_errors(
    before: Sequence[Tensor], after: Sequence[Tensor], moments: tuple[Tensor, Tensor, int]
) -> dict[str, float]:
    """Of running_mean and running_var, after a batch of these moments in float64: the largest error of a channel over
    the sizes of its two terms, the old value's and the batch's, as those may cancel."""
    mean, var, count = moments
    errors = {}
    for name, batch, old, new in zip(
        ("running_mean", "running_var"), (mean, var * count / (count - 1)), before, after, strict=True
    ):
        terms = (1 - MOMENTUM) * old.double(), MOMENTUM * batch
        error = (new.double() - terms[0] - terms[1]).abs() / (terms[0].abs() + terms[1].abs())
        errors[name] = error.max().item()
    return errors


# How torch.compile is called, by what the tables call it: its mode, and whether weights are frozen into the code.
COMPILE_MODES: dict[str, tuple[str | None, bool]] = {
    "compile": (None, False),
    "compile max-autotune": ("max-autotune-no-cudagraphs", False),
    "compile freezing": (None, True),
    "compile max-autotune freezing": ("max-autotune-no-cudagraphs", True),
    # In CUDA graphs of its own, which whole models take.
    "compile graphed": ("reduce-overhead", True),
    "autotune graphed": ("max-autotune", True),
}


class Compiler:
    """torch.compile within a limit of time: a compile takes seconds, and a benchmark has a few minutes."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.spent = 0.0

    def __call__(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], modes: Iterable[str]
    ) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
        """The compiled functions by mode, and why others are missing. Those of an earlier call are compiled anew."""
        return self.all_of(dict.fromkeys(modes, function), lambda run: run(*inputs))

    def all_of(
        self, functions: dict[str, Callable[..., Tensor]], first_call: Callable[[Callable[..., Tensor]], object]
    ) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
        """The same of several functions, by names that are modes, or are not and have the default one. ``first_call``
        calls what it is given in all the ways that are to be compiled."""
        compiled: dict[str, Callable[..., Tensor]] = {}
        missing: dict[str, str] = {}
        torch._dynamo.reset()  # else a function that is compiled for many rows goes back to eager
        for name, function in functions.items():
            if self.spent >= self.budget:
                missing[name] = f"limit of {self.budget:g} s of compile time reached"
                continue
            mode, freezing = COMPILE_MODES.get(name, (None, False))
            start = time.perf_counter()
            try:
                inductor: Any = importlib.import_module("torch._inductor")
                # As options, by which it also tells one mode's code from another's.
                options = {"freezing": freezing, **(inductor.list_mode_options(mode) if mode else {})}
                run: Callable[..., Tensor] = torch.compile(function, dynamic=False, options=options)
                # What traces the function asks for freezing too. 0: without tables of its own.
                with inductor.config.patch(freezing=freezing, autotune_num_choices_displayed=0):
                    first_call(run)
                compiled[name] = run
            except Exception as error:  # no Triton, no C++ compiler, ...: the row says so
                missing[name] = first_line(error)
            finally:
                self.spent += time.perf_counter() - start
        return compiled, missing


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
