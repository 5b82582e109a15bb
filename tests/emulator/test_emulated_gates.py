"""gemm_sm90 that multiplies its input by gates on the way: every tile and number of splits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import emulated
from common import random_bn
from fused_conv_bn import reference

EPS, FACTOR = 1e-3, 1.7
SHARED = 232448
TILES = range(8)
# Tiles end within images, images within tiles, and steps have 16, 32 and 64 channels, of which not all exist.
PROBLEMS: dict[str, tuple[tuple[int, ...], int, int]] = {  # the last number: of groups
    "images of 49 pixels": ((5, 96, 7, 7), 40, 1),
    "images of 2 pixels": ((70, 72, 1, 2), 24, 1),
    "large images": ((2, 16, 14, 15), 264, 1),
    "many channels": ((2, 520, 9, 5), 72, 1),
    "8 channels": ((3, 8, 9, 11), 16, 1),
    "groups": ((3, 96, 7, 9), 72, 3),
    "groups of 8 channels": ((4, 64, 5, 6), 128, 8),
}


def check(
    name: str, dtype: torch.dtype, layout: emulated.GemmSm90Layout, generator: torch.Generator, turn: int
) -> bool:
    """Whether there is such a kernel. To the bit it is the convolution of a gated input, as `gate` rounds it."""
    shape, filters, groups = PROBLEMS[name]
    x = torch.randn(shape, generator=generator).to(dtype).to(memory_format=torch.channels_last)
    gates = torch.rand(shape[:2], generator=generator).to(dtype)
    w = torch.randn(filters, shape[1] // groups, 1, 1, generator=generator).to(dtype)
    bn = random_bn(filters, dtype, "cpu", generator)
    residual = torch.randn(shape[0], filters, *shape[2:], generator=generator).to(dtype) if turn % 2 else None
    named: dict[str, Any] = dict(residual=residual, activation=("none", "relu", "silu")[turn % 3])
    arguments = (w, None, *bn, FACTOR, EPS, 1, 0, 1, groups)
    run = dict(algorithm="gemm_sm90", layout=layout)
    try:
        ours = emulated.conv_bn_scale(x, *arguments, **named, **run, gates=gates)
    except RuntimeError as error:
        assert "does not cover this convolution" in str(error)
        return False
    gated = reference.gate(x, gates)
    assert torch.equal(ours, emulated.conv_bn_scale(gated, *arguments, **named, **run))
    return True


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_tile(name: str, splits: int, generator: torch.Generator) -> None:
    tested = 0
    for tile in TILES:
        layout = emulated.GemmSm90Layout(tile, splits, (1, 1000)[tile % 2] if splits == 1 else 132, SHARED)
        tested += check(name, (torch.float16, torch.bfloat16)[tile // 2 % 2], layout, generator, tile + splits)
    assert tested >= (len(TILES) if splits == 1 else 2 if name == "many channels" else 0)


@pytest.mark.parametrize(
    ("problem", "faster"),
    [  # as measured
        ((64, 144, 24, 56), True),
        ((1, 672, 112, 14), True),
        ((128, 480, 80, 14), True),
        ((32, 960, 160, 7), True),
        ((64, 1152, 192, 7), False),
        ((32, 448, 448, 28), False),
        ((64, 2016, 2016, 7), False),
    ],
)
def test_the_rule(problem: tuple[int, int, int, int], faster: bool) -> None:
    """Gates come along where that takes less time than a pass of their own."""
    assert emulated.has_faster_gates(*problem) is faster


@pytest.mark.parametrize("window", [(2, 0), (1, 1)])
def test_others_take_no_gates(window: tuple[int, int], generator: torch.Generator) -> None:
    x = torch.randn(2, 16, 6, 6, generator=generator).half().to(memory_format=torch.channels_last)
    w = torch.randn(16, 16, 1, 1, generator=generator).half()
    gates, bn = torch.rand(2, 16).half(), random_bn(16, torch.float16, "cpu", generator)
    with pytest.raises(RuntimeError, match="does not cover this convolution"):
        emulated.conv_bn_scale(x, w, None, *bn, FACTOR, EPS, *window, algorithm="gemm_sm90", gates=gates)


def test_tf32_takes_no_gates(generator: torch.Generator) -> None:
    x = torch.randn(2, 32, 6, 6, generator=generator).to(memory_format=torch.channels_last)
    w = torch.randn(16, 32, 1, 1, generator=generator)
    bn = random_bn(16, torch.float32, "cpu", generator)
    named: dict[str, Any] = dict(algorithm="gemm_sm90", allow_tf32=True)
    emulated.conv_bn_scale(x, w, None, *bn, FACTOR, EPS, **named)
    with pytest.raises(RuntimeError, match="does not cover this convolution"):
        emulated.conv_bn_scale(x, w, None, *bn, FACTOR, EPS, **named, gates=torch.rand(2, 32))
