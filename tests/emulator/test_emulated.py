"""The CUDA kernels on the processor: tests of the ops, with every access to memory looked at.

What compute-sanitizer finds on a GPU (accesses out of bounds, races, misused barriers) fails here without one, and more:
asynchronous copies and products that nobody waits for, and results that depend on the order of events. It says nothing
of speed, and nothing of the machine code.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch

import common
import emulated
import fused_conv_bn as fcb
import test_backward
import test_cat_gate
import test_conv
import test_conv_arguments
import test_conv_bn
import test_ops
import test_train
import test_train_conv
import train_problems
import translate
from common import CONV_ALGORITHMS, CONV_STATISTICS, DTYPES, RESIDUALS, long, random_bn
from elementwise_problems import (
    EPS,
    FACTOR,
    LAYOUTS,
    SHAPES,
    allowed,
    arrange,
    epilogue_of,
    errors,
    long_affine,
    long_bn_scale,
    long_of,
)
from fused_conv_bn import reference


def some_of(test: Callable[..., Any], **values: Iterable[Any]) -> Callable[..., Any]:
    """A test of another file, to be run with this file's fixtures, for some values of its parameters."""
    copy = types.FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    copy.__doc__ = test.__doc__
    marks = test.pytestmark  # type: ignore[attr-defined]
    copy.pytestmark = [mark for mark in marks if mark.args[0] not in values]  # type: ignore[attr-defined]
    for name, chosen in values.items():
        copy = pytest.mark.parametrize(name, chosen, ids=str)(copy)
    return copy


# A kernel's bfloat16 differs from its float16 in conversions alone.
FLOAT32_AND_16 = (torch.float32, torch.float16)
ALL_OF_KERNELS = (*FLOAT32_AND_16, torch.bfloat16)

test_random_problems = some_of(test_conv.test_random_problems, dtype=ALL_OF_KERNELS)
test_random_depthwise_problems = some_of(test_conv.test_random_depthwise_problems, dtype=ALL_OF_KERNELS)
test_random_gemm_problems = some_of(test_conv.test_random_gemm_problems, dtype=ALL_OF_KERNELS)
test_images_of_one_pixel = some_of(test_conv.test_images_of_one_pixel, dtype=ALL_OF_KERNELS)
test_rows_of_one_pixel_anywhere_in_memory = some_of(
    test_conv.test_rows_of_one_pixel_anywhere_in_memory, dtype=FLOAT32_AND_16
)
test_one_pixel_that_is_not_finite = some_of(test_conv.test_one_pixel_that_is_not_finite, dtype=FLOAT32_AND_16)
test_problems = some_of(test_conv.test_problems, dtype=FLOAT32_AND_16)
test_filters_of_few_terms = some_of(test_conv.test_filters_of_few_terms, dtype=FLOAT32_AND_16)
test_activations_and_residual = some_of(test_conv.test_activations_and_residual, dtype=FLOAT32_AND_16)
test_missing_scale_or_shift = some_of(test_conv.test_missing_scale_or_shift, dtype=(torch.float32,))
# BatchNorm is folded by every kernel in a way of its own.
test_bn_problems = some_of(
    test_conv_bn.test_bn_problems,
    dtype=FLOAT32_AND_16,
    problem=("problem 73", "stem", "depthwise"),
)
test_bn_parts_that_may_be_missing = some_of(test_conv_bn.test_bn_parts_that_may_be_missing, dtype=FLOAT32_AND_16)
test_bn_tensors_of_either_dtype = test_conv_bn.test_bn_tensors_of_either_dtype
test_bn_tensors_that_are_views = test_conv_bn.test_bn_tensors_that_are_views
test_bn_of_values_that_are_not_finite = test_conv_bn.test_bn_of_values_that_are_not_finite
test_one_huge_value_among_small_ones = some_of(
    test_conv.test_one_huge_value_among_small_ones, dtype=(torch.float32,), outlier=(2.0**30,)
)
test_large_magnitudes_that_cancel = some_of(test_conv.test_large_magnitudes_that_cancel, dtype=FLOAT32_AND_16)
test_scales_of_any_magnitude = some_of(test_conv.test_scales_of_any_magnitude, dtype=(torch.float32,))
test_non_finite_values_are_where_eager_has_them = some_of(
    test_conv.test_non_finite_values_are_where_eager_has_them,
    dtype=FLOAT32_AND_16,
    activation=("none", "relu6", "silu", "gelu", "tanh"),
)
test_non_finite_values_pass_as_in_eager = test_ops.test_non_finite_values_pass_as_in_eager
test_non_finite_parameters = test_conv.test_non_finite_parameters
test_misaligned_addresses = some_of(test_conv_arguments.test_misaligned_addresses, dtype=FLOAT32_AND_16)
test_parameters_and_residual_of_any_strides = test_conv_arguments.test_parameters_and_residual_of_any_strides
test_bn_scale_train = test_train.test_bn_scale_train
test_a_constant_channel = test_train.test_a_constant_channel
test_epilogue = some_of(test_train.test_epilogue, dtype=(torch.float32, torch.bfloat16), residual=("first", "last"))
test_conv_epilogue = some_of(test_train_conv.test_conv_epilogue, dtype=FLOAT32_AND_16)
test_conv_bn_scale_train = some_of(test_train_conv.test_conv_bn_scale_train, dtype=ALL_OF_KERNELS)
test_conv_parts_that_may_be_missing = test_train_conv.test_conv_parts_that_may_be_missing
test_conv_of_values_far_from_zero = test_train_conv.test_conv_of_values_far_from_zero
test_conv_of_values_that_are_not_finite = test_train_conv.test_conv_of_values_that_are_not_finite
test_statistics_from_the_input_are_exact = some_of(
    test_train_conv.test_statistics_from_the_input_are_exact,
    dtype=FLOAT32_AND_16,
    case=[case for case in test_train_conv.PATCH_CASES if math.prod(case[-1]) < 100_000],
)


test_backward_of_activations = some_of(test_backward.test_activations, dtype=FLOAT32_AND_16)
test_backward_of_shapes = test_backward.test_shapes
test_backward_of_misaligned_memory = some_of(test_backward.test_misaligned_memory, dtype=FLOAT32_AND_16, offset=(3,))
test_backward_with_a_mean_far_from_zero = test_backward.test_a_mean_far_from_zero
test_backward_of_values_that_are_not_finite = test_backward.test_values_that_are_not_finite
test_each_gradient_of_backward_alone = test_backward.test_each_gradient_alone


@pytest.fixture
def cat_and_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bn_scale_cat", "gate"):
        monkeypatch.setattr(fcb, name, getattr(emulated, name))


@pytest.mark.usefixtures("cat_and_gate")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cat_and_gate(dtype, generator):
    for layout in ("contiguous", "channels_last"):
        for channels in ((8, 16, 40), (8, 0, 16), (3, 5, 1), (256, 8, 264)):
            test_cat_gate.test_cat("cpu", dtype, layout, channels, generator)
        for shape in (*SHAPES, (5, 24, 9, 7), (6, 520, 3, 3)):
            test_cat_gate.test_gate("cpu", dtype, layout, shape, generator)
    for activation in ("relu6", "silu", "leaky_relu"):
        test_cat_gate.test_activations_of_cat("cpu", dtype, activation, generator)
        for residual in RESIDUALS:
            test_cat_gate.test_epilogue_of_gate("cpu", dtype, residual, activation, generator)
    test_cat_gate.test_gate_of_misaligned_memory("cpu", dtype, generator)
    if dtype in FLOAT32_AND_16:
        test_cat_gate.test_cat_of_mixed_layouts_and_missing_parameters("cpu", generator)


def by_algorithm(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    for name in ("conv_scale_shift", "conv_bn_scale"):
        monkeypatch.setattr(fcb, name, functools.partial(getattr(emulated, name), **options))


@pytest.fixture(params=[name for name in CONV_ALGORITHMS if name != "aten"])
def conv_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As ops/conftest.py's, with the kernels of each algorithm instead of the op."""
    monkeypatch.setattr(common, "forced_algorithm", request.param)
    by_algorithm(monkeypatch, algorithm=request.param)
    return "cpu"


TRAIN_WAYS = [
    *(("stem_sm90", statistics) for statistics in CONV_STATISTICS),
    *((a, "from_output") for a in ("stem_sm80", "depthwise", "gemm_sm90", "gemm_sm80")),
]


@pytest.fixture(params=TRAIN_WAYS, ids="-".join)
def train_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(train_problems, "adds_in_float32", lambda x: True)
    algorithm, statistics = request.param
    function = functools.partial(emulated.conv_bn_scale_train, algorithm=algorithm, statistics=statistics)
    monkeypatch.setattr(fcb, "conv_bn_scale_train", function)
    return "cpu"


@pytest.fixture(params=["cpu"])
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(train_problems, "adds_in_float32", lambda x: True)
    for name in ("scale_shift", "bn_scale_train"):
        monkeypatch.setattr(fcb, name, getattr(emulated, name))
    monkeypatch.setattr(test_backward, "run", emulated.bn_scale_backward)
    function = functools.partial(emulated.conv_bn_scale_train, algorithm="stem_sm90", statistics="from_input")
    monkeypatch.setattr(fcb, "conv_bn_scale_train", function)
    return "cpu"


@pytest.mark.parametrize("capability", [75, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_elementwise(shape, layout, dtype, capability, generator):
    """scale_shift and bn_scale. Each shape in each layout has some of all epilogues in turn, and all of them come up."""
    turn = SHAPES.index(shape) * len(LAYOUTS) + LAYOUTS.index(layout)
    x = arrange(torch.randn(shape, generator=generator).to(dtype), layout)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    names = list(reference.ACTIVATIONS)
    for i in range(5):
        kwargs = epilogue_of(x, names[(5 * turn + i) % len(names)], RESIDUALS[(turn + i) % 3], generator, layout)
        if i < 3:
            _, _, scale, shift = random_bn(shape[1], wide, "cpu", generator)
            pair = (scale, None if turn % 4 == 1 else shift) if i else (None if turn % 4 == 2 else scale, shift)
            ours = emulated.scale_shift(x, *pair, **kwargs, capability=capability)
            eager = reference.scale_shift(x, *pair, **kwargs)
            truth = long_affine(x, *pair)
            sizes = long_affine(x.abs(), *(None if t is None else t.abs() for t in pair))
        else:
            bn = random_bn(shape[1], dtype if i == 3 else wide, "cpu", generator)
            bn = *bn[:2], None if turn % 5 == 1 else bn[2], None if turn % 5 == 2 else bn[3]
            ours = emulated.bn_scale(x, *bn, FACTOR, EPS, **kwargs, capability=capability)
            eager = reference.bn_scale(x, *bn, FACTOR, EPS, **kwargs)
            truth = long_bn_scale(x, bn, FACTOR, EPS)
            mean, var, *others = bn
            absolute = (-mean.abs(), var, *(None if t is None else t.abs() for t in others))
            sizes = long_bn_scale(x.abs(), absolute, FACTOR, EPS)
        truth = long_of(truth, kwargs)
        sizes = sizes if kwargs["residual"] is None else sizes + abs(long(kwargs["residual"]))
        got, eagers_error = errors(truth, ours, eager)
        bound = allowed(eagers_error, ours)
        if ours.numel() < 64:  # the roundings are of terms that may cancel
            norm = np.sqrt((truth**2).sum()) or 1
            bound *= max(1, float(np.sqrt((sizes**2).sum()) / norm))
        assert got <= bound, (i, kwargs["activation"], got, eagers_error)


# What each way takes: statistics, their merge and the convolution; two merges for sums over the input, of pairs of taps and of
# channels; a pass in place behind a convolution, which gathers nothing, or its statistics as well (gemm_sm90).
TRAIN_LAUNCHES = dict(zip(TRAIN_WAYS, (3, 4, 4, 4, 3, 4), strict=True)) | {("pointwise", "from_output"): 4}


@pytest.mark.parametrize("way", TRAIN_LAUNCHES, ids="-".join)
def test_training_launches_its_own_passes_alone(way, generator):
    """Whatever the epilogue is, and whatever is missing."""
    algorithm, statistics = way
    gemm = algorithm.startswith("gemm")
    channels, groups = (12, 12) if algorithm == "depthwise" else (16 if gemm else 4, 1)
    filters = 24 if gemm else 12
    pixels, taps, results = ((1, 1),) * 3 if algorithm == "pointwise" else ((9, 8), (3, 3), (7, 6))
    x = torch.randn(2, channels, *pixels, generator=generator)
    w = torch.randn(filters, channels // groups, *taps, generator=generator)
    if gemm:
        x, w = x.half().to(memory_format=torch.channels_last), w.half()
    bn = random_bn(filters, torch.float32, "cpu", generator)
    for given in (bn, (None,) * 4):
        for activation, residual in (("none", "none"), ("silu", "first"), ("relu", "last")):
            like = torch.randn(2, filters, *results, generator=generator).to(x.dtype)
            kwargs = epilogue_of(like, activation, residual, generator)
            tensors = [None if t is None else t.clone() for t in given]
            emulated.conv_bn_scale_train(
                x, w, None, *tensors, groups=groups, **kwargs, algorithm=algorithm, statistics=statistics
            )
            assert emulated.launches() == TRAIN_LAUNCHES[way]
            emulated.bn_scale_train(torch.randn(2, filters, *results, generator=generator), *tensors)
            assert emulated.launches() == 3


# ---- GPUs other than the H200 ------------------------------------------------------------------------------------------
#
# They have other code where bulk copies are missing (8.6), less shared memory (8.6, 12.0), and no two tiles at a time (12.0).


@pytest.mark.parametrize("algorithm", ["stem_sm80", "depthwise", "gemm_sm80"])
@pytest.mark.parametrize("capability", [86, 120])
@pytest.mark.parametrize("dtype", FLOAT32_AND_16, ids=str)
def test_convolutions_of_other_gpus(capability, algorithm, dtype, generator, monkeypatch):
    monkeypatch.setattr(common, "forced_algorithm", algorithm)
    by_algorithm(monkeypatch, algorithm=algorithm, capability=capability)
    tests = {"stem_sm80": test_conv.test_random_problems, "depthwise": test_conv.test_random_depthwise_problems}
    tests.get(algorithm, test_conv.test_random_gemm_problems)("cpu", dtype, generator)
    for problem in ("problem 73", "depthwise, 5x5, stride 2", "rows of odd lengths, longer than a tile"):
        test_conv.test_problems("cpu", dtype, problem, generator)
        test_conv_bn.test_bn_problems("cpu", dtype, problem, generator)


@pytest.mark.parametrize("capability", [75, 86])
@pytest.mark.parametrize("dtype", ALL_OF_KERNELS, ids=str)
def test_images_of_one_pixel_of_other_gpus(capability, dtype, generator, monkeypatch):
    monkeypatch.setattr(common, "forced_algorithm", "pointwise")
    by_algorithm(monkeypatch, algorithm="pointwise", capability=capability)
    test_conv.test_images_of_one_pixel("cpu", dtype, generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_statistics_of_other_gpus(dtype, generator, monkeypatch):
    monkeypatch.setattr(train_problems, "adds_in_float32", lambda x: True)
    monkeypatch.setattr(fcb, "bn_scale_train", functools.partial(emulated.bn_scale_train, capability=75))
    for shape in train_problems.TRAIN_SHAPES:
        for layout in ("contiguous", "channels_last"):
            test_train.test_bn_scale_train("cpu", dtype, layout, shape, generator)


# ---- the emulator itself ---------------------------------------------------------------------------------------------

BROKEN = {
    "shared_out_of_bounds": "load of 4 bytes at 8192 of shared memory, of which there are 8192 bytes",
    "shared_misaligned": "load at 4 of shared memory, which is no multiple of 16",
    "global_out_of_bounds": "store of 4 bytes of global memory that belong to no operand",
    "vector_out_of_bounds": "load of 16 bytes of global memory that belong to no operand",
    "copy_out_of_bounds": "cp.async of 16 bytes of global memory that belong to no operand",
    "copy_partly_out_of_bounds": "cp.async of 16 bytes of global memory that belong to no operand, or not all of them",
    "copy_of_nothing_out_of_bounds": "cp.async of 16 bytes of global memory that belong to no operand",
    "read_without_barrier": "read of byte .* of shared memory, and nothing orders it behind the write by|"
    "write of byte .* of shared memory, and nothing orders it behind the read by",
    "write_behind_read": "write of byte .*, and nothing orders it behind the read by|"
    "read of byte .*, and nothing orders it behind the write by",
    "pointer_without_barrier": "write of byte .*, and nothing orders it behind the write by",
    "static_without_barrier": "of a __shared__ variable, and nothing orders it behind",
    "shuffle_orders_nothing": "read of byte .*, and nothing orders it behind the write by",
    "copy_not_awaited": "read of byte .*, which a copy under way is to write",
    "copy_of_others": "read of byte .*, and nothing orders it behind the write by|which a copy under way is to write|"
    "write of byte .*, and nothing orders it behind the read by",
    "fetch_not_awaited": "read of byte 0 of shared memory, which a copy under way is to write",
    "bulk_copy_without_fence": "asynchronous read of byte 0 of shared memory, .*without a fence.proxy.async",
    "bulk_copy_overwritten": "write of byte 0 of shared memory, which a copy or product under way is to read",
    "second_bulk_copy_overwritten": "write of byte 2048 of shared memory, which a copy or product under way is to read",
    "bulk_copy_left_alone": "thread 0 has ended while its bulk copies may still read shared memory",
    "product_without_fence": "asynchronous read of byte 0 of shared memory, .*without a fence.proxy.async",
    "product_overwritten": "write of byte .* of shared memory, which a copy or product under way is to read|"
    "asynchronous read of byte .*, which thread|read of byte .*, and nothing orders it",
    "warp_at_two_places": "__s.*, while other lanes of the warp are at __s",
    "barrier_not_initialised": "an mbarrier at 4096 of shared memory that was not initialised",
    "barrier_seen_too_early": "an mbarrier at 4096 of shared memory that was not initialised|nothing orders it behind",
    "too_many_arrivals": "more arrivals at the mbarrier at 4096 of shared memory than the phase has",
    "nobody_waits": "phase 1 has ended, and nobody has waited for the one before",
    "nobody_arrives": "deadlock: 256 threads from 0 on at the mbarrier at 4096, parity 0",
    "previous_not_awaited": "load of global memory that a kernel before may still write to",
    "previous_awaited_by_another": "load of global memory that a kernel before may still write to",
    "barrier_without_some": "deadlock: 224 threads from .* on at bar.sync",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rules_are_found(name):
    for _ in range(5):  # in any order of events
        with pytest.raises(emulated.RuleBroken, match=BROKEN[name]):
            emulated.break_rule(name)


@pytest.mark.parametrize("name", ["through_shared_memory", "by_copies", "first_bulk_copy_overwritten"])
def test_kernels_that_keep_to_the_rules(name):
    for _ in range(20):
        emulated.break_rule(name)


def test_unknown_instructions_do_not_compile():
    """They become calls of functions that do not exist."""
    statement = 'asm volatile("lop3.b32 %0, %1, [%2];" : "=r"(a) : "r"(b), "l"(c + 1) : "memory");'
    translated = translate.translate_assembly(statement)
    assert translated == "do { ::emulated::ptx::lop3_b32((a), (b), (c + 1)); } while (0);"
