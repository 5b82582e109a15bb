"""squeeze_excite: values, one order of sums, gradients, memory and messages."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fused_conv_bn as fcb
from common import DTYPES, SLOPE, long, long_epilogue
from elementwise_problems import arrange
from fused_conv_bn import reference

ops = torch.ops.fused_conv_bn
LAYOUTS = ("contiguous", "channels_last", "sliced")
# Shape of the input, hidden channels, outputs. In channels_last a block of a cluster has all channels or some, and all pixels or
# some, by vectors or by elements; rows of weights are vectors or not, few or many.
PROBLEMS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "a block of each image": ((3, 24, 5, 5), 6, 24),
    "pixels of each block": ((1, 16, 60, 50), 4, 16),
    "channels of each block": ((2, 320, 7, 7), 20, 320),
    "both": ((1, 160, 31, 30), 10, 160),
    "channels that do not come out even": ((2, 1160, 3, 3), 48, 1000),
    "several passes over the pixels": ((1, 4200, 2, 3), 16, 40),
    "odd channels": ((2, 13, 5, 6), 5, 7),
    "more outputs than channels": ((2, 8, 4, 4), 128, 600),
    "one hidden channel": ((4, 40, 3, 3), 1, 40),
    "one channel": ((2, 1, 5, 4), 3, 1),
    "one pixel": ((5, 48, 1, 1), 12, 48),
    "one image, one pixel, odd": ((1, 7, 1, 1), 3, 9),
    "1-D": ((2, 16, 9), 4, 16),
    "3-D": ((2, 16, 3, 4, 5), 4, 16),
    "no images": ((0, 16, 4, 4), 4, 16),
}
LARGE = ((2, 8200, 2, 2), 4100, 24)
"""More than the kernel has shared memory for."""


def layers_of(
    channels: int, hidden: int, outputs: int, dims: int, dtype: torch.dtype, device: str, g: torch.Generator
) -> list[Tensor]:
    ones = [1] * (dims - 2)
    draw = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    w1, w2 = draw(hidden, channels, *ones) / channels**0.5 * 2, draw(outputs, hidden, *ones) / hidden**0.5 * 2
    return [t.to(device, dtype) for t in (w1, draw(hidden), w2, draw(outputs))]


def tensors(
    problem: tuple[tuple[int, ...], int, int], dtype: torch.dtype, device: str, layout: str, g: torch.Generator
) -> list[Tensor]:
    shape, hidden, outputs = problem
    x = arrange((torch.randn(shape, generator=g) + 0.5).to(device, dtype), layout)
    return [x, *layers_of(shape[1], hidden, outputs, len(shape), dtype, device, g)]


def truth_of(arguments: list[Any], **named: Any) -> np.ndarray:
    """The slope of leaky_relu is that of long_epilogue()."""
    x, w1, b1, w2, b2 = (None if t is None else long(t) for t in arguments)
    y = x.reshape(*x.shape[:2], -1).mean(-1)
    for w, b, of in ((w1, b1, named.get("activation", "relu")), (w2, b2, named.get("gate", "sigmoid"))):
        y = y @ w.reshape(w.shape[:2]).T
        y = y if b is None else y + b
        y = long_epilogue(y, None, of, False)
    return y


def sizes_of(arguments: list[Any]) -> np.ndarray:
    """What is added up for each output, all of it positive."""
    x, w1, b1, w2, b2 = (None if t is None else np.abs(long(t)) for t in arguments)
    y = x.reshape(*x.shape[:2], -1).mean(-1)
    for w, b in ((w1, b1), (w2, b2)):
        y = y @ w.reshape(w.shape[:2]).T
        y = 1.5 * (y if b is None else y + b)  # no activation is steeper
    return y


def check(arguments: list[Any], **named: Any) -> Tensor:
    """At most twice eager's error, or a rounding of the result and some of the sums that it comes of."""
    x, w2 = arguments[0], arguments[3]
    ours, eager = fcb.squeeze_excite(*arguments, **named), reference.squeeze_excite(*arguments, **named)
    assert ours.shape == eager.shape == (x.size(0), w2.size(0), *[1] * (x.dim() - 2))
    assert ours.dtype == x.dtype and ours.stride() == torch.empty(ours.shape).stride()
    if x.numel() == 0:
        return ours
    truth = truth_of(arguments, **named)
    our_error, eager_error = (float(np.abs(long(y.flatten(1)) - truth).max()) for y in (ours, eager))
    sums = DTYPES[torch.float64 if x.dtype == torch.float64 else torch.float32]
    roundings = float((DTYPES[x.dtype] * np.abs(truth) + 8 * sums * (sizes_of(arguments) + 1)).max())
    assert our_error <= max(2 * eager_error, roundings), (our_error, eager_error, roundings)
    return ours


@pytest.fixture
def cuda(need_gpus: Callable[[int], None]) -> str:
    need_gpus(1)
    return "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_values(name: str, layout: str, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    check(tensors(PROBLEMS[name], dtype, device, layout, generator), activation="silu")


def test_random_problems(device: str, generator: torch.Generator) -> None:
    chosen = random.Random(7)
    for _ in range(60):
        dtype = chosen.choice(list(DTYPES))
        vector = 16 // dtype.itemsize
        channels = chosen.choice((vector, 1)) * chosen.randint(1, chosen.choice((3, 20, 90)))
        shape = chosen.randint(1, 5), channels, chosen.randint(1, 12), chosen.randint(1, 12)
        problem = shape, chosen.randint(1, chosen.choice((8, 70))), chosen.choice((channels, chosen.randint(1, 300)))
        arguments: list[Any] = tensors(problem, dtype, device, chosen.choice(LAYOUTS), generator)
        for i in (2, 4):
            if chosen.random() < 0.2:
                arguments[i] = None
        activation, gate = (chosen.choice(list(reference.ACTIVATIONS)) for _ in range(2))
        check(arguments, activation=activation, gate=gate, negative_slope=SLOPE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_no_block_has_memory_for(layout: str, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    check(tensors(LARGE, dtype, device, layout, generator), activation="hardswish", gate="hardsigmoid")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("hidden", [1, 2, 4, 7, 8, 20, 28, 48, 64, 100, 128])
def test_hidden_channels(hidden: int, layout: str, device: str, generator: torch.Generator) -> None:
    for dtype in (torch.float32, torch.float16):
        check(tensors(((2, 96, 6, 5), hidden, 96), dtype, device, layout, generator), activation="relu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    arguments = tensors(((3, 40, 6, 5), 12, 40), dtype, device, "channels_last", generator)
    for gate in reference.ACTIVATIONS:
        check(arguments, activation=activation, gate=gate, negative_slope=SLOPE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_without_biases(layout: str, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    x, w1, b1, w2, b2 = tensors(PROBLEMS["channels of each block"], dtype, device, layout, generator)
    for biases in ((None, b2), (b1, None), (None, None)):
        check([x, w1, biases[0], w2, biases[1]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_memory(dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    """Views beside a 16-byte boundary, with infinity around them, and weights of other strides."""

    def moved(t: Tensor, offset: int) -> Tensor:
        memory = torch.full((t.numel() + 16,), math.inf, dtype=dtype, device=device)
        view = memory[offset : offset + t.numel()].as_strided(t.shape, t.stride())
        return view.copy_(t)

    for layout in ("contiguous", "channels_last"):
        arguments = tensors(((2, 144, 7, 6), 16, 144), dtype, device, layout, generator)
        for offsets in ((1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 3, 0, 5), (0, 0, 0, 1, 0), (3, 5, 1, 7, 3)):
            check([moved(t, offset) for t, offset in zip(arguments, offsets, strict=True)])
        x, w1, b1, w2, b2 = arguments
        turned = [w.flatten(1).t().contiguous().t()[..., None, None] for w in (w1, w2)]
        apart = [torch.stack([b, b], 1)[:, 0] for b in (b1, b2)]
        ours = fcb.squeeze_excite(x, turned[0], apart[0], turned[1], apart[1])
        assert torch.equal(ours, fcb.squeeze_excite(*arguments))


def test_values_that_are_not_finite(device: str, generator: torch.Generator) -> None:
    for layout in ("contiguous", "channels_last"):
        arguments = tensors(((4, 24, 9, 10), 6, 24), torch.float32, device, layout, generator)
        x = arguments[0]
        x[0, 3, 4, 5], x[1, 7, 8, 9], x[2, 8, 0, 0], x[3, 1] = math.nan, math.inf, -math.inf, 3e38
        for activation, gate in (("relu", "sigmoid"), ("silu", "hardsigmoid"), ("none", "none")):
            named = {"activation": activation, "gate": gate}
            ours, eager = fcb.squeeze_excite(*arguments, **named), reference.squeeze_excite(*arguments, **named)
            torch.testing.assert_close(ours, eager, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_one_order_of_sums(device: str, generator: torch.Generator) -> None:
    for dtype in (torch.float16, torch.float32):
        arguments = tensors(((8, 160, 31, 30), 10, 160), dtype, device, "channels_last", generator)
        first = fcb.squeeze_excite(*arguments)
        assert all(torch.equal(first, fcb.squeeze_excite(*arguments)) for _ in range(20 if device == "cuda" else 2))


def test_launches(cuda: str, generator: torch.Generator) -> None:
    """One in channels_last on GPUs with clusters, and one in front elsewhere."""
    has_clusters = torch.cuda.get_device_capability() == (9, 0)
    for layout, dtype, expected in [
        ("channels_last", torch.float16, 1 if has_clusters else 2),
        ("channels_last", torch.float32, 1 if has_clusters else 2),
        ("contiguous", torch.float16, 2),
    ]:
        arguments = tensors(PROBLEMS["channels of each block"], dtype, "cuda", layout, generator)
        fcb.squeeze_excite(*arguments)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            fcb.squeeze_excite(*arguments)
            torch.cuda.synchronize()
        kernels = [e.name for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [name for name in kernels if "kernel" in name]
        assert len(kernels) == expected and "squeeze_kernel" in kernels[-1], kernels


def test_in_a_cuda_graph(cuda: str, generator: torch.Generator) -> None:
    arguments = tensors(PROBLEMS["both"], torch.float16, "cuda", "channels_last", generator)
    expected = fcb.squeeze_excite(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = arguments[0] * 2  # which the kernel behind it has to wait for
        ours = fcb.squeeze_excite(x * 0.5, *arguments[1:])
    for _ in range(3):
        ours.zero_()
        graph.replay()
        assert torch.equal(ours, expected)


def test_behind_what_writes_its_tensors(device: str, generator: torch.Generator) -> None:
    """Weights too: a kernel may start before the one in front of it has ended."""
    arguments = tensors(((4, 64, 20, 20), 16, 64), torch.float16, device, "channels_last", generator)
    expected = fcb.squeeze_excite(*arguments)
    written = [torch.zeros_like(t) for t in arguments]
    for _ in range(20):
        for t, value in zip(written, arguments, strict=True):
            t.copy_(value)
        assert torch.equal(fcb.squeeze_excite(*written), expected)
        for t in written:
            t.zero_()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients(layout: str, device: str, generator: torch.Generator) -> None:
    """PyTorch's own, and the same results."""
    arguments = tensors(((2, 4, 3, 2), 3, 5), torch.float64, device, layout, generator)
    for t in arguments:
        t.requires_grad_()

    def run(*tensors: Tensor) -> Tensor:
        return fcb.squeeze_excite(*tensors, activation="tanh")

    assert torch.autograd.gradcheck(run, arguments, fast_mode=True)
    with torch.no_grad():
        raw = run(*arguments)
    torch.testing.assert_close(raw, run(*arguments).detach())
    x, *layers = arguments
    found = torch.func.grad(lambda x: run(x, *layers).sum())(x.detach())
    torch.testing.assert_close(found, torch.autograd.grad(run(x, *layers).sum(), x)[0])


def test_autocast(device: str, generator: torch.Generator) -> None:
    """Its tensors are cast, as those of convolutions are."""
    arguments = tensors(PROBLEMS["a block of each image"], torch.float32, device, "channels_last", generator)
    with torch.autocast(device, torch.bfloat16):
        ours = fcb.squeeze_excite(*arguments)
        half = fcb.squeeze_excite(arguments[0].bfloat16(), *arguments[1:])
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, half)
    assert torch.equal(ours, fcb.squeeze_excite(*(t.bfloat16() for t in arguments)))


@pytest.mark.parametrize("name", ["both", "one pixel", "odd channels", "1-D", "3-D", "no images"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fakes(name: str, layout: str, device: str, generator: torch.Generator) -> None:
    for dtype in (torch.float32, torch.float16):
        x, w1, b1, w2, b2 = tensors(PROBLEMS[name], dtype, device, layout, generator)
        for biases, named in (((b1, b2), {}), ((None, None), {"activation": "leaky_relu", "negative_slope": SLOPE})):
            torch.library.opcheck(ops.squeeze_excite.default, (x, w1, biases[0], w2, biases[1]), named)


def test_flops(generator: torch.Generator) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    arguments = tensors(((3, 24, 5, 5), 6, 40), torch.float32, "cpu", "channels_last", generator)
    for call in (ops.squeeze_excite.default, reference.squeeze_excite):
        with FlopCounterMode(display=False) as counter:
            call(*arguments)
        assert counter.get_total_flops() == 2 * 3 * (24 * 6 + 6 * 40)


def test_messages(device: str, generator: torch.Generator) -> None:
    x, w1, b1, w2, b2 = tensors(((2, 16, 5, 5), 4, 8), torch.float32, device, "contiguous", generator)
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((x[0, 0], w1, b1, w2, b2), r"input has shape \[5, 5\], expected 3 to 5 dimensions: \(N, C, L\)"),
        ((x[:, :, :0], w1, b1, w2, b2), r"input has shape \[2, 16, 0, 5\], expected at least one element in each"),
        (
            (x, w1[:, :3], b1, w2, b2),
            r"weight1 has shape \[4, 3, 1, 1\], expected \[outputs, 16, 1, 1\], the channels of input in dimension 1",
        ),
        ((x, w1.expand(4, 16, 3, 3), b1, w2, b2), r"weight1 has shape \[4, 16, 3, 3\], expected \[outputs, 16, 1, 1\]"),
        ((x, w1.flatten(1), b1, w2, b2), r"weight1 has shape \[4, 16\], expected \[outputs, 16, 1, 1\]"),
        ((x, w1[:0], b1[:0], w2, b2), r"weight1 has shape \[0, 16, 1, 1\], expected \[outputs, 16, 1, 1\]"),
        (
            (x, w1, b1, w2[:, :2], b2),
            r"weight2 has shape \[8, 2, 1, 1\], expected \[outputs, 4, 1, 1\], the channels of weight1's result in dim",
        ),
        ((x, w1, b1[:2], w2, b2), r"bias1 has shape \[2\], expected \[4\], one element for each channel of weight1's"),
        ((x, w1, b1, w2, b1), r"bias2 has shape \[4\], expected \[8\], one element for each channel of weight2's"),
        ((x, w1.half(), b1, w2, b2), "weight1 has dtype float16, expected float32, the dtype of input"),
        ((x, w1, b1, w2.double(), b2), "weight2 has dtype float64, expected float32, the dtype of input"),
        ((x, w1, b1.half(), w2, b2), "bias1 has dtype float16, expected float32"),
    ]
    for gradient in (False, True):
        x.requires_grad_(gradient)
        for arguments, message in wrong:
            if not gradient or arguments[0] is x:
                with pytest.raises(RuntimeError, match=f"squeeze_excite: {message}"):
                    fcb.squeeze_excite(*arguments)
        for name in ("activation", "gate"):
            with pytest.raises(RuntimeError, match=f"squeeze_excite: {name} is 'elu', expected one of 'none', 'relu'"):
                fcb.squeeze_excite(x, w1, b1, w2, b2, **{name: "elu"})
    with pytest.raises(RuntimeError, match="squeeze_excite: input has dtype Int, expected float32, float16"):
        fcb.squeeze_excite(x.int(), w1.int(), None, w2.int(), None)
    with pytest.raises(TypeError, match="squeeze_excite: weight2 is None, expected a tensor"):
        fcb.squeeze_excite(x, w1, b1, None, b2)  # type: ignore[arg-type]


def test_devices(cuda: str, generator: torch.Generator) -> None:
    x, w1, b1, w2, b2 = tensors(((2, 16, 5, 5), 4, 8), torch.float32, "cuda", "contiguous", generator)
    with pytest.raises(RuntimeError, match="squeeze_excite: weight1 is on cpu.*, expected cuda:0, where input is"):
        ops.squeeze_excite(x, w1.cpu(), b1, w2, b2)
    with pytest.raises(RuntimeError, match="squeeze_excite: bias2 is on cpu.*, expected cuda:0, where input is"):
        ops.squeeze_excite(x, w1, b1, w2, b2.cpu())
