"""The pooling kernels on the processor: the tests of the ops, with every access to memory looked at."""

from __future__ import annotations

import functools

import pytest
import torch

import emulated
import emulated_pooling
import fused_conv_bn as fcb
import test_pooling
import test_pooling_train
import test_squeeze
from common import DTYPES
from elementwise_problems import arrange


@pytest.fixture(autouse=True)
def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("max_pool2d", "spatial_mean", "squeeze_excite"):
        monkeypatch.setattr(fcb, name, getattr(emulated_pooling, name))
    for name in ("train", "backward"):
        monkeypatch.setattr(test_pooling_train, name, getattr(emulated_pooling, f"max_pool2d_{name}"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max(dtype, generator):
    for layout in ("contiguous", "channels_last", "sliced"):
        for window in test_pooling.WINDOWS:
            test_pooling.test_max("cpu", dtype, layout, window, generator)
        if layout != "sliced":
            test_pooling.test_max_of_values_that_are_not_finite("cpu", dtype, layout, generator)
    test_pooling.test_max_of_random_windows("cpu", dtype, generator)
    test_pooling.test_misaligned_memory("cpu", dtype, generator)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "window", [dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=2, ceil_mode=True)], ids=str
)
def test_threads_of_several_outputs(layout, window, generator):
    """With three multiprocessors 6144 threads are many."""
    shape = (2, 80, 51, 67) if layout == "channels_last" else (11, 3, 61, 67)
    x = arrange(torch.randn(shape, generator=generator).half(), layout)
    test_pooling.check_max(x, window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_train(dtype, generator):
    for layout in ("contiguous", "channels_last", "sliced"):
        for window in test_pooling.WINDOWS:
            test_pooling_train.test_values("cpu", dtype, layout, window, generator)
        if layout != "sliced":
            test_pooling_train.test_values_that_are_not_finite("cpu", dtype, layout, generator)
    test_pooling_train.test_random_windows("cpu", dtype, generator)
    test_pooling_train.test_misaligned_memory("cpu", dtype, generator)


def test_gradients_that_are_not_finite(generator):
    for layout in ("contiguous", "channels_last"):
        test_pooling_train.test_gradients_that_are_not_finite("cpu", layout, generator)
    test_pooling_train.test_largest_window("cpu", generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mean(dtype, layout, generator):
    test_pooling.test_mean("cpu", dtype, layout, generator)


def test_mean_of_values_that_are_not_finite(generator):
    for layout in ("contiguous", "channels_last"):
        test_pooling.test_mean_of_values_that_are_not_finite("cpu", layout, generator)


@pytest.mark.parametrize("capability", [75, 86, 120])
def test_other_gpus(capability, generator):
    """Those have no clusters, and the oldest no maxima of pairs."""
    for dtype in (torch.float16, torch.bfloat16):
        x = arrange(torch.randn(1, 16, 60, 50, generator=generator).to(dtype), "channels_last")
        x[0, 3, 7, 7] = torch.nan
        ours = emulated_pooling.max_pool2d(x, 3, 2, 1, capability=capability)
        assert test_pooling.same(ours, torch.nn.functional.max_pool2d(x, 3, 2, 1))
        with pytest.MonkeyPatch.context() as patch:
            for name in ("train", "backward"):
                of_gpu = functools.partial(getattr(emulated_pooling, f"max_pool2d_{name}"), capability=capability)
                patch.setattr(test_pooling_train, name, of_gpu)
            test_pooling_train.check(x, dict(kernel_size=3, stride=2, padding=1), generator)
        mean = emulated_pooling.spatial_mean(x, capability=capability)
        assert torch.equal(mean.isnan(), x.mean((2, 3)).isnan())
        assert emulated.launches(capability) == 1


def test_one_order_of_sums(generator):
    """Whatever order the blocks and threads run in."""
    x = arrange(torch.randn(1, 16, 90, 70, generator=generator).half(), "channels_last")
    found = [emulated_pooling.spatial_mean(x) for _ in range(4)]
    assert emulated.launches() == 1
    assert all(torch.equal(found[0], again) for again in found)


# ---- squeeze-and-excite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", test_squeeze.PROBLEMS)
def test_squeezes(name, dtype, generator):
    for layout in ("contiguous", "channels_last"):
        test_squeeze.test_values(name, layout, dtype, "cpu", generator)


def test_random_squeezes(generator):
    test_squeeze.test_random_problems("cpu", generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_squeezes(dtype, generator):
    for layout in ("contiguous", "channels_last"):
        test_squeeze.test_without_biases(layout, dtype, "cpu", generator)
    test_squeeze.test_misaligned_memory(dtype, "cpu", generator)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_activations_of_squeezes(dtype, generator):
    for activation in fcb.reference.ACTIVATIONS:
        test_squeeze.test_activations(activation, dtype, "cpu", generator)


@pytest.mark.parametrize("hidden", [1, 7, 20, 48, 128])
def test_hidden_channels(hidden, generator):
    test_squeeze.test_hidden_channels(hidden, "channels_last", "cpu", generator)


def test_squeezes_of_values_that_are_not_finite(generator):
    test_squeeze.test_values_that_are_not_finite("cpu", generator)


def test_what_no_block_has_memory_for(generator):
    arguments = test_squeeze.tensors(test_squeeze.LARGE, torch.float16, "cpu", "channels_last", generator)
    with pytest.raises(RuntimeError, match="does not cover"):
        emulated_pooling.squeeze_excite(*arguments)


def test_one_order_of_sums_in_squeezes(generator):
    """Of the cluster's blocks as well, in one launch."""
    arguments = test_squeeze.tensors(test_squeeze.PROBLEMS["both"], torch.float16, "cpu", "channels_last", generator)
    found = [emulated_pooling.squeeze_excite(*arguments) for _ in range(4)]
    assert emulated.launches() == 1
    assert all(torch.equal(found[0], again) for again in found)


@pytest.mark.parametrize("capability", [75, 86, 120])
def test_squeezes_of_other_gpus(capability, generator):
    """Without clusters a kernel takes the means first."""
    for name in ("both", "odd channels", "one pixel"):
        for dtype in (torch.float16, torch.float32):
            arguments = test_squeeze.tensors(test_squeeze.PROBLEMS[name], dtype, "cpu", "channels_last", generator)
            ours = emulated_pooling.squeeze_excite(*arguments, capability=capability)
            assert emulated.launches(capability) == (1 if name == "one pixel" else 2)
            torch.testing.assert_close(ours, fcb.reference.squeeze_excite(*arguments), rtol=2e-3, atol=2e-3)
