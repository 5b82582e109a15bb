"""Tiny runs of the benchmark program, and small convolutions for it."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks import __main__
from benchmarks.layers import ConvCase, Layer

TINY = ["--quick", "--max-mb=0.01", "--conv-batch=1", "--repeats=1", "--commit=abc"]


def call(*arguments: str) -> int:
    return __main__.main(arguments)


SMALL = [
    Layer(3, 6, 7, 13, 2, 3, activation="relu"),
    Layer(8, 6, 1, 9, activation="relu", residual=True),
    Layer(8, 8, 3, 9, 2, 1, groups=8, activation="relu6"),
    Layer(6, 8, 1, 9, 2, bias=True, scaling_factor=3.0),
    Layer(6, 6, 1, 9, residual=True),
]


def small_cases(group: str, device: str) -> list[ConvCase]:
    first = ConvCase("small", SMALL[0], 2, torch.float32, "nchw")
    return [
        *(replace(first, layer=layer) for layer in SMALL),
        *(replace(first, layer=layer, dtype=torch.float16, layout="channels_last", count=2) for layer in SMALL),
        *([replace(first, allow_tf32=True)] if device == "cuda" else []),
        replace(first, with_op=True, forced=("aten", "stem_sm80", "depthwise")),
    ]
