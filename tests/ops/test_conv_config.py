"""What conv_scale_shift chooses to run on CUDA, over thousands of problems, without a GPU.

DOMAINS says what each algorithm can compute, in words of its own: neither the choice by rule nor a forced one may leave
that.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import pytest
import torch

import fused_conv_bn  # noqa: F401  # registers the ops
from common import CONV_ALGORITHMS, CONV_STATISTICS

explain_problem = torch.ops.fused_conv_bn._explain_problem


@dataclass(frozen=True)
class Problem:
    """kernels/conv/problem.h's Conv2d, in its order."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    P: int
    Q: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    groups: int
    element_bytes: int
    channels_last: bool
    has_residual: bool
    allow_tf32: bool


@dataclass(frozen=True)
class Gpu:
    """kernels/conv/problem.h's GpuTraits, in its order."""

    compute_capability: int
    multiprocessors: int
    shared_memory_per_block: int
    shared_memory_per_multiprocessor: int
    has_wgmma: bool


GPUS = (
    Gpu(75, 40, 65536, 65536, False),
    Gpu(80, 108, 166912, 167936, False),
    Gpu(86, 84, 101376, 102400, False),
    Gpu(89, 142, 101376, 102400, False),
    Gpu(90, 132, 232448, 233472, True),
    Gpu(90, 132, 232448, 233472, False),  # compiled for other GPUs
    Gpu(100, 148, 232448, 233472, False),
    Gpu(120, 188, 101376, 102400, False),
)


def stem_sm90_units(p: Problem) -> int:
    """Groups of eight that a filter's weights go into: eight channels of a tap, or of few channels several taps of a row."""
    taps = next((8 // slots for slots in (1, 2, 4) if p.C <= slots), 1)
    return p.R * -(-p.S // taps) * -(-p.C // 8)


def gemm_sm90_window_fits(stride: int, pad: int, reach: int) -> bool:
    """The window in one direction: a tensor map has its corners in -128 to 127, and a tap's distance in 8 bits."""
    return stride <= 8 and pad <= 128 and -128 <= pad - reach <= 127 and reach <= 255


DOMAINS: dict[str, Callable[[Problem, Gpu], bool]] = {
    "pointwise": lambda p, gpu: (
        p.H == p.W == p.P == p.Q == p.R == p.S == p.groups == 1
        and p.pad_h == p.pad_w == 0
        and p.element_bytes <= 4
        and 1 <= p.N
        and max(p.N * p.C, p.N * p.K, p.C * p.K) <= 1 << 30
    ),
    "gemm_sm90": lambda p, gpu: (
        gpu.has_wgmma
        and p.channels_last
        and (p.element_bytes == 2 or (p.element_bytes == 4 and p.allow_tf32))
        and (p.groups == 1 or p.C // p.groups * p.element_bytes % 16 == p.K // p.groups % 8 == 0)
        and p.C * p.element_bytes % 16 == p.K * p.element_bytes % 16 == 0
        and gemm_sm90_window_fits(p.stride_h, p.pad_h, p.dilation_h * (p.R - 1))
        and gemm_sm90_window_fits(p.stride_w, p.pad_w, p.dilation_w * (p.S - 1))
        and max(p.N * p.P * p.Q, p.N * p.H * p.W, p.C * p.R * p.S, p.K) <= 1 << 30
    ),
    "stem_sm90": lambda p, gpu: (
        gpu.has_wgmma
        and p.groups == 1
        and p.C <= 64
        and p.R * p.S <= 256
        and stem_sm90_units(p) <= 128
        and (p.element_bytes == 2 or p.element_bytes == 4 and 8 <= p.C * p.R * p.S <= 256)
        and max(p.C * p.H * p.W, p.K * p.P * p.Q, p.N * p.P * p.Q) <= 1 << 30
        and max(p.H, p.W, p.K) <= 1 << 20
    ),
    "stem_sm80": lambda p, gpu: (
        gpu.compute_capability >= 80
        and p.groups == 1
        and p.C <= 64
        and p.R * p.S <= 256
        and (p.element_bytes == 2 or p.element_bytes == 4 and 8 <= p.C * p.R * p.S <= 512)
        and max(p.C * p.H * p.W, p.K * p.P * p.Q, p.N * p.P * p.Q) <= 1 << 30
        and max(p.H, p.W, p.K) <= 1 << 20
    ),
    "depthwise": lambda p, gpu: (
        gpu.compute_capability >= 80
        and p.element_bytes <= 4
        and p.groups == p.C == p.K
        and (p.R, p.S) in ((3, 3), (5, 5))
        and p.stride_h == p.stride_w in (1, 2)
        and p.dilation_h == p.dilation_w == 1
        and (not p.channels_last or p.C * p.element_bytes % 16 == 0)
    ),
    "gemm_sm80": lambda p, gpu: (
        gpu.compute_capability >= 80
        and p.channels_last
        and p.element_bytes == 2
        and p.C // p.groups % 8 == 0
        and max(p.N * p.P * p.Q, p.N * p.H * p.W * p.C, p.K * p.C // p.groups * p.R * p.S) <= 1 << 30
        and max(p.H, p.W, p.pad_h, p.pad_w, p.dilation_h * (p.R - 1), p.dilation_w * (p.S - 1)) <= 1 << 13
    ),
    "aten": lambda p, gpu: True,
}


def from_input_fits(p: Problem, gpu: Gpu) -> bool:
    """Whether a batch's statistics can come from sums over the input: before the stem_sm90 kernel."""
    return (
        DOMAINS["stem_sm90"](p, gpu)
        and p.C <= 8
        and max(p.R, p.S) <= 3
        and p.stride_h == p.stride_w == p.dilation_h == p.dilation_w == 1
        and min(p.P, p.Q) >= 2
    )


def fits(p: Problem, gpu: Gpu) -> bool:
    """Whether the stem_sm80 kernel's weights and an input patch surely fit into shared memory."""
    channels = -(-p.C // 4) * 4
    weights = (p.R * p.S * channels + 16) * (64 if p.K > 32 else 32)
    rows, cols = (
        7 * stride + (taps - 1) * dilation + 1
        for stride, taps, dilation in ((p.stride_h, p.R, p.dilation_h), (p.stride_w, p.S, p.dilation_w))
    )
    return 4 * weights + 6 * rows * cols * (channels + 16) + 70000 < gpu.shared_memory_per_block


def stem_sm90_fits(p: Problem) -> bool:
    """Whether two input windows of the stem_sm90 kernel's smallest tile, and all else, surely fit into shared memory."""
    cols = 40 if p.Q <= 512 else 520
    pitch = cols + (p.S - 1) * p.dilation_w + 2
    rows = (p.R - 1) * p.dilation_h + 1
    patch = p.stride_h * p.stride_w * -(-p.C // 8) * rows * pitch
    copies = 2 if p.element_bytes == 4 else 1
    stages = 2 * copies * 16 * (patch + pitch + 128)
    output = 0 if p.channels_last else 2 * 64 * p.element_bytes * (cols + 80)
    weights = copies * 1024 * (stem_sm90_units(p) + 1)
    row = min(p.W, cols * p.stride_w + (p.S - 1) * p.dilation_w + 1) * p.C * p.element_bytes
    rows_as_they_are = 2 * (rows * (row + 32 * p.C) + 128)
    table = 8 * (patch + 1024)
    staged = 65536 if p.channels_last else 0
    total = 2048 + 8 * (pitch + 128) + weights + stages + output + rows_as_they_are + table + staged
    return patch <= 8192 and pitch <= 1024 and rows <= 1024 and p.W < 1 << 16 and total <= 232448


def random_problem(rng: random.Random) -> Problem:
    """Stems, depthwise and dense layers, and now and then an extent far beyond the usual."""
    while True:
        kind = rng.choice(("few", "depthwise", "dense", "grouped"))
        channels = rng.randint(1, 40) if kind == "few" else rng.choice((1, 3, 16, 64, 96, 144, 512, 2048))
        groups = {"depthwise": channels, "grouped": rng.choice((1, 2, 4, 8, 32))}.get(kind, 1)
        channels = -(-channels // groups) * groups
        outputs = groups * rng.choice((1, 1, 2, rng.randint(1, 80)))
        height, width = (rng.choice((1, 7, 14, 28, 56, 112, 224, rng.randint(1, 300))) for _ in range(2))
        if rng.random() < 0.05:
            width = rng.choice((1 << 16, (1 << 20) + 1, (1 << 31) + 5))
        r, s = rng.choice(((1, 1), (3, 3), (5, 5), (7, 7), (rng.randint(1, 11), rng.randint(1, 11))))
        stride, dilation = ((rng.choice((1, 1, 1, 2, 3)), rng.choice((1, 1, 1, 2, 3))) for _ in range(2))
        pad = rng.choice(((0, 0), (r // 2, s // 2), (rng.randint(0, 9), rng.randint(0, 9))))
        p = (height + 2 * pad[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
        q = (width + 2 * pad[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
        if p > 0 and q > 0:
            return Problem(
                rng.choice((1, 1, 2, 32, 128, 1 << 16)),
                *(channels, height, width, outputs, r, s, p, q, *stride, *pad, *dilation, groups),
                rng.choice((2, 4, 8)),
                *(rng.random() < 0.5 for _ in range(3)),
            )


def configuration(problem: Problem, gpu: Gpu, algorithm: str = "", statistics: str = "none") -> str:
    return explain_problem([int(value) for value in astuple(problem)], list(astuple(gpu)), algorithm, statistics)


def test_every_algorithm_has_a_domain() -> None:
    with pytest.raises(RuntimeError, match="_explain_problem: algorithm is 'no such'") as caught:
        configuration(random_problem(random.Random(0)), GPUS[0], "no such")
    known = re.findall(r"'(\w+)'", str(caught.value).partition("expected")[2])
    assert known == list(DOMAINS) == list(CONV_ALGORITHMS)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"sm_{gpu.compute_capability}")
def test_choices_stay_inside_the_domains(gpu: Gpu) -> None:
    rng = random.Random(gpu.compute_capability)
    for _ in range(2000):
        problem = random_problem(rng)
        chosen = configuration(problem, gpu)
        assert DOMAINS[chosen.split()[0]](problem, gpu), (chosen, problem)
        assert configuration(problem, gpu) == chosen


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"sm_{gpu.compute_capability}")
def test_the_rule_stays_where_it_was_measured(gpu: Gpu) -> None:
    """Dense convolutions of more than 16 input channels are pointwise's, in evaluation, or gemm_sm90's where these cover them,
    or PyTorch's."""
    rng = random.Random(gpu.multiprocessors)
    problems = [p for p in (random_problem(rng) for _ in range(2000)) if p.C > 16 and p.groups == 1]
    assert len(problems) > 100
    for problem in problems:
        allowed = [name for name in ("pointwise", "gemm_sm90") if DOMAINS[name](problem, gpu)]
        assert configuration(problem, gpu).split()[0] in (*allowed, "aten"), problem
        in_training = configuration(problem, gpu, statistics="from_output").split()[0]
        assert in_training in (("gemm_sm90", "aten") if "gemm_sm90" in allowed else ("aten",)), problem


def one_pixel(images: int, channels: int, filters: int, element_bytes: int = 2) -> Problem:
    return Problem(images, channels, 1, 1, filters, *(1,) * 6, 0, 0, 1, 1, 1, element_bytes, True, False, False)


@pytest.mark.parametrize(
    ("images", "channels", "filters", "expected"),
    [
        (64, 8, 32, "pointwise 1 channel by 1 image"),
        (64, 48, 1152, "pointwise 2 channels by 4 images"),
        (64, 1152, 48, "pointwise 2 channels by 4 images"),
        (64, 240, 10, "pointwise 1 channel by 1 image"),
        (1, 1152, 48, "pointwise 1 channel by 1 image"),
        (64, 960, 240, "pointwise 2 channels by 4 images"),
        (256, 960, 240, "gemm_sm90 64 channels by 64 pixels"),
        (257, 100, 10, "aten"),
        (64, 1280, 1001, "aten"),
    ],
)
def test_images_of_one_pixel(images: int, channels: int, filters: int, expected: str) -> None:
    """Those of squeeze-and-excite blocks on an H200, in 16 bits: in evaluation, and as long as there is little to do."""
    problem = one_pixel(images, channels, filters)
    assert configuration(problem, GPUS[4]).startswith(expected)
    assert not configuration(problem, GPUS[4], statistics="from_output").startswith("pointwise")


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"sm_{gpu.compute_capability}")
def test_one_pixel_on_every_gpu(gpu: Gpu) -> None:
    """Any numbers up to those of 32 bits; by rule from compute capability 8.0 on."""
    for images, channels, filters in ((1, 1, 1), (1, 1 << 15, 1 << 15), (1 << 30, 1, 1), (3, 1 << 20, 77)):
        for element_bytes in (2, 4):
            problem = one_pixel(images, channels, filters, element_bytes)
            assert configuration(problem, gpu, "pointwise").startswith("pointwise")
    small = one_pixel(8, 40, 10, 4)
    assert configuration(small, gpu).startswith("pointwise") == (gpu.compute_capability >= 80)
    for other in (replace(small, pad_h=1, stride_h=3), replace(small, element_bytes=8), replace(small, N=1 << 29)):
        with pytest.raises(RuntimeError, match="does not cover this convolution"):
            configuration(other, gpu, "pointwise")


HALOS_AND_WEIGHTS = "gemm_sm90 32 channels by 128 pixels and what their windows reach, weights in shared memory"


@pytest.mark.parametrize(
    ("images", "channels", "filters", "taps", "side", "expected"),
    [
        (32, 64, 256, 1, 56, "gemm_sm90 64 channels by 64 pixels, weights in shared memory"),
        (32, 128, 32, 3, 56, HALOS_AND_WEIGHTS),
        (1, 512, 512, 3, 7, "gemm_sm90 64 channels by 64 pixels, channels in 4 parts"),
        (1, 512, 512, 3, 28, "aten"),
        (32, 512, 512, 3, 7, "gemm_sm90 64 channels by 128 pixels and what their windows reach"),
        (32, 2048, 512, 1, 7, "aten"),
    ],
)
def test_layers_of_networks(images: int, channels: int, filters: int, taps: int, side: int, expected: str) -> None:
    window = (taps, taps, side, side, 1, 1, taps // 2, taps // 2, 1, 1, 1)
    problem = Problem(images, channels, side, side, filters, *window, 2, True, False, False)
    assert configuration(problem, GPUS[4]) == expected


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_first_layers_of_images_have_kernels(element_bytes: int, channels_last: bool) -> None:
    """7x7/2 with 64 outputs and 3x3/2 with 32, of a batch of images of 224x224."""
    for outputs, size, pad in ((64, 7, 3), (32, 3, 1)):
        window = (size, size, 112, 112, 2, 2, pad, pad, 1, 1, 1)
        problem = Problem(32, 3, 224, 224, outputs, *window, element_bytes, channels_last, False, True)
        assert configuration(problem, GPUS[4]).split()[0] in ("stem_sm90", "stem_sm80"), problem


@pytest.mark.parametrize("algorithm", DOMAINS)
def test_forced_choices(algorithm: str) -> None:
    """A forced algorithm runs wherever its domain allows, and refuses what is outside."""
    rng = random.Random(7)
    for _ in range(2000):
        problem, gpu = random_problem(rng), rng.choice(GPUS)
        try:
            forced = configuration(problem, gpu, algorithm)
        except RuntimeError as error:
            assert f"'{algorithm}', which does not cover this convolution" in str(error)
            fitting = stem_sm90_fits(problem) if algorithm == "stem_sm90" else fits(problem, gpu)
            assert not DOMAINS[algorithm](problem, gpu) or not fitting, problem
        else:
            assert forced.split()[0] == algorithm
            assert DOMAINS[algorithm](problem, gpu), problem


@pytest.mark.parametrize(
    "reach, pads", [(0, (0, 127)), (1, (0, 128)), (128, (0, 128)), (200, (72, 128)), (255, (127, 128))]
)
@pytest.mark.parametrize("down", [True, False], ids=["down", "right"])
def test_windows_of_gemm_sm90(reach: int, pads: tuple[int, int], down: bool) -> None:
    """From the least padding to the most of a window that reaches so far, and strides up to 8."""

    def is_covered(pad: int, reach: int, stride: int = 1, images: int = 1) -> bool:
        taps, dilation = (2, reach) if reach > 0 else (1, 1)
        size = (300 + 2 * pad - reach - 1) // stride + 1
        pairs = [(300, 7), (taps, 1), (size, 7), (stride, 1), (pad, 0), (dilation, 1)]
        image, *window = (pair if down else pair[::-1] for pair in pairs)
        numbers = [n for pair in window for n in pair]
        problem = Problem(images, 8, *image, 8, *numbers, 1, 2, True, False, False)
        try:
            return "gemm_sm90" in configuration(problem, GPUS[4], "gemm_sm90")
        except RuntimeError:
            return False

    assert is_covered(pads[0], reach, 8) and not is_covered(pads[0], reach, 9)
    assert not is_covered(pads[0], reach, images=0)

    least, most = pads
    assert is_covered(least, reach) and is_covered(most, reach)
    assert not is_covered(most + 1, reach) and not (least > 0 and is_covered(least - 1, reach))
    assert not is_covered(128, 256)


def small_filter(problem: Problem, rng: random.Random) -> Problem:
    """The same with what sums over the input are for."""
    r, s, pad = rng.randint(1, 3), rng.randint(1, 3), rng.randint(0, 2)
    size = {"P": problem.H + 2 * pad - r + 1, "Q": problem.W + 2 * pad - s + 1}
    if min(size.values()) < 1:
        return problem
    ones = dict.fromkeys(("stride_h", "stride_w", "dilation_h", "dilation_w", "groups"), 1)
    return replace(problem, C=rng.randint(1, 10), R=r, S=s, pad_h=pad, pad_w=pad, **size, **ones)


def test_statistics_stay_inside_their_domain() -> None:
    rng = random.Random(11)
    seen = set()
    for _ in range(4000):
        problem, gpu = small_filter(random_problem(rng), rng), rng.choice(GPUS)
        chosen = configuration(problem, gpu, statistics="")
        evaluated = configuration(problem, gpu)
        if not evaluated.startswith("pointwise"):  # that is for evaluation
            assert chosen.removesuffix(", statistics from the input") == evaluated
        from_input = chosen.endswith(", statistics from the input")
        assert not from_input or (chosen.startswith("stem_sm90") and from_input_fits(problem, gpu)), (chosen, problem)
        seen.add(from_input)
        try:
            configuration(problem, gpu, "stem_sm90", "from_input")
        except RuntimeError as error:
            assert "which does not cover this convolution" in str(error)
            huge = problem.N * (problem.H + 8) * (problem.W + 32) > 1 << 28
            assert huge or not from_input_fits(problem, gpu) or not stem_sm90_fits(problem), problem
        else:
            assert from_input_fits(problem, gpu), problem
        assert configuration(problem, gpu, "aten", "from_output") == "aten"
    assert seen == {False, True}


def test_unknown_statistics() -> None:
    problem = random_problem(random.Random(0))
    with pytest.raises(RuntimeError, match="_explain_problem: statistics is 'no such'") as caught:
        configuration(problem, GPUS[0], "", "no such")
    assert tuple(re.findall(r"'(\w+)'", str(caught.value).partition("expected")[2])) == CONV_STATISTICS
    with pytest.raises(RuntimeError, match="statistics is 'from_input', which does not cover"):
        configuration(problem, GPUS[0], "aten", "from_input")


def test_lists_of_the_wrong_length() -> None:
    with pytest.raises(RuntimeError, match="problem and gpu have 3 and 4 values, expected 20 and 5"):
        explain_problem([1, 2, 3], [90, 132, 1, 1])
