"""conv_scale_shift and conv_bn_scale: how tensors may lie in memory, and which arguments are refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_conv_bn as fcb
from common import DTYPES
from conv_problems import CONVOLUTIONS, OPS, PROBLEMS, BnCall, Call, acc_dtype, channels_last, check, dtypes, make
from fused_conv_bn import reference

# ---- how tensors lie -----------------------------------------------------------------------------------------------------


def layouts(shape: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
    wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)
    dense = wide[..., ::2].contiguous()
    order = (0, len(shape) - 1, *range(1, len(shape) - 1))
    permuted = torch.randn([shape[0], *shape[2:], shape[1]], generator=generator).permute(order)
    return {
        "contiguous": dense,
        "channels_last": channels_last(dense),
        "channels_last by strides": permuted,
        "sliced": wide[..., ::2],
        "sliced channels_last": channels_last(wide)[..., ::2],
        "transposed": dense.transpose(-1, -2).contiguous().transpose(-1, -2),
        "expanded": dense[:1].expand(shape),
    }


LAID_OUT = [
    ((2, 4, 6, 5), (6, 4, 3, 3), 1),
    ((2, 4, 6, 5), (6, 4, 1, 1), 1),
    ((1, 4, 6, 5), (6, 4, 3, 3), 1),
    ((2, 1, 6, 5), (6, 1, 3, 3), 1),
    ((2, 4, 1, 1), (6, 4, 1, 1), 1),
    ((1, 1, 1, 1), (1, 1, 1, 1), 1),
    ((2, 4, 6, 5), (4, 1, 3, 3), 4),
    ((2, 4, 6, 5), (1, 4, 3, 3), 1),
    ((2, 4, 3, 3), (6, 4, 3, 3), 1),
    ((2, 4, 6, 1), (6, 4, 3, 1), 1),
    ((0, 4, 6, 5), (6, 4, 3, 3), 1),
    ((2, 4, 6), (6, 4, 3), 1),
    ((2, 4, 3, 6, 5), (6, 4, 3, 3, 3), 1),
    ((2, 1, 3, 6, 5), (6, 1, 3, 3, 3), 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("x_shape", "w_shape", "groups"), LAID_OUT, ids=str)
def test_strides_are_eagers_and_the_fakes(conv_device, x_shape, w_shape, groups, dtype, generator):
    """For every mixture of layouts of input and weight, and the numbers are right as well."""
    space = len(x_shape) - 2
    window = [1] * space, [0] * space, [1] * space, groups
    scale, shift = torch.ones(w_shape[0], device=conv_device), torch.zeros(w_shape[0], device=conv_device)
    scale, shift = scale.to(acc_dtype(dtype)), shift.to(acc_dtype(dtype))
    for (x_name, x), (w_name, w) in itertools.product(
        layouts(x_shape, generator).items(), layouts(w_shape, generator).items()
    ):
        x, w = (t.to(conv_device, dtype, memory_format=torch.preserve_format) for t in (x, w))
        convolved = CONVOLUTIONS[x.dim()](x, w, None, *window)
        call = Call(x, w, scale, shift, *window)
        bn = BnCall(x, w, None, None, *window, running_mean=shift.to(dtype), running_var=scale.to(dtype))
        for name, c in (("affine", call), ("bn", bn)):
            ours = c.ours()
            if ours is None:
                continue
            with FakeTensorMode() as mode:
                fakes = [None if t is None else mode.from_tensor(t) for t in (x, w, *c.affine())]
                if c is call:
                    fake = OPS.conv_scale_shift(*fakes, *window)
                else:
                    fake = OPS.conv_bn_scale(*fakes, *bn.numbers(), *window)
            what = name, x_name, w_name
            assert (fake.shape, fake.stride(), fake.dtype) == (ours.shape, ours.stride(), ours.dtype), what
            # For cuDNN's BatchNorm, extents of 1 mean something else than for PyTorch's own kernels.
            if ours.numel() > 0 and (c is call or conv_device == "cpu"):
                assert ours.stride() == c.eager_strides(convolved), what
            eager = c.eager_affine(convolved.to(acc_dtype(dtype))).to(dtype)
            torch.testing.assert_close(ours, eager, rtol=16 * DTYPES[dtype], atol=64 * DTYPES[dtype])


@dtypes
def test_misaligned_addresses(conv_device, dtype, generator):
    """Input, weight and residual each off the 16-byte boundary, by several numbers of elements."""
    for problem, formats in itertools.product(("problem 73", "depthwise", "first layer"), ("cc", "ll")):
        call = make(generator, conv_device, dtype, *PROBLEMS[problem], formats=formats, residual=True)
        assert call.residual is not None
        call.residual = channels_last(call.residual) if formats == "ll" else call.residual
        for i in (1, 2, 3)[: 16 // dtype.itemsize - 1]:
            moved = [
                torch.empty(t.numel() + 16, device=conv_device, dtype=dtype)
                .as_strided(t.shape, t.stride(), (i * k) % 8)
                .copy_(t)
                for k, t in enumerate((call.x, call.w, call.residual), 1)
            ]
            check(replace(call, x=moved[0], w=moved[1], residual=moved[2]))


def test_parameters_and_residual_of_any_strides(conv_device, generator):
    call = make(generator, conv_device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3), residual=True)
    expected = call.ours()
    call.scale, call.shift = (torch.stack([t, t.neg()], 1)[:, 0] for t in (call.scale, call.shift))
    assert call.residual is not None
    call.residual = call.residual.transpose(1, 3).contiguous().transpose(1, 3)
    call.w = call.w.transpose(2, 3).contiguous().transpose(2, 3)
    assert not any(t.is_contiguous() for t in (call.scale, call.residual, call.w))
    ours = call.ours()
    assert (ours is None) == (expected is None)
    if ours is not None:
        assert torch.equal(ours, expected)


def test_one_value_for_all_dimensions(conv_device, generator):
    one = make(generator, conv_device, torch.float32, (2, 4, 9, 8), (6, 4, 3, 3), 2, 1, 1)
    expected = one.ours()
    for make_list in (lambda v: (v, v), lambda v: [v], lambda v: torch.Size([v, v])):
        one.stride, one.padding, one.dilation = (make_list(v) for v in (2, 1, 1))
        ours = one.ours()
        assert (ours is None) == (expected is None) and (ours is None or torch.equal(ours, expected))


def test_empty_batch(conv_device):
    for x, w in (((0, 4, 9, 8), (6, 4, 3, 3)), ((0, 4, 9), (6, 4, 3)), ((0, 4, 9, 8, 7), (6, 4, 3, 3, 3))):
        one = torch.ones(6, device=conv_device)
        x, w = torch.empty(x, device=conv_device), torch.ones(w, device=conv_device)
        expected = CONVOLUTIONS[x.dim()](x, w).shape
        residual = torch.empty(expected, device=conv_device)
        ours = Call(x, w, one, one, residual=residual, activation="silu").ours()
        assert ours is None or ours.shape == expected


# ---- bad input -----------------------------------------------------------------------------------------------------------

X, W, C6 = torch.randn(2, 4, 9, 8), torch.randn(6, 4, 3, 3), torch.ones(6)
conv = fcb.conv_scale_shift
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: conv(X[0, 0], W, C6, C6), r"input has shape \[9, 8\], expected 3 to 5 dimensions: \(N, C, L\), \(N, C, H, W\) or"),
    (lambda: conv(X[None, None], W, C6, C6), r"input has shape \[1, 1, 2, 4, 9, 8\], expected"),
    (lambda: conv(X.int(), W.int(), C6, C6), "input has dtype Int, expected float32, float16, bfloat16 or float64"),
    (lambda: conv(X[:, :, :0], W, C6, C6), r"input has shape \[2, 4, 0, 8\], expected at least one element in each dimension but"),
    (lambda: conv(X, W[0], C6, C6), r"weight has shape \[4, 3, 3\], expected 4 dimensions, as many as input"),
    (lambda: conv(X, W.half(), C6, C6), "weight has dtype float16, expected float32, the dtype of input"),
    (lambda: conv(X, W[:, :0], C6, C6), r"weight has shape \[6, 0, 3, 3\], expected at least one element in each dimension"),
    (lambda: conv(X, W[:, :3], C6, C6), r"weight has shape \[6, 3, 3, 3\], expected 4 in dimension 1, the channels of input, 4, over"),
    (lambda: conv(X, W, C6, C6, groups=3), "groups is 3, expected a divisor of the 4 channels of input and of the 6 output channels"),
    (lambda: conv(X, W, C6, C6, groups=0), "groups is 0, expected a divisor"),
    (lambda: conv(X, W, C6, C6, groups=4), "groups is 4, expected a divisor"),
    (lambda: conv(X, W, C6, C6, groups=2), r"weight has shape \[6, 4, 3, 3\], expected 2 in dimension 1"),
    (lambda: conv(X, W, C6, C6, stride=0), r"stride is \[0\], expected values from 1 to 2147483647"),
    (lambda: conv(X, W, C6, C6, stride=(1, 2, 1)), "stride has 3 values, expected 1 or 2, for the 2 spatial dimensions of input"),
    (lambda: conv(X[..., 0], W[..., 0], C6, C6, stride=(1, 2)), "stride has 2 values, expected 1, for the 1 spatial dimension of input"),
    (lambda: conv(X, W, C6, C6, padding=(0, -1)), r"padding is \[0, -1\], expected values from 0 to"),
    (lambda: conv(X, W, C6, C6, padding=()), "padding has 0 values, expected 1 or 2"),
    (lambda: conv(X, W, C6, C6, padding=2**40), "padding is .1099511627776., expected values from 0 to"),
    (lambda: conv(X, W, C6, C6, dilation=(1, 0)), r"dilation is \[1, 0\], expected values from 1 to"),
    (lambda: conv(X, W, C6, C6, dilation=(1, 5), padding=1), r"weight has shape \[6, 4, 3, 3\], expected a kernel that fits into input of shape \[2, 4, 9, 8\]: in dimension 3 that has 10 elements with its padding, and 3 taps with dilation 5 cover more"),
    (lambda: conv(X, W, C6[:5], C6), r"scale has shape \[5\], expected \[6\], one element for each channel of the output"),
    (lambda: conv(X, W, C6, C6.double()), "shift has dtype float64, expected float32 with input of dtype float32"),
    (lambda: conv(X.half(), W.half(), C6.half(), C6), "scale has dtype float16, expected float32 with input of dtype float16"),
    (lambda: conv(X, W, C6, C6, residual=X), r"residual has shape \[2, 4, 9, 8\], expected \[2, 6, 7, 6\], the shape of the output"),
    (lambda: conv(X, W, C6, C6, residual=torch.ones(2, 6, 7, 6).half()), "residual has dtype float16, expected float32"),
    (lambda: conv(X, W, C6, C6, activation="swish"), f"activation is 'swish', expected one of {', '.join(map(repr, reference.ACTIVATIONS))}$"),
]  # fmt: skip


bn_conv = fcb.conv_bn_scale
BAD_BN: list[tuple[Callable[[], Any], str]] = [
    (lambda: bn_conv(X[0, 0], W, None, C6, C6), r"input has shape \[9, 8\], expected 3 to 5 dimensions"),
    (lambda: bn_conv(X, W[:, :3], None, C6, C6), r"conv_weight has shape \[6, 3, 3, 3\], expected 4 in dimension 1, the channels of input, 4, over"),
    (lambda: bn_conv(X, W, None, C6, C6, groups=3), "groups is 3, expected a divisor of the 4 channels of input and of the 6 output channels"),
    (lambda: bn_conv(X, W, C6[:5], C6, C6), r"conv_bias has shape \[5\], expected \[6\], one element for each channel of the output"),
    (lambda: bn_conv(X, W, None, C6[:4], C6), r"running_mean has shape \[4\], expected \[6\]"),
    (lambda: bn_conv(X, W, None, C6, C6.view(2, 3)), r"running_var has shape \[2, 3\], expected \[6\]"),
    (lambda: bn_conv(X, W, None, C6, C6, C6.half()), "weight has dtype float16, expected float32 with input of dtype float32"),
    (lambda: bn_conv(X, W, None, C6, C6, None, C6.double()), "bias has dtype float64, expected float32 with input of dtype float32"),
    (lambda: bn_conv(X.half(), W.half(), None, C6, C6.bfloat16()), "running_var has dtype bfloat16, expected float16 or float32"),
    (lambda: bn_conv(X.double(), W.double(), None, C6.double(), C6), "running_var has dtype float32, expected float64"),
    (lambda: bn_conv(X, W, None, C6, C6, eps=-1e-5), "eps is -1e-05, expected 0 or more"),
    (lambda: bn_conv(X, W, None, C6, C6, stride=(1, 2, 1)), "stride has 3 values, expected 1 or 2, for the 2 spatial dimensions of input"),
    (lambda: bn_conv(X, W, None, C6, C6, residual=X), r"residual has shape \[2, 4, 9, 8\], expected \[2, 6, 7, 6\], the shape of the output"),
    (lambda: bn_conv(X, W, None, C6, C6, activation="elu"), "activation is 'elu', expected one of 'none', 'relu'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "call", "message"),
    [("conv_scale_shift", *row) for row in BAD] + [("conv_bn_scale", *row) for row in BAD_BN],
    ids=[message[:50] for _, message in BAD + BAD_BN],
)
def test_bad_input(op, call, message):
    with pytest.raises(RuntimeError, match=f"^{op}: {message}") as caught:
        call()
    assert "\n" not in str(caught.value) and ".h:" not in str(caught.value)


def test_largest_kernel_and_padding_that_fit(conv_device):
    one = torch.ones(1, device=conv_device)
    x, w = torch.ones(1, 1, 4, 4, device=conv_device), torch.ones(1, 1, 3, 3, device=conv_device)
    ours = Call(x, w, one, one, 1, 0, (1, 1)).ours()
    assert ours is None or ours.shape == (1, 1, 2, 2)
    ours = Call(x, w, one, one, 2**31 - 1, 1, (2, 2)).ours()
    assert ours is None or ours.shape == (1, 1, 1, 1)
