"""gemm_sm90 with groups, by every tile and layout: groups within a tile of filters, tiles within a group, and both across."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import emulated
import test_emulated_gemm_sm90_training as training
from conv_problems import check, make
from test_emulated_gemm_sm90 import HALO, HALO_TILES, SHARED, TILES, by_layout, make_call  # noqa: F401
from test_emulated_gemm_sm90_training import use  # noqa: F401

# Tiles have 32 to 256 filters.
PROBLEMS: dict[str, tuple[Any, ...]] = {
    "many in a tile": ((2, 72, 11, 9), (72, 8, 3, 3), 1, 1, 1, 9),
    "across tiles": ((2, 72, 11, 9), (72, 24, 3, 3), 1, 1, 1, 3),
    "of more filters than channels": ((1, 24, 12, 13), (120, 8, 3, 3), 1, 1, 1, 3),
    "of more channels than filters": ((1, 160, 12, 13), (32, 40, 3, 3), 1, 1, 1, 4),
    "larger than tiles": ((1, 80, 9, 11), (560, 40, 3, 3), 1, 1, 1, 2),
    "with a stride": ((2, 96, 15, 14), (96, 16, 3, 3), 2, 1, 1, 6),
    "1x1": ((2, 96, 9, 7), (144, 32, 1, 1), 1, 0, 1, 3),
    "1x1 with a stride": ((2, 96, 9, 7), (144, 32, 1, 1), 2, 0, 1, 3),
}


@pytest.mark.parametrize("multiprocessors", [1, 1000])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_tiles(problem, multiprocessors, by_layout, generator):  # noqa: F811
    for tile in TILES:
        by_layout(tile, 1, multiprocessors, SHARED)
        call = make_call(generator, tile + len(problem) + multiprocessors, PROBLEMS[problem])
        assert check(call) or call.allow_tf32, tile


@pytest.mark.parametrize("problem", [name for name, p in PROBLEMS.items() if p[2:4] == (1, 1)])
def test_halos(problem, by_layout, generator):  # noqa: F811
    for tile in HALO_TILES:
        by_layout(tile, HALO, 1, SHARED)
        call = make_call(generator, tile + len(problem), PROBLEMS[problem])
        assert check(call) or (tile == 0 and call.allow_tf32), tile


@pytest.mark.parametrize("splits", [2, 4])
def test_splits(splits, by_layout, generator):  # noqa: F811
    tested = []
    for tile in TILES:
        by_layout(tile, splits, 132, SHARED)
        if check(make_call(generator, tile + splits, ((1, 72, 5, 7), (144, 24, 5, 3), 1, 1, 1, 3))):
            tested.append(tile)
    assert len(tested) >= 3, tested


@pytest.mark.parametrize(
    "dtype, channels, filters", [(torch.float16, 4, 8), (torch.float16, 8, 12), (torch.float32, 2, 8)]
)
def test_groups_that_tensor_maps_do_not_take(dtype, channels, filters, by_layout, generator):  # noqa: F811
    """Channels of less than 16 bytes, and filters that are not in eights."""
    by_layout(2, 1, 132, SHARED)
    shapes = (1, 4 * channels, 7, 8), (4 * filters, channels, 3, 3)
    assert make(generator, "cpu", dtype, *shapes, 1, 1, 1, 4, formats="ll", tf32=True).ours() is None


def test_float32_takes_groups_of_four_channels(by_layout, generator):  # noqa: F811
    by_layout(2, 1, 132, SHARED)
    call = make(generator, "cpu", torch.float32, (1, 16, 7, 8), (32, 4, 3, 3), 1, 1, 1, 4, formats="ll", tf32=True)
    assert check(call)


def test_the_choice_of_a_tile(generator):
    """The rule's own layout, of what networks have."""
    for groups, width in ((32, 8), (13, 8), (3, 56)):
        shapes = (2, groups * width, 14, 14), (groups * width, width, 3, 3)
        call = make(generator, "cpu", torch.float16, *shapes, 1, 1, 1, groups, formats="ll")
        y = emulated.conv_scale_shift(call.x, call.w, None, None, 1, 1, 1, groups, algorithm="gemm_sm90")
        expected = torch.nn.functional.conv2d(call.x.double(), call.w.double(), None, 1, 1, 1, groups)
        torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("splits", [HALO, 1, 2])
def test_training(splits, use, generator, monkeypatch):  # noqa: F811
    monkeypatch.setattr(training.train_problems, "adds_in_float32", lambda x: True)
    for problem in ("many in a tile", "across tiles"):
        use(2, splits, 3, SHARED)
        training.check(generator, splits, *PROBLEMS[problem])
