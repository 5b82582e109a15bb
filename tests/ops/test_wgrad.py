"""_conv_bn_wgrad: gradients from one pass over dy and the input, against the twin in float64; and where autograd takes it."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fused_conv_bn as fcb
from fused_conv_bn import _conv, _gradients, reference

OPS = torch.ops.fused_conv_bn


@pytest.fixture
def cuda(need_gpus) -> str:
    need_gpus(1)
    return "cuda"


NAMES = ("conv_weight", "weight", "bias", "conv_bias", "scaled_weight", "input_scale", "input_shift")

# N, C, H, W, K, (R, S), stride, padding, dilation
PROBLEMS = {
    "problem 73": (4, 8, 40, 40, 64, (3, 3), 1, 0, 1),
    "stem": (3, 3, 61, 57, 32, (3, 3), 2, 1, 1),
    "7x7": (2, 3, 50, 70, 64, (7, 7), 2, 3, 1),
    "1 channel": (5, 1, 33, 31, 7, (5, 4), 1, 2, 1),
    "2 channels, dilated": (2, 2, 30, 33, 70, (3, 3), 1, 2, 2),
    "16 channels": (2, 16, 20, 31, 48, (3, 3), 1, 1, 1),
    "11 channels, 1x1": (3, 11, 17, 19, 130, (1, 1), 1, 0, 1),
    "odd planes": (2, 8, 15, 13, 40, (3, 3), 1, 1, 1),
    "one pixel": (5, 6, 3, 3, 33, (3, 3), 1, 0, 1),
    "wide": (1, 4, 5, 2100, 24, (3, 5), (1, 2), (1, 2), 1),
}


def arguments(name: str, dtype: torch.dtype, last: bool, device: str, activation: str = "none", trains: bool = False):
    torch.manual_seed(len(name))
    N, C, H, W, K, taps, stride, padding, dilation = PROBLEMS[name]
    layout = torch.channels_last if last else torch.contiguous_format
    window = tuple([v] * 2 if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
    x = (torch.randn(N, C, H, W, device=device) + 0.5).to(dtype).contiguous(memory_format=layout)
    w = (torch.randn(K, C, *taps, device=device) * 0.2).to(dtype)
    z = F.conv2d(x.double(), w.double(), None, *window)
    dy = (torch.randn(z.shape, device=device) * 0.1).to(dtype).contiguous(memory_format=layout)
    mean, weight, cb = (torch.randn(K, device=device) for _ in range(3))
    var = torch.rand(K, device=device) + 0.1
    if trains:
        mean = z.mean((0, 2, 3)).float()
        var = (z.var((0, 2, 3), correction=0) + 1e-5).rsqrt().float()
    result = None
    if activation != "none":
        result = reference.activate(torch.randn_like(dy, dtype=torch.float32), activation, 0.0).to(dtype)
        result = result.contiguous(memory_format=layout)
    return (dy, result, x, w, cb.to(dtype), mean, var, weight, 1.5, 1e-5, *window, 1)


def truth(args: tuple, **named) -> tuple[Tensor, ...]:
    return reference.conv_bn_wgrad(*(a.double() if isinstance(a, Tensor) else a for a in args), **named)


def sizes(args: tuple, has_statistics: bool) -> dict[str, Tensor]:
    """Of each gradient's terms the sum of magnitudes."""
    dy, _, x, w, cb, mean, var, weight, factor, eps, *window = args
    window = window[:3]
    dv = dy.double().abs()
    invstd = var.double() if has_statistics else (var.double() + eps).rsqrt()
    a = weight.double().abs() * invstd * factor
    spread = F.conv2d(x.double().abs(), w.double().abs(), None, *window)
    spread = spread + (mean.double().abs() + cb.double().abs()).view(-1, 1, 1)
    d = dv.sum((0, 2, 3))
    dweight = (dv * spread).sum((0, 2, 3)) * invstd
    ones = w.double().abs().requires_grad_()
    count = dv[:, 0].numel()
    terms = dv
    if has_statistics:
        terms = dv + (d / count).view(-1, 1, 1) + spread * (dweight / count * invstd).view(-1, 1, 1)
    F.conv2d(x.double().abs(), ones, None, *window).backward(terms)
    return {
        "conv_weight": ones.grad * a.view(-1, 1, 1, 1),
        "weight": dweight * factor,
        "bias": d * factor,
        "conv_bias": d * a,
        "scaled_weight": w.double().abs() * a.view(-1, 1, 1, 1),
        "input_scale": dweight / count * invstd,
        "input_shift": dweight / count * invstd * spread.mean((0, 2, 3)) + d / count,
    }


@pytest.mark.parametrize("trains", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_cuda_gradients(name, dtype, last, activation, trains, cuda):
    args = arguments(name, dtype, last, cuda, activation, trains)
    named = dict(activation=activation, has_statistics=trains)
    got = OPS._conv_bn_wgrad(*args, needs_input=True, **named)
    # In 16 bits dv is rounded, as eager's is.
    rounding = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    most = sizes(args, trains)
    of_dv = 0.0 if activation == "none" else rounding
    for key, g, want in zip(NAMES, got, truth(args, **named), strict=True):
        if not trains and key in ("input_scale", "input_shift"):
            assert g.numel() == 0
            continue
        bound = (2.0**-20 + of_dv) * most[key]
        if g.dtype == dtype:
            bound = bound + rounding * want.abs() + (2.0**-24 if dtype == torch.float16 else 0)
        error = (g.double() - want).abs()
        assert (error <= bound).all(), (key, (error / bound).max())


def test_cuda_opcheck(cuda):
    args = arguments("problem 73", torch.float32, False, cuda, trains=True)
    for needs_input in (False, True):
        torch.library.opcheck(
            OPS._conv_bn_wgrad.default,
            args,
            {"has_statistics": True, "needs_input": needs_input},
            test_utils=("test_schema", "test_faketensor"),
        )
    torch.library.opcheck(
        OPS._conv_bn_scale_train_sums.default,
        (*args[2:4], None, None, None, None, None, 2.0, 0.1, 1e-5, *args[10:]),
        {},
        test_utils=("test_schema",),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["problem 73", "odd planes", "1 channel", "16 channels"])
def test_cuda_sums_of_the_forward(name, dtype, cuda):
    """They are those that backward would compute itself, and the forward's other results do not depend on them."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the statistics come from the input on compute capability 9.0 alone")
    dy, _, x, w, cb, *_, weight, factor, eps, stride, padding, dilation, groups = arguments(name, dtype, False, cuda)
    window = stride, padding, dilation, groups
    bn = None, None, weight, None, factor, 0.1, eps
    covered = PROBLEMS[name][1] <= 8 and max(PROBLEMS[name][5]) <= 3
    with fcb.use_algorithm(*("stem_sm90", "from_input") if covered else ()):
        *others, sums = OPS._conv_bn_scale_train_sums(x, w, cb, *bn, *window)
        for got, want in zip(others, OPS.conv_bn_scale_train_stats(x, w, cb, *bn, *window), strict=True):
            assert torch.equal(got, want)
    assert sums.dtype == torch.float64 and (sums.numel() > 0) == covered
    if covered:
        args = dy, None, x, w, None, others[1], others[2], weight, factor, eps, *window
        named = dict(has_statistics=True, needs_input=True)
        for got, want in zip(
            OPS._conv_bn_wgrad(*args, **named, input_sums=sums), OPS._conv_bn_wgrad(*args, **named), strict=True
        ):
            assert torch.equal(got, want)
        for bad in (sums[1:], sums.float(), sums.cpu()):
            with pytest.raises(RuntimeError, match="input_sums has shape .*, expected what _conv_bn_scale_train_sums"):
                OPS._conv_bn_wgrad(*args, **named, input_sums=bad)
        with pytest.raises(RuntimeError, match="input_sums has shape"):
            OPS._conv_bn_wgrad(*args, input_sums=sums)


def test_cuda_is_deterministic(cuda):
    args = arguments("problem 73", torch.float32, False, cuda, trains=True)
    first, second = (OPS._conv_bn_wgrad(*args, has_statistics=True, needs_input=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_misaligned(dtype, cuda):
    """dy, the result and the input may begin anywhere, and lie in any way."""
    args = list(arguments("odd planes", dtype, False, cuda, "relu", True))
    named = dict(activation="relu", has_statistics=True)
    want = OPS._conv_bn_wgrad(*args, **named)
    for i in range(3):
        storage = torch.full((args[i].numel() + 3,), torch.nan, dtype=dtype, device=cuda)
        moved = storage[1:-2].view(args[i].shape).copy_(args[i])
        args[i] = moved
    got = OPS._conv_bn_wgrad(*args, **named)
    permuted = [a.transpose(2, 3).contiguous().transpose(2, 3) if i < 3 else a for i, a in enumerate(args)]
    for other in (got, OPS._conv_bn_wgrad(*permuted, **named)):
        for a, b in zip(other, want, strict=True):
            assert torch.equal(a, b)


def test_cuda_domain(cuda):
    """The op covers what Python says that it covers."""
    torch.manual_seed(0)
    number = lambda *values: values[int(torch.randint(len(values), ()))]  # noqa: E731
    covered = 0
    for _ in range(60):
        C, taps, stride, dilation = (
            number(1, 2, 3, 4, 8, 9, 16, 17),
            number(1, 3, 5, 7, 11),
            number(1, 2, 4),
            number(1, 2),
        )
        x = torch.randn(1, C, 30, 34, device=cuda)
        w = torch.randn(8, C, taps, taps, device=cuda)
        window = [stride] * 2, [0] * 2, [dilation] * 2, 1
        if (taps - 1) * dilation >= 30:
            continue
        dy = torch.randn_like(F.conv2d(x, w, None, *window))
        call = lambda: OPS._conv_bn_wgrad(dy, None, x, w, None, None, None, None, 1.0, 0.0, *window)  # noqa: E731, B023
        if _conv.covers_weight_pass(dy, x, w, window):
            covered += 1
            call()
        else:
            with pytest.raises(RuntimeError, match="expected a convolution of few channels"):
                call()
    assert covered > 20


@pytest.mark.parametrize(
    "argument,value,message",
    [
        (0, (4, 64, 38, 37), "dy has shape .*, expected .*, the shape of the output"),
        (0, torch.float16, "dy has dtype float16, expected float32, the dtype of input"),
        (1, (4, 64, 38, 38), "activation is 'none' with result"),
        (7, (63,), "weight has shape .*, expected .64."),
    ],
)
def test_cuda_bad_arguments(argument, value, message, cuda):
    args = list(arguments("problem 73", torch.float32, False, cuda))
    args[argument] = args[argument].to(value) if isinstance(value, torch.dtype) else torch.zeros(value, device=cuda)
    with pytest.raises(RuntimeError, match=message):
        OPS._conv_bn_wgrad(*args)


def record_weight_passes(monkeypatch) -> list[str]:
    """Of each call of the op: whether the forward's sums came along."""
    calls = []
    real = _gradients._conv_bn_wgrad

    def recorded(*args, **named):
        calls.append("none" if named["input_sums"] is None else "sums")
        return real(*args, **named)

    monkeypatch.setattr(_gradients, "_conv_bn_wgrad", recorded)
    return calls


@pytest.mark.parametrize("trains,needs_input", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize(
    "C,taps,stride,dtype", [(3, 3, 2, torch.float32), (16, 3, 1, torch.float16), (3, 7, 2, torch.float32)]
)
def test_cuda_autograd_by_rule(C, taps, stride, dtype, trains, needs_input, cuda, monkeypatch):
    """Either way the gradients are those of float64."""
    calls = record_weight_passes(monkeypatch)
    torch.manual_seed(1)
    x = torch.rand(8, C, 120 * stride, 120 * stride, device=cuda).to(dtype).requires_grad_(needs_input)
    w = (torch.randn(24, C, taps, taps, device=cuda) * 0.2).to(dtype).requires_grad_()
    g, b = (torch.randn(24, device=cuda, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(24, device=cuda), torch.rand(24, device=cuda) + 0.1

    def run(wide):
        t = [v.detach().to(wide or v.dtype).requires_grad_(v.requires_grad) for v in (x, w, g, b)]
        m, v = mean.to(wide or mean.dtype), var.to(wide or var.dtype)
        window = (stride, stride), (1, 1)
        if wide:
            z = F.conv2d(t[0], t[1], None, *window)
            y = F.batch_norm(z, None if trains else m, None if trains else v, t[2], t[3], trains, 0.1, 1e-5) * 1.5
        elif trains:
            y = fcb.conv_bn_scale_train(*t[:2], None, None, None, *t[2:], 1.5, 0.1, 1e-5, *window)
        else:
            y = fcb.conv_bn_scale(*t[:2], None, m, v, *t[2:], 1.5, 1e-5, *window)
        generator = torch.Generator(cuda).manual_seed(2)
        dy = torch.randn(y.shape, device=cuda, generator=generator).to(dtype).to(y.dtype)
        return torch.autograd.grad(y, [v for v in t if v.requires_grad], dy)

    with torch.backends.cudnn.flags(allow_tf32=False):
        ours, want = run(None), run(torch.float64)
    takes = not trains or (torch.cuda.get_device_capability() == (9, 0) and taps == 3 and (C == 3 or not needs_input))
    assert calls == (["none"] if takes else [])
    for gradient, true in zip(ours, want, strict=True):
        assert (gradient.double() - true).norm() / true.norm() < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("needs_input", [False, True])
@pytest.mark.parametrize("activation,residual", [("none", False), ("relu", False), ("relu", True), ("silu", True)])
@pytest.mark.parametrize("trains", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_cuda_autograd_takes_it(last, trains, activation, residual, needs_input, cuda, monkeypatch):
    """Where it is preferred, the gradients of conv_bn_scale and conv_bn_scale_train are the ones that float64 gives."""
    calls = record_weight_passes(monkeypatch)
    torch.manual_seed(1)
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.rand(8, 8, 130, 120, device=cuda).contiguous(memory_format=layout).requires_grad_(needs_input)
    w = (torch.randn(64, 8, 3, 3, device=cuda) * 0.2).requires_grad_()
    cb, g, b = (torch.randn(64, device=cuda, requires_grad=True) for _ in range(3))
    mean, var = torch.randn(64, device=cuda), torch.rand(64, device=cuda) + 0.1
    r = torch.randn(8, 64, 128, 118, device=cuda, requires_grad=True) if residual else None
    dy = torch.randn(8, 64, 128, 118, device=cuda).contiguous(memory_format=layout)

    def run(dtype):
        t = types.SimpleNamespace(
            **{
                k: None if v is None else v.detach().to(dtype).requires_grad_(v.requires_grad)
                for k, v in dict(x=x, w=w, cb=cb, g=g, b=b, r=r).items()
            }
        )
        m, v = mean.to(dtype), var.to(dtype)
        if dtype == torch.float64:
            z = F.conv2d(t.x, t.w, t.cb)
            y = F.batch_norm(z, None if trains else m, None if trains else v, t.g, t.b, trains, 0.1, 1e-5) * 1.5
            y = reference.activate(y if t.r is None else y + t.r, activation, 0.01)
        elif trains:
            y = fcb.conv_bn_scale_train(t.x, t.w, t.cb, None, None, t.g, t.b, 1.5, residual=t.r, activation=activation)
        else:
            y = fcb.conv_bn_scale(t.x, t.w, t.cb, m, v, t.g, t.b, 1.5, residual=t.r, activation=activation)
        leaves = {k: v for k, v in vars(t).items() if v is not None and v.requires_grad}
        return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(dtype)), strict=True))

    with torch.backends.cudnn.flags(allow_tf32=False):
        ours, want = run(torch.float32), run(torch.float64)
    # The activation's derivative takes a pass of its own that the sums have nothing to do with.
    assert calls == ["sums" if trains and torch.cuda.get_device_capability() == (9, 0) else "none"]
    for key, gradient in ours.items():
        if trains and key == "cb":
            continue
        error = (gradient.double() - want[key]).norm() / want[key].norm()
        # A relu's mask may differ where its input is next to 0: a few pixels of a million.
        assert error < (2e-3 if activation == "relu" else 1e-5), (key, error)
