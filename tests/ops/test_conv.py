"""conv_scale_shift against float64 and eager PyTorch: numbers of any magnitude, and values that are not finite."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

import common
from common import RESIDUALS
from conv_problems import PROBLEMS, activations, check, dtypes, is_covered, make
from fused_conv_bn import reference


@dtypes
def test_random_problems(conv_device, dtype, generator):
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    covered = 0
    names = list(reference.ACTIVATIONS)
    for _ in range(80):
        groups = (1, 1, 1, draw(2, 5), 0)[draw(0, 5)]
        channels = draw(1, 41)
        groups = channels if groups == 0 else groups
        channels = -(-channels // groups) * groups
        outputs = groups * draw(1, 4) if groups > 1 else draw(1, 41)
        kernel = draw(1, 8), draw(1, 8)
        stride, dilation, padding = ((draw(1, n), draw(1, n)) for n in (4, 3, 4))
        padding = padding[0] - 1, padding[1] - 1
        if conv_device == "cpu" and dtype == torch.bfloat16:
            stride = stride[0], 1  # oneDNN 3.12 reads narrow images wrongly here with AMX, eager's convolution too
        least = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        space = [draw(max(1, n), max(1, n) + 20) for n in least]
        covered += check(
            make(
                *(
                    generator,
                    conv_device,
                    dtype,
                    (draw(0, 4), channels, *space),
                    (outputs, channels // groups, *kernel),
                ),
                *(stride, padding, dilation, groups),
                formats=("cc", "cl", "lc", "ll")[draw(0, 4)],
                residual=RESIDUALS[draw(0, 3)],
                activation=names[draw(0, len(names))],
                bn=bool(draw(0, 2)),
            )
        )
    assert covered or not is_covered(dtype, depthwise=False)


@dtypes
def test_random_depthwise_problems(conv_device, dtype, generator):
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    covered = 0
    names = list(reference.ACTIVATIONS)
    for _ in range(16):
        kernel, stride, padding = (3, 5)[draw(0, 2)], draw(1, 3), (draw(0, 4), draw(0, 4))
        channels = 8 * draw(1, 14) if draw(0, 4) else draw(1, 50)
        space = [draw(max(1, kernel - 2 * p), 33) for p in padding]
        covered += check(
            make(
                *(generator, conv_device, dtype, (draw(1, 4), channels, *space), (channels, 1, kernel, kernel)),
                *(stride, padding, 1, channels),
                formats=("cc", "cl", "lc", "ll")[draw(0, 4)],
                residual=RESIDUALS[draw(0, 3)],
                activation=names[draw(0, len(names))],
                bn=bool(draw(0, 2)),
            )
        )
    if common.forced_algorithm == "depthwise":  # the others have few of these in their domains, or none
        assert covered or not is_covered(dtype, depthwise=True)


@dtypes
def test_random_gemm_problems(conv_device, dtype, generator):
    """Channels in vectors, grouped too, in any window; filters of any number."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    covered = 0
    names = list(reference.ACTIVATIONS)
    for i in range(16):
        groups, kernel = draw(1, 4) if draw(0, 3) == 0 else 1, (draw(1, 4), draw(1, 6))
        stride, padding, dilation = ((draw(1, 3), draw(1, 3)) for _ in range(3))
        padding = padding if draw(0, 2) else (0, 0)
        channels = 8 * (draw(1, 18) if i % 2 else draw(1, 4))
        filters = (8 * draw(1, 20) if draw(0, 3) else draw(1, 70)) * groups
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        space = [
            draw(max(1, r - 2 * p), 20) if max(1, r - 2 * p) < 20 else r for r, p in zip(reach, padding, strict=True)
        ]
        covered += check(
            make(
                *(generator, conv_device, dtype, (draw(1, 4), channels * groups, *space), (filters, channels, *kernel)),
                *(stride, padding, dilation, groups),
                formats=("cc", "cl", "lc", "ll")[max(1, draw(0, 4))],
                residual=RESIDUALS[draw(0, 3)],
                activation=names[draw(0, len(names))],
                bn=bool(draw(0, 2)),
            )
        )
    least = {"gemm_sm80": 12, "gemm_sm90": 5}  # gemm_sm90 takes filters in vectors alone
    assert covered >= least.get(common.forced_algorithm, 0) or dtype.itemsize > 2


ONE_PIXEL = (
    *((1, 1), (3, 5), (4, 96), (8, 33), (16, 8), (28, 50), (48, 70)),
    *((96, 4), (102, 31), (144, 6), (480, 20), (1153, 3), (1290, 7)),
)
"""Channels and filters: fewer than a load has, as many as lanes share, odd ones, and more than are loaded at once."""


@dtypes
def test_images_of_one_pixel(conv_device, dtype, generator):
    """As squeeze-and-excite blocks and classifiers have them. Strides and dilations make no difference."""
    names, covered, calls = list(reference.ACTIVATIONS), 0, 0
    for channels, filters in ONE_PIXEL:
        for images in (1, 2, 5, 70):
            covered += check(
                make(
                    *(generator, conv_device, dtype, (images, channels, 1, 1), (filters, channels, 1, 1)),
                    *(1 + calls % 2, 0, 1 + calls % 3),
                    formats=("cc", "cl", "lc", "ll")[calls % 4],
                    residual=RESIDUALS[calls % 3],
                    activation=names[calls % len(names)],
                    bn=calls // 2 % 2 == 1,
                )
            )
            calls += 1
    assert covered == calls or common.forced_algorithm != "pointwise" or dtype == torch.float64


@dtypes
def test_rows_of_one_pixel_anywhere_in_memory(conv_device, dtype, generator):
    """Off the 16-byte boundary, and weights whose channels or filters lie elsewhere than one behind the other."""
    for channels, filters in ((8, 16), (28, 9), (96, 12)):
        call = make(
            *(generator, conv_device, dtype, (7, channels, 1, 1), (filters, channels, 1, 1)),
            residual=True,
            activation="silu",
        )
        expected = check(call)
        for offsets in ((1, 0, 0), (0, 2, 0), (4, 4, 3), (2, 8, 1)):
            moved = [
                torch.empty(t.numel() + 16, device=conv_device, dtype=dtype)[offset : offset + t.numel()]
                .view(t.shape)
                .copy_(t)
                for t, offset in zip((call.x, call.w, call.residual), offsets, strict=True)
            ]
            assert check(replace(call, x=moved[0], w=moved[1], residual=moved[2])) == expected
        for w in (call.w.transpose(0, 1).contiguous().transpose(0, 1), call.w[:1].expand(call.w.shape)):
            assert check(replace(call, w=w)) == expected


@dtypes
def test_one_pixel_that_is_not_finite(conv_device, dtype, generator):
    """It spoils its own image, and none of its neighbours."""
    for channels, filters in ((28, 9), (96, 24)):
        call = make(generator, conv_device, dtype, (9, channels, 1, 1), (filters, channels, 1, 1))
        for image, value in ((0, math.nan), (4, math.inf), (8, -math.inf)):
            call.x[image, -1] = value
        ours = call.ours()
        if ours is not None:
            torch.testing.assert_close(ours.isnan(), call.eager().isnan())
            torch.testing.assert_close(ours.isinf(), call.eager().isinf())
            assert ours[1:4].isfinite().all() and ours[5:8].isfinite().all()


@dtypes
def test_filters_of_few_terms(conv_device, dtype, generator):
    """Where each product's own error shows: that of an element is the largest of many."""
    for channels, kernel in itertools.product((1, 2, 3, 5), ((1, 1), (2, 1), (1, 3), (2, 2), (3, 3))):
        for formats in ("cc", "ll"):
            check(make(generator, conv_device, dtype, (2, channels, 30, 30), (32, channels, *kernel), formats=formats))


@activations
@dtypes
def test_activations_and_residual(conv_device, dtype, activation, generator):
    covered = 0
    for formats, residual in itertools.product(("cc", "ll"), RESIDUALS):
        few, depthwise = ((2, 5, 13, 11), (9, 5, 3, 3), 1), ((2, 16, 9, 14), (16, 1, 3, 3), 16)
        for x, w, groups in (few, depthwise, ((2, 24, 9, 14), (40, 24, 3, 3), 1)):
            covered += check(
                make(
                    *(generator, conv_device, dtype, x, w, 1, 1, 1, groups),
                    formats=formats,
                    residual=residual,
                    activation=activation,
                )
            )
    assert covered or not is_covered(dtype, depthwise=True)


@dtypes
def test_missing_scale_or_shift(conv_device, dtype, generator):
    """They count as 1 and 0."""
    for scale, shift, residual in itertools.product((False, True), (False, True), RESIDUALS):
        few, depthwise = ((2, 5, 13, 11), (9, 5, 3, 3), 1), ((2, 16, 9, 14), (16, 1, 3, 3), 16)
        for x, w, groups in (few, depthwise, ((2, 24, 9, 14), (40, 24, 3, 3), 1)):
            call = make(generator, conv_device, dtype, x, w, 1, 1, 1, groups, residual=residual, activation="relu6")
            call.scale, call.shift = call.scale if scale else None, call.shift if shift else None
            check(call)
    call.residual, call.activation = None, "none"  # nothing but the convolution is left
    if call.ours() is not None:
        call.scale = call.shift = None
        assert check(call)


@pytest.mark.parametrize("problem", PROBLEMS)
@dtypes
def test_problems(conv_device, dtype, problem, generator):
    for formats in ("cc", "ll", "cl"):
        check(
            make(generator, conv_device, dtype, *PROBLEMS[problem], formats=formats, residual=True, activation="relu")
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_more_tiles_than_multiprocessors(conv_device, dtype, generator):
    """A block has several, through buffers that it uses again and again."""
    batch = 2 if conv_device == "cpu" else 24
    for x, w in (((8, 130, 48), (64, 8, 3, 3)), ((3, 66, 50), (48, 3, 5, 5))):
        for formats in ("cc", "ll"):
            call = make(generator, conv_device, dtype, (batch, *x), w, formats=formats)
            assert check(call) or not is_covered(dtype, depthwise=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_depthwise_rows_of_many_images(conv_device, dtype, generator):
    """A block's range of rows begins and ends anywhere in an image, and goes on into the next ones."""
    batch = 2 if conv_device == "cpu" else 3001
    for kernel, stride in ((3, 1), (5, 2)):
        call = make(
            *(generator, conv_device, dtype, (batch, 64, 3, 1), (64, 1, kernel, kernel), stride, kernel // 2, 1, 64),
            formats="ll",
        )
        assert check(call) or common.forced_algorithm != "depthwise"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outlier", [2.0**30, -(2.0**40)])
@pytest.mark.parametrize("where", ["x", "w"])
def test_one_huge_value_among_small_ones(conv_device, where, outlier, dtype, generator):
    for problem in ("problem 73", "depthwise", "stem"):
        for formats in ("cc", "ll"):
            call = make(generator, conv_device, dtype, *PROBLEMS[problem], formats=formats)
            if where == "x":
                call.x[0, 1, 5, 7] = outlier
            else:
                call.w[3, 0, 1, 1] = outlier
            check(call)


def test_many_tiles_of_whole_rows(conv_device, generator):
    """So many that a block of the stem_sm80 kernel has two tiles at a time: ragged ones too, and some that do not split."""
    call = make(
        *(generator, conv_device, torch.float32, (3, 5, 700, 64), (33, 5, 3, 3), 1, 1), residual=True, activation="relu"
    )
    check(call)
    call.x[0, 1, 5, 7] = 2.0**30
    call.x[1, 4, 340:480] *= 2.0**-40
    call.x[2, :, -1] *= 2.0**-40
    check(call)
    moved = torch.empty(call.x.numel() + 1, device=conv_device)[1:].view(call.x.shape).copy_(call.x)
    check(replace(call, x=moved))


@dtypes
def test_large_magnitudes_that_cancel(conv_device, dtype, generator):
    """Sums of terms a thousand times as large as what is left of them."""
    for problem in ("problem 73", "depthwise", "1x1"):
        for formats in ("cc", "ll"):
            call = make(generator, conv_device, dtype, *PROBLEMS[problem], formats=formats)
            call.x.add_(1000)
            call.w.sub_(call.w.mean((1, 2, 3), keepdim=True))
            check(call)


@dtypes
def test_large_shifts(conv_device, dtype, generator):
    """A shift far beyond the sum that it is added to. Sums that begin with it would round each partial sum to its size."""
    for problem in ("problem 73", "depthwise", "stem", "1x1"):
        for formats in ("cc", "ll"):
            call = make(generator, conv_device, dtype, *PROBLEMS[problem], formats=formats)
            call.shift.mul_(100)
            check(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scales_of_any_magnitude(conv_device, dtype, generator):
    """Also those that would take weights out of the range of their type, if they were folded into them."""
    for least, most in ((-44, -30), (-8, 8), (25, 30)):
        call = make(generator, conv_device, dtype, (2, 4, 9, 8), (16, 4, 3, 3), formats="ll")
        call.x.mul_(2.0 ** round(-1.66 * (least + most)))
        call.scale.copy_(10.0 ** torch.linspace(least, most, 16, dtype=torch.float64))
        assert call.scale.all() and call.eager().isfinite().all()
        assert check(call) or not is_covered(dtype, depthwise=False)


SPECIAL = (math.nan, math.inf, -math.inf, 0.0)


@pytest.mark.usefixtures("gelu_of_infinity")
@activations
@dtypes
def test_non_finite_values_are_where_eager_has_them(conv_device, dtype, activation, generator):
    covered = 0
    for problem, formats in itertools.product(("problem 73", "depthwise", "stem", "1x1"), ("cc", "ll")):
        call = make(generator, conv_device, dtype, *PROBLEMS[problem], formats=formats, activation=activation)
        for i, value in enumerate(SPECIAL):
            call.x[0, i % call.x.size(1), 2 * i : 2 * i + 2, 2 * i] = value
        call.scale[0], call.shift[1] = 0, math.inf
        ours, eager = call.ours(), call.eager()
        if ours is not None:
            covered += 1
            # cuDNN's Winograd kernels spread what is not finite to outputs that do not depend on it.
            exact = call.to("cpu", torch.float64).eager().to(ours)
            for pattern in (torch.isnan, torch.isposinf, torch.isneginf):
                found = pattern(ours)
                assert torch.equal(found, pattern(eager)) or torch.equal(found, pattern(exact)), (
                    problem,
                    formats,
                    pattern,
                )
    assert covered or not is_covered(dtype, depthwise=True)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["scale", "shift", "w"])
def test_non_finite_parameters(conv_device, where, value, generator):
    call = make(generator, conv_device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3))
    getattr(call, where)[2] = value
    ours, eager = call.ours(), call.eager()
    if ours is not None:
        torch.testing.assert_close(ours, eager, equal_nan=True, rtol=1e-4, atol=1e-4)
