"""Training with gemm_sm90, whose kernels gather the statistics of what they write: every tile, and number of splits."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import emulated
import fused_conv_bn as fcb
import train_problems
from test_emulated_gemm_sm90 import HALO, HALO_PROBLEMS, HALO_TILES, PROBLEMS, SHARED, SPLIT_PROBLEMS, SPLITS, TILES

DTYPES = (torch.float16, torch.bfloat16)  # in turns
EPILOGUES = (("none", "relu6"), ("first", "silu"), ("last", "relu"))


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_problems, "adds_in_float32", lambda x: True)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has the ops run by a layout, or by the algorithm's choice."""

    def choose(*numbers: int) -> None:
        options = {"algorithm": "gemm_sm90", "layout": emulated.GemmSm90Layout(*numbers) if numbers else None}
        for name, more in (("conv_scale_shift", {}), ("conv_bn_scale_train", {"statistics": "from_output"})):
            monkeypatch.setattr(fcb, name, functools.partial(getattr(emulated, name), **options, **more))

    return choose


def check(
    generator: torch.Generator,
    turn: int,
    size: Any,
    weight: Any,
    stride: Any = 1,
    pad: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> None:
    """With a dtype, a mean of zero or not, and an epilogue, in turns."""
    residual, activation = EPILOGUES[turn % 3]
    train_problems.check_stored_statistics(
        *(size, weight, stride, pad, dilation, groups),
        **dict(dtype=DTYPES[turn % 2], device="cpu", mean=turn // 2 % 2 * 50, generator=generator),
        **dict(activation=activation, residual=residual),
    )


@pytest.mark.parametrize("multiprocessors", [1, 1000])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_training_by_tiles(problem, multiprocessors, use, generator):
    """What a block gathers of all of its tiles, or of one, or one of its consumers of none."""
    for tile in TILES:
        use(tile, 1, multiprocessors, SHARED)
        check(generator, tile + len(problem) + multiprocessors, *PROBLEMS[problem])


@pytest.mark.parametrize("multiprocessors", [1, 1000])
@pytest.mark.parametrize("problem", HALO_PROBLEMS)
def test_training_by_halos(problem, multiprocessors, use, generator):
    """Padding that lies between pixels does not count."""
    for tile in HALO_TILES:
        use(tile, HALO, multiprocessors, SHARED)
        check(generator, tile + len(problem) + multiprocessors, *HALO_PROBLEMS[problem])


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("problem", SPLIT_PROBLEMS)
def test_training_by_splits(problem, splits, use, generator):
    tested = []
    for tile in TILES:
        use(tile, splits, 132, SHARED)
        try:
            check(generator, tile + splits // 2 + len(problem), *SPLIT_PROBLEMS[problem])
        except pytest.skip.Exception:  # it has no kernel for clusters
            continue
        tested.append(tile)
    assert len(tested) >= 3, tested


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0, 50])
def test_training_of_few_pixels(mean, dtype, use, generator):
    """Of a tile, and of a warp's."""
    use()
    for case in ("2 pixels", "2 pixels of each image", "few pixels, many channels"):
        train_problems.check_stored_statistics(
            *train_problems.STORED_CASES[case], dtype=dtype, device="cpu", mean=mean, generator=generator
        )
