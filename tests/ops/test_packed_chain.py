"""_conv_packed_chain by itself: its steps, its memory and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_conv_bn._fuse.frozen import PackedConv

OP = torch.ops.fused_conv_bn._conv_packed_chain.default
pytestmark = pytest.mark.skipif(
    not torch.ops.fused_conv_bn._packed_channels(), reason="oneDNN is preferred on this processor"
)
NUMBERS = 20
CONV, DEPTHWISE, MEAN, GATE = range(4)


class Program:
    """Steps, and what PyTorch makes of them."""

    def __init__(self, *inputs: Tensor) -> None:
        self.inputs = inputs
        self.values = [x.double() for x in inputs]
        self.rows: list[list[int]] = []
        self.packed = torch.zeros(1)

    def add(self, kind: int, value: Tensor, numbers: list[int], is_result: bool) -> None:
        self.rows.append([kind, *numbers, 0, 0, int(is_result)])
        self.values.append(value)

    def conv(
        self, read: int, filters: int, kernel: int, depthwise: bool, residual: int | None, is_result: bool
    ) -> None:
        x = self.values[read]
        channels = x.shape[1]
        weight = torch.randn(filters, 1 if depthwise else channels, kernel, kernel)
        weight /= weight[0].numel() ** 0.5
        shift, pad, groups = torch.randn(filters), kernel // 2, channels if depthwise else 1
        y = F.conv2d(x, weight.double(), shift.double(), 1, pad, groups=groups)
        y = y if residual is None else y + self.values[residual]
        run = PackedConv(weight, shift, ((1, 1), (pad, pad), (1, 1)), groups)
        at = self.packed.numel()
        self.packed = torch.cat([self.packed, run.weight.flatten(), run.shift])
        window = [kernel, kernel, 1, 1, pad, pad, 1, 1]
        added = -1 if residual is None else residual
        numbers = [read, added, -1, at, at + run.weight.numel(), 0, channels, filters, *window]
        self.add(DEPTHWISE if depthwise else CONV, y, numbers, is_result)

    def mean(self, read: int, is_result: bool) -> None:
        self.add(MEAN, self.values[read].mean((2, 3), True), [read, -1, -1, *[0] * 13], is_result)

    def gate(self, read: int, gate: int, residual: int | None, is_result: bool) -> None:
        y = self.values[read] * self.values[gate]
        y = y if residual is None else y + self.values[residual]
        self.add(GATE, y, [read, -1 if residual is None else residual, gate, *[0] * 13], is_result)

    def run(self) -> list[Tensor]:
        got: list[Tensor] = OP(list(self.inputs), self.packed, torch.tensor(self.rows), "none")
        return got

    def check(self) -> None:
        want = [v for v, row in zip(self.values[len(self.inputs) :], self.rows, strict=True) if row[-1]]
        for got, exact in zip(self.run(), want, strict=True):
            assert got.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed: int) -> None:
    """Values that live for any time, in memory that they share; results that are read again; gates in place."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    n, size = 1 + draw(3), 1 + draw(9)
    program = Program(*(torch.randn(n, c, size, size) for c in (8, 16)))
    for step in range(4 + draw(12)):
        whole = [i for i, v in enumerate(program.values) if v.shape[2:] == (size, size)]
        read = whole[draw(len(whole))]
        x, is_result = program.values[read], draw(4) == 0
        like = [i for i in whole if program.values[i].shape == x.shape]
        residual = like[draw(len(like))] if draw(2) else None
        if draw(3) == 0:
            program.mean(read, is_result)
            gate = len(program.values) - 1
            program.gate(*((read, gate) if step % 2 else (gate, read)), residual, is_result)
        elif draw(2):
            program.conv(read, x.shape[1], 3, True, residual, is_result)
        else:
            filters = (8, 16)[draw(2)] if residual is None else x.shape[1]
            program.conv(read, filters, 1 + 2 * draw(2), False, residual, is_result)
    program.rows[-1][-1] = 1
    program.check()


@pytest.mark.parametrize("size", [1, 5, 64, 113])
@pytest.mark.parametrize("channels", [1, 8, 30, 100])
def test_means(channels: int, size: int) -> None:
    """Of values far from 0, sums of which lose digits: no more than PyTorch's own."""
    torch.manual_seed(1)
    x = torch.randn(2, channels, size, size) + 30
    program = Program(x)
    program.mean(0, True)
    exact = x.double().mean((2, 3), True)
    (got,) = program.run()
    eager = x.to(memory_format=torch.channels_last).mean((2, 3), True)
    error, theirs = ((t.double() - exact).abs().max() for t in (got, eager))
    assert error <= 2 * theirs + 4e-6


def _program() -> Program:
    torch.manual_seed(2)
    program = Program(torch.randn(1, 8, 5, 5))
    program.conv(0, 8, 3, False, 0, False)
    program.mean(1, False)
    program.gate(1, 2, None, True)
    program.check()
    return program


# Of a row, the number that is changed, and to what.
WRONG = {
    "kind": (0, 0, 4),
    "a value that is not there yet": (0, 1, 1),
    "a negative value": (0, 1, -1),
    "a residual that is not there": (0, 2, 7),
    "a residual of another shape": (2, 2, 2),
    "a gate of a convolution": (0, 3, 0),
    "no gate": (2, 3, -1),
    "a gate of another shape": (2, 3, 0),
    "a weight beyond the end": (0, 4, 10**9),
    "a weight before the beginning": (0, 4, -1),
    "a shift beyond the end": (0, 5, 10**9),
    "a slope beyond the end": (0, 6, 10**9),
    "other channels": (0, 7, 4),
    "filters": (0, 8, 10**6),
    "a filter of nothing": (0, 9, 0),
    "a filter larger than the image": (0, 10, 30),
    "a stride": (0, 11, 0),
    "a padding": (0, 13, -1),
    "a dilation": (0, 16, 0),
    "an activation without a name": (0, 17, 1),
    "a residual of a mean": (1, 2, 1),
}


@pytest.mark.parametrize("name", WRONG)
def test_steps_that_are_refused(name: str) -> None:
    program = _program()
    row, number, value = WRONG[name]
    program.rows[row][number] = value
    with pytest.raises(RuntimeError, match="_conv_packed_chain: "):
        program.run()


def test_arguments_that_are_refused() -> None:
    program = _program()
    steps, x = torch.tensor(program.rows), program.inputs[0]
    wrong: list[tuple[Any, ...]] = [
        ([x], program.packed, steps[:, 1:], "none"),
        ([x], program.packed, steps.int(), "none"),
        ([x], program.packed, steps[:, :, None], "none"),
        ([x], program.packed.double(), steps, "none"),
        ([x], program.packed[::2], steps, "none"),
        ([x.double()], program.packed, steps, "none"),
        ([x[0]], program.packed, steps, "none"),
        ([x[:0]], program.packed, steps, "none"),
        ([], program.packed, steps, "none"),
        ([x], program.packed, steps, ""),
        ([x], program.packed, steps, "none,sine"),
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeError, match="_conv_packed_chain: "):
            OP(*arguments)
    assert OP([x], program.packed, steps[:0], "none") == []
