"""The pass for the gradients of a convolution's weight and of its BatchNorm, by its kernels, against autograd in float64."""

import pytest
import torch
from torch.nn import functional as F

import emulated

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# N, C, H, W, K, R, S, stride, padding, dilation
PROBLEMS = {
    "problem 73": (2, 8, 12, 20, 64, 3, 3, 1, 0, 1),
    "3 channels, stride 2": (2, 3, 15, 17, 24, 3, 3, 2, 1, 1),
    "7x7": (1, 3, 22, 23, 40, 7, 7, 2, 3, 1),
    "1 channel": (3, 1, 9, 11, 5, 5, 4, 1, 2, 1),
    "2 channels, dilated": (1, 2, 13, 14, 33, 3, 3, 1, 2, 2),
    "16 channels": (1, 16, 9, 10, 48, 3, 3, 1, 1, 1),
    "11 channels, 1x1": (2, 11, 7, 5, 70, 1, 1, 1, 0, 1),
}


def gradients(x, w, cb, bn, dy, window, activation, trains):
    """dw, dweight, dbias, dconv_bias, and the gradient of the convolution's result, in float64."""
    stride, padding, dilation = window
    w, weight, bias = (t.double().requires_grad_() for t in (w, bn["weight"], bn["bias"]))
    cb = cb.double().requires_grad_()
    z = F.conv2d(x.double(), w, cb, stride, padding, dilation)
    z.retain_grad()
    statistics = (None, None) if trains else (bn["mean"].double(), bn["var"].double())
    v = F.batch_norm(z, *statistics, weight, bias, trains, 0.1, 1e-5) * 1.5
    # The mask and the result are those that were stored.
    if activation == "none":
        v.backward(dy.double())
        return w.grad, weight.grad, bias.grad, cb.grad, z.grad, None
    y = {"relu": F.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}[activation](v).to(x.dtype)
    stored = y.detach().double()
    factor = {"relu": (stored > 0).double(), "sigmoid": stored * (1 - stored), "tanh": 1 - stored * stored}[activation]
    v.backward((dy.double() * factor).to(x.dtype).double() if x.dtype != torch.float32 else dy.double() * factor)
    return w.grad, weight.grad, bias.grad, cb.grad, z.grad, y.detach()


# Each problem in one or two ways: every dtype, layout and kind of statistics with every other occurs.
CASES = [
    (name, DTYPES[(i + j) % 3], (i + j // 2) % 2 == 0, j % 2 == 0)
    for i, name in enumerate(PROBLEMS)
    for j in range(4 if i < 2 else 2)
]


@pytest.mark.parametrize("name,dtype,channels_last,trains", CASES)
def test_gradients(name, dtype, channels_last, trains):
    N, C, H, W, K, R, S, stride, padding, dilation = PROBLEMS[name]
    torch.manual_seed(len(name))
    activation = ["none", "relu", "sigmoid", "tanh"][(list(PROBLEMS).index(name) + trains + channels_last) % 4]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = (
        (torch.randn(N, C, H, W) + 0.5)
        .mul(3.0 ** -torch.arange(C).view(-1, 1, 1))
        .to(dtype)
        .contiguous(memory_format=layout)
    )
    w = (torch.randn(K, C, R, S) * 0.2).to(dtype)
    cb = torch.randn(K).to(dtype)
    window = stride, padding, dilation
    z = F.conv2d(x.double(), w.double(), cb.double(), *window)
    bn = dict(mean=torch.randn(K), var=torch.rand(K) + 0.1, weight=torch.randn(K), bias=torch.randn(K))
    dy = (torch.randn(z.shape) * 10.0 ** (torch.randn(K, 1, 1) - 2)).to(dtype).contiguous(memory_format=layout)
    *expected, dz, y = gradients(x, w, cb, bn, dy, window, activation, trains)
    plain = F.conv2d(x.double(), w.double(), None, *window)
    mean, var = bn["mean"], bn["var"]
    if trains:
        mean = plain.mean((0, 2, 3)).float()
        var = (plain.var((0, 2, 3), correction=0) + 1e-5).rsqrt().float()
    dw, dweight, dbias, dconv_bias, scaled, scale, shift = emulated.conv_bn_wgrad(
        dy,
        None if y is None else y.contiguous(memory_format=layout),
        x,
        w,
        cb,
        mean,
        var,
        bn["weight"],
        1.5,
        1e-5,
        [stride],
        [padding],
        [dilation],
        activation=activation,
        has_statistics=trains,
    )
    unit = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    # Of each gradient's terms the sum of magnitudes, by channel.
    dv = dy.double().abs()
    size = torch.einsum("nkpq->k", dv)
    a = bn["weight"].double().abs() * (var.double() if trains else (var.double() + 1e-5).rsqrt()) * 1.5
    patches = F.unfold(F.pad(x.double().abs(), [padding] * 4), (R, S), dilation, 0, stride)  # (N, C R S, P Q)
    of_weight = torch.einsum("nkp,ntp->kt", dv.flatten(2), patches).view(w.shape) * a.view(-1, 1, 1, 1) * 3
    sizes = F.conv2d(x.double().abs(), w.double().abs(), None, *window) + (
        mean.double().abs() + cb.double().abs()
    ).view(-1, 1, 1)
    of_dweight = torch.einsum("nkpq->k", dv * sizes) * 1.5 * (var.double() if trains else (var.double() + 1e-5).rsqrt())
    for got, want, most in (
        (dw.double(), expected[0], unit * of_weight + (2.0**-24 if dtype == torch.float16 else 0)),
        (dbias.double(), expected[2], 2.0**-20 * size * 1.5),
        (dweight.double(), expected[1], 2.0**-20 * of_dweight),
        (dconv_bias.double(), expected[3], unit * size * a * 2 + 1e-6),
    ):
        assert got.isfinite().all()
        assert ((got - want).abs() <= most).all(), ((got - want).abs() / most).max()
    # The gradient of the convolution's result, and the weight that takes it to the input's.
    factor = dz.new_ones(()) if activation == "none" else None
    signed = bn["weight"].double() * (var.double() if trains else (var.double() + 1e-5).rsqrt()) * 1.5
    torch.testing.assert_close(scaled.double(), w.double() * signed.view(-1, 1, 1, 1), rtol=unit * 2, atol=1e-7)
    if trains and factor is not None:
        other = dy.double() + scale.double().view(-1, 1, 1) * plain + shift.double().view(-1, 1, 1)
        torch.testing.assert_close(other * signed.view(-1, 1, 1), dz, rtol=1e-4, atol=1e-4 * float(dz.abs().max()))
