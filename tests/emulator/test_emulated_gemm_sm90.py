"""gemm_sm90 with every tile, number of splits and layout of shared memory, whatever its rule chooses."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

import emulated
import fused_conv_bn as fcb
from conv_problems import check, make

SHARED = 232448  # bytes of a block, as compute capability 9.0 has them
TILES = range(8)
SPLITS = (2, 4, 8)
HALO = 0  # for the number of splits: a block fetches pixels once for all taps
HALO_TILES = (0, 2, 3)
WIDE_TILES = (1, 6)  # of 16 bits alone
# In turns. float32 is TF32's: with numbers that it has.
DTYPES: tuple[dict[str, Any], ...] = (
    {"dtype": torch.float16},
    {"dtype": torch.float32, "tf32": True},
    {"dtype": torch.bfloat16},
)

# Tiles end behind the last pixel, filter and channel. Steps have 16, 32 and 64 channels, and a tap one or two of them.
PROBLEMS: dict[str, tuple[Any, ...]] = {
    "3x3 of 8 channels": ((2, 8, 17, 19), (40, 8, 3, 3), 1, 1),
    "3x3 with a stride": ((1, 24, 45, 49), (136, 24, 3, 3), 2, 1),
    "2x3 with dilation": ((1, 96, 24, 21), (8, 96, 2, 3), 1, (0, 2), (1, 2)),
    "1x1": ((3, 16, 14, 15), (264, 16, 1, 1)),
    "1x1 of 96 channels": ((2, 96, 19, 15), (40, 96, 1, 1)),
    "1x1 with a stride": ((2, 40, 45, 30), (72, 40, 1, 1), (2, 3), (1, 0)),
}
# Few pixels, and so many steps that eight blocks have two each at least.
SPLIT_PROBLEMS: dict[str, tuple[Any, ...]] = {
    "4x4": ((2, 40, 9, 8), (136, 40, 4, 4), 1, 2),
    "1x1": ((1, 1096, 3, 5), (8, 1096, 1, 1)),
    "5x5 of 8 channels": ((1, 8, 9, 10), (40, 8, 5, 5), 2, (2, 1)),
}
EPILOGUES: tuple[dict[str, Any], ...] = (
    {"residual": "none", "activation": "relu6"},
    {"residual": "first", "activation": "silu"},
    {"residual": "last", "activation": "relu", "bn": True},
)


def make_call(generator: torch.Generator, turn: int, problem: tuple[Any, ...]) -> Any:
    named = DTYPES[turn % 3] | EPILOGUES[turn // 3 % 3]
    return make(generator, "cpu", named.pop("dtype"), *problem, formats="ll", **named)


@pytest.fixture
def by_layout(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has the op run by a layout."""

    def use(*numbers: int) -> emulated.GemmSm90Layout:
        layout = emulated.GemmSm90Layout(*numbers)
        for name in ("conv_scale_shift", "conv_bn_scale"):
            function = functools.partial(getattr(emulated, name), algorithm="gemm_sm90", layout=layout)
            monkeypatch.setattr(fcb, name, function)
        return layout

    return use


def test_every_tile_is_tested():
    assert emulated.gemm_sm90_tiles() == len(TILES)


@pytest.mark.parametrize("multiprocessors", [1, 1000])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_tiles(problem, multiprocessors, by_layout, generator):
    """On one multiprocessor, where consumers have several tiles each, and on so many that no block has a second one."""
    for tile in TILES:
        layout = by_layout(tile, 1, multiprocessors, SHARED)
        turn = tile + len(problem) + multiprocessors
        call = make_call(generator, turn, PROBLEMS[problem])
        if not check(call):
            assert tile in WIDE_TILES and call.allow_tf32
            continue
        assert (layout.rounds > 1) == (multiprocessors == 1), tile


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("problem", SPLIT_PROBLEMS)
def test_splits(problem, splits, by_layout, generator):
    tested = []
    for tile in TILES:
        by_layout(tile, splits, 132, SHARED)
        turn = tile + splits // 2 + len(problem)
        call = make_call(generator, turn, SPLIT_PROBLEMS[problem])
        if check(call):
            tested.append(tile)
    assert len(tested) >= 3, tested  # others have no kernel for clusters


# Images end within tiles, and the last tile within an image.
HALO_PROBLEMS: dict[str, tuple[Any, ...]] = {
    "3x3": ((3, 96, 9, 11), (136, 96, 3, 3), 1, 1),
    "3x3 of 8 channels": ((2, 8, 17, 19), (40, 8, 3, 3), 1, 1),
    "3x3 with dilation": ((2, 40, 10, 21), (72, 40, 3, 3), 1, 2, 2),
    "1x5": ((2, 72, 8, 13), (24, 72, 1, 5), 1, (0, 2)),
    "7x1": ((1, 16, 21, 15), (264, 16, 7, 1), 1, (3, 0)),
}


@pytest.mark.parametrize("multiprocessors", [1, 1000])
@pytest.mark.parametrize("problem", HALO_PROBLEMS)
def test_halos(problem, multiprocessors, by_layout, generator):
    for tile in TILES:
        turn = tile // 2 + len(problem) + multiprocessors
        call = make_call(generator, turn, HALO_PROBLEMS[problem])
        by_layout(tile, HALO, multiprocessors, SHARED)
        covered = check(call)
        assert covered or tile not in HALO_TILES or (tile == 0 and call.allow_tf32), tile


@pytest.mark.parametrize("tile", HALO_TILES)
def test_ways_to_lay_out_halos(tile, by_layout, generator):
    """Filters that stay in shared memory or not, each with as little of it as may be."""
    ways = {}
    for channels in (16, 96):
        call = make(generator, "cpu", torch.float16, (2, channels, 9, 12), (40, channels, 3, 3), 1, 1, formats="ll")
        layouts = [emulated.GemmSm90Layout(tile, HALO, 1, shared) for shared in range(8192, SHARED, 2048)]
        window = 1, 1, 1
        for layout, fits in zip(layouts, emulated.gemm_sm90_fits(layouts, call.x, call.w, *window), strict=True):
            if fits:
                ways.setdefault(layout.resident, (call, layout))
    assert len(ways) == 2
    for call, layout in ways.values():
        by_layout(tile, HALO, 1, layout.shared_memory)
        assert check(call)


@pytest.mark.parametrize("window", [(2, 1, 1), (1, 0, 1), (1, 1, 2), (1, (1, 0), 1)])
def test_windows_without_halos(window, by_layout, generator):
    """Those whose output is not as large as the input."""
    by_layout(0, HALO, 132, SHARED)
    assert make(generator, "cpu", torch.float16, (1, 16, 9, 9), (16, 16, 3, 3), *window, formats="ll").ours() is None


@pytest.mark.parametrize("reach, pad", [(0, 127), (1, 128), (128, 0), (255, 127), (255, 128)])
def test_windows_at_the_limits_of_tensor_maps(reach, pad, by_layout, generator):
    """In either direction."""
    taps, dilation = (2, reach) if reach else (1, 1)
    for tile, i in ((0, 0), (4, 1)):
        by_layout(tile, 1, 3, SHARED)
        space, kernel, paddings, dilations = [2, 2], [1, 1], [0, 0], [1, 1]
        space[i], kernel[i], paddings[i], dilations[i] = 140, taps, pad, dilation
        problem = (2, 8, *space), (16, 8, *kernel), 8, paddings, dilations
        assert check(make(generator, "cpu", torch.float16, *problem, formats="ll"))


@pytest.mark.parametrize("tile", TILES)
def test_ways_to_lay_out_shared_memory(tile, by_layout, generator):
    """Filters that stay in it or not, a consumer's results in one buffer or two; each with as few stages as may be."""
    ways = {}
    for kernel, named in itertools.product(((1, 3), (5, 5)), DTYPES[:2]):
        shapes = (1, 16, 31, 25), (40, 16, *kernel)
        call = make(generator, "cpu", named["dtype"], *shapes, formats="ll", residual="first", tf32="tf32" in named)
        layouts = [emulated.GemmSm90Layout(tile, 1, 1, shared) for shared in range(8192, SHARED, 2048)]
        for layout, fits in zip(layouts, emulated.gemm_sm90_fits(layouts, call.x, call.w), strict=True):
            if fits:
                ways.setdefault((named["dtype"], layout.resident, layout.buffers), (call, layout))
    kinds = {dtype: sum(way[0] == dtype for way in ways) for dtype in (torch.float16, torch.float32)}
    assert kinds[torch.float16] == 4
    # Large tiles have no room for two buffers.
    assert kinds[torch.float32] >= 2 or tile in WIDE_TILES
    for call, layout in ways.values():
        by_layout(tile, 1, 1, layout.shared_memory)
        assert check(call)


def test_float32_is_rounded_to_tf32(by_layout, generator):
    """To nearest: products with the bits cut off, as they are taken, would err by twice as much, and to one side."""
    call = make(generator, "cpu", torch.float32, (2, 40, 9, 11), (24, 40, 3, 3), formats="ll", tf32=True)
    by_layout(0, 1, 132, SHARED)
    for part in (-0.2, 0.4):  # steps are half as long below a power of two
        off = replace(call, **{name: t + part * tf32_step(t) for name, t in (("x", call.x), ("w", call.w))})
        assert not torch.equal(off.x, call.x)
        assert torch.equal(call.call(), off.call())


def test_float32_without_tf32_is_not_covered(by_layout, generator):
    by_layout(0, 1, 132, SHARED)
    assert make(generator, "cpu", torch.float32, (2, 40, 9, 11), (24, 40, 3, 3), formats="ll").ours() is None


def tf32_step(x: torch.Tensor) -> torch.Tensor:
    """From TF32's numbers to the next larger ones."""
    return torch.ldexp(x.sign(), torch.frexp(x).exponent - 11)
