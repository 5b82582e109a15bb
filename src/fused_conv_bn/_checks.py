"""What an op refuses, for the calls that PyTorch's own ops compute in its place: in the op's words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_cat(inputs: Sequence[Tensor]) -> None:
    """Those of bn_scale_cat that torch.cat would take, such as other dtypes, or refuse in its own words."""
    if not inputs:
        raise RuntimeError("bn_scale_cat: inputs has 0 tensors, expected at least one")
    first = inputs[0]
    for i, x in enumerate(inputs):
        if x.dim() != first.dim() or x.shape[:1] != first.shape[:1] or x.shape[2:] != first.shape[2:]:
            raise RuntimeError(
                f"bn_scale_cat: inputs[{i}] has shape {list(x.shape)}, expected {list(first.shape)}, the shape of "
                f"inputs[0], but for the channels"
            )
        if x.dtype != first.dtype:
            raise RuntimeError(
                f"bn_scale_cat: inputs[{i}] has dtype {_name(x.dtype)}, expected {_name(first.dtype)}, the dtype of "
                f"inputs[0]"
            )


def check_gate(input: Tensor, gate: Tensor, residual: Tensor | None) -> None:
    """Those of gate that would be broadcast, or promoted."""
    if not 2 <= input.dim() <= 5:
        raise RuntimeError(
            f"gate: input has shape {list(input.shape)}, expected 2 to 5 dimensions: (N, C), (N, C, L), (N, C, H, W) "
            f"or (N, C, D, H, W)"
        )
    of_channels, ones = list(input.shape[:2]), [1] * (input.dim() - 2)
    if list(gate.shape) not in (of_channels, [*of_channels, *ones]):
        raise RuntimeError(
            f"gate: gate has shape {list(gate.shape)}, expected {of_channels} and perhaps ones, an element for each "
            f"channel of each image of input"
        )
    if residual is not None and residual.shape != input.shape:
        raise RuntimeError(
            f"gate: residual has shape {list(residual.shape)}, expected {list(input.shape)}, the shape of input"
        )
    for name, t in (("gate", gate), ("residual", residual)):
        if t is not None and t.dtype != input.dtype:
            raise RuntimeError(
                f"gate: {name} has dtype {_name(t.dtype)}, expected {_name(input.dtype)}, the dtype of input"
            )


def check_max_pool2d(input: Tensor) -> None:
    """What F.max_pool2d takes for an image without a batch."""
    if input.dim() != 4:
        raise RuntimeError(f"max_pool2d: input has shape {list(input.shape)}, expected 4 dimensions: (N, C, H, W)")


def check_squeeze(input: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> None:
    """Those of squeeze_excite that other convolutions have."""
    shape = list(input.shape)
    if not 3 <= input.dim() <= 5:
        raise RuntimeError(
            f"squeeze_excite: input has shape {shape}, expected 3 to 5 dimensions: (N, C, L), (N, C, H, W) or "
            f"(N, C, D, H, W)"
        )
    if 0 in shape[1:]:
        raise RuntimeError(
            f"squeeze_excite: input has shape {shape}, expected at least one element in each dimension but the first"
        )
    ones = [1] * (input.dim() - 2)
    layers = (1, weight1, bias1, shape[1], "input"), (2, weight2, bias2, weight1.size(0), "weight1's result")
    for i, weight, bias, channels, source in layers:
        if list(weight.shape[1:]) != [channels, *ones] or weight.size(0) == 0:
            expected = ", ".join(map(str, [channels, *ones]))
            raise RuntimeError(
                f"squeeze_excite: weight{i} has shape {list(weight.shape)}, expected [outputs, {expected}], the "
                f"channels of {source} in dimension 1"
            )
        if bias is not None and list(bias.shape) != [weight.size(0)]:
            raise RuntimeError(
                f"squeeze_excite: bias{i} has shape {list(bias.shape)}, expected [{weight.size(0)}], one element for "
                f"each channel of weight{i}'s result"
            )
        for name, t in ((f"weight{i}", weight), (f"bias{i}", bias)):
            if t is not None and t.dtype != input.dtype:
                raise RuntimeError(
                    f"squeeze_excite: {name} has dtype {_name(t.dtype)}, expected {_name(input.dtype)}, the dtype of "
                    f"input"
                )


def check_spatial_mean(input: Tensor) -> None:
    if not 3 <= input.dim() <= 5:
        raise RuntimeError(
            f"spatial_mean: input has shape {list(input.shape)}, expected 3 to 5 dimensions: (N, C, L), (N, C, H, W) "
            f"or (N, C, D, H, W)"
        )
