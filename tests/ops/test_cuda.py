"""What only a GPU can show: devices, streams, graphs, asynchrony and tensors of more than 2^31 elements."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import torch

import fused_conv_bn as fcb
from common import random_bn
from fused_conv_bn import _loader, reference

pytestmark = pytest.mark.parametrize("device", ["cuda"], indirect=True)


def test_the_library_covers_this_gpu(device):
    archs = _loader.cuda_archs()
    assert archs is not None and _loader.covers(torch.cuda.get_device_capability(), archs)


def test_devices_must_agree(device):
    x, c3 = torch.randn(2, 3, 4, 4), torch.ones(3)
    with pytest.raises(RuntimeError, match="bn_scale: running_var is on cpu, expected cuda:0, where input is"):
        fcb.bn_scale(x.cuda(), c3.cuda(), c3)
    with pytest.raises(RuntimeError, match="bn_scale: running_mean is on cuda:0, expected cpu, where input is"):
        fcb.bn_scale(x, c3.cuda(), c3)
    with pytest.raises(RuntimeError, match="scale_shift: out is on cpu, expected cuda:0"):
        fcb.scale_shift(x.cuda(), c3.cuda(), c3.cuda(), out=x.clone())
    with pytest.raises(RuntimeError, match="fold_bn: running_var is on cuda:0, expected cpu"):
        fcb.fold_bn(c3, c3.cuda())
    with pytest.raises(RuntimeError, match="bn_scale: residual is on cpu, expected cuda:0, where input is"):
        fcb.bn_scale(x.cuda(), c3.cuda(), c3.cuda(), residual=x)
    w = torch.randn(3, 3, 1, 1)
    with pytest.raises(RuntimeError, match="conv_bn_scale: conv_bias is on cpu, expected cuda:0, where input is"):
        fcb.conv_bn_scale(x.cuda(), w.cuda(), c3, c3.cuda(), c3.cuda())
    torch.cuda.synchronize()  # no error is left behind


def test_current_stream(device, generator):
    """Work waits for what the current stream holds, and is done when that stream is."""
    x = torch.randn(8, 64, 56, 56, generator=generator).to(device)
    bn = random_bn(64, torch.float32, device, generator)
    expected = fcb.bn_scale(x + 1, *bn)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = x + 1
        ours = fcb.bn_scale(late, *bn)
        done = torch.cuda.Event()
        done.record()
    assert not done.query()  # neither op waited for the stream
    done.synchronize()
    assert torch.equal(ours, expected)


def test_parameters_written_on_another_stream(device, generator):
    """A module keeps nothing that was computed on one stream and would be read on another."""
    model = fcb.ConvBnScale2d(4, 8, 3, 2.0).eval().to(device)
    bn = random_bn(8, torch.float32, device, generator)
    x = torch.randn(2, 4, 9, 9, generator=generator).to(device)
    with torch.no_grad():
        stale = model(x).clone()
        fresh = copy.deepcopy(model)
        for m in (fresh, model):
            buffers = m.bn.running_mean, m.bn.running_var
            first, second = torch.cuda.Stream(), torch.cuda.Stream()
            torch.cuda.synchronize()
            with torch.cuda.stream(first):
                torch.cuda._sleep(50_000_000)
                for target, value in zip(buffers, bn, strict=False):
                    target.data.copy_(value)  # behind the version counter's back
                m(x)
            second.wait_stream(first)
            with torch.cuda.stream(second):
                y = m(x)
                done = torch.cuda.Event()
                done.record()
            assert not done.query()  # the host waits for neither
            done.synchronize()
            if m is fresh:
                expected = y
        assert torch.equal(y, expected) and not torch.equal(y, stale)
        assert torch.equal(model(x), expected)


def test_no_synchronisation(device, generator):
    x = torch.randn(4, 32, 14, 14, generator=generator).to(device)
    bn = random_bn(32, torch.float32, device, generator)
    weight = torch.randn(32, 32, 3, 3, generator=generator).to(device)
    ops = torch.ops.fused_conv_bn
    torch.cuda.set_sync_debug_mode("error")
    try:
        scale, shift = fcb.fold_bn(*bn, 2.0)
        fcb.bn_scale_(x, *bn)
        fcb.scale_shift(x[:, :, ::2], scale, shift, residual=x[:, :, 1::2], activation="silu")
        for y in (x, x.to(memory_format=torch.channels_last), x[:, :, 1:, 1:]):
            fcb.bn_scale_train(y, *bn)
            fcb.conv_bn_scale_train(y, weight, None, *bn)
            fcb.conv_bn_scale(y, weight, bn[3], *bn, 2.0, activation="gelu")
            ops.bn_scale_train_functional(y, *bn, residual=y, activation="mish")
            ops.conv_bn_scale_train_functional(y, weight, None, *bn)
            fcb.max_pool2d(y.detach().requires_grad_(), 2).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("warm", [True, False])
def test_cuda_graph(device, generator, warm):
    """Captured and replayed on new data; also a kernel whose first call ever is the captured one."""
    dtype = torch.float32 if warm else torch.bfloat16
    shape = (4, 24, 9, 9) if warm else (4, 24, 3, 3)
    activation = "relu" if warm else "relu6"
    x = torch.randn(shape, generator=generator).to(device, dtype)
    bn = random_bn(24, dtype, device, generator)
    if warm:
        fcb.scale_shift(fcb.bn_scale(x, *bn), *fcb.fold_bn(*bn), activation=activation)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        y = fcb.scale_shift(fcb.bn_scale(x, *bn), *fcb.fold_bn(*bn), activation=activation)
    for _ in range(3):
        x.copy_(torch.randn(shape, generator=generator))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, fcb.scale_shift(fcb.bn_scale(x, *bn), *fcb.fold_bn(*bn), activation=activation))


@pytest.mark.parametrize("channels_last", [False, True])
def test_cuda_graph_of_max_pooling_with_gradients(device, generator, channels_last):
    """The positions are those of each replay."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(4, 24, 9, 10, generator=generator).to(device, torch.float16, memory_format=layout).requires_grad_()
    dy = torch.randn(4, 24, 5, 5, generator=generator).to(device, torch.float16)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    step = lambda: torch.autograd.grad(fcb.max_pool2d(x, 3, 2, 1), x, dy)[0]  # noqa: E731
    with torch.cuda.stream(stream):
        step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            dx = step()
    for _ in range(3):
        x.data.copy_(torch.randn(x.shape, generator=generator))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(dx, step())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cuda_graph_sees_parameters_change(device, dtype, generator):
    """BatchNorm is folded in each replay, not when the graph was captured."""
    x = torch.randn(4, 8, 20, 21, generator=generator).to(device, dtype)
    w = torch.randn(24, 8, 3, 3, generator=generator).to(device, dtype)
    bn = random_bn(24, dtype, device, generator)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    fcb.conv_bn_scale(x, w, None, *bn, 1.5)
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        y = fcb.conv_bn_scale(x, w, None, *bn, 1.5)
    for _ in range(3):
        for t, value in zip(bn, random_bn(24, dtype, device, generator), strict=True):
            t.data.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, fcb.conv_bn_scale(x, w, None, *bn, 1.5))


@pytest.mark.parametrize("channels_last", [False, True])
def test_cuda_graph_of_training(device, generator, channels_last):
    """Each replay updates the running statistics, as each call does."""
    model = fcb.ConvBnScale2d(4, 24, 3, 1.5).to(device).train()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    x = torch.randn(4, 4, 20, 21, generator=generator).to(device)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        model(x)
        stream.synchronize()
        other = copy.deepcopy(model)
        with torch.cuda.graph(graph, stream=stream):
            y = model(x)
    for _ in range(3):
        x.copy_(torch.randn(x.shape, generator=generator))
        graph.replay()
        torch.cuda.synchronize()
        with torch.no_grad():
            assert torch.equal(y, other(x))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


def test_a_new_thread(device, generator):
    """A thread that has never touched CUDA."""
    x = torch.randn(2, 8, 5, 5, generator=generator).to(device)
    bn = random_bn(8, torch.float32, device, generator)
    result = []
    thread = threading.Thread(target=lambda: result.append(fcb.bn_scale(x, *bn)))
    thread.start()
    thread.join()
    assert torch.equal(result[0], fcb.bn_scale(x, *bn))


def test_two_gpus(device, two_gpus, generator):
    """Tensors on cuda:1 while cuda:0 is current, on a side stream of cuda:1, and the current device is left alone."""
    first, second = two_gpus
    torch.cuda.set_device(first)
    x = torch.randn(4, 32, 28, 28, generator=generator)
    bn = random_bn(32, torch.float32, "cpu", generator)
    expected = fcb.bn_scale(x.to(first), *(t.to(first) for t in bn)).cpu()
    there = x.to(second), *(t.to(second) for t in bn)
    assert torch.equal(fcb.bn_scale(*there).cpu(), expected)
    assert torch.cuda.current_device() == 0
    scale, shift = fcb.fold_bn(*there[1:])
    assert scale.device == torch.device(second)
    out = torch.full_like(there[0], math.nan)
    stream = torch.cuda.Stream(second)
    with torch.cuda.stream(stream):  # makes cuda:1 current inside
        torch.cuda._sleep(20_000_000)
        late = there[0] + 0
        fcb.bn_scale(late, *there[1:], out=out)
    stream.synchronize()
    assert torch.equal(out.cpu(), expected)
    with pytest.raises(RuntimeError, match="running_mean is on cuda:0, expected cuda:1, where input is"):
        fcb.bn_scale(there[0], bn[0].to(first), *there[2:])
    result = []
    thread = threading.Thread(target=lambda: result.append(fcb.bn_scale_(there[0].clone(), *there[1:])))
    thread.start()
    thread.join()
    assert torch.equal(result[0].cpu(), expected)
    model = fcb.ConvBnScale2d(32, 8, 3, 2.0).eval().to(second)
    with torch.no_grad():
        assert model(there[0]).device == torch.device(second)


BIG = 2**31


big_tensors = pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((3, 5, BIG // 15 + 7), torch.contiguous_format),  # several launches, planes across their borders
        ((1, 2, BIG // 2 + 5), torch.contiguous_format),  # planes longer than a launch
        ((BIG // (8 * 16 * 16) + 1, 8, 16, 16), torch.channels_last),
        ((BIG // (7 * 16 * 16) + 1, 7, 16, 16), torch.channels_last),  # the periodic kernel
        ((BIG // 4096 + 1, 4096), torch.contiguous_format),
    ],
    ids=str,
)  # fmt: skip


@big_tensors
def test_more_than_2_31_elements(device, shape, memory_format):
    x = torch.empty(shape, device=device, dtype=torch.float16, memory_format=memory_format).normal_()
    assert x.numel() > BIG
    bn = random_bn(shape[1], torch.float16, device, torch.Generator().manual_seed(1))
    pairs = [(x, fcb.bn_scale(x, *bn, 1.7))]
    offset = torch.empty(x.numel() + 1, device=device, dtype=torch.float16)[1:]
    pairs.append((x, fcb.bn_scale(x, *bn, 1.7, out=offset.as_strided(shape, x.stride(), offset.storage_offset()))))
    for source, ours in pairs:
        # Chunks along the first dimension that has enough of them, so that eager stays below 2^31.
        dim = 0 if shape[0] > 2 else 2
        size = -(-shape[dim] // 16)
        mean, var, weight, bias = (t.float() for t in bn)
        scale = weight * torch.rsqrt(var + 1e-5) * 1.7
        # Float32 roundings of the terms, about six of them, and one rounding to float16, which may fall either way.
        terms = 6 * scale.abs() + (mean * scale).abs() + (bias * 1.7).abs()  # |x| < 6 in all but absurdly rare draws
        slack = 6 * 2.0**-24 * reference.per_channel(terms, x.dim())
        for a, b in zip(source.split(size, dim), ours.split(size, dim), strict=True):
            eager = reference.bn_scale(a.float(), mean, var, weight, bias, 1.7)
            assert bool(((eager - b.float()).abs() <= 2.0**-11 * eager.abs() + slack + 2.0**-25).all())


@big_tensors
def test_training_with_more_than_2_31_elements(device, shape, memory_format):
    x = torch.empty(shape, device=device, dtype=torch.float16, memory_format=memory_format).normal_(mean=3)
    assert x.numel() > BIG
    bn = random_bn(shape[1], torch.float32, device, torch.Generator().manual_seed(1))
    ours = copy.deepcopy(bn)
    y = fcb.bn_scale_train(x, *ours, 1.7, 0.3, 1e-5)
    dim = 0 if shape[0] > 2 else 2
    size = -(-shape[dim] // 16)
    axes = [d for d in range(x.dim()) if d != 1]
    count = x.numel() // shape[1]
    mean = sum(part.double().sum(axes) for part in x.split(size, dim)) / count
    shifted = reference.per_channel(mean, x.dim())
    squares = sum((part.double() - shifted).square().sum(axes) for part in x.split(size, dim))
    for new, old, batch in zip(ours, bn, (mean, squares / (count - 1)), strict=False):
        torch.testing.assert_close(new.double(), 0.7 * old.double() + 0.3 * batch, rtol=2.0**-22, atol=1e-7)
    scale = bn[2].double() * torch.rsqrt(squares / count + 1e-5) * 1.7
    for a, b in zip(x.split(size, dim), y.split(size, dim), strict=True):
        exact = (a.double() - shifted) * reference.per_channel(scale, x.dim())
        exact += reference.per_channel(bn[3].double() * 1.7, x.dim())
        slack = 8 * 2.0**-24 * reference.per_channel(10 * scale.abs() + bn[3].double().abs() * 1.7, x.dim())
        assert bool(((exact - b.double()).abs() <= 2.0**-11 * exact.abs() + slack + 2.0**-25).all())
